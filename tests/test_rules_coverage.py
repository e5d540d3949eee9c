"""Coverage: no primitive of what real programs are made of is unknown to the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxplan import _jax
from jaxplan.rules import classify, rule_of


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def i32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner jaxprs in place of the equation that holds them."""
    for equation in jaxpr.eqns:
        inner = list(_jax.sub_jaxprs(equation))
        if inner and classify(equation.primitive) == "unknown":
            for sub in inner:
                yield from equations(sub)
        else:
            yield equation


KEY = jax.eval_shape(lambda: jax.random.key(0))


def transformer_step(params: Any, tokens: Any, key: Any) -> Any:
    def block(x: Any, layer: Any) -> Any:
        h = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-6) * layer["scale"]
        q, k, v = (jnp.einsum("bsd,dhk->bshk", h, layer[name]) for name in ("wq", "wk", "wv"))
        s = jnp.einsum("bshk,bthk->bhst", q, k) / 8
        mask = jnp.tril(jnp.ones((s.shape[-1], s.shape[-1]), bool))
        p = jax.nn.softmax(jnp.where(mask, s, -jnp.inf))
        x = x + jnp.einsum("bhst,bthk,hkd->bsd", p, v, layer["wo"])
        gate = lax.top_k(x @ layer["router"], 2)[1]
        expert = jax.nn.one_hot(gate, 4).sum(-2)
        y = jnp.einsum("bsd,bse,edf->bsf", x, expert, layer["up"])
        return x + jax.nn.gelu(y) @ layer["down"], jnp.cumsum(expert, 0)

    def loss(params: Any) -> Any:
        x = params["embed"][tokens[:, :-1]]
        x = jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x / 0.9, 0)
        x, _ = lax.scan(jax.checkpoint(block), x, params["layers"])
        logits = (x @ params["embed"].T).astype(jnp.float32)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)
        return -picked.mean()

    value, grads = jax.value_and_grad(loss)(params)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: g * jnp.minimum(1, 1 / norm), grads)
    return value, jax.tree.map(lambda p, g: p - 1e-3 * jnp.sign(g), params, grads)


def vision_step(params: Any, images: Any, labels: Any) -> Any:
    def loss(params: Any) -> Any:
        x = lax.conv_general_dilated(images, params["stem"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu((x - x.mean((0, 1, 2))) / jnp.std(x, (0, 1, 2)))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = jnp.roll(jnp.concatenate([x, x[:, ::-1]], 1), 1, axis=2)
        logits = x.mean((1, 2)) @ params["head"]
        correct = logits.argmax(-1) == labels
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[jnp.arange(8), labels]), correct.mean()

    return jax.value_and_grad(loss, has_aux=True)(params)


def odds_and_ends(x: Any, key: Any) -> Any:
    a, b = jnp.split(x, 2)
    y = jnp.stack([jnp.tile(a, (2, 1)), jnp.repeat(b, 2, axis=0)], 1)
    z = jnp.linalg.solve(x.T @ x + jnp.eye(6), jnp.linalg.svd(x)[2])
    noise = jax.random.normal(key, x.shape) + jax.random.gamma(key, 2.0, x.shape)
    chosen = jax.random.categorical(key, x) + jax.random.permutation(key, 8)
    cache = lax.dynamic_update_slice(x, x[:1], (chosen[0], 0))
    cache = cache.at[chosen].max(1.0).at[chosen, chosen].multiply(2.0)
    return (
        y,
        z,
        noise,
        cache,
        jnp.sort(x),
        jnp.fft.rfft(x),
        jnp.quantile(x, 0.5),
        jnp.median(x),
        jnp.unwrap(x),
    )


def layers(d: int) -> dict[str, Any]:
    shapes = {"scale": (d,), "wq": (d, 4, 8), "wk": (d, 4, 8), "wv": (d, 4, 8), "wo": (4, 8, d)}
    shapes |= {"router": (d, 4), "up": (4, d, 64), "down": (64, d)}
    return {name: f32(3, *shape) for name, shape in shapes.items()}


STEPS = [
    (transformer_step, ({"embed": f32(50, 16), "layers": layers(16)}, i32(4, 9), KEY)),
    (vision_step, ({"stem": f32(7, 7, 3, 16), "head": f32(16, 10)}, f32(8, 32, 32, 3), i32(8))),
    (odds_and_ends, (f32(8, 6), KEY)),
]


@pytest.mark.parametrize("step, args", STEPS, ids=lambda value: getattr(value, "__name__", ""))
def test_nothing_is_unknown(step: Callable[..., Any], args: tuple[Any, ...]) -> None:
    unknown = set()
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # users may be lax
        closed = jax.make_jaxpr(step)(*args)
    for equation in equations(closed.jaxpr):
        avals = ([v.aval for v in side] for side in (equation.invars, equation.outvars))
        rule = rule_of(equation.primitive, equation.params, *avals)
        if not rule.known:
            unknown.add(equation.primitive)
        for terminals, variables in ((rule.operands, equation.invars), (rule.results, equation.outvars)):
            assert [len(dims) for dims in terminals] == [v.aval.ndim for v in variables]
    assert not unknown
