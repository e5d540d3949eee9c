"""Which branch of every conditional a call is taken to run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from jaxplan.graph.nouns import Path


def branches_around(path: Path, branches: Mapping[Path, float]) -> tuple[Path, ...]:
    """The paths of the branches in which something stands, outermost first."""
    return tuple([path[:n] for n in range(2, len(path) + 1) if path[:n] in branches]) if branches else ()


def worst_branches(branches: Mapping[Path, float], sent: Iterable[tuple[Path, float]]) -> dict[Path, float]:
    """{a branch that sends most of its conditional: the share of times that is paid in it, and in those around it}; where several
    send as much, the one with the largest share. `sent`: (path, bytes of what stands there) of all that is sent."""
    own = dict.fromkeys(branches, 0.0)
    for path, nbytes in sent:
        around = branches_around(path, branches)
        if around:
            own[around[-1]] += nbytes / math.prod([branches[branch] for branch in around])
    conditionals: dict[Path, list[Path]] = {}
    for branch in branches:
        conditionals.setdefault(branch[:-2], []).append(branch)
    worst = []
    for conditional in sorted(conditionals, key=len, reverse=True):  # the inner ones first
        worst.append(max(conditionals[conditional], key=lambda branch: (own[branch], branches[branch])))
        around = branches_around(conditional, branches)
        if around:
            own[around[-1]] += own[worst[-1]]
    return {branch: math.prod([branches[other] for other in branches_around(branch, branches)]) for branch in worst}
