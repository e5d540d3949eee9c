"""Room `solve`: problems with a limit on usages over lifetime intervals become solutions. Knows nothing of JAX."""

from __future__ import annotations

from jaxplan.solve.driver import Incumbent, solve
from jaxplan.solve.nouns import IntervalProblem, NoSolutionError, Peak, Solution, cost_of, least_peak, peak_usage

__all__ = [
    "Incumbent",
    "IntervalProblem",
    "NoSolutionError",
    "Peak",
    "Solution",
    "cost_of",
    "least_peak",
    "peak_usage",
    "solve",
]
