"""Jacobi's method for Poisson's equation on a square grid: a five-point stencil, a fixed number of sweeps."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .program import Program, define

__all__ = ["FULL", "SMALL", "GridConfig", "stencil"]


@dataclass(frozen=True)
class GridConfig:
    """A grid of `rows` by `columns` points, zero outside it, swept `sweeps` times."""

    rows: int = 32
    columns: int = 32
    sweeps: int = 8


SMALL = GridConfig()
FULL = GridConfig(rows=16384, columns=16384, sweeps=100)


def stencil(config: GridConfig = SMALL) -> Program:
    """`relax(u, f) -> u`: `sweeps` Jacobi sweeps towards -laplace(u) = f; both are (rows, columns)."""

    def relax(u: jax.Array, f: jax.Array) -> jax.Array:
        def sweep(_: jax.Array, u: jax.Array) -> jax.Array:
            wide = jnp.pad(u, 1)
            vertical = wide[:-2, 1:-1] + wide[2:, 1:-1]
            horizontal = wide[1:-1, :-2] + wide[1:-1, 2:]
            return 0.25 * (vertical + horizontal + f)

        return jax.lax.fori_loop(0, config.sweeps, sweep, u)

    def make(key: jax.Array) -> tuple[Any, ...]:
        shape = (config.rows, config.columns)
        return jnp.zeros(shape, jnp.float32), jax.random.normal(key, shape, jnp.float32)

    return define("stencil", relax, make, donate=(0,))
