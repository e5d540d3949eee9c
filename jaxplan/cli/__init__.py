"""The command line: `jaxplan COMMAND ...`, one function per command in one small table.

Exit status: 0 for success, 1 if what was asked about does not hold (no plan fits, plans differ, a plan got costlier), 2 if it
could not be found out (a mistake in the command line, a file that is no plan, a module that does not import), 130 if interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxplan import __version__
from jaxplan.cli import calibrating, completion, demonstrate, exporting, functions, questions, saved, solving, whatif
from jaxplan.cli.output import Trouble, close_quietly, explain, to_devnull

__all__ = ["COMMANDS", "main", "parser"]


@dataclass(frozen=True)
class Command:
    """One command. `options` declares its arguments; `run` carries it out and gives the exit status."""

    help: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def print_completion(arguments: argparse.Namespace) -> int:
    """Print a script that completes this command line, for bash, zsh or fish: eval "$(jaxplan completion bash)"."""
    return completion.show(parser(), arguments.shell)


COMMANDS: dict[str, Command] = {
    "plan": Command("plan a function and print or save the plan", functions.plan_options, functions.plan),
    "show": Command("print a saved plan", saved.show_options, saved.show),
    "explain": Command("why an input, or a source line, is laid out as it is", questions.explain_options, questions.explain),
    "why-not": Command("what another layout of an input would cost", questions.why_not_options, questions.why_not),
    "regimes": Command("where along a size or a link another plan takes over", questions.regimes_options, questions.regimes),
    "best-mesh": Command("rank all meshes of so many devices", whatif.best_mesh_options, whatif.best_mesh),
    "sweep": Command("plan for several devices, meshes, link speeds and sizes", whatif.sweep_options, whatif.sweep),
    "diff": Command("what differs between two saved plans", saved.diff_options, saved.diff),
    "check": Command("fail if a function's plan got costlier than a saved one", functions.check_options, functions.check),
    "audit": Command("compile a function and list what it really sends", functions.audit_options, functions.audit),
    "export": Command("a saved plan in another library's words", exporting.options, exporting.export),
    "calibrate": Command("measure the devices of this machine", calibrating.options, calibrating.calibrate),
    "demo": Command("plan, run and audit a small language model on simulated devices", demonstrate.options, demonstrate.demo),
    "solve": Command("solve a problem file of the contest on intra-operator parallelism", solving.options, solving.solve),
    "completion": Command("print a completion script for a shell", completion.options, print_completion),
}

BARE = """
Try `jaxplan demo`: it needs no accelerator and takes less than a minute. Then, for a function step in train.py:
  jaxplan plan train:step --mesh data=4,model=2 --spec "f32[512,64],f32[64,8]" -o plan.json
  jaxplan show plan.json"""


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
    try:
        status = _run(argv)
    except BrokenPipeError:  # whoever read the output has enough
        to_devnull()
        status = 0
    return status if close_quietly() else 2


def _run(argv: Sequence[str] | None) -> int:
    top = parser()
    words = sys.argv[1:] if argv is None else argv
    try:  # a layout that begins with a whole dimension, -,model, is no option
        arguments = top.parse_args(["None" + word[1:] if word.startswith("-,") else word for word in words])
    except SystemExit as stop:  # --help, --version, or a mistake that argparse has already explained
        return stop.code if isinstance(stop.code, int) else 0
    arguments.own = argv is None  # the process was started for this command alone
    if arguments.command is None:
        top.print_help()
        print(BARE)
        return 0
    try:
        return COMMANDS[arguments.command].run(arguments)
    except Trouble as trouble:
        explain(arguments.command, trouble)
        return trouble.status
    except KeyboardInterrupt:
        print("jaxplan: interrupted", file=sys.stderr)
        return 130
