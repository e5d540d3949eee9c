"""The nouns of the room: a problem with usages over lifetime intervals, what an assignment of it costs, and a solution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class IntervalProblem:
    """Choose one strategy per node: least sum of node and edge costs, with the usages alive at any time within `limit`.

    `costs`, `usages`: per node, an array over its strategies; infinite costs are impossible choices. `intervals`: (n, 2)
    half-open lifetimes, during which the chosen strategy's usage counts. `edges`: (m, 2) node indices; `tables`: per edge,
    costs of shape (strategies of the first, strategies of the second). Raises ValueError where these do not fit together.
    """

    costs: tuple[np.ndarray, ...]
    usages: tuple[np.ndarray, ...]
    intervals: np.ndarray
    edges: np.ndarray
    tables: tuple[np.ndarray, ...]
    limit: float
    name: str = ""

    def __post_init__(self) -> None:
        count = len(self.costs)
        if len(self.usages) != count or self.intervals.shape != (count, 2):
            raise ValueError(f"{count} nodes have costs, {len(self.usages)} usages, {self.intervals.shape} intervals")
        if self.edges.shape != (len(self.tables), 2):
            raise ValueError(f"{len(self.tables)} cost tables for edges of shape {self.edges.shape}")
        for node, (cost, usage) in enumerate(zip(self.costs, self.usages)):
            if cost.ndim != 1 or not len(cost) or cost.shape != usage.shape:
                raise ValueError(f"node {node}: costs of shape {cost.shape}, usages of shape {usage.shape}")
        for (tail, head), table in zip(self.edges.tolist(), self.tables):
            if not (0 <= tail < count and 0 <= head < count and tail != head):
                raise ValueError(f"edge ({tail}, {head}) is not between two of the {count} nodes")
            if table.shape != (len(self.costs[tail]), len(self.costs[head])):
                raise ValueError(f"edge ({tail}, {head}): a table of shape {table.shape}")

    @property
    def counts(self) -> np.ndarray:
        """Strategies per node."""
        return np.array([len(cost) for cost in self.costs], dtype=np.int64)


class Peak(NamedTuple):
    """The worst half-open interval [start, end) of an assignment, and the usage alive there."""

    start: int
    end: int
    usage: float


@dataclass(frozen=True)
class Solution:
    """One strategy per node. `bound`: a proven lower bound of every feasible cost (-inf: none)."""

    strategies: np.ndarray
    cost: float
    bound: float = -math.inf
    notes: dict[str, object] = field(default_factory=dict)


class NoSolutionError(ValueError):
    """No assignment is feasible, or none was found: the message says which, with the interval and the shortage."""


def checked(problem: IntervalProblem, strategies: Sequence[int] | np.ndarray) -> np.ndarray:
    """Strategies as an array. Raises ValueError if they are not one legal index per node."""
    chosen = np.asarray(strategies)
    if chosen.shape != (len(problem.costs),) or (len(chosen) and chosen.dtype.kind not in "iu"):
        raise ValueError(f"strategies of shape {chosen.shape} and dtype {chosen.dtype}; wanted {len(problem.costs)} integers")
    wrong = np.flatnonzero((chosen < 0) | (chosen >= problem.counts))
    if len(wrong):
        node = wrong[0]
        raise ValueError(f"strategy {chosen[node]} of node {node}, which has {len(problem.costs[node])}")
    return chosen.astype(np.int64)


def cost_of(problem: IntervalProblem, strategies: Sequence[int] | np.ndarray) -> float:
    """The sum of node and edge costs, exactly rounded; infinity for an impossible choice. Usages are not looked at."""
    chosen = checked(problem, strategies).tolist()
    nodes = [cost[s] for cost, s in zip(problem.costs, chosen)]
    links = [table[chosen[t], chosen[h]] for (t, h), table in zip(problem.edges.tolist(), problem.tables)]
    return math.fsum([*nodes, *links])


def peak_of(problem: IntervalProblem, usages: np.ndarray) -> Peak:
    """Where one usage per node, (n,), adds up to most: the first interval between two events at which it does."""
    starts, ends = problem.intervals[:, 0], problem.intervals[:, 1]
    alive = ends > starts
    times = np.unique(problem.intervals[alive])
    if len(times) < 2:
        return Peak(0, 0, 0.0)
    change = np.zeros(len(times))
    np.add.at(change, np.searchsorted(times, starts[alive]), usages[alive])
    np.add.at(change, np.searchsorted(times, ends[alive]), -usages[alive])
    level = np.cumsum(change)[:-1]
    worst = int(level.argmax())
    return Peak(int(times[worst]), int(times[worst + 1]), float(level[worst]))


def peak_usage(problem: IntervalProblem, strategies: Sequence[int] | np.ndarray) -> Peak:
    """The peak of an assignment; feasible if its usage is within `problem.limit`."""
    chosen = checked(problem, strategies).tolist()
    return peak_of(problem, np.array([usage[s] for usage, s in zip(problem.usages, chosen)], dtype=float))


def least_peak(problem: IntervalProblem) -> Peak:
    """The peak with every node at its smallest usage: above the limit, nothing is feasible."""
    return peak_of(problem, np.array([usage.min() for usage in problem.usages], dtype=float))
