"""Room `hybrid`: whether a mesh axis is laid along layers, which, and in how many micro-batches.

Every pipeline is a problem of its own: the axis is given to the layers inside of the chains, all else is planned as ever. Few of
them are searched: a lower bound of each (`pipeline.outline`) comes first, and where all links are alike also an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Generic, Protocol, TypeVar

from jaxplan.asked import AUTO
from jaxplan.budget import Attempt, Limit, NothingFits, Wider, fit
from jaxplan.cost import Numbers
from jaxplan.cost.formulas import all_to_all_bytes, pipeline_ticks
from jaxplan.graph import Graph
from jaxplan.graph.flatten import BOUNDARY
from jaxplan.pipeline import (
    SCHEDULES,
    Chain,
    Pipeline,
    PipelineError,
    alternating,
    chain_of,
    even_layers,
    pipeline_of,
    scan_at,
    scans,
    turns,
)  # fmt: skip
from jaxplan.pipeline.nouns import Kind
from jaxplan.pipeline.outline import Outline, Spent, batch_axes, expected, outline, scanned, spent
from jaxplan.pipeline.repeats import cut_by, repeats
from jaxplan.pipeline.rowwise import told
from jaxplan.pipeline.staging import at_extents
from jaxplan.plan import Plan
from jaxplan.trace import Traced

SomePlan = TypeVar("SomePlan", bound=Plan)

WORTH = 0.03
"""By what share of the time of the best plan without a pipeline one has to be faster to be taken where nobody asked for it, and
memory allows either."""
HOPEFUL = 0.95
"""Where no link is slower than another, a pipeline is searched only if it may be expected to take less than this share of the
time of the plan without."""
SLOWER = 2.0
"""From this ratio of bandwidths on, one link is slower than another."""
MOST_TRIED = 3
"""Numbers of micro-batches that are searched per axis, where nobody asked for the pipeline; of the rest, none."""
MOST_FITTED = 2
"""Pipelines that are squeezed into a memory budget, each of which takes many searches."""
SCHEDULE = "gpipe"
"""That bounds and estimates are made for; where the program allows it, the others are searched as well."""
MISSED = 0.005
"""What the search may miss without a memory budget, as a share of the time: searches within one take other ways, and may find a
plan that is faster."""
MOST_MICROBATCHES = 16
"""Micro-batches per stage, at most: the bubble is 6% then."""


@dataclass(frozen=True)
class Candidate:
    """A pipeline that could be, and the least it takes, in seconds."""

    pipeline: Pipeline
    axis: int
    least: float
    outline: Outline


@lru_cache(maxsize=4096)
def counts(rows: int, stages: int, microbatches: int | None = None) -> tuple[int, ...]:
    """Numbers of micro-batches worth trying: divisors of the batch, the nearest to each power of two; at least two of them."""
    if microbatches is not None:
        return (microbatches,) if rows % microbatches == 0 else ()
    found = [m for m in range(2, min(rows, MOST_MICROBATCHES * stages) + 1) if rows % m == 0]
    powers = [2.0**p for p in range(1, 1 + math.ceil(math.log2(max(2, rows))))]
    return tuple(sorted({min(found, key=lambda m: abs(math.log2(m / power))) for power in powers})) if found else ()


def chain_groups(traced: Traced, resized: Graph | None = None) -> list[tuple[Chain, ...]]:
    """Chains of layers that may be laid along an axis together: those of one length (the forward and the backward pass of a
    model), and all of them. None where the program has no scan that hands rows of a batch from layer to layer. `resized`: the
    graph at other extents than the program was traced for, if it is to have those."""
    found: list[Chain] = []
    for scan in scans(traced.jaxpr.jaxpr):
        if scan.length > 1 and not any(scan.path[: len(chain.path)] == chain.path for chain in found):
            try:
                chain = chain_of(scan.equation, scan.path, even_layers(scan.length, 2), 1)
            except PipelineError:
                continue
            other = at_extents(resized, chain) if resized is not None else chain
            found += [other] if other is not None and other.length > 1 else []
    lengths = list(dict.fromkeys(chain.length for chain in found))
    groups = [tuple([chain for chain in found if chain.length == length]) for length in lengths]
    return groups + ([tuple(found)] if len(lengths) > 1 else [])


def candidates(
    graph: Graph, numbers: Numbers, groups: Sequence[Sequence[Chain]], axes: Sequence[int], microbatches: int | None,
) -> list[Candidate]:  # fmt: skip
    """All pipelines over the given axes, the one that may be fastest first. `groups`: chains that are laid out together."""
    found = []
    for chains in groups:
        shortest = min([chain.length for chain in chains])
        rows = math.gcd(*[chain.rows for chain in chains])
        stages = [axis for axis in axes if 1 < numbers.sizes[axis] <= shortest]
        if not stages or rows < 2:
            continue
        about = outline(graph, numbers, chains)
        for axis in stages:
            for m in counts(rows, numbers.sizes[axis], microbatches):
                pipeline = about.pipeline(numbers.axis_names[axis], numbers.sizes[axis], m, SCHEDULE)
                found.append(Candidate(pipeline, axis, about.least(numbers, axis, m), about))
    return sorted(found, key=lambda one: one.least)


def slow_axes(numbers: Numbers) -> list[int]:
    """The axes whose link is slower than the fastest one's."""
    used = [axis for axis, size in enumerate(numbers.sizes) if size > 1]
    fastest = min([numbers.link(axis)[0] for axis in used], default=0.0)
    return [axis for axis in used if numbers.link(axis)[0] >= SLOWER * fastest]


def hopeless(
    plan: Plan, microbatches: int | None, groups: Sequence[Sequence[Chain]] | None = None, used: Spent | None = None
) -> bool:
    """Whether a plan without a pipeline spends so little on what one would save that none needs to be looked for: on no axis does
    it exchange more inside of loops than the smallest bubble would cost. Not where a link is slow. `groups`: the chains, where
    they are known: how large their batch is, and which axes split it, says how small the bubble can be. `used`: what the plan
    spends inside of scans, where that is known."""
    modelled, numbers = plan.modelled, plan.modelled.numbers
    inside = scanned(modelled.graph)
    if not inside or groups == []:
        return not _unrolled_may_pay(plan, microbatches)
    if slow_axes(numbers):
        return False
    used = used or spent(modelled, plan.choices, inside)
    for axis, size in enumerate(numbers.sizes):
        if size == 1:
            continue
        if groups is None:
            most = microbatches or MOST_MICROBATCHES * size
            stretches = [pipeline_ticks(most, size) / most]
        else:
            stretches = [s for chains in groups for s in _stretches(plan, chains, axis, microbatches)]
        if stretches and used.stretched(axis, size, min(stretches)) < (HOPEFUL - 1) * plan.seconds:
            return False
    return True


def _stretches(plan: Plan, chains: Sequence[Chain], axis: int, microbatches: int | None) -> list[float]:
    """How many times as long stages along an axis would take, for every number of micro-batches that the axes which split the
    batch in a plan without a pipeline leave large enough."""
    sizes, operators = plan.modelled.numbers.sizes, plan.modelled.graph.operators
    carried = {op.path: op.results[0] for op in operators if op.name == BOUNDARY and "carry" in op.path[-2:-1]}
    cuts = [
        (plan.layouts.get(carried.get((*chain.path, "carry", k), -1), ()), role.dim)
        for chain in chains for k, role in enumerate(chain.carries) if role.kind is Kind.CUT
    ]  # fmt: skip
    others = math.prod([size for a, size in enumerate(sizes) if a != axis and any(cut and cut[a] == dim for cut, dim in cuts)])
    size, found = sizes[axis], counts(math.gcd(*[chain.rows for chain in chains]), sizes[axis], microbatches)
    longest = max(-(-chain.length // size) / chain.length for chain in chains)
    return [
        pipeline_ticks(m, size) / m * longest * size
        for m in found if not any(chain.rows // m % others for chain in chains)
    ]  # fmt: skip


def _unrolled_may_pay(plan: Plan, microbatches: int | None) -> bool:
    """The same of layers that are written out one after another, by the graph alone: whether it is worth the time to put them
    into a loop."""
    modelled, numbers = plan.modelled, plan.modelled.numbers
    axes = [axis for axis, size in enumerate(numbers.sizes) if size > 1]
    found = repeats(modelled.graph) if axes else None
    if found is None or slow_axes(numbers):
        return found is not None
    used, about = spent(modelled, plan.choices, found.inside), modelled.graph.tensors[found.carried]
    rows = [(about.shape[dim], cut_by(modelled, plan.choices, alike)) for dim, alike in found.rows]
    for axis in axes:
        size, (g, latency) = numbers.sizes[axis], numbers.link(axis)
        others = math.prod(numbers.sizes) // size
        stacking = all_to_all_bytes(size, found.stacked / others) * g if size <= found.count else math.inf
        for extent, cut in rows:
            parts = math.prod([numbers.sizes[a] for a in cut if a != axis])
            for m in counts(extent // parts, size, microbatches):
                ticks = pipeline_ticks(m, size)
                handed = 2 * ticks * (about.nbytes / m / others * g + latency)
                stretch = ticks / m * (-(-found.count // size) / found.count) * size
                if used.stretched(axis, size, stretch) + handed + stacking < (HOPEFUL - 1) * plan.seconds:
                    return True
    return False


def hopeful(plan: Plan, found: Sequence[Candidate], seconds: float) -> list[Candidate]:
    """Those that may be faster than the best plan without a pipeline, which takes so many seconds (infinite where none fits): by
    the bound, and unless its link is slow by the estimate; most promising first. `plan`: one without a pipeline, of the program
    that the candidates are for."""
    numbers, slow = plan.modelled.numbers, slow_axes(plan.modelled.numbers)
    used: dict[int, tuple[Spent, tuple[bool, ...]]] = {}
    start, left = min(plan.seconds, seconds), list[tuple[float, Candidate]]()
    for one in found:
        about = one.outline
        if one.least < (1 - WORTH) * seconds:
            if id(about) not in used:
                inside = about.probe.inside
                used[id(about)] = spent(plan.modelled, plan.choices, inside), batch_axes(plan.modelled, plan.choices, about)
            about_to_take = expected(start, *used[id(about)], about, numbers, one.axis, one.pipeline.microbatches)
            if one.axis in slow or seconds == math.inf or about_to_take < HOPEFUL * seconds:
                left.append((max(about_to_take, one.least), one))
    return [one for _, one in sorted(left, key=lambda pair: (pair[0], pair[1].least))]


class Searching(Protocol[SomePlan]):
    """An `Attempt` that also tells what no plan goes below."""

    def __call__(self, limit: Limit[SomePlan] | None, /) -> SomePlan: ...

    def reaches(self, seconds: float) -> bool:
        """Whether every plan is shown to take so many seconds at least."""
        ...


@dataclass(frozen=True)
class Choosing(Generic[SomePlan]):
    """What it takes to plan: the program, its graph on a mesh, `attempts` (from a pipeline, or None, to what bytes are charged to
    the best plan), and `budget` in bytes per device. `rolled`: gives the same of the program with its unrolled layers put into
    loops, or None where it has none. `resized`: whether the graph is at other extents than the program was traced for."""

    traced: Traced
    graph: Graph
    numbers: Numbers
    attempts: Callable[[Pipeline | None], Searching[SomePlan]]
    budget: float
    wider: Wider[SomePlan]
    rolled: Callable[[], Choosing[SomePlan] | None]
    resized: bool = False

    def fits(self, plan: SomePlan) -> bool:
        """Whether a plan stays within the budget."""
        return plan.fits(self.budget)

    def fitted(self, attempt: Attempt[SomePlan], plan: SomePlan) -> SomePlan:
        """The best plan that stays within the budget. `plan`: the best without one. Raises NothingFits."""
        return plan if self.fits(plan) else fit(attempt, plan, self.budget, self.wider)

    @cached_property
    def _attempts(self) -> dict[Pipeline | None, Searching[SomePlan]]:
        return {}

    @cached_property
    def _plans(self) -> dict[Pipeline | None, SomePlan]:
        return {}

    def attempt(self, pipeline: Pipeline | None) -> Searching[SomePlan]:
        """How to plan with a pipeline; made once."""
        if pipeline not in self._attempts:
            self._attempts[pipeline] = self.attempts(pipeline)
        return self._attempts[pipeline]

    def planned(self, pipeline: Pipeline | None) -> tuple[Attempt[SomePlan], SomePlan]:
        """How to plan with a pipeline, and the best plan where memory is no concern; searched once."""
        attempt = self.attempt(pipeline)
        if pipeline not in self._plans:
            self._plans[pipeline] = attempt(None)
        return attempt, self._plans[pipeline]

    def too_slow(self, pipeline: Pipeline, seconds: float) -> bool:
        """Whether every plan with a pipeline takes so many seconds at least, as far as messages show without a search."""
        return pipeline not in self._plans and self.attempt(pipeline).reaches(seconds)

    @cached_property
    def _spent(self) -> dict[int, tuple[Plan, Spent]]:
        return {}

    def hopeless(self, plan: SomePlan, microbatches: int | None, groups: Sequence[Sequence[Chain]] | None = None) -> bool:
        """See `hopeless`; what a plan spends is worked out once."""
        inside = scanned(plan.modelled.graph)
        if not inside or groups == []:
            return hopeless(plan, microbatches, groups)
        if id(plan) not in self._spent:
            self._spent[id(plan)] = plan, spent(plan.modelled, plan.choices, inside)
        return hopeless(plan, microbatches, groups, self._spent[id(plan)][1])

    @property
    def chains(self) -> list[tuple[Chain, ...]]:
        """Those of the program as it is."""
        return self.graph.remembered("chains", None, lambda: chain_groups(self.traced, self.graph if self.resized else None))

    @cached_property
    def layered(self) -> tuple[Choosing[SomePlan], list[tuple[Chain, ...]]]:
        """The program that may run in stages, and its chains: this one, or the one with its unrolled layers in loops, if that has
        some and this has none."""
        groups = self.chains
        rolled = self.rolled() if not groups else None
        return (self, groups) if rolled is None else (rolled, rolled.chains)


def choose(using: Choosing[SomePlan], asked: str | None, microbatches: int | None) -> SomePlan:
    """The best plan, with a pipeline or without. `asked`: "auto", the axis to lay along the layers, or None for no pipeline.

    Raises ValueError where what was asked for cannot be, saying why; NothingFits.
    """
    numbers = using.numbers
    if asked is not None and asked != AUTO:
        staged, groups = forced_groups(using, asked, microbatches)
        found = candidates(staged.graph, staged.numbers, groups, [numbers.axis_names.index(asked)], microbatches)
        return _forced(staged, found, asked)
    if microbatches is not None and asked == AUTO:
        check_microbatches(using.layered[1], microbatches)
    attempt, plain = using.planned(None)
    fits = using.fits(plain)
    if asked is None:
        return using.fitted(attempt, plain)
    if not using.hopeless(plain, microbatches):
        tried = _tried(using, plain, microbatches, plain.seconds)
        better = _squeezed(using, tried, (1 - WORTH) * plain.seconds) if fits or tried.best is not None else None
        if fits or better is not None:
            return better or plain
    elif fits:
        return plain
    failures: list[NothingFits] = []
    try:
        plain = using.fitted(attempt, plain)
        if using.hopeless(plain, microbatches):
            return plain
    except NothingFits as error:
        failures.append(error)
    seconds = math.inf if failures else plain.seconds
    tried = _tried(using, plain, microbatches, seconds)
    better = _squeezed(using, tried, (1 - WORTH) * seconds, failures)
    if better is None and seconds == math.inf:
        raise min(failures, key=lambda error: error.smallest)
    return better or plain


def least_seconds(using: Choosing[SomePlan], asked: str | None) -> float:
    """Seconds of the best plan found without a pipeline where memory is no concern; 0.0 where a pipeline is insisted on. Raises
    ValueError where none is legal."""
    return using.planned(None)[1].seconds if asked in (None, AUTO) else 0.0


def may_take_less(using: Choosing[SomePlan], asked: str | None, microbatches: int | None, seconds: float) -> bool:
    """Whether `choose` may find a plan that takes less than so many seconds. No plan is fitted into memory for it: the search
    without a budget is taken to miss no more than `MISSED` of what one within a budget could find, and the pipelines that
    would be searched are held against what messages show."""
    if (1 - MISSED) * least_seconds(using, asked) < seconds:
        return True
    axes = [axis for axis, size in enumerate(using.numbers.sizes) if size > 1]
    plain = using.planned(None)[1]
    fits = using.fits(plain)
    if asked is None or not axes or (fits and using.hopeless(plain, microbatches)):
        return False
    staged, groups = using.layered
    if not groups or (staged is using and fits and using.hopeless(plain, microbatches, groups)):
        return False
    found = candidates(staged.graph, staged.numbers, groups, axes, microbatches)
    base = plain if staged is using else staged.planned(None)[1]
    tried: dict[tuple[int, int], int] = {}
    for one in hopeful(base, found, plain.seconds if fits else math.inf):
        key = (one.axis, id(one.outline))
        if one.least < seconds and tried.get(key, 0) < MOST_TRIED:
            tried[key] = tried.get(key, 0) + 1
            if not all(staged.too_slow(pipeline, seconds) for pipeline in _scheduled(staged, one, [])):
                return True
    return False


def _tried(using: Choosing[SomePlan], plain: SomePlan, microbatches: int | None, seconds: float) -> _Tried[SomePlan]:
    """Pipelines that may be faster than the best plan without one, which takes so many seconds. `plain`: one without."""
    axes = [axis for axis, size in enumerate(using.numbers.sizes) if size > 1]
    staged, groups = using.layered if axes else (using, [])
    if not groups or (staged is using and seconds != math.inf and using.hopeless(plain, microbatches, groups)):
        return _Tried(None, (), ())
    found = candidates(staged.graph, staged.numbers, groups, axes, microbatches)
    base = plain if staged is using else staged.planned(None)[1]
    return _searched(staged, hopeful(base, found, seconds), (1 - WORTH) * seconds, MOST_TRIED)


def _forced(using: Choosing[SomePlan], found: Sequence[Candidate], axis: str) -> SomePlan:
    """The fastest pipeline along an axis that was asked for."""
    failures: list[NothingFits] = []
    tried = _searched(using, found, math.inf, None)
    best = _squeezed(using, tried, math.inf, failures)
    if best is not None:
        return best
    if failures:
        raise min(failures, key=lambda error: error.smallest)
    if tried.refused:
        raise tried.refused[0]
    raise ValueError(f"pipeline={axis!r}: the batch is too small to be cut into micro-batches; take a larger one")


@dataclass(frozen=True)
class _Tried(Generic[SomePlan]):
    """`best`: the fastest plan that fits; `large`: those that do not as they are, and may be faster."""

    best: SomePlan | None
    large: tuple[tuple[SomePlan, Attempt[SomePlan]], ...]
    refused: tuple[PipelineError, ...]


def _searched(
    using: Choosing[SomePlan], found: Sequence[Candidate], ceiling: float, most: int | None
) -> _Tried[SomePlan]:
    """The candidates' plans that take less than `ceiling` seconds. `most`: candidates that are searched per axis and chains,
    None: all that the bound leaves."""
    best: SomePlan | None = None
    large: list[tuple[SomePlan, Attempt[SomePlan]]] = []
    tried: dict[tuple[int, int], int] = {}
    refused: list[PipelineError] = []
    for one in found:
        key = (one.axis, id(one.outline))
        if one.least >= ceiling or (most is not None and tried.get(key, 0) >= most):
            continue
        tried[key] = tried.get(key, 0) + 1
        for pipeline in _scheduled(using, one, refused):
            limit = ceiling if pipeline.schedule == SCHEDULE or best is None else (1 - WORTH) * ceiling
            if using.too_slow(pipeline, limit):
                continue
            attempt, plan = using.planned(pipeline)
            if plan.seconds < limit and not using.fits(plan):
                large.append((plan, attempt))
            elif plan.seconds < limit:
                best, ceiling = plan, plan.seconds
    return _Tried(best, tuple(large), tuple(refused))


def _scheduled(using: Choosing[SomePlan], one: Candidate, refused: list[PipelineError]) -> Iterator[Pipeline]:
    """A candidate under every schedule that can run; why others cannot is added to `refused`."""
    for schedule in SCHEDULES:
        if schedule == SCHEDULE or turns(one.pipeline.chains):
            try:
                yield confirmed(using.traced, replace(one.pipeline, schedule=schedule), using.resized)
            except PipelineError as error:  # so many micro-batches, of all things; or a loss that needs all of the batch
                refused.append(error)


def _squeezed(
    using: Choosing[SomePlan], tried: _Tried[SomePlan], ceiling: float, failures: list[NothingFits] | None = None
) -> SomePlan | None:
    """The fastest plan that takes less than `ceiling` seconds and fits, some that do not fit made to: that takes many searches
    each, so it is done to few: the fastest for what they hold. What cannot be made to fit is added to `failures`."""
    best = tried.best if tried.best is not None and tried.best.seconds < ceiling else None
    ceiling = best.seconds if best is not None else ceiling
    for plan, attempt in sorted(tried.large, key=lambda pair: pair[0].seconds * pair[0].peak_bytes)[:MOST_FITTED]:
        if plan.seconds < ceiling:
            try:
                plan = using.fitted(attempt, plan)
            except NothingFits as error:
                (failures if failures is not None else []).append(error)
                continue
            if plan.seconds < ceiling:
                best, ceiling = plan, plan.seconds
    return best


def confirmed(traced: Traced, pipeline: Pipeline, resized: bool = False) -> Pipeline:
    """The pipeline once more, from the program for so many micro-batches. Raises PipelineError where they cannot run. `resized`:
    it is at other extents than the program was traced for, which is asked for as few micro-batches as divide its own batch."""
    chains = []
    if resized:
        before = [scan_at(traced.jaxpr.jaxpr, chain.path) for chain in pipeline.chains]
        for equation, chain in zip(before, pipeline.chains, strict=True):
            chains.append(chain_of(equation, chain.path, even_layers(equation.params["length"], 2), 1))
        rows = math.gcd(*[chain.rows for chain in chains])
        least = next((m for m in range(2, rows + 1) if rows % m == 0), 1)
        asked = replace(pipeline, stages=2, microbatches=least, chains=tuple(chains))
        return replace(pipeline, middle=confirmed(traced, asked).middle)
    for chain in pipeline.chains:
        equation = scan_at(traced.jaxpr.jaxpr, chain.path)
        chains.append(chain_of(equation, chain.path, chain.layers, pipeline.microbatches))
    return alternating(traced.jaxpr.jaxpr, replace(pipeline, chains=tuple(chains)))


def forced_groups(
    using: Choosing[SomePlan], axis: str, microbatches: int | None
) -> tuple[Choosing[SomePlan], list[tuple[Chain, ...]]]:
    """The program that runs in stages, and its chains, for an axis that was asked for by name. Raises ValueError where no
    pipeline can lie along it, saying why."""
    numbers = using.numbers
    if axis not in numbers.axis_names:
        raise ValueError(
            f"pipeline={axis!r}: the mesh has the axes {tuple(numbers.axis_names)}; name one of them, or write 'auto' or None"
        )
    size = numbers.sizes[numbers.axis_names.index(axis)]
    if size < 2:
        raise ValueError(f"pipeline={axis!r}: the axis has size {size}, which makes a single stage; take an axis of at least 2")
    staged, groups = using.layered
    if not groups:
        try:
            pipeline_of(staged.traced.jaxpr.jaxpr, axis, 2, microbatches or 2)
        except ValueError as error:
            raise PipelineError(
                f"pipeline={axis!r}: {error}. A pipeline lies along a jax.lax.scan over stacked layers, or along layers that are "
                "written out and repeat operator by operator; each hands rows of a batch to the next. Take what mixes rows out "
                "of the layers, or plan with pipeline=None"
            ) from None
    longest = max([min(chains, key=lambda chain: chain.length) for chains in groups], key=lambda chain: chain.length)
    if size > longest.length:
        where = told(scan_at(staged.traced.jaxpr.jaxpr, longest.path))
        raise PipelineError(
            f"pipeline={axis!r}: {size} stages, and only {longest.length} layers ({where}): every stage needs at least one; take "
            f"an axis of at most {longest.length}"
        )
    check_microbatches(groups, microbatches)
    return staged, groups


def check_microbatches(groups: Sequence[Sequence[Chain]], microbatches: int | None) -> None:
    """Raise ValueError where so many micro-batches divide the batch of no chain."""
    rows = sorted({math.gcd(*[chain.rows for chain in chains]) for chains in groups})
    if microbatches is not None and rows and not any(size % microbatches == 0 for size in rows):
        whole = [m for m in range(1, rows[-1] + 1) if rows[-1] % m == 0]
        raise ValueError(
            f"microbatches={microbatches} does not divide the batch of {' and '.join(map(str, rows))} rows; one of "
            f"{', '.join(map(str, whole[:12]))} does"
        )
