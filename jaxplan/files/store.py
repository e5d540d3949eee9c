"""Reading and writing plan files: bounded and never executed on the way in, all or nothing on the way out."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import stat
import textwrap
from typing import Any

from jaxplan.files.encode import from_json, to_json
from jaxplan.files.nouns import VERSION, PlanFileError, SavedPlan
from jaxplan.files.schema import validate

LARGEST = 32 * 2**20
"""Bytes of the largest file that is read. Plans take tens of KB; what is larger is none, and is not parsed."""
WIDTH = 160

StrPath = str | os.PathLike[str]


def read_plan(path: StrPath) -> SavedPlan:
    """The plan in a file. Raises PlanFileError if it is none, and OSError if there is no such file."""
    with open(path, "rb") as file:
        data = file.read(LARGEST + 1)
    try:
        return parse_plan(data)
    except PlanFileError as error:
        raise PlanFileError(f"{os.fspath(path)} cannot be read as a plan: {error}") from None


def parse_plan(data: bytes) -> SavedPlan:
    """The plan in the bytes of a file."""
    if len(data) > LARGEST:
        raise PlanFileError(f"it has more than {LARGEST // 2**20} MiB, which no plan takes; it was not parsed")
    try:
        parsed = json.loads(data, parse_constant=_no_constant, parse_float=_finite, parse_int=_exact, object_pairs_hook=_once)
    except RecursionError:
        raise PlanFileError("it is nested too deeply") from None
    except PlanFileError:
        raise
    except json.JSONDecodeError as error:
        rest = error.doc[error.pos :].rstrip()  # nothing, or the beginning of a word
        cut = "Unterminated" in error.msg or any(word.startswith(rest) for word in ("true", "false", "null", "-"))
        ended = " (is the file truncated?)" if cut else ""
        raise PlanFileError(f"it is not JSON: {error}{ended}") from None
    except ValueError as error:  # not UTF-8
        raise PlanFileError(f"it is not JSON: {str(error)[:200]}") from None
    _known_format(parsed)
    validate(parsed)
    return from_json(parsed)


def _known_format(parsed: Any) -> None:
    """Whether it is a plan at all, and of which version; before anything else is looked at."""
    if not isinstance(parsed, dict) or parsed.get("format") != "jaxplan plan":
        raise PlanFileError('it is JSON, but no plan: a plan is an object with "format": "jaxplan plan"')
    version = parsed.get("version")
    if isinstance(version, int) and version > VERSION:
        made = parsed.get("versions")
        by = f" (jaxplan {made.get('jaxplan')} wrote it)" if isinstance(made, dict) else ""
        raise PlanFileError(f"it is of version {version}{by}, and this jaxplan reads up to version {VERSION}: update jaxplan")


def _no_constant(name: str) -> float:
    raise PlanFileError(f"it is not JSON: {name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise PlanFileError(f"the number {text[:40]} is too large")
    return value


def _exact(text: str) -> int:
    """Whole numbers that are exact as floats too: no size or count is larger."""
    if len(text) > 17 or abs(int(text)) > 2**53:
        raise PlanFileError(f"the number {text[:40]} is too large")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise PlanFileError(f"the key {next(n for n in names if names.count(n) > 1)[:80]!r} is given twice in one object")
    return found


def write_plan(saved: SavedPlan, path: StrPath) -> None:
    """Write a plan; whoever reads the path finds the old file or the new one, whole. Raises OSError; the old file then stays."""
    write_text(render(to_json(saved)), path)


def write_text(text: str, path: StrPath) -> None:
    """Replace a file by a text: see `write_bytes`."""
    write_bytes(text.encode("utf-8"), path)


def write_bytes(content: bytes, path: StrPath) -> None:
    """Replace a file in one step: written beside it, flushed to the disk, renamed. Links are followed; the file's mode stays."""
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    beside = os.path.join(folder, f".{name[:100]}.{secrets.token_hex(6)}")
    try:
        with open(beside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            os.chmod(beside, stat.S_IMODE(os.stat(target).st_mode))
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    """The rename itself on the disk, where the system knows how to."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def render(value: Any) -> str:
    """JSON for people and for line-wise comparison: what fits in a line takes one, and objects keep their order."""
    return "\n".join(_lines(value, "", "")) + "\n"


def _lines(value: Any, indent: str, comma: str) -> list[str]:
    short = json.dumps(value, allow_nan=False)
    if not isinstance(value, (dict, list)) or not value or (indent and len(indent) + len(short) < WIDTH):
        return [indent + short + comma]
    if isinstance(value, list) and not any(isinstance(item, dict) for item in value):
        words = ", ".join(json.dumps(item, allow_nan=False).replace(" ", "\0") for item in value)
        filled = textwrap.wrap(words, WIDTH, initial_indent=indent + "  ", subsequent_indent=indent + "  ",
                               break_long_words=False, break_on_hyphens=False)  # fmt: skip
        return [indent + "[", *[line.replace("\0", " ") for line in filled], indent + "]" + comma]
    found = [indent + ("{" if isinstance(value, dict) else "[")]
    for number, key in enumerate(value):
        item, end = (value[key] if isinstance(value, dict) else key), "," if number + 1 < len(value) else ""
        lines = _lines(item, indent + "  ", end)
        if isinstance(value, dict):
            lines[0] = f"{indent}  {json.dumps(key)}: {lines[0].lstrip()}"
        found += lines
    return [*found, indent + ("}" if isinstance(value, dict) else "]") + comma]
