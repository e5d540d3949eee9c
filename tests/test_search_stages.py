"""Piper's stages on a problem: cut against every way of cutting, the roles of axes, and the limit."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from test_search import exhaustive, random_layouts, random_tables
from test_usages import cheapest_within, limited, taking

from jaxplan.problem import Usage, from_tables, within_limit
from jaxplan.search import brute, piper_stages, search
from jaxplan.search.stages import Stage, _cut

WHOLE, BATCH, WIDTH = range(3)


def two_kinds_of_layers(first=4, second=4):
    """A chain whose first layers are cheap along the batch, its last along the width; moving a value between the two costs 5."""
    move = np.array([[0.0, 0.0, 0.0], [3.0, 0.0, 5.0], [3.0, 5.0, 0.0]])
    costs = [[8.0, 1.0, 4.0]] * first + [[8.0, 6.0, 2.0]] * second
    return from_tables(costs, [(i, i + 1, move) for i in range(len(costs) - 1)], kinds=["a"] * first + ["b"] * second)


def test_a_chain_of_two_kinds_is_two_stages():
    problem = two_kinds_of_layers()
    found = search(problem, "piper")
    assert found.seconds == brute(problem).seconds == 4 * 1 + 5 + 4 * 2
    assert sorted(found.notes["stages"]) == [Stage(4, ("data",)), Stage(4, ("tensor",))]
    assert found.choices[:, 0].tolist() in ([BATCH] * 4 + [WIDTH] * 4, [WIDTH] * 4 + [BATCH] * 4)


def test_one_stage_where_one_is_asked_for():
    problem = two_kinds_of_layers()
    found = search(problem, lambda p: piper_stages(p, stages=1))
    assert len(found.notes["stages"]) == 1 and len(set(found.choices[:, 0].tolist())) == 1
    assert found.seconds == min(4 * 1 + 4 * 6, 4 * 4 + 4 * 2)
    with pytest.raises(ValueError, match="0 stages: at least one is needed"):
        piper_stages(problem, stages=0)


@pytest.mark.parametrize("seed", range(10))
def test_legal_never_below_the_optimum_and_the_same_each_time(seed):
    for problem in (random_tables(seed), random_layouts(seed, nodes=4)):
        found, again = search(problem, "piper"), search(problem, "piper")
        assert found.seconds >= exhaustive(problem) - 1e-9
        assert found.seconds == again.seconds and (found.choices == again.choices).all()
        assert sum(stage.nodes for stage in found.notes["stages"]) == len(problem.nodes)


def test_some_of_these_are_solved_and_some_are_not():
    ratios = [search(p, "piper").seconds / brute(p).seconds for p in [random_layouts(seed, nodes=4) for seed in range(20)]]
    assert min(ratios) == pytest.approx(1.0) and max(ratios) < 2.0
    assert sum(ratio < 1.0 + 1e-9 for ratio in ratios) >= 10


@pytest.mark.parametrize("seed", range(5))
def test_cuts_are_the_best_there_are_where_edges_join_neighbouring_runs(seed):
    rng = np.random.default_rng(seed)
    runs, proposals = 6, 3
    inside = rng.uniform(0, 9, (runs, proposals))
    between = np.zeros((proposals, proposals, runs, runs))
    for i in range(runs - 1):
        between[:, :, i, i] = np.diag(rng.uniform(0, 2, proposals))
        between[:, :, i, i + 1] = rng.uniform(0, 9, (proposals, proposals))

    def price(options):
        total = sum(inside[i, o] + between[o, o, i, i] for i, o in enumerate(options))
        return total + sum(between[a, b, i, i + 1] for i, (a, b) in enumerate(itertools.pairwise(options)))

    least = [math.inf] * (runs + 1)
    for options in itertools.product(range(proposals), repeat=runs):
        stages = 1 + sum(a != b for a, b in itertools.pairwise(options))
        least[stages] = min(least[stages], price(options))
    found = list(_cut(inside, between, runs))
    assert len(found) == runs
    for stages, (cuts, options) in enumerate(found, 1):
        assert len(options) == stages and cuts[0] == 0 and cuts[-1] == runs
        assert price(np.repeat(options, np.diff(cuts)).tolist()) == pytest.approx(least[stages])


def test_a_limit_moves_the_cut():
    """A layer along the batch takes 2 units throughout, one along the width 1: 11 units let 3 of 8 layers go along the batch."""
    problem = two_kinds_of_layers()
    usages = tuple(Usage((node,), taking([4.0, 2.0, 1.0]), 0, 10) for node in range(8))
    problem = replace(problem, usages=usages, limit=11.0)
    found = search(problem, "piper")
    assert within_limit(problem, found.choices)
    assert found.seconds == brute(problem).seconds == 3 * 1 + 5 + 4 + 4 * 2


@pytest.mark.parametrize("seed", range(12))
def test_within_a_limit_or_an_error_with_the_interval(seed):
    problem, found = limited(seed)
    best = cheapest_within(problem, found)
    try:
        answer = search(problem, "piper")
    except ValueError as error:
        assert "within the limit" in str(error) and "too much" in str(error)
        return
    assert best is not None and answer.seconds >= best - 1e-9 and within_limit(problem, answer.choices)


def test_most_of_these_limits_are_met():
    met = 0
    for seed in range(12):
        problem, _ = limited(seed, share=0.8)
        try:
            search(problem, "piper")
        except ValueError:
            continue
        met += 1
    assert met >= 6


def test_where_no_stage_is_small_enough_the_nearest_is_told():
    problem = two_kinds_of_layers(1, 1)
    usages = (Usage((0,), taking([4.0, 3.0, 3.0]), 2, 5), Usage((1,), taking([4.0, 3.0, 3.0]), 3, 7))
    with pytest.raises(ValueError, match=r"limit of 5: the nearest uses 6 in \[3, 5\), 1 too much"):
        search(replace(problem, usages=usages, limit=5.0), "piper")
