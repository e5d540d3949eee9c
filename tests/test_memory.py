"""Modelled memory: the order is one that could run, nothing is lost, and the compiler allocates about as much."""

from __future__ import annotations

import re
import runpy
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import sympy
from conftest import mesh_of
from jax.sharding import AbstractMesh, PartitionSpec as P

import jaxplan
from jaxplan.cost import ceiling, facts_of
from jaxplan.cost.buffers import OUTPUT, Buffer, outside_outputs
from jaxplan.cost.heap import stack_by_size
from jaxplan.cost.schedule import run_order
from jaxplan.examples import programs
from jaxplan.graph import build_graph
from jaxplan.graph.flatten import BOUNDARY
from jaxplan.machine import PRESETS, Link
from jaxplan.trace import trace

SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "check_memory.py"))
WORST = 1.3
"""The goal for compilers that materialise."""
QUICK = ("conjugate_gradient", "decode_kv", "mlp_sgd", "stencil")


def shape(*extents):
    return jax.ShapeDtypeStruct(extents, jnp.float32)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(programs())]
)
def test_the_compiler_allocates_about_as_much(name):
    for _, where, modelled, compiled in SCRIPT["rows"]([(1,), (4, 2)], [name]):
        assert 1 / WORST <= modelled / compiled <= WORST, (where, modelled, compiled)


@pytest.mark.parametrize("materialises", [False, True])
@pytest.mark.parametrize("name", sorted(programs()))
def test_every_value_is_made_before_it_is_read(name, materialises):
    program = programs()[name]
    graph = build_graph(trace(program.fn, program.args, {}))
    order = run_order(graph, materialises)
    assert sorted(order.sequence) == list(range(len(graph.operators)))
    made: set[int] = set()
    looped = {t for op in graph.operators if op.name == BOUNDARY for t in op.results}
    for index in order.sequence:
        for tensor in graph.operators[index].operands:
            if tensor >= 0 and tensor not in looped:  # what goes round a loop is made by its far end
                assert tensor in made, graph.operators[index]
        made.update(graph.operators[index].results)
    if not materialises:
        assert order.sequence == tuple(range(len(graph.operators)))


ON_THE_WAY = {
    "gathered along rows, for a product": (
        lambda x, w: jnp.tanh(x) @ w, (shape(64, 512), shape(512, 2048)), {"x": P(None, "x"), "w": P(None, "x")}, "all_gather"
    ),
    "gathered along rows, for an output": (
        lambda p, g: jnp.sin(p) - g, (shape(64, 512), shape(64, 512)), {"p": P(), "g": P(None, "x")}, "all_gather"
    ),
    "an argument, sent in pieces": (lambda x: jnp.cumsum(x, 1), (shape(64, 512),), {"x": P(None, "x")}, "all_to_all"),
    "scattered, and read by element-wise work": (
        lambda x, y, p: p - jnp.sin(x.T @ y), (shape(2048, 256), shape(2048, 256), shape(256, 256)),
        {"x": P("x"), "y": P("x"), "p": P("x")}, "reduce_scatter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_THE_WAY)
def test_what_is_there_only_while_an_exchange_runs(name):
    """The compiler for CPU gathers and sends pieces, copies what lies elsewhere than it should, and scatters what it has reduced
    whole: each program is one exchange, and was 13% to 32% too small."""
    fn, args, pins, kind = ON_THE_WAY[name]
    dear = Link(1e-8, 1e-14)
    machine = replace(PRESETS["cpu"], name="dear links", inner=dear, outer=dear)
    plan = jaxplan.make_plan(fn, *args, mesh=mesh_of((8,)), machine=machine, pins=pins)
    assert {exchange.kind for exchange in plan.exchanges} == {kind}
    assert plan.peak_bytes == pytest.approx(SCRIPT["compiled_bytes"](plan, args), rel=0.03)


@pytest.mark.parametrize("mesh", [(1,), (8,)])
def test_a_ragged_product_is_computed_with_all_other_rows_masked(mesh):
    """XLA for CPU has no kernel for it: what is multiplied is stored once per group. The peak was a fifth of what it takes."""
    groups, rows, width, hidden = 6, 96, 24, 48

    def loss(w, x, sizes):
        return jnp.sum(jax.lax.ragged_dot(jax.nn.silu(jax.lax.ragged_dot(x, w["up"], sizes)), w["down"], sizes) ** 2)

    w = {"up": shape(groups, width, hidden), "down": shape(groups, hidden, width)}
    args = w, shape(rows, width), jax.ShapeDtypeStruct((groups,), jnp.int32)
    plan = jaxplan.make_plan(jax.grad(loss), *args, mesh=mesh_of(mesh), machine=SCRIPT["busy_machine"]())
    assert 1 / WORST <= plan.peak_bytes / SCRIPT["compiled_bytes"](plan, args) <= WORST


@pytest.mark.parametrize("remat", [False, True])
def test_outside_of_loops_rematerialisation_saves_what_the_installed_compiler_lets_it(remat):
    """Older ones compute again at once, and keep it (`_jax.REMAT_WAITS`); as the model says."""

    def layer(w, x):
        return jnp.tanh(jnp.sin(x @ w) @ w)

    def loss(ws, x):
        for w in ws:
            x = (jax.checkpoint(layer) if remat else layer)(w, x)
        return jnp.sum(x)

    args = [shape(64, 64)] * 6, shape(4096, 64)
    plan = jaxplan.make_plan(jax.grad(loss), *args, mesh=mesh_of((1,)), machine="cpu")
    found = jax.jit(jax.grad(loss)).lower(*args).compile().memory_analysis()
    assert plan.memory.temporaries == pytest.approx(found.temp_size_in_bytes, rel=0.15)


def test_donated_state_needs_no_second_buffer():
    def step(w, x):
        return w - 0.1 * (x.T @ (x @ w))

    mesh, args = AbstractMesh((1,), ("x",)), (shape(256, 256), shape(64, 256))
    kept = jaxplan.make_plan(step, *args, mesh=mesh, machine="v4")
    donated = jaxplan.make_plan(step, *args, mesh=mesh, machine="v4", donate_argnums=0)
    assert kept.memory.arguments == donated.memory.arguments == 4 * (256 * 256 + 64 * 256)
    assert (kept.memory.outputs, donated.memory.outputs) == (4 * 256 * 256, 0)
    assert kept.memory.peak == kept.memory.arguments + kept.memory.outputs + kept.memory.temporaries == kept.peak_bytes


def test_temporaries_live_in_outputs_that_are_not_yet_written():
    output, early, late = Buffer(0, OUTPUT, 100.0, 5, 9), Buffer(1, "activation", 80.0, 0, 4), Buffer(2, "activation", 80.0, 4, 6)
    large = Buffer(3, "activation", 120.0, 0, 2)
    assert outside_outputs([output, early, late, large]) == [large, late]


def test_a_deeper_model_holds_more_for_the_backward_pass():
    def loss(ws, x):
        for w in ws:
            x = jnp.tanh(x @ w)
        return jnp.sum(x)

    for depth in (2, 4, 8):
        args = [shape(64, 64)] * depth, shape(4096, 64)
        plan = jaxplan.make_plan(jax.grad(loss), *args, mesh=mesh_of((1,)), machine="cpu")
        assert round(plan.memory.temporaries / (4 * 4096 * 64)) == depth + 1


def test_a_machine_says_what_its_compiler_does():
    assert PRESETS["cpu"].materialises and not PRESETS["v5e"].materialises
    assert replace(PRESETS["v5e"], materialises=True) != PRESETS["v5e"]


@pytest.mark.parametrize("machine", ["cpu", "v5e"])
@pytest.mark.parametrize("name", sorted(programs()))
def test_the_symbolic_peak_is_the_peak(name, machine):
    program = programs()[name]
    plan = jaxplan.make_plan(program.fn, *program.args, mesh=AbstractMesh((4, 2), ("x", "y")), machine=machine)
    assert float(plan.peak.subs(plan.symbol_values)) == pytest.approx(plan.peak_bytes, rel=1e-9)


def test_a_peak_in_closed_form():
    asked = {"mesh": AbstractMesh((4,), ("x",)), "dims": {"w": "K N", "x": "B K"}, "pins": {"x": P("x")}}
    plan = jaxplan.make_plan(lambda w, x: x @ w, shape(256, 128), shape(512, 256), machine="v5e", **asked)
    b, k, n, n_x = sympy.symbols("B K N n_x", positive=True)
    assert sympy.expand(plan.peak - (4 * k * n + 4 * b * k / n_x + 4 * b * n / n_x)) == 0


def test_a_stack_that_a_loop_slices_is_gathered_whole_or_round_by_round_and_the_peak_says_which():
    """Gathered before the loop a stack is there whole, however it is sharded; only gathering in every round makes room."""

    def step(w, x):
        def loss(w):
            return jnp.mean(jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, w)[0] ** 2)

        return w - 0.1 * jax.grad(loss)(w)

    roomy = jaxplan.make_plan(step, shape(8, 64, 64), shape(128, 64), mesh=mesh_of((8,)), donate_argnums=0)
    for budget in (0.9, 0.75):
        plan = roomy.replan(memory_budget=int(budget * roomy.peak_bytes))
        assert 1 / WORST <= plan.peak_bytes / plan.audit().compiled_peak_bytes <= WORST


@pytest.mark.parametrize("mesh", [(1,), (2, 4)])
@pytest.mark.parametrize("draw", [jax.random.normal, jax.random.gumbel, lambda key, shape: jax.random.bernoulli(key, 0.5, shape)])
def test_random_numbers_are_made_in_rounds_that_are_stored(mesh, draw):
    """Four words per element, whatever becomes of them."""

    def fn(key, x):
        drawn = draw(key, x.shape)
        return jnp.where(drawn if drawn.dtype == bool else drawn > 0, x, jnp.float32(0))

    args = jax.random.key(0), jnp.ones((256, 64), jnp.float32)
    plan = jaxplan.make_plan(fn, *args, mesh=mesh_of(mesh), machine=SCRIPT["busy_machine"](), pipeline=None)
    assert plan.peak_bytes == pytest.approx(SCRIPT["compiled_bytes"](plan, args), rel=0.05)


@pytest.mark.parametrize("mesh", [(1,), (8,)])
def test_equations_that_nothing_comes_of_hold_nothing(mesh):
    """The tangent that goes with a square, of which only the nearest is asked for, would keep all distances."""

    def fn(codes, x):
        def loss(codes):
            nearest = ((x[:, None] - codes[None]) ** 2).sum(-1).argmin(-1)
            return jnp.mean((x - codes[nearest]) ** 2)

        value, grad = jax.value_and_grad(loss)(codes)
        return codes - grad, value

    plan = jaxplan.make_plan(fn, shape(128, 64), shape(1024, 64), mesh=mesh_of(mesh), machine="cpu")
    assert not any(op.name == "mul" and plan.modelled.graph.tensors[op.results[0]].shape == (1024, 128, 64)
                   for op in plan.modelled.graph.operators)  # fmt: skip
    found = plan.audit()
    assert 1 / WORST <= plan.peak_bytes / found.compiled_peak_bytes <= WORST


@pytest.mark.parametrize("mesh", [(1,), (4, 2)])
def test_what_is_moved_out_of_a_loop_is_stored_as_long_as_it(mesh):
    """Twice the points is the same in every round; their transposed copy is no value of its own."""

    def clusters(x, centres):
        def turn(_, centres):
            far = (x**2).sum(1, keepdims=True) - (2 * x) @ centres.T + (centres**2).sum(1)[None]
            near = jax.nn.softmax(-far, axis=1)
            return near.T @ x / near.sum(0)[:, None]

        return jax.lax.fori_loop(0, 5, turn, centres)

    plan = jaxplan.make_plan(clusters, shape(8192, 64), shape(16, 64), mesh=mesh_of(mesh), machine="cpu")
    found = plan.audit()
    assert 1 / WORST <= plan.peak_bytes / found.compiled_peak_bytes <= WORST
    alike = [b for b in plan.memory.live if plan.modelled.graph.tensors[b.tensor].shape == (8192, 64)]
    assert alike, "twice the points is there at the worst moment"


ROWS_AND_KERNELS = r"= f32\[4,8,8,6\]", r"= f32\[(6,3,3|3,3,6),10\]"


def test_convolutions_wait_for_copies_of_what_they_read():
    """XLA's CPU compiler runs the gradient of the rows before that of the kernel, which needs the incoming gradient in another
    order of dimensions: copies of the rows and of the kernel can be made from the start, this one cannot."""

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def gradients(x, kernel, g):
        return jax.vjp(conv, x, kernel)[1](jnp.tanh(g))

    x, kernel = jax.ShapeDtypeStruct((4, 8, 8, 6), jnp.float32), jax.ShapeDtypeStruct((3, 3, 6, 10), jnp.float32)
    graph = build_graph(trace(gradients, (x, kernel, jax.ShapeDtypeStruct((4, 8, 8, 10), jnp.float32)), {}))
    products = [i for i in run_order(graph, True).sequence if graph.operators[i].rule.spatial]
    made = [graph.tensors[graph.operators[i].results[0]].shape for i in products]
    assert made[-2:] == [(4, 8, 8, 6), (3, 3, 6, 10)]
    text = jax.jit(gradients).lower(x, kernel, jax.ShapeDtypeStruct((4, 8, 8, 10), jnp.float32)).compile().as_text()
    lines = [line for line in text[text.index("ENTRY") :].splitlines()[1:] if " parameter(" not in line]
    rows, kernels = (next(k for k, line in enumerate(lines) if re.search(sizes, line)) for sizes in ROWS_AND_KERNELS)
    assert rows < kernels


def test_a_copy_that_kernels_read_later_lives_as_long():
    """A product reads what was gathered before it was transposed, and so does the one for its gradient: the copy stays from the
    one to the other. It was modelled to go with the transposition, 36% too small."""

    def gradient(w, scores, values):
        def loss(w):
            mixed = jnp.einsum("bhtu,buhd->bthd", scores, values).reshape(8, 64, 256)
            return jnp.sum(jnp.tanh(mixed @ w))

        return jax.grad(loss)(w)

    args = shape(256, 1024), shape(8, 4, 64, 64), shape(8, 64, 4, 64)
    pins = {"scores": P("x"), "values": P("x"), "w": P(None, "x")}
    options = {"mesh": mesh_of((8,)), "machine": SCRIPT["busy_machine"](), "pipeline": None, "memory_budget": 1e9}
    plan = jaxplan.make_plan(gradient, *args, pins=pins, **options)
    graph, whole = plan.modelled.graph, plan.choices.copy()
    made = {op.results[0]: op.name for op in graph.operators}
    first = next(i for i, cluster in enumerate(graph.clusters) if any(made[w.tensor] == "transpose" for w in cluster.writes))
    assert [made[w.tensor] for cluster in graph.clusters[first : first + 2] for w in cluster.writes] == ["transpose", "reshape"]
    whole[first : first + 2] = 0  # the attention's result is gathered before it is transposed
    plan = replace(plan, choices=whole)
    assert plan.peak_bytes == pytest.approx(SCRIPT["compiled_bytes"](plan, args), rel=0.02)


@pytest.mark.parametrize("mesh", [(1,), (4, 2)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_of_narrow_numbers_are_computed_in_wider_ones(mesh, dtype):
    """XLA for CPU stores what products read and make as float32. The peak was half of what it takes."""

    def loss(ws, x):
        for w in ws:
            x = jnp.tanh(x @ w)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    args = [jax.ShapeDtypeStruct((64, 64), dtype)] * 4, jax.ShapeDtypeStruct((2048, 64), dtype)
    plan = jaxplan.make_plan(jax.grad(loss), *args, mesh=mesh_of(mesh), machine=SCRIPT["busy_machine"]())
    assert plan.peak_bytes == pytest.approx(SCRIPT["compiled_bytes"](plan, args), rel=0.1)


def test_the_largest_buffers_are_placed_first_and_the_heap_may_be_higher_than_what_lives():
    """4 lies on 5. Then 3 comes, beside another 4 that lies at the bottom: the gap of 1 between the two is too small. The last
    one finds room."""
    spans = [(0, 0, 5), (0, 1, 4), (1, 2, 3), (2, 2, 4), (2, 2, 2)]  # first place, last place, bytes
    assert stack_by_size(spans) == [0, 1, 2]
    assert max(sum(size for first, last, size in spans if first <= at <= last) for at in range(3)) == 9
    assert stack_by_size([(0, 2, 4), (2, 4, 4), (4, 6, 4), (0, 6, 2)]) == [0, 1, 3]
    assert stack_by_size([]) == [] == stack_by_size([(0, 3, 0)])


@pytest.mark.parametrize("mesh", [(1,), (4, 2)])
def test_attention_in_bfloat16(mesh):
    """With jaxlib 0.12 its library multiplies most of it as it is. The model had that as float32: 20% and 35% too large, now 5%
    and 2%."""

    def loss(layers, x):
        for wide, out in layers:
            q, k, v = jnp.split((x @ wide).reshape(16, 64, 4, 48), 3, -1)
            scores = jax.nn.softmax(jnp.einsum("bthd,buhd->bhtu", q, k).astype(jnp.float32)).astype(x.dtype)
            x = x + jnp.einsum("bhtu,buhd->bthd", scores, v).reshape(16, 64, 64) @ out
        return jnp.sum(x.astype(jnp.float32) ** 2)

    wide, out, x = (jax.ShapeDtypeStruct(extents, jnp.bfloat16) for extents in ((64, 192), (64, 64), (16, 64, 64)))
    args = [(wide, out)] * 3, x
    plan = jaxplan.make_plan(jax.grad(loss), *args, mesh=mesh_of(mesh), machine=SCRIPT["busy_machine"](), pipeline=None)
    assert plan.peak_bytes == pytest.approx(SCRIPT["compiled_bytes"](plan, args), rel=0.06)


@pytest.mark.parametrize("mesh", [(1,), (4, 2)])
def test_squares_on_the_way_to_cubes_are_stored_once_where_they_are_rounded(mesh):
    """The gradient of a GELU reads the square that its cube was made of, and with JAX 0.12 what its tanh is and 1. It was 8% and
    9% too small (21% and 15% with JAX 0.12)."""

    def loss(layers, x):
        for up, down in layers:
            x = x + jax.nn.gelu(x @ up) @ down
        return jnp.sum(x.astype(jnp.float32) ** 2)

    up, down, x = (jax.ShapeDtypeStruct(extents, jnp.bfloat16) for extents in ((64, 256), (256, 64), (2048, 64)))
    args = [(up, down)] * 3, x
    plan = jaxplan.make_plan(jax.grad(loss), *args, mesh=mesh_of(mesh), machine=SCRIPT["busy_machine"](), pipeline=None)
    within = 0.125 if jax.__version_info__ >= (0, 12) else 0.065
    assert plan.peak_bytes == pytest.approx(SCRIPT["compiled_bytes"](plan, args), rel=within)


@pytest.mark.xfail(
    jax.__version_info__ >= (0, 12), strict=True, raises=AssertionError,
    reason="the sum is written over one of its terms there: modelled 11% too large",
)  # fmt: skip
def test_what_is_rounded_to_bfloat16_is_computed_once():
    """A sum that two read is stored rounded, and not computed in both of them: all its terms would have to stay."""

    def loss(ws, v, x):
        total = sum([x @ w for w in ws[1:]], x @ ws[0])
        return jnp.sum((jax.nn.relu(total) @ v).astype(jnp.float32) ** 2)

    w = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    args = [w] * 6, w, jax.ShapeDtypeStruct((2048, 64), jnp.bfloat16)
    plan = jaxplan.make_plan(jax.grad(loss), *args, mesh=mesh_of((1,)), machine=SCRIPT["busy_machine"]())
    assert plan.peak_bytes == pytest.approx(SCRIPT["compiled_bytes"](plan, args), rel=0.1)


@pytest.mark.parametrize("mesh", [(1,), (4, 2)])
@pytest.mark.parametrize(("scanned", "within"), [(False, 0.13), (True, 0.02)])
def test_drawn_words_are_stored_until_the_gradient_has_read_them(mesh, scanned, within):
    """Two words per element, from which all readers make the bits; and two more with the elements' numbers beside loops that
    draw. It was 34% to 37% and 13% to 14% too small."""

    def gradient(ws, x, key):
        def layer(x, given):
            w, one = given
            y = jnp.tanh(x @ w)
            return jnp.where(jax.random.bernoulli(one, 0.5, y.shape), y, 0), None

        def loss(ws):
            keys, y = jax.random.split(key, len(ws)), x
            if scanned:
                y, _ = jax.lax.scan(jax.checkpoint(layer), y, (ws, keys))
            else:
                for k in range(len(ws)):
                    y, _ = layer(y, (ws[k], keys[k]))
            return jnp.sum(y**2)

        return jax.grad(loss)(ws)

    args = shape(4, 64, 64), shape(2048, 64), jax.eval_shape(lambda: jax.random.key(0))
    plan = jaxplan.make_plan(gradient, *args, mesh=mesh_of(mesh), machine=SCRIPT["busy_machine"](), pipeline=None)
    assert plan.peak_bytes == pytest.approx(SCRIPT["compiled_bytes"](plan, args), rel=within)


@pytest.mark.parametrize("mesh", [(1,), (4, 2)])
def test_what_is_scattered_into_zeros_and_added_is_scattered_into_the_sum(mesh):
    """The gradient of a loss that picks one logit a row: no zeros, and no second gradient of the logits, are stored. It was
    modelled 45% and 37% too large."""

    def loss(w, x, rows):
        logits = x @ w
        picked = jnp.take_along_axis(logits, rows[:, None], axis=1)
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked[:, 0])

    args = shape(64, 512), shape(2048, 64), jax.ShapeDtypeStruct((2048,), jnp.int32)
    plan = jaxplan.make_plan(jax.grad(loss), *args, mesh=mesh_of(mesh), machine=SCRIPT["busy_machine"](), pipeline=None)
    assert plan.peak_bytes == pytest.approx(SCRIPT["compiled_bytes"](plan, args), rel=0.02)


@pytest.mark.parametrize("mesh", [(1,), (4, 2)])
def test_words_that_a_rematerialised_layer_draws_are_made_once_their_keys_are_there(mesh):
    """The loop that draws is a kernel of its own: it waits for nothing that is computed from the bits. The words were modelled
    to be made where they are read, beside the gradient: 24% too small, and 36% with twice as many layers."""

    def layer(w, one, x):
        y = jnp.tanh(x @ w)
        return jnp.where(jax.random.bernoulli(one, 0.5, y.shape), y, 0)

    def loss(ws, x, key):
        for w, one in zip(ws, jax.random.split(key, len(ws)), strict=True):
            x = jax.checkpoint(layer)(w, one, x)
        return jnp.mean(x**2)

    args = [shape(64, 64)] * 4, shape(2048, 64), jax.eval_shape(lambda: jax.random.key(0))
    plan = jaxplan.make_plan(jax.grad(loss), *args, mesh=mesh_of(mesh), machine=SCRIPT["busy_machine"](), pipeline=None)
    assert plan.peak_bytes == pytest.approx(SCRIPT["compiled_bytes"](plan, args), rel=0.06)


def dropout_layers(params, x, key):
    def layer(h, given):
        (up, down), key = given
        kept = jax.random.bernoulli(key, 0.9, (*h.shape[:-1], up.shape[-1]))
        return h + jnp.where(kept, jnp.tanh(h @ up), 0.0) @ down, None

    def loss(params):
        return (jax.lax.scan(layer, x, (params, jax.random.split(key, 4)))[0] ** 2).mean()

    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))


@pytest.mark.parametrize(
    ("generator", "options"),
    [("rbg", {"pipeline": None})]
    + [(generator, {"pipeline": "y", "microbatches": 4}) for generator in ("rbg", "threefry2x32")],
)
def test_what_is_drawn_whole_is_stored_whole(generator, options):
    """XLA's own generator makes all numbers on every device; and every micro-batch draws those of the whole batch."""
    params, key = (jnp.ones((4, 32, 256)) / 99, jnp.ones((4, 256, 32)) / 99), jax.random.key(0, impl=generator)
    args = params, jnp.ones((32, 16, 32)), key
    plan = jaxplan.make_plan(dropout_layers, *args, mesh=mesh_of((4, 2)), machine=SCRIPT["busy_machine"](), **options)
    assert float(plan.peak_bytes) == pytest.approx(SCRIPT["compiled_bytes"](plan, args), rel=0.06)


@pytest.mark.xfail(
    jax.__version_info__ >= (0, 12), strict=True, raises=AssertionError,
    reason="modelled 12% too large there",
)  # fmt: skip
def test_what_two_loops_are_given_in_another_layout_stays_between_them():
    """Weights that are gathered for a loop are there until its gradient's loop is through, and where the loss is computed between
    them. They were modelled to be gathered twice, and that moment was a tenth too small."""

    def gradient(w, v, x):
        def loss(w):
            def round_of(h, row):
                h = jnp.tanh(row + h @ w)
                return h, h

            _, ys = jax.lax.scan(round_of, jnp.zeros((64, 256)), x)
            return jnp.sum(jnp.tanh(ys @ v))

        return jax.grad(loss)(w)

    args, pins = (shape(256, 256), shape(256, 1024), shape(8, 64, 256)), {"w": P("x"), "v": P(), "x": P(None, "x")}
    options = {"mesh": mesh_of((8,)), "machine": SCRIPT["busy_machine"](), "pipeline": None, "memory_budget": 1e9}
    plan = jaxplan.make_plan(gradient, *args, pins=pins, **options)
    graph, whole = plan.modelled.graph, plan.choices.copy()
    enters = {op.results[0] for op in graph.operators if op.name == BOUNDARY and op.path[-2] == "in" and op.operands[0] == 0}
    given = [i for i, cluster in enumerate(graph.clusters) if any(write.tensor in enters for write in cluster.writes)]
    assert len(given) == 2
    whole[given] = 0  # both loops are given all of the weights, for products of a part of the rows each
    for i, cluster in enumerate(graph.clusters):
        if any(graph.operators[m].rule.product and enters & {*graph.operators[m].operands} for m in cluster.members):
            whole[i] = [option.factor for option in plan.modelled.options[i][0]].index(0)
    plan = replace(plan, choices=whole)
    assert plan.peak_bytes == pytest.approx(SCRIPT["compiled_bytes"](plan, args), rel=0.05)


def gradient_steps(momentum: bool):
    """(a step of gradient descent on eight layers, its arguments)."""

    def loss(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return (x**2).mean()

    def step(params, old, x):
        grads = jax.grad(loss)(params, x)
        new = [0.9 * m + g for m, g in zip(old, grads, strict=True)] if momentum else old
        return [p - 0.1 * g for p, g in zip(params, new if momentum else grads, strict=True)], new

    weights = [shape(64, 64)] * 8
    return step, (weights, weights if momentum else [], shape(64, 64))


@pytest.mark.parametrize("momentum", [False, True])
def test_gradients_that_are_combined_at_once_are_all_there_in_parts(momentum):
    """XLA combines them in one exchange, and nothing is updated before it. Modelled one by one, the peak was 0.72 of what is
    compiled."""
    step, args = gradient_steps(momentum)
    pins = {"params": P(), "x": P("x"), **({"old": P()} if momentum else {})}
    plan = jaxplan.make_plan(step, *args, mesh=mesh_of((8,)), machine=SCRIPT["busy_machine"](), pins=pins)
    assert len(facts_of(plan.modelled, plan.choices, {}).combined) == 8
    assert float(plan.peak_bytes) == pytest.approx(SCRIPT["compiled_bytes"](plan, args), rel=0.1)


def test_sums_are_combined_together_unless_one_needs_the_other():
    """As many exchanges of several sums as the compiler makes of them, each of as many."""

    def sums(a, b, x, y):
        first, second = a @ x, b @ y  # together
        third, fourth = jnp.tanh(first) @ x[:64], jnp.tanh(second) @ y[:64]  # these need the first two
        return first.sum() * second + third.max() * fourth

    args = shape(64, 128), shape(64, 128), shape(128, 64), shape(128, 64)
    pins = {"a": P(None, "x"), "b": P(None, "x"), "x": P("x"), "y": P("x")}
    plan = jaxplan.make_plan(sums, *args, mesh=mesh_of((8,)), machine=SCRIPT["busy_machine"](), pins=pins)
    facts = facts_of(plan.modelled, plan.choices, {})
    groups: dict[int, int] = {}
    for place in facts.combined.values():
        groups[place] = groups.get(place, 0) + 1
    lines = [line for line in plan.jit().lower(*args).compile().as_text().splitlines() if " all-reduce(" in line]
    compiled = [len(re.findall(r"f32\[", line.split(" all-reduce(")[0])) for line in lines]
    assert sorted(n for n in compiled if n > 1) == sorted(groups.values()) and len(groups) > 0


@pytest.mark.parametrize("machine", ["v4", "v5e", "h100", "cpu"])
@pytest.mark.parametrize("shape", [(8,), (2, 2, 2)])
def test_no_peak_is_above_what_is_ever_stored(shape, machine):
    mesh = AbstractMesh(shape, tuple("xyz"[: len(shape)]))
    for program in programs().values():
        plan = jaxplan.make_plan(program.fn, *program.args, mesh=mesh, machine=machine, memory_budget=float("inf"), pipeline=None)
        most = ceiling(plan.modelled, plan.choices, plan.layouts, plan.input_layouts, plan.output_layouts)
        assert plan.peak_bytes <= most < float("inf"), program.name
        for nbytes in (0.9 * plan.peak_bytes, plan.peak_bytes, 0.99 * most, most):
            assert replace(plan).fits(nbytes) == (plan.peak_bytes <= nbytes)
