"""Every search on every example program and mesh, beside the best lower bound: a Markdown table, and a summary of it.

    python scripts/compare_searches.py [--meshes 8,4x2,4x4] [--size small,full,models] [--only moe] [--searches hsm2dl,optcnn]
        [--search my.module:solve] [--machine v4] [--time-limit 20] [--program-seconds 0]

A cell is the modelled seconds of what a search found above the bound, then the seconds it took. The bound holds for the problem
with nothing folded, and is proven from the cheapest assignment that any search found; `best` is how far that one may be from
the optimum. `--search` adds your own callable `Problem -> Assignment`. `--time-limit` is the integer program's;
`--program-seconds` is what it may spend on tightening a bound.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import time
from collections.abc import Callable

import numpy as np
from check_optimality import chosen_programs
from jax.sharding import AbstractMesh

from jaxplan.cost import Numbers, model
from jaxplan.graph import build_graph
from jaxplan.machine import machine
from jaxplan.problem import Assignment, Problem
from jaxplan.report import show_seconds
from jaxplan.search import SEARCHES, alpa, certify, search
from jaxplan.trace import trace

Search = Callable[[Problem], Assignment]


def named(text: str) -> Search:
    """The callable that "package.module:function" names. Raises SystemExit if there is none."""
    module, _, name = text.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SystemExit(f"--search {text}: {error}; write package.module:function") from error
    if not callable(found):
        raise SystemExit(f"--search {text}: that is a {type(found).__name__}, not a callable Problem -> Assignment")
    return found


def chosen_searches(names: list[str], own: list[str], time_limit: float) -> dict[str, Search]:
    """{column: search}. Raises SystemExit for an unknown name."""
    unknown = [name for name in names if name not in SEARCHES]
    if unknown:
        raise SystemExit(f"no search is called {unknown[0]!r}; there are {', '.join(SEARCHES)}")
    found = {name: SEARCHES[name] for name in names}
    if "alpa" in found:
        found["alpa"] = functools.partial(alpa, time_limit=time_limit)
        functools.update_wrapper(found["alpa"], alpa)
    return {**found, **{text: named(text) for text in own}}


def row(line: list[str]) -> None:
    """One line of a Markdown table."""
    print("| " + " | ".join(line) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", default="8,4x2,4x4")
    parser.add_argument("--size", default="small,full")
    parser.add_argument("--only", default="", help="programs whose label contains this")
    parser.add_argument("--searches", default=",".join(SEARCHES))
    parser.add_argument("--search", action="append", default=[], metavar="MODULE:FUNCTION", help="a search of your own")
    parser.add_argument("--machine", default="v4")
    parser.add_argument("--time-limit", type=float, default=20.0)
    parser.add_argument("--program-seconds", type=float, default=0.0)
    options = parser.parse_args()
    searches = chosen_searches([name for name in options.searches.split(",") if name], options.search, options.time_limit)
    above: dict[str, list[float]] = {name: [] for name in searches}
    took: dict[str, list[float]] = {name: [] for name in searches}
    refused: dict[str, dict[str, None]] = {name: {} for name in searches}
    gaps, certifying, proved = [], [], []
    row(["program", "mesh", "bound", "best", "certified in", *searches])
    row(["---", "---", *["---:"] * (3 + len(searches))])
    for label, program in chosen_programs(options.size.split(",")):
        if options.only not in label:
            continue
        graph = build_graph(trace(program.fn, program.args, {}))
        for text in options.meshes.split(","):
            shape = tuple(map(int, text.split("x")))
            mesh = AbstractMesh(shape, tuple("xyzw"[: len(shape)]))
            problem = model(graph, Numbers(graph, dict(mesh.shape), machine(options.machine, mesh))).problem
            found: dict[str, Assignment] = {}
            for name, method in searches.items():
                gc.collect()
                start = time.perf_counter()
                try:
                    found[name] = search(problem, method)
                except ValueError as error:
                    refused[name][str(error)] = None
                    continue
                took[name].append(time.perf_counter() - start)
            if not found:
                continue
            start = time.perf_counter()
            cheapest = min(found.values(), key=lambda assignment: assignment.seconds)
            proven = certify(problem, cheapest, program_seconds=options.program_seconds)
            certifying.append(time.perf_counter() - start)
            assert proven.bound is not None
            bound = max([proven.bound, *[a.bound for a in found.values() if a.bound is not None]])
            gaps.append(proven.seconds / bound - 1)
            proved.append(f"{label} on {text}")
            cells = []
            for name in searches:
                if name in found:
                    above[name].append(found[name].seconds / bound - 1)
                    cells.append(f"{above[name][-1]:.2%}, {took[name][-1]:.2f} s")
                else:
                    cells.append("refused")
            row([label, text, show_seconds(bound), f"{gaps[-1]:.3%}", f"{certifying[-1]:.2f} s", *cells])
    print()
    row(["search", "problems", "mean above the bound", "worst", "within 0.1%", "within 1%", "seconds: median", "most"])
    row(["---", *["---:"] * 7])
    for name in searches:
        if above[name]:
            ratios = np.array(above[name])
            shares = [f"{(ratios <= limit).mean():.0%}" for limit in (1e-3, 1e-2)]
            times = [f"{np.median(took[name]):.2f}", f"{np.max(took[name]):.2f}"]
            row([name, str(len(ratios)), f"{ratios.mean():.2%}", f"{ratios.max():.2%}", *shares, *times])
    if gaps:
        worst, shares = int(np.argmax(gaps)), [f"{np.mean(np.array(gaps) <= limit):.0%}" for limit in (1e-3, 1e-2)]
        print(f"\nOf {len(gaps)} problems the cheapest known is at most {gaps[worst]:.3%} above the optimum ({proved[worst]}),")
        print(f"in the mean {np.mean(gaps):.3%}, within 0.1% on {shares[0]} and within 1% on {shares[1]};")
        print(f"proving it took {np.median(certifying):.2f} s in the median and {np.max(certifying):.2f} s at most.")
    for name, reasons in refused.items():
        for reason in list(reasons)[:3]:
            print(f"\n{name}: {reason}")


if __name__ == "__main__":
    main()
