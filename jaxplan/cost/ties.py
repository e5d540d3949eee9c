"""Between layouts that cost the same, the one that holds fewer bytes."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np

from jaxplan.cost.build import Modelled
from jaxplan.cost.price import terminal_layout
from jaxplan.graph.flatten import BOUNDARY, INPUT, VIEW
from jaxplan.layout import Layout, shards
from jaxplan.problem import all_rows, edge_prices, node_prices, repeated

EQUAL = 1e-12
"""Relative difference of a plan's seconds below which they are the same."""


def frugal(modelled: Modelled, choices: np.ndarray, seconds: float) -> np.ndarray:
    """Choices per node where every input that could lie on more devices at no price does, and views of them and what loops see
    of them likewise; all other nodes keep theirs. What a loop sees then returns to the layout that it is read from, where that
    costs nothing either: else the compiler keeps a part of it for the loop, besides the whole.

    `choices`: (nodes, axes), of price `seconds`. Inputs live throughout, so it is they that a budget feels first; a search that
    compares seconds alone leaves such ties to chance. No two views are neighbours, no two inputs, and nothing that enters loops
    equally deep: one pass each is enough, from the innermost loop outwards.
    """
    graph = modelled.graph
    passes: dict[tuple[int, int], list[int]] = {}
    for node, cluster in enumerate(modelled.kept):
        operator = graph.operators[graph.clusters[cluster].members[-1]]
        if operator.name == VIEW:
            passes.setdefault((0, 0), []).append(node)
        elif operator.name == BOUNDARY and operator.path[-2] == "in":
            passes.setdefault((1, -len(operator.path)), []).append(node)
        elif operator.name == INPUT:
            passes.setdefault((2, 0), []).append(node)

    def spread(cluster: int, row: np.ndarray) -> int:
        writes = graph.clusters[cluster].writes
        return shards(_layout(modelled, cluster, writes[0].leads if writes else (), row), modelled.numbers.sizes)

    for _, nodes in sorted(passes.items()):
        choices = _improved(modelled, choices, seconds, nodes, spread)
    sources = {reading.reader: reading for reading in modelled.readings if reading.writer not in modelled.follows}
    for _, nodes in sorted([some for some in passes.items() if some[0][0] == 1], reverse=True):
        full = modelled.complete(choices)

        def settled(cluster: int, row: np.ndarray, full: np.ndarray = full) -> int:
            reading = sources.get(cluster)
            if reading is None:
                return 0
            return int(_layout(modelled, cluster, reading.read.leads, row) == modelled.edge_layouts(full, reading)[0])

        choices = _improved(modelled, choices, seconds, nodes, settled)
    return choices


def _improved(
    modelled: Modelled, choices: np.ndarray, seconds: float, inputs: list[int], score: Callable[[int, np.ndarray], int]
) -> np.ndarray:
    """For some nodes, of which no two are neighbours: the choice with the highest `score` (of cluster and choice) among those
    that cost no more."""
    problem = modelled.problem
    around: dict[int, list[int]] = {node: [] for node in inputs}
    for number, edge in enumerate(problem.edges):
        if edge.tail in around:
            around[edge.tail].append(number)
        if edge.head in around and edge.head != edge.tail:
            around[edge.head].append(number)
    rows_of = [tuple(row) for row in choices.tolist()]
    kinds: dict[Hashable, list[int]] = {}
    for node in inputs:
        near = tuple([
            (edge.kind, edge.times, edge.tail == node, rows_of[edge.head if edge.tail == node else edge.tail])
            for edge in map(problem.edges.__getitem__, around[node])
        ])  # fmt: skip
        kinds.setdefault((problem.nodes[node].kind, rows_of[node], near), []).append(node)
    candidates = {nodes[0]: all_rows(problem.nodes[nodes[0]].options) for nodes in kinds.values()}
    asked, owners = [], []
    for node, rows in candidates.items():
        for edge in map(problem.edges.__getitem__, around[node]):
            forward = edge.tail == node
            other = choices[edge.head if forward else edge.tail][None]
            asked.append((edge.price, rows, other) if forward else (edge.price, other, rows))
            owners.append((node, edge.times))
    priced = node_prices([(problem.nodes[node].price, rows) for node, rows in candidates.items()])
    totals = {node: repeated(problem.nodes[node].times, own) for node, own in zip(candidates, priced, strict=True)}
    for (node, times), matrix in zip(owners, edge_prices(asked), strict=True):
        totals[node] = totals[node] + repeated(times, matrix.reshape(-1))
    better = choices.copy()
    for nodes in kinds.values():
        node, rows = nodes[0], candidates[nodes[0]]
        cluster = modelled.kept[node]
        own = int(np.flatnonzero((rows == choices[node]).all(axis=1))[0])
        free = np.flatnonzero(totals[node] <= totals[node][own] + EQUAL * seconds).tolist()
        scores = [score(cluster, rows[row]) for row in free]
        best = free[scores.index(max(scores))] if max(scores) > score(cluster, rows[own]) else own
        for same in nodes:
            better[same] = rows[best]
    return better


def _layout(modelled: Modelled, cluster: int, leads: tuple[int, ...], row: np.ndarray) -> Layout:
    """How a choice lays out what is led by some of a cluster's factors."""
    options = [options[i] for options, i in zip(modelled.options[cluster], row.tolist(), strict=True)]
    return terminal_layout(leads, options)
