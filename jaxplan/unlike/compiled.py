"""The parts of a program in stages, compiled one by one without being run: what they exchange, and what a stage then holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxplan.unlike.holding import Holding
from jaxplan.unlike.nouns import BACKWARD, FORWARD, PREPARE, UPDATE
from jaxplan.unlike.run import StagedRun


@dataclass(frozen=True)
class CompiledPart:
    """One part of a stage. `times`: how often it runs in a call; `nbytes`: per device, what it takes beside what it is given, of
    which `kept` are results. `lowered`: the same before it was compiled."""

    phase: str
    times: int
    program: jax.stages.Compiled
    nbytes: float
    kept: float
    lowered: jax.stages.Lowered


@dataclass(frozen=True)
class CompiledStage:
    """One stage: its parts; what it holds and when; the bytes per device that it is sent: (per micro-batch, at the end)."""

    parts: tuple[CompiledPart, ...]
    held: Holding
    sent: tuple[float, float]


@dataclass(frozen=True)
class LoweredStages:
    """What lowering a function in stages gives: a program per part of every stage (`stages`)."""

    name: str
    microbatches: int
    stages: tuple[CompiledStage, ...]

    def as_text(self) -> str:
        """The lowered programs, one after another, each under a line that says whose it is and how often it runs in a call."""
        return self._texts(lambda part: part.lowered.as_text())

    def compile(self) -> CompiledStages:
        """The compiled programs."""
        return CompiledStages(self.name, self.microbatches, self.stages)

    def _texts(self, text: Callable[[CompiledPart], str]) -> str:
        found = []
        for number, stage in enumerate(self.stages):
            for part in stage.parts:
                times = "once" if part.times == 1 else f"{part.times} times"
                found += [f"// {self.name}, stage {number}, {part.phase}: {times} in a call", text(part)]
        return "\n".join(found)


@dataclass(frozen=True)
class CompiledStages(LoweredStages):
    """The same, compiled. It is run by the function that was lowered."""

    def as_text(self) -> str:
        """The optimized HLO of every part, each under a line that says whose it is and how often it runs in a call."""
        return self._texts(lambda part: part.program.as_text() or "")

    @property
    def peak_bytes(self) -> tuple[float, ...]:
        """Per stage, the most bytes that a device of it holds in a call: made of what XLA says of every part, and of what lives
        between them."""
        stages = len(self.stages)
        return tuple([stage.held.peak(number, stages, self.microbatches) for number, stage in enumerate(self.stages)])


def compiled_stages(run: StagedRun) -> list[CompiledStage]:
    """Every stage of a program, compiled."""
    return [_Compiling(run, number).stage() for number in range(len(run.stages))]


class _Compiling:
    """One stage. Values are shapes with shardings, named as `StageRun` names them."""

    def __init__(self, run: StagedRun, number: int) -> None:
        self.run, self.own = run, run.stages[number]
        self.parts: list[CompiledPart] = []
        self.env: dict[Any, Any] = {}

    def stage(self) -> CompiledStage:
        own, program = self.own, self.own.program
        m = self.run.parts.micro.microbatches
        for v, aval in zip(program.arguments, own.plan.traced.in_avals, strict=True):
            if v not in program.received:
                self.env[own.inputs[v]] = _shape(aval, own.arguments[v])
        always = self.total([own.inputs[v] for v in (*[v for v, _ in program.state], *program.given)], self.env)
        late = self.total([own.inputs[v] for v in program.late], self.env)
        self.compile(PREPARE, 1, own.first, self.env)
        loop = self.total(own.first.leaves, self.env)

        env = own.entering(self.env)
        stores = own.stores(self.env)
        arriving = {inner: _shape(inner.aval, own.arriving(v)) for v, inner in own.arriving_as.items()}
        env.update({**arriving, **stores, own.row: np.int32(0)})
        arrives = {FORWARD: 0.0, BACKWARD: 0.0}
        for inner in arriving:
            arrives[FORWARD if inner in own.phases[FORWARD].reads else BACKWARD] += self.total([inner], env)
        for phase in (FORWARD, BACKWARD):
            self.compile(phase, m, own.phases[phase], env)
            changed = own.after(own.phases[phase], env)
            env.update(changed)
            stores.update(changed)
        finals = own.finals(stores)
        self.env.update(finals)
        held = worst = self.total(finals, self.env) + late
        for piece in own.updates:
            nbytes = self.compile(UPDATE, 1, piece, self.env)
            worst, held = max(worst, held + nbytes), held + self.parts[-1].kept
        takes: dict[str, float] = dict.fromkeys((PREPARE, FORWARD, BACKWARD), 0.0)
        takes.update((part.phase, part.nbytes) for part in self.parts if part.phase != UPDATE)
        homes = dict(zip(self.run.parts.micro.jaxpr.invars, self.run.parts.homes, strict=True))
        copied = self.total([own.inputs[v] for v in program.given if homes.get(v, program.stage) != program.stage], self.env)
        held = Holding(always, loop, self.total(own.keeps, env), arrives, takes, worst)
        return CompiledStage(tuple(self.parts), held, (sum(arrives.values()), late + copied))

    def compile(self, phase: str, times: int, piece: Any, env: dict[Any, Any]) -> float:
        """Compile a piece for what `env` has; `env` grows by what it leaves. Gives the bytes that it takes."""
        lowered = piece.run.lower(*[env[v] for v in piece.reads])
        compiled = lowered.compile()
        pairs = zip(piece.leaves, lowered.out_info, compiled.output_shardings, strict=True)
        env.update((v, jax.ShapeDtypeStruct(about.shape, about.dtype, sharding=sharding)) for v, about, sharding in pairs)
        found = compiled.memory_analysis()
        kept = float(found.output_size_in_bytes - found.alias_size_in_bytes) if found else 0.0
        nbytes = kept + (found.temp_size_in_bytes if found else 0.0)
        self.parts.append(CompiledPart(phase, times, compiled, nbytes, kept, lowered))
        return nbytes

    def total(self, some: Iterable[Any], env: Mapping[Any, Any]) -> float:
        return float(sum([_nbytes(env[v]) for v in dict.fromkeys(some)]))


def _shape(aval: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)


def _nbytes(value: Any) -> float:
    """Bytes per device."""
    sharding = getattr(value, "sharding", None)
    shape = sharding.shard_shape(value.shape) if sharding is not None else value.shape
    return math.prod(shape) * value.dtype.itemsize
