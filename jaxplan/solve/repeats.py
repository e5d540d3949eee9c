"""Layers that repeat: what one of them chose is offered to the others.

Programs are made of layers that are alike, and a search that works on all of them finds a good choice in one layer here, in
another there. Nodes are sorted into classes by their numbers of strategies and those of the nodes around them (colour refinement
after Weisfeiler and Leman, 1968). Where many classes have about as many members as there are layers, edges between two classes
say whether their members, in order of their numbers, run through the layers the same way or, as a backward pass does, the other
way. Nothing has to be right here: an offer is one more parent of a merge, which takes of it what lowers the cost.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque

import numpy as np

from jaxplan.solve.nouns import IntervalProblem
from jaxplan.solve.reductions import Reducer, expand

ROUNDS = 4
"""How far around a node is looked at."""
FEWEST, MOST = 3, 500
"""Layers that are looked for, between these."""
LIKE = 0.8
"""Classes count as one per layer down to this share of the layers: the first and last ones differ from the others."""
TOGETHER = 4
"""Members of a class in one layer, at most."""
SHARE = 0.25
"""Of the nodes that choose, how many have to be in layers for offers to be made."""
FAR = 3
"""Layers that one offer moves choices by, at most."""


def colours(problem: IntervalProblem, rounds: int = ROUNDS) -> np.ndarray:
    """(n,) a class per node, from 0: equal numbers of strategies, and around them equal classes, so many times."""
    tail, head = problem.edges.reshape(-1, 2).T
    colour = problem.counts.astype(np.uint64)
    for _ in range(rounds):
        mixed, around = _mixed(colour), np.zeros(len(colour), dtype=np.uint64)
        np.add.at(around, tail, mixed[head])
        np.add.at(around, head, mixed[tail])
        colour = _mixed(mixed + np.uint64(3) * around)
    return np.unique(colour, return_inverse=True)[1].reshape(-1)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Whole numbers as far apart as 64 bits allow (the finisher of splitmix64, Steele, Lea and Flood, OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Classes:
    """Nodes by class: those of class c, rising, are `order[first[c]:first[c] + size[c]]`, and `rank` is a node's place there."""

    def __init__(self, colour: np.ndarray) -> None:
        self.colour = colour
        self.size = np.bincount(colour)
        self.order = np.argsort(colour, kind="stable")
        self.first = np.cumsum(self.size) - self.size
        self.rank = np.empty_like(colour)
        self.rank[self.order] = np.arange(len(colour)) - self.first[colour[self.order]]

    def layers(self, choosing: np.ndarray) -> int:
        """How many layers there seem to be: the class size near which most nodes are. `choosing`: (n,) those that count."""
        weight = np.bincount(self.colour, choosing, len(self.size)) * ((self.size >= FEWEST) & (self.size <= MOST))
        held = np.bincount(self.size, weight, MOST + 1)[: MOST + 1]
        sums = np.concatenate([[0.0], np.cumsum(held)])
        sizes = np.arange(MOST + 1)
        near = sums[1:] - sums[np.ceil(LIKE * sizes).astype(np.int64)]
        return int(near.argmax()) if near.any() else 0


class Repeats:
    """The layers of a reduced problem. `count`: how many, 0 where there are none to speak of."""

    def __init__(self, reducer: Reducer) -> None:
        problem = reducer.problem
        self.reducer = reducer
        self.alive = np.flatnonzero(reducer.alive)
        self.classes = Classes(colours(problem))
        self.count = 0
        found = self.classes.layers(problem.counts > 1)
        if not found:
            return
        self.each = np.maximum(1, np.rint(self.classes.size / found)).astype(np.int64)  # members of a class per layer
        fits = (abs(self.classes.size / found - self.each) <= (1 - LIKE) * self.each) & (self.each <= TOGETHER)
        turn, shift = aligned(problem, self.classes, self.each, fits, found)
        colour = self.classes.colour[self.alive]
        self.turn, self.shift = turn[colour], shift[colour]
        self.inside = self.turn != 0
        if self.inside.sum() < SHARE * len(self.alive):
            return
        self.count = found
        self.layer = self.turn * (self.classes.rank[self.alive] // self.each[colour]) + self.shift
        self.position = np.full((len(self.alive), int(problem.counts[self.alive].max())), -1)
        for row, u in zip(self.position, self.alive.tolist()):
            row[reducer.labels[u]] = np.arange(len(reducer.labels[u]))

    def offers(self, chosen: np.ndarray, number: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Positions in which all layers do as others do: those a few layers before or after, or one for all, in turns."""
        if not self.count:
            return []
        strategies = expand(self.reducer, chosen)
        here = self.layer[self.inside]
        found = []
        for turn in range(number):
            if turn % 2:
                source = np.full(len(chosen), rng.choice(here))
            else:
                source = self.layer + int(rng.integers(1, FAR + 1)) * int(rng.choice([-1, 1]))
            found.append(self.taken(chosen, strategies, source))
        return found

    def taken(self, chosen: np.ndarray, strategies: np.ndarray, source: np.ndarray) -> np.ndarray:
        """Positions with those of layer `source`, (n,), where that has a node of the class and its strategy is left."""
        classes, colour = self.classes, self.classes.colour[self.alive]
        each = self.each[colour]
        member = self.turn * (source - self.shift) * each + classes.rank[self.alive] % each
        there = self.inside & (member >= 0) & (member < classes.size[colour])
        member = np.where(there, member, 0)
        wanted = np.where(there, strategies[classes.order[classes.first[colour] + member]], 0)
        position = self.position[np.arange(len(chosen)), wanted]
        return np.where(there & (position >= 0), position, chosen)


def aligned(
    problem: IntervalProblem, classes: Classes, each: np.ndarray, fits: np.ndarray, layers: int
) -> tuple[np.ndarray, np.ndarray]:
    """Per class (turn, shift): the member of place k is in layer turn * (k // each) + shift. Turn 0: no layer is known."""
    tail, head = problem.edges.reshape(-1, 2).T
    one, two = classes.colour[tail], classes.colour[head]
    kept = fits[one] & fits[two] & (one != two)
    tail, head, one, two = tail[kept], head[kept], one[kept], two[kept]
    places: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    ends = one, two, classes.rank[tail] // each[one], classes.rank[head] // each[two]
    for a, b, i, j in np.stack(ends, axis=1).tolist():
        places[a, b].append((i, j))
    near: dict[int, list[tuple[float, int, int, int]]] = defaultdict(list)
    for (a, b), found in places.items():
        if len(found) < layers // 2:
            continue
        along, same = Counter(i - j for i, j in found).most_common(1)[0]
        against, opposite = Counter(i + j for i, j in found).most_common(1)[0]
        sure = max(same, opposite) / len(found)
        if 2 * sure > 1:  # i is turn * j + apart for most, so j is turn * (i - apart)
            turn, apart = (1, along) if same >= opposite else (-1, against)
            near[a].append((sure, b, turn, apart))
            near[b].append((sure, a, turn, -turn * apart))
    turns, shifts = np.zeros(len(fits), dtype=np.int64), np.zeros(len(fits), dtype=np.int64)
    for root in sorted(near, key=lambda c: (-len(near[c]), c)):
        if turns[root]:
            continue
        turns[root] = 1
        queue = deque([root])
        while queue:
            a = queue.popleft()
            for _, b, turn, apart in sorted(near[a], reverse=True):
                if not turns[b]:
                    turns[b], shifts[b] = turns[a] * turn, turns[a] * apart + shifts[a]
                    queue.append(b)
    return turns, shifts
