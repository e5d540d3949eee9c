"""The certificate: no assignment costs less than the bound, whatever the search. Oracles: brute force, the integer program."""

import functools
import importlib
import itertools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec as P
from test_search import exhaustive, random_layouts, random_tables
from test_usages import entangled, limited

import jaxplan
from jaxplan.cost import Numbers, certainly_within, model
from jaxplan.examples import programs
from jaxplan.graph import build_graph
from jaxplan.machine import machine
from jaxplan.problem import Assignment, evaluate, from_tables, peak, within_limit
from jaxplan.reduce import Pricer, fold
from jaxplan.search import alpa, brute, certify, hsm2dl, search
from jaxplan.search.dual import Floor, Relaxation
from jaxplan.search.moves import Grove
from jaxplan.trace import trace

MESH = AbstractMesh((4, 4), ("x", "y"))


def frustrated(seed, nodes=7):
    """Neighbours want to differ and there are odd cycles: the linear relaxation is below the optimum."""
    rng = np.random.default_rng(seed)
    costs = [rng.random(2) * 0.1 for _ in range(nodes)]
    pairs = itertools.combinations(range(nodes), 2)
    return from_tables(costs, [(i, j, np.diag(rng.random(2) + 1)) for i, j in pairs])


def below_zero(seed):
    """Some prices are gains."""
    rng = np.random.default_rng(seed)
    costs = [rng.integers(-20, 20, 3).astype(float) for _ in range(6)]
    return from_tables(costs, [(i, j, rng.integers(-20, 20, (3, 3)).astype(float)) for i in range(6) for j in range(i)])


def written_out(monkeypatch, **sizes):
    """Other sizes of what the certificate writes out."""
    for name, size in sizes.items():
        monkeypatch.setattr(f"jaxplan.search.certificate.{name}", size)


def at_random(problem, seed=0):
    """A legal assignment, chosen blindly."""
    rng = np.random.default_rng(seed)
    while True:
        choices = np.array([[rng.integers(n) for n in node.options] for node in problem.nodes])
        if math.isfinite(seconds := evaluate(problem, choices)):
            return Assignment(choices, seconds)


def modelled(name, shape, size="small"):
    program = programs(size)[name]
    graph = build_graph(trace(program.fn, program.args, {}))
    mesh = AbstractMesh(shape, tuple("xyz"[: len(shape)]))
    return model(graph, Numbers(graph, dict(mesh.shape), machine("v4", mesh))).problem


FAMILIES = {
    "tables": random_tables,
    "layouts": lambda seed: random_layouts(seed, nodes=4),
    "frustrated": frustrated,
    "gains": below_zero,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(15))
def test_no_assignment_costs_less_than_the_bound(family, seed):
    problem = FAMILIES[family](seed)
    best = brute(problem).seconds
    for start in (at_random(problem), brute(problem)):
        proven = certify(problem, start)
        assert proven.bound <= best * (1 + 1e-12 * np.sign(best))
        assert best - 1e-9 <= proven.seconds <= start.seconds
        assert proven.seconds == pytest.approx(evaluate(problem, proven.choices), rel=1e-12)
        assert proven.seconds - proven.bound <= 2e-4 * abs(proven.seconds) + 1e-12, "what is left was small enough to be solved"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(10))
def test_a_floor_is_below_every_assignment_and_reaches_most_of_the_way(family, seed):
    problem = FAMILIES[family](seed)
    best = brute(problem).seconds
    above, size = best + 1e-9 * abs(best) + 1e-12, abs(best) + 1.0
    assert not Floor(problem).reaches(above) and not Floor(problem).reaches(math.inf)
    assert Floor(problem).reaches(best - 2 * size)
    floor = Floor(problem)
    asked = [best - share * size for share in (3.0, 1.0, 0.5, 0.1)]
    told = [floor.reaches(seconds) for seconds in asked]
    assert told == sorted(told, reverse=True), "what is reached once is reached for whatever is less"
    assert not floor.reaches(above) and floor.seconds <= above and floor.reaches(asked[0])


def test_a_floor_of_a_problem_too_large_shows_nothing(monkeypatch):
    problem = random_layouts(0)
    assert Floor(problem).reaches(-1.0)
    monkeypatch.setattr(importlib.import_module("jaxplan.search.dual"), "LIMIT", 1)
    floor = Floor(problem)
    assert not floor.reaches(-1.0) and not floor.reaches(-1.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(5))
def test_messages_rewrite_the_problem_and_the_bound_never_falls(family, seed):
    problem = FAMILIES[family](seed)
    best, ample = brute(problem), 1e6
    relaxation, before = Relaxation(problem, ample), -math.inf
    for turn in range(12):
        relaxation.sweep(turn % 2 == 0, math.inf)
        assert before - 1e-9 <= relaxation.bound() <= best.seconds + 1e-9
        before = relaxation.bound()
    tables = relaxation.tables()
    for seed in range(20):
        start = at_random(problem, seed)
        options = [int((rows == row).all(1).argmax()) for rows, row in zip(relaxation.rows, start.choices, strict=True)]
        assert tables.price(np.array(options)) == pytest.approx(start.seconds, abs=1e-8)
    assert evaluate(problem, relaxation.decoded(forward=True)) >= best.seconds - 1e-9


@pytest.mark.parametrize("seed", range(15))
def test_what_is_struck_out_is_in_no_cheap_assignment(seed):
    problem = random_tables(seed)
    best = brute(problem)
    relaxation, dual = Relaxation(problem, best.seconds), 0.0
    for turn in range(30):
        relaxation.sweep(turn % 2 == 0, max(0.0, best.seconds * (1 + 1e-9) - dual))
        dual = relaxation.bound()
    kept = [rows[options] for rows, options in zip(relaxation.rows, relaxation.options, strict=True)]
    for choice, rows in zip(best.choices, kept, strict=True):
        assert (rows == choice).all(1).any()
    assert best.seconds == pytest.approx(exhaustive(problem))


def test_something_is_struck_out():
    assert sum(certify(random_tables(seed), hsm2dl(random_tables(seed))).notes["struck out"] for seed in range(15)) > 0


def test_the_relaxation_alone_does_not_close_odd_cycles(monkeypatch):
    written_out(monkeypatch, DENSE=0, WIDE_DENSE=0)
    for seed in range(5):
        best = brute(frustrated(seed))
        proven = certify(frustrated(seed), best)
        assert 0 < proven.bound < best.seconds * 0.99


def test_the_integer_program_tightens_what_elimination_cannot(monkeypatch):
    written_out(monkeypatch, CAP=8, WIDE_CAPS=())
    loose, tight, best = [], [], []
    for seed in range(5):
        problem = frustrated(seed, nodes=9)
        best.append(brute(problem).seconds)
        loose.append(certify(problem, at_random(problem)).bound)
        tight.append(certify(problem, at_random(problem), program_seconds=30.0))
    assert all(a < b * 0.99 for a, b in zip(loose, best, strict=True))
    assert all(b * (1 - 1e-6) <= found.bound <= b for found, b in zip(tight, best, strict=True))
    assert [found.seconds for found in tight] == pytest.approx(best)


def test_larger_tables_are_built_only_where_the_gap_is_wide(monkeypatch):
    for seed in range(5):
        problem = frustrated(seed, nodes=9)
        best = brute(problem)
        written_out(monkeypatch, CAP=8, WIDE_CAPS=(16, 1 << 20), WIDE=0.01)
        assert certify(problem, at_random(problem)).bound == pytest.approx(best.seconds)
        written_out(monkeypatch, WIDE=1.0)
        assert certify(problem, best).bound < best.seconds * 0.99


def test_what_messages_say_is_read_re_opened_and_joined(monkeypatch):
    """From blind assignments, and with nothing written out, the readings alone end near the optimum; twice at the same."""
    written_out(monkeypatch, DENSE=0, WIDE_DENSE=0)
    problem = modelled("moe", (4, 2))
    best = certify(problem, hsm2dl(problem))
    found = [certify(problem, at_random(problem)) for _ in range(2)]
    assert best.bound <= found[0].seconds <= best.seconds * 1.005
    assert (found[0].choices == found[1].choices).all() and found[0].bound == found[1].bound


def test_tables_among_some_options_are_those_of_all():
    problem = random_tables(3)
    best = brute(problem)
    relaxation = Relaxation(problem, best.seconds)
    for turn in range(10):
        relaxation.sweep(turn % 2 == 0, 0.2 * best.seconds)
    assert relaxation.dropped
    some = [tuple(range(len(held)))[::-2] for held in relaxation.held]
    every, few = relaxation.tables(), relaxation.tables(some)
    picked = np.array([numbers[-1] for numbers in some])
    assert few.price(np.array([len(numbers) - 1 for numbers in some])) == pytest.approx(every.price(picked), rel=1e-12)
    numbers = Grove(relaxation).numbered(best.choices)
    assert (relaxation.choices(numbers) == best.choices).all(), "the cheapest is still open"


def test_a_bound_of_the_folded_problem_is_none_of_the_problem():
    """Twins that would rather differ: deciding alike, they cost 18."""
    apart = np.array([[9.0, 0.0], [0.0, 9.0]])
    twins = from_tables([[0.0, 1.0], [0.0, 1.0]], [(0, 1, apart), (1, 0, apart)], kinds=["a", "a"], edge_kinds=["e", "e"])
    assert len(fold(twins, 2)[0].nodes) == 1 and hsm2dl(twins).seconds == 18.0
    proven = certify(twins, hsm2dl(twins))
    assert proven.bound <= proven.seconds == 1.0
    folded = alpa(twins)
    assert folded.bound is None and folded.notes["folded_bound"] == pytest.approx(18.0, rel=1e-5)


@pytest.mark.parametrize("shape", [(8,), (4, 2)])
@pytest.mark.parametrize("name", ["mlp_sgd", "moe", "decode_kv", "conjugate_gradient", "stencil"])
def test_the_bound_is_below_the_integer_programs_optimum_on_the_examples(name, shape):
    problem = modelled(name, shape)
    exact = alpa(problem, rounds=None)
    assert exact.bound >= exact.seconds * (1 - 1e-5), "not proven: no oracle"
    proven = certify(problem, hsm2dl(problem))
    assert proven.bound <= exact.seconds * (1 + 1e-9)
    assert proven.seconds >= exact.seconds * (1 - 1e-6)
    assert proven.seconds <= proven.bound * 1.001


def test_prices_that_look_at_layouts_only_give_the_bound_that_looking_at_every_option_gives():
    problem = modelled("moe", (4, 2))
    plain = [edge._replace(price=lambda t, h, edge=edge: edge.price(t, h)) for edge in problem.edges]
    layouts, options = Relaxation(problem, 1.0), Relaxation(problem.__class__(problem.axes, problem.nodes, tuple(plain)), 1.0)
    for turn in range(4):
        layouts.sweep(turn % 2 == 0, math.inf)
        options.sweep(turn % 2 == 0, math.inf)
    assert layouts.bound() == pytest.approx(options.bound(), rel=1e-9)
    assert max(max(link.rest.shape) for link in layouts.links) < max(max(link.rest.shape) for link in options.links)


def test_what_is_too_large_or_not_legal_is_said(monkeypatch):
    problem = random_tables(0)
    with pytest.raises(ValueError, match=r"not legal .* only a legal one can be certified"):
        certify(from_tables([[0.0, np.inf]], []), Assignment(np.array([[1]]), 0.0))
    monkeypatch.setattr("jaxplan.search.dual.LIMIT", 10)
    with pytest.raises(ValueError, match="more than 10 table entries: too large for a bound"):
        certify(problem, hsm2dl(problem))


# ---- plans ---------------------------------------------------------------------------------------------------------


def step(w, x):
    return jax.tree.map(lambda p, g: p - 0.1 * g, w, jax.grad(lambda w: (jax.numpy.tanh(x @ w) ** 2).sum())(w))


ARGS = jax.ShapeDtypeStruct((256, 512), np.float32), jax.ShapeDtypeStruct((4096, 256), np.float32)


def plan_for(**options):
    return jaxplan.make_plan(step, *ARGS, mesh=MESH, machine="v4", **options)


def nothing_sharded(problem):
    return Assignment(np.zeros((len(problem.nodes), len(problem.axes)), dtype=int), 0.0)


@pytest.mark.parametrize("name", ["hsm2dl", "tofu", "trws"])
def test_a_certified_plan_has_a_bound_and_says_so(name):
    plan = plan_for(certify=True, search=name)
    best = alpa(plan.modelled.problem, rounds=None)
    assert 0 < plan.bound <= best.seconds * (1 + 1e-9) and best.seconds <= plan.seconds * (1 + 1e-6)
    assert plan.gap == (plan.seconds - plan.bound) / plan.bound <= 0.01
    assert f"at most {plan.gap:.2%} above the optimum: no plan takes less than" in str(plan)
    assert plan.stages["certify"] > 0


def test_a_callables_plan_stays_as_it_is_and_its_gap_is_large():
    plan, known = plan_for(certify=True, search=nothing_sharded), plan_for(certify=True)
    assert (plan.choices[list(plan.modelled.kept)] == 0).all() and plan.in_specs == (P(), P())
    assert plan.bound == pytest.approx(known.bound, rel=1e-3)
    assert plan.seconds > 2 * known.seconds and plan.gap > 1


def test_without_a_certificate_there_is_no_bound():
    plan = plan_for()
    assert plan.bound is None and plan.gap is None and "above the optimum" not in str(plan)
    again = plan.replan(certify=True)
    assert again.bound <= again.seconds <= plan.seconds and again.gap < 0.01


def test_a_named_search_gives_way_to_a_cheaper_plan_met_while_certifying():
    program = programs("full")["moe"]
    tofu = jaxplan.make_plan(program.fn, *program.args, mesh=MESH, machine="v4", search="tofu")
    certified = tofu.replan(certify=True)
    assert certified.seconds < tofu.seconds * 0.9 and certified.gap < 0.01


def test_a_budget_keeps_the_bound_and_the_budget():
    def update(w, x):
        return w - 0.1 * jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(w)

    shapes = jax.ShapeDtypeStruct((1024, 1024), jnp.float32), jax.ShapeDtypeStruct((8192, 1024), jnp.float32)
    free = jaxplan.make_plan(update, *shapes, mesh=MESH, machine="v4", memory_budget=math.inf, certify=True)
    budget = 0.7 * free.peak_bytes
    tight = jaxplan.make_plan(update, *shapes, mesh=MESH, machine="v4", memory_budget=budget, certify=True)
    assert tight.peak_bytes <= budget and tight.seconds > free.seconds
    assert free.seconds < tight.bound <= tight.seconds, "no plan that fits is as fast as the best without a budget"


def test_seconds_for_the_integer_program_and_what_is_no_such_number():
    assert plan_for(certify=5.0).gap <= 0.01
    for wrong in ("yes", -1.0, math.inf, math.nan, None):
        with pytest.raises(ValueError, match="certify must be True, False, or seconds"):
            plan_for(certify=wrong)
    with pytest.raises(ValueError, match="certify must be"):
        plan_for().replan(certify="no")


# ---- bad searches --------------------------------------------------------------------------------------------------


def test_a_plan_by_a_search_that_is_no_search_names_it():
    with pytest.raises(ValueError, match=r"no search is called 'optnn'; there are \['alpa', 'brute', .* or pass a callable"):
        plan_for(search="optnn")

    def outside(problem):
        return Assignment(np.full((len(problem.nodes), len(problem.axes)), 99), 0.0)

    for certified in (False, True):
        with pytest.raises(ValueError, match="'outside' chose option 99 of node 0"):
            plan_for(search=outside, certify=certified)


def test_a_bound_above_the_searchs_own_assignment_is_caught():
    def boastful(problem):
        return Assignment(brute(problem).choices, 0.0, bound=1e9)

    with pytest.raises(ValueError, match=r"'boastful' claims a bound of 1000000000.0 s, but its own assignment costs"):
        search(random_tables(0), boastful)


def test_a_solver_without_a_bound_proves_nothing(monkeypatch):
    """A negative optimum: 0 would be no bound."""
    problem = below_zero(0)
    written_out(monkeypatch, CAP=2, WIDE_CAPS=())
    monkeypatch.setattr("jaxplan.search.certificate.integer_program", lambda *_: (None, -math.inf, "out of time"))
    best = brute(problem)
    assert best.seconds < 0 and certify(problem, at_random(problem), program_seconds=1.0).bound <= best.seconds
    room = importlib.import_module("jaxplan.search.alpa")  # whose name in the package is the search's
    monkeypatch.setattr(room, "integer_program", lambda *_: (np.zeros(6, dtype=int), -math.inf, "out of time"))
    assert alpa(problem).bound is None


def test_within_a_limit_the_bound_rises_and_stays_below_the_best_that_is_within_it():
    risen = []
    for seed in range(40):
        problem, _ = (limited if seed % 2 else entangled)(seed)
        try:
            best = brute(problem).seconds
        except ValueError:  # nothing is within the limit
            continue
        proven = certify(problem, search(problem))
        free = brute(replace(problem, usages=(), limit=math.inf, reserved=())).seconds
        assert within_limit(problem, proven.choices) and proven.bound <= best * (1 + 1e-9) <= proven.seconds * (1 + 2e-9)
        if best > free * (1 + 1e-6):
            risen.append(proven.bound > free * (1 + 1e-6))
    assert len(risen) >= 8 and sum(risen) >= 0.7 * len(risen)


def momentum(w, m, x):
    loss, gradient = jax.value_and_grad(lambda w: jnp.sum((x @ w) ** 2))(w)
    m = 0.9 * m + gradient
    return w - 0.1 * m, m, loss


def scanned(w, x):
    return jnp.sum(jax.lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, w)[0] ** 2)


@pytest.mark.parametrize(("name", "chip"), [("momentum", "cpu"), ("scanned", "cpu"), ("scanned", "v5e"), ("moe", "v5e")])
def test_what_every_plan_takes_is_no_more_than_any_plan_takes(name, chip):
    """The oracle is the full model of memory, for choices made blindly."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype="float32")
    known = {
        "momentum": (momentum, (shape((64, 64)), shape((64, 64)), shape((64, 64))), (0, 1)),
        "scanned": (jax.grad(scanned), (shape((4, 128, 128)), shape((256, 128))), ()),
        "moe": (programs()["moe"].fn, programs()["moe"].args, programs()["moe"].donate),
    }
    fn, args, donate = known[name]
    mesh = AbstractMesh((4, 2), ("x", "y"))
    plan = jaxplan.make_plan(fn, *args, mesh=mesh, machine=chip, memory_budget=math.inf, donate_argnums=donate)
    whole = model(plan.modelled.graph, plan.modelled.numbers, follow=False)
    problem = certainly_within(whole, math.inf, plan.traced.donated)
    shares = []
    for seed in range(8):
        blind = replace(plan, modelled=whole, choices=each_at_random(problem, plan.choices, seed))
        shares.append(peak(problem, blind.choices).usage / blind.peak_bytes)
    assert 0.05 < max(shares) <= 1 + 1e-9


def each_at_random(problem, choices, seed):
    """Most nodes take any option of theirs that is legal by itself."""
    rng = np.random.default_rng(seed)
    blind = choices.copy()
    for number, node in enumerate(problem.nodes):
        row = np.array([[rng.integers(count) for count in node.options]])
        if math.isfinite(node.price(row)[0]):
            blind[number] = row[0]
    return blind


def test_under_a_budget_that_binds_the_bound_is_above_the_one_without_and_below_every_plan_that_fits():
    shape = functools.partial(jax.ShapeDtypeStruct, dtype="float32")
    args = shape((512, 512)), shape((512, 512)), shape((256, 512))
    options = {"mesh": AbstractMesh((4,), ("x",)), "machine": "h100", "donate_argnums": (0, 1), "certify": True}
    free = jaxplan.make_plan(momentum, *args, memory_budget=math.inf, **options)
    for share in (0.6, 0.5):
        budget = share * free.peak_bytes
        plan = jaxplan.make_plan(momentum, *args, memory_budget=budget, **options)
        best = cheapest_that_fits(plan, budget)
        assert free.seconds * 1.02 < plan.bound <= best * (1 + 1e-9) and best <= plan.seconds * (1 + 1e-9)


def cheapest_that_fits(plan, budget):
    """Every assignment, the cheapest first, until one fits by the full model of memory."""
    problem = plan.modelled.problem
    tables, rows = Pricer(problem).whole()
    grids = np.indices([len(row) for row in rows]).reshape(len(rows), -1)
    price = sum([cost[grids[i]] for i, cost in enumerate(tables.costs)])
    price = price + sum([matrix[grids[i], grids[j]] for (i, j), matrix in tables.pairs.items()])
    for number in np.argsort(price, kind="stable"):
        if price[number] > plan.seconds:
            break
        choices = np.array([row[option] for row, option in zip(rows, grids[:, number], strict=True)])
        if replace(plan, choices=choices).peak_bytes <= budget:
            return float(price[number])
    return plan.seconds
