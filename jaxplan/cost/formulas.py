"""The only home of each cost formula. Every function works on numbers and on symbols alike.

Bytes are per device. `n` is the size of a mesh axis, `whole` the bytes of the local tensor un-split by that axis.
The forms are those of bandwidth-optimal ring collectives (Chan, Heimlich, Purkayastha, van de Geijn, "Collective
communication: theory, practice, and experience", 2007) and of the BSP model (Valiant, 1990).
"""

from __future__ import annotations

from typing import Any

Value = Any
"""A number, or a SymPy expression."""

ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "permute": 1, "slice": 0}
"""Supersteps of each exchange."""


def all_reduce_bytes(n: Value, whole: Value) -> Value:
    """Bytes sent by a reduce-scatter followed by an all-gather: 2 (n-1)/n B."""
    return 2 * (n - 1) / n * whole


def all_gather_bytes(n: Value, whole: Value) -> Value:
    """Bytes sent: (n-1)/n B; also of a reduce-scatter."""
    return (n - 1) / n * whole


def all_to_all_bytes(n: Value, whole: Value) -> Value:
    """Bytes sent: all but one n-th of the local shard B/n."""
    return (n - 1) / n * whole / n


def work_seconds(flops: Value, local_bytes: Value, r: Value, m: Value, larger: Any = max) -> Value:
    """Local work: the slower of arithmetic and memory traffic. `larger`: `max`, or its symbolic twin."""
    return larger(flops * r, local_bytes * m)


def exchange_seconds(h: Value, rounds: Value, g: Value, latency: Value) -> Value:
    """One axis' part of a superstep: h g + l."""
    return h * g + rounds * latency


def pipeline_ticks(microbatches: Value, stages: Value) -> Value:
    """Ticks until the last of m micro-batches has left the last of k stages: m + k - 1 (Huang et al., "GPipe", 2019)."""
    return microbatches + stages - 1


def bubble_share(microbatches: Value, stages: Value) -> Value:
    """The share of the ticks at which a device of a pipeline has nothing to do: (k - 1) / (m + k - 1)."""
    return (stages - 1) / pipeline_ticks(microbatches, stages)


def ring_slots(microbatches: Value, stages: Value) -> Value:
    """Micro-batches of which a stage keeps residuals where it alternates between forward and backward: from a micro-batch's way
    through the first stage to its return there 2 k - 1 enter, the first and the last included; never more than there are."""
    return min(microbatches, 2 * stages - 1)
