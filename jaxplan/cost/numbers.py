"""The algebra of plain numbers: a graph on a mesh of given sizes and a machine of given speeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from jaxplan.graph import Graph, Work
from jaxplan.layout import AxisOrder
from jaxplan.machine import Machine, axis_links


class Numbers:
    """Evaluates costs as floats."""

    larger, smaller = staticmethod(max), staticmethod(min)

    def __init__(
        self, graph: Graph, mesh_shape: dict[str, int], machine: Machine, ticks: float = 1.0, microbatches: int = 1,
        said: Sequence[Sequence[str]] = (),
    ) -> None:  # fmt: skip
        """`ticks`, `microbatches`: of the pipeline that the graph is cut for, if it is. `said`: in which orders axes that share
        a dimension have to stand, major to minor; where these and the program leave it open, the slower one is the major one."""
        self.graph, self.machine, self.ticks, self.microbatches = graph, machine, ticks, microbatches
        self.axis_names = tuple(mesh_shape)
        self.sizes: Sequence[int] = tuple(mesh_shape.values())
        self.counts = self.sizes
        links = axis_links(machine, mesh_shape)
        self._links = [(links[a].seconds_per_byte, links[a].latency_seconds) for a in mesh_shape]
        self.said, self.order = said, self._order(said)
        self._nbytes = [tensor.nbytes for tensor in graph.tensors]
        self.seconds_per_byte = machine.seconds_per_byte
        self._flop: dict[str, float] = {}

    def nbytes(self, tensor: int) -> float:
        return self._nbytes[tensor]

    def flops(self, work: Work) -> float:
        return work.flops

    def seconds_per_flop(self, dtype: str) -> float:
        if dtype not in self._flop:
            self._flop[dtype] = self.machine.flop_seconds(dtype)
        return self._flop[dtype]

    def link(self, axis: int) -> tuple[float, float]:
        return self._links[axis]

    def _order(self, said: Sequence[Sequence[str]]) -> AxisOrder:
        """Axes from the costliest link to the cheapest, ties in mesh order; those that share a dimension stand so too, unless
        `said` has them otherwise or, where it leaves that open, the layouts that the program asks for."""
        slow_first = tuple(sorted(range(len(self.sizes)), key=lambda a: (-self._links[a][0], a)))
        if len(slow_first) == 1:
            return AxisOrder(slow_first, slow_first)
        return AxisOrder(slow_first, _major_first(slow_first, self._pairs((*said, *_asked(self.graph)))))

    def _pairs(self, orders: Iterable[Sequence[str]]) -> Iterable[tuple[int, int]]:
        """Axes that stand beside each other; an axis that the mesh lacks stands nowhere."""
        for names in orders:
            yield from pairwise([self.axis_names.index(name) for name in names if name in self.axis_names])

    @property
    def major_first(self) -> tuple[str, ...]:
        """The axes in the order in which they stand where they share a dimension."""
        return tuple([self.axis_names[axis] for axis in self.order.major_first])


def _asked(graph: Graph) -> tuple[tuple[str, ...], ...]:
    """The axes that the program itself lays along one dimension, in its order."""

    def find() -> tuple[tuple[str, ...], ...]:
        entries = [entry for operator in graph.operators for entry in operator.asked or () if entry and len(entry) > 1]
        return tuple(dict.fromkeys(entries))

    return graph.remembered("axis orders", None, find)


def _major_first(slow_first: Sequence[int], pairs: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """`slow_first`, changed so that of each of `pairs` the first axis stands before the second, unless earlier ones forbid it."""
    before: set[tuple[int, int]] = set()
    for first, second in pairs:
        if first != second and (second, first) not in before:
            above = [axis for axis in slow_first if axis == first or (axis, first) in before]
            below = [axis for axis in slow_first if axis == second or (second, axis) in before]
            before.update((a, b) for a in above for b in below)
    found: list[int] = []
    while len(found) < len(slow_first):
        left = [axis for axis in slow_first if axis not in found]
        found.append(next(axis for axis in left if not any((other, axis) in before for other in left)))
    return tuple(found)
