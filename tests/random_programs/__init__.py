"""Random well-typed JAX programs, small enough to compile by the thousand.

    values.py      Type, Var, Step, Program; `build` makes a function and its arguments of one, `shrink` makes it small
    scope.py       a program in the making: `draw_program` composes one from a `random.Random`
    elementwise.py, shapes.py, reductions.py, contractions.py, control.py       the operations, each with what draws it

Every value carries what is known about its numbers (`Type`). Inputs are small multiples of 1/8, so that sums and products of
them are exact in any order until their digits no longer fit; argmax, comparisons and the like read only such values, and the
results of everything else stay bounded. A planned program may therefore differ from the unplanned one by rounding, and by
nothing more.
"""

from random_programs import contractions, control, elementwise, reductions, shapes
from random_programs.scope import draw_program
from random_programs.values import Program, Type, build, shrink

__all__ = ["Program", "Type", "build", "contractions", "control", "draw_program", "elementwise", "reductions", "shapes", "shrink"]
