"""Lower bounds by message passing: the dual of the linear relaxation over joint choices, with nothing folded.

Sequential tree-reweighted message passing (Kolmogorov, TPAMI 2006; in the form that moves whole prices, TPAMI 2015): nodes are
visited in order and back again; each takes from its edges what they certainly cost, and gives shares of what it holds to those
after it. Any state of the messages re-writes the same problem, so the sum of all smallest prices is a lower bound, which never
falls. Edges see a choice only through the layout it implies: messages are per class of equal choices, and tables stay small.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from jaxplan.problem import Asked, Edge, Problem, all_rows, edge_labels, edge_prices, node_prices, repeated
from jaxplan.reduce import Tables

LIMIT = 30_000_000
"""Table entries above which a problem is refused."""
FLOOR_SWEEPS = 8
"""Sweeps of messages that a floor takes, at most."""
LOOSE = 1e3
"""How many times what a floor is asked to reach a pair may cost before its price is cut."""
CUT = 0.01
"""How far above a known assignment a pair's price is cut, as a fraction: what is cut stays dearer."""


class TooLarge(ValueError):
    """The prices of a problem's joint choices are too many to write out."""


class Classes(NamedTuple):
    """Options of a node as one edge sees them: `of` (options,) class numbers; `order`, `starts`: options sorted by class."""

    of: np.ndarray
    order: np.ndarray
    starts: np.ndarray

    def smallest(self, values: np.ndarray) -> np.ndarray:
        """The least value of each class."""
        return values if len(values) == len(self.starts) else np.minimum.reduceat(values[self.order], self.starts)


def _classes(labels: np.ndarray) -> tuple[Classes, np.ndarray]:
    """Classes of equal labels, in the order of labels, and an option of each."""
    values = labels.tolist()
    numbers = {label: number for number, label in enumerate(sorted(set(values)))}  # faster than NumPy for the few that there are
    if len(numbers) == len(values):  # nothing is equal: keep the options' own order
        first = np.arange(len(values))
        return Classes(first, first, first), first
    of = np.array([numbers[label] for label in values], dtype=np.int64)
    order = np.argsort(of, kind="stable")
    starts = np.searchsorted(of[order], np.arange(len(numbers)))
    return Classes(of, order, starts), order[starts]


class Link:
    """One edge: its ends, how each sees its options, and the price by class less what the messages took (`rest`)."""

    __slots__ = ("ends", "rest", "seen")

    def __init__(self, ends: tuple[int, int], seen: list[Classes], rest: np.ndarray) -> None:
        self.ends, self.seen, self.rest = ends, seen, rest


class Relaxation:
    """A problem as prices of nodes and links that messages re-write; `bound` grows with every `sweep`.

    `options[node]`: what is still open to it. `held[node]`: its prices now.
    """

    def __init__(
        self, problem: Problem, seconds: float, open_axes: Sequence[int] | None = None, fixed: np.ndarray | None = None
    ) -> None:
        """`seconds`: the price of a known assignment; pairs that no cheaper one can contain are cut to a finite price.

        `open_axes`: the axes along which nodes may choose, all others staying as in `fixed` (nodes, axes); None: all axes.
        Raises ValueError if a node has no legal choice, TooLarge for more than `LIMIT` table entries.
        """
        self.problem = problem
        self.rows, self.options, self.held = _legal(problem, open_axes, fixed)
        self.links: list[Link] = []
        self.dropped = 0
        edges = [edge for edge in problem.edges if edge.times]
        ends = [[_looks(edge, end, self.rows) for end in (0, 1)] for edge in edges]
        looks = {
            key: (edge.price, self.rows[node], end)
            for edge, keys in zip(edges, ends, strict=True)
            for end, (key, node) in enumerate(zip(keys, (edge.tail, edge.head), strict=True))
        }
        seen = dict(zip(looks, map(_classes, edge_labels(list(looks.values()))), strict=True))
        asked: dict[Hashable, Asked] = {}
        sides: list[tuple[Edge, Hashable, Classes, Classes]] = []
        entries = 0
        for edge, keys in zip(edges, ends, strict=True):
            (tail, some_tails), (head, some_heads) = seen[keys[0]], seen[keys[1]]
            key = (id(edge.price), id(tail), id(head))
            if key not in asked:
                entries += len(some_tails) * len(some_heads)
                if entries > LIMIT:
                    raise TooLarge(f"the relaxation takes more than {LIMIT:,} table entries: too large for a bound")
                asked[key] = edge.price, self.rows[edge.tail][some_tails], self.rows[edge.head][some_heads]
            sides.append((edge, key, tail, head))
        tables = dict(zip(asked, edge_prices(list(asked.values())), strict=True))
        for edge, key, tail, head in sides:
            priced = tables[key] if edge.times == 1.0 else edge.times * tables[key]
            if edge.tail == edge.head:
                self.held[edge.tail] = self.held[edge.tail] + priced[tail.of, head.of]
            else:
                self.links.append(Link((edge.tail, edge.head), [tail, head], priced))
        self._cut(seconds)
        self.around: list[list[tuple[Link, int, int]]] = [[] for _ in problem.nodes]
        for link in self.links:
            for end, (node, other) in enumerate((link.ends, link.ends[::-1])):
                self.around[node].append((link, end, other))

    def _cut(self, seconds: float) -> None:
        """Cut the prices of pairs: an assignment costs at least the bound plus what one of its pairs costs above its link's
        cheapest. All links at once, and each gets an array of its own."""
        if not self.links:
            return
        prices = np.concatenate([link.rest.ravel() for link in self.links])
        sizes = [link.rest.size for link in self.links]
        begins = list(accumulate(sizes, initial=0))
        least = np.minimum.reduceat(prices, begins[:-1])
        bound = sum([float(held.min()) for held in self.held]) + sum(least.tolist())
        np.minimum(prices, np.repeat(least + (1 + CUT) * (seconds - bound), sizes), out=prices)
        for link, begin, end in zip(self.links, begins, begins[1:], strict=False):
            link.rest = prices[begin:end].reshape(link.rest.shape)

    def sweep(self, forward: bool, slack: float) -> None:
        """Visit every node once. `slack`: an option that costs so many seconds above the bound is dropped: no assignment within
        the slack of the bound takes it."""
        nodes = range(len(self.held))
        for node in nodes if forward else reversed(nodes):
            around = self.around[node]
            held = self.held[node]
            for link, end, _ in around:  # take what an edge certainly costs
                sure = np.minimum.reduce(link.rest, 1 - end)
                link.rest -= sure[:, None] if end == 0 else sure
                held = held + sure[link.seen[end].of]
            if slack < np.inf:
                kept = held <= held.min() + slack
                if not kept.all():
                    held = self._drop(node, held, kept)
            after = [(link, end) for link, end, other in around if (other > node) == forward]
            if after:
                share = 1.0 / max(len(after), len(around) - len(after))
                rest = held
                for link, end in after:
                    classes = link.seen[end]
                    given = share * classes.smallest(held)
                    link.rest += given[:, None] if end == 0 else given
                    rest = rest - given[classes.of]
                held = rest
            self.held[node] = held

    def _drop(self, node: int, held: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Forget options of a node, and the classes that nobody is left in."""
        self.dropped += int(len(kept) - kept.sum())
        self.options[node] = self.options[node][kept]
        for link, end, _ in self.around[node]:
            left = link.seen[end].of[kept]
            classes, first = _classes(left)
            if len(first) < len(link.seen[end].starts):
                link.rest = link.rest[left[first]] if end == 0 else link.rest[:, left[first]]
            elif len(first) == len(left):  # the options' own order has become the classes'
                link.rest = link.rest[left] if end == 0 else link.rest[:, left]
            link.seen[end] = classes
        return held[kept]

    def bound(self) -> float:
        """Seconds that every assignment costs at least, of those that take none of the dropped options."""
        return sum([float(held.min()) for held in self.held]) + sum([float(link.rest.min()) for link in self.links])

    def decoded(self, forward: bool) -> np.ndarray:
        """An assignment, (nodes, axes), see `decided`."""
        return self.choices(self.decided(forward))

    def decided(self, forward: bool) -> list[int]:
        """An assignment, as numbers among what is still open: node by node, the best given those before it."""
        chosen = [0] * len(self.held)
        nodes = range(len(self.held))
        for node in nodes if forward else reversed(nodes):
            total = self.held[node]
            for link, end, other in self.around[node]:
                classes = link.seen[end].of
                if (other < node) == forward:
                    theirs = link.seen[1 - end].of[chosen[other]]
                    total = total + (link.rest[:, theirs] if end == 0 else link.rest[theirs])[classes]
                else:
                    total = total + link.rest.min(1 - end)[classes]
            chosen[node] = int(total.argmin())
        return chosen

    def choices(self, options: Sequence[int] | np.ndarray) -> np.ndarray:
        """(nodes, axes) of numbers among what is still open."""
        picked = [self.rows[node][self.options[node][option]] for node, option in enumerate(options)]
        return np.array(picked, dtype=np.int64).reshape(len(picked), len(self.problem.axes))

    def entries(self) -> int:
        """Table entries that the open options take, written out."""
        counts = [len(held) for held in self.held]
        pairs = {tuple(sorted(link.ends)) for link in self.links}
        return sum(counts) + sum([counts[i] * counts[j] for i, j in pairs])

    def tables(self, among: Sequence[Sequence[int]] | None = None) -> Tables:
        """The re-written prices of the open options: every assignment costs the same as before (if nothing was cut). `among`: of
        some of them per node, by number."""
        pairs: dict[tuple[int, int], np.ndarray] = {}
        some = None if among is None else [np.array(numbers, dtype=np.int64) for numbers in among]
        for link in self.links:
            tail, head = [classes.of for classes in link.seen]
            i, j = link.ends
            matrix = link.rest[np.ix_(tail, head) if some is None else np.ix_(tail[some[i]], head[some[j]])]
            where, matrix = ((i, j), matrix) if i < j else ((j, i), matrix.T)
            pairs[where] = pairs[where] + matrix if where in pairs else matrix
        held = self.held if some is None else [mine[numbers] for mine, numbers in zip(self.held, some, strict=True)]
        return Tables(tuple(held), pairs)


class Floor:
    """What every assignment of a problem costs at least: found out as far as is asked, by few sweeps."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._relaxation: Relaxation | None = None
        self._swept, self.seconds = 0, -math.inf

    def reaches(self, seconds: float) -> bool:
        """Whether all assignments are shown to cost so many seconds or more. Where a gain like that of the last sweep in each of
        those left would not show it, no more are made; nothing is shown of problems too large to be relaxed."""
        if self.seconds >= seconds or seconds == math.inf or self._swept >= FLOOR_SWEEPS:
            return self.seconds >= seconds
        if self._relaxation is None:
            try:
                self._relaxation = Relaxation(self._problem, LOOSE * abs(seconds))
            except ValueError:  # too large; or no assignment is legal, which the search says better
                self._swept = FLOOR_SWEEPS
                return False
            self.seconds = self._relaxation.bound()
        while self.seconds < seconds and self._swept < FLOOR_SWEEPS:
            self._relaxation.sweep(self._swept % 2 == 0, math.inf)
            before, self.seconds = self.seconds, self._relaxation.bound()
            self._swept += 1
            if self.seconds + (self.seconds - before) * (FLOOR_SWEEPS - self._swept) < seconds:
                break
        return self.seconds >= seconds


def _looks(edge: Edge, end: int, rows: Sequence[np.ndarray]) -> Hashable:
    """A key for how one end of an edge sees the choices of its node: ends of one key see them alike."""
    looks, node = getattr(edge.price, "ends", None), edge.head if end else edge.tail
    return (looks[end] if looks else (id(edge.price), end), id(rows[node]))


def _legal(
    problem: Problem, open_axes: Sequence[int] | None, fixed: np.ndarray | None
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Per node: its legal choices (one array for nodes of one price), their numbers among themselves, and their prices."""
    stays = np.zeros((len(problem.nodes), len(problem.axes)), dtype=np.int64) if fixed is None else fixed.copy()
    free = list(range(len(problem.axes)) if open_axes is None else open_axes)
    stays[:, free] = 0
    keys: list[Hashable] = [(id(node.price), node.options, row.tobytes()) for node, row in zip(problem.nodes, stays, strict=True)]
    inside: dict[tuple[int, ...], np.ndarray] = {}
    asked: dict[Hashable, tuple[Any, np.ndarray]] = {}
    for node, row, key in zip(problem.nodes, stays, keys, strict=True):
        if key not in asked:
            counts = tuple([node.options[axis] for axis in free])
            if counts not in inside:
                inside[counts] = np.zeros((math.prod(counts), len(row)), dtype=np.int64)
                inside[counts][:, free] = all_rows(counts)
            asked[key] = node.price, inside[counts] + row
    known: dict[Hashable, tuple[np.ndarray, np.ndarray]] = {}
    for (key, (_, every)), price in zip(asked.items(), node_prices(list(asked.values())), strict=True):
        legal = np.isfinite(price)
        known[key] = (every, price) if legal.all() else (every[legal], price[legal])
    rows, options, prices = [], [], []
    for node, key in zip(problem.nodes, keys, strict=True):
        if not len(known[key][0]):
            raise ValueError(f"no legal assignment: node {node.name!r} has no legal choice")
        mine, price = known[key]
        rows.append(mine)
        options.append(np.arange(len(mine)))
        prices.append(repeated(node.times, price))
    return rows, options, prices
