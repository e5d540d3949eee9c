"""Windows that slide along a dimension: what a shard needs of its neighbours; pooling and its gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxplan._jax import primitives
from jaxplan.rules.build import Builder
from jaxplan.rules.nouns import Dim, Kind, Rule
from jaxplan.rules.table import register


def halo_of(source: int, target: int, *, stride: int, taps: int, dilation: int = 1, before: int = 0, base: int = 1) -> int | None:
    """Source elements a device needs of its two neighbours together, source and target being cut alike.

    The target's element t reads the source at (t * stride + k * dilation - before) / base, for k < taps,
    where that is a whole number: `before` is the low padding, `base` the dilation of the source. None where
    the blocks of source and target do not lie over each other, so that no fixed slab would do.
    """
    if source * base != target * stride or min(base, stride) != 1:
        return None
    left = max(0, before) // base
    right = max(0, ((taps - 1) * dilation - before - stride) // base + 1)
    return left + right


def reduce_window(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """Pooling. The window's own extent is a factor in no tensor, there to count the work."""
    build = Builder()
    count = len(results)
    rank = len(results[0].shape)
    base, dilation = (params[name] or (1,) * rank for name in ("base_dilation", "window_dilation"))
    source, target = operands[0].shape, results[0].shape
    dims = []
    for d in range(rank):
        taps, stride = params["window_dimensions"][d], params["window_strides"][d]
        halo = halo_of(
            source[d],
            target[d],
            stride=stride,
            taps=taps,
            dilation=dilation[d],
            before=params["padding"][d][0],
            base=base[d],
        )
        dims.append(_slid(build, target[d], halo))
        build.factor(taps, Kind.WHOLE, name="k")
    flops = 1.0 / math.prod(base)
    scalars = [()] * (len(operands) - count)
    return build.rule([*[dims] * count, *scalars], [dims] * count, flops=flops)


register(
    *primitives("reduce_window reduce_window_max reduce_window_min reduce_window_sum"),
    reads=("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation"),
)(reduce_window)


@register(
    *primitives("select_and_scatter select_and_scatter_add"),
    reads=("window_dimensions", "window_strides", "padding"),
)
def select_and_scatter(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """Gradient of max-pooling: (pooled gradient, operand) -> gradient of the operand's shape.

    Dimensions along which windows overlap, or reach over the edge, are whole: where a slab would have to be exchanged, XLA's
    values are wrong (seen with jaxlib 0.10 and 0.12, on 2 and 4 devices, also for programs sharded by hand).
    """
    build = Builder()
    dims = []
    full = results[0].shape
    small = next((a.shape for a in operands[:2] if a.shape != full), full)  # the two come in either order
    for d, extent in enumerate(full):
        taps, stride = params["window_dimensions"][d], params["window_strides"][d]
        halo = halo_of(extent, small[d], stride=stride, taps=taps, before=params["padding"][d][0])
        dims.append(_slid(build, small[d], 0 if halo == 0 else None))
        build.factor(taps, Kind.WHOLE, name="k")
    return build.rule([dims, dims, *[()] * (len(operands) - 2)], [dims], flops=1.0)


@register(
    *primitives("select_and_gather_add"),
    reads=("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation"),
)
def select_and_gather_add(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """Forward derivative of max-pooling: (tangents, operand), both of the operand's shape."""
    rule = reduce_window(params, operands[:1], results)
    return Rule(rule.factors, rule.operands * 2, rule.results, flops=rule.flops)


def _slid(build: Builder, size: int, halo: int | None) -> Dim:
    """The dimension along which a window slides."""
    if halo is None:
        return build.factor(size, Kind.WHOLE)
    return build.factor(size, Kind.HALO, halo=halo) if halo else build.factor(size)
