"""A mixture-of-experts layer written with einsums (as in GShard, Lepikhin et al., 2020), trained by SGD."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .initial import scaled_normal
from .program import Program, define

__all__ = ["FULL", "SMALL", "MixtureConfig", "moe", "route"]

Params = dict[str, jax.Array]


@dataclass(frozen=True)
class MixtureConfig:
    """Sizes of the layer.

    Each token goes to its `chosen` best experts. In each group of tokens (one batch row) an expert has room
    for `capacity_factor` times its even share of them; a token that finds no room is passed over.
    """

    experts: int = 8
    chosen: int = 2
    width: int = 32
    expert_width: int = 64
    sequence: int = 16
    batch: int = 16
    capacity_factor: float = 2.0
    balance: float = 0.01
    learning_rate: float = 0.5

    @property
    def capacity(self) -> int:
        return math.ceil(self.capacity_factor * self.chosen * self.sequence / self.experts)


SMALL = MixtureConfig()
FULL = MixtureConfig(experts=64, width=1024, expert_width=4096, sequence=1024, batch=64, learning_rate=0.01)


def route(logits: jax.Array, config: MixtureConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where each token goes.

    Args:
      logits: the router's, (batch, sequence, experts).

    Returns:
      `dispatch` and `combine`, both (batch, sequence, experts, capacity): which slot of which expert a token
      takes, as 0 or 1, and with what weight it comes back; and the balancing loss, 1 when all is even.
    """
    gates = jax.nn.softmax(logits, axis=-1)
    weights, chosen = jax.lax.top_k(gates, config.chosen)
    weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    picks = jax.nn.one_hot(chosen, config.experts, dtype=logits.dtype)  # batch, sequence, chosen, experts

    # First choices take slots before second choices do, and earlier tokens before later ones.
    in_turn = picks.transpose(0, 2, 1, 3).reshape(picks.shape[0], -1, config.experts)
    slot = jnp.cumsum(in_turn, axis=1) - in_turn
    slot = slot.reshape(picks.shape[0], config.chosen, -1, config.experts).transpose(0, 2, 1, 3)
    slot = jnp.sum(slot * picks, axis=-1).astype(jnp.int32)
    slots = jax.nn.one_hot(slot, config.capacity, dtype=logits.dtype)  # all zero where there is no room

    dispatch = jnp.einsum("bske,bskc->bsec", picks, slots)
    combine = jnp.einsum("bsk,bske,bskc->bsec", weights, picks, slots)
    share = jnp.mean(picks[:, :, 0, :], axis=(0, 1))
    balance = config.experts * jnp.sum(share * jnp.mean(gates, axis=(0, 1)))
    return dispatch, combine, balance


def layer(params: Params, x: jax.Array, config: MixtureConfig) -> tuple[jax.Array, jax.Array]:
    """The layer's output for x (batch, sequence, width), and its balancing loss."""
    dispatch, combine, balance = route(jnp.einsum("bsw,we->bse", x, params["router"]), config)
    inputs = jnp.einsum("bsec,bsw->ebcw", dispatch, x)
    hidden = jax.nn.gelu(jnp.einsum("ebcw,ewh->ebch", inputs, params["w_up"]))
    outputs = jnp.einsum("ebch,ehw->ebcw", hidden, params["w_down"])
    return jnp.einsum("bsec,ebcw->bsw", combine, outputs), balance


def moe(config: MixtureConfig = SMALL) -> Program:
    """`train_step(params, x, y) -> (params, loss)`; x and y are (batch, sequence, width)."""

    def loss_fn(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        predicted, balance = layer(params, x, config)
        return jnp.mean(jnp.square(x + predicted - y)) + config.balance * balance

    def train_step(params: Params, x: jax.Array, y: jax.Array) -> tuple[Params, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_fn)(params, x, y)
        return jax.tree.map(lambda p, g: p - config.learning_rate * g, params, gradients), loss

    def make(key: jax.Array) -> tuple[Any, ...]:
        experts, width, hidden = config.experts, config.width, config.expert_width
        key_router, key_up, key_down, key_x, key_y = jax.random.split(key, 5)
        params = {
            "router": scaled_normal(key_router, (width, experts), width),
            "w_up": scaled_normal(key_up, (experts, width, hidden), width),
            "w_down": scaled_normal(key_down, (experts, hidden, width), hidden),
        }
        shape = (config.batch, config.sequence, width)
        x = jax.random.normal(key_x, shape, jnp.float32)
        return params, x, x + jnp.tanh(jax.random.normal(key_y, shape, jnp.float32))

    return define("moe", train_step, make, donate=(0,))
