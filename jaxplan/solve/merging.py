"""The best of several assignments at once, exactly: a node may take the position it has in any of them.

Assignments of one problem that were improved apart agree on most nodes. What is left is a small problem with few positions a
node and little width, which elimination solves (after Cook and Seymour, Tour merging via branch-decomposition, INFORMS Journal
on Computing 2003, for another problem). Usages enter at prices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxplan.solve.core import Core
from jaxplan.solve.elimination import eliminate

CELLS = 1 << 11
"""Cells of the largest table in elimination; beyond, a node stays where it is."""


def merge(core: Core, chosen: np.ndarray, others: Sequence[np.ndarray], prices: np.ndarray, cells: int = CELLS) -> np.ndarray:
    """The positions of least cost, with usages at prices, of all that are at each node those of `chosen` or of one of `others`.

    `prices`: (p, T + 1) running sums of a price per time; gives (p, n) positions, for each row of prices. With tables of more
    than `cells` cells an answer is not the best of all, but none the worse than `chosen`.
    """
    merged = np.tile(chosen, (len(prices), 1))
    differing = np.flatnonzero(np.any([other != chosen for other in others], axis=0))
    if not len(differing):
        return merged
    rivals = np.stack([other[differing] for other in others], axis=1).tolist()
    positions = [np.array([own, *sorted(set(row) - {own})]) for own, row in zip(chosen[differing].tolist(), rivals)]
    small = small_problem(core, chosen, differing, positions, prices)
    picks = eliminate(*small, cells)
    sizes = small[0]
    merged[:, differing] = np.concatenate(positions)[(np.cumsum(sizes) - sizes)[:, None] + picks].T
    return merged


def small_problem(
    core: Core, chosen: np.ndarray, free: np.ndarray, positions: Sequence[np.ndarray], prices: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Some nodes free among a few positions each, all others as chosen; usages at prices, (p, T + 1) running sums.

    Gives (sizes, costs, pairs, tables) as `eliminate` wants them.
    """
    place = np.full(len(chosen), -1)
    place[free] = np.arange(len(free))
    sizes = np.array([len(at) for at in positions], dtype=np.int64)
    begin = np.cumsum(sizes) - sizes
    flat, owner = np.concatenate(positions), np.repeat(np.arange(len(free)), sizes)
    cost = np.tile(core.cost[core.start[free[owner]] + flat], (len(prices), 1))
    counts = np.diff(core.start)

    degree = core.first[free + 1] - core.first[free]
    link = np.repeat(core.first[free] - (np.cumsum(degree) - degree), degree) + np.arange(int(degree.sum()))
    number = np.repeat(np.arange(len(free)), degree)
    theirs = place[core.other[link]]
    at, cell = _spread(begin, sizes, number[theirs < 0])  # links to what stays: a row of costs
    still = link[theirs < 0]
    row = core.pull[still] + chosen[core.other[still]] * counts[free[number[theirs < 0]]]
    cost += np.bincount(at, core.table[row[cell] + flat[at]], len(flat))

    spans = core.span[free + 1] - core.span[free]
    load = np.repeat(core.span[free] - (np.cumsum(spans) - spans), spans) + np.arange(int(spans.sum()))
    factor = prices[:, core.end[load]] - prices[:, core.begin[load]]
    matters = np.flatnonzero(factor.any(axis=0))
    at, cell = _spread(begin, sizes, np.repeat(np.arange(len(free)), spans)[matters])
    used = core.usage[core.load[load[matters[cell]]] + flat[at]]
    for line, price in zip(cost, factor):
        line += np.bincount(at, price[matters[cell]] * used, len(flat))

    pair = np.flatnonzero((theirs >= 0) & (theirs < number))
    first, second = theirs[pair], number[pair]
    count = sizes[first] * sizes[second]
    which = np.repeat(np.arange(len(pair)), count)
    inside = np.arange(len(which)) - (np.cumsum(count) - count)[which]
    row, column = np.divmod(inside, sizes[second][which])
    cells = core.pull[link[pair]][which] + flat[begin[first][which] + row] * counts[free[second]][which]
    tables = core.table[cells + flat[begin[second][which] + column]]
    return sizes, np.ascontiguousarray(cost.T), np.stack([first, second], axis=1), tables


def _spread(begin: np.ndarray, sizes: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All cells of the owners' ranges, one owner's after the other: (the cell, which owner in the list it is of)."""
    width = sizes[owners]
    cell = np.repeat(np.arange(len(owners)), width)
    return begin[owners][cell] + np.arange(len(cell)) - (np.cumsum(width) - width)[cell], cell
