"""The inner solver: bucket elimination over tables, exact while it fits, bounded otherwise.

Bertelè and Brioschi, "Nonserial Dynamic Programming" (1972); Dechter, "Bucket elimination" (1999); mini-buckets after
Dechter and Rish (2003).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

import numpy as np

from jaxplan.reduce import Tables

CAP = 1 << 14
"""Entries of the largest table that elimination may build."""

Factor = tuple[tuple[int, ...], np.ndarray]
"""A table over the variables of an ascending scope."""


def min_fill_order(weights: Sequence[float], pairs: Iterable[tuple[int, int]]) -> list[int]:
    """An order of elimination that greedily adds the lightest edges (weighted min-fill); ties by number.

    `weights`: one per variable, the logarithm of how many options it has; an edge weighs the product of its ends.
    """
    near: list[set[int]] = [set() for _ in weights]
    for i, j in pairs:
        near[i].add(j)
        near[j].add(i)

    def fill(v: int) -> float:
        around = list(near[v])
        missing = 0.0
        for place, w in enumerate(around):
            known, weight = near[w], weights[w]
            for u in around[:place]:
                if u not in known:
                    missing += weight * weights[u]
        return round(missing, 6)

    score = [fill(v) for v in range(len(weights))]
    heap = [(s, v) for v, s in enumerate(score)]
    heapq.heapify(heap)
    order: list[int] = []
    gone = [False] * len(weights)
    while heap:
        s, v = heapq.heappop(heap)
        if gone[v] or s != score[v]:
            continue
        gone[v] = True
        order.append(v)
        around = near[v]
        for w in around:
            near[w].discard(v)
            if s:
                near[w] |= around
                near[w].discard(w)
        for w in around if not s else around.union(*(near[w] for w in around)):
            if not gone[w]:
                now = fill(w)
                if now != score[w]:
                    score[w] = now
                    heapq.heappush(heap, (now, w))
    return order


def solve(
    tables: Tables, order: list[int], incumbent: np.ndarray | None = None, tally: list[int] | None = None, cap: int = CAP
) -> tuple[np.ndarray, bool]:
    """(an option per variable, whether it is proven optimal). `order`: the variables as they are to be eliminated.

    Where a table would grow beyond `cap` entries, without an incumbent: mini-buckets, then two rounds that start from what
    they found. With an `incumbent` (an option per variable): variables that would grow a table too far keep the incumbent's
    option this time, so the result is never worse. `tally` counts how often each was kept, so that the next call keeps others.
    """
    tally = tally if tally is not None else [0] * len(tables.costs)
    if incumbent is None:
        found, exact = _Buckets(tables, cap).run(order, None, tally)
        for _ in range(0 if exact else 2):
            found, _ = solve(tables, order, found, tally, cap)
        return found, exact
    found, exact = _Buckets(tables, cap).run(order, incumbent, tally)
    return (found if tables.price(found) < tables.price(incumbent) else incumbent), exact


def _size(factor: Factor) -> int:
    return factor[1].size


class _Buckets:
    """One elimination."""

    def __init__(self, tables: Tables, cap: int) -> None:
        self.cap = cap
        self.sizes = [len(cost) for cost in tables.costs]
        self.costs = list(tables.costs)
        self.factors: list[dict[int, Factor]] = [{} for _ in self.sizes]
        self._made = 0
        for factor in tables.pairs.items():
            self._made += 1
            self.factors[factor[0][0]][self._made] = self.factors[factor[0][1]][self._made] = factor

    def _add(self, scope: tuple[int, ...], array: np.ndarray) -> None:
        if len(scope) == 1:
            self.costs[scope[0]] = self.costs[scope[0]] + array
            return
        self._made += 1
        for v in scope:
            self.factors[v][self._made] = (scope, array)

    def _take(self, numbers: Iterable[int], v: int) -> list[Factor]:
        """Take factors of a variable out."""
        taken = []
        for number in list(numbers):
            factor = self.factors[v][number]
            for w in factor[0]:
                del self.factors[w][number]
            taken.append(factor)
        return taken

    def _scope(self, v: int) -> set[int]:
        return {v}.union(*(scope for scope, _ in self.factors[v].values()))

    def run(self, order: list[int], incumbent: np.ndarray | None, tally: list[int]) -> tuple[np.ndarray, bool]:
        """(options, whether they are optimal)."""
        exact = True
        trail: list[tuple[int, list[Factor]]] = []
        options = [0] * len(self.sizes)
        fixed: set[int] = set()
        for v in order:
            if v in fixed:
                continue
            scope = self._scope(v)
            while math.prod([self.sizes[w] for w in scope]) > self.cap and incumbent is not None:
                hub = max(scope, key=lambda x: (len(self.factors[x]) - 3 * tally[x], -x))
                tally[hub] += 1
                exact = False
                options[hub] = int(incumbent[hub])
                fixed.add(hub)
                self._condition(hub, int(incumbent[hub]))
                scope.discard(hub)
            if v in fixed:
                continue
            if math.prod([self.sizes[w] for w in scope]) > self.cap:
                exact = False
                trail.append((v, self._split(v)))
            else:
                trail.append((v, [self._join(v, sorted(scope), self._take(self.factors[v], v))]))
        everything = slice(None)
        for v, groups in reversed(trail):
            total = np.zeros(1)
            for scope_, array in groups:
                total = total + array[tuple([everything if w == v else options[w] for w in scope_])]
            options[v] = total.argmin()
        return np.array(options, dtype=np.int64), exact

    def _join(self, v: int, scope: list[int], factors: list[Factor]) -> Factor:
        """Sum tables that mention a variable, take the minimum over it, and put the result back."""
        sizes, where = self.sizes, scope.index(v)
        if len(scope) == 2 and len(factors) == 1:  # a leaf
            total = factors[0][1] + (self.costs[v][:, None] if where == 0 else self.costs[v])
        else:
            shape = [1] * len(scope)
            shape[where] = sizes[v]
            total = self.costs[v].reshape(shape)
            for f, array in sorted(factors, key=_size) if len(factors) > 2 else factors:  # small tables first: fewer large sums
                total = total + (array if len(f) == len(scope) else array.reshape([sizes[w] if w in f else 1 for w in scope]))
        self.costs[v] = np.zeros(sizes[v])  # paid once, should there be more groups
        if len(scope) > 1:
            self._add(tuple([w for w in scope if w != v]), np.minimum.reduce(total, where))
        return tuple(scope), total

    def _split(self, v: int) -> list[Factor]:
        """Mini-buckets: groups of factors whose tables fit, each minimised by itself (a lower bound)."""
        groups: list[tuple[set[int], list[int]]] = []
        for number, (scope, _) in sorted(self.factors[v].items(), key=lambda item: (-item[1][1].size, item[0])):
            for union, members in groups:
                if math.prod(self.sizes[w] for w in union.union(scope)) <= self.cap:
                    union.update(scope)
                    members.append(number)
                    break
            else:
                groups.append((set(scope), [number]))
        return [self._join(v, sorted(union), self._take(members, v)) for union, members in groups]

    def _condition(self, v: int, option: int) -> None:
        """Fix a variable: its factors lose a dimension."""
        for scope, array in self._take(self.factors[v], v):
            self._add(tuple([w for w in scope if w != v]), np.take(array, option, axis=scope.index(v)))
