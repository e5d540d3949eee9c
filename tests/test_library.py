"""What a compiler that materialises keeps of programs whose values are far larger than what enters or leaves, as compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from jax import lax

import jaxplan
from jaxplan.graph import build_graph
from jaxplan.trace import trace


def shape(*extents):
    return jax.ShapeDtypeStruct(extents, jnp.float32)


def all_pairs_in_a_loop():
    """Broadcasts and constants that two reductions share are stored; what lies inside of reductions is not."""

    def step(x, v, m):
        def force(x):
            d = x[None] - x[:, None]
            near = jnp.sum(d * d, -1) + 0.01
            return jnp.sum(m[None, :, None] * d * near[..., None] ** -1.5, 1)

        def body(carry, _):
            x, v = carry
            v = v + 0.005 * force(x)
            x = x + 0.01 * v
            return (x, v + 0.005 * force(x)), None

        return lax.scan(body, (x, v), None, length=4)[0]

    return step, (shape(96, 3), shape(96, 3), shape(96))


def attention_by_broadcasting():
    """Broadcasts of the forward pass are those of the backward pass."""

    def loss(p, x):
        q, k, v = x @ p[0], x @ p[1], x @ p[2]
        score = (q[:, :, None, :] * k[:, None, :, :]).sum(-1)
        weight = jnp.exp(score - score.max(-1, keepdims=True))
        return jnp.mean(((weight / weight.sum(-1, keepdims=True))[..., None] * v[:, None]).sum(2) ** 2)

    return jax.grad(loss), ([shape(24, 24)] * 3, shape(3, 40, 24))


def radial_functions():
    """A value that a reduction reads is stored, and computed again by loops if it comes from one large value."""

    def loss(p, x):
        d = x[:, None] - p["c"][None]
        return jnp.mean((jnp.exp(-(d * d * jnp.exp(p["s"])[None, :, None]).sum(-1)) @ p["w"]) ** 2)

    return jax.grad(loss), ({"c": shape(60, 6), "s": shape(60), "w": shape(60, 3)}, shape(200, 6))


def edges_of_a_graph():
    """A product that sums over nothing is element-wise."""

    def loss(p, x, y):
        h = jax.nn.gelu(x[:, None] @ p["a"] + x[None] @ p["b"])
        return jnp.mean(((h @ p["c"])[..., 0] - y) ** 2)

    return jax.grad(loss), ({"a": shape(12, 12), "b": shape(12, 12), "c": shape(12, 1)}, shape(72, 12), shape(72, 72))


def nearest_points():
    def loss(p, z, y):
        x = jnp.tanh(z @ p).reshape(4, 60, 3)
        d = ((x[:, :, None] - y[:, None]) ** 2).sum(-1)
        return d.min(1).mean() + d.min(2).mean()

    return jax.grad(loss), (shape(16, 180), shape(4, 16), shape(4, 70, 3))


def kernels_by_gradient():
    """One library kernel takes all of it, and what is said twice is computed once."""

    def step(x):
        def kernel(a, b):
            return jnp.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / 2)

        return x + 0.1 * (kernel(x, x) @ x - jax.grad(lambda y: kernel(x, y).sum())(x))

    return step, (shape(160, 12),)


def gradients_of_kernels():
    """Convolutions want what slides in an order of its own, too, where that is the gradient of an image."""

    def conv(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def loss(p, x):
        return jnp.mean(conv(jnp.tanh(conv(x, p[0])), p[1]) ** 2)

    return jax.grad(loss), ([shape(3, 3, 8, 16), shape(3, 3, 16, 48)], shape(4, 12, 12, 8))


PROGRAMS = [
    all_pairs_in_a_loop, attention_by_broadcasting, radial_functions, edges_of_a_graph, nearest_points, kernels_by_gradient,
    gradients_of_kernels,
]  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_is_far_larger_than_what_enters_is_held_as_compiled(program):
    fn, args = program()
    plan = jaxplan.make_plan(fn, *args, mesh=mesh_of((1,)), machine="cpu")
    found = plan.jit().lower(*args).compile().memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes
    assert plan.peak_bytes == pytest.approx(held, rel=0.12)


def names(fn, *args):
    return [op.name for op in build_graph(trace(fn, args, {})).operators if op.equation is not None]


def test_what_has_a_derivative_of_its_own_is_kept_though_its_body_says_what_stands_there_already():
    """Gradient reversal: the identity, whose derivative is not 1."""

    @jax.custom_vjp
    def reversed_gradient(x):
        return x

    reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-g,))

    def fn(x):
        return jnp.sum(jnp.sin(reversed_gradient(x)) + jnp.sin(x) ** 2)

    x = np.linspace(-1.0, 1.0, 32, dtype=np.float32).reshape(8, 4)
    planned = jaxplan.make_plan(fn, x, mesh=mesh_of((8,))).jit()
    np.testing.assert_allclose(jax.grad(planned)(x), jax.grad(fn)(x), rtol=1e-6)
