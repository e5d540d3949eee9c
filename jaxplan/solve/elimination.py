"""Exact elimination over a few positions a node, at several prices of usage at once: what `merging` is made of.

A problem here is flat: node v has `sizes[v]` positions, whose costs are rows of `costs` (positions, prices). Pair k ties the
nodes `pairs[k]`, the first the smaller, by a table over both, row by row; all tables are one after the other in `tables`.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np

from jaxplan.buckets import Bucket
from jaxplan.solve.compiled import HAVE_NUMBA, compiled


def by_arrays(sizes: np.ndarray, costs: np.ndarray, pairs: np.ndarray, tables: np.ndarray, cells: int) -> np.ndarray:
    """As `eliminate`, without compiled code."""
    begin = np.cumsum(sizes) - sizes
    bucket = Bucket([costs[b : b + k].T for b, k in zip(begin.tolist(), sizes.tolist())])
    at = 0
    for a, b in pairs.tolist():
        size = sizes[a] * sizes[b]
        bucket.put((a, b), tables[at : at + size].reshape(1, sizes[a], sizes[b]))
        at += size
    return bucket.solve(cells, costs.shape[1])


class Board(NamedTuple):
    """Memory of the compiled elimination. Tables, the first ones and those that elimination makes, are rows (cells, prices).

    Table f is over the nodes `scope[f, :width[f]]`, its cells are at `store[start[f]:]`, and it is not `dead` yet. The tables of
    node v are a list: `entry[i]` from i = `head[v]` on, by `following[i]`, to -1; dead ones may be on it. `free[k]`: a dead table
    whose room is 2 ** k cells, or -1; `waiting` leads to the next one. Nodes were decided in `order`, each by the first `number`
    of `by`, as the rows of `best` from `chosen` on say. `counters`: stamp of `seen`; then how many entries, tables, cells, nodes
    and rows of `best` are in use.
    """

    sizes: np.ndarray
    begin: np.ndarray
    cost: np.ndarray
    scope: np.ndarray
    width: np.ndarray
    start: np.ndarray
    room: np.ndarray
    dead: np.ndarray
    head: np.ndarray
    following: np.ndarray
    entry: np.ndarray
    seen: np.ndarray
    gone: np.ndarray
    free: np.ndarray
    waiting: np.ndarray
    order: np.ndarray
    by: np.ndarray
    number: np.ndarray
    chosen: np.ndarray
    counters: np.ndarray
    store: np.ndarray
    best: np.ndarray


def board_of(
    sizes: np.ndarray, costs: np.ndarray, pairs: np.ndarray, tables: np.ndarray, widest: int, spare: int
) -> Board:
    """A board on which nothing is decided yet; `spare`: cells for what elimination makes."""
    nodes, links, prices = len(sizes), len(pairs), costs.shape[1]
    longs = {name: np.zeros(nodes, dtype=np.int64) for name in ("seen", "order", "number", "chosen")}
    places = {name: np.zeros(links + nodes, dtype=np.int64) for name in ("width", "start", "room")}
    cells = sizes[pairs].prod(axis=1)
    places["width"][:links], places["start"][:links] = 2, np.cumsum(cells) - cells
    places["room"][:links] = np.log2(cells)
    scope = np.zeros((links + nodes, widest), dtype=np.int64)
    scope[:links, :2] = pairs
    ends = pairs.ravel()
    order = np.argsort(ends, kind="stable")
    first = np.searchsorted(ends[order], np.arange(nodes + 1))
    following, entry = (np.full(len(ends) + widest * nodes, -1) for _ in range(2))
    entry[: len(ends)] = order // 2
    following[: len(ends)] = np.arange(1, len(ends) + 1)
    following[first[1:][np.diff(first) > 0] - 1] = -1
    store = np.empty((len(tables) + spare, prices))
    store[: len(tables)] = tables[:, None]
    return Board(
        **longs, **places, sizes=sizes, begin=np.cumsum(sizes) - sizes, cost=costs.copy(), scope=scope, entry=entry, store=store,
        dead=np.zeros(links + nodes, dtype=bool), head=np.where(np.diff(first) > 0, first[:-1], -1), following=following,
        gone=np.zeros(nodes, dtype=bool), free=np.full(64, -1), waiting=np.full(links + nodes, -1),
        by=np.zeros((nodes, widest), dtype=np.int64), best=np.zeros((spare, prices), dtype=np.int16),
        counters=np.array([0, len(ends), links, len(tables), 0, 1]),
    )  # fmt: skip


@compiled()
def neighbours(board, v, out):
    """Fill `out` with those that share a table with v, v left out; gives how many. Takes dead tables off v's list."""
    board.counters[0] += 1
    stamp = board.counters[0]
    board.seen[v] = stamp
    count, before, i = 0, -1, board.head[v]
    while i >= 0:
        f, after = board.entry[i], board.following[i]
        if board.dead[f]:
            if before < 0:
                board.head[v] = after
            else:
                board.following[before] = after
        else:
            before = i
            for k in range(board.width[f]):
                u = board.scope[f, k]
                if board.seen[u] != stamp:
                    board.seen[u] = stamp
                    out[count] = u
                    count += 1
        i = after
    return count


@compiled()
def joint_cells(board, v, count, around, most):
    """Cells over v and the first `count` of `around`, or `most` if there are more."""
    total = board.sizes[v]
    for k in range(count):
        if total >= most:
            break
        total *= board.sizes[around[k]]
    return min(total, most)


@compiled()
def add_rows(out, to, rows, begin, count):
    """Add `count` rows of an array from `begin` on to those of another from `to` on. Loops compile in a tenth of the time."""
    for i in range(count):
        for p in range(out.shape[1]):
            out[to + i, p] += rows[begin + i, p]


@compiled()
def fix(board, v):
    """Leave v at its first position: its tables lose a dimension, in place; those over two nodes become costs of the other."""
    sizes, store = board.sizes, board.store
    i = board.head[v]
    while i >= 0:
        f = board.entry[i]
        i = board.following[i]
        if board.dead[f]:
            continue
        axis, outer, inner = 0, 1, 1
        for k in range(board.width[f]):
            u = board.scope[f, k]
            if u == v:
                axis, outer, inner = k, outer * inner, 1
            else:
                inner *= sizes[u]
        start = board.start[f]
        for a in range(outer):
            for b in range(inner):
                for p in range(store.shape[1]):
                    store[start + a * inner + b, p] = store[start + a * sizes[v] * inner + b, p]
        for k in range(axis, board.width[f] - 1):
            board.scope[f, k] = board.scope[f, k + 1]
        board.width[f] -= 1
        if board.width[f] == 1:
            u = board.scope[f, 0]
            add_rows(board.cost, board.begin[u], store, start, sizes[u])
            board.dead[f] = True
    board.gone[v] = True
    board.order[board.counters[4]] = v  # by nobody, and `best` begins with a row of zeros
    board.counters[4] += 1


@compiled()
def least_over(board, v, count, around, offset, steps, least, best):
    """Into `least` and `best`, (cells of `around`, prices): the least joint cost over v's positions, and the first that has it.

    `offset`: of v's tables in the store; `steps[f, k]`: how far cells lie apart along `around[k]`, along v where k is `count`.
    """
    cost = board.cost[board.begin[v] : board.begin[v] + board.sizes[v]]
    prices = cost.shape[1]
    index, row = np.zeros(count + 1, dtype=np.int64), np.empty(prices)
    for cell in range(len(least)):
        for position in range(len(cost)):
            for p in range(prices):
                row[p] = cost[position, p]
            for f in range(len(offset)):
                more = board.store[offset[f] + position * steps[f, count]]
                for p in range(prices):
                    row[p] += more[p]
            for p in range(prices):
                if position == 0 or row[p] < least[cell, p]:
                    least[cell, p], best[cell, p] = row[p], position
        for k in range(count - 1, -1, -1):  # the next cell: the last of `around` moves fastest
            back = index[k] + 1 == board.sizes[around[k]]
            index[k] = 0 if back else index[k] + 1
            for f in range(len(offset)):
                offset[f] += steps[f, k] * (1 - board.sizes[around[k]] if back else 1)
            if not back:
                break


@compiled()
def tables_of(board, v, count, around):
    """(where v's tables are, their steps), as `least_over` wants them; they are dead from here on, their room is free."""
    total, i = 0, board.head[v]
    while i >= 0:
        total += not board.dead[board.entry[i]]
        i = board.following[i]
    offset, steps = np.zeros(total, dtype=np.int64), np.zeros((total, count + 1), dtype=np.int64)
    total, i = 0, board.head[v]
    while i >= 0:
        f = board.entry[i]
        i = board.following[i]
        if board.dead[f]:
            continue
        offset[total], apart = board.start[f], 1
        for k in range(board.width[f] - 1, -1, -1):
            u = board.scope[f, k]
            if u == v:
                steps[total, count] = apart
            else:
                for j in range(count):
                    if around[j] == u:
                        steps[total, j] = apart
                        break
            apart *= board.sizes[u]
        total += 1
    return offset, steps


@compiled()
def decide(board, v, count, around, rows):
    """Decide v by the `count` nodes around it, whose tables have `rows` cells. False where the board has no room left for it."""
    offset, steps = tables_of(board, v, count, around)
    need = 0
    while 1 << need < rows:
        need += 1
    recycled = board.free[need]
    place = board.start[recycled] if recycled >= 0 else board.counters[3]
    kept = board.counters[5]
    if (recycled < 0 and place + (1 << need) > len(board.store)) or kept + rows > len(board.best):
        return False
    if recycled >= 0:
        board.free[need] = board.waiting[recycled]
    else:
        board.counters[3] += 1 << need
    least = board.store[place : place + rows]
    least_over(board, v, count, around, offset, steps, least, board.best[kept:])
    i = board.head[v]
    while i >= 0:
        f = board.entry[i]
        i = board.following[i]
        if not board.dead[f]:
            board.dead[f] = True
            board.waiting[f] = board.free[board.room[f]]
            board.free[board.room[f]] = f
    done = board.counters[4]
    board.order[done], board.number[done], board.chosen[done] = v, count, kept
    board.gone[v] = True
    board.counters[4], board.counters[5] = done + 1, kept + rows
    f = board.counters[2]
    board.counters[2] += 1
    board.start[f], board.room[f], board.width[f] = place, need, count
    for k in range(count):
        board.by[done, k] = board.scope[f, k] = around[k]
    if count < 2:
        board.dead[f] = True
        board.waiting[f] = board.free[need]
        board.free[need] = f
        if count:
            u = around[0]
            add_rows(board.cost, board.begin[u], board.store, place, rows)
        return True
    for k in range(count):
        u, i = around[k], board.counters[1]
        board.entry[i], board.following[i], board.head[u] = f, board.head[u], i
        board.counters[1] += 1
    return True


@compiled()
def run(board, cells):
    """Decide all nodes, those of the smallest tables first. False where the board's room did not do."""
    nodes, most = len(board.sizes), 4 * cells
    around, other = np.zeros(nodes, dtype=np.int64), np.zeros(nodes, dtype=np.int64)
    heap = [(joint_cells(board, v, neighbours(board, v, around), around, most), v) for v in range(nodes)]
    heapq.heapify(heap)
    while len(heap):
        size, v = heapq.heappop(heap)
        if board.gone[v]:
            continue
        count = neighbours(board, v, around)
        if size != joint_cells(board, v, count, around, most):
            continue
        if size <= cells:
            if not decide(board, v, count, around, size // board.sizes[v]):
                return False
        else:
            hub, degree = v, count
            for k in range(count):
                theirs = neighbours(board, around[k], other)
                if theirs > degree or (theirs == degree and around[k] > hub):
                    hub, degree = around[k], theirs
            count = neighbours(board, hub, around)
            fix(board, hub)
            if hub != v:
                around[count], count = v, count + 1
        for k in range(count):
            u = around[k]
            heapq.heappush(heap, (joint_cells(board, u, neighbours(board, u, other), other, most), u))
    return True


@compiled()
def read(board, found):
    """Positions, (nodes, prices), into `found`: the last decided first."""
    for done in range(len(board.order) - 1, -1, -1):
        v = board.order[done]
        for p in range(found.shape[1]):
            cell = 0
            for k in range(board.number[done]):
                u = board.by[done, k]
                cell = cell * board.sizes[u] + found[u, p]
            found[v, p] = board.best[board.chosen[done] + cell, p]


def eliminate(sizes: np.ndarray, costs: np.ndarray, pairs: np.ndarray, tables: np.ndarray, cells: int) -> np.ndarray:
    """(nodes, prices) positions of least cost; where a table would exceed `cells`, a hub is fixed at its first position."""
    if not HAVE_NUMBA or sizes.min(initial=2) < 2:
        return by_arrays(sizes, costs, pairs, tables, cells)
    found = np.zeros((len(sizes), costs.shape[1]), dtype=np.int64)
    widest, spare = max(2, cells.bit_length() - 1), 4 * cells + 128 * len(sizes)
    while True:
        board = board_of(sizes, costs, pairs, tables, widest, spare)
        if run(board, cells):
            read(board, found)
            return found
        spare *= 4
