"""Ways to search that share the work, each by what it has gained for it: a way that gains nothing makes room for the others.

Which way serves a problem is not known before: diving for hubs is all that helps on one, and costs ten walks for nothing on
another. Work is counted, not timed, so that a search stays the same each time.
"""

from __future__ import annotations

import math

import numpy as np

LEAST = 0.2
"""Share of the work that each way keeps, whatever it gained: what has gained nothing yet may do so later."""
MEMORY = 500.0
"""Work, in sweeps of the dual, over which what was gained fades to 1 / e of itself."""
EXPECTED, COUNTED = 0.1, 0.03
"""What each way counts as having gained before anything is known, a share of what there was to gain; and what counts, at most, of
one gain: the first steps down from any answer at all are easy, and tell nothing."""


class Shares:
    """So many ways; `gain` and `work` fade."""

    def __init__(self, ways: int) -> None:
        self.gain = np.full(ways, EXPECTED)
        self.work = np.full(ways, MEMORY / ways)
        self.served = np.zeros(ways)  # work over the share that the way then had

    @property
    def shares(self) -> np.ndarray:
        """Of the work, for each way: LEAST of it, and of the rest what it gained for its work as a part of all."""
        rate = self.gain / self.work
        return LEAST + (1.0 - LEAST * len(rate)) * rate / rate.sum()

    def next(self) -> int:
        """The way that was served least for its share."""
        return int(self.served.argmin())

    def note(self, way: int, work: float, gain: float) -> None:
        """A way has done so much work, in sweeps of the dual, and gained this share of what there was to gain."""
        fading = math.exp(-work / MEMORY)
        self.gain *= fading
        self.work *= fading
        self.served[way] += work / self.shares[way]
        self.gain[way] += min(gain, COUNTED)
        self.work[way] += work
