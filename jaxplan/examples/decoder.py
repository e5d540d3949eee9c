"""A decoder language model and its train step, in two forms: a scan over stacked layers, and unrolled.

Pre-norm blocks, causal multi-head attention, a gelu MLP, learned positions, an embedding tied to the output
projection, cross-entropy in float32, AdamW. Every block is rematerialised in the backward pass.

Nothing here knows of meshes. The one concession to experts is `constrain`, called with the name of a place
and the array that passes through it; it is the identity unless somebody (`by_hand`) says otherwise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .adamw import AdamW, adamw_init, adamw_update
from .initial import FLOAT32, scaled_normal
from .program import Program, define

__all__ = [
    "FULL",
    "SMALL",
    "Constrain",
    "DecoderConfig",
    "Form",
    "decoder",
    "decoder_loss",
    "decoder_params",
    "decoder_train_step",
    "rms_norm",
    "unstacked",
]

Form = Literal["scan", "unrolled"]
Constrain = Callable[[str, jax.Array], jax.Array]
Params = dict[str, Any]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and choices of the decoder. The defaults are the small size.

    Attributes:
      dtype: of the parameters, the gradients and the optimizer's moments.
      compute_dtype: of the activations and the matrix multiplications; the loss is float32 regardless.
      remat: recompute each block in the backward pass instead of keeping its intermediates.
      fuse_projections: multiply the queries', keys' and values' weights as one stacked array. The values are
        the same; the backward pass has one matrix multiplication for the three, so that tensor parallelism
        sums one partial gradient instead of three.
    """

    layers: int = 4
    width: int = 64
    heads: int = 8
    mlp_width: int = 128
    vocabulary: int = 256
    sequence: int = 16
    batch: int = 16
    dtype: jnp.dtype = FLOAT32
    compute_dtype: jnp.dtype = FLOAT32
    remat: bool = True
    fuse_projections: bool = False
    optimizer: AdamW = field(default_factory=AdamW)

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    @property
    def head_width(self) -> int:
        return self.width // self.heads


SMALL = DecoderConfig()
FULL = DecoderConfig(
    layers=12, width=1024, heads=16, mlp_width=4096, vocabulary=32000, sequence=1024, batch=64,
    optimizer=AdamW(learning_rate=3e-4),
)  # fmt: skip


def identity(where: str, x: jax.Array) -> jax.Array:
    """The hook of someone who leaves the layout alone."""
    return x


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Root-mean-square norm over the last dimension, in float32; x is (..., width), scale is (width,)."""
    wide = x.astype(jnp.float32)
    normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + scale.shape)
    return (normal * scale).astype(x.dtype)


def project(x: jax.Array, block: Params, config: DecoderConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values, each (batch, sequence, heads, head_width), of x (batch, sequence, width)."""
    weights = (block["wq"], block["wk"], block["wv"])
    if config.fuse_projections:
        q, k, v = jnp.einsum("bsw,twhd->tbshd", x, jnp.stack(weights))
        return q, k, v
    q, k, v = (jnp.einsum("bsw,whd->bshd", x, w) for w in weights)
    return q, k, v


def attention(x: jax.Array, block: Params, config: DecoderConfig, constrain: Constrain) -> jax.Array:
    """Causal multi-head attention over x (batch, sequence, width)."""
    q, k, v = project(x, block, config)
    q, k, v = constrain("q", q), constrain("k", k), constrain("v", v)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), jnp.bool_))
    scores = jnp.where(causal[None, None], scores / math.sqrt(config.head_width), -1e30)
    weights = jax.nn.softmax(constrain("scores", scores), axis=-1).astype(v.dtype)
    attended = constrain("attended", jnp.einsum("bhqk,bkhd->bqhd", weights, v))
    return jnp.einsum("bqhd,hdw->bqw", attended, block["wo"])


def mlp(x: jax.Array, block: Params, constrain: Constrain) -> jax.Array:
    """Two-layer gelu perceptron over x (batch, sequence, width)."""
    hidden = constrain("mlp_hidden", jnp.einsum("bsw,wm->bsm", x, block["w_up"]))
    return jnp.einsum("bsm,mw->bsw", jax.nn.gelu(hidden), block["w_down"])


def apply_block(x: jax.Array, block: Params, config: DecoderConfig, constrain: Constrain) -> jax.Array:
    """One decoder block; x is (batch, sequence, width)."""
    block = {name: constrain(f"weights/{name}", w).astype(config.compute_dtype) for name, w in block.items()}
    x = constrain("residual", x)
    normal = constrain("norm", rms_norm(x, block["attention_scale"]))
    x = constrain("residual", x + constrain("projected", attention(normal, block, config, constrain)))
    normal = constrain("norm", rms_norm(x, block["mlp_scale"]))
    return constrain("residual", x + constrain("projected", mlp(normal, block, constrain)))


def decoder_loss(
    params: Params, batch: dict[str, jax.Array], config: DecoderConfig, constrain: Constrain = identity
) -> jax.Array:
    """Mean cross-entropy in nats of `batch["targets"]` given `batch["tokens"]`, both (batch, sequence)."""
    embedding = constrain("weights/embedding", params["embedding"]).astype(config.compute_dtype)
    positions = constrain("weights/positions", params["positions"]).astype(config.compute_dtype)
    final_scale = constrain("weights/final_scale", params["final_scale"])
    x = constrain("embedded", jnp.take(embedding, batch["tokens"], axis=0))
    x = constrain("residual", x + positions[None])

    def body(x: jax.Array, block: Params) -> tuple[jax.Array, None]:
        return apply_block(x, block, config, constrain), None

    if config.remat:
        body = jax.checkpoint(body)
    if isinstance(params["blocks"], list):
        for block in params["blocks"]:
            x, _ = body(x, block)
    else:
        x, _ = jax.lax.scan(body, x, params["blocks"])

    normal = constrain("final_norm", rms_norm(x, final_scale))
    logits = jnp.einsum("bsw,vw->bsv", normal, embedding, preferred_element_type=jnp.float32)
    logits = constrain("logits", logits)
    chosen = jnp.take_along_axis(logits, batch["targets"][:, :, None], axis=-1)[:, :, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


def decoder_train_step(
    config: DecoderConfig, constrain: Constrain = identity
) -> Callable[..., tuple[Params, dict[str, Any], jax.Array]]:
    """`train_step(params, opt_state, batch) -> (params, opt_state, loss)`, for parameters of either form."""

    def train_step(
        params: Params, opt_state: dict[str, Any], batch: dict[str, jax.Array]
    ) -> tuple[Params, dict[str, Any], jax.Array]:
        loss, gradients = jax.value_and_grad(decoder_loss)(params, batch, config, constrain)
        params, opt_state = adamw_update(config.optimizer, gradients, opt_state, params)
        return params, opt_state, loss

    return train_step


def decoder_params(key: jax.Array, config: DecoderConfig, form: Form = "scan") -> Params:
    """Initial parameters; both forms hold the same values for the same key."""
    width, heads, head_width, mlp_width = config.width, config.heads, config.head_width, config.mlp_width
    shapes = {
        "wq": ((width, heads, head_width), width),
        "wk": ((width, heads, head_width), width),
        "wv": ((width, heads, head_width), width),
        "wo": ((heads, head_width, width), width * 2 * config.layers),
        "w_up": ((width, mlp_width), width),
        "w_down": ((mlp_width, width), mlp_width * 2 * config.layers),
    }
    key_embedding, key_positions, *keys = jax.random.split(key, 2 + len(shapes))
    blocks = {
        name: scaled_normal(k, (config.layers, *shape), fan_in, config.dtype)
        for k, (name, (shape, fan_in)) in zip(keys, shapes.items(), strict=True)
    }
    for name in ("attention_scale", "mlp_scale"):
        blocks[name] = jnp.ones((config.layers, width), config.dtype)
    params = {
        "embedding": scaled_normal(key_embedding, (config.vocabulary, width), width, config.dtype),
        "positions": scaled_normal(key_positions, (config.sequence, width), width, config.dtype),
        "final_scale": jnp.ones((width,), config.dtype),
        "blocks": blocks,
    }
    return params if form == "scan" else unstacked(params)


def unstacked(params: Params) -> Params:
    """The unrolled form's parameters: the scan form's, with a list of blocks for the stacked ones."""
    layers = len(params["blocks"]["wq"])
    blocks = [jax.tree.map(lambda w: w[layer], params["blocks"]) for layer in range(layers)]  # noqa: B023
    return {**params, "blocks": blocks}


def decoder(config: DecoderConfig = SMALL, form: Form = "scan") -> Program:
    """The train step `(params, opt_state, batch) -> (params, opt_state, loss)` of a decoder.

    `batch` is `{"tokens": int32 (batch, sequence), "targets": int32 (batch, sequence)}`. Raises ValueError
    for a form other than "scan" and "unrolled".
    """
    if form not in ("scan", "unrolled"):
        raise ValueError(f"form is {form!r}; it may be 'scan' or 'unrolled'")

    def make(key: jax.Array) -> tuple[Any, ...]:
        key_params, key_tokens = jax.random.split(key)
        params = decoder_params(key_params, config, form)
        text = jax.random.randint(
            key_tokens, (config.batch, config.sequence + 1), 0, config.vocabulary, jnp.int32
        )
        return params, adamw_init(params), {"tokens": text[:, :-1], "targets": text[:, 1:]}

    return define(f"decoder_{form}", decoder_train_step(config), make, donate=(0, 1))
