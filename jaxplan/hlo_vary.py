"""Along which mesh axes each value of an HLO program differs between devices.

A forward pass over the text: a parameter differs along the axes its sharding splits it over, the partition's number along all,
an all-reduce or all-gather no longer along the axes it spans, everything else along the axes of what it is computed from. The
answer errs to one side: a value said to be the same along an axis is the same there. Axes are bits of a mask, in mesh order;
the value of a tuple is a tuple of masks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any

import numpy as np

from .hlo_text import Instruction, Module, tile_ids

Mask = Any  # an int, or a tuple of masks

_GATHERS = ("all-reduce", "all-gather")
_ANYTHING = ("infeed", "recv", "recv-done", "rng", "rng-get-and-update-state")
_MOST_ROUNDS = 100  # of a loop until nothing changes: axes times elements bound it, this is against damage


def flat(mask: Mask) -> int:
    """The axes along which any part of a value differs."""
    return mask if isinstance(mask, int) else reduce(or_, map(flat, mask), 0)


def joined(a: Mask, b: Mask) -> Mask:
    """Differing where either does."""
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return tuple(joined(x, y) for x, y in zip(a, b, strict=True))
    return flat(a) | flat(b)


class Variation:
    """The masks of a module's values on a mesh. `axes_of(computation, instruction)` gives a collective's mask, `split` those of
    the program's parameters; None: unknown."""

    def __init__(
        self,
        module: Module,
        mesh_shape: Mapping[str, int],
        axes_of: Callable[[str, Instruction], int | None],
        split: Sequence[int | None] = (),
    ) -> None:
        self.module, self.mesh_shape, self.axes_of = module, mesh_shape, axes_of
        self.all = (1 << len(mesh_shape)) - 1
        self.known: dict[tuple[str, str], int] = {}  # per value, over all the contexts in which it is computed
        self._results: dict[tuple[str, Mask], Mask] = {}
        self._within: set[str] = set()
        if module.entry:
            entry = module.computations[module.entry]
            count = max(entry.parameters, default=-1) + 1
            parameters = [entry.instructions.get(entry.parameters.get(i, "")) for i in range(count)]
            said = split if len(split) == count else [None] * count  # arguments that nothing reads are no parameters
            self._run(module.entry, tuple(map(self._parameter, parameters, said)))

    def of(self, computation: str, names: Sequence[str]) -> int:
        """The axes along which any of some values differ, in any context; all of them for values that were never reached."""
        return reduce(or_, [self.known.get((computation, name), self.all) for name in names], 0)

    def _parameter(self, parameter: Instruction | None, said: int | None) -> int:
        """A parameter of the program differs along the axes that its sharding splits it over; unsaid, along all."""
        if parameter is None:
            return self.all
        if said is not None:
            return said
        found = re.search(r"\bsharding=(\{.*)", parameter.attributes)
        tiles = tile_ids(found.group(1), math.prod(self.mesh_shape.values())) if found else None
        if tiles is None:
            return self.all
        sizes = tuple(self.mesh_shape.values())
        return _differing(tiles.reshape(sizes))

    def _run(self, name: str, arguments: tuple[Mask, ...]) -> Mask:
        """The mask of a computation's result."""
        computation = self.module.computations.get(name)
        if computation is None or name in self._within:
            return self.all
        if (name, arguments) in self._results:
            return self._results[name, arguments]
        self._within.add(name)
        masks: dict[str, Mask] = {}
        for instruction in computation.instructions.values():
            operands = [masks.get(operand, self.all) for operand in instruction.operands]
            if instruction.opcode == "parameter":
                number = int(instruction.literal) if instruction.literal.isdigit() else -1
                masks[instruction.name] = arguments[number] if 0 <= number < len(arguments) else self.all
            else:
                masks[instruction.name] = self._result(name, instruction, operands)
            place = name, instruction.name
            self.known[place] = self.known.get(place, 0) | flat(masks[instruction.name])
        self._within.discard(name)
        result = self._results[name, arguments] = masks.get(computation.root, self.all)
        return result

    def _result(self, computation: str, instruction: Instruction, operands: list[Mask]) -> Mask:
        opcode = instruction.opcode
        kind = opcode.removesuffix("-start")
        callees = instruction.callees()
        if opcode == "tuple":
            return tuple(operands)
        if opcode == "get-tuple-element" and operands:
            index, whole = int(instruction.attribute(r"\bindex=(\d+)") or 0), operands[0]
            return whole[index] if isinstance(whole, tuple) and index < len(whole) else flat(whole)
        if opcode in ("copy", "opt-barrier", "bitcast", "async-done", "async-update") and len(operands) == 1:
            return operands[0]
        if opcode == "while" and len(operands) == 1:
            return self._loop(instruction, operands[0])
        if opcode == "conditional" and operands:
            branches = [self._run(callee, (given,)) for callee, given in zip(callees, operands[1:], strict=False)]
            return self._with(reduce(joined, branches), flat(operands[0])) if branches else self.all
        if opcode in ("fusion", "call", "async-start") and len(callees) == 1:
            return self._run(callees[0], tuple(operands))
        if opcode == "partition-id" or kind in _ANYTHING:
            return self.all
        if "replica_groups=" in instruction.attributes or "source_target_pairs=" in instruction.attributes:
            axes = self.axes_of(computation, instruction)
            if kind not in _GATHERS:
                return flat(tuple(operands)) | (self.all if axes is None else axes)
            left = [flat(operand) & ~(axes or 0) for operand in operands]
            return tuple(left) if len(left) > 1 else left[0] if left else self.all
        return flat(tuple(operands))

    def _loop(self, instruction: Instruction, state: Mask) -> Mask:
        body = instruction.attribute(r"\bbody=%?([\w.\-]+)") or ""
        condition = instruction.attribute(r"\bcondition=%?([\w.\-]+)") or ""
        for _ in range(_MOST_ROUNDS):
            going = flat(self._run(condition, (state,)))
            after = self._with(joined(state, self._run(body, (state,))), going)
            if after == state:
                return state
            state = after
        return self.all

    def _with(self, mask: Mask, axes: int) -> Mask:
        return tuple(self._with(m, axes) for m in mask) if isinstance(mask, tuple) else mask | axes


def _differing(tiles: np.ndarray) -> int:
    """The axes of an array over the mesh along which its numbers differ."""
    moved = (tiles != tiles.take([0], axis=axis) for axis in range(tiles.ndim))
    return sum(1 << axis for axis, differs in enumerate(moved) if differs.any())
