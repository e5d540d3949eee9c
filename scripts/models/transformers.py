"""Transformers as their users write them: GPT-2 in Flax Linen, ViT-B/16 in Flax NNX, T5 in Flax Linen with scanned layers.

Each function gives a whole train step. "published" has the sizes of its source and is only ever planned from its shapes; "tiny"
is the same code in a second on a CPU. The frameworks are imported where they are used: they are optional.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxplan.examples.program import Program, define

from .common import Size, default_key

__all__ = ["MODELS", "gpt2_small", "t5_base", "vit_b16"]


@dataclass(frozen=True)
class GPT2Config:
    """The smallest model of Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, table 2.

    Batch and context as in section 2.3. The source does not say how fast it learned: rate, warm-up and decay are nanoGPT's.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50_257
    sequence: int = 1024
    batch: int = 512
    dropout: float = 0.1
    learning_rate: float = 6e-4
    weight_decay: float = 0.1
    warm_up: int = 2000
    steps: int = 600_000


GPT2 = {
    "tiny": GPT2Config(layers=2, width=32, heads=4, vocabulary=61, sequence=16, batch=8, warm_up=1),
    "published": GPT2Config(),
}


def gpt2_small(size: Size) -> Program:
    """`train_step(state, tokens, key) -> (state, loss)`; tokens (batch, sequence + 1). Layers stand one after another."""
    import optax
    from flax import linen as nn
    from flax.training.train_state import TrainState

    config = GPT2[size]
    normal = nn.initializers.normal(0.02)
    into_residual = nn.initializers.normal(0.02 / math.sqrt(2 * config.layers))

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, mask, train):
            attention = nn.MultiHeadDotProductAttention(
                config.heads,
                dropout_rate=config.dropout,
                deterministic=not train,
                kernel_init=normal,
                out_kernel_init=into_residual,
            )
            y = attention(nn.LayerNorm(epsilon=1e-5)(x), mask=mask)
            x = x + nn.Dropout(config.dropout, deterministic=not train)(y)
            y = nn.Dense(4 * config.width, kernel_init=normal)(nn.LayerNorm(epsilon=1e-5)(x))
            y = nn.Dense(config.width, kernel_init=into_residual)(nn.gelu(y))
            return x + nn.Dropout(config.dropout, deterministic=not train)(y)

    class LanguageModel(nn.Module):
        @nn.compact
        def __call__(self, tokens, train: bool = False):
            embed = nn.Embed(config.vocabulary, config.width, embedding_init=normal)
            positions = nn.Embed(config.sequence, config.width, embedding_init=normal)
            x = embed(tokens) + positions(jnp.arange(tokens.shape[-1]))
            x = nn.Dropout(config.dropout, deterministic=not train)(x)
            mask = nn.make_causal_mask(tokens)
            for _ in range(config.layers):
                x = Block()(x, mask, train)
            return embed.attend(nn.LayerNorm(epsilon=1e-5)(x))

    model = LanguageModel()
    peak = config.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, config.warm_up, config.steps, peak / 10)
    matrices = partial(jax.tree.map, lambda p: p.ndim > 1)
    decayed = optax.adamw(schedule, b2=0.95, weight_decay=config.weight_decay, mask=matrices)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), decayed)

    def train_step(state: TrainState, tokens: jax.Array, key: jax.Array) -> tuple[TrainState, jax.Array]:
        def loss_fn(params):
            rngs = {"dropout": jax.random.fold_in(key, state.step)}
            logits = state.apply_fn({"params": params}, tokens[:, :-1], train=True, rngs=rngs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    def make(key: jax.Array) -> tuple[Any, ...]:
        key_params, key_tokens, key_step = jax.random.split(key, 3)
        tokens = jax.random.randint(key_tokens, (config.batch, config.sequence + 1), 0, config.vocabulary, jnp.int32)
        params = model.init(key_params, tokens[:1, :-1])["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=optimizer), tokens, default_key(key_step)

    return define("gpt2_small", train_step, make, donate=(0,))


@dataclass(frozen=True)
class ViTConfig:
    """ViT-B/16 of Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021, table 1; trained on ImageNet as in table 3."""

    layers: int = 12
    width: int = 768
    mlp_width: int = 3072
    heads: int = 12
    patch: int = 16
    image: int = 224
    classes: int = 1000
    batch: int = 4096
    dropout: float = 0.1
    learning_rate: float = 3e-3
    weight_decay: float = 0.3
    warm_up: int = 10_000
    steps: int = 300 * 1_281_167 // 4096


VIT = {
    "tiny": ViTConfig(layers=2, width=32, mlp_width=64, heads=4, patch=4, image=16, classes=16, batch=8, warm_up=1),
    "published": ViTConfig(),
}


def vit_b16(size: Size) -> Program:
    """`train_step(state, images, labels) -> (state, loss)`; `state` holds model, optimizer and the keys of dropout."""
    import optax
    from flax import nnx

    config = VIT[size]
    tokens = (config.image // config.patch) ** 2 + 1

    class Block(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs):
            self.norm1 = nnx.LayerNorm(config.width, epsilon=1e-6, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(config.heads, config.width, decode=False, rngs=rngs)
            self.norm2 = nnx.LayerNorm(config.width, epsilon=1e-6, rngs=rngs)
            self.up = nnx.Linear(config.width, config.mlp_width, rngs=rngs)
            self.down = nnx.Linear(config.mlp_width, config.width, rngs=rngs)
            self.dropout = nnx.Dropout(config.dropout, rngs=rngs)

        def __call__(self, x):
            x = x + self.dropout(self.attention(self.norm1(x)))
            y = self.dropout(nnx.gelu(self.up(self.norm2(x))))
            return x + self.dropout(self.down(y))

    class ViT(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs):
            patch = (config.patch, config.patch)
            self.embed = nnx.Conv(3, config.width, patch, strides=patch, padding="VALID", rngs=rngs)
            self.classifier = nnx.Param(jnp.zeros((1, 1, config.width)))
            self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, tokens, config.width)))
            self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
            self.blocks = nnx.List([Block(rngs=rngs) for _ in range(config.layers)])
            self.norm = nnx.LayerNorm(config.width, epsilon=1e-6, rngs=rngs)
            self.head = nnx.Linear(config.width, config.classes, rngs=rngs)

        def __call__(self, images):
            x = self.embed(images)
            x = x.reshape(x.shape[0], -1, config.width)
            first = jnp.broadcast_to(self.classifier[...], (x.shape[0], 1, config.width))
            x = self.dropout(jnp.concatenate([first, x], axis=1) + self.positions[...])
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x)[:, 0])

    def create(key: jax.Array) -> tuple[ViT, nnx.Optimizer]:
        key_params, key_dropout = jax.random.split(key)
        model = ViT(rngs=nnx.Rngs(params=key_params, dropout=default_key(key_dropout)))
        schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warm_up, config.steps)
        adam = optax.adamw(schedule, weight_decay=config.weight_decay)
        return model, nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), adam), wrt=nnx.Param)

    graphdef = nnx.graphdef(nnx.eval_shape(create, jax.random.key(0)))

    def train_step(state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
        model, optimizer = nnx.merge(graphdef, state)

        def loss_fn(model: ViT) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

        model.train()
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    def make(key: jax.Array) -> tuple[Any, ...]:
        key_state, key_image, key_label = jax.random.split(key, 3)
        images = jax.random.normal(key_image, (config.batch, config.image, config.image, 3), jnp.float32)
        labels = jax.random.randint(key_label, (config.batch,), 0, config.classes, jnp.int32)
        return nnx.state(create(key_state)), images, labels

    return define("vit_b16", train_step, make, donate=(0,))


@dataclass(frozen=True)
class T5Config:
    """T5-Base of Raffel et al., "Exploring the Limits of Transfer Learning", 2020, section 3.1.2.

    `targets`: the spans that were masked in 512 tokens, with their sentinels and the end. Token 0 is padding.
    """

    layers: int = 12
    width: int = 768
    mlp_width: int = 3072
    heads: int = 12
    head_width: int = 64
    vocabulary: int = 32_128
    sequence: int = 512
    targets: int = 114
    batch: int = 128
    buckets: int = 32
    farthest: int = 128
    dropout: float = 0.1
    warm_up: int = 10_000
    factored_from: int = 128


T5 = {
    "tiny": T5Config(
        layers=2, width=32, mlp_width=64, heads=4, head_width=8, vocabulary=64, sequence=16, targets=12, batch=8,
        buckets=8, farthest=16, factored_from=32,
    ),
    "published": T5Config(),
}  # fmt: skip


def t5_base(size: Size) -> Program:
    """`train_step(params, opt_state, inputs, targets, key) -> (params, opt_state, key, loss)`: an encoder and a decoder.

    Layers are scanned and rematerialised; Adafactor, its rate the inverse square root of the step.
    """
    import optax
    from flax import linen as nn

    config = T5[size]
    dense = partial(nn.DenseGeneral, use_bias=False)
    norm = partial(nn.RMSNorm, epsilon=1e-6)

    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x, context, bias, train):
            heads = (config.heads, config.head_width)
            small = nn.initializers.normal((config.width * config.head_width) ** -0.5)
            q = dense(heads, kernel_init=small, name="query")(x)
            k, v = dense(heads, name="key")(context), dense(heads, name="value")(context)
            weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias)
            weights = nn.Dropout(config.dropout, deterministic=not train)(weights)
            y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
            return dense(config.width, axis=(-2, -1), name="out")(y)

    class FeedForward(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            y = nn.relu(dense(config.mlp_width)(x))
            return dense(config.width)(nn.Dropout(config.dropout, deterministic=not train)(y))

    class Layer(nn.Module):
        """Of the encoder, or, where there is something encoded, of the decoder."""

        train: bool

        @nn.compact
        def __call__(self, x, bias, encoded, encoded_bias):
            drop = nn.Dropout(config.dropout, deterministic=not self.train)
            y = norm()(x)
            x = x + drop(Attention()(y, y, bias, self.train))
            if encoded is not None:
                x = x + drop(Attention()(norm()(x), encoded, encoded_bias, self.train))
            return x + drop(FeedForward()(norm()(x), self.train)), None

    class Stack(nn.Module):
        both_ways: bool
        train: bool

        @nn.compact
        def __call__(self, x, mask, encoded=None, encoded_mask=None):
            place = jnp.arange(x.shape[1])
            bucket = relative_bucket(place[None, :] - place[:, None], config, self.both_ways)
            bias = nn.Embed(config.buckets, config.heads, name="relative")(bucket).transpose(2, 0, 1)
            bias = bias[None] + unseen(mask)
            drop = nn.Dropout(config.dropout, deterministic=not self.train)
            layers = nn.scan(
                nn.remat(Layer, prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=config.layers,
            )
            encoded_bias = None if encoded_mask is None else unseen(encoded_mask)
            x, _ = layers(self.train)(drop(x), bias, encoded, encoded_bias)
            return drop(norm()(x))

    class EncoderDecoder(nn.Module):
        @nn.compact
        def __call__(self, inputs, targets, train: bool = False):
            embed = nn.Embed(config.vocabulary, config.width, embedding_init=nn.initializers.normal(1.0))
            seen = (inputs > 0)[:, None, None, :]
            encoded = Stack(True, train, name="encoder")(embed(inputs), seen)
            shifted = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
            causal = nn.make_causal_mask(shifted, dtype=bool)
            x = Stack(False, train, name="decoder")(embed(shifted), causal, encoded, seen)
            return embed.attend(x / math.sqrt(config.width))

    model = EncoderDecoder()

    def rate(step: jax.Array) -> jax.Array:
        return jax.lax.rsqrt(jnp.maximum(step, config.warm_up).astype(jnp.float32))

    optimizer = optax.adafactor(rate, min_dim_size_to_factor=config.factored_from)

    def loss_fn(params: Any, inputs: jax.Array, targets: jax.Array, key: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, inputs, targets, train=True, rngs={"dropout": key})
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(losses, where=targets > 0) / jnp.sum(targets > 0)

    def train_step(params: Any, opt_state: Any, inputs: jax.Array, targets: jax.Array, key: jax.Array) -> tuple[Any, ...]:
        key, key_drop = jax.random.split(key)
        loss, grads = jax.value_and_grad(loss_fn)(params, inputs, targets, key_drop)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, key, loss

    def make(key: jax.Array) -> tuple[Any, ...]:
        key_params, key_step, *keys = jax.random.split(key, 6)

        def text(key: jax.Array, key_length: jax.Array, length: int) -> jax.Array:
            ids = jax.random.randint(key, (config.batch, length), 1, config.vocabulary, jnp.int32)
            lengths = jax.random.randint(key_length, (config.batch, 1), length // 2, length + 1, jnp.int32)
            return jnp.where(jnp.arange(length) < lengths, ids, 0)

        inputs, targets = text(*keys[:2], config.sequence), text(*keys[2:], config.targets)
        params = model.init(key_params, inputs[:1], targets[:1])["params"]
        return params, optimizer.init(params), inputs, targets, default_key(key_step)

    return define("t5_base", train_step, make, donate=(0, 1))


def unseen(mask: jax.Array) -> jax.Array:
    """What to add to the scores of attention: nothing where `mask` is true, else as good as minus infinity."""
    return jnp.where(mask, 0.0, -1e9)


def relative_bucket(offset: jax.Array, config: T5Config, both_ways: bool) -> jax.Array:
    """Bucket of each offset of a key from its query: one each for the nearest, then wider and wider, beyond `farthest` one."""
    buckets, start = config.buckets, jnp.zeros_like(offset)
    if both_ways:
        buckets //= 2
        start = jnp.where(offset > 0, buckets, 0)
    distance = jnp.abs(offset) if both_ways else jnp.maximum(-offset, 0)
    single = buckets // 2
    growth = jnp.log(jnp.maximum(distance, 1) / single) / math.log(config.farthest / single)
    wide = jnp.minimum(single + (growth * (buckets - single)).astype(jnp.int32), buckets - 1)
    return start + jnp.where(distance < single, distance, wide)


MODELS: dict[str, Callable[[Size], Program]] = {
    "gpt2_small": gpt2_small,
    "vit_b16": vit_b16,
    "t5_base": t5_base,
}
