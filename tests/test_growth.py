"""What planning takes grows as the program does: function calls are counted, of one program at two sizes."""

from __future__ import annotations

import cProfile
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractMesh

import jaxplan

ROWS, SQUARE = jax.ShapeDtypeStruct((64, 8), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.float32)


def deep(count):
    def program(x, w):
        for k in range(count):
            x = (jnp.sin(x) + k if k % 3 == 0 else x @ w) if k % 3 < 2 else jnp.cumsum(x, 0)
        return x

    return program, (ROWS, SQUARE)


def read_often(count):
    def program(x, w):
        hidden = x @ w
        return sum(jnp.sin(hidden * k).sum(0) for k in range(count))

    return program, (ROWS, SQUARE)


def many_parameters(count):
    def program(parameters, moments, gradients):
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in gradients))
        moments = [0.9 * m + 0.1 * g for m, g in zip(moments, gradients, strict=True)]
        return [p - m / norm for p, m in zip(parameters, moments, strict=True)], moments

    leaves = [jax.ShapeDtypeStruct((8 * (1 + k % 5), 16), jnp.float32) for k in range(count)]
    return program, (leaves, leaves, leaves)


def many_carries(count):
    def program(parameters, rows):
        return lax.scan(lambda ps, row: ([p - 0.1 * jnp.outer(row, row) @ p for p in ps], None), parameters, rows)[0]

    return program, ([jax.ShapeDtypeStruct((8, 16), jnp.float32)] * count, jax.ShapeDtypeStruct((5, 8), jnp.float32))


def many_totals(count):
    def program(totals, rows):
        return lax.scan(lambda ts, row: ([t + row * k for k, t in enumerate(ts)], None), totals, rows)[0]

    return program, ([jax.ShapeDtypeStruct((8,), jnp.float32)] * count, jax.ShapeDtypeStruct((5, 8), jnp.float32))


def nested(count):
    def inside(depth, x, w):
        def body(carry: Any, _):
            return inside(depth - 1, carry, w) + carry, None

        return lax.scan(body, x, None, length=3)[0] if depth else jnp.tanh(x @ w)

    return lambda x, w: inside(count, x, w), (ROWS, SQUARE)


SIZES = {deep: 60, read_often: 60, many_parameters: 30, many_carries: 24, many_totals: 24, nested: 4}


def calls(program, args):
    """How many functions are called while a program is planned; what is kept between plans is there already."""
    profile = cProfile.Profile()
    jaxplan.make_plan(program, *args, mesh=AbstractMesh((4, 2), ("x", "y")), machine="cpu")
    profile.enable()
    jaxplan.make_plan(program, *args, mesh=AbstractMesh((4, 2), ("x", "y")), machine="cpu")
    profile.disable()
    return sum(entry.callcount for entry in profile.getstats())


@pytest.mark.parametrize("of", SIZES, ids=lambda of: of.__name__)
def test_twice_the_program_takes_about_twice_the_calls(of):
    size = SIZES[of]
    once, twice = calls(*of(size)), calls(*of(2 * size))
    assert twice <= 2.5 * once, f"{once} calls for {size}, {twice} for {2 * size}"
