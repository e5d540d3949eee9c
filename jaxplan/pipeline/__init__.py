"""Room `pipeline`: a mesh axis along the layers. Which scans can run in stages, how, and what it looks like."""

from jaxplan.pipeline.nouns import SCHEDULES, Chain, Kind, Path, Pipeline, Role, even_layers

__all__ = ["SCHEDULES", "Chain", "Kind", "Path", "Pipeline", "Role", "even_layers"]
