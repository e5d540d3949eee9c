"""What an ever smaller memory budget costs, and what it splits: every training example on one mesh, until nothing fits.

    python scripts/budget_path.py [--mesh 4x4] [--machine v5e] [--only decoder_scan ...]

Peak and its parts are modelled bytes per device; a budget is a share of what the plan without one takes. State is donated.
At the end: the processor time that a budget takes on top of planning without one, in multiples of the latter with its tracing.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

import jaxplan
from jaxplan.examples import programs

SHARES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
KINDS = ("parameters", "other state", "other arguments", "outputs", "gradients", "activations", "transients")


def path(name: str, mesh: jax.sharding.AbstractMesh, machine: str) -> Iterator[tuple[float, jaxplan.Plan, float]]:
    """(share, plan, processor seconds that took), the plan without a budget first; ends with the least that anything takes."""
    program = programs("full")[name]
    start = time.process_time()
    free = jaxplan.make_plan(
        program.fn, *program.args, mesh=mesh, machine=machine, memory_budget=math.inf, donate_argnums=program.donate or None
    )
    yield 1.0, free, time.process_time() - start
    for share in SHARES:
        start = time.process_time()
        try:
            plan = free.replan(memory_budget=share * free.peak_bytes)
        except jaxplan.NothingFits as error:
            yield error.smallest / free.peak_bytes, free.replan(memory_budget=error.smallest), 0.0
            return
        yield share, plan, time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", default="4x4")
    parser.add_argument("--machine", default="v5e")
    parser.add_argument("--only", nargs="+", default=[name for name, program in programs().items() if program.donate])
    options = parser.parse_args()
    sizes = tuple(int(size) for size in options.mesh.split("x"))
    mesh = jax.sharding.AbstractMesh(sizes, tuple("xyzw"[: len(sizes)]))
    print(f"| program | budget | modelled step | peak | {' | '.join(f'{kind}, MiB' for kind in KINDS)} |")
    print("|---" * (4 + len(KINDS)) + "|")
    slowest, times = 0.0, []
    for name in options.only:
        free, alone, budgets = None, 0.0, []
        for share, plan, took in path(name, mesh, options.machine):
            if free is None:
                free, alone = plan, took
            elif took:
                budgets.append(took)
            held, slowest = plan.ledger.by_kind, max(slowest, *budgets, 0.0)
            cells = " | ".join(f"{held.get(kind, 0.0) / 2**20:.1f}" for kind in KINDS)
            ratios = f"{plan.seconds / free.seconds:.3f} | {plan.peak_bytes / free.peak_bytes:.3f}"
            print(f"| {name} | {share:.2f} | {ratios} | {cells} |", flush=True)
        if budgets:
            times.append(f"{name} {min(budgets) / alone:.1f} to {max(budgets) / alone:.1f} ({alone:.2f} s)")
    print(
        f"\nOn {options.mesh}, {options.machine}; step and peak as multiples of the plan without a budget; the last row of a "
        f"program is the smallest budget that anything was found for. Fitting one budget took {slowest:.1f} s of "
        f"processor time at most; in multiples of tracing and planning without one: {', '.join(times)}."
    )


if __name__ == "__main__":
    main()
