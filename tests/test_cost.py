"""Room `cost`: exchanges add up, layouts arrive, and the number the search compares is the symbolic cost."""

import itertools
import math
from dataclasses import replace
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec as P

import jaxplan
from jaxplan.cost import Numbers, frugal, model
from jaxplan.cost.clusters import renamed
from jaxplan.cost.exchange import combine_steps, reshard_steps, step_bytes
from jaxplan.cost.price import Option, cluster_exchanges, cluster_terms, parts_steps, steps_terms, terms_seconds
from jaxplan.examples import programs
from jaxplan.graph import build_graph
from jaxplan.layout import PARTIAL, AxisOrder, layout_of, spec_of
from jaxplan.machine import machine
from jaxplan.problem import all_rows, evaluate
from jaxplan.search import alpa
from jaxplan.trace import trace

LAYOUTS = list(itertools.product((-1, 0, 1), repeat=2))
ORDERS = [AxisOrder(slow, major) for slow in ((0, 1), (1, 0)) for major in ((0, 1), (1, 0))]
XY = ORDERS[0]


@pytest.mark.parametrize("src", LAYOUTS)
@pytest.mark.parametrize("dst", LAYOUTS)
@pytest.mark.parametrize("order", ORDERS)
def test_reshard_arrives_where_it_should(src, dst, order):
    steps = reshard_steps(src, dst, 2, order)
    if src == dst:
        assert steps == ()
    else:
        assert steps[0].before == spec_of(src, 2, order.major_first)
        assert layout_of(steps[-1].after, 2) == dst
        assert steps[-1].after == spec_of(dst, 2, order.major_first), "axes that share a dimension end in their order"
        for one, two in itertools.pairwise(steps):
            assert one.after == two.before


@pytest.mark.parametrize("src", LAYOUTS)
def test_only_slices_are_free(src):
    for dst in LAYOUTS:
        for step in reshard_steps(src, dst, 2, XY):
            sent = sum(h for _, h in step_bytes(step, 1024.0, (2, 4)))
            assert (sent == 0) == (step.kind == "slice")


@pytest.mark.parametrize(("sizes", "slow_first"), [((4, 2), (0, 1)), ((4, 4), (1, 0)), ((2, 3, 4), (2, 0, 1))])
def test_what_a_reshard_sends_depends_on_which_dimensions_are_equal_not_on_which_they_are(sizes, slow_first):
    """`Reshards` prices one reshard per pattern."""

    def terms(src, dst):
        sent, rounds = steps_terms(reshard_steps(src, dst, 3, order), 1.0, sizes)
        return {axis: round(share, 12) for axis, share in sent.items()}, rounds

    known, order = {}, AxisOrder(slow_first, slow_first)
    layouts = list(itertools.product((PARTIAL, -1, 0, 1, 2), repeat=len(sizes)))
    for src, dst in itertools.product(layouts, layouts):
        names = {}
        pattern = tuple([dim if dim < 0 else names.setdefault(dim, len(names)) for dim in (*src, *dst)])
        assert known.setdefault(pattern, terms(src, dst)) == terms(src, dst), (src, dst)


def test_hierarchical_parts_add_up_to_one_exchange_over_all_devices():
    devices, nbytes = 8, 4096.0
    gather = reshard_steps((0, 0), (-1, -1), 1, XY)
    assert sum(h for step in gather for _, h in step_bytes(step, nbytes, (2, 4))) == (devices - 1) / devices * nbytes
    reduced = combine_steps((-1, -1), (-1, -1), ((0, 1),), 1, XY)
    assert sum(h for step in reduced for _, h in step_bytes(step, nbytes, (2, 4))) == 2 * (devices - 1) / devices * nbytes
    scattered = combine_steps((-1, -1), (0, 0), ((0, 1),), 1, XY)
    assert sum(h for step in scattered for _, h in step_bytes(step, nbytes, (2, 4))) == (devices - 1) / devices * nbytes


def test_slower_axis_sees_reduced_data():
    (step,) = combine_steps((-1, -1), (-1, -1), ((0, 1),), 1, ORDERS[2])
    sent = dict(step_bytes(step, 1000.0, (2, 4)))
    assert sent[1] == pytest.approx(2 * 3 / 4 * 1000 / 2), "axis 1 is the slow one: it sees half the bytes"
    assert sent[0] == pytest.approx(2 * 1 / 2 * 1000)


def test_a_major_axis_that_leaves_a_shared_dimension_costs_a_permute():
    kinds = [step.kind for step in reshard_steps((0, 0), (-1, 0), 1, XY)]
    assert kinds == ["permute", "all_gather"]
    kinds = [step.kind for step in reshard_steps((0, 0), (0, -1), 1, XY)]
    assert kinds == ["all_gather"]


@pytest.mark.parametrize("name", sorted(programs()))
def test_symbolic_cost_is_the_number_the_search_compared(name):
    program = programs()[name]
    plan = jaxplan.make_plan(program.fn, *program.args, mesh=AbstractMesh((2, 2), ("x", "y")), machine="v5e")
    assert float(plan.cost.subs(plan.symbol_values)) == pytest.approx(plan.seconds, rel=1e-9)


def test_the_cost_of_a_matmul_reads_like_a_textbook():
    shapes = jax.ShapeDtypeStruct((64, 128), jnp.float32), jax.ShapeDtypeStruct((128, 256), jnp.float32)
    plan = jaxplan.make_plan(jnp.matmul, *shapes, mesh=AbstractMesh((1,), ("x",)), dims=["M K", "K N"], machine="v5e")
    text = str(plan.cost)
    assert {"M", "K", "N", "m", "r_float32"} == {str(symbol) for symbol in plan.cost.free_symbols}, text
    assert "2*K*M*N*r_float32" in text


def test_another_machine_is_planned_without_a_retrace_as_if_from_the_start():
    program = programs()["moe"]
    mesh = AbstractMesh((2, 2), ("x", "y"))
    again = jaxplan.make_plan(program.fn, *program.args, mesh=mesh, machine="v5e").replan(machine=SLOW_WORK)
    direct = jaxplan.make_plan(program.fn, *program.args, mesh=mesh, machine=SLOW_WORK)
    assert again.wire_bytes == direct.wire_bytes and sum(direct.wire_bytes.values()) > 0
    assert again.in_specs == direct.in_specs and again.seconds == direct.seconds


def test_a_partial_result_with_a_dimension_of_no_factor_is_reduced_not_scattered():
    def kernel_gradient(x, g):
        def forward(w):
            return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

        return jax.vjp(forward, jnp.zeros((3, 3, 4, 8), jnp.float32))[1](g)[0]

    shapes = jax.ShapeDtypeStruct((16, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((16, 8, 8, 8), jnp.float32)
    pins = {"x": P("x"), "g": P("x")}
    plan = jaxplan.make_plan(kernel_gradient, *shapes, mesh=AbstractMesh((2,), ("x",)), machine=SLOW_WORK, pins=pins)
    found = [c for c in plan.modelled.graph.clusters if c.scatters and -1 in c.combines[0].result.leads]
    assert found
    for cluster in found:
        reduced = cluster_exchanges(cluster, (Option(min(cluster.combines[0].over)),), plan.modelled.setting)
        assert [step.kind for step in reduced[0].steps] == ["all_reduce"]


SLOW_WORK = jaxplan.Machine("slow", {"float32": 1e-9}, 1e-9, 1e12, jaxplan.Link(1e-10, 0.0), jaxplan.Link(1e-10, 0.0), 1 << 20)


@pytest.mark.parametrize("name", ["decode_kv", "mlp_sgd", "stencil"])
def test_followers_keep_the_optimum(name, monkeypatch):
    program = programs()[name]
    graph = build_graph(trace(program.fn, program.args, {}))
    numbers = Numbers(graph, {"x": 4, "y": 2}, machine("v4"))
    with_followers = model(graph, numbers)
    monkeypatch.setattr("jaxplan.cost.build._followers", lambda *args: {})
    graph.memo.clear()
    without = model(graph, numbers)
    assert len(with_followers.problem.nodes) < len(without.problem.nodes)
    best = alpa(with_followers.problem, rounds=None)
    assert best.seconds == pytest.approx(alpa(without.problem, rounds=None).seconds, rel=1e-6)
    full = with_followers.complete(best.choices)  # the undo: followers included, the price is the same
    assert without.seconds(full) == pytest.approx(best.seconds, rel=1e-12)


@pytest.mark.parametrize("name", sorted(programs()))
def test_prices_for_whole_arrays_are_those_of_the_terms(name):
    program = programs()[name]
    graph = build_graph(trace(program.fn, program.args, {}))
    numbers = Numbers(graph, {"x": 4, "y": 2}, machine("v4"))
    modelled = model(graph, numbers)
    rng = np.random.default_rng(0)
    for index, node in zip(modelled.kept, modelled.problem.nodes, strict=True):
        rows = all_rows(node.options)
        rows = rows[rng.permutation(len(rows))[:4]]
        for row, seconds in zip(rows, node.price(rows), strict=True):
            options = [axis[i] for axis, i in zip(modelled.options[index], row, strict=True)]
            terms = cluster_terms(graph.clusters[index], options, modelled.setting, numbers)
            if math.isfinite(seconds):
                assert seconds == pytest.approx(float(terms_seconds(terms, numbers)), rel=1e-9, abs=1e-15)


def test_an_input_lies_on_more_devices_where_that_costs_nothing():
    """Slicing is free: read sharded by two operators, a replicated input costs the same and holds eight times the bytes."""

    def two_readers(x, w):
        return jnp.sin(x) @ w, jnp.cumsum(x * 2.0, axis=1)

    shapes = jax.ShapeDtypeStruct((64, 32), jnp.float32), jax.ShapeDtypeStruct((32, 32), jnp.float32)
    plan = jaxplan.make_plan(two_readers, *shapes, mesh=AbstractMesh((8,), ("x",)), machine="v4")
    modelled = plan.modelled
    writes = [modelled.graph.clusters[cluster].writes for cluster in modelled.kept]
    (node,) = [n for n, own in enumerate(writes) if any(w.tensor == modelled.graph.inputs[0] for w in own)]
    replicated = plan.choices[list(modelled.kept)].copy()
    assert plan.input_layouts[0] == (0,)
    replicated[node] = 0
    seconds = evaluate(modelled.problem, replicated)
    assert seconds == pytest.approx(plan.seconds, rel=1e-12)
    again = frugal(modelled, replicated, seconds)
    assert replace(plan, choices=modelled.complete(again)).input_layouts[0] == (0,)
    assert evaluate(modelled.problem, again) == pytest.approx(seconds, rel=1e-12)


def test_combinations_that_differ_by_names_alone_send_the_same():
    """Prices are remembered by how dimensions and factors are called in the order they come."""
    random = Random(0)
    for _ in range(3000):
        axes = random.randint(1, 4)
        parts = []
        for _ in range(axes):
            partial = random.random() < 0.6
            dim = -1 if partial else random.randint(-1, 3)
            parts.append((dim, random.choice([3, 5, 9]), random.randint(-1, 3)) if partial else (dim, -1, -1))
        slow_first, major_first = (tuple(random.sample(range(axes), axes)) for _ in range(2))
        order, sizes = AxisOrder(slow_first, major_first), [2, 4, 8, 3][:axes]
        sent, rounds = steps_terms(parts_steps(parts, 4, order), 1.0, sizes)
        again, others = steps_terms(parts_steps(renamed(parts), 4, order), 1.0, sizes)
        assert sent == pytest.approx(again) and rounds == others
