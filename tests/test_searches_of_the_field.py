"""OptCNN's and Tofu's searches against exhaustive search."""

import itertools

import numpy as np
import pytest
from test_search import exhaustive, random_layouts, random_tables

from jaxplan.problem import Edge, Node, Problem, from_tables
from jaxplan.reduce import Pricer, eliminate
from jaxplan.search import SEARCHES, brute, optcnn, search, tofu


def random_tree(seed, nodes=9):
    """Leaves and chains only: what OptCNN's eliminations reduce to nothing."""
    rng = np.random.default_rng(seed)
    costs = [rng.integers(0, 20, rng.integers(2, 5)).astype(float) for _ in range(nodes)]
    parents = [(int(rng.integers(0, i)), i) for i in range(1, nodes)]
    edges = [(i, j, rng.integers(0, 20, (len(costs[i]), len(costs[j]))).astype(float)) for i, j in parents]
    doubled = edges[0]  # a parallel edge, the other way round
    return from_tables(costs, [*edges, (doubled[1], doubled[0], doubled[2].T * 2)])


@pytest.mark.parametrize("seed", range(20))
def test_optcnn_is_exact_and_says_so(seed):
    for problem in (random_tables(seed), random_layouts(seed, nodes=4)):
        best = brute(problem).seconds
        found = search(problem, "optcnn")
        assert found.seconds == pytest.approx(best, rel=1e-12)
        assert found.notes["exact"] is True and found.bound == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_trees_reduce_to_nothing(seed):
    problem = random_tree(seed)
    found = search(problem, "optcnn")
    assert found.notes["left"] == 0
    assert found.seconds == pytest.approx(exhaustive(problem) if len(problem.nodes) < 7 else brute(problem).seconds)


@pytest.mark.parametrize("seed", range(10))
def test_what_does_not_reduce_within_the_cap_is_bounded_and_proves_nothing(seed):
    problem = random_tables(seed, nodes=8)
    best = brute(problem).seconds
    found = search(problem, lambda p: optcnn(p, cap=8))
    assert found.seconds >= best - 1e-9
    assert (found.bound is None) == (found.notes["exact"] is False)
    if found.bound is not None:
        assert found.bound == pytest.approx(best)


def test_some_problem_does_not_reduce_within_the_cap():
    assert any(optcnn(random_tables(seed, nodes=8), cap=8).notes["exact"] is False for seed in range(10))


@pytest.mark.parametrize("limit", [0, 12, 40])
def test_elimination_within_a_limit_keeps_the_optimum(limit):
    left = []
    for seed in range(10):
        problem = random_tree(seed, nodes=6)
        tables, _ = Pricer(problem).whole()
        core, variables, undo = eliminate(tables, limit)
        left.append(len(variables))
        options = min(itertools.product(*[range(len(c)) for c in core.costs]), key=lambda o: core.price(np.array(o)), default=())
        assert tables.price(undo(np.array(options, dtype=int))) == pytest.approx(exhaustive(problem))
    assert all(count == 6 for count in left) if limit == 0 else min(left) < 6


def test_folding_makes_optcnn_prove_nothing_about_the_problem_as_given():
    apart = np.array([[9.0, 0.0], [0.0, 9.0]])
    twins = from_tables([[0.0, 1.0], [0.0, 1.0]], [(0, 1, apart), (1, 0, apart)], kinds=["a", "a"], edge_kinds=["e", "e"])
    folded, whole = optcnn(twins), optcnn(twins, rounds=None)
    assert folded.bound is None and folded.seconds == 18.0
    assert whole.bound == whole.seconds == 1.0


@pytest.mark.parametrize("seed", range(20))
def test_tofu_is_exact_on_one_axis_and_never_better_than_the_optimum_on_two(seed):
    one = random_tables(seed)
    assert search(one, "tofu").seconds == pytest.approx(exhaustive(one), rel=1e-12)
    two = random_layouts(seed, nodes=4)
    assert search(two, "tofu").seconds >= brute(two).seconds - 1e-9


def side_by_side(first, second):
    """A problem of two axes whose price is one problem's along the first axis and another's along the second."""
    nodes = tuple(
        Node(a.name, a.options + b.options, lambda rows, a=a, b=b: a.price(rows[:, :1]) + b.price(rows[:, 1:]), i)
        for i, (a, b) in enumerate(zip(first.nodes, second.nodes, strict=True))
    )
    edges = [
        Edge(e.tail, e.head, lambda t, h, e=e, c=c: e.price(t[:, c : c + 1], h[:, c : c + 1]), (c, k))
        for c, problem in enumerate((first, second))
        for k, e in enumerate(problem.edges)
    ]
    return Problem(("x", "y"), nodes, tuple(edges), (1, 0))


@pytest.mark.parametrize("seed", range(10))
def test_tofu_is_exact_where_levels_do_not_touch_each_other(seed):
    first, second = random_tables(seed), random_tables(seed + 100)
    found = search(side_by_side(first, second), "tofu")
    assert found.notes == {"levels": 2, "exact_levels": 2}
    assert found.seconds == pytest.approx(exhaustive(first) + exhaustive(second))


def test_tofu_never_takes_a_level_back():
    """Alone, the slow axis is worth using; together with the other it is not, which only a second look would see."""
    table = np.array([[10.0, 6.0], [4.0, 4.5]])  # by option of x, then of y
    problem = Problem(("x", "y"), (Node("n", (2, 2), lambda rows: table[rows[:, 0], rows[:, 1]], 0),), (), (1, 0))
    assert search(problem, "tofu").seconds == 4.5
    assert search(problem, "hsm2dl").seconds == search(problem, "brute").seconds == 4.0


@pytest.mark.parametrize("seed", range(5))
def test_tofu_within_a_small_cap_says_how_many_levels_are_exact(seed):
    problem = random_layouts(seed, nodes=6)
    found = search(problem, lambda p: tofu(p, cap=8))
    assert found.notes["exact_levels"] <= found.notes["levels"] == 2
    assert found.seconds >= search(problem, "alpa").seconds * (1 - 1e-9)


@pytest.mark.parametrize("name", sorted(SEARCHES))
def test_every_search_solves_nothing_and_what_has_nothing_to_choose(name):
    assert search(from_tables([], []), name).seconds == 0.0
    assert search(from_tables([[2.0], [3.0]], [(0, 1, np.array([[4.0]]))]), name).seconds == 9.0


@pytest.mark.parametrize("name", sorted(SEARCHES))
def test_every_search_says_that_there_is_no_legal_assignment(name):
    with pytest.raises(ValueError, match=r"not legal|no legal"):
        search(from_tables([[np.inf, np.inf], [0.0, 1.0]], [(0, 1, np.ones((2, 2)))]), name)
