"""The dual: sequential tree-reweighted message passing (Kolmogorov, TPAMI 2006), with a multiplier per critical time.

Relaxing the limit at time t with a multiplier p[t] >= 0 adds p[t] * usage to the strategies alive there; for any messages and
any multipliers, the bound on the relaxed problem less p . capacity is a lower bound of every feasible cost.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np

from jaxplan.solve.compiled import compiled
from jaxplan.solve.core import Core, add, add_scaled, argmin_sum, lowest

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
def sweep(core, costs, inbox, message, forward, scratch, chosen):
    """One pass over all nodes, forward or back; updates the messages, fills `chosen` by conditioning, gives the bound.

    Message that comes in by link i: `message[inbox[i]:]`. The graph is covered by chains of rising nodes, max(edges to
    earlier, edges to later nodes) through each; the bound is the sum of their least costs.
    """
    bound = 0.0
    nodes = len(core.start) - 1
    total, rounded, values = scratch[0], scratch[1], scratch[2]
    for step in range(nodes):
        v = step if forward else nodes - 1 - step
        count = core.start[v + 1] - core.start[v]
        begin, end = core.first[v], core.first[v + 1]
        border = begin
        while border < end and core.other[border] < v:
            border += 1
        total[:count] = costs[core.start[v] : core.start[v + 1]]
        rounded[:count] = total[:count]
        for i in range(begin, end):
            add(total, message, inbox[i], count)
            if (i < border) == forward:
                add(rounded, core.table, core.pull[i] + chosen[core.other[i]] * count, count)
            else:
                add(rounded, message, inbox[i], count)
        chosen[v] = rounded[:count].argmin()
        earlier, later = border - begin, end - border
        chains = max(1, earlier, later)
        share = 1.0 / chains
        bound += (chains - (later if forward else earlier)) * share * total[:count].min()
        for i in range(border if forward else begin, end if forward else border):
            w = core.other[i]
            size = core.start[w + 1] - core.start[w]
            at = inbox[core.mirror[i]]
            out = message[at : at + size]
            values[:count] = 0.0
            add_scaled(values, total, 0, count, share)
            add_scaled(values, message, inbox[i], count, -1.0)
            lowest(values, core.table, core.push[i], count, size, out)
            least = out.min()
            bound += least
            out -= least
    return bound


@compiled()
def trace(core, costs, inbox, message, scratch, handed, change):
    """Mean usage of the chains' own best choices after a backward sweep: the bound's subgradient, as differences in time.

    The k-th edge from an earlier node and the k-th to a later one are on one chain; `handed[i]`: its choice at the node that
    link i leads to.
    """
    total, values = scratch[0], scratch[1]
    change[:] = 0.0
    for v in range(len(core.start) - 1):
        count = core.start[v + 1] - core.start[v]
        total[:count] = costs[core.start[v] : core.start[v + 1]]
        begin, end = core.first[v], core.first[v + 1]
        border = begin
        for i in range(begin, end):
            border += core.other[i] < v
            add(total, message, inbox[i], count)
        chains = max(1, border - begin, end - border)
        share = 1.0 / chains
        free = total[:count].argmin()
        for k in range(chains):
            pick = free
            if begin + k < border:
                values[:count] = 0.0
                add_scaled(values, total, 0, count, share)
                add_scaled(values, message, inbox[begin + k], count, -1.0)
                pick = argmin_sum(values, core.table, core.pull[begin + k] + handed[begin + k] * count, count)
            if border + k < end:
                handed[core.mirror[border + k]] = pick
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
    swept: int = 0  # sweeps so far

    def __post_init__(self) -> None:
        core = self.core
        counts = np.diff(core.start)
        self.inbox = np.concatenate([[0], np.cumsum(np.repeat(counts, np.diff(core.first)))]).astype(np.int64)
        self.message = np.zeros(self.inbox[-1])
        self.multipliers = np.zeros(len(core.capacity))
        self.best_multipliers = self.multipliers
        self.costs = core.cost.copy()
        widest = int(counts.max(initial=1))
        self.scratch = np.zeros((3, widest))
        self.handed = np.zeros(len(core.other), dtype=np.int64)
        self.active = np.zeros(len(core.capacity), dtype=bool)
        self.direction: np.ndarray | None = None

    def copied(self) -> Dual:
        """As it stands now, with memory of its own: for others to read while this one goes on."""
        twin = copy.copy(self)
        for name in ("message", "costs", "scratch", "handed", "active"):
            setattr(twin, name, getattr(self, name).copy())
        return twin

    def price(self) -> None:
        """Let usages cost what they do at the multipliers."""
        relaxed_costs(self.core, np.concatenate([[0.0], np.cumsum(self.multipliers)]), self.costs)

    def passes(self, count: int) -> tuple[float, np.ndarray, np.ndarray]:
        """Forward and backward passes at the multipliers: (bound, positions by conditioning, mean usage of the chains)."""
        core = self.core
        self.price()
        messages = (self.inbox, self.message)
        chosen = np.zeros(len(core.start) - 1, dtype=np.int64)
        bound = -np.inf
        self.swept += 2 * count
        for number in range(2 * count):
            bound = sweep(core, self.costs, *messages, number % 2 == 0, self.scratch, chosen)
        change = np.zeros(len(core.capacity) + 1)
        trace(core, self.costs, *messages, self.scratch, self.handed, change)
        bound -= float(self.multipliers @ core.capacity)
        if bound > self.best:
            self.best, self.best_multipliers = bound, self.multipliers.copy()
        return bound, chosen, np.cumsum(change)[:-1]

    def rounded(self, multipliers: np.ndarray, count: int, noise: float, rng: np.random.Generator) -> np.ndarray:
        """Positions by conditioning after a few passes at other multipliers, with strategies that cost `noise` times an
        exponential variate more. The messages and the bound stay as they are."""
        core = self.core
        costs, message, chosen = self.costs.copy(), self.message.copy(), np.zeros(len(core.start) - 1, dtype=np.int64)
        relaxed_costs(core, np.concatenate([[0.0], np.cumsum(multipliers)]), costs)
        costs += noise * rng.standard_exponential(len(costs))
        scratch = np.zeros_like(self.scratch)  # several workers may read one dual at once
        for number in range(2 * count):
            sweep(core, costs, self.inbox, message, number % 2 == 0, scratch, chosen)
        return chosen

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
