"""What is planned to be sent is what is compiled, in programs where it was not: each with the one thing that matters."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from jax.sharding import PartitionSpec as P

import jaxplan
from jaxplan.graph import build_graph
from jaxplan.machine import PRESETS, Link, Machine
from jaxplan.problem import Node, Problem
from jaxplan.search import search
from jaxplan.search.moves import SMALL
from jaxplan.trace import trace


def shape(*extents):
    return jax.ShapeDtypeStruct(extents, jnp.float32)


def free_links() -> Machine:
    free = Link(1e-15, 1e-14)
    return replace(PRESETS["cpu"], name="free links", inner=free, outer=free)


def test_what_leaves_a_round_and_what_a_call_in_it_reads_are_moved_once():
    """A loop stacks what a product within a nested call reads gathered: one gather a round, not two."""

    @jax.jit
    def linear(w, x):
        return jnp.tanh(x @ w)

    def loss(w, xs, h):
        def cell(h, x):
            return linear(w, jnp.concatenate([x, h], 1)), None

        return jnp.sum(jax.lax.scan(cell, h, xs)[0])

    args = shape(32, 16), shape(8, 16, 16), shape(16, 16)
    pins = {"xs": P(None, "x"), "h": P("x"), "w": P(None, "y")}
    plan = jaxplan.make_plan(jax.grad(loss, (0, 1)), *args, mesh=mesh_of((4, 2)), machine=free_links(), pins=pins)
    gathers = [row for row in plan.audit().exchanges if row.kind == "all-gather"]
    assert gathers and {row.status for row in gathers} == {"matched"}


def test_what_gains_only_along_all_axes_at_once_is_found_in_large_problems_too():
    """As a partial sum that is scattered over both of its axes, or not at all: along one alone nothing is gained."""
    options, taken = 13, 5

    class Together:
        def __call__(self, choices):
            together = choices[:, 0] == choices[:, 1]
            return np.where(choices.any(1), np.where(together & (choices[:, 0] == taken), 0.5, 2.0), 1.0)

    nodes = tuple(Node(f"sum{k}", (options, options), Together(), k) for k in range(2 * SMALL))
    found = search(Problem(("x", "y"), nodes, (), (0, 1)))
    assert found.seconds == 0.5 * len(nodes) and (found.choices == taken).all()


def test_members_of_a_cluster_that_read_one_tensor_in_two_layouts_are_each_told_theirs():
    def fn(x, rows, columns):
        square = jnp.exp(x @ x.T)
        return rows * jnp.sum(square, 0)[:, None] + columns * jnp.sum(square, 1)[:, None]

    args = shape(32, 8), shape(32, 8), shape(32, 8)
    pins = {"x": P("x"), "rows": P("x"), "columns": P("x")}
    plan = jaxplan.make_plan(fn, *args, mesh=mesh_of((8,)), machine=free_links(), pins=pins)
    asked = {}
    for (member, slot), specs in plan.constraints.reads.items():
        operator = plan.modelled.graph.operators[member]
        if operator.name == "reduce_sum" and slot == 0:
            asked[operator.equation.params["axes"]] = specs[-1]
    assert all(not spec[axis] for (axis,), spec in asked.items()), "no sum is over a dimension that is split"
    assert plan.audit().errors == {"x": 0.0}


@pytest.mark.parametrize(("platform", "paid"), [("cpu", "sin"), ("tpu", "cos"), ("gpu", "tanh"), ("", "sin")])
def test_of_branches_for_platforms_that_of_the_meshs_devices_is_paid(platform, paid):
    def fn(x):
        return jax.lax.platform_dependent(
            x, cpu=lambda x: jnp.sin(jnp.sin(jnp.sin(x))), tpu=jnp.cos, default=lambda x: jnp.tanh(jnp.tanh(x))
        )

    graph = build_graph(trace(fn, (shape(8, 8),), {}), platform=platform)
    assert {op.name for op in graph.operators if op.times and op.name in ("sin", "cos", "tanh")} == {paid}


def test_branches_that_count_less_do_not_exchange_for_nothing():
    """Three branches: the two that are not paid for gathered their weights, which cost nothing."""

    def fn(x, w, which):
        return jax.lax.switch(which, [lambda x: x @ w, lambda x: jnp.sin(x @ w), lambda x: jnp.sin(jnp.exp(x @ w))], x)

    args = shape(24, 16), shape(16, 32), jax.ShapeDtypeStruct((), jnp.int32)
    plan = jaxplan.make_plan(fn, *args, mesh=mesh_of((8,)), machine=free_links(), pins={"w": P(None, "x")})
    assert plan.audit().compiled_bytes == plan.audit().predicted_bytes == 0


@pytest.mark.parametrize("dearest", [0, 1])
def test_of_branches_the_one_that_sends_most_is_predicted(dearest):
    """Whichever branch works most: one sums what it has apart, the other gathers, in a branch of its own, what it sorts."""

    def sums(x, v):
        return jnp.tanh(x @ v) if dearest == 0 else x[:, :8] * jnp.sum(x * v[None, :, 0], 1, keepdims=True)

    def gathers(x, v):
        y = jax.lax.cond(x[0, 0] > 0, lambda x: jnp.sort(x, 1)[:, ::-1], lambda x: jnp.sin(x), x)
        return y[:, :8] if dearest == 0 else y @ jnp.exp(v @ v.T @ v)

    def fn(x, v, first):
        return jax.lax.cond(first, sums, gathers, x, v)

    args = shape(16, 32), shape(32, 8), jax.ShapeDtypeStruct((), jnp.bool_)
    pins = {"x": P(None, "x"), "v": P("x")}
    plan = jaxplan.make_plan(fn, *args, mesh=mesh_of((8,)), machine=free_links(), pins=pins)
    assert plan.wire_bytes["x"] > 0 and plan.audit().errors == {"x": 0.0}, str(plan.audit())


@pytest.mark.parametrize("all_of_it", [False, True])
def test_a_sum_of_which_each_device_keeps_its_part_is_scattered(all_of_it):
    """A sum within element-wise work is planned to be reduced whole; where its only reader wants a part, it is scattered."""

    def fn(x, y):
        rows = jnp.sum(jnp.sum(jnp.exp(x), 2, keepdims=True), 2)
        return jnp.einsum("bk,bkn->bn", rows, y), rows if all_of_it else jnp.float32(0)

    dear = Link(1e-8, 1e-14)
    machine = replace(PRESETS["cpu"], name="dear links", inner=dear, outer=dear)
    pins = {"x": P(None, None, "x"), "y": P("x")}
    plan = jaxplan.make_plan(fn, shape(16, 8, 64), shape(16, 8, 32), mesh=mesh_of((8,)), machine=machine, pins=pins)
    found = {(e.kind, e.shape): e for e in plan.exchanges}
    assert ("all_reduce" if all_of_it else "reduce_scatter", (16, 8)) in found
    assert plan.audit().errors == {"x": 0.0} and plan.audit().largest_unplanned == 0, str(plan.audit())


def test_what_a_view_shows_as_it_is_is_moved_once():
    """Products and the sum of a gradient read it in one layout, the products through a view: one exchange a round."""
    width, rows = 32, 16

    def loss(p, xs):
        def cell(carry, x):
            h, c = carry
            i, f, g, o = jnp.split(jnp.concatenate([x, h], 1) @ p["k"] + p["b"][None], 4, 1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        h = jnp.zeros((rows, width))
        return jnp.sum(jax.lax.scan(cell, (h, h), xs)[0][0])

    v5e, slow = PRESETS["v5e"], Link(1 / 45e9, 0.0)
    machine = replace(
        v5e, name="slow", seconds_per_flop={d: 1e3 * s for d, s in v5e.seconds_per_flop.items()}, inner=slow, outer=slow,
        matmul_reads={},
    )  # fmt: skip
    args = {"k": shape(2 * width, 4 * width), "b": shape(4 * width)}, shape(10, rows, width)
    plan = jaxplan.make_plan(
        lambda *args: jax.tree.map(jnp.subtract, args, jax.grad(loss, (0, 1))(*args)), *args, mesh=mesh_of((8,)), machine=machine
    )
    assert any(operator.name == "shared view" for operator in plan.modelled.graph.operators)
    moves = [row for row in plan.audit().exchanges if row.kind == "all-to-all"]
    assert moves and {row.status for row in moves} == {"matched"}, str(plan.audit())


def test_a_diagonal_is_planned_as_the_meshs_devices_take_it():
    """JAX masks and sums on TPUs, and gathers elsewhere: on CPU devices the latter is compiled."""
    links = {"inner": Link(1e-15, 1e-14), "outer": Link(1e-15, 1e-14)}
    machine = replace(PRESETS["v4"], name="free links, v4", **links)
    pins = {"x": P(None, "x", None)}
    plan = jaxplan.make_plan(
        lambda x: jax.vmap(jnp.diagonal)(jnp.exp(x)), shape(8, 32, 32), mesh=mesh_of((8,)), machine=machine, pins=pins
    )
    assert plan.exchanges and plan.audit().errors == {"x": 0.0}


@pytest.mark.parametrize("mode", ["fill", "clip", None])
def test_rows_of_a_split_table_are_scattered_before_what_is_out_of_range_is_filled(mode):
    """A table split by rows, its embeddings split by position: one reduce-scatter, also where rows out of range are filled."""

    def fn(table, places, weight):
        return jax.nn.relu(jnp.sin(jnp.take(table, places, axis=0, mode=mode)) @ weight)

    args = shape(4096, 31), jax.ShapeDtypeStruct((4, 16), jnp.int32), shape(31, 64)
    plan = jaxplan.make_plan(fn, *args, mesh=mesh_of((4,)), pins={"table": P("x"), "places": P(), "weight": P()})
    rows = plan.audit().exchanges
    assert [(row.kind, row.status) for row in rows] == [("reduce-scatter", "matched")]
    rng = np.random.default_rng(0)
    table, weight = rng.normal(size=(4096, 31)).astype("f"), rng.normal(size=(31, 64)).astype("f")
    places = rng.integers(-6000, 6000, (4, 16), dtype=np.int32)
    planned = np.asarray(plan.jit()(table, places, weight))
    np.testing.assert_allclose(planned, fn(table, places, weight), rtol=1e-5, atol=1e-5)
    assert np.isnan(planned).any() == (mode != "clip")


def test_what_a_call_with_a_rule_of_its_own_and_a_reader_beside_it_read_is_moved_once():
    """As the value that `relu` reads, and its derivative: moved for both it is moved once, though that takes two steps."""

    def fn(h, c):
        return jax.nn.relu(h)[None] * c + jnp.where((h > 0)[None], c, 0.0)

    args = shape(16, 32), shape(64, 16, 32)
    pins = {"h": P(None, ("x", "y")), "c": P(None, "x", "y")}
    plan = jaxplan.make_plan(fn, *args, mesh=mesh_of((4, 2)), machine=free_links(), pins=pins)
    operators = plan.modelled.graph.operators
    read = [specs for (member, _), specs in plan.constraints.reads.items() if operators[member].name in ("max", "gt")]
    assert len(read) == 2 and read[0] == read[1], "both read it in another layout than it has"
    found = plan.audit()
    assert found.errors == {"x": 0.0, "y": 0.0} and {row.status for row in found.exchanges} == {"matched"}
