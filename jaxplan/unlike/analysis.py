"""What of a program each micro-batch can have for itself, and where along the layers every equation belongs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxplan import _jax
from jaxplan.pipeline.dimensions import LikeDimensions
from jaxplan.pipeline.nouns import Kind, PipelineError, Role
from jaxplan.pipeline.reroll import contracts
from jaxplan.pipeline.roles import Walk
from jaxplan.pipeline.rowwise import SAME as SAME_ROLE, refuse, told
from jaxplan.trace import Traced, state_pairs
from jaxplan.unlike.nouns import ONCE, ROWS, SAME, Micro

LAYERS = 2
"""Products that micro-batches have to share, at least: what has fewer is no chain of layers."""
MOST_SEEDS = 4
"""Inputs that are tried as the only one with rows, where all that have the dimension together are refused."""


def micro_of(program: Traced, microbatches: int) -> Micro:
    """A flat program (`flat.flat`) for so many micro-batches.

    Every dimension of every input that is no state is tried for the rows of the batch; of those that can be cut the one is
    taken with which micro-batches share the most work. Raises PipelineError, naming for each the operator and line in the way.
    """
    jaxpr = program.jaxpr.jaxpr
    live = _live(jaxpr)
    refusals: dict[str, str] = {}
    best: tuple[int, Walk, dict[Any, Role], list[str], int] | None = None
    for rows, seeds, place in _seeds(program, microbatches):
        walk = Walk(microbatches)
        roles = dict(seeds)
        try:
            kinds = _kinds(jaxpr, live, walk, roles)
        except PipelineError as error:
            refusals.setdefault(str(error), place)
            continue
        why = _not_worth(program, kinds, roles)
        if why:
            refusals.setdefault(why, place)
            continue
        shared = walk.points()
        if (best is None or shared > best[0]):
            best = shared, walk, roles, kinds, rows
    if best is None:
        raise PipelineError(_told_all(program, microbatches, refusals))
    _, walk, roles, kinds, rows = best
    forward, places, reach = _places(jaxpr, kinds)
    return Micro(program, microbatches, rows, tuple(kinds), roles, dict(walk.edits), forward, places, reach)


def _not_worth(program: Traced, kinds: Sequence[str], roles: Mapping[Any, Role]) -> str:
    """Why what can be cut is no batch of a chain of layers, "" if it may be one. (The columns of a last layer's weight are rows
    for that layer alone; the features between two layers are, for these two.)"""
    jaxpr = program.jaxpr.jaxpr
    products = [kind for e, kind in zip(jaxpr.eqns, kinds, strict=True) if kind and contracts(e)]
    shared = products.count(ROWS)
    if shared < LAYERS or 2 * shared <= len(products):
        return f"micro-batches would share {shared} of {len(products)} layers, that is of products summed over a dimension"
    outputs = [v for v in jaxpr.outvars if not isinstance(v, _jax.Literal) and v in roles]
    if not state_pairs(program) and any(roles[v].kind is Kind.SUM and v.aval.size > 1 for v in outputs):
        return "what comes out would be sums of what micro-batches make, each as large as the whole"
    return ""


def _told_all(program: Traced, microbatches: int, refusals: Mapping[str, str]) -> str:
    if not refusals:
        return f"{program.name} has no input with rows that {microbatches} micro-batches divide"
    tried = "; ".join(f"were the rows in {place}: {why}" for why, place in refusals.items())
    return f"{program.name} cannot be cut into {microbatches} micro-batches: {tried}"


def _live(jaxpr: Any) -> list[bool]:
    """Per equation, whether an output needs it. Raises PipelineError for one with effects."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, _jax.Literal)}
    live = [False] * len(jaxpr.eqns)
    for number in range(len(jaxpr.eqns) - 1, -1, -1):
        equation = jaxpr.eqns[number]
        if equation.effects:
            refuse(equation, "has an effect beside its results, which would happen once for every micro-batch")
        if any(v in needed for v in equation.outvars):
            live[number] = True
            needed.update(v for v in equation.invars if not isinstance(v, _jax.Literal))
    return live


def _seeds(program: Traced, microbatches: int) -> Iterator[tuple[int, dict[Any, Role], str]]:
    """(rows, roles of the inputs, how to call it) of what may be the rows of the batch."""
    jaxpr = program.jaxpr.jaxpr
    state = {position for _, position in state_pairs(program)}
    free = [n for n in range(len(jaxpr.invars)) if n not in state] or list(range(len(jaxpr.invars)))
    free.sort(key=lambda n: -math.prod(jaxpr.invars[n].aval.shape))
    dimensions, met = LikeDimensions(jaxpr), set[tuple[int, int]]()
    for number in free:
        for dim, extent in enumerate(jaxpr.invars[number].aval.shape):
            if extent < 2 or extent % microbatches or (number, dim) in met:
                continue
            like = {n: d for n, d in dimensions.like(number, dim)[0].items() if n in free}
            roles = {n: _rows_in(jaxpr.invars[n].aval.shape, d, extent) for n, d in {**like, number: dim}.items()}
            known = {jaxpr.invars[n]: role for n, role in roles.items() if role is not None}
            met.update((n, role.dim) for n, role in roles.items() if role is not None)
            where = f"dimension {dim} of {program.in_paths[number]}"
            yield extent, known, where
            alone = [n for n in free if jaxpr.invars[n] in known][:MOST_SEEDS] if len(known) > 1 else []
            for n in alone:  # what else has as many is then the same for all, and cut where it meets rows
                yield extent, {jaxpr.invars[n]: known[jaxpr.invars[n]]}, f"{where}, {program.in_paths[n]} alone"


def _rows_in(shape: Sequence[int], dim: int, rows: int) -> Role | None:
    return Role(Kind.CUT, dim, shape[dim] // rows) if shape[dim] % rows == 0 else None


def _kinds(jaxpr: Any, live: Sequence[bool], walk: Walk, roles: dict[Any, Role]) -> list[str]:
    """Per equation what it is to a micro-batch; `roles` grows by what depends on rows. Raises PipelineError."""
    kinds: list[str] = []
    waiting: dict[Any, str] = {}
    for number, equation in enumerate(jaxpr.eqns):
        if not live[number]:
            kinds.append("")
            continue
        read = [SAME_ROLE if isinstance(v, _jax.Literal) else roles.get(v, SAME_ROLE) for v in equation.invars]
        late = next((waiting[v] for v in equation.invars if not isinstance(v, _jax.Literal) and v in waiting), None)
        rows = any(role.kind is Kind.CUT for role in read)
        if late is not None and rows:
            why = f"reads rows of the batch beside a sum over all of them (made by {late}), so that it needs the whole batch"
            refuse(equation, why)
        if late is not None:
            kinds.append(ONCE)
            waiting.update((v, late) for v in equation.outvars)
        elif rows:
            kinds.append(ROWS)
            outs = walk.equation(equation, read, (number,))
            roles.update((v, role) for v, role in zip(equation.outvars, outs, strict=True) if role != SAME_ROLE)
            waiting.update((v, told(equation)) for v, role in zip(equation.outvars, outs, strict=True) if role.kind is Kind.SUM)
        else:
            kinds.append(SAME)
    return kinds


def _places(jaxpr: Any, kinds: Sequence[str]) -> tuple[tuple[int, ...], dict[int, int], dict[Any, int]]:
    """(the forward equations, the place of every equation that reads rows, how far along each variable is read)."""
    rows = [number for number, kind in enumerate(kinds) if kind == ROWS]
    turn = next((number for number in rows if _jax.is_transposed(jaxpr.eqns[number])), len(kinds))
    forward = [number for number in rows if number < turn]
    if not forward:
        forward = rows
    places = {number: place for place, number in enumerate(forward)}
    reach: dict[Any, int] = {}
    for number, place in places.items():
        equation = jaxpr.eqns[number]
        reach.update((v, place) for v in equation.outvars)
    for number, place in places.items():
        reach.update((v, place) for v in jaxpr.eqns[number].invars if not isinstance(v, _jax.Literal))
    _reach_of_parameters(jaxpr, kinds, reach)
    made: dict[Any, int] = {}
    for number in rows:
        if number not in places:
            equation = jaxpr.eqns[number]
            read = [v for v in equation.invars if not isinstance(v, _jax.Literal)]
            bounds = [made.get(v, reach.get(v)) for v in read]
            places[number] = min([bound for bound in bounds if bound is not None], default=len(forward) - 1)
            made.update((v, places[number]) for v in equation.outvars)
    return tuple(forward), places, reach


def _reach_of_parameters(jaxpr: Any, kinds: Sequence[str], reach: dict[Any, int]) -> None:
    """What is the same for all micro-batches reaches as far as what is made of it; what is only made for the way back, as far as
    what it is made of."""
    same = [e for e, kind in zip(jaxpr.eqns, kinds, strict=True) if kind == SAME]
    for equation in reversed(same):
        far = max([reach[v] for v in equation.outvars if v in reach], default=None)
        if far is not None:
            for v in equation.invars:
                if not isinstance(v, _jax.Literal):
                    reach[v] = max(far, reach.get(v, -1))
    for equation in same:
        far = min([reach[v] for v in equation.invars if not isinstance(v, _jax.Literal) and v in reach], default=None)
        if far is not None:
            for v in equation.outvars:
                reach.setdefault(v, far)
