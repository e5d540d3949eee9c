"""A multi-layer perceptron trained on a regression by plain gradient descent."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .initial import scaled_normal
from .program import Program, define

__all__ = ["FULL", "SMALL", "MLPConfig", "mlp_sgd"]


@dataclass(frozen=True)
class MLPConfig:
    """Sizes of the perceptron: `widths[0]` inputs, `widths[-1]` outputs, `batch` examples a step."""

    widths: tuple[int, ...] = (32, 64, 64, 16)
    batch: int = 16
    learning_rate: float = 0.05


SMALL = MLPConfig()
FULL = MLPConfig(widths=(4096, 16384, 16384, 4096), batch=1024, learning_rate=0.01)


def mlp_sgd(config: MLPConfig = SMALL) -> Program:
    """`train_step(params, x, y) -> (params, loss)`; x is (batch, widths[0]), y is (batch, widths[-1])."""

    def predict(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"][None, :])
        return x @ params[-1]["w"] + params[-1]["b"][None, :]

    def loss_fn(params: list[dict[str, jax.Array]], x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(predict(params, x) - y))

    def train_step(params: list[dict[str, jax.Array]], x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_fn)(params, x, y)
        return jax.tree.map(lambda p, g: p - config.learning_rate * g, params, gradients), loss

    def make(key: jax.Array) -> tuple[Any, ...]:
        key_x, key_y, *keys = jax.random.split(key, 2 + len(config.widths) - 1)
        params = [
            {"w": scaled_normal(k, (fan_in, fan_out), fan_in), "b": jnp.zeros((fan_out,), jnp.float32)}
            for k, fan_in, fan_out in zip(keys, config.widths[:-1], config.widths[1:], strict=True)
        ]
        x = jax.random.normal(key_x, (config.batch, config.widths[0]), jnp.float32)
        y = jax.random.normal(key_y, (config.batch, config.widths[-1]), jnp.float32)
        return params, x, y

    return define("mlp_sgd", train_step, make, donate=(0,))
