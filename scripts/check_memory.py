"""Modelled peak memory beside what XLA's CPU compiler allocates, for all example programs.

    python scripts/check_memory.py [--meshes 1 8 4x2 4x4]

Modelled: `plan.memory`. Compiled: arguments + outputs - aliased + temporaries of `memory_analysis()`, bytes per simulated
device. The machine is v5e with slower arithmetic and no latency, so that such small programs are worth sharding at all.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=16"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

import jaxplan
from jaxplan.examples import programs
from jaxplan.machine import PRESETS, Machine


def busy_machine() -> Machine:
    """On which small programs are worth sharding, and whose compiler is XLA's for CPU."""
    v5e = PRESETS["v5e"]
    slow = {dtype: 1e3 * seconds for dtype, seconds in v5e.seconds_per_flop.items()}
    inner, outer = (replace(link, latency_seconds=0.0) for link in (v5e.inner, v5e.outer))
    kept = {"materialises": True, "matmul_reads": {}, "tile": None, "near_bytes": 0.0, "in_order": False}
    return replace(v5e, name="busy", seconds_per_flop=slow, inner=inner, outer=outer, **kept)


def compiled_bytes(plan: Any, args: Any) -> float:
    """Bytes per device that the compiled program allocates."""
    found = plan.jit().lower(*args).compile().memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return float(held + found.temp_size_in_bytes)


def rows(meshes: list[tuple[int, ...]], names: list[str]) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """(program, mesh, modelled bytes, compiled bytes)."""
    for name in names:
        program = programs()[name]
        for shape in meshes:
            devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
            mesh = jax.sharding.Mesh(devices, tuple("xyzw"[: len(shape)]))
            plan = jaxplan.make_plan(program.fn, *program.args, mesh=mesh, machine=busy_machine())
            yield name, shape, plan.peak_bytes, compiled_bytes(plan, program.args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", nargs="+", default=["1", "8", "4x2", "4x4"])
    parser.add_argument("--only", nargs="+", default=sorted(programs()))
    options = parser.parse_args()
    print("| program | mesh | modelled KiB | compiled KiB | modelled / compiled |\n|---|---|---|---|---|")
    ratios = []
    for name, shape, modelled, compiled in rows([tuple(map(int, m.split("x"))) for m in options.meshes], options.only):
        ratios.append(modelled / compiled)
        where = "x".join(map(str, shape))
        print(f"| {name} | {where} | {modelled / 1024:.1f} | {compiled / 1024:.1f} | {ratios[-1]:.2f} |", flush=True)
    off = [max(ratio, 1 / ratio) for ratio in ratios]
    print(f"\n{len(ratios)} programs: off by {statistics.median(off) - 1:.1%} in the median, {max(off):.2f} times at worst")


if __name__ == "__main__":
    main()
