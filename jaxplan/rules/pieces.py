"""Parts of tensors taken out and put together, at places known beforehand or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxplan._jax import primitives, roll_p
from jaxplan.rules.build import Builder, share
from jaxplan.rules.nouns import Dim, Kind, Rule
from jaxplan.rules.table import register


@register(*primitives("slice"), reads=("start_indices", "strides"))
def static_slice(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """Uncut dimensions pass; so does every n-th element, block by block; any other cut needs the dimension
    whole.
    """
    build = Builder()
    before, after = operands[0].shape, results[0].shape
    strides = params["strides"] or (1,) * len(before)
    dims = []
    for extent, size, start, stride in zip(before, after, params["start_indices"], strides, strict=True):
        blockwise = extent == size * stride and start < stride
        dims.append(build.factor(size, Kind.PARALLEL if blockwise else Kind.WHOLE))
    return build.rule([dims], [dims], flops=0.0, fusible=True, touched=(share(after, before), 1.0))


@register(*primitives("pad"), reads=("padding_config",))
def pad(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """As `slice`, the other way round: equal gaps after (or around) each element go block by block."""
    build = Builder()
    dims = []
    extents = zip(operands[0].shape, results[0].shape, params["padding_config"], strict=True)
    for extent, size, (low, _, gap) in extents:
        blockwise = size == extent * (gap + 1) and 0 <= low <= gap
        dims.append(build.factor(size, Kind.PARALLEL if blockwise else Kind.WHOLE))
    return build.rule([dims, ()], [dims], flops=0.0, fusible=True, costly=3)


@register(*primitives("concatenate"), reads=("dimension",))
def concatenate(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """The joined dimension is whole."""
    build = Builder()
    joined = params["dimension"]
    dims = _whole_at(build, results[0].shape, joined)
    parts = [[dim if a.shape[d] != 1 else () for d, dim in enumerate(dims)] for a in operands]
    return build.rule(parts, [dims], flops=0.0, fusible=True, joins=joined)


@register(roll_p, reads=("shift", "dimension"))
def roll(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """Every device hands a slab to its neighbour, the last one to the first. Where that is wider than a shard, XLA sends two that
    are a shard together, to two devices further on."""
    build = Builder()
    turned, width = params["dimension"], abs(params["shift"])
    dims = [
        build.factor(size, Kind.ROLL, halo=width) if width and d == turned else build.factor(size)
        for d, size in enumerate(results[0].shape)
    ]
    return build.rule([dims], [dims], flops=0.0, fusible=True, joins=turned if width else -1)


@register(*primitives("split"), reads=("axis",))
def split(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """The cut dimension is whole."""
    build = Builder()
    dims = _whole_at(build, operands[0].shape, params["axis"])
    parts = [[dim if a.shape[d] != 1 else () for d, dim in enumerate(dims)] for a in results]
    return build.rule([dims], parts, flops=0.0, fusible=True)


@register(*primitives("stack?"), reads=("axis",))
def stack(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """Tensors one beside another along a new dimension, whole."""
    build = Builder()
    axis = params["axis"] % len(results[0].shape)
    dims = _whole_at(build, results[0].shape, axis)
    return build.rule([dims[:axis] + dims[axis + 1 :]] * len(operands), [dims], flops=0.0, fusible=True, joins=axis)


@register(*primitives("unstack?"), reads=("axis",))
def unstack(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """The reverse of `stack`."""
    build = Builder()
    axis = params["axis"] % len(operands[0].shape)
    dims = _whole_at(build, operands[0].shape, axis)
    return build.rule([dims], [dims[:axis] + dims[axis + 1 :]] * len(results), flops=0.0, fusible=True)


@register(*primitives("tile?"), reads=("reps",))
def tile(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """i -> (r i): the repetitions are major."""
    build = Builder()
    dims = build.factors_of(operands[0].shape)
    repeats = build.factors_of(params["reps"], name="r")
    tiled = [repeat + dim for repeat, dim in zip(repeats, dims, strict=True)]
    return build.rule([dims], [tiled], flops=0.0, fusible=True)


@register(*primitives("dynamic_slice"), reads=())
def dynamic_slice(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """Where the slice starts is not known: a dimension it does not take whole must be there whole."""
    build = Builder()
    before, after = operands[0].shape, results[0].shape
    sizes = zip(before, after, strict=True)
    dims = [build.factor(size, Kind.PARALLEL if extent == size else Kind.WHOLE) for extent, size in sizes]
    scalars = [()] * (len(operands) - 1)
    touched = (share(after, before), *[1.0] * len(operands))
    return build.rule([dims, *scalars], [dims], flops=0.0, touched=touched)


@register(*primitives("dynamic_update_slice"), reads=())
def dynamic_update_slice(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """An update one element long is written by the device that has its place; a longer one may straddle two.

    (XLA partitions just so: a local select in the first case, an all-gather of the operand in the second.)
    Memory sees the update only: XLA does it in place.
    """
    build = Builder()
    full, update = operands[0].shape, operands[1].shape
    dims: list[Dim] = []
    written: list[Dim] = []
    for extent, size in zip(full, update, strict=True):
        kind = Kind.PARALLEL if size in (1, extent) else Kind.WHOLE
        dims.append(build.factor(extent, kind))
        written.append(() if size == 1 else dims[-1])
    scalars = [()] * (len(operands) - 2)
    part = share(update, full)
    touched = (part, 1.0, *[1.0] * len(scalars), part)
    return build.rule([dims, written, *scalars], [dims], flops=0.0, touched=touched)


def _whole_at(build: Builder, shape: Sequence[int], axis: int) -> tuple[Dim, ...]:
    axis %= max(1, len(shape))
    return tuple(build.factor(n, Kind.WHOLE if d == axis else Kind.PARALLEL) for d, n in enumerate(shape))
