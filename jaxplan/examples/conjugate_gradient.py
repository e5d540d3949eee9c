"""Conjugate gradients for a dense symmetric positive definite matrix, until the residual is small."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .program import Program, define

__all__ = ["FULL", "SMALL", "SolveConfig", "conjugate_gradient"]

# x, the residual, the search direction, the residual's square, the iteration
State = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


@dataclass(frozen=True)
class SolveConfig:
    """`unknowns` of the system; stop at `tolerance` times the norm of b, or after `limit` iterations."""

    unknowns: int = 64
    tolerance: float = 1e-5
    limit: int = 200


SMALL = SolveConfig()
FULL = SolveConfig(unknowns=32768, limit=1000)


def conjugate_gradient(config: SolveConfig = SMALL) -> Program:
    """`solve(A, b, x0) -> x` with A x = b; A is (unknowns, unknowns), the others (unknowns,)."""

    def solve(matrix: jax.Array, b: jax.Array, x0: jax.Array) -> jax.Array:
        enough = config.tolerance**2 * jnp.vdot(b, b)

        def unfinished(state: State) -> jax.Array:
            _, _, _, square, iteration = state
            return (square > enough) & (iteration < config.limit)

        def iterate(state: State) -> State:
            x, residual, direction, square, iteration = state
            image = matrix @ direction
            step = square / jnp.vdot(direction, image)
            x = x + step * direction
            residual = residual - step * image
            next_square = jnp.vdot(residual, residual)
            direction = residual + (next_square / square) * direction
            return x, residual, direction, next_square, iteration + 1

        residual = b - matrix @ x0
        start = (x0, residual, residual, jnp.vdot(residual, residual), jnp.zeros((), jnp.int32))
        return jax.lax.while_loop(unfinished, iterate, start)[0]

    def make(key: jax.Array) -> tuple[Any, ...]:
        key_matrix, key_b = jax.random.split(key)
        n = config.unknowns
        root = jax.random.normal(key_matrix, (n, n), jnp.float32)
        matrix = root @ root.T / n + jnp.eye(n, dtype=jnp.float32)
        return matrix, jax.random.normal(key_b, (n,), jnp.float32), jnp.zeros((n,), jnp.float32)

    return define("conjugate_gradient", solve, make)
