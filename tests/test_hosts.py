"""Several processes with devices of their own run one planned function; where they planned otherwise, they say so and stop."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, mesh_of
from jax.sharding import AbstractMesh, PartitionSpec as P

import jaxplan
from jaxplan.agree import differences, fingerprints

START = """
import os, sys, jax
port, count, index = map(int, sys.argv[1:4])
jax.config.update("jax_num_cpu_devices", 8 // count)
jax.distributed.initialize(
    f"localhost:{port}", count, index, initialization_timeout=60, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=20
)
import jax.numpy as jnp, numpy as np, jaxplan
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

def step(w, x):
    value, gradient = jax.value_and_grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w)
    return w - 0.1 * gradient, value

def plan_of(step=step, rows=128, mesh=None):
    x = jax.ShapeDtypeStruct((rows, 64), jnp.float32)
    mesh = jax.make_mesh((4, 2), ("x", "y")) if mesh is None else mesh
    return jaxplan.make_plan(step, w, x, mesh=mesh, machine="v5e", pins={"x": P("x"), "w": P(None, "y")})

w = np.linspace(-1, 1, 64 * 32, dtype=np.float32).reshape(64, 32)
x = np.linspace(-1, 1, 128 * 64, dtype=np.float32).reshape(128, 64)
want, loss = jax.jit(step)(np.asarray(jax.jit(step)(w, x)[0]), x)
"""
"""What every process starts with. All of them together have eight devices."""

ALIKE = """
plan = plan_of()
run = plan.jit()
got, value = run(*run(w, x)[:1], x)
np.testing.assert_allclose(multihost_utils.process_allgather(got, tiled=True), want, rtol=1e-5, atol=1e-6)
np.testing.assert_allclose(value.addressable_data(0), loss, rtol=1e-5)
print("SPECS", plan.in_specs, plan.out_specs)
"""

PART = """
mine = [d for d in jax.devices() if d.process_index in (1, 2)]
if index in (1, 2):  # the others run nothing on this mesh, and are not waited for
    got, _ = plan_of(mesh=jax.sharding.Mesh(np.array(mine).reshape(2, 2), ("x", "y"))).jit()(w, x)
    assert not got.is_fully_addressable
print("PART")
"""

OTHERWISE = """
odd = index == 1

def other_numbers(w, x):
    value, gradient = jax.value_and_grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w)
    return w - 0.2 * gradient, value

def other_function(w, x):
    value, gradient = jax.value_and_grad(lambda w: jnp.mean(jnp.sin(x @ w) ** 2))(w)
    return w - 0.1 * gradient, value

def run(name, plan):
    try:
        plan.jit()(w, x)
        print("RAN", name)
    except jaxplan.DifferentPlans as error:
        print("DIFFERENT", name, str(error).replace("\\n", " | "))
    except ValueError as error:
        print("REFUSED", name, error)

run("numbers", plan_of(other_numbers if odd else step))
run("function", plan_of(other_function if odd else step))
version = jax.__version__
jax.__version__ = "0.0.1" if odd else version
run("versions", plan_of())
jax.__version__ = version
x = x[:64] if odd else x
run("shapes", plan_of(rows=64 if odd else 128))
sys.exit(7)
"""

ABSENT = """
if index == 1:
    os._exit(9)
from jaxplan import agree
agree.WAIT_SECONDS = 5.0
try:
    plan_of().jit()(w, x)
except TimeoutError as error:
    print("TIMEOUT", error, flush=True)
    os._exit(5)
"""

DIES = """
run = plan_of().jit()
w, _ = run(w, x)
jax.block_until_ready(w)
print("RAN", flush=True)
if index == 1:
    os._exit(9)
for _ in range(1000):
    w, value = run(w, x)
    jax.block_until_ready(w)
print("NEVER")
"""

SAVES = """
import orbax.checkpoint as ocp
got, _ = plan_of().jit()(w, x)
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(sys.argv[4], {"w": got})
"""

RESTORES = """
plan = plan_of(mesh=jax.make_mesh((2, 4), ("x", "y")))
restored = plan.restore(sys.argv[4], {"w": "w"})
plan.check(restored)
part = plan.restore(sys.argv[4], {"w": "w"}, partial=True)
plan.check(part)
assert jax.jit(jnp.array_equal)(part["w"], restored["w"]).addressable_data(0)
got, value = plan.jit()(restored["w"], x)
np.testing.assert_allclose(multihost_utils.process_allgather(got, tiled=True), want, rtol=1e-5, atol=1e-6)
try:
    plan.restore(sys.argv[4], "w")
except jaxplan.CheckpointError as error:
    print("REFUSED", error)
"""

SECONDS = 120
"""By when every process has ended, whatever happens to the others."""


def run_together(count: int, program: str, *more: str) -> list[tuple[int, str]]:
    """(exit status, output) of each of so many processes, which hash strings differently."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    environment.pop("XLA_FLAGS", None)
    started = []
    for index in range(count):
        command = [sys.executable, "-c", START + program, *map(str, (port, count, index)), *more]
        own = {**environment, "PYTHONHASHSEED": str(index)}
        started.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in started]
        return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]
    finally:
        for process in started:
            process.kill()


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_plan_alike_and_compute_what_one_does(count):
    done = run_together(count, ALIKE + (PART if count == 4 else ""))
    assert [status for status, _ in done] == [0] * count, done
    specs = {line for _, output in done for line in output.splitlines() if line.startswith("SPECS")}
    assert len(specs) == 1


def test_processes_that_planned_otherwise_say_in_what_and_run_nothing():
    done = run_together(2, OTHERWISE)
    assert [status for status, _ in done] == [7, 7], done
    for _, output in done:
        said = {line.split()[1]: line for line in output.splitlines() if line.startswith(("DIFFERENT", "RAN", "REFUSED"))}
        for name, aspect in {
            "numbers": "its numbers (process 1 differs from process 0)",
            "function": "tanh: 1 on process 0, none on process 1",
            "versions": f"jaxlib or jaxplan (process 1 differs from process 0): JAX: {jax.__version__} on process 0, 0.0.1 on",
            "shapes": "argument shapes (process 1 differs from process 0): x: float32[128,64] on process 0, float32[64,64] on",
        }.items():
            assert said[name].startswith(f"DIFFERENT {name}") and "nothing was run" in said[name], said[name]
            assert aspect in said[name], said[name]
            assert name != "function" or "the traced function (process 1 differs from process 0): " in said[name]
            assert "Run one program, with one set of versions" in said[name]


@pytest.mark.slow
def test_a_process_that_does_not_come_is_named_in_time():
    (status, output), (gone, _) = run_together(2, ABSENT)
    assert gone == 9 and status == 5, output
    assert "devices of 2 processes, and process 1 did not come to run it within 5 s" in output


@pytest.mark.slow
def test_a_process_that_dies_between_runs_ends_the_others_with_an_error():
    (status, output), (gone, _) = run_together(2, DIES)
    assert gone == 9 and status != 0, output
    assert "RAN" in output and "NEVER" not in output


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("orbax") is None, reason="orbax not installed: pip install 'jaxplan[export]'")
def test_what_two_processes_saved_four_and_one_restore(tmp_path):
    folder = str(tmp_path / "state")
    saved = run_together(2, SAVES, folder)
    assert [status for status, _ in saved] == [0, 0], saved
    for count in (4, 1):
        done = run_together(count, RESTORES, folder)
        assert [status for status, _ in done] == [0] * count, done
        assert all("missing: it (float32[64,32])" in output for _, output in done), done


def test_a_plan_of_more_devices_than_there_are_says_so(tmp_path):
    x = jnp.ones((64, 64))
    plan = jaxplan.make_plan(lambda x: x + 1, x, mesh=AbstractMesh((16, 4), ("x", "y")), machine="v5e")
    plan.save(tmp_path / "plan.json")
    loaded = jaxplan.load_plan(tmp_path / "plan.json", lambda x: x + 1, x)
    with pytest.raises(ValueError, match=r"no devices.*64 \(x=16, y=4\), this process sees 16: use plan.replan\(mesh=...\)"):
        loaded.jit()
    with pytest.raises(ValueError, match=r"the plan is for the mesh \(x=16, y=4\), the given mesh is \(x=4, y=4\)"):
        jaxplan.load_plan(tmp_path / "plan.json", lambda x: x + 1, x, mesh=mesh_of((4, 4)))
    assert_close(x + 1, loaded.replan(mesh=mesh_of((4, 4))).jit()(x))


def test_whatever_bears_on_what_is_computed_is_compared():
    def told(fn, *args, **options):
        return fingerprints(jaxplan.make_plan(fn, *args, **{"mesh": mesh_of((4, 2)), "machine": "v5e", **options}))

    x, table = jnp.ones((8, 8)), np.arange(8.0, dtype=np.float32)[None]
    before = told(lambda x: 2 * x + table, x)
    for name, now in {
        "argument shapes": told(lambda x: 2 * x + table, jnp.ones((16, 8))),
        "the traced function": told(lambda x: 2 * x - table, x),
        "its numbers": told(lambda x: 3 * x + table, x),
        "the mesh": told(lambda x: 2 * x + table, x, mesh=mesh_of((2, 4))),
        "the machine": told(lambda x: 2 * x + table, x, machine="v4"),
        "the layouts": told(lambda x: 2 * x + table, x, pins={"x": P("x")}),
    }.items():
        assert now[name] != before[name], name
    assert told(lambda x: 2 * x + table, x) == before
    other = table + 1
    assert told(lambda x: 2 * x + other, x)["its numbers"] != before["its numbers"]


def test_what_differs_is_named():
    alike = {"shapes": "a", "layouts": "b"}
    assert differences({0: alike, 1: alike, 2: alike}) == []
    assert differences({0: alike, 1: alike, 2: {**alike, "layouts": "c"}}) == ["layouts (process 2 differs from process 0)"]
    told = differences({3: {**alike, "shapes": "c"}, 5: alike, 6: alike})
    assert told == ["shapes (processes 5, 6 differ from process 3)"]
    many = {0: {"shapes": {str(i): "4" for i in range(6)}}, 2: {"shapes": {str(i): "4" if i == 1 else "5" for i in range(5)}}}
    assert differences({0: alike, 2: {**alike, "shapes": "c"}}, many) == [
        "shapes (process 2 differs from process 0): 5: 4 on process 0, none on process 2; 0: 4 on process 0, 5 on process 2; "
        "2: 4 on process 0, 5 on process 2; and 2 more"
    ]
    assert differences({0: alike, 1: {"shapes": "a"}}) == ["layouts (process 1 differs from process 0)"]
