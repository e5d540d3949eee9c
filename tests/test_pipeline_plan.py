"""Pipelines as plans: what they cost, when one is chosen, what is refused; and that they run as planned."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, mesh_of
from jax.sharding import AbstractMesh, PartitionSpec as P

import jaxplan
from jaxplan import attempts
from jaxplan.budget import NothingFits
from jaxplan.cost import Numbers
from jaxplan.examples import programs
from jaxplan.examples.decoder import SMALL, decoder
from jaxplan.graph import build_graph
from jaxplan.hybrid import candidates, chain_groups, counts
from jaxplan.machine import machine
from jaxplan.trace import trace

SLOW_WORK = jaxplan.Machine("slow", {"float32": 1e-8}, 1e-9, 1e12, jaxplan.Link(1e-10, 0.0), jaxplan.Link(1e-10, 0.0), 1 << 20)
"""So slow that it is worth splitting even the smallest of programs."""
DECODER = decoder(replace(SMALL, sequence=8, width=32), "scan")
LARGE_SIZES = replace(SMALL, layers=8, batch=16, sequence=64, width=2048, mlp_width=8192, vocabulary=1024)
LARGE = decoder(LARGE_SIZES, "scan")
MESH = AbstractMesh((2, 2, 2), ("s", "d", "t"))


def layers(x, weights):
    """Rows of a batch through stacked layers: (rows, width), (layers, width, width)."""
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def descend(x, weights):
    """One step down the gradient: a forward and a backward chain."""

    def loss(weights):
        return jnp.mean(jnp.square(layers(x, weights)))

    value, gradient = jax.value_and_grad(loss)(weights)
    return value, weights - 0.1 * gradient


def shapes(rows=16, width=32, depth=4):
    return jax.ShapeDtypeStruct((rows, width), jnp.float32), jax.ShapeDtypeStruct((depth, width, width), jnp.float32)


@pytest.mark.parametrize("name", ["h100", "v5e", "cpu"])
def test_a_stage_holds_its_own_layers_and_no_copy_of_all(name):
    """The weights alone are as large as all else together, so that a copy of all layers would be seen."""
    rows, weights = shapes(rows=64, width=512, depth=8)
    mesh = AbstractMesh((4, 2), ("s", "d"))
    plan = jaxplan.make_plan(descend, rows, weights, mesh=mesh, machine=name, pipeline="s", microbatches=4)
    stack = plan.modelled.graph.tensors[plan.modelled.graph.inputs[1]].nbytes
    assert plan.in_specs[1][0] == "s"
    assert max(buffer.nbytes for buffer in plan.memory.live) <= stack / 4
    assert plan.peak_bytes < 1.5 * stack


# --- what a pipeline costs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "microbatches", "depth"), [("s", 1, 4), ("t", 4, 4), ("d", 8, 4), ("s", 4, 5)])
def test_the_symbolic_cost_of_a_pipeline_is_the_number_that_the_search_compared(axis, microbatches, depth):
    plan = jaxplan.make_plan(
        descend, *shapes(depth=depth), mesh=MESH, machine=SLOW_WORK, pipeline=axis, microbatches=microbatches
    )
    assert plan.pipeline.axis == axis and plan.pipeline.microbatches == microbatches
    assert float(plan.cost.subs(plan.symbol_values)) == pytest.approx(plan.seconds, rel=1e-9)
    assert float(plan.peak.subs(plan.symbol_values)) == pytest.approx(plan.peak_bytes, rel=1e-9)
    assert "M_micro" in {str(symbol) for symbol in plan.cost.free_symbols}


@pytest.mark.slow
def test_the_symbolic_cost_of_a_pipelined_decoder_is_the_number_that_the_search_compared():
    plan = jaxplan.make_plan(DECODER.fn, *DECODER.args, mesh=MESH, machine=SLOW_WORK, pipeline="s", microbatches=4)
    assert float(plan.cost.subs(plan.symbol_values)) == pytest.approx(plan.seconds, rel=1e-9)


def test_work_alone_takes_as_long_as_the_bubble_says():
    """With links that cost nothing: (m + k - 1) / m times as long as on as many devices without idling."""
    free = replace(SLOW_WORK, inner=jaxplan.Link(1e-30, 0.0), outer=jaxplan.Link(1e-30, 0.0), seconds_per_byte=1e-30)
    whole = jaxplan.make_plan(layers, *shapes(), mesh=AbstractMesh((1,), ("s",)), machine=free).seconds
    for m in (1, 2, 4, 8, 16):
        plan = jaxplan.make_plan(layers, *shapes(), mesh=AbstractMesh((4,), ("s",)), machine=free, pipeline="s", microbatches=m)
        assert plan.seconds == pytest.approx(whole / 4 * (m + 4 - 1) / m, rel=1e-9)


def test_what_stages_send_is_listed_with_its_line():
    plan = jaxplan.make_plan(layers, *shapes(), mesh=AbstractMesh((4,), ("s",)), machine="v4", pipeline="s", microbatches=8)
    handed, given = sorted(plan.exchanges, key=lambda e: e.kind, reverse=True)
    assert (handed.kind, handed.times, handed.shape, handed.axes) == ("permute", 11, (2, 32), ("s",))
    assert handed.wire_bytes == {"s": 2 * 32 * 4} and handed.source.startswith("test_pipeline_plan.py:")
    assert (given.kind, given.times, given.wire_bytes) == ("all_reduce", 1, {"s": 2 * 3 / 4 * 16 * 32 * 4})
    assert plan.wire_bytes == {"s": 11 * 2 * 32 * 4 + 2 * 3 / 4 * 16 * 32 * 4}
    assert plan.in_specs[1] == P("s"), "each stage holds its layers"


def test_latency_is_paid_at_every_tick():
    late = replace(SLOW_WORK, inner=jaxplan.Link(1e-10, 1e-3), outer=jaxplan.Link(1e-10, 1e-3))
    mesh = AbstractMesh((4,), ("s",))
    few, many = [
        jaxplan.make_plan(layers, *shapes(), mesh=mesh, machine=late, pipeline="s", microbatches=m).seconds for m in (2, 16)
    ]
    assert many - few == pytest.approx(14e-3, rel=0.05)


def test_a_stage_holds_its_share_of_what_is_stacked():
    one = jaxplan.make_plan(DECODER.fn, *DECODER.args, mesh=AbstractMesh((1,), ("s",)), machine="v4")
    plan = jaxplan.make_plan(
        DECODER.fn, *DECODER.args, mesh=AbstractMesh((4,), ("s",)), machine="v4", pipeline="s", microbatches=4
    )
    stacked = [i for i, path in enumerate(plan.traced.in_paths) if "blocks" in path]
    assert stacked and all(plan.input_bytes(i) == one.input_bytes(i) / 4 for i in stacked)
    kept = [b for b in plan.memory.live if plan.modelled.graph.tensors[b.tensor].shape[:2] == (4, 16)]
    assert kept and all(plan.axis_names.index("s") in b.axes for b in kept), "what the forward pass keeps lies with its layer"


@pytest.mark.parametrize("mesh", [(4,), (2, 2), (2, 4)])
def test_no_plan_is_below_the_bound_of_its_candidate(mesh):
    names = ("s", "d")[: len(mesh)]
    graph = build_graph(trace(DECODER.fn, DECODER.args, {}))
    numbers = Numbers(graph, dict(zip(names, mesh, strict=True)), machine("v4"))
    found = candidates(graph, numbers, chain_groups(trace(DECODER.fn, DECODER.args, {})), range(len(mesh)), None)
    assert len({one.pipeline.microbatches for one in found}) > 2
    for one in found[::3]:
        p = one.pipeline
        plan = jaxplan.make_plan(
            DECODER.fn, *DECODER.args, mesh=AbstractMesh(mesh, names), machine="v4", pipeline=p.axis, microbatches=p.microbatches
        )
        assert one.least <= plan.seconds * (1 + 1e-9)


def test_micro_batches_are_divisors_near_powers_of_two():
    assert counts(64, 2) == (2, 4, 8, 16, 32)
    assert counts(24, 4) == (2, 4, 8, 12, 24)
    assert counts(7, 2) == (7,) and counts(1, 2) == () and counts(24, 2, 3) == (3,) and counts(24, 2, 5) == ()


# --- when one is chosen ----------------------------------------------------------------------------------------------

STATE = {"donate_argnums": (0, 1)}


def test_across_a_slow_link_a_model_too_large_for_one_group_is_laid_in_stages():
    """Two groups of four with fast links, links twenty times slower between them; the state does not fit four devices."""
    fast = machine("a100").inner
    groups = machine("a100").with_axis("s", fast.slower(20)).with_axis("d", fast)
    asked = {"mesh": AbstractMesh((2, 4), ("s", "d")), "machine": groups, **STATE}
    staged = jaxplan.make_plan(LARGE.fn, *LARGE.args, pipeline="s", memory_budget=np.inf, **asked)
    budget = 1.02 * staged.peak_bytes
    with pytest.raises(NothingFits):
        one = {**asked, "mesh": AbstractMesh((4,), ("d",))}
        jaxplan.make_plan(LARGE.fn, *LARGE.args, pipeline=None, memory_budget=budget, **one)
    plan = jaxplan.make_plan(LARGE.fn, *LARGE.args, memory_budget=budget, **asked)
    assert plan.pipeline is not None and plan.pipeline.axis == "s" and plan.peak_bytes <= budget
    none = jaxplan.make_plan(LARGE.fn, *LARGE.args, pipeline=None, certify=True, memory_budget=np.inf, **asked)
    assert none.pipeline is None and none.bound is not None
    assert plan.seconds < none.bound, "no plan without a pipeline is faster, not even one that need not fit"


def test_at_another_size_a_pipeline_is_taken_where_a_trace_of_that_size_takes_one():
    fast = machine("a100").inner
    groups = machine("a100").with_axis("s", fast.slower(20)).with_axis("d", fast)
    asked = {"mesh": AbstractMesh((2, 4), ("s", "d")), "machine": groups, "memory_budget": np.inf, **STATE}
    small, dims = decoder(replace(LARGE_SIZES, batch=8), "scan"), {"batch/tokens": "B S", "batch/targets": "B S"}
    plan = jaxplan.make_plan(small.fn, *small.args, dims=dims, **asked).replan(sizes={"B": 16})
    fresh = jaxplan.make_plan(LARGE.fn, *LARGE.args, **asked)
    assert plan.pipeline is not None and plan.pipeline == fresh.pipeline
    assert plan.seconds == pytest.approx(fresh.seconds, rel=1e-12) and plan.peak_bytes == fresh.peak_bytes


@pytest.mark.parametrize("forced", [None, "s"])
def test_pipelines_that_are_shown_to_be_too_slow_are_not_searched_and_the_plan_is_the_same(forced, monkeypatch):
    fast = machine("a100").inner
    groups = machine("a100").with_axis("s", fast.slower(20)).with_axis("d", fast)
    asked = {"mesh": AbstractMesh((2, 4), ("s", "d")), "machine": groups, "memory_budget": np.inf, **STATE}
    searched, search = [], attempts.run_search

    def counted(problem, method):
        searched.append(problem)
        return search(problem, method)

    monkeypatch.setattr(attempts, "run_search", counted)
    plan = jaxplan.make_plan(LARGE.fn, *LARGE.args, pipeline=forced or "auto", **asked)
    few = len(searched)
    monkeypatch.setattr(attempts.Floor, "reaches", lambda floor, seconds: False)
    every = jaxplan.make_plan(LARGE.fn, *LARGE.args, pipeline=forced or "auto", **asked)
    assert few < len(searched) - few, "without bounds more are searched"
    assert plan.pipeline == every.pipeline and plan.pipeline is not None
    assert plan.seconds == every.seconds and (plan.choices == every.choices).all()


def test_where_nothing_else_fits_a_pipeline_is_taken():
    wide = decoder(replace(SMALL, layers=8, batch=2, sequence=8, width=24, heads=3, mlp_width=27, vocabulary=25), "scan")
    mesh = AbstractMesh((4,), ("s",))
    free = jaxplan.make_plan(wide.fn, *wide.args, mesh=mesh, machine="v4", pipeline="s", **STATE)
    budget = int(1.02 * free.peak_bytes)
    try:
        without = jaxplan.make_plan(wide.fn, *wide.args, mesh=mesh, machine="v4", pipeline=None, memory_budget=budget, **STATE)
    except NothingFits:
        without = None
    plan = jaxplan.make_plan(wide.fn, *wide.args, mesh=mesh, machine="v4", memory_budget=budget, **STATE)
    assert plan.peak_bytes <= budget
    assert plan.pipeline is not None if without is None else plan.seconds <= without.seconds


@pytest.mark.parametrize("name", ["mlp_sgd", "decoder_scan", "stencil"])
def test_where_all_links_are_fast_the_plan_is_the_one_without(name):
    program = programs()[name]
    mesh = AbstractMesh((4, 2), ("x", "y"))
    plan = jaxplan.make_plan(program.fn, *program.args, mesh=mesh, machine="v4")
    none = jaxplan.make_plan(program.fn, *program.args, mesh=mesh, machine="v4", pipeline=None)
    assert plan.pipeline is None and plan.seconds == none.seconds and plan.in_specs == none.in_specs


def test_a_plan_without_a_pipeline_is_never_worse_than_one_that_was_chosen():
    groups = machine("a100").with_axis("s", machine("a100").inner.slower(100))
    for size in (2, 4):
        mesh = AbstractMesh((size, 2), ("s", "d"))
        auto = jaxplan.make_plan(LARGE.fn, *LARGE.args, mesh=mesh, machine=groups, memory_budget=np.inf)
        for pipeline in (None, "s"):
            other = jaxplan.make_plan(LARGE.fn, *LARGE.args, mesh=mesh, machine=groups, memory_budget=np.inf, pipeline=pipeline)
            assert auto.seconds <= other.seconds / 0.97


def test_a_pipeline_survives_replanning_and_a_file(tmp_path):
    plan = jaxplan.make_plan(DECODER.fn, *DECODER.args, mesh=MESH, machine=SLOW_WORK, pipeline="s", microbatches=4)
    again = plan.replan(pins={"params/embedding": P("d")})
    assert again.pipeline == plan.pipeline and again.in_specs[0]["embedding"] == P("d")
    assert plan.replan(pipeline=None, microbatches=None).pipeline is None
    plan.save(tmp_path / "plan.json")
    loaded = jaxplan.load_plan(tmp_path / "plan.json", DECODER.fn, *DECODER.args)
    assert loaded.pipeline == plan.pipeline and loaded.seconds == plan.seconds and loaded.request.pipeline == "s"
    assert (loaded.choices == plan.choices).all() and loaded.in_specs == plan.in_specs
    other = decoder(replace(SMALL, sequence=8, width=32, layers=8), "scan")
    with pytest.raises(ValueError, match="not the program that the plan was made for"):
        jaxplan.load_plan(tmp_path / "plan.json", other.fn, *other.args)


def test_the_printed_plan_says_who_has_which_layers():
    asked = {"mesh": AbstractMesh((2,), ("s",)), "machine": "v4", "pipeline": "s"}
    plan = jaxplan.make_plan(layers, *shapes(depth=6), microbatches=4, **asked)
    assert "s (2): pipeline (6 layers, 3 on each stage), 4 micro-batches, gpipe, bubble 20.0%" in str(plan)
    plan = jaxplan.make_plan(layers, *shapes(depth=5), microbatches=1, **asked)
    assert "pipeline (5 layers, 3+2 on the stages), 1 micro-batch, gpipe, bubble 50.0%" in str(plan)


# --- and runs --------------------------------------------------------------------------------------------------------


def test_a_planned_hybrid_computes_what_the_function_does_and_sends_what_was_planned():
    x, w = (jax.random.normal(jax.random.key(n), shape.shape) for n, shape in enumerate(shapes()))
    plan = jaxplan.make_plan(descend, *shapes(), mesh=mesh_of((2, 2, 2)), machine=SLOW_WORK, pipeline="x", microbatches=4)
    assert all(any(layout[axis] >= 0 for layout in plan.layouts.values()) for axis in (1, 2)), "the other axes work too"
    assert_close(jax.jit(descend)(x, w / 8), plan.jit()(x, w / 8))
    found = plan.audit()
    handed = [row for row in found.exchanges if row.kind == "collective-permute" and row.axes == ("x",)]
    assert handed and {row.status for row in handed} == {"matched"}, str(found)
    assert sum(row.compiled_times for row in handed) == 2 * (4 + 2 - 1), "m + k - 1 forward, and as many backward"
    assert found.predicted_bytes == pytest.approx(found.compiled_bytes, rel=0.05), str(found)


# --- what is refused -------------------------------------------------------------------------------------------------


def mixing(x, weights):
    def body(x, w):
        y = x @ w
        return y - y.mean(axis=(0, 1), keepdims=True), None

    return jax.lax.scan(body, x, weights)[0]


@pytest.mark.parametrize(
    ("fn", "depth", "mesh", "asked", "message"),
    [
        (layers, 3, {"s": 4}, {"pipeline": "s"}, "4 stages, and only 3 layers.*at most 3"),
        (layers, 4, {"s": 2}, {"pipeline": "s", "microbatches": 5}, "microbatches=5 does not divide the batch of 16 rows"),
        (layers, 4, {"s": 2}, {"microbatches": 5}, "microbatches=5 does not divide the batch of 16 rows"),
        (layers, 4, {"s": 1}, {"pipeline": "s"}, "has size 1"),
        (layers, 4, {"s": 2}, {"pipeline": "stage"}, r"the mesh has the axes \('s',\)"),
        (layers, 4, {"s": 2}, {"pipeline": None, "microbatches": 2}, "microbatches=2 without a pipeline"),
        (layers, 4, {"s": 2}, {"pipeline": 3}, "pipeline must be 'auto', None, or the name of a mesh axis, got 3"),
        (layers, 4, {"s": 2}, {"microbatches": 0}, "microbatches must be a whole number of at least 1"),
        (lambda x, w: x @ w[0], 4, {"s": 2}, {"pipeline": "s"}, "jax.lax.scan over stacked layers"),
        (mixing, 4, {"s": 2}, {"pipeline": "s"}, r"sub at .*test_pipeline_plan\.py:\d+ reads a sum over the rows"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_searched(fn, depth, mesh, asked, message, monkeypatch):
    monkeypatch.setattr("jaxplan.api.run_search", lambda *_: pytest.fail("searched"))
    abstract = AbstractMesh(tuple(mesh.values()), tuple(mesh))
    if asked.get("pipeline", "auto") == "auto":
        monkeypatch.undo()
    with pytest.raises(ValueError, match=message):
        jaxplan.make_plan(fn, *shapes(depth=depth), mesh=abstract, machine="v4", **asked)


def test_a_loop_of_unknown_length_is_no_chain():
    def until(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1.0, lambda x: x @ w[0], x)

    with pytest.raises(ValueError, match=r"while at \S*test_pipeline_plan\.py:\d+ runs as often.*jax\.lax\.scan over stacked"):
        jaxplan.make_plan(until, *shapes(), mesh=AbstractMesh((2,), ("s",)), machine="v4", pipeline="s")


@pytest.mark.parametrize("rows", [1, 7, 9, 549])
@pytest.mark.parametrize("written_out", [False, True])
def test_a_batch_that_two_does_not_divide(rows, written_out):
    """Cut into what divides it, or not at all; never an error that nobody asked for."""

    def step(layers, x):
        def loss(layers):
            y = x
            if not written_out:
                return jnp.sum(jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), y, layers)[0] ** 2)
            for layer in range(4):
                y = jnp.tanh(y @ layers[layer])
            return jnp.sum(y**2)

        return layers - 0.1 * jax.grad(loss)(layers)

    args = jax.ShapeDtypeStruct((4, 64, 64), jnp.float32), jax.ShapeDtypeStruct((rows, 64), jnp.float32)
    mesh, slow = AbstractMesh((2, 2), ("s", "d")), machine("v4").slower("s", 1000, {"s": 2, "d": 2})
    assert jaxplan.make_plan(step, *args, mesh=mesh, machine=slow).seconds > 0
    if written_out:
        return
    if rows == 1:
        with pytest.raises(ValueError, match=r"batch is too small|cannot run in stages"):
            jaxplan.make_plan(step, *args, mesh=mesh, machine=slow, pipeline="s")
    else:
        assert rows % jaxplan.make_plan(step, *args, mesh=mesh, machine=slow, pipeline="s").pipeline.microbatches == 0


def test_a_loop_that_does_not_say_how_often_it_runs_is_named_by_its_line():
    def fn(ws, x, count):
        return jax.lax.fori_loop(0, count, lambda i, y: jnp.tanh(y @ ws[i]), x)

    args = (jax.ShapeDtypeStruct(s, d) for s, d in (((4, 8, 8), jnp.float32), ((16, 8), jnp.float32), ((), jnp.int32)))
    with pytest.raises(ValueError, match=r"while at \S*test_pipeline_plan\.py:\d+ runs as often as it finds out.*jax\.lax\.scan"):
        jaxplan.make_plan(fn, *args, mesh=AbstractMesh((2,), ("s",)), pipeline="s")


def test_layers_with_effects_are_not_laid_in_stages_and_the_plan_says_so():
    """What is printed would be printed at every tick, those of the bubble too. The backward scan prints nothing."""

    def layer(x, w):
        jax.debug.print("{}", w[0, 0])
        return jnp.tanh(x @ w), None

    def loss(ws, x):
        return jnp.sum(jax.lax.scan(layer, x, ws)[0])

    args = jax.ShapeDtypeStruct((4, 8, 8), jnp.float32), jax.ShapeDtypeStruct((16, 8), jnp.float32)
    asked = {"mesh": AbstractMesh((2,), ("s",)), "pipeline": "s", "microbatches": 4}
    line = r"at \S*test_pipeline_plan\.py:\d+"
    where = rf"scan {line} cannot run in stages.*debug_\w+ {line} has an effect"
    with pytest.raises(ValueError, match=where):
        jaxplan.make_plan(loss, *args, **asked)
    plan = jaxplan.make_plan(jax.grad(loss), *args, **asked)
    assert [chain.reverse for chain in plan.pipeline.chains] == [True]
    assert re.search("not in stages   " + where, str(plan)), str(plan)
