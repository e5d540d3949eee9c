"""How long planning takes beside tracing, in one run, as ratios.

    python scripts/bench_planning.py [--repeat 3] [--depths 12,24,48,96]

Planning is graph + model + search + whether that fits into a device's memory, without tracing; medians over `--repeat`
repetitions, JAX's caches cleared before each. Machines are noisy: read the ratios, not the seconds.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import AbstractMesh

import jaxplan
from jaxplan.examples.decoder import FULL, decoder

MESHES = [[(8,), (64,), (4096,), (65536,)], [(4, 2), (16, 16), (64, 64), (256, 256)]]


def measure(make: Callable[[], Any], mesh: tuple[int, ...], repeat: int, budget: float | None = None) -> tuple[float, float]:
    """(median seconds of tracing, median seconds of planning). `budget`: bytes per device; None: the machine's memory."""
    traced, planned = [], []
    for _ in range(repeat):
        jax.clear_caches()
        program = make()
        abstract = AbstractMesh(mesh, tuple("xyzw"[: len(mesh)]))
        plan = jaxplan.make_plan(program.fn, *program.args, mesh=abstract, machine="v4", memory_budget=budget)
        traced.append(plan.stages["trace"])
        planned.append(sum(value for name, value in plan.stages.items() if name != "trace"))
    return statistics.median(traced), statistics.median(planned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--depths", default="12,24,48,96")
    options = parser.parse_args()
    base = replace(FULL, batch=64)
    print("form               tracing s  planning s  planning/tracing   (goal: at most 1)")
    for form in ("scan", "unrolled"):
        for batch in (64, 8):
            config = replace(base, batch=batch)
            trace, plan = measure(lambda config=config, form=form: decoder(config, form), (4, 4), options.repeat)
            print(f"{form:10s} batch {batch:2d} {trace:9.3f} {plan:11.3f} {plan / trace:17.2f}", flush=True)
    # so many layers take more than a device of these has: fitting them is told apart
    print("\nunrolled layers    tracing s  planning s   grown by: tracing  planning   (goal: planning no faster)   fitted, s")
    first: tuple[float, float] | None = None
    for depth in map(int, options.depths.split(",")):
        config = replace(base, layers=depth)
        trace, plan = measure(lambda config=config: decoder(config, "unrolled"), (4, 4), options.repeat, math.inf)
        _, fitted = measure(lambda config=config: decoder(config, "unrolled"), (4, 4), options.repeat)
        first = first or (trace, plan)
        grown = f"{trace / first[0]:19.2f} {plan / first[1]:9.2f}"
        print(f"{depth:15d} {trace:12.3f} {plan:11.3f} {grown} {fitted:39.3f}", flush=True)
    print("\ndevices            planning s   grown by          (goal: less than 1.5 from 8 to 65,536, on as many axes)")
    for family in MESHES:
        start = 0.0
        for mesh in family:
            # a batch for 65,536 devices does not fit into the memory of 8
            _, plan = measure(lambda: decoder(replace(base, batch=65536), "scan"), mesh, options.repeat, math.inf)
            start = start or plan
            print(f"{'x'.join(map(str, mesh)):15s} {plan:13.3f} {plan / start:10.2f}", flush=True)


if __name__ == "__main__":
    main()
