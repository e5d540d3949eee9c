"""Modelled peak memory beside what XLA's CPU compiler allocates, for all example programs.

    python scripts/check_memory.py [--meshes 1 8 4x2 4x4] [--only NAME ...]
    python scripts/check_memory.py --pipelines [--schedules gpipe 1f1b]

Modelled: `plan.memory`. Compiled: arguments + outputs - aliased + temporaries of `memory_analysis()`, bytes per simulated
device. The machine is v5e with slower arithmetic and no latency, so that such small programs are worth sharding at all.

`--pipelines`: train steps with their layers in stages instead, the state donated, each planned with the schedule: a decoder with
rematerialised layers (also with dropout in them) and with kept activations, layers of convolutions, and layers of two products,
as a scan (rematerialised or not) and written out one after another; on meshes of stages, and stages by data.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=16"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

import jaxplan
from jaxplan import hybrid
from jaxplan.examples import programs
from jaxplan.examples.adamw import adamw_init, adamw_update
from jaxplan.examples.decoder import SMALL, apply_block, decoder, decoder_params, rms_norm
from jaxplan.machine import PRESETS, Machine

STAGED = [((4,), 4, 2), ((4,), 8, 8), ((2, 2), 8, 2), ((2, 2), 5, 4), ((2, 4), 8, 4), ((4, 2), 8, 8), ((3,), 5, 4)]
"""(mesh of stages and data, layers, micro-batches)."""


def busy_machine() -> Machine:
    """On which small programs are worth sharding, and whose compiler is XLA's for CPU."""
    v5e = PRESETS["v5e"]
    slow = {dtype: 1e3 * seconds for dtype, seconds in v5e.seconds_per_flop.items()}
    inner, outer = (replace(link, latency_seconds=0.0) for link in (v5e.inner, v5e.outer))
    kept = {"materialises": True, "matmul_reads": {}, "tile": None, "near_bytes": 0.0, "in_order": False}
    return replace(v5e, name="busy", seconds_per_flop=slow, inner=inner, outer=outer, **kept)


def mesh_of(shape: tuple[int, ...]) -> jax.sharding.Mesh:
    """A mesh with axes x, y, z, w over the first devices."""
    return jax.sharding.Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), tuple("xyzw"[: len(shape)]))


def compiled_bytes(plan: Any, args: Any, donated: tuple[int, ...] = ()) -> float:
    """Bytes per device that the compiled program allocates."""
    found = plan.jit(donate_argnums=donated).lower(*args).compile().memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return float(held + found.temp_size_in_bytes)


def rows(meshes: list[tuple[int, ...]], names: list[str]) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """(program, mesh, modelled bytes, compiled bytes)."""
    for name in names:
        program = programs()[name]
        for shape in meshes:
            plan = jaxplan.make_plan(program.fn, *program.args, mesh=mesh_of(shape), machine=busy_machine())
            yield name, shape, plan.peak_bytes, compiled_bytes(plan, program.args)


def convolutions(layers: int) -> tuple[Any, tuple[Any, ...]]:
    """(a step of gradient descent on layers of convolutions, shapes of kernels and images)."""

    def loss(kernels: jax.Array, images: jax.Array) -> jax.Array:
        def layer(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
            y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            return x + jax.nn.relu(y - jnp.mean(y, axis=(1, 2, 3), keepdims=True)), None

        return jnp.mean(jnp.square(jax.lax.scan(layer, images, kernels)[0]))

    def step(kernels: jax.Array, images: jax.Array) -> jax.Array:
        return kernels - 0.1 * jax.grad(loss)(kernels, images)

    return step, (jax.ShapeDtypeStruct((layers, 3, 3, 16, 16), "float32"), jax.ShapeDtypeStruct((16, 12, 12, 16), "float32"))


def perceptrons(layers: int, written_out: bool = False, remat: bool = False) -> tuple[Any, tuple[Any, ...]]:
    """(a step of gradient descent on residual layers of two products each between a way in and a head; shapes of parameters, rows
    and targets). `written_out`: the layers one after another instead of a scan."""

    def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        one, x = jax.checkpoint(layer) if remat else layer, x @ params["in"]
        if written_out:
            for weights in params["layers"]:
                x, _ = one(x, weights)
        else:
            x, _ = jax.lax.scan(one, x, params["layers"])
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(x @ params["head"]) * y, axis=-1))

    def step(params: Any, x: jax.Array, y: jax.Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, x, y)
        return jax.tree.map(lambda w, g: w - jnp.float32(0.1) * g, params, gradient), value

    stack = () if written_out else (layers,)
    one = {"up": jax.ShapeDtypeStruct((*stack, 96, 192), "float32"), "down": jax.ShapeDtypeStruct((*stack, 192, 96), "float32")}
    ends = {"in": jax.ShapeDtypeStruct((32, 96), "float32"), "head": jax.ShapeDtypeStruct((96, 48), "float32")}
    params = {"layers": [one] * layers if written_out else one, **ends}
    return step, (params, jax.ShapeDtypeStruct((64, 32), "float32"), jax.ShapeDtypeStruct((64, 48), "float32"))


def dropping(layers: int, remat: bool = True) -> tuple[Any, tuple[Any, ...]]:
    """(the train step of the small decoder with dropout on what each half of a layer adds; shapes of parameters, state, batch and
    key)."""
    config = replace(SMALL, layers=layers, remat=remat)

    def layer(x: jax.Array, given: Any) -> tuple[jax.Array, None]:
        block, key = given
        keys = iter(jax.random.split(key, 2))

        def drop(where: str, y: jax.Array) -> jax.Array:
            if where != "projected":
                return y
            return jnp.where(jax.random.bernoulli(next(keys), 0.9, y.shape), y / jnp.float32(0.9), jnp.float32(0))

        return apply_block(x, block, config, drop), None

    def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        x = jnp.take(params["embedding"], batch["tokens"], axis=0) + params["positions"][None]
        given = params["blocks"], jax.random.split(key, layers)
        x, _ = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, given)
        logits = jnp.einsum("bsw,vw->bsv", rms_norm(x, params["final_scale"]), params["embedding"])
        chosen = jnp.take_along_axis(logits, batch["targets"][:, :, None], axis=-1)[:, :, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)

    def step(params: Any, state: Any, batch: Any, key: jax.Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, batch, key)
        return *adamw_update(config.optimizer, gradient, state, params), value

    def initial(key: jax.Array) -> tuple[Any, Any, jax.Array]:
        params = decoder_params(key, config)
        return params, adamw_init(params), key

    params, state, key = jax.eval_shape(initial, jax.random.key(0))
    words = jax.ShapeDtypeStruct((config.batch, config.sequence), "int32")
    return step, (params, state, {"tokens": words, "targets": words}, key)


def planned_under(schedule: str, fn: Any, args: Sequence[Any], **options: Any) -> jaxplan.Plan:
    """The best plan with stages along x that has this schedule."""
    with mock.patch.object(hybrid, "SCHEDULES", (schedule,)):
        return jaxplan.make_plan(fn, *args, pipeline="x", **options)


def staged_rows(
    schedules: Sequence[str], chosen: Sequence[tuple[tuple[int, ...], int, int]], only: Sequence[str] | None = None
) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """The same for train steps in stages along x. `only`: names of programs."""
    for shape, layers, m in chosen:
        kept, remat = (decoder(replace(SMALL, layers=layers, remat=remat)) for remat in (False, True))
        cases: dict[str, tuple[Any, Any, tuple[int, ...]]] = {"decoder, kept": (kept.fn, kept.args, (0, 1))}
        cases["decoder, remat"] = (remat.fn, remat.args, (0, 1))
        cases["decoder, dropout, remat"] = (*dropping(layers), (0, 1))
        cases["convolutions"] = (*convolutions(layers), (0,))
        cases["perceptrons"] = (*perceptrons(layers), (0,))
        cases["perceptrons, remat"] = (*perceptrons(layers, remat=True), (0,))
        cases["perceptrons, written out"] = (*perceptrons(layers, written_out=True), (0,))
        for name, (fn, given, donated) in cases.items():
            if only is not None and name not in only:
                continue
            for schedule in schedules:
                plan = planned_under(
                    schedule, fn, given, mesh=mesh_of(shape), machine=busy_machine(), microbatches=m, donate_argnums=donated
                )
                told = f"{name}, {layers} layers, m={m}, {schedule}"
                yield told, shape, plan.peak_bytes, compiled_bytes(plan, given, donated)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", nargs="+", default=["1", "8", "4x2", "4x4"])
    parser.add_argument("--only", nargs="+", default=sorted(programs()))
    parser.add_argument("--pipelines", action="store_true", help="train steps with their layers in stages")
    parser.add_argument("--schedules", nargs="+", default=["gpipe", "1f1b"])
    parser.add_argument("--staged", nargs="+", default=None, help="names of train steps, with --pipelines")
    options = parser.parse_args()
    found = (
        staged_rows(options.schedules, STAGED, options.staged)
        if options.pipelines
        else rows([tuple(map(int, m.split("x"))) for m in options.meshes], options.only)
    )
    print("| program | mesh | modelled KiB | compiled KiB | modelled / compiled |\n|---|---|---|---|---|")
    ratios = []
    for name, shape, modelled, compiled in found:
        ratios.append(modelled / compiled)
        where = "x".join(map(str, shape))
        print(f"| {name} | {where} | {modelled / 1024:.1f} | {compiled / 1024:.1f} | {ratios[-1]:.2f} |", flush=True)
    off = [max(ratio, 1 / ratio) for ratio in ratios]
    print(f"\n{len(ratios)} programs: off by {statistics.median(off) - 1:.1%} in the median, {max(off):.2f} times at worst")


if __name__ == "__main__":
    main()
