"""Two saved plans side by side, from their files alone: what lies elsewhere, what is sent otherwise, what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxplan.files.describe import show_spec
from jaxplan.files.fold import fold_paths
from jaxplan.files.nouns import Leaf, Program, SavedPlan
from jaxplan.report import show_bytes, show_seconds, table

MOST_ROWS = 24
EQUAL = 1e-9
"""Totals closer than this, relative to the larger, are equal: sums may differ in their last digits."""


@dataclass(frozen=True)
class Change:
    """A number before and after."""

    old: float
    new: float

    @property
    def relative(self) -> float:
        """(new - old) / old; infinity where there was nothing before."""
        if math.isclose(self.old, self.new, rel_tol=EQUAL):
            return 0.0
        return (self.new - self.old) / self.old if self.old else math.inf

    def __bool__(self) -> bool:
        return self.relative != 0.0


def show_change(change: Change) -> str:
    """+12.5%; "as before"; "new" where there was nothing."""
    if not change:
        return "as before"
    return f"{change.relative:+.2%}" if change.old else "new"


@dataclass(frozen=True)
class Comparison:
    """What differs between two plans; empty (false) if nothing does. Printing it gives a page."""

    old: SavedPlan
    new: SavedPlan

    @cached_property
    def settings(self) -> dict[str, tuple[str, str]]:
        """{what: (before, after)} of what the two were planned for and with."""
        found = {}
        for what, show in _SETTINGS.items():
            before, after = show(self.old), show(self.new)
            if before != after:
                found[what] = (before, after)
        return found

    @cached_property
    def program(self) -> list[str]:
        """How the programs differ, by primitive; [] if they are the same."""
        if self.old.program.fingerprint == self.new.program.fingerprint:
            return []
        return primitive_changes(self.old.program, self.new.program) or ["the same operations, put together in another way"]

    @cached_property
    def leaves(self) -> dict[str, tuple[Leaf | None, Leaf | None]]:
        """{"input PATH" or "output PATH": (before, after)} where shape, dtype or spec differ; None for no such path."""
        found: dict[str, tuple[Leaf | None, Leaf | None]] = {}
        for what, old, new in (("input", self.old.inputs, self.new.inputs), ("output", self.old.outputs, self.new.outputs)):
            pairs = {path: (old.get(path), new.get(path)) for path in dict.fromkeys([*old, *new])}
            changed = {path: pair for path, pair in pairs.items() if _key(pair[0]) != _key(pair[1])}
            found.update({f"{what} {path}": pair for path, pair in fold_paths(changed).items()})
        return found

    @cached_property
    def exchanges(self) -> dict[tuple[str, str, str], Change]:
        """{(exchange, axes, tensor): bytes per device and call} where they differ; source lines do not tell exchanges apart."""
        old, new = _sent(self.old), _sent(self.new)
        changes = {key: Change(old.get(key, 0.0), new.get(key, 0.0)) for key in dict.fromkeys([*old, *new])}
        changed = [(key, change) for key, change in changes.items() if change]
        return dict(sorted(changed, key=lambda item: (-abs(item[1].new - item[1].old), item[0])))

    @cached_property
    def totals(self) -> dict[str, Change]:
        """{name: before and after}: seconds, and bytes per device."""
        pairs = {
            "seconds": (self.old.cost.seconds, self.new.cost.seconds),
            "exchange_seconds": (self.old.cost.exchange_seconds, self.new.cost.exchange_seconds),
            "sent_bytes": (self.old.wire_bytes, self.new.wire_bytes),
            "argument_bytes": (self.old.memory.argument_bytes, self.new.memory.argument_bytes),
            "peak_bytes": (self.old.memory.peak_bytes, self.new.memory.peak_bytes),
        }
        return {name: Change(*pair) for name, pair in pairs.items()}

    def __bool__(self) -> bool:
        parts = (self.settings, self.program, self.leaves, self.exchanges, any(self.totals.values()))
        return any(map(bool, parts))

    def to_json(self) -> dict[str, Any]:
        """The same for a machine to read."""

        def leaf(value: Leaf | None) -> Any:
            return value and {"dtype": value.dtype, "shape": list(value.shape), "spec": _listed(value.spec), "bytes": value.bytes}

        exchanges = [
            {"exchange": name, "axes": axes, "tensor": tensor, "old": change.old, "new": change.new}
            for (name, axes, tensor), change in self.exchanges.items()
        ]
        return {
            "same": not self,
            "totals": {name: {"old": c.old, "new": c.new, "relative": _finite(c.relative)} for name, c in self.totals.items()},
            "settings": {what: {"old": old, "new": new} for what, (old, new) in self.settings.items()},
            "program": self.program,
            "leaves": {path: {"old": leaf(old), "new": leaf(new)} for path, (old, new) in self.leaves.items()},
            "exchanges": exchanges,
        }

    def __str__(self) -> str:
        if not self:
            return "the plans are the same"
        lines = [f"{what}: {old} -> {new}" for what, (old, new) in self.settings.items()]
        lines += [f"program: {change}" for change in self.program]
        lines += ["", *self._totals_table()] if lines else self._totals_table()
        lines += ["", *self._leaves_table()] if self.leaves else ["", "every spec is as before"]
        return "\n".join(lines + (["", *self._exchanges_table()] if self.exchanges else ["", "every exchange is as before"]))

    def _totals_table(self) -> list[str]:
        rows = []
        for name, change in self.totals.items():
            show = show_seconds if name.endswith("seconds") else show_bytes
            rows.append((_TOTALS[name], show(change.old), show(change.new), show_change(change)))
        return table(("", "before", "after", "change"), rows, right=(1, 2, 3))

    def _leaves_table(self) -> list[str]:
        rows = []
        for path, (old, new) in list(self.leaves.items())[:MOST_ROWS]:
            reshaped = old is not None and new is not None and old.kind != new.kind
            rows.append((path, *[_told(leaf, reshaped) for leaf in (old, new)]))
        return [*table(("spec of", "before", "after"), rows), *_more(len(self.leaves))]

    def _exchanges_table(self) -> list[str]:
        rows = [
            (name, axes, tensor, show_bytes(c.old), show_bytes(c.new), show_change(c))
            for (name, axes, tensor), c in list(self.exchanges.items())[:MOST_ROWS]
        ]
        head = ("sent per device by", "axes", "tensor", "before", "after", "change")
        return [*table(head, rows, right=(3, 4, 5)), *_more(len(self.exchanges))]


_TOTALS = {
    "seconds": "modelled step", "exchange_seconds": "of it exchanges", "sent_bytes": "sent per device",
    "argument_bytes": "arguments per device", "peak_bytes": "peak memory per device",
}  # fmt: skip


def _mesh(saved: SavedPlan) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in saved.mesh_shape.items())


def _budget(saved: SavedPlan) -> str:
    budget = saved.asked.memory_budget
    return "the machine's" if budget is None else budget if isinstance(budget, str) else show_bytes(budget)


def _machine(saved: SavedPlan) -> str:
    links = (saved.machine.inner, saved.machine.outer, *saved.machine.axis_links.values())
    speeds = (*saved.machine.seconds_per_flop.values(), saved.machine.seconds_per_byte, saved.machine.memory_bytes)
    numbers = (*speeds, *[number for link in links for number in (link.seconds_per_byte, link.latency_seconds)])
    return f"{saved.machine.name} ({', '.join(f'{number:.4g}' for number in numbers)})"


_SETTINGS: Mapping[str, Callable[[SavedPlan], str]] = {
    "function": lambda saved: saved.function,
    "mesh": _mesh,
    "axes that share": lambda saved: ", ".join(saved.axis_order) or "in mesh order",
    "machine": _machine,
    "memory budget": _budget,
    "pins": lambda saved: ", ".join(f"{path}: {show_spec(spec)}" for path, spec in saved.asked.pins.items()) or "none",
    "donated": lambda saved: ", ".join(fold_paths({p: 0 for p, leaf in saved.inputs.items() if leaf.donated})) or "nothing",
    "search": lambda saved: saved.asked.search or "a callable",
    "pipeline": lambda saved: str(saved.pipeline or saved.stages or "none"),
    "jaxplan": lambda saved: saved.versions["jaxplan"],
    "JAX": lambda saved: saved.versions["jax"],
}


def primitive_changes(old: Program, new: Program) -> list[str]:
    """How the tallies of two programs differ."""
    counts, other = [], []
    for name in sorted({*old.primitives, *new.primitives}):
        before, after = old.primitives.get(name), new.primitives.get(name)
        if before is None or after is None or before.count != after.count:
            counts.append(f"{name} {before.count if before else 0} -> {after.count if after else 0}")
        elif before.digest != after.digest:
            other.append(name)
    changes = [f"equations: {', '.join(counts)}"] if counts else []
    return changes + ([f"as many as before, but of other shapes or with other parameters: {', '.join(other)}"] if other else [])


def _key(leaf: Leaf | None) -> Any:
    return leaf and (leaf.dtype, leaf.shape, leaf.spec)


def _sent(saved: SavedPlan) -> dict[tuple[str, str, str], float]:
    found: dict[tuple[str, str, str], float] = {}
    for e in saved.exchanges:
        key = (f"{e.kind} for {e.operator}", "+".join(e.axes), f"{e.dtype}[{','.join(map(str, e.shape))}]")
        found[key] = found.get(key, 0.0) + sum(e.bytes.values())
    return found


def _listed(spec: tuple[Any, ...]) -> list[Any]:
    return [list(entry) if isinstance(entry, tuple) else entry for entry in spec]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _told(leaf: Leaf | None, with_kind: bool) -> str:
    return "none" if leaf is None else f"{leaf.kind + ' ' if with_kind else ''}{show_spec(leaf.spec)}"


def _more(count: int) -> list[str]:
    return [f"  and {count - MOST_ROWS} more"] if count > MOST_ROWS else []
