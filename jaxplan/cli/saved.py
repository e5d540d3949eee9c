"""Commands about saved plans: `show`, `diff`. No function is imported and nothing is traced, unless `show` is given one."""

from __future__ import annotations

import argparse

from jaxplan.cli.arguments import arguments_of, function_of, shape_options
from jaxplan.cli.functions import refused, write_page
from jaxplan.cli.output import Trouble, emit, emit_json, progress
from jaxplan.cli.reading import read


def show_options(parser: argparse.ArgumentParser) -> None:
    """Options of `jaxplan show`."""
    parser.add_argument("file", metavar="FILE", help="a plan that was saved")
    parser.add_argument("function", metavar="MODULE:FUNCTION", nargs="?", help="what it is a plan of: for all of --html's page")
    shape_options(parser)
    parser.add_argument("--html", metavar="OUT", help="write a page that draws the plan")
    parser.add_argument("--outputs", action="store_true", help="the outputs too")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--python", action="store_true", help="as a Python module of PartitionSpecs")
    form.add_argument("--json", action="store_true", help="as JSON")


def show(arguments: argparse.Namespace) -> int:
    """Print a saved plan, from its file alone; or draw it, in full where its function is named too."""
    from jaxplan.files import describe_saved, to_json, to_python

    saved = read(arguments.file)
    if arguments.html is not None:
        write_page(_drawn(arguments), arguments.html)
    elif arguments.function is not None:
        raise Trouble("a function is of use to `show` with --html only; without, leave it out")
    if arguments.json:
        emit_json(to_json(saved))
    elif arguments.python:
        emit(to_python(saved).rstrip("\n"))
    else:
        emit(describe_saved(saved, outputs=arguments.outputs))
    return 0


def _drawn(arguments: argparse.Namespace) -> str:
    """The page: from the file alone, or from the plan that it is of the function."""
    if arguments.function is None:
        from jaxplan.pages import page, picture_of_saved

        return page(picture_of_saved(read(arguments.file)))
    from jaxplan.loading import load_plan

    fn = function_of(arguments.function)
    with progress("drawing the plan"), refused():
        return load_plan(arguments.file, fn, *arguments_of(fn, arguments)).to_html()


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
