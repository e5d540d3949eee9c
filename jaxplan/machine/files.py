"""Machines as files: small JSON, written atomically, read strictly."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxplan.machine.nouns import Link, Machine

FORMAT = "jaxplan machine"
VERSION = 1
LARGEST = 1 << 20
"""Bytes of a machine file that is read."""


def folder() -> Path:
    """Where machines are looked up by name: $JAXPLAN_HOME, else the user's configuration folder; machines/NAME.json below it."""
    own = os.environ.get("JAXPLAN_HOME")
    base = Path(own) if own else Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "jaxplan"
    return base / "machines"


def named(name: str) -> Path:
    """The file of a machine of the user's own. ValueError for a name that is no plain word."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"{name!r} is no name for a machine: use letters, digits, '.', '_' and '-'")
    return folder() / f"{name}.json"


def save_machine(machine: Machine, path: str | Path) -> Path:
    """Write a machine; a file that was there is replaced at once or not at all. Gives the path. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(machine_json(machine), indent=1) + "\n"
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return path


def load_machine(path: str | Path) -> Machine:
    """Read a machine. ValueError, naming file and field, for anything else than what `save_machine` writes."""
    path = Path(path)
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path}: a machine file has at most {LARGEST} bytes, this one {path.stat().st_size}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path}: not a machine file: 'format' should be {FORMAT!r}")
    if found.get("version") != VERSION:
        raise ValueError(f"{path}: version {found.get('version')!r}; this jaxplan reads version {VERSION}")
    reader = _Reader(str(path))
    try:
        return Machine(
            reader.of(found, "name", str),
            {k: reader.number(v, f"seconds_per_flop.{k}") for k, v in reader.of(found, "seconds_per_flop", dict).items()},
            reader.number(found.get("seconds_per_byte"), "seconds_per_byte"),
            math.inf if found.get("memory_bytes", 0) is None else reader.number(found.get("memory_bytes"), "memory_bytes"),
            reader.link(found.get("inner"), "inner"),
            reader.link(found.get("outer"), "outer"),
            reader.of(found, "node", int),
            {k: reader.link(v, f"axis_links.{k}") for k, v in reader.of(found, "axis_links", dict).items()},
            found.get("materialises") is True,
            {k: reader.word(v, f"matmul_reads.{k}") for k, v in reader.of(found, "matmul_reads", dict, {}).items()},
            reader.tile(found.get("tile")),
            reader.number(found.get("near_bytes", 0.0), "near_bytes"),
            found.get("in_order") is True,
            reader.flag(found.get("sends_rounded"), "sends_rounded"),
            reader.of(found, "torus", int, 1),
        )
    except ValueError as error:
        raise error if str(error).startswith(str(path)) else ValueError(f"{path}: {error}") from error


def machine_json(machine: Machine) -> dict[str, Any]:
    """What a machine file holds."""

    def link(one: Link) -> dict[str, Any]:
        return {"seconds_per_byte": one.seconds_per_byte, "latency_seconds": one.latency_seconds, "source": one.source}

    return {
        "format": FORMAT,
        "version": VERSION,
        "name": machine.name,
        "seconds_per_flop": dict(machine.seconds_per_flop),
        "seconds_per_byte": machine.seconds_per_byte,
        "memory_bytes": None if machine.memory_bytes == math.inf else machine.memory_bytes,
        "inner": link(machine.inner),
        "outer": link(machine.outer),
        "node": machine.node,
        "materialises": machine.materialises,
        "matmul_reads": dict(machine.matmul_reads),
        "tile": machine.tile and list(machine.tile),
        "near_bytes": machine.near_bytes,
        "in_order": machine.in_order,
        "sends_rounded": machine.sends_rounded,
        "torus": machine.torus,
        "axis_links": {axis: link(one) for axis, one in machine.axis_links.items()},
    }


class _Reader:
    """Fields of one file, each of its kind."""

    def __init__(self, path: str) -> None:
        self.path = path

    def of(self, found: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
        value = found.get(name, default)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{self.path}: {name!r} should be of type {kind.__name__}, found {value!r:.60}")
        return value

    def number(self, value: Any, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{self.path}: {name!r} should be a number, found {value!r:.60}")
        return float(value)

    def word(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{self.path}: {name!r} should be a word, found {value!r:.60}")
        return value

    def flag(self, value: Any, name: str) -> bool | None:
        if value not in (None, True, False):
            raise ValueError(f"{self.path}: {name!r} should be true, false or null, found {value!r:.60}")
        return value

    def tile(self, value: Any) -> tuple[int, int] | None:
        if value is None:
            return None
        if not (isinstance(value, list) and len(value) == 2 and all(type(extent) is int for extent in value)):
            raise ValueError(f"{self.path}: 'tile' should be two counts or null, found {value!r:.60}")
        return value[0], value[1]

    def link(self, value: Any, name: str) -> Link:
        if not isinstance(value, dict):
            raise ValueError(f"{self.path}: {name!r} should be an object, found {value!r:.60}")
        return Link(
            self.number(value.get("seconds_per_byte"), f"{name}.seconds_per_byte"),
            self.number(value.get("latency_seconds"), f"{name}.latency_seconds"),
            str(value.get("source", "")),
        )
