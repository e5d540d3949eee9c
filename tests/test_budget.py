"""Memory budgets: what fits is found, at a sensible price; where nothing does the error says what would. And the ledger."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from conftest import assert_close, mesh_of
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec as P

import jaxplan
from jaxplan.budget import Limit
from jaxplan.cost import gathered_state, model, without_gathers
from jaxplan.examples import programs
from jaxplan.examples.decoder import FULL, decoder
from jaxplan.graph.flatten import BOUNDARY
from jaxplan.machine import PRESETS
from jaxplan.search import alpa, nearest

MESH = AbstractMesh((4, 2), ("x", "y"))
WIDTH, LAYERS = 256, 3


def shape(*extents):
    return jax.ShapeDtypeStruct(extents, jnp.float32)


OFF_CHIP = replace(PRESETS["v5e"], name="v5e, nothing on the chip", near_bytes=0.0)
"""So small programs live on the chip else, and take no memory."""


def train_step(state, x):
    """Adam on a small network; the largest gradient is told besides the loss, as many training loops do."""

    def loss(weights):
        hidden = x
        for w in weights:
            hidden = jnp.tanh(hidden @ w)
        return jnp.sum(hidden**2)

    weights, first, second, count = state
    value, gradients = jax.value_and_grad(loss)(weights)
    first = [0.9 * m + 0.1 * g for m, g in zip(first, gradients)]
    second = [0.99 * v + 0.01 * g * g for v, g in zip(second, gradients)]
    weights = [w - 0.1 * m / (jnp.sqrt(v) + 1e-6) for w, m, v in zip(weights, first, second)]
    return (weights, first, second, count + 1), value, jnp.max(jnp.stack([jnp.max(g) for g in gradients]))


def train_args(batch):
    layers = [shape(WIDTH, WIDTH)] * LAYERS
    return (layers, layers, layers, jax.ShapeDtypeStruct((), jnp.int32)), shape(batch, WIDTH)


def path(fn, args, shares, **options):
    """Plans under falling budgets, as shares of what the plan without one takes."""
    free = jaxplan.make_plan(fn, *args, memory_budget=math.inf, **options)
    return free, [(share * free.peak_bytes, free.replan(memory_budget=share * free.peak_bytes)) for share in shares]


def test_a_tighter_budget_splits_state_first_and_moments_most_then_activations():
    """From data parallel to what is called ZeRO, and beyond; what it costs rises, and every plan fits."""
    shares = (0.95, 0.9, 0.85, 0.8, 0.7, 0.5)
    free, squeezed = path(train_step, train_args(4096), shares, mesh=MESH, machine="h100", donate_argnums=0)
    before = free.seconds
    for budget, plan in squeezed:
        assert plan.peak_bytes <= budget
        assert before * (1 - 1e-9) <= plan.seconds <= 2 * free.seconds
        before = plan.seconds
    held = [plan.ledger.by_kind for plan in (free, *(plan for _, plan in squeezed))]

    def first_smaller(kind):
        return next(i for i, now in enumerate(held) if now[kind] < held[0][kind])

    assert held[0]["parameters"] == 4 * LAYERS * WIDTH * WIDTH, "whole, without a budget"
    assert 0 < first_smaller("other state") <= first_smaller("parameters") <= first_smaller("activations")
    for now in held[1 : first_smaller("activations")]:  # moments need not be gathered again
        assert now["other state"] / held[0]["other state"] <= 1.001 * now["parameters"] / held[0]["parameters"]


@pytest.mark.xfail(
    jax.__version_info__ >= (0, 12), strict=True, raises=AssertionError,
    reason="differentiated otherwise there: a plan 8.9% slower is found, where one 6.8% slower fits and splits state alone",
)  # fmt: skip
def test_state_goes_before_any_activation():
    free, ((_, plan),) = path(train_step, train_args(4096), (0.95,), mesh=MESH, machine="h100", donate_argnums=0)
    assert plan.ledger.by_kind["activations"] == free.ledger.by_kind["activations"]


@pytest.mark.parametrize("name", ["decoder_scan", pytest.param("decoder_unrolled", marks=pytest.mark.slow)])
def test_the_examples_of_training_are_squeezed_step_by_step(name):
    program = programs("full")[name]
    free, squeezed = path(program.fn, program.args, (0.9, 0.8), mesh=AbstractMesh((4, 4), ("x", "y")), machine="v5e")
    assert all(plan.peak_bytes <= budget for budget, plan in squeezed)
    assert all(free.seconds < plan.seconds < 1.1 * free.seconds for _, plan in squeezed)
    parameters = [plan.ledger.by_kind["parameters"] for plan in (free, *(plan for _, plan in squeezed))]
    assert parameters == sorted(parameters, reverse=True) and parameters[-1] < parameters[0]


def test_a_squeezed_plan_computes_the_same():
    def step(w, x):
        return w - 0.1 * jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(w), jnp.mean(x)

    w, x = jnp.linspace(-1, 1, 64 * 64).reshape(64, 64), jnp.linspace(-1, 1, 512 * 64).reshape(512, 64)
    free = jaxplan.make_plan(step, w, x, mesh=mesh_of((4, 2)), machine="h100", memory_budget=math.inf)
    plan = free.replan(memory_budget=0.8 * free.peak_bytes)
    assert plan.peak_bytes <= 0.8 * free.peak_bytes
    assert_close(jax.jit(step)(w, x), plan.jit()(w, x))


def test_a_plan_that_fits_without_a_budget_is_that_plan():
    free = jaxplan.make_plan(train_step, *train_args(1024), mesh=MESH, memory_budget=math.inf)
    assert free.replan(memory_budget=free.peak_bytes).in_specs == free.in_specs


def test_what_a_loop_uses_in_parts_lies_in_parts_where_that_costs_nothing():
    """Stacked weights of which every device multiplies by its own part only: there is no plan as fast that holds less."""
    program = programs("full")["decode_kv"]
    mesh, donate = AbstractMesh((4, 4), ("x", "y")), program.donate
    plan = jaxplan.make_plan(program.fn, *program.args, mesh=mesh, machine="v5e", donate_argnums=donate)
    assert len(plan.in_specs[0]["blocks"]["w_up"]) == 3, "the width is split, and not in the loop alone"
    assert plan.replan(memory_budget=0.95 * plan.peak_bytes).seconds > plan.seconds


def test_a_loop_sees_a_constant_where_it_lies_if_taking_a_part_of_it_saves_nothing():
    """Else the compiler takes the part before the loop and keeps both."""
    program = programs("full")["conjugate_gradient"]
    plan = jaxplan.make_plan(program.fn, *program.args, mesh=AbstractMesh((4, 4), ("x", "y")), machine="v5e")
    matrix = plan.modelled.graph.inputs[0]
    (inside,) = [op.results[0] for op in plan.modelled.graph.operators if op.name == BOUNDARY and matrix in op.operands]
    assert plan.in_specs[0] == P("x") and plan.layouts[inside] == plan.layouts[matrix]


def test_where_nothing_fits_the_error_says_what_takes_it_and_what_would_help():
    with pytest.raises(jaxplan.NothingFits) as caught:
        jaxplan.make_plan(train_step, *train_args(65536), mesh=MESH, machine=OFF_CHIP, memory_budget="9MiB")
    told = str(caught.value)
    assert caught.value.smallest > 9 * 2**20 and f"{caught.value.smallest:,.0f} bytes" in told
    largest = re.search(r"The largest, per device: (.*?)\. What would help: (.*)", told)
    assert largest and largest[1].count(";") == 4 and "(activations, " in largest[1] and "test_budget.py:" in largest[1]
    assert "8 devices along 'x'" in largest[2] and "4 devices along 'y'" in largest[2]
    assert "a smaller batch" in largest[2] and "jax.checkpoint" in largest[2]


def test_more_devices_are_said_to_be_enough_where_they_are():
    with pytest.raises(jaxplan.NothingFits) as caught:
        jaxplan.make_plan(lambda big: big * 2, shape(1024, 1024), mesh=MESH, memory_budget=0.7 * 2 * 4 * 2**20 / 8)
    assert "8 devices along 'x' (512.00 KiB, which fits)" in str(caught.value)
    assert "a smaller batch" not in str(caught.value), "arguments and results take it all"


def test_simulated_devices_share_their_hosts_memory_and_have_no_limit_of_their_own():
    args = [shape(1 << 15, 1 << 15)] * 8, shape(1024, 1 << 15)
    pins = {"weights/0": P()}
    plan = jaxplan.make_plan(lambda weights, x: [x @ w for w in weights], *args, mesh=MESH, machine="cpu", pins=pins)
    assert plan.peak_bytes > 4 * 2**30
    with pytest.raises(jaxplan.NothingFits):
        plan.replan(memory_budget="3 GiB")


def test_pins_that_do_not_fit_are_not_argued_with():
    with pytest.raises(jaxplan.NothingFits, match=r"big.*1024,1024.*What would help: a larger budget"):
        jaxplan.make_plan(lambda big: jnp.sum(big), shape(1024, 1024), mesh=MESH, pins={"big": P()}, memory_budget="1MiB")


# --- the ledger --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", ["cpu", "v5e"])
@pytest.mark.parametrize("name", sorted(programs()))
def test_the_ledger_adds_up_to_the_peak(name, machine):
    program = programs()[name]
    plan = jaxplan.make_plan(program.fn, *program.args, mesh=MESH, machine=machine, donate_argnums=program.donate or None)
    assert math.fsum(entry.total for entry in plan.ledger.entries) == pytest.approx(plan.peak_bytes, rel=1e-9)
    assert sum(plan.ledger.by_kind.values()) == pytest.approx(plan.peak_bytes, rel=1e-9)


@pytest.mark.parametrize("batch", [8, 4096])
def test_state_is_told_apart(batch):
    plan = jaxplan.make_plan(train_step, *train_args(batch), mesh=AbstractMesh((1,), ("x",)), machine=OFF_CHIP, donate_argnums=0)
    held = plan.ledger.by_kind
    layer = 4 * WIDTH * WIDTH
    assert held["parameters"] == LAYERS * layer and held["other state"] == 2 * LAYERS * layer + 4
    assert held["other arguments"] == 4 * batch * WIDTH and held["outputs"] == 8
    assert held["gradients"] == (layer if batch == 4096 else LAYERS * layer)
    assert (held.get("activations", 0) > layer) == (batch == 4096)


def test_state_without_any_other_result():
    """Parameters are then what more than element-wise work reads."""

    def step(state, x):
        w, momentum = state
        momentum = 0.9 * momentum + jax.grad(lambda w: jnp.sum((x @ w) ** 2))(w)
        return w - 0.1 * momentum, momentum

    plan = jaxplan.make_plan(step, (shape(64, 64), shape(64, 64)), shape(32, 64), mesh=AbstractMesh((1,), ("x",)), machine="v5e")
    kinds = {entry.name: entry.kind for entry in plan.ledger.entries}
    assert kinds["state/0"] == "parameters" and kinds["state/1"] == "other state" and kinds["x"] == "other arguments"


@pytest.mark.parametrize("donate", [(), (1,)])
def test_what_is_only_written_in_part_is_no_parameter_and_its_new_value_no_gradient(donate):
    """A cache that logits depend on, restacked by a scan; and weights that are trained beside weights that stay as they are."""

    def decode(weights, cache, x, position):
        def layer(x, given):
            w, past = given
            past = jax.lax.dynamic_update_slice(past, (x @ w)[:, None], (0, position, 0))
            return jnp.einsum("bsd->bd", jnp.sin(past) @ w), past

        x, cache = jax.lax.scan(layer, x, (weights, cache))
        return cache, jnp.sum(x)

    args = shape(4, 256, 256), shape(4, 64, 512, 256), shape(64, 256), jax.ShapeDtypeStruct((), jnp.int32)
    plan = jaxplan.make_plan(decode, *args, mesh=AbstractMesh((1,), ("x",)), machine="v5e", donate_argnums=donate or None)
    held = plan.ledger.by_kind
    assert "gradients" not in held and "parameters" not in held
    assert held["other state"] == 4 * 4 * 64 * 512 * 256 * (2 if donate else 1)
    assert (held["outputs"] > 4 * 4 * 64 * 512 * 256) == (not donate)

    def tune(state, x):
        w, base = state
        return (w - 0.1 * jax.grad(lambda w: jnp.mean((x @ w + x @ base) ** 2))(w), base), jnp.mean(x @ w + x @ base)

    args = (shape(64, 64), shape(64, 64)), shape(32, 64)
    plan = jaxplan.make_plan(tune, *args, mesh=AbstractMesh((1,), ("x",)), machine="v5e")
    kinds = {entry.name: entry.kind for entry in plan.ledger.entries}
    assert kinds["state/0"] == kinds["state/1"] == "parameters"


def test_the_printed_plan_tells_what_lives_at_the_peak():
    plan = jaxplan.make_plan(train_step, *train_args(4096), mesh=MESH, machine=OFF_CHIP, donate_argnums=0)
    told = str(plan)
    assert "at the peak" in told and "activations" in told and "test_budget.py:" in told
    assert " parameters, " in told.partition("peak memory")[2]


def test_a_loops_state_that_nothing_changes_is_told_by_whatever_is_known():
    """Its only maker is the edge of the loop."""

    def fn(x):
        doubled = 2 * x
        body = jax.checkpoint(lambda kept, total: (kept, total @ kept))  # JAX itself does not see that it hands on `kept`
        kept, total = jax.lax.fori_loop(0, 3, lambda _, state: body(*state), (doubled, jnp.sin(doubled)))
        return kept @ total

    plan = jaxplan.make_plan(fn, shape(64, 64), mesh=AbstractMesh((1,), ("x",)), machine="cpu")
    assert math.fsum(e.total for e in plan.ledger.entries) == plan.peak_bytes and str(plan)


# --- over falling budgets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param("mlp_sgd", marks=pytest.mark.slow), "stencil"])
def test_no_plan_is_dearer_than_one_under_a_tighter_budget(name):
    program = programs()[name]
    fn, args, donate = program.fn, program.args, program.donate
    shares = (0.95, 0.85, 0.75, 0.65, 0.55, 0.5, 0.48, 0.4)
    free = jaxplan.make_plan(
        fn, *args, mesh=MESH, machine="h100", memory_budget=math.inf, donate_argnums=donate or None, pipeline=None
    )
    before = free.seconds
    for share in shares:
        try:
            plan = free.replan(memory_budget=share * free.peak_bytes)
        except jaxplan.NothingFits:
            break
        assert plan.peak_bytes <= share * free.peak_bytes
        assert plan.seconds >= before * (1 - 1e-9), share
        before = plan.seconds
    assert before > free.seconds


@pytest.mark.parametrize("machine", ["h100", "v4"])
def test_what_lies_off_every_mixture_is_found(machine):
    """At 0.95 of the peak one layer's gradient has to be scattered; every mixture of plans at prices scatters all or none."""
    program = programs()["mlp_sgd"]
    free = jaxplan.make_plan(program.fn, *program.args, mesh=MESH, machine=machine, memory_budget=math.inf)
    modelled = model(free.modelled.whole, free.modelled.numbers, {}, follow=False)
    problem = Limit(0.95 * free.peak_bytes, (free,)).problem(modelled, free.traced.donated, ())
    assert nearest(problem).seconds <= alpa(problem, rounds=None).seconds * (1 + 1e-6)


def test_state_is_left_where_it_is_if_gathering_it_keeps_too_much_alive_and_saves_little():
    """Where layers are written out, products wait behind gathers of state, with all that they read."""
    program = decoder(replace(FULL, batch=64), "unrolled")
    mesh = AbstractMesh((4, 4), ("x", "y"))
    free = jaxplan.make_plan(program.fn, *program.args, mesh=mesh, machine="v4", memory_budget=math.inf)
    assert gathered_state(free.modelled, free.choices)
    fitted = free.replan(memory_budget=free.peak_bytes / 2)
    assert not gathered_state(fitted.modelled, fitted.choices)
    assert fitted.peak_bytes <= free.peak_bytes / 2
    assert fitted.seconds <= 1.002 * free.seconds


def test_a_gather_of_state_that_the_program_insists_on_stays_possible():
    mesh = mesh_of((4, 2))

    def step(weights, x):
        def loss(weights):
            hidden = x
            for w in weights:
                hidden = jnp.tanh(hidden @ w)
            return jnp.mean(hidden**2)

        gradients = jax.grad(loss)(weights)
        split = NamedSharding(mesh, P("x", None))
        return [jax.lax.with_sharding_constraint(w - 0.1 * g, split) for w, g in zip(weights, gradients)]

    pins = {f"weights/{layer}": P() for layer in range(LAYERS)}
    args = [shape(WIDTH, WIDTH)] * LAYERS, shape(1024, WIDTH)
    modelled = jaxplan.make_plan(step, *args, mesh=mesh, machine="v4", pins=pins).modelled
    laid = dict.fromkeys(range(LAYERS), (-1, -1))
    found = nearest(without_gathers(model(modelled.graph, modelled.numbers, laid, follow=False)))
    assert math.isfinite(found.seconds)
