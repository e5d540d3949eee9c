"""Rooms `reduce` and `search` against exhaustive search on random small problems."""

import itertools

import numpy as np
import pytest

from jaxplan.problem import Assignment, Edge, Node, Problem, evaluate, from_tables
from jaxplan.reduce import ILLEGAL, Pricer, dominance, eliminate, fold
from jaxplan.search import brute, search
from jaxplan.search.elimination import lower_bound, min_fill_order, solve


def random_tables(seed, nodes=6, illegal=0.1):
    """A connected random graph with a few illegal options and pairs; option 0 is always legal."""
    rng = np.random.default_rng(seed)
    costs = [rng.integers(0, 20, rng.integers(2, 5)).astype(float) for _ in range(nodes)]
    edges = []
    for i, j in itertools.combinations(range(nodes), 2):
        if j == i + 1 or rng.random() < 0.3:
            matrix = rng.integers(0, 20, (len(costs[i]), len(costs[j]))).astype(float)
            matrix[1:, 1:][rng.random((len(costs[i]) - 1, len(costs[j]) - 1)) < illegal] = np.inf
            edges.append((i, j, matrix))
    return from_tables(costs, edges)


def random_layouts(seed, nodes=5, sizes=(2, 4)):
    """Operators that split dimensions of tensors over two axes; edges charge for moving between layouts."""
    rng = np.random.default_rng(seed)
    extents = [rng.choice([2, 4, 8, 16], 3) for _ in range(nodes)]
    made = []
    for i in range(nodes):
        work, exchange, dims = float(rng.integers(1, 40)), float(rng.integers(0, 4)), extents[i]

        def price(choices, work=work, exchange=exchange, dims=dims):
            total = []
            for row in choices.tolist():
                split = [int(np.prod([n for n, o in zip(sizes, row, strict=True) if o == d + 1])) for d in range(3)]
                used = np.prod([n for n, o in zip(sizes, row, strict=True) if o])
                legal = all(extent % s == 0 for extent, s in zip(dims, split, strict=True))
                total.append(work / used + exchange * (split[0] > 1) if legal else np.inf)
            return np.array(total)

        made.append(Node(f"n{i}", (4, 4), price, i))
    edges = []
    for i, j in itertools.combinations(range(nodes), 2):
        if j == i + 1 or rng.random() < 0.3:
            nbytes, gather = float(rng.integers(1, 30)), rng.permutation(4)

            def move(tails, heads, nbytes=nbytes, gather=gather):
                out = np.zeros((len(tails), len(heads)))
                for a, tail in enumerate(tails.tolist()):
                    for b, head in enumerate(heads.tolist()):
                        local = nbytes
                        for n, s, d in zip(sizes, tail, head, strict=True):
                            local = local / n if s and gather[s] == gather[d] else local
                        for n, s, d in zip(sizes, tail, head, strict=True):
                            if s and gather[s] != gather[d]:
                                out[a, b] += (n - 1) / n * local / (n if d else 1)
                return out

            edges.append(Edge(i, j, move, (i, j)))
    return Problem(("x", "y"), tuple(made), tuple(edges), (0, 1))


def exhaustive(problem):
    """The least price, by pricing every assignment one by one."""
    ranges = [list(itertools.product(*map(range, node.options))) for node in problem.nodes]
    tables, rows = Pricer(problem).whole()
    return min(tables.price(np.array(o)) for o in itertools.product(*[range(len(r)) for r in rows])) if ranges else 0.0


@pytest.mark.parametrize("seed", range(30))
def test_dominance_and_elimination_keep_the_optimum(seed):
    problem = random_tables(seed)
    tables, _ = Pricer(problem).whole()
    best = exhaustive(problem)
    smaller, undo = dominance(tables)
    core, left, undo_elimination = eliminate(smaller)
    assert sum(map(len, smaller.costs)) <= sum(map(len, tables.costs)) and len(core.costs) == len(left)
    options = min(itertools.product(*[range(len(c)) for c in core.costs]), key=lambda o: core.price(np.array(o)), default=())
    assert tables.price(undo(undo_elimination(np.array(options, dtype=int)))) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_bucket_elimination_is_exact_where_it_fits_and_never_worse_than_its_incumbent(seed):
    problem = random_tables(seed, nodes=7)
    tables, _ = Pricer(problem).whole()
    order = min_fill_order([1] * len(tables.costs), tables.pairs)
    assert sorted(order) == list(range(7))
    best = exhaustive(problem)
    options, exact = solve(tables, order)
    assert exact and tables.price(options) == pytest.approx(best)
    start = np.zeros(7, dtype=np.int64)
    kept, exact = solve(tables, order, start, cap=6)
    assert tables.price(kept) <= tables.price(start) < ILLEGAL
    bounded, _ = solve(tables, order, cap=6)
    assert tables.price(bounded) >= best - 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_sums_that_are_not_kept_lead_to_the_same_options(seed, monkeypatch):
    tables, _ = Pricer(random_tables(seed)).whole()
    order = min_fill_order([1] * len(tables.costs), tables.pairs)
    found = []
    for kept in (0, 1 << 12):
        monkeypatch.setattr("jaxplan.search.elimination.KEPT", kept)
        found.append([lower_bound(tables, order, cap) for cap in (4, 1 << 14)])
    for (bound, options, exact), (same_bound, same_options, same_exact) in zip(*found, strict=True):
        assert (bound, exact) == (same_bound, same_exact) and (options == same_options).all()


@pytest.mark.parametrize("cap", [1, 2, 4, 9, 30, 1000])
@pytest.mark.parametrize("seed", range(10))
def test_mini_buckets_bound_from_below_whatever_the_cap(seed, cap):
    rng = np.random.default_rng(seed)
    pairs = [(i, j, rng.integers(-20, 20, (3, 3)).astype(float)) for i in range(6) for j in range(i) if rng.random() < 0.7]
    problem = from_tables([rng.integers(-20, 20, 3).astype(float) for _ in range(7)], pairs)
    tables, _ = Pricer(problem).whole()
    bound, options, exact = lower_bound(tables, min_fill_order([1] * 7, tables.pairs), cap)
    best = brute(problem).seconds
    assert bound <= best + 1e-9 <= tables.price(options) + 2e-9
    assert not exact or bound == pytest.approx(best) == tables.price(options)
    assert exact or cap < 1000


def test_many_neighbours_without_a_choice_are_no_dimensions_of_a_table():
    hub, leaves = 0, range(1, 81)
    edges = [(hub, leaf, np.ones((1, 1))) for leaf in leaves]
    problem = from_tables([[0.0], *[[0.0]] * len(leaves), [1.0, 2.0]], [*edges, (hub, 81, np.array([[5.0, 1.0]]))])
    assert search(problem).seconds == len(leaves) + 3.0


def test_hsm2dl_is_near_the_optimum_on_random_layout_problems():
    ratios = []
    for seed in range(200):
        problem = random_layouts(seed, nodes=4)
        ratios.append(search(problem).seconds / brute(problem).seconds)
    print(f"hsm2dl / optimum over {len(ratios)}: mean {np.mean(ratios):.4f}, worst {np.max(ratios):.4f}")
    assert min(ratios) >= 1 - 1e-9
    assert np.mean(ratios) <= 1.01
    assert max(ratios) <= 1.05


def layered(depth):
    """A chain of look-alike layers between an input and an output."""
    costs, edges, kinds, edge_kinds = [np.array([0.0, 1.0])], [], ["in"], []
    for layer in range(depth):
        base = len(costs)
        costs += [np.array([3.0, 1.0]), np.array([2.0, 2.5])]
        kinds += ["a", "b"]
        edges += [(base - 1, base, np.array([[0.0, 1.0], [1.0, 0.0]])), (base, base + 1, np.array([[0.0, 2.0], [2.0, 0.0]]))]
        edge_kinds += ["first" if layer == 0 else "across", "inside"]
    return from_tables(costs, edges, kinds, edge_kinds)


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_folding_does_not_grow_with_depth_and_expands_to_a_legal_assignment(rounds):
    sizes = []
    for depth in (12, 24, 96):
        problem = layered(depth)
        smaller, undo = fold(problem, rounds)
        sizes.append(len(smaller.nodes))
        choices = undo(brute(smaller).choices if len(smaller.nodes) < 15 else search(smaller).choices)
        assert evaluate(problem, choices) >= search(problem).seconds - 1e-9
    assert len(set(sizes)) == 1


def test_a_search_that_is_no_search_is_caught_and_named():
    problem = random_tables(0)
    with pytest.raises(ValueError, match=r"called 'magic'; there are \['alpa', 'brute', 'hsm2dl', 'joint', .*'trws'\], or pass"):
        search(problem, "magic")

    def short(problem):
        return Assignment(np.zeros((1, 1), dtype=int), 0.0)

    def outside(problem):
        return Assignment(np.full((len(problem.nodes), 1), 99), 0.0)

    def illegal(problem):
        return Assignment(np.array([[1], [0]]), 0.0)

    def ragged(problem):
        return Assignment([[0], [0, 1]], 0.0)

    def halves(problem):
        return Assignment(np.full((len(problem.nodes), 1), 0.5), 0.0)

    def nothing(problem):
        return None

    def unpriced(problem):
        return Assignment(np.zeros((len(problem.nodes), 1)) * np.nan, 0.0)

    def below(problem):
        return Assignment(np.full((len(problem.nodes), 1), -1), 0.0)

    with pytest.raises(ValueError, match="or a callable Problem -> Assignment, not 3"):
        search(problem, 3)
    with pytest.raises(ValueError, match="'ragged' returned choices that are no array"):
        search(problem, ragged)
    with pytest.raises(ValueError, match=r"'halves' returned choices of shape .* and dtype float64"):
        search(problem, halves)
    with pytest.raises(ValueError, match=r"'unpriced' returned choices of shape .* and dtype float64"):
        search(problem, unpriced)
    with pytest.raises(ValueError, match="'below' chose option -1 of node 0"):
        search(problem, below)
    with pytest.raises(ValueError, match="'nothing' returned a NoneType; wanted an Assignment"):
        search(problem, nothing)
    with pytest.raises(ValueError, match="'short' returned choices of shape"):
        search(problem, short)
    with pytest.raises(ValueError, match="'outside' chose option 99 of node 0"):
        search(problem, outside)
    with pytest.raises(ValueError, match="'illegal' returned an assignment that is not legal"):
        search(from_tables([[0.0, np.inf], [0.0]], []), illegal)
    with pytest.raises(ValueError, match=r"'illegal' returned an assignment that is not legal: its price is (nan|inf)"):
        search(from_tables([[0.0, np.nan], [0.0]], []), illegal)


def test_brute_refuses_what_it_cannot_finish_and_nothing_is_solved_at_once():
    with pytest.raises(ValueError, match="brute force would price"):
        search(from_tables([np.zeros(10)] * 12, []), "brute")
    assert search(from_tables([], [])).seconds == 0.0


def test_a_users_callable_is_a_search():
    problem = random_tables(3)
    assert search(problem, brute).seconds == pytest.approx(exhaustive(problem))
