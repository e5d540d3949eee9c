"""`plan.audit()`: true predictions matched, false ones caught, the CPU's dialect allowed for by rule."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P

import jaxplan
from jaxplan.compare import UNKNOWN, PlanAudit, compare, match, relative_error, sent_by_axis
from jaxplan.examples import programs
from jaxplan.hlo import Audit, Collective
from jaxplan.machine import Machine, machine
from jaxplan.plan import PlannedExchange


def cheap_links() -> Machine:
    """An accelerator whose links are so fast that splitting even small work pays."""
    given = machine("v4")
    inner, outer = (
        replace(link, seconds_per_byte=link.seconds_per_byte / 1000, latency_seconds=0.0) for link in (given.inner, given.outer)
    )
    return replace(given, name="v4 with fast links", inner=inner, outer=outer, matmul_reads={})


def mesh_of(*sizes: int) -> Mesh:
    return Mesh(np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes), tuple("xy"[: len(sizes)]))


@pytest.fixture(scope="module")
def plan() -> jaxplan.Plan:
    program = programs("small")["mlp_sgd"]
    return jaxplan.make_plan(program.fn, *program.args, mesh=mesh_of(4, 2), machine=cheap_links())


@pytest.fixture(scope="module")
def found(plan) -> PlanAudit:
    return plan.audit()


def statuses(found: PlanAudit) -> set[str]:
    return {row.status for row in found.exchanges}


# --- true predictions ---------------------------------------------------------------------------------------


def test_a_plan_is_compiled_as_predicted(plan, found):
    assert statuses(found) == {"matched"} and found.predicted_bytes > 0
    assert found.predicted == pytest.approx(found.compiled) and set(found.errors) == {"x", "y"}
    assert found.total("matched") == pytest.approx(sum(c.total_bytes for c in found.audit.normalised))
    assert found.largest_unplanned == 0
    assert found.compiled_peak_bytes == found.audit.peak_bytes > 0 and found.predicted_peak_bytes == plan.peak_bytes


def test_the_table(found):
    lines = str(found).splitlines()
    assert lines[0].startswith("train_step on mesh (x=4 x y=2)")
    body = lines[3 : 3 + len(found.exchanges)]
    for line, row in zip(body, found.exchanges, strict=True):
        shown = f"{row.compiled_bytes:,.0f}"
        assert line.split()[:5] == [row.status, row.kind, "+".join(row.axes), shown, shown]
        assert row.tensor in line and line.endswith(row.source)
    axes = [line.split() for line in lines if line.split()[:1] in (["x"], ["y"], ["all"])]
    assert [cells[0] for cells in axes] == ["x", "y", "all"] and all(cells[3] == "0.00%" for cells in axes)


def test_json(found):
    read = json.loads(found.to_json())
    assert read["exchanges"][0]["status"] == "matched" and read["mesh"] == {"x": 4, "y": 2}
    assert read["axes"]["x"]["compiled_bytes"] == found.compiled["x"] and abs(read["axes"]["x"]["error"]) < 1e-9
    assert read["audit"]["flops"] == found.audit.flops
    broken = replace(found, predicted={"x": 1.0}, compiled={"x": 0.0})
    assert json.loads(broken.to_json())["axes"]["x"]["error"] is None


def test_a_plan_without_devices_says_what_to_do():
    program = programs("small")["mlp_sgd"]
    abstract = jaxplan.make_plan(program.fn, *program.args, mesh=AbstractMesh((4, 2), ("x", "y")), machine=cheap_links())
    with pytest.raises(ValueError, match=r"AbstractMesh.*plan\.replan\(mesh=\.\.\.\)"):
        abstract.audit()
    assert statuses(abstract.replan(mesh=mesh_of(4, 2)).audit()) == {"matched"}


def test_arguments_of_every_sort_are_compiled_as_planned():
    """Keywords, static arguments, donated state."""

    def step(state, x, power, *, scale):
        return jax.tree.map(lambda s: s + scale * jnp.sum(x) ** power, state)

    args = {"w": jnp.ones((16, 8))}, jnp.ones((32, 8)), 2
    made = jaxplan.make_plan(
        step, *args, scale=jnp.float32(2), mesh=mesh_of(8), machine=cheap_links(), static_argnums=2, donate_argnums=0
    )
    found = made.audit()
    assert found.audit.alias_bytes > 0 and statuses(found) <= {"matched"}


def test_a_loop_that_does_not_say_how_long_it_runs_counts_as_planned():
    program = programs("small")["conjugate_gradient"]
    for trips in (10, 25):
        made = jaxplan.make_plan(program.fn, *program.args, mesh=mesh_of(8), machine=cheap_links(), while_trips=trips)
        found = made.audit()
        assert found.predicted_bytes > 0 and found.compiled == pytest.approx(found.predicted)
        assert any(f"counted as {trips}" in note for note in found.audit.unread)


@pytest.mark.parametrize("prevent_cse", [True, False])
def test_what_several_readers_ask_for_alike_is_one_exchange(prevent_cse):
    """Laid out in rows, read in columns three times; in the backward pass once more, in a rematerialised call."""
    mesh = mesh_of(8)

    def columns(x):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, "x")))

    def block(x):
        return jnp.sin(columns(jnp.tanh(columns(x))))

    def fn(x, w):
        def loss(w):
            rows = jax.lax.with_sharding_constraint(w * 2.0, NamedSharding(mesh, P("x", None)))
            again = jax.checkpoint(block, prevent_cse=prevent_cse)(rows)
            return (jnp.cos(columns(rows)) + jnp.exp(columns(rows)) + again).sum()

        value, gradient = jax.value_and_grad(loss)(w)
        return value, gradient * x

    found = planned(fn, jnp.ones((16, 64)), jnp.ones((16, 64)), pins={"x": P("x", None), "w": P("x", None)})
    assert statuses(found) == {"matched"}
    moves = [row.compiled_times for row in found.exchanges if row.kind == "all-to-all"]
    assert sum(moves) == 3  # forward, again for the call, and the gradient back


def test_no_partial_sum_is_scattered_over_two_dimensions_at_once():
    w, x, g = jnp.ones((16, 8)), jnp.ones((64, 16)), jnp.ones((64, 8))
    pins = {"w": P("x", "y"), "x": P(("x", "y"), None), "g": P(("x", "y"), None)}
    found = planned(lambda w, x, g: jnp.sin(w) * (x.T @ g), w, x, g, pins=pins, sizes=(4, 2))
    assert statuses(found) == {"matched"}
    assert [(row.kind, row.axes) for row in found.exchanges] == [("reduce-scatter", ("x", "y")), ("all-to-all", ("y",))]
    assert found.compiled_bytes == 7 / 8 * 16 * 8 * 4 + 16 * 8 * 4 / 4 / 4


# --- false predictions --------------------------------------------------------------------------------------


def exchanges(plan: jaxplan.Plan, *changed) -> jaxplan.Plan:
    """The same plan, saying that it expects other exchanges."""
    lying = replace(plan)
    lying.__dict__["exchanges"] = changed
    return lying


def test_an_exchange_that_is_left_out_is_unplanned(plan, found):
    first, *rest = plan.exchanges
    lie = compare(exchanges(plan, *rest), found.audit)
    (row,) = [row for row in lie.exchanges if row.status == "unplanned"]
    assert row.compiled_bytes == pytest.approx(first.total_bytes) and row.predicted_times == 0
    assert lie.largest_unplanned == pytest.approx(first.total_bytes / found.compiled_bytes)
    assert sum(abs(lie.predicted[axis] - found.predicted[axis]) for axis in "xy") == pytest.approx(first.total_bytes)
    assert max(lie.errors.values()) > 0.1 and "unplanned" in str(lie)


def test_an_exchange_that_never_happens_is_missing(plan, found):
    invented = replace(plan.exchanges[0], axes=("y",), wire_bytes={"y": 4096.0}, kind="all_to_all")
    lie = compare(exchanges(plan, *plan.exchanges, invented), found.audit)
    (row,) = [row for row in lie.exchanges if row.status == "missing"]
    assert (row.kind, row.axes, row.predicted_bytes, row.compiled_times) == ("all-to-all", ("y",), 4096 * invented.times, 0)
    assert lie.errors["y"] > 0.1


def test_an_exchange_of_other_bytes_differs(plan, found):
    first, *rest = plan.exchanges
    doubled = replace(first, wire_bytes={axis: 2 * sent for axis, sent in first.wire_bytes.items()})
    lie = compare(exchanges(plan, doubled, *rest), found.audit)
    (row,) = [row for row in lie.exchanges if row.status == "differs"]
    assert row.predicted_bytes == pytest.approx(2 * row.compiled_bytes)


def test_an_exchange_over_another_axis_is_missing_there_and_unplanned_here(plan, found):
    first = next(e for e in plan.exchanges if e.axes == ("x",))
    rest = [e for e in plan.exchanges if e is not first]
    moved = replace(first, axes=("y",), wire_bytes={"y": first.wire_bytes["x"]})
    lie = compare(exchanges(plan, moved, *rest), found.audit)
    assert {"missing", "unplanned"} <= statuses(lie)


def test_an_exchange_that_runs_more_often_is_left_over(plan, found):
    first, *rest = plan.exchanges
    lie = compare(exchanges(plan, replace(first, times=3 * first.times), *rest), found.audit)
    assert lie.total("missing") == pytest.approx(2 * first.total_bytes)


def test_a_wrong_formula_in_the_cost_model_is_caught(plan, monkeypatch):
    """The audit has no part in `cost`: a mistake there shows."""
    from jaxplan.cost import exchange

    right = exchange.all_gather_bytes
    monkeypatch.setattr(exchange, "all_gather_bytes", lambda n, nbytes: right(n, nbytes) * n / (n - 1))
    lying = replace(plan)
    assert max(lying.audit().errors.values()) > 0.05
    assert "differs" in statuses(lying.audit())


def test_constraints_that_are_not_emitted_are_caught(plan):
    silent = replace(plan)
    silent.__dict__["constraints"] = replace(plan.constraints, reads={}, writes={}, outputs={})
    assert statuses(silent.audit()) != {"matched"}


# --- the CPU's dialect --------------------------------------------------------------------------------------


def planned(fn, *args, pins, sizes=(8,)) -> PlanAudit:
    return jaxplan.make_plan(fn, *args, mesh=mesh_of(*sizes), machine=cheap_links(), pins=pins).audit()


@pytest.mark.parametrize(("dtype", "size"), [(jnp.bfloat16, 2), (jnp.float32, 4)])
def test_an_f32_all_reduce_for_bf16_counts_as_bf16(dtype, size):
    x, w = jnp.ones((3, 64), dtype), jnp.ones((64, 5), dtype)
    found = planned(lambda x, w: x @ w, x, w, pins={"x": P(None, "x"), "w": P("x", None)})
    (row,) = found.exchanges
    assert (row.status, row.kind, row.compiled_bytes) == ("matched", "all-reduce", 2 * 7 / 8 * 15 * size)
    if jax.default_backend() == "cpu":
        assert found.audit.total_wire_bytes == 2 * 7 / 8 * 15 * 4  # as compiled


def test_an_all_reduce_and_a_slice_for_a_reduce_scatter():
    def fn(x, w, y):
        return jnp.sin(x @ w) * y

    x, w, y = jnp.ones((16, 64)), jnp.ones((64, 8)), jnp.ones((16, 8))
    found = planned(fn, x, w, y, pins={"x": P(None, "x"), "w": P("x", None), "y": P("x", None)})
    rows = [row for row in found.exchanges if row.kind == "reduce-scatter"]
    assert [(row.status, row.compiled_bytes) for row in rows] == [("matched", 7 / 8 * 16 * 8 * 4)]
    if jax.default_backend() == "cpu":
        assert found.audit.by_kind()["all-reduce"] == 2 * 7 / 8 * 16 * 8 * 4


def test_merged_all_reduces_are_matched_one_by_one():
    def fn(x):
        return x.sum(0), jnp.sin(x).max(), jnp.cos(x).sum(0)[:, None]

    found = planned(fn, jnp.ones((64, 3)), pins={"x": P("x", None)})
    assert statuses(found) == {"matched"}
    assert sum(row.compiled_times for row in found.exchanges) == 3
    assert len(found.audit.collectives) < 3  # they are merged


def test_what_is_sent_in_one_piece_is_the_same_as_in_parts():
    """Planned for each of three layers, at no line that JAX knows, and compiled for a stack of them."""
    planned = PlannedExchange("all_gather", ("x",), {"x": 64.0}, 3.0, (2, 8), "float32", "pipeline", "")
    stacked, other = (
        Collective("all-gather", sent, sent, 1, 4, ("x",), "f32", "f32[3,2,8]", "a.py:1", "", True) for sent in (192.0, 128.0)
    )
    assert [row.status for row in match([planned], [stacked])] == ["matched"]
    assert sorted(row.status for row in match([planned], [other])) == ["missing", "unplanned"]
    assert sorted(row.status for row in match([planned], [stacked, stacked])) == ["matched", "unplanned"]


# --- parts --------------------------------------------------------------------------------------------------


def collective(kind: str = "all-reduce", axes: tuple[str, ...] = ("x", "y"), wire: float = 1.0) -> Collective:
    return Collective(kind, wire, wire, 1, 8, axes, "f32", "f32[2]", "a.py:1", "", True)


def test_the_slower_axis_carries_what_the_faster_ones_have_reduced():
    sizes, slow_first = {"x": 4, "y": 2}, ["x", "y"]
    split = sent_by_axis(collective(wire=7 / 8), sizes, slow_first)
    assert split == pytest.approx({"y": 1 / 2, "x": 3 / 4 / 2})
    split = sent_by_axis(collective("all-to-all", wire=7 / 8), sizes, slow_first)
    assert split == pytest.approx({"x": 3 / 4, "y": 1 / 2 / 4})
    assert sent_by_axis(collective("collective-permute"), sizes, slow_first) == {"x": 1.0}
    assert sent_by_axis(collective(axes=()), sizes, slow_first) == {UNKNOWN: 1.0}


def test_a_collective_over_unknown_axes_is_unplanned_and_has_a_row(plan):
    found = compare(exchanges(plan), Audit((), (collective(axes=(), wire=5.0),), 0.0))
    (row,) = found.exchanges
    assert row.status == "unplanned" and found.compiled[UNKNOWN] == 5 and found.errors[UNKNOWN] == 1
    assert found.largest_unplanned == 1


def test_nothing_predicted_and_nothing_compiled_agree():
    assert match((), ()) == ()
    assert (relative_error(0, 0), relative_error(1, 0), relative_error(3, 2)) == (0, math.inf, 0.5)
