"""A `SavedPlan` as the JSON value that a plan file holds, and back. The value that comes back has been validated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxplan.files.fold import fold_paths, fold_sequence, sequence_length, unfold_paths, unfold_sequence
from jaxplan.files.nouns import (
    VERSION,
    Asked,
    Axis,
    Cost,
    Entries,
    Leaf,
    Ledger,
    Live,
    PlanFileError,
    Primitives,
    Program,
    SavedChain,
    SavedExchange,
    SavedPipeline,
    SavedPlan,
    SavedStage,
    SavedStages,
    Split,
)
from jaxplan.machine import Link, Machine

MOST_CLUSTERS = 10_000_000
"""More clusters of operators than any program has."""


def to_json(saved: SavedPlan) -> dict[str, Any]:
    """What the file says, in its order."""
    asked, cost = saved.asked, saved.cost
    return {
        "format": "jaxplan plan",
        "version": VERSION,
        "versions": dict(saved.versions),
        "function": saved.function,
        "mesh": [
            {"axis": a.name, "size": a.size, "type": a.kind, "roles": list(a.roles), "sent_bytes": _number(a.sent_bytes)}
            for a in saved.mesh
        ],
        **({"axis_order": list(saved.axis_order)} if saved.axis_order else {}),
        "machine": _machine_json(saved.machine),
        "asked": {
            "search": asked.search,
            "memory_budget": asked.memory_budget,
            "pins": {path: _spec_json(spec) for path, spec in asked.pins.items()},
            "while_trips": _number(asked.while_trips),
            "certify": asked.certify,
            "dims": dict(asked.dims),
            **({} if asked.pipeline == "auto" else {"pipeline": asked.pipeline}),
            **({} if asked.microbatches is None else {"microbatches": asked.microbatches}),
        },
        "program": {
            "fingerprint": saved.program.fingerprint,
            "primitives": {name: [p.count, p.digest] for name, p in saved.program.primitives.items()},
        },
        "unknown": list(saved.unknown),
        "inputs": _leaves_json(saved.inputs),
        "outputs": _leaves_json(saved.outputs),
        "cost": {name: value if value is None else _number(value) for name, value in vars(cost).items()},
        "memory": _ledger_json(saved.memory),
        "exchanges": [_exchange_json(exchange) for exchange in saved.exchanges],
        "choices": _splits_json(saved.splits),
        **({"pipeline": _pipeline_json(saved.pipeline)} if saved.pipeline else {}),
        **({"stages": _stages_json(saved.stages)} if saved.stages else {}),
    }  # fmt: skip


def from_json(value: Mapping[str, Any]) -> SavedPlan:
    """The plan of a validated value. Raises PlanFileError where its parts do not fit one another."""
    asked, cost = value["asked"], value["cost"]
    mesh = tuple(Axis(a["axis"], a["size"], a["type"], tuple(a["roles"]), a["sent_bytes"]) for a in value["mesh"])
    names = [axis.name for axis in mesh]
    if len(set(names)) < len(names):
        raise PlanFileError(f"mesh: the axes {names} are not all different")
    axis_order = tuple(value.get("axis_order", ()))
    if axis_order and sorted(axis_order) != sorted(names):
        raise PlanFileError(f"axis_order: {list(axis_order)} are not the axes of the mesh, {names}")
    leaves = {
        where: {path: _leaf(where, path, leaf, names) for path, leaf in value[where].items()} for where in ("inputs", "outputs")
    }
    pins = {path: _spec(f"asked.pins[{path!r}]", spec, names) for path, spec in asked["pins"].items()}
    program = value["program"]
    primitives = {name: Primitives(count, digest) for name, (count, digest) in program["primitives"].items()}
    return SavedPlan(
        value["function"], value["versions"], mesh, _machine(value["machine"]),
        Asked(
            asked["search"], asked["memory_budget"], pins, asked["while_trips"], asked["certify"], asked["dims"],
            asked.get("pipeline", "auto"), asked.get("microbatches"),
        ),
        Program(program["fingerprint"], primitives), tuple(value["unknown"]),
        unfold_paths(leaves["inputs"]), unfold_paths(leaves["outputs"]), Cost(**cost), _ledger(value["memory"]),
        tuple(_exchange(exchange, number, names) for number, exchange in enumerate(value["exchanges"])),
        _splits(value["choices"], names), _pipeline(value["pipeline"], names) if "pipeline" in value else None,
        _stages(value["stages"], mesh) if "stages" in value else None, axis_order,
    )  # fmt: skip


def _number(value: float) -> int | float:
    """Whole numbers without a point."""
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else float(value)


def _spec_json(spec: Entries) -> list[Any]:
    return [list(entry) if isinstance(entry, tuple) else entry for entry in spec]


def _spec(where: str, spec: Sequence[Any], names: Sequence[str]) -> Entries:
    entries = tuple(tuple(entry) if isinstance(entry, list) else entry for entry in spec)
    used = [name for entry in entries for name in (entry if isinstance(entry, tuple) else (entry,)) if name is not None]
    for name in used:
        if name not in names:
            raise PlanFileError(f"{where}: {name!r} is no axis of the mesh {tuple(names)}")
        if used.count(name) > 1:
            raise PlanFileError(f"{where}: the axis {name!r} is used twice")
    return entries


def _leaves_json(leaves: Mapping[str, Leaf]) -> dict[str, Any]:
    return {
        path: {
            "dtype": leaf.dtype, "shape": list(leaf.shape), **({"dims": list(leaf.dims)} if leaf.dims else {}),
            "spec": _spec_json(leaf.spec), "bytes": _number(leaf.bytes), **({"donated": True} if leaf.donated else {}),
            **({} if leaf.stage is None else {"stage": leaf.stage}),
        }
        for path, leaf in fold_paths(leaves).items()
    }  # fmt: skip


def _leaf(where: str, path: str, value: Mapping[str, Any], names: Sequence[str]) -> Leaf:
    where = f"{where}[{path!r}].spec"
    spec, shape, dims = _spec(where, value["spec"], names), tuple(value["shape"]), tuple(value.get("dims", ()))
    if len(spec) > len(shape):
        raise PlanFileError(f"{where}: {len(spec)} entries for {len(shape)} dimensions")
    return Leaf(value["dtype"], shape, spec, value["bytes"], dims, value.get("donated", False), value.get("stage"))


def _link_json(link: Link) -> dict[str, Any]:
    return {"seconds_per_byte": link.seconds_per_byte, "latency_seconds": link.latency_seconds, "source": link.source}


def _machine_json(machine: Machine) -> dict[str, Any]:
    """What the compiler of a machine rounds, pads, keeps on the chip and leaves lying is written where it does; so is what makes
    a torus."""
    dialect: dict[str, Any] = {}
    if machine.matmul_reads:
        dialect["matmul_reads"] = dict(machine.matmul_reads)
    if machine.tile is not None:
        dialect["tile"] = list(machine.tile)
    if machine.near_bytes:
        dialect["near_bytes"] = _number(machine.near_bytes)
    if machine.in_order:
        dialect["in_order"] = True
    if machine.sends_rounded is not None:
        dialect["sends_rounded"] = machine.sends_rounded
    if machine.torus > 1:
        dialect["torus"] = machine.torus
    return {
        "name": machine.name,
        "seconds_per_flop": dict(machine.seconds_per_flop),
        "seconds_per_byte": machine.seconds_per_byte,
        "memory_bytes": None if machine.memory_bytes == math.inf else _number(machine.memory_bytes),
        "inner": _link_json(machine.inner),
        "outer": _link_json(machine.outer),
        "node": machine.node,
        "axis_links": {axis: _link_json(link) for axis, link in machine.axis_links.items()},
        "materialises": machine.materialises,
        **dialect,
    }


def _machine(value: Mapping[str, Any]) -> Machine:
    links = {axis: Link(**link) for axis, link in value["axis_links"].items()}
    tile = tuple(value["tile"]) if value.get("tile") else None
    made = {"inner": Link(**value["inner"]), "outer": Link(**value["outer"]), "axis_links": links, "tile": tile}
    made["memory_bytes"] = math.inf if value["memory_bytes"] is None else value["memory_bytes"]
    try:
        return Machine(**{**value, **made})
    except ValueError as error:
        raise PlanFileError(str(error)) from None


def _ledger_json(ledger: Ledger) -> dict[str, Any]:
    totals = {name: _number(value) for name, value in vars(ledger).items() if name not in ("kinds", "live")}
    kinds = {kind: _number(value) for kind, value in ledger.kinds.items()}
    live = [{**vars(one), "shape": list(one.shape), "bytes": _number(one.bytes)} for one in ledger.live]
    return {**totals, "kinds": kinds, "live": live}


def _ledger(value: Mapping[str, Any]) -> Ledger:
    live = tuple(Live(**{**one, "shape": tuple(one["shape"])}) for one in value["live"])
    return Ledger(**{**value, "live": live})


def _exchange_json(exchange: SavedExchange) -> dict[str, Any]:
    return {
        "kind": exchange.kind, "axes": list(exchange.axes), "dtype": exchange.dtype, "shape": list(exchange.shape),
        "operator": exchange.operator, "source": exchange.source, "times": _number(exchange.times),
        "bytes": {axis: _number(sent) for axis, sent in exchange.bytes.items()}, "seconds": exchange.seconds,
    }  # fmt: skip


def _exchange(value: Mapping[str, Any], number: int, names: Sequence[str]) -> SavedExchange:
    for name in (*value["axes"], *value["bytes"]):
        if name not in names:
            raise PlanFileError(f"exchanges[{number}]: {name!r} is no axis of the mesh {tuple(names)}")
    return SavedExchange(
        value["kind"], tuple(value["axes"]), tuple(value["shape"]), value["dtype"], value["operator"], value["source"],
        value["times"], value["bytes"], value["seconds"],
    )  # fmt: skip


def _pipeline_json(pipeline: SavedPipeline) -> dict[str, Any]:
    chains = [{"path": list(chain.path), "layers": list(chain.layers)} for chain in pipeline.chains]
    return {**vars(pipeline), "chains": chains}


def _pipeline(value: Mapping[str, Any], names: Sequence[str]) -> SavedPipeline:
    if value["axis"] not in names:
        raise PlanFileError(f"pipeline.axis: {value['axis']!r} is no axis of the mesh {tuple(names)}")
    chains = tuple(SavedChain(tuple(chain["path"]), tuple(chain["layers"])) for chain in value["chains"])
    return SavedPipeline(value["axis"], value["microbatches"], value["schedule"], chains)


def _stages_json(stages: SavedStages) -> dict[str, Any]:
    programs = [{"fingerprint": one.fingerprint, "choices": _splits_json(one.splits)} for one in stages.programs]
    return {"axis": stages.axis, "microbatches": stages.microbatches, "cuts": list(stages.cuts), "programs": programs}


def _stages(value: Mapping[str, Any], mesh: Sequence[Axis]) -> SavedStages:
    sizes = {axis.name: axis.size for axis in mesh}
    if value["axis"] not in sizes:
        raise PlanFileError(f"stages.axis: {value['axis']!r} is no axis of the mesh {tuple(sizes)}")
    count = sizes[value["axis"]]
    if len(value["programs"]) != count or len(value["cuts"]) != count - 1:
        told = f"{len(value['programs'])} programs and {len(value['cuts'])} cuts"
        raise PlanFileError(f"stages: {told}, where the axis {value['axis']!r} has size {count}")
    programs = tuple([
        SavedStage(one["fingerprint"], _splits(one["choices"], list(sizes), f"stages.programs[{k}].choices"))
        for k, one in enumerate(value["programs"])
    ])  # fmt: skip
    return SavedStages(value["axis"], value["microbatches"], tuple(value["cuts"]), programs)


def _splits_json(splits: Sequence[Split]) -> dict[str, Any]:
    rows = {split: number for number, split in enumerate(dict.fromkeys(splits))}
    return {"rows": [_split_json(split) for split in rows], "order": fold_sequence([rows[split] for split in splits])}


def _split_json(split: Split) -> dict[str, Any]:
    parts = {"factors": dict(split.factors), "scatters": dict(split.scatters)}
    return {"operator": split.operator, **{name: part for name, part in parts.items() if part}}


def _splits(value: Mapping[str, Any], names: Sequence[str], where: str = "choices") -> tuple[Split, ...]:
    rows = []
    for number, row in enumerate(value["rows"]):
        factors, scatters = row.get("factors", {}), row.get("scatters", {})
        rows.append(Split(row["operator"], tuple(factors.items()), tuple(scatters.items())))
        wrong = [name for name in (*factors, *scatters) if name not in names]
        if wrong:
            raise PlanFileError(f"{where}.rows[{number}]: {wrong[0]!r} is no axis of the mesh {tuple(names)}")
    length = sequence_length(value["order"])
    if length > MOST_CLUSTERS:
        raise PlanFileError(f"{where}.order: {length:,} choices; at most {MOST_CLUSTERS:,} are read")
    order = unfold_sequence(value["order"])
    if order and max(order) >= len(rows):
        raise PlanFileError(f"{where}.order: {max(order)} numbers no row; there are {len(rows)} rows")
    return tuple(rows[number] for number in order)
