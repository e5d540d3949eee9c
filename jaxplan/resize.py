"""Room `resize`: a plan's program at other extents of its named dimensions, with nothing traced.

A trace holds numbers, not names: that a dimension of 512 is the batch is nowhere in it. What can be read off it is which
dimensions some operator walks together (`plan.names`). These get a new extent together, and every operator's rule is made anew
from the new shapes. Wherever that does not settle an extent, `CannotResize` is raised instead of a guess: a cut at a fixed place,
a dimension split into parts, an array constant, a number written out that no input has, a loop counted by the like.

One thing leaves no mark in a trace and cannot be refused: a decision that Python took while tracing by looking at a shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxplan import _jax
from jaxplan.cost.symbols import DimensionNames
from jaxplan.graph import Graph, Operator, refit
from jaxplan.graph.flatten import BOUNDARY, MANUAL
from jaxplan.graph.refit import is_reshape, slice_starts, takes_one
from jaxplan.rules import Kind
from jaxplan.rules.table import whole_rule
from jaxplan.trace import Traced

Roots = tuple[int, ...]
"""What a dimension is the product of: representatives of dimensions that are one."""


class CannotResize(ValueError):
    """A dimension cannot be given another extent from the trace alone; the message says why, and where."""


@dataclass(frozen=True, eq=False)
class Origin:
    """A program as it was traced: what other extents are reckoned from. `checked`: what was found sound, by dimensions."""

    traced: Traced
    graph: Graph
    names: DimensionNames
    while_trips: float
    checked: dict[frozenset[int], list[tuple[Roots, int, str]]] = field(default_factory=dict)

    @cached_property
    def anchored(self) -> frozenset[int]:
        """What the dimensions of inputs are made of."""
        dims = [self.names.dimension_roots(tensor) for tensor in self.graph.inputs]
        return frozenset(root for roots in dims for part in roots for root in part)

    @cached_property
    def derived(self) -> frozenset[int]:
        """The anchored ones, and what operators make of them by cutting, padding and sliding windows: as long as the former stay,
        so do the latter."""
        known, graph, names = set(self.anchored), self.graph, self.names
        for operator, atoms in zip(graph.operators, names.operator_factors, strict=True):
            for tensor, terminal in zip(operator.operands, operator.rule.operands, strict=True):
                for have, dim in zip(names.dimension_roots(tensor) if tensor >= 0 else (), terminal, strict=False):
                    if have and known.issuperset(have):
                        known.update(root for factor in dim for root in names.roots(atoms[factor]))
        return frozenset(known)

    @cached_property
    def extents(self) -> dict[str, dict[int, int]]:
        """{name: {root: extent}} of the inputs' dimensions."""
        named = {name: {r: n for r, n in roots.items() if r in self.anchored} for name, roots in self.names.extents().items()}
        return {name: roots for name, roots in named.items() if roots}


def checked_sizes(origin: Origin, sizes: Any) -> dict[int, int]:
    """{root: new extent} of {name: new extent}, those that change nothing left out. ValueError for what cannot be meant."""
    if not isinstance(sizes, Mapping):
        raise TypeError(f"sizes must be {{name: extent}}, such as {{'B': 512}}, got {sizes!r}")
    known, found = origin.extents, {}
    for name, extent in sizes.items():
        if name not in known:
            there = ", ".join(f"{n}={next(iter(known[n].values()))}" for n in sorted(known)) or "none"
            raise ValueError(f"sizes names the dimension {name!r}; its inputs have {there} (dims= gives them other names)")
        if isinstance(extent, bool) or not isinstance(extent, int) or extent < 1:
            raise ValueError(f"sizes[{name!r}] must be a whole number of at least 1, got {extent!r}")
        if len(set(known[name].values())) > 1:
            several = sorted(set(known[name].values()))
            raise ValueError(f"{name!r} stands for dimensions of extents {several}: sizes needs them apart")
        found.update({root: extent for root, old in known[name].items() if old != extent})
    return found


def input_shapes(origin: Origin, sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
    """The shape of every flat input at other extents, for a trace of its own."""
    new = checked_sizes(origin, sizes)
    old = {root: extent for roots in origin.extents.values() for root, extent in roots.items()}
    return [
        tuple(math.prod(new.get(root, old[root]) for root in roots) for roots in origin.names.dimension_roots(tensor))
        for tensor in origin.graph.inputs
    ]


def resize(origin: Origin, sizes: Mapping[str, int]) -> tuple[Traced, Graph]:
    """The program with other extents, {name: extent}; names as in `plan.names`, the others keep theirs.

    Raises ValueError where a name or an extent makes no sense, CannotResize (one too) where the trace does not say what the
    program would be.
    """
    names, new = origin.names, checked_sizes(origin, sizes)
    if not new:
        return origin.traced, origin.graph
    if 1 in new.values():
        raise CannotResize("a dimension of one element is broadcast, which makes another program. Trace that anew")
    touched = frozenset(new)
    limits = origin.checked.get(touched)
    if limits is None:
        limits = origin.checked[touched] = _check(origin, touched)
    old = {root: extent for roots in names.extents().values() for root, extent in roots.items()}

    def product(roots: Iterable[int]) -> int:
        return math.prod(new.get(root, old[root]) for root in roots)

    for roots, bound, where in limits:
        if product(roots) >= bound:
            raise CannotResize(
                f"{_told(names, touched)} = {product(roots)}: the slice at {where} is of a dimension of {bound}, and would take "
                "all of it or more. Trace that anew"
            )
    shapes = [tuple([product(roots) for roots in names.dimension_roots(t)]) for t in range(len(origin.graph.tensors))]
    lengths = names.loop_roots()

    def rounds(equation: Any, trips: int, path: tuple[Any, ...]) -> float:
        if lengths.get(path):
            return float(product(lengths[path]))
        if suspicious(trips, [old[root] for root in touched]):
            raise CannotResize(
                f"the loop at {_line(equation)} runs {trips} times, and {_told(names, touched)}: whether the count "
                "follows it is not in the trace. Trace the other sizes anew"
            )
        return float(trips)

    traced, graph = refit(origin.traced, origin.graph, shapes, origin.while_trips, rounds)
    for index, (before, after) in enumerate(zip(origin.graph.operators, graph.operators, strict=True)):
        if before.rule is after.rule or is_reshape(before.equation):
            continue
        wanted = [product(names.roots(atoms)) for atoms in names.operator_factors[index]]
        if wanted != [factor.size for factor in after.rule.factors]:
            told = f"{_where(before)} has a parameter that {_told(names, touched)} may set"
            raise CannotResize(f"{told}. Trace the other sizes anew")
    return traced, graph


def resize_loops(origin: Origin, loops: Origin, sizes: Mapping[str, int]) -> tuple[Traced, Graph]:
    """A program with its unrolled layers in loops (`loops`), at other extents. `origin`: the program as it was traced. Raises
    CannotResize, also where dimensions have other names than there."""
    try:
        same = input_shapes(origin, sizes) == input_shapes(loops, sizes)
    except ValueError as error:
        raise CannotResize(f"layers that are written out, at other sizes: {error}") from error
    if not same:
        raise CannotResize("layers that are written out have other dimensions as a loop. Name them with dims=, or trace anew")
    return resize(loops, sizes)


def suspicious(number: int, extents: Iterable[int]) -> bool:
    """Whether a number written out may well be reckoned from an extent: the same, one more or less, its multiple or part."""
    return number > 1 and any(abs(number - e) <= 1 or number % e == 0 or e % number == 0 for e in extents)


def _check(origin: Origin, touched: frozenset[int]) -> list[tuple[Roots, int, str]]:
    """Raise CannotResize unless every operator's extents follow from those that change. Gives what must stay below a bound: the
    roots of a slice's result, and the extent of what it is cut from."""
    names, graph = origin.names, origin.graph
    _check_numbers(origin, touched)
    loops, limits = names.loop_roots(), []
    dims = [names.dimension_roots(tensor) for tensor in range(len(graph.tensors))]
    for index, operator in enumerate(graph.operators):
        factors = [names.roots(atoms) for atoms in names.operator_factors[index]]
        moved = [bool(touched.intersection(roots)) for roots in factors]
        there = any(moved) or any(
            touched.intersection(roots) for t in (*operator.operands, *operator.results) if t >= 0 for roots in dims[t]
        )
        if there:
            limits += _check_operator(origin, touched, operator, factors, moved, dims)
        if operator.name == BOUNDARY and operator.rule.factors and operator.rule.factors[0].kind is Kind.WHOLE:
            length = loops.get(operator.path[:-2], factors[0])
            if length != factors[0] and touched.intersection((*length, *factors[0])):
                raise CannotResize(f"a loop over {_told(names, touched)} and over something else. Trace the other sizes anew")
    return limits


def _check_operator(
    origin: Origin,
    touched: frozenset[int],
    operator: Operator,
    factors: Sequence[Roots],
    moved: Sequence[bool],
    dims: Sequence[Sequence[Roots]],
) -> list[tuple[Roots, int, str]]:
    """`factors`: the roots of each factor of the rule; `moved`: whether they change; `dims`: per tensor, of each dimension."""
    rule, told, where, limits = operator.rule, _told(origin.names, touched), _where(operator), []
    if operator.name == MANUAL:
        raise CannotResize(f"{told} goes into or out of a shard_map: its inside is not read. Trace the other sizes anew")
    if not rule.known or _guessed(origin.graph, operator, moved):
        raise CannotResize(f"{told} goes through {where}, of which only a trace tells what comes out. Trace the other sizes anew")
    if _turned(operator, moved):
        raise CannotResize(f"{told} is turned round at {where}; how far at other sizes is not traced. Trace the other sizes anew")
    starts, sides = slice_starts(operator.equation), []
    terminals = [(t, d, slot, True) for slot, (t, d) in enumerate(zip(operator.operands, rule.operands, strict=True))]
    terminals += [(t, d, slot, False) for slot, (t, d) in enumerate(zip(operator.results, rule.results, strict=True))]
    for tensor, terminal, _, read in terminals:
        used = {factor for dim in terminal for factor in dim if moved[factor]}
        if is_reshape(operator.equation):
            sides.append(used)
        if tensor < 0:
            if used:
                raise CannotResize(f"an array constant that {where} reads has {told}. Trace the other sizes anew")
            continue
        shape = origin.graph.tensors[tensor].shape
        for place, (dim, extent) in enumerate(zip(terminal, shape, strict=True)):
            have, want = dims[tensor][place], [root for factor in dim for root in factors[factor]]
            if not (touched.intersection(have) or touched.intersection(want)):
                continue
            if math.prod(rule.factors[factor].size for factor in dim) == extent:
                if sorted(have) != sorted(want):
                    raise CannotResize(
                        f"{told} is cut into parts, or is one with something else, at {where}: which of its parts would grow is "
                        "not in the trace. Trace the other sizes anew"
                    )
            elif read and takes_one(operator.equation, place):
                continue
            elif starts is not None and starts[place] and read and not touched.intersection(have):
                limits.append((tuple(want), extent, where))
            else:
                raise CannotResize(
                    f"{told} is cut, padded or strided at {where}: what comes of other extents is not in the trace. Trace "
                    "them anew"
                )
    if len({frozenset(used) for used in sides}) > 1:
        raise CannotResize(f"{told} is cut into parts at {where}, and not evenly. Trace the other sizes anew")
    return limits


def _turned(operator: Operator, moved: Sequence[bool]) -> bool:
    """Whether elements change places along a dimension that changes, by a number written out."""
    equation = operator.equation
    if equation is None or equation.primitive is not _jax.roll_p:
        return False
    return any(moved[factor] for factor in operator.rule.operands[0][equation.params["dimension"]])


def _guessed(graph: Graph, operator: Operator, moved: Sequence[bool]) -> bool:
    """Whether a rule only guesses, from equal extents, what belongs together, of tensors of several shapes."""
    rule, tensors = operator.rule, graph.tensors
    shapes = {tensors[t].shape for t in (*operator.operands, *operator.results) if t >= 0 and tensors[t].shape}
    if operator.equation is None or not any(moved) or len(shapes) < 2 or min(*operator.operands, *operator.results) < 0:
        return False
    guess = whole_rule([tensors[t] for t in operator.operands], [tensors[t] for t in operator.results])
    return (rule.factors, rule.operands, rule.results) == (guess.factors, guess.operands, guess.results)


def _check_numbers(origin: Origin, touched: frozenset[int]) -> None:
    """Raise CannotResize where an extent is written out in the program that neither an input has nor anything that is read: the
    trace does not tell what it was reckoned from.

    Numbers written out that some operator ties to an input's dimension (the length of an iota that meets a sequence) follow it.
    """
    names, graph = origin.names, origin.graph
    read = {*graph.outputs, *(tensor for operator in graph.operators for tensor in operator.operands)}
    for index, operator in enumerate(graph.operators):
        tensors = [t for t in operator.operands if t >= 0 and graph.tensors[t].shape]
        written = operator.equation is not None and operator.name != MANUAL and not is_reshape(operator.equation)
        if not written or len(tensors) > 1 or not read.intersection(operator.results):
            continue
        taken = {factor for terminal in operator.rule.operands for dim in terminal for factor in dim}
        for factor in {f for terminal in operator.rule.results for dim in terminal for f in dim} - taken:
            if any(root not in origin.derived for root in names.roots(names.operator_factors[index][factor])):
                raise CannotResize(
                    f"{_where(operator)} has a dimension of {operator.rule.factors[factor].size} that no input has: whether it "
                    f"is reckoned from {_told(names, touched)} is not in the trace. Trace the other sizes anew"
                )


def _told(names: DimensionNames, touched: Iterable[int]) -> str:
    """Such as "B (512)"."""
    found = {(name, extent) for name, roots in names.extents().items() for root, extent in roots.items() if root in touched}
    return " and ".join(f"{name} ({extent})" for name, extent in sorted(found))


def _line(equation: Any) -> str:
    file, line = _jax.source_line(equation)
    return f"{file.rsplit('/', 1)[-1]}:{line}" if file else "a place that JAX does not know"


def _where(operator: Operator) -> str:
    return operator.name if operator.equation is None else f"{operator.name} at {_line(operator.equation)}"
