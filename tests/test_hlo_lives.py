"""What a scheduled program holds at once, read from text as TPU compilers print it; and gaps that were counted twice."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import pytest

from jaxplan import topology
from jaxplan.hlo_lives import bytes_alive, stored_bytes, without_gaps_twice

MIB = 1 << 20


def program(*lines: str) -> str:
    """A module whose entry runs the lines in their order; its parameter is a MiB."""
    body = ["%p = f32[512,512]{1,0:T(8,128)} parameter(0)", *lines]
    return "\n".join(["HloModule made, is_scheduled=true", "", "ENTRY %main {", *[f"  {line}" for line in body], "}", ""])


def step(name: str, read: str, kind: str = "f32[512,512]{1,0:T(8,128)}") -> str:
    return f"%{name} = {kind} negate({read})"


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("f32[512,512]{1,0:T(8,128)}", [MIB]),
        ("f32[512,512]{1,0:T(8,128)S(1)}", [0]),  # on the chip
        ("bf16[3,100]{1,0:T(8,128)(2,1)}", [8 * 128 * 2]),
        ("f32[3,100]{0,1:T(8,128)}", [104 * 128 * 4]),  # dimension 0 is the innermost
        ("f32[5,3,100]{2,1,0:T(8,128)}", [5 * 8 * 128 * 4]),
        ("f32[100]{0:T(128)}", [512]),
        ("f32[512,512]{1,0}", [MIB]),
        ("pred[]", [1]),
        ("(f32[8,128]{1,0:T(8,128)}, /*index=1*/(bf16[16,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}))", [4096, 4096, 0]),
    ],
)
def test_bytes_of_a_printed_type_are_whole_tiles_in_main_memory(kind, sizes):
    assert stored_bytes(kind) == sizes


def test_a_value_lives_from_its_maker_to_its_last_reader():
    chain = program(step("a", "%p"), step("b", "%a"), step("c", "%b"), "ROOT " + step("d", "%c"))
    assert bytes_alive(chain) == 2 * MIB  # a and b, then b and c: neither what is given nor what is returned
    kept = program(step("a", "%p"), step("b", "%a"), step("c", "%b"), "ROOT %d = f32[512,512]{1,0:T(8,128)} add(%c, %a)")
    assert bytes_alive(kept) == 3 * MIB


def test_views_share_and_elements_of_a_tuple_end_apart():
    pair = "(f32[512,512]{1,0:T(8,128)}, f32[1024,512]{1,0:T(8,128)})"
    lines = (
        f"%both = {pair} fusion(%p), kind=kLoop, calls=%somewhere",
        "%small = f32[512,512]{1,0:T(8,128)} get-tuple-element(%both), index=0",
        "%large = f32[1024,512]{1,0:T(8,128)} get-tuple-element(%both), index=1",
        step("from_large", "%large"),  # the 2 MiB end here
        "%seen = f32[512,512]{1,0:T(8,128)} bitcast(%small)",
        step("x", "%from_large"),
        step("y", "%x"),
        "ROOT %z = f32[512,512]{1,0:T(8,128)} add(%y, %seen)",
    )
    assert bytes_alive(program(*lines)) == 4 * MIB


def test_copies_in_the_background_take_their_result_only():
    on_chip = "f32[512,512]{1,0:T(8,128)S(1)}"
    plain = "f32[512,512]{1,0:T(8,128)}"
    lines = (
        step("a", "%p"),
        f"%start = ({on_chip}, {plain}, u32[]{{:S(2)}}) copy-start(%a)",
        f"%done = {on_chip} copy-done(%start)",  # `a` is held until here
        step("b", "%p"),
        "ROOT " + step("r", "%done"),
    )
    assert bytes_alive(program(*lines)) == MIB
    gathered = "f32[2048,512]{1,0:T(8,128)}"
    lines = (
        step("a", "%p"),
        f"%start = ({plain}, {gathered}) all-gather-start(%a), dimensions={{0}}",
        step("beside", "%p"),
        f"%done = {gathered} all-gather-done(%start)",
        "ROOT %r = f32[2048,512]{1,0:T(8,128)} add(%done, %beside)",
    )
    assert bytes_alive(program(*lines)) == 6 * MIB


def test_what_is_written_in_place_takes_nothing():
    lines = (
        step("a", "%p"),
        "%same = f32[512,512]{1,0:T(8,128)} fusion(%a), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%somewhere",
        "ROOT " + step("r", "%same"),
    )
    assert bytes_alive(program(*lines)) == MIB
    lines = (
        step("a", "%p"), step("b", "%p"),
        "%two = (f32[512,512]{1,0:T(8,128)}, f32[512,512]{1,0:T(8,128)}) fusion(%a, %b), kind=kLoop, "
        "output_to_operand_aliasing={{0}: (1, {}), {1}: (0, {})}, calls=%somewhere",
        "%one = f32[512,512]{1,0:T(8,128)} get-tuple-element(%two), index=0",
        "ROOT " + step("r", "%one"),
    )  # fmt: skip
    assert bytes_alive(program(*lines)) == 2 * MIB


def test_what_a_loop_holds_inside_counts_beside_what_lives_around_it():
    kind = "(f32[512,512]{1,0:T(8,128)})"
    body = (
        f"%body (q: {kind}) -> {kind} {{",
        f"  %q = {kind} parameter(0)",
        "  %x = f32[512,512]{1,0:T(8,128)} get-tuple-element(%q), index=0",
        "  " + step("u", "%x"),
        "  " + step("v", "%u"),
        "  " + step("w", "%v"),
        f"  ROOT %t = {kind} tuple(%w)",
        "}",
    )
    lines = (
        step("a", "%p"),
        f"%start = {kind} tuple(%a)",
        f"%loop = {kind} while(%start), condition=%until, body=%body",
        "%y = f32[512,512]{1,0:T(8,128)} get-tuple-element(%loop), index=0",
        "ROOT " + step("r", "%y"),
    )
    text = program(*lines).replace("ENTRY", "\n".join(body) + "\n\nENTRY")
    assert bytes_alive(text) == 3 * MIB  # the carry, and inside u and v


def test_damaged_text_holds_nothing():
    assert bytes_alive("") == bytes_alive("HloModule made\n\nENTRY %main {\n  %a = f32[8]{0} negate(%gone\n") == 0


def test_gaps_that_were_counted_twice_are_counted_once():
    assert without_gaps_twice(reported=130, alive=70) == 100
    assert without_gaps_twice(reported=100, alive=120) == 100


@pytest.mark.parametrize(
    ("platform", "version", "twice"),
    [
        ("tpu", "0.0.42.1", True), ("tpu", "0.0.50.1", True), ("tpu", "0.0.51", False), ("tpu", "0.1", False),
        ("cpu", "0.0.42", False),
    ],
)  # fmt: skip
def test_which_compilers_count_gaps_twice(monkeypatch, platform, version, twice):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert topology.counts_gaps_twice([SimpleNamespace(platform=platform)]) is twice
