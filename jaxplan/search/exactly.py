"""Small problems within a limit, solved exactly: node after node, all that may begin the best assignment is kept.

A beginning is dropped where it costs more than what is known, the least that the rest can cost included, or where it takes more
than is allowed at some step, the least that the rest can take included.
"""

from __future__ import annotations

import math

import numpy as np

from jaxplan.problem import Problem
from jaxplan.reduce import ILLEGAL
from jaxplan.search.neighbourhoods import Written, legal_options

JOINT = 2_000_000.0
"""Joint assignments up to which a problem is small: as many as `brute` prices."""
NODES = math.floor(math.log2(JOINT))
"""That such a problem has at most, each of two options or more."""
BEGINNINGS = 1 << 16
"""Of an assignment, kept at a time; where there are more it is given up."""
SLACK = 1e-9
"""By what fraction sums in another order may differ: what is within it is not dropped."""


def exactly(problem: Problem, ceiling: float, allowed: float) -> list[np.ndarray] | None:
    """The cheapest assignment, (nodes, axes), of a small problem that costs less than `ceiling` seconds and takes no more than is
    allowed at any step; [] where there is none; None where the problem is not small. Deterministic."""
    rows = legal_options(problem) if len(problem.nodes) <= NODES else None
    if rows is None or math.prod([float(len(options)) for options in rows]) > JOINT:
        return None
    written, below = Written(problem, rows), min(ceiling, ILLEGAL) * (1 - SLACK)
    begun = _Begun(written)
    for v in begun.order():
        begun.grow(v, below * (1 + 2 * SLACK), allowed + SLACK * abs(allowed))
        if len(begun.spent) > BEGINNINGS:
            return None
    for number in np.argsort(begun.spent, kind="stable").tolist():
        found = begun.chosen[number]
        if written.seconds(found) >= below:
            return []
        if written.levels(found).max(initial=-math.inf) <= allowed:
            return [written.choices(found)]
    return []


class _Begun:
    """Beginnings of assignments: `chosen`, (beginnings, nodes) positions; what each `spent`; `level`, (beginnings, steps), the
    least it takes. `open`: the nodes that are not chosen."""

    def __init__(self, written: Written) -> None:
        self.written = written
        self.open = set(range(len(written.rows)))
        self.chosen, self.spent = np.zeros((1, len(written.rows)), dtype=np.int64), np.zeros(1)
        self._alive, fixed = written.alive()
        self._least = np.array([table.min() for table in written.amounts])
        self.level = (fixed + self._least @ self._alive)[None]

    def order(self) -> list[int]:
        """Nodes, each next to those before it where there is one."""
        near, left, found = self.written.near, sorted(self.open), list[int]()
        while left:
            found.append(max(left, key=lambda v: (len(near[v].intersection(found)), len(near[v]), -v)))
            left.remove(found[-1])
        return found

    def grow(self, v: int, bound: float, most: float) -> None:
        """Choose the next node in every way that may be good; of too many, all that are cheap enough."""
        added = self._added(v)
        self.open.discard(v)
        which, position = np.nonzero(self.spent[:, None] + added <= bound)
        self.spent = self.spent[which] + added[which, position]
        self.chosen, self.level = self.chosen[which], self.level[which]
        self.chosen[:, v] = position
        rest = sum([self._added(u, ahead=True).min(1) for u in sorted(self.open)], np.zeros(len(which)))
        self._keep(self.spent + rest <= bound)
        if len(self.spent) > BEGINNINGS:
            return
        for number, (a, b) in enumerate(self.written.owners):
            if v in (a, b) and not {a, b} & self.open:
                table = self.written.amounts[number]
                takes = table[self.chosen[:, a]] if a == b else table[self.chosen[:, a], self.chosen[:, b]]
                self.level = self.level + (takes - self._least[number])[:, None] * self._alive[number]
        self._keep(np.asarray((self.level <= most).all(1)))

    def _added(self, v: int, ahead: bool = False) -> np.ndarray:
        """(beginnings, positions) what each position of a node costs beside what is chosen; `ahead`: and the least that it costs
        beside nodes after it that are open too."""
        found = np.tile(self.written.costs[v], (len(self.spent), 1))
        for (a, b), table in self.written.pairs_of(v):
            other, towards = (b, table.T) if a == v else (a, table)
            if other not in self.open:
                found += towards[self.chosen[:, other]]
            elif ahead and other > v:
                found += towards.min(0)
        return found

    def _keep(self, which: np.ndarray) -> None:
        self.chosen, self.spent, self.level = self.chosen[which], self.spent[which], self.level[which]
