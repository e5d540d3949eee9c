"""Rooms `measure` and `machine`: fits find what generated the samples, and machines survive the way through a file."""

from __future__ import annotations

import json
import math
import os
import re

import jax
import jax.numpy as jnp
import pytest
from conftest import mesh_of
from jax.sharding import AbstractMesh

import jaxplan
from jaxplan import measure
from jaxplan.machine import PRESETS, machine
from jaxplan.machine.files import named


@pytest.fixture(scope="module")
def calibration():
    """Of tiny sizes: what is tested is that numbers come out, not which."""
    patch = pytest.MonkeyPatch()
    for name, value in (("DTYPES", ("float32",)), ("SIDES", (16, 64)), ("PASSES", (1 << 12, 1 << 16)), ("PAYLOADS", (64, 4096)),
                        ("TARGET", 1e-4), ("REPEATS", 2)):  # fmt: skip
        patch.setattr(measure, name, value)
    found = jaxplan.calibrate(mesh_of((4, 2)), "tiny")
    patch.undo()
    return found


def test_every_quantity_is_measured_and_its_fit_reported(calibration):
    found = calibration.machine
    assert set(found.seconds_per_flop) == {"float32"} and set(found.axis_links) == {"x", "y"}
    quantities = {"r float32": 2, "m": 2, "link x": 8, "link y": 8}
    for quantity, count in quantities.items():
        off = calibration.residuals(quantity)
        assert len(off) == count and all(1 <= factor < math.inf for factor in off)
        assert quantity in str(calibration)
    assert "in the median" in str(calibration) and re.search(r"memory +no limit", str(calibration))
    assert all(sample.seconds > 0 for sample in calibration.samples)


def test_the_collectives_send_what_the_formulas_say():
    """The bytes that a sample stands for are those that the compiled benchmark sends."""
    mesh = mesh_of((4, 2))
    spec = jax.sharding.PartitionSpec(mesh.axis_names)
    for kind, (step, sent) in measure._EXCHANGES.items():
        body = jax.shard_map(lambda x, step=step: step(x, "x", 4), mesh=mesh, in_specs=spec, out_specs=spec)
        audit = jaxplan.audit(jax.jit(body), jax.ShapeDtypeStruct((8 * 64,), jnp.float32), mesh=mesh)
        assert audit.wire_bytes() == {"x": sent(4, 4.0 * 64)}, kind


def test_a_fit_finds_what_made_the_samples():
    g, latency = 3e-10, 2e-5
    runs = [measure._Run("", (h, k), h * g + k * latency) for h in (1e3, 1e5, 1e7) for k in (1.0, 2.0)]
    samples = []
    assert measure._fit("link", runs, samples) == pytest.approx((g, latency), rel=1e-4)
    assert max(sample.off for sample in samples) < 1.001


def test_a_measured_machine_plans(calibration):
    plan = jaxplan.make_plan(
        lambda x, w: jnp.tanh(x @ w), jax.ShapeDtypeStruct((512, 64), jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.float32),
        mesh=AbstractMesh((4, 2), ("x", "y")), machine=calibration.machine,
    )  # fmt: skip
    assert "machine tiny" in str(plan)


def test_when_time_is_up_what_is_left_is_measured_by_short_loops(monkeypatch):
    seen = []
    timed = measure._timed
    monkeypatch.setattr(measure, "_timed", lambda loop, value, rounds: seen.append(rounds) or timed(loop, value, rounds))
    monkeypatch.setattr(measure, "SIDES", (16,))
    monkeypatch.setattr(measure, "PASSES", (1 << 12,))
    monkeypatch.setattr(measure, "LIMIT", 0.0)
    found = jaxplan.calibrate(mesh_of((1,)), "hasty")
    assert set(seen) == {measure.LEAST_ROUNDS} and len(seen) == 2 * len(found.samples) == 2 * (len(measure.DTYPES) + 1)


def test_an_abstract_mesh_cannot_be_measured():
    with pytest.raises(ValueError, match="live devices"):
        jaxplan.calibrate(AbstractMesh((4,), ("x",)))


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_machines_survive_a_file(name, tmp_path):
    path = jaxplan.save_machine(PRESETS[name], tmp_path / "new folder" / "m.json")
    assert jaxplan.load_machine(path) == PRESETS[name]
    assert machine(str(path)) == PRESETS[name]
    assert "Infinity" not in path.read_text(), "other readers of JSON know no such number"
    assert [p.name for p in path.parent.iterdir()] == ["m.json"], "nothing is left behind"


def test_a_machine_of_ones_own_is_found_by_name(tmp_path, monkeypatch, calibration):
    monkeypatch.setenv("JAXPLAN_HOME", str(tmp_path))
    jaxplan.save_machine(calibration.machine, named("lab"))
    assert machine("lab") == calibration.machine
    with pytest.raises(ValueError, match=r"there are v4, .*, lab, or pass .*; did you mean 'lab'\?"):
        machine("labb")
    with pytest.raises(ValueError, match="no name for a machine"):
        named("../lab")
    with pytest.raises(ValueError, match="no machine file"):
        machine(str(tmp_path / "absent.json"))


def changed(**fields):
    text = json.loads(json.dumps({"format": "jaxplan machine", "version": 1, "name": "m", "seconds_per_flop": {"float32": 1e-12},
                                  "seconds_per_byte": 1e-12, "memory_bytes": 1e9, "node": 8, "axis_links": {},
                                  "inner": {"seconds_per_byte": 1e-11, "latency_seconds": 1e-6},
                                  "outer": {"seconds_per_byte": 1e-10, "latency_seconds": 1e-6}}))  # fmt: skip
    return json.dumps({**text, **fields})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a machine file"),
        (changed(format="other"), "not a machine file"),
        (changed(version=7), "version 7; this jaxplan reads version 1"),
        (changed(seconds_per_flop=[1]), "'seconds_per_flop' should be of type dict"),
        (changed(seconds_per_flop={"float32": "fast"}), r"'seconds_per_flop\.float32' should be a number"),
        (changed(seconds_per_flop={"bfloat16": 1e-12}), "needs at least 'float32'"),
        (changed(memory_bytes=-1), "memory_bytes must be positive"),
        (changed(memory_bytes=float("nan")), "memory_bytes must be positive"),
        (changed(node=True), "'node' should be of type int"),
        (changed(inner=3), "'inner' should be an object"),
        (changed(axis_links={"x": {"seconds_per_byte": 1}}), r"'axis_links\.x\.latency_seconds' should be a number"),
        (" " * (1 << 20) + "{}", "at most 1048576 bytes"),
    ],
)
def test_what_is_no_machine_file_is_told(text, message, tmp_path):
    path = tmp_path / "m.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        jaxplan.load_machine(path)
    assert str(caught.value).startswith(str(path))


def test_a_file_that_was_there_survives_a_full_disk(tmp_path, monkeypatch):
    path = jaxplan.save_machine(PRESETS["v4"], tmp_path / "m.json")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        jaxplan.save_machine(PRESETS["v5e"], path)
    assert jaxplan.load_machine(path) == PRESETS["v4"]
    assert [p.name for p in tmp_path.iterdir()] == ["m.json"]

