"""`jaxplan solve` on every problem file of a folder: cost, proven gap, ratio to known best costs, seconds.

    python scripts/bench_iopddl.py DIRECTORY [--seeds 5] [--share 0.1] [--results contest_results.json] [--time-limit 60]
        [--workers N] [--processor] [--jobs 1] [--without-numba] [--each]

`--results`: JSON {last letters of the file's name: {"timeout_s": seconds, "contest_costs_best_six": [costs]}}. The time limit of
an instance is `--share` of its timeout there, or `--time-limit` without. The solver sees neither. `--workers`: threads that
search, by default one per core. `--processor`: limits and seconds are each worker's own, without what it waited for a core: for
machines that do other things too. That is its processor time from the start of the process, with imports, reading and reducing,
and what it waited for other workers and for the interpreter's lock; so W workers have up to W times the limit of processor time.
Where the system does not tell what a thread waited for (Linux does), it is processor time alone. Every answer is evaluated
again here, from the file's JSON alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESERVE = 0.5
"""Seconds of a limit in processor time that are left for writing the answer down, as the command leaves them."""


def evaluate(problem: dict[str, Any], strategies: list[int]) -> float:
    """The cost of a feasible answer. Raises ValueError if it is none."""
    nodes, edges = problem["nodes"], problem["edges"]
    if [not 0 <= s < len(c) for s, c in zip(strategies, nodes["costs"], strict=True)].count(True):
        raise ValueError("a strategy that does not exist")
    cost = sum(c[s] for c, s in zip(nodes["costs"], strategies))
    for (tail, head), table in zip(edges["nodes"], edges["costs"]):
        cost += table[strategies[tail] * len(nodes["costs"][head]) + strategies[head]]
    change: dict[int, float] = defaultdict(float)
    for (start, end), usage, chosen in zip(nodes["intervals"], nodes["usages"], strategies):
        if end > start:
            change[start] += usage[chosen]
            change[end] -= usage[chosen]
    peak = max(accumulate(change[t] for t in sorted(change)), default=0)
    if peak > problem["usage_limit"]:
        raise ValueError(f"uses {peak}, {peak - problem['usage_limit']} too much")
    return cost


BY_PROCESSOR_TIME = """
import gc, json, sys, threading, time
gc.disable()
if sys.argv[4] == "plain":
    sys.modules["numba"] = None
from jaxplan.iopddl import read_problem
from jaxplan.solve import Incumbent, solve
path, limit, seed, started = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), float(sys.argv[6])
first, began = threading.get_ident(), threading.local()
read = [0.0]
latest = {}
def used():
    try:
        with open("/proc/thread-self/schedstat") as file:
            return time.monotonic() - started - 1e-9 * int(file.read().split()[1])
    except OSError:
        return time.thread_time()
def clock():
    now = used()
    if threading.get_ident() == first:
        read[0] = now
    elif not hasattr(began, "at"):
        began.at = read[0] - now
    latest[threading.get_ident()] = getattr(began, "at", 0.0) + now
    return latest[threading.get_ident()]
problem = read_problem(path)
found = solve(problem, limit, seed, Incumbent(problem, began=0.0, clock=clock), int(sys.argv[5]) or None)
gap = (found.cost - found.bound) / abs(found.cost)
print(json.dumps({"bound": found.bound, "gap": gap, "seconds": max(latest.values())}))
print(json.dumps(found.strategies.tolist()))
"""
"""What a process does whose limit is processor time. The first thread's clock is 0 when the process starts; another one's begins
where the first one's stands then. The schedule's second number is
how long the thread was ready to run and had no core, in ns. What is reported is the latest reading of any thread's."""


def solve(
    file: Path, limit: float, seed: int, processor: bool, plain: bool, workers: int
) -> tuple[dict[str, Any], list[int], float]:
    """Run the command: what it reports, its strategies, its seconds."""
    command = [sys.executable, "-m", "jaxplan", "solve", str(file), "--time-limit", str(limit), "--seed", str(seed), "--json"]
    if workers:
        command += ["--workers", str(workers)]
    if processor:
        kernels = "plain" if plain else "fast"
        command = [sys.executable, "-c", BY_PROCESSOR_TIME, str(file), str(limit - RESERVE), str(seed), kernels, str(workers)]
        command.append(str(time.monotonic()))
    began = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    taken = time.monotonic() - began
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    facts, strategies = map(json.loads, done.stdout.splitlines()[-2:])
    return facts, strategies, facts["seconds"] if processor else taken


def main() -> None:
    """Print the table, a row per instance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--share", type=float, default=0.1, help="of the timeout in the results file (default 0.1)")
    parser.add_argument("--results", type=Path, help="known best costs and timeouts")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds where no timeout is known (default 60)")
    parser.add_argument("--workers", type=int, default=0, help="threads of one search (default: one per core)")
    parser.add_argument("--processor", action="store_true", help="limits and seconds without what threads wait for a core")
    parser.add_argument("--jobs", type=int, default=1, help="seeds run at once, with --processor")
    parser.add_argument("--without-numba", action="store_true", help="as where it is not installed, with --processor")
    parser.add_argument("--each", action="store_true", help="each seed's ratio and gap, to stderr")
    parser.add_argument("--only", help="letters of the instances to run")
    arguments = parser.parse_args()
    if arguments.jobs > 1 and not arguments.processor:
        parser.error("--jobs: runs beside one another take seconds on the wall from each other; add --processor")
    if arguments.without_numba and not arguments.processor:
        parser.error("--without-numba: add --processor")
    results = json.loads(arguments.results.read_text()) if arguments.results else {}
    print("| instance | limit s | seconds, worst | cost, median | bound, median | gap, worst | ratio, median | ratio, worst |")
    print("|---|---|---|---|---|---|---|---|")
    failures = 0
    for file in sorted(arguments.directory.glob("*.json.gz")):
        name = re.split(r"[-_.]", file.name.removesuffix(".json.gz"))[-1]
        if arguments.only and name not in arguments.only:
            continue
        known = results.get(name)
        limit = arguments.share * known["timeout_s"] if known else arguments.time_limit
        with gzip.open(file) as opened:
            problem = json.load(opened)["problem"]
        costs, bounds, gaps, seconds, troubles = [], [], [], [], []
        with ThreadPoolExecutor(arguments.jobs) as pool:
            how = arguments.processor, arguments.without_numba, arguments.workers
            runs = [pool.submit(solve, file, limit, seed, *how) for seed in range(arguments.seeds)]
        for seed, run in enumerate(runs):
            try:
                facts, strategies, taken = run.result()
                costs.append(evaluate(problem, strategies))
            except ValueError as error:
                troubles.append(f"{name}, seed {seed}: {error}")
                continue
            bounds.append(facts["bound"] if facts["bound"] is not None else float("-inf"))
            gaps.append(facts["gap"] if facts["gap"] is not None else float("inf"))
            seconds.append(taken)
        if costs:
            best = known["contest_costs_best_six"][0] if known else None
            ratios = [f"{statistics.median(costs) / best:.5f}", f"{max(costs) / best:.5f}"] if best else ["", ""]
            middle = f"{statistics.median(costs):.9g}", f"{statistics.median(bounds):.6g}"
            row = [name, f"{limit:g}", f"{max(seconds):.1f}", *middle]
            print("| " + " | ".join([*row, f"{100 * max(gaps):.2f}%", *ratios]) + " |", flush=True)
            if best and arguments.each:
                seen = [f"{cost / best:.5f} ({100 * gap:.2f}%)" for cost, gap in zip(costs, gaps)]
                print(f"{name}, ratio (gap) by seed: " + ", ".join(seen), file=sys.stderr, flush=True)
        for trouble in troubles:
            print(trouble, file=sys.stderr, flush=True)
        failures += len(troubles)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
