"""The noun that the search solves: nodes that choose, edges that charge for two choices together.

Nothing here knows what a node stands for. A node chooses one *option* per mesh axis; a *choice* is therefore
a row of small integers, one per axis. Prices are seconds, computed for whole arrays of choices at once and only
for the choices that a search asks about, so the product over axes is never written out unless somebody wants it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

NodePrice = Callable[[np.ndarray], np.ndarray]
"""(m, axes) options -> (m,) seconds; infinity for an illegal choice."""
EdgePrice = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(m, axes) options of the tail, (n, axes) options of the head -> (m, n) seconds."""


@dataclass(frozen=True)
class Node:
    """One decision.

    `options`: how many options there are along each mesh axis. `kind`: nodes of equal kind have equal options
    and equal prices (what folding may merge). `times`: how often its price is paid.
    """

    name: str
    options: tuple[int, ...]
    price: NodePrice
    kind: Hashable = None
    times: float = 1.0


@dataclass(frozen=True)
class Edge:
    """What two decisions cost together. `tail` and `head` index `Problem.nodes`; edges of equal kind have equal prices."""

    tail: int
    head: int
    price: EdgePrice
    kind: Hashable = None
    times: float = 1.0


@dataclass(frozen=True)
class Problem:
    """Minimise the sum of all node and edge prices. `axes`: one name per column of a choice.

    `axis_order`: the axes from the costliest link to the cheapest, as column indices (a hint for searches).
    """

    axes: tuple[str, ...]
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    axis_order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for node in self.nodes:
            if len(node.options) != len(self.axes) or any(count < 1 for count in node.options):
                raise ValueError(f"node {node.name!r}: options {node.options} must be positive, one per axis of {self.axes}")
        for edge in self.edges:
            if not (0 <= edge.tail < len(self.nodes) and 0 <= edge.head < len(self.nodes)):
                raise ValueError(f"edge ({edge.tail}, {edge.head}) names a node outside 0..{len(self.nodes) - 1}")
        if self.axis_order and sorted(self.axis_order) != list(range(len(self.axes))):
            raise ValueError(f"axis_order {self.axis_order} is not a permutation of the {len(self.axes)} axes")


@dataclass(frozen=True)
class Assignment:
    """A choice per node. `choices`: (nodes, axes) integers; `seconds`: its price; `bound`: a proven lower bound, if any."""

    choices: np.ndarray
    seconds: float
    bound: float | None = None
    notes: dict[str, object] = field(default_factory=dict)


def all_choices(node: Node) -> np.ndarray:
    """Every choice of a node, (count, axes), the last axis varying fastest."""
    return np.array(list(product(*map(range, node.options))), dtype=np.int64).reshape(-1, len(node.options))


def evaluate(problem: Problem, choices: np.ndarray) -> float:
    """The price in seconds of one assignment, (nodes, axes). Nodes or edges that share a price function ask it once."""
    rows = [tuple(row) for row in choices.tolist()]
    known: dict[tuple[object, ...], float] = {}
    total = 0.0
    for node, row, options in zip(problem.nodes, rows, choices, strict=True):
        key = (id(node.price), row)
        seconds = known.get(key)
        if seconds is None:
            seconds = known[key] = float(node.price(options[None])[0])
        total += node.times * seconds
    for edge in problem.edges:
        key = (id(edge.price), rows[edge.tail], rows[edge.head])
        seconds = known.get(key)
        if seconds is None:
            seconds = known[key] = float(edge.price(choices[edge.tail][None], choices[edge.head][None])[0, 0])
        total += edge.times * seconds
    return total


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
