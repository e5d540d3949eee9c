"""What a pipeline must cost at least, and about what it may be expected to, before anything is searched.

The bound is work and bubble alone, as if every operator were split over all devices and nothing but what the stages hand on were
ever sent. The estimate starts from a plan without a pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxplan.cost import Modelled, Numbers, Reading, Stages, reshard_steps
from jaxplan.cost.formulas import all_reduce_bytes, pipeline_ticks
from jaxplan.cost.price import cluster_terms, sent_seconds, steps_terms, terms_seconds
from jaxplan.cost.stages import stacks
from jaxplan.graph import Cluster, Graph
from jaxplan.graph.flatten import BOUNDARY
from jaxplan.machine import apart_from_links
from jaxplan.pipeline.nouns import Chain, Pipeline, even_layers
from jaxplan.pipeline.staging import stages_of


@dataclass(frozen=True, eq=False)
class Outline:
    """What chains of layers come to, whatever is split how.

    `probe`: the chains in two stages. `outside`: seconds of local work outside of them on one device. `layers`, per cluster
    inside: how often it runs in a call; arithmetic that a micro-batch has its share of, arithmetic that it has not, and the same
    of memory traffic, in seconds. `carried`: (bytes of a whole batch, times a call, whether a micro-batch has its share) of
    what goes from stage to stage; `finals`: bytes of what is on the last stage in the end.
    """

    chains: tuple[Chain, ...]
    probe: Stages
    outside: float
    layers: np.ndarray
    carried: tuple[tuple[float, float, bool], ...]
    finals: tuple[float, ...]

    def pipeline(self, axis: str, stages: int, microbatches: int, schedule: str) -> Pipeline:
        """The pipeline with layers laid as evenly as can be."""
        chains = tuple([replace(chain, layers=even_layers(chain.length, stages)) for chain in self.chains])
        return Pipeline(axis, stages, microbatches, schedule, chains)

    def least(self, numbers: Numbers, axis: int, microbatches: int) -> float:
        """A lower bound on the seconds of any plan with this pipeline."""
        stages, devices = numbers.sizes[axis], math.prod(numbers.sizes)
        ticks = pipeline_ticks(microbatches, stages)
        longest = max(-(-chain.length // stages) / chain.length for chain in self.chains)
        times, shared, alone, some, rest = self.layers
        work = np.maximum(shared / microbatches + alone, some / microbatches + rest)
        inside = float(times @ work) * ticks * longest / (devices / stages)
        return inside + self.outside / devices + self.handed(numbers, axis, microbatches)

    def handed(self, numbers: Numbers, axis: int, microbatches: int) -> float:
        """Seconds of what stages hand on, and of what they give each other in the end, split over all other axes."""
        stages, (g, latency) = numbers.sizes[axis], numbers.link(axis)
        others = math.prod(numbers.sizes) / stages
        ticks, total = pipeline_ticks(microbatches, stages), 0.0
        for nbytes, times, cut in self.carried:
            total += times * ticks * (nbytes / (microbatches if cut else 1) / others * g + latency)
        for nbytes in self.finals:
            total += all_reduce_bytes(stages, nbytes / others) * g + 2 * latency
        return total


def outline(graph: Graph, numbers: Numbers, chains: Sequence[Chain]) -> Outline:
    """Of a graph that is not cut, whose chains have a batch that can be: probed with the fewest micro-batches that divide it.
    Neither the mesh nor its links matter."""
    key = apart_from_links(numbers.machine), tuple([(chain.path, chain.length, chain.rows) for chain in chains])
    return graph.remembered("outline", key, lambda: _outline(graph, numbers, tuple(chains)))


def _outline(graph: Graph, numbers: Numbers, chains: tuple[Chain, ...]) -> Outline:
    two = tuple([replace(chain, layers=even_layers(chain.length, 2)) for chain in chains])
    common = math.gcd(*[chain.rows for chain in chains])
    cuts = next(m for m in range(2, common + 1) if common % m == 0)
    probe = stages_of(graph, Pipeline("", 2, cuts, "gpipe", two), ("",))
    before, after = [_work(c, numbers) for c in graph.clusters], micro_numbers(numbers, probe)
    rows, outside = [], 0.0
    for index, cluster in enumerate(graph.clusters):
        arithmetic, moved = before[index]
        if index in probe.inside:
            less, fewer = _work(probe.graph.clusters[index], after)
            shared, some = ((whole - part) * cuts / (cuts - 1) for whole, part in ((arithmetic, less), (moved, fewer)))
            rows.append((cluster.times, shared, arithmetic - shared, some, moved - some))
        else:
            outside += cluster.times * max(arithmetic, moved)
    carried, finals = [], []
    for cluster in probe.graph.clusters:
        carried += [
            (float(graph.tensors[h.operand.tensor].nbytes), cluster.times, h.operand.tensor in probe.divided)
            for h in cluster.handed if h.every_tick
        ]  # fmt: skip
        handed = {h.factor for h in cluster.handed if h.every_tick}
        finals += [float(graph.tensors[c.result.tensor].nbytes) for c in cluster.combines if c.over and c.over <= handed]
    table = np.array(rows).T if rows else np.zeros((5, 0))
    return Outline(chains, probe, outside, table, tuple(carried), tuple(finals))


def micro_numbers(numbers: Numbers, stages: Stages) -> Numbers:
    """The same mesh and machine for the graph of one micro-batch."""
    mesh = dict(zip(numbers.axis_names, numbers.sizes, strict=True))
    return Numbers(stages.graph, mesh, numbers.machine, stages.ticks, stages.asked.microbatches, numbers.said)


def _work(cluster: Cluster, numbers: Numbers) -> tuple[float, float]:
    """(seconds of arithmetic, seconds of memory traffic) of a cluster that is not split."""
    arithmetic = sum([numbers.flops(piece) * numbers.seconds_per_flop(piece.dtype) for piece in cluster.work])
    if not cluster.moves_bytes:
        return arithmetic, 0.0
    shares = (*cluster.read_shares, *cluster.write_shares)
    moved = sum([s * numbers.nbytes(t.tensor) for t, s in zip((*cluster.reads, *cluster.writes), shares, strict=True)])
    return arithmetic, moved * numbers.seconds_per_byte


@dataclass(frozen=True)
class Spent:
    """Where the time of a plan goes inside of loops, in seconds: work that an axis splits, work that it does not, and exchanges,
    per axis."""

    split: tuple[float, ...]
    unsplit: tuple[float, ...]
    sent: tuple[float, ...]

    def stretched(self, axis: int, stages: int, stretch: float) -> float:
        """Seconds more (or fewer) if the axis were laid along the layers, and all that is done at once then took `stretch` times
        as long: what the axis exchanged is saved."""
        kept = sum(sent for a, sent in enumerate(self.sent) if a != axis)
        before = self.split[axis] + self.unsplit[axis] + sum(self.sent)
        return stretch * (self.split[axis] + self.unsplit[axis] / stages + kept) - before


def scanned(graph: Graph) -> frozenset[int]:
    """The clusters inside of loops over something stacked."""
    return graph.remembered("scanned", None, lambda: _scanned(graph))


def _scanned(graph: Graph) -> frozenset[int]:
    loops = {op.path[:-2] for op in graph.operators if op.name == BOUNDARY and op.path[-2] == "in" and stacks(op)}
    if not loops:
        return frozenset()
    within = [op for op in graph.operators if any(op.path[:n] in loops for n in range(1, len(op.path)))]
    scopes = {op.scope for op in within if op.name != BOUNDARY or op.path[:-2] not in loops}
    last = [graph.operators[cluster.members[-1]] for cluster in graph.clusters]
    return frozenset([index for index, op in enumerate(last) if op.scope in scopes])


def spent(modelled: Modelled, choices: np.ndarray, inside: Collection[int]) -> Spent:
    """Of a plan without a pipeline, choices per cluster. `inside`: the clusters inside of the loops."""
    graph, numbers, setting = modelled.graph, modelled.numbers, modelled.setting
    axes = range(len(numbers.sizes))
    split, unsplit, sent = [0.0 for _ in axes], [0.0 for _ in axes], [0.0 for _ in axes]
    alike: dict[tuple[int, tuple[int, ...]], tuple[int, float]] = {}  # clusters that do the same: one, and how often in all
    rows = choices.tolist()
    for index in inside:
        cluster = graph.clusters[index]
        key = (cluster.alike if cluster.alike >= 0 else -1 - index, tuple(rows[index]))
        alike[key] = index, alike.get(key, (index, 0.0))[1] + cluster.times
    for index, times in alike.values():
        options = modelled.chosen(choices, index)
        terms = cluster_terms(graph.clusters[index], options, setting, numbers)
        for axis, value in terms.sent.items():
            sent[axis] += times * sent_seconds({axis: value}, terms.rounds, numbers)
        work = terms_seconds(replace(terms, sent={}, rounds={}), numbers)
        for axis in axes:
            (split if options[axis].factor >= 0 else unsplit)[axis] += times * work
    of = modelled.states(choices)
    same: dict[Hashable, tuple[Reading, float]] = {}  # readings of one price: one of them, and how often in all
    for reading in modelled.readings:
        if reading.writer in inside or reading.reader in inside:
            nbytes = numbers.nbytes(reading.tensor)
            key = of[reading.writer], reading.write.leads, of[reading.reader], reading.read.leads, nbytes
            same[key] = reading, same.get(key, (reading, 0.0))[1] + reading.times
    for reading, times in same.values():
        written, wanted, ndim = modelled.edge_layouts(choices, reading)
        if written != wanted:
            steps = reshard_steps(written, wanted, ndim, setting.order)
            more, rounds = steps_terms(steps, numbers.nbytes(reading.tensor), numbers.sizes)
            for axis, value in more.items():
                sent[axis] += times * sent_seconds({axis: value}, rounds, numbers)
    return Spent(tuple(split), tuple(unsplit), tuple(sent))


def batch_axes(modelled: Modelled, choices: np.ndarray, found: Outline) -> tuple[bool, ...]:
    """Per axis, whether it splits the batch of what the chains carry, in a plan without a pipeline."""
    rows = found.probe.asked.rows
    splits = [False] * len(modelled.numbers.sizes)
    for index, cluster in enumerate(found.probe.graph.clusters):
        for handed in cluster.handed:
            tensor = handed.operand.tensor
            if tensor in rows:
                lead = handed.operand.leads[rows[tensor]]
                options = modelled.chosen(choices, index)
                splits = [was or (o.factor >= 0 and o.factor == lead) for was, o in zip(splits, options, strict=True)]
    return tuple(splits)


def expected(
    seconds: float, used: Spent, batch: Sequence[bool], found: Outline, numbers: Numbers, axis: int, microbatches: int
) -> float:
    """About what a pipeline would take if all other axes went on doing what they do in a plan of so many seconds: what the axis
    exchanged inside of the chains is saved, everything else there lasts as much longer as the bubble says. `batch`: the axes that
    split the batch; infinite where micro-batches are too small for them."""
    stages = numbers.sizes[axis]
    others = math.prod([size for a, size in enumerate(numbers.sizes) if batch[a] and a != axis])
    if any(chain.rows // microbatches % others for chain in found.chains):
        return math.inf
    longest = max(-(-chain.length // stages) / chain.length for chain in found.chains)
    stretch = pipeline_ticks(microbatches, stages) / microbatches * longest * stages
    return seconds + used.stretched(axis, stages, stretch) + found.handed(numbers, axis, microbatches)
