"""Stages of a chain of unlike layers, by dynamic programming: Piper, Alpa's inter-operator pass, and plain balancing.

What a layer takes is given as tables by degree, so that nothing here knows of a machine: they come from planned layers.

- `piper`: Tarnawski, Narayanan and Phanishayee, "Piper: Multidimensional Planner for DNN Parallelization", NeurIPS 2021.
  Every stage has a data- and a tensor-parallel degree of its own, under a memory cap that depends on how many stages follow. Departures:
  chains only, where the paper takes graphs by their downsets; one tensor degree for all layers of a stage; the paper minimises the
  time of the slowest stage, here that of a whole call: m micro-batches through all stages.
- `alpa_stages`: Zheng et al., "Alpa: Automating Inter- and Intra-Operator Parallelism for Distributed Deep Learning", OSDI 2022,
  section 5.2: the sum of all stages' times plus (m - 1) times the slowest's, least over all bounds on the slowest. Departure: a
  stage takes any number of devices that the tables know, where the paper takes powers of two within a node or whole nodes.
- `balanced`: layers of given times over a number of stages so that the slowest stage is as fast as can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Degrees = tuple[int, int]
"""(data-parallel, tensor-parallel) degree; their product is the number of devices."""


@dataclass(frozen=True)
class Layer:
    """One layer of a chain. `seconds`: {(data, tensor): of one micro-batch, forward and backward}; `state`: {tensor degree: bytes
    per device that stay}; `kept`: {(data, tensor): bytes per device that one micro-batch keeps until it comes back}; `synced`:
    {(data, tensor): seconds per call to add up gradients}. Degrees that are missing are not to be had."""

    seconds: Mapping[Degrees, float]
    state: Mapping[int, float]
    kept: Mapping[Degrees, float]
    synced: Mapping[Degrees, float]


@dataclass(frozen=True)
class Stage:
    """Layers `first` up to `last`, exclusive, on `data` * `tensor` devices."""

    first: int
    last: int
    data: int
    tensor: int

    @property
    def devices(self) -> int:
        """How many it takes."""
        return self.data * self.tensor


@dataclass(frozen=True)
class Staged:
    """Stages in the order of layers, and the seconds of a call with them."""

    stages: tuple[Stage, ...]
    seconds: float


class _Spans:
    """Sums over runs of layers, per pair of degrees."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.count = len(layers)
        self.degrees = sorted({pair for layer in layers for pair in layer.seconds})

        def summed(value: Callable[[Layer, Degrees], float]) -> np.ndarray:
            table = np.array([[value(layer, pair) for layer in layers] for pair in self.degrees]).reshape(-1, self.count)
            return np.concatenate([np.zeros((len(self.degrees), 1)), np.cumsum(table, 1)], 1)

        self.seconds = summed(lambda layer, pair: layer.seconds.get(pair, math.inf))
        self.synced = summed(lambda layer, pair: layer.synced.get(pair, 0.0))
        self.state = summed(lambda layer, pair: layer.state.get(pair[1], 0.0))
        self.kept = summed(lambda layer, pair: layer.kept.get(pair, 0.0))

    def of(self, table: np.ndarray, option: int, first: int, last: int) -> float:
        """The sum of a table over layers `first` up to `last`."""
        value = table[option, last] - table[option, first]
        return math.inf if np.isnan(value) else float(value)


def piper(layers: Sequence[Layer], devices: int, microbatches: int, memory: float = math.inf) -> Staged:
    """The fastest stages of a chain on so many devices, all of which need not be used.

    A call takes (m - 1) times the slowest stage, then every stage once, and the slowest sum of gradients; the last is not among
    what is compared while searching. A stage followed by s others keeps what min(m, s + 1) micro-batches need (one forward, one
    backward). Raises ValueError where nothing fits `memory`, in bytes per device.
    """
    return _staged(layers, devices, microbatches, memory, sync=True)


def alpa_stages(layers: Sequence[Layer], devices: int, microbatches: int, memory: float = math.inf) -> Staged:
    """Stages that use all devices, as Alpa's inter-operator pass finds them; gradients' sums are in the times of no stage there.
    Raises ValueError where nothing fits."""
    return _staged(layers, devices, microbatches, memory, sync=False, all_devices=True)


def _staged(
    layers: Sequence[Layer], devices: int, microbatches: int, memory: float, sync: bool, all_devices: bool = False
) -> Staged:
    if not layers or devices < 1 or microbatches < 1:
        raise ValueError(f"{len(layers)} layers, {devices} devices, {microbatches} micro-batches: at least one of each is needed")
    spans = _Spans(layers)
    options = [o for o, (data, tensor) in enumerate(spans.degrees) if data * tensor <= devices]
    bounds = sorted({
        found for o in options for first in range(spans.count) for last in range(first + 1, spans.count + 1)
        if math.isfinite(found := spans.of(spans.seconds, o, first, last))
    })  # fmt: skip
    best = Staged((), math.inf)
    for bound in bounds:  # on the slowest stage, as in Alpa: all of them, smallest first
        if (microbatches - 1) * bound >= best.seconds:
            break
        stages = _within(spans, options, devices, microbatches, memory, bound, all_devices)
        if stages is not None:
            seconds = call_seconds(layers, stages, microbatches, sync)
            best = min(best, Staged(stages, seconds), key=lambda one: one.seconds)
    if not best.stages:
        raise ValueError(f"no stages of {len(layers)} layers on {devices} devices fit {memory:,.0f} bytes per device")
    return best


def call_seconds(layers: Sequence[Layer], stages: Sequence[Stage], microbatches: int, sync: bool = True) -> float:
    """Seconds of one call."""
    runs = [(layers[s.first : s.last], (s.data, s.tensor)) for s in stages]
    times = [sum([layer.seconds.get(pair, math.inf) for layer in run]) for run, pair in runs]
    added = [sum([layer.synced.get(pair, 0.0) for layer in run]) for run, pair in runs]
    return (microbatches - 1) * max(times) + sum(times) + (max(added) if sync else 0.0)


def _within(
    spans: _Spans, options: Sequence[int], devices: int, microbatches: int, memory: float, bound: float, all_devices: bool
) -> tuple[Stage, ...] | None:
    """The stages with the least sum of times, none above `bound`. least[s, first, d]: of the layers from `first` on, in s stages
    on d devices; built from the last layer, since what a stage keeps depends on how many follow."""
    count = spans.count
    most = min(count, devices)
    least = np.full((most + 1, count + 1, devices + 1), math.inf)
    least[0, count, 0] = 0.0
    chosen: dict[tuple[int, int, int], tuple[int, int]] = {}
    for stages in range(1, most + 1):
        inflight = min(microbatches, stages)
        for first in range(count - 1, -1, -1):
            for option in options:
                taken = math.prod(spans.degrees[option])
                for last in range(first + 1, count + 1):
                    seconds = spans.of(spans.seconds, option, first, last)
                    held = spans.of(spans.state, option, first, last) + inflight * spans.of(spans.kept, option, first, last)
                    if seconds > bound * (1 + 1e-12) or held > memory:
                        break
                    rest = least[stages - 1, last, : devices + 1 - taken] + seconds
                    better = np.flatnonzero(rest < least[stages, first, taken:])
                    least[stages, first, taken + better] = rest[better]
                    chosen.update({(stages, first, taken + int(d)): (option, last) for d in better})
    ends = least[:, 0, devices:] if all_devices else least[:, 0, :]
    if not np.isfinite(ends).any():
        return None
    stages, used = (int(i) for i in np.unravel_index(int(ends.argmin()), ends.shape))
    used, first, found = used + (devices if all_devices else 0), 0, []
    while stages:
        option, last = chosen[stages, first, used]
        data, tensor = spans.degrees[option]
        found.append(Stage(first, last, data, tensor))
        stages, first, used = stages - 1, last, used - data * tensor
    return tuple(found)


def balanced(seconds: Sequence[float], stages: int) -> tuple[int, ...]:
    """Layers per stage, at least one each, so that the slowest stage is as fast as can be. Raises ValueError for more stages than
    layers."""
    count = len(seconds)
    if not 1 <= stages <= count:
        raise ValueError(f"{count} layers cannot be laid over {stages} stages: every stage needs at least one")
    total = np.concatenate([[0.0], np.cumsum(seconds)])
    slowest = np.full((stages + 1, count + 1), math.inf)
    slowest[0, 0] = 0.0
    cut = np.zeros((stages + 1, count + 1), dtype=np.int64)
    for stage in range(1, stages + 1):
        for last in range(stage, count + 1):
            tried = np.maximum(slowest[stage - 1, stage - 1 : last], total[last] - total[stage - 1 : last])
            cut[stage, last] = stage - 1 + int(tried.argmin())
            slowest[stage, last] = tried.min()
    ends = [count]
    for stage in range(stages, 0, -1):
        ends.append(int(cut[stage, ends[-1]]))
    return tuple(int(n) for n in np.diff(ends[::-1]))
