"""Room `reduce`: a problem becomes smaller, and each step says how to undo itself. Knows nothing of JAX.

`fold` merges look-alikes. The other steps work on `Tables`, the prices of one axis written out while the other axes stay
fixed: `dominance` strikes out options that are never better and `eliminate` removes leaves and chains; both are exact.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxplan.problem import Meter, Problem, Usage, all_rows, edge_prices, evaluate, node_prices, taken

ILLEGAL = 1e30
"""Stands for infinity where differences are taken (seconds; no real price comes near)."""

Undo = Callable[[np.ndarray], np.ndarray]
"""Choices of the smaller problem -> choices of the larger."""


def fold(problem: Problem, rounds: int = 2) -> tuple[Problem, Undo]:
    """Look-alikes share one variable whose prices are paid as often as there are members.

    Two nodes look alike if their kinds and trip counts agree and, `rounds` steps deep, so do their neighbourhoods (colour
    refinement, after Weisfeiler and Leman 1968). Bounded rounds keep the inner layers of a deep model one class whatever
    the depth. Nodes of kind None stay alone.
    """
    known = problem.structure.get(("fold", rounds))
    if known is None:
        known = problem.structure["fold", rounds] = _folding(problem, rounds)
    nodes = tuple([problem.nodes[first]._replace(times=times) for first, times in known.nodes])
    edges = tuple([problem.edges[n]._replace(tail=tail, head=head, times=times) for n, tail, head, times in known.edges])
    usages = tuple([usage._replace(nodes=tuple([known.colours[node] for node in usage.nodes])) for usage in problem.usages])
    folded = replace(problem, nodes=nodes, edges=edges, usages=usages, starts=())
    object.__setattr__(folded, "structure", known.structure)
    return folded, lambda choices: choices[known.index]


@dataclass(frozen=True)
class _Folding:
    """Which nodes and edges become one. `colours`: the class of every node, `index` as an array; `nodes`: per class its first
    node, and how often it is paid; `edges`: the first of each kind between two classes, its ends, and how often it is paid;
    `structure`: that of the folded problem."""

    colours: list[int]
    index: np.ndarray
    nodes: list[tuple[int, float]]
    edges: list[tuple[int, int, int, float]]
    structure: dict[Hashable, Any]


def _folding(problem: Problem, rounds: int) -> _Folding:
    colours = _colours(problem, rounds)
    first: dict[int, int] = {}
    for index, colour in enumerate(colours):
        first.setdefault(colour, index)
    times = [0.0] * len(first)
    for node, colour in zip(problem.nodes, colours, strict=True):
        times[colour] += node.times
    merged: dict[Hashable, tuple[int, int, int]] = {}
    paid: dict[Hashable, float] = {}
    for number, edge in enumerate(problem.edges):
        tail, head = colours[edge.tail], colours[edge.head]
        key = (tail, head, edge.kind if edge.kind is not None else ("edge", number))
        if key in merged:
            paid[key] += edge.times
        else:
            merged[key], paid[key] = (number, tail, head), edge.times
    nodes = [(first[colour], times[colour]) for colour in range(len(first))]
    return _Folding(colours, np.array(colours, dtype=np.int64), nodes, [(*merged[k], paid[k]) for k in merged], {})


def _colours(problem: Problem, rounds: int) -> list[int]:
    """A class number per node, numbered by first appearance."""
    known = problem.structure.get("colours")
    if known is None:
        table: dict[Hashable, int] = {}
        kinds = [(node.kind if node.kind is not None else ("node", i), node.times, node.options)
                 for i, node in enumerate(problem.nodes)]  # fmt: skip
        known = problem.structure["colours"] = [table.setdefault(kind, len(table)) for kind in kinds]
    colours, count = known, max(known, default=-1) + 1
    if rounds and problem.edges:
        owners, others, places, begins = _sides(problem)
        for _ in range(rounds):
            codes = places + np.array(colours)[others]
            seen = codes[np.lexsort((codes, owners))].tolist()
            fresh: dict[Hashable, int] = {}
            spans = zip(colours, begins, begins[1:], strict=False)
            colours = [fresh.setdefault((colour, *seen[begin:end]), len(fresh)) for colour, begin, end in spans]
            if len(fresh) == count:
                break
            count = len(fresh)
    return colours


def _sides(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Both ends of every edge: (the node; the other one; a number that tells side and kind, and leaves room for a colour; where
    the ends of each node begin, sorted by it)."""
    kinds: dict[Hashable, int] = {}
    tails, heads = (np.array([edge[end] for edge in problem.edges]) for end in (0, 1))
    named = [edge.kind if edge.kind is not None else ("edge", n) for n, edge in enumerate(problem.edges)]
    sides = 2 * len(problem.nodes) * np.array([kinds.setdefault(kind, len(kinds)) for kind in named])
    owners = np.concatenate([tails, heads])
    begins = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=len(problem.nodes)))])
    return owners, np.concatenate([heads, tails]), np.concatenate([sides, sides + len(problem.nodes)]), begins.tolist()


@dataclass(frozen=True)
class Tables:
    """Prices written out: `costs[i]` is a vector per variable, `pairs[(i, j)]`, i < j, a matrix; `ILLEGAL` or more is illegal."""

    costs: tuple[np.ndarray, ...]
    pairs: dict[tuple[int, int], np.ndarray]

    def price(self, options: np.ndarray) -> float:
        """The price of one option number per variable."""
        chosen = options.tolist()
        total = sum([float(cost[option]) for cost, option in zip(self.costs, chosen, strict=True)])
        return total + sum([float(matrix[chosen[i], chosen[j]]) for (i, j), matrix in self.pairs.items()])

    def neighbours(self) -> list[list[tuple[int, np.ndarray]]]:
        """Per variable, its neighbours with the pair's matrix, own option first."""
        near: list[list[tuple[int, np.ndarray]]] = [[] for _ in self.costs]
        for (i, j), matrix in self.pairs.items():
            near[i].append((j, matrix))
            near[j].append((i, matrix.T))
        return near


class Pricer:
    """Writes out tables of a problem, remembering prices by kind and by the fixed part of the choice.

    `known`: the pricer of another folding of the same problem, whose memory is shared.
    """

    def __init__(self, problem: Problem, known: Pricer | None = None) -> None:
        self.problem = problem
        self._vectors: dict[Hashable, tuple[np.ndarray, np.ndarray | None]] = known._vectors if known else {}
        self._matrices: dict[Hashable, np.ndarray] = known._matrices if known else {}
        self._names: dict[Hashable, int] = known._names if known else {}  # of kinds and of fixed parts: cheap keys
        self.options = np.array([node.options for node in problem.nodes], dtype=np.int64).reshape(-1, len(problem.axes))
        self._strides = np.cumprod(self.options, axis=1) // self.options
        self._kinds = self._named(node.kind if node.kind is not None else ("node", id(node.price)) for node in problem.nodes)
        self._edges = [edge for edge in problem.edges if edge.times]
        self._edge_kinds = self._named(
            ("kind", edge.kind) if edge.kind is not None else ("edge", id(edge.price)) for edge in self._edges
        )

    def along(
        self, axes: tuple[int, ...], choices: np.ndarray, alone: bool = False
    ) -> tuple[Tables, list[np.ndarray]]:
        """Some axes free in every node, the others fixed as in `choices` (nodes, axes); and per node what is open to it: of the
        options that nodes may take `alone`, if so, where nodes do so now."""
        free = list(axes)
        stays = choices.copy()
        stays[:, free] = 0
        numbers = (stays * self._strides).sum(1).tolist()
        fewer = [
            alone and node.alone is not None and all(row[axis] < node.alone[axis] for axis in free)
            for node, row in zip(self.problem.nodes, choices, strict=True)
        ]
        fixed: list[Hashable] = [(axes, number, few) for number, few in zip(numbers, fewer, strict=True)]
        opened: dict[tuple[int, ...], np.ndarray] = {}
        rows = []
        for node, row, few in zip(self.problem.nodes, stays, fewer, strict=True):
            most = node.alone if few and node.alone is not None else node.options
            counts = tuple([most[axis] for axis in free])
            if counts not in opened:
                opened[counts] = np.zeros((math.prod(counts), len(row)), dtype=np.int64)
                opened[counts][:, free] = all_rows(counts)
            rows.append(opened[counts] + row)
        return self._written(rows, fixed), rows

    def among(self, candidates: Sequence[np.ndarray]) -> Tables:
        """Each node free among some choices, (count, axes)."""
        return self._written(candidates, [rows.tobytes() for rows in candidates])

    def price(self, choices: np.ndarray) -> float:
        """The price of an assignment, (nodes, axes), as the tables count."""
        return evaluate(self.problem, choices)

    def whole(self, limit: int = 10**7) -> tuple[Tables, list[np.ndarray]]:
        """Every joint choice of every node, and the choices themselves; refuses above `limit` table entries."""
        counts = [int(np.prod(node.options)) for node in self.problem.nodes]
        size = sum(counts) + sum(counts[e.tail] * counts[e.head] for e in self.problem.edges)
        if size > limit:
            raise ValueError(f"writing out all joint choices takes {size:,} entries; the limit is {limit:,}")
        rows = [all_rows(node.options) for node in self.problem.nodes]
        return self._written(rows, [None] * len(rows)), rows

    def _written(self, rows: Sequence[np.ndarray], fixed: Sequence[Hashable]) -> Tables:
        """`rows`: the choices of each node; `fixed`: what tells them from other choices of a node of its kind."""
        nodes, edges, names = self.problem.nodes, self._edges, self._named(fixed)
        costs = []
        kinds = list(zip(self._kinds, names, strict=True))
        unknown = {key: i for i, key in enumerate(kinds) if key not in self._vectors}
        for key, vector in zip(unknown, node_prices([(nodes[i].price, rows[i]) for i in unknown.values()]), strict=True):
            legal = vector < ILLEGAL
            self._vectors[key] = (_finite(vector), None if legal.all() else legal)
        for node, key in zip(nodes, kinds, strict=True):
            vector, some = self._vectors[key]
            costs.append(node.times * vector if some is None else np.where(some, node.times * vector, ILLEGAL))
        matrices = self._matrices
        keys = [(kind, names[edge.tail], names[edge.head]) for kind, edge in zip(self._edge_kinds, edges, strict=True)]
        missing = {key: edge for key, edge in zip(keys, edges, strict=True) if key not in matrices}
        found = edge_prices([(edge.price, rows[edge.tail], rows[edge.head]) for edge in missing.values()])
        matrices.update(zip(missing, map(_finite, found), strict=True))
        pairs: dict[tuple[int, int], np.ndarray] = {}
        for key, (i, j, _, _, times) in zip(keys, edges, strict=True):
            matrix = matrices[key] if times == 1.0 else times * matrices[key]
            if i == j:
                costs[i] = costs[i] + matrix.diagonal()
            else:
                where, matrix = ((i, j), matrix) if i < j else ((j, i), matrix.T)
                pairs[where] = pairs[where] + matrix if where in pairs else matrix
        return Tables(tuple(costs), pairs)

    def _named(self, things: Iterable[Hashable]) -> list[int]:
        """A number for each, the same for equal ones."""
        names = self._names
        return [names.setdefault(thing, len(names)) for thing in things]


class ChargedPricer(Pricer):
    """A pricer in whose tables usages are paid for too, so much per unit: a price of usages is a multiplier of their limit."""

    def __init__(self, problem: Problem, known: Pricer | None = None) -> None:
        super().__init__(problem, known)
        groups: dict[Hashable, int] = {}
        self._of = np.array(
            [groups.setdefault((usage.nodes, id(usage.amount)), len(groups)) for usage in problem.usages], dtype=np.int64
        )
        self._groups: list[Usage] = [problem.usages[n] for n in np.unique(self._of, return_index=True)[1].tolist()]
        self._charged: list[tuple[Usage, float]] = []
        self._taken: dict[Hashable, np.ndarray] = known._taken if isinstance(known, ChargedPricer) else {}
        self._paid: np.ndarray = np.zeros(0)
        self._meter = Meter(problem)

    def charge(self, spans: np.ndarray) -> None:
        """From now on a unit of each usage costs so many seconds: (usages,), see `Meter.spans`."""
        paid = np.bincount(self._of, spans, len(self._groups))
        self._charged = [(usage, price) for usage, price in zip(self._groups, paid.tolist(), strict=True) if price > 0]
        self._paid = spans

    def price(self, choices: np.ndarray) -> float:
        return evaluate(self.problem, choices) + float(self._paid @ self._meter.amounts(choices))

    def _written(self, rows: Sequence[np.ndarray], fixed: Sequence[Hashable]) -> Tables:
        tables = super()._written(rows, fixed)
        costs, pairs = list(tables.costs), dict(tables.pairs)
        keys: list[Hashable] = [(id(usage.amount), *[fixed[node] for node in usage.nodes]) for usage, _ in self._charged]
        missing = {key: usage for key, (usage, _) in zip(keys, self._charged, strict=True) if key not in self._taken}
        self._ask(missing, rows)
        for key, (usage, price) in zip(keys, self._charged, strict=True):
            paid = price * self._taken[key]
            i, j = usage.nodes[0], usage.nodes[-1]
            if len(usage.nodes) == 1:
                costs[i] = costs[i] + paid
            elif i == j:
                costs[i] = costs[i] + paid.diagonal()
            else:
                where, paid = ((i, j), paid) if i < j else ((j, i), paid.T)
                pairs[where] = pairs[where] + paid if where in pairs else paid
        return Tables(tuple(costs), pairs)

    def _ask(self, missing: Mapping[Hashable, Usage], rows: Sequence[np.ndarray]) -> None:
        """Remember amounts for whole arrays of choices."""
        pairs = {key: usage for key, usage in missing.items() if len(usage.nodes) == 2}
        found = edge_prices([(usage.amount, rows[usage.nodes[0]], rows[usage.nodes[-1]]) for usage in pairs.values()])
        self._taken.update(zip(pairs, found, strict=True))
        for key, usage in missing.items():
            if len(usage.nodes) == 1:
                self._taken[key] = taken(usage, rows[usage.nodes[0]])


def _finite(values: np.ndarray) -> np.ndarray:
    return np.minimum(values, ILLEGAL)


def dominance(tables: Tables) -> tuple[Tables, Undo]:
    """Strike out illegal options and those that another option of the same variable beats whatever the others do.

    Goldstein's criterion (1994): i goes if some j has c_i - c_j + sum over neighbours of min over k (m_ik - m_jk) >= 0.
    Exact: at least one optimum survives.
    """
    near = tables.neighbours()
    kept = [np.flatnonzero(cost < ILLEGAL) for cost in tables.costs]
    queue, waiting = deque(range(len(kept))), [True] * len(kept)
    while queue:
        i = queue.popleft()
        waiting[i] = False
        mine = kept[i]
        if len(mine) < 2:
            continue
        cost = tables.costs[i][mine]
        ahead = cost[:, None] - cost[None, :]
        for j, matrix in near[i]:
            part = _finite(matrix[np.ix_(mine, kept[j])])
            ahead += (part[:, None, :] - part[None, :, :]).min(-1)
        stay = _undominated(ahead)
        if len(stay) < len(mine):
            kept[i] = mine[stay]
            for j, _ in near[i]:
                if not waiting[j]:
                    waiting[j] = True
                    queue.append(j)
    smaller = Tables(
        tuple(cost[k] for cost, k in zip(tables.costs, kept, strict=True)),
        {(i, j): matrix[np.ix_(kept[i], kept[j])] for (i, j), matrix in tables.pairs.items()},
    )
    return smaller, lambda options: np.array([k[o] for k, o in zip(kept, options, strict=True)], dtype=np.int64)


def _undominated(ahead: np.ndarray) -> np.ndarray:
    """Indices that stay; of two that dominate each other the first does."""
    count = len(ahead)
    alive = np.ones(count, dtype=bool)
    beaten = ahead >= 0
    np.fill_diagonal(beaten, False)
    for i in range(count - 1, -1, -1):
        if (beaten[i] & alive).any():
            alive[i] = False
    return np.flatnonzero(alive)


def eliminate(tables: Tables, limit: float = math.inf) -> tuple[Tables, list[int], Undo]:
    """Remove variables with at most two neighbours, as OptCNN does (Jia et al., ICML 2018); exact.

    `limit`: table entries; a variable whose elimination needs more stays. Returns what is left, the variables it is left of, and
    an undo for options of those.
    """
    costs = [_finite(cost) for cost in tables.costs]
    near: list[dict[int, np.ndarray]] = [{} for _ in costs]
    for (i, j), matrix in tables.pairs.items():
        near[i][j], near[j][i] = _finite(matrix), _finite(matrix).T
    gone: list[tuple[int, tuple[int, ...], np.ndarray]] = []
    alive = [True] * len(costs)
    queue = deque(i for i in range(len(costs)) if len(near[i]) <= 2)
    while queue:
        v = queue.popleft()
        around = tuple(near[v])
        if not alive[v] or len(around) > 2 or math.prod([len(costs[w]) for w in (v, *around)]) > limit:
            continue
        alive[v] = False
        if not around:
            gone.append((v, (), np.array([costs[v].argmin()])))
            continue
        if len(around) == 1:
            total = near[v][around[0]].T + costs[v]  # (neighbour, own)
            costs[around[0]] = costs[around[0]] + total.min(-1)
        else:
            a, b = around
            total = near[v][a].T[:, None, :] + near[v][b].T[None, :, :] + costs[v]
            joint = total.min(-1)
            near[a][b] = near[a][b] + joint if b in near[a] else joint
            near[b][a] = near[a][b].T
        gone.append((v, around, total.argmin(-1)))
        for w in around:
            del near[w][v]
            queue.append(w)
    left = [i for i, still in enumerate(alive) if still]
    place = {v: n for n, v in enumerate(left)}
    pairs = {(place[i], place[j]): m for i in left for j, m in near[i].items() if i < j}

    def undo(options: np.ndarray) -> np.ndarray:
        full = np.zeros(len(costs), dtype=np.int64)
        full[left] = options
        for v, around, best in reversed(gone):
            full[v] = best[tuple(full[w] for w in around)] if around else best[0]
        return full

    return Tables(tuple(costs[i] for i in left), pairs), left, undo
