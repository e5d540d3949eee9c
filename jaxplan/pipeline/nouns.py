"""The nouns of room `pipeline`: a `Pipeline` over one mesh axis, its `Chain`s of layers, and the `Role` of each value.

A chain is a scan over layers. A train step is traced after differentiation, so it has (at least) two: a forward scan, and a
backward one that runs from the last layer to the first. Both have the same layers on the same stages.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, NamedTuple

Path = tuple[Any, ...]
"""Where a scan stands in the program, as in `jaxplan.graph.Operator.path`: equation numbers from the outermost jaxpr inwards."""

SCHEDULES = ("gpipe", "1f1b")
"""`gpipe`: all micro-batches forward, then all backward. `1f1b`: every stage alternates between one forward and one backward, and
keeps the residuals of at most 2 * stages - 1 micro-batches."""


class PipelineError(ValueError):
    """A program, or a part of it, that cannot run in stages. The message says which operator of which line, and why."""


class Kind(enum.Enum):
    """How a value of a chain's body depends on the micro-batch."""

    SAME = "same"  # the same for every micro-batch: parameters, keys, masks, counters
    CUT = "cut"  # rows of the batch: a micro-batch has its own
    SUM = "sum"  # a sum over the rows: a micro-batch has its part, and the parts add up
    TOTAL = "total"  # a carry that every layer only adds to: each stage keeps what its layers and micro-batches add


class Role(NamedTuple):
    """Of a value that is CUT: `dim` holds the rows, and `stride` elements of it lie between one row and the next (1, unless rows
    and something else were merged into one dimension). Micro-batch j of m has every m-th row, from row j on: so each has rows of
    every shard where the batch is laid along another axis. `dim` is of the body's value, without the layers."""

    kind: Kind
    dim: int = -1
    stride: int = 1

    def __str__(self) -> str:
        return f"cut({self.dim})" if self.kind is Kind.CUT else self.kind.value


@dataclass(frozen=True)
class Chain:
    """A scan over layers, and where each of its layers runs.

    `path`: of the scan. `reverse`: it runs from the last layer to the first, so from the last stage to the first. `layers`: how
    many layers each stage has, in the order of layers. `consts`, `carries`, `xs`: the roles of the body's inputs (constants,
    loop carries, values stacked over layers); `ys`: of its outputs that are stacked over layers. `rows`: of the batch.
    """

    path: Path
    reverse: bool
    layers: tuple[int, ...]
    consts: tuple[Role, ...]
    carries: tuple[Role, ...]
    xs: tuple[Role, ...]
    ys: tuple[Role, ...]
    rows: int

    def __post_init__(self) -> None:
        if any(count < 1 for count in self.layers):
            raise ValueError(
                f"{self.length} layers cannot be laid over {len(self.layers)} stages as {self.layers}: every stage needs one"
            )
        if not any(role.kind is Kind.CUT for role in self.carries):
            raise ValueError(f"a chain carries rows of the batch from layer to layer, and none of {self.carries} does")

    @property
    def length(self) -> int:
        """Layers of all stages."""
        return sum(self.layers)

    @property
    def even(self) -> bool:
        """Whether all stages have as many layers."""
        return min(self.layers) == max(self.layers)

    @property
    def circulating(self) -> tuple[int, ...]:
        """The carries that go from stage to stage with every micro-batch: all but those that stages add up by themselves."""
        return tuple(k for k, role in enumerate(self.carries) if role.kind is not Kind.TOTAL)


@dataclass(frozen=True)
class Pipeline:
    """A mesh axis laid along the layers. `stages`: its size. `chains`: the scans that run in stages, in program order. `middle`:
    the numbers of the equations, beside the two scans, that each micro-batch has for itself under `1f1b`.

    Raises ValueError for a single stage, an unknown schedule, chains that do not have the same number of stages, and numbers of
    micro-batches that do not divide the batch.
    """

    axis: str
    stages: int
    microbatches: int
    schedule: str
    chains: tuple[Chain, ...]
    middle: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.stages < 2:
            raise ValueError(f"a pipeline over the axis {self.axis!r} of size {self.stages} has one stage: it takes at least two")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r}; it may be {' or '.join(map(repr, SCHEDULES))}")
        if self.microbatches < 1:
            raise ValueError(f"microbatches={self.microbatches}; at least 1")
        if not self.chains:
            raise ValueError("a pipeline has at least one chain of layers")
        for chain in self.chains:
            if len(chain.layers) != self.stages:
                raise ValueError(f"{chain.layers} gives the layers of {len(chain.layers)} stages; there are {self.stages}")
            if chain.rows % self.microbatches:
                raise ValueError(f"{self.microbatches} micro-batches do not divide the batch of {chain.rows} rows")

    @property
    def ticks(self) -> int:
        """Steps of one chain under `gpipe`: a micro-batch enters at each, and the last one has `stages` to pass."""
        return self.microbatches + self.stages - 1

    @property
    def bubble(self) -> float:
        """By how much the time of a chain is longer than if all stages worked all the time: (m + k - 1) / m."""
        return self.ticks / self.microbatches

    def chain_at(self, path: Path) -> Chain | None:
        """The chain whose scan stands at a path, if any."""
        return next((chain for chain in self.chains if chain.path == path), None)


def even_layers(length: int, stages: int) -> tuple[int, ...]:
    """Layers per stage, as equal as can be, the longer stages first. Raises ValueError for more stages than layers."""
    if stages > length:
        raise ValueError(f"{length} layers cannot be laid over {stages} stages: every stage needs at least one")
    each, more = divmod(length, stages)
    return (each + 1,) * more + (each,) * (stages - more)
