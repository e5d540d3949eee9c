"""What a plan of stages on sub-meshes can do beside running: audited, saved and loaded, explained; and what its stages hold."""

import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import assert_close, mesh_of
from jax.sharding import PartitionSpec
from unlike_programs import residual_network, unet

import jaxplan
from jaxplan.api import StagedPlan
from jaxplan.files import PlanFileError
from jaxplan.graph import build_graph
from jaxplan.graph.flatten import BOUNDARY, VIEW
from jaxplan.trace import trace
from jaxplan.unlike.holding import _Held
from jaxplan.unlike.stage import cut

SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "check_stages.py"))


def planned(program=unet, shape=(2, 2), **options):
    step, args = program()
    asked = {"pipeline": "x", "microbatches": 4, "machine": "cpu", "donate_argnums": 0, **options}
    plan = jaxplan.make_plan(step, *args, mesh=mesh_of(shape), **asked)
    assert isinstance(plan, StagedPlan)
    return plan, step, args


def test_every_part_is_compiled_as_predicted():
    plan, _, _ = planned(pins={"batch[1]": PartitionSpec("y"), "batch[2]": PartitionSpec("y")})
    found = plan.audit()
    assert found.predicted["y"] > 0 and found.predicted["x"] >= plan.wire_bytes["x"] > 0
    assert max(found.errors.values()) <= 0.02 and found.largest_unplanned <= 0.01
    assert found.predicted_peak_bytes == plan.peak_bytes
    assert found.compiled_peak_bytes == pytest.approx(plan.peak_bytes, rel=0.25)  # of so small a program
    handed = [row for row in found.exchanges if row.kind == "copy"]
    assert {row.tensor for row in handed} == {"sent to stage 0", "sent to stage 1"} and {r.status for r in handed} == {"matched"}
    assert json.loads(found.to_json())["axes"]["x"]["error"] == 0
    with pytest.raises(ValueError, match="compiled for the devices of the plan's mesh"):
        plan.audit(topology="v5e:2x2")


def test_what_two_parts_read_is_moved_for_each():
    def twice(x, w):
        return x @ w @ w

    traced = trace(lambda x, w: jax.jit(twice)(jax.jit(twice)(x, w), w), [jnp.ones((4, 4))] * 2, {})
    views = [[op.name for op in build_graph(one).operators].count(VIEW) for one in (
        traced, replace(traced, apart=frozenset([(0,), (1,)]))
    )]  # fmt: skip
    assert views == [1, 2]


@pytest.mark.parametrize(("apart", "times"), [(frozenset(), 1), (frozenset([(0,), (1,)]), 2)])
def test_what_two_parts_read_alike_is_sent_to_each(monkeypatch, apart, times):
    """Both products want `x` whole: a single program gathers it once."""

    def products(x, v, w):
        return jax.jit(jnp.matmul)(x, v), jax.jit(jnp.matmul)(x, w)

    monkeypatch.setattr("jaxplan.api.trace", lambda *args, **options: replace(trace(*args, **options), apart=apart))
    pins = {"x": PartitionSpec("x"), "v": PartitionSpec(None, "x"), "w": PartitionSpec(None, "x")}
    args = jnp.ones((8, 16)), jnp.ones((16, 64)), jnp.ones((16, 64))
    plan = jaxplan.make_plan(products, *args, mesh=mesh_of((2,)), machine="cpu", pins=pins)
    assert [(found.kind, found.shape) for found in plan.exchanges] == [("all_gather", (8, 16))] * times


@pytest.mark.slow
@pytest.mark.parametrize(("name", "m"), [("encoder_decoder", 1), ("encoder_decoder", 4), ("mixer", 4), ("tagger", 1)])
def test_parts_that_gather_the_same_state_send_what_was_predicted(name, m):
    plan, _ = SCRIPT["planned"](name, (2, 2, 2), m)
    found = plan.audit()
    assert max(found.errors.values()) <= 0.01 and found.largest_unplanned <= 0.01


def test_donated_state_that_several_stages_read():
    plan, step, args = planned()
    state, _ = plan.jit()(*jax.tree.map(jnp.copy, args))
    got = plan.jit()(state, *args[1:])
    assert_close(step(step(*args)[0], *args[1:]), got)


def test_a_plan_on_sub_meshes_is_saved_and_loaded(tmp_path):
    plan, step, args = planned(dims={"batch[1]": "Rows High Wide Colours"})
    plan.save(tmp_path / "plan.json")
    again = jaxplan.load_plan(tmp_path / "plan.json", step, *args, mesh=plan.mesh)
    assert isinstance(again, StagedPlan) and again.in_shardings == plan.in_shardings and again.out_shardings == plan.out_shardings
    assert (again.seconds, again.peak_bytes, again.pipeline) == (plan.seconds, plan.peak_bytes, plan.pipeline)
    assert again.request.pipeline == "x" and again.traced.donated == plan.traced.donated
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()
    assert any("Colours" in str(stage) for stage in again.stage_plans)
    assert_close(step(*args), again.jit(donate_argnums=())(*args))
    with pytest.raises(ValueError, match="PartitionSpecs do not say on which an array lies"):
        plan.to_python()
    with pytest.raises(ValueError, match="is not the program that the plan was made for"):
        jaxplan.load_plan(tmp_path / "plan.json", unet(width=6)[0], *unet(width=6)[1], mesh=plan.mesh)


def test_a_file_that_was_edited_is_refused(tmp_path):
    plan, step, args = planned()
    plan.save(tmp_path / "plan.json")
    said = json.loads((tmp_path / "plan.json").read_text())

    def refused(change, match):
        value = json.loads(json.dumps(said))
        change(value)
        (tmp_path / "edited.json").write_text(json.dumps(value))
        with pytest.raises(PlanFileError, match=match):
            jaxplan.load_plan(tmp_path / "edited.json", step, *args, mesh=plan.mesh)

    def input_elsewhere(value):
        value["inputs"]["batch[1]"]["stage"] = 1 - value["inputs"]["batch[1]"]["stage"]

    refused(lambda v: v["stages"].update(cuts=[v["stages"]["cuts"][0] - 3]), "the program of stage 0 is another one")
    refused(lambda v: v["stages"].update(cuts=[10**6]), "they must ascend")
    refused(lambda v: v["stages"].update(microbatches=5), "stages: .* micro-batches")
    refused(lambda v: v["stages"].update(axis="q"), "stages.axis: 'q' is no axis of the mesh")
    refused(lambda v: v["stages"]["programs"].append(v["stages"]["programs"][0]), "3 programs and 1 cuts")
    refused(lambda v: v["stages"]["programs"][0]["choices"]["rows"][0].update(operator="sin"), "choices: number")
    refused(input_elsewhere, r"specs and choices disagree: batch\[1\]")


LOADS = """
import sys
sys.path.insert(0, {tests!r})
import conftest, jax, jaxplan
from unlike_programs import unet
step, args = unet()
plan = jaxplan.load_plan({path!r}, step, *args, mesh=conftest.mesh_of((2, 2)))
plan.save({path!r} + ".again")
print(plan.in_specs)
"""


@pytest.mark.slow
def test_another_process_finds_the_same_stages(tmp_path):
    plan, _, _ = planned()
    path = str(tmp_path / "plan.json")
    plan.save(path)
    code = LOADS.format(tests=str(Path(__file__).parent), path=path)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(plan.in_specs)
    assert Path(path + ".again").read_bytes() == Path(path).read_bytes()


def test_every_part_is_lowered_and_compiled():
    step, args = unet()
    plan = jaxplan.make_plan(step, *args, mesh=mesh_of((2, 2)), pipeline="x", microbatches=4)
    lowered = plan.jit().lower(*args)
    assert lowered.as_text().count("module @jit_stage_") == sum(len(stage.parts) for stage in lowered.stages)
    compiled = lowered.compile()
    assert "HloModule jit_stage_1_backward" in compiled.as_text() and "stage 0, forward: 4 times in a call" in compiled.as_text()
    assert max(compiled.peak_bytes) == plan.audit().compiled_peak_bytes and len(compiled.peak_bytes) == 2


def test_another_layout_is_compared_stage_by_stage():
    step, args = unet()
    plan = jaxplan.make_plan(step, *args, mesh=mesh_of((2, 2)), pipeline="x", microbatches=4)
    path = "state/0/deep"
    other = plan.why_not({path: PartitionSpec(None, None, None, "y")})
    assert other.other.pipeline is not None and other.extra >= 0 and list(other.changed) and path in other.changed
    assert other.plan.pipeline == other.other.pipeline and other.causes and "moves" in str(other)


@pytest.mark.skipif(importlib.util.find_spec("orbax") is None, reason="orbax not installed: pip install 'jaxplan[export]'")
def test_a_checkpoint_is_restored_to_the_stages(tmp_path):
    import orbax.checkpoint

    step, (state, *batch) = unet()
    plan = jaxplan.make_plan(step, state, *batch, mesh=mesh_of((2, 2)), pipeline="x", microbatches=4)
    made = plan.init(lambda: state)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", made)
    found = plan.restore(tmp_path / "state", of="state")
    plan.check(found)
    assert_close(state, found)
    assert len({frozenset(leaf.sharding.device_set) for leaf in jax.tree.leaves(found)}) == 2
    with pytest.raises(jaxplan.ExportError, match="'flax' lays all arrays on one mesh: of such a plan there are orbax"):
        plan.export("flax")


def test_an_input_is_explained_by_the_stage_where_it_lies():
    plan, _, _ = planned()
    assert "state/0/out" in str(plan.explain("state/0/out"))
    with pytest.raises(ValueError, match=r"explain: stages 0, 1 have 'state': ask plan.stage_plans\[number\].explain"):
        plan.explain("state")
    with pytest.raises(ValueError, match="explain: no stage has 'nothing'"):
        plan.explain("nothing")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape", "m"), [("unet", (2, 4), 8), ("encoder_decoder", (2, 4), 2), ("tagger", (2, 4), 8)])
def test_stages_hold_what_was_predicted(name, shape, m):
    plan, args = SCRIPT["planned"](name, shape, m)
    held = SCRIPT["held"](plan, args)
    for stage, nbytes in held.items():
        assert plan.staged.peaks[stage] == pytest.approx(nbytes, rel=0.15)


def test_all_that_a_part_leaves_has_a_layout():
    """What a loop inside of a part stacks, and what no cluster leaves, is not taken to lie whole on every device."""
    plan, _ = SCRIPT["planned"]("tagger", (2, 2), 2)
    stacked = 0
    for program, own in zip(plan.staged.programs, plan.staged.plans, strict=True):
        held = _Held(plan.staged.parts.micro, program, own)
        for var in cut(held.body, range(held.loop.turn))[1]:
            tensor = held.tensors[var]
            if not var.aval.shape:  # the loss
                continue
            layout = own.layouts.get(tensor, held.inner.get(tensor))
            shards = math.prod([held.plan.modelled.numbers.sizes[axis] for axis, dim in enumerate(layout) if dim >= 0])
            assert held.nbytes(var) == math.prod(var.aval.shape) * var.aval.dtype.itemsize / shards
            stacked += any(op.name == BOUNDARY and op.path[-2] == "out" and tensor in op.results for op in held.graph.operators)
    assert stacked >= 2


def test_the_step_of_measured_parts_is_that_of_their_order():
    each = {"prepare": 0.0, "forward": 1.0, "backward": 2.0}
    took = {(stage, name): seconds for stage in range(2) for name, seconds in each.items()}
    assert SCRIPT["replayed"](took, 2, 1) == 6.0
    assert SCRIPT["replayed"](took, 2, 4) == 15.0  # m + k - 1 of 3 seconds


def test_what_is_kept_of_16_bits_is_counted():
    plan, _, _ = planned(lambda: residual_network(dtype=jnp.bfloat16), microbatches=2)
    other, _, _ = planned(residual_network, microbatches=2)
    assert plan.peak_bytes < other.peak_bytes
