"""Room `compare`: what a plan predicts beside what XLA compiled: exchange by exchange, axis by axis, and in all.

Compiled collectives are those that the program means (`Audit.normalised`: the rewritings in `jaxplan.hlo`, and no other
allowance). All bytes are per device and call. A collective over several axes is split among them as the plan splits its own:
the slower axis carries what the faster ones have already reduced, or have not yet gathered.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from typing import Any

from jaxplan.hlo import Audit, Collective
from jaxplan.plan import Plan, PlannedExchange

_COMPILED_AS = {
    "all_reduce": "all-reduce",
    "reduce_scatter": "reduce-scatter",
    "all_gather": "all-gather",
    "all_to_all": "all-to-all",
    "permute": "collective-permute",
}
STATUSES = ("matched", "differs", "missing", "unplanned")
UNKNOWN = "?"
"""The axis of a collective whose groups no axes of the mesh span."""


@dataclass(frozen=True)
class Comparison:
    """One exchange, predicted and compiled. `status`: "matched" (bytes in all agree), "differs" (the same kind over the same
    axes at the same source line, with other bytes), "missing" (predicted only) or "unplanned" (compiled only)."""

    status: str
    kind: str
    axes: tuple[str, ...]
    predicted_bytes: float
    compiled_bytes: float
    predicted_times: float
    compiled_times: float
    tensor: str
    source: str

    @property
    def total_bytes(self) -> float:
        """The larger side."""
        return max(self.predicted_bytes, self.compiled_bytes)


@dataclass(frozen=True)
class PlanAudit:
    """A plan's predictions beside its compiled program. Printing it gives a table."""

    name: str
    mesh: Mapping[str, int]
    exchanges: tuple[Comparison, ...]  # costliest first
    predicted: Mapping[str, float]  # bytes sent, by axis
    compiled: Mapping[str, float]
    predicted_peak_bytes: float
    compiled_peak_bytes: float
    audit: Audit

    @property
    def errors(self) -> dict[str, float]:
        """|predicted - compiled| / compiled, by axis; inf where something is predicted and nothing compiled."""
        return {axis: relative_error(self.predicted.get(axis, 0.0), sent) for axis, sent in self.compiled.items()}

    def total(self, status: str) -> float:
        """Bytes of all exchanges of a status, the larger side of each."""
        return math.fsum(row.total_bytes for row in self.exchanges if row.status == status)

    @property
    def predicted_bytes(self) -> float:
        """Bytes sent, as predicted."""
        return math.fsum(self.predicted.values())

    @property
    def compiled_bytes(self) -> float:
        """Bytes sent, as compiled."""
        return math.fsum(self.compiled.values())

    @property
    def largest_unplanned(self) -> float:
        """The largest unplanned exchange, as a fraction of all that is sent; 0 where nothing is."""
        largest = max((row.compiled_bytes for row in self.exchanges if row.status == "unplanned"), default=0.0)
        return largest / self.compiled_bytes if largest else 0.0

    def to_json(self, indent: int | None = 1) -> str:
        """Everything as JSON, the audit of the compiled program included. An infinite error is null."""
        found = {
            "format": "jaxplan plan audit 1", "name": self.name, "mesh": dict(self.mesh),
            "exchanges": [asdict(row) for row in self.exchanges],
            "axes": {
                axis: {"predicted_bytes": self.predicted.get(axis, 0.0), "compiled_bytes": sent, "error": _finite(error)}
                for (axis, sent), error in zip(self.compiled.items(), self.errors.values(), strict=True)
            },
            "predicted_bytes": self.predicted_bytes, "compiled_bytes": self.compiled_bytes,
            "predicted_peak_bytes": self.predicted_peak_bytes, "compiled_peak_bytes": self.compiled_peak_bytes,
            "audit": json.loads(self.audit.to_json()),
        }  # fmt: skip
        return json.dumps(found, indent=indent, allow_nan=False)

    def _repr_html_(self) -> str:
        """For notebooks."""
        return f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items())
        lines = [f"{self.name} on mesh ({mesh}): predicted beside compiled, bytes sent per device and call", ""]
        header = ("", "exchange", "axes", "predicted", "compiled", "tensor", "source")
        rows = [header] + [
            (
                row.status, row.kind, "+".join(row.axes) or UNKNOWN,
                f"{row.predicted_bytes:,.0f}" if row.predicted_times else "-",
                f"{row.compiled_bytes:,.0f}" if row.compiled_times else "-", row.tensor, row.source,
            )
            for row in self.exchanges
        ]  # fmt: skip
        lines += _table(rows, right=(3, 4)) + [""]
        totals: list[tuple[str, ...]] = [("axis", "predicted", "compiled", "error")]
        totals += [
            (axis, f"{self.predicted.get(axis, 0.0):,.0f}", f"{sent:,.0f}", f"{self.errors[axis]:.2%}")
            for axis, sent in self.compiled.items()
        ]
        error = relative_error(self.predicted_bytes, self.compiled_bytes)
        totals.append(("all", f"{self.predicted_bytes:,.0f}", f"{self.compiled_bytes:,.0f}", f"{error:.2%}"))
        error = relative_error(self.predicted_peak_bytes, self.compiled_peak_bytes)
        peaks = (f"{peak:,.0f}" for peak in (self.predicted_peak_bytes, self.compiled_peak_bytes))
        totals.append(("peak memory", *peaks, f"{error:.2%}"))
        lines += _table(totals, right=(1, 2, 3)) + [""]
        lines.append(", ".join(f"{status} {self.total(status):,.0f}" for status in STATUSES))
        lines += [f"warning: {finding}" for finding in self.audit.warnings]
        lines += [f"not read: {note}" for note in self.audit.unread]
        return "\n".join(lines)


def relative_error(predicted: float, compiled: float) -> float:
    """|predicted - compiled| / compiled; 0 if both are nothing, inf if only `compiled` is."""
    if predicted == compiled:
        return 0.0
    return abs(predicted - compiled) / compiled if compiled else math.inf


def compare(plan: Plan, found: Audit, rounded: bool | None = None) -> PlanAudit:
    """A plan's exchanges beside those of its compiled program, `found`. `rounded`: whether it is compiled for a machine that
    rounds what only products read, if the plan's does."""
    exchanges = plan.exchanges if rounded is None else plan.exchanges_of(rounded)
    sizes = plan.axis_sizes
    slow_first = [plan.axis_names[axis] for axis in plan.modelled.numbers.order.slow_first]
    compiled = dict.fromkeys(sizes, 0.0)
    for collective in found.normalised:
        for axis, sent in sent_by_axis(collective, sizes, slow_first).items():
            compiled[axis] = compiled.get(axis, 0.0) + sent * collective.times
    return PlanAudit(
        plan.traced.name, sizes, match(exchanges, found.normalised), plan.bytes_by_axis(exchanges), compiled,
        float(plan.peak_bytes), float(found.peak_bytes), found,
    )  # fmt: skip


@dataclass(frozen=True)
class StageSides:
    """One stage of a program that runs on sub-meshes, predicted and compiled. `audits`: of its parts, and how often each runs;
    `sent`: bytes per device that other stages send it; `peaks`: bytes per device; both (predicted, compiled)."""

    plan: Plan
    audits: Sequence[tuple[Audit, int]]
    sent: tuple[float, float]
    peaks: tuple[float, float]


def compare_stages(
    name: str, axis: str, sizes: Mapping[str, int], sides: Sequence[StageSides], microbatches: int, rounded: bool
) -> PlanAudit:
    """The same of a program in stages along `axis`: the exchanges of all stages, by axis added up, a device of each; the peak of
    the stage that has most. What a stage is sent is a row of its own."""
    alone = [compare(side.plan, joined(side.audits), rounded) for side in sides]
    handed = []
    for number, side in enumerate(sides):
        predicted, compiled = side.sent
        status = "matched" if math.isclose(predicted, compiled, rel_tol=1e-9) else "differs"
        if predicted or compiled:
            handed.append(Comparison(status, "copy", (axis,), predicted, compiled, 1.0, 1.0, f"sent to stage {number}", ""))

    def total(pick: Callable[[PlanAudit], Mapping[str, float]], which: int) -> dict[str, float]:
        names = dict.fromkeys([*sizes, *[other for one in alone for other in pick(one)]])
        found = {other: math.fsum([pick(one).get(other, 0.0) for one in alone]) for other in names}
        return {**found, axis: math.fsum([side.sent[which] for side in sides])}

    own = [row for one in alone for row in _by_microbatch(one.exchanges, microbatches)]
    rows = sorted([*own, *handed], key=lambda row: -row.total_bytes)
    predicted_peak, compiled_peak = [max([side.peaks[which] for side in sides]) for which in (0, 1)]
    return PlanAudit(
        name, dict(sizes), tuple(rows), total(lambda one: one.predicted, 0), total(lambda one: one.compiled, 1),
        predicted_peak, compiled_peak, joined([(one.audit, 1) for one in alone]),
    )  # fmt: skip


def _by_microbatch(rows: Sequence[Comparison], microbatches: int) -> list[Comparison]:
    """What stages hand each other is planned as one stack, and moved micro-batch by micro-batch: rows of such are one."""
    left, found = list(rows), []
    for row in rows:
        if row.status == "missing":
            same = [
                other for other in left
                if other.status == "unplanned" and (other.kind, other.axes) == (row.kind, row.axes)
                and other.compiled_times == microbatches * row.predicted_times
                and math.isclose(other.compiled_bytes, row.predicted_bytes, rel_tol=1e-9)
            ]  # fmt: skip
            for other in same[:1]:
                left = [one for one in left if one is not row and one is not other]
                compiled = {"compiled_bytes": other.compiled_bytes, "compiled_times": other.compiled_times}
                found.append(replace(row, status="matched", source=other.source, **compiled))
    return left + found


def joined(audits: Sequence[tuple[Audit, int]]) -> Audit:
    """Programs that run so often in a call, as one. What each has of memory says nothing of them together: it is left out."""

    def often(some: Iterable[Collective], times: int) -> list[Collective]:
        return [replace(one, times=one.times * times) for one in some]

    return Audit(
        tuple([c for found, times in audits for c in often(found.collectives, times)]),
        tuple([c for found, times in audits for c in often(found.normalised, times)]),
        math.fsum(found.flops * times for found, times in audits),
        tuple([(kernel, count * times) for found, times in audits for kernel, count in found.kernels]),
        unread=tuple([note for found, _ in audits for note in found.unread]),
        warnings=tuple([one for found, _ in audits for one in found.warnings]),
    )  # fmt: skip


def sent_by_axis(collective: Collective, sizes: Mapping[str, int], slow_first: Sequence[str]) -> dict[str, float]:
    """The bytes of one run of a collective, by axis."""
    axes = [axis for axis in slow_first if axis in collective.axes]
    if len(axes) < 2:
        return {axes[0] if axes else UNKNOWN: collective.wire_bytes}
    if collective.kind == "collective-permute":
        return {axes[0]: collective.wire_bytes}
    if collective.kind != "all-to-all":
        axes.reverse()
    left, parts = 1.0, {}
    for axis in axes:
        parts[axis] = left * (1 - 1 / sizes[axis])
        left /= sizes[axis]
    whole = math.fsum(parts.values())
    return {axis: collective.wire_bytes * part / whole for axis, part in parts.items()}


# --- which is which -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Side:
    """Predicted or compiled exchanges, alike, that wait for their counterpart."""

    kind: str
    axes: frozenset[str]
    each: float  # bytes per run
    times: float
    tensor: str
    source: str


def match(planned: Iterable[PlannedExchange], compiled: Iterable[Collective]) -> tuple[Comparison, ...]:
    """Every exchange of either side, in the row of its counterpart where it has one.

    Counterparts are of one kind over the same axes. Those with the same bytes per run are matched, first at the same source line,
    then at any (the compiler names but one line for what it merges); then those that send as much in all (planned for each layer,
    say, and compiled for a stack of them); what is left at the same line differs.
    """
    left = [
        _Side(_COMPILED_AS[e.kind], frozenset(e.axes), math.fsum(e.wire_bytes.values()), e.times, _shown(e), e.source)
        for e in planned if e.total_bytes
    ]  # fmt: skip
    right = [
        _Side(c.kind, frozenset(c.axes), c.wire_bytes, c.times, _short(c.shape), c.source) for c in compiled if c.total_bytes
    ]
    rows: list[Comparison] = []
    for key in (_at_a_line, _anywhere):
        for mine, theirs in _both(left, right, key):
            rows += _pair_off(mine, theirs)
    for mine, theirs in _both(left, right, _in_all):
        for one, other in zip(mine, theirs, strict=False):
            rows.append(_row("matched", [one], [other]))
            one.times = other.times = 0.0
    for mine, theirs in _both(left, right, _of_a_line):
        rows.append(_row("differs", mine, theirs))
        for side in (*mine, *theirs):
            side.times = 0.0
    rows += [_row("missing", group, ()) for group in _groups(left, _at_a_line).values()]
    rows += [_row("unplanned", (), group) for group in _groups(right, _at_a_line).values()]
    return tuple(sorted(rows, key=lambda row: (-row.total_bytes, row.status, row.kind, row.source)))


def _at_a_line(side: _Side) -> Hashable:
    return side.kind, side.axes, round(side.each, 3), side.source


def _anywhere(side: _Side) -> Hashable:
    return side.kind, side.axes, round(side.each, 3)


def _in_all(side: _Side) -> Hashable:
    return side.kind, side.axes, round(side.each * side.times, 1)


def _of_a_line(side: _Side) -> Hashable:
    return side.kind, side.axes, side.source


def _groups(sides: Iterable[_Side], key: Callable[[_Side], Hashable]) -> dict[Hashable, list[_Side]]:
    found: dict[Hashable, list[_Side]] = {}
    for side in sides:
        if side.times:
            found.setdefault(key(side), []).append(side)
    return found


def _both(left: list[_Side], right: list[_Side], key: Callable[[_Side], Hashable]) -> list[tuple[list[_Side], list[_Side]]]:
    """Groups that are on both sides."""
    mine, theirs = _groups(left, key), _groups(right, key)
    return [(mine[k], theirs[k]) for k in mine if k in theirs]


def _pair_off(mine: list[_Side], theirs: list[_Side]) -> list[Comparison]:
    """Matched as often as both sides run; what one side runs more often stays."""
    runs = min(sum(side.times for side in mine), sum(side.times for side in theirs))
    taken = [_take(sides, runs) for sides in (mine, theirs)]
    return [_row("matched", *taken)]


def _take(sides: list[_Side], runs: float) -> list[_Side]:
    taken = []
    for side in sides:
        times = min(side.times, runs)
        if times:
            taken.append(_Side(side.kind, side.axes, side.each, times, side.tensor, side.source))
            side.times -= times
            runs -= times
    return taken


def _row(status: str, mine: Sequence[_Side], theirs: Sequence[_Side]) -> Comparison:
    one = (*mine, *theirs)[0]
    sums = [(math.fsum(s.each * s.times for s in sides), math.fsum(s.times for s in sides)) for sides in (mine, theirs)]
    (predicted, predicted_times), (compiled, compiled_times) = sums
    axes = tuple(sorted(one.axes))
    return Comparison(status, one.kind, axes, predicted, compiled, predicted_times, compiled_times, one.tensor, one.source)


def _shown(exchange: PlannedExchange) -> str:
    return f"{exchange.dtype}[{','.join(map(str, exchange.shape))}]"


def _short(shape: str) -> str:
    """A result type; of a tuple (the slices for the peers) the first, and how many there are."""
    parts = re.findall(r"\w+\[[^\]]*\]", shape)
    return f"{len(parts)} x {parts[0]}" if len(parts) > 1 else shape


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _table(rows: Sequence[Sequence[Any]], right: Sequence[int]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
