"""Bytes per device that a stage holds while its parts run one after another, as 1F1B orders them.

The plan of a stage's program says where everything lies. But nothing of that program runs at once: what its loop would stack
comes and goes by micro-batch, and what leaves a part is stored, whatever a compiler could have fused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxplan import _jax
from jaxplan.cost import (
    Buffer,
    Piece,
    compiled_piece_bytes,
    facts_of,
    gathered_state,
    local_sizes,
    piece_bytes,
    terminal_layout,
)
from jaxplan.cost.buffers import TRANSIENT
from jaxplan.graph.flatten import BOUNDARY, SEEN_THROUGH, VIEW, scan_arity, total_path
from jaxplan.layout import Layout
from jaxplan.pipeline.nouns import Kind
from jaxplan.plan import Plan
from jaxplan.unlike.nouns import BACKWARD, FORWARD, PREPARE, Micro
from jaxplan.unlike.order import order
from jaxplan.unlike.programs import role_of
from jaxplan.unlike.stage import StageProgram, cut, loop_of, moved_constants, update_ends


@dataclass(frozen=True)
class Holding:
    """Bytes per device. `always`: from the first part to the last: arguments; `loop`: as long as micro-batches pass: what was
    prepared, and the stores; `row`: of a micro-batch on its way back; `arrives`, `takes`: {phase: of what a part is sent; of what
    it leaves and works with, while it runs}; `update`: the most besides arguments while the update runs."""

    always: float
    loop: float
    row: float
    arrives: Mapping[str, float]
    takes: Mapping[str, float]
    update: float

    def peak(self, stage: int, stages: int, microbatches: int) -> float:
        """The most at any step."""
        back = any([self.arrives[BACKWARD], self.takes[BACKWARD], self.row])
        worst = self.always + max(self.takes[PREPARE], self.update)
        waiting, flying = dict[tuple[str, int], float](), 0
        for number, phase, row in order(stages, microbatches, back):
            ahead = 1 if phase == FORWARD else -1
            if number == stage:
                arrived = waiting.pop((phase, row), 0.0)
                held = self.row * flying + arrived + sum(waiting.values())
                worst = max(worst, self.always + self.loop + held + self.takes[phase])
                flying += ahead if back else 0
            elif number + ahead == stage:
                waiting[phase, row] = self.arrives[phase]
        return worst


def holding(micro: Micro, program: StageProgram, plan: Plan) -> Holding:
    """What a stage holds under its plan."""
    return _Held(micro, program, plan).holding()


class _Held:
    """The values of one stage's program, as tensors of its graph."""

    def __init__(self, micro: Micro, program: StageProgram, plan: Plan) -> None:
        self.micro, self.program, self.plan = micro, program, plan
        modelled = plan.modelled
        self.graph, self.materialises = modelled.graph, modelled.numbers.machine.materialises
        gathered = {} if self.materialises else gathered_state(modelled, plan.choices)
        self.facts = facts_of(modelled, plan.choices, gathered, apart=True)
        self.local = local_sizes(modelled, self.facts)
        self.at = {op.path: op for op in self.graph.operators}
        self.jaxpr, self.loop = plan.traced.jaxpr.jaxpr, loop_of(program)
        self.body = self.loop.equation.params["jaxpr"].jaxpr
        consts, carries = scan_arity(self.loop.equation)
        self.consts = list(zip(self.loop.equation.invars[:consts], self.body.invars[:consts], strict=True))
        self.held = self.body.invars[consts : consts + carries]
        self.arriving = dict(zip(program.received, self.body.invars[consts + carries + 1 :], strict=True))
        self.sending = dict(zip(self.body.outvars[carries:], program.sent, strict=True))
        self.tensors: dict[Any, int] = dict(zip(self.jaxpr.invars, self.graph.inputs, strict=True))
        self._name()
        self.rows_over = self._rows_over()

    def _name(self) -> None:
        """Which tensor each variable is."""
        for number, equation in enumerate(self.jaxpr.eqns):
            if number == self.loop.number:
                self._name_loop()
            else:
                self._name_results(equation, (number,))

    def _name_loop(self) -> None:
        path, (consts, carries) = (self.loop.number,), scan_arity(self.loop.equation)
        for k, var in enumerate(self.body.invars):
            carried = consts <= k < consts + carries
            op = self.at.get((*path, "carry", k - consts) if carried else (*path, "in", k))
            if op is not None:
                self.tensors[var] = op.results[0]
                if carried:
                    self.tensors[self.loop.equation.outvars[k - consts]] = op.results[1]
        for number, equation in enumerate(self.body.eqns):
            self._name_results(equation, (*path, number))

    def _name_results(self, equation: Any, path: tuple[Any, ...]) -> None:
        if equation.primitive in SEEN_THROUGH:
            body = equation.params[SEEN_THROUGH[equation.primitive]]
            inner = getattr(body, "jaxpr", body)
            self._alike(inner.invars, equation.invars)
            for number, sub in enumerate(inner.eqns):
                self._name_results(sub, (*path, number))
            self._alike(equation.outvars, inner.outvars)
        elif path in self.at:
            self.tensors.update(zip(equation.outvars, self.at[path].results, strict=True))
        else:
            self._name_left(equation, path)

    def _name_left(self, equation: Any, path: tuple[Any, ...]) -> None:
        """What leaves a loop or a conditional."""
        for k, var in enumerate(equation.outvars):
            for mark in (total_path(path, k), (*path, "out", k), (*path, "carry", k)):
                if mark in self.at:
                    self.tensors[var] = self.at[mark].results[-1]
                    break

    def _alike(self, some: Sequence[Any], known: Sequence[Any]) -> None:
        for v, other in zip(some, known, strict=True):
            if not isinstance(other, _jax.Literal) and other in self.tensors:
                self.tensors[v] = self.tensors[other]

    def _rows_over(self) -> int:
        """Over how many devices the rows of a micro-batch lie, by what the stage is given of them."""
        sizes, layouts = self.plan.modelled.numbers.sizes, self.plan.input_layouts
        cut_ones = [k for k, v in enumerate(self.program.arguments) if role_of(self.micro, v).kind is Kind.CUT]
        return max([math.prod(sizes[a] for a, dim in enumerate(layouts[k]) if dim >= 0) for k in cut_ones], default=1)

    def nbytes(self, var: Any) -> float:
        """Per device, of a variable of the stage's program."""
        tensor = self.tensors.get(var, -1)
        layout = self.plan.layouts.get(tensor, self.inner.get(tensor))
        if layout is not None:
            return self.local(tensor, layout)
        return math.prod(var.aval.shape) * var.aval.dtype.itemsize / self.rows_over

    def total(self, some: Iterable[Any]) -> float:
        return sum([self.nbytes(v) for v in dict.fromkeys(some) if not isinstance(v, _jax.Literal)])

    def places(self, path: tuple[Any, ...], numbers: Sequence[int]) -> list[int]:
        """Of the order: those of the equations with these numbers in a jaxpr, loop boundaries apart; views that they read."""
        wanted, depth, operators = set(numbers), len(path), self.facts.operators
        own = {
            place for place, op in enumerate(operators)
            if op.path[:depth] == path and len(op.path) > depth and op.path[depth] in wanted
        }  # fmt: skip
        read = {tensor for place in own for tensor in operators[place].operands}
        return [place for place, op in enumerate(operators) if place in own or (op.name == VIEW and op.results[0] in read)]

    def takes(self, path: tuple[Any, ...], numbers: Sequence[int], reads: Sequence[Any], leaves: Sequence[Any]) -> float:
        """What some equations take besides what they read: results and temporaries."""
        given = {self.tensors[v] for v in reads if v in self.tensors} | self._stored
        left = {}
        for k, v in enumerate(dict.fromkeys(leaves)):
            tensor = self.tensors.get(v, -1 - k)
            left[tensor if tensor not in given else -1 - k] = self.nbytes(v), self.facts.made.get(tensor, 0)
        piece = Piece(self.places(path, numbers), given, left)
        if not self.materialises:
            return piece_bytes(piece, self.plan.memory.buffers)
        combined = self._combined(piece.places)
        own = set(piece.places)
        besides = combined + [buffer for buffer in self.widened if buffer.last in own]
        return compiled_piece_bytes(
            self.plan.modelled, self.plan.choices, self.facts, self.plan.layouts, piece, besides, {b.tensor for b in combined}
        )

    @cached_property
    def inner(self) -> dict[int, Layout]:
        """The layouts of what clusters do not leave."""
        modelled, found = self.plan.modelled, dict[int, Layout]()
        for index, cluster in enumerate(self.graph.clusters):
            options = modelled.chosen(self.plan.choices, index) if cluster.inner else ()
            found.update({value.tensor: terminal_layout(value.leads, options) for value in cluster.inner})
        return found

    @cached_property
    def widened(self) -> list[Buffer]:
        """Copies in 32 bits that the compiler for CPU makes of what products read of 16-bit floats. Each is there from when its
        source is."""
        modelled, found = self.plan.modelled, []
        pairs = zip(modelled.readings, modelled.layouts_of(self.plan.choices), strict=True)
        wanted = {(reading.reader, reading.tensor): layout for reading, (_, layout) in pairs}
        cluster = {member: index for index, c in enumerate(self.graph.clusters) for member in c.members}
        for place, (number, op) in enumerate(zip(self.facts.order.sequence, self.facts.operators, strict=True)):
            for tensor in op.operands if op.equation is not None and op.rule.product else ():
                wider = _widened(self.graph.tensors[tensor].dtype) if tensor >= 0 else 1.0
                if wider > 1:
                    layout = wanted.get((cluster[number], tensor), self.plan.layouts.get(tensor))
                    made = place if layout != self.plan.layouts.get(tensor) else self.facts.made.get(tensor, 0)
                    found.append(Buffer(tensor, TRANSIENT, wider * self.local(tensor, layout), made, place))
        return found

    def _combined(self, places: Sequence[int]) -> list[Buffer]:
        """Partial sums for the stores that are exchanged as one, so that all wait for the last of them."""
        own, stored, modelled = set(places), self._stored, self.plan.modelled
        groups: dict[tuple[frozenset[int], str], list[tuple[int, float, int, int]]] = {}
        for _, exchange in modelled.combining(self.plan.choices):
            made = self.facts.made.get(exchange.tensor, -1)
            readers = self.facts.readers.get(exchange.tensor, ())
            if made in own and readers and all(stored & {*self.facts.operators[place].results} for place in readers):
                about, sizes = self.graph.tensors[exchange.tensor], modelled.numbers.sizes
                before = [axis for axes in exchange.steps[0].before for axis in axes]
                over = frozenset([axis for step in exchange.steps for axis in step.axes])
                nbytes = _widened(about.dtype) * about.nbytes / math.prod([sizes[axis] for axis in before])
                groups.setdefault((over, about.dtype), []).append((exchange.tensor, nbytes, made, min(readers)))
        found = []
        for group in groups.values():
            last = max([read for _, _, _, read in group])
            for tensor, nbytes, made, _ in group:
                found += [Buffer(tensor, TRANSIENT, nbytes, made, last), Buffer(tensor, TRANSIENT, nbytes, last, last)]
        return found

    @property
    def _stored(self) -> set[int]:
        """Tensors in the stores' buffers."""
        found = set[int]()
        for op in self.graph.operators:
            if op.name == BOUNDARY and op.path[:-2] == (self.loop.number,) and op.path[-2] == "carry":
                found.update(t for t in (*op.operands, *op.results) if t >= 0)
        return found

    def holding(self) -> Holding:
        equations, start = self.jaxpr.eqns, self.loop.number
        first, count = len(self.program.state) + len(self.program.given), len(self.program.received)
        inputs = [self.plan.input_bytes(k) for k in range(len(self.program.arguments))]
        stores = self.total(self.held)
        _, leaves = cut(self.jaxpr, range(start))
        carries = self.loop.equation.invars[len(self.consts) : len(self.consts) + len(self.held)]
        firsts = {v for v in carries if not isinstance(v, _jax.Literal)}
        prepared = [v for v in leaves if v not in firsts]
        moved = moved_constants(self.plan, self.loop)
        once = {outer for outer, _ in moved.values()} - {outer for outer, inner in self.consts if inner not in moved}
        later = {v for e in equations[start + 1 :] for v in e.invars if not isinstance(v, _jax.Literal)}
        loop = stores + self.total([v for v in prepared if v not in once or v in later]) + self.total(moved)

        turn, end = self.loop.turn, len(self.body.eqns)
        ahead, back = cut(self.body, range(turn)), cut(self.body, range(turn, end))
        known = {*self.held, *[inner for _, inner in self.consts], self.body.invars[len(self.consts) + len(self.held)]}
        arrived = set(self.arriving.values())
        keeps = [v for v in back[0] if v not in known and (v in ahead[1] or (v in arrived and v in ahead[0]))]
        arrives = {
            FORWARD: self.total([v for v in arrived if v in ahead[0]]),
            BACKWARD: self.total([v for v in arrived if v not in ahead[0]]),
        }
        nexts = {v for v in self.body.outvars[: len(self.held)] if not isinstance(v, _jax.Literal)}
        takes = {PREPARE: loop}
        for phase, numbers, (given, left) in ((FORWARD, range(turn), ahead), (BACKWARD, range(turn, end), back)):
            takes[phase] = self.takes((start,), numbers, given, [v for v in left if v not in nexts])
        return Holding(
            sum(inputs[:first]), loop, self.total(keeps), arrives, takes,
            self._update(stores, inputs[first + count :], update_ends(equations, start)),
        )  # fmt: skip

    def _update(self, stores: float, late: Sequence[float], ends: Sequence[int]) -> float:
        """The most besides arguments while the update runs, level after level."""
        pairs = zip(self.jaxpr.outvars, self._in_place(), strict=True)
        donated = {v for v, flag in pairs if flag and not isinstance(v, _jax.Literal)}
        held = worst = stores + sum(late)
        for begin, end in zip([self.loop.number + 1, *ends], ends, strict=False):
            reads, leaves = cut(self.jaxpr, range(begin, end))
            left = [v for v in leaves if v not in donated]
            in_place = [v for v in leaves if v in donated]
            worst = max(worst, held + self.takes((), range(begin, end), [*reads, *in_place], left))
            held += self.total(left)
        return worst

    def _in_place(self) -> list[bool]:
        donated = self.plan.traced.donated
        states = len(self.program.state)
        return [k < states and donated[k] for k in range(len(self.jaxpr.outvars))]


def _widened(dtype: str) -> float:
    """How much larger the compiler for CPU keeps what it computes with."""
    return 2.0 if dtype in ("bfloat16", "float16") else 1.0
