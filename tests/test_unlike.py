"""Layers that differ from one another, in stages on sub-meshes: cut, run and planned, beside the program as it is."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, mesh_of
from jax.sharding import AbstractMesh, AxisType
from unlike_programs import batch_norm, encoder_decoder, residual_network, unet

import jaxplan
from jaxplan.api import StagedPlan
from jaxplan.graph import build_graph
from jaxplan.pipeline import PipelineError, schedule_text
from jaxplan.search.chain import Run, chain_seconds, cut_chain
from jaxplan.search.piper import Layer, alpa_stages
from jaxplan.trace import trace
from jaxplan.unlike import flat, micro_of, parts_of, run_plain
from jaxplan.unlike.nouns import BACKWARD, FORWARD
from jaxplan.unlike.order import order

PROGRAMS = {"unet": unet, "residual": residual_network, "encoder-decoder": encoder_decoder}


def two_steps(step, args):
    state, _ = step(*args)
    return step(state, *args[1:])


def parts(step, args, microbatches, cuts):
    traced = trace(step, args, {})
    micro = micro_of(flat(traced), microbatches)
    last = len(micro.forward)
    return parts_of(micro, [last * n // (cuts + 1) for n in range(1, cuts + 1)], build_graph(traced).ties)


# ---- parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "microbatches", "cuts"),
    [("unet", 4, 2), ("residual", 2, 3), pytest.param("encoder-decoder", 4, 1, marks=pytest.mark.slow)],
)
def test_the_parts_of_a_program_one_after_another_are_the_program(name, microbatches, cuts):
    step, args = PROGRAMS[name]()
    found = parts(step, args, microbatches, cuts)
    got = jax.jit(lambda *inputs: run_plain(found, inputs))(*jax.tree.leaves(args))
    assert_close(jax.tree.leaves(jax.jit(step)(*args)), got)


def test_what_a_stage_has_of_a_program():
    step, args = unet()
    found = parts(step, args, 4, 2)
    assert found.stages == 3 and found.micro.rows == 16
    phases = [(part.phase, part.stage) for part in found.parts if part.phase in (FORWARD, BACKWARD)]
    assert phases == [(FORWARD, 0), (FORWARD, 1), (FORWARD, 2), (BACKWARD, 2), (BACKWARD, 1), (BACKWARD, 0)]
    homes = dict(zip(found.micro.traced.in_paths, found.homes, strict=True))
    assert homes["state/0/down"] == 0 and homes["state/0/out"] == 2
    assert all(homes[f"state/1/1/{k}"] == homes[f"state/1/2/{k}"] == homes[f"state/0/{k}"] for k in args[0][0])
    summed = sum([len(part.adds) for part in found.parts])
    assert summed == 7  # a gradient each, and the loss


def test_cuts_have_to_leave_every_stage_something():
    micro = parts(*unet(), 2, 1).micro
    for cuts in ([3, 3], [5, 2], [len(micro.forward) - 1], [-1]):
        with pytest.raises(ValueError, match="must ascend"):
            parts_of(micro, cuts)


def test_what_is_summed_in_16_bits_is_kept_in_32():
    def step(first, second, x):
        def loss(p):
            return jnp.sum((x @ p[0]) @ p[1])

        return jax.grad(loss)((first, second))

    x = jnp.asarray([256.0] + [1.0] * 8, jnp.bfloat16).repeat(2)[:16].reshape(16, 1)  # 512, and 14 times 1
    args = jnp.ones((1, 1), jnp.bfloat16), jnp.ones((1, 1), jnp.bfloat16), x
    found = parts(step, args, 16, 0)
    want, got = jax.jit(step)(*args), jax.jit(lambda *inputs: run_plain(found, inputs))(*args)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in got)
    assert_close(jax.tree.leaves(want), got)
    assert float(got[0][0, 0]) > 512.0  # in 16 bits, 512 + 1 is 512


# ---- refused -----------------------------------------------------------------------------------------------------


def test_statistics_of_the_batch_are_refused_by_operator_and_line():
    step, args = residual_network(batch_norm)
    told = r"sub at .*unlike_programs.py:\d+ reads rows of the batch beside a sum over all of them \(made by reduce_sum at"
    with pytest.raises(PipelineError, match=told):
        jaxplan.make_plan(step, *args, mesh=mesh_of((2, 2)), pipeline="x")


def test_a_bound_is_refused():
    step, args = unet()
    with pytest.raises(ValueError, match="no bound is known for stages of unlike layers"):
        jaxplan.make_plan(step, *args, mesh=mesh_of((2, 2)), pipeline="x", certify=True)


def test_effects_are_refused():
    def step(w, v, x):
        jax.debug.print("{}", x[0, 0])
        return jnp.tanh(x @ w) @ v

    args = jnp.ones((4, 8)), jnp.ones((8, 2)), jnp.ones((8, 4))
    with pytest.raises(PipelineError, match=r"debug_\w+ at .*test_unlike.py:\d+ has an effect"):
        jaxplan.make_plan(step, *args, mesh=mesh_of((2,)), pipeline="x")


def test_what_features_can_be_cut_in_is_no_batch():
    def step(first, second, x):
        hidden = jnp.tanh(x @ first)
        return (hidden - hidden.mean(0, keepdims=True)) @ second

    args = jnp.ones((4, 8)), jnp.ones((8, 64)), jnp.ones((6, 4))
    with pytest.raises(PipelineError, match="would share 1 of 2 layers") as refused:
        jaxplan.make_plan(step, *args, mesh=mesh_of((2,)), pipeline="x", microbatches=2)
    assert "what comes out would be sums" in str(refused.value)


def test_micro_batches_that_do_not_divide_and_too_many_stages_are_refused():
    step, args = unet()
    with pytest.raises(ValueError, match="no input with rows that 32 micro-batches divide"):
        jaxplan.make_plan(step, *args, mesh=mesh_of((2, 2)), pipeline="x", microbatches=32)

    def two(w, v, x):
        return jnp.tanh(x @ w) @ v

    args = jnp.ones((4, 8)), jnp.ones((8, 2)), jnp.ones((8, 4))
    with pytest.raises(ValueError, match="8 stages, and two can be cut in"):
        jaxplan.make_plan(two, *args, mesh=AbstractMesh((8,), ("x",)), pipeline="x")


# ---- run ---------------------------------------------------------------------------------------------------------


def check(name, shape, machine="v5e", **more):
    step, args = PROGRAMS[name]()
    plan = jaxplan.make_plan(step, *args, mesh=mesh_of(shape), pipeline="x", machine=machine, **more)
    assert plan.pipeline.stages == shape[0]
    got = two_steps(plan.jit(), args)
    assert_close(two_steps(jax.jit(step), args), got)
    for array, sharding in zip(jax.tree.leaves(got), jax.tree.leaves(plan.out_shardings), strict=True):
        own = shape[1:] if isinstance(plan, StagedPlan) else shape  # else its layers were enough alike for one program
        assert array.sharding == sharding and len(array.devices()) == math.prod(own)
    return plan, got


def test_a_u_shaped_network_over_two_stages_and_two_devices_each():
    rows = jax.sharding.PartitionSpec("y")
    plan, got = check("unet", (2, 2), microbatches=4, pins={"batch[1]": rows, "batch[2]": rows})
    assert len({array.sharding.mesh for array in jax.tree.leaves(got)}) == 2
    assert plan.in_specs[1:] == (rows, rows) and plan.wire_bytes["y"] > 0


def test_unlike_blocks_over_four_stages():
    plan, _ = check("residual", (4,), machine="cpu", microbatches=2)
    assert len({tuple(p.mesh.devices.flat) for p in plan.stage_plans}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2), (2, 4), (4,), (3, 2)])
@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_programs_over_stages_and_devices(name, shape):
    check(name, shape)


@pytest.mark.slow
def test_a_loss_over_unmasked_rows_and_donated_state():
    step, args = residual_network(masked=True)
    want = two_steps(jax.jit(step), args)
    plan = jaxplan.make_plan(step, *args, mesh=mesh_of((2, 2), AxisType.Explicit), pipeline="x", machine="v5e")
    run = plan.jit(donate_argnums=0)
    state, _ = run(*args)
    got = run(state, *args[1:])
    assert_close(want, got)
    assert any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(args))


def test_rows_that_are_results_and_a_program_without_a_way_back():
    def forward(layers, x):
        hidden = jnp.tanh(x @ layers[0])
        hidden = jax.nn.relu(hidden @ layers[1]) + x.sum(-1, keepdims=True)
        return {"logits": hidden @ layers[2], "total": hidden.sum(), "given": x}

    layers = [jnp.asarray(np.random.default_rng(0).normal(size=s), jnp.float32) for s in ((6, 9), (9, 5), (5, 3))]
    x = jnp.asarray(np.random.default_rng(1).normal(size=(12, 6)), jnp.float32)
    planned = jaxplan.auto_shard(mesh_of((2, 2)), pipeline="x", microbatches=3)(forward)
    assert_close(forward(layers, x), planned(layers, x))
    assert planned.plan(layers, x).pipeline.microbatches == 3


# ---- planned -----------------------------------------------------------------------------------------------------


def test_what_a_plan_on_sub_meshes_says_of_itself():
    step, (state, *batch) = unet()
    plan = jaxplan.make_plan(step, state, *batch, mesh=mesh_of((2, 2)), pipeline="x", microbatches=4, machine="v5e")
    assert isinstance(plan, jaxplan.Plan)
    told = str(plan)
    assert "x (2): stages of unlike layers on sub-meshes" in told and "unlike_programs.py:" in told
    assert float(plan.cost.subs(plan.symbol_values)) == pytest.approx(plan.seconds, rel=1e-9)
    assert plan.peak_bytes == max(plan.staged.peaks) > 0 and plan.wire_bytes["x"] > 0
    assert "stage 1  .  F0" in schedule_text(plan.pipeline)
    assert sum([sum(leaf.shape != () for leaf in jax.tree.leaves(p.traced.in_avals)) for p in plan.stage_plans]) > 0
    made = plan.init(lambda: state)
    plan.check(made)
    moved = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.devices()[5]), made)
    with pytest.raises(jaxplan.LayoutError, match="do not lie where the plan says"):
        plan.check(moved)
    again = plan.replan(microbatches=8)
    assert again.pipeline.microbatches == 8 and plan.replan(pipeline=None, microbatches=None).pipeline is None


def test_what_cannot_be_asked_of_a_plan_on_sub_meshes():
    step, args = unet()
    mesh = mesh_of((2, 2))
    plan = jaxplan.make_plan(step, *args, mesh=mesh, pipeline="x", microbatches=4)
    for ask in (plan.to_html, lambda: plan.export("flax"), lambda: plan.regimes("B"), lambda: plan.memory, lambda: plan.peak):
        with pytest.raises(ValueError, match="programs of their own"):
            ask()
    with pytest.raises(TypeError, match=r"runs as several, on sub-meshes: plan\.audit"):
        jaxplan.audit(plan.jit(), *args)
    with pytest.raises(ValueError, match="planned with shape"):
        plan.jit().lower(args[0], args[1][:4], args[2])
    with pytest.raises(ValueError, match="traced inside of another function"):
        jax.jit(plan.jit())(*args)
    with pytest.raises(ValueError, match="has no devices to run on"):
        jaxplan.make_plan(step, *args, mesh=mesh.abstract_mesh, pipeline="x", microbatches=4).jit()
    with pytest.raises(jaxplan.NothingFits, match=r"stage \d of 2 along 'x', cut where it is fastest, takes"):
        jaxplan.make_plan(step, *args, mesh=mesh, pipeline="x", microbatches=4, memory_budget=2000)
    with pytest.raises(ValueError, match="pins lay inputs along 'x' too"):
        jaxplan.make_plan(step, *args, mesh=mesh, pipeline="x", pins={"batch[1]": jax.sharding.PartitionSpec("x")})


def test_a_pin_is_kept_on_the_stage_where_the_input_lies():
    step, args = unet()
    pins = {"batch[1]": jax.sharding.PartitionSpec("y"), "state/0/out": jax.sharding.PartitionSpec(None, None, "y")}
    plan = jaxplan.make_plan(step, *args, mesh=mesh_of((2, 2)), pipeline="x", microbatches=4, pins=pins)
    assert plan.in_specs[1] == pins["batch[1]"] and plan.in_specs[0][0]["out"] == pins["state/0/out"]


# ---- cuts and order ----------------------------------------------------------------------------------------------


def random_runs(seed, count):
    random = np.random.default_rng(seed)
    return [Run(*random.uniform(0.1, 2.0, 3), crossing=float(random.uniform(0.0, 0.5))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(6))
def test_cuts_are_the_best_there_are(seed):
    runs, stages, microbatches = random_runs(seed, 8), 2 + seed % 3, (1, 4, 16)[seed % 3]
    memory = (math.inf, 9.0 + 3 * microbatches / stages)[seed % 2]

    def held(ends):
        spans = list(itertools.pairwise((0, *ends)))
        follow = range(len(spans) - 1, -1, -1)
        return max(
            sum([r.state for r in runs[a:b]]) + min(microbatches, f + 1) * sum([r.kept for r in runs[a:b]])
            for (a, b), f in zip(spans, follow, strict=True)
        )

    everything = [(*some, 8) for some in itertools.combinations(range(1, 8), stages - 1)]
    fitting = [ends for ends in everything if held(ends) <= memory]
    if not fitting:
        with pytest.raises(ValueError, match="fit"):
            cut_chain(runs, stages, microbatches, memory)
        return
    best = min(chain_seconds(runs, ends, microbatches) for ends in fitting)
    found = cut_chain(runs, stages, microbatches, memory)
    assert found in fitting and chain_seconds(runs, found, microbatches) == pytest.approx(best)


def test_without_transfers_cuts_are_those_of_alpa():
    runs = [Run(run.seconds) for run in random_runs(9, 9)]
    layers = [Layer({(1, 1): run.seconds}, {1: 0.0}, {(1, 1): 0.0}, {}) for run in runs]
    theirs = alpa_stages(layers, 4, 8)
    ours = cut_chain(runs, 4, 8)
    assert chain_seconds(runs, ours, 8) == pytest.approx(theirs.seconds) and len(theirs.stages) == 4


def test_more_stages_than_runs_are_refused():
    with pytest.raises(ValueError, match="cannot be laid over 4 stages"):
        cut_chain([Run(1.0)] * 3, 4, 2)


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 3), (2, 1), (3, 5), (4, 2), (4, 9)])
def test_no_step_is_handed_out_before_what_it_waits_for(stages, microbatches):
    done, flying = set(), [0] * stages
    for stage, phase, row in order(stages, microbatches):
        before = (stage - 1, FORWARD, row) if phase == FORWARD else (stage + 1, BACKWARD, row)
        assert not 0 <= before[0] < stages or before in done
        assert phase == FORWARD or (stage, FORWARD, row) in done
        flying[stage] += 1 if phase == FORWARD else -1
        assert flying[stage] <= min(microbatches, stages - stage)
        done.add((stage, phase, row))
    assert len(done) == 2 * stages * microbatches and flying == [0] * stages


def test_more_stages_than_alike_layers_are_cut_as_unlike_ones():
    """Two layers of four are alike: a loop over them has no third stage, and the whole chain has."""

    def step(params, x, y):
        def loss(params):
            h = jnp.tanh(x @ params["in"])
            for w in params["layers"]:
                h = h + jnp.tanh(h @ w)
            return jnp.mean((h @ params["out"] - y) ** 2)

        return jax.tree.map(lambda w, g: w - 0.1 * g, params, jax.grad(loss)(params))

    shapes = [(8, 16), (16, 16), (16, 16), (16, 4), (12, 8), (12, 4)]
    draw = [0.3 * jax.random.normal(jax.random.key(k), shape) for k, shape in enumerate(shapes)]
    params = {"in": draw[0], "layers": draw[1:3], "out": draw[3]}
    args = (params, *draw[4:])
    plan = jaxplan.make_plan(step, *args, mesh=mesh_of((3,)), pipeline="x")
    assert len(plan.stage_plans) == 3
    for found, wanted in zip(jax.tree.leaves(plan.jit()(*args)), jax.tree.leaves(step(*args)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
