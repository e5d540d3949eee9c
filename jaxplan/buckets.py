"""Room `buckets`: exact elimination at several prices of usage at once, for both the search and the interval solver."""

from __future__ import annotations

import heapq
import math

import numpy as np


class Bucket:
    """Costs per node, tables over some of them, and who shares a table with whom.

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
        """(nodes, prices) positions of least cost; where tables would get too large, hubs are fixed at their first position."""
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
        return found
