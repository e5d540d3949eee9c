"""The best stages of unlike layers along a mesh axis: how many micro-batches, where to cut, and a plan of each stage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxplan.budget import NothingFits
from jaxplan.hybrid import counts
from jaxplan.pipeline.nouns import PipelineError
from jaxplan.plan import Plan
from jaxplan.report import show_bytes
from jaxplan.search.chain import chain_seconds, cut_chain
from jaxplan.trace import Traced
from jaxplan.unlike.analysis import micro_of
from jaxplan.unlike.cuts import possible_cuts, runs_of, seconds_by
from jaxplan.unlike.flat import flat
from jaxplan.unlike.holding import Holding, holding
from jaxplan.unlike.nouns import Micro, Parts, UnlikePipeline
from jaxplan.unlike.parts import parts_of
from jaxplan.unlike.run import stage_mesh
from jaxplan.unlike.stage import StageProgram, loop_of, stage_program

Planner = Callable[[Traced, Any, float], Plan]
"""(program, mesh, bytes per device) -> its best plan."""

PROBES = (2, 3, 5, 7)
"""Micro-batches with which the rows of the batch are looked for, where nobody says how many there shall be."""
MOST_TRIED = 3
"""Numbers of micro-batches for which the uncut program is planned."""


@dataclass(frozen=True, eq=False)
class Stagewise:
    """A program in stages of unlike layers. `link`: (seconds per byte, seconds per message) between stages. `plans`: of each
    stage's program, on its own devices."""

    parts: Parts
    programs: tuple[StageProgram, ...]
    plans: tuple[Plan, ...]
    link: tuple[float, float]
    axis: str

    @property
    def pipeline(self) -> UnlikePipeline:
        """What it is called."""
        ends = (-1, *self.parts.cuts, len(self.parts.micro.forward) - 1)
        places = tuple([b - a for a, b in itertools.pairwise(ends)])
        return UnlikePipeline(self.axis, len(self.plans), self.microbatches, "1f1b", (), (), places)

    @property
    def microbatches(self) -> int:
        """How many."""
        return self.parts.micro.microbatches

    def inside(self, stage: int) -> frozenset[int]:
        """The clusters of a stage's plan that every micro-batch has for itself."""
        graph, number = self.plans[stage].modelled.graph, loop_of(self.programs[stage]).number
        last = [graph.operators[c.members[-1]].path if c.members else () for c in graph.clusters]
        return frozenset([index for index, path in enumerate(last) if path[:1] == (number,) and len(path) > 1])

    @cached_property
    def work(self) -> tuple[tuple[float, float], ...]:
        """Per stage, modelled seconds: (of one micro-batch, forward and backward; of what runs once)."""
        found = []
        for stage, plan in enumerate(self.plans):
            inside = self.inside(stage)
            table = seconds_by(plan, lambda index, inside=inside: index in inside)
            found.append((table.get(True, 0.0) / self.microbatches, table.get(False, 0.0)))
        return tuple(found)

    def sent(self, stage: int) -> tuple[float, int, float, int]:
        """What a stage is sent: (bytes per device and micro-batch, arrays; bytes per device at the end, arrays)."""
        plan, program = self.plans[stage], self.programs[stage]
        first = len(program.state) + len(program.given)
        held = [plan.input_bytes(k) for k in range(first, len(program.arguments))]
        rows, late = held[: len(program.received)], held[len(program.received) :]
        copied = [plan.input_bytes(k) for k in range(len(program.state), first) if self._is_copy(stage, program.arguments[k])]
        return sum(rows) / self.microbatches, len(rows), sum(late) + sum(copied), len(late) + len(copied)

    def _is_copy(self, stage: int, var: Any) -> bool:
        """Whether an input lies on another stage."""
        inputs = self.parts.micro.jaxpr.invars
        return var in inputs and self.parts.homes[inputs.index(var)] != stage

    @cached_property
    def seconds(self) -> float:
        """Modelled seconds of a call: the slowest stage m - 1 times, every stage and what it is sent once, and the longest of
        what runs once."""
        times, once = self.times()
        return max(once) + sum(times) + (self.microbatches - 1) * max(times)

    def times(self) -> tuple[list[float], list[float]]:
        """Per stage, modelled seconds with what it is sent: (of one micro-batch; of what runs once)."""
        g, latency = self.link
        sent = [self.sent(stage) for stage in range(len(self.plans))]
        times = [work + nbytes * g + count * latency for (work, _), (nbytes, count, _, _) in zip(self.work, sent, strict=True)]
        once = [work + nbytes * g + count * latency for (_, work), (_, _, nbytes, count) in zip(self.work, sent, strict=True)]
        return times, once

    @property
    def idle(self) -> float:
        """The share of the stages' time in which they wait, of the time in which micro-batches pass."""
        times, _ = self.times()
        total = sum(times) + (self.microbatches - 1) * max(times)
        return 1 - self.microbatches * sum(times) / (len(times) * total) if total else 0.0

    @cached_property
    def held(self) -> tuple[Holding, ...]:
        """Per stage, what it holds and when."""
        return tuple([holding(self.parts.micro, *pair) for pair in zip(self.programs, self.plans, strict=True)])

    def peak(self, stage: int) -> float:
        """Modelled peak of live bytes per device of a stage, its parts run in 1F1B order."""
        return self.held[stage].peak(stage, len(self.plans), self.microbatches)

    @cached_property
    def peaks(self) -> tuple[float, ...]:
        """Of every stage."""
        return tuple([self.peak(stage) for stage in range(len(self.plans))])


@dataclass(frozen=True)
class Asked:
    """What stages are wanted for. `axis`: of `mesh`; `ties`: (output, input) positions of state that goes round; `link`: as in
    `Stagewise`; `budget`: bytes per device; `ceiling`: seconds of a call from which on they are of no use;
    `squeezed`: how many times the budget a stage may take to be planned again within it."""

    traced: Traced
    ties: Sequence[tuple[int, int]]
    mesh: Any
    axis: str
    link: tuple[float, float]
    microbatches: int | None
    budget: float
    planner: Planner
    ceiling: float = math.inf
    squeezed: float = math.inf

    @property
    def stages(self) -> int:
        """The size of the axis."""
        return dict(self.mesh.shape)[self.axis]


def stagewise(asked: Asked) -> Stagewise:
    """The fastest stages of a program whose layers differ.

    The uncut program is planned on the devices of one stage, for a few numbers of micro-batches; dynamic programming over what
    its parts then take finds the cuts (`search.chain`); each stage is planned. Raises PipelineError, naming operator and line,
    where micro-batches cannot be had, for too few places to cut, and where the ceiling is not reached; NothingFits.
    """
    program = flat(asked.traced)
    found: list[tuple[float, Micro, tuple[int, ...]]] = []
    problems: list[ValueError] = []
    for m in _microbatches(program, asked):
        try:
            found.append(_cut(asked, micro_of(program, m)))
        except ValueError as error:
            problems.append(error)
        if found and min(seconds for seconds, _, _ in found) >= asked.ceiling:
            break
    if not found:
        raise problems[0]
    seconds, micro, cuts = min(found, key=lambda one: one[0])
    if seconds >= asked.ceiling:
        raise PipelineError(f"stages along {asked.axis!r} would take {seconds:g} s of at most {asked.ceiling:g}")
    return _planned(asked, micro, cuts)


def _microbatches(program: Traced, asked: Asked) -> list[int]:
    """Numbers of micro-batches worth trying; those near four for every stage first."""
    if asked.microbatches is not None:
        return [asked.microbatches]
    error: PipelineError | None = None
    for probe in PROBES:
        try:
            rows = micro_of(program, probe).rows
        except PipelineError as found:
            error = error or found
        else:
            tried = counts(rows, asked.stages)
            return sorted(tried, key=lambda m: abs(math.log2(m / (4 * asked.stages))))[:MOST_TRIED]
    raise error or PipelineError(f"{program.name} has no rows to cut")


def _cut(asked: Asked, micro: Micro) -> tuple[float, Micro, tuple[int, ...]]:
    """(seconds of a call, about; the program; the best cuts)."""
    ends = possible_cuts(micro)
    if len(ends) < asked.stages - 1:
        places = f"{len(ends)} place" + ("s" if len(ends) != 1 else "")
        raise PipelineError(
            f"pipeline={asked.axis!r}: {asked.stages} stages, and {micro.traced.name} can be cut in {places} only; take an axis "
            f"of at most {len(ends) + 1}"
        )
    whole = stage_program(parts_of(micro, (), asked.ties), 0)
    plan = asked.planner(whole.traced, stage_mesh(asked.mesh, asked.axis, 0), math.inf)
    runs = runs_of(micro, whole, plan, asked.link, ends)
    try:
        last = cut_chain(runs, asked.stages, micro.microbatches, asked.budget)
    except ValueError:  # by this estimate nothing fits: let the stages' own plans tell
        last = cut_chain(runs, asked.stages, micro.microbatches)
    return chain_seconds(runs, last, micro.microbatches), micro, tuple([ends[end - 1] for end in last[:-1]])


def _planned(asked: Asked, micro: Micro, cuts: Sequence[int]) -> Stagewise:
    """Every stage planned, within the budget."""
    parts = parts_of(micro, cuts, asked.ties)
    programs = tuple([stage_program(parts, stage) for stage in range(asked.stages)])
    meshes = [stage_mesh(asked.mesh, asked.axis, stage) for stage in range(asked.stages)]
    plans = [asked.planner(program.traced, mesh, math.inf) for program, mesh in zip(programs, meshes, strict=True)]
    found = Stagewise(parts, programs, tuple(plans), asked.link, asked.axis)
    for stage, peak in enumerate(found.peaks):
        if peak > asked.squeezed * asked.budget:
            raise _too_large(asked, stage, peak)
        if peak > asked.budget:
            beside = peak - plans[stage].peak_bytes
            try:
                plans[stage] = asked.planner(programs[stage].traced, meshes[stage], asked.budget - beside)
            except NothingFits as error:
                raise _too_large(asked, stage, error.smallest + beside) from None
    found = Stagewise(parts, programs, tuple(plans), asked.link, asked.axis)
    worst = max(found.peaks)
    if worst > asked.budget:
        raise _too_large(asked, found.peaks.index(worst), worst)
    return found


def _too_large(asked: Asked, stage: int, peak: float) -> NothingFits:
    return NothingFits(
        f"nothing fits: stage {stage} of {asked.stages} along {asked.axis!r}, cut where it is fastest, takes {show_bytes(peak)} "
        f"per device, and the budget is {show_bytes(asked.budget)}. What would help: more micro-batches; more devices along "
        "any axis",
        peak,
    )
