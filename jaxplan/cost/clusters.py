"""The numbers a search asks for, whole arrays at a time: what clusters cost per choice.

As with reshards (`prices.py`), prices agree with the term-by-term ones of `price.py`.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxplan.cost.exchange import step_bytes, step_rounds
from jaxplan.cost.formulas import work_seconds
from jaxplan.cost.numbers import Numbers
from jaxplan.cost.price import (
    AxisOptions,
    CombinePart,
    Setting,
    combine_part,
    halo_bytes,
    handed_bytes,
    handed_times,
    parts_steps,
    sent_seconds,
    steps_sent,
)
from jaxplan.cost.prices import steps_rates
from jaxplan.graph import Cluster
from jaxplan.problem import AskedNode, all_rows

DENSE = 1024
"""Choices up to which what a cluster costs is kept for each of them."""

Parts = tuple[tuple[CombinePart, ...], ...]
"""What each axis can do in combining a result, every part once."""


class Combines:
    """Seconds of combining partial results, as (per byte, fixed), for all combinations of what axes do."""

    def __init__(self, setting: Setting, numbers: Numbers, ndim: int) -> None:
        """`ndim`: the most dimensions of any tensor."""
        self.setting, self.numbers, self.ndim = setting, numbers, ndim
        self._starts: dict[Parts, int] = {}
        self._every: list[tuple[CombinePart, ...]] = []
        self._known: dict[tuple[CombinePart, ...], tuple[float, float]] = {}
        self._rates = np.full((2, 0), np.nan)

    def start(self, parts: Parts) -> int:
        """The number of the first combination of some parts, the last axis varying fastest."""
        start = self._starts.get(parts)
        if start is None:
            start = self._starts[parts] = len(self._every)
            self._every += itertools.product(*parts)
        return start

    def rates(self, numbers: np.ndarray) -> np.ndarray:
        """(2, count): seconds per byte and fixed seconds of numbered combinations."""
        if self._rates.shape[1] < len(self._every):
            more = np.full((2, len(self._every) - self._rates.shape[1]), np.nan)
            self._rates = np.concatenate([self._rates, more], axis=1)
        rates = self._rates[:, numbers]
        missing = np.isnan(rates[0])
        if missing.any():
            new = sorted(set(numbers[missing].tolist()))
            self._rates[:, new] = np.transpose([self._rated(renamed(self._every[number])) for number in new])
            rates = self._rates[:, numbers]
        return rates

    def _rated(self, parts: tuple[CombinePart, ...]) -> tuple[float, float]:
        rates = self._known.get(parts)
        if rates is None:
            steps = parts_steps(parts, self.ndim, self.setting.order)
            rates = self._known[parts] = steps_rates(steps, self.numbers)
        return rates

    def again(self, setting: Setting, numbers: Numbers) -> Combines:
        """The same combinations on a machine that differs by its links only."""
        combines = Combines(setting, numbers, self.ndim)
        for parts in self._starts:
            combines.start(parts)
        return combines

    def share(self, parts: tuple[CombinePart, ...], scattered: bool = False) -> float:
        """The share of a result that each device holds before it is combined; 0 where it never is (or, `scattered`, where none of
        it is scattered)."""
        steps = parts_steps(parts, self.ndim, self.setting.order)
        if scattered and not any(step.kind == "reduce_scatter" for step in steps):
            return 0.0
        return 1 / math.prod([self.numbers.sizes[axis] for axes in steps[0].before for axis in axes]) if steps else 0.0


def renamed(parts: Sequence[CombinePart]) -> tuple[CombinePart, ...]:
    """The same but for the numbers of dimensions, of which it only matters which are equal, and of factors, whose order does."""
    dims: dict[int, int] = {-1: -1}
    factors = {factor: place for place, factor in enumerate(sorted({factor for _, factor, _ in parts if factor >= 0}))}
    return tuple([
        (dims.setdefault(dim, len(dims) - 1), factors.get(factor, factor), dims.setdefault(scatter, len(dims) - 1))
        for dim, factor, scatter in parts
    ])  # fmt: skip


class _Arrays(NamedTuple):
    """What is known of all clusters: of C of them, with P results to combine, and T choices in all."""

    begins: np.ndarray  # (C,) the first of a cluster's choices; -1 where there are more than `DENSE`
    strides: np.ndarray  # (C, axes)
    local: np.ndarray  # (T,) seconds without exchanges
    seconds: np.ndarray  # (T,) seconds; not a number where exchanges have not been asked for
    first: np.ndarray  # (C,) the first result of a cluster that is combined
    count: np.ndarray  # (C,) and how many
    sends: np.ndarray  # (C,) whether neighbours send
    nbytes: np.ndarray  # (P,)
    starts: np.ndarray  # (P,) see `Combines.start`
    codes: np.ndarray  # (P, axes, options) what an option adds to that number


class Clusters:
    """Seconds of clusters for rows of option numbers; infinity where two axes together do not divide a factor.

    What a choice costs is kept, for all clusters in one row, from when it is first asked for.
    """

    def __init__(self, combines: Combines) -> None:
        self.combines, self.numbers = combines, combines.numbers
        self._members: list[ClusterPrice] = []
        self._known: _Arrays | None = None

    def price(self, cluster: Cluster, options: AxisOptions) -> ClusterPrice:
        """One cluster more."""
        self._members.append(ClusterPrice(self, len(self._members), cluster, options))
        self._known = None
        return self._members[-1]

    def again(self, setting: Setting, numbers: Numbers) -> Clusters:
        """The same clusters, by the same numbers, on a machine that differs by its links only."""
        clusters = Clusters(self.combines.again(setting, numbers))
        clusters._members = [copy.copy(price) for price in self._members]
        for price in clusters._members:
            price.family = clusters
        if self._known is not None:
            clusters._known = self._known._replace(seconds=clusters._without_exchanges(self._known.local))
        return clusters

    def __getitem__(self, number: int) -> ClusterPrice:
        return self._members[number]

    def prices(self, asked: Sequence[AskedNode]) -> list[np.ndarray]:
        """A vector of seconds for each (node price, rows)."""
        known = self._known = self._known or self._written()
        counts = [len(rows) for _, rows in asked]
        owners = np.repeat(np.array([price.number for price, _ in asked], dtype=np.int64), counts)
        rows = np.concatenate([rows for _, rows in asked]) if len(asked) > 1 else asked[0][1]
        places = known.begins[owners] + (rows * known.strides[owners]).sum(1)
        dense = known.begins[owners] >= 0
        if not dense.all():
            return [self._prices(price, rows) for price, rows in asked]
        seconds = known.seconds[places]
        missing = np.isnan(seconds)
        if missing.any():
            new, one = np.unique(places[missing], return_index=True)
            known.seconds[new] = known.local[new] + self._exchange_seconds(owners[missing][one], rows[missing][one])
            seconds = known.seconds[places]
        return np.split(seconds, np.cumsum(counts)[:-1])

    def _prices(self, price: ClusterPrice, rows: np.ndarray) -> np.ndarray:
        if math.prod(map(len, price.options)) <= DENSE:
            return self.prices([(price, rows)])[0]
        return _local_seconds([price], rows)[0] + self._exchange_seconds(np.full(len(rows), price.number), rows)

    def _written(self) -> _Arrays:
        members, axes = self._members, len(self.numbers.sizes)
        counts = [[len(axis) for axis in price.options] for price in members]
        sizes = np.array([math.prod(own) for own in counts], dtype=np.int64)
        kept = np.where(sizes <= DENSE, sizes, 0)
        alike: dict[tuple[int, ...], list[ClusterPrice]] = {}
        for price, own in zip(members, counts, strict=True):
            if math.prod(own) <= DENSE:
                alike.setdefault(tuple(own), []).append(price)
        local = {}
        for own, prices in alike.items():
            local.update(zip([price.number for price in prices], _local_seconds(prices, all_rows(own)), strict=True))
        strides = [np.cumprod([1, *own[:0:-1]])[::-1] for own in counts]
        coded = [_coded(price) for price in members]
        count = np.array([len(own) for own in coded], dtype=np.int64)
        widest = max([most for own in counts for most in own], default=0)
        results = [result for own in coded for result in own]
        codes = [[axis + [0] * (widest - len(axis)) for axis in own] for _, _, own in results]
        whole = np.concatenate([np.zeros(0), *[local[number] for number in sorted(local)]])
        return _Arrays(
            np.where(sizes <= DENSE, np.cumsum(kept) - kept, -1),
            np.array(strides, dtype=np.int64).reshape(len(members), axes),
            whole,
            self._without_exchanges(whole),
            np.cumsum(count) - count,
            count,
            np.array([price.sends for price in members], dtype=bool),
            np.array([nbytes for nbytes, _, _ in results]),
            np.array([self.combines.start(parts) for _, parts, _ in results], dtype=np.int64),
            np.array(codes, dtype=np.int64).reshape(len(results), axes, widest),
        )

    def _without_exchanges(self, local: np.ndarray) -> np.ndarray:
        """What choices cost; not a number for those of clusters that exchange something."""
        sizes = [math.prod(map(len, price.options)) for price in self._members]
        exchanges = [price.exchanges for price in self._members]
        kept = [size if size <= DENSE else 0 for size in sizes]
        return np.where(np.repeat(np.array(exchanges, dtype=bool), kept), np.nan, local)

    def _exchange_seconds(self, owners: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Exchanges inside of clusters, for a row of options each."""
        known = self._known = self._known or self._written()
        counts = known.count[owners]
        place = np.repeat(np.arange(len(rows)), counts)
        result = np.repeat(known.first[owners], counts) + np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
        numbers = known.starts[result]
        for axis in range(rows.shape[1]):
            numbers = numbers + known.codes[result, axis, rows[place, axis]]
        per_byte, fixed = self.combines.rates(numbers)
        seconds = np.bincount(place, per_byte * known.nbytes[result] + fixed, len(rows)).astype(float)  # whole numbers of nothing
        for n in np.flatnonzero(known.sends[owners]).tolist():
            seconds[n] += self._members[owners[n]].sent_seconds(rows[n].tolist())
        return seconds


class ClusterPrice:
    """Seconds of one cluster for rows of option numbers."""

    def __init__(self, family: Clusters, number: int, cluster: Cluster, options: AxisOptions) -> None:
        """`number`: what the family calls it."""
        self.family, self.number, self.cluster, self.options = family, number, cluster, options

    def __call__(self, choices: np.ndarray) -> np.ndarray:
        return self.family.prices([(self, choices)])[0]

    @property
    def exchanges(self) -> bool:
        """Whether any choice exchanges something inside of the cluster."""
        combines = any(combine.result.tensor >= 0 for combine in self.cluster.combines)
        return combines or self.sends

    @property
    def sends(self) -> bool:
        """Whether neighbours may send, or the program itself does."""
        return bool(self.cluster.halos or self.cluster.handed or self.cluster.sent)

    def sent_seconds(self, row: Sequence[int]) -> float:
        """What neighbours send (halos, and what is handed on), and what the program sends itself."""
        options, numbers = [axis[i] for axis, i in zip(self.options, row, strict=True)], self.family.numbers
        seconds = 0.0
        for _, _, axis, slab in halo_bytes(self.cluster, options, self.family.combines.setting, numbers):
            seconds += sent_seconds({axis: slab}, {axis: 1}, numbers)
        for handed, axis, slab in handed_bytes(self.cluster, options, numbers):
            often, rounds = handed_times(handed, numbers)
            seconds += often * sent_seconds({axis: slab}, {axis: rounds}, numbers)
        for sent, step in steps_sent(self.cluster, self.family.combines.setting, numbers):
            nbytes, rounds = dict(step_bytes(step, sent.nbytes, numbers.sizes)), dict(step_rounds(step))
            seconds += sent.times * sent_seconds(nbytes, rounds, numbers)
        return seconds


def _coded(price: ClusterPrice) -> list[tuple[float, Parts, list[list[int]]]]:
    """Of each result that a cluster combines: (bytes, the parts of each axis, what an option of each axis adds to the number of a
    combination of them)."""
    found = []
    for combine in price.cluster.combines:
        if combine.result.tensor >= 0:
            tables = [[combine_part(combine, option) for option in axis] for axis in price.options]
            names = iter(renamed([part for axis in tables for part in axis]))
            tables = [[next(names) for _ in axis] for axis in tables]
            parts = tuple([tuple(dict.fromkeys(axis)) for axis in tables])
            strides = np.cumprod([1, *[len(axis) for axis in parts[:0:-1]]])[::-1].tolist()
            every = zip(tables, parts, strides, strict=True)
            codes = [[stride * own.index(part) for part in axis] for axis, own, stride in every]
            found.append((price.family.numbers.nbytes(combine.result.tensor), parts, codes))
    return found


def _local_seconds(prices: Sequence[ClusterPrice], rows: np.ndarray) -> np.ndarray:
    """(clusters, rows): work without exchanges, and infinity for what is not legal, of clusters with equally many options."""
    numbers = prices[0].family.numbers
    work, moved, units = _Divided(), _Divided(), _Divided()
    for price in prices:
        cluster = price.cluster
        terminals = (*cluster.reads, *cluster.writes) if cluster.moves_bytes else ()
        shares = (*cluster.read_shares, *cluster.write_shares) if terminals else ()
        work.add([numbers.flops(piece) * numbers.seconds_per_flop(piece.dtype) for piece in cluster.work])
        moved.add([share * numbers.nbytes(t.tensor) for t, share in zip(terminals, shares, strict=True)])
        units.add(cluster.units)
        before: tuple[object, int] = (None, 1)
        for axis, (options, size) in enumerate(zip(price.options, numbers.sizes, strict=True)):
            if before[0] is not options or before[1] != size:
                before = options, size
                taken, both = [o.factor for o in options], [(o.factor, o.scatter) for o in options]
                worked = [[size if f >= 0 and f in piece.factors else 1 for f in taken] for piece in cluster.work]
                laid = [[size if f >= 0 and f in terminal.leads else 1 for f in taken] for terminal in terminals]
                given = [[size if factor in pair else 1 for pair in both] for factor in range(len(cluster.units))]
            for pieces, by in ((work, worked), (moved, laid), (units, given)):
                pieces.divide(axis, by, len(options))
    seconds = work_seconds(work.summed(rows), moved.summed(rows), 1, numbers.seconds_per_byte, np.maximum)
    parts = units.divided(rows)
    legal = np.logical_and.reduceat(np.array(units.amounts, dtype=np.int64)[:, None] % parts == 0, units.begins)
    for number, (price, begin) in enumerate(zip(prices, units.begins, strict=True)):
        for one, other in price.cluster.apart:
            legal[number] &= (parts[begin + 1 + one] == 1) | (parts[begin + 1 + other] == 1)
    return np.where(legal, seconds, math.inf)


class _Divided:
    """Amounts of many clusters, one after the other, that options divide; each cluster begins with a nought, so that none is
    empty."""

    def __init__(self) -> None:
        self.begins: list[int] = []
        self.amounts: list[float] = []
        self._by: list[list[list[int]]] = []

    def add(self, amounts: Sequence[float]) -> None:
        """The amounts of one cluster more."""
        self.begins.append(len(self.amounts))
        self.amounts += [0, *amounts]

    def divide(self, axis: int, by: list[list[int]], count: int) -> None:
        """By how much each of `count` options of an axis divides what was added last."""
        if axis == len(self._by):
            self._by.append([])
        self._by[axis] += [[1] * count, *by]

    def divided(self, rows: np.ndarray) -> np.ndarray:
        """(amounts, rows): by how much each is divided."""
        parts = np.ones((len(self.amounts), len(rows)), dtype=np.int64)
        for axis, by in enumerate(self._by):
            parts *= np.array(by)[:, rows[:, axis]]
        return parts

    def summed(self, rows: np.ndarray) -> np.ndarray:
        """(clusters, rows): the sum of what is left of each."""
        return np.add.reduceat(np.array(self.amounts)[:, None] / self.divided(rows), self.begins)
