"""Exhaustive search: the tests' oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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
    if problem.limit < math.inf:
        price[~_within(problem, rows, grids)] = np.inf
        if not np.isfinite(price).any():
            raise ValueError(f"no legal assignment stays within the limit of {problem.limit:g}")
    best = grids[:, int(np.argmin(price))]
    chosen = np.array([row[o] for row, o in zip(rows, best, strict=True)], dtype=np.int64)
    choices = chosen.reshape(len(counts), len(problem.axes))
    seconds = evaluate(problem, choices)
    return Assignment(choices, seconds, seconds)


def _within(problem: Problem, rows: Sequence[np.ndarray], grids: np.ndarray) -> np.ndarray:
    """(assignments,) whether each stays within the limit, at every step at which something begins or more is reserved."""
    fits = np.ones(grids.shape[1], dtype=bool)
    reserved = problem.reserved
    amounts = []
    for usage in problem.usages:
        amount: Any = usage.amount
        table = amount(*[rows[node] for node in usage.nodes])
        amounts.append(table[tuple([grids[node] for node in usage.nodes])])
    for step in {usage.begin for usage in problem.usages} | set(range(len(reserved))):
        used = np.full(grids.shape[1], reserved[step] if step < len(reserved) else 0.0)
        for usage, amount in zip(problem.usages, amounts, strict=True):
            if usage.begin <= step < usage.end:
                used += amount
        fits &= used <= problem.limit + ROUNDING * abs(problem.limit)
    return fits
