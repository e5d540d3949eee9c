"""Plans at other sizes from one trace: what planning anew gives, or a refusal that says why."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec as P

import jaxplan
from jaxplan.examples import programs
from jaxplan.machine import machine
from jaxplan.resize import CannotResize, suspicious

MESH = AbstractMesh((4, 2), ("x", "y"))
PROGRAMS = programs("small")


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def same(plan, fresh):
    """Whether two plans are one, to the last digit."""
    assert [tuple(a.shape) for a in plan.traced.in_avals] == [tuple(a.shape) for a in fresh.traced.in_avals]
    assert [tuple(a.shape) for a in plan.traced.out_avals] == [tuple(a.shape) for a in fresh.traced.out_avals]
    told = (plan.seconds, plan.wire_bytes, plan.peak_bytes, plan.in_specs, plan.out_specs, plan.ledger.by_kind)
    return told == (fresh.seconds, fresh.wire_bytes, fresh.peak_bytes, fresh.in_specs, fresh.out_specs, fresh.ledger.by_kind)


def anew(fn, plan):
    """`fn` traced and planned for the shapes of a plan."""
    args, kwargs = plan.traced.unflatten_inputs(plan.traced.in_avals)
    request = plan.request
    options = {"mesh": request.mesh, "machine": request.machine, "pins": request.pins}
    return jaxplan.make_plan(fn, *args, **kwargs, **options, pipeline=request.pipeline)


@pytest.fixture(scope="module")
def planned():
    """{program: its plan}, made when first asked for."""
    made = {}

    def plan_of(name):
        if name not in made:
            made[name] = jaxplan.make_plan(PROGRAMS[name].fn, *PROGRAMS[name].args, mesh=MESH, machine="v4")
        return made[name]

    return plan_of


def at(plan, path, dim):
    """The name of one dimension of an input."""
    return plan.names.dimension(plan.modelled.graph.inputs[plan.traced.in_paths.index(path)])[dim]


DIMENSIONS = {
    "batch and width of an MLP": ("mlp_sgd", [("x", 0), ("x", 1), ("params/0/b", 0)]),
    "batch and sequence of a decoder": ("decoder_scan", [("batch/tokens", 0), ("batch/tokens", 1)]),
    "width, layers, vocabulary": ("decoder_scan", [("params/final_scale", 0), ("params/blocks/wq", 0), ("params/embedding", 0)]),
    "heads and their width": ("decoder_scan", [("params/blocks/wq", 2), ("params/blocks/wq", 3)]),
    "the perceptron of an unrolled decoder": ("decoder_unrolled", [("params/blocks/0/w_up", 1), ("batch/tokens", 0)]),
    "batch and channels of a ResNet": ("resnet_momentum", [("images", 0), ("images", 3), ("params/blocks/0/conv1", 2)]),
    "batch and width of a decode step": ("decode_kv", [("token", 0), ("params/final_scale", 0), ("params/blocks/w_up", 2)]),
    "the unknowns of conjugate gradients": ("conjugate_gradient", [("b", 0)]),
}
QUICK = ("batch and width of an MLP", "batch and width of a decode step", "the unknowns of conjugate gradients")


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in DIMENSIONS])
def test_every_point_of_a_grid_is_what_planning_anew_gives(planned, case):
    name, places = DIMENSIONS[case]
    plan = planned(name)
    names = [at(plan, path, dim) for path, dim in places]
    extents = [plan.traced.in_avals[plan.traced.in_paths.index(path)].shape[dim] for path, dim in places]
    grid = itertools.product((1, 2, 3), repeat=len(places)) if len(places) < 3 else [(2, 1, 3), (3, 2, 1), (1, 3, 2), (6, 6, 6)]
    for scales in grid:
        sizes = {name: extent * scale for name, extent, scale in zip(names, extents, scales, strict=True)}
        found = plan.replan(sizes=sizes)
        for (path, dim), size in zip(places, sizes.values(), strict=True):
            assert found.traced.in_avals[plan.traced.in_paths.index(path)].shape[dim] == size
        assert same(found, anew(PROGRAMS[name].fn, found)), sizes


def test_a_point_of_a_decoder(planned):
    plan = planned("decoder_scan")
    found = plan.replan(sizes={at(plan, "batch/tokens", 0): 48, at(plan, "params/final_scale", 0): 40})
    assert same(found, anew(PROGRAMS["decoder_scan"].fn, found))


# --- what follows what -----------------------------------------------------------------------------------------------


def step(params, x):
    def loss(params):
        return jnp.mean(jnp.square(jax.nn.relu(x @ params["up"]) @ params["down"] - x))

    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))


ARGS = {"up": f32(256, 1024), "down": f32(1024, 256)}, f32(512, 256)


@pytest.fixture(scope="module")
def plan():
    return jaxplan.make_plan(step, *ARGS, mesh=MESH, machine="v4", dims={"x": "B F", "params/up": "F W"})


def test_names_are_those_of_the_plan_and_of_dims(plan):
    found = plan.replan(sizes={"B": 64, "W": 96})
    assert [a.shape for a in found.traced.in_avals] == [(96, 256), (256, 96), (64, 256)] and same(found, anew(step, found))
    assert "float32[64,256]" in str(found) and "float32[64,256]" in str(found.explain("x"))


def test_sizes_and_all_else_may_change_together_and_one_after_the_other(plan):
    other = AbstractMesh((2, 8), ("x", "y"))
    pins = {"params/up": P("x", None)}
    once = plan.replan(sizes={"B": 64, "W": 96}, mesh=other, machine="a100", pins=pins)
    thrice = plan.replan(sizes={"B": 32}).replan(mesh=other, machine="a100", pins=pins).replan(sizes={"B": 64, "W": 96})
    assert same(once, thrice) and same(once, anew(step, once)) and once.in_specs[0]["up"] == P("x")
    back = once.replan(sizes={"B": 512, "W": 1024}, mesh=MESH, machine="v4", pins={})
    assert same(back, plan) and not back.request.sizes


def test_the_same_sizes_are_the_same_program(plan):
    assert plan.replan(sizes={"B": 512}).modelled.graph is plan.modelled.graph
    assert plan.replan(sizes={}).seconds == plan.seconds


def test_a_plan_at_other_sizes_is_not_run_audited_or_saved(plan, tmp_path):
    found = plan.replan(sizes={"B": 64})
    for verb, call in (("run", found.jit), ("audited", found.audit), ("saved", lambda: found.save(tmp_path / "plan.json"))):
        with pytest.raises(ValueError, match=f"derived for B=64 from a trace of other shapes, .* not {verb}: call make_plan"):
            call()
    assert not list(tmp_path.iterdir())


def test_what_is_named_or_sized_wrongly_is_told(plan):
    for sizes, kind, told in [
        ({"Q": 4}, ValueError, "sizes names the dimension 'Q'; its inputs have B=512, F=256, W=1024"),
        ({"B": 0}, ValueError, r"sizes\['B'\] must be a whole number of at least 1, got 0"),
        ({"B": 8.0}, ValueError, "must be a whole number of at least 1, got 8.0"),
        ({"B": True}, ValueError, "must be a whole number"),
        ([("B", 8)], TypeError, "sizes must be {name: extent}"),
        ({"B": 1}, CannotResize, "a dimension of one element is broadcast"),
    ]:
        with pytest.raises(kind, match=told):
            plan.replan(sizes=sizes)


MASK = np.tril(np.ones((16, 16), np.float32))


def counted(x):
    return jax.lax.fori_loop(0, 16, lambda _, y: jnp.tanh(y), x)


def counted_while(x):
    return jax.lax.while_loop(lambda s: s[0] < 16, lambda s: (s[0] + 1, jnp.tanh(s[1])), (0, x))[1]


def capacity(x):
    return jax.nn.one_hot(jnp.argmax(x, axis=1), x.shape[0] // 4)


def free_sum(x):
    return x.sum() + jnp.cumsum(jnp.ones((x.shape[0] // 2,))).sum()


def by_hand(x):
    mesh = AbstractMesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(lambda y: y * 2, mesh=mesh, in_specs=P("x"), out_specs=P("x"))(x)


REFUSALS = {
    "cut at its end": (lambda x: x[:-1] + 1.0, r"cut, padded or strided at slice at test_resize.py:\d+"),
    "every other element": (lambda x: jnp.sin(x[::2]), "cut, padded or strided at slice"),
    "padded": (lambda x: jnp.pad(x, ((1, 1), (0, 0))), "cut, padded or strided at pad"),
    "joined with itself": (lambda x: jnp.concatenate([x, x]), "cut, padded or strided at concatenate"),
    "rolled": (lambda x: jnp.roll(x, 3, axis=0), "turned round at roll"),
    "rolled by all of it": (lambda x: jnp.roll(x, 16, axis=0) * 2, "turned round at roll"),
    "split in two dimensions": (lambda x: x.reshape(4, 4, 32).sum(axis=0), r"cut into parts.*reshape at test_resize.py:\d+"),
    "beside an array constant": (lambda x: MASK @ x, "an array constant that dot_general .* reads has"),
    "a loop as long as it": (counted, r"the loop at test_resize.py:\d+ runs 16 times"),
    "a while loop as long as it": (counted_while, r"the loop at test_resize.py:\d+ runs 16 times"),
    "a number reckoned from it": (capacity, r"iota at .* has a dimension of 4 that no input has: whether it is reckoned from"),
    "a length reckoned from it": (free_sum, r"has a dimension of 8 that no input has"),
    "its first few": (lambda x: jax.lax.dynamic_slice(x, (jnp.int32(2), jnp.int32(0)), (4, 32)), "dynamic_slice"),
    "inside a shard_map": (by_hand, "goes into or out of a shard_map"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_trace_does_not_tell_is_refused(case):
    fn, told = REFUSALS[case]
    found = jaxplan.make_plan(fn, f32(16, 32), mesh=AbstractMesh((4,), ("x",)), machine="v4", dims=["B F"])
    with pytest.raises(CannotResize, match=told) as caught:
        found.replan(sizes={"B": 64})
    assert re.search(r"[Tt]race (the other sizes|that|them) anew", str(caught.value)), "it says what to do"


def test_a_dimension_that_is_cut_unevenly_is_refused():
    mesh = AbstractMesh((2,), ("x",))
    found = jaxplan.make_plan(lambda x: x.reshape(4, 6) + 1.0, f32(6, 4), mesh=mesh, machine="v4", dims=["B F"])
    with pytest.raises(CannotResize, match=r"B \(6\) is cut into parts"):
        found.replan(sizes={"B": 12})


def positions(x, table):
    return x + table[: x.shape[0]]


ALLOWED = {
    "merged and taken apart again": lambda x: x.reshape(-1).reshape(x.shape) * 2,
    "merged into one": lambda x: jnp.sin(x).reshape(-1).sum(),
    "a mask made from the shape": lambda x: jnp.where(jnp.tril(jnp.ones((x.shape[0],) * 2, bool)), x @ x.T, 0.0),
    "a mean": lambda x: (x - x.mean(axis=0, keepdims=True)) / x.shape[0],
    "a scan over it": lambda x: jax.lax.scan(lambda c, row: (c + row, c.sum()), jnp.zeros(32), x),
    "a loop that counts otherwise": lambda x: jax.lax.fori_loop(0, 10, lambda _, y: jnp.tanh(y), x),
    "both branches of a cond": lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y.T, lambda y: y @ jnp.ones_like(y).T, x),
    "rows looked up": lambda x: x[jnp.argsort(x[:, 0])],
    "sorted": lambda x: jnp.sort(x, axis=0),
    "factored": lambda x: jnp.linalg.cholesky(x @ x.T + jnp.eye(x.shape[0])),
    "heads of another dimension": lambda x: jnp.tanh(x.reshape(x.shape[0], 8, 4)).sum(axis=(1, 2)),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_what_the_trace_tells_is_followed(case):
    fn = ALLOWED[case]
    found = jaxplan.make_plan(fn, f32(16, 32), mesh=AbstractMesh((4,), ("x",)), machine="v4", dims=["B F"])
    for rows in (8, 24, 64):
        resized = found.replan(sizes={"B": rows})
        assert same(resized, anew(fn, resized)), rows


def test_the_first_rows_of_a_longer_table_follow():
    args = f32(16, 32), f32(100, 32)
    found = jaxplan.make_plan(positions, *args, mesh=AbstractMesh((4,), ("x",)), machine="v4", dims=["B F", None])
    resized = found.replan(sizes={"B": 64})
    assert same(resized, anew(positions, resized))
    with pytest.raises(CannotResize, match="is of a dimension of 100, and would take all"):
        found.replan(sizes={"B": 100})


def test_numbers_that_may_be_reckoned_from_an_extent():
    assert all(suspicious(n, [16]) for n in (15, 16, 17, 32, 8, 4, 48))
    assert not any(suspicious(n, [16]) for n in (1, 0, 10, 18, 24, 100))


def layered(written_out):
    """A step down the gradient of layers, stacked or one after another; shapes of parameters, rows."""

    def step(params, x):
        def loss(params):
            first, layers = params
            h = x @ first
            if written_out:
                for w in layers:
                    h = jnp.tanh(h @ w)
            else:
                h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, layers)[0]
            return jnp.mean(jnp.square(h))

        return jax.tree.map(lambda w, g: w - jnp.float32(0.1) * g, params, jax.grad(loss)(params))

    return step, lambda rows, width: (
        (f32(24, width), [f32(width, width)] * 4 if written_out else f32(4, width, width)), f32(rows, 24)
    )  # fmt: skip


@pytest.mark.parametrize("written_out", [False, True])
def test_pipelines_are_looked_for_at_other_sizes(written_out):
    """And are those of a trace of these sizes: also in a number of micro-batches that does not divide the batch as it was traced,
    and where nobody insists on one."""
    step, shapes = layered(written_out)
    slow = machine("a100").with_axis("y", machine("a100").inner.slower(50))
    asked = {"mesh": MESH, "machine": slow, "dims": {"params/0": "K D", "x": "B K"}}
    plan = jaxplan.make_plan(step, *shapes(32, 16), **asked, pipeline="y")
    for rows, width, options in ((64, 16, {}), (36, 16, {"microbatches": 12}), (64, 16, {"pipeline": "auto"})):
        there = plan.replan(sizes={"B": rows, "D": width}, **options)
        fresh = jaxplan.make_plan(step, *shapes(rows, width), **{**asked, "pipeline": "y", **options})
        assert (there.pipeline is None) == (fresh.pipeline is None) == ("pipeline" in options)
        if fresh.pipeline is not None:
            same = [(p.microbatches, p.schedule, p.middle, p.chains) for p in (there.pipeline, fresh.pipeline)]
            assert same[0] == same[1]
        assert there.seconds == pytest.approx(fresh.seconds, rel=1e-12) and there.in_specs == fresh.in_specs
        assert (there.peak_bytes, there.wire_bytes) == (fresh.peak_bytes, fresh.wire_bytes)
    with pytest.raises(ValueError, match="does not divide the batch of 36 rows"):
        plan.replan(sizes={"B": 36}, microbatches=8)


def test_other_numbers_of_layers_are_other_stages():
    step, shapes = layered(False)
    asked = {"mesh": MESH, "machine": "v4", "pipeline": "y", "microbatches": 4, "dims": {"params/1": "L _ _"}}
    (first, layers), x = shapes(32, 16)
    plan = jaxplan.make_plan(step, (first, layers), x, **asked).replan(sizes={"L": 7})
    fresh = jaxplan.make_plan(step, (first, f32(7, 16, 16)), x, **asked)
    assert plan.pipeline.chains[0].layers == fresh.pipeline.chains[0].layers and sum(plan.pipeline.chains[0].layers) == 7
    assert plan.seconds == pytest.approx(fresh.seconds, rel=1e-12) and plan.peak_bytes == fresh.peak_bytes


def test_unlike_stages_at_other_sizes_are_refused():
    def step(params, x):
        def loss(params):
            wide, narrow, last = params
            return jnp.mean((jnp.tanh(jax.nn.gelu(x @ wide) @ narrow) @ last) ** 2)

        return jax.tree.map(lambda w, g: w - jnp.float32(0.1) * g, params, jax.grad(loss)(params))

    args = (f32(8, 32), f32(32, 16), f32(16, 8)), f32(16, 8)
    plan = jaxplan.make_plan(step, *args, mesh=MESH, machine="v4", pipeline="y", microbatches=4, dims=[None, "B _"])
    assert isinstance(plan, jaxplan.api.StagedPlan)
    with pytest.raises(ValueError, match="At other sizes than traced: call make_plan with arguments of these shapes"):
        plan.replan(sizes={"B": 64})
