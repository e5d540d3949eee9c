"""The command `demo`."""

from __future__ import annotations

import argparse

from jaxplan.cli.arguments import mesh_shape, positive
from jaxplan.cli.output import Trouble


def options(parser: argparse.ArgumentParser) -> None:
    """Options of `jaxplan demo`."""
    parser.add_argument("--devices", type=positive, help="simulated devices (default: the mesh's, or 8)")
    parser.add_argument("--mesh", type=mesh_shape, help="such as data=4,model=2, the default")
    parser.add_argument("--steps", type=positive, default=5, help="training steps to compare (default: 5)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, and the page to stderr")


def demo(arguments: argparse.Namespace) -> int:
    """Plan, run and audit a small language model on simulated devices."""
    from jaxplan import demo as page

    try:
        mesh = page.demo_mesh(arguments.devices, arguments.mesh)
    except ValueError as error:
        raise Trouble(str(error)) from None
    return page.launch(mesh, arguments.steps, arguments.json)
