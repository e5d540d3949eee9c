"""What brings its own way of being partitioned, batched or differentiated."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, mesh_of
from jax.experimental.custom_partitioning import SdyShardingRule, custom_partitioning
from jax.sharding import PartitionSpec as P

import jaxplan


def partitioned(function, rule, **factors):
    """A function whose partitioner runs it on whatever part of its operands a device has, and gathers nothing."""

    def partition(mesh, arg_shapes, result_shape):
        shardings = jax.tree.map(lambda shape: shape.sharding, (arg_shapes, result_shape))
        return mesh, function, shardings[1], shardings[0]

    wrapped = custom_partitioning(function)
    wrapped.def_partition(partition=partition, sharding_rule=rule, **factors)
    return wrapped


def rule_of(plan):
    (operator,) = [op for op in plan.modelled.graph.operators if op.name == "custom_partitioning"]
    return operator.rule


@pytest.mark.parametrize(
    ("rule", "factors"),
    [
        ("... d -> ... d", {"need_replication_factors": ("d",)}),
        ("b s d -> b s d", {"need_replication_factors": ("d",)}),
        (SdyShardingRule((("b", "s", "d"),), (("b", "s", "d"),), need_replication_factors=("d",)), {}),
    ],
)
def test_its_sharding_rule_is_read(rule, factors):
    softmax = partitioned(lambda x: jax.nn.softmax(x, axis=-1), rule, **factors)

    def step(x):
        return softmax(x * 2.0)

    x = np.random.default_rng(0).normal(size=(16, 8, 32)).astype(np.float32)
    plan = jaxplan.make_plan(step, x, mesh=mesh_of((8,)))
    assert not plan.exchanges and plan.in_specs[0] != P(), "batch or sequence is split, and nothing is sent"
    assert [f.kind.name for f in rule_of(plan).factors] == ["PARALLEL", "PARALLEL", "WHOLE"]
    assert "unknown" not in str(plan)
    assert_close(jax.jit(step)(x), plan.jit()(x))


def test_two_factors_in_one_dimension():
    def running(x):
        return jnp.cumsum(x.reshape(-1, 8), axis=1).reshape(x.shape)

    rows = partitioned(running, "(b s) -> (b s)", b=16, s=8, need_replication_factors=("s",))
    x = np.random.default_rng(0).normal(size=128).astype(np.float32)
    plan = jaxplan.make_plan(lambda x: rows(x), x, mesh=mesh_of((8,)), pins={"x": P("x")})
    assert [(f.size, f.kind.name) for f in rule_of(plan).factors] == [(16, "PARALLEL"), (8, "WHOLE")]
    assert not plan.exchanges
    assert_close(running(x), plan.jit()(x))


def test_a_reduction_is_priced_and_never_scattered():
    total = partitioned(lambda x: jnp.sum(x, axis=0), "b d -> d", reduction_factors=("b",))
    plan = jaxplan.make_plan(lambda x: total(x), jax.ShapeDtypeStruct((64, 8), jnp.float32), mesh=mesh_of((8,)))
    assert rule_of(plan).factors[0].kind.name == "COMBINE"


def test_without_a_rule_it_is_unknown():
    wrapped = custom_partitioning(lambda x: x * 2.0)
    wrapped.def_partition(
        partition=lambda mesh, args, result: (mesh, lambda x: x * 2.0, result.sharding, (args[0].sharding,)),
        infer_sharding_from_operands=lambda mesh, args, result: args[0].sharding,
        sharding_rule=lambda mesh, values, results: "i -> i",
    )
    x = np.arange(16, dtype=np.float32)
    plan = jaxplan.make_plan(lambda x: wrapped(x), x, mesh=mesh_of((8,)))
    assert "unknown         custom_partitioning" in str(plan)
    assert_close(x * 2.0, plan.jit()(x))


def test_linear_solves_are_seen_through_and_stay_differentiable():
    def solve(a, b):
        def product(x):
            return jnp.einsum("nij,nj->ni", a, x)

        return jax.scipy.sparse.linalg.cg(product, b, maxiter=20)[0]

    root = np.random.default_rng(0).normal(size=(8, 6, 6)).astype(np.float32)
    a = np.einsum("nij,nkj->nik", root, root) + 6 * np.eye(6, dtype=np.float32)
    b = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)
    plan = jaxplan.make_plan(solve, a, b, mesh=mesh_of((8,)), pins={"a": P("x")})
    assert any(operator.name == "dot_general" for operator in plan.modelled.graph.operators)
    assert "unknown" not in str(plan)
    run = plan.jit()
    np.testing.assert_allclose(run(a, b), jax.jit(solve)(a, b), rtol=2e-3, atol=2e-4)  # CG stops at 1e-5 of b, and sums differ

    def loss(solver, a, b):
        return jnp.sum(solver(a, b) ** 2)

    want, got = (jax.jit(jax.grad(loss, argnums=(1, 2)), static_argnums=0)(f, a, b) for f in (solve, run))
    for left, right in zip(want, got, strict=True):
        np.testing.assert_allclose(right, left, rtol=2e-3, atol=2e-4)


def test_functions_with_a_batching_of_their_own_are_seen_through():
    @jax.custom_batching.custom_vmap
    def double(x):
        return x @ x.T * 2.0

    @double.def_vmap
    def rule(axis_size, in_batched, x):
        return jnp.einsum("nij,nkj->nik", x, x) * 2.0, True

    x = np.random.default_rng(0).normal(size=(8, 4, 4)).astype(np.float32)
    one = jaxplan.make_plan(lambda x: double(x), x[0], mesh=mesh_of((2,)))
    assert "unknown" not in str(one)
    assert_close(jax.jit(jax.vmap(double))(x), jax.vmap(one.jit())(x))
