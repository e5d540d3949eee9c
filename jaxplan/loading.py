"""Room `loading`: a plan file and its function become a plan again."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from jaxplan import files
from jaxplan.api import Plan, Request, StagedPlan, stage_request
from jaxplan.cost import Modelled, Numbers, Stages, model
from jaxplan.graph import Graph, build_graph
from jaxplan.layout import Layout
from jaxplan.machine import Machine, machine as find_machine, platform_of
from jaxplan.pins import pinned_layouts, stage_dims
from jaxplan.pipeline.outline import micro_numbers
from jaxplan.pipeline.staging import stages_of
from jaxplan.trace import collector_paused, static_values, trace
from jaxplan.unlike import Stagewise, flat, micro_of, on_stages, parts_of, stage_mesh, stage_program


def load_plan(
    path: str | os.PathLike[str],
    fn: Callable[..., Any],
    *args: Any,
    mesh: Any = None,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Sequence[str] | None = None,
    **kwargs: Any,
) -> Plan:
    """The plan that `Plan.save` wrote, for the same function and shapes. `fn` is traced anew; nothing is searched, and nothing in
    the file is executed.

    `mesh`: of the same axes and sizes; None: the first devices of this process, or an `AbstractMesh` where they are too few.
    The other keywords are those of `make_plan`; what was donated is donated again, unless `donate_*` says otherwise.

    Raises ValueError if the file is no plan, or if it is not about this program: the message says which inputs, shapes or
    operations changed; OSError if the file cannot be read.
    """
    saved = files.read_plan(path)
    mesh = files.mesh_for(saved, mesh)
    start = time.perf_counter()
    traced = trace(
        fn, args, kwargs, static_argnums=static_argnums, static_argnames=static_argnames,
        donate_argnums=donate_argnums, donate_argnames=donate_argnames,
    )  # fmt: skip
    stages = {"trace": time.perf_counter() - start}
    asked = saved.asked
    pins = {name: PartitionSpec(*spec) for name, spec in asked.pins.items()}
    budget = math.inf if asked.memory_budget == "unlimited" else asked.memory_budget
    static = static_values(fn, args, kwargs, static_argnums, static_argnames)
    search = asked.search or "hsm2dl"
    machine = _as_saved(saved.machine, mesh)
    request = Request(
        mesh, machine, search, budget, pins, static, asked.while_trips, asked.certify, asked.pipeline, asked.microbatches
    )
    with collector_paused():
        written, traced = traced, files.program_for(saved, traced)
        files.check_program(saved, traced)
        if donate_argnums is None and donate_argnames is None and not any(traced.donated):
            donated = files.donated_of(saved, traced)
            written, traced = replace(written, donated=donated), replace(traced, donated=donated)
        if written.jaxpr is not traced.jaxpr:
            request = replace(request, unrolled=(written, build_graph(written, asked.while_trips, platform_of(mesh))))
        graph = build_graph(traced, asked.while_trips, platform_of(mesh))
        numbers = Numbers(graph, saved.mesh_shape, saved.machine, said=(saved.major_first,))
        layouts = pinned_layouts(traced, pins, saved.mesh_shape, saved.major_first)
        pipeline, dims = files.pipeline_for(saved, traced), files.dims_of(saved, traced, graph)
        cut = stages_of(graph, pipeline, numbers.axis_names) if pipeline is not None else None
        if cut is not None:
            graph, numbers = cut.graph, micro_numbers(numbers, cut)
        modelled, choices = _chosen(saved, graph, numbers, layouts, cut)
        plan = Plan(traced, modelled, choices, mesh, {}, saved.cost.bound, dims, request, pipeline)
        if saved.stages is None:
            files.check_specs(saved, plan)
        else:
            plan = _in_stages(saved, plan)
    return replace(plan, stages={**stages, "load": time.perf_counter() - start - stages["trace"]})


def _chosen(
    saved: files.SavedPlan, graph: Graph, numbers: Numbers, layouts: dict[int, Layout], cut: Stages | None = None
) -> tuple[Modelled, np.ndarray]:
    """A graph modelled as the file's plan was, and its choices."""
    modelled = model(graph, numbers, layouts, stages=cut)
    choices = files.choices_of(saved, modelled)
    if (modelled.complete(choices[list(modelled.kept)]) != choices).any():  # to fit, inputs lie elsewhere than their readers
        modelled = model(graph, numbers, layouts, follow=False, stages=cut)
    return modelled, choices


def _in_stages(saved: files.SavedPlan, plan: Plan) -> StagedPlan:
    """A plan with stages on sub-meshes, as a file has them. `plan`: of the program without. Raises PlanFileError where its
    program cannot be cut so: the file was edited."""
    asked, graph, numbers = saved.stages, plan.modelled.graph, plan.modelled.numbers
    assert asked is not None
    try:
        parts = parts_of(micro_of(flat(plan.traced), asked.microbatches), asked.cuts, tuple(graph.ties))
    except ValueError as error:
        raise files.PlanFileError(f"stages: {error}") from None
    programs, plans = [], []
    for number in range(parts.stages):
        program = stage_program(parts, number)
        own = files.check_stage(saved, number, program.traced.jaxpr)
        own_mesh = stage_mesh(plan.mesh, asked.axis, number)
        request = stage_request(plan.request, program.traced, own_mesh, plan.request.machine, saved.major_first)
        stage_graph = build_graph(program.traced, request.while_trips, platform_of(plan.mesh))
        sizes = dict(request.mesh.shape)
        layouts = pinned_layouts(program.traced, request.pins, sizes, saved.major_first)
        own_numbers = Numbers(stage_graph, sizes, saved.machine, said=(saved.major_first,))
        modelled, choices = _chosen(own, stage_graph, own_numbers, layouts)
        dims = stage_dims(plan.traced, graph, plan.dims, program.traced, stage_graph)
        programs.append(program)
        plans.append(Plan(program.traced, modelled, choices, request.mesh, {}, None, dims, request))
    link = numbers.link(numbers.axis_names.index(asked.axis))
    found = on_stages(plan, StagedPlan, Stagewise(parts, tuple(programs), tuple(plans), link, asked.axis))
    files.check_stages(saved, found, found.places)
    return found


def _as_saved(machine: Machine, mesh: Any) -> Machine:
    """A saved plan's machine, which goes on sending as it was planned to where this mesh would change that."""
    asked = find_machine(replace(machine, sends_rounded=None), mesh)
    same = (asked.sends_rounded is False) == (machine.sends_rounded is False)
    return replace(machine, sends_rounded=None if same else machine.sends_rounded is not False)
