"""Stages of unlike layers that nobody asked for: where they are taken, and where they are not."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, mesh_of
from jax.sharding import PartitionSpec

import jaxplan
from jaxplan.api import StagedPlan
from jaxplan.machine import PRESETS, Link

WIDTHS = (96, 128, 80, 64, 8, 72, 112, 96, 80)
"""Of layers that all differ; few values go over the middle."""


def machine(node, outer=1e9):
    """An A100 with slower arithmetic, for programs so small, with nodes of so many devices; bytes per second between nodes."""
    a100 = PRESETS["a100"]
    slow = {dtype: 1e3 * seconds for dtype, seconds in a100.seconds_per_flop.items()}
    inner = replace(a100.inner, latency_seconds=0.0)
    return replace(a100, name="small", seconds_per_flop=slow, node=node, inner=inner, outer=Link(1 / outer, 0.0, "of a test"))


def tower(widths=WIDTHS, batch=256):
    random = np.random.default_rng(0)

    def loss(layers, x, y):
        for number, layer in enumerate(layers):
            x = (jnp.tanh if number % 2 else jax.nn.relu)(x @ layer)
        return jnp.mean((x - y) ** 2)

    def step(layers, x, y):
        value, gradients = jax.value_and_grad(loss)(layers, x, y)
        return jax.tree.map(lambda w, g: w - 0.1 * g, layers, gradients), value

    layers = [jnp.asarray(random.normal(size=pair) / np.sqrt(pair[0]), jnp.float32) for pair in itertools.pairwise(widths)]
    return step, (layers, *[jnp.asarray(random.normal(size=(batch, n)), jnp.float32) for n in (widths[0], widths[-1])])


def planned(node=2, outer=1e9, program=tower, **options):
    step, args = program()
    return jaxplan.make_plan(step, *args, mesh=mesh_of((2, 2)), machine=machine(node, outer), **options), step, args


def test_taken_across_a_slow_link_where_it_is_faster():
    plan, _, _ = planned()
    other, _, _ = planned(pipeline=None)
    assert isinstance(plan, StagedPlan) and plan.staged.axis == "x"
    assert plan.seconds < 0.9 * other.seconds


@pytest.mark.slow
def test_what_was_taken_is_a_plan_like_one_that_was_asked_for(tmp_path):
    plan, step, args = planned(microbatches=8)
    assert isinstance(plan, StagedPlan)
    assert_close(step(*args), plan.jit()(*args))
    assert plan.replan().seconds == plan.seconds  # asks for the axis by name
    plan.save(tmp_path / "plan.json")
    again = jaxplan.load_plan(tmp_path / "plan.json", step, *args, mesh=plan.mesh)
    assert isinstance(again, StagedPlan) and again.seconds == plan.seconds


@pytest.mark.parametrize(
    ("why", "options"),
    [
        ("no link is slower than another", {"node": 4}),
        ("what crosses takes longer", {"outer": 3e7}),
        ("wide in the middle", {"outer": 1e8, "program": lambda: tower((96, 128, 80, 64, 96, 72, 112, 96, 80))}),
        ("forbidden", {"pipeline": None}),
        ("inputs are pinned along the slow link", {"pins": {"x": PartitionSpec("x")}}),
        ("a bound is asked for", {"certify": True}),
    ],
)
def test_not_taken(why, options):
    plan, _, _ = planned(**options)
    assert not isinstance(plan, StagedPlan), why
    assert plan.pipeline is None


def test_not_taken_for_layers_that_are_a_loop():
    plan, _, _ = planned(program=lambda: tower((96,) * 9), outer=1e8)
    assert not isinstance(plan, StagedPlan)


def test_not_taken_inside_of_another_jitted_function():
    step, args = tower()
    sharded = jaxplan.auto_shard(mesh_of((2, 2)), machine=machine(2))(step)
    assert isinstance(sharded.plan(*args), StagedPlan)
    found = jax.eval_shape(lambda *given: sharded(*given), *args)
    assert found[1].shape == ()


@pytest.mark.slow
def test_taken_where_nothing_else_fits():
    plan, _, _ = planned(node=4, memory_budget=400_000, donate_argnums=0)
    assert isinstance(plan, StagedPlan) and plan.peak_bytes <= 400_000
    with pytest.raises(ValueError, match="nothing fits"):
        planned(node=4, memory_budget=400_000, donate_argnums=0, pipeline=None)
    with pytest.raises(ValueError, match="nothing fits: the smallest peak"):
        planned(node=4, memory_budget=40_000, donate_argnums=0)
