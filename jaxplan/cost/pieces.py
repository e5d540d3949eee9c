"""What a piece of a program takes of memory where it runs by itself, as a program of its own."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence, Set

from jaxplan.cost.buffers import HELD, OUTPUT, Buffer, outside_outputs
from jaxplan.cost.memory import lives_of


def piece_bytes(
    buffers: Sequence[Buffer], places: Sequence[int], given: Set[int], leaves: Mapping[int, tuple[float, int]], shares: bool
) -> float:
    """Bytes per device that some operators take beside what they are given, their results included.

    `buffers`: of the whole program; `places`: of these operators in its order, ascending; `given`: tensors that somebody else
    keeps; `leaves`: {tensor: (bytes per device, the place where it is made)} of the results. `shares`: whether temporaries lie in
    buffers of results that are not yet written, as XLA has it on CPU.
    """
    if not places:
        return 0.0
    end, own = len(places), set(places)
    found = [
        Buffer(tensor, OUTPUT, nbytes, min(bisect.bisect_left(places, made), end - 1), end)
        for tensor, (nbytes, made) in leaves.items()
    ]
    for buffer in buffers:
        first, last = bisect.bisect_left(places, buffer.first), bisect.bisect_right(places, buffer.last) - 1
        foreign = buffer.kind == HELD and (buffer.first not in own or buffer.tensor in given or buffer.tensor in leaves)
        if first <= last and buffer.kind != OUTPUT and not foreign:
            found.append(Buffer(buffer.tensor, buffer.kind, buffer.nbytes, first, last))
    total = sum([nbytes for nbytes, _ in leaves.values()])
    beside = outside_outputs(found) if shares else [buffer for buffer in found if buffer.kind != OUTPUT]
    return total + float(lives_of(beside, end + 1).max(initial=0.0))
