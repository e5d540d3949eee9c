"""Commands that plan one function many times: `best-mesh`, `sweep`."""

from __future__ import annotations

import argparse

from jaxplan.cli.arguments import (
    arguments_of,
    extents,
    function_of,
    mesh_shape,
    names,
    positive,
    positives,
    shape_options,
    speeds,
)
from jaxplan.cli.functions import planning, planning_options, refused, save, written
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


def sweep_options(parser: argparse.ArgumentParser) -> None:
    """Options of `jaxplan sweep`."""
    parser.add_argument("function", metavar="MODULE:FUNCTION", help="such as train:step")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--devices", type=positives, metavar="N,N", help="numbers of devices, each in all its meshes: 8,16,64")
    where.add_argument("--mesh", type=mesh_shape, action="append", help="a mesh, such as data=4,model=2; may be given again")
    parser.add_argument("--axes", type=names, default=["x", "y"], help="names of up to so many axes (default: x,y)")
    parser.add_argument("--link-speed", type=speeds, default=[1.0], metavar="X,X", help="times the machine's own, such as 1,0.1")
    parser.add_argument("--links", choices=("all", "inner", "outer"), default="all", help="of which links (default: all)")
    parser.add_argument(
        "--size", type=extents, action="append", default=[], metavar="NAME=N,N",
        help="extents of a dimension, by the name that plans print or --dims gives, such as B=256,512; may be given again",
    )  # fmt: skip
    shape_options(parser)
    planning_options(parser)
    parser.add_argument("--plot", metavar="FILE", help="draw it: time, efficiency and memory (.png, .svg or .pdf)")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def sweep(arguments: argparse.Namespace) -> int:
    """Plan a function for many numbers of devices, mesh shapes, link speeds and sizes, in one table. Status 1 if nothing fits."""
    fn = function_of(arguments.function)
    args = arguments_of(fn, arguments)
    with progress("sweeping"), refused():
        from jaxplan.whatif import sweep as swept

        found = swept(
            fn, *args, devices=arguments.devices, meshes=arguments.mesh, sizes=dict(arguments.size), links=arguments.links,
            link_speeds=arguments.link_speed, axis_names=arguments.axes, **planning(arguments),
        )  # fmt: skip
        text = None if arguments.json else str(found)
    if arguments.plot is not None:
        with refused():
            written(lambda: found.plot(arguments.plot), arguments.plot)
    if text is None:
        emit_json(found.to_json())
    else:
        emit(text)
    return 0 if any(point.candidate.fits for point in found.points) else 1
