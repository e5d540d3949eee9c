"""A schedule as a picture: which micro-batch is on which stage, when. Text, or SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxplan.pipeline.nouns import Pipeline

CELL, HEIGHT, LEFT, TOP = 26, 24, 70, 26
"""Pixels."""
_HUES = (210, 25)
"""Degrees on the colour circle: forward, backward."""


class Slot(NamedTuple):
    """One micro-batch on the layers that a stage has of one chain. `chain`: its number in the pipeline."""

    chain: int
    microbatch: int
    reverse: bool

    def __str__(self) -> str:
        return f"{'B' if self.reverse else 'F'}{self.microbatch}"


def timetable(pipeline: Pipeline) -> tuple[tuple[Slot | None, ...], ...]:
    """Per step of time, what each stage works on, None where it waits. A step is one micro-batch through one stage's layers,
    there or back; steps in which no stage works are left out."""
    if pipeline.schedule == "1f1b":
        last = 2 * (pipeline.stages - 1)
        steps = []
        for tick in range(pipeline.microbatches + last):
            steps.append([_slot(pipeline, 0, tick - stage, False) for stage in range(pipeline.stages)])
            steps.append([_slot(pipeline, 1, tick - last + stage, True) for stage in range(pipeline.stages)])
    else:
        steps = [
            [
                _slot(pipeline, number, tick - (pipeline.stages - 1 - stage if chain.reverse else stage), chain.reverse)
                for stage in range(pipeline.stages)
            ]
            for number, chain in enumerate(pipeline.chains)
            for tick in range(pipeline.ticks)
        ]
    return tuple(tuple(step) for step in steps if any(step))


def _slot(pipeline: Pipeline, chain: int, microbatch: int, reverse: bool) -> Slot | None:
    return Slot(chain, microbatch, reverse) if 0 <= microbatch < pipeline.microbatches else None


def most_held(pipeline: Pipeline) -> tuple[int, ...]:
    """Per stage, the most micro-batches that have been forward and not yet back: whose residuals it keeps."""
    found = []
    for stage in range(pipeline.stages):
        held = most = 0
        for step in timetable(pipeline):
            slot = step[stage]
            if slot is not None:
                held += -1 if slot.reverse else 1
                most = max(most, held)
        found.append(most)
    return tuple(found)


def title(pipeline: Pipeline) -> str:
    """One line: schedule, axis, micro-batches, and the share of time in which stages wait."""
    steps = timetable(pipeline)
    cells = [slot for step in steps for slot in step]
    waiting = cells.count(None) / len(cells)
    return (
        f"{pipeline.schedule} over {pipeline.axis}: {pipeline.microbatches} micro-batches, {pipeline.stages} stages, "
        f"{len(steps)} steps, {waiting:.0%} of them waiting"
    )


def schedule_text(pipeline: Pipeline) -> str:
    """The schedule as lines of text: a row per stage, a column per step; F3 is micro-batch 3 forward, B3 the same backward."""
    steps = timetable(pipeline)
    rows = [[str(slot) if slot else "." for slot in stage] for stage in zip(*steps, strict=True)]
    width = max(len(word) for row in rows for word in row)
    head = max(len(f"stage {pipeline.stages - 1}"), 4)
    lines = [f"{f'stage {number}':<{head}}  " + " ".join(word.ljust(width) for word in row) for number, row in enumerate(rows)]
    return "\n".join([title(pipeline), *[line.rstrip() for line in lines]])


def schedule_svg(pipeline: Pipeline) -> str:
    """The same as an SVG document, with nothing outside of it. Forward and backward differ in hue, and in the letter."""
    steps = timetable(pipeline)
    width, height = LEFT + CELL * len(steps) + 10, TOP + HEIGHT * pipeline.stages + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        'font-family="sans-serif" font-size="11">',
        f"<title>{_escaped(title(pipeline))}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="4" y="16" fill="#222">{_escaped(title(pipeline))}</text>',
    ]
    for stage in range(pipeline.stages):
        y = TOP + HEIGHT * stage
        parts.append(f'<text x="4" y="{y + 16}" fill="#222">stage {stage}</text>')
        parts += _cells([step[stage] for step in steps], y, pipeline.microbatches)
    return "\n".join([*parts, "</svg>", ""])


def _cells(slots: Sequence[Slot | None], y: int, microbatches: int) -> list[str]:
    parts = []
    for number, slot in enumerate(slots):
        x = LEFT + CELL * number
        if slot is None:
            parts.append(f'<rect x="{x}" y="{y}" width="{CELL - 2}" height="{HEIGHT - 2}" fill="none" stroke="#ddd"/>')
            continue
        lightness = 88 - round(28 * slot.microbatch / max(1, microbatches - 1))
        fill = f"hsl({_HUES[slot.reverse]} 70% {lightness}%)"
        parts.append(f'<rect x="{x}" y="{y}" width="{CELL - 2}" height="{HEIGHT - 2}" fill="{fill}" stroke="#666"/>')
        parts.append(f'<text x="{x + (CELL - 2) / 2:g}" y="{y + 15}" text-anchor="middle" fill="#111">{slot}</text>')
    return parts


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
