"""The default search: one mesh axis at a time, each by bounded-width elimination on the folded problem, then sweeps."""

from __future__ import annotations

from itertools import permutations

import numpy as np

from jaxplan.problem import Assignment, Problem, evaluate
from jaxplan.reduce import Pricer, fold
from jaxplan.search.elimination import min_fill_order, solve

SWEEPS = 6
PATIENCE = 2
"""Rounds without improvement before a bounded (inexact) elimination gives up: each round keeps other variables fixed."""
FINE_ROUNDS = 2


def hsm2dl(problem: Problem) -> Assignment:
    """Recursion over mesh axes: O(operators x axes x sweeps) on the folded graph.

    Every order of the axes is tried on the coarsely folded problem (equal kinds decide alike), starting from "no axis
    used" (option 0). The best is then refined where look-alikes are told apart by their neighbourhoods, re-opening one axis
    at a time until nothing improves. Deterministic.
    """
    if not problem.nodes:
        return Assignment(np.zeros((0, len(problem.axes)), dtype=np.int64), 0.0)
    axes = [a for a in (problem.axis_order or range(len(problem.axes))) if any(n.options[a] > 1 for n in problem.nodes)]
    coarse, expand = fold(problem, 0)
    pricer = Pricer(coarse)
    best, best_seconds, best_order = np.zeros((len(coarse.nodes), len(problem.axes)), dtype=np.int64), np.inf, tuple(axes)
    for order in _orders(axes):
        choices = np.zeros_like(best)
        choices, seconds = _sweep(pricer, choices, order, fresh=True)
        if seconds < best_seconds:
            best, best_seconds, best_order = choices, seconds, order
    found, seconds = expand(best), best_seconds
    fine, unfold = fold(problem, FINE_ROUNDS)
    if len(fine.nodes) > len(coarse.nodes):
        start = _restricted(fine, found, unfold)
        refined, seconds = _sweep(Pricer(fine), start, best_order, fresh=False)
        found = unfold(refined)
    notes: dict[str, object] = {"variables": (len(problem.nodes), len(coarse.nodes), len(fine.nodes)), "order": best_order}
    return Assignment(found, evaluate(problem, found), None, notes)


def _orders(axes: list[int]) -> list[tuple[int, ...]]:
    """All orders of up to three axes; of more, each axis first once."""
    if len(axes) <= 3:
        return list(permutations(axes))
    return [tuple(axes[i:] + axes[:i]) for i in range(len(axes))]


def _sweep(pricer: Pricer, choices: np.ndarray, axes: tuple[int, ...], *, fresh: bool) -> tuple[np.ndarray, float]:
    """Re-open each axis given the others until nothing improves. `fresh`: nothing is decided yet in the first round."""
    problem = pricer.problem
    order = min_fill_order(len(problem.nodes), [(e.tail, e.head) for e in problem.edges if e.tail != e.head and e.times])
    choices, tally = choices.copy(), [0] * len(choices)
    seconds, settled = np.inf, 0
    for turn in range(SWEEPS * len(axes)):
        axis = axes[turn % len(axes)]
        tables = pricer.along(axis, choices)
        start = None if fresh and turn < len(axes) else choices[:, axis]
        options, exact = solve(tables, order, start, tally)
        now = tables.price(options)
        if fresh and turn < len(axes) or now < seconds * (1 - 1e-9) and (options != choices[:, axis]).any():
            settled = 0 if not exact else 1
            choices[:, axis], seconds = options, now
        else:
            settled += 1
        if settled >= len(axes) * (1 if exact else PATIENCE) and turn >= len(axes) - 1:
            break
    return choices, seconds


def _restricted(fine: Problem, choices: np.ndarray, unfold: object) -> np.ndarray:
    """The choices of a finer folding that agree with an assignment of the whole (the coarse folding decides alike)."""
    probe = unfold(np.arange(len(fine.nodes))[:, None])[:, 0]  # type: ignore[operator]
    start = np.zeros((len(fine.nodes), choices.shape[1]), dtype=np.int64)
    start[probe] = choices
    return start
