"""The nouns of modelled memory: `Buffer`s, what shares one (`Roots`), and what of a program they follow from (`Facts`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from jaxplan.cost.fusing import NOTHING, Stored
from jaxplan.cost.library import NO_MORE, Kept
from jaxplan.cost.schedule import Order
from jaxplan.cost.stages import Path
from jaxplan.graph import Graph, Operator
from jaxplan.layout import Layout

Local = Callable[[int, Layout | None], float]
"""Bytes per device of a tensor in a layout."""
Copied = Mapping[tuple[int, Path], int]
"""{(stack, loop that slices a copy of it in another layout): where that copy is made, before the first such loop}."""

HELD, TRANSIENT, OUTPUT = "activation", "transient", "output"


@dataclass(frozen=True)
class Buffer:
    """Bytes per device that live from place `first` to place `last` of the order. `tensor`: what they hold; `kind`: an
    activation, the transient of an exchange, or an output of the program; `axes`: the mesh axes that split it."""

    tensor: int
    kind: str
    nbytes: float
    first: int
    last: int
    axes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Facts:
    """The order, who makes and who reads each tensor (places in the order), what fuses away. `kept`: for compilers that
    materialise; `inner`: the layouts of what clusters do not leave; `combined`: {operator: the place where its partial result is
    combined}, of those that wait for others."""

    order: Order
    operators: Sequence[Operator]
    made: Mapping[int, int]
    readers: Mapping[int, Sequence[int]]
    fused: frozenset[int]
    place: Mapping[int, int]
    fuses: bool = False
    more: Stored = NOTHING
    kept: Kept = NO_MORE
    inner: Mapping[int, Layout] = field(default_factory=dict)
    combined: Mapping[int, int] = field(default_factory=dict)


class Roots:
    """Which tensors share a buffer."""

    def __init__(self) -> None:
        self._into: dict[int, int] = {}

    def of(self, tensor: int) -> int:
        while tensor in self._into:
            tensor = self._into[tensor]
        return tensor

    def join(self, tensor: int, other: int) -> None:
        """`tensor` lives in the buffer of `other`."""
        tensor = self.of(tensor)
        if tensor != self.of(other):
            self._into[tensor] = other


def axes_of(layout: Layout | None) -> tuple[int, ...]:
    return tuple([axis for axis, dim in enumerate(layout or ()) if dim >= 0])


def stored_besides(graph: Graph, facts: Facts, layouts: Mapping[int, Layout], local: Local) -> list[Buffer]:
    """The buffers of `facts.kept.spreads`."""
    found = []
    for spread in facts.kept.spreads:
        layout = layouts.get(spread.tensor, facts.inner.get(spread.tensor))
        nbytes = local(spread.tensor, layout) * spread.times(graph.tensors[spread.tensor].itemsize)
        found.append(Buffer(spread.tensor, TRANSIENT, nbytes, spread.first, spread.last, axes_of(layout)))
    return found


def outside_outputs(buffers: Sequence[Buffer], written_over: frozenset[int] = frozenset()) -> list[Buffer]:
    """The temporaries that find no place in an output's buffer while that is not in use: largest first, into the smallest that
    holds them (XLA's buffer assignment). `written_over`: places where what is read can be written over, element by element."""
    outputs: list[tuple[float, list[tuple[int, int]]]] = []
    outside = []
    for buffer in sorted(buffers, key=lambda b: (-b.nbytes, b.kind != OUTPUT)):
        if buffer.kind == OUTPUT:
            outputs.append((buffer.nbytes, [(buffer.first, buffer.last)]))
            continue
        for size, taken in reversed(outputs):
            over = written_over if buffer.nbytes == size else frozenset()
            if all(buffer.last < start + (start in over) or buffer.first > stop for start, stop in taken):
                taken.append((buffer.first, buffer.last))
                break
        else:
            outside.append(buffer)
    return outside
