"""Several processes with devices of their own run one planned function; where they planned otherwise, they say so and stop."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from jax.sharding import PartitionSpec as P

import jaxplan
from jaxplan.agree import differences, fingerprints

PROGRAM = '''
import sys
import jax
port, count, index, odd = map(int, sys.argv[1:])
jax.config.update("jax_num_cpu_devices", 8 // count)
jax.distributed.initialize(f"localhost:{port}", count, index, initialization_timeout=60)
import jax.numpy as jnp, numpy as np, jaxplan
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

def step(w, x):
    value, gradient = jax.value_and_grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w)
    return w - (0.1 if odd != index else 0.2) * gradient, value

w = np.linspace(-1, 1, 64 * 32, dtype=np.float32).reshape(64, 32)
x = np.linspace(-1, 1, 128 * 64, dtype=np.float32).reshape(128, 64)
plan = jaxplan.make_plan(step, w, x, mesh=jax.make_mesh((4, 2), ("x", "y")), pins={"x": P("x"), "w": P(None, "y")})
run = plan.jit()
try:
    got, value = run(*run(w, x)[:1], x)
except jaxplan.DifferentPlans as error:
    print("DIFFERENT", error)
    sys.exit(3)
want, loss = jax.jit(step)(np.asarray(jax.jit(step)(w, x)[0]), x)
np.testing.assert_allclose(multihost_utils.process_allgather(got, tiled=True), want, rtol=1e-5, atol=1e-6)
np.testing.assert_allclose(value.addressable_data(0), loss, rtol=1e-5)
print("SPECS", plan.in_specs, plan.out_specs)
'''
SECONDS = 120


def run_together(count: int, odd: int = -1) -> list[tuple[int, str]]:
    """(exit status, output) of each of so many processes, which hash strings differently. `odd`: one with another function."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    environment.pop("XLA_FLAGS", None)
    started = []
    for index in range(count):
        command = [sys.executable, "-c", PROGRAM, *map(str, (port, count, index, odd))]
        own = {**environment, "PYTHONHASHSEED": str(index)}
        started.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        return [(process.wait(SECONDS), process.communicate()[0]) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_plan_alike_and_compute_what_one_does(count):
    done = run_together(count)
    assert [status for status, _ in done] == [0] * count, done
    specs = {line for _, output in done for line in output.splitlines() if line.startswith("SPECS")}
    assert len(specs) == 1


def test_processes_that_planned_another_function_say_so_and_stop():
    done = run_together(2, odd=1)
    assert [status for status, _ in done] == [3, 3], done
    for _, output in done:
        assert "nothing was run: its numbers (process 1 differs from process 0)" in output


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
    digests = np.zeros((3, 2, 32), np.uint8)
    assert differences(["shapes", "layouts"], digests) == []
    digests[2, 1, 5] = 1
    assert differences(["shapes", "layouts"], digests) == ["layouts (process 2 differs from process 0)"]
    digests[0, 0, 0] = 7
    assert differences(["shapes", "layouts"], digests)[0] == "shapes (processes 1, 2 differ from process 0)"
