"""Equations in an order, and in a form, in which layers that are written out are alike: what they pick for themselves comes
first, and sums over all of them start from zero."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxplan import _jax


@dataclass(frozen=True)
class Ordered:
    """A jaxpr's equations in another order in which they can run."""

    constvars: Sequence[Any]
    invars: Sequence[Any]
    eqns: Sequence[Any]
    outvars: Sequence[Any]

    def zeros(self) -> list[Any]:
        """The values of those of `constvars` that the jaxpr did not have."""
        return [_jax.zeros(v.aval.shape, v.aval.dtype) for v in self.constvars if isinstance(v, Made)]


@dataclass(frozen=True, eq=False)
class Made:
    """A variable that the jaxpr did not have."""

    aval: Any


Picks = Mapping[Any, tuple[Any, int]]
"""{variable: (a stack, the number of the one that it is)}."""


def picked_first(jaxpr: Any) -> tuple[Ordered, Picks]:
    """A jaxpr in which all that blocks pick for themselves is picked before the first of them: one of a stack of parameters or
    keys, a key folded with the number of the layer. That number stands in the equation, so that no block that picks is like
    another; and what is picked of the program's inputs, and keys, depend on no layer.
    """
    early = {*jaxpr.constvars, *jaxpr.invars}
    first, rest, slices, picks = list[Any](), list[Any](), dict[Any, tuple[Any, int]](), dict[Any, tuple[Any, int]]()
    for equation in jaxpr.eqns:
        reads = [v for v in equation.invars if not isinstance(v, _jax.Literal)]
        if equation.effects or not reads or not early.issuperset(reads) or not _picks(equation, slices):
            rest.append(equation)
            continue
        first.append(equation)
        early.update(equation.outvars)
        if equation.primitive is _SLICE:
            slices[equation.outvars[0]] = reads[0], equation.params["start_indices"][0]
        elif equation.primitive is _SQUEEZE and reads[0] in slices:
            picks[equation.outvars[0]] = slices[reads[0]]
    return Ordered(jaxpr.constvars, jaxpr.invars, [*first, *rest], jaxpr.outvars), picks


_SLICE, _SQUEEZE = _jax.primitives("slice squeeze")
_KEY_WORDS = frozenset(_jax.primitives("random_unwrap"))


def _picks(equation: Any, slices: Collection[Any]) -> bool:
    """Whether an equation, which reads nothing that a layer makes, takes the first dimension's elements one by one, or makes keys
    of keys."""
    operand, out = equation.invars[0].aval, equation.outvars[0].aval
    if equation.primitive is _SLICE:
        return len(out.shape) > 0 and out.shape == (1, *operand.shape[1:])
    if equation.primitive is _SQUEEZE:
        return equation.invars[0] in slices and equation.params["dimensions"] == (0,)
    return equation.primitive in _KEY_WORDS or all(_jax.is_key(v.aval.dtype) for v in equation.outvars)


ADDS = frozenset(_jax.primitives("add_any"))
"""What adds up cotangents."""


def with_first_terms(jaxpr: Ordered, short: Sequence[tuple[int, int, Sequence[Any]]]) -> Ordered:
    """The same with zeros added to first terms. The way back through layers that share an operand (the encoder's result, a bias)
    adds to the sum of the layers after; the last layer, which is first on the way back, starts the sum with an equation less.

    `short`: (start, period, what sums have come to before the first block) of runs of blocks. Only what starts a sum within less
    than a block's length before the run is changed; the same object where nothing does.
    """
    made = {v: number for number, equation in enumerate(jaxpr.eqns) for v in equation.outvars}
    starts: dict[int, list[Any]] = {}
    for start, period, firsts in short:
        for var in firsts:
            while made.get(var, -1) > start - period and jaxpr.eqns[made[var]].primitive in ADDS:
                var = jaxpr.eqns[made[var]].invars[0]
            if start - period < made.get(var, -1) < start:
                starts.setdefault(made[var], []).append(var)
    if not starts:
        return jaxpr
    adds = {e.invars[0]: e for e in jaxpr.eqns if e.primitive in ADDS and not isinstance(e.invars[0], _jax.Literal)}
    zeros: dict[Any, Made] = {}
    summed: dict[Any, Made] = {}
    found = []
    for number, equation in enumerate(jaxpr.eqns):
        if any(v in summed for v in equation.invars if not isinstance(v, _jax.Literal)):
            equation = equation.replace(invars=[v if isinstance(v, _jax.Literal) else summed.get(v, v) for v in equation.invars])
        found.append(equation)
        for var in starts.get(number, ()):
            zero, total = zeros.setdefault((var.aval.shape, var.aval.dtype), Made(var.aval)), Made(var.aval)
            found.append(adds[var].replace(invars=[zero, var], outvars=[total]))
            summed[var] = total
    outs = [v if isinstance(v, _jax.Literal) else summed.get(v, v) for v in jaxpr.outvars]
    return replace(jaxpr, constvars=[*jaxpr.constvars, *zeros.values()], eqns=found, outvars=outs)
