"""Every block of docs/frameworks.md runs as it stands. Needs the extra `frameworks`; CI installs it."""

import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "frameworks.md").read_text()
FIRST, *_ = re.findall(r"```python\n(.*?)```", PAGE, re.S)
BLOCKS = dict(re.findall(r"\n## ([^\n]+)\n.*?```python\n(.*?)```", PAGE, re.S))
NEEDS = {"Flax NNX": "flax", "Flax Linen": "flax", "Equinox": "equinox", "Haiku": "haiku", "Keras": "keras"}


def test_the_page_has_a_block_for_each_framework():
    assert BLOCKS.keys() == NEEDS.keys()


@pytest.mark.filterwarnings("default")  # the frameworks' own
@pytest.mark.parametrize("name", NEEDS)
def test_a_block_runs_and_its_state_goes_round(name):
    missing = [module for module in ("optax", NEEDS[name]) if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"{missing} not installed: pip install 'jaxplan[frameworks]' (Keras: jaxplan[export])")
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # the frameworks count on it
        exec(compile(FIRST + BLOCKS[name], f"docs/frameworks.md: {name}", "exec"), names)
    assert np.isfinite(names["first"]) and np.isfinite(names["second"])
    ((plan, _),) = [(entry.plan, entry.run) for entry in names["step"]._known.values()]
    assert len(names["step"]._known) == 1, "the second step is not planned anew"
    tied = {output for output, _ in plan.modelled.graph.ties}
    outputs = enumerate(zip(plan.traced.out_paths, plan.traced.out_avals, strict=True))
    left = [path for position, (path, aval) in outputs if position not in tied and aval.size > 1]
    assert tied and not left, "all of the state goes round"
