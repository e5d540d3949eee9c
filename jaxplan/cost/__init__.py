"""Room `cost`: rule + choice + mesh -> BSP terms; the only home of each formula. Knows no primitive by name."""

from jaxplan.cost.build import Modelled, Reading, model
from jaxplan.cost.exchange import Step, reshard_steps
from jaxplan.cost.memory import peak_bytes
from jaxplan.cost.numbers import Numbers
from jaxplan.cost.price import Exchange, Option, cluster_exchanges, terminal_layout, write_layout
from jaxplan.cost.symbols import symbolic_cost
from jaxplan.cost.ties import frugal

__all__ = [
    "Exchange",
    "Modelled",
    "Numbers",
    "Option",
    "Reading",
    "Step",
    "cluster_exchanges",
    "frugal",
    "model",
    "peak_bytes",
    "reshard_steps",
    "symbolic_cost",
    "terminal_layout",
    "write_layout",
]
