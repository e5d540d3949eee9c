"""What loops over elements can compute, of single operators (`library.py` says what they do)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxplan import _jax
from jaxplan.graph import Operator
from jaxplan.graph.nouns import constant
from jaxplan.rules import Kind, Rule

POWERS, ONE_MINUS_SQUARE = frozenset(_jax.primitives("integer_pow")), frozenset(_jax.primitives("one_minus_square?"))
ADDS, SCATTER_ADDS = frozenset(_jax.primitives("add add_any")), frozenset(_jax.primitives("scatter_add"))


def step_of(operator: Operator) -> tuple[str, int]:
    """(what, slot) of the step that an operator takes with an operand, or all of it, and that others may share: the square on
    the way to a power, or 1 more on the way to 1 - x x = (1 + x) (1 - x). ("", -1) for others."""
    equation = operator.equation
    if equation is None:
        return "", -1
    if equation.primitive in POWERS and equation.params["y"] >= 2:
        return "square", 0
    if equation.primitive in ONE_MINUS_SQUARE:
        return "one more", 0
    if equation.primitive in ADDS:
        ones = [slot for slot, t in enumerate(operator.operands) if t < 0 and _is_one(operator, slot)]
        return ("one more", 1 - ones[0]) if len(ones) == 1 else ("", -1)
    return "", -1


def is_step(operator: Operator) -> bool:
    """Whether such a step is all that it does."""
    equation = operator.equation
    return equation is not None and (equation.primitive in ADDS or equation.params.get("y") == 2)


def _is_one(operator: Operator, slot: int) -> bool:
    found = constant(operator, slot)
    return isinstance(found, tuple) and found[-1] in ("1", "1.0")


def fills(rule: Rule, slot: int, shape: Sequence[int]) -> bool:
    """Whether an operand is met whole in every dimension."""
    sizes = [math.prod([rule.factors[f].size for f in dim]) for dim in rule.operands[slot]]
    return sizes == list(shape)


def shifts(rule: Rule) -> bool:
    """Whether elements may come from other places of a dimension."""
    return any(f.kind in (Kind.WHOLE, Kind.ROLL) and f.size > 1 for f in rule.factors)


def reduces(rule: Rule) -> bool:
    kept = {f for dims in rule.results for dim in dims for f in dim}
    return rule.fusible and any(f not in kept and factor.size > 1 for f, factor in enumerate(rule.factors))


def in_a_loop(operator: Operator) -> bool:
    """Whether a compiler computes an operator element by element, inside the loop of its reader."""
    rule = operator.rule
    if operator.equation is None or not rule.known:
        return False
    if rule.product:
        return math.prod([f.size for f in rule.factors if f.kind is Kind.SUM]) == 1 and not rule.spatial
    if rule.touched and len(rule.operands) > 1 and rule.touched[-1] < 1:
        return False
    return rule.fusible or rule.flops == 0
