"""What a compiler that fuses keeps in memory, whatever the layouts: which values it stores, and when they are read.

XLA on TPU and GPU computes an element-wise value inside of every kernel that reads it, products too, and computes it again for
each, as long as it comes from no more than one large stored value; that one lives until the last such reader. What comes from
several large ones is stored if several kernels read it, unless all of them are products and no product ends in it. A product that
one element-wise chain alone reads is computed together with the end of that chain, and never stored itself. Seen in the scheduled
programs of libtpu (`scripts/check_tpu.py`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence, Set
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

from jaxplan.graph import Graph, Operator
from jaxplan.graph.flatten import BOUNDARY, VIEW
from jaxplan.rules import Kind, Rule

LARGE = 0.5
"""From this share of a value's elements on, what it is computed from counts as large."""
FEW = 1
"""Products that sum over no more elements are computed like element-wise work."""
HALF_HIDDEN = 2.0
"""The first product that is put off may take so many times as long as the exchange that it hides behind: half of it does."""

NO_SHARES: Mapping[int, float] = MappingProxyType({})


class Stored(NamedTuple):
    """What is stored when. Places are those of kernels in the order in which they run.

    `computed`: tensors that are never stored. `readers`: {stored tensor: places that read it}, also through what is computed
    again there. `made`: {tensor: place where it is computed}, where that is not the place of its operator. `narrow`: tensors of
    which all that is read is what products of default precision round them to. `shifted`: {tensor: those it is computed from that
    are not read at the very place that is written}. `outer`: {tensor: dimensions that are never innermost}. `waits`: {product:
    the place up to which its partial sums wait to be combined}, `beside`: {product: that of the last product that they may run
    beside, if they are scattered}. `copies`: (tensor, first, last place) of transposed copies,
    `turned`: (tensor, place) of results that are transposed back when they are done. `delayed`: whether products run later to
    hide behind gathers of state.
    """

    computed: frozenset[int]
    readers: Mapping[int, Sequence[int]]
    made: Mapping[int, int]
    narrow: frozenset[int]
    shifted: Mapping[int, frozenset[int]]
    outer: Mapping[int, tuple[int, ...]]
    waits: Mapping[int, int]
    beside: Mapping[int, int]
    copies: Sequence[tuple[int, int, int]]
    turned: Sequence[tuple[int, int]]
    delayed: bool = False


NOTHING = Stored(frozenset(), {}, {}, frozenset(), {}, {}, {}, {}, (), ())


def stored(
    graph: Graph,
    scattered: frozenset[int] = frozenset(),
    hidden: Mapping[int, float] = NO_SHARES,
    loops: Sequence[tuple[int, int]] = (),
    gathers: int = 0,
    groups: int = 1,
    totals: frozenset[int] = frozenset(),
) -> Stored:
    """Of a graph's operators, which run in its order.

    `scattered`: places of products whose partial sums are scattered: these are stored before anything else is computed from them.
    `hidden`: {place of what can run beside the gathers of state that end a call: what share of their time it takes}. `loops`:
    (first, last place) of each. `gathers`: how many there are, `groups`: in how many at once partial sums are combined; `totals`:
    places of additions of partial sums, stored to be combined.
    """
    operators, kernels = graph.operators, kernels_of(graph)
    found = _Fused(kernels, scattered, totals)
    delayed = found.put_off(hidden, loops, gathers, groups)
    waits = {t: min(found.near[t]) for op in operators if op.rule.product for t in op.results if found.near.get(t)}
    return Stored(
        frozenset(found.origins) | frozenset(found.moved), found.readers(),
        {t: at for place, at in found.at.items() for t in operators[place].results}, kernels.narrow,
        found.shifted, kernels.outer, waits, _beside(operators, loops), found.copies, found.turned, delayed,
    )  # fmt: skip


def hands_on(operator: Operator) -> bool:
    """Whether it stands for a tensor in another layout, or for the part of it that a round of a loop sees."""
    return operator.name == VIEW or (operator.name == BOUNDARY and operator.path[-2] == "in")


class _About(NamedTuple):
    """What a rule alone says of its operators. `reduces`: a reduction that a compiler computes inside of the kernel that makes
    its operand; `inside`: computed element by element, inside of its readers; `transposes`: hands on all elements with dimensions
    in another order; `batch`: the factors of a product that all its operands have and its result keeps."""

    reduces: bool
    inside: bool
    transposes: bool
    batch: frozenset[int]


def _about(rule: Rule) -> _About:
    sums = rule.fusible and any(f.kind in (Kind.SUM, Kind.COMBINE) for f in rule.factors)
    return _About(sums, rule.known and _inside(rule, sums), _transposes(rule), _batch(rule))


def _inside(rule: Rule, sums: bool) -> bool:
    if rule.fusible or rule.flops == 0:
        return not sums and not (rule.touched and rule.touched[-1] < 1)
    if len(rule.operands) == 3 and len(rule.touched) == 4:
        return _one_a_row(rule)
    return rule.product and math.prod([f.size for f in rule.factors if f.kind is Kind.SUM]) <= FEW


def _one_a_row(rule: Rule) -> bool:
    """Whether an update at places known from data is one element in each row of its table: computed by comparing places."""
    table, _, updates = (tuple(dim for dim in dims if dim) for dims in rule.operands)
    return len(updates) == len(table) - 1 and all(dim in table for dim in updates)


def _transposes(rule: Rule) -> bool:
    if rule.flops or len(rule.operands) != 1 or len(rule.results) != 1:
        return False
    before, after = (tuple(dim for dim in dims if dim) for dims in (rule.operands[0], rule.results[0]))
    return before != after and sorted(before) == sorted(after)


def _batch(rule: Rule) -> frozenset[int]:
    if not rule.product or len(rule.operands) < 2:
        return frozenset()
    shared = [frozenset(f for factors in dims for f in factors) for dims in (*rule.operands, *rule.results)]
    return frozenset.intersection(*shared)


def kernels_of(graph: Graph) -> Kernels:
    """Of a graph, worked out once."""
    return graph.remembered("kernels", (), lambda: Kernels(graph))


class Kernels:
    """What depends on no layout, each thing worked out when it is asked for. Places are those of operators in their graph."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self.operators = graph, graph.operators
        self._known: dict[int, _About] = {}
        self.leaving = {t for t in graph.outputs if t >= 0}

    def about(self, rule: Rule) -> _About:
        """What a rule of the graph says."""
        found = self._known.get(id(rule))
        if found is None:
            found = self._known[id(rule)] = _about(rule)
        return found

    def inside(self, operator: Operator) -> bool:
        """Whether a compiler may compute it inside of its readers."""
        if hands_on(operator):
            return True
        return operator.equation is not None and len(operator.results) == 1 and self.about(operator.rule).inside

    @cached_property
    def made(self) -> dict[int, int]:
        """{tensor: place of its maker}."""
        return {t: place for place, op in enumerate(self.operators) for t in op.results}

    @cached_property
    def inner(self) -> list[int]:
        """Places of what is computed inside of its readers."""
        return [place for place, op in enumerate(self.operators) if self.inside(op)]

    @cached_property
    def carry(self) -> set[int]:
        """Places where a loop hands a value to its next round."""
        return {place for place, op in enumerate(self.operators) if op.name == BOUNDARY and op.path[-2] == "carry"}

    @cached_property
    def near(self) -> dict[int, list[int]]:
        """{tensor: places of its readers}; who reads a view reads what it is of."""
        near: dict[int, list[int]] = {}
        for place, operator in enumerate(self.operators):
            read = operator.operands
            for tensor in dict.fromkeys(read) if len(read) > 1 else read:
                if tensor >= 0:
                    if tensor in near:
                        near[tensor].append(place)
                    else:
                        near[tensor] = [place]
        for operator in reversed(self.operators):
            if operator.name == VIEW:
                (tensor,), (view,) = operator.operands, operator.results
                own = [p for p in near[tensor] if self.operators[p] is not operator]
                near[tensor] = sorted({*own, *near.get(view, ())})
        return near

    @cached_property
    def others(self) -> dict[int, list[int]]:
        """{tensor: places of its readers that do not reduce it}."""
        sums = {place for place, op in enumerate(self.operators) if self.about(op.rule).reduces}
        return {t: near if sums.isdisjoint(near) else [r for r in near if r not in sums] for t, near in self.near.items()}

    @cached_property
    def sizes(self) -> list[int]:
        """Elements of each tensor."""
        return [math.prod(tensor.shape) for tensor in self._graph.tensors]

    @cached_property
    def narrow(self) -> frozenset[int]:
        """Tensors that are rounded before they are stored. Sums of a value are taken where it is made, before that."""
        graph, read, exact = self._graph, set[int](), set[int]()
        for operator, rounds in zip(reversed(graph.operators), reversed(rounded(graph)[1]), strict=True):
            if operator.name == VIEW:  # who reads it reads what it is of
                (tensor,), (view,) = operator.operands, operator.results
                if view in read:
                    read.add(tensor)
                if view in exact:
                    exact.add(tensor)
            elif not self.about(operator.rule).reduces:
                read.update(operator.operands)
                if not rounds:
                    exact.update(operator.operands)
        return frozenset((read - exact) & self.made.keys() - {*graph.inputs, *graph.outputs})

    @cached_property
    def outer(self) -> dict[int, tuple[int, ...]]:
        """{tensor: dimensions that are never innermost}: those in space of what convolutions make, of batches of what products
        make, and of what is computed from it place by place."""
        outer: dict[int, tuple[int, ...]] = {}
        tensors = self._graph.tensors
        for operator in self.operators:
            rule = operator.rule
            apart = rule.spatial or (self.about(rule).batch if rule.product else ())
            if apart:
                for tensor, dims in zip(operator.results, rule.results, strict=True):
                    outer[tensor] = tuple([d for d, factors in enumerate(dims) if any(f in apart for f in factors)])
            elif outer and not outer.keys().isdisjoint(operator.operands) and self.inside(operator):
                (tensor,) = operator.results
                shape = tensors[tensor].shape
                alike = [t for t in operator.operands if t in outer and tensors[t].shape == shape]
                if alike and shape:
                    outer[tensor] = outer[alike[0]]
        return outer


class _Fused:
    """`origins`: {tensor computed where it is read: the stored ones it comes from}; `moved`: {product that is not stored: (its
    place, the place of the end of its chain)}; `at`: {place of such an end: where it is computed}.
    """

    def __init__(self, kernels: Kernels, scattered: frozenset[int], totals: frozenset[int]) -> None:
        self._totals, self._kernels = totals, kernels
        self.operators, self.scattered, self.sizes = kernels.operators, scattered, kernels.sizes
        self.near, self.others, self._made, self._leaving = kernels.near, kernels.others, kernels.made, kernels.leaving
        self.origins: dict[int, tuple[int, ...]] = {}
        self.moved: dict[int, tuple[int, int]] = {}
        self.at: dict[int, int] = {}
        self.shifted: dict[int, frozenset[int]] = {}
        self.copies: list[tuple[int, int, int]] = []
        self.turned: list[tuple[int, int]] = []
        self._turns: set[int] = set()
        for place in kernels.inner:
            self._visit(place, self.operators[place])

    def put_off(self, hidden: Mapping[int, float], loops: Sequence[tuple[int, int]], gathers: int, groups: int) -> bool:
        """Products that nothing needs before a later loop is through run behind it, if there they hide behind an exchange; in a
        program without loops, those that nothing needs before all products are done: the first of them, as far as they hide;
        the very first also if only half of it does.

        Partial sums are combined in `groups`, of which each is gathered, when it has been updated, beside products whose sums
        belong to later ones: one for each of `gathers`, if it takes no longer. Whether any does.
        """
        done = max([p for p, operator in enumerate(self.operators) if operator.rule.product], default=0)
        left, beside = 1.0, 0 if loops else gathers * (groups - 1) // groups
        needed, delayed = self._needed() if beside and hidden else {}, False
        for place, share in sorted(hidden.items()):
            operator = self.operators[place]
            tensor = operator.results[0] if operator.rule.product else -1
            near = self.near.get(tensor, ())
            if not near or tensor in self.origins or any(first <= place <= last for first, last in loops):
                continue
            behind = [last for first, last in loops if place < first and last < min(near) and share <= 1.0]
            if not loops and done < min(near) and share <= (left if left < 1.0 else HALF_HIDDEN):
                behind, left = [done], left - share
            elif beside and share * gathers <= 1.0 and done < needed.get(tensor, 0):
                behind, beside = [done], beside - 1
            if behind:
                self.at[place], delayed = max(behind) + 1, True
        return delayed

    def _needed(self) -> dict[int, int]:
        """{value: the place of the first kernel that reads it, be it through what is computed again there}."""
        found: dict[int, int] = {}
        origins, end = self.origins, len(self.operators)
        for place in range(end - 1, -1, -1):
            operator = self.operators[place]
            again = [found.get(t, end) for t in operator.results if t in origins]
            at = min(again) if again else self.at.get(place, place)
            for tensor in operator.operands:
                if at < found.get(tensor, end):
                    found[tensor] = at
        return found

    def readers(self) -> dict[int, list[int]]:
        """{stored tensor: places of the kernels that read it}."""
        found: dict[int, list[int]] = {}
        again = self.origins.keys() | self.moved.keys()
        for place, operator in enumerate(self.operators):
            if again.isdisjoint(operator.results):
                for tensor in self.sources(operator):
                    found.setdefault(tensor, []).append(self.at.get(place, place))
        for tensor, (place, end) in self.moved.items():
            for source in self.sources(self.operators[place]):
                found.setdefault(source, []).append(self.at[end])
            found.pop(tensor, None)
        for operator in self.operators:
            if hands_on(operator):  # what is handed on is read by the same kernels, should it be stored after all
                near = self.near.get(operator.results[0], ())
                places = [found.get(t, [self.at.get(r, r)]) for r in near for t in self.operators[r].results[:1] or (-1,)]
                found[operator.results[0]] = [place for some in places for place in some]
        return found

    def sources(self, operator: Operator) -> Sequence[int]:
        """The stored tensors that an operator reads."""
        origins, read = self.origins, operator.operands
        if len(read) == 1:
            return origins.get(read[0], read) if read[0] >= 0 else ()
        return tuple(dict.fromkeys([s for t in read if t >= 0 for s in origins.get(t, (t,))]))

    def _visit(self, place: int, operator: Operator) -> None:
        (tensor,) = operator.results
        about, hands, sizes = self._kernels.about(operator.rule), hands_on(operator), self.sizes
        seen = tuple(self.sources(operator))
        size = sizes[tensor]
        near = self.near.get(tensor, ())
        if self._kernels.carry:  # nobody else asks
            inner = [s for t in operator.operands for s in self.shifted.get(t, ())]
            self.shifted[tensor] = frozenset(seen if operator.rule.flops == 0 and not hands else inner)
        turned = bool(self._turns) and any(t in self._turns and sizes[t] == size for t in operator.operands)
        if about.transposes != turned:
            self._turns.add(tensor)
        if hands:
            self.origins[tensor] = seen
            return
        kept = tensor in self._leaving or place in self._totals or not self._kernels.carry.isdisjoint(near)
        large = [s for s in seen if sizes[s] >= LARGE * size] if kept or len(near) > 1 else ()
        if not kept and (len(large) <= 1 or len(near) <= 1):
            self.origins[tensor] = seen
            return
        product = self._product_ending_in(operator)
        old = [s for s in large if s != product]
        if product is not None and tensor in self._turns and tensor in self._leaving and len(old) == 1:
            at = max([self._made[s] for s in large if s in self._made])
            self.copies.append((old[0], 0, at))  # state that meets a transposed product is transposed for it, and back
            self.turned.append((tensor, at))
        if product is None or self._made[product] in self.scattered:
            if not kept and all(self.operators[r].rule.product for r in near):
                self.origins[tensor] = seen
            return
        start = self._made[product]
        others = [self.at.get(self._made.get(s, 0), self._made.get(s, 0)) for s in seen if s != product]
        self.moved[product] = (start, place)
        self.at[place] = max([start, *others])

    def _product_ending_in(self, operator: Operator) -> int | None:
        """The last product that is read by a chain of element-wise operators alone, whose end this operator is."""
        best = None
        ahead = [operator]
        while ahead:
            one = ahead.pop()
            for tensor in dict.fromkeys(one.operands):  # once, or chains that read each link twice do not end
                maker = self._made.get(tensor, -1)
                if maker < 0 or len(self.others.get(tensor, ())) != 1 or tensor in self._leaving or tensor in self.moved:
                    continue
                by = self.operators[maker]
                if tensor in self.origins:
                    ahead.append(by)
                elif by.rule.product and by.scope == operator.scope and (best is None or maker > self._made[best]):
                    best = tensor
        return best


def _beside(operators: Sequence[Operator], loops: Sequence[tuple[int, int]]) -> dict[int, int]:
    """{product: place of the last product before the first one that needs it}, in one round of a loop. A compiler that hides
    exchanges behind work puts them off for as long."""
    end = len(operators)
    around = [(0, end)] * end
    for first, last in sorted(loops, key=lambda loop: loop[0] - loop[1]):
        around[first : last + 1] = [(first, last)] * (last + 1 - first)
    needed: dict[int, int] = {}
    products: dict[tuple[int, int], list[int]] = {}
    found: dict[int, int] = {}
    for place in range(end - 1, -1, -1):
        operator = operators[place]
        soonest = end
        for tensor in operator.results:
            soonest = min(soonest, needed.get(tensor, end))
        if operator.rule.product:
            later = products.setdefault(around[place], [])  # the last first
            at = bisect_left(later, 1 - soonest, key=lambda p: -p)
            if at < len(later):
                found[operator.results[0]] = later[at]
            later.append(soonest := place)
        if soonest < end:
            for tensor in operator.operands:
                if soonest < needed.get(tensor, end):
                    needed[tensor] = soonest
    return found


def rounded(graph: Graph) -> tuple[frozenset[int], tuple[bool, ...]]:
    """(tensors that only products of default precision read, be it through moves: a machine may round them before it moves or
    stores them; per operator, whether it reads what it reads as a product does)."""
    return graph.remembered("rounded", (), lambda: _rounded(graph))


def _rounded(graph: Graph) -> tuple[frozenset[int], tuple[bool, ...]]:
    leaving, read, known, exact = set(graph.outputs), set[int](), set[int](), set[int]()
    rounding = []
    for operator in reversed(graph.operators):
        results = operator.results
        for tensor in results:
            if tensor in read and tensor not in leaving and tensor not in exact:
                known.add(tensor)
        read.update(operator.operands)
        # only what is read by others is known: of most operators nothing is
        rounds = operator.rule.rounds or (not known.isdisjoint(results) and _reads_rounded(operator, known))
        rounding.append(rounds)
        if not rounds:
            exact.update(operator.operands)
    return frozenset(known), tuple(rounding[::-1])


def _reads_rounded(operator: Operator, known: Set[int]) -> bool:
    """Whether an operator reads what it reads as a product does, or hands it on to nothing else."""
    if operator.rule.rounds:
        return True
    moves = hands_on(operator)
    moves |= operator.equation is not None and operator.rule.fusible and operator.rule.flops == 0
    return moves and bool(operator.results) and all(t in known for t in operator.results)
