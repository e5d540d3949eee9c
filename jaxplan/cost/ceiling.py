"""How much memory a plan takes at most: all that may ever be stored, as if nothing were freed.

That takes a fraction of the time of `memory.py`, and a budget is mostly far from both.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

from jaxplan.cost.buffers import Local
from jaxplan.cost.build import Modelled
from jaxplan.cost.fusing import kernels_of, rounded
from jaxplan.cost.library import wider
from jaxplan.cost.memory import local_bytes
from jaxplan.cost.price import terminal_layout
from jaxplan.graph.flatten import BOUNDARY, INPUT, VIEW
from jaxplan.layout import Layout


def ceiling(
    modelled: Modelled, choices: np.ndarray, layouts: Mapping[int, Layout], inputs: Sequence[Layout], outputs: Sequence[Layout]
) -> float:
    """Bytes per device that the modelled peak of a plan does not exceed; infinite for pipelines, of which it is not told.
    `layouts`: per tensor that a cluster leaves; `inputs`, `outputs`: per flat input and output of the program."""
    graph, machine = modelled.graph, modelled.numbers.machine
    if modelled.stages is not None or (machine.materialises and machine.tile is not None):
        return math.inf
    if machine.materialises:
        local = local_bytes(modelled)
        held = _materialised(modelled, choices, layouts, local)
    else:
        kernels = kernels_of(modelled.graph)
        local = local_bytes(modelled, rounded(modelled.graph)[0] - {*graph.inputs}, kernels.outer)
        held = _fused(modelled, choices, layouts, local)
    ends = [*zip(graph.inputs, inputs, strict=True), *2 * [*zip(graph.outputs, outputs, strict=True)]]  # on the way there, too
    return held + sum([local(tensor, layout) for tensor, layout in ends if tensor >= 0])


def _fused(modelled: Modelled, choices: np.ndarray, layouts: Mapping[int, Layout], local: Local) -> float:
    """Where compilers fuse: all but what its only reader computes, and what exchanges make and need; of state, what is kept while
    its new value is made, and copies with dimensions in another order."""
    graph, kernels, total = modelled.graph, kernels_of(modelled.graph), 0.0
    viewed = {op.operands[0] for op in graph.operators if op.name == VIEW}
    read = Counter(chain.from_iterable([op.operands for op in graph.operators]))
    for tensor, layout in layouts.items():
        place = kernels.made.get(tensor, -1)
        if place < 0:
            continue  # an input
        op = graph.operators[place]
        if op.name == BOUNDARY and op.path[-2] == "in":  # all rounds' parts, and these rounded
            whole, part = graph.tensors[op.operands[0]].nbytes if op.operands[0] >= 0 else 0, graph.tensors[tensor].nbytes
            total += 2 * local(tensor, layout) * (max(1.0, whole / part) if part else 1.0)
        elif op.name == VIEW:
            total += local(tensor, layout) if layouts.get(op.operands[0]) != layout else 0.0
        elif read[tensor] > 1 or tensor in viewed or tensor in kernels.leaving or kernels.carry or not kernels.inside(op):
            total += local(tensor, layout)
    for output, position in graph.ties:
        new, old = graph.outputs[output], graph.inputs[position]
        total += max(local(old, layouts.get(old)), local(old, layouts.get(new)))
    for tensor in graph.outputs:
        if tensor >= 0:
            total += 3 * local(tensor, layouts.get(tensor))
    return total + _exchanged(modelled, choices, local, 1.0)


def _materialised(modelled: Modelled, choices: np.ndarray, layouts: Mapping[int, Layout], local: Local) -> float:
    """Where they materialise: every value, a copy of every operand in another order, in wider numbers or masked, and a
    broadcast of it; the words of what is drawn in rounds."""
    graph, total = modelled.graph, 0.0
    known, of = dict(layouts), modelled.states(choices)
    inner: dict[tuple[int, tuple[int, ...]], Layout] = {}
    for index, cluster in enumerate(graph.clusters):
        for value in cluster.inner:
            key = of[index], value.leads
            if key not in inner:
                inner[key] = terminal_layout(value.leads, modelled.chosen(choices, index))
            known.setdefault(value.tensor, inner[key])
    sizes = dict[int, float]()
    for number, (about, op_layout) in enumerate(zip(graph.tensors, map(known.get, range(len(graph.tensors))), strict=True)):
        sizes[number] = local(number, op_layout) * max(1.0, 4 / about.itemsize if about.itemsize else 1.0)
    for op in graph.operators:
        if op.name in (VIEW, INPUT):
            total += sizes[op.results[0]]
            continue
        rule, read = op.rule, [tensor for tensor in op.operands if tensor >= 0]
        results = sum([sizes[tensor] for tensor in op.results if tensor >= 0])
        total += (1 + len(op.operands) + rule.rounds_words) * results
        if rule.product or not rule.fusible:
            total += sum([sizes[tensor] for tensor in read])
        if rule.made_whole:
            total += sum([4 * math.prod(graph.tensors[tensor].shape) for tensor in op.results if tensor >= 0])
    return total + _exchanged(modelled, choices, local, 2.0)


def _exchanged(modelled: Modelled, choices: np.ndarray, local: Local, more: float) -> float:
    """Copies in other layouts, and partial results. `more`: how many times that, since something lies beside them."""
    graph, sizes, total = modelled.graph, modelled.numbers.sizes, 0.0
    widest = 1.0 if not modelled.numbers.machine.materialises else wider("bfloat16", 2)
    masked = max([times for op in graph.operators for times in op.rule.masked], default=0.0)
    for reading, (written, wanted) in zip(modelled.readings, modelled.layouts_of(choices), strict=True):
        if written != wanted:
            total += (more * widest + 3 * masked) * local(reading.tensor, wanted)
        elif masked:
            total += 3 * masked * local(reading.tensor, wanted)
    for _, exchange in modelled.combining(choices):
        parts = math.prod([sizes[axis] for axes in exchange.steps[0].before for axis in axes])
        scattered = any(step.kind == "reduce_scatter" for step in exchange.steps)
        beside = (1.0 if modelled.numbers.machine.materialises else 0.5) if scattered else 0.0
        total += widest * (1.0 + beside) * graph.tensors[exchange.tensor].nbytes / parts
    return total
