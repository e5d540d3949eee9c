"""Layers of an unrolled model as its graph tells of them, before anything is traced again: what a pipeline over them could save.

Nothing is decided here about whether they can run in stages; only whether it is worth finding out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxplan.cost import Modelled
from jaxplan.cost.price import write_layout
from jaxplan.graph import Graph, Operator
from jaxplan.pipeline.reroll import longest_run
from jaxplan.pipeline.staging import Rows, walk_on, walked

Alike = tuple[int, tuple[int, ...], int]


@dataclass(frozen=True)
class Repeats:
    """`count` layers. `inside`: the clusters of all of them. `carried`: the largest tensor that one hands to the next, from the
    middle of the model; `rows`: dimensions of it in which rows of a batch may be, and (cluster, factors that lead its dimensions,
    dimension of the rows) of the tensors of a layer that have the same rows and a layout of their own. `stacked`: bytes of what
    each layer reads of the program's inputs."""

    count: int
    inside: frozenset[int]
    carried: int
    rows: tuple[tuple[int, tuple[Alike, ...]], ...]
    stacked: int


def repeats(graph: Graph) -> Repeats | None:
    """The layers that cover most of a graph; None where nothing repeats that has a product in it and hands something on."""
    return graph.remembered("repeats", (), lambda: _repeats(graph))


def _repeats(graph: Graph) -> Repeats | None:
    numbers: dict[tuple[str, int], int] = {}
    symbols = np.array([numbers.setdefault((op.name, id(op.rule)), len(numbers)) for op in graph.operators], np.int64)
    heavy = np.array([op.rule.product for op in graph.operators], bool)
    run = longest_run(symbols, np.ones(len(symbols), bool), heavy) if len(symbols) else None
    if run is None:
        return None
    middle = run.start + run.period * (run.count // 2)
    block, after = graph.operators[middle - run.period : middle], graph.operators[middle : middle + run.period]
    read = {t for op in after for t in op.operands}
    handed = [t for op in block for t in op.results if t in read]
    if not handed:
        return None
    carried = max(handed, key=lambda t: graph.tensors[t].nbytes)
    rows = []
    for dim, extent in enumerate(graph.tensors[carried].shape):
        known: dict[int, Rows] = {carried: (dim, 1)}
        if extent > 1 and _apart(block, known):
            rows.append((dim, {t: d for t, (d, stride) in known.items() if stride == 1}))
    within = range(run.start, run.stop)
    inside = frozenset([c for c, cluster in enumerate(graph.clusters) if cluster.members[-1] in within])
    written = [(w.tensor, c, w.leads) for c in sorted(inside) for w in graph.clusters[c].writes] if rows else []
    alike = [(dim, tuple([(c, leads, known[t]) for t, c, leads in written if t in known])) for dim, known in rows]
    own = set(graph.inputs).intersection(t for op in graph.operators[run.start : run.stop] for t in op.operands)
    return Repeats(run.count, inside, carried, tuple(alike), sum(graph.tensors[t].nbytes for t in own))


def _apart(block: Sequence[Operator], rows: dict[int, Rows]) -> bool:
    """Whether no operator of a layer makes pairs of rows, nor a row from a sum over them, as far as they can be followed."""
    known = -1
    met: list[tuple[int, set[tuple[int, int]]]] = [(0, set())] * len(block)
    touched = [frozenset((*op.operands, *op.results)) for op in block]
    while known < len(rows):
        known = len(rows)
        for numbers in (range(len(block)), range(len(block) - 1, -1, -1)):
            summed: set[int] = set()
            for number in numbers:
                op = block[number]
                count = len(touched[number] & rows.keys())
                if count != met[number][0]:
                    found = set(walked(op, rows))
                    met[number] = count, found
                    if len(found) > 1:
                        return False
                    for factor, inner in found:
                        walk_on(op, rows, factor, inner)
                factors = met[number][1]
                mixed = numbers.step > 0 and not summed.isdisjoint(op.operands)
                if mixed and not rows.keys().isdisjoint(op.results):
                    return False
                if factors or mixed:
                    summed.update([t for t in op.results if t not in rows])
    return True


def cut_by(modelled: Modelled, choices: np.ndarray, alike: Sequence[Alike]) -> frozenset[int]:
    """The axes that cut the rows, under choices per cluster; `alike`: see `Repeats.rows`."""
    of = modelled.states(choices)
    different = {(of[cluster], leads, dim): cluster for cluster, leads, dim in alike}
    return frozenset([
        a for (_, leads, dim), cluster in different.items()
        for a, at in enumerate(write_layout(leads, modelled.chosen(choices, cluster))) if at == dim
    ])  # fmt: skip
