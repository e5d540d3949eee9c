"""Room `pipeline`: a mesh axis along the layers. Which scans can run in stages, how, and what it looks like."""

from jaxplan.pipeline.analysis import Scan, chain_of, pipeline_of, scan_at, scans
from jaxplan.pipeline.nouns import SCHEDULES, Chain, Kind, Path, Pipeline, PipelineError, Role, even_layers

__all__ = [
    "SCHEDULES",
    "Chain",
    "Kind",
    "Path",
    "Pipeline",
    "PipelineError",
    "Role",
    "Scan",
    "chain_of",
    "even_layers",
    "pipeline_of",
    "scan_at",
    "scans",
]
