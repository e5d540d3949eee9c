"""What a new user does first: every mistake met on the way names its remedy, and static arguments are those of `jax.jit`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, mesh_of
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxplan

W, X = jnp.linspace(-1, 1, 16 * 32).reshape(16, 32), jnp.linspace(-1, 1, 64 * 16).reshape(64, 16)


def layer(w, x, act="relu", scale=1.0):
    return getattr(jax.nn, act)(x @ w) * scale


# --- static arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["static_argnums", "static_argnames", "jitted by number", "jitted by name"])
@pytest.mark.parametrize("positional", [True, False])
def test_static_arguments_are_found_however_they_are_said_and_given(by, positional):
    said = {"static_argnums": 2} if "num" in by else {"static_argnames": "act"}
    fn, options = (jax.jit(layer, **said), {}) if by.startswith("jitted") else (layer, said)
    planned = jaxplan.auto_shard(mesh_of((4, 2)), **options)(fn)
    for act in ("tanh", "relu"):
        got = planned(W, X, act) if positional else planned(W, X, act=act)
        assert_close(got, layer(W, X, act))
        plan = planned.plan(W, X, act) if positional else planned.plan(W, X, act=act)
        assert plan.traced.in_paths == ("w", "x")
    assert_close(planned(W, X), layer(W, X))


def test_a_static_value_that_cannot_be_hashed_is_named():
    with pytest.raises(TypeError, match=r"static argument 0 is a dict, which cannot be hashed.*Give a tuple"):
        jaxplan.auto_shard(mesh_of((4,)), static_argnums=0)(lambda options, x: x * options["a"])({"a": 2.0}, X)


class Trainer:
    """Its instances are static arguments: they hash by identity."""

    scale = 2.0

    @functools.partial(jaxplan.auto_shard, mesh_of((4,)), static_argnums=0)()
    def forward(self, w, x):
        """A layer."""
        return jnp.tanh(x @ w) * self.scale


def test_a_method_is_decorated_like_any_function():
    trainer = Trainer()
    assert_close(trainer.forward(W, X), 2.0 * jnp.tanh(X @ W))
    assert trainer.forward.__name__ == "forward" and trainer.forward.__doc__ == "A layer."
    assert trainer.forward.plan(W, X).traced.in_paths == ("w", "x")
    assert "dot" in trainer.forward.lower(W, X).as_text()
    assert isinstance(Trainer.forward, type(jaxplan.auto_shard(mesh_of((4,)))(layer)))


# --- results that go round --------------------------------------------------------------------------------------------


def descend(w, x, rate=1.0):
    return w - 0.1 * rate * jax.grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w)


def test_results_on_explicit_axes_may_be_planned_for_anew():
    """Their types have layouts, by which JAX alone would not multiply them: a last, smaller batch, or a Python number that
    became an array, is a new plan."""
    mesh = mesh_of((4, 2), AxisType.Explicit)
    pins = {"w": P(("x", "y")), "x": P(None, ("x", "y"))}
    planned = jaxplan.auto_shard(mesh, pins=pins)(descend)
    w, want = planned(W, X), descend(W, X)
    for x, rate in ((X, 1.0), (X[:40], 1.0), (X, jnp.float32(0.5))):
        x = jax.device_put(x, NamedSharding(mesh, pins["x"]))
        with pytest.raises(Exception, match="Contracting dimensions are sharded"):
            jax.jit(descend)(w, x, rate)
        w, want = planned(w, x, rate), descend(want, np.asarray(x), rate)
        assert w.sharding.mesh == mesh
        assert_close(want, w)
    assert planned.plan(w, X).in_specs == planned.plan(W, X).in_specs


def test_a_program_that_moves_what_it_is_given_finds_the_mesh_in_its_arguments():
    mesh = mesh_of((4, 2), AxisType.Explicit)

    def turned(x):
        return jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, P(None, "y"))) * 2

    x = jax.device_put(X, NamedSharding(mesh, P("x")))
    plan = jaxplan.make_plan(turned, x, mesh=mesh)
    assert plan.out_specs == P(None, "y")
    assert_close(X * 2, plan.jit()(x))


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jaxplan.auto_shard(layer), r"takes the mesh, .* write @jaxplan.auto_shard\(mesh\) above 'layer'"),
        (lambda: jaxplan.auto_shard({"x": 4}), r"mesh must be a jax.sharding.Mesh or AbstractMesh, got dict"),
        (lambda: jaxplan.auto_shard(mesh_of((4,)), machin="v4"), r"auto_shard does not take 'machin'; did you mean 'machine'\?"),
        (lambda: jaxplan.auto_shard(mesh_of((4,)), colour=1), r"does not take 'colour'; it takes machine, search"),
        (lambda: plan(machin="v4"), r"make_plan does not take 'machin', and neither does 'layer'; did you mean 'machine'\?"),
        (lambda: jaxplan.make_plan(layer(W, X), mesh=mesh_of((4,))), "must be a function, got ArrayImpl"),
        (lambda: plan(pins=[P("x")]), r"pins must be a dict \{input path: PartitionSpec\}, got list"),
        (lambda: plan(pins={"w": "x"}), r"pin 'w': a layout is a PartitionSpec, got str 'x'"),
        (lambda: plan(pins={"w": NamedSharding(mesh_of((4,)), P("x"))}), r"give its \.spec, P\('x',\)"),
        (lambda: plan(dims="D F"), "one string per argument or a dict .* got the string 'D F'"),
        (lambda: plan(dims=["D", "B D"]), r"dims 'D' for argument 0 names 1 dimensions; the input has shape \(16, 32\)"),
        (lambda: plan(dims=["D F", "B D", "S"]), "dims has 3 strings, but layer has 2 positional arguments"),
        (lambda: plan(dims={"x": "B"}), r"dims 'B' for 'x' names 1 dimensions"),
        (lambda: plan(dims=["D F", "D F"]), r"dims calls two extents 'D': 16 of w and 64 of x; .* give them two names"),
        (lambda: plan(pins={"params": P("x")}), r"no input of layer has that path; the closest are \['w', 'x'\]"),
        (lambda: plan().jit()(W, jax.ShapeDtypeStruct(X.shape, X.dtype)), "x is a shape, not an array: .* not run"),
        (lambda: plan().jit()(W, X.astype(jnp.bfloat16)), "x was planned as float32, but is bfloat16; convert it, or plan again"),
        (lambda: plan(scale=2.0).jit()(W, X, scale=2j), "scale was planned as float32, but is complex; convert it"),
        (lambda: plan().jit()(w=W, x=X), "planned for arguments structured .* call it as it was planned"),
    ],
)  # fmt: skip
def test_a_mistake_names_its_remedy(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def plan(**options):
    return jaxplan.make_plan(layer, W, X, mesh=mesh_of((4,)), **options)


def test_numbers_of_another_width_are_taken_as_jax_takes_them():
    run = plan(scale=2.0).jit()
    want = layer(W, X, scale=2.0)
    assert_close(run(np.asarray(W, np.float64), np.asarray(X, np.float64), scale=2.0), want)


def test_what_stops_jit_too_says_so():
    with pytest.raises(TypeError, match="dot_general requires") as caught:
        jaxplan.make_plan(layer, W, W, mesh=mesh_of((4,)))
    assert any("jaxplan was tracing 'layer' to plan it; jax.jit(layer)(...) stops here too" in n for n in caught.value.__notes__)


def test_what_is_no_array_is_told_to_be_static():
    with pytest.raises(TypeError) as caught:
        jaxplan.make_plan(layer, W, X, "tanh", mesh=mesh_of((4,)))
    assert any("static_argnums= or static_argnames=" in note for note in caught.value.__notes__)


def test_a_frameworks_own_jit_is_pointed_to_the_function_beneath():
    class Wrapped:
        __name__ = "step"

        def __call__(self, x):
            return x

        def trace(self, x):
            return self

    with pytest.raises(TypeError, match=r"'step' is a test_newcomer\.Wrapped, which is no jax.jit: plan the function under it"):
        jaxplan.make_plan(Wrapped(), X, mesh=mesh_of((4,)))
