"""Where a compiler puts buffers that come and go, and how high they reach.

XLA on TPU takes buffers in the order in which they come to live: each gets the smallest free place that holds it, and nothing is
moved. So its heap can be higher than what lives in it at once: by a quarter in training steps compiled for v5e
([memory](../../docs/memory.md)).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

import numpy as np

Below = tuple["Below", int] | None
"""What a place stands on: (what that stands on, the number of a buffer); None: the bottom."""


def stack_in_order(spans: Sequence[tuple[int, int, int]]) -> list[int]:
    """The buffers that the highest address stands on, as numbers of `spans`, from the bottom to the top; their sizes add up to
    the height of the heap. Not all of them need be alive at once: a place that is free again may be too small for what comes.

    `spans`: (first place, last place, bytes) of each buffer; both places included.
    """
    events = [(first, 0, -size, number) for number, (first, _, size) in enumerate(spans) if size]
    events += [(last, 1, 0, number) for number, (_, last, size) in enumerate(spans) if size]
    free: list[tuple[int, int]] = []  # (start, end), sorted, none next to another
    stands: dict[int, Below] = {0: None}  # what the start of a free place stands on
    at: dict[int, tuple[int, Below]] = {}
    top, summit = 0, None
    for _, ends, _, number in sorted(events):
        size = spans[number][2]
        if ends:
            start, below = at.pop(number)
            stands[start] = below
            _release(free, start, start + size)
            continue
        fits = [(end - start, start) for start, end in free if end - start >= size]
        if fits:
            room, start = min(fits)
            free.remove((start, start + room))
        elif free and free[-1][1] == top:
            (start, _), room = free.pop(), 0
        else:
            start, room = top, 0
            stands[start] = summit
        below = stands[start]
        at[number] = start, below
        if room > size:
            insort(free, (start + size, start + room))
            stands[start + size] = (below, number)
        if start + size > top:
            top, summit = start + size, (below, number)
    chain = []
    while summit is not None:
        summit, number = summit
        chain.append(number)
    return chain[::-1]


def _release(free: list[tuple[int, int]], start: int, end: int) -> None:
    """Give a place back, joined with free neighbours."""
    for place in [place for place in free if place[1] == start or place[0] == end]:
        free.remove(place)
        start, end = min(start, place[0]), max(end, place[1])
    insort(free, (start, end))


def stack_by_size(spans: Sequence[tuple[int, int, int]]) -> list[int]:
    """The same where buffers are placed largest first, of equal ones those that live longest, each in the smallest gap between
    those that live when it does (XLA on CPU)."""
    longest = sorted([i for i, (_, _, size) in enumerate(spans) if size], key=lambda i: (-spans[i][2], spans[i][0] - spans[i][1]))
    first, last, start, end = (np.zeros(len(longest), dtype=np.int64) for _ in range(4))
    below, top = dict[int, int](), -1
    for placed, number in enumerate(longest):
        begins, ends, size = spans[number]
        beside = np.flatnonzero((first[:placed] <= ends) & (last[:placed] >= begins))
        beside = beside[np.argsort(start[beside], kind="stable")]
        reached, under = np.maximum.accumulate(end[beside]), -1
        floors = np.concatenate(([0], reached))
        gaps = start[beside] - floors[:-1]
        fits = np.flatnonzero(gaps >= size)
        at = int(floors[fits[gaps[fits].argmin()]]) if len(fits) else int(floors[-1])
        if at:
            under = int(beside[end[beside] == at][0])
        first[placed], last[placed], start[placed], end[placed] = begins, ends, at, at + size
        below[placed] = under
        if top < 0 or end[placed] > end[top]:
            top = placed
    chain = []
    while top >= 0:
        chain.append(longest[top])
        top = below[top]
    return chain[::-1]
