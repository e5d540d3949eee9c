"""Regimes: where one plan takes over from another is where their closed forms cross, and where planning anew finds it."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
import sympy
from jax.sharding import AbstractMesh

import jaxplan
from jaxplan import cli
from jaxplan.regimes import WORTH


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def step(params, x):
    def loss(params):
        return jnp.mean(jnp.square(jax.nn.relu(x @ params["up"]) @ params["down"] - x))

    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))


ARGS = {"up": f32(256, 1024), "down": f32(1024, 256)}, f32(4096, 256)
DIMS = {"x": "B F", "params/up": "F W"}


def at_rows(rows):
    mesh = AbstractMesh((8,), ("x",))
    return jaxplan.make_plan(step, ARGS[0], f32(int(rows), 256), mesh=mesh, machine="v4", dims=DIMS)


@pytest.fixture(scope="module")
def plan():
    return at_rows(4096)


@pytest.fixture(scope="module", params=["B", "F", "n_x", "g_x"])
def found(request, plan):
    return plan.regimes(request.param)


def cost(plan, symbol, value):
    """The closed form of a plan's cost with one symbol given another value."""
    values = {s: value if s.name == symbol else v for s, v in plan.symbol_values.items()}
    return float(sympy.lambdify(list(values), plan.cost, "math")(*values.values()))


def test_ranges_follow_one_another_and_the_plan_is_in_one(found, plan):
    assert len(found.crossings) == len(found.regimes) - 1 >= 1
    for before, crossing, after in zip(found.regimes, found.crossings, found.regimes[1:], strict=False):
        assert before.low <= before.high == crossing.between[0] <= crossing.value
        assert crossing.value <= crossing.between[1] == after.low <= after.high
    assert found.here.low <= found.now <= found.here.high
    assert cost(found.here.plan, found.symbol, found.now) <= plan.seconds * (1 + WORTH)


def test_closed_forms_are_equal_where_they_cross(found):
    for before, crossing, after in zip(found.regimes, found.crossings, found.regimes[1:], strict=False):
        assert crossing.solved and crossing.verified
        one, other = (cost(side.plan, found.symbol, crossing.value) for side in (before, after))
        assert one == pytest.approx(other, rel=1e-9)
        numbers = {**after.plan.symbol_values, **before.plan.symbol_values}
        difference = crossing.condition.subs({s: crossing.value if s.name == found.symbol else v for s, v in numbers.items()})
        assert abs(float(difference)) <= 1e-9 * one
        below, above = (cost(before.plan, found.symbol, v) - cost(after.plan, found.symbol, v) for v in crossing.between)
        assert below <= 0 <= above, "the first is the better one below, the second above"


def test_planning_anew_finds_nothing_better(plan):
    found = plan.regimes("B", 128, 16384)
    assert len(found.regimes) >= 2
    for regime in found.regimes:
        for rows in {regime.low, regime.high, 8 * round(math.sqrt(regime.low * regime.high) / 8)}:
            fresh, closed = at_rows(rows), cost(regime.plan, "B", rows)
            assert closed <= fresh.seconds * (1 + WORTH)
            assert closed >= fresh.seconds * (1 - WORTH), "the search is exact on a program of this size"


def test_with_the_devices_the_links_may_change():
    """Beyond eight devices an axis leaves the node: what was found inside of it is priced with the slow link there."""
    plan = jaxplan.make_plan(step, *ARGS, mesh=AbstractMesh((4, 2), ("x", "y")), machine="a100", dims=DIMS)
    found = plan.regimes("n_y", 2, 16)
    assert any(not crossing.solved and crossing.between == (2.0, 4.0) for crossing in found.crossings)
    assert "model (n_y)" not in str(found) and "y (n_y): " in str(found)
    for regime in found.regimes:
        mesh = AbstractMesh((4, int(regime.low)), ("x", "y"))
        fresh = jaxplan.make_plan(step, *ARGS, mesh=mesh, machine="a100", dims=DIMS, pipeline=None)
        assert regime.seconds_at_low == pytest.approx(fresh.seconds, rel=WORTH)


def test_a_plan_whose_cuts_do_not_divide_is_no_candidate():
    """Twelve heads over four devices are three each; over eight, none can be cut so, whatever the closed form says."""

    def heads(q, k):
        return jnp.sum(jax.nn.softmax(jnp.einsum("hqd,hkd->hqk", q, k)), axis=2)

    shapes = f32(12, 512, 64), f32(12, 512, 64)
    plan = jaxplan.make_plan(heads, *shapes, mesh=AbstractMesh((4,), ("x",)), machine="v4", dims={"q": "H Q D"})
    found = plan.regimes("n_x", 2, 16)
    assert "H" in str(plan.exchanges or plan.in_specs) or plan.in_specs[0][0] == "x", "by heads"
    for regime in found.regimes:
        fresh = jaxplan.make_plan(heads, *shapes, mesh=AbstractMesh((int(regime.low),), ("x",)), machine="v4")
        assert regime.seconds_at_low == pytest.approx(fresh.seconds, rel=WORTH)
    above = next(regime for regime in found.regimes if regime.low <= 8 <= regime.high)
    assert above.plan.in_specs[0][0] is None, "not by heads"


def test_numbers_in_a_short_condition_are_short():
    plan = jaxplan.make_plan(lambda x: jnp.sort(jnp.tanh(x) @ x.T, axis=0) * 1.5, f32(96, 96), mesh=AbstractMesh((4,), ("x",)))
    told = str(plan.regimes("g_x"))
    assert not re.search(r"[0-9]\.[0-9]{4}[0-9]*\*", told), told


def test_the_short_condition_tells_about_where(found):
    """It is solved for the symbol where it is linear in it; what it leaves out is small."""
    for regime, crossing in zip(found.regimes, found.crossings, strict=False):
        solved = re.fullmatch(rf"{found.symbol} [<>] (.*)", crossing.short)
        if solved is None:
            assert " < " in crossing.short
            continue
        names = {s.name: s for s in regime.plan.symbol_values}
        value = sympy.parse_expr(solved[1], local_dict=names).subs(regime.plan.symbol_values)
        assert float(value) == pytest.approx(crossing.value, rel=0.5)


def test_a_condition_that_can_be_worked_out_by_hand():
    """x of B rows and w of F columns, both wanted by a product over one axis of 8: whichever is smaller is gathered."""

    def product(w, x):
        return jnp.tanh(w), jnp.tanh(x), x @ w

    plan = jaxplan.make_plan(
        product, f32(256, 4096), f32(1024, 256), mesh=AbstractMesh((8,), ("x",)), machine="v4", dims=["K F", "B K"],
        pins={"w": jax.sharding.PartitionSpec(None, "x"), "x": jax.sharding.PartitionSpec("x", None)},
    )  # fmt: skip
    (crossing,) = plan.regimes("B", 512, 32768).crossings
    assert crossing.short == "B < F" and crossing.value == pytest.approx(4096, rel=1e-6)


def test_text_and_json(plan):
    found = plan.regimes("B")
    text = str(found)
    assert text.startswith("Regimes along B, now 4096\n") and "(here)" in text and "tensor parallel (W 100% of the work)" in text
    assert f"until B = {found.crossings[0].value:.6g}, between " in text and f"{found.points} plans, from one trace" in text
    told = found.to_json()
    assert [r["plan"] for r in told["regimes"]] == [r.summary for r in found.regimes]
    assert [c["value"] for c in told["crossings"]] == [c.value for c in found.crossings]
    assert "x (8): tensor parallel" in found.regimes[0].summary


def test_one_plan_may_be_the_best_throughout(plan):
    found = plan.regimes("g_x", 1e-11, 1.2e-11)
    assert len(found.regimes) == 1 and not found.crossings and found.regimes[0].low == 1e-11


@pytest.mark.parametrize(
    ("symbol", "span", "kind", "told"),
    [
        ("Q", (), ValueError, "along 'Q'; along B, F, W, n_x, g_x they can"),
        ("n_y", (), ValueError, "along 'n_y'"),
        (3, (), TypeError, "symbol must be a name"),
        ("B", (64, 32), ValueError, "the range of B must go from a positive number to a larger one, got 64 to 32"),
        ("B", (0, 32), ValueError, "the range of B"),
        ("B", (1, math.inf), ValueError, "the range of B"),
    ],
)
def test_what_is_asked_wrongly_is_told(plan, symbol, span, kind, told):
    with pytest.raises(kind, match=told):
        plan.regimes(symbol, *span)


def test_a_dimension_that_cannot_be_resized_is_told_why():
    plan = jaxplan.make_plan(lambda x: x[1:] * 2, f32(64, 8), mesh=AbstractMesh((4,), ("x",)), machine="v4", dims=["B F"])
    with pytest.raises(ValueError, match=r"B \(64\) is cut, padded or strided at slice"):
        plan.regimes("B")


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "regimemodel.py").write_text("import jax.numpy as jnp\ndef step(x, w):\n    return jnp.tanh(x @ w)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    line = ["regimemodel:step", "--mesh", "x=4", "--machine", "v4", "--spec", "f32[64,32],f32[32,8]"]
    assert cli.main(["regimes", "n_x", *line]) == 0
    assert capsys.readouterr().out.startswith("Regimes along n_x, now 4")
    assert cli.main(["regimes", "g_x", *line, "--from", "1e-11", "--to", "1e-9", "--json"]) == 0
    assert '"symbol": "g_x"' in capsys.readouterr().out
    assert cli.main(["regimes", "nothing", *line]) == 2
    assert "regimes cannot be looked for along 'nothing'" in capsys.readouterr().err
