"""Room `attempts`: one program on one mesh, searched without a limit on memory and within several."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic

import jax

from jaxplan.budget import Limit, SomePlan
from jaxplan.cost import Modelled, Numbers, frugal, model
from jaxplan.graph import Graph
from jaxplan.pins import Dims, pinned_layouts
from jaxplan.pipeline import Pipeline
from jaxplan.pipeline.outline import micro_numbers
from jaxplan.pipeline.staging import stages_of
from jaxplan.plan import Plan
from jaxplan.report import show_bytes
from jaxplan.search import Floor, nearest, search as run_search
from jaxplan.trace import Traced


class Attempts(Generic[SomePlan]):
    """From a limit on bytes to the best plan, with a given pipeline."""

    def __init__(
        self, plan: Callable[..., SomePlan], traced: Traced, graph: Graph, numbers: Numbers, request: Any, dims: Dims,
        pipeline: Pipeline | None = None,
    ) -> None:  # fmt: skip
        """`plan`: makes one, of the fields of `Plan`; `request`: what was asked for."""
        pins = pinned_layouts(traced, request.pins, dict(request.mesh.shape), numbers.major_first)
        stages = stages_of(graph, pipeline, numbers.axis_names) if pipeline is not None else None
        if stages is not None:
            graph, numbers = stages.graph, micro_numbers(numbers, stages)
        self._modelled = functools.cache(lambda follow: model(graph, numbers, pins, follow=follow, stages=stages))
        self._made = functools.partial(plan, traced, mesh=request.mesh, dims=dims, request=request, pipeline=pipeline)
        self._donated, self._search = traced.donated, request.search
        self._met: dict[tuple[float, int], Any] = {}

    def __call__(self, limit: Limit[SomePlan] | None) -> SomePlan:
        modelled: Modelled = self._modelled(limit is None)
        if limit is None:
            found = run_search(modelled.problem, self._search)
            choices = modelled.complete(frugal(modelled, found.choices, found.seconds))
            return self._made(modelled=modelled, choices=choices, bound=found.bound)
        key = (limit.nbytes, id(limit.waiting))
        problem = limit.problem(modelled, self._donated, self._met.get(key, ()))
        found = nearest(problem, self._search)
        self._met[key] = found.notes.get("met", (found.choices,))
        return self._made(modelled=modelled, choices=found.choices, bound=None)

    @functools.cached_property
    def _floor(self) -> Floor:
        return Floor(self._modelled(True).problem)

    def reaches(self, seconds: float) -> bool:
        """Whether every plan is shown to take so many seconds at least."""
        return self._floor.reaches(seconds)


def more_devices(plan: Plan, budget: float) -> list[str]:
    """What twice the devices along an axis would do to a peak; those first that lower it most."""
    found = []
    for axis, size in plan.axis_sizes.items():
        sizes = {**plan.axis_sizes, axis: 2 * size}
        wider = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=plan.mesh.axis_types)
        if plan.pipeline is not None and axis == plan.pipeline.axis:
            continue
        request = replace(plan.request, mesh=wider, machine=plan.modelled.numbers.machine)
        numbers = Numbers(plan.modelled.whole, sizes, plan.modelled.numbers.machine, said=plan.modelled.numbers.said)
        try:
            attempt = Attempts(type(plan), plan.traced, plan.modelled.whole, numbers, request, plan.dims, plan.pipeline)
            free = attempt(None)
        except ValueError:  # a pin that so many devices do not divide
            continue
        peak = free.peak_bytes if free.peak_bytes <= budget else attempt(Limit(budget, (free,))).peak_bytes
        if peak < plan.peak_bytes:
            reached = show_bytes(peak) + (", which fits" if peak <= budget else "")
            found.append((peak, f"{2 * size} devices along {axis!r} ({reached})"))
    return [told for _, told in sorted(found)]
