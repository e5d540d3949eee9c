"""Room `once`: a program without what it says twice, or for nobody.

Compilers merge equal operations and drop dead ones before they do anything else. What is planned should be the program that
is left: exchanges would be predicted twice and compiled once, and memory would hold both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxplan import _jax

_CALLS = ("jit", "pjit", "closed_call", "core_call")
"""Calls that compilers write out, and that mean what is in them."""
_LOOPS = ("scan", "while", "cond")
_ALONE = (
    "optimization_barrier", "remat", "remat2", "checkpoint", "shard_map", "sharding_constraint", "reshard", "rng_uniform",
    "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin", *_LOOPS,
)  # fmt: skip
"""What compilers do not merge, what is asked for at its very place, and what has derivatives of its own: those are not what a
body says, and a planned program may be differentiated."""


def computed_once(closed: Any) -> Any:
    """A closed jaxpr in which no body says again what it has computed, nor what nobody reads: compilers leave both out."""
    return _Once().told(closed)


class _Once:
    """Values by number: equal ones have one. Bodies that are equal objects stay so."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}
        self.known: dict[int, tuple[Any, Any]] = {}

    def number(self, key: Any) -> int:
        return self.numbers.setdefault(key, len(self.numbers))

    def literal(self, var: Any) -> int:
        """The number of a value that stands in the program; arrays are not compared."""
        return self.number((str(var.aval), repr(var.val)) if var.aval.ndim == 0 else id(var.val))

    def told(self, closed: Any) -> Any:
        """A body without repeats."""
        if id(closed) not in self.known:
            self.known[id(closed)] = closed, closed
            self.known[id(closed)] = closed, self._told(closed)
        return self.known[id(closed)][1]

    def _told(self, closed: Any) -> Any:
        jaxpr = closed.jaxpr
        names: dict[Any, Any] = {}
        of: dict[Any, int] = {var: self.number(object()) for var in (*jaxpr.constvars, *jaxpr.invars)}
        first: dict[int, Any] = {}
        kept = []
        for equation in jaxpr.eqns:
            results = self.results(equation, of)
            of.update(zip(equation.outvars, results, strict=True))
            read = [(var, number) for var, number in zip(equation.outvars, results, strict=True) if not _is_dropped(var)]
            if read and all(number in first for _, number in read) and not equation.effects:
                names.update({var: first[number] for var, number in read})
                continue
            first.update({number: var for var, number in read if number not in first})
            operands = [var if isinstance(var, _jax.Literal) else names.get(var, var) for var in equation.invars]
            params = {name: self._inside(equation, value) for name, value in equation.params.items()}
            changed = any(value is not equation.params[name] for name, value in params.items())
            if changed or any(a is not b for a, b in zip(operands, equation.invars, strict=True)):
                equation = equation.replace(invars=operands, params=params)
            kept.append(equation)
        outvars = [var if isinstance(var, _jax.Literal) else names.get(var, var) for var in jaxpr.outvars]
        kept = _needed(kept, outvars)
        if len(kept) == len(jaxpr.eqns) and all(a is b for a, b in zip(kept, jaxpr.eqns, strict=True)):
            return closed
        return closed.replace(jaxpr=jaxpr.replace(eqns=kept, outvars=outvars))

    def _inside(self, equation: Any, value: Any) -> Any:
        """A parameter, bodies in it without repeats."""
        if equation.primitive.name not in ("jit", "pjit", *_LOOPS):
            return value
        if isinstance(value, _jax.ClosedJaxpr):
            return self.told(value)
        if isinstance(value, tuple) and value and all(isinstance(one, _jax.ClosedJaxpr) for one in value):
            found = tuple([self.told(one) for one in value])
            return value if all(a is b for a, b in zip(found, value, strict=True)) else found
        return value

    def results(self, equation: Any, of: Mapping[Any, int]) -> list[int]:
        """The numbers of an equation's results."""
        operands = tuple([
            self.literal(v) if isinstance(v, _jax.Literal) else of[v] for v in equation.invars
        ])  # fmt: skip
        name = equation.primitive.name
        if name in _CALLS and not equation.effects:
            bodies = [p for p in equation.params.values() if isinstance(p, _jax.ClosedJaxpr)]
            if len(bodies) == 1 and not bodies[0].consts and len(bodies[0].jaxpr.invars) == len(operands):
                return self._called(bodies[0].jaxpr, operands)
        key: Any = object()
        if name not in _ALONE and name not in _CALLS and not equation.effects:
            key = equation.primitive, operands, tuple(equation.params.items())
            try:
                hash(key)
            except TypeError:  # a parameter that cannot be compared
                key = object()
        return [self.number((key, position)) for position in range(len(equation.outvars))]

    def _called(self, jaxpr: Any, operands: Sequence[int]) -> list[int]:
        of: dict[Any, int] = dict(zip(jaxpr.invars, operands, strict=True))
        for equation in jaxpr.eqns:
            of.update(zip(equation.outvars, self.results(equation, of), strict=True))
        return [self.literal(v) if isinstance(v, _jax.Literal) else of[v] for v in jaxpr.outvars]


def _needed(equations: Sequence[Any], outvars: Sequence[Any]) -> list[Any]:
    """Those that have effects, or results that somebody reads."""
    read = {var for var in outvars if not isinstance(var, _jax.Literal)}
    kept = []
    for equation in reversed(equations):
        if equation.effects or any(var in read for var in equation.outvars):
            kept.append(equation)
            read.update(var for var in equation.invars if not isinstance(var, _jax.Literal))
    return kept[::-1]


def _is_dropped(var: Any) -> bool:
    return type(var).__name__ == "DropVar"
