"""How search time and memory grow: with operators, mesh axes, devices and the width of the graph; and two large train steps.

    python scripts/bench_search.py [--sections operators,axes,devices,width,models] [--plot search.svg] [--size published]
        [--operators 100,1000,10000,100000] [--layers 2,8,32,128,512,700] [--repeat 1] [--search hsm2dl]

Seconds are processor time of this process, the least of `--repeat`; memory is what the search allocates at its peak, as
`tracemalloc` counts it in a run of its own (problems of up to `--memory-up-to` operators). A slope is that of the least-squares
line through the logarithms: 1 is linear. The random problems (`random_layers.py`) have nothing that folds; the unrolled models
have. Models are planned from shapes alone, on
an `AbstractMesh`. `--plot` needs matplotlib (`pip install -e '.[plots]'`); without it the curves are drawn in the terminal.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import time
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from jax.sharding import AbstractMesh
from models.unrolled import gpt3_175b, llama_8b
from random_layers import layered

from jaxplan import make_plan
from jaxplan.cost import Numbers, model
from jaxplan.examples.decoder import FULL, decoder
from jaxplan.graph import build_graph
from jaxplan.machine import machine
from jaxplan.problem import Problem
from jaxplan.report import show_bytes
from jaxplan.search import search
from jaxplan.trace import trace

SECTIONS = ("operators", "axes", "devices", "width", "models")
PUBLISHED = 46.8
"""Seconds of trace, build and solve for Llama 8B by the integer program of PyTorch's autoparallel on its authors' machine:
github.com/meta-pytorch/autoparallel/pull/521, table in the first comment (13.4 + 15.5 + 17.5)."""
AXES = ((16,), (4, 4), (4, 2, 2), (2, 2, 2, 2))
DEVICES = ((4, 2), (8, 8), (16, 16), (64, 64), (256, 256))


@dataclass(frozen=True)
class Point:
    """One search: what was varied, the operators of the problem, processor seconds, bytes at the peak."""

    value: float
    operators: int
    seconds: float
    nbytes: int


@dataclass(frozen=True)
class Curve:
    """Points in order of what is varied, `over`."""

    name: str
    over: str
    points: tuple[Point, ...]

    def slope(self, what: str = "seconds") -> float:
        """Of a line through (log value, log `what`); NaN for fewer than two values."""
        known = [(point.value, getattr(point, what)) for point in self.points if getattr(point, what) > 0]
        if len({value for value, _ in known}) < 2:
            return math.nan
        return float(np.polyfit(*np.log(np.array(known)).T, 1)[0])


def measured(value: float, operators: int, problem: Problem, options: argparse.Namespace) -> Point:
    """Search a problem `--repeat` times for the clock, and once more for memory (0 where that was not asked for)."""
    took = []
    for _ in range(options.repeat):
        gc.collect()
        gc.disable()
        start = time.process_time()
        search(problem, options.search)
        took.append(time.process_time() - start)
        gc.enable()
    if operators > options.memory_up_to:
        return Point(value, operators, min(took), 0)
    tracemalloc.start()
    search(problem, options.search)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return Point(value, operators, min(took), peak)


def curve(name: str, over: str, cases: Iterable[tuple[float, int, Problem]], options: argparse.Namespace) -> Curve:
    """Measure and print as it goes."""
    print(f"\n{name}\n{over:>12s} {'operators':>10s} {'search s':>9s} {'us/operator':>12s} {'memory':>10s} {'B/operator':>11s}")
    points = []
    for value, operators, problem in cases:
        point = measured(value, operators, problem, options)
        points.append(point)
        memory = f"{show_bytes(point.nbytes):>10s} {point.nbytes / operators:11,.0f}" if point.nbytes else "not measured"
        each = f"{1e6 * point.seconds / operators:12.1f} {memory}"
        print(f"{value:12,.0f} {operators:10,d} {point.seconds:9.3f} {each}", flush=True)
    found = Curve(name, over, tuple(points))
    print(f"slope on log-log axes: time {found.slope():.2f}, memory {found.slope('nbytes'):.2f}")
    return found


def unrolled(layers: Iterable[int], shape: tuple[int, ...], size: str) -> Iterable[tuple[int, int, Problem]]:
    """(operators, operators, problem) of the decoder's train step at depth."""
    config = FULL if size == "published" else replace(FULL, width=64, heads=4, mlp_width=128, vocabulary=256, sequence=16)
    for depth in layers:
        program = decoder(replace(config, layers=depth), "unrolled")
        graph = build_graph(trace(program.fn, program.args, {}))
        mesh = AbstractMesh(shape, tuple("xyzw"[: len(shape)]))
        problem = model(graph, Numbers(graph, dict(mesh.shape), machine("v4", mesh))).problem
        yield len(graph.operators), len(graph.operators), problem


def operator_curves(options: argparse.Namespace) -> list[Curve]:
    """Against the number of operators: 10^2 to 10^5."""
    run = partial(curve, options=options)
    problems = ((n, layered(n, options.width, (4, 4))) for n in options.operators)
    cases = ((len(problem.nodes), len(problem.nodes), problem) for _, problem in problems)
    return [
        run(f"random layered problems, {options.width} wide, on 4x4: nothing folds", "operators", cases),
        run("unrolled decoders, on 4x4: layers fold", "operators", unrolled(options.layers, (4, 4), options.size)),
    ]


def other_curves(options: argparse.Namespace, section: str) -> list[Curve]:
    """Against axes of a mesh of 16 devices, devices on two axes, or the width of the graph."""
    run = partial(curve, options=options)
    count, depth = options.fixed, options.depth
    if section == "width":
        problems = ((width, layered(count, width, (4, 4))) for width in options.widths)
        return [run("random layered problems of one size, on 4x4", "width", ((w, len(p.nodes), p) for w, p in problems))]
    shapes = AXES if section == "axes" else DEVICES
    value: Callable[[Sequence[int]], int] = len if section == "axes" else math.prod
    fixed = ((value(s), layered(count, options.width, s)) for s in shapes)
    deep = ((value(s), *case[1:]) for s in shapes for case in unrolled([depth], s, options.size))
    on = "16 devices" if section == "axes" else "two axes"
    return [
        run(f"random layered problems on {on}", section, ((v, len(p.nodes), p) for v, p in fixed)),
        run(f"an unrolled decoder of {depth} layers on {on}", section, deep),
    ]


def whole_models(options: argparse.Namespace) -> None:
    """Tracing and planning of train steps unrolled, on 16x16."""
    mesh = AbstractMesh((16, 16), ("x", "y"))
    print(f"\n{'on 16x16, v5p':28s} {'operators':>10s} {'variables':>10s} {'trace s':>8s} {'plan s':>8s} {'both':>10s}")
    depths = (32, 96) if options.size == "published" else (2, 3)
    for make, layers in zip((llama_8b, gpt3_175b), depths, strict=True):
        program = make(options.size, layers)
        jax.clear_caches()
        start = time.process_time()
        trace(program.fn, program.args, {})
        traced = time.process_time() - start
        jax.clear_caches()
        start, wall = time.process_time(), time.perf_counter()
        plan = make_plan(program.fn, *program.args, mesh=mesh, machine="v5p", memory_budget=math.inf, search=options.search)
        planned, wall = time.process_time() - start - traced, time.perf_counter() - wall
        graph = plan.modelled.graph
        row = f"{len(graph.operators):10,d} {len(plan.modelled.problem.nodes):10,d} {traced:8.2f} {planned:8.2f} {wall:10.2f}"
        print(f"{make.__name__ + f', {layers} layers':28s} {row}", flush=True)
    print(
        f"PyTorch's autoparallel: {PUBLISHED} s by the clock for trace, build and solve of Llama 8B, as its authors published;\n"
        "another machine, another framework's operators and another cost model: an order of magnitude, no race.\n"
        "Tracing and planning are processor time; `both` is the whole call by the clock."
    )


def drawn(curves: Sequence[Curve], path: str) -> str:
    """Write a plot; where matplotlib is missing, or without a path, draw in text. Returns what to print."""
    if path:
        try:
            import matplotlib
        except ImportError:
            return "matplotlib is not installed (pip install -e '.[plots]'); in text:\n" + "\n".join(map(text_plot, curves))
        matplotlib.use("Agg")
        from matplotlib import pyplot

        overs = list(dict.fromkeys(c.over for c in curves))
        figure, places = pyplot.subplots(1, len(overs), figsize=(4.5 * len(overs), 4), squeeze=False)
        for place, over in zip(places[0], overs, strict=True):
            for one in (c for c in curves if c.over == over):
                values, seconds = [p.value for p in one.points], [p.seconds for p in one.points]
                place.loglog(values, seconds, marker="o", label=f"{one.name.split(',')[0].split(' on ')[0]} ({one.slope():.2f})")
            place.set_xlabel(over)
            place.set_ylabel("search, processor seconds")
            place.legend(fontsize=7)
            place.grid(True, which="both", alpha=0.3)
        figure.tight_layout()
        figure.savefig(path)
        return f"plot: {path}"
    return "\n".join(map(text_plot, curves))


def text_plot(one: Curve, rows: int = 10, columns: int = 60) -> str:
    """Points on log-log axes, as text."""
    x, y = (np.log10([max(getattr(p, what), 1e-6) for p in one.points]) for what in ("value", "seconds"))
    across = np.zeros(len(x)) if np.ptp(x) == 0 else (x - x.min()) / np.ptp(x)
    up = np.zeros(len(y)) if np.ptp(y) == 0 else (y - y.min()) / np.ptp(y)
    grid = [[" "] * columns for _ in range(rows)]
    for a, b in zip(across, up, strict=True):
        grid[rows - 1 - round(b * (rows - 1))][round(a * (columns - 1))] = "*"
    lines = [f"{one.name}: seconds, {10 ** y.min():.2g} to {10 ** y.max():.2g}", *["|" + "".join(row) for row in grid]]
    return "\n".join([*lines, "+" + "-" * columns, f"{one.over}, {10 ** x.min():.3g} to {10 ** x.max():.3g}", ""])


def numbers(text: str) -> list[int]:
    """ "1,2,3" as integers."""
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> list[Curve]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--operators", type=numbers, default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--layers", type=numbers, default=[1, 3, 12, 48, 192, 264])
    parser.add_argument("--width", type=int, default=4, help="of the random problems")
    parser.add_argument("--widths", type=numbers, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--fixed", type=int, default=2000, help="operators of random problems where something else is varied")
    parser.add_argument("--depth", type=int, default=12, help="layers of the decoder where something else is varied")
    parser.add_argument("--size", choices=("tiny", "published"), default="published")
    parser.add_argument("--search", default="hsm2dl")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--memory-up-to", type=int, default=20_000, metavar="OPERATORS")
    parser.add_argument("--plot", default="", metavar="FILE", help="where the plot goes; without it, text")
    options = parser.parse_args(arguments)
    sections = options.sections.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"no section is called {sorted(unknown)[0]!r}; there are {', '.join(SECTIONS)}")
    curves = operator_curves(options) if "operators" in sections else []
    for section in ("axes", "devices", "width"):
        curves += other_curves(options, section) if section in sections else []
    if curves:
        print("\n" + drawn(curves, options.plot))
    if "models" in sections:
        whole_models(options)
    return curves


if __name__ == "__main__":
    main()
