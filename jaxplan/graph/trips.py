"""How often a `while` loop runs."""

from __future__ import annotations

import math
from typing import Any

from jaxplan import _jax

_COUNTS = ("lt", "le", "gt", "ge")


def counted_trips(equation: Any) -> int | None:
    """How often a `while` runs, where its jaxprs say so: one compares a carried counter with a constant, the other adds a
    constant to it, and it starts from a constant. None otherwise."""
    params = equation.params
    test, body = params["cond_jaxpr"].jaxpr, params["body_jaxpr"].jaxpr
    consts = params["cond_nconsts"] + params["body_nconsts"]
    if len(test.eqns) != 1 or test.eqns[0].outvars[0] is not test.outvars[0] or test.eqns[0].primitive.name not in _COUNTS:
        return None
    compare, (left, right) = test.eqns[0].primitive.name, test.eqns[0].invars
    if isinstance(left, _jax.Literal):
        left, right = right, left
        compare = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}.get(compare, compare)
    counters = test.invars[params["cond_nconsts"] :]
    if not isinstance(right, _jax.Literal) or left not in counters:
        return None
    place = counters.index(left)
    start, inside = equation.invars[consts + place], body.invars[params["body_nconsts"] + place]
    step = next((e for e in body.eqns if e.outvars[0] is body.outvars[place]), None)
    if step is None or step.primitive.name not in ("add", "sub") or not isinstance(start, _jax.Literal):
        return None
    by = [v.val for v in step.invars if isinstance(v, _jax.Literal)]
    if len(by) != 1 or inside not in step.invars or (step.primitive.name == "sub" and step.invars[0] is not inside):
        return None
    stride = float(by[0]) * (-1 if step.primitive.name == "sub" else 1)
    span = (float(right.val) - float(start.val)) / stride if stride else math.inf
    upwards = compare in ("lt", "le")
    if not math.isfinite(span) or (stride > 0) != upwards:
        return None
    return max(0, math.floor(span) + 1 if compare in ("le", "ge") else math.ceil(span))
