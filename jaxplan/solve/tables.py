"""What a table of costs over two nodes' strategies allows, and which strategies another replaces: kernels of the reductions."""

from __future__ import annotations

import numpy as np

from jaxplan.solve.compiled import compiled

IS_SUM = 1
"""The table is finite and a cost per row plus a cost per column, exactly."""
ROWS_DECIDE, COLUMNS_DECIDE = 2, 4
"""Every row (column) has exactly one possible cell."""
ROWS_LAST, COLUMNS_LAST = 8, 16
"""Every row (column) has a possible cell."""


def traits(table: np.ndarray) -> int:
    """Which of these hold for a table, added up."""
    rows, columns = table.shape
    if table.flags.c_contiguous:
        return int(cell_traits(table.reshape(-1), rows, columns, columns, 1))
    if table.flags.f_contiguous:
        return int(cell_traits(table.T.reshape(-1), rows, columns, 1, rows))
    return int(cell_traits(np.ascontiguousarray(table).reshape(-1), rows, columns, columns, 1))


def _cell_traits_numpy(cells, rows, columns, down, right):
    table = cells.reshape(rows, columns) if right == 1 else cells.reshape(columns, rows).T
    possible = np.isfinite(table)
    found = 0
    if possible.all():
        if np.array_equal((table[:, :1] - table[0, 0]) + table[0], table):
            found |= IS_SUM
        found |= ROWS_LAST | COLUMNS_LAST
        return found | (ROWS_DECIDE if columns == 1 else 0) | (COLUMNS_DECIDE if rows == 1 else 0)
    for axis, decide, last in ((1, ROWS_DECIDE, ROWS_LAST), (0, COLUMNS_DECIDE, COLUMNS_LAST)):
        count = possible.sum(axis=axis)
        found |= (decide if (count == 1).all() else 0) | (last if count.all() else 0)
    return found


@compiled(_cell_traits_numpy)
def cell_traits(cells, rows, columns, down, right):
    """`traits` of the table whose cell (i, j) is `cells[i * down + j * right]`."""
    is_sum, rows_decide, rows_last, columns_decide, columns_last = True, True, True, True, True
    for i in range(rows):
        count = 0
        mine = cells[i * down] - cells[0]
        for j in range(columns):
            cell = cells[i * down + j * right]
            if cell < np.inf:
                count += 1
                is_sum = is_sum and mine + cells[j * right] == cell
            else:
                is_sum = False
        rows_decide, rows_last = rows_decide and count == 1, rows_last and count > 0
    if is_sum:  # all cells are possible
        return 1 + (2 if columns == 1 else 0) + (4 if rows == 1 else 0) + 8 + 16
    for j in range(columns):
        count = 0
        for i in range(rows):
            count += cells[i * down + j * right] < np.inf
        columns_decide, columns_last = columns_decide and count == 1, columns_last and count > 0
    return (2 if rows_decide else 0) + (4 if columns_decide else 0) + (8 if rows_last else 0) + (16 if columns_last else 0)


def _dominated_numpy(cost: np.ndarray, usage: np.ndarray, wide: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Which strategies another one replaces: (k,) costs, (loads, k) usages, (k, w) edge costs in blocks that start at `start`."""
    count = len(cost)
    dead = np.zeros(count, dtype=bool)
    for a in range(count):
        if dead[a]:
            continue
        rest = np.flatnonzero(~dead & (usage[:, a, None] <= usage).all(axis=0))
        rest = rest[rest != a]
        if not len(rest):
            continue
        worst = cost[a] - cost[rest]
        if wide.shape[1]:
            other = wide[rest]
            possible = np.isfinite(other)
            gap = np.where(possible, wide[a] - np.where(possible, other, 0.0), -np.inf)
            worst = worst + np.maximum.reduceat(gap, start, axis=1).sum(axis=1)
        dead[rest[worst <= 0]] = True
    return dead


@compiled(_dominated_numpy)
def dominated(cost, usage, wide, start):
    """As `_dominated_numpy`. A pair is first compared where the second one's edges cost least: most fail there already."""
    count, width = wide.shape
    dead = np.zeros(count, dtype=np.bool_)
    blocks = len(start)
    least = np.zeros((count, blocks), dtype=np.int64)
    for b in range(count):
        for block in range(blocks):
            end = start[block + 1] if block + 1 < blocks else width
            least[b, block] = start[block] + wide[b, start[block] : end].argmin()
    for a in range(count):
        if dead[a]:
            continue
        for b in range(count):
            if b == a or dead[b]:
                continue
            good = True
            for load in range(usage.shape[0]):
                if usage[load, a] > usage[load, b]:
                    good = False
                    break
            if not good:
                continue
            total = cost[a] - cost[b]
            for block in range(blocks):  # no term is above the one below, so neither is their sum, rounded as it is
                j = least[b, block]
                total += wide[a, j] - wide[b, j] if wide[b, j] < np.inf else -np.inf
            if total > 0:
                continue
            total = cost[a] - cost[b]
            for block in range(blocks):
                end = start[block + 1] if block + 1 < blocks else width
                worst = -np.inf
                for j in range(start[block], end):
                    if wide[b, j] < np.inf:
                        gap = wide[a, j] - wide[b, j]
                        if gap > worst:
                            worst = gap
                total += worst
                if total == np.inf:
                    break
            if total <= 0:
                dead[b] = True
    return dead
