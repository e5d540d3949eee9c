"""A mesh axis laid along the layers of scans, as prices see it: the graph of one micro-batch, and what is paid on top.

Every device along the axis holds some layers of each of the scans (a *stage*) and works on one micro-batch at a time; at every
*tick* all of them hand what they carry to the next. With m micro-batches over k stages that is m + k - 1 ticks (Huang et al.,
"GPipe", NeurIPS 2019), at each of which every device works, on nothing useful while the pipeline fills and drains: the bubble.
What is exchanged inside a body is exchanged at every tick, supersteps and all.

Where every stage alternates between a micro-batch forward and one backward, both loops are one, and as many ticks are spent on
each as before. What stands between them (the *middle*: head and loss) then runs for one micro-batch at a time while all stages
wait, so m times, and the axis does nothing there; what leaves it is on the last stage, and is summed over all. In return a stage
keeps what the forward pass leaves of at most 2 k - 1 micro-batches, and what the middle makes of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from jaxplan.cost.formulas import pipeline_ticks, ring_slots
from jaxplan.cost.price import Option
from jaxplan.graph import Cluster, Combine, Graph, Handed, Operator, Tensor, Terminal
from jaxplan.graph.flatten import BOUNDARY
from jaxplan.graph.nouns import GATHERED, LEFT

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Staging:
    """What is asked: `axis` (a number of the mesh), of size `stages`, over the layers of `loops`, in `microbatches`.

    `loops`: {path of a scan: (its layers, layers of the longest stage)}.
    `rows`: {tensor: its dimension that holds the batch}, for tensors inside the bodies and what enters or leaves them. `summed`:
    final values of carries and stacked outputs that add up over micro-batches. `middle`: operators that run per micro-batch
    between two loops that are one; `ringed`: {stacked tensor: its dimension that holds the batch} of which not all micro-batches
    are kept; `resident`: stacked tensors of which stages of unequal length keep their own, and nobody else reads any; `spared`:
    {path of a scan: ticks at which nothing is handed on, since the loop of the last ones is a single tick}.
    """

    axis: int
    stages: int
    microbatches: int
    loops: Mapping[Path, tuple[int, int]]
    rows: Mapping[int, int]
    summed: frozenset[int] = frozenset()
    middle: frozenset[int] = frozenset()
    ringed: Mapping[int, int] = field(default_factory=dict)
    resident: frozenset[int] = frozenset()
    spared: Mapping[Path, int] = field(default_factory=dict)

    def even(self, loop: Path) -> bool:
        """Whether all stages have as many layers of a scan."""
        length, most = self.loops[loop]
        return most * self.stages == length

    @property
    def slots(self) -> int:
        """Micro-batches of which a stage keeps what is `ringed`."""
        return int(ring_slots(self.microbatches, self.stages))


@dataclass(frozen=True, eq=False)
class Stages:
    """`graph`: of one micro-batch, the same tensors, operators and clusters as in `whole`. `options`: per cluster the one thing
    that the axis does there, where it is not free. `inside`: clusters that run at every tick, and the scan that they are in.
    `divided`: tensors, and operators, that hold or work on a micro-batch's share. `middle`: clusters that run once per
    micro-batch; `apiece`: (cluster, tensor) that are read so, outside of the loops; `moved`: those of which a part is read every
    tick. `gathered`: {stacked tensor: what one layer has of it} that all stages get of stages of unequal length."""

    asked: Staging
    whole: Graph
    graph: Graph
    options: Mapping[int, Option]
    inside: Mapping[int, Path]
    divided: frozenset[int]
    divided_operators: frozenset[int]
    gathered: Mapping[int, int] = field(default_factory=dict)
    middle: frozenset[int] = frozenset()
    apiece: frozenset[tuple[int, int]] = frozenset()
    moved: frozenset[tuple[int, int]] = frozenset()

    @cached_property
    def own(self) -> dict[int, float]:
        """{what stages of unequal length keep for themselves: the share of all layers that the longest has room for}."""
        shares = {loop: most / length for loop, (length, most) in self.asked.loops.items()}
        edges = [op for op in self.whole.operators if _edge(op, shares) and op.path[-2] == "out"]
        return {op.results[0]: shares[op.path[:-2]] for op in edges if op.results[0] in self.asked.resident}

    @property
    def ticks(self) -> int:
        """Steps of the whole pipeline, one way."""
        return int(pipeline_ticks(self.asked.microbatches, self.asked.stages))

    def loop(self, writer: int, reader: int) -> Path | None:
        """The scan at whose every tick one cluster reads what another writes; None where that is read otherwise."""
        return self.inside.get(reader, self.inside.get(writer))


def stage_graph(graph: Graph, asked: Staging) -> Stages:
    """Cut the bodies of scans into micro-batches, and lay the axis along what they stack."""
    loops = asked.loops
    scopes = {op.scope: loop for op in graph.operators if (loop := _within(op, loops)) is not None}
    inner = {t for op in graph.operators if op.scope in scopes for t in op.results}
    inner |= {op.results[0] for op in graph.operators if _edge(op, loops) and op.path[-2] != "out"}
    within, left = _between(graph, asked)
    cut = _Cut(graph, asked, inner, within, left)
    clusters, options, inside, worked, middle = [], {}, {}, set(), set()
    for index, cluster in enumerate(graph.clusters):
        last = graph.operators[cluster.members[-1]]
        if not asked.middle.isdisjoint(cluster.members):
            middle.add(index)
            cluster, divided = cut.middle(cluster, index)
            worked |= divided
            options[index] = Option(len(cluster.units) - 1 if cluster.handed else -1)
            clusters.append(cluster)
            continue
        if last.scope in scopes:
            inside[index] = scopes[last.scope]
            cluster, divided = cut.body(cluster, inside[index])
            worked |= divided
            options[index] = Option()
        elif _edge(last, loops):
            cluster = cut.edge(cluster, last, index)
            along = [f for f, unit in enumerate(cluster.units) if f >= len(graph.clusters[index].units) and unit]
            options[index] = Option(along[0]) if along else Option()
        clusters.append(cluster)
    micro = replace(graph, tensors=tuple(cut.tensors), clusters=tuple(clusters))
    return Stages(
        asked, graph, micro, options, inside, frozenset(cut.divided), frozenset(worked), cut.gathered, frozenset(middle),
        frozenset(cut.apiece), frozenset(cut.moved),
    )  # fmt: skip


def _between(graph: Graph, asked: Staging) -> tuple[frozenset[int], frozenset[int]]:
    """Tensors that there are one micro-batch at a time, outside of the bodies: what operators of the middle make, what the
    forward loop hands them. Of these, those that are read when all is done, too."""
    if not asked.middle:
        return frozenset(), frozenset()
    made = {t for index in asked.middle for t in graph.operators[index].results}
    made |= {op.results[1] for op in graph.operators if _edge(op, asked.loops) and op.path[-2] == "carry"} & {
        t for index in asked.middle for t in graph.operators[index].operands
    }
    read = {
        t
        for index, op in enumerate(graph.operators)
        if index not in asked.middle and not (_edge(op, asked.loops) and op.path[-2] == "carry")
        for t in op.operands
    }
    return frozenset(made), frozenset(made & {*read, *graph.outputs})


def _drawn_whole(graph: Graph, asked: Staging) -> set[int]:
    """What is drawn for the whole batch for every micro-batch, which then takes its rows: other numbers would come of a part."""
    drawn = [op for op in graph.operators if op.rule.rounds_words or op.rule.made_whole]
    return {t for op in drawn if asked.rows.keys().isdisjoint(op.operands) for t in op.results}


def _within(op: Operator, loops: Mapping[Path, Any]) -> Path | None:
    """The loop inside whose body an operator runs, if any."""
    return None if _edge(op, loops) else next((op.path[:n] for n in range(1, len(op.path)) if op.path[:n] in loops), None)


def _edge(op: Operator, loops: Mapping[Path, Any]) -> bool:
    return op.name == BOUNDARY and op.path[:-2] in loops


class _Cut:
    """Clusters and tensors of one micro-batch."""

    def __init__(
        self, graph: Graph, asked: Staging, inner: set[int], between: frozenset[int], left: frozenset[int]
    ) -> None:
        self.asked, self.inner, self.between, self.left = asked, inner, between, left
        cut = {*inner, *(between - left)} - _drawn_whole(graph, asked)
        self.rows = {t: dim for t, dim in asked.rows.items() if t in cut}
        self.walked = dict(asked.rows) if asked.middle else self.rows
        self.divided = set(self.rows)
        self.apiece: set[tuple[int, int]] = set()
        self.moved: set[tuple[int, int]] = set()
        self.gathered: dict[int, int] = {}
        self.tensors, self.operators = list(graph.tensors), graph.operators
        for tensor, dim in asked.ringed.items():
            about = graph.tensors[tensor]
            kept = about.shape[dim] // asked.microbatches * asked.slots
            self.tensors[tensor] = Tensor((*about.shape[:dim], kept, *about.shape[dim + 1 :]), about.dtype, about.itemsize)
        for tensor, dim in self.rows.items():
            about = graph.tensors[tensor]
            shape = (*about.shape[:dim], about.shape[dim] // asked.microbatches, *about.shape[dim + 1 :])
            self.tensors[tensor] = Tensor(shape, about.dtype, about.itemsize)
        self.ticks = ticks = int(pipeline_ticks(asked.microbatches, asked.stages))
        self.more = {loop: ticks * most / length for loop, (length, most) in asked.loops.items()}

    def body(self, cluster: Cluster, loop: Path) -> tuple[Cluster, set[int]]:
        """A cluster of the body, and the operators whose work is divided by the number of micro-batches."""
        batch = self._batch(cluster)
        work, divided = [], set()
        for piece in cluster.work:
            if batch & piece.factors:
                divided |= set(piece.members)
                piece = piece._replace(flops=piece.flops / self.asked.microbatches)
            work.append(piece)
        more = self.more[loop]
        times = tuple([more * often for often in cluster.read_times])
        units = self._units(cluster, batch)
        cut = cluster._replace(units=units, work=tuple(work), times=more * cluster.times, read_times=times, alike=-1)
        return cut, divided

    def middle(self, cluster: Cluster, index: int) -> tuple[Cluster, set[int]]:
        """A cluster that runs between the loops, once per micro-batch: what it makes for later is given to all stages in the end,
        along a factor of its own, the last one, which is the axis'. Members that wait until all is done are paid for once."""
        batch, count = self._batch(cluster), self.asked.microbatches
        own = [m for m in cluster.members if m in self.asked.middle]
        touched = {t for m in own for t in (*self.operators[m].operands, *self.operators[m].results)}
        work, divided = [], set()
        for piece in cluster.work:
            if batch & piece.factors or self.asked.middle.isdisjoint(piece.members):
                divided |= set(piece.members)
                piece = piece._replace(flops=piece.flops / count)
            work.append(piece)
        once = {t for t in self.walked if t not in self.between} | {t.tensor for t in cluster.reads if t.tensor not in touched}
        self.apiece |= {(index, t.tensor) for t in cluster.reads if t.tensor not in once}
        times = tuple([
            often if (index, read.tensor) not in self.apiece else often * count
            for read, often in zip(cluster.reads, cluster.read_times, strict=True)
        ])  # fmt: skip

        def shares(terminals: tuple[Terminal, ...], before: tuple[float, ...]) -> tuple[float, ...]:
            pairs = zip(terminals, before, strict=True)
            return tuple([share if t.tensor in touched and t.tensor not in once else share / count for t, share in pairs])

        laid = {t.tensor: t for t in (*cluster.writes, *[combine.result for combine in cluster.combines])}
        made = [t for m in own for t in self.operators[m].results if t in self.left]
        units, along = self._units(cluster, batch), len(cluster.units)
        handed = tuple([
            Handed(cluster.members[-1], laid.get(t, Terminal(t, (-1,) * len(self.tensors[t].shape))), along, LEFT) for t in made
        ])  # fmt: skip
        units = (*units, self.asked.stages) if handed else units
        return cluster._replace(
            units=units, work=tuple(work), times=count * cluster.times, read_times=times, alike=-1, handed=handed,
            read_shares=shares(cluster.reads, cluster.read_shares), write_shares=shares(cluster.writes, cluster.write_shares),
        ), divided  # fmt: skip

    def edge(self, cluster: Cluster, op: Operator, index: int) -> Cluster:
        """What enters or leaves a pipelined loop. A factor of its own, the last one, is the axis': what is stacked lies along
        it layer by layer; what is carried is handed on at every tick, and at the end is on the last stage, or partial on all.
        Where stages have unequal numbers of layers, no axis can lie so: what is stacked enters whole, and is gathered in the
        end, every stage filled up to the longest."""
        units = self._units(cluster, self._batch(cluster))
        even, (length, most) = self.asked.even(op.path[:-2]), self.asked.loops[op.path[:-2]]
        ringed = {t.tensor for t in cluster.reads if t.tensor in self.asked.ringed and op.path[-2] == "in"} - self.inner
        self.moved |= {(index, tensor) for tensor in ringed}
        self.apiece |= {(index, t.tensor) for t in cluster.reads if t.tensor in self.between - self.inner - ringed}
        share = 1.0 if even else most / length  # of what stages keep of a stack
        times = tuple([
            often * (
                self.more[op.path[:-2]] if read.tensor in self.inner
                else self.ticks / self.asked.slots * share if read.tensor in ringed
                else self.asked.microbatches if read.tensor in self.between
                else share if read.tensor in self.asked.resident else 1.0
            )
            for read, often in zip(cluster.reads, cluster.read_times, strict=True)
        ])  # fmt: skip
        cluster = cluster._replace(units=units, read_times=times, alike=-1)
        along, stages = len(units), self.asked.stages
        if op.path[-2] == "carry":
            final = op.results[1]
            leads = {write.tensor: write.leads for write in cluster.writes}
            combines, handed = cluster.combines, cluster.handed
            if final in leads and (final not in self.between or final in self.left):
                combines += (Combine(cluster.members[-1], Terminal(final, leads[final]), frozenset([along]), False),)
            if final not in self.asked.summed and op.results[0] in leads:
                spared = self.asked.spared.get(op.path[:-2], 0)
                circulating = Terminal(op.results[0], leads[op.results[0]])
                handed += (Handed(cluster.members[-1], circulating, along, spared=spared),)
            return cluster._replace(units=(*units, stages), combines=combines, handed=handed)
        stacked = {"in": op.operands[0], "out": op.results[0]}[op.path[-2]]
        if not stacks(op):
            return cluster
        if not even:
            layer = [t for t in cluster.reads if t.tensor == op.operands[0]]
            if op.path[-2] == "in" or stacked in self.asked.resident or not layer:
                return cluster
            self.gathered[stacked] = op.operands[0]
            layers = most * (self.asked.microbatches if op.operands[0] in self.rows else 1)
            handed = (Handed(cluster.members[-1], layer[0], along, GATHERED, layers),)
            return cluster._replace(units=(*units, stages), handed=handed)

        def laid(terminals: tuple[Terminal, ...]) -> tuple[Terminal, ...]:
            return tuple([Terminal(t.tensor, (along, *t.leads[1:])) if t.tensor == stacked else t for t in terminals])

        return cluster._replace(units=(*units, stages), reads=laid(cluster.reads), writes=laid(cluster.writes))

    def _batch(self, cluster: Cluster) -> set[int]:
        """The factors that walk the batch."""
        terminals = [*cluster.reads, *cluster.writes, *[combine.result for combine in cluster.combines]]
        rows = self.walked
        return {t.leads[rows[t.tensor]] for t in terminals if t.tensor in rows and t.leads} - {-1}

    def _units(self, cluster: Cluster, batch: set[int]) -> tuple[int, ...]:
        count = self.asked.microbatches
        return tuple([
            (unit // count if unit % count == 0 else math.gcd(unit, max(1, unit // count))) if factor in batch else unit
            for factor, unit in enumerate(cluster.units)
        ])  # fmt: skip


def stacks(op: Operator) -> bool:
    """Whether one side of a loop's boundary is the other, stacked."""
    return len(op.rule.operands[0]) != len(op.rule.results[0])
