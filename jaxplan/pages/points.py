"""Plans at several values of something, for the slider of a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jaxplan.pages.nouns import SweepView
from jaxplan.plan import Plan
from jaxplan.report import axis_roles

APART = {"memory_budget": math.inf, "certify": False, "pipeline": None, "microbatches": None}
"""Points are planned without a budget, a certificate or a pipeline."""


def auto_sweep(plan: Plan, replannable: Any) -> SweepView:
    """Plans along the first dimension of the data that can be given other sizes, or along the speed of the first link."""
    graph, state = plan.modelled.graph, {position for _, position in plan.modelled.graph.ties}
    data = [tensor for position, tensor in enumerate(graph.inputs) if position not in state and graph.tensors[tensor].shape]
    names = [name for tensor in data for name in plan.names.dimension(tensor)[:1]]
    for name in dict.fromkeys(name for name in names if name in replannable.origin.extents):
        now = plan.request.sizes.get(name, next(iter(replannable.origin.extents[name].values())))
        grain = math.gcd(now, math.prod(plan.axis_sizes.values()))
        sizes = sorted({max(grain, round(now * 2.0**k / grain) * grain) for k in range(-3, 4)} - {1})
        try:
            found = [replannable.replan(sizes={name: size}, **APART) for size in sizes]
        except ValueError:
            continue
        return sweep_view(name, [(f"{name} = {size}", one) for size, one in zip(sizes, found, strict=True)], sizes.index(now))
    axis, machine = plan.axis_names[0], plan.modelled.numbers.machine
    speeds = [2.0**k for k in range(-3, 4)]
    machines = [machine.slower(axis, 1 / speed, plan.axis_sizes) for speed in speeds]
    found = [replannable.replan(machine=one, **APART) for one in machines]
    told = [f"{speed:g} times as fast" for speed in speeds]
    return sweep_view(f"speed of the link of {axis}", list(zip(told, found, strict=True)), 3)


def sweep_view(label: str, plans: Sequence[tuple[str, Plan]], here: int) -> SweepView:
    """Plans at several values of something, each with what it is at; `here`: which of them is the one shown."""
    points = []
    for told, plan in plans:
        roles = "; ".join(f"{axis}: {', '.join(axis_roles(plan, k)) or 'left alone'}" for k, axis in enumerate(plan.axis_names))
        points.append((told, plan.seconds, sum(plan.wire_bytes.values()), plan.peak_bytes, roles))
    return SweepView(label, tuple(points), here)
