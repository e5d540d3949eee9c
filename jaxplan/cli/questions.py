"""Commands that ask the planner again: `explain`, `why-not`, `regimes`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from jaxplan.cli.arguments import arguments_of, function_of, mesh_shape, pin, shape_options, spec_entries
from jaxplan.cli.functions import abstract_mesh, planned, planning, planning_options, refused
from jaxplan.cli.output import Trouble, emit, emit_json, progress
from jaxplan.cli.reading import read

if TYPE_CHECKING:
    from jaxplan.api import Plan
    from jaxplan.reasons import Charge, Explanation, InputReason, OperatorReason, WhyNot


def explain_options(parser: argparse.ArgumentParser) -> None:
    """Options of `jaxplan explain`."""
    parser.add_argument("path", metavar="PATH", help="an input, a prefix or glob of inputs, or a source line: train.py:41")
    _plan_options(parser)


def explain(arguments: argparse.Namespace) -> int:
    """Why an input, or the operators of a source line, are laid out as they are: what it costs, the next best, who forces it."""
    plan = _plan(arguments)
    with progress("solving again"), refused():
        found = plan.explain(arguments.path)
        text = None if arguments.json else str(found)
    if text is None:
        emit_json(explanation_json(found))
    else:
        emit(text)
    return 0


def regimes_options(parser: argparse.ArgumentParser) -> None:
    """Options of `jaxplan regimes`."""
    parser.add_argument(
        "symbol", metavar="SYMBOL",
        help="a dimension as the plan prints it (B), n_AXIS for the devices of an axis, or g_AXIS for its link",
    )  # fmt: skip
    _plan_options(parser)
    parser.add_argument("--from", dest="low", type=float, metavar="X", help="the least value (default: a 64th of now)")
    parser.add_argument("--to", dest="high", type=float, metavar="X", help="the largest (default: 64 times now)")


def regimes(arguments: argparse.Namespace) -> int:
    """Where along a dimension, the devices of an axis, or the speed of its link another plan takes over, in closed form."""
    plan = _plan(arguments)
    with progress("looking for regimes"), refused():
        found = plan.regimes(arguments.symbol, arguments.low, arguments.high)
        text = None if arguments.json else str(found)
    if text is None:
        emit_json(found.to_json())
    else:
        emit(text)
    return 0


def why_not_options(parser: argparse.ArgumentParser) -> None:
    """Options of `jaxplan why-not`."""
    parser.add_argument("path", metavar="PATH", help="an input, or a prefix or glob of inputs")
    parser.add_argument(
        "layout", type=spec_entries, metavar="SPEC",
        help="where it should lie: -,model for P(None, 'model'), data+model for P(('data', 'model')), or as Python writes it",
    )  # fmt: skip
    _plan_options(parser)
    parser.add_argument(
        "--with", dest="others", type=pin, action="append", default=[], metavar="PATH=SPEC",
        help="another input to lie elsewhere at the same time; may be given again",
    )  # fmt: skip


def why_not(arguments: argparse.Namespace) -> int:
    """The best plan with an input (or several, --with) laid out as stated, beside the plan: what it costs more, why, and what
    else would move."""
    from jax.sharding import PartitionSpec

    plan = _plan(arguments)
    with progress("solving again"), refused():
        asked = [(arguments.path, arguments.layout), *arguments.others]
        found = plan.why_not({path: PartitionSpec(*layout) for path, layout in asked})
        text = None if arguments.json else str(found)
    if text is None:
        emit_json(why_not_json(found))
    else:
        emit(text)
    return 0


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("function", metavar="MODULE:FUNCTION", help="such as train:step")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--mesh", type=mesh_shape, help="plan it on this mesh, such as data=4,model=2")
    how.add_argument("--plan", metavar="FILE", help="take its saved plan, as --machine, --budget, --search and --pin change it")
    shape_options(parser)
    planning_options(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")


def _plan(arguments: argparse.Namespace) -> Plan:
    """The plan that is asked about: made, or loaded and perhaps changed."""
    if arguments.function.endswith(".json"):
        raise Trouble(
            f"{arguments.function} holds a plan and no program, and the answer needs the program: name the function, "
            f"train:step --plan {arguments.function}"
        )
    if ":" not in arguments.function:
        order = [name for name in ("path", "symbol", "layout", "function") if hasattr(arguments, name)]
        told = {"path": "PATH", "symbol": "SYMBOL", "layout": "SPEC", "function": "MODULE:FUNCTION"}
        raise Trouble(
            f"{arguments.function!r} is not MODULE:FUNCTION, such as train:step; the order is {' '.join(told[n] for n in order)}"
        )
    saved = read(arguments.plan) if arguments.plan else None
    if saved is not None and arguments.dims:
        raise Trouble("--dims names the dimensions of a plan that is made: with --plan, those of the saved plan stay")
    fn = function_of(arguments.function)
    args, options = arguments_of(fn, arguments), planning(arguments)
    if saved is None:
        return planned(fn, args, mesh=abstract_mesh(arguments.mesh), **options)
    from jaxplan.loading import load_plan

    donated = options.pop("donate_argnames", None)
    with progress("loading the plan"), refused():
        plan = load_plan(arguments.plan, fn, *args, mesh=abstract_mesh(saved.mesh_shape), donate_argnames=donated)
        return plan.replan(**options) if options else plan


# --- as JSON ---------------------------------------------------------------------------------------------------------


def explanation_json(found: Explanation) -> dict[str, Any]:
    """An explanation for a machine to read; costs are SymPy's text, seconds are per call."""
    from jaxplan.reasons import InputReason

    reasons = [_input(reason) if isinstance(reason, InputReason) else _operators(reason) for reason in found.reasons]
    return {"subject": found.subject, "reasons": reasons, "note": found.note}


def why_not_json(found: WhyNot) -> dict[str, Any]:
    """The comparison for a machine to read; seconds per call, bytes per device."""
    plan, other = found.plan, found.other
    return {
        "pins": {path: _spec(spec) for path, spec in found.pins.items()},
        "extra_seconds": found.extra,
        "seconds": [plan.seconds, other.seconds],
        "peak_bytes": [plan.peak_bytes, other.peak_bytes],
        "wire_bytes": {axis: [sent, other.wire_bytes[axis]] for axis, sent in plan.wire_bytes.items()},
        "changed": {path: [_spec(one), _spec(two)] for path, (one, two) in found.changed.items()},
        "causes": _charges(found.causes),
    }


def _input(reason: InputReason) -> dict[str, Any]:
    return {
        "paths": list(reason.paths), "dtype": reason.dtype, "shape": list(reason.shape), "dims": list(reason.dims),
        "spec": _spec(reason.spec), "bytes_per_device": reason.bytes_per_device, "cost": str(reason.cost),
        "seconds": reason.seconds, "neighbours": list(reason.neighbours), "idle": dict(reason.idle),
        "forced_by": reason.forced_by,
        "alternatives": [
            {"spec": _spec(other.spec), "extra_seconds": other.extra, "causes": _charges(other.causes)}
            for other in reason.alternatives
        ],
    }  # fmt: skip


def _operators(reason: OperatorReason) -> dict[str, Any]:
    runner_up: Mapping[str, Any] | None = None
    if reason.runner_up is not None:
        runner_up = {"splits": dict(reason.runner_up[0]), "extra_seconds": reason.runner_up[1]}
    return {
        "operator": reason.operator, "source": reason.source, "times": reason.times, "splits": dict(reason.splits),
        "cost": str(reason.cost), "seconds": reason.seconds, "runner_up": runner_up, "forced_by": reason.forced_by,
    }  # fmt: skip


def _charges(charges: Iterable[Charge]) -> list[dict[str, Any]]:
    return [{"what": charge.what, "source": charge.source, "seconds": charge.seconds} for charge in charges]


def _spec(spec: Iterable[Any]) -> list[Any]:
    return [list(entry) if isinstance(entry, tuple) else entry for entry in spec]
