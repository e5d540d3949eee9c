"""Predictions beside what the real TPU compiler makes of the example programs, with no TPU: bytes sent and memory.

    pip install 'jaxplan[tpu]'
    python scripts/check_tpu.py [--topology v5e:4x4] [--mesh 4x4] [--size full] [--only decoder_scan ...]

Plans are for machine v5e, arguments that carry state are donated. Sent: MB per device and call over all axes. Memory: arguments +
outputs - aliased + temporaries of `memory_analysis()`, MiB per device. Large programs take minutes to compile.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax

import jaxplan
from jaxplan.examples import programs


def rows(names: Sequence[str], sizes: tuple[int, ...], size: Any, topology: str) -> Iterator[tuple[str, float, Any]]:
    """(program, modelled peak bytes, the plan beside what was compiled), one after the other."""
    mesh = jax.sharding.AbstractMesh(sizes, tuple("xyzw"[: len(sizes)]))
    for name in names:
        program = programs(size)[name]
        plan = jaxplan.make_plan(program.fn, *program.args, mesh=mesh, machine="v5e", donate_argnums=program.donate or None)
        yield name, plan.peak_bytes, plan.audit(topology=topology)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--mesh", default="4x4")
    parser.add_argument("--size", choices=["small", "full"], default="full")
    parser.add_argument("--only", nargs="+", default=list(programs()))
    options = parser.parse_args()
    sizes = tuple(int(size) for size in options.mesh.split("x"))
    head = ("program", "sent, predicted", "compiled", "ratio", "unplanned", "memory, modelled", "compiled", "ratio", "compiling")
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    errors, ratios = [], []
    start = time.perf_counter()
    for name, peak, found in rows(options.only, sizes, options.size, options.topology):
        took, start = time.perf_counter() - start, time.perf_counter()
        sent, compiled, allocated = found.predicted_bytes, math.fsum(found.compiled.values()), found.compiled_peak_bytes
        if max(sent, compiled):
            errors.append(abs(sent - compiled) / max(compiled, 1.0))
        ratios.append(peak / allocated)
        print(
            f"| {name} | {sent / 1e6:.3f} | {compiled / 1e6:.3f} | {sent / compiled if compiled else math.nan:.3f} "
            f"| {found.total('unplanned') / max(compiled, 1.0):.2%} | {peak / 2**20:.1f} | {allocated / 2**20:.1f} "
            f"| {peak / allocated:.2f} | {took:.0f} s |", flush=True,
        )  # fmt: skip
        for line in found.audit.unread:
            print(f"  not read in {name}: {line}", flush=True)
    off = [max(ratio, 1 / ratio) for ratio in ratios]
    print(
        f"\n{options.topology}, {options.size}: bytes off by {statistics.median(errors):.2%} in the median, {max(errors):.2%} at "
        f"worst; memory off by {statistics.median(off) - 1:.1%} in the median, {max(off):.2f} times at worst; at the most "
        f"{1 - min(ratios):.0%} under what was allocated"
    )


if __name__ == "__main__":
    main()
