"""Exact reductions: a problem becomes a smaller one whose optimum is an optimum of the first, usages included.

Pairs that cannot be chosen together are propagated, strategies that another one replaces at no cost and no usage are dropped,
nodes that another node decides are merged into it, edges that are a sum of two node costs are dissolved, nodes without usage and
with at most two neighbours are eliminated, and times at which the limit cannot be the reason of anything are left out.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from jaxplan.solve.nouns import IntervalProblem, NoSolutionError, least_peak
from jaxplan.solve.profiles import Loads, Profiles, RangeMin, disjoint
from jaxplan.solve.tables import COLUMNS_DECIDE, IS_SUM, ROWS_DECIDE, ROWS_LAST, dominated, traits

MERGE_GROWTH = 4.0
"""A merge may make its tables this many times larger than those it replaces."""
WIDE = 4096
"""The most cells of a table that eliminating a node of degree two may make beyond those it removes."""


class Step(NamedTuple):
    """How an eliminated node follows from its parents (none, one or two): an index into `table` by their strategies."""

    node: int
    parents: tuple[int, ...]
    table: np.ndarray


class Reducer:
    """The state of a reduction. `adjacent[u][v]` is the table over (u, v), the transpose of `adjacent[v][u]`.

    `labels[u]`: the strategies of u that are left, by their number in the problem. `loads[u]`: {(start, end): usages}, in
    positions of `capacity`, the limit less what is used anyhow, at times that `times` gives.
    """

    def __init__(self, problem: IntervalProblem) -> None:
        self.problem = problem
        self.cost = [np.array(cost, dtype=float) for cost in problem.costs]
        self.sizes = problem.counts
        self.labels = [np.arange(len(cost)) for cost in self.cost]
        self.adjacent: list[dict[int, np.ndarray]] = [{} for _ in self.cost]
        self.alive = np.ones(len(self.cost), dtype=bool)
        self.steps: list[Step] = []
        self.constant = 0.0
        self.dirty: set[int] = set(range(len(self.cost)))  # a strategy may be dominated now
        self.queue: deque[int] = deque()  # its pairs have to be propagated
        self.times = np.unique(problem.intervals)
        self.capacity = np.full(max(0, len(self.times) - 1), float(problem.limit))
        begin, end = (np.searchsorted(self.times, problem.intervals[:, side]).tolist() for side in (0, 1))
        self.loads: list[Loads] = [
            {(b, e): np.array(usage, dtype=float)} if e > b else {} for b, e, usage in zip(begin, end, problem.usages)
        ]
        self.times = self.times[:-1]
        for (tail, head), table in zip(problem.edges.tolist(), problem.tables):
            self.link(tail, head, np.asarray(table, dtype=float))

    # --- one edge, one node -------------------------------------------------------------------------------------

    def link(self, u: int, v: int, table: np.ndarray) -> None:
        """Add a table over (u, v) to what is between them."""
        known = self.adjacent[u].get(v)
        table = table if known is None else known + table
        self.adjacent[u][v] = table
        self.adjacent[v][u] = table.T
        self.queue.extend((u, v))
        self.dirty.update((u, v))

    def unlink(self, u: int, v: int) -> np.ndarray:
        """Take the edge out and give its table."""
        del self.adjacent[v][u]
        self.dirty.update((u, v))
        return self.adjacent[u].pop(v)

    def restrict(self, u: int, keep: np.ndarray) -> None:
        """Keep the strategies of u at these positions. Raises NoSolutionError if there are none."""
        if not len(keep):
            raise NoSolutionError(f"no feasible solution: no strategy of node {u} keeps the limit and has possible neighbours")
        self.cost[u] = self.cost[u][keep]
        self.labels[u] = self.labels[u][keep]
        self.loads[u] = {span: usage[keep] for span, usage in self.loads[u].items()}
        for v, table in self.adjacent[u].items():
            table = table[keep]
            self.adjacent[u][v] = table
            self.adjacent[v][u] = table.T
            self.queue.append(v)
            self.dirty.add(v)
        self.dirty.add(u)

    def remove(self, u: int, step: Step) -> None:
        """Take a node without edges out; `step` decides it afterwards."""
        self.alive[u] = False
        self.steps.append(step)
        self.dirty.discard(u)
        self.loads[u] = {}

    # --- reductions ---------------------------------------------------------------------------------------------

    def propagate(self) -> None:
        """Drop strategies that have no possible partner at some neighbour (arc consistency)."""
        changed = sorted(self.dirty)  # no other costs can have become infinite since the last time
        costs = np.concatenate([self.cost[u] for u in changed]) if changed else np.zeros(0)
        owner = np.repeat(changed, [len(self.cost[u]) for u in changed])
        for u in np.unique(owner[~np.isfinite(costs)]).tolist():
            self.restrict(u, np.flatnonzero(np.isfinite(self.cost[u])))
        queue, waiting = self.queue, np.zeros(len(self.cost), dtype=bool)
        waiting[list(queue)] = True
        queue = deque(np.flatnonzero(waiting).tolist())
        while queue:
            v = queue.popleft()
            waiting[v] = False
            for u in list(self.adjacent[v]):
                table = self.adjacent[u][v]
                if not traits(table) & ROWS_LAST:
                    self.queue = deque()
                    self.restrict(u, np.flatnonzero(np.isfinite(table).any(axis=1)))
                    for w in self.queue:
                        if not waiting[w]:
                            waiting[w] = True
                            queue.append(w)
        self.queue = deque()

    def dissolve(self, u: int, v: int) -> None:
        """Turn the edge into node costs, its table being a sum of a row and a column."""
        table = self.unlink(u, v)
        self.cost[u] = self.cost[u] + (table[:, 0] - table[0, 0])
        self.cost[v] = self.cost[v] + table[0]

    def merge(self, u: int, v: int) -> bool:
        """Let u decide v, as every strategy of u leaves v exactly one, if the tables do not grow much."""
        table = self.adjacent[u][v]
        possible = np.isfinite(table)
        mine, theirs = table.shape
        if mine > theirs:
            grown = (mine - theirs) * sum(len(self.cost[w]) for w in self.adjacent[v] if w != u and w not in self.adjacent[u])
            if grown > MERGE_GROWTH * table.size:
                return False
        elif mine == theirs and len(self.adjacent[v]) > len(self.adjacent[u]) and traits(table) & COLUMNS_DECIDE:
            return self.merge(v, u)  # one to one: into the one that has more neighbours
        follows = possible.argmax(axis=1)
        self.cost[u] = self.cost[u] + table[np.arange(mine), follows] + self.cost[v][follows]
        self.unlink(u, v)
        for w in list(self.adjacent[v]):
            self.link(u, w, self.unlink(v, w)[follows])
        for span, usage in self.loads[v].items():
            known = self.loads[u].get(span)
            self.loads[u][span] = usage[follows] if known is None else known + usage[follows]
        self.remove(v, Step(v, (u,), self.lookup((u,), self.labels[v][follows])))
        return True

    def lookup(self, parents: tuple[int, ...], chosen: np.ndarray) -> np.ndarray:
        """A table by the problem's own numbers of the parents' strategies, from one by their positions now."""
        table = np.full([self.sizes[p] for p in parents], -1, dtype=np.int32)
        if len(parents) == 1:
            table[self.labels[parents[0]]] = chosen
            return table
        table[np.ix_(*[self.labels[p] for p in parents])] = chosen
        return table

    def eliminate(self, v: int) -> bool:
        """Decide a node without usage by its neighbours, at most two of them."""
        if self.loads[v] or len(self.adjacent[v]) > 2:
            return False
        around = list(self.adjacent[v])
        cost = self.cost[v]
        if not around:
            best = cost.argmin()
            self.constant += float(cost[best])
            self.remove(v, Step(v, (), np.array(self.labels[v][best])))
            return True
        if len(around) == 1:
            (u,) = around
            joint = self.unlink(u, v) + cost
            best = joint.argmin(axis=1)
            self.cost[u] = self.cost[u] + joint.min(axis=1)
            self.remove(v, Step(v, (u,), self.lookup((u,), self.labels[v][best])))
            return True
        a, b = around
        ka, kb, k = len(self.cost[a]), len(self.cost[b]), len(cost)
        if b not in self.adjacent[a] and ka * kb > (ka + kb) * k + WIDE:
            return False
        left, right = self.unlink(a, v), self.unlink(v, b)
        found, best = np.empty((ka, kb)), np.empty((ka, kb), dtype=np.int64)
        for row in range(ka):
            joint = (left[row] + cost)[:, None] + right
            best[row] = joint.argmin(axis=0)
            found[row] = joint.min(axis=0)
        self.remove(v, Step(v, (a, b), self.lookup((a, b), self.labels[v][best])))
        self.link(a, b, found)
        return True

    def drop_dominated(self, u: int) -> bool:
        """Drop strategies of u that another one replaces at no more cost and usage, whatever the neighbours do."""
        count = len(self.cost[u])
        if count == 1:
            return False
        tables = [np.zeros((count, 0)), *self.adjacent[u].values()]
        widths = [table.shape[1] for table in tables[1:]]
        usage = np.stack([np.zeros(count), *self.loads[u].values()])
        wide = np.ascontiguousarray(np.concatenate(tables, axis=1))
        start = np.cumsum([0, *widths[:-1]]) if widths else np.zeros(0, dtype=np.int64)
        with np.errstate(invalid="ignore"):
            dead = dominated(self.cost[u], usage, wide, start.astype(np.int64))
        if dead.any():
            self.restrict(u, np.flatnonzero(~dead))
        return bool(dead.any())

    # --- times --------------------------------------------------------------------------------------------------

    def compress(self) -> None:
        """Drop strategies that cannot fit, and times that cannot decide."""
        nodes = np.flatnonzero(self.alive).tolist()
        before = [len(self.loads[u]) for u in nodes]
        for u in nodes:
            if len(self.loads[u]) > 1:
                self.loads[u] = disjoint(self.loads[u])
        while True:
            flat = Profiles(nodes, self.loads)
            least = flat.per_span(np.minimum)
            base = flat.sum_over_time(least, len(self.capacity))
            if base.any():
                self.capacity = self.capacity - base
                flat.lower(least)
            if len(self.capacity) and self.capacity.min() < 0:
                worst = int(self.capacity.argmin())
                raise NoSolutionError(
                    f"no feasible solution: from time {self.times[worst]} on, every strategy left still uses "
                    f"{-self.capacity[worst]:g} more than the limit of {self.problem.limit:g}"
                )
            slack = RangeMin(self.capacity).over(flat.begin, flat.end)
            most = flat.per_span(np.maximum)
            tight = np.flatnonzero(most > slack)
            if not len(tight):
                break
            flat.store(self.loads)
            fits: dict[int, np.ndarray] = {}
            for i in tight.tolist():
                u = int(flat.node[i])
                fits[u] = fits.get(u, True) & (flat.usage(i) <= slack[i])
            for u, fit in fits.items():
                self.restrict(u, np.flatnonzero(fit))
        self.drop_times(flat, flat.sum_over_time(most, len(self.capacity)) > self.capacity)
        self.dirty.update(u for u, spans in zip(nodes, before) if len(self.loads[u]) != spans)

    def drop_times(self, flat: Profiles, keep: np.ndarray) -> None:
        """Leave out times that are not to be kept, and those at which a time beside them asks for no less."""
        while True:
            place = np.concatenate([[0], np.cumsum(keep)])
            limits = self.capacity[keep]
            rises, falls = flat.changes(place[flat.begin], place[flat.end], len(limits))
            later = (~falls[1:-1] & (limits[1:] <= limits[:-1])).tolist()  # asks for no less than the one before it
            earlier = (~rises[1:-1] & (limits[:-1] <= limits[1:])).tolist()
            drop = np.zeros(len(limits), dtype=bool)
            gone = False
            for t in range(len(limits) - 1):
                gone, before = False, gone
                if not before and later[t]:
                    drop[t] = True
                elif not before and earlier[t]:
                    drop[t + 1] = gone = True
            if not drop.any():
                break
            keep = keep.copy()
            keep[np.flatnonzero(keep)[drop]] = False
        self.capacity, self.times = limits, self.times[keep]
        flat.begin, flat.end = place[flat.begin], place[flat.end]
        flat.store(self.loads)

    # --- all of it ----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Reduce until nothing gives. Raises NoSolutionError where that shows that nothing is feasible."""
        peak = least_peak(self.problem)
        if peak.usage > self.problem.limit:
            raise NoSolutionError(
                f"no feasible solution: in [{peak.start}, {peak.end}) the smallest usages add up to {peak.usage:g}, "
                f"{peak.usage - self.problem.limit:g} more than the limit of {self.problem.limit:g}"
            )
        self.propagate()
        self.compress()
        while self.dirty:
            todo, self.dirty = sorted(self.dirty), set()
            for u in todo:
                self.simplify(u)
            self.propagate()
            for u in todo:
                if self.alive[u]:
                    self.drop_dominated(u)
            self.propagate()
            if not self.dirty or len(self.dirty) < 0.05 * self.alive.sum():
                self.compress()

    def simplify(self, u: int) -> None:
        """Merge, dissolve and eliminate around a node."""
        if not self.alive[u]:
            return
        for v in list(self.adjacent[u]):
            if not self.alive[u]:
                return
            if v not in self.adjacent[u]:
                continue
            found = traits(self.adjacent[u][v])
            if found & IS_SUM:
                self.dissolve(u, v)
            elif not (found & ROWS_DECIDE and self.merge(u, v)) and found & COLUMNS_DECIDE:
                self.merge(v, u)
        if self.alive[u]:
            self.eliminate(u)


def expand(reducer: Reducer, chosen: np.ndarray) -> np.ndarray:
    """Strategies of the problem, (n,), from the reducer's own: for each node alive a position among those left."""
    strategies = np.full(len(reducer.cost), -1, dtype=np.int64)
    alive = np.flatnonzero(reducer.alive)
    strategies[alive] = [reducer.labels[u][position] for u, position in zip(alive.tolist(), chosen.tolist())]
    for step in reversed(reducer.steps):
        strategies[step.node] = step.table[tuple(strategies[p] for p in step.parents)]
    return strategies
