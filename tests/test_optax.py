"""Optax optimizers as they come: a planned train step computes the same, and state that goes round keeps its layout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from conftest import assert_close, mesh_of
from jax.sharding import PartitionSpec as P

import jaxplan

optax: Any = pytest.importorskip("optax")


def every_other(params):
    return {name: name.startswith("w") for name in params}


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=1e-3),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "lion": lambda: optax.lion(1e-2),
    "a schedule": lambda: optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10)),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2),
    "masked": lambda: optax.masked(optax.adamw(1e-2), every_other),
    "clipping by global norm": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1e-2, momentum=0.9)),
}


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax counts on it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer(name):
    optimizer = OPTIMIZERS[name]()
    w_in, w_out = jnp.linspace(-1, 1, 32 * 64).reshape(32, 64), jnp.linspace(1, -1, 64 * 8).reshape(64, 8)
    params = {"w_in": w_in, "bias": jnp.zeros(64), "w_out": w_out}
    x, y = jnp.linspace(-1, 1, 128 * 32).reshape(128, 32), jnp.linspace(0, 1, 128 * 8).reshape(128, 8)

    def train_step(params, state, x, y):
        def loss(params):
            hidden = jnp.tanh(x @ params["w_in"] + params["bias"][None])
            return jnp.mean((hidden @ params["w_out"] - y) ** 2)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    args = (params, optimizer.init(params), x, y)
    pins = {"x": P("x"), "params/w_in": P(None, "y")}
    plan = jaxplan.make_plan(train_step, *args, mesh=mesh_of((4, 2)), machine="v5e", donate_argnums=(0, 1), pins=pins)
    assert not [op.name for op in plan.modelled.graph.operators if not op.rule.known]
    specs = jax.tree.map(str, (plan.in_specs[:2], plan.out_specs[:2]), is_leaf=lambda leaf: isinstance(leaf, P))
    assert specs[0] == specs[1]
    plain, planned = jax.jit(train_step), plan.jit(donate_argnums=())
    want = got = args[:2]
    for _ in range(3):
        *want, loss = plain(*want, x, y)
        *got, found = planned(*got, x, y)
        assert_close(loss, found)
    assert_close(want, got)
