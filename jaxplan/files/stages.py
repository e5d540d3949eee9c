"""A plan whose stages lie on sub-meshes, written down: the cuts, and the choices of every stage's program.

What runs the stages is another room's affair: a plan of this kind is asked only for its `stage_plans`, and per input and output
where it lies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxplan.files.derive import entries_of, exchanges_of, saved_plan, splits_of, work_seconds
from jaxplan.files.fingerprint import program_of
from jaxplan.files.fold import unique_paths
from jaxplan.files.nouns import Axis, Cost, Entries, Leaf, Ledger, PlanFileError, SavedPlan, SavedStage, SavedStages
from jaxplan.plan import Plan
from jaxplan.report import axis_roles

MOST_NAMED = 6

Place = tuple[int, Any]
"""(stage, spec on its sub-mesh)."""


def saved_in_stages(
    plan: Any, axis: str, cuts: Sequence[int], microbatches: int, places: tuple[Sequence[Place], Sequence[Place]],
    held: tuple[float, float],
) -> SavedPlan:  # fmt: skip
    """Everything of such a plan that can be written down. `places`: of the flat inputs, and of the outputs; `held`: bytes per
    device of the stage that takes most: (arguments, at its worst moment)."""
    whole = Plan(plan.traced, plan.modelled, plan.choices, plan.mesh, plan.stages, plan.bound, plan.dims, plan.request)
    saved, stages = saved_plan(whole), plan.stage_plans
    exchanges = exchanges_of(plan)
    mesh = []
    for number, one in enumerate(saved.mesh):
        found = [role for stage in stages for role in axis_roles(stage, number)]
        roles = ("stages of unlike layers",) if one.name == axis else tuple(dict.fromkeys(found))
        mesh.append(Axis(one.name, one.size, one.kind, roles, plan.wire_bytes[one.name]))
    worked = min(plan.seconds, max([work_seconds(stage) for stage in stages]))
    arguments, peak = held
    kinds = {"arguments": arguments, "micro-batches and parts": peak - arguments}
    ledger = Ledger(arguments, 0.0, peak - arguments, peak, kinds, ())
    programs = tuple([SavedStage(program_of(stage.traced.jaxpr).fingerprint, splits_of(stage)) for stage in stages])
    return replace(
        saved, mesh=tuple(mesh), inputs=_placed(plan, saved.inputs, places[0]), outputs=_placed(plan, saved.outputs, places[1]),
        cost=Cost(plan.seconds, worked, plan.seconds - worked, None), memory=ledger, exchanges=exchanges,
        stages=SavedStages(axis, microbatches, tuple(cuts), programs),
    )  # fmt: skip


def check_stages(saved: SavedPlan, plan: Any, places: tuple[Sequence[Place], Sequence[Place]]) -> None:
    """Whether inputs and outputs lie where a file says. Raises PlanFileError that names the paths where not."""
    wrong = []
    pairs = (saved.inputs, plan.traced.in_paths, places[0]), (saved.outputs, plan.traced.out_paths, places[1])
    for leaves, paths, own in pairs:
        for path, (stage, spec) in zip(unique_paths(paths), own, strict=True):
            if (leaves[path].stage, leaves[path].spec) != (stage, entries_of(spec)):
                wrong.append(f"{path} (its choices say {spec} on stage {stage})")
    if wrong:
        more = f" and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
        told = f"specs and choices disagree: {', '.join(wrong[:MOST_NAMED])}{more}"
        raise PlanFileError(f"{told}. The file was edited: give pins= to make_plan for specs of your own")


def check_stage(saved: SavedPlan, number: int, program: Any) -> SavedPlan:
    """What a file says of the program of one stage, as a saved plan of it. Raises PlanFileError where that is another one."""
    assert saved.stages is not None
    stage = saved.stages.programs[number]
    if program_of(program).fingerprint != stage.fingerprint:
        made = saved.versions["jaxplan"]
        raise PlanFileError(
            f"stages: the program of stage {number} is another one: the file was edited, or jaxplan {made}, which made it, cuts "
            "programs otherwise: plan again"
        )
    return replace(saved, splits=stage.splits)


def _placed(plan: Any, leaves: Mapping[str, Leaf], places: Sequence[Place]) -> dict[str, Leaf]:
    """Leaves on the sub-mesh where they lie."""
    found = {}
    for (path, leaf), (stage, spec) in zip(leaves.items(), places, strict=True):
        split = entries_of(spec)
        nbytes = leaf.bytes * _parts(leaf.spec, plan.axis_sizes) / _parts(split, plan.axis_sizes)
        found[path] = replace(leaf, spec=split, bytes=nbytes, stage=stage)
    return found


def _parts(spec: Entries, sizes: Mapping[str, int]) -> int:
    """Into how many parts a spec cuts an array."""
    names = [axis for entry in spec for axis in (entry if isinstance(entry, tuple) else (entry,)) if axis is not None]
    return math.prod([sizes[axis] for axis in names])
