"""The primal: exact dynamic programming on random induced forests, all other nodes fixed.

Usages enter a forest's program at prices: the dual's multipliers, scaled at random, a penalty where the limit is exceeded now,
and cuts added when what came out would exceed it. A result is accepted on its true cost and an exact check of the usages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxplan.solve.compiled import compiled
from jaxplan.solve.core import Core, add, add_scaled, argmin_sum, core_cost, core_usage, lowest

LARGEST = 300
"""Nodes of the largest forest."""
CUTS = 6
"""Times at which one forest's usage can be priced besides the given prices."""


class Work(NamedTuple):
    """Memory of the kernel: per node, per place in the forest, per strategy of it, per time."""

    stamp: np.ndarray
    touched: np.ndarray
    touches: np.ndarray
    frontier: np.ndarray
    entry: np.ndarray
    order: np.ndarray
    parent: np.ndarray
    up: np.ndarray
    slot: np.ndarray
    base: np.ndarray
    priced: np.ndarray
    place: np.ndarray
    out: np.ndarray
    pick: np.ndarray
    change: np.ndarray
    cut_time: np.ndarray
    cut_price: np.ndarray
    counters: np.ndarray


def work_of(core: Core) -> Work:
    """Enough of it for any forest of LARGEST nodes."""
    nodes, times = len(core.start) - 1, len(core.capacity)
    counts = np.sort(np.diff(core.start))[::-1]
    widest, cells = int(counts.max(initial=1)), int(counts[:LARGEST].sum()) + 1
    longs = {name: np.zeros(nodes + 1, dtype=np.int64) for name in ("stamp", "touched", "touches", "place")}
    forest = {name: np.zeros(LARGEST + 1, dtype=np.int64) for name in ("order", "parent", "up", "slot", "pick")}
    return Work(
        **longs, **forest,
        frontier=np.zeros(len(core.other) + 1, dtype=np.int64), entry=np.zeros(len(core.other) + 1, dtype=np.int64),
        base=np.zeros(cells), priced=np.zeros(cells), out=np.zeros(widest), change=np.zeros(times + 1),
        cut_time=np.zeros(CUTS, dtype=np.int64), cut_price=np.zeros(CUTS), counters=np.zeros(3, dtype=np.int64),
    )  # fmt: skip


@compiled()
def grow(core, work, number, size, joins, randoms, at):
    """Fill `work.order` with a random induced forest of up to `size` nodes; each has one neighbour before it at most.

    `joins`: how likely the next node touches the forest where one can; gives (nodes, position in `randoms`).
    """
    nodes = len(core.start) - 1
    placed, waiting, misses = 0, 0, 0
    while placed < size and misses < 8:
        at += 2
        if at + 2 >= len(randoms):
            at = 0
        if waiting and randoms[at] < joins:
            pick = int(randoms[at + 1] * waiting)
            v, up = work.frontier[pick], work.entry[pick]
            waiting -= 1
            work.frontier[pick], work.entry[pick] = work.frontier[waiting], work.entry[waiting]
            if work.stamp[v] == number or work.touches[v] != 1:
                continue
            work.parent[placed], work.up[placed] = work.place[core.other[up]], up
        else:
            v = int(randoms[at + 1] * nodes)
            if work.stamp[v] == number or work.touched[v] == number:
                misses += 1
                continue
            work.parent[placed], work.up[placed] = -1, -1
        work.stamp[v], work.place[v], work.order[placed] = number, placed, v
        placed += 1
        for i in range(core.first[v], core.first[v + 1]):
            w = core.other[i]
            if work.touched[w] != number:
                work.touched[w], work.touches[w] = number, 1
                work.frontier[waiting], work.entry[waiting] = w, core.mirror[i]
                waiting += 1
            else:
                work.touches[w] += 1
    return placed, at


@compiled()
def condition(core, work, number, placed, chosen):
    """Node costs of the forest with everything else fixed, into `work.base`."""
    cells = 0
    for k in range(placed):
        v = work.order[k]
        count = core.start[v + 1] - core.start[v]
        work.slot[k] = cells
        base = work.base[cells : cells + count]
        base[:] = core.cost[core.start[v] : core.start[v + 1]]
        for i in range(core.first[v], core.first[v + 1]):
            w = core.other[i]
            if work.stamp[w] != number:
                add(base, core.table, core.pull[i] + chosen[w] * count, count)
        cells += count
    work.slot[placed] = cells


@compiled()
def decide(core, work, placed, prices, scale, penalties, cuts, noise, randoms, at):
    """The forest's best choice at prices, into `work.pick`: `scale` times `prices`, `penalties` and the first `cuts` cuts.

    `noise`: each strategy costs so many exponential variates more, from `at` in `randoms` on.
    """
    work.priced[: work.slot[placed]] = work.base[: work.slot[placed]]
    if noise > 0.0:
        for i in range(work.slot[placed]):
            at += 1
            if at >= len(randoms):
                at = 0
            work.priced[i] -= noise * np.log(1.0 - randoms[at])
    for k in range(placed):
        v = work.order[k]
        count = core.start[v + 1] - core.start[v]
        for i in range(core.span[v], core.span[v + 1]):
            begin, end = core.begin[i], core.end[i]
            factor = scale * (prices[end] - prices[begin]) + penalties[end] - penalties[begin]
            for c in range(cuts):
                if begin <= work.cut_time[c] < end:
                    factor += work.cut_price[c]
            if factor != 0.0:
                add_scaled(work.priced[work.slot[k] :], core.usage, core.load[i], count, factor)
    for k in range(placed - 1, -1, -1):
        p = work.parent[k]
        if p >= 0:
            rows, columns = work.slot[k + 1] - work.slot[k], work.slot[p + 1] - work.slot[p]
            lowest(work.priced[work.slot[k] :], core.table, core.push[work.up[k]], rows, columns, work.out)
            add(work.priced[work.slot[p] :], work.out, 0, columns)
    for k in range(placed):
        mine = work.priced[work.slot[k] : work.slot[k + 1]]
        p = work.parent[k]
        if p < 0:
            work.pick[k] = mine.argmin()
        else:
            work.pick[k] = argmin_sum(mine, core.table, core.pull[work.up[k]] + work.pick[p] * len(mine), len(mine))


@compiled()
def true_change(core, work, placed, chosen):
    """(how much the cost changes by `work.pick`, how many nodes do)."""
    delta, moved = 0.0, 0
    for k in range(placed):
        new, old = work.pick[k], chosen[work.order[k]]
        moved += new != old
        delta += work.base[work.slot[k] + new] - work.base[work.slot[k] + old]
        p = work.parent[k]
        if p >= 0:
            cell, count = core.pull[work.up[k]], work.slot[k + 1] - work.slot[k]
            delta += core.table[cell + work.pick[p] * count + new]
            delta -= core.table[cell + chosen[work.order[p]] * count + old]
    return delta, moved


@compiled()
def usage_change(core, work, placed, chosen):
    """Put the change of usage, as differences over time, into `work.change`; gives the range of times touched."""
    low, high = len(core.capacity), 0
    for k in range(placed):
        v = work.order[k]
        new, old = work.pick[k], chosen[v]
        if new == old:
            continue
        for i in range(core.span[v], core.span[v + 1]):
            more = core.usage[core.load[i] + new] - core.usage[core.load[i] + old]
            if more != 0.0:
                begin, end = core.begin[i], core.end[i]
                work.change[begin] += more
                work.change[end] -= more
                low, high = min(low, begin), max(high, end)
    return low, high


@compiled()
def overflow_change(core, work, usage, low, high, prices):
    """(change of the summed excess over the limit, the time where it grows most or -1, the usage's growth there, the change of
    usage at prices)."""
    total, worst, at, growth, level, worth = 0.0, 0.0, -1, 0.0, 0.0, 0.0
    for t in range(low, high):
        level += work.change[t]
        if level != 0.0:
            worth += level * (prices[t + 1] - prices[t])
            before = max(0.0, usage[t] - core.capacity[t])
            more = max(0.0, usage[t] + level - core.capacity[t]) - before
            total += more
            if more > worst:
                worst, at, growth = more, t, level
    return total, at, growth, worth


@compiled()
def penalise(core, usage, penalty, penalties):
    """Running sums of the penalty over the times at which the limit is exceeded."""
    penalties[0] = 0.0
    for t in range(len(usage)):
        penalties[t + 1] = penalties[t] + (penalty if usage[t] > core.capacity[t] else 0.0)


@compiled()
def improve(core, work, chosen, usage, prices, weight, penalty, penalties, moves, size, joins, heat, noise, randoms):
    """Try `moves` forests; `chosen` and `usage` follow what is accepted. Gives (change of cost, change of summed excess).

    Accepted is what does not raise cost + weight * usage at prices + penalty * excess by more than `heat` times an exponential
    variate.
    """
    at = int(randoms[0] * len(randoms))
    cost, over = 0.0, 0.0
    for _ in range(moves):
        work.counters[0] += 1
        number = work.counters[0]
        at += 4
        if at + 4 >= len(randoms):
            at = 0
        scale = 0.0 if randoms[at] < 0.5 else 1.5 * randoms[at + 1]
        wanted = int(np.exp(randoms[at + 2] * np.log(size + 1.0)))
        allowed = -heat * np.log(1.0 - randoms[at + 3])
        placed, at = grow(core, work, number, wanted, joins, randoms, at)
        condition(core, work, number, placed, chosen)
        cuts = 0
        blur = noise * randoms[at] if randoms[at + 1] < 0.5 else 0.0
        while True:
            decide(core, work, placed, prices, scale, penalties, cuts, blur, randoms, at)
            delta, moved = true_change(core, work, placed, chosen)
            if moved == 0:
                break
            low, high = usage_change(core, work, placed, chosen)
            excess, worst, growth, worth = overflow_change(core, work, usage, low, high, prices)
            merit = delta + weight * worth + penalty * excess
            if merit <= allowed:
                level = 0.0
                for t in range(low, high):
                    level += work.change[t]
                    usage[t] += level
                work.change[low : high + 1] = 0.0
                for k in range(placed):
                    chosen[work.order[k]] = work.pick[k]
                cost += delta
                over += excess
                work.counters[1] += 1
                if penalties[-1] > 0.0:
                    penalise(core, usage, penalty, penalties)
                break
            gain = -delta
            level = 0.0
            for t in range(low, high):
                level += work.change[t]
                gain -= level * (scale * (prices[t + 1] - prices[t]) + penalties[t + 1] - penalties[t])
                for c in range(cuts):
                    if work.cut_time[c] == t:
                        gain -= level * work.cut_price[c]
            work.change[low : high + 1] = 0.0
            if cuts == CUTS or worst < 0 or delta + weight * worth >= 0.0 or gain <= 0.0:
                break
            work.cut_time[cuts], work.cut_price[cuts] = worst, 1.05 * gain / growth
            cuts += 1
    return cost, over


@dataclass
class Walk:
    """An assignment that moves: positions, usages, cost, summed excess over the limit."""

    core: Core
    chosen: np.ndarray

    def __post_init__(self) -> None:
        self.work = work_of(self.core)
        self.chosen = np.array(self.chosen, dtype=np.int64)
        self.penalties = np.zeros(len(self.core.capacity) + 1)
        self.settle()

    def settle(self) -> None:
        """Compute cost and usages afresh."""
        self.cost, self.usage = core_cost(self.core, self.chosen), core_usage(self.core, self.chosen)
        self.excess = float(np.maximum(self.usage - self.core.capacity, 0.0).sum())

    def move(
        self,
        rng: np.random.Generator,
        multipliers: np.ndarray,
        penalty: float,
        moves: int,
        size: int,
        joins: float,
        heat: float,
        noise: float = 0.0,
        weight: float = 0.0,
    ) -> None:
        """Try so many forests of up to `size` nodes, at most LARGEST."""
        prices = np.concatenate([[0.0], np.cumsum(multipliers)])
        penalise(self.core, self.usage, penalty, self.penalties)
        improve(
            self.core, self.work, self.chosen, self.usage, prices, weight, penalty, self.penalties,
            moves, min(size, LARGEST), joins, heat, noise, rng.random(65536),
        )  # fmt: skip
        self.settle()

    @property
    def feasible(self) -> bool:
        """Within the limit at every time, no impossible pair."""
        return self.excess == 0.0 and self.cost < 1e17
