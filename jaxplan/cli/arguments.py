"""What people write on a command line, as values. Each parser raises ArgumentTypeError that says what to write."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import inspect
import math
import os
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any

from jaxplan.cli.output import Trouble, progress

DTYPES = {
    "f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "c64": "complex64", "c128": "complex128",
    "i64": "int64", "i32": "int32", "i16": "int16", "i8": "int8", "s64": "int64", "s32": "int32", "s16": "int16", "s8": "int8",
    "u64": "uint64", "u32": "uint32", "u16": "uint16", "u8": "uint8", "pred": "bool", "bool": "bool",
}  # fmt: skip
_SPEC = re.compile(r"([A-Za-z][A-Za-z0-9_]*)\[([0-9,\s]*)\]\s*(?:,|$)\s*")


def mesh_shape(text: str) -> dict[str, int]:
    """{axis: size} of "data=4,model=2"."""
    shape: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, size = (word.strip() for word in part.partition("="))
        if not (axis.isidentifier() and equals and size.isdecimal() and len(size) < 10 and int(size) > 0):
            raise ArgumentTypeError(f"{part.strip()!r} is not AXIS=SIZE; write data=4,model=2")
        if axis in shape:
            raise ArgumentTypeError(f"axis {axis!r} is given twice")
        shape[axis] = int(size)
    return shape


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def positives(text: str) -> list[int]:
    """[8, 16] of "8,16"."""
    return [positive(part.strip()) for part in text.split(",")]


def speeds(text: str) -> list[float]:
    """[1.0, 0.1] of "1,0.1"."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(0 < speed < math.inf for speed in found):
        raise ArgumentTypeError(f"{text!r} is no list of positive numbers; write 1,0.1")
    return found


def extents(text: str) -> tuple[str, list[int]]:
    """("B", [256, 512]) of "B=256,512"."""
    name, equals, sizes = (part.strip() for part in text.partition("="))
    if not (name and equals):
        raise ArgumentTypeError(f"{text!r} is not NAME=SIZES; write B=256,512")
    return name, positives(sizes)


def dimensions(text: str) -> tuple[str, str]:
    """("batch/x", "B F") of "batch/x=B F"."""
    path, equals, named = text.rpartition("=")
    if not (path and equals and named.split()):
        raise ArgumentTypeError(f"{text!r} is not PATH=NAMES; write 'x=B F'")
    return path, named


def percent(text: str) -> float:
    """0.02 of "2%" (or of "0.02")."""
    number, scale = (text.strip()[:-1], 100.0) if text.strip().endswith("%") else (text, 1.0)
    try:
        value = float(number) / scale
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ArgumentTypeError(f"{text!r} is not a share; write 2% (or 0.02)")
    return value


def array_specs(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(("float32", (8, 128)), ...) of "f32[8,128],bf16[128]"; "f32[]" is a scalar."""
    found, place = [], 0
    text = text.strip()
    while place < len(text):
        match = _SPEC.match(text, place)
        if match is None:
            raise ArgumentTypeError(f"{text[place:]!r} is not DTYPE[SIZES]; write f32[8,128],i32[8]")
        name, sizes = DTYPES.get(match[1], match[1]), [size.strip() for size in match[2].split(",") if size.strip()]
        if name not in DTYPES.values():
            raise ArgumentTypeError(
                f"no dtype is called {match[1]!r}; there are {', '.join(DTYPES)}, and full names such as float32"
            )
        if not all(size.isdecimal() and len(size) < 16 for size in sizes):
            raise ArgumentTypeError(f"{match[0].strip()!r} has sizes that are no whole numbers")
        found.append((name, tuple(map(int, sizes))))
        place = match.end()
    if not found or text.endswith(","):
        raise ArgumentTypeError(f"{text!r} lists no arrays, or ends in a comma; write f32[8,128],i32[8]")
    return tuple(found)


def spec_entries(text: str) -> tuple[Any, ...]:
    """(None, ("data", "model")) of "-,data+model" or of "P(None, ('data', 'model'))": per dimension an axis, several, or none."""
    written = re.fullmatch(r"\s*(?:P|PartitionSpec)\((.*)\)\s*", text)
    if written is not None:
        try:
            entries = ast.literal_eval(f"({written[1]},)") if written[1].strip() else ()
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            entries = (0,)
        words = [word for entry in entries for word in (entry if isinstance(entry, tuple) else () if entry is None else (entry,))]
        if not all(isinstance(word, str) and word for word in words):
            raise ArgumentTypeError(f"{text!r} is no PartitionSpec; write P(None, 'model')")
        return entries
    split = [[word.strip() for word in entry.split("+")] for entry in text.split(",")] if text.strip() else []
    split = [["-"] if entry == ["None"] else entry for entry in split]
    if not all(entry == ["-"] or all(word.isidentifier() for word in entry) for entry in split):
        raise ArgumentTypeError(f"{text!r} is no layout; write -,model for P(None, 'model')")
    return tuple(None if entry == ["-"] else entry[0] if len(entry) == 1 else tuple(entry) for entry in split)


def pin(text: str) -> tuple[str, tuple[Any, ...]]:
    """("params/wq", (None, ("data", "model"))) of "params/wq=-,data+model"."""
    path, equals, spec = text.rpartition("=")
    try:
        if path and equals:
            return path, spec_entries(spec)
    except ArgumentTypeError:
        pass
    raise ArgumentTypeError(f"{text!r} is not PATH=SPEC; write params/wq=-,model for P(None, 'model')")


def names(text: str) -> list[str]:
    """["w", "state"] of "w,state"."""
    found = [word.strip() for word in text.split(",")]
    if not all(word.isidentifier() for word in found):
        raise ArgumentTypeError(f"{text!r} is no list of argument names; write w,state")
    return found


def shape_options(parser: argparse.ArgumentParser) -> None:
    """--shapes and --spec: what the function is called with."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--shapes", metavar="MODULE:NAME",
        help="the arguments: a tuple of them (jax.ShapeDtypeStructs or arrays, in any pytree), one argument, or a function of "
        "nothing that gives either",
    )  # fmt: skip
    group.add_argument(
        "--spec", type=array_specs, metavar="ARRAYS", help='the arguments, if they are arrays: "f32[8,128],i32[8]"'
    )


def imported(text: str) -> Any:
    """The object that MODULE:NAME names, modules of the current folder included. Raises Trouble, with the user's error if any."""
    module_name, colon, name = text.partition(":")
    is_file = module_name.endswith(".py") or os.sep in module_name
    if is_file or not (colon and all(part.isidentifier() for part in f"{module_name}.{name}".split("."))):
        written = module_name.removesuffix(".py").removeprefix("." + os.sep).replace(os.sep, ".")
        hint = f"; write {written}:{name or 'step'}" if is_file else ""
        raise Trouble(f"{text!r} is not MODULE:NAME, such as train:step{hint}")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        with progress(f"importing {module_name}"):
            found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise Trouble(f"there is no module {error.name!r} here ({folder}) or among the installed packages") from None
        raise Trouble(f"{module_name!r} does not import: {error}", cause=error) from None
    except (Exception, SystemExit) as error:
        raise Trouble(f"{module_name!r} does not import: {type(error).__name__}: {error}", cause=error) from None
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, [n for n in dir(found) if not n.startswith("_")], 3, 0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise Trouble(f"{module_name!r} has no {name!r}{hint}")
        found = getattr(found, part)
    return found


def function_of(text: str) -> Callable[..., Any]:
    """The function that MODULE:NAME names; of one under `auto_shard`, the function itself."""
    from jaxplan.auto import AutoSharded

    found = imported(text)
    if not callable(found):
        raise Trouble(f"{text!r} is no function, but {type(found).__name__}")
    return inspect.unwrap(found, stop=lambda f: not isinstance(f, AutoSharded)) if isinstance(found, AutoSharded) else found


def arguments_of(fn: Callable[..., Any], given: argparse.Namespace) -> tuple[Any, ...]:
    """The abstract arguments to plan for, from --shapes or --spec. Raises Trouble where the function cannot take them."""
    import jax

    args: tuple[Any, ...] = ()
    if given.shapes is not None:
        value = imported(given.shapes)
        if callable(value):
            try:
                value = value()
            except Exception as error:
                raise Trouble(f"{given.shapes!r} fails: {type(error).__name__}: {error}", cause=error) from None
        args = value if isinstance(value, tuple) and not hasattr(value, "_fields") else (value,)
    elif given.spec is not None:
        args = tuple(jax.ShapeDtypeStruct(shape, dtype) for dtype, shape in given.spec)
    try:
        inspect.signature(fn).bind(*args)
    except TypeError as error:
        told = "" if args else '; give its arguments by --shapes MODULE:NAME or --spec "f32[8,128],..."'
        raise Trouble(f"{getattr(fn, '__name__', fn)!s} cannot be called with {len(args)} arguments: {error}{told}") from None
    except ValueError:  # no signature to be had
        pass
    return args
