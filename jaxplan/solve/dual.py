"""The dual: sequential tree-reweighted message passing (Kolmogorov, TPAMI 2006), with a multiplier per critical time.

Relaxing the limit at time t with a multiplier p[t] >= 0 adds p[t] * usage to the strategies alive there; for any messages and
any multipliers, the bound on the relaxed problem less p . capacity is a lower bound of every feasible cost.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from jaxplan.solve.compiled import compiled
from jaxplan.solve.core import Core, add_fixed, add_scaled, lowest

SMOOTHING = 0.8
"""How much of the direction of ascent is kept from one step to the next."""
NEAR = 0.1
"""Excess, as a share of the capacity, below which steps shrink with it."""
FRESH = 2
"""Times that may get a multiplier at each step."""


@compiled()
def relaxed_costs(core, prices, out):
    """Node costs with usages at their prices, into `out`; `prices`: (T + 1,) running sums of the multipliers."""
    out[:] = core.cost
    for v in range(len(core.start) - 1):
        count = core.start[v + 1] - core.start[v]
        for i in range(core.span[v], core.span[v + 1]):
            factor = prices[core.end[i]] - prices[core.begin[i]]
            if factor != 0.0:
                add_scaled(out[core.start[v] :], core.usage, core.load[i], count, factor)


@compiled()
def sweep(core, costs, to_head, to_tail, head_at, tail_at, forward, scratch, where, chosen):
    """One pass over all nodes, forward or back; updates the messages, fills `chosen` by conditioning, gives the bound.

    Message of edge e to its head: `to_head[head_at[e]:]`; to its tail: `to_tail[tail_at[e]:]`. The graph is covered by chains
    of rising nodes, max(edges to earlier, edges to later nodes) through each; the bound is the sum of their least costs.
    """
    bound = 0.0
    nodes = len(core.start) - 1
    total, rounded, values, out = scratch[0], scratch[1], scratch[2], scratch[3]
    for step in range(nodes):
        v = step if forward else nodes - 1 - step
        count = core.start[v + 1] - core.start[v]
        total[:count] = costs[core.start[v] : core.start[v + 1]]
        rounded[:count] = total[:count]
        earlier = 0
        for at in range(core.first[v], core.first[v + 1]):
            e = core.link[at]
            if core.head[e] == v:
                earlier += 1
                add_scaled(total, to_head, head_at[e], count, 1.0)
            else:
                add_scaled(total, to_tail, tail_at[e], count, 1.0)
            other = core.tail[e] if core.head[e] == v else core.head[e]
            if (other < v) == forward:
                columns = core.start[core.head[e] + 1] - core.start[core.head[e]]
                rows = core.start[core.tail[e] + 1] - core.start[core.tail[e]]
                add_fixed(rounded, core.table, core.cell[e], rows, columns, core.tail[e] == v, chosen[other])
            elif core.head[e] == v:
                add_scaled(rounded, to_head, head_at[e], count, 1.0)
            else:
                add_scaled(rounded, to_tail, tail_at[e], count, 1.0)
        chosen[v] = rounded[:count].argmin()
        later = core.first[v + 1] - core.first[v] - earlier
        chains = max(1, earlier, later)
        share = 1.0 / chains
        bound += (chains - (later if forward else earlier)) * share * total[:count].min()
        for at in range(core.first[v], core.first[v + 1]):
            e = core.link[at]
            from_tail = core.tail[e] == v
            if from_tail != forward:
                continue
            columns = core.start[core.head[e] + 1] - core.start[core.head[e]]
            rows = core.start[core.tail[e] + 1] - core.start[core.tail[e]]
            values[:count] = 0.0
            add_scaled(values, total, 0, count, share)
            if from_tail:
                add_scaled(values, to_tail, tail_at[e], count, -1.0)
            else:
                add_scaled(values, to_head, head_at[e], count, -1.0)
            lowest(values, core.table, core.cell[e], rows, columns, from_tail, out, where)
            size = columns if from_tail else rows
            least = out[:size].min()
            bound += least
            if from_tail:
                to_head[head_at[e] : head_at[e] + size] = out[:size] - least
            else:
                to_tail[tail_at[e] : tail_at[e] + size] = out[:size] - least
    return bound


@compiled()
def trace(core, costs, to_head, to_tail, head_at, tail_at, scratch, at_tail, change):
    """Mean usage of the chains' own best choices after a backward sweep: the bound's subgradient, as differences in time.

    The k-th edge from an earlier node and the k-th to a later one are on one chain; `at_tail[e]`: its choice at e's tail.
    """
    total, values = scratch[0], scratch[1]
    change[:] = 0.0
    for v in range(len(core.start) - 1):
        count = core.start[v + 1] - core.start[v]
        total[:count] = costs[core.start[v] : core.start[v + 1]]
        earlier = 0
        begin, end = core.first[v], core.first[v + 1]
        for at in range(begin, end):
            e = core.link[at]
            if core.head[e] == v:
                earlier += 1
                add_scaled(total, to_head, head_at[e], count, 1.0)
            else:
                add_scaled(total, to_tail, tail_at[e], count, 1.0)
        chains = max(1, earlier, end - begin - earlier)
        share = 1.0 / chains
        free = total[:count].argmin()
        into, out = begin, begin
        for _ in range(chains):
            while into < end and core.head[core.link[into]] != v:
                into += 1
            while out < end and core.tail[core.link[out]] != v:
                out += 1
            pick = free
            if into < end:
                e = core.link[into]
                u = core.tail[e]
                values[:count] = 0.0
                add_scaled(values, total, 0, count, share)
                add_scaled(values, to_head, head_at[e], count, -1.0)
                add_fixed(values, core.table, core.cell[e], core.start[u + 1] - core.start[u], count, False, at_tail[e])
                pick = values[:count].argmin()
                into += 1
            if out < end:
                at_tail[core.link[out]] = pick
                out += 1
            for i in range(core.span[v], core.span[v + 1]):
                used = share * core.usage[core.load[i] + pick]
                change[core.begin[i]] += used
                change[core.end[i]] -= used


@dataclass
class Dual:
    """The state of the dual: messages, multipliers, and the best bound with its multipliers."""

    core: Core
    offset: float = 0.0  # of costs: what the reductions have put aside
    multipliers: np.ndarray = field(init=False)
    best: float = -np.inf
    best_multipliers: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        core = self.core
        counts = np.diff(core.start)
        self.head_at = np.concatenate([[0], np.cumsum(counts[core.head])]).astype(np.int64)
        self.tail_at = np.concatenate([[0], np.cumsum(counts[core.tail])]).astype(np.int64)
        self.to_head, self.to_tail = np.zeros(self.head_at[-1]), np.zeros(self.tail_at[-1])
        self.multipliers = np.zeros(len(core.capacity))
        self.best_multipliers = self.multipliers
        self.costs = core.cost.copy()
        widest = int(counts.max(initial=1))
        self.scratch, self.where = np.zeros((4, widest)), np.zeros(widest, dtype=np.int64)
        self.at_tail = np.zeros(len(core.tail), dtype=np.int64)
        self.active = np.zeros(len(core.capacity), dtype=bool)
        self.direction: np.ndarray | None = None

    def passes(self, count: int) -> tuple[float, np.ndarray, np.ndarray]:
        """Forward and backward passes at the multipliers: (bound, positions by conditioning, mean usage of the chains)."""
        core = self.core
        prices = np.concatenate([[0.0], np.cumsum(self.multipliers)])
        relaxed_costs(core, prices, self.costs)
        messages = (self.to_head, self.to_tail, self.head_at, self.tail_at)
        chosen = np.zeros(len(core.start) - 1, dtype=np.int64)
        bound = -np.inf
        for number in range(2 * count):
            bound = sweep(core, self.costs, *messages, number % 2 == 0, self.scratch, self.where, chosen)
        change = np.zeros(len(core.capacity) + 1)
        trace(core, self.costs, *messages, self.scratch, self.at_tail, change)
        bound -= float(self.multipliers @ core.capacity)
        if bound > self.best:
            self.best, self.best_multipliers = bound, self.multipliers.copy()
        return bound, chosen, np.cumsum(change)[:-1]

    def ascend(self, step: float) -> tuple[float, np.ndarray]:
        """A pass each way, then a move of the multipliers along the smoothed excess of usage: (bound, positions by conditioning).

        `step`: the gain of the bound that the move would bring if the bound were linear, as a share of the bound. Messages are
        not waited for: steps that shrink steadily let them follow, which serves the bound more than comparing iterates would.
        """
        core = self.core
        bound, chosen, usage = self.passes(1)
        if not len(core.capacity):
            return bound, chosen
        excess = usage - core.capacity
        self.direction = excess if self.direction is None else SMOOTHING * self.direction + (1 - SMOOTHING) * excess
        self.join()
        slope = np.where(self.active, self.direction, 0.0)
        slope[(slope < 0) & (self.multipliers == 0)] = 0.0
        if self.active.any():
            least = NEAR * core.capacity[self.active].mean()  # below it a longer step gains nothing
            length = max(float(slope @ slope), least * least)
            if length > 0:
                self.multipliers = np.maximum(0.0, self.multipliers + step * abs(bound + self.offset) / length * slope)
        return bound, chosen

    def join(self) -> None:
        """Let a few more times have a multiplier: those most exceeded on average, not near to one another."""
        assert self.direction is not None
        over = np.where(self.active, 0.0, self.direction / np.maximum(self.core.capacity, 1e-300))
        apart = len(over) // 50
        for _ in range(FRESH):
            worst = int(over.argmax())
            if over[worst] <= 0.02:
                break
            self.active[worst] = True
            over[max(0, worst - apart) : worst + apart + 1] = 0.0
