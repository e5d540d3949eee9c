"""Room `pipeline`: a mesh axis along the layers. Which scans can run in stages, how, and what it looks like."""

from jaxplan.pipeline.analysis import Scan, chain_of, left_out, pipeline_of, scan_at, scans
from jaxplan.pipeline.fuse import alternating, turns
from jaxplan.pipeline.nouns import SCHEDULES, Chain, Kind, Path, Pipeline, PipelineError, Role, even_layers
from jaxplan.pipeline.picture import Slot, most_held, schedule_svg, schedule_text, timetable
from jaxplan.pipeline.reroll import rerolled

__all__ = [
    "SCHEDULES",
    "Chain",
    "Kind",
    "Path",
    "Pipeline",
    "PipelineError",
    "Role",
    "Scan",
    "Slot",
    "alternating",
    "chain_of",
    "even_layers",
    "left_out",
    "most_held",
    "pipeline_of",
    "rerolled",
    "scan_at",
    "scans",
    "schedule_svg",
    "schedule_text",
    "timetable",
    "turns",
]
