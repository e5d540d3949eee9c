"""A traced program as one flat list of operators: calls seen through, loop bodies once with a trip count."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from functools import lru_cache
from typing import Any

from jaxplan import _jax
from jaxplan.graph.manual import sent_inside
from jaxplan.graph.nouns import Operator, Path, Sent, Tensor, Within
from jaxplan.graph.trips import counted_trips
from jaxplan.rules import Factor, Kind, Rule, rule_of
from jaxplan.trace import Traced

WHILE_TRIPS = 10.0
"""How often a `while` loop is assumed to run where the jaxpr does not tell."""

SPARED = 1e-3
"""Of what a branch takes that is not the one paid for, what is."""

INPUT = "program input"
BOUNDARY = "loop boundary"
VIEW = "shared view"
MANUAL = "edge of a manual region"
"""Names of operators that stand for no equation; no primitive bears a name with a space."""

TOTAL = "total"
"""Where the view of a loop's total stands, which is outside of it: see `total_path`."""


class Flat:
    """The operators of a program while they are being collected."""

    def __init__(self, while_trips: float = WHILE_TRIPS, platform: str = "") -> None:
        self.tensors: list[Tensor] = []
        self.operators: list[Operator] = []
        self.calls: dict[Path, tuple[int, ...]] = {}
        self.sealed: set[Path] = set()
        self.branches: dict[Path, float] = {}
        self.while_trips, self.platform = while_trips, platform
        self._scopes = 0
        self._kinds: dict[Any, Tensor] = {}
        self.within: Within | None = None
        self.at_once = True  # whether a loop is one program: what it adds up may be combined after it

    def tensor(self, aval: Any) -> int:
        """A new tensor for an abstract value."""
        key = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = Tensor(tuple(key[0]), *_dtype(key[1]))
        self.tensors.append(kind)
        return len(self.tensors) - 1

    def like(self, tensor: int) -> int:
        """A new tensor of the shape and dtype of another."""
        self.tensors.append(self.tensors[tensor])
        return len(self.tensors) - 1

    def add(
        self,
        name: str,
        rule: Rule,
        operands: Sequence[int],
        results: Sequence[int],
        place: Place,
        mark: Path,
        read_times: tuple[float, ...] | None = None,
        equation: Any = None,
        asked: _jax.Asked | None = None,
        sent: tuple[Sent, ...] = (),
    ) -> None:
        """A new operator at `place` that stands for no equation (or for one side of one)."""
        path = place.path + mark
        self.operators.append(
            Operator(
                name, rule, tuple(operands), tuple(results), place.times, place.scope, path, equation, read_times, asked,
                self.within, sent,
            )
        )  # fmt: skip

    def rule(self, equation: Any, operands: Sequence[int], results: Sequence[int]) -> Rule:
        """The rule of an equation, whose operands and results are these tensors (-1: a literal, or a constant)."""
        avals = [v.aval for v in equation.invars], [v.aval for v in equation.outvars]
        return rule_of(equation.primitive, equation.params, *avals)

    def stacked(self, tensor: int, aval: Any) -> tuple[int, ...]:
        """The shape of what a loop takes apart: of a tensor, or of a constant (-1) by its abstract value."""
        return tuple(aval.shape)

    def rounds(self, equation: Any, trips: int, path: Path) -> float:
        """How often a loop runs, as its equation says; `path`: where it stands."""
        return float(trips)

    def scope(self) -> int:
        self._scopes += 1
        return self._scopes

    def walk(self, jaxpr: Any, env: dict[Any, int], place: Place) -> list[int]:
        """Add a jaxpr's equations; `env` maps its variables to tensors. Returns the tensors of its outputs."""
        for number, equation in enumerate(jaxpr.eqns):
            operands = [-1 if isinstance(v, _jax.Literal) else env.get(v, -1) for v in equation.invars]
            handler = _CONTROL.get(equation.primitive)
            if handler is not None:
                outer, self.within = self.within, Within(equation, self.within)
                outs = handler(self, equation, operands, place.at(number))
                self.within = outer
                for var, tensor in zip(equation.outvars, outs, strict=True):
                    env[var] = tensor
                continue
            results = []
            for var in equation.outvars:
                tensor = env[var] = self.tensor(var.aval)
                results.append(tensor)
            asked = _jax.asked_layout(equation) if equation.primitive in _jax.ASKING else None  # kept, as pins
            if asked:
                rule = passing_rule(self.tensors[results[0]].shape, 1, 1)
                self.add(equation.primitive.name, rule, operands, results, place, (number,), equation=equation, asked=asked)
                continue
            rule = self.rule(equation, operands, results)
            self.operators.append(
                Operator(
                    equation.primitive.name, rule, tuple(operands), tuple(results),
                    place.times, place.scope, (*place.path, number), equation, within=self.within,
                )
            )  # fmt: skip
        return [-1 if isinstance(v, _jax.Literal) else env.get(v, -1) for v in jaxpr.outvars]

    def call(self, jaxpr: Any, operands: Sequence[int], place: Place) -> list[int]:
        """See through a call: its variables are the caller's tensors."""
        return self.walk(jaxpr, dict(zip(jaxpr.invars, operands, strict=True)), place)


class Place:
    """Where the walk is: path, trip count, scope."""

    __slots__ = ("path", "scope", "times")

    def __init__(self, path: Path, times: float, scope: int) -> None:
        self.path, self.times, self.scope = path, times, scope

    def at(self, *marks: Any) -> Place:
        return Place((*self.path, *marks), self.times, self.scope)

    def inside(self, scope: int, times: float, *marks: Any) -> Place:
        return Place((*self.path, *marks), self.times * times, scope)


def flatten(traced: Traced, flat: Flat) -> tuple[list[int], list[int]]:
    """Fill `flat` with the program's operators; the tensors of its flat inputs and of its flat outputs."""
    jaxpr = traced.jaxpr.jaxpr
    flat.at_once = not traced.apart  # a loop whose rounds are programs of their own hands arrays from one to the next
    place = Place((), 1.0, flat.scope())
    env = {}
    for position, var in enumerate(jaxpr.invars):
        tensor = env[var] = flat.tensor(var.aval)
        flat.add(INPUT, passing_rule(flat.tensors[tensor].shape, 0, 1), (), (tensor,), place, (INPUT, position))
    inputs = [env[var] for var in jaxpr.invars]
    outputs = flat.walk(jaxpr, env, place)
    flat.operators = share_views(flat, traced.apart)
    return inputs, outputs


def share_views(flat: Flat, apart: Set[Path] = frozenset()) -> list[Operator]:
    """Where several heavy operators of one loop body read one tensor, they read a *view* of it: a layout of its own,
    reached once and paid for once. What a rematerialised call reads is moved for it alone, so its readers share another view;
    and so do those of a call that is a program of its own. `apart`: paths of such."""
    readers: dict[tuple[int, int, Path], list[int]] = {}
    for index, operator in enumerate(flat.operators):
        if not operator.rule.fusible and operator.name != BOUNDARY:
            path = operator.path
            call: Path = ()
            if flat.calls or apart:
                call = next((path[:n] for n in range(len(path), 0, -1) if path[:n] in flat.calls or path[:n] in apart), ())
            for tensor in dict.fromkeys(operator.operands):
                if tensor >= 0 and flat.tensors[tensor].shape:
                    readers.setdefault((tensor, operator.scope, call), []).append(index)
    views: dict[int, list[tuple[int, Operator]]] = {}
    operators = list(flat.operators)
    for (tensor, scope, call), found in readers.items():
        if len(found) < 2:
            continue
        view = flat.like(tensor)
        first = operators[found[0]]
        rule = passing_rule(flat.tensors[tensor].shape, 1, 1)
        path = (*call, VIEW, tensor, scope)
        times = first.times if first.read_times is None else first.read_times[first.operands.index(tensor)]
        views.setdefault(found[0], []).append((view, Operator(VIEW, rule, (tensor,), (view,), times, scope, path)))
        for index in found:
            swapped = tuple([view if t == tensor else t for t in operators[index].operands])
            operators[index] = operators[index]._replace(operands=swapped)
    placed, begin = list[Operator](), 0
    for index in sorted(views):
        placed += [*operators[begin:index], *[view for _, view in views[index]]]
        begin = index
    return placed + operators[begin:]


@lru_cache(maxsize=4096)
def passing_rule(shape: tuple[int, ...], operands: int, results: int) -> Rule:
    """A value handed on unchanged: every dimension is a factor of its own."""
    dims = tuple((i,) for i in range(len(shape)))
    factors = tuple(Factor(f"d{i}", extent) for i, extent in enumerate(shape))
    return Rule(factors, (dims,) * operands, (dims,) * results, flops=0.0, free=True)


@lru_cache(maxsize=4096)
def stacking_rule(shape: tuple[int, ...], *, unstack: bool, free: bool = True) -> Rule:
    """A stacked loop input sliced along its leading dimension (`unstack`), or a loop output stacked along it. `free`: the body
    computes with the slices, or computes them: then nothing is copied."""
    factors = tuple(Factor(f"d{i}", extent, Kind.WHOLE if i == 0 else Kind.PARALLEL) for i, extent in enumerate(shape))
    whole = tuple((i,) for i in range(len(shape)))
    return Rule(factors, (whole if unstack else whole[1:],), (whole[1:] if unstack else whole,), flops=0.0, free=free)


def scan_arity(equation: Any) -> tuple[int, int]:
    """(number of constants, number of carries) of a scan, read off the shapes: only stacked values change rank.

    JAX renamed the parameters that held these counts; the shapes say the same on every version.
    """
    body = equation.params["jaxpr"].jaxpr
    same = [len(v.aval.shape) == len(b.aval.shape) for v, b in zip(equation.invars, body.invars, strict=True)]
    carries = sum(len(v.aval.shape) == len(b.aval.shape) for v, b in zip(equation.outvars, body.outvars, strict=True))
    return sum(same) - carries, carries


def _carry(
    flat: Flat, initial: int, aval: Any, place: Place, within: Place, mark: Path
) -> tuple[int, int, Callable[[int], None]]:
    """A loop carry: one layout for the initial value, the body's input, the body's output and the final value."""
    inner, final = flat.tensor(aval), flat.tensor(aval)
    rule = passing_rule(flat.tensors[inner].shape, 2, 2)

    def close(produced: int) -> None:
        times = (place.times, within.times)
        flat.add(BOUNDARY, rule, (initial, produced), (inner, final), place, mark, times)

    return inner, final, close


def _enter(flat: Flat, outer: int, place: Place, mark: Path) -> int:
    """A loop constant: read inside in a layout of its own."""
    if outer < 0:
        return -1
    inner = flat.like(outer)
    flat.add(BOUNDARY, passing_rule(flat.tensors[outer].shape, 1, 1), (outer,), (inner,), place, mark)
    return inner


@lru_cache(maxsize=256)
def _dtype(dtype: Any) -> tuple[str, int]:
    """(name, bytes per element); tokens and the like count as four bytes."""
    return str(dtype), int(getattr(dtype, "itemsize", 4))


def _scan(flat: Flat, equation: Any, operands: list[int], place: Place) -> list[int]:
    body = equation.params["jaxpr"].jaxpr
    consts, carries = scan_arity(equation)
    within = place.inside(flat.scope(), flat.rounds(equation, equation.params["length"], place.path))
    arguments = [_enter(flat, operand, place, ("in", k)) for k, operand in enumerate(operands[:consts])]
    loops = [
        _carry(flat, operands[consts + k], body.invars[consts + k].aval, place, within, ("carry", k)) for k in range(carries)
    ]
    arguments += [inner for inner, _, _ in loops]
    slices: dict[int, int] = {}
    for k in range(consts + carries, len(operands)):
        inner = flat.tensor(body.invars[k].aval)
        slices[inner] = len(flat.operators)
        shape = flat.stacked(operands[k], equation.invars[k].aval)
        flat.add(BOUNDARY, stacking_rule(shape, unstack=True), (operands[k],), (inner,), place, ("in", k))
        arguments.append(inner)
    inside = len(flat.operators)
    produced = flat.call(body, arguments, within)
    _hoist(flat, inside, arguments[:consts], within, place)
    updated = {op.operands[0]: op.results[0] for op in flat.operators[inside:] if _updates(op.rule)}
    for inner, index in slices.items():
        if inner in updated:  # a part of a slice can only be updated in a copy of the slice
            boundary = flat.operators[index]
            flat.operators[index] = boundary._replace(rule=replace(boundary.rule, free=False))
    for (_, _, close), tensor in zip(loops, produced[:carries], strict=True):
        close(tensor)
    added = _added_to(flat, inside, within.scope, [inner for inner, _, _ in loops], produced) if flat.at_once else []
    outs = [_total(flat, final, place, k) if k in added else final for k, (_, final, _) in enumerate(loops)]
    for k in range(carries, len(produced)):
        stacked = flat.tensor(equation.outvars[k].aval)
        rule = stacking_rule(flat.tensors[stacked].shape, unstack=False, free=produced[k] not in updated.values())
        flat.add(BOUNDARY, rule, (produced[k],), (stacked,), place, ("out", k), (within.times,))
        outs.append(stacked)
    return outs


def _hoist(flat: Flat, first: int, constants: Sequence[int], within: Place, place: Place) -> None:
    """What a loop's body computes of its constants alone the compiler computes before the loop, exchanges too: it runs as often
    as the loop, and so do exchanges of it for the rest. `first`: the body's first operator; `place`: where the loop stands. Not
    where rounds are programs of their own."""
    same = set(constants)
    if within.times <= place.times or not flat.at_once:
        return
    for index in range(first, len(flat.operators)):
        operator = flat.operators[index]
        if operator.scope != within.scope:
            continue
        equation, reads = operator.equation, [tensor for tensor in operator.operands if tensor >= 0]
        pure = equation is not None and operator.rule.known and not equation.effects
        if pure and same.issuperset(reads):
            same.update(operator.results)
            if reads:  # what is made of numbers alone is made where it is read
                flat.operators[index] = operator._replace(times=place.times)
        elif operator.read_times is None and not same.isdisjoint(reads):
            often = tuple([place.times if tensor in same else operator.times for tensor in operator.operands])
            flat.operators[index] = operator._replace(read_times=often)


def _added_to(flat: Flat, first: int, scope: int, carried: Sequence[int], produced: Sequence[int]) -> list[int]:
    """The carries that the body of a loop, the operators from `first` on, does nothing with but add to, in its own `scope`."""
    inside = {*carried, *produced}
    readers: dict[int, list[Operator]] = {}
    for operator in flat.operators[first:]:
        for tensor in inside.intersection(operator.operands):
            readers.setdefault(tensor, []).append(operator)
    found = []
    for k, (inner, tensor) in enumerate(zip(carried, produced, strict=False)):
        near, after = readers.get(inner, []), readers.get(tensor, [])
        adds = len(near) == 1 and near[0].rule.linear and near[0].rule.scale < 0 and near[0].results == (tensor,)
        both = adds and near[0].scope == scope and len(near[0].operands) == 2 and near[0].operands.count(inner) == 1
        if both and len(after) == 1 and produced.count(tensor) == 1:  # by the loop's boundary
            found.append(k)
    return found


def _total(flat: Flat, final: int, place: Place, number: int) -> int:
    """The final value of a carry that is only added to: a layout of its own, as it may be combined after the loop."""
    view, rule = flat.like(final), passing_rule(flat.tensors[final].shape, 1, 1)
    flat.operators.append(Operator(VIEW, rule, (final,), (view,), place.times, place.scope, total_path(place.path, number)))
    return view


def total_path(loop: Path, number: int) -> Path:
    """Where the view of the total of a loop's carry stands; `loop`: the path of its equation."""
    return (*loop[:-1], TOTAL, loop[-1], number)


def _updates(rule: Rule) -> bool:
    """Whether it writes a part of its first operand, in place."""
    return bool(rule.touched) and rule.touched[-1] < 1 and rule.operands[:1] == rule.results


def _while(flat: Flat, equation: Any, operands: list[int], place: Place) -> list[int]:
    params = equation.params
    cond_consts, body_consts = params["cond_nconsts"], params["body_nconsts"]
    known = counted_trips(equation)
    within = place.inside(flat.scope(), flat.while_trips if known is None else flat.rounds(equation, known, place.path))
    constants = [
        _enter(flat, operand, place, ("in", k)) for k, operand in enumerate(operands[: cond_consts + body_consts])
    ]
    initial = operands[cond_consts + body_consts :]
    body = params["body_jaxpr"].jaxpr
    loops = [
        _carry(flat, operand, body.invars[body_consts + k].aval, place, within, ("carry", k))
        for k, operand in enumerate(initial)
    ]
    inner = [tensor for tensor, _, _ in loops]
    flat.call(params["cond_jaxpr"].jaxpr, constants[:cond_consts] + inner, within.at("cond"))
    inside = len(flat.operators)
    produced = flat.call(body, constants[cond_consts:] + inner, within.at("body"))
    _hoist(flat, inside, constants[cond_consts:], within, place)
    for (_, _, close), tensor in zip(loops, produced, strict=True):
        close(tensor)
    return [final for _, final, _ in loops]


def _cond(flat: Flat, equation: Any, operands: list[int], place: Place) -> list[int]:
    branches = equation.params["branches"]
    produced, spans = [], []
    for number, branch in enumerate(branches):
        start = len(flat.operators)
        produced.append(flat.call(branch.jaxpr, operands[1:], place.inside(flat.scope(), 1.0, "branch", number)))
        spans.append(range(start, len(flat.operators)))
    weights = _charge_one(flat, spans, equation.params.get("branches_platforms"))
    if 0.0 not in weights:
        flat.branches.update({(*place.path, "branch", number): weight for number, weight in enumerate(weights)})
    often = tuple([place.times * weight for weight in weights])
    outs = []
    for k, var in enumerate(equation.outvars):
        joined = flat.tensor(var.aval)
        rule = passing_rule(flat.tensors[joined].shape, len(branches), 1)
        flat.add(BOUNDARY, rule, [outputs[k] for outputs in produced], (joined,), place, ("out", k), often)
        outs.append(joined)
    return outs


def _charge_one(flat: Flat, spans: Sequence[range], platforms: Sequence[Sequence[str] | None] | None) -> list[float]:
    """One branch is paid for: that of the platform where branches are for `platforms` (None: for any other), else the one with
    the most work (unsharded). Of the others a small part, so that they do not exchange for nothing; nothing of those for other
    platforms. Returns the share of each branch that is paid."""

    def work(span: range) -> float:
        operators = [flat.operators[i] for i in span]
        return sum(op.times * (op.rule.points * op.rule.flops + 1.0) for op in operators)

    alike = {flat.platform, *(("cuda", "rocm") if flat.platform == "gpu" else ())}
    ours = [span for span, names in zip(spans, platforms or (), strict=False) if names is None or alike.intersection(names)]
    paid = ours[0] if ours and flat.platform else max(spans, key=work)
    weights = [1.0 if span is paid else 0.0 if platforms else SPARED for span in spans]
    for span, weight in zip(spans, weights, strict=True):
        for i in span if weight != 1.0 else ():
            operator = flat.operators[i]
            read = None if operator.read_times is None else tuple([weight * times for times in operator.read_times])
            flat.operators[i] = operator._replace(times=weight * operator.times, read_times=read)
    return weights


def _remat(flat: Flat, equation: Any, operands: list[int], place: Place) -> list[int]:
    """Seen through; but the compiler puts a barrier around what a rematerialised body reads: layouts have to be said again
    behind it, and what was gathered before it is gathered again."""
    flat.calls[place.path] = tuple(operands)
    return flat.call(equation.params["jaxpr"], operands, place.inside(flat.scope(), 1.0))


def _shard_map(flat: Flat, equation: Any, operands: list[int], place: Place) -> list[int]:
    """Sharded by hand: its operands are brought to the layouts it asks for, its results are where it leaves them; what it does
    inside is its own affair, but what it sends is known."""
    ins, outs = _jax.shard_map_layouts(equation)
    for k, (operand, asked) in enumerate(zip(operands, ins, strict=True)):
        if operand >= 0 and asked:
            rule = passing_rule(flat.tensors[operand].shape, 1, 1)
            flat.add(MANUAL, rule, (operand,), (flat.like(operand),), place, ("in", k), equation=equation, asked=asked)
    results = [flat.tensor(var.aval) for var in equation.outvars]
    for k, (result, asked) in enumerate(zip(results, outs, strict=True)):
        rule = passing_rule(flat.tensors[result].shape, 0, 1)
        sent = () if k else sent_inside(equation.params["jaxpr"], flat.while_trips)
        flat.add(MANUAL, rule, (), (result,), place, ("out", k), equation=equation, asked=asked or None, sent=sent)
    return results


def _linear_solve(flat: Flat, equation: Any, operands: list[int], place: Place) -> list[int]:
    """What solves is computed; the products with the matrix stand by for derivatives."""
    flat.sealed.add(place.path)
    return flat.call(equation.params["jaxprs"].solve.jaxpr, _jax.solve_operands(equation, operands), place)


def _inline(parameter: str, sealed: bool = False) -> Callable[[Flat, Any, list[int], Place], list[int]]:
    def handler(flat: Flat, equation: Any, operands: list[int], place: Place) -> list[int]:
        jaxpr = equation.params[parameter]
        if sealed:
            flat.sealed.add(place.path)
        return flat.call(getattr(jaxpr, "jaxpr", jaxpr), operands, place)

    return handler


_SEALED = (_jax.custom_jvp_call_p, _jax.custom_vjp_call_p)
SEEN_THROUGH: dict[Any, str] = {
    _jax.jit_p: "jaxpr", _jax.remat_p: "jaxpr", _jax.closed_call_p: "call_jaxpr", _jax.custom_vmap_p: "call",
    **dict.fromkeys(_SEALED, "call_jaxpr"),
}  # fmt: skip
"""Calls whose operators stand among the others: {primitive: the parameter that holds the body}."""

_CONTROL: dict[Any, Callable[[Flat, Any, list[int], Place], list[int]]] = {
    **{call: _inline(parameter, sealed=call in _SEALED) for call, parameter in SEEN_THROUGH.items()},
    _jax.scan_p: _scan,
    _jax.while_p: _while,
    _jax.cond_p: _cond,
    _jax.remat_p: _remat,
    _jax.shard_map_p: _shard_map,
    _jax.linear_solve_p: _linear_solve,
}
"""Control flow: the primitives whose rule is to recurse."""
