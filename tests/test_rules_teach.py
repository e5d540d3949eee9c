"""`jaxplan.rule`: what a user may say, and what each mistake is answered with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxplan import _jax
from jaxplan.rules import Kind, Rule, RuleError, classify, einsum_rule, rule, rule_of


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


OPERANDS, RESULTS = [f32(2, 4, 6), f32(6, 8)], [f32(2, 4, 8)]


@pytest.fixture
def mine() -> Iterator[Any]:
    yield _jax.Primitive("mine")


def test_notation(mine: Any) -> None:
    assert classify(mine) == "unknown"
    rule(mine, flops=2.0)("b s d, d e -> b s e")
    made = rule_of(mine, {}, OPERANDS, RESULTS)
    assert classify(mine) == "known"
    assert str(made) == "b s d, d e -> b s e    d: sum"
    assert made.known and not made.fusible and made.points * made.flops == 2 * 2 * 4 * 6 * 8


def test_kinds(mine: Any) -> None:
    rule(mine, kinds={"s": (Kind.HALO, 2), "d": Kind.WHOLE}, fusible=True)("b s d, 1 e -> b s e")
    made = rule_of(mine, {}, OPERANDS, RESULTS)
    assert str(made) == "b s d, 1 e -> b s e    s: halo(2); d: whole"
    assert made.fusible


def test_by_hand(mine: Any) -> None:
    rule(mine, kinds={"d": Kind.WHOLE}, by_hand=True)("b s d, d e -> b s e")
    made = rule_of(mine, {}, OPERANDS, RESULTS)
    assert made.by_hand and str(made) == "b s d, d e -> b s e    d: whole; by hand"
    rule(mine, by_hand=True)("b s d, d e -> b s e")
    with pytest.raises(RuleError, match="by_hand"):  # a sum
        rule_of(mine, {}, OPERANDS, RESULTS)


def test_maker_of_notation(mine: Any) -> None:
    @rule(mine)
    def my_rule(params: Any, operands: Any, results: Any) -> str:
        return "b s d, d e -> b s e" if params["mix"] else "b s 1, 1 e -> b s e"

    assert str(rule_of(mine, {"mix": True}, OPERANDS, RESULTS)).endswith("d: sum")
    assert rule_of(mine, {"mix": False}, OPERANDS, RESULTS).shardable == (True, True, True)
    assert my_rule({"mix": True}, OPERANDS, RESULTS) == "b s d, d e -> b s e"  # still the user's function


def test_maker_of_rules(mine: Any) -> None:
    @rule(mine)
    def my_rule(params: Any, operands: Any, results: Any) -> Rule:
        narrow = operands[0].dtype == jnp.bfloat16
        return einsum_rule("i -> i", [operands[0].shape, results[0].shape], flops=1.0 if narrow else 2.0)

    assert rule_of(mine, {}, [f32(4)], [f32(4)]).flops == 2.0
    assert rule_of(mine, {}, [jax.ShapeDtypeStruct((4,), jnp.bfloat16)], [f32(4)]).flops == 1.0


def test_teaching_again_replaces(mine: Any) -> None:
    rule(mine)("i -> i")
    assert rule_of(mine, {}, [f32(4)], [f32(4)]).shardable == (True,)
    rule(mine, kinds={"i": Kind.WHOLE})("i -> i")
    assert rule_of(mine, {}, [f32(4)], [f32(4)]).shardable == (False,)


def test_not_a_primitive() -> None:
    with pytest.raises(RuleError, match=r"no JAX primitive. Give it the object made with"):
        rule(jnp.add)("i -> i")  # type: ignore[arg-type]


def test_notation_that_does_not_fit(mine: Any) -> None:
    rule(mine)("b s d -> b s")
    with pytest.raises(RuleError, match=r"does not fit an equation with operands of shapes .*writes 2 operands"):
        rule_of(mine, {}, OPERANDS, RESULTS)


def test_notation_of_the_wrong_rank(mine: Any) -> None:
    rule(mine)("b d, d e -> b e")
    with pytest.raises(RuleError, match=r"'b d, d e -> b e', does not fit .* has 2 dimensions, the tensor has"):
        rule_of(mine, {}, OPERANDS, RESULTS)


def test_kind_of_a_stranger(mine: Any) -> None:
    rule(mine, kinds={"z": Kind.WHOLE})("b s d, d e -> b s e")
    with pytest.raises(RuleError, match=r"gives kinds to .'z'., which"):
        rule_of(mine, {}, OPERANDS, RESULTS)


def test_maker_returns_something_else(mine: Any) -> None:
    rule(mine)(lambda params, operands, results: 42)
    with pytest.raises(RuleError, match=r"must be notation or a jaxplan Rule, but its maker returned 42"):
        rule_of(mine, {}, OPERANDS, RESULTS)


def test_rule_of_the_wrong_rank(mine: Any) -> None:
    rule(mine)(lambda params, operands, results: einsum_rule("i -> i", [(4,), (4,)]))
    with pytest.raises(RuleError, match=r"has operands of ranks \[1\]; the equation's have \[3, 2\]"):
        rule_of(mine, {}, OPERANDS, RESULTS)
