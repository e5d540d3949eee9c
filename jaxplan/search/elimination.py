"""The inner solver: bucket elimination over tables, exact while it fits, bounded otherwise.

Bertelè and Brioschi, "Nonserial Dynamic Programming" (1972); Dechter, "Bucket elimination" (1999); mini-buckets after
Dechter and Rish (2003).
"""

from __future__ import annotations

import math

import numpy as np

from jaxplan.reduce import ILLEGAL, Tables, dominance, eliminate

CAP = 1 << 16
"""Entries of the largest table that elimination may build."""


def solve(tables: Tables, incumbent: np.ndarray | None = None, tally: list[int] | None = None, cap: int = CAP) -> np.ndarray:
    """An option per variable; optimal where no table grows beyond `cap` entries.

    Beyond, without an incumbent: mini-buckets, then two rounds that start from what they found. With an `incumbent` (an
    option per variable): variables that would grow a table too far keep the incumbent's option this time, so the result is
    never worse. `tally` counts how often each was kept, so that the next call keeps others.
    """
    tally = tally if tally is not None else [0] * len(tables.costs)
    if incumbent is None:
        smaller, undo_dominance = dominance(tables)
        core, left, undo = eliminate(smaller)
        inner = [0] * len(left)
        options, exact = _Buckets(core, cap).run(None, inner)
        found = undo_dominance(undo(options))
        for _ in range(0 if exact else 2):
            found = _better(tables, found, solve(tables, found, tally, cap))
        return found
    options, _ = _Buckets(tables, cap).run(incumbent, tally)
    return _better(tables, incumbent, options)


def _better(tables: Tables, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    return new if tables.price(new) < tables.price(old) else old


class _Buckets:
    """One elimination."""

    def __init__(self, tables: Tables, cap: int) -> None:
        self.cap = cap
        self.sizes = [len(cost) for cost in tables.costs]
        self.near: list[set[int]] = [set() for _ in self.sizes]
        self.factors: list[list[tuple[tuple[int, ...], np.ndarray]]] = [
            [((i,), np.minimum(cost, ILLEGAL))] for i, cost in enumerate(tables.costs)
        ]
        for (i, j), matrix in tables.pairs.items():
            self.near[i].add(j)
            self.near[j].add(i)
            self._add((i, j), np.minimum(matrix, ILLEGAL))

    def _add(self, scope: tuple[int, ...], array: np.ndarray) -> None:
        factor = (scope, array)
        for v in scope:
            self.factors[v].append(factor)

    def _remove(self, factor: tuple[tuple[int, ...], np.ndarray]) -> None:
        for v in factor[0]:
            self.factors[v] = [f for f in self.factors[v] if f is not factor]

    def run(self, incumbent: np.ndarray | None, tally: list[int]) -> tuple[np.ndarray, bool]:
        """(options, whether they are optimal)."""
        exact = True
        alive = set(range(len(self.sizes)))
        fill = {v: self._fill(v) for v in alive}
        trail: list[tuple[int, list[tuple[tuple[int, ...], np.ndarray]]]] = []
        fixed: dict[int, int] = {}
        while alive:
            v = min(alive, key=lambda x: (fill[x], x))
            near = self.near[v]
            if self.sizes[v] * math.prod(self.sizes[w] for w in near) > self.cap:
                exact = False
                if incumbent is not None:
                    v = max(near | {v}, key=lambda x: (len(self.near[x]) - 3 * tally[x], -x))
                    tally[v] += 1
                    fixed[v] = int(incumbent[v])
                    self._condition(v, fixed[v])
                    touched = self.near[v]
                else:
                    touched = set(near)
                    trail.append((v, self._split(v)))
            else:
                touched = set(near)
                trail.append((v, [self._join(v, self.factors[v])]))
                self._connect(near)
            alive.discard(v)
            for w in touched:
                self.near[w].discard(v)
            for w in touched:
                fill[w] = self._fill(w)
        options = np.zeros(len(self.sizes), dtype=np.int64)
        for v, option in fixed.items():
            options[v] = option
        for v, groups in reversed(trail):
            total = 0.0
            for scope, array in groups:
                index = tuple(slice(None) if w == v else int(options[w]) for w in scope)
                total = total + array[index]
            options[v] = int(np.argmin(total))
        return options, exact

    def _fill(self, v: int) -> int:
        """Edges that eliminating a variable would add."""
        near = sorted(self.near[v])
        return sum(len(near) - 1 - n - len(self.near[w].intersection(near[n + 1 :])) for n, w in enumerate(near))

    def _connect(self, near: set[int]) -> None:
        for w in near:
            self.near[w].update(near)
            self.near[w].discard(w)

    def _join(self, v: int, factors: list[tuple[tuple[int, ...], np.ndarray]]) -> tuple[tuple[int, ...], np.ndarray]:
        """Sum factors that mention a variable, take the minimum over it, and put the result back."""
        scope = tuple(sorted({w for f, _ in factors for w in f}))
        total: np.ndarray | float = 0.0
        for f, array in sorted(factors, key=lambda item: len(item[0])):
            total = total + array.reshape([self.sizes[w] if w in f else 1 for w in scope])
        total = np.broadcast_to(total, [self.sizes[w] for w in scope])
        for factor in list(factors):
            self._remove(factor)
        rest = tuple(w for w in scope if w != v)
        if rest:
            self._add(rest, total.min(scope.index(v)))
        return scope, total

    def _split(self, v: int) -> list[tuple[tuple[int, ...], np.ndarray]]:
        """Mini-buckets: groups of factors whose tables fit, each minimised by itself (a lower bound)."""
        groups: list[tuple[set[int], list[tuple[tuple[int, ...], np.ndarray]]]] = []
        for factor in sorted(self.factors[v], key=lambda f: -f[1].size):
            for scope, members in groups:
                if math.prod(self.sizes[w] for w in scope.union(factor[0])) <= self.cap:
                    scope.update(factor[0])
                    members.append(factor)
                    break
            else:
                groups.append((set(factor[0]), [factor]))
        made = []
        for scope, members in groups:
            made.append(self._join(v, members))
            self._connect(scope - {v})
        return made

    def _condition(self, v: int, option: int) -> None:
        """Fix a variable: its factors lose a dimension."""
        for scope, array in list(self.factors[v]):
            self._remove_one(v, scope, array, option)
        self.factors[v] = []

    def _remove_one(self, v: int, scope: tuple[int, ...], array: np.ndarray, option: int) -> None:
        for w in scope:
            self.factors[w] = [f for f in self.factors[w] if f[1] is not array]
        rest = tuple(w for w in scope if w != v)
        if rest:
            self._add(rest, np.take(array, option, axis=scope.index(v)))
