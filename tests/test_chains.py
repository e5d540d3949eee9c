"""Chains whose every link reads the one before twice: there are 2 to the power of their length ways through them, and walks
that took each of them would not end."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

import jaxplan

LINKS = {
    "added to itself": lambda x: x + x,
    "multiplied by itself": lambda x: x * x,
    "selected from itself": lambda x: jnp.where(x > 0, x, x),
    "beside its reverse": lambda x: jnp.flip(x, 0) + x,
    "joined to itself and sliced": lambda x: jnp.concatenate([x, x], 0)[::2],
    "a branch": lambda x: jax.lax.cond(x[0, 0] > 0, lambda a: a + a, lambda a: a * a, x),
    "a product with itself": lambda x: (x @ x.T) @ x,
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("machine", ["cpu", "v5e"])
def test_random_numbers_are_fitted(machine):
    """Every round of their generator mixes two values into both."""

    def bits(seed):
        return jax.random.bits(jax.random.key(jnp.sum(seed)), (8, 4, 4))

    seed = jax.ShapeDtypeStruct((4,), jnp.int32)
    plan = jaxplan.make_plan(bits, seed, mesh=AbstractMesh((8,), ("x",)), machine=machine, pins={"seed": PartitionSpec()})
    with contextlib.suppress(jaxplan.NothingFits):
        plan.replan(memory_budget=0.8 * plan.peak_bytes)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("machine", ["cpu", "v5e"])
@pytest.mark.parametrize("link", sorted(LINKS))
def test_a_long_chain_is_planned_fitted_and_told(link, machine):
    def chain(w, x):
        hidden = x @ w
        for _ in range(40):
            hidden = LINKS[link](hidden)
        return (hidden @ w, hidden) if machine == "cpu" else hidden

    mesh = AbstractMesh((4, 2), ("x", "y"))
    args = jax.ShapeDtypeStruct((8, 8), jnp.float32), jax.ShapeDtypeStruct((64, 8), jnp.float32)
    plan = jaxplan.make_plan(chain, *args, mesh=mesh, machine=machine)
    with contextlib.suppress(jaxplan.NothingFits):
        fitted = plan.replan(memory_budget=0.8 * plan.peak_bytes)
        assert fitted.peak_bytes <= 0.8 * plan.peak_bytes
    assert str(plan) and str(plan.cost) and str(plan.ledger)
    assert str(plan.why_not({"x": PartitionSpec(None, "x")}))
