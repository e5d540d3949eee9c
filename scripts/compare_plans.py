"""Plans beside each other: jaxplan's, an expert's, plain data parallelism, all read from compiled programs.

    python scripts/compare_plans.py [--quick] [--forms scan,unrolled] [--batches 64,8] [--machine v4]
                                    [--sections decoder,small] [--markdown]

Section `decoder`: a GPT train step (12 layers, width 1024) on 4 x 4 simulated devices, with mesh axes equally
fast and with either of them ten times slower; there the hand plans stand with their mesh axes swapped too, the
same devices in the other order, where that differs, as an expert would turn them. Section `small`: every small
example on four meshes, planned for the machine as it is (where so little work is often best done by every
device alone) and for one whose arithmetic is slow enough to make splitting pay.

Bytes are those that one device sends in one step, in MB (1e6) or kB (1e3). "meant" reads the CPU compiler's
all-reduce + slice as the reduce-scatter it is on a TPU or GPU and its widened bf16 as bf16 (`jaxplan.hlo`);
"compiled" takes the program as it stands; "predicted" is the plan's own number, from before compiling.

"ring" and "hierarchical" are modelled times, alike for every plan: for each kernel of its compiled program the
longer of its FLOPs at the machine's float32 rate and its memory traffic, plus for each collective the bytes on
the wire and the latency of its link. They differ in a collective over several axes: "ring" puts all its bytes on
the slowest axis; in "hierarchical" the slowest axis carries only what the others have already reduced. "links" is
the hierarchical time without the kernels. "planned" is the plan's own number. The CPU compiler fuses less than
others do, so that memory traffic is above what an accelerator would see; equally so for every plan.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

DEVICES = 16
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={DEVICES}"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P  # noqa: E402

import jaxplan  # noqa: E402
from jaxplan.examples import Program, programs  # noqa: E402
from jaxplan.examples.by_hand import PLANS, by_hand  # noqa: E402
from jaxplan.examples.decoder import FULL, DecoderConfig, Form, decoder  # noqa: E402
from jaxplan.hlo import Collective  # noqa: E402
from jaxplan.machine import Link, Machine, axis_links, machine as find_machine  # noqa: E402

MESHES = ((8,), (4, 2), (2, 2, 2), (4, 4))
QUICK = replace(FULL, layers=2, width=256, heads=8, mlp_width=1024, vocabulary=4096, sequence=128)
SLOWDOWN = 10.0


def note(text: str) -> None:
    """Progress, apart from the tables."""
    print(f"# {text}", file=sys.stderr, flush=True)


def mesh_of(shape: Sequence[int]) -> Mesh:
    """A mesh with axes x, y, z over the first devices."""
    return Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), tuple("xyz"[: len(shape)]))


def swapped_axes(mesh: Mesh) -> Mesh:
    """The same devices, with the axes in the other order."""
    return Mesh(mesh.devices.T, mesh.axis_names[::-1], axis_types=mesh.axis_types[::-1])


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> None:
    """Print one table. All columns but the first are numbers, and go to the right."""
    if markdown:
        rule = ["---"] + ["---:"] * (len(header) - 1)
        lines = ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)]
    else:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in (header, *rows)
        ]
    print(f"\n{'### ' if markdown else ''}{title}\n\n" + "\n".join(lines), flush=True)


# --- what is measured ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A compiled program's audit; of jaxplan's plans also what was predicted. An `error` is shown."""

    name: str
    audit: jaxplan.Audit | None
    predicted_bytes: float | None = None
    predicted_seconds: float | None = None
    error: str = ""

    @property
    def meant_bytes(self) -> float:
        """Bytes sent per device and step, habits of the CPU compiler rewritten; inf without an audit."""
        return math.fsum(self.audit.by_kind(normalised=True).values()) if self.audit else math.inf


def measured(name: str, make: Callable[[], Any], args: tuple[Any, ...], mesh: Mesh) -> Measured:
    """Compile and read what `make` returns."""
    start = time.perf_counter()
    try:
        found = jaxplan.audit(make(), *args, mesh=mesh)
    except ValueError as error:  # a hand plan whose sizes do not divide
        return Measured(name, None, error=str(error))
    note(f"{name}: compiled in {time.perf_counter() - start:.1f} s")
    for unread in found.unread:
        note(f"{name}: not read: {unread}")
    return Measured(name, found)


def plan_of(program: Program, mesh: Mesh, machine: Machine) -> jaxplan.Plan:
    """The program planned as it is trained: with its state donated."""
    return jaxplan.make_plan(
        program.fn, *program.args, mesh=mesh, machine=machine, donate_argnums=program.donate
    )


def tell_gap(plan: jaxplan.Plan) -> None:
    """How far a plan may be from the cheapest, as modelled."""
    bound = plan.replan(certify=True).bound
    assert bound is not None
    print(f"jaxplan's modelled step: at most {(plan.seconds - bound) / bound:.3%} above that of any plan (proven)", flush=True)


def of_plan(name: str, plan: jaxplan.Plan, program: Program) -> Measured:
    """jaxplan's plan, compiled with the state donated."""
    found = measured(name, plan.jit, program.args, plan.mesh)
    return replace(found, predicted_bytes=sum(plan.wire_bytes.values()), predicted_seconds=plan.seconds)


def link_seconds(
    collective: Collective, links: dict[str, Link], sizes: dict[str, int], hierarchical: bool
) -> float:
    """Modelled time of one run of a collective."""
    if not collective.wire_bytes:
        return 0.0
    axes = sorted(collective.axes or links, key=lambda axis: links[axis].seconds_per_byte)
    reduces = collective.kind == "all-reduce"
    rounds = 2 if reduces else 1
    ring = collective.wire_bytes * links[axes[-1]].seconds_per_byte + rounds * links[axes[-1]].latency_seconds
    if not hierarchical or len(axes) == 1 or collective.kind == "collective-permute":
        return ring
    total, left = 0.0, collective.payload_bytes
    for axis in axes:
        part = (sizes[axis] - 1) / sizes[axis] * left
        total += rounds * (part * links[axis].seconds_per_byte + links[axis].latency_seconds)
        if collective.kind != "all-to-all":
            left /= sizes[axis]
    return min(total, ring)


def modelled_seconds(
    found: Measured, machine: Machine, mesh: Mesh, hierarchical: bool, links_only: bool = False
) -> float:
    """The common time formula, over a compiled program (see the top of this file)."""
    if found.audit is None:
        return math.inf
    sizes = dict(mesh.shape)
    links = axis_links(machine, sizes)
    spent = (c.times * link_seconds(c, links, sizes, hierarchical) for c in found.audit.normalised)
    if links_only:
        return math.fsum(spent)
    rate, memory = machine.flop_seconds("float32"), machine.seconds_per_byte
    work = (times * max(kernel.flops * rate, kernel.memory_bytes * memory) for kernel, times in found.audit.kernels)
    return math.fsum(work) + math.fsum(spent)


# --- sections 1 and 2: the decoder --------------------------------------------------------------------------


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None or math.isinf(seconds) else f"{seconds * 1e3:,.3f}"


def megabytes(value: float | None) -> str:
    return "-" if value is None or math.isinf(value) else f"{value / 1e6:,.3f}"


def step_by_hand(name: str, config: DecoderConfig, mesh: Mesh, form: Form) -> Any:
    """The hand plan's jitted train step."""
    return by_hand(name, config, mesh, form, donate=True)[0]


def all_by_hand(config: DecoderConfig, form: Form, mesh: Mesh) -> list[Measured]:
    """Every hand plan on a mesh."""
    args = decoder(config, form).args
    return [measured(name, partial(step_by_hand, name, config, mesh, form), args, mesh) for name in PLANS]


def decoder_sections(config: DecoderConfig, form: Form, machine: Machine, markdown: bool) -> None:
    """Both tables of the decoder at one batch and form."""
    mesh = mesh_of((4, 4))
    program = decoder(config, form)
    what = f"decoder, {form}, {config.layers} layers, width {config.width}, batch {config.batch}, on x=4, y=4"
    note(what)
    start = time.perf_counter()
    plan = plan_of(program, mesh, machine)
    note(f"planned in {time.perf_counter() - start:.1f} s, tracing included")
    ours = of_plan("jaxplan", plan, program)
    hand = all_by_hand(config, form, mesh)
    timed = partial(modelled_seconds, mesh=mesh)
    best = min(found.meant_bytes for found in hand)
    quickest = min(timed(found, machine, hierarchical=True) for found in hand)
    header = (
        "plan", "MB meant", "MB compiled", "MB predicted", "/ best hand", "TFLOP", "peak GiB",
        "ms links", "ms ring", "ms hierarchical", "/ best hand", "ms planned",
    )  # fmt: skip
    rows = []
    for found in (ours, *hand):
        if found.audit is None:
            rows.append((f"{found.name}: {found.error}", *["-"] * (len(header) - 1)))
            continue
        hierarchical = timed(found, machine, hierarchical=True)
        rows.append((
            found.name, megabytes(found.meant_bytes), megabytes(found.audit.total_wire_bytes),
            megabytes(found.predicted_bytes), f"{found.meant_bytes / best:.3f}",
            f"{found.audit.flops / 1e12:.4f}", f"{found.audit.peak_bytes / 2**30:.2f}",
            milliseconds(timed(found, machine, hierarchical=True, links_only=True)),
            milliseconds(timed(found, machine, hierarchical=False)), milliseconds(hierarchical),
            f"{hierarchical / quickest:.3f}", milliseconds(found.predicted_seconds),
        ))  # fmt: skip
    show(f"{what}, machine {machine.name}", header, rows, markdown)
    tell_gap(plan)
    swapped = [replace(f, name=f"{f.name}, swapped") for f in all_by_hand(config, form, swapped_axes(mesh))]
    for axis in mesh.axis_names:
        slow_section(what, axis, plan, program, machine, (ours, *hand, *swapped), markdown)


def slow_section(
    what: str, axis: str, plan: jaxplan.Plan, program: Program, machine: Machine,
    before: Sequence[Measured], markdown: bool,
) -> None:  # fmt: skip
    """One mesh axis ten times slower: jaxplan plans again, the hand plans stay as they are."""
    mesh = plan.mesh
    slow = machine.slower(axis, SLOWDOWN, dict(mesh.shape))
    replanned = plan.replan(machine=slow)
    again = of_plan("jaxplan, planned for this", replanned, program)
    ours, *hand = before
    entrants = [again, replace(ours, name="jaxplan, planned for equal axes", predicted_seconds=None), *hand]
    times = {
        found.name: [modelled_seconds(found, slow, mesh, hierarchical) for hierarchical in (False, True)]
        for found in entrants
    }
    plain = {found.name: times[found.name] for found in hand}

    def says_something(found: Measured) -> bool:
        unswapped = found.name.removesuffix(", swapped")
        return unswapped not in plain or unswapped == found.name or times[found.name] != plain[unswapped]

    entrants = list(filter(says_something, entrants))
    best = [min(time[form] for time in plain.values()) for form in (0, 1)]
    axes = [(name,) for name in mesh.axis_names] + [tuple(mesh.axis_names)]
    header = (
        "plan", "MB meant", "MB predicted", *(f"on {'+'.join(on)}" for on in axes), "TFLOP",
        "ms links", "ms ring", "/ best hand", "ms hierarchical", "/ best hand", "ms planned",
    )  # fmt: skip
    rows = []
    for found in entrants:
        if found.audit is None:
            rows.append((f"{found.name}: {found.error}", *["-"] * (len(header) - 1)))
            continue
        sent = found.audit.wire_bytes(normalised=True)
        split = {frozenset((on,) if isinstance(on, str) else on): value for on, value in sent.items()}
        ring, hierarchical = times[found.name]
        rows.append((
            found.name, megabytes(found.meant_bytes), megabytes(found.predicted_bytes),
            *(megabytes(split.get(frozenset(on), 0.0)) for on in axes),
            f"{found.audit.flops / 1e12:.4f}",
            milliseconds(modelled_seconds(found, slow, mesh, hierarchical=True, links_only=True)),
            milliseconds(ring), f"{ring / best[0]:.3f}",
            milliseconds(hierarchical), f"{hierarchical / best[1]:.3f}",
            milliseconds(found.predicted_seconds),
        ))  # fmt: skip
    show(f"{what}, machine {machine.name} with {axis} {SLOWDOWN:g} times slower", header, rows, markdown)
    tell_gap(replanned)


# --- section 3: the small programs --------------------------------------------------------------------------


def batch_dimension(program: Program, path: str) -> int | None:
    """Which dimension of an input is the batch; None: the input lies whole on every device.

    Dimension 0 of whatever is data; of a decoder's cache, (layers, batch, ...), dimension 1. Programs without
    a batch (linear systems, grids) are split by rows.
    """
    if program.name in ("conjugate_gradient", "stencil"):
        return 0
    top = path.split("/")[0]
    if program.name == "decode_kv":
        return {"cache": 1, "token": 0}.get(top)
    return 0 if top in ("x", "y", "images", "labels", "batch") else None


def data_parallel(program: Program, plan: jaxplan.Plan) -> Any:
    """The program jitted with its batch over all axes and nothing said inside; state leaves as it came."""
    mesh, traced = plan.mesh, plan.traced
    everything = tuple(mesh.axis_names)
    specs = []
    for path, aval in zip(traced.in_paths, traced.in_avals, strict=True):
        dim = batch_dimension(program, path)
        if dim is not None and dim < len(aval.shape) and aval.shape[dim] % mesh.size == 0:
            specs.append(NamedSharding(mesh, P(*[None] * dim, everything)))
        else:
            specs.append(NamedSharding(mesh, P()))
    args, _ = traced.unflatten_inputs(specs)
    outs: list[Any] = [None] * len(traced.out_avals)
    for out, given in plan.modelled.graph.ties:
        outs[out] = specs[given]
    return jax.jit(
        program.fn, in_shardings=tuple(args), out_shardings=traced.unflatten_outputs(outs),
        donate_argnums=program.donate,
    )  # fmt: skip


def largest_error(got: Any, wanted: Any) -> float:
    """Largest difference of any result, relative to the largest element of that result."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        scale = float(np.max(np.abs(b))) or 1.0
        worst = float(np.max([worst, np.max(np.abs(a - b)) / scale]))
    return worst


def small_section(machine: Machine, markdown: bool, shapes: Sequence[tuple[int, ...]]) -> None:
    """Each small program on each mesh: jaxplan's plan beside plain data parallelism."""
    header = (
        "program, mesh", "kB meant", "kB compiled", "kB predicted", "kB data par.", "MFLOP", "MFLOP d.p.",
        "us hier.", "us d.p.", "/ d.p.", "max rel. error",
    )  # fmt: skip
    rows = []
    for name, program in programs("small").items():
        wanted = jax.jit(program.fn)(*program.make_args(0))
        for shape in shapes:
            mesh = mesh_of(shape)
            title = f"{name}, {'x'.join(map(str, shape))}"
            plan = plan_of(program, mesh, machine)
            ours = of_plan(title, plan, program)
            by_batch = partial(data_parallel, program, plan)
            plain = measured(f"{title}, data parallel", by_batch, program.args, mesh)
            if ours.audit is None or plain.audit is None:
                raise RuntimeError(f"{title}: {ours.error or plain.error}")
            error = largest_error(plan.jit(donate_argnums=())(*program.make_args(0)), wanted)
            spent = [modelled_seconds(found, machine, mesh, hierarchical=True) for found in (ours, plain)]
            compiled, predicted = ours.audit.total_wire_bytes, ours.predicted_bytes or 0.0
            sent = (ours.meant_bytes, compiled, predicted, plain.meant_bytes)
            rows.append((
                title, *(f"{value / 1e3:,.2f}" for value in sent),
                *(f"{found.audit.flops / 1e6:,.3f}" for found in (ours, plain) if found.audit),
                *(f"{value * 1e6:,.2f}" for value in spent),
                f"{spent[0] / spent[1]:.3f}" if spent[1] else "-", f"{error:.1e}",
            ))  # fmt: skip
    show(f"small programs, planned for {machine.name}", header, rows, markdown)


def slow_arithmetic(machine: Machine, factor: float = 1000.0) -> Machine:
    """Slower arithmetic, no latency: a small program is then worth splitting, as a large one is."""
    return replace(
        machine, name=f"{machine.name} with arithmetic {factor:g} times slower and no latency",
        seconds_per_flop={dtype: factor * seconds for dtype, seconds in machine.seconds_per_flop.items()},
        inner=replace(machine.inner, latency_seconds=0.0), outer=replace(machine.outer, latency_seconds=0.0),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and print every section."""
    parser = argparse.ArgumentParser(description="jaxplan's plans beside hand-written ones.")
    parser.add_argument("--forms", default="scan", help="scan, unrolled or both (default: scan)")
    parser.add_argument("--batches", default="64,8", help="global batches of the decoder (default: 64,8)")
    parser.add_argument("--machine", default="v4", help="a preset's name (default: v4)")
    parser.add_argument("--sections", default="decoder,small", help="decoder, small or both (default: both)")
    parser.add_argument("--markdown", action="store_true", help="print markdown tables")
    parser.add_argument("--quick", action="store_true", help="a small decoder at one batch, one mesh")
    given = parser.parse_args(argv)
    machine = find_machine(given.machine)
    sections = given.sections.split(",")
    print(f"jax {jax.__version__}, jaxplan {jaxplan.__version__}, {DEVICES} simulated devices")
    config = QUICK if given.quick else FULL
    if "decoder" in sections:
        for form in given.forms.split(","):
            for batch in [16] if given.quick else map(int, given.batches.split(",")):
                decoder_sections(replace(config, batch=batch), form, machine, given.markdown)
    if "small" in sections:
        for on in (machine, slow_arithmetic(machine)):
            small_section(on, given.markdown, MESHES[1:2] if given.quick else MESHES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
