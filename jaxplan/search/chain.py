"""Where to cut a chain of unlike layers into stages of equal numbers of devices, by dynamic programming.

As Alpa's inter-operator pass (Zheng et al., OSDI 2022, section 5.2) it tries bounds on the slowest stage; beside work it prices
what crosses each cut, and it holds a memory cap that depends on how many stages follow, as Piper does. Stages have equal meshes
here, so that only the places of the cuts are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Run:
    """What lies between two places where a chain may be cut. `seconds`: of one micro-batch, forward and backward; `state`: bytes
    per device that stay; `kept`: bytes per device that a micro-batch keeps until it comes back; `crossing`: seconds per
    micro-batch to hand on, both ways, what crosses the cut behind it."""

    seconds: float
    state: float = 0.0
    kept: float = 0.0
    crossing: float = 0.0


def chain_seconds(runs: Sequence[Run], ends: Sequence[int], microbatches: int) -> float:
    """Seconds of a call with stages that end before the given runs (the last one at the last): m - 1 times the slowest stage, and
    every stage and crossing once. A stage takes its work and what crosses its cuts."""
    times, start = [], 0
    for end in ends:
        before = runs[start - 1].crossing if start else 0.0
        after = runs[end - 1].crossing if end < len(runs) else 0.0
        times.append(sum([run.seconds for run in runs[start:end]]) + before / 2 + after / 2)
        start = end
    return (microbatches - 1) * max(times) + sum(times)


def cut_chain(runs: Sequence[Run], stages: int, microbatches: int, memory: float = math.inf) -> tuple[int, ...]:
    """The ends of the stages (numbers of runs; the last is all of them) with which a call is fastest.

    Raises ValueError for more stages than runs, and where no cuts fit `memory`, in bytes per device.
    """
    count = len(runs)
    if not 1 <= stages <= count:
        raise ValueError(f"a chain that can be cut in {count - 1} places cannot be laid over {stages} stages")
    time, held = _tables(runs, stages, microbatches)
    best, found = math.inf, None
    for bound in _bounds(time, stages):
        if (microbatches - 1) * bound >= best:
            break
        ends = _within(time, held, stages, bound, memory)
        if ends is not None:
            seconds = chain_seconds(runs, ends, microbatches)
            if seconds < best:
                best, found = seconds, ends
    if found is None:
        raise ValueError(f"no {stages} stages of a chain of {count} runs fit {memory:,.0f} bytes per device")
    return found


def _tables(runs: Sequence[Run], stages: int, microbatches: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Per first and last run (exclusive), the seconds of a micro-batch; and per number of stages that follow, the bytes held."""
    count = len(runs)

    def spans(values: Sequence[float]) -> np.ndarray:
        total = np.concatenate([[0.0], np.cumsum(values)])
        return total[None, :] - total[:, None]

    crossing = np.array([0.0, *[run.crossing for run in runs]])
    crossing[count] = 0.0
    time = spans([run.seconds for run in runs]) + crossing[:, None] / 2 + crossing[None, :] / 2
    time[np.tri(count + 1, dtype=bool)] = math.inf  # no empty stages
    state, kept = spans([run.state for run in runs]), spans([run.kept for run in runs])
    return time, [state + min(microbatches, follow + 1) * kept for follow in range(stages)]


def _bounds(time: np.ndarray, stages: int) -> list[float]:
    """Bounds on the slowest stage, smallest first; none that the work alone rules out."""
    finite = np.unique(time[np.isfinite(time)])
    least = time[0, -1] / stages if math.isfinite(time[0, -1]) else 0.0
    return [float(bound) for bound in finite if bound >= least * (1 - 1e-9)]


def _within(time: np.ndarray, held: Sequence[np.ndarray], stages: int, bound: float, memory: float) -> tuple[int, ...] | None:
    """The ends of the stages with the least sum of times, none above `bound`; None where there are none."""
    count = time.shape[0] - 1
    least = np.full((stages + 1, count + 1), math.inf)
    least[0, count] = 0.0
    chosen = np.zeros((stages + 1, count + 1), dtype=np.int64)
    for number in range(1, stages + 1):
        allowed = np.where((time <= bound * (1 + 1e-12)) & (held[number - 1] <= memory), time, math.inf)
        tried = allowed + least[number - 1][None, :]
        chosen[number] = tried.argmin(axis=1)
        least[number] = tried.min(axis=1)
    if not math.isfinite(least[stages, 0]):
        return None
    ends, first = [], 0
    for number in range(stages, 0, -1):
        first = int(chosen[number, first])
        ends.append(first)
    return tuple(ends)
