"""The one table of rules, keyed by the primitive object, and the look-up that everything else uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from jaxplan._jax import Primitive
from jaxplan.rules.build import Builder
from jaxplan.rules.nouns import Rule


class Shaped(Protocol):
    """What a maker may ask of an operand or result: an abstract value, ShapeDtypeStruct or array will do."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...


Maker = Callable[[Mapping[str, Any], Sequence[Any], Sequence[Any]], Rule]
"""(the equation's parameters, its operands, its results, both `Shaped`) -> the equation's rule."""


@dataclass(frozen=True)
class Entry:
    """A maker, and what its answer depends on besides shapes (None: every parameter, and the dtypes)."""

    maker: Maker
    reads: tuple[str, ...] | None
    free: bool


_TABLE: dict[Primitive, Entry] = {}
_MADE: dict[Any, Rule] = {}


def register(*primitives: Primitive, reads: Sequence[str] | None = None, free: bool = False) -> Callable[[Maker], Maker]:
    """Decorator: the function under it makes the rules of `primitives`, in place of any maker they had.

    `reads`: the parameters the maker looks at; it is given these only, and then its answer may depend on
    nothing else but shapes. Left out, it is given all. `free`: costs nothing whatever its layout.
    """

    def keep(maker: Maker) -> Maker:
        for primitive in primitives:
            _TABLE[primitive] = Entry(maker, None if reads is None else tuple(reads), free)
        _MADE.clear()
        return maker

    return keep


def rule_of(primitive: Primitive, params: Mapping[str, Any], operands: Sequence[Shaped], results: Sequence[Shaped]) -> Rule:
    """The rule of one equation. Nothing known about the primitive: every dimension whole, and `known` False.

    Equal equations get the very same `Rule` object.
    """
    entry = _TABLE.get(primitive)
    reads = entry.reads if entry is not None else ()
    key: Any = (
        primitive,
        tuple([getattr(a, "shape", ()) for a in operands]),
        tuple([getattr(a, "shape", ()) for a in results]),
    )
    if reads is None:
        key += (tuple(params.items()), tuple([a.dtype if hasattr(a, "dtype") else str(a) for a in (*operands, *results)]))
    elif reads:
        key += tuple([params.get(name) for name in reads])
    try:
        rule = _MADE.get(key)
    except TypeError:  # a parameter that cannot be hashed: no memory of it
        return _make(entry, params, operands, results)
    if rule is None:
        rule = _MADE[key] = _make(entry, params, operands, results)
    return rule


def classify(primitive: Primitive) -> Literal["known", "free", "unknown"]:
    """Which of the three classes a primitive belongs to. Control flow, not in this table, is "unknown"."""
    entry = _TABLE.get(primitive)
    return "unknown" if entry is None else "free" if entry.free else "known"


def _make(entry: Entry | None, params: Mapping[str, Any], operands: Sequence[Shaped], results: Sequence[Shaped]) -> Rule:
    operands = [_shaped(a) for a in operands]
    results = [_shaped(a) for a in results]
    if entry is None:
        return replace(whole_rule(operands, results), known=False)
    if entry.reads is not None:
        params = {name: params.get(name) for name in entry.reads}
    rule = entry.maker(params, operands, results)
    return replace(rule, free=True) if entry.free and not rule.free else rule


def whole_rule(operands: Sequence[Shaped], results: Sequence[Shaped]) -> Rule:
    """Every dimension whole: operands gathered, every device does everything. One flop per element met."""
    shapes = [a.shape for a in (*operands, *results)]
    build = Builder()
    dims = build.whole(*shapes)
    elements = sum(math.prod(shape) for shape in shapes)
    return build.rule(dims[: len(operands)], dims[len(operands) :], flops=elements / build.points())


@dataclass(frozen=True)
class _NoShape:
    """A token or other value without a shape, seen as a scalar."""

    dtype: Any
    shape: tuple[int, ...] = ()


def _shaped(aval: Any) -> Any:
    return aval if hasattr(aval, "shape") else _NoShape(aval)
