"""Random layered problems of any size, with prices as layouts have them: for measuring searches, with no program behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jaxplan.problem import Asked, Edge, Node, Problem

DIMS = 3
"""Dimensions of every tensor: an axis splits one of them, or nothing (option 0)."""
WORK = 1e-3
"""Seconds that an operator takes on one device, at most."""


def layered(operators: int, width: int, sizes: Sequence[int], seed: int = 0, joins: float = 0.5) -> Problem:
    """About `operators` operators in layers of `width`, on a mesh of `sizes`. Nothing is alike: no folding helps.

    Every operator reads its counterpart in the layer before; with probability `joins` another one of that layer too. Work is
    divided by the devices that are used; one dimension is contracted, so that splitting it costs an exchange; readers that want
    another layout pay for it. Extents are powers of two: not every split divides.
    """
    rng = np.random.default_rng(seed)
    shape = tuple([DIMS + 1] * len(sizes))
    moves = Moves(sizes)
    nodes, edges = [], []
    for number in range(max(2, operators // width) * width):
        extents = 2 ** rng.integers(4, 18, DIMS)
        nodes.append(Node(f"op{number}", shape, Work(WORK * rng.random(), 0.2 * WORK * rng.random(), extents, sizes), number))
        if number < width:
            continue
        before = number - number % width - width
        sources = {before + number % width}
        if rng.random() < joins:
            sources.add(before + int(rng.integers(width)))
        for source in sorted(sources):
            edges.append(Edge(source, number, Move(moves, WORK * rng.random(), rng.permutation(DIMS)), len(edges)))
    order = tuple(range(len(sizes)))
    return Problem(tuple("xyzw"[: len(sizes)]), tuple(nodes), tuple(edges), order)


class Work:
    """Seconds of an operator: work over the devices used, and an exchange over the axes that split its first dimension."""

    def __init__(self, work: float, exchange: float, extents: np.ndarray, sizes: Sequence[int]) -> None:
        self.work, self.exchange, self.extents, self.sizes = work, exchange, extents, np.array(sizes)

    def __call__(self, choices: np.ndarray) -> np.ndarray:
        used = np.where(choices > 0, self.sizes, 1)
        seconds = self.work / used.prod(1) + self.exchange * (1 - 1 / np.where(choices == 1, self.sizes, 1).prod(1))
        split = np.stack([np.where(choices == dim + 1, self.sizes, 1).prod(1) for dim in range(DIMS)], 1)
        return np.where((self.extents % split == 0).all(1), seconds, math.inf)


class Move:
    """Seconds of one edge: what leaves its place is gathered, or sent from all to all. `turned`: the reader's dimensions."""

    def __init__(self, family: Moves, whole: float, turned: np.ndarray) -> None:
        self.family, self.whole, self.turned = family, whole, np.array([0, *(turned + 1)])

    def __call__(self, tails: np.ndarray, heads: np.ndarray) -> np.ndarray:
        return self.family.prices([(self, tails, heads)])[0]

    def alike(self, rows: np.ndarray, end: int) -> np.ndarray:
        """The layout, as a number, of each row of options."""
        return (self.turned[rows] if end else rows) @ ((DIMS + 1) ** np.arange(rows.shape[1]))


class Moves:
    """All edges of a problem: prices between layouts are worked out once, and scaled by what each edge moves."""

    def __init__(self, sizes: Sequence[int]) -> None:
        layouts = np.indices([DIMS + 1] * len(sizes)).reshape(len(sizes), -1).T
        self._strides = (DIMS + 1) ** np.arange(len(sizes))[::-1]
        local = np.ones((len(layouts), len(layouts)))
        stays = layouts[:, None] == layouts[None]
        for axis, size in enumerate(sizes):
            local /= np.where(stays[..., axis] & (layouts[:, None, axis] > 0), size, 1)
        self._share = np.zeros_like(local)
        for axis, size in enumerate(sizes):
            kept = np.where(layouts[None, :, axis] > 0, size, 1)  # an all-to-all keeps its own share, a gather keeps all
            left = ~stays[..., axis] & (layouts[:, None, axis] > 0)
            self._share += np.where(left, (size - 1) / size * local / kept, 0.0)

    def prices(self, asked: Sequence[Asked]) -> list[np.ndarray]:
        """A matrix of seconds for each (edge price, tails, heads)."""
        return [
            price.whole * self._share[np.ix_(tails @ self._strides, price.turned[heads] @ self._strides)]
            for price, tails, heads in asked
        ]
