"""From a problem to a solution: reduce, ascend the dual, walk from its iterates, intensify the best walks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from jaxplan.solve.core import Core, core_of
from jaxplan.solve.dual import Dual
from jaxplan.solve.nouns import IntervalProblem, NoSolutionError, Solution, cost_of, peak_usage
from jaxplan.solve.primal import Walk
from jaxplan.solve.reductions import Reducer, expand

FIRST_STEP, LAST_STEP = 0.05, 5e-6
"""Steps of the dual's ascent, as `Dual.ascend` takes them, falling geometrically."""
ASCENT = 300
"""Steps of one ascent."""
CHUNK = 500
"""Forests tried between two looks at the clock."""
KEPT = 4
"""Walks that are intensified."""
PROVEN = 1e-9
"""A gap below which a solution counts as optimal."""


@dataclass
class Incumbent:
    """The best known so far, readable at any moment. `log`: called with a line of text when something improves."""

    problem: IntervalProblem
    log: Callable[[str], None] = lambda line: None
    cost: float = math.inf
    bound: float = -math.inf
    reducer: Reducer | None = None
    began: float = field(default_factory=time.monotonic)
    nearest: tuple[Reducer, np.ndarray] | None = None
    _held: tuple[Reducer | None, np.ndarray] | None = None

    def offer(self, reducer: Reducer | None, chosen: np.ndarray, cost: float) -> None:
        """Take a feasible assignment of the reduced problem (of the problem itself without a reducer) if it is better."""
        if cost < self.cost:
            self._held = (reducer, chosen.copy())
            self.cost = cost
            self.log(f"{time.monotonic() - self.began:7.1f} s  cost {cost:.9g}  bound {self.bound:.9g}")

    def solution(self) -> Solution | None:
        """The best solution, its cost and usages computed again from the problem; None if there is none."""
        if self._held is None:
            return None
        reducer, chosen = self._held
        strategies = chosen if reducer is None else expand(reducer, chosen)
        cost, peak = cost_of(self.problem, strategies), peak_usage(self.problem, strategies)
        if not math.isfinite(cost) or peak.usage > self.problem.limit:
            raise AssertionError(f"a solution of cost {cost} and peak {peak} is not feasible: the search is wrong")
        return Solution(strategies, cost, min(self.bound, cost))

    @property
    def proven(self) -> bool:
        """No better solution exists, up to PROVEN."""
        return math.isfinite(self.cost) and self.cost - self.bound <= PROVEN * abs(self.cost)

    def shortage(self) -> str:
        """What was missing where the search came nearest to a solution."""
        if self.nearest is None:
            return "no feasible solution found: the search had not begun"
        reducer, chosen = self.nearest
        strategies = expand(reducer, chosen)
        peak = peak_usage(self.problem, strategies)
        if peak.usage > self.problem.limit:
            return (
                f"no feasible solution found: the nearest uses {peak.usage:g} in [{peak.start}, {peak.end}), "
                f"{peak.usage - self.problem.limit:g} more than the limit of {self.problem.limit:g}"
            )
        return "no feasible solution found: the nearest within the limit has impossible pairs of strategies"


def solve(problem: IntervalProblem, time_limit: float = 60.0, seed: int = 0, incumbent: Incumbent | None = None) -> Solution:
    """The best feasible solution found in `time_limit` seconds, with a lower bound; the best so far is in `incumbent`.

    Raises NoSolutionError, with the interval and the shortage, if none exists or none was found.
    """
    incumbent = incumbent or Incumbent(problem)
    search = Search(problem, incumbent, np.random.default_rng(seed), incumbent.began + time_limit)
    search.run()
    found = incumbent.solution()
    if found is None:
        raise NoSolutionError(incumbent.shortage())
    return found


class OutOfTime(Exception):
    """The time limit is reached."""


class Search:
    """One search: the reduced problem, its dual, and the walks."""

    def __init__(self, problem: IntervalProblem, incumbent: Incumbent, rng: np.random.Generator, deadline: float, rounds: float = math.inf) -> None:
        self.problem, self.incumbent, self.rng, self.deadline, self.rounds = problem, incumbent, rng, deadline, rounds
        self.nearest = math.inf  # the least excess of usage of any walk
        self.reducer: Reducer | None = None

    def run(self) -> None:
        """Search until the deadline or a proof. Raises NoSolutionError if the reductions show that there is no solution."""
        self.offer_smallest()
        reducer = self.reducer = Reducer(self.problem)
        reducer.run()
        self.core = core_of(reducer)
        if len(self.core.start) == 1:  # the reductions have decided everything
            self.incumbent.bound = reducer.constant
            self.incumbent.offer(reducer, np.zeros(0, dtype=np.int64), reducer.constant)
            return
        self.dual = Dual(self.core, reducer.constant)
        try:
            self.improve()
        except OutOfTime:
            pass

    def offer_smallest(self) -> None:
        """Every node at its smallest usage: where that is possible, there is something to print from the start."""
        chosen = np.array([np.lexsort((cost, usage))[0] for cost, usage in zip(self.problem.costs, self.problem.usages)], dtype=np.int64)
        cost = cost_of(self.problem, chosen)
        if math.isfinite(cost) and peak_usage(self.problem, chosen).usage <= self.problem.limit:
            self.incumbent.offer(None, chosen, cost)

    def check(self) -> None:
        """Raises OutOfTime at the deadline, and when there is nothing left to search."""
        if time.monotonic() >= self.deadline or self.incumbent.proven:
            raise OutOfTime

    def improve(self) -> None:
        """The whole search on the reduced problem."""
        self.check()
        began = time.monotonic()
        for _ in range(20):
            _, chosen, _ = self.dual.passes(1)
            self.note_bound()
        self.repair(Walk(self.core, chosen), self.dual.multipliers)
        starts = self.ascend(began + 0.3 * (self.deadline - began))
        walks: list[Walk] = []
        for chosen, multipliers in starts:
            walk = Walk(self.core, chosen)
            self.repair(walk, multipliers)
            self.walk(walk, multipliers, 20)
            walks.append(walk)
            if time.monotonic() > began + 0.6 * (self.deadline - began):
                break
        walks.sort(key=lambda walk: walk.cost if walk.feasible else math.inf)
        walks = walks[:KEPT]
        done = 0
        while done < self.rounds:
            done += 1
            for walk in walks:
                self.walk(walk, self.dual.best_multipliers, 10)

    def note_bound(self) -> None:
        """Carry the dual's bound over."""
        self.incumbent.bound = max(self.incumbent.bound, self.dual.best + self.dual.offset)
        self.check()

    def ascend(self, until: float) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ascend the dual; gives (positions, multipliers) of iterates to start from, the last first."""
        seen = []
        for number in range(ASCENT):
            share = number / ASCENT
            multipliers = self.dual.multipliers
            _, chosen = self.dual.ascend(FIRST_STEP ** (1 - share) * LAST_STEP**share)
            self.note_bound()
            if number % 10 == 9:
                seen.append((chosen, multipliers))
            if time.monotonic() > until:
                break
        return seen[::-1]

    def repair(self, walk: Walk, multipliers: np.ndarray) -> None:
        """Bring a walk within the limit by a penalty that grows."""
        heaviest = float(multipliers.max(initial=0.0))
        penalty = 0.1 * heaviest or abs(walk.cost) / max(1e-9, walk.excess)
        for _ in range(60):
            if walk.feasible:
                break
            walk.move(self.rng, multipliers, penalty, CHUNK, 80, 0.95, 0.0)
            if walk.excess < self.nearest and self.reducer is not None:
                self.nearest = walk.excess
                self.incumbent.nearest = self.reducer, walk.chosen.copy()
            penalty *= 1.5
            self.check()
        self.offer(walk)

    def walk(self, walk: Walk, multipliers: np.ndarray, chunks: int) -> None:
        """Improve a walk."""
        for _ in range(chunks):
            walk.move(self.rng, multipliers, 1e6 * float(multipliers.max(initial=1.0)), CHUNK, 80, 0.95, 0.0)
            self.offer(walk)
            self.check()

    def offer(self, walk: Walk) -> None:
        """Offer where a walk stands."""
        if walk.feasible:
            self.incumbent.offer(self.reducer, walk.chosen, walk.cost + self.dual.offset)
