"""A reduced problem in flat arrays, as the compiled kernels want it, and what both dual and primal ask of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxplan.solve.compiled import compiled
from jaxplan.solve.reductions import Reducer

BARRED = 1e18
"""The cost of an impossible pair: finite, so that differences of sums are numbers, and far above any other."""


class Core(NamedTuple):
    """n nodes, m edges from a lower to a higher node, s spans of usage, T times.

    Strategies of node v: `start[v]:start[v + 1]` of `cost`. Table of edge e: `table[cell[e]:]`, row by row over (tail, head).
    Links of v, one per edge: `first[v]:first[v + 1]`, first those to earlier nodes. Link i leads to node `other[i]`; the edge's
    table is at `pull[i]` of `table` over (other, v), at `push[i]` over (v, other), and at the other end it is link `mirror[i]`.
    Equal tables are stored once. Spans of v, in order of time and apart: `span[v]:span[v + 1]`, each over times `begin` to `end`
    with usages `usage[load[i]:]`. `capacity`: (T,) what they may add up to.
    """

    start: np.ndarray
    cost: np.ndarray
    tail: np.ndarray
    head: np.ndarray
    cell: np.ndarray
    table: np.ndarray
    first: np.ndarray
    other: np.ndarray
    pull: np.ndarray
    push: np.ndarray
    mirror: np.ndarray
    span: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    load: np.ndarray
    usage: np.ndarray
    capacity: np.ndarray


class Tables:
    """Tables in one flat array, equal ones once."""

    def __init__(self) -> None:
        self.flat: list[np.ndarray] = []
        self.places: dict[bytes, int] = {}
        self.size = 0

    def place(self, table: np.ndarray) -> int:
        """Where the table's cells are, row by row."""
        cells = table.tobytes()
        known = self.places.get(cells)
        if known is None:
            known = self.places[cells] = self.size
            self.flat.append(table.ravel())
            self.size += table.size
        return known


def core_of(reducer: Reducer) -> Core:
    """The nodes that a reducer has left, renumbered in order."""
    alive = np.flatnonzero(reducer.alive).tolist()
    number = {u: i for i, u in enumerate(alive)}
    edges = [(number[u], number[v], table) for u in alive for v, table in reducer.adjacent[u].items() if u < v]
    edges.sort(key=lambda edge: edge[:2])
    tables = Tables()
    forth, back = [], []
    for _, _, table in edges:
        finite = np.where(np.isfinite(table), table, BARRED)
        forth.append(tables.place(finite))
        back.append(tables.place(finite.T))
    tail = np.array([edge[0] for edge in edges], dtype=np.int64)
    head = np.array([edge[1] for edge in edges], dtype=np.int64)
    cell, turned = np.array(forth, dtype=np.int64), np.array(back, dtype=np.int64)
    ends, others = np.concatenate([head, tail]), np.concatenate([tail, head])
    order = np.lexsort((others, ends))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    spans = [(number[u], *span, usage) for u in alive for span, usage in reducer.loads[u].items()]
    return Core(
        start=_offsets([len(reducer.cost[u]) for u in alive]),
        cost=_joined([reducer.cost[u] for u in alive]),
        tail=tail,
        head=head,
        cell=cell,
        table=_joined(tables.flat),
        first=_offsets(np.bincount(ends, minlength=len(alive))),
        other=others[order],
        pull=np.concatenate([cell, turned])[order],
        push=np.concatenate([turned, cell])[order],
        mirror=place[(order + len(edges)) % max(1, len(order))],
        span=_offsets(np.bincount(np.array([row[0] for row in spans], dtype=np.int64), minlength=len(alive))),
        begin=np.array([row[1] for row in spans], dtype=np.int64),
        end=np.array([row[2] for row in spans], dtype=np.int64),
        load=_offsets([len(row[3]) for row in spans]),
        usage=_joined([row[3] for row in spans]),
        capacity=np.array(reducer.capacity, dtype=float),
    )


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(np.concatenate(arrays)) if arrays else np.zeros(0)


def _offsets(sizes: list[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.asarray(sizes, dtype=np.int64))]).astype(np.int64)


def core_cost(core: Core, chosen: np.ndarray) -> float:
    """Node and edge costs of one position per node; from BARRED on, an impossible pair is among them."""
    heads = core.start[1:] - core.start[:-1]
    cells = core.cell + chosen[core.tail] * heads[core.head] + chosen[core.head]
    return float(core.cost[core.start[:-1] + chosen].sum() + core.table[cells].sum())


def core_usage(core: Core, chosen: np.ndarray) -> np.ndarray:
    """(T,) usages of one position per node."""
    owner = np.repeat(np.arange(len(core.span) - 1), np.diff(core.span))
    used = core.usage[core.load[:-1] + chosen[owner]]
    change = np.zeros(len(core.capacity) + 1)
    np.add.at(change, core.begin, used)
    np.add.at(change, core.end, -used)
    return np.cumsum(change)[:-1]


def _lowest_numpy(values, table, cell, rows, columns, out):
    np.min(table[cell : cell + rows * columns].reshape(rows, columns) + values[:rows, None], axis=0, out=out[:columns])


@compiled(_lowest_numpy)
def lowest(values, table, cell, rows, columns, out):
    """out[j] = min over i of values[i] + table[i, j]. Four rows at a time, in slices: so a compiler makes it vectors."""
    for j in range(columns):
        out[j] = np.inf
    i = 0
    while i + 4 <= rows:
        at = cell + i * columns
        first, second = table[at : at + columns], table[at + columns : at + 2 * columns]
        third, fourth = table[at + 2 * columns : at + 3 * columns], table[at + 3 * columns : at + 4 * columns]
        a, b, c, d = values[i], values[i + 1], values[i + 2], values[i + 3]
        for j in range(columns):
            left = a + first[j] if a + first[j] < b + second[j] else b + second[j]
            right = c + third[j] if c + third[j] < d + fourth[j] else d + fourth[j]
            left = left if left < right else right
            out[j] = left if left < out[j] else out[j]
        i += 4
    while i < rows:
        row = table[cell + i * columns : cell + (i + 1) * columns]
        value = values[i]
        for j in range(columns):
            joint = value + row[j]
            out[j] = joint if joint < out[j] else out[j]
        i += 1


def _add_numpy(out, values, begin, count):
    out[:count] += values[begin : begin + count]


@compiled(_add_numpy)
def add(out, values, begin, count):
    """out[i] += values[begin + i] for i below count."""
    some = values[begin : begin + count]
    for i in range(count):
        out[i] += some[i]


def _add_scaled_numpy(out, values, begin, count, factor):
    out[:count] += factor * values[begin : begin + count]


@compiled(_add_scaled_numpy)
def add_scaled(out, values, begin, count, factor):
    """out[i] += factor * values[begin + i] for i below count."""
    some = values[begin : begin + count]
    for i in range(count):
        out[i] += factor * some[i]


def _argmin_sum_numpy(values, table, begin, count):
    return (values[:count] + table[begin : begin + count]).argmin()


@compiled(_argmin_sum_numpy)
def argmin_sum(values, table, begin, count):
    """The first i below count at which values[i] + table[begin + i] is least."""
    some = table[begin : begin + count]
    best, at = values[0] + some[0], 0
    for i in range(1, count):
        joint = values[i] + some[i]
        if joint < best:
            best, at = joint, i
    return at
