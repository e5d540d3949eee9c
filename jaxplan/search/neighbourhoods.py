"""Neighbourhoods of an assignment re-opened within a limit: what multipliers miss, where the best lies off every mixture.

Some nodes are re-opened, all others stay, and elimination finds the best of them at several prices of usage at once; what exceeds
the limit gets a price at the step where it does so most, just as high as makes it no gain, and is looked for again. The interval
solver (`solve/`) lives on the same moves over forests and on the same merging of assignments; here a neighbourhood is whatever
elimination can take, since problems are small. Deterministic: the random numbers start from one seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxplan.buckets import Bucket
from jaxplan.problem import Meter, Node, Problem, all_rows, edge_prices
from jaxplan.reduce import ILLEGAL, Pricer

ENTRIES = 300_000
"""Table entries up to which all options of every node are written out; else those nearest to what is known."""
CELLS = 1 << 12
"""Entries of a table that eliminating a node may build, at one price; where more were needed, nodes stay as they are."""
PRICES = 8
"""Prices of usage at which a neighbourhood is solved at once."""
SPREAD = 1.5
"""The multipliers are scaled by factors of up to exp(SPREAD) each way; and the last are none at all."""
CUTS = 3
"""How often steps at which the limit is exceeded get a price."""
OVERSHOOT = 1.05
"""By what factor such a price is higher than what makes a gain none."""
IDLE = 32
"""Neighbourhoods re-opened in a row without a gain before it is given up."""
MOST = 256
"""Neighbourhoods in all."""
OPENED = 2_000
"""Nodes re-opened, counted each time, in all neighbourhoods of one search."""
FORCED = 0.5
"""How often a node of a neighbourhood has to take another option at each of the prices: what lies off every mixture."""
CENTRES = 3
"""Nodes around which one grows."""
BETTER = 1e-9
"""A gain below this fraction is none."""
REPAIRS = 2
"""Assignments above the limit from which a way below it is looked for."""
KEPT = 2
"""Of what is within the limit then, how many are improved."""
LENIENT, LEAST, GROWTH, PATIENT, TURNS = 0.1, 0.02, 2.0, 4, 100
"""What exceeding the limit costs per unit at first, in sums of multipliers, these being taken for no less than so much of what
the assignment costs per unit of its peak; its growth, after so many neighbourhoods; and how many of these in all."""
SEED = 0


class Written:
    """Prices and usages of a problem over some options per node, in flat arrays. `rows`: the options, (count, axes) per node."""

    def __init__(self, problem: Problem, rows: Sequence[np.ndarray]) -> None:
        self.rows, self.meter = list(rows), Meter(problem)
        self.opened = 0  # nodes re-opened so far: what the time goes by
        self.free = [v for v, options in enumerate(self.rows) if len(options) > 1]
        tables = Pricer(problem).among(self.rows)
        self.costs = tables.costs
        self.pairs = list(tables.pairs.items())
        shared: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for number, usage in enumerate(problem.usages):
            shared.setdefault((usage.nodes, id(usage.amount)), []).append(number)
        self.owners: list[tuple[int, int]] = []
        self.amounts: list[np.ndarray] = []
        members: list[list[int]] = []
        two = {key: found for key, found in shared.items() if len(key[0]) == 2}
        asked = [(problem.usages[found[0]].amount, self.rows[key[0][0]], self.rows[key[0][1]]) for key, found in two.items()]
        tables_of = dict(zip(two, edge_prices(asked), strict=True))
        for (nodes, price), found in shared.items():
            amount: Any = problem.usages[found[0]].amount
            table = tables_of[nodes, price] if len(nodes) == 2 else amount(self.rows[nodes[0]])
            i, j = nodes[0], nodes[-1]
            if table.ndim == 2 and i == j:
                table = table.diagonal()
            if table.any():
                self.owners.append((min(i, j), max(i, j)))
                self.amounts.append(table.T if i > j else table)
                members.append(found)
        self._usages = _Flat([(a, b, table) for (a, b), table in zip(self.owners, self.amounts, strict=True)], self.rows)
        self._costs = _Flat([(v, v, cost) for v, cost in enumerate(self.costs)], self.rows)
        self._links = _Flat([(a, b, table) for (a, b), table in self.pairs], self.rows)
        self._group = np.repeat(np.arange(len(members)), [len(found) for found in members])
        self._member = np.array([number for found in members for number in found], dtype=np.int64)
        self._nothing = self.meter.levels(np.zeros(len(problem.usages)))
        self.near: list[set[int]] = [set() for _ in self.rows]
        for a, b in (*[ends for ends, _ in self.pairs], *self.owners):
            if a != b:
                self.near[a].add(b)
                self.near[b].add(a)
        self._incident: list[list[int]] = [[] for _ in self.rows]
        for number, ((a, b), _) in enumerate(self.pairs):
            self._incident[a].append(number)
            self._incident[b].append(number)
        self._taking: list[list[int]] = [[] for _ in self.rows]
        for number, (a, b) in enumerate(self.owners):
            for v in {a, b}:
                self._taking[v].append(number)

    def seconds(self, chosen: np.ndarray) -> float:
        """The price of one position per node; `ILLEGAL` or more is illegal."""
        return float(self._costs.at(chosen).sum() + self._links.at(chosen).sum())

    def levels(self, chosen: np.ndarray) -> np.ndarray:
        """(steps,) what one position per node takes."""
        change = np.zeros(self.meter.steps + 1)
        used = self._usages.at(chosen)[self._group]
        np.add.at(change, self.meter.begins[self._member], used)
        np.add.at(change, self.meter.ends[self._member], -used)
        return np.cumsum(change)[:-1] + self._nothing

    def choices(self, chosen: np.ndarray) -> np.ndarray:
        """(nodes, axes) of one position per node."""
        return np.array([rows[position] for rows, position in zip(self.rows, chosen, strict=True)], dtype=np.int64)

    def positions(self, choices: np.ndarray) -> np.ndarray:
        """One position per node of an assignment whose options are all here."""
        found = [int((rows == own).all(1).argmax()) for rows, own in zip(self.rows, choices, strict=True)]
        return np.array(found, dtype=np.int64)

    def spent(self, prices: np.ndarray) -> np.ndarray:
        """(prices, groups of usages) what a unit costs over all its lifetimes, at prices per step, (prices, steps)."""
        sums = np.concatenate([np.zeros((len(prices), 1)), np.cumsum(prices, axis=1)], axis=1)
        spans = sums[:, self.meter.ends[self._member]] - sums[:, self.meter.begins[self._member]]
        found = np.zeros((len(prices), len(self.owners)))
        np.add.at(found.T, self._group, spans.T)
        return found

    def pairs_of(self, v: int) -> list[tuple[tuple[int, int], np.ndarray]]:
        """The tables of prices that a node shares with another, and whose they are."""
        return [self.pairs[number] for number in self._incident[v]]

    def alive(self) -> tuple[np.ndarray, np.ndarray]:
        """((groups of usages, steps) how many of each live at a step, (steps,) what is taken whatever is chosen). Steps at which
        the same live are one, and take the most of them."""
        live = np.zeros((len(self.owners), self.meter.steps))
        for group, usage in zip(self._group.tolist(), self._member.tolist(), strict=True):
            live[group, self.meter.begins[usage] : self.meter.ends[usage]] += 1
        found, same = np.unique(live, axis=1, return_inverse=True)
        taken = np.full(found.shape[1], -math.inf)
        np.maximum.at(taken, same.ravel(), self._nothing)
        return found, taken

    def users(self, step: int) -> np.ndarray:
        """Nodes that may take something at a step."""
        begins, ends = self.meter.begins[self._member], self.meter.ends[self._member]
        alive = np.unique(self._group[(begins <= step) & (step < ends)])
        return np.unique(np.array([self.owners[number] for number in alive.tolist()], dtype=np.int64))

    def best(
        self, chosen: np.ndarray, opened: Sequence[int], spent: np.ndarray, forced: tuple[int, np.ndarray] | None = None
    ) -> np.ndarray:
        """(prices, nodes) the best positions of the nodes opened at prices of usages, (prices, groups), the others as they are.
        Where tables grew too large some of the opened ones keep theirs too. `forced`: a node, and which position it has to take
        at each of the prices, -1 for any."""
        self.opened += len(opened)
        place = {v: number for number, v in enumerate(opened)}
        order = {v: np.concatenate([[chosen[v]], np.delete(np.arange(len(self.rows[v])), chosen[v])]) for v in opened}
        costs = [self.costs[v][order[v]][None] for v in opened]
        if forced is not None:
            v, wanted = forced
            barred = np.where((wanted[:, None] >= 0) & (np.arange(len(self.rows[v])) != wanted[:, None]), ILLEGAL, 0.0)
            costs[place[v]] = costs[place[v]] + barred[:, order[v]]
        pairs: dict[tuple[int, int], np.ndarray] = {}

        def put(a: int, b: int, table: np.ndarray) -> None:
            """Add a table, (prices, a's positions, b's positions) or of one node."""
            if a != b and a in place and b in place:
                table = table[:, order[a]][:, :, order[b]]
                key = (place[a], place[b])
                if key[0] > key[1]:
                    key, table = (key[1], key[0]), table.swapaxes(1, 2)
                pairs[key] = pairs[key] + table if key in pairs else table
            elif a in place:
                costs[place[a]] = costs[place[a]] + (table if a == b else table[:, :, chosen[b]])[:, order[a]]
            else:
                costs[place[b]] = costs[place[b]] + table[:, chosen[a]][:, order[b]]

        for number in sorted({n for v in opened for n in self._incident[v]}):
            (a, b), table = self.pairs[number]
            put(a, b, table[None])
        for number in sorted({n for v in opened for n in self._taking[v]}):
            price = spent[:, number]
            if price.any():
                a, b = self.owners[number]
                table = self.amounts[number]
                put(a, b, price.reshape(-1, *[1] * table.ndim) * table)
        bucket = Bucket(costs)
        for nodes, table in pairs.items():
            bucket.put(nodes, table)
        found = np.tile(chosen, (len(spent), 1))
        solved = bucket.solve(CELLS, len(spent))
        for v, number in place.items():
            found[:, v] = order[v][solved[number]]
        return found


class _Flat:
    """Tables over one node or two, all in one array."""

    def __init__(self, tables: Sequence[tuple[int, int, np.ndarray]], rows: Sequence[np.ndarray]) -> None:
        sizes = [table.size for _, _, table in tables]
        self._begin = (np.cumsum(sizes) - sizes).astype(np.int64)
        self._first = np.array([a for a, _, _ in tables], dtype=np.int64)
        self._second = np.array([b for _, b, _ in tables], dtype=np.int64)
        self._stride = np.array([0 if a == b else len(rows[b]) for a, b, _ in tables], dtype=np.int64)
        self._cells = np.concatenate([table.ravel() for _, _, table in tables]) if tables else np.zeros(0)

    def at(self, chosen: np.ndarray) -> np.ndarray:
        """The entry of each table at one position per node."""
        return self._cells[self._begin + chosen[self._first] * self._stride + chosen[self._second]]


def options_near(problem: Problem, known: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Per node what may be chosen: all legal options where these are few, else those of known assignments, (nodes, axes), and
    what differs from the first one's along one axis, or no more than the former."""
    every = legal_options(problem)
    if every is not None:
        return every
    seen = _seen(known)
    wide = []
    for node, rows in zip(problem.nodes, seen, strict=True):
        one = []
        for axis, count in enumerate(node.options):
            changed = np.tile(rows[0], (count, 1))
            changed[:, axis] = np.arange(count)
            one.append(changed)
        either = np.array(list(dict.fromkeys(map(tuple, np.concatenate([rows, *one]).tolist()))))
        wide.append(_legal(node, either))
    return wide if _are_few(problem, [len(rows) for rows in wide]) else seen


def legal_options(problem: Problem) -> list[np.ndarray] | None:
    """Per node all its legal options, (count, axes); None where these are not few."""
    if not _are_few(problem, [math.prod(node.options) for node in problem.nodes]):
        return None
    known: dict[tuple[int, tuple[int, ...]], np.ndarray] = {}
    found = []
    for node in problem.nodes:
        key = (id(node.price), node.options)
        if key not in known:
            known[key] = _legal(node, all_rows(node.options))
        found.append(known[key])
    return found


def _legal(node: Node, rows: np.ndarray) -> np.ndarray:
    return rows[np.isfinite(node.price(rows))]


def _are_few(problem: Problem, counts: Sequence[int]) -> bool:
    """Whether tables over so many options per node are written out."""
    pairs = [(edge.tail, edge.head) for edge in problem.edges if edge.times]
    return sum([counts[i] * counts[j] for i, j in pairs]) <= ENTRIES


def _seen(known: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Per node its options in some assignments, in order."""
    return [np.array(list(dict.fromkeys(map(tuple, rows)))) for rows in np.stack(known, axis=1).tolist()]


def merged(problem: Problem, known: Sequence[np.ndarray], multipliers: np.ndarray) -> list[np.ndarray]:
    """The best assignments at several prices of usage whose options are each that of one known, (nodes, axes)."""
    written = Written(problem, _seen(known))
    first = np.zeros(len(written.rows), dtype=np.int64)
    if not written.free:
        return []
    prices = _factors()[:, None] * multipliers
    found = {chosen.tobytes(): chosen for chosen in written.best(first, written.free, written.spent(prices))}
    return [written.choices(chosen) for chosen in found.values()]


def _reopened(written: Written, best: _State, multipliers: np.ndarray, allowed: float, most: int) -> _State:
    """A state at least as good: a lower peak while that is above `allowed`, then a lower price.

    Random neighbourhoods are re-opened until many in a row gain nothing.
    """
    rng = np.random.default_rng(SEED)
    idle = 0
    for _ in range(MOST if written.free else 0):
        found = _improved(written, best, _grown(written, best, rng), multipliers, allowed, rng)
        idle = 0 if found is not best else idle + 1
        best = found
        if idle >= IDLE or written.opened > most:
            break
    return best


class _State:
    """Positions, what they cost, what they take at every step, and what of these is to be lowered first."""

    def __init__(self, written: Written, chosen: np.ndarray, allowed: float) -> None:
        self.chosen, self.seconds, self.level = chosen, written.seconds(chosen), written.levels(chosen)
        self.peak = float(self.level.max(initial=-math.inf))
        self.over = max(self.peak, allowed)

    def before(self, other: _State) -> bool:
        """Whether it is better by more than rounding."""
        if self.seconds >= ILLEGAL or self.over > other.over:
            return False
        return self.over < other.over * (1 - BETTER) or self.seconds < other.seconds * (1 - BETTER)


def _grown(written: Written, state: _State, rng: np.random.Generator) -> list[int]:
    """Nodes around a few centres, some of which take something where most is taken; their number is random, small ones as
    likely as large ones."""
    free = written.free
    wanted = round(math.exp(rng.random() * math.log(len(free) + 1)))
    steps = np.flatnonzero(state.level >= state.peak * (1 - 0.1 * rng.random()))
    users = written.users(int(steps[rng.integers(len(steps))])) if len(steps) else np.zeros(0, dtype=np.int64)
    ahead = [free[int(rng.integers(len(free)))]]
    if len(users):
        ahead += users[rng.integers(len(users), size=CENTRES - 1)].tolist()
    inside: dict[int, None] = {}
    while ahead and len(inside) < wanted:
        v = ahead.pop(int(rng.integers(len(ahead))))
        if v in inside or len(written.rows[v]) < 2:
            continue
        inside[v] = None
        ahead += sorted(written.near[v] - inside.keys())
    return list(inside) or [free[int(rng.integers(len(free)))]]


def _improved(
    written: Written, state: _State, opened: Sequence[int], multipliers: np.ndarray, allowed: float, rng: np.random.Generator
) -> _State:
    """The best of a neighbourhood that is met at several prices, or the state itself."""
    prices = _factors()[:, None] * multipliers
    v = opened[int(rng.integers(len(opened)))]
    wanted = rng.permutation(max(PRICES, len(written.rows[v])))[:PRICES]
    wanted = np.where((wanted < len(written.rows[v])) & (wanted != state.chosen[v]), wanted, -1)
    forced = (v, wanted) if rng.random() < FORCED else None
    best = state
    for _ in range(CUTS):
        tried: dict[bytes, _State] = {}
        raised = False
        for k, chosen in enumerate(written.best(state.chosen, opened, written.spent(prices), forced)):
            key = chosen.tobytes()
            if key not in tried:
                tried[key] = _State(written, chosen, allowed)
            found = tried[key]
            if found.before(best):
                best = found
            limit = max(allowed, state.peak) if state.peak > allowed else allowed
            if found.over > limit * (1 + BETTER) and len(found.level):
                worst = int(found.level.argmax())
                growth = found.level[worst] - state.level[worst]
                gain = state.seconds - found.seconds
                if growth > 0 and gain > 0:
                    prices[k, worst] += OVERSHOOT * gain / growth
                    raised = True
        if not raised:
            break
    return best


def _repaired(written: Written, state: _State, multipliers: np.ndarray, allowed: float, most: int) -> _State:
    """Where a way leads on which exceeding the limit becomes ever dearer: within the limit, if it gets there."""
    rng = np.random.default_rng(SEED)
    penalty = LENIENT * max(float(multipliers.sum()), LEAST * state.seconds / max(allowed, state.peak))
    scale = np.linspace(2.0, 0.5, PRICES)
    for turn in range(TURNS if written.free else 0):
        prices = _factors()[:, None] * multipliers
        prices[:, int(state.level.argmax())] += penalty * scale
        opened = _grown(written, state, rng)
        found = [_State(written, chosen, allowed) for chosen in written.best(state.chosen, opened, written.spent(prices))]
        best = min(found, key=lambda one: one.seconds + penalty * one.over)
        if best.seconds + penalty * best.over < state.seconds + penalty * state.over:
            state = best
        if state.over <= allowed * (1 + BETTER) or written.opened > most:
            break
        if turn % PATIENT == PATIENT - 1:
            penalty *= GROWTH
    return state


def _factors() -> np.ndarray:
    """(prices,) in multipliers."""
    factors = np.exp(np.linspace(SPREAD, -SPREAD, PRICES))
    factors[-1] = 0.0
    return factors


def within_neighbourhoods(
    problem: Problem, known: Sequence[np.ndarray], multipliers: np.ndarray, allowed: float
) -> list[np.ndarray]:
    """Better assignments than known ones, (nodes, axes): the first of these, and what a way leads to from the next few that
    exceed what is allowed, each re-opened. `multipliers`: (steps,) seconds per unit."""
    written = Written(problem, options_near(problem, known))
    starts = [_State(written, written.positions(known[0]), allowed)]
    above = [_State(written, written.positions(choices), allowed) for choices in known[1:]]
    for number, state in enumerate([state for state in above if state.peak > allowed][:REPAIRS], 1):
        starts.append(_repaired(written, state, multipliers, allowed, OPENED * number // (REPAIRS + KEPT)))
    starts, spare = sorted(starts, key=lambda state: (state.over, state.seconds))[:KEPT], OPENED - written.opened
    ended = []
    for number, start in enumerate(starts, 1):
        ended.append(_reopened(written, start, multipliers, allowed, OPENED - spare + spare * number // len(starts)))
    return [written.choices(state.chosen) for state in ended]
