"""The BSP terms of one cluster or one reshard under one choice, in numbers or in symbols."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from jaxplan.cost.exchange import Step, combine_steps, step_bytes, step_rounds
from jaxplan.cost.formulas import ROUNDS, Value, all_gather_bytes, all_reduce_bytes, exchange_seconds, work_seconds
from jaxplan.graph import Cluster, Combine, Halo, Handed, Sent, Terminal, Work
from jaxplan.graph.nouns import GATHERED, LEFT
from jaxplan.layout import PARTIAL, AxisOrder, Layout


@dataclass(frozen=True, slots=True)
class Option:
    """What one mesh axis does in a cluster: split `factor` (-1: nothing; `PARTIAL`: what is read are partial sums along it); a
    partial sum that results is reduced, or scattered over the result dimension led by factor `scatter` (-1: reduced), or left
    (`PARTIAL`)."""

    factor: int = -1
    scatter: int = -1


class Algebra(Protocol):
    """Numbers or symbols: what the formulas are evaluated over."""

    larger: Callable[..., Value]
    smaller: Callable[..., Value]

    @property
    def sizes(self) -> Sequence[Value]:
        """Devices along each mesh axis."""
        ...

    @property
    def counts(self) -> Sequence[int]:
        """The same as numbers."""
        ...

    @property
    def axis_names(self) -> Sequence[str]:
        """The mesh axes."""
        ...

    @property
    def ticks(self) -> Value:
        """How often the stages of a pipeline hand on what they carry."""
        ...

    @property
    def microbatches(self) -> Value:
        """How many of them a pipeline's batch is cut into."""
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
    """What stays fixed while choices are priced: the number of axes and their orders."""

    axes: int
    order: AxisOrder


def terminal_layout(leads: tuple[int, ...], options: Sequence[Option]) -> Layout:
    """Layout of a tensor whose dimensions are led by the given factors, before anything is scattered."""
    return tuple(
        leads.index(o.factor) if o.factor >= 0 and o.factor in leads else PARTIAL if o.factor == PARTIAL else -1 for o in options
    )


def write_layout(leads: tuple[int, ...], options: Sequence[Option]) -> Layout:
    """Layout of a result, after partial sums are combined."""
    layout = []
    for option in options:
        factor = option.scatter if option.scatter >= 0 else option.factor
        left = option.scatter == PARTIAL
        layout.append(PARTIAL if left else leads.index(factor) if factor >= 0 and factor in leads else -1)
    return tuple(layout)


CombinePart = tuple[int, int, int]
"""What one axis does to a partial result: the dimension it shards, the factor (or `PARTIAL`) along which it is partial, the
dimension it is scattered over; -1 for none."""


def combine_part(combine: Combine, option: Option) -> CombinePart:
    """The part of one axis in combining a result."""
    leads = combine.result.leads
    dim = leads.index(option.factor) if option.factor >= 0 and option.factor in leads else -1
    if option.factor not in combine.over or option.scatter == PARTIAL:
        return dim, -1, -1
    return dim, option.factor, leads.index(option.scatter) if option.scatter >= 0 and option.scatter in leads else -1


def parts_steps(parts: Sequence[CombinePart], ndim: int, order: AxisOrder) -> tuple[Step, ...]:
    """The steps that make a partial result whole, from the part of every axis."""
    groups: dict[int, tuple[int, ...]] = {}
    for axis, (_, factor, _) in enumerate(parts):
        if factor != -1:
            groups[factor] = (*groups.get(factor, ()), axis)
    if not groups:
        return ()
    layout, scatter = tuple([part[0] for part in parts]), tuple([part[2] for part in parts])
    partial = tuple([axes for _, axes in sorted(groups.items(), reverse=True)])
    return combine_steps(layout, scatter, partial, ndim, order)


def cluster_exchanges(cluster: Cluster, options: Sequence[Option], setting: Setting) -> list[Exchange]:
    """The exchanges inside a cluster: partial results made whole."""
    found = []
    for combine in cluster.combines:
        parts = [combine_part(combine, option) for option in options]
        steps = parts_steps(parts, len(combine.result.leads), setting.order)
        if steps and combine.result.tensor >= 0:
            found.append(Exchange(combine.result.tensor, combine.operator, steps))
    return found


@dataclass(frozen=True)
class Terms:
    """BSP terms of one cluster: pieces of (flops, dtype), local bytes, and per axis bytes sent and supersteps."""

    work: tuple[tuple[Value, str], ...]
    local_bytes: Value
    sent: dict[int, Value]
    rounds: dict[int, Value]


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
    sent, counted = exchange_terms(cluster_exchanges(cluster, options, setting), algebra)
    rounds: dict[int, Value] = {**counted}
    for _, _, axis, value in halo_bytes(cluster, options, setting, algebra):
        sent[axis] = sent[axis] + value if axis in sent else value
        rounds[axis] = rounds.get(axis, 0) + 1
    for handed, axis, value in handed_bytes(cluster, options, algebra):
        often, steps = handed_times(handed, algebra)
        sent[axis] = sent.get(axis, 0) + value * often
        rounds[axis] = rounds.get(axis, 0) + steps * often
    for own, step in steps_sent(cluster, setting, algebra):
        for axis, value in step_bytes(step, own.nbytes, algebra.sizes):
            sent[axis] = sent.get(axis, 0) + own.times * value
        for axis, count in step_rounds(step):
            rounds[axis] = rounds.get(axis, 0) + own.times * count
    return Terms(tuple(work), local, sent, rounds)


def halo_bytes(
    cluster: Cluster, options: Sequence[Option], setting: Setting, algebra: Algebra
) -> list[tuple[Halo, tuple[int, ...], int, Value]]:
    """(halo, axes that it crosses, axis that is charged, bytes sent per device) of every slab that neighbours exchange.

    Of several axes that cut one dimension the slowest is charged, as some neighbour lies across it. A second dimension's slab
    takes in what the first one's brought: the corners. What is taken in the place of a device's own elements comes from two
    devices where it is more than one has.
    """
    used = [(axis, o.factor) for axis, o in enumerate(options) if o.factor >= 0]
    found = []
    widened: dict[int, Value] = {}
    for halo in cluster.halos:
        cut = [axis for axis, factor in used if factor == halo.factor]
        axes = tuple(sorted(cut, key=setting.order.major_first.index))
        if not axes:
            continue
        local: Value = halo.extent
        for axis in axes:
            local = local / algebra.sizes[axis]
        width = algebra.smaller(halo.width, local) if halo.instead else halo.width
        slab = _local_bytes(halo.operand, used, algebra) / local * width
        before = widened.get(halo.operator, 1)
        widened[halo.operator] = before * (local + width) / local
        for share, crossed in _senders(halo, axes, algebra.counts):
            part = slab * before if share == 1 else slab * before * share
            found.append((halo, crossed, min(crossed, key=setting.order.slow_first.index), part))
    return found


def _senders(halo: Halo, axes: tuple[int, ...], sizes: Sequence[int]) -> list[tuple[Fraction, tuple[int, ...]]]:
    """(share of a slab, axes that it crosses) by the devices from which it comes."""
    local = halo.extent // math.prod([sizes[axis] for axis in axes]) if halo.instead else 0
    if not local or halo.width <= local:
        return [(Fraction(1), axes)]
    far, rest = divmod(halo.width, local)
    found = []
    for distance, width in ((far, local - rest), (far + 1, rest)):
        crossed, steps = axes, distance
        while len(crossed) > 1 and steps % sizes[crossed[-1]] == 0:  # by so many devices, minor axes stay where they are
            steps, crossed = steps // sizes[crossed[-1]], crossed[:-1]
        if width:
            found.append((Fraction(width, local), crossed))
    return found


def steps_sent(cluster: Cluster, setting: Setting, algebra: Algebra) -> list[tuple[Sent, Step]]:
    """What a program itself sends in regions that it shards by hand, each as a step for an operand of `nbytes`; along axes that
    have several devices."""
    found = []
    for sent in cluster.sent:
        axes = {algebra.axis_names.index(name) for name in sent.axes if name in algebra.axis_names}
        slow_first = tuple([axis for axis in setting.order.slow_first if axis in axes and algebra.counts[axis] > 1])
        if slow_first:
            found.append((sent, Step(sent.kind, slow_first, (), ())))
    return found


def handed_bytes(cluster: Cluster, options: Sequence[Option], algebra: Algebra) -> list[tuple[Handed, int, Value]]:
    """(what, axis, bytes sent per device) of all that goes from stage to stage of a pipeline, each time."""
    used = [(axis, o.factor) for axis, o in enumerate(options) if o.factor >= 0]
    found = []
    for handed in cluster.handed:
        for axis, factor in used:
            if factor == handed.factor:
                local, size = _local_bytes(handed.operand, used, algebra), algebra.sizes[axis]
                if handed.how == GATHERED:
                    local = all_gather_bytes(size, size * handed.layers * local)
                elif handed.how == LEFT:
                    local = all_reduce_bytes(size, _written_bytes(handed.operand, options, algebra))
                found.append((handed, axis, local))
    return found


def handed_times(handed: Handed, algebra: Algebra) -> tuple[Value, int]:
    """(how often each time that the cluster runs, supersteps). What is left at the end leaves a cluster that runs once per
    micro-batch."""
    if handed.how == LEFT:
        return 1 / algebra.microbatches, ROUNDS["all_reduce"]
    return (algebra.ticks - handed.spared, ROUNDS["permute"]) if handed.every_tick else (1, ROUNDS["all_gather"])


def _local_bytes(terminal: Terminal, used: Sequence[tuple[int, int]], algebra: Algebra) -> Value:
    value = algebra.nbytes(terminal.tensor)
    for axis, factor in used:
        if factor in terminal.leads:
            value = value / algebra.sizes[axis]
    return value


def _written_bytes(terminal: Terminal, options: Sequence[Option], algebra: Algebra) -> Value:
    """The same where partial sums are combined, and may be scattered."""
    value = algebra.nbytes(terminal.tensor)
    for axis, dim in enumerate(write_layout(terminal.leads, options)):
        value = value / algebra.sizes[axis] if dim >= 0 else value
    return value


def terms_seconds(terms: Terms, algebra: Algebra) -> Value:
    """Time of one superstep: local work, then the exchanges axis by axis."""
    arithmetic: Value = 0
    for flops, dtype in terms.work:
        arithmetic = arithmetic + flops * algebra.seconds_per_flop(dtype)
    total = work_seconds(arithmetic, terms.local_bytes, 1, algebra.seconds_per_byte, algebra.larger)
    return total + sent_seconds(terms.sent, terms.rounds, algebra)


def sent_seconds(sent: dict[int, Value], rounds: Mapping[int, Value], algebra: Algebra) -> Value:
    """Time of the exchanges."""
    total: Value = 0
    for axis, value in sent.items():
        g, latency = algebra.link(axis)
        total = total + exchange_seconds(value, rounds.get(axis, 0), g, latency)
    return total
