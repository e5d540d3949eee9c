"""The migration pages: the part after runs, and gives what the part before gives, where this JAX still runs that."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxplan

FOLDER = Path(__file__).parent.parent / "docs" / "migrate"
PAGES = sorted(page.stem for page in FOLDER.glob("*.md"))
GONE = ("from_alpa", "from_auto")
"""Pages whose part before runs on no JAX that jaxplan supports (it is fenced as py)."""


def parts(name):
    """(what both start with, before, after)."""
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    start, rest = text.split("\n## Before\n")
    before, after = rest.split("\n## After\n")
    found = [re.findall(r"```py(?:thon)?\n(.*?)```", part, re.S) for part in (start, before, after)]
    assert all(len(blocks) == 1 for blocks in found)  # no block that is not run
    return [block for (block,) in found]


def ran(name, *texts):
    names: dict = {}
    for text in texts:
        exec(compile(text, f"docs/migrate/{name}.md", "exec"), names)
    return names


def test_there_is_a_page_for_each_way_people_come():
    assert PAGES == ["from_alpa", "from_auto", "from_pjit", "from_pmap", "from_shard_map"]
    index = (FOLDER.parent / "export.md").read_text(encoding="utf-8")
    assert all(f"migrate/{name}.md" in index for name in PAGES)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_part_after_gives_what_the_part_before_gives(name):
    start, before, after = parts(name)
    found = ran(name, start, after)
    if name in GONE:
        shown = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
        assert f"```py\n{before}```" in shown
        x, up, down = (np.asarray(found[key]) for key in ("x", "up", "down")) if "up" in found else (
            np.asarray(found["x"]), *(np.asarray(found["params"][key]) for key in ("up", "down")))  # fmt: skip
        want = np.mean((np.maximum(x @ up, 0) @ down - x) ** 2)
    else:
        want = ran(name, start, before)["result"]
    np.testing.assert_allclose(np.asarray(found["result"]), np.asarray(want), rtol=1e-5)
    plans = [value for value in found.values() if isinstance(value, jaxplan.Plan)]
    assert plans or isinstance(found["step"], jaxplan.auto.AutoSharded)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_parameters_after_a_step_are_the_same_too():
    start, before, after = parts("from_pmap")
    old, new = ran("from_pmap", start, before), ran("from_pmap", start, after)
    for one, other in zip(jax.tree.leaves(old["params_after"]), jax.tree.leaves(new["params_after"]), strict=True):
        np.testing.assert_allclose(np.asarray(other), np.asarray(one), rtol=1e-5, atol=1e-7)
