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
    """The small problem: a cost vector per node, tables over some of them, and who shares a table with whom."""

    def __init__(self, costs: list[np.ndarray]) -> None:
        self.costs = costs
        self.near: list[set[int]] = [set() for _ in costs]
        self.mine: list[list[tuple[tuple[int, ...], np.ndarray]]] = [[] for _ in costs]
        self.gone = np.zeros(len(costs), dtype=bool)

    def put(self, nodes: tuple[int, ...], table: np.ndarray) -> None:
        """Add a table over nodes in rising order."""
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
        """Of the table that eliminating the node takes."""
        return len(self.costs[v]) * math.prod(len(self.costs[u]) for u in self.near[v])

    def fix(self, v: int) -> None:
        """Leave a node at its first position."""
        for nodes, table in self.take(v):
            axis = nodes.index(v)
            self.put(nodes[:axis] + nodes[axis + 1 :], table.take(0, axis=axis))

    def eliminate(self, v: int) -> tuple[tuple[int, ...], np.ndarray]:
        """Decide a node by its neighbours: (they, its best position by theirs)."""
        around = tuple(sorted(self.near[v]))
        place = {u: axis for axis, u in enumerate(around)}
        place[v] = len(around)
        joint = np.zeros([len(self.costs[u]) for u in around] + [1]) + self.costs[v]
        for nodes, table in self.take(v):
            shape = [1] * joint.ndim
            for u in nodes:
                shape[place[u]] = len(self.costs[u])
            axes = sorted(range(len(nodes)), key=lambda axis, nodes=nodes: place[nodes[axis]])
            joint += table.transpose(axes).reshape(shape)
        best = joint.argmin(axis=-1)
        self.put(around, joint.min(axis=-1))
        return around, best

    def solve(self, cells: int) -> np.ndarray:
        """Positions of least cost; where tables would get too large, hubs are fixed at their first position."""
        heap = [(self.cells(v), v) for v in range(len(self.costs))]
        heapq.heapify(heap)
        steps: list[tuple[int, tuple[int, ...], np.ndarray]] = []
        while heap:
            size, v = heapq.heappop(heap)
            if self.gone[v] or size != self.cells(v):
                continue
            if size > cells:
                hub = max((v, *self.near[v]), key=lambda u: (len(self.near[u]), u))
                around = tuple(self.near[hub])
                self.fix(hub)
                steps.append((hub, (), np.zeros((), dtype=np.int64)))
                around = (*around, v)
            else:
                around, best = self.eliminate(v)
                steps.append((v, around, best))
            for u in around:
                if not self.gone[u]:
                    heapq.heappush(heap, (self.cells(u), u))
        found = np.zeros(len(self.costs), dtype=np.int64)
        for v, around, best in reversed(steps):
            found[v] = best[tuple(found[u] for u in around)]
        return found


def merge(core: Core, chosen: np.ndarray, others: Sequence[np.ndarray], prices: np.ndarray, cells: int = CELLS) -> np.ndarray:
    """The positions of least cost, with usages at prices, of all that are at each node those of `chosen` or of one of `others`.

    `prices`: (T + 1,) running sums of a price per time. With tables of more than `cells` cells the answer is not the best of all,
    but none the worse than `chosen`.
    """
    differing = np.flatnonzero(np.any([other != chosen for other in others], axis=0))
    place = np.full(len(chosen), -1)
    place[differing] = np.arange(len(differing))
    positions = [[int(chosen[v]), *sorted({int(other[v]) for other in others} - {int(chosen[v])})] for v in differing.tolist()]
    costs: list[np.ndarray] = []
    tables: list[tuple[tuple[int, int], np.ndarray]] = []
    factors = prices[core.end] - prices[core.begin]
    for number, v in enumerate(differing.tolist()):
        at, count = np.array(positions[number]), int(core.start[v + 1] - core.start[v])
        cost = core.cost[core.start[v] + at]
        for i in range(core.first[v], core.first[v + 1]):
            w = int(core.other[i])
            if place[w] < 0:
                cost += core.table[core.pull[i] + int(chosen[w]) * count + at]
            elif w < v:
                theirs = np.array(positions[place[w]])
                tables.append(((int(place[w]), number), core.table[core.pull[i] + theirs[:, None] * count + at]))
        for i in range(core.span[v], core.span[v + 1]):
            if factors[i] != 0.0:
                cost += factors[i] * core.usage[core.load[i] + at]
        costs.append(cost)
    bucket = Bucket(costs)
    for nodes, table in tables:
        bucket.put(nodes, table)
    merged = chosen.copy()
    merged[differing] = [positions[number][pick] for number, pick in enumerate(bucket.solve(cells).tolist())]
    return merged
