"""The noun of where a tensor lies: which dimension each mesh axis shards."""

from __future__ import annotations

import math
from collections.abc import Sequence

Layout = tuple[int, ...]
"""Per mesh axis, the dimension it shards, or -1 where the tensor is replicated along that axis, or `PARTIAL`."""

PARTIAL = -2
"""Along this axis each device holds a part of a sum, of the tensor's shape, that has yet to be added to the others'."""

Spec = tuple[tuple[int, ...], ...]
"""Per dimension, the mesh axes (as indices) that shard it, major to minor."""


def spec_of(layout: Layout, ndim: int) -> Spec:
    """The dimension-wise form. Axes that share a dimension stand in mesh order: the one canonical order."""
    return tuple(tuple(axis for axis, dim in enumerate(layout) if dim == d) for d in range(ndim))


def layout_of(spec: Spec, axes: int) -> Layout:
    """The axis-wise form of a spec over `axes` mesh axes."""
    layout = [-1] * axes
    for dim, names in enumerate(spec):
        for axis in names:
            layout[axis] = dim
    return tuple(layout)


def shards(layout: Layout, sizes: Sequence[int]) -> int:
    """Over how many devices a layout spreads a tensor; `sizes`: devices along each mesh axis."""
    return math.prod([size for dim, size in zip(layout, sizes, strict=True) if dim >= 0])
