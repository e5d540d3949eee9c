"""Forward and backward in one: what stands between the two scans of a train step, and what of it one micro-batch can have.

Under `1f1b` a micro-batch turns round at the last stage as soon as it arrives there: all that leads from the forward scan's
results to the backward scan's operands (the head, the loss, their derivatives) is computed for it alone. That is right where
the rows stay apart or are added up, as in the layers themselves; where something else than a sum is made of the rows, the
schedule is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxplan import _jax
from jaxplan.graph.flatten import scan_arity
from jaxplan.pipeline.nouns import Chain, Kind, Path, Pipeline, PipelineError, Role
from jaxplan.pipeline.roles import Walk
from jaxplan.pipeline.rowwise import SAME, Edit, told


@dataclass(frozen=True)
class Fused:
    """The part of a jaxpr that runs as one loop. `forward`, `backward`: numbers of the scans' equations; `middle`: of those
    that are computed per micro-batch between them; `later`: of those that wait until all is done. `edits`: of the middle.
    `roles`: of what the middle computes, and of the forward scan's results. `leaving`: those of them that are read by what
    comes after.
    """

    path: Path
    forward: int
    backward: int
    middle: tuple[int, ...]
    later: tuple[int, ...]
    edits: Mapping[Path, Edit]
    roles: Mapping[Any, Role]
    leaving: tuple[Any, ...]
    entering: tuple[Role | None, ...]
    """Per carry of the backward scan, what to make of its first value: rows or a sum, where it is the same for all."""

    def before(self) -> Iterator[int]:
        """Equations that come before the loop, in order."""
        skipped = {self.forward, *self.middle, *self.later}
        return (number for number in range(self.backward) if number not in skipped)

    def inputs(self, jaxpr: Any) -> list[Any]:
        """What the middle reads and nobody in the loop makes."""
        read = dict.fromkeys(
            v for n in self.middle for v in jaxpr.eqns[n].invars if not isinstance(v, _jax.Literal) and v not in self.roles
        )
        return list(read)

    def makes(self, var: Any) -> bool:
        """Whether the loop makes a value."""
        return not isinstance(var, _jax.Literal) and var in self.roles

    def cuts(self, jaxpr: Any, var: Any) -> bool:
        """Whether the middle takes a micro-batch's rows of what it is given."""
        places = [(n, k) for n in self.middle for k, v in enumerate(jaxpr.eqns[n].invars) if v is var]
        edits = [(self.edits.get((*self.path, n)), k) for n, k in places]
        return any(edit is not None and k in edit.operands for edit, k in edits)


def fuse(jaxpr: Any, path: Path, pipeline: Pipeline) -> Fused:
    """The loop of a pipeline whose two scans stand in `jaxpr`, at `path`. Raises PipelineError where they cannot run as one,
    naming the operator that is in the way."""
    ahead, back = pipeline.chains
    forward, backward = ahead.path[-1], back.path[-1]
    first, second = jaxpr.eqns[forward], jaxpr.eqns[backward]
    walk, roles = Walk(pipeline.microbatches), dict[Any, Role]()
    late: dict[Any, str] = {}
    """What no micro-batch has before all are done, and why."""
    for var, role in zip(first.outvars, (*ahead.carries, *ahead.ys), strict=True):
        roles[var] = role
        if role.kind is Kind.TOTAL or var in first.outvars[len(ahead.carries) :]:
            late[var] = f"{told(first)} leaves it on all stages"
    middle, later = [], []
    for number in range(forward + 1, backward):
        equation = jaxpr.eqns[number]
        read = [v for v in equation.invars if not isinstance(v, _jax.Literal)]
        if not any(v in roles or v in late for v in read):
            continue
        why = next((late[v] for v in read if v in late), None)
        if why is None:
            try:
                outs = walk.equation(equation, [role_of(v, roles) for v in equation.invars], (*path, number))
            except PipelineError as error:
                why = str(error)
            else:
                middle.append(number)
                roles.update(zip(equation.outvars, outs, strict=True))
                continue
        later.append(number)
        late.update((v, why) for v in equation.outvars)
    entering = _check_backward(second, ahead, back, first, roles, late)
    readers = [v for n in (*later, *range(backward + 1, len(jaxpr.eqns))) for v in jaxpr.eqns[n].invars]
    asked = {v for v in (*readers, *jaxpr.outvars) if not isinstance(v, _jax.Literal)}
    leaving = tuple(v for v in roles if v in asked)
    return Fused(path, forward, backward, tuple(middle), tuple(later), dict(walk.edits), roles, leaving, entering)


def role_of(var: Any, roles: Mapping[Any, Role]) -> Role:
    """Literals, and what is made outside of the loop, are the same for every micro-batch."""
    return SAME if isinstance(var, _jax.Literal) else roles.get(var, SAME)


def _check_backward(
    equation: Any, ahead: Chain, back: Chain, forward: Any, roles: Mapping[Any, Role], late: Mapping[Any, str]
) -> tuple[Role | None, ...]:
    """Refuse what the backward scan reads and cannot have in time; what to make of the first values of its carries."""
    consts, carries = scan_arity(equation)
    residuals = dict(zip(forward.outvars[len(ahead.carries) :], ahead.ys, strict=True))
    made = [v if not isinstance(v, _jax.Literal) and (v in roles or v in late) else None for v in equation.invars]
    for var in made[:consts]:
        if var is not None:
            _refuse(equation, f"reads in every layer what is made from the end of the forward scan ({late.get(var, 'its rows')})")
    for var, role in zip(made[consts + carries :], back.xs, strict=True):
        if var is not None and not (residuals.get(var) == role or (residuals.get(var) == SAME and role.kind is Kind.CUT)):
            _refuse(equation, f"reads residuals that were changed on the way ({late.get(var, 'their rows lie otherwise')})")
    entering: list[Role | None] = []
    for var, role in zip(made[consts : consts + carries], back.carries, strict=True):
        if var is not None and var in late:
            _refuse(equation, f"starts from what no micro-batch can have before all are through: {late[var]}")
        have = SAME if var is None else roles[var]
        if role.kind is Kind.TOTAL and var is not None:
            _refuse(equation, "adds to a sum over rows that is made after the forward scan")
        if have not in (role, SAME):
            _refuse(equation, f"starts from {have}, where it carries {role}")
        entering.append(role if have == SAME and var is not None and role != SAME else None)
    return tuple(entering)


def _refuse(equation: Any, why: str) -> None:
    raise PipelineError(f"schedule='1f1b': {told(equation)} {why}; schedule='gpipe' needs nothing of the kind")


def alternating(jaxpr: Any, pipeline: Pipeline) -> Pipeline:
    """A pipeline whose schedule is `1f1b`, with its middle; any other as it is. `jaxpr`: the whole program's. Raises
    PipelineError where the program cannot run so."""
    if pipeline.schedule != "1f1b":
        return pipeline
    paths = [chain.path for chain in pipeline.chains]
    told_of = f"schedule='1f1b' takes one forward scan and its backward scan beside it; the pipeline has scans at {paths}"
    if not turns(pipeline.chains):
        raise PipelineError(told_of)
    if pipeline.chains[0].layers != pipeline.chains[1].layers:
        raise PipelineError(f"{told_of} with other layers on the stages")
    return replace(pipeline, middle=fuse(_jaxpr_at(jaxpr, paths[0][:-1]), paths[0][:-1], pipeline).middle)


def turns(chains: Sequence[Chain]) -> bool:
    """Whether chains are a forward scan and one backward beside it."""
    return len(chains) == 2 and chains[0].path[:-1] == chains[1].path[:-1] and [c.reverse for c in chains] == [False, True]


def _jaxpr_at(jaxpr: Any, path: Sequence[int]) -> Any:
    for number in path:
        (jaxpr,) = _jax.sub_jaxprs(jaxpr.eqns[number])
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return jaxpr
