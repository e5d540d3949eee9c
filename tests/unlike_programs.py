"""Train steps of models whose layers differ from one another, small: for the tests of stages on sub-meshes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np


def weights(seed):
    """A maker of arrays of a shape, scaled by what they contract."""
    random = np.random.default_rng(seed)

    def make(*shape):
        return jnp.asarray(random.normal(size=shape) / np.sqrt(max(1, np.prod(shape[:-1]))), jnp.float32)

    return make


def conv(x, kernel, stride=1):
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def doubled(x):
    return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)


def trainer(loss, params, clip=None):
    """((state, *batch) -> (state, loss), the first state). Adam; gradients clipped by their global norm, if it is given."""

    def train_step(state, *batch):
        params, (count, means, squares) = state
        value, gradients = jax.value_and_grad(loss)(params, *batch)
        if clip is not None:
            norm = jnp.sqrt(sum([jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(gradients)]))
            gradients = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / norm).astype(g.dtype), gradients)
        count = count + 1
        means = jax.tree.map(lambda a, g: 0.9 * a + 0.1 * g, means, gradients)
        squares = jax.tree.map(lambda a, g: 0.99 * a + 0.01 * g * g, squares, gradients)
        steps = count.astype(jnp.float32)
        first, second = 1 - 0.9**steps, 1 - 0.99**steps

        def updated(p, mean, square):
            change = mean / first.astype(p.dtype) / (jnp.sqrt(square / second.astype(p.dtype)) + 1e-3)
            return p - 0.01 * change

        return (jax.tree.map(updated, params, means, squares), (count, means, squares)), value

    zeros = jax.tree.map(jnp.zeros_like, params)
    return train_step, (params, (jnp.zeros((), jnp.int32), zeros, zeros))


def cross_entropy(logits, labels):
    wanted = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return -jnp.mean(jnp.sum(wanted * jax.nn.log_softmax(logits), -1))


def unet(width=4, batch=16):
    """Two levels down and up, with connections across; no normalisation."""
    w = weights(0)
    params = {
        "down": w(3, 3, 3, width), "deep": w(3, 3, width, 2 * width), "middle": w(3, 3, 2 * width, 2 * width),
        "up": w(3, 3, 4 * width, 2 * width), "top": w(3, 3, 3 * width, width), "out": w(1, 1, width, 2),
    }  # fmt: skip

    def loss(p, x, wanted):
        first = jax.nn.relu(conv(x, p["down"]))
        second = jax.nn.relu(conv(first, p["deep"], 2))
        middle = jax.nn.relu(conv(second, p["middle"], 2))
        up = jax.nn.relu(conv(jnp.concatenate([doubled(middle), second], -1), p["up"]))
        top = jax.nn.relu(conv(jnp.concatenate([doubled(up), first], -1), p["top"]))
        return jnp.mean((conv(top, p["out"]) - wanted) ** 2)

    step, state = trainer(loss, params)
    return step, (state, w(batch, 8, 8, 3), w(batch, 8, 8, 2))


def group_norm(x, scale):
    b, h, w, c = x.shape
    grouped = x.reshape(b, h, w, 2, c // 2)
    mean = grouped.mean((1, 2, 4), keepdims=True)
    variance = ((grouped - mean) ** 2).mean((1, 2, 4), keepdims=True)
    return ((grouped - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(x.shape) * scale.reshape(1, 1, 1, c)


def batch_norm(x, scale):
    mean = x.mean((0, 1, 2), keepdims=True)
    variance = ((x - mean) ** 2).mean((0, 1, 2), keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale.reshape(1, 1, 1, -1)


def residual_network(norm=group_norm, dtype=jnp.float32, masked=False, width=4, batch=16):
    """Three blocks that differ in width, depth and activation; gradients clipped by their global norm."""
    w, double = weights(1), 2 * width
    params = {
        "stem": w(3, 3, 3, width), "head": w(double, 10), "bias": jnp.zeros((10,)),
        "a": {"one": w(3, 3, width, width), "two": w(3, 3, width, width), "scale": jnp.ones((width,))},
        "b": {
            "one": w(3, 3, width, double), "two": w(3, 3, double, double), "scale": jnp.ones((double,)),
            "across": w(1, 1, width, double),
        },
        "c": {
            "one": w(1, 1, double, width), "two": w(3, 3, width, width), "three": w(1, 1, width, double),
            "scale": jnp.ones((double,)),
        },
    }  # fmt: skip
    params = jax.tree.map(lambda p: p.astype(dtype), params)

    def logits_of(p, x):
        x = jax.nn.relu(conv(x, p["stem"]))
        a, b, c = p["a"], p["b"], p["c"]
        x = x + conv(jax.nn.relu(norm(conv(x, a["one"]), a["scale"])), a["two"])
        x = conv(x, b["across"], 2) + conv(jax.nn.relu(norm(conv(x, b["one"], 2), b["scale"])), b["two"])
        x = x + conv(jax.nn.gelu(conv(jax.nn.relu(conv(norm(x, c["scale"]), c["one"])), c["two"])), c["three"])
        return x.mean((1, 2)) @ p["head"] + p["bias"].reshape(1, -1)

    def loss(p, x, labels, *mask):
        logits = logits_of(p, x.astype(dtype)).astype(jnp.float32)
        if not mask:
            return cross_entropy(logits, labels)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]
        return -jnp.sum(picked * mask[0]) / jnp.sum(mask[0])

    step, state = trainer(loss, params, clip=1.0)
    labels = jnp.asarray(np.random.default_rng(2).integers(0, 10, batch), jnp.int32)
    mask = (jnp.asarray(np.arange(batch) % 3 > 0, jnp.float32),) if masked else ()
    return step, (state, w(batch, 8, 8, 3), labels, *mask)


def attention(queries, seen, p):
    scores = jnp.einsum("btd,bsd->bts", queries @ p["q"], seen @ p["k"]) * 0.3
    return (jax.nn.softmax(scores) @ (seen @ p["v"])) @ p["o"]


def encoder_decoder(width=8, batch=16, length=6):
    """Written out: an encoder of two layers, a decoder of one that looks back at itself and one that does not, cross-attention,
    dropout, and one embedding for both ends."""
    w = weights(3)

    def attends():
        return {name: w(width, width) for name in "qkvo"}

    def widened(times):
        return {"up": w(width, times * width), "down": w(times * width, width)}

    params = {
        "embedding": w(16, width),
        "first": {"own": attends(), **widened(2)},
        "second": {"own": attends(), **widened(3)},
        "third": {"own": attends(), "cross": attends(), **widened(2)},
        "fourth": {"cross": attends(), **widened(4)},
    }

    def loss(p, source, target, key):
        h = p["embedding"][source]
        for layer, activation in ((p["first"], jax.nn.gelu), (p["second"], jax.nn.relu)):
            h = h + attention(h, h, layer["own"])
            h = h + activation(h @ layer["up"]) @ layer["down"]
        d = p["embedding"][target[:, :-1]]
        d = d + attention(d, d, p["third"]["own"])
        d = d + attention(d, h, p["third"]["cross"])
        d = jnp.where(jax.random.bernoulli(key, 0.8, d.shape), d / 0.8, 0.0)
        d = d + jax.nn.relu(d @ p["third"]["up"]) @ p["third"]["down"]
        d = d + attention(d, h, p["fourth"]["cross"])
        d = d + jax.nn.silu(d @ p["fourth"]["up"]) @ p["fourth"]["down"]
        return cross_entropy(d @ p["embedding"].T, target[:, 1:])

    step, state = trainer(loss, params)
    random = np.random.default_rng(4)
    source, target = (jnp.asarray(random.integers(0, 16, (batch, n)), jnp.int32) for n in (length, length - 1))
    return step, (state, source, target, jax.random.key(5))


def rms(x):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True) + 1e-6).astype(x.dtype)


def mixer(width=24, tokens=20, batch=24):
    """Tokens mixed and merged, then features, each layer of other extents; bfloat16 inside, dropout, momentum."""
    w = weights(6)
    extents = [(tokens, width), (tokens, 2 * width), (tokens // 2, 3 * width), (tokens // 4, 3 * width), (tokens // 4, 2 * width)]
    layers = [
        {"tokens": w(t, t), "merge": w(t, after), "up": w(d, 3 * d), "down": w(3 * d, e), "across": w(d, e)}
        for (t, d), (after, e) in itertools.pairwise(extents)
    ]
    params = {"in": w(12, width), "layers": layers, "out": w(extents[-1][1], 7)}

    def loss(p, x, wanted, key):
        p = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p)
        h = x.astype(jnp.bfloat16) @ p["in"]
        for number, layer in enumerate(p["layers"]):
            mixed = jnp.swapaxes(jnp.swapaxes(rms(h), 1, 2) @ layer["tokens"], 1, 2)
            kept = jax.random.bernoulli(jax.random.fold_in(key, number), 0.9, mixed.shape)
            h = h + jnp.where(kept, jax.nn.silu(mixed), jnp.bfloat16(0.0))
            h = jnp.swapaxes(jnp.swapaxes(h, 1, 2) @ layer["merge"], 1, 2)
            h = jax.nn.gelu(rms(h) @ layer["up"]) @ layer["down"] + h @ layer["across"]
        found = (rms(h).mean(1) @ p["out"]).astype(jnp.float32)
        return jnp.mean((found - wanted) ** 2)

    def step(state, *batch):
        params, speeds = state
        value, gradients = jax.value_and_grad(loss)(params, *batch)
        speeds = jax.tree.map(lambda v, g: 0.9 * v + g, speeds, gradients)
        return (jax.tree.map(lambda p, v: p - 0.01 * v, params, speeds), speeds), value

    state = params, jax.tree.map(jnp.zeros_like, params)
    return step, (state, w(batch, tokens, 12), w(batch, 7), jax.random.key(7))


def tagger(width=20, length=24, batch=24):
    """Symbols, gated convolutions over time of unlike widths and strides, a recurrence that is one loop, and one tag for all."""
    w = weights(8)
    params = {
        "symbols": w(30, width), "first": w(5, width, 4 * width), "second": w(3, 2 * width, 6 * width),
        "third": w(7, 3 * width, 4 * width), "in": w(2 * width, 3 * width), "round": w(3 * width, 3 * width),
        "out": w(3 * width, 9),
    }  # fmt: skip

    def gated(x, kernel, stride):
        y = jax.lax.conv_general_dilated(x, kernel, (stride,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
        a, b = jnp.split(y, 2, -1)
        return a * jax.nn.sigmoid(b)

    def loss(p, symbols, tags):
        h = p["symbols"][symbols]
        h = gated(h, p["first"], 1)
        h = gated(h, p["second"], 2)
        h = jnp.tanh(gated(h, p["third"], 2))
        seen = jnp.swapaxes(h @ p["in"], 0, 1)
        last, _ = jax.lax.scan(lambda s, x: (jnp.tanh(s @ p["round"] + x), None), jnp.zeros_like(seen[0]), seen)
        return cross_entropy(last @ p["out"], tags)

    def step(state, *batch):
        params, sums = state
        value, gradients = jax.value_and_grad(loss)(params, *batch)
        sums = jax.tree.map(lambda s, g: s + g * g, sums, gradients)
        return (jax.tree.map(lambda p, g, s: p - 0.05 * g * jax.lax.rsqrt(s + 1e-6), params, gradients, sums), sums), value

    random = np.random.default_rng(9)
    symbols, tags = (jnp.asarray(random.integers(0, n, shape), jnp.int32) for n, shape in ((30, (batch, length)), (9, (batch,))))
    return step, ((params, jax.tree.map(jnp.zeros_like, params)), symbols, tags)
