"""Where a program may be cut, and where it is best: the runs between two possible cuts, priced by a plan of the uncut program."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxplan.cost import reshard_steps
from jaxplan.cost.price import cluster_terms, sent_seconds, steps_terms, terms_seconds
from jaxplan.graph.flatten import VIEW
from jaxplan.pipeline.nouns import Kind
from jaxplan.plan import Plan
from jaxplan.search.chain import Run
from jaxplan.unlike.nouns import Micro
from jaxplan.unlike.parts import variables
from jaxplan.unlike.programs import role_of, shape_of
from jaxplan.unlike.stage import StageProgram, loop_of

MOST_CUTS = 96
"""Places where a cut is considered: those over which the fewest bytes go, of each neighbourhood."""

Key = TypeVar("Key", bound=Hashable)


def crossing_bytes(micro: Micro) -> tuple[np.ndarray, np.ndarray]:
    """Per place, the bytes of a micro-batch that go over a cut behind it: (forward, backward)."""
    last = len(micro.forward)
    ahead, back = np.zeros(last + 1), np.zeros(last + 1)
    made = {v: micro.places[n] for n in micro.places for v in micro.equations[n].outvars}
    going = set(micro.forward)
    far: dict[Any, int] = {}
    near: dict[Any, int] = {}
    for n, place in micro.places.items():
        for v in variables(micro.equations[n]):
            if v in made:
                far[v], near[v] = max(far.get(v, -1), place), min(near.get(v, last), place)
    for n in micro.places:
        for v in micro.equations[n].outvars:
            if role_of(micro, v).kind is Kind.CUT and v in far:
                nbytes = math.prod(shape_of(micro, v).shape) * v.aval.dtype.itemsize
                if n in going and far[v] > made[v]:
                    ahead[made[v]] += nbytes
                    ahead[far[v]] -= nbytes
                if n not in going and near[v] < made[v]:
                    back[near[v]] += nbytes
                    back[made[v]] -= nbytes
    return np.cumsum(ahead)[:last], np.cumsum(back)[:last]


def possible_cuts(micro: Micro) -> list[int]:
    """Places behind which the program may be cut: where no fewer bytes cross next to it; the last of places that are alike, and
    never the last place of all."""
    ahead, back = crossing_bytes(micro)
    crossing = ahead + back
    found = []
    for place in range(len(micro.forward) - 1):
        before = crossing[place - 1] if place else math.inf
        if crossing[place] <= before and crossing[place] < (crossing[place + 1] if place + 2 < len(crossing) else math.inf):
            found.append(place)
    lightest = sorted(found, key=lambda place: (crossing[place], place))[:MOST_CUTS]
    return sorted(lightest)


def runs_of(micro: Micro, whole: StageProgram, plan: Plan, link: tuple[float, float], ends: Sequence[int]) -> list[Run]:
    """The runs between possible cuts. `whole`: the uncut program as a single stage; `plan`: its plan on the mesh of one stage;
    `link`: (seconds per byte, seconds per message) between stages; `ends`: the possible cuts."""
    seconds, once = place_seconds(micro, whole, plan)
    devices = math.prod(plan.modelled.numbers.sizes)
    state, kept = np.zeros(len(micro.forward)), np.zeros(len(micro.forward))
    of = dict(zip(whole.arguments, range(len(whole.arguments)), strict=True))
    read = [(v, plan.input_bytes(of[v])) for v in micro.jaxpr.invars if v in of and v in micro.reach]
    total = sum(plan.input_bytes(of[v]) for v, _ in whole.state)
    stated = {v for v, _ in whole.state}
    held = sum(nbytes for v, nbytes in read if v in stated)
    for v, nbytes in read:
        state[micro.reach[v]] += nbytes * ((total / held + 1.0) if v in stated and held else 1.0)  # and its gradient
    for v, place in residuals(micro).items():
        kept[place] += math.prod(shape_of(micro, v).shape) * v.aval.dtype.itemsize / devices
    if state.sum():
        seconds = seconds + once * state / state.sum() / micro.microbatches
    ahead, back = crossing_bytes(micro)
    found, start = [], 0
    for end in (*ends, len(micro.forward) - 1):
        sides = [side[end] for side in (ahead, back) if side[end]]
        crossing = sum([nbytes / devices * link[0] + link[1] for nbytes in sides])
        some = slice(start, end + 1)
        found.append(Run(float(seconds[some].sum()), float(state[some].sum()), float(kept[some].sum()), crossing))
        start = end + 1
    return found


def residuals(micro: Micro) -> dict[Any, int]:
    """{what forward equations make and backward ones read: the place of the first that does on the way}."""
    going = set(micro.forward)
    made = {v for n in going for v in micro.equations[n].outvars if role_of(micro, v).kind is Kind.CUT}
    found: dict[Any, int] = {}
    for n, place in micro.places.items():
        if n not in going:
            for v in variables(micro.equations[n]):
                if v in made:
                    found[v] = max(found.get(v, -1), place)
    return found


def place_seconds(micro: Micro, whole: StageProgram, plan: Plan) -> tuple[np.ndarray, float]:
    """(seconds of one micro-batch per place, seconds of what runs once), under a plan of the whole program as one stage."""
    loop = loop_of(whole)
    graph = plan.modelled.graph

    reader = {tensor: op.path for op in reversed(graph.operators) for tensor in op.operands}

    def place(index: int) -> int:
        last = graph.operators[graph.clusters[index].members[-1]] if graph.clusters[index].members else None
        path = () if last is None else reader.get(last.results[0], ()) if last.name == VIEW else last.path
        return loop.places.get(path[1:3], -1) if path[:1] == (loop.number,) and len(path) > 2 else -1

    table = seconds_by(plan, place)
    seconds = np.zeros(len(micro.forward))
    for where, value in table.items():
        if where >= 0:
            seconds[where] += value / micro.microbatches
    return seconds, table.get(-1, 0.0)


def seconds_by(plan: Plan, key: Callable[[int], Key]) -> dict[Key, float]:
    """The modelled seconds of a plan, by a key of the clusters (by number): of an exchange between two, the reader's."""
    modelled = plan.modelled
    graph, numbers, setting = modelled.graph, modelled.numbers, modelled.setting
    found: dict[Key, float] = {}
    for index, cluster in enumerate(graph.clusters):
        terms = cluster_terms(cluster, modelled.chosen(plan.choices, index), setting, numbers)
        where = key(index)
        found[where] = found.get(where, 0.0) + cluster.times * terms_seconds(terms, numbers)
    for reading in modelled.readings:
        steps = reshard_steps(*modelled.edge_layouts(plan.choices, reading), setting.order)
        if steps:
            sent, rounds = steps_terms(steps, numbers.nbytes(reading.tensor), numbers.sizes)
            where = key(reading.reader)
            found[where] = found.get(where, 0.0) + reading.times * sent_seconds(sent, rounds, numbers)
    return found
