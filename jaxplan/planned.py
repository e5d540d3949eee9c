"""One exchange that a plan expects, and which of a conditional's exchanges count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jaxplan.graph.branches import branches_around, worst_branches
from jaxplan.graph.nouns import Path


@dataclass(frozen=True)
class PlannedExchange:
    """One collective that the plan expects.

    `kind`: all_reduce, all_gather, reduce_scatter, all_to_all or permute. `wire_bytes`: {axis: bytes sent per device} each
    time; `times`: how often in one call. `operator`: the primitive it serves; `source`: the user's "file.py:line".
    `dtype`: what is sent: the tensor's own, or what the machine's matrix unit rounds it to.
    """

    kind: str
    axes: tuple[str, ...]
    wire_bytes: Mapping[str, float]
    times: float
    shape: tuple[int, ...]
    dtype: str
    operator: str
    source: str

    @property
    def total_bytes(self) -> float:
        """Bytes per device and call, over all axes."""
        return sum(self.wire_bytes.values()) * self.times


def of_worst_branches(
    found: Sequence[tuple[Path, PlannedExchange]], branches: Mapping[Path, float]
) -> list[PlannedExchange]:
    """Of every conditional the exchanges of the branch that sends most, as often as they run; and all others. `found`: with the
    paths where they stand; `branches`: see `Graph`."""
    worst = worst_branches(branches, [(path, exchange.total_bytes) for path, exchange in found]) if branches else {}
    kept = []
    for path, exchange in found:
        around = branches_around(path, branches)
        if exchange.times and all(branch in worst for branch in around):
            kept.append(replace(exchange, times=exchange.times / worst[around[-1]]) if around else exchange)
    return kept
