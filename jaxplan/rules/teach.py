"""The user's decorator: what jaxplan should know about a primitive it has never seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from jaxplan._jax import Primitive
from jaxplan.rules.nouns import Kind, Rule, einsum_rule
from jaxplan.rules.table import register

Kinds = Mapping[str, Kind | tuple[Kind, int]]
MakerOrNotation = TypeVar("MakerOrNotation", bound=Callable[..., Any] | str)


class RuleError(ValueError):
    """A rule that was taught does not fit its primitive, or the equation it was asked about."""


def rule(
    primitive: Primitive, *, kinds: Kinds | None = None, flops: float = 1.0, fusible: bool = False, by_hand: bool = False
) -> Callable[[MakerOrNotation], MakerOrNotation]:
    """Teach `primitive`'s rule, as notation or as a function that makes it.

        jaxplan.rule(my_matmul_p, flops=2)("b m k, b k n -> b m n")

        @jaxplan.rule(my_p)
        def my_rule(params, operands, results):      # things with .shape and .dtype
            return "b s d, d -> b s d"               # or a Rule

    In notation, a dimension named only among the operands is summed over (`Kind.SUM`), any other is parallel;
    `kinds` says otherwise: `{"s": Kind.WHOLE}`. `1` marks a dimension that is never sharded. `flops`:
    operations per point of the iteration space. `fusible`: the compiler would compute it inside a neighbour's
    loop. `by_hand`: the compiler would gather it (it has no partitioner for it, a custom call, say), but it may be bound to the
    parts of its operands with the parameters it has: each device then computes what it has; factors are parallel or whole.

    Raises `RuleError` (a ValueError), here if `primitive` is none, and when planning if a rule does not fit
    an equation.
    """
    if not isinstance(primitive, Primitive):
        raise RuleError(
            f"jaxplan.rule was given {primitive!r}, which is no JAX primitive. Give it the object made with "
            "jax.extend.core.Primitive('...'), not the function that binds it."
        )

    def teach(maker: MakerOrNotation) -> MakerOrNotation:
        def make(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
            made: Any = maker if isinstance(maker, str) else maker(params, operands, results)
            if isinstance(made, str):
                made = _from_notation(primitive, made, operands, results, kinds, flops, fusible, by_hand)
            return _checked(primitive, made, operands, results)

        register(primitive)(make)
        return maker

    return teach


def _from_notation(
    primitive: Primitive,
    notation: str,
    operands: Sequence[Any],
    results: Sequence[Any],
    kinds: Kinds | None,
    flops: float,
    fusible: bool,
    by_hand: bool,
) -> Rule:
    left, _, right = notation.partition("->")
    summed = _letters(left) - _letters(right)
    every = {**dict.fromkeys(summed, Kind.SUM), **(kinds or {})}
    strangers = every.keys() - _letters(notation.replace("->", " "))
    if strangers:
        raise RuleError(f"The rule of {primitive} gives kinds to {sorted(strangers)}, which {notation!r} does not name.")
    shapes = [a.shape for a in (*operands, *results)]
    try:
        return replace(einsum_rule(notation, shapes, every, flops=flops, fusible=fusible), by_hand=by_hand)
    except ValueError as error:
        raise RuleError(
            f"The rule of {primitive}, {notation!r}, does not fit an equation with operands of shapes "
            f"{[tuple(a.shape) for a in operands]} and results {[tuple(a.shape) for a in results]}: {error}"
        ) from error


def _letters(text: str) -> set[str]:
    for mark in "(),":
        text = text.replace(mark, " ")
    return set(text.split()) - {"1"}


def _checked(primitive: Primitive, made: Any, operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    if not isinstance(made, Rule):
        raise RuleError(f"The rule of {primitive} must be notation or a jaxplan Rule, but its maker returned {made!r}.")
    for what, terminals, avals in (("operands", made.operands, operands), ("results", made.results, results)):
        ranks, wanted = [len(dims) for dims in terminals], [len(a.shape) for a in avals]
        if ranks != wanted:
            raise RuleError(f"The rule of {primitive}, '{made}', has {what} of ranks {ranks}; the equation's have {wanted}.")
    return made
