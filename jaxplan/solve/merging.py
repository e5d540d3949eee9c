"""The best of several assignments at once, exactly: a node may take the position it has in any of them.

Assignments of one problem that were improved apart agree on most nodes. What is left is a small problem with few positions a
node and little width, which elimination solves (after Cook and Seymour, Tour merging via branch-decomposition, INFORMS Journal
on Computing 2003, for another problem). Usages enter at prices.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np

from jaxplan.solve.core import Core

CELLS = 1 << 11
"""Cells of the largest table in elimination; beyond, a node stays where it is."""


class Bucket:
    """The small problem at several prices at once: costs per node, tables over some of them, and who shares a table with whom.

    The first dimension of costs and tables is the price; it has length 1 where the price does not matter.
    """

    def __init__(self, costs: list[np.ndarray]) -> None:
        self.costs = costs
        self.sizes = [cost.shape[1] for cost in costs]
        self.near: list[set[int]] = [set() for _ in costs]
        self.mine: list[list[tuple[tuple[int, ...], np.ndarray]]] = [[] for _ in costs]
        self.gone = np.zeros(len(costs), dtype=bool)

    def put(self, nodes: tuple[int, ...], table: np.ndarray) -> None:
        """Add a table over prices and nodes, these in rising order."""
        if len(nodes) == 1:
            self.costs[nodes[0]] = self.costs[nodes[0]] + table
        elif nodes:
            entry = nodes, table
            for u in nodes:
                self.mine[u].append(entry)
                self.near[u].update(nodes)
                self.near[u].discard(u)

    def take(self, v: int) -> list[tuple[tuple[int, ...], np.ndarray]]:
        """Take a node and its tables out."""
        self.gone[v] = True
        tables, self.mine[v] = self.mine[v], []
        for u in self.near[v]:
            self.near[u].discard(v)
            self.mine[u] = [entry for entry in self.mine[u] if v not in entry[0]]
        return tables

    def cells(self, v: int) -> int:
        """Of the table that eliminating the node takes, per price."""
        return self.sizes[v] * math.prod([self.sizes[u] for u in self.near[v]])

    def fix(self, v: int) -> None:
        """Leave a node at its first position."""
        for nodes, table in self.take(v):
            axis = nodes.index(v)
            self.put(nodes[:axis] + nodes[axis + 1 :], table.take(0, axis=axis + 1))

    def eliminate(self, v: int) -> tuple[tuple[int, ...], np.ndarray]:
        """Decide a node by its neighbours: (they, its best position by price and theirs)."""
        around = tuple(sorted(self.near[v]))
        place = {u: axis for axis, u in enumerate(around, 1)}
        place[v] = len(around) + 1
        joint = self.costs[v].reshape([len(self.costs[v])] + [1] * len(around) + [self.sizes[v]])
        for nodes, table in self.take(v):
            shape = [len(table)] + [1] * (len(around) + 1)
            for u in nodes:
                shape[place[u]] = self.sizes[u]
            if nodes[-1] != v:  # all others are in rising order
                table = np.moveaxis(table, nodes.index(v) + 1, -1)
            joint = joint + table.reshape(shape)
        best = joint.argmin(axis=-1)
        self.put(around, joint.min(axis=-1))
        return around, best

    def solve(self, cells: int, prices: int) -> np.ndarray:
        """(prices, nodes) positions of least cost; where tables would get too large, hubs are fixed at their first position."""
        heap = [(self.cells(v), v) for v in range(len(self.costs))]
        heapq.heapify(heap)
        steps: list[tuple[int, tuple[int, ...], np.ndarray]] = []
        while heap:
            size, v = heapq.heappop(heap)
            if self.gone[v] or size != self.cells(v):
                continue
            if size > cells:
                hub = max((v, *self.near[v]), key=lambda u: (len(self.near[u]), u))
                around = (*self.near[hub], v)
                self.fix(hub)
                steps.append((hub, (), np.zeros(1, dtype=np.int64)))
            else:
                around, best = self.eliminate(v)
                steps.append((v, around, best))
            for u in around:
                if not self.gone[u]:
                    heapq.heappush(heap, (self.cells(u), u))
        found = np.zeros((len(self.costs), prices), dtype=np.int64)
        each = np.arange(prices)
        for v, around, best in reversed(steps):
            found[v] = best[(each if len(best) > 1 else 0, *[found[u] for u in around])]
        return found.T


def merge(core: Core, chosen: np.ndarray, others: Sequence[np.ndarray], prices: np.ndarray, cells: int = CELLS) -> np.ndarray:
    """The positions of least cost, with usages at prices, of all that are at each node those of `chosen` or of one of `others`.

    `prices`: (p, T + 1) running sums of a price per time; gives (p, n) positions, for each row of prices. With tables of more
    than `cells` cells an answer is not the best of all, but none the worse than `chosen`.
    """
    merged = np.tile(chosen, (len(prices), 1))
    differing = np.flatnonzero(np.any([other != chosen for other in others], axis=0))
    if not len(differing):
        return merged
    rivals = np.stack([other[differing] for other in others], axis=1).tolist()
    positions = [np.array([own, *sorted(set(row) - {own})]) for own, row in zip(chosen[differing].tolist(), rivals)]
    bucket = small_problem(core, chosen, differing, positions, prices)
    picks = bucket.solve(cells, len(prices))
    for number, at in enumerate(positions):
        merged[:, differing[number]] = at[picks[:, number]]
    return merged


def small_problem(
    core: Core, chosen: np.ndarray, free: np.ndarray, positions: Sequence[np.ndarray], prices: np.ndarray
) -> Bucket:
    """Some nodes free among a few positions each, all others as chosen; usages at prices, (p, T + 1) running sums."""
    place = np.full(len(chosen), -1)
    place[free] = np.arange(len(free))
    sizes = np.array([len(at) for at in positions])
    begin = np.cumsum(sizes) - sizes
    flat, owner = np.concatenate(positions), np.repeat(np.arange(len(free)), sizes)
    cost = np.tile(core.cost[core.start[free[owner]] + flat], (len(prices), 1))
    counts = np.diff(core.start)

    degree = core.first[free + 1] - core.first[free]
    link = np.repeat(core.first[free] - (np.cumsum(degree) - degree), degree) + np.arange(int(degree.sum()))
    number = np.repeat(np.arange(len(free)), degree)
    theirs = place[core.other[link]]
    at, cell = _spread(begin, sizes, number[theirs < 0])  # links to what stays: a row of costs
    still = link[theirs < 0]
    row = core.pull[still] + chosen[core.other[still]] * counts[free[number[theirs < 0]]]
    cost += np.bincount(at, core.table[row[cell] + flat[at]], len(flat))

    spans = core.span[free + 1] - core.span[free]
    load = np.repeat(core.span[free] - (np.cumsum(spans) - spans), spans) + np.arange(int(spans.sum()))
    factor = prices[:, core.end[load]] - prices[:, core.begin[load]]
    matters = np.flatnonzero(factor.any(axis=0))
    at, cell = _spread(begin, sizes, np.repeat(np.arange(len(free)), spans)[matters])
    used = core.usage[core.load[load[matters[cell]]] + flat[at]]
    for line, price in zip(cost, factor):
        line += np.bincount(at, price[matters[cell]] * used, len(flat))

    bucket = Bucket([cost[:, b : b + k] for b, k in zip(begin.tolist(), sizes.tolist())])
    pair = np.flatnonzero((theirs >= 0) & (theirs < number))
    widths = counts[free[number[pair]]].tolist()
    for i, a, b, count in zip(core.pull[link[pair]].tolist(), theirs[pair].tolist(), number[pair].tolist(), widths):
        bucket.put((a, b), core.table[i + positions[a][:, None] * count + positions[b]][None])
    return bucket


def _spread(begin: np.ndarray, sizes: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All cells of the owners' ranges, one owner's after the other: (the cell, which owner in the list it is of)."""
    width = sizes[owners]
    cell = np.repeat(np.arange(len(owners)), width)
    return begin[owners][cell] + np.arange(len(cell)) - (np.cumsum(width) - width)[cell], cell
