"""The audit: what a compiled program really moves, read out of its optimized HLO text.

`audit(jitted, *args)` compiles and reads; `read_hlo(text)` only reads. Neither knows anything of the cost
model, so the compiler can serve as its oracle. All numbers are per device and per call of the program:
bytes in bytes, `times` in executions (loop trip counts multiplied out, of a conditional the branch that
moves most), FLOPs counting a multiply and an add as two.

`Audit.warnings` (`hlo_findings`) lists what the program does and need not.

Two views are kept. `Audit.collectives` is the program as compiled. `Audit.normalised` rewrites the habits
of one backend (CPU above all) into what the program means, by these rules and no other:

1. A combined collective (several operands) becomes one record per operand. An all-to-all over a tuple is
   no combination (its elements are the slices for each peer) and stays one.
2. An all-reduce all of whose uses, through convert, copy, bitcast, reshape, transpose, fusion and tuple
   plumbing, are one and the same dynamic-slice, whose offsets (evaluated for every partition) hand each
   member of the group a different n-th of the result along one dimension, becomes a reduce-scatter: no
   backend has one along several.
   Where the text elides the table of offsets (`constant({...})`, 10 elements and more), only a slice inside
   a computation that XLA named `all-reduce-scatter` is rewritten. `audit` has the tables printed.
3. An f32 collective that was widened counts the bytes of the narrow type: a data movement whose operand
   is a convert from it and whose every use converts back to it; a reduction with both, or with one of the
   two when its reducer is one XLA marks `_promoted` (which it does for bf16 only).
4. An all-reduce (a sum) of zeros into which each member of the group wrote its own, different n-th becomes an
   all-gather (the TPU writes small ones so).

What cannot be read is listed in `Audit.unread` and left out of the sums, never guessed.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from .hlo_findings import Site, Walked, find_warnings
from .hlo_lives import bytes_alive, without_gaps_twice
from .hlo_records import Audit, Collective, Finding, Kernel
from .hlo_text import PLUMBING, Groups, Instruction, Module, Value, device_groups, leaves, type_bytes
from .hlo_work import flops_of, traffic_of
from .topology import counts_gaps_twice, topology_mesh

__all__ = ["Audit", "Collective", "Finding", "Kernel", "audit", "read_hlo"]

_REDUCTIONS = ("all-reduce", "reduce-scatter")
_KINDS = (*_REDUCTIONS, "all-gather", "all-to-all", "collective-permute", "collective-broadcast")
_NOT_UNDERSTOOD = ("ragged-all-to-all", "send", "recv", "ragged-dot")
_GROUPED = re.compile(r"\b(?:replica_groups|source_target_pairs)=")
_DEEPEST = 8  # calls within calls, to where metadata may be
_MOVES = PLUMBING | {"slice", "dynamic-slice", "concatenate"}


# --- mesh axes and wire bytes -----------------------------------------------------------------------------


def _mesh_axes(kind: str, groups: Groups, mesh_shape: Mapping[str, int]) -> tuple[str, ...] | None:
    """The mesh axes along which members of a group (a pair) differ; None if groups are not their cosets."""
    members = {i for group in groups for i in group}
    total = math.prod(mesh_shape.values())
    if not members or max(members) >= total or len({len(group) for group in groups}) != 1:
        return None
    array = np.array(groups)
    places = zip(mesh_shape, np.unravel_index(array, tuple(mesh_shape.values())), strict=True)
    axes = tuple(axis for axis, place in places if (place != place[:, :1]).any())
    covers = array.size == total and array.shape[1] == math.prod(mesh_shape[axis] for axis in axes)
    return axes if kind == "collective-permute" or covers else None


def _longest_chain(pairs: Groups) -> int:
    """Devices in the largest connected component of source-target pairs."""
    leader = {i: i for pair in pairs for i in pair}

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = i = leader[leader[i]]
        return i

    for source, target in pairs:
        leader[find(source)] = find(target)
    sizes: dict[int, int] = {}
    for i in leader:
        sizes[find(i)] = sizes.get(find(i), 0) + 1
    return max(sizes.values(), default=1)


def _wire_bytes(kind: str, payload: float, groups: Groups) -> float:
    if kind == "collective-permute":
        return payload if any(source != target for source, target in groups) else 0.0
    n = max(len(group) for group in groups)
    return (2 if kind == "all-reduce" else 1) * (n - 1) / n * payload


# --- reading a module -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Tally:
    """What one run of a computation does: how often each collective and each kernel within it runs, and its FLOPs."""

    flops: float = 0.0
    sites: dict[tuple[str, str], tuple[float, bool]] = field(default_factory=dict)  # (times, exact)
    kernels: dict[Kernel, float] = field(default_factory=dict)  # times

    def include(self, other: _Tally, times: float, exact: bool) -> None:
        self.flops += other.flops * times
        for kernel, count in other.kernels.items():
            self.kernels[kernel] = self.kernels.get(kernel, 0) + count * times
        for site, (count, known) in other.sites.items():
            before, sure = self.sites.get(site, (0, True))
            self.sites[site] = before + count * times, sure and known and exact


class _Reader:
    """Walks a module from its entry and turns the collectives it meets into records."""

    def __init__(self, module: Module, mesh_shape: Mapping[str, int] | None, while_trips: float = 1) -> None:
        self.module = module
        self.mesh_shape = mesh_shape
        self.while_trips = while_trips
        self.flops: dict[tuple[str, str], float] = {}  # of each dot and convolution, per run
        self.calls: dict[str, list[tuple[str, float]]] = {}  # what each computation runs, and how often
        self.order: list[str] = []  # callees before their callers
        self.records: dict[tuple[str, str], Collective] = {}
        self.groups: dict[tuple[str, str], Groups] = {}
        self.tallies: dict[str, _Tally | None] = {}

    def unread(self, note: str) -> None:
        self.module.unread[note] = None

    def visit(self, name: str) -> _Tally:
        if name in self.tallies:
            return self.tallies[name] or _Tally()  # None: garbage that calls itself
        tally = _Tally()
        self.tallies[name] = None
        computation = self.module.computations.get(name)
        if computation is None:
            self.unread(f"computation %{name} is missing")
        known = computation.instructions if computation else {}
        for instruction in known.values():
            lost = [operand for operand in instruction.operands if operand not in known]
            if lost:
                self.unread(f"operand %{lost[0]} of %{instruction.name}: it is not there")
            self._count(name, instruction, tally)
        self.tallies[name] = tally
        self.order.append(name)
        return tally

    def _include(self, caller: str, callee: str, tally: _Tally, times: float = 1, exact: bool = True) -> None:
        tally.include(self.visit(callee), times, exact)
        self.calls.setdefault(caller, []).append((callee, times))

    def runs(self) -> dict[str, float]:
        """How often each computation runs in one call of the program."""
        found = {self.module.entry: 1.0}
        for caller in reversed(self.order):
            for callee, times in self.calls.get(caller, ()):
                found[callee] = found.get(callee, 0.0) + found.get(caller, 0.0) * times
        return found

    def _count(self, computation: str, instruction: Instruction, tally: _Tally) -> None:
        opcode = instruction.opcode
        if opcode.removesuffix("-start") in _KINDS:
            self._record(computation, instruction)
            if (computation, instruction.name) in self.records:
                tally.sites[computation, instruction.name] = 1, True
        elif opcode == "while":
            times = self.module.trip_count(computation, instruction)
            body = instruction.attribute(r"\bbody=%?([\w.\-]+)") or ""
            for callee in instruction.callees():
                runs = self.while_trips if times is None else times + (callee != body)
                self._include(computation, callee, tally, runs, times is not None)
            if times is None:
                self.unread(f"trip count of %{instruction.name}, counted as {self.while_trips:g}")
        elif opcode == "conditional":
            branches = instruction.callees()
            if branches:
                self._include(computation, max(branches, key=lambda branch: self._weight(self.visit(branch))), tally)
        elif opcode in _NOT_UNDERSTOOD or (_GROUPED.search(instruction.attributes) and not opcode.endswith(("-done", "-update"))):
            self.unread(f"{opcode} %{instruction.name}")
        else:
            operands = [self._type(computation, operand) for operand in instruction.operands]
            flops = flops_of(instruction, operands)
            if flops is None:
                self.unread(f"FLOPs of {opcode} %{instruction.name}")
            inner = _Tally(flops or 0.0)
            if flops:
                self.flops[computation, instruction.name] = flops
            for callee in instruction.callees():
                self._include(computation, callee, inner)
            if opcode != "call":  # what a fusion or a library call does inside is one kernel
                moved = traffic_of(self.module, computation, instruction)
                cycles = float(instruction.attribute(r'"estimated_cycles":"(\d+)"') or 0)  # the TPU's compiler says so
                kernel = Kernel(instruction.name, opcode, inner.flops, moved, cycles)
                inner.kernels = {kernel: 1} if inner.flops or moved or cycles else {}
            tally.include(inner, 1, True)

    def _weight(self, tally: _Tally) -> tuple[float, float]:
        return sum(self.records[s].wire_bytes * times for s, (times, _) in tally.sites.items()), tally.flops

    def _type(self, computation: str, name: str) -> str:
        instruction = self.module.find(computation, name)
        return instruction.type if instruction else ""

    def _continues(self, computation: str, instruction: Instruction) -> bool:
        """The TPU spreads one asynchronous collective over several fusions; only its start counts."""
        if (
            "async_collective_fusion_config" not in instruction.attributes
            or "chain_id" not in instruction.attributes
        ):
            return False
        siblings = self.module.computations[computation].instructions.values()
        return not any('"AsyncCollectiveStart"' in other.attributes for other in siblings)

    def _record(self, computation: str, instruction: Instruction) -> None:
        kind, name = instruction.opcode.removesuffix("-start"), instruction.name
        if (computation, name) in self.records or self._continues(computation, instruction):
            return
        types = [self._type(computation, operand) for operand in instruction.operands]
        module = self.module
        groups = device_groups(kind, instruction.attributes, module.replicas, module.partitions)
        if not groups or not types or not all(leaves(kind) for kind in types):
            self.unread(f"{instruction.opcode} %{name}: its {'operands' if groups else 'device groups'}")
            return
        chained = kind == "collective-permute"
        size = _longest_chain(groups) if chained else max(len(group) for group in groups)
        payload = sum(map(type_bytes, types)) * (size if kind == "all-gather" else 1)
        axes = _mesh_axes(kind, groups, self.mesh_shape) if self.mesh_shape else ()
        if axes is None:
            self.unread(f"axes of {kind} %{name}: its groups are not spanned by axes of the mesh")
        source, stack = self.tell(computation, instruction)
        self.groups[computation, name] = groups
        self.records[computation, name] = Collective(
            kind=kind,
            payload_bytes=payload,
            wire_bytes=_wire_bytes(kind, payload, groups),
            times=1,
            group_size=size,
            axes=axes or (),
            dtype=",".join(dict.fromkeys(leaf[0] for kind in types for leaf in leaves(kind))),
            shape=_result(instruction),
            source=source,
            op_name=stack,
            exact=True,
            name=name,
        )

    def tell(self, computation: str, instruction: Instruction) -> tuple[str, str]:
        """The user's source line and name stack; XLA may leave them on the fusion (or call) around an instruction."""
        for _ in range(_DEEPEST):
            callers = self.module.callers.get(computation, [])
            if "metadata=" in instruction.attributes or len(callers) != 1 or callers[0][1].opcode == "while":
                break
            computation, instruction = callers[0]
        return self.module.source(instruction), instruction.attribute(r'op_name="([^"]*)"') or ""

    # --- the rewritings ---------------------------------------------------------------------------

    def normalise(self, site: tuple[str, str]) -> list[Collective]:
        """The records that a compiled collective stands for, by the rules in the module's docstring."""
        record, instruction = self.records[site], self.module.find(*site)
        assert instruction is not None
        indices: list[tuple[int, ...]] = [(i,) for i in range(len(instruction.operands))]
        if len(indices) == 1:
            return [self._rewrite(site, record, [()])]
        if record.kind == "all-to-all":
            return [self._rewrite(site, record, indices)]
        return [self._rewrite(site, self._element(site, record, instruction, i), [(i,)]) for (i,) in indices]

    def _element(self, site: tuple[str, str], record: Collective, whole: Instruction, i: int) -> Collective:
        kind = self._type(site[0], whole.operands[i])
        payload = type_bytes(kind) * (record.group_size if record.kind == "all-gather" else 1)
        users = self.module.computations[site[0]].users.get(whole.name, [])
        taken = [user for user in users if user.attribute(r"index=(\d+)") == str(i)]
        teller = next((t for t in taken if "op_name=" in t.attributes), whole)
        printed = [f"{dtype}[{','.join(map(str, dims))}]" for dtype, dims in leaves(whole.type)]
        return replace(
            record,
            payload_bytes=payload,
            wire_bytes=_wire_bytes(record.kind, payload, self.groups[site]),
            dtype=_array(kind)[0],
            shape=printed[i] if len(printed) == len(whole.operands) else _bare(kind),
            source=self.module.source(teller) or record.source,
            op_name=teller.attribute(r'op_name="([^"]*)"') or record.op_name,
            rewritten="element of a combined collective",
        )

    def _rewrite(
        self, site: tuple[str, str], record: Collective, indices: list[tuple[int, ...]]
    ) -> Collective:
        rules = [record.rewritten] if record.rewritten else []
        if record.kind == "all-reduce" and record.group_size > 1:
            instruction = self.module.find(*site)
            operand = instruction.operands[indices[0][0] if indices[0] else 0] if instruction else ""
            part = self._scattered((*site, indices[0]), self.groups[site])
            if part:
                wire = _wire_bytes("reduce-scatter", record.payload_bytes, self.groups[site])
                record = replace(record, kind="reduce-scatter", wire_bytes=wire, shape=_bare(part))
                rules.append("all-reduce then slice")
            elif instruction and self._sums(instruction) and self._gathered((site[0], operand, ()), self.groups[site]):
                wire = _wire_bytes("all-gather", record.payload_bytes, self.groups[site])
                record = replace(record, kind="all-gather", wire_bytes=wire)
                rules.append("all-reduce of zeros and a part")
        narrow = self._narrow(site, record.kind, indices) if record.dtype == "f32" else ""
        if narrow:
            payload, wire = record.payload_bytes / 2, record.wire_bytes / 2
            shape = record.shape.replace("f32[", f"{narrow}[")
            record = replace(record, payload_bytes=payload, wire_bytes=wire, dtype=narrow, shape=shape)
            rules.append(f"widened from {narrow}")
        return replace(record, rewritten="; ".join(rules))

    def _scattered(self, value: Value, groups: Groups) -> str:
        """The type of the slice each device keeps of an all-reduce, if that is all that is made of it."""
        uses = self.module.uses(value, PLUMBING | {"convert"})
        tilings = set()
        for computation, use in uses:
            if use is None or use.opcode != "dynamic-slice":
                return ""
            whole = self._type(computation, use.operands[0])
            if sum(n != k for n, k in zip(_array(whole)[1], _array(use.type)[1], strict=False)) != 1:
                return ""
            tilings.add(self._tiling(computation, use.name, use.operands[1:], whole, use.type, groups))
        return uses[0][1].type if len(tilings) == 1 and None not in tilings and uses[0][1] else ""

    def _sums(self, reduction: Instruction) -> bool:
        reducer = self.module.computations.get(reduction.attribute(r"\bto_apply=%?([\w.\-]+)") or "")
        return reducer is not None and getattr(reducer.instructions.get(reducer.root), "opcode", "") == "add"

    def _gathered(self, value: Value, groups: Groups) -> bool:
        """Is this value zeros but for each device's own part, and are the parts of a group all there is?"""
        computation, name, _ = self.module.resolve(value)
        update = self.module.find(computation, name)
        if update is None or update.opcode != "dynamic-update-slice" or len(update.operands) < 3:
            return False
        inner, base, _ = self.module.resolve((computation, update.operands[0], ()), PLUMBING | {"broadcast", "convert"})
        zero = self.module.find(inner, base)
        if zero is None or zero.opcode != "constant" or zero.literal.strip("{} ") not in ("0", "false"):
            return False
        part = self._type(computation, update.operands[1])
        return self._tiling(computation, name, update.operands[2:], update.type, part, groups) is not None

    def _tiling(
        self, computation: str, name: str, offsets: tuple[str, ...], all_of: str, part_of: str, groups: Groups
    ) -> tuple[Any, ...] | None:
        """Which block each partition takes (or gives), if the members of every group have all different blocks.

        `name`: the instruction that slices; `all_of`, `part_of`: the types of the whole and of a block.
        """
        whole, part = _array(all_of)[1], _array(part_of)[1]
        n = len(groups[0])
        if math.prod(whole) != n * math.prod(part) or len(offsets) != len(whole):
            return None
        block = np.zeros((self.module.partitions, 1), int)
        for operand, size, kept in zip(offsets, whole, part, strict=True):
            if size == kept:
                continue
            offset = self.module.evaluate((computation, operand, ()))
            if offset is None and computation.startswith("all-reduce-scatter"):
                return whole, part
            if offset is None:
                self.unread(f"offsets of %{name}: its all-reduce is read as no more than that")
                return None
            if not kept or size % kept or offset.shape[1] != 1 or (offset % kept).any():
                return None
            block = block * (size // kept) + offset // kept
        blocks = np.broadcast_to(block, (self.module.partitions, 1))[:, 0].tolist()
        if max(map(max, groups)) >= len(blocks):
            return None
        tiled = all(sorted(blocks[i] for i in group) == list(range(n)) for group in groups)
        return (whole, part, tuple(blocks)) if tiled else None

    def _narrow(self, site: tuple[str, str], kind: str, indices: list[tuple[int, ...]]) -> str:
        """The 16-bit float type that an f32 collective was widened from, or ""."""
        instruction = self.module.find(*site)
        assert instruction is not None
        before, after = set(), set()
        for index in indices:
            operand = instruction.operands[index[0] if index else 0]
            before.add(self._converted_from((site[0], operand, ())))
            for _, use in self.module.uses((*site, index), _MOVES):
                after.add(_array(use.type)[0] if use is not None and use.opcode == "convert" else "")
        names = [names.pop() if len(names) == 1 else "" for names in (before, after)]
        both = [name for name in names if name in ("bf16", "f16")]
        promoted = kind in _REDUCTIONS and "_promoted" in (instruction.attribute(r"to_apply=(\S+)") or "")
        enough = len(both) == 2 or (promoted and "bf16" in both)
        return both[0] if enough and len(set(both)) == 1 else ""

    def _converted_from(self, value: Value) -> str:
        computation, name, _ = self.module.resolve(value, _MOVES - {"concatenate"})
        instruction = self.module.find(computation, name)
        if instruction is None or instruction.opcode != "convert":
            return ""
        return _array(self._type(computation, instruction.operands[0]))[0] if instruction.operands else ""


def _array(kind: str) -> tuple[str, tuple[int, ...]]:
    """Element type and dimensions of a printed array type (of a tuple, its first); ("", ()) if it is none."""
    return next(iter(leaves(kind)), ("", ()))


def _result(instruction: Instruction) -> str:
    """The result's type; of an async start, which returns (operand, result, ...), the result's alone."""
    printed = _bare(instruction.type)
    kind = instruction.opcode.removesuffix("-start")
    if kind == instruction.opcode or kind == "all-reduce":
        return printed
    if len(instruction.operands) == 1 or printed.startswith("(("):
        _, *parts = re.findall(r"\([^()]*\)|\w+\[[^\]]*\]", printed[1:-1]) or [""]
        return parts[0] if parts else printed
    return printed


def _bare(kind: str) -> str:
    """A printed type without its layouts."""
    return re.sub(r"\{[^{}]*\}", "", kind)


# --- the public verbs -------------------------------------------------------------------------------------


Split = Sequence[frozenset[str] | None]
"""Per parameter of a program, the mesh axes that split it; None where that is not known."""


def read_hlo(
    text: str, mesh_shape: Mapping[str, int] | None = None, *, while_trips: float = 1, split: Split = ()
) -> Audit:
    """Read the collectives, FLOPs and memory traffic out of optimized HLO text. Memory is not in the text and stays 0.

    `mesh_shape` gives the sizes of the mesh axes in order; partition i is taken to be the i-th device of
    `mesh.devices.flat`. Without it `Collective.axes` is empty. `while_trips`: how often a loop runs that does not say.
    `split`: the axes that split each parameter, where the text does not say. Raises nothing on damaged text: see `unread`.
    """
    module = Module(text)
    reader = _Reader(module, mesh_shape, while_trips)
    tally = reader.visit(module.entry) if module.entry else _Tally()
    compiled: list[Collective] = []
    meant: list[Collective] = []
    for site, (times, exact) in tally.sites.items():
        compiled.append(replace(reader.records[site], times=times, exact=exact))
        meant += [replace(record, times=times, exact=exact) for record in reader.normalise(site)]
    kernels = tuple(tally.kernels.items())
    warnings = find_warnings(_walked(reader, dict(zip(tally.sites, compiled, strict=True)), split))
    return Audit(tuple(compiled), tuple(meant), tally.flops, kernels, unread=tuple(module.unread), warnings=warnings)


def _walked(reader: _Reader, records: Mapping[tuple[str, str], Collective], split: Split) -> Walked:
    """What the search for findings needs. Where the mesh is unknown, one axis without a name stands for all devices."""
    devices = reader.module.partitions
    known = reader.mesh_shape if reader.mesh_shape and math.prod(reader.mesh_shape.values()) == devices else None
    mesh_shape = known or {"": devices}
    sites = {}
    for place, record in records.items():
        axes = _mesh_axes(record.kind, reader.groups[place], mesh_shape)
        mask = None if axes is None else sum(1 << i for i, axis in enumerate(mesh_shape) if axis in axes)
        sites[place] = Site(record, reader.groups[place], mask)
    given = tuple([_bits(axes, known) for axes in split]) if known else ()
    return Walked(reader.module, mesh_shape, known is not None, reader.runs(), sites, reader.flops, reader.tell, given)


def _bits(axes: frozenset[str] | None, mesh_shape: Mapping[str, int]) -> int | None:
    if axes is None or not axes <= mesh_shape.keys():
        return None
    return sum(1 << i for i, (axis, size) in enumerate(mesh_shape.items()) if axis in axes and size > 1)


def audit(
    fn: Any, *args: Any, mesh: Any = None, topology: str | None = None, while_trips: float = 1, **kwargs: Any
) -> Audit:
    """Compile a jitted function for these arguments and read what it moves, computes and stores per device.

    `fn` is a function from `jax.jit` (or anything with its `.lower`), or already a `jax.stages.Lowered` or
    `Compiled`; arguments may be `jax.ShapeDtypeStruct`s. `mesh` (a Mesh, an AbstractMesh or a mapping from
    axis to size) names the axes; if None it is taken from the shardings of the arguments, then of the
    compiled program. `while_trips`: how often a loop is taken to run whose trip count the program does not say.

    `topology`: compile for a TPU slice by name, "v5e:4x4", which need not be there: libtpu must (`pip install 'jaxplan[tpu]'`).
    The function is a planned one, or takes its layouts from the NamedShardings of its arguments, which move to a mesh there.

    Raises TypeError for a function that was never jitted, or for `topology` that was lowered already; ValueError for a topology
    that does not exist or has another number of devices than the mesh.
    """
    if topology is not None:
        fn, args, kwargs, mesh = _moved(fn, args, kwargs, mesh, topology)
    if isinstance(fn, jax.stages.Compiled):
        compiled = fn
    elif isinstance(fn, jax.stages.Lowered):
        compiled = fn.compile()
    elif hasattr(fn, "lower"):
        compiled = fn.lower(*args, **kwargs).compile()
        if not hasattr(compiled, "input_shardings"):
            raise TypeError(
                f"audit reads one compiled program, and {getattr(fn, '__name__', fn)!r} runs as several, on sub-meshes: "
                "plan.audit() reads all of them; fn.lower(...).compile().stages[number].parts has each one's `program`"
            )
    else:
        raise TypeError(f"audit reads compiled programs, and {fn!r} is not jitted: pass jax.jit(fn) instead")
    if mesh is None:
        shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves((args, kwargs))]
        mesh = _mesh_of([*shardings, *jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))])
    split = [_split_by(sharding) for sharding in jax.tree.leaves(compiled.input_shardings)]
    text = _text(compiled)
    found = read_hlo(text, getattr(mesh, "shape", mesh), while_trips=while_trips, split=split)
    memory = compiled.memory_analysis()
    if memory is None:
        return replace(found, unread=(*found.unread, "memory_analysis: this backend has none"))
    arguments, outputs = int(memory.argument_size_in_bytes), int(memory.output_size_in_bytes)
    temporaries, aliased = int(memory.temp_size_in_bytes), int(memory.alias_size_in_bytes)
    if counts_gaps_twice(_devices_of((compiled.input_shardings, compiled.output_shardings))):
        temporaries = without_gaps_twice(temporaries, bytes_alive(text))
    peak = arguments + outputs - aliased + temporaries
    return replace(
        found,
        argument_bytes=arguments,
        output_bytes=outputs,
        temp_bytes=temporaries,
        alias_bytes=aliased,
        peak_bytes=peak,
    )


def _moved(fn: Any, args: Any, kwargs: Any, mesh: Any, topology: str) -> tuple[Any, Any, Any, Any]:
    """A function, its arguments and its mesh, for the devices of a topology."""
    if not hasattr(fn, "lower") or isinstance(fn, (jax.stages.Lowered, jax.stages.Compiled)):
        raise TypeError(f"to compile for {topology}, audit needs the jitted or planned function itself, got {type(fn).__name__}")
    leaves, tree = jax.tree.flatten((args, kwargs))
    if mesh is None:
        mesh = fn.mesh if hasattr(fn, "on") else _mesh_of([getattr(leaf, "sharding", None) for leaf in leaves])
    if mesh is None:
        raise ValueError(
            f"to compile for {topology}, audit needs to know the mesh: give jaxplan's planned function, or arguments as "
            "jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))"
        )
    target = topology_mesh(topology, dict(getattr(mesh, "shape", mesh)))
    if hasattr(fn, "on"):
        return fn.on(target), args, kwargs, target
    args, kwargs = jax.tree.unflatten(tree, [_moved_leaf(leaf, target) for leaf in leaves])
    return fn, args, kwargs, target


def _moved_leaf(leaf: Any, mesh: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    spec = sharding.spec if isinstance(sharding, jax.sharding.NamedSharding) else jax.sharding.PartitionSpec()
    found = jax.typeof(leaf) if not isinstance(leaf, jax.ShapeDtypeStruct) else leaf
    return jax.ShapeDtypeStruct(found.shape, found.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))


def _split_by(sharding: Any) -> frozenset[str] | None:
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in sharding.spec]
    return frozenset(axis for entry in entries for axis in entry if isinstance(axis, str))


def _devices_of(shardings: Any) -> set[Any]:
    return set().union(*[getattr(sharding, "device_set", ()) for sharding in jax.tree.leaves(shardings)])


def _mesh_of(shardings: list[Any]) -> Any:
    meshes = [s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)]
    return max(meshes, key=lambda mesh: mesh.size, default=None)


def _text(compiled: jax.stages.Compiled) -> str:
    """The program's text; where possible with the tables of shard offsets that `as_text` elides."""
    text = compiled.as_text() or ""
    elided = re.findall(r"= (\S+) constant\(\{\.\.\.\}\)", text)
    if not elided or sum(map(type_bytes, elided)) > 1 << 22:
        return text
    try:
        (module,) = compiled.runtime_executable().hlo_modules()  # type: ignore[union-attr]
        options = sys.modules[type(module).__module__].HloPrintOptions()
        options.print_large_constants = True
        return str(module.to_string(options))
    except (
        AttributeError,
        TypeError,
        ValueError,
        RuntimeError,
    ):
        return text
