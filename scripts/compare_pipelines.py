"""GPT-shaped models on many devices: hybrids beside pure data, tensor and pipeline parallelism, and what planning takes.

    python scripts/compare_pipelines.py [--machine a100|h100|v4|p3] [--only 39B] [--axes 3] [--batch 16] [--bubble]

Shapes only: nothing is run and no device is needed. Sizes are those of the GPT models of "Alpa: Automating Inter- and Intra-
Operator Parallelism for Distributed Deep Learning" (Zheng et al., OSDI 2022): sequence 1024, vocabulary 51200; `--batch` rows
per device, parameters and AdamW's moments in float32, activations in bfloat16, every layer rematerialised, nodes of eight
devices. `p3` is the machine of that paper: V100 GPUs of 16 GB, NVLink within a node, and 25 Gb/s of network for the eight of
a node.

`data`: the batch over all devices, the state on each. `tensor`: heads, MLP columns and vocabulary over all. `pipeline`: all
devices along the layers. `one level`: `jaxplan.best_mesh` with no pipeline. `hybrid`: the same with everything left to it.
Planning seconds are processor time, of all meshes together. A mark says that a plan does not fit: it is the best without a
memory limit.

`piper`, `alpa`: the published programs over chains (`jaxplan.search.piper`), on tables of the same cost model (`tabled`), within
the machine's memory; "3 of 2x4" are three stages of two by four devices, data- by tensor-parallel. How they differ from a
hybrid of ours is told in docs/hybrid.md.

`--bubble` measures instead: a small decoder in four stages on simulated devices, for 1 to 16 micro-batches, beside the modelled
step and the bubble alone. What can be measured so is told at `bubble`.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P

import jaxplan
from jaxplan.examples.adamw import adamw_update
from jaxplan.examples.by_hand import data_parallel, megatron
from jaxplan.examples.decoder import FULL, SMALL, DecoderConfig, decoder, decoder_loss, decoder_train_step
from jaxplan.graph.flatten import BOUNDARY
from jaxplan.machine import axis_links, machine as find_machine
from jaxplan.pipeline import pipeline_of
from jaxplan.pipeline.nouns import SCHEDULES
from jaxplan.search.piper import Layer, Staged, alpa_stages, piper
from jaxplan.unlike.cuts import seconds_by

MODELS = {
    "1.3B": (8, {"layers": 24, "width": 2048, "heads": 32}),
    "2.6B": (8, {"layers": 32, "width": 2560, "heads": 32}),
    "6.7B": (16, {"layers": 32, "width": 4096, "heads": 32}),
    "15B": (32, {"layers": 48, "width": 5120, "heads": 40}),
    "39B": (64, {"layers": 48, "width": 8192, "heads": 64}),
}
"""{name: (devices, sizes)}."""
P3 = jaxplan.Machine(
    "p3", {"bfloat16": 1 / 1.25e14, "float16": 1 / 1.25e14, "float32": 1 / 1.57e13}, 1 / 9e11, 16e9,
    inner=jaxplan.Link(1 / 1.5e11, 3e-6, "NVLink of a V100, one way (NVIDIA V100 datasheet: 300 GB/s both ways)"),
    outer=jaxplan.Link(8 * 8 / 25e9, 3e-5, "25 Gb/s per node of 8 (AWS p3.16xlarge), shared; latency of TCP"), node=8,
)  # fmt: skip
ALPA_SECONDS = 2393.0
"""Alpa's compile time for GPT-39B on 64 GPUs, with its optimizations (Table 5 of the paper)."""
STEP = "| {:6} | {:>7} | {:8} | {:32} | {:>10} | {:>9} | {:>8} |"


def config_of(devices: int, sizes: Mapping[str, int], rows: int) -> DecoderConfig:
    """A GPT of these sizes, with so many rows of the batch per device."""
    return replace(
        FULL, **sizes, mlp_width=4 * sizes["width"], vocabulary=51200, sequence=1024, batch=rows * devices,
        compute_dtype=jnp.dtype("bfloat16"),
    )  # fmt: skip


def constrained(config: DecoderConfig, mesh: AbstractMesh, plan: Any) -> Any:
    """The hook of the decoder that says an expert's layouts."""
    found = plan(config, mesh)

    def constrain(where: str, x: jax.Array) -> jax.Array:
        for spec in found.places.get(where, ()):
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
        return x

    return constrain


def by_hand(config: DecoderConfig, mesh: AbstractMesh, plan: Any) -> Any:
    """The train step with an expert's layouts written into it."""
    return decoder_train_step(config, constrained(config, mesh, plan))


TENSOR, DATA, GROUPS, SIZES = (1, 2, 4, 8), (1, 2, 4, 8, 16), 6, (8, 16)
"""Degrees in the tables; runs of layers that stages are made of, about; rows of a micro-batch."""


def passed(config: DecoderConfig, tensor: int, rows: int, machine: jaxplan.Machine) -> tuple[float, float]:
    """Modelled seconds forward and backward of so many rows on a Megatron group of devices: (of a layer; of embedding, head and
    loss)."""
    few = replace(config, layers=2, batch=rows)
    mesh = AbstractMesh((tensor,), ("tensor",))
    constrain = constrained(few, mesh, megatron)

    def gradients(params: Any, batch: Any) -> Any:
        return jax.value_and_grad(decoder_loss)(params, batch, few, constrain)

    params, _, batch = decoder(few).args
    asked = {"mesh": mesh, "machine": machine, "pins": {"batch": P()}, "pipeline": None, "memory_budget": math.inf}
    plan = jaxplan.make_plan(gradients, params, batch, **asked)
    operators, clusters = plan.modelled.graph.operators, plan.modelled.graph.clusters
    loops = {op.path[:-2] for op in operators if op.name == BOUNDARY}
    looped = [any(operators[c.members[-1]].path[:n] in loops for n in range(1, 8)) if c.members else False for c in clusters]
    table = seconds_by(plan, looped.__getitem__)
    return table.get(True, 0.0) / few.layers, table.get(False, 0.0)


def tabled(
    config: DecoderConfig, rows: int, machine: jaxplan.Machine, met: dict[tuple[int, int], tuple[float, float]]
) -> list[Layer]:
    """What `piper` and `alpa_stages` are given, for micro-batches of so many rows: runs of layers, and as the last one embedding
    and head. `met`: grows by what was planned.

    A layer's seconds are those of a plan by our model, under Megatron's layouts, on a device's share of the rows. State:
    parameters, gradients and two moments in float32. Kept: the bfloat16 rows that enter a layer; of the head its logits, twice in
    float32. At the end of a call gradients are added up over the data-parallel degree, and AdamW passes over the state: seven
    times the parameters' bytes.
    """
    run = max(1, config.layers // GROUPS)
    block = 4 * (4 * config.width * config.width + 2 * config.width * config.mlp_width)
    ends, act = 4 * config.width * (config.vocabulary + config.sequence), 2 * config.sequence * config.width
    seconds = [dict[tuple[int, int], float]() for _ in range(2)]
    synced = [dict[tuple[int, int], float]() for _ in range(2)]
    kept = [dict[tuple[int, int], float]() for _ in range(2)]
    for tensor in TENSOR:
        for data in [d for d in DATA if rows % d == 0 and config.heads % tensor == 0]:
            pair, own = (data, tensor), (tensor, rows // data)
            if own not in met:
                met[own] = passed(config, *own, machine)
            layer, rest = met[own]
            link = axis_links(machine, {"data": data, "tensor": tensor})["data"] if data > 1 else None
            for k, (nbytes, times, one) in enumerate(((block, run, layer), (ends, 1, rest))):
                seconds[k][pair] = times * one
                added = 2 * (data - 1) / data * nbytes / tensor * link.seconds_per_byte if link is not None else 0.0
                synced[k][pair] = times * (added + 7 * nbytes / tensor * machine.seconds_per_byte)
            kept[0][pair] = run * act * rows / data
            kept[1][pair] = 8 * config.sequence * config.vocabulary * rows / data / tensor
    state = [{tensor: 4 * times * nbytes / tensor for tensor in TENSOR} for nbytes, times in ((block, run), (ends, 1))]
    layer, last = (Layer(*tables) for tables in zip(seconds, state, kept, synced, strict=True))
    return [layer] * (config.layers // run) + [last]


def published(config: DecoderConfig, devices: int, machine: jaxplan.Machine, name: str) -> None:
    """The rows of `piper` and `alpa`: the fastest of the sizes of micro-batches."""
    met: dict[tuple[int, int], tuple[float, float]] = {}
    start = time.process_time()
    tables = {rows: tabled(config, rows, machine, met) for rows in SIZES}
    planned = time.process_time() - start
    for strategy, search in (("piper", piper), ("alpa", alpa_stages)):
        start, found = time.process_time(), list[tuple[Staged, int]]()
        for rows, layers in tables.items():
            m = config.batch // rows
            with contextlib.suppress(ValueError):  # nothing fits with micro-batches of so many rows
                found.append((search(layers, devices, m, machine.memory_bytes), m))
        took = f"{planned + time.process_time() - start:.1f}"
        if not found:
            print(STEP.format(name, devices, strategy, "nothing fits", "-", "-", took), flush=True)
            continue
        staged, m = min(found, key=lambda one: one[0].seconds)
        degrees = Counter(f"{stage.data}x{stage.tensor}" for stage in staged.stages)
        told = f"{' + '.join(f'{n} of {pair}' for pair, n in degrees.items())}, m={m}"
        print(STEP.format(name, devices, strategy, told, f"{staged.seconds:.3f}", "-", took), flush=True)


def pure(name: str, config: DecoderConfig, devices: int, machine: jaxplan.Machine) -> tuple[Any, float]:
    """(plan or why there is none, seconds of processor time that planning it took)."""
    mesh = AbstractMesh((devices,), (name,))
    args = decoder(config).args
    options: dict[str, Any] = {"mesh": mesh, "machine": machine, "donate_argnums": (0, 1), "pipeline": None}
    start = time.process_time()
    try:
        fn = decoder_train_step(config)
        if name == "data":
            fn = by_hand(config, mesh, data_parallel)
            options["pins"] = {"params": P(), "opt_state": P(), "batch": P(name)}
        elif name == "tensor":
            fn = by_hand(config, mesh, megatron)
            options["pins"] = {"batch": P()}
        else:
            options["pipeline"] = name
        plan = jaxplan.make_plan(fn, *args, memory_budget=math.inf, **options)
    except ValueError as error:
        plan = str(error)
    return plan, time.process_time() - start


def told(plan: Any) -> str:
    """The mesh of a plan, and its pipeline."""
    sizes = "x".join(map(str, plan.axis_sizes.values()))
    staged = plan.pipeline
    return sizes if staged is None else f"{sizes}, {staged.stages} stages on {staged.axis}, m={staged.microbatches}"


def table(options: argparse.Namespace) -> None:
    """All models and strategies."""
    machine = P3 if options.machine == "p3" else find_machine(options.machine)
    limit = machine.memory_bytes
    header = ("model", "devices", "strategy", "mesh", "step, s", "peak, GB", "plan, s")
    print(STEP.format(*header))
    print(STEP.format(*["---"] * len(header)))
    for name, (devices, sizes) in MODELS.items():
        if options.only and name not in options.only.split(","):
            continue
        config = config_of(devices, sizes, options.batch)
        for strategy in ("data", "tensor", "pipeline"):
            plan, took = pure(strategy, config, devices, machine)
            if isinstance(plan, str):
                why = plan.partition(":")[2].strip() or plan
                print(STEP.format(name, devices, strategy, why[:32], "-", "-", "-"), flush=True)
                continue
            over = "" if plan.peak_bytes <= limit else " !"
            cells = (f"{plan.seconds:.3f}", f"{plan.peak_bytes / 1e9:.1f}{over}", f"{took:.1f}")
            print(STEP.format(name, devices, strategy, told(plan), *cells), flush=True)
        published(config, devices, machine, name)
        program = decoder(config)
        for strategy, pipeline in (("one level", None), ("hybrid", "auto")):
            start = time.process_time()
            try:
                found = jaxplan.best_mesh(
                    program.fn, *program.args, devices=devices, machine=machine, axis_names=("x", "y", "z")[: options.axes],
                    donate_argnums=(0, 1), pipeline=pipeline,
                )  # fmt: skip
            except ValueError as error:
                took = f"{time.process_time() - start:.1f}"
                print(STEP.format(name, devices, strategy, str(error)[:32], "-", "-", took), flush=True)
                continue
            took, best = time.process_time() - start, found.best
            cells = (f"{best.seconds:.3f}", f"{best.peak_bytes / 1e9:.1f}", f"{took:.1f}")
            print(STEP.format(name, devices, strategy, told(best), *cells), flush=True)
        if name == "39B":
            print(f"  Alpa: {ALPA_SECONDS:,.0f} s of compiling and profiling for this model on as many devices")


MICROBATCHES = (1, 2, 4, 8, 16)
STAGES = 4
USEFUL = "one after the other"


def one_after_the_other(config: DecoderConfig, m: int) -> Any:
    """A step without a pipeline on the same micro-batches: their gradients added up, then one update."""

    def step(params: Any, opt_state: Any, batch: Any) -> Any:
        def one(total: Any, some: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.grad(decoder_loss)(params, some, config)), None

        cut = jax.tree.map(lambda v: v.reshape(m, v.shape[0] // m, *v.shape[1:]), batch)
        gradients = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, params), cut)[0]
        return adamw_update(config.optimizer, gradients, opt_state, params)

    return jax.jit(step)


def bubble(repeat: int) -> None:
    """Modelled beside measured, for 1 to 16 micro-batches over four stages.

    Simulated devices share the host's cores, so that wall time says nothing about who waits. What is measured is processor time
    of the process, over the number of devices: what one device computes in a step. In the bubble stages compute like at all other
    ticks, on what nobody reads, so that this is the time from the first tick to the last. `useful` is the same micro-batches one
    after the other on one device, without a pipeline, over the number of stages: what is left without a bubble. Micro-batches of
    other sizes keep caches busy otherwise; dividing by it leaves the bubble alone.
    """
    config = replace(SMALL, layers=8, width=128, mlp_width=512, batch=32, sequence=32, vocabulary=64)
    program = decoder(config)
    mesh = Mesh(np.array(jax.devices()[:STAGES]), ("stage",))
    args = program.make_args(0)
    modelled, runs = {}, {}
    for m in MICROBATCHES:
        asked = {"mesh": mesh, "machine": "cpu", "pipeline": "stage", "microbatches": m}
        plan = jaxplan.make_plan(program.fn, *program.args, **asked)
        modelled[m] = plan.seconds
        for schedule in SCHEDULES:
            pipeline = pipeline_of(plan.traced.jaxpr.jaxpr, "stage", STAGES, m, schedule=schedule)
            runs[m, schedule] = replace(plan, pipeline=pipeline).jit(donate_argnums=())
        runs[m, USEFUL] = one_after_the_other(config, m)
    given = {key: runs[key](*args)[:2] if key[1] != USEFUL else args[:2] for key in runs}
    took: dict[tuple[int, str], list[float]] = {key: [] for key in runs}
    for _ in range(repeat + 1):
        for key, run in runs.items():
            start = time.process_time()
            jax.block_until_ready(run(*given[key], args[2]))
            took[key].append((time.process_time() - start) / STAGES)

    def ratio(one: tuple[int, str], other: tuple[int, str]) -> float:
        """The median over rounds but the first: both were measured in each."""
        return statistics.median(a / b for a, b in zip(took[one][1:], took[other][1:], strict=True))

    last = MICROBATCHES[-1]
    print("| m | (m+k-1)/m | gpipe / useful | 1f1b / useful | modelled | measured | modelled, to m=16 | measured, to m=16 |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for m in MICROBATCHES:
        own, least, useful = (m, "gpipe"), (last, "gpipe"), (m, USEFUL)
        alone = f"{(m + STAGES - 1) / m:.2f} | {ratio(own, useful):.2f} | {ratio((m, '1f1b'), useful):.2f}"
        times = f"{modelled[m] * 1e3:.0f} ms | {statistics.median(took[own][1:]) * 1e3:.0f} ms"
        print(f"| {m} | {alone} | {times} | {modelled[m] / modelled[last]:.2f} | {ratio(own, least):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="a100", help="a preset, or p3")
    parser.add_argument("--only", default="", help="models, such as 1.3B,39B")
    parser.add_argument("--batch", type=int, default=16, help="rows per device")
    parser.add_argument("--axes", type=int, default=3, choices=(1, 2, 3), help="of the meshes of hybrids, at most")
    parser.add_argument("--bubble", action="store_true", help="measure the bubble on simulated devices")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    if options.bubble:
        bubble(options.repeat)
    else:
        table(options)


if __name__ == "__main__":
    main()
