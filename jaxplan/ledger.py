"""Room `ledger`: what the bytes of a plan's peak are, by kind and tensor by tensor.

State is what goes round: arguments that come back as results. *Parameters* are state that some other result (a loss) depends on,
or, where all results are state, that more than element-wise work reads; *other state* is the rest of it (moments, counters).
*Gradients* are values of a parameter's size on the element-wise way to its new value, and those that such ways begin at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from jaxplan.cost.memory import HELD, OUTPUT
from jaxplan.graph import Graph, Operator
from jaxplan.graph.flatten import INPUT
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
    parameters = _parameters(graph)
    gradients = _gradients(graph, parameters)
    state = {source for _, source in graph.ties}
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
            kind = TRANSIENTS if buffer.kind != HELD else GRADIENTS if buffer.tensor in gradients else ACTIVATIONS
            add(kind, "", buffer.tensor, buffer.nbytes)
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


def _gradients(graph: Graph, parameters: set[int]) -> set[int]:
    """Tensors."""
    makers = {t: operator for operator in graph.operators for t in operator.results}
    found: set[int] = set()
    for output, source in graph.ties:
        if source not in parameters:
            continue
        size, ahead = _size(graph, graph.inputs[source]), [graph.outputs[output]]
        while ahead:
            tensor = ahead.pop()
            maker = makers.get(tensor)
            if tensor in found or maker is None or maker.name == INPUT or _size(graph, tensor) != size:
                continue
            found.add(tensor)
            if maker.rule.fusible or not maker.rule.flops:
                ahead += [t for t in maker.operands if t >= 0]
    return found


def _size(graph: Graph, tensor: int) -> int:
    return math.prod(graph.tensors[tensor].shape) if tensor >= 0 else -1
