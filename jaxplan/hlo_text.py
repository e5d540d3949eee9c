"""Optimized HLO text, taken apart: instructions, who calls whom, and where a value comes from and goes to.

This is the reader beneath the audit in `hlo`. It knows the text's grammar, follows values through tuples,
fusions, calls and loops, and evaluates the small integer arithmetic that decides trip counts and shard
offsets. It knows nothing of collectives, meshes or JAX.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Groups = tuple[tuple[int, ...], ...]
Value = tuple[str, str, tuple[int, ...]]  # computation, instruction, index into its tuple result

MOST_DEVICES = 1 << 20  # more than any machine has: a number beyond it is damage, and not to be allocated
PLUMBING = frozenset(("copy", "bitcast", "reshape", "transpose", "copy-start", "copy-done", "opt-barrier"))


@dataclass(frozen=True, slots=True)
class Instruction:
    name: str
    opcode: str
    type: str  # as printed, layouts included
    operands: tuple[str, ...]
    literal: str  # the text between the parentheses: a parameter's number, a constant's value
    attributes: str

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None

    def callees(self) -> tuple[str, ...]:
        """Computations that run as part of this instruction (reducers and comparators do not count)."""
        if self.opcode in ("fusion", "async-start"):
            found = re.findall(r"\bcalls=%?([\w.\-]+)", self.attributes)
        elif self.opcode == "call":
            found = re.findall(r"\bto_apply=%?([\w.\-]+)", self.attributes)
        elif self.opcode == "while":
            found = re.findall(r"\b(?:body|condition)=%?([\w.\-]+)", self.attributes)
        elif self.opcode == "conditional":
            branches = self.attribute(r"\bbranch_computations=\{([^}]*)\}")
            found = re.findall(r"\b(?:true|false)_computation=%?([\w.\-]+)", self.attributes)
            found = re.findall(r"[\w.\-]+", branches) if branches else found
        elif self.opcode == "custom-call":
            found = re.findall(r"[\w.\-]+", self.attribute(r"\bcalled_computations=\{([^}]*)\}") or "")
        else:
            found = []
        return tuple(found)


@dataclass(slots=True)
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""
    parameters: dict[int, str] = field(default_factory=dict)
    users: dict[str, list[Instruction]] = field(default_factory=dict)


_COMMENT = re.compile(r"/\*.*?\*/")
_HEADER = re.compile(r"(ENTRY\s+)?%?([\w.\-]+)\s*(?:\(.*)?\{\s*$")
_PLAIN = re.compile(r"\s*(ROOT\s+)?%?([\w.\-]+) = ([^\s(]\S*) ([\w\-]+)\(([^()\"]*)\)(.*)", re.S)
_ASSIGN = re.compile(r"\s*(ROOT\s+)?%?([\w.\-]+) = ", re.S)
_CALLED = re.compile(r"\s*([\w\-]+)\(")
_LEAF = re.compile(r"\b([a-z]\w*)\[([^\]]*)\]")


def _closing(text: str, start: int) -> int:
    """Position after the parenthesis that closes the one at `start`; -1 if none does."""
    depth = 0
    for token in re.compile(r'"(?:[^"\\]|\\.)*"|[()]').finditer(text, start):
        depth += {"(": 1, ")": -1}.get(token.group(), 0)
        if depth == 0:
            return token.end()
    return -1


def _parse_instruction(line: str) -> tuple[bool, Instruction] | None:
    if plain := _PLAIN.match(line):
        root, name, kind, opcode, inner, attributes = plain.groups()
    else:
        head = _ASSIGN.match(line)
        if not head:
            return None
        root, name = head.groups()
        start = head.end()
        end = _closing(line, start) if line[start : start + 1] == "(" else line.find(" ", start)
        called = _CALLED.match(line, end) if end > 0 else None
        close = _closing(line, called.end() - 1) if called else -1
        if called is None or close < 0:
            return None
        kind, opcode = line[start:end], called.group(1)
        inner, attributes = line[called.end() : close - 1], line[close:]
    pattern = r"%([\w.\-]+)" if "%" in inner else r"([A-Za-z_][\w.\-]*)(?=\s*(?:,|$))"
    operands = () if opcode in ("constant", "parameter") else tuple(re.findall(pattern, inner))
    return bool(root), Instruction(name, opcode, kind, operands, inner, attributes)


def leaves(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """Element type and dimensions of every array in a printed type."""
    return [(t, tuple(int(n) for n in re.findall(r"\d+", dims))) for t, dims in _LEAF.findall(kind)]


def type_bytes(kind: str) -> float:
    total = 0.0
    for dtype, dims in leaves(kind):
        width = re.search(
            r"\d+", dtype
        )  # the number in an element type's name is its bits: bf16, f8e4m3fn, c64
        bits = 8 if dtype == "pred" else int(width.group()) if width else 0
        total += bits * math.prod(dims) / 8
    return total


class Module:
    """HLO text taken apart: computations, the stack-frame tables, who calls whom."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        self.unread: dict[str, None] = {}  # an ordered set
        self.tables: dict[str, dict[int, str]] = {}
        self.callers: dict[str, list[tuple[str, Instruction]]] = {}
        self._values: dict[tuple[str, str], np.ndarray | None] = {}
        header = re.search(r"^HloModule .*$", text, re.M)
        counts = dict(re.findall(r"\b(replica_count|num_partitions)=(\d+)", header.group() if header else ""))
        self.replicas = int(counts.get("replica_count", 1))
        self.partitions = int(counts.get("num_partitions", 1))
        if self.replicas * self.partitions > MOST_DEVICES:
            self.unread[f"the number of devices: {self.replicas * self.partitions}"] = None
            self.replicas = self.partitions = 1
        if not header:
            self.unread["no HloModule header"] = None
        self._parse(text)
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                for name in dict.fromkeys(instruction.operands):
                    computation.users.setdefault(name, []).append(instruction)
                for callee in instruction.callees():
                    self.callers.setdefault(callee, []).append((computation.name, instruction))
        if not self.entry:
            self.unread["no ENTRY computation"] = None

    def _parse(self, text: str) -> None:
        current: Computation | None = None
        table: dict[int, str] | None = None
        pending = ""
        for line in _COMMENT.sub("", text).split("\n"):
            if current is None:
                entry = re.match(r"(\d+) (.*)", line)
                if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                    table = self.tables.setdefault(line, {})
                elif table is not None and entry:
                    table[int(entry.group(1))] = entry.group(2)
                elif not line.startswith(" ") and (header := _HEADER.match(line)):
                    current = Computation(header.group(2))
                    self.entry = current.name if header.group(1) else self.entry
                continue
            if line.startswith("}"):
                self.computations[current.name] = current
                if pending:
                    self.unread[f"line in %{current.name}: {pending.strip()[:80]}"] = None
                current, pending = None, ""
            elif line.strip():
                if pending and _ASSIGN.match(line):
                    self.unread[f"line in %{current.name}: {pending.strip()[:80]}"] = None
                    pending = ""
                line = f"{pending} {line}" if pending else line
                parsed = _parse_instruction(line)
                pending = "" if parsed else line
                if parsed:
                    self._add(current, *parsed)
        if current is not None:
            self.unread[f"the text ends within %{current.name}"] = None
            self.entry = "" if self.entry == current.name else self.entry

    def _add(self, computation: Computation, root: bool, instruction: Instruction) -> None:
        computation.instructions[instruction.name] = instruction
        if root:
            computation.root = instruction.name
        if instruction.opcode == "parameter" and instruction.literal.isdigit():
            computation.parameters[int(instruction.literal)] = instruction.name

    def find(self, computation: str, name: str) -> Instruction | None:
        body = self.computations.get(computation)
        return body.instructions.get(name) if body else None

    def source(self, instruction: Instruction) -> str:
        """`file.py:123` from inline metadata or from the stack-frame tables; "" where there is neither."""
        path = instruction.attribute(r'source_file="([^"]*)"')
        line = instruction.attribute(r"source_line=(\d+)")
        frame = instruction.attribute(r"stack_frame_id=(\d+)")
        if path is None and frame is not None:
            location = self._entry("StackFrames", frame, "file_location_id", "FileLocations")
            line = self._number(location, "line")
            file = self._number(location, "file_name_id")
            path = self.tables.get("FileNames", {}).get(int(file or -1), "").strip('"')
        return f"{re.split(r'[/]', path)[-1]}:{line}" if path and line else ""

    def _entry(self, table: str, row: str, column: str, target: str) -> str:
        key = self._number(self.tables.get(table, {}).get(int(row), ""), column)
        return self.tables.get(target, {}).get(int(key), "") if key else ""

    @staticmethod
    def _number(row: str, column: str) -> str | None:
        found = re.search(rf"\b{column}=(\d+)", row)
        return found.group(1) if found else None

    # --- following values -------------------------------------------------------------------------------

    def resolve(self, value: Value, through: frozenset[str] = PLUMBING) -> Value:
        """The value this one is a copy of: back through plumbing, tuples, calls and loop invariants."""
        for _ in range(10_000):  # a bound only against garbage that defines a value by itself
            step = self._step_back(value, through)
            if step is None or step == value:
                break
            value = step
        return value

    def _step_back(self, value: Value, through: frozenset[str]) -> Value | None:
        computation, name, index = value
        instruction = self.find(computation, name)
        if instruction is None:
            return None
        opcode, operands = instruction.opcode, instruction.operands
        if opcode in through and operands:
            return computation, operands[0], () if opcode == "copy-start" else index
        if opcode == "get-tuple-element" and operands:
            return computation, operands[0], (int(instruction.attribute(r"index=(\d+)") or 0), *index)
        if opcode == "tuple" and index and index[0] < len(operands):
            return computation, operands[index[0]], index[1:]
        if opcode in ("fusion", "call") and instruction.callees():
            callee = self.computations.get(instruction.callees()[0])
            return (callee.name, callee.root, index) if callee else None
        if opcode == "while" and operands and self._invariant(instruction, index):
            return computation, operands[0], index
        if opcode == "parameter" and instruction.literal.isdigit():
            return self._argument(computation, int(instruction.literal), index)
        return None

    def _argument(self, computation: str, number: int, index: tuple[int, ...]) -> Value | None:
        """The caller's value behind a parameter, if there is one caller and it always passes the same."""
        callers = self.callers.get(computation, [])
        if len(callers) != 1:
            return None
        outer, call = callers[0]
        if call.opcode == "while" and (number or not self._invariant(call, index)):
            return None
        if call.opcode == "conditional":
            number += call.callees().index(computation) + 1
        return (outer, call.operands[number], index) if number < len(call.operands) else None

    def _invariant(self, loop: Instruction, index: tuple[int, ...]) -> bool:
        """Does the loop's body hand this element of its state on unchanged?"""
        body = self.computations.get(loop.attribute(r"\bbody=%?([\w.\-]+)") or "")
        root = body.instructions.get(body.root) if body else None
        if (
            body is None
            or root is None
            or root.opcode != "tuple"
            or not index
            or index[0] >= len(root.operands)
        ):
            return False
        element = body.instructions.get(root.operands[index[0]])
        return (
            element is not None
            and element.opcode == "get-tuple-element"
            and element.operands == (body.parameters.get(0),)
            and element.attribute(r"index=(\d+)") == str(index[0])
        )

    def uses(self, value: Value, through: frozenset[str]) -> list[tuple[str, Instruction | None]]:
        """Every instruction that uses the value and is not plumbing; None stands for leaving the program."""
        found: list[tuple[str, Instruction | None]] = []
        work, seen = [value], {value}
        while work:
            computation, name, index = work.pop()
            body = self.computations[computation]
            following: list[Value] = []
            for user in body.users.get(name, ()):
                step = self._step_forward(computation, name, index, user, through)
                if step is None:
                    found.append((computation, user))
                else:
                    following += step
            if name == body.root:
                callers = self.callers.get(computation, [])
                if len(callers) == 1 and callers[0][1].opcode in ("fusion", "call", "async-start"):
                    following.append((callers[0][0], callers[0][1].name, index))
                else:
                    found.append((computation, None))
            following = [v for v in following if v not in seen]
            if any(len(index) > 100 for _, _, index in following):  # a tuple within itself: damage
                return [(computation, None)]
            work += following
            seen.update(following)
        return found

    def _step_forward(
        self, computation: str, name: str, index: tuple[int, ...], user: Instruction, through: frozenset[str]
    ) -> list[Value] | None:
        if user.opcode in through or user.opcode.endswith("-done") or user.opcode == "async-update":
            whole = user.operands[0] == name or user.opcode == "concatenate"
            return [(computation, user.name, index)] if whole else None
        positions = [i for i, operand in enumerate(user.operands) if operand == name]
        if user.opcode == "get-tuple-element":
            wanted = int(user.attribute(r"index=(\d+)") or 0)
            return [(computation, user.name, index[1:])] if index[:1] == (wanted,) else []
        if user.opcode == "tuple":
            return [(computation, user.name, (i, *index)) for i in positions]
        callees = user.callees() if user.opcode in ("fusion", "call") else ()
        callee = self.computations.get(callees[0]) if callees else None
        if callee is None:
            return None
        return [(callee.name, callee.parameters[i], index) for i in positions if i in callee.parameters]

    # --- evaluating integers, for every partition at once --------------------------------------------------

    def evaluate(self, value: Value) -> np.ndarray | None:
        """The integers of a value, as (partitions or 1, elements); None where the text does not say."""
        computation, name, _ = self.resolve(value, PLUMBING | {"convert"})
        instruction = self.find(computation, name)
        if instruction is None or not re.match(r"[su]\d+\[|pred\[", instruction.type):
            return None
        if (computation, name) not in self._values:
            self._values[computation, name] = None  # what garbage that needs itself gets
            self._values[computation, name] = self._evaluate(computation, instruction)
        return self._values[computation, name]

    def _evaluate(self, computation: str, instruction: Instruction) -> np.ndarray | None:
        if instruction.opcode == "constant":
            if "..." in instruction.literal:
                return None
            numbers = re.findall(r"-?\d+|true|false", instruction.literal)
            return np.array([[int(n == "true") if n.isalpha() else int(n) for n in numbers]])
        if instruction.opcode == "partition-id":
            return np.arange(self.partitions)[:, None]
        if instruction.opcode == "replica-id" and self.replicas == 1:
            return np.zeros((1, 1), int)
        if instruction.opcode not in ("dynamic-slice", "broadcast", *_ARITHMETIC):
            return None
        operands = [self.evaluate((computation, operand, ())) for operand in instruction.operands]
        known = [operand for operand in operands if operand is not None]
        if len(known) < len(operands) or not known:
            return None
        if instruction.opcode == "broadcast":
            return known[0] if known[0].shape[1] == 1 else None
        if instruction.opcode == "dynamic-slice":
            table, places = known[0], known[-1]
            if len(known) != 2 or places.shape[1] != 1 or instruction.attribute(r"sizes=\{(\d+)\}") != "1":
                return None
            rows = np.broadcast_to(table, (places.shape[0], table.shape[1])) if table.shape[0] == 1 else table
            return np.take_along_axis(rows, np.clip(places, 0, table.shape[1] - 1), axis=1)
        try:
            with np.errstate(all="raise"):
                result: np.ndarray = _ARITHMETIC[instruction.opcode](*known)
                return result
        except (TypeError, ValueError, FloatingPointError):
            return None

    def integer(self, value: Value) -> int | None:
        found = self.evaluate(value)
        return (
            int(found.flat[0])
            if found is not None and found.size and (found == found.flat[0]).all()
            else None
        )

    def trip_count(self, computation: str, loop: Instruction) -> int | None:
        """How often a while runs: XLA's own note, else from init, step and bound; None if they do not say."""
        known = loop.attribute(r'known_trip_count\\?"\s*:\s*\{\s*\\?"n\\?"\s*:\s*\\?"?(\d+)')
        if known is not None:
            return int(known)
        condition = self.computations.get(loop.attribute(r"\bcondition=%?([\w.\-]+)") or "")
        body = self.computations.get(loop.attribute(r"\bbody=%?([\w.\-]+)") or "")
        if condition is None or body is None or not loop.operands:
            return None
        inner, name, _ = self.resolve((condition.name, condition.root, ()))
        test = self.find(inner, name)
        if test is None or test.opcode != "compare" or len(test.operands) != 2:
            return None
        sides = [self.resolve((inner, operand, ()), PLUMBING | {"convert"}) for operand in test.operands]
        direction = test.attribute(r"direction=(\w+)") or ""
        if sides[1][:2] == (condition.name, condition.parameters.get(0)):
            sides.reverse()
            direction = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}.get(direction, direction)
        counter, bound = sides[0], self.integer(sides[1])
        if counter[:2] != (condition.name, condition.parameters.get(0)) or bound is None:
            return None
        init = self.integer((computation, loop.operands[0], counter[2]))
        step = self._step_of(body, counter[2])
        if init is None or not step or (direction in _LESS) != (step > 0) or direction not in _LESS + _MORE:
            return None
        return max(0, -((init - bound) // step) if direction in ("LT", "GT") else (bound - init) // step + 1)

    def _step_of(self, body: Computation, index: tuple[int, ...]) -> int | None:
        """What a loop body adds to one element of its state; None if it does anything else with it."""
        inner, name, _ = self.resolve((body.name, body.root, index))
        update = self.find(inner, name)
        if update is None or update.opcode not in ("add", "subtract") or len(update.operands) != 2:
            return None
        state = (body.name, body.parameters.get(0, ""), index)
        operands = [(inner, operand, ()) for operand in update.operands]
        if self.resolve(operands[0]) == state:
            step = self.integer(operands[1])
            return -step if step is not None and update.opcode == "subtract" else step
        return (
            self.integer(operands[0])
            if update.opcode == "add" and self.resolve(operands[1]) == state
            else None
        )


_LESS, _MORE = ("LT", "LE"), ("GT", "GE")
_ARITHMETIC: Mapping[str, Any] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": lambda a, b: np.trunc(a / b).astype(int),
    "remainder": np.fmod,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "clamp": lambda low, x, high: np.clip(x, low, high),
}


# --- device groups ---------------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _rows(array: np.ndarray) -> Groups:
    return tuple(tuple(row) for row in array.tolist())


def _iota(shape: str, transpose: str | None) -> np.ndarray:
    """The ids of `[shape]T(transpose)`, flat; none if the two do not fit each other."""
    sizes, order = numbers(shape), numbers(transpose or "")
    if math.prod(sizes) > MOST_DEVICES or (order and sorted(order) != list(range(len(sizes)))):
        return np.arange(0)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(order).ravel() if order else ids.ravel()


def _mesh_groups(text: str) -> Groups | None:
    """`mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x','y':(1)2}`: ids grouped along (parts of) axes."""
    found = re.match(r"@?mesh[\[<]([^\]>]*)[\]>](.*?)\{([^{}]*)\}", text)
    if not found:
        return None
    axes = re.findall(r"['\"]?([\w.\-]+)['\"]?=(\d+)", found.group(1))
    total = math.prod(int(size) for _, size in axes)
    if not axes or total > MOST_DEVICES:
        return None
    ids, order = np.arange(total), found.group(2)
    if iota := re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?\)", order):
        ids = _iota(*iota.groups())
    elif numbers(order):
        ids = np.array(numbers(order))
    if ids.size != total:
        return None
    wanted = re.findall(r"['\"]?([\w.\-]+)['\"]?(?::\((\d+)\)(\d+))?", found.group(3))
    shape: list[int] = []
    grouped: dict[tuple[str, int], int] = {}
    for axis, size in axes:
        left = int(size)
        cuts = sorted((int(before), int(width)) for name, before, width in wanted if name == axis and before)
        done = 1
        for before, width in cuts or ([(1, left)] if (axis, "", "") in wanted else []):
            grouped[axis, before] = len(shape) + 1
            shape += [before // done, width]
            done = before * width
        shape.append(left // done)
    if len(grouped) != len(wanted) or math.prod(shape) != total:
        return None
    last = [grouped[name, int(before or 1)] for name, before, _ in wanted]
    moved = np.moveaxis(ids.reshape(shape), last, range(-len(last), 0)) if last else ids
    return _rows(moved.reshape(-1, math.prod(shape[i] for i in last)))


def _printed_groups(attributes: str) -> Groups | None:
    """The device groups (of a permute: pairs) in any notation; () for `{}`, None if unreadable."""
    found = re.search(r"\b(?:replica_groups|source_target_pairs)=", attributes)
    text = attributes[found.end() :] if found else ""
    if text.startswith(("mesh", "@mesh")):
        return _mesh_groups(text)
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        ids, shape = _iota(iota.group(2), iota.group(3)), numbers(iota.group(1))
        return _rows(ids.reshape(shape)) if ids.size == math.prod(shape) and len(shape) == 2 else None
    if text.startswith("{}"):
        return ()
    if listed := re.match(r"\{\s*(?:\{[\d,\s]*\}\s*,?\s*)+\}", text):
        return tuple(tuple(numbers(group)) for group in re.findall(r"\{([\d,\s]+)\}", listed.group()))
    return None


def device_groups(kind: str, attributes: str, replicas: int, partitions: int) -> Groups | None:
    """Groups of flattened ids, replica * partitions + partition, by XLA's rules for the printed ids."""
    groups = _printed_groups(attributes)
    across = kind in ("all-to-all", "collective-permute", "collective-broadcast")
    channel, everything = "channel_id=" in attributes, "use_global_device_ids=true" in attributes
    if groups is None or (kind == "collective-permute" and any(len(pair) != 2 for pair in groups)):
        return None
    if channel and (everything or (across and replicas == 1)):
        return groups or (tuple(range(replicas * partitions)),)
    if any(i >= (partitions if channel and across else replicas) for group in groups for i in group):
        return groups  # ids beyond what the rule allows can only be flattened already
    if channel and across:
        groups = groups or (tuple(range(partitions)),)
        return tuple(tuple(r * partitions + p for p in group) for r in range(replicas) for group in groups)
    groups = groups or (tuple(range(replicas)),)
    if channel:
        return tuple(tuple(r * partitions + p for r in group for p in range(partitions)) for group in groups)
    return tuple(tuple(r * partitions + p for r in group) for p in range(partitions) for group in groups)


def tile_ids(sharding: str, devices: int) -> np.ndarray | None:
    """Per device, the tile that it holds under a printed sharding, `{devices=[4,1,2]<=[8] ...}`; None if unreadable."""
    if sharding.startswith("{replicated"):
        return np.zeros(devices, int)
    if sharding.startswith("{mesh"):
        found = re.match(r"\{(mesh\[[^\]]*\](?:, device_ids=\([^{}]*\))?), \[(.*?)\](?:[,} ]|$)", sharding)
        names = re.findall(r"'[\w.\-]+'(?::\(\d+\)\d+)?", found.group(2)) if found else []
        groups = _mesh_groups(f"{found.group(1)} {{{','.join(names)}}}") if found else None
        return _places(np.array(groups), devices) if groups else None
    found = re.match(r"\{devices=\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))([^{}]*)", sharding)
    if not found:
        return None
    shape, ids, order, listed, rest = found.groups()
    devices_in_tiles = _iota(ids, order) if ids else np.array(numbers(listed))
    tiles = numbers(shape)
    if devices_in_tiles.size != devices or math.prod(tiles) != devices:
        return None
    kinds = re.findall(r"manual|replicated|unreduced", (re.search(r"last_tile_dims=\{([^}]*)\}", sharding) or [""] * 2)[1])
    held = tiles[: len(tiles) - (len(kinds) or ("last_tile_dim_replicate" in rest))]
    if set(kinds) - {"replicated"}:
        return None
    return _places(devices_in_tiles.reshape(math.prod(held), -1).T, devices)


def _places(rows: np.ndarray, devices: int) -> np.ndarray | None:
    """Per device, the column in which it stands."""
    if rows.size != devices or sorted(rows.ravel().tolist()) != list(range(devices)):
        return None
    places = np.zeros(devices, int)
    places[rows] = np.arange(rows.shape[1])
    return places
