"""Real models: planned whole at their published sizes, and computing the same at tiny ones; and the script that covers them."""

import importlib.util
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from jax.sharding import AbstractMesh

import jaxplan
from jaxplan.examples import Program, programs
from jaxplan.machine import PRESETS, Link

SCRIPTS = Path(__file__).parent.parent / "scripts"
FRAMEWORKS = ("flax", "equinox", "haiku", "optax")


def load(name: str, file: str) -> ModuleType:
    """A script, or a package beside it, as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


models = load("models", "models/__init__.py")
coverage = load("scripts_coverage", "coverage.py")

MILLIONS = {
    "gpt2_small": 124.4,  # the checkpoint "124M"; table 2 of Radford et al., 2019, says 117, by mistake as their repository adds
    "vit_b16": 86.6,  # torchvision's table of models
    "t5_base": 222.9,  # the released checkpoint; "about 220 million" in Raffel et al., 2020, section 3.1.2
    "llama3_8b": 8030.3,  # the released checkpoint
    "mixtral_8x7b": 46_702.8,  # the released checkpoint; "47B" in Jiang et al., 2024
    "mamba_130m": 129.1,  # the released checkpoint
    "resnet50": 25.6,  # torchvision's table of models
    "convnext_tiny": 28.6,  # Liu et al., 2022, table 1
    "ddpm_unet": 35.7,  # Ho et al., 2020, appendix B
    "lstm_language_model": 66.0,  # Zaremba et al., 2014, table 1
}
"""Parameters, as published."""

UNCOUNTED = {"molecule_graph_network", "ppo_update", "neural_ode", "neural_ode_adaptive", "gaussian_process"}
"""Models whose sources give no number."""

PLANNED_SLOWLY = {"vit_b16", "resnet50", "convnext_tiny", "ddpm_unet"}
COMPILED_QUICKLY = {"neural_ode", "gaussian_process"}


def each(slow: set[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in models.MODELS]


@pytest.fixture(autouse=True)
def as_users_trace() -> Iterator[None]:
    """The frameworks count on JAX's standard promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def model_or_skip(name: str, size: str) -> Program:
    try:
        return models.model(name, size)
    except ModuleNotFoundError as error:
        if error.name not in FRAMEWORKS:
            raise
        pytest.skip(f"{error.name} not installed: pip install 'jaxplan[frameworks]'")


def weights(program: Program) -> Any:
    """A model's parameters are its first argument, or are in a state beside the optimizer's."""
    state = program.args[0]
    if hasattr(state, "params"):
        return state.params
    return state[0] if isinstance(state, Mapping) and 0 in state else state


def plain(x: Any) -> np.ndarray:
    """Values as float64; of keys, their data."""
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).astype(np.float64)


@pytest.mark.filterwarnings("default")  # the frameworks' own
@pytest.mark.parametrize("name", each(PLANNED_SLOWLY))
def test_a_published_model_is_planned(name: str) -> None:
    program = model_or_skip(name, "published")
    assert program.name == name
    if name not in UNCOUNTED:
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(weights(program)))
        assert count / 1e6 == pytest.approx(MILLIONS[name], rel=5e-3)
    mesh = AbstractMesh((4, 4), ("x", "y"))
    plan = jaxplan.make_plan(program.fn, *program.args, mesh=mesh, machine="v5p", memory_budget=math.inf)
    assert not [primitive for kind, primitive in coverage.by_class(plan) if kind == "unknown"]
    numbered = jax.tree.unflatten(jax.tree.structure(program.args), range(len(plan.traced.in_avals)))
    state = set(jax.tree.leaves([numbered[position] for position in program.donate]))
    left = state - {source for _, source in plan.modelled.graph.ties}
    assert not [plan.traced.in_paths[i] for i in left if plan.traced.in_avals[i].size > 1], "all of the state goes round"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", each(models.MODELS.keys() - COMPILED_QUICKLY))
def test_a_tiny_model_computes_the_same(name: str) -> None:
    program = model_or_skip(name, "tiny")
    args = program.make_args(0)
    want = jax.jit(program.fn)(*args)
    free = Link(1e-15, 1e-12)  # all that may be split is, where messages cost nothing
    machine = replace(PRESETS["cpu"], name="free links", inner=free, outer=free)
    plan = jaxplan.make_plan(program.fn, *args, mesh=mesh_of((4, 2)), machine=machine)
    assert plan.exchanges
    got = plan.jit(donate_argnums=())(*args)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = plain(a), plain(b)
        assert np.all(np.isfinite(a))
        largest = np.max(np.abs(a), initial=0.0)
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5 * largest + 1e-7, err_msg=jax.tree_util.keystr(path))


def test_every_model_has_a_count_or_says_none() -> None:
    assert MILLIONS.keys() | UNCOUNTED == models.MODELS.keys()
    assert not MILLIONS.keys() & UNCOUNTED


def test_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="'huge'; it may be 'tiny' or 'published'"):
        models.model("resnet50", "huge")


# --- the script ------------------------------------------------------------------------------------------------------


def planned(program: Program) -> jaxplan.Plan:
    return jaxplan.make_plan(program.fn, *program.args, mesh=AbstractMesh((2, 2), ("x", "y")), machine="v5p")


def test_the_script_covers_all_examples_and_models() -> None:
    assert set(coverage.everything()) == {*programs("full"), *models.MODELS}


def test_the_script_passes_what_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    program = programs()["mlp_sgd"]
    assert coverage.run([("mlp_sgd", lambda: program)], planned) == 0
    printed = capsys.readouterr().out
    assert "unknown: 0 primitives, 0 operators\nplans: 1 made, 0 failed\n" in printed
    found = coverage.cover("mlp_sgd", lambda: program, planned)
    products = sum(number for (_, primitive), number in found.operators.items() if primitive == "dot_general")
    assert products == str(jax.make_jaxpr(program.fn)(*program.args)).count("dot_general[")


def test_the_script_fails_on_what_cannot_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(x: jax.Array) -> jax.Array:
        return x @ x

    program = Program("broken", broken, (jax.ShapeDtypeStruct((2, 3), jnp.float32),), lambda seed: ())
    assert coverage.run([("broken", lambda: program)], planned) == 1
    printed = capsys.readouterr()
    assert "plans: 0 made, 1 failed: broken" in printed.out
    assert "Traceback" in printed.err


def test_the_script_fails_on_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    def calls(x: jax.Array) -> jax.Array:
        return jax.ffi.ffi_call("nobody_knows", jax.ShapeDtypeStruct(x.shape, x.dtype))(x) + 1.0

    program = Program("calls", calls, (jax.ShapeDtypeStruct((8, 8), jnp.float32),), lambda seed: ())
    assert coverage.run([("calls", lambda: program)], planned) == 1
    printed = capsys.readouterr().out
    assert "unknown in calls: ffi_call" in printed and "plans: 1 made, 0 failed" in printed
