"""What memory holds where layers run in stages, beside what values need anyway (`memory.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jaxplan.cost.buffers import OUTPUT, TRANSIENT, Buffer, Copied, Facts, Local, Roots, axes_of
from jaxplan.cost.build import Modelled
from jaxplan.cost.exchange import reshard_steps
from jaxplan.cost.stages import Path, Stages, Staging, stacks
from jaxplan.graph import Operator
from jaxplan.graph.flatten import BOUNDARY
from jaxplan.layout import Layout


def kept_before(modelled: Modelled, facts: Facts, layouts: Mapping[int, Layout], local: Local) -> list[Buffer]:
    """Of what micro-batches add up or is kept of each of them, what is there before: the part that is written. Compilers that
    materialise read it at the beginning, of what layers stack at that of a layer, of what leaves the last one at that of a tick.
    A sum over the layers of a stage that has one is added to as it is."""
    if modelled.stages is None or facts.fuses:
        return []
    asked, found = modelled.stages.asked, []
    for op in facts.operators:
        loop, part, last = op.path[:-2], -1, 0
        if _stacks(op, "out", asked) and (op.operands[0] in asked.rows or asked.loops[loop][1] > 1):
            part, last = op.operands[0], facts.made.get(op.operands[0], facts.order.ends[loop])
        elif op.name == BOUNDARY and op.path[-2] == "carry" and loop in asked.loops and not asked.middle:
            part, last = (op.results[0] if op.results[0] in asked.rows else -1), facts.order.ends[loop]
        if part >= 0:
            layout = layouts.get(part)
            found.append(Buffer(part, TRANSIENT, local(part, layout), facts.order.begins[loop], last, axes_of(layout)))
    return found


def _stacks(op: Operator, mark: str, asked: Staging) -> bool:
    """Whether an operator is where a stack enters (`mark`: "in") or leaves ("out") one of the loops."""
    return op.name == BOUNDARY and op.path[-2] == mark and op.path[:-2] in asked.loops and stacks(op)


def gathered_layers(
    modelled: Modelled, facts: Facts, layouts: Mapping[int, Layout], local: Local, held: list[Buffer], roots: Roots
) -> list[Buffer]:
    """The buffers of values, what stages of unequal length stack apart: until the loop ends a stage has room for its own layers,
    then those of all stages, each filled up to the longest; one stack is gathered after another."""
    if modelled.stages is None or not modelled.stages.gathered:
        return held
    asked, found = modelled.stages.asked, dict[Any, Buffer]({buffer.tensor: buffer for buffer in held})
    after: dict[tuple[Any, ...], int] = {}
    for op in facts.operators:
        if op.name == BOUNDARY and op.results and op.results[0] in modelled.stages.gathered:
            stack, layer, loop = op.results[0], op.operands[0], op.path[:-2]
            layout, (_, most) = layouts.get(layer), asked.loops[loop]
            most *= asked.microbatches if layer in asked.rows else 1
            part, whole = most * local(layer, layout), found.get(roots.of(stack))
            after[loop] = after.get(loop, facts.order.ends[loop]) + 1
            found[layer, stack] = Buffer(layer, TRANSIENT, part, 0, after[loop], axes_of(layout))
            if whole is not None:
                filled = whole.nbytes if whole.kind == OUTPUT else asked.stages * part
                found[roots.of(stack)] = replace(whole, first=min(after[loop], whole.last), nbytes=filled)
    return list(found.values())


def from_the_start(modelled: Modelled, facts: Facts, held: list[Buffer], roots: Roots) -> list[Buffer]:
    """The buffers of values, what stages stack from the beginning of the program: it starts as zeros, which need nothing, so that
    compilers that materialise make them first."""
    if modelled.stages is None or facts.fuses:
        return held
    stacked = {roots.of(op.results[0]) for op in facts.operators if _stacks(op, "out", modelled.stages.asked)}
    return [replace(buffer, first=0) if buffer.tensor in stacked else buffer for buffer in held]


def carried_elsewhere(modelled: Modelled, choices: np.ndarray, facts: Facts, local: Local) -> list[Buffer]:
    """Rows that layers hand on and that lie otherwise before the first layer: brought to their layout before the loop, whole."""
    if modelled.stages is None or facts.fuses:
        return []
    asked, graph, found = modelled.stages.asked, modelled.graph, dict[tuple[int, Path], Buffer]()
    for reading, (source, wanted) in zip(modelled.readings, modelled.layouts_of(choices), strict=True):
        op = graph.operators[graph.clusters[reading.reader].members[-1]]
        enters = op.name == BOUNDARY and op.path[-2] == "carry" and op.path[:-2] in asked.loops and op.results[0] in asked.rows
        if enters and reading.tensor == op.operands[0] and source != wanted:
            steps = reshard_steps(source, wanted, len(reading.read.leads), modelled.setting.order)
            if any(step.kind != "slice" for step in steps):
                loop = op.path[:-2]
                first, last = facts.order.begins[loop], facts.order.ends[loop]
                nbytes = local(reading.tensor, wanted)
                found[reading.tensor, loop] = Buffer(reading.tensor, TRANSIENT, nbytes, first, last, axes_of(wanted))
    return list(found.values())


def cut_arguments(modelled: Modelled, facts: Facts, inputs: Sequence[Layout], local: Local) -> list[Buffer]:
    """Arguments that hold rows of the batch, put in order by micro-batch for a loop that takes one after another. Of other values
    there is only that copy."""
    if modelled.stages is None or modelled.stages.asked.microbatches == 1 or facts.fuses:
        return []
    graph, asked = modelled.graph, modelled.stages.asked
    given, found = dict(zip(graph.inputs, inputs, strict=True)), dict[tuple[int, Path], Buffer]()
    for op in facts.operators:
        if op.name == BOUNDARY and op.path[-2] != "out" and op.path[:-2] in asked.loops and op.results[0] in asked.rows:
            source, loop = op.operands[0], op.path[:-2]
            if source in given:
                layout, first = given[source], facts.order.begins[loop]
                last = max(place for place in range(first, facts.order.ends[loop]) if facts.operators[place].name != BOUNDARY)
                found[source, loop] = Buffer(source, TRANSIENT, local(source, layout), first, last, axes_of(layout))
    return list(found.values())


def staged(modelled: Modelled, op: Operator) -> bool:
    """Whether a value enters the layers of stages, where compilers that materialise cut out what is a stage's own."""
    if modelled.stages is None or not modelled.numbers.machine.materialises:
        return False
    return op.name == BOUNDARY and op.path[-2] == "in" and op.path[:-2] in modelled.stages.asked.loops


def before_loop(modelled: Modelled, facts: Facts, begin: int) -> int:
    """Where what loops over layers slice is brought to another layout: before any stage's buffers are there."""
    return begin if modelled.stages is None or facts.fuses else max(0, begin - 1)


def cut_out(modelled: Modelled, choices: np.ndarray) -> set[int]:
    """Tensors that everybody has whole, and of which stages only cut out their own: where they are computed element by element,
    the rest is never there."""
    if modelled.stages is None or not modelled.numbers.machine.materialises:
        return set()
    graph, whole, cut = modelled.graph, set(modelled.graph.outputs), set[int]()
    for reading, (source, wanted) in zip(modelled.readings, modelled.layouts_of(choices), strict=True):
        steps = reshard_steps(source, wanted, len(reading.read.leads), modelled.setting.order)
        apart = staged(modelled, graph.operators[graph.clusters[reading.reader].members[-1]])
        (cut if apart and steps and all(step.kind == "slice" for step in steps) else whole).add(reading.tensor)
    return cut - whole


def single_layers(modelled: Modelled, facts: Facts) -> frozenset[int]:
    """What a layer reads of a stack, where a stage has a single one: that is all that the stage has of the stack, and no copy."""
    if modelled.stages is None:
        return frozenset()
    asked = modelled.stages.asked
    single = {loop for loop, (_, most) in asked.loops.items() if most == 1}
    ways_in = [op for op in facts.operators if single and _stacks(op, "in", asked) and op.path[:-2] in single]
    return frozenset(op.results[0] for op in ways_in if op.results[0] not in asked.rows)


def enters_middle(modelled: Modelled, facts: Facts) -> dict[int, int]:
    """{what operators between two loops that are one read, and none of these makes: the last place where they do}. It is the same
    for all micro-batches, and made for the whole batch before."""
    if modelled.stages is None or not modelled.stages.asked.middle:
        return {}
    asked, operators, found = modelled.stages.asked, modelled.graph.operators, dict[int, int]()
    inside = {t for index in asked.middle for t in operators[index].results}
    inside |= {t for op in facts.operators if op.name == BOUNDARY and op.path[:-2] in asked.loops for t in op.results}
    for place, index in enumerate(facts.order.sequence):
        if index in asked.middle:
            found.update({t: place for t in operators[index].operands if t >= 0 and t not in inside})
    return found


def as_one_loop(
    stages: Stages, facts: Facts, buffers: Sequence[Buffer], roots: Roots, copied: Copied
) -> list[Buffer]:
    """Buffers where the forward scan, the backward scan and what stands between them are one loop: what comes from outside, and
    what leaves it or is handed from scan to scan, lives as long as the loop, and so do copies of it in another layout. Residuals
    that are read in another layout are brought there layer by layer, and never copied whole."""
    asked = stages.asked
    begin, end = (f(at[loop] for loop in asked.loops) for f, at in ((min, facts.order.begins), (max, facts.order.ends)))
    middle = {facts.place[index] for index in asked.middle}
    edges = {place for place, op in enumerate(facts.operators) if op.name == BOUNDARY and op.path[:-2] in asked.loops}
    bodies = {place for loop in asked.loops for place in range(facts.order.begins[loop], facts.order.ends[loop] + 1)} - edges
    inside = middle | edges | bodies
    own, copies = set[int](), {tensor for tensor, loop in copied if loop in asked.loops}
    for tensor in {*facts.made, *facts.readers}:
        made, readers = facts.made.get(tensor, -1), facts.readers.get(tensor, ())
        entered = inside.intersection(readers) if made not in inside else ()
        leaves = made in inside and not inside.issuperset(readers)
        stays = leaves or (made in edges and facts.operators[made].path[-2] == "out")
        if stays or any((tensor, facts.operators[place].path[:-2]) not in copied for place in entered):
            own.add(roots.of(tensor))
        if stays or entered:
            copies.add(roots.of(tensor))
    found = []
    for buffer in buffers:
        if buffer.kind == TRANSIENT and buffer.tensor in asked.ringed:
            continue
        outer = buffer.tensor in (copies if buffer.kind == TRANSIENT else own)
        if outer and buffer.first <= end and buffer.last >= begin:
            buffer = replace(buffer, first=min(buffer.first, begin), last=max(buffer.last, end))
        found.append(buffer)
    return found
