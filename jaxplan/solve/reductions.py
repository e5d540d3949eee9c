"""Exact reductions: a problem becomes a smaller one whose optimum is an optimum of the first, usages included.

Pairs that cannot be chosen together are propagated, strategies that another one replaces at no cost and no usage are dropped,
nodes that another node decides are merged into it, edges that are a sum of two node costs are dissolved, nodes without usage and
with at most two neighbours are eliminated, and times at which the limit cannot be the reason of anything are left out.
"""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from jaxplan.solve.compiled import compiled
from jaxplan.solve.nouns import IntervalProblem, NoSolutionError, least_peak

MERGE_GROWTH = 4.0
"""A merge may make its tables this many times larger than those it replaces."""
WIDE = 4096
"""The most cells of a table that eliminating a node of degree two may make beyond those it removes."""


class Step(NamedTuple):
    """How an eliminated node follows from its parents (none, one or two): an index into `table` by their strategies."""

    node: int
    parents: tuple[int, ...]
    table: np.ndarray


def _dominated_numpy(cost: np.ndarray, usage: np.ndarray, wide: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Which strategies another one replaces: (k,) costs, (loads, k) usages, (k, w) edge costs in blocks that start at `start`."""
    count = len(cost)
    dead = np.zeros(count, dtype=bool)
    for a in range(count):
        if dead[a]:
            continue
        rest = np.flatnonzero(~dead & (usage[:, a, None] <= usage).all(axis=0))
        rest = rest[rest != a]
        if not len(rest):
            continue
        worst = cost[a] - cost[rest]
        if wide.shape[1]:
            other = wide[rest]
            possible = np.isfinite(other)
            gap = np.where(possible, wide[a] - np.where(possible, other, 0.0), -np.inf)
            worst = worst + np.maximum.reduceat(gap, start, axis=1).sum(axis=1)
        dead[rest[worst <= 0]] = True
    return dead


@compiled(_dominated_numpy)
def dominated(cost, usage, wide, start):
    """As `_dominated_numpy`."""
    count, width = wide.shape
    dead = np.zeros(count, dtype=np.bool_)
    blocks = len(start)
    for a in range(count):
        if dead[a]:
            continue
        for b in range(count):
            if b == a or dead[b]:
                continue
            good = True
            for load in range(usage.shape[0]):
                if usage[load, a] > usage[load, b]:
                    good = False
                    break
            if not good:
                continue
            total = cost[a] - cost[b]
            for block in range(blocks):
                end = start[block + 1] if block + 1 < blocks else width
                worst = -np.inf
                for j in range(start[block], end):
                    if wide[b, j] < np.inf:
                        gap = wide[a, j] - wide[b, j]
                        if gap > worst:
                            worst = gap
                total += worst
                if total == np.inf:
                    break
            if total <= 0:
                dead[b] = True
    return dead


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
        self.loads: list[dict[tuple[int, int], np.ndarray]] = [
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
        for u in np.flatnonzero(self.alive):
            possible = np.isfinite(self.cost[u])
            if not possible.all():
                self.restrict(int(u), np.flatnonzero(possible))
        queue, waiting = self.queue, np.zeros(len(self.cost), dtype=bool)
        waiting[list(queue)] = True
        queue = deque(np.flatnonzero(waiting).tolist())
        while queue:
            v = queue.popleft()
            waiting[v] = False
            for u in list(self.adjacent[v]):
                possible = np.isfinite(self.adjacent[u][v]).any(axis=1)
                if not possible.all():
                    self.queue = deque()
                    self.restrict(u, np.flatnonzero(possible))
                    for w in self.queue:
                        if not waiting[w]:
                            waiting[w] = True
                            queue.append(w)
        self.queue = deque()

    def dissolve(self, u: int, v: int) -> bool:
        """Turn the edge into node costs if its table is a sum of a row and a column. Exact sums only."""
        table = self.adjacent[u][v]
        if not np.isfinite(table).all():
            return False
        rows, columns = table[:, 0] - table[0, 0], table[0]
        if not np.array_equal(rows[:, None] + columns, table):
            return False
        self.unlink(u, v)
        self.cost[u] = self.cost[u] + rows
        self.cost[v] = self.cost[v] + columns
        return True

    def merge(self, u: int, v: int) -> bool:
        """Let u decide v, if every strategy of u leaves v exactly one and the tables do not grow much."""
        table = self.adjacent[u][v]
        possible = np.isfinite(table)
        if not (possible.sum(axis=1) == 1).all():
            return False
        mine, theirs = table.shape
        if mine > theirs:
            grown = (mine - theirs) * sum(len(self.cost[w]) for w in self.adjacent[v] if w != u and w not in self.adjacent[u])
            if grown > MERGE_GROWTH * table.size:
                return False
        elif mine == theirs and len(self.adjacent[v]) > len(self.adjacent[u]) and self.merge_onto(v, u):
            return True
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

    def merge_onto(self, v: int, u: int) -> bool:
        """The other way round, where the pairing is one to one and v has the more neighbours."""
        return bool((np.isfinite(self.adjacent[v][u]).sum(axis=1) == 1).all()) and self.merge(v, u)

    def lookup(self, parents: tuple[int, ...], chosen: np.ndarray) -> np.ndarray:
        """A table by the problem's own numbers of the parents' strategies, from one by their positions now."""
        table = np.full([self.sizes[p] for p in parents], -1, dtype=np.int32)
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
        before = [len(loads) for loads in self.loads]
        for u in np.flatnonzero(self.alive).tolist():
            if len(self.loads[u]) > 1:
                self.loads[u] = disjoint(self.loads[u])
        while True:
            flat = Profiles(self)
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
            flat.store(self)
            slack = RangeMin(self.capacity).over(flat.begin, flat.end)
            tight = np.flatnonzero(flat.per_span(np.maximum) > slack)
            fits: dict[int, np.ndarray] = {}
            for i in tight.tolist():
                u = int(flat.node[i])
                fits[u] = fits.get(u, True) & (flat.usage(i) <= slack[i])
            for u, fit in fits.items():
                self.restrict(u, np.flatnonzero(fit))
            if not len(tight):
                break
        most = flat.sum_over_time(flat.per_span(np.maximum), len(self.capacity))
        self.drop_times(flat, most > self.capacity)
        self.dirty.update(u for u in np.flatnonzero(self.alive).tolist() if len(self.loads[u]) != before[u])

    def drop_times(self, flat: Profiles, keep: np.ndarray) -> None:
        """Leave out times that are not to be kept, and those at which a time beside them asks for no less."""
        while True:
            place = np.concatenate([[0], np.cumsum(keep)])
            limits = self.capacity[keep]
            rises, falls = flat.changes(place[flat.begin], place[flat.end], len(limits))
            drop = np.zeros(len(limits), dtype=bool)
            for t in range(len(limits) - 1):
                if drop[t]:
                    continue
                if not falls[t + 1] and limits[t + 1] <= limits[t]:
                    drop[t] = True
                elif not rises[t + 1] and limits[t] <= limits[t + 1]:
                    drop[t + 1] = True
            if not drop.any():
                break
            keep = keep.copy()
            keep[np.flatnonzero(keep)[drop]] = False
        self.capacity, self.times = limits, self.times[keep]
        flat.begin, flat.end = place[flat.begin], place[flat.end]
        flat.store(self)

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
            if v in self.adjacent[u] and not self.dissolve(u, v) and not self.merge(u, v):
                self.merge(v, u)
        if self.alive[u]:
            self.eliminate(u)


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


def disjoint(loads: dict[tuple[int, int], np.ndarray]) -> dict[tuple[int, int], np.ndarray]:
    """The same usages over spans that do not overlap, in order of time."""
    spans = sorted(loads)
    if all(left[1] <= right[0] for left, right in pairwise(spans)):
        return {span: loads[span] for span in spans}
    bounds = np.unique(spans)
    begin, end = np.array(spans).T
    covers = (begin <= bounds[:-1, None]) & (end >= bounds[1:, None])
    joint = covers.astype(float) @ np.stack([loads[span] for span in spans])
    cut = list(zip(bounds[:-1].tolist(), bounds[1:].tolist()))
    return {span: usage for span, usage, used in zip(cut, joint, covers.any(axis=1)) if used}


class Profiles:
    """All loads of a reducer in flat arrays, a span after the other: of node `node[i]`, [begin[i], end[i]), and its usages."""

    def __init__(self, reducer: Reducer) -> None:
        found = [(u, *span, usage) for u in np.flatnonzero(reducer.alive).tolist() for span, usage in reducer.loads[u].items()]
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

    def store(self, reducer: Reducer) -> None:
        """Put the spans back, without those that are empty or use nothing, equal neighbours joined."""
        mine: dict[int, dict[tuple[int, int], np.ndarray]] = {int(u): {} for u in self.node}
        used = self.per_span(np.maximum) > 0
        for i in np.flatnonzero(used & (self.end > self.begin)).tolist():
            u = int(self.node[i])
            begin, usage, loads = int(self.begin[i]), self.usage(i), mine[u]
            if loads:
                span = next(reversed(loads))
                if span[1] == begin and np.array_equal(loads[span], usage):
                    begin = span[0]
                    del loads[span]
            loads[begin, int(self.end[i])] = usage
        for u, loads in mine.items():
            reducer.loads[u] = loads


def expand(reducer: Reducer, chosen: np.ndarray) -> np.ndarray:
    """Strategies of the problem, (n,), from the reducer's own: for each node alive a position among those left."""
    strategies = np.full(len(reducer.cost), -1, dtype=np.int64)
    alive = np.flatnonzero(reducer.alive)
    strategies[alive] = [reducer.labels[u][position] for u, position in zip(alive.tolist(), chosen.tolist())]
    for step in reversed(reducer.steps):
        strategies[step.node] = step.table[tuple(strategies[p] for p in step.parents)]
    return strategies
