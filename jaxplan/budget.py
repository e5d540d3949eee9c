"""Room `budget`: the cheapest plan that stays within so many bytes per device; memory is a limit of the search, corrected."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from jaxplan.cost import Modelled, puts_off, waits, within, without_gathers
from jaxplan.ledger import ACTIVATIONS, TRANSIENTS, ledger
from jaxplan.machine import Machine
from jaxplan.plan import Plan
from jaxplan.problem import Problem
from jaxplan.report import show_bytes

SomePlan = TypeVar("SomePlan", bound=Plan)
Attempt = Callable[["Limit[SomePlan] | None"], SomePlan]
"""From a limit on bytes, or none, to the best plan; to the smallest found where none is within the limit."""
Wider = Callable[[SomePlan, float], Sequence[str]]
"""From a plan and a budget to what more devices would do."""

CORRECTIONS = 3
"""Searches within a limit until one fits, at most."""
LOWER, LOWEST, SMALLER = 0.8, 0.95, 0.003
"""Where nothing fits: limits tried, as a share of the smallest peak so far, from the first on; nearer to it, up to the second,
where that gains less than the third."""
NEAR = 0.003
"""A plan that fits, and takes no less than this fraction below the budget, is not corrected."""
NEARLY_FREE = 2e-3
"""Nor is one that fits and is slower by no more than this fraction than without a budget: that is all there is to gain."""
REFINEMENTS = 2
"""Searches from what fits, at most."""
AIMS, FARTHEST, CLOSE = 2, 1.5, 0.01
"""Other limits at which a budget is aimed, at most; the largest factor between one and the next; the fraction by which two may
differ to be near enough."""
WORTH = 1e-5
"""Of its time, what a part of another plan has to save to be tried: the true peak takes longer than the search's."""
MOST_PARTS, MOST_LOOKS = 8, 24
"""Parts of another plan that are tried in one, and of all others."""
OTHERS = 3
"""Plans whose parts are tried where nothing fits."""
MOST_TENSORS = 5

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class NothingFits(ValueError):
    """No plan stays within the memory budget. `smallest`: the least peak found, bytes per device. The message says what makes
    it, and what would help."""

    def __init__(self, message: str, smallest: float) -> None:
        super().__init__(message)
        self.smallest = smallest


def budget_bytes(budget: int | float | str | None, machine: Machine) -> float:
    """Bytes per device: a number, "16GiB", or None for the machine's own memory. Raises ValueError if it is no positive size."""
    if budget is None:
        return machine.memory_bytes
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", budget)
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(f"memory_budget {budget!r} is not a size: write bytes, or a string like '16GiB' or '900 MB'")
        budget = float(match[1]) * _UNITS[match[2].upper()]
    if not budget > 0:
        raise ValueError(f"memory_budget must be positive, got {budget}")
    return float(budget)


@dataclass(frozen=True)
class Limit(Generic[SomePlan]):
    """Bytes per device that a plan may take. `like`: plans whose true peaks are known, from which those of others are estimated,
    rather too high; the first says what is stored. `waiting`: a plan in which products wait for state that is gathered, where
    others are looked for in which none do. `still`: no state is gathered at all."""

    nbytes: float
    like: tuple[SomePlan, ...]
    waiting: SomePlan | None = None
    still: bool = False

    def problem(self, modelled: Modelled, donated: Sequence[bool], starts: Sequence[np.ndarray]) -> Problem:
        """What a search has to solve. `modelled`: with nothing following; `starts`: choices per cluster that are known."""
        if self.still:
            return without_gathers(modelled)
        like = [(plan.choices, plan.memory) for plan in self.like]
        waiting = None if self.waiting is None else self.waiting.choices
        return within(modelled, self.nbytes, like, donated, starts, waiting)


def fit(attempt: Attempt[SomePlan], plan: SomePlan, budget: float, wider: Wider[SomePlan]) -> SomePlan:
    """The cheapest plan found that fits. `plan`: the best without a budget.

    A few searches within the limit, each with the true peak of what the one before found, and within limits aimed at the budget;
    of the best that fits, parts are replaced by those of the others that still fit; then the search goes on from there. Where
    nothing is found to fit, ever lower limits lead to the smallest peak, on a way that does not depend on the budget. Where
    products run after all others for the state that is gathered, and what they read lives as long, all of it starts from the best
    plan that gathers none, if that costs hardly anything. Raises NothingFits.
    """
    free, tried = plan, list[SomePlan]()
    if puts_off(plan.modelled, plan.choices):
        still = attempt(Limit(math.inf, (), still=True))
        if _nearly_free(still, free):
            if still.fits(budget):
                return still
            plan = min(plan, still, key=lambda one: one.peak_bytes)
        tried += [still]
    for waiting in _ways(plan):
        found = _corrected(attempt, plan, budget, waiting)
        if not any(one.peak_bytes <= budget and _nearly_free(one, free) for one in found):
            found += _aimed(attempt, plan, found[0], budget, waiting) if found else []
        tried += found
    if not any(one.peak_bytes <= budget for one in tried):
        tried = _descended(attempt, plan, budget)
    fitting = [one for one in tried if one.peak_bytes <= budget]
    if not fitting:
        smallest = min(tried, key=lambda one: (one.peak_bytes, one.seconds))
        raise NothingFits(_nothing_fits(smallest, budget, wider(smallest, budget)), smallest.peak_bytes)
    others = [plan, *tried] if plan is free else [free, *tried]
    best = _mixed(min(fitting, key=lambda one: (one.seconds, one.peak_bytes)), others, budget)
    return _refined(attempt, free, best, budget)


def _corrected(
    attempt: Attempt[SomePlan], plan: SomePlan, budget: float, waiting: SomePlan | None
) -> list[SomePlan]:
    """What searches within a budget find, each with the true peaks of those before, until one fits."""
    tried: list[SomePlan] = []
    like = (plan,)
    for _ in range(CORRECTIONS):
        found = attempt(Limit(budget, like, waiting))
        if any((found.choices == one.choices).all() for one in like):
            break
        tried.append(found)
        if found.peak_bytes <= budget:
            break
        like = (found, *like)
    return tried


def _aimed(
    attempt: Attempt[SomePlan], plan: SomePlan, first: SomePlan, budget: float, waiting: SomePlan | None
) -> list[SomePlan]:
    """What is found within limits at which plans truly take about the budget, whatever they were taken to: what usages tell is
    true of the plan without a budget, and off by a factor elsewhere. The limit is moved by that factor, then between the tightest
    one that was too loose and the loosest one that was not; the peak of the plan without a budget is too loose. `first`: what was
    found within the budget as it is."""
    tried = [first]
    low, high, limit = 0.0, plan.peak_bytes, budget
    while True:
        ratio = budget / tried[-1].peak_bytes
        if ratio >= 1:
            low = limit
        else:
            high = limit
        limit *= max(1 / FARTHEST, min(FARTHEST, ratio))
        if not low < limit < high:
            limit = math.sqrt(low * high)
        fits = 1 <= ratio <= 1 + NEAR or (ratio >= 1 and _nearly_free(tried[-1], plan))
        if fits or len(tried) > AIMS or high <= (1 + CLOSE) * low:
            return tried[1:]
        tried.append(attempt(Limit(limit, (plan,), waiting)))


def _refined(attempt: Attempt[SomePlan], plan: SomePlan, best: SomePlan, budget: float) -> SomePlan:
    """What the search finds from a plan that fits, whose true peak it is told, as long as that gains anything."""
    for _ in range(REFINEMENTS):
        if _nearly_free(best, plan):
            break
        waiting = plan if waits(plan.modelled, plan.choices) and not waits(best.modelled, best.choices) else None
        found = attempt(Limit(budget, (best,), waiting))
        better = found if found.peak_bytes <= budget and found.seconds < best.seconds else _mixed(best, [found], budget)
        if better.seconds >= best.seconds * (1 - WORTH):
            break
        best = better
    return best


def _nearly_free(found: Plan, plan: Plan) -> bool:
    return found.seconds <= (1 + NEARLY_FREE) * plan.seconds


def _descended(attempt: Attempt[SomePlan], plan: SomePlan, budget: float) -> list[SomePlan]:
    """Plans of ever smaller peaks, the last one within the budget or the smallest there is."""
    tried, small, step = [plan], plan, LOWER
    while small.peak_bytes > budget and step < LOWEST:
        ways = _ways(plan)[-1:] if not waits(small.modelled, small.choices) else _ways(plan)
        found = [attempt(Limit(step * small.peak_bytes, (small,), waiting)) for waiting in ways]
        best = min(found, key=lambda one: (one.peak_bytes, one.seconds))
        tried += found
        if best.peak_bytes > small.peak_bytes * (1 - SMALLER):
            step = math.sqrt(step)
        if best.peak_bytes < small.peak_bytes:
            small = best
    for other in sorted(tried, key=lambda one: (one.peak_bytes, one.seconds))[:OTHERS]:
        if small.peak_bytes > budget:
            small = _shrunk(small, other)
    return [*tried, small]


def _ways(plan: SomePlan) -> tuple[SomePlan | None, ...]:
    """What `Limit.waiting` can be: none, and the plan without a budget if products wait in it for state that is gathered."""
    return (None, plan) if waits(plan.modelled, plan.choices) else (None,)


def _mixed(best: SomePlan, others: Sequence[SomePlan], budget: float) -> SomePlan:
    """A plan that fits, with those parts of others that make it faster and still fit: of those that do not fit first, the
    smallest first; then of the fastest."""
    modelled, looks = best.modelled, MOST_LOOKS

    def turn(one: Plan) -> tuple[bool, float]:
        fits = one.peak_bytes <= budget
        return fits, one.seconds if fits else one.peak_bytes

    for other in sorted(others, key=turn):
        gains = []
        for part in _parts(best, other):
            gain = best.seconds - modelled.seconds(_swapped(best.choices, other.choices, part))
            if gain > WORTH * best.seconds:
                gains.append((-gain, part))
        for _, part in sorted(gains)[: min(looks, MOST_PARTS)]:
            tried = replace(best, choices=_swapped(best.choices, other.choices, part))
            if tried.seconds < best.seconds:
                looks -= 1
                if tried.peak_bytes <= budget:
                    best = tried
    return best


def _shrunk(plan: SomePlan, other: Plan) -> SomePlan:
    """A plan with those parts of another that lower its peak."""
    for part in _parts(plan, other)[:MOST_PARTS]:
        tried = replace(plan, choices=_swapped(plan.choices, other.choices, part))
        if tried.peak_bytes < plan.peak_bytes and math.isfinite(tried.seconds):
            plan = tried
    return plan


def _parts(plan: Plan, other: Plan) -> list[list[int]]:
    """The clusters in which two plans differ, in sets that are connected through such clusters."""
    differ = set(np.flatnonzero((plan.choices != other.choices).any(axis=1)).tolist())
    near: dict[int, list[int]] = {cluster: [] for cluster in differ}
    for reading in plan.modelled.readings:
        if {reading.writer, reading.reader} <= differ:
            near[reading.writer].append(reading.reader)
            near[reading.reader].append(reading.writer)
    parts = []
    while differ:
        part, ahead = set(), [min(differ)]
        while ahead:
            cluster = ahead.pop()
            if cluster not in part:
                part.add(cluster)
                ahead += near[cluster]
        differ -= part
        parts.append(sorted(part))
    return parts


def _swapped(choices: np.ndarray, others: np.ndarray, part: list[int]) -> np.ndarray:
    mixed = choices.copy()
    mixed[part] = others[part]
    return mixed


def _nothing_fits(smallest: Plan, budget: float, wider: Sequence[str]) -> str:
    found = ledger(smallest)
    largest = "; ".join(f"{entry} ({entry.kind}, {show_bytes(entry.total)})" for entry in found.entries[:MOST_TENSORS])
    kinds = ", ".join(f"{show_bytes(value)} {kind}" for kind, value in found.by_kind.items())
    held = found.by_kind.get(ACTIVATIONS, 0.0) + found.by_kind.get(TRANSIENTS, 0.0)
    helps = [*wider]
    if held > smallest.peak_bytes / 4:
        helps += ["a smaller batch", "jax.checkpoint around what is repeated"]
    return (
        f"nothing fits: the smallest peak found is {smallest.peak_bytes:,.0f} bytes per device "
        f"({show_bytes(smallest.peak_bytes)}), the budget is {show_bytes(budget)}. At that peak live {kinds}. "
        f"The largest, per device: {largest}. "
        f"What would help: {'; '.join(helps) or 'a larger budget: more devices along any axis do not lower it'}."
    )
