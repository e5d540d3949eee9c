"""The algebra of plain numbers: a graph on a mesh of given sizes and a machine of given speeds."""

from __future__ import annotations

from collections.abc import Sequence

from jaxplan.graph import Graph, Work
from jaxplan.machine import Machine, axis_links


class Numbers:
    """Evaluates costs as floats."""

    larger, smaller = staticmethod(max), staticmethod(min)

    def __init__(
        self, graph: Graph, mesh_shape: dict[str, int], machine: Machine, ticks: float = 1.0, microbatches: int = 1
    ) -> None:
        """`ticks`, `microbatches`: of the pipeline that the graph is cut for, if it is."""
        self.graph, self.machine, self.ticks, self.microbatches = graph, machine, ticks, microbatches
        self.axis_names = tuple(mesh_shape)
        self.sizes: Sequence[int] = tuple(mesh_shape.values())
        self.counts = self.sizes
        links = axis_links(machine, mesh_shape)
        self._links = [(links[a].seconds_per_byte, links[a].latency_seconds) for a in mesh_shape]
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

    @property
    def slow_first(self) -> tuple[int, ...]:
        """Axes from the costliest link to the cheapest; ties in mesh order."""
        return tuple(sorted(range(len(self.sizes)), key=lambda a: (-self._links[a][0], a)))
