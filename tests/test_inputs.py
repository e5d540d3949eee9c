"""Inputs that planners trip over: each works, or is refused with what, where and what to do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P

import jaxplan

MESH = AbstractMesh((4, 2), ("x", "y"))
F32 = jnp.float32


def devices(*shape):
    return Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), tuple("xyzw"[: len(shape)]))


def shape(*extents, dtype=F32):
    return jax.ShapeDtypeStruct(extents, dtype)


def test_a_function_that_does_not_trace_keeps_jaxs_error_and_says_what_was_going_on():
    def wrong(x):
        return x @ jnp.ones((3, 3), F32)

    with pytest.raises(TypeError) as caught:
        jaxplan.make_plan(wrong, shape(4, 4), mesh=MESH)
    assert any("tracing 'wrong'" in note for note in caught.value.__notes__)


def test_a_mesh_of_one_device_shards_nothing():
    plan = jaxplan.make_plan(lambda x: x @ x, shape(8, 8), mesh=devices(1))
    assert plan.in_specs == (P(),) and plan.exchanges == ()
    np.testing.assert_allclose(plan.jit()(jnp.ones((8, 8), F32)), 8.0)


def test_an_axis_that_no_dimension_can_use_is_left_alone_and_said():
    plan = jaxplan.make_plan(lambda x: x * 2.0, shape(5, 7), mesh=devices(4))
    assert plan.in_specs == (P(),)
    assert "left alone" in str(plan)
    np.testing.assert_allclose(plan.jit()(jnp.ones((5, 7), F32)), 2.0)


@pytest.mark.parametrize("extents", [(0, 8), (8, 0), (0,)])
def test_a_batch_of_zero(extents):
    plan = jaxplan.make_plan(lambda x: jnp.sum(jnp.exp(x)), shape(*extents), mesh=devices(4))
    assert float(plan.jit()(jnp.ones(extents, F32))) == 0.0
    assert str(plan)


def test_scalars_and_python_numbers():
    plan = jaxplan.make_plan(lambda x, a, b: (x * a, b), shape(8, 8), 2.0, 3, mesh=devices(4, 2))
    out, b = plan.jit()(jnp.ones((8, 8), F32), 2.0, 3)
    np.testing.assert_allclose(out, 2.0)
    assert int(b) == 3


@pytest.mark.parametrize("make", [jax.random.PRNGKey, jax.random.key])
def test_random_keys_and_integers(make):
    def sample(key, n):
        key, use = jax.random.split(key)
        return key, jax.random.normal(use, (16, 8), F32) + n.astype(F32)

    args = make(0), jnp.arange(8, dtype=jnp.int32)
    plan = jaxplan.make_plan(lambda k, n: sample(k, n[None, :]), *args, mesh=devices(4, 2))
    want, got = jax.jit(lambda k, n: sample(k, n[None, :]))(*args), plan.jit()(*args)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)


def test_a_function_without_arrays():
    plan = jaxplan.make_plan(lambda: jnp.zeros((4,), F32), mesh=devices(4))
    assert plan.in_specs == ()
    np.testing.assert_allclose(plan.jit()(), 0.0)
    assert str(plan)


def test_arguments_whose_structure_changes_are_planned_anew():
    @jaxplan.auto_shard(devices(4))
    def total(tree):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree))

    one = jnp.ones((8,), F32)
    assert float(total({"a": one})) == 8.0
    assert float(total({"a": one, "b": one})) == 16.0
    assert float(total([one, one, one])) == 24.0


def test_a_plan_refuses_other_shapes_and_structures():
    run = jaxplan.make_plan(lambda x: x * 2.0, shape(8, 8), mesh=devices(4)).jit()
    with pytest.raises(ValueError, match=r"x was planned with shape \(8, 8\), but has shape \(4, 8\)"):
        run(jnp.ones((4, 8), F32))
    with pytest.raises(ValueError, match="structured"):
        run(jnp.ones((8, 8), F32), 1)


def test_an_unknown_machine_or_search_lists_the_names():
    with pytest.raises(ValueError, match="no machine is called 'v9'; there are v4, v5e"):
        jaxplan.make_plan(lambda x: x, shape(8), mesh=MESH, machine="v9")
    with pytest.raises(ValueError, match=r"no search is called 'best'; there are \['alpa', 'brute', 'hsm2dl', "):
        jaxplan.make_plan(lambda x: x, shape(8), mesh=MESH, search="best")


def test_a_plan_for_an_abstract_mesh_cannot_run_but_can_be_derived_again():
    plan = jaxplan.make_plan(lambda x: x * 2.0, shape(8, 8), mesh=MESH)
    with pytest.raises(ValueError, match="AbstractMesh"):
        plan.jit()
    np.testing.assert_allclose(plan.replan(mesh=devices(4)).jit()(jnp.ones((8, 8), F32)), 2.0)


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"w": P("x")}, "no input of .* has that path; the closest are"),
        ({"x": P("q")}, r"names axis 'q'; the mesh has \['x', 'y'\]"),
        ({"x": P("x", "y", None)}, "has 3 entries"),
        ({"x": P("x", "x")}, "twice"),
        ({"x": P(None, "x")}, "not divisible by 4"),
    ],
)
def test_pins_that_cannot_be_honoured_say_why(pins, message):
    def double(x):
        return x * 2.0

    with pytest.raises(ValueError, match=message):
        jaxplan.make_plan(double, shape(8, 6), mesh=MESH, pins=pins)


def test_pins_are_honoured():
    plan = jaxplan.make_plan(lambda x: x * 2.0, shape(8, 8), mesh=MESH, pins={"x": P("y", "x")})
    assert plan.in_specs == (P("y", "x"),)


@pytest.mark.parametrize("budget", ["16 apples", "", -1, 0])
def test_a_budget_that_is_no_size_is_explained(budget):
    with pytest.raises(ValueError, match="memory_budget"):
        jaxplan.make_plan(lambda x: x, shape(8), mesh=MESH, memory_budget=budget)


def test_what_is_not_there_yet_is_said():
    with pytest.raises(ValueError, match="pipeline"):
        jaxplan.make_plan(lambda x: x, shape(8), mesh=MESH, pipeline="x")
    plan = jaxplan.make_plan(lambda x: x, shape(8), mesh=MESH)
    with pytest.raises(TypeError, match="replan does not take"):
        plan.replan(colours={"B": 1})


def test_an_unknown_primitive_is_gathered_whole_priced_and_reported():
    from jax.extend import core as jex_core

    strange_p = jex_core.Primitive("strange")
    strange_p.def_impl(lambda x: x * 2)
    strange_p.def_abstract_eval(lambda x: x)
    from jax.interpreters import mlir

    mlir.register_lowering(strange_p, mlir.lower_fun(lambda x: x * 2, multiple_results=False))
    plan = jaxplan.make_plan(lambda x: strange_p.bind(x) + 1.0, shape(8, 8), mesh=devices(4))
    assert "strange: gathered whole" in str(plan)
    np.testing.assert_allclose(plan.jit()(jnp.ones((8, 8), F32)), 3.0)


def train(params, x):
    def loss(params):
        for block in params["blocks"]:
            x_ = jnp.tanh(x @ block["wq"]) @ block["wo"]
        return jnp.mean((x_ @ params["out"]) ** 2)

    return jax.tree.map(lambda p, g: p - g, params, jax.grad(loss)(params))


PARAMS = {"blocks": [{"wq": shape(64, 256), "wo": shape(256, 64)} for _ in range(2)], "out": shape(64, 1003)}


def test_pins_by_glob_and_what_they_cost():
    pins = {"params/blocks/*/wq": P(None, "x"), "params/out": P()}
    plan = jaxplan.make_plan(train, PARAMS, shape(512, 64), mesh=MESH, machine="v4", pins=pins)
    specs = plan.in_specs[0]
    assert [block["wq"] for block in specs["blocks"]] == [P(None, "x")] * 2 and specs["out"] == P()
    assert set(plan.pin_prices) == set(pins)
    for path, price in plan.pin_prices.items():
        rest = {p: s for p, s in pins.items() if p != path}
        assert price == pytest.approx(plan.seconds - plan.replan(pins=rest).seconds)
    everything = jaxplan.make_plan(train, PARAMS, shape(512, 64), mesh=MESH, machine="v4", pins={"params/**": P()})
    assert all(spec == P() for spec in jax.tree.leaves(everything.in_specs[0], is_leaf=lambda s: isinstance(s, P)))
    with pytest.raises(ValueError, match=r"pin 'params/blocks/\*/wk': no input of train has that path"):
        jaxplan.make_plan(train, PARAMS, shape(512, 64), mesh=MESH, pins={"params/blocks/*/wk": P()})


def test_what_no_axis_divides_is_told_and_priced():
    def step(table, x):
        def loss(table):
            return jnp.mean(jax.nn.logsumexp(x @ table.T, -1))

        return table - jax.grad(loss)(table)

    plan = jaxplan.make_plan(step, shape(50257, 512), shape(64, 512), mesh=MESH, machine="v4")
    (padding,) = plan.paddings
    assert (padding.extent, padding.padded, padding.path, padding.dim) == (50257, 50264, "table", 0)
    padded = jaxplan.make_plan(step, shape(50264, 512), shape(64, 512), mesh=MESH, machine="v4")
    assert padding.saved == pytest.approx(plan.seconds - padded.seconds, rel=0.05)
    assert "50257 (dimension 0 of table): padding it to 50264 would save" in str(plan)
    assert padded.paddings == () and "indivisible" not in str(padded)


def test_rounds_of_a_while_loop_can_be_said():
    def until(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1e9, lambda x: jnp.sin(x) @ x, x)

    few, many = (
        jaxplan.make_plan(until, shape(1024, 1024), mesh=MESH, machine="v4", while_trips=trips) for trips in (1, 100)
    )
    assert 50 < many.seconds / few.seconds <= 100
    with pytest.raises(ValueError, match="while_trips must be a number of rounds, got -1"):
        jaxplan.make_plan(until, shape(8, 8), mesh=MESH, while_trips=-1)


@pytest.mark.parametrize("mesh", [None, (4, 2), {"x": 4}])
def test_what_is_no_mesh_is_told(mesh):
    with pytest.raises(TypeError, match=r"mesh must be a jax\.sharding\.Mesh or AbstractMesh, got .*make_mesh"):
        jaxplan.make_plan(lambda x: x, shape(8), mesh=mesh)


@pytest.mark.parametrize("kinds", [("Manual", "Auto"), ("Explicit", "Manual")])
def test_a_manual_axis_cannot_be_planned_along(kinds):
    types = tuple(getattr(AxisType, kind) for kind in kinds)
    with pytest.raises(ValueError, match=r"mesh axis '[xy]' is of type Manual.*Auto or Explicit"):
        jaxplan.make_plan(lambda x: x, shape(8), mesh=AbstractMesh((4, 2), ("x", "y"), axis_types=types))


@pytest.mark.parametrize("kinds", [("Auto", "Explicit"), ("Explicit", "Auto")])
def test_meshes_that_mix_auto_and_explicit_axes(kinds):
    devices = np.array(jax.devices()[:8]).reshape(4, 2)
    mesh = Mesh(devices, ("x", "y"), axis_types=tuple(getattr(AxisType, kind) for kind in kinds))
    x = jnp.arange(64.0).reshape(8, 8)
    run = jaxplan.make_plan(lambda x: jnp.tanh(x @ x.T), x, mesh=mesh, pins={"x": P("x", "y")}).jit()
    np.testing.assert_allclose(run(x), jnp.tanh(x @ x.T), rtol=1e-6)


def test_an_axis_of_size_one_changes_nothing():
    args = shape(512, 64), shape(64, 64)
    with_one = jaxplan.make_plan(lambda x, w: jnp.tanh(x @ w), *args, mesh=AbstractMesh((8, 1), ("x", "one")), machine="v4")
    without = jaxplan.make_plan(lambda x, w: jnp.tanh(x @ w), *args, mesh=AbstractMesh((8,), ("x",)), machine="v4")
    assert with_one.in_specs == without.in_specs and with_one.seconds == without.seconds


def test_weak_types_stay_weak():
    def scale(x, s):
        return x * s, s * 2

    x = jnp.ones((8, 8), jnp.bfloat16)
    scaled, doubled = jaxplan.make_plan(scale, x, 2.0, mesh=mesh_of((8,))).jit()(x, 2.0)
    assert scaled.dtype == jnp.bfloat16 and doubled.weak_type


@pytest.mark.parametrize("leaf", ["name", jnp.sin, object()])
def test_leaves_that_are_no_arrays_keep_jaxs_error(leaf):
    with pytest.raises(TypeError, match="as an abstract array") as caught:
        jaxplan.make_plan(lambda d: d["x"] * 2.0, {"x": shape(8), "s": leaf}, mesh=MESH)
    assert any("jaxplan was tracing" in note for note in caught.value.__notes__)


def test_nothing_and_static_values_are_no_arrays():
    x = jnp.ones((8, 8))
    run = jaxplan.make_plan(lambda d, f: f(d["x"]), {"x": x, "none": None}, jnp.sin, mesh=mesh_of((8,)), static_argnums=1).jit()
    np.testing.assert_allclose(run({"x": x, "none": None}, jnp.sin), jnp.sin(x), rtol=1e-6)


def test_side_effects_happen_once_while_tracing_and_leaks_are_jaxs_error():
    seen = []

    def leaky(x):
        seen.append(x)
        return x * 2.0

    run = jaxplan.make_plan(leaky, jnp.ones(8), mesh=mesh_of((8,))).jit()
    run(jnp.ones(8))
    run(jnp.ones(8))
    assert len(seen) == 1
    with pytest.raises(jax.errors.UnexpectedTracerError):
        seen[0] + 1.0


def test_an_array_donated_twice_gives_the_right_values_once():
    def both(a, b):
        return a + b, a - b

    x = jnp.arange(64.0).reshape(8, 8)
    total, zero = jaxplan.make_plan(both, x, x, mesh=mesh_of((8,)), donate_argnums=(0, 1)).jit()(x, x)
    np.testing.assert_array_equal(total, 2 * jnp.arange(64.0).reshape(8, 8))
    np.testing.assert_array_equal(zero, jnp.zeros((8, 8)))


@pytest.mark.parametrize("where", ["one device", "another mesh"])
def test_arrays_committed_elsewhere_are_moved(where):
    devices, x = jax.devices(), jnp.arange(64.0).reshape(8, 8)
    there = devices[7] if where == "one device" else NamedSharding(Mesh(np.array(devices[4:8]), ("q",)), P("q"))
    placed = jax.device_put(x, there)
    run = jaxplan.make_plan(lambda a: a + 1.0, placed, mesh=mesh_of((4,))).jit()
    np.testing.assert_array_equal(run(placed), x + 1.0)
    assert placed.sharding.device_set == (set(devices[4:8]) if where == "another mesh" else {devices[7]})


def test_arrays_that_lie_as_planned_are_not_copied():
    plan = jaxplan.make_plan(lambda a: a, jnp.ones((8, 8)), mesh=mesh_of((8,)), pins={"a": P("x")})
    placed = jax.device_put(jnp.ones((8, 8)), plan.in_shardings[0])
    assert plan.jit()._place(placed, plan.in_shardings[0], False) is placed
