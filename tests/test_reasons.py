"""Room `reasons`: what is said about a plan is what the planner finds when it is asked again."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import pytest
from conftest import mesh_of
from jax.sharding import AbstractMesh, PartitionSpec as P

import jaxplan
from jaxplan.examples import programs
from jaxplan.reasons import charges, growth
from jaxplan.report import show_seconds


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def train(params, x):
    def loss(params):
        hidden = jnp.maximum(x @ params["up"], 0.0)
        return jnp.mean((hidden @ params["down"]) ** 2)

    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))


LINE = f"test_reasons.py:{inspect.getsourcelines(train)[1] + 2}"  # of hidden
ARGS = {"up": f32(256, 1024), "down": f32(1024, 256)}, f32(4096, 256)


@pytest.fixture(scope="module")
def plan():
    return jaxplan.make_plan(train, *ARGS, mesh=AbstractMesh((4, 2), ("x", "y")), machine="v4")


@pytest.mark.parametrize("name", sorted(programs()))
def test_charges_add_up_to_the_time_of_the_plan(name):
    program = programs()[name]
    plan = jaxplan.make_plan(program.fn, *program.args, mesh=AbstractMesh((4, 2), ("x", "y")), machine="v4")
    assert sum(charge.seconds for charge in charges(plan).values()) == pytest.approx(plan.seconds, rel=1e-9)


def test_an_input_is_explained_by_solving_again(plan):
    (reason,) = plan.explain("params/up").reasons
    assert reason.paths == ["params/up"] and reason.spec == plan.in_specs[0]["up"]
    assert float(reason.cost.subs(plan.symbol_values)) == pytest.approx(reason.seconds, rel=1e-9)
    assert reason.alternatives == sorted(reason.alternatives, key=lambda other: other.extra)
    for other in reason.alternatives[:3]:
        again = plan.replan(pins={"params/up": other.spec})
        assert again.in_specs[0]["up"] == other.spec
        assert other.extra == pytest.approx(again.seconds - plan.seconds, abs=1e-15)
    assert f"runner-up       {other_text(reason.alternatives[0].spec)}" in str(plan.explain("params/up"))


def test_what_forces_a_layout_is_named_with_what_it_would_cost(plan):
    reasons = [plan.explain(path).reasons[0] for path in plan.traced.in_paths]
    forced = [reason for reason in reasons if reason.alternatives[0].extra > 0]
    assert forced and all(reason.forced_by == "" for reason in reasons if reason not in forced)
    for reason in forced:
        most = growth(plan, plan.replan(pins={reason.paths[0]: reason.alternatives[0].spec}))[0]
        assert reason.forced_by == f"{most}: {show_seconds(most.seconds)} more"
        assert f"  forced by       {reason.forced_by}" in str(reason)


def test_the_neighbour_that_forces_an_operator_is_named():
    """A product of rows that lie split, since sorting wants them so: to split nothing, they would have to be gathered."""

    def chain(x, w):
        return jnp.tanh(jnp.sort(x @ w, axis=1))

    found = jaxplan.make_plan(chain, f32(4096, 256), f32(256, 512), mesh=AbstractMesh((4,), ("x",)), machine="a100")
    line = inspect.getsourcelines(chain)[1] + 1
    reasons = {reason.operator: reason for reason in found.explain(f"test_reasons.py:{line}").reasons}
    product = reasons["dot_general"]
    assert list(product.splits) == ["x"] and product.runner_up is not None and product.runner_up[1] > 0
    byte_seconds, latency = found.modelled.numbers.link(0)
    gathered = 3 / 4 * 4096 * 256 * 4 * byte_seconds + latency
    assert product.runner_up[0] == {} and product.forced_by == f"x: {show_seconds(gathered)} more"


def other_text(spec):
    return str(spec).replace("PartitionSpec", "P")


def test_what_grows_is_what_a_worse_plan_spends_more_on(plan):
    worse = plan.why_not({"x": P(None, "x")})
    assert worse.extra > 0 and worse.other.in_specs[1] == P(None, "x")
    assert worse.changed["x"] == (plan.in_specs[1], P(None, "x"))
    grown = growth(plan, worse.other)
    shrunk = growth(worse.other, plan)
    assert worse.extra == pytest.approx(sum(c.seconds for c in grown) - sum(c.seconds for c in shrunk), rel=1e-6)
    text = str(worse)
    assert "more a call" in text and "costs more" in text and "peak memory" in text and "-> P(None, 'x')" in text


def test_an_axis_that_divides_nothing_is_a_reason():
    plan = jaxplan.make_plan(lambda x: jnp.tanh(x), f32(6, 10), mesh=AbstractMesh((4,), ("y",)), machine="v4")
    (reason,) = plan.explain("x").reasons
    assert reason.idle == {"y": "does not shard it: 4 devices divide none of its dimensions (6, 10)"}
    assert "4 devices divide none" in str(plan.explain("x"))


def test_replication_where_sharding_was_possible_has_a_reason():
    """A small table that every row of a large batch looks into."""
    plan = jaxplan.make_plan(
        lambda table, ids: jnp.sum(jnp.take(table, ids, axis=0), axis=1), f32(8, 16), jax.ShapeDtypeStruct((4096, 64), jnp.int32),
        mesh=AbstractMesh((8,), ("x",)), machine="v4",
    )  # fmt: skip
    (reason,) = plan.explain("table").reasons
    assert reason.spec == P() and "costs" in reason.idle["x"]
    assert reason.alternatives[0].extra > 0


def test_what_no_operator_can_take_sharded_says_so():
    plan = jaxplan.make_plan(lambda x: jnp.linalg.det(x), f32(64, 64), mesh=AbstractMesh((8,), ("x",)), machine="v4")
    (reason,) = plan.explain("x").reasons
    assert reason.spec == P() and "x" in reason.idle


def test_layers_are_explained_together():
    def deep(blocks, x):
        for block in blocks:
            x = jnp.tanh(x @ block["w"])
        return x

    blocks = [{"w": f32(64, 64)} for _ in range(3)]
    plan = jaxplan.make_plan(deep, blocks, f32(1024, 64), mesh=AbstractMesh((4,), ("x",)), machine="v4")
    explanation = plan.explain("blocks")
    (reason,) = explanation.reasons
    assert len(reason.paths) == 3 and "(x3)" in str(explanation)
    again = plan.replan(pins=dict.fromkeys(reason.paths, reason.alternatives[0].spec))
    assert reason.alternatives[0].extra == pytest.approx(again.seconds - plan.seconds, abs=1e-15)


def test_a_source_line_is_explained(plan):
    explanation = plan.explain(LINE)
    (product,) = [r for r in explanation.reasons if "dot_general" in r.operator and "max" not in r.operator][:1]
    assert product.splits and product.source == LINE
    assert float(product.cost.subs(plan.symbol_values)) * product.times == pytest.approx(product.seconds, rel=1e-9)
    assert product.runner_up is not None and product.runner_up[1] >= -1e-12 * plan.seconds
    assert LINE in str(explanation) and "takes" in str(explanation)
    assert str(plan.explain(LINE.removeprefix("test_reasons.py"))) == str(explanation)


def test_many_inputs_are_not_solved_again():
    args = {f"k{'abcdefgh'[i]}": f32(8, 8 + 8 * i) for i in range(6)}
    plan = jaxplan.make_plan(lambda p: jax.tree.map(jnp.sin, p), args, mesh=AbstractMesh((2,), ("x",)), machine="v4")
    explanation = plan.explain("p")
    assert len(explanation.reasons) == 6 and "name fewer" in str(explanation)
    assert not any(reason.alternatives for reason in explanation.reasons)


def test_mistakes_are_told(plan):
    with pytest.raises(ValueError, match=r"explain 'params/upp'.*params/up"):
        plan.explain("params/upp")
    with pytest.raises(ValueError, match=r"no operator of train was written at 'test_reasons.py:1'.*test_reasons.py:\d+"):
        plan.explain("test_reasons.py:1")
    with pytest.raises(ValueError, match="names axis 'z'"):
        plan.why_not({"x": P("z")})


def test_explaining_needs_no_devices_and_changes_nothing(plan):
    before = str(plan.in_specs)
    plan.explain("x")
    assert str(plan.in_specs) == before
    small = jaxplan.make_plan(train, *ARGS, mesh=mesh_of((1,)), machine="v4")
    (reason,) = small.explain("x").reasons
    assert reason.alternatives == [] and reason.idle == {}
