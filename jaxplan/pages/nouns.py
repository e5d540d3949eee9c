"""What a page shows: values made from a plan, or from a saved one, that know no HTML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Dim = tuple[str, tuple[int, ...]]
"""A dimension: its name, and the numbers of the mesh axes that split it."""


@dataclass(frozen=True)
class AxisView:
    """One mesh axis. `roles`: what the field would call its work; `link`: how fast it is, as text."""

    name: str
    size: int
    roles: tuple[str, ...]
    sent_bytes: float
    link: str = ""


@dataclass(frozen=True)
class ExchangeView:
    """Collectives that are alike: `nbytes` per device and `seconds`, of all `times` together."""

    kind: str
    axes: tuple[str, ...]
    tensor: str
    operator: str
    source: str
    times: float
    nbytes: float
    seconds: float


@dataclass(frozen=True)
class StepView:
    """Operators that are laid out as one. `dims`: of what they make; `splits`: (axis number, the dimension that it splits);
    `lanes`: what the lines beside it do: "start", "end", "pass", "both" or ""; `exchanges`: what has to move before or after."""

    name: str
    source: str
    members: int
    seconds: float
    dims: tuple[Dim, ...]
    splits: tuple[tuple[int, str], ...]
    exchanges: tuple[ExchangeView, ...]
    reads: tuple[str, ...] = ()
    lanes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """Steps one after the other. `times`: how often a loop runs them; `alike`: how many blocks of the program look like this one,
    of which it is the first; `part`: which part of a long block this is."""

    steps: tuple[StepView, ...]
    times: float = 1.0
    alike: int = 1
    part: int = 1


@dataclass(frozen=True)
class LineView:
    """Seconds per call that a source line costs: of work, and of exchanges."""

    source: str
    work: float
    exchange: float


@dataclass(frozen=True)
class InputView:
    """Inputs that are alike: `count` of them; `nbytes`: per device, of each."""

    path: str
    kind: str
    dims: tuple[Dim, ...]
    count: int
    nbytes: float


@dataclass(frozen=True)
class SweepView:
    """Plans at several values of something. `label`: "B"; points: (what it is at, seconds, bytes sent, peak, what is done)."""

    label: str
    points: tuple[tuple[str, float, float, float, str], ...]
    here: int = 0


@dataclass(frozen=True)
class Picture:
    """A plan as a page shows it. `memory`: bytes per device over the step, evenly spaced, and `moments` what ran there; () where
    only the traced program could tell; `fixed_bytes`: what lives all the time, not in it. `notes`: what is missing, and why."""

    function: str
    machine: str
    axes: tuple[AxisView, ...]
    seconds: float
    exchange_seconds: float
    peak_bytes: float
    kinds: Mapping[str, float]
    inputs: tuple[InputView, ...]
    blocks: tuple[Block, ...]
    exchanges: tuple[ExchangeView, ...]
    lines: tuple[LineView, ...]
    memory: tuple[float, ...] = ()
    moments: tuple[str, ...] = ()
    fixed_bytes: float = 0.0
    live: tuple[tuple[str, str, float], ...] = ()
    sweep: SweepView | None = None
    notes: tuple[str, ...] = ()
    about: Mapping[str, str] = field(default_factory=dict)
