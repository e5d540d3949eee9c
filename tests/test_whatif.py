"""Meshes ranked from one trace: the same numbers as planning each anew, a fixed order, and clear errors."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec as P

import jaxplan
from jaxplan.budget import NothingFits
from jaxplan.machine import machine as find_machine
from jaxplan.whatif import AXIS_NAMES, distinct, factorisations


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


def test_one_trace_is_enough():
    calls = []

    def counted(params, x):
        calls.append(1)
        return train(params, x)

    found = jaxplan.best_mesh(counted, *ARGS, devices=64, machine="a100")
    assert len(calls) == 1 and len(found.candidates) > 10 and found.elapsed < 20


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


def test_meshes_that_do_not_fit_come_last_and_none_is_an_error():
    def scaled(w):
        return jnp.tanh(w) * 2.0

    free = jaxplan.best_mesh(scaled, f32(6, 10), devices=10, machine="v4", memory_budget=math.inf)
    peaks = {c.shape: c.plan.peak_bytes for c in free.candidates}
    assert peaks[10,] < 480  # 240 bytes in, 240 out when whole
    least, largest = min(peaks.values()), max(peaks.values())
    assert all(c.fits for c in free.candidates)
    with pytest.raises(NothingFits, match=rf"no mesh of 10 devices fits .*smallest peak found is {least:.0f} B") as caught:
        jaxplan.best_mesh(scaled, f32(6, 10), devices=10, machine="v4", memory_budget=least / 2)
    assert caught.value.smallest <= largest

    some = jaxplan.best_mesh(scaled, f32(6, 2), devices=12, machine="v4", memory_budget=30)
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
