"""Moves over joint choices: trees re-opened whole, and assignments crossed. What single axes one after the other cannot reach.

Forests: a random set of nodes that has no cycle is re-opened over all joint choices of some axes, the others as they are; exact
by dynamic programming, so a move never makes an assignment dearer (subproblem trees in Markov random fields: Hamze and de
Freitas, UAI 2004). Messages of the dual (`dual.py`) propose assignments that differ in many places at once; fusing keeps of each
what is better (Lempitsky et al., TPAMI 2010). Deterministic: the random numbers start from one seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from jaxplan.problem import Problem, evaluate
from jaxplan.reduce import Pricer, Undo, fold
from jaxplan.search.dual import Link, Relaxation, TooLarge
from jaxplan.search.elimination import CAP, solve

FINE_ROUNDS = 2
SMALL = 180
"""Nodes up to which joint moves are cheap."""
HARDLY = 1.12
"""Where folding leaves fewer nodes by less than this factor, nothing is folded."""
FORESTS = 6
"""Forests re-opened in a row without an improvement before it is given up."""
ROUNDS = 4
"""Proposals by messages, each fused with what is known."""
SWEEPS = 4
"""Sweeps of messages between two proposals."""
POLISHED = 2
"""Forests re-opened in a proposal before it is fused."""
FEW_SWEEPS, FEW_FORESTS = 2, 2
"""What of these a large problem is given before single axes are swept."""
FUSED_CAP = 1 << 17
"""Entries of a table in fusing: few options each make it exact more often, and where it is not, what it misses is not searched
again."""
SEED = 0
BETTER = 1e-9
"""What counts as an improvement, as a fraction."""


def polished(
    pricer: Pricer, elimination: list[int], choices: np.ndarray, axes: Sequence[int], rounds: int = ROUNDS
) -> tuple[np.ndarray, float]:
    """An assignment (nodes, axes) at least as good, and its price: joint choices of every two axes are re-opened.

    `rounds`: proposals by messages. Pairs of axes whose joint prices are too many to write out are left as they are.
    """
    problem = pricer.problem
    seconds = evaluate(problem, choices)
    for pair in combinations(axes, 2):
        try:
            found = _polished_along(pricer, elimination, choices, seconds, pair, rounds)
        except TooLarge:
            continue
        now = evaluate(problem, found)
        if now < seconds * (1 - BETTER):
            choices, seconds = found, now
    return choices, seconds


def _polished_along(
    pricer: Pricer, elimination: list[int], choices: np.ndarray, seconds: float, axes: Sequence[int], rounds: int
) -> np.ndarray:
    """Joint choices of some axes re-opened, all others as they are: forests, then what messages propose, crossed."""
    relaxation = Relaxation(pricer.problem, seconds, axes, choices)
    grove, rng = Grove(relaxation), np.random.default_rng(SEED)
    best = grove.grown(grove.numbered(choices), rng, FORESTS)
    for _ in range(rounds):
        best = _proposed(pricer, elimination, relaxation, grove, best, SWEEPS, rng)
    return relaxation.choices(grove.grown(best, rng, FORESTS))


def _proposed(
    pricer: Pricer, elimination: list[int], relaxation: Relaxation, grove: Grove, best: list[int], sweeps: int,
    rng: np.random.Generator, others: Sequence[list[int]] = (),
) -> list[int]:
    """An assignment crossed with `others`, and with what messages propose after some more sweeps of them: numbers of options, as
    forests have them."""
    for turn in range(sweeps):
        relaxation.sweep(turn % 2 == 0, math.inf)
    proposed = relaxation.decided(forward=True)
    for _ in range(POLISHED):
        proposed = grove.moved(proposed, rng)
    numbers = [tuple(dict.fromkeys(several)) for several in zip(best, proposed, *others, strict=True)]
    candidates = [rows[list(own)] for rows, own in zip(relaxation.rows, numbers, strict=True)]
    return [own[k] for own, k in zip(numbers, _best_of(pricer, elimination, candidates).tolist(), strict=True)]


def crossed(pricer: Pricer, elimination: list[int], choices: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """An assignment (nodes, axes) at least as good, by little work: for every two axes it is crossed once with what messages
    propose, and with itself where these axes, being alike, have changed places; and a few forests are re-opened. Pairs of axes
    whose joint prices are too many to write out are left as they are."""
    alike = pricer.problem.alike
    for pair in combinations(axes, 2):
        try:
            relaxation = Relaxation(pricer.problem, evaluate(pricer.problem, choices), pair, choices)
        except TooLarge:
            continue
        grove, rng = Grove(relaxation), np.random.default_rng(SEED)
        options = grove.numbered(choices)
        others = [grove.exchanged(options, *pair)] if alike and alike[pair[0]] == alike[pair[1]] else []
        options = _proposed(pricer, elimination, relaxation, grove, options, FEW_SWEEPS, rng, others)
        for _ in range(FEW_FORESTS):
            options = grove.moved(options, rng)
        choices = relaxation.choices(options)
    return choices


def finest(problem: Problem) -> tuple[Problem, Undo]:
    """The folding that is searched last: look-alikes told apart two steps deep; none where that would merge hardly any."""
    fine, unfold = fold(problem, FINE_ROUNDS)
    if len(problem.nodes) <= HARDLY * len(fine.nodes):
        return problem, lambda choices: choices
    return fine, unfold


def fused(pricer: Pricer, elimination: list[int], proposals: Sequence[np.ndarray]) -> np.ndarray:
    """The best assignment found whose every choice is one of the proposals'; not dearer than the first."""
    if len(proposals) == 1:
        return proposals[0]
    choices = np.stack(proposals, axis=1)
    candidates = [np.array(list(dict.fromkeys(map(tuple, rows)))) for rows in choices.tolist()]
    options = _best_of(pricer, elimination, candidates)
    return np.stack([rows[option] for rows, option in zip(candidates, options, strict=True)])


def _best_of(pricer: Pricer, elimination: list[int], candidates: Sequence[np.ndarray]) -> np.ndarray:
    """The number of one candidate (count, axes) per node that are best together, as far as is found; not dearer than all first
    ones."""
    tables, first = pricer.among(candidates), np.zeros(len(candidates), dtype=np.int64)
    return solve(tables, elimination, cap=FUSED_CAP, piece=CAP, known=first)[0]


class Grove:
    """Forests of a relaxation's nodes, re-opened one after the other."""

    def __init__(self, relaxation: Relaxation) -> None:
        self._relaxation = relaxation
        self._near: list[list[tuple[int, Link, int]]] = [[] for _ in relaxation.held]
        for link in relaxation.links:
            tail, head = link.ends
            self._near[tail].append((head, link, 0))
            self._near[head].append((tail, link, 1))

    def numbered(self, choices: np.ndarray) -> list[int]:
        """Per node, the number of its choice among those open to it (of one that is not, the first)."""
        opened = zip(self._relaxation.rows, self._relaxation.options, choices, strict=True)
        return [int((rows[options] == choice).all(1).argmax()) for rows, options, choice in opened]

    def exchanged(self, options: list[int], one: int, other: int) -> list[int]:
        """Options with what two axes do exchanged, but for nodes to which that is not open."""
        found = []
        for rows, option in zip(self._relaxation.rows, options, strict=True):
            row = rows[option]
            if row[one] != row[other]:
                turned = row.copy()
                turned[[one, other]] = row[[other, one]]
                same = (rows == turned).all(1)
                option = int(same.argmax()) if same.any() else option
            found.append(option)
        return found

    def price(self, options: list[int]) -> float:
        """Seconds of one option per node (an illegal pair counts as cut: dear)."""
        total = sum([float(held[option]) for held, option in zip(self._relaxation.held, options, strict=True)])
        for link in self._relaxation.links:
            (tail, head), (tails, heads) = link.ends, link.seen
            total += float(link.rest[tails.of[options[tail]], heads.of[options[head]]])
        return total

    def grown(self, options: list[int], rng: np.random.Generator, patience: int) -> list[int]:
        """Re-open forests until `patience` of them in a row improve nothing."""
        seconds, idle = self.price(options), 0
        while idle < patience:
            options = self.moved(options, rng)
            now = self.price(options)
            idle = 0 if now < seconds - BETTER * abs(seconds) else idle + 1
            seconds = now
        return options

    def moved(self, options: list[int], rng: np.random.Generator) -> list[int]:
        """Re-open one random forest, as large as it can be; the rest stays."""
        order, above = self._forest(rng)
        inside = set(order)
        held, total = self._relaxation.held, {}
        for v in order:
            mine = held[v]
            for w, link, end in self._near[v]:
                if w not in inside:
                    mine = mine + _given(link, end, options[w])
            total[v] = mine
        for v in reversed(order):
            if v in above:
                parent, link, end = above[v]
                least = link.seen[end].smallest(total[v])
                message = (link.rest + (least[:, None] if end == 0 else least)).min(end)
                total[parent] = total[parent] + message[link.seen[1 - end].of]
        options = list(options)
        for v in order:
            mine = total[v]
            if v in above:
                parent, link, end = above[v]
                mine = mine + _given(link, end, options[parent])
            best = int(mine.argmin())
            if mine[best] < mine[options[v]]:
                options[v] = best
        return options

    def _forest(self, rng: np.random.Generator) -> tuple[list[int], dict[int, tuple[int, Link, int]]]:
        """(nodes, parents first; {node: (parent, their link, the node's end of it)}): no node that would close a cycle."""
        root: list[int] = [-1] * len(self._near)  # -1: outside

        def find(v: int) -> int:
            while root[v] != v:
                root[v] = root[root[v]]
                v = root[v]
            return v

        inside = []
        for v in rng.permutation(len(self._near)).tolist():
            trees = [find(w) for w, _, _ in self._near[v] if root[w] >= 0]
            if len(set(trees)) == len(trees):
                inside.append(v)
                root[v] = v
                for tree in trees:
                    root[tree] = v
        order: list[int] = []
        above: dict[int, tuple[int, Link, int]] = {}
        seen = [r < 0 for r in root]
        for start in inside:
            if seen[start]:
                continue
            seen[start] = True
            ahead = [start]
            while ahead:
                v = ahead.pop()
                order.append(v)
                for w, link, end in self._near[v]:
                    if not seen[w]:
                        seen[w] = True
                        above[w] = (v, link, 1 - end)
                        ahead.append(w)
        return order, above


def _given(link: Link, end: int, other: int) -> np.ndarray:
    """Per option of one end, what the link costs with the other end's option `other`."""
    place = link.seen[1 - end].of[other]
    return (link.rest[:, place] if end == 0 else link.rest[place])[link.seen[end].of]
