"""The noun of room `files`: a `SavedPlan`, everything of a plan that can be written down. Needs no JAX and no function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from jaxplan.machine import Machine

VERSION = 2
"""Of the format. A file of a later version is refused by name; a change that older readers would misread takes a new number.
2: numbers inside of names fold too, "Block_{0-11}/kernel"; read as 1 is."""

Entries = tuple[str | tuple[str, ...] | None, ...]
"""A PartitionSpec written down: per dimension None, an axis, or several axes, major to minor."""


class PlanFileError(ValueError):
    """A plan file that cannot be read, or that is not about the function it is loaded for. The message says which and why."""


@dataclass(frozen=True)
class Axis:
    """One mesh axis. `kind`: "auto", "explicit" or "manual". `roles`: what the report calls its work. `sent_bytes`: per device
    and call."""

    name: str
    size: int
    kind: str
    roles: tuple[str, ...]
    sent_bytes: float


@dataclass(frozen=True)
class Leaf:
    """One array among inputs or outputs. `bytes`: per device; `dims`: names of its dimensions ("B"), if known; `donated`: an
    input whose buffer may be reused. `stage`: on whose devices it lies, where stages have sub-meshes of their own."""

    dtype: str
    shape: tuple[int, ...]
    spec: Entries
    bytes: float
    dims: tuple[str, ...] = ()
    donated: bool = False
    stage: int | None = None

    @property
    def kind(self) -> str:
        """float32[128,64]."""
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class SavedExchange:
    """Collectives that are alike. `times`: in one call; `bytes`, by axis, and `seconds`: of all times together."""

    kind: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    operator: str
    source: str
    times: float
    bytes: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Primitives:
    """Equations of one primitive. `digest`: of their parameters, shapes and dtypes, in any order."""

    count: int
    digest: str


@dataclass(frozen=True)
class Program:
    """What was traced: a hash of it, and a tally by primitive, to say what changed."""

    fingerprint: str
    primitives: Mapping[str, Primitives]


class Split(NamedTuple):
    """The choice of one cluster of operators. `operator`: the last primitive of it; `factors`: (axis, the factor that it splits,
    -2 where it adds partial sums); `scatters`: (axis, the factor over which what is summed is scattered, -2 where it is left a
    partial sum)."""

    operator: str
    factors: tuple[tuple[str, int], ...]
    scatters: tuple[tuple[str, int], ...]

    def factor(self, axis: str) -> int:
        """The factor that an axis splits, or -1."""
        return dict(self.factors).get(axis, -1)

    def scatter(self, axis: str) -> int:
        """The factor that an axis scatters what is summed over, or -1."""
        return dict(self.scatters).get(axis, -1)


@dataclass(frozen=True)
class Asked:
    """What was asked for. `search`: the name of one, or None if it was a callable. `memory_budget`: bytes, "16GiB", "unlimited"
    or None. `dims`: {input path: names of its dimensions}. `pipeline`: "auto", an axis or None."""

    search: str | None
    memory_budget: float | str | None
    pins: Mapping[str, Entries]
    while_trips: float
    certify: bool | float
    dims: Mapping[str, str]
    pipeline: str | None = "auto"
    microbatches: int | None = None


@dataclass(frozen=True)
class Cost:
    """Modelled seconds of one call. `work_seconds` + `exchange_seconds` = `seconds`; `bound`: a proven lower bound, or None."""

    seconds: float
    work_seconds: float
    exchange_seconds: float
    bound: float | None


@dataclass(frozen=True)
class Live:
    """Tensors alike that live at the worst moment. `name`: the path of an argument or result, else the operator that makes it;
    `source`: the line that wrote that operator, or ""; `bytes`: per device, of each."""

    kind: str
    name: str
    source: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    bytes: float


@dataclass(frozen=True)
class Ledger:
    """Modelled bytes per device: arguments, outputs that are no argument's own buffer, and what lives besides at the worst
    moment; together the peak. `live`: the largest of what lives besides."""

    argument_bytes: float
    output_bytes: float
    temporary_bytes: float
    peak_bytes: float
    kinds: Mapping[str, float]
    live: tuple[Live, ...]


class SavedChain(NamedTuple):
    """A scan that runs in stages: where it stands in the program, and how many layers each stage has."""

    path: tuple[int, ...]
    layers: tuple[int, ...]


@dataclass(frozen=True)
class SavedPipeline:
    """The mesh axis that is laid along layers. What each value is to a micro-batch is found again in the program."""

    axis: str
    microbatches: int
    schedule: str
    chains: tuple[SavedChain, ...]

    def __str__(self) -> str:
        layers = ", ".join("+".join(map(str, chain.layers)) for chain in self.chains)
        return f"{self.schedule} over {self.axis}, {self.microbatches} micro-batches, layers {layers}"


@dataclass(frozen=True)
class SavedStage:
    """One stage on a sub-mesh of its own. `fingerprint`: of its program; `splits`: of every cluster of its operators."""

    fingerprint: str
    splits: tuple[Split, ...]


@dataclass(frozen=True)
class SavedStages:
    """Stages of unlike layers. `cuts`: the last of the forward equations of each stage but the last. What else belongs to a
    stage is found again in the program."""

    axis: str
    microbatches: int
    cuts: tuple[int, ...]
    programs: tuple[SavedStage, ...]

    def __str__(self) -> str:
        count = f"{len(self.programs)} stages of unlike layers on sub-meshes"
        return f"{count} over {self.axis}, {self.microbatches} micro-batches, cut behind {', '.join(map(str, self.cuts))}"


@dataclass(frozen=True)
class SavedPlan:
    """A plan written down.

    `versions`: of jaxplan and jax, that made it. `unknown`: primitives without a rule. `inputs`, `outputs`: by pytree path.
    `exchanges`: costliest first. `splits`: the choice of every cluster of operators, in program order. `stages`: where they are
    programs of their own; `splits` are then of the program without them. `axis_order`: the axes in the order in which they
    stand where they share a dimension; () for that of the mesh.
    """

    function: str
    versions: Mapping[str, str]
    mesh: tuple[Axis, ...]
    machine: Machine
    asked: Asked
    program: Program
    unknown: tuple[str, ...]
    inputs: Mapping[str, Leaf]
    outputs: Mapping[str, Leaf]
    cost: Cost
    memory: Ledger
    exchanges: tuple[SavedExchange, ...]
    splits: tuple[Split, ...]
    pipeline: SavedPipeline | None = None
    stages: SavedStages | None = None
    axis_order: tuple[str, ...] = ()

    @property
    def major_first(self) -> tuple[str, ...]:
        """The axes in the order in which they stand where they share a dimension."""
        return self.axis_order or tuple(self.mesh_shape)

    @property
    def mesh_shape(self) -> dict[str, int]:
        """{axis: size}."""
        return {axis.name: axis.size for axis in self.mesh}

    @property
    def wire_bytes(self) -> float:
        """Bytes sent per device and call, over all axes."""
        return sum(axis.sent_bytes for axis in self.mesh)
