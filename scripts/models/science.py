"""Programs beside images and transformers: a recurrent language model, a graph network, PPO, neural differential equations and
Gaussian processes.

Each function gives a whole train step. "published" has the sizes of its source and is only ever planned from its shapes; "tiny"
is the same code in a second on a CPU. The frameworks are imported where they are used: they are optional.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxplan.examples.initial import scaled_normal
from jaxplan.examples.program import Program, define

from .common import Size, default_key

__all__ = [
    "MODELS",
    "gaussian_process",
    "lstm_language_model",
    "molecule_graph_network",
    "neural_ode",
    "neural_ode_adaptive",
    "ppo_update",
]

Tree = dict[str, Any]


@dataclass(frozen=True)
class LanguageConfig:
    """The large model of Zaremba et al., "Recurrent Neural Network Regularization", 2014, section 4.1 (Penn Treebank)."""

    vocabulary: int = 10_000
    width: int = 1500
    layers: int = 2
    steps: int = 35
    batch: int = 20
    keep: float = 0.35
    scale: float = 0.04
    clip: float = 10.0
    learning_rate: float = 1.0


LANGUAGE = {"tiny": LanguageConfig(vocabulary=64, width=16, steps=8, batch=16), "published": LanguageConfig()}


def lstm_language_model(size: Size) -> Program:
    """Haiku: `train_step(params, opt_state, memory, tokens, key) -> (params, opt_state, memory, key, loss)`.

    tokens (steps + 1, batch), time first; `memory` is carried from one stretch of text to the next, without gradients.
    """
    import haiku as hk
    import optax

    config = LANGUAGE[size]

    def network(tokens: jax.Array, memory: Any, train: bool) -> tuple[jax.Array, Any]:
        uniform = hk.initializers.RandomUniform(-config.scale, config.scale)

        def drop(x: Any) -> jax.Array:
            return hk.dropout(hk.next_rng_key(), 1.0 - config.keep, x) if train else x

        x = drop(hk.Embed(config.vocabulary, config.width, w_init=uniform)(tokens))
        carried = []
        for layer, state in enumerate(memory):
            x, state = hk.dynamic_unroll(hk.LSTM(config.width, name=f"lstm_{layer}"), x, state)
            x = drop(x)
            carried.append(state)
        return hk.Linear(config.vocabulary, w_init=uniform, b_init=uniform)(x), carried

    model = hk.transform(network)
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip), optax.sgd(config.learning_rate))

    def loss_fn(params: hk.Params, memory: Any, tokens: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        logits, memory = model.apply(params, key, tokens[:-1], memory, True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:])
        return jnp.mean(jnp.sum(losses, axis=0)), memory

    def train_step(params: hk.Params, opt_state: Any, memory: Any, tokens: jax.Array, key: jax.Array) -> tuple[Any, ...]:
        key, key_drop = jax.random.split(key)
        (loss, memory), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, memory, tokens, key_drop)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, memory, key, loss / config.steps

    def make(key: jax.Array) -> tuple[Any, ...]:
        key_params, key_tokens, key_step = jax.random.split(key, 3)
        zeros = jnp.zeros((config.batch, config.width), jnp.float32)
        memory = [hk.LSTMState(hidden=zeros, cell=zeros) for _ in range(config.layers)]
        tokens = jax.random.randint(key_tokens, (config.steps + 1, config.batch), 0, config.vocabulary, jnp.int32)
        params = model.init(default_key(key_params), tokens[:-1], memory, False)
        return params, optimizer.init(params), memory, tokens, default_key(key_step)

    return define("lstm_language_model", train_step, make, donate=(0, 1, 2))


@dataclass(frozen=True)
class GraphConfig:
    """Flax's example `ogbg_molpcba`, configuration `default_graph_net`: a graph network (Battaglia et al., 2018) on molecules.

    `nodes`, `edges`: its padding budget for 256 molecules of 27 nodes (one virtual) and 135.2 edges (both directions, loops).
    """

    nodes: int = 6976
    edges: int = 34624
    graphs: int = 256
    node_features: int = 9
    edge_features: int = 3
    classes: int = 128
    width: int = 256
    rounds: int = 5
    dropout: float = 0.1
    learning_rate: float = 1e-3


GRAPH = {"tiny": GraphConfig(nodes=64, edges=128, graphs=8, classes=8, width=16, rounds=2), "published": GraphConfig()}


def molecule_graph_network(size: Size) -> Program:
    """`train_step(params, opt_state, graph, labels, key) -> (params, opt_state, loss)`.

    `graph`: nodes (n, features), edges (e, features), senders and receivers (e,), n_node and n_edge (graphs,). Missing labels
    are NaN.
    """
    import optax

    config = GRAPH[size]
    optimizer = optax.adam(config.learning_rate)

    def linear(params: Tree, x: jax.Array) -> jax.Array:
        return x @ params["w"] + params["b"]

    def update(params: Tree, inputs: list[jax.Array], key: jax.Array) -> jax.Array:
        x = jax.nn.relu(linear(params, jnp.concatenate(inputs, axis=-1)))
        kept = jax.random.bernoulli(key, 1.0 - config.dropout, x.shape)
        return jnp.where(kept, x / (1.0 - config.dropout), 0.0)

    def layer_norm(params: Tree, x: jax.Array) -> jax.Array:
        mean = jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.var(x, axis=-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-6) * params["scale"] + params["bias"]

    def forward(params: Tree, graph: Tree, key: jax.Array) -> jax.Array:
        senders, receivers = graph["senders"], graph["receivers"]
        ids = jnp.arange(config.graphs)
        graph_of_node = jnp.repeat(ids, graph["n_node"], total_repeat_length=config.nodes)
        graph_of_edge = jnp.repeat(ids, graph["n_edge"], total_repeat_length=config.edges)
        nodes = linear(params["embed_nodes"], graph["nodes"])
        edges = linear(params["embed_edges"], graph["edges"])
        context = jnp.zeros((config.graphs, config.width))
        for layer, key_layer in zip(params["rounds"], jax.random.split(key, config.rounds), strict=True):
            keys = jax.random.split(key_layer, 3)
            new_edges = update(layer["edges"], [edges, nodes[senders], nodes[receivers], context[graph_of_edge]], keys[0])
            sent = jax.ops.segment_sum(new_edges, senders, config.nodes)
            received = jax.ops.segment_sum(new_edges, receivers, config.nodes)
            new_nodes = update(layer["nodes"], [nodes, sent, received, context[graph_of_node]], keys[1])
            all_nodes = jax.ops.segment_sum(new_nodes, graph_of_node, config.graphs)
            all_edges = jax.ops.segment_sum(new_edges, graph_of_edge, config.graphs)
            new_context = update(layer["context"], [all_nodes, all_edges, context], keys[2])
            nodes = layer_norm(layer["node_norm"], nodes + new_nodes)
            edges = layer_norm(layer["edge_norm"], edges + new_edges)
            context = layer_norm(layer["context_norm"], context + new_context)
        return linear(params["decode"], context)

    def loss_fn(params: Tree, graph: Tree, labels: jax.Array, key: jax.Array) -> jax.Array:
        logits = forward(params, graph, key)
        known = ~jnp.isnan(labels)
        losses = optax.sigmoid_binary_cross_entropy(logits, jnp.where(known, labels, 0.0))
        return jnp.sum(jnp.where(known, losses, 0.0)) / jnp.sum(known)

    def train_step(params: Tree, opt_state: Any, graph: Tree, labels: jax.Array, key: jax.Array) -> tuple[Any, ...]:
        loss, grads = jax.value_and_grad(loss_fn)(params, graph, labels, key)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    def make(key: jax.Array) -> tuple[Any, ...]:
        key_params, key_graph, key_labels, key_step = jax.random.split(key, 4)
        keys = iter(jax.random.split(key_params, 3 + 3 * config.rounds))
        width = config.width

        def dense(inputs: int, outputs: int) -> Tree:
            return {"w": scaled_normal(next(keys), (inputs, outputs), inputs), "b": jnp.zeros((outputs,), jnp.float32)}

        def norm() -> Tree:
            return {"scale": jnp.ones((width,), jnp.float32), "bias": jnp.zeros((width,), jnp.float32)}

        def one_round() -> Tree:
            layer = {"edges": dense(4 * width, width), "nodes": dense(4 * width, width), "context": dense(3 * width, width)}
            return layer | {"node_norm": norm(), "edge_norm": norm(), "context_norm": norm()}

        params = {
            "embed_nodes": dense(config.node_features, width),
            "embed_edges": dense(config.edge_features, width),
            "rounds": [one_round() for _ in range(config.rounds)],
            "decode": dense(width, config.classes),
        }
        labels = jax.random.uniform(key_labels, (config.graphs, config.classes))
        labels = jnp.where(labels < 0.3, jnp.nan, jnp.where(labels < 0.9, 0.0, 1.0))
        graph = random_molecules(key_graph, config)
        return params, optimizer.init(params), graph, labels, default_key(key_step)

    return define("molecule_graph_network", train_step, make, donate=(0, 1))


def random_molecules(key: jax.Array, config: GraphConfig) -> Tree:
    """Graphs of equal sizes, what does not divide being the last one's, with edges between random nodes of each."""
    key_nodes, key_edges, *keys = jax.random.split(key, 4)

    def share(total: int) -> jax.Array:
        return jnp.full((config.graphs,), total // config.graphs, jnp.int32).at[-1].add(total % config.graphs)

    def ends(key: jax.Array) -> jax.Array:
        graph = jnp.minimum(jnp.arange(config.edges) // (config.edges // config.graphs), config.graphs - 1)
        least = config.nodes // config.graphs
        return graph * least + jax.random.randint(key, (config.edges,), 0, least, jnp.int32)

    return {
        "nodes": jax.random.normal(key_nodes, (config.nodes, config.node_features)),
        "edges": jax.random.normal(key_edges, (config.edges, config.edge_features)),
        "senders": ends(keys[0]),
        "receivers": ends(keys[1]),
        "n_node": share(config.nodes),
        "n_edge": share(config.edges),
    }


@dataclass(frozen=True)
class PPOConfig:
    """PureJaxRL's `ppo_continuous_action`: PPO (Schulman et al., 2017) on Brax's hopper, 11 observations and 3 actions."""

    observations: int = 11
    actions: int = 3
    width: int = 256
    environments: int = 2048
    steps: int = 10
    epochs: int = 4
    minibatches: int = 32
    discount: float = 0.99
    trace: float = 0.95
    clip: float = 0.2
    value_weight: float = 0.5
    entropy_weight: float = 0.0
    gradient_norm: float = 0.5
    learning_rate: float = 3e-4


PPO = {
    "tiny": PPOConfig(observations=4, actions=2, width=16, environments=16, steps=8, epochs=2, minibatches=4),
    "published": PPOConfig(),
}


class Transition(NamedTuple):
    """One step of all environments; in a rollout, time leads."""

    observation: jax.Array
    action: jax.Array
    log_probability: jax.Array
    value: jax.Array
    reward: jax.Array
    done: jax.Array


def ppo_update(size: Size) -> Program:
    """`update(params, opt_state, rollout, last, key) -> (params, opt_state, key, metrics)`: every epoch over one rollout.

    `last`: the observation after it.
    """
    import optax

    config = PPO[size]
    optimizer = optax.chain(optax.clip_by_global_norm(config.gradient_norm), optax.adam(config.learning_rate, eps=1e-5))

    def mlp(layers: list[Tree], x: jax.Array) -> jax.Array:
        for layer in layers[:-1]:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return x @ layers[-1]["w"] + layers[-1]["b"]

    def value_of(params: Tree, observation: jax.Array) -> jax.Array:
        return jnp.squeeze(mlp(params["critic"], observation), axis=-1)

    def log_probability(params: Tree, observation: jax.Array, action: jax.Array) -> jax.Array:
        mean, log_std = mlp(params["actor"], observation), params["log_std"]
        terms = jnp.square((action - mean) / jnp.exp(log_std)) + 2.0 * log_std + jnp.log(2.0 * jnp.pi)
        return -0.5 * jnp.sum(terms, axis=-1)

    def advantages(rollout: Transition, last_value: jax.Array) -> jax.Array:
        def backward(carry: Any, step: Transition) -> tuple[Any, jax.Array]:
            advantage, next_value = carry
            alive = 1.0 - step.done
            delta = step.reward + config.discount * next_value * alive - step.value
            advantage = delta + config.discount * config.trace * alive * advantage
            return (advantage, step.value), advantage

        start = (jnp.zeros_like(last_value), last_value)
        return jax.lax.scan(backward, start, rollout, reverse=True, unroll=16)[1]

    def loss_fn(params: Tree, batch: Transition, advantage: jax.Array, target: jax.Array) -> tuple[jax.Array, Any]:
        value = value_of(params, batch.observation)
        clipped = batch.value + jnp.clip(value - batch.value, -config.clip, config.clip)
        value_loss = 0.5 * jnp.mean(jnp.maximum(jnp.square(value - target), jnp.square(clipped - target)))
        ratio = jnp.exp(log_probability(params, batch.observation, batch.action) - batch.log_probability)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        limited = jnp.clip(ratio, 1.0 - config.clip, 1.0 + config.clip)
        policy_loss = -jnp.mean(jnp.minimum(ratio * advantage, limited * advantage))
        entropy = jnp.sum(params["log_std"] + 0.5 * jnp.log(2.0 * jnp.pi * jnp.e))
        loss = policy_loss + config.value_weight * value_loss - config.entropy_weight * entropy
        return loss, {"policy": policy_loss, "value": value_loss, "entropy": entropy}

    def update(params: Tree, opt_state: Any, rollout: Transition, last: jax.Array, key: jax.Array) -> tuple[Any, ...]:
        advantage = advantages(rollout, value_of(params, last))
        size = config.steps * config.environments
        samples = jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), (rollout, advantage, advantage + rollout.value))

        def on_minibatch(state: Any, minibatch: Any) -> tuple[Any, Any]:
            params, opt_state = state
            (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, *minibatch)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), metrics | {"loss": loss}

        def on_epoch(state: Any, _: None) -> tuple[Any, Any]:
            *trained, key = state
            key, key_order = jax.random.split(key)
            order = jax.random.permutation(key_order, size)
            shuffled = jax.tree.map(lambda x: jnp.take(x, order, axis=0), samples)
            minibatches = jax.tree.map(lambda x: x.reshape(config.minibatches, -1, *x.shape[1:]), shuffled)
            trained, metrics = jax.lax.scan(on_minibatch, tuple(trained), minibatches)
            return (*trained, key), metrics

        (params, opt_state, key), metrics = jax.lax.scan(on_epoch, (params, opt_state, key), None, config.epochs)
        return params, opt_state, key, jax.tree.map(jnp.mean, metrics)

    def make(key: jax.Array) -> tuple[Any, ...]:
        key_actor, key_critic, key_rollout, key_step = jax.random.split(key, 4)

        def layers(key: jax.Array, outputs: int, scale: float) -> list[Tree]:
            sizes = [config.observations, config.width, config.width, outputs]
            init = [jax.nn.initializers.orthogonal(s) for s in (math.sqrt(2.0), math.sqrt(2.0), scale)]
            return [
                {"w": one(k, (i, o), jnp.float32), "b": jnp.zeros((o,), jnp.float32)}
                for one, k, i, o in zip(init, jax.random.split(key, 3), sizes[:-1], sizes[1:], strict=True)
            ]

        params = {
            "actor": layers(key_actor, config.actions, 0.01),
            "critic": layers(key_critic, 1, 1.0),
            "log_std": jnp.zeros((config.actions,), jnp.float32),
        }
        keys = jax.random.split(key_rollout, 5)
        many = (config.steps, config.environments)
        observation = jax.random.normal(keys[0], (*many, config.observations))
        action = jax.random.normal(keys[1], (*many, config.actions))
        rollout = Transition(
            observation=observation,
            action=action,
            log_probability=log_probability(params, observation, action),
            value=value_of(params, observation),
            reward=jax.random.normal(keys[2], many),
            done=jax.random.bernoulli(keys[3], 0.05, many).astype(jnp.float32),
        )
        last = jax.random.normal(keys[4], (config.environments, config.observations))
        return params, optimizer.init(params), rollout, last, default_key(key_step)

    return define("ppo_update", update, make, donate=(0, 1))


@dataclass(frozen=True)
class ODEConfig:
    """The generative half of the latent ODE of Rubanova et al., 2019, on MuJoCo's hopper, as its README runs it.

    `substeps`: of RK4 between two times of observation.
    """

    trajectories: int = 10_000
    times: int = 100
    features: int = 14
    latent: int = 15
    width: int = 300
    hidden: int = 3
    substeps: int = 4
    learning_rate: float = 0.01


ODE = {
    "tiny": ODEConfig(trajectories=16, times=8, features=4, latent=4, width=16, hidden=1, substeps=2),
    "published": ODEConfig(),
}

Field = Callable[[jax.Array, jax.Array, Any], jax.Array]
"""dy/dt from y, t and the parameters, as `jax.experimental.ode` has it."""


def rk4(field: Field, start: jax.Array, times: jax.Array, params: Any, substeps: int) -> jax.Array:
    """States (times, ...) at given times by the classical Runge-Kutta method with a fixed number of steps between two of them."""

    def interval(y: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        begin, end = ends
        h = (end - begin) / substeps

        def one_step(i: jax.Array, y: jax.Array) -> jax.Array:
            t = begin + i * h
            k1 = field(y, t, params)
            k2 = field(y + 0.5 * h * k1, t + 0.5 * h, params)
            k3 = field(y + 0.5 * h * k2, t + 0.5 * h, params)
            k4 = field(y + h * k3, t + h, params)
            return y + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)

        y = jax.lax.fori_loop(0, substeps, one_step, y)
        return y, y

    _, states = jax.lax.scan(interval, start, (times[:-1], times[1:]))
    return jnp.concatenate([start[None], states])


def neural_ode(size: Size) -> Program:
    """`train_step(params, opt_state, times, observed) -> (params, opt_state, loss)`: back through a fixed-step RK4."""
    config = ODE[size]

    def integrate(field: Field, start: jax.Array, times: jax.Array, params: Any) -> jax.Array:
        return jax.vmap(lambda y: rk4(field, y, times, params, config.substeps))(start)

    return _latent_ode("neural_ode", config, integrate)


def neural_ode_adaptive(size: Size) -> Program:
    """The same by adaptive Dormand-Prince steps and the adjoint equation: `while` loops whose lengths the data decide.

    All trajectories step together, as in the source: an adjoint under vmap would carry every trajectory's own gradient.
    """
    from jax.experimental.ode import odeint

    def integrate(field: Field, start: jax.Array, times: jax.Array, params: Any) -> jax.Array:
        states = odeint(field, start, times, params, rtol=1e-3, atol=1e-4, mxstep=1000)
        return jnp.swapaxes(states, 0, 1)

    return _latent_ode("neural_ode_adaptive", ODE[size], integrate)


def _latent_ode(name: str, config: ODEConfig, integrate: Callable[..., jax.Array]) -> Program:
    """The first observation of each trajectory is encoded, integrated (states: trajectories, times, latent) and decoded."""
    import optax

    optimizer = optax.adamax(config.learning_rate)

    def linear(params: Tree, x: jax.Array) -> jax.Array:
        return x @ params["w"] + params["b"]

    def field(y: jax.Array, t: jax.Array, layers: list[Tree]) -> jax.Array:
        for layer in layers[:-1]:
            y = jnp.tanh(linear(layer, y))
        return linear(layers[-1], y)

    def predict(params: Tree, times: jax.Array, first: jax.Array) -> jax.Array:
        return linear(params["decode"], integrate(field, linear(params["encode"], first), times, params["field"]))

    def loss_fn(params: Tree, times: jax.Array, observed: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(predict(params, times, observed[:, 0]) - observed))

    def train_step(params: Tree, opt_state: Any, times: jax.Array, observed: jax.Array) -> tuple[Any, ...]:
        loss, grads = jax.value_and_grad(loss_fn)(params, times, observed)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    def make(key: jax.Array) -> tuple[Any, ...]:
        key_params, key_observed = jax.random.split(key)
        keys = iter(jax.random.split(key_params, config.hidden + 4))

        def dense(inputs: int, outputs: int) -> Tree:
            return {"w": scaled_normal(next(keys), (inputs, outputs), inputs), "b": jnp.zeros((outputs,), jnp.float32)}

        sizes = [config.latent, *[config.width] * (config.hidden + 1), config.latent]
        params = {
            "encode": dense(config.features, config.latent),
            "field": [dense(i, o) for i, o in pairwise(sizes)],
            "decode": dense(config.latent, config.features),
        }
        observed = jax.random.normal(key_observed, (config.trajectories, config.times, config.features))
        return params, optimizer.init(params), jnp.linspace(0.0, 1.0, config.times), observed

    return define(name, train_step, make, donate=(0, 1))


@dataclass(frozen=True)
class GaussianProcessConfig:
    """The robot arm SARCOS as in Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, section 8.3.7.

    21 inputs, the largest subset of 4096 points; all 7 torques share a kernel. `restarts`: optimised side by side.
    """

    points: int = 4096
    inputs: int = 21
    outputs: int = 7
    restarts: int = 16
    learning_rate: float = 0.05


GAUSSIAN_PROCESS = {
    "tiny": GaussianProcessConfig(points=32, inputs=3, outputs=2, restarts=8),
    "published": GaussianProcessConfig(),
}


def gaussian_process(size: Size) -> Program:
    """`train_step(params, opt_state, x, y) -> (params, opt_state, losses)`: up the marginal likelihood from every restart."""
    import optax

    config = GAUSSIAN_PROCESS[size]
    optimizer = optax.adam(config.learning_rate)

    def covariance(params: Tree, x: jax.Array) -> jax.Array:
        scaled = x * jnp.exp(-params["log_lengthscale"])
        squares = jnp.sum(jnp.square(scaled), axis=-1)
        distance = squares[:, None] + squares[None, :] - 2.0 * scaled @ scaled.T
        kernel = jnp.exp(2.0 * params["log_signal"] - 0.5 * jnp.maximum(distance, 0.0))
        return kernel + jnp.exp(2.0 * params["log_noise"]) * jnp.eye(x.shape[0])

    def negative_log_likelihood(params: Tree, x: jax.Array, y: jax.Array) -> jax.Array:
        lower = jnp.linalg.cholesky(covariance(params, x))
        whitened = jax.scipy.linalg.solve_triangular(lower, y, lower=True)
        log_determinant = 2.0 * jnp.sum(jnp.log(jnp.diagonal(lower)))
        count, outputs = y.shape
        constant = count * jnp.log(2.0 * jnp.pi)
        return 0.5 * (jnp.sum(jnp.square(whitened)) + outputs * (log_determinant + constant)) / count

    def train_step(params: Tree, opt_state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, ...]:
        losses, grads = jax.vmap(jax.value_and_grad(negative_log_likelihood), in_axes=(0, None, None))(params, x, y)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, losses

    def make(key: jax.Array) -> tuple[Any, ...]:
        key_x, key_y, key_params = jax.random.split(key, 3)
        x = jax.random.normal(key_x, (config.points, config.inputs))
        y = jnp.sin(x @ jax.random.normal(key_y, (config.inputs, config.outputs)))
        params = {
            "log_lengthscale": jax.random.normal(key_params, (config.restarts, config.inputs)),
            "log_signal": jnp.zeros((config.restarts,), jnp.float32),
            "log_noise": jnp.full((config.restarts,), -1.0),
        }
        return params, optimizer.init(params), x, y

    return define("gaussian_process", train_step, make, donate=(0, 1))


MODELS: dict[str, Callable[[Size], Program]] = {
    "lstm_language_model": lstm_language_model,
    "molecule_graph_network": molecule_graph_network,
    "ppo_update": ppo_update,
    "neural_ode": neural_ode,
    "neural_ode_adaptive": neural_ode_adaptive,
    "gaussian_process": gaussian_process,
}
