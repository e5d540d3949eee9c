"""What a piece of a program takes of memory where it runs by itself, as a program of its own."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from jaxplan.cost.buffers import HELD, OUTPUT, Buffer, Facts, outside_outputs, stored_besides
from jaxplan.cost.build import Modelled
from jaxplan.cost.library import NO_MORE
from jaxplan.cost.memory import held_buffers, kept_of, lives_of, local_sizes, sunk
from jaxplan.cost.schedule import Order
from jaxplan.cost.transients import transients
from jaxplan.graph import Operator
from jaxplan.graph.flatten import INPUT
from jaxplan.layout import Layout
from jaxplan.rules import Rule


@dataclass(frozen=True)
class Piece:
    """Some operators of a program. `places`: where they stand in its order, ascending; `given`: tensors that somebody else keeps,
    what they read and what they write in place; `leaves`: {tensor: (bytes per device, the place where it is made)} of the
    results; numbers below 0 stand for what is no tensor of the graph."""

    places: Sequence[int]
    given: Set[int]
    leaves: Mapping[int, tuple[float, int]]

    def at(self, place: int) -> int:
        """Where a place of the program stands among those of the piece."""
        return min(bisect.bisect_left(self.places, place), len(self.places) - 1)

    def spans(self, buffer: Buffer) -> tuple[int, int]:
        """The places of the piece during which a buffer of the program lives; the first is past the last where there is none."""
        return bisect.bisect_left(self.places, buffer.first), bisect.bisect_right(self.places, buffer.last) - 1


def piece_bytes(piece: Piece, buffers: Sequence[Buffer]) -> float:
    """Bytes per device that a piece takes beside what it is given, its results included, where compilers fuse. `buffers`: of the
    whole program."""
    if not piece.places:
        return 0.0
    own, found = set(piece.places), list[Buffer]()
    for buffer in buffers:
        first, last = piece.spans(buffer)
        foreign = buffer.first not in own or buffer.tensor in piece.given or buffer.tensor in piece.leaves
        if first <= last and buffer.kind != OUTPUT and not (buffer.kind == HELD and foreign):
            found.append(replace(buffer, first=first, last=last))
    total = sum([nbytes for nbytes, _ in piece.leaves.values()])
    return total + float(lives_of(found, len(piece.places) + 1).max(initial=0.0))


def compiled_piece_bytes(
    modelled: Modelled, choices: np.ndarray, facts: Facts, layouts: Mapping[int, Layout], piece: Piece,
    besides: Sequence[Buffer], instead: Set[int],
) -> float:  # fmt: skip
    """The same where compilers materialise: what is stored is found for the piece alone. `facts`, `layouts`: of the whole
    program, the latter of what clusters leave; `besides`: further buffers, by places of the program; `instead`: tensors whose
    exchanges are among these."""
    if not piece.places:
        return 0.0
    own = _facts(modelled, choices, facts, piece)
    inner = {t: layout for t, layout in own.inner.items() if t not in own.fused}
    layouts = {**inner, **layouts}
    local, end = local_sizes(modelled, own), len(own.operators)
    held, roots = held_buffers(modelled.graph, own, layouts, {}, {}, local)
    elsewhere = {roots.of(t) for t in (*piece.given, *piece.leaves)}
    found = [buffer for buffer in held if own.made.get(buffer.tensor) and buffer.tensor not in elsewhere]
    found += [buffer for buffer in transients(modelled, choices, own, local) if buffer.tensor not in instead]
    found += stored_besides(modelled.graph, own, layouts, local)
    for buffer in besides:
        first, last = piece.spans(buffer)
        found.append(replace(buffer, first=first + 1, last=last + 1))
    for tensor, (nbytes, made) in piece.leaves.items():
        found.append(Buffer(tensor, OUTPUT, nbytes, piece.at(made) + 1, end))
    total = sum([nbytes for nbytes, _ in piece.leaves.values()])
    return total + float(lives_of(outside_outputs(found, own.kept.written_over), end + 1).max(initial=0.0))


def _facts(modelled: Modelled, choices: np.ndarray, facts: Facts, piece: Piece) -> Facts:
    """`facts` of a piece alone: place 0 is where it is given what it reads, the others those of the piece."""
    places, leaving = piece.places, {t for t in (*piece.leaves, *piece.given) if t >= 0}
    start = Operator(INPUT, Rule((), (), ()), (), tuple(sorted(piece.given)), 1.0, -1, (INPUT, -1))
    operators = [start, *[facts.operators[place] for place in places]]
    sequence = (-1, *[facts.order.sequence[place] for place in places])
    own = {place: k + 1 for k, place in enumerate(places)}
    begins, ends = facts.order.begins, facts.order.ends
    whole = [loop for loop in begins if begins[loop] in own and ends[loop] in own]
    order = Order(sequence, {loop: own[begins[loop]] for loop in whole}, {loop: own[ends[loop]] for loop in whole})
    made: dict[int, int] = {}
    readers: dict[int, list[int]] = {}
    for place, operator in enumerate(operators):
        made.update(dict.fromkeys(operator.results, place))
        for tensor in operator.operands:
            if tensor >= 0:
                readers.setdefault(tensor, []).append(place)
    inside = frozenset(sunk(modelled.graph, operators, readers) - leaving)
    at = {index: place for place, index in enumerate(sequence) if index >= 0}
    found = replace(facts, order=order, operators=operators, made=made, readers=readers, fused=inside, place=at, kept=NO_MORE)
    return kept_of(modelled, choices, found, leaving)
