"""Room `whatif`: one function planned many times over.

    meshes.py   all meshes of so many devices, ranked
    sweep.py    devices, mesh shapes, link speeds and sizes in one table
"""

from jaxplan.whatif.meshes import Candidate, MeshRanking, best_mesh, distinct, factorisations
from jaxplan.whatif.sweep import Point, Sweep, sweep

__all__ = ["Candidate", "MeshRanking", "Point", "Sweep", "best_mesh", "distinct", "factorisations", "sweep"]
