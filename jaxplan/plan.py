"""Room `plan`: an assignment becomes a `Plan`: specs, constraints, exchanges and cost. Knows not how it was found."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import compress
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxplan import _jax
from jaxplan.cost import (
    Memory,
    Modelled,
    Reading,
    Step,
    ceiling,
    cluster_exchanges,
    hidden_work,
    memory,
    reshard_steps,
    symbolic_cost,
    symbolic_peak,
    write_layout,
)
from jaxplan.cost.exchange import step_bytes
from jaxplan.cost.price import halo_bytes, handed_bytes, steps_sent
from jaxplan.cost.scatters import scattered_left, scattered_sums, sends_a_number
from jaxplan.cost.symbols import DimensionNames
from jaxplan.graph import Cluster, Graph, Operator, Terminal
from jaxplan.graph.branches import branches_around
from jaxplan.graph.flatten import BOUNDARY, TOTAL, VIEW
from jaxplan.graph.nouns import EVERY_TICK, GATHERED, LEFT, Path
from jaxplan.layout import PARTIAL, Layout, Spec, spec_of
from jaxplan.paths import alike
from jaxplan.pipeline import Pipeline
from jaxplan.planned import PlannedExchange, of_worst_branches
from jaxplan.trace import Traced

if TYPE_CHECKING:
    import sympy

Value = TypeVar("Value")

@dataclass(frozen=True)
class Constraints:
    """What `apply` emits. `reads[(operator, operand)]` and `writes[(operator, result)]`: specs, to be constrained one
    after the other; `outputs[position]`: the same for the program's outputs; `entries[path]`: per operand of a
    rematerialised call, the spec it keeps inside (() for none); `at`: operator index by path; `sums[operator]`: the axes along
    which it reads partial sums, those that split what it sums itself, and those along which its result is left partial."""

    reads: Mapping[tuple[int, int], tuple[Spec, ...]]
    writes: Mapping[tuple[int, int], tuple[Spec, ...]]
    outputs: Mapping[int, tuple[Spec, ...]]
    entries: Mapping[tuple[Any, ...], tuple[Spec, ...]]
    at: Mapping[tuple[Any, ...], int]
    sums: Mapping[int, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def asked(
        self, jaxpr: Any, path: tuple[Any, ...], some: Sequence[Any] | None = None, numbers: Sequence[int] | None = None
    ) -> list[tuple[Spec, ...]]:
        """Per operand of a call, the specs that all who read it there ask for, calls in it among them; () where they differ.
        `some`: of these variables instead; `numbers`: by these equations only."""
        found: dict[Any, set[tuple[Spec, ...]]] = {var: set() for var in (jaxpr.invars if some is None else some)}
        for number in range(len(jaxpr.eqns)) if numbers is None else numbers:
            here, equation = (*path, number), jaxpr.eqns[number]
            inner = equation.params["jaxpr"].jaxpr if equation.primitive is _jax.jit_p else None
            specs = [self.reads.get((self.at.get(here, -1), slot), ()) for slot in range(len(equation.invars))]
            for var, spec in zip(equation.invars, specs if inner is None else self.asked(inner, here), strict=True):
                if not isinstance(var, _jax.Literal) and var in found:
                    found[var].add(spec)
        return [specs.pop() if len(specs) == 1 else () for specs in found.values()]


@dataclass(frozen=True)
class Plan:
    """Where everything lies. `choices`: (clusters, axes) option numbers. `stages`: seconds spent per room while planning.

    `bound`: a proven lower bound on `seconds`, if one was asked for. `pipeline`: the mesh axis laid along layers, if one is.
    """

    traced: Traced
    modelled: Modelled
    choices: np.ndarray
    mesh: Any
    stages: Mapping[str, float] = field(default_factory=dict)
    bound: float | None = None
    dims: Mapping[tuple[int, int], str] = field(default_factory=dict)
    request: Any = None
    pipeline: Pipeline | None = None

    # ---- layouts -----------------------------------------------------------------------------------------------

    @property
    def axis_names(self) -> tuple[str, ...]:
        """The mesh axes, in mesh order."""
        return self.modelled.numbers.axis_names

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Devices along each mesh axis."""
        return dict(zip(self.axis_names, self.modelled.numbers.sizes, strict=True))

    @cached_property
    def layouts(self) -> dict[int, Layout]:
        """The layout in which each tensor that leaves a cluster is left by it."""
        return self.modelled.remembered("layouts", self.choices, self._layouts)

    def _layouts(self) -> dict[int, Layout]:
        known: dict[Hashable, Layout] = {}
        found = {}
        rows = self.choices.tolist()
        for index, (cluster, options) in enumerate(zip(self.modelled.graph.clusters, self.modelled.options, strict=True)):
            for write in cluster.writes:
                key = (id(options), *rows[index], write.leads)
                if key not in known:
                    known[key] = write_layout(write.leads, self.modelled.chosen(self.choices, index))
                found[write.tensor] = known[key]
        return found

    @cached_property
    def input_layouts(self) -> tuple[Layout, ...]:
        """Per flat input."""
        return tuple(self.layouts.get(tensor, self._replicated) for tensor in self.modelled.graph.inputs)

    @cached_property
    def output_layouts(self) -> tuple[Layout, ...]:
        """Per flat output; state that goes round leaves as it came."""
        ties = dict(self.modelled.graph.ties)
        return tuple(
            self.input_layouts[ties[position]] if position in ties else self.layouts.get(tensor, self._replicated)
            for position, tensor in enumerate(self.modelled.graph.outputs)
        )

    @property
    def _replicated(self) -> Layout:
        return (-1,) * len(self.axis_names)

    def spec(self, layout: Layout, ndim: int) -> Spec:
        """Per dimension, the axes that shard it in a layout of so many dimensions."""
        return spec_of(layout, ndim, self.modelled.setting.order.major_first)

    def partition_spec(self, spec: Spec) -> PartitionSpec:
        """A spec over axis numbers as a `PartitionSpec` over axis names."""
        return partition_spec(spec, self.axis_names)

    @cached_property
    def in_specs(self) -> Any:
        """PartitionSpecs: a tuple like the positional arguments (a pair with the keyword arguments' dict, if any)."""
        args, kwargs = self.traced.unflatten_inputs(self._specs(self.input_layouts, self.traced.in_avals))
        return (args, kwargs) if kwargs else args

    @cached_property
    def out_specs(self) -> Any:
        """PartitionSpecs, structured like the result."""
        return self.traced.unflatten_outputs(self._specs(self.output_layouts, self.traced.out_avals))

    def partition_spec_of(self, position: int) -> PartitionSpec:
        """The spec of one flat input."""
        return self._specs([self.input_layouts[position]], [self.traced.in_avals[position]])[0]

    def input_sharding(self, position: int) -> NamedSharding:
        """Where one flat input lies, on the plan's mesh."""
        return NamedSharding(self.mesh, self.partition_spec_of(position))

    def _specs(self, layouts: Sequence[Layout], avals: Sequence[Any]) -> list[PartitionSpec]:
        return [self.partition_spec(self.spec(layout, len(a.shape))) for layout, a in zip(layouts, avals, strict=True)]

    @property
    def in_shardings(self) -> Any:
        """`in_specs` as `NamedSharding`s on the plan's mesh."""
        return self._named(self.in_specs)

    @property
    def out_shardings(self) -> Any:
        """`out_specs` as `NamedSharding`s on the plan's mesh."""
        return self._named(self.out_specs)

    def _named(self, specs: Any) -> Any:
        import jax

        return jax.tree.map(lambda s: NamedSharding(self.mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))

    # ---- exchanges and constraints -----------------------------------------------------------------------------

    @cached_property
    def constraints(self) -> Constraints:
        """Everything that has to be emitted for the compiler to do what was planned."""
        graph = self.modelled.graph
        reads: dict[tuple[int, int], tuple[Spec, ...]] = {}
        writes: dict[tuple[int, int], tuple[Spec, ...]] = {}
        views: dict[int, tuple[Spec, ...]] = {}
        for index, cluster in enumerate(graph.clusters):
            for write in cluster.writes:
                member = _writer(graph, cluster, write.tensor)
                slot = graph.operators[member].results.index(write.tensor)
                layout = self.layouts[write.tensor]
                writes[(member, slot)] = (self.spec(layout, len(write.leads)),)
            for exchange in cluster_exchanges(cluster, self.modelled.chosen(self.choices, index), self.modelled.setting):
                slot = graph.operators[exchange.operator].results.index(exchange.tensor)
                writes[(exchange.operator, slot)] = _reduced_then_moved(exchange.steps)
        for reading in self.modelled.readings:
            src, dst, ndim = self.modelled.edge_layouts(self.choices, reading)
            specs = self._way(src, dst, graph.tensors[reading.tensor].shape)
            cluster = graph.clusters[reading.reader]
            if graph.operators[cluster.members[-1]].name == VIEW:
                views[graph.operators[cluster.members[-1]].results[0]] = specs
                continue
            specs = views.get(reading.tensor, ()) + specs
            for member, slot in _read_at(graph, cluster, reading.read):
                if specs or not graph.operators[member].rule.fusible:
                    reads[(member, slot)] = specs or (self.spec(dst, ndim),)
        outputs = {}
        for position, tensor in enumerate(graph.outputs):
            if tensor >= 0:
                src, dst = self.layouts.get(tensor, self._replicated), self.output_layouts[position]
                specs = self._way(src, dst, graph.tensors[tensor].shape)
                if specs:
                    outputs[position] = specs
        entries = {
            path: tuple(
                self.spec(self.layouts[t], len(graph.tensors[t].shape)) if t in self.layouts else () for t in operands
            )
            for path, operands in graph.calls.items()
        }
        at = {op.path: i for i, op in enumerate(graph.operators)}
        return Constraints(reads, writes, outputs, entries, at, self._partial_sums())

    def _partial_sums(self) -> dict[int, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """`Constraints.sums`: only where partial sums are added, or left."""
        found: dict[int, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {}
        for index, cluster in enumerate(self.modelled.graph.clusters):
            options = self.modelled.chosen(self.choices, index) if cluster.combines else ()
            added = tuple(axis for axis, option in enumerate(options) if option.factor == PARTIAL)
            left = tuple(axis for axis, option in enumerate(options) if option.scatter == PARTIAL)
            if added:
                found.update(dict.fromkeys(cluster.members, (added, (), added)))
                found[cluster.members[-1]] = (added, (), left)
            elif left:
                (combine,) = cluster.combines
                split = tuple(axis for axis, option in enumerate(options) if option.factor in combine.over)
                found[combine.operator] = ((), split, left)
        return found

    def _way(self, src: Layout, dst: Layout, shape: Sequence[int]) -> tuple[Spec, ...]:
        """The layouts that lead from one to another. A stop whose parts would be unequal is left out: there the compiler finds
        its own way, and may send more than was priced."""
        sizes = self.modelled.numbers.sizes
        stops = [step.after for step in reshard_steps(src, dst, len(shape), self.modelled.setting.order)]
        even = [all(n % math.prod(sizes[a] for a in axes) == 0 for n, axes in zip(shape, spec)) for spec in stops[:-1]]
        return (*compress(stops, even), *stops[-1:])

    @cached_property
    def exchanges(self) -> tuple[PlannedExchange, ...]:
        """Every collective of one call, costliest first."""
        whole = self.modelled.numbers.machine.sends_rounded is False
        return self.modelled.remembered("exchanges", self.choices, lambda: self.exchanges_of(not whole))

    def exchanges_of(self, rounded: bool) -> tuple[PlannedExchange, ...]:
        """Every collective of one call, costliest first. `rounded`: as the plan's machine reads what only products read,
        which may be rounded; False: as on a machine that sends all values whole, such as simulated devices.

        What several readers ask for alike is moved once: the constraints are shared, and the compiler merges the rest; but what a
        rematerialised call reads, which is constrained anew, is moved for it alone, as is what a program of its own reads. (In
        `seconds` each reader that is not heavy pays for itself: prices there are per pair.)
        """
        graph, setting = self.modelled.graph, self.modelled.setting
        found: list[tuple[Path, PlannedExchange]] = []
        for index, cluster in enumerate(graph.clusters):
            path = graph.operators[cluster.members[-1]].path
            found += [(path, exchange) for exchange in self.combined(index)]
        moved: dict[tuple[int, Step, Path, Path], float] = {}
        shares = self._shares if rounded else {}
        for reading, (written, read) in zip(self.modelled.readings, self.modelled.layouts_of(self.choices), strict=True):
            if written == read:
                continue
            steps = reshard_steps(written, read, len(reading.read.leads), setting.order)
            if sends_a_number(graph, graph.clusters[reading.writer], steps):
                continue
            reader = graph.clusters[reading.reader].members[0]
            if graph.operators[reader].equation is None and graph.clusters[reading.writer].members:
                reader = graph.clusters[reading.writer].members[-1]
            path, tensor = self._read_in(reading), self._seen(reading.tensor)
            apart = self._alone(path), (branches_around(path, graph.branches) or ((),))[-1]
            for step in steps:
                already = moved.get((tensor, step, *apart), 0.0)
                if reading.times > already:
                    moved[tensor, step, *apart] = reading.times
                    share = shares.get((reading.tensor, step), 1.0)
                    more = self.moved((step,), reading.tensor, reader, reading.times - already, share)
                    found += [(path, self._at_a_tick(exchange, reading)) for exchange in more]
        return tuple(sorted(of_worst_branches(found, graph.branches), key=lambda e: -e.total_bytes))

    def _at_a_tick(self, exchange: PlannedExchange, reading: Reading) -> PlannedExchange:
        """Of what stages keep of several micro-batches, and move at every tick, layer by layer, what a layer has of one of these;
        of what those of unequal length keep, and move once, the layers of the longest; anything else as it is."""
        stages = self.modelled.stages
        if stages is None:
            return exchange
        if (reading.reader, reading.tensor) not in stages.moved:
            share = stages.own.get(reading.tensor, 1.0)  # priced as all layers, but not as often
            layers = round(exchange.shape[0] * share * stages.asked.stages) if share != 1.0 else 0
            sent = {axis: nbytes * share for axis, nbytes in exchange.wire_bytes.items()}
            kept = replace(exchange, wire_bytes=sent, times=exchange.times / share)
            return replace(kept, shape=(layers, *exchange.shape[1:])) if layers else exchange
        slots, dim = stages.asked.slots, stages.asked.ringed[reading.tensor]
        graph = self.modelled.graph
        loop = graph.operators[graph.clusters[reading.reader].members[-1]].path[:-2]
        layers = stages.asked.loops[loop][1 if stages.asked.even(loop) else 0]  # stages of unequal length: all, but not as often
        shape = (*exchange.shape[1:dim], exchange.shape[dim] // slots, *exchange.shape[dim + 1 :])
        sent = {axis: nbytes / slots / layers for axis, nbytes in exchange.wire_bytes.items()}
        return replace(exchange, shape=shape, wire_bytes=sent, times=float(round(exchange.times * slots * layers)))

    def combined(self, index: int) -> list[PlannedExchange]:
        """The exchanges inside of one cluster: of partial results, and with neighbours."""
        graph, setting, cluster = self.modelled.graph, self.modelled.setting, self.modelled.graph.clusters[index]
        options, found = self.modelled.chosen(self.choices, index), []
        for exchange in cluster_exchanges(cluster, options, setting):
            steps = (self._scattered[exchange.operator],) if exchange.operator in self._scattered else exchange.steps
            found += self.moved(steps, exchange.tensor, exchange.operator, cluster.times)
        for halo, axes, axis, sent in halo_bytes(cluster, options, setting, self.modelled.numbers):
            about, op = graph.tensors[halo.operand.tensor], graph.operators[halo.operator]
            names = tuple([self.axis_names[crossed] for crossed in axes])
            found.append(PlannedExchange(
                "permute", names, {self.axis_names[axis]: sent}, cluster.times, about.shape, about.dtype, op.name, self.source(op)
            ))  # fmt: skip
        for handed, axis, sent in handed_bytes(cluster, options, self.modelled.numbers):
            about, op, name = graph.tensors[handed.operand.tensor], graph.operators[handed.operator], self.axis_names[axis]
            ticks = self.modelled.numbers.ticks - handed.spared if handed.every_tick else 1.0
            what = {EVERY_TICK: "next stage", GATHERED: "stages of unequal length", LEFT: op.name}[handed.how]
            kind = {EVERY_TICK: "permute", GATHERED: "all_gather", LEFT: "all_reduce"}[handed.how]
            if handed.how == GATHERED and self._of_a_number(handed.operand.tensor):
                continue
            if (handed.operand.tensor, axis) in self._left_scattered:
                kind, sent = "reduce_scatter", sent / 2
            found.append(PlannedExchange(
                kind, (name,), {name: sent}, ticks, about.shape, about.dtype, what, self.source(self._maker(op))
            ))  # fmt: skip
        return found + self._sent_by_hand(cluster)

    def _sent_by_hand(self, cluster: Cluster) -> list[PlannedExchange]:
        """What the program sends itself, in regions that it shards by hand."""
        found, numbers = [], self.modelled.numbers
        for own, step in steps_sent(cluster, self.modelled.setting, numbers):
            sent = {self.axis_names[axis]: nbytes for axis, nbytes in step_bytes(step, own.nbytes, numbers.sizes)}
            (file, line), names = _jax.source_line(own.equation), tuple([self.axis_names[axis] for axis in step.axes])
            source, times = f"{file.rsplit('/', 1)[-1]}:{line}" if file else "", cluster.times * own.times
            found.append(PlannedExchange(own.kind, names, sent, times, own.shape, own.dtype, own.equation.primitive.name, source))
        return found

    def _of_a_number(self, tensor: int) -> bool:
        graph = self.modelled.graph
        writers = [cluster for cluster in graph.clusters if any(write.tensor == tensor for write in cluster.writes)]
        return any(sends_a_number(graph, writer, ()) for writer in writers)

    @cached_property
    def _ends(self) -> list[tuple[Layout, Layout]]:
        pairs = zip(self.modelled.graph.outputs, self.output_layouts, strict=True)
        return [(self.layouts.get(tensor, self._replicated), to) for tensor, to in pairs]

    @cached_property
    def _scattered(self) -> Mapping[int, Step]:
        return scattered_sums(self.modelled, self.choices, self._ends)

    @cached_property
    def _left_scattered(self) -> frozenset[tuple[int, int]]:
        return scattered_left(self.modelled, self.choices, self._ends)

    @property
    def _shares(self) -> dict[tuple[int, Step], float]:
        """Of a tensor's bytes, what a step sends: whoever reads most of them decides."""
        found: dict[tuple[int, Step], float] = {}
        for reading, (written, read) in zip(self.modelled.readings, self.modelled.layouts_of(self.choices), strict=True):
            if written == read:
                continue
            for step in reshard_steps(written, read, len(reading.read.leads), self.modelled.setting.order):
                found[reading.tensor, step] = max(found.get((reading.tensor, step), 0.0), reading.share)
        return found

    def _seen(self, tensor: int) -> int:
        """What a view shows as it is; any other tensor itself."""
        source = self._views.get(tensor, tensor)
        return source if self.layouts.get(source) == self.layouts.get(tensor) else tensor

    @cached_property
    def _views(self) -> Mapping[int, int]:
        return {op.results[0]: op.operands[0] for op in self.modelled.graph.operators if op.name == VIEW}

    def _read_in(self, reading: Reading) -> Path:
        """The path of what reads a tensor; of the result of a branch, that of the branch: it ends where the next reader is."""
        graph = self.modelled.graph
        members = [graph.operators[member] for member in graph.clusters[reading.reader].members]
        reader = next((op for op in members if reading.tensor in op.operands), None)
        if reader is None:
            return ()
        branch = (*reader.path[:-2], "branch", reader.operands.index(reading.tensor))
        return branch if reader.name == BOUNDARY and branch in graph.branches else reader.path

    def _alone(self, path: Path) -> Path:
        """The path of the innermost call around one that is rematerialised, or a program of its own; () for none."""
        calls, apart = self.modelled.graph.calls, self.traced.apart
        return next((path[:n] for n in range(len(path), 0, -1) if path[:n] in calls or path[:n] in apart), ())

    def moved(
        self, steps: Sequence[Step], tensor: int, operator: int, times: float, share: float = 1.0
    ) -> list[PlannedExchange]:
        """The exchanges of some steps; `share`: of the tensor's bytes, what is sent."""
        about, op = self.modelled.graph.tensors[tensor], self.modelled.graph.operators[operator]
        runs: list[list[Step]] = []
        for step in steps:
            if step.kind == "reduce_scatter" and runs and runs[-1][0].kind == step.kind:
                runs[-1].append(step)
            elif step.kind != "slice":
                runs.append([step])
        maker = self._maker(op) if runs else op
        sizes, source, name = self.modelled.numbers.sizes, self.source(maker), (maker if _is_total(op) else op).name
        dtype = about.dtype if share == 1.0 else self.modelled.numbers.machine.matmul_reads[about.dtype]
        return [
            PlannedExchange(
                run[0].kind, tuple(self.axis_names[a] for step in run for a in step.axes),
                {self.axis_names[a]: float(h) for step in run for a, h in step_bytes(step, share * about.nbytes, sizes)},
                times, about.shape, dtype, name, source,
            )
            for run in runs
        ]  # fmt: skip

    def _maker(self, operator: Operator) -> Operator:
        """Of what goes round a loop, or is its total, the operator that makes it; any other operator itself."""
        total = _is_total(operator)
        if not total and (operator.name != BOUNDARY or operator.path[-2] != "carry"):
            return operator
        made = {tensor: maker for maker in self.modelled.graph.operators for tensor in maker.results}
        return made.get((made[operator.operands[0]] if total else operator).operands[1], operator)

    def source(self, operator: Operator) -> str:
        """The user's "file.py:line" that wrote an operator; "" for inputs, and where JAX does not know."""
        if operator.equation is None:
            return ""
        file, line = operator.source()
        return f"{file.rsplit('/', 1)[-1]}:{line}" if file else ""

    # ---- cost --------------------------------------------------------------------------------------------------

    @cached_property
    def seconds(self) -> float:
        """Modelled time of one call, in seconds: the number the search compared."""
        return self.modelled.seconds(self.choices)

    @cached_property
    def names(self) -> DimensionNames:
        """The dimensions' names; inputs that differ only by an index in their path (layers) share them."""
        return dimension_names_of(self.traced, self.modelled.whole, self.dims)

    @cached_property
    def _symbolic(self) -> tuple[sympy.Expr, dict[Any, float]]:
        return symbolic_cost(self.modelled, self.choices, self.names)

    @property
    def cost(self) -> sympy.Expr:
        """Seconds of one call, a SymPy expression in dimensions, axis sizes (n_x) and machine symbols (r, m, g_x, l_x)."""
        return self._symbolic[0]

    @cached_property
    def _symbolic_peak(self) -> tuple[sympy.Expr, dict[Any, float]]:
        return symbolic_peak(self.modelled, self.memory, self.names)

    @property
    def peak(self) -> sympy.Expr:
        """Bytes per device at the peak as a SymPy expression in dimensions and axis sizes (n_x): what lives at the moment that
        is the worst for these sizes."""
        return self._symbolic_peak[0]

    @property
    def symbol_values(self) -> dict[Any, float]:
        """The value of each symbol of `cost` and `peak`: `plan.cost.subs(plan.symbol_values)` is `plan.seconds`, and
        `plan.peak.subs(plan.symbol_values)` is `plan.peak_bytes`."""
        return {**self._symbolic_peak[1], **self._symbolic[1]}

    @cached_property
    def wire_bytes(self) -> dict[str, float]:
        """Bytes sent per device and call, per mesh axis."""
        return self.bytes_by_axis(self.exchanges)

    def bytes_by_axis(self, exchanges: Iterable[PlannedExchange]) -> dict[str, float]:
        """Bytes sent per device and call, per mesh axis, of some exchanges."""
        total = dict.fromkeys(self.axis_names, 0.0)
        for exchange in exchanges:
            for axis, value in exchange.wire_bytes.items():
                total[axis] += value * exchange.times
        return total

    @cached_property
    def memory(self) -> Memory:
        """Modelled bytes per device of one call: arguments, outputs, temporaries, and what lives at the worst moment. Arguments
        that the function was traced to donate are updated in place."""
        places = self.layouts, self.input_layouts, self.output_layouts, self.traced.donated
        hidden = hidden_work(self.modelled, self.choices)
        modelled, choices, donated = self.modelled, self.choices, self.traced.donated
        return modelled.remembered("memory", choices, lambda: memory(modelled, choices, *places), donated, hidden)

    def fits(self, nbytes: float) -> bool:
        """Whether `peak_bytes` is no more than that. Where even all that is ever stored would fit, it is not worked out."""
        if "memory" in self.__dict__ or nbytes == math.inf:
            return nbytes == math.inf or self.peak_bytes <= nbytes
        places = self.layouts, self.input_layouts, self.output_layouts
        return ceiling(self.modelled, self.choices, *places) <= nbytes or self.peak_bytes <= nbytes

    @property
    def peak_bytes(self) -> float:
        """Modelled peak of live bytes per device: arguments + outputs that are no argument's own buffer + temporaries."""
        return self.memory.peak

    @property
    def gap(self) -> float | None:
        """How far `seconds` may be above the optimum, as a fraction of the bound: (seconds - bound) / bound. None without
        a bound; infinite if the bound is 0 and the plan is not free."""
        if self.bound is None:
            return None
        return (self.seconds - self.bound) / self.bound if self.bound > 0 else math.inf if self.seconds > 0 else 0.0

    def input_bytes(self, position: int) -> float:
        """Bytes per device of one flat input, padding included."""
        return self.memory.given[position].nbytes

    def __str__(self) -> str:
        return f"Plan for {self.traced.name} on {self.axis_sizes}: {self.seconds:.3g} s"


def dimension_names_of(traced: Traced, graph: Graph, dims: Mapping[tuple[int, int], str]) -> DimensionNames:
    """The names of a program's dimensions; inputs that differ only by an index in their path share them. `dims`: given ones."""
    groups: dict[Any, list[int]] = {}
    for path, tensor in zip(traced.in_paths, graph.inputs, strict=True):
        groups.setdefault((alike(path), graph.tensors[tensor].shape), []).append(tensor)
    return DimensionNames(graph, dims, list(groups.values()))


def partition_spec(spec: Spec, axis_names: Sequence[str]) -> PartitionSpec:
    """A spec over axis numbers as a `PartitionSpec`, trailing Nones left out."""
    named = [tuple(axis_names[a] for a in axes) for axes in spec]
    entries = [names if len(names) > 1 else names[0] if names else None for names in named]
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _is_total(operator: Operator) -> bool:
    """Whether it is the total of what a loop adds to a carry."""
    return operator.name == VIEW and operator.path[-3] == TOTAL


def _writer(graph: Any, cluster: Cluster, tensor: int) -> int:
    """The member of a cluster that makes a tensor."""
    return next(m for m in cluster.members if tensor in graph.operators[m].results)


def _read_at(graph: Any, cluster: Cluster, read: Terminal) -> list[tuple[int, int]]:
    """(member of a cluster, its operand) where a tensor is read, and read so."""
    several = [(m, slot, number) for m, slot, number in cluster.slots if graph.operators[m].operands[slot] == read.tensor]
    if several:
        own = cluster.reads.index(read)
        return [(m, slot) for m, slot, number in several if number == own]
    return [(m, slot) for m in cluster.members for slot, t in enumerate(graph.operators[m].operands) if t == read.tensor]


def _reduced_then_moved(steps: Sequence[Step]) -> tuple[Spec, ...]:
    """Specs to emit for a partial result: reduced first, then sliced where it is to be scattered.

    A partial sum constrained straight to a scattered layout can make the compiler compute it again.
    """
    return (steps[0].before, *(step.after for step in steps if step.after != step.before)) if steps else ()
