"""From `Graph`, mesh and machine to the `Problem` that the search solves."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np

from jaxplan.cost.clusters import ClusterPrice, Clusters, Combines
from jaxplan.cost.fusing import rounded
from jaxplan.cost.numbers import Numbers
from jaxplan.cost.price import AxisOptions, Exchange, Option, Setting, cluster_exchanges, terminal_layout, write_layout
from jaxplan.cost.prices import ReshardPrice, Reshards
from jaxplan.cost.stages import Stages
from jaxplan.graph import Cluster, Graph, Operator, Terminal
from jaxplan.graph.flatten import INPUT
from jaxplan.layout import PARTIAL, Layout
from jaxplan.machine import Machine, apart_from_links
from jaxplan.problem import Edge, Node, Problem, evaluate

Leads = tuple[int, ...]
Value = TypeVar("Value")
MOST_MODELS = 16
"""Meshes of one graph that are remembered, for when only the speeds of links change."""


class Reading(NamedTuple):
    """Cluster `reader` reads a tensor that cluster `writer` writes: the meaning of one edge of the problem. `share`: of its
    bytes, what all of the reader needs; less than 1 where it rounds them. `sent`: of its bytes, what is sent where the reader
    wants it elsewhere: `share`, or all of them on a machine that sends whole what it then rounds."""

    tensor: int
    writer: int
    write: Terminal
    reader: int
    read: Terminal
    times: float
    share: float = 1.0
    sent: float = 1.0


@dataclass(frozen=True)
class Modelled:
    """A graph on a mesh: the problem, and what its nodes, options and edges stand for.

    `options[cluster][axis]`: the options of each cluster along each axis. `kept[node]`: the cluster a node stands for.
    `follows[cluster]`: clusters that are no node because their layout is implied: (the cluster they follow, the factors of it
    that lead their dimensions). `stages`: the pipeline that the graph is cut for, if it is. `kin`: equal for models of one graph
    that differ by the speeds of links only; all but prices, and the order in which axes are exchanged, is the same then.
    """

    graph: Graph
    numbers: Numbers
    setting: Setting
    problem: Problem
    options: tuple[AxisOptions, ...]
    readings: tuple[Reading, ...]
    kept: tuple[int, ...]
    follows: Mapping[int, tuple[int, Leads]]
    stages: Stages | None = None
    kin: Hashable = None

    @property
    def whole(self) -> Graph:
        """The graph before it was cut for a pipeline."""
        return self.graph if self.stages is None else self.stages.whole

    def complete(self, choices: np.ndarray) -> np.ndarray:
        """Choices per node of the problem -> choices per cluster (the undo of following)."""
        full = np.zeros((len(self.options), choices.shape[1]), dtype=np.int64)
        full[list(self.kept)] = choices
        for index, (other, leads) in self.follows.items():
            own = self.graph.clusters[index].writes[0].leads
            for axis, option in enumerate(self.chosen(full, other)):
                splits = option.factor >= 0 and self.numbers.sizes[axis] > 1  # a program may ask for an axis of size 1
                if splits and option.factor in leads:
                    full[index, axis] = self.options[index][axis].index(Option(own[leads.index(option.factor)]))
        return full

    def seconds(self, choices: np.ndarray) -> float:
        """The price of choices per cluster: the number the search compared."""
        return evaluate(self.problem, choices[list(self.kept)])

    def chosen(self, choices: np.ndarray, cluster: int) -> tuple[Option, ...]:
        """The options an assignment picks for a cluster, one per axis."""
        return tuple(options[i] for options, i in zip(self.options[cluster], choices[cluster].tolist(), strict=True))

    def layouts_of(self, choices: np.ndarray) -> list[tuple[Layout, Layout]]:
        """(layout written, layout read) of every one of `readings`, under an assignment of clusters."""
        return self.remembered("layouts read", choices, lambda: self._layouts_of(choices))

    def combining(self, choices: np.ndarray) -> list[tuple[int, Exchange]]:
        """(cluster, exchange) wherever a cluster makes a partial result whole, under an assignment of clusters."""
        return self.remembered("combining", choices, lambda: self._combining(choices))

    def remembered(
        self, what: str, choices: np.ndarray, make: Callable[[], Value], *key: Hashable, speeds: bool = False
    ) -> Value:
        """What `make` says of an assignment of clusters, worked out once for all models that differ in speeds of links only; once
        for this one where it depends on these (`speeds`), or on a pipeline. `key`: what else it depends on."""
        alone = speeds or self.stages is not None
        about = id(self) if alone else (self.kin, self.setting.order)  # kept with it, so that no other model takes its place
        found = self.graph.remembered(what, (about, choices.tobytes(), *key), lambda: (self if alone else None, make()))
        return found[1]

    def _combining(self, choices: np.ndarray) -> list[tuple[int, Exchange]]:
        return [
            (index, exchange) for index, cluster in enumerate(self.graph.clusters) if cluster.combines
            for exchange in cluster_exchanges(cluster, self.chosen(choices, index), self.setting)
        ]  # fmt: skip

    def states(self, choices: np.ndarray) -> list[int]:
        """Per cluster a number for what it does: equal for clusters of equal options that choose alike."""
        known: dict[Hashable, int] = {}
        return [known.setdefault((id(o), *row), len(known)) for o, row in zip(self.options, choices.tolist(), strict=True)]

    def _layouts_of(self, choices: np.ndarray) -> list[tuple[Layout, Layout]]:
        of = self.states(choices)
        known: dict[Hashable, tuple[Layout, Layout]] = {}
        found = []
        for r in self.readings:
            key = of[r.writer], r.write.leads, of[r.reader], r.read.leads
            if key not in known:
                written = write_layout(r.write.leads, self.chosen(choices, r.writer))
                known[key] = written, terminal_layout(r.read.leads, self.chosen(choices, r.reader))
            found.append(known[key])
        return found

    def edge_layouts(self, choices: np.ndarray, reading: Reading) -> tuple[Layout, Layout, int]:
        """(layout written, layout read, number of dimensions) of one reading under an assignment."""
        written = write_layout(reading.write.leads, self.chosen(choices, reading.writer))
        wanted = terminal_layout(reading.read.leads, self.chosen(choices, reading.reader))
        return written, wanted, len(reading.read.leads)


def model(
    graph: Graph, numbers: Numbers, pins: Mapping[int, Layout] | None = None, *,
    follow: bool = True, stages: Stages | None = None,
) -> Modelled:  # fmt: skip
    """Build the problem. `pins`: the layouts that input positions must have. `follow`: inputs that
    only one cluster reads lie where that wants them; not so where memory is short: there it is a choice.
    `stages`: a pipeline, for whose micro-batches `graph` and `numbers` are."""
    alone, laid = apart_from_links(numbers.machine), tuple(sorted((pins or {}).items()))
    kin = (numbers.axis_names, numbers.sizes, alone, laid, follow)
    if stages is None:  # those are made for one question
        known = graph.remembered("model", kin, lambda: _modelled(graph, numbers, pins, follow, None, kin), MOST_MODELS)
        return known if known.numbers is numbers else _repriced(known, numbers)
    return _modelled(graph, numbers, pins, follow, stages, kin)


def _modelled(
    graph: Graph, numbers: Numbers, pins: Mapping[int, Layout] | None, follow: bool, stages: Stages | None,
    kin: Hashable,
) -> Modelled:  # fmt: skip
    setting = Setting(len(numbers.sizes), numbers.order)
    most = max([len(tensor.shape) for tensor in graph.tensors], default=0)
    clusters = Clusters(Combines(setting, numbers, most))
    pinned = {graph.inputs[position]: layout for position, layout in (pins or {}).items()}
    kinds: dict[Hashable, tuple[int, ClusterPrice]] = {}
    made: dict[Hashable, Hashable] = {}
    interned: dict[AxisOptions, AxisOptions] = {}
    numbered, pinned_clusters, writers = [], set(), {}
    for index, cluster in enumerate(graph.clusters):
        for write in cluster.writes:
            writers[write.tensor] = (index, write)
        name = graph.operators[cluster.members[-1]].name
        pin = _pin(graph, cluster, pinned, numbers.axis_names)
        if pin is not None:
            pinned_clusters.add(index)
        only = stages.options.get(index) if stages else None
        made_like = (cluster.alike, name, pin, only)  # clusters made alike are of one kind; made otherwise, they may be too
        if cluster.alike < 0 or made_like not in made:
            made[made_like] = (_cluster_kind(cluster, numbers, name, pin), only)
        kind = made[made_like]
        if kind not in kinds:
            options = axis_options(cluster, numbers, pin)
            if stages is not None:  # a pipeline has regions of its own
                by_hand = graph.operators[cluster.members[-1]].rule.by_hand  # not in micro-batches
                options = tuple([
                    axis[:1] if by_hand else tuple([o for o in axis if PARTIAL not in (o.factor, o.scatter)]) for axis in options
                ])  # fmt: skip
            options = options if stages is None or only is None else _along_stages(options, stages.asked.axis, only)
            options = interned.setdefault(options, options)
            kinds[kind] = (len(kinds), clusters.price(cluster, options))
        numbered.append(kinds[kind])
    rounding = (tuple(numbers.machine.matmul_reads.items()), numbers.machine.sends_rounded is False)
    readings = graph.remembered("readings", rounding, lambda: _readings(graph, writers, numbers.machine))
    follows = _followers(graph, readings, pinned_clusters) if follow else {}
    place = {cluster: node for node, cluster in enumerate(c for c in range(len(graph.clusters)) if c not in follows)}
    nodes = []
    counted = {number: _counted(price.options) for number, price in kinds.values()}
    for index in place:
        number, price = numbered[index]
        name, (counts, alone) = graph.operators[graph.clusters[index].members[-1]].name, counted[number]
        nodes.append(Node(name, counts, price, number, graph.clusters[index].times, alone))
    edges = []
    edge_prices: dict[Hashable, tuple[int, ReshardPrice]] = {}
    reshards = Reshards(setting, numbers, most)
    for reading in readings:
        if reading.writer in follows or reading.reader in follows:
            continue
        writer, reader = numbered[reading.writer][1], numbered[reading.reader][1]
        nbytes, leads, others = reading.sent * numbers.nbytes(reading.tensor), reading.write.leads, reading.read.leads
        key = nbytes, id(writer.options), leads, id(reader.options), others
        if key not in edge_prices:
            written = reshards.terminal(writer.options, leads, written=True)
            read = reshards.terminal(reader.options, others, written=False)
            edge_prices[key] = (len(edge_prices), ReshardPrice(reshards, written, read, nbytes))
        number, edge_price = edge_prices[key]
        edges.append(Edge(place[reading.writer], place[reading.reader], edge_price, number, reading.times))
    alike = _alike(numbers, stages) if not pins else ()
    problem = Problem(numbers.axis_names, tuple(nodes), tuple(edges), numbers.order.slow_first, alike)
    options = tuple(price.options for _, price in numbered)
    return Modelled(graph, numbers, setting, problem, options, tuple(readings), tuple(place), follows, stages, kin)


def _counted(options: AxisOptions) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """(options per axis, those that need no others', if these are fewer)."""
    counts = tuple(map(len, options))
    alone = tuple([len([o for o in axis if PARTIAL not in (o.factor, o.scatter)]) for axis in options])
    return counts, alone if alone != counts else None


def _alike(numbers: Numbers, stages: Stages | None) -> tuple[Hashable, ...]:
    along = stages.asked.axis if stages else -1
    return tuple((size, numbers.link(axis), axis == along) for axis, size in enumerate(numbers.sizes))


def _repriced(known: Modelled, numbers: Numbers) -> Modelled:
    """The same model on a machine that differs by its links only."""
    setting, problem = Setting(len(numbers.sizes), numbers.order), known.problem
    clusters: dict[int, Clusters] = {}
    families: dict[int, Reshards] = {}
    edge_prices: dict[int, ReshardPrice] = {}
    for node in problem.nodes:
        old = node.price.family
        if id(old) not in clusters:
            clusters[id(old)] = old.again(setting, numbers)
    for edge in problem.edges:
        if id(edge.price) not in edge_prices:
            family = edge.price.family
            if id(family) not in families:
                families[id(family)] = family.again(setting, numbers)
            edge_prices[id(edge.price)] = edge.price.again(families[id(family)])
    nodes = tuple([node._replace(price=clusters[id(node.price.family)][node.price.number]) for node in problem.nodes])
    edges = tuple([edge._replace(price=edge_prices[id(edge.price)]) for edge in problem.edges])
    alike = _alike(numbers, None) if problem.alike else ()
    problem = problem.repriced(nodes, edges, numbers.order.slow_first, alike)
    return replace(known, numbers=numbers, setting=setting, problem=problem)


def _followers(graph: Graph, readings: list[Reading], pinned: set[int]) -> dict[int, tuple[int, Leads]]:
    """Inputs that only one cluster reads (and perhaps updates), always in the same dimensions: {input: (cluster, leads)}.

    They cost nothing wherever they lie, so the best layout is the one that the cluster asks for; exact.
    """
    operators = graph.operators
    near: dict[int, dict[tuple[int, Leads], None]] = {
        index: {} for index, cluster in enumerate(graph.clusters)
        if operators[cluster.members[-1]].name == INPUT and index not in pinned
    }  # fmt: skip
    for reading in readings:
        if reading.writer in near:
            near[reading.writer][reading.reader, reading.read.leads] = None
        if reading.reader in near:
            near[reading.reader][reading.writer, reading.write.leads] = None
    found = {}
    for index, asked in near.items():
        if len(asked) == 1:
            ((other, leads),) = asked
            if not (graph.clusters[other].scatters or graph.clusters[other].adds):
                found[index] = (other, leads)
    return found


Pin = tuple[tuple[int, ...], ...]
"""Per mesh axis, the dimensions of a cluster's first result that it may shard (-1: none)."""


def _pin(graph: Graph, cluster: Cluster, pinned: Mapping[int, Layout], axis_names: Sequence[str]) -> Pin | None:
    """What the user insists on: a pinned input, or a layout that the program itself asks for."""
    operator = graph.operators[cluster.members[-1]]
    if operator.asked is not None:
        return _asked_pin(graph, operator, axis_names)
    layout = pinned.get(cluster.writes[0].tensor) if operator.name == INPUT and cluster.writes else None
    return None if layout is None else tuple((dim,) for dim in layout)


def _asked_pin(graph: Graph, operator: Operator, axis_names: Sequence[str]) -> Pin:
    assert operator.asked is not None
    unknown = [axis for entry in operator.asked for axis in entry or () if axis not in axis_names]
    if unknown:
        raise ValueError(f"{_where(operator)} asks for mesh axis {unknown[0]!r}; the mesh to plan for has {tuple(axis_names)}")
    free = tuple(dim for dim, entry in enumerate(operator.asked) if entry is None)
    fixed = {axis: dim for dim, entry in enumerate(operator.asked) for axis in entry or ()}
    return tuple((fixed[axis],) if axis in fixed else (-1, *free) for axis in axis_names)


def _where(operator: Operator) -> str:
    file, line = operator.source()
    return f"{operator.name} at {file}:{line}" if file else operator.name


def axis_options(cluster: Cluster, numbers: Numbers, pin: Pin | None = None) -> AxisOptions:
    """Per axis, what it may do in a cluster: nothing, split a factor it divides, split and scatter (or leave partial), or add
    partial sums. All do the same where one device computes."""
    per_axis, alone = [], cluster.alone if cluster.combines else -1
    for axis, size in enumerate(numbers.sizes):
        if pin is not None:
            per_axis.append(_pinned_options(cluster, numbers, axis, pin[axis]))
            continue
        options = [Option(alone if size > 1 else -1)]
        if size > 1 and alone < 0:
            legal = [f for f, unit in enumerate(cluster.units) if unit and unit % size == 0]
            options += [Option(f) for f in legal]
            for combine in cluster.combines:
                if combine.scatterable:
                    targets = [m for m in combine.result.leads if m in legal]
                    summed = [PARTIAL] if PARTIAL in combine.over else [k for k in legal if k in combine.over]
                    options += [Option(PARTIAL)] if PARTIAL in combine.over else []
                    options += [Option(k, m) for k in summed for m in targets]
                    options += [Option(k, PARTIAL) for k in summed if combine.left]
                elif combine.left and PARTIAL in combine.over:
                    options.append(Option(PARTIAL, PARTIAL))
        found = tuple(options)
        per_axis.append(next((other for other in per_axis if other == found), found))  # equal ones are one object
    return tuple(per_axis)


def _along_stages(options: AxisOptions, along: int, only: Option) -> AxisOptions:
    """The axis of a pipeline does one thing; what it splits is left to it."""
    return tuple([
        (only,) if axis == along else tuple([o for o in own if only.factor < 0 or only.factor not in (o.factor, o.scatter)])
        for axis, own in enumerate(options)
    ])  # fmt: skip


def _pinned_options(cluster: Cluster, numbers: Numbers, axis: int, dims: Sequence[int]) -> tuple[Option, ...]:
    """The options of one axis that may shard certain dimensions only; those that do not divide fall away, if others stay."""
    size, leads = numbers.sizes[axis], cluster.writes[0].leads
    options = []
    for dim in dims:
        factor = leads[dim] if dim >= 0 else -1
        if dim < 0 or (factor >= 0 and cluster.units[factor] % size == 0):
            options.append(Option(factor))
    if not options:
        operator = numbers.graph.operators[cluster.members[-1]]
        shape = numbers.graph.tensors[cluster.writes[0].tensor].shape
        where = _where(operator) if operator.equation is not None else "a pin"
        raise ValueError(
            f"{where} lays dimension {dims[0]} of shape {shape} over mesh axis {numbers.axis_names[axis]!r}, whose size {size} "
            "does not divide it"
        )
    return tuple(options)


def _readings(graph: Graph, writers: dict[int, tuple[int, Terminal]], machine: Machine) -> list[Reading]:
    readings, operators = [], graph.operators
    rounding = rounded(graph)[1] if machine.matmul_reads else (False,) * len(operators)
    shares = {dtype: machine.rounded_share(dtype) for dtype in {tensor.dtype for tensor in graph.tensors}}
    kinds = {id(tensor): tensor for tensor in graph.tensors}  # many are one object
    some = {kind for kind, tensor in kinds.items() if max(tensor.shape, default=0) > 1}
    sized = [id(tensor) in some for tensor in graph.tensors]  # whether there is anything to shard
    for index, cluster in enumerate(graph.clusters):
        whole: set[int] | None = None  # what is read as it is
        for read, times in zip(cluster.reads, cluster.read_times, strict=True):
            tensor = read.tensor
            source = writers.get(tensor)
            if source is None or source[0] == index or not sized[tensor]:
                continue
            share = shares[graph.tensors[tensor].dtype]
            if share != 1.0:
                if whole is None:
                    whole = {t for m in cluster.members if not rounding[m] for t in operators[m].operands}
                share = 1.0 if tensor in whole else share
            sent = 1.0 if machine.sends_rounded is False else share
            readings.append(Reading(tensor, source[0], source[1], index, read, times, share, sent))
    for output, position in graph.ties:
        tensor, start = graph.outputs[output], writers.get(graph.inputs[position])
        source = writers.get(tensor)
        if source is None or start is None or source[0] == start[0] or not sized[tensor]:
            continue
        readings.append(Reading(tensor, source[0], source[1], start[0], Terminal(tensor, start[1].leads), 1.0))
    return readings


def _cluster_kind(cluster: Cluster, numbers: Numbers, name: str, pin: Pin | None) -> Hashable:
    """Everything the price of a cluster depends on."""
    nbytes = numbers.nbytes
    sizes = tuple([(nbytes(t.tensor) if t.tensor >= 0 else 0, t.leads) for t in (*cluster.reads, *cluster.writes)])
    combines = tuple([(c.result.leads, nbytes(c.result.tensor), c.over, c.scatterable, c.left) for c in cluster.combines])
    halos = tuple([(h.operand.leads, h.factor, h.width, h.extent, h.instead, nbytes(h.operand.tensor)) for h in cluster.halos])
    shares = (cluster.read_shares, cluster.write_shares)
    work = tuple([(w.flops, w.factors, w.dtype) for w in cluster.work])
    apart = cluster.apart
    handed = tuple([(h.operand.leads, h.factor, h.how, nbytes(h.operand.tensor)) for h in cluster.handed])
    return (
        name, cluster.units, len(cluster.reads), sizes, shares, work, combines, halos, apart, cluster.moves_bytes, pin, handed,
        tuple([(s.kind, s.axes, s.nbytes, s.times) for s in cluster.sent]),
    )  # fmt: skip
