"""Unrolled layers put back into a loop: equations that repeat, block after block, become a scan over the blocks.

A block's operands are values of the block before (carries), values that all blocks share (constants), or values of its own
(stacked, as parameters of unrolled layers are). The backward pass of an unrolled model repeats too, from the last layer to the
first: what it reads of the forward scan is then the stacked array itself, and its scan runs in reverse.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxplan import _jax
from jaxplan.pipeline.ordered import ADDS, Ordered, Picks, picked_first, with_first_terms
from jaxplan.rolls import with_rolls
from jaxplan.rules import Kind, rule_of
from jaxplan.trace import Traced

MOST_ALIKE = 64
"""Equal products in one block, at most, for it to be found."""
MOST_PERIODS = 24
"""Lengths of blocks that are tried, the likeliest ones."""


@dataclass(frozen=True)
class Run:
    """`count` blocks of `period` equations each, from equation `start` on."""

    start: int
    period: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.period * self.count


@dataclass(frozen=True)
class Loop:
    """A run whose blocks read and leave values alike.

    `sources`: per equation of a block and operand, where it comes from: ("inner", equation, result), ("carry", number), ("const",
    number), ("x", number) or ("literal",). `carries`: (the first value, equation and result that make the next one). `consts`:
    variables. `xs`: per number, a variable per block. `ys`: (equation, result) of what is read outside. `entries`: numbers of the
    carries that are read outside before the last block: stacked as blocks receive them, which is what a backward pass reads.
    """

    run: Run
    sources: tuple[tuple[tuple[Any, ...], ...], ...]
    carries: tuple[tuple[Any, int, int], ...]
    consts: tuple[Any, ...]
    xs: tuple[tuple[Any, ...], ...]
    ys: tuple[tuple[int, int], ...]
    entries: tuple[int, ...]


def rerolled(traced: Traced) -> Traced:
    """The same program with its repeated blocks of equations as scans; the same object if it has none.

    Its inputs and outputs are those of `traced`. Values differ by nothing but the order in which XLA adds up.
    """
    closed = traced.jaxpr
    jaxpr, picks = picked_first(closed.jaxpr)
    loops = find_loops(jaxpr)
    if not loops:
        return traced
    short = [loop for loop in loops if any(other.run.count == loop.run.count + 1 for other in loops)]
    more = with_first_terms(jaxpr, [_sums(jaxpr, loop) for loop in short])
    if more is not jaxpr:
        found = find_loops(more)
        if sum([loop.run.count for loop in found]) > sum([loop.run.count for loop in loops]):
            jaxpr, loops = more, found
    spec = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type) for v in jaxpr.invars]
    consts = [*closed.consts, *jaxpr.zeros()]
    found = jax.make_jaxpr(lambda *inputs: _evaluate(jaxpr, picks, consts, loops, inputs))(*spec)
    return replace(traced, jaxpr=with_rolls(found))


def _sums(jaxpr: Any, loop: Loop) -> tuple[int, int, list[Any]]:
    """(start, period, first values) of a loop before whose first block there may be one that starts sums: what each block adds to
    what the one before has added up, and nothing else."""
    firsts = []
    for number, (first, e, _) in enumerate(loop.carries):
        adds = jaxpr.eqns[loop.run.start + e].primitive in ADDS
        if adds and loop.sources[e][0] == ("carry", number):
            firsts.append(first)
    return loop.run.start, loop.run.period, firsts


# ---- found -------------------------------------------------------------------------------------------------------


def find_loops(jaxpr: Any) -> list[Loop]:
    """The loops of a jaxpr that do not overlap, in program order; those that cover the most equations are taken first."""
    numbering, free = Numbering(), np.ones(len(jaxpr.eqns), bool)
    symbols = np.array([numbering.equation(e) for e in jaxpr.eqns], np.int64)
    first = {int(symbol): number for number, symbol in reversed(list(enumerate(symbols)))}
    products = {symbol for symbol, number in first.items() if contracts(jaxpr.eqns[number])}
    heavy = np.array([int(symbol) in products for symbol in symbols], bool)
    readers: dict[Any, list[int]] = {}
    found: list[Loop] = []
    rejected: set[tuple[int, int]] = set()
    while True:
        best = longest_run(symbols, free, heavy, rejected)
        if best is None:
            return sorted(found, key=lambda loop: loop.run.start)
        readers = readers or _readers(jaxpr)
        loops = (_loop(jaxpr, run, readers) for run in _shifted(jaxpr, best, symbols, free))
        loop = next((loop for loop in loops if loop is not None), None)
        if loop is None:
            rejected.add((best.start, best.period))
        else:
            found.append(loop)
            free[loop.run.start : loop.run.stop] = False


def contracts(equation: Any) -> bool:
    """Whether an equation, or one inside of it, is a product summed over a dimension: what makes a block a layer, and what
    updates of parameters, which repeat as well, have none of."""
    inner = [getattr(jaxpr, "jaxpr", jaxpr) for jaxpr in _jax.sub_jaxprs(equation)]
    if inner:
        return any(contracts(e) for jaxpr in inner for e in jaxpr.eqns)
    rule = rule_of(equation.primitive, equation.params, [v.aval for v in equation.invars], [v.aval for v in equation.outvars])
    return not rule.fusible and any(factor.kind is Kind.SUM for factor in rule.factors)


class Numbering:
    """A number per equation, and per jaxpr: equal ones do the same to values of the same shapes.

    What may make a difference and cannot be compared (arrays that a function captured, functions that are called back) is the
    same only if it is one object.
    """

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._known: dict[int, int] = {}

    def equation(self, equation: Any) -> int:
        """The number of an equation, whatever its operands are called."""
        ins = tuple([(v.aval, _literal(v)) if isinstance(v, _jax.Literal) else v.aval for v in equation.invars])
        derived = equation.primitive in _DERIVED
        params = tuple([(name, self._value(v)) for name, v in equation.params.items() if not derived or _computed(v)])
        return self._number((equation.primitive, params, ins, tuple([v.aval for v in equation.outvars])))

    def jaxpr(self, jaxpr: Any) -> int:
        """The number of a jaxpr: its equations, and who reads whom."""
        if id(jaxpr) not in self._known:
            names: dict[Any, int] = {}
            for var in (*jaxpr.constvars, *jaxpr.invars):
                names[var] = len(names)
            lines: list[Any] = [tuple([v.aval for v in (*jaxpr.constvars, *jaxpr.invars)])]
            for equation in jaxpr.eqns:
                lines.append((self.equation(equation), tuple([_name(v, names) for v in equation.invars])))
                for var in equation.outvars:
                    names[var] = len(names)
            lines.append(tuple([_name(v, names) for v in jaxpr.outvars]))
            self._known[id(jaxpr)] = self._number(tuple(lines))
        return self._known[id(jaxpr)]

    def _number(self, key: Any) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _value(self, value: Any) -> Any:
        """A parameter as something to compare."""
        if hasattr(value, "jaxpr"):
            return "jaxpr", self.jaxpr(value.jaxpr), tuple(map(id, value.consts))
        if hasattr(value, "eqns"):
            return "jaxpr", self.jaxpr(value)
        if isinstance(value, (tuple, list)):
            return tuple([self._value(v) for v in value])
        if isinstance(value, dict):
            return tuple([(name, self._value(v)) for name, v in value.items()])
        try:
            hash(value)
        except TypeError:
            return "object", id(value)
        return type(value), value


_DERIVED = frozenset({_jax.custom_jvp_call_p, _jax.custom_vjp_call_p})
"""Calls whose functions among the parameters are made anew at each, and say how to differentiate, not what is computed."""


def _computed(parameter: Any) -> bool:
    """Whether a parameter of such a call says what is computed: its jaxpr and plain values do."""
    return hasattr(parameter, "jaxpr") or hasattr(parameter, "eqns") or isinstance(parameter, (bool, int, str, tuple))


def _literal(literal: Any) -> Any:
    return ("object", id(literal.val)) if np.ndim(literal.val) else repr(literal.val)


def _name(var: Any, names: Mapping[Any, int]) -> Any:
    return _literal(var) if isinstance(var, _jax.Literal) else names[var]


def longest_run(
    symbols: np.ndarray, free: np.ndarray, heavy: np.ndarray, rejected: Collection[tuple[int, int]] = ()
) -> Run | None:
    """The run that covers most of what is `free`. `heavy`: where a product is; `rejected`: starts and periods."""
    return max(_runs(symbols, free, heavy, rejected), key=lambda run: (run.period * run.count, -run.period), default=None)


def _runs(symbols: np.ndarray, free: np.ndarray, heavy: np.ndarray, rejected: Collection[tuple[int, int]]) -> Iterator[Run]:
    """For every period at which some product repeats, the longest run with a product in it."""
    products = np.concatenate([[0], np.cumsum(heavy)])
    for period in _periods(symbols, heavy & free):
        same = (symbols[:-period] == symbols[period:]) & free[:-period] & free[period:]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]]).astype(np.int8)))
        spans = [
            (int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)
            if b - a >= period and products[a + period] > products[a] and (int(a), period) not in rejected
        ]  # fmt: skip
        start, stop = max(spans, key=lambda span: span[1] - span[0], default=(0, 0))
        if stop > start:
            yield Run(start, period, (stop - start) // period + 1)


def _periods(symbols: np.ndarray, heavy: np.ndarray) -> list[int]:
    """The commonest distances between equal products: a block's length is that of each of its products to the next block's."""
    places = np.flatnonzero(heavy)
    places = places[np.argsort(symbols[places], kind="stable")]
    counts = np.zeros(len(symbols) + 1, np.int64)
    for apart in range(1, min(MOST_ALIKE, len(places) - 1) + 1):
        equal = symbols[places[apart:]] == symbols[places[:-apart]]
        np.add.at(counts, (places[apart:] - places[:-apart])[equal], 1)
    found = np.argsort(-counts, kind="stable")[:MOST_PERIODS]
    return sorted(int(period) for period in found if counts[period])


def _shifted(jaxpr: Any, run: Run, symbols: np.ndarray, free: np.ndarray) -> list[Run]:
    """The same run from later equations on, as far as its equations go on repeating; first where the fewest values go over from
    one block to the next: there one layer ends and another begins."""
    found = []
    for start in range(run.start, run.start + run.period):
        stop = start + run.period * run.count
        if stop > len(symbols) or not free[start:stop].all():
            break
        blocks = symbols[start:stop].reshape(run.count, run.period)
        if (blocks != blocks[0]).any():
            break
        middle = start + run.period
        made = {v for e in jaxpr.eqns[start:middle] for v in e.outvars}
        read = {v for e in jaxpr.eqns[middle : middle + run.period] for v in e.invars if not isinstance(v, _jax.Literal)}
        found.append((len(made & read), Run(start, run.period, run.count)))
    return [shifted for _, shifted in sorted(found, key=lambda pair: pair[0])]


def _readers(jaxpr: Any) -> dict[Any, list[int]]:
    """Per variable, the equations that read it; an output is read by one after the last."""
    found: dict[Any, list[int]] = {}
    for number, variables in enumerate([*[e.invars for e in jaxpr.eqns], jaxpr.outvars]):
        for var in variables:
            if not isinstance(var, _jax.Literal):
                found.setdefault(var, []).append(number)
    return found


def _loop(jaxpr: Any, run: Run, readers: dict[Any, list[int]]) -> Loop | None:
    """The loop of a run; None where its blocks do not read alike."""
    made = {
        var: (number // run.period, number % run.period, slot)
        for number, equation in enumerate(jaxpr.eqns[run.start : run.stop])
        for slot, var in enumerate(equation.outvars)
    }
    carries: dict[tuple[Any, int, int], int] = {}
    consts: dict[Any, int] = {}
    xs: dict[tuple[Any, ...], int] = {}
    sources = []
    for offset in range(run.period):
        blocks = [jaxpr.eqns[run.start + block * run.period + offset] for block in range(run.count)]
        sources.append([])
        for variables in zip(*[equation.invars for equation in blocks], strict=True):
            source = _source(variables, made, carries, consts, xs)
            if source is None:
                return None
            sources[-1].append(source)
    read = {place for var, place in made.items() if any(not run.start <= n < run.stop for n in readers.get(var, ()))}
    if not carries:
        return None
    carried = {(e, r): number for (_, e, r), number in carries.items()}
    entries = sorted({carried[e, r] for b, e, r in read if (e, r) in carried and b < run.count - 1})
    ys = sorted({(e, r) for _, e, r in read if (e, r) not in carried})
    return Loop(
        run, tuple(map(tuple, sources)), tuple(carries), tuple(consts), tuple(xs), tuple(ys), tuple(entries),
    )  # fmt: skip


def _source(
    variables: Sequence[Any],
    made: dict[Any, tuple[int, int, int]],
    carries: dict[Any, int],
    consts: dict[Any, int],
    xs: dict[Any, int],
) -> tuple[Any, ...] | None:
    """Where one operand comes from, given what it is in each block."""
    if isinstance(variables[0], _jax.Literal):
        return ("literal",)
    places = [made.get(v) for v in variables]
    if all(place is not None and place[0] == block for block, place in enumerate(places)):
        _, equation, result = places[0] or (0, 0, 0)
        return ("inner", equation, result) if len({place[1:] for place in places if place}) == 1 else None
    before = [place is not None and place[0] == block for block, place in enumerate(places[1:])]
    if places[0] is None and all(before) and len({place[1:] for place in places[1:] if place}) == 1:
        _, equation, result = places[1] or (0, 0, 0)
        return ("carry", carries.setdefault((variables[0], equation, result), len(carries)))
    if any(place is not None for place in places):
        return None
    if all(v is variables[0] for v in variables):
        return ("const", consts.setdefault(variables[0], len(consts)))
    return ("x", xs.setdefault(tuple(variables), len(xs)))


# ---- traced again ------------------------------------------------------------------------------------------------


Stacks = dict[tuple[int, ...], tuple[Any, Sequence[Any]]]
"""{ids of values: (they, stacked; they themselves, so that they live)}: a loop over the same values as one before takes what that
one stacked, or left stacked."""


def _evaluate(jaxpr: Ordered, picks: Picks, consts: Sequence[Any], loops: Sequence[Loop], inputs: Sequence[Any]) -> list[Any]:
    """A jaxpr's outputs, its loops as scans. Where the layers of a loop pick all of a stack, that is what the scan goes over."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))
    at = {loop.run.start: loop for loop in loops}
    stacks: Stacks = {}
    wholes: dict[Any, list[_Layer]] = {}
    number = 0
    while number < len(jaxpr.eqns):
        loop = at.get(number)
        if loop is not None:
            _scan(jaxpr, loop, env, stacks)
            number = loop.run.stop
            continue
        equation = jaxpr.eqns[number]
        source, index = picks.get(equation.outvars[0], (None, 0)) if equation.outvars else (None, 0)
        if source is not None:
            layers = wholes.get(source)
            if layers is None:
                stack = _Stack(_read(source, env), source.aval.shape[0])
                layers = wholes[source] = [_Layer(stack, n) for n in range(source.aval.shape[0])]
                stacks[tuple(map(id, layers))] = _read(source, env), layers
            env[equation.outvars[0]] = layers[index]
            number += 1
            continue
        with _jax.user_context(equation):
            env.update(zip(equation.outvars, _jax.bind(equation, [_read(v, env) for v in equation.invars], 1), strict=True))
        number += 1
    return [_read(v, env) for v in jaxpr.outvars]


class _Stack:
    """What a loop stacked. It is taken apart, by one operator, where somebody reads a layer's part, and not before."""

    def __init__(self, value: Any, count: int) -> None:
        self._value, self._parts, self._count = value, list[Any](), count

    def part(self, number: int) -> Any:
        if not self._parts:
            if _jax.is_key(self._value.dtype):
                self._parts = [self._value[n] for n in range(self._count)]
            else:
                layers = jax.lax.split(self._value, (1,) * self._count)
                self._parts = [jax.lax.squeeze(layer, (0,)) for layer in layers]
        return self._parts[number]


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer's part of what a loop stacked."""

    stack: _Stack
    number: int


def _read(var: Any, env: dict[Any, Any]) -> Any:
    return var.val if isinstance(var, _jax.Literal) else _taken(env[var])


def _taken(value: Any) -> Any:
    return value.stack.part(value.number) if isinstance(value, _Layer) else value


def _scan(jaxpr: Any, loop: Loop, env: dict[Any, Any], stacks: Stacks) -> None:
    """Bind a loop as a scan; `env` gets what is read of it."""
    run, firsts = loop.run, [env[v] for v, _, _ in loop.carries]
    values = [[env[v] for v in variables] for variables in loop.xs]
    reverse = any(tuple(id(v) for v in reversed(column)) in stacks for column in values)
    columns = [column[::-1] if reverse else column for column in values]
    xs = [_stacked(column, stacks) for column in columns]
    carries, consts = [_taken(value) for value in firsts], [_read(v, env) for v in loop.consts]
    equations = jaxpr.eqns[run.start : run.start + run.period]

    def body(carry: tuple[Any, ...], x: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        outs: list[list[Any]] = []
        held: dict[str, Sequence[Any]] = {"const": consts, "carry": carry, "x": x}
        for equation, sources in zip(equations, loop.sources, strict=True):
            operands = []
            for source, var in zip(sources, equation.invars, strict=True):
                kind, *place = source
                if kind == "literal":
                    operands.append(var.val)
                else:
                    operands.append(outs[place[0]][place[1]] if kind == "inner" else held[kind][place[0]])
            with _jax.user_context(equation):
                outs.append(_jax.bind(equation, operands, 1))
        ys = [outs[e][r] for e, r in loop.ys]
        return tuple(outs[e][r] for _, e, r in loop.carries), (*ys, *[carry[k] for k in loop.entries])

    def block(number: int, e: int, r: int) -> Any:
        """The variable of a result of a block."""
        return jaxpr.eqns[run.start + number * run.period + e].outvars[r]

    with _jax.user_context(equations[0]):
        final, ys = jax.lax.scan(body, tuple(carries), tuple(xs), length=run.count, reverse=reverse)
    left: list[list[Any]] = [[_Layer(stack, n) for n in range(run.count)] for stack in [_Stack(y, run.count) for y in ys]]
    for stacked, column, (e, r) in zip(ys, left, loop.ys, strict=False):
        stacks[tuple(map(id, column))] = stacked, column
        env.update((block(n, e, r), value) for n, value in enumerate(column[::-1] if reverse else column))
    for stacked, column, k in zip(ys[len(loop.ys) :], left[len(loop.ys) :], loop.entries, strict=True):
        column[-1 if reverse else 0] = firsts[k]  # the first block receives what the program hands it
        stacks[tuple(map(id, column))] = stacked, column
        _, e, r = loop.carries[k]
        env.update((block(n, e, r), value) for n, value in enumerate((column[::-1] if reverse else column)[1:]))
    for (_, e, r), value in zip(loop.carries, final, strict=True):
        env[block(run.count - 1, e, r)] = value


def _stacked(values: Sequence[Any], stacks: Stacks) -> Any:
    key = tuple(map(id, values))
    if key not in stacks:
        stacks[key] = jnp.stack([_taken(value) for value in values]), values
    return stacks[key][0]
