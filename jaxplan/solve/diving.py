"""Hubs, and diving: a walk's start at which the nodes of many edges are decided one after the other, by the dual.

Some nodes are read all over a program: masks, positions, one scale for all layers. Half of the graph follows each of them, so
walks, which change few nodes at once, stay on the side of a hub on which they begin, and merging, whose tables would grow too
large, leaves it where it is. The dual knows better: what a hub's strategy costs all around it is in the messages. So hubs are
decided in order of their edges, the largest first, each at its least min-marginal, and after each that was not clear the others
are told by a step of the dual.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxplan.solve.compiled import compiled
from jaxplan.solve.core import Core, add
from jaxplan.solve.dual import Dual

HUB, MOST = 16, 100
"""Edges of a hub, at least, and hubs, at most: those of most edges."""
CLEAR = 1e-4
"""A hub whose second strategy costs this share of the bound more is clear: the others need not be told before the next one."""
PASSES = 2
"""Passes before the first hub is decided."""
SETTLING, FIRST_STEP = 12, 1e-3
"""Steps after the last hub is decided, falling geometrically from the first one on."""


def hubs_of(core: Core) -> np.ndarray:
    """The hubs, those of most edges first."""
    edges = np.diff(core.first)
    order = np.argsort(-edges, kind="stable")[:MOST]
    return order[edges[order] >= HUB]


@compiled()
def marginal(core, costs, inbox, message, v, out):
    """What each strategy of v costs with all that its neighbours say, into `out`."""
    count = core.start[v + 1] - core.start[v]
    out[:count] = costs[core.start[v] : core.start[v + 1]]
    for i in range(core.first[v], core.first[v + 1]):
        add(out, message, inbox[i], count)


def keep(dual: Dual, nodes: np.ndarray, positions: np.ndarray, bar: float) -> None:
    """Decide these nodes in the dual, in place, for a position each: what is not chosen costs `bar` more."""
    start = dual.core.start
    cost = dual.core.cost.copy()
    for v, position in zip(nodes.tolist(), positions.tolist()):
        cost[start[v] : start[v + 1]] += bar
        cost[start[v] + position] -= bar
    dual.core = dual.core._replace(cost=cost)


def dive(
    dual: Dual, hubs: np.ndarray, noise: np.ndarray, bar: float, step: float, rng: np.random.Generator, check: Callable[[], None]
) -> None:
    """Decide the hubs in the dual, in place: what is not chosen costs `bar` more. Steps go on along the way, so that multipliers
    follow what hubs use. `noise`: (n,) strategies of a node cost so many exponential variates more. `check` may raise."""
    core = dual.core
    cost = core.cost.copy()
    dual.core = core._replace(cost=cost)
    dual.passes(PASSES)
    scale, out, told = abs(dual.best + dual.offset), np.zeros(int(np.diff(core.start).max())), True
    for v in hubs.tolist():
        if not told:
            dual.ascend(step)
            check()
        begin, end = int(core.start[v]), int(core.start[v + 1])
        marginal(core, dual.costs, dual.inbox, dual.message, v, out)
        chosen = int((out[: end - begin] + noise[v] * rng.standard_exponential(end - begin)).argmin())
        told = bool((np.delete(out[: end - begin], chosen) >= out[chosen] + CLEAR * scale).all())
        cost[begin:end] += bar
        cost[begin + chosen] -= bar
    for last in np.geomspace(FIRST_STEP, step, SETTLING).tolist():
        dual.ascend(last)
