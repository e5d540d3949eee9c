"""What exchanges need of memory: copies in other layouts, and what is there only while they run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from jaxplan.cost.buffers import TRANSIENT, Buffer, Facts, Local, axes_of
from jaxplan.cost.build import Modelled
from jaxplan.cost.exchange import Step, reshard_steps
from jaxplan.cost.library import wider
from jaxplan.cost.price import write_layout
from jaxplan.cost.stage_memory import before_loop, staged
from jaxplan.graph import Graph, Operator
from jaxplan.graph.flatten import BOUNDARY, INPUT, VIEW
from jaxplan.layout import PARTIAL, Layout


def users_of(graph: Graph, facts: Facts, tensor: int, members: Sequence[int]) -> list[int]:
    """Places at which a cluster reads a tensor in a layout of its own. A stack that a loop slices is brought there whole, before
    the loop begins; what enters a loop otherwise is a value inside it already."""
    op = graph.operators[members[-1]]
    if op.name != BOUNDARY:
        return [facts.place[m] for m in members if m in facts.place and tensor in graph.operators[m].operands]
    if op.path[-2] != "in" or graph.tensors[tensor].shape == graph.tensors[op.results[0]].shape:
        return []
    loop = op.path[:-2]
    return [facts.order.begins[loop], facts.order.ends[loop]] if loop in facts.order.begins else []


def read_until(facts: Facts, tensor: int, users: Sequence[int]) -> list[int]:
    """Places where a copy in another layout is read: those of its readers, and where else kernels read it because they compute
    themselves what these make."""
    return [*users, *[facts.kept.sent[tensor, user] for user in users if (tensor, user) in facts.kept.sent]]


def transients(modelled: Modelled, choices: np.ndarray, facts: Facts, local: Local) -> list[Buffer]:
    """Copies that exchanges make: a tensor in its readers' layout, from the first to the last of them; a partial result, once."""
    graph, sizes, place = modelled.graph, modelled.numbers.sizes, facts.place
    asked: dict[tuple[int, Layout], list[int]] = {}
    shares: dict[tuple[int, Layout], float] = {}
    for reading, (source, wanted) in zip(modelled.readings, modelled.layouts_of(choices), strict=True):
        ndim, members = len(reading.read.leads), graph.clusters[reading.reader].members
        if source == wanted or graph.operators[members[-1]].name == VIEW:
            continue
        users = users_of(graph, facts, reading.tensor, members)
        steps = reshard_steps(source, wanted, ndim, modelled.setting.order)
        if staged(modelled, graph.operators[members[-1]]):
            users = [before_loop(modelled, facts, min(users, default=0)), *users] if users else users
        if staged(modelled, graph.operators[members[-1]]) or any(step.kind != "slice" for step in steps):
            asked.setdefault((reading.tensor, wanted), []).extend(users)
            share = 1.0 if reading.tensor in facts.more.narrow else reading.share * sent_wider(graph, facts, reading.tensor)
            shares[reading.tensor, wanted] = max(shares.get((reading.tensor, wanted), 0.0), share)
    found = list[Buffer]()
    for (tensor, layout), users in asked.items():
        if users:
            nbytes, last = shares[tensor, layout] * local(tensor, layout), max(read_until(facts, tensor, users))
            found.append(Buffer(tensor, TRANSIENT, nbytes, min(users), last, axes_of(layout)))
    if not facts.fuses:
        found += _on_the_way(modelled, choices, facts, local, asked) + _masked(modelled, choices, facts, local)
        found += _in_rounds(modelled, choices, facts, local) + _made_whole(modelled, facts)
    for index, exchange in modelled.combining(choices):
        if exchange.operator in place:
            split = tuple([axis for axes in exchange.steps[0].before for axis in axes])
            size = graph.tensors[exchange.tensor].nbytes / math.prod([sizes[axis] for axis in split])
            size *= sent_wider(graph, facts, exchange.tensor)
            at = place[exchange.operator]
            together = facts.combined.get(exchange.operator, at)
            last = max(facts.more.waits.get(exchange.tensor, at), together)
            if any(step.kind == "reduce_scatter" for step in exchange.steps):
                last = max(last, facts.more.beside.get(exchange.tensor, at))
            found.append(Buffer(exchange.tensor, TRANSIENT, size, at, max(at, last), split))
            parts = math.prod([sizes[axis] for step in exchange.steps if step.kind == "reduce_scatter" for axis in step.axes])
            adds = graph.clusters[index].adds
            if parts > 1 and not facts.fuses and not adds:  # all is reduced (a sum's terms make room), then sliced
                until = max(together, until_sliced(facts, exchange.tensor, at))
                found.append(Buffer(exchange.tensor, TRANSIENT, size, together, until, split))
            if parts > 1 and facts.fuses:  # what goes round lies beside the whole
                found.append(Buffer(exchange.tensor, TRANSIENT, size / parts, max(at, last), max(at, last), split))
    return found


def sent_wider(graph: Graph, facts: Facts, tensor: int) -> float:
    """How many times as large exchanges have a tensor as loops do."""
    about = graph.tensors[tensor]
    return 1.0 if facts.fuses else wider(about.dtype, about.itemsize)


def _in_rounds(modelled: Modelled, choices: np.ndarray, facts: Facts, local: Local) -> list[Buffer]:
    """Of operators that make their results in rounds: what goes into the last round (what comes out of it is stored as long as it
    is read, `cost/library.py`). In a loop, the numbers of the elements, from which the first round starts, are the same every
    time and made before it, once for all of one shape and layout."""
    graph, found = modelled.graph, list[Buffer]()
    drawn = [(at, op) for at, op in enumerate(facts.operators) if op.rule.rounds_words and op.results[0] >= 0]
    if not drawn:
        return found
    layouts = dict(facts.inner)
    for index, cluster in enumerate(graph.clusters):
        options = modelled.chosen(choices, index)
        layouts.update({write.tensor: write_layout(write.leads, options) for write in cluster.writes})
    loops = {op.path[:-2] for op in facts.operators if op.name == BOUNDARY and op.path[-2] != "out"}
    counted: dict[tuple[tuple[int, ...], Layout | None], list[Buffer]] = {}
    for at, op in drawn:
        tensor, layout, words = op.results[0], layouts.get(op.results[0]), op.rule.rounds_words // 2
        word = local(tensor, layout) / graph.tensors[tensor].itemsize * 4
        found += [Buffer(tensor, TRANSIENT, word, at, at, axes_of(layout)) for _ in range(words)]
        loop = next((op.path[:depth] for depth in range(1, len(op.path)) if op.path[:depth] in loops), None)
        last = facts.order.ends.get(loop, at) if loop is not None else -1
        if last >= 0:
            same = counted.setdefault((graph.tensors[tensor].shape, layout), [])
            until = max([last, *[numbers.last for numbers in same]])
            same[:] = [Buffer(tensor, TRANSIENT, word, 0, until, axes_of(layout)) for _ in range(words)]
    return found + [numbers for same in counted.values() for numbers in same]


def _made_whole(modelled: Modelled, facts: Facts) -> list[Buffer]:
    """Results of which every device makes all: until loops have taken their parts."""
    found, tensors = [], modelled.graph.tensors
    for at, op in enumerate(facts.operators):
        if op.rule.made_whole and op.results[0] >= 0:
            word = 4 * math.prod(tensors[op.results[0]].shape)
            found.append(Buffer(op.results[0], TRANSIENT, word, at, until_sliced(facts, op.results[0], at), ()))
    return found


def until_sliced(facts: Facts, tensor: int, at: int) -> int:
    """The last place where a loop slices what was reduced whole at a place to be scattered."""
    return max([at, *[place for place in facts.readers.get(tensor, ()) if computes(facts.operators[place])]])


def _masked(modelled: Modelled, choices: np.ndarray, facts: Facts, local: Local) -> list[Buffer]:
    """Operands that are stored masked, as often as there are groups, from the first to the last operator that wants them so; a
    product that sums over what is masked has a copy of its own, turned. The masks too, of a byte per element."""
    graph = modelled.graph
    cluster = {member: index for index, cluster in enumerate(graph.clusters) for member in cluster.members}
    wants: dict[tuple[int, Layout], list[int]] = {}
    found, often = [], dict[int, float]()
    read = {(r.tensor, r.reader): pair[1] for r, pair in zip(modelled.readings, modelled.layouts_of(choices), strict=True)}
    for at, operator in enumerate(facts.operators):
        for tensor, times in zip(operator.operands, operator.rule.masked, strict=False):
            layout = read.get((tensor, cluster.get(facts.order.sequence[at], -1)))
            if times and layout is not None:
                wants.setdefault((tensor, layout), []).append(at)
                often[tensor] = times
                if sum(map(bool, operator.rule.masked)) > 1:
                    found.append(Buffer(tensor, TRANSIENT, times * local(tensor, layout), at, at, axes_of(layout)))
    masks: dict[tuple[tuple[int, ...], Layout], tuple[Buffer, ...]] = {}
    for (tensor, layout), places in wants.items():
        about, nbytes = graph.tensors[tensor], often[tensor] * local(tensor, layout)
        found.append(Buffer(tensor, TRANSIENT, nbytes, min(places), max(places), axes_of(layout)))
        mask = replace(found[-1], nbytes=nbytes / about.itemsize)
        masks[about.shape, layout] = (*masks.get((about.shape, layout), ()), mask)
    for alike in masks.values():  # equal ones are one
        found.append(replace(alike[0], first=min([m.first for m in alike]), last=max([m.last for m in alike])))
    return found


def _on_the_way(
    modelled: Modelled, choices: np.ndarray, facts: Facts, local: Local, asked: Mapping[tuple[int, Layout], Sequence[int]]
) -> list[Buffer]:
    """What exchanges for readers need besides their results."""
    found, arguments = dict[tuple[int, Layout], Buffer](), set(modelled.graph.inputs)
    for reading, (source, wanted) in zip(modelled.readings, modelled.layouts_of(choices), strict=True):
        tensor, users = reading.tensor, asked.get((reading.tensor, wanted), ())
        reader = modelled.graph.operators[modelled.graph.clusters[reading.reader].members[-1]]
        if users and source != wanted and not staged(modelled, reader):
            at, ndim = min(users), len(reading.read.leads)
            steps = reshard_steps(source, wanted, ndim, modelled.setting.order)
            stays = tensor in arguments or max(facts.readers.get(tensor, (0,))) > at
            as_it_comes = all(computes(facts.operators[user]) for user in users)
            if _more_than_result(modelled, tensor, steps, stays, not as_it_comes):
                found[tensor, wanted] = Buffer(tensor, TRANSIENT, local(tensor, wanted), at, at, axes_of(wanted))
    return list(found.values())


def to_outputs(
    modelled: Modelled, facts: Facts, layouts: Mapping[int, Layout], outputs: Sequence[Layout], local: Local
) -> list[Buffer]:
    """What exchanges of results need besides the outputs."""
    found = []
    for tensor, wanted in zip(modelled.graph.outputs, outputs, strict=True):
        source = layouts.get(tensor)
        if source is not None and source != wanted and PARTIAL not in source:
            ndim, at = len(modelled.graph.tensors[tensor].shape), min(facts.made.get(tensor, 0) + 1, len(facts.operators))
            steps = reshard_steps(source, wanted, ndim, modelled.setting.order)
            if _more_than_result(modelled, tensor, steps, True, True):
                found.append(Buffer(tensor, TRANSIENT, local(tensor, wanted), at, at, axes_of(wanted)))
    return found


def _more_than_result(modelled: Modelled, tensor: int, steps: Sequence[Step], stays: bool, stored: bool) -> bool:
    """Whether exchanges need as much again as their result, while they run. What is gathered comes part after part, and is moved
    to where it belongs if that is elsewhere, unless its readers do so (not `stored`). What is sent to all and comes from all are
    pieces, of which the first lie where the tensor was, unless that `stays`."""
    shape, sizes = modelled.graph.tensors[tensor].shape, modelled.numbers.sizes
    for step in steps:
        if step.kind == "all_gather" and stored:
            dim = next(d for d, (old, new) in enumerate(zip(step.before, step.after, strict=True)) if old != new)
            if math.prod([n // math.prod([sizes[a] for a in axes]) for n, axes in zip(shape[:dim], step.after)]) > 1:
                return True
        if step.kind == "all_to_all" and stays:
            return True
    return False


def computes(operator: Operator) -> bool:
    """Whether a loop over its elements reads what it reads wherever that lies."""
    return operator.rule.fusible and operator.name not in (BOUNDARY, INPUT)
