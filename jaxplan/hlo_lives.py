"""What a scheduled program holds at once, from its text: the audit's own count of temporaries.

A TPU's compiler prints computations in the order in which they run, and of every array its tiles and the memory that it lies in.
So what lives when can be read, whatever is said of how much was allocated.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from .hlo_text import Computation, Instruction, Module

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_ALIAS = re.compile(r"\{(\d*)\}: \((\d+), \{(\d*)\}")
_PASSES = frozenset(("bitcast", "optimization-barrier", "opt-barrier", "while", "tuple"))
_UNREAD = frozenset(("tuple", "get-tuple-element", "bitcast"))


def stored_bytes(kind: str) -> list[int]:
    """Of each array in a printed type, its bytes in main memory, whole tiles; 0 where it lies elsewhere (`S(1)`)."""
    return [_padded(*found.groups()) for found in _ARRAY.finditer(kind)]


def _padded(dtype: str, dims: str, order: str | None, layout: str | None) -> int:
    width = re.search(r"\d+", dtype)
    bits = 8 if dtype == "pred" else int(width.group()) if width else 0
    if layout and "S(" in layout:
        return 0
    extents = [int(extent) for extent in dims.split(",") if extent]
    tile = _TILE.search(layout or "")
    if tile and order:
        units = [int(unit) for unit in tile.group(1).split(",")][::-1]
        minor = [int(dim) for dim in order.split(",")]
        for dim, unit in zip(minor, units, strict=False):
            extents[dim] = -(-extents[dim] // unit) * unit
    return math.prod(extents) * bits // 8


@dataclass(slots=True)
class _Span:
    """Bytes that live from instruction `first` to instruction `last` of a computation."""

    nbytes: int
    first: int
    last: int


@dataclass(slots=True)
class _Walk:
    """One computation: per instruction the buffers of its result's arrays, and what the computations it calls hold besides."""

    module: Module
    computation: Computation
    spans: list[_Span] = field(default_factory=list)
    held: dict[str, list[int]] = field(default_factory=dict)
    inner: dict[int, int] = field(default_factory=dict)

    def most(self) -> int:
        given: set[int] = set()
        for place, instruction in enumerate(self.computation.instructions.values()):
            self.held[instruction.name] = self._result(place, instruction)
            if instruction.opcode in ("parameter", "constant"):
                given.update(self.held[instruction.name])
        given.update(self.held.get(self.computation.root, ()))
        change = [0] * (len(self.computation.instructions) + 2)
        for number, span in enumerate(self.spans):
            if number not in given:
                change[span.first] += span.nbytes
                change[span.last + 1] -= span.nbytes
        most = alive = 0
        for place, step in enumerate(change):
            alive += step
            most = max(most, alive + self.inner.get(place, 0))
        return most

    def _new(self, place: int, sizes: list[int]) -> list[int]:
        start = len(self.spans)
        self.spans += [_Span(size, place, place) for size in sizes]
        return list(range(start, len(self.spans)))

    def _result(self, place: int, instruction: Instruction) -> list[int]:
        opcode, sizes = instruction.opcode, stored_bytes(instruction.type)
        read = [self.held.get(name, []) for name in instruction.operands]
        if opcode not in _UNREAD:
            for number in (number for numbers in read for number in numbers):
                self.spans[number].last = place
        if opcode in ("while", "call", "conditional"):
            called = [self.module.computations[name] for name in instruction.callees() if name in self.module.computations]
            self.inner[place] = max([_Walk(self.module, one).most() for one in called], default=0)
        if opcode in _PASSES or opcode.endswith("-update"):
            return [number for numbers in read for number in numbers]
        if opcode == "get-tuple-element":
            return self._element(instruction, read)
        if opcode.endswith("-done") and read:
            return self._done(instruction, read[0], len(sizes))
        if opcode.endswith("-start"):
            return self._started(place, instruction, read, sizes)
        own = self._new(place, sizes)
        if opcode == "dynamic-update-slice" and read and read[0]:
            return read[0][:1]
        for output, operand, index in _ALIAS.findall(instruction.attribute(r"output_to_operand_aliasing=\{(.*?\))\}") or ""):
            of = read[int(operand)] if int(operand) < len(read) else []
            if int(index or 0) < len(of) and int(output or 0) < len(own):
                self.spans[own[int(output or 0)]].nbytes = 0
                own[int(output or 0)] = of[int(index or 0)]
        return own

    def _element(self, instruction: Instruction, read: list[list[int]]) -> list[int]:
        """The part of a tuple, whose elements may be tuples."""
        source = self.computation.instructions.get(instruction.operands[0]) if instruction.operands else None
        index = instruction.attribute(r"index=(\d+)")
        if source is None or index is None:
            return []
        counts = [len(stored_bytes(part)) for part in _elements(source.type)]
        before = sum(counts[: int(index)])
        return read[0][before : before + counts[int(index)]] if int(index) < len(counts) else []

    def _started(self, place: int, instruction: Instruction, read: list[list[int]], sizes: list[int]) -> list[int]:
        """What an exchange or a copy in the background takes: operands are handed on, the rest is new. A copy's result comes
        before its operand; a start that returns only as much as it is given hands nothing on."""
        given = [number for numbers in read for number in numbers]
        if instruction.opcode == "copy-start":
            return [*self._new(place, sizes[:1]), *given[:1], *self._new(place, [0] * max(len(sizes) - 2, 0))]
        if len(sizes) <= len(given):
            return self._new(place, sizes)
        return [*given, *self._new(place, sizes[len(given) :])]

    def _done(self, instruction: Instruction, started: list[int], wanted: int) -> list[int]:
        source = self.computation.instructions.get(instruction.operands[0])
        if source is not None and source.opcode != "copy-start":
            given = {number for name in source.operands for number in self.held.get(name, ())}
            own = [number for number in started if number not in given]
            started = own if len(own) >= wanted else started
        return started[:wanted]


def _elements(kind: str) -> list[str]:
    """The types of a tuple's elements."""
    found, depth = [""], 0
    for letter in kind.strip()[1:-1]:
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(letter, 0)
        if letter == "," and not depth:
            found.append("")
        else:
            found[-1] += letter
    return found


def without_gaps_twice(reported: int, alive: int) -> int:
    """The size of a heap, of which what was reported counts the gaps twice: reported = heap + (heap - alive). Where more is read
    to be alive than was reported (temporaries may lie in the buffers of donated arguments), what was reported stays."""
    return (reported + min(alive, reported)) // 2


def bytes_alive(text: str) -> int:
    """The most bytes of temporaries in main memory that live at once in a scheduled program: neither parameters, nor constants,
    nor what is returned. An estimate from above: a loop's carry that is written in place is found only where the text says so."""
    module = Module(text)
    entry = module.computations.get(module.entry)
    return _Walk(module, entry).most() if entry else 0
