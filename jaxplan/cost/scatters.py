"""Where a compiler sends otherwise than planned: sums that are reduced whole of which each device then keeps its part, which
become one reduce-scatter; and constants, of which no part is gathered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

import numpy as np

from jaxplan.cost.build import Modelled
from jaxplan.cost.exchange import Step, reshard_steps
from jaxplan.graph import Cluster, Graph, Operator
from jaxplan.graph.flatten import BOUNDARY
from jaxplan.graph.nouns import LEFT
from jaxplan.layout import Layout

Kept = set[tuple[int, Layout]]
"""{(tensor, per axis the dimension along which a device keeps a part of it)}."""


def scattered_sums(modelled: Modelled, choices: np.ndarray, outputs: Sequence[tuple[Layout, Layout]]) -> dict[int, Step]:
    """{operator: the exchange that its partial result really takes}, where that is another than planned. `outputs`: per flat
    output of the program, the layouts in which it is written and wanted."""
    found: dict[int, Step] = {}
    graph, uses = modelled.graph, None
    for _, exchange in modelled.combining(choices):
        step = exchange.steps[-1]
        if len(exchange.steps) == 1 and step.kind == "all_reduce" and graph.tensors[exchange.tensor].shape:
            uses = uses or _Uses(modelled, choices, outputs)
            kept = uses.kept(exchange.tensor, frozenset(step.axes))
            if kept is not None and len(kept) == 1:
                found[exchange.operator] = replace(step, kind="reduce_scatter")
    return found


def scattered_left(
    modelled: Modelled, choices: np.ndarray, outputs: Sequence[tuple[Layout, Layout]]
) -> frozenset[tuple[int, int]]:
    """{(tensor, axis)} of what leaves the last stage of a pipeline to be read in parts that lie along the stages: the sum over
    them becomes a reduce-scatter, too. `outputs`: as above."""
    stages, found = modelled.stages, list[tuple[int, int]]()
    left = [h.operand.tensor for cluster in modelled.graph.clusters for h in cluster.handed if h.how == LEFT] if stages else []
    if stages is not None and left:
        uses = _Uses(modelled, choices, outputs, stages.asked.middle)
        for tensor in left:
            kept = uses.kept(tensor, frozenset([stages.asked.axis])) if modelled.graph.tensors[tensor].shape else None
            if kept is not None and len(kept) == 1:
                found.append((tensor, stages.asked.axis))
    return frozenset(found)


class _Uses:
    """What becomes of a tensor. `but`: operators that read it before it is summed."""

    def __init__(
        self, modelled: Modelled, choices: np.ndarray, outputs: Sequence[tuple[Layout, Layout]], but: Set[int] = frozenset()
    ) -> None:
        graph = modelled.graph
        self.modelled, self.outputs = modelled, outputs
        self.cluster = {member: index for index, cluster in enumerate(graph.clusters) for member in cluster.members}
        self.readers: dict[int, list[int]] = {}
        for number, operator in enumerate(graph.operators):
            for tensor in set(operator.operands) if number not in but else ():
                self.readers.setdefault(tensor, []).append(number)
        layouts = modelled.layouts_of(choices)
        self.read: Mapping[tuple[int, int], tuple[Layout, Layout]] = {
            (reading.tensor, reading.reader): pair for reading, pair in zip(modelled.readings, layouts, strict=True)
        }

    def kept(self, tensor: int, axes: frozenset[int]) -> Kept | None:
        """The parts along exactly these axes that all who read it keep, through what changes its shape alone; None where one
        needs more of it, or other parts."""
        found: Kept = set()
        for position, output in enumerate(self.modelled.graph.outputs):
            if output == tensor and not self._take(found, tensor, *self.outputs[position], axes):
                return None
        for number in self.readers.get(tensor, ()):
            pair = self.read.get((tensor, self.cluster.get(number, -1)), ((), ()))
            if pair[0] != pair[1]:
                if not self._take(found, tensor, *pair, axes):
                    return None
                continue
            operator = self.modelled.graph.operators[number]
            further = self.kept(operator.results[0], axes) if _reshapes(self.modelled.graph, operator) else None
            if further is None:
                return None
            found |= further
        return found or None

    def _take(self, found: Kept, tensor: int, written: Layout, wanted: Layout, axes: frozenset[int]) -> bool:
        """Add what is kept on the way from one layout to another; whether anything along just these axes is, in one dimension."""
        taken = {}
        ndim = len(self.modelled.graph.tensors[tensor].shape)
        for step in reshard_steps(written, wanted, ndim, self.modelled.setting.order):
            if step.kind != "slice":
                break
            taken.update({axis: dim for dim, names in enumerate(step.after) for axis in names if axis in step.axes})
        found.add((tensor, tuple([taken.get(axis, -1) for axis in range(len(written))])))
        return taken.keys() == axes and len(set(taken.values())) == 1


def sends_a_number(graph: Graph, cluster: Cluster, steps: Sequence[Step]) -> bool:
    """Whether steps gather or hand on what a cluster makes of a number alone: it is made whole at once. (All-to-alls run.)"""
    operator = graph.operators[cluster.members[-1]]
    given = getattr(operator.equation, "invars", ())
    if len(cluster.members) > 1 or not given or operator.rule.flops or max(operator.operands, default=0) >= 0:
        return False
    numbers = all(hasattr(v, "val") and not v.aval.shape for v in given)
    return numbers and all(step.kind in ("all_gather", "permute", "slice") for step in steps)


def _reshapes(graph: Graph, operator: Operator) -> bool:
    """Whether an operator keeps all elements, and only says where they are (a sum over what is alone does no more)."""
    rule = operator.rule
    if operator.name == BOUNDARY or len(operator.operands) != 1 or len(operator.results) != 1:
        return False
    before, after = (graph.tensors[tensor] for tensor in (*operator.operands, *operator.results))
    same = math.prod(before.shape) == math.prod(after.shape) and before.dtype == after.dtype
    return same and ((rule.fusible and not rule.flops) or before.shape != after.shape)
