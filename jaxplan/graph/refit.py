"""A traced program at other extents: flattened and fused again, with nothing traced.

Which extent each dimension gets is for the caller to say, tensor by tensor, and for the caller to have checked: here a program's
equations are only read anew with the shapes that they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxplan import _jax
from jaxplan.graph.build import graph_of
from jaxplan.graph.flatten import Flat
from jaxplan.graph.nouns import Graph, Path, Tensor
from jaxplan.rules import Rule, params_at, rule_of
from jaxplan.trace import Traced

Rounds = Callable[[Any, int, Path], float]
"""(the equation of a loop, its trip count as traced, where it stands) -> its trip count at the new extents."""


class Refit(Flat):
    """The operators of a program while they are being collected, at other extents than it was traced for.

    `shapes`: per tensor, in the order in which they are made. `rounds_at`: how often loops run.
    """

    def __init__(self, while_trips: float, shapes: Sequence[tuple[int, ...]], rounds_at: Rounds, platform: str) -> None:
        super().__init__(while_trips, platform)
        self._shapes, self._rounds_at = shapes, rounds_at
        self._known: dict[Any, Tensor] = {}

    def tensor(self, aval: Any) -> int:
        number = super().tensor(aval)
        kind, shape = self.tensors[number], self._shapes[number]
        if kind.shape != shape:
            key = (shape, kind.dtype)
            self.tensors[number] = self._known.setdefault(key, Tensor(shape, kind.dtype, kind.itemsize))
        return number

    def rule(self, equation: Any, operands: Sequence[int], results: Sequence[int]) -> Rule:
        before = [v.aval for v in equation.invars], [v.aval for v in equation.outvars]
        now = [
            [aval if tensor < 0 else self._like(aval, tensor) for aval, tensor in zip(avals, tensors, strict=True)]
            for avals, tensors in zip(before, (operands, results), strict=True)
        ]
        params = equation.params
        if now != list(before):
            params = params_at(equation.primitive, params, before[0], now[0])
        return rule_of(equation.primitive, params, now[0], now[1])

    def _like(self, aval: Any, tensor: int) -> Any:
        shape = self.tensors[tensor].shape
        return aval if getattr(aval, "shape", shape) == shape else jax.ShapeDtypeStruct(shape, aval.dtype)

    def stacked(self, tensor: int, aval: Any) -> tuple[int, ...]:
        return self.tensors[tensor].shape if tensor >= 0 else tuple(aval.shape)

    def rounds(self, equation: Any, trips: int, path: Path) -> float:
        return self._rounds_at(equation, trips, path)


def refit(
    traced: Traced, graph: Graph, shapes: Sequence[tuple[int, ...]], while_trips: float, rounds_at: Rounds
) -> tuple[Traced, Graph]:
    """The trace and the graph at other extents; `shapes`: of each tensor of `graph`. The jaxpr stays that of the old shapes."""

    def avals(tensors: Sequence[int], before: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(
            aval if tensor < 0 or tuple(aval.shape) == shapes[tensor] else jax.ShapeDtypeStruct(shapes[tensor], aval.dtype)
            for tensor, aval in zip(tensors, before, strict=True)
        )

    described = {field: getattr(traced, field) for field in traced.__dataclass_fields__}
    described["in_avals"] = avals(graph.inputs, traced.in_avals)
    described["out_avals"] = avals(graph.outputs, traced.out_avals)
    resized = Traced(**described)
    return resized, graph_of(resized, Refit(while_trips, shapes, rounds_at, graph.platform))


def is_reshape(equation: Any) -> bool:
    """Whether an equation keeps its elements and their order, and nothing else."""
    return equation is not None and equation.primitive in _RESHAPES


def slice_starts(equation: Any) -> Mapping[int, bool] | None:
    """Of a static slice: {dimension: whether it takes the first so many elements, one by one}; None for anything else."""
    if equation is None or equation.primitive not in _SLICES:
        return None
    starts = equation.params["start_indices"]
    strides = equation.params["strides"] or (1,) * len(starts)
    return {dim: start == 0 and stride == 1 for dim, (start, stride) in enumerate(zip(starts, strides, strict=True))}


def takes_one(equation: Any, dim: int) -> bool:
    """Whether an equation cuts one element out of a dimension of its operand."""
    if equation is None or equation.primitive not in (*_SLICES, _jax.dynamic_slice_p):
        return False
    return equation.outvars[0].aval.shape[dim] == 1


_RESHAPES = _jax.primitives("reshape")
_SLICES = _jax.primitives("slice")
