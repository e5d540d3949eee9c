"""jaxplan: automatic parallelism for JAX. A jitted function in, PartitionSpecs for a device mesh out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxplan.agree import DifferentPlans as DifferentPlans
    from jaxplan.api import Plan as Plan, make_plan as make_plan
    from jaxplan.auto import auto_shard as auto_shard
    from jaxplan.budget import NothingFits as NothingFits
    from jaxplan.export import CheckpointError as CheckpointError, ExportError as ExportError
    from jaxplan.hlo import Audit as Audit, audit as audit
    from jaxplan.loading import load_plan as load_plan
    from jaxplan.machine import Link as Link, Machine as Machine, load_machine as load_machine, save_machine as save_machine
    from jaxplan.measure import Calibration as Calibration, calibrate as calibrate
    from jaxplan.regimes import Regimes as Regimes
    from jaxplan.rules import rule as rule
    from jaxplan.state import LayoutError as LayoutError
    from jaxplan.whatif import MeshRanking as MeshRanking, Sweep as Sweep, best_mesh as best_mesh, sweep as sweep

__version__ = "0.1.0"

_HOMES = {
    "auto_shard": "jaxplan.auto",
    "load_plan": "jaxplan.loading",
    "make_plan": "jaxplan.api",
    "Plan": "jaxplan.api",
    "audit": "jaxplan.hlo",
    "Audit": "jaxplan.hlo",
    "rule": "jaxplan.rules",
    "Regimes": "jaxplan.regimes",
    "Calibration": "jaxplan.measure",
    "CheckpointError": "jaxplan.export",
    "DifferentPlans": "jaxplan.agree",
    "ExportError": "jaxplan.export",
    "calibrate": "jaxplan.measure",
    "load_machine": "jaxplan.machine",
    "save_machine": "jaxplan.machine",
    "LayoutError": "jaxplan.state",
    "NothingFits": "jaxplan.budget",
    "Machine": "jaxplan.machine",
    "Link": "jaxplan.machine",
    "best_mesh": "jaxplan.whatif",
    "MeshRanking": "jaxplan.whatif",
    "sweep": "jaxplan.whatif",
    "Sweep": "jaxplan.whatif",
}

__all__ = [
    "Audit",
    "Calibration",
    "CheckpointError",
    "DifferentPlans",
    "ExportError",
    "LayoutError",
    "Link",
    "Machine",
    "MeshRanking",
    "NothingFits",
    "Plan",
    "Regimes",
    "Sweep",
    "audit",
    "auto_shard",
    "best_mesh",
    "calibrate",
    "load_machine",
    "load_plan",
    "make_plan",
    "rule",
    "save_machine",
    "sweep",
]


def __getattr__(name: str) -> Any:
    """Public names are loaded when first used, so that rooms without JAX can be imported without JAX."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'jaxplan' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
