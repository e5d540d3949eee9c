"""Pytree paths that differ by the number of a layer: which numbers count, and what stands for all of them."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

import jaxplan
from jaxplan.files import fold
from jaxplan.paths import alike, several, starred, words_and_indices
from jaxplan.pins import inputs_at
from jaxplan.trace import trace

LAYERS = 24


@pytest.mark.parametrize(
    ("path", "indices"),
    [
        ("layers/3/w", (3,)),  # a list, as in JAX's own examples
        ("layers/3", (3,)),  # of arrays
        ("params/Block_3/Dense_0/kernel", (3, 0)),  # Flax Linen
        ("mlp/~/linear_12/w", (12,)),  # Haiku
        ("layer3/w", (3,)),
        ("model.layers.3.self_attn.q_proj.weight", (3,)),  # one flat dict
        ("h.3.mlp.w1", (3,)),
        ("conv2d_3/w", (2, 3)),
        ("w1", ()),  # arrays of their own
        ("mlp/w1", ()),
        ("mlp.w_1", ()),
        ("layer_007/w", ()),  # what would not come back as it was
        ("x{0}/y", (0,)),
        ("", ()),
    ],
)
def test_numbers_of_levels_count(path, indices):
    words, found = words_and_indices(path)
    assert found == indices and len(words) == len(found) + 1
    assert "".join(word + str(i) for word, i in zip(words, [*found, ""], strict=True)) == path


def test_only_what_differs_gets_a_star():
    paths = [f"params/Block_{i}/Dense_0/kernel" for i in range(3)]
    assert len({alike(path) for path in paths}) == 1
    assert starred(paths) == "params/Block_*/Dense_0/kernel"
    assert several(paths) == "params/Block_*/Dense_0/kernel (x3)" and several(paths[:1]) == paths[0]
    assert alike("w1") != alike("w2")


def test_numbers_in_names_fold_in_files_and_come_back():
    leaves = {f"Block_{i}/Dense_{j}/kernel": j % 2 for i in range(12) for j in range(3)}
    leaves |= {"Block_12/Dense_0/kernel": 0, "a{1}/w": 3, "a{2}/w": 3, "w1": 4, "w2": 4, "layer_007/w": 5}
    folded = fold.fold_paths(leaves)
    assert folded["Block_{0-11}/Dense_{0,2}/kernel"] == 0 and folded["Block_{0-11}/Dense_1/kernel"] == 1
    assert len(folded) == 7 and fold.unfold_paths(folded) == leaves


def named(name):
    """A train step over layers in a dict, each under a name made from its number."""

    def step(params, x):
        def loss(params):
            y = x
            for i in range(LAYERS):
                y = y + jnp.tanh(y @ params[name.format(i)]["up"]) @ params[name.format(i)]["down"]
            return jnp.mean(jnp.square(y))

        return jax.tree.map(lambda w, g: w - 0.1 * g, params, jax.grad(loss)(params))

    def f32(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return step, ({name.format(i): {"up": f32(256, 512), "down": f32(512, 256)} for i in range(LAYERS)}, f32(64, 256))


@pytest.mark.parametrize("name", ["Block_{}", "layer{}", "h.{}.mlp"])
def test_layers_that_are_told_apart_by_name_are_one_row_and_one_entry(name, tmp_path):
    step, args = named(name)
    plan = jaxplan.make_plan(step, *args, mesh=AbstractMesh((4, 2), ("x", "y")), machine="v4")
    rows = [line for line in str(plan).split("\n\n")[1].split("\n") if line.startswith("params/")]
    assert 2 <= len(rows) <= 6, "the first and the last layer may lie elsewhere"
    shown = re.match(r"(\S+) \(x([0-9]+)\) ", rows[0])
    assert shown and int(shown[2]) > 20 and len(inputs_at(trace(step, args, {}), "pin", shown[1])) == LAYERS, "a glob"
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").stat().st_size < 20_000
    loaded = jaxplan.load_plan(tmp_path / "plan.json", step, *args)
    assert (loaded.choices == plan.choices).all() and loaded.in_specs == plan.in_specs
    space: dict = {}
    exec(compile(plan.to_python(), "specs.py", "exec"), space)
    assert space["specs_of"]("params", args[0]) == plan.in_specs[0]
