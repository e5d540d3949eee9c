"""Whether stages of unlike layers are had: along an axis that was asked for by name, or where they are faster than all else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxplan.budget import NothingFits
from jaxplan.cost.formulas import pipeline_ticks
from jaxplan.cost.price import cluster_terms, terms_seconds
from jaxplan.hybrid import MOST_MICROBATCHES, Choosing, slow_axes
from jaxplan.pipeline import PipelineError
from jaxplan.pipeline.repeats import repeats
from jaxplan.plan import Plan
from jaxplan.unlike.choose import Asked, Planner, Stagewise, stagewise

APART = 0.1
"""By what share of the time of the best other plan stages on sub-meshes have to be faster to be taken where nobody asked for
them, and memory allows either: they are no single program, and can do less."""
SQUEEZED = 2.0
"""How many times the budget a stage may take at first, where nobody asked for it: squeezing it takes many searches."""


@dataclass(frozen=True)
class Wanted:
    """What a user asked for, as far as it is about stages. `certify`: whether a bound is wanted, too; `planner`: plans the
    program of a stage."""

    mesh: Any
    pins: Mapping[str, PartitionSpec]
    certify: bool
    microbatches: int | None
    planner: Planner

    def pinned_along(self, axis: str) -> bool:
        """Whether pins lay inputs along an axis."""
        return any(axis in (names if isinstance(names, tuple) else (names,)) for spec in self.pins.values() for names in spec)


def insisted(using: Choosing[Any], wanted: Wanted, axis: str, error: PipelineError) -> Stagewise:
    """The stages along an axis that was asked for by name. `error`: why its layers are no loop. Raises ValueError, and says why,
    where there are none; NothingFits."""
    if wanted.certify:
        raise ValueError(
            f"certify=True: no bound is known for stages of unlike layers, as pipeline={axis!r} asks for here ({error}); "
            "plan with pipeline=None, or without certify"
        ) from error
    if wanted.pinned_along(axis):
        raise ValueError(f"pipeline={axis!r}: pins lay inputs along {axis!r} too, which has one device on every stage") from error
    try:
        return stagewise(_asked(using, wanted, axis))
    except NothingFits:
        raise
    except ValueError as second:
        raise PipelineError(f"{error}. Nor can it be cut into stages of unlike layers: {second}") from None


def unasked(using: Choosing[Any], wanted: Wanted, best: Plan | None) -> Stagewise | None:
    """Stages that nobody asked for, where they are faster by `APART` than the best plan as a single program; None where there are
    none. `best`: that plan, or None where nothing fits.

    Looked for where layers are no loop, and a pipeline cannot be had otherwise; along links that are slower than others, unless
    nothing fits; and only if the work, shared by all devices, and the smallest bubble leave room for it. The uncut program is
    planned on the devices of one stage, and what is no faster by that is not planned stage by stage.
    """
    numbers, sizes = using.numbers, using.numbers.sizes
    ceiling = math.inf if best is None else (1 - APART) * best.seconds
    axes = slow_axes(numbers) if best is not None else [axis for axis, size in enumerate(sizes) if size > 1]
    if best is not None and axes:
        ideal = shared_seconds(best)
        axes = [axis for axis in axes if ideal * _stretch(sizes[axis], wanted.microbatches) < ceiling]
    names = [numbers.axis_names[axis] for axis in axes]
    names = [name for name in names if not wanted.pinned_along(name)]
    if not names or wanted.certify or _several_processes(wanted.mesh) or _alike(using):
        return None
    found: Stagewise | None = None
    for name in names:
        try:
            staged = stagewise(replace(_asked(using, wanted, name), ceiling=ceiling, squeezed=SQUEEZED))
        except ValueError:  # such stages cannot be had; nobody asked for them
            continue
        if staged.seconds < ceiling:
            found, ceiling = staged, staged.seconds
    return found


def shared_seconds(plan: Plan) -> float:
    """Modelled seconds of a program's work if all devices shared it evenly and sent nothing."""
    modelled, whole = plan.modelled, np.zeros_like(plan.choices)
    work = [
        cluster.times * terms_seconds(
            cluster_terms(cluster, modelled.chosen(whole, index), modelled.setting, modelled.numbers), modelled.numbers
        )
        for index, cluster in enumerate(modelled.graph.clusters)
    ]  # fmt: skip
    return sum(work) / math.prod(modelled.numbers.sizes)


def _stretch(stages: int, microbatches: int | None) -> float:
    most = microbatches or MOST_MICROBATCHES * stages
    return pipeline_ticks(most, stages) / most


def _alike(using: Choosing[Any]) -> bool:
    """Whether layers can be laid along an axis as a loop."""
    return bool(using.chains) or (repeats(using.graph) is not None and bool(using.layered[1]))


def _several_processes(mesh: Any) -> bool:
    return isinstance(mesh, Mesh) and len({device.process_index for device in mesh.devices.flat}) > 1


def _asked(using: Choosing[Any], wanted: Wanted, axis: str) -> Asked:
    numbers = using.numbers
    link = numbers.link(numbers.axis_names.index(axis))
    ties: Sequence[tuple[int, int]] = tuple(using.graph.ties)
    return Asked(using.traced, ties, wanted.mesh, axis, link, wanted.microbatches, using.budget, wanted.planner)
