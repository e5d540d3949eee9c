"""Commands about functions: `plan`, `check`, `audit`. They import the user's module and trace; only `audit` compiles."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from jaxplan.cli.arguments import (
    arguments_of,
    dimensions,
    function_of,
    mesh_shape,
    names,
    percent,
    pin,
    positive,
    shape_options,
)
from jaxplan.cli.output import Trouble, emit, emit_json, progress
from jaxplan.cli.reading import read

if TYPE_CHECKING:
    from jaxplan.api import Plan
    from jaxplan.files import SavedPlan
    from jaxplan.hlo import Audit


# --- plan ------------------------------------------------------------------------------------------------------------


def plan_options(parser: argparse.ArgumentParser) -> None:
    """Options of `jaxplan plan`."""
    parser.add_argument("function", metavar="MODULE:FUNCTION", help="such as train:step")
    parser.add_argument("--mesh", type=mesh_shape, required=True, help="such as data=4,model=2")
    shape_options(parser)
    planning_options(parser)
    parser.add_argument("--certify", action="store_true", help="also prove how far from the optimum the plan can be")
    parser.add_argument("-o", "--output", metavar="FILE", help="save the plan")
    parser.add_argument("--html", metavar="FILE", help="write a page that draws the plan")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def planning_options(parser: argparse.ArgumentParser) -> None:
    """How to plan: --machine, --budget, --search, --pin, --dims, --pipeline, --microbatches, --donate."""
    parser.add_argument("--machine", default=None, help="a preset, such as v5e or h100, or your own by name (default: v5e)")
    parser.add_argument("--budget", default=None, help="bytes per device, such as 16GiB, or unlimited (default: the machine's)")
    parser.add_argument("--search", default=None, help="the search (default: hsm2dl)")
    parser.add_argument(
        "--pin", type=pin, action="append", default=[], metavar="PATH=SPEC",
        help="a layout to insist on: 'params/*/wq=-,model' for P(None, 'model'); may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--dims", type=dimensions, action="append", default=[], metavar="PATH=NAMES",
        help="names of an input's dimensions, such as 'x=B F'; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--pipeline", metavar="AXIS", default=None,
        help="the mesh axis to lay along the layers of a scan, auto, or none (default: auto)",
    )  # fmt: skip
    parser.add_argument(
        "--microbatches", type=positive, default=None, metavar="N", help="of a pipeline (default: as many as are best)"
    )
    parser.add_argument("--donate", type=names, metavar="NAMES", help="arguments whose buffers may be reused, such as w,state")


def planning(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of `planning_options` that were given, as keywords of `make_plan`."""
    given = {
        "machine": arguments.machine, "search": arguments.search,
        "memory_budget": math.inf if arguments.budget == "unlimited" else arguments.budget,
        "pins": pins_of(arguments) or None, "dims": dict(arguments.dims) or None, "donate_argnames": arguments.donate,
        "pipeline": arguments.pipeline, "microbatches": arguments.microbatches,
    }  # fmt: skip
    found = {name: value for name, value in given.items() if value is not None}
    return {**found, "pipeline": None} if arguments.pipeline == "none" else found


def plan(arguments: argparse.Namespace) -> int:
    """Plan a function on a mesh, from shapes alone: nothing is run or compiled, and no devices are needed."""
    fn = function_of(arguments.function)
    args = arguments_of(fn, arguments)
    found = planned(fn, args, mesh=abstract_mesh(arguments.mesh), certify=arguments.certify, **planning(arguments))
    if arguments.output is not None:
        with progress(f"saving {arguments.output}"):
            save(found, arguments.output)
    if arguments.html is not None:
        with progress(f"drawing {arguments.html}"):
            text = found.to_html()
        write_page(text, arguments.html)
    if arguments.json:
        from jaxplan.files import saved_plan, to_json

        emit_json(to_json(saved_plan(found)))
    else:
        with progress("describing the plan"):
            text = str(found)
        emit(text)
    return 0


def pins_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """{path: PartitionSpec} of the --pin options."""
    from jax.sharding import PartitionSpec

    return {path: PartitionSpec(*entries) for path, entries in arguments.pin}


def planned(fn: Callable[..., Any], args: tuple[Any, ...], **options: Any) -> Plan:
    """`make_plan`, with progress; what it refuses becomes Trouble."""
    from jaxplan.api import make_plan

    with progress(f"planning {getattr(fn, '__name__', 'the function')}"), refused():
        return make_plan(fn, *args, **options)


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Errors of tracing are shown as the user's own; those of planning by their message, with status 1 if nothing fits."""
    from jaxplan.budget import NothingFits

    try:
        yield
    except NothingFits as error:
        raise Trouble(str(error), 1) from None
    except Exception as error:
        notes = getattr(error, "__notes__", [])
        if any("jaxplan was tracing" in note for note in notes):
            raise Trouble(f"the function does not trace: {type(error).__name__}", cause=error) from None
        if isinstance(error, (ValueError, TypeError, ModuleNotFoundError)):
            raise Trouble(str(error)) from None
        raise


def save(plan: Plan, path: str) -> None:
    """Write a plan; what the system refuses becomes Trouble."""
    written(lambda: plan.save(path), path)


def write_page(text: str, path: str) -> None:
    """Write a page; what the system refuses becomes Trouble."""
    from jaxplan.files import write_text

    written(lambda: write_text(text, path), path)


def written(write: Callable[[], None], path: str) -> None:
    """Write a file, and say so on stderr; what the system refuses becomes Trouble."""
    try:
        write()
    except OSError as error:
        raise Trouble(f"{path} cannot be written: {error.strerror or error}; nothing was changed") from None
    print(f"wrote {path} ({os.path.getsize(path):,} bytes)", file=sys.stderr)


def abstract_mesh(shape: Mapping[str, int]) -> Any:
    """A mesh without devices."""
    import jax

    return jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape))


# --- check -----------------------------------------------------------------------------------------------------------


def check_options(parser: argparse.ArgumentParser) -> None:
    """Options of `jaxplan check`."""
    parser.add_argument("file", metavar="FILE", help="the plan to hold it against")
    parser.add_argument("function", metavar="MODULE:FUNCTION", help="such as train:step")
    shape_options(parser)
    parser.add_argument(
        "--max-regression", type=percent, default=0.0, metavar="SHARE",
        help="how much longer the modelled step may take, such as 2%% (default: 0%%)",
    )  # fmt: skip
    parser.add_argument(
        "--max-memory-regression", type=percent, default=None, metavar="SHARE",
        help="how much higher the modelled peak memory may be (default: as high as the memory budget)",
    )  # fmt: skip
    parser.add_argument("-o", "--output", metavar="FILE", help="save the new plan")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def check(arguments: argparse.Namespace) -> int:
    """Plan a function anew, as a saved plan was asked for, and compare: status 1 if it costs more than allowed."""
    from jax.sharding import PartitionSpec

    from jaxplan.files import Comparison, saved_plan

    old = read(arguments.file)
    fn = function_of(arguments.function)
    asked, budget = old.asked, old.asked.memory_budget
    found = planned(
        fn, arguments_of(fn, arguments), mesh=abstract_mesh(old.mesh_shape), machine=old.machine, search=asked.search or "hsm2dl",
        memory_budget=math.inf if budget == "unlimited" else budget, while_trips=asked.while_trips,
        certify=asked.certify, pipeline=asked.pipeline, microbatches=asked.microbatches, donate_argnames=donated_names(old, fn),
        pins={path: PartitionSpec(*spec) for path, spec in asked.pins.items()},
    )  # fmt: skip
    new = saved_plan(found)
    if new.function != old.function and list(new.inputs) != list(old.inputs):
        raise Trouble(
            f"{arguments.file} is a plan of {old.function!r}, whose inputs are others than those of {new.function!r}: name the "
            f"function that it is of, or plan this one with -o {arguments.file}"
        )
    comparison = Comparison(old, new)
    if arguments.output is not None:
        save(found, arguments.output)
    limits = {"seconds": arguments.max_regression, "peak_bytes": arguments.max_memory_regression}
    verdicts = {name: limit for name, limit in limits.items() if limit is not None}
    broken = [name for name, limit in verdicts.items() if comparison.totals[name].relative > limit]
    if arguments.json:
        emit_json({"ok": not broken, "limits": verdicts, "broken": broken, **comparison.to_json()})
    else:
        emit("\n".join([*(_verdict(comparison, name, limit) for name, limit in verdicts.items()), "", str(comparison)]))
    return 1 if broken else 0


def donated_names(saved: SavedPlan, fn: Callable[..., Any]) -> list[str] | None:
    """The function's parameters that were donated whole when a plan was saved."""
    flags: dict[str, list[bool]] = {}
    for path, leaf in saved.inputs.items():
        flags.setdefault(path.partition("/")[0], []).append(leaf.donated)
    with contextlib.suppress(ValueError):  # no signature to be had
        return [name for name in inspect.signature(fn).parameters if name in flags and all(flags[name])] or None
    return None


def _verdict(comparison: Any, name: str, limit: float) -> str:
    from jaxplan.report import show_bytes, show_seconds

    change, show = comparison.totals[name], show_seconds if name == "seconds" else show_bytes
    what = "modelled step" if name == "seconds" else "peak memory"
    word = "ok" if change.relative <= limit else "FAILED"
    numbers = f"{show(change.old)} -> {show(change.new)} ({change.relative:+.2%})"
    return f"{word}: {what} {numbers}; at most {limit:+.2%} is allowed"


# --- audit -----------------------------------------------------------------------------------------------------------


def audit_options(parser: argparse.ArgumentParser) -> None:
    """Options of `jaxplan audit`."""
    parser.add_argument("function", metavar="MODULE:FUNCTION", help="such as train:step")
    shape_options(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--mesh", type=mesh_shape, help="plan it on this mesh, such as data=4,model=2, and audit the planned function"
    )
    how.add_argument("--plan", metavar="FILE", help="audit it as this saved plan says")
    parser.add_argument("--machine", default=None, help="to plan for (default: v5e)")
    parser.add_argument(
        "--devices", type=positive, help="simulated devices, for a function with shardings of its own (default: 8)"
    )
    parser.add_argument(
        "--topology", metavar="NAME", help="compile for a TPU slice, such as v5e:4x4, with libtpu and without a TPU"
    )
    parser.add_argument("--json", action="store_true", help="print the audit as JSON")


def audit(arguments: argparse.Namespace) -> int:
    """Compile a function for simulated CPU devices, or for a TPU slice, and list what the compiled program really sends. With
    --mesh or --plan it is laid out as planned, and the plan's prediction stands beside it; without, it must be under jax.jit with
    its own shardings."""
    saved = read(arguments.plan) if arguments.plan else None
    shape = saved.mesh_shape if saved else arguments.mesh
    devices = math.prod(shape.values()) if shape else arguments.devices or 8
    simulate(devices)
    fn = function_of(arguments.function)
    args = arguments_of(fn, arguments)
    from jaxplan.hlo import audit as read_compiled

    if shape is None:
        with progress("compiling"), refused():
            found, predicted = read_compiled(fn, *args, topology=arguments.topology), None
    else:
        laid = _laid_out(fn, args, arguments, shape)
        with progress("compiling"), refused():
            found = read_compiled(laid.jit(), *args, mesh=laid.mesh, topology=arguments.topology)
        predicted = laid.wire_bytes
    if arguments.json:
        emit_json(audit_json(found, predicted))
    else:
        emit(str(found))
        if predicted is not None:
            _beside(found, predicted)
    return 0


def _laid_out(fn: Callable[..., Any], args: tuple[Any, ...], arguments: argparse.Namespace, shape: Mapping[str, int]) -> Plan:
    import jax

    from jaxplan.loading import load_plan

    mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), devices=jax.devices()[: math.prod(shape.values())])
    if not arguments.plan:
        return planned(fn, args, mesh=mesh, machine=arguments.machine or "v5e")
    with progress("loading the plan"), refused():
        return load_plan(arguments.plan, fn, *args, mesh=mesh)


def simulate(devices: int) -> None:
    """Have so many simulated devices, before JAX starts. Raises Trouble where it has started with fewer."""
    import jax

    with contextlib.suppress(RuntimeError):  # it has started: what counts is what it has
        jax.config.update("jax_num_cpu_devices", devices)
        jax.config.update("jax_platforms", "cpu")
    if len(jax.devices()) < devices:
        raise Trouble(f"{devices} devices are needed, and JAX has started with {len(jax.devices())}")


def _beside(found: Audit, predicted: Mapping[str, float]) -> None:
    from jaxplan.report import show_bytes

    meant = sum(found.by_kind(normalised=True).values())
    emit(
        f"\npredicted by the plan: {show_bytes(sum(predicted.values()))} sent per device and call; compiled: {show_bytes(meant)}"
    )


def audit_json(found: Audit, predicted: Mapping[str, float] | None) -> dict[str, Any]:
    """An audit for a machine to read; bytes and FLOPs per device and call."""
    collectives = [
        {
            "kind": c.kind, "axes": list(c.axes), "dtype": c.dtype, "shape": c.shape, "times": c.times, "exact": c.exact,
            "wire_bytes": c.wire_bytes * c.times, "source": c.source,
        }
        for c in found.normalised
    ]  # fmt: skip
    return {
        "collectives": collectives,
        "wire_bytes": sum(found.by_kind(normalised=True).values()),
        "wire_bytes_as_compiled": found.total_wire_bytes,
        "predicted_wire_bytes": None if predicted is None else sum(predicted.values()),
        "flops": found.flops,
        "peak_bytes": found.peak_bytes,
        "unread": list(found.unread),
    }
