"""The command `export`: a saved plan in another library's words."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from jaxplan.cli.arguments import arguments_of, function_of, shape_options
from jaxplan.cli.functions import refused
from jaxplan.cli.output import Trouble, emit, emit_json, progress
from jaxplan.cli.saved import read

if TYPE_CHECKING:
    from jaxplan.export import Written

FORMATS = ("flax", "maxtext", "haliax", "explicit")
"""Formats that are files; tests/test_export_cli.py holds them against the room's own table."""


def options(parser: argparse.ArgumentParser) -> None:
    """Options of `jaxplan export`."""
    parser.add_argument("file", metavar="FILE", help="a plan that was saved")
    parser.add_argument("format", metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument(
        "function", metavar="MODULE:FUNCTION", nargs="?",
        help="for explicit, whose calls stand in the function's own lines: the function that was planned, such as train:step",
    )  # fmt: skip
    shape_options(parser)
    parser.add_argument("--of", metavar="PATH", help="a part of the arguments, such as params (default: all)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("-o", "--output", metavar="FILE", help="write to a file")
    form.add_argument("--json", action="store_true", help="print as JSON")


def export(arguments: argparse.Namespace) -> int:
    """Print or write a saved plan in another library's words. Status 1 if the format has no words for it."""
    from jaxplan.export import ExportError, write_export
    from jaxplan.files import write_text

    saved = read(arguments.file)
    try:
        explicit = arguments.format == "explicit"
        written = _explicit(arguments) if explicit else write_export(saved, arguments.format, arguments.of)
    except ExportError as error:
        raise Trouble(str(error), 1) from None
    if arguments.json:
        emit_json(dict(written.data))
    elif arguments.output is None:
        emit(written.text.rstrip("\n"))
    else:
        try:
            write_text(written.text, arguments.output)
        except OSError as error:
            raise Trouble(f"{arguments.output} cannot be written: {error.strerror or error}; nothing was changed") from None
        print(f"wrote {arguments.output} ({os.path.getsize(arguments.output):,} bytes)", file=sys.stderr)
    return 0


def _explicit(arguments: argparse.Namespace) -> Written:
    from jaxplan.export import write_explicit
    from jaxplan.loading import load_plan

    if arguments.function is None:
        raise Trouble("explicit needs the function that was planned: jaxplan export plan.json explicit train:step --spec ...")
    fn = function_of(arguments.function)
    args = arguments_of(fn, arguments)
    with progress(f"loading {arguments.file}"), refused():
        return write_explicit(load_plan(arguments.file, fn, *args).export("explicit"))
