"""Room `rolls`: the equations that turn a tensor round along a dimension become one, before anything is planned.

`jax.numpy.roll` is traced to two slices and their concatenation, its gradient to the parts of a split, each padded with zeros,
and their sum. Apart, each of these needs the dimension whole; together they move a slab from every device to its neighbour, and
XLA compiles them so where they are written as slices and their concatenation (`FindRotateRightPattern` in
xla/service/spmd/spmd_partitioner.cc). Shifts along one dimension that follow one another become one: of two, XLA's simplifier
makes slices that are none any more. Calls of nothing but shifts, as `roll` itself is one, are seen through for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxplan import _jax

_SLICE, _SPLIT, _PAD, _CONCATENATE, _ADD = _jax.primitives("slice split pad concatenate add_any")
_INSIDE = frozenset((
    _jax.jit_p, _jax.closed_call_p, _jax.remat_p, _jax.scan_p, _jax.while_p, _jax.cond_p, _jax.custom_jvp_call_p,
    _jax.custom_vjp_call_p,
))  # fmt: skip
"""Calls, loops and branches: jaxprs among their parameters are searched too."""
_TOLD_BY = frozenset((_CONCATENATE, _PAD))
"""Without any of these a jaxpr has no roll."""


class _Part(NamedTuple):
    """Elements `start` to `stop` of `source` along a dimension, which come to lie from `place` on; the equations in between."""

    source: Any
    start: int
    stop: int
    place: int
    equations: tuple[Any, ...]


def with_rolls(closed: Any, *, see_through: bool = True) -> Any:
    """A closed jaxpr with every such group of equations as one `roll`, also in calls and loops; itself where there is none.

    `see_through`: calls of nothing but rolls become these rolls; else all calls stay, for who counts on them.
    """
    return _Search(see_through).changed(closed)


class _Search:
    """Of one program. `known`: {id of a jaxpr: (the jaxpr, what becomes of it)}, so that jaxprs that are shared stay so."""

    def __init__(self, see_through: bool) -> None:
        self.see_through = see_through
        self.known: dict[int, tuple[Any, Any]] = {}

    def changed(self, value: Any) -> Any:
        """A parameter of an equation."""
        if type(value) is tuple:
            parts = tuple([self.changed(part) for part in value])
            return parts if any(new is not old for new, old in zip(parts, value, strict=True)) else value
        if not isinstance(value, (_jax.Jaxpr, _jax.ClosedJaxpr)):
            return value
        if id(value) not in self.known:
            jaxpr: Any = getattr(value, "jaxpr", value)
            equations, new = self.equations(jaxpr), value
            if equations is not None:
                inner = jaxpr.replace(eqns=equations)
                new = inner if jaxpr is value else value.replace(jaxpr=inner)
            self.known[id(value)] = value, new
        return self.known[id(value)][1]

    def equations(self, jaxpr: Any) -> list[Any] | None:
        """Those of a jaxpr with rolls among them; None where nothing changes."""
        found, told = dict[int, list[Any]](), False
        for number, equation in enumerate(jaxpr.eqns):
            if equation.primitive in _INSIDE:
                params = {name: self.changed(value) for name, value in equation.params.items()}
                if any(params[name] is not value for name, value in equation.params.items()):
                    call = equation.replace(params=params)
                    found[number] = _seen_through(call) if self.see_through else [call]
            elif equation.primitive in _TOLD_BY:
                told = True
        if not found and not told:
            return None
        equations = [e for number, equation in enumerate(jaxpr.eqns) for e in found.get(number, (equation,))]
        rolled = (_rolled(jaxpr, equations) if told else None) or (equations if found else None)
        return rolled and _one_by_one(jaxpr, rolled)


def _seen_through(equation: Any) -> list[Any]:
    """The rolls of a call that does nothing else; the call, of any other."""
    inner = equation.params["jaxpr"].jaxpr if equation.primitive is _jax.jit_p else None
    if inner is None or inner.constvars or any(e.primitive is not _jax.roll_p for e in inner.eqns):
        return [equation]
    if any(isinstance(v, _jax.Literal) for v in (*equation.invars, *inner.outvars)):
        return [equation]
    made = {v for e in inner.eqns for v in e.outvars}
    if len(set(inner.outvars)) < len(inner.outvars) or not made.issuperset(inner.outvars):
        return [equation]
    names = dict(zip(inner.invars, equation.invars, strict=True))
    names.update((v, _jax.Var(v.aval)) for e in inner.eqns for v in e.outvars)
    names.update(zip(inner.outvars, equation.outvars, strict=True))
    sides = [{"invars": [names[v] for v in e.invars], "outvars": [names[v] for v in e.outvars]} for e in inner.eqns]
    return [e.replace(**side, source_info=equation.source_info) for e, side in zip(inner.eqns, sides, strict=True)]


def _one_by_one(jaxpr: Any, equations: list[Any]) -> list[Any]:
    """Equations with rolls that follow one another along one dimension as one."""
    made = {e.outvars[0]: e for e in equations if e.primitive is _jax.roll_p}
    for number, equation in enumerate(equations):
        before = made.get(equation.invars[0]) if equation.primitive is _jax.roll_p else None
        dimension = equation.params["dimension"] if before is not None else -1
        if before is not None and before.params["dimension"] == dimension:
            extent = max(1, equation.outvars[0].aval.shape[dimension])
            shift = (before.params["shift"] + equation.params["shift"] + extent // 2) % extent - extent // 2
            params = {"shift": shift, "dimension": dimension}
            equations[number] = made[equation.outvars[0]] = equation.replace(invars=before.invars, params=params)
    used = {v for vs in (jaxpr.outvars, *[e.invars for e in equations]) for v in vs if not isinstance(v, _jax.Literal)}
    return [e for e in equations if e.primitive is not _jax.roll_p or e.outvars[0] in used]


def _rolled(jaxpr: Any, equations: list[Any]) -> list[Any] | None:
    """Equations with a roll in the place of the last one of each group, and the others gone; None where there is no group."""
    made = {v: e for e in equations if e.primitive in (_SLICE, _SPLIT, _PAD) for v in e.outvars}
    uses = Counter(v for vs in (jaxpr.outvars, *[e.invars for e in equations]) for v in vs if not isinstance(v, _jax.Literal))
    found, gone = list(equations), set[int]()
    for number, equation in enumerate(equations):
        if equation.primitive not in (_CONCATENATE, _ADD) or len(equation.invars) != 2:
            continue
        dimension, parts = _parts(equation, made) or (-1, [])
        shift = _shift(equation, parts, dimension) if parts else None
        inner = {id(e): e for part in parts for e in part.equations}
        if shift is not None and all(uses[v] == 1 for e in inner.values() for v in e.outvars):
            params = {"shift": int(shift), "dimension": int(dimension)}
            found[number] = equation.replace(primitive=_jax.roll_p, invars=[parts[0].source], params=params)
            gone.update(inner)
    return [equation for equation in found if id(equation) not in gone] if gone else None


def _parts(equation: Any, made: Mapping[Any, Any]) -> tuple[int, list[_Part]] | None:
    """(dimension, parts) that an equation puts together, as they come; None where it does something else."""
    makers: list[Any] = [None if isinstance(v, _jax.Literal) else made.get(v) for v in equation.invars]
    if equation.primitive is _CONCATENATE:
        dimension = equation.params["dimension"]
        parts = [_cut(v, maker, dimension) for v, maker in zip(equation.invars, makers, strict=True)]
        if parts[0] is not None and parts[1] is not None:
            return dimension, [parts[0], parts[1]._replace(place=parts[0].stop - parts[0].start)]
        return None
    if any(maker is None or maker.primitive is not _PAD for maker in makers):
        return None
    dims = {d for pad in makers for d, widths in enumerate(pad.params["padding_config"]) if any(widths)}
    if len(dims) != 1:
        return None
    (dimension,), found = dims, []
    for pad in makers:
        inner, filling = pad.invars
        part = None if isinstance(inner, _jax.Literal) else _cut(inner, made.get(inner), dimension)
        low, _, between = pad.params["padding_config"][dimension]
        if part is None or between or not isinstance(filling, _jax.Literal) or np.any(filling.val):
            return None
        found.append(part._replace(place=int(low), equations=(*part.equations, pad)))
    return dimension, found


def _cut(var: Any, maker: Any, dimension: int) -> _Part | None:
    """What a variable has of another along a dimension, and all of it along the others; None where it is no such part."""
    if maker is None or maker.primitive is _PAD:
        return None
    source, params = maker.invars[0], maker.params
    if maker.primitive is _SPLIT:
        sizes, number = params["sizes"], next(n for n, v in enumerate(maker.outvars) if v is var)
        start = sum(sizes[:number])
        return _Part(source, start, start + sizes[number], 0, (maker,)) if params["axis"] == dimension else None
    bounds = list(zip(params["start_indices"], params["limit_indices"], strict=True))
    rest = [bound == (0, n) for d, (bound, n) in enumerate(zip(bounds, source.aval.shape, strict=True)) if d != dimension]
    plain = all(rest) and all(stride == 1 for stride in params["strides"] or ())
    return _Part(source, *bounds[dimension], 0, (maker,)) if plain else None


def _shift(equation: Any, parts: Sequence[_Part], dimension: int) -> int | None:
    """By how many places two parts, put together, are their source turned round (the shorter way); None where they are not."""
    source, shape = parts[0].source, parts[0].source.aval.shape
    if source is not parts[1].source or isinstance(source, _jax.Literal) or equation.outvars[0].aval.shape != shape:
        return None
    first, second = sorted(parts, key=lambda part: (part.start, part.stop))
    extent, at = shape[dimension], first.stop
    if (first.start, first.place, second.start, second.stop, second.place) != (0, extent - at, at, extent, 0):
        return None
    return 0 if at in (0, extent) else -at if 2 * at <= extent else extent - at
