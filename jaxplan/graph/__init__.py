"""Room `graph`: a `Traced` program becomes a `Graph` of clusters and tensors. Knows nothing of meshes or speeds."""

from jaxplan.graph.build import build_graph
from jaxplan.graph.nouns import Cluster, Combine, Graph, Halo, Handed, Operator, Sent, Tensor, Terminal, Work
from jaxplan.graph.refit import refit

__all__ = [
    "Cluster", "Combine", "Graph", "Halo", "Handed", "Operator", "Sent", "Tensor", "Terminal", "Work", "build_graph", "refit",
]  # fmt: skip
