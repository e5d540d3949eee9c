"""Memory as a constraint of the problem: what choices take over lifetimes, held against a limit.

A sum over choices cannot tell all that `memory.py` knows (which copies are shared, what lies in an output's buffer or on the
chip), so it is made to agree where it matters: at one plan, at every place of the order, the difference is reserved.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from jaxplan.cost.build import Modelled
from jaxplan.cost.clusters import Combines
from jaxplan.cost.lifetimes import Lifetimes, certain_lives, lifetimes
from jaxplan.cost.memory import Local, Memory
from jaxplan.cost.price import AxisOptions, combine_part, write_layout
from jaxplan.cost.prices import BESIDE, GATHERED, MOVED, PIECES, SENT, ReshardPrice, Reshards
from jaxplan.graph import Combine
from jaxplan.layout import Layout, shards
from jaxplan.problem import Asked, Meter, Problem, Usage

DEAR = 1e3
"""How many times its price a gather of state costs where it is not wanted. A program may insist on one, so it stays possible."""


def within(
    modelled: Modelled, limit: float, like: Sequence[tuple[np.ndarray, Memory]], donated: Sequence[bool],
    starts: Sequence[np.ndarray] = (), waiting: np.ndarray | None = None,
) -> Problem:  # fmt: skip
    """The problem with bytes per device as usages: at most `limit` at every place of the order of operators.

    `modelled`: with nothing following. `like`: plans, as choices per cluster, and their memory: usages tell no less than the true
    peak of these, and what is stored at all is as in the first. `starts`: more choices per cluster that are known. `waiting`: a
    plan in which products wait for state to be gathered; then here nothing does, and gathering any takes as much as waiting takes
    there. Raises ValueError where clusters follow.
    """
    if modelled.follows:
        raise ValueError("usages are for a problem in which no cluster follows another: model(..., follow=False)")
    lives = lifetimes(modelled, like[0][0], donated, waiting is not None)
    problem = modelled.problem.within(limit, _usages(modelled, lives))
    meter, reserved = Meter(problem), np.full(lives.places, -np.inf)
    levels = [meter.levels(meter.amounts(choices))[: lives.places] for choices, _ in like]
    waits, late = _waiting(modelled, lives, waiting, donated) if waiting is not None else ([], np.zeros(lives.places))
    for (choices, memory), taken in zip(like, levels, strict=True):
        more = memory.over_all(lives.sequence)
        more[: len(taken)] -= taken
        ends = [[choices[node][None] for node in usage.nodes] for usage in waits]
        if any(float(usage.amount(*rows)[0, 0]) for usage, rows in zip(waits, ends, strict=True)):
            more -= late
        reserved = np.maximum(reserved, more)
    starts = (*[choices for choices, _ in like], *starts)
    return modelled.problem.within(limit, (*problem.usages, *waits), tuple(reserved.tolist()), starts)


def without_gathers(modelled: Modelled) -> Problem:
    """The problem where gathering state at the end of a call is so dear that it is done only if it must be: new values are left
    as the old ones came, or are cut or exchanged to lie so."""
    graph, never = modelled.graph, dict[int, Never]()
    state = {(graph.outputs[output], graph.inputs[position]) for output, position in graph.ties}
    edges, family = list(modelled.problem.edges), dict[int, Nevers]()
    for number, (reading, edge) in enumerate(zip(modelled.readings, edges, strict=True)):
        price, writes = edge.price, graph.clusters[reading.reader].writes
        if isinstance(price, ReshardPrice) and any((reading.tensor, write.tensor) in state for write in writes):
            nevers = family.setdefault(id(price.family), Nevers(price.family))
            own = never.setdefault(id(price), Never(nevers, price))
            edges[number] = edge._replace(price=own, kind=("no gather", edge.kind))
    return replace(modelled.problem, edges=tuple(edges))


def certainly_within(modelled: Modelled, limit: float, donated: Sequence[bool]) -> Problem:
    """The problem with those bytes per device as usages that every plan takes at least: whatever fits is within its limit, so a
    bound of it holds for all plans that fit. Tensors are taken without padding, and rounded where they can be."""
    lives, places = certain_lives(modelled, donated)
    graph, numbers, found, known = modelled.graph, modelled.numbers, list[Usage](), dict[Hashable, Held]()
    given = set(graph.inputs)

    def local(tensor: int, layout: Layout | None) -> float:
        about = graph.tensors[tensor]
        rounded = 1.0 if tensor in given else min(1.0, numbers.machine.rounded_share(about.dtype))
        return rounded * about.nbytes / (shards(layout, numbers.sizes) if layout is not None else 1)

    for index, (cluster, options) in enumerate(zip(graph.clusters, modelled.options, strict=True)):
        for write in cluster.writes:
            about = graph.tensors[write.tensor]
            for life in lives.get(write.tensor, ()):
                key = (id(options), write.leads, about.shape, about.dtype, write.tensor in given)
                if key not in known:
                    known[key] = Held(options, write.leads, write.tensor, life.share, local)
                found.append(Usage((index,), known[key], life.first, life.last + 1))
    return modelled.problem.within(limit, tuple(found), (0.0,) * places)


def _waiting(
    modelled: Modelled, lives: Lifetimes, choices: np.ndarray, donated: Sequence[bool]
) -> tuple[list[Usage], np.ndarray]:
    """(for each new value of state, what gathering it takes while products wait behind it, where in `lives` none does; that at
    every place): as much more as the plan given takes. One gathering is enough for that; all of them are charged."""
    late = np.zeros(lives.places)
    for prompt, sign in ((False, 1.0), (True, -1.0)):
        meter = Meter(replace(modelled.problem, usages=_usages(modelled, lifetimes(modelled, choices, donated, prompt))))
        level = meter.levels(meter.amounts(choices))[: lives.places]
        late[: len(level)] += sign * level
    late = np.maximum(late, 0.0)
    begins = np.flatnonzero(np.diff(late, prepend=0.0))
    if not len(begins):  # nothing takes more for it
        return [], late
    found, known = [], dict[Hashable, Waiting]()
    for reading, edge in zip(modelled.readings, modelled.problem.edges, strict=True):
        if (reading.tensor, reading.reader) in lives.ties and isinstance(edge.price, ReshardPrice):
            for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), lives.places], strict=True):
                nbytes = float(late[begin])
                if nbytes > 0:
                    amount = known.setdefault((id(edge.price), nbytes), Waiting(edge.price, nbytes))
                    found.append(Usage((edge.tail, edge.head), amount, begin, end))
    return found, late


def _usages(modelled: Modelled, lives: Lifetimes) -> tuple[Usage, ...]:
    graph, numbers = modelled.graph, modelled.numbers
    combines = Combines(modelled.setting, numbers, max([len(tensor.shape) for tensor in graph.tensors], default=0))
    known: dict[Hashable, Held | Partial | Copy] = {}
    found = []
    for index, (cluster, options) in enumerate(zip(graph.clusters, modelled.options, strict=True)):
        for write in (*cluster.writes, *cluster.inner):
            for life in lives.held.get(write.tensor, ()):
                key = ("held", id(options), write.leads, life.share, lives.stored(write.tensor))
                if key not in known:
                    known[key] = Held(options, write.leads, write.tensor, life.share, lives.local)
                found.append(Usage((index,), known[key], life.first, life.last + 1))
        for combine in cluster.combines:
            for scattered, those in ((False, lives.partial), (True, lives.scattered)):
                life = those.get(combine.operator)
                if life is not None and combine.result.tensor >= 0:
                    nbytes = numbers.nbytes(combine.result.tensor)
                    key = ("partial", id(options), combine.over, combine.scatterable, combine.result.leads, nbytes, scattered)
                    if key not in known:
                        known[key] = Partial(options, combine, nbytes, combines, scattered)
                    found.append(Usage((index,), known[key], life.first, life.last + 1))
    copies: dict[int, Copies] = {}
    for reading, edge in zip(modelled.readings, modelled.problem.edges, strict=True):
        key, price = (reading.tensor, reading.reader), edge.price
        if not isinstance(price, ReshardPrice):
            continue
        made = [(SENT, life) for life in lives.copied.get(key, ())]
        others = ((MOVED, lives.handed), (GATHERED, lives.gathered), (BESIDE, lives.beside), (PIECES, lives.pieces))
        made += [(makes, those[key]) for makes, those in others if key in those]
        for makes, life in made:
            nbytes = life.share * reading.share * numbers.nbytes(reading.tensor)
            about = ("copy", id(price), makes, nbytes)
            if about not in known:
                known[about] = Copy(copies.setdefault(id(price.family), Copies(price.family)), price, nbytes, makes)
            found.append(Usage((edge.tail, edge.head), known[about], life.first, life.last + 1))
    return tuple(found)


class Held:
    """Bytes per device of what a cluster leaves, for rows of its option numbers."""

    def __init__(self, options: AxisOptions, leads: tuple[int, ...], tensor: int, share: float, local: Local) -> None:
        """`share`: of the bytes, what counts; `local`: bytes per device of a tensor in a layout."""
        self._of = [np.array([write_layout(leads, (option,))[0] for option in axis], dtype=np.int64) for axis in options]
        self._tensor, self._share, self._local = tensor, share, local
        self._known: dict[Layout, float] = {}

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        layouts = list(zip(*[of[rows[:, axis]].tolist() for axis, of in enumerate(self._of)], strict=True))
        for layout in set(layouts) - self._known.keys():
            self._known[layout] = self._share * self._local(self._tensor, layout)
        return np.array([self._known[layout] for layout in layouts])


class Partial:
    """Bytes per device of a partial result before it is combined, for rows of its cluster's option numbers; or only of one that
    is `scattered`."""

    def __init__(self, options: AxisOptions, combine: Combine, nbytes: float, combines: Combines, scattered: bool) -> None:
        self._parts = [[combine_part(combine, option) for option in axis] for axis in options]
        self._nbytes, self._combines, self._scattered = nbytes, combines, scattered
        self._known: dict[tuple[int, ...], float] = {}

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        found = []
        for row in map(tuple, rows.tolist()):
            if row not in self._known:
                parts = tuple([axis[option] for axis, option in zip(self._parts, row, strict=True)])
                self._known[row] = self._nbytes * self._combines.share(parts, self._scattered)
            found.append(self._known[row])
        return np.array(found)


class Copies:
    """Bytes per device of copies in other layouts, for many readings in one go."""

    def __init__(self, reshards: Reshards) -> None:
        self._reshards = reshards

    def prices(self, asked: Sequence[Asked]) -> list[np.ndarray]:
        """A matrix of bytes for each (`Copy`, options of the writer, options of the reader)."""
        questions = [(amount.of, tails, heads) for amount, tails, heads in asked]
        shares = self._reshards.shares(questions, [amount.makes for amount, _, _ in asked])
        return [amount.nbytes * share for (amount, _, _), share in zip(asked, shares, strict=True)]


class Copy(NamedTuple):
    """Bytes per device of a tensor once more, in the layout that a reader wants. `of`: the price of the exchange; `nbytes`: of
    the whole tensor; `makes`: which exchanges make one."""

    family: Copies
    of: ReshardPrice
    nbytes: float
    makes: int

    def __call__(self, tails: np.ndarray, heads: np.ndarray) -> np.ndarray:
        return self.family.prices([(self, tails, heads)])[0]


class Nevers:
    """Seconds of exchanges, gathers dear."""

    def __init__(self, reshards: Reshards) -> None:
        self._reshards = reshards

    def prices(self, asked: Sequence[Asked]) -> list[np.ndarray]:
        """A matrix of seconds for each (`Never`, options of the writer, options of the reader)."""
        questions = [(price.of, tails, heads) for price, tails, heads in asked]
        gathers, own = self._reshards.shares(questions, [GATHERED] * len(asked)), self._reshards.prices(questions)
        return [np.where(share > 0, DEAR * price, price) for share, price in zip(gathers, own, strict=True)]


class Never(NamedTuple):
    """Seconds of an exchange; dear where it gathers."""

    family: Nevers
    of: ReshardPrice

    def __call__(self, tails: np.ndarray, heads: np.ndarray) -> np.ndarray:
        return self.family.prices([(self, tails, heads)])[0]


class Waiting(NamedTuple):
    """`nbytes` per device where an exchange gathers; none where it does not."""

    of: ReshardPrice
    nbytes: float

    def __call__(self, tails: np.ndarray, heads: np.ndarray) -> np.ndarray:
        return self.nbytes * (self.of.family.shares([(self.of, tails, heads)], [GATHERED])[0] > 0)
