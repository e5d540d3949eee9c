"""Room `cost`: rule + choice + mesh -> BSP terms; the only home of each formula. Knows no primitive by name."""

from jaxplan.cost.build import Modelled, Reading, model
from jaxplan.cost.exchange import Step, reshard_steps
from jaxplan.cost.memory import Buffer, Memory, byte_shares, hidden_work, memory, running_order
from jaxplan.cost.numbers import Numbers
from jaxplan.cost.price import Exchange, Option, cluster_exchanges, terminal_layout, write_layout
from jaxplan.cost.prices import BytePrices
from jaxplan.cost.stages import Stages, Staging, stage_graph
from jaxplan.cost.symbols import symbolic_cost, symbolic_peak
from jaxplan.cost.ties import frugal

__all__ = [
    "Buffer",
    "BytePrices",
    "Exchange",
    "Memory",
    "Modelled",
    "Numbers",
    "Option",
    "Reading",
    "Stages",
    "Staging",
    "Step",
    "byte_shares",
    "cluster_exchanges",
    "frugal",
    "hidden_work",
    "memory",
    "model",
    "reshard_steps",
    "running_order",
    "stage_graph",
    "symbolic_cost",
    "symbolic_peak",
    "terminal_layout",
    "write_layout",
]
