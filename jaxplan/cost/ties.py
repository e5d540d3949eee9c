"""Between layouts that cost the same, the one that holds fewer bytes."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from jaxplan.cost.build import Modelled
from jaxplan.cost.price import terminal_layout
from jaxplan.graph.flatten import BOUNDARY, INPUT, VIEW
from jaxplan.layout import shards
from jaxplan.problem import all_rows, edge_prices, repeated

EQUAL = 1e-12
"""Relative difference of a plan's seconds below which they are the same."""


def frugal(modelled: Modelled, choices: np.ndarray, seconds: float) -> np.ndarray:
    """Choices per node where every input that could lie on more devices at no price does, and views of them and what loops see
    of them likewise; all other nodes keep theirs.

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
    for _, nodes in sorted(passes.items()):
        choices = _spread(modelled, choices, seconds, nodes)
    return choices


def _spread(modelled: Modelled, choices: np.ndarray, seconds: float, inputs: list[int]) -> np.ndarray:
    """For some nodes, of which no two are neighbours."""
    problem, graph = modelled.problem, modelled.graph
    around: dict[int, list[int]] = {node: [] for node in inputs}
    for number, edge in enumerate(problem.edges):
        for node in {edge.tail, edge.head} & around.keys():
            around[node].append(number)
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
    totals = {node: repeated(problem.nodes[node].times, problem.nodes[node].price(rows)) for node, rows in candidates.items()}
    for (node, times), matrix in zip(owners, edge_prices(asked), strict=True):
        totals[node] = totals[node] + repeated(times, matrix.reshape(-1))
    better = choices.copy()
    for nodes in kinds.values():
        node, rows = nodes[0], candidates[nodes[0]]
        cluster = modelled.kept[node]
        leads = graph.clusters[cluster].writes[0].leads if graph.clusters[cluster].writes else ()
        own = int(np.flatnonzero((rows == choices[node]).all(axis=1))[0])
        free = np.flatnonzero(totals[node] <= totals[node][own] + EQUAL * seconds).tolist()
        parts = [_parts(modelled, cluster, leads, rows[row]) for row in free]
        best = free[parts.index(max(parts))] if max(parts) > _parts(modelled, cluster, leads, rows[own]) else own
        for same in nodes:
            better[same] = rows[best]
    return better


def _parts(modelled: Modelled, cluster: int, leads: tuple[int, ...], row: np.ndarray) -> int:
    """Over how many devices a choice spreads what an input's cluster holds."""
    options = [options[i] for options, i in zip(modelled.options[cluster], row.tolist(), strict=True)]
    return shards(terminal_layout(leads, options), modelled.numbers.sizes)
