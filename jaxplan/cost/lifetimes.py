"""When bytes live that choices decide on: what `memory.py` finds of one plan, as far as it holds for all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxplan.cost.build import Modelled
from jaxplan.cost.hidden import gathered_state
from jaxplan.cost.memory import (
    OUTPUT,
    Facts,
    Local,
    facts_of,
    held_buffers,
    local_sizes,
    rounds_of,
)
from jaxplan.cost.schedule import run_order
from jaxplan.cost.transients import computes, read_until, sent_wider, until_sliced, users_of
from jaxplan.graph import Operator
from jaxplan.graph.flatten import BOUNDARY, INPUT, VIEW


@dataclass(frozen=True)
class Life:
    """Bytes that choices decide on live from place `first` to place `last` of the order: `share` of those of a tensor."""

    first: int
    last: int
    share: float = 1.0


@dataclass(frozen=True)
class Lifetimes:
    """When bytes live that choices decide on.

    `held`: of what clusters leave or store inside, by tensor (several may share one buffer, each a part of it; and copies in
    the same layout). By tensor and reading cluster: `copied`, of copies that exchanges make (equal ones are one, from the first
    reader to the last: between two readers each has half of it); `handed`, of what a view or a loop has of its own where its
    layout is another; `beside` and `pieces`, of what exchanges need more while they run, where parts are gathered along a
    dimension that is not the outermost, or all send to all; `gathered`, of state that stays while its new value is gathered;
    `ties`: the readings of new state by its old place. By operator: `partial`, of partial results; `scattered`, of those more
    that are scattered. `sequence`: the operators in that order. `local`: bytes per device of a tensor in a layout; `stored`:
    tensors for which it is equal are stored alike.
    """

    held: Mapping[int, Sequence[Life]]
    copied: Mapping[tuple[int, int], Sequence[Life]]
    handed: Mapping[tuple[int, int], Life]
    beside: Mapping[tuple[int, int], Life]
    pieces: Mapping[tuple[int, int], Life]
    gathered: Mapping[tuple[int, int], Life]
    ties: frozenset[tuple[int, int]]
    partial: Mapping[int, Life]
    scattered: Mapping[int, Life]
    sequence: Sequence[int]
    local: Local
    stored: Callable[[int], Hashable]

    @property
    def places(self) -> int:
        """In all: those of the order, and two after it."""
        return len(self.sequence) + 2


def waits(modelled: Modelled, choices: np.ndarray) -> bool:
    """Whether products run behind a later loop, and what they read lives longer, because a plan gathers state behind which they
    can hide."""
    return any(op.name == BOUNDARY for op in modelled.graph.operators) and _delayed(modelled, choices)


def puts_off(modelled: Modelled, choices: np.ndarray) -> bool:
    """The same of programs without loops, where they run behind all other products."""
    return not any(op.name == BOUNDARY for op in modelled.graph.operators) and _delayed(modelled, choices)


def _delayed(modelled: Modelled, choices: np.ndarray) -> bool:
    gathered = {} if modelled.numbers.machine.materialises else gathered_state(modelled, choices)
    return bool(gathered) and facts_of(modelled, choices, gathered).more.delayed


def lifetimes(modelled: Modelled, choices: np.ndarray, donated: Sequence[bool], prompt: bool = False) -> Lifetimes:
    """What lives when, near a plan: `choices` per cluster say what is stored at all, where that depends on them.

    Layouts do not enter otherwise: views are taken to share the buffer of what they view. `prompt`: as if no state were gathered,
    so that nothing waits for it.
    """
    graph = modelled.graph
    gathered = {} if prompt or modelled.numbers.machine.materialises else gathered_state(modelled, choices)
    facts, ties = facts_of(modelled, choices, gathered), dict(graph.ties)
    places = len(facts.order.sequence) + 2
    replaced = {graph.outputs[position]: graph.inputs[ties[position]] for position in ties if donated[ties[position]]}
    own = {t: 0.0 for p, t in enumerate(graph.outputs) if t >= 0 and not (p in ties and donated[ties[p]])}
    tensors = [write.tensor for cluster in graph.clusters for write in cluster.writes]
    buffers, roots = held_buffers(graph, facts, dict.fromkeys(tensors, ()), own, replaced, lambda tensor, layout: 0.0)
    lives = {b.tensor: Life(0, places - 1) if b.kind == OUTPUT else Life(b.first, b.last) for b in buffers}
    sharing: dict[int, list[int]] = {}
    held = {tensor: [Life(0, places - 1)] for tensor in graph.inputs}
    partial, scattered = dict[int, Life](), dict[int, Life]()
    for cluster in graph.clusters:
        for combine in cluster.combines if cluster.times else ():
            if combine.operator in facts.place:
                at, tensor = facts.place[combine.operator], combine.result.tensor
                together = facts.combined.get(combine.operator, at)
                partial[combine.operator] = Life(at, max(together, facts.more.waits.get(tensor, at)))
                if not facts.fuses and not cluster.adds:
                    scattered[combine.operator] = Life(together, max(together, until_sliced(facts, tensor, at)))
        if graph.operators[cluster.members[-1]].name != VIEW and cluster.times:
            for write in cluster.writes:
                if write.tensor not in held and write.tensor not in facts.fused and roots.of(write.tensor) in lives:
                    sharing.setdefault(roots.of(write.tensor), []).append(write.tensor)
    for root, found in sharing.items():
        held.update({tensor: [replace(lives[root], share=1.0 / len(found))] for tensor in found})
    for tensor, first, last in (*facts.more.copies, *[(tensor, at, at) for tensor, at in facts.more.turned]):
        held.setdefault(tensor, []).append(Life(first, last))
    for result, life in _rounded_parts(modelled, facts).items():
        held.setdefault(result, []).append(life)
    for spread in facts.kept.spreads:
        times = spread.times(graph.tensors[spread.tensor].itemsize)
        held.setdefault(spread.tensor, []).append(Life(spread.first, spread.last, times))

    def stored(tensor: int) -> Hashable:
        about = graph.tensors[tensor]
        return about.shape, about.dtype, tensor in facts.more.narrow, tuple(facts.more.outer.get(tensor, ()))

    return Lifetimes(
        held, *_copied(modelled, facts), *_on_the_way(modelled, facts), _kept(modelled, facts, replaced),
        frozenset(_ties(modelled)), partial, scattered, facts.order.sequence, local_sizes(modelled, facts), stored,
    )  # fmt: skip


def certain_lives(modelled: Modelled, donated: Sequence[bool]) -> tuple[dict[int, list[Life]], int]:
    """(by tensor, lives that are part of the peak whatever is chosen; the places in all).

    Inputs always; outputs with buffers of their own at the last place, since temporaries may lie in these before; and what one
    loop stacks for later ones, from the beginning of the one to that of the first of the others.
    """
    graph = modelled.graph
    order, ties = run_order(graph, modelled.numbers.machine.materialises), dict(graph.ties)
    places = len(order.sequence) + 2
    found = {tensor: [Life(0, places - 1)] for tensor in graph.inputs}
    for tensor, position in {tensor: position for position, tensor in enumerate(graph.outputs)}.items():
        if tensor >= 0 and not (position in ties and donated[ties[position]]):
            laid = graph.inputs[ties[position]] if position in ties else tensor
            found.setdefault(laid, []).append(Life(places - 1, places - 1))
    operators = graph.operators
    sliced: dict[int, list[int]] = {}
    for op in operators:
        if op.name == BOUNDARY and op.path[-2] == "in" and op.path[:-2] in order.begins:
            sliced.setdefault(op.operands[0], []).append(order.begins[op.path[:-2]])
    for op in operators:
        if op.name == BOUNDARY and op.path[-2] == "out" and op.results[0] in sliced and op.results[0] not in graph.outputs:
            first, last = order.begins[op.path[:-2]], min(sliced[op.results[0]])
            if first < last:
                found.setdefault(op.results[0], []).append(Life(first, last))
    return found, places


def _ties(modelled: Modelled) -> dict[tuple[int, int], int]:
    """{(new value of state, the cluster of its old value): old value}."""
    graph = modelled.graph
    olds = {graph.outputs[output]: graph.inputs[position] for output, position in graph.ties}
    return {
        (reading.tensor, reading.reader): olds[reading.tensor]
        for reading in modelled.readings
        if reading.tensor in olds and graph.operators[graph.clusters[reading.reader].members[-1]].name == INPUT
    }


def _rounded_parts(modelled: Modelled, facts: Facts) -> dict[int, Life]:
    """{what a round of a loop sees of a stack that is rounded before it: all rounds' parts, as long as the loop runs}."""
    graph, machine, found = modelled.graph, modelled.numbers.machine, dict[int, Life]()
    for op in facts.operators if facts.fuses else ():
        if op.name == BOUNDARY and op.path[-2] == "in" and op.operands[0] >= 0:
            source, result, loop = op.operands[0], op.results[0], op.path[:-2]
            narrow = result in facts.more.narrow and source not in facts.more.narrow
            if narrow and machine.rounded_share(graph.tensors[source].dtype) < 1:
                found[result] = Life(facts.order.begins[loop], facts.order.ends[loop], rounds_of(graph, op))
    return found


def _kept(modelled: Modelled, facts: Facts, replaced: Mapping[int, int]) -> dict[tuple[int, int], Life]:
    """Of state that a loop reads, and whose new parts are gathered into its place, a copy stays until they are made."""
    looped = {op.operands[0] for op in facts.operators if op.name == BOUNDARY and op.path[-2] == "in"}
    return {
        key: Life(0, facts.made.get(key[0], 0))
        for key in _ties(modelled)
        if facts.fuses and replaced.get(key[0]) in looped
    }


def _copied(
    modelled: Modelled, facts: Facts
) -> tuple[dict[tuple[int, int], list[Life]], dict[tuple[int, int], Life]]:
    """Of each tensor and cluster that would read it in a layout of its own: (copies that exchanges make; buffers of views and of
    what enters a loop)."""
    graph = modelled.graph
    own, handed = dict[int, dict[int, Life]](), dict[tuple[int, int], Life]()
    for reading in modelled.readings:
        members = graph.clusters[reading.reader].members
        last, key = graph.operators[members[-1]], (reading.tensor, reading.reader)
        users = users_of(graph, facts, reading.tensor, members)
        if not reading.times:
            continue
        if last.name == VIEW or (last.name == BOUNDARY and last.path[-2] == "in" and not users):
            users = [facts.made[last.results[0]], *facts.readers.get(last.results[0], ())]
            if last.name == BOUNDARY:  # every round reads it
                users += [facts.order.begins[last.path[:-2]], facts.order.ends[last.path[:-2]]]
            handed[key] = Life(min(users), max(users))
        elif users:
            users += [_last(facts, op.results[0]) for op in map(graph.operators.__getitem__, members) if _as_it_is(facts, op)]
            users = read_until(facts, reading.tensor, users)
            share = sent_wider(graph, facts, reading.tensor)
            own.setdefault(reading.tensor, {})[reading.reader] = Life(min(users), max(users), share)
    return {(tensor, reader): found for tensor, lives in own.items() for reader, found in _with_gaps(lives).items()}, handed


def _on_the_way(modelled: Modelled, facts: Facts) -> tuple[dict[tuple[int, int], Life], dict[tuple[int, int], Life]]:
    """By tensor and the first cluster that would read it in a layout of its own, where exchanges for it run: (those whose parts
    have to be moved afterwards, since what reads them is no loop over elements; those whose tensor stays)."""
    graph, arguments = modelled.graph, set(modelled.graph.inputs)
    first = dict[int, tuple[int, int, bool]]()
    for reading in modelled.readings if not facts.fuses else ():
        members = graph.clusters[reading.reader].members
        users = users_of(graph, facts, reading.tensor, members)
        if users and reading.times and graph.operators[members[-1]].name != VIEW:
            one = (min(users), reading.reader, not all(computes(facts.operators[user]) for user in users))
            first[reading.tensor] = min(first.get(reading.tensor, one), one)
    beside = {(tensor, reader): Life(at, at) for tensor, (at, reader, stored) in first.items() if stored}
    pieces = {
        (tensor, reader): Life(at, at) for tensor, (at, reader, _) in first.items()
        if tensor in arguments or max(facts.readers.get(tensor, (0,))) > at
    }  # fmt: skip
    return beside, pieces


def _as_it_is(facts: Facts, operator: Operator) -> bool:
    """Whether an operator hands on the elements it is given, so that a copy which is made for it lives on under its name."""
    return len(operator.results) == 1 and (operator.name == VIEW or operator.results[0] in facts.kept.same)


def _last(facts: Facts, tensor: int) -> int:
    """The last place where a tensor is read, by this or by other names."""
    last, ahead, seen = facts.made.get(tensor, 0), [tensor], {tensor}
    while ahead:
        for place in facts.readers.get(ahead.pop(), ()):
            last = max(last, place)
            new = set(facts.operators[place].results) - seen if _as_it_is(facts, facts.operators[place]) else set()
            seen |= new
            ahead += new
    return last


def _with_gaps(lives: Mapping[int, Life]) -> dict[int, list[Life]]:
    """By reader, when it reads a copy; and half of the time to the one before and after it, which may read the same copy. Where
    both do, that adds up to the copy; where one does, to half too much of it."""
    found = {reader: [life] for reader, life in lives.items()}
    order = sorted(lives, key=lambda reader: (lives[reader].first, lives[reader].last))
    until = -1
    for before, after in itertools.pairwise(order):
        until = max(until, lives[before].last)
        if until + 1 < lives[after].first:
            gap = Life(until + 1, lives[after].first - 1, 0.5)
            found[before].append(gap)
            found[after].append(gap)
    return found
