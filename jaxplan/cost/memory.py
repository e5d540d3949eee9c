"""Bytes per device: what lives when, under planned layouts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from jaxplan.graph import Graph
from jaxplan.graph.flatten import BOUNDARY
from jaxplan.layout import Layout


def shards(layout: Layout, sizes: Sequence[int]) -> int:
    """Over how many devices a layout spreads a tensor."""
    return math.prod([size for dim, size in zip(layout, sizes, strict=True) if dim >= 0])


def peak_bytes(graph: Graph, layouts: Mapping[int, Layout], sizes: Sequence[int]) -> float:
    """Largest sum of live bytes per device: every tensor that a cluster writes lives from there to its last reader.

    Inputs live throughout; state that goes round is updated in place; what a loop stacks lives as long as the loop.
    """
    count = len(graph.operators)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    scope_start: dict[int, int] = {}
    for index, operator in enumerate(graph.operators):
        scope_start.setdefault(operator.scope, index)
        for tensor in operator.results:
            first[tensor] = index
        for tensor in operator.operands:
            if tensor >= 0:
                last[tensor] = index
                if operator.name == BOUNDARY and tensor in first:
                    producer = graph.operators[first[tensor]]
                    if producer.scope != operator.scope:
                        for result in operator.results:
                            first[result] = min(first.get(result, index), scope_start[producer.scope])
    tied = {graph.outputs[output] for output, _ in graph.ties}
    for tensor in graph.outputs:
        if tensor >= 0:
            last[tensor] = count
    spread: dict[Layout, int] = {}
    inputs = set(graph.inputs)
    change = [0.0] * (count + 2)
    for tensor, layout in layouts.items():
        if tensor in tied and tensor not in inputs:
            continue
        start, stop = first.get(tensor, 0), last.get(tensor, first.get(tensor, 0))
        if tensor in inputs:
            start, stop = 0, count
        parts = spread.get(layout)
        if parts is None:
            parts = spread[layout] = shards(layout, sizes)
        value = graph.tensors[tensor].nbytes / parts
        change[start] += value
        change[stop + 1] -= value
    return float(np.cumsum(change).max())
