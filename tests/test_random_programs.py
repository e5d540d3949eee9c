"""Random programs: planning neither crashes nor changes a result, its specs are legal, and it decides alike every time.

A failure of the slow tests names a seed: `random_case(seed)` is the program and what it was planned for. Each cause found that
way is a small test of its own in test_random_found.py.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from hypothesis import HealthCheck, given, settings, strategies as st
from jax.sharding import PartitionSpec
from random_programs import Program, Type, build, draw_program, shrink

import jaxplan
from jaxplan import _jax
from jaxplan.machine import PRESETS, Machine
from jaxplan.problem import Assignment, Problem, evaluate
from jaxplan.search import hsm2dl

MESHES = ((8,), (4, 2), (2, 2, 2))
BLOCKS, BLOCK = 20, 100
"""Of the slow tests: how many, and the programs of each."""
TIGHT = 0.75
"""A memory budget, as a share of what a plan without one takes."""


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Only what comes after partitioning is compiled with less care."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


# --- what a program is planned for -------------------------------------------------------------------------------------------


def slowed(name: str, arithmetic: float, memory: float = 1.0) -> Machine:
    """A preset on which even small programs are worth splitting: slow arithmetic and memory, no latency."""
    machine = PRESETS[name]
    return replace(
        machine, name=f"{name}, arithmetic {arithmetic:g} and memory {memory:g} times slower, no latency",
        seconds_per_flop={dtype: arithmetic * seconds for dtype, seconds in machine.seconds_per_flop.items()},
        seconds_per_byte=machine.seconds_per_byte * memory,
        inner=replace(machine.inner, latency_seconds=0.0), outer=replace(machine.outer, latency_seconds=0.0),
    )  # fmt: skip


MACHINES = (
    slowed("v5e", 1e3),
    slowed("v5e", 1e6),
    slowed("v5e", 1e3, 1e4),
    slowed("h100", 1e4, 100),
    replace(slowed("v4", 1e5), node=2),
    PRESETS["cpu"],
)


def any_layouts(seed: int) -> Callable[[Problem], Assignment]:
    """A search that takes any legal choice of every node: layouts that no cost would pick are to be right too."""

    def anywhere(problem: Problem) -> Assignment:
        rng = np.random.default_rng(seed)
        best = hsm2dl(problem)
        for _ in range(4):
            tried = np.array(best.choices)
            for node, about in enumerate(problem.nodes):
                rows = rng.integers(0, about.options, (8, len(problem.axes)))
                legal = rows[np.isfinite(about.price(rows))]
                tried[node] = [*legal, tried[node]][0]
            if np.isfinite(seconds := evaluate(problem, tried)):
                return Assignment(tried, seconds)
        return best

    return anywhere


@dataclass(frozen=True)
class Setting:
    """What a program is planned for. `machine`: its place in `MACHINES`; `anywhere`: a seed of any legal layouts, 0 for the
    default search; `pins`: a seed of layouts of inputs insisted on, 0 for none; `squeezed`: into less memory than it takes."""

    mesh: tuple[int, ...]
    machine: int
    anywhere: int
    pins: int
    donate: bool
    squeezed: bool = False

    def plan(self, program: Program) -> jaxplan.Plan:
        """The program's plan."""
        fn, args = build(program)
        plan = jaxplan.make_plan(
            fn, *args, mesh=mesh_of(self.mesh), machine=MACHINES[self.machine], donate_argnums=0 if self.donate else None,
            search=any_layouts(self.anywhere) if self.anywhere else "hsm2dl",
            pins=random_pins(Random(self.pins), args[1], self.mesh) if self.pins else {},
        )  # fmt: skip
        budget = TIGHT * plan.peak_bytes if self.squeezed else 0.0
        if budget:
            with contextlib.suppress(jaxplan.NothingFits):
                plan = plan.replan(memory_budget=budget)
                assert plan.peak_bytes <= budget
        return plan


def random_pins(random: Random, inputs: Mapping[str, np.ndarray], mesh: tuple[int, ...]) -> dict[str, PartitionSpec]:
    """Legal layouts for some of the inputs: each mesh axis on any dimension that it divides, or on none."""
    pins = {}
    for name, array in inputs.items():
        parts: list[list[str]] = [[] for _ in array.shape]
        left = list(array.shape)
        for axis, size in zip("xyz", mesh):
            dim = random.randint(-1, array.ndim - 1)
            if dim >= 0 and left[dim] % size == 0:
                parts[dim].append(axis)
                left[dim] //= size
        if random.random() < 0.5:
            pins[f"inputs/{name}"] = PartitionSpec(*(tuple(axes) or None for axes in parts))
    return pins


def draw_case(random: Random, mesh: Sequence[int]) -> tuple[Program, Setting]:
    """A program and what to plan it for."""
    program = draw_program(random)
    machine, anywhere = random.randrange(len(MACHINES)), random.choice((0, 0, 1, 2))
    pins, donate = random.choice((0, 0, 1, 2)), random.random() < 0.5
    squeezed = not anywhere and random.random() < 0.2
    return program, Setting(tuple(mesh), machine, anywhere, pins, donate, squeezed)


def random_case(seed: int) -> tuple[Program, Setting]:
    """Case number `seed`; meshes take turns."""
    return draw_case(Random(seed), MESHES[seed % len(MESHES)])


# --- what is asked of a plan -------------------------------------------------------------------------------------------------


def specs_of(plan: jaxplan.Plan) -> list[PartitionSpec]:
    """Of inputs and outputs."""
    return jax.tree.leaves((plan.in_specs, plan.out_specs), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def assert_legal(spec: Sequence[Any], shape: Sequence[int], sizes: Mapping[Any, int]) -> None:
    """Every axis at most once, every sharded dimension divisible. `sizes`: of the axes, by name or by number."""
    entries = [() if entry is None else entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    axes = [axis for entry in entries for axis in entry]
    assert len(set(axes)) == len(axes), (spec, shape)
    assert len(entries) <= len(shape), (spec, shape)
    for size, entry in zip(shape, entries):
        assert size % math.prod(sizes[axis] for axis in entry) == 0, (spec, shape)


def assert_plan_is_legal(plan: jaxplan.Plan) -> None:
    """The layouts of inputs, of outputs, of what operators read and write, and those passed through on the way."""
    for spec, aval in zip(specs_of(plan), [*plan.traced.in_avals, *plan.traced.out_avals], strict=True):
        assert_legal(spec, aval.shape, plan.axis_sizes)
    graph, sizes = plan.modelled.graph, dict(enumerate(plan.axis_sizes.values()))
    for table, side in ((plan.constraints.reads, "operands"), (plan.constraints.writes, "results")):
        for (operator, slot), specs in table.items():
            shape = graph.tensors[getattr(graph.operators[operator], side)[slot]].shape
            for spec in specs:
                assert len(spec) == len(shape), (graph.operators[operator].name, side, spec, shape)
                assert_legal(spec, shape, sizes)


def differences(want: Any, got: Any, types: Sequence[Type], slack: Sequence[float] | None = None) -> str:
    """What differs by more than rounding, or "". Values known to be exact must be equal; float32 sums may be re-ordered (1e-7 a
    step, a few hundred terms, a dozen steps); bfloat16 has three digits, and compilers keep more of them here than there."""
    for k, (a, b, type) in enumerate(zip(jax.tree.leaves(want), jax.tree.leaves(got), types, strict=True)):
        a, b = np.asarray(a), np.asarray(b)
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {k}: {a.dtype}{a.shape} became {b.dtype}{b.shape}"
        if type.exact:
            if not np.array_equal(a, b):
                return f"output {k} {type}: {np.sum(a != b)} of {a.size} exact values differ"
            continue
        a, b = a.astype(np.float64), b.astype(np.float64)
        rtol, atol = (6e-2, 6e-2) if type.coarse else (2e-4, 2e-5)
        atol = atol * max(1.0, np.abs(a).max(initial=0)) + (slack[k] if slack else 0.0)
        if not np.allclose(b, a, rtol=rtol, atol=atol, equal_nan=True):
            return f"output {k} {type}: off by up to {np.nanmax(np.abs(a - b)):.3g}, largest value {np.abs(a).max():.3g}"
    return ""


def unplanned(fn: Callable[..., Any], args: Any) -> Any:
    """The program's own results; operation by operation where its compiled form cannot run (XLA's CPU runtime refuses Fourier
    transforms whose operand it laid out itself: seen with jaxlib 0.10)."""
    try:
        return jax.device_get(jax.jit(fn)(*args))
    except jax.errors.JaxRuntimeError:
        return fn(*jax.tree.map(jnp.asarray, args))


def wrong_values(program: Program, plan: jaxplan.Plan) -> str:
    """What the planned program computes differently, or ""."""
    fn, args = build(program)
    want, got = unplanned(fn, args), plan.jit()(*args)
    found = differences(want, got, program.output_types)
    if found:  # where operation by operation differs from jit as well, rounding is amplified: that much is nobody's error
        eager = fn(*jax.tree.map(jnp.asarray, args))
        pairs = zip(jax.tree.leaves(want), jax.tree.leaves(eager))
        slack = [8 * float(np.abs(np.float64(a) - np.float64(b)).max(initial=0)) for a, b in pairs]
        found = differences(want, got, program.output_types, slack)
    return found


def check(program: Program, setting: Setting) -> None:
    """All that is asked of one plan."""
    plan = setting.plan(program)
    assert_plan_is_legal(plan)
    assert specs_of(setting.plan(program)) == specs_of(plan)
    assert str(plan)
    assert not (wrong := wrong_values(program, plan)), wrong


def failure_of(program: Program, setting: Setting) -> str:
    """What is wrong, or ""."""
    try:
        check(program, setting)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    return ""


def shrunk(program: Program, setting: Setting, found: str) -> Program:
    """A small program that fails in the same way."""

    def kind(text: str) -> list[str]:
        return [word for word in text.split() if word.isalpha()][:8]

    return shrink(program, lambda less: kind(failure_of(less, setting)) == kind(found))


# --- the tests ---------------------------------------------------------------------------------------------------------------

cases = st.builds(draw_case, st.randoms(use_true_random=False), st.sampled_from(MESHES))


@settings(max_examples=30, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(cases)
def test_planned_programs_are_the_programs(case: tuple[Program, Setting]) -> None:
    check(*case)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(BLOCKS))
def test_a_block_of_random_programs(block: int) -> None:
    """Every failure is shown, made small."""
    failures = []
    for seed in range(BLOCK * block, BLOCK * (block + 1)):
        program, setting = random_case(seed)
        if found := failure_of(program, setting):
            failures.append(f"seed {seed}, {setting}: {found}\n{shrunk(program, setting, found)}")
    jax.clear_caches()
    assert not failures, "\n\n".join(failures)


PRINT_SPECS = """
import sys, conftest, test_random_programs as tests
for seed in range(int(sys.argv[1])):
    program, setting = tests.random_case(seed)
    print(tests.specs_of(setting.plan(program)))
"""


def specs_elsewhere(count: int, hash_seed: int) -> str:
    """The specs of the first cases, as planned by another process."""
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PRINT_SPECS, str(count)], env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.parametrize("count", [5, pytest.param(500, marks=pytest.mark.slow)])
def test_plans_do_not_hang_on_the_order_of_hashes(count: int) -> None:
    """The same specs in processes whose strings hash differently."""
    found = specs_elsewhere(count, 1)
    assert found == specs_elsewhere(count, 2)
    assert found.count("'x'") >= count


# --- the tests can fail ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "shape"), [(("x", "x"), (8, 8)), (("y", "x"), (8, 6)), ((("x", "y"),), (4,)), ((None, "x"), (4,))]
)
def test_an_illegal_spec_is_caught(spec, shape):
    with pytest.raises(AssertionError):
        assert_legal(spec, shape, {"x": 4, "y": 2})


@pytest.mark.parametrize(("grain", "off"), [(3, 2.0**-20), (None, 1e-3)])
def test_a_wrong_value_is_caught(grain, off):
    value = np.linspace(0, 1, 4, dtype=np.float32)
    assert not differences([value], [value], [Type((4,), "float32", 2.0, grain)])
    assert "output 0" in differences([value], [value + np.float32(off)], [Type((4,), "float32", 2.0, grain)])


@pytest.mark.slow
def test_a_wrong_operation_is_found_and_made_small(monkeypatch):
    bind = _jax.bind

    def wrong(equation: Any, values: list[Any], devices: int, changed: Any = None) -> list[Any]:
        outs = bind(equation, values, devices, changed)
        return [out + out for out in outs] if equation.primitive.name == "dot_general" else outs

    monkeypatch.setattr(_jax, "bind", wrong)
    program, setting = next(case for case in map(random_case, range(100)) if failure_of(*case))
    small = shrunk(program, setting, failure_of(program, setting))
    assert len(small.steps) < len(program.steps) and len(small.outputs) == 1
    assert "dot_general" in str(jax.make_jaxpr(build(small)[0])(*build(small)[1]))
