"""The noun of where a tensor lies: which dimension each mesh axis shards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Layout = tuple[int, ...]
"""Per mesh axis, the dimension it shards, or -1 where the tensor is replicated along that axis, or `PARTIAL`."""

PARTIAL = -2
"""Along this axis each device holds a part of a sum, of the tensor's shape, that has yet to be added to the others'."""

Spec = tuple[tuple[int, ...], ...]
"""Per dimension, the mesh axes (as indices) that shard it, major to minor."""


class AxisOrder(NamedTuple):
    """Two orders of mesh axes, as indices: from the costliest link to the cheapest, and that in which axes stand, major to minor,
    that share a dimension: one for all tensors of a plan."""

    slow_first: tuple[int, ...]
    major_first: tuple[int, ...]


def spec_of(layout: Layout, ndim: int, major_first: tuple[int, ...]) -> Spec:
    """The dimension-wise form. Axes that share a dimension stand as in `major_first`, which has all axes."""
    return tuple(tuple([axis for axis in major_first if layout[axis] == d]) for d in range(ndim))


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
