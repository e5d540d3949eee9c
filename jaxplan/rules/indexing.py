"""Rows of a table read, written or added to, at places that are data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxplan._jax import Primitive, primitives
from jaxplan.rules.build import Builder, share
from jaxplan.rules.nouns import Dim, Kind, Rule
from jaxplan.rules.table import register


@register(*primitives("gather"), reads=("dimension_numbers", "slice_sizes"))
def gather(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """v d, i 1 -> i d. Each device looks up its own part of v, else zero; the sum is the result.

    That holds for each indexed dimension by itself, so also for several at once (XLA partitions it so).
    Window dimensions taken whole pass through, other windows need theirs whole. One operation per element of
    the result.
    """
    numbers = params["dimension_numbers"]
    table, indices, result = operands[0].shape, operands[1].shape, results[0].shape
    build = Builder()
    index_dims = build.factors_of(indices[:-1], name="i")
    table_dims: list[Dim] = [()] * len(table)
    window_dims: list[Dim] = []
    looked_up = 1
    for d, extent in enumerate(table):
        size = params["slice_sizes"][d]
        if d in numbers.operand_batching_dims:
            at = numbers.start_indices_batching_dims[numbers.operand_batching_dims.index(d)]
            table_dims[d] = index_dims[at]
            continue
        if size == extent:
            table_dims[d] = build.factor(extent, name="d")
        elif size == 1 and d in numbers.start_index_map:
            table_dims[d] = build.factor(extent, Kind.SUM, name="v")
            looked_up *= extent
        else:
            table_dims[d] = build.factor(size, Kind.WHOLE, name="w")
        if d not in numbers.collapsed_slice_dims:
            window_dims.append(() if size == 1 else table_dims[d])
    dims = _interleave(len(result), numbers.offset_dims, window_dims, index_dims)
    touched = (share(result, table), 1.0, 1.0)
    return build.rule([table_dims, [*index_dims, ()]], [dims], flops=1 / max(1, looked_up), touched=touched)


def scatterer(kind: Kind, *prims: Primitive) -> None:
    """v d, i 1, i d -> v d. A device that sees all updates writes those in its own part of v: parallel.

    Splitting the updates (i) is of kind `kind`: one device starts from the operand, the others from what
    leaves everything as it is (0, 1, the least, the largest), and their results are combined. What is
    written over what is no such operation, and XLA knows none for a difference. One operation per element
    of the updates.
    """

    @register(*prims, reads=("dimension_numbers",))
    def scatter(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
        numbers = params["dimension_numbers"]
        table, indices, updates = (a.shape for a in operands)
        batching, at = numbers.operand_batching_dims, numbers.scatter_indices_batching_dims
        build = Builder()
        index_dims = tuple(
            build.factor(extent, Kind.PARALLEL if d in at else kind, name="i") for d, extent in enumerate(indices[:-1])
        )
        window_extents = iter([updates[d] for d in numbers.update_window_dims])
        table_dims: list[Dim] = [()] * len(table)
        window_dims: list[Dim] = []
        addressed = 1
        for d, extent in enumerate(table):
            if d in batching:
                table_dims[d] = index_dims[at[batching.index(d)]]
                continue
            inserted = d in numbers.inserted_window_dims
            size = 1 if inserted else next(window_extents)
            if size == extent:
                table_dims[d] = build.factor(extent, name="d")
            elif size == 1 and d in numbers.scatter_dims_to_operand_dims:
                table_dims[d] = build.factor(extent, name="v")
                addressed *= extent
            else:
                table_dims[d] = build.factor(size, Kind.WHOLE, name="w")
            if not inserted:
                window_dims.append(() if size == 1 else table_dims[d])
        dims = _interleave(len(updates), numbers.update_window_dims, window_dims, index_dims)
        touched = (share(updates, table), 1.0, 1.0, 1.0)
        flops = 1 / max(1, addressed)
        return build.rule(
            [table_dims, [*index_dims, ()], dims], [table_dims], flops=flops, touched=touched, adds=kind is Kind.SUM
        )  # fmt: skip


scatterer(Kind.SUM, *primitives("scatter_add"))
scatterer(Kind.COMBINE, *primitives("scatter_mul scatter_min scatter_max"))
scatterer(Kind.WHOLE, *primitives("scatter scatter_sub?"))


def _interleave(rank: int, places: Sequence[int], windows: Sequence[Dim], batch: Sequence[Dim]) -> list[Dim]:
    """Window dimensions at `places`, batch dimensions in the places left, both in order."""
    rest = iter(batch)
    at = dict(zip(places, windows, strict=True))
    return [at[d] if d in at else next(rest) for d in range(rank)]
