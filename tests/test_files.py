"""Plans as files: what comes back is what was saved, and what is no plan is refused with a reason."""

import ast
import dataclasses
import json
import math
import os
import re
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, mesh_of
from hypothesis import given, strategies as st
from jax.sharding import AbstractMesh, AxisType, PartitionSpec as P

import jaxplan
from jaxplan import api, files
from jaxplan.cost.price import cluster_terms, terms_seconds
from jaxplan.examples import programs
from jaxplan.examples.decoder import DecoderConfig, decoder
from jaxplan.files import PlanFileError, fold, parse_plan, schema, store
from jaxplan.files.encode import from_json, to_json
from jaxplan.files.fingerprint import program_of
from jaxplan.machine import Link, Machine

PROGRAMS = programs("small")
SHAPE = (4, 2)
LINK = Link(1e-10, 1e-9)
MACHINE = Machine("slow", {"float32": 1e-9}, 1e-10, 2.0**30, LINK, LINK, 64)
"""Work is dear and exchanges are cheap, so that also small programs are sharded."""


def plan_of(program, mesh=None, **options):
    mesh = mesh or AbstractMesh(SHAPE, ("x", "y"))
    return jaxplan.make_plan(program.fn, *program.args, mesh=mesh, machine=MACHINE, donate_argnums=program.donate, **options)


@pytest.fixture(scope="module")
def plans():
    return {name: plan_of(program) for name, program in PROGRAMS.items()}


@pytest.fixture(scope="module")
def text(plans, tmp_path_factory):
    """A plan file."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plans["decoder_scan"].save(path)
    return path.read_text()


def test_the_plans_of_these_tests_shard_and_exchange(plans):
    assert all(plan.exchanges for plan in plans.values())
    assert sum(any(map(len, jax.tree.leaves(plan.in_specs))) for plan in plans.values()) > len(plans) / 2


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_loaded_plan_is_the_plan_that_was_saved(name, plans, tmp_path, monkeypatch):
    plan, program = plans[name], PROGRAMS[name]
    plan.save(tmp_path / "plan.json")
    monkeypatch.setattr(api, "run_search", lambda *_: pytest.fail("loading searched"))
    loaded = jaxplan.load_plan(tmp_path / "plan.json", program.fn, *program.args, mesh=plan.mesh)
    assert (loaded.choices == plan.choices).all()
    assert loaded.constraints == plan.constraints
    assert loaded.in_specs == plan.in_specs and loaded.out_specs == plan.out_specs
    assert loaded.exchanges == plan.exchanges
    assert (loaded.seconds, loaded.wire_bytes, loaded.peak_bytes) == (plan.seconds, plan.wire_bytes, plan.peak_bytes)
    assert loaded.traced.donated == plan.traced.donated
    assert files.saved_plan(loaded) == files.saved_plan(plan)


def test_what_a_file_says_is_what_the_plan_says(plans):
    for plan in plans.values():
        saved = files.saved_plan(plan)
        assert dict(zip(plan.traced.in_paths, jax.tree.leaves(plan.in_specs), strict=True)) == {
            path: P(*leaf.spec) for path, leaf in saved.inputs.items()
        }
        assert saved.wire_bytes == pytest.approx(sum(plan.wire_bytes.values()))
        assert sum(sum(e.bytes.values()) for e in saved.exchanges) == pytest.approx(sum(plan.wire_bytes.values()))
        assert (saved.cost.seconds, saved.memory.peak_bytes) == (plan.seconds, plan.peak_bytes)
        held = saved.memory
        assert held.argument_bytes + held.output_bytes + held.temporary_bytes == pytest.approx(held.peak_bytes)
        assert sum(leaf.bytes for leaf in saved.inputs.values()) == pytest.approx(held.argument_bytes)
        assert held.argument_bytes == sum(plan.input_bytes(i) for i in range(len(plan.traced.in_avals)))
        assert saved.cost.work_seconds == pytest.approx(work_seconds(plan), rel=1e-9)


def work_seconds(plan):
    """The time of a plan's local work, from the terms that the search compared."""
    modelled, total = plan.modelled, 0.0
    for index, cluster in enumerate(modelled.graph.clusters):
        terms = cluster_terms(cluster, modelled.chosen(plan.choices, index), modelled.setting, modelled.numbers)
        total += cluster.times * terms_seconds(dataclasses.replace(terms, sent={}, rounds={}), modelled.numbers)
    return total


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_loaded_plan_computes_the_same_values(kind, tmp_path):
    program = PROGRAMS["mlp_sgd"]
    plan_of(program, mesh_of(SHAPE, kind)).save(tmp_path / "plan.json")
    loaded = jaxplan.load_plan(tmp_path / "plan.json", program.fn, *program.args)
    assert loaded.mesh.axis_types == (kind, kind) and loaded.mesh.size == 8
    run = loaded.jit(donate_argnums=())
    assert_close(jax.jit(program.fn)(*program.make_args(0)), run(*program.make_args(0)))


def test_a_loaded_plan_can_be_planned_again_and_prints(plans, tmp_path):
    plan, program = plans["mlp_sgd"], PROGRAMS["mlp_sgd"]
    plan.save(tmp_path / "plan.json")
    loaded = jaxplan.load_plan(tmp_path / "plan.json", program.fn, *program.args, mesh=plan.mesh)
    assert loaded.replan(machine="v5e").seconds == plan.replan(machine="v5e").seconds
    shown, before = str(loaded), str(plan)
    assert shown.split("planning")[0] == before.split("planning")[0]
    assert loaded.cost == plan.cost


def test_what_was_asked_for_comes_back(tmp_path):
    def step(w, x, scale):
        for _ in range(scale):
            x = jax.lax.while_loop(lambda c: c.sum() > 1.0, lambda c: jnp.tanh(c @ w), x)
        return x

    args = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((128, 64), jnp.float32)
    options = {"static_argnums": 2, "mesh": AbstractMesh((4,), ("x",))}
    plan = jaxplan.make_plan(
        step, *args, 2, **options, machine="v5e", pins={"w": P(None, "x")}, dims={"x": "B D"}, while_trips=3.0,
        memory_budget=math.inf, search="brute", certify=True,
    )  # fmt: skip
    plan.save(tmp_path / "plan.json")
    loaded = jaxplan.load_plan(tmp_path / "plan.json", step, *args, 2, **options)
    assert loaded.request.machine == plan.modelled.numbers.machine
    assert dataclasses.replace(loaded.request, machine="v5e") == plan.request
    assert loaded.dims == plan.dims and "B D" in str(loaded)
    with pytest.raises(PlanFileError, match="not the program"):
        jaxplan.load_plan(tmp_path / "plan.json", step, *args, 3, **options)


def test_what_was_donated_is_donated_again_unless_told_otherwise(tmp_path):
    program = PROGRAMS["mlp_sgd"]
    plan = plan_of(program)
    plan.save(tmp_path / "plan.json")
    again = jaxplan.load_plan(tmp_path / "plan.json", program.fn, *program.args, mesh=plan.mesh)
    assert any(again.traced.donated) and again.traced.donated == plan.traced.donated
    assert again.peak_bytes == plan.peak_bytes
    kept = jaxplan.load_plan(tmp_path / "plan.json", program.fn, *program.args, mesh=plan.mesh, donate_argnums=())
    assert not any(kept.traced.donated) and kept.peak_bytes > plan.peak_bytes


def test_machines_certificates_and_ledgers_come_back(tmp_path):
    program = PROGRAMS["mlp_sgd"]
    plan = jaxplan.make_plan(program.fn, *program.args, mesh=AbstractMesh(SHAPE, ("x", "y")), machine="cpu", certify=True)
    plan.save(tmp_path / "plan.json")
    loaded = jaxplan.load_plan(tmp_path / "plan.json", program.fn, *program.args, mesh=plan.mesh)
    assert loaded.modelled.numbers.machine == plan.modelled.numbers.machine and plan.modelled.numbers.machine.materialises
    assert (loaded.bound, loaded.gap, loaded.memory) == (plan.bound, plan.gap, plan.memory)
    saved = files.read_plan(tmp_path / "plan.json").memory
    assert saved.kinds == plan.ledger.by_kind and sum(saved.kinds.values()) == pytest.approx(plan.peak_bytes, rel=1e-9)
    assert [(one.name, one.source) for one in saved.live] == [(e.name, e.source) for e in plan.ledger.entries[: len(saved.live)]]


def test_what_a_machines_compiler_rounds_pads_and_keeps_near_comes_back(tmp_path):
    program = PROGRAMS["mlp_sgd"]
    plan = jaxplan.make_plan(program.fn, *program.args, mesh=AbstractMesh(SHAPE, ("x", "y")), machine="v5e")
    machine = plan.modelled.numbers.machine
    assert machine.matmul_reads and machine.tile and machine.near_bytes
    plan.save(tmp_path / "plan.json")
    loaded = jaxplan.load_plan(tmp_path / "plan.json", program.fn, *program.args, mesh=plan.mesh)
    assert loaded.modelled.numbers.machine == machine
    assert (loaded.seconds, loaded.wire_bytes, loaded.memory) == (plan.seconds, plan.wire_bytes, plan.memory)


def test_a_callable_search_is_not_written_down(plans, tmp_path):
    def own(problem):
        return jaxplan.search.brute(problem) if False else jaxplan.search.hsm2dl(problem)

    program = PROGRAMS["mlp_sgd"]
    plan = plan_of(program, search=own)
    plan.save(tmp_path / "plan.json")
    assert files.read_plan(tmp_path / "plan.json").asked.search is None
    assert jaxplan.load_plan(tmp_path / "plan.json", program.fn, *program.args).request.search == "hsm2dl"


def test_a_plan_that_had_to_be_squeezed_comes_back(tmp_path):
    program = PROGRAMS["decoder_scan"]
    free = plan_of(program, memory_budget=math.inf)
    smallest = next(b for b in (0.5, 0.6, 0.7, 0.8, 0.9) if fits(program, b * free.peak_bytes))
    plan = plan_of(program, memory_budget=smallest * free.peak_bytes)
    assert plan.peak_bytes < free.peak_bytes
    plan.save(tmp_path / "plan.json")
    loaded = jaxplan.load_plan(tmp_path / "plan.json", program.fn, *program.args)
    assert (loaded.choices == plan.choices).all() and loaded.peak_bytes == plan.peak_bytes
    assert loaded.seconds == plan.seconds, "what lies elsewhere than its reader wants it is paid for in both"


def fits(program, budget):
    try:
        return bool(plan_of(program, memory_budget=budget))
    except ValueError:
        return False


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_file_is_the_same_every_time_and_passes_its_schema(plans, tmp_path):
    for plan in plans.values():
        plan.save(tmp_path / "a.json")
        saved = files.read_plan(tmp_path / "a.json")
        assert saved == files.saved_plan(plan)
        files.write_plan(saved, tmp_path / "b.json")
        assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
        schema.validate(json.loads((tmp_path / "a.json").read_text()))
        assert max(map(len, (tmp_path / "a.json").read_text().splitlines())) < 400


def test_a_file_does_not_grow_with_depth(tmp_path):
    sizes = []
    for layers in (4, 24):
        config = DecoderConfig(layers=layers, width=64, heads=4, mlp_width=128, vocabulary=128, sequence=16, batch=16)
        plan_of(decoder(config, "unrolled")).save(tmp_path / "plan.json")
        sizes.append((tmp_path / "plan.json").stat().st_size)
    assert sizes[1] < 1.3 * sizes[0] and sizes[1] < 40_000


@given(st.lists(st.integers(0, 4), max_size=60), st.integers(1, 30))
def test_sequences_fold_and_unfold(numbers, times):
    for sequence in (numbers, numbers * times, [*numbers, *[7, 8, 9] * times, *numbers]):
        folded = fold.fold_sequence(sequence)
        assert fold.unfold_sequence(folded) == sequence
        assert fold.sequence_length(folded) == len(sequence)


def test_a_repeat_is_written_once():
    assert fold.fold_sequence([3, *[0, 1, 2] * 96, 4]) == [3, [96, [0, 1, 2]], 4]


WORDS = st.sampled_from(["w", "0", "1", "2", "11", "007", "{0-3}", "{", "}", "a b", "²", "{{", "-1", "1000000000000"])
PATHS = st.lists(st.lists(WORDS, min_size=1, max_size=4).map("/".join), max_size=30, unique=True)


@given(PATHS, st.integers(1, 3))
def test_paths_fold_and_unfold(paths, kinds):
    leaves = {path: hash(path) % kinds for path in paths}
    assert fold.unfold_paths(fold.fold_paths(leaves)) == leaves


def test_paths_fold_where_only_indices_differ():
    leaves = {f"blocks/{i}/w{j}": 0 for i in range(4) for j in range(2)} | {"blocks/3/w1": 1}
    assert fold.fold_paths(leaves) == {"blocks/{0-3}/w0": 0, "blocks/{0-2}/w1": 0, "blocks/3/w1": 1}
    assert fold.fold_paths({f"{i}/{j}": 0 for i in range(3) for j in (0, 1, 5)}) == {"{0-2}/{0-1,5}": 0}
    assert fold.fold_paths({"0/1": 0, "1/0": 0}) == {"0/1": 0, "1/0": 0}


@given(st.lists(st.sampled_from(["a", "b", "a (2)", "a (3)"]), max_size=8))
def test_equal_paths_are_told_apart(paths):
    found = fold.unique_paths(paths)
    assert len(set(found)) == len(paths)
    assert all(new == old or new.startswith(f"{old} (") for new, old in zip(found, paths, strict=True))


def test_arguments_whose_paths_look_alike_keep_their_specs(tmp_path):
    def step(tree):
        return tree["a"]["b"] @ tree["a/b"]

    tree = {"a": {"b": jax.ShapeDtypeStruct((64, 256), jnp.float32)}, "a/b": jax.ShapeDtypeStruct((256, 32), jnp.float32)}
    plan = jaxplan.make_plan(step, tree, mesh=AbstractMesh((4,), ("x",)), pins={"tree/a/b": P("x")}, machine="a100")
    plan.save(tmp_path / "plan.json")
    assert jaxplan.load_plan(tmp_path / "plan.json", step, tree, mesh=plan.mesh).in_specs == plan.in_specs


# --- the fingerprint -------------------------------------------------------------------------------------------------

SOURCE = """
import jax, jax.numpy as jnp
def {name}(w, x):
    @jax.jit
    def {inner}(x):
        return jax.nn.relu(x @ w) * {scale}
    def body(c, _):
        return {inner}(c), jnp.max(c)
    return jax.lax.scan(body, x, None, length={length})
"""


def fingerprint(name="step", inner="layer", scale=2.0, length=3, dtype="float32", width=8):
    space = {}
    exec(SOURCE.format(name=name, inner=inner, scale=scale, length=length), space)
    args = jax.ShapeDtypeStruct((width, width), dtype), jax.ShapeDtypeStruct((4, width), dtype)
    return program_of(jax.make_jaxpr(space[name])(*args)).fingerprint


def test_the_fingerprint_is_the_same_in_every_version_of_python_and_jax_that_writes_this_jaxpr():
    assert fingerprint() == "01c4ccd6fbd7da9976bcbe79b0c2c0f8b159dc79bef38532d0332293ce8a0eb6"


def test_what_the_fingerprint_is_of():
    assert fingerprint() == fingerprint() == fingerprint(name="other", inner="block", scale=0.5)
    changed = [fingerprint(), fingerprint(length=4), fingerprint(dtype="bfloat16"), fingerprint(width=16)]
    assert len(set(changed)) == len(changed)


def test_an_integer_constant_is_part_of_the_fingerprint():
    x = jax.ShapeDtypeStruct((8,), jnp.int32)
    found = {program_of(jax.make_jaxpr(lambda x, n=n: x + n)(x)).fingerprint for n in (1, 2, 2)}
    assert len(found) == 2


def test_who_reads_whom_is_part_of_the_fingerprint():
    def one(a, b):
        return (a - b) * a

    def two(a, b):
        return (a - b) * b

    shape = jax.ShapeDtypeStruct((4,), jnp.float32)
    found = [program_of(jax.make_jaxpr(fn)(shape, shape)) for fn in (one, two)]
    assert found[0].fingerprint != found[1].fingerprint and found[0].primitives == found[1].primitives


def test_the_fingerprint_is_the_same_in_another_process_from_another_place(tmp_path):
    code = """
    import os
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax, sys
    from jaxplan.examples import programs
    from jaxplan.files.fingerprint import program_of
    for program in programs("small").values():
        print(program.name, program_of(jax.make_jaxpr(program.fn)(*program.args)).fingerprint)
    """
    package = Path(jaxplan.__file__).parent
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "jaxplan").symlink_to(package)
    found = []
    for seed, path in (("1", package.parent), ("2", moved)):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(path)}
        command = [sys.executable, "-c", textwrap.dedent(code)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
        found.append(dict(line.split() for line in done.stdout.splitlines()))
    here = {name: program_of(jax.make_jaxpr(p.fn)(*p.args)).fingerprint for name, p in PROGRAMS.items()}
    assert found == [here, here] and len(set(here.values())) == len(here)


# --- another program -------------------------------------------------------------------------------------------------


def network(depth=2, activation=jnp.tanh, name="w"):
    def step(params, x):
        for layer in params["layers"]:
            x = activation(x @ layer[name] + layer["b"][None, :])
        return x

    def layer():
        return {name: jax.ShapeDtypeStruct((32, 32), jnp.float32), "b": jax.ShapeDtypeStruct((32,), jnp.float32)}

    return step, {"layers": [layer() for _ in range(depth)]}, jax.ShapeDtypeStruct((64, 32), jnp.float32)


@pytest.fixture(scope="module")
def network_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "plan.json"
    jaxplan.make_plan(*network(), mesh=AbstractMesh(SHAPE, ("x", "y")), machine="a100").save(path)
    return path


def refusal(path, fn, *args):
    with pytest.raises(PlanFileError) as caught:
        jaxplan.load_plan(path, fn, *args)
    return str(caught.value)


def test_paths_that_are_no_more_are_named(network_file):
    said = refusal(network_file, *network(name="weight"))
    assert "no such input any more: params/layers/0/w (now params/layers/0/weight?), params/layers/1/w (now" in said
    assert "new inputs: params/layers/0/weight, params/layers/1/weight" in said
    assert "'step' is not the program that the plan was made for" in said and "Plan again with make_plan" in said


def test_shapes_that_changed_are_named(network_file):
    step, params, _ = network()
    said = refusal(network_file, step, params, jax.ShapeDtypeStruct((16, 32), jnp.float32))
    assert "inputs of another shape or dtype: x was float32[64,32], is float32[16,32]" in said
    assert "outputs of another shape or dtype: result was float32[64,32], is float32[16,32]" in said
    assert "of other shapes or with other parameters: add, broadcast_in_dim, dot_general" not in said  # biases are as they were
    assert "dot_general" in said and "tanh" in said


def test_more_layers_are_counted(network_file):
    said = refusal(network_file, *network(depth=9))
    assert "new inputs: params/layers/2/b" in said and "and 8 more" in said
    assert "dot_general 2 -> 9" in said and "tanh 2 -> 9" in said


def test_another_operation_is_named(network_file):
    said = refusal(network_file, *network(activation=jnp.sin))
    assert "equations: sin 0 -> 2, tanh 2 -> 0" in said and "input" not in said


def test_another_function_is_named(network_file):
    said = refusal(network_file, lambda params, x: x, *network()[1:])
    assert "the plan was made for 'step', and '<lambda>' is another program" in said


def test_other_wiring_is_told(tmp_path):
    shape = jax.ShapeDtypeStruct((8,), jnp.float32)
    jaxplan.make_plan(lambda a, b: (a - b) * a, shape, shape, mesh=AbstractMesh((2,), ("x",))).save(tmp_path / "plan.json")
    assert "put together in another way" in refusal(tmp_path / "plan.json", lambda a, b: (a - b) * b, shape, shape)


def test_another_mesh_is_refused_and_too_few_devices_give_an_abstract_one(network_file, tmp_path):
    with pytest.raises(PlanFileError, match=r"for the mesh \(x=4, y=2\), the given mesh is \(x=2, y=4\)"):
        jaxplan.load_plan(network_file, *network(), mesh=mesh_of((2, 4)))
    with pytest.raises(PlanFileError, match=r"the given mesh is \(y=2, x=4\)"):
        jaxplan.load_plan(network_file, *network(), mesh=AbstractMesh((2, 4), ("y", "x")))
    jaxplan.make_plan(*network(), mesh=AbstractMesh((32, 2), ("x", "y"))).save(tmp_path / "large.json")
    assert isinstance(jaxplan.load_plan(tmp_path / "large.json", *network()).mesh, AbstractMesh)


# --- what is no plan -------------------------------------------------------------------------------------------------


def edited(text, *path, to):
    value = json.loads(text)
    place = value
    for key in path[:-1]:
        place = place[key]
    if to is None:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return json.dumps(value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "truncated"),
        ("\0\1\2", "not JSON"),
        (b"\xff\xfe\xfa", "not JSON"),
        ("nonsense", "not JSON"),
        ("[1, 2]", "but no plan"),
        ('{"format": "jaxplan plan"}', "missing"),
        ('{"format": "something else", "version": 1}', "but no plan"),
        ('{"format": "jaxplan plan", "format": "jaxplan plan"}', "'format' is given twice"),
        ('{"format": NaN}', "NaN is no number"),
        ('{"format": 1e999}', "too large"),
        ('{"format": ' + "9" * 5000 + "}", "too large"),
        ("[" * 1000 + "]" * 1000, "cannot be read as a plan"),
        ("[" * 200_000, "nested too deeply"),
        ('{"format": "jaxplan plan", "version": 1, "inputs": ' + '{"a":' * 1000 + "1" + "}" * 1001, "cannot be read as a plan"),
    ],
)
def test_nonsense_is_refused(content, said, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PlanFileError, match=said) as caught:
        files.read_plan(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.999])
def test_a_truncated_file_is_refused(share, text):
    with pytest.raises(PlanFileError, match="truncated"):
        parse_plan(text[: int(len(text) * share)].rstrip().encode())


EDITS = [
    (("version",), 7, r"it is of version 7 \(jaxplan .* wrote it\), and this jaxplan reads up to version 2: update jaxplan"),
    (("version",), 0, "version: expected 1 or 2, found 0"),
    (("version",), "1", 'version: expected 1 or 2, found "1"'),
    (("mesh",), None, "the file: mesh missing"),
    (("colour",), "red", "the file: 'colour' is not known here"),
    (("mesh", 0, "size"), 0, r"mesh\[0\].size: expected at least 1, found 0"),
    (("mesh", 0, "size"), True, r"mesh\[0\].size: expected integer"),
    (("mesh", 0, "axis"), "y", "are not all different"),
    (("machine", "seconds_per_byte"), 0, "machine.seconds_per_byte: expected more than 0"),
    (("machine", "seconds_per_flop"), {}, "needs at least 'float32'"),
    (("cost", "seconds"), "fast", 'cost.seconds: expected number, found "fast"'),
    (("cost", "seconds"), -1, "expected at least 0"),
    (("program", "fingerprint"), "abc", "program.fingerprint: expected text that matches"),
    (("inputs", "params/embedding", "spec"), ["z"], r"inputs\['params/embedding'\].spec: 'z' is no axis of the mesh"),
    (("inputs", "params/embedding", "spec"), ["x", "x"], "the axis 'x' is used twice"),
    (("inputs", "params/embedding", "spec"), ["x", None, None], "3 entries for 2 dimensions"),
    (("inputs", "params/embedding", "spec"), {"0": "x"}, "expected array, found an object of 1"),
    (("inputs", "params/embedding", "shape"), [1.5], "expected integer, found 1.5"),
    (("inputs", "params/{0-999999999}/w"), {"dtype": "f", "shape": [], "spec": [], "bytes": 1}, "paths; at most 1,000,000"),
    (("inputs", "params/{0-1,1}/w"), {"dtype": "f", "shape": [], "spec": [], "bytes": 1}, "'params/1/w' is given twice"),
    (("exchanges", 0, "kind"), "gossip", r"exchanges\[0\].kind: expected \"all_reduce\" or"),
    (("exchanges", 0, "axes"), ["q"], r"exchanges\[0\]: 'q' is no axis"),
    (("choices", "order"), [[10**15, [0]]], "at most 10,000,000 are read"),
    (("choices", "order"), [10**6], "numbers no row"),
    (("choices", "order"), [-1], "expected at least 0, found -1; or"),
    (("choices", "rows", 0, "factors"), {"q": 1}, "'q' is no axis"),
]


@pytest.mark.parametrize(("path", "to", "said"), EDITS, ids=[f"{'.'.join(map(str, p))}={to}"[:60] for p, to, _ in EDITS])
def test_a_file_edited_into_nonsense_is_refused(path, to, said, text):
    with pytest.raises(PlanFileError, match=said):
        parse_plan(edited(text, *path, to=to).encode())


def test_everything_that_is_required_is_missed(text):
    for key in json.loads(text):
        with pytest.raises(PlanFileError, match=r"missing|but no plan"):
            parse_plan(edited(text, key, to=None).encode())


def load_edited(text, tmp_path, *path, to):
    (tmp_path / "plan.json").write_text(edited(text, *path, to=to))
    program = PROGRAMS["decoder_scan"]
    return jaxplan.load_plan(tmp_path / "plan.json", program.fn, *program.args, mesh=AbstractMesh(SHAPE, ("x", "y")))


def test_choices_that_the_program_does_not_have_are_refused(text, tmp_path):
    value = json.loads(text)
    number = next(i for i, row in enumerate(value["choices"]["rows"]) if row.get("factors"))
    with pytest.raises(PlanFileError, match="cannot be split over 'x' in this way; the file was edited, or jaxplan"):
        load_edited(text, tmp_path, "choices", "rows", number, "factors", to={"x": 77})
    with pytest.raises(PlanFileError, match=r"is for 'sprain', where the program has '.*'; the file was edited"):
        load_edited(text, tmp_path, "choices", "rows", number, "operator", to="sprain")
    with pytest.raises(PlanFileError, match=r"choices: \d+ of them for \d+ clusters"):
        load_edited(text, tmp_path, "choices", "order", to=[*value["choices"]["order"], 0])


def test_a_spec_that_was_edited_is_refused_by_name(text, tmp_path):
    before = json.loads(text)["inputs"]["params/embedding"]["spec"]
    with pytest.raises(PlanFileError, match=r"specs and choices disagree: params/embedding \(the file says"):
        load_edited(text, tmp_path, "inputs", "params/embedding", "spec", to=[] if before else ["x"])


def test_a_huge_file_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    path.touch()
    os.truncate(path, 100 * 10**6)
    monkeypatch.setattr(store.json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    with pytest.raises(PlanFileError, match="more than 32 MiB"):
        files.read_plan(path)


def test_the_schema_uses_nothing_that_the_validator_skips():
    with pytest.raises(KeyError):
        schema.validate(1, {"multipleOf": 2})

    def keywords(part):
        for key, value in part.items():
            yield key
            if key in ("properties", "$defs"):
                for inner in value.values():
                    yield from keywords(inner)
            elif key in ("anyOf", "prefixItems"):
                for inner in value:
                    yield from keywords(inner)
            elif isinstance(value, dict):
                yield from keywords(value)

    known = {*schema._KEYWORDS, *schema._NOTES, "$ref"}
    assert set(keywords(schema.plan_schema())) <= known


def test_nothing_in_a_file_is_executed(text, tmp_path):
    evil = "\"\"\"\n__import__('os').system('touch executed')\n{0}{x!r}%s"
    value = json.loads(text)
    value["function"] = value["versions"]["jaxplan"] = evil
    value["inputs"] = {evil: value["inputs"]["params/embedding"], f"{evil}/{{0-3}}/w": value["inputs"]["params/embedding"]}
    value["inputs"][evil]["dtype"] = evil
    saved = parse_plan(json.dumps(value).encode())
    tree = ast.parse(files.to_python(saved))
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert calls <= {"P", "range", "filter", "keystr", "tree_map_with_path"}
    space = {}
    exec(files.to_python(saved), space)
    assert set(space["INPUTS"]) == set(saved.inputs) and not Path("executed").exists()


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")
    return path


def survives(path, error):
    with pytest.raises(error):
        store.write_text("new" * 1000, path)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == [path.name], "something was left behind"


def test_a_full_disk_leaves_the_old_file(kept, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "fsync", full)
        survives(kept, OSError)
    with monkeypatch.context() as patch:
        patch.setattr(store.os, "replace", full)
        survives(kept, OSError)


def test_a_write_that_stops_half_way_leaves_the_old_file(kept):
    code = f"""
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    from jaxplan.files import write_text
    write_text("new" * 10000, {str(kept)!r})
    """
    environment = os.environ | {"PYTHONPATH": str(Path(jaxplan.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 1 and "OSError" in done.stderr and "File too large" in done.stderr
    assert kept.read_text() == "old" and os.listdir(kept.parent) == [kept.name]


def test_an_interrupt_leaves_the_old_file(kept, monkeypatch):
    monkeypatch.setattr(store.os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    survives(kept, KeyboardInterrupt)


def test_a_folder_that_cannot_be_written(plans, tmp_path):
    with pytest.raises(FileNotFoundError):
        plans["mlp_sgd"].save(tmp_path / "none" / "plan.json")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        plans["mlp_sgd"].save(tmp_path / "file" / "plan.json")
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "plan.json").write_text("old")
    locked.chmod(0o555)
    if not os.access(locked, os.W_OK):  # root may write anywhere
        survives(locked / "plan.json", PermissionError)
    locked.chmod(0o755)


def test_links_are_followed_and_modes_kept(tmp_path):
    path, link = tmp_path / "plan.json", tmp_path / "link.json"
    store.write_text("first", path)
    fresh = tmp_path / "fresh"
    fresh.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(fresh.stat().st_mode)
    path.chmod(0o640)
    link.symlink_to(path)
    store.write_text("second", link)
    assert link.is_symlink() and path.read_text() == "second" and stat.S_IMODE(path.stat().st_mode) == 0o640


# --- specs as Python -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_module_of_specs_gives_the_same_specs(name, plans):
    plan = plans[name]
    space = {}
    exec(compile(plan.to_python(), "specs.py", "exec"), space)
    assert space["MESH"] == plan.axis_sizes
    is_spec = {"is_leaf": lambda leaf: isinstance(leaf, P)}
    assert space["INPUTS"] == dict(zip(plan.traced.in_paths, jax.tree.leaves(plan.in_specs, **is_spec), strict=True))
    assert space["OUTPUTS"] == dict(zip(plan.traced.out_paths, jax.tree.leaves(plan.out_specs, **is_spec), strict=True))
    heads = list(dict.fromkeys(path.split("/")[0] for path in plan.traced.in_paths))
    assert tuple(space["specs_of"](head, arg) for head, arg in zip(heads, PROGRAMS[name].args, strict=True)) == plan.in_specs
    _, shape = jax.make_jaxpr(PROGRAMS[name].fn, return_shape=True)(*PROGRAMS[name].args)
    assert space["specs_of"](None, shape, space["OUTPUTS"]) == plan.out_specs


def test_the_module_is_short_for_a_deep_model():
    config = DecoderConfig(layers=16, width=64, heads=4, mlp_width=128, vocabulary=128, sequence=16, batch=16)
    text = plan_of(decoder(config, "unrolled")).to_python()
    assert re.search(r'\*\*\{f"params/blocks/\{i\}/w_up": P\(.*\) for i in range\(16\)\}', text)
    assert len(text.splitlines()) < 120


def test_encoding_is_undone_by_decoding(plans):
    for plan in plans.values():
        saved = files.saved_plan(plan)
        assert from_json(json.loads(json.dumps(to_json(saved)))) == saved
        assert np.isfinite(saved.cost.seconds)


NONSENSE = [
    None,
    True,
    0,
    -1,
    10**30,
    1e300,
    -0.5,
    "",
    "x",
    "{0-999999999}",
    "unlimited",
    [],
    {},
    [[]],
    [1],
    ["x"],
    {"x": 1},
    [3, [0]],
]


def places(value, path=()):
    """Every place in a parsed file."""
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def test_whatever_is_put_wherever_in_a_file_it_is_read_or_refused(text):
    read = 0
    for number, path in enumerate([*places(json.loads(text))][::11]):
        try:
            saved = parse_plan(edited(text, *path, to=NONSENSE[number % len(NONSENSE)]).encode())
        except PlanFileError as error:
            assert len(str(error)) < 2000
            continue
        read += 1
        assert files.describe_saved(saved, outputs=True) and compile(files.to_python(saved), "specs.py", "exec")
        assert parse_plan(store.render(to_json(saved)).encode()) == saved
    assert 0 < read < number


def test_whatever_bytes_are_changed_a_file_is_read_or_refused(text):
    data = text.encode()
    for place in range(0, len(data), 397):
        for byte in b'\0"9[{\xff':
            try:
                parse_plan(data[:place] + bytes([byte]) + data[place + 1 :])
            except PlanFileError:
                continue
