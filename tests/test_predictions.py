"""`scripts/check_predictions.py`: every example is compiled as predicted, and the script notices where one is not."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jaxplan
from jaxplan.machine import PRESETS

SCRIPT = Path(__file__).parent.parent / "scripts" / "check_predictions.py"
SMALL = ["--only", "mlp_sgd", "conjugate_gradient", "--meshes", "4x2", "--machines", "fast"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_predictions", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_predictions"] = module
    spec.loader.exec_module(module)
    return module


def test_true_predictions_meet_the_goals(script, capsys):
    assert script.main([*SMALL, "--strict", "--markdown", "--details"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header, rule, *rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert header[0] == "program" and len(header) == len(rule)
    assert [row[:4] for row in rows] == [
        [name, "4x2", "v4, fast links", axis] for name in ("mlp_sgd", "conjugate_gradient") for axis in "xy"
    ]
    assert all(row[4] == row[5] != "0.00" and row[6:] == ["0.00%", "0.00%"] for row in rows)
    assert any(line.startswith("median") and "of 4 axes in 2 rows" in line for line in lines)


def test_a_program_that_sends_something_else_misses_them(script, capsys, monkeypatch):
    right = jaxplan.Plan.exchanges_of

    def wrong(plan, rounded):
        first, *rest = right(plan, rounded)
        return (replace(first, wire_bytes={axis: 3 * sent for axis, sent in first.wire_bytes.items()}), *rest)

    monkeypatch.setattr(jaxplan.Plan, "exchanges_of", wrong)
    assert script.main(SMALL) == 0  # not strict
    assert script.main([*SMALL, "--strict"]) == 1
    missed = capsys.readouterr().err
    assert "goals missed:" in missed and "worst" in missed and "median" in missed


def test_an_exchange_that_nobody_planned_misses_them(script, capsys, monkeypatch):
    right = jaxplan.Plan.exchanges_of
    monkeypatch.setattr(jaxplan.Plan, "exchanges_of", lambda plan, rounded: right(plan, rounded)[1:])
    assert script.main([*SMALL, "--strict", "--details"]) == 1
    found = capsys.readouterr()
    assert "unplanned" in found.err and any(line.startswith("unplanned  reduce-scatter") for line in found.out.splitlines())


def test_where_nothing_is_sent_nothing_is_shown_to_be_right(script, capsys):
    assert script.main(["--only", "mlp_sgd", "--meshes", "8", "--machines", "v4", "--strict"]) == 1
    assert "nothing was compared" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [(["--only", "nothing"], "no program is called nothing; there are mlp_sgd"), (["--meshes", "8x8x8"], "too few for a mesh")],
)
def test_bad_input_is_explained(script, capsys, given, message):
    with pytest.raises(SystemExit):
        script.main(given)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_every_example_on_every_mesh(script):
    meshes = "8,4x2,4x4" if len(jax.devices()) >= 16 else "8,4x2"
    assert script.main(["--strict", "--meshes", meshes]) == 0


def test_pairs_of_one_tensor_are_read_in_two_ways():
    """x against itself: an axis splits one side, and the other is whole (or both, each along its own axis)."""

    def forces(x, m):
        apart = x[None] - x[:, None]
        return jnp.sum(m[None, :, None] * apart / (0.1 + jnp.sum(apart * apart, -1)[..., None]), 1)

    def similar(x, m):
        return jnp.tanh((x * m[:, None]) @ (x * m[:, None]).T) @ x

    x, m = jax.random.normal(jax.random.key(0), (24, 6)), jnp.linspace(0.1, 1.0, 24)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    cpu = PRESETS["cpu"]
    links = {"inner": replace(cpu.inner, latency_seconds=0.0), "outer": replace(cpu.outer, latency_seconds=0.0)}
    machine = replace(cpu, seconds_per_flop={"float32": 1e-8}, **links)
    for pull in (forces, similar):

        def fn(x, m, pull=pull):
            return jax.lax.scan(lambda x, _: (x + 0.01 * pull(x, m), None), x, None, length=3)[0]

        plan = jaxplan.make_plan(fn, x, m, mesh=mesh, machine=machine)
        found = plan.audit()
        assert found.errors == {"x": 0.0, "y": 0.0} and found.largest_unplanned == 0 < found.compiled_bytes, str(found)
        np.testing.assert_allclose(plan.jit()(x, m), fn(x, m), rtol=1e-4, atol=1e-4)


def solved_by_conjugate_gradients(weights, x, y):
    """A Newton step. The body of its loop computes a gradient that nobody asks for, and what no round changes."""

    def gradient(weights):
        return jax.grad(lambda p: jnp.mean((jnp.tanh(jnp.tanh(x @ p[0]) @ p[1]) @ p[2] - y) ** 2))(weights)

    def dot(a, b):
        return sum(jnp.sum(u * v) for u, v in zip(a, b, strict=True))

    def turn(_, state):
        step, rest, way, size = state
        bent = jax.jvp(gradient, (weights,), (way,))[1]
        far = size / dot(way, bent)
        step, rest = ([u + a * v for u, v in zip(s, t, strict=True)] for s, a, t in ((step, far, way), (rest, -far, bent)))
        new = dot(rest, rest)
        return step, rest, [u + new / size * v for u, v in zip(rest, way, strict=True)], new

    rest = gradient(weights)
    start = [jnp.zeros_like(w) for w in weights], rest, rest, dot(rest, rest)
    return [w - u for w, u in zip(weights, jax.lax.fori_loop(0, 3, turn, start)[0], strict=True)]


def attention_over_edges(weights, h, source, target):
    """Sums over the edges of each node, which start from zeros."""

    def loss(weights):
        x = h
        for layer in weights:
            z = (x @ layer["w"]).reshape(x.shape[0], 4, -1)
            a = jax.nn.leaky_relu((z * layer["a"]).sum(-1)[source] + (z * layer["b"]).sum(-1)[target])
            e = jnp.exp(a - jax.ops.segment_max(a, target, x.shape[0])[target])
            share = e / jax.ops.segment_sum(e, target, x.shape[0])[target]
            x = jax.ops.segment_sum(share[:, :, None] * z[source], target, x.shape[0]).reshape(x.shape[0], -1)
        return jnp.mean(x**2)

    return jax.tree.map(lambda w, g: w - 0.1 * g, weights, jax.grad(loss)(weights))


@pytest.mark.parametrize("shape", [(8,), (4, 2)])
@pytest.mark.parametrize("fn", [solved_by_conjugate_gradients, attention_over_edges])
def test_what_compilers_leave_out_is_not_predicted(script, fn, shape):
    """Dead code, what a loop does not change, and constants that would be gathered."""
    if fn is solved_by_conjugate_gradients:
        sizes = [[(64, 128), (128, 128), (128, 16)], (256, 64), (256, 16)]
    else:
        sizes = [[{"w": (32, 32), "a": (1, 4, 8), "b": (1, 4, 8)}] * 2, (128, 32)]
    args = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), sizes, is_leaf=lambda s: isinstance(s, tuple))
    args += [jax.ShapeDtypeStruct((512,), jnp.int32)] * (4 - len(args)) if fn is attention_over_edges else []
    plan = jaxplan.make_plan(fn, *args, mesh=script.mesh_of(shape), machine=script.machines_of("fast")[0])
    found = plan.audit()
    assert max(found.errors.values()) < 1e-3 and found.largest_unplanned == 0 < found.compiled_bytes, str(found)


def test_what_nothing_comes_of_may_be_constrained_or_not_but_is_computed_alike():
    """Values of equations that are no operators of the graph."""

    def fn(w, x):
        def body(h, _):
            unused = jnp.sum(h @ w)
            del unused
            return jnp.tanh(h @ w) + jnp.sum(w @ w), None

        return jax.lax.scan(body, x, None, length=3)[0]

    w, x = 0.1 * jax.random.normal(jax.random.key(0), (16, 16)), jax.random.normal(jax.random.key(1), (32, 16))
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    plan = jaxplan.make_plan(fn, w, x, mesh=mesh, machine=replace(PRESETS["cpu"], seconds_per_flop={"float32": 1e-7}))
    np.testing.assert_allclose(plan.jit()(w, x), fn(w, x), rtol=1e-4, atol=1e-4)
