"""Which exchanges lead from one layout to another, step by step, and what each of them sends.

One list of steps serves the price, the constraints that are emitted and the report: they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jaxplan.cost.formulas import ROUNDS, Value, all_gather_bytes, all_reduce_bytes, all_to_all_bytes
from jaxplan.layout import PARTIAL, AxisOrder, Layout, Spec, spec_of


@dataclass(frozen=True)
class Step:
    """One exchange over `axes` (slowest first); `before` and `after` are the tensor's specs around it."""

    kind: str
    axes: tuple[int, ...]
    before: Spec
    after: Spec


@lru_cache(maxsize=1 << 16)
def reshard_steps(src: Layout, dst: Layout, ndim: int, order: AxisOrder) -> tuple[Step, ...]:
    """From one layout to another: slices first (they are free), then all-to-alls, then gathers, slow axes first.

    Axes can only leave or join a dimension at its minor end; where `order` asks for more, a permute is due. Partial
    sums that are asked for whole are reduced before anything else; what is whole is a partial sum, too, with zeros elsewhere.
    """
    if src == dst:
        return ()
    walk = _Walk(src, ndim, order)
    if PARTIAL in src or PARTIAL in dst:
        whole = [axis for axis, (d, e) in enumerate(zip(src, dst, strict=True)) if d == PARTIAL != e]
        steps = (Step("all_reduce", walk.slow(whole), walk.spec(), walk.spec()),) if whole else ()
        before, after = (tuple([max(dim, -1) for dim in layout]) for layout in (src, dst))
        return steps + reshard_steps(before, after, ndim, order)
    vacated = {d for d, e in zip(src, dst, strict=True) if d >= 0 and d != e}
    axes = [(axis, src[axis], dst[axis]) for axis in order.major_first]
    entering = [axis for axis, d, e in axes if d < 0 <= e]
    for axis in entering:
        if dst[axis] not in vacated:
            walk.move("slice", (axis,), -1, dst[axis])
    moves: dict[tuple[int, int], list[int]] = {}
    for axis, d, e in axes:
        if d >= 0 and e >= 0 and d != e:
            moves.setdefault((d, e), []).append(axis)
    for (d, e), moved in moves.items():
        walk.move("all_to_all", tuple(moved), d, e)
    gathers: dict[int, list[int]] = {}
    for axis, d, e in axes:
        if d >= 0 > e:
            gathers.setdefault(d, []).append(axis)
    late = [axis for axis in entering if dst[axis] in vacated]
    for axis in late:
        if dst[axis] not in gathers:
            walk.move("slice", (axis,), -1, dst[axis])
    for d in sorted(gathers, key=lambda d: min(order.slow_first.index(a) for a in gathers[d])):
        walk.move("all_gather", tuple(gathers[d]), d, -1)
    for axis in late:
        if dst[axis] in gathers:
            walk.move("slice", (axis,), -1, dst[axis])
    walk.settle(dst)
    return tuple(walk.steps)


@lru_cache(maxsize=1 << 16)
def combine_steps(
    layout: Layout, scatter: Layout, partial: tuple[tuple[int, ...], ...], ndim: int, order: AxisOrder
) -> tuple[Step, ...]:
    """A partial result of layout `layout` made whole. `partial`: the axes along which it is partial, grouped by the factor
    that they split, in the order in which the compiler combines them; `scatter[a]`: the dimension that partial axis a is
    scattered over (-1: not at all).

    The compiler combines one contracted dimension after the other, each in full. Only the last can be scattered directly,
    and only if all its axes are, to one dimension, and none before; what else is to be scattered is reduced, then sliced.
    """
    walk = _Walk(layout, ndim, order)
    *first, last = partial
    alone = all(scatter[axis] < 0 for axes in first for axis in axes)
    direct = alone and scatter[last[0]] >= 0 and len({scatter[axis] for axis in last}) == 1
    for axes in first if direct else partial:
        walk.steps.append(Step("all_reduce", walk.slow(axes), walk.spec(), walk.spec()))
    groups: dict[int, list[int]] = {}
    for axis in reversed(order.slow_first):
        if scatter[axis] >= 0:
            groups.setdefault(scatter[axis], []).append(axis)
    for dim, axes in groups.items():
        walk.move("reduce_scatter" if direct else "slice", tuple(axes), -1, dim)
    walk.settle(tuple(s if s >= 0 else d for s, d in zip(scatter, layout, strict=True)))
    return tuple(walk.steps)


class _Walk:
    """A tensor's spec on its way."""

    def __init__(self, layout: Layout, ndim: int, order: AxisOrder) -> None:
        self.dims = [list(axes) for axes in spec_of(layout, ndim, order.major_first)]
        self.order = order
        self.steps: list[Step] = []

    def spec(self) -> Spec:
        return tuple(map(tuple, self.dims))

    def slow(self, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted(axes, key=self.order.slow_first.index))

    def move(self, kind: str, axes: tuple[int, ...], source: int, target: int) -> None:
        """Axes leave the minor end of dimension `source` (-1: nowhere) and join the minor end of `target`."""
        if source >= 0:
            stay = [a for a in self.dims[source] if a not in axes]
            self.reorder(source, stay + [a for a in self.dims[source] if a in axes])
        before = self.spec()
        if source >= 0:
            self.dims[source] = [a for a in self.dims[source] if a not in axes]
        if target >= 0:
            self.dims[target] += sorted(axes, key=self.order.major_first.index)
        self.steps.append(Step(kind, self.slow(axes), before, self.spec()))

    def reorder(self, dim: int, order: list[int]) -> None:
        """Blocks change places where the axes of one dimension change order."""
        if order != self.dims[dim]:
            before, moved = self.spec(), [a for a, b in zip(self.dims[dim], order, strict=True) if a != b]
            self.dims[dim] = order
            self.steps.append(Step("permute", self.slow(moved), before, self.spec()))

    def settle(self, layout: Layout) -> None:
        """The order that all tensors have, at the end."""
        for dim, axes in enumerate(spec_of(layout, len(self.dims), self.order.major_first)):
            self.reorder(dim, list(axes))


def step_bytes(step: Step, nbytes: Value, sizes: Sequence[Value]) -> list[tuple[int, Value]]:
    """(axis, bytes sent per device) of one step for a tensor of `nbytes` in all.

    Where several axes carry one exchange it is taken apart hierarchically, so that the slower axis sees the data
    already reduced (or not yet gathered); the parts add up to what one exchange over all of them sends.
    """
    if step.kind == "slice":
        return []
    local = nbytes
    for axis in (a for axes in step.before for a in axes):
        local = local / sizes[axis]
    if step.kind == "permute":
        return [(step.axes[0], local)]
    parts = []
    if step.kind == "all_gather":
        for axis in step.axes:
            local = local * sizes[axis]
            parts.append((axis, all_gather_bytes(sizes[axis], local)))
    elif step.kind == "all_to_all":
        for axis in step.axes:
            parts.append((axis, all_to_all_bytes(sizes[axis], local * sizes[axis])))
            local = local / sizes[axis]
    else:
        formula: Callable[[Any, Any], Any] = all_reduce_bytes if step.kind == "all_reduce" else all_gather_bytes
        for axis in reversed(step.axes):
            parts.append((axis, formula(sizes[axis], local)))
            local = local / sizes[axis]
    return parts


def step_rounds(step: Step) -> list[tuple[int, int]]:
    """(axis, supersteps) of one step."""
    rounds = ROUNDS[step.kind]
    axes = step.axes[:1] if step.kind == "permute" else step.axes
    return [(axis, rounds) for axis in axes] if rounds else []
