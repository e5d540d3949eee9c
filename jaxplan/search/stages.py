"""Stages with a data- and a tensor-parallel degree each, after Piper (Tarnawski, Narayanan and Phanishayee, NeurIPS 2021)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from jaxplan.problem import ROUNDING, Assignment, Problem, evaluate, peak, within_limit
from jaxplan.reduce import ILLEGAL, Pricer, Tables, fold
from jaxplan.search.elimination import min_fill_order, option_weights, solve
from jaxplan.search.moves import FINE_ROUNDS
from jaxplan.search.tofu import line

STAGES = 8
"""The most stages that a chain is cut into, unless told."""
PLACES = 64
"""Layers of the chain: runs of nodes between which it may be cut."""
CLASSES = 4
"""Classes of options that are tried for what data parallelism is."""
ATTEMPTS = 24
"""Prices of usage that are tried where there is a limit."""


class Stage(NamedTuple):
    """A run of the chain: how many nodes it has, and per axis whether it counts to its data- or its tensor-parallel degree."""

    nodes: int
    roles: tuple[str, ...]


def piper_stages(problem: Problem, *, stages: int = STAGES) -> Assignment:
    """The chain of nodes is cut into stages, at most so many; each uses every mesh axis for data or for tensor parallelism.

    As published: stages are found by dynamic programming over the cuts of the chain and over the degrees of each; a layer of a
    stage takes the best tensor-parallel configuration of the stage's degree; a cap on memory holds. Prices are the problem's
    (from symbolic costs, where the paper profiles). Departs from the paper in this:
    - A stage takes no devices to itself. A problem has no time along which stages overlap, so each of them has the whole mesh,
      one after the other, and what is least is the sum of all prices, where the paper makes the slowest stage fastest. Pipelines
      that overlap are `jaxplan.pipeline`'s; `jaxplan.search.piper.piper` is the paper's program on tables per layer.
    - Degrees are products of axes: 2 ** axes pairs of them.
    - Data parallelism is read off the prices, for a problem names no dimension: options that meet at no price along edges are a
      class, and the class that is cheapest if nothing else splits along the axis is data parallelism (the batch's, as a rule).
      Nodes outside of it stay whole. Tensor parallelism is every other option, one axis after the other by elimination. Of
      look-alikes (`fold`) all take one configuration.
    - The chain is the graph arranged as a line (as in `tofu`: forward and backward operators come together), at most `PLACES`
      runs of nodes, where the paper takes graphs by their downsets. Where an edge reaches back beyond the stage before, the
      dynamic program takes what lies there to be in that stage; the best of each number of stages is then priced as it is.
    - The paper's cap is one per stage. Here usages have lifetimes: those at the worst times get a price, which rises until the
      limit holds and is then halved down, and cuts are shifted. Raises ValueError where none of this makes it hold.

    `notes["stages"]`: the `Stage`s, in order of the chain.
    """
    if not problem.nodes:
        return Assignment(np.zeros((0, len(problem.axes)), dtype=np.int64), 0.0, None, {"stages": ()})
    chain = _Chain(problem, stages)
    if problem.limit < math.inf and problem.usages:
        return _within(chain)
    found = chain.staged(0.0, ())
    if not found:
        raise ValueError("no legal assignment in stages was found")
    return min(found, key=lambda one: one.seconds)


def _within(chain: _Chain) -> Assignment:
    """The cheapest assignment found within the limit, over prices of usage at the times that were the worst so far."""
    problem = chain.problem
    best: Assignment | None = None
    nearest = peak(problem, np.zeros((len(problem.nodes), len(problem.axes)), dtype=np.int64))
    times: tuple[int, ...] = ()
    low, high, price = 0.0, math.inf, 0.0
    for _ in range(ATTEMPTS):
        found = chain.staged(price, times)
        fitting = [one for one in found if within_limit(problem, one.choices)]
        if fitting:
            cheapest = min(fitting, key=lambda one: one.seconds)
            best = cheapest if best is None or cheapest.seconds < best.seconds else best
            high = price
        else:
            worst = [peak(problem, one.choices) for one in found]
            nearest = min([nearest, *worst], key=lambda one: one.usage)
            times = tuple(sorted({*times, *[one.begin for one in worst]}))
            low = price
        if high - low <= 1e-3 * high < math.inf:
            break
        price = 0.5 * (low + high) if high < math.inf else max(1e-3 * chain.seconds / (problem.limit or 1.0), 4 * price)
    if best is None:
        raise ValueError(
            f"no legal assignment in stages was found within the limit of {problem.limit:g}: the nearest uses {nearest.usage:g} "
            f"in [{nearest.begin}, {nearest.end}), {nearest.usage - problem.limit:g} too much"
        )
    return best


@dataclass(frozen=True)
class _Proposal:
    """Every node's choice if the whole chain were one stage: `roles`, per axis."""

    roles: tuple[str, ...]
    choices: np.ndarray


class _Chain:
    """A problem as a chain, and its stages at prices of usage."""

    def __init__(self, problem: Problem, stages: int) -> None:
        if stages < 1:
            raise ValueError(f"{stages} stages: at least one is needed")
        self.problem, self.stages = problem, stages
        self.folded, self.expand = fold(problem, FINE_ROUNDS)
        self.pricer = Pricer(problem)
        self.inner = Pricer(self.folded, self.pricer)
        used = [a for a in range(len(problem.axes)) if any(node.options[a] > 1 for node in problem.nodes)]
        self.axes = [a for a in (problem.axis_order or range(len(problem.axes))) if a in used]
        self.line = np.array(line(problem), dtype=np.int64)
        self.block = self._blocks()
        still = np.zeros((len(self.folded.nodes), len(problem.axes)), dtype=np.int64)
        self.data = {axis: self._data_class(axis, still) for axis in self.axes}
        whole = evaluate(problem, np.zeros((len(problem.nodes), len(problem.axes)), dtype=np.int64))
        self.seconds = whole if np.isfinite(whole) and whole > 0 else 1.0

    def _blocks(self) -> np.ndarray:
        """(nodes,) the run that each node is in: between the places of the line that the fewest edges cross."""
        count = len(self.line)
        place = np.empty(count, dtype=np.int64)
        place[self.line] = np.arange(count)
        if count <= PLACES:
            return place
        crossing = np.zeros(count + 1, dtype=np.int64)
        for edge in self.problem.edges:
            ends = sorted((int(place[edge.tail]), int(place[edge.head])))
            crossing[ends[0] + 1] += 1
            crossing[ends[1] + 1] -= 1
        crossing = np.cumsum(crossing)
        windows = np.linspace(1, count, PLACES).astype(np.int64)
        cuts = [a + int(crossing[a:b].argmin()) for a, b in itertools.pairwise(windows)]
        return np.searchsorted(np.array(cuts), place, side="right")

    def _data_class(self, axis: int, still: np.ndarray) -> list[np.ndarray]:
        """Per folded node, the options along an axis that are data parallelism."""
        tables, _ = self.inner.along((axis,), still)
        counts = [len(cost) for cost in tables.costs]
        start = np.cumsum([0, *counts])
        tails, heads = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for (i, j), matrix in tables.pairs.items():
            free = np.argwhere(matrix[1:, 1:] == 0.0) + 1
            tails.append(start[i] + free[:, 0])
            heads.append(start[j] + free[:, 1])
        tail, head = np.concatenate(tails), np.concatenate(heads)
        graph = sparse.coo_matrix((np.ones(len(tail)), (tail, head)), (int(start[-1]), int(start[-1])))
        _, labels = connected_components(graph, directed=False)
        work = np.zeros(labels.max() + 1)
        for v, cost in enumerate(tables.costs):
            mine = np.unique(labels[start[v] + 1 : start[v + 1]])
            work[mine] += float(cost[0]) if cost[0] < ILLEGAL else 0.0
        best, least = [np.zeros(0, dtype=np.int64) for _ in counts], math.inf
        for label in np.argsort(-work, kind="stable")[:CLASSES]:
            members = [1 + np.flatnonzero(labels[start[v] + 1 : start[v + 1]] == label) for v in range(len(counts))]
            options = _solved(tables, [np.concatenate([[0], some]) for some in members])
            price = tables.price(options)
            if price < least:
                best, least = members, price
        return best

    def _proposals(self, price: float, times: Sequence[int]) -> Iterator[_Proposal]:
        """The whole chain as one stage, in every division of the axes between data and tensor parallelism."""
        shape = (len(self.folded.nodes), len(self.problem.axes))
        open_ends = [({}, np.zeros(shape, dtype=np.int64))]
        for axis in self.axes:
            longer = []
            for roles, choices in open_ends:
                tables, rows = self.inner.along((axis,), choices)
                tables = Tables(_charged(self.folded, tables.costs, rows, price, times), tables.pairs)
                for role in ("data", "tensor"):
                    allowed = [
                        _legal(cost, np.concatenate([[0], some]) if role == "data" else np.setdiff1d(np.arange(len(cost)), some))
                        for cost, some in zip(tables.costs, self.data[axis], strict=True)
                    ]
                    taken = choices.copy()
                    taken[:, axis] = _solved(tables, allowed)
                    longer.append(({**roles, axis: role}, taken))
            open_ends = longer
        for roles, choices in open_ends:
            yield _Proposal(tuple([roles.get(a, "unused") for a in range(shape[1])]), self.expand(choices))

    def staged(self, price: float, times: Sequence[int]) -> list[Assignment]:
        """For every number of stages the best that the dynamic program finds, usages at these times at a price, if it is legal;
        where there is a limit, also with cuts shifted so that it holds."""
        proposals = list(self._proposals(price, times))
        choices = np.stack([one.choices for one in proposals], axis=1)
        tables = self.pricer.among(list(choices))
        inside, between = self._sums(_charged(self.problem, tables.costs, list(choices), price, times), tables.pairs)
        cut = list(_cut(inside, between, self.stages))
        if self.problem.limit < math.inf and self.problem.usages:
            inside = self._sums(tables.costs, {})[0]
            levels = self._levels(choices)
            cut += [_shifted(inside, between, levels, self.problem.limit, *one) for one in cut]
        found = []
        for cuts, options in cut:
            chosen = choices[np.arange(len(choices)), np.repeat(options, np.diff(cuts))[self.block]]
            sizes = np.diff(np.searchsorted(np.sort(self.block), cuts))
            runs = tuple([Stage(int(n), proposals[o].roles) for n, o in zip(sizes, options, strict=True)])
            found.append(Assignment(chosen, evaluate(self.problem, chosen), None, {"stages": runs}))
        return [one for one in found if np.isfinite(one.seconds)]

    def _sums(
        self, costs: Sequence[np.ndarray], pairs: dict[tuple[int, int], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(runs, proposals) what the nodes of each run cost, and (proposals, proposals, runs, runs) what edges do between an
        earlier and a later run; what is illegal costs a thousand times all that is not."""
        runs, count = int(self.block.max()) + 1, len(costs[0])
        tables = [*costs, *pairs.values()]
        legal = sum([float(table[table < ILLEGAL].max(initial=0.0)) for table in tables])
        barred = 1e3 * legal + 1.0
        inside, between = np.zeros((runs, count)), np.zeros((count, count, runs, runs))
        for block, cost in zip(self.block, costs, strict=True):
            inside[block] += np.minimum(cost, barred)
        for (i, j), matrix in pairs.items():
            a, b, table = int(self.block[i]), int(self.block[j]), np.minimum(matrix, barred)
            if a > b:
                a, b, table = b, a, table.T
            between[:, :, a, b] += table
        return inside, between

    def _levels(self, choices: np.ndarray) -> np.ndarray:
        """(runs, proposals, times) what the nodes of each run take between two times at which usages begin or end."""
        events = np.unique([time for usage in self.problem.usages for time in (usage.begin, usage.end)])
        change = np.zeros((int(self.block.max()) + 1, choices.shape[1], len(events)))
        for usage in self.problem.usages:
            amount, block = usage.amount(choices[usage.node]), self.block[usage.node]
            change[block, :, np.searchsorted(events, usage.begin)] += amount
            change[block, :, np.searchsorted(events, usage.end)] -= amount
        return change.cumsum(2)


def _legal(cost: np.ndarray, options: np.ndarray) -> np.ndarray:
    """Options, or all there are where none of them is legal."""
    return options if (cost[options] < ILLEGAL).any() else np.arange(len(cost))


def _charged(
    problem: Problem, costs: Sequence[np.ndarray], rows: Sequence[np.ndarray], price: float, times: Sequence[int]
) -> tuple[np.ndarray, ...]:
    """Costs with usages that are alive at some times at a price."""
    charged = list(costs)
    for usage in problem.usages if price else ():
        alive = sum(usage.begin <= time < usage.end for time in times)
        if alive:
            charged[usage.node] = charged[usage.node] + price * alive * usage.amount(rows[usage.node])
    return tuple(charged)


def _solved(tables: Tables, allowed: Sequence[np.ndarray]) -> np.ndarray:
    """An option per variable, of those allowed to it, by elimination."""
    costs = tuple([cost[some] for cost, some in zip(tables.costs, allowed, strict=True)])
    pairs = {(i, j): matrix[np.ix_(allowed[i], allowed[j])] for (i, j), matrix in tables.pairs.items()}
    options, _ = solve(Tables(costs, pairs), min_fill_order(option_weights(map(len, costs)), pairs))
    return np.array([some[option] for some, option in zip(allowed, options, strict=True)], dtype=np.int64)


def _cut(inside: np.ndarray, between: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each number of stages, (where they begin, with the end of the last; the proposal that each takes): the least sum if
    edges that reach back farther than one stage ended in that one."""
    runs, count = inside.shape
    sums = np.zeros((count, count, runs + 1, runs + 1))
    sums[:, :, 1:, 1:] = between.cumsum(2).cumsum(3)
    own = np.concatenate([np.zeros((1, count)), inside.cumsum(0)])  # (place, proposal)
    diagonal = sums[np.arange(count), np.arange(count)]  # (proposal, from before, up to)
    least = np.full((runs + 1, count), math.inf)
    back: list[tuple[np.ndarray, np.ndarray]] = []
    for stages in range(1, min(most, runs) + 1):
        ahead = np.full((runs + 1, count), math.inf)
        first, before = (np.zeros((runs + 1, count), dtype=np.int64) for _ in range(2))
        for last in range(stages, runs + 1):
            within = (own[last] - own[:last]) + (diagonal[:, last, last][:, None] - diagonal[:, :last, last]).T
            if stages == 1:
                ahead[last] = within[0]
                continue
            places = np.arange(last)
            joins = (sums[:, :, :last, last] - sums[:, :, places, places]).transpose(2, 0, 1)  # (place, before, now)
            total = least[:last, :, None] + joins + within[:, None, :]
            total[:, np.arange(count), np.arange(count)] = math.inf  # one proposal twice is one stage
            flat = total.reshape(-1, count)
            at = flat.argmin(0)
            ahead[last] = flat[at, np.arange(count)]
            first[last], before[last] = at // count, at % count
        back.append((first, before))
        least = ahead
        if not np.isfinite(least[runs]).any():
            return
        places, options = [runs], [int(least[runs].argmin())]
        for earlier, others in reversed(back):
            place, option = places[-1], options[-1]
            places.append(int(earlier[place, option]))
            options.append(int(others[place, option]))
        yield np.array(places[::-1]), np.array(options[-2::-1])


def _shifted(
    inside: np.ndarray, between: np.ndarray, levels: np.ndarray, limit: float, cuts: np.ndarray, options: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The same stages with one cut after the other where usages exceed the limit least, and there where the sum is least."""
    runs = np.arange(len(inside))

    def merit(places: np.ndarray) -> tuple[float, float]:
        taken = np.repeat(options, np.diff(places))
        over = np.maximum(levels[runs, taken].sum(0) - limit * (1 + ROUNDING), 0.0).sum()
        return float(over), float(inside[runs, taken].sum() + between[taken[:, None], taken, runs[:, None], runs].sum())

    best, least = cuts, merit(cuts)
    improved = True
    while improved:
        improved = False
        for number in range(1, len(options)):
            for place in range(int(best[number - 1]) + 1, int(best[number + 1])):
                tried = best.copy()
                tried[number] = place
                found = merit(tried)
                if found < least:
                    best, least, improved = tried, found, True
    return best, options


__all__ = ["STAGES", "Stage", "piper_stages"]
