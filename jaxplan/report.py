"""Room `report`: a plan as text that a person reads in a terminal, without colour."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxplan.cost.formulas import bubble_share
from jaxplan.graph.flatten import BOUNDARY, VIEW
from jaxplan.ledger import ledger
from jaxplan.paths import alike, several
from jaxplan.pipeline import Pipeline
from jaxplan.plan import Plan

WIDTH = 110
MOST_LIVE = 5
"""Rows of what lives at the peak."""
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def show_bytes(value: float) -> str:
    """1536 -> "1.50 KiB"."""
    for unit in UNITS:
        if abs(value) < 1024 or unit == UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def show_seconds(value: float) -> str:
    """0.00153 -> "1.53 ms"."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Aligned columns; those in `right` to the right. Long cells keep their end, which tells more of a path."""
    rows = [tuple(map(str, row)) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    spare = WIDTH - sum(widths[1:]) - 2 * len(widths)
    widths[0] = max(8, min(widths[0], spare))
    right = set(right)

    def line(cells: Sequence[str]) -> str:
        shown = []
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            cell = cell if len(cell) <= width else "…" + cell[len(cell) - width + 1 :]
            shown.append(cell.rjust(width) if i in right else cell.ljust(width))
        return "  ".join(shown).rstrip()

    return [line(header), *map(line, rows)]


def describe(plan: Plan, *, most: int = 12, notes: Sequence[str] = ()) -> str:
    """The whole plan: inputs, what each axis does, exchanges, totals. `most`: rows of the exchange table. `notes`: lines that
    close it."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.axis_sizes.items())
    machine = plan.modelled.numbers.machine.name
    lines = [f"Plan for {plan.traced.name} on mesh ({mesh}), machine {machine}", ""]
    lines += _inputs(plan) + [""] + _axes(plan) + [""] + _exchanges(plan, most) + [""] + _live(plan) + [""] + _totals(plan)
    lines += notes
    return "\n".join(lines)


def _inputs(plan: Plan) -> list[str]:
    groups: dict[tuple[Any, ...], list[str]] = {}
    for position, path in enumerate(plan.traced.in_paths):
        aval = plan.traced.in_avals[position]
        names = " ".join(plan.names.dimension(plan.modelled.graph.inputs[position]))
        shape = f"{aval.dtype}[{','.join(map(str, aval.shape))}]"
        spec = str(plan._specs([plan.input_layouts[position]], [aval])[0]).replace("PartitionSpec", "P")
        row = (shape, names, spec, show_bytes(plan.input_bytes(position)))
        groups.setdefault((alike(path), *row), []).append(path)
    rows = [(several(paths), *row) for (_, *row), paths in groups.items()]
    return table(("input", "shape", "dims", "spec", "per device"), rows, right=(4,))


def _axes(plan: Plan) -> list[str]:
    lines = ["axis"]
    for number, (axis, size) in enumerate(plan.axis_sizes.items()):
        roles = axis_roles(plan, number)
        text = ", ".join(roles) if roles else "left alone: no dimension that it divides is worth splitting over it"
        sent = show_bytes(plan.wire_bytes[axis])
        lines += textwrap.wrap(f"  {axis} ({size}): {text}", WIDTH, subsequent_indent="      ")
        lines.append(f"      {sent} sent per device and call")
    return lines


def axis_roles(plan: Plan, axis: int) -> list[str]:
    """What the field would call the work of one mesh axis, recognised from what it splits; the largest share first."""
    shares = _work_by_dimension(plan, axis)
    total = sum(shares.values())
    names: dict[str, list[str]] = {}
    for (role, dimension), flops in sorted(shares.items(), key=lambda item: -item[1]):
        if role and flops > 0.005 * total:
            names.setdefault(role, []).append(f"{dimension} {flops / total:.0%}")
    roles = [f"{role} ({', '.join(parts)} of the work)" for role, parts in names.items()]
    if plan.pipeline is not None and plan.axis_names[axis] == plan.pipeline.axis:
        roles.insert(0, stage_role(plan.pipeline))
    gathered = _state_gathered(plan, axis)
    if gathered:
        roles.append(f"ZeRO ({show_bytes(gathered)} of state sharded, gathered for use)")
    if not roles and any(layout[axis] >= 0 for layout in plan.layouts.values()):
        roles.append("activations sharded")
    return roles


def stage_role(pipeline: Pipeline) -> str:
    """pipeline (12 layers, 3 on each stage), 8 micro-batches, gpipe, bubble 27.3%."""
    told = []
    for layers in dict.fromkeys(chain.layers for chain in pipeline.chains):
        each = f"{layers[0]} on each stage" if len(set(layers)) == 1 else f"{'+'.join(map(str, layers))} on the stages"
        told.append(f"{sum(layers)} layers, {each}")
    idle = bubble_share(pipeline.microbatches, pipeline.stages)
    count = "1 micro-batch" if pipeline.microbatches == 1 else f"{pipeline.microbatches} micro-batches"
    return f"pipeline ({'; '.join(told)}), {count}, {pipeline.schedule}, bubble {idle:.1%}"


def _work_by_dimension(plan: Plan, axis: int) -> dict[tuple[str, str], float]:
    """{(role, dimension name): operations} of what an axis splits; role "" for work that it does not split."""
    graph = plan.modelled.graph
    state = {position for _, position in graph.ties}
    kept = {name for position in state for name in plan.names.dimension(graph.inputs[position])}
    place: dict[str, int] = {}
    for position, tensor in enumerate(graph.inputs):
        if position not in state:
            for dim, name in enumerate(plan.names.dimension(tensor)):
                place[name] = min(dim, place.get(name, dim))
    shares: dict[tuple[str, str], float] = {}
    for index, cluster in enumerate(graph.clusters):
        flops = sum(work.flops for work in cluster.work) * cluster.times
        factor = plan.modelled.chosen(plan.choices, index)[axis].factor
        key = ("", "")
        if factor >= 0 and factor != cluster.alone:
            terminals = [t for t in (*cluster.reads, *cluster.writes) if factor in t.leads]
            names = [plan.names.dimension(t.tensor)[t.leads.index(factor)] for t in terminals]
            name = next((n for n in names if n in place), names[0] if names else "?")
            everywhere = len(terminals) == len(cluster.reads) + len(cluster.writes) > 2
            key = (_role(place.get(name), name in kept, everywhere), name)
        shares[key] = shares.get(key, 0.0) + flops
    return shares


def _role(position: int | None, of_state: bool, everywhere: bool) -> str:
    """`position`: where the dimension stands in the program's data; `of_state`: parameters have it too (features do, and so do
    sequences with learned positions); `everywhere`: all operands and results carry it."""
    if position == 0:
        return "data parallel"
    if position is not None:
        return "sequence or tensor parallel" if of_state else "sequence parallel"
    return "expert or head parallel" if everywhere else "tensor parallel"


def _state_gathered(plan: Plan, axis: int) -> float:
    """Bytes of state that lie sharded over an axis, or are updated so, but are gathered to be used (that is ZeRO)."""
    graph = plan.modelled.graph
    state = {graph.inputs[position] for _, position in graph.ties} | {graph.outputs[output] for output, _ in graph.ties}
    gathered = {}
    for reading in plan.modelled.readings:
        producer = graph.operators[graph.clusters[reading.writer].members[-1]]
        source = producer.operands[0] if producer.name in (VIEW, BOUNDARY) else reading.tensor
        src, dst, _ = plan.modelled.edge_layouts(plan.choices, reading)
        if source in state and src[axis] >= 0 > dst[axis]:
            gathered[source] = graph.tensors[source].nbytes
    return float(sum(gathered.values()))


def _exchanges(plan: Plan, most: int) -> list[str]:
    merged: dict[tuple, list[float]] = {}
    for e in plan.exchanges:
        key = (e.kind, e.axes, e.shape, e.dtype, e.source, e.operator)
        entry = merged.setdefault(key, [0.0, 0.0])
        entry[0] += e.times
        entry[1] += e.total_bytes
    if not merged:
        return ["exchanges: none"]
    ordered = sorted(merged.items(), key=lambda item: -item[1][1])
    rows = [
        (
            f"{kind} for {operator}", "+".join(axes), f"{dtype}[{','.join(map(str, shape))}]", f"{times:g}",
            show_bytes(total), source,
        )
        for (kind, axes, shape, dtype, source, operator), (times, total) in ordered[:most]
    ]  # fmt: skip
    lines = table(("exchange", "axes", "tensor", "times", "sent/device", "source"), rows, right=(3, 4))
    if len(ordered) > most:
        rest = sum(total for _, (_, total) in ordered[most:])
        lines.append(f"  and {len(ordered) - most} more, {show_bytes(rest)} together")
    return lines


def _live(plan: Plan) -> list[str]:
    """The largest of what lives at the peak."""
    rows = []
    for entry in ledger(plan).entries[:MOST_LIVE]:
        many = f"{entry.count} x " if entry.count > 1 else ""
        each = f"{entry.dtype}[{','.join(map(str, entry.shape))}]"
        rows.append((f"{many}{entry.name}", each, entry.kind, show_bytes(entry.total), entry.source))
    return table(("at the peak", "tensor", "kind", "per device", "source"), rows, right=(3,))


def peak_lines(peak: float, kinds: Mapping[str, float]) -> list[str]:
    """The peak and its parts, all in bytes per device."""
    parts = ", ".join(f"{show_bytes(value)} {kind}" for kind, value in kinds.items())
    told = f"peak memory     {show_bytes(peak)} per device (modelled): {parts}"
    return textwrap.wrap(told, WIDTH, subsequent_indent=" " * 16)


def _totals(plan: Plan) -> list[str]:
    wire, held = sum(plan.wire_bytes.values()), ledger(plan)
    planning = sum(value for name, value in plan.stages.items() if name != "trace")
    lines = [
        f"modelled step   {show_seconds(plan.seconds)}",
        f"sent            {show_bytes(wire)} per device and call",
        *peak_lines(plan.peak_bytes, held.by_kind),
    ]
    if plan.bound is not None and plan.gap is not None:
        proven = f"no plan takes less than {show_seconds(plan.bound)}"
        lines.append(f"certificate     at most {plan.gap:.2%} above the optimum: {proven}")
    lines.append(f"planning        {show_seconds(planning)} after {show_seconds(plan.stages.get('trace', 0.0))} of tracing")
    unknown = {op.name for op in plan.modelled.graph.operators if not op.rule.known}
    if unknown:
        lines.append(f"unknown         {', '.join(sorted(unknown))}: gathered whole; teach them with @jaxplan.rule(primitive)")
    return lines
