"""Exports loaded into the libraries themselves, at the versions installed. Needs the extra `export`; CI installs it."""

from __future__ import annotations

import importlib
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, mesh_of
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxplan
from jaxplan.examples import programs
from jaxplan.export.names import logical_axes
from jaxplan.export.select import items_of, select

os.environ["KERAS_BACKEND"] = "jax"


@pytest.fixture(autouse=True)
def as_the_libraries_want():
    """They count on NumPy's promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


pytestmark = pytest.mark.filterwarnings("default")  # the libraries' own


def needs(module):
    absent = importlib.util.find_spec(module.partition(".")[0]) is None
    return pytest.mark.skipif(absent, reason=f"{module} not installed: pip install 'jaxplan[export]'")


S = jax.ShapeDtypeStruct


def step(params, x, y):
    def loss(params):
        h = jnp.tanh(x @ params["in"]["w"] + params["in"]["b"][None])
        return jnp.mean((h @ params["out"] - y) ** 2)

    value, gradients = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value


PARAMS = {"in": {"w": S((24, 48), jnp.float32), "b": S((48,), jnp.float32)}, "out": S((48, 24), jnp.float32)}
ARGS = PARAMS, S((96, 24), jnp.float32), S((96, 24), jnp.float32)
PINS = {"params/in/w": P("x", "y"), "params/in/b": P("y"), "params/out": P(("x", "y")), "x": P("x")}


def plan_on(sizes, pins=PINS, **options):
    return jaxplan.make_plan(step, *ARGS, mesh=mesh_of(sizes), machine="v5e", pins=pins, **options)


@pytest.fixture(scope="module")
def plan():
    return plan_on((3, 2))


def same_specs(mesh, want, got):
    """Whether two trees of specs (or shardings) lay arrays out alike."""
    want, got = (jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, P)) for tree in (want, got))
    assert len(want) == len(got) > 0
    for one, other in zip(want, got, strict=True):
        one, other = (s if isinstance(s, NamedSharding) else NamedSharding(mesh, s) for s in (one, other))
        assert one.is_equivalent_to(other, 8), (one.spec, other.spec)


# --- Flax Linen ------------------------------------------------------------------------------------------------------


@needs("flax")
@pytest.mark.parametrize("name", ["decoder_scan", "decoder_unrolled", "resnet_momentum", "moe"])
@pytest.mark.parametrize("sizes", [(4, 2), (2, 2, 2)])
def test_linens_rules_give_the_plans_layouts_on_every_example(name, sizes):
    import flax.linen as nn

    program = programs()[name]
    plan = jaxplan.make_plan(program.fn, *program.args, mesh=mesh_of(sizes), machine="v4")
    axes = plan.export("flax")
    same_specs(plan.mesh, plan.in_specs, nn.logical_to_mesh_sharding(axes.names, plan.mesh, axes.rules))
    with nn.logical_axis_rules(axes.rules):
        same_specs(plan.mesh, plan.in_specs, nn.logical_to_mesh_sharding(axes.names, plan.mesh))


@needs("flax")
def test_a_linen_model_that_names_its_axes_is_laid_out_as_planned():
    import flax.linen as nn

    class Net(nn.Module):
        names: dict

        @nn.compact
        def __call__(self, x):
            def dense(name, width):
                axes = self.names[name]
                kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), tuple(axes["kernel"]))
                bias = nn.with_logical_partitioning(nn.initializers.zeros_init(), tuple(axes["bias"]))
                return nn.Dense(width, kernel_init=kernel, bias_init=bias, name=name)

            return dense("down", 24)(nn.relu(dense("up", 48)(x)))

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(24, name="down")(nn.relu(nn.Dense(48, name="up")(x)))

    x = jnp.ones((96, 24))
    params = jax.eval_shape(Plain().init, jax.random.key(0), x)["params"]

    def train(params, x):
        grads = jax.grad(lambda params: jnp.mean(Plain().apply({"params": params}, x) ** 2))(params)
        return jax.tree.map(lambda p, g: p - g, params, grads)

    pins = {"params/up/kernel": P("x", "y"), "params/down/kernel": P(("x", "y")), "x": P("x")}
    plan = jaxplan.make_plan(train, params, x, mesh=mesh_of((3, 2)), machine="v5e", pins=pins)
    axes = plan.export("flax", "params")
    variables = jax.eval_shape(Net(axes.names).init, jax.random.key(0), x)
    logical = nn.get_partition_spec(variables)["params"]
    assert logical == axes.names
    same_specs(plan.mesh, plan.in_specs[0], nn.logical_to_mesh_sharding(logical, plan.mesh, axes.rules))
    boxed = axes.boxed(params)
    assert isinstance(boxed["up"]["kernel"], nn.LogicallyPartitioned) and nn.get_partition_spec(boxed) == axes.names


# --- Flax NNX --------------------------------------------------------------------------------------------------------


@needs("flax")
def test_nnx_reads_the_plan_off_its_variables():
    import optax
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down, self.norm = (
                nnx.Linear(24, 48, rngs=rngs),
                nnx.Linear(48, 24, rngs=rngs),
                nnx.BatchNorm(48, rngs=rngs),
            )

        def __call__(self, x):
            return self.down(nnx.relu(self.norm(self.up(x))))

    net = Net(nnx.Rngs(0))
    graph, state = nnx.split((net, nnx.Optimizer(net, optax.adam(1e-3), wrt=nnx.Param)))

    def train(state, x):
        net, optimizer = nnx.merge(graph, state)
        grads = nnx.grad(lambda net: jnp.mean(net(x) ** 2))(net)
        optimizer.update(net, grads)
        return nnx.state((net, optimizer))

    pins = {"**kernel*": P("x", "y"), "x": P("x")}
    plan = jaxplan.make_plan(train, state, jnp.ones((96, 24)), mesh=mesh_of((3, 2)), machine="v5e", pins=pins)
    for of in ("state", state):
        marked = plan.export("nnx", of)
        same_specs(plan.mesh, plan.in_specs[0], nnx.get_partition_spec(marked))
        same_specs(plan.mesh, plan.in_specs[0], nnx.get_named_sharding(marked, plan.mesh))
    specs = jax.tree.leaves(nnx.get_partition_spec(marked), is_leaf=lambda node: isinstance(node, P))
    assert P("x", "y") in specs and P() in [P(*[entry for entry in spec if entry]) for spec in specs]
    sharded = jax.device_put(marked, nnx.get_named_sharding(marked, plan.mesh))
    plan.check(jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(sharded)))
    with pytest.raises(jaxplan.ExportError, match=r"x is in no nnx.Variable"):
        plan.export("nnx")


# --- Optax -----------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": lambda optax: optax.adamw(1e-3),
    "momentum": lambda optax: optax.sgd(0.1, momentum=0.9),
    "lion": lambda optax: optax.lion(1e-3),
    "multi_steps": lambda optax: optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
    "a chain": lambda optax: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(0.0, 1e-3, 10))),
}


@needs("optax")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_lies_as_optax_itself_maps_parameters(name, plan):
    import optax

    optimizer = OPTIMIZERS[name](optax)
    specs = plan.export("optax", "params", optimizer=optimizer)
    state = jax.eval_shape(optimizer.init, PARAMS)
    assert jax.tree.structure(specs, is_leaf=lambda node: isinstance(node, P)) == jax.tree.structure(state)
    want = optax.tree_map_params(
        optimizer,
        lambda _, spec: spec,
        state,
        plan.in_specs[0],
        transform_non_params=lambda _: P(),
        is_leaf=lambda v: isinstance(v, P),
    )
    same_specs(plan.mesh, want, specs)


@needs("optax")
@pytest.mark.parametrize("name", ["adafactor", "masked"])
def test_state_that_is_not_like_the_parameters_is_planned_and_the_update_runs(name, plan):
    import optax

    optimizer = {
        "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=16),
        "masked": optax.masked(optax.adam(1e-3), {"in": {"w": True, "b": False}, "out": True}),
    }[name]
    specs = plan.export("optax", "params", optimizer=optimizer)
    state = jax.eval_shape(optimizer.init, PARAMS)
    shardings = jax.tree.map(lambda spec: NamedSharding(plan.mesh, spec), specs, is_leaf=lambda node: isinstance(node, P))
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    params = jax.tree.map(lambda s: np.linspace(-1, 1, s.size, dtype=np.float32).reshape(s.shape), PARAMS)
    made = jax.jit(optimizer.init, out_shardings=shardings)(params)
    updates, _ = jax.jit(optimizer.update)(params, made, params)
    assert_close(jax.jit(lambda p: optimizer.update(p, optimizer.init(p), p)[0])(params), updates)
    if name == "masked":
        assert P("x", "y") in jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, P))


@needs("optax")
def test_state_that_is_an_argument_is_taken_from_the_plan_and_no_optimizer_is_told():
    import optax

    optimizer = optax.adam(1e-3)
    state = jax.eval_shape(optimizer.init, PARAMS)

    def train(params, state, x, y):
        gradients = jax.grad(lambda params: step(params, x, y)[1])(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    plan = jaxplan.make_plan(train, PARAMS, state, *ARGS[1:], mesh=mesh_of((4, 2)), machine="v4")
    for of in ("state", state):
        same_specs(plan.mesh, plan.in_specs[1], plan.export("optax", of))
    with pytest.raises(jaxplan.ExportError, match=r"optimizer must be an optax.GradientTransformation, got str"):
        plan.export("optax", "params", optimizer="adam")


# --- MaxText ---------------------------------------------------------------------------------------------------------


@needs("yaml")
@needs("flax")
def test_maxtexts_rules_load_and_give_the_layouts(plan, tmp_path):
    import yaml
    from flax import linen as nn

    text = plan.export("maxtext")
    found = yaml.safe_load(text)
    assert found.keys() == {"base_config", "mesh_axes", "logical_axis_rules"}, "MaxText refuses a configuration with other keys"
    assert found["mesh_axes"] == ["x", "y"]
    names = yaml.safe_load(text.partition("by path:\n")[2].replace("#", ""))
    rules = [(name, tuple(axes) or None) for name, axes in found["logical_axis_rules"]]
    for path, spec in zip(
        plan.traced.in_paths, jax.tree.leaves(plan.in_specs, is_leaf=lambda node: isinstance(node, P)), strict=True
    ):
        same_specs(plan.mesh, [spec], [nn.logical_to_mesh_axes(names[path], rules)])


@pytest.mark.skipif(importlib.util.find_spec("maxtext") is None, reason="maxtext not installed: it takes Python 3.12 or later")
def test_maxtexts_own_reader_takes_the_rules(plan, tmp_path):
    """Over its base configuration, which has mesh axes and rules of its own."""
    pyconfig = importlib.import_module("maxtext.configs.pyconfig")
    path = tmp_path / "rules.yml"
    path.write_text(plan.export("maxtext"))
    asked = ("run_name=test", "hardware=cpu", "enable_checkpointing=false", "skip_jax_distributed_system=true")
    found = pyconfig.initialize(["test", str(path), *asked, "log_config=false"])
    assert list(found.mesh_axes) == ["x", "y"]
    rules = {name: tuple([axes] if isinstance(axes, str) else axes) for name, axes in found.logical_axis_rules}
    told = [axes for spec in jax.tree.leaves(plan.in_specs, is_leaf=lambda node: isinstance(node, P)) for axes in spec if axes]
    assert set(rules.values()) - {()} == {(axes,) if isinstance(axes, str) else tuple(axes) for axes in told}


# --- Haliax ----------------------------------------------------------------------------------------------------------


def haliax_or_skip():
    pytest.importorskip("haliax", exc_type=ImportError)
    import haliax

    return haliax


def test_haliaxs_mapping_gives_the_layouts_of_named_arrays():
    haliax = haliax_or_skip()
    from haliax.partitioning import pspec_for_axis

    Batch, Embed, Mlp = haliax.make_axes(Batch=96, Embed=24, Mlp=48)
    params = {"up": haliax.ones((Embed, Mlp)), "down": haliax.ones((Mlp, Embed))}

    def train(params, x):
        def loss(params):
            h = haliax.tanh(haliax.dot(x, params["up"], axis="Embed"))
            return haliax.mean((haliax.dot(h, params["down"], axis="Mlp") - x) ** 2).array

        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))

    plan = jaxplan.make_plan(
        train, params, haliax.ones((Batch, Embed)), mesh=mesh_of((3, 2)), machine="v5e",
        pins={"params/up": P(None, "y"), "params/down": P("y"), "x": P("x")},
    )  # fmt: skip
    mapping = plan.export("haliax")
    assert mapping == {"Mlp": "y", "Batch": "x"}
    for array, number in ((params["down"], 0), (params["up"], 1)):
        same_specs(plan.mesh, [plan.partition_spec_of(number)], [pspec_for_axis(array.axes, mapping)])
    torn = plan.replan(pins={"params/up": P("x", "y"), "params/down": P("y"), "x": P("x")})
    with pytest.raises(jaxplan.ExportError, match=r"Embed: whole in params/down/0, x/0; x in params/up/0"):
        torn.export("haliax")
    assert torn.export("haliax", "params/up") == {"Embed": "x", "Mlp": "y"}


# --- Keras -----------------------------------------------------------------------------------------------------------


@needs("keras")
def test_a_keras_model_built_under_the_layout_map_is_laid_out_as_planned():
    import keras

    def model():
        keras.utils.clear_session()
        layers = [keras.layers.Input((24,)), keras.layers.Dense(48, activation="tanh"), keras.layers.Dense(24)]
        return keras.Sequential(layers)

    net = model()

    def train(trainable, fixed, x):
        def loss(trainable):
            return jnp.mean(net.stateless_call(trainable, fixed, x)[0] ** 2)

        return [p - 0.1 * g for p, g in zip(trainable, jax.grad(loss)(trainable), strict=True)]

    values = [variable.value for variable in net.trainable_variables]
    pins = {"trainable/0": P("x", "y"), "trainable/2": P("y")}
    plan = jaxplan.make_plan(train, values, [], ARGS[1], mesh=mesh_of((3, 2)), machine="v5e", pins=pins)
    layout_map = plan.export("keras", net.trainable_variables)
    assert len(layout_map) == 4
    same_specs(plan.mesh, plan.in_specs[0], [layout_map[v.path].backend_layout.spec for v in net.trainable_variables])
    by_path = plan.export("keras", "trainable", variables=net.trainable_variables)
    assert dict(by_path.items()).keys() == dict(layout_map.items()).keys()
    keras.utils.clear_session()
    keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="x"))
    try:
        layers = [keras.layers.Input((24,)), keras.layers.Dense(48, activation="tanh"), keras.layers.Dense(24)]
        built = keras.Sequential(layers)
        same_specs(plan.mesh, plan.in_specs[0], [variable.value.sharding for variable in built.trainable_variables])
    finally:
        keras.distribution.set_distribution(None)


@needs("keras")
def test_what_keras_has_no_words_for_is_named():
    import keras

    keras.utils.clear_session()
    net = keras.Sequential([keras.layers.Input((24,)), keras.layers.Dense(48)])

    def apply(trainable, x):
        return net.stateless_call(trainable, [], x)[0]

    values = [variable.value for variable in net.trainable_variables]
    pins = {"trainable/0": P(None, ("x", "y"))}
    plan = jaxplan.make_plan(apply, values, ARGS[1], mesh=mesh_of((3, 2)), machine="v5e", pins=pins)
    with pytest.raises(jaxplan.ExportError, match="one mesh axis, and this plan needs several for: sequential/dense/kernel"):
        plan.export("keras", net.trainable_variables)
    with pytest.raises(jaxplan.ExportError, match=r"2 arrays are selected, and 1 Keras variables are given"):
        plan.export("keras", "trainable")


# --- Orbax -----------------------------------------------------------------------------------------------------------


def values(tree=PARAMS):
    return jax.tree.map(lambda s: np.linspace(-1, 1, s.size, dtype=np.float32).reshape(s.shape), tree)


def save(directory, tree):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory, tree)


@needs("orbax.checkpoint")
@pytest.mark.parametrize(("sizes", "other"), [((4, 2), (2, 2, 2)), ((3, 2), (16,)), ((2,), (4, 4))])
def test_what_one_plan_saved_another_meshs_plan_restores(sizes, other, tmp_path):
    pins = {"params/in/w": P("x"), "params/out": P("x")}
    one, two = plan_on(sizes, pins), plan_on(other, {"params/in/w": P(None, "x")})
    placed = jax.device_put(values(), one.in_shardings[0])
    one.check(placed)
    save(tmp_path / "state", placed)
    restored = two.restore(tmp_path / "state", "params")
    two.check(restored)
    jax.tree.map(np.testing.assert_array_equal, values(), restored)
    assert len(restored["in"]["w"].sharding.device_set) == two.mesh.size


@needs("orbax.checkpoint")
@needs("optax")
def test_optimizer_state_and_random_keys_go_through_a_checkpoint(tmp_path):
    import optax

    optimizer = optax.adam(1e-3)

    def train(state, key, x):
        params, moments = state
        noise = jax.random.normal(key, x.shape)
        updates, moments = optimizer.update(jax.grad(lambda p: jnp.mean(((x + noise) @ p["w"]) ** 2))(params), moments, params)
        return optax.apply_updates(params, updates), moments

    params = {"w": np.ones((24, 48), np.float32)}
    state, key = (params, optimizer.init(params)), jax.random.key(3)
    plan = jaxplan.make_plan(train, state, key, ARGS[1], mesh=mesh_of((4, 2)), machine="v5e", pins={"state/0/w": P("x", "y")})
    save(tmp_path / "all", {"state": state, "key": key})
    target = {"state": "state", "key": "key"}
    restored = plan.restore(tmp_path / "all", target)
    plan.check(restored["state"])
    jax.tree.map(np.testing.assert_array_equal, state, restored["state"])
    assert type(restored["state"][1][0]) is type(state[1][0])
    assert jnp.array_equal(jax.random.key_data(restored["key"]), jax.random.key_data(key))
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:  # the target, with Orbax alone
        by_hand = checkpointer.restore(tmp_path / "all", plan.export("orbax", target))
    plan.check(by_hand["state"])


@needs("orbax.checkpoint")
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            lambda p: {**p, "out": np.ones((48, 25), np.float32)},
            r"of another shape or dtype: out is float32\[48,25\], planned float32\[48,24\]",
        ),
        (
            lambda p: {**p, "out": p["out"].astype(np.float16)},
            r"of another shape or dtype: out is float16\[48,24\], planned float32",
        ),
        (lambda p: {"in": p["in"]}, r"missing: out \(float32\[48,24\]\)"),
        (lambda p: {**p, "in": {"w": p["in"]["w"]}}, r"missing: in/b \(float32\[48\]\)"),
        (lambda p: {**p, "more": p["out"]}, r"not asked for: more \(float32\[48,24\]\).*Restore with partial=True"),
        (
            lambda p: {"params": p, "step": np.ones(())},
            r"missing: in/b .*in/w .*out .*\n  not asked for: params/in/b.*holds this under 'params': select with of={'params': ",
        ),
    ],
)
def test_a_checkpoint_of_something_else_names_the_paths(changed, told, plan, tmp_path):
    save(tmp_path / "state", changed(values()))
    with pytest.raises(jaxplan.CheckpointError, match=f"(?s)does not hold what was planned for, and nothing was read:.*{told}"):
        plan.restore(tmp_path / "state", "params")


@needs("orbax.checkpoint")
def test_a_part_of_a_checkpoint_can_be_restored(plan, tmp_path):
    state = {"params": values(), "key": jax.random.key(1), "moments": [np.zeros((3, 5), np.float16)]}
    save(tmp_path / "state", state)
    restored = plan.restore(tmp_path / "state", {"params": "params"}, partial=True)
    assert list(restored) == ["params"]
    plan.check(restored["params"])
    jax.tree.map(np.testing.assert_array_equal, values(), restored["params"])
    with pytest.raises(jaxplan.CheckpointError, match=r"nothing was read:\n  missing: w/in/b .*\nSelect what it holds"):
        plan.restore(tmp_path / "state", {"w": "params"}, partial=True)


@needs("orbax.checkpoint")
def test_a_directory_that_is_no_checkpoint_is_told(plan, tmp_path):
    with pytest.raises(jaxplan.CheckpointError, match=r"there is no checkpoint .*nothing: no such directory"):
        plan.restore(tmp_path / "nothing", "params")
    (tmp_path / "run" / "10").mkdir(parents=True)
    told = "run is no checkpoint of a pytree; it has the directories 10: a checkpoint manager's steps and items lie there"
    with pytest.raises(jaxplan.CheckpointError, match=told):
        plan.restore(tmp_path / "run", "params")


def test_names_of_a_selection_are_those_of_its_items(plan):
    assert list(logical_axes(items_of(select(plan, "params"))).names) == ["params/in/b", "params/in/w", "params/out"]
