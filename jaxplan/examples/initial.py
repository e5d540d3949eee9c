"""Random initial weights, shared by the examples."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

__all__ = ["FLOAT32", "scaled_normal"]

FLOAT32 = jnp.dtype("float32")


def scaled_normal(key: jax.Array, shape: Sequence[int], fan_in: int, dtype: jnp.dtype = FLOAT32) -> jax.Array:
    """Normal weights of variance 1 / fan_in, which keep the scale of what they are multiplied with."""
    return jax.random.normal(key, tuple(shape), dtype) * (1.0 / math.sqrt(fan_in))
