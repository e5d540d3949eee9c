"""Exhaustive search: the tests' oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jaxplan.problem import ROUNDING, Assignment, Problem, evaluate
from jaxplan.reduce import Pricer

LIMIT = 2_000_000


def brute(problem: Problem) -> Assignment:
    """Price every assignment; of those within the problem's limit, the cheapest.

    Raises ValueError above `LIMIT` assignments, and where none is within the problem's limit.
    """
    counts = [int(np.prod(node.options)) for node in problem.nodes]
    total = float(np.prod([float(c) for c in counts]))
    if total > LIMIT:
        raise ValueError(f"brute force would price {total:.3g} assignments; the limit is {LIMIT:,}")
    tables, rows = Pricer(problem).whole()
    grids = np.indices(counts).reshape(len(counts), -1) if counts else np.zeros((0, 1), dtype=int)
    price = np.zeros(grids.shape[1])
    for i, cost in enumerate(tables.costs):
        price += cost[grids[i]]
    for (i, j), matrix in tables.pairs.items():
        price += matrix[grids[i], grids[j]]
    if problem.limit < math.inf and problem.usages:
        price[~_within(problem, rows, grids)] = np.inf
        if not np.isfinite(price).any():
            raise ValueError(f"no legal assignment stays within the limit of {problem.limit:g}")
    best = grids[:, int(np.argmin(price))]
    chosen = np.array([row[o] for row, o in zip(rows, best, strict=True)], dtype=np.int64)
    choices = chosen.reshape(len(counts), len(problem.axes))
    seconds = evaluate(problem, choices)
    return Assignment(choices, seconds, seconds)


def _within(problem: Problem, rows: Sequence[np.ndarray], grids: np.ndarray) -> np.ndarray:
    """(assignments,) whether each stays within the limit, at every time at which something begins."""
    fits = np.ones(grids.shape[1], dtype=bool)
    for time in {usage.begin for usage in problem.usages}:
        used = np.zeros(grids.shape[1])
        for usage in problem.usages:
            if usage.begin <= time < usage.end:
                used += usage.amount(rows[usage.node])[grids[usage.node]]
        fits &= used <= problem.limit * (1 + ROUNDING)
    return fits
