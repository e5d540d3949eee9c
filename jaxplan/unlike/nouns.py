"""The nouns of room `unlike`: a program that micro-batches can have (`Micro`), and the parts it is cut into (`Part`, `Parts`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxplan.pipeline.nouns import Path, Pipeline, Role
from jaxplan.pipeline.rowwise import Edit
from jaxplan.trace import Traced

SAME, ROWS, ONCE = "same", "rows", "once"
"""What an equation is to a micro-batch: it reads none of its rows; it reads some; it reads sums over all rows, so that it waits
until all micro-batches are through."""

PREPARE, FORWARD, BACKWARD, UPDATE = "prepare", "forward", "backward", "update"
"""The phases of a part. The first and the last run once per call, the other two once per micro-batch."""


@dataclass(frozen=True, eq=False)
class Micro:
    """A flat program, and what of it each of `microbatches` has for itself.

    `kinds`: per equation; "" for those that nothing needs. `roles`: per variable that depends on rows; `edits`: what a
    micro-batch changes of an equation, by path. `forward`: the numbers of the equations that lead from the first layer to the
    last, in order. `places`: per equation that reads rows, where along the forward ones it belongs: a backward equation stands
    where the parameters and residuals that it reads are. `reach`: the last place at which a variable is read on the way forward.
    `rows`: of the batch.
    """

    traced: Traced
    microbatches: int
    rows: int
    kinds: tuple[str, ...]
    roles: Mapping[Any, Role]
    edits: Mapping[Path, Edit]
    forward: tuple[int, ...]
    places: Mapping[int, int]
    reach: Mapping[Any, int]

    @property
    def jaxpr(self) -> Any:
        """The flat program's, open."""
        return self.traced.jaxpr.jaxpr

    @property
    def equations(self) -> Any:
        """All of them."""
        return self.jaxpr.eqns


@dataclass(frozen=True, eq=False)
class Part:
    """What one stage does in one go. `level`: parts of phase "update" wait for those of lower level. `equations`: numbers, in
    order. `reads`, `makes`: variables of the flat program. `adds`: of those it makes, sums over rows, which are added up over
    micro-batches; `puts`: outputs of the program that have rows, which are put in their place in the whole batch."""

    phase: str
    stage: int
    level: int
    equations: tuple[int, ...]
    reads: tuple[Any, ...]
    makes: tuple[Any, ...]
    adds: tuple[Any, ...] = ()
    puts: tuple[Any, ...] = ()

    @property
    def gathers(self) -> tuple[Any, ...]:
        """What it leaves in stores that all micro-batches share."""
        return (*self.adds, *self.puts)


@dataclass(frozen=True, eq=False)
class Parts:
    """A program cut into parts. `cuts`: the last place of each stage but the last. `homes`: per input of the program, the stage
    where it lies; `makers`: per variable that a part makes, the stage; `parts`: in an order in which a single micro-batch could
    run them. `ties`: (output, input) positions of state that goes round."""

    micro: Micro
    cuts: tuple[int, ...]
    homes: tuple[int, ...]
    makers: Mapping[Any, int]
    parts: tuple[Part, ...]
    ties: tuple[tuple[int, int], ...]

    @property
    def stages(self) -> int:
        """How many."""
        return len(self.cuts) + 1

    def of(self, stage: int, phase: str) -> tuple[Part, ...]:
        """The parts of a stage and phase, lower levels first."""
        return tuple([part for part in self.parts if part.stage == stage and part.phase == phase])


@dataclass(frozen=True)
class UnlikePipeline(Pipeline):
    """A pipeline of stages that have programs of their own: it has no chains. `places`: the forward equations of each stage."""

    places: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.stages < 2 or len(self.places) != self.stages or self.chains or self.microbatches < 1:
            raise ValueError(f"{self.stages} stages of {self.places} equations, {self.microbatches} micro-batches: no pipeline")
