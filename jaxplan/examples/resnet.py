"""A small residual network with batch norm, trained by gradient descent with momentum. NHWC throughout."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .initial import scaled_normal
from .program import Program, define

__all__ = ["FULL", "SMALL", "ResNetConfig", "resnet_momentum"]

Tree = dict[str, Any]


@dataclass(frozen=True)
class ResNetConfig:
    """Sizes of the network.

    `widths` has one entry a stage, and a stage has `blocks` residual blocks. Every stage after the first
    halves the image.
    """

    widths: tuple[int, ...] = (16, 32)
    blocks: int = 1
    image: int = 16
    channels: int = 3
    classes: int = 16
    batch: int = 16
    learning_rate: float = 0.02
    momentum: float = 0.9
    average: float = 0.9


SMALL = ResNetConfig()
FULL = ResNetConfig(widths=(64, 128, 256, 512), blocks=2, image=224, classes=1024, batch=256)


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Same-padded convolution of x (n, h, w, c) with a kernel (kh, kw, c, o)."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def batch_norm(x: jax.Array, params: Tree, statistics: Tree, average: float) -> tuple[jax.Array, Tree]:
    """Normalise by the batch's own statistics; returns the result and the moved running averages."""
    mean = jnp.mean(x, axis=(0, 1, 2))
    variance = jnp.mean(jnp.square(x - mean[None, None, None, :]), axis=(0, 1, 2))
    scale = params["scale"] * jax.lax.rsqrt(variance + 1e-5)
    y = (x - mean[None, None, None, :]) * scale[None, None, None, :] + params["bias"][None, None, None, :]
    moved = {
        "mean": average * statistics["mean"] + (1.0 - average) * mean,
        "variance": average * statistics["variance"] + (1.0 - average) * variance,
    }
    return y, moved


def residual_block(
    x: jax.Array, params: Tree, statistics: Tree, stride: int, average: float
) -> tuple[jax.Array, Tree]:
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""
    moved: Tree = {}
    y = convolve(x, params["conv1"], stride)
    y, moved["norm1"] = batch_norm(y, params["norm1"], statistics["norm1"], average)
    y = convolve(jax.nn.relu(y), params["conv2"])
    y, moved["norm2"] = batch_norm(y, params["norm2"], statistics["norm2"], average)
    if "shortcut" in params:
        x = convolve(x, params["shortcut"], stride)
    return jax.nn.relu(x + y), moved


def forward(
    params: Tree, statistics: Tree, images: jax.Array, config: ResNetConfig
) -> tuple[jax.Array, Tree]:
    """Logits (batch, classes) of images (batch, image, image, channels), and the moved running averages."""
    moved: Tree = {"blocks": []}
    x = convolve(images, params["stem"])
    x, moved["stem_norm"] = batch_norm(x, params["stem_norm"], statistics["stem_norm"], config.average)
    x = jax.nn.relu(x)
    strides = [
        2 if stage > 0 and block == 0 else 1
        for stage in range(len(config.widths))
        for block in range(config.blocks)
    ]
    for block, averages, stride in zip(params["blocks"], statistics["blocks"], strides, strict=True):
        x, block_moved = residual_block(x, block, averages, stride, config.average)
        moved["blocks"].append(block_moved)
    return jnp.mean(x, axis=(1, 2)) @ params["head"] + params["head_bias"][None, :], moved


def resnet_momentum(config: ResNetConfig = SMALL) -> Program:
    """`train_step(params, statistics, velocity, images, labels) -> (params, statistics, velocity, loss)`."""

    def loss_fn(
        params: Tree, statistics: Tree, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, Tree]:
        logits, moved = forward(params, statistics, images, config)
        wanted = jax.nn.one_hot(labels, config.classes, dtype=logits.dtype)
        return -jnp.mean(jnp.sum(wanted * jax.nn.log_softmax(logits), axis=-1)), moved

    def train_step(
        params: Tree, statistics: Tree, velocity: Tree, images: jax.Array, labels: jax.Array
    ) -> tuple[Tree, Tree, Tree, jax.Array]:
        (loss, statistics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            params, statistics, images, labels
        )
        velocity = jax.tree.map(lambda v, g: config.momentum * v + g, velocity, gradients)
        params = jax.tree.map(lambda p, v: p - config.learning_rate * v, params, velocity)
        return params, statistics, velocity, loss

    def make(key: jax.Array) -> tuple[Any, ...]:
        key_params, key_images, key_labels = jax.random.split(key, 3)
        params, statistics = initial_state(key_params, config)
        velocity = jax.tree.map(jnp.zeros_like, params)
        shape = (config.batch, config.image, config.image, config.channels)
        images = jax.random.normal(key_images, shape, jnp.float32)
        labels = jax.random.randint(key_labels, (config.batch,), 0, config.classes, jnp.int32)
        return params, statistics, velocity, images, labels

    return define("resnet_momentum", train_step, make, donate=(0, 1, 2))


def initial_state(key: jax.Array, config: ResNetConfig) -> tuple[Tree, Tree]:
    """Initial parameters and running averages."""
    keys = iter(jax.random.split(key, 2 + 3 * len(config.widths) * config.blocks))

    def kernel(size: int, inputs: int, outputs: int) -> jax.Array:
        return scaled_normal(next(keys), (size, size, inputs, outputs), size * size * inputs)

    def norm(width: int) -> Tree:
        return {"scale": jnp.ones((width,), jnp.float32), "bias": jnp.zeros((width,), jnp.float32)}

    def averages(width: int) -> Tree:
        return {"mean": jnp.zeros((width,), jnp.float32), "variance": jnp.ones((width,), jnp.float32)}

    inputs = config.widths[0]
    params: Tree = {"stem": kernel(3, config.channels, inputs), "stem_norm": norm(inputs), "blocks": []}
    statistics: Tree = {"stem_norm": averages(inputs), "blocks": []}
    for width in config.widths:
        for _ in range(config.blocks):
            block: Tree = {"conv1": kernel(3, inputs, width), "conv2": kernel(3, width, width)}
            block |= {"norm1": norm(width), "norm2": norm(width)}
            if inputs != width:
                block["shortcut"] = kernel(1, inputs, width)
            params["blocks"].append(block)
            statistics["blocks"].append({"norm1": averages(width), "norm2": averages(width)})
            inputs = width
    params["head"] = scaled_normal(next(keys), (inputs, config.classes), inputs)
    params["head_bias"] = jnp.zeros((config.classes,), jnp.float32)
    return params, statistics
