"""Room `rolls`: the equations that turn a tensor round along a dimension become one, before anything is planned.

`jax.numpy.roll` is traced to two slices and their concatenation. Apart, each of them needs the dimension whole; together they
move a slab from every device to its neighbour, and XLA compiles them so (`FindRotateRightPattern` in
xla/service/spmd/spmd_partitioner.cc).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from jaxplan import _jax

INSIDE = {
    _jax.jit_p, _jax.closed_call_p, _jax.remat_p, _jax.scan_p, _jax.while_p, _jax.cond_p, _jax.custom_jvp_call_p,
    _jax.custom_vjp_call_p,
}  # fmt: skip
"""Calls, loops and branches: jaxprs among their parameters are searched too."""


def with_rolls(closed: Any) -> Any:
    """A closed jaxpr with every such group of equations as one `roll`, also in calls and loops; itself where there is none."""
    return _changed(closed, {})


def _changed(value: Any, known: dict[int, tuple[Any, Any]]) -> Any:
    """A parameter of an equation; jaxprs that are shared stay so."""
    if isinstance(value, tuple):
        parts = tuple([_changed(part, known) for part in value])
        return parts if any(new is not old for new, old in zip(parts, value, strict=True)) else value
    if not isinstance(value, (_jax.Jaxpr, _jax.ClosedJaxpr)):
        return value
    if id(value) not in known:
        jaxpr = getattr(value, "jaxpr", value)
        equations = _equations(jaxpr, known)
        new = value
        if equations is not None:
            inner = jaxpr.replace(eqns=equations)
            new = inner if isinstance(value, _jax.Jaxpr) and not hasattr(value, "jaxpr") else value.replace(jaxpr=inner)
        known[id(value)] = value, new
    return known[id(value)][1]


def _equations(jaxpr: Any, known: dict[int, tuple[Any, Any]]) -> list[Any] | None:
    """Those of a jaxpr with rolls in them; None where nothing changes."""
    found, changed = [], False
    for equation in jaxpr.eqns:
        if equation.primitive in INSIDE:
            params = {name: _changed(value, known) for name, value in equation.params.items()}
            if any(params[name] is not value for name, value in equation.params.items()):
                equation, changed = equation.replace(params=params), True
        found.append(equation)
    made: dict[Any, Any] = {}
    uses: Counter[Any] = Counter()
    if any(equation.primitive is _jax.concatenate_p for equation in found):
        made = {e.outvars[0]: e for e in found if e.primitive is _jax.slice_p}
        uses = Counter(v for vs in (jaxpr.outvars, *[e.invars for e in found]) for v in vs if not isinstance(v, _jax.Literal))
    gone = set()
    for number, equation in enumerate(found if made else ()):
        parts = [made.get(v) for v in equation.invars if not isinstance(v, _jax.Literal)]
        if equation.primitive is _jax.concatenate_p and len(equation.invars) == 2 and None not in parts and len(parts) == 2:
            shift = _shift(*parts, equation.params["dimension"])
            if shift and all(uses[part.outvars[0]] == 1 for part in parts):
                params = {"shift": shift, "dimension": equation.params["dimension"]}
                found[number] = equation.replace(primitive=_jax.roll_p, invars=parts[0].invars[:1], params=params)
                gone.update(id(part) for part in parts)
    return [equation for equation in found if id(equation) not in gone] if gone or changed else None


def _shift(head: Any, tail: Any, dimension: int) -> int:
    """By how many places two slices, put together, are their operand turned round (the shorter way); 0 where they are not."""
    operand = head.invars[0]
    if operand is not tail.invars[0] or isinstance(operand, _jax.Literal):
        return 0
    shape, at = operand.aval.shape, head.params["start_indices"][dimension]
    for part, start, stop in ((head, at, shape[dimension]), (tail, 0, at)):
        starts, stops, strides = (part.params[name] for name in ("start_indices", "limit_indices", "strides"))
        wanted = [(start, stop) if d == dimension else (0, extent) for d, extent in enumerate(shape)]
        if list(zip(starts, stops, strict=True)) != wanted or any(stride != 1 for stride in strides or ()):
            return 0
    return -at if 2 * at <= shape[dimension] else shape[dimension] - at
