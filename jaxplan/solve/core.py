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
    Edges at v: `link[first[v]:first[v + 1]]`. Spans of v, in order of time and apart: `span[v]:span[v + 1]`, each over times
    `begin` to `end` with usages `usage[load[i]:]`. `capacity`: (T,) what they may add up to.
    """

    start: np.ndarray
    cost: np.ndarray
    tail: np.ndarray
    head: np.ndarray
    cell: np.ndarray
    table: np.ndarray
    first: np.ndarray
    link: np.ndarray
    span: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    load: np.ndarray
    usage: np.ndarray
    capacity: np.ndarray


def core_of(reducer: Reducer) -> Core:
    """The nodes that a reducer has left, renumbered in order."""
    alive = np.flatnonzero(reducer.alive).tolist()
    number = {u: i for i, u in enumerate(alive)}
    edges = [(number[u], number[v], table) for u in alive for v, table in reducer.adjacent[u].items() if u < v]
    edges.sort(key=lambda edge: edge[:2])
    tail = np.array([edge[0] for edge in edges], dtype=np.int64)
    head = np.array([edge[1] for edge in edges], dtype=np.int64)
    ends = np.concatenate([tail, head])
    table = _joined([edge[2].ravel() for edge in edges])
    spans = [(number[u], *span, usage) for u in alive for span, usage in reducer.loads[u].items()]
    return Core(
        start=_offsets([len(reducer.cost[u]) for u in alive]),
        cost=_joined([reducer.cost[u] for u in alive]),
        tail=tail,
        head=head,
        cell=_offsets([edge[2].size for edge in edges]),
        table=np.where(np.isfinite(table), table, BARRED),
        first=_offsets(np.bincount(ends, minlength=len(alive))),
        link=np.argsort(ends, kind="stable") % max(1, len(edges)),
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
    cells = core.cell[:-1] + chosen[core.tail] * heads[core.head] + chosen[core.head]
    return float(core.cost[core.start[:-1] + chosen].sum() + core.table[cells].sum())


def core_usage(core: Core, chosen: np.ndarray) -> np.ndarray:
    """(T,) usages of one position per node."""
    owner = np.repeat(np.arange(len(core.span) - 1), np.diff(core.span))
    used = core.usage[core.load[:-1] + chosen[owner]]
    change = np.zeros(len(core.capacity) + 1)
    np.add.at(change, core.begin, used)
    np.add.at(change, core.end, -used)
    return np.cumsum(change)[:-1]


def _lowest_numpy(values, table, cell, rows, columns, from_tail, out, where):
    matrix = table[cell : cell + rows * columns].reshape(rows, columns)
    joint = values[:rows, None] + matrix if from_tail else (matrix + values[:columns]).T
    width = joint.shape[1]
    where[:width] = joint.argmin(axis=0)
    out[:width] = joint[where[:width], np.arange(width)]


@compiled(_lowest_numpy)
def lowest(values, table, cell, rows, columns, from_tail, out, where):
    """out[j] = min over i of values[i] + table[i, j] (from the head: of table[j, i]); where[j]: the first i that gives it."""
    if from_tail:
        for j in range(columns):
            out[j] = values[0] + table[cell + j]
            where[j] = 0
        for i in range(1, rows):
            value, row = values[i], cell + i * columns
            for j in range(columns):
                joint = value + table[row + j]
                if joint < out[j]:
                    out[j] = joint
                    where[j] = i
    else:
        for j in range(rows):
            row = cell + j * columns
            best, at = values[0] + table[row], 0
            for i in range(1, columns):
                joint = values[i] + table[row + i]
                if joint < best:
                    best, at = joint, i
            out[j] = best
            where[j] = at


def _add_fixed_numpy(out, table, cell, rows, columns, tail_is_free, other):
    if tail_is_free:
        out[:rows] += table[cell + other : cell + rows * columns : columns]
    else:
        out[:columns] += table[cell + other * columns : cell + (other + 1) * columns]


@compiled(_add_fixed_numpy)
def add_fixed(out, table, cell, rows, columns, tail_is_free, other):
    """Add to `out` an edge's costs over the strategies of one end, the other end being at `other`."""
    if tail_is_free:
        for i in range(rows):
            out[i] += table[cell + i * columns + other]
    else:
        row = cell + other * columns
        for j in range(columns):
            out[j] += table[row + j]


def _add_scaled_numpy(out, values, begin, count, factor):
    out[:count] += factor * values[begin : begin + count]


@compiled(_add_scaled_numpy)
def add_scaled(out, values, begin, count, factor):
    """out[i] += factor * values[begin + i] for i below count."""
    for i in range(count):
        out[i] += factor * values[begin + i]
