"""From a `Plan` to what a page shows of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from jaxplan.cost import reshard_steps, running_order
from jaxplan.cost.formulas import ROUNDS, exchange_seconds
from jaxplan.graph.flatten import BOUNDARY, INPUT, VIEW
from jaxplan.ledger import ledger
from jaxplan.machine import axis_links
from jaxplan.pages.collapse import collapse, lanes
from jaxplan.pages.nouns import AxisView, Block, Dim, ExchangeView, InputView, LineView, Picture, StepView
from jaxplan.paths import alike, starred
from jaxplan.plan import Plan, PlannedExchange
from jaxplan.reasons import charges
from jaxplan.report import axis_roles

MOMENTS = 320
"""Points of the curve of memory."""
SMALL = 0.002
"""Operators in a row that exchange nothing and take less than this share of the call, each, are shown as one."""
MOST_LIVE = 12


def picture_of(plan: Plan) -> Picture:
    """All but the sweep."""
    seconds = charges(plan)
    work = math.fsum(c.seconds for (kind, _), c in seconds.items() if kind == "cluster")
    exchanges = _exchanges(plan)
    memory, moments = _memory(plan)
    held, found = plan.memory, ledger(plan)
    live = tuple((str(e), e.kind, e.total) for e in found.entries[:MOST_LIVE])
    return Picture(
        plan.traced.name, plan.modelled.numbers.machine.name, _axes(plan), plan.seconds, max(0.0, plan.seconds - work),
        plan.peak_bytes, found.by_kind, inputs_of(plan), _blocks(plan), exchanges, _lines(plan), memory, moments,
        held.arguments + held.outputs, live,
    )  # fmt: skip


def _axes(plan: Plan) -> tuple[AxisView, ...]:
    links = axis_links(plan.modelled.numbers.machine, plan.axis_sizes)
    return tuple(
        AxisView(
            name, size, tuple(axis_roles(plan, number)), plan.wire_bytes[name],
            f"{1e-9 / links[name].seconds_per_byte:.4g} GB/s, {1e6 * links[name].latency_seconds:.3g} us",
        )
        for number, (name, size) in enumerate(plan.axis_sizes.items())
    )  # fmt: skip


def _dims(plan: Plan, tensor: int) -> tuple[Dim, ...]:
    """The dimensions of a tensor, with the axes that split each."""
    layout = plan.layouts.get(tensor, (-1,) * len(plan.axis_names))
    names = plan.names.dimension(tensor)
    return tuple(zip(names, plan.spec(layout, len(names)), strict=True))


def inputs_of(plan: Plan) -> tuple[InputView, ...]:
    """The inputs of a plan; those that differ by a layer's number only, together."""
    found: dict[tuple, list[int]] = {}
    kinds = [f"{aval.dtype}[{','.join(map(str, aval.shape))}]" for aval in plan.traced.in_avals]
    dims = [_dims(plan, tensor) for tensor in plan.modelled.graph.inputs]
    for position, path in enumerate(plan.traced.in_paths):
        found.setdefault((alike(path), kinds[position], dims[position]), []).append(position)
    views = []
    for group in found.values():
        name, first = starred([plan.traced.in_paths[i] for i in group]), group[0]
        views.append(InputView(name, kinds[first], dims[first], len(group), plan.input_bytes(first)))
    return tuple(views)


def _seconds(plan: Plan, exchange: PlannedExchange) -> float:
    links = dict(zip(plan.axis_names, map(plan.modelled.numbers.link, range(len(plan.axis_names))), strict=True))
    each = [exchange_seconds(v, ROUNDS[exchange.kind], *links[axis]) for axis, v in exchange.wire_bytes.items()]
    return math.fsum(each) * exchange.times


def _view(plan: Plan, e: PlannedExchange) -> ExchangeView:
    tensor = f"{e.dtype}[{','.join(map(str, e.shape))}]"
    return ExchangeView(e.kind, e.axes, tensor, e.operator, e.source, e.times, e.total_bytes, _seconds(plan, e))


def merged(views: Sequence[ExchangeView]) -> tuple[ExchangeView, ...]:
    """Alike ones together, most bytes first."""
    found: dict[tuple, ExchangeView] = {}
    for e in views:
        key = (e.kind, e.axes, e.tensor, e.operator, e.source)
        old = found.get(key)
        found[key] = e if old is None else replace(
            old, times=old.times + e.times, nbytes=old.nbytes + e.nbytes, seconds=old.seconds + e.seconds
        )  # fmt: skip
    return tuple(sorted(found.values(), key=lambda e: -e.nbytes))


def _exchanges(plan: Plan) -> tuple[ExchangeView, ...]:
    return merged([_view(plan, e) for e in plan.exchanges])


def _lines(plan: Plan) -> tuple[LineView, ...]:
    """Costliest first."""
    found: dict[str, LineView] = {}
    for (kind, _), charge in charges(plan).items():
        old = found.get(charge.source, LineView(charge.source, 0.0, 0.0))
        if kind == "cluster":
            found[charge.source] = replace(old, work=old.work + charge.seconds)
        else:
            found[charge.source] = replace(old, exchange=old.exchange + charge.seconds)
    return tuple(sorted(found.values(), key=lambda line: -(line.work + line.exchange)))


def _memory(plan: Plan) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """Temporaries over the step: of each stretch of the order of operators the most that lives, and what runs at that moment."""
    over, operators = plan.memory.over, plan.modelled.graph.operators
    sequence = running_order(plan.modelled, plan.choices)
    count = min(MOMENTS, len(over))
    values, told = [], []
    for k in range(count):
        low, high = k * len(over) // count, (k + 1) * len(over) // count
        at = max(range(low, high), key=lambda place: over[place])
        values.append(float(over[at]))
        operator = operators[sequence[min(at, len(sequence) - 1)]] if sequence else None
        told.append(" ".join(filter(None, (operator.name, plan.source(operator)))) if operator is not None else "")
    return tuple(values), tuple(told)


# --- the steps of the program ----------------------------------------------------------------------------------------


def _blocks(plan: Plan) -> tuple[Block, ...]:
    """Clusters in program order, small ones in a row as one, in blocks: the body of a loop, or layers that look alike."""
    graph, modelled = plan.modelled.graph, plan.modelled
    stands = _stands_for(plan)
    moves = _moves(plan, stands)
    steps: list[tuple[int, StepView]] = []
    place: dict[int, int] = {}
    costs = charges(plan)
    small: list[int] = []
    for index, cluster in enumerate(graph.clusters):
        operator = graph.operators[cluster.members[-1]]
        if operator.name in (INPUT, VIEW, BOUNDARY):
            continue
        seconds = costs[key].seconds if (key := ("cluster", index)) in costs else 0.0
        scope = operator.scope if cluster.times > 1 else 0
        splits = tuple(
            (axis, _factor_name(plan, index, option.factor))
            for axis, option in enumerate(modelled.chosen(plan.choices, index))
            if option.factor >= 0
        )
        dims = _dims(plan, cluster.writes[0].tensor) if cluster.writes else ()
        view = StepView(operator.name, plan.source(operator), len(cluster.members), seconds, dims, splits, moves.get(index, ()))
        heavy = any(not graph.operators[m].rule.fusible and graph.operators[m].rule.flops for m in cluster.members)
        minor = not heavy and not view.exchanges and seconds < SMALL * plan.seconds
        if minor and small and steps[-1][0] == scope and place[small[-1]] == len(steps) - 1:
            before = steps[-1][1]
            steps[-1] = (scope, replace(before, name="small operators", members=before.members + view.members,
                                        seconds=before.seconds + seconds, dims=dims, splits=splits))  # fmt: skip
        else:
            steps.append((scope, view))
        small = [*small, index] if minor else []
        place[index] = len(steps) - 1
    ends = [(stands.get(r.writer, r.writer), stands.get(r.reader, r.reader)) for r in modelled.readings]
    edges = {(place[source], place[reader]) for source, reader in ends if source in place and reader in place}
    times = {op.scope: op.times for op in graph.operators if op.times > 1}
    return collapse(_with_lanes(steps, edges), times)


def _with_lanes(steps: list[tuple[int, StepView]], edges: set[tuple[int, int]]) -> list[tuple[int, StepView]]:
    """The steps with the lines beside them, and in words what they read from further away."""
    drawn = lanes(edges, len(steps))
    reads: dict[int, list[int]] = {}
    for source, reader in sorted(edges):
        if source != reader - 1 and source < reader:
            reads.setdefault(reader, []).append(source)
    found = []
    for number, (scope, step) in enumerate(steps):
        told = tuple(dict.fromkeys(_name(steps[source][1]) for source in reads.get(number, ())))
        found.append((scope, replace(step, lanes=drawn[number], reads=told)))
    return found


def _name(step: StepView) -> str:
    return f"{step.name} {step.source}".strip()


def _factor_name(plan: Plan, index: int, factor: int) -> str:
    cluster = plan.modelled.graph.clusters[index]
    for terminal in (*cluster.writes, *cluster.reads):
        if factor in terminal.leads:
            return plan.names.dimension(terminal.tensor)[terminal.leads.index(factor)]
    return "?"


def _stands_for(plan: Plan) -> dict[int, int]:
    """{a view, or the edge of a loop: the cluster that it is seen as}: the reader of a view, the writer of what leaves a loop."""
    graph, found = plan.modelled.graph, {}
    names = [graph.operators[cluster.members[-1]].name for cluster in graph.clusters]
    for reading in plan.modelled.readings:
        if names[reading.writer] in (VIEW, BOUNDARY) and names[reading.reader] not in (INPUT, VIEW, BOUNDARY):
            found.setdefault(reading.writer, reading.reader)
    for reading in plan.modelled.readings:
        if names[reading.reader] in (VIEW, BOUNDARY) and reading.reader not in found:
            found[reading.reader] = reading.writer
        if names[reading.reader] == INPUT:
            found.setdefault(reading.reader, reading.writer)  # state that goes back to where it came from
    return found


def _moves(plan: Plan, stands: Mapping[int, int]) -> dict[int, tuple[ExchangeView, ...]]:
    """Per cluster the exchanges that it asks for: of what it reads, and of what it leaves partial."""
    modelled, graph = plan.modelled, plan.modelled.graph
    of_operator = {member: index for index, cluster in enumerate(graph.clusters) for member in cluster.members}
    found: dict[int, list[ExchangeView]] = {}
    for index, cluster in enumerate(graph.clusters):
        for exchange in plan.combined(index):
            found.setdefault(of_operator[cluster.members[-1]], []).append(_view(plan, exchange))
    for reading in modelled.readings:
        steps = reshard_steps(*modelled.edge_layouts(plan.choices, reading), modelled.setting.order)
        if steps:
            reader = stands.get(reading.reader, reading.reader)
            operator = graph.clusters[reader].members[-1]
            views = [_view(plan, e) for e in plan.moved(steps, reading.tensor, operator, reading.times, reading.sent)]
            found.setdefault(reader, []).extend(views)
    return {index: merged(views) for index, views in found.items()}
