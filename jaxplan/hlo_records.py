"""What an audit is made of: records of collectives, kernels and findings, as a table, a pytree and JSON.

All numbers are per device and per call of the program: bytes in bytes, `times` in executions. Every record is a pytree node whose
leaves are its numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from html import escape
from typing import Any, TypeVar

import jax

T = TypeVar("T", bound=type)
MOST_WARNINGS = 8


def record(*numbers: str) -> Callable[[T], T]:
    """Class decorator: a dataclass becomes a pytree whose leaves are the fields named."""

    def register(cls: T) -> T:
        rest = [field.name for field in fields(cls) if field.name not in numbers]
        return jax.tree_util.register_dataclass(cls, data_fields=list(numbers), meta_fields=rest)

    return register


@record("payload_bytes", "wire_bytes", "times")
@dataclass(frozen=True)
class Collective:
    """One collective of the program. Bytes are per device and execution; multiply by `times` for a call.

    `payload_bytes` is the full tensor: an all-reduce's, reduce-scatter's, all-to-all's or permute's operand,
    an all-gather's result. `wire_bytes` is what a device sends in a ring over its group of n: all-reduce
    2(n-1)/n of the payload, a permute the payload, every other kind (n-1)/n of it.
    """

    kind: str
    payload_bytes: float
    wire_bytes: float
    times: float
    group_size: int  # of a permute: the devices in its longest chain of source-target pairs
    axes: tuple[str, ...]  # mesh axes the groups span, in mesh order; () if unknown
    dtype: str  # element types, comma separated if several
    shape: str  # the result type as printed, less layouts
    source: str  # "file.py:123", or ""
    op_name: str  # JAX's name stack: "jit(step)/transpose(jvp())/dot_general"
    exact: bool  # False: within a loop whose trip count is unknown, counted as `while_trips`
    name: str = ""  # the HLO instruction
    rewritten: str = ""  # in `Audit.normalised`: the rules applied

    @property
    def total_bytes(self) -> float:
        """Bytes sent per device and call."""
        return self.wire_bytes * self.times


@record("flops", "memory_bytes")
@dataclass(frozen=True, slots=True)
class Kernel:
    """One instruction that is not part of another: what it computes, and what it reads and writes in memory, per execution."""

    name: str  # the HLO instruction
    opcode: str
    flops: float
    memory_bytes: float
    cycles: float = 0.0  # of the device's clock, as the compiler estimates; 0 where it does not


@record("wire_bytes", "flops", "count")
@dataclass(frozen=True)
class Finding:
    """Something that a program does and need not. Numbers are per device and call.

    `kind`: "rematerialised" (a tensor is gathered, and each device keeps only its part: what XLA calls an involuntary full
    rematerialization), "repeated" (a collective moves what another, or its own earlier round, has moved) or "replicated" (dots
    or convolutions with the same operands on every device of `axes`).
    """

    kind: str
    axes: tuple[str, ...]  # () if the mesh is unknown
    wire_bytes: float  # sent, and avoidable
    flops: float  # computed, and avoidable by splitting over the axes
    count: float  # collectives or dots concerned, loops multiplied out
    source: str
    op_name: str
    detail: str

    def __str__(self) -> str:
        cost = f"{self.flops:.4g} FLOPs" if self.kind == "replicated" else f"{self.wire_bytes:,.0f} bytes"
        return f"{self.kind} over {','.join(self.axes) or '?'}: {cost}: {self.detail} [{self.source or self.op_name or '?'}]"


@record(
    "collectives", "normalised", "flops", "kernels", "argument_bytes", "output_bytes", "temp_bytes", "alias_bytes", "peak_bytes",
    "warnings",
)  # fmt: skip
@dataclass(frozen=True)
class Audit:
    """Collectives, FLOPs and memory of one compiled program, per device. Printing it gives a table.

    `collectives`: as compiled; `normalised`: with a backend's way of writing one rewritten (all-reduce + slice as the
    reduce-scatter it is). `flops`: of products and convolutions. `kernels`: (kernel, how often it runs). `argument_bytes`,
    `output_bytes`, `temp_bytes`, `alias_bytes` (outputs that are arguments' buffers) and `peak_bytes`, arguments + outputs -
    aliased + temporaries: per device, as the compiler allocates them. `unread`: instructions whose bytes could not be told.
    `warnings`: findings such as replicated work, costliest first.
    """

    collectives: tuple[Collective, ...]  # as compiled
    normalised: tuple[Collective, ...]  # dialects rewritten: see `jaxplan.hlo`
    flops: float  # of dots and convolutions
    kernels: tuple[tuple[Kernel, float], ...] = ()  # and how often each runs
    argument_bytes: int = 0
    output_bytes: int = 0
    temp_bytes: int = 0
    alias_bytes: int = 0
    peak_bytes: int = 0  # arguments + outputs - aliased + temporaries
    unread: tuple[str, ...] = ()
    warnings: tuple[Finding, ...] = ()  # costliest first

    def wire_bytes(self, normalised: bool = False) -> dict[str | tuple[str, ...], float]:
        """Bytes sent per device and call, by mesh axis (by a tuple of axes where groups span several)."""
        return self._sum(lambda c: c.axes[0] if len(c.axes) == 1 else c.axes, normalised)

    def by_kind(self, normalised: bool = False) -> dict[str, float]:
        """Bytes sent per device and call, by kind of collective."""
        return self._sum(lambda c: c.kind, normalised)

    @property
    def memory_bytes(self) -> float:
        """Bytes that kernels read and write per device and call."""
        return math.fsum(kernel.memory_bytes * times for kernel, times in self.kernels)

    @property
    def total_wire_bytes(self) -> float:
        """Bytes sent per device and call, as compiled."""
        return math.fsum(c.total_bytes for c in self.collectives)

    def _sum(self, key: Callable[[Collective], Any], normalised: bool) -> dict[Any, float]:
        totals: dict[Any, float] = {}
        for c in self.normalised if normalised else self.collectives:
            totals[key(c)] = totals.get(key(c), 0.0) + c.total_bytes
        return totals

    def to_json(self, indent: int | None = 1) -> str:
        """Everything as JSON: an object with the fields' names; `wire_bytes` sums by axes ("x,y" where groups span several)."""
        found = asdict(self)
        found["kernels"] = [{**asdict(kernel), "times": times} for kernel, times in self.kernels]
        found["memory_bytes"] = self.memory_bytes
        found["wire_bytes"] = {
            view: {",".join(axes): total for axes, total in self._sum(lambda c: c.axes, view == "normalised").items()}
            for view in ("collectives", "normalised")
        }
        return json.dumps({"format": "jaxplan audit 1", **found}, indent=indent, allow_nan=False)

    def __str__(self) -> str:
        rows: dict[tuple[str, ...], list[Any]] = {}
        for c in self.normalised:
            key = (c.kind, ",".join(c.axes) or "?", c.source or c.name, c.op_name)
            row = rows.setdefault(key, [0.0, 0.0, 0.0, True])
            row[0] += c.payload_bytes * c.times
            row[1] += c.total_bytes
            row[2] += c.times
            row[3] &= c.exact
        lines = [
            f"{'collective':<20} {'axes':<12} {'payload':>14} {'bytes sent':>14} {'times':>8}  {'source':<24} name stack"
        ]
        for (kind, axes, source, stack), (payload, total, times, exact) in sorted(
            rows.items(), key=lambda r: (-r[1][1], r[0])
        ):
            numbers = f"{payload:>14,.0f} {total:>14,.0f} {times:>7,.0f}{' ' if exact else '+'}"
            lines.append(f"{kind:<20} {axes:<12} {numbers}  {source:<24} {_tail(stack)}".rstrip())
        meant = math.fsum(self.by_kind(normalised=True).values())
        lines.append(f"sent per device and call: {meant:,.0f} bytes (as compiled {self.total_wire_bytes:,.0f})")
        lines.append(f"per device: flops {self.flops:.4g}, memory traffic {self.memory_bytes:.4g} bytes")
        lines.append(
            f"memory per device: peak {self.peak_bytes:,} bytes (arguments {self.argument_bytes:,}, "
            f"outputs {self.output_bytes:,}, aliased {self.alias_bytes:,}, temporaries {self.temp_bytes:,})"
        )
        lines += [f"warning: {finding}" for finding in self.warnings[:MOST_WARNINGS]]
        lines += _more(self.warnings)
        lines += [f"not read: {note}" for note in self.unread]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """For notebooks."""
        return f"<pre>{escape(str(self))}</pre>"


def _tail(stack: str, width: int = 56) -> str:
    """The end of a name stack, which says most."""
    return stack if len(stack) <= width else "…" + stack[1 - width :]


def _more(warnings: tuple[Finding, ...]) -> Iterable[str]:
    rest = warnings[MOST_WARNINGS:]
    if not rest:
        return []
    sent, flops = math.fsum(f.wire_bytes for f in rest), math.fsum(f.flops for f in rest)
    return [f"warning: and {len(rest)} more: {sent:,.0f} bytes, {flops:.4g} FLOPs"]
