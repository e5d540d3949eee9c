"""What a plan at other sizes costs beside tracing: `python scripts/bench_resize.py`. Processor time, in seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

from jax.sharding import AbstractMesh

import jaxplan
from jaxplan.examples import programs
from jaxplan.resize import resize


def taken(call: Callable[[], object]) -> float:
    """Processor seconds of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def report(name: str, plan: jaxplan.Plan) -> None:
    """Print what one plan's points take."""
    batch = plan.names.dimension(plan.modelled.graph.inputs[plan.traced.in_paths.index("batch/tokens")])[0]
    first = taken(lambda: plan.replan(sizes={batch: 128}))
    graph = min(taken(lambda n=n: resize(plan.origin, {batch: n})) for n in (192, 256, 320))
    point = min(taken(lambda n=n: plan.replan(sizes={batch: n})) for n in (384, 448, 512))
    traced = plan.stages["trace"]
    print(f"{name}: traced in {traced:.2f}, first point {first:.2f}, point {point:.2f}, of which the graph {graph:.2f}")


def main() -> None:
    """One line per form of the full-size decoder."""
    mesh = AbstractMesh((4, 4), ("x", "y"))
    for name in ("decoder_scan", "decoder_unrolled"):
        program = programs("full")[name]
        report(name, jaxplan.make_plan(program.fn, *program.args, mesh=mesh, machine="v4"))


if __name__ == "__main__":
    main()
