"""Several workers on one problem: threads, whose kernels run at once, and what they tell one another.

Threads, not processes: they end with the process however it ends, nothing is copied to them, and Numba's kernels do not hold the
interpreter's lock. Without Numba nearly everything does, and one worker it is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import numpy as np

from jaxplan.solve.branching import Tree
from jaxplan.solve.compiled import HAVE_NUMBA
from jaxplan.solve.dual import Dual

MOST = 4
"""Workers, at most: what they do outside of kernels, a quarter to a third, goes one at a time."""


def available() -> int:
    """Workers that are worth their while here."""
    if not HAVE_NUMBA:
        return 1
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # no such thing on this system
        cores = os.cpu_count() or 1
    return max(1, min(MOST, cores))


class Team:
    """`dual`: the latest that was shown, to be read and left as it is; `tree`: of open problems, once there is one."""

    def __init__(self) -> None:
        self.dual: Dual | None = None
        self.tree: Tree | None = None
        self.trouble: BaseException | None = None
        self.ended = False
        self.ready = threading.Event()
        self.bests: dict[int, tuple[float, np.ndarray]] = {}
        self.heard: dict[tuple[int, int], float] = {}

    def show(self, dual: Dual) -> None:
        """Let the others go on from this dual."""
        self.dual = dual.copied()
        self.ready.set()

    def wait(self) -> None:
        """Until there is a dual, or nothing left to do."""
        self.ready.wait()

    def end(self) -> None:
        """Have all workers stop at the next look."""
        self.ended = True
        self.ready.set()

    def run(self, work: Callable[[], None]) -> None:
        """Run another worker, and keep what went wrong."""
        try:
            work()
        except BaseException as error:  # raised again by the first worker
            self.trouble = error

    def tell(self, place: int, cost: float, chosen: np.ndarray) -> None:
        """A worker's best."""
        self.bests[place] = cost, chosen.copy()

    def news(self, place: int, cost: float) -> list[np.ndarray]:
        """The other workers' bests that this one has not been told yet and that are not its own, of `cost`."""
        found = []
        for other, (theirs, chosen) in sorted(self.bests.items(), key=lambda item: item[0]):
            if other != place and theirs != cost and self.heard.get((place, other)) != theirs:
                self.heard[place, other] = theirs
                found.append(chosen)
        return found
