"""Folding: look-alike nodes share one variable whose prices are paid as often as there are members."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import replace

import numpy as np

from jaxplan.problem import Problem
from jaxplan.reduce.tables import Undo


def fold(problem: Problem, rounds: int = 2) -> tuple[Problem, Undo]:
    """The problem of one variable per class of look-alikes, and how to read its choices for every member.

    Two nodes look alike if their kinds, options and times agree and so do their neighbourhoods, `rounds` edges deep (colour
    refinement: Weisfeiler and Leman 1968). Bounded rounds keep the inner layers of a deep model in one class whatever the
    depth; only what lies within `rounds` edges of an irregularity stands apart. 0 rounds: equal kinds decide alike.
    Nodes of kind None stay alone. Prices of parallel edges of equal kind are paid together; an edge inside a class becomes
    an edge from its variable to itself, which `Tables` adds to the variable's own price. Every assignment of the folded
    problem unfolds to one of equal price, so folding can lose optima but never promises what does not exist.
    """
    colours = _refined(problem, rounds)
    first: dict[int, int] = {}
    for index, colour in enumerate(colours.tolist()):
        first.setdefault(colour, index)
    place = {colour: number for number, colour in enumerate(first)}
    index = np.array([place[colour] for colour in colours.tolist()], dtype=np.int64)
    times = np.bincount(index, [node.times for node in problem.nodes], len(first)) if len(index) else np.zeros(0)
    nodes = tuple(
        replace(problem.nodes[member], times=float(total)) for member, total in zip(first.values(), times, strict=True)
    )
    where = index.tolist()
    merged: dict[Hashable, int] = {}
    kept: list[int] = []
    paid: list[float] = []
    for number, edge in enumerate(problem.edges):
        # An edge without a kind equals no other; the bare number cannot clash with the pairs of the others.
        key = number if edge.kind is None else (where[edge.tail], where[edge.head], edge.kind)
        slot = merged.setdefault(key, len(kept))
        if slot == len(kept):
            kept.append(number)
            paid.append(0.0)
        paid[slot] += edge.times
    edges = []
    for number, total in zip(kept, paid, strict=True):
        edge = problem.edges[number]
        edges.append(replace(edge, tail=where[edge.tail], head=where[edge.head], times=total))
    return replace(problem, nodes=nodes, edges=tuple(edges)), lambda choices: choices[index]


def _refined(problem: Problem, rounds: int) -> np.ndarray:
    """A colour per node: equal for nodes that look alike."""
    colours = _numbered(
        ("alone", i) if node.kind is None else (node.kind, node.times, node.options) for i, node in enumerate(problem.nodes)
    )
    if not rounds or not len(colours):
        return colours
    kinds = _numbered(
        ("alone", i) if edge.kind is None else (edge.kind, edge.times) for i, edge in enumerate(problem.edges)
    )
    ends = np.array([(edge.tail, edge.head) for edge in problem.edges], dtype=np.int64).reshape(-1, 2)
    here = np.concatenate([ends[:, 0], ends[:, 1]])
    there = np.concatenate([ends[:, 1], ends[:, 0]])
    side = np.concatenate([2 * kinds, 2 * kinds + 1]).astype(np.uint64)
    classes = int(colours.max()) + 1
    for _ in range(rounds):
        around = np.zeros(len(colours), dtype=np.uint64)
        np.add.at(around, here, _mixed(_mixed(side) + colours[there].astype(np.uint64)))
        _, colours = np.unique(np.stack([colours.astype(np.uint64), around]), axis=1, return_inverse=True)
        colours = colours.reshape(-1)
        if int(colours.max()) + 1 == classes:
            break
        classes = int(colours.max()) + 1
    return colours


def _numbered(values: Iterable[Hashable]) -> np.ndarray:
    """Equal values get equal numbers, by first appearance."""
    table: dict[Hashable, int] = {}
    return np.array([table.setdefault(value, len(table)) for value in values], dtype=np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """A fixed scrambling of 64-bit integers (splitmix64, Steele, Lea and Flood 2014), so that a sum identifies a multiset.

    Should two multisets ever collide, two nodes of equal kind fold that need not: legal still.
    """
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
