"""Explicit sharding: the `out_sharding=` and `jax.sharding.reshard` calls that say a plan in the user's own lines.

A program for mesh axes of type Explicit carries layouts in its types. Here the traced program is typed anew by JAX itself,
operator by operator, from the plan's layouts of the arguments on; wherever the type is not what was planned, a call is called
for. The backward pass is not gone through: JAX types it as the transpose of the lines that are said here.
"""

from __future__ import annotations

import linecache
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jaxplan import _jax
from jaxplan.export.nouns import Exporter, ExportError, Selection, Written
from jaxplan.graph.flatten import scan_arity
from jaxplan.layout import Spec
from jaxplan.plan import Plan

Path = tuple[Any, ...]

SAID: dict[Any, str] = {
    _jax.dot_general_p: "jnp.matmul, jnp.einsum or jax.lax.dot_general",
    _jax.gather_p: "x.at[...].get",
    _jax.reshape_p: "jnp.reshape",
    _jax.iota_p: "jnp.arange",
}
"""How users tell a primitive the layout of its result; others take no out_sharding, and their result is resharded."""


@dataclass(frozen=True)
class ExplicitCall:
    """One call to write. `file`, `line`: of the user's line ("" and 0 where JAX does not know it). `primitive`: what the line
    does there. `call`: "out_sharding" or "reshard"; `spec`: to what. `what`: the array: an input's path, or what made it;
    `operand`: its place among the operands, -1 for the result. `kind`: float32[8,4]."""

    file: str
    line: int
    primitive: str
    call: str
    spec: PartitionSpec
    what: str
    operand: int
    kind: str
    by: str = ""

    def __str__(self) -> str:
        spec = str(self.spec).replace("PartitionSpec", "P")
        if self.call == "out_sharding":
            return f"out_sharding={spec} for {self.primitive}, {self.kind} ({self.by})"
        if self.primitive == "return":
            return f"jax.sharding.reshard(_, {spec}) of the output {self.by}, {self.kind}: {self.what}"
        place = "the result" if self.operand < 0 else f"operand {self.operand}"
        return f"jax.sharding.reshard(_, {spec}) of {place} of {self.primitive}, {self.kind}: {self.what}"


@dataclass(frozen=True)
class ExplicitCalls:
    """All calls, in program order; printing it gives them by source line. `refused`: lines that cannot be said in Explicit mode
    as planned, each with the primitive."""

    calls: tuple[ExplicitCall, ...]
    inputs: tuple[tuple[str, PartitionSpec], ...]
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = ["Place the arguments (jax.device_put, or plan.in_shardings):"]
        lines += [f"  {path}: {_show(spec)}" for path, spec in self.inputs if any(spec)] or ["  all of them whole"]
        lines += ["", "Write:" if self.calls else "Nothing else has to be written."]
        for (file, line), found in groupby(_by_line(self.calls), key=lambda call: (call.file, call.line)):
            linecache.checkcache(file)
            text = linecache.getline(file, line).strip()
            lines += [f"  {os.path.basename(file)}:{line}  {text}".rstrip() if file else "  at the end"]
            lines += [f"    {call}" for call in found]
        if self.refused:
            lines += ["", "Cannot be said (leave these lines to jax.sharding.auto_axes):", *[f"  {one}" for one in self.refused]]
        return "\n".join(lines)


def build(selection: Selection) -> ExplicitCalls:
    """The calls for the whole function; what is selected does not matter. Raises ExportError for a plan with a pipeline."""
    plan = selection.plan
    if plan.pipeline is not None:
        raise ExportError(
            "this plan lays a mesh axis along the layers, as a pipeline, which layouts in types cannot say: run plan.jit(), or "
            "plan with pipeline=None"
        )
    closed = plan.traced.jaxpr
    walk = _Walk(plan, _said_elsewhere(closed.jaxpr))
    places = zip(plan.traced.in_paths, plan.input_layouts, plan.traced.in_avals, strict=True)
    inputs = [_Value(plan.spec(layout, len(aval.shape)), path) for path, layout, aval in places]
    with jax.sharding.use_abstract_mesh(walk.mesh):
        walk.outputs(walk.run(closed.jaxpr, inputs, ()))
    specs = [(path, plan.partition_spec_of(number)) for number, path in enumerate(plan.traced.in_paths)]
    return ExplicitCalls(tuple(walk.calls), tuple(specs), tuple(walk.refused))


def write_explicit(found: ExplicitCalls) -> Written:
    """The calls as a text file, and as what JSON holds."""
    calls = [{**asdict(call), "spec": list(call.spec)} for call in found.calls]
    data = {"inputs": {path: list(spec) for path, spec in found.inputs}, "calls": calls, "refused": list(found.refused)}
    return Written(f"{found}\n", data)


class _Value(NamedTuple):
    """A value while typing: its layout, and what it is to the user. `loose`: a broadcast, which `jax.numpy` lays out like what it
    meets; or a gradient, which JAX lays out like what it is the gradient of. `after`: computed from gradients."""

    spec: Spec
    name: str
    loose: bool = False
    after: bool = False


class _Walk:
    """Types jaxprs, noting a call wherever the type is not the plan's."""

    def __init__(self, plan: Plan, silent: frozenset[Any]) -> None:
        sizes, names = tuple(plan.axis_sizes.values()), plan.axis_names
        self.mesh = AbstractMesh(sizes, names, axis_types=(AxisType.Explicit,) * len(names))
        self.plan, self.found, self.silent = plan, plan.constraints, silent
        self.line = ("", 0)
        self.calls: dict[ExplicitCall, None] = {}
        self.refused: dict[str, None] = {}

    def run(self, jaxpr: Any, inputs: Sequence[_Value], path: Path) -> list[_Value]:
        """The values of a jaxpr's outputs; constants are whole."""
        env = {var: _Value(((),) * len(var.aval.shape), "a constant") for var in jaxpr.constvars}
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> _Value:
            return _Value(((),) * np.ndim(atom.val), "a literal") if isinstance(atom, _jax.Literal) else env[atom]

        around = self.line
        for number, equation in enumerate(jaxpr.eqns):
            here, values = (*path, number), [read(atom) for atom in equation.invars]
            line = _jax.source_line(equation)
            self.line = line if line[1] else around  # what a library wrote was called for on the line around it
            control = _CONTROL.get(equation.primitive)
            if _jax.is_transposed(equation) or equation.primitive is _jax.shard_map_p:
                outs = self.planned(equation, here)
            elif control is not None:
                outs = control(self, equation, values, here)
            else:
                outs = self.typed(equation, values, here)
            env.update(zip(equation.outvars, outs, strict=True))
        self.line = around
        return [read(atom) for atom in jaxpr.outvars]

    def outputs(self, values: Sequence[_Value]) -> None:
        """The program's results where the plan leaves them."""
        traced = self.plan.traced
        places = zip(values, self.plan.output_layouts, traced.out_avals, traced.out_paths, strict=True)
        for value, layout, aval, path in places:
            wanted = self.plan.spec(layout, len(aval.shape))
            if wanted != value.spec and not value.loose:
                self.add(
                    ExplicitCall("", 0, "return", "reshard", self.plan.partition_spec(wanted), value.name, -1, _kind(aval), path)
                )

    def planned(self, equation: Any, path: Path) -> list[_Value]:
        """Results whose types are not gone into: as the plan has them."""
        after = _jax.is_transposed(equation)
        outs = []
        for slot, var in enumerate(equation.outvars):
            place, at = (path, slot) if path in self.found.at else ((*path, "out", slot), 0)
            specs = self.found.writes.get((self.found.at.get(place, -1), at), ())
            outs.append(
                _Value(specs[-1] if specs else ((),) * len(var.aval.shape), f"what {equation.primitive.name} gives", after, after)
            )
        return outs

    def typed(self, equation: Any, values: list[_Value], path: Path) -> list[_Value]:
        """The results of one operator, its operands and results brought to where the plan has them."""
        operator, name = self.found.at[path], f"{equation.primitive.name} at {self.where}"
        if operator in self.found.sums:
            self.refused[f"{self.where} {equation.primitive.name} (partial sums: the plan combines their total only)"] = None
        if any(value.after for value in values):
            types = self.types(equation, _met(values, equation))
            if types is not None:
                return [_Value(spec, name, all(value.loose for value in values), True) for spec in types]
        moved = self.operands(equation, values, operator)
        writes = [self.found.writes.get((operator, slot), ()) for slot in range(len(equation.outvars))]
        types = self.types(equation, moved)
        if equation.primitive is _jax.broadcast_in_dim_p and types is not None:
            return [_Value(types[0], name, True)]
        said = SAID.get(equation.primitive) if writes[0] else None
        if said and (types is None or types[0] != writes[0][0]):
            types = self.types(equation, moved, self.sharding(writes[0][0])) or [writes[0][0]]
            self.note(equation, "out_sharding", writes[0][0], name, -1, equation.outvars[0].aval, said)
        if types is None and writes[0]:  # operands that lie in different ways: all of them where the result is wanted
            aval = equation.outvars[0].aval
            alike = [
                self.moved(value, writes[0][:1], equation, slot, atom.aval) if atom.aval.shape == aval.shape else value
                for slot, (value, atom) in enumerate(zip(moved, equation.invars, strict=True))
            ]
            types = self.types(equation, alike)
        if types is None:
            if id(equation) not in self.silent:
                self.refused[f"{self.where} {equation.primitive.name}"] = None
            types = [
                specs[0] if specs else ((),) * len(var.aval.shape) for specs, var in zip(writes, equation.outvars, strict=True)
            ]
        return [
            self.moved(_Value(spec, name), specs, equation, -1, var.aval)
            for spec, specs, var in zip(types, writes, equation.outvars, strict=True)
        ]

    def operands(self, equation: Any, values: list[_Value], operator: int) -> list[_Value]:
        """An operator's operands where the plan reads them; broadcasts as the others of their shape are."""
        moved = [
            value if value.loose else self.moved(value, self.found.reads.get((operator, slot), ()), equation, slot, atom.aval)
            for slot, (value, atom) in enumerate(zip(values, equation.invars, strict=True))
        ]
        met = _met(moved, equation)
        return [
            self.moved(value, self.found.reads.get((operator, slot), ()), equation, slot, atom.aval) if value.loose else value
            for slot, (value, atom) in enumerate(zip(met, equation.invars, strict=True))
        ]

    def moved(self, value: _Value, specs: Sequence[Spec], equation: Any, slot: int, aval: Any) -> _Value:
        """A value after as many reshards as lead to where the plan wants it; slices that follow one another are one."""
        ways = [spec for spec in specs if spec and len(spec) == len(value.spec)]
        for place, spec in enumerate(ways):
            if place + 1 < len(ways) and _refines(ways[place + 1], spec) and _refines(spec, value.spec):
                continue
            if spec != value.spec:
                self.note(equation, "reshard", spec, value.name, slot, aval)
                value = value._replace(spec=spec)
        return value

    def boundary(self, value: _Value, path: Path, equation: Any, aval: Any, slot: int = 0, operand: int = -1) -> _Value:
        """A value on its way into, or out of, a loop; what only a backward pass takes out of it needs no call."""
        specs = self.found.reads.get((self.found.at.get(path, -1), slot), ())
        if specs and (id(equation), path[-2:]) in self.silent:
            return value._replace(spec=specs[-1])
        return self.moved(value, specs, equation, operand, aval)

    def named(self, values: Sequence[_Value], equation: Any) -> list[_Value]:
        """A loop's results, by the loop."""
        return [value._replace(name=f"{equation.primitive.name} at {self.where}") for value in values]

    def inside(self, value: _Value, path: Path, slot: int = 0) -> _Value:
        """A value on the far side of a boundary."""
        specs = self.found.writes.get((self.found.at.get(path, -1), slot), ())
        return value._replace(spec=specs[-1]) if specs else value

    def types(self, equation: Any, values: Sequence[_Value], out: NamedSharding | None = None) -> list[Spec] | None:
        """The layouts that JAX gives an operator's results; None where it refuses."""
        operands = [
            atom.val if isinstance(atom, _jax.Literal)
            else jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype, sharding=self.sharding(value.spec))
            for atom, value in zip(equation.invars, values, strict=True)
        ]  # fmt: skip
        results = _jax.typed_results(equation, operands, out)
        if results is None:
            return None
        return [self.spec(result.sharding, len(result.shape)) for result in results]

    def sharding(self, spec: Spec) -> NamedSharding:
        return NamedSharding(self.mesh, self.plan.partition_spec(spec))

    def spec(self, sharding: Any, ndim: int) -> Spec:
        entries = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
        words = [() if e is None else e if isinstance(e, tuple) else (e,) for e in (*entries, *[None] * (ndim - len(entries)))]
        return tuple(tuple(self.plan.axis_names.index(word) for word in entry) for entry in words)

    @property
    def where(self) -> str:
        return f"{os.path.basename(self.line[0])}:{self.line[1]}"

    def note(self, equation: Any, call: str, spec: Spec, what: str, operand: int, aval: Any, by: str = "") -> None:
        """A call to write, unless the line it belongs to is said elsewhere."""
        if id(equation) in self.silent:
            return
        wanted = self.plan.partition_spec(spec)
        self.add(ExplicitCall(*self.line, equation.primitive.name, call, wanted, what, operand, _kind(aval), by))

    def add(self, call: ExplicitCall) -> None:
        self.calls[call] = None


def _kind(aval: Any) -> str:
    return f"{aval.dtype}[{','.join(map(str, aval.shape))}]"


def _met(values: Sequence[_Value], equation: Any) -> list[_Value]:
    """An operator's operands, the loose ones laid out as a firm one of their shape, where there is one."""
    shapes = [np.shape(atom.val) if isinstance(atom, _jax.Literal) else atom.aval.shape for atom in equation.invars]
    firm = {shape: value.spec for value, shape in zip(values, shapes, strict=True) if not value.loose}
    return [
        value._replace(spec=firm[shape], loose=False) if value.loose and shape in firm else value
        for value, shape in zip(values, shapes, strict=True)
    ]


def _refines(finer: Spec, spec: Spec) -> bool:
    """Whether a layout is another one cut further: nothing is sent between them."""
    return all(axes == more[: len(axes)] for axes, more in zip(spec, finer, strict=True))


def _said_elsewhere(jaxpr: Any) -> frozenset[Any]:
    """The equations (by id) that only a backward pass reads, on lines that also compute something else: what differentiation
    keeps there is no line of the user's, and JAX types it by itself. Of loops, also their outputs (id, mark) that only it
    reads."""
    live: list[Any] = []
    kept: list[Any] = []
    outs: set[Any] = set()
    _sort(jaxpr, [True] * len(jaxpr.outvars), live, kept, outs)
    lines = {_jax.source_line(equation) for equation in live}
    read = {id(equation) for equation in live}
    return frozenset(outs.union(id(e) for e in kept if id(e) not in read and _jax.source_line(e) in lines))


def _sort(jaxpr: Any, wanted: Sequence[bool], live: list[Any], kept: list[Any], unread: set[Any]) -> None:
    """Sort a jaxpr's equations, those inside of others too, by whether its wanted outputs are computed from them without a
    backward pass between."""
    needed = {atom for atom, want in zip(jaxpr.outvars, wanted, strict=True) if want and not isinstance(atom, _jax.Literal)}
    for equation in reversed(jaxpr.eqns):
        outs = [var in needed for var in equation.outvars]
        forward = any(outs) and not _jax.is_transposed(equation)
        (live if forward else kept).append(equation)
        if forward:
            needed.update(atom for atom in equation.invars if not isinstance(atom, _jax.Literal))
            unread.update((id(equation), ("out", k)) for k, out in enumerate(outs) if not out)
        for inner in _jax.sub_jaxprs(equation):
            inner = getattr(inner, "jaxpr", inner)
            carried = len(inner.outvars) != len(outs) or equation.primitive is _jax.scan_p or equation.primitive is _jax.while_p
            carries = scan_arity(equation)[1] if equation.primitive is _jax.scan_p else len(outs)
            mask = [forward and (out or (carried and k < carries)) for k, out in enumerate(outs)]
            _sort(inner, mask if len(mask) == len(inner.outvars) else [forward] * len(inner.outvars), live, kept, unread)


def _call(parameter: str) -> Callable[[_Walk, Any, list[_Value], Path], list[_Value]]:
    def run(walk: _Walk, equation: Any, values: list[_Value], path: Path) -> list[_Value]:
        jaxpr = equation.params[parameter]
        return walk.run(getattr(jaxpr, "jaxpr", jaxpr), values, path)

    return run


def _scan(walk: _Walk, equation: Any, values: list[_Value], path: Path) -> list[_Value]:
    consts, carries = scan_arity(equation)
    marks = [("carry", k - consts) if consts <= k < consts + carries else ("in", k) for k in range(len(values))]
    inner = []
    for k, (value, mark, atom) in enumerate(zip(values, marks, equation.invars, strict=True)):
        outside = walk.boundary(value, (*path, *mark), equation, atom.aval, operand=k)
        stacked = mark[0] == "in" and mark[1] >= consts + carries
        inner.append(walk.inside(outside._replace(spec=outside.spec[1:]) if stacked else outside, (*path, *mark)))
    body = equation.params["jaxpr"].jaxpr
    outs = walk.run(body, inner, path)
    found = []
    for k, (value, var, atom) in enumerate(zip(outs, equation.outvars, body.outvars, strict=True)):
        mark, slot = ((*path, "carry", k), 1) if k < carries else ((*path, "out", k), 0)
        value = walk.boundary(value, mark, equation, atom.aval, slot)
        value = value if len(value.spec) == len(var.aval.shape) else value._replace(spec=((), *value.spec))
        found.append(walk.inside(value, mark, slot))
    return walk.named(found, equation)


def _while(walk: _Walk, equation: Any, values: list[_Value], path: Path) -> list[_Value]:
    split = equation.params["cond_nconsts"]
    total = split + equation.params["body_nconsts"]
    marks = [(*path, "in", k) if k < total else (*path, "carry", k - total) for k in range(len(values))]
    entered = [
        walk.inside(walk.boundary(value, mark, equation, atom.aval, operand=k), mark)
        for k, (value, mark, atom) in enumerate(zip(values, marks, equation.invars, strict=True))
    ]
    walk.run(equation.params["cond_jaxpr"].jaxpr, [*entered[:split], *entered[total:]], (*path, "cond"))
    outs = walk.run(equation.params["body_jaxpr"].jaxpr, entered[split:], (*path, "body"))
    found = [
        walk.inside(walk.boundary(value, (*path, "carry", k), equation, var.aval, 1), (*path, "carry", k), 1)
        for k, (value, var) in enumerate(zip(outs, equation.outvars, strict=True))
    ]
    return walk.named(found, equation)


def _cond(walk: _Walk, equation: Any, values: list[_Value], path: Path) -> list[_Value]:
    outs: list[_Value] = []
    for number, branch in enumerate(equation.params["branches"]):
        found = walk.run(branch.jaxpr, values[1:], (*path, "branch", number))
        outs = [
            walk.inside(walk.boundary(value, (*path, "out", k), equation, var.aval, number), (*path, "out", k))
            for k, (value, var) in enumerate(zip(found, equation.outvars, strict=True))
        ]
    return walk.named(outs, equation)


_CONTROL: dict[Any, Callable[[_Walk, Any, list[_Value], Path], list[_Value]]] = {
    _jax.scan_p: _scan,
    _jax.while_p: _while,
    _jax.cond_p: _cond,
    _jax.jit_p: _call("jaxpr"),
    _jax.remat_p: _call("jaxpr"),
    _jax.closed_call_p: _call("call_jaxpr"),
    _jax.custom_vmap_p: _call("call"),
    _jax.custom_jvp_call_p: _call("call_jaxpr"),
    _jax.custom_vjp_call_p: _call("call_jaxpr"),
}
"""Control flow is typed through; of what is not here the plan's own layouts are taken."""


def _by_line(calls: Sequence[ExplicitCall]) -> list[ExplicitCall]:
    return sorted(calls, key=lambda call: (not call.file, call.file, call.line))


def _show(spec: PartitionSpec) -> str:
    return str(spec).replace("PartitionSpec", "P")


EXPLICIT = Exporter("the out_sharding= and reshard calls for Explicit mesh axes, by source line", build)
