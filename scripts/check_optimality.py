"""How far hsm2dl is from the optimum of the reduced problem, which Alpa's integer program proves, and how much sooner it is done.

    python scripts/check_optimality.py [--meshes 8,4x2,4x4,2x2x2] [--size small,full,models] [--time-limit 60] [--machine v4]

Every example program on every mesh. "above reduced" compares with the integer program's solution of the folded problem where it
is proven optimal (gap at most 1e-5, ten times its tolerance), else with its lower bound; hsm2dl ends on the problem itself, where
look-alikes may differ, and so can be below. "folding" is what reducing costs: the optimum of the folded problem above that of
the problem itself, where it could be proven too; "above whole" then compares hsm2dl with the latter. Seconds are processor time.
At the end: the integer program's over hsm2dl's, for all problems and for those on which it takes over a second, on the folded
problem and on that with nothing folded; where it stops at its time limit, the ratio is at least that. Problems with more table
entries than `--entries` are not given to it.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from dataclasses import replace

import numpy as np
from jax.sharding import AbstractMesh

from jaxplan.cost import Numbers, model
from jaxplan.examples import Program, programs
from jaxplan.examples.decoder import FULL, decoder
from jaxplan.graph import build_graph
from jaxplan.machine import machine
from jaxplan.problem import Assignment, Problem
from jaxplan.reduce import fold
from jaxplan.search import alpa, hsm2dl
from jaxplan.search.moves import FINE_ROUNDS
from jaxplan.trace import trace

PROVEN = 1e-5
LONG, MUCH = 1.0, 100.0
"""Seconds of the integer program from which on it takes long; how many times faster is much."""


def entries(problem: Problem) -> int:
    """Table entries of all joint choices."""
    counts = [math.prod(node.options) for node in problem.nodes]
    return sum(counts) + sum(counts[edge.tail] * counts[edge.head] for edge in problem.edges)


def chosen_programs(sizes: list[str]) -> list[tuple[str, Program]]:
    """(label, program). Of the sizes "models" are the published models of `scripts/models`, which need their frameworks."""
    known = [size for size in sizes if size != "models"]
    found = [(f"{name} {size}", program) for size in known for name, program in programs(size).items()]  # type: ignore[arg-type]
    if "models" in sizes:
        from models import MODELS, model as published

        found += [(name, published(name)) for name in MODELS]
    if "full" in sizes:
        found += [(f"decoder_{form} batch 8", decoder(replace(FULL, batch=8), form)) for form in ("scan", "unrolled")]
    return found


def timed(problem: Problem, time_limit: float) -> tuple[Assignment | None, float]:
    """The integer program's assignment (None where it found none in time), and its processor seconds."""
    gc.collect()
    start = time.process_time()
    try:
        found = alpa(problem, time_limit=time_limit, rounds=None)
    except ValueError:
        found = None
    return found, time.process_time() - start


def proven(found: Assignment | None) -> bool:
    """Whether an assignment is known to be optimal."""
    return found is not None and found.bound is not None and found.seconds <= found.bound * (1 + PROVEN)


def ratios_told(times: list[tuple[float, float]]) -> str:
    """How the integer program's seconds compare with ours, (ours, its) per problem."""
    lines = []
    for least, which in ((0.0, "all"), (LONG, f"over {LONG:g} s")):
        ratios = [theirs / ours for ours, theirs in times if theirs > least]
        if ratios:
            share = f"{np.mean(np.array(ratios) >= MUCH):.0%} at least {MUCH:g}x"
            spread = f"median {np.median(ratios):.0f}x, least {np.min(ratios):.1f}x, most {np.max(ratios):.0f}x"
            lines.append(f"  {which}, {len(ratios)} problems: {spread}; {share}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", default="8,4x2,4x4,2x2x2")
    parser.add_argument("--size", default="small,full")
    parser.add_argument("--only", default="", help="programs whose label contains this")
    parser.add_argument("--machine", default="v4")
    parser.add_argument("--time-limit", type=float, default=60.0)
    parser.add_argument("--entries", type=int, default=1_000_000)
    options = parser.parse_args()
    widths = {"variables": 9, "hsm2dl s": 8, "ILP s": 7, "above reduced": 13, "whole s": 8, "folding": 8, "above whole": 11}
    columns = " ".join([f"{name:>{width}s}" for name, width in widths.items()])
    print(f"{'program':28s} {'mesh':6s} {columns}")
    above, above_whole, folded_by = [], [], []
    left_out: dict[str, list[str]] = {"folded": [], "nothing folded": []}
    times: dict[str, list[tuple[float, float]]] = {"folded": [], "nothing folded": []}
    for label, program in chosen_programs(options.size.split(",")):
        if options.only not in label:
            continue
        graph = build_graph(trace(program.fn, program.args, {}))
        for text in options.meshes.split(","):
            shape = tuple(map(int, text.split("x")))
            mesh = AbstractMesh(shape, tuple("xyzw"[: len(shape)]))
            problem = model(graph, Numbers(graph, dict(mesh.shape), machine(options.machine, mesh))).problem
            folded, _ = fold(problem, FINE_ROUNDS)
            solvable = {"folded": entries(folded), "nothing folded": entries(problem)}
            for which, count in solvable.items():
                if count > options.entries:
                    left_out[which].append(f"{label} on {text} ({count:,} entries)")
            if solvable["folded"] > options.entries:
                continue
            gc.collect()
            start = time.process_time()
            ours = hsm2dl(problem)
            took = time.process_time() - start
            exact, exact_took = timed(folded, options.time_limit)
            times["folded"].append((took, exact_took))
            ratio = math.nan
            if exact is not None:
                ratio = ours.seconds / (exact.seconds if proven(exact) else exact.bound or math.nan) - 1
                above.append(ratio)
            price = ""
            if solvable["nothing folded"] <= options.entries:
                apart = len(folded.nodes) < len(problem.nodes)
                whole, whole_took = timed(problem, options.time_limit) if apart else (exact, exact_took)
                times["nothing folded"].append((took, whole_took))
                price = f" {whole_took:8.2f}"
                if exact is not None and whole is not None and apart and proven(exact) and proven(whole):
                    folded_by.append(exact.seconds / whole.seconds - 1)
                    above_whole.append(ours.seconds / whole.seconds - 1)
                    price += f" {folded_by[-1]:8.2%} {above_whole[-1]:11.3%}"
            print(
                f"{label:28s} {text:6s} {len(folded.nodes):9d} {took:8.3f} {exact_took:7.2f} "
                f"{ratio:13.3%}{price}{'' if proven(exact) else ' (above its bound: not proven)'}",
                flush=True,
            )
    for ratios, which in ((np.array(above), "reduced"), (np.array(above_whole), "whole")):
        if len(ratios):
            mean, worst = np.maximum(ratios, 0).mean(), ratios.max()  # below the reduced optimum counts as at it
            title = f"hsm2dl above the optimum of the {which} problem, {len(ratios)} problems"
            print(f"\n{title}: mean {mean:.3%}, worst {worst:.3%}")
            for limit in (1e-6, 1e-3, 1e-2, 5e-2):
                print(f"  within {limit:.4%}: {(ratios <= limit).mean():.0%}")
    if folded_by:
        print(f"folding, {len(folded_by)} problems: mean {np.mean(folded_by):.3%}, worst {np.max(folded_by):.3%}")
    for which, told in times.items():
        print(f"the integer program's time over hsm2dl's, {which}:\n{ratios_told(told)}")
        print(f"  not given to it: {'; '.join(left_out[which]) or 'none'}")


if __name__ == "__main__":
    main()
