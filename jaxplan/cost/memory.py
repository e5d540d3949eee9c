"""Bytes per device: what lives when, under planned layouts, and the most that lives at once.

Buffers are what is not fused away: what a cluster leaves for another, the copies that exchanges make, loop carries (one buffer,
updated in place where nothing else reads the old value) and what a loop stacks. A donated input's buffer becomes its new value's.
Compilers that materialise also keep temporaries in output buffers that are not yet written, as XLA does: largest first, where
they fit.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from jaxplan.cost.buffers import (
    HELD,
    OUTPUT,
    TRANSIENT,
    Buffer,
    Copied,
    Facts,
    Local,
    Roots,
    axes_of,
    outside_outputs,
    stored_besides,
)
from jaxplan.cost.build import Modelled
from jaxplan.cost.combined import combined
from jaxplan.cost.exchange import reshard_steps
from jaxplan.cost.fusing import NOTHING, hands_on, stored
from jaxplan.cost.heap import stack_by_size, stack_in_order
from jaxplan.cost.hidden import gathered_state, groups, hidden, scattered, totals
from jaxplan.cost.library import kept
from jaxplan.cost.loops import in_a_loop
from jaxplan.cost.price import terminal_layout, write_layout
from jaxplan.cost.schedule import Together, run_order
from jaxplan.cost.stage_memory import (
    as_one_loop,
    before_loop,
    carried_elsewhere,
    cut_arguments,
    cut_out,
    enters_middle,
    from_the_start,
    gathered_layers,
    kept_before,
    single_layers,
    staged,
)
from jaxplan.cost.stages import Path
from jaxplan.cost.tiles import local_shape, padding, whole_tiles
from jaxplan.cost.transients import to_outputs, transients
from jaxplan.graph import Graph, Operator
from jaxplan.graph.flatten import BOUNDARY, VIEW
from jaxplan.layout import Layout, shards


@dataclass(frozen=True)
class Memory:
    """Bytes per device of one call: `arguments`, `outputs` that are not an argument's own buffer, and what lives besides at the
    worst moment: `temporaries`. `live`: the buffers of that moment, or, where places in memory are given in order, those that the
    highest address stands on, of which some may be gone already (`cost/heap.py`); largest first. `results`: the buffers of the
    outputs, `given`: of the arguments; `moment`: the place of it in the order of operators; `over`: what lives besides arguments
    and outputs at every place of that order, `sequence`; `buffers`: all that is stored besides arguments, outputs too."""

    arguments: float
    outputs: float
    temporaries: float
    live: tuple[Buffer, ...]
    results: tuple[Buffer, ...]
    given: tuple[Buffer, ...]
    moment: int
    over: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)
    buffers: tuple[Buffer, ...] = field(default=(), repr=False, compare=False)
    sequence: Sequence[int] = field(default=(), repr=False, compare=False)

    @property
    def peak(self) -> float:
        """All of it."""
        return self.arguments + self.outputs + self.temporaries

    def over_all(self, sequence: Sequence[int]) -> np.ndarray:
        """All that is taken while each operator of a sequence runs, and at two places after it, arguments and outputs included:
        what lives, stretched so that the most is the peak (a heap may reach higher than what lives in it)."""
        most = float(self.over.max(initial=0.0))
        found = np.full(len(sequence) + 2, self.arguments + self.outputs)
        found[: len(self.over)] += self.over * (self.temporaries / most if most else 1.0)
        if sequence != self.sequence:  # what is combined together differs from plan to plan, and with it the order
            place = {operator: at for at, operator in enumerate(self.sequence)}
            found[: len(sequence)] = found[[place[operator] for operator in sequence]]
        return found


def memory(
    modelled: Modelled,
    choices: np.ndarray,
    layouts: Mapping[int, Layout],
    inputs: Sequence[Layout],
    outputs: Sequence[Layout],
    donated: Sequence[bool],
) -> Memory:
    """Of a plan. `layouts`: per tensor that a cluster leaves; `inputs`, `outputs`: per flat input and output of the program."""
    graph, machine = modelled.graph, modelled.numbers.machine
    gathered = {} if machine.materialises else gathered_state(modelled, choices)
    facts = facts_of(modelled, choices, gathered)
    layouts = {**{t: layout for t, layout in facts.inner.items() if t not in facts.fused}, **layouts}
    local = local_sizes(modelled, facts)
    ties = dict(graph.ties)
    given = [_buffer(tensor, OUTPUT, local(tensor, layout), layout) for tensor, layout in zip(graph.inputs, inputs, strict=True)]
    own: dict[int, float] = {}
    results: dict[int, Buffer] = {}
    for position, tensor in enumerate(graph.outputs):
        if tensor >= 0 and not (position in ties and donated[ties[position]]):
            own[tensor] = local(tensor, outputs[position])
            results[tensor] = _buffer(tensor, OUTPUT, own[tensor], outputs[position])
    replaced = {graph.outputs[position]: graph.inputs[ties[position]] for position in ties if donated[ties[position]]}

    def copy(tensor: int, first: int, last: int) -> Buffer:
        layout = layouts.get(tensor)
        return Buffer(tensor, TRANSIENT, local(tensor, layout), first, last, axes_of(layout))

    copied = _stacks_copied(modelled, choices, facts) if machine.materialises else {}
    held, roots = held_buffers(graph, facts, layouts, own, replaced, local, copied)
    cut = {t for t in cut_out(modelled, choices) if t in facts.made and in_a_loop(facts.operators[facts.made[t]])}
    held = [buffer for buffer in held if buffer.tensor not in cut]
    held = gathered_layers(modelled, facts, layouts, local, from_the_start(modelled, facts, held, roots), roots)
    buffers = held + transients(modelled, choices, facts, local) + _rounded_before(modelled, facts, layouts, local)
    buffers += stored_besides(graph, facts, layouts, local)
    buffers += kept_before(modelled, facts, layouts, local) + cut_arguments(modelled, facts, inputs, local)
    buffers += carried_elsewhere(modelled, choices, facts, local)
    if modelled.stages is not None and modelled.stages.asked.middle:
        buffers = as_one_loop(modelled.stages, facts, buffers, roots, copied)
    places = len(facts.order.sequence) + 2
    if machine.materialises:
        buffers += to_outputs(modelled, facts, layouts, outputs, local)
        heap = outside_outputs(buffers, facts.kept.written_over)
    else:
        looped = {op.operands[0] for op in facts.operators if op.name == BOUNDARY and op.path[-2] == "in"}
        for tensor, old in gathered.items():
            if tensor in replaced and old in looped:  # its new value is gathered into the place of the old, of which a copy stays
                about, layout = graph.tensors[old], layouts.get(tensor)
                tiled = machine.tile is None or whole_tiles(about.shape, layout, modelled.numbers.sizes, machine.tile)
                layout = layouts.get(old) if tiled else layout  # else only a part is copied, since it has to be moved anyway
                buffers.append(Buffer(old, TRANSIENT, local(old, layout), 0, facts.made.get(tensor, 0), axes_of(layout)))
        late = _overtaken(graph, facts, replaced, layouts, local)
        turned = [(tensor, at, late.pop(tensor, at)) for tensor, at in facts.more.turned]
        buffers += [copy(tensor, facts.made[tensor], until) for tensor, until in late.items()]
        pairs = zip(facts.more.copies, turned, strict=True)
        transposed = [copy(old, first, max(last, until)) for (old, first, last), (_, _, until) in pairs]
        heap = _far(buffers + transposed, facts, machine.near_bytes)
        far = {id(buffer) for buffer in heap}
        news = [copy(*new) for old, new in zip(transposed, turned, strict=True) if id(old) not in far]
        if news:  # there where there is room; those of copies in main memory are written over them
            heap = _far(buffers + transposed + news, facts, machine.near_bytes)
    lives = lives_of(heap, places)
    at = int(lives.argmax())
    live, most = [b for b in heap if b.first <= at <= b.last and b.nbytes], float(lives[at])
    if machine.in_order:
        live = [heap[i] for i in stack_in_order([(b.first, b.last, round(b.nbytes)) for b in heap])]
        most = math.fsum(b.nbytes for b in live)
    elif machine.materialises:
        stacked = [heap[i] for i in stack_by_size([(b.first, b.last, round(b.nbytes)) for b in heap])]
        height = math.fsum(b.nbytes for b in stacked)
        live, most = (stacked, height) if height > most else (live, most)
    live.sort(key=lambda b: (-b.nbytes, b.tensor))
    arguments, total = sum(b.nbytes for b in given), sum(own.values())
    return Memory(
        float(arguments), float(total), most, tuple(live), tuple(results.values()), tuple(given), at, lives[:-1],
        tuple(buffers if machine.materialises else heap), facts.order.sequence,
    )  # fmt: skip


def lives_of(heap: Sequence[Buffer], places: int) -> np.ndarray:
    """Bytes that live at each place."""
    change = np.zeros(places + 1)
    for buffer in heap:
        change[buffer.first] += buffer.nbytes
        change[buffer.last + 1] -= buffer.nbytes
    return np.cumsum(change)


def _buffer(tensor: int, kind: str, nbytes: float, layout: Layout | None) -> Buffer:
    return Buffer(tensor, kind, nbytes, 0, 0, axes_of(layout))


def local_sizes(modelled: Modelled, facts: Facts) -> Local:
    """Bytes per device: rounded where all that is read is rounded, and padded to tiles, as the machine does."""
    return local_bytes(modelled, facts.more.narrow, facts.more.outer)


def local_bytes(
    modelled: Modelled, narrow: frozenset[int] = NOTHING.narrow, outer: Mapping[int, tuple[int, ...]] = NOTHING.outer
) -> Local:
    """The same. `narrow`: tensors that are rounded; `outer`: dimensions of tensors that fill no tiles."""
    graph, sizes, machine = modelled.graph, modelled.numbers.sizes, modelled.numbers.machine
    own = modelled.stages.own if modelled.stages is not None else {}
    known = dict[Hashable, float]()

    def local(tensor: int, layout: Layout | None) -> float:
        about = graph.tensors[tensor]
        key = about.shape, about.dtype, layout, tensor in narrow, outer.get(tensor, ()), own.get(tensor, 1.0)
        nbytes = known.get(key)
        if nbytes is None:
            nbytes = about.nbytes * own.get(tensor, 1.0) / (shards(layout, sizes) if layout is not None else 1)
            if tensor in narrow:
                nbytes *= machine.rounded_share(about.dtype)
            if machine.tile is not None:
                nbytes *= padding(local_shape(about.shape, layout, sizes), machine.tile, outer.get(tensor, ()))
            known[key] = nbytes
        return nbytes

    return local


def running_order(modelled: Modelled, choices: np.ndarray) -> Sequence[int]:
    """The operators in the order in which memory takes them to run: their numbers in the graph."""
    gathered = {} if modelled.numbers.machine.materialises else gathered_state(modelled, choices)
    return facts_of(modelled, choices, gathered).order.sequence


def facts_of(modelled: Modelled, choices: np.ndarray, gathered: Mapping[int, int], apart: bool = False) -> Facts:
    """What a plan leaves to layouts. `gathered`: the state that products may hide behind; `apart`: the operators are compiled in
    parts, over which no sums are combined together."""
    if modelled.numbers.machine.materialises:
        return modelled.remembered("kept", choices, lambda: _materialised(modelled, choices, apart), apart, speeds=True)
    behind = hidden(modelled, choices) if gathered else frozenset[tuple[int, float]]()
    together = groups(modelled, choices) if behind else 1
    about = scattered(modelled, choices), behind, len(gathered), together
    return _facts(modelled.graph, False, *about, totals=totals(modelled, choices))


def _materialised(modelled: Modelled, choices: np.ndarray, apart: bool) -> Facts:
    graph, alternates = modelled.graph, modelled.stages is not None and bool(modelled.stages.asked.middle)
    facts = _facts(graph, True, sinks=not alternates)
    together = () if apart else combined(modelled, choices, facts)
    if together:
        facts = _facts(graph, True, sinks=not alternates, together=together)
        last = {member: max([facts.place[m] for m in group]) for group in together for member in group}
        facts = replace(facts, combined=last)
    return kept_of(modelled, choices, facts, graph.outputs)


def kept_of(modelled: Modelled, choices: np.ndarray, facts: Facts, leaving: Iterable[int]) -> Facts:
    """What a compiler that materialises stores under a plan. `leaving`: tensors that leave the operators of `facts`."""
    graph = modelled.graph
    layouts, inner, sent, partial = dict[int, Layout](), dict[int, Layout](), set[tuple[int, int]](), set[int]()
    partial.update([exchange.operator for _, exchange in modelled.combining(choices)])
    for index, cluster in enumerate(graph.clusters):
        options = modelled.chosen(choices, index)
        layouts.update({write.tensor: write_layout(write.leads, options) for write in cluster.writes})
        inner.update({value.tensor: terminal_layout(value.leads, options) for value in cluster.inner})
    for reading, (source, wanted) in zip(modelled.readings, modelled.layouts_of(choices), strict=True):
        if source != wanted:
            steps = reshard_steps(source, wanted, len(reading.read.leads), modelled.setting.order)
            if any(step.kind != "slice" for step in steps):
                members = graph.clusters[reading.reader].members
                sent.update((reading.tensor, m) for m in members if reading.tensor in graph.operators[m].operands)
    known = {**inner, **layouts}
    read = {**dict.fromkeys(leaving, 0), **enters_middle(modelled, facts)}
    orders, sizes = (facts.order, facts.operators), modelled.numbers.sizes
    loops = frozenset(modelled.stages.asked.loops if modelled.stages is not None else ())
    found = kept(graph, *orders, known, sizes, frozenset(sent), frozenset(partial), read, facts.fused, loops)
    readers = {t: [found.until[t]] if t in found.until else near for t, near in facts.readers.items()}
    fused = facts.fused | found.computed | single_layers(modelled, facts)
    whole = {t: at for index, at in facts.combined.items() for t in graph.operators[index].results if t not in found.begins}
    return replace(facts, fused=fused, readers=readers, kept=found._replace(begins={**found.begins, **whole}), inner=inner)


@lru_cache(maxsize=16)
def _facts(
    graph: Graph,
    materialises: bool,
    scattered: frozenset[int] = frozenset(),
    hidden: frozenset[tuple[int, float]] = frozenset(),
    gathers: int = 0,
    groups: int = 1,
    sinks: bool = True,
    totals: frozenset[int] = frozenset(),
    together: Together = (),
) -> Facts:
    order = run_order(graph, materialises, together)
    operators = [graph.operators[i] for i in order.sequence]
    places = {i: place for place, i in enumerate(order.sequence)}
    made: dict[int, int] = {}
    readers: dict[int, list[int]] = {}
    for place, operator in enumerate(operators):
        for tensor in operator.results:
            made[tensor] = place
        for tensor in operator.operands:
            if tensor >= 0:
                readers.setdefault(tensor, []).append(place)
    if not materialises:
        loops = [(order.begins[loop], order.ends[loop]) for loop in order.begins if loop]
        at = frozenset(places[i] for i in scattered if i in places)
        found = stored(graph, at, {places[i]: share for i, share in hidden if i in places}, loops, gathers, groups,
                       frozenset([places[i] for i in totals if i in places]))  # fmt: skip
        made.update(found.made)
        return Facts(order, operators, made, found.readers, found.computed, places, True, found)
    inside = sunk(graph, operators, readers) - set(graph.outputs) if sinks else set[int]()
    return Facts(order, operators, made, readers, frozenset(inside), places)


def sunk(graph: Graph, operators: Sequence[Operator], readers: Mapping[int, Sequence[int]]) -> set[int]:
    """Constants that nobody but loops reads, each time whole: they are made inside. (Not in a loop that alternates between
    forward and backward, as seen in the compiled programs.)"""
    found = set[int]()
    for op in operators:
        if op.equation is not None and len(op.results) == 1 and op.operands and max(op.operands) < 0 and op.rule.known:
            tensor, reads = op.results[0], [operators[place] for place in readers.get(op.results[0], ())]
            enter = [r for r in reads if r.name == BOUNDARY and r.path[-2] == "in"]
            if enter and len(enter) == len(reads):
                shape = graph.tensors[tensor].shape
                if all(graph.tensors[r.results[0]].shape == shape for r in enter):
                    found |= {tensor, *[r.results[0] for r in enter]}
    return found


def _at_loops(facts: Facts, copied: Copied) -> Iterator[tuple[int, int, int]]:
    """(tensor, from, until) of what loops stack, which is there from their beginning, and of what they are given."""
    for op in facts.operators:
        if op.name == BOUNDARY and op.path[-2] != "carry":
            begin, end = facts.order.begins[op.path[:-2]], facts.order.ends[op.path[:-2]]
            if op.path[-2] == "out":
                yield op.results[0], begin, end
            elif op.operands[0] >= 0:
                made = facts.made.get(op.operands[0], 0)
                yield op.operands[0], made, max(made, copied.get((op.operands[0], op.path[:-2]), end))


def _join_views(graph: Graph, facts: Facts, layouts: Mapping[int, Layout], roots: Roots) -> None:
    """What a view or the entry of a loop hands on as it is shares the buffer. What loops are given in one other layout is brought
    there once, where compilers materialise, and stays from the first to the last of them."""
    given: dict[tuple[int, Layout | None], int] = {}
    for op in facts.operators:
        if op.name == VIEW or (op.name == BOUNDARY and op.path[-2] == "in"):
            source, result = op.operands[0], op.results[0]
            alike = graph.tensors[source].shape == graph.tensors[result].shape
            if alike and layouts.get(source) == layouts.get(result):
                roots.join(result, source)
            elif alike and op.name == BOUNDARY and not facts.fuses and result not in facts.fused:
                roots.join(result, given.setdefault((source, layouts.get(result)), result))


def held_buffers(
    graph: Graph,
    facts: Facts,
    layouts: Mapping[int, Layout],
    own: Mapping[int, float],
    replaced: Mapping[int, int],
    local: Local,
    copied: Copied | None = None,
) -> tuple[list[Buffer], Roots]:
    """The buffers of values: from where they are made, or their loop begins, to their last reader, or its loop's end; and which
    tensors share one."""
    order, operators, readers, made, copied = facts.order, facts.operators, facts.readers, facts.made, copied or {}
    roots, inputs = Roots(), set(graph.inputs)
    first, last = dict[int, int](), dict[int, int]()
    nbytes: dict[int, float] = {}
    split: dict[int, Layout | None] = {}

    def touch(tensor: int, start: int, stop: int) -> None:
        root = roots.of(tensor)
        first[root], last[root] = min(first.get(root, start), start), max(last.get(root, stop), stop)

    carries = [(k, op.operands, op.results) for k, op in enumerate(operators) if op.name == BOUNDARY and op.path[-2] == "carry"]
    _join_views(graph, facts, layouts, roots)
    for tensor, source in facts.kept.same.items():
        if local(tensor, layouts.get(tensor)) == local(source, layouts.get(source)):
            roots.join(tensor, source)
    goes_round: dict[int, int] = {}
    """Per final value of a carry, the value that goes round: another one where micro-batches of it do, and all are collected."""
    for _, _, (inner, final) in carries:
        goes_round[final] = inner if graph.tensors[inner].shape != graph.tensors[final].shape else final
        if goes_round[final] == final:
            roots.join(inner, final)
    moved = _moved(graph, facts, layouts)
    arguments = {roots.of(tensor) for tensor in inputs}
    for place, (initial, produced), (inner, final) in carries:
        uses = readers.get(initial, ()) if initial >= 0 else ()
        apart = goes_round[final] != final
        if uses and max(uses) <= place and roots.of(initial) not in arguments and not apart:
            roots.join(initial, final)
        if produced in made and operators[made[produced]].rule.fusible:
            old = [r for r in readers.get(inner, ()) if r != place]
            shifted = inner in facts.more.shifted.get(produced, ()) or produced in facts.kept.shifted
            if max(old, default=0) <= made[produced] and not shifted:
                roots.join(produced, goes_round[final])
    for tensor in (*layouts, *own):
        if tensor in facts.fused and tensor not in moved:
            continue
        root = roots.of(tensor)
        size = own.get(tensor, local(tensor, layouts.get(tensor)) * moved.get(tensor, 1.0))
        if size >= nbytes.get(root, 0.0):
            nbytes[root], split[root] = size, layouts.get(tensor)
        start = facts.kept.begins.get(tensor, made.get(tensor, 0))
        uses = [copied.get((tensor, operators[place].path[:-2]), place) for place in readers.get(tensor, ())]
        touch(tensor, start, max([start, *uses]))
    for place, (initial, produced), (_, final) in carries:
        loop = operators[place].path[:-2]
        touch(final, order.begins[loop], order.ends[loop])
        if goes_round[final] != final:
            touch(goes_round[final], order.begins[loop], order.ends[loop])
            if initial >= 0:
                touch(initial, made.get(initial, 0), order.ends[loop])
        if roots.of(produced) in nbytes:
            touch(produced, made.get(produced, place), order.ends[loop])
    for tensor, begin, end in _at_loops(facts, copied):
        touch(tensor, begin, end)
    end = len(operators) + 1
    kinds = dict.fromkeys(nbytes, HELD)
    for tensor in own:
        touch(tensor, made.get(tensor, 0), end)
        kinds[roots.of(tensor)] = OUTPUT
    for op in operators:
        if op.results and op.results[0] in moved and op.name == BOUNDARY:
            touch(op.results[0], order.begins[op.path[:-2]], order.ends[op.path[:-2]])
    kept = {roots.of(tensor) for tensor in inputs} | {roots.of(tensor) for tensor in _in_place(facts, replaced)}
    return [
        Buffer(root, kinds[root], size, first[root], last[root], axes_of(split[root]))
        for root, size in nbytes.items() if root not in kept
    ], roots  # fmt: skip


def _stacks_copied(modelled: Modelled, choices: np.ndarray, facts: Facts) -> Copied:
    """Which loops slice a copy of a stack, in another layout."""
    graph, found = modelled.graph, dict[tuple[int, Layout], list[Path]]()
    for reading, (source, wanted) in zip(modelled.readings, modelled.layouts_of(choices), strict=True):
        op = graph.operators[graph.clusters[reading.reader].members[-1]]
        if op.name == BOUNDARY and op.path[-2] == "in" and source != wanted:
            part, whole = (graph.tensors[tensor].shape for tensor in (op.results[0], reading.tensor))
            steps = reshard_steps(source, wanted, len(reading.read.leads), modelled.setting.order)
            if part != whole and (staged(modelled, op) or any(step.kind != "slice" for step in steps)):
                found.setdefault((reading.tensor, wanted), []).append(op.path[:-2])
    first = {key: before_loop(modelled, facts, min(facts.order.begins[loop] for loop in loops)) for key, loops in found.items()}
    return {(tensor, loop): first[tensor, wanted] for (tensor, wanted), loops in found.items() for loop in loops}


def _in_place(facts: Facts, replaced: Mapping[int, int]) -> list[int]:
    """New values of donated state that are written where the old ones are: not what a loop stacks while it still reads those."""
    if not facts.fuses:
        return list(replaced)
    begins = facts.order.begins
    stacked = {op.results[0]: begins[op.path[:-2]] for op in facts.operators if op.name == BOUNDARY and op.path[-2] == "out"}
    return [t for t, old in replaced.items() if t not in stacked or max(facts.readers.get(old, ()), default=-1) < stacked[t]]


def _overtaken(
    graph: Graph, facts: Facts, replaced: Mapping[int, int], layouts: Mapping[int, Layout], local: Local
) -> dict[int, int]:
    """{new value of donated state that is done before the old one has been read: the place of the last reader}. It cannot be
    written where the old one is. Of two kernels that could run next, the one that makes less does; so readers of the old value
    that make less than the new one run before it."""
    found = {}
    for tensor, old in replaced.items():
        done = facts.made.get(tensor, 0)
        if done and tensor not in facts.fused:
            size = local(tensor, layouts.get(tensor))
            later = [r for r in facts.readers.get(old, ()) if r > done and facts.operators[r].rule.product]
            larger = [r for r in later if max([local(t, layouts.get(t)) for t in facts.operators[r].results], default=0.0) > size]
            if larger:
                found[tensor] = max(larger)
    return found


def _rounded_before(modelled: Modelled, facts: Facts, layouts: Mapping[int, Layout], local: Local) -> list[Buffer]:
    """What a loop only multiplies by is rounded whole before it, where products round."""
    graph, machine, found = modelled.graph, modelled.numbers.machine, []
    moved = _moved(graph, facts, layouts)
    for op in facts.operators if facts.fuses else ():
        if op.name == BOUNDARY and op.path[-2] == "in" and op.operands[0] >= 0:
            source, result, loop = op.operands[0], op.results[0], op.path[:-2]
            share = machine.rounded_share(graph.tensors[source].dtype)
            narrow = result in facts.more.narrow and source not in facts.more.narrow
            if narrow and share < 1 and result not in moved:
                layout = _as_sliced(graph, op, layouts)
                first, last = facts.order.begins[loop], facts.order.ends[loop]
                found.append(Buffer(source, TRANSIENT, share * local(source, layout), first, last, axes_of(layout)))
    return found


def _as_sliced(graph: Graph, boundary: Operator, layouts: Mapping[int, Layout]) -> Layout | None:
    """The layout in which a loop slices a stack: that of its slices, and along the rounds that of the stack."""
    source, result = boundary.operands[0], boundary.results[0]
    before, after = layouts.get(source), layouts.get(result)
    rounds = len(graph.tensors[source].shape) - len(graph.tensors[result].shape)
    if before is None or after is None:
        return before
    return tuple([old if 0 <= old < rounds else new + rounds if new >= 0 else -1 for old, new in zip(before, after, strict=True)])


def _moved(graph: Graph, facts: Facts, layouts: Mapping[int, Layout]) -> dict[int, float]:
    """Tensors handed on in a layout of larger parts, and how often the part that a round of a loop sees is there. Axes along the
    rounds themselves (the stages of a pipeline) split no round's part."""
    found = {}
    for operator in facts.operators if facts.fuses else ():
        if hands_on(operator) and operator.operands[0] >= 0:
            before, after = (layouts.get(t) or () for t in (operator.operands[0], operator.results[0]))
            rounds = len(graph.tensors[operator.operands[0]].shape) - len(graph.tensors[operator.results[0]].shape)
            if set(axes_of(after)) < {axis for axis, dim in enumerate(before) if dim >= rounds}:
                found[operator.results[0]] = rounds_of(graph, operator)
    return found


def rounds_of(graph: Graph, operator: Operator) -> float:
    """How many parts of its size what is handed on is taken from."""
    whole, part = graph.tensors[operator.operands[0]], graph.tensors[operator.results[0]]
    return whole.nbytes / part.nbytes if part.nbytes else 1.0


def _far(buffers: Sequence[Buffer], facts: Facts, near_bytes: float) -> list[Buffer]:
    """What finds no place in memory on the chip: there lies what lives shortest and beside no loop, as far as it fits. Outputs
    are no temporaries."""
    heap = [b for b in buffers if b.kind != OUTPUT]
    if not near_bytes:
        return heap
    taken = np.zeros(len(facts.order.sequence) + 3)
    beside = [(facts.order.begins[loop], facts.order.ends[loop]) for loop in facts.order.begins if loop]
    far = []
    for buffer in sorted(heap, key=lambda b: (b.last - b.first, -b.nbytes, b.tensor)):
        span = slice(buffer.first, buffer.last + 1)
        around = any(buffer.first <= first and last <= buffer.last for first, last in beside)
        if around or taken[span].max() + buffer.nbytes > near_bytes:
            far.append(buffer)
        else:
            taken[span] += buffer.nbytes
    return far
