"""A family of assignments that are merged with one another, at prices of usage that it learns.

Merging does not ask for parents that are good, nor within the limit: what they hold in common is bad nowhere, and each is right
somewhere. So parents are walks of a fraction of a second from the dual's solution, and what merging makes of them at a few prices
of usage are parents again. Prices rise where the limit is exceeded, and fall while it is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from jaxplan.solve.core import Core, core_cost, core_usage
from jaxplan.solve.crossover import cross
from jaxplan.solve.diving import hubs_of
from jaxplan.solve.merging import merge
from jaxplan.solve.primal import Walk
from jaxplan.solve.repeats import Repeats

RECENT, KEPT = 3, 4
"""Latest walks that are merged, and of what merging made before."""
OFFERS = 2
"""Of the best one, with layers that do as others do, merged along."""
LEVELLED, WIDELY = 3, 4
"""Merges of a new walk with what its own layers offer one another, and offers in each."""
GAIN = 3e-4
"""What a merge has to gain, as a share of the cost, for a family not to be nearer to its end."""
PRICES = 8
"""Prices at which one merge is made; the first are the multipliers themselves."""
SPREAD, BLUR = 0.5, 0.1
"""Prices differ by factors of up to exp(SPREAD), and each by a factor of its own of exp(BLUR * a normal variate)."""
RISE, FALL = 1.3, 0.1
"""Factor by which all prices rise if nothing was within the limit, and logarithm by which they fall where it was."""


@dataclass(eq=False)
class Family:
    """`best`: the best within the limit; `recent`: walks; `made`: what merging made, cheapest usage last; `prices`: per time."""

    core: Core
    rng: np.random.Generator
    repeats: Repeats
    best: Walk | None = None
    recent: list[np.ndarray] = field(default_factory=list)
    made: list[np.ndarray] = field(default_factory=list)
    prices: np.ndarray | None = None
    stale: int = 0
    hubs: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.hubs = hubs_of(self.core)

    @property
    def cost(self) -> float:
        """Of the best within the limit."""
        return math.inf if self.best is None else self.best.cost

    def add(self, walk: Walk) -> None:
        """Take a walk in: as the best, or to be merged with it."""
        if walk.feasible and walk.cost < self.cost:
            self.stale = 0 if walk.cost < self.cost - GAIN * abs(walk.cost) else self.stale
            walk, self.best = self.best or walk, walk
        if walk is not self.best:
            self.recent = [*self.recent, walk.chosen.copy()][-RECENT:]

    def level(self, walk: Walk, multipliers: np.ndarray) -> Walk:
        """The walk with its better layers' choices in all its layers, at the family's prices."""
        prices = np.concatenate([[0.0], np.cumsum(multipliers if self.prices is None else self.prices)])
        for _ in range(LEVELLED if self.repeats.count else 0):
            offers = self.repeats.offers(walk.chosen, WIDELY, self.rng)
            walk = Walk(self.core, merge(self.core, walk.chosen, offers, prices[None])[0])
        return walk

    def merge(self, multipliers: np.ndarray, check: Callable[[], None]) -> None:
        """Merge all there is, at several prices near the family's; `multipliers`: the dual's. `check` may raise."""
        core, before = self.core, self.cost
        others = [*self.recent, *self.made]
        base = others.pop() if self.best is None else self.best.chosen
        others += self.repeats.offers(base, OFFERS, self.rng)
        if not others:
            return
        learned = multipliers if self.prices is None else self.prices
        factors = np.exp(np.linspace(-SPREAD, SPREAD, PRICES)[:, None] + BLUR * self.rng.standard_normal((PRICES, len(learned))))
        tried = learned * factors
        tried[0] = multipliers
        merged = self.merged(base, others, np.concatenate([np.zeros((PRICES, 1)), np.cumsum(tried, axis=1)], axis=1), tried)
        check()
        costs = np.array([core_cost(core, chosen) for chosen in merged])
        over = np.maximum(np.array([core_usage(core, chosen) for chosen in merged]) - core.capacity, 0.0)
        fits = over.max(axis=1, initial=0.0) == 0.0
        for k in np.argsort(costs, kind="stable").tolist():
            if fits[k] and costs[k] < self.cost:
                self.best = Walk(core, merged[k])
            elif not fits[k] and self.best is not None:
                cross(self.best, merged[k])
        self.learn(learned, multipliers, over, fits, abs(float(costs.min())))
        made = list({chosen.tobytes(): chosen for chosen in merged}.values())
        self.made = [made[i] for i in np.unique(np.linspace(0, len(made) - 1, KEPT).astype(int))]
        self.stale = 0 if self.cost < before - GAIN * abs(before) or before == math.inf else self.stale + 1

    def merged(self, base: np.ndarray, others: list[np.ndarray], sums: np.ndarray, prices: np.ndarray) -> np.ndarray:
        """For each price the better one of two merges where the latest walk has other hubs than the base: a merge leaves
        hubs where its base has them, as a rule."""
        core = self.core
        found = merge(core, base, others, sums)
        latest = self.recent[-1] if self.recent else base
        if (latest[self.hubs] != base[self.hubs]).any():
            again = merge(core, latest, [base, *others], sums)
            for k, price in enumerate(prices):
                worth = [core_cost(core, chosen[k]) + float(core_usage(core, chosen[k]) @ price) for chosen in (found, again)]
                if worth[1] < worth[0]:
                    found[k] = again[k]
        return found

    def learn(self, prices: np.ndarray, multipliers: np.ndarray, over: np.ndarray, fits: np.ndarray, cost: float) -> None:
        """Change the prices by what came out: lower where the middle one fits, else higher where the limit is exceeded."""
        middle = PRICES // 2
        if fits[middle]:
            self.prices = prices * np.exp(-FALL * (1 + 2 * fits[1:middle].mean()))
            return
        largest = max(float(prices.max()), 0.1 * float(multipliers.max())) or 0.1 * cost / float(self.core.capacity.max() or 1.0)
        self.prices = prices * (1.0 if fits.any() else RISE)
        for k in np.flatnonzero(~fits[middle:]) + middle:
            worst = int(over[k].argmax())
            share = min(1.0, 0.2 + 5 * over[k, worst] / max(1e-9, self.core.capacity[worst]))
            self.prices[worst] += largest * share / (PRICES - middle)

    def outside(self) -> np.ndarray | None:
        """At random one of those that merging made and that are over the limit, if any."""
        found = [chosen for chosen in self.made if (core_usage(self.core, chosen) > self.core.capacity).any()]
        return found[int(self.rng.integers(len(found)))] if found else None
