"""From a problem to a solution: reduce, ascend the dual, walk from its iterates, join the best parts of the walks."""

from __future__ import annotations

import contextlib
import copy
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from jaxplan.solve.branching import Tree
from jaxplan.solve.compiled import HAVE_NUMBA
from jaxplan.solve.core import BARRED, core_of, core_usage
from jaxplan.solve.dual import Dual
from jaxplan.solve.family import GAIN, Family
from jaxplan.solve.nouns import IntervalProblem, NoSolutionError, Solution, cost_of, peak_usage
from jaxplan.solve.primal import Walk
from jaxplan.solve.reductions import Reducer, expand
from jaxplan.solve.repeats import Repeats
from jaxplan.solve.shares import Shares
from jaxplan.solve.team import Team, available

FIRST_STEP, LAST_STEP = 0.05, 5e-6
"""Steps of the dual's ascent, as `Dual.ascend` takes them, falling geometrically."""
ASCENT = 300
"""Steps of one ascent."""
REFINEMENT = 20
"""Steps of each later ascent."""
PASSES = 6
"""Passes of the dual before it is read."""
ROUNDING, NOISE, LEAN = 2, (0.0003, 0.01), 0.1
"""Passes before the dual is rounded; what strategies then cost more at random, in costs per node, between these; and the standard
deviation of the logarithm by which multipliers differ from the best ones."""
HUB_NOISE = 0.0003, 0.03
"""What strategies of hubs cost more at random while diving, in costs per node and chain, between these."""
DIVES, LIKELY = 3, 0.7
"""Dives until one has a bound below the best known cost, at most; and how likely one keeps most of the best one's hubs."""
PLAIN, DIVING, SPLITTING = range(3)
"""Ways to search while hubs matter: a walk that begins without a dive, one with, and splitting open problems."""
WALKED = 60.0
"""Work of a new walk with its merges, about, in sweeps of the dual."""
APART = 0.01
"""Gap above which hubs are dived for and branched on."""
RELAXED, RELAXED_HEATS = 8, (0.17, 1.5)
"""Chunks of moves of a walk that pays for its usage, and its first heat, in costs per node, between these."""
FOREST = 80
"""Nodes of a forest, at most; as a rule far fewer, for the logarithm of the number is uniform."""
MOVES = 1.0 if HAVE_NUMBA else 0.1
"""Forests tried in one annealing, per node."""
CHUNKS = 20
"""Looks at the clock in one annealing."""
HEATS = 0.3, 3.0
"""Heat of shaking, in costs per node, between these; annealing begins at the first."""
PENALTIES = 0.3, 3.0
"""Penalty of what is over the limit where shaking begins, in largest multipliers, between these."""
COOLING = 1e-3
"""What annealing cools by."""
GROWTH, HURRIED, ATTEMPTS = 1.2, 2.0, 120
"""The penalty's growth from one attempt at repair to the next; where any solution will do; and the most attempts."""
TURN = 2
"""New walks from the dual for each one that is brought within the limit."""
ASCENDING = 0.3
"""Of the time, for the first ascent of the dual, at most."""
SHOWN, SHOWING = 60, 30
"""Steps of that ascent before the other workers begin, at the dual as it is then; and from one dual that they see to the next."""
REFINED = 12
"""New walks between two ascents of the dual."""
PATIENCE = 6
"""Merges that gain nothing to speak of, after which it is another family's turn."""
BRANCHED, BRANCHES, HUB_BRANCHES = 1000, 3, 4
"""Nodes of the largest problem that branches without hubs; problems that are split after each new walk, without hubs and with."""
BLUR = 3.0
"""How much more the costs of strategies are blurred than results may get worse."""
PROVEN = 1e-9
"""A gap below which a solution counts as optimal."""


@dataclass
class Incumbent:
    """The best known so far, readable at any moment. `log`: called with a line of text when something improves.

    `stopped`: set it from another thread to end the search. `clock`: what time limits are read off, from `began` on.
    `grace`: seconds that a search goes on after its time limit while it has found nothing at all.
    """

    problem: IntervalProblem
    log: Callable[[str], None] = lambda line: None
    cost: float = math.inf
    bound: float = -math.inf
    reducer: Reducer | None = None
    began: float = math.nan
    stopped: bool = False
    nearest: tuple[Reducer, np.ndarray] | None = None
    clock: Callable[[], float] = time.monotonic
    grace: float = 0.0
    _held: tuple[Reducer | None, np.ndarray] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if math.isnan(self.began):
            self.began = self.clock()

    def offer(self, reducer: Reducer | None, chosen: np.ndarray, cost: float) -> None:
        """Take a feasible assignment of the reduced problem (of the problem itself without a reducer) if it is better."""
        if cost < self.cost:
            with self._lock:  # another worker may be here
                if cost < self.cost:
                    self._held = (reducer, chosen.copy())
                    self.cost = cost
                    self.log(f"{self.clock() - self.began:7.1f} s  cost {cost:.9g}  bound {self.bound:.9g}")

    def prove(self, bound: float) -> None:
        """Take a lower bound of every feasible cost if it is higher."""
        with self._lock:
            self.bound = max(self.bound, bound)

    def solution(self) -> Solution | None:
        """The best solution, its cost and usages computed again from the problem; None if there is none."""
        if self._held is None:
            return None
        reducer, chosen = self._held
        strategies = chosen if reducer is None else expand(reducer, chosen)
        cost, peak = cost_of(self.problem, strategies), peak_usage(self.problem, strategies)
        if not math.isfinite(cost) or peak.usage > self.problem.limit:
            raise AssertionError(f"a solution of cost {cost} and peak {peak} is not feasible: the search is wrong")
        return Solution(strategies, cost, min(self.bound, cost))

    @property
    def proven(self) -> bool:
        """No better solution exists, up to PROVEN."""
        return math.isfinite(self.cost) and self.cost - self.bound <= PROVEN * abs(self.cost)

    def shortage(self) -> str:
        """What was missing where the search came nearest to a solution."""
        if self.nearest is None:
            return "no feasible solution found: the search had not begun"
        reducer, chosen = self.nearest
        strategies = expand(reducer, chosen)
        peak = peak_usage(self.problem, strategies)
        if peak.usage > self.problem.limit:
            return (
                f"no feasible solution found: the nearest uses {peak.usage:g} in [{peak.start}, {peak.end}), "
                f"{peak.usage - self.problem.limit:g} more than the limit of {self.problem.limit:g}"
            )
        return "no feasible solution found: the nearest within the limit has impossible pairs of strategies"


def solve(
    problem: IntervalProblem,
    time_limit: float = 60.0,
    seed: int = 0,
    incumbent: Incumbent | None = None,
    workers: int | None = None,
) -> Solution:
    """The best feasible solution found in `time_limit` seconds, with a lower bound; the best so far is in `incumbent`.

    `workers`: threads that search at once, by default one per core that this process may use, and one without Numba; with one,
    the answer is the same each time unless time runs out. Raises NoSolutionError, with the interval and the shortage, if none
    exists or none was found.
    """
    incumbent = incumbent or Incumbent(problem)
    workers = available() if workers is None else workers
    search = Search(problem, incumbent, np.random.default_rng(seed), incumbent.began + time_limit, workers=workers)
    search.run()
    found = incumbent.solution()
    if found is None:
        raise NoSolutionError(incumbent.shortage())
    return found


class OutOfTime(Exception):
    """The time limit is reached."""


class Search:
    """One search: the reduced problem, its dual, and the walks. `rounds`: how many walks to try, besides the deadline.

    Its other `workers` are copies of it that share the problem, the incumbent and the `team`; `place`: which of them it is.
    """

    place = 0

    def __init__(
        self,
        problem: IntervalProblem,
        incumbent: Incumbent,
        rng: np.random.Generator,
        deadline: float,
        rounds: float = math.inf,
        workers: int = 1,
    ) -> None:
        self.problem, self.incumbent, self.rng, self.deadline, self.rounds = problem, incumbent, rng, deadline, rounds
        self.workers, self.team = workers, Team()
        self.step = LAST_STEP
        self.nearest = math.inf  # the least excess of usage of any walk
        self.reducer: Reducer | None = None
        self.best: Walk | None = None  # of all families
        self.champion: Family | None = None  # the best of those that have come to a stop

    def run(self) -> None:
        """Search until the deadline or a proof. Raises NoSolutionError if the reductions show that there is no solution."""
        self.offer_smallest()
        reducer = self.reducer = Reducer(self.problem)
        reducer.run()
        self.core = core_of(reducer)
        if len(self.core.start) == 1:  # the reductions have decided everything
            self.incumbent.prove(reducer.constant)
            self.incumbent.offer(reducer, np.zeros(0, dtype=np.int64), reducer.constant)
            return
        self.dual = Dual(self.core, reducer.constant)
        with contextlib.suppress(OutOfTime):
            self.improve()

    def offer_smallest(self) -> None:
        """Every node at its smallest usage: where that is possible, there is something to print from the start."""
        pairs = zip(self.problem.costs, self.problem.usages)
        chosen = np.array([np.lexsort((cost, usage))[0] for cost, usage in pairs], dtype=np.int64)
        cost = cost_of(self.problem, chosen)
        if math.isfinite(cost) and peak_usage(self.problem, chosen).usage <= self.problem.limit:
            self.incumbent.offer(None, chosen, cost)

    def check(self) -> None:
        """Raises OutOfTime at the deadline, when it is told to stop, and when there is nothing left to search."""
        known, now = self.incumbent, self.incumbent.clock()
        late = now >= self.deadline + (0.0 if math.isfinite(known.cost) else known.grace)
        if late or known.stopped or known.proven or self.team.ended:
            raise OutOfTime

    def improve(self) -> None:
        """The whole search on the reduced problem: walks from the dual are merged, and what comes out is repaired."""
        self.check()
        self.size = len(self.core.start) - 1
        chosen = np.zeros(self.size, dtype=np.int64)
        for _ in range(PASSES):
            _, chosen, _ = self.dual.passes(1)
            self.note_bound()
        self.repair(Walk(self.core, chosen), self.dual.multipliers, heat=0.0, growth=HURRIED)
        assert self.reducer is not None
        self.repeats = Repeats(self.reducer)
        with self.helped():
            began = self.incumbent.clock()
            self.ascend(began + ASCENDING * (self.deadline - began))
            self.team.show(self.dual)
            tree = Tree(self.dual, self.look)
            if self.size <= BRANCHED or len(tree.hubs):
                self.team.tree = tree
            self.work()

    @contextlib.contextmanager
    def helped(self) -> Iterator[None]:
        """The other workers, each in a thread of its own: the kernels run without the interpreter's lock."""
        twins = []
        for place, rng in enumerate(self.rng.spawn(self.workers - 1), 1):
            twin = copy.copy(self)
            twin.place, twin.rng = place, rng
            twins.append(threading.Thread(target=self.team.run, args=(twin.help,), daemon=True))
        for twin in twins:
            twin.start()
        try:
            yield
        finally:
            if twins:
                self.team.end()
            for twin in twins:
                twin.join()
        if self.team.trouble is not None:
            raise self.team.trouble

    def help(self) -> None:
        """What another worker does: walks and branching, from the first dual that is shown to it."""
        self.team.wait()
        with contextlib.suppress(OutOfTime):
            self.check()
            self.work()

    def work(self) -> None:
        """Walks are merged in families that take turns, and problems split, until `check` ends it."""
        family, number, tree = Family(self.core, self.rng, self.repeats), 0, None
        hubs, shares = len(family.hubs) > 0, Shares(3)
        while number < self.rounds:
            number += 1
            if self.place:
                assert self.team.dual is not None
                self.dual = self.team.dual
            if tree is None and self.team.tree is not None:
                tree = self.team.tree if self.place == 0 else self.team.tree.twin(self.look)
            sharing = tree is not None and hubs and self.apart
            way = shares.next() if sharing else PLAIN
            cost, bound, swept = self.incumbent.cost, self.incumbent.bound, tree.dual.swept if tree is not None else 0
            if way == SPLITTING:
                assert tree is not None
                self.branch(tree)
            else:
                family = self.turn(family, tree if way == DIVING else None, number)
            if sharing:
                assert tree is not None
                work = tree.dual.swept - swept + (0.0 if way == SPLITTING else WALKED)
                shares.note(way, work, self.gained(cost, bound))
            elif tree is not None and self.size <= BRANCHED:
                self.branch(tree)
            elif self.place == 0 and number % REFINED == 0:
                self.refine()
                self.team.show(self.dual)

    def turn(self, family: Family, tree: Tree | None, number: int) -> Family:
        """A new walk, from a dive where there is a tree, and what it brings: the family whose turn is next."""
        family.add(family.level(self.relaxed(tree, family.best), self.dual.best_multipliers))
        self.breed(family)
        if number % TURN == 0 and (family.best is None or family.stale):
            walk = self.returned(family)
            family.add(walk)
            self.keep(family)
        return self.succeed(family) if family.stale >= PATIENCE else family

    def gained(self, cost: float, bound: float) -> float:
        """What this worker's best and the bound have gained since then, as a share of the gap between them."""
        if not math.isfinite(cost):
            return float(self.best is not None)
        own = cost if self.best is None else self.best.cost + self.dual.offset
        return (max(0.0, cost - own) + self.incumbent.bound - bound) / max(cost - bound, PROVEN * abs(cost))

    @property
    def apart(self) -> bool:
        """Cost and bound are so far apart that the dual cannot be right about all hubs."""
        cost = self.incumbent.cost
        return not math.isfinite(cost) or cost - self.incumbent.bound > APART * abs(cost)

    def breed(self, family: Family) -> None:
        """Merge a family, and keep what is better than anything known."""
        family.merge(self.dual.best_multipliers, self.check)
        self.keep(family)

    def branch(self, tree: Tree) -> None:
        """Split some of the open problems, once there is a cost to compare bounds with."""
        if not math.isfinite(self.incumbent.cost):
            return
        for _ in range(HUB_BRANCHES if len(tree.hubs) else BRANCHES):
            tree.grow(self.incumbent.cost)
            self.incumbent.prove(min(tree.bound, self.incumbent.cost))
            self.check()

    def look(self, chosen: np.ndarray) -> None:
        """Offer positions if they are within the limit."""
        if (core_usage(self.core, chosen) <= self.core.capacity).all():
            walk = Walk(self.core, chosen)
            self.offer(walk)
            if walk.feasible and (self.best is None or walk.cost < self.best.cost):
                self.best = walk

    def keep(self, family: Family) -> None:
        """Offer the best of a family."""
        if family.best is not None:
            self.offer(family.best)
            if self.best is None or family.best.cost < self.best.cost:
                self.best = Walk(self.core, family.best.chosen)
                self.team.tell(self.place, self.best.cost, self.best.chosen)

    def succeed(self, family: Family) -> Family:
        """Whose turn it is after a family has come to a stop: a new one's after the best one, else the best one's, which takes in
        what the other one came to. Before, it takes in what the other workers came to, and goes on if that gains anything."""
        before = family.cost
        for chosen in self.team.news(self.place, before):
            family.add(Walk(self.core, chosen))
            self.breed(family)
        family.stale = 0
        if family.cost < before - GAIN * abs(before):
            return family
        champion = self.champion
        if champion is None or family is champion:
            self.champion = family
            return Family(self.core, self.rng, self.repeats)
        if family.cost < champion.cost:
            champion, family = family, champion
        self.champion = champion
        if family.best is not None:
            champion.add(Walk(self.core, family.best.chosen))
            self.breed(champion)
        return champion

    def note_bound(self) -> None:
        """Carry the dual's bound over."""
        self.incumbent.prove(self.dual.best + self.dual.offset)
        self.check()

    def ascend(self, until: float) -> None:
        """Ascend the dual until its steps are small, or time is up: `refine` goes on from there."""
        for number in range(ASCENT):
            self.step = FIRST_STEP * (LAST_STEP / FIRST_STEP) ** (number / ASCENT)
            self.dual.ascend(self.step)
            self.note_bound()
            if number >= SHOWN and number % SHOWING == 0:
                self.team.show(self.dual)
            if self.incumbent.clock() > until:
                break

    def refine(self) -> None:
        """Ascend a little more from the best multipliers, with steps that shrink while that gains nothing."""
        before = self.dual.best
        self.dual.multipliers = self.dual.best_multipliers.copy()
        self.dual.passes(PASSES)
        for _ in range(REFINEMENT):
            self.dual.ascend(self.step)
            self.note_bound()
        if self.dual.best - before <= 1e-3 * abs(before):
            self.step *= 0.5

    def relaxed(self, tree: Tree | None = None, best: Walk | None = None) -> Walk:
        """A short walk that pays for its usage instead of keeping the limit, from the dual's solution at other costs and
        multipliers, both a little: alike strategies tie in the dual, and are then told apart differently each time. With a tree,
        it begins where a dive there ends, now and then one that keeps most hubs of the `best`."""
        dual = self.dual
        unit = abs(dual.best + dual.offset) / self.size
        if tree is None:
            multipliers = dual.best_multipliers * np.exp(LEAN * self.rng.standard_normal(len(dual.best_multipliers)))
        else:
            for _ in range(DIVES):
                like = best.chosen if best is not None and self.rng.random() < LIKELY else None
                dual = tree.dive(_between(HUB_NOISE, self.rng) * unit, self.rng, self.check, like)
                if dual.best + dual.offset < self.incumbent.cost:
                    break
            multipliers = dual.multipliers
        walk = Walk(self.core, dual.rounded(multipliers, ROUNDING, _between(NOISE, self.rng) * unit, self.rng))
        heat = _between(RELAXED_HEATS, self.rng)
        for chunk in range(RELAXED):
            cool = chunk / max(1, RELAXED - 2)
            self.move(walk, multipliers, 0.0, heat * COOLING**cool if cool < 1 else 0.0, 1.0)
        return walk

    def returned(self, family: Family) -> Walk:
        """A walk within the limit: from where merging has left it, or shaken from the best."""
        outside = family.outside()
        if outside is None or (family.best is not None and self.rng.random() < 1 / 3):
            return self.shaken(Walk(self.core, family.recent[-1]) if family.best is None else family.best)
        walk, multipliers = Walk(self.core, outside), self.dual.best_multipliers
        heat = HEATS[0] * COOLING ** self.rng.random()
        self.repair(walk, multipliers, heat=heat)
        if walk.feasible:
            self.anneal(walk, multipliers, heat)
        return walk

    def shaken(self, walk: Walk) -> Walk:
        """A walk from where another one stands, over the limit and back; or, one time in three, only warmed."""
        again = Walk(self.core, walk.chosen)
        multipliers = self.dual.best_multipliers
        if self.rng.random() < 1 / 3:
            self.anneal(again, multipliers, HEATS[0] * COOLING ** self.rng.random())
            return again
        heat, first = _between(HEATS, self.rng), _between(PENALTIES, self.rng)
        penalty = first * (float(multipliers.max(initial=0.0)) or 1e-6 * abs(walk.cost))
        for _ in range(3):
            self.move(again, multipliers, penalty, heat)
        self.repair(again, multipliers, penalty, heat)
        if again.feasible:
            self.anneal(again, multipliers)
        return again

    def repair(
        self, walk: Walk, multipliers: np.ndarray, penalty: float = 0.0, heat: float = 1.0, growth: float = GROWTH
    ) -> None:
        """Bring a walk within the limit by a penalty that grows, from a tenth of the largest multiplier if none is given."""
        penalty = penalty or 0.1 * float(multipliers.max(initial=0.0)) or abs(walk.cost) / max(1e-9, walk.excess)
        for attempt in range(ATTEMPTS):
            if walk.feasible:
                break
            self.move(walk, multipliers, penalty, heat if attempt < ATTEMPTS // 2 else 0.0)
            if walk.excess < self.nearest and self.reducer is not None:
                self.nearest = walk.excess
                self.incumbent.nearest = self.reducer, walk.chosen.copy()
            penalty *= growth
        self.offer(walk)

    def anneal(self, walk: Walk, multipliers: np.ndarray, heat: float = HEATS[0]) -> None:
        """Improve a walk within the limit, cooling down to none by equal factors: costs per node differ by orders."""
        barrier = 1e6 * float(multipliers.max(initial=0.0)) or 1e6 * abs(walk.cost)
        for chunk in range(CHUNKS):
            cool = chunk / (CHUNKS - 3)
            self.move(walk, multipliers, barrier, heat * COOLING**cool if cool < 1 else 0.0)
            self.offer(walk)

    def move(self, walk: Walk, multipliers: np.ndarray, penalty: float, heat: float, weight: float = 0.0) -> None:
        """Some moves at a heat in costs per node; `weight`: how much of what usage costs at the multipliers counts."""
        heat *= abs(walk.cost + self.dual.offset) / self.size if walk.cost < BARRED / 10 else 0.0
        moves = max(20, int(MOVES * self.size / CHUNKS))
        walk.move(self.rng, multipliers, penalty, moves, FOREST, 0.95, heat, BLUR * heat, weight)
        self.check()

    def offer(self, walk: Walk) -> None:
        """Offer where a walk stands."""
        if walk.feasible:
            self.incumbent.offer(self.reducer, walk.chosen, walk.cost + self.dual.offset)


def _between(ends: tuple[float, float], rng: np.random.Generator) -> float:
    """A number between two, its logarithm uniform."""
    low, high = ends
    return low * (high / low) ** rng.random()
