"""What XLA gathers however it is sharded: each device computes it of what it has, and nothing is sent."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, mesh_of

import jaxplan
from jaxplan.on_shards import result_specs
from jaxplan.rules import Factor, Kind, Rule

MESHES = ((8,), (4, 2), (2, 2, 2))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def spectral(x, weight):
    """A layer of a Fourier neural operator, and its gradient."""

    def loss(weight):
        modes = jnp.fft.rfft2(x, axes=(1, 2))[:, :4, :4]
        mixed = jnp.einsum("bxyi,xyio->bxyo", modes, weight)
        back = jnp.fft.irfft2(mixed, s=x.shape[1:3], axes=(1, 2))
        return (jax.nn.gelu(back) ** 2).mean()

    return jax.value_and_grad(loss)(weight)


def along_two(x):
    """Transforms along the middle dimension: batches before and after it."""
    return jnp.fft.fft(x * 2.0, axis=1), jnp.fft.ifft(jnp.cos(x), axis=-1).real


def routed(params, x):
    """Experts chosen per token, weighted and trained, in a scan over layers."""

    def layer(h, weights):
        router, up = weights
        gates, chosen = jax.lax.top_k(jax.nn.softmax(h @ router), 2)
        share = (jax.nn.one_hot(chosen, router.shape[1]) * gates[..., None]).sum(-2)
        return h + jnp.tanh(jnp.einsum("bsd,edf,bse->bsf", h, up, share)), gates.sum()

    def loss(params):
        out, gates = jax.lax.scan(layer, x, params)
        return (out**2).mean() + gates.mean() * 1e-3

    value, slopes = jax.value_and_grad(loss)(params)
    return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, slopes)


def posterior(x, y):
    """A Gaussian process: columns of a right-hand side have nothing to do with each other; and rods, one per column."""
    kernel = jnp.exp(-((x[:8, None] - x[None, :8]) ** 2).sum(-1)) + 0.1 * jnp.eye(8)
    solved = jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(kernel), jnp.sin(y), lower=True)
    near, own = jnp.full(8, 0.1), jnp.full(8, 2.0)
    return (solved**2).sum(0), jax.lax.linalg.tridiagonal_solve(near.at[0].set(0), own, near.at[7].set(0), jnp.cos(y))


PROGRAMS = {
    "posterior": (posterior, (normal(16, 4), normal(8, 64))),
    "spectral": (spectral, (normal(8, 16, 16, 8), jax.lax.complex(normal(4, 4, 8, 8), normal(4, 4, 8, 8, seed=1)))),
    "along two": (along_two, (normal(8, 16, 8),)),
    "routed": (routed, ((normal(2, 16, 8), normal(2, 8, 16, 16)), normal(16, 8, 16))),
}


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_values_are_the_unplanned_ones_and_only_what_was_planned_is_sent(name, shape):
    fn, args = PROGRAMS[name]
    plan = jaxplan.make_plan(fn, *args, mesh=mesh_of(shape), pipeline=None)
    assert_close(plan.jit()(*args), jax.jit(fn)(*args))
    found = plan.audit()
    assert found.total("unplanned") == found.total("missing") == 0


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_batch_of_transforms_and_of_choices_sends_nothing(shape):
    def fn(x):
        return jnp.abs(jnp.fft.fft2(x)), jax.lax.top_k(x, 3)

    x = normal(8, 16, 16)
    plan = jaxplan.make_plan(fn, x, mesh=mesh_of(shape))
    assert plan.audit().compiled_bytes == 0 and all(entry is not None for entry in plan.in_specs[0][:1])
    assert_close(plan.jit()(x), jax.jit(fn)(x))


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_right_hand_sides_of_a_solve_are_split(shape):
    fn, args = PROGRAMS["posterior"]
    plan = jaxplan.make_plan(fn, *args, mesh=mesh_of(shape))
    assert plan.in_specs[1][1:] and plan.audit().compiled_bytes == 0


def test_a_planned_function_is_differentiated_and_batched_like_any_other():
    fn, (x, weight) = PROGRAMS["spectral"]
    planned = jaxplan.make_plan(fn, x, weight, mesh=mesh_of((4, 2)), pipeline=None).jit()

    def slope(function):
        return jax.grad(lambda x: function(x, weight)[0])(x)

    assert_close(slope(planned), slope(fn))
    stacked = jnp.stack([x, 2 * x])
    assert_close(jax.vmap(planned, (0, None))(stacked, weight), jax.vmap(fn, (0, None))(stacked, weight))


def test_a_stage_of_a_pipeline_has_it_whole():
    fn, args = PROGRAMS["routed"]
    plan = jaxplan.make_plan(fn, *args, mesh=mesh_of((2, 2, 2)), pipeline="x", microbatches=2)
    assert plan.pipeline is not None
    assert_close(plan.jit()(*args), jax.jit(fn)(*args))


def test_a_saved_plan_does_the_same(tmp_path):
    fn, args = PROGRAMS["spectral"]
    plan = jaxplan.make_plan(fn, *args, mesh=mesh_of((4, 2)))
    plan.save(tmp_path / "plan.json")
    again = jaxplan.load_plan(tmp_path / "plan.json", fn, *args, mesh=mesh_of((4, 2)))
    np.testing.assert_array_equal(again.jit()(*args)[0], plan.jit()(*args)[0])


def test_results_lie_as_their_factors_do():
    rule = Rule(
        (Factor("b", 8), Factor("s", 4), Factor("k", 16, Kind.WHOLE)), (((0,), (1,), (2,)), ((1,),)), (((1,), (0,)), ((2,),)),
        by_hand=True,
    )  # fmt: skip
    assert result_specs(rule, (((1,), (), ()), ((0,),))) == (((0,), (1,)), ((),))
    assert result_specs(rule, ((), ())) == (((), ()), ((),))


@pytest.mark.parametrize("wrong", [{"fusible": True}, {"factors": (Factor("b", 8, Kind.SUM),)}])
def test_what_is_summed_or_fused_is_not_computed_by_hand(wrong):
    with pytest.raises(ValueError, match="by_hand"):
        Rule(**{"factors": (Factor("b", 8),), "operands": (((0,),),), "results": (((0,),),), "by_hand": True, **wrong})
