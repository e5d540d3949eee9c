"""What a point of a sweep costs beside tracing: `python scripts/bench_resize.py`. Processor time, in milliseconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from jax.sharding import AbstractMesh

import jaxplan
from jaxplan.examples import programs
from jaxplan.resize import resize

SPEEDS = (1.1, 1.3, 1.7, 2.5, 4.0)
MESHES = ((2, 4), (8, 4), (4, 8), (8, 2), (16, 4))
ROWS = (192, 256, 320, 384, 448)


def taken(call: Callable[[], object]) -> float:
    """Processor milliseconds of one call."""
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def point(plan: jaxplan.Plan, **changes: object) -> float:
    """Milliseconds of one point with all that a table of a sweep shows of it."""

    def derive() -> None:
        found = plan.replan(**changes)
        assert found.seconds > 0 and found.peak_bytes > 0 and sum(found.wire_bytes.values()) >= 0

    return taken(derive)


def report(name: str, plan: jaxplan.Plan) -> None:
    """Print what one plan's points take, in the median."""
    machine = plan.modelled.numbers.machine
    state = {position for _, position in plan.modelled.graph.ties}
    data = next(tensor for position, tensor in enumerate(plan.modelled.graph.inputs) if position not in state)
    batch = plan.names.dimension(data)[0]
    point(plan, machine=replace(machine, inner=machine.inner.slower(1.05)))
    point(plan, sizes={batch: 128})
    links = [point(plan, machine=replace(machine, inner=machine.inner.slower(factor))) for factor in SPEEDS]
    meshes = [point(plan, mesh=AbstractMesh(shape, ("x", "y"))) for shape in MESHES]
    sizes = [point(plan, sizes={batch: rows}) for rows in ROWS]
    graph = [taken(lambda rows=rows: resize(plan.origin, {batch: rows})) for rows in ROWS]
    link, mesh, size, alone = map(statistics.median, (links, meshes, sizes, graph))
    traced = 1e3 * plan.stages["trace"]
    print(
        f"{name}: traced in {traced:.0f} ms; a point at another link speed {link:.0f}, on another mesh {mesh:.0f}, "
        f"at another size {size:.0f}, of which the graph {alone:.0f}"
    )


def main() -> None:
    """One line per program."""
    mesh = AbstractMesh((4, 4), ("x", "y"))
    full, small = programs("full"), programs("small")
    chosen = {f"{name} (full)": full[name] for name in ("decoder_scan", "decoder_unrolled")}
    chosen |= {f"{name} (small)": small[name] for name in ("mlp_sgd", "decoder_scan")}
    for name, program in chosen.items():
        report(name, jaxplan.make_plan(program.fn, *program.args, mesh=mesh, machine="v4"))


if __name__ == "__main__":
    main()
