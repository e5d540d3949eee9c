"""Room `search`: a `Problem` becomes an `Assignment`. Plain callables of one signature in a small dict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from jaxplan.problem import Assignment, Problem, evaluate, peak, within_limit
from jaxplan.search.alpa import alpa
from jaxplan.search.brute import brute
from jaxplan.search.certificate import certify, trws
from jaxplan.search.dual import Floor
from jaxplan.search.hsm2dl import hsm2dl
from jaxplan.search.joint import joint
from jaxplan.search.limited import OverLimit, at_prices, limited
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

LIMITED = ("piper", "alpa", "brute", "hsm2dl")
"""The searches that look for assignments within a problem's limit themselves (`piper` where each usage is one node's); the others
are given prices of usages instead."""

CLAIM = 1e-6
"""By what fraction a solver's bound may exceed the price of its own assignment: HiGHS's tolerance."""


def search(problem: Problem, method: str | Callable[[Problem], Assignment] = "hsm2dl") -> Assignment:
    """Solve a problem by a search's name or by the user's own callable, whose answer is checked.

    Within a limit, a search that does not look at it (see `LIMITED`; a callable whose answer is above it) is asked again, with
    usages at prices, as often as `limited.py` takes. Raises ValueError for an unknown name or what is no callable, for an answer
    that is no legal assignment, and for a bound above its price; OverLimit where nothing is found within the limit.
    """
    if not isinstance(method, str) and not callable(method):
        raise ValueError(f"a search is one of {sorted(SEARCHES)} or a callable Problem -> Assignment, not {method!r}")
    if isinstance(method, str) and method not in SEARCHES:
        raise ValueError(f"no search is called {method!r}; there are {sorted(SEARCHES)}, or pass a callable")
    name = method if isinstance(method, str) else getattr(method, "__name__", repr(method))
    solve = SEARCHES[method] if isinstance(method, str) else method

    def priced(spans: np.ndarray, known: Sequence[np.ndarray]) -> np.ndarray:
        asked = at_prices(problem, spans)
        return _checked(asked, solve(asked), name).choices

    alone = not problem.reserved and all(len(usage.nodes) == 1 for usage in problem.usages)
    if problem.limit < math.inf and isinstance(method, str) and (method not in LIMITED or (method == "piper" and not alone)):
        return _checked(problem, limited(problem, priced, name), name)
    found = _checked(problem, solve(problem), name)
    if within_limit(problem, found.choices):
        return found
    if isinstance(method, str):
        begin, end, usage = peak(problem, found.choices)
        raise ValueError(f"search {name!r} uses {usage:g} in [{begin}, {end}), above the limit of {problem.limit:g}")
    starts = problem.starts or (found.choices,)
    return _checked(problem, limited(replace(problem, starts=starts), priced, name), name)


def nearest(problem: Problem, method: str | Callable[[Problem], Assignment] = "hsm2dl") -> Assignment:
    """The same, but where nothing is found within the limit, what comes nearest to it."""
    try:
        return search(problem, method)
    except OverLimit as error:
        return error.nearest


def _checked(problem: Problem, found: Assignment, name: str) -> Assignment:
    """What a search returned, its price computed again; ValueError if it is no legal assignment of the problem."""
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
    if found.bound is not None and not found.bound <= seconds + CLAIM * abs(seconds):
        raise ValueError(f"search {name!r} claims a bound of {found.bound} s, but its own assignment costs {seconds} s")
    return Assignment(choices, seconds, None if found.bound is None else min(found.bound, seconds), found.notes)


__all__ = [
    "SEARCHES",
    "Assignment",
    "Floor",
    "OverLimit",
    "alpa",
    "brute",
    "certify",
    "hsm2dl",
    "joint",
    "nearest",
    "optcnn",
    "piper_stages",
    "search",
    "tofu",
    "trws",
]
