"""Room `iopddl`: files of the ASPLOS/EuroSys 2025 contest on intra-operator parallelism, read, checked and written.

A file is gzipped JSON: {"problem": {"name", "nodes": {"intervals", "costs", "usages"}, "edges": {"nodes", "costs"},
"usage_limit"}}; intervals are half-open, edge costs are flattened row by row, and costs near 1e18 stand for "impossible".
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import os
import zlib
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from jaxplan.solve import IntervalProblem
from jaxplan.solve.compiled import HAVE_NUMBA, compiled

IMPOSSIBLE = 10**18
"""How the format writes an impossible choice. From a tenth of it on, a cost is read as infinite."""


class ProblemFileError(ValueError):
    """A file that holds no problem. The message starts with the path inside the file, where there is one."""


def read_problem(path: str | os.PathLike[str]) -> IntervalProblem:
    """The problem in a file. Raises OSError if it cannot be opened and ProblemFileError if it is not of the format."""
    try:
        with gzip.open(path, "rb") as file:
            text = file.read()
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ProblemFileError(f"{os.fspath(path)} is not a gzip file, or not a whole one: {error}") from None
    if HAVE_NUMBA:
        with contextlib.suppress(ValueError, RecursionError):  # what is wrong is said of the text as it is
            return problem_of(*lifted(text))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProblemFileError(f"{os.fspath(path)} holds no JSON: {error}") from None
    return problem_of(content)


class Lists(NamedTuple):
    """Numbers of all lists, and where each list begins among them (and where the last one ends)."""

    numbers: np.ndarray
    begin: np.ndarray

    def of(self, rows: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        """(numbers, borders) of the lists that `rows` stand for. Raises ValueError where they stand for none, or not in a row."""
        if not all(type(row) is list and len(row) == 1 and type(row[0]) is int for row in rows):
            raise ValueError("not all are lists of whole numbers")
        first = rows[0][0] if rows else 0
        if [row[0] for row in rows] != list(range(first, first + len(rows))) or not 0 <= first < len(self.begin) - len(rows):
            raise ValueError("the lists are not one after the other")
        borders = self.begin[first : first + len(rows) + 1]
        return self.numbers[borders[0] : borders[-1]], borders - borders[0]


def lifted(text: bytes) -> tuple[Any, Lists]:
    """JSON decoded with its k-th list of whole numbers, if it has any, as `[k]`, and those lists; most of a file is such lists.

    No list of one whole number is left, so what stands for a list cannot be anything else. Raises ValueError if it is no JSON.
    """
    if b"\0" in text:
        raise ValueError("not UTF-8: lists are not found in it")
    cells = np.frombuffer(text, dtype=np.uint8)
    numbers = np.empty(np.count_nonzero(cells == ord(",")) + np.count_nonzero(cells == ord("[")))
    begin = np.zeros(np.count_nonzero(cells == ord("[")) + 1, dtype=np.int64)
    rest = np.empty(len(cells) + 20 * len(begin), dtype=np.uint8)
    length, lists = lift(cells, rest, numbers, begin)
    return json.loads(rest[:length].tobytes()), Lists(numbers, begin[: lists + 1])


@compiled()
def after_space(text, i):
    """The next position from i on that holds no white space."""
    while i < len(text) and (text[i] == 32 or text[i] == 9 or text[i] == 10 or text[i] == 13):
        i += 1
    return i


@compiled()
def lift(text, rest, numbers, begin):
    """Move lists of whole numbers of a JSON text into `numbers`, where they begin into `begin`, all else into `rest`.

    Gives (length of the rest, lists). Numbers that 64 bits do not hold, or that JSON would not write so, leave their list be.
    """
    i, out, count = 0, 0, 0
    n = len(text)
    while i < n:
        c = text[i]
        rest[out] = c
        i, out = i + 1, out + 1
        if c == 34:  # a string: as it is, to its end
            while i < n:
                c = text[i]
                rest[out] = c
                i, out = i + 1, out + 1
                if c == 34:
                    break
                if c == 92 and i < n:
                    rest[out] = text[i]
                    i, out = i + 1, out + 1
        elif c == 91:
            at, j, whole = begin[count], i, False
            while True:
                j = after_space(text, j)
                negative = j < n and text[j] == 45
                if negative:
                    j += 1
                digits, value = j, 0
                while j < n and 48 <= text[j] <= 57 and value < 922337203685477580:
                    value = 10 * value + np.int64(text[j] - 48)
                    j += 1
                if j == digits or (text[digits] == 48 and j > digits + 1):
                    break
                numbers[at] = -value if negative else value
                at += 1
                j = after_space(text, j)
                if j < n and text[j] == 44:
                    j += 1
                    continue
                whole = j < n and text[j] == 93
                break
            if whole:
                i = j
                power = 1
                while power * 10 <= count:
                    power *= 10
                while power > 0:
                    rest[out] = 48 + count // power % 10
                    out, power = out + 1, power // 10
                count += 1
                begin[count] = at
    return out, count


def problem_of(content: Any, lists: Lists | None = None) -> IntervalProblem:
    """The problem in a file's decoded JSON, or in what `lifted` gives. Raises ProblemFileError, and of the latter ValueError."""
    top = _member(content, "", "problem", dict)
    nodes = _member(top, "problem", "nodes", dict)
    edges = _member(top, "problem", "edges", dict)
    intervals = _member(nodes, "problem.nodes", "intervals", list)
    costs = _member(nodes, "problem.nodes", "costs", list)
    usages = _member(nodes, "problem.nodes", "usages", list)
    pairs = _member(edges, "problem.edges", "nodes", list)
    tables = _member(edges, "problem.edges", "costs", list)
    name = top.get("name", "")
    if not isinstance(name, str):
        raise ProblemFileError(f"problem.name: {name!r} is not a string")
    for path, found, wanted in (
        ("problem.nodes.costs", costs, intervals),
        ("problem.nodes.usages", usages, intervals),
        ("problem.edges.costs", tables, pairs),
    ):
        if len(found) != len(wanted):
            raise ProblemFileError(f"{path}: {len(found)} entries for {len(wanted)} {path.split('.')[1]}")
    lifetimes = _pairs(intervals, "problem.nodes.intervals", lists)
    for node in np.flatnonzero((lifetimes[:, 0] < 0) | (lifetimes[:, 1] < lifetimes[:, 0]))[:1]:
        raise ProblemFileError(f"problem.nodes.intervals[{node}]: {lifetimes[node].tolist()} is not 0 <= start <= end")
    ends = _pairs(pairs, "problem.edges.nodes", lists)
    for edge in np.flatnonzero(((ends < 0) | (ends >= len(costs))).any(axis=1) | (ends[:, 0] == ends[:, 1]))[:1]:
        raise ProblemFileError(f"problem.edges.nodes[{edge}]: {ends[edge].tolist()} are not two of the {len(costs)} nodes")
    vectors = _vectors(costs, "problem.nodes.costs", IMPOSSIBLE / 10, lists)
    sizes = _vectors(usages, "problem.nodes.usages", math.inf, lists)
    for i, (vector, size) in enumerate(zip(vectors, sizes)):
        if not len(vector):
            raise ProblemFileError(f"problem.nodes.costs[{i}]: the node has no strategy")
        if len(size) != len(vector):
            raise ProblemFileError(f"problem.nodes.usages[{i}]: {len(size)} usages for {len(vector)} strategies")
    widths = [len(size) for size in sizes]
    for cell in np.flatnonzero(np.concatenate([np.zeros(0), *sizes]) < 0)[:1].tolist():
        i = int(np.searchsorted(np.cumsum(widths), cell, side="right"))
        at = cell - sum(widths[:i])
        raise ProblemFileError(f"problem.nodes.usages[{i}][{at}]: {sizes[i][at]:g} is negative")
    matrices = []
    cells = _vectors(tables, "problem.edges.costs", IMPOSSIBLE / 10, lists)
    for i, (flat, (tail, head)) in enumerate(zip(cells, ends.tolist())):
        shape = len(vectors[tail]), len(vectors[head])
        if len(flat) != shape[0] * shape[1]:
            raise ProblemFileError(f"problem.edges.costs[{i}]: {len(flat)} costs for {shape[0]} x {shape[1]} strategies")
        matrices.append(flat.reshape(shape))
    limit = top.get("usage_limit")
    if type(limit) not in (int, float) or not math.isfinite(limit):
        raise ProblemFileError(f"problem.usage_limit: {_shown(limit)} is not a finite number")
    if limit < 0:
        raise ProblemFileError(f"problem.usage_limit: {limit:g} is negative")
    return IntervalProblem(tuple(vectors), tuple(sizes), lifetimes, ends, tuple(matrices), float(limit), name)


def content_of(problem: IntervalProblem) -> dict[str, Any]:
    """What `problem_of` reads."""
    return {
        "problem": {
            "name": problem.name,
            "nodes": {
                "intervals": problem.intervals.tolist(),
                "costs": [_plain(cost) for cost in problem.costs],
                "usages": [_plain(usage) for usage in problem.usages],
            },
            "edges": {"nodes": problem.edges.tolist(), "costs": [_plain(table.ravel()) for table in problem.tables]},
            "usage_limit": _plain(np.array([problem.limit]))[0],
        }
    }


def write_problem(problem: IntervalProblem, path: str | os.PathLike[str]) -> None:
    """Write a file that `read_problem` reads back as the same problem."""
    target = os.fspath(path)
    text = json.dumps(content_of(problem), allow_nan=False, separators=(",", ":")).encode()
    beside = f"{target}.{os.getpid()}.part"  # written whole, then renamed: nobody reads half a file
    try:
        with open(beside, "wb") as file:
            file.write(gzip.compress(text, mtime=0))
        os.replace(beside, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)


def _plain(values: np.ndarray) -> list[int | float]:
    """Whole numbers as such: files of the contest have no other."""
    return [IMPOSSIBLE if math.isinf(v) else int(v) if v.is_integer() else v for v in values.tolist()]


def _member(holder: Any, path: str, key: str, kind: type) -> Any:
    here = f"{path}.{key}" if path else key
    if not isinstance(holder, dict) or key not in holder:
        raise ProblemFileError(f"{here}: missing")
    if not isinstance(holder[key], kind):
        wanted = "an object" if kind is dict else "an array"
        raise ProblemFileError(f"{here}: {type(holder[key]).__name__} where {wanted} is wanted")
    return holder[key]


def _numbers(values: Any, path: str) -> np.ndarray:
    """A list of finite numbers as floats."""
    if not isinstance(values, list):
        raise ProblemFileError(f"{path}: {type(values).__name__} where an array of numbers is wanted")
    for i, value in enumerate(values):
        if type(value) is not int and (type(value) is not float or not math.isfinite(value)):
            raise ProblemFileError(f"{path}[{i}]: {_shown(value)} is not a finite number")
    try:
        return np.array(values, dtype=float)
    except OverflowError:
        raise ProblemFileError(f"{path}: a number is beyond what a double holds") from None


def _vectors(rows: list[Any], path: str, impossible: float, lists: Lists | None) -> list[np.ndarray]:
    """Lists of finite numbers as floats, those from `impossible` on as infinite. All at once where there is nothing to name."""
    if lists is not None:
        numbers, borders = lists.of(rows)
        numbers[numbers >= impossible] = np.inf
        return [numbers[begin:end] for begin, end in pairwise(borders.tolist())]
    flat = list(chain.from_iterable(rows)) if all(type(row) is list for row in rows) else [None]
    if set(map(type, flat)) <= {int, float}:
        with contextlib.suppress(OverflowError):
            numbers = np.array(flat, dtype=float)
            if np.isfinite(numbers).all():
                numbers[numbers >= impossible] = np.inf
                return [numbers[begin:end] for begin, end in pairwise([0, *accumulate(map(len, rows))])]
    vectors = [_numbers(row, f"{path}[{i}]") for i, row in enumerate(rows)]
    return [np.where(vector >= impossible, np.inf, vector) for vector in vectors]


def _pairs(rows: list[Any], path: str, lists: Lists | None) -> np.ndarray:
    """(n, 2) whole numbers."""
    if lists is not None:
        numbers, borders = lists.of(rows)
        if (np.diff(borders) != 2).any() or (abs(numbers) > 2**53).any():
            raise ValueError("not all are pairs, or not all exact")
        return numbers.astype(np.int64).reshape(-1, 2)
    if all(type(row) is list and len(row) == 2 for row in rows) and set(map(type, chain.from_iterable(rows))) <= {int}:
        with contextlib.suppress(OverflowError):
            pairs = np.array(rows, dtype=np.int64).reshape(len(rows), 2)
            if (abs(pairs) < 2**62).all():
                return pairs
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != 2 or any(type(value) is not int for value in row):
            raise ProblemFileError(f"{path}[{i}]: {_shown(row)} is not a pair of whole numbers")
        if any(abs(value) >= 2**62 for value in row):
            raise ProblemFileError(f"{path}[{i}]: {_shown(row)} is beyond what 64 bits hold")
    return np.array(rows, dtype=np.int64).reshape(len(rows), 2)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
