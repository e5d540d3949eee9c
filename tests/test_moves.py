"""Joint moves: forests, fusing and messages never make an assignment dearer, and find what single axes do not."""

import numpy as np
import pytest
from test_certificate import at_random, modelled
from test_search import random_layouts, random_tables

from jaxplan.problem import Node, Problem, evaluate, from_tables
from jaxplan.reduce import Pricer
from jaxplan.search import brute, hsm2dl, joint, search
from jaxplan.search.dual import Relaxation
from jaxplan.search.hsm2dl import elimination_order
from jaxplan.search.moves import Grove, finest, fused, polished


@pytest.mark.parametrize("seed", range(10))
def test_forests_never_make_an_assignment_dearer_and_are_priced_rightly(seed):
    problem = random_layouts(seed, nodes=5)
    start = at_random(problem, seed)
    grove, rng = Grove(relaxation := Relaxation(problem, start.seconds)), np.random.default_rng(0)
    options, seconds = grove.numbered(start.choices), start.seconds
    assert (relaxation.choices(options) == start.choices).all()
    for _ in range(12):
        options = grove.moved(options, rng)
        now = evaluate(problem, relaxation.choices(options))
        assert now <= seconds * (1 + 1e-12) and now == pytest.approx(grove.price(options))
        seconds = now
    assert brute(problem).seconds <= seconds * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_a_tree_is_one_forest_and_solved_at_once(seed):
    whole = random_tables(seed, nodes=7)
    tree = Problem(whole.axes, whole.nodes, tuple(e for e in whole.edges if e.head == e.tail + 1), whole.axis_order)
    start = at_random(tree, seed)
    grove = Grove(relaxation := Relaxation(tree, start.seconds))
    moved = grove.moved(grove.numbered(start.choices), np.random.default_rng(seed))
    assert evaluate(tree, relaxation.choices(moved)) == pytest.approx(brute(tree).seconds)


@pytest.mark.parametrize("seed", range(10))
def test_fusing_takes_the_best_of_each(seed):
    problem = random_tables(seed, nodes=6)
    some = [at_random(problem, seed + k).choices for k in range(3)]
    crossed = fused(Pricer(problem), elimination_order(problem), some)
    assert evaluate(problem, crossed) <= min(evaluate(problem, choices) for choices in some) + 1e-12
    assert all(any(choices[i] == crossed[i] for choices in some) for i in range(6))


@pytest.mark.parametrize("seed", range(4))
def test_fusing_is_not_dearer_than_the_first_where_elimination_is_not_exact(seed):
    rng = np.random.default_rng(seed)
    pairs = [(i, j, 4 * rng.random((4, 4))) for i in range(24) for j in range(i + 1, 24)]
    problem = from_tables([rng.random(4) for _ in range(24)], pairs)
    best = search(problem)
    crossed = fused(Pricer(problem), elimination_order(problem), [best.choices, *rng.integers(0, 4, (3, 24, 1))])
    assert evaluate(problem, crossed) <= best.seconds * (1 + 1e-12)


def test_joint_is_the_optimum_where_single_axes_are_not():
    """An operator that must split both axes alike: neither axis alone gains."""
    table = np.array([[10.0, 11.0], [11.0, 4.0]])
    nodes = tuple(Node(f"n{i}", (2, 2), lambda rows: table[rows[:, 0], rows[:, 1]], i) for i in range(3))
    problem = Problem(("x", "y"), nodes, (), (0, 1))
    assert search(problem, "joint").seconds == search(problem, "hsm2dl").seconds == 12.0
    ratios = [search(p := random_layouts(seed, nodes=4), "joint").seconds / brute(p).seconds for seed in range(40)]
    assert min(ratios) >= 1 - 1e-9 and np.mean(ratios) <= 1.001 and max(ratios) <= 1.03


@pytest.mark.parametrize(("name", "shape"), [("moe", (4, 4)), ("decode_kv", (4, 2)), ("mlp_sgd", (2, 2, 2))])
def test_joint_is_never_dearer_than_the_default_and_the_same_every_time(name, shape):
    problem = modelled(name, shape)
    found = joint(problem)
    assert found.seconds <= hsm2dl(problem).seconds * (1 + 1e-12)
    assert (joint(modelled(name, shape)).choices == found.choices).all()


def test_what_is_too_large_for_joint_prices_stays_as_it_is(monkeypatch):
    monkeypatch.setattr("jaxplan.search.dual.LIMIT", 10)
    problem = random_layouts(3, nodes=5)
    start = at_random(problem)
    choices, seconds = polished(Pricer(problem), elimination_order(problem), start.choices, (0, 1))
    assert (choices == start.choices).all() and seconds == start.seconds


def test_nothing_is_folded_where_that_merges_hardly_any():
    problem = random_layouts(0, nodes=6)
    assert finest(problem)[0] is problem
    alike = Problem(problem.axes, tuple(node._replace(kind="same") for node in problem.nodes), (), (0, 1))
    assert len(finest(alike)[0].nodes) == 1
