"""Room `ledger`: what the bytes of a plan's peak are, by kind and tensor by tensor.

State is what goes round: arguments that come back as results. *Parameters* are state that some other result (a loss) depends on,
or, where all results are state, that more than element-wise work reads; *other state* is the rest of it (moments, counters),
and what is only written in part (caches). *Gradients* are values of a parameter's size on the element-wise way to its new value,
and those that such ways begin at; the new value itself is of the kind of the old one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from jaxplan.cost.memory import HELD, OUTPUT
from jaxplan.graph import Graph, Operator
from jaxplan.graph.flatten import BOUNDARY, INPUT
from jaxplan.plan import Plan

PARAMETERS, STATE, INPUTS, OUTPUTS, GRADIENTS, ACTIVATIONS, TRANSIENTS = KINDS = (
    "parameters", "other state", "other arguments", "outputs", "gradients", "activations", "transients",
)  # fmt: skip
"""Of bytes at the peak, in the order in which they are told. Transients are what exchanges hold while they run."""


@dataclass(frozen=True)
class Entry:
    """Tensors alike at the peak: `count` of them, each of so many bytes per device. `name`: the pytree path of an argument or
    result, else the operator that makes it; `source`: the user's line that wrote that operator, "" where it is not known."""

    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    nbytes: float
    source: str

    @property
    def total(self) -> float:
        """Bytes per device of all of them."""
        return self.count * self.nbytes

    def __str__(self) -> str:
        many = f"{self.count} x " if self.count > 1 else ""
        return f"{many}{self.name} {self.dtype}[{','.join(map(str, self.shape))}]" + (f" at {self.source}" if self.source else "")


@dataclass(frozen=True)
class Ledger:
    """What lives at the worst moment of a call, largest first."""

    entries: tuple[Entry, ...]

    @cached_property
    def by_kind(self) -> dict[str, float]:
        """{kind: bytes per device}, of the kinds that hold any."""
        totals = {kind: math.fsum(e.total for e in self.entries if e.kind == kind) for kind in KINDS}
        return {kind: total for kind, total in totals.items() if total}


def ledger(plan: Plan) -> Ledger:
    """The ledger of a plan; its entries add up to `plan.peak_bytes`."""
    graph, traced, held = plan.modelled.graph, plan.traced, plan.memory
    ways = _ways(graph)
    parameters = {position for position in _parameters(graph) if ways[position].made_of or not ways[position].new}
    gradients = {tensor for position in parameters for tensor in ways[position].made_of}
    state = {source for _, source in graph.ties}
    new = {tensor: PARAMETERS if position in parameters else STATE for position in state for tensor in ways[position].new}
    found: dict[tuple[str, str, int, float], int] = {}

    def add(kind: str, name: str, tensor: int, nbytes: float) -> None:
        if nbytes:
            key = (kind, name, tensor, nbytes)
            found[key] = found.get(key, 0) + 1

    for position, path in enumerate(traced.in_paths):
        kind = PARAMETERS if position in parameters else STATE if position in state else INPUTS
        add(kind, path, graph.inputs[position], plan.input_bytes(position))
    for buffer in held.live:
        if buffer.kind != OUTPUT:
            kind = GRADIENTS if buffer.tensor in gradients else new.get(buffer.tensor, ACTIVATIONS)
            add(kind if buffer.kind == HELD else TRANSIENTS, "", buffer.tensor, buffer.nbytes)
    for buffer in held.results:
        add(OUTPUTS, traced.out_paths[graph.outputs.index(buffer.tensor)], buffer.tensor, buffer.nbytes)
    makers = {t: operator for operator in reversed(graph.operators) for t in operator.results}
    alike: dict[tuple[str, str, str, tuple[int, ...], float, str], int] = {}
    for (kind, name, tensor, nbytes), count in found.items():
        about, source = graph.tensors[tensor], ""
        if not name:
            maker = _written_by(tensor, makers)
            name, source = (maker.name, plan.source(maker)) if maker is not None else ("", "")
        key = (kind, name, about.dtype, about.shape, nbytes, source)
        alike[key] = alike.get(key, 0) + count
    entries = [Entry(*key[:4], count, *key[4:]) for key, count in alike.items()]
    return Ledger(tuple(sorted(entries, key=lambda e: (-e.total, KINDS.index(e.kind), e.name, e.source, e.shape))))


def _written_by(tensor: int, makers: Mapping[int, Operator]) -> Operator | None:
    """The operator that a user wrote to make a tensor: back through views and the edges of loops, and no edge twice."""
    maker, seen = makers.get(tensor), set()
    while maker is not None and maker.equation is None and maker.operands and maker.path not in seen:
        seen.add(maker.path)
        maker = makers.get(maker.operands[-1], maker)
    return maker


def _parameters(graph: Graph) -> set[int]:
    """Input positions."""
    state = {graph.inputs[source]: 1 << source for _, source in graph.ties}
    reach: dict[int, int] = dict(state)
    heavy, before = 0, -1
    while before != sum(map(int.bit_count, reach.values())):  # until loop carries say nothing new
        before = sum(map(int.bit_count, reach.values()))
        for operator in graph.operators:
            seen = 0
            for tensor in operator.operands:
                seen |= reach.get(tensor, 0)
            if seen:
                heavy |= 0 if operator.rule.fusible or not operator.rule.flops else seen
                for tensor in operator.results:
                    reach[tensor] = reach.get(tensor, 0) | seen
    round_again = {position for position, _ in graph.ties}
    others = 0
    for position, tensor in enumerate(graph.outputs):
        others |= 0 if position in round_again else reach.get(tensor, 0)
    return {source for _, source in graph.ties if (others or heavy) >> source & 1}


@dataclass(frozen=True)
class _Way:
    """How state becomes new, from the result backwards: tensors that are its new value already, only moved or written in part
    since; and what arithmetic makes that of, of its size, on element-wise ways."""

    new: set[int] = field(default_factory=set)
    made_of: set[int] = field(default_factory=set)


def _ways(graph: Graph) -> dict[int, _Way]:
    """{position of an input that is state: its way}."""
    makers = {t: operator for operator in graph.operators for t in operator.results}
    found: dict[int, _Way] = {}
    for output, source in graph.ties:
        way = found.setdefault(source, _Way())
        ahead = [(graph.outputs[output], _size(graph, graph.inputs[source]), True)]
        while ahead:
            tensor, size, is_new = ahead.pop()
            maker = makers.get(tensor)
            known = way.new if is_new else way.made_of
            if tensor in known or maker is None or maker.name == INPUT or _size(graph, tensor) != size:
                continue
            known.add(tensor)
            if maker.name == BOUNDARY and maker.path[-2] == "out":  # of what a loop stacks, one round
                ahead += [(t, _size(graph, t), is_new) for t in maker.operands if t >= 0]
            elif maker.rule.fusible or not maker.rule.flops:
                ahead += [(t, size, is_new and not maker.rule.flops) for t in maker.operands if t >= 0]
            elif is_new:
                way.made_of.add(tensor)
    return found


def _size(graph: Graph, tensor: int) -> int:
    return math.prod(graph.tensors[tensor].shape) if tensor >= 0 else -1
