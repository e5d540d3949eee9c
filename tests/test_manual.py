"""What a program sends itself, in regions that it shards by hand: predicted as it is compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, mesh_of
from jax.sharding import PartitionSpec as P

import jaxplan
from jaxplan.machine.find import machine as find_machine

PAIRS = [(0, 1), (1, 2), (2, 3), (3, 0)]
x = np.linspace(-1, 1, 64 * 32, dtype=np.float32).reshape(64, 32)


def ring(part):
    """Shifted around in a loop."""
    return jax.lax.fori_loop(0, 3, lambda _, p: jnp.sin(jax.lax.ppermute(p, "x", PAIRS)), part)


def every_kind(part):
    whole = jax.lax.all_gather(part, "x", tiled=True)
    sums = jax.lax.psum_scatter(whole * whole, "x", tiled=True)
    turned = jax.lax.all_to_all(jnp.cos(part), "x", 1, 0, tiled=True)
    return part + sums + turned.reshape(part.shape) + jax.lax.pmax(jnp.tanh(part).sum(), ("x",))


def in_branches(part):
    """The branch that sends most is the one that counts."""
    return jax.lax.cond(part.sum() > 1e6, lambda p: p, lambda p: p * jax.lax.psum(jnp.exp(p), "x"), part)


def trained(part):
    return jax.grad(lambda p: (jax.lax.psum(jnp.sin(p), "x") ** 2).sum())(part)


REGIONS = {"ring": ring, "every kind": every_kind, "branches": in_branches, "gradient": trained}


@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize("shape", [(4, 2), (4,)], ids=str)
def test_what_a_region_sends_is_predicted(name, shape):
    mesh = mesh_of(shape)

    def fn(x):
        return jnp.tanh(jax.shard_map(REGIONS[name], mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)(x * 2))

    plan = jaxplan.make_plan(fn, x, mesh=mesh)
    audited = plan.audit()
    assert audited.compiled["x"] > 0 and audited.predicted == audited.compiled
    assert plan.wire_bytes == pytest.approx(audited.compiled)
    assert audited.total("unplanned") == audited.total("missing") == 0
    assert_close(plan.jit()(x), jax.jit(fn)(x))


def test_it_costs_what_it_takes_as_often_as_the_region_runs():
    mesh = mesh_of((4, 2))
    region = jax.shard_map(ring, mesh=mesh, in_specs=P("x"), out_specs=P("x"))

    def fn(x):
        return jax.lax.scan(lambda c, _: (region(c), None), x, None, length=5)[0]

    plan = jaxplan.make_plan(fn, x, mesh=mesh)
    assert plan.wire_bytes["x"] == 5 * 3 * x.nbytes / 4
    assert plan.exchanges[0].kind == "permute" and plan.exchanges[0].times == 15
    assert plan.exchanges[0].source.startswith("test_manual.py:")
    assert float(plan.cost.subs(plan.symbol_values)) == pytest.approx(plan.seconds, rel=1e-9)
    assert plan.replan(machine=find_machine(None, mesh).slower("x", 10.0, dict(mesh.shape))).seconds > plan.seconds


def test_over_two_axes_the_slower_sees_what_the_other_has_reduced():
    mesh = mesh_of((4, 2))

    def fn(x):
        return jax.shard_map(lambda p: jax.lax.psum(p, ("x", "y")), mesh=mesh, in_specs=P("x", "y"), out_specs=P())(x)

    audited = jaxplan.make_plan(fn, x, mesh=mesh).audit()
    assert audited.predicted == audited.compiled and min(audited.compiled.values()) > 0
