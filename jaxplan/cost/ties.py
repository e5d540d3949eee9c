"""Between layouts that cost the same, the one that holds fewer bytes."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from jaxplan.cost.build import Modelled
from jaxplan.cost.price import terminal_layout
from jaxplan.graph.flatten import INPUT, VIEW
from jaxplan.layout import shards
from jaxplan.problem import all_rows, edge_prices, repeated

EQUAL = 1e-12
"""Relative difference of a plan's seconds below which they are the same."""


def frugal(modelled: Modelled, choices: np.ndarray, seconds: float) -> np.ndarray:
    """Choices per node where every input that could lie on more devices at no price does, and views of them likewise; all other
    nodes keep theirs.

    `choices`: (nodes, axes), of price `seconds`. Inputs live throughout, so it is they that a budget feels first; a search that
    compares seconds alone leaves such ties to chance. No two views are neighbours, and no two inputs: one pass each is enough.
    """
    for name in (VIEW, INPUT):
        choices = _spread(modelled, choices, seconds, name)
    return choices


def _spread(modelled: Modelled, choices: np.ndarray, seconds: float, name: str) -> np.ndarray:
    """For the nodes of operators called `name`."""
    problem, graph = modelled.problem, modelled.graph
    inputs = [n for n, c in enumerate(modelled.kept) if graph.operators[graph.clusters[c].members[-1]].name == name]
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
