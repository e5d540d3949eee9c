"""Layers that repeat are found, however their passes run, and what one of them chose is offered to the others."""

import itertools

import numpy as np
import pytest
from test_solve import random_problem

from jaxplan.solve import Incumbent, IntervalProblem
from jaxplan.solve.core import core_cost, core_of
from jaxplan.solve.driver import Search
from jaxplan.solve.family import Family
from jaxplan.solve.merging import merge
from jaxplan.solve.primal import Walk
from jaxplan.solve.reductions import Reducer, expand
from jaxplan.solve.repeats import Classes, Repeats, colours

FORWARD, BACKWARD, STATE = (5, 3, 4), (3, 5), 2
"""Strategies of a layer's nodes."""


def repeated(layers, seed=0):
    """(a problem, (layers, width) its nodes by layer). Forward layers in order, then backward ones the other way round.

    Costs are the layer's own, tables too; usages tie all nodes to a limit, so that reductions leave them.
    """
    rng = np.random.default_rng(seed)
    kinds, nodes, edges = [], np.zeros((layers, len(FORWARD) + len(BACKWARD) + 1), dtype=np.int64), []
    for layer in range(layers):
        for place, kind in enumerate(FORWARD):
            nodes[layer, place] = len(kinds)
            kinds.append(kind)
    for layer in reversed(range(layers)):
        for place, kind in enumerate((*BACKWARD, STATE), len(FORWARD)):
            nodes[layer, place] = len(kinds)
            kinds.append(kind)
    for layer in range(layers):
        row = nodes[layer].tolist()
        edges += [(row[0], row[1]), (row[1], row[2]), (row[1], row[3]), (row[3], row[4]), (row[0], row[4]), (row[4], row[5])]
        edges += [(row[2], row[5])]
        if layer:
            before = nodes[layer - 1].tolist()
            edges += [(before[2], row[0]), (row[4], before[3])]
    costs = [rng.random(kind) * 10 for kind in kinds]
    usages = [rng.random(kind) for kind in kinds]
    tables = tuple(rng.random((kinds[a], kinds[b])) * 10 for a, b in edges)
    intervals = np.tile([0, 4], (len(kinds), 1))
    return IntervalProblem(tuple(costs), tuple(usages), intervals, np.array(edges), tables, 0.6 * len(kinds)), nodes


def reduced(problem):
    reducer = Reducer(problem)
    reducer.run()
    return reducer, core_of(reducer)


@pytest.mark.parametrize("layers", [6, 11, 24])
def test_layers_are_counted_and_run_through_the_right_way(layers):
    problem, nodes = repeated(layers)
    reducer, _ = reduced(problem)
    repeats = Repeats(reducer)
    assert max(3, layers - 8) <= repeats.count <= layers  # the first and last are not like the others
    place = {int(u): i for i, u in enumerate(repeats.alive)}
    middle = nodes[3:-3]
    for one, two in itertools.pairwise(middle):  # a step in the program is the same step for forward and backward nodes
        steps = {
            int(repeats.layer[place[b]] - repeats.layer[place[a]])
            for a, b in zip(one.tolist(), two.tolist())
            if a in place and b in place and repeats.inside[place[a]] and repeats.inside[place[b]]
        }
        assert len(steps) == 1 and abs(steps.pop()) == 1


def test_choices_move_by_whole_layers():
    problem, nodes = repeated(24)
    reducer, core = reduced(problem)
    repeats = Repeats(reducer)
    rng = np.random.default_rng(0)
    chosen = (rng.random(len(core.start) - 1) * np.diff(core.start)).astype(np.int64)
    strategies = expand(reducer, chosen)
    assert np.array_equal(repeats.taken(chosen, strategies, repeats.layer), chosen)
    place = {int(u): i for i, u in enumerate(repeats.alive)}
    for step in (1, -2):
        there = expand(reducer, repeats.taken(chosen, strategies, repeats.layer + step))
        one, two = place[int(nodes[11, 0])], place[int(nodes[12, 0])]
        forth = step * int(repeats.layer[two] - repeats.layer[one])  # layers may be counted from either end
        moved = 0
        for u in nodes[8:16].ravel().tolist():
            layer, column = np.argwhere(nodes == u)[0]
            wanted = strategies[nodes[layer + forth, column]]
            if u in place and repeats.inside[place[u]] and wanted in reducer.labels[u]:
                assert there[u] == wanted
                moved += 1
        assert moved > 10
    alike = repeats.taken(chosen, strategies, np.full(len(chosen), repeats.layer[place[int(nodes[11, 0])]]))
    said = [expand(reducer, alike)[u] for u in nodes[6:18, 0] if strategies[nodes[11, 0]] in reducer.labels[u]]
    assert set(said) == {strategies[nodes[11, 0]]}


def test_offers_make_a_merge_no_worse_and_often_better():
    better = 0
    for seed in range(4):
        reducer, core = reduced(repeated(12, seed)[0])
        repeats, rng = Repeats(reducer), np.random.default_rng(seed)
        chosen = (rng.random(len(core.start) - 1) * np.diff(core.start)).astype(np.int64)
        offers = repeats.offers(chosen, 3, rng)
        assert len(offers) == 3 and all(((offer >= 0) & (offer < np.diff(core.start))).all() for offer in offers)
        merged = merge(core, chosen, offers, np.zeros((1, len(core.capacity) + 1)))[0]
        before, after = core_cost(core, chosen), core_cost(core, merged)
        assert after <= before * (1 + 1e-12)
        better += after < 0.99 * before
    assert better


def test_a_walk_is_levelled_by_its_own_layers():
    reducer, core = reduced(repeated(12)[0])
    rng = np.random.default_rng(0)
    family = Family(core, rng, Repeats(reducer))
    walk = Walk(core, (rng.random(len(core.start) - 1) * np.diff(core.start)).astype(np.int64))
    level = family.level(walk, np.zeros(len(core.capacity)))
    assert level.cost < walk.cost and level.cost == core_cost(core, level.chosen)


def test_the_best_family_goes_on_after_each_new_one():
    reducer, core = reduced(repeated(12)[0])
    search = Search(reducer.problem, Incumbent(reducer.problem), np.random.default_rng(0), np.inf, 0)
    search.run()
    one, two, three = (Family(core, np.random.default_rng(seed), search.repeats) for seed in range(3))
    for family, seed in ((one, 1), (two, 2), (three, 3)):
        rng = np.random.default_rng(seed)
        least = [core.usage[core.load[i] : core.load[i + 1]].argmin() for i in core.span[:-1]]
        start = np.where(rng.random(len(least)) < 0.9, least, 0)
        family.add(Walk(core, start.astype(np.int64)))
        family.add(Walk(core, np.array(least)))
        assert family.best is not None
    assert search.succeed(one) not in (one, two, three) and search.champion is one
    again = search.succeed(two)
    assert again is search.champion and again.cost <= min(one.cost, two.cost)
    assert search.succeed(again) not in (one, two) and search.champion is again


def test_no_layers_no_offers():
    reducer, core = reduced(random_problem(0, 30, 0.6, planted=True))
    repeats = Repeats(reducer)
    assert repeats.count == 0
    assert repeats.offers(np.zeros(len(core.start) - 1, dtype=np.int64), 3, np.random.default_rng(0)) == []
    empty = IntervalProblem((), (), np.zeros((0, 2), dtype=np.int64), np.zeros((0, 2), dtype=np.int64), (), 0.0)
    assert Repeats(Reducer(empty)).count == 0


def test_classes_do_not_depend_on_how_nodes_are_numbered():
    problem, _ = repeated(8)
    rng = np.random.default_rng(1)
    order = rng.permutation(len(problem.costs))  # new node k is the old node order[k]
    back = np.argsort(order)
    turned = IntervalProblem(
        tuple(problem.costs[u] for u in order), tuple(problem.usages[u] for u in order), problem.intervals[order],
        back[problem.edges[:, ::-1]], tuple(table.T for table in problem.tables), problem.limit,
    )  # fmt: skip
    mine, theirs = colours(problem), colours(turned)[back]
    pairs = set(zip(mine.tolist(), theirs.tolist()))
    assert len(pairs) == len(set(mine.tolist())) == len(set(theirs.tolist()))
    assert Classes(mine).size.sum() == len(order)
