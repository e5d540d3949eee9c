"""The nouns of room `graph`: tensors, operators, and the clusters of operators that are laid out as one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from jaxplan import _jax
from jaxplan.layout import PARTIAL
from jaxplan.rules import Rule

Value = TypeVar("Value")

Path = tuple[Any, ...]
"""Where an equation stands: equation indices from the outermost jaxpr inwards, and "branch"/"in"/"out" marks."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A value. `shape` in elements, `itemsize` in bytes."""

    shape: tuple[int, ...]
    dtype: str
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        total = self.itemsize
        for extent in self.shape:
            total *= extent
        return total


class Within(NamedTuple):
    """The equation of a call, loop or branch, and what that stands in."""

    equation: Any
    outer: Within | None


@dataclass(frozen=True)
class Sent:
    """A collective that a program makes itself in a region sharded by hand. `kind`: as of a step of an exchange; over mesh
    `axes`; `nbytes`: of the operand that each device has, of `shape`; `times`: how often each time that the region runs."""

    kind: str
    axes: tuple[str, ...]
    nbytes: int
    shape: tuple[int, ...]
    dtype: str
    times: float
    equation: Any


class Operator(NamedTuple):
    """One equation (or loop boundary, or program input) and its rule.

    `operands`: tensor indices, -1 where the operand is a literal. `results`: tensor indices. `times`: how often it
    runs in one call. `scope`: operators of one loop body (or branch) share a number. `equation`: opaque, for source lines.
    `read_times`: how often each operand is read, where that is not `times` (the far side of a loop's boundary).
    `asked`: per dimension of the result the mesh axes that the program itself asks for, None where it leaves a dimension open.
    `within`: the call, loop or branch that it stands in, and what that stands in: JAX knows no line of what it traced before.
    `sent`: what a region sends that the program shards by hand, and that this is a result of.
    """

    name: str
    rule: Rule
    operands: tuple[int, ...]
    results: tuple[int, ...]
    times: float
    scope: int
    path: Path
    equation: Any = None
    read_times: tuple[float, ...] | None = None
    asked: tuple[tuple[str, ...] | None, ...] | None = None
    within: Within | None = None
    sent: tuple[Sent, ...] = ()

    def source(self) -> tuple[str, int]:
        """The user's (file, line): of the equation, or of the innermost call around it that has one; ("", 0) if none has."""
        found, around = _jax.source_line(self.equation) if self.equation is not None else ("", 0), self.within
        while not found[0] and around is not None:
            found, around = _jax.source_line(around.equation), around.outer
        return found


def constant(operator: Operator, slot: int) -> Hashable:
    """A literal operand; equal ones of one dtype are equal."""
    given = getattr(operator.equation, "invars", ())
    literal = given[slot] if len(given) == len(operator.operands) else None
    value = getattr(literal, "val", None)
    return (str(getattr(literal, "aval", "")), str(value)) if value is not None else (id(operator.equation), slot)


class Terminal(NamedTuple):
    """A tensor that a cluster reads or writes, and per dimension the cluster factor that shards it, or -1."""

    tensor: int
    leads: tuple[int, ...]


class Work(NamedTuple):
    """Local work: `flops` in all, split by the cluster factors in `factors`; `dtype` it computes in; operators doing it."""

    flops: float
    factors: frozenset[int]
    dtype: str
    members: tuple[int, ...]


@dataclass(frozen=True)
class Combine:
    """A member whose result is partial over the factors in `over` until it is combined.

    `scatterable`: a sum that may also be left scattered over a result dimension (a reduce-scatter). `left`: a sum that may also
    be left partial, as all that reads it adds it to others. `over` is `PARTIAL` where what is read is such a sum.
    """

    operator: int
    result: Terminal
    over: frozenset[int]
    scatterable: bool
    left: bool = False


@dataclass(frozen=True)
class Halo:
    """A member that needs `width` of the operand's `extent` elements from its neighbours along cluster factor `factor`.
    `instead`: in the place of its own, so that it is never more than a device has."""

    operator: int
    operand: Terminal
    factor: int
    width: int
    extent: int
    instead: bool = False


EVERY_TICK, GATHERED, LEFT = "at every tick", "gathered", "left"


@dataclass(frozen=True)
class Handed:
    """What a member hands to other stages of a pipeline along cluster factor `factor`: to the next one at every tick; or to all
    of them when all micro-batches are through, what the last stage was left with, or every stage what it has of a stack: `layers`
    such operands, those of the longest stage (of every micro-batch, where they hold its rows). `spared`: ticks at which compilers
    leave out what nobody waits for."""

    operator: int
    operand: Terminal
    factor: int
    how: str = EVERY_TICK
    layers: int = 1
    spared: int = 0

    @property
    def every_tick(self) -> bool:
        return self.how == EVERY_TICK


class Cluster(NamedTuple):
    """Operators that are laid out as one: a mesh axis given to one of its factors splits all of them.

    `units`: per factor, the number that the product of its axes must divide, 0 for no dimension's. `members`: operator indices in
    program order; the last one names it. `read_times`: how often each of `reads` is read.
    `read_shares`, `write_shares`: the share of each terminal's bytes that memory really sees. `apart`: pairs of factors of
    which only one may be given axes. `alike`: clusters of one graph that differ only in which tensors and operators they are
    made of share a number; -1: not known. `handed`: what goes from stage to stage of a pipeline. `slots`: (operator, operand,
    number in `reads`), where members read one tensor in more than one way (as x x^T does). `inner`: values that only members
    read. `sent`: what members send in regions that the program shards by hand.
    """

    members: tuple[int, ...]
    units: tuple[int, ...]
    reads: tuple[Terminal, ...]
    writes: tuple[Terminal, ...]
    work: tuple[Work, ...]
    combines: tuple[Combine, ...]
    halos: tuple[Halo, ...]
    times: float
    read_times: tuple[float, ...]
    read_shares: tuple[float, ...]
    write_shares: tuple[float, ...]
    moves_bytes: bool
    apart: tuple[tuple[int, int], ...] = ()
    alike: int = -1
    handed: tuple[Handed, ...] = ()
    slots: tuple[tuple[int, int, int], ...] = ()
    inner: tuple[Terminal, ...] = ()
    sent: tuple[Sent, ...] = ()

    @property
    def scatters(self) -> bool:
        """Whether a partial sum of this cluster may be scattered instead of reduced."""
        return any(combine.scatterable for combine in self.combines)

    @property
    def alone(self) -> int:
        """The factor that all axes split where one device computes and all get the result: that of no dimension; or -1."""
        summed = [f for combine in self.combines for f in combine.over if f >= 0 and not self.units[f]]
        return summed[0] if summed else -1

    @property
    def adds(self) -> bool:
        """Whether this cluster adds what may be partial sums."""
        return any(PARTIAL in combine.over for combine in self.combines)


@dataclass(frozen=True, eq=False)
class Graph:
    """`inputs` and `outputs`: tensor per flat input and output of the program (-1: a literal output).

    `ties`: (output, input) positions of state that goes round. `calls`: {path: operand tensors} of rematerialised calls.
    `platform`: whose branch is paid for where a program has one per platform. `branches`: {path of a branch of a conditional: the
    share of its operators' times that is paid}, but for those for platforms. `memo`: see `remembered`.
    """

    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    clusters: tuple[Cluster, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    ties: tuple[tuple[int, int], ...]
    calls: Mapping[Path, tuple[int, ...]]
    platform: str = ""
    branches: Mapping[Path, float] = field(default_factory=dict)
    memo: dict[str, dict[Hashable, Any]] = field(default_factory=dict, init=False, repr=False)

    def remembered(self, what: str, key: Hashable, make: Callable[[], Value], most: int = 8) -> Value:
        """What `make` gives, worked out once. `key`: all that it depends on but for the graph; of one kind (`what`) the latest
        `most` are kept, as long as the graph is."""
        known = self.memo.setdefault(what, {})
        if key not in known:
            if len(known) >= most:
                del known[next(iter(known))]
            known[key] = make()
        return known[key]
