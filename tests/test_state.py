"""Room `state`: state is made where the plan wants it, and arrays that lie elsewhere are found."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, mesh_of
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec as P

import jaxplan

PINS = {"params/up": P(None, "x"), "params/down": P("x"), "moments/up": P(None, "x"), "moments/down": P("x")}


def step(params, moments, x):
    def loss(params):
        return jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"]) ** 2)

    gradient = jax.grad(loss)(params)
    moments = jax.tree.map(lambda m, g: 0.9 * m + g, moments, gradient)
    return jax.tree.map(lambda p, m: p - 0.1 * m, params, moments), moments


def make(key):
    up, down = jax.random.split(key)
    params = {"up": jax.random.normal(up, (64, 1024)), "down": jax.random.normal(down, (1024, 64))}
    return params, jax.tree.map(jnp.zeros_like, params)


@pytest.fixture(scope="module")
def plan():
    params, moments = jax.eval_shape(make, jax.random.key(0))
    return jaxplan.make_plan(step, params, moments, jax.ShapeDtypeStruct((32, 64), jnp.float32), mesh=mesh_of((8,)), pins=PINS)


def test_state_is_made_where_the_plan_wants_it(plan):
    state = plan.init(make, jax.random.key(0))
    assert_close(jax.jit(make)(jax.random.key(0)), state)
    for tree, specs in zip(state, plan.in_specs[:2], strict=True):
        for name in tree:
            assert tree[name].sharding.is_equivalent_to(NamedSharding(plan.mesh, specs[name]), 2)
    plan.check(state)
    plan.check(state[0])
    new = plan.jit()(*state, np.ones((32, 64), np.float32))
    plan.check(new)


def test_no_device_ever_holds_it_whole(plan):
    """Per device: an eighth of the result, and temporaries of that order; the key apart."""
    shapes = jax.eval_shape(make, jax.random.key(0))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    shardings = (plan.in_shardings[0], plan.in_shardings[1])
    memory = jax.jit(make, out_shardings=shardings).lower(jax.random.key(0)).compile().memory_analysis()
    assert memory.output_size_in_bytes <= whole / 8 + 256  # and a table of pointers
    assert memory.temp_size_in_bytes <= whole / 4


def test_only_a_part_of_the_state(plan):
    params = plan.init(lambda key: make(key)[0], jax.random.key(0))
    assert params["up"].sharding.is_equivalent_to(plan.in_shardings[0]["up"], 2)
    named = plan.init(lambda key: {"weights": make(key)[0], "momentum": make(key)[1]}, key=jax.random.key(0))
    plan.check(named["weights"])


def test_arrays_that_lie_elsewhere_are_named(plan):
    params, moments = plan.init(make, jax.random.key(0))
    replicated = {**params, "up": jax.device_put(params["up"], NamedSharding(plan.mesh, P()))}
    with pytest.raises(jaxplan.LayoutError, match=r"1 of 4 .*\n  0/up: planned P\(None, 'x'\), found P\(\), 224.00 KiB per"):
        plan.check((replicated, moments))
    one_device = jax.device_put(params["down"], jax.devices()[0])
    with pytest.raises(jaxplan.LayoutError, match=r"down: planned P\('x',\), found SingleDeviceSharding on 1 device"):
        plan.check({**params, "down": one_device})
    with pytest.raises(jaxplan.LayoutError, match=r"up: planned .* found a ndarray on the host"):
        plan.check({**params, "up": np.zeros((64, 1024), np.float32)})


def test_another_mesh_is_named(plan):
    params = plan.init(lambda key: make(key)[0], jax.random.key(0))
    other = jax.sharding.Mesh(np.array(jax.devices()[8:16]), ("x",))
    moved = {**params, "up": jax.device_put(params["up"], NamedSharding(other, P(None, "x")))}
    with pytest.raises(jaxplan.LayoutError, match=r"found P\(None, 'x'\) on another mesh, \{'x': 8\}"):
        plan.check(moved)


def test_what_stands_for_no_argument_is_an_error(plan):
    with pytest.raises(ValueError, match=r"other \(float32\[3\]\) stands for no argument of step.*\(params, moments, x\)"):
        plan.init(lambda: {"other": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"it .* may stand for several arguments of twice, laid out differently"):
        shape = jax.ShapeDtypeStruct((16, 16), jnp.float32)
        pins = {"a": P("x"), "b": P(None, "x")}
        twice = jaxplan.make_plan(lambda a, b: a * b, shape, shape, mesh=mesh_of((8,)), pins=pins)
        object.__setattr__(twice.traced, "name", "twice")
        twice.init(lambda: jnp.zeros((16, 16)))


def test_an_abstract_mesh_has_no_arrays():
    shape = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    plan = jaxplan.make_plan(lambda a: a * 2.0, shape, mesh=AbstractMesh((8,), ("x",)), machine="v4")
    with pytest.raises(ValueError, match=r"AbstractMesh; use plan\.replan"):
        plan.init(lambda: jnp.zeros((16, 16)))
    with pytest.raises(ValueError, match="AbstractMesh"):
        plan.check(jnp.zeros((16, 16)))
