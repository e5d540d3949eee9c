"""Stages of unlike layers, modelled beside compiled and measured: memory of every stage, exchanges, and the bubble.

    python scripts/check_stages.py [--memory] [--exchanges] [--bubble] [--only NAME ...] [--meshes 2x2x2 2x4]
                                   [--microbatches 1 2 4 8] [--width 96]

The programs are those of `tests/unlike_programs.py`, wider than there; stages lie along x. The machine is that of
`scripts/check_memory.py`: v5e with slower arithmetic and no latency, so that such small programs are worth sharding at all.

`--memory`: the train step is run once, its state donated. Before each part of a stage starts, the arrays that lie on the stage's
first device are counted; results and temporaries of the part are what XLA's `memory_analysis` says. `held` is the most there ever
was. Stages that hold less than 16 KiB (with a single micro-batch the fastest cut may leave almost nothing to one) are left out.

`--exchanges`: `plan.audit()`, without running: bytes sent per call by axis, of a device of each stage, added up.

`--bubble`: a residual network in four stages, cut where 8 micro-batches are fastest, for 1 to 16 of them. Simulated devices share
the host's cores, and a stage that waits computes nothing, so neither wall time nor processor time shows the bubble. Measured is
the processor time of every part, run alone; the step is what these parts take in the order in which they are handed out, each as
soon as its stage is free and what it waits for is there. Handing values on takes no time in it. All numbers of micro-batches
are measured in turn, again and again; ratios are medians of those of one turn. `a row each`: the same with as many micro-batches
of a single row: what parts take that does not shrink with the rows. A part is called from Python, and every kernel of it started;
the model knows nothing of either. `calls alone`: each part a program with as many arguments and results that computes nothing.
"""

from __future__ import annotations

import argparse
import os
import runpy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

import jaxplan
from jaxplan import hybrid
from jaxplan.api import StagedPlan
from jaxplan.pipeline import PipelineError
from jaxplan.unlike import choose
from jaxplan.unlike.nouns import FORWARD
from jaxplan.unlike.order import order
from jaxplan.unlike.run import Slice, StagedRun

HERE = Path(__file__).parent
PROGRAMS = runpy.run_path(str(HERE.parent / "tests" / "unlike_programs.py"))
MEMORY = runpy.run_path(str(HERE / "check_memory.py"))
WIDER: Mapping[str, Mapping[str, int]] = {
    "unet": {"width": 16, "batch": 32},
    "residual_network": {"width": 16, "batch": 32},
    "encoder_decoder": {"width": 32, "batch": 32, "length": 16},
    "mixer": {"width": 32, "tokens": 20, "batch": 24},
    "tagger": {"width": 28, "length": 24, "batch": 24},
}
"""The last two were written after the model, to see it fail."""
SMALL = 16 * 1024
STAGES, ROWS, COUNTS = 4, 256, (1, 2, 4, 8, 16)


def planned(name: str, shape: Sequence[int], m: int, **options: Any) -> tuple[Any, Any]:
    """(plan in stages of unlike layers, arguments), also where a program's layers are enough alike for a loop."""
    step, args = PROGRAMS[name](**WIDER[name])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args)
    asked = {"machine": MEMORY["busy_machine"](), "donate_argnums": 0, **options}

    def refused(*given: Any) -> Any:
        raise PipelineError("not asked for")

    with mock.patch.object(hybrid, "forced_groups", refused):
        plan = jaxplan.make_plan(step, *shapes, mesh=MEMORY["mesh_of"](tuple(shape)), pipeline="x", microbatches=m, **asked)
    return plan, args


def pieces(run: StagedRun) -> dict[int, tuple[int, str]]:
    """{id of a piece: (stage, what it is called)}."""
    found = {}
    for number, stage in enumerate(run.stages):
        named = {"prepare": stage.first, **stage.phases, **{f"update {k}": piece for k, piece in enumerate(stage.updates)}}
        found.update({id(piece): (number, name) for name, piece in named.items()})
    return found


def watched(function: Any, args: Any, watch: Callable[[int, str, Slice, Any, Callable[[], None]], None]) -> None:
    """Run a planned function. `watch(stage, name, piece, values, run)` is called in the place of every piece, and runs it."""
    run, names, plain = function._run, pieces(function._run), Slice.__call__
    leaves = jax.tree.leaves(args)

    def call(piece: Slice, env: Any) -> None:
        watch(*names[id(piece)], piece, env, lambda: plain(piece, env))

    with mock.patch.object(Slice, "__call__", call):
        placed = [jax.device_put(leaf, place) for leaf, place in zip(leaves, function._ins, strict=True)]
        jax.block_until_ready(run(placed))


def lying(device: Any) -> dict[int, int]:
    """{address: bytes} of the arrays on a device."""
    shards = [shard for array in jax.live_arrays() if not array.is_deleted() for shard in array.addressable_shards]
    return {s.data.unsafe_buffer_pointer(): s.data.nbytes for s in shards if s.device == device}


def held(plan: Any, args: Any) -> dict[int, int]:
    """{stage: the most bytes on its first device}."""
    args = jax.tree.map(lambda leaf: leaf if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.array(leaf), args)
    devices = [next(iter(one.mesh.devices.flat)) for one in plan.stage_plans]
    before = {device: lying(device) for device in devices}
    most: dict[int, int] = {}

    def watch(stage: int, name: str, piece: Slice, env: Any, go: Callable[[], None]) -> None:
        here = lying(devices[stage])
        own = sum(nbytes for address, nbytes in here.items() if address not in before[devices[stage]])
        found = piece.run.lower(*[env[v] for v in piece.reads]).compile().memory_analysis()
        own += found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes
        most[stage] = max(most.get(stage, 0), own)
        go()

    watched(plan.jit(), args, watch)
    return most


def cases(options: argparse.Namespace) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(program, mesh, micro-batches)."""
    for name in options.only:
        for mesh in options.meshes:
            for m in options.microbatches:
                yield name, tuple(map(int, mesh.split("x"))), m


def memory(options: argparse.Namespace) -> None:
    """The table of `--memory`."""
    print("| program | mesh | m | stage | modelled KiB | held KiB | modelled / held |\n|---|---|---:|---:|---:|---:|---:|")
    ratios = []
    for name, shape, m in cases(options):
        plan, args = planned(name, shape, m)
        for stage, nbytes in sorted(held(plan, args).items()):
            if nbytes >= SMALL:
                modelled = plan.staged.peaks[stage]
                ratios.append(modelled / nbytes)
                where = "x".join(map(str, shape))
                sizes = f"{modelled / 1024:.1f} | {nbytes / 1024:.1f} | {ratios[-1]:.2f}"
                print(f"| {name} | {where} | {m} | {stage} | {sizes} |", flush=True)
    off = [max(ratio, 1 / ratio) for ratio in ratios]
    within = sum(one <= 1.15 for one in off)
    print(f"\n{len(ratios)} stages: off by {statistics.median(off) - 1:.1%} in the median, {max(off):.2f} times at worst; "
          f"{within} within 15%")  # fmt: skip


def exchanges(options: argparse.Namespace) -> None:
    """The table of `--exchanges`."""
    print("| program | mesh | m | axis | kB planned | kB compiled | error | unplanned |\n|---|---|---:|---|---:|---:|---:|---:|")
    errors = []
    for name, shape, m in cases(options):
        plan, _ = planned(name, shape, m)
        found = plan.audit()
        for axis, sent in found.compiled.items():
            if sent or found.predicted.get(axis):
                errors.append(found.errors[axis])
                sizes = f"{found.predicted[axis] / 1e3:.2f} | {sent / 1e3:.2f} | {errors[-1]:.2%} | {found.largest_unplanned:.2%}"
                print(f"| {name} | {'x'.join(map(str, shape))} | {m} | {axis} | {sizes} |", flush=True)
    print(f"\n{len(errors)} axes: off by {statistics.median(errors):.2%} in the median, {max(errors):.2%} at worst")


def replayed(took: Mapping[tuple[int, str], float], stages: int, m: int) -> float:
    """Seconds of a call whose parts take so long, each starting as soon as its stage is free and what it waits for is there."""
    free = {stage: took[stage, "prepare"] for stage in range(stages)}
    done: dict[tuple[int, str, int], float] = {}
    for stage, phase, row in order(stages, m):
        before = done.get((stage - 1 if phase == FORWARD else stage + 1, phase, row), 0.0)
        free[stage] = done[stage, phase, row] = max(free[stage], before) + took[stage, phase]
    last = {stage: sum(t for (s, name), t in took.items() if s == stage and name.startswith("update")) for stage in free}
    return max(free[stage] + last[stage] for stage in free)


def alone(piece: Slice, known: dict[int, Any]) -> Callable[[Any], None]:
    """What calls a program that takes what a piece takes, gives as many results, and computes nothing."""
    if id(piece) not in known:
        count = len(piece.leaves)
        known[id(piece)] = jax.jit(lambda *_: [jax.numpy.zeros(())] * count, keep_unused=True)
    return lambda env: jax.block_until_ready(known[id(piece)](*[env[v] for v in piece.reads]))


def staged(width: int, rows: int, m: int, cuts: Sequence[int] | None) -> tuple[Any, Callable[..., float]]:
    """(a plan of so many stages and micro-batches, what measures the seconds of a call; `empty`: of its parts' calls alone).
    `cuts`: None for the best."""
    step, args = PROGRAMS["residual_network"](width=width, batch=rows)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args)
    asked = {"mesh": MEMORY["mesh_of"]((STAGES,)), "machine": "cpu", "pipeline": "x", "microbatches": m}
    with mock.patch.object(choose, "_cut", choose._cut if cuts is None else lambda asked, micro: (0.0, micro, cuts)):
        plan = jaxplan.make_plan(step, *shapes, **asked)
    function, known = plan.jit(), dict[int, Any]()

    def measure(empty: bool = False) -> float:
        took: dict[tuple[int, str], list[float]] = {}

        def watch(stage: int, name: str, piece: Slice, env: Any, go: Callable[[], None]) -> None:
            jax.block_until_ready([env[v] for v in piece.reads])
            if empty:
                call = alone(piece, known)
                call(env)  # the first one compiles
                start = time.process_time()
                call(env)
                took.setdefault((stage, name), []).append(time.process_time() - start)
                return go()
            start = time.process_time()
            go()
            jax.block_until_ready([env[v] for v in piece.leaves])
            took.setdefault((stage, name), []).append(time.process_time() - start)

        watched(function, args, watch)
        return replayed({key: statistics.median(found) for key, found in took.items()}, STAGES, m)

    return plan, measure


def bubble(width: int, repeat: int) -> None:
    """The table of `--bubble`."""
    first, _ = staged(width, ROWS, 8, None)
    assert isinstance(first, StagedPlan)
    cuts, last = first.staged.parts.cuts, COUNTS[-1]
    runs = {m: staged(width, ROWS, m, cuts) for m in COUNTS}
    least = {m: staged(width, m, m, cuts) for m in COUNTS if m > 1}  # no single row for a batch of one
    turns = [
        ({m: measure() for m, (_, measure) in runs.items()}, {m: measure() for m, (_, measure) in least.items()})
        for _ in range(repeat + 1)
    ][1:]  # the first one compiles
    empty = {m: measure(empty=True) for m, (_, measure) in runs.items()}
    print("| m | (m+k-1)/m | modelled | measured | modelled, to m=16 | measured, to m=16 | a row each | calls alone |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for m, (plan, _) in runs.items():
        times = f"{plan.seconds * 1e3:.2f} ms | {statistics.median(whole[m] for whole, _ in turns) * 1e3:.1f} ms"
        ratio = statistics.median(whole[m] / whole[last] for whole, _ in turns)
        row = f"{statistics.median(rows[m] for _, rows in turns) * 1e3:.1f} ms" if m in least else ""
        told = f"{plan.seconds / runs[last][0].seconds:.2f} | {ratio:.2f} | {row} | {empty[m] * 1e3:.1f} ms"
        print(f"| {m} | {(m + STAGES - 1) / m:.2f} | {times} | {told} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--exchanges", action="store_true")
    parser.add_argument("--bubble", action="store_true")
    parser.add_argument("--only", nargs="+", default=list(WIDER), choices=list(WIDER))
    parser.add_argument("--meshes", nargs="+", default=["2x2x2", "2x4"])
    parser.add_argument("--microbatches", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--width", type=int, default=96, help="channels, with --bubble")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    everything = not (options.memory or options.exchanges or options.bubble)
    if options.memory or everything:
        memory(options)
    if options.exchanges or everything:
        exchanges(options)
    if options.bubble or everything:
        bubble(options.width, options.repeat)


if __name__ == "__main__":
    main()
