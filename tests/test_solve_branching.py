"""Branching, rounding and families: bounds against trying everything, and what must not change."""

import numpy as np
import pytest
from layered_problems import layered_problem
from test_solve import reduced
from test_solve_layered import by_integer_program

from jaxplan.solve import NoSolutionError
from jaxplan.solve.branching import Tree
from jaxplan.solve.core import core_cost, core_of, core_usage
from jaxplan.solve.dual import Dual
from jaxplan.solve.family import Family
from jaxplan.solve.primal import Walk
from jaxplan.solve.reductions import Reducer
from jaxplan.solve.repeats import Repeats


def rooted(problem, steps=40):
    """The dual of a reduced problem after some steps; None where the reductions decide everything or nothing is feasible."""
    reducer = Reducer(problem)
    try:
        reducer.run()
    except NoSolutionError:
        return None
    core = core_of(reducer)
    if len(core.start) == 1:
        return None
    dual = Dual(core, reducer.constant)
    for step in np.geomspace(0.05, 1e-4, steps):
        dual.ascend(float(step))
    return dual


@pytest.fixture(scope="module")
def trees():
    """(the optimum by an integer program, the dual at the root), of problems of which the dual proves less."""
    found = []
    for seed in range(12):
        problem, _ = layered_problem(seed, layers=2, width=3, slack=0.05)
        dual = rooted(problem)
        if dual is not None:
            found.append((by_integer_program(problem), dual))
    return found


def test_a_tree_closes_what_the_dual_leaves_open_and_never_claims_more(trees):
    behind, closed = 0, 0
    for best, dual in trees:
        seen = []
        tree = Tree(dual, seen.append)
        first = before = tree.bound
        assert first <= best * (1 + 1e-6)
        for _ in range(60):
            if not tree.leaves or tree.bound >= best * (1 - 1e-9):
                break
            tree.grow(1.5 * best)
            assert before <= tree.bound <= best * (1 + 1e-6)
            before = tree.bound
        behind += first < best * (1 - 1e-3)
        closed += first < best * (1 - 1e-3) and tree.bound > 0.5 * (first + best)
        assert all(((chosen >= 0) & (chosen < np.diff(dual.core.start))).all() for chosen in seen)
    assert behind >= 3 and closed >= 2, (behind, closed)


def test_what_reaches_the_cutoff_is_not_opened(trees):
    for best, dual in trees:
        tree = Tree(dual, lambda chosen: None)
        while tree.leaves and tree.bound < 0.999 * best:
            tree.grow(0.999 * best)
            assert all(leaf.bound < 0.999 * best for leaf in tree.leaves)
        assert tree.bound <= best * (1 + 1e-6)


def test_rounding_leaves_the_dual_as_it_was():
    reducer, core = reduced(3)
    dual = Dual(core, reducer.constant)
    for _ in range(10):
        dual.ascend(0.01)
    before = dual.message.copy(), dual.multipliers.copy(), dual.best
    one, same = (dual.rounded(dual.multipliers, 2, 5.0, np.random.default_rng(1)) for _ in range(2))
    others = [dual.rounded(dual.multipliers, 2, 5.0, np.random.default_rng(seed)) for seed in range(2, 6)]
    assert (dual.message == before[0]).all() and (dual.multipliers == before[1]).all() and dual.best == before[2]
    assert (one == same).all() and any((one != other).any() for other in others)
    assert ((one >= 0) & (one < np.diff(core.start))).all()


def test_a_family_keeps_the_best_within_the_limit_and_learns_prices():
    rose = 0
    for seed in range(6):
        reducer, core = reduced(seed)
        rng = np.random.default_rng(seed)
        counts = np.diff(core.start)
        family = Family(core, rng, Repeats(reducer))
        multipliers = np.zeros(len(core.capacity))
        for _ in range(8):
            before = family.cost
            family.add(Walk(core, (rng.random(len(counts)) * counts).astype(np.int64)))
            family.merge(multipliers, lambda: None)
            assert family.cost <= before and len(family.recent) <= 3 and len(family.made) <= 4
            if family.best is not None:
                assert (core_usage(core, family.best.chosen) <= core.capacity).all()
                assert family.cost == core_cost(core, family.best.chosen)
        assert (family.prices >= 0).all()
        rose += bool(family.prices.any())
    assert rose
