"""Room `reduce`: a problem becomes smaller, and each step says how to undo itself. Knows nothing of JAX.

`fold` merges look-alikes, whatever the depth of a model. The other steps work on `Tables`, prices written out for options that
are still open: `dominance` strikes out options that are never better, `followers` joins a variable to the neighbour that
implies it, `eliminate` removes leaves and chains. All but `fold` keep the optimum.
"""

from jaxplan.reduce.folding import fold
from jaxplan.reduce.steps import dominance, eliminate, followers
from jaxplan.reduce.tables import Pricer, Tables, Undo, restrict, tabulate

__all__ = [
    "Pricer", "Tables", "Undo", "dominance", "eliminate", "fold", "followers", "restrict", "tabulate",
]  # fmt: skip
