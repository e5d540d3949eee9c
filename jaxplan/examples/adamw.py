"""AdamW: Adam with decoupled weight decay (Loshchilov & Hutter, 2019), over any pytree of parameters."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["AdamW", "adamw_init", "adamw_update"]


@dataclass(frozen=True)
class AdamW:
    """The settings. `clip_norm` bounds the global norm of the gradients; None leaves them as they are."""

    learning_rate: float = 3e-3
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = None


def adamw_init(params: Any) -> dict[str, Any]:
    """The optimizer's state: both moments, zero and shaped like the parameters, and a count of steps."""
    return {
        "mu": jax.tree.map(jnp.zeros_like, params),
        "nu": jax.tree.map(jnp.zeros_like, params),
        "count": jnp.zeros((), jnp.int32),
    }


def adamw_update(
    settings: AdamW, gradients: Any, state: dict[str, Any], params: Any
) -> tuple[Any, dict[str, Any]]:
    """One step: `(new parameters, new state)`. Matrices decay; vectors (scales and biases) do not.

    A parameter stacked over layers is taken for what one layer holds of it, so the two forms of a model
    decay alike: the caller names vectors by putting them under a key that ends in "scale".
    """
    if settings.clip_norm is not None:
        square = sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(gradients))
        factor = jnp.minimum(1.0, settings.clip_norm / jnp.maximum(jnp.sqrt(square), 1e-6))
        gradients = jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients)

    count = state["count"] + 1
    steps = count.astype(jnp.float32)
    correct_mu = 1.0 - settings.b1**steps
    correct_nu = 1.0 - settings.b2**steps
    mu = jax.tree.map(lambda m, g: settings.b1 * m + (1.0 - settings.b1) * g, state["mu"], gradients)
    nu = jax.tree.map(
        lambda n, g: settings.b2 * n + (1.0 - settings.b2) * jnp.square(g), state["nu"], gradients
    )

    def moved(path: tuple[Any, ...], p: jax.Array, m: jax.Array, n: jax.Array) -> jax.Array:
        mu_hat = m / correct_mu.astype(m.dtype)
        nu_hat = n / correct_nu.astype(n.dtype)
        direction = mu_hat / (jnp.sqrt(nu_hat) + settings.epsilon)
        if not str(path[-1].key).endswith("scale"):
            direction = direction + settings.weight_decay * p
        return p - settings.learning_rate * direction

    return jax.tree_util.tree_map_with_path(moved, params, mu, nu), {"mu": mu, "nu": nu, "count": count}
