"""Callbacks to the host: one device asks, and sends what it is told to all others."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from jax.experimental import io_callback

import jaxplan

SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "check_memory.py"))
ARGS = jax.ShapeDtypeStruct((64, 128), jnp.float32), jax.ShapeDtypeStruct((256, 64), jnp.float32)


def told(y):
    return np.sin(y), np.arange(y.shape[0], dtype=np.int32), y > 0


def several(w, x):
    y = jnp.tanh(x @ w)
    results = ((y.shape, "float32"), ((256,), "int32"), (y.shape, "bool"))
    z, rows, positive = jax.pure_callback(told, [jax.ShapeDtypeStruct(*result) for result in results], y)
    return jnp.sum(jnp.where(positive, z, y) @ w.T + x), rows * 2


def in_a_loop(w, x):
    def again(h, _):
        return jax.pure_callback(np.cos, jax.ShapeDtypeStruct(h.shape, h.dtype), h) * 2, None

    return jax.lax.scan(again, jnp.tanh(x @ w), None, length=3)[0]


def with_effects(w, x):
    y = jnp.tanh(x @ w)
    return jnp.sum(io_callback(np.sin, jax.ShapeDtypeStruct(y.shape, y.dtype), y) @ w.T + x)


def with_effects_and_a_result_that_nobody_reads(w, x):
    y = jnp.tanh(x @ w)
    first, second, _ = io_callback(lambda y: (np.sin(y), np.cos(y), -y), [jax.ShapeDtypeStruct(y.shape, y.dtype)] * 3, y)
    return jnp.sum((first + second) @ w.T + x)


def that_returns_nothing(w, x):
    y = jnp.tanh(x @ w)
    jax.debug.callback(lambda value: None, y)
    return jnp.sum(y @ w.T + x)


@pytest.mark.parametrize("mesh", [(8,), (4, 2)])
@pytest.mark.parametrize(
    "fn", [several, in_a_loop, with_effects, with_effects_and_a_result_that_nobody_reads, that_returns_nothing]
)
def test_what_callbacks_send_is_as_predicted(fn, mesh):
    """XLA makes results on one device, and sums them over all; of which each keeps a part where that is what is read. With
    JAX 0.12 it failed to compile effects with several results, whose layout had been asked for."""
    plan = jaxplan.make_plan(fn, *ARGS, mesh=mesh_of(mesh), machine=SCRIPT["busy_machine"](), pipeline=None)
    audit = plan.audit()
    assert audit.compiled_bytes == pytest.approx(sum(plan.wire_bytes.values()), rel=1e-9) and audit.compiled_bytes > 100_000
    assert "missing 0, unplanned 0" in str(audit)


def test_a_program_with_a_callback_computes_what_it_did():
    keys = jax.random.split(jax.random.key(0))
    w, x = (0.1 * jax.random.normal(key, a.shape) for key, a in zip(keys, ARGS, strict=True))
    plan = jaxplan.make_plan(several, w, x, mesh=mesh_of((4, 2)), machine=SCRIPT["busy_machine"](), pipeline=None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), plan.jit()(w, x), jax.jit(several)(w, x))
    assert "(?" not in str(plan)


def test_on_one_device_a_callback_sends_nothing():
    plan = jaxplan.make_plan(with_effects, *ARGS, mesh=mesh_of((1,)), machine=SCRIPT["busy_machine"]())
    assert sum(plan.wire_bytes.values()) == 0 and not plan.exchanges
