"""What regions that are sharded by hand (`shard_map`) send: the collectives in their bodies, as often as these run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jaxplan import _jax
from jaxplan.graph.nouns import Sent
from jaxplan.graph.trips import counted_trips


def sent_inside(jaxpr: Any, while_trips: float, times: float = 1.0) -> tuple[Sent, ...]:
    """The collectives of a manual region's jaxpr, in program order; those in groups of devices within an axis are left out.
    `while_trips`: how often a loop runs that does not say; of a conditional the branch that sends most."""
    found: list[Sent] = []
    for equation in jaxpr.eqns:
        params, kind = equation.params, _jax.COLLECTIVES.get(equation.primitive)
        if kind is not None:
            found += _sent(kind, equation, times)
        elif equation.primitive is _jax.scan_p:
            found += sent_inside(params["jaxpr"].jaxpr, while_trips, times * params["length"])
        elif equation.primitive is _jax.while_p:
            known = counted_trips(equation)
            rounds = while_trips if known is None else known
            for part in ("cond_jaxpr", "body_jaxpr"):
                found += sent_inside(params[part].jaxpr, while_trips, times * rounds)
        elif equation.primitive is _jax.cond_p:
            found += max([sent_inside(branch.jaxpr, while_trips, times) for branch in params["branches"]], key=_weight)
        elif equation.primitive is _jax.linear_solve_p:
            found += sent_inside(params["jaxprs"].solve.jaxpr, while_trips, times)
        else:
            for inner in _jax.sub_jaxprs(equation):
                found += sent_inside(getattr(inner, "jaxpr", inner), while_trips, times)
    return tuple(found)


def _weight(sent: Sequence[Sent]) -> float:
    return math.fsum(one.nbytes * one.times for one in sent)


def _sent(kind: str, equation: Any, times: float) -> list[Sent]:
    params = equation.params
    named = params["axes"] if "axes" in params else params["axis_name"]
    axes = tuple([axis for axis in (named if isinstance(named, tuple | list) else (named,)) if isinstance(axis, str)])
    if not axes or params.get("axis_index_groups") is not None:
        return []
    if kind == "permute" and all(source == target for source, target in params["perm"]):
        return []
    avals = [var.aval for var in equation.invars]
    return [
        Sent(kind, axes, aval.dtype.itemsize * math.prod(aval.shape), tuple(aval.shape), str(aval.dtype), times, equation)
        for aval in avals
    ]
