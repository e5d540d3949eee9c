"""Machines: presets, links per axis, and what is said about a wrong one."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh

from jaxplan.machine import PRESETS, Link, Machine, axis_links, machine


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_positive_finite_and_say_where_links_come_from(name):
    preset = PRESETS[name]
    assert preset.name == name and machine(name) is preset
    for link in (preset.inner, preset.outer):
        assert link.source
    assert preset.flop_seconds("bfloat16") <= preset.flop_seconds("float32") < math.inf
    assert preset.flop_seconds("some_dtype_of_the_future") == preset.flop_seconds("float32")


def test_an_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match=r"no machine is called 'h10'.*v5e.*did you mean 'h100'"):
        machine("h10")
    with pytest.raises(TypeError, match="preset's name"):
        machine(3)  # type: ignore[arg-type]


def test_the_mesh_tells_the_machine():
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    assert machine(None, mesh).name == "cpu"
    assert machine(None, AbstractMesh((2,), ("x",))).name == "v5e"


def test_the_last_axes_fill_a_node():
    links = axis_links(PRESETS["h100"], {"data": 4, "model": 8})
    assert links["model"] == PRESETS["h100"].inner and links["data"] == PRESETS["h100"].outer
    links = axis_links(PRESETS["h100"], {"a": 2, "b": 2, "c": 2})
    assert set(links.values()) == {PRESETS["h100"].inner}


def test_one_axis_can_be_slower():
    slow = PRESETS["v5e"].slower("x", 10, {"x": 4, "y": 4})
    links = axis_links(slow, {"x": 4, "y": 4})
    assert links["x"].seconds_per_byte == pytest.approx(10 * links["y"].seconds_per_byte)


def test_axes_of_a_slice_that_is_no_torus_are_lines_at_half_the_rate():
    ring, line = PRESETS["v4"].inner, PRESETS["v4"].inner.slower(2.0)
    assert axis_links(PRESETS["v4"], {"x": 4, "y": 4}) == {"x": line, "y": line}
    assert axis_links(PRESETS["v4"], {"x": 16, "y": 4}) == {"x": ring, "y": ring}  # one cube of 4 x 4 x 4
    pod = dataclasses.replace(PRESETS["v4"], torus=256)
    assert axis_links(pod, {"x": 16, "y": 4}) == {"x": line, "y": line}
    assert set(axis_links(pod, {"x": 16, "y": 16}).values()) == {ring}
    assert set(axis_links(PRESETS["h100"], {"x": 2, "y": 2}).values()) == {PRESETS["h100"].inner}  # switches


def test_an_axis_that_has_its_slice_to_itself_goes_round_it():
    inner = PRESETS["v4"].inner
    assert axis_links(PRESETS["v4"], {"x": 8}) == {"x": inner}
    assert axis_links(PRESETS["v4"], {"x": 1, "y": 6})["y"] == inner
    assert axis_links(PRESETS["v4"], {"x": 2})["x"] == inner.slower(2.0)  # two devices have one link between them


def test_only_links_inside_of_a_slice_are_halved():
    machine, stated = dataclasses.replace(PRESETS["v5e"], torus=256), Link(3.0, 0.5)
    links = axis_links(machine.with_axis("y", stated), {"slices": 128, "x": 4, "y": 4})
    assert links == {"slices": machine.outer, "x": machine.inner.slower(2.0), "y": stated}


def test_a_torus_has_at_least_one_device():
    with pytest.raises(ValueError, match="torus must be at least 1"):
        dataclasses.replace(PRESETS["v4"], torus=0)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan])
def test_numbers_are_checked_when_a_machine_is_made(wrong):
    with pytest.raises(ValueError, match="positive and finite"):
        Link(wrong, 0.0)
    with pytest.raises(ValueError, match="seconds_per_byte"):
        Machine("m", {"float32": 1.0}, wrong, 1.0, Link(1.0, 0.0), Link(1.0, 0.0), 1)
    with pytest.raises(ValueError, match="at least 'float32'"):
        Machine("m", {}, 1.0, 1.0, Link(1.0, 0.0), Link(1.0, 0.0), 1)
