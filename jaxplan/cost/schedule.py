"""In which order a compiler runs the operators of a graph.

Two families. Compilers that *materialise* (XLA on CPU) run each computation breadth first: whatever is ready, in the order in
which it became so. What a rematerialised call outside of a loop computes again waits for all that the call reads since jaxlib
0.11.1; before, it is computed at once, beside its first computation, and kept: only inside loops does rematerialisation save
memory there. Compilers that *fuse* (XLA on TPU and GPU) keep program order. Seen in the compiled programs of jaxlib 0.10 to 0.12
(`scripts/check_memory.py`). Who reads one of the partial sums that are combined together waits for all of them (`combined.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jaxplan import _jax
from jaxplan.graph import Graph, Operator
from jaxplan.graph.flatten import BOUNDARY, VIEW
from jaxplan.rules import Rule

Loop = tuple[Any, ...]
"""The path of a loop or branch; () is the program itself."""
Unit = tuple[str, Any]
"""What is ordered as one: a cluster, a whole loop, the copy of an operand, or an exchange of several partial sums."""
Together = tuple[tuple[int, ...], ...]
"""Operators whose partial results are combined in one exchange, for every such exchange."""


@dataclass(frozen=True)
class Order:
    """`sequence`: operator indices as they run, loops in one piece. `begins`, `ends`: {loop: first, last place in it}."""

    sequence: tuple[int, ...]
    begins: dict[Loop, int]
    ends: dict[Loop, int]


@lru_cache(maxsize=16)
def run_order(graph: Graph, materialises: bool, together: Together = ()) -> Order:
    """The order for one family of compilers. Remembered: of layouts it depends on nothing but what they combine `together`."""
    operators = _placed(graph.operators)
    sequence = _breadth_first(graph, together) if materialises else list(range(len(operators)))
    begins: dict[Loop, int] = {}
    ends: dict[Loop, int] = {}
    known = {op.path[:-2] for op in operators if op.name == BOUNDARY}
    for place, index in enumerate(sequence):
        path = operators[index].path
        for depth in range(len(path)) if known else ():
            if path[:depth] in known:
                begins.setdefault(path[:depth], place)
                ends[path[:depth]] = place
    return Order(tuple(sequence), begins, ends)


def _breadth_first(graph: Graph, together: Together) -> list[int]:
    """Rematerialised calls wait where the compiler makes them, and readers of partial sums for one another's, where clusters that
    hold several things can do so."""
    sequence: list[int] = []
    for waits, groups in dict.fromkeys([(_jax.REMAT_WAITS, together), (False, together), (_jax.REMAT_WAITS, ()), (False, ())]):
        sequence = _breadth(graph, waits).run((), groups)
        if len(sequence) == len(graph.operators):
            break
    return sequence


def _placed(operators: Sequence[Operator]) -> list[Operator]:
    """Views stand where the reader after them stands."""
    found, path = list(operators), ()
    for index in range(len(found) - 1, -1, -1):
        if found[index].name == VIEW:
            found[index] = found[index]._replace(path=path)
        path = found[index].path
    return found


def _parts(graph: Graph, operators: Sequence[Operator]) -> dict[int, tuple[int, int]]:
    """{operator: (its cluster, the part of that)}. What is drawn in rounds is a kernel of its own, which needs the key alone: a
    part with what it is drawn from. The rest of the cluster is the last part."""
    part = dict[int, tuple[int, int]]()
    for c, cluster in enumerate(graph.clusters):
        drawn = [member for member in cluster.members if operators[member].rule.rounds_words]
        makers = {t: member for member in cluster.members for t in operators[member].results} if drawn else {}
        for at, ahead in enumerate([[member] for member in drawn]):
            while ahead:
                member = ahead.pop()
                if member not in part:
                    part[member] = c, at
                    ahead += [makers[t] for t in operators[member].operands if t in makers]
        for member in cluster.members:
            part.setdefault(member, (c, len(drawn)))
    return part


class _Breadth:
    """Each computation breadth first. `waits`: the body of a rematerialised call needs all operands of the call."""

    def __init__(self, graph: Graph, operators: Sequence[Operator], waits: bool) -> None:
        self.operators = operators
        self._known = {op.path[:-2] for op in operators if op.name == BOUNDARY}
        self._chains: dict[Loop, tuple[Loop, ...]] = {(): ((),)}
        self._part, self._tensors = _parts(graph, operators), graph.tensors
        self._members: dict[Loop, dict[Unit, list[int]]] = {}
        self._needs: dict[Loop, dict[Unit, dict[Unit, None]]] = {}
        self._producer = producer = {t: i for i, op in enumerate(operators) for t in op.results}
        for index, op in enumerate(operators):
            chain, unit = self._at(index)
            self._members.setdefault(chain[-1], {}).setdefault(unit, []).append(index)
            for slot, tensor in enumerate(op.operands):
                if tensor in producer:
                    self._needs_from(index, producer[tensor], tensor, slot)
            path = op.path if waits and op.name != VIEW else ()
            for tensor in next((graph.calls[path[:n]] for n in range(len(path), 0, -1) if path[:n] in graph.calls), ()):
                if tensor in producer:
                    self._needs_from(index, producer[tensor])

    def _chain(self, loop: Loop) -> tuple[Loop, ...]:
        """A loop and those around it, outermost first."""
        if loop not in self._chains:
            around = next((loop[:depth] for depth in range(len(loop) - 1, 0, -1) if loop[:depth] in self._known), ())
            self._chains[loop] = (*self._chain(around), loop)
        return self._chains[loop]

    def _around(self, path: Loop) -> tuple[Loop, ...]:
        """The loops around what has this path, outermost first."""
        deep = range(len(path) - 1, 0, -1) if self._known else ()
        return self._chain(next((path[:d] for d in deep if path[:d] in self._known), ()))

    def _at(self, index: int) -> tuple[tuple[Loop, ...], Unit]:
        """(the loops around an operator, the unit it belongs to in the innermost). What enters or leaves a loop belongs to it; a
        view to what makes its operand, since it is no kernel."""
        op = self.operators[index]
        if op.name == VIEW and op.operands[0] in self._producer:
            source = self._at(self._producer[op.operands[0]])
            if source[1][0] == "cluster" and source[0] == self._around(op.path):
                return source
        if op.name == BOUNDARY:
            chain = self._chain(op.path[:-2])
            return chain[:-1], ("loop", chain[-1])
        return self._around(op.path), ("cluster", self._part.get(index, (-index - 1, 0)))

    def _needs_from(self, reader: int, source: int, tensor: int = -1, slot: int = -1) -> None:
        """One operator runs after another. What a convolution reads in another order of dimensions, or a product in wider numbers
        where others read it as it is, is copied between the two, by a kernel like others: the reader is ready one step later."""
        (inner, one), (other, two) = self._at(reader), self._at(source)
        depth = 0
        while depth < min(len(inner), len(other)) and inner[depth] == other[depth]:
            depth += 1
        loop = inner[depth - 1]
        mine = one if len(inner) == depth else ("loop", inner[depth])
        theirs = two if len(other) == depth else ("loop", other[depth])
        if mine == theirs:
            return
        needs = self._needs.setdefault(loop, {})
        rule, near = self.operators[reader].rule, len(inner) == len(other) == depth
        order = wanted_order(rule, slot) if near and rule.spatial and 0 <= slot < 2 else None
        if order is None and near and slot >= 0 and rule.product and _jax.PRODUCTS_STAY_NARROW and not summed_last(rule):
            order = "wider" if self._tensors[tensor].dtype == "bfloat16" else None
        if order is not None:
            copy = ("copy", (tensor, order))
            self._members.setdefault(loop, {}).setdefault(copy, [])
            needs.setdefault(copy, {})[theirs] = None
            theirs = copy
        needs.setdefault(mine, {})[theirs] = None

    def run(self, loop: Loop, together: Together = ()) -> list[int]:
        """Operator indices of a computation in order, loops inside it written out. Who reads a sum waits for the exchange of all
        that are combined `together`."""
        members, needs = dict(self._members.get(loop, {})), self._needs.get(loop, {})
        missing = {unit: len(needs.get(unit, ())) for unit in members}
        users: dict[Unit, list[Unit]] = {}
        for unit in members:
            for source in needs.get(unit, ()):
                users.setdefault(source, []).append(unit)
        for group in together:
            at = [self._at(member) for member in group]
            makers = dict.fromkeys([unit for chain, unit in at if chain[-1] == loop])
            readers = dict.fromkeys([user for unit in makers for user in users.get(unit, ()) if user[0] != "exchange"])
            exchange = ("exchange", group)
            if makers:
                members[exchange], missing[exchange], users[exchange] = [], len(makers), list(readers)
                for unit in makers:
                    users.setdefault(unit, []).append(exchange)
                for user in readers:
                    missing[user] += 1
        ready = deque([unit for unit in members if not missing[unit]])
        sequence: list[int] = []
        while ready:
            unit = ready.popleft()
            for user in users.get(unit, ()):
                missing[user] -= 1
                if not missing[user]:
                    ready.append(user)
            edges = members[unit]
            if unit[0] == "loop":
                entering = [i for i in edges if self.operators[i].path[-2] == "in"]
                sequence += [*entering, *self.run(unit[1], together), *[i for i in edges if i not in entering]]
            else:
                sequence += edges
        return sequence


@lru_cache(maxsize=4)
def _breadth(graph: Graph, waits: bool) -> _Breadth:
    return _Breadth(graph, _placed(graph.operators), waits)


def summed_last(rule: Rule) -> bool:
    """Whether a product sums over the last dimensions of its left operand, of those that are longer than 1."""
    kept = {f for dim in rule.results[0] for f in dim}
    summed = [dim[0] not in kept for dim in rule.operands[0] if dim]
    return sorted(summed) == summed and not rule.spatial


def wanted_order(rule: Rule, slot: int) -> tuple[int, ...] | None:
    """The order of dimensions in which a product wants an operand, where it is another: the left as batch, rows, summed; the
    right as batch, summed, columns. Of a matrix it takes either. Convolutions want batch, space, summed; space, summed, new."""
    other = {f for dim in rule.operands[1 - slot] for f in dim}
    result = {f for dim in rule.results[0] for f in dim}
    ranks = []
    for dim in rule.operands[slot]:
        if dim:
            summed, shared = dim[0] not in result, dim[0] in other and dim[0] in result
            if rule.spatial and (dim[0] in rule.spatial or dim[0] not in other | result):
                ranks.append(1 - slot)
            elif rule.spatial:
                ranks.append((2 if summed else 0) if slot == 0 else (1 if summed else 2))
            else:
                ranks.append(0 if shared else (2 if summed else 1) if slot == 0 else (1 if summed else 2))
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    if order == list(range(len(ranks))):
        return None
    batch = ranks.count(0)
    matrix = not rule.spatial and ranks.count(1) <= 1 and ranks.count(2) <= 1 and ranks[:batch] == [0] * batch
    return None if matrix else tuple(order)
