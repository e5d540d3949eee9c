"""The noun of hardware: a `Machine` is the numbers of the BSP model, and nothing else about a device enters a plan.

Conventions. `seconds_per_flop`: one over the peak rate of dense matrix work in a dtype, for one device. `seconds_per_byte`:
one over the bandwidth of local memory. A link's `seconds_per_byte`: one over the bytes that one device can send along one
mesh axis, both directions of a torus axis together (a bidirectional ring uses both); `latency_seconds`: per superstep.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType

import jax.numpy as jnp


@dataclass(frozen=True)
class Link:
    """One kind of connection. `seconds_per_byte`: per byte sent per device; `latency_seconds`: per superstep;
    `source`: where these numbers are from."""

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
    """A kind of device and its links. `name`: as plans print it.

    `seconds_per_flop`: by dtype name ("bfloat16", "float32", ...); a dtype without an entry runs at float32's rate.
    `seconds_per_byte`: of local memory. `memory_bytes`: per device; infinite where it has no limit of its own
    (simulated devices share their host's). `inner`: the link among the first `node` devices (a
    slice of a pod, a node of GPUs), `outer`: the link beyond. `axis_links`: mesh axes whose link the user states.
    `materialises`: its compiler keeps intermediate values in memory and reorders work freely (XLA on CPU), rather than fusing
    and recomputing them (TPU, GPU); what lives when depends on it. `matmul_reads`: the dtypes that products of default
    precision read others as: what only they read is rounded to these before it is sent or stored. `tile`: the innermost two
    dimensions of arrays in memory are padded to multiples of it; None where they are not. `near_bytes`: of the chip's own memory,
    what the compiler keeps short-lived values in, which then take none of `memory_bytes`. `in_order`: buffers are placed in the
    order in which they come to live, so that gaps between them stay (`cost/heap.py`). `sends_rounded`: what products read
    rounded is rounded before it is sent; None: it is, unless a mesh of CPU devices stands for the machine, which send it whole.
    `torus`: the fewest devices of a slice whose mesh axes are closed to rings; on a smaller one they are lines, along which a
    collective goes one way at a time, at half of `inner`'s rate. 1: switches, or nothing known.
    """

    name: str
    seconds_per_flop: Mapping[str, float]
    seconds_per_byte: float
    memory_bytes: float
    inner: Link
    outer: Link
    node: int
    axis_links: Mapping[str, Link] = field(default_factory=dict)
    materialises: bool = False
    matmul_reads: Mapping[str, str] = field(default_factory=dict)
    tile: tuple[int, int] | None = None
    near_bytes: float = 0.0
    in_order: bool = False
    sends_rounded: bool | None = None
    torus: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds_per_flop", MappingProxyType(dict(self.seconds_per_flop)))
        object.__setattr__(self, "axis_links", MappingProxyType(dict(self.axis_links)))
        object.__setattr__(self, "matmul_reads", MappingProxyType(dict(self.matmul_reads)))
        if "float32" not in self.seconds_per_flop:
            raise ValueError(f"machine {self.name!r}: seconds_per_flop needs at least 'float32'")
        for dtype, value in self.seconds_per_flop.items():
            _positive(f"machine {self.name!r}: seconds_per_flop[{dtype!r}]", value)
        _positive(f"machine {self.name!r}: seconds_per_byte", self.seconds_per_byte)
        if not self.memory_bytes > 0:
            raise ValueError(f"machine {self.name!r}: memory_bytes must be positive, got {self.memory_bytes}")
        for dtype, read in self.matmul_reads.items():
            if not 0 < element_bytes(read) <= element_bytes(dtype):
                raise ValueError(f"machine {self.name!r}: matmul_reads[{dtype!r}] must be a dtype that is no wider, got {read!r}")
        if self.tile is not None and not (len(self.tile) == 2 and min(self.tile) >= 1):
            raise ValueError(f"machine {self.name!r}: tile must be two counts of at least 1, or None; got {self.tile}")
        if not (self.near_bytes >= 0 and math.isfinite(self.near_bytes)):
            raise ValueError(f"machine {self.name!r}: near_bytes must be finite and not negative, got {self.near_bytes}")
        if self.node < 1:
            raise ValueError(f"machine {self.name!r}: node must be at least 1, got {self.node}")
        if self.torus < 1:
            raise ValueError(f"machine {self.name!r}: torus must be at least 1, got {self.torus}")

    def __hash__(self) -> int:
        return hash((self.name, tuple(self.seconds_per_flop.items()), self.seconds_per_byte, self.memory_bytes))

    def flop_seconds(self, dtype: str) -> float:
        """Seconds of one floating-point operation in a dtype."""
        return self.seconds_per_flop.get(dtype, self.seconds_per_flop["float32"])

    def rounded_share(self, dtype: str) -> float:
        """The share of its bytes that is left of what only products of default precision read."""
        read = self.matmul_reads.get(dtype, dtype)
        return element_bytes(read) / element_bytes(dtype) if read != dtype else 1.0

    def with_axis(self, axis: str, link: Link) -> Machine:
        """The same machine with one mesh axis on a stated link."""
        return replace(self, axis_links={**self.axis_links, axis: link})

    def slower(self, axis: str, factor: float, mesh_shape: Mapping[str, int]) -> Machine:
        """The same machine with one mesh axis `factor` times slower than it would be on a mesh of this shape."""
        return self.with_axis(axis, axis_links(self, mesh_shape)[axis].slower(factor))


def apart_from_links(machine: Machine) -> tuple[Hashable, ...]:
    """All that a device does by itself: equal for machines that differ by name, memory and links only."""
    found = [getattr(machine, field.name) for field in fields(machine) if field.name not in _AROUND]
    return tuple([tuple(value.items()) if isinstance(value, Mapping) else value for value in found])


_AROUND = ("name", "memory_bytes", "inner", "outer", "node", "axis_links", "torus")


def element_bytes(dtype: str) -> int:
    """Bytes of one element. ValueError for a dtype that JAX does not have."""
    try:
        return jnp.dtype(dtype).itemsize
    except TypeError:
        raise ValueError(f"{dtype!r} is no dtype") from None


def _positive(what: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{what} must be positive and finite, got {value}")


def axis_links(machine: Machine, mesh_shape: Mapping[str, int]) -> dict[str, Link]:
    """The link that each mesh axis uses: the innermost (last) axes fill a node, the others leave it.

    An axis that reaches beyond the node uses the outer link. Axes in `machine.axis_links` use the stated one. Where the node's
    part of the mesh is too small to be a torus, its axes are lines at half the rate; only an axis that has it all to itself can
    be led round the grid of its devices, as a ring again.
    """
    inside, beyond, node = 1, set(), []
    for axis in reversed(list(mesh_shape)):
        inside *= mesh_shape[axis]
        if inside > machine.node:
            beyond.add(axis)
        else:
            node.append(mesh_shape[axis])
    devices = math.prod(node)

    def link(axis: str) -> Link:
        if axis in machine.axis_links:
            return machine.axis_links[axis]
        if axis in beyond:
            return machine.outer
        ring = devices >= machine.torus or 2 < mesh_shape[axis] == devices
        return machine.inner if ring else machine.inner.slower(2.0)

    return {axis: link(axis) for axis in mesh_shape}
