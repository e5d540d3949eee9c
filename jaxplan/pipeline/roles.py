"""The roles of all values of a body: jaxprs walked, equation by equation, control flow with everything else.

A walk gives the roles of the outputs from those of the inputs, and writes down the edits by which a replay of the same jaxpr
computes one micro-batch. Paths are those of room `graph`, so that a replay finds its constraints and its edits alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from typing import Any

from jaxplan import _jax
from jaxplan.graph.flatten import scan_arity
from jaxplan.pipeline.dimensions import CALLS
from jaxplan.pipeline.nouns import Kind, Path, PipelineError, Role
from jaxplan.pipeline.rowwise import SAME, UNTOUCHED, Edit, Nowhere, points_of, refuse, rows_through, sums_through, told

OUTS = "outs"
"""The mark of edits that belong to the outputs of a body."""

Control = Callable[["Walk", Any, list[Role], Path], list[Role]]


class Readers:
    """Of jaxprs, which equations read a value and which have effects, by number; each is read through once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, dict[Any, list[int]], list[int]]] = {}
        self._closed: dict[int, tuple[Any, bool]] = {}

    def closed(self, equation: Any) -> bool:
        """Whether an equation has a body of its own that is not looked into."""
        if id(equation) not in self._closed:
            closed = equation.primitive not in _SCALAR_BODIES and any(_jax.sub_jaxprs(equation))
            self._closed[id(equation)] = equation, closed
        return self._closed[id(equation)][1]

    def of(self, jaxpr: Any) -> tuple[dict[Any, list[int]], list[int]]:
        """({value: its readers}, the equations with effects)."""
        if id(jaxpr) not in self._known:
            readers, effectful = dict[Any, list[int]](), list[int]()
            for number, equation in enumerate(jaxpr.eqns):
                for var in equation.invars:
                    if not isinstance(var, _jax.Literal):
                        readers.setdefault(var, []).append(number)
                if equation.effects:
                    effectful.append(number)
            self._known[id(jaxpr)] = jaxpr, readers, effectful
        return self._known[id(jaxpr)][1:]


class Walk:
    """One walk for a number of micro-batches. `edits`: by the path of the equation, or of a body and `OUTS`. `shared`: the
    equations that micro-batches share, by path. `readers`: may be shared by walks of one program."""

    def __init__(self, microbatches: int, readers: Readers | None = None) -> None:
        self.microbatches = microbatches
        self._readers = Readers() if readers is None else readers
        self.edits: dict[Path, Edit] = {}
        self.shared: dict[Path, Any] = {}
        self._origins: dict[Any, str] = {}

    def jaxpr(self, jaxpr: Any, roles: Sequence[Role], path: Path) -> list[Role]:
        """The roles of the outputs of a jaxpr, from those of its inputs. Raises PipelineError.

        Only equations that read what is not the same for all are visited, in program order: a chain is looked for from every
        dimension of every carry, and most reach a few equations only.
        """
        env = {var: role for var, role in zip(jaxpr.invars, roles, strict=True) if role != SAME}
        readers, effectful = self._readers.of(jaxpr)
        seen = {number for var in env for number in readers.get(var, ())}.union(effectful)
        waiting = list(seen)
        heapify(waiting)
        while waiting:
            number = heappop(waiting)
            equation = jaxpr.eqns[number]
            ins = [SAME if isinstance(v, _jax.Literal) else env.get(v, SAME) for v in equation.invars]
            for var, role in zip(equation.outvars, self.equation(equation, ins, (*path, number)), strict=True):
                if role == SAME:
                    continue
                env[var] = role
                for reader in readers.get(var, ()):
                    if reader not in seen:
                        seen.add(reader)
                        heappush(waiting, reader)
        return [SAME if isinstance(v, _jax.Literal) else env.get(v, SAME) for v in jaxpr.outvars]

    def equation(self, equation: Any, roles: list[Role], here: Path) -> list[Role]:
        """The roles of the results of one equation."""
        self.edits.pop(here, None)
        if equation.effects:
            refuse(_effectful(equation), "has an effect beside its results, which would happen at every tick of the pipeline")
        if all(role.kind is Kind.SAME for role in roles):
            return [SAME] * len(equation.outvars)
        control = _CONTROL.get(equation.primitive)
        if control is not None:
            return self._inside(control, equation, roles, here)
        if self._readers.closed(equation):
            refuse(equation, "is a call that is not looked into, so that nobody knows whether it works row by row")
        if equation.primitive in UNTOUCHED:
            outs = roles[: len(equation.outvars)]
        elif any(role.kind is Kind.CUT for role in roles):
            outs, edit = rows_through(equation, roles, self.microbatches)
            self._keep(here, edit)
            self.shared[here] = equation
        else:
            origins = [self._origins.get(v, "") for v, r in zip(equation.invars, roles, strict=True) if r.kind is Kind.SUM]
            outs, edit = sums_through(equation, roles, next(filter(None, origins), "the loop"))
            self._keep(here, edit)
        self._remember(equation, roles, outs)
        return outs

    def points(self) -> int:
        """Points of the iteration spaces of the equations that micro-batches share."""
        return sum([points_of(equation) for equation in self.shared.values()])

    def _inside(self, control: Control, equation: Any, roles: list[Role], here: Path) -> list[Role]:
        try:
            return control(self, equation, roles, here)
        except Nowhere as error:
            file, line = _jax.source_line(equation)
            if not file:
                raise
            raise PipelineError(f"{error.name} at {file}:{line} {error.why}") from None

    def _keep(self, path: Path, edit: Edit) -> None:
        if edit.operands or edit.params or edit.shapes:
            self.edits[path] = edit

    def _remember(self, equation: Any, roles: Sequence[Role], outs: Sequence[Role]) -> None:
        """Where each sum was made."""
        if all(role.kind is not Kind.SUM for role in outs):
            return
        before = [self._origins.get(v) for v, r in zip(equation.invars, roles, strict=True) if r.kind is Kind.SUM]
        origin = next(filter(None, before), told(equation))
        self._origins.update((v, origin) for v, role in zip(equation.outvars, outs, strict=True) if role.kind is Kind.SUM)

    def body(self, equation: Any, jaxpr: Any, roles: Sequence[Role], wanted: Sequence[Role | None], path: Path) -> list[Role]:
        """Walk a body whose outputs shall have the roles `wanted` (None: any), with edits on its outputs where they are the same
        for all micro-batches and shall not be."""
        outs = self.jaxpr(jaxpr, roles, path)
        joined = [have if want is None else self.join(equation, want, have) for want, have in zip(wanted, outs, strict=True)]
        changed = {k: to for k, (have, to) in enumerate(zip(outs, joined, strict=True)) if have != to and have == SAME}
        self.edits.pop((*path, OUTS), None)
        self._keep((*path, OUTS), Edit(changed, {}))
        return joined

    def join(self, equation: Any, one: Role, other: Role) -> Role:
        """The role of what is one or the other."""
        if one == other or other == SAME:
            return one
        if one == SAME:
            return other
        if Kind.SUM in (one.kind, other.kind):
            refuse(equation, "carries rows of the batch in one round and a sum over them in another")
        refuse(equation, "carries the rows of the batch in one dimension in one round and in another in the next")

    def loop(self, equation: Any, carries: list[Role], once: Callable[[list[Role]], list[Role]]) -> list[Role]:
        """The roles of loop carries, which are those of what goes in and of what comes out of every round."""
        while True:
            outs = once(carries)
            joined = [self.join(equation, a, b) for a, b in zip(carries, outs, strict=True)]
            if joined == carries:
                return carries
            carries = joined

    def lifted(self, path: Path, before: Sequence[Role], after: Sequence[Role], first: int = 0) -> None:
        """Edits for operands, from number `first` on, that are the same for all but have to be rows, or sums."""
        found = {first + k: to for k, (have, to) in enumerate(zip(before, after, strict=True)) if have == SAME and to != SAME}
        known = self.edits.get(path, Edit({}, {}))
        self._keep(path, known._replace(operands={**known.operands, **found}))


def _effectful(equation: Any) -> Any:
    """The innermost equation that has the effects of one."""
    inner = [getattr(jaxpr, "jaxpr", jaxpr) for jaxpr in _jax.sub_jaxprs(equation)]
    return next((_effectful(e) for jaxpr in inner for e in jaxpr.eqns if e.effects), equation)


def points_in(jaxpr: Any) -> int:
    """Points of the iteration spaces of all equations of a jaxpr, those of loops and branches once."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive in _CONTROL:
            total += sum([points_in(getattr(inner, "jaxpr", inner)) for inner in _jax.sub_jaxprs(equation)])
        else:
            total += points_of(equation)
    return total


_SCALAR_BODIES = frozenset(_jax.primitives(
    "scatter scatter_add scatter_mul scatter_min scatter_max scatter_sub? reduce reduce_window select_and_scatter"
))  # fmt: skip
"""Primitives whose jaxprs combine two scalars: their rules say all."""


def inside_scan(equation: Any, roles: Sequence[Role]) -> list[Role]:
    """The roles of a scan's operands as its body sees them. Raises PipelineError where the loop itself goes over rows."""
    consts, carries = scan_arity(equation)
    found = list(roles[: consts + carries])
    for role in roles[consts + carries :]:
        if role.kind is Kind.CUT and role.dim == 0:
            refuse(equation, "loops over the rows of the batch one by one")
        found.append(role._replace(dim=role.dim - 1) if role.kind is Kind.CUT else role)
    return found


def stacked(role: Role) -> Role:
    """The role of an output of a scan's body, where it is stacked along a new first dimension."""
    return role._replace(dim=role.dim + 1) if role.kind is Kind.CUT else role


def _scan(walk: Walk, equation: Any, roles: list[Role], path: Path) -> list[Role]:
    consts, carries = scan_arity(equation)
    inner, body = inside_scan(equation, roles), equation.params["jaxpr"].jaxpr
    ys: list[Role] = []

    def once(state: list[Role]) -> list[Role]:
        ins = [*inner[:consts], *state, *inner[consts + carries :]]
        outs = walk.body(equation, body, ins, [*state, *[None] * (len(body.outvars) - carries)], path)
        ys[:] = outs[carries:]
        return outs[:carries]

    before = inner[consts : consts + carries]
    state = walk.loop(equation, before, once)
    walk.lifted(path, before, state, consts)
    return [*state, *map(stacked, ys)]


def _while(walk: Walk, equation: Any, roles: list[Role], path: Path) -> list[Role]:
    params = equation.params
    split = params["cond_nconsts"]
    total = split + params["body_nconsts"]

    def once(state: list[Role]) -> list[Role]:
        test = walk.jaxpr(params["cond_jaxpr"].jaxpr, [*roles[:split], *state], (*path, "cond"))
        if test != [SAME]:
            refuse(equation, "runs as long as the rows of the batch say, so that micro-batches would run for different times")
        return walk.body(equation, params["body_jaxpr"].jaxpr, [*roles[split:total], *state], state, (*path, "body"))

    state = walk.loop(equation, roles[total:], once)
    walk.lifted(path, roles[total:], state, total)
    return state


def _cond(walk: Walk, equation: Any, roles: list[Role], path: Path) -> list[Role]:
    if roles[0] != SAME:
        refuse(equation, "takes one branch or the other as the rows of the batch say")
    wanted: list[Role] = [SAME] * len(equation.outvars)
    for _ in range(2):  # what one branch makes of an output, the others have to
        for number, branch in enumerate(equation.params["branches"]):
            wanted = walk.body(equation, branch.jaxpr, roles[1:], wanted, (*path, "branch", number))
    return wanted


def _call(parameter: str) -> Control:
    def inner(walk: Walk, equation: Any, roles: list[Role], path: Path) -> list[Role]:
        jaxpr = equation.params[parameter]
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        origins = [walk._origins.get(v, "") if not isinstance(v, _jax.Literal) else "" for v in equation.invars]
        walk._origins.update((v, o) for v, o in zip(jaxpr.invars, origins, strict=True) if o)
        outs = walk.jaxpr(jaxpr, roles, path)
        walk._remember(equation, roles, outs)
        return outs

    return inner


_CONTROL: dict[Any, Control] = {
    _jax.scan_p: _scan,
    _jax.while_p: _while,
    _jax.cond_p: _cond,
    **{primitive: _call(parameter) for primitive, parameter in CALLS.items()},
}
"""Control flow that a walk goes into, as replays do; rows do not enter any other."""

__all__ = ["OUTS", "PipelineError", "Readers", "Walk", "inside_scan", "points_in", "stacked"]
