"""Networks over images as their users write them: ResNet-50 in Flax Linen, ConvNeXt-T in Flax NNX, a diffusion U-Net in Equinox.

Each function gives a whole train step. "published" has the sizes of the paper and is only ever planned from its shapes; "tiny"
is the same code in a second on a CPU. The frameworks are imported where they are used: they are optional.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxplan.examples.program import Program, define

from .common import Size, default_key

__all__ = ["MODELS", "convnext_tiny", "ddpm_unet", "resnet50"]


@dataclass(frozen=True)
class ResNet50Config:
    """He et al., "Deep Residual Learning for Image Recognition", 2016, table 1; batch and image as trained on ImageNet."""

    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    filters: int = 64
    image: int = 224
    classes: int = 1000
    batch: int = 256
    learning_rate: float = 0.1
    weight_decay: float = 1e-4


RESNET50 = {
    "tiny": ResNet50Config(stage_sizes=(1, 1), filters=8, image=32, classes=16, batch=16),
    "published": ResNet50Config(),
}


def resnet50(size: Size) -> Program:
    """`train_step(state, batch) -> (state, metrics)`, after Flax's own ImageNet example: v1.5 blocks, Nesterov momentum."""
    import optax
    from flax import linen as nn
    from flax.training import train_state

    config = RESNET50[size]

    class TrainState(train_state.TrainState):
        batch_stats: Any

    class BottleneckBlock(nn.Module):
        filters: int
        conv: Any
        norm: Any
        strides: tuple[int, int] = (1, 1)

        @nn.compact
        def __call__(self, x):
            residual = x
            y = nn.relu(self.norm()(self.conv(self.filters, (1, 1))(x)))
            y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), self.strides)(y)))
            y = self.conv(self.filters * 4, (1, 1))(y)
            y = self.norm(scale_init=nn.initializers.zeros_init())(y)
            if residual.shape != y.shape:
                residual = self.conv(self.filters * 4, (1, 1), self.strides, name="conv_proj")(residual)
                residual = self.norm(name="norm_proj")(residual)
            return nn.relu(residual + y)

    class ResNet(nn.Module):
        stage_sizes: tuple[int, ...]
        filters: int
        classes: int

        @nn.compact
        def __call__(self, x, train: bool = True):
            conv = partial(nn.Conv, use_bias=False)
            norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
            x = conv(self.filters, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], name="conv_init")(x)
            x = nn.relu(norm(name="bn_init")(x))
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
            for stage, blocks in enumerate(self.stage_sizes):
                for block in range(blocks):
                    strides = (2, 2) if stage > 0 and block == 0 else (1, 1)
                    x = BottleneckBlock(self.filters * 2**stage, conv, norm, strides)(x)
            return nn.Dense(self.classes)(jnp.mean(x, axis=(1, 2)))

    model = ResNet(config.stage_sizes, config.filters, config.classes)
    peak, epoch = config.learning_rate * config.batch / 256, 1_281_167 // config.batch
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps=5 * epoch, decay_steps=100 * epoch)
    optimizer = optax.sgd(schedule, momentum=0.9, nesterov=True)

    def train_step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, Any]]:
        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updates = state.apply_fn(variables, batch["image"], mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
            decay = sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params) if x.ndim > 1)
            return loss + config.weight_decay * 0.5 * decay, (updates, logits)

        (loss, (updates, logits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == batch["label"])
        state = state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"])
        return state, {"loss": loss, "accuracy": accuracy, "learning_rate": schedule(state.step)}

    def make(key: jax.Array) -> tuple[Any, ...]:
        key_params, key_image, key_label = jax.random.split(key, 3)
        variables = model.init(key_params, jnp.ones((1, config.image, config.image, 3), jnp.float32))
        state = TrainState.create(
            apply_fn=model.apply, params=variables["params"], tx=optimizer, batch_stats=variables["batch_stats"]
        )
        image = jax.random.normal(key_image, (config.batch, config.image, config.image, 3), jnp.float32)
        label = jax.random.randint(key_label, (config.batch,), 0, config.classes, jnp.int32)
        return state, {"image": image, "label": label}

    return define("resnet50", train_step, make, donate=(0,))


@dataclass(frozen=True)
class ConvNeXtConfig:
    """ConvNeXt-T of Liu et al., "A ConvNet for the 2020s", 2022, section 2.7; training recipe of its table 5."""

    depths: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    image: int = 224
    classes: int = 1000
    batch: int = 4096
    layer_scale: float = 1e-6
    drop_path: float = 0.1
    label_smoothing: float = 0.1
    learning_rate: float = 4e-3
    weight_decay: float = 0.05


CONVNEXT = {
    "tiny": ConvNeXtConfig(depths=(1, 2), widths=(8, 16), image=32, classes=16, batch=16, layer_scale=0.1),
    "published": ConvNeXtConfig(),
}


def convnext_tiny(size: Size) -> Program:
    """`train_step(state, images, labels) -> (state, loss)`; `state` holds model, optimizer and the keys of stochastic depth."""
    import optax
    from flax import nnx

    config = CONVNEXT[size]

    class Block(nnx.Module):
        def __init__(self, width: int, drop_path: float, *, rngs: nnx.Rngs):
            self.dwconv = nnx.Conv(width, width, (7, 7), feature_group_count=width, rngs=rngs)
            self.norm = nnx.LayerNorm(width, epsilon=1e-6, rngs=rngs)
            self.pwconv1 = nnx.Linear(width, 4 * width, rngs=rngs)
            self.pwconv2 = nnx.Linear(4 * width, width, rngs=rngs)
            self.gamma = nnx.Param(jnp.full((width,), config.layer_scale))
            self.drop_path = nnx.Dropout(drop_path, broadcast_dims=(1, 2, 3), rngs=rngs)

        def __call__(self, x):
            y = self.norm(self.dwconv(x))
            y = self.pwconv2(nnx.gelu(self.pwconv1(y)))
            return x + self.drop_path(self.gamma * y)

    class Downsample(nnx.Module):
        def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
            self.norm = nnx.LayerNorm(inputs, epsilon=1e-6, rngs=rngs)
            self.conv = nnx.Conv(inputs, outputs, (2, 2), strides=2, padding="VALID", rngs=rngs)

        def __call__(self, x):
            return self.conv(self.norm(x))

    class ConvNeXt(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs):
            widths = config.widths
            self.stem = nnx.Conv(3, widths[0], (4, 4), strides=4, padding="VALID", rngs=rngs)
            self.stem_norm = nnx.LayerNorm(widths[0], epsilon=1e-6, rngs=rngs)
            rates = iter(config.drop_path * i / (sum(config.depths) - 1) for i in range(sum(config.depths)))
            layers = []
            for stage, (width, depth) in enumerate(zip(widths, config.depths, strict=True)):
                if stage > 0:
                    layers.append(Downsample(widths[stage - 1], width, rngs=rngs))
                layers += [Block(width, next(rates), rngs=rngs) for _ in range(depth)]
            self.layers = nnx.List(layers)
            self.norm = nnx.LayerNorm(widths[-1], epsilon=1e-6, rngs=rngs)
            self.head = nnx.Linear(widths[-1], config.classes, rngs=rngs)

        def __call__(self, x):
            x = self.stem_norm(self.stem(x))
            for layer in self.layers:
                x = layer(x)
            return self.head(self.norm(x.mean(axis=(1, 2))))

    def create(key: jax.Array) -> tuple[ConvNeXt, nnx.Optimizer]:
        key_params, key_dropout = jax.random.split(key)
        model = ConvNeXt(rngs=nnx.Rngs(params=key_params, dropout=default_key(key_dropout)))
        optimizer = optax.adamw(config.learning_rate, weight_decay=config.weight_decay)
        return model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    graphdef = nnx.graphdef(nnx.eval_shape(create, jax.random.key(0)))

    def train_step(state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
        model, optimizer = nnx.merge(graphdef, state)

        def loss_fn(model: ConvNeXt) -> jax.Array:
            wanted = optax.smooth_labels(jax.nn.one_hot(labels, config.classes), config.label_smoothing)
            return optax.softmax_cross_entropy(model(images), wanted).mean()

        model.train()
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    def make(key: jax.Array) -> tuple[Any, ...]:
        key_state, key_image, key_label = jax.random.split(key, 3)
        images = jax.random.normal(key_image, (config.batch, config.image, config.image, 3), jnp.float32)
        labels = jax.random.randint(key_label, (config.batch,), 0, config.classes, jnp.int32)
        return nnx.state(create(key_state)), images, labels

    return define("convnext_tiny", train_step, make, donate=(0,))


@dataclass(frozen=True)
class UNetConfig:
    """The CIFAR-10 model of Ho et al., "Denoising Diffusion Probabilistic Models", 2020, appendix B."""

    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 2
    attention_at: int = 16
    groups: int = 32
    dropout: float = 0.1
    image: int = 32
    batch: int = 128
    steps: int = 1000
    learning_rate: float = 2e-4
    average: float = 0.9999


UNET = {
    "tiny": UNetConfig(width=8, multipliers=(1, 2), blocks=1, attention_at=4, groups=4, image=8, batch=16, average=0.9),
    "published": UNetConfig(),
}


def ddpm_unet(size: Size) -> Program:
    """`train_step(params, average, opt_state, images, key) -> (params, average, opt_state, key, loss)`, channels first."""
    import equinox as eqx
    import optax

    config = UNET[size]

    class ResBlock(eqx.Module):
        norm1: eqx.nn.GroupNorm
        conv1: eqx.nn.Conv2d
        time: eqx.nn.Linear
        norm2: eqx.nn.GroupNorm
        dropout: eqx.nn.Dropout
        conv2: eqx.nn.Conv2d
        shortcut: eqx.nn.Conv2d | eqx.nn.Identity

        def __init__(self, inputs: int, outputs: int, *, key: jax.Array):
            keys = jax.random.split(key, 4)
            self.norm1 = eqx.nn.GroupNorm(config.groups, inputs)
            self.conv1 = eqx.nn.Conv2d(inputs, outputs, 3, padding=1, key=keys[0])
            self.time = eqx.nn.Linear(4 * config.width, outputs, key=keys[1])
            self.norm2 = eqx.nn.GroupNorm(config.groups, outputs)
            self.dropout = eqx.nn.Dropout(config.dropout)
            self.conv2 = eqx.nn.Conv2d(outputs, outputs, 3, padding=1, key=keys[2])
            changes = inputs != outputs
            self.shortcut = eqx.nn.Conv2d(inputs, outputs, 1, key=keys[3]) if changes else eqx.nn.Identity()

        def __call__(self, x, time, *, key):
            y = self.conv1(jax.nn.silu(self.norm1(x)))
            y = y + self.time(jax.nn.silu(time))[:, None, None]
            y = self.conv2(self.dropout(jax.nn.silu(self.norm2(y)), key=key))
            return self.shortcut(x) + y

    class Attention(eqx.Module):
        norm: eqx.nn.GroupNorm
        qkv: eqx.nn.Conv2d
        out: eqx.nn.Conv2d

        def __init__(self, width: int, *, key: jax.Array):
            key_qkv, key_out = jax.random.split(key)
            self.norm = eqx.nn.GroupNorm(config.groups, width)
            self.qkv = eqx.nn.Conv2d(width, 3 * width, 1, key=key_qkv)
            self.out = eqx.nn.Conv2d(width, width, 1, key=key_out)

        def __call__(self, x):
            channels, height, width = x.shape
            q, k, v = jnp.split(self.qkv(self.norm(x)).reshape(3 * channels, height * width), 3)
            weights = jax.nn.softmax(jnp.einsum("cq,ck->qk", q, k) / jnp.sqrt(channels), axis=-1)
            y = jnp.einsum("qk,ck->cq", weights, v)
            return x + self.out(y.reshape(channels, height, width))

    class Stage(eqx.Module):
        blocks: list[ResBlock]
        attentions: list[Attention | eqx.nn.Identity]
        resize: eqx.nn.Conv2d | None

        def __init__(self, widths: list[tuple[int, int]], attends: bool, resize: eqx.nn.Conv2d | None, *, key: jax.Array):
            keys = jax.random.split(key, (len(widths), 2))
            self.blocks = [ResBlock(i, o, key=k) for (i, o), k in zip(widths, keys[:, 0], strict=True)]
            outputs = [o for _, o in widths]
            self.attentions = [
                Attention(o, key=k) if attends else eqx.nn.Identity() for o, k in zip(outputs, keys[:, 1], strict=True)
            ]
            self.resize = resize

    class UNet(eqx.Module):
        time1: eqx.nn.Linear
        time2: eqx.nn.Linear
        conv_in: eqx.nn.Conv2d
        down: list[Stage]
        middle1: ResBlock
        middle_attention: Attention
        middle2: ResBlock
        up: list[Stage]
        norm_out: eqx.nn.GroupNorm
        conv_out: eqx.nn.Conv2d

        def __init__(self, *, key: jax.Array):
            keys = iter(jax.random.split(key, 16 + 4 * len(config.multipliers)))
            width, image = config.width, config.image
            self.time1 = eqx.nn.Linear(width, 4 * width, key=next(keys))
            self.time2 = eqx.nn.Linear(4 * width, 4 * width, key=next(keys))
            self.conv_in = eqx.nn.Conv2d(3, width, 3, padding=1, key=next(keys))
            skips, self.down, self.up = [width], [], []
            for level, multiplier in enumerate(config.multipliers):
                outputs, last = multiplier * config.width, level == len(config.multipliers) - 1
                widths = [(width if block == 0 else outputs, outputs) for block in range(config.blocks)]
                resize = None if last else eqx.nn.Conv2d(outputs, outputs, 3, stride=2, padding=1, key=next(keys))
                self.down.append(Stage(widths, image == config.attention_at, resize, key=next(keys)))
                skips += [outputs] * (config.blocks + (not last))
                width, image = outputs, image if last else image // 2
            self.middle1 = ResBlock(width, width, key=next(keys))
            self.middle_attention = Attention(width, key=next(keys))
            self.middle2 = ResBlock(width, width, key=next(keys))
            for level, multiplier in reversed(list(enumerate(config.multipliers))):
                outputs = multiplier * config.width
                widths = [((width if block == 0 else outputs) + skips.pop(), outputs) for block in range(config.blocks + 1)]
                resize = None if level == 0 else eqx.nn.Conv2d(outputs, outputs, 3, padding=1, key=next(keys))
                self.up.append(Stage(widths, image == config.attention_at, resize, key=next(keys)))
                width, image = outputs, image if level == 0 else image * 2
            self.norm_out = eqx.nn.GroupNorm(config.groups, width)
            self.conv_out = eqx.nn.Conv2d(width, 3, 3, padding=1, key=next(keys))

        def __call__(self, x, step, *, key):
            keys = iter(jax.random.split(key, 2 + (2 * config.blocks + 1) * len(config.multipliers)))
            time = self.time2(jax.nn.silu(self.time1(timestep_embedding(step, config.width))))
            x = self.conv_in(x)
            skips = [x]
            for stage in self.down:
                for block, attention in zip(stage.blocks, stage.attentions, strict=True):
                    x = attention(block(x, time, key=next(keys)))
                    skips.append(x)
                if stage.resize is not None:
                    x = stage.resize(x)
                    skips.append(x)
            x = self.middle1(x, time, key=next(keys))
            x = self.middle2(self.middle_attention(x), time, key=next(keys))
            for stage in self.up:
                for block, attention in zip(stage.blocks, stage.attentions, strict=True):
                    x = attention(block(jnp.concatenate([x, skips.pop()]), time, key=next(keys)))
                if stage.resize is not None:
                    channels, height, width = x.shape
                    x = stage.resize(jax.image.resize(x, (channels, 2 * height, 2 * width), "nearest"))
            return self.conv_out(jax.nn.silu(self.norm_out(x)))

    static = eqx.partition(eqx.filter_eval_shape(UNet, key=jax.random.key(0)), lambda x: isinstance(x, jax.ShapeDtypeStruct))[1]
    warm_up = optax.linear_schedule(0.0, config.learning_rate, 5000)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(warm_up))
    signal = jnp.cumprod(1.0 - jnp.linspace(1e-4, 0.02, config.steps))

    def denoising_loss(model: UNet, image: jax.Array, step: jax.Array, key: jax.Array) -> jax.Array:
        key_noise, key_dropout = jax.random.split(key)
        noise = jax.random.normal(key_noise, image.shape)
        noisy = jnp.sqrt(signal[step]) * image + jnp.sqrt(1.0 - signal[step]) * noise
        return jnp.mean((model(noisy, step, key=key_dropout) - noise) ** 2)

    def batch_loss(model: UNet, images: jax.Array, key: jax.Array) -> jax.Array:
        key_steps, key_losses = jax.random.split(key)
        steps = jax.random.randint(key_steps, (images.shape[0],), 0, config.steps)
        keys = jax.random.split(key_losses, images.shape[0])
        return jnp.mean(jax.vmap(partial(denoising_loss, model))(images, steps, keys))

    def train_step(params: Any, average: Any, opt_state: Any, images: jax.Array, key: jax.Array) -> tuple[Any, ...]:
        model = eqx.combine(params, static)
        key, key_loss = jax.random.split(key)
        loss, grads = eqx.filter_value_and_grad(batch_loss)(model, images, key_loss)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = eqx.filter(eqx.apply_updates(model, updates), eqx.is_array)
        average = jax.tree.map(lambda a, p: config.average * a + (1.0 - config.average) * p, average, params)
        return params, average, opt_state, key, loss

    def make(key: jax.Array) -> tuple[Any, ...]:
        key_params, key_images, key_step = jax.random.split(key, 3)
        params = eqx.filter(UNet(key=key_params), eqx.is_array)
        images = jax.random.uniform(key_images, (config.batch, 3, config.image, config.image), jnp.float32, -1.0, 1.0)
        return params, params, optimizer.init(params), images, default_key(key_step)

    return define("ddpm_unet", train_step, make, donate=(0, 1, 2))


def timestep_embedding(step: jax.Array, width: int) -> jax.Array:
    """Sines and cosines (width,) of a scalar step at geometric frequencies."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / (half - 1))
    angles = step * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


MODELS: dict[str, Callable[[Size], Program]] = {
    "resnet50": resnet50,
    "convnext_tiny": convnext_tiny,
    "ddpm_unet": ddpm_unet,
}
