"""Searches within a limit on usages: multipliers on the few steps that bind, then parts of what was met, put together exactly.

Dantzig-Wolfe decomposition (Operations Research 1960): the best mixture of the assignments met so far that stays within the
limit is a small linear program; its multipliers say what a unit costs at each step; a search that pays these prices finds the
next assignment. Most steps get no price: the linear program prices as many as it mixes assignments, at most. Mixtures are none
themselves, so of the best that fits those parts are replaced, one by one, that another assignment has cheaper and that still fit
(a knapsack; parts are sets of connected nodes on which two assignments differ). Then neighbourhoods of it are re-opened; small
problems are solved exactly instead (`exactly.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import linprog
from scipy.sparse.csgraph import connected_components

from jaxplan.problem import ROUNDING, Assignment, Meter, Node, Problem, edge_prices, node_prices
from jaxplan.search.exactly import exactly
from jaxplan.search.neighbourhoods import merged, within_neighbourhoods

Inner = Callable[[np.ndarray, Sequence[np.ndarray]], np.ndarray]
"""From what a unit of each usage costs, (usages,), and assignments that are known, (nodes, axes), to the best at these prices."""

ROUNDS = 12
"""Searches at prices, at most."""
DEAR = (10.0, 1e3, 1e5)
"""What a unit above the limit costs at first, and where that brings nothing within it: in times what the first assignment costs
per unit of its peak."""
SETTLED = 1e-7
"""A gain, as a fraction of the price, below which the multipliers count as settled."""
MERGES = 3
"""How often what was met is merged at the multipliers that this leads to."""
ROWS = 22
"""Bits of the number of a node's choice."""
CLOSE = 2e-3
"""What fits and costs no more above the cheapest known assignment of all, as a fraction, is good enough where that is not told
exactly."""
PASSES = 2
"""How often parts of all other assignments are tried in the best."""


class OverLimit(ValueError):
    """No assignment within the limit was found. `nearest`: the one whose peak is the least."""

    def __init__(self, message: str, nearest: Assignment) -> None:
        super().__init__(message)
        self.nearest = nearest


@dataclass(frozen=True)
class _Met:
    """An assignment, its prices per node and per edge, what it takes per usage, and that added up per step."""

    choices: np.ndarray
    nodes: np.ndarray
    edges: np.ndarray
    amounts: np.ndarray
    level: np.ndarray

    @cached_property
    def seconds(self) -> float:
        """Its price."""
        return float(self.nodes.sum() + self.edges.sum())

    @cached_property
    def peak(self) -> float:
        """The most it takes at any step."""
        return float(self.level.max(initial=-math.inf))


def limited(problem: Problem, inner: Inner, name: str) -> Assignment:
    """The cheapest assignment found within the problem's limit. `inner`: a search at prices; `name`: its name.

    Starts from `problem.starts`, or else from what `inner` finds at no price. Deterministic. `notes["met"]`: all assignments met,
    to start another limit from; `notes["multipliers"]`: (steps,) seconds per unit, the last ones. Raises OverLimit.
    """
    parts = _Parts(problem)
    met = [parts.meet(start) for start in problem.starts] or [parts.meet(inner(np.zeros(len(problem.usages)), ()))]
    allowed = problem.limit + ROUNDING * abs(problem.limit)
    free = min(met, key=lambda one: one.seconds)
    unit = max(free.seconds, 1e-30) / max(1e-30, abs(free.peak), abs(problem.limit))
    multipliers = np.zeros(parts.meter.steps)
    heights = iter(DEAR)
    dear = next(heights) * unit
    for _ in range(ROUNDS if free.peak > allowed or not problem.starts else 0):
        multipliers, promised, above = _master(met, problem.limit, dear)
        found = parts.meet(inner(parts.meter.spans(multipliers), [one.choices for one in met]))
        better = found.seconds + float(multipliers @ found.level) < promised - SETTLED * abs(promised)
        if better:
            met.append(found)
        elif above <= ROUNDING * abs(problem.limit):
            break
        else:
            height = next(heights, None)
            if height is None:
                break
            dear = height * unit
    mixed = list(met)

    def close(found: Sequence[_Met]) -> bool:
        return any(one.peak <= allowed and one.seconds <= (1 + CLOSE) * free.seconds for one in found)

    for _ in range(MERGES if len(met) > 1 and not close(met) else 0):
        fresh = [parts.meet(choices) for choices in merged(problem, [one.choices for one in mixed], multipliers)]
        fresh = [one for one in fresh if not any((one.choices == other.choices).all() for other in mixed)]
        if not fresh:
            break
        mixed += [one for one in fresh if math.isfinite(one.seconds)]
        multipliers, _, _ = _master(mixed, problem.limit, dear)
    best = _put_together(parts, mixed, multipliers, allowed)
    mended = exactly(problem, best.seconds if best.peak <= allowed else math.inf, allowed)
    if (mended is None and not close([best])) or (mended == [] and best.peak > allowed):
        near = sorted(mixed, key=lambda one: (one.seconds, one.peak))
        mended = within_neighbourhoods(problem, [best.choices, *[one.choices for one in near]], multipliers, allowed)
    best = min([best, *map(parts.meet, mended or ())], key=lambda one: (max(one.peak, allowed), one.seconds, one.peak))
    notes: dict[str, object] = {"met": tuple([one.choices for one in met]), "multipliers": multipliers, "rounds": len(met)}
    answer = Assignment(best.choices, best.seconds, None, notes)
    if best.peak > allowed:
        begin, end, usage = parts.meter.peak(best.choices)
        raise OverLimit(
            f"search {name!r} found no assignment within the limit of {problem.limit:g}: the nearest uses {usage:g} in "
            f"[{begin}, {end}), {usage - problem.limit:g} more",
            answer,
        )
    return answer


def at_prices(problem: Problem, spans: np.ndarray) -> Problem:
    """The problem without its limit, where a unit of each usage costs so many seconds, (usages,), on top."""
    paid: dict[int, list[tuple[Any, float]]] = {}
    edges = list(problem.edges)
    for usage, price in zip(problem.usages, spans.tolist(), strict=True):
        if price > 0 and len(usage.nodes) == 1:
            paid.setdefault(usage.nodes[0], []).append((usage.amount, price))
        elif price > 0:
            edges.append(edges[0]._replace(tail=usage.nodes[0], head=usage.nodes[1], price=_times(usage.amount, price),
                                           kind=("usage", id(usage.amount), price), times=1.0))  # fmt: skip
    nodes = [_charged(node, paid[n]) if n in paid else node for n, node in enumerate(problem.nodes)]
    return replace(problem, nodes=tuple(nodes), edges=tuple(edges), usages=(), limit=math.inf, reserved=(), starts=())


def _times(amount: Any, price: float) -> Any:
    return lambda tails, heads: price * amount(tails, heads)


def _charged(node: Node, paid: list[tuple[Any, float]]) -> Node:
    def price(rows: np.ndarray) -> np.ndarray:
        return sum([rate / node.times * amount(rows) for amount, rate in paid], node.price(rows))

    if not node.times:
        return node
    kind = None if node.kind is None else (node.kind, *[(id(amount), rate) for amount, rate in paid])
    return node._replace(price=price, kind=kind)


def _master(met: Sequence[_Met], limit: float, dear: float) -> tuple[np.ndarray, float, float]:
    """The cheapest mixture of assignments within the limit, above which a unit costs `dear`: (multipliers of every step, what an
    assignment must cost less than, at these, to improve it, how far it is above the limit)."""
    levels = np.stack([one.level for one in met])
    over = np.flatnonzero(levels.max(0) > limit)
    high = levels[:, over]
    apart = np.ones(len(over), dtype=bool)  # a step whose neighbour takes as much or more in every assignment says nothing
    if len(over) > 1:
        ahead, behind = (high[:, 1:] >= high[:, :-1]).all(0), (high[:, 1:] <= high[:, :-1]).all(0)
        apart[:-1] &= ~ahead
        apart[1:] &= ahead | ~behind
    steps = over[apart]
    multipliers = np.zeros(levels.shape[1])
    costs = np.array([one.seconds for one in met])
    if not len(steps):
        return multipliers, float(costs.min()), 0.0
    size, scale = max(1e-30, abs(limit), float(np.abs(high).max())), max(1e-30, float(np.abs(costs).max()))
    rows = np.hstack([(levels[:, steps].T - limit) / size, np.full((len(steps), 1), -1.0)])
    solved = linprog(
        np.append(costs / scale, dear * size / scale), A_ub=rows, b_ub=np.zeros(len(steps)),
        A_eq=np.append(np.ones(len(met)), 0.0)[None], b_eq=[1.0], bounds=(0, None), method="highs",
    )  # fmt: skip
    if solved.x is None:
        raise ArithmeticError(f"the program over {len(met)} assignments was not solved: {solved.message}")
    multipliers[steps] = np.maximum(0.0, -solved.ineqlin.marginals) * scale / size
    promised = float(solved.eqlin.marginals[0]) * scale + limit * float(multipliers.sum())
    return multipliers, promised, float(solved.x[-1]) * size


class _Asked:
    """Prices, or amounts, of one node each or of two, for one choice of these at a time; each is asked for once."""

    def __init__(self, prices: Sequence[Any]) -> None:
        known: dict[int, int] = {}
        self._prices = prices
        self._number = np.array([known.setdefault(id(price), len(known)) for price in prices], dtype=np.int64)
        self._known: dict[int, float] = {}

    def of(self, choices: np.ndarray, rows: np.ndarray, *ends: np.ndarray) -> np.ndarray:
        """(prices,) of an assignment, (nodes, axes). `rows`: (nodes,) a number for the choice of each; `ends`: (prices,) the
        node, or the two, that each price is of."""
        keys = self._number
        for end in ends:
            keys = (keys << ROWS) + rows[end]
        each, first, owner = np.unique(keys, return_index=True, return_inverse=True)
        numbers = each.tolist()
        new = [place for place, number in enumerate(numbers) if number not in self._known]
        asked: list[Any] = [(self._prices[n], *[choices[end[n]][None] for end in ends]) for n in first[new].tolist()]
        found = node_prices(asked) if len(ends) == 1 else edge_prices(asked)
        self._known.update(zip([numbers[place] for place in new], [float(one.flat[0]) for one in found], strict=True))
        return np.array([self._known[number] for number in numbers])[owner]


class _Parts:
    """Assignments of a problem, and the parts in which two of them differ."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.meter = problem, Meter(problem)
        self._ends = np.array([(edge.tail, edge.head) for edge in problem.edges], dtype=np.int64).reshape(-1, 2)
        self._users = np.array([(u.nodes[0], u.nodes[-1]) for u in problem.usages], dtype=np.int64).reshape(-1, 2)
        self._rows: dict[tuple[int, ...], int] = {}
        self._node_prices = _Asked([node.price for node in problem.nodes])
        self._edge_prices = _Asked([edge.price for edge in problem.edges])
        self._times = np.array([node.times for node in problem.nodes])
        self._edge_times = np.array([edge.times for edge in problem.edges])
        pairs = np.array([len(usage.nodes) == 2 for usage in problem.usages], dtype=bool)
        self._alone, self._paired = np.flatnonzero(~pairs), np.flatnonzero(pairs)
        self._own = _Asked([problem.usages[n].amount for n in self._alone.tolist()])
        self._shared = _Asked([problem.usages[n].amount for n in self._paired.tolist()])

    def meet(self, choices: np.ndarray) -> _Met:
        """Measure an assignment. What was asked of a price or an amount before is not asked again."""
        numbers = [self._rows.setdefault(row, len(self._rows)) for row in map(tuple, choices.tolist())]
        rows, every = np.array(numbers, dtype=np.int64), np.arange(len(choices))
        amounts = np.zeros(len(self.problem.usages))
        amounts[self._alone] = self._own.of(choices, rows, self._users[self._alone, 0])
        amounts[self._paired] = self._shared.of(choices, rows, *self._users[self._paired].T)
        nodes, edges = self._node_prices.of(choices, rows, every), self._edge_prices.of(choices, rows, *self._ends.T)
        nodes = np.multiply(nodes, self._times, out=nodes, where=np.isfinite(nodes))
        edges = np.multiply(edges, self._edge_times, out=np.zeros(len(edges)), where=self._edge_times > 0)
        return _Met(choices, nodes, edges, amounts, self.meter.levels(amounts))

    def differing(self, one: _Met, other: _Met) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(the part of each node or -1, seconds that taking each part of the other saves, (parts, steps) what it adds)."""
        differ = (one.choices != other.choices).any(1)
        links = np.concatenate([self._ends, self._users])
        links = links[differ[links].all(1)]
        count = len(differ)
        graph = sparse.coo_matrix((np.ones(len(links)), (links[:, 0], links[:, 1])), (count, count))
        labels = connected_components(graph, directed=False)[1]
        part = np.full(count, -1)
        _, part[differ] = np.unique(labels[differ], return_inverse=True)
        parts = int(part.max(initial=-1)) + 1
        saved = np.zeros(parts)
        np.add.at(saved, part[differ], (one.nodes - other.nodes)[differ])
        touched = part[self._ends].max(1)
        np.add.at(saved, touched[touched >= 0], (one.edges - other.edges)[touched >= 0])
        added = np.zeros((parts, self.meter.steps + 1))
        owner = part[self._users].max(1)
        used = np.flatnonzero((owner >= 0) & (one.amounts != other.amounts))
        more = (other.amounts - one.amounts)[used]
        np.add.at(added, (owner[used], self.meter.begins[used]), more)
        np.add.at(added, (owner[used], self.meter.ends[used]), -more)
        return part, saved, np.cumsum(added, axis=1)[:, :-1]


def _put_together(parts: _Parts, met: Sequence[_Met], multipliers: np.ndarray, allowed: float) -> _Met:
    """The best of what was met, parts of the others in it that make it cheaper and keep it within the limit; where nothing is,
    parts that lower its peak."""
    best = min(met, key=lambda one: (max(one.peak, allowed), one.seconds, one.peak))
    for _ in range(PASSES):
        before = best
        for other in sorted(met, key=lambda one: (one.seconds, one.peak)):
            if best.peak > allowed:
                best = _lowered(parts, best, other, allowed)
        for other in sorted(met, key=lambda one: (one.seconds, one.peak)):
            best = _cheaper(parts, best, other, multipliers, max(allowed, best.peak))
        if best is before:
            break
    return best


def _lowered(parts: _Parts, one: _Met, other: _Met, allowed: float) -> _Met:
    """Take parts of another assignment as long as they lower the peak, until it is within the limit."""
    part, saved, added = parts.differing(one, other)
    taken, level = np.zeros(len(saved), dtype=bool), one.level.copy()
    barred = ~np.isfinite(saved)
    while (worst := level.max(initial=-math.inf)) > allowed:
        less = np.where(taken | barred, math.inf, added[:, level.argmax()])
        pick = int(less.argmin()) if len(less) else -1
        if pick < 0 or less[pick] >= -ROUNDING * abs(worst):
            break
        if (level + added[pick]).max() < worst:
            taken[pick] = True
            level = level + added[pick]
        else:
            barred[pick] = True
    return _with(parts, one, other, part, taken)


def _cheaper(parts: _Parts, one: _Met, other: _Met, multipliers: np.ndarray, allowed: float) -> _Met:
    """Take parts of another assignment that are cheaper, as long as all stays within the limit: the most saved per unit first,
    at the multipliers' prices, or the most saved at all."""
    part, saved, added = parts.differing(one, other)
    good = np.flatnonzero(saved > SETTLED * 1e-3 * one.seconds)
    found = one
    if not len(good):
        return one
    weight = np.maximum(added @ multipliers, 1e-12 * one.seconds)
    peak = np.maximum(added.max(1), 1e-12 * allowed)
    for order in (saved / weight, saved / peak, saved):
        taken, level = np.zeros(len(saved), dtype=bool), one.level.copy()
        for pick in good[np.argsort(-order[good], kind="stable")].tolist():
            now = level + added[pick]
            if now.max() <= allowed:
                taken[pick], level = True, now
        tried = _with(parts, one, other, part, taken)
        if tried.seconds < found.seconds and tried.peak <= allowed:
            found = tried
    return found


def _with(parts: _Parts, one: _Met, other: _Met, part: np.ndarray, taken: np.ndarray) -> _Met:
    """An assignment with some parts of another."""
    if not taken.any():
        return one
    choices = np.where(((part >= 0) & taken[part])[:, None], other.choices, one.choices)
    return parts.meet(choices)
