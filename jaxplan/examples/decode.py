"""Serving: one more token from the decoder of `decoder.py`, with a cache of keys and values."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from .decoder import FULL as FULL_DECODER, SMALL as SMALL_DECODER, DecoderConfig, decoder_params, rms_norm
from .program import Program, define

__all__ = ["FULL", "SMALL", "decode_kv", "empty_cache"]

Tree = dict[str, Any]

SMALL = SMALL_DECODER
FULL = replace(FULL_DECODER, batch=32)


def empty_cache(config: DecoderConfig) -> Tree:
    """Keys and values of all `config.sequence` positions: (layers, batch, sequence, heads, head_width)."""
    shape = (config.layers, config.batch, config.sequence, config.heads, config.head_width)
    return {"k": jnp.zeros(shape, config.compute_dtype), "v": jnp.zeros(shape, config.compute_dtype)}


def block_step(
    x: jax.Array, block: Tree, cache: Tree, position: jax.Array, config: DecoderConfig
) -> tuple[jax.Array, Tree]:
    """One block over one token a row: x is (batch, width), the cache is one layer's."""
    block = {name: w.astype(config.compute_dtype) for name, w in block.items()}
    normal = rms_norm(x, block["attention_scale"])
    q, k, v = (jnp.einsum("bw,whd->bhd", normal, block[name]) for name in ("wq", "wk", "wv"))
    start = jnp.zeros((), position.dtype)
    at = (start, position, start, start)
    cache = {
        "k": jax.lax.dynamic_update_slice(cache["k"], k[:, None], at),
        "v": jax.lax.dynamic_update_slice(cache["v"], v[:, None], at),
    }
    scores = jnp.einsum("bhd,bshd->bhs", q, cache["k"], preferred_element_type=jnp.float32)
    seen = jnp.arange(config.sequence, dtype=position.dtype) <= position
    scores = jnp.where(seen[None, None, :], scores / math.sqrt(config.head_width), -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
    x = x + jnp.einsum("bhs,bshd,hdw->bw", weights, cache["v"], block["wo"])
    hidden = jax.nn.gelu(rms_norm(x, block["mlp_scale"]) @ block["w_up"])
    return x + hidden @ block["w_down"], cache


def decode_kv(config: DecoderConfig = SMALL) -> Program:
    """`decode(params, cache, token, position) -> (cache, logits)`.

    `token` is int32 (batch,), `position` an int32 scalar, `logits` float32 (batch, vocabulary); `params` are
    the scan form's of `decoder.py`.
    """

    def decode(params: Tree, cache: Tree, token: jax.Array, position: jax.Array) -> tuple[Tree, jax.Array]:
        embedding = params["embedding"].astype(config.compute_dtype)
        place = jax.lax.dynamic_index_in_dim(params["positions"], position, keepdims=True)
        x = jnp.take(embedding, token, axis=0) + place.astype(config.compute_dtype)

        def body(x: jax.Array, layer: tuple[Tree, Tree]) -> tuple[jax.Array, Tree]:
            block, layer_cache = layer
            return block_step(x, block, layer_cache, position, config)

        x, cache = jax.lax.scan(body, x, (params["blocks"], cache))
        normal = rms_norm(x, params["final_scale"])
        return cache, jnp.einsum("bw,vw->bv", normal, embedding, preferred_element_type=jnp.float32)

    def make(key: jax.Array) -> tuple[Any, ...]:
        key_params, key_token = jax.random.split(key)
        token = jax.random.randint(key_token, (config.batch,), 0, config.vocabulary, jnp.int32)
        return decoder_params(key_params, config), empty_cache(config), token, jnp.zeros((), jnp.int32)

    return define("decode_kv", decode, make, donate=(1,))
