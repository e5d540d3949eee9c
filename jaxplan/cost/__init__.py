"""Room `cost`: rule + choice + mesh -> BSP terms; the only home of each formula. Knows no primitive by name."""

from jaxplan.cost.build import Modelled, Reading, model
from jaxplan.cost.ceiling import ceiling
from jaxplan.cost.exchange import Step, reshard_steps
from jaxplan.cost.hidden import gathered_state, hidden_work
from jaxplan.cost.lifetimes import puts_off, waits
from jaxplan.cost.memory import Buffer, Memory, facts_of, local_sizes, memory, running_order
from jaxplan.cost.numbers import Numbers
from jaxplan.cost.pieces import Piece, compiled_piece_bytes, piece_bytes
from jaxplan.cost.price import Exchange, Option, cluster_exchanges, terminal_layout, write_layout
from jaxplan.cost.stages import Stages, Staging, stage_graph
from jaxplan.cost.symbols import symbolic_cost, symbolic_peak
from jaxplan.cost.ties import frugal
from jaxplan.cost.usages import certainly_within, within, without_gathers

__all__ = [
    "Buffer",
    "Exchange",
    "Memory",
    "Modelled",
    "Numbers",
    "Option",
    "Piece",
    "Reading",
    "Stages",
    "Staging",
    "Step",
    "ceiling",
    "certainly_within",
    "cluster_exchanges",
    "compiled_piece_bytes",
    "facts_of",
    "frugal",
    "gathered_state",
    "hidden_work",
    "local_sizes",
    "memory",
    "model",
    "piece_bytes",
    "puts_off",
    "reshard_steps",
    "running_order",
    "stage_graph",
    "symbolic_cost",
    "symbolic_peak",
    "terminal_layout",
    "waits",
    "within",
    "without_gathers",
    "write_layout",
]
