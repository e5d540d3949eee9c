"""The audit against real compiles on simulated devices, and against snippets of other backends' dialects."""

import functools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from jaxplan import hlo

NARROW = jnp.bfloat16


def make_mesh(**axes: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(tuple(axes.values())), tuple(axes))


def spec(mesh: Mesh, shape: tuple[int, ...], *axes, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))


def audit(mesh: Mesh, fn, out, *args) -> hlo.Audit:
    return hlo.audit(jax.jit(fn, out_shardings=NamedSharding(mesh, out)), *args)


def only(records) -> hlo.Collective:
    (record,) = records
    return record


# --- compiled on CPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis, n", [("x", 4), ("y", 2), (("x", "y"), 8)])
def test_contraction_over_a_sharded_dimension_is_an_all_reduce(axis, n):
    mesh = make_mesh(x=4, y=2)
    found = audit(
        mesh, lambda x, w: x @ w, P(), spec(mesh, (16, 64), None, axis), spec(mesh, (64, 32), axis, None)
    )
    c = only(found.collectives)
    assert (c.kind, c.axes, c.group_size) == ("all-reduce", (axis,) if isinstance(axis, str) else axis, n)
    assert (c.payload_bytes, c.wire_bytes, c.times, c.exact) == (2048, 2 * (n - 1) / n * 2048, 1, True)
    assert c.source.startswith("test_hlo.py:") and "dot_general" in c.op_name
    assert found.flops == 2 * 16 * 64 * 32 / n
    assert found.total_wire_bytes == c.wire_bytes == found.wire_bytes()[axis]
    assert (
        found.peak_bytes
        == found.argument_bytes + found.output_bytes + found.temp_bytes - found.alias_bytes
        > 0
    )
    assert not found.unread


@pytest.mark.parametrize("axes", [("a",), ("b",), ("c",), ("a", "c"), ("b", "c"), ("a", "b", "c")])
def test_axes_of_a_mesh_of_three(axes):
    mesh = make_mesh(a=2, b=2, c=2)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    def fn(x):
        return jax.lax.psum(x, axes)

    c = only(hlo.audit(fn, jax.ShapeDtypeStruct((4, 4), jnp.float32), mesh=mesh).collectives)
    assert c.axes == axes and c.group_size == 2 ** len(axes)


@pytest.mark.parametrize("axes", [("a",), ("b",), ("c",)])
def test_axes_of_a_permute(axes):
    mesh = make_mesh(a=2, b=2, c=2)
    fn = jax.shard_map(
        lambda x: jax.lax.ppermute(x, axes, [(0, 1), (1, 0)]),
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
        check_vma=False,
    )
    c = only(hlo.audit(jax.jit(fn), jax.ShapeDtypeStruct((4, 4), jnp.float32), mesh=mesh).collectives)
    assert (c.kind, c.axes, c.wire_bytes, c.group_size) == ("collective-permute", axes, 64, 2)


def test_a_mesh_of_explicit_axes():
    mesh = jax.make_mesh((4, 2), ("x", "y"), devices=jax.devices()[:8])
    out = NamedSharding(mesh, P(None, "y"))
    x, w = spec(mesh, (16, 64), None, "x"), spec(mesh, (64, 32), "x", "y")
    c = only(hlo.audit(jax.jit(lambda x, w: jnp.dot(x, w, out_sharding=out)), x, w).collectives)
    assert (c.kind, c.axes, c.payload_bytes) == ("all-reduce", ("x",), 16 * 16 * 4)


def layers(x, w):
    return jax.lax.scan(lambda h, wl: (jnp.tanh(h @ wl), None), x, w)[0]


def test_gather_of_parameters_within_a_loop():
    mesh = make_mesh(x=4, y=2)
    args = spec(mesh, (16, 64), "x"), spec(mesh, (5, 64, 64), None, "x")
    c = only((found := audit(mesh, layers, P("x"), *args)).collectives)
    assert (c.kind, c.axes, c.times, c.payload_bytes) == ("all-gather", ("x",), 5, 64 * 64 * 4)
    assert found.wire_bytes() == {"x": 5 * 3 / 4 * 64 * 64 * 4} == {"x": found.by_kind()["all-gather"]}
    assert found.flops == 5 * 2 * 4 * 64 * 64


def test_nested_loops_multiply():
    mesh = make_mesh(x=4, y=2)

    def nested(x, w):
        return jax.lax.scan(lambda h, _: (layers(h, w), None), x, None, length=3)[0]

    args = spec(mesh, (16, 64), "x"), spec(mesh, (5, 64, 64), None, "x")
    c = only((found := audit(mesh, nested, P("x"), *args)).collectives)
    assert c.times == 15 and c.exact and found.flops == 15 * 2 * 4 * 64 * 64


def test_reshard_is_an_all_to_all():
    mesh = make_mesh(x=4, y=2)
    c = only((found := audit(mesh, jnp.sin, P(None, "x"), spec(mesh, (16, 64), "x"))).collectives)
    assert (c.kind, c.axes, c.payload_bytes, c.wire_bytes) == ("all-to-all", ("x",), 1024, 768)
    assert len(found.normalised) == 1  # its tuple holds the slices for the peers: no combination


def test_roll_is_a_permute_of_its_slab():
    mesh = make_mesh(x=4, y=2)
    c = only(audit(mesh, lambda x: jnp.roll(x, 1, 0), P("x"), spec(mesh, (16, 64), "x")).collectives)
    assert (c.kind, c.axes, c.wire_bytes, c.group_size) == ("collective-permute", ("x",), 256, 4)


def test_combined_gradients_split_into_their_elements():
    mesh = make_mesh(x=4, y=2)

    def loss(w, x):
        return jnp.tanh(x @ w["a"] + w["b"][None]).mean()

    w = {"a": spec(mesh, (64, 32)), "b": spec(mesh, (32,))}
    found = hlo.audit(jax.jit(jax.grad(loss)), w, spec(mesh, (16, 64), ("x", "y")))
    assert only(found.collectives).payload_bytes == (64 * 32 + 32) * 4
    assert sorted(c.payload_bytes for c in found.normalised) == [32 * 4, 64 * 32 * 4]
    assert {c.axes for c in found.normalised} == {("x", "y")}
    assert sum(found.by_kind(normalised=True).values()) == found.total_wire_bytes


def test_conditional_counts_the_branch_that_moves_most():
    mesh = make_mesh(x=4, y=2)

    def fn(x, p):
        return jax.lax.cond(p, lambda x: jnp.sum(x, 0)[None] + x, lambda x: x.max() + x, x)

    found = audit(mesh, fn, P("x"), spec(mesh, (16, 64), "x"), jax.ShapeDtypeStruct((), jnp.bool_))
    assert only(found.collectives).shape == "f32[64]"


def test_unknown_trip_count_is_marked():
    mesh = make_mesh(x=4, y=2)

    def fn(x):
        return jax.lax.while_loop(lambda c: c[0] < c[1].sum(), lambda c: (c[0] + 1, c[1] * 2), (0.0, x))

    found = hlo.audit(jax.jit(fn), spec(mesh, (16, 64), "x", "y"))
    assert found.collectives and not any(c.exact for c in found.collectives)
    assert "trip count" in found.unread[0]


# --- normalising the CPU's dialect ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, size", [(jnp.float32, 4), (NARROW, 2)])
def test_all_reduce_then_slice_is_a_reduce_scatter(dtype, size):
    mesh = make_mesh(x=4, y=2)
    x, w = spec(mesh, (16, 64), None, "x", dtype=dtype), spec(mesh, (64, 32), "x", None, dtype=dtype)
    found = audit(mesh, lambda x, w: jnp.sin(x @ w), P("x", None), x, w)
    if found.collectives[0].kind == "reduce-scatter":
        pytest.skip("this backend writes reduce-scatter itself")
    c = only(found.normalised)
    assert (c.kind, c.axes, c.payload_bytes) == ("reduce-scatter", ("x",), 16 * 32 * size)
    assert c.wire_bytes == 3 / 4 * 16 * 32 * size and "slice" in c.rewritten


def test_audit_has_tables_printed_that_as_text_elides():
    table = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3], np.int32)
    compiled = jax.jit(lambda x: x * table).lower(jnp.ones(16, jnp.int32)).compile()
    assert "constant({...})" in compiled.as_text()
    assert re.search(r"constant\(\{3, 1, 4, .*9, 3\}\)", hlo._text(compiled))


def test_an_elided_table_of_offsets_is_not_guessed():
    found = hlo.read_hlo(scatter_text(offsets="..."))
    assert found.normalised[0].kind == "all-reduce" and "offsets" in found.unread[0]


@pytest.mark.parametrize("dtype, narrowed", [(NARROW, True), (jnp.float32, False)])
def test_widened_collectives_count_the_bytes_of_bf16(dtype, narrowed):
    mesh = make_mesh(x=4, y=2)

    def fn(x):
        return (
            jax.lax.psum(x * 2, "x") + 1,
            jax.lax.psum_scatter(x * 3, "x", tiled=True) + 1,
            jax.lax.all_gather(x * 4, "y", tiled=True) + 1,
            jax.lax.all_to_all(x * 5, "x", 0, 1, tiled=True) + 1,
            jax.lax.ppermute(x * 6, "x", [(0, 1), (1, 0)]) + 1,
        )

    mapped = jax.shard_map(fn, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    found = hlo.audit(jax.jit(mapped), jax.ShapeDtypeStruct((64, 64), dtype), mesh=mesh)
    tensor = 64 * 64 * (2 if narrowed else 4)
    payloads = {c.kind: (c.payload_bytes, c.dtype) for c in found.normalised}
    name = "bf16" if narrowed else "f32"
    assert payloads == {
        "all-reduce": (tensor, name),
        "reduce-scatter": (tensor, name),
        "all-gather": (2 * tensor, name),
        "all-to-all": (tensor, name),
        "collective-permute": (tensor, name),
    }


# --- other dialects, as text ------------------------------------------------------------------------------

ADD = "%add (x: f32[], y: f32[]) -> f32[] {\n  %x = f32[] parameter(0)\n  %y = f32[] parameter(1)\n"
ADD += "  ROOT %s = f32[] add(%x, %y)\n}\n\n"


def module(*body: str, before: str = "", partitions: int = 8) -> str:
    lines = "".join(f"  {line}\n" for line in body)
    head = f"HloModule m, num_partitions={partitions}\n\n{ADD}{before}"
    return f"{head}ENTRY %main (p: f32[16,8]) -> f32[16,8] {{\n{lines}}}\n"


def all_reduce(groups: str, extra: str = ", channel_id=1, use_global_device_ids=true") -> str:
    return module(
        "%p = f32[16,8]{1,0} parameter(0)",
        f"ROOT %ar = f32[16,8]{{1,0}} all-reduce(%p), replica_groups={groups}{extra}, to_apply=%add",
    )


@pytest.mark.parametrize(
    "groups, axes, n",
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("y",), 2),
        ("{{0,2,4,6},{1,3,5,7}}", ("x",), 4),
        ("{}", ("x", "y"), 8),
        ("[1,8]<=[8]", ("x", "y"), 8),
        ("[4,2]<=[8]", ("y",), 2),
        ("[2,4]<=[4,2]T(1,0)", ("x",), 4),
        ("mesh['x'=4,'y'=2] {'x'}", ("x",), 4),
        ("mesh['axis_0'=1,'axis_1'=4,'axis_2'=2] {'axis_1'}", ("x",), 4),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ("x",), 4),
        ("mesh['a'=8], device_ids=(0,2,4,6,1,3,5,7) {'a':(2)4}", ("x",), 4),
        ("mesh['a'=8] {'a':(4)2}", ("y",), 2),
        ("mesh['a'=8] {'a':(1)4}", ("x",), 4),
        ("@mesh<a=4,b=2> {a,b}", ("x", "y"), 8),
        ("{{0,1,2,3},{4,5,6,7}}", (), 4),  # half of axis x: no axis spans it
    ],
)
def test_notations_of_replica_groups(groups, axes, n):
    found = hlo.read_hlo(all_reduce(groups), {"x": 4, "y": 2})
    c = only(found.collectives)
    assert (c.axes, c.group_size, c.wire_bytes) == (axes, n, 2 * (n - 1) / n * 512)
    assert bool(found.unread) == (not axes)


def test_replica_groups_without_a_channel_speak_of_replicas():
    assert only(hlo.read_hlo(all_reduce("{{0}}", "")).collectives).wire_bytes == 0
    assert only(hlo.read_hlo(all_reduce("{{0}}", ", channel_id=1")).collectives).group_size == 8


def test_asynchronous_pairs_count_once():
    text = module(
        "%p = f32[16,8]{1,0:T(8,128)} parameter(0)",
        "%ags = (f32[16,8]{1,0:T(8,128)}, f32[32,8]{1,0:T(8,128)}) all-gather-start(%p), channel_id=1, "
        "replica_groups=[4,2]<=[8], dimensions={0}, use_global_device_ids=true",
        "%ag = f32[32,8]{1,0:T(8,128)} all-gather-done(%ags)",
        "%ars = f32[16,8]{1,0} all-reduce-start(%p), channel_id=2, replica_groups=[1,8]<=[8], "
        "use_global_device_ids=true, to_apply=%add",
        "%ar = f32[16,8]{1,0} all-reduce-done(%ars)",
        "%cps = (f32[16,8]{1,0}, f32[16,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%ar), "
        "channel_id=3, source_target_pairs={{0,1},{1,0}}",
        "%cp = f32[16,8]{1,0} collective-permute-done(%cps)",
        "%as = ((f32[16,8]{1,0}), f32[16,8]{1,0}, u32[]) async-start(%cp), calls=%wrapped",
        "%au = ((f32[16,8]{1,0}), f32[16,8]{1,0}, u32[]) async-update(%as), calls=%wrapped",
        "ROOT %ad = f32[16,8]{1,0} async-done(%au), calls=%wrapped",
        before="%wrapped (q: f32[16,8]) -> f32[16,8] {\n  %q = f32[16,8]{1,0} parameter(0)\n"
        "  ROOT %a2a = f32[16,8] all-to-all(%q), channel_id=4, replica_groups=[4,2]<=[8], dimensions={0}\n"
        "}\n\n",
    )
    found = hlo.read_hlo(text, {"x": 4, "y": 2})
    assert [(c.kind, c.payload_bytes, c.wire_bytes, c.shape) for c in found.collectives] == [
        ("all-gather", 1024, 512, "f32[32,8]"),
        ("all-reduce", 512, 896, "f32[16,8]"),
        ("collective-permute", 512, 512, "f32[16,8]"),
        ("all-to-all", 512, 256, "f32[16,8]"),
    ]


def test_one_tpu_collective_spread_over_fusions_counts_once():
    def part(name: str, extra: str) -> str:
        return (
            f"%{name} (q: f32[16,8]) -> f32[32,8] {{\n  %q = f32[16,8]{{1,0}} parameter(0)\n"
            "  %ag = f32[32,8]{1,0} all-gather(%q), channel_id=8, replica_groups=[4,2]<=[8], dimensions={0}, "
            'use_global_device_ids=true, frontend_attributes={chain_id="0"}, '
            'backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}\n'
            f'  ROOT %c = f32[32,8]{{1,0}} custom-call(%ag), custom_call_target="{extra}"\n}}\n\n'
        )

    text = module(
        "%p = f32[16,8]{1,0} parameter(0)",
        "%start = f32[32,8]{1,0} fusion(%p), kind=kCustom, calls=%one",
        "ROOT %done = f32[32,8]{1,0} fusion(%p), kind=kCustom, calls=%two",
        before=part("one", "AsyncCollectiveStart") + part("two", "AsyncCollectiveDone"),
    )
    assert only(hlo.read_hlo(text).collectives).times == 1


LOOP = """HloModule m, num_partitions=8

{add}%body (s: (s32[], f32[16,8], s32[])) -> (s32[], f32[16,8], s32[]) {{
  %s = (s32[]{{:T(128)}}, f32[16,8]{{1,0}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[16,8]{{1,0}} get-tuple-element(%s), index=1
  %n = s32[] get-tuple-element(%s), index=2
  %one = s32[] constant({step})
  %next = s32[] add(%one, %i)
  %ar = f32[16,8]{{1,0}} all-reduce(%x), replica_groups=[1,8]<=[8], channel_id=1, to_apply=%add
  ROOT %t = (s32[], f32[16,8]{{1,0}}, s32[]) tuple(%next, %ar, %n)
}}

%condition (s: (s32[], f32[16,8], s32[])) -> pred[] {{
  %s = (s32[]{{:T(128)}}, f32[16,8]{{1,0}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=2
  ROOT %lt = pred[] compare({sides}), direction={direction}
}}

ENTRY %main (p: f32[16,8], q: s32[]) -> f32[16,8] {{
  %p = f32[16,8]{{1,0}} parameter(0)
  %q = s32[] parameter(1)
  %init = s32[] constant({init})
  %bound = s32[] constant({bound})
  %copied = s32[] copy(%init)
  %t = (s32[], f32[16,8]{{1,0}}, s32[]) tuple(%copied, %p, {limit})
  %w = (s32[], f32[16,8]{{1,0}}, s32[]) while(%t), condition=%condition, body=%body{config}
  ROOT %r = f32[16,8]{{1,0}} get-tuple-element(%w), index=1
}}
"""


@pytest.mark.parametrize(
    "init, bound, step, direction, sides, times",
    [
        (0, 7, 1, "LT", "%i, %n", 7),
        (0, 7, 2, "LT", "%i, %n", 4),
        (1, 7, 1, "LE", "%i, %n", 7),
        (7, 0, -1, "GT", "%i, %n", 7),
        (7, 0, -2, "GE", "%i, %n", 4),
        (0, 7, 1, "GT", "%n, %i", 7),
        (9, 7, 1, "LT", "%i, %n", 0),
        (0, 7, 1, "NE", "%i, %n", None),
        (0, 7, -1, "LT", "%i, %n", None),
    ],
)
def test_trip_count_from_the_condition(init, bound, step, direction, sides, times):
    settings = {"init": init, "bound": bound, "step": step, "direction": direction, "sides": sides}
    found = hlo.read_hlo(LOOP.format(**settings, add=ADD, limit="%bound", config=""))
    c = only(found.collectives)
    assert (c.times, c.exact) == ((1, False) if times is None else (times, True))
    assert bool(found.unread) == (times is None)


def test_trip_count_noted_by_xla_wins_and_an_unknown_bound_is_unknown():
    settings = {
        "add": ADD,
        "init": 0,
        "bound": 7,
        "step": 1,
        "direction": "LT",
        "sides": "%i, %n",
        "limit": "%q",
    }
    assert not only(hlo.read_hlo(LOOP.format(**settings, config="")).collectives).exact
    for config in ('{"known_trip_count":{"n":"5"}}', r'"{\"known_trip_count\":{\"n\":\"5\"}}"'):
        text = LOOP.format(**settings, config=f", backend_config={config}")
        assert only(hlo.read_hlo(text).collectives).times == 5


def scatter_text(offsets: str = "0, 1, 2, 3, 4, 5, 6, 7", kept: int = 2, second: str = "") -> str:
    return module(
        "%p = f32[16,8]{1,0} parameter(0)",
        "%ar = f32[16,8]{1,0} all-reduce(%p), channel_id=1, replica_groups=[1,8]<=[8], "
        "use_global_device_ids=true, to_apply=%add",
        "%c = bf16[16,8]{1,0} convert(%ar)",
        f"%table = s32[8]{{0}} constant({{{offsets}}})",
        "%id = u32[] partition-id()",
        "%row = s32[1]{0} dynamic-slice(%table, %id), dynamic_slice_sizes={1}",
        f"%two = s32[] constant({kept})",
        "%place = s32[] bitcast(%row)",
        "%at = s32[] multiply(%place, %two)",
        "%zero = s32[] constant(0)",
        f"%out = bf16[{kept},8]{{1,0}} dynamic-slice(%c, %at, %zero), dynamic_slice_sizes={{{kept},8}}",
        *([second] if second else []),
        f"ROOT %r = bf16[{kept},8]{{1,0}} copy(%out)",
    )


def test_reduce_scatter_needs_every_device_to_take_another_part():
    c = only(hlo.read_hlo(scatter_text()).normalised)
    assert (c.kind, c.shape, c.payload_bytes, c.wire_bytes) == ("reduce-scatter", "bf16[2,8]", 512, 448)
    for other in (
        scatter_text("0, 1, 2, 3, 4, 5, 6, 6"),  # two take the same part
        scatter_text(kept=4),  # a quarter each, among eight
        scatter_text(second="%again = f32[16,8]{1,0} negate(%ar)"),  # and the whole is used too
    ):
        assert only(hlo.read_hlo(other).normalised).kind == "all-reduce"


def parts_text(offsets: str = "0, 1, 2, 3, 4, 5, 6, 7", zero: str = "0", base: str = "", operator: str = "add") -> str:
    text = module(
        "%p = f32[2,8]{1,0} parameter(0)",
        f"%zero.f = f32[] constant({zero})",
        base or "%zeros = f32[16,8]{1,0} broadcast(%zero.f), dimensions={}",
        f"%table = s32[8]{{0}} constant({{{offsets}}})",
        "%id = u32[] partition-id()",
        "%replica = u32[] replica-id()",
        "%eight = u32[] constant(8)",
        "%before = u32[] multiply(%replica, %eight)",
        "%device = u32[] add(%before, %id)",
        "%row = s32[1]{0} dynamic-slice(%table, %device), dynamic_slice_sizes={1}",
        "%two = s32[] constant(2)",
        "%place = s32[] bitcast(%row)",
        "%at = s32[] multiply(%place, %two)",
        "%zero = s32[] constant(0)",
        "%wide = f32[16,8]{1,0} dynamic-update-slice(%zeros, %p, %at, %zero)",
        "ROOT %ar = f32[16,8]{1,0} all-reduce(%wide), channel_id=1, replica_groups=[1,8]<=[8], "
        f"use_global_device_ids=true, to_apply=%{operator}",
    )
    return text.replace(ADD, ADD + ADD.replace("%add", "%max").replace(" add(", " maximum("))


def test_an_all_reduce_of_zeros_and_a_part_is_an_all_gather():
    c = only(hlo.read_hlo(parts_text(), {"x": 8}).normalised)
    assert (c.kind, c.payload_bytes, c.wire_bytes, c.shape) == ("all-gather", 512, 448, "f32[16,8]")
    assert c.rewritten == "all-reduce of zeros and a part"
    for other in (
        parts_text("0, 1, 2, 3, 4, 5, 6, 6"),  # two write the same part
        parts_text(zero="1"),
        parts_text(base="%zeros = f32[16,8]{1,0} parameter(1)"),
        parts_text(operator="max"),
    ):
        assert only(hlo.read_hlo(other, {"x": 8}).normalised).kind == "all-reduce"


METADATA = """HloModule m, num_partitions=8

FileNames
1 "/home/me/model.py"

FunctionNames
1 "<module>"

FileLocations
1 {file_name_id=1 function_name_id=1 line=12 end_line=12 column=1 end_column=9}
2 {file_name_id=1 function_name_id=1 line=34 end_line=34 column=1 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

"""


@pytest.mark.parametrize(
    "metadata, source",
    [
        ('op_name="jit(f)/dot" stack_frame_id=2', "model.py:34"),
        ('op_name="jit(f)/dot" stack_frame_id=9', ""),
        ('op_name="jit(f)/dot" source_file="/a/b/train.py" source_line=56', "train.py:56"),
        ('op_name="jit(f)/dot"', ""),
    ],
)
def test_source_lines_inline_and_from_tables(metadata, source):
    text = all_reduce("{{0,1}}", f", channel_id=1, use_global_device_ids=true, metadata={{{metadata}}}")
    c = only(hlo.read_hlo(METADATA + text.split("\n\n", 1)[1]).collectives)
    assert (c.source, c.op_name) == (source, "jit(f)/dot")


def flops_of(line: str, a: str, b: str) -> hlo.Audit:
    return hlo.read_hlo(module(f"%a = {a} parameter(0)", f"%b = {b} parameter(1)", f"ROOT %c = {line}"))


@pytest.mark.parametrize(
    "line, a, b, flops",
    [
        (
            "f32[4,8,32] dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}",
            "f32[4,8,16]",
            "f32[4,16,32]",
            2 * 4 * 8 * 16 * 32,
        ),
        (
            "f32[2,16,16,8] convolution(%a, %b), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            "f32[2,16,16,4]",
            "f32[3,3,4,8]",
            2 * 2 * 16 * 16 * 8 * 9 * 4,
        ),
        (
            "bf16[8,32] convolution(%a, %b), dim_labels=bf_io->bf",
            "bf16[8,16]",
            "bf16[16,32]",
            2 * 8 * 16 * 32,
        ),
        (  # a batch dot, as the TPU writes it
            "bf16[16,256,256] convolution(%a, %b), window={size=16 stride=15 lhs_dilate=16}, "
            "dim_labels=0bf_0io->0bf",
            "bf16[16,256,512]",
            "bf16[16,512,256]",
            2 * 16 * 256 * 512 * 256,
        ),
        (
            'f32[8,32] custom-call(%a, %b), custom_call_target="__onednn$matmul"',
            "f32[8,16]",
            "f32[16,32]",
            2 * 8 * 16 * 32,
        ),
        (
            '(f32[8,32], s8[64]) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config='
            '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"]}}}',
            "f32[16,8]",
            "f32[16,32]",
            2 * 8 * 16 * 32,
        ),
    ],
)
def test_flops(line, a, b, flops):
    found = flops_of(line, a, b)
    assert found.flops == flops and not found.unread


def test_flops_of_a_library_call_nobody_understands_are_listed():
    call = 'f32[8,32] custom-call(%a, %b), custom_call_target="__cudnn$fmhaSoftmax"'
    found = flops_of(call, "f32[8,16]", "f32[1]")
    assert found.flops == 0 and "FLOPs of custom-call %c" in found.unread


# --- damage, size, and the public verbs -------------------------------------------------------------------


def test_nothing_is_guessed_from_damaged_text():
    for text in ("", "no such thing", "HloModule m\n\nENTRY %main () -> f32[] {\n  %a = f32[] add(%a, %a)\n"):
        found = hlo.read_hlo(text, {"x": 2})
        assert not found.collectives and found.flops == 0 and found.unread
    whole = all_reduce("[1,8]<=[8]")
    for broken in (
        whole.replace("replica_groups", "x"),
        whole.replace("(%p)", "(%q)"),
        whole.replace("[1,8]<=", "["),
    ):
        found = hlo.read_hlo(broken)
        assert not found.collectives and any("%ar" in note for note in found.unread)
    for end in range(0, len(whole), 7):
        hlo.read_hlo(whole[:end], {"x": 4, "y": 2})
    assert "ragged-all-to-all %ar" in hlo.read_hlo(whole.replace("all-reduce(", "ragged-all-to-all(")).unread


def test_reading_takes_time_in_proportion_to_the_text():
    line = (
        "  %ar.{0} = f32[16,8]{{1,0}} all-reduce(%ar.{1}), channel_id={0}, "
        "replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true, to_apply=%add, "
        'metadata={{op_name="jit(step)/transpose(jvp())/layer_{0}/attention/dot_general" stack_frame_id=1}}\n'
    )
    count = 4_000
    body = "".join(line.format(i, i - 1) for i in range(1, count + 1))
    text = module("%ar.0 = f32[16,8]{1,0} parameter(0)").rsplit("}", 1)[0] + body + "}\n"
    start = time.perf_counter()
    found = hlo.read_hlo(text, {"x": 4, "y": 2})
    assert len(text) > 900_000 and len(found.collectives) == count
    assert time.perf_counter() - start < 10


def test_audit_takes_jitted_lowered_and_compiled_and_explains_itself():
    mesh = make_mesh(x=4, y=2)
    fn = jax.jit(lambda x, w: x @ w, out_shardings=NamedSharding(mesh, P()))
    args = spec(mesh, (16, 64), None, "x"), spec(mesh, (64, 32), "x", None)
    lowered = fn.lower(*args)
    found = [
        hlo.audit(fn, *args),
        hlo.audit(lowered, mesh=mesh),
        hlo.audit(lowered.compile(), mesh={"x": 4, "y": 2}),
    ]
    assert found[0] == found[1] == found[2]
    assert re.search(r"all-reduce +x +2,048 +3,072 +1 +test_hlo\.py:\d+ +jit.*dot_general\n", str(found[0]))
    with pytest.raises(TypeError, match=r"not jitted: pass jax\.jit"):
        hlo.audit(lambda x: x, 1.0)
