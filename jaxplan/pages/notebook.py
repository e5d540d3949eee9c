"""Tables for notebooks: HTML without a script or a style sheet, everything escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from jaxplan.pages.gather import inputs_of
from jaxplan.plan import Plan
from jaxplan.report import axis_roles, show_bytes, show_seconds


def fragment(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], notes: Iterable[str] = ()) -> str:
    """A titled table, and sentences below it."""
    left = ' style="text-align:left"'
    head = "".join(f"<th{left}>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td{left}>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    told = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<div><strong>{escape(title)}</strong><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{told}</div>"


def plan_table(plan: Plan) -> str:
    """The inputs and their layouts, what each axis does, and the totals."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.axis_sizes.items())
    rows = []
    for one in inputs_of(plan):
        dims = " ".join(name + ("/" + "+".join(plan.axis_names[a] for a in axes) if axes else "") for name, axes in one.dims)
        path = f"{one.path} (x{one.count})" if one.count > 1 else one.path
        rows.append((path, one.kind, dims or "scalar", show_bytes(one.nbytes)))
    notes = [
        f"{axis} ({size}): {', '.join(axis_roles(plan, k)) or 'left alone'}; {show_bytes(plan.wire_bytes[axis])} sent per device"
        for k, (axis, size) in enumerate(plan.axis_sizes.items())
    ]
    totals = f"modelled step {show_seconds(plan.seconds)}, peak {show_bytes(plan.peak_bytes)} per device"
    notes.append(f"{totals}; save_html(path) draws it")
    title = f"Plan for {plan.traced.name} on mesh ({mesh}), machine {plan.modelled.numbers.machine.name}"
    return fragment(title, ("input", "shape", "dimension/axes", "per device"), rows, notes)
