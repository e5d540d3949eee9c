"""Room `apply`: run a planned function: the same equations, with the plan's layouts constrained where it says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxplan import _jax
from jaxplan.agree import check_agreement
from jaxplan.graph.flatten import scan_arity, total_path
from jaxplan.layout import Layout, Spec
from jaxplan.on_shards import ByHand
from jaxplan.partial_sums import Parts, along, evaluated, total, zeros
from jaxplan.pipeline.alternate import Side, run_fused
from jaxplan.pipeline.analysis import edits_of
from jaxplan.pipeline.execute import run_chain
from jaxplan.pipeline.fuse import Fused, fuse
from jaxplan.pipeline.nouns import Chain, Kind, Pipeline
from jaxplan.pipeline.roles import OUTS
from jaxplan.pipeline.rows import Rows
from jaxplan.pipeline.staged import Staged, whole
from jaxplan.plan import Constraints, Plan
from jaxplan.trace import abstract, has_dtype

Path = tuple[Any, ...]


def auto_mesh(mesh: Mesh) -> Mesh:
    """The same devices with every axis left to the compiler between constraints."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def flat_function(plan: Plan, mesh: Mesh) -> Callable[..., list[Any]]:
    """The planned program over flat inputs and outputs."""
    replay = Replay(plan, mesh)

    def planned(*inputs: Any) -> list[Any]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # whatever mesh, of whatever types, is set outside
            outs = replay.run(plan.traced.jaxpr, inputs, ())
            return [replay.constrain(value, plan.constraints.outputs.get(k, ())) for k, value in enumerate(outs)]

    planned.__name__ = planned.__qualname__ = plan.traced.name
    return planned


def _read(var: Any, env: Mapping[Any, Any]) -> Any:
    return var.val if isinstance(var, _jax.Literal) else env[var]


Moved = dict[tuple[int, Spec], tuple[Any, Any]]
"""{(id of a value, spec): (the value, the same in that layout)}."""


class _Anywhere(dict[Path, int]):
    """Operators of a program that has no plan: nothing is constrained."""

    def __missing__(self, path: Path) -> None:
        return None


class Replay:
    """Evaluates jaxprs, constraining what operators read and write; nothing where there is no plan."""

    def __init__(self, plan: Plan | None, mesh: Any) -> None:
        self.plan, self.mesh = plan, mesh
        self.found = Constraints({}, {}, {}, {}, _Anywhere()) if plan is None else plan.constraints
        self.operators = () if plan is None else plan.modelled.graph.operators
        self.by_hand = ByHand(plan)
        self._shardings: dict[Spec, NamedSharding] = {}
        self._moved: Moved = {}
        self.rows: Rows | None = None

    @property
    def pipeline(self) -> Pipeline | None:
        """The plan's, if there is one."""
        return None if self.plan is None else self.plan.pipeline

    def on_rows(self, rows: Rows) -> Replay:
        """The same for one micro-batch, inside of a region that is manual over the stage axis."""
        inner = copy.copy(self)
        inner.rows, inner.mesh, inner._shardings = rows, jax.sharding.get_abstract_mesh(), {}
        return inner

    def sharding(self, spec: Spec) -> NamedSharding:
        if spec not in self._shardings:
            assert self.plan is not None
            self._shardings[spec] = NamedSharding(self.mesh, self.plan.partition_spec(spec))
        return self._shardings[spec]

    def constrain(self, value: Any, specs: Sequence[Spec]) -> Any:
        """One constraint per step: the compiler then takes the steps that were priced."""
        if isinstance(value, Parts):
            return value.on(lambda stacked: self.constrain(stacked, [value.spec(spec) for spec in specs]))
        for spec in specs:
            if spec and getattr(value, "ndim", 0) == len(spec):
                if self.rows is not None and self.plan is not None and self.pipeline is not None:
                    stage, sizes = self.plan.axis_names.index(self.pipeline.axis), self.plan.modelled.numbers.sizes
                    spec = self.rows.fitting(spec, value.shape, stage, sizes)
                value = jax.lax.with_sharding_constraint(value, self.sharding(spec))
        return value

    def brought(self, value: Any, specs: Sequence[Spec]) -> Any:
        """The same, where readers in one jaxpr (loops among them) that want the same layout share one exchange."""
        for spec in specs:
            key = (id(value), spec)
            if key not in self._moved:
                self._moved[key] = (value, self.constrain(value, (spec,)))
            value = self._moved[key][1]
        return value

    def run(
        self, closed: Any, inputs: Sequence[Any], path: Path, moved: Moved | None = None, carries: int = 0
    ) -> list[Any]:
        """A closed jaxpr. `carries`: of its first so many outputs, those that go round a loop in parts are so."""
        outs = self.evaluate(closed.jaxpr, closed.consts, inputs, path, moved)
        parts = [self.parted((*path, "carry", k)) if k < carries else () for k in range(len(outs))]
        outs = [whole(self.summed(out, axes)) for out, axes in zip(outs, parts, strict=True)]
        return outs if self.rows is None else self.rows.edited(outs, (*path, OUTS))

    def evaluate(
        self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any], path: Path, moved: Moved | None = None
    ) -> list[Any]:
        """The values of a jaxpr's outputs (what a pipeline left on its stages may be `Staged`); `path` is where it stands in the
        graph. `moved`: what was moved for readers around it; None where they cannot share."""
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))
        moved = {} if moved is None else moved
        fused = self.fused(jaxpr, path)
        if fused is None:
            self.equations(jaxpr, range(len(jaxpr.eqns)), env, path, moved)
        else:
            self.equations(jaxpr, fused.before(), env, path, moved)
            env.update(_alternating(self, jaxpr, fused, env, moved))
            self.equations(jaxpr, (*fused.later, *range(fused.backward + 1, len(jaxpr.eqns))), env, path, moved)
        return [_read(var, env) for var in jaxpr.outvars]

    def fused(self, jaxpr: Any, path: Path) -> Fused | None:
        """The loop that forward and backward scan of a jaxpr become, where the pipeline alternates between them."""
        pipeline = self.pipeline
        if pipeline is None or pipeline.schedule != "1f1b" or self.rows is not None or pipeline.chains[0].path[:-1] != path:
            return None
        return fuse(jaxpr, path, pipeline)

    def equations(self, jaxpr: Any, numbers: Iterable[int], env: dict[Any, Any], path: Path, moved: Moved) -> None:
        """Evaluate some equations of a jaxpr. `env`: values by variable, which grows; `moved`: what was moved for a reader."""
        around, self._moved = self._moved, moved
        try:
            for number in numbers:
                self.equation(jaxpr.eqns[number], env, (*path, number))
        finally:
            self._moved = around

    def equation(self, equation: Any, env: dict[Any, Any], here: Path) -> None:
        """Evaluate one equation, which stands `here`."""
        values = [_read(var, env) for var in equation.invars]
        control = _CONTROL.get(equation.primitive)
        if equation.primitive not in _TAKES_STAGED:
            values = [whole(value) for value in values]
        operator = self.found.at[here] if control is None else -1
        if equation.primitive not in _TAKES_PARTS:
            values = [self.summed(value, self.found.sums.get(operator, ((),))[0]) for value in values]
        if self.rows is not None:
            values = self.rows.edited(values, here)
        with _jax.user_context(equation):
            if control is not None:
                outs = control(self, equation, values, here)
            else:
                for slot, value in enumerate(values):
                    values[slot] = self.brought(value, self.found.reads.get((operator, slot), ()))
                asks = operator is not None and self.operators[operator].asked is not None
                scattered = len(self.found.writes.get((operator, 0), ())) > 1
                fill = _jax.filling(equation, values) if scattered else None
                if operator in self.found.sums:
                    outs = [self.in_parts(equation, values, operator)]
                else:
                    outs = values if asks else self.bind(equation, values, here, fill is None)  # what is asked for is constrained
                outs = [self.written(out, operator, slot) for slot, out in enumerate(outs)]
                outs = outs if fill is None else [fill(out) for out in outs]
        env.update(zip(equation.outvars, outs, strict=True))

    def summed(self, value: Any, but: tuple[int, ...] = ()) -> Any:
        """Of partial sums the total, along all axes `but` those."""
        return total(value, self.mesh, but) if isinstance(value, Parts) else value

    def carried(self, value: Any, path: Path) -> Any:
        """A value that goes round in a loop, in parts where the plan says so; `path`: of the carry."""
        axes = self.parted(path)
        return along(value, axes, self.mesh) if axes else value

    def parted(self, path: Path) -> tuple[int, ...]:
        """The mesh axes along which a carry goes round in parts; `path`: of the carry."""
        return self.found.sums.get(self.found.at.get(path, -1), ((),))[0]

    def final(self, value: Any, path: Path, number: int) -> Any:
        """The final value of a carry of the loop at `path`; the total, where it went round in parts."""
        value = self.summed(self.boundary_written(value, (*path, "carry", number), 1))
        return self.boundary_written(value, total_path(path, number))

    def in_parts(self, equation: Any, values: list[Any], operator: int) -> Any:
        """The result of an equation that adds partial sums, or leaves one."""
        specs = [self.found.reads.get((operator, slot), ((),))[-1] for slot in range(len(values))]
        zero, scale = zeros(self.operators, operator), self.operators[operator].rule.scale
        return evaluated(equation, values, specs, zero, *self.found.sums[operator], self.mesh, scale)

    def bind(self, equation: Any, values: list[Any], path: Path, filled: bool = True) -> list[Any]:
        """The results of an equation; of a micro-batch's, with extents of a micro-batch. `filled`: as `_jax.filling` tells."""
        changed = {} if filled else _jax.UNFILLED
        if self.rows is None:
            return self.by_hand.bind(equation, values, self.found.at[path], self.mesh, changed)
        params = {**self.rows.params(path), **changed}
        return self.rows.checked(equation, _jax.bind(equation, values, self.mesh.size, params), path)

    @property
    def moved(self) -> Moved:
        """What was moved so far for readers of the jaxpr that is replayed, and of those that it calls."""
        return self._moved

    def boundary_read(self, value: Any, path: Path, slot: int = 0) -> Any:
        """A value on its way into (or out of) a loop, in the boundary's layout."""
        return self.constrain(value, self._boundary_specs(path, slot))

    def entering(self, value: Any, path: Path) -> Any:
        """The same before a loop begins: loops that read one value in one layout share the exchange. (Not inside of a loop's
        body: what is made there must not be met outside of it.)"""
        return self.brought(value, self._boundary_specs(path, 0))

    def leaving(self, value: Any, path: Path, slot: int, moved: Moved) -> Any:
        """The same at the end of a round, or of a branch, whose readers have `moved` what they read."""
        return self.shared(value, self._boundary_specs(path, slot), moved)

    def shared(self, value: Any, specs: Sequence[Spec], moved: Moved) -> Any:
        """`brought`, with readers that have `moved` what they read."""
        around, self._moved = self._moved, moved
        try:
            return self.brought(value, specs)
        finally:
            self._moved = around

    def _boundary_specs(self, path: Path, slot: int) -> Sequence[Spec]:
        operator = self.found.at.get(path)
        return () if operator is None else self.found.reads.get((operator, slot), ())

    def boundary_written(self, value: Any, path: Path, slot: int = 0) -> Any:
        """A value on the far side of a boundary."""
        operator = self.found.at.get(path)
        return value if operator is None else self.written(value, operator, slot)

    def written(self, value: Any, operator: int, slot: int) -> Any:
        return self.constrain(value, self.found.writes.get((operator, slot), ()))


def _scan(replay: Replay, equation: Any, values: list[Any], path: Path) -> list[Any]:
    params, (consts, carries) = equation.params, scan_arity(equation)
    values = [
        value if isinstance(value, Staged) else replay.entering(value, (*path, *mark))
        for value, mark in zip(values, _marks(equation), strict=True)
    ]
    pipeline = replay.pipeline
    chain = pipeline.chain_at(path) if pipeline is not None else None
    if chain is not None and pipeline is not None:
        outs = _pipelined(replay, equation, values, chain, pipeline)
    else:
        values = [whole(value) for value in values]
        state, ys = jax.lax.scan(
            _body(replay, equation, values[:consts], path),
            tuple(replay.carried(v, (*path, "carry", k)) for k, v in enumerate(values[consts : consts + carries])),
            tuple(values[consts + carries :]), length=params["length"], reverse=params["reverse"], unroll=params["unroll"],
        )  # fmt: skip
        outs = [*state, *ys]
    return [replay.final(v, path, k) for k, v in enumerate(outs[:carries])] + [
        v if isinstance(v, Staged) else replay.boundary_written(v, (*path, "out", carries + k))
        for k, v in enumerate(outs[carries:])
    ]


def _marks(equation: Any) -> list[Path]:
    """The boundaries of a scan's operands."""
    consts, carries = scan_arity(equation)
    return [("carry", k - consts) if consts <= k < consts + carries else ("in", k) for k in range(len(equation.invars))]


def _body(replay: Replay, equation: Any, consts: Sequence[Any], path: Path) -> Callable[[Any, Any], Any]:
    """The body of a scan, replayed."""
    _, carries = scan_arity(equation)

    def body(carry: Any, x: Any) -> Any:
        inner = [replay.boundary_written(v, (*path, *m)) for v, m in zip((*consts, *carry, *x), _marks(equation), strict=True)]
        moved: Moved = {}
        outs = replay.run(equation.params["jaxpr"], inner, path, moved, carries)
        ends = zip(outs, [(*path, "carry", k) for k in range(carries)], strict=False)
        state = [replay.carried(replay.leaving(v, mark, 1, moved), mark) for v, mark in ends]
        ys = [replay.leaving(v, (*path, "out", carries + k), 0, moved) for k, v in enumerate(outs[carries:])]
        return tuple(state), tuple(ys)

    return body


def _pipelined(replay: Replay, equation: Any, values: list[Any], chain: Chain, pipeline: Pipeline) -> list[Any]:
    """A scan over layers, run in stages."""
    side = _side(replay, equation, chain, pipeline)
    return run_chain(equation, chain, pipeline, replay.mesh, values, side.body_of, side.hold)


def _side(replay: Replay, equation: Any, chain: Chain, pipeline: Pipeline) -> Side:
    """A scan over layers, as its stages replay it."""
    edits = edits_of(equation, chain, pipeline.microbatches)

    def body_of(row: Any, consts: Sequence[Any]) -> Callable[[Any, Any], Any]:
        return _body(replay.on_rows(Rows(edits, row, pipeline.microbatches)), equation, consts, chain.path)

    def hold(what: str, number: int, value: Any) -> Any:
        kind = {"left": "out", "moved": "in", "kept": "in"}.get(what, what)
        first = {"in": len(chain.consts) + len(chain.carries), "out": len(chain.carries), "carry": 0}[kind]
        at = replay.found.at.get((*chain.path, kind, number + first), -1), 0
        on_way = what in ("moved", "kept")
        specs = (replay.found.reads if on_way else replay.found.writes).get(at, ())
        if not specs:
            return value
        inner = replay.on_rows(Rows(edits, None, pipeline.microbatches))
        if on_way:  # one dimension more or less: micro-batches, or layers
            return inner.constrain(value, [((),) * (value.ndim - len(spec)) + spec[-value.ndim :] for spec in specs])
        if what == "left":
            rows = chain.ys[number].kind is Kind.CUT
            return (inner if rows else replay).constrain(value, [((),) * rows + ((), *specs[-1][1:])])
        spec = specs[-1][what == "out" :]  # of a stacked result, what a layer has of it
        return inner.constrain(value, [((),) * (value.ndim - len(spec)) + spec])

    return Side(equation, chain, body_of, hold)


def _alternating(replay: Replay, jaxpr: Any, fused: Fused, env: Mapping[Any, Any], moved: Moved) -> dict[Any, Any]:
    """What the one loop makes of a forward scan, a backward scan and all between them. What they are given is brought to the
    layouts that they read before the loop begins, with all others who read it so (`moved`)."""
    pipeline = replay.pipeline
    assert pipeline is not None
    chains = dict(zip((fused.forward, fused.backward), pipeline.chains, strict=True))
    equations = {number: jaxpr.eqns[number] for number in chains}

    def middle(row: Any, values: Mapping[Any, Any]) -> Mapping[Any, Any]:
        inner = replay.on_rows(Rows(fused.edits, row, pipeline.microbatches))
        found = dict(values)
        there = {(id(values[v]), spec): (values[v], values[v]) for v, way in ways.items() for spec in way}
        inner.equations(jaxpr, fused.middle, found, fused.path, there)
        return found

    def side(number: int) -> Side:
        equation, here = equations[number], (*fused.path, number)
        given = [
            None if fused.makes(var) else replay.leaving(_read(var, env), (*here, *mark), 0, moved)
            for var, mark in zip(equation.invars, _marks(equation), strict=True)
        ]
        return replace(_side(replay, equation, chains[number], pipeline), given=given)

    outside = fused.inputs(jaxpr)
    asked = replay.found.asked(jaxpr, fused.path, outside, fused.middle)
    ways = {var: () if fused.cuts(jaxpr, var) else way for var, way in zip(outside, asked, strict=True)}
    entering = {var: replay.shared(env[var], way, moved) for var, way in ways.items()}
    made = run_fused(fused, pipeline, replay.mesh, entering, (side(fused.forward), side(fused.backward)), middle)
    for number, equation in equations.items():
        here, (_, carries) = (*fused.path, number), scan_arity(equation)
        for k, var in enumerate(equation.outvars):
            if var in made and not isinstance(made[var], Staged):
                last = k < carries
                made[var] = replay.final(made[var], here, k) if last else replay.boundary_written(made[var], (*here, "out", k))
    return made


def _while(replay: Replay, equation: Any, values: list[Any], path: Path) -> list[Any]:
    params = equation.params
    split = params["cond_nconsts"]
    total = split + params["body_nconsts"]
    consts = [replay.entering(v, (*path, "in", k)) for k, v in enumerate(values[:total])]
    initial = [replay.entering(v, (*path, "carry", k)) for k, v in enumerate(values[total:])]

    def enter(numbers: range, carry: Any) -> list[Any]:
        inner = [replay.boundary_written(consts[k], (*path, "in", k)) for k in numbers]
        return inner + [replay.boundary_written(v, (*path, "carry", k)) for k, v in enumerate(carry)]

    def going(carry: Any) -> Any:
        return replay.run(params["cond_jaxpr"], enter(range(split), carry), (*path, "cond"))[0]

    def cond(carry: Any) -> Any:
        return jax.numpy.any(going(carry))

    def body(carry: Any) -> Any:
        moved: Moved = {}
        outs = replay.run(params["body_jaxpr"], enter(range(split, total), carry), (*path, "body"), moved)
        if params["cond_jaxpr"].out_avals[0].shape:  # under vmap: rows that have ended stay as they are
            outs = [_where_rows(going(carry), new, old) for new, old in zip(outs, carry, strict=True)]
        return tuple(replay.leaving(v, (*path, "carry", k), 1, moved) for k, v in enumerate(outs))

    finals = jax.lax.while_loop(cond, body, tuple(initial))
    return [replay.boundary_written(v, (*path, "carry", k), 1) for k, v in enumerate(finals)]


def _where_rows(rows: Any, new: Any, old: Any) -> Any:
    """`new` where the leading dimensions say so, `old` elsewhere."""
    return jax.numpy.where(rows.reshape(rows.shape + (1,) * (new.ndim - rows.ndim)), new, old)


def _cond(replay: Replay, equation: Any, values: list[Any], path: Path) -> list[Any]:
    def branch(number: int, closed: Any) -> Callable[..., tuple[Any, ...]]:
        def run(*operands: Any) -> tuple[Any, ...]:
            moved: Moved = {}
            outs = replay.run(closed, operands, (*path, "branch", number), moved)
            return tuple(replay.leaving(v, (*path, "out", k), number, moved) for k, v in enumerate(outs))

        return run

    branches = [branch(number, closed) for number, closed in enumerate(equation.params["branches"])]
    index = values[0].astype(np.int32) if values[0].dtype == np.bool_ else values[0]
    outs = jax.lax.switch(index, branches, *values[1:])
    return [replay.boundary_written(v, (*path, "out", k)) for k, v in enumerate(outs)]


def _shard_map(replay: Replay, equation: Any, values: list[Any], path: Path) -> list[Any]:
    marks = [(*path, "in", k) for k in range(len(values))]
    values = [replay.boundary_written(replay.boundary_read(v, m), m) for v, m in zip(values, marks, strict=True)]
    outs = _jax.bind_shard_map(equation, values, replay.mesh)
    return [replay.boundary_written(out, (*path, "out", k)) for k, out in enumerate(outs)]


def _call(parameter: str) -> Callable[[Replay, Any, list[Any], Path], list[Any]]:
    def run(replay: Replay, equation: Any, values: list[Any], path: Path) -> list[Any]:
        jaxpr = equation.params[parameter]
        return replay.evaluate(getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ()), values, path, replay.moved)

    return run


def _custom(replay: Replay, equation: Any, values: list[Any], path: Path) -> list[Any]:
    asked = replay.found.asked(equation.params["call_jaxpr"].jaxpr, path)  # moved before, it is moved once for readers around too
    values = [replay.brought(value, specs) for value, specs in zip(values, asked, strict=True)]

    def body(*inputs: Any) -> list[Any]:
        there = {(id(value), spec): (value, value) for value, specs in zip(inputs, asked, strict=True) for spec in specs}
        return replay.run(equation.params["call_jaxpr"], inputs, path, there)

    return _jax.rebind_custom(equation, body, values)


def _linear_solve(replay: Replay, equation: Any, values: list[Any], path: Path) -> list[Any]:
    def body(*inputs: Any) -> list[Any]:
        return replay.run(equation.params["jaxprs"].solve, inputs, path)

    return _jax.rebind_solve(equation, body, values)


def _remat(replay: Replay, equation: Any, values: list[Any], path: Path) -> list[Any]:
    def body(*inputs: Any) -> list[Any]:
        entries = replay.found.entries.get(path, ((),) * len(inputs))
        held = [replay.constrain(v, (spec,)) for v, spec in zip(inputs, entries, strict=True)]
        return [whole(out) for out in replay.evaluate(equation.params["jaxpr"], (), held, path)]

    return _jax.rebind_remat(equation, body, values)


_TAKES_STAGED = frozenset((_jax.scan_p, _jax.jit_p, _jax.closed_call_p))
"""Primitives that hand on what lies on stages as it is."""

_TAKES_PARTS = frozenset((_jax.jit_p, _jax.closed_call_p, _jax.custom_vmap_p))
"""Primitives that hand on partial sums as they are."""

_CONTROL: dict[Any, Callable[[Replay, Any, list[Any], Path], list[Any]]] = {
    _jax.scan_p: _scan,
    _jax.while_p: _while,
    _jax.cond_p: _cond,
    _jax.jit_p: _call("jaxpr"),
    _jax.remat_p: _remat,
    _jax.shard_map_p: _shard_map,
    _jax.closed_call_p: _call("call_jaxpr"),
    _jax.custom_vmap_p: _call("call"),
    _jax.custom_jvp_call_p: _custom,
    _jax.custom_vjp_call_p: _custom,
    _jax.linear_solve_p: _linear_solve,
}
"""The same control flow that the graph recursed into, replayed."""


class PlannedFunction:
    """A planned function, compiled on first use. Called like the original; places its arguments by itself.

    Errors: ValueError if the arguments' structure, shapes or static values are not those that were planned for; `DifferentPlans`
    where the mesh spans processes that planned otherwise, TimeoutError where one of them does not come to run it (docs/apply.md).
    """

    def __init__(self, plan: Plan, static: dict[int | str, Any], donate: Sequence[int]) -> None:
        if not isinstance(plan.mesh, Mesh):
            shape = ", ".join(f"{axis}={size}" for axis, size in plan.axis_sizes.items())
            raise ValueError(
                f"this plan was made for an AbstractMesh, and has no devices to run on: it needs {plan.mesh.size} ({shape}), "
                f"this process sees {len(jax.devices())}: use plan.replan(mesh=...) with a mesh of devices"
            )
        self.plan, self._static = plan, static
        self._mesh = auto_mesh(plan.mesh)
        self._donate = frozenset(donate)
        self._agreed = False
        self._ins = self._shardings(plan.input_layouts, plan.traced.in_avals)
        self._outs = self._shardings(plan.output_layouts, plan.traced.out_avals)
        flat = flat_function(plan, self._mesh)
        self._jitted = jax.jit(flat, in_shardings=self._ins, out_shardings=self._outs, donate_argnums=tuple(donate))

        def inside(*inputs: Any) -> list[Any]:
            return _constrained(flat(*_constrained(inputs, self._ins)), self._outs)

        self._inside = jax.jit(inside)
        self.__name__ = plan.traced.name

    def _shardings(self, layouts: Sequence[Layout], avals: Sequence[Any]) -> list[NamedSharding]:
        specs = [self.plan.partition_spec(self.plan.spec(layout, len(a.shape))) for layout, a in zip(layouts, avals, strict=True)]
        return [NamedSharding(self._mesh, spec) for spec in specs]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = self._flatten(args, kwargs)
        if any(isinstance(leaf, _jax.Tracer) for leaf in leaves):
            return self.plan.traced.unflatten_outputs(self._called_inside(leaves))
        if not self._agreed:
            check_agreement(self.plan)
            self._agreed = True
        placed = [
            self._place(leaf, sharding, position in self._donate)
            for position, (leaf, sharding) in enumerate(zip(leaves, self._ins, strict=True))
        ]
        return self.plan.traced.unflatten_outputs(self._home(self._jitted(*placed)))

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Like `jax.jit(f).lower`; arrays or `jax.ShapeDtypeStruct`s."""
        return self._jitted.lower(*[abstract(leaf) for leaf in self._flatten(args, kwargs, shapes=True)])

    @property
    def mesh(self) -> Mesh:
        """The mesh it runs on."""
        return self.plan.mesh

    def on(self, mesh: Mesh) -> PlannedFunction:
        """The same on the devices of another mesh of the same axes and sizes."""
        if dict(mesh.shape) != dict(self.plan.mesh.shape):
            raise ValueError(f"this plan is for the mesh {dict(self.plan.mesh.shape)}, not for {dict(mesh.shape)}; replan it")
        return PlannedFunction(replace(self.plan, mesh=mesh), self._static, sorted(self._donate))

    def lower_planned(self) -> Any:
        """Lowered for the shapes that were planned for."""
        return self._jitted.lower(*[jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in self.plan.traced.in_avals])

    def _flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: bool = False) -> list[Any]:
        for key, planned in self._static.items():
            given = kwargs.get(key, planned) if isinstance(key, str) else args[key] if key < len(args) else planned
            if given != planned:
                raise ValueError(f"static argument {key!r} is {given!r}, but this plan was made for {planned!r}; plan again")
        args = tuple(a for i, a in enumerate(args) if i not in self._static)
        kwargs = {k: v for k, v in kwargs.items() if k not in self._static}
        leaves, tree = jax.tree.flatten((args, kwargs))
        traced = self.plan.traced
        if tree != traced.in_tree:
            raise ValueError(
                f"{traced.name} was planned for arguments structured {traced.in_tree}, but was called with {tree}; call it "
                "as it was planned, with the same arguments by position, by keyword and static, or plan again"
            )
        for path, aval, leaf in zip(traced.in_paths, traced.in_avals, leaves, strict=True):
            shape = np.shape(leaf) if not hasattr(leaf, "shape") else leaf.shape
            if tuple(shape) != tuple(aval.shape):
                raise ValueError(f"{path} was planned with shape {aval.shape}, but has shape {tuple(shape)}; plan again")
            if isinstance(leaf, jax.ShapeDtypeStruct) and not shapes:
                raise TypeError(f"{path} is a shape, not an array: shapes can be planned and lowered, but not run")
            if not has_dtype(leaf, aval.dtype):
                given = getattr(leaf, "dtype", type(leaf).__name__)
                raise ValueError(f"{path} was planned as {aval.dtype}, but is {given}; convert it, or plan again")
        return leaves

    def _place(self, leaf: Any, sharding: NamedSharding, donated: bool) -> Any:
        if isinstance(leaf, jax.Array):
            if leaf.sharding == sharding:
                return leaf
            if donated and not leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
                leaf = leaf.copy()  # device_put may reuse the caller's buffer, and a donated one must be ours
        return jax.device_put(leaf, sharding)

    def _called_inside(self, leaves: Sequence[Any]) -> list[Any]:
        """Called while something else is traced (another jit, a gradient): layouts are constraints, as nothing can be placed."""
        explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
        if not explicit:
            return self._inside(*leaves)
        specs = [sharding.spec for sharding in self._outs]
        return list(jax.sharding.auto_axes(self._inside, out_sharding=specs)(*leaves))  # type: ignore[arg-type]

    def _home(self, values: Sequence[Any]) -> list[Any]:
        """Results on the user's own mesh (its axes may be Explicit)."""
        if self._mesh == self.plan.mesh:
            return list(values)
        return [jax.device_put(value, NamedSharding(self.plan.mesh, value.sharding.spec)) for value in values]


def _constrained(values: Sequence[Any], shardings: Sequence[NamedSharding]) -> list[Any]:
    return [jax.lax.with_sharding_constraint(v, s) for v, s in zip(values, shardings, strict=True)]
