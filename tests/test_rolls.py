"""Periodic shifts: found where they are written as slices and their concatenation, sent to neighbours, and computed alike."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, mesh_of

import jaxplan
from jaxplan.machine import PRESETS
from jaxplan.rolls import with_rolls
from jaxplan.trace import trace

FAST = replace(PRESETS["cpu"], inner=replace(PRESETS["cpu"].inner, latency_seconds=0.0), materialises=True)


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


def test_a_sharded_grid_that_is_turned_round_sends_its_edges():
    plan = jaxplan.make_plan(heat, *PROGRAMS["heat"][1], mesh=mesh_of((8,)), machine=FAST, pins={"u": ("x", None)})
    (one, other) = (exchange for exchange in plan.exchanges if exchange.kind == "permute")
    assert one.total_bytes == other.total_bytes == 3 * 64 * 4  # a row of 64 floats, in each of 3 rounds
    assert plan.audit().compiled_bytes == 2 * 3 * 64 * 4


@pytest.mark.parametrize(
    "shift, axis, found", [(1, 0, [(1, 0)]), (-3, 1, [(-3, 1)]), (40, 0, [(-24, 0)]), ((2, -1), (0, 1), [(2, 0), (-1, 1)])]
)
def test_shifts_are_found(shift, axis, found):
    traced = trace(lambda x: jnp.roll(x, shift, axis), (values(64, 32),), {})
    assert rolls_of(traced.jaxpr.jaxpr) == found


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jnp.concatenate([x[1:], x[1:]]),  # not all of it
        lambda x: jnp.concatenate([x[:1], x[1:]]),  # in its own order
        lambda x: (lambda part: jnp.concatenate([part, x[:1]]) + part.sum())(x[1:]),  # a part is read elsewhere
        lambda x: jnp.concatenate([x[1:, ::2], x[:1, ::2]]),
        lambda x: jnp.concatenate([x[1:], (2 * x)[:1]]),
    ],
)
def test_what_is_no_shift_stays_as_it_is(fn):
    x = values(64, 32)
    closed = trace(fn, (x,), {}).jaxpr
    assert rolls_of(closed.jaxpr) == [] and with_rolls(closed) is closed
    plan = jaxplan.make_plan(fn, x, mesh=mesh_of((8,)), machine=FAST)
    assert_close(fn(x), plan.jit()(x))


def test_a_planned_function_with_shifts_can_be_differentiated_and_mapped():
    u = values(64, 64)
    planned = jaxplan.make_plan(heat, u, mesh=mesh_of((8,)), machine=FAST).jit()
    loss = lambda fn: lambda u: jnp.sum(jnp.sin(fn(u)))  # noqa: E731
    assert_close(jax.grad(loss(heat))(u), jax.grad(loss(planned))(u))
