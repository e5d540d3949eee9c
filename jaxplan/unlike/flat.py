"""A program as one list of equations: calls under `jax.jit` inlined, so that it can be cut anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from jaxplan import _jax
from jaxplan.trace import Traced

_INLINED = {_jax.jit_p: "jaxpr", _jax.closed_call_p: "call_jaxpr"}


def flat(traced: Traced) -> Traced:
    """The same program without calls that only group equations; loops, branches and rematerialised calls stay.

    An equation of a function of JAX's own has the line of the user's call.
    """
    closed = traced.jaxpr
    spec = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type) for v in closed.jaxpr.invars]
    return replace(traced, jaxpr=jax.make_jaxpr(lambda *inputs: _evaluate(closed.jaxpr, closed.consts, inputs))(*spec))


def read(var: Any, env: Mapping[Any, Any]) -> Any:
    """The value of a variable or literal."""
    return var.val if isinstance(var, _jax.Literal) else env[var]


def _evaluate(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))
    for equation in jaxpr.eqns:
        values = [read(var, env) for var in equation.invars]
        with _jax.user_context(equation):
            if equation.primitive in _INLINED:
                inner = equation.params[_INLINED[equation.primitive]]
                outs = _evaluate(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values)
            else:
                outs = _jax.bind(equation, values, 1)
        env.update(zip(equation.outvars, outs, strict=True))
    return [read(var, env) for var in jaxpr.outvars]
