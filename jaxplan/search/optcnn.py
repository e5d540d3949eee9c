"""Node and edge elimination over joint choices, after OptCNN (Jia, Lin, Qi and Aiken, ICML 2018)."""

from __future__ import annotations

import numpy as np

from jaxplan.problem import Assignment, Problem, evaluate
from jaxplan.reduce import ILLEGAL, Pricer, dominance, eliminate, fold
from jaxplan.search.elimination import min_fill_order, option_weights, solve
from jaxplan.search.moves import FINE_ROUNDS

CAP = 1 << 22
"""Entries of the largest table that eliminating one node may build."""


def optcnn(problem: Problem, *, cap: int = CAP, rounds: int | None = FINE_ROUNDS) -> Assignment:
    """The optimum of the (folded) problem wherever eliminating nodes ends within `cap` table entries.

    As published: parallel edges are added up (edge elimination); a node between two others is replaced by an edge that holds,
    for each pair of their choices, the best it can do (node elimination); what was eliminated is decided last, backwards. Departs
    from the paper in that edges have no direction, leaves go too, and dominated choices are struck out before. Where every node
    left has three neighbours or more, the paper enumerates all their strategies; here nodes of more neighbours are eliminated
    too, which is exact and takes no longer. Once a table would exceed `cap` the rest is bounded (mini-buckets, then rounds that
    keep some variables) and `notes["exact"]` is False. `notes["left"]`: the nodes that the paper would enumerate.

    `rounds`: of folding look-alikes; None solves the problem as it is. The assignment has a `bound` if it is exact and
    nothing was folded. Raises ValueError if some node has no legal choice, or if the joint choices are too many to write out.
    """
    folded, expand = (problem, lambda choices: choices) if rounds is None else fold(problem, rounds)
    written, rows = Pricer(folded).whole()
    if any(cost.min() >= ILLEGAL for cost in written.costs):
        raise ValueError("no legal assignment: some node has no legal choice")
    smaller, undo_dominance = dominance(written)
    core, left, undo_elimination = eliminate(smaller, cap)
    best, exact = solve(core, min_fill_order(option_weights(map(len, core.costs)), core.pairs), cap=cap)
    options = undo_dominance(undo_elimination(best))
    chosen = np.array([row[option] for row, option in zip(rows, options, strict=True)], dtype=np.int64)
    choices = expand(chosen.reshape(len(rows), len(problem.axes)))
    seconds = evaluate(problem, choices)
    proven = exact and len(folded.nodes) == len(problem.nodes)
    return Assignment(choices, seconds, seconds if proven else None, {"exact": exact, "left": len(left)})
