"""Room `apply`: run a planned function: the same equations, with the plan's layouts constrained where it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxplan import _jax
from jaxplan.agree import check_agreement
from jaxplan.graph.flatten import scan_arity
from jaxplan.layout import Layout, Spec, spec_of
from jaxplan.plan import Plan

Path = tuple[Any, ...]


def auto_mesh(mesh: Mesh) -> Mesh:
    """The same devices with every axis left to the compiler between constraints."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def flat_function(plan: Plan, mesh: Mesh) -> Callable[..., list[Any]]:
    """The planned program over flat inputs and outputs."""
    replay = _Replay(plan, mesh)

    def planned(*inputs: Any) -> list[Any]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # whatever mesh, of whatever types, is set outside
            outs = replay.run(plan.traced.jaxpr, inputs, ())
            return [
                replay.constrain(value, plan.constraints.outputs.get(position, ())) for position, value in enumerate(outs)
            ]

    planned.__name__ = planned.__qualname__ = plan.traced.name
    return planned


class _Replay:
    """Evaluates jaxprs, constraining what operators read and write."""

    def __init__(self, plan: Plan, mesh: Mesh) -> None:
        self.plan, self.mesh = plan, mesh
        self.found = plan.constraints
        self.operators = plan.modelled.graph.operators
        self._shardings: dict[Spec, NamedSharding] = {}

    def sharding(self, spec: Spec) -> NamedSharding:
        known = self._shardings.get(spec)
        if known is None:
            known = self._shardings[spec] = NamedSharding(self.mesh, self.plan.partition_spec(spec))
        return known

    def constrain(self, value: Any, specs: Sequence[Spec]) -> Any:
        """One constraint per step: the compiler then takes the steps that were priced."""
        for spec in specs:
            if spec and getattr(value, "ndim", 0) == len(spec):
                value = jax.lax.with_sharding_constraint(value, self.sharding(spec))
        return value

    def run(self, closed: Any, inputs: Sequence[Any], path: Path) -> list[Any]:
        """A closed jaxpr."""
        return self.evaluate(closed.jaxpr, closed.consts, inputs, path)

    def evaluate(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any], path: Path) -> list[Any]:
        """The values of a jaxpr's outputs; `path` is where it stands in the graph."""
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))
        moved: dict[tuple[int, Spec], tuple[Any, Any]] = {}

        def read(var: Any) -> Any:
            return var.val if isinstance(var, _jax.Literal) else env[var]

        for number, equation in enumerate(jaxpr.eqns):
            values = [read(var) for var in equation.invars]
            here = (*path, number)
            control = _CONTROL.get(equation.primitive)
            with _jax.user_context(equation):
                if control is not None:
                    outs = control(self, equation, values, here)
                else:
                    operator = self.found.at[here]
                    for slot, value in enumerate(values):
                        for spec in self.found.reads.get((operator, slot), ()):
                            key = (id(value), spec)  # readers that want the same layout share one exchange
                            if key not in moved:
                                moved[key] = (value, self.constrain(value, (spec,)))
                            value = moved[key][1]
                        values[slot] = value
                    asks = operator is not None and self.operators[operator].asked is not None
                    outs = values if asks else _jax.bind(equation, values, self.mesh.size)  # what is asked for is constrained
                    outs = [self.written(out, operator, slot) for slot, out in enumerate(outs)]
            env.update(zip(equation.outvars, outs, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def boundary_read(self, value: Any, path: Path, slot: int = 0) -> Any:
        """A value on its way into (or out of) a loop, in the boundary's layout."""
        operator = self.found.at.get(path)
        return value if operator is None else self.constrain(value, self.found.reads.get((operator, slot), ()))

    def boundary_written(self, value: Any, path: Path, slot: int = 0) -> Any:
        """A value on the far side of a boundary."""
        operator = self.found.at.get(path)
        return value if operator is None else self.written(value, operator, slot)

    def written(self, value: Any, operator: int, slot: int) -> Any:
        return self.constrain(value, self.found.writes.get((operator, slot), ()))


def _scan(replay: _Replay, equation: Any, values: list[Any], path: Path) -> list[Any]:
    params, (consts, carries) = equation.params, scan_arity(equation)
    marks = [("carry", k - consts) if consts <= k < consts + carries else ("in", k) for k in range(len(values))]
    values = [replay.boundary_read(v, (*path, *mark)) for v, mark in zip(values, marks, strict=True)]

    def body(carry: Any, x: Any) -> Any:
        inner = [*values[:consts], *carry, *x]
        inner = [replay.boundary_written(v, (*path, *mark)) for v, mark in zip(inner, marks, strict=True)]
        outs = replay.run(params["jaxpr"], inner, path)
        state = [replay.boundary_read(v, (*path, "carry", k), 1) for k, v in enumerate(outs[:carries])]
        ys = [replay.boundary_read(v, (*path, "out", carries + k)) for k, v in enumerate(outs[carries:])]
        return tuple(state), tuple(ys)

    state, ys = jax.lax.scan(
        body, tuple(values[consts : consts + carries]), tuple(values[consts + carries :]),
        length=params["length"], reverse=params["reverse"], unroll=params["unroll"],
    )  # fmt: skip
    finals = [replay.boundary_written(v, (*path, "carry", k), 1) for k, v in enumerate(state)]
    return finals + [replay.boundary_written(v, (*path, "out", carries + k)) for k, v in enumerate(ys)]


def _while(replay: _Replay, equation: Any, values: list[Any], path: Path) -> list[Any]:
    params = equation.params
    split = params["cond_nconsts"]
    total = split + params["body_nconsts"]
    consts = [replay.boundary_read(v, (*path, "in", k)) for k, v in enumerate(values[:total])]
    initial = [replay.boundary_read(v, (*path, "carry", k)) for k, v in enumerate(values[total:])]

    def enter(numbers: range, carry: Any) -> list[Any]:
        inner = [replay.boundary_written(consts[k], (*path, "in", k)) for k in numbers]
        return inner + [replay.boundary_written(v, (*path, "carry", k)) for k, v in enumerate(carry)]

    def going(carry: Any) -> Any:
        return replay.run(params["cond_jaxpr"], enter(range(split), carry), (*path, "cond"))[0]

    def cond(carry: Any) -> Any:
        return jax.numpy.any(going(carry))

    def body(carry: Any) -> Any:
        outs = replay.run(params["body_jaxpr"], enter(range(split, total), carry), (*path, "body"))
        if params["cond_jaxpr"].out_avals[0].shape:  # under vmap: rows that have ended stay as they are
            outs = [_where_rows(going(carry), new, old) for new, old in zip(outs, carry, strict=True)]
        return tuple(replay.boundary_read(v, (*path, "carry", k), 1) for k, v in enumerate(outs))

    finals = jax.lax.while_loop(cond, body, tuple(initial))
    return [replay.boundary_written(v, (*path, "carry", k), 1) for k, v in enumerate(finals)]


def _where_rows(rows: Any, new: Any, old: Any) -> Any:
    """`new` where the leading dimensions say so, `old` elsewhere."""
    return jax.numpy.where(rows.reshape(rows.shape + (1,) * (new.ndim - rows.ndim)), new, old)


def _cond(replay: _Replay, equation: Any, values: list[Any], path: Path) -> list[Any]:
    def branch(number: int, closed: Any) -> Callable[..., tuple[Any, ...]]:
        def run(*operands: Any) -> tuple[Any, ...]:
            outs = replay.run(closed, operands, (*path, "branch", number))
            return tuple(replay.boundary_read(v, (*path, "out", k), number) for k, v in enumerate(outs))

        return run

    branches = [branch(number, closed) for number, closed in enumerate(equation.params["branches"])]
    index = values[0].astype(np.int32) if values[0].dtype == np.bool_ else values[0]
    outs = jax.lax.switch(index, branches, *values[1:])
    return [replay.boundary_written(v, (*path, "out", k)) for k, v in enumerate(outs)]


def _shard_map(replay: _Replay, equation: Any, values: list[Any], path: Path) -> list[Any]:
    marks = [(*path, "in", k) for k in range(len(values))]
    values = [replay.boundary_written(replay.boundary_read(v, m), m) for v, m in zip(values, marks, strict=True)]
    outs = _jax.bind_shard_map(equation, values, replay.mesh)
    return [replay.boundary_written(out, (*path, "out", k)) for k, out in enumerate(outs)]


def _call(parameter: str) -> Callable[[_Replay, Any, list[Any], Path], list[Any]]:
    def run(replay: _Replay, equation: Any, values: list[Any], path: Path) -> list[Any]:
        jaxpr = equation.params[parameter]
        return replay.evaluate(getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ()), values, path)

    return run


def _custom(replay: _Replay, equation: Any, values: list[Any], path: Path) -> list[Any]:
    def body(*inputs: Any) -> list[Any]:
        return replay.run(equation.params["call_jaxpr"], inputs, path)

    return _jax.rebind_custom(equation, body, values)


def _linear_solve(replay: _Replay, equation: Any, values: list[Any], path: Path) -> list[Any]:
    def body(*inputs: Any) -> list[Any]:
        return replay.run(equation.params["jaxprs"].solve, inputs, path)

    return _jax.rebind_solve(equation, body, values)


def _remat(replay: _Replay, equation: Any, values: list[Any], path: Path) -> list[Any]:
    def body(*inputs: Any) -> list[Any]:
        entries = replay.found.entries.get(path, ((),) * len(inputs))
        held = [replay.constrain(v, (spec,)) for v, spec in zip(inputs, entries, strict=True)]
        return replay.evaluate(equation.params["jaxpr"], (), held, path)

    return _jax.rebind_remat(equation, body, values)


_CONTROL: dict[Any, Callable[[_Replay, Any, list[Any], Path], list[Any]]] = {
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
    where the mesh spans processes that planned otherwise.
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
        specs = [self.plan.partition_spec(spec_of(layout, len(a.shape))) for layout, a in zip(layouts, avals, strict=True)]
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
        return self._jitted.lower(*[_abstract(leaf) for leaf in self._flatten(args, kwargs)])

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

    def _flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        for key, planned in self._static.items():
            given = kwargs.get(key, planned) if isinstance(key, str) else args[key] if key < len(args) else planned
            if given != planned:
                raise ValueError(f"static argument {key!r} is {given!r}, but this plan was made for {planned!r}; plan again")
        args = tuple(a for i, a in enumerate(args) if i not in self._static)
        kwargs = {k: v for k, v in kwargs.items() if k not in self._static}
        leaves, tree = jax.tree.flatten((args, kwargs))
        traced = self.plan.traced
        if tree != traced.in_tree:
            raise ValueError(f"{traced.name} was planned for arguments structured {traced.in_tree}, but was called with {tree}")
        for path, aval, leaf in zip(traced.in_paths, traced.in_avals, leaves, strict=True):
            shape = np.shape(leaf) if not hasattr(leaf, "shape") else leaf.shape
            if tuple(shape) != tuple(aval.shape):
                raise ValueError(f"{path} was planned with shape {aval.shape}, but has shape {tuple(shape)}; plan again")
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


def _abstract(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype) if hasattr(leaf, "dtype") else leaf
