"""Runs a program whose stages lie on sub-meshes: each stage's plan, taken apart into what runs once and what per micro-batch.

Python hands the steps to the devices in the order of `order`, and never waits: what a step needs of others are arrays that are
still being computed. Values go from one sub-mesh to the next by `jax.device_put`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxplan import _jax
from jaxplan.apply import Replay, auto_mesh
from jaxplan.graph.flatten import scan_arity
from jaxplan.layout import Layout
from jaxplan.plan import Plan
from jaxplan.unlike.nouns import BACKWARD, FORWARD, PREPARE, UPDATE, Parts
from jaxplan.unlike.order import order
from jaxplan.unlike.programs import dtype_of
from jaxplan.unlike.stage import StageProgram, cut, loop_of, moved_constants, update_ends


def stage_mesh(mesh: Any, axis: str, stage: int) -> Any:
    """The devices of one stage; the axis stays, with a single device along it. Of an `AbstractMesh`, its shape."""
    place = mesh.axis_names.index(axis)
    if isinstance(mesh, Mesh):
        devices = np.take(mesh.devices, [stage], axis=place)
        return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)
    sizes = [1 if name == axis else size for name, size in mesh.shape.items()]
    return jax.sharding.AbstractMesh(tuple(sizes), mesh.axis_names, axis_types=mesh.axis_types)


@dataclass(frozen=True)
class Slice:
    """Some equations of a jaxpr as a jitted function. `reads`, `leaves`: variables of that jaxpr."""

    reads: tuple[Any, ...]
    leaves: tuple[Any, ...]
    run: Any

    def __call__(self, env: dict[Any, Any]) -> None:
        env.update(zip(self.leaves, self.run(*[env[v] for v in self.reads]), strict=True))


class StageRun:
    """One stage on its devices. Values are named by the variables of the stage's own program: of its outer jaxpr, and per
    micro-batch of the body of its loop. Its pieces, jitted: `first`; `phases`, by name, for a micro-batch; `updates`, by level.
    `keeps`: what of a micro-batch stays until it comes back; `arriving_as`: what arrives is called."""

    def __init__(self, program: StageProgram, plan: Plan, donate: frozenset[Any]) -> None:
        self.program, self.plan, self.mesh = program, plan, auto_mesh(plan.mesh)
        self._replay, self._loop = Replay(plan, self.mesh), loop_of(program)
        self._jaxpr = plan.traced.jaxpr.jaxpr
        self._body = self._loop.equation.params["jaxpr"]
        self._path = (self._loop.number,)
        consts, carries = scan_arity(self._loop.equation)
        self._consts = list(zip(self._loop.equation.invars[:consts], self._body.jaxpr.invars[:consts], strict=True))
        self._moved = moved_constants(plan, self._loop)
        self._firsts = self._loop.equation.invars[consts : consts + carries]
        self._held = self._body.jaxpr.invars[consts : consts + carries]
        self._next = self._body.jaxpr.outvars[:carries]
        self.row, *arriving = self._body.jaxpr.invars[consts + carries :]
        self.arriving_as = dict(zip(program.received, arriving, strict=True))
        self._sending = self._body.jaxpr.outvars[carries:]
        self._marks: dict[Any, tuple[Any, ...]] = {v: (*self._path, "carry", k) for k, v in enumerate(self._held)}
        others = [*range(consts), *range(consts + carries, len(self._body.jaxpr.invars))]
        self._marks.update((self._body.jaxpr.invars[k], (*self._path, "in", k)) for k in others)
        places = dict(zip(program.arguments, plan.input_layouts, strict=True))
        self.arguments = {v: self._sharding(places[v], a) for v, a in zip(program.arguments, plan.traced.in_avals, strict=True)}
        self.inputs = dict(zip(program.arguments, self._jaxpr.invars, strict=True))
        outs = list(zip(program.outcomes, self._jaxpr.outvars, plan.output_layouts, plan.traced.out_avals, strict=True))
        self.outcomes = {v: self._sharding(layout, aval) for v, _, layout, aval in outs}
        self.outputs = {v: inner for v, inner, _, _ in outs}
        self._env: dict[Any, Any] = {}
        self._flight: dict[int, dict[Any, Any]] = {}
        self._outside(donate)
        self._inside()

    def _sharding(self, layout: Layout, aval: Any) -> NamedSharding:
        return NamedSharding(self.mesh, self.plan.partition_spec(self.plan.spec(layout, len(aval.shape))))

    def arriving(self, value: Any) -> NamedSharding:
        """Where a micro-batch's part of a value that other stages send shall lie."""
        return NamedSharding(self.mesh, PartitionSpec(*self.arguments[value].spec[1:]))

    # ---- what runs once ------------------------------------------------------------------------------------------

    def _outside(self, donate: frozenset[Any]) -> None:
        equations, start = self._jaxpr.eqns, self._loop.number
        marks = update_ends(equations, start)
        bounds = [(0, start), *zip([start + 1, *marks], marks, strict=False)]
        slices = [cut(self._jaxpr, range(a, b)) for a, b in bounds]
        reads, leaves = slices[0]
        made = {v for e in equations[:start] for v in e.outvars}
        reads += [v for v in dict.fromkeys(outer for outer, _ in self._moved.values()) if v not in made and v not in reads]
        only = {v for v in leaves if v in {outer for outer, _ in self._moved.values()}} - self._read_elsewhere()
        slices[0] = reads, [*[v for v in leaves if v not in only], *self._moved]
        state = {self.inputs[v] for v, _ in self.program.state if v in donate}
        last = {v: k for k, (reads, _) in enumerate(slices) for v in reads}
        self.first, *self.updates = [
            self._compiled(slices[k], bounds[k], [v in state and last[v] == k for v in slices[k][0]]) for k in range(len(bounds))
        ]

    def _compiled(self, cut: tuple[list[Any], list[Any]], bounds: tuple[int, int], donated: Sequence[bool]) -> Slice:
        reads, leaves = cut
        replay, jaxpr = self._replay, self._jaxpr
        consts = dict(zip(jaxpr.constvars, self.plan.traced.jaxpr.consts, strict=True))
        places = {inner: (k, self.outcomes[v]) for k, (v, inner) in enumerate(self.outputs.items()) if inner in leaves}
        entering = {v: (*self._path, "carry", k) for k, v in enumerate(self._firsts) if not isinstance(v, _jax.Literal)}

        def run(*values: Any) -> list[Any]:
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                env = {**consts, **dict(zip(reads, values, strict=True))}
                replay.equations(jaxpr, range(*bounds), env, (), {})
                env.update({v: replay.boundary_read(env[o], mark) for v, (o, mark) in self._moved.items() if v in leaves})
                found = []
                for v in leaves:
                    value = replay.entering(env[v], entering[v]) if v in entering else env[v]
                    steps = replay.found.outputs.get(places[v][0], ()) if v in places else ()
                    found.append(replay.constrain(value, steps))
                return found

        run.__name__ = run.__qualname__ = f"stage_{self.program.stage}_{PREPARE if bounds[0] == 0 else UPDATE}"
        shardings = [places[v][1] if v in places else None for v in leaves]
        gone = tuple([k for k, flag in enumerate(donated) if flag])
        return Slice(tuple(reads), tuple(leaves), jax.jit(run, out_shardings=shardings, donate_argnums=gone))

    def _read_elsewhere(self) -> set[Any]:
        """What is read of what is prepared, apart from the loop's constants that are moved."""
        later = [v for n, e in enumerate(self._jaxpr.eqns) if n > self._loop.number for v in e.invars]
        still = [outer for outer, inner in self._consts if inner not in self._moved]
        return {v for v in (*later, *still, *self._firsts, *self._jaxpr.outvars) if not isinstance(v, _jax.Literal)}

    # ---- what runs per micro-batch -------------------------------------------------------------------------------

    def _inside(self) -> None:
        turn, end = self._loop.turn, len(self._body.jaxpr.eqns)
        self.phases = {FORWARD: self._per_row(range(turn)), BACKWARD: self._per_row(range(turn, end))}
        others = {*self._held, self.row, *[inner for _, inner in self._consts]}
        self.keeps = [v for v in self.phases[BACKWARD].reads if v not in others]

    def _per_row(self, numbers: range) -> Slice:
        replay, body, carries = self._replay, self._body, len(self._held)
        reads, leaves = cut(body.jaxpr, numbers)
        consts = dict(zip(body.jaxpr.constvars, body.consts, strict=True))
        sends = {v: k for k, v in enumerate(self._sending)}
        stores = {v: k for k, v in enumerate(self._next) if v in leaves}

        def run(*values: Any) -> list[Any]:
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                env = dict(consts)
                for v, value in zip(reads, values, strict=True):
                    env[v] = replay.boundary_written(value, self._marks[v]) if v in self._marks else value
                replay.equations(body.jaxpr, numbers, env, self._path, {})
                found = []
                for v in leaves:
                    value = env[v]
                    if v in sends:
                        value = replay.boundary_read(value, (*self._path, "out", carries + sends[v]))
                    elif v in stores:
                        value = replay.boundary_read(value, (*self._path, "carry", stores[v]), 1)
                    found.append(value)
                return found

        run.__name__ = run.__qualname__ = f"stage_{self.program.stage}_{BACKWARD if numbers.start else FORWARD}"
        leaving = dict(zip(self._sending, self.program.sent, strict=True))
        shardings = [
            NamedSharding(self.mesh, PartitionSpec(*self.outcomes[leaving[v]].spec[1:])) if v in leaving else None for v in leaves
        ]
        rewritten = {self._held[k] for k in stores.values()}
        gone = tuple([k for k, v in enumerate(reads) if v in rewritten])
        return Slice(tuple(reads), tuple(leaves), jax.jit(run, out_shardings=shardings, donate_argnums=gone))

    # ---- values by variable, in arrays or shapes alike --------------------------------------------------------------

    def stores(self, env: Mapping[Any, Any]) -> dict[Any, Any]:
        """What is summed up and gathered, as it begins; by variable of the loop's body. `env`: of the outer jaxpr."""
        return {v: _operand(first, env) for v, first in zip(self._held, self._firsts, strict=True)}

    def entering(self, env: Mapping[Any, Any]) -> dict[Any, Any]:
        """What every micro-batch reads alike, by variable of the loop's body."""
        return {inner: env[inner] if inner in self._moved else _operand(outer, env) for outer, inner in self._consts}

    def after(self, piece: Slice, env: Mapping[Any, Any]) -> dict[Any, Any]:
        """The stores that a piece has changed."""
        return {v: env[after] for v, after in zip(self._held, self._next, strict=True) if after in piece.leaves}

    def finals(self, stores: Mapping[Any, Any]) -> dict[Any, Any]:
        """The stores when all micro-batches are through, by variable of the outer jaxpr."""
        return dict(zip(self._loop.equation.outvars, [stores[v] for v in self._held], strict=False))

    # ---- one call ------------------------------------------------------------------------------------------------

    def start(self, inputs: Mapping[Any, Any]) -> None:
        """Prepare. `inputs`: of the program that was cut, already placed."""
        self._env = {self.inputs[v]: value for v, value in inputs.items()}
        self.first(self._env)
        self._flight = {}
        self._stores = self.stores(self._env)

    def step(self, phase: str, row: int, arrived: Mapping[Any, Any]) -> dict[Any, Any]:
        """One micro-batch, one way. `arrived`: what other stages have sent, by variable of the program that was cut. Gives what
        is to be sent."""
        piece = self.phases[phase]
        env = self.entering(self._env)
        env.update({**self._stores, **self._flight.pop(row, {}), self.row: np.int32(row)})
        env.update((self.arriving_as[v], value) for v, value in arrived.items())
        piece(env)
        self._stores.update(self.after(piece, env))
        sent = {v: env[inner] for v, inner in zip(self.program.sent, self._sending, strict=True) if inner in piece.leaves}
        if phase == FORWARD and self.has_backward:
            self._flight[row] = {v: env[v] for v in self.keeps if v in env}
        return sent

    @property
    def has_backward(self) -> bool:
        """Whether micro-batches come back to it."""
        return bool(self.phases[BACKWARD].leaves)

    def finish(self) -> None:
        """All micro-batches are through."""
        self._env.update(self.finals(self._stores))
        read = {v for piece in self.updates for v in piece.reads}
        read |= {v for v in self._jaxpr.outvars if not isinstance(v, _jax.Literal)}
        self._env, self._stores = {v: value for v, value in self._env.items() if v in read}, {}

    def update(self, level: int) -> None:
        """The update of one level."""
        self.updates[level](self._env)

    def put(self, value: Any, array: Any) -> None:
        """Hand a value of another stage to the update."""
        self._env[self.inputs[value]] = array

    def value(self, value: Any) -> Any:
        """A result, once it is there."""
        inner = self.outputs[value]
        return _operand(inner, self._env)

    def clear(self) -> None:
        """Let go of all arrays."""
        self._env, self._flight, self._stores = {}, {}, {}


def _operand(var: Any, env: Mapping[Any, Any]) -> Any:
    return np.asarray(var.val, dtype_of(var)) if isinstance(var, _jax.Literal) else env[var]


class StagedRun:
    """A whole program on its sub-meshes. Called with flat inputs; gives flat outputs."""

    def __init__(self, parts: Parts, programs: Sequence[StageProgram], plans: Sequence[Plan], donate: Iterable[int] = ()) -> None:
        self.parts, jaxpr = parts, parts.micro.jaxpr
        gone = frozenset([jaxpr.invars[k] for k in donate])
        self.stages = [StageRun(program, plan, gone) for program, plan in zip(programs, plans, strict=True)]
        self._of_update = {
            (part.stage, part.level): k
            for stage in range(parts.stages) for k, part in enumerate(parts.of(stage, UPDATE))
        }  # fmt: skip
        self.in_shardings = [self.stages[home].arguments[v] for v, home in zip(jaxpr.invars, parts.homes, strict=True)]
        self.out_shardings = self._out_shardings()

    def _out_shardings(self) -> list[NamedSharding]:
        jaxpr, ties = self.parts.micro.jaxpr, dict(self.parts.ties)
        found = []
        for position, var in enumerate(jaxpr.outvars):
            if position in ties:
                found.append(self.in_shardings[ties[position]])
            elif isinstance(var, _jax.Literal):
                found.append(NamedSharding(self.stages[0].mesh, PartitionSpec()))
            elif var in self.parts.makers:
                found.append(self.stages[self.parts.makers[var]].outcomes[var])
            else:
                found.append(self.in_shardings[jaxpr.invars.index(var)])
        return found

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        parts, jaxpr = self.parts, self.parts.micro.jaxpr
        values = dict(zip(jaxpr.constvars, parts.micro.traced.jaxpr.consts, strict=True))
        values.update(zip(jaxpr.invars, inputs, strict=True))
        given = []
        for stage in self.stages:  # all of them before any starts, which may reuse what others read, too
            own = (*[v for v, _ in stage.program.state], *stage.program.given)
            given.append({v: jax.device_put(values[v], stage.arguments[v]) for v in own})
        for stage, own in zip(self.stages, given, strict=True):
            stage.start(own)
        self._rows()
        for stage in self.stages:
            stage.finish()
        levels = sorted({part.level for part in parts.parts if part.phase == UPDATE})
        self._hand_on(-1)
        for level in levels:
            for number, stage in enumerate(self.stages):
                if (number, level) in self._of_update:
                    stage.update(self._of_update[number, level])
            self._hand_on(level)
        found = []
        for var, sharding in zip(jaxpr.outvars, self.out_shardings, strict=True):
            if isinstance(var, _jax.Literal):
                value = np.asarray(var.val, dtype_of(var))
            else:
                value = self.stages[parts.makers[var]].value(var) if var in parts.makers else values[var]
                value = value if value.dtype == dtype_of(var) else value.astype(dtype_of(var))
            found.append(jax.device_put(value, sharding))
        for stage in self.stages:
            stage.clear()
        return found

    def _rows(self) -> None:
        """All micro-batches, forward and backward."""
        arrived: dict[tuple[int, int], dict[Any, Any]] = {}
        backward = any(stage.has_backward for stage in self.stages)
        for number, phase, row in order(len(self.stages), self.parts.micro.microbatches, backward):
            sent = self.stages[number].step(phase, row, arrived.pop((number, row), {}))
            for other, stage in enumerate(self.stages):
                for v in stage.program.received:
                    if v in sent:
                        arrived.setdefault((other, row), {})[v] = jax.device_put(sent[v], stage.arriving(v))
            del sent  # nothing of it is kept while the next step runs

    def _hand_on(self, level: int) -> None:
        """What the update of other stages needs of what is there since that of a level (-1: before any)."""
        ready = {v for part in self.parts.parts for v in part.makes if (part.level if part.phase == UPDATE else -1) == level}
        for stage in self.stages:
            for v in stage.program.late:
                if v in ready:
                    stage.put(v, jax.device_put(self.stages[self.parts.makers[v]].value(v), stage.arguments[v]))
