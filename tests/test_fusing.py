"""What compilers that fuse keep in memory: by hand-worked cases, each a rule seen in the TPU compiler's scheduled programs."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec as P

import jaxplan
from jaxplan.cost.fusing import stored
from jaxplan.cost.heap import stack_in_order
from jaxplan.cost.schedule import run_order
from jaxplan.cost.tiles import local_shape, padding
from jaxplan.machine import PRESETS, Machine

ONE = AbstractMesh((1,), ("x",))
FAR = replace(PRESETS["v5e"], name="nothing on the chip", near_bytes=0.0)
ROWS, WIDTH = 1024, 512
SIZE = 4.0 * ROWS * WIDTH


def shape(*extents, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(extents, dtype)


def planned(fn, *args, machine: Machine = FAR, **options):
    return jaxplan.make_plan(fn, *args, mesh=ONE, machine=machine, **options)


def temporaries(fn, *args, **options) -> float:
    """In units of (ROWS, WIDTH) float32."""
    return planned(fn, *args, **options).memory.temporaries / SIZE


def high(a, b):
    """A product that rounds nothing."""
    return jnp.dot(a, b, precision="highest")


W, X = shape(WIDTH, WIDTH), shape(ROWS, WIDTH)


def test_element_wise_values_of_one_large_one_are_computed_where_they_are_read():
    """Only the first product is stored, however much is computed of it for the second and the third."""

    def fn(w, x):
        hidden = jnp.tanh(high(x, w))
        return high(jnp.sin(hidden) * hidden, w), high(jnp.cos(hidden), w)

    assert temporaries(fn, W, X) == 1


def test_what_comes_from_two_large_ones_is_stored_where_a_product_ends_in_it():
    """x + (x w): one buffer, of which the product is never stored apart; read three times, so stored."""

    def fn(w, x):
        stream = x + high(x, w)
        return high(jnp.sin(stream), w), high(jnp.cos(stream), w), high(stream, w)

    plan = planned(fn, W, X)
    assert plan.memory.temporaries == SIZE
    (live,) = plan.memory.live[:1]
    made = next(op for op in plan.modelled.graph.operators if live.tensor in op.results)
    assert made.name == "add"


def test_what_only_products_of_default_precision_read_is_stored_rounded():
    def twice(dot):
        def step(w, x):
            stream = x + high(x, w)
            return dot(stream, w), dot(w, stream.T)

        return step

    assert temporaries(twice(jnp.dot), W, X) == 0.5
    assert temporaries(twice(high), W, X) == 1
    bf16 = shape(WIDTH, WIDTH, dtype=jnp.bfloat16), shape(ROWS, WIDTH, dtype=jnp.bfloat16)
    assert temporaries(twice(jnp.dot), *bf16) == 0.5, "bfloat16 has nothing to round"
    assert temporaries(twice(jnp.dot), W, X, machine=replace(FAR, matmul_reads={})) == 1


def test_weights_that_a_loop_only_multiplies_by_are_rounded_whole_before_it():
    def fn(stack, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    stack = shape(6, WIDTH, WIDTH)
    live = planned(fn, stack, X).memory.live
    assert 6 * WIDTH * WIDTH * 2 in [buffer.nbytes for buffer in live]
    assert 6 * WIDTH * WIDTH * 2 not in [buffer.nbytes for buffer in planned(fn, stack, X, machine=PRESETS["h100"]).memory.live]


def test_state_that_a_loop_reads_while_it_stacks_the_new_one_needs_both():
    def fn(stack, x):
        def body(x, w):
            return x + jnp.sum(w), w * 2.0

        return jax.lax.scan(body, x, stack)[::-1]

    plan = planned(fn, shape(6, ROWS, WIDTH), shape(), donate_argnums=0)
    assert plan.memory.outputs < SIZE and plan.memory.temporaries == pytest.approx(6 * SIZE, rel=0.01)


def test_state_that_meets_a_transposed_gradient_is_transposed_and_the_new_one_takes_the_place_of_the_copy():
    def step(w, x):
        return w - 0.1 * jax.grad(lambda w: jnp.sum(high(x, w) ** 2))(w), jnp.float32(0)

    w = shape(8 * WIDTH, 2 * WIDTH)
    size = 4.0 * 16 * WIDTH * WIDTH

    def large(room):
        machine = replace(FAR, near_bytes=room * size)
        found = planned(step, w, shape(WIDTH, 8 * WIDTH), donate_argnums=0, machine=machine).memory
        return [b.nbytes for b in found.live if b.nbytes >= size]

    assert large(0) == [size], "one, whether it is the copy or what replaces it"
    assert large(1.5) == [size], "one of them finds room on the chip"
    assert large(3) == [], "both do"


def test_a_carry_is_updated_in_place_unless_neighbours_are_read():
    def loop(step):
        return lambda x: jax.lax.fori_loop(0, 5, lambda _, x: step(x), x)

    def shifted(x):
        wide = jnp.pad(x, ((1, 1), (0, 0)))
        return wide[:-2] + wide[2:]

    assert temporaries(loop(lambda x: jnp.sin(x) + x), X, donate_argnums=0) == 0
    assert temporaries(loop(shifted), X, donate_argnums=0) == 1


def test_picking_one_element_a_row_and_its_gradient_store_nothing():
    def loss(w, x, labels):
        logits = high(x, w)
        picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked)

    plan = planned(jax.grad(loss), W, X, shape(ROWS, dtype=jnp.int32))
    assert [buffer.nbytes for buffer in plan.memory.live if buffer.nbytes >= SIZE] == [SIZE]


def test_short_lived_values_stay_on_the_chip_while_there_is_room():
    def fn(w, x):
        hidden = high(x, w)
        return high(jnp.sin(hidden), w), high(jnp.cos(hidden), w)

    for near, held in ((0.0, 1), (SIZE / 2, 1), (SIZE, 0)):
        assert temporaries(fn, W, X, machine=replace(FAR, near_bytes=near)) == held


def products(graph):
    return [place for place, operator in enumerate(graph.operators) if operator.rule.product]


def test_the_first_products_that_nothing_waits_for_run_last_as_far_as_they_hide_behind_an_exchange():
    def fn(w, x):
        one, other = high(x.T, x), high(x.T, jnp.sin(x))
        return high(high(x, w), w), one * 2.0, other * 3.0

    graph = planned(fn, W, X).modelled.graph
    first, second, third, last = products(graph)
    (one,), (other,), (needed,) = (graph.operators[place].results for place in (first, second, third))

    def made(**shares):
        found = stored(graph, graph.operators, hidden={first: shares["one"], second: shares["other"], third: 0.1}).made
        return found.get(one, first), found.get(other, second)

    assert made(one=0.5, other=0.4) == (last + 1, last + 1)
    assert made(one=0.5, other=0.6) == (last + 1, second), "both together take longer than the exchange"
    assert needed not in stored(graph, graph.operators, hidden={third: 0.1}).made, "the last product needs it"


def test_partial_sums_that_are_scattered_wait_beside_the_products_that_do_not_need_them():
    def fn(w, x):
        one = high(x.T, x)
        again = high(high(x, w), w)
        return again, high(one, one)

    graph = planned(fn, W, X).modelled.graph
    first, second, third, last = products(graph)
    (one,), (two,) = (graph.operators[place].results for place in (first, second))
    beside = stored(graph, graph.operators).beside
    assert beside[one] == third and two not in beside and len(beside) == 2
    assert beside[graph.operators[third].results[0]] == last

    def looped(w, x):
        return jax.lax.scan(lambda x, w: (x + high(x, w), high(x.T, x)), x, w)[1], high(x.T, x)

    graph = planned(looped, shape(3, WIDTH, WIDTH), X).modelled.graph
    inner, gradient, _ = products(graph)
    order = run_order(graph, False)
    loops = [(order.begins[loop], order.ends[loop]) for loop in order.begins if loop]
    beside = stored(graph, graph.operators, loops=loops).beside
    assert beside == {graph.operators[inner].results[0]: gradient}, "within one round"


# --- the heap ----------------------------------------------------------------------------------------------------------------


def height(spans):
    return sum(spans[number][2] for number in stack_in_order(spans))


def test_what_is_free_again_may_be_too_small_for_what_comes():
    assert height([]) == 0 and height([(0, 3, 5), (1, 2, 7)]) == 12
    assert height([(0, 1, 5), (2, 3, 5)]) == 5, "one after the other"
    assert height([(0, 1, 5), (1, 2, 5)]) == 10, "one is read where the other is made"
    assert height([(0, 1, 4), (0, 9, 3), (2, 3, 5)]) == 12, "nothing is moved: the four below stay a gap"
    assert height([(0, 9, 4), (0, 1, 3), (2, 3, 5)]) == 9, "the highest free place grows"
    assert stack_in_order([(0, 1, 6), (0, 9, 1), (2, 9, 2), (3, 9, 5)]) == [0, 1, 3]


def test_the_heap_of_a_compiled_training_step():
    """An MLP of widths 8192, 24576, 24576, 8192 at batch 4096 on v5e:4x4, its large buffers as scheduled, in MiB: what lives at
    once is 405.25, and `temp_size_in_bytes` of the compiled program 501.81."""
    scheduled = [
        (11, 112, 24), (14, 122, 48), (15, 17, 96), (30, 70, 29.25), (34, 91, 48), (41, 91, 16), (42, 44, 96), (51, 120, 48),
        (57, 93, 48), (60, 123, 144), (109, 112, 96),
    ]  # fmt: skip
    spans = [(first, last, int(mib * 2**20)) for first, last, mib in scheduled]
    assert height(spans) == 501.25 * 2**20
    at_once = [sum(size for first, last, size in spans if first <= place <= last) for place in range(124)]
    assert max(at_once) == 405.25 * 2**20


def test_a_machine_that_places_in_order_holds_what_its_heap_stands_on():
    def fn(w, x):
        low = jnp.tanh(high(x, w))
        return high(high(jnp.sin(low), w), high(w, w)), low.sum()

    loose = planned(fn, W, X, machine=replace(FAR, in_order=False)).memory
    tight = planned(fn, W, X).memory
    assert tight.temporaries >= loose.temporaries > 0
    for held in (loose, tight):
        assert sum(buffer.nbytes for buffer in held.live) == pytest.approx(held.temporaries)


# --- tiles -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extents", "factor"),
    [
        ((), 1.0), ((1,), 1.0), ((128,), 1.0), ((100,), 1.28), ((8, 128), 1.0), ((128, 8), 1.0), ((3, 128), 4 / 3),
        ((12, 1024, 16, 64), 1.0), ((7, 100), 1.28 * 8 / 7), ((10, 130), min(16 / 10 * 256 / 130, 128 / 10 * 136 / 130)),
    ],
)  # fmt: skip
def test_dimensions_are_laid_into_tiles_as_wastes_least(extents, factor):
    assert padding(extents, (8, 128)) == pytest.approx(factor)


def test_space_is_never_innermost():
    """Of 32 images of 112 x 112 with 64 channels, channels fill half of the columns; of 3 channels, the images a quarter."""
    assert padding((32, 112, 112, 64), (8, 128), (1, 2)) == 2
    assert padding((32, 112, 112, 3), (8, 128), (1, 2)) == pytest.approx(4 * 4 / 3)
    assert padding((32, 112, 112, 64), (8, 128)) == pytest.approx(128 / 112)


def test_a_part_is_as_large_as_the_largest_part():
    assert local_shape((10, 64), (0, 1), (4, 2)) == (3, 32) and local_shape((10, 64), None, (4, 2)) == (10, 64)


def test_padding_is_in_the_peak_and_in_its_closed_form():
    plan = planned(lambda x: x * 2.0, shape(1000, 130), machine=PRESETS["v5e"])
    assert plan.memory.arguments == 1024 * 136 * 4
    assert float(plan.peak.subs(plan.symbol_values)) == pytest.approx(plan.peak_bytes, rel=1e-9)


# --- bytes sent --------------------------------------------------------------------------------------------------------------


def gathered(fn, machine="v5e"):
    """Bytes that are sent to gather x, whose rows are cut, for what needs it whole; and how it is sent."""
    mesh = AbstractMesh((4,), ("x",))
    pins = {"x": P("x"), "w": P(None, "x")}
    asked = {"mesh": mesh, "machine": machine, "pins": pins, "memory_budget": "1TiB"}
    plan = jaxplan.make_plan(fn, shape(WIDTH, 16 * WIDTH), X, **asked)
    (exchange,) = [e for e in plan.exchanges if e.kind == "all_gather"]
    return exchange.total_bytes / (0.75 * SIZE), exchange.dtype, plan


@pytest.mark.parametrize(
    ("fn", "share", "dtype"),
    [
        (lambda w, x: jnp.sin(x @ w), 0.5, "bfloat16"),
        (lambda w, x: jnp.sin(x.T.T @ w), 0.5, "bfloat16"),
        (lambda w, x: jnp.sin(high(x, w)), 1.0, "float32"),
    ],
)
def test_what_only_products_read_is_rounded_before_it_is_sent(fn, share, dtype):
    assert gathered(fn)[:2] == (share, dtype)
    assert gathered(fn, machine="h100")[:2] == (1.0, "float32"), "a machine that reads all bits"


def test_simulated_devices_are_told_what_they_send():
    sent, _, plan = gathered(lambda w, x: jnp.sin(x @ w))
    (whole,) = [e for e in plan.exchanges_of(rounded=False) if e.kind == "all_gather"]
    assert (sent, whole.total_bytes / (0.75 * SIZE), whole.dtype) == (0.5, 1.0, "float32")
    assert plan.bytes_by_axis(plan.exchanges) == plan.wire_bytes


def multiply(w, x):
    return jnp.sin(x @ w)


def test_a_machine_that_simulated_devices_stand_for_sends_what_they_send(tmp_path):
    """Priced, predicted and compiled alike; memory, and a slice of the real thing, are the machine's."""
    w, x = shape(512, 512), shape(512, 512)
    devices = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("x",))
    told = {"machine": "v5e", "pins": {"w": P("x", None), "x": P("x", None)}}
    real = jaxplan.make_plan(multiply, w, x, mesh=AbstractMesh((4,), ("x",)), **told)
    stand_in = jaxplan.make_plan(multiply, w, x, mesh=devices, **told)
    assert stand_in.wire_bytes["x"] == 2 * real.wire_bytes["x"] > 0 and stand_in.peak_bytes == real.peak_bytes
    assert stand_in.seconds > real.seconds
    found = stand_in.audit()
    assert found.compiled == found.predicted
    assert stand_in.replan(mesh=real.mesh).wire_bytes == real.wire_bytes
    stand_in.save(tmp_path / "plan.json")
    assert jaxplan.load_plan(tmp_path / "plan.json", multiply, w, x, mesh=devices).wire_bytes == stand_in.wire_bytes


def test_a_product_with_a_vector_rounds_nothing():
    plan = jaxplan.make_plan(
        lambda m, v: jax.lax.fori_loop(0, 3, lambda _, v: m @ v, v), shape(512, 512), shape(512), mesh=ONE, machine=FAR
    )
    assert plan.memory.temporaries < 4096 * 4


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"matmul_reads": {"bfloat16": "float32"}}, "no wider"),
        ({"matmul_reads": {"float32": "nonsense"}}, "'nonsense' is no dtype"),
        ({"tile": (0, 128)}, "two counts"), ({"near_bytes": -1.0}, "near_bytes"),
    ],
)  # fmt: skip
def test_what_a_machine_cannot_be(changed, told):
    with pytest.raises(ValueError, match=told):
        replace(PRESETS["v5e"], **changed)


def test_a_first_product_of_which_half_hides_is_put_off_and_one_that_takes_longer_is_not():
    def fn(w, x):
        one = high(x.T, x)
        return high(high(x, w), w), one * 2.0

    graph = planned(fn, W, X).modelled.graph
    first, *_, last = products(graph)
    (one,) = graph.operators[first].results
    for share, place in ((1.9, last + 1), (2.1, first)):
        assert stored(graph, graph.operators, hidden={first: share}).made.get(one, first) == place


def test_short_products_wait_one_beside_each_gather_of_a_group_that_is_summed_before_theirs():
    def fn(w, x):
        grads = [high(x.T, step(x)).T for step in (jnp.sin, jnp.cos, jnp.tanh)]
        return high(high(x, w), w), [jnp.exp(grad) for grad in grads], [grad + 1.0 for grad in grads]

    graph = planned(fn, W, X).modelled.graph
    *places, last = products(graph)
    grads = places[:3]

    def waiting(share, gathers, groups):
        made = stored(graph, graph.operators, hidden=dict.fromkeys(grads, share), gathers=gathers, groups=groups).made
        return [made.get(graph.operators[place].results[0], place) == last + 1 for place in grads]

    assert waiting(0.2, gathers=4, groups=1) == [False, False, False], "all are summed at once"
    assert waiting(0.2, gathers=4, groups=2) == [True, True, False]
    assert waiting(0.2, gathers=4, groups=4) == [True, True, True]
    assert waiting(0.3, gathers=4, groups=4) == [False, False, False], "longer than a gather"


def test_a_new_value_waits_for_products_that_still_read_the_old_one_and_make_more():
    """Both products read `w`; the one whose result becomes the new `w` comes first. The other makes more, or less."""

    def fn(w, x, y):
        new = w - high(x.T, x)
        return new, jnp.sum(high(y, w) ** 2)

    machine = replace(FAR, near_bytes=0.0)

    def held(rows):
        plan = planned(fn, W, shape(64, 512), shape(rows, 512), machine=machine, donate_argnums=0)
        return [buffer.tensor for buffer in plan.memory.live if buffer.tensor == plan.modelled.graph.outputs[0]]

    assert len(held(4096)) == 1 and not held(64)


def test_batch_dimensions_of_a_product_are_never_innermost():
    """4 x 64 products of 16 x 16: laid out by tiles of 8 x 128 a row of 16 takes 128, whatever the batch."""

    def fn(a, b):
        first = jax.lax.dot_general(a, b, (((2,), (2,)), ((0,), (0,))))
        return jnp.sum(jnp.sin(jnp.cumsum(first, axis=0)))

    machine = replace(FAR, near_bytes=0.0, tile=(8, 128))
    plan = planned(fn, shape(1024, 16, 4), shape(1024, 16, 4), machine=machine)
    largest = max(buffer.nbytes for buffer in plan.memory.live)
    assert largest == 1024 * 16 * 128 * 4


def test_a_sum_that_is_scattered_has_its_part_beside_it():
    """What goes round lies beside the whole, and what stays: where the chip holds the whole alone, it does not hold the sum."""

    def fn(x, w):
        return jnp.tanh(high(x, w)), jnp.float32(0)

    args, mesh = (shape(8 * WIDTH, 8 * WIDTH), shape(8 * WIDTH, 2 * WIDTH)), AbstractMesh((4,), ("x",))
    whole, pins = 4.0 * 16 * WIDTH * WIDTH, {"x": P(None, "x"), "w": P("x")}
    for room, far in ((0.0, 1.5), (1.0, 1.0), (1.25, 0.25), (1.5, 0.0)):
        machine = replace(FAR, near_bytes=room * whole)
        plan = jaxplan.make_plan(fn, *args, mesh=mesh, machine=machine, pins=pins)
        assert [e.kind for e in plan.exchanges] == ["reduce_scatter"]
        assert plan.memory.temporaries == pytest.approx(far * whole, abs=0.01 * whole)
