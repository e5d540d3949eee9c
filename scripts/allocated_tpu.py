"""Modelled memory beside what the real TPU compiler allocates, read from its own log as soon as it has assigned buffers.

    pip install 'jaxplan[tpu]'
    python scripts/allocated_tpu.py [--only decoder_unrolled ...]

Generating code for a large program takes the TPU's compiler up to twenty minutes, assigning buffers seconds. So each program is
compiled in a process of its own, which logs its buffer assignment and is stopped when that is done. Allocated: arguments, outputs
that are not an argument's buffer, and the heap of temporaries in main memory with its gaps, counted once. MiB per device, on v5e.
The examples at full size on 4 x 4, state donated, and programs that are not among them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax

import jaxplan
from jaxplan.examples import decoder, mixture, mlp, programs
from jaxplan.topology import topology_mesh

MIB = 1 << 20
LOG = {"TPU_MIN_LOG_LEVEL": "0", "TPU_STDERR_LOG_LEVEL": "0", "TPU_VMODULE": "buffer_assignment=3"}
TEMPORARIES = re.compile(r"\] allocation \d+: size (\d+)(?:, page \d+)?, preallocated-temp")
Case = tuple[Callable[[], object], tuple[int, ...], str]


def cases() -> dict[str, Case]:
    """{name: (program, mesh, topology)}."""

    def layers(form="unrolled", **sizes):
        return lambda: decoder.decoder(replace(decoder.FULL, **sizes), form)

    def widths(*extents, batch):
        return lambda: mlp.mlp_sgd(mlp.MLPConfig(widths=extents, batch=batch, learning_rate=0.01))

    def experts(**sizes):
        return lambda: mixture.moe(replace(mixture.FULL, **sizes))

    wide = {"batch": 32, "width": 2048, "mlp_width": 6144, "vocabulary": 8000, "sequence": 512}
    square, two, one = ((4, 4), "v5e:4x4"), ((4, 2), "v5e:2x4"), ((8,), "v5e:2x4")
    found: dict[str, Case] = {name: (lambda name=name: programs("full")[name], *square) for name in programs()}
    return found | {
        "decoder of 4 layers": (layers(layers=4), *square),
        "decoder of 4 layers, on 8": (layers(layers=4, batch=32), *one),
        "decoder of 4 layers, sequence 512, batch 16, on 4 x 2": (layers(layers=4, batch=16, sequence=512), *two),
        "decoder of 4 layers, batch 16": (layers(layers=4, batch=16), *square),
        "decoder of 4 layers, MLP of width 1024": (layers(layers=4, mlp_width=1024), *square),
        "decoder of 4 layers, nothing rematerialised": (layers(layers=4, remat=False), *square),
        "decoder of 3 layers, width 2048": (layers(layers=3, **wide), *square),
        "scan of 4 layers": (layers("scan", layers=4), *square),
        "scan of 6 layers, width 2048": (layers("scan", layers=6, **wide), *square),
        "mlp 1024, 4096, 4096, 1024": (widths(1024, 4096, 4096, 1024, batch=4096), *square),
        "mlp 4096, three times 8192, 4096": (widths(4096, 8192, 8192, 8192, 4096, batch=8192), *square),
        "mlp 8192, 24576, 24576, 8192": (widths(8192, 24576, 24576, 8192, batch=4096), *square),
        "mlp 4096, 16384, 16384, 4096, on 4 x 2": (widths(4096, 16384, 16384, 4096, batch=1024), *two),
        "mlp 2048, four times 6144, 2048, on 8": (widths(2048, 6144, 6144, 6144, 6144, 2048, batch=16384), *one),
        "mixture of width 512, experts' 1024": (experts(width=512, expert_width=1024, batch=32), *square),
        "mixture of 32 experts, width 2048": (experts(width=2048, experts=32, batch=32), *square),
    }


def planned(name: str) -> tuple[jaxplan.Plan, object, str]:
    make, sizes, topology = cases()[name]
    program, mesh = make(), jax.sharding.AbstractMesh(sizes, tuple("xyzw"[: len(sizes)]))
    plan = jaxplan.make_plan(program.fn, *program.args, mesh=mesh, machine="v5e", donate_argnums=program.donate or None)
    return plan, program, topology


def compile_one(name: str) -> None:
    """What the child does: it is stopped in the middle."""
    plan, program, topology = planned(name)
    replace(plan, mesh=topology_mesh(topology, plan.axis_sizes)).jit().lower(*program.args).compile()
    print("compiled", flush=True)


def temporaries(name: str) -> int:
    """Bytes of the heap in main memory that the compiler assigns."""
    command = [sys.executable, __file__, "--compile", name]
    found, last, done = -1, "", False
    with subprocess.Popen(
        command, env={**os.environ, **LOG}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    ) as child:  # fmt: skip
        for line in child.stdout or ():
            last = line if line.strip() else last
            if "] BufferAssignment:" in line:
                found = 0
            elif found >= 0 and (size := TEMPORARIES.search(line)):
                found += int(size.group(1))
            done = found >= 0 and ("BufferAssignment stats" in line or line.startswith("compiled"))
            if done:
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    if not done:
        raise RuntimeError(f"{name}: the compiler's log has no buffer assignment; it ended with: {last.strip()[:300]}")
    return found


def rows(names: list[str]) -> Iterator[tuple[str, float, float]]:
    """(name, modelled, allocated) bytes per device."""
    for name in names:
        plan, _, _ = planned(name)
        yield name, plan.peak_bytes, plan.memory.arguments + plan.memory.outputs + temporaries(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(cases()), metavar="NAME")
    parser.add_argument("--compile", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        compile_one(options.compile)
        return
    print("| program | modelled | allocated | ratio |\n|---|---|---|---|")
    ratios: dict[str, float] = {}
    for name, modelled, allocated in rows(options.only):
        ratios[name] = modelled / allocated
        print(f"| {name} | {modelled / MIB:.1f} | {allocated / MIB:.1f} | {ratios[name]:.2f} |", flush=True)
    print(f"\nlibtpu {importlib.metadata.version('libtpu')}, jax {jax.__version__}")
    known = set(programs())
    for title, part in (("examples", known & set(ratios)), ("others", set(ratios) - known)):
        if part:
            off = [max(ratios[name], 1 / ratios[name]) for name in part]
            print(
                f"{title}: off by {statistics.median(off) - 1:.1%} in the median, {max(off):.2f} times at worst; from "
                f"{min(ratios[name] for name in part):.2f} to {max(ratios[name] for name in part):.2f}"
            )


if __name__ == "__main__":
    main()
