"""Room `export`: a plan in the words of other libraries: their objects from a `Plan`, text files from a saved one."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable
from typing import Any

from jaxplan.export.explicit import EXPLICIT, write_explicit
from jaxplan.export.flax import LINEN, NNX
from jaxplan.export.haliax import HALIAX
from jaxplan.export.keras import KERAS
from jaxplan.export.maxtext import MAXTEXT
from jaxplan.export.nouns import Exporter, ExportError, Written
from jaxplan.export.optax import OPTAX
from jaxplan.export.orbax import ORBAX, CheckpointError, restore
from jaxplan.export.select import select
from jaxplan.files import SavedPlan
from jaxplan.plan import Plan

__all__ = ["EXPORTERS", "CheckpointError", "ExportError", "export_plan", "restore_state", "write_explicit", "write_export"]

EXPORTERS: dict[str, Exporter] = {
    "flax": LINEN,
    "nnx": NNX,
    "orbax": ORBAX,
    "optax": OPTAX,
    "maxtext": MAXTEXT,
    "haliax": HALIAX,
    "keras": KERAS,
    "explicit": EXPLICIT,
}
"""By the name that users say."""


def export_plan(plan: Plan, form: str, of: Any, options: dict[str, Any], planner: Callable[..., Plan]) -> Any:
    """What `plan.export` gives. `planner`: `make_plan`, for layouts of what the plan does not know."""
    exporter = _exporter(form)
    if getattr(plan, "stage_plans", ()) and not exporter.apart:
        can = ", ".join(name for name, other in EXPORTERS.items() if other.apart)
        raise ExportError(
            f"the stages of this plan lie on sub-meshes, as programs of their own, and {form!r} lays all arrays on one mesh: of "
            f"such a plan there are {can}; plan.in_shardings has a sharding per array, plan.stage_plans[number].export({form!r}) "
            "is of one stage, and a plan made with pipeline=None has all forms"
        )
    if exporter is OPTAX:
        options = {**options, "planner": planner}
    unknown = options.keys() - inspect.signature(exporter.build).parameters.keys()
    if unknown:
        raise TypeError(f"the export {form!r} does not take {', '.join(sorted(unknown))}")
    return exporter.build(select(plan, of), **options)


def write_export(saved: SavedPlan, form: str, path: str | None) -> Written:
    """What a file in a format says, from a saved plan. Raises ExportError for formats that are objects in memory."""
    exporter = _exporter(form)
    if exporter.write is None:
        files = ", ".join(name for name, other in EXPORTERS.items() if other.write is not None)
        raise ExportError(
            f"{form!r} gives {exporter.gives}, from plan.export({form!r}); from a plan's file alone there are {files}"
        )
    return exporter.write(saved, path)


def restore_state(plan: Plan, directory: str | os.PathLike[str], of: Any, partial: bool) -> Any:
    """What `plan.restore` gives."""
    return restore(select(plan, of), directory, partial)


def _exporter(form: str) -> Exporter:
    if form not in EXPORTERS:
        near = difflib.get_close_matches(str(form), EXPORTERS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ExportError(f"there is no export format {form!r}; there are {', '.join(EXPORTERS)}{hint}")
    return EXPORTERS[form]
