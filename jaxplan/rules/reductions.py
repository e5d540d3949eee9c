"""What takes a dimension together: reductions, running reductions, order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxplan._jax import Primitive, primitives
from jaxplan.rules.build import Builder
from jaxplan.rules.nouns import Kind, Rule
from jaxplan.rules.table import register


def reducer(kind: Kind, *prims: Primitive, axes: str = "axes", library: bool = False) -> None:
    """The dimensions listed in parameter `axes` are gone from the results. Operands beyond the results are
    scalars.
    """

    @register(*prims, reads=(axes,))
    def reduction(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
        gone = params[axes]
        shape = operands[0].shape
        build = Builder()
        dims = [build.factor(n, kind if d in gone else Kind.PARALLEL) for d, n in enumerate(shape)]
        kept = [dim for d, dim in enumerate(dims) if d not in gone]
        full = [dims if a.shape == shape else [()] * len(a.shape) for a in operands]
        return build.rule(full, [kept] * len(results), fusible=True, library=library, costly=2)


def along(axis: str, *prims: Primitive, depth: bool = False) -> None:
    """The dimension given by parameter `axis` is needed whole; operands and results have it alike, or in
    part.

    `depth`: the work per element grows as the logarithm of the extent (sorting by comparison).
    """

    @register(*prims, reads=(axis,))
    def ordered(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
        shape = operands[0].shape
        axis_index = params[axis] % len(shape) if shape else 0
        build = Builder()
        dims = [build.factor(n, Kind.WHOLE if d == axis_index else Kind.PARALLEL) for d, n in enumerate(shape)]
        flops = math.log2(max(2, shape[axis_index])) if depth and shape else 1.0
        return build.rule([dims] * len(operands), [dims] * len(results), flops=flops)


@register(*primitives("top_k"), reads=("axis",))
def top_k(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """Whole along its axis. XLA gathers it however it is sharded (seen with jaxlib 0.10 and 0.12; `sort` it does not), so each
    device is given what it has."""
    build = Builder()
    shape = operands[0].shape
    axis = params["axis"] % len(shape)
    dims = [build.factor(n, Kind.WHOLE if d == axis else Kind.PARALLEL) for d, n in enumerate(shape)]
    return replace(build.rule([dims], [dims] * len(results), flops=math.log2(max(2, shape[axis]))), by_hand=True)


reducer(Kind.SUM, *primitives("reduce_sum"), library=True)
reducer(Kind.COMBINE, *primitives("reduce_max reduce_min"), library=True)
reducer(Kind.COMBINE, *primitives("reduce_prod reduce_and reduce_or"))
# No all-reduce has exclusive or; one all-reduce combines values, not pairs of value and index; what a user's
# own computation would need is not for us to guess.
reducer(Kind.WHOLE, *primitives("reduce_xor argmax argmin"))
reducer(Kind.WHOLE, *primitives("reduce"), axes="dimensions")

along("axis", *primitives("cumsum cumprod cummax cummin cumlogsumexp"))
along("dimension", *primitives("sort"), depth=True)
along("reduction_dimension", *primitives("approx_top_k"))
