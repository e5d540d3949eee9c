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
KEPT = 1 << 12
"""Entries of a table up to which it is kept until variables take their options; of larger ones a line is summed again then. It
pays, too, to sort the dimensions of larger ones before they are summed."""


def option_weights(counts: Iterable[int]) -> list[int]:
    """What `min_fill_order` wants, from how many options each variable has."""
    return [round(16 * math.log2(count)) for count in counts]


def min_fill_order(weights: Sequence[int], pairs: Iterable[tuple[int, int]]) -> list[int]:
    """An order of elimination that greedily adds the lightest edges (weighted min-fill); ties by number.

    `weights`: one per variable, growing with the logarithm of how many options it has; an edge weighs the product of its ends.
    """
    near: list[set[int]] = [set() for _ in weights]
    for i, j in pairs:
        near[i].add(j)
        near[j].add(i)

    def fill(v: int) -> int:
        around = near[v]
        if len(around) < 2:
            return 0
        if len(around) == 2:
            a, b = around
            return 0 if b in near[a] else weights[a] * weights[b]
        missing, rest = 0, set(around)
        for w in around:
            rest.discard(w)
            weight = weights[w]
            for u in rest - near[w]:
                missing += weight * weights[u]
        return missing

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
        touched = set(around)
        for a in around if s else ():
            for b in around - near[a]:
                if a == b:
                    continue
                shared, product = near[a] & near[b], weights[a] * weights[b]
                for w in shared:
                    score[w] -= product
                score[a] += weights[b] * sum([weights[u] for u in near[a] - near[b]])
                score[b] += weights[a] * sum([weights[u] for u in near[b] - near[a]])
                near[a].add(b)
                near[b].add(a)
                touched |= shared
        for w in around:  # all of them neighbours now: what they lose is what is missing between the one and their others
            near[w].discard(v)
            score[w] -= weights[v] * sum([weights[u] for u in near[w] - around])
        for w in touched:
            if not gone[w]:
                heapq.heappush(heap, (score[w], w))
    return order


def solve(
    tables: Tables, order: list[int], incumbent: np.ndarray | None = None, tally: list[int] | None = None, cap: int = CAP,
    piece: int | None = None, known: np.ndarray | None = None, rounds: int = 2,
) -> tuple[np.ndarray, bool]:
    """(an option per variable, whether it is proven optimal). `order`: the variables as they are to be eliminated.

    Where a table would grow beyond `cap` entries, without an incumbent: mini-buckets of at most `piece` entries (None: `cap`),
    then `rounds` that start from what they found and build no larger tables; or, with `known` (an option per variable), the
    cheaper of that and what they found. With an `incumbent`: variables that would grow a table too far keep its option this
    time, so the result is never worse; it is the incumbent itself where nothing is better. `tally` counts how often each was
    kept, so that the next call keeps others.
    """
    tally = tally if tally is not None else [0] * len(tables.costs)
    if incumbent is None:
        found, exact = _Buckets(tables, cap, piece).run(order, None, tally)
        if not exact and known is not None:
            return (known if tables.price(known) < tables.price(found) else found), False
        for _ in range(0 if exact else rounds):
            found, _ = solve(tables, order, found, tally, piece or cap)
        return found, exact
    found, exact = _Buckets(tables, cap).run(order, incumbent, tally)
    better = not np.array_equal(found, incumbent) and tables.price(found) < tables.price(incumbent)
    return (found if better else incumbent), exact


def lower_bound(tables: Tables, order: list[int], cap: int = CAP) -> tuple[float, np.ndarray, bool]:
    """(a price that no assignment goes below, an option per variable, whether these reach it): elimination, with mini-buckets
    where a table would grow beyond `cap` entries."""
    buckets = _Buckets(tables, cap)
    options, exact = buckets.run(order, None, [0] * len(tables.costs))
    return buckets.bound, options, exact


_INSERTED = [(*[slice(None)] * place, None) for place in range(64)]
"""What makes a dimension of size 1 at a place; NumPy has 64."""


class _Table:
    """A table over the variables of an ascending scope; `used` once it has gone into another."""

    __slots__ = ("array", "scope", "used")

    def __init__(self, scope: tuple[int, ...], array: np.ndarray) -> None:
        self.scope, self.array, self.used = scope, array, False

    def line(self, v: int, options: list[int]) -> np.ndarray:
        """Per option of one variable of the scope, with the options of the others."""
        return self.array[tuple([slice(None) if w == v else options[w] for w in self.scope])]


class _Sum:
    """A table that is not kept: those that it is the sum of, in that order."""

    __slots__ = ("tables",)

    def __init__(self, tables: list[_Table]) -> None:
        self.tables = tables

    def line(self, v: int, options: list[int]) -> np.ndarray:
        """As of a table."""
        total = self.tables[0].line(v, options)
        for table in self.tables[1:]:
            total = total + table.line(v, options)
        return total


def _entries(table: _Table) -> int:
    return table.array.size


class _Buckets:
    """One elimination."""

    def __init__(self, tables: Tables, cap: int, piece: int | None = None) -> None:
        self.cap, self.piece = cap, piece or cap
        self.bound = 0.0  # what the variables eliminated so far cost at least; unless some were conditioned
        self.sizes = [len(cost) for cost in tables.costs]
        self.costs = list(tables.costs)
        self.tables: list[list[_Table]] = [[] for _ in self.sizes]
        for (i, j), array in tables.pairs.items():
            if self.sizes[i] == 1 or self.sizes[j] == 1:  # nothing to choose together, as in most of what proposals agree on
                alone, vector = (j, array[0]) if self.sizes[i] == 1 else (i, array[:, 0])
                self.costs[alone] = self.costs[alone] + vector
                continue
            table = _Table((i, j), array)
            self.tables[i].append(table)
            self.tables[j].append(table)

    def _add(self, scope: tuple[int, ...], array: np.ndarray) -> None:
        if len(scope) == 1:
            self.costs[scope[0]] = self.costs[scope[0]] + array
            return
        table = _Table(scope, array)
        for v in scope:
            self.tables[v].append(table)

    def _open(self, v: int) -> list[_Table]:
        """The tables that mention a variable now."""
        self.tables[v] = [table for table in self.tables[v] if not table.used]
        return self.tables[v]

    def run(self, order: list[int], incumbent: np.ndarray | None, tally: list[int]) -> tuple[np.ndarray, bool]:
        """(options, whether they are optimal)."""
        sizes, exact = self.sizes, True
        trail: list[tuple[int, list[_Table | _Sum]]] = []
        options = [0] * len(sizes)
        fixed = {v for v, size in enumerate(sizes) if size == 1}
        self.bound += sum([float(self.costs[v][0]) for v in fixed])
        for v in order:
            if v in fixed:
                continue
            tables = self._open(v)
            scope = {v}.union(*[table.scope for table in tables])
            entries = math.prod([sizes[w] for w in scope])
            while entries > self.cap and incumbent is not None:
                hub = max(scope, key=lambda x: (len(self._open(x)) - 3 * tally[x], -x))
                tally[hub] += 1
                exact = False
                options[hub] = int(incumbent[hub])
                fixed.add(hub)
                self._condition(hub, options[hub])
                scope.discard(hub)
                entries //= sizes[hub]
                tables = self._open(v)
            if v in fixed:
                continue
            if entries > self.cap and len(scope) > 1:
                exact = False
                trail.append((v, self._split(v, tables)))
            else:
                trail.append((v, [self._join(v, sorted(scope), tables)]))
        for v, groups in reversed(trail):
            parts = [table.line(v, options) for table in groups]
            options[v] = int((parts[0] if len(parts) == 1 else np.sum(parts, axis=0)).argmin())
        return np.array(options, dtype=np.int64), exact

    def _join(self, v: int, scope: list[int], tables: list[_Table]) -> _Table | _Sum:
        """Sum tables that mention a variable, take the minimum over it, and put the result back."""
        where, dims = scope.index(v), len(scope)
        if len(tables) > 2:  # small tables first: fewer large sums
            tables = sorted(tables, key=_entries)
        entries = math.prod([self.sizes[w] for w in scope])
        if dims > 1 and entries > KEPT:
            return self._join_large(v, scope, tables, entries)
        total = self.costs[v]
        if dims > 1:
            total = total.reshape([-1 if w == v else 1 for w in scope])
        for table in tables:
            table.used = True
            mine, part = table.scope, table.array
            if len(mine) == dims - 1:
                missing = next((place for place, w in enumerate(mine) if w != scope[place]), dims - 1)
                part = part[_INSERTED[missing]]
            elif len(mine) < dims:
                part = part.reshape([self.sizes[w] if w in mine else 1 for w in scope])
            if total.size == entries:  # the sum is ours alone: no more memory is touched than that
                total += part
            else:
                total = total + part
        if dims > 1:
            self._add((*scope[:where], *scope[where + 1 :]), np.minimum.reduce(total, where))
        else:
            self.bound += float(total.min())
        return _Table(tuple(scope), total)

    def _join_large(self, v: int, scope: list[int], tables: list[_Table], entries: int) -> _Sum:
        """The same. Variables that the same tables mention stand next to one another, so that sums run over few long dimensions
        instead of many short ones; the variable itself comes first. What is returned is what the sum is of, so that it takes no
        memory until the end."""
        mentioned = dict.fromkeys(scope, 0)
        for bit, table in enumerate(tables):
            for w in table.scope:
                mentioned[w] |= 1 << bit
        order = [v, *sorted([w for w in scope if w != v], key=mentioned.__getitem__)]
        rank = {w: place for place, w in enumerate(order)}
        total = self.costs[v].reshape([-1, *[1] * (len(order) - 1)])
        for table in tables:
            table.used = True
            turn = sorted(range(len(table.scope)), key=lambda d, mine=table.scope: rank[mine[d]])
            part = np.ascontiguousarray(table.array.transpose(turn))
            part = part.reshape([self.sizes[w] if w in table.scope else 1 for w in order])
            if total.size == entries:
                total += part
            else:
                total = total + part
        least = np.minimum.reduce(total, 0)
        rest = scope[: scope.index(v)] + scope[scope.index(v) + 1 :]
        self._add(tuple(rest), least.transpose([rank[w] - 1 for w in rest]))
        return _Sum([_Table((v,), self.costs[v]), *tables])

    def _split(self, v: int, tables: list[_Table]) -> list[_Table | _Sum]:
        """Mini-buckets: groups of tables whose sums fit, each minimised by itself (a lower bound)."""
        groups: list[tuple[set[int], list[_Table]]] = []
        for table in sorted(tables, key=lambda table: -table.array.size):
            for union, members in groups:
                if math.prod(self.sizes[w] for w in union.union(table.scope)) <= self.piece:
                    union.update(table.scope)
                    members.append(table)
                    break
            else:
                groups.append((set(table.scope), [table]))
        joined: list[_Table | _Sum] = []
        for union, members in groups:
            joined.append(self._join(v, sorted(union), members))
            self.costs[v] = np.zeros(self.sizes[v])  # paid once, in the first group
        return joined

    def _condition(self, v: int, option: int) -> None:
        """Fix a variable: its tables lose a dimension."""
        for table in self._open(v):
            table.used = True
            place = table.scope.index(v)
            self._add(table.scope[:place] + table.scope[place + 1 :], table.array[(slice(None),) * place + (option,)])
