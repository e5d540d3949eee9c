"""Train steps with every layer written out, in plain JAX, at published sizes: what a search meets at depth. Only ever planned."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxplan.examples.adamw import AdamW, adamw_init, adamw_update
from jaxplan.examples.decoder import DecoderConfig, decoder, rms_norm
from jaxplan.examples.initial import scaled_normal
from jaxplan.examples.program import Program, define

from .common import Size
from .decoders import LLAMA, LlamaConfig, rotated

__all__ = ["gpt3_175b", "llama_8b"]

GPT3 = DecoderConfig(
    layers=96, width=12_288, heads=96, mlp_width=49_152, vocabulary=51_200, sequence=2048, batch=1536, compute_dtype=jnp.bfloat16
)
"""GPT-3 175B of Brown et al., "Language Models are Few-Shot Learners", 2020, table 2.1: 3.2 million tokens a step. The vocabulary
is padded as in Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters", SC 2021."""


def gpt3_175b(size: Size, layers: int | None = None) -> Program:
    """The repository's decoder in the shape of GPT-3: its MLP is gelu and its layers are dense, as there."""
    config = GPT3 if size == "published" else replace(GPT3, layers=2, width=64, heads=4, mlp_width=256, vocabulary=256, batch=16)
    config = config if size == "published" else replace(config, sequence=16)
    return decoder(replace(config, layers=layers or config.layers), "unrolled")


def llama_8b(size: Size, layers: int | None = None) -> Program:
    """`train_step(params, opt_state, tokens)` in the shape of Llama 3 8B: grouped queries, rotations, SwiGLU, RMS norms."""
    config = LLAMA[size]
    config = replace(config, layers=layers or config.layers)
    optimizer = AdamW(learning_rate=config.learning_rate, weight_decay=config.weight_decay)

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        x = jnp.take(params["embedding"], tokens[:, :-1], axis=0).astype(config.compute)
        for block in params["blocks"]:
            x = jax.checkpoint(lambda x, block: _layer(x, block, config))(x, block)
        x = rms_norm(x, params["scale"])
        logits = jnp.einsum("bsw,wv->bsv", x, params["head"].astype(config.compute), preferred_element_type=jnp.float32)
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)

    def train_step(params: Any, opt_state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, gradients = jax.value_and_grad(loss_fn)(params, tokens)
        params, opt_state = adamw_update(optimizer, gradients, opt_state, params)
        return params, opt_state, loss

    def make(key: jax.Array) -> tuple[Any, ...]:
        key_params, key_tokens = jax.random.split(key)
        params = _params(key_params, config)
        tokens = jax.random.randint(key_tokens, (config.batch, config.sequence + 1), 0, config.vocabulary, jnp.int32)
        return params, adamw_init(params), tokens

    return define("llama_8b", train_step, make, donate=(0, 1))


def _params(key: jax.Array, config: LlamaConfig) -> dict[str, Any]:
    width, head, mlp = config.width, config.head_width, config.mlp_width
    shapes = {
        "query": (width, config.heads, head), "key": (width, config.groups, head), "value": (width, config.groups, head),
        "out": (config.heads, head, width), "gate": (width, mlp), "up": (width, mlp), "down": (mlp, width),
    }  # fmt: skip
    blocks = []
    for number in range(config.layers):
        keys = jax.random.split(jax.random.fold_in(key, number), len(shapes))
        block = {name: scaled_normal(k, shape, width, jnp.float32) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}
        blocks.append({**block, "attention_scale": jnp.ones((width,)), "mlp_scale": jnp.ones((width,))})
    key_embedding, key_head = jax.random.split(key)
    return {
        "embedding": scaled_normal(key_embedding, (config.vocabulary, width), width, jnp.float32),
        "blocks": blocks,
        "scale": jnp.ones((width,)),
        "head": scaled_normal(key_head, (width, config.vocabulary), width, jnp.float32),
    }


def _layer(x: jax.Array, block: dict[str, jax.Array], config: LlamaConfig) -> jax.Array:
    """One block; x is (batch, sequence, width)."""
    block = {name: value.astype(config.compute) for name, value in block.items()}
    normal = rms_norm(x, block["attention_scale"])
    q, k, v = (jnp.einsum("bsw,whd->bshd", normal, block[name]) for name in ("query", "key", "value"))
    q, k = (jax.vmap(lambda y: rotated(y, config.rotation))(y) for y in (q, k))
    q = q.reshape(*q.shape[:2], config.groups, -1, config.head_width)
    scores = jnp.einsum("bqghd,bkgd->bghqk", q, k, preferred_element_type=jnp.float32) / math.sqrt(config.head_width)
    causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), jnp.bool_))
    weights = jax.nn.softmax(jnp.where(causal[None, None, None], scores, -1e30), axis=-1).astype(v.dtype)
    attended = jnp.einsum("bghqk,bkgd->bqghd", weights, v).reshape(*x.shape[:2], config.heads, config.head_width)
    x = x + jnp.einsum("bshd,hdw->bsw", attended, block["out"])
    normal = rms_norm(x, block["mlp_scale"])
    gated = jax.nn.silu(jnp.einsum("bsw,wm->bsm", normal, block["gate"])) * jnp.einsum("bsw,wm->bsm", normal, block["up"])
    return x + jnp.einsum("bsm,mw->bsw", gated, block["down"])
