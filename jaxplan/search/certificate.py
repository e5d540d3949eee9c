"""How far an assignment may be from the optimum: a proven lower bound for the problem as it is, with nothing folded."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from jaxplan import problem as problems
from jaxplan.problem import Assignment, Meter, Problem, evaluate, within_limit
from jaxplan.reduce import dominance, eliminate
from jaxplan.search.alpa import integer_program
from jaxplan.search.dual import Relaxation
from jaxplan.search.elimination import lower_bound, min_fill_order, option_weights, solve
from jaxplan.search.hsm2dl import elimination_order, hsm2dl
from jaxplan.search.limited import at_prices
from jaxplan.search.moves import FUSED_CAP, SEED, Grove

TOLERANCE = 2e-4
"""Relative gap at which nothing more is done."""
ROUNDING = 1e-10
"""By what fraction a bound is lowered, against sums of rounded numbers."""
ROUND = 10
"""Sweeps between two looks at the bound."""
MOST_SWEEPS = 320
PATIENCE = 1e-3
"""A round that closes less of the gap than this fraction is the last."""
DENSE = 1_500_000
"""Table entries up to which what is still open is written out and solved, on the way."""
CAP = 1 << 20
"""Entries of a table that eliminating a variable may build."""
WIDE = 0.01
"""Relative gap above which more is written out and larger tables are built, once messages raise the bound no further."""
WIDE_DENSE, WIDE_CAPS = 4_000_000, (1 << 22, 1 << 24)
"""What `DENSE` and `CAP` are then, one cap after the other."""
CLOSING = 0.95
"""Below that gap nothing more is done either where more than this share of it is left from one look to the next."""
LATER = 1e-4
"""By what share the cheapest known must have come down at the end for it to pay to strike out more, and to go on."""
FORESTS = 2
"""Re-opened in what is read off the messages, and again in what it is fused to."""
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
    reader = _Reader(relaxation, elimination_order(problem))
    start, sweeps, dual = time.perf_counter(), 0, -math.inf
    next_look, gap = 2 * ROUND, math.inf
    while True:
        slack = max(0.0, best.seconds + ROUNDING * abs(best.seconds) - dual)
        for turn in range(ROUND):
            relaxation.sweep(turn % 2 == 0, slack)
        sweeps, before, dual, known = sweeps + ROUND, dual, relaxation.bound(), best.seconds
        best.rise(dual)
        if not best.proven:
            reader.read(best)
        late = time.perf_counter() - start > seconds
        stuck = dual - before <= PATIENCE * (best.seconds - dual) and not best.below(known)
        look = sweeps >= next_look
        last = stuck or late or sweeps >= MOST_SWEEPS
        if not best.proven and (look or last) and relaxation.entries() <= DENSE:
            _eliminated(relaxation, best, reader, CAP)
        for cap in WIDE_CAPS if last and not late else ():
            if not best.within(WIDE) and relaxation.entries() <= WIDE_DENSE:
                _eliminated(relaxation, best, reader, cap)
        if best.proven or (last and not (stuck and best.below(known))):
            break
        if look:
            next_look, before, gap = 3 * sweeps // 2, gap, best.gap
            if best.within(WIDE) and gap > CLOSING * before:
                break
    if program_seconds > 0 and not best.proven and relaxation.entries() <= WIDE_DENSE:
        _programmed(relaxation, best, program_seconds)
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
        return self.within(TOLERANCE)

    @property
    def gap(self) -> float:
        """Seconds by which the cheapest may be above the optimum."""
        return self.seconds - self.bound()

    def within(self, share: float) -> bool:
        """Whether the gap is at most such a share of what the cheapest costs."""
        return self.gap <= share * abs(self.seconds)

    def below(self, seconds: float) -> bool:
        """Whether the cheapest is so far below an earlier one that more can be struck out."""
        return self.seconds < seconds - LATER * abs(seconds)


class _Reader:
    """What messages say, as assignments: read off node by node, re-opened along forests, and fused with the cheapest known."""

    def __init__(self, relaxation: Relaxation, elimination: list[int]) -> None:
        self._relaxation, self._elimination = relaxation, elimination
        self._grove, self._rng = Grove(relaxation), np.random.default_rng(SEED)

    def read(self, best: _Best) -> None:
        """What the messages say themselves."""
        self.join(best, self._relaxation.decided(forward=True))

    def join(self, best: _Best, options: Sequence[int]) -> None:
        """Keep what becomes of an assignment, numbers among what is open, if it is cheaper."""
        relaxation, grove = self._relaxation, self._grove
        numbers = zip(grove.numbered(best.choices), self._reopened(options), strict=True)
        candidates = [tuple(dict.fromkeys(both)) for both in numbers]
        first = np.zeros(len(candidates), dtype=np.int64)
        picked, _ = solve(relaxation.tables(candidates), self._elimination, cap=FUSED_CAP, piece=FUSED_CAP, known=first)
        joined = [own[k] for own, k in zip(candidates, picked.tolist(), strict=True)]
        best.meet(relaxation.choices(self._reopened(joined)))

    def _reopened(self, options: Sequence[int]) -> list[int]:
        found = list(options)
        for _ in range(FORESTS):
            found = self._grove.moved(found, self._rng)
        return found


class _Rest:
    """The options still open, written out in re-written prices and reduced exactly. `core`: what is left to be decided; `beside`:
    seconds that any decision costs more than the core's price. `cap`: entries of a table."""

    def __init__(self, relaxation: Relaxation, cap: int) -> None:
        written = relaxation.tables()
        smaller, self._undo_dominance = dominance(written)
        self.core, _, self._undo_elimination = eliminate(smaller, cap)
        first = np.zeros(len(self.core.costs), dtype=np.int64)
        self.beside = written.price(self.whole(first)) - self.core.price(first)

    def whole(self, options: np.ndarray) -> np.ndarray:
        """Numbers among what is open, for options of the core."""
        return self._undo_dominance(self._undo_elimination(options))


def _eliminated(relaxation: Relaxation, best: _Best, reader: _Reader, cap: int) -> None:
    """What is still open, by elimination; an assignment that is not exact is joined with the cheapest known."""
    rest = _Rest(relaxation, cap)
    order = min_fill_order(option_weights(map(len, rest.core.costs)), rest.core.pairs)
    floor, options, exact = lower_bound(rest.core, order, cap)
    numbers = rest.whole(options)
    best.rise(floor + rest.beside)
    best.meet(relaxation.choices(numbers))
    if not exact and not best.proven:
        reader.join(best, numbers.tolist())


def _programmed(relaxation: Relaxation, best: _Best, seconds: float) -> None:
    """What is still open, by the integer program."""
    rest = _Rest(relaxation, CAP)
    if not rest.core.costs:
        return
    kept = [np.arange(len(cost)) for cost in rest.core.costs]
    options, floor, _ = integer_program(rest.core, kept, seconds, PROGRAM_SCALE * abs(best.seconds))
    best.rise(floor + rest.beside)
    if options is not None:
        best.meet(relaxation.choices(rest.whole(options)))
