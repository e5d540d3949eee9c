"""Axes that share a dimension stand in one order in all of a plan: what was said, else the slower one first. Whatever it is,
plans compute the same, compile to what they predict, and cost what they do on a mesh that has its axes in that order."""

import itertools
import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, mesh_of
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P
from unlike_programs import unet

import jaxplan
from jaxplan import files
from jaxplan.cost import Numbers
from jaxplan.cost.exchange import combine_steps, reshard_steps
from jaxplan.examples import programs
from jaxplan.examples.decoder import SMALL, decoder
from jaxplan.files import PlanFileError, parse_plan
from jaxplan.graph import build_graph
from jaxplan.layout import PARTIAL, AxisOrder
from jaxplan.machine import Link, Machine
from jaxplan.trace import trace

FAST = Link(1e-10, 0.0)
MACHINE = Machine("slow arithmetic", {"float32": 1e-9}, 1e-10, 2.0**30, FAST, FAST, 64)
"""Work is dear and exchanges are cheap, so that also small programs are sharded."""
TINY = replace(SMALL, width=16, heads=2, mlp_width=32, vocabulary=32, sequence=8, batch=8)
PROGRAMS = programs("small") | {"decoder_tiny": decoder(TINY, "scan")}
QUICK = {("mlp_sgd", (4, 2)), ("mlp_sgd", (2, 2, 2))}
F32 = jnp.float32


def last_slower(shape, factor=5.0):
    """A mesh and a machine whose last axis is slower than the others."""
    mesh = mesh_of(shape)
    return mesh, MACHINE.slower(mesh.axis_names[-1], factor, dict(mesh.shape))


def last_first(mesh):
    """The same devices, with the last axis as the first."""
    names = mesh.axis_names
    return Mesh(np.moveaxis(mesh.devices, -1, 0), (names[-1], *names[:-1]), axis_types=mesh.axis_types)


def shared(plan):
    """The orders in which axes share dimensions of what a plan writes, once it is where it stays."""
    entries = [axes for specs in plan.constraints.writes.values() for axes in specs[-1] if len(axes) > 1]
    return {tuple(plan.axis_names[axis] for axis in axes) for axes in entries}


def shape_of(*shape):
    return jax.ShapeDtypeStruct(shape, F32)


def double(x):
    return x * 2.0


def assert_same(name, want, got):
    """Of a decoder, moments and loss: what AdamW's first step does is about the sign of the gradient."""
    if name.startswith("decoder"):
        want, got = ((result[1]["mu"], result[2]) for result in (want, got))
    assert_close(want, got)


# --- the same but for the numbers of the axes ------------------------------------------------------------------------


@pytest.mark.parametrize("turned", list(itertools.permutations(range(3))))
def test_steps_are_those_of_a_mesh_with_its_axes_in_that_order(turned):
    """`turned[k]`: the axis here that is axis k there, where mesh order is the order of all dimensions."""

    def layout(there):
        return tuple(there[turned.index(axis)] for axis in range(3))

    def spec(there):
        return tuple(tuple(turned[axis] for axis in axes) for axes in there)

    def steps(there):
        return [(s.kind, tuple(turned[a] for a in s.axes), spec(s.before), spec(s.after)) for s in there]

    def plain(found):
        return [(s.kind, s.axes, s.before, s.after) for s in found]

    for slow in itertools.permutations(range(3)):
        order, there = AxisOrder(tuple(turned[a] for a in slow), turned), AxisOrder(slow, (0, 1, 2))
        for src, dst in itertools.product(itertools.product((PARTIAL, -1, 0, 1), repeat=3), repeat=2):
            found = plain(reshard_steps(layout(src), layout(dst), 2, order))
            assert found == steps(reshard_steps(src, dst, 2, there)), (src, dst, slow)
        for scatter in itertools.product((-1, 0, 1), repeat=2):
            split, whole = (-1, -1, 1), (*scatter, -1)
            there_found = combine_steps(split, whole, ((0,), (1,)), 2, there)
            partial = ((turned[0],), (turned[1],))
            assert plain(combine_steps(layout(split), layout(whole), partial, 2, order)) == steps(there_found)


@pytest.mark.parametrize("name", ["mlp_sgd", "decoder_tiny", pytest.param("resnet_momentum", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", [(4, 2), (2, 2, 2)])
def test_a_plan_costs_what_it_does_on_the_mesh_with_its_slower_axis_first(name, shape):
    program = PROGRAMS[name]
    mesh, machine = last_slower(shape)
    made = [
        jaxplan.make_plan(program.fn, *program.args, mesh=on, machine=machine, donate_argnums=program.donate, pipeline=None)
        for on in (mesh, last_first(mesh))
    ]
    plan, other = made
    last = mesh.axis_names[-1]
    assert plan.seconds == pytest.approx(other.seconds, rel=1e-12) and plan.wire_bytes == other.wire_bytes
    assert plan.in_specs == other.in_specs and plan.out_specs == other.out_specs
    assert shared(plan) == shared(other) and any(order[0] == last for order in shared(plan))
    assert plan.axis_sizes == dict(mesh.shape) and f"{' x '.join(f'{a}={n}' for a, n in mesh.shape.items())}" in str(plan)


def test_where_links_are_alike_axes_stand_in_mesh_order():
    program = PROGRAMS["mlp_sgd"]
    plan = jaxplan.make_plan(program.fn, *program.args, mesh=mesh_of((4, 2)), machine=MACHINE)
    assert shared(plan) == {("x", "y")} and plan.modelled.numbers.major_first == ("x", "y")


# --- values and bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(name, shape, marks=() if (name, shape) in QUICK else pytest.mark.slow)
        for name in PROGRAMS for shape in ((4, 2), (2, 4), (2, 2, 2))
    ],
)  # fmt: skip
def test_values_are_the_programs_and_bytes_those_of_the_other_mesh(name, shape):
    program = PROGRAMS[name]
    mesh, machine = last_slower(shape)
    plan, other = (
        jaxplan.make_plan(program.fn, *program.args, mesh=on, machine=machine, donate_argnums=program.donate, pipeline=None)
        for on in (mesh, last_first(mesh))
    )
    assert plan.modelled.numbers.major_first == other.axis_names == (mesh.axis_names[-1], *mesh.axis_names[:-1])
    args = program.make_args(0)
    assert_same(name, jax.jit(program.fn)(*args), plan.jit(())(*args))
    found, wanted = plan.audit(), other.audit()
    assert found.predicted == wanted.predicted and found.compiled == wanted.compiled
    assert max(found.errors.values(), default=0.0) <= 0.02


@pytest.mark.parametrize("order", [("x", "y"), ("y", "x")])
def test_a_halo_that_skips_devices_crosses_the_axes_that_are_crossed(order):
    """Neighbours two devices away along a dimension of which y, of two devices, is the minor axis are neighbours along x."""

    def shifted(x):
        return jnp.tanh(x) + jnp.roll(x, 8, 0)

    mesh, x = mesh_of((4, 2)), np.arange(32 * 4, dtype=np.float32).reshape(32, 4) / 100
    plan = jaxplan.make_plan(shifted, x, mesh=mesh, machine=MACHINE, pins={"x": P(order)})
    assert plan.in_specs == (P(order),)
    np.testing.assert_allclose(plan.jit()(x), shifted(x), rtol=1e-6)
    found = plan.audit()
    assert found.predicted["x"] > 0 and found.errors == dict.fromkeys(found.errors, 0.0), found


# --- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [("x", "y"), ("y", "x")])
@pytest.mark.parametrize("slower", ["x", "y", None])
def test_a_pin_is_honoured_in_either_order(entry, slower):
    mesh = mesh_of((4, 2))
    machine = MACHINE.slower(slower, 5, {"x": 4, "y": 2}) if slower else MACHINE
    plan = jaxplan.make_plan(double, shape_of(16, 8), mesh=mesh, machine=machine, pins={"x": P(entry)})
    assert plan.in_specs == (P(entry),) and plan.out_specs == P(entry)
    x = jnp.arange(128.0, dtype=F32).reshape(16, 8)
    got = plan.jit()(x)
    np.testing.assert_array_equal(got, x * 2)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, P(entry)), 2)
    assert not plan.audit().compiled_bytes


def test_pins_of_three_axes_leave_the_others_to_their_links():
    mesh = AbstractMesh((2, 2, 2), ("x", "y", "z"))
    machine = MACHINE.slower("y", 5, dict(mesh.shape)).slower("z", 9, dict(mesh.shape))

    def major_first(**pins):
        plan = jaxplan.make_plan(lambda a, b: (a, b), shape_of(8, 8), shape_of(8, 8), mesh=mesh, machine=machine, pins=pins)
        return plan.modelled.numbers.major_first

    assert major_first() == ("z", "y", "x")
    assert major_first(a=P(("x", "y"))) == ("z", "x", "y")
    assert major_first(a=P(("x", "z"))) == ("y", "x", "z")
    assert major_first(a=P(("x", "z")), b=P(("x", "y"))) == ("x", "z", "y")
    assert major_first(a=P(("x", "y")), b=P(("y", "z"))) == ("x", "y", "z")


def test_pins_in_two_orders_are_refused_by_name():
    pins = {"a": P(("y", "x")), "b": P(None, ("x", "y"))}
    told = r"pin 'b': .*must stand in one order in all of a plan; other pins have these as \('y', 'x'\)"
    with pytest.raises(ValueError, match=told):
        jaxplan.make_plan(lambda a, b: (a, b), shape_of(8, 8), shape_of(8, 8), mesh=mesh_of((4, 2)), pins=pins)


def test_the_specs_of_a_plan_are_pins_of_another():
    """As an exporter makes of them, or a user who plans evaluation like training."""
    mesh, machine = last_slower((4, 2))
    program = PROGRAMS["mlp_sgd"]
    plan = jaxplan.make_plan(program.fn, *program.args, mesh=mesh, machine=machine)
    pins = dict(zip(plan.traced.in_paths, jax.tree.leaves(plan.in_specs, is_leaf=lambda s: isinstance(s, P)), strict=True))
    assert any(isinstance(entry, tuple) for spec in pins.values() for entry in spec)
    for other in (machine, MACHINE, MACHINE.slower("x", 5, dict(mesh.shape))):
        again = jaxplan.make_plan(program.fn, *program.args, mesh=mesh, machine=other, pins=pins)
        assert again.in_specs == plan.in_specs


@pytest.mark.parametrize("entry", [("x", "y"), ("y", "x")])
def test_what_the_program_asks_for_is_kept_in_its_order(entry):
    mesh, machine = last_slower((4, 2))

    def constrained(x):
        return jax.lax.with_sharding_constraint(x * 2.0, NamedSharding(mesh, P(entry))) + 1.0

    def mapped(x):
        return jax.shard_map(lambda part: part * 2.0, mesh=mesh, in_specs=P(entry), out_specs=P(entry))(x)

    x = jnp.arange(128.0, dtype=F32).reshape(16, 8)
    for fn in (constrained, mapped):
        plan = jaxplan.make_plan(fn, x, mesh=mesh, machine=machine)
        assert plan.out_specs == P(entry) and shared(plan) == {entry}
        np.testing.assert_array_equal(plan.jit()(x), fn(x))
        assert not plan.audit().compiled_bytes


def test_pins_come_before_what_the_program_asks_for():
    mesh = mesh_of((4, 2))

    def constrained(x):
        return jax.lax.with_sharding_constraint(x * 2.0, NamedSharding(mesh, P(("y", "x"))))

    plan = jaxplan.make_plan(constrained, shape_of(16, 8), mesh=mesh, machine=MACHINE, pins={"x": P(("x", "y"))})
    assert plan.in_specs == (P(("x", "y")),) and plan.modelled.numbers.major_first == ("x", "y")


def test_an_order_that_would_go_round_is_left_out():
    graph = build_graph(trace(double, (shape_of(8),), {}))
    sizes = dict.fromkeys("abcd", 2)

    def order(*said):
        return "".join(Numbers(graph, sizes, MACHINE, said=said).major_first)

    assert order() == "abcd" and order("dc", "cb") == "adcb" and order("dc", "cb", "bd") == "adcb"
    assert order("dcba", "abcd") == "dcba" and order("ca", "xb", "bb", "") == "bcad"


# --- planned again, saved, exported ----------------------------------------------------------------------------------


def test_planned_again_for_another_link_the_order_is_that_links():
    mesh = mesh_of((4, 2))
    program = PROGRAMS["mlp_sgd"]
    plan = jaxplan.make_plan(program.fn, *program.args, mesh=mesh, machine=MACHINE)
    sizes = dict(mesh.shape)
    turned = plan.replan(machine=MACHINE.slower("y", 5, sizes))
    fresh = jaxplan.make_plan(program.fn, *program.args, mesh=mesh, machine=MACHINE.slower("y", 5, sizes))
    assert turned.modelled.numbers.major_first == ("y", "x") and plan.modelled.numbers.major_first == ("x", "y")
    assert turned.seconds == fresh.seconds and turned.in_specs == fresh.in_specs and turned.exchanges == fresh.exchanges
    assert turned.constraints == fresh.constraints and turned.memory == fresh.memory
    assert float(turned.cost.subs(turned.symbol_values)) == pytest.approx(turned.seconds, rel=1e-9)
    assert turned.replan(machine=MACHINE).constraints == plan.constraints


def test_a_file_has_the_order_and_one_without_has_that_of_the_mesh(tmp_path):
    mesh, machine = last_slower((4, 2))
    program = PROGRAMS["mlp_sgd"]
    plan = jaxplan.make_plan(program.fn, *program.args, mesh=mesh, machine=machine)
    plan.save(tmp_path / "plan.json")
    loaded = jaxplan.load_plan(tmp_path / "plan.json", program.fn, *program.args, mesh=mesh)
    assert loaded.constraints == plan.constraints and loaded.seconds == plan.seconds and loaded.exchanges == plan.exchanges
    assert list(loaded.mesh.shape) == ["x", "y"] and loaded.axis_sizes == {"x": 4, "y": 2}
    assert loaded.replan().in_specs == plan.in_specs
    args = program.make_args(0)
    assert_close(jax.jit(program.fn)(*args), loaded.jit(())(*args))

    saved = json.loads((tmp_path / "plan.json").read_text())
    turned = files.Comparison(files.saved_plan(plan), parse_plan(json.dumps({**saved, "axis_order": ["x", "y"]})))
    assert "axes that share" in str(turned)
    assert saved["axis_order"] == ["y", "x"] and [axis["axis"] for axis in saved["mesh"]] == ["x", "y"]
    with pytest.raises(PlanFileError, match=r"axis_order: \['y', 'z'\] are not the axes of the mesh, \['x', 'y'\]"):
        parse_plan(json.dumps({**saved, "axis_order": ["y", "z"]}))


def test_a_file_of_before_there_was_an_order_loads_as_it_was(tmp_path):
    """As such versions planned: in mesh order, whatever the links."""
    mesh, machine = last_slower((4, 2))
    pins = {"x": P(("x", "y"))}
    plan = jaxplan.make_plan(double, shape_of(16, 8), mesh=mesh, machine=machine, pins=pins)
    plan.save(tmp_path / "plan.json")
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert "axis_order" not in saved
    (tmp_path / "plan.json").write_text(json.dumps({**saved, "asked": {**saved["asked"], "pins": {}}}))
    loaded = jaxplan.load_plan(tmp_path / "plan.json", double, shape_of(16, 8), mesh=mesh)
    assert loaded.in_specs == (P(("x", "y")),)
    assert loaded.replan().modelled.numbers.major_first == ("y", "x"), "planned again, it is left to the links"


def test_specs_that_are_exported_have_the_order():
    mesh, machine = last_slower((4, 2))
    program = PROGRAMS["mlp_sgd"]
    plan = jaxplan.make_plan(program.fn, *program.args, mesh=mesh, machine=machine)
    text = plan.export("maxtext")
    assert 'mesh_axes: ["x", "y"]' in text and '["y", "x"]]' in text and '["x", "y"]]' not in text
    assert '("y", "x")' in plan.to_python() and '("x", "y")' not in plan.to_python()
    said = plan.export("explicit")
    assert any(("y", "x") in spec for _, spec in said.inputs)


# --- stages and partial sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 16])
def test_terms_stay_partial_sums_along_axes_in_any_order(size):
    def loss(table, rows, states):
        return jnp.sum(jnp.tanh(jnp.tanh(states * table[rows]) @ table.T))

    rng = np.random.default_rng(0)
    args = rng.standard_normal((32, 16), np.float32), rng.integers(0, 32, size), rng.standard_normal((size, 16), np.float32)
    mesh, machine = last_slower((4, 2), 3.0)
    pins = {"rows": P(("y", "x")), "states": P(("y", "x"))}
    plan = jaxplan.make_plan(jax.value_and_grad(loss), *args, mesh=mesh, machine=machine, pins=pins)
    problem, random = plan.modelled.problem, np.random.default_rng(1)
    want = jax.jit(jax.value_and_grad(loss))(*args)
    assert_close(want, plan.jit()(*args))
    partial = set()
    for _ in range(6):  # what no search would choose is to be right, too
        choices = np.array([random.integers(0, node.options) for node in problem.nodes])
        legal = [math.isfinite(float(node.price(row[None])[0])) for node, row in zip(problem.nodes, choices, strict=True)]
        choices[~np.array(legal)] = 0
        other = replace(plan, choices=plan.modelled.complete(choices))
        partial |= {axes for sums in other.constraints.sums.values() for axes in sums}
        assert_close(want, other.jit()(*args))
    assert any(partial)


def test_a_pipeline_leaves_the_order_of_the_other_axes(tmp_path):
    def descend(x, weights):
        def loss(weights):
            return jnp.mean(jnp.square(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]))

        value, gradient = jax.value_and_grad(loss)(weights)
        return value, weights - 0.1 * gradient

    mesh, machine = last_slower((2, 2, 2))
    rng = np.random.default_rng(0)
    args = rng.standard_normal((32, 16), np.float32), rng.standard_normal((4, 16, 16), np.float32)
    plan = jaxplan.make_plan(descend, *args, mesh=mesh, machine=machine, pipeline="x", microbatches=4)
    assert plan.pipeline is not None and plan.modelled.numbers.major_first == ("z", "x", "y")
    assert ("z", "y") in shared(plan)
    assert_close(jax.jit(descend)(*args), plan.jit()(*args))
    assert set(plan.audit().errors.values()) == {0.0}
    plan.save(tmp_path / "plan.json")
    assert jaxplan.load_plan(tmp_path / "plan.json", descend, *args, mesh=mesh).constraints == plan.constraints


@pytest.mark.slow
def test_stages_on_sub_meshes_have_the_order_of_the_whole_plan(tmp_path):
    step, args = unet()
    mesh, machine = last_slower((2, 2, 2))
    plan = jaxplan.make_plan(step, *args, mesh=mesh, machine=machine, pipeline="x", microbatches=2)
    assert [stage.modelled.numbers.major_first for stage in plan.stage_plans] == [("z", "x", "y")] * 2
    assert all(("z", "y") in shared(stage) for stage in plan.stage_plans)
    assert_close(jax.jit(step)(*args), plan.jit()(*args))
    found = plan.audit()
    assert found.predicted == found.compiled
    plan.save(tmp_path / "plan.json")
    loaded = jaxplan.load_plan(tmp_path / "plan.json", step, *args, mesh=mesh)
    assert [stage.constraints for stage in loaded.stage_plans] == [stage.constraints for stage in plan.stage_plans]
