"""Large language models as their users write them: Llama and Mixtral in Equinox, Mamba in Flax NNX, all with scanned layers.

Each function gives a whole train step. "published" has the sizes of its source and is only ever planned from its shapes; "tiny"
is the same code in a second on a CPU. The frameworks are imported where they are used: they are optional.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxplan.examples.program import Program, define

from .common import Size

__all__ = ["MODELS", "llama3_8b", "mamba_130m", "mixtral_8x7b"]


@dataclass(frozen=True)
class LlamaConfig:
    """Llama 3 8B of Grattafiori et al., "The Llama 3 Herd of Models", 2024, table 3; first phase of section 3.4.1.

    `groups`: heads of keys and values. `compute`: the type that all but the parameters, moments and logits have. With `experts`,
    every layer has that many feed-forward blocks; a token goes to its `chosen` best, of which each has room for `capacity`
    times its even share of a sequence.
    """

    layers: int = 32
    width: int = 4096
    mlp_width: int = 14_336
    heads: int = 32
    groups: int = 8
    vocabulary: int = 128_256
    sequence: int = 4096
    batch: int = 1024
    rotation: float = 500_000.0
    compute: str = "bfloat16"
    experts: int = 0
    chosen: int = 2
    capacity: float = 1.25
    balance: float = 0.02
    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    warm_up: int = 8000
    steps: int = 1_200_000

    @property
    def head_width(self) -> int:
        """Each head's share of the width."""
        return self.width // self.heads


_TINY = {"layers": 2, "width": 32, "mlp_width": 64, "heads": 4, "groups": 2, "vocabulary": 64, "sequence": 16, "batch": 8}
_TINY |= {"compute": "float32", "warm_up": 1}

LLAMA = {"tiny": LlamaConfig(**_TINY), "published": LlamaConfig()}

MIXTRAL = {
    "tiny": LlamaConfig(**_TINY, experts=4),
    "published": LlamaConfig(vocabulary=32_000, batch=256, rotation=1e6, experts=8),
}
"""Mixtral 8x7B of Jiang et al., "Mixtral of Experts", 2024, table 1. It says nothing of training: rate and schedule are
Llama's, batch and capacity are ours."""


def llama3_8b(size: Size) -> Program:
    """`train_step(params, opt_state, tokens) -> (params, opt_state, loss)`; tokens (batch, sequence + 1)."""
    return _decoder("llama3_8b", LLAMA[size])


def mixtral_8x7b(size: Size) -> Program:
    """The same with a mixture of experts in every layer: top-2 routing, each expert with room for so many tokens."""
    return _decoder("mixtral_8x7b", MIXTRAL[size])


def rotated(x: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding of x (sequence, heads, width): pairs half a width apart turn by position times frequency."""
    positions, half = jnp.arange(x.shape[0], dtype=jnp.float32), x.shape[-1] // 2
    angles = positions[:, None] * base ** -(jnp.arange(half, dtype=jnp.float32) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _decoder(name: str, config: LlamaConfig) -> Program:
    """The model is written for one sequence, and vmapped over the batch."""
    import equinox as eqx
    import optax

    def linear(inputs: int, outputs: int, key: jax.Array) -> eqx.nn.Linear:
        return eqx.nn.Linear(inputs, outputs, use_bias=False, key=key)

    def norm() -> eqx.nn.RMSNorm:
        return eqx.nn.RMSNorm(config.width, use_bias=False)

    class Attention(eqx.Module):
        query: eqx.nn.Linear
        key: eqx.nn.Linear
        value: eqx.nn.Linear
        out: eqx.nn.Linear

        def __init__(self, *, key: jax.Array):
            keys = jax.random.split(key, 4)
            grouped = config.groups * config.head_width
            self.query = linear(config.width, config.width, keys[0])
            self.key = linear(config.width, grouped, keys[1])
            self.value = linear(config.width, grouped, keys[2])
            self.out = linear(config.width, config.width, keys[3])

        def __call__(self, x):
            length = x.shape[0]
            q = rotated(jax.vmap(self.query)(x).reshape(length, config.heads, -1), config.rotation)
            k = rotated(jax.vmap(self.key)(x).reshape(length, config.groups, -1), config.rotation)
            v = jax.vmap(self.value)(x).reshape(length, config.groups, -1)
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            return jax.vmap(self.out)(y.reshape(length, config.width))

    class SwiGLU(eqx.Module):
        gate: eqx.nn.Linear
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __init__(self, *, key: jax.Array):
            keys = jax.random.split(key, 3)
            self.gate = linear(config.width, config.mlp_width, keys[0])
            self.up = linear(config.width, config.mlp_width, keys[1])
            self.down = linear(config.mlp_width, config.width, keys[2])

        def __call__(self, x):
            return jax.vmap(self.down)(jax.nn.silu(jax.vmap(self.gate)(x)) * jax.vmap(self.up)(x))

    class Experts(eqx.Module):
        router: eqx.nn.Linear
        experts: SwiGLU

        def __init__(self, *, key: jax.Array):
            key_router, key_experts = jax.random.split(key)
            self.router = linear(config.width, config.experts, key_router)
            self.experts = eqx.filter_vmap(lambda k: SwiGLU(key=k))(jax.random.split(key_experts, config.experts))

        def __call__(self, x):
            """What the experts make of x (sequence, width), and how unevenly they are used: 1 when all is even."""
            length, chosen = x.shape[0], config.chosen
            gates = jax.nn.softmax(jax.vmap(self.router)(x).astype(jnp.float32), axis=-1)
            weights, picked = jax.lax.top_k(gates, chosen)
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
            share = jnp.mean(jax.nn.one_hot(picked[:, 0], config.experts), axis=0)
            unevenness = config.experts * jnp.sum(share * jnp.mean(gates, axis=0))

            # First choices take slots before second ones, and earlier tokens before later ones; who finds none is passed over.
            expert, token = picked.T.reshape(-1), jnp.tile(jnp.arange(length), chosen)
            before = jnp.cumsum(jax.nn.one_hot(expert, config.experts, dtype=jnp.int32), axis=0) - 1
            slot = jnp.take_along_axis(before, expert[:, None], axis=1)[:, 0]
            room = math.ceil(config.capacity * chosen * length / config.experts)
            tokens = jnp.zeros((config.experts, room, config.width), x.dtype).at[expert, slot].set(x[token], mode="drop")
            made = eqx.filter_vmap(lambda one, tokens: one(tokens))(self.experts, tokens)
            back = made.at[expert, slot].get(mode="fill", fill_value=0)
            weighted = back * weights.T.reshape(-1, 1).astype(x.dtype)
            return jnp.sum(weighted.reshape(chosen, length, config.width), axis=0), unevenness

    class Layer(eqx.Module):
        attention_norm: eqx.nn.RMSNorm
        attention: Attention
        mlp_norm: eqx.nn.RMSNorm
        mlp: SwiGLU | Experts

        def __init__(self, *, key: jax.Array):
            key_attention, key_mlp = jax.random.split(key)
            self.attention_norm, self.mlp_norm = norm(), norm()
            self.attention = Attention(key=key_attention)
            self.mlp = Experts(key=key_mlp) if config.experts else SwiGLU(key=key_mlp)

        def __call__(self, x):
            x = x + self.attention(jax.vmap(self.attention_norm)(x))
            y = self.mlp(jax.vmap(self.mlp_norm)(x))
            y, unevenness = y if config.experts else (y, jnp.zeros(()))
            return x + y, unevenness

    class Decoder(eqx.Module):
        embed: eqx.nn.Embedding
        layers: Layer
        norm: eqx.nn.RMSNorm
        head: eqx.nn.Linear

        def __init__(self, *, key: jax.Array):
            key_embed, key_layers, key_head = jax.random.split(key, 3)
            self.embed = eqx.nn.Embedding(config.vocabulary, config.width, key=key_embed)
            self.layers = eqx.filter_vmap(lambda k: Layer(key=k))(jax.random.split(key_layers, config.layers))
            self.norm = norm()
            self.head = linear(config.width, config.vocabulary, key_head)

        def __call__(self, tokens):
            stacked, rest = eqx.partition(self.layers, eqx.is_array)

            @jax.checkpoint
            def one_layer(x, arrays):
                return eqx.combine(arrays, rest)(x)

            x, unevenness = jax.lax.scan(one_layer, jax.vmap(self.embed)(tokens), stacked)
            return jax.vmap(self.head)(jax.vmap(self.norm)(x)).astype(jnp.float32), jnp.mean(unevenness)

    static = eqx.partition(
        eqx.filter_eval_shape(lambda key: Decoder(key=key), jax.random.key(0)), lambda x: isinstance(x, jax.ShapeDtypeStruct)
    )[1]
    peak = config.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, config.warm_up, config.steps, peak / 100)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=config.weight_decay))

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        model = eqx.combine(jax.tree.map(lambda p: p.astype(config.compute), params), static)
        logits, unevenness = jax.vmap(model)(tokens[:, :-1])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
        return loss + config.balance * jnp.mean(unevenness)

    def train_step(params: Any, opt_state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return eqx.apply_updates(params, updates), opt_state, loss

    def make(key: jax.Array) -> tuple[Any, ...]:
        key_params, key_tokens = jax.random.split(key)
        params = eqx.filter(Decoder(key=key_params), eqx.is_array)
        tokens = jax.random.randint(key_tokens, (config.batch, config.sequence + 1), 0, config.vocabulary, jnp.int32)
        return params, optimizer.init(params), tokens

    return define(name, train_step, make, donate=(0, 1))


@dataclass(frozen=True)
class MambaConfig:
    """Mamba 130M of Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, table 12.

    `inner`, `rank`, `window`: width of the block, of what its step sizes come from, and of its convolution. The vocabulary is
    padded as in the released checkpoint.
    """

    layers: int = 24
    width: int = 768
    inner: int = 1536
    states: int = 16
    rank: int = 48
    window: int = 4
    vocabulary: int = 50_280
    sequence: int = 2048
    batch: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warm_up: int = 480
    steps: int = 4800


MAMBA = {
    "tiny": MambaConfig(layers=2, width=16, inner=32, states=4, rank=4, vocabulary=64, sequence=16, batch=8, warm_up=1),
    "published": MambaConfig(),
}


def selective_scan(u: jax.Array, step: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """y of h' = exp(step a) h + step b u, y = c h, in parallel over time.

    Shapes: u, step and y (batch, time, inner), a (inner, states), b and c (batch, time, states).
    """

    def then(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return first[0] * second[0], second[0] * first[1] + second[1]

    decay = jnp.exp(step[..., None] * a)
    drive = (step * u)[..., None] * b[:, :, None, :]
    _, h = jax.lax.associative_scan(then, (decay, drive), axis=1)
    return jnp.einsum("btis,bts->bti", h, c)


def mamba_130m(size: Size) -> Program:
    """`train_step(state, tokens) -> (state, loss)`; `state` holds model and optimizer, tokens are (batch, sequence + 1)."""
    import optax
    from flax import nnx

    config = MAMBA[size]

    class Mixer(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs):
            inner, states, rank = config.inner, config.states, config.rank
            self.expand = nnx.Linear(config.width, 2 * inner, use_bias=False, rngs=rngs)
            self.conv = nnx.Conv(inner, inner, (config.window,), padding="CAUSAL", feature_group_count=inner, rngs=rngs)
            self.select = nnx.Linear(inner, rank + 2 * states, use_bias=False, rngs=rngs)
            self.step = nnx.Linear(rank, inner, bias_init=nnx.initializers.constant(-4.0), rngs=rngs)
            self.log_a = nnx.Param(jnp.log(jnp.broadcast_to(jnp.arange(1.0, states + 1), (inner, states))))
            self.skip = nnx.Param(jnp.ones((inner,)))
            self.contract = nnx.Linear(inner, config.width, use_bias=False, rngs=rngs)

        def __call__(self, x):
            u, gate = jnp.split(self.expand(x), 2, axis=-1)
            u = nnx.silu(self.conv(u))
            step, b, c = jnp.split(self.select(u), [config.rank, config.rank + config.states], axis=-1)
            y = selective_scan(u, nnx.softplus(self.step(step)), -jnp.exp(self.log_a[...]), b, c)
            return self.contract((y + self.skip[...] * u) * nnx.silu(gate))

    class Block(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs):
            self.norm = nnx.RMSNorm(config.width, epsilon=1e-5, rngs=rngs)
            self.mixer = Mixer(rngs=rngs)

        def __call__(self, x):
            return x + self.mixer(self.norm(x))

    class Mamba(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs):
            @nnx.split_rngs(splits=config.layers)
            @nnx.vmap(in_axes=0, out_axes=0)
            def stacked(rngs: nnx.Rngs) -> Block:
                return Block(rngs=rngs)

            small = nnx.initializers.normal(0.02)
            self.embed = nnx.Embed(config.vocabulary, config.width, embedding_init=small, rngs=rngs)
            self.blocks = stacked(rngs)
            self.norm = nnx.RMSNorm(config.width, epsilon=1e-5, rngs=rngs)

        def __call__(self, tokens):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            @nnx.remat
            def through(x, block):
                return block(x)

            return self.embed.attend(self.norm(through(self.embed(tokens), self.blocks)))

    def create(key: jax.Array) -> tuple[Mamba, nnx.Optimizer]:
        model = Mamba(rngs=nnx.Rngs(params=key))
        schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warm_up, config.steps, 1e-5)
        adam = optax.adamw(schedule, b2=0.95, weight_decay=config.weight_decay)
        return model, nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), adam), wrt=nnx.Param)

    graphdef = nnx.graphdef(nnx.eval_shape(create, jax.random.key(0)))

    def train_step(state: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        model, optimizer = nnx.merge(graphdef, state)

        def loss_fn(model: Mamba) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    def make(key: jax.Array) -> tuple[Any, ...]:
        key_state, key_tokens = jax.random.split(key)
        tokens = jax.random.randint(key_tokens, (config.batch, config.sequence + 1), 0, config.vocabulary, jnp.int32)
        return nnx.state(create(key_state)), tokens

    return define("mamba_130m", train_step, make, donate=(0,))


MODELS: dict[str, Callable[[Size], Program]] = {
    "llama3_8b": llama3_8b,
    "mixtral_8x7b": mixtral_8x7b,
    "mamba_130m": mamba_130m,
}
