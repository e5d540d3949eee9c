"""Room `pipeline`: scans over layers run in stages give what they give otherwise, or are refused by name."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, mesh_of

import jaxplan
from jaxplan.examples.decoder import SMALL, decoder
from jaxplan.pipeline import Chain, Kind, Pipeline, PipelineError, Role, even_layers, pipeline_of, scans

TINY = dataclasses.replace(SMALL, width=16, heads=2, mlp_width=24, vocabulary=32, sequence=6, batch=8)
CUT, SAME, SUM = Role(Kind.CUT, 0), Role(Kind.SAME), Role(Kind.SUM)


def in_stages(fn, args, shape, axis, microbatches, **options):
    """The plan of a function with its scans laid over the stages of an axis."""
    plan = jaxplan.make_plan(fn, *args, mesh=mesh_of(shape))
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

    with pytest.raises(PipelineError, match="it has none"):
        pipeline_of(jax.make_jaxpr(fn)(ROWS).jaxpr, "x", 2, 2)


def test_layers_are_spread_evenly():
    assert even_layers(7, 4) == (2, 2, 2, 1) and even_layers(8, 2) == (4, 4)


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "shape", "axis", "microbatches", "remat"),
    [
        (5, (2, 2), "x", 2, False),
        (4, (2, 2, 2), "y", 4, True),
        (7, (4,), "x", 8, False),
        pytest.param(7, (2, 4), "y", 16, True, marks=pytest.mark.slow),
        pytest.param(6, (3,), "x", 1, False, marks=pytest.mark.slow),
        pytest.param(5, (2, 4), "x", 4, True, marks=pytest.mark.slow),
    ],
)
def test_same_values_and_gradients_with_the_same_random_numbers(layers, shape, axis, microbatches, remat):
    step, args = tower(layers, remat=remat)
    plan = in_stages(step, args, shape, axis, microbatches)
    assert_close(jax.jit(step)(*args), plan.jit()(*args))


@pytest.mark.parametrize(
    ("layers", "shape", "axis", "microbatches", "remat"),
    [
        (4, (2, 2, 2), "x", 4, True),
        pytest.param(4, (2, 2, 2), "z", 2, False, marks=pytest.mark.slow),
        pytest.param(5, (2, 4), "x", 8, True, marks=pytest.mark.slow),
        pytest.param(7, (2, 4), "y", 2, True, marks=pytest.mark.slow),
        pytest.param(7, (4,), "x", 8, False, marks=pytest.mark.slow),
        pytest.param(4, (4,), "x", 1, True, marks=pytest.mark.slow),
    ],
)
def test_a_decoders_train_step(layers, shape, axis, microbatches, remat):
    program = decoder(dataclasses.replace(TINY, layers=layers, remat=remat))
    args = program.make_args(0)
    plan = in_stages(program.fn, args, shape, axis, microbatches)
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


# --- what the compiled program sends --------------------------------------------------------------------------------


@pytest.mark.parametrize(("microbatches", "stages"), [(4, 2), (2, 4)])
def test_permutes_are_one_per_tick_and_carry(microbatches, stages):
    step, args = tower(4, dropout=False)
    plan = in_stages(step, args, (stages,), "x", microbatches)
    audit = jaxplan.audit(plan.jit().lower_planned(), mesh=plan.mesh)
    permutes = sum(c.times for c in audit.collectives if c.kind == "collective-permute" and "ppermute" in c.op_name)
    assert permutes == sum(plan.pipeline.ticks * len(chain.circulating) for chain in plan.pipeline.chains)


def test_scans_are_found_in_program_order_with_how_often_they_run():
    def fn(x, w):
        def outer(x, w):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0], None

        return jax.lax.scan(outer, x, w)

    found = list(scans(jax.make_jaxpr(fn)(ROWS, WEIGHTS).jaxpr))
    assert [(scan.length, scan.times) for scan in found] == [(4, 1), (3, 4)]
    assert found[1].path[: len(found[0].path)] == found[0].path
