"""Hubs are decided by the dual: what is decided stays, no bound is above a solution, and the tree splits hubs first."""

import math

import numpy as np
import pytest
from layered_problems import layered_problem
from test_solve_branching import rooted
from test_solve_layered import by_integer_program

from jaxplan.solve import Incumbent, IntervalProblem, diving
from jaxplan.solve.branching import Tree
from jaxplan.solve.core import core_cost, core_of
from jaxplan.solve.diving import HUB, dive, hubs_of, keep
from jaxplan.solve.driver import APART, Search
from jaxplan.solve.dual import Dual
from jaxplan.solve.family import Family
from jaxplan.solve.primal import Walk
from jaxplan.solve.reductions import Reducer
from jaxplan.solve.repeats import Repeats


def starred(seed=0, rays=HUB + 4, hubs=2):
    """(reducer, core): hubs that all rays are joined to, rays in a row, a usage at each so that reductions leave them."""
    rng = np.random.default_rng(seed)
    sizes = [4] * hubs + [3] * rays
    edges = [(hub, hubs + ray) for hub in range(hubs) for ray in range(rays)]
    edges += [(hubs + ray, hubs + ray + 1) for ray in range(rays - 1)]
    tables = tuple(rng.random((sizes[a], sizes[b])) for a, b in edges)
    costs, usages = ([rng.random(size) for size in sizes] for _ in range(2))
    intervals = np.tile([0, 1], (len(sizes), 1))
    reducer = Reducer(IntervalProblem(tuple(costs), tuple(usages), intervals, np.array(edges), tables, 0.4 * len(sizes)))
    reducer.run()
    return reducer, core_of(reducer)


def ascended(reducer, core):
    dual = Dual(core, reducer.constant)
    for step in np.geomspace(0.05, 1e-4, 60):
        dual.ascend(float(step))
    return dual


def test_hubs_are_the_nodes_of_many_edges_the_largest_first():
    _, core = starred()
    edges = np.diff(core.first)
    assert len(hubs_of(core)) == 2 and (edges[hubs_of(core)] >= HUB).all()
    assert (np.diff(edges[hubs_of(core)]) <= 0).all()
    assert not len(hubs_of(starred(rays=6)[1]))


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_dive_decides_every_hub_and_its_bound_is_below_what_follows(noise):
    reducer, core = starred()
    dual, rng, hubs = ascended(reducer, core), np.random.default_rng(1), hubs_of(core)
    root = dual.best
    dual.best, bar = -math.inf, 4.0 * abs(root)
    dive(dual, hubs, np.full(len(core.start) - 1, noise), bar, 1e-5, rng, lambda: None)
    spans = [slice(core.start[v], core.start[v + 1]) for v in hubs]
    raised = [dual.core.cost[span] - core.cost[span] for span in spans]
    assert all((more > 0.9 * bar).sum() == len(more) - 1 for more in raised)
    chosen = dual.rounded(dual.multipliers, 2, 0.0, rng)
    assert [int(more.argmin()) for more in raised] == chosen[hubs].tolist()
    walk = Walk(core, chosen)
    priced = walk.cost + float((walk.usage - core.capacity) @ dual.multipliers)
    assert dual.best <= walk.cost + 1e-6 or walk.excess > 0
    assert dual.passes(1)[0] <= priced + 1e-6


def test_what_is_kept_is_decided_before_the_dive():
    reducer, core = starred()
    dual, hubs = ascended(reducer, core), hubs_of(core)
    wanted = np.array([3, 0])
    keep(dual, hubs, wanted, 1e3)
    dive(dual, hubs[:0], np.zeros(len(core.start) - 1), 1e3, 1e-5, np.random.default_rng(0), lambda: None)
    assert dual.rounded(dual.multipliers, 2, 0.0, np.random.default_rng(0))[hubs].tolist() == wanted.tolist()


def test_a_tree_dives_from_its_open_problems_and_near_what_it_is_given():
    reducer, core = starred()
    tree, rng = Tree(ascended(reducer, core), lambda chosen: None), np.random.default_rng(0)
    cutoff = 2.0 * tree.bound
    tree.grow(cutoff)
    assert len(tree.leaves) == 2
    closed = [~leaf.open & (tree.owner == hub) for leaf in tree.leaves for hub in tree.hubs]
    assert sum(bool(some.any()) for some in closed) == 2  # one hub, split
    like = np.zeros(len(core.start) - 1, dtype=np.int64)
    seen = set()
    for _ in range(10):
        free, near = (tree.dive(0.0, rng, lambda: None, given) for given in (None, like))
        assert free is near is tree.dual
        seen.add(tuple(near.rounded(near.multipliers, 2, 0.0, rng)[tree.hubs].tolist()))
    assert any(0 in positions for positions in seen)


def test_a_tree_that_splits_hubs_never_claims_more_than_the_optimum(monkeypatch):
    monkeypatch.setattr(diving, "HUB", 4)
    split = 0
    for seed in range(6):
        problem, _ = layered_problem(seed, layers=2, width=3, slack=0.05)
        dual = rooted(problem)
        if dual is None:
            continue
        best = by_integer_program(problem)
        tree = Tree(dual, lambda chosen: None)
        split += len(tree.hubs) > 0
        before = tree.bound
        for number in range(30):
            if not tree.leaves or tree.bound >= best * (1 - 1e-9):
                break
            tree.grow(1.5 * best)
            if number % 10 == 0 and len(tree.hubs):
                tree.dive(0.0, np.random.default_rng(number), lambda: None)
            assert before <= tree.bound <= best * (1 + 1e-6)
            before = tree.bound
    assert split


def test_a_new_walk_may_bring_its_hubs_into_the_family(monkeypatch):
    reducer, core = starred()
    rng = np.random.default_rng(0)
    family = Family(core, rng, Repeats(reducer))
    nodes = len(core.start) - 1
    one, two = (Walk(core, np.zeros(nodes, dtype=np.int64)), Walk(core, np.ones(nodes, dtype=np.int64)))
    monkeypatch.setattr("jaxplan.solve.family.merge", lambda core, chosen, others, sums: np.tile(chosen, (len(sums), 1)))
    cheap, dear = sorted([one, two], key=lambda walk: core_cost(core, walk.chosen))
    free = np.zeros((2, len(core.capacity)))
    for base, latest in ((dear, cheap), (cheap, dear)):
        family.recent = [latest.chosen]
        merged = family.merged(base.chosen, [latest.chosen], np.zeros((2, len(core.capacity) + 1)), free)
        assert (merged == cheap.chosen).all()


def test_hubs_matter_while_cost_and_bound_are_apart():
    problem = starred()[0].problem
    known = Incumbent(problem)
    search = Search(problem, known, np.random.default_rng(0), math.inf, 0)
    assert search.apart
    known.cost, known.bound = 100.0, 100.0 * (1 - 1.1 * APART)
    assert search.apart
    known.bound = 100.0 * (1 - 0.9 * APART)
    assert not search.apart
