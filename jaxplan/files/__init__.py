"""Room `files`: plans as files. A `Plan` becomes a `SavedPlan`, a small text file, a module of specs; a file becomes a plan."""

from jaxplan.files.derive import check_program, check_specs, choices_of, dims_of, mesh_for, saved_plan
from jaxplan.files.nouns import PlanFileError, SavedPlan
from jaxplan.files.python import to_python
from jaxplan.files.schema import plan_schema
from jaxplan.files.store import parse_plan, read_plan, write_plan, write_text

__all__ = [
    "PlanFileError",
    "SavedPlan",
    "check_program",
    "check_specs",
    "choices_of",
    "dims_of",
    "mesh_for",
    "parse_plan",
    "plan_schema",
    "read_plan",
    "saved_plan",
    "to_python",
    "write_plan",
    "write_text",
]
