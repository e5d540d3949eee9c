"""Room `pipeline`: scans over layers run in stages give what they give otherwise, or are refused by name."""

import dataclasses
import re
from xml.etree import ElementTree

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, mesh_of
from jax.sharding import AxisType

import jaxplan
from jaxplan.examples.decoder import SMALL, decoder
from jaxplan.files import PlanFileError, program_for, saved_plan
from jaxplan.files.fingerprint import program_of
from jaxplan.pipeline import (
    Chain,
    Kind,
    Pipeline,
    PipelineError,
    Role,
    even_layers,
    most_held,
    pipeline_of,
    rerolled,
    scans,
    schedule_svg,
    schedule_text,
    timetable,
)
from jaxplan.trace import trace

TINY = dataclasses.replace(SMALL, width=16, heads=2, mlp_width=24, vocabulary=32, sequence=6, batch=8)
CUT, SAME, SUM = Role(Kind.CUT, 0), Role(Kind.SAME), Role(Kind.SUM)


def in_stages(fn, args, shape, axis, microbatches, **options):
    """The plan of a function with its scans laid over the stages of an axis."""
    plan = jaxplan.make_plan(fn, *args, mesh=mesh_of(shape), pipeline=None)
    pipeline = pipeline_of(plan.traced.jaxpr.jaxpr, axis, plan.axis_sizes[axis], microbatches, **options)
    return dataclasses.replace(plan, pipeline=pipeline)


def tower(layers, *, remat=False, dropout=True, width=8, rows=16):
    """A train step whose layers draw random numbers, add to a loss of their own, count, and report a mean over the batch."""

    def loss(weights, x, key):
        def layer(carry, given):
            x, penalty, number = carry
            weight, key = given
            h = jnp.tanh(x @ weight["w"] + weight["b"][None])
            if dropout:
                h = jnp.where(jax.random.bernoulli(key, 0.75, h.shape), h / jnp.float32(0.75), 0.0)
            return (x + h, penalty + jnp.mean(jnp.square(h)), number + 1), jnp.mean(h, axis=0)

        keys = jax.random.split(key, layers)
        start = (x, jnp.float32(0.5), jnp.int32(0))
        (x, penalty, number), means = jax.lax.scan(jax.checkpoint(layer) if remat else layer, start, (weights, keys))
        return jnp.mean(jnp.square(x)) + penalty, (number, means)

    def step(weights, x, key):
        return jax.value_and_grad(loss, has_aux=True)(weights, x, key)

    weights = {
        "w": jax.random.normal(jax.random.key(1), (layers, width, width), jnp.float32) / 2,
        "b": jnp.linspace(-1.0, 1.0, layers * width, dtype=jnp.float32).reshape(layers, width),
    }
    return step, (weights, jax.random.normal(jax.random.key(2), (rows, width), jnp.float32), jax.random.key(3))


# --- what a layer does with the rows of the batch -------------------------------------------------------------------


@pytest.mark.parametrize("remat", [True, False])
def test_the_roles_of_a_decoders_scans(remat):
    program = decoder(dataclasses.replace(TINY, remat=remat))
    jaxpr = jax.make_jaxpr(program.fn)(*program.args).jaxpr
    forward, backward = pipeline_of(jaxpr, "x", 2, 4).chains
    assert (forward.reverse, backward.reverse) == (False, True)
    assert forward.layers == backward.layers == (2, 2) and forward.rows == TINY.batch
    assert forward.carries == backward.carries == (CUT,)
    assert set(forward.xs) == {SAME}, "parameters are the same for every micro-batch"
    assert CUT in forward.ys and CUT in backward.xs, "residuals are the rows' own"
    assert set(backward.ys) == {SUM}, "gradients of parameters add up"


def test_the_roles_of_keys_counters_and_penalties():
    step, args = tower(4)
    forward, backward = pipeline_of(jax.make_jaxpr(step)(*args).jaxpr, "x", 2, 4).chains
    assert [role.kind for role in forward.carries] == [Kind.CUT, Kind.TOTAL, Kind.SAME]
    assert forward.circulating == (0, 2)
    assert CUT in backward.carries and SUM in backward.ys
    assert SAME not in forward.ys, "masks drawn for the whole batch are kept by rows, as the backward scan takes them"
    assert set(forward.ys) - {SUM} <= set(backward.xs)


def refused(body, carry, xs=None, microbatches=2, length=4):
    def fn(carry, xs):
        return jax.lax.scan(body, carry, xs, length=length)[0]

    with pytest.raises(PipelineError) as caught:
        pipeline_of(jax.make_jaxpr(fn)(carry, xs).jaxpr, "x", 2, microbatches)
    return str(caught.value)


ROWS = jnp.ones((8, 3), jnp.float32)
WEIGHTS = jnp.ones((4, 3, 3), jnp.float32)


@pytest.mark.parametrize(
    ("layer", "operator"),
    [
        (lambda x, w: (jnp.tanh(x @ w) - jnp.mean(x @ w, axis=0, keepdims=True), None), "sub"),
        (lambda x, w: (jnp.tanh(x @ w) / jnp.max(x, axis=0, keepdims=True), None), "reduce_max"),
        (lambda x, w: (jnp.sort(jnp.tanh(x @ w), axis=0), None), "sort"),
        (lambda x, w: (jnp.cumsum(jnp.tanh(x @ w), axis=0), None), "cumsum"),
        (lambda x, w: (jnp.tanh(x @ w)[::-1], None), "rev"),
        (lambda x, w: (jax.nn.softmax(x @ x.T, axis=-1) @ jnp.tanh(x @ w), None), "dot_general"),
        (lambda x, w: (jnp.tanh(x @ w)[jnp.arange(8)[::-1]], None), "gather"),
        (lambda x, w: (jnp.tanh(x @ w), jnp.square(jnp.mean(x, axis=0))), "square"),
        (lambda x, w: (jnp.tanh(x @ w).reshape(4, 6).reshape(3, 8).T, None), "reshape"),
        (lambda x, w: (jnp.where(jnp.max(x) > 0, jnp.tanh(x @ w), x), None), "reduce_max"),
        (lambda x, w: (jax.lax.cond(jnp.sum(x) > 0, jnp.tanh, lambda x: x, x @ w), None), "gt"),
        (lambda x, w: (jax.lax.map(lambda row: jnp.tanh(row @ w), x), None), "scan"),
    ],
)  # fmt: skip
def test_what_mixes_rows_is_refused_by_operator_and_line(layer, operator):
    why = refused(layer, ROWS, WEIGHTS)
    line = layer.__code__.co_firstlineno
    assert re.search(rf"rows in dimension 0 of f\w*\[8,3\]: {operator} at \S*test_pipeline.py:{line}", why), why


def test_bad_numbers_are_refused():
    step, args = tower(4)
    jaxpr = jax.make_jaxpr(step)(*args).jaxpr
    with pytest.raises(PipelineError, match="3 micro-batches do not divide its 16 rows"):
        pipeline_of(jaxpr, "x", 2, 3)
    with pytest.raises(PipelineError, match="4 layers cannot be laid over 5 stages"):
        pipeline_of(jaxpr, "x", 5, 4)
    with pytest.raises(PipelineError, match=r"has 4 layers; \(2, 1\) are 3"):
        pipeline_of(jaxpr, "x", 2, 4, layers={4: (2, 1)})
    with pytest.raises(PipelineError, match="it has none"):
        pipeline_of(jax.make_jaxpr(jnp.sin)(ROWS).jaxpr, "x", 2, 4)
    with pytest.raises(ValueError, match="axis 'x' of size 1 has one stage"):
        pipeline_of(jaxpr, "x", 1, 4)
    with pytest.raises(ValueError, match="schedule='zigzag'"):
        pipeline_of(jaxpr, "x", 2, 4, schedule="zigzag")
    chain = Chain((0,), False, (2, 2), (), (CUT,), (SAME,), (), 8)
    with pytest.raises(ValueError, match="3 micro-batches do not divide the batch of 8 rows"):
        Pipeline("x", 2, 3, "gpipe", (chain,))
    with pytest.raises(ValueError, match="layers of 2 stages; there are 4"):
        Pipeline("x", 4, 2, "gpipe", (chain,))
    with pytest.raises(ValueError, match="every stage needs"):
        dataclasses.replace(chain, layers=(4, 0))
    with pytest.raises(ValueError, match="carries rows of the batch"):
        dataclasses.replace(chain, carries=(SUM,))


def test_a_while_of_unknown_length_is_no_chain():
    def fn(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 9, jnp.exp, x)

    with pytest.raises(PipelineError, match=r"while at \S*test_pipeline\.py:\d+ runs as often as it finds out"):
        pipeline_of(jax.make_jaxpr(fn)(ROWS).jaxpr, "x", 2, 2)


def test_layers_are_spread_evenly():
    assert even_layers(7, 4) == (2, 2, 2, 1) and even_layers(8, 2) == (4, 4)


# --- how schedules look --------------------------------------------------------------------------------------------


def two_scans(schedule, stages=3, microbatches=4):
    forward = Chain((0,), False, (1,) * stages, (), (CUT,), (SAME,), (), 2 * microbatches)
    return Pipeline("x", stages, microbatches, schedule, (forward, dataclasses.replace(forward, path=(1,), reverse=True)))


def test_schedules_as_text():
    assert schedule_text(two_scans("gpipe")).splitlines() == [
        "gpipe over x: 4 micro-batches, 3 stages, 12 steps, 33% of them waiting",
        "stage 0  F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3",
        "stage 1  .  F0 F1 F2 F3 .  .  B0 B1 B2 B3 .",
        "stage 2  .  .  F0 F1 F2 F3 B0 B1 B2 B3 .  .",
    ]
    assert schedule_text(two_scans("1f1b")).splitlines()[1:] == [
        "stage 0  F0 F1 F2 .  F3 .  .  B0 .  B1 B2 B3",
        "stage 1  .  F0 F1 .  F2 B0 F3 B1 .  B2 B3 .",
        "stage 2  .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .",
    ]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "microbatches"), [(2, 1), (3, 7), (4, 16)])
def test_every_micro_batch_passes_every_stage_in_order_there_and_back(schedule, stages, microbatches):
    pipeline = two_scans(schedule, stages, microbatches)
    when = {
        (slot.reverse, stage, slot.microbatch): step
        for step, slots in enumerate(timetable(pipeline))
        for stage, slot in enumerate(slots)
        if slot
    }
    assert len(when) == 2 * stages * microbatches, "each once"
    for number in range(microbatches):
        there = [when[False, stage, number] for stage in range(stages)]
        back = [when[True, stage, number] for stage in reversed(range(stages))]
        assert there + back == sorted(there + back)
    most = 2 * stages - 1 if schedule == "1f1b" else microbatches
    assert max(most_held(pipeline)) <= min(most, microbatches)
    assert most_held(two_scans("gpipe", stages, microbatches)) == (microbatches,) * stages


def test_a_schedule_as_svg_is_one_closed_document_with_a_cell_per_step():
    pipeline = two_scans("1f1b")
    picture = ElementTree.fromstring(schedule_svg(pipeline))
    cells = [e for e in picture.iter() if e.tag.endswith("rect")]
    assert len(cells) == 1 + 3 * len(timetable(pipeline))
    assert "B3" in [e.text for e in picture.iter()]


# --- files --------------------------------------------------------------------------------------------------------


def test_a_pipelined_plan_is_saved_and_loaded(tmp_path):
    step, args = tower(5)
    plan = jaxplan.make_plan(step, *args, mesh=mesh_of((2, 2)), pipeline="x", microbatches=4)
    plan.save(tmp_path / "plan.json")
    again = jaxplan.load_plan(tmp_path / "plan.json", step, *args, mesh=plan.mesh)
    assert again.pipeline == plan.pipeline
    text = (tmp_path / "plan.json").read_text()
    for before, after, why in [
        ('"axis": "x", "microbatches"', '"axis": "w", "microbatches"', "pipeline.axis: 'w' is no axis"),
        (f'"layers": {list(plan.pipeline.chains[1].layers)}', '"layers": [2, 2]', "has 5 layers"),
        ('"microbatches": 4', '"microbatches": 3', "3 micro-batches do not divide"),
        (f'"schedule": "{plan.pipeline.schedule}"', '"schedule": "zigzag"', 'expected "gpipe" or "1f1b"'),
    ]:
        assert before in text
        (tmp_path / "edited.json").write_text(after.join(text.rsplit(before, 1)))
        with pytest.raises(PlanFileError, match=re.escape(why)):
            jaxplan.load_plan(tmp_path / "edited.json", step, *args, mesh=plan.mesh)


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "shape", "axis", "microbatches", "remat", "schedule"),
    [
        pytest.param(5, (2, 2), "x", 2, False, "gpipe", marks=pytest.mark.slow),
        (5, (2, 2), "x", 4, False, "1f1b"),
        pytest.param(4, (2, 2, 2), "y", 4, True, "gpipe", marks=pytest.mark.slow),
        pytest.param(7, (4,), "x", 8, False, "gpipe", marks=pytest.mark.slow),
        pytest.param(7, (4,), "x", 8, True, "1f1b", marks=pytest.mark.slow),
        pytest.param(7, (2, 4), "y", 16, True, "1f1b", marks=pytest.mark.slow),
        pytest.param(6, (3,), "x", 1, False, "gpipe", marks=pytest.mark.slow),
        pytest.param(6, (3,), "x", 2, False, "1f1b", marks=pytest.mark.slow),
    ],
)
def test_same_values_and_gradients_with_the_same_random_numbers(layers, shape, axis, microbatches, remat, schedule):
    step, args = tower(layers, remat=remat)
    plan = in_stages(step, args, shape, axis, microbatches, schedule=schedule)
    assert_close(jax.jit(step)(*args), plan.jit()(*args))


@pytest.mark.parametrize(
    ("layers", "shape", "axis", "microbatches", "remat", "schedule"),
    [
        (4, (2, 2, 2), "x", 4, True, "1f1b"),
        pytest.param(4, (2, 2, 2), "x", 4, True, "gpipe", marks=pytest.mark.slow),
        pytest.param(4, (2, 2, 2), "z", 2, False, "gpipe", marks=pytest.mark.slow),
        pytest.param(5, (2, 4), "x", 8, True, "gpipe", marks=pytest.mark.slow),
        pytest.param(7, (2, 4), "y", 2, True, "1f1b", marks=pytest.mark.slow),
        pytest.param(7, (4,), "x", 8, False, "1f1b", marks=pytest.mark.slow),
        pytest.param(4, (4,), "x", 1, True, "gpipe", marks=pytest.mark.slow),
    ],
)
def test_a_decoders_train_step(layers, shape, axis, microbatches, remat, schedule):
    program = decoder(dataclasses.replace(TINY, layers=layers, remat=remat))
    args = program.make_args(0)
    plan = in_stages(program.fn, args, shape, axis, microbatches, schedule=schedule)
    (_, want, loss), (_, got, same) = jax.jit(program.fn)(*args), plan.jit()(*args)
    assert_close((want["mu"], loss), (got["mu"], same))  # moments are the gradients; what AdamW's first step does is their sign


def test_forward_only_with_rows_in_another_dimension_and_merged_with_others():
    """Rows in dimension 1, merged with a group of two for a product with weights of each group; an uneven last stage."""

    def layer(x, w):
        time, rows, width = x.shape
        apart = x.reshape(time * rows, 2, width // 2)
        return jnp.tanh(jnp.einsum("rgi,gio->rgo", apart, w)).reshape(time, rows, width) + x[::-1], jnp.max(x, axis=(0, 2))

    def fn(x, ws):
        return jax.lax.scan(layer, x, ws)

    args = (
        jax.random.normal(jax.random.key(0), (3, 12, 4), jnp.float32),
        jax.random.normal(jax.random.key(1), (3, 2, 2, 2), jnp.float32),
    )
    plan = in_stages(fn, args, (2, 2), "x", 4)
    assert plan.pipeline.chains[0].carries == (Role(Kind.CUT, 1),)
    assert_close(jax.jit(fn)(*args), plan.jit()(*args))


@pytest.mark.slow
def test_keys_carried_from_layer_to_layer_and_loops_inside_of_layers():
    """A key goes from layer to layer, each of which loops and branches; its gradient is taken in bfloat16."""

    def loss(ws, x, key):
        def layer(carry, w):
            x, key = carry
            key, own = jax.random.split(key)
            keep = jax.random.bernoulli(own, 0.5, x.shape)

            def inner(h, number):
                return jax.lax.cond(number % 2 == 0, jnp.tanh, lambda h: h * 2, h @ w), jnp.sum(h, axis=0)

            h, sums = jax.lax.scan(inner, jnp.where(keep, x, 0), jnp.arange(3))
            return (x + h, key), sums

        (x, _), sums = jax.lax.scan(jax.checkpoint(layer), (x, key), ws)
        return jnp.mean(jnp.square(x.astype(jnp.float32))) + jnp.sum(sums.astype(jnp.float32)) / 1000

    args = (
        (jax.random.normal(jax.random.key(1), (3, 4, 4)) / 3).astype(jnp.bfloat16),
        jax.random.normal(jax.random.key(2), (8, 4)).astype(jnp.bfloat16),
        jax.random.key(3),
    )
    fn = jax.value_and_grad(loss)
    plan = in_stages(fn, args, (2,), "x", 4)
    (want, gradient), (got, other) = jax.jit(fn)(*args), plan.jit()(*args)
    np.testing.assert_allclose(got, want, rtol=1e-2)
    np.testing.assert_allclose(other.astype(np.float32), gradient.astype(np.float32), rtol=0.05, atol=0.02)
    assert other.dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_residual_network_of_convolutions(schedule):
    def loss(kernels, images):
        def layer(x, kernel):
            y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            y = (y - jnp.mean(y, axis=(1, 2, 3), keepdims=True)) * 2
            return x + jax.nn.relu(y), jnp.sum(jnp.square(y))

        x, norms = jax.lax.scan(layer, images, kernels)
        return jnp.mean(jnp.square(x)), norms

    args = (
        jax.random.normal(jax.random.key(1), (4, 3, 3, 2, 2), jnp.float32) / 4,
        jax.random.normal(jax.random.key(2), (8, 6, 5, 2), jnp.float32),
    )
    fn = jax.value_and_grad(loss, has_aux=True)
    plan = in_stages(fn, args, (2, 2), "y", 4, schedule=schedule)
    assert_close(jax.jit(fn)(*args), plan.jit()(*args))


def shared_weights(w, x):
    """The layers share their weights, whose gradient they add up, and carry a sum over rows that decays."""

    def layer(carry, _):
        x, decaying = carry
        h = jnp.tanh(x @ w)
        return (x + h, decaying * jnp.float32(0.5) + jnp.mean(h, axis=0)), None

    (x, decaying), _ = jax.lax.scan(layer, (x, jnp.ones(x.shape[1:], jnp.float32)), None, length=3)
    return jnp.mean(jnp.square(x)) + jnp.sum(decaying)


def test_the_rows_are_where_micro_batches_share_the_most_work():
    jaxpr = jax.make_jaxpr(jax.value_and_grad(shared_weights))(WEIGHTS[0], ROWS).jaxpr
    forward, backward = pipeline_of(jaxpr, "x", 2, 4).chains
    assert forward.carries == (CUT, SUM)
    assert [role.kind for role in backward.carries] == [Kind.TOTAL, Kind.CUT, Kind.SAME]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_layers_that_share_weights_and_steps_in_a_loop(schedule):
    def steps(w, xs):
        def step(w, x):
            value, gradient = jax.value_and_grad(shared_weights)(w, x)
            return w - gradient / 10, value

        return jax.lax.scan(step, w, xs)

    args = (
        jax.random.normal(jax.random.key(0), (4, 4), jnp.float32) / 2,
        jax.random.normal(jax.random.key(1), (3, 8, 4), jnp.float32),
    )
    plan = in_stages(steps, args, (2,), "x", 4, schedule=schedule)
    assert [len(chain.path) for chain in plan.pipeline.chains] == [2, 2]
    assert_close(jax.jit(steps)(*args), plan.jit()(*args))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_an_encoder_and_a_decoder_one_after_the_other(kind):
    """The decoder's layers read the encoder's result; its gradient is gathered from layer to layer, rows by rows."""

    def loss(params, source, target):
        def encode(x, w):
            return x + jnp.tanh(x @ w), None

        def decode(x, w):
            scores = jnp.einsum("bqd,bkd->bqk", x, memory)
            return x + jnp.tanh(jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores, axis=-1), memory) @ w), None

        memory, _ = jax.lax.scan(encode, source, params["encoder"])
        return jnp.mean(jnp.square(jax.lax.scan(jax.checkpoint(decode), target, params["decoder"])[0]))

    def normal(seed, *shape):
        return jax.random.normal(jax.random.key(seed), shape, jnp.float32) / 2

    args = ({"encoder": normal(1, 4, 4, 4), "decoder": normal(2, 3, 4, 4)}, normal(3, 8, 5, 4), normal(4, 8, 6, 4))
    fn = jax.value_and_grad(loss)
    plan = jaxplan.make_plan(fn, *args, mesh=mesh_of((2, 2), kind), pipeline=None)
    plan = dataclasses.replace(plan, pipeline=pipeline_of(plan.traced.jaxpr.jaxpr, "x", 2, 4))
    assert [chain.layers for chain in plan.pipeline.chains] == [(2, 2), (2, 1), (2, 1), (2, 2)]
    assert_close(jax.jit(fn)(*args), plan.jit()(*args))


@pytest.mark.slow
def test_a_pipelined_function_can_be_differentiated():
    def fn(x, ws):
        def layer(x, w):
            return jax.nn.silu(x @ w) + jax.nn.logsumexp(x, axis=-1, keepdims=True), None

        return jnp.sum(jnp.sin(jax.lax.scan(layer, x, ws)[0]))

    args = jax.random.normal(jax.random.key(0), (8, 4)), jax.random.normal(jax.random.key(1), (4, 4, 4)) / 2
    run = in_stages(fn, args, (2, 2), "x", 4).jit()
    assert_close(jax.grad(fn, argnums=(0, 1))(*args), jax.grad(run, argnums=(0, 1))(*args))


@pytest.mark.parametrize(
    ("head", "operator"),
    [
        (lambda x: jnp.sqrt(jnp.mean(jnp.square(x))), "sqrt"),
        (lambda x: jnp.mean(jax.nn.logsumexp(x @ x.T, axis=0)), "dot_general"),
    ],
)
def test_1f1b_is_refused_where_the_loss_needs_the_whole_batch(head, operator):
    def loss(ws, x):
        return head(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0])

    jaxpr = jax.make_jaxpr(jax.grad(loss))(WEIGHTS, ROWS).jaxpr
    pipeline_of(jaxpr, "x", 2, 4)
    with pytest.raises(PipelineError, match=rf"schedule='1f1b'.*{operator}.*test_pipeline.py:{head.__code__.co_firstlineno}"):
        pipeline_of(jaxpr, "x", 2, 4, schedule="1f1b")
    with pytest.raises(PipelineError, match="takes one forward scan and its backward scan beside it"):
        pipeline_of(jax.make_jaxpr(loss)(WEIGHTS, ROWS).jaxpr, "x", 2, 4, schedule="1f1b")


def test_jitted_parts_keep_residuals_on_their_stages():
    """Forward and backward scans stand in calls of their own: what passes between them is not gathered."""
    args = tower(4)[1][:2]

    def loss(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jnp.mean(jnp.square(jax.lax.scan(layer, x, weights["w"])[0]))

    fn = jax.value_and_grad(jax.jit(loss))
    plan = in_stages(fn, args, (2,), "x", 4)
    assert_close(jax.jit(fn)(*args), plan.jit()(*args))
    sent = jaxplan.audit(plan.jit().lower_planned(), mesh=plan.mesh)
    gathered = [c for c in sent.collectives if c.kind == "all-gather"]
    residual = 4 * 16 * 8 * 4
    assert all(c.payload_bytes < residual for c in gathered), gathered


# --- unrolled layers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", [True, False])
def test_unrolled_layers_are_found_there_and_back_and_nothing_else(remat):
    config = dataclasses.replace(TINY, remat=remat, layers=5)
    rolled, unrolled = (trace(p.fn, p.args, {}) for p in (decoder(config), decoder(config, "unrolled")))
    found = rerolled(unrolled)
    assert (found.in_avals, found.out_tree) == (unrolled.in_avals, unrolled.out_tree)
    want, got = (
        [(s.length, s.equation.params["reverse"]) for s in scans(t.jaxpr.jaxpr)] for t in (rolled, found)
    )  # fmt: skip
    assert want == got == [(5, False), (5, True)]
    chains = pipeline_of(found.jaxpr.jaxpr, "x", 2, 4, schedule="1f1b").chains
    assert CUT in chains[0].ys and CUT in chains[1].xs and SUM in chains[1].ys


def test_what_does_not_repeat_alike_is_left_alone():
    def fn(x, ws):
        first = jnp.tanh(x @ ws[0])
        second = jnp.tanh(first @ ws[1])
        third = jnp.tanh((second + first) @ ws[2])  # reads the layer before the last
        return jnp.tanh((third + second) @ ws[3])

    def apart(x, ws):
        return [jnp.tanh(x @ w) for w in ws]  # no layer reads another

    for function in (fn, apart):
        traced = trace(function, (ROWS, tuple(WEIGHTS)), {})
        for scan in scans(rerolled(traced).jaxpr.jaxpr):
            assert scan.length < 4
        got = jax.extend.core.jaxpr_as_fun(rerolled(traced).jaxpr)(ROWS, *WEIGHTS)
        assert_close(jax.tree.leaves(function(ROWS, tuple(WEIGHTS))), got)
    assert rerolled(trace(jnp.sin, (ROWS,), {})).jaxpr.jaxpr.eqns


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "remat"), [("gpipe", False), ("1f1b", True)])
def test_an_unrolled_decoder_in_stages(schedule, remat):
    program = decoder(dataclasses.replace(TINY, layers=5, remat=remat), "unrolled")
    args = program.make_args(0)
    found = rerolled(trace(program.fn, args, {}))
    flat = jax.extend.core.jaxpr_as_fun(found.jaxpr)
    leaves = jax.tree.leaves(args)
    plan = in_stages(flat, leaves, (2, 2), "x", 4, schedule=schedule)
    (_, want, loss), (_, got, same) = jax.jit(program.fn)(*args), found.unflatten_outputs(plan.jit()(*leaves))
    assert_close((want["mu"], loss), (got["mu"], same))
    saved = saved_plan(plan)
    again = program_for(saved, trace(program.fn, args, {}))
    assert program_of(again.jaxpr).fingerprint == saved.program.fingerprint, "a loaded plan finds its scans again"


# --- what the compiled program sends --------------------------------------------------------------------------------


@pytest.mark.parametrize(("microbatches", "stages"), [(4, 2), (2, 4)])
def test_permutes_are_one_per_tick_and_carry(microbatches, stages):
    step, args = tower(4, dropout=False)
    plan = in_stages(step, args, (stages,), "x", microbatches)
    audit = jaxplan.audit(plan.jit().lower_planned(), mesh=plan.mesh)
    permutes = sum(c.times for c in audit.collectives if c.kind == "collective-permute" and "ppermute" in c.op_name)
    assert permutes == sum(plan.pipeline.ticks * len(chain.circulating) for chain in plan.pipeline.chains)


def test_1f1b_keeps_fewer_residuals_than_gpipe():
    """Of sixteen micro-batches gpipe keeps all, 1f1b at most three at two stages; the compiler's own count of temporaries."""
    step, args = tower(4, dropout=False, width=32, rows=256)
    temporaries = {}
    for schedule in ("gpipe", "1f1b"):
        compiled = in_stages(step, args, (2,), "x", 16, schedule=schedule).jit().lower_planned().compile()
        temporaries[schedule] = compiled.memory_analysis().temp_size_in_bytes
    residual = 2 * 256 * 32 * 4  # one array of rows per layer of a stage
    assert temporaries["gpipe"] - temporaries["1f1b"] > residual * 13 / 16, temporaries


def test_scans_are_found_in_program_order_with_how_often_they_run():
    def fn(x, w):
        def outer(x, w):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0], None

        return jax.lax.scan(outer, x, w)

    found = list(scans(jax.make_jaxpr(fn)(ROWS, WEIGHTS).jaxpr))
    assert [(scan.length, scan.times) for scan in found] == [(4, 1), (3, 4)]
    assert found[1].path[: len(found[0].path)] == found[0].path
