"""Usages over time in flat arrays: where lifetimes overlap, what they add up to, and least values over ranges of time."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

Loads = dict[tuple[int, int], np.ndarray]
"""Usages of a node: {(begin, end): one per strategy}."""


class RangeMin:
    """Minima over half-open ranges of an array."""

    def __init__(self, values: np.ndarray) -> None:
        self.levels = [values]
        width = 1
        while 2 * width <= len(values):
            last = self.levels[-1]
            self.levels.append(np.minimum(last[:-width], last[width:]))
            width *= 2

    def over(self, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """The least of values[begin:end] for each range; none may be empty."""
        least = np.empty(len(begin))
        level = np.array([int(width).bit_length() - 1 for width in end - begin], dtype=np.int64)
        for number, row in enumerate(self.levels):
            chosen = np.flatnonzero(level == number)
            least[chosen] = np.minimum(row[begin[chosen]], row[end[chosen] - (1 << number)])
        return least


def disjoint(loads: Loads) -> Loads:
    """The same usages over spans that do not overlap, in order of time."""
    spans = sorted(loads)
    if all(left[1] <= right[0] for left, right in pairwise(spans)):
        return {span: loads[span] for span in spans}
    bounds = np.unique(spans)
    first, last = np.searchsorted(bounds, np.array(spans).T).tolist()
    joint = np.zeros((len(bounds) - 1, len(loads[spans[0]])))
    used = np.zeros(len(joint), dtype=bool)
    for span, begin, end in zip(spans, first, last):
        joint[begin:end] += loads[span]
        used[begin:end] = True
    cut = bounds.tolist()
    return {(cut[i], cut[i + 1]): joint[i] for i in np.flatnonzero(used).tolist()}


class Profiles:
    """Loads of some nodes in flat arrays, a span after the other: of node `node[i]`, [begin[i], end[i]), and its usages."""

    def __init__(self, nodes: list[int], loads: list[Loads]) -> None:
        found = [(u, *span, usage) for u in nodes for span, usage in loads[u].items()]
        self.node = np.array([row[0] for row in found], dtype=np.int64)
        self.begin = np.array([row[1] for row in found], dtype=np.int64)
        self.end = np.array([row[2] for row in found], dtype=np.int64)
        self.width = np.array([len(row[3]) for row in found], dtype=np.int64)
        self.start = np.cumsum(self.width) - self.width
        self.flat = np.concatenate([row[3] for row in found]) if found else np.zeros(0)

    def usage(self, i: int) -> np.ndarray:
        """Of a span, by the strategies of its node."""
        return self.flat[self.start[i] : self.start[i] + self.width[i]]

    def per_span(self, ufunc: np.ufunc) -> np.ndarray:
        """A ufunc reduced over the strategies of each span."""
        return ufunc.reduceat(self.flat, self.start) if len(self.start) else np.zeros(0)

    def sum_over_time(self, values: np.ndarray, size: int) -> np.ndarray:
        """(size,) sums of a value per span over the spans alive."""
        change = np.zeros(size + 1)
        np.add.at(change, self.begin, values)
        np.add.at(change, self.end, -values)
        return np.cumsum(change)[:-1]

    def lower(self, values: np.ndarray) -> None:
        """Take a value per span off its usages."""
        self.flat = self.flat - np.repeat(values, self.width)

    def changes(self, begin: np.ndarray, end: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(size + 1,) whether any strategy's usage rises, and falls, on entering each time; empty spans are ignored."""
        real = np.flatnonzero(end > begin)
        rises, falls = np.zeros(size + 1, dtype=bool), np.zeros(size + 1, dtype=bool)
        if not len(real):
            return rises, falls
        width = self.width[real]
        stop = np.cumsum(width)
        cells = np.repeat(self.start[real] - (stop - width), width) + np.arange(stop[-1])
        now = self.flat[cells]
        joined = np.zeros(len(real), dtype=bool)  # to the span before, of the same node
        joined[1:] = (self.node[real][1:] == self.node[real][:-1]) & (begin[real][1:] == end[real][:-1])
        behind = np.where(np.repeat(joined, width), now[np.maximum(np.arange(len(now)) - np.repeat(width, width), 0)], 0.0)
        rises[begin[real][np.logical_or.reduceat(now > behind, stop - width)]] = True
        falls[begin[real][np.logical_or.reduceat(now < behind, stop - width)]] = True
        last = np.ones(len(real), dtype=bool)
        last[:-1] = ~joined[1:]
        falls[end[real][last & np.logical_or.reduceat(now > 0, stop - width)]] = True
        return rises, falls

    def store(self, loads: list[Loads]) -> None:
        """Put the spans back, without those that are empty or use nothing, equal neighbours joined."""
        for u in set(self.node.tolist()):
            loads[u] = {}
        kept = np.flatnonzero((self.per_span(np.maximum) > 0) & (self.end > self.begin))
        begin, end, node, place = self.begin[kept], self.end[kept], self.node[kept], self.start[kept]
        width = self.width[kept]
        new = np.ones(len(kept), dtype=bool)  # not the span before, longer
        beside = np.flatnonzero((node[1:] == node[:-1]) & (begin[1:] == end[:-1])) + 1
        if len(beside):
            size = width[beside]
            inside = np.arange(int(size.sum())) - np.repeat(np.cumsum(size) - size, size)
            unequal = self.flat[np.repeat(place[beside], size) + inside] != self.flat[np.repeat(place[beside - 1], size) + inside]
            new[beside] = np.logical_or.reduceat(unequal, np.cumsum(size) - size)
        first = np.flatnonzero(new)
        last = np.append(first[1:], len(kept))[: len(first)] - 1
        for u, span, at, count in zip(
            node[first].tolist(), zip(begin[first].tolist(), end[last].tolist()), place[first].tolist(), width[first].tolist()
        ):
            loads[u][span] = self.flat[at : at + count]
