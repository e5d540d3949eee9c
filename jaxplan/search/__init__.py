"""Room `search`: a `Problem` becomes an `Assignment`. Plain callables of one signature in a small dict."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxplan.problem import Assignment, Problem, evaluate, peak, within_limit
from jaxplan.search.alpa import alpa
from jaxplan.search.brute import brute
from jaxplan.search.certificate import certify, trws
from jaxplan.search.hsm2dl import hsm2dl
from jaxplan.search.joint import joint
from jaxplan.search.optcnn import optcnn
from jaxplan.search.stages import piper_stages
from jaxplan.search.tofu import tofu

SEARCHES: dict[str, Callable[[Problem], Assignment]] = {
    "hsm2dl": hsm2dl,
    "joint": joint,
    "optcnn": optcnn,
    "tofu": tofu,
    "piper": piper_stages,
    "trws": trws,
    "alpa": alpa,
    "brute": brute,
}

LIMITED = ("piper", "alpa", "brute")
"""The searches that look for assignments within a problem's limit; what others find is checked."""

CLAIM = 1e-6
"""By what fraction a solver's bound may exceed the price of its own assignment: HiGHS's tolerance."""


def search(problem: Problem, method: str | Callable[[Problem], Assignment] = "hsm2dl") -> Assignment:
    """Solve a problem by a search's name or by the user's own callable, whose answer is checked.

    Raises ValueError for an unknown name or what is no callable, for an answer that is no legal assignment or takes more than the
    problem's limit at some time, and for a bound above its price.
    """
    if isinstance(method, str):
        if method not in SEARCHES:
            raise ValueError(f"no search is called {method!r}; there are {sorted(SEARCHES)}, or pass a callable")
        found = SEARCHES[method](problem)
    elif callable(method):
        found = method(problem)
    else:
        raise ValueError(f"a search is one of {sorted(SEARCHES)} or a callable Problem -> Assignment, not {method!r}")
    name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
    if not isinstance(found, Assignment):
        raise ValueError(f"search {name!r} returned a {type(found).__name__}; wanted an Assignment")
    try:
        choices = np.asarray(found.choices)
    except ValueError as ragged:
        raise ValueError(f"search {name!r} returned choices that are no array: {ragged}") from ragged
    if choices.shape != (len(problem.nodes), len(problem.axes)) or choices.dtype.kind not in "iu":
        raise ValueError(
            f"search {name!r} returned choices of shape {choices.shape} and dtype {choices.dtype}; "
            f"wanted integers of shape {(len(problem.nodes), len(problem.axes))}"
        )
    counts = np.array([node.options for node in problem.nodes]).reshape(choices.shape)
    wrong = np.argwhere((choices < 0) | (choices >= counts))
    if len(wrong):
        node, axis = wrong[0]
        raise ValueError(
            f"search {name!r} chose option {choices[node, axis]} of node {node} ({problem.nodes[node].name}) along axis "
            f"{problem.axes[axis]!r}, which has {counts[node, axis]}"
        )
    seconds = evaluate(problem, choices)
    if not np.isfinite(seconds):
        raise ValueError(f"search {name!r} returned an assignment that is not legal: its price is {seconds}")
    if not within_limit(problem, choices):
        begin, end, usage = peak(problem, choices)
        raise ValueError(
            f"search {name!r} returned an assignment that uses {usage:g} in [{begin}, {end}), {usage - problem.limit:g} more "
            f"than the limit of {problem.limit:g}: of the searches here, {', '.join(LIMITED)} honour a limit"
        )
    if found.bound is not None and not found.bound <= seconds + CLAIM * abs(seconds):
        raise ValueError(f"search {name!r} claims a bound of {found.bound} s, but its own assignment costs {seconds} s")
    return Assignment(choices, seconds, None if found.bound is None else min(found.bound, seconds), found.notes)


__all__ = [
    "SEARCHES",
    "Assignment",
    "alpa",
    "brute",
    "certify",
    "hsm2dl",
    "joint",
    "optcnn",
    "piper_stages",
    "search",
    "tofu",
    "trws",
]
