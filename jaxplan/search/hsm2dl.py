"""The default search: one mesh axis at a time, each by bounded-width elimination on the folded problem, then sweeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations

import numpy as np

from jaxplan.problem import Assignment, Problem, evaluate
from jaxplan.reduce import Pricer, Undo, fold
from jaxplan.search.elimination import min_fill_order, solve

SWEEPS = 6
PATIENCE = 2
"""Rounds without improvement before a bounded (inexact) elimination gives up: each round keeps other variables fixed."""
FINE_ROUNDS = 2
JOINT_LIMIT = 50_000
"""Table entries up to which writing out all joint choices costs less than the sweeps did."""
JOINT_CAP = 1 << 18
FIRST_CAP = 1 << 18
"""Entries of a table in the first solution of each axis, where nothing is known that could be kept."""


def hsm2dl(problem: Problem) -> Assignment:
    """Recursion over mesh axes: O(operators x axes x sweeps) on the folded graph.

    Every order of the axes is tried on the coarsely folded problem (equal kinds decide alike), starting from "no axis
    used" (option 0). The best is then refined where look-alikes are told apart by their neighbourhoods, re-opening one axis
    at a time until nothing improves; where writing out all joint choices is cheap, all axes are re-opened at once. Deterministic.
    """
    if not problem.nodes:
        return Assignment(np.zeros((0, len(problem.axes)), dtype=np.int64), 0.0)
    axes = [a for a in (problem.axis_order or range(len(problem.axes))) if any(n.options[a] > 1 for n in problem.nodes)]
    folded, expand = fold(problem, 0)
    coarse = len(folded.nodes)
    pricer, elimination = Pricer(folded), elimination_order(folded)
    nothing = np.zeros((coarse, len(problem.axes)), dtype=np.int64)
    tried = [_recursion(pricer, elimination, nothing, order) for order in _orders(axes)]
    best = _fused(pricer, elimination, tried)
    fine, unfold = fold(problem, FINE_ROUNDS)
    if len(fine.nodes) > coarse:
        best = _restricted(fine, expand(best), unfold)
        folded, expand, pricer, elimination = fine, unfold, Pricer(fine), elimination_order(fine)
    best, seconds = _sweep(pricer, elimination, best, axes)
    if len(axes) > 1 and joint_entries(folded) <= JOINT_LIMIT:
        best, seconds = _joint(folded, best)
    notes: dict[str, object] = {"variables": (len(problem.nodes), coarse, len(folded.nodes))}
    return Assignment(expand(best), seconds, None, notes)


def _recursion(pricer: Pricer, elimination: list[int], choices: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Decide one axis after the other, each given those before."""
    choices = choices.copy()
    for axis in axes:
        choices[:, axis], _ = solve(pricer.along(axis, choices), elimination, cap=FIRST_CAP)
    return choices


def _fused(pricer: Pricer, elimination: list[int], proposals: Sequence[np.ndarray]) -> np.ndarray:
    """The best assignment whose every choice is one of the proposals' (a fusion move, Lempitsky et al., TPAMI 2010)."""
    candidates = [np.unique(rows, axis=0) for rows in np.stack(proposals, axis=1)]
    tables = pricer.among(candidates)
    options, _ = solve(tables, elimination)
    return np.stack([rows[option] for rows, option in zip(candidates, options, strict=True)])


def joint_entries(problem: Problem) -> int:
    """Table entries that all joint choices of all axes would take."""
    counts = [math.prod(node.options) for node in problem.nodes]
    return sum(counts) + sum(counts[edge.tail] * counts[edge.head] for edge in problem.edges)


def _joint(problem: Problem, choices: np.ndarray) -> tuple[np.ndarray, float]:
    """Re-open all axes of all nodes at once: leaves the optima that one axis at a time cannot leave."""
    tables, rows = Pricer(problem).whole()
    start = np.array([int(np.flatnonzero((row == own).all(1))[0]) for row, own in zip(rows, choices, strict=True)])
    options, _ = solve(tables, elimination_order(problem), start, cap=JOINT_CAP)
    return np.array([row[o] for row, o in zip(rows, options, strict=True)]), tables.price(options)


def _orders(axes: list[int]) -> list[tuple[int, ...]]:
    """All orders of up to three axes; of more, each axis first once."""
    if len(axes) <= 3:
        return list(permutations(axes))
    return [tuple(axes[i:] + axes[:i]) for i in range(len(axes))]


def _sweep(pricer: Pricer, elimination: list[int], choices: np.ndarray, axes: Sequence[int]) -> tuple[np.ndarray, float]:
    """Re-open one axis after the other, given the others, until nothing improves."""
    choices, tally = choices.copy(), [0] * len(choices)
    seconds, idle = evaluate(pricer.problem, choices), 0
    for turn in range(SWEEPS * len(axes)):
        axis = axes[turn % len(axes)]
        tables = pricer.along(axis, choices)
        options, exact = solve(tables, elimination, choices[:, axis], tally)
        now = tables.price(options)
        if now < seconds * (1 - 1e-9):
            choices[:, axis], seconds = options, now
            idle = 1 if exact else 0
        else:
            idle += 1
        if idle >= len(axes) * (1 if exact else PATIENCE):
            break
    return choices, seconds


def elimination_order(problem: Problem) -> list[int]:
    """The order of elimination depends on who is connected to whom only: it serves every axis."""
    weights = [math.log2(math.prod(node.options)) for node in problem.nodes]
    return min_fill_order(weights, [(e.tail, e.head) for e in problem.edges if e.tail != e.head and e.times])


def _restricted(fine: Problem, choices: np.ndarray, unfold: Undo) -> np.ndarray:
    """The choices of a finer folding that agree with an assignment of the whole (the coarse folding decides alike)."""
    probe = unfold(np.arange(len(fine.nodes))[:, None])[:, 0]
    start = np.zeros((len(fine.nodes), choices.shape[1]), dtype=np.int64)
    start[probe] = choices
    return start
