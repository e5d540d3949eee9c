"""How far hsm2dl is from the optimum of the reduced problem, which Alpa's integer program proves.

    python scripts/check_optimality.py [--meshes 8,4x2,4x4,2x2x2] [--size small,full] [--time-limit 60] [--machine v4]

Every example program on every mesh. "above reduced" compares with the integer program's solution of the folded problem where it
is proven optimal (gap at most 1e-5, ten times its tolerance), else with its lower bound; hsm2dl ends on the problem itself, where
look-alikes may differ, and so can be below. "folding" is what reducing costs: the optimum of the folded problem above that of
the problem itself, where it could be proven too; "above whole" then compares hsm2dl with the latter. Problems with more table
entries than `--entries` are listed and left out.
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
from jaxplan.problem import Problem
from jaxplan.reduce import fold
from jaxplan.search import alpa, hsm2dl
from jaxplan.search.moves import FINE_ROUNDS
from jaxplan.trace import trace

PROVEN = 1e-5


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", default="8,4x2,4x4,2x2x2")
    parser.add_argument("--size", default="small,full")
    parser.add_argument("--machine", default="v4")
    parser.add_argument("--time-limit", type=float, default=60.0)
    parser.add_argument("--entries", type=int, default=1_000_000)
    options = parser.parse_args()
    columns = f"{'variables':>9s} {'hsm2dl s':>8s} {'ILP s':>7s} {'above reduced':>13s} {'folding':>8s} {'above whole':>11s}"
    print(f"{'program':28s} {'mesh':6s} {columns}")
    above, above_whole, folded_by, left_out, times = [], [], [], [], []
    for label, program in chosen_programs(options.size.split(",")):
        graph = build_graph(trace(program.fn, program.args, {}))
        for text in options.meshes.split(","):
            shape = tuple(map(int, text.split("x")))
            mesh = AbstractMesh(shape, tuple("xyzw"[: len(shape)]))
            problem = model(graph, Numbers(graph, dict(mesh.shape), machine(options.machine, mesh))).problem
            folded, _ = fold(problem, FINE_ROUNDS)
            if entries(folded) > options.entries:
                left_out.append(f"{label} on {text} ({entries(folded):,} entries)")
                continue
            gc.collect()
            start = time.perf_counter()
            ours = hsm2dl(problem)
            ours_at = time.perf_counter()
            exact = alpa(folded, time_limit=options.time_limit, rounds=None)
            exact_at = time.perf_counter()
            proven = exact.bound is not None and exact.seconds <= exact.bound * (1 + PROVEN)
            ratio = ours.seconds / (exact.seconds if proven else exact.bound or math.nan) - 1
            above.append(ratio)
            times.append((exact_at - ours_at) / (ours_at - start))
            price = ""
            if proven and len(folded.nodes) < len(problem.nodes) and entries(problem) <= options.entries:
                whole = alpa(problem, time_limit=options.time_limit, rounds=None)
                if whole.bound is not None and whole.seconds <= whole.bound * (1 + PROVEN):
                    folded_by.append(exact.seconds / whole.seconds - 1)
                    above_whole.append(ours.seconds / whole.seconds - 1)
                    price = f"{folded_by[-1]:8.2%} {above_whole[-1]:11.3%}"
            print(
                f"{label:28s} {text:6s} {len(folded.nodes):9d} {ours_at - start:8.3f} {exact_at - ours_at:7.2f} "
                f"{ratio:13.3%}{'' if proven else ' (of bound)'} {price}",
                flush=True,
            )
    for ratios, which in ((np.array(above), "reduced"), (np.array(above_whole), "whole")):
        if len(ratios):
            mean, worst = np.maximum(ratios, 0).mean(), ratios.max()  # below the reduced optimum counts as at it
            title = f"hsm2dl above the optimum of the {which} problem, {len(ratios)} problems"
            print(f"\n{title}: mean {mean:.3%}, worst {worst:.3%}")
            for limit in (1e-6, 1e-3, 1e-2, 5e-2):
                print(f"  within {limit:.4%}: {(ratios <= limit).mean():.0%}")
    print(f"integer program's time over hsm2dl's: median {np.median(times):.0f}x, most {np.max(times):.0f}x")
    if folded_by:
        print(f"folding, {len(folded_by)} problems: mean {np.mean(folded_by):.3%}, worst {np.max(folded_by):.3%}")
    print("left out as too large:", "; ".join(left_out) or "none")


if __name__ == "__main__":
    main()
