"""Exhaustive search: the tests' oracle."""

from __future__ import annotations

import numpy as np

from jaxplan.problem import Assignment, Problem, evaluate
from jaxplan.reduce import Pricer

LIMIT = 2_000_000


def brute(problem: Problem) -> Assignment:
    """Price every assignment. Raises ValueError above `LIMIT` of them."""
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
    best = grids[:, int(np.argmin(price))]
    chosen = np.array([row[o] for row, o in zip(rows, best, strict=True)], dtype=np.int64)
    choices = chosen.reshape(len(counts), len(problem.axes))
    seconds = evaluate(problem, choices)
    return Assignment(choices, seconds, seconds)


