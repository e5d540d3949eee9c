"""Two nodes at a time re-opened, with an exact look at the limit: what mends small problems, where no multiplier is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from jaxplan.problem import Meter, Problem
from jaxplan.reduce import ILLEGAL, Pricer

AFFORDABLE = 2_000_000
"""Numbers that one round may take; problems that take more are left as they are."""
LOOKS = 8_000
"""Pairs of nodes looked at, in all rounds together."""
TINY = 1e-30
"""Seconds that count as none."""
LEAST = 1e-9
"""An improvement below this fraction is none."""


def swapped(problem: Problem, starts: Sequence[np.ndarray], allowed: float) -> list[np.ndarray]:
    """From each assignment, (nodes, axes), where changes lead: they lower the peak while that is above `allowed`, then the price.
    Each round takes the best change of any one or two nodes, among all their joint choices, until there is none. Nothing where
    that takes too much."""
    counts = np.array([np.prod(node.options) for node in problem.nodes], dtype=float)
    if len(counts) < 1 or not len(problem.usages):
        return []
    meter = Meter(problem)
    events = np.unique(np.concatenate([meter.begins, meter.ends, *([np.arange(meter.steps)] if problem.reserved else [])]))
    events = events[events < meter.steps]
    if counts.sum() ** 2 / 2 * len(events) > AFFORDABLE:
        return []
    state, found = _State(problem, meter.levels(np.zeros(len(problem.usages)))[events], events), []
    rounds = LOOKS // max(1, math.comb(len(counts), 2))
    for start in starts:
        state.begin(start)
        while rounds > 0 and state.improve(allowed):
            rounds -= 1
        rounds -= 1
        found.append(state.choices())
    return found


class _State:
    """Prices and usages of a small problem written out, and the option of every node now."""

    def __init__(self, problem: Problem, reserved: np.ndarray, events: np.ndarray) -> None:
        tables, self.rows = Pricer(problem).whole(AFFORDABLE)
        self.costs, self.pairs = tables.costs, dict(tables.pairs)
        self.now: list[int] = []
        self.reserved = reserved
        self.alone = [np.zeros((len(rows), len(events))) for rows in self.rows]
        self.both: dict[tuple[int, int], np.ndarray] = {}
        for usage in problem.usages:
            alive = ((usage.begin <= events) & (events < usage.end)).astype(float)
            amount: Any = usage.amount
            table = amount(*[self.rows[node] for node in usage.nodes])
            i, j = usage.nodes[0], usage.nodes[-1]
            if i == j:
                self.alone[i] += np.multiply.outer(table.diagonal() if table.ndim == 2 else table, alive)
            else:
                key, table = ((i, j), table) if i < j else ((j, i), table.T)
                self.both[key] = self.both.get(key, 0.0) + np.multiply.outer(table, alive)
        self.near: list[set[int]] = [set() for _ in self.rows]
        for i, j in (*self.pairs, *self.both):
            self.near[i].add(j)
            self.near[j].add(i)

    def begin(self, choices: np.ndarray) -> None:
        """Start anew from an assignment."""
        self.now = [int((rows == own).all(1).argmax()) for rows, own in zip(self.rows, choices, strict=True)]

    def choices(self) -> np.ndarray:
        """(nodes, axes)."""
        return np.array([rows[option] for rows, option in zip(self.rows, self.now, strict=True)], dtype=np.int64)

    def seen(self, i: int, but: int) -> tuple[np.ndarray, np.ndarray]:
        """(seconds, (options, events) usages) of a node's options with all neighbours as they are, one left out."""
        cost, used = self.costs[i], self.alone[i]
        for j in self.near[i] - {but}:
            key, turned = ((i, j), False) if i < j else ((j, i), True)
            if key in self.pairs:
                cost = cost + (self.pairs[key][self.now[j]] if turned else self.pairs[key][:, self.now[j]])
            if key in self.both:
                used = used + (self.both[key][self.now[j]] if turned else self.both[key][:, self.now[j]])
        return cost, used

    def level(self) -> np.ndarray:
        """(events,) what is taken now."""
        total = self.reserved + sum(own[option] for own, option in zip(self.alone, self.now, strict=True))
        return total + sum(table[self.now[i], self.now[j]] for (i, j), table in self.both.items())

    def improve(self, allowed: float) -> bool:
        """Make the best change of two nodes, for the peak where that is above what is allowed, else for the price; whether there
        was one."""
        level = self.level()
        peak = float(level.max())
        best, change = 0.0 if peak > allowed else -LEAST * self.seconds(), None
        for i, j in combinations(range(len(self.now)), 2) if len(self.now) > 1 else [(0, 0)]:
            cost, used = self.together(i, j)
            at = self.now[i], self.now[j] if i != j else 0
            over = np.maximum((level + used - used[at]).max(-1), allowed) - max(peak, allowed)
            gain = np.where((cost < ILLEGAL) & (over <= 0), cost - cost[at], np.inf)
            if peak > allowed:  # what lowers the peak by most per second; what costs nothing first
                gain = np.where(over < 0, np.where(gain > 0, over / np.maximum(gain, TINY), over / TINY + gain), np.inf)
            pick = np.unravel_index(gain.argmin(), gain.shape)
            found = float(gain[pick])
            if found < best:
                best, change = found, (i, j, pick)
        if change is None:
            return False
        i, j, (first, second) = change
        self.now[i] = int(first)
        if i != j:
            self.now[j] = int(second)
        return True

    def together(self, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
        """(seconds, usages at every event) of every pair of options of two nodes, i < j; of one node and nothing where they are
        the same."""
        (cost, used), (theirs, their_use) = self.seen(i, j), self.seen(j, i)
        if i == j:
            return cost[:, None], used[:, None]
        cost, used = cost[:, None] + theirs, used[:, None] + their_use
        if (i, j) in self.pairs:
            cost = cost + self.pairs[i, j]
        if (i, j) in self.both:
            used = used + self.both[i, j]
        return cost, used

    def seconds(self) -> float:
        """The price now."""
        total = sum(float(cost[option]) for cost, option in zip(self.costs, self.now, strict=True))
        return total + sum(float(table[self.now[i], self.now[j]]) for (i, j), table in self.pairs.items())
