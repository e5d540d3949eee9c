"""A saved plan as text, from the file alone: the page that `print(plan)` gives, less what takes the function to know."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping

from jaxplan.files.fold import fold_paths
from jaxplan.files.nouns import Entries, Leaf, SavedPlan
from jaxplan.report import WIDTH, peak_lines, show_bytes, show_seconds, table

MOST_LIVE = 3


def describe_saved(saved: SavedPlan, *, outputs: bool = False, most: int = 12) -> str:
    """The page. `outputs`: with a table of them; `most`: rows of the exchange table."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in saved.mesh_shape.items())
    lines = [f"Plan for {saved.function} on mesh ({mesh}), machine {saved.machine.name}", ""]
    lines += [*_leaves("input", saved.inputs), ""]
    if outputs:
        lines += [*_leaves("output", saved.outputs), ""]
    return "\n".join([*lines, *_axes(saved), "", *_exchanges(saved, most), "", *_totals(saved)])


def show_spec(spec: Entries) -> str:
    """P(None, ('data', 'model'))."""
    return f"P({', '.join(map(repr, spec))}{',' if len(spec) == 1 else ''})"


def _leaves(what: str, leaves: Mapping[str, Leaf]) -> list[str]:
    staged = any(leaf.stage is not None for leaf in leaves.values())
    rows = []
    for path, leaf in fold_paths(leaves).items():
        where = [str(leaf.stage)] if staged else []
        rows.append((path, leaf.kind, " ".join(leaf.dims), *where, show_spec(leaf.spec), show_bytes(leaf.bytes)))
    header = (what, "shape", "dims", *(["stage"] if staged else []), "spec", "per device")
    return table(header, rows, right=(3, 5) if staged else (4,))


def _axes(saved: SavedPlan) -> list[str]:
    lines = ["axis"]
    for axis in saved.mesh:
        text = ", ".join(axis.roles) or "left alone"
        lines += textwrap.wrap(f"  {axis.name} ({axis.size}): {text}", WIDTH, subsequent_indent="      ")
        lines.append(f"      {show_bytes(axis.sent_bytes)} sent per device and call")
    return lines


def _exchanges(saved: SavedPlan, most: int) -> list[str]:
    if not saved.exchanges:
        return ["exchanges: none"]
    rows = []
    for e in saved.exchanges[:most]:
        tensor, sent = f"{e.dtype}[{','.join(map(str, e.shape))}]", show_bytes(math.fsum(e.bytes.values()))
        where = (f"{e.kind} for {e.operator}", "+".join(e.axes), tensor, f"{e.times:g}", sent)
        rows.append((*where, show_seconds(e.seconds), e.source))
    lines = table(("exchange", "axes", "tensor", "times", "sent/device", "takes", "source"), rows, right=(3, 4, 5))
    rest = saved.exchanges[most:]
    if rest:
        sent = show_bytes(math.fsum(sum(e.bytes.values()) for e in rest))
        lines.append(f"  and {len(rest)} more, {sent} together")
    return lines


def _totals(saved: SavedPlan) -> list[str]:
    cost, held, made = saved.cost, saved.memory, saved.versions
    lines = [
        f"modelled step   {show_seconds(cost.seconds)}, {show_seconds(cost.exchange_seconds)} of it exchanges",
        f"sent            {show_bytes(saved.wire_bytes)} per device and call",
        *peak_lines(held.peak_bytes, held.kinds),
    ]
    for one in held.live[:MOST_LIVE]:
        many, each = f"{one.count} x " if one.count > 1 else "", f"{one.dtype}[{','.join(map(str, one.shape))}]"
        size = show_bytes(one.count * one.bytes)
        lines.append(f"                {many}{one.name} {each} ({one.kind}), {size} {one.source}".rstrip())
    if saved.pipeline is not None or saved.stages is not None:
        lines.append(f"pipeline        {saved.pipeline or saved.stages}")
    if cost.bound is not None:
        lines.append(f"certificate     no plan takes less than {show_seconds(cost.bound)}")
    if saved.unknown:
        lines.append(f"unknown         {', '.join(saved.unknown)}: gathered whole; teach them with @jaxplan.rule(primitive)")
    equations = sum(entry.count for entry in saved.program.primitives.values())
    lines.append(f"program         {equations:,} equations, fingerprint {saved.program.fingerprint[:12]}")
    return [*lines, f"written by      jaxplan {made['jaxplan']} with JAX {made['jax']}"]
