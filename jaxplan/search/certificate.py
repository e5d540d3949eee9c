"""How far an assignment may be from the optimum: a proven lower bound for the problem as it is, with nothing folded."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np

from jaxplan import problem as problems
from jaxplan.problem import Assignment, Meter, Problem, evaluate, within_limit
from jaxplan.reduce import dominance, eliminate
from jaxplan.search.alpa import integer_program
from jaxplan.search.dual import Relaxation
from jaxplan.search.elimination import lower_bound, min_fill_order, option_weights
from jaxplan.search.hsm2dl import hsm2dl
from jaxplan.search.limited import at_prices

TOLERANCE = 2e-4
"""Relative gap at which nothing more is done."""
ROUNDING = 1e-10
"""By what fraction a bound is lowered, against sums of rounded numbers."""
ROUND = 10
"""Sweeps between two looks at the bound."""
MOST_SWEEPS = 320
PATIENCE = 1e-3
"""A round that closes less of the gap than this fraction is the last."""
DENSE = 500_000
"""Table entries up to which what is still open is written out and solved."""
CAP = 1 << 20
"""Entries of a table that eliminating a variable may build."""
PROGRAM_SCALE = 0.01
"""What fraction of an assignment's price counts as 1 for the integer program's solver, whose tolerances are absolute."""


def certify(problem: Problem, found: Assignment, *, seconds: float = 60.0, program_seconds: float = 0.0) -> Assignment:
    """The cheapest assignment known, `found` or better, with a `bound`: no assignment of the problem costs less.

    Within a limit on usages the bound is the better of two: that of the problem without its limit, and one in which usages cost
    what a search within the limit comes to (multipliers: any that are not negative give a bound). What is returned stays within
    the limit if `found` does. See `unlimited` for the rest.
    """
    free = unlimited(problem, found, seconds=seconds, program_seconds=program_seconds)
    if problem.limit == math.inf or free.bound is None or free.seconds - free.bound <= TOLERANCE * abs(free.seconds):
        return free
    return _at_multipliers(problem, free, seconds, program_seconds)


def _at_multipliers(problem: Problem, free: Assignment, seconds: float, program_seconds: float) -> Assignment:
    """With the higher one of its bound and that of the problem in which usages have prices. For any prices p >= 0 per step, what
    is within the limit costs at least the least of (seconds + p . usage), less p . limit."""
    meter = Meter(problem)
    loose = hsm2dl(at_prices(problem, np.zeros(len(problem.usages))))
    known = hsm2dl(replace(problem, starts=(loose.choices, free.choices)))
    multipliers = np.maximum(0.0, np.asarray(known.notes["multipliers"]))
    if not multipliers.any():
        return free
    priced = at_prices(problem, meter.spans(multipliers))
    proven = unlimited(priced, hsm2dl(priced), seconds=seconds, program_seconds=program_seconds)
    limit = problem.limit * (1 + problems.ROUNDING)
    idle = meter.levels(np.zeros(len(problem.usages)))
    bounds = [free.bound, None if proven.bound is None else proven.bound - float(multipliers @ (limit - idle))]
    best = min(free.seconds, max([bound for bound in bounds if bound is not None]))
    return replace(free, bound=best, notes={**free.notes, "multipliers": multipliers})


def unlimited(problem: Problem, found: Assignment, *, seconds: float = 60.0, program_seconds: float = 0.0) -> Assignment:
    """The cheapest assignment known, `found` or better, with a `bound` of the problem without its limit.

    Messages raise a dual bound (`dual.py`); options that cost more above it than the cheapest assignment known are struck out;
    what is left is reduced and eliminated, exactly where it is small, else by mini-buckets, now and then and at the end.

    `seconds`: of sweeps, after which it makes do with the bound reached. `program_seconds`: how long the integer program may work
    on the rest after that. A limit on usages is not in the bound, which holds with it too; what is returned stays within it if
    `found` does. `notes`: the sweeps, the options struck out, the table entries of what is left. Raises ValueError if `found` is
    no legal assignment, or if the problem is too large for a bound.
    """
    best = _Best(problem, found.choices)
    if not problem.nodes:
        return Assignment(best.choices, 0.0, 0.0, found.notes)
    relaxation = Relaxation(problem, best.seconds)
    start, sweeps, dual = time.perf_counter(), 0, -math.inf
    next_look = 2 * ROUND
    while True:
        slack = max(0.0, best.seconds + ROUNDING * abs(best.seconds) - dual)
        for turn in range(ROUND):
            relaxation.sweep(turn % 2 == 0, slack)
        sweeps, before, dual = sweeps + ROUND, dual, relaxation.bound()
        best.rise(dual)
        best.meet(relaxation.decoded(forward=True))
        stuck = dual - before <= PATIENCE * (best.seconds - dual)
        last = stuck or sweeps >= MOST_SWEEPS or time.perf_counter() - start > seconds
        if not best.proven and (last or sweeps >= next_look) and relaxation.entries() <= DENSE:
            next_look = 3 * sweeps // 2
            _solve_rest(relaxation, best, program_seconds if last else 0.0)
        if best.proven or last:
            break
    notes = {"sweeps": sweeps, "struck out": relaxation.dropped, "table entries left": relaxation.entries()}
    return Assignment(best.choices, best.seconds, best.bound(), {**found.notes, **notes})


def trws(problem: Problem) -> Assignment:
    """Message passing as a search: starts from `hsm2dl`, strikes out what cannot be cheaper, and solves the rest where it can.

    Sequential tree-reweighted message passing (Kolmogorov, TPAMI 2006) with what `certify` adds to it; nothing is folded, and the
    assignment has a bound. Takes longer than `hsm2dl`, in proportion to the operators before folding.
    """
    return certify(problem, hsm2dl(problem))


class _Best:
    """The cheapest assignment met, and the highest bound of what is not struck out."""

    def __init__(self, problem: Problem, choices: np.ndarray) -> None:
        self.problem, self.choices, self.seconds = problem, choices, evaluate(problem, choices)
        self._floor = -math.inf
        if not math.isfinite(self.seconds):
            raise ValueError("the assignment is not legal (its price is infinite): only a legal one can be certified")

    def meet(self, choices: np.ndarray) -> None:
        """Keep an assignment if it is cheaper and within the problem's limit."""
        seconds = evaluate(self.problem, choices)
        if seconds < self.seconds and within_limit(self.problem, choices):
            self.choices, self.seconds = choices, seconds

    def rise(self, bound: float) -> None:
        """Keep a bound if it is higher."""
        self._floor = max(self._floor, bound)

    def bound(self) -> float:
        """Seconds that no assignment goes below: those struck out cost at least what the cheapest does."""
        return min(self._floor - ROUNDING * abs(self._floor), self.seconds)

    @property
    def proven(self) -> bool:
        """Whether the gap is within `TOLERANCE`."""
        return self.seconds - self.bound() <= TOLERANCE * abs(self.seconds)


def _solve_rest(relaxation: Relaxation, best: _Best, program_seconds: float) -> None:
    """The options still open, by exact reductions and elimination; by the integer program if these are not exact."""
    written = relaxation.tables()
    smaller, undo_dominance = dominance(written)
    core, _, undo_elimination = eliminate(smaller, CAP)
    order = min_fill_order(option_weights(map(len, core.costs)), core.pairs)
    floor, options, exact = lower_bound(core, order, CAP)
    whole = undo_dominance(undo_elimination(options))
    eliminated = written.price(whole) - core.price(options)  # seconds that are no longer in the core
    best.rise(floor + eliminated)
    best.meet(relaxation.choices(whole))
    if not exact and program_seconds > 0 and not best.proven:
        scale = PROGRAM_SCALE * abs(best.seconds)
        answer, floor, _ = integer_program(core, [np.arange(len(cost)) for cost in core.costs], program_seconds, scale)
        best.rise(floor + eliminated)
        if answer is not None:
            best.meet(relaxation.choices(undo_dominance(undo_elimination(answer))))
