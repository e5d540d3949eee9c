"""Room `measure`: the numbers of the BSP model, measured on the devices of a mesh with a handful of micro-benchmarks.

Once per machine, never per operator: a few sizes each of matrix products (r, per dtype), of a pass over memory (m), and of four
collectives along every mesh axis (g and l). Each number is a least-squares fit of logarithms, and what is left is part of the
result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from scipy.optimize import least_squares

from jaxplan.cost.formulas import ROUNDS, all_gather_bytes, all_reduce_bytes, all_to_all_bytes
from jaxplan.machine import Link, Machine, machine as find_machine

DTYPES = ("float32", "bfloat16", "float16")
SIDES = (256, 512, 1024)
"""Sides of the square matrices that are multiplied."""
PASSES = (1 << 20, 1 << 22, 1 << 24)
"""Elements of the float32 arrays that a pass over memory reads and writes."""
PAYLOADS = (1 << 10, 1 << 14, 1 << 18, 1 << 21)
"""Elements per device of the float32 arrays that are exchanged."""
TARGET = 0.02
"""Seconds that a timed loop should last, so that its start does not count."""
REPEATS = 4
LEAST_ROUNDS, MOST_ROUNDS = 8, 4096
LIMIT = 40.0
"""Seconds after which what is left is measured by one short loop each."""


@dataclass(frozen=True)
class Sample:
    """One micro-benchmark: the quantity it serves ("r float32", "m", "link x"), what was run, seconds measured and as fitted."""

    quantity: str
    what: str
    seconds: float
    fitted: float

    @property
    def off(self) -> float:
        """By which factor the fit is off, up or down; at least 1."""
        return max(self.fitted / self.seconds, self.seconds / self.fitted)


@dataclass(frozen=True)
class Calibration:
    """A measured `machine`, and the `samples` (a quantity, at a size, in seconds) that it was fitted to. Prints as a table.
    `elapsed`: seconds that all of it took."""

    machine: Machine
    samples: tuple[Sample, ...]
    elapsed: float

    def residuals(self, quantity: str) -> list[float]:
        """The factors by which the fit of one quantity is off."""
        return [sample.off for sample in self.samples if sample.quantity == quantity]

    def __str__(self) -> str:
        machine, lines = self.machine, [f"machine {self.machine.name}, measured in {self.elapsed:.0f} s"]
        for dtype, seconds in machine.seconds_per_flop.items():
            lines.append(self._line(f"r {dtype}", f"{1 / seconds / 1e9:10.1f} GFLOP/s"))
        lines.append(self._line("m", f"{1 / machine.seconds_per_byte / 1e9:10.2f} GB/s"))
        for axis, link in machine.axis_links.items():
            told = f"{1 / link.seconds_per_byte / 1e9:10.2f} GB/s, {1e6 * link.latency_seconds:.1f} us a superstep"
            lines.append(self._line(f"link {axis}", told))
        memory = "no limit" if machine.memory_bytes == math.inf else f"{machine.memory_bytes / 2**30:10.2f} GiB per device"
        lines.append(f"{'memory':14s} {memory}")
        return "\n".join(lines)

    def _line(self, quantity: str, told: str) -> str:
        off = self.residuals(quantity)
        return f"{quantity:14s} {told}; {len(off)} samples, {np.median(off):.2f} times off in the median, {max(off):.2f} at worst"


def calibrate(mesh: Mesh, name: str = "measured") -> Calibration:
    """Measure the devices of a mesh, in under a minute but for what compiling takes; nothing else should run meanwhile.

    The result's machine states a link for each axis of the mesh by name; other axes get the fastest (inside as many devices as
    the mesh has) or the slowest of them. `name`: the machine's. Raises ValueError for a mesh without devices.
    """
    if not isinstance(mesh, Mesh):
        raise ValueError("calibrate measures live devices: give it a jax.sharding.Mesh, not an AbstractMesh")
    start = time.perf_counter()
    end = start + LIMIT
    device = mesh.devices.flat[0]
    taken = find_machine(None, mesh)
    samples: list[Sample] = []
    rates: dict[str, float] = {}
    for dtype in DTYPES:
        (rates[dtype],) = _fit(f"r {dtype}", [_product(dtype, side, device, end) for side in SIDES], samples)
    (per_byte,) = _fit("m", [_pass(count, device, end) for count in PASSES], samples)
    links: dict[str, Link] = {}
    for axis, size in mesh.shape.items():
        if size > 1:
            runs = [_exchange(mesh, axis, kind, count, end) for kind in _EXCHANGES for count in PAYLOADS]
            g, latency = _fit(f"link {axis}", runs, samples)
            links[axis] = Link(max(g, 1e-15), latency, "measured by jaxplan calibrate")
    by_speed = sorted(links.values(), key=lambda link: link.seconds_per_byte) or [taken.inner]
    memory = (device.memory_stats() or {}).get("bytes_limit", taken.memory_bytes)
    measured = {"seconds_per_flop": rates, "seconds_per_byte": per_byte, "memory_bytes": float(memory), "node": mesh.size}
    machine = replace(taken, name=name, torus=1, inner=by_speed[0], outer=by_speed[-1], axis_links=links, **measured)
    return Calibration(machine, tuple(samples), time.perf_counter() - start)


@dataclass(frozen=True)
class _Run:
    """A benchmark: how much it does of each term, and the seconds it took."""

    what: str
    terms: tuple[float, ...]
    seconds: float


def _fit(quantity: str, runs: Sequence[_Run], samples: list[Sample]) -> tuple[float, ...]:
    """Positive coefficients that minimise the sum of squared logarithms of fitted over measured; the samples are noted."""
    terms, seconds = np.array([run.terms for run in runs]), np.array([run.seconds for run in runs])
    scale = (terms / seconds[:, None]).max(axis=0)  # no term alone takes longer than the whole
    found = least_squares(lambda x: np.log(terms @ (np.exp(x) / scale) / seconds), np.full(terms.shape[1], math.log(0.5)))
    coefficients = tuple((np.exp(found.x) / scale).tolist())
    for run in runs:
        fitted = sum(c * term for c, term in zip(coefficients, run.terms, strict=True))
        samples.append(Sample(quantity, run.what, run.seconds, fitted))
    return coefficients


def _seconds(step: Callable[[Any], Any], value: Any, end: float) -> float:
    """Seconds of one step, of a loop long enough to hide its start; the fastest of a few. Past `end` (of `time.perf_counter`) a
    short loop, once, has to do."""
    loop = jax.jit(lambda value, rounds: lax.fori_loop(0, rounds, lambda _, x: step(x), value))  # compiled once for all rounds
    rounds = LEAST_ROUNDS
    _timed(loop, value, rounds)
    while True:
        best = _timed(loop, value, rounds)
        if best >= TARGET or rounds >= MOST_ROUNDS or time.perf_counter() >= end:
            break
        rounds = min(MOST_ROUNDS, max(2 * rounds, int(rounds * TARGET / max(best, 1e-7))))
    for _ in range(REPEATS - 1):
        if time.perf_counter() < end:
            best = min(best, _timed(loop, value, rounds))
    return best / rounds


def _timed(loop: Callable[..., Any], value: Any, rounds: int) -> float:
    start = time.perf_counter()
    loop(value, rounds).block_until_ready()
    return time.perf_counter() - start


def _product(dtype: str, side: int, device: Any, end: float) -> _Run:
    matrix = jax.device_put(jnp.full((side, side), 1 / side, dtype), device)
    seconds = _seconds(lambda x: x @ matrix, matrix, end)
    return _Run(f"{side} x {side} product", (2.0 * side**3,), seconds)


def _pass(count: int, device: Any, end: float) -> _Run:
    """Reads and writes an array once."""
    vector = jax.device_put(jnp.ones(count, jnp.float32), device)
    seconds = _seconds(lambda x: x * jnp.float32(0.5) + jnp.float32(1.0), vector, end)
    return _Run(f"pass over {count} floats", (2.0 * 4 * count,), seconds)


def _exchange(mesh: Mesh, axis: str, kind: str, count: int, end: float) -> _Run:
    """One collective along one axis, on all others at once, as a planned program would run it."""
    size = mesh.shape[axis]
    count = -(-count // size) * size
    step, sent = _EXCHANGES[kind]
    automatic = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    spec = PartitionSpec(automatic.axis_names)
    body = jax.shard_map(lambda x: step(x, axis, size), mesh=automatic, in_specs=spec, out_specs=spec)
    value = jax.device_put(jnp.ones(count * mesh.size, jnp.float32), NamedSharding(automatic, spec))
    kinds = kind.split("+")
    rounds = sum(ROUNDS[one] for one in kinds)
    terms = float(sent(size, 4.0 * count)), float(rounds)
    return _Run(f"{kind} of {count} floats per device", terms, _seconds(body, value, end))


def _shift(x: Any, axis: str, size: int) -> Any:
    return lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)])


def _reduce(x: Any, axis: str, size: int) -> Any:
    return lax.pcast(lax.psum(x, axis) * jnp.float32(1 / size), axis, to="varying")


def _turn(x: Any, axis: str, size: int) -> Any:
    return lax.all_to_all(x, axis, 0, 0, tiled=True)


def _scatter(x: Any, axis: str, size: int) -> Any:
    part = lax.psum_scatter(x, axis, tiled=True) * jnp.float32(1 / size)
    return lax.all_gather(part, axis, tiled=True)


_EXCHANGES: dict[str, tuple[Callable[[Any, str, int], Any], Callable[[int, float], float]]] = {
    "permute": (_shift, lambda n, local: local),
    "all_reduce": (_reduce, lambda n, local: all_reduce_bytes(n, local)),
    "all_to_all": (_turn, lambda n, local: all_to_all_bytes(n, n * local)),
    "reduce_scatter+all_gather": (_scatter, lambda n, local: 2 * all_gather_bytes(n, local)),
}
"""Per kind: a step that gives back what has the shape it took, and the bytes that it sends per device for so many held."""
