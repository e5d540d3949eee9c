"""Commands that plan one function many times: `best-mesh`."""

from __future__ import annotations

import argparse

from jaxplan.cli.arguments import arguments_of, function_of, names, positive, shape_options
from jaxplan.cli.functions import planning, planning_options, refused, save
from jaxplan.cli.output import emit, emit_json, progress


def best_mesh_options(parser: argparse.ArgumentParser) -> None:
    """Options of `jaxplan best-mesh`."""
    parser.add_argument("function", metavar="MODULE:FUNCTION", help="such as train:step")
    parser.add_argument("--devices", type=positive, required=True, metavar="N", help="how many devices the meshes have")
    parser.add_argument("--axes", type=names, default=["x", "y", "z"], help="names of up to so many axes (default: x,y,z)")
    shape_options(parser)
    planning_options(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="save the plan on the best mesh")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def best_mesh(arguments: argparse.Namespace) -> int:
    """Plan a function on every mesh of so many devices, from one trace, and rank them by modelled time."""
    fn = function_of(arguments.function)
    args = arguments_of(fn, arguments)
    with progress(f"planning on the meshes of {arguments.devices} devices"), refused():
        from jaxplan.whatif import best_mesh as ranked

        found = ranked(fn, *args, devices=arguments.devices, axis_names=arguments.axes, **planning(arguments))
        text = None if arguments.json else str(found)
    if arguments.output is not None:
        save(found.best, arguments.output)
    if text is None:
        emit_json(found.to_json())
    else:
        emit(text)
    return 0
