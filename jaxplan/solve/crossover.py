"""Partition crossover: the best parts of two assignments (after Whitley, Hains and Howe, GECCO 2009, for other problems).

Nodes at which two assignments differ fall into components of the graph. What one component takes over changes no cost that
another one's does, so each is judged alone; only the limit on usages ties them together.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from jaxplan.solve.core import Core
from jaxplan.solve.primal import Walk

ROUNDS = 3
"""Times that one pair is crossed: what is taken over may make room for more."""


def cross(walk: Walk, other: np.ndarray) -> bool:
    """Take over from the positions `other` each component that lowers the walk's cost, the best first, while the excess over the
    limit does not grow. Whether any was."""
    changed = False
    for _ in range(ROUNDS):
        if not _cross_once(walk, other):
            break
        changed = True
    return changed


def _cross_once(walk: Walk, other: np.ndarray) -> bool:
    core, mine = walk.core, walk.chosen
    differs = mine != other
    component, gains = _components(core, mine, other, differs)
    better = np.flatnonzero(gains < -1e-12 * abs(walk.cost))
    if not len(better):
        return False
    owner = np.repeat(np.arange(len(mine)), np.diff(core.span))
    more = core.usage[core.load[:-1] + other[owner]] - core.usage[core.load[:-1] + mine[owner]]
    spans = np.flatnonzero(differs[owner] & (more != 0.0))
    spans = spans[np.argsort(component[owner[spans]], kind="stable")]
    borders = np.searchsorted(component[owner[spans]], np.arange(len(gains) + 1))
    usage, excess, taken = walk.usage, walk.excess, np.zeros(len(gains), dtype=bool)
    for c in better[np.argsort(gains[better], kind="stable")].tolist():
        of = spans[borders[c] : borders[c + 1]]
        change = np.zeros(len(usage) + 1)
        np.add.at(change, core.begin[of], more[of])
        np.add.at(change, core.end[of], -more[of])
        trial = usage + np.cumsum(change)[:-1]
        over = float(np.maximum(trial - core.capacity, 0.0).sum())
        if over <= excess:
            usage, excess, taken[c] = trial, over, True
    if not taken.any():
        return False
    before = walk.chosen.copy(), walk.cost, walk.excess
    walk.chosen = np.where(differs & taken[component], other, mine)
    walk.settle()
    if walk.cost < before[1] and walk.excess <= before[2]:
        return True
    walk.chosen = before[0]  # sums of floats in another order
    walk.settle()
    return False


def _components(core: Core, mine: np.ndarray, other: np.ndarray, differs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) component of each node in the graph of those that differ; (components,) the change of cost by each."""
    nodes = len(mine)
    tail, head = differs[core.tail], differs[core.head]
    inner = tail & head
    graph = coo_matrix((np.ones(int(inner.sum())), (core.tail[inner], core.head[inner])), shape=(nodes, nodes))
    count, component = connected_components(graph, directed=False)
    touched = np.flatnonzero(tail | head)
    ends = core.tail[touched], core.head[touched]
    width = np.diff(core.start)[ends[1]]

    def costs(tails: np.ndarray, heads: np.ndarray) -> np.ndarray:
        return core.table[core.cell[touched] + tails * width + heads]

    # where one end stays, `mine` and `other` agree on it
    edges = costs(other[ends[0]], other[ends[1]]) - costs(mine[ends[0]], mine[ends[1]])
    own = core.cost[core.start[:-1] + other] - core.cost[core.start[:-1] + mine]
    place = component[np.where(tail[touched], *ends)]
    gains = np.bincount(component, own, count) + np.bincount(place, edges, count)
    return component, gains
