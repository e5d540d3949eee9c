"""Meshes ranked from one trace: the same numbers as planning each anew, a fixed order, and clear errors."""

import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec as P

import jaxplan
from jaxplan import api, hybrid
from jaxplan.budget import NothingFits
from jaxplan.machine import machine as find_machine
from jaxplan.whatif import distinct, factorisations
from jaxplan.whatif.meshes import AXIS_NAMES


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def train(params, x):
    def loss(params):
        return jnp.mean(jnp.square(jax.nn.relu(x @ params["up"]) @ params["down"] - x))

    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))


ARGS = {"up": f32(256, 1024), "down": f32(1024, 256)}, f32(4096, 256)


@pytest.fixture(scope="module")
def ranking():
    return jaxplan.best_mesh(train, *ARGS, devices=16, machine="a100")


@pytest.mark.parametrize(("devices", "axes"), [(1, 3), (2, 1), (7, 3), (12, 2), (16, 3), (24, 3), (36, 4)])
def test_all_factorisations_are_there_once(devices, axes):
    want = {
        shape
        for count in range(1, axes + 1)
        for shape in itertools.product(range(2, devices + 1), repeat=count)
        if math.prod(shape) == devices
    }
    found = factorisations(devices, axes)
    assert set(found) == (want or {(1,)}) and len(found) == len(set(found))


def test_only_meshes_that_differ_in_links_are_planned_apart():
    inside, across = find_machine("v4"), find_machine("a100")  # a node of thousands, and one of eight
    shapes = factorisations(16, 2)
    assert {frozenset(shape) for shape in distinct(shapes, AXIS_NAMES, inside)} == {frozenset(s) for s in shapes}
    assert len(distinct(shapes, AXIS_NAMES, inside)) == 3  # 16, 8 x 2, 4 x 4
    assert distinct(shapes, AXIS_NAMES, across) == [(16,), (8, 2), (4, 4), (2, 8)]  # of 8 x 2 and 2 x 8, another half is fast


def test_every_mesh_is_what_planning_it_anew_gives(ranking):
    assert {c.shape for c in ranking.candidates} == set(distinct(factorisations(16, 3), AXIS_NAMES, ranking.machine))
    alone = jaxplan.make_plan(train, *ARGS, mesh=AbstractMesh((1,), ("x",)), machine="a100").seconds
    for candidate in ranking.candidates:
        mesh = AbstractMesh(candidate.shape, AXIS_NAMES[: len(candidate.shape)])
        plan = jaxplan.make_plan(train, *ARGS, mesh=mesh, machine="a100")
        assert candidate.seconds == plan.seconds and candidate.plan.in_specs == plan.in_specs
        assert candidate.efficiency == pytest.approx(alone / (16 * plan.seconds), rel=1e-12)
        assert candidate.sent_bytes == sum(plan.wire_bytes.values()) and candidate.fits


def test_the_fastest_is_first_and_the_order_is_fixed(ranking):
    seconds = [c.seconds for c in ranking.candidates]
    assert seconds == sorted(seconds) and ranking.best.seconds == min(seconds)
    again = jaxplan.best_mesh(train, *ARGS, devices=16, machine="a100")
    assert [c.shape for c in again.candidates] == [c.shape for c in ranking.candidates]
    assert again.to_json() == ranking.to_json()


@pytest.fixture
def traces(monkeypatch):
    """The rows of x in every trace that jaxplan asks for; JAX's own cache would hide some from the function."""
    seen = []
    trace = api.trace

    def counted(fn, args, *rest, **options):
        seen.append(args[1].shape[0])
        return trace(fn, args, *rest, **options)

    monkeypatch.setattr(api, "trace", counted)
    return seen


def test_one_trace_is_enough(traces):
    found = jaxplan.best_mesh(train, *ARGS, devices=64, machine="a100")
    assert traces == [4096] and len(found.candidates) > 10 and found.elapsed < 20


def test_the_table_has_a_line_per_mesh(ranking):
    lines = str(ranking).splitlines()
    assert lines[0] == "Meshes of 16 devices for train, machine a100, memory budget 74.51 GiB"
    for candidate in ranking.candidates:
        (line,) = [one for one in lines if re.match(re.escape(candidate.mesh_text) + "  ", one)]
        assert f"{candidate.efficiency:.1%}" in line and " ".join(candidate.links) in line
    kinds = {c.shape: c.links for c in ranking.candidates}
    assert kinds[16,] == ("outer",) and kinds[2, 8] == ("outer", "inner")


def test_a_plan_on_real_devices_runs():
    def product(a, b):
        return jnp.tanh(a @ b)

    a, b = jnp.full((16, 8), 0.1), jnp.full((8, 32), 0.2)
    found = jaxplan.best_mesh(product, a, b, devices=jax.devices()[:8])
    assert found.machine.name == "cpu" and found.best.mesh.size == 8
    assert jnp.allclose(found.best.jit()(a, b), product(a, b))


def test_meshes_that_cannot_be_faster_are_fitted_when_they_are_asked_for(monkeypatch):
    free = jaxplan.best_mesh(train, *ARGS, devices=16, machine="a100", memory_budget=math.inf)
    budget = 0.98 * free.best.peak_bytes
    fitted, fit = [], hybrid.fit

    def counted(attempt, plan, *rest):
        fitted.append(tuple(plan.axis_sizes.values()))
        return fit(attempt, plan, *rest)

    monkeypatch.setattr(hybrid, "fit", counted)
    found = jaxplan.best_mesh(train, *ARGS, devices=16, machine="a100", memory_budget=budget)
    before, best = len(set(fitted)), found.best
    assert best.peak_bytes <= budget and fitted
    assert {c.shape for c in found.candidates} == {c.shape for c in free.candidates} and found.candidates[0].plan is best
    assert before < len(set(fitted)), "some are fitted only now"
    for candidate in found.candidates:
        mesh = AbstractMesh(candidate.shape, AXIS_NAMES[: len(candidate.shape)])
        plan = jaxplan.make_plan(train, *ARGS, mesh=mesh, machine="a100", memory_budget=budget)
        assert candidate.seconds == plan.seconds and candidate.plan.peak_bytes == plan.peak_bytes


def test_meshes_that_do_not_fit_come_last_and_none_is_an_error():
    def scaled(w):
        return jnp.tanh(w) * 2.0

    free = jaxplan.best_mesh(scaled, f32(6, 10), devices=10, machine="a100", memory_budget=math.inf)
    peaks = {c.shape: c.plan.peak_bytes for c in free.candidates}
    assert peaks[10,] < 480  # 240 bytes in, 240 out when whole
    least, largest = min(peaks.values()), max(peaks.values())
    assert all(c.fits for c in free.candidates)
    with pytest.raises(NothingFits, match=rf"no mesh of 10 devices fits .*smallest peak found is {least:.0f} B") as caught:
        jaxplan.best_mesh(scaled, f32(6, 10), devices=10, machine="a100", memory_budget=least / 2)
    assert caught.value.smallest <= largest

    some = jaxplan.best_mesh(scaled, f32(6, 2), devices=12, machine="a100", memory_budget=30)
    assert [c.fits for c in some.candidates] == sorted([c.fits for c in some.candidates], reverse=True)
    assert some.candidates[0].fits and not some.candidates[-1].fits
    assert "no: at least" in str(some) and some.best.peak_bytes <= 30


def test_a_pin_holds_on_every_mesh_that_has_its_axes():
    found = jaxplan.best_mesh(train, *ARGS, devices=8, machine="v4", pins={"x": P(None, "y")})
    assert (8,) in found.refused and "names axis 'y'" in found.refused[8,] and "not planned     8:" in str(found)
    assert found.candidates and all(c.plan.in_specs[1] == P(None, "y") for c in found.candidates)
    with pytest.raises(ValueError, match=r"no mesh of 8 devices can be planned; 8: pin 'x'.*axis 'q'"):
        jaxplan.best_mesh(train, *ARGS, devices=8, machine="v4", pins={"x": P("q")})


@pytest.mark.parametrize(
    ("options", "kind", "told"),
    [
        ({"devices": 0}, ValueError, "devices must be at least 1, got 0"),
        ({"devices": -4}, ValueError, "devices must be at least 1, got -4"),
        ({"devices": 8.0}, TypeError, "devices must be a whole number or a list of jax.devices.., got 8.0"),
        ({"devices": True}, TypeError, "whole number"),
        ({"devices": "8"}, TypeError, "whole number"),
        ({"devices": []}, ValueError, "devices is an empty list"),
        ({"devices": [1, 2]}, TypeError, "one of them is 1"),
        ({"devices": 8, "axis_names": ("x", "x")}, ValueError, "axis_names must be one or more different names"),
        ({"devices": 8, "axis_names": ()}, ValueError, "axis_names must be one or more different names"),
        ({"devices": 8, "mesh": None}, TypeError, "mesh cannot be given here: the meshes are what is looked for"),
        ({"devices": 8, "machine": "z80"}, ValueError, "no machine is called 'z80'"),
        ({"devices": 8, "memory_budget": "much"}, ValueError, "memory_budget 'much' is not a size"),
    ],
)
def test_what_is_asked_wrongly_is_told(options, kind, told):
    with pytest.raises(kind, match=told):
        jaxplan.best_mesh(train, *ARGS, **options)


def test_one_device_is_a_mesh():
    found = jaxplan.best_mesh(train, *ARGS, devices=1, machine="v4")
    assert [c.shape for c in found.candidates] == [(1,)]
    assert found.candidates[0].efficiency == 1.0 and found.candidates[0].sent_bytes == 0


# --- sweep -----------------------------------------------------------------------------------------------------------


def sized(rows, width=1024):
    return {"up": f32(256, width), "down": f32(width, 256)}, f32(rows, 256)


def slower_links(machine, speed, links):
    """As the docstring says, by hand."""
    kinds = ("inner", "outer") if links == "all" else (links,)
    for kind in kinds:
        link = getattr(machine, kind)
        changed = dataclasses.replace(link, seconds_per_byte=link.seconds_per_byte / speed)
        machine = dataclasses.replace(machine, **{kind: changed})
    return machine


DIMS = {"x": "B F", "params/up": "F W", "params/down": "W F"}


@pytest.fixture(scope="module")
def swept():
    return jaxplan.sweep(
        train, *ARGS, devices=[4, 16], sizes={"B": [64, 4096], "W": [1024, 512]}, link_speeds=[1, 0.1], links="outer",
        machine="a100", dims=DIMS,
    )  # fmt: skip


def test_every_point_of_a_grid_is_what_retracing_gives(swept):
    want = {
        (rows, width, speed, shape)
        for rows, width, speed, devices in itertools.product((64, 4096), (1024, 512), (1.0, 0.1), (4, 16))
        for shape in distinct(factorisations(devices, 2), AXIS_NAMES, find_machine("a100"))
    }
    found = {(p.sizes["B"], p.sizes["W"], p.link_speed, p.candidate.shape): p.candidate for p in swept.points}
    assert set(found) == want and len(swept.points) == len(want) and not swept.refused
    alone = {}
    for (rows, width, speed, shape), candidate in found.items():
        machine = slower_links(find_machine("a100"), speed, "outer")
        plan = jaxplan.make_plan(train, *sized(rows, width), mesh=AbstractMesh(shape, AXIS_NAMES[: len(shape)]), machine=machine)
        assert candidate.seconds == plan.seconds and candidate.sent_bytes == sum(plan.wire_bytes.values())
        assert candidate.plan.peak_bytes == plan.peak_bytes and candidate.plan.in_specs == plan.in_specs
        if (rows, width) not in alone:
            one = jaxplan.make_plan(train, *sized(rows, width), mesh=AbstractMesh((1,), ("x",)), machine=machine)
            alone[rows, width] = one.seconds
        assert candidate.efficiency == pytest.approx(alone[rows, width] / (math.prod(shape) * plan.seconds), rel=1e-12)


def test_plans_share_a_label_where_and_only_where_everything_lies_alike(swept):
    for one, two in itertools.combinations(swept.points, 2):
        plan, other = one.candidate.plan, two.candidate.plan
        alike = plan.axis_names == other.axis_names and plan.layouts == other.layouts and plan.out_specs == other.out_specs
        assert (one.label == two.label) == alike
    labels = [point.label for point in swept.points]
    assert 1 < len(set(labels)) < len(labels) and labels[0] == "A"


def test_the_fastest_mesh_of_each_number_of_devices_is_marked(swept):
    for key in itertools.product((64, 4096), (1024, 512), (1.0, 0.1), (4, 16)):
        there = [p for p in swept.points if (p.sizes["B"], p.sizes["W"], p.link_speed, p.devices) == key]
        (best,) = [p for p in there if p.best]
        assert best.candidate.seconds == min(p.candidate.seconds for p in there)


def test_a_sweep_traces_once(traces):
    found = jaxplan.sweep(train, *ARGS, devices=[2, 4, 8, 8], link_speeds=[1, 0.5, 0.5], machine="v4")
    assert traces == [4096] and found.traces == 1 and len(found.points) == 2 * (1 + 2 + 2)
    traces.clear()
    found = jaxplan.sweep(train, *ARGS, devices=8, sizes={"B": [64, 4096, 512]}, dims={"x": "B F"}, machine="v4")
    assert traces == [4096] and found.traces == 1 and found.why_traced == "" and "traced once" in str(found)


def test_sizes_that_the_trace_does_not_tell_are_traced_and_it_is_said_why(traces):
    def halves(scale, x):
        return scale * jnp.concatenate([x[::2], x[1::2]])

    found = jaxplan.sweep(
        halves, f32(), f32(4096, 8), devices=8, sizes={"B": [64, 4096, 512]}, dims={"x": "B F"}, machine="v4",
    )  # fmt: skip
    assert traces == [4096, 64, 512] and found.traces == 3
    assert re.match(r"B \(4096\) is cut, padded or strided at slice at test_whatif.py:\d+", found.why_traced)
    assert "traced for each of the sizes, because B (4096) is cut" in str(found)
    for point in found.points:
        mesh = AbstractMesh(point.candidate.shape, AXIS_NAMES[: len(point.candidate.shape)])
        anew = jaxplan.make_plan(halves, f32(), f32(point.sizes["B"], 8), mesh=mesh, machine="v4")
        assert point.candidate.seconds == anew.seconds and point.candidate.plan.in_specs == anew.in_specs


def test_the_table_and_json_of_a_sweep(swept):
    lines = str(swept).splitlines()
    assert lines[0].startswith("Sweep of train, machine a100") and "link speed: of the links between nodes" in str(swept)
    assert lines[2].split()[:5] == ["B", "W", "link", "speed", "devices"]
    assert sum(line.endswith("*") for line in lines) == 16 and lines[3].split()[:4] == ["64", "1024", "1", "4"]
    assert lines[-1].startswith(f"{len(swept.points)} points, ") and "traced once" in lines[-1]
    found = swept.to_json()["points"]
    assert [p["seconds"] for p in found] == [p.candidate.seconds for p in swept.points]
    assert found[0]["sizes"] == {"B": 64, "W": 1024} and found[0]["plan"] == "A"


def test_stated_meshes_static_and_keyword_arguments_are_swept():
    def scaled(kind, x, *, bias):
        return (jnp.tanh(x) if kind == "tanh" else x) + bias

    found = jaxplan.sweep(
        scaled, "tanh", f32(64, 32), bias=f32(64, 32), meshes=[{"data": 4, "model": 2}, {"data": 8}], sizes={"B": [128]},
        dims={"x": "B F", "bias": "B F"}, static_argnums=0, machine="v4",
    )  # fmt: skip
    assert [p.candidate.plan.axis_sizes for p in found.points] == [{"data": 4, "model": 2}, {"data": 8}]
    assert [p.best for p in found.points].count(True) == 1
    assert all(aval.shape == (128, 32) for p in found.points for aval in p.candidate.plan.traced.in_avals)


def test_points_that_cannot_be_had_are_told():
    found = jaxplan.sweep(train, *ARGS, devices=[2, 4], machine="v4", pins={"x": P("y")})
    assert [r.mesh for r in found.refused] == [{"x": 2}, {"x": 4}] and "not planned     x=2, link speed 1" in str(found)
    small = jaxplan.sweep(train, *ARGS, devices=[1, 16], machine="v4", memory_budget="6MB")
    assert [p.candidate.fits for p in small.points if p.devices == 1] == [False]
    assert not any(p.best for p in small.points if p.devices == 1) and any(p.best for p in small.points)
    assert all(p.candidate.plan.peak_bytes <= 6e6 for p in small.points if p.candidate.fits)


@pytest.mark.parametrize(
    ("options", "kind", "told"),
    [
        ({}, TypeError, "give either devices"),
        ({"devices": 4, "meshes": [{"x": 4}]}, TypeError, "give either devices"),
        ({"devices": []}, ValueError, "devices is an empty list"),
        ({"devices": [4, 0]}, ValueError, "devices must be at least 1, got 0"),
        ({"devices": "4"}, TypeError, "whole number"),
        ({"meshes": []}, ValueError, "meshes is an empty list"),
        ({"meshes": [{"x": 0}]}, ValueError, "meshes must be {axis: size} each"),
        ({"devices": 4, "link_speeds": [0.0]}, ValueError, "link_speeds must be positive numbers.*got 0.0"),
        ({"devices": 4, "link_speeds": []}, ValueError, "link_speeds must be positive"),
        ({"devices": 4, "links": "wires"}, ValueError, "links may be 'all', 'inner', 'outer', got 'wires'"),
        ({"devices": 4, "sizes": {"Q": [8]}}, ValueError, "sizes names the dimension 'Q'; its inputs have B=4096, D=1024, F=256"),
        ({"devices": 4, "sizes": {"B": [8]}, "dims": {"x": "R F"}}, ValueError, "its inputs have D=1024, F=256, R=4096"),
        ({"devices": 4, "sizes": {"B": [0]}, "dims": {"x": "B F"}}, ValueError, "a whole number of at least 1, got 0"),
        ({"devices": 4, "sizes": {"B": []}, "dims": {"x": "B F"}}, ValueError, "a list of whole numbers"),
        ({"devices": 4, "sizes": {"B": [8]}, "dims": {"x": "B B"}}, ValueError, "dims calls two extents 'B': 4096 of x"),
        ({"devices": 4, "pins": {"x": P("q")}}, ValueError, "nothing can be planned; on {'x': 4}: pin 'x'"),
    ],
)
def test_what_is_swept_wrongly_is_told(options, kind, told):
    with pytest.raises(kind, match=told):
        jaxplan.sweep(train, *ARGS, machine="v4", **options)


def test_sizes_at_which_the_function_does_not_trace_are_named():
    def cut(x):
        return x[:128].reshape(2, 64, 8)

    with pytest.raises(TypeError) as caught:
        jaxplan.sweep(cut, f32(256, 8), devices=4, machine="v4", sizes={"B": [64]}, dims={"x": "B F"})
    assert "at B=64, one of the sizes of the sweep" in caught.value.__notes__
