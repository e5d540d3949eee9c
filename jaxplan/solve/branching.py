"""Branching: a tree of problems with fewer strategies, whose least dual bound is one of the whole problem.

Where few nodes take much of what is limited, the dual may mix a strategy that takes much with one that takes little, and its
bound stays far below every feasible cost. So a node's strategies are split by what their usage costs at the multipliers, where
that differs most; both halves have a dual of their own, which begins at the messages and multipliers of what was split. The
problem of least bound is split next. Where usage does not differ, it is the node on most chains that has two strategies left.
Hubs (`diving.py`), of which the dual takes a part of several strategies too, are split before all others.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxplan.solve.core import BARRED
from jaxplan.solve.diving import dive, hubs_of, keep
from jaxplan.solve.dual import Dual

STEPS, FIRST_STEP, LAST_STEP = 30, 0.01, 1e-5
"""Steps of the ascent in each half, falling geometrically between these."""
HUB_STEPS, HUB_FIRST_STEP = 10, 3e-4
"""The same where a hub was split, which changes messages more than multipliers."""
DIVING_STEP = 1e-5
"""Steps while diving."""
FREED = 0.7
"""Hubs that are decided anew where the others are kept: a share of at most this."""
RIVALS = 2
"""Open problems, at random, of which the one of least bound is dived from."""
SETTLING = 2
"""Passes before a dual is read."""
LUMP = 1e-4
"""Difference of usage at its price, as a share of the bound, above which a node is split by usage."""
HELD = 1 << 28
"""Bytes of messages that open problems may hold; further ones begin at those of the whole problem."""


class Leaf(NamedTuple):
    """An open problem: strategies that are left, and where its dual stands. In order of bounds, then of age."""

    bound: float
    number: int
    open: np.ndarray
    multipliers: np.ndarray
    message: np.ndarray | None


@dataclass(eq=False)
class Front:
    """Open problems, those that are being split (their bounds, by worker), and the least bound of those that are closed."""

    leaves: list[Leaf]
    busy: dict[int, float] = field(default_factory=dict)
    closed: float = math.inf
    numbers: itertools.count = field(default_factory=lambda: itertools.count(1))
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def bound(self) -> float:
        """The least of all."""
        with self.lock:
            return min(self.closed, *self.busy.values(), *[leaf.bound for leaf in self.leaves[:1]], math.inf)

    def take(self, worker: int) -> Leaf | None:
        """The open problem of least bound, to be split; None if there is none."""
        with self.lock:
            if not self.leaves:
                return None
            leaf = heapq.heappop(self.leaves)
            self.busy[worker] = leaf.bound
            return leaf

    def put(self, leaf: Leaf) -> None:
        """Another open problem."""
        with self.lock:
            heapq.heappush(self.leaves, leaf)

    def close(self, bound: float) -> None:
        """A problem of this bound is not split any more."""
        with self.lock:
            self.closed = min(self.closed, bound)

    def done(self, worker: int) -> None:
        """What the worker took is split."""
        with self.lock:
            del self.busy[worker]


class Tree:
    """Open problems, of which `bound` is the least bound; `found` is called with the positions that each dual is read as."""

    def __init__(self, dual: Dual, found: Callable[[np.ndarray], None]) -> None:
        core = self.core = dual.core
        self.dual, self.found = Dual(core, dual.offset), found
        self.message = dual.message.copy()
        self.active = dual.active.copy()
        counts = np.diff(core.start)
        self.owner = np.repeat(np.arange(len(counts)), counts)
        ends = np.repeat(np.arange(len(counts)), np.diff(core.first))
        later = np.bincount(ends, core.other > ends, len(counts))
        self.chains = np.maximum(1, np.maximum(later, np.diff(core.first) - later))
        width = counts[ends]
        self.strategy = np.repeat(core.start[ends] - (np.cumsum(width) - width), width) + np.arange(int(width.sum()))
        everything = np.ones(len(core.cost), dtype=bool)
        self.root = Leaf(dual.best + dual.offset, 0, everything, dual.best_multipliers, None)
        self.front = Front([self.root])
        self.hubs = hubs_of(core)
        self.bar = 0.0  # what a closed strategy costs more: any sum makes the bound hold, a moderate one keeps its digits

    def twin(self, found: Callable[[np.ndarray], None]) -> Tree:
        """The same tree for another worker: the open problems are shared, the dual is its own."""
        tree = copy.copy(self)
        tree.dual, tree.found = Dual(self.core, self.dual.offset), found
        return tree

    @property
    def leaves(self) -> list[Leaf]:
        """The open problems."""
        return self.front.leaves

    @property
    def bound(self) -> float:
        """Of every feasible cost of the whole problem."""
        return self.front.bound

    def grow(self, cutoff: float) -> None:
        """Split the open problem of least bound; halves whose bound reaches the cutoff are not looked at again."""
        leaf = self.front.take(id(self))
        if leaf is not None:
            self.halve(leaf, cutoff)
            self.front.done(id(self))

    def halve(self, leaf: Leaf, cutoff: float) -> None:
        """Split a problem, or close it."""
        self.bar = 4.0 * abs(cutoff)
        self.load(leaf)
        if leaf.message is None or not len(self.hubs):
            self.dual.passes(SETTLING)
        else:
            self.dual.price()  # its messages were settled when it was opened
        split = self.split(leaf, cutoff)
        if split is None:
            self.front.close(leaf.bound)
            return
        node = self.owner[split[0].argmax()]
        steps = (HUB_STEPS, HUB_FIRST_STEP) if node in self.hubs else (STEPS, FIRST_STEP)
        for half in (leaf.open & ~split[0], leaf.open & ~split[1]):
            if not self.propagate(half):
                continue  # nothing is possible in it
            self.load(leaf, half)
            bound = max(leaf.bound, self.climb(cutoff, *steps))
            if bound >= cutoff:
                self.front.close(bound)
                continue
            held = self.dual.message.copy() if len(self.leaves) * self.message.nbytes < HELD else None
            self.front.put(Leaf(bound, next(self.front.numbers), half, self.dual.best_multipliers, held))

    def load(self, leaf: Leaf, half: np.ndarray | None = None) -> None:
        """Set the dual to an open problem, or to a part of it."""
        dual = self.dual
        still = leaf.open if half is None else half
        dual.core = self.core._replace(cost=self.core.cost + np.where(still, 0.0, self.bar))
        dual.message[:] = self.message if leaf.message is None else leaf.message
        dual.multipliers, dual.active = leaf.multipliers.copy(), self.active | (leaf.multipliers > 0)
        dual.best, dual.direction = -math.inf, None

    def propagate(self, left: np.ndarray) -> bool:
        """Close, in place, strategies that have no possible partner left at some neighbour. False where a node has none left."""
        core = self.core
        queue = sorted(set(self.owner[~left].tolist()))
        while queue:
            v = queue.pop()
            mine = left[core.start[v] : core.start[v + 1]]
            if not mine.any():
                return False
            for i in range(core.first[v], core.first[v + 1]):
                w = int(core.other[i])
                theirs = left[core.start[w] : core.start[w + 1]]
                table = core.table[core.push[i] : core.push[i] + len(mine) * len(theirs)].reshape(len(mine), -1)
                supported = table[mine].min(axis=0) < BARRED
                if not supported[theirs].all():
                    theirs &= supported
                    queue.append(w)
        return True

    def climb(self, cutoff: float, steps: int, first: float) -> float:
        """Ascend the loaded dual by so many steps, from the first one on: its bound."""
        dual = self.dual
        for step in np.geomspace(first, LAST_STEP, steps).tolist():
            _, chosen = dual.ascend(step)
            if dual.best + dual.offset >= cutoff:
                break
        self.found(chosen)
        dual.multipliers = dual.best_multipliers.copy()
        dual.passes(SETTLING)
        return dual.best + dual.offset

    def split(self, leaf: Leaf, cutoff: float) -> tuple[np.ndarray, np.ndarray] | None:
        """What is closed in either half; None if no node has two strategies that could be in a cheaper solution."""
        dual, start = self.dual, self.core.start[:-1]
        total = dual.costs + np.bincount(self.strategy, dual.message, len(dual.costs))
        beyond = (total - np.minimum.reduceat(total, start)[self.owner]) / self.chains[self.owner]
        near = leaf.open & (beyond <= cutoff - leaf.bound)
        several = np.add.reduceat(near, start, dtype=np.int64) > 1
        waiting = self.hubs[several[self.hubs]]
        if len(waiting):
            return self.halved(int(waiting[0]), near, beyond)
        priced = dual.costs - dual.core.cost
        high = np.maximum.reduceat(np.where(near, priced, -math.inf), start)
        low = np.minimum.reduceat(np.where(near, priced, math.inf), start)
        node = int((high - low).argmax())
        if high[node] - low[node] > LUMP * abs(leaf.bound):
            left = priced <= 0.5 * (high[node] + low[node])
        else:
            ties = np.where(several, self.chains, 0)
            node = int(ties.argmax())
            return self.halved(node, near, beyond) if ties[node] else None
        mine = self.owner == node
        return mine & ~left, mine & left

    def halved(self, node: int, near: np.ndarray, beyond: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The node's strategies, split in the middle of those that are near, by how far they are beyond its best one."""
        among = np.flatnonzero(near & (self.owner == node))
        left = beyond <= np.sort(beyond[among])[(len(among) - 1) // 2]
        if left[among].all():  # all tie
            left[among[len(among) // 2 :]] = False
        mine = self.owner == node
        return mine & ~left, mine & left

    def dive(self, noise: float, rng: np.random.Generator, check: Callable[[], None], like: np.ndarray | None = None) -> Dual:
        """The dual in which all hubs are decided, of one of the open problems: that of the least bound of a few at random.

        `noise`: what strategies cost more at random, per chain through their node. `like`: positions that most hubs keep.
        """
        with self.front.lock:
            leaves = list(self.front.leaves)
        free = rng.random(len(self.hubs)) < (1.0 if like is None else FREED * rng.random())
        leaf = min(leaves[k] for k in rng.integers(len(leaves), size=RIVALS).tolist()) if leaves and like is None else self.root
        self.bar = 4.0 * abs(leaf.bound)
        self.load(leaf)
        if like is not None:
            kept = self.hubs[~free]
            keep(self.dual, kept, like[kept], self.bar)
        dive(self.dual, self.hubs[free], noise * self.chains, self.bar, DIVING_STEP, rng, check)
        return self.dual
