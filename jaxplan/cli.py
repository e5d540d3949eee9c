"""The command line: `jaxplan COMMAND ...`, one function per command in one small table.

Exit status: 0 for success, 1 if what was asked about does not hold, 2 if the command line is not understood.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxplan import __version__

__all__ = ["main"]


@dataclass(frozen=True)
class Command:
    """One command. `options` declares its arguments; `run` carries it out and gives the exit status."""

    help: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def mesh_shape(text: str) -> dict[str, int]:
    """{axis: size} of "data=4,model=2". Raises ArgumentTypeError for anything else."""
    shape: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, size = (word.strip() for word in part.partition("="))
        if not (axis.isidentifier() and equals and size.isdecimal() and int(size) > 0):
            raise argparse.ArgumentTypeError(f"{part.strip()!r} is not AXIS=SIZE; write data=4,model=2")
        if axis in shape:
            raise argparse.ArgumentTypeError(f"axis {axis!r} is given twice")
        shape[axis] = int(size)
    return shape


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def demo_options(parser: argparse.ArgumentParser) -> None:
    """Options of `jaxplan demo`."""
    parser.add_argument("--devices", type=positive, help="simulated devices (default: the mesh's, or 8)")
    parser.add_argument("--mesh", type=mesh_shape, help="such as data=4,model=2, the default")
    parser.add_argument("--steps", type=positive, default=5, help="training steps to compare (default: 5)")


def demo(arguments: argparse.Namespace) -> int:
    """Plan, run and audit a small language model on simulated devices."""
    from jaxplan import demo as page

    try:
        mesh = page.demo_mesh(arguments.devices, arguments.mesh)
    except ValueError as error:
        print(f"jaxplan demo: {error}", file=sys.stderr)
        return 2
    return page.launch(mesh, arguments.steps)


COMMANDS: dict[str, Command] = {
    "demo": Command("plan, run and audit a small language model on simulated devices", demo_options, demo),
}


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="jaxplan", description="Automatic parallelism for JAX: a jitted function in, PartitionSpecs out."
    )
    top.add_argument("--version", action="version", version=f"jaxplan {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        command.options(commands.add_parser(name, help=command.help, description=command.run.__doc__))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (None: the process's own) and give its exit status. Bare, it prints the help."""
    top = parser()
    try:
        arguments = top.parse_args(argv)
    except SystemExit as stop:  # --help, --version, or a mistake that argparse has already explained
        return stop.code if isinstance(stop.code, int) else 0
    if arguments.command is None:
        top.print_help()
        print("\nTry `jaxplan demo`: it needs no accelerator and takes less than a minute.")
        return 0
    return COMMANDS[arguments.command].run(arguments)


if __name__ == "__main__":
    sys.exit(main())
