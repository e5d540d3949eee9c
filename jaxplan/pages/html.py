"""A `Picture` as one HTML page that needs nothing but itself. Everything that comes from a program is escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from jaxplan.pages.collapse import grouped
from jaxplan.pages.nouns import AxisView, Block, Dim, ExchangeView, InputView, LineView, Picture, StepView, SweepView
from jaxplan.report import show_bytes, show_seconds

MOST_LINES, MOST_EXCHANGES, MOST_INPUTS, MOST_CELLS = 14, 20, 400, 16
PER_GROUP = 64
"""Steps that are shown at once; those that follow are in groups to open, about so many each."""
MOST_STEPS = 4000
"""Steps on one page: of more, a browser takes long."""
TIMES = " \N{MULTIPLICATION SIGN} "
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@cache
def _part(name: str) -> str:
    """A file of this package."""
    return files("jaxplan.pages").joinpath(name).read_text(encoding="utf-8")


def page(picture: Picture) -> str:
    """The whole page."""
    title = f"Plan for {picture.function}"
    parts = [
        _head(picture), _mesh(picture), _steps(picture), _memory(picture), _lines(picture.lines), _sweep(picture.sweep),
        _inputs(picture), _exchanges(picture.exchanges), _foot(picture),
    ]  # fmt: skip
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,'
        f'initial-scale=1"><meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{escape(title)}</title>'
        f'<style>{_part("page.css")}</style></head><body><a class="skip" href="#program">To the program</a><main>'
        + "".join(parts) + f'</main><script>{_part("page.js")}</script></body></html>\n'
    )  # fmt: skip


def _head(picture: Picture) -> str:
    mesh = TIMES.join(f"{escape(axis.name)} = {axis.size}" for axis in picture.axes)
    share = picture.exchange_seconds / picture.seconds if picture.seconds else 0.0
    figures = [
        ("modelled step", show_seconds(picture.seconds)), ("of it exchanges", f"{share:.0%}"),
        ("sent per device", show_bytes(sum(axis.sent_bytes for axis in picture.axes))),
        ("peak memory per device", show_bytes(picture.peak_bytes)),
    ]  # fmt: skip
    cells = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in figures)
    notes = "".join(f'<p class="sub">{escape(note)}</p>' for note in picture.notes)
    return (
        f'<header><h1>Plan for <span class="fn">{escape(picture.function)}</span></h1>'
        f'<p class="soft">mesh {mesh}, machine {escape(picture.machine)}</p>{notes}<dl class="figures">{cells}</dl></header>'
    )


def _section(name: str, title: str, sub: str, body: str) -> str:
    head = f'<h2 id="{name}-h">{title}</h2><p class="sub">{sub}</p>'
    return f'<section id="{name}" aria-labelledby="{name}-h">{head}{body}</section>'


def _axis(number: int, name: str) -> str:
    return f'<span class="ax a{number % 6}">{escape(name)}</span>'


def _layout(dims: Sequence[Dim], axes: Sequence[AxisView]) -> str:
    """The dimensions of a tensor, each with the axes that split it."""
    if not dims:
        return '<span class="d"><i>scalar</i></span>'
    cells = [escape(name) + "".join(_axis(a, axes[a].name) for a in split) for name, split in dims]
    return f'<span class="d">{" <i>·</i> ".join(cells)}</span>'


# --- the mesh --------------------------------------------------------------------------------------------------------


def _mesh(picture: Picture) -> str:
    rows = []
    for number, axis in enumerate(picture.axes):
        roles = escape(", ".join(axis.roles)) or "left alone"
        link = f", {escape(axis.link)}" if axis.link else ""
        rows.append(
            f'<div class="axis">{_axis(number, axis.name)} <b>{axis.size} devices</b> {roles}<br>'
            f'<span class="soft">{show_bytes(axis.sent_bytes)} sent per device and call{link}</span></div>'
        )
    sub = "Each square is a device; a mesh axis is a direction along which an array may be cut."
    return _section("mesh", "Mesh", sub, f'<div class="mesh">{_grid(picture.axes)}<div>{"".join(rows)}</div></div>')


def _grid(axes: Sequence[AxisView]) -> str:
    """The last two axes as rows and columns; further ones as so many sheets, one behind the other."""
    *deep, rows, columns = [(1, -1), *((axis.size, k) for k, axis in enumerate(axes))][-max(2, len(axes)) :]
    sheets = min(3, math.prod(size for size, _ in deep))
    shown = [min(size, MOST_CELLS) for size, _ in (rows, columns)]
    side = max(7, min(36, 200 // max(shown)))
    shift, left, top = 6 * (sheets - 1), 26, 22
    width, height = left + side * shown[1] + shift + 8, top + side * shown[0] + shift + 8
    squares = []
    for sheet in reversed(range(sheets)):
        for i in range(shown[0]):
            for j in range(shown[1]):
                x, y = left + j * side + 6 * sheet, top + i * side + 6 * sheet
                squares.append(f'<rect x="{x}" y="{y}" width="{side - 2}" height="{side - 2}" rx="2"/>')
    def label(axis: tuple[int, int], shown: int) -> str:
        size, number = axis
        if number < 0:
            return ""
        return f"{axes[number].name} = {size}" + (f" (first {shown})" if shown < size else "")

    across, down = escape(label(columns, shown[1])), escape(label(rows, shown[0]))
    more = TIMES.join(f"{escape(axes[k].name)} = {size}" for size, k in deep)
    told = f"A mesh of {' by '.join(str(axis.size) for axis in axes)} devices"
    extra = f'<p class="soft">and {more} such sheets</p>' if more else ""
    return (
        f'<div><svg role="img" aria-label="{escape(told)}" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f'<g fill="var(--bg)" stroke="var(--mark)" stroke-width="1.2">{"".join(squares)}</g>'
        f'<text x="{left}" y="14">{across}</text>'
        f'<text transform="translate(16 {height - 6 - shift}) rotate(-90)">{down}</text></svg>{extra}</div>'
    )


# --- the program -----------------------------------------------------------------------------------------------------


def _steps(picture: Picture) -> str:
    most = max((s.seconds + sum(e.seconds for e in s.exchanges) for b in picture.blocks for s in b.steps), default=0.0) or 1.0
    groups, left = grouped(picture.blocks, PER_GROUP, MOST_STEPS)
    total, done, drawn = sum(len(block.steps) for group in groups for block in group) + left, 0, []
    for group in groups:
        first, done = done + 1, done + sum(len(block.steps) for block in group)
        body = "".join(_block(block, picture.axes, most) for block in group)
        if len(groups) == 1:
            drawn.append(body)
            continue
        told = f"Steps {first} to {done} of {total} <small>{_told(group, picture.seconds)}</small>"
        opened = " open" if first == 1 else ""
        drawn.append(f'<details class="group"{opened}><summary>{told}</summary>{body}</details>')
    if left:
        drawn.append(f'<p class="soft">and {left} further steps, not drawn</p>')
    sub = (
        "In program order. A boxed axis name beside a dimension means that it is cut along that axis; orange is what has to be "
        "sent. Lines at the left lead from what is made to where it is read again. Open a step for more; arrow keys walk."
    )
    return _section("program", "Program", sub, "".join(drawn) or '<p class="soft">nothing is computed</p>')


def _told(group: Sequence[Block], seconds: float) -> str:
    """What a group of blocks takes and sends, all that look alike together."""
    moves = [(block.alike, e) for block in group for step in block.steps for e in step.exchanges]
    work = math.fsum(block.alike * step.seconds for block in group for step in block.steps)
    taken = work + math.fsum(count * e.seconds for count, e in moves)
    share = f" ({taken / seconds:.0%} of the call)" if seconds else ""
    return f"{show_seconds(taken)}{share}, {show_bytes(math.fsum(count * e.nbytes for count, e in moves))} sent"


def _block(block: Block, axes: Sequence[AxisView], most: float) -> str:
    items = "".join(_step(step, axes, most) for step in block.steps)
    title = f"{block.alike} in a row that look alike" if block.alike > 1 else ""
    if block.times > 1:
        title = f"loop body, runs {block.times:g} times"
    if block.part > 1:
        title = f"{title}, continued" if title else ""
    head = f"<h3>{title}</h3>" if title else ""
    return f'<div class="block{" many" if title else ""}">{head}<ol class="steps">{items}</ol></div>'


def _step(step: StepView, axes: Sequence[AxisView], most: float) -> str:
    moved = sum(e.seconds for e in step.exchanges)
    lanes = "".join(f'<span class="lane {state}"></span>' for state in step.lanes)
    count = f" <small>{TIMES}{step.members}</small>" if step.members > 1 else ""
    moves = "".join(_move(e, axes) for e in step.exchanges[:4])
    if len(step.exchanges) > 4:
        moves += f'<span class="soft">and {len(step.exchanges) - 4} more</span>'
    cost = show_seconds(step.seconds + moved) if step.seconds + moved else ""
    splits = ", ".join(f"{_axis(a, axes[a].name)} splits {escape(dim)}" for a, dim in step.splits) or "not split"
    more = [f"{splits}.", f"Work {show_seconds(step.seconds)}, exchanges {show_seconds(moved)} per call and device."]
    for e in step.exchanges:
        more.append(escape(f"{e.kind} of {e.tensor}, {e.times:g} times: {show_bytes(e.nbytes)}, {show_seconds(e.seconds)}."))
    if step.reads:
        more.append(f"Also reads {escape(', '.join(step.reads[:6]))}{' and others' if len(step.reads) > 6 else ''}.")
    return (
        f'<li class="step"><div class="lanes" aria-hidden="true">{lanes}</div><details><summary>'
        f'<span class="op"><b>{escape(step.name)}</b>{count} <small>{escape(step.source)}</small></span>'
        f'<span class="res">{_layout(step.dims, axes)}</span>'
        f'<span class="cost n">{_bar(step.seconds, moved, most)}<small class="soft">{cost}</small></span>'
        + (f'<span class="moves">{moves}</span>' if moves else "")
        + f'</summary><div class="more">{"<br>".join(more)}</div></details></li>'
    )


def _move(e: ExchangeView, axes: Sequence[AxisView]) -> str:
    numbers = {axis.name: k for k, axis in enumerate(axes)}
    over = "".join(_axis(numbers.get(axis, 0), axis) for axis in e.axes)
    return f'<span class="move">{escape(e.kind.replace("_", "-"))} {over} {show_bytes(e.nbytes)}</span>'


def _bar(work: float, moved: float, most: float) -> str:
    """Of work and of exchanges, beside the most there is."""
    share = [100 * max(0.0, value) / most for value in (work, moved)]
    parts = [f'<span class="{name}" style="width:{value:.2f}%"></span>' for name, value in zip("wm", share, strict=True)]
    return f'<span class="bar" aria-hidden="true">{"".join(parts)}</span>'


# --- memory ----------------------------------------------------------------------------------------------------------


def _memory(picture: Picture) -> str:
    kinds = "".join(
        f'<tr><td>{escape(kind)}</td><td class="n">{show_bytes(value)}</td></tr>' for kind, value in picture.kinds.items()
    )
    live = "".join(
        f'<tr><td><span class="mono">{escape(what)}</span></td><td>{escape(kind)}</td><td class="n">{show_bytes(size)}</td></tr>'
        for what, kind, size in picture.live
    )
    tables = (
        f'<div class="scroll"><table><thead><tr><th>at the peak</th><th class="n">per device</th></tr></thead>'
        f'<tbody>{kinds}</tbody>'
        "</table></div>"
    )
    if live:
        tables += (
            '<details><summary>the largest of it</summary><div class="scroll"><table><thead><tr><th>tensors</th><th>kind</th>'
            f'<th class="n">per device</th></tr></thead><tbody>{live}</tbody></table></div></details>'
        )
    sub = "Bytes per device, in the order in which operators run; outputs count as held from the start."
    return _section("memory", "Memory over the step", sub, _curve(picture) + tables)


def _curve(picture: Picture) -> str:
    values = [picture.fixed_bytes + value for value in picture.memory]
    if not values:
        return ""
    view, high, left, bottom, right, top = 960, 210, 70, 24, 10, 14
    width, height = view - left - right, high - top - bottom
    most = max(*values, picture.peak_bytes) or 1.0
    y = [top + height * (1 - value / most) for value in values]
    step = width / len(values)
    line = " ".join(f"{left + k * step:.1f},{at:.1f} {left + (k + 1) * step:.1f},{at:.1f}" for k, at in enumerate(y))
    peak = top + height * (1 - picture.peak_bytes / most)
    base = top + height * (1 - picture.fixed_bytes / most)
    floor = top + height
    worst = max(range(len(values)), key=values.__getitem__)
    told = [f"{show_bytes(value)} at {moment}" for value, moment in zip(values, picture.moments, strict=True)]
    data = {"told": told, "worst": worst, "left": left, "width": width, "view": view}
    label = f"Memory per device over the step: at most {show_bytes(max(values))}, at {picture.moments[worst]}"
    marks = [(top + height * (1 - share), show_bytes(share * most)) for share in (0.0, 0.5, 1.0)]
    ticks = "".join(
        f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{told_there}</text>'
        f'<line x1="{left}" x2="{view - right}" y1="{at:.1f}" y2="{at:.1f}" stroke="var(--line)"/>'
        for at, told_there in marks
    )
    return (
        f'<svg id="memory-plot" role="slider" tabindex="0" aria-label="{escape(label)}" aria-valuemin="0" '
        f'aria-valuemax="{len(values) - 1}" '
        f'aria-valuenow="{worst}" aria-valuetext="{escape(told[worst])}" viewBox="0 0 {view} {high}">{ticks}'
        f'<rect x="{left}" y="{base:.1f}" width="{width}" height="{max(0.0, floor - base):.1f}" fill="var(--work)" '
        f'opacity=".28"/>'
        f'<polygon points="{left},{base:.1f} {line} {view - right},{base:.1f}" fill="var(--move)" opacity=".30"/>'
        f'<polyline points="{line}" fill="none" stroke="var(--move)" stroke-width="1.6"/>'
        f'<line x1="{left}" x2="{view - right}" y1="{peak:.1f}" y2="{peak:.1f}" stroke="var(--fg)" stroke-width="1" '
        f'opacity=".6"/>'
        f'<line id="memory-cursor" x1="0" x2="0" y1="{top}" y2="{floor}" stroke="var(--fg)" stroke-dasharray="3 3"/>'
        f'<text x="{left}" y="{high - 6}">start of the call</text><text x="{view - right}" y="{high - 6}" '
        f'text-anchor="end">end</text></svg>'
        '<p class="sub"><span class="key"><span style="background:var(--work);opacity:.5"></span>held throughout</span>'
        '<span class="key"><span style="background:var(--move)"></span>besides</span>'
        f'<span id="memory-at" class="mono" aria-live="polite">{escape(told[worst])}</span></p>{_data("memory-data", data)}'
    )


def _data(name: str, value: Any) -> str:
    """JSON in a page: nothing in it can end the element that it stands in."""
    text = json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return f'<script type="application/json" id="{name}">{text}</script>'


# --- tables ----------------------------------------------------------------------------------------------------------


def _lines(lines: Sequence[LineView]) -> str:
    if not lines:
        return ""
    most = max(line.work + line.exchange for line in lines) or 1.0
    rows = "".join(
        f'<span class="mono">{escape(line.source) or "<i>elsewhere</i>"}</span>{_bar(line.work, line.exchange, most)}'
        f'<span class="n">{show_seconds(line.work + line.exchange)}</span>'
        for line in lines[:MOST_LINES]
    )
    rest = lines[MOST_LINES:]
    left = show_seconds(sum(r.work + r.exchange for r in rest))
    more = f'<p class="soft">and {len(rest)} more lines, {left} together</p>' if rest else ""
    sub = (
        '<span class="key"><span style="background:var(--work)"></span>work</span><span class="key">'
        '<span style="background:var(--move)"></span>exchanges between operators</span> seconds per call, modelled'
    )
    return _section("lines", "Cost by source line", sub, f'<div class="lines">{rows}</div>{more}')


def _inputs(picture: Picture) -> str:
    rows = "".join(_input(one, picture.axes) for one in picture.inputs[:MOST_INPUTS])
    rest = len(picture.inputs) - MOST_INPUTS
    more = f'<p class="soft">and {rest} more</p>' if rest > 0 else ""
    body = (
        '<div class="scroll"><table><thead><tr><th>input</th><th>shape</th><th>layout</th>'
        '<th class="n">per device</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{more}"
    )
    return _section("inputs", "Inputs", "Inputs that differ by a layer's number only are one row.", body)


def _input(one: InputView, axes: Sequence[AxisView]) -> str:
    many = f' <span class="soft">{TIMES}{one.count}</span>' if one.count > 1 else ""
    return (
        f'<tr><td><span class="mono">{escape(one.path)}</span>{many}</td><td class="mono">{escape(one.kind)}</td>'
        f'<td>{_layout(one.dims, axes)}</td><td class="n">{show_bytes(one.nbytes)}</td></tr>'
    )


def _exchanges(exchanges: Sequence[ExchangeView]) -> str:
    rows = "".join(
        f'<tr><td>{escape(e.kind)} <span class="soft">for</span> {escape(e.operator)}</td><td>{escape("+".join(e.axes))}</td>'
        f'<td class="mono">{escape(e.tensor)}</td><td class="n">{e.times:g}</td><td class="n">{show_bytes(e.nbytes)}</td>'
        f'<td class="n">{show_seconds(e.seconds)}</td><td class="mono">{escape(e.source)}</td></tr>'
        for e in exchanges[:MOST_EXCHANGES]
    )
    rest = exchanges[MOST_EXCHANGES:]
    more = f'<p class="soft">and {len(rest)} more, {show_bytes(sum(e.nbytes for e in rest))} together</p>' if rest else ""
    heads = "".join(f"<th{k}>{name}</th>" for name, k in zip(
        ("exchange", "axes", "tensor", "times", "sent", "takes", "source"), ("", "", "", *[' class="n"'] * 3, ""), strict=True
    ))  # fmt: skip
    body = f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>{more}'
    return _section("exchanges", "Exchanges", "Per device and call, costliest first.", body if exchanges else "<p>none</p>")


# --- the sweep -------------------------------------------------------------------------------------------------------


def _sweep(sweep: SweepView | None) -> str:
    if sweep is None or not sweep.points:
        return ""
    here = min(sweep.here, len(sweep.points) - 1)
    data = [
        {"at": at, "seconds": show_seconds(seconds), "sent": show_bytes(sent), "peak": show_bytes(peak), "does": does}
        for at, seconds, sent, peak, does in sweep.points
    ]
    now = data[here]
    ids = (("step", "at-seconds", "seconds"), ("sent per device", "at-sent", "sent"), ("peak per device", "at-peak", "peak"))
    cells = "".join(f'<div><span>{name}</span><b id="{key}">{escape(now[field])}</b></div>' for name, key, field in ids)
    rows = "".join(
        f'<tr{" class=now" if k == here else ""}><td>{escape(p["at"])}</td><td class="n">{p["seconds"]}</td>'
        f'<td class="n">{p["sent"]}</td>'
        f'<td class="n">{p["peak"]}</td><td>{escape(p["does"])}</td></tr>'
        for k, p in enumerate(data)
    )
    body = (
        f'{_plot(sweep.points, here)}<label for="slider" class="soft">{escape(sweep.label)}</label>'
        f'<input type="range" id="slider" min="0" max="{len(data) - 1}" value="{here}" step="1" '
        f'aria-valuetext="{escape(now["at"])}">'
        f'<output id="at-label" for="slider">{escape(now["at"])}</output><div class="at">{cells}</div>'
        f'<p id="at-does" class="soft">{escape(now["does"])}</p><details><summary>as a table</summary><div class="scroll">'
        '<table id="sweep-table"><thead><tr><th></th><th class="n">step</th><th class="n">sent</th>'
        '<th class="n">peak</th><th>what the axes do</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>{_data('sweep-data', data)}"
    )
    return _section("sweep", "What if", "The best plan at each point, derived from the same trace.", body)


def _plot(points: Sequence[tuple[str, float, float, float, str]], here: int) -> str:
    """Seconds over the points, on a scale of logarithms."""
    view, high, left, top, bottom = 960, 150, 70, 12, 24
    values = [math.log(max(p[1], 1e-12)) for p in points]
    low, most = min(values), max(values)
    span = (most - low) or 1.0
    step = (view - left - 30) / max(1, len(points) - 1)
    spots = [(left + 10 + k * step, top + (high - top - bottom) * (1 - (v - low) / span)) for k, v in enumerate(values)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if k == here else 3.5}" fill="var(--mark)"/>' for k, (x, y) in enumerate(spots)
    )
    every = max(1, len(points) // 9)
    names = "".join(
        f'<text x="{x:.1f}" y="{high - 6}" text-anchor="{"end" if k + 1 == len(points) else "middle"}">'
        f"{escape(points[k][0])}</text>"
        for k, (x, _) in enumerate(spots)
        if k % every == 0
    )
    ends = f'<text x="{left - 6}" y="{top + 6}" text-anchor="end">{show_seconds(math.exp(most))}</text>'
    if most > low:
        ends += f'<text x="{left - 6}" y="{high - bottom}" text-anchor="end">{show_seconds(math.exp(low))}</text>'
    return (
        f'<svg id="sweep-plot" role="img" aria-label="Modelled step time over the sweep, in logarithms" '
        f'viewBox="0 0 {view} {high}">'
        f'<polyline points="{line}" fill="none" stroke="var(--mark)" stroke-width="1.6"/>{dots}{names}{ends}</svg>'
    )


def _foot(picture: Picture) -> str:
    told = "; ".join(f"{name} {value}" for name, value in picture.about.items())
    return f"<footer>All numbers are modelled, per device and call. {escape(told)}</footer>"
