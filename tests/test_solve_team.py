"""Several workers on one problem: what they find is feasible, what they prove holds, and they end with the search."""

import math
import threading

import numpy as np
import pytest
from layered_problems import layered_problem
from test_solve import by_force, random_problem, reduced
from test_solve_branching import rooted
from test_solve_layered import by_integer_program

from jaxplan.solve import Incumbent, NoSolutionError, cost_of, peak_usage, solve, team
from jaxplan.solve.branching import Tree
from jaxplan.solve.driver import Search
from jaxplan.solve.dual import Dual


def together(problem, workers=3, rounds=12, seed=0):
    """A search by several workers without a clock."""
    incumbent = Incumbent(problem)
    Search(problem, incumbent, np.random.default_rng(seed), math.inf, rounds, workers).run()
    return incumbent


@pytest.mark.parametrize("seed", range(6))
def test_workers_together_find_what_brute_force_finds(seed):
    problem = random_problem(seed)
    least = by_force(problem)
    if not math.isfinite(least):
        with pytest.raises(NoSolutionError):
            solve(problem, 0.5, workers=3)
        return
    incumbent = together(problem)
    found = incumbent.solution()
    assert found is not None and found.cost == least == cost_of(problem, found.strategies)
    assert incumbent.bound <= least * (1 + 1e-9)
    assert peak_usage(problem, found.strategies).usage <= problem.limit


@pytest.mark.parametrize("seed", [1, 4])
def test_they_agree_with_an_integer_program_on_layers(seed):
    problem, _ = layered_problem(seed, layers=2, width=3, slack=0.3)
    best = by_integer_program(problem)
    incumbent = together(problem, rounds=20)
    found = incumbent.solution()
    assert found is not None and best * (1 - 1e-6) <= found.cost <= best * 1.02
    assert incumbent.bound <= best * (1 + 1e-6)


def test_threads_end_with_the_search_and_when_it_is_stopped():
    before = set(threading.enumerate())
    problem = random_problem(5, 60, 0.3, planted=True)
    together(problem, workers=4, rounds=3)
    assert set(threading.enumerate()) == before
    incumbent = Incumbent(problem)
    incumbent.log = lambda line: setattr(incumbent, "stopped", True)
    found = solve(problem, 500.0, 0, incumbent, workers=4)
    assert set(threading.enumerate()) == before
    assert peak_usage(problem, found.strategies).usage <= problem.limit


def test_what_goes_wrong_in_one_worker_is_raised_and_what_was_found_stays(monkeypatch):
    def wrong(self):
        raise FloatingPointError("a worker's own")

    monkeypatch.setattr(Search, "help", wrong)
    problem = random_problem(5, 40, 0.3, planted=True)
    incumbent = Incumbent(problem)
    with pytest.raises(FloatingPointError, match="a worker's own"):
        Search(problem, incumbent, np.random.default_rng(0), math.inf, 2, 2).run()
    found = incumbent.solution()
    assert found is not None and peak_usage(problem, found.strategies).usage <= problem.limit


def test_one_tree_split_by_several_never_claims_more_than_the_optimum():
    problem, _ = layered_problem(3, layers=2, width=3, slack=0.05)
    dual, best = rooted(problem), by_integer_program(problem)
    assert dual is not None
    tree = Tree(dual, lambda chosen: None)
    trees = [tree, tree.twin(lambda chosen: None), tree.twin(lambda chosen: None)]
    bounds = [[tree.bound] for _ in trees]

    def grow(own, seen):
        for _ in range(25):
            own.grow(1.5 * best)
            seen.append(own.bound)

    threads = [threading.Thread(target=grow, args=pair) for pair in zip(trees, bounds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seen in bounds:
        assert seen == sorted(seen) and max(seen) <= best * (1 + 1e-6)
    assert not tree.front.busy and len({own.bound for own in trees}) == 1


def test_a_problem_that_is_being_split_counts_in_the_bound():
    problem, _ = layered_problem(3, layers=2, width=3, slack=0.05)
    dual = rooted(problem)
    assert dual is not None
    front = Tree(dual, lambda chosen: None).front
    first = front.bound
    leaf = front.take(1)
    assert leaf is not None and front.take(2) is None and front.bound == first == leaf.bound
    front.done(1)
    assert front.bound == math.inf


def test_news_is_heard_once_and_not_ones_own():
    shared = team.Team()
    assert shared.news(0, math.inf) == []
    shared.tell(1, 5.0, np.array([1, 2]))
    assert [chosen.tolist() for chosen in shared.news(0, 7.0)] == [[1, 2]]
    assert shared.news(0, 7.0) == [] and shared.news(1, 5.0) == []
    assert shared.news(2, 5.0) == []  # it came to the same
    shared.tell(1, 4.0, np.array([1, 1]))
    assert [chosen.tolist() for chosen in shared.news(0, 5.0)] == [[1, 1]]


def test_workers_are_as_many_as_cores_and_one_without_compiled_kernels(monkeypatch):
    monkeypatch.setattr(team, "HAVE_NUMBA", True)
    for cores, wanted in [(1, 1), (2, 2), (64, team.MOST)]:
        monkeypatch.setattr(team.os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)), raising=False)
        assert team.available() == wanted
    monkeypatch.delattr(team.os, "sched_getaffinity")
    monkeypatch.setattr(team.os, "cpu_count", lambda: None)
    assert team.available() == 1
    monkeypatch.setattr(team, "HAVE_NUMBA", False)
    monkeypatch.setattr(team.os, "cpu_count", lambda: 8)
    assert team.available() == 1


def test_a_dual_that_others_read_meanwhile_ascends_as_if_alone():
    found = reduced(3)
    assert found is not None
    reducer, core = found
    alone, watched = Dual(core, reducer.constant), Dual(core, reducer.constant)
    shared = team.Team()
    shared.show(watched)
    ended = threading.Event()
    read = []

    def reader(seed):
        rng = np.random.default_rng(seed)
        while not ended.is_set():
            dual = shared.dual
            assert dual is not None
            read.append(dual.rounded(dual.multipliers, 1, 3.0, rng))

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(60):
            assert alone.ascend(0.01)[0] == watched.ascend(0.01)[0]
            shared.show(watched)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert read and (alone.multipliers == watched.multipliers).all()
    own, other = shared.dual, watched
    assert own is not None
    for name in ("message", "costs", "scratch", "handed", "active"):
        assert not np.shares_memory(getattr(own, name), getattr(other, name)), name
