"""The default search: one mesh axis at a time, each by bounded-width elimination on the folded problem, then sweeps."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from itertools import combinations, permutations

import numpy as np

from jaxplan.problem import Assignment, Problem
from jaxplan.reduce import ChargedPricer, Pricer, Undo, fold
from jaxplan.search.elimination import CAP, min_fill_order, option_weights, solve
from jaxplan.search.limited import limited
from jaxplan.search.moves import ROUNDS, SMALL, crossed, finest, fused, polished

SWEEPS = 6
PATIENCE = 2
"""Rounds without improvement before a bounded (inexact) elimination of a small problem gives up: each round keeps other variables
fixed. Larger ones have one."""
GAIN = 3e-4
"""By what share re-opening one block of axes must improve a larger problem for the others to be re-opened after it."""
BLOCK_LIMIT = 30_000
"""Table entries up to which several axes are re-opened at once."""
BLOCK_CAP = 1 << 16
POLISHINGS = 2
"""Times that all pairs of axes are polished, as long as that improves: one pair may open the way for an earlier one."""
RECURSIONS = 2
"""Prices of usages at which the recursion starts anew; later ones go on from what is known."""
FIRST_CAP = 1 << 18
"""Entries of a table in the first solution of each axis, where nothing is known that could be kept."""
PIECE = 1 << 16
"""Entries of the tables into which a larger one is split there: a wide graph is not solved exactly anyway."""


def hsm2dl(problem: Problem) -> Assignment:
    """Recursion over mesh axes: O(operators x axes x sweeps) on the folded graph.

    Every order of the axes is tried on the coarsely folded problem (equal kinds decide alike), starting from "no axis
    used" (option 0). The best is then refined where look-alikes are told apart by their neighbourhoods. On small problems nodes
    may first take one option along all axes at once (a sum that is partial along two axes is scattered over both or not at all);
    larger ones are crossed once with what messages over joint choices propose (`moves.py`). Then one axis is re-opened at a time
    until nothing improves (in larger ones the axis that was decided last comes first); where writing out all joint choices is
    cheap, all axes are re-opened at once. On small problems nodes may then take one option along all axes, or exchange what two
    axes do, in one direction or both, and joint moves end the search; on larger ones these take longer than all the rest, and
    `search="joint"` makes them. Deterministic.

    Within a limit on usages the recursion and its sweeps run at prices of usages, several times, and what they find is improved
    by neighbourhoods (`limited.py`); raises OverLimit where nothing is found within it.
    """
    if not problem.nodes:
        return Assignment(np.zeros((0, len(problem.axes)), dtype=np.int64), 0.0)
    if problem.limit < math.inf:
        return limited(problem, _AtPrices(problem), "hsm2dl")
    axes = _open_axes(problem)
    (folded, expand), (fine, unfold) = fold(problem, 0), finest(problem)
    coarse = len(folded.nodes)
    large = max(len(fine.nodes), coarse) > SMALL
    pricer, elimination = Pricer(folded), elimination_order(folded)
    best = fused(pricer, elimination, _recursions(pricer, elimination, axes, exchanged=not large))
    if len(fine.nodes) > coarse:
        best = restricted(fine, expand(best), unfold)
        folded, expand, pricer, elimination = fine, unfold, Pricer(fine, pricer), elimination_order(fine)
    if large:
        best, seconds = _swept(pricer, elimination, crossed(pricer, elimination, best, axes), axes[::-1])
    else:
        best, seconds = _settled(pricer, elimination, best, axes)
        if len(axes) > 1:
            best, seconds = _taken(pricer, elimination, best, seconds, _tied(pricer, best, axes, exchanged=True), axes)
        for opened, follows in permutations(axes, 2):
            best, seconds = _taken(pricer, elimination, best, seconds, _turned(pricer, best, opened, follows), axes)
        for _ in range(POLISHINGS):
            before = seconds
            best, seconds = polished(pricer, elimination, best, axes, ROUNDS // max(1, math.comb(len(axes), 2)))
            if seconds >= before * (1 - 1e-9):
                break
    notes: dict[str, object] = {"variables": (len(problem.nodes), coarse, len(folded.nodes))}
    return Assignment(expand(best), seconds, None, notes)


class _AtPrices:
    """The search where usages cost something: what is known, and at first the recursion, swept axis by axis. Tables of prices
    and of usages are written out once."""

    def __init__(self, problem: Problem) -> None:
        self._axes = _open_axes(problem)
        coarse, self._expand = fold(problem, 0)
        self._coarse, self._coarse_order = ChargedPricer(coarse), elimination_order(coarse)
        self._fine, self._unfold = finest(problem)
        self._pricer, self._order = ChargedPricer(self._fine, self._coarse), elimination_order(self._fine)
        self._fresh = RECURSIONS

    def __call__(self, spans: np.ndarray, known: Sequence[np.ndarray]) -> np.ndarray:
        self._pricer.charge(spans)
        proposals = [restricted(self._fine, choices, self._unfold) for choices in known]
        if self._fresh or not known:
            self._fresh -= 1
            self._coarse.charge(spans)
            tried = _recursions(self._coarse, self._coarse_order, self._axes)
            best = fused(self._coarse, self._coarse_order, tried)
            proposals.append(restricted(self._fine, self._expand(best), self._unfold))
        best = fused(self._pricer, self._order, proposals)
        best, _ = _settled(self._pricer, self._order, best, self._axes)
        return self._unfold(best)


def _open_axes(problem: Problem) -> list[int]:
    return [a for a in (problem.axis_order or range(len(problem.axes))) if any(n.options[a] > 1 for n in problem.nodes)]


def _recursions(pricer: Pricer, elimination: list[int], axes: list[int], exchanged: bool = True) -> list[np.ndarray]:
    """What every order of the axes finds; `exchanged`: with axes that are alike exchanged as well."""
    problem = pricer.problem
    nothing = np.zeros((len(problem.nodes), len(problem.axes)), dtype=np.int64)
    swaps = _swaps(axes, problem.alike if exchanged else (), len(problem.axes))
    tried: dict[tuple[Hashable, ...], np.ndarray] = {}
    for order in _orders(axes):
        labels = tuple([problem.alike[a] if problem.alike else a for a in order])
        if labels not in tried:
            tried[labels] = _recursion(pricer, elimination, nothing, order)
    return [choices[:, columns] for choices in tried.values() for columns in swaps]


def _settled(pricer: Pricer, elimination: list[int], best: np.ndarray, axes: list[int]) -> tuple[np.ndarray, float]:
    """Nodes may take one option along all axes; then sweeps."""
    if len(axes) > 1:
        candidates = _tied(pricer, best, axes)
        options, _ = solve(pricer.among(candidates), elimination, np.zeros(len(best), dtype=np.int64))
        best = _picked(candidates, options)
    return _swept(pricer, elimination, best, axes)


def _swept(pricer: Pricer, elimination: list[int], best: np.ndarray, axes: list[int]) -> tuple[np.ndarray, float]:
    """Re-open one axis at a time until nothing improves, then several at once where writing out their joint choices is cheap."""
    best, seconds = _sweep(pricer, elimination, best, [(axis,) for axis in axes], CAP)
    for size in range(2, len(axes) + 1):
        blocks = [block for block in combinations(axes, size) if _entries(pricer.problem, block) <= BLOCK_LIMIT]
        if blocks:
            best, seconds = _sweep(pricer, elimination, best, blocks, BLOCK_CAP)
    return best, seconds


def _recursion(pricer: Pricer, elimination: list[int], choices: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Decide one axis after the other, each given those before, among the options that need no others: what nodes gain together
    is found when axes are re-opened, once all of them are known."""
    choices = choices.copy()
    for axis in axes:
        tables, _ = pricer.along((axis,), choices, alone=True)
        choices[:, axis], _ = solve(tables, elimination, cap=FIRST_CAP, piece=PIECE, rounds=0)  # sweeps go on from there anyway
    return choices


def _taken(
    pricer: Pricer, elimination: list[int], choices: np.ndarray, seconds: float, candidates: list[np.ndarray], axes: Sequence[int]
) -> tuple[np.ndarray, float]:
    """Every node keeps its choice, the first of its candidates, or takes another of them; where that improves, `axes` are swept
    again."""
    tables = pricer.among(candidates)
    options, _ = solve(tables, elimination, np.zeros(len(choices), dtype=np.int64))
    now = tables.price(options)
    if now >= seconds * (1 - 1e-9):
        return choices, seconds
    return _sweep(pricer, elimination, _picked(candidates, options), [(axis,) for axis in axes], CAP)


def _picked(candidates: Sequence[np.ndarray], options: np.ndarray) -> np.ndarray:
    """(nodes, axes) choices, from the number of one candidate per node."""
    return np.stack([rows[option] for rows, option in zip(candidates, options, strict=True)])


def _tied(pricer: Pricer, choices: np.ndarray, axes: Sequence[int], exchanged: bool = False) -> list[np.ndarray]:
    """Per node its choice, and each option along all axes at once: what no single axis improves may lie there. `exchanged`: and
    its choice with what two axes do exchanged."""
    candidates, pairs = [], list(combinations(axes, 2)) if exchanged else []
    fewest = pricer.options[:, list(axes)].min(1).tolist()
    for row, counts, few in zip(choices.tolist(), pricer.options.tolist(), fewest, strict=True):
        rows = {tuple(row): None}
        for option in range(few):
            every = row[:]
            for axis in axes:
                every[axis] = option
            rows[tuple(every)] = None
        for one, other in pairs:
            if row[one] < counts[other] and row[other] < counts[one]:
                turned = row[:]
                turned[one], turned[other] = row[other], row[one]
                rows[tuple(turned)] = None
        candidates.append(np.array(list(rows)))
    return candidates


def _turned(pricer: Pricer, choices: np.ndarray, opened: int, follows: int) -> list[np.ndarray]:
    """Per node its choice, and every option of one axis while another keeps its own or takes over what the first one did: a part
    of the program where two axes have changed places is left so."""
    candidates = []
    for row, counts in zip(choices, pricer.options.tolist(), strict=True):
        own, over = int(row[follows]), int(row[opened])
        rows = {tuple(row.tolist()): None}
        for other in dict.fromkeys([own, over if over < counts[follows] else own]):
            for option in range(counts[opened]):
                changed = row.copy()
                changed[[opened, follows]] = option, other
                rows[tuple(changed.tolist())] = None
        candidates.append(np.array(list(rows)))
    return candidates


def _entries(problem: Problem, axes: tuple[int, ...]) -> int:
    """Table entries that all joint choices of some axes take."""
    counts = [math.prod([node.options[axis] for axis in axes]) for node in problem.nodes]
    return sum(counts) + sum([counts[edge.tail] * counts[edge.head] for edge in problem.edges])


def _orders(axes: list[int]) -> list[tuple[int, ...]]:
    """All orders of up to three axes; of more, each axis first once."""
    if len(axes) <= 3:
        return list(permutations(axes))
    return [tuple(axes[i:] + axes[:i]) for i in range(len(axes))]


def _swaps(axes: list[int], alike: Sequence[Hashable], count: int) -> list[list[int]]:
    """Ways to exchange axes that are alike, as rearrangements of the columns of `count` axes; the first changes nothing."""
    found = {}
    for order in _orders(axes):
        if all(a == b or (alike and alike[a] == alike[b]) for a, b in zip(axes, order, strict=True)):
            columns = list(range(count))
            for a, b in zip(axes, order, strict=True):
                columns[a] = b
            found[tuple(columns)] = columns
    return list(found.values())


def _sweep(
    pricer: Pricer, elimination: list[int], choices: np.ndarray, blocks: Sequence[tuple[int, ...]], cap: int
) -> tuple[np.ndarray, float]:
    """Re-open one block of axes after the other, given the others, until nothing improves; in larger problems, until all blocks
    but one have improved hardly anything."""
    choices, tally, small = choices.copy(), [0] * len(choices), len(choices) <= SMALL
    seconds, idle = math.nan, 0
    for turn in range(SWEEPS * len(blocks)):
        tables, rows = pricer.along(blocks[turn % len(blocks)], choices)
        now = np.zeros(len(choices), dtype=np.int64)
        for axis in blocks[turn % len(blocks)]:  # as `all_rows` counts
            now = now * pricer.options[:, axis] + choices[:, axis]
        seconds = seconds if turn else tables.price(now)
        options, exact = solve(tables, elimination, now, tally, cap)
        improved = seconds if options is now else tables.price(options)
        gained = 1 - improved / seconds if improved < seconds else 0.0
        if gained > 1e-9:
            choices, seconds = _picked(rows, options), improved
        if gained <= (1e-9 if small else GAIN):
            idle += 1
        else:
            idle = 1 if exact and small else 0
        if idle >= (len(blocks) * (1 if exact else PATIENCE) if small else max(1, len(blocks) - 1)):
            break
    return choices, seconds


def elimination_order(problem: Problem) -> list[int]:
    """The order of elimination depends on who is connected to whom only: it serves every axis."""
    order = problem.structure.get("elimination")
    if order is None:
        weights = option_weights(math.prod(node.options) for node in problem.nodes)
        order = min_fill_order(weights, [(e.tail, e.head) for e in problem.edges if e.tail != e.head and e.times])
        problem.structure["elimination"] = order
    return order


def restricted(fine: Problem, choices: np.ndarray, unfold: Undo) -> np.ndarray:
    """The choices of a finer folding that agree with an assignment of the whole (the coarse folding decides alike)."""
    probe = unfold(np.arange(len(fine.nodes))[:, None])[:, 0]
    start = np.zeros((len(fine.nodes), choices.shape[1]), dtype=np.int64)
    start[probe] = choices
    return start
