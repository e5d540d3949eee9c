"""The JSON Schema of a plan file, and a validator of just the keywords that it uses: strict, its errors name the place."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from jaxplan.files.nouns import PlanFileError

_TYPES: Mapping[str, tuple[type, ...]] = {
    "boolean": (bool,), "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float),
    "null": (type(None),),
}  # fmt: skip
_NOTES = ("$schema", "title", "description", "$defs")


@functools.cache
def plan_schema() -> dict[str, Any]:
    """The JSON Schema of a plan file, as the package carries it."""
    return json.loads(resources.files("jaxplan.files").joinpath("plan.schema.json").read_text(encoding="utf-8"))


def validate(value: Any, schema: Mapping[str, Any] | None = None) -> None:
    """Check a parsed plan file (or any value, against another schema). Raises PlanFileError: where, what was expected, what is
    there."""
    root = plan_schema() if schema is None else schema
    _check(value, root, "", root)


def _check(value: Any, schema: Mapping[str, Any], where: str, root: Mapping[str, Any]) -> None:
    if "$ref" in schema:
        schema = {**root["$defs"][schema["$ref"].removeprefix("#/$defs/")], **{k: v for k, v in schema.items() if k != "$ref"}}
    for keyword, wanted in schema.items():
        if keyword not in _NOTES:
            _KEYWORDS[keyword](value, wanted, where, root, schema)


def _fail(where: str, expected: str, value: Any) -> None:
    shown = json.dumps(value) if isinstance(value, (str, int, float, type(None))) else f"a list of {len(value)}"
    shown = f"an object of {len(value)}" if isinstance(value, dict) else shown
    raise PlanFileError(f"{where or 'the file'}: expected {expected}, found {shown[:80]}")


def _is(value: Any, name: str) -> bool:
    return isinstance(value, _TYPES[name]) and isinstance(value, bool) == (name == "boolean")


def _type(value: Any, wanted: Any, where: str, root: Any, schema: Any) -> None:
    names = [wanted] if isinstance(wanted, str) else wanted
    if not any(_is(value, name) for name in names):
        _fail(where, " or ".join(names), value)


def _enum(value: Any, wanted: Any, where: str, root: Any, schema: Any) -> None:
    if value not in wanted:
        _fail(where, " or ".join(map(json.dumps, wanted)), value)


def _const(value: Any, wanted: Any, where: str, root: Any, schema: Any) -> None:
    _enum(value, [wanted], where, root, schema)


def _least(value: Any, wanted: Any, where: str, root: Any, schema: Any) -> None:
    if _is(value, "number") and value < wanted:
        _fail(where, f"at least {wanted}", value)


def _above(value: Any, wanted: Any, where: str, root: Any, schema: Any) -> None:
    if _is(value, "number") and value <= wanted:
        _fail(where, f"more than {wanted}", value)


def _shortest(value: Any, wanted: Any, where: str, root: Any, schema: Any) -> None:
    if isinstance(value, (str, list)) and len(value) < wanted:
        _fail(where, f"a length of at least {wanted}", value)


def _longest(value: Any, wanted: Any, where: str, root: Any, schema: Any) -> None:
    if isinstance(value, list) and len(value) > wanted:
        _fail(where, f"a length of at most {wanted}", value)


def _pattern(value: Any, wanted: Any, where: str, root: Any, schema: Any) -> None:
    if isinstance(value, str) and not re.search(wanted, value):
        _fail(where, f"text that matches {wanted}", value)


def _required(value: Any, wanted: Any, where: str, root: Any, schema: Any) -> None:
    missing = [name for name in wanted if isinstance(value, dict) and name not in value]
    if missing:
        raise PlanFileError(f"{where or 'the file'}: {', '.join(missing)} missing")


def _properties(value: Any, wanted: Any, where: str, root: Any, schema: Any) -> None:
    for name in wanted if isinstance(value, dict) else ():
        if name in value:
            _check(value[name], wanted[name], f"{where}.{name}" if where else name, root)


def _additional(value: Any, wanted: Any, where: str, root: Any, schema: Any) -> None:
    for name in value if isinstance(value, dict) else ():
        if name not in schema.get("properties", ()):
            if wanted is False:
                raise PlanFileError(f"{where or 'the file'}: {name[:80]!r} is not known here")
            _check(value[name], wanted, f"{where}[{name[:80]!r}]", root)


def _items(value: Any, wanted: Any, where: str, root: Any, schema: Any) -> None:
    for number, item in enumerate(value if isinstance(value, list) else ()):
        _check(item, wanted, f"{where}[{number}]", root)


def _prefix(value: Any, wanted: Any, where: str, root: Any, schema: Any) -> None:
    for number, (item, part) in enumerate(zip(value if isinstance(value, list) else (), wanted, strict=False)):
        _check(item, part, f"{where}[{number}]", root)


def _any(value: Any, wanted: Any, where: str, root: Any, schema: Any) -> None:
    problems = []
    for option in wanted:
        try:
            return _check(value, option, where, root)
        except PlanFileError as error:
            problems.append(str(error))
    raise PlanFileError("; or ".join(problems))


_KEYWORDS: dict[str, Callable[[Any, Any, str, Any, Any], None]] = {
    "type": _type, "enum": _enum, "const": _const, "minimum": _least, "exclusiveMinimum": _above, "minLength": _shortest,
    "minItems": _shortest, "maxItems": _longest, "pattern": _pattern, "required": _required, "properties": _properties,
    "additionalProperties": _additional, "items": _items, "prefixItems": _prefix, "anyOf": _any,
}  # fmt: skip
"""Every keyword that `plan.schema.json` may use; another one is a KeyError, so that none is ever skipped in silence."""
