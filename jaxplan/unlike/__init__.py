"""Room `unlike`: layers that differ from one another, in stages on sub-meshes of their own."""

from jaxplan.unlike.analysis import micro_of
from jaxplan.unlike.choose import Stagewise
from jaxplan.unlike.flat import flat
from jaxplan.unlike.nouns import Micro, Part, Parts, UnlikePipeline
from jaxplan.unlike.parts import parts_of
from jaxplan.unlike.plan import OnStages, StagedFunction, on_stages
from jaxplan.unlike.programs import run_plain
from jaxplan.unlike.run import stage_mesh
from jaxplan.unlike.stage import stage_program
from jaxplan.unlike.wanted import Wanted, insisted, unasked

__all__ = [
    "Micro",
    "OnStages",
    "Part",
    "Parts",
    "StagedFunction",
    "Stagewise",
    "UnlikePipeline",
    "Wanted",
    "flat",
    "insisted",
    "micro_of",
    "on_stages",
    "parts_of",
    "run_plain",
    "stage_mesh",
    "stage_program",
    "unasked",
]
