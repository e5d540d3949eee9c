"""Commands about saved plans alone: `show`, `diff`. No function is imported and nothing is traced."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from jaxplan.cli.output import Trouble, emit, emit_json

if TYPE_CHECKING:
    from jaxplan.files import SavedPlan


def read(path: str) -> SavedPlan:
    """A saved plan. Raises Trouble that says why it cannot be read."""
    from jaxplan.files import PlanFileError, read_plan

    try:
        return read_plan(path)
    except PlanFileError as error:
        raise Trouble(str(error)) from None
    except OSError as error:
        raise Trouble(f"{path} cannot be read: {error.strerror or error}") from None


def show_options(parser: argparse.ArgumentParser) -> None:
    """Options of `jaxplan show`."""
    parser.add_argument("file", metavar="FILE", help="a plan that was saved")
    parser.add_argument("--outputs", action="store_true", help="the outputs too")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--python", action="store_true", help="as a Python module of PartitionSpecs")
    form.add_argument("--json", action="store_true", help="as JSON")


def show(arguments: argparse.Namespace) -> int:
    """Print a saved plan, from its file alone."""
    from jaxplan.files import describe_saved, to_json, to_python

    saved = read(arguments.file)
    if arguments.json:
        emit_json(to_json(saved))
    elif arguments.python:
        emit(to_python(saved).rstrip("\n"))
    else:
        emit(describe_saved(saved, outputs=arguments.outputs))
    return 0


def diff_options(parser: argparse.ArgumentParser) -> None:
    """Options of `jaxplan diff`."""
    parser.add_argument("old", metavar="OLD", help="a plan that was saved")
    parser.add_argument("new", metavar="NEW", help="another one")
    parser.add_argument("--json", action="store_true", help="as JSON")


def diff(arguments: argparse.Namespace) -> int:
    """What differs between two saved plans, from their files alone: specs, cost, memory, exchanges. Status 1 if anything does."""
    from jaxplan.files import Comparison

    comparison = Comparison(read(arguments.old), read(arguments.new))
    if arguments.json:
        emit_json(comparison.to_json())
    else:
        emit(str(comparison))
    return 1 if comparison else 0
