"""`jaxplan solve`: a problem file in, the best strategies found by the time limit, or by a signal, out."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from jaxplan.cli.output import Trouble, emit, explain

if TYPE_CHECKING:
    from jaxplan.solve import Incumbent, Solution

RESERVE = 0.4, 0.5
"""What of the limit is kept for writing the answer down: seconds, and in times of reading the problem; at most half of it."""
GRACE = 0.7
"""How much of that is still searched in while there is no answer."""
GLANCE = 0.05
"""Seconds between two looks at the clock."""
BETWEEN = 1.0
"""Seconds between two lines of progress, at least."""


def options(parser: argparse.ArgumentParser) -> None:
    """Options of `jaxplan solve`."""
    parser.add_argument("file", metavar="FILE", help="a gzipped problem in the format of the ASPLOS/EuroSys 2025 contest")
    parser.add_argument(
        "--time-limit", metavar="S", type=_seconds, default=60.0, help="seconds from the start of the process (default 60)"
    )
    parser.add_argument("--seed", metavar="N", type=_seed, default=0, help="seed of the random choices (default 0)")
    parser.add_argument("--json", action="store_true", help="cost, bound, gap, peak and seconds as JSON on the line before")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def started() -> float:
    """When this process started, on the clock of `time.monotonic`; where the system does not tell, now."""
    try:
        with open("/proc/self/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic()
    return time.monotonic() - max(0.0, age)


class Job(threading.Thread):
    """Reads and solves beside the main thread, which is free to answer signals and the clock."""

    def __init__(self, path: str, seed: int, began: float, limit: float) -> None:
        super().__init__(daemon=True)
        self.path, self.seed, self.began = path, seed, began
        self.limit, self.last = limit, began + max(0.5 * limit, limit - RESERVE[0])
        self.ended = threading.Event()
        self.incumbent: Incumbent | None = None
        self.trouble: BaseException | None = None
        self.said = -math.inf

    def run(self) -> None:
        """Keep what happened in `incumbent` and `trouble`."""
        try:
            from jaxplan.iopddl import read_problem
            from jaxplan.solve import Incumbent, solve

            gc.disable()  # there are millions of numbers and no cycles: a third of the time of reading and reducing
            start = time.monotonic()
            problem = read_problem(self.path)
            reserve = RESERVE[0] + RESERVE[1] * (time.monotonic() - start)
            self.last = self.began + max(0.5 * self.limit, self.limit - reserve)
            self.incumbent = Incumbent(problem, self.say, began=self.began, grace=GRACE * (self.began + self.limit - self.last))
            solve(problem, self.last - self.began, self.seed, self.incumbent)
        except BaseException as error:  # told by the main thread
            self.trouble = error
        finally:
            gc.enable()
            self.ended.set()

    @property
    def over(self) -> bool:
        """It is time to write the answer down, or to say that there is none."""
        now, known = time.monotonic(), self.incumbent
        if known is None or not math.isfinite(known.cost):
            return now >= self.last + GRACE * (self.began + self.limit - self.last)
        return now >= self.last

    def say(self, line: str) -> None:
        """Progress, at most one line a second."""
        now = time.monotonic()
        if now - self.said >= BETWEEN:
            self.said = now
            print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stopping(job: Job, caught: list[int]) -> Iterator[None]:
    """SIGTERM and SIGINT end the wait for the job and are noted in `caught`."""

    def stop(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        job.ended.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def solve(arguments: argparse.Namespace) -> int:
    """Choose one strategy per node of a problem file: the least cost within its limit on usages at any time.

    Progress goes to stderr; the last line of stdout is the strategies as one JSON list, the best known when the time is over, at
    SIGTERM or SIGINT. Status 1 if there is no feasible solution or none was found, 2 if the file cannot be read.
    """
    began = started() if arguments.own else time.monotonic()
    job, caught = Job(arguments.file, arguments.seed, began, arguments.time_limit), []
    status = 0
    with stopping(job, caught):
        job.start()
        while not job.ended.wait(GLANCE) and not job.over:
            pass
        try:
            found = None if job.incumbent is None else job.incumbent.solution()
            if found is None:
                _explain(job, arguments, bool(caught))
            _report(job, found, arguments, caught)
        except Trouble as trouble:
            explain(arguments.command, trouble)
            status = trouble.status
        _leave(job, status)
    return status


def _leave(job: Job, status: int) -> None:
    """End the job, or the process where the job cannot be ended: the interpreter must not close down beside a running kernel."""
    if job.incumbent is not None:
        job.incumbent.stopped = True
    job.join(GLANCE)
    if job.is_alive():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


def _explain(job: Job, arguments: argparse.Namespace, stopped: bool) -> NoReturn:
    """Raises Trouble: why there is nothing to print."""
    from jaxplan.iopddl import ProblemFileError
    from jaxplan.solve import NoSolutionError

    error = job.trouble
    if isinstance(error, OSError):
        raise Trouble(f"{job.path} cannot be read: {error.strerror or error}")
    if isinstance(error, ProblemFileError):
        raise Trouble(f"{job.path}: {error}")
    if isinstance(error, NoSolutionError):
        raise Trouble(f"{job.path}: {error}", 1)
    if error is not None:
        raise error
    reason = "when it was stopped" if stopped else f"in the {arguments.time_limit:g} s given"
    if job.incumbent is None:
        raise Trouble(f"{job.path}: not read yet {reason}", 1)
    raise Trouble(f"{job.path}: {job.incumbent.shortage()} {reason}", 1)


def _report(job: Job, found: Solution, arguments: argparse.Namespace, caught: list[int]) -> None:
    from jaxplan.solve import peak_usage

    assert job.incumbent is not None
    problem = job.incumbent.problem
    peak = peak_usage(problem, found.strategies)
    gap = (found.cost - found.bound) / abs(found.cost) if found.cost else found.cost - found.bound
    facts: dict[str, Any] = {
        "cost": found.cost,
        "bound": found.bound if math.isfinite(found.bound) else None,
        "gap": gap if math.isfinite(gap) else None,
        "peak": peak.usage,
        "limit": problem.limit,
        "seed": arguments.seed,
        "ended": signal.Signals(caught[0]).name if caught else "proven" if job.incumbent.proven else "time limit",
        "seconds": round(time.monotonic() - job.began, 3),
    }
    shown = "no bound" if facts["bound"] is None else f"bound {found.bound:.9g}  gap {100 * gap:.3g}%"
    print(f"{facts['seconds']:7.1f} s  cost {found.cost:.9g}  {shown}", file=sys.stderr)
    if job.trouble is not None:  # what was found before it holds all the same
        print(f"jaxplan solve: the search broke off: {job.trouble!r}", file=sys.stderr)
    if arguments.json:
        emit(json.dumps(facts, allow_nan=False))
    emit(json.dumps(found.strategies.tolist(), separators=(",", ":")))
