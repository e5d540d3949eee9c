"""Room `report`: a plan as text that a person reads in a terminal, without colour."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxplan.plan import Plan

WIDTH = 110
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


def describe(plan: Plan, *, most: int = 12) -> str:
    """The whole plan: inputs, what each axis does, exchanges, totals. `most`: rows of the exchange table."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.axis_sizes.items())
    machine = plan.modelled.numbers.machine.name
    lines = [f"Plan for {plan.traced.name} on mesh ({mesh}), machine {machine}", ""]
    lines += _inputs(plan) + [""] + _axes(plan) + [""] + _exchanges(plan, most) + [""] + _totals(plan)
    return "\n".join(lines)


def _inputs(plan: Plan) -> list[str]:
    rows: list[tuple[str, ...]] = []
    alike: dict[tuple[str, ...], list[int]] = {}
    for position, path in enumerate(plan.traced.in_paths):
        aval = plan.traced.in_avals[position]
        names = " ".join(plan.names.dimension(plan.modelled.graph.inputs[position]))
        shape = f"{aval.dtype}[{','.join(map(str, aval.shape))}]"
        spec = str(plan._specs([plan.input_layouts[position]], [aval])[0]).replace("PartitionSpec", "P")
        row = (path, shape, names, spec, show_bytes(plan.input_bytes(position)))
        key = (_without_numbers(path), *row[1:])
        if key in alike:
            alike[key].append(len(rows))
            first = alike[key][0]
            rows[first] = (f"{_without_numbers(path)} (x{len(alike[key])})", *row[1:])
        else:
            alike[key] = [len(rows)]
            rows.append(row)
    return table(("input", "shape", "dims", "spec", "per device"), rows, right=(4,))


def _without_numbers(path: str) -> str:
    """blocks/3/wq -> blocks/*/wq, so that look-alikes share a line."""
    return "/".join("*" if part.isdigit() else part for part in path.split("/"))


def _axes(plan: Plan) -> list[str]:
    lines = ["axis"]
    for number, (axis, size) in enumerate(plan.axis_sizes.items()):
        roles = axis_roles(plan, number)
        text = ", ".join(roles) if roles else "left alone: no dimension that it divides is worth splitting over it"
        sent = show_bytes(plan.wire_bytes[axis])
        lines.append(f"  {axis} ({size}): {text}; {sent} sent per device and call")
    return lines


def axis_roles(plan: Plan, axis: int) -> list[str]:
    """What the field would call the work of one mesh axis, recognised from what it shards."""
    graph = plan.modelled.graph
    state = {position for _, position in graph.ties}
    roles: dict[str, None] = {}
    for position, layout in enumerate(plan.input_layouts):
        dim = layout[axis]
        if dim < 0:
            continue
        if position in state:
            roles["parameters or state sharded"] = None
        else:
            roles["data parallel" if dim == 0 else "sequence parallel" if dim == 1 else "data sharded"] = None
    if "parameters or state sharded" in roles:
        del roles["parameters or state sharded"]
        contracted, gathered, split = _uses_of_state(plan, axis, state)
        if contracted or split:
            roles["tensor parallel"] = None
        if gathered:
            roles["ZeRO (state sharded, gathered for use)"] = None
        if not (contracted or split or gathered):
            roles["ZeRO (optimizer state sharded)"] = None
    elif not roles and any(
        option[axis].factor >= 0 for option in (plan.modelled.chosen(plan.choices, i) for i in range(len(graph.clusters)))
    ):
        roles["activations sharded"] = None
    return list(roles)


def _uses_of_state(plan: Plan, axis: int, state: set[int]) -> tuple[bool, bool, bool]:
    """Whether heavy operators use sharded state as it lies (contracted or split), or gathered."""
    graph = plan.modelled.graph
    sharded = {graph.inputs[position] for position in state if plan.input_layouts[position][axis] >= 0}
    contracted = gathered = split = False
    frontier = dict.fromkeys(sharded, True)
    for reading in plan.modelled.readings:
        cluster = graph.clusters[reading.reader]
        operator = graph.operators[cluster.members[-1]]
        if reading.tensor in frontier and operator.equation is None:
            frontier.update(dict.fromkeys(operator.results, True))
    for reading in plan.modelled.readings:
        if reading.tensor not in frontier:
            continue
        cluster = graph.clusters[reading.reader]
        src, dst, _ = plan.modelled.edge_layouts(plan.choices, reading)
        if src[axis] < 0 or not cluster.work or graph.operators[cluster.members[-1]].rule.fusible:
            continue
        option = plan.modelled.chosen(plan.choices, reading.reader)[axis]
        gathered |= dst[axis] < 0
        contracted |= dst[axis] >= 0 and any(option.factor in combine.over for combine in cluster.combines)
        split |= dst[axis] >= 0
    return contracted, gathered, split


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


def _totals(plan: Plan) -> list[str]:
    wire = sum(plan.wire_bytes.values())
    planning = sum(value for name, value in plan.stages.items() if name != "trace")
    lines = [
        f"modelled step   {show_seconds(plan.seconds)}",
        f"sent            {show_bytes(wire)} per device and call",
        f"peak memory     {show_bytes(plan.peak_bytes)} per device (modelled)",
    ]
    if plan.gap is not None:
        lines.append(f"certificate     at most {plan.gap:.2%} above the optimum")
    lines.append(f"planning        {show_seconds(planning)} after {show_seconds(plan.stages.get('trace', 0.0))} of tracing")
    unknown = {op.name for op in plan.modelled.graph.operators if not op.rule.known}
    if unknown:
        lines.append(f"unknown         {', '.join(sorted(unknown))}: gathered whole; teach them with @jaxplan.rule(primitive)")
    return lines
