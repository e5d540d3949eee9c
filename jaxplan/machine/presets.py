"""Machines that everybody knows, with the public source of every number.

Sources. [scaling] "How To Scale Your Model", Google DeepMind 2025, table of TPU specs (jax-ml.github.io/scaling-book):
peak rates, memory, one-way ICI bandwidth per link, about 1 us per hop, DCN egress per chip. [tpu] cloud.google.com/tpu/docs
system architecture pages: v4 and v5p slices are tori from one cube of 4 x 4 x 4 chips on, smaller ones are meshes without
wrap-around links; the pods of v5e and v6e are tori of 16 x 16, and smaller slices are parts of them. [a100] NVIDIA A100 80GB
datasheet and DGX A100 user guide. [h100] NVIDIA H100 datasheet and DGX H100 user guide.
"""

from __future__ import annotations

import math

from jaxplan.machine.nouns import Link, Machine

GIB = 2.0**30


def _tpu(
    name: str, flops: float, int8: float, memory: float, gib: float, one_way: float, dcn: float, node: int,
    near: float, torus: int,
) -> Machine:  # fmt: skip
    """`flops`: bf16 per second; float32 matrix work runs in bf16 passes at JAX's default precision, so at the same rate."""
    rate = 1 / flops
    return Machine(
        name, {"bfloat16": rate, "float32": rate, "float16": rate, "int8": 1 / int8}, 1 / memory, gib * GIB,
        inner=Link(1 / (2 * one_way), 1e-6, "[scaling] one-way ICI bandwidth per link, two directions; 1 us per hop"),
        outer=Link(1 / dcn, 1e-5, "[scaling] DCN egress per chip; latency of a data-centre network, about 10 us"),
        node=node, matmul_reads={"float32": "bfloat16"}, tile=(8, 128), near_bytes=near * 2.0**20, in_order=True,
        torus=torus,
    )  # fmt: skip


def _gpu(name: str, bf16: float, tf32: float, int8: float, memory: float, gb: float, nvlink: float, ib: float) -> Machine:
    """`tf32`: the rate of float32 matrix work at JAX's default precision."""
    return Machine(
        name,
        {"bfloat16": 1 / bf16, "float16": 1 / bf16, "float32": 1 / tf32, "int8": 1 / int8, "float8_e4m3fn": 1 / int8},
        1 / memory, gb * 1e9,
        inner=Link(1 / nvlink, 3e-6, "NVLink bandwidth per direction and GPU; latency of a small NCCL step"),
        outer=Link(1 / ib, 1e-5, "InfiniBand port per GPU; latency of a small NCCL step between nodes"),
        node=8,
    )  # fmt: skip


PRESETS: dict[str, Machine] = {
    # name, bf16 FLOP/s, int8 OP/s, HBM B/s, HBM GiB, ICI B/s one way per link, DCN B/s per chip, largest slice, near MiB,
    # smallest torus [scaling] [tpu] (1 for v5e and v6e, of which only a pod of 256 is one: the memory of plans for lines is not
    # checked there yet)
    "v4": _tpu("v4", 2.75e14, 2.75e14, 1.2e12, 32, 4.5e10, 6.25e9, 4096, 108, 64),
    "v5e": _tpu("v5e", 1.97e14, 3.94e14, 8.1e11, 16, 4.5e10, 3.125e9, 256, 108, 1),
    "v5p": _tpu("v5p", 4.59e14, 9.18e14, 2.8e12, 96, 9e10, 6.25e9, 8960, 108, 64),
    "v6e": _tpu("v6e", 9.2e14, 1.84e15, 1.6e12, 32, 9e10, 1.25e10, 256, 108, 1),
    # name, bf16, tf32, int8/fp8 dense, HBM B/s, GB, NVLink B/s one way, InfiniBand B/s per GPU [a100] [h100]
    "a100": _gpu("a100", 3.12e14, 1.56e14, 6.24e14, 2.039e12, 80, 3e11, 2.5e10),
    "h100": _gpu("h100", 9.89e14, 4.94e14, 1.979e15, 3.35e12, 80, 4.5e11, 5e10),
    # simulated devices share one host: orders of magnitude only, there is no hardware to quote; and the host's memory, so that no
    # device has a limit of its own
    "cpu": Machine(
        "cpu", {"float32": 1 / 2e10}, 1 / 5e9, math.inf, inner=Link(1 / 2e9, 2e-5, "memory copies of one host"),
        outer=Link(1 / 2e9, 2e-5, "memory copies of one host"), node=1 << 20, materialises=True,
    ),
}  # fmt: skip

DEFAULT = "v5e"
"""The machine of an `AbstractMesh`, which has no devices to ask."""

KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
    "TPU v6e": "v6e", "A100": "a100", "H100": "h100", "H200": "h100", "cpu": "cpu",
}  # fmt: skip
