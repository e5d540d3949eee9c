"""Plan every program of the repository from its shapes: what jaxplan knows of it, and how long that takes beside tracing.

    python scripts/coverage.py [--only NAME ...] [--mesh 4,4] [--machine v5p] [--search hsm2dl]

Examples at full size and models at published ones (`scripts/models`; needs `pip install -e '.[frameworks]'`). Operators are
counted as the program's equations after inlining, a loop's body once: `known` by a rule, `free`, `unknown`. Planning is all
that follows tracing. Exit status 1 if a plan cannot be made or a primitive is unknown.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jax.sharding import AbstractMesh
from models import MODELS, model

import jaxplan
from jaxplan import Plan
from jaxplan.examples import Program, programs

Class = Literal["known", "free", "unknown"]
CLASSES: tuple[Class, ...] = ("known", "free", "unknown")


@dataclass(frozen=True)
class Covered:
    """One program. `operators`: how many, by class and primitive. `plan`: None where `error` says why there is none."""

    name: str
    operators: Mapping[tuple[Class, str], int]
    plan: Plan | None
    error: str = ""

    @property
    def unknown(self) -> list[str]:
        """Names of the primitives without a rule."""
        return sorted(primitive for kind, primitive in self.operators if kind == "unknown")

    @property
    def passes(self) -> bool:
        """A plan was made and every primitive is understood."""
        return self.plan is not None and not self.unknown

    def count(self, kind: Class) -> int:
        """Operators of one class."""
        return sum(number for (of, _), number in self.operators.items() if of == kind)


def by_class(plan: Plan) -> Counter[tuple[Class, str]]:
    """How many operators a plan's program has, by class and primitive; inputs and loop boundaries are not counted."""
    found: Counter[tuple[Class, str]] = Counter()
    for operator in plan.modelled.graph.operators:
        if operator.equation is not None:
            kind: Class = "free" if operator.rule.free else "known" if operator.rule.known else "unknown"
            found[kind, operator.equation.primitive.name] += 1
    return found


def cover(name: str, make: Callable[[], Program], plan_of: Callable[[Program], Plan]) -> Covered:
    """Make a program and plan it; whatever goes wrong is reported, not raised."""
    try:
        plan = plan_of(make())
    except Exception as error:  # every kind of failure is what this script is there to find
        traceback.print_exc()
        return Covered(name, {}, None, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
    return Covered(name, by_class(plan), plan)


def everything() -> dict[str, Callable[[], Program]]:
    """All programs of the repository by name, not yet made."""
    examples = programs("full")
    return {name: partial(examples.__getitem__, name) for name in examples} | {name: partial(model, name) for name in MODELS}


def row(found: Covered) -> str:
    """One line of the table."""
    if found.plan is None:
        return f"{found.name:24s} FAILED  {found.error}"
    stages = found.plan.stages
    planning = sum(seconds for stage, seconds in stages.items() if stage != "trace")
    counts = " ".join(f"{found.count(kind):8d}" for kind in CLASSES)
    return f"{found.name:24s} {counts} {stages['trace']:8.2f} {planning:8.2f} {planning / stages['trace']:6.2f}  made"


def summary(rows: Sequence[Covered]) -> list[str]:
    """Primitives by class over all programs, then plans made and failed."""
    met: dict[Class, Counter[str]] = {kind: Counter() for kind in CLASSES}
    for found in rows:
        for (kind, primitive), number in found.operators.items():
            met[kind][primitive] += number
    lines = []
    for kind, primitives in met.items():
        names = ", ".join(f"{name} {number}" for name, number in primitives.most_common())
        lines.append(f"{kind}: {len(primitives)} primitives, {primitives.total()} operators" + (f": {names}" if names else ""))
    failed = [found.name for found in rows if found.plan is None]
    lines.append(f"plans: {len(rows) - len(failed)} made, {len(failed)} failed" + (f": {', '.join(failed)}" if failed else ""))
    for found in rows:
        lines += [f"unknown in {found.name}: {name}" for name in found.unknown]
    return lines


def run(makers: Iterable[tuple[str, Callable[[], Program]]], plan_of: Callable[[Program], Plan]) -> int:
    """Print the table and the summary; 1 if any program does not pass."""
    print(f"{'program':24s} " + " ".join(f"{kind:>8s}" for kind in CLASSES) + " trace s   plan s  ratio  plan")
    rows = []
    for name, make in makers:
        rows.append(cover(name, make, plan_of))
        print(row(rows[-1]), flush=True)
    print("", *summary(rows), sep="\n")
    return 0 if all(found.passes for found in rows) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    makers = everything()
    parser.add_argument("--only", nargs="+", default=list(makers), choices=list(makers), metavar="NAME")
    parser.add_argument("--mesh", default="4,4", help="sizes of the axes (default: 4,4)")
    parser.add_argument("--machine", default="v5p", help="a preset's name (default: v5p)")
    parser.add_argument("--search", default="hsm2dl", help="a search's name (default: hsm2dl)")
    given = parser.parse_args(argv)
    sizes = tuple(map(int, given.mesh.split(",")))
    mesh = AbstractMesh(sizes, tuple("xyzw"[: len(sizes)]))
    setting = {"mesh": mesh, "machine": given.machine, "search": given.search, "memory_budget": math.inf}
    return run([(name, makers[name]) for name in given.only], lambda p: jaxplan.make_plan(p.fn, *p.args, **setting))


if __name__ == "__main__":
    sys.exit(main())
