"""From a `Plan` to what can be saved of it, and from what was saved back to the choices of a model, without a search."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxplan import __version__
from jaxplan.cost import Modelled, Option
from jaxplan.cost.formulas import ROUNDS, exchange_seconds
from jaxplan.cost.price import cluster_terms, terms_seconds
from jaxplan.files.compare import primitive_changes
from jaxplan.files.fingerprint import program_of
from jaxplan.files.fold import unique_paths
from jaxplan.files.nouns import (
    Asked,
    Axis,
    Cost,
    Entries,
    Leaf,
    Ledger,
    Live,
    PlanFileError,
    SavedChain,
    SavedExchange,
    SavedPipeline,
    SavedPlan,
    Split,
)
from jaxplan.graph import Graph
from jaxplan.layout import Layout, shards
from jaxplan.ledger import ledger
from jaxplan.pipeline import Pipeline, alternating, chain_of, rerolled, scan_at
from jaxplan.plan import Plan
from jaxplan.report import axis_roles
from jaxplan.search import SEARCHES
from jaxplan.trace import Traced

MOST_LIVE = 8
"""Kinds of tensors that the ledger names."""
MOST_NAMED = 6
"""Paths that an error names; of more it gives the number."""


# --- a plan written down ---------------------------------------------------------------------------------------------


def saved_plan(plan: Plan) -> SavedPlan:
    """Everything of a plan that can be written down. `plan.request`: what was asked for."""
    graph, numbers = plan.modelled.graph, plan.modelled.numbers
    exchanges, worked = exchanges_of(plan), work_seconds(plan)
    inputs = input_leaves(plan)
    outputs = _leaves(plan, plan.traced.out_paths, plan.traced.out_avals, plan.output_layouts, graph.outputs)
    kinds = [kind.name.lower() for kind in plan.mesh.axis_types]
    mesh = tuple(
        Axis(name, size, kind, tuple(axis_roles(plan, number)), plan.wire_bytes[name])
        for number, ((name, size), kind) in enumerate(zip(plan.axis_sizes.items(), kinds, strict=True))
    )
    donated = dict(zip(inputs, plan.traced.donated, strict=True))
    inputs = {path: replace(leaf, donated=donated[path]) for path, leaf in inputs.items()}
    cost = Cost(plan.seconds, worked, max(0.0, plan.seconds - worked), plan.bound)
    unknown = sorted({op.name for op in graph.operators if not op.rule.known})
    return SavedPlan(
        plan.traced.name, {"jaxplan": __version__, "jax": jax.__version__}, mesh, numbers.machine, _asked(plan),
        program_of(plan.traced.jaxpr), tuple(unknown), inputs, outputs, cost, _ledger(plan), exchanges,
        splits_of(plan), _pipeline(plan), axis_order=() if numbers.major_first == plan.axis_names else numbers.major_first,
    )  # fmt: skip


def entries_of(spec: PartitionSpec) -> Entries:
    """A PartitionSpec without its class."""
    return tuple(tuple(entry) if isinstance(entry, (tuple, list)) else entry for entry in spec)


def _asked(plan: Plan) -> Asked:
    request = plan.request
    search = next((name for name, found in SEARCHES.items() if request.search in (name, found)), None)
    budget = request.memory_budget
    if budget is not None and not isinstance(budget, str):
        budget = "unlimited" if budget == math.inf else float(budget)
    places = dict(zip(plan.modelled.graph.inputs, unique_paths(plan.traced.in_paths), strict=True))
    words: dict[str, dict[int, str]] = {}
    for (tensor, dim), name in plan.dims.items():
        words.setdefault(places[tensor], {})[dim] = name
    dims = {path: " ".join(name for _, name in sorted(found.items())) for path, found in words.items()}
    pins = {path: entries_of(spec) for path, spec in request.pins.items()}
    return Asked(search, budget, pins, float(request.while_trips), request.certify, dims, request.pipeline, request.microbatches)


def input_leaves(plan: Plan) -> dict[str, Leaf]:
    """{path: leaf} of the flat inputs, in order."""
    return _leaves(plan, plan.traced.in_paths, plan.traced.in_avals, plan.input_layouts, plan.modelled.graph.inputs)


def _leaves(
    plan: Plan, paths: Sequence[str], avals: Sequence[Any], layouts: Sequence[Layout], tensors: Sequence[int]
) -> dict[str, Leaf]:
    found = {}
    padded = {buffer.tensor: buffer.nbytes for buffer in (*plan.memory.results, *plan.memory.given)}
    for path, aval, layout, tensor in zip(unique_paths(paths), avals, layouts, tensors, strict=True):
        spec = entries_of(plan._specs([layout], [aval])[0])
        about = plan.modelled.graph.tensors[tensor] if tensor >= 0 else None
        held = padded.get(tensor, about.nbytes / shards(layout, plan.modelled.numbers.sizes)) if about else aval.dtype.itemsize
        dims = tuple(plan.names.dimension(tensor)) if about else ()
        found[path] = Leaf(str(aval.dtype), tuple(aval.shape), spec, float(held), dims)
    return found


def _ledger(plan: Plan) -> Ledger:
    held, found = plan.memory, ledger(plan)
    largest = found.entries[:MOST_LIVE]
    live = tuple(Live(e.kind, e.name, e.source, e.dtype, e.shape, e.count, e.nbytes) for e in largest)
    return Ledger(held.arguments, held.outputs, held.temporaries, held.peak, found.by_kind, live)


def exchanges_of(plan: Plan) -> tuple[SavedExchange, ...]:
    """The exchanges of a plan, alike ones together, costliest first; ties in an order of their own."""
    numbers = plan.modelled.numbers
    links = dict(zip(plan.axis_names, map(numbers.link, range(len(plan.axis_names))), strict=True))
    merged: dict[tuple[Any, ...], SavedExchange] = {}
    for e in plan.exchanges:
        key = (e.kind, e.axes, e.shape, e.dtype, e.operator, e.source)
        before = merged.get(key) or SavedExchange(e.kind, e.axes, e.shape, e.dtype, e.operator, e.source, 0.0, {}, 0.0)
        sent = {axis: before.bytes.get(axis, 0.0) + value * e.times for axis, value in e.wire_bytes.items()}
        seconds = sum(exchange_seconds(value, ROUNDS[e.kind], *links[axis]) for axis, value in e.wire_bytes.items()) * e.times
        merged[key] = replace(before, times=before.times + e.times, bytes=sent, seconds=before.seconds + seconds)
    found = list(merged.values())
    return tuple(sorted(found, key=lambda e: (-sum(e.bytes.values()), e.kind, e.axes, e.shape, e.dtype, e.operator, e.source)))


def work_seconds(plan: Plan) -> float:
    """The time of local work, of all that is priced."""
    modelled, total = plan.modelled, 0.0
    for index, cluster in enumerate(modelled.graph.clusters):
        terms = cluster_terms(cluster, modelled.chosen(plan.choices, index), modelled.setting, modelled.numbers)
        total += cluster.times * terms_seconds(replace(terms, sent={}, rounds={}), modelled.numbers)
    return total


def _pipeline(plan: Plan) -> SavedPipeline | None:
    if plan.pipeline is None:
        return None
    chains = tuple(SavedChain(chain.path, chain.layers) for chain in plan.pipeline.chains)
    return SavedPipeline(plan.pipeline.axis, plan.pipeline.microbatches, plan.pipeline.schedule, chains)


def splits_of(plan: Plan) -> tuple[Split, ...]:
    """The choice of every cluster of operators, in program order."""
    graph, found = plan.modelled.graph, []
    for index, cluster in enumerate(graph.clusters):
        chosen = list(zip(plan.axis_names, plan.modelled.chosen(plan.choices, index), strict=True))
        factors = tuple([(axis, option.factor) for axis, option in chosen if option.factor != -1])
        scatters = tuple([(axis, option.scatter) for axis, option in chosen if option.scatter != -1])
        found.append(Split(graph.operators[cluster.members[-1]].name, factors, scatters))
    return tuple(found)


# --- and taken up again ----------------------------------------------------------------------------------------------


def mesh_for(saved: SavedPlan, mesh: Any = None) -> Any:
    """The mesh to load a plan on: the given one, or the first devices of this process; where they are too few, an abstract one.

    Raises PlanFileError where the given mesh has other axes or sizes.
    """
    sizes, names = tuple(saved.mesh_shape.values()), tuple(saved.mesh_shape)
    if mesh is None:
        kinds = tuple(AxisType[axis.kind.capitalize()] for axis in saved.mesh)
        devices = jax.devices()
        if len(devices) < math.prod(sizes):
            return jax.sharding.AbstractMesh(sizes, names, axis_types=kinds)
        return Mesh(np.array(devices[: math.prod(sizes)]).reshape(sizes), names, axis_types=kinds)
    if list(mesh.shape.items()) != list(saved.mesh_shape.items()):
        raise PlanFileError(
            f"the plan is for the mesh {_mesh_text(saved.mesh_shape)}, the given mesh is {_mesh_text(mesh.shape)}"
        )
    return mesh


def _mesh_text(shape: Mapping[str, int]) -> str:
    return "(" + ", ".join(f"{axis}={size}" for axis, size in shape.items()) + ")"


def check_program(saved: SavedPlan, traced: Traced) -> None:
    """Whether a plan is about a traced program. Raises PlanFileError that says what changed: paths, shapes, primitives."""
    changes = [
        *_leaf_changes("input", saved.inputs, traced.in_paths, traced.in_avals),
        *_leaf_changes("output", saved.outputs, traced.out_paths, traced.out_avals),
    ]
    program = program_of(traced.jaxpr)
    if program.fingerprint != saved.program.fingerprint:
        changes += primitive_changes(saved.program, program)
        if not changes:
            changes = ["the same inputs, outputs and operations, put together in another way"]
    if changes:
        name = f"the plan was made for {saved.function!r}, and {traced.name!r} is another program" if (
            traced.name != saved.function) else f"{traced.name!r} is not the program that the plan was made for"  # fmt: skip
        versions = f" The plan was made with JAX {saved.versions['jax']}, this is JAX {jax.__version__}."
        told = versions if saved.versions["jax"] != jax.__version__ else ""
        raise PlanFileError(f"{name}:\n" + "\n".join(f"  {change}" for change in changes) + f"\nPlan again with make_plan.{told}")


def _leaf_changes(what: str, saved: Mapping[str, Leaf], paths: Sequence[str], avals: Sequence[Any]) -> list[str]:
    now = dict(zip(unique_paths(paths), avals, strict=True))
    gone, new = [path for path in saved if path not in now], [path for path in now if path not in saved]
    changes = []
    if gone:
        near = {path: difflib.get_close_matches(path, new, 1, 0.6) for path in gone[:MOST_NAMED]}
        told = [f"{path} (now {near[path][0]}?)" if near[path] else path for path in gone[:MOST_NAMED]]
        changes.append(f"no such {what} any more: {_some(told, len(gone))}")
    if new:
        changes.append(f"new {what}s: {_some(new, len(new))}")
    moved = []
    for path, leaf in saved.items():
        if path in now:
            kind = f"{now[path].dtype}[{','.join(map(str, now[path].shape))}]"
            moved += [f"{path} was {leaf.kind}, is {kind}"] if kind != leaf.kind else []
    if moved:
        changes.append(f"{what}s of another shape or dtype: {_some(moved, len(moved))}")
    return changes


def _some(texts: Sequence[str], count: int) -> str:
    more = count - MOST_NAMED
    return ", ".join(texts[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def donated_of(saved: SavedPlan, traced: Traced) -> tuple[bool, ...]:
    """Per flat input, whether it was donated when the plan was made."""
    return tuple(saved.inputs[path].donated for path in unique_paths(traced.in_paths))


def dims_of(saved: SavedPlan, traced: Traced, graph: Graph) -> dict[tuple[int, int], str]:
    """The names of dimensions that were given when the plan was made."""
    tensors = dict(zip(unique_paths(traced.in_paths), graph.inputs, strict=True))
    found = {}
    for path, text in saved.asked.dims.items():
        if path not in tensors:
            raise PlanFileError(f"asked.dims: no input has the path {path!r}")
        found.update({(tensors[path], dim): word for dim, word in enumerate(text.split())})
    return found


def program_for(saved: SavedPlan, traced: Traced) -> Traced:
    """The program that a saved plan is about: of a pipelined one whose layers were unrolled, the one with its layers as scans."""
    if saved.pipeline is None or program_of(traced.jaxpr).fingerprint == saved.program.fingerprint:
        return traced
    return rerolled(traced)


def pipeline_for(saved: SavedPlan, traced: Traced) -> Pipeline | None:
    """The pipeline of a saved plan, its roles found again in the program. Raises PlanFileError where the program's scans cannot
    run so: the file was edited."""
    asked = saved.pipeline
    if asked is None:
        return None
    jaxpr = traced.jaxpr.jaxpr
    try:
        chains = [chain_of(scan_at(jaxpr, chain.path), chain.path, chain.layers, asked.microbatches) for chain in asked.chains]
        stages = saved.mesh_shape[asked.axis]
        return alternating(jaxpr, Pipeline(asked.axis, stages, asked.microbatches, asked.schedule, tuple(chains)))
    except ValueError as error:
        raise PlanFileError(f"pipeline: {error}") from None


def choices_of(saved: SavedPlan, modelled: Modelled) -> np.ndarray:
    """The (clusters, axes) option numbers of a saved plan in a model of the same program. Raises PlanFileError where they are not
    among its options: the file was edited, or made by a jaxplan that takes the program apart in another way."""
    graph, axes = modelled.graph, modelled.numbers.axis_names
    blame = f"the file was edited, or jaxplan {saved.versions['jaxplan']}, which made it, models programs otherwise: plan again"
    if len(saved.splits) != len(graph.clusters):
        raise PlanFileError(f"choices: {len(saved.splits)} of them for {len(graph.clusters)} clusters of operators; {blame}")
    choices = np.zeros((len(graph.clusters), len(axes)), dtype=np.int64)
    known: dict[tuple[Split, int], list[int]] = {}
    for index, (split, cluster) in enumerate(zip(saved.splits, graph.clusters, strict=True)):
        name = graph.operators[cluster.members[-1]].name
        if split.operator != name:
            raise PlanFileError(f"choices: number {index} is for {split.operator!r}, where the program has {name!r}; {blame}")
        options = modelled.options[index]
        row = known.get((split, id(options)))
        if row is None:
            chosen = [Option(split.factor(axis), split.scatter(axis)) for axis in axes]
            wrong = [axis for axis, option, open_to_it in zip(axes, chosen, options, strict=True) if option not in open_to_it]
            if wrong:
                raise PlanFileError(f"choices: number {index} ({name}) cannot be split over {wrong[0]!r} in this way; {blame}")
            row = known[split, id(options)] = [o.index(option) for o, option in zip(options, chosen, strict=True)]
        choices[index] = row
    return choices


def check_specs(saved: SavedPlan, plan: Plan) -> None:
    """Whether the specs in a file are those that its choices lead to. Raises PlanFileError that names the paths where not."""
    wrong = []
    for leaves, paths, avals, layouts in (
        (saved.inputs, plan.traced.in_paths, plan.traced.in_avals, plan.input_layouts),
        (saved.outputs, plan.traced.out_paths, plan.traced.out_avals, plan.output_layouts),
    ):
        for path, spec in zip(unique_paths(paths), plan._specs(layouts, avals), strict=True):
            if leaves[path].spec != entries_of(spec):
                wrong.append(f"{path} (the file says {PartitionSpec(*leaves[path].spec)}, its choices {spec})")
    if wrong:
        raise PlanFileError(
            f"specs and choices disagree: {_some(wrong, len(wrong))}. The file was edited: give pins= to make_plan for specs "
            "of your own, or own them with plan.to_python()"
        )
