"""The demonstration: a small language model is planned, run beside one device, and audited beside hand plans.

`launch` starts it in a fresh process, because JAX fixes the number of simulated devices when it starts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxplan.api import Plan, make_plan
from jaxplan.examples.by_hand import by_hand
from jaxplan.examples.decoder import DecoderConfig, decoder
from jaxplan.examples.program import Program
from jaxplan.files import saved_plan, to_json
from jaxplan.hlo import Audit, audit
from jaxplan.report import show_bytes, table

__all__ = ["demo_mesh", "launch", "main"]

MACHINE = "v5e"
CONFIG = DecoderConfig(layers=4, width=256, heads=8, mlp_width=1024, vocabulary=4096, sequence=128, batch=16)
TOLERANCE = 1e-4
"""Largest relative difference of a loss: sums in another order, in float32, over a few steps."""

BY_HAND: dict[str, tuple[str, ...]] = {
    "data parallel": ("data_parallel", "data_parallel_mapped"),
    "ZeRO-3": ("zero3", "zero3_mapped"),
    "Megatron": ("megatron",),
}
"""The hand plans shown; of several ways to write one, the one that sends least."""


def demo_mesh(devices: int | None, mesh: Mapping[str, int] | None) -> dict[str, int]:
    """{axis: size} from what the user gave of either. Raises ValueError if the two disagree."""
    if mesh is None:
        devices = devices or 8
        return {"data": devices // 2, "model": 2} if devices % 2 == 0 else {"data": devices}
    needed = math.prod(mesh.values())
    if devices not in (None, needed):
        shown = ",".join(f"{axis}={size}" for axis, size in mesh.items())
        raise ValueError(f"the mesh {shown} has {needed} devices, but --devices is {devices}; leave one out")
    return dict(mesh)


def launch(mesh: Mapping[str, int], steps: int, as_json: bool = False) -> int:
    """Run the demonstration in a process with as many simulated devices as the mesh has; its exit status. `as_json`: results as
    JSON on stdout, the page on stderr."""
    # The last of several equal flags holds; the user's other flags stay.
    devices = f"--xla_force_host_platform_device_count={math.prod(mesh.values())}"
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip(), "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(path),
    }  # fmt: skip
    shown = ",".join(f"{axis}={size}" for axis, size in mesh.items())
    command = [sys.executable, "-P", "-m", "jaxplan.demo", "--mesh", shown, "--steps", str(steps)]
    command += ["--json"] if as_json else []
    return subprocess.run(command, env=environment, check=False).returncode


def run(mesh_shape: Mapping[str, int], steps: int, config: DecoderConfig = CONFIG) -> int:
    """The demonstration itself, on devices that are there already. 1 if the losses do not agree, else 0."""
    return 0 if results(mesh_shape, steps, config)["agree"] else 1


def results(mesh_shape: Mapping[str, int], steps: int, config: DecoderConfig = CONFIG) -> dict[str, Any]:
    """The demonstration, printed; and what it found, for a machine to read: bytes are per device and step."""
    mesh = jax.make_mesh(tuple(mesh_shape.values()), tuple(mesh_shape))
    program = decoder(config)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.args[0]))
    print(
        f"A decoder language model with AdamW: {config.layers} layers, width {config.width}, "
        f"{config.heads} heads,\nvocabulary {config.vocabulary:,}, {parameters / 1e6:.1f} M parameters, "
        f"a batch of {config.batch} x {config.sequence} tokens, in float32.\n"
        f"Planned for {MACHINE!r}, run on {mesh.size} simulated CPU devices.\n"
    )
    plan = make_plan(program.fn, *program.args, mesh=mesh, machine=MACHINE, donate_argnums=program.donate)
    print(plan, flush=True)
    agree = compare_losses(plan, program, steps)
    print(flush=True)
    compiled = compare_traffic(plan, program, config)
    return {
        "agree": agree,
        "predicted_bytes": sum(plan.wire_bytes.values()),
        "compiled": {title: {"sent_bytes": sent(found), "peak_bytes": found.peak_bytes} for title, found in compiled.items()},
        "plan": to_json(saved_plan(plan)),
    }


def compare_losses(plan: Plan, program: Program, steps: int) -> bool:
    """Print the loss of each step as planned and on one device; whether they agree."""
    planned = losses(plan.jit(), program, steps)
    alone = losses(jax.jit(program.fn, donate_argnums=program.donate), program, steps)
    differences = [abs(a - b) / abs(b) for a, b in zip(planned, alone, strict=True)]
    rows = [
        (str(step), f"{a:.6f}", f"{b:.6f}", f"{difference:.1e}")
        for step, (a, b, difference) in enumerate(zip(planned, alone, differences, strict=True), 1)
    ]
    header = ("step", "loss as planned", "on one device", "relative difference")
    print("\n" + "\n".join(table(header, rows, range(1, len(header)))))
    worst = float(np.max(differences))  # nan, unlike with the built-in max, wins
    agree = worst <= TOLERANCE
    verdict = "the same results" if agree else f"NOT the same results: more than {TOLERANCE:g} apart"
    print(f"largest relative difference of a loss: {worst:.1e}: {verdict}")
    return agree


def losses(step: Callable[..., Any], program: Program, steps: int) -> list[float]:
    """Losses of a few steps on one batch, from fresh state."""
    params, state, batch = program.make_args(0)
    found = []
    for _ in range(steps):
        params, state, loss = step(params, state, batch)
        found.append(float(loss))
    return found


def compare_traffic(plan: Plan, program: Program, config: DecoderConfig) -> dict[str, Audit]:
    """Print what the compiled programs send, compute and hold, jaxplan's beside an expert's; {title: audit} of them."""
    ours = audit(plan.jit(), *program.args, mesh=plan.mesh)
    found = {"jaxplan": ours}
    notes = [f"jaxplan predicted {show_bytes(sum(plan.wire_bytes.values()))} before anything was compiled."]
    for title, names in BY_HAND.items():
        try:
            steps = [by_hand(name, config, plan.mesh, donate=True)[0] for name in names]
        except ValueError as error:
            notes.append(f"{title} does not fit this mesh: {error}.")
            continue
        audits = [audit(step, *program.args, mesh=plan.mesh) for step in steps]
        found[f"{title}, by hand"] = min(audits, key=sent)
    rows = [traffic_row(title, other, ours) for title, other in found.items()]
    header = ("compiled program", "sent", "beside jaxplan", "as compiled", "GFLOP", "peak memory")
    print("Measured in the compiled programs, per device and step:\n")
    print("\n".join([*table(header, rows, range(1, len(header))), ""]))
    print(
        "sent: with the CPU compiler's all-reduce + slice read as the reduce-scatter it is on a TPU or GPU.\n"
        + "\n".join(notes)
    )
    return found


def sent(found: Audit) -> float:
    """Bytes sent per device and step, habits of the CPU compiler rewritten (see `jaxplan.hlo`)."""
    return math.fsum(found.by_kind(normalised=True).values())


def traffic_row(title: str, found: Audit, ours: Audit) -> Sequence[str]:
    """One line of the table."""
    beside = f"{sent(found) / sent(ours):.2f} x" if sent(ours) else "-"
    compiled, peak = show_bytes(found.total_wire_bytes), show_bytes(found.peak_bytes)
    return title, show_bytes(sent(found)), beside, compiled, f"{found.flops / 1e9:.2f}", peak


def main() -> int:
    """What the fresh process runs; its arguments were checked by the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mesh", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    mesh = {axis: int(size) for axis, size in re.findall(r"(\w+)=(\d+)", given.mesh)}
    if not given.json:
        return run(mesh, given.steps)
    with contextlib.redirect_stdout(sys.stderr):
        found = results(mesh, given.steps)
    print(json.dumps(found, indent=2))
    return 0 if found["agree"] else 1


if __name__ == "__main__":
    sys.exit(main())
