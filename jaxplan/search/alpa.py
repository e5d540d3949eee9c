"""The intra-operator integer program of Alpa (Zheng et al., OSDI 2022), solved by HiGHS through SciPy.

One binary variable per choice of a node, one continuous variable per pair of choices of an edge. Where the paper bounds an edge's
variables from one side (e >= s_u + s_v - 1), their sums are tied to both ends here: the same integer solutions, a far tighter
relaxation. Choices that are illegal are left out, and look-alikes are folded before (the paper merges trivial operators instead).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from jaxplan.problem import Assignment, Meter, Problem, evaluate
from jaxplan.reduce import ILLEGAL, Pricer, Tables, fold
from jaxplan.search.moves import FINE_ROUNDS

TIME_LIMIT = 60.0
"""Seconds after which the best solution so far is returned, with the bound reached."""

TOLERANCE = 1e-6
"""Absolute gap at which HiGHS takes an assignment for optimal, and its price for the bound (`mip_abs_gap`)."""


def alpa(problem: Problem, *, time_limit: float = TIME_LIMIT, rounds: int | None = FINE_ROUNDS) -> Assignment:
    """The best assignment found in `time_limit` seconds, and, if nothing was folded, the solver's lower bound.

    `rounds`: of folding look-alikes; None solves the problem as it is. `notes["folded_bound"]`: the bound of the folded problem,
    which is none of the problem itself: there look-alikes may decide differently, and cost less. A limit on usages is a row of
    the program for every time at which it can matter. Raises ValueError if no legal assignment within it was found in time.
    """
    folded, expand = (problem, lambda choices: choices) if rounds is None else fold(problem, rounds)
    tables, rows = Pricer(folded).whole()
    if not tables.costs:
        return Assignment(np.zeros((0, len(problem.axes)), dtype=np.int64), 0.0, 0.0)
    kept = [np.flatnonzero(cost < ILLEGAL) for cost in tables.costs]
    if any(len(options) == 0 for options in kept):
        raise ValueError("no legal assignment: some node has no legal choice")
    for usage in folded.usages if folded.limit < math.inf else ():
        i, j = min(usage.nodes), max(usage.nodes)
        if i != j and (i, j) not in tables.pairs:
            tables.pairs[i, j] = np.zeros((len(rows[i]), len(rows[j])))
    limits = _usage_rows(folded, tables, rows, kept) if folded.limit < math.inf else None
    options, bound, status = integer_program(tables, kept, time_limit, None, limits)
    if options is None:
        raise ValueError(f"the integer program found no assignment within {time_limit:g} s: {status}")
    choices = expand(np.array([row[option] for row, option in zip(rows, options, strict=True)]))
    seconds = evaluate(problem, choices)
    bound, whole = min(bound, seconds), len(folded.nodes) == len(problem.nodes)
    notes: dict[str, object] = {"status": status, "variables": len(folded.nodes), "folded_bound": bound}
    return Assignment(choices, seconds, bound if whole and bound > -math.inf else None, notes)


def integer_program(
    tables: Tables,
    kept: list[np.ndarray],
    time_limit: float,
    scale: float | None = None,
    limits: tuple[sparse.csr_matrix, np.ndarray] | None = None,
) -> tuple[np.ndarray | None, float, str]:
    """(an option per variable or None, lower bound or -infinity, the solver's words), each variable choosing among `kept`.

    `scale`: seconds that count as 1 for the solver, whose tolerances are absolute and are taken off the bound; None: what the
    nodes cost at least. `limits`: (what each column takes, a row per time; what they may take together).
    """
    start = np.cumsum([0, *[len(options) for options in kept]])
    costs = [cost[options] for cost, options in zip(tables.costs, kept, strict=True)]
    blocks, width = [], int(start[-1])
    largest = max(float(cost.max()) for cost in costs)
    scale = scale or max(1e-30, 1e-3 * largest, sum(float(cost.min()) for cost in costs))
    rows, columns, values = [], [], []
    lower: list[np.ndarray] = []
    height = 0

    def add(row: np.ndarray, column: np.ndarray, value: float) -> None:
        rows.append(row.ravel())
        columns.append(column.ravel())
        values.append(np.full(row.size, value))

    for v, options in enumerate(kept):  # every node chooses once
        add(np.full(len(options), height), np.arange(start[v], start[v + 1]), 1.0)
        height += 1
    lower.append(np.ones(height))
    for (i, j), matrix in tables.pairs.items():
        block = matrix[np.ix_(kept[i], kept[j])]
        index = width + np.arange(block.size).reshape(block.shape)
        width += block.size
        blocks.append(block.ravel())
        for axis, v in ((0, i), (1, j)):  # the pairs of an option add up to the option
            line = height + np.arange(block.shape[axis])
            add(np.broadcast_to(line[:, None] if axis == 0 else line, block.shape), index, 1.0)
            add(line, np.arange(start[v], start[v + 1]), -1.0)
            height += block.shape[axis]
            lower.append(np.zeros(block.shape[axis]))
    matrix = sparse.csr_matrix((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), (height, width))
    right: Any = np.concatenate(lower)  # SciPy's stubs want floats
    objective = np.concatenate([*costs, *blocks]) / scale
    upper: Any = np.where(objective < ILLEGAL / scale, 1.0, 0.0)
    objective = np.where(upper > 0, objective, 0.0)
    integral = np.zeros(width)
    integral[: start[-1]] = 1
    constraints = [LinearConstraint(matrix, right, right)]
    if limits is not None and len(limits[1]):
        unit = max(1e-30, float(np.abs(limits[1]).max()), float(abs(limits[0]).max()))
        most: Any = limits[1] / unit
        constraints.append(LinearConstraint(limits[0] / unit, -np.inf, most))
    solved = milp(
        objective, integrality=integral, bounds=Bounds(0, upper), constraints=constraints,
        options={"time_limit": time_limit, "mip_rel_gap": 1e-9},
    )  # fmt: skip
    bound = solved.mip_dual_bound
    bound = (float(bound) - TOLERANCE) * scale if bound is not None and np.isfinite(bound) else -math.inf
    if solved.x is None:
        return None, bound, solved.message
    chosen = [int(options[solved.x[start[v] : start[v + 1]].argmax()]) for v, options in enumerate(kept)]
    return np.array(chosen), bound, solved.message


def _usage_rows(
    problem: Problem, tables: Tables, rows: list[np.ndarray], kept: list[np.ndarray]
) -> tuple[sparse.csr_matrix, np.ndarray]:
    """(what each option kept, and each pair of them, takes at every step at which the limit could be passed, what is left then),
    as the columns of the integer program stand."""
    start = np.cumsum([0, *[len(options) for options in kept]])
    widths = [len(kept[i]) * len(kept[j]) for i, j in tables.pairs]
    first = dict(zip(tables.pairs, (start[-1] + np.cumsum([0, *widths])).tolist()))
    columns: list[np.ndarray] = []
    taken: list[np.ndarray] = []
    for usage in problem.usages:
        amount: Any = usage.amount
        table = amount(*[rows[node][kept[node]] for node in usage.nodes])
        i, j = usage.nodes[0], usage.nodes[-1]
        if i == j:
            table, at = (table.diagonal() if table.ndim == 2 else table), int(start[i])
        else:
            table, at = (table, first[i, j]) if i < j else (table.T, first[j, i])
        taken.append(table.ravel())
        columns.append(at + np.arange(table.size))
    meter = Meter(problem)
    most = meter.levels(np.array([float(amount.max()) for amount in taken]))
    nothing = meter.levels(np.zeros(len(taken)))
    tight = np.flatnonzero(most > problem.limit)
    found = []
    for step in tight.tolist():
        alive = [n for n, usage in enumerate(problem.usages) if usage.begin <= step < usage.end]
        row = np.zeros(int(start[-1]) + sum(widths))
        for n in alive:
            row[columns[n]] += taken[n]
        found.append(sparse.csr_matrix(row))
    left = problem.limit - nothing[tight]
    return (sparse.csr_matrix(sparse.vstack(found)) if found else sparse.csr_matrix((0, int(start[-1]) + sum(widths)))), left
