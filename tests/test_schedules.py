"""Which schedule a pipeline is given: what each costs and holds, that the cheaper one that fits is taken, and that it runs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from conftest import assert_close, mesh_of
from jax.sharding import AbstractMesh

import jaxplan

SLOW_WORK = jaxplan.Machine("slow", {"float32": 1e-8}, 1e-9, 1e12, jaxplan.Link(1e-10, 0.0), jaxplan.Link(1e-10, 0.0), 1 << 20)
"""So slow that it is worth splitting even the smallest of programs."""


def step(params, x, y):
    """Layers, a head and a loss; down the gradient. (rows, width), (rows, classes)."""

    def loss(params):
        h = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, params["layers"])[0]
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(h @ params["head"]) * y, axis=-1))

    value, gradient = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda w, g: w - jnp.float32(0.1) * g, params, gradient), value


def args(rows=64, width=32, depth=4, classes=64):
    k = jax.random.split(jax.random.key(0), 4)
    layers = jax.random.normal(k[0], (depth, width, width), jnp.float32) / 6
    params = {"layers": layers, "head": jax.random.normal(k[1], (width, classes), jnp.float32)}
    target = jax.nn.softmax(jax.random.normal(k[3], (rows, classes), jnp.float32))
    return params, jax.random.normal(k[2], (rows, width), jnp.float32), target


def planned(schedule, monkeypatch, given, shape, **options):
    """The best plan with one schedule only."""
    with monkeypatch.context() as patch:
        patch.setattr("jaxplan.hybrid.SCHEDULES", (schedule,))
        return jaxplan.make_plan(step, *given, mesh=shape, machine=SLOW_WORK, pipeline="x", donate_argnums=0, **options)


@pytest.mark.parametrize(("shape", "microbatches"), [((4,), 8), ((2, 2, 2), 4)])
def test_the_symbolic_cost_and_peak_of_1f1b_are_the_numbers_that_were_compared(shape, microbatches, monkeypatch):
    mesh = AbstractMesh(shape, ("x", "y", "z")[: len(shape)])
    plan = planned("1f1b", monkeypatch, jax.eval_shape(args), mesh, microbatches=microbatches)
    assert plan.pipeline.schedule == "1f1b" and plan.modelled.stages.middle
    assert float(plan.cost.subs(plan.symbol_values)) == pytest.approx(plan.seconds, rel=1e-9)
    assert float(plan.peak.subs(plan.symbol_values)) == pytest.approx(plan.peak_bytes, rel=1e-9)


def test_1f1b_keeps_residuals_of_few_micro_batches_where_gpipe_keeps_all(monkeypatch):
    given = jax.eval_shape(lambda: args(rows=4096, width=64, classes=8))
    mesh = AbstractMesh((2,), ("x",))
    ahead, alternating = (planned(s, monkeypatch, given, mesh, microbatches=16) for s in ("gpipe", "1f1b"))
    residuals = 2 * 4096 * 64 * 4  # of two layers of a stage, all rows
    assert ahead.peak_bytes - alternating.peak_bytes > 0.9 * residuals * 13 / 16, "three of sixteen are kept"


def test_the_schedule_that_costs_less_is_taken_and_the_other_where_only_that_fits(monkeypatch, tmp_path):
    given, mesh = jax.eval_shape(lambda: args(rows=4096, width=64, classes=512)), AbstractMesh((2,), ("x",))
    ahead, alternating = (planned(s, monkeypatch, given, mesh, microbatches=16) for s in ("gpipe", "1f1b"))
    assert ahead.seconds < alternating.seconds, "the head is split over both stages there, and runs on the last one here"
    asked = {"mesh": mesh, "machine": SLOW_WORK, "pipeline": "x", "microbatches": 16, "donate_argnums": 0}
    free = jaxplan.make_plan(step, *given, **asked)
    assert free.pipeline.schedule == "gpipe" and free.seconds == ahead.seconds
    tight = jaxplan.make_plan(step, *given, memory_budget=(ahead.peak_bytes + alternating.peak_bytes) / 2, **asked)
    assert tight.pipeline.schedule == "1f1b" and "16 micro-batches, 1f1b" in str(tight)
    tight.save(tmp_path / "plan.json")
    loaded = jaxplan.load_plan(tmp_path / "plan.json", step, *given)
    assert loaded.pipeline == tight.pipeline and loaded.seconds == tight.seconds and loaded.in_specs == tight.in_specs
    light, far = jax.eval_shape(lambda: args(rows=4096, width=64, classes=2)), jaxplan.Link(1e-6, 0.0)
    asked["machine"] = replace(SLOW_WORK, inner=far, outer=far)
    assert jaxplan.make_plan(step, *light, **asked).pipeline.schedule == "1f1b", "what leaves the layers is given to nobody"


def test_1f1b_as_planned_computes_what_the_function_does_and_sends_what_was_planned(monkeypatch):
    given = args()
    plan = planned("1f1b", monkeypatch, given, mesh_of((4,)), microbatches=8)
    assert_close(jax.jit(step)(*given), plan.jit(donate_argnums=())(*given))
    found = plan.audit()
    handed = [row for row in found.exchanges if row.kind == "collective-permute"]
    assert sum(row.compiled_times for row in handed) == 2 * (8 + 4 - 1), "m + k - 1 forward, and as many backward"
    assert found.predicted_bytes == pytest.approx(found.compiled_bytes, rel=0.01), str(found)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 4)])
def test_1f1b_with_other_axes_planned(shape, monkeypatch):
    """No device waits in a collective for one that took another branch: there are none."""
    given = args()
    plan = planned("1f1b", monkeypatch, given, mesh_of(shape), microbatches=8)
    assert any(layout[1] >= 0 for layout in plan.layouts.values())
    assert_close(jax.jit(step)(*given), plan.jit(donate_argnums=())(*given))


def test_layers_that_move_rows_between_devices_do_not_wait_for_ever(monkeypatch):
    """A permute along another axis takes all devices of a mesh, whatever stage they are on."""

    def shifting(params, x, y):
        def loss(params):
            h = jax.lax.scan(lambda h, w: (jnp.tanh(jnp.roll(h, 2, axis=1) @ w), None), x, params)[0]
            return jnp.mean(jnp.square(h - y))

        return jax.value_and_grad(loss)(params)

    weights = jax.random.normal(jax.random.key(0), (4, 8, 8), jnp.float32) / 3
    x, y = (jax.random.normal(jax.random.key(n), (4, 16, 8), jnp.float32) for n in (1, 2))
    with monkeypatch.context() as patch:
        patch.setattr("jaxplan.hybrid.SCHEDULES", ("1f1b",))
        plan = jaxplan.make_plan(
            shifting, weights, x, y, mesh=mesh_of((2, 2)), machine=SLOW_WORK, pipeline="x", microbatches=4,
            pins={"x": jax.sharding.PartitionSpec(None, "y")},
        )  # fmt: skip
    assert plan.pipeline.schedule == "1f1b"
    assert_close(jax.jit(shifting)(weights, x, y), plan.jit()(weights, x, y))
