"""Dimensions made, dropped, merged, split and moved: no arithmetic at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxplan._jax import primitives
from jaxplan.rules.build import Builder
from jaxplan.rules.nouns import Dim, Kind, Rule
from jaxplan.rules.table import register


@register(*primitives("broadcast_in_dim"), reads=("broadcast_dimensions",))
def broadcast_in_dim(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """New dimensions, and those grown from extent 1, are in the result only."""
    build = Builder()
    dims = build.factors_of(results[0].shape)
    extents = zip(params["broadcast_dimensions"], operands[0].shape, strict=True)
    source = [dims[d] if extent != 1 else () for d, extent in extents]
    sizes = [()] * (len(operands) - 1)  # dynamic extents, scalars
    return build.rule([source, *sizes], [dims], flops=0.0, fusible=True)


@register(*primitives("reshape"), reads=("dimensions",))
def reshape(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """b s (h d) -> b s h d: the coarsest factors, major to minor, of which both shapes are made."""
    build = Builder()
    before, after = operands[0].shape, results[0].shape
    order = params["dimensions"]
    if (order is not None and tuple(order) != tuple(range(len(before)))) or 0 in before:
        source, target = build.factors_of(before, Kind.WHOLE), build.factors_of(after, Kind.WHOLE)
    else:
        source, target = common_factors(build, before, after)
    sizes = [()] * (len(operands) - 1)
    return build.rule([source, *sizes], [target], flops=0.0, fusible=True)


def common_factors(build: Builder, before: Sequence[int], after: Sequence[int]) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    """Dimensions of two shapes of one number of elements (not 0), in factors common to both, major to minor.

    Where two extents share only part of their factors (4 6 -> 6 4), what they do share and comes first is
    common, and the rest of that group is whole.
    """
    source: list[Dim] = [()] * len(before)
    target: list[Dim] = [()] * len(after)
    i = j = 0
    while i < len(before) or j < len(after):
        # the next group: the fewest dimensions on each side with equal products
        start, other = i, j
        left = right = 1
        while left != right or (i == start and j == other):
            if j == len(after) or (left <= right and i < len(before)):
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        _refine(build, before, after, source, target, range(start, i), range(other, j))
    return tuple(source), tuple(target)


def _refine(
    build: Builder,
    before: Sequence[int],
    after: Sequence[int],
    source: list[Dim],
    target: list[Dim],
    left: range,
    right: range,
) -> None:
    """Factors of one group: dimensions `left` of the source hold what `right` of the target do."""
    rest_before = [[d, before[d]] for d in left if before[d] != 1]
    rest_after = [[d, after[d]] for d in right if after[d] != 1]
    while rest_before and rest_after:
        (a, x), (b, y) = rest_before[0], rest_after[0]
        size = math.gcd(x, y)
        if size == 1:
            break
        dim = build.factor(size)
        source[a], target[b] = source[a] + dim, target[b] + dim
        rest_before[0][1], rest_after[0][1] = x // size, y // size
        if x != size and y != size:
            break  # neither divides the other: minor to this the two shapes are cut differently
        rest_before = rest_before[x == size :]
        rest_after = rest_after[y == size :]
    for rest, dims in ((rest_before, source), (rest_after, target)):
        for d, size in rest:
            dims[d] = dims[d] + build.factor(size, Kind.WHOLE)


@register(*primitives("transpose"), reads=("permutation",))
def transpose(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """i j -> j i."""
    build = Builder()
    dims = build.factors_of(operands[0].shape)
    return build.rule([dims], [[dims[d] for d in params["permutation"]]], flops=0.0, fusible=True, linear=True)


@register(*primitives("squeeze"), reads=("dimensions",))
def squeeze(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """i 1 -> i."""
    build = Builder()
    dims = build.factors_of(operands[0].shape)
    gone = {d % len(dims) for d in params["dimensions"]}
    kept = [dim for d, dim in enumerate(dims) if d not in gone]
    return build.rule([dims], [kept], flops=0.0, fusible=True)


@register(*primitives("rev"), reads=("dimensions",))
def rev(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """A reversed dimension would put each block on the opposite device."""
    build = Builder()
    gone = params["dimensions"]
    shape = operands[0].shape
    dims = [build.factor(n, Kind.WHOLE if d in gone else Kind.PARALLEL) for d, n in enumerate(shape)]
    return build.rule([dims], [dims], flops=0.0, fusible=True)


@register(*primitives("bitcast_convert_type"), reads=())
def bitcast_convert_type(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """Between types of different widths one side has a last dimension more: the parts of one element."""
    build = Builder()
    wide, narrow = sorted((operands[0].shape, results[0].shape), key=len)
    dims = build.factors_of(wide)
    parts = build.factors_of(narrow[len(wide) :], Kind.WHOLE)
    source, target = (dims + parts if len(a.shape) > len(wide) else dims for a in (operands[0], results[0]))
    return build.rule([source], [target], flops=0.0, fusible=True)


@register(
    *primitives("iota iota_2x32_shape empty? empty2? zeros_like? platform_index? create_token after_all"),
    reads=(),
    free=True,
)
def made_anywhere(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """Every device can make its own part, from nothing."""
    build = Builder()
    shape = results[0].shape if results else ()
    dims = build.factors_of(shape)
    sources = [dims if a.shape == shape else [()] * len(a.shape) for a in operands]
    return build.rule(sources, [dims] * len(results), flops=0.0, fusible=True)
