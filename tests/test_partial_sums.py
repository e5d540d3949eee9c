"""Terms of an addition that stay partial sums: found, priced, and compiled to one exchange of the total."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, mesh_of
from jax.sharding import PartitionSpec as P

import jaxplan
from jaxplan.cost import Option
from jaxplan.examples import programs
from jaxplan.graph import build_graph
from jaxplan.graph.flatten import TOTAL
from jaxplan.layout import PARTIAL
from jaxplan.machine import PRESETS
from jaxplan.trace import trace

FAST = replace(PRESETS["v4"], inner=replace(PRESETS["v4"].inner, latency_seconds=0.0))


def normal(*shape, dtype=jnp.float32, seed=0):
    return jax.random.normal(jax.random.key(seed + sum(shape)), shape, dtype)


def two_products(a, w, b, v):
    return jnp.tanh(a @ w + b @ v)


def tied_table(table, rows, states):
    def loss(table):
        return jnp.sum(jnp.tanh(jnp.tanh(states * table[rows]) @ table.T))

    return jax.value_and_grad(loss)(table)


def three_and_a_whole(a, w, b, v, bias):
    return jnp.tanh((a @ w - bias) + b @ v - a @ (w + w))


def in_a_loop(a, w, b, v):
    def body(carry, _):
        return jnp.tanh(carry @ w + b @ v), None

    return jax.lax.scan(body, a, None, length=3)[0]


def scaled(a, w, b, v):
    return jnp.tanh((a @ w) * 0.5 - b @ v / 3.0)


def accumulated(params, rows, wanted):
    """The gradients of a model, a part of the batch at a time."""

    def loss(params, x, y):
        return jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"] + params["bias"][None] - y) ** 2)

    def body(total, part):
        value, gradients = jax.value_and_grad(loss)(params, *part)
        return jax.tree.map(lambda a, g: a + g.astype(jnp.float32) / len(rows), total, gradients), value

    return jax.lax.scan(body, jax.tree.map(lambda p: jnp.zeros(p.shape), params), (rows, wanted))


def rematerialised(a, w, b, v):
    return jax.checkpoint(two_products)(a, w, b, v)


def convolutions(images, kernel, others):
    def conv(x, k):
        return jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    return jnp.tanh(conv(images, kernel) + conv(others, kernel))


PAIR = (normal(8, 512), normal(512, 64), normal(8, 256), normal(256, 64))
CUT = {"a": P(None, "x"), "b": P(None, "x")}
CASES = {
    "two products": (two_products, PAIR, CUT),
    "three and a whole": (three_and_a_whole, (*PAIR, normal(8, 64)), CUT),
    "in a loop": (in_a_loop, (normal(8, 64), normal(64, 64), normal(8, 64), normal(64, 64)), {"w": P("x"), "v": P("x")}),
    "rematerialised": (rematerialised, PAIR, CUT),
    "scaled": (scaled, PAIR, CUT),
    "16 bits": (two_products, tuple((x / 8).astype(jnp.bfloat16) for x in PAIR), CUT),
    "tied table": (
        tied_table, (normal(64, 32), jax.random.randint(jax.random.key(1), (512,), 0, 64), normal(512, 32)),
        {"rows": P("x"), "states": P("x"), "table": P()},
    ),
    "convolutions": (
        convolutions, (normal(2, 8, 8, 32), normal(3, 3, 32, 16), normal(2, 8, 8, 32, seed=1)),
        {"images": P(None, None, None, "x"), "others": P(None, None, None, "x")},
    ),
}  # fmt: skip


def made(name, shape):
    fn, args, pins = CASES[name]
    return jaxplan.make_plan(fn, *args, mesh=mesh_of(shape), machine=FAST, pins=pins), args


def left(plan):
    """{operator's name: axes along which it leaves partial sums}, of those that do."""
    operators = plan.modelled.graph.operators
    return {operators[i].name: axes for i, (over, _, axes) in plan.constraints.sums.items() if axes and not over}


# --- in the graph ----------------------------------------------------------------------------------------------------


def sums(fn, *args):
    """(members of every addition of terms, makers of terms), by name."""
    graph = build_graph(trace(fn, args, {}))
    name = [operator.name for operator in graph.operators]
    adds = [[name[m] for m in cluster.members] for cluster in graph.clusters if cluster.adds]
    return adds, [name[c.operator] for cluster in graph.clusters for c in cluster.combines if c.left]


def test_an_addition_is_as_small_as_its_terms_allow():
    a, w, b, v = PAIR
    assert sums(two_products, *PAIR) == ([["add"]], ["dot_general"] * 2)
    assert sums(lambda a, w, b, v, c: -(a @ w + b @ v) + c, a, w, b, v, normal(8, 64))[0] == [["add"]]
    assert sums(lambda a, w, b, v: (a @ w).T - (b @ v + a @ w).T, *PAIR)[0] == [["transpose", "add", "transpose", "sub"]]


def test_what_is_read_elsewhere_or_not_linear_is_no_term():
    def read_twice(a, w, b, v):
        one = a @ w
        return one + b @ v, jnp.sum(one)

    assert sums(read_twice, *PAIR) == ([], [])
    assert sums(lambda a, w, b, v: a @ w + jnp.tanh(b @ v), *PAIR) == ([], [])
    assert sums(lambda a, w, b, v: a @ w + (b @ v) * w[0, 0], *PAIR)[0] == [["mul", "add"]]
    assert sums(lambda a, w, b, v: a @ w + (b @ v) * w[:1], *PAIR) == ([], [])
    assert sums(lambda a, w, b, v: a @ w + 2.0 / (b @ v), *PAIR) == ([], [])
    whole = [x.astype(jnp.int32) for x in PAIR]
    assert sums(lambda a, w, b, v: a @ w + jax.lax.div(b @ v, 2), *whole) == ([], [])  # it cuts off
    halves = [x.astype(jnp.bfloat16) for x in PAIR]
    mixed, rounded = (*halves[:2], *PAIR[2:]), (*PAIR[:2], *halves[2:])
    assert sums(lambda a, w, b, v: (a @ w).astype(jnp.float32) + b @ v, *mixed)[0] == [["convert_element_type", "add"]]
    assert sums(lambda a, w, b, v: (a @ w).astype(jnp.bfloat16) + b @ v, *rounded) == ([], [])  # parts would be rounded
    assert sums(lambda a, b: (a @ b.T) + (a @ b.T), normal(1, 8), normal(1, 8)) == ([], [])  # one element: nothing to lay out
    assert sums(lambda a, w: (lambda p: p + p)(a @ w), *PAIR[:2]) == ([], [])


def test_nothing_partial_crosses_calls_that_are_traced_anew():
    inner = jax.custom_jvp(lambda b, v: b @ v)
    inner.defjvp(lambda primals, tangents: (primals[0] @ primals[1], tangents[0] @ primals[1]))
    assert sums(lambda a, w, b, v: a @ w + inner(b, v), *PAIR) == ([], [])
    assert sums(lambda a, w, b, v: a @ w + jax.checkpoint(jnp.matmul)(b, v), *PAIR) == ([], [])
    assert sums(lambda a, w, b, v: a @ w + jax.jit(jnp.matmul)(b, v), *PAIR)[1] == ["dot_general"] * 2
    whole = jax.custom_jvp(two_products)
    whole.defjvp(lambda primals, tangents: jax.jvp(two_products, primals, tangents))
    assert sums(lambda a, w, b, v: whole(a, w, b, v), *PAIR)[1] == ["dot_general"] * 2


def test_the_gradients_of_a_tied_embedding_are_one_addition():
    program = programs("small")["decoder_unrolled"]
    adds, terms = sums(program.fn, *program.args)
    assert "scatter-add" in terms and ["add_any"] in adds


# --- planned, compiled and run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8,), (4, 2)])
@pytest.mark.parametrize("name", CASES)
def test_the_total_is_exchanged_once(name, shape):
    plan, args = made(name, shape)
    found = left(plan)
    assert found and all(0 in axes for axes in found.values())
    want = jax.jit(CASES[name][0])(*args)
    got = plan.jit()(*args)
    if name == "16 bits":
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), atol=0.1)
    else:
        assert_close(want, got)
    audit = plan.audit()
    assert audit.errors == dict.fromkeys(plan.axis_names, 0.0)
    assert audit.total("missing") == audit.total("unplanned") == 0
    totals = [e for e in plan.exchanges if e.kind in ("all_reduce", "reduce_scatter") and e.shape and "x" in e.axes]
    assert len(totals) == 1


@pytest.mark.parametrize(("shape", "exact"), [((4,), "brute"), ((2, 2), "alpa")])
def test_an_addition_is_planned_as_well_as_can_be(shape, exact):
    args = (normal(8, 64), normal(64, 16), normal(8, 32), normal(32, 16))
    asked = {"mesh": mesh_of(shape), "machine": FAST, "pins": {"a": P(None, "x"), "b": P(None, "x")}}
    plan = jaxplan.make_plan(two_products, *args, **asked)
    best = jaxplan.make_plan(two_products, *args, **asked, search=exact)
    assert plan.seconds == pytest.approx(best.seconds, rel=1e-9)
    assert left(plan) == left(best) == {"dot_general": (0,)}
    assert float(plan.cost.subs(plan.symbol_values)) == pytest.approx(plan.seconds, rel=1e-9)


def _floats(*trees):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), trees)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(8,), (4, 2)])
def test_a_loop_adds_up_parts_and_combines_them_once(shape, dtype):
    params = {"up": normal(32, 64) / 8, "down": normal(64, 32) / 8, "bias": normal(32)}
    args = jax.tree.map(lambda x: x.astype(dtype), (params, normal(4, 512, 32), normal(4, 512, 32, seed=1)))
    pins = {"rows": P(None, "x"), "wanted": P(None, "x")}
    plan = jaxplan.make_plan(accumulated, *args, mesh=mesh_of(shape), machine=FAST, pins=pins)
    if dtype == jnp.float32:
        assert_close(jax.jit(accumulated)(*args), plan.jit()(*args))
    else:
        jax.tree.map(partial(np.testing.assert_allclose, atol=0.02), *_floats(jax.jit(accumulated)(*args), plan.jit()(*args)))
    sums = [e for e in plan.exchanges if e.kind in ("all_reduce", "reduce_scatter") and "x" in e.axes]
    assert {len(e.shape): e.times for e in sums} == {2: 1, 1: 4, 0: 4}, "a vector's gradient is summed in every round"
    audit = plan.audit()
    assert audit.errors == dict.fromkeys(plan.axis_names, 0.0)
    assert audit.total("missing") == audit.total("unplanned") == 0


def test_a_carry_that_is_not_only_added_to_goes_round_whole():
    def read_again(w, rows):
        def body(total, x):
            return total + x.T @ x, jnp.sum(total)

        return jax.lax.scan(body, w, rows)

    def decayed(w, rows):
        return jax.lax.scan(lambda total, x: (0.9 * total + x.T @ x, None), w, rows)[0]

    def stacked(w, rows):
        return jax.lax.scan(lambda total, x: (total + x.T @ x,) * 2, w, rows)

    for fn in (read_again, decayed, stacked):
        graph = build_graph(trace(fn, (normal(8, 8), normal(4, 64, 8)), {}))
        assert not any(TOTAL in op.path for op in graph.operators)


def ruled(fn):
    """With a derivative of its own."""
    sealed = jax.custom_jvp(fn)
    sealed.defjvp(lambda primals, tangents: jax.jvp(fn, primals, tangents))
    return sealed


@pytest.mark.parametrize("seal", [jax.checkpoint, ruled])
def test_a_total_does_not_leave_a_call_in_parts(seal):
    """The body of the loop adds inside of a call that is traced anew."""

    def fn(w, rows):
        return jax.lax.scan(lambda total, x: (seal(lambda t, x: t + x.T @ x)(total, x), None), w, rows)[0]

    args = (normal(16, 16), normal(3, 64, 16))
    plan = jaxplan.make_plan(fn, *args, mesh=mesh_of((4,)), machine=FAST, pins={"rows": P(None, "x")})
    assert not left(plan)
    assert_close(jax.jit(fn)(*args), plan.jit()(*args))


def rounds_and_more(w, rows, a, b):
    """A loop's total, which starts from something, is a term itself, and another loop's, in loops."""

    def body(total, x):
        return total - (x.T @ x).T * 0.5, x.sum()

    def outer(total, some):
        inner, values = jax.lax.scan(body, jnp.ones_like(w), some)
        return total + inner + some[0].T @ some[1], values

    total, values = jax.lax.scan(outer, w, jnp.stack([rows, rows + 1]))
    return total + a @ b, values


THREE = (normal(8, 64), normal(64, 16), normal(8, 32), normal(32, 16), normal(8, 16))
ROUNDS = (normal(16, 16), normal(3, 32, 16), normal(16, 8), normal(8, 16))


@pytest.mark.parametrize(("fn", "args"), [(three_and_a_whole, THREE), (rounds_and_more, ROUNDS)])
@pytest.mark.parametrize("shape", [(4,), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_whatever_each_term_does_the_result_is_the_same(shape, fn, args):
    """Terms that differ in what they leave partial, and additions that do not take it: no search would choose most of these."""
    plan = jaxplan.make_plan(fn, *args, mesh=mesh_of(shape), machine=FAST)
    problem, random = plan.modelled.problem, np.random.default_rng(0)
    graph = plan.modelled.graph
    kept = [graph.clusters[cluster] for cluster in plan.modelled.kept]
    terms = [any(combine.left for combine in cluster.combines) for cluster in kept]
    want = jax.jit(fn)(*args)
    for _ in range(2 if len(shape) == 1 else 16):
        choices = np.array([
            [random.integers(0 if not term or random.random() < 0.3 else count - 1, count) for count in node.options]
            for node, term in zip(problem.nodes, terms, strict=True)
        ])  # fmt: skip
        legal = [float(node.price(row[None])[0]) < np.inf for node, row in zip(problem.nodes, choices, strict=True)]
        choices[~np.array(legal)] = 0
        other = replace(plan, choices=plan.modelled.complete(choices))
        assert_close(want, other.jit()(*args))


def test_both_axes_may_split_a_sum_and_one_of_them_leave_it():
    plan, args = made("tied table", (4, 2))
    graph, modelled = plan.modelled.graph, plan.modelled
    for index, cluster in enumerate(graph.clusters):
        for combine in cluster.combines:
            if combine.left:
                first, second = modelled.options[index]
                both = max(option.factor for option in first if option.scatter == PARTIAL)
                plan.choices[index] = first.index(Option(both, PARTIAL)), second.index(Option(both))
    other = replace(plan, choices=plan.choices.copy())
    assert left(other) == {"dot_general": (0,), "scatter-add": (0,)}
    assert_close(jax.jit(tied_table)(*args), other.jit()(*args))


# --- told, kept and differentiated -----------------------------------------------------------------------------------


def test_a_plan_with_partial_sums_is_saved_and_loaded(tmp_path):
    plan, args = made("two products", (4, 2))
    plan.save(tmp_path / "plan.json")
    again = jaxplan.load_plan(tmp_path / "plan.json", two_products, *args, mesh=mesh_of((4, 2)))
    assert left(again) == left(plan) == {"dot_general": (0,)}
    assert again.seconds == pytest.approx(plan.seconds)


def test_partial_sums_take_memory_until_they_are_added():
    fn, args, pins = CASES["two products"]
    audit = jaxplan.make_plan(fn, *args, mesh=mesh_of((8,)), machine="cpu", pins=pins).audit()
    assert audit.predicted_peak_bytes == pytest.approx(audit.compiled_peak_bytes, rel=0.1)


def test_a_planned_addition_can_be_differentiated():
    plan, args = made("two products", (8,))
    planned = plan.jit()
    want = jax.grad(lambda w: jnp.sum(two_products(args[0], w, *args[2:])))(args[1])
    got = jax.jit(jax.grad(lambda w: jnp.sum(planned(args[0], w, *args[2:]))))(args[1])
    assert_close(want, got)


def test_layouts_in_types_cannot_say_partial_sums_and_tell():
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in PAIR]
    pins = {"a": P(None, "x"), "b": P(None, "x")}
    plan = jaxplan.make_plan(two_products, *args, mesh=mesh_of((4,)), machine=FAST, pins=pins)
    assert plan.constraints.sums
    assert any("partial sums" in line for line in plan.export("explicit").refused)
