"""Pipelines over layers that are written out one after another: found, planned, run, and refused."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, mesh_of
from jax.sharding import AbstractMesh

import jaxplan
from jaxplan import hybrid
from jaxplan.examples.decoder import FULL, SMALL, decoder
from jaxplan.graph import build_graph
from jaxplan.machine import machine
from jaxplan.pipeline import rerolled, scans
from jaxplan.pipeline.repeats import repeats
from jaxplan.trace import trace

SLOW_WORK = jaxplan.Machine("slow", {"float32": 1e-8}, 1e-9, 1e12, jaxplan.Link(1e-10, 0.0), jaxplan.Link(1e-10, 0.0), 1 << 20)
TINY = replace(SMALL, width=16, heads=2, mlp_width=24, vocabulary=32, sequence=6, batch=8)
SLOW_LINKS = machine("a100").with_axis("s", machine("a100").inner.slower(20))


def tower(x, params, moments):
    """Layers with weights of their own, one after another: a step down the gradient with momentum."""

    def loss(params):
        h = x @ params["first"]
        for w, b in params["layers"]:
            h = h + jnp.tanh(h @ w + b[None, :])
        return jnp.mean(jnp.square(h))

    value, gradient = jax.value_and_grad(loss)(params)
    moments = jax.tree.map(lambda m, g: jnp.float32(0.9) * m + g, moments, gradient)
    return jax.tree.map(lambda w, m: w - jnp.float32(0.1) * m, params, moments), moments, value


def tower_args(rows=16, width=8, depth=4):
    keys = jax.random.split(jax.random.key(0), depth + 2)
    first, *weights = [jax.random.normal(k, (width, width), jnp.float32) / 4 for k in keys[1:]]
    params = {"first": first, "layers": [(w, jnp.zeros((width,), jnp.float32)) for w in weights]}
    return jax.random.normal(keys[0], (rows, width), jnp.float32), params, jax.tree.map(jnp.zeros_like, params)


# --- planned, run, and kept -------------------------------------------------------------------------------------------


def test_layers_that_are_written_out_run_in_stages_and_compute_the_same():
    args = tower_args(depth=5)
    plan = jaxplan.make_plan(tower, *args, mesh=mesh_of((2, 2, 2)), machine=SLOW_WORK, pipeline="x", microbatches=4)
    assert [chain.layers for chain in plan.pipeline.chains] == [(3, 2), (3, 2)]
    assert "5 layers, 3+2 on the stages" in str(plan)
    assert any(layout[axis] >= 0 for layout in plan.layouts.values() for axis in (1, 2)), "the other axes work too"
    assert_close(jax.jit(tower)(*args), plan.jit()(*args))
    assert float(plan.cost.subs(plan.symbol_values)) == pytest.approx(plan.seconds, rel=1e-9)


def test_the_program_as_traced_is_what_other_plans_are_derived_from(tmp_path):
    args = tower_args()
    mesh = AbstractMesh((2, 2), ("s", "d"))
    plan = jaxplan.make_plan(tower, *args, mesh=mesh, machine=SLOW_WORK, pipeline="s", microbatches=4, dims=["B D"])
    plain = jaxplan.make_plan(tower, *args, mesh=mesh, machine=SLOW_WORK, pipeline=None, dims=["B D"])
    plan.save(tmp_path / "plan.json")
    loaded = jaxplan.load_plan(tmp_path / "plan.json", tower, *args)
    for one in (plan, loaded):
        without = one.replan(pipeline=None, microbatches=None)
        assert without.pipeline is None and without.traced.jaxpr is not plan.traced.jaxpr
        assert without.seconds == plain.seconds and without.in_specs == plain.in_specs
        assert one.replan().pipeline == plan.pipeline and one.replan().in_specs == plan.in_specs
    assert loaded.pipeline == plan.pipeline and loaded.in_specs == plan.in_specs and loaded.seconds == plan.seconds
    assert {"B", "D"} <= {str(symbol) for symbol in plan.cost.free_symbols}
    larger = jax.ShapeDtypeStruct((64, 8), jnp.float32), *args[1:]
    want = jaxplan.make_plan(tower, *larger, mesh=mesh, machine=SLOW_WORK, pipeline=None)
    assert plan.replan(sizes={"B": 64}, pipeline=None, microbatches=None).seconds == pytest.approx(want.seconds, rel=1e-12)


def dropped(params, x, key, pick):
    """A step down the gradient of written-out layers that JAX differentiates by a rule of its own (`relu`), with dropout; each
    layer picks its key by its number."""

    def loss(params):
        first, *layers = params
        h, keys = x @ first, jax.random.split(key, len(layers))
        for number, w in enumerate(layers):
            kept = jax.random.bernoulli(pick(key, keys, number), 0.75, h.shape)
            h = h + jnp.where(kept, jax.nn.relu(h @ w) / jnp.float32(0.75), jnp.float32(0))
        return jnp.mean(jnp.square(h))

    return jax.tree.map(lambda w, g: w - jnp.float32(0.1) * g, params, jax.grad(loss)(params))


PICKS = {
    "one of many": lambda key, keys, number: keys[number],
    "folded": lambda key, keys, number: jax.random.fold_in(key, number),
    "words": lambda key, keys, number: jax.random.wrap_key_data(jax.random.key_data(keys)[number]),
}


@pytest.mark.parametrize("how", PICKS)
def test_layers_that_pick_their_keys_run_in_stages_there_and_back(how):
    """The numbers of the layers are in the equations that pick: without these, blocks are alike."""
    x, params, _ = tower_args()
    args = [params["first"], *[w for w, _ in params["layers"]]], x, jax.random.key(3)
    fn = partial(dropped, pick=PICKS[how])
    found = [(s.length, s.equation.params["reverse"]) for s in scans(rerolled(trace(fn, args, {})).jaxpr.jaxpr)]
    assert found == [(4, False), (4, True)]
    plan = jaxplan.make_plan(fn, *args, mesh=mesh_of((2, 2)), machine=SLOW_WORK, pipeline="x", microbatches=4)
    assert [chain.layers for chain in plan.pipeline.chains] == [(2, 2), (2, 2)]
    assert_close(jax.jit(fn)(*args), plan.jit()(*args))


def test_layers_that_all_read_the_encoders_result_are_found_on_the_way_back():
    """The last layer starts the sum of what all give back to it, with an equation less than the others."""
    weights = [[jax.random.normal(jax.random.key(7 * n + k), (8, 8)) / 3 for k in range(3)] for n in range(9)]
    source, target = (jax.random.normal(jax.random.key(k), (16, 8)) for k in (100, 101))

    def loss(params, source, target):
        (first, *_), encoder, decoder = params[0], params[1:5], params[5:]
        memory, y = source @ first, target @ params[0][1]
        for a, b, _ in encoder:
            memory = memory + jnp.tanh(jnp.tanh(memory @ a) @ b)
        for a, b, c in decoder:
            y = y + jnp.tanh(jnp.tanh(y @ a) * (memory @ b)) @ c
        return jnp.mean(jnp.square(y))

    def step(params, source, target):
        return jax.tree.map(lambda w, g: w - jnp.float32(0.1) * g, params, jax.grad(loss)(params, source, target))

    args = weights, source, target
    found = [(s.length, s.equation.params["reverse"]) for s in scans(rerolled(trace(step, args, {})).jaxpr.jaxpr)]
    assert found == [(4, False), (4, False), (4, True), (4, True)]
    plan = jaxplan.make_plan(step, *args, mesh=mesh_of((2, 2)), machine=SLOW_WORK, pipeline="x", microbatches=4)
    assert [chain.layers for chain in plan.pipeline.chains] == [(2, 2)] * 4
    assert_close(jax.jit(step)(*args), plan.jit()(*args))


def test_layers_that_pick_from_a_stack_are_a_scan_over_it():
    """Parameters are stacked already: they are not taken apart to be stacked again."""

    def forward(stack, x):
        for number in range(4):
            x = jnp.tanh(x @ stack[number])
        return x, stack[1]

    x, params, _ = tower_args()
    args = jnp.stack([w for w, _ in params["layers"]]), x
    again = rerolled(trace(forward, args, {}))
    (scan,) = scans(again.jaxpr.jaxpr)
    assert scan.equation.invars[-1] is again.jaxpr.jaxpr.invars[0] and scan.length == 4
    assert_close(forward(*args), jax.extend.core.jaxpr_as_fun(again.jaxpr)(*args))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "axis", "remat", "layers"),
    [((2, 2, 2), "x", True, 4), ((2, 4), "x", False, 4)],
)
def test_an_unrolled_decoder_in_stages_with_its_other_axes_planned(shape, axis, remat, layers):
    program = decoder(replace(TINY, remat=remat, layers=layers), "unrolled")
    args = program.make_args(0)
    plan = jaxplan.make_plan(program.fn, *args, mesh=mesh_of(shape), machine=SLOW_WORK, pipeline=axis, microbatches=4)
    assert plan.pipeline.axis == axis and len(plan.pipeline.chains) == 2
    (_, want, loss), (_, got, same) = jax.jit(program.fn)(*args), plan.jit()(*args)
    assert_close((want["mu"], loss), (got["mu"], same))  # moments are the gradients


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "m", "changes"),
    [
        ((2, 2, 2), 2, {}),  # with y and z as one
        ((2, 2, 2), 4, {}),  # with y and z apart: gathered one after the other
        ((2, 2, 2), 4, {"remat": True}),  # what comes back lies otherwise than what turns round
        ((2, 2, 2), 4, {"layers": 5}),  # stages of unequal length: residuals are moved as often as the longest has layers
        ((4, 2), 4, {}),  # what leaves the last stage is read in parts along the stages
    ],
)
def test_one_loop_both_ways_sends_what_was_planned(shape, m, changes, monkeypatch):
    """Weights and the embedding are gathered once, residuals at every tick, layer by layer; sums lie in parts."""
    monkeypatch.setattr(hybrid, "SCHEDULES", ("1f1b",))
    config = replace(SMALL, layers=4, width=64, heads=4, mlp_width=128, vocabulary=128, sequence=16, batch=16, remat=False)
    program = decoder(replace(config, **changes), "unrolled")
    asked = {"mesh": mesh_of(shape), "machine": "cpu", "donate_argnums": program.donate or None}
    plan = jaxplan.make_plan(program.fn, *program.args, pipeline="x", microbatches=m, **asked)
    assert plan.modelled.stages and (plan.modelled.stages.moved or "remat" in changes)
    assert float(plan.cost.subs(plan.symbol_values)) == pytest.approx(plan.seconds, rel=1e-9)
    audit = plan.audit()
    assert all(audit.compiled[axis] > 0 for axis in plan.axis_names)
    assert max(audit.errors.values()) <= 0.005
    assert audit.largest_unplanned <= 0.01


# --- when one is looked for -------------------------------------------------------------------------------------------


def test_across_slow_links_written_out_layers_too_large_to_be_copied_are_laid_in_stages():
    """Four devices with slow links between them, and too little memory for the state of all layers on each."""
    shapes = jax.eval_shape(lambda: tower_args(4096, 2048, 16))
    asked = {"mesh": AbstractMesh((4,), ("s",)), "machine": SLOW_LINKS, "donate_argnums": (1, 2)}
    free = jaxplan.make_plan(tower, *shapes, pipeline=None, memory_budget=np.inf, **asked)
    budget = 0.7 * free.peak_bytes
    plan = jaxplan.make_plan(tower, *shapes, memory_budget=budget, **asked)
    none = jaxplan.make_plan(tower, *shapes, pipeline=None, memory_budget=budget, **asked)
    assert plan.pipeline is not None and plan.peak_bytes <= budget and len(plan.pipeline.chains) == 2
    assert plan.seconds < 0.97 * none.seconds


def test_layers_are_put_into_loops_once_for_all_meshes(monkeypatch):
    made = []
    monkeypatch.setattr("jaxplan.api.rerolled", lambda traced: made.append(traced) or rerolled(traced))
    shapes = jax.eval_shape(tower_args)
    base = jaxplan.make_plan(tower, *shapes, mesh=AbstractMesh((1,), ("s",)), machine=SLOW_LINKS, pipeline=None)
    assert not made
    meshes = [AbstractMesh(sizes, ("s", "t")) for sizes in ((2, 1), (2, 2), (4, 2))]
    plans = [base.replan(mesh=mesh, pipeline="s", microbatches=4) for mesh in meshes]
    assert len(made) == 1
    for mesh, plan in zip(meshes, plans, strict=True):
        fresh = jaxplan.make_plan(tower, *shapes, mesh=mesh, machine=SLOW_LINKS, pipeline="s", microbatches=4)
        assert plan.pipeline == fresh.pipeline and plan.seconds == fresh.seconds and (plan.choices == fresh.choices).all()
    assert len(made) == 1 + len(meshes), "each trace has its own"


@pytest.mark.parametrize("batch", [64, 8])
def test_where_none_can_pay_the_layers_are_not_even_put_into_a_loop(batch, monkeypatch):
    monkeypatch.setattr("jaxplan.api.rerolled", lambda _: pytest.fail("put into a loop"))
    program = decoder(replace(FULL, batch=batch, layers=4), "unrolled")
    plan = jaxplan.make_plan(program.fn, *program.args, mesh=AbstractMesh((4, 4), ("x", "y")), machine="v4")
    assert plan.pipeline is None


def test_the_graph_tells_of_layers_before_anything_is_traced_again():
    unrolled = decoder(replace(TINY, layers=6), "unrolled")
    found = repeats(build_graph(trace(unrolled.fn, unrolled.args, {})))
    assert found is not None and found.count == 6 and [dim for dim, _ in found.rows] == [0], "the batch, and nothing else"
    assert repeats(build_graph(trace(jnp.sin, (jnp.ones(3),), {}))) is None


# --- what is no layer -------------------------------------------------------------------------------------------------


def test_blocks_that_differ_in_what_they_captured_are_not_one_loop():
    """Constants deep inside of a call, and functions that are called back, are not to be seen in shapes."""
    shifts = [np.arange(4, dtype=np.float32) * k for k in range(4)]

    def called_back(k):
        return lambda h: jax.pure_callback(lambda v: np.asarray(v) * np.float32(k), jax.typeof(h), h)

    def fn(x, ws):
        for w, shift in zip(ws, shifts, strict=True):
            x = jnp.tanh(jax.jit(jax.jit(lambda v, shift=shift: v + shift[None, :]))(x) @ w)
        for k, w in enumerate(ws):
            x = called_back(k)(x) @ w
        return x

    args = jnp.ones((8, 4), jnp.float32), [jnp.eye(4, dtype=jnp.float32)] * 4
    traced = trace(fn, args, {})
    found = rerolled(traced)
    assert all(scan.length < 4 for scan in scans(found.jaxpr.jaxpr))
    assert_close(fn(*args), jax.extend.core.jaxpr_as_fun(found.jaxpr)(args[0], *args[1])[0])


def test_written_out_layers_that_mix_the_rows_are_refused_by_operator_and_line():
    def mixing(x, ws):
        for w in ws:
            y = x @ w
            x = y - y.mean(axis=0, keepdims=True)
        return x

    args = jnp.ones((8, 4), jnp.float32), [jnp.eye(4, dtype=jnp.float32)] * 4
    with pytest.raises(ValueError, match=r"sub at .*test_pipeline_unrolled\.py:\d+ reads a sum over the rows"):
        jaxplan.make_plan(mixing, *args, mesh=AbstractMesh((2,), ("s",)), machine="v4", pipeline="s")
    with pytest.raises(ValueError, match="microbatches=3 does not divide the batch of 16 rows"):
        jaxplan.make_plan(tower, *tower_args(), mesh=AbstractMesh((2,), ("s",)), machine="v4", microbatches=3)
    with pytest.raises(ValueError, match="8 stages, and only 4 layers"):
        jaxplan.make_plan(tower, *tower_args(), mesh=AbstractMesh((8,), ("s",)), machine="v4", pipeline="s")
