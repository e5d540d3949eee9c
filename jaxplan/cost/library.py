"""What a compiler that materialises keeps in memory, under a plan: which values it stores, until when, and what it broadcasts.

XLA on CPU makes kernels in two rounds. First it gives reductions to a library of vector kernels (YNNPACK), each with what can be
computed together with it: from a reduction upwards whatever only these kernels read, and downwards as long as there is a single
reader; only what the library has, and only of some size. What lies inside never shows in XLA's memory. Nothing is computed twice
here, not even a broadcast: one that two such kernels read is stored in full, one per source and shape, as equal ones are merged.
Then what is element-wise is computed inside of all its readers, as long as these are loops as well, and again for each of
them; what is costly only for a single one that reads no element twice. What any other kernel reads is stored, and loops compute
it again all the same if it comes from a single large value. Products want dimensions in an order of their own, else a copy.

Sources: xla/backends/cpu/transforms/library_rewriter.cc, xla/service/instruction_fusion.cc; compiled programs of jaxlib 0.10 and
0.12.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxplan import _jax
from jaxplan.cost.hoisting import hoisted
from jaxplan.cost.loops import ADDS, SCATTER_ADDS, fills, in_a_loop, is_step, reduces, shifts, step_of
from jaxplan.cost.schedule import Loop, Order, summed_last, wanted_order
from jaxplan.graph import Graph, Operator
from jaxplan.graph.flatten import BOUNDARY, INPUT, VIEW
from jaxplan.graph.nouns import constant
from jaxplan.layout import Layout, shards

PREFERRED = 4096
"""The library is given what reads or makes so many elements (ynn_support.cc, `kMinElements`)."""
FLOATS = ("float32", "float64")
OFTEN = 15
"""A kernel computes a value at no more places (fusion_node_indexing_evaluation.cc, `kAllowedCodeDuplication`)."""
WIDER, WIDER_PRODUCTS = {"bfloat16": 4}, {"bfloat16": 4, "float16": 4}
"""Bytes of the numbers in which all kernels but loops compute what has this type, and exchanges send it (float_normalization.cc);
and those in which products do (change_op_data_type.cc)."""
JOINED = 8
"""Loops put together no more parts (cpu_instruction_fusion.cc, `kMaxConcatenateArguments`)."""
WINDOW = 32
"""Of a reduction over more than this of a dimension, loops compute nothing: it is made in windows of this size first."""
OUTSIDE = -1
"""Who reads what leaves, or what another kernel than those of this page reads."""


def wider(dtype: str, itemsize: int) -> float:
    """How many times as large what exchanges send is, as what loops store."""
    return WIDER.get(dtype, itemsize) / itemsize


class Spread(NamedTuple):
    """What is stored besides tensors, from place `first` to place `last`: with as many elements as `tensor`, which is computed
    from it. `width`: bytes of each, 0 for as many as the tensor's."""

    tensor: int
    first: int
    last: int
    width: int = 0

    def times(self, itemsize: int) -> float:
        """How many times the bytes of the tensor, whose elements take so many."""
        return self.width / itemsize if self.width else 1.0


class Kept(NamedTuple):
    """`computed`: tensors that are never stored. `until`: {stored tensor: the last place where a kernel reads it}. `same`:
    {tensor: the one of whose elements it consists, in the same order}. `spreads`: what is stored besides. `written_over`: places
    where loops write element by element what they read. `begins`: {tensor: where its buffer is made}, of those that start as a
    broadcast, of which places are updated, and of those that are computed before the loop in whose body they stand. `sent`:
    {(tensor, place where it is read in another layout): the last place where a kernel reads that copy}. `shifted`: new values of
    loop carries that are computed from the old ones' other elements."""

    computed: frozenset[int]
    until: Mapping[int, int]
    same: Mapping[int, int]
    spreads: tuple[Spread, ...]
    written_over: frozenset[int]
    begins: Mapping[int, int]
    sent: Mapping[tuple[int, int], int]
    shifted: frozenset[int]


NO_MORE = Kept(frozenset(), {}, {}, (), frozenset(), {}, {}, frozenset())


@dataclass(slots=True)
class _Node:
    """A value: made at `place` from `sources`, by a `loop` (or another kernel), as large as `tensor`. `library`: what the library
    can take. `moves`: a loop that reads elsewhere than it writes; `spread`: a broadcast; `turns`: only the order of dimensions
    changes; `apart`: never computed inside of readers; `joins`: puts so many parts together, so it is computed inside of a single
    reader only, at a single place, and reads what it reads at so many; `copied`: for a
    product, with dimensions in another order or in wider numbers. `left`: the last place where somebody else reads it; `beside`:
    where the last of the loops ends that are given it. `width`: stored in so many bytes an element, besides the tensor; `wide`:
    in as many as products read. `updates`: only places of what it reads first."""

    place: int
    tensor: int
    sources: tuple[int, ...] = ()
    loop: bool = False
    library: bool = False
    reduces: bool = False
    costly: bool = False
    spread: bool = False
    moves: bool = False
    turns: bool = False
    apart: bool = False
    joins: int = 0
    copied: bool = False
    left: int = 0
    beside: int = 0
    width: int = 0
    wide: bool = False
    updates: bool = False
    users: list[int] = field(default_factory=list)


def kept(
    graph: Graph, order: Order, operators: Sequence[Operator], layouts: Mapping[int, Layout], sizes: Sequence[int],
    sent: frozenset[tuple[int, int]], partial: frozenset[int], leaving: Mapping[int, int],
    sunk: frozenset[int] = frozenset(), beside: frozenset[Loop] = frozenset(),
) -> Kept:  # fmt: skip
    """Of operators in the order in which they run. `layouts`: of every value; `sent`: (tensor, operator) where it is brought into
    another layout to be read; `partial`: operators whose results are combined; `leaving`: {tensor that others read too: the
    last place where they do, 0 for the end}; `sunk`: those that loops make for themselves; `beside`: loops
    of which what they are given as a broadcast stays until they end."""
    values = _Values(graph, order, operators, layouts, sizes, sunk, beside)
    values.reads.update(leaving)
    for place, index in enumerate(order.sequence):
        values.take(place, index, sent, partial)
    for tensor, place in leaving.items():
        values.leave(tensor, place)
    before: dict[int, int] = {}
    for tensor, path in hoisted(graph).items():
        loop = next((path[:n] for n in range(len(path) - 1, 0, -1) if path[:n] in order.begins), None)
        if loop is not None and tensor in values.of:  # else it stands in another part of the program
            values.leave(tensor, order.ends[loop])
            before[tensor] = order.begins[loop]
    found = values.kept()
    return found._replace(begins={**found.begins, **{t: at for t, at in before.items() if t not in found.computed}})


class _Computed(NamedTuple):
    """Where a value is computed: the last place, by which kernels, whether one of them reads its elements more than once, and at
    which places of its own each of them reads it (each a kernel, then those that move elements on the way)."""

    last: int
    kernels: frozenset[int]
    reuses: bool
    places: frozenset[tuple[int, ...]]


def _alone(place: int, kernel: int) -> _Computed:
    return _Computed(place, frozenset((kernel,)), False, frozenset(((kernel,),)))


class _Values:
    """All values of a program as such a compiler sees them: `of` a tensor, its node."""

    def __init__(
        self, graph: Graph, order: Order, operators: Sequence[Operator], layouts: Mapping[int, Layout], sizes: Sequence[int],
        sunk: frozenset[int], beside: frozenset[Loop],
    ) -> None:  # fmt: skip
        self.graph, self.operators, self._sunk = graph, operators, sunk
        self._ends = {loop: order.ends[loop] for loop in order.ends if loop in beside}
        self._begins = {}
        for place, op in enumerate(operators):
            self._begins.setdefault(op.scope, place)
        self._layouts, self._sizes = layouts, sizes
        self.nodes: list[_Node] = []
        self.of: dict[int, int] = {}
        self.same: dict[int, int] = {}
        self._made: dict[Hashable, int] = {}
        self._copies: dict[int, tuple[int, int]] = {}
        self._spreads: dict[Hashable, int] = {}
        self._sources: dict[int, tuple[Hashable, tuple[int, ...]]] = {}
        self._parts: dict[int, tuple[tuple[int, ...], int]] = {}
        self._steps: dict[Hashable, int] = {}
        self.reads = Counter([t for op in operators for t in op.operands])
        for place, op in enumerate(operators):
            if op.name in (BOUNDARY, INPUT):
                for tensor in op.results:
                    self.of[tensor] = self._new(_Node(place, tensor))

    def _new(self, node: _Node) -> int:
        self.nodes.append(node)
        for source in dict.fromkeys(node.sources):
            self.nodes[source].users.append(len(self.nodes) - 1)
        return len(self.nodes) - 1

    def leave(self, tensor: int, place: int = 0) -> None:
        """Somebody else reads it, there."""
        if tensor in self.of:
            node = self.nodes[self.of[tensor]]
            node.users.append(OUTSIDE)
            node.left = max(node.left, place)

    def elements(self, tensor: int) -> float:
        """Of one device."""
        layout = self._layouts.get(tensor)
        return math.prod(self.graph.tensors[tensor].shape) / (shards(layout, self._sizes) if layout else 1)

    def take(self, place: int, index: int, sent: frozenset[tuple[int, int]], partial: frozenset[int]) -> None:
        """One operator."""
        op = self.operators[place]
        rule = op.rule
        if op.name == BOUNDARY:
            for tensor in op.operands:
                if tensor >= 0 and tensor not in self._sunk:
                    self.leave(tensor, place)
                    if op.path[-2] == "in" and tensor in self.of:
                        node = self.nodes[self.of[tensor]]
                        node.beside = max(node.beside, self._ends.get(op.path[:-2], 0))
            return
        if op.name == INPUT:
            return
        operands = [t for t in op.operands if t >= 0]
        for tensor in operands:
            if tensor not in self.of:
                self.of[tensor] = self._new(_Node(place, tensor))
        moved = {t: self._sent(place, t) for t in dict.fromkeys(operands) if (t, index) in sent}
        if not moved and index not in partial and not self._sends(op) and self._repeats(op):
            return
        if len(op.results) == 1 and operands and self._alike(op):
            source = moved.get(operands[0], self.of[operands[0]])
            self.of[op.results[0]] = source
            if operands[0] not in moved:
                self.same[op.results[0]] = self.same.get(operands[0], operands[0])
        elif len(op.results) == 1 and rule.rounds_words:  # of the words that the last round leaves, loops make the result
            sources = tuple(moved.get(t, self.of[t]) for t in operands)
            words = [self._new(_Node(place, op.results[0], sources, width=4)) for _ in range(rule.rounds_words // 2)]
            self.of[op.results[0]] = self._new(_Node(place, op.results[0], tuple(words), True))
        elif len(op.results) == 1 and self._joins_apart(op):
            self._joined(place, op, moved)
        elif op.equation is not None and op.equation.primitive in ADDS and not moved and self._added_to(place, op):
            pass
        elif len(op.results) == 1 and in_a_loop(op):
            self._computed(place, op, moved)
        elif rule.flops == 0 and rule.known and rule.fusible and op.equation is not None:
            sources = tuple(moved.get(t, self.of[t]) for t in operands)
            for tensor in op.results:
                self.of[tensor] = self._new(_Node(place, tensor, sources, True, moves=True))
        else:
            sources = tuple(self._taken(place, op, slot, moved) for slot, t in enumerate(op.operands) if t >= 0)
            product = rule.product and self._floats(op)
            for tensor in op.results:
                made = _Node(place, tensor, sources, library=product, updates=bool(rule.touched) and rule.touched[0] < 1)
                self.of[tensor] = self._narrowed(made, self._wider(op, tensor))
        if index in partial:
            for tensor in op.results:
                self.leave(tensor, place)
                self.of[tensor] = self._narrowed(_Node(place, tensor), WIDER.get(self.graph.tensors[tensor].dtype, 0))

    def _repeats(self, op: Operator) -> bool:
        """Whether it computes what was computed before: compilers merge the two."""
        if op.equation is None or op.equation.effects or len(op.results) != 1:
            return False
        reads = [self.of[t] if t >= 0 else ("constant", constant(op, slot)) for slot, t in enumerate(op.operands)]
        key = (op.scope, op.equation.primitive, *reads, *op.equation.params.items(), self._layouts.get(op.results[0]))
        try:
            first = self._made.setdefault(key, op.results[0])
        except TypeError:  # a parameter that cannot be compared
            return False
        if first == op.results[0] or first not in self.of:
            return False
        self.of[op.results[0]] = self.of[first]
        self.same[op.results[0]] = self.same.get(first, first)
        return True

    def _sent(self, place: int, tensor: int) -> int:
        self.leave(tensor, place)
        number = self._new(_Node(place, tensor, wide=self.graph.tensors[tensor].dtype in WIDER))
        self._copies[number] = (tensor, place)
        return number

    def _wider(self, op: Operator, tensor: int) -> int:
        """Bytes of the numbers in which a kernel other than a loop has a tensor, if these are others than its own."""
        dtype, narrow = self.graph.tensors[tensor].dtype, _jax.PRODUCTS_STAY_NARROW and op.rule.product and summed_last(op.rule)
        if op.equation is None or any(share < 1 for share in op.rule.touched) or (narrow and dtype in WIDER):
            return 0
        return (WIDER_PRODUCTS if op.rule.product else WIDER).get(dtype, 0)

    def _narrowed(self, node: _Node, width: int) -> int:
        """What readers see of a kernel's result: itself, or, where that has other numbers, what loops make of them."""
        if not width:
            return self._new(node)
        node.width, node.wide = width, True
        return self._new(_Node(node.place, node.tensor, (self._new(node),), True, costly=self._rounded(node.tensor)))

    def _rounded(self, tensor: int) -> bool:
        """Whether loops compute it in wider numbers; to round these is costly (cpu_instruction_fusion.cc)."""
        return self.graph.tensors[tensor].dtype in WIDER

    def _taken(self, place: int, op: Operator, slot: int, moved: Mapping[int, int]) -> int:
        """What a kernel other than a loop reads. Products read a matrix that is transposed where it lies; others are copied."""
        tensor = op.operands[slot]
        number = moved.get(tensor, self.of[tensor])
        node, order = self.nodes[number], None
        if op.rule.product and node.turns and not op.rule.spatial:
            number = node.sources[0]
            node = self.nodes[number]
        elif op.rule.product and slot < 2:
            order = wanted_order(op.rule, slot)
        width = self._wider(op, tensor)
        if order is None and (not width or node.wide):
            return number
        key = (op.scope, "copied", number, order, width)
        if key not in self._spreads:
            first = min(place, max(self._begins[op.scope], node.place + 1 if node.place <= place else 0))
            copy = _Node(first, tensor, (number,), True, moves=order is not None, copied=True, width=width, wide=width > 0)
            self._spreads[key] = self._new(copy)
        return self._spreads[key]

    def _added_to(self, place: int, op: Operator) -> bool:
        """Whether it adds what was scattered into zeros, and nothing else reads: that is scattered into the other operand."""
        for slot, tensor in enumerate(op.operands):
            number = self.of.get(tensor, -1)
            node, other = self.nodes[number], self.of.get(op.operands[1 - slot], number)
            maker = self.operators[node.place]
            alone = number >= 0 and other != number and node.updates and self.reads[tensor] == 1 and maker.scope == op.scope
            if alone and maker.equation is not None and maker.equation.primitive in SCATTER_ADDS and self._zeros(node.sources[0]):
                for source in dict.fromkeys(node.sources):
                    self.nodes[source].users.remove(number)
                self.of[op.results[0]] = self._new(_Node(place, op.results[0], (other, *node.sources[1:]), updates=True))
                return True
        return False

    def _zeros(self, number: int) -> bool:
        root, _ = self._sources.get(number, (None, ()))
        return isinstance(root, tuple) and root[1] == "constant" and root[2][-1] in ("0", "0.0")

    def _floats(self, op: Operator) -> bool:
        return all(self.graph.tensors[t].dtype in FLOATS for t in (*op.operands, *op.results) if t >= 0)

    def _alike(self, op: Operator) -> bool:
        """Whether it hands on all elements in their order."""
        if op.name == VIEW:
            return True
        rule = op.rule
        if len(op.operands) != 1 or not rule.known or not rule.fusible or not (rule.flops == 0 or rule.library):
            return False
        sides = rule.operands[0], rule.results[0]
        before, after = ([f for dim in dims for f in dim if rule.factors[f].size > 1] for dims in sides)
        shapes = [self.graph.tensors[t].shape for t in (op.operands[0], op.results[0])]
        turned = shapes[0] == shapes[1] and shifts(rule)
        moves = (rule.flops == 0 and not turned) or len(shapes[0]) != len(shapes[1])
        return moves and before == after and math.prod(shapes[0]) == math.prod(shapes[1])

    def _in_windows(self, op: Operator) -> bool:
        """Whether a reduction is made window by window first, which no loop does (tree_reduction_rewriter.cc)."""
        kept = {f for dim in op.rule.results[0] for f in dim}
        axes = list(zip(self._layouts.get(op.operands[0], ()), self._sizes, strict=False))
        return any(
            math.prod([op.rule.factors[f].size for f in dim]) > WINDOW * math.prod([size for at, size in axes if at == d])
            for d, dim in enumerate(op.rule.operands[0]) if not kept.issuperset(dim)
        )  # fmt: skip

    def _sends(self, op: Operator) -> bool:
        """Whether parts that it puts together come from other devices. Compilers do not merge two such."""
        return op.rule.joins >= 0 and op.rule.joins in self._layouts.get(op.results[0], ())

    def _joins_apart(self, op: Operator) -> bool:
        """Whether putting parts together is a kernel of its own: of many, or along an innermost dimension that is long enough."""
        if op.rule.joins < 0 or len(op.operands) > JOINED:
            return op.rule.joins >= 0
        if op.rule.joins != len(op.rule.results[0]) - 1:
            return False
        about, layout = self.graph.tensors[op.results[0]], self._layouts.get(op.results[0])
        along = zip(layout or (), self._sizes, strict=False)
        inner = about.shape[-1] / math.prod([size for dim, size in along if dim == op.rule.joins])
        if not _jax.JOINS_EARLY:
            return inner >= 128
        return inner * about.itemsize >= 64 and self.elements(op.results[0]) * about.itemsize >= 2048

    def _joined(self, place: int, op: Operator, moved: Mapping[int, int]) -> None:
        """What such a kernel makes of what it reads, each stored. Parts of a single value are cut as soon as that is there."""
        sources = [moved.get(t, self.of[t]) for t in op.operands if t >= 0]
        if len(op.operands) == 1:
            (number,), node = sources, self.nodes[sources[0]]
            first = min(place, max(self._begins[op.scope], node.place + 1 if node.place <= place else 0))
            sources = [self._new(_Node(first, op.results[0], (number,), True, moves=True, copied=True))]
        self.of[op.results[0]] = self._new(_Node(place, op.results[0], tuple(sources)))
        if len(op.operands) > 1:
            self._parts[self.of[op.results[0]]] = tuple(sources), op.rule.joins

    def _computed(self, place: int, op: Operator, moved: Mapping[int, int]) -> None:
        """What a loop computes."""
        rule, result = op.rule, op.results[0]
        broadcast, summed = rule.flops == 0 and len(op.operands) == 1, reduces(rule)
        whole, known = self._whole(result), [t for t in op.operands if t >= 0]
        wide = not summed and (broadcast or rule.flops > 0) and not rule.touched and whole > 1
        slots = [(slot, tensor) for slot, tensor in enumerate(op.operands) if wide or tensor >= 0]
        sources = [self._read(op, slot, tensor, place, moved, wide) for slot, tensor in slots]
        if summed:
            sources = [part for source in sources for part in self._parts_of(op, source)]
        if broadcast and wide and sources and self.nodes[sources[0]].spread:
            self.of[result] = sources[0]
            return
        large = max(map(self.elements, (*known, result)))
        what, slot = step_of(op) if self._rounded(result) and len(known) == 1 else ("", -1)
        if what:
            key = (op.scope, what, self.of[op.operands[slot]], self._layouts.get(result))
            if key not in self._steps:
                self._steps[key] = self._new(_Node(place, result, tuple(sources), True, costly=True))
            if is_step(op):
                self.of[result] = self._steps[key]
                return
            sources.append(self._steps[key])
        self.of[result] = self._new(_Node(
            place, result, tuple(sources), not (summed and not self._floats(op) and self._in_windows(op)),
            library=(rule.library or rule.product) and self._floats(op) and large >= PREFERRED,
            reduces=summed,
            costly=rule.costly == 2 or (rule.costly == 1 and op.operands[-1] >= 0) or (rule.flops > 0 and self._rounded(result)),
            moves=broadcast or summed or bool(rule.touched) or (rule.flops == 0 and len(op.operands) > 1),
            turns=broadcast and bool(known) and whole == self._whole(known[0]) and not shifts(rule),
            apart=rule.costly == 3,
            joins=0 if rule.joins < 0 else 1 if self._sends(op) else 2 if len(known) == 1 else 1,
        ))  # fmt: skip
        if rule.joins >= 0 and len(sources) > 1:
            self._parts[self.of[result]] = tuple(sources), rule.joins

    def _parts_of(self, op: Operator, source: int) -> tuple[int, ...]:
        """What a reduction reads of a value: the parts that are put together along a dimension that it reduces, each reduced by
        itself (algebraic_simplifier.cc)."""
        parts, joined = self._parts.get(source, ((), -1))
        kept = {f for dim in op.rule.results[0] for f in dim}
        return parts if parts and not kept.issuperset(op.rule.operands[0][joined]) else (source,)

    def _whole(self, tensor: int) -> int:
        return math.prod(self.graph.tensors[tensor].shape)

    def _read(self, op: Operator, slot: int, tensor: int, place: int, moved: Mapping[int, int], wide: bool) -> int:
        """What a loop reads of an operand: a broadcast of it, where it is smaller than what is computed."""
        if tensor < 0:
            return self._broadcast(op, (op.scope, "constant", constant(op, slot)), (), place, -1)
        source = moved.get(tensor, self.of[tensor])
        rule, shape = op.rule, self.graph.tensors[tensor].shape
        if wide and math.prod(shape) < self._whole(op.results[0]) and fills(rule, slot, shape):
            flat = [f for dim in rule.results[0] for f in dim]
            own = [f for dim in rule.operands[slot] for f in dim]
            if all(f in flat for f in own):
                return self._broadcast(op, (op.scope, source), tuple([flat.index(f) for f in own]), place, source)
        return source

    def _broadcast(self, op: Operator, root: Hashable, at: tuple[int, ...], place: int, source: int) -> int:
        """The value that a broadcast makes: equal ones are one. `at`: which dimensions of it those of what it broadcasts are."""
        result = op.results[0]
        sizes = tuple([op.rule.factors[f].size for dim in op.rule.results[0] for f in dim])
        node = self.nodes[source] if source >= 0 else None
        if node is not None and node.spread and source in self._sources:  # a broadcast of a broadcast
            inner, where = self._sources[source]
            if len(at) >= max(where, default=-1) + 1:
                root, at = inner, tuple([at[d] for d in where])
        key = (root, at, sizes)
        if key not in self._spreads:
            begin = self._begins[op.scope]
            sources = node.sources if node is not None and node.spread else (source,) if source >= 0 else ()
            first = min(place, max([begin, *[self.nodes[s].place + 1 for s in sources if self.nodes[s].place <= place]]))
            self._spreads[key] = self._new(_Node(first, result, sources, True, list(at) == sorted(at), spread=True))
            self._sources[self._spreads[key]] = (root, at)
        return self._spreads[key]

    # ---- kernels ---------------------------------------------------------------------------------------------

    def kept(self) -> Kept:
        """What is stored in the end."""
        home, nodes = self._libraries(), self.nodes
        for node in nodes:
            of = nodes[node.sources[0]] if node.copied else node
            if node.copied and of.loop and not (of.costly or of.apart or node.sources[0] in home):
                node.place = min(node.place, of.place)  # both are computed from the same, as soon as that is there
        until: dict[int, int] = {}
        spreads: list[Spread] = []
        begins: dict[int, int] = {}
        unstored: set[int] = set()
        found = [_alone(node.place, number) for number, node in enumerate(nodes)]
        for number in range(len(nodes) - 1, -1, -1):
            node, group = nodes[number], home.get(number, number)
            if group != number:
                unstored.add(number)
                found[number] = _alone(nodes[group].place, group)
                continue
            inside = [] if number in home else self._inside(number, found, home)
            others = [r for r in node.users if r not in inside]
            again = [found[r] for r in inside]
            if not others:
                unstored.add(number)
            else:
                last = max([node.place, node.left, *[found[r].last for r in others if r != OUTSIDE]])
                begun = self._updated(number, others)
                if begun is not None:
                    begins[begun] = node.place
                elif node.spread or node.copied or node.width:
                    spreads.append(Spread(node.tensor, node.place, max(last, node.beside), node.width))
                until[number] = last
                again.append(found[number])
            if inside:
                kernels = frozenset().union(*[one.kernels for one in again])
                reuses = any(nodes[r].spread or found[r].reuses for r in inside)
                found[number] = _Computed(max(one.last for one in again), kernels, reuses, self._places(inside, found))
        computed = frozenset(t for t, number in self.of.items() if number in unstored or nodes[number].spread)
        places = {t: until[number] for t, number in self.of.items() if number in until}
        over = frozenset(node.place for node in nodes if node.loop and not node.moves and not node.spread)
        over -= {node.place for node in nodes if node.width and not node.loop}  # of a kernel's result, loops there make another
        sent = {copy: until[number] for number, copy in self._copies.items() if number in until}
        return Kept(computed, places, self.same, tuple(spreads), over, begins, sent, self._shifted(found, home))

    def _shifted(self, found: Sequence[_Computed], home: Mapping[int, int]) -> frozenset[int]:
        """The new values of carries that a single kernel computes from other elements of the old ones than it writes."""
        new = set[int]()
        for op in self.operators:
            if op.name == BOUNDARY and op.path[-2] == "carry" and op.operands[1] in self.of and op.results[0] in self.of:
                kernel, old = self.of[op.operands[1]], self.nodes[self.of[op.results[0]]]
                loops = [r for r in old.users if r != OUTSIDE and self.nodes[r].loop and r not in home]
                if any(place[0] == kernel and len(place) > 1 for place in self._places(loops, found)):
                    new.add(op.operands[1])
        return frozenset(new)

    def _inside(self, number: int, found: Sequence[_Computed], home: Mapping[int, int]) -> list[int]:
        """The readers that compute a value themselves."""
        node, nodes = self.nodes[number], self.nodes
        if not node.loop or node.apart:
            return []
        loops = [r for r in node.users if r != OUTSIDE and nodes[r].loop and r not in home]
        if node.costly:
            several = len(loops) < len(node.users) or len(frozenset().union(*[found[r].kernels for r in loops])) > 1
            return [] if several or any(nodes[r].spread or found[r].reuses for r in loops) else loops
        if len(loops) < len(node.users) and not self._unary(node):
            return []
        places = self._places(loops, found)
        if node.joins and len(places) > 1:
            return []
        times = Counter(place[0] for place in places)
        return loops if max(times.values(), default=0) <= OFTEN else []

    def _places(self, readers: Sequence[int], found: Sequence[_Computed]) -> frozenset[tuple[int, ...]]:
        """Where a value is read, by its readers' own places: those that move elements read it elsewhere than they write."""
        own = [(r, place) for r in readers for place in found[r].places]
        return frozenset(
            (*place, r, part) if self.nodes[r].moves or self.nodes[r].spread else place
            for r, place in own for part in range(max(1, self.nodes[r].joins))
        )  # fmt: skip

    def _updated(self, number: int, readers: Sequence[int]) -> int | None:
        """The tensor that a broadcast becomes, where all that is done with it is to update places of it."""
        node = self.nodes[number]
        reader = self.nodes[readers[0]] if node.spread and len(readers) == 1 and readers[0] != OUTSIDE else None
        alike = reader is not None and reader.updates and self.elements(reader.tensor) == self.elements(node.tensor)
        return reader.tensor if reader is not None and alike and reader.sources[0] == number else None

    def _unary(self, node: _Node) -> bool:
        """Whether it reads at most one value that is as large, or no more than it makes."""
        most = len(self._wide(node.tensor))
        large = [s for s in node.sources if not self.nodes[s].spread and len(self._wide(self.nodes[s].tensor)) >= most]
        read = sum(self.elements(self.nodes[s].tensor) for s in node.sources)
        return len(large) <= 1 or read <= self.elements(node.tensor)

    def _wide(self, tensor: int) -> list[int]:
        return [extent for extent in self.graph.tensors[tensor].shape if extent != 1]

    def _libraries(self) -> dict[int, int]:
        """{value: the result of the library's kernel that computes it}."""
        home: dict[int, int] = {}
        for number in range(len(self.nodes) - 1, -1, -1):
            node = self.nodes[number]
            if node.reduces and node.library and number not in home:
                group, root = self._grown(number, home)
                home.update(dict.fromkeys(group, root))
        return home

    def _grown(self, centre: int, home: Mapping[int, int]) -> tuple[set[int], int]:
        nodes, group, root = self.nodes, {centre}, centre
        while True:
            before = len(group)
            ahead = list(group)
            while ahead:
                for source in nodes[ahead.pop()].sources:
                    new = source not in group and source not in home and nodes[source].library
                    if new and all(user in group for user in nodes[source].users):
                        group.add(source)
                        ahead.append(source)
            users = set(nodes[root].users)
            if len(users) == 1 and OUTSIDE not in users:
                (user,) = users
                if nodes[user].library and user not in home:
                    group.add(user)
                    root = user
            if len(group) == before:
                return group, root
