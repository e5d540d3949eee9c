"""Recursive partitioning, one level after the other by dynamic programming, after Tofu (Wang, Huang and Li, EuroSys 2019)."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import reverse_cuthill_mckee

from jaxplan.problem import Assignment, Problem, evaluate
from jaxplan.reduce import Pricer, fold
from jaxplan.search.elimination import solve

CAP = 1 << 18
"""Entries of the largest table that one step of the dynamic program may build."""


def tofu(problem: Problem, *, cap: int = CAP) -> Assignment:
    """The devices are divided again and again, the costliest link first; each level is decided for all operators at once and
    never taken back.

    As published: the graph is coarsened, arranged as a line, and each level is solved by dynamic programming along the line.
    Departs from the paper in this:
    - A level is a whole mesh axis. Tofu halves; an axis of 2^k devices is k halvings, which take the same option here because a
      problem's choices name axes. On a mesh of axes of size two the levels are Tofu's.
    - Coarsening is folding by kind, which merges what Tofu merges by hand (unrolled steps); forward and backward operators come
      together by the arrangement (reverse Cuthill-McKee: neighbours in the graph are near in the line) instead of by autodiff's
      records. States of the dynamic program are the joint options of the variables that reach across a place of the line; where
      they take more than `cap` entries the level is bounded by mini-buckets, and `notes["exact_levels"]` counts it out.
    - The price is the problem's, with local work; Tofu counts bytes sent only. Operators may leave a level unused (option 0);
      Tofu divides everything.
    """
    if not problem.nodes:
        return Assignment(np.zeros((0, len(problem.axes)), dtype=np.int64), 0.0)
    folded, expand = fold(problem, 0)
    pricer, order = Pricer(folded), line(folded)
    choices = np.zeros((len(folded.nodes), len(problem.axes)), dtype=np.int64)
    levels = [a for a in (problem.axis_order or range(len(problem.axes))) if any(n.options[a] > 1 for n in problem.nodes)]
    exact_levels = 0
    for axis in levels:
        choices[:, axis], exact = solve(pricer.along((axis,), choices)[0], order, cap=cap)
        exact_levels += exact
    whole = expand(choices)
    return Assignment(whole, evaluate(problem, whole), None, {"levels": len(levels), "exact_levels": exact_levels})


def line(problem: Problem) -> list[int]:
    """The nodes in an order where neighbours are near each other (Cuthill and McKee 1969)."""
    tails, heads = (np.array([edge[end] for edge in problem.edges], dtype=np.int64) for end in (0, 1))
    count = len(problem.nodes)
    near = sparse.coo_matrix((np.ones(2 * len(tails)), (np.r_[tails, heads], np.r_[heads, tails])), (count, count))
    return reverse_cuthill_mckee(sparse.csr_matrix(near), symmetric_mode=True).tolist()
