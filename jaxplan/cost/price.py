"""The BSP terms of one cluster or one reshard under one choice, in numbers or in symbols."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxplan.cost.exchange import Step, combine_steps, step_bytes, step_rounds
from jaxplan.cost.formulas import Value, exchange_seconds, work_seconds
from jaxplan.graph import Cluster, Terminal, Work
from jaxplan.layout import Layout


@dataclass(frozen=True, slots=True)
class Option:
    """What one mesh axis does in a cluster: split `factor` (-1: nothing); a partial sum that results is reduced, or
    scattered over the result dimension led by factor `scatter` (-1: reduced)."""

    factor: int = -1
    scatter: int = -1


class Algebra(Protocol):
    """Numbers or symbols: what the formulas are evaluated over."""

    larger: Callable[..., Value]

    @property
    def sizes(self) -> Sequence[Value]:
        """Devices along each mesh axis."""
        ...

    def nbytes(self, tensor: int) -> Value:
        """Bytes of a whole tensor."""
        ...

    def flops(self, work: Work) -> Value:
        """Operations of a piece of work, unsharded."""
        ...

    def seconds_per_flop(self, dtype: str) -> Value: ...

    @property
    def seconds_per_byte(self) -> Value: ...

    def link(self, axis: int) -> tuple[Value, Value]:
        """(seconds per byte, latency in seconds) of a mesh axis."""
        ...


AxisOptions = tuple[tuple[Option, ...], ...]
"""Per mesh axis, the options of one cluster."""


@dataclass(frozen=True)
class Exchange:
    """Steps that a tensor goes through, and for which operator."""

    tensor: int
    operator: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Setting:
    """What stays fixed while choices are priced: the number of axes and their order from slow to fast."""

    axes: int
    slow_first: tuple[int, ...]


def terminal_layout(leads: tuple[int, ...], options: Sequence[Option]) -> Layout:
    """Layout of a tensor whose dimensions are led by the given factors, before anything is scattered."""
    return tuple(leads.index(o.factor) if o.factor >= 0 and o.factor in leads else -1 for o in options)


def write_layout(leads: tuple[int, ...], options: Sequence[Option]) -> Layout:
    """Layout of a result, after partial sums are combined."""
    layout = []
    for option in options:
        factor = option.scatter if option.scatter >= 0 else option.factor
        layout.append(leads.index(factor) if factor >= 0 and factor in leads else -1)
    return tuple(layout)


def cluster_exchanges(cluster: Cluster, options: Sequence[Option], setting: Setting) -> list[Exchange]:
    """The exchanges inside a cluster: partial results made whole."""
    found = []
    for combine in cluster.combines:
        partial = [axis for axis, o in enumerate(options) if o.factor in combine.over]
        if not partial or combine.result.tensor < 0:
            continue
        leads = combine.result.leads
        layout = terminal_layout(leads, options)
        scatter = tuple(
            leads.index(o.scatter) if axis in partial and o.scatter >= 0 and o.scatter in leads else -1
            for axis, o in enumerate(options)
        )
        groups: dict[int, tuple[int, ...]] = {}
        for axis in partial:
            groups[options[axis].factor] = (*groups.get(options[axis].factor, ()), axis)
        steps = combine_steps(layout, scatter, tuple(groups.values()), len(leads), setting.slow_first)
        found.append(Exchange(combine.result.tensor, combine.operator, steps))
    return found


@dataclass(frozen=True)
class Terms:
    """BSP terms of one cluster: pieces of (flops, dtype), local bytes, and per axis bytes sent and supersteps."""

    work: tuple[tuple[Value, str], ...]
    local_bytes: Value
    sent: dict[int, Value]
    rounds: dict[int, int]


def exchange_terms(exchanges: Sequence[Exchange], algebra: Algebra) -> tuple[dict[int, Value], dict[int, int]]:
    """Per axis: bytes sent per device, and supersteps."""
    sent: dict[int, Value] = {}
    rounds: dict[int, int] = {}
    for exchange in exchanges:
        more, counts = steps_terms(exchange.steps, algebra.nbytes(exchange.tensor), algebra.sizes)
        for axis, value in more.items():
            sent[axis] = sent[axis] + value if axis in sent else value
            rounds[axis] = rounds.get(axis, 0) + counts[axis]
    return sent, rounds


def steps_terms(
    steps: Sequence[Step], nbytes: Value, sizes: Sequence[Value]
) -> tuple[dict[int, Value], dict[int, int]]:
    """Per axis: bytes sent per device and supersteps, for a tensor of `nbytes` going through `steps`."""
    sent: dict[int, Value] = {}
    rounds: dict[int, int] = {}
    for step in steps:
        for axis, value in step_bytes(step, nbytes, sizes):
            sent[axis] = sent[axis] + value if axis in sent else value
        for axis, count in step_rounds(step):
            rounds[axis] = rounds.get(axis, 0) + count
    return sent, rounds


def cluster_terms(cluster: Cluster, options: Sequence[Option], setting: Setting, algebra: Algebra) -> Terms:
    """The terms of a cluster under one choice."""
    used = [(axis, o.factor) for axis, o in enumerate(options) if o.factor >= 0]
    work = []
    for piece in cluster.work:
        flops = algebra.flops(piece)
        for axis, factor in used:
            if factor in piece.factors:
                flops = flops / algebra.sizes[axis]
        work.append((flops, piece.dtype))
    local: Value = 0
    if cluster.moves_bytes:
        shares = (*cluster.read_shares, *cluster.write_shares)
        for terminal, share in zip((*cluster.reads, *cluster.writes), shares, strict=True):
            value = _local_bytes(terminal, used, algebra)
            local = local + (value if share == 1.0 else share * value)
    sent, rounds = exchange_terms(cluster_exchanges(cluster, options, setting), algebra)
    for halo in cluster.halos:
        for axis, factor in used:
            if factor == halo.factor:
                slab = _local_bytes(halo.operand, used, algebra) * algebra.sizes[axis] / halo.extent * halo.width
                sent[axis] = sent[axis] + slab if axis in sent else slab
                rounds[axis] = rounds.get(axis, 0) + 1
    return Terms(tuple(work), local, sent, rounds)


def _local_bytes(terminal: Terminal, used: Sequence[tuple[int, int]], algebra: Algebra) -> Value:
    value = algebra.nbytes(terminal.tensor)
    for axis, factor in used:
        if factor in terminal.leads:
            value = value / algebra.sizes[axis]
    return value


def terms_seconds(terms: Terms, algebra: Algebra) -> Value:
    """Time of one superstep: local work, then the exchanges axis by axis."""
    arithmetic: Value = 0
    for flops, dtype in terms.work:
        arithmetic = arithmetic + flops * algebra.seconds_per_flop(dtype)
    total = work_seconds(arithmetic, terms.local_bytes, 1, algebra.seconds_per_byte, algebra.larger)
    return total + sent_seconds(terms.sent, terms.rounds, algebra)


def sent_seconds(sent: dict[int, Value], rounds: dict[int, int], algebra: Algebra) -> Value:
    """Time of the exchanges."""
    total: Value = 0
    for axis, value in sent.items():
        g, latency = algebra.link(axis)
        total = total + exchange_seconds(value, rounds.get(axis, 0), g, latency)
    return total
