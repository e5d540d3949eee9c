"""What a compiled program does and need not: gathers that are thrown away, repeated collectives, replicated work.

Each rule reads the text alone. It is silent where the text does not say enough: a finding is never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .hlo_records import Collective, Finding
from .hlo_text import PLUMBING, Groups, Instruction, Module, leaves, type_bytes
from .hlo_vary import Variation

Place = tuple[str, str]  # computation, instruction

_INDEX_ARITHMETIC = frozenset((
    "add", "subtract", "multiply", "divide", "remainder", "minimum", "maximum", "clamp", "select", "compare", "and", "or", "not",
    "negate", "broadcast", "slice", "dynamic-slice", "iota", "shift-right-logical", "shift-left", "shift-right-arithmetic",
))  # fmt: skip
_DEEPEST = 50


@dataclass(frozen=True)
class Site:
    """One collective instruction: its record (with `times`), its device groups and the mask of mesh axes they span."""

    record: Collective
    groups: Groups
    axes: int | None


@dataclass(frozen=True)
class Walked:
    """A module that has been walked: `runs`, how often each computation runs; `sites`, its collectives in program order."""

    module: Module
    mesh_shape: Mapping[str, int]
    named: bool  # False: the mesh is unknown, and one axis without a name stands for all devices
    runs: Mapping[str, float]
    sites: Mapping[Place, Site]
    flops: Mapping[Place, float]  # of each dot and convolution, per run
    tell: Callable[[str, Instruction], tuple[str, str]]  # source line and name stack
    split: tuple[int | None, ...] = ()  # per parameter of the program, the axes that split it, where the text does not say


def find_warnings(walked: Walked) -> tuple[Finding, ...]:
    """Every finding, the costliest first: bytes before FLOPs."""
    found = [*_rematerialised(walked), *_repeated(walked)]
    if walked.module.replicas == 1 and walked.module.partitions == math.prod(walked.mesh_shape.values()):
        found += _replicated(walked)
    return tuple(sorted(found, key=lambda f: (-f.wire_bytes, -f.flops, f.source)))


# --- gathered, then sliced --------------------------------------------------------------------------------------


def _rematerialised(walked: Walked) -> Iterator[Finding]:
    thrown: dict[Place, bool] = {}
    for place, site in walked.sites.items():
        if site.record.kind == "all-gather" and site.record.group_size > 1 and _thrown_away(walked, place, thrown):
            detail = f"{site.record.shape} is gathered, and each device keeps only its part of it"
            yield _of_site("rematerialised", site.record, site.record.total_bytes, detail)


def _thrown_away(walked: Walked, place: Place, known: dict[Place, bool]) -> bool:
    """Is each device's own part all that is taken of a gather, if need be by way of further gathers?"""
    if place in known:
        return known[place]
    known[place] = False
    instruction = walked.module.find(*place)
    if instruction is None:
        return False
    count = len(instruction.operands)
    indices: Sequence[tuple[int, ...]] = [()] if count == 1 else [(i,) for i in range(count)]
    uses = [use for index in indices for use in walked.module.uses((*place, index), PLUMBING | {"convert"})]

    def takes_a_part(computation: str, use: Instruction | None) -> bool:
        if use is None:
            return False
        if use.opcode.startswith("all-gather"):
            return _thrown_away(walked, (computation, use.name), known)
        places = [_by_device(walked.module, computation, name) for name in use.operands[1:]]
        return use.opcode == "dynamic-slice" and None not in places and any(places)

    known[place] = bool(uses) and all(takes_a_part(*use) for use in uses)
    return known[place]


def _by_device(module: Module, computation: str, name: str, depth: int = 0) -> bool | None:
    """Does an integer depend on which device this is? None if it depends on anything else than that and constants."""
    computation, name, _ = module.resolve((computation, name, ()), PLUMBING | {"convert"})
    instruction = module.find(computation, name)
    if instruction is None or depth > _DEEPEST:
        return None
    if instruction.opcode in ("constant", "partition-id"):
        return instruction.opcode == "partition-id"
    if instruction.opcode not in _INDEX_ARITHMETIC:
        return None
    found = [_by_device(module, computation, operand, depth + 1) for operand in instruction.operands]
    return None if None in found else any(found)


# --- moved twice ------------------------------------------------------------------------------------------------


def _repeated(walked: Walked) -> Iterator[Finding]:
    """A collective whose operand another has moved before, or that a loop does not change."""
    first: dict[tuple[Any, ...], Place] = {}
    for place, site in walked.sites.items():
        instruction, record = walked.module.find(*place), site.record
        if instruction is None or not record.wire_bytes or not record.times:
            continue
        total = sum(type_bytes(_type(walked.module, place[0], operand)) for operand in instruction.operands) or 1.0
        again = once = 0.0
        earlier = ""
        together = record.kind == "all-to-all"  # over a tuple: the slices of one tensor
        operands = [instruction.operands] if together else [(operand,) for operand in instruction.operands]
        for group in operands:
            values = tuple(walked.module.resolve((place[0], operand, ())) for operand in group)
            share = sum(type_bytes(_type(walked.module, place[0], operand)) for operand in group) / total * record.total_bytes
            key = (record.kind, site.groups, values, *_particulars(walked.module, instruction))
            if key in first:
                again += share
                earlier = walked.sites[first[key]].record.source or first[key][1]
                continue
            first[key] = place
            outside = max(walked.runs.get(computation, math.inf) for computation, _, _ in values)
            if outside < walked.runs.get(place[0], 0.0):
                once += share * (1 - outside / walked.runs[place[0]])
        if again:
            yield _of_site("repeated", record, again, f"the same {record.kind} of the same {record.dtype} tensor as at {earlier}")
        if once:
            yield _of_site("repeated", record, once, f"{record.shape} is the same in every round of the loop")


def _particulars(module: Module, instruction: Instruction) -> tuple[Any, ...]:
    """What else must agree for two collectives to move the same: a reduction's operator; where each device gets a part, which."""
    reducer = module.computations.get(instruction.attribute(r"\bto_apply=%?([\w.\-]+)") or "")
    root = reducer.instructions.get(reducer.root) if reducer else None
    operator = root.opcode if root else ""
    if instruction.opcode.removesuffix("-start") in ("all-gather", "all-reduce"):
        return (operator,)
    return operator, instruction.attribute(r"\bdimensions=\{([\d,]*)\}"), tuple(leaves(instruction.type))


# --- computed alike on several devices --------------------------------------------------------------------------


def _replicated(walked: Walked) -> Iterator[Finding]:
    """Dots and convolutions whose operands are the same along an axis: each of its devices does the same work."""

    def axes_of(computation: str, instruction: Instruction) -> int | None:
        site = walked.sites.get((computation, instruction.name))
        return site.axes if site else None

    vary = Variation(walked.module, walked.mesh_shape, axes_of, walked.split)
    total = math.fsum(flops * walked.runs.get(place[0], 0.0) for place, flops in walked.flops.items())
    rows: dict[tuple[tuple[str, ...], str, str], tuple[float, float]] = {}
    for place, flops in walked.flops.items():
        instruction, runs = walked.module.find(*place), walked.runs.get(place[0], 0.0)
        if instruction is None or not flops or not runs:
            continue
        mask = vary.of(place[0], instruction.operands)
        alike = tuple(axis for bit, (axis, size) in enumerate(walked.mesh_shape.items()) if size > 1 and not mask >> bit & 1)
        if alike:
            key = (alike, *walked.tell(place[0], instruction))
            count, spent = rows.get(key, (0.0, 0.0))
            rows[key] = count + runs, spent + flops * runs
    for (alike, source, stack), (count, spent) in rows.items():
        devices = math.prod(walked.mesh_shape[axis] for axis in alike)
        yield Finding(
            "replicated", alike if walked.named else (), 0.0, spent * (1 - 1 / devices), count, source, stack,
            f"{spent / total:.1%} of the program's work is the same on {devices} devices",
        )  # fmt: skip


def _of_site(kind: str, record: Collective, sent: float, detail: str) -> Finding:
    return Finding(kind, record.axes, sent, 0.0, record.times, record.source, record.op_name, detail)


def _type(module: Module, computation: str, name: str) -> str:
    instruction = module.find(computation, name)
    return instruction.type if instruction else ""
