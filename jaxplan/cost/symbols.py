"""The algebra of symbols: the same formulas, over dimension names, axis sizes and machine symbols."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxplan.cost.build import Modelled
from jaxplan.cost.exchange import reshard_steps
from jaxplan.cost.formulas import pipeline_ticks
from jaxplan.cost.memory import OUTPUT, Memory
from jaxplan.cost.numbers import Numbers
from jaxplan.cost.price import Option, cluster_terms, sent_seconds, steps_terms, terms_seconds
from jaxplan.cost.stages import Path, Stages
from jaxplan.graph import Graph, Work
from jaxplan.graph.flatten import BOUNDARY
from jaxplan.rules import Kind

if TYPE_CHECKING:
    import sympy


CLOSE = 10**6
"""The largest denominator of a share of a tensor's bytes."""


class DimensionNames:
    """One symbol per equivalence class of dimensions: dimensions that some operator walks together are one.

    `given`: names per (tensor, dimension) that the user chose. Names else are letters: B, S, T, ... for dimensions that
    only data has, D, F, H, ... for those of state. `alike`: groups of tensors of one shape that stand for the same thing in
    every layer of a model; their dimensions share names.
    """

    def __init__(
        self, graph: Graph, given: Mapping[tuple[int, int], str] | None = None, alike: Sequence[Sequence[int]] = ()
    ) -> None:
        self._parent: list[int] = []
        self._size: list[int] = []
        self._factors: list[list[tuple[int, ...]]] = []
        self._dims: list[tuple[tuple[int, ...], ...]] = [()] * len(graph.tensors)
        self._loops: dict[Any, tuple[int, ...]] = {}
        for operator in graph.operators:
            self._visit(graph, operator)
        for group in alike:
            for tensor in group[1:]:
                for one, other in zip(self._dims[group[0]], self._dims[tensor], strict=True):
                    self._unite(one, other)
        self._names = self._letters(graph, given or {})
        self.operator_factors = self._factors

    def _fresh(self, size: int) -> int:
        self._parent.append(len(self._parent))
        self._size.append(size)
        return len(self._parent) - 1

    def _find(self, atom: int) -> int:
        while self._parent[atom] != atom:
            self._parent[atom] = self._parent[self._parent[atom]]
            atom = self._parent[atom]
        return atom

    def _unite(self, left: Sequence[int], right: Sequence[int]) -> None:
        a = [self._find(x) for x in left if self._size[x] != 1]
        b = [self._find(x) for x in right if self._size[x] != 1]
        if [self._size[x] for x in a] == [self._size[x] for x in b]:
            for x, y in zip(a, b, strict=True):
                low, high = sorted((self._find(x), self._find(y)))
                self._parent[high] = low

    def _visit(self, graph: Graph, operator: Any) -> None:
        factors: list[tuple[int, ...] | None] = [None] * len(operator.rule.factors)
        for tensor, dims in zip(operator.operands, operator.rule.operands, strict=True):
            if tensor >= 0 and not self._dims[tensor]:  # a loop's body comes before the edge that what goes round passes through
                self._dims[tensor] = tuple((self._fresh(extent),) for extent in graph.tensors[tensor].shape)
            for position, dim in enumerate(dims if tensor >= 0 else ()):
                atoms, extent = self._dims[tensor][position], graph.tensors[tensor].shape[position]
                if len(dim) == 1 and operator.rule.factors[dim[0]].size == extent:
                    if factors[dim[0]] is None:
                        factors[dim[0]] = atoms
                    else:
                        self._unite(factors[dim[0]] or (), atoms)
                elif len(dim) > 1:
                    self._split(operator.rule, dim, atoms, factors)
        filled = [
            atoms if atoms is not None else (self._fresh(factor.size),)
            for atoms, factor in zip(factors, operator.rule.factors, strict=True)
        ]
        self._factors.append([tuple(atoms) for atoms in filled])
        if operator.name == BOUNDARY and operator.rule.factors and operator.rule.factors[0].kind is Kind.WHOLE:
            self._unite(self._loops.setdefault(operator.path[:-2], filled[0]), filled[0])  # one loop, one length
        for tensor, dims in zip(operator.results, operator.rule.results, strict=True):
            shape, before = graph.tensors[tensor].shape, self._dims[tensor]
            made = tuple(self._dim_atoms(operator.rule, dim, extent, filled) for dim, extent in zip(dims, shape, strict=True))
            for one, other in zip(made, before, strict=bool(before)):
                self._unite(one, other)
            self._dims[tensor] = made

    def _dim_atoms(self, rule: Any, dim: tuple[int, ...], extent: int, filled: list[tuple[int, ...]]) -> tuple[int, ...]:
        if dim and math.prod(rule.factors[f].size for f in dim) == extent:
            return tuple(atom for f in dim for atom in filled[f])
        return (self._fresh(extent),)

    def _split(self, rule: Any, dim: tuple[int, ...], atoms: tuple[int, ...], factors: list[Any]) -> None:
        """A merged dimension whose parts are known keeps their names."""
        rest = list(atoms)
        for f in dim:
            taken: list[int] = []
            while rest and math.prod(self._size[a] for a in taken) < rule.factors[f].size:
                taken.append(rest.pop(0))
            if math.prod(self._size[a] for a in taken) != rule.factors[f].size:
                return
            if factors[f] is None:
                factors[f] = tuple(taken)

    def _letters(self, graph: Graph, given: Mapping[tuple[int, int], str]) -> dict[int, str]:
        names: dict[int, str] = {}
        for (tensor, dim), name in given.items():
            atoms = self._dims[tensor][dim]
            if len(atoms) == 1:
                names[self._find(atoms[0])] = name
        state = {graph.inputs[position] for _, position in graph.ties}
        taken = set(names.values())
        data, width = _stream("BSTUWXYZ", taken), _stream("DFHVKCEGJLMNPQR", taken)
        for of_state in (True, False):
            for tensor in graph.inputs:
                if (tensor in state) == of_state:
                    self._name_all(self._dims[tensor], names, width if of_state else data)
        other = _stream("IO", taken)
        for dims in self._dims:
            self._name_all(dims, names, other)
        for atom in range(len(self._parent)):
            if self._size[atom] != 1 and self._find(atom) not in names:
                names[self._find(atom)] = next(other)
        return names

    def _name_all(self, dims: tuple[tuple[int, ...], ...], names: dict[int, str], letters: Any) -> None:
        for atoms in dims:
            for atom in atoms:
                if self._size[atom] != 1 and self._find(atom) not in names:
                    names[self._find(atom)] = next(letters)

    def product(self, atoms: Sequence[int], symbols: dict[str, sympy.Symbol], sizes: dict[Any, int]) -> Any:
        """The product of some atoms as symbols; fills `sizes` with their values."""
        value: Any = 1
        for atom in atoms:
            if self._size[atom] != 1:
                symbol = symbols[self._names[self._find(atom)]]
                sizes[symbol] = self._size[atom]
                value = value * symbol
        return value

    def roots(self, atoms: Sequence[int]) -> tuple[int, ...]:
        """What some atoms are one with; those of extent 1 left out."""
        return tuple([self._find(atom) for atom in atoms if self._size[atom] != 1])

    def dimension_roots(self, tensor: int) -> list[tuple[int, ...]]:
        """Per dimension of a tensor, the roots that it is the product of."""
        return [self.roots(atoms) for atoms in self._dims[tensor]]

    def loop_roots(self) -> dict[Any, tuple[int, ...]]:
        """{where a loop stands: the roots that its length is the product of}, of loops over something stacked."""
        return {path: self.roots(atoms) for path, atoms in self._loops.items()}

    def extents(self) -> dict[str, dict[int, int]]:
        """{name: {root: extent}} of everything that is named."""
        found: dict[str, dict[int, int]] = {}
        for root, name in self._names.items():
            found.setdefault(name, {})[root] = self._size[root]
        return found

    @property
    def names(self) -> list[str]:
        """Every name in use."""
        return sorted(set(self._names.values()))

    def tensor_atoms(self, tensor: int) -> list[int]:
        """The atoms of a tensor's dimensions."""
        return [atom for atoms in self._dims[tensor] for atom in atoms]

    def dimension(self, tensor: int) -> list[str]:
        """A readable name per dimension of a tensor."""
        return ["*".join(self._names[self._find(a)] for a in atoms if self._size[a] != 1) or "1" for atoms in self._dims[tensor]]


def _stream(letters: str, taken: set[str]) -> Any:
    """Letters, then letters with numbers, skipping names in use."""
    number = 0
    while True:
        for letter in letters:
            name = f"{letter}{number or ''}"
            if name not in taken:
                taken.add(name)
                yield name
        number += 1


class Symbols:
    """Evaluates costs as SymPy expressions; `values` maps every symbol used to its number."""

    def __init__(self, graph: Graph, numbers: Numbers, names: DimensionNames, stages: Stages | None = None) -> None:
        """`stages`: of the pipeline that the graph is cut for, if it is: tensors then are a micro-batch's share."""
        import sympy

        self.graph, self.numbers, self.names, self.stages = graph, numbers, names, stages
        self.values: dict[Any, float] = {}
        self._dimension = {name: sympy.Symbol(name, positive=True) for name in names.names}
        self.axis_names = numbers.axis_names
        self.sizes = [self._symbol(f"n_{axis}", size) for axis, size in zip(numbers.axis_names, numbers.sizes, strict=True)]
        self.counts = numbers.sizes
        self.smaller = lambda a, b: sympy.Min(a, b, evaluate=False)
        self.larger = lambda a, b: a if b == 0 else b if a == 0 else sympy.Max(a, b, evaluate=False)

    def _symbol(self, name: str, value: float) -> Any:
        import sympy

        symbol = sympy.Symbol(name, positive=True)
        self.values[symbol] = value
        return symbol

    @property
    def microbatches(self) -> Any:
        """How many of them the pipeline's batch is cut into."""
        return self._symbol("M_micro", self.stages.asked.microbatches) if self.stages else 1

    @property
    def ticks(self) -> Any:
        return pipeline_ticks(self.microbatches, self.sizes[self.stages.asked.axis]) if self.stages else 1

    @property
    def slots(self) -> Any:
        """Micro-batches of which a stage keeps what is ringed."""
        asked = self.stages.asked if self.stages else None
        return 2 * self.sizes[asked.axis] - 1 if asked and asked.slots < asked.microbatches else self.microbatches

    def repeats(self, loop: Path | None, times: float, middle: bool = False, moved: bool = False) -> tuple[Any, float]:
        """(factor in symbols, number) of what runs so many times; `loop`: a scan of the pipeline, if it does so at every tick;
        `middle`: whether it does so for every micro-batch; `moved`: whether at every tick for one of those that are kept."""
        if moved and self.stages is not None:
            return self.ticks / self.slots, times * self.stages.asked.slots / self.stages.ticks
        if middle and self.stages is not None:
            return self.microbatches, times / self.stages.asked.microbatches
        if loop is None or self.stages is None:
            return 1, times
        asked, layers = self.stages.asked, times / self.stages.ticks  # of one stage
        even = asked.even(loop)
        return (self.ticks / self.sizes[asked.axis], layers * asked.stages) if even else (self.ticks, layers)

    def nbytes(self, tensor: int) -> Any:
        sizes: dict[Any, int] = {}
        value = self.names.product(self.names.tensor_atoms(tensor), self._dimension, sizes)
        self.values.update(sizes)
        if self.stages is not None and tensor in self.stages.divided:
            value = value / self.microbatches
        if self.stages is not None and tensor in self.stages.asked.ringed:
            value = value * self.slots / self.microbatches
        return self.graph.tensors[tensor].itemsize * value

    def flops(self, work: Work) -> Any:
        import sympy

        sizes: dict[Any, int] = {}
        total: Any = 0
        for member in work.members:
            rule = self.graph.operators[member].rule
            value: Any = sympy.Integer(int(rule.flops)) if float(rule.flops).is_integer() else sympy.Float(rule.flops)
            for atoms in self.names.operator_factors[member]:
                value = value * self.names.product(atoms, self._dimension, sizes)
            if self.stages is not None and member in self.stages.divided_operators:
                value = value / self.microbatches
            total = total + value
        self.values.update(sizes)
        return total

    def seconds_per_flop(self, dtype: str) -> Any:
        return self._symbol(f"r_{dtype}", self.numbers.seconds_per_flop(dtype))

    @property
    def seconds_per_byte(self) -> Any:
        return self._symbol("m", self.numbers.seconds_per_byte)

    def link(self, axis: int) -> tuple[Any, Any]:
        g, latency = self.numbers.link(axis)
        name = self.numbers.axis_names[axis]
        return self._symbol(f"g_{name}", g), self._symbol(f"l_{name}", latency)


def symbolic_cost(
    modelled: Modelled, choices: np.ndarray, names: DimensionNames, share: Callable[[int], float] = lambda _: 1.0
) -> tuple[sympy.Expr, dict[Any, float]]:
    """The whole program's time as a SymPy expression, and the value of each of its symbols. `share`: how much of a cluster's
    time is meant, by its number (that of an exchange between two is the reader's); all of it if not given."""
    import sympy

    symbols, stages = Symbols(modelled.graph, modelled.numbers, names, modelled.stages), modelled.stages
    parts: dict[Any, float] = {}

    def pay(value: Any, times: float, loop: Path | None, middle: bool = False, moved: bool = False) -> None:
        if value != 0 and times:
            factor, times = symbols.repeats(loop, times, middle, moved)
            parts[value * factor] = parts.get(value * factor, 0.0) + times

    for index, cluster in enumerate(modelled.graph.clusters):
        options: Sequence[Option] = modelled.chosen(choices, index)
        loop, middle = (stages.loop(index, index), index in stages.middle) if stages else (None, False)
        terms = cluster_terms(cluster, options, modelled.setting, symbols)
        pay(terms_seconds(terms, symbols), share(index) * cluster.times, loop, middle)
    for reading in modelled.readings:
        steps = reshard_steps(*modelled.edge_layouts(choices, reading), modelled.setting.order)
        if steps:
            nbytes = sympy.Rational(reading.sent) * symbols.nbytes(reading.tensor)
            loop = stages.loop(reading.writer, reading.reader) if stages else None
            middle = stages is not None and (reading.reader, reading.tensor) in stages.apiece
            moved = stages is not None and (reading.reader, reading.tensor) in stages.moved
            times = share(reading.reader) * reading.times
            pay(sent_seconds(*steps_terms(steps, nbytes, symbols.sizes), symbols), times, loop, middle, moved)
    return sympy.Add(*[_count(times) * value for value, times in parts.items()]), symbols.values


def _count(times: float) -> Any:
    """A whole number as such; sums of parts of it may have been rounded."""
    import sympy

    return round(times) if math.isclose(times, round(times), rel_tol=1e-12) else sympy.Float(times)


def symbolic_peak(
    modelled: Modelled, held: Memory, names: DimensionNames
) -> tuple[sympy.Expr, dict[Any, float]]:
    """Bytes per device of the arguments, the outputs and what lives besides at the worst moment, as a SymPy expression, and the
    value of each of its symbols. Which moment is the worst, and how much is padded, is not in symbols."""
    import sympy

    graph = modelled.graph
    symbols = Symbols(graph, modelled.numbers, names, modelled.stages)
    parts: dict[Any, int] = {}
    besides = [buffer for buffer in held.live if buffer.kind != OUTPUT]
    for buffer in (*held.given, *held.results, *besides):
        value, whole = symbols.nbytes(buffer.tensor), graph.tensors[buffer.tensor].nbytes
        for axis in buffer.axes:
            value = value / symbols.sizes[axis]
            whole = whole / modelled.numbers.sizes[axis]
        if whole:  # rounded, padded, or as often as a loop runs
            value = sympy.Rational(Fraction(buffer.nbytes / whole).limit_denominator(CLOSE)) * value
        parts[value] = parts.get(value, 0) + 1
    return sympy.Add(*[times * value for value, times in parts.items()]), symbols.values
