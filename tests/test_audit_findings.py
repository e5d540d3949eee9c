"""What the audit warns of, from real compiles; its JSON and its pytree; the texts of GPU and TPU compilers."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from jaxplan import hlo
from jaxplan.hlo_text import tile_ids

X4Y2 = {"x": 4, "y": 2}


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))


def array(mesh: Mesh, shape: tuple[int, ...], *axes) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*axes)))


def resharded(mesh: Mesh, before: P, after: P) -> hlo.Audit:
    fn = jax.jit(lambda x: jnp.cos(jax.lax.with_sharding_constraint(jnp.sin(x), NamedSharding(mesh, after))))
    return hlo.audit(fn, array(mesh, (64, 64, 8), *before))


def kinds(found: hlo.Audit) -> list[str]:
    return [finding.kind for finding in found.warnings]


# --- rematerialised -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"), [(P(("x", "y")), P(None, "y", "x")), (P("x", None, "y"), P(None, ("y", "x")))]
)
def test_an_involuntary_full_rematerialization_is_found(mesh, before, after):
    """XLA itself logs these two as such."""
    found = resharded(mesh, before, after)
    gathers = [c for c in found.collectives if c.kind == "all-gather"]
    assert gathers and kinds(found) == ["rematerialised"] * len(gathers)
    assert sum(f.wire_bytes for f in found.warnings) == sum(c.total_bytes for c in gathers)
    assert found.warnings[0].source.startswith("test_audit_findings.py:") or not gathers[0].source  # JAX 0.12 leaves it out
    assert "each device keeps only its part" in str(found)


@pytest.mark.parametrize(("before", "after"), [(P("x", "y"), P("y", None, "x")), (P("x"), P()), (P("x"), P(None, "x"))])
def test_a_reshard_that_needs_what_it_moves_is_not(mesh, before, after):
    found = resharded(mesh, before, after)
    assert found.collectives and not kinds(found)


def test_a_row_of_a_gathered_table_at_a_place_that_is_data_is_not(mesh):
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("x"), P("x")), out_specs=P("x"), check_vma=False)
    def fn(table, place):
        whole = jax.lax.all_gather(table, "x", tiled=True)
        return jax.lax.dynamic_slice(whole, (place[0], 0), (1, 8))

    args = array(mesh, (64, 8), "x"), jax.ShapeDtypeStruct((4,), jnp.int32, sharding=NamedSharding(mesh, P("x")))
    found = hlo.audit(jax.jit(fn), *args)
    assert [c.kind for c in found.collectives] == ["all-gather"] and not kinds(found)


# --- repeated -----------------------------------------------------------------------------------------------

HEAD = """HloModule m, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%max (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %m = f32[] maximum(%a, %b)
}

"""


def program(*lines: str, before: str = "") -> str:
    body = "".join(f"  {line}\n" for line in lines)
    return f"{HEAD}{before}ENTRY %main (p: f32[16,8], q: f32[16,8]) -> f32[16,8] {{\n{body}}}\n"


def gather(name: str, operand: str, groups: str = "[4,2]<=[8]", channel: int = 1, extra: str = "dimensions={0}") -> str:
    return (
        f"%{name} = f32[32,8]{{1,0}} all-gather(%{operand}), channel_id={channel}, replica_groups={groups}, {extra}, "
        "use_global_device_ids=true"
    )


def reduced(name: str, operand: str, operator: str = "add") -> str:
    return (
        f"%{name} = f32[16,8]{{1,0}} all-reduce(%{operand}), channel_id=2, replica_groups=[1,8]<=[8], "
        f"use_global_device_ids=true, to_apply=%{operator}"
    )


PARAMETERS = ("%p = f32[16,8]{1,0} parameter(0)", "%q = f32[16,8]{1,0} parameter(1)", "%c = f32[16,8]{0,1} copy(%p)")


@pytest.mark.parametrize(
    ("first", "second", "wasted"),
    [
        (gather("g", "p"), gather("h", "p", channel=2), 512),
        (gather("g", "p"), gather("h", "c", channel=2), 512),  # a copy is the same operand
        (gather("g", "p"), gather("h", "q"), 0),
        (gather("g", "p"), gather("h", "p", groups="[2,4]<=[4,2]T(1,0)"), 0),
        (gather("g", "p"), reduced("h", "p"), 0),
        (reduced("g", "p"), reduced("h", "p"), 2 * 7 / 8 * 512),
        (reduced("g", "p"), reduced("h", "p", "max"), 0),
    ],
)
def test_a_collective_that_repeats_another(first, second, wasted):
    found = hlo.read_hlo(program(*PARAMETERS, first, second, "ROOT %r = f32[16,8]{1,0} add(%p, %q)"), X4Y2)
    assert len(found.collectives) == 2
    assert sum(f.wire_bytes for f in found.warnings if f.kind == "repeated") == wasted
    assert ("repeated" in kinds(found)) == bool(wasted)


def test_of_a_combined_collective_the_repeated_element_counts():
    both = (
        "%h = (f32[16,8]{1,0}, f32[16,8]{1,0}) all-reduce(%p, %q), channel_id=3, replica_groups=[1,8]<=[8], "
        "use_global_device_ids=true, to_apply=%add"
    )
    found = hlo.read_hlo(program(*PARAMETERS, reduced("g", "q"), both, "ROOT %r = f32[16,8]{1,0} add(%p, %q)"), X4Y2)
    (finding,) = found.warnings
    assert (finding.kind, finding.axes, finding.wire_bytes) == ("repeated", ("x", "y"), 2 * 7 / 8 * 512)


def test_a_gather_that_a_loop_repeats(mesh):
    """Parameters gathered in every round although the loop does not change them."""

    def fn(x, w, rounds):
        mapped = jax.shard_map(
            lambda w: jax.lax.all_gather(w, "x", tiled=True), mesh=mesh, in_specs=P("x"), out_specs=P(), check_vma=False
        )
        if rounds == "outside":
            whole = mapped(w)
            return jax.lax.scan(lambda h, _: (jnp.tanh(h @ whole), None), x, None, length=5)[0]
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ mapped(w)), None), x, None, length=5)[0]

    def compiled(rounds):
        return hlo.audit(jax.jit(functools.partial(fn, rounds=rounds)), array(mesh, (16, 64), "y"), array(mesh, (64, 64), "x"))

    inside, outside = compiled("inside"), compiled("outside")
    assert "repeated" not in kinds(outside)
    moved = 3 / 4 * 64 * 64 * 4
    repeated = sum(f.wire_bytes for f in inside.warnings if f.kind == "repeated")
    assert (inside.total_wire_bytes, repeated) in ((5 * moved, 4 * moved), (moved, 0))  # XLA may hoist it by itself


LOOP = """%body (s: (s32[], f32[16,8], f32[16,8])) -> (s32[], f32[16,8], f32[16,8]) {
  %s = (s32[], f32[16,8]{1,0}, f32[16,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %same = f32[16,8]{1,0} get-tuple-element(%s), index=1
  %other = f32[16,8]{1,0} get-tuple-element(%s), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %still = f32[16,8]{1,0} all-reduce(%same), replica_groups=[1,8]<=[8], channel_id=1, to_apply=%add
  %moved = f32[16,8]{1,0} all-reduce(%other), replica_groups=[1,8]<=[8], channel_id=2, to_apply=%add
  %sum = f32[16,8]{1,0} add(%still, %moved)
  ROOT %t = (s32[], f32[16,8]{1,0}, f32[16,8]{1,0}) tuple(%next, %same, %sum)
}

%condition (s: (s32[], f32[16,8], f32[16,8])) -> pred[] {
  %s = (s32[], f32[16,8]{1,0}, f32[16,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(4)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

"""


def test_of_two_collectives_in_a_loop_the_one_of_what_does_not_change():
    found = hlo.read_hlo(
        program(
            *PARAMETERS,
            "%zero = s32[] constant(0)",
            "%t = (s32[], f32[16,8]{1,0}, f32[16,8]{1,0}) tuple(%zero, %p, %q)",
            "%w = (s32[], f32[16,8]{1,0}, f32[16,8]{1,0}) while(%t), condition=%condition, body=%body",
            "ROOT %r = f32[16,8]{1,0} get-tuple-element(%w), index=2",
            before=LOOP,
        ),
        X4Y2,
    )
    assert [(c.times, c.exact) for c in found.collectives] == [(4, True)] * 2
    (finding,) = found.warnings
    assert (finding.kind, finding.wire_bytes) == ("repeated", 3 * 2 * 7 / 8 * 512)
    assert "every round" in finding.detail


# --- replicated work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "right", "out", "alike"),
    [
        (P("x", None), P(), P("x"), ("y",)),
        (P("x", None), P(None, "y"), P("x", "y"), ()),
        (P(("x", "y"), None), P(), P(("x", "y")), ()),
        (P(None, "x"), P("x", None), P(), ("y",)),
        (P(), P(), P(), ("x", "y")),
    ],
)
def test_work_that_does_not_shrink_over_an_axis(mesh, left, right, out, alike):
    fn = jax.jit(lambda x, w: x @ w, out_shardings=NamedSharding(mesh, out))
    found = hlo.audit(fn, array(mesh, (16, 64), *left), array(mesh, (64, 32), *right), mesh=mesh)
    devices = int(np.prod([X4Y2[axis] for axis in alike]))
    assert found.flops == 2 * 16 * 64 * 32 * devices / 8
    rows = [(f.axes, f.flops) for f in found.warnings if f.kind == "replicated"]
    assert rows == ([(alike, found.flops * (1 - 1 / devices))] if alike else [])


def test_work_within_a_loop_whose_state_comes_to_differ(mesh):
    """In round one the state is the same along x; from then on the sharded parameters make it differ."""

    def fn(x, w):
        def step(h, wl):
            return jax.lax.with_sharding_constraint(jnp.tanh(h @ wl), NamedSharding(mesh, P("x"))), None

        return jax.lax.scan(step, x, w)[0]

    differs = hlo.audit(jax.jit(fn), array(mesh, (16, 64), "x"), array(mesh, (5, 64, 64)))
    assert [(f.axes, f.count) for f in differs.warnings if f.kind == "replicated"] == [(("y",), 5)]
    layers = jax.jit(lambda x, w: jax.lax.scan(lambda h, wl: (h @ wl, None), x, w)[0])
    whole = hlo.audit(layers, array(mesh, (16, 64)), array(mesh, (5, 64, 64)))
    assert [(f.axes, f.count) for f in whole.warnings if f.kind == "replicated"] == [(("x", "y"), 5)]


def test_work_behind_an_all_gather_is_alike_again(mesh):
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("x"), P()), out_specs=P(), check_vma=False)
    def fn(x, w):
        return jax.lax.all_gather(jnp.sin(x), "x", tiled=True) @ w

    found = hlo.audit(jax.jit(fn), array(mesh, (16, 64), "x"), array(mesh, (64, 32)))
    assert [f.axes for f in found.warnings if f.kind == "replicated"] == [("x", "y")]


@pytest.mark.parametrize(
    ("sharding", "tiles"),
    [
        ("{replicated}", [0] * 8),
        ("{devices=[4,2]<=[8]}", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("{devices=[4,1,2]<=[8] last_tile_dim_replicate}", [0, 0, 1, 1, 2, 2, 3, 3]),
        ("{devices=[2,1,4]<=[4,2]T(1,0) last_tile_dim_replicate}", [0, 1, 0, 1, 0, 1, 0, 1]),
        ("{devices=[2,1,4]0,1,2,3,4,5,6,7 last_tile_dims={replicated}}", [0, 0, 0, 0, 1, 1, 1, 1]),
        ("{mesh['x'=4,'y'=2], [{'y'}, {}]}", [0, 1, 0, 1, 0, 1, 0, 1]),
        ("{mesh['x'=4,'y'=2], [{}, {}]}", [0] * 8),
        ("{devices=[2,1,4]<=[8] last_tile_dims={manual}}", None),
        ("{maximal device=0}", None),
        ("{devices=[3,2]<=[8]}", None),
        ("{manual}", None),
        ("nonsense", None),
    ],
)
def test_which_tile_each_device_holds(sharding, tiles):
    found = tile_ids(sharding, 8)
    assert (None if found is None else found.tolist()) == tiles


def test_a_parameter_of_unknown_sharding_is_taken_to_differ():
    dot = "ROOT %d = f32[16,16]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={1}"
    silent = program("%p = f32[16,8]{1,0} parameter(0)", "%q = f32[16,8]{1,0} parameter(1)", dot)
    assert not hlo.read_hlo(silent, X4Y2).warnings
    whole = silent.replace("parameter(0)\n  %q", "parameter(0), sharding={replicated}\n  %q").replace(
        "parameter(1)\n  ROOT %d", "parameter(1), sharding={replicated}\n  ROOT %d"
    )
    assert [f.axes for f in hlo.read_hlo(whole, X4Y2).warnings] == [("x", "y")]
    assert [f.axes for f in hlo.read_hlo(whole).warnings] == [()]  # every device, by a mesh that nobody named


# --- table, pytree, JSON ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(mesh) -> hlo.Audit:
    fn = jax.jit(lambda x, w: x @ w, out_shardings=NamedSharding(mesh, P()))
    return hlo.audit(fn, array(mesh, (16, 64), None, "x"), array(mesh, (64, 32), "x", None))


def test_an_audit_is_a_pytree_of_its_numbers(found):
    leaves, tree = jax.tree.flatten(found)
    assert all(isinstance(leaf, (int, float)) for leaf in leaves)
    assert jax.tree.unflatten(tree, leaves) == found
    doubled = jax.tree.map(lambda n: 2 * n, found)
    assert doubled.flops == 2 * found.flops and doubled.collectives[0].wire_bytes == 2 * found.collectives[0].wire_bytes
    assert doubled.collectives[0].source == found.collectives[0].source


def test_an_audit_as_json(found):
    read = json.loads(found.to_json())
    (collective,) = read["collectives"]
    assert [collective[key] for key in ("kind", "axes", "wire_bytes", "times")] == ["all-reduce", ["x"], 3072, 1]
    assert collective["source"].startswith("test_audit_findings.py:") and "dot_general" in collective["op_name"]
    assert read["wire_bytes"] == {"collectives": {"x": 3072}, "normalised": {"x": 3072}}
    assert (read["flops"], read["peak_bytes"], read["unread"]) == (found.flops, found.peak_bytes, [])
    assert read["argument_bytes"] + read["output_bytes"] + read["temp_bytes"] - read["alias_bytes"] == read["peak_bytes"]
    assert [w["kind"] for w in read["warnings"]] == ["replicated"]
    assert sum(k["flops"] * k["times"] for k in read["kernels"]) == read["flops"]


# --- other compilers' texts -----------------------------------------------------------------------------------

TEXTS = Path(__file__).parent / "hlo"  # shortened, and otherwise as the compilers print them
GPU, TPU = ((TEXTS / f"{name}.txt").read_text(encoding="utf-8") for name in ("gpu", "tpu"))


def test_the_text_of_a_gpu_compiler():
    found = hlo.read_hlo(GPU, X4Y2)
    assert not found.unread
    assert [(c.kind, c.axes, c.payload_bytes, c.wire_bytes, c.shape, c.source) for c in found.collectives] == [
        ("all-gather", ("x",), 128 * 256 * 2, 3 / 4 * 128 * 256 * 2, "bf16[128,256]", "train.py:12"),
        ("reduce-scatter", ("x",), 64 * 256 * 2, 3 / 4 * 64 * 256 * 2, "bf16[16,256]", "train.py:13"),
        ("all-to-all", ("y",), 16 * 256 * 2, 1 / 2 * 16 * 256 * 2, "bf16[2,8,256]", ""),
    ]
    assert found.normalised == found.collectives
    assert found.flops == 2 * 64 * 128 * 256
    (finding,) = found.warnings  # the batch lies along y alone, and the parameters are gathered whole
    assert (finding.kind, finding.axes, finding.source) == ("replicated", ("x",), "train.py:12")


@pytest.mark.parametrize(
    ("target", "operands", "result"),
    [
        ("__cudnn$convForward", ("f32[2,16,16,4]", "f32[3,3,4,8]"), "f32[2,16,16,8]"),
        ("__cudnn$convBackwardInput", ("f32[2,16,16,8]", "f32[3,3,4,8]"), "f32[2,16,16,4]"),
        ("__cudnn$convBackwardFilter", ("f32[2,16,16,4]", "f32[2,16,16,8]"), "f32[3,3,4,8]"),
    ],
)
def test_convolutions_of_a_gpu_library_forward_and_backward(target, operands, result):
    a, b = operands
    found = hlo.read_hlo(program(
        f"%a = {a} parameter(0)", f"%b = {b} parameter(1)",
        f"ROOT %c = ({result}, u8[0]) custom-call(%a, %b), window={{size=3x3 pad=1_1x1_1}}, dim_labels=b01f_01io->b01f, "
        f'custom_call_target="{target}"',
    ))  # fmt: skip
    assert found.flops == 2 * 2 * 16 * 16 * 8 * 9 * 4 and not found.unread


def test_the_text_of_the_tpu_compiler():
    """A loop whose bound is in its condition, around a fusion that hides a reduce-scatter; layouts with tiles."""
    found = hlo.read_hlo(TPU, {"x": 4, "y": 4})
    assert not found.unread and not found.warnings
    (compiled,), (meant,) = found.collectives, found.normalised
    assert (compiled.kind, compiled.times, compiled.exact, compiled.axes) == ("all-reduce", 5, True, ("y",))
    assert (meant.kind, meant.payload_bytes, meant.wire_bytes) == ("reduce-scatter", 256 * 1024 * 2, 3 / 4 * 256 * 1024 * 2)
    assert (meant.source, meant.op_name) == ("f.py:3", "jit(f)/while/body/dot_general")
    assert found.flops == 5 * 2 * 256 * 256 * 1024


# --- damage -------------------------------------------------------------------------------------------------


def test_a_collective_of_another_version_is_listed():
    text = GPU.replace("reduce-scatter-start(", "fused-reduce-scatter-start(")
    found = hlo.read_hlo(text, X4Y2)
    assert [c.kind for c in found.collectives] == ["all-gather", "all-to-all"]
    assert found.unread == ("fused-reduce-scatter-start %reduce-scatter-start",)


def test_an_operand_that_is_not_there_is_listed():
    lines = GPU.split("\n")
    text = "\n".join(line for line in lines if not line.startswith("  %call ="))
    assert any("operand %call" in note for note in hlo.read_hlo(text, X4Y2).unread)


@pytest.mark.parametrize("text", [GPU, TPU, program(*PARAMETERS, gather("g", "p"))])
def test_text_that_is_cut_off_anywhere_raises_nothing_and_says_so(text):
    for end in range(0, len(text) - 3, 97):
        found = hlo.read_hlo(text[:end], X4Y2)
        assert found.unread and not found.collectives
