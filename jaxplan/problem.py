"""The noun that the search solves: nodes that choose, edges that charge for two choices together.

Nothing here knows what a node stands for. A node chooses one *option* per mesh axis; a *choice* is therefore
a row of small integers, one per axis. Prices are seconds, computed for whole arrays of choices at once and only
for the choices that a search asks about, so the product over axes is never written out unless somebody wants it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

NodePrice = Callable[[np.ndarray], np.ndarray]
"""(m, axes) options -> (m,) seconds; infinity for an illegal choice. It may have a `family`, as edge prices may."""
EdgePrice = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(m, axes) options of the tail, (n, axes) options of the head -> (m, n) seconds.

It may have a method `alike(rows, end)`: a number per row of options of the tail (`end` 0) or the head (1); rows of one
number have equal prices, so that a bound need not look at each. And an attribute `ends`, a key for the tail and one for the head:
`alike` is the same function of rows for all ends of one key. A
`family` is what answers for many in one go: `prices(asked)`, a matrix (of node prices a vector) for each of a list of `Asked`
(`AskedNode`); and, if it has it, `alike(asked)`, given (price, rows, end).
"""
ROUNDING = 1e-9
"""By what fraction usages may exceed a limit, against sums of rounded numbers."""
Asked = tuple[Any, np.ndarray, np.ndarray]
"""An edge price, options of the tail, options of the head."""
AskedNode = tuple[Any, np.ndarray]
"""A node price, options."""


class Node(NamedTuple):
    """One decision.

    `options`: how many options there are along each mesh axis. `kind`: nodes of equal kind have equal options
    and equal prices (what folding may merge). `times`: how often its price is paid. `alone`: how many of the options along each
    axis, the first ones, may be good whatever other nodes choose (a hint for searches that begin with these); None: all.
    """

    name: str
    options: tuple[int, ...]
    price: NodePrice
    kind: Hashable = None
    times: float = 1.0
    alone: tuple[int, ...] | None = None


class Edge(NamedTuple):
    """What two decisions cost together. `tail` and `head` index `Problem.nodes`; edges of equal kind have equal prices."""

    tail: int
    head: int
    price: EdgePrice
    kind: Hashable = None
    times: float = 1.0


class Usage(NamedTuple):
    """What choices take of something that is short (bytes, say) from `begin` until before `end`, in whole steps of some order.

    `nodes`: whose choices: one node, or two that take it together. `amount`: of one, (m, axes) options -> (m,) units; of two,
    (m, axes) and (n, axes) options -> (m, n); not negative. A node may have several. Usages that share an `amount` are asked
    together, and as with edge prices `amount` may have a `family`.
    """

    nodes: tuple[int, ...]
    amount: NodePrice | EdgePrice
    begin: int
    end: int


class Peak(NamedTuple):
    """The first interval [begin, end) at which the usages of an assignment add up to most, and to how much."""

    begin: int
    end: int
    usage: float


@dataclass(frozen=True)
class Problem:
    """Minimise the sum of all node and edge prices. `axes`: one name per column of a choice.

    `usages`, `limit`: what choices take over their lifetimes may at no time add up to more than the limit; `reserved`: what is
    taken at step 0, 1, ... whatever is chosen (nothing after the last; may be negative, to correct what usages overestimate).

    `axis_order`: the axes from the costliest link to the cheapest, as column indices (a hint for searches).
    `alike`: a label per axis; axes of one label may change places in any assignment without changing its price by more than
    the order in which they share a dimension does (a hint too); () where nothing is known.
    `starts`: assignments, (nodes, axes), that are known already (a hint for searches within a limit).
    """

    axes: tuple[str, ...]
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    axis_order: tuple[int, ...] = ()
    alike: tuple[Hashable, ...] = ()
    usages: tuple[Usage, ...] = ()
    limit: float = math.inf
    reserved: tuple[float, ...] = ()
    starts: tuple[np.ndarray, ...] = field(default=(), compare=False)
    structure: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What was worked out from who is connected to whom, in how many options and of which kinds; prices apart."""

    def __post_init__(self) -> None:
        for node in self.nodes:
            if len(node.options) != len(self.axes) or min(node.options, default=1) < 1:
                raise ValueError(f"node {node.name!r}: options {node.options} must be positive, one per axis of {self.axes}")
        count = len(self.nodes)
        for edge in self.edges:
            if not (0 <= edge.tail < count and 0 <= edge.head < count):
                raise ValueError(f"edge ({edge.tail}, {edge.head}) names a node outside 0..{len(self.nodes) - 1}")
        for usage in self.usages:
            known = all(0 <= node < len(self.nodes) for node in usage.nodes) and 1 <= len(usage.nodes) <= 2
            if not (known and 0 <= usage.begin <= usage.end):
                raise ValueError(
                    f"usage of nodes {usage.nodes} over [{usage.begin}, {usage.end}): one or two nodes of "
                    f"0..{len(self.nodes) - 1}, and an interval that begins at 0 or later and does not end before it begins"
                )
        if math.isnan(self.limit) or self.limit < 0:
            raise ValueError(f"limit {self.limit} is no amount")
        if any(start.shape != (len(self.nodes), len(self.axes)) for start in self.starts):
            raise ValueError(f"every start must have the shape {(len(self.nodes), len(self.axes))}")
        if self.axis_order and sorted(self.axis_order) != list(range(len(self.axes))):
            raise ValueError(f"axis_order {self.axis_order} is not a permutation of the {len(self.axes)} axes")
        if self.alike and len(self.alike) != len(self.axes):
            raise ValueError(f"alike {self.alike} must have a label for each of the {len(self.axes)} axes")

    def within(
        self, limit: float, usages: tuple[Usage, ...], reserved: tuple[float, ...] = (), starts: tuple[np.ndarray, ...] = ()
    ) -> Problem:
        """The same problem with a limit on what choices take."""
        problem = replace(self, usages=usages, limit=limit, reserved=reserved, starts=starts)
        object.__setattr__(problem, "structure", self.structure)
        return problem

    def repriced(
        self, nodes: tuple[Node, ...], edges: tuple[Edge, ...], axis_order: tuple[int, ...], alike: tuple[Hashable, ...]
    ) -> Problem:
        """The same problem with other prices: nodes and edges are these but for their `price`, and of the same kinds."""
        problem = replace(self, nodes=nodes, edges=edges, axis_order=axis_order, alike=alike)
        object.__setattr__(problem, "structure", self.structure)
        return problem


@dataclass(frozen=True)
class Assignment:
    """A choice per node. `choices`: (nodes, axes) integers; `seconds`: its price; `bound`: a proven lower bound, if any."""

    choices: np.ndarray
    seconds: float
    bound: float | None = None
    notes: dict[str, object] = field(default_factory=dict)


def all_rows(counts: Sequence[int]) -> np.ndarray:
    """Every choice from so many options per axis, (product of counts, axes), the last axis varying fastest."""
    return np.indices(counts).reshape(len(counts), -1).T


def repeated(times: float, prices: np.ndarray) -> np.ndarray:
    """Prices of what runs so many times. What is illegal is so even where it never runs."""
    return times * prices if times else np.where(np.isfinite(prices), 0.0, np.inf)


def edge_prices(asked: Sequence[Asked]) -> list[np.ndarray]:
    """A matrix for each question; prices of one family are asked together."""
    return _answered(asked)


def node_prices(asked: Sequence[AskedNode]) -> list[np.ndarray]:
    """A vector for each question; prices of one family are asked together."""
    return _answered(asked)


def edge_labels(asked: Sequence[tuple[Any, np.ndarray, int]]) -> list[np.ndarray]:
    """Per (edge price, rows, end), the numbers that the price has for rows that are alike to it: all different where it tells
    none."""
    return _answered(asked, "alike", _labels)


def _labels(price: Any, rows: np.ndarray, end: int) -> np.ndarray:
    alike = getattr(price, "alike", None)
    return alike(rows, end) if alike else np.arange(len(rows))


def _priced(price: Any, *rows: np.ndarray) -> np.ndarray:
    return price(*rows)


def _answered(
    asked: Sequence[tuple[Any, ...]], together: str = "prices", alone: Callable[..., np.ndarray] = _priced
) -> list[np.ndarray]:
    """Answers to questions, each about a price: by the method `together` of its family, if that has one, else `alone`."""
    found: dict[int, np.ndarray] = {}
    families: dict[int, tuple[Any, list[int]]] = {}
    for number, question in enumerate(asked):
        family = getattr(question[0], "family", None)
        if hasattr(family, together):
            families.setdefault(id(family), (family, []))[1].append(number)
        else:
            found[number] = alone(*question)
    for family, numbers in families.values():
        found.update(zip(numbers, getattr(family, together)([asked[number] for number in numbers]), strict=True))
    return [found[number] for number in range(len(asked))]


def evaluate(problem: Problem, choices: np.ndarray) -> float:
    """The price in seconds of one assignment, (nodes, axes). Equal choices of nodes, or edges, of one kind are asked for once."""
    who = problem.structure.get("kinds")
    if who is None:
        who = problem.structure["kinds"] = _Kinds.of(problem)
    states = choices @ np.cumprod([1, *(choices.max(axis=0, initial=0)[:-1] + 1).tolist()])
    states = np.unique(states, return_inverse=True)[1]
    first, owner = _first_of(who.nodes * len(states) + states)
    asked = [(problem.nodes[n].price, choices[n][None]) for n in first.tolist()]
    prices = np.array([float(vector[0]) for vector in node_prices(asked)])
    if not np.isfinite(prices).all():
        return math.inf
    total = math.fsum((who.times * prices[owner]).tolist())  # rounded once: equal prices are equal whatever the order
    first, owner = _first_of((who.edges * len(states) + states[who.tails]) * len(states) + states[who.heads])
    edges = [problem.edges[who.paid[n]] for n in first.tolist()]
    matrices = edge_prices([(edge.price, choices[edge.tail][None], choices[edge.head][None]) for edge in edges])
    return math.fsum([total, *(who.edge_times * np.array([float(matrix[0, 0]) for matrix in matrices])[owner]).tolist()])


class _Kinds(NamedTuple):
    """Who is of one kind, as numbers, and how often each is paid; of edges those that are paid at all, which are `paid`."""

    nodes: np.ndarray
    times: np.ndarray
    paid: list[int]
    edges: np.ndarray
    tails: np.ndarray
    heads: np.ndarray
    edge_times: np.ndarray

    @classmethod
    def of(cls, problem: Problem) -> _Kinds:
        def numbered(kinds: Iterable[Hashable]) -> np.ndarray:
            known: dict[Hashable, int] = {}
            return np.array([known.setdefault(kind, len(known)) for kind in kinds], dtype=np.int64)

        paid = [number for number, edge in enumerate(problem.edges) if edge.times]
        edges = [problem.edges[number] for number in paid]
        return cls(
            numbered([n.kind if n.kind is not None else ("node", i) for i, n in enumerate(problem.nodes)]),
            np.array([n.times for n in problem.nodes]),
            paid,
            numbered([e.kind if e.kind is not None else ("edge", i) for i, e in enumerate(edges)]),
            np.array([e.tail for e in edges], dtype=np.int64),
            np.array([e.head for e in edges], dtype=np.int64),
            np.array([e.times for e in edges]),
        )


def _first_of(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(where each key first stands, for every key which of those it equals)."""
    _, first, owner = np.unique(keys, return_index=True, return_inverse=True)
    return first, owner


def peak(problem: Problem, choices: np.ndarray) -> Peak:
    """Where the usages of one assignment, (nodes, axes), are highest. Feasible if that is within `problem.limit`."""
    return Meter(problem).peak(choices)


def within_limit(problem: Problem, choices: np.ndarray) -> bool:
    """Whether an assignment stays within the limit, up to rounding."""
    return problem.limit == math.inf or peak(problem, choices).usage <= problem.limit * (1 + ROUNDING)


def taken(usage: Usage, rows: np.ndarray) -> np.ndarray:
    """(m,) units for options of a usage's only node, (m, axes)."""
    amount: Any = usage.amount
    return amount(rows)


class Meter:
    """What assignments of a problem take, step by step."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        usages = problem.usages
        self.begins = np.array([usage.begin for usage in usages], dtype=np.int64)
        self.ends = np.array([usage.end for usage in usages], dtype=np.int64)
        self.steps = max([len(problem.reserved), *[usage.end for usage in usages]], default=0)
        """All is empty from this step on."""
        self._reserved = np.zeros(self.steps)
        self._reserved[: len(problem.reserved)] = problem.reserved
        alone: dict[int, list[int]] = {}
        self._pairs = []
        for number, usage in enumerate(usages):
            if len(usage.nodes) == 1:
                alone.setdefault(id(usage.amount), []).append(number)
            else:
                self._pairs.append(number)
        self._alone = [(np.array(found), np.array([usages[n].nodes[0] for n in found])) for found in alone.values()]

    def amounts(self, choices: np.ndarray) -> np.ndarray:
        """(usages,) units that an assignment, (nodes, axes), takes."""
        usages = self.problem.usages
        found = np.zeros(len(usages))
        for numbers, nodes in self._alone:
            found[numbers] = taken(usages[int(numbers[0])], choices[nodes])
        rows = [tuple(row) for row in choices.tolist()] if self._pairs else []
        keys = [(id(usages[n].amount), *[rows[node] for node in usages[n].nodes]) for n in self._pairs]
        asked = {key: usages[n] for key, n in zip(keys, self._pairs, strict=True)}
        ends = [(u.amount, choices[u.nodes[0]][None], choices[u.nodes[-1]][None]) for u in asked.values()]
        known = {key: float(matrix[0, 0]) for key, matrix in zip(asked, edge_prices(ends), strict=True)}
        found[self._pairs] = [known[key] for key in keys]
        return found

    def levels(self, amounts: np.ndarray) -> np.ndarray:
        """(steps,) what amounts per usage, (usages,), add up to at every step, with what is reserved."""
        change = np.zeros(self.steps + 1)
        np.add.at(change, self.begins, amounts)
        np.add.at(change, self.ends, -amounts)
        return np.cumsum(change)[:-1] + self._reserved

    def spans(self, prices: np.ndarray) -> np.ndarray:
        """(usages,) what a unit costs over each lifetime, where it costs `prices`, (steps,), at every step."""
        total = np.concatenate([[0.0], np.cumsum(prices)])
        return total[self.ends] - total[self.begins]

    def peak(self, choices: np.ndarray) -> Peak:
        """Where an assignment takes most."""
        level = self.levels(self.amounts(choices))
        if not len(level):
            return Peak(0, 0, 0.0)
        worst = int(level.argmax())
        change = np.unique([*self.begins, *self.ends, *(range(self.steps + 1) if self.problem.reserved else ())])
        return Peak(
            int(change[np.searchsorted(change, worst, side="right") - 1]),
            int(change[np.searchsorted(change, worst, side="right")]),
            float(level[worst]),
        )


def from_tables(
    costs: Sequence[Sequence[float] | np.ndarray],
    edges: Sequence[tuple[int, int, np.ndarray]],
    kinds: Sequence[Hashable] | None = None,
    edge_kinds: Sequence[Hashable] | None = None,
) -> Problem:
    """A problem with one axis and its prices written out: a cost vector per node, a matrix per edge."""
    nodes = []
    for i, cost in enumerate(costs):
        vector = np.asarray(cost, dtype=float)
        nodes.append(Node(f"n{i}", (len(vector),), _vector_price(vector), kinds[i] if kinds else i))
    links = []
    for k, (tail, head, matrix) in enumerate(edges):
        links.append(Edge(tail, head, _matrix_price(np.asarray(matrix, dtype=float)), edge_kinds[k] if edge_kinds else k))
    return Problem(("choice",), tuple(nodes), tuple(links), (0,))


def _vector_price(vector: np.ndarray) -> NodePrice:
    return lambda choices: vector[choices[:, 0]]


def _matrix_price(matrix: np.ndarray) -> EdgePrice:
    return lambda tails, heads: matrix[np.ix_(tails[:, 0], heads[:, 0])]
