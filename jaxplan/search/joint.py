"""The default search, and then joint moves whatever they cost: nearer to the optimum, in two to three times the time."""

from __future__ import annotations

from jaxplan.problem import Assignment, Problem
from jaxplan.reduce import Pricer
from jaxplan.search.hsm2dl import elimination_order, hsm2dl, restricted
from jaxplan.search.moves import ROUNDS, finest, polished


def joint(problem: Problem, *, rounds: int = ROUNDS) -> Assignment:
    """`hsm2dl`, then joint choices of every two axes re-opened, however large the problem (see `moves.py` for what that is).

    `rounds`: proposals by messages for every pair of axes. Deterministic.
    """
    found = hsm2dl(problem)
    axes = [a for a in range(len(problem.axes)) if any(n.options[a] > 1 for n in problem.nodes)]
    if len(axes) < 2:
        return found
    fine, unfold = finest(problem)
    start = restricted(fine, found.choices, unfold)
    best, seconds = polished(Pricer(fine), elimination_order(fine), start, axes, rounds)
    return Assignment(unfold(best), seconds, None, found.notes) if seconds < found.seconds else found
