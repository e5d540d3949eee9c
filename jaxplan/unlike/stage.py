"""The program of one stage as a whole: what it prepares, a loop over micro-batches, forward and backward, and its update.

It is what the planner is asked about: all that lies and happens on the stage, in the order and as often as it happens. What other
stages send stands among its arguments, stacked over micro-batches; what it sends, among its results.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxplan import _jax
from jaxplan.graph.flatten import scan_arity
from jaxplan.plan import Plan
from jaxplan.trace import Traced, trace
from jaxplan.unlike.nouns import BACKWARD, FORWARD, PREPARE, UPDATE, Micro, Part, Parts
from jaxplan.unlike.programs import PLACE, at_once, handed, on_rows, shape_of, store_of


@dataclass(frozen=True, eq=False)
class StageProgram:
    """The program of a stage, and what its flat arguments and results are in the program that was cut.

    `state`: (input, output) variables that go round here; `given`: other inputs read here; `received`: what micro-batches get
    from other stages; `late`: what the update gets from them. `results`: outputs of the program that are made here and do not go
    round; `sent`: what micro-batches hand to other stages; `told`: what the update, or the preparation, hands to them.
    """

    stage: int
    traced: Traced
    state: tuple[tuple[Any, Any], ...]
    given: tuple[Any, ...]
    received: tuple[Any, ...]
    late: tuple[Any, ...]
    results: tuple[Any, ...]
    sent: tuple[Any, ...]
    told: tuple[Any, ...]
    stores: tuple[Any, ...]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of the program that was cut, the variables of the flat arguments."""
        return (*[v for v, _ in self.state], *self.given, *self.received, *self.late)

    @property
    def outcomes(self) -> tuple[Any, ...]:
        """The same of the flat results."""
        return (*[v for _, v in self.state], *self.results, *self.sent, *self.told)


@dataclass(frozen=True)
class Loop:
    """The loop over micro-batches in a stage's program. `number`: of its equation; `turn`: the number of equations of its body
    that belong to the forward part; `places`: {(number in the body, number in the call there): the place along the layers}."""

    number: int
    equation: Any
    turn: int
    places: Mapping[tuple[int, int], int]


def loop_of(program: StageProgram) -> Loop:
    """The loop of a stage's program."""
    equations = program.traced.jaxpr.jaxpr.eqns
    number = next(n for n, e in enumerate(equations) if e.primitive is _jax.scan_p)
    body = equations[number].params["jaxpr"].jaxpr.eqns
    turn, places = len(body), dict[tuple[int, int], int]()
    for n, call in enumerate(body):
        if call.primitive is _jax.jit_p:
            if call.params["name"] == FORWARD:
                turn = n + 1
            for k, equation in enumerate(call.params["jaxpr"].jaxpr.eqns):
                known = re.search(rf"{PLACE}(\d+)", _jax.name_stack(equation))
                if known is not None:
                    places[n, k] = int(known[1])
    return Loop(number, equations[number], turn, places)


def update_ends(equations: Sequence[Any], loop: int) -> list[int]:
    """Behind which equations of a stage's program the levels of its update end. `loop`: the number of the loop."""
    last = range(loop + 1, len(equations))
    return [n + 1 for n in last if equations[n].primitive is _jax.jit_p and equations[n].params["name"] == UPDATE]


def cut(jaxpr: Any, numbers: range) -> tuple[list[Any], list[Any]]:
    """(what some equations of a jaxpr read, what of theirs other equations read, or leaves it)."""
    own = {v for n in numbers for v in jaxpr.eqns[n].outvars}
    known = {*jaxpr.constvars, *own}
    read = [v for n in numbers for v in jaxpr.eqns[n].invars if not isinstance(v, _jax.Literal) and v not in known]
    later = {v for n, e in enumerate(jaxpr.eqns) if n not in numbers for v in e.invars if not isinstance(v, _jax.Literal)}
    later |= {v for v in jaxpr.outvars if not isinstance(v, _jax.Literal)}
    return list(dict.fromkeys(read)), [v for n in numbers for v in jaxpr.eqns[n].outvars if v in later]


def moved_constants(plan: Plan, loop: Loop) -> dict[Any, tuple[Any, tuple[Any, ...]]]:
    """{variable of the loop's body: (that outside, the boundary's path)} of what lies elsewhere in the loop than before it: it is
    moved once, not for every micro-batch."""
    graph, body = plan.modelled.graph, loop.equation.params["jaxpr"].jaxpr
    consts, _ = scan_arity(loop.equation)
    nowhere = (-1,) * len(plan.axis_names)
    paths = {(loop.number, "in", k): k for k in range(consts)}
    found = {}
    for op in graph.operators:
        if op.path in paths and op.operands[0] >= 0:
            before, after = [plan.layouts.get(tensor, nowhere) for tensor in (op.operands[0], op.results[0])]
            k = paths[op.path]
            if before != after:
                found[body.invars[k]] = loop.equation.invars[k], op.path
    return found


def stage_program(parts: Parts, stage: int) -> StageProgram:
    """The program of one stage, traced."""
    micro = parts.micro
    jaxpr = micro.jaxpr
    inputs = dict.fromkeys((*jaxpr.invars, *jaxpr.constvars))
    own = [part for part in parts.parts if part.stage == stage]
    elsewhere = [part for part in parts.parts if part.stage != stage]
    by_row = [part for part in own if part.phase in (FORWARD, BACKWARD)]
    outputs = [v for v in jaxpr.outvars if not isinstance(v, _jax.Literal)]
    made = dict.fromkeys(v for part in own for v in part.makes)
    stores = tuple([v for part in by_row for v in part.gathers])

    ties = {i: o for o, i in parts.ties}
    pairs = [(v, jaxpr.outvars[ties[i]]) for i, v in enumerate(jaxpr.invars) if i in ties and parts.homes[i] == stage]
    state = tuple([(v, out) for v, out in pairs if not isinstance(out, _jax.Literal) and parts.makers.get(out) == stage])
    going = {v for v, _ in state}
    lying = [v for i, v in enumerate(jaxpr.invars) if parts.homes[i] == stage and v not in going]
    read = [v for part in own for v in part.reads if v in inputs and v not in going]
    given = tuple(dict.fromkeys([*lying, *read]))

    def foreign(some: Sequence[Part]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(v for part in some for v in part.reads if v not in inputs and v not in made))

    received = foreign(by_row)
    late = foreign([part for part in own if part.phase == UPDATE])
    out = {v for _, v in state}
    results = tuple(dict.fromkeys(v for v in outputs if parts.makers.get(v) == stage and v not in out))
    wanted = {v for part in elsewhere if part.phase in (FORWARD, BACKWARD) for v in part.reads}
    sent = tuple([v for part in by_row for v in handed(part) if v in wanted])
    needed = {v for part in elsewhere if part.phase == UPDATE for v in part.reads}
    told = tuple([v for v in made if v in needed and parts.makers[v] == stage])
    found = StageProgram(stage, micro.traced, state, given, received, late, results, sent, told, stores)
    return replace(found, traced=_traced(parts, own, found))


def _traced(parts: Parts, own: Sequence[Part], program: StageProgram) -> Traced:
    micro, m = parts.micro, parts.micro.microbatches

    def once(part: Part, env: dict[Any, Any]) -> None:
        made = _called(part.phase, lambda *values: at_once(micro, part, values), _of(env, part))
        env.update(zip(part.makes, made, strict=True))

    def stage(state: Any, given: Any, received: Any, late: Any) -> Any:
        env = dict(zip((*[v for v, _ in program.state], *program.given), (*state, *given), strict=True))
        env.update(zip(program.late, late, strict=True))
        for part in own:
            if part.phase == PREPARE:
                once(part, env)

        def body(stores: Any, x: Any) -> Any:
            row, arrived = x
            values = {**env, **dict(zip(program.received, arrived, strict=True))}
            held = dict(zip(program.stores, stores, strict=True))
            for phase in (FORWARD, BACKWARD):
                for part in own:
                    if part.phase == phase:
                        some, made = _row_part(parts, part, row, [held[v] for v in part.gathers], _of(values, part))
                        held.update(zip(part.gathers, some, strict=True))
                        values.update(zip(handed(part), made, strict=True))
            return tuple(held.values()), tuple([values[v] for v in program.sent])

        shapes = [store_of(micro, v) for v in program.stores]
        empty = tuple([_jax.zeros(shape.shape, shape.dtype) for shape in shapes])
        held, sent = jax.lax.scan(body, empty, (jnp.arange(m, dtype=jnp.int32), list(received)), length=m)
        env.update(zip(program.stores, held, strict=True))
        for part in own:
            if part.phase == UPDATE:
                once(part, env)
        return tuple([env[v] for _, v in program.state]), [env[v] for v in program.results], sent, [env[v] for v in program.told]

    spec = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v, _ in program.state]
    others = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in program.given]
    some = [shape_of(micro, v) for v in program.received]
    stacked = [jax.ShapeDtypeStruct((m, *s.shape), s.dtype) for s in some]
    last = [_told_shape(parts, v) for v in program.late]
    found = trace(stage, (tuple(spec), others, stacked, last), {}, keep_dead=True)
    paths = dict(zip(micro.jaxpr.invars, micro.traced.in_paths, strict=True))
    names = [paths.get(v) or _name(parts, v) for v in program.arguments]
    ends = dict(zip([v for v in micro.jaxpr.outvars if not isinstance(v, _jax.Literal)], micro.traced.out_paths, strict=False))
    return replace(
        found, name=f"{micro.traced.name}, stage {program.stage}", in_paths=tuple(names),
        out_paths=tuple([ends.get(v) or _name(parts, v) for v in program.outcomes]), donated=_donated(micro, program),
        apart=_calls(found),
    )  # fmt: skip


def _calls(program: Traced) -> frozenset[tuple[int, ...]]:
    """The paths of a stage's parts, each of which runs as a program of its own."""
    found = set[tuple[int, ...]]()
    for number, equation in enumerate(program.jaxpr.jaxpr.eqns):
        if equation.primitive is _jax.scan_p:
            inside = enumerate(equation.params["jaxpr"].jaxpr.eqns)
            found.update((number, k) for k, call in inside if call.primitive is _jax.jit_p)
        elif equation.primitive is _jax.jit_p:
            found.add((number,))
    return frozenset(found)


def _donated(micro: Micro, program: StageProgram) -> tuple[bool, ...]:
    """Per argument of a stage's program, whether its buffer may be reused: state that the whole program donates."""
    gone = {v for v, flag in zip(micro.jaxpr.invars, micro.traced.donated, strict=True) if flag}
    states = len(program.state)
    return tuple([k < states and v in gone for k, v in enumerate(program.arguments)])


def _told_shape(parts: Parts, var: Any) -> jax.ShapeDtypeStruct:
    """Of what an update reads from another stage: a store, or a value."""
    gathered = any(var in part.gathers for part in parts.parts)
    return store_of(parts.micro, var) if gathered else jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)


def _name(parts: Parts, var: Any) -> str:
    if var not in parts.makers:
        return "a constant"
    return f"stage {parts.makers[var]}: {var.aval.str_short(short_dtypes=True)}"


def _row_part(parts: Parts, part: Part, row: Any, stores: Sequence[Any], operands: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """A part on rows, as one call of its own, so that it can be told apart in the loop."""
    count = len(part.gathers)

    def run(row: Any, *values: Any) -> Any:
        held, made = on_rows(parts.micro, part, row, values[:count], values[count:])
        return [*held, *made]

    outs = _called(part.phase, run, [row, *stores, *operands])
    return outs[:count], outs[count:]


def _called(name: str, run: Any, values: Sequence[Any]) -> list[Any]:
    run.__name__ = run.__qualname__ = name
    return list(jax.jit(run)(*values))


def _of(env: Mapping[Any, Any], part: Part) -> list[Any]:
    return [env[v] for v in part.reads]
