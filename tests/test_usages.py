"""Usages over lifetimes as a constraint of `Problem`: what an assignment takes, and the searches that stay within a limit."""

import importlib
import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from test_search import random_tables

from jaxplan.problem import Assignment, Meter, Peak, Problem, Usage, evaluate, from_tables, peak, within_limit
from jaxplan.reduce import fold
from jaxplan.search import OverLimit, alpa, brute, certify, exactly, search


def taking(vector):
    """Units per option of a problem's only axis."""
    return lambda rows: np.asarray(vector, dtype=float)[rows[:, 0]]


def limited(seed, share=0.6, nodes=6):
    """(a random problem whose cheap options tend to take much, with a limit that binds; its usages as tables)."""
    rng = np.random.default_rng(seed)
    problem = random_tables(seed, nodes=nodes)
    found = []
    for index, node in enumerate(problem.nodes):
        for _ in range(int(rng.integers(1, 3))):
            begin = int(rng.integers(0, 8))
            found.append((index, begin, begin + int(rng.integers(0, 6)), rng.integers(0, 10, node.options[0]).astype(float)))
    usages = tuple(Usage((index,), taking(vector), begin, end) for index, begin, end, vector in found)
    whole = replace(problem, usages=usages)
    return replace(whole, limit=share * peak(whole, brute(problem).choices).usage), found


def used(found, options):
    """The peak, time by time."""
    return max(sum(v[options[i]] for i, begin, end, v in found if begin <= time < end) for time in range(16))


def cheapest_within(problem, found):
    """By pricing every assignment one by one; None if none fits."""
    best = None
    for options in itertools.product(*[range(node.options[0]) for node in problem.nodes]):
        if used(found, options) <= problem.limit:
            seconds = evaluate(problem, np.array(options)[:, None])
            best = seconds if np.isfinite(seconds) and (best is None or seconds < best) else best
    return best


@pytest.mark.parametrize("seed", range(12))
def test_brute_and_the_integer_program_find_the_cheapest_within_the_limit(seed):
    problem, found = limited(seed)
    best = cheapest_within(problem, found)
    if best is None:
        for name in ("brute", "alpa"):
            with pytest.raises(ValueError, match=r"within"):
                search(problem, name)
        return
    for method in ("brute", "alpa", lambda problem: alpa(problem, rounds=None)):
        answer = search(problem, method)
        assert answer.seconds == pytest.approx(best)
        assert peak(problem, answer.choices).usage == used(found, answer.choices[:, 0]) <= problem.limit
        assert answer.bound is None or answer.bound <= best * (1 + 1e-9)


def test_the_limit_binds_and_can_be_met_in_some_of_these_problems():
    costs = [(cheapest_within(*limited(seed)), brute(replace(limited(seed)[0], limit=np.inf)).seconds) for seed in range(12)]
    assert sum(best is not None and best > free for best, free in costs) >= 4


def test_the_peak_says_where_it_is():
    problem = from_tables([[0.0, 1.0], [0.0, 1.0]], [])
    usages = (Usage((0,), taking([3, 1]), 0, 5), Usage((1,), taking([4, 0]), 4, 9), Usage((1,), taking([9, 9]), 7, 7))
    problem = replace(problem, usages=usages, limit=6.0)
    assert peak(problem, np.array([[0], [0]])) == Peak(4, 5, 7.0) and peak(problem, np.array([[0], [1]])) == Peak(0, 4, 3.0)
    assert not within_limit(problem, np.array([[0], [0]])) and within_limit(problem, np.array([[1], [0]]))
    assert peak(from_tables([[0.0]], []), np.array([[0]])) == Peak(0, 0, 0.0)
    assert search(problem, "brute").seconds == search(problem, "alpa").seconds == 1.0
    for name in ("brute", "alpa"):
        with pytest.raises(ValueError, match="within"):
            search(replace(problem, limit=0.0), name)


def test_folding_keeps_what_each_member_takes():
    costs = [[0.0, 5.0], [0.0, 5.0]]
    problem = replace(from_tables(costs, [], kinds=["a", "a"]), limit=5.0)
    together = replace(problem, usages=(Usage((0,), taking([3, 1]), 0, 4), Usage((1,), taking([3, 1]), 2, 6)))
    folded, undo = fold(together)
    assert len(folded.nodes) == 1 and peak(folded, np.array([[0]])) == peak(together, undo(np.array([[0]]))) == Peak(2, 4, 6.0)
    assert search(together, "brute").seconds == 5.0 and search(together, "alpa").seconds == 10.0  # look-alikes decide alike
    apart = replace(problem, usages=(Usage((0,), taking([3, 1]), 0, 4), Usage((1,), taking([3, 1]), 4, 6)))
    assert search(apart, "alpa").seconds == 0.0


def test_an_assignment_over_the_limit_is_caught_with_the_interval_and_the_shortage():
    problem, _ = limited(1)
    greedy = brute(replace(problem, limit=np.inf)).choices

    def wasteful(problem):
        return Assignment(greedy, 0.0)

    with pytest.raises(OverLimit, match=r"'wasteful' found no .* limit of \S+ the nearest uses \S+ in \[\d+, \d+\), \S+ more"):
        search(replace(problem, limit=0.0), wasteful)
    proven = certify(problem, brute(problem))
    assert within_limit(problem, proven.choices) and proven.bound is not None and proven.bound <= brute(problem).seconds


def test_usages_that_make_no_sense_are_said():
    node = from_tables([[0.0]], []).nodes
    for usage in (Usage((1,), taking([1]), 0, 1), Usage((0,), taking([1]), 3, 1)):
        with pytest.raises(ValueError, match=r"usage of nodes \(\d,\) over \[\d, 1\): one or two nodes of 0..0, and an interval"):
            Problem(("choice",), node, (), usages=(usage,))
    with pytest.raises(ValueError, match="limit -1 is no amount"):
        Problem(("choice",), node, (), limit=-1)
    with pytest.raises(ValueError, match="limit nan is no amount"):
        Problem(("choice",), node, (), limit=float("nan"))


def entangled(seed, share=0.7):
    """(a problem with usages of pairs and something reserved, (options) -> what is taken at every step)."""
    rng = np.random.default_rng(seed)
    problem, found = limited(seed, nodes=5)
    counts = [node.options[0] for node in problem.nodes]
    usages, pairs = list(problem.usages), []
    for _ in range(4):
        i, j = map(int, rng.permutation(5)[:2])
        begin = int(rng.integers(0, 8))
        pairs.append((i, j, begin, begin + 4, rng.integers(0, 8, (counts[i], counts[j])).astype(float)))
        usages.append(Usage((i, j), pair_of(pairs[-1][4]), begin, begin + 4))
    reserved = rng.integers(-2, 3, 12).astype(float)

    def levels(options):
        total = np.zeros(16)
        total[:12] = reserved
        for i, begin, end, vector in found:
            total[begin:end] += vector[options[i]]
        for i, j, begin, end, table in pairs:
            total[begin:end] += table[options[i], options[j]]
        return total

    whole = replace(problem, usages=tuple(usages), reserved=tuple(reserved.tolist()))
    return replace(whole, limit=share * peak(whole, brute(replace(whole, limit=np.inf)).choices).usage), levels


def pair_of(table):
    return lambda tails, heads: table[np.ix_(tails[:, 0], heads[:, 0])]


def every(problem):
    return itertools.product(*[range(node.options[0]) for node in problem.nodes])


@pytest.mark.parametrize("seed", range(8))
def test_pairs_and_what_is_reserved_count(seed):
    problem, levels = entangled(seed)
    meter, best = Meter(problem), np.inf
    for options in every(problem):
        choices = np.array(options)[:, None]
        assert meter.levels(meter.amounts(choices)) == pytest.approx(levels(options)[: meter.steps])
        if levels(options)[: meter.steps].max() <= problem.limit:
            best = min(best, evaluate(problem, choices))
    if not np.isfinite(best):
        for method in ("brute", "alpa", "hsm2dl"):
            with pytest.raises(ValueError, match="within"):
                search(problem, method)
        return
    for method in ("brute", "alpa", lambda problem: alpa(problem, rounds=None)):
        assert search(problem, method).seconds == pytest.approx(best)
    found = search(problem, "hsm2dl")
    assert levels(found.choices[:, 0])[: meter.steps].max() <= problem.limit * (1 + 1e-9) and found.seconds >= best * (1 - 1e-9)


@pytest.mark.parametrize("joint", [0.0, exactly.JOINT], ids=["moves", "exactly"])
@pytest.mark.parametrize("method", ["hsm2dl", "tofu", "trws"])
def test_the_other_searches_find_the_cheapest_within_the_limit_too(method, joint, monkeypatch):
    """Multipliers and moves prove nothing, but do for problems as small as these; 13 of 24 have an answer."""
    monkeypatch.setattr(exactly, "JOINT", joint)
    answered = 0
    for seed in range(24):
        problem, found = limited(seed)
        best = cheapest_within(problem, found)
        if best is None:
            with pytest.raises(OverLimit) as caught:
                search(problem, method)
            assert not within_limit(problem, caught.value.nearest.choices)
            continue
        answer = search(problem, method)
        assert used(found, answer.choices[:, 0]) <= problem.limit and answer.seconds == pytest.approx(best)
        answered += 1
    assert answered == 13


@pytest.mark.parametrize("seed", range(24))
def test_what_is_found_exactly_is_what_pricing_every_assignment_finds(seed):
    """Pairs that take something and what is reserved among it; ceilings that are no help, or just met."""
    problem, levels = entangled(seed)
    allowed = problem.limit * (1 + 1e-9)
    fitting = [np.array(options)[:, None] for options in every(problem) if levels(options).max() <= allowed]
    prices = [seconds for seconds in (evaluate(problem, choices) for choices in fitting) if np.isfinite(seconds)]
    best, dear = min(prices, default=np.inf), max(prices, default=1.0)
    assert exactly.exactly(problem, best, allowed) == []
    for ceiling in (np.inf, 2 * dear, best + 1e-6 * abs(best)):
        found = exactly.exactly(problem, ceiling, allowed)
        assert len(found) == bool(prices)
        for choices in found:
            assert levels(choices[:, 0]).max() <= allowed and evaluate(problem, choices) == pytest.approx(best)


def test_what_is_not_small_is_not_solved_exactly(monkeypatch):
    problem, _ = limited(3)
    many = math.prod([node.options[0] for node in problem.nodes])
    assert exactly.exactly(problem, np.inf, problem.limit) is not None
    monkeypatch.setattr(exactly, "BEGINNINGS", 1)
    assert exactly.exactly(problem, np.inf, problem.limit) is None
    monkeypatch.setattr(exactly, "JOINT", many / 10**3)
    assert exactly.exactly(problem, np.inf, problem.limit) is None


def test_a_callable_that_knows_no_limit_is_asked_at_prices():
    problem, found = limited(1)
    asked = []

    def greedy(problem):
        asked.append(problem)
        return brute(replace(problem, usages=(), reserved=(), limit=np.inf))

    answer = search(problem, greedy)
    assert within_limit(problem, answer.choices) and answer.seconds == pytest.approx(cheapest_within(problem, found))
    assert asked[0] is problem and len(asked) > 1 and all(not one.usages for one in asked[1:])


def test_a_known_assignment_that_fits_is_not_lost():
    problem, _ = limited(3)
    best = brute(problem)
    assert search(replace(problem, starts=(best.choices,)), "hsm2dl").seconds == pytest.approx(best.seconds)


@pytest.mark.parametrize("seed", range(8))
def test_what_a_search_meets_is_measured_as_it_is_and_asked_for_once(seed):
    problem, _ = entangled(seed)
    calls = Counter()

    def counted(price):
        def asked(*rows):
            calls[(id(price), *[row.tobytes() for row in rows])] += 1
            return price(*rows)

        return asked

    nodes = tuple([node._replace(price=counted(node.price), times=2.0 + n) for n, node in enumerate(problem.nodes)])
    edges = tuple([edge._replace(price=counted(edge.price), times=n % 3) for n, edge in enumerate(problem.edges)])
    usages = tuple([usage._replace(amount=counted(usage.amount)) for usage in problem.usages])
    seen, rng, meter = replace(problem, nodes=nodes, edges=edges, usages=usages), np.random.default_rng(seed), Meter(problem)
    parts = importlib.import_module("jaxplan.search.limited")._Parts(seen)
    tried = [np.array([[rng.integers(node.options[0])] for node in problem.nodes]) for _ in range(30)]
    met = [parts.meet(choices) for choices in tried]
    assert max(calls.values()) == 1
    apart = replace(problem, nodes=tuple([n._replace(times=m.times) for n, m in zip(problem.nodes, nodes)]),
                    edges=tuple([e._replace(times=m.times) for e, m in zip(problem.edges, edges)]))  # fmt: skip
    for choices, one in zip(tried, met, strict=True):
        assert one.seconds == pytest.approx(evaluate(apart, choices), rel=1e-12)
        assert (one.amounts == meter.amounts(choices)).all() and (one.level == meter.levels(one.amounts)).all()
