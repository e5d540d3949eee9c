"""From a saved plan alone to what a page shows of it: no function is traced, so what only its trace could tell is left out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxplan.files import SavedPlan
from jaxplan.files.fold import fold_paths
from jaxplan.pages.collapse import collapse
from jaxplan.pages.nouns import AxisView, Dim, ExchangeView, InputView, LineView, Picture, StepView

NOTE = (
    "Made from the file alone: which tensors the operators make, what is read by whom, and memory over the step need the "
    "function: name it to `jaxplan show` too, or call load_plan(...).save_html(...)."
)


def picture_of_saved(saved: SavedPlan) -> Picture:
    """What a file holds."""
    axes = tuple(AxisView(axis.name, axis.size, axis.roles, axis.sent_bytes) for axis in saved.mesh)
    numbers = {axis.name: k for k, axis in enumerate(axes)}
    exchanges = tuple(
        ExchangeView(
            e.kind, e.axes, f"{e.dtype}[{','.join(map(str, e.shape))}]", e.operator, e.source, e.times,
            math.fsum(e.bytes.values()), e.seconds,
        )
        for e in saved.exchanges
    )  # fmt: skip
    inputs = tuple(
        InputView(path, leaf.kind, _dims(leaf.dims or tuple(map(str, leaf.shape)), leaf.spec, numbers), 1, leaf.bytes)
        for path, leaf in fold_paths(saved.inputs).items()
    )
    lines: dict[str, float] = {}
    for e in exchanges:
        lines[e.source] = lines.get(e.source, 0.0) + e.seconds
    steps = [
        (0, StepView(split.operator, "", 1, 0.0, (), tuple((numbers[axis], "a dimension") for axis, _ in split.factors), ()))
        for split in saved.splits
        if split.operator not in ("program input", "shared view", "loop boundary")
    ]
    live = tuple(
        (f"{one.count} x {one.name}" if one.count > 1 else one.name, one.kind, one.count * one.bytes) for one in saved.memory.live
    )
    return Picture(
        saved.function, saved.machine.name, axes, saved.cost.seconds, saved.cost.exchange_seconds, saved.memory.peak_bytes,
        saved.memory.kinds, inputs, collapse(steps, {}), exchanges,
        tuple(LineView(source, 0.0, value) for source, value in sorted(lines.items(), key=lambda item: -item[1])), live=live,
        notes=(NOTE,), about={"written by jaxplan": saved.versions["jaxplan"], "with JAX": saved.versions["jax"]},
    )  # fmt: skip


def _dims(names: Sequence[str], spec: Sequence[object], numbers: Mapping[str, int]) -> tuple[Dim, ...]:
    entries = [*spec, *[None] * (len(names) - len(spec))]
    split = [entry if isinstance(entry, tuple) else () if entry is None else (entry,) for entry in entries]
    return tuple((name, tuple(numbers[str(axis)] for axis in axes)) for name, axes in zip(names, split, strict=True))
