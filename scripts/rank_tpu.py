"""Whether plans that the model calls slower are slower to the real TPU compiler: rank correlation, with no TPU.

    pip install 'jaxplan[tpu]'
    python scripts/rank_tpu.py [--topology v5e:4x4] [--mesh 4x4]

Several plans of each of a few programs, which differ in the layouts that are insisted on. Modelled: `plan.seconds` on machine
v5e. Compiled: the sum of the compiler's own `estimated_cycles` over all kernels, loops multiplied out, at the clock below, plus
the bytes that are sent over each mesh axis at the machine's rate for it, plus its latencies. Reported: Spearman's rank
correlation over all plans, and over those of each program; what comes out as the same plan is counted once.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from jax.sharding import PartitionSpec as P
from scipy.stats import spearmanr

import jaxplan
from jaxplan.compare import sent_by_axis
from jaxplan.examples import Program, conjugate_gradient, decode, mixture, mlp, stencil
from jaxplan.machine import PRESETS, axis_links

CLOCK = 1.5e9
"""Cycles a second of a v5e core: 197e12 FLOP/s over 4 matrix units of 128 x 128 multiply-adds (jax-ml.github.io/scaling-book)."""
ROUNDS = {"all-reduce": 2}
"""Supersteps of a collective; 1 where not listed."""


@dataclass(frozen=True)
class Ranked:
    """One plan: what the model says of it, and what the compiler does; seconds per call."""

    program: str
    pins: str
    modelled: float
    compiled: float


def programs() -> list[tuple[Program, Sequence[Mapping[str, Any]]]]:
    """Programs, and per plan the inputs whose layout is insisted on."""
    network = mlp.mlp_sgd(mlp.MLPConfig(widths=(1024, 4096, 4096, 1024), batch=4096))
    experts = mixture.moe(replace(mixture.FULL, width=512, expert_width=1024, batch=32))
    token = decode.decode_kv(decode.FULL)
    solver = conjugate_gradient.conjugate_gradient(conjugate_gradient.FULL)
    grid = stencil.stencil(stencil.FULL)
    return [
        (network, ({}, {"x": P("x"), "params/1/w": P(None, "y")}, {"x": P(), "params/1/w": P("x", "y")})),
        (experts, ({}, {"x": P(("x", "y"))}, {"x": P("x"), "params/w_up": P("y")})),
        (token, ({}, {"cache/k": P(None, "x"), "cache/v": P(None, "x")}, {"cache/k": P(), "cache/v": P()})),
        (solver, ({}, {"matrix": P("x", "y")}, {"matrix": P("x"), "b": P("x")})),
        (grid, ({}, {"u": P("x"), "f": P("x")}, {"u": P("x", "y"), "f": P("x", "y")})),
    ]


def compiled_seconds(plan: Any, topology: str) -> float:
    """Of one call: kernels as the compiler estimates them, and what is sent, one after the other."""
    audit = plan.audit(topology=topology).audit
    links = axis_links(PRESETS["v5e"], plan.axis_sizes)
    seconds = math.fsum(kernel.cycles * times for kernel, times in audit.kernels) / CLOCK
    for collective in audit.normalised:
        for axis, sent in sent_by_axis(collective, plan.axis_sizes, list(plan.axis_sizes)).items():
            latency = ROUNDS.get(collective.kind, 1) * links[axis].latency_seconds
            seconds += collective.times * (sent * links[axis].seconds_per_byte + latency)
    return seconds


def ranked(sizes: tuple[int, ...], topology: str) -> Iterator[Ranked]:
    """All plans, compiled one after the other."""
    mesh = jax.sharding.AbstractMesh(sizes, tuple("xyzw"[: len(sizes)]))
    for program, choices in programs():
        seen = set()
        for pins in choices:
            plan = jaxplan.make_plan(
                program.fn, *program.args, mesh=mesh, machine="v5e", donate_argnums=program.donate or None,
                memory_budget=math.inf, pins=dict(pins) or None,
            )  # fmt: skip
            made = repr((sorted(plan.layouts.items()), plan.in_specs, plan.out_specs))
            if made in seen:
                continue
            seen.add(made)
            told = ", ".join(f"{path}: {tuple(spec)}" for path, spec in pins.items()) or "none"
            yield Ranked(program.name, told, plan.seconds, compiled_seconds(plan, topology))


def correlation(rows: Sequence[Ranked]) -> float:
    """Spearman's, of modelled and compiled seconds."""
    if len(rows) < 2:
        return math.nan
    return float(spearmanr([row.modelled for row in rows], [row.compiled for row in rows]).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--mesh", default="4x4")
    options = parser.parse_args()
    print("| program | pinned | modelled, ms | compiler's, ms | ratio |\n|---|---|---|---|---|")
    rows = []
    for row in ranked(tuple(int(size) for size in options.mesh.split("x")), options.topology):
        rows.append(row)
        told = f"{row.modelled * 1e3:.4f} | {row.compiled * 1e3:.4f} | {row.modelled / row.compiled:.2f}"
        print(f"| {row.program} | {row.pins} | {told} |", flush=True)
    names = list(dict.fromkeys(row.program for row in rows))
    each = ", ".join(f"{name} {correlation([row for row in rows if row.program == name]):.2f}" for name in names)
    print(f"\n{len(rows)} plans of {len(names)} programs: rank correlation {correlation(rows):.3f}; by program: {each}")


if __name__ == "__main__":
    main()
