"""The command `calibrate`."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from jaxplan.cli.arguments import mesh_shape, positive
from jaxplan.cli.output import Trouble, emit, emit_json, progress


def options(parser: argparse.ArgumentParser) -> None:
    """Options of `jaxplan calibrate`."""
    parser.add_argument("--mesh", type=mesh_shape, help="the axes whose links are measured (default: all devices along x)")
    parser.add_argument("--simulated", type=positive, metavar="N", help="measure so many simulated CPU devices")
    parser.add_argument("--name", help="save it among your own machines, for --machine NAME")
    parser.add_argument("-o", "--output", metavar="FILE", help="save it to a machine file, for --machine FILE")
    parser.add_argument("--json", action="store_true", help="print the machine and how well it fits as JSON")


def calibrate(arguments: argparse.Namespace) -> int:
    """Measure this machine's devices, their memory and links, with a handful of micro-benchmarks; run nothing else meanwhile."""
    from jaxplan.cli.functions import simulate
    from jaxplan.machine import machine_json, named, save_machine

    path = _target(arguments, named)
    if arguments.simulated:
        simulate(arguments.simulated)
    mesh = _mesh(arguments)
    with progress("measuring"):
        from jaxplan.measure import calibrate as measured

        found = measured(mesh, arguments.name or "measured")
    if path is not None:
        try:
            save_machine(found.machine, path)
        except OSError as error:
            raise Trouble(f"{path} cannot be written: {error.strerror or error}; nothing was changed") from None
        print(f"wrote {path}", file=sys.stderr)
    if arguments.json:
        quantities = list(dict.fromkeys(sample.quantity for sample in found.samples))
        off = {quantity: found.residuals(quantity) for quantity in quantities}
        emit_json({"machine": machine_json(found.machine), "off_by_factor": off, "elapsed_seconds": found.elapsed})
    else:
        emit(str(found))
    return 0


def _target(arguments: argparse.Namespace, named: Any) -> Path | None:
    """Where to save it; checked before anything is measured."""
    if arguments.output is not None:
        if not arguments.output.endswith(".json"):
            raise Trouble(f"{arguments.output!r}: the name of a machine file ends in .json, so that --machine can tell it")
        return Path(arguments.output)
    try:
        return named(arguments.name) if arguments.name is not None else None
    except ValueError as error:
        raise Trouble(str(error)) from None


def _mesh(arguments: argparse.Namespace) -> Any:
    import jax

    devices = jax.devices()[: arguments.simulated]
    shape = arguments.mesh or {"x": len(devices)}
    size = math.prod(shape.values())
    if size > len(devices):
        raise Trouble(f"a mesh of {size} devices is asked for, and there are {len(devices)}; --simulated {size} simulates them")
    return jax.make_mesh(tuple(shape.values()), tuple(shape), devices=devices[:size])
