"""The solver on random problems of the shape that training steps have, against an integer program."""

import dataclasses

import numpy as np
import pytest
from layered_problems import layered_problem
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix
from test_solve import searched

from jaxplan.iopddl import content_of, read_problem, write_problem
from jaxplan.solve import NoSolutionError, cost_of, least_peak, peak_usage


def by_integer_program(problem):
    """The least feasible cost, by HiGHS: a column per strategy and per pair of every edge."""
    start = np.concatenate([[0], np.cumsum(problem.counts)])
    cells = np.concatenate([[0], np.cumsum([table.size for table in problem.tables])]) + start[-1]
    columns = int(cells[-1])
    cost = np.concatenate([*problem.costs, *[table.ravel() for table in problem.tables]])
    possible = np.isfinite(cost)
    rows, low, high = [], [], []

    def row(entries, least, most):
        rows.append(entries)
        low.append(least)
        high.append(most)

    for node, count in enumerate(problem.counts):
        row([(start[node] + s, 1.0) for s in range(count)], 1.0, 1.0)
    for number, ((tail, head), table) in enumerate(zip(problem.edges.tolist(), problem.tables)):
        index = cells[number] + np.arange(table.size).reshape(table.shape)
        for node, around in ((tail, index), (head, index.T)):
            for s in range(len(around)):
                row([*((cell, 1.0) for cell in around[s]), (start[node] + s, -1.0)], 0.0, 0.0)
    for time in np.unique(problem.intervals[:, 0]):
        alive = np.flatnonzero((problem.intervals[:, 0] <= time) & (problem.intervals[:, 1] > time))
        used = [(start[v] + s, problem.usages[v][s]) for v in alive for s in range(problem.counts[v])]
        row(used, -np.inf, problem.limit)
    matrix = lil_matrix((len(rows), columns))
    for number, entries in enumerate(rows):
        for column, value in entries:
            matrix[number, column] += value
    found = milp(
        np.where(possible, cost, 0.0),
        constraints=LinearConstraint(matrix.tocsr(), low, high),
        integrality=np.ones(columns),
        bounds=Bounds(0.0, possible.astype(float)),
        options={"mip_rel_gap": 0.0},
    )
    assert found.status == 0
    return found.fun


@pytest.mark.parametrize("seed", range(4))
def test_layers_are_solved_as_the_integer_program_solves_them(seed):
    problem, planted = layered_problem(seed, slack=(0.0, 0.1, 0.3)[seed % 3])
    assert peak_usage(problem, planted).usage <= problem.limit and np.isfinite(cost_of(problem, planted))
    found = searched(problem)[0].solution()
    best = by_integer_program(problem)
    assert found is not None and peak_usage(problem, found.strategies).usage <= problem.limit
    assert found.cost == pytest.approx(best, rel=1e-6)
    assert found.bound <= best * (1 + 1e-6)


def test_layers_with_too_little_room_are_said_to_have():
    problem, _ = layered_problem(0)
    peak = least_peak(problem)
    with pytest.raises(NoSolutionError, match=rf"in \[{peak.start}, {peak.end}\) .* 1 more than the limit"):
        searched(dataclasses.replace(problem, limit=peak.usage - 1))


def test_layers_are_written_and_read_back(tmp_path):
    problem, planted = layered_problem(3)
    write_problem(problem, tmp_path / "layers.json.gz")
    again = read_problem(tmp_path / "layers.json.gz")
    assert content_of(again) == content_of(problem) and cost_of(again, planted) == cost_of(problem, planted)
    first = (tmp_path / "layers.json.gz").read_bytes()
    write_problem(again, tmp_path / "layers.json.gz")
    assert (tmp_path / "layers.json.gz").read_bytes() == first
