"""Plans in other libraries' words: what needs no library. `test_export_libraries.py` loads into the libraries themselves."""

from __future__ import annotations

import importlib.metadata
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from hypothesis import given, settings, strategies as st
from jax.sharding import AbstractMesh, PartitionSpec as P

import jaxplan
from jaxplan import cli
from jaxplan.export import EXPORTERS
from jaxplan.export.libraries import OLDEST, library
from jaxplan.export.names import logical_axes
from jaxplan.export.nouns import Item
from jaxplan.files import read_plan, saved_plan

S = jax.ShapeDtypeStruct


def step(params, x, y):
    def loss(params):
        h = jnp.tanh(x @ params["in"]["w"] + params["in"]["b"][None])
        return jnp.mean((h @ params["out"] - y) ** 2)

    value, gradients = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value


PARAMS = {"in": {"w": S((24, 48), jnp.float32), "b": S((48,), jnp.float32)}, "out": S((48, 24), jnp.float32)}
ARGS = PARAMS, S((96, 24), jnp.float32), S((96, 24), jnp.float32)
PINS = {"params/in/w": P(None, "y"), "params/in/b": P("y"), "params/out": P("y"), "x": P("x"), "y": P("x")}


@pytest.fixture(scope="module")
def plan():
    return jaxplan.make_plan(step, *ARGS, mesh=mesh_of((3, 2)), machine="v5e", pins=PINS)


@pytest.fixture
def no_flax_needed(monkeypatch):
    """Names and rules are plain values; only that the library is there is asked."""
    monkeypatch.setattr("jaxplan.export.flax.library", lambda module, distribution: None)


# --- what is exported ------------------------------------------------------------------------------------------------


def test_arguments_are_chosen_by_path_by_a_tree_of_paths_or_by_structure(plan, no_flax_needed):
    names = plan.export("flax").names
    assert isinstance(names, tuple) and len(names) == 3 and set(names[0]) == {"in", "out"}
    assert set(plan.export("flax", "params").names) == {"in", "out"}
    assert isinstance(plan.export("flax", "params/in/w").names, P)
    chosen = plan.export("flax", {"a": "params/in", "b": ["x"]}).names
    assert set(chosen["a"]) == {"w", "b"} and len(chosen["b"]) == 1
    assert plan.export("flax", PARAMS) == plan.export("flax", "params")


def test_a_path_that_is_none_and_a_tree_that_is_no_argument_are_told(plan):
    with pytest.raises(jaxplan.ExportError, match="no input of step lies at 'param'; the closest are params"):
        plan.export("maxtext", "param")
    with pytest.raises(ValueError, match=r"w \(float32\[7\]\) stands for no argument of step"):
        plan.export("maxtext", {"w": np.zeros(7, np.float32)})


def test_a_format_or_an_option_that_is_none_is_told(plan):
    with pytest.raises(jaxplan.ExportError, match=r"no export format 'maxtest'.*did you mean 'maxtext'"):
        plan.export("maxtest")
    with pytest.raises(TypeError, match="the export 'maxtext' does not take optimizer"):
        plan.export("maxtext", optimizer=None)


def test_keyword_arguments_and_keys_with_slashes_are_found(no_flax_needed):
    def f(a, *, b):
        return a["u/v"] @ b["w"]

    shapes = {"u/v": S((8, 4), jnp.float32)}, {"w": S((4, 8), jnp.float32)}
    plan = jaxplan.make_plan(f, shapes[0], b=shapes[1], mesh=mesh_of((2,)), machine="v5e")
    assert isinstance(plan.export("flax", "a/u/v").names, P)
    assert set(plan.export("flax", "b").names) == {"w"}
    args, kwargs = plan.export("flax").names
    assert set(args[0]) == {"u/v"} and set(kwargs) == {"b"}


# --- logical names ---------------------------------------------------------------------------------------------------

ENTRIES = st.sampled_from([None, "x", "y", ("x", "y"), ("y", "z")])


@st.composite
def layouts(draw):
    items = []
    for number in range(draw(st.integers(1, 6))):
        dims = draw(st.lists(st.sampled_from(["B", "D", "D_0", "D_1"]), max_size=4))
        entries, used = [], set()
        for _ in dims:
            entry = draw(ENTRIES)
            axes = set(entry if isinstance(entry, tuple) else [entry] if entry else [])
            entries.append(None if axes & used else entry)
            used |= axes if not axes & used else set()
        items.append(Item(f"p{number}", (8,) * len(dims), "float32", tuple(dims), tuple(entries)))
    return items


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_names_under_the_rules_are_the_layouts_and_stand_once_in_an_array(items):
    axes = logical_axes(items)
    for item in items:
        assert axes.spec(item.path) == item.entries
        assert len(set(axes.names[item.path])) == len(item.shape)
    needed = {(name, entry) for item in items for name, entry in zip(item.dims, item.entries, strict=True)}
    for name in {name for name, _ in needed}:
        alone = sum(n == name for n, _ in needed) == 1 and all(item.dims.count(name) < 2 for item in items)
        assert not alone or name in axes.rules, "a name that needs one layout is not split"


def test_a_name_of_two_layouts_is_split_and_the_users_own_names_are_used(no_flax_needed):
    plan = jaxplan.make_plan(
        step, *ARGS, mesh=mesh_of((3, 2)), machine="v5e", pins=PINS,
        dims={"params/in/w": "embed mlp", "x": "batch embed", "params/out": "mlp embed_out"},
    )  # fmt: skip
    axes = plan.export("flax", "params")
    assert dict(axes.rules)["mlp"] == "y" and dict(axes.rules)["embed"] is None
    assert axes.names["in"]["w"] == P("embed", "mlp")
    other = plan.replan(pins={**PINS, "params/in/b": P()}).export("flax", "params")
    assert {name: axis for name, axis in other.rules if name.startswith("mlp")} == {"mlp_0": None, "mlp_1": "y"}


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(plan, tmp_path, monkeypatch):
    plan.save(tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "plan.json"


def test_the_command_writes_what_the_objects_say(plan, saved, tmp_path, capsys, no_flax_needed):
    assert cli.main(["export", "plan.json", "flax", "--of", "params", "-o", "rules.py"]) == 0
    names: dict = {}
    exec((tmp_path / "rules.py").read_text(), names)
    axes = plan.export("flax", "params")
    assert names["RULES"] == axes.rules and names["NAMES"]["params/in/w"] == tuple(axes.names["in"]["w"])
    capsys.readouterr()
    assert cli.main(["export", "plan.json", "maxtext"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == plan.export("maxtext").rstrip("\n")
    assert cli.main(["export", "plan.json", "haliax", "--of", "params/in/w", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["axis_mapping"].values()) == ["y"]


def test_every_format_has_a_file_or_says_that_it_is_objects(saved, capsys):
    from jaxplan.cli.exporting import FORMATS

    assert {name for name, exporter in EXPORTERS.items() if exporter.write} | {"explicit"} == set(FORMATS)
    for name in EXPORTERS.keys() - set(FORMATS):
        assert cli.main(["export", "plan.json", name]) == 1
        assert f"from plan.export('{name}')" in capsys.readouterr().err


def test_what_a_command_cannot_do_is_told(saved, capsys):
    for words, status, told in (
        (["plan.json", "flex"], 1, "did you mean 'flax'"),
        (["plan.json", "flax", "--of", "parms"], 1, "no input of step lies at 'parms'; the closest are params"),
        (["plan.json", "explicit"], 2, "explicit needs the function"),
        (["none.json", "flax"], 2, "none.json cannot be read"),
        (["plan.json", "flax", "-o", "no/where.py"], 2, "no/where.py cannot be written"),
    ):
        assert cli.main(["export", *words]) == status
        assert told in capsys.readouterr().err


def test_the_command_says_calls_by_line(saved, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "here", sys.modules[__name__])
    assert cli.main(["export", "plan.json", "explicit", "here:step", "--shapes", "here:ARGS"]) == 0
    shown = capsys.readouterr().out
    assert 'return jnp.mean((h @ params["out"] - y) ** 2)' in shown and "out_sharding=P()" in shown
    assert cli.main(["export", "plan.json", "explicit", "here:step", "--shapes", "here:ARGS", "--json"]) == 0
    calls = json.loads(capsys.readouterr().out)["calls"]
    assert {call["call"] for call in calls} == {"out_sharding", "reshard"} and all(call["line"] > 0 for call in calls)


def test_a_mapping_with_two_layouts_for_a_name_names_the_paths():
    def f(x, w):
        return x @ w

    args = S((16, 8), jnp.float32), S((8, 8), jnp.float32)
    pins, dims = {"x": P(None, "x"), "w": P()}, {"x": "B D", "w": "D F"}
    plan = jaxplan.make_plan(f, *args, mesh=mesh_of((2,)), machine="v5e", pins=pins, dims=dims)
    with pytest.raises(jaxplan.ExportError, match=r"(?s)D: x in x; whole in w.*replan with pins= on these paths"):
        EXPORTERS["haliax"].write(saved_plan(plan), None)


# --- libraries that are missing --------------------------------------------------------------------------------------

NEEDS = {"flax": "flax", "nnx": "flax", "optax": "optax", "keras": "keras", "haliax": "haliax"}


def missing(monkeypatch, version):
    def found(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)


@pytest.mark.parametrize("name", NEEDS)
def test_a_library_that_is_not_installed_is_named_with_the_extra(name, plan, monkeypatch):
    missing(monkeypatch, None)
    options = {"optimizer": object()} if name == "optax" else {}
    with pytest.raises(ModuleNotFoundError, match=rf"objects of {NEEDS[name]}, .*not installed: pip install 'jaxplan\[export\]'"):
        plan.export(name, "params", **options)


@pytest.mark.parametrize("name", NEEDS)
def test_a_library_that_is_too_old_is_told_with_both_versions(name, plan, monkeypatch):
    missing(monkeypatch, "0.0.9")
    options = {"optimizer": object()} if name == "optax" else {}
    oldest = f"{NEEDS[name]} {OLDEST[NEEDS[name]]}"
    told = rf"written for {oldest} and later, and 0.0.9 is installed: pip install -U 'jaxplan\[export\]'"
    with pytest.raises(ImportError, match=told):
        plan.export(name, "params", **options)


def test_restoring_without_orbax_is_told(plan, tmp_path, monkeypatch):
    missing(monkeypatch, None)
    with pytest.raises(ModuleNotFoundError, match=r"orbax-checkpoint, which is not installed: pip install 'jaxplan\[export\]'"):
        plan.restore(tmp_path)


def test_a_library_that_does_not_import_is_told(monkeypatch):
    missing(monkeypatch, "9.9")
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(ImportError, match=r"keras 9.9 is installed, but does not import: .*keras"):
        library("keras", "keras")


@pytest.mark.parametrize(
    ("version", "fits"), [("1.4", True), ("1.4.dev453", True), ("1.10.0rc1", True), ("1.3", False), ("0.9.9", False), ("2", True)]
)
def test_versions_are_compared_as_numbers(version, fits, monkeypatch):
    missing(monkeypatch, version)
    monkeypatch.setitem(sys.modules, "haliax", sys)
    if fits:
        assert library("haliax", "haliax") is sys
    else:
        with pytest.raises(ImportError):
            library("haliax", "haliax")


def test_a_plan_without_devices_restores_nothing(tmp_path):
    plan = jaxplan.make_plan(step, *ARGS, mesh=AbstractMesh((3, 2), ("x", "y")), machine="v5e")
    with pytest.raises(jaxplan.ExportError, match=r"made for an AbstractMesh: replan\(mesh=...\) it first"):
        plan.export("orbax", "params")


def test_a_saved_plan_exports_the_same_after_loading(plan, saved):
    loaded = jaxplan.load_plan(saved, step, *ARGS, mesh=plan.mesh)
    assert loaded.export("maxtext") == plan.export("maxtext") == EXPORTERS["maxtext"].write(read_plan(saved), None).text
