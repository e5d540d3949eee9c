"""What every family of models needs."""

from typing import Literal

import jax
import jax.numpy as jnp

__all__ = ["Size", "default_key"]

Size = Literal["tiny", "published"]


def default_key(key: jax.Array) -> jax.Array:
    """A key of JAX's default generator, whose draws are the same however they are sharded, from one of any other."""
    return jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")
