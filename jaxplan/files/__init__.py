"""Room `files`: plans as files. A `Plan` becomes a `SavedPlan`, a small text file, a module of specs; a file becomes a plan."""

from jaxplan.files.compare import Comparison
from jaxplan.files.derive import (
    check_program,
    check_specs,
    choices_of,
    dims_of,
    donated_of,
    input_leaves,
    mesh_for,
    pipeline_for,
    program_for,
    saved_plan,
)
from jaxplan.files.describe import describe_saved
from jaxplan.files.encode import to_json
from jaxplan.files.nouns import PlanFileError, SavedPlan
from jaxplan.files.python import to_python
from jaxplan.files.schema import plan_schema
from jaxplan.files.stages import check_stage, check_stages, saved_in_stages
from jaxplan.files.store import parse_plan, read_plan, write_bytes, write_plan, write_text

__all__ = [
    "Comparison",
    "PlanFileError",
    "SavedPlan",
    "check_program",
    "check_specs",
    "check_stage",
    "check_stages",
    "choices_of",
    "describe_saved",
    "dims_of",
    "donated_of",
    "input_leaves",
    "mesh_for",
    "parse_plan",
    "pipeline_for",
    "plan_schema",
    "program_for",
    "read_plan",
    "saved_in_stages",
    "saved_plan",
    "to_json",
    "to_python",
    "write_bytes",
    "write_plan",
    "write_text",
]
