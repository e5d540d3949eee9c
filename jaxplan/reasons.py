"""Room `reasons`: why a tensor lies where it lies, and what it would cost to have it elsewhere.

Everything is found by asking the planner again, with one thing pinned; what grew between two plans of one graph is the reason.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jax.sharding import PartitionSpec

from jaxplan.cost import reshard_steps
from jaxplan.cost.price import cluster_terms, sent_seconds, steps_terms, terms_seconds
from jaxplan.cost.symbols import Symbols
from jaxplan.graph.flatten import BOUNDARY, INPUT, VIEW
from jaxplan.layout import PARTIAL, Layout
from jaxplan.paths import alike, several
from jaxplan.plan import Plan
from jaxplan.problem import all_rows, edge_prices, repeated
from jaxplan.report import show_bytes, show_seconds

if TYPE_CHECKING:
    import sympy

MOST_ALTERNATIVES = 24
"""Layouts of an input for which the problem is solved again; beyond that, only those that differ along one axis."""
MOST_GROUPS = 4
"""Groups of inputs for which one explanation solves again."""
CAUSES = 3


class Replannable(Protocol):
    """A plan that can be derived again (`jaxplan.Plan`)."""

    def replan(self, **changes: Any) -> Any: ...


# --- where the seconds of a plan go --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Charge:
    """A part of a plan's time: `what` is done ("work of add", "all_gather over y for add") at the user's `source` line."""

    what: str
    source: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.what}{' at ' + self.source if self.source else ''}"


def charges(plan: Plan) -> dict[tuple[str, int], Charge]:
    """The time of a plan, taken apart: one charge per cluster and one per reading whose layout changes. They add up to
    `plan.seconds`; plans of one graph have the same keys."""
    modelled, found = plan.modelled, {}
    graph, numbers, setting = modelled.graph, modelled.numbers, modelled.setting
    for index, cluster in enumerate(graph.clusters):
        terms = cluster_terms(cluster, modelled.chosen(plan.choices, index), setting, numbers)
        seconds = cluster.times * terms_seconds(terms, numbers)
        if seconds:
            operator = graph.operators[cluster.members[-1]]
            axes = [plan.axis_names[axis] for axis, sent in sorted(terms.sent.items()) if sent]
            what = f"work of {operator.name}" + (f", its result combined over {'+'.join(axes)}" if axes else "")
            found["cluster", index] = Charge(what, plan.source(operator), seconds)
    for number, reading in enumerate(modelled.readings):
        steps = reshard_steps(*modelled.edge_layouts(plan.choices, reading), setting.order)
        nbytes = reading.sent * numbers.nbytes(reading.tensor)
        seconds = reading.times * sent_seconds(*steps_terms(steps, nbytes, numbers.sizes), numbers)
        if seconds:
            reader, writer = (graph.operators[graph.clusters[c].members[-1]] for c in (reading.reader, reading.writer))
            moves = [(step.kind, "+".join(plan.axis_names[a] for a in step.axes)) for step in steps if step.kind != "slice"]
            kinds = ", ".join(dict.fromkeys(f"{kind} over {axes}" for kind, axes in moves))
            quiet = reader.equation is None and writer.equation is not None
            told = writer if quiet else reader
            found["reading", number] = Charge(f"{kinds} {'after' if quiet else 'for'} {told.name}", plan.source(told), seconds)
    return found


def growth(plan: Plan, other: Plan) -> list[Charge]:
    """What costs more in another plan of the same graph, largest first; `seconds` is the difference."""
    before, after = charges(plan), charges(other)
    grown: dict[tuple[str, str], float] = {}
    for key, charge in after.items():
        more = charge.seconds - (before[key].seconds if key in before else 0.0)
        grown[charge.what, charge.source] = grown.get((charge.what, charge.source), 0.0) + more
    found = [Charge(what, source, seconds) for (what, source), seconds in grown.items() if seconds > 0]
    return sorted(found, key=lambda charge: -charge.seconds)


# --- what another layout would cost ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class WhyNot:
    """The best plan found with some inputs pinned elsewhere (`other`), beside the plan itself.

    `extra`: seconds per call that it costs more. `changed`: {input path: (spec in the plan, spec in the other)}. `causes`: what
    grew.
    """

    plan: Any
    other: Any
    pins: Mapping[str, PartitionSpec]

    @property
    def extra(self) -> float:
        """Seconds per call; negative where the search had missed something cheaper."""
        return self.other.seconds - self.plan.seconds

    @cached_property
    def causes(self) -> list[Charge]:
        """What costs more, largest first. Of plans in stages on sub-meshes, of each stage; nothing if they are cut otherwise."""
        stages = getattr(self.plan, "stage_plans", ())
        if not stages:
            return growth(self.plan, self.other)
        alike = self.plan.pipeline == self.other.pipeline
        found = [c for a, b in zip(stages, self.other.stage_plans, strict=True) for c in growth(a, b)] if alike else []
        return sorted(found, key=lambda charge: -charge.seconds)

    @cached_property
    def changed(self) -> dict[str, tuple[PartitionSpec, PartitionSpec]]:
        """The inputs that would lie elsewhere, those pinned too."""
        pairs = zip(self.plan.traced.in_paths, _input_specs(self.plan), _input_specs(self.other), strict=True)
        return {path: (one, two) for path, one, two in pairs if one != two}

    def _repr_html_(self) -> str:
        """For notebooks."""
        return f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        pinned = ", ".join(f"{path} as {_show(spec)}" for path, spec in self.pins.items())
        lines = [f"{pinned} {_difference(self.extra, self.plan.seconds)} ({show_seconds(self.other.seconds)} in all)"]
        lines += [f"  costs more      {show_seconds(cause.seconds)}  {cause}" for cause in self.causes[:CAUSES]]
        for axis, before in self.plan.wire_bytes.items():
            after = self.other.wire_bytes[axis]
            if after != before:
                lines.append(f"  sent over {axis:5s} {show_bytes(before)} -> {show_bytes(after)} per device and call")
        peaks = f"{show_bytes(self.plan.peak_bytes)} -> {show_bytes(self.other.peak_bytes)}"
        lines.append(f"  peak memory     {peaks} per device (modelled)")
        merged: dict[tuple[Any, ...], list[str]] = {}
        for path, (one, two) in self.changed.items():
            merged.setdefault((alike(path), _show(one), _show(two)), []).append(path)
        lines += [f"  moves           {several(paths)}: {one} -> {two}" for (_, one, two), paths in merged.items()]
        return "\n".join(lines)


def why_not(plan: Plan, replannable: Replannable, pins: Mapping[str, PartitionSpec]) -> WhyNot:
    """Solve again with `pins` on top of those that the plan was made with. ValueError where a pin cannot be honoured."""
    return WhyNot(plan, replannable.replan(pins={**plan.request.pins, **pins}, certify=False), dict(pins))


# --- explanations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alternative:
    """Another layout of an input: its spec, the seconds per call that it costs more (the problem solved again), and what grew."""

    spec: PartitionSpec
    extra: float
    causes: Sequence[Charge]


@dataclass(frozen=True)
class InputReason:
    """Why inputs that look alike lie as they do.

    `cost`: the closed form of bringing the tensor (and, of state, its update) to where it is used; `neighbours`: who reads or
    makes it, and in which layout; `alternatives`: cheapest first; `idle`: {axis that does not shard it: why}.
    """

    paths: Sequence[str]
    shape: tuple[int, ...]
    dtype: str
    dims: Sequence[str]
    spec: PartitionSpec
    bytes_per_device: float
    cost: sympy.Expr
    seconds: float
    neighbours: Sequence[str]
    alternatives: Sequence[Alternative]
    idle: Mapping[str, str]
    whole: float = field(repr=False)

    @property
    def forced_by(self) -> str:
        """What would cost most more under the runner-up, and how much; "" where nothing would."""
        if not self.alternatives or self.alternatives[0].extra <= 0 or not self.alternatives[0].causes:
            return ""
        charge = self.alternatives[0].causes[0]
        return f"{charge}: {show_seconds(charge.seconds)} more"

    def __str__(self) -> str:
        dims = f" ({' '.join(self.dims)})" if self.dims else ""
        lines = [f"{several(self.paths)}  {self.dtype}[{','.join(map(str, self.shape))}]{dims}: {_show(self.spec)}"]
        lines[0] += f", {show_bytes(self.bytes_per_device)} per device"
        moving = f"{show_seconds(self.seconds)} a call = {self.cost}" if self.seconds else "nothing"
        lines.append(f"  moving it       {moving}")
        lines += [f"  neighbour       {text}" for text in self.neighbours]
        for number, other in enumerate(self.alternatives[:3]):
            word = "runner-up" if number == 0 else "then"
            lines.append(f"  {word:15s} {_show(other.spec)} {_difference(other.extra, self.whole)}{_because(other)}")
        if self.forced_by:
            lines.append(f"  forced by       {self.forced_by}")
        lines += [f"  axis {axis:10s} {why}" for axis, why in self.idle.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class OperatorReason:
    """Why the operators of one cluster work as they do. `cost`: closed form of one run; `seconds`: of all runs in a call.

    `splits`: {axis: what it splits}; `runner_up`: (the same for the next best choice, seconds more), given its neighbours;
    `forced_by`: what would cost most more under that choice, a neighbour or the operators' own work, and how much.
    """

    operator: str
    source: str
    times: float
    splits: Mapping[str, str]
    cost: sympy.Expr
    seconds: float
    runner_up: tuple[Mapping[str, str], float] | None
    whole: float = field(repr=False)
    forced_by: str = ""

    def __str__(self) -> str:
        often = f", {self.times:g} times" if self.times != 1 else ""
        lines = [f"{self.operator} at {self.source}{often}: {_splits(self.splits)}"]
        lines.append(f"  takes           {show_seconds(self.seconds)} a call; each time {self.cost}")
        if self.runner_up is not None:
            splits, extra = self.runner_up
            lines.append(f"  runner-up       {_splits(splits)}: {_difference(extra, self.whole)}, given its neighbours")
        if self.forced_by:
            lines.append(f"  forced by       {self.forced_by}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """What `plan.explain` found about inputs or about a source line; prints as text."""

    subject: str
    reasons: Sequence[InputReason | OperatorReason]
    note: str = ""

    def _repr_html_(self) -> str:
        """For notebooks."""
        return f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        return "\n".join([*map(str, self.reasons), *([self.note] if self.note else [])])


def explain_inputs(plan: Plan, replannable: Replannable, subject: str, positions: Sequence[int]) -> Explanation:
    """Reasons for flat inputs; those that look alike (layers) are explained, and pinned, together."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    specs = _input_specs(plan)
    for position in positions:
        aval = plan.traced.in_avals[position]
        key = (alike(plan.traced.in_paths[position]), tuple(aval.shape), str(aval.dtype), specs[position])
        groups.setdefault(key, []).append(position)
    few = len(groups) <= MOST_GROUPS
    note = "" if few else f"{len(groups)} kinds of input: name fewer to see what other layouts would cost"
    return Explanation(subject, [_input_reason(plan, replannable, group, few) for group in groups.values()], note)


def _input_reason(plan: Plan, replannable: Replannable, group: Sequence[int], solve: bool) -> InputReason:
    position = group[0]
    aval, tensor = plan.traced.in_avals[position], plan.modelled.graph.inputs[position]
    alternatives = _alternatives(plan, replannable, group) if solve and tensor >= 0 else []
    cost, seconds = _moving(plan, position)
    return InputReason(
        [plan.traced.in_paths[i] for i in group], tuple(aval.shape), str(aval.dtype), plan.names.dimension(tensor),
        _input_specs(plan)[position], plan.input_bytes(position), cost, seconds, _neighbours(plan, position), alternatives,
        _idle(plan, position, alternatives if solve else None), plan.seconds,
    )  # fmt: skip


def _alternatives(plan: Plan, replannable: Replannable, group: Sequence[int]) -> list[Alternative]:
    position = group[0]
    shape, now = plan.traced.in_avals[position].shape, plan.input_layouts[position]
    sizes = plan.modelled.numbers.sizes
    legal = [layout for layout in itertools.product(range(-1, len(shape)), repeat=len(sizes)) if _divides(layout, shape, sizes)]
    if len(legal) > MOST_ALTERNATIVES:
        legal = [layout for layout in legal if sum(a != b for a, b in zip(layout, now, strict=True)) <= 1]
    found = []
    for layout in legal:
        if layout == now:
            continue
        spec = _spec(plan, layout, len(shape))
        try:
            other = why_not(plan, replannable, {plan.traced.in_paths[i]: spec for i in group})
        except ValueError:  # no operator that reads it can take it so
            continue
        found.append(Alternative(spec, other.extra, other.causes[:CAUSES]))
    return sorted(found, key=lambda alternative: alternative.extra)


def _divides(layout: Layout, shape: Sequence[int], sizes: Sequence[int]) -> bool:
    parts = [1] * len(shape)
    for dim, size in zip(layout, sizes, strict=True):
        if dim >= 0:
            if size == 1:
                return False
            parts[dim] *= size
    return all(extent % part == 0 and extent for extent, part in zip(shape, parts, strict=True))


def _idle(plan: Plan, position: int, alternatives: Sequence[Alternative] | None) -> dict[str, str]:
    """{axis that does not shard an input: why not}."""
    shape, layout = plan.traced.in_avals[position].shape, plan.input_layouts[position]
    found = {}
    for axis, (name, size) in enumerate(plan.axis_sizes.items()):
        if layout[axis] >= 0 or size == 1 or not shape:
            continue
        sizes = plan.modelled.numbers.sizes
        taken = [math.prod(s for s, d in zip(sizes, layout, strict=True) if d == dim) for dim in range(len(shape))]
        if all(extent % (size * parts) for extent, parts in zip(shape, taken, strict=True)):
            found[name] = f"does not shard it: {size} devices divide none of its dimensions {tuple(shape)}" + (
                " further" if any(parts > 1 for parts in taken) else ""
            )
            continue
        if alternatives is None:
            continue
        using = [a for a in alternatives if name in _axes_of(a.spec)]
        if not using:
            found[name] = "does not shard it: no operator that reads it can take it so"
            continue
        best = using[0]
        found[name] = f"does not shard it: {_show(best.spec)} {_difference(best.extra, plan.seconds)}{_because(best)}"
    return found


def _chain(plan: Plan, position: int) -> list[int]:
    """The tensor of an input, and what is only a view of it or its way into a loop."""
    graph = plan.modelled.graph
    found, waiting = [], [graph.inputs[position]]
    while waiting:
        tensor = waiting.pop()
        found.append(tensor)
        for reading in plan.modelled.readings:
            operator = graph.operators[graph.clusters[reading.reader].members[-1]]
            if reading.tensor == tensor and operator.name in (VIEW, BOUNDARY) and operator.results[0] not in found:
                waiting.append(operator.results[0])
    return found


def _moving(plan: Plan, position: int) -> tuple[sympy.Expr, float]:
    """What it costs to bring an input to its readers, and its new value back: closed form, and seconds."""
    import sympy

    modelled = plan.modelled
    symbols = Symbols(modelled.graph, modelled.numbers, plan.names, modelled.stages)
    own, tensor = set(_chain(plan, position)), modelled.graph.inputs[position]
    home = next((i for i, c in enumerate(modelled.graph.clusters) if any(w.tensor == tensor for w in c.writes)), -1)
    parts: dict[Any, float] = {}
    seconds = 0.0
    for reading in modelled.readings:
        if reading.tensor in own or reading.reader == home:
            steps = reshard_steps(*modelled.edge_layouts(plan.choices, reading), modelled.setting.order)
            nbytes = sympy.Rational(reading.sent) * symbols.nbytes(reading.tensor)
            value = sent_seconds(*steps_terms(steps, nbytes, symbols.sizes), symbols)
            if value != 0:
                parts[value] = parts.get(value, 0.0) + reading.times
                numbers = modelled.numbers
                sent = steps_terms(steps, reading.sent * numbers.nbytes(reading.tensor), numbers.sizes)
                seconds += reading.times * sent_seconds(*sent, numbers)
    whole = [(int(times) if float(times).is_integer() else sympy.Float(times)) * value for value, times in parts.items()]
    return sympy.Add(*whole), seconds


def _neighbours(plan: Plan, position: int) -> list[str]:
    """Who reads an input, in which layout, and what it takes to get there; alike ones once."""
    modelled = plan.modelled
    graph, own = modelled.graph, set(_chain(plan, position))
    seen: dict[str, int] = {}
    for reading in modelled.readings:
        operator = graph.operators[graph.clusters[reading.reader].members[-1]]
        if reading.tensor not in own or operator.name in (VIEW, BOUNDARY, INPUT):
            continue
        src, dst, ndim = modelled.edge_layouts(plan.choices, reading)
        kinds = [step.kind for step in reshard_steps(src, dst, ndim, modelled.setting.order) if step.kind != "slice"]
        source = plan.source(operator)
        text = f"{operator.name}{' at ' + source if source else ''} reads it as {_show(_spec(plan, dst, ndim))}"
        text += f" ({', '.join(kinds)})" if kinds else ", where it lies" if src == dst else ""
        seen[text] = seen.get(text, 0) + 1
    return [text + (f" (x{count})" if count > 1 else "") for text, count in seen.items()]


def explain_line(plan: Plan, subject: str) -> Explanation:
    """Reasons for the operators that a source line ("model.py:41", ":41") wrote."""
    graph, wanted = plan.modelled.graph, re.compile(("" if subject.startswith(":") else "(^|/)") + re.escape(subject) + "$")
    reasons: dict[str, OperatorReason] = {}
    for index, cluster in enumerate(graph.clusters):
        here = [m for m in cluster.members if wanted.search(plan.source(graph.operators[m]))]
        if here and graph.operators[here[-1]].equation is not None:
            reason = _operator_reason(plan, index, here)
            reasons.setdefault(str(reason), reason)
    if not reasons:
        known = list(dict.fromkeys(plan.source(op) for op in graph.operators if op.equation is not None))
        near = difflib.get_close_matches(subject, known, 5, 0.3)
        raise ValueError(f"no operator of {plan.traced.name} was written at {subject!r}; the closest lines are {near}")
    ordered = sorted(reasons.values(), key=lambda reason: -reason.seconds)
    return Explanation(subject, ordered)


def _operator_reason(plan: Plan, index: int, members: Sequence[int]) -> OperatorReason:
    modelled = plan.modelled
    cluster, numbers = modelled.graph.clusters[index], modelled.numbers
    options = modelled.chosen(plan.choices, index)
    symbols = Symbols(modelled.graph, numbers, plan.names, modelled.stages)
    cost = terms_seconds(cluster_terms(cluster, options, modelled.setting, symbols), symbols)
    seconds = cluster.times * terms_seconds(cluster_terms(cluster, options, modelled.setting, numbers), numbers)
    names = list(dict.fromkeys(modelled.graph.operators[m].name for m in members))
    runner_up, forced_by = _next_best(plan, index)
    return OperatorReason(
        ", ".join(names[:3]) + (", ..." if len(names) > 3 else ""), plan.source(modelled.graph.operators[members[-1]]),
        cluster.times, _splitting(plan, index, plan.choices[index]), cost, seconds, runner_up, plan.seconds, forced_by,
    )  # fmt: skip


def _next_best(plan: Plan, index: int) -> tuple[tuple[Mapping[str, str], float] | None, str]:
    """The second best choice of one cluster while every other keeps its own, and what speaks against it most."""
    modelled, problem = plan.modelled, plan.modelled.problem
    if index not in modelled.kept:
        return None, ""
    number, choices = modelled.kept.index(index), plan.choices[list(modelled.kept)]
    node = problem.nodes[number]
    rows = all_rows(node.options)
    total = repeated(node.times, node.price(rows))
    parts = [("its own work and exchanges", total)]
    edges = [edge for edge in problem.edges if number in (edge.tail, edge.head) and edge.tail != edge.head]
    asked = [
        (e.price, rows, choices[e.head][None]) if e.tail == number else (e.price, choices[e.tail][None], rows) for e in edges
    ]
    for edge, matrix in zip(edges, edge_prices(asked), strict=True):
        part = repeated(edge.times, matrix[:, 0] if edge.tail == number else matrix[0])
        parts.append((_end(plan, edge.head if edge.tail == number else edge.tail), part))
        total = total + part
    own = int(np.flatnonzero((rows == choices[number]).all(axis=1))[0])
    others = [i for i in np.argsort(total, kind="stable").tolist() if i != own and np.isfinite(total[i])]
    if not others:
        return None, ""
    best = others[0]
    more: dict[str, float] = {}
    for told, part in parts:
        more[told] = more.get(told, 0.0) + float(part[best] - part[own])
    told = max(more, key=lambda name: more[name])
    forced_by = f"{told}: {show_seconds(more[told])} more" if more[told] > 0 else ""
    return (_splitting(plan, index, rows[best]), float(total[best] - total[own])), forced_by


def _end(plan: Plan, node: int) -> str:
    """A neighbour, as text: an input by its path, anything else by what makes it."""
    graph = plan.modelled.graph
    cluster = graph.clusters[plan.modelled.kept[node]]
    operator = graph.operators[cluster.members[-1]]
    if operator.name == INPUT:
        return plan.traced.in_paths[graph.inputs.index(operator.results[0])]
    if operator.equation is None and operator.operands:  # a view, or the edge of a loop: told by what comes in
        tensor = operator.operands[0]
        if tensor in graph.inputs:
            return plan.traced.in_paths[graph.inputs.index(tensor)]
        operator = next((op for op in graph.operators if op.equation is not None and tensor in op.results), operator)
    source = plan.source(operator)
    return f"{operator.name} at {source}" if source else operator.name


def _splitting(plan: Plan, index: int, row: np.ndarray) -> dict[str, str]:
    """{axis: what it splits in a cluster}, by the name of the dimension."""
    cluster = plan.modelled.graph.clusters[index]
    found = {}
    for axis, options, number in zip(plan.axis_names, plan.modelled.options[index], row.tolist(), strict=True):
        option = options[number]
        if option.factor == PARTIAL:
            found[axis] = f"partial sums (added, {'left partial' if option.scatter == PARTIAL else 'then summed'})"
        if option.factor >= 0:
            found[axis] = _dimension(plan, cluster, option.factor)
            if option.scatter >= 0:
                found[axis] += f" (summed, scattered over {_dimension(plan, cluster, option.scatter)})"
            elif any(option.factor in combine.over for combine in cluster.combines):
                found[axis] += " (left a partial sum)" if option.scatter == PARTIAL else " (summed)"
    return found


def _dimension(plan: Plan, cluster: Any, factor: int) -> str:
    for terminal in (*cluster.reads, *cluster.writes):
        if terminal.tensor >= 0 and factor in terminal.leads:
            return plan.names.dimension(terminal.tensor)[terminal.leads.index(factor)]
    return "a dimension inside"


# --- text ------------------------------------------------------------------------------------------------------------


def _input_specs(plan: Plan) -> list[PartitionSpec]:
    return [plan.partition_spec_of(position) for position in range(len(plan.traced.in_avals))]


def _spec(plan: Plan, layout: Layout, ndim: int) -> PartitionSpec:
    return plan.partition_spec(plan.spec(layout, ndim))


def _axes_of(spec: PartitionSpec) -> set[str]:
    return {name for entry in spec for name in (entry if isinstance(entry, tuple) else (entry,)) if name is not None}


def _show(spec: PartitionSpec) -> str:
    return str(spec).replace("PartitionSpec", "P")


def _splits(splits: Mapping[str, str]) -> str:
    return ", ".join(f"{axis} splits {what}" for axis, what in splits.items()) or "every device does all of it"


def _difference(extra: float, whole: float) -> str:
    share = f" ({extra / whole:+.2%})" if whole else ""
    if abs(extra) <= 1e-9 * whole:
        return "costs the same"
    if extra < 0:
        return f"saves {show_seconds(-extra)}{share} a call, which the search had missed"
    return f"costs {show_seconds(extra)}{share} more a call"


def _because(other: Alternative) -> str:
    return f", mostly {other.causes[0]}" if other.causes and other.extra > 0 else ""
