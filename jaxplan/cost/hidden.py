"""What of memory choices decide on where compilers fuse: which products run behind the gathers of state that end a call, and
which partial sums are scattered, or combined together."""

from __future__ import annotations

import math

import numpy as np

from jaxplan.cost.build import Modelled
from jaxplan.cost.combined import SUMS
from jaxplan.cost.exchange import reshard_steps
from jaxplan.cost.price import sent_seconds, steps_terms
from jaxplan.graph.flatten import INPUT
from jaxplan.layout import PARTIAL

COMBINED_BYTES = 128e6
"""Partial sums that are combined at once, at most: 120 MiB each in programs compiled for v5e, where the next did not fit."""


def hidden_work(modelled: Modelled, choices: np.ndarray) -> frozenset[tuple[int, float]]:
    """What of memory depends on the speeds of links: operators that can hide behind the gathers that end a call, and how far."""
    if modelled.numbers.machine.materialises:
        return frozenset()
    return hidden(modelled, choices)


def scattered(modelled: Modelled, choices: np.ndarray) -> frozenset[int]:
    """Operators whose partial results are scattered."""
    made_whole = modelled.combining(choices)
    return frozenset([e.operator for _, e in made_whole if any(step.kind == "reduce_scatter" for step in e.steps)])


def totals(modelled: Modelled, choices: np.ndarray) -> frozenset[int]:
    """Operators that add partial sums, of which the total is stored to be combined."""
    adding = [(i, cluster) for i, cluster in enumerate(modelled.graph.clusters) if cluster.combines and cluster.adds]
    return frozenset([
        c.members[-1] for i, c in adding if any(o.factor == PARTIAL != o.scatter for o in modelled.chosen(choices, i))
    ])  # fmt: skip


def gathered_state(modelled: Modelled, choices: np.ndarray) -> dict[int, int]:
    """{new value: old value} of state whose parts are gathered at the end of a call."""
    return modelled.remembered("gathered", choices, lambda: _gathered_state(modelled, choices), speeds=True)


def _gathered_state(modelled: Modelled, choices: np.ndarray) -> dict[int, int]:
    graph, found = modelled.graph, dict[int, int]()
    olds = {graph.outputs[output]: graph.inputs[position] for output, position in graph.ties}
    for reading in modelled.readings:
        if reading.tensor in olds and graph.operators[graph.clusters[reading.reader].members[-1]].name == INPUT:
            steps = reshard_steps(*modelled.edge_layouts(choices, reading), modelled.setting.order)
            if any(step.kind == "all_gather" for step in steps):
                found[reading.tensor] = olds[reading.tensor]
    return found


def hidden(modelled: Modelled, choices: np.ndarray) -> frozenset[tuple[int, float]]:
    """(operator, share) of those that take no longer than gathering the state at the end of a call, that can hide behind it; and
    what share of that time they take."""
    return modelled.remembered("hidden", choices, lambda: _hiding(modelled, choices), speeds=True)


def _hiding(modelled: Modelled, choices: np.ndarray) -> frozenset[tuple[int, float]]:
    graph, numbers, seconds = modelled.graph, modelled.numbers, 0.0
    gathered = gathered_state(modelled, choices)
    for reading in modelled.readings if gathered else ():
        if reading.tensor in gathered and graph.operators[graph.clusters[reading.reader].members[-1]].name == INPUT:
            steps = reshard_steps(*modelled.edge_layouts(choices, reading), modelled.setting.order)
            seconds += sent_seconds(*steps_terms(steps, numbers.nbytes(reading.tensor), numbers.sizes), numbers)
    found = set()
    for index, cluster in enumerate(graph.clusters if seconds else ()):
        if len(cluster.work) == 1 and graph.operators[cluster.members[-1]].rule.product:
            split = [o.factor for o in modelled.chosen(choices, index)]
            parts = math.prod(size for size, f in zip(numbers.sizes, split, strict=True) if f in cluster.work[0].factors)
            taken = numbers.flops(cluster.work[0]) * numbers.seconds_per_flop(cluster.work[0].dtype) / parts
            found.add((cluster.members[-1], taken / seconds))
    return frozenset(found)


def groups(modelled: Modelled, choices: np.ndarray) -> int:
    """In how many groups the partial sums of what becomes state are combined: those over the same axes together, as far as they
    go. Products that are split along other axes are summed step by step as they are computed, and wait for no others."""
    graph = modelled.graph
    shapes = {tuple(sorted(graph.tensors[graph.inputs[position]].shape)) for _, position in graph.ties}
    totals: dict[frozenset[int], float] = {}
    for _, exchange in modelled.combining(choices):
        about = graph.tensors[exchange.tensor]
        if tuple(sorted(about.shape)) in shapes and not any(exchange.steps[0].before):
            over = frozenset(axis for step in exchange.steps if step.kind in SUMS for axis in step.axes)
            totals[over] = totals.get(over, 0.0) + about.nbytes
    return max([1, *[math.ceil(total / COMBINED_BYTES) for total in totals.values()]])
