"""Many steps made few: layers that look alike become one block, and lines beside the steps show who reads what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxplan.pages.nouns import Block, StepView

LONGEST = 256
"""Steps that a repeated layer may have."""
LANES = 5
"""Lines beside the steps, at most."""
REACH = 14
"""Steps that a line may span; what is read from further away is told in words."""


def collapse(steps: Sequence[tuple[int, StepView]], times: Mapping[int, float]) -> tuple[Block, ...]:
    """Blocks of steps. Each step: (the loop that it stands in, 0 for none; what it shows); `times`: how often a loop runs."""
    blocks: list[Block] = []
    start = 0
    while start < len(steps):
        scope, end = steps[start][0], start
        while end < len(steps) and steps[end][0] == scope:
            end += 1
        views = [view for _, view in steps[start:end]]
        if scope:
            blocks.append(Block(tuple(views), times.get(scope, 1.0)))
        else:
            blocks += [Block(tuple(views[a : a + size]), 1.0, count) for a, size, count in repeats([_alike(v) for v in views])]
        start = end
    return tuple(blocks)


def _alike(step: StepView) -> Any:
    """Steps that look alike have this in common: all but their lines and who they read."""
    exchanges = tuple((e.kind, e.axes, e.tensor, e.operator, e.source, e.times) for e in step.exchanges)
    return step.name, step.source, step.members, step.dims, step.splits, exchanges


def repeats(keys: Sequence[Any]) -> list[tuple[int, int, int]]:
    """[(start, length, count)]: runs of `length` items that come `count` times in a row; together they make up all of `keys`.

    Greedy from the front: of all repetitions that begin at an item, the one that covers most; of these the shortest.
    """
    numbers: dict[Any, int] = {}
    items = [numbers.setdefault(key, len(numbers)) for key in keys]
    found: list[tuple[int, int, int]] = []
    plain, at = 0, 0
    while at < len(items):
        size, count = _longest(items, at)
        if count < 2:
            at += 1
            continue
        if at > plain:
            found.append((plain, at - plain, 1))
        found.append((at, size, count))
        at = plain = at + size * count
    if len(items) > plain:
        found.append((plain, len(items) - plain, 1))
    return found


def _longest(items: Sequence[int], at: int) -> tuple[int, int]:
    best = (1, 1)
    for size in range(1, min(LONGEST, (len(items) - at) // 2) + 1):
        count, layer = 1, items[at : at + size]
        while items[at + count * size : at + (count + 1) * size] == layer:
            count += 1
        if count > 1 and size * count > best[0] * best[1]:
            best = (size, count)
    return best


def lanes(edges: set[tuple[int, int]], count: int) -> list[tuple[str, ...]]:
    """Per step the state of each line beside it. Drawn are edges (from, to) over 2 to `REACH` steps, as many as `LANES` hold."""
    rows = [[""] * LANES for _ in range(count)]
    for source, reader in sorted(edges, key=lambda edge: (edge[1] - edge[0], edge)):
        if not 2 <= reader - source <= REACH:
            continue
        for lane in range(LANES):
            inside = all(not rows[k][lane] for k in range(source + 1, reader))
            if inside and rows[source][lane] in ("", "end") and rows[reader][lane] in ("", "start"):
                rows[source][lane] = "both" if rows[source][lane] else "start"
                rows[reader][lane] = "both" if rows[reader][lane] else "end"
                for k in range(source + 1, reader):
                    rows[k][lane] = "pass"
                break
    used = max((k + 1 for row in rows for k, state in enumerate(row) if state), default=0)
    return [tuple(row[:used]) for row in rows]


def grouped(blocks: Sequence[Block], size: int, most: int) -> tuple[list[list[Block]], int]:
    """Blocks in groups of about `size` steps, `most` steps in all; and how many steps are left out. Blocks stay whole, but for
    those of more than `size` steps."""
    groups: list[list[Block]] = []
    room, left = 0, 0
    for block in blocks:
        start, number = 0, 0
        while start < len(block.steps):
            rest = len(block.steps) - start
            if rest > room and (rest <= size or room < size // 2):
                groups.append([])
                room = size
            part = replace(block, steps=block.steps[start : start + room], part=(number := number + 1))
            if len(part.steps) > most:
                left, most = left + rest, 0  # nor what comes after
                break
            groups[-1].append(part)
            start, room, most = start + len(part.steps), room - len(part.steps), most - len(part.steps)
    return [group for group in groups if group], left
