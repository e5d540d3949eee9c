"""Periodic shifts: found where they are written as slices and their concatenation, sent to neighbours, and computed alike."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, mesh_of
from jax.sharding import PartitionSpec
from unlike_programs import trainer, weights

import jaxplan
from jaxplan.api import StagedPlan
from jaxplan.machine import PRESETS
from jaxplan.pipeline import PipelineError, rerolled
from jaxplan.rolls import with_rolls
from jaxplan.trace import trace

LINK = replace(PRESETS["cpu"].inner, latency_seconds=0.0)
FAST = replace(PRESETS["cpu"], inner=LINK, outer=LINK, materialises=True)


def heat(u):
    """Diffusion on a torus, in a loop."""

    def turn(_, u):
        around = jnp.roll(u, 1, 0) + jnp.roll(u, -1, 0) + jnp.roll(u, 2, 1) + jnp.roll(u, -1, 1)
        return u + 0.1 * (around - 4 * u)

    return jax.lax.fori_loop(0, 3, turn, u)


def fitted(speed, u, wanted):
    """The gradient of rematerialised waves on a torus."""

    def after(speed):
        def turn(state, _):
            u, v = state
            v = v + 0.1 * speed * (sum(jnp.roll(u, k, axis) for k in (1, -1) for axis in (0, 1)) - 4 * u)
            return (u + 0.1 * v, v), None

        return jax.lax.scan(jax.checkpoint(turn), (u, jnp.zeros_like(u)), None, length=4)[0][0]

    return speed - jax.grad(lambda speed: jnp.mean((after(speed) - wanted) ** 2))(speed)


def corners(x):
    """One shift after the other, along both dimensions, also of numbers of other kinds."""
    counted = jnp.roll((x > 0).astype(jnp.int32), (1, -3), (0, 1))
    return jnp.where(counted == 1, jnp.roll(jnp.roll(x, -2, 0), 1, 1), x), counted


def values(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


PROGRAMS = {
    "heat": (heat, (values(64, 64),)),
    "fitted": (fitted, (values(64, 64), values(64, 64, seed=1), values(64, 64, seed=2))),
    "corners": (corners, (values(64, 64),)),
}


def rolls_of(jaxpr):
    """(shift, dimension) of all rolls of a jaxpr, inside of loops too."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "roll":
            found.append((equation.params["shift"], equation.params["dimension"]))
        for value in equation.params.values():
            for part in value if isinstance(value, tuple) else (value,):
                inner = getattr(part, "jaxpr", part)
                found += rolls_of(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize("mesh", [(8,), (4, 2), (2, 2, 2)])
@pytest.mark.parametrize("name", PROGRAMS)
def test_neighbours_send_slabs_and_nothing_else(name, mesh):
    fn, args = PROGRAMS[name]
    plan = jaxplan.make_plan(fn, *args, mesh=mesh_of(mesh), machine=FAST)
    jax.tree.map(assert_close, fn(*args), plan.jit()(*args))
    found = plan.audit()
    kinds = {exchange.kind for exchange in plan.exchanges}
    assert "permute" in kinds and kinds <= {"permute", "all_reduce"}, str(plan)
    assert found.total("missing") == found.total("unplanned") == 0, str(found)
    assert max(found.errors.values()) < 1e-3, str(found)


def life(b):
    """Cells that live and die by their eight neighbours, which are counted."""

    def turn(b, _):
        n = sum(jnp.roll(b, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0))
        return ((n == 3) | ((b == 1) & (n == 2))).astype(jnp.int32), n.sum()

    return jax.lax.scan(turn, b, None, length=4)


def stacked(u):
    """Nine shifts side by side, more than one loop puts together; the mean of them."""

    def turn(u, _):
        around = jnp.stack([jnp.roll(u, k, 0) for k in range(-4, 5)])
        return around.mean(0) + around.max(0), None

    return jax.lax.scan(turn, u, None, length=4)[0]


@pytest.mark.parametrize(
    "fn, args",
    [
        (heat, (values(64, 64),)), (heat, (values(256, 128),)), (life, (np.int32(values(64, 64) > 0),)),
        PROGRAMS["fitted"], (stacked, (values(256, 128),)),
    ],
)  # fmt: skip
def test_memory_is_modelled(fn, args):
    found = jaxplan.make_plan(fn, *args, mesh=mesh_of((8,)), machine=FAST).audit()
    assert found.predicted_peak_bytes == pytest.approx(found.compiled_peak_bytes, rel=0.15)


def test_a_sharded_grid_that_is_turned_round_sends_its_edges():
    plan = jaxplan.make_plan(heat, *PROGRAMS["heat"][1], mesh=mesh_of((8,)), machine=FAST, pins={"u": ("x", None)})
    (one, other) = (exchange for exchange in plan.exchanges if exchange.kind == "permute")
    assert one.total_bytes == other.total_bytes == 3 * 64 * 4  # a row of 64 floats, in each of 3 rounds
    assert plan.audit().compiled_bytes == 2 * 3 * 64 * 4


@pytest.mark.parametrize("shift", [0, 1, -1, 5, 8, 12, -11, 31, 32, 33, -100])
@pytest.mark.parametrize(
    "mesh, spec, parts",
    [((8,), ("x", None), (8, 1)), ((4, 2), (("x", "y"), None), (8, 1)), ((2, 2, 2), (("x", "z"), "y"), (4, 2))],
)
def test_a_shift_by_any_number_of_places_sends_what_is_predicted(mesh, spec, parts, shift):
    x = values(32, 8)
    plan = jaxplan.make_plan(lambda x: jnp.sin(jnp.roll(x, shift, 0)), x, mesh=mesh_of(mesh), machine=FAST, pins={"x": spec})
    assert_close(jnp.sin(np.roll(x, shift, 0)), plan.jit()(x))
    found, rows = plan.audit(), min(shift % 32, -shift % 32, 32 // parts[0])
    assert found.total("missing") == found.total("unplanned") == 0, str(found)
    assert found.predicted_bytes == found.compiled_bytes == rows * 4 * 8 // parts[1], str(found)
    assert float(plan.cost.subs(plan.symbol_values)) == pytest.approx(plan.seconds, rel=1e-9)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint32", "bfloat16", "complex64"])
def test_numbers_of_all_kinds_are_turned_round(dtype):
    x = jnp.asarray(10 * values(32, 8)).astype(dtype)
    plan = jaxplan.make_plan(
        lambda x: (jnp.roll(x, 3, 0), jnp.roll(x, -1, 1)), x, mesh=mesh_of((8,)), machine=FAST, pins={"x": ("x", None)}
    )
    for got, wanted in zip(plan.jit()(x), (np.roll(x, 3, 0), np.roll(x, -1, 1)), strict=True):
        assert np.array_equal(got, wanted) and got.dtype == wanted.dtype


@pytest.mark.parametrize("extent", [0, 1, 3, 12, 30])
def test_extents_that_no_axis_divides(extent):
    x = values(extent, 8)

    def fn(x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(jnp.roll(x, 1, 0))))(x), jnp.roll(jnp.roll(x, 1, 0), -3, 0)

    plan = jaxplan.make_plan(fn, x, mesh=mesh_of((8,)), machine=FAST)
    jax.tree.map(assert_close, fn(x), plan.jit()(x))


BRANCHES = {
    "while": lambda x: jax.lax.while_loop(lambda s: s[1] < 4, lambda s: (jnp.tanh(jnp.roll(s[0], -1, 0)), s[1] + 1), (x, 0)),
    "cond": lambda x: jax.lax.cond(x.sum() > 0, lambda x: jnp.roll(x, 1, 0), lambda x: jnp.roll(x, -1, 0) * 2, x),
    "vmap": lambda x: jax.vmap(lambda row: jnp.roll(row, 1))(x),
    "stacked": lambda x: jax.lax.scan(lambda s, row: (s + row, jnp.roll(row, 1)), x[0], jnp.roll(x, 1, 0)),
    "checkpoint": jax.grad(lambda x: jnp.sum(jax.checkpoint(lambda x: jnp.sin(jnp.roll(jnp.cos(x), 1, 0)))(x))),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_shifts_in_loops_and_branches(name):
    fn, x = BRANCHES[name], values(32, 8)
    plan = jaxplan.make_plan(fn, x, mesh=mesh_of((4, 2)), machine=FAST, pins={"x": ("x", "y")})
    assert rolls_of(plan.traced.jaxpr.jaxpr)
    jax.tree.map(assert_close, fn(x), plan.jit()(x))
    found = plan.audit()
    assert found.predicted_bytes == pytest.approx(found.compiled_bytes, rel=1e-3), str(found)


@jax.custom_vjp
def turned(x):
    return jnp.roll(x, 1, 0) * 2


turned.defvjp(lambda x: (turned(x), None), lambda _, g: (jnp.roll(g, -1, 0) * 2,))


def test_derivatives_of_ones_own():
    x = values(32, 8)
    for fn in (turned, jax.grad(lambda x: jnp.sum(jnp.sin(turned(x))))):
        plan = jaxplan.make_plan(fn, x, mesh=mesh_of((8,)), machine=FAST, pins={"x": ("x", None)})
        assert_close(fn(x), plan.jit()(x))
        assert plan.audit().compiled_bytes == plan.audit().predicted_bytes > 0


@pytest.mark.parametrize(
    "shift, axis, found",
    [
        (1, 0, [(1, 0)]), (-3, 1, [(-3, 1)]), (40, 0, [(-24, 0)]), (0, 1, [(0, 1)]), (64, 0, [(0, 0)]), (32, 0, [(-32, 0)]),
        ((2, -1), (0, 1), [(2, 0), (-1, 1)]), ((2, -1), (0, 0), [(1, 0)]),
    ],
)  # fmt: skip
def test_shifts_are_found(shift, axis, found):
    traced = trace(lambda x: jnp.roll(x, shift, axis), (values(64, 32),), {})
    assert rolls_of(traced.jaxpr.jaxpr) == found


@pytest.mark.parametrize(
    "fn, found",
    [
        (jax.grad(lambda x: jnp.sum(jnp.roll(x, 5, 0) ** 2)), [(-5, 0), (5, 0)]),
        (lambda x: (lambda a, b: jnp.concatenate([b, a], 1))(*jnp.split(x, [3], 1)), [(-3, 1)]),
        (lambda x: jnp.roll(jnp.sin(jnp.roll(jnp.roll(x, 2, 0), 3, 0)), 1, 0), [(5, 0), (1, 0)]),
        (lambda x: jnp.roll(jnp.roll(x, 2, 0), -2, 0), [(0, 0)]),
    ],
)
def test_what_else_is_a_shift(fn, found):
    x = values(64, 32)
    plan = jaxplan.make_plan(fn, x, mesh=mesh_of((8,)), machine=FAST, pins={"x": ("x", None)})
    assert sorted(rolls_of(plan.traced.jaxpr.jaxpr)) == sorted(found)
    assert_close(fn(x), plan.jit()(x))
    assert plan.audit().compiled_bytes == plan.audit().predicted_bytes


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jnp.concatenate([x[1:], x[1:]]),  # not all of it
        lambda x: jnp.concatenate([x[:1], x[1:]]),  # in its own order
        lambda x: (lambda part: jnp.concatenate([part, x[:1]]) + part.sum())(x[1:]),  # a part is read elsewhere
        lambda x: jnp.concatenate([x[1:, ::2], x[:1, ::2]]),
        lambda x: jnp.concatenate([x[1:], (2 * x)[:1]]),
        lambda x: jax.vjp(lambda x: jnp.concatenate([x[1:], x[:2]])[:64], x)[1](x)[0],
        lambda x: jnp.pad(x[1:], ((0, 1), (0, 0))) + jnp.pad(x[:1], ((63, 0), (0, 0)), constant_values=1),
    ],
)
def test_what_is_no_shift_stays_as_it_is(fn):
    x = values(64, 32)
    closed = trace(fn, (x,), {}).jaxpr
    assert rolls_of(closed.jaxpr) == [] and with_rolls(closed) is closed
    plan = jaxplan.make_plan(fn, x, mesh=mesh_of((8,)), machine=FAST)
    assert_close(fn(x), plan.jit()(x))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: (jnp.roll(x, 1, 0), 1.0, x),
        lambda x: (jnp.roll(x, 1, 0), 1.0),
        lambda x: (lambda y: (y, y))(jnp.roll(x, 1, 0)),
        lambda x: (jnp.roll(x, 1, 0), jnp.roll(jnp.roll(x, 1, 0), (2, 1), (0, 1))),
    ],
)
def test_calls_of_shifts_keep_their_results(call):
    x, inner = values(16, 8), jax.jit(call)

    def fn(x):
        return inner(x), inner(2 * inner(x)[0])

    plan = jaxplan.make_plan(fn, x, mesh=mesh_of((8,)), machine=FAST, pins={"x": ("x", None)})
    assert rolls_of(plan.traced.jaxpr.jaxpr)
    jax.tree.map(assert_close, fn(x), plan.jit()(x))


def test_who_evaluates_a_jaxpr_gets_slices():
    u = values(16, 16)
    closed = trace(heat, (u,), {}).jaxpr
    assert len(rolls_of(closed.jaxpr)) == 4

    def again(u):
        return jax.core.eval_jaxpr(closed.jaxpr, closed.consts, u)[0]

    assert_close(heat(u), again(u))
    assert_close(heat(u), jax.jit(again)(u))
    assert_close(jax.grad(lambda u: jnp.sum(jnp.sin(heat(u))))(u), jax.grad(lambda u: jnp.sum(jnp.sin(again(u))))(u))
    assert_close(heat(u)[None], jax.vmap(again)(u[None]))


def test_a_planned_function_with_shifts_can_be_differentiated_and_mapped():
    u = values(64, 64)
    planned = jaxplan.make_plan(heat, u, mesh=mesh_of((8,)), machine=FAST).jit()
    alone, together = (jax.grad(lambda u, fn=fn: jnp.sum(jnp.sin(fn(u))))(u) for fn in (heat, planned))
    assert_close(alone, together)


def test_a_saved_plan_is_loaded(tmp_path):
    u = values(64, 64)
    plan = jaxplan.make_plan(heat, u, mesh=mesh_of((4, 2)), machine=FAST)
    plan.save(tmp_path / "plan.json")
    loaded = jaxplan.load_plan(tmp_path / "plan.json", heat, u, mesh=mesh_of((4, 2)))
    assert loaded.seconds == plan.seconds and loaded.in_specs == plan.in_specs
    assert_close(heat(u), loaded.jit()(u))
    with pytest.raises(ValueError, match="roll"):
        jaxplan.load_plan(tmp_path / "plan.json", lambda u: heat(jnp.roll(u, 1, 0)), u, mesh=mesh_of((4, 2)))


def layered(weights, x, axis=2):
    """Layers that are written out, with windows that shift."""
    for w in weights:
        x = x + jnp.roll(jnp.tanh(jnp.roll(x, 2, axis) @ w), -2, axis)
    return x


def descend(weights, x, axis=2):
    loss, found = jax.value_and_grad(lambda weights: jnp.mean(layered(weights, x, axis) ** 2))(weights)
    return [w - 0.1 * g for w, g in zip(weights, found, strict=True)], loss


LAYERS = ([values(16, 16, seed=k) / 4 for k in range(4)], values(8, 4, 8, 16))


def test_layers_with_shifts_run_in_stages():
    loops = rerolled(trace(descend, LAYERS, {})).jaxpr.jaxpr
    assert len(rolls_of(loops)) == 5  # of a layer there and back, and the way back of the loss
    plan = jaxplan.make_plan(descend, *LAYERS, mesh=mesh_of((2, 2)), machine="cpu", pipeline="x", microbatches=2)
    jax.tree.map(assert_close, descend(*LAYERS), plan.jit()(*LAYERS))
    with pytest.raises(PipelineError, match=r"roll at .* takes all rows of the batch together"):
        everywhere = functools.partial(descend, axis=(0, 1, 2))
        jaxplan.make_plan(everywhere, *LAYERS, mesh=mesh_of((2, 2)), machine="cpu", pipeline="x", microbatches=2)


def test_stages_of_unlike_layers_know_shifts():
    make = weights(0)

    def loss(params, x, wanted):
        for k, p in enumerate(params):
            x = jnp.roll(jnp.tanh(jnp.roll(x, k + 1, 1) @ p), -k, 1)
        return jnp.mean((x - jnp.roll(wanted, 1, 1)) ** 2)

    step, state = trainer(loss, [make(16, 32), make(32, 24), make(24, 16), make(16, 8)])
    args = state, make(16, 8, 16), make(16, 8, 8)
    pins = {"batch[1]": PartitionSpec(None, "y")}
    plan = jaxplan.make_plan(step, *args, mesh=mesh_of((2, 2)), machine="cpu", pipeline="x", microbatches=4, pins=pins)
    assert isinstance(plan, StagedPlan)
    jax.tree.map(assert_close, step(*args), plan.jit()(*args))
    assert all(rolls_of(stage.traced.jaxpr.jaxpr) for stage in plan.stage_plans)
    found = plan.audit()
    assert found.predicted["y"] > 0 and max(found.errors.values()) < 1e-3, str(found)
