"""How much larger an array is in a memory that holds whole tiles."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from jaxplan.layout import Layout


def local_shape(shape: Sequence[int], layout: Layout | None, sizes: Sequence[int]) -> tuple[int, ...]:
    """The shape of one device's part."""
    parts = list(shape)
    for axis, dim in enumerate(layout or ()):
        if dim >= 0:
            parts[dim] = -(-parts[dim] // sizes[axis])
    return tuple(parts)


def whole_tiles(shape: Sequence[int], layout: Layout | None, sizes: Sequence[int], tile: tuple[int, int]) -> bool:
    """Whether one device's part of an array is made of whole tiles of it, so that a kernel can read it where it lies. Of
    dimensions that waste alike the last fills columns, the one before it rows."""
    part = local_shape(shape, layout, sizes)
    left = list(range(len(shape)))
    for unit in tile[::-1][: len(shape)]:
        dim = min(left, key=lambda d: (_up(shape[d], unit) / max(shape[d], 1), -d))
        left.remove(dim)
        if part[dim] != shape[dim] and part[dim] % unit:
            return False
    return True


@lru_cache(maxsize=1 << 14)
def padding(shape: tuple[int, ...], tile: tuple[int, int], outer: tuple[int, ...] = ()) -> float:
    """By what factor padding makes an array of a shape larger, at least 1.

    The compiler lays dimensions out in the order that wastes least: one fills the columns of tiles, another the rows, of which
    there may also be half, a quarter, ... as many. A vector is padded to columns only.
    `outer`: dimensions that fill neither.
    """
    extents = [extent for dim, extent in enumerate(shape) if extent > 1 and dim not in outer]
    if not extents:
        return 1.0
    columns = [_up(extent, tile[1]) / extent for extent in extents]
    if len(extents) == 1:
        return columns[0]
    rows = [_up(extent, min(tile[0], 1 << (extent - 1).bit_length())) / extent for extent in extents]
    return min(column * row for i, column in enumerate(columns) for j, row in enumerate(rows) if i != j)


def _up(extent: int, unit: int) -> int:
    return -(-extent // unit) * unit
