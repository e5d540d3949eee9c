"""The noun of hardware: a `Machine` is the numbers of the BSP model, and nothing else about a device enters a plan.

Conventions. `seconds_per_flop`: one over the peak rate of dense matrix work in a dtype, for one device. `seconds_per_byte`:
one over the bandwidth of local memory. A link's `seconds_per_byte`: one over the bytes that one device can send along one
mesh axis, both directions of a torus axis together (a bidirectional ring uses both); `latency_seconds`: per superstep.

Sources. [scaling] "How To Scale Your Model", Google DeepMind 2025, table of TPU specs (jax-ml.github.io/scaling-book):
peak rates, memory, one-way ICI bandwidth per link, about 1 us per hop, DCN egress per chip. [tpu] cloud.google.com/tpu/docs
system architecture pages. [a100] NVIDIA A100 80GB datasheet and DGX A100 user guide. [h100] NVIDIA H100 datasheet and DGX
H100 user guide.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Link:
    """One kind of connection. `seconds_per_byte`: per byte sent per device; `latency_seconds`: per superstep."""

    seconds_per_byte: float
    latency_seconds: float
    source: str = ""

    def __post_init__(self) -> None:
        _positive("Link.seconds_per_byte", self.seconds_per_byte)
        if not (self.latency_seconds >= 0 and math.isfinite(self.latency_seconds)):
            raise ValueError(f"Link.latency_seconds must be finite and not negative, got {self.latency_seconds}")

    def slower(self, factor: float) -> Link:
        """The same link, `factor` times slower in bandwidth."""
        return replace(self, seconds_per_byte=self.seconds_per_byte * factor)


@dataclass(frozen=True)
class Machine:
    """A kind of device and its links.

    `seconds_per_flop`: by dtype name ("bfloat16", "float32", ...); a dtype without an entry runs at float32's rate.
    `seconds_per_byte`: of local memory. `memory_bytes`: per device. `inner`: the link among the first `node` devices (a
    slice of a pod, a node of GPUs), `outer`: the link beyond. `axis_links`: mesh axes whose link the user states.
    """

    name: str
    seconds_per_flop: Mapping[str, float]
    seconds_per_byte: float
    memory_bytes: float
    inner: Link
    outer: Link
    node: int
    axis_links: Mapping[str, Link] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds_per_flop", MappingProxyType(dict(self.seconds_per_flop)))
        object.__setattr__(self, "axis_links", MappingProxyType(dict(self.axis_links)))
        if "float32" not in self.seconds_per_flop:
            raise ValueError(f"machine {self.name!r}: seconds_per_flop needs at least 'float32'")
        for dtype, value in self.seconds_per_flop.items():
            _positive(f"machine {self.name!r}: seconds_per_flop[{dtype!r}]", value)
        _positive(f"machine {self.name!r}: seconds_per_byte", self.seconds_per_byte)
        _positive(f"machine {self.name!r}: memory_bytes", self.memory_bytes)
        if self.node < 1:
            raise ValueError(f"machine {self.name!r}: node must be at least 1, got {self.node}")

    def __hash__(self) -> int:
        return hash((self.name, tuple(self.seconds_per_flop.items()), self.seconds_per_byte, self.memory_bytes))

    def flop_seconds(self, dtype: str) -> float:
        """Seconds of one floating-point operation in a dtype."""
        return self.seconds_per_flop.get(dtype, self.seconds_per_flop["float32"])

    def with_axis(self, axis: str, link: Link) -> Machine:
        """The same machine with one mesh axis on a stated link."""
        return replace(self, axis_links={**self.axis_links, axis: link})

    def slower(self, axis: str, factor: float, mesh_shape: Mapping[str, int]) -> Machine:
        """The same machine with one mesh axis `factor` times slower than it would be on a mesh of this shape."""
        return self.with_axis(axis, axis_links(self, mesh_shape)[axis].slower(factor))


def _positive(what: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{what} must be positive and finite, got {value}")


def axis_links(machine: Machine, mesh_shape: Mapping[str, int]) -> dict[str, Link]:
    """The link that each mesh axis uses: the innermost (last) axes fill a node, the others leave it.

    An axis that reaches beyond the node uses the outer link. Axes in `machine.axis_links` use the stated one.
    """
    links, inside = {}, 1
    for axis in reversed(list(mesh_shape)):
        inside *= mesh_shape[axis]
        links[axis] = machine.axis_links.get(axis) or (machine.inner if inside <= machine.node else machine.outer)
    return {axis: links[axis] for axis in mesh_shape}


GIB = 2.0**30


def _tpu(name: str, flops: float, int8: float, memory: float, gib: float, one_way: float, dcn: float, node: int) -> Machine:
    """`flops`: bf16 per second; float32 matrix work runs in bf16 passes at JAX's default precision, so at the same rate."""
    rate = 1 / flops
    return Machine(
        name, {"bfloat16": rate, "float32": rate, "float16": rate, "int8": 1 / int8}, 1 / memory, gib * GIB,
        inner=Link(1 / (2 * one_way), 1e-6, "[scaling] one-way ICI bandwidth per link, two directions; 1 us per hop"),
        outer=Link(1 / dcn, 1e-5, "[scaling] DCN egress per chip; latency of a data-centre network, about 10 us"),
        node=node,
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
    # name, bf16 FLOP/s, int8 OP/s, HBM B/s, HBM GiB, ICI B/s one way per link, DCN B/s per chip, largest slice [scaling] [tpu]
    "v4": _tpu("v4", 2.75e14, 2.75e14, 1.2e12, 32, 4.5e10, 6.25e9, 4096),
    "v5e": _tpu("v5e", 1.97e14, 3.94e14, 8.1e11, 16, 4.5e10, 3.125e9, 256),
    "v5p": _tpu("v5p", 4.59e14, 9.18e14, 2.8e12, 96, 9e10, 6.25e9, 8960),
    "v6e": _tpu("v6e", 9.2e14, 1.84e15, 1.6e12, 32, 9e10, 1.25e10, 256),
    # name, bf16, tf32, int8/fp8 dense, HBM B/s, GB, NVLink B/s one way, InfiniBand B/s per GPU [a100] [h100]
    "a100": _gpu("a100", 3.12e14, 1.56e14, 6.24e14, 2.039e12, 80, 3e11, 2.5e10),
    "h100": _gpu("h100", 9.89e14, 4.94e14, 1.979e15, 3.35e12, 80, 4.5e11, 5e10),
    # simulated devices share one host: orders of magnitude only, there is no hardware to quote
    "cpu": Machine(
        "cpu", {"float32": 1 / 2e10}, 1 / 5e9, 4 * GIB, inner=Link(1 / 2e9, 2e-5, "memory copies of one host"),
        outer=Link(1 / 2e9, 2e-5, "memory copies of one host"), node=1 << 20,
    ),
}  # fmt: skip

DEFAULT = "v5e"
"""The machine of an `AbstractMesh`, which has no devices to ask."""

_KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
    "TPU v6e": "v6e", "A100": "a100", "H100": "h100", "H200": "h100", "cpu": "cpu",
}  # fmt: skip


def machine(which: str | Machine | None, mesh: Any = None) -> Machine:
    """A `Machine` as it is, a preset by name, or None: from the mesh's devices.

    An `AbstractMesh`, or a device of unknown kind on a platform other than CPU, is taken for `DEFAULT`. Raises ValueError for
    an unknown name, listing the names.
    """
    if isinstance(which, Machine):
        return which
    if isinstance(which, str):
        if which not in PRESETS:
            near = difflib.get_close_matches(which, PRESETS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"no machine is called {which!r}; there are {', '.join(PRESETS)}, or pass a jaxplan.Machine{hint}")
        return PRESETS[which]
    if which is not None:
        raise TypeError(f"machine must be a jaxplan.Machine, a preset's name or None, got {type(which).__name__}")
    try:
        device = mesh.devices.flat[0]
    except (AttributeError, ValueError, RuntimeError):
        return PRESETS[DEFAULT]
    kind, platform = str(getattr(device, "device_kind", "")), str(getattr(device, "platform", ""))
    for text in sorted(_KINDS, key=len, reverse=True):
        if text in kind:
            return PRESETS[_KINDS[text]]
    return PRESETS["cpu" if platform == "cpu" else DEFAULT]
