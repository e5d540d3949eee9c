"""Repeats written once: paths that differ by an index, and sequences that go round. A deep model's file stays small."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxplan.files.nouns import PlanFileError
from jaxplan.paths import words_and_indices

MOST_PATHS = 1_000_000
"""More inputs or outputs than any program has: a file that unfolds to more is refused before it is unfolded."""
LONGEST_PERIOD = 1024
_BRACES = re.compile(r"\{\{|\}\}|\{([0-9]{1,9}(?:-[0-9]{1,9})?(?:,[0-9]{1,9}(?:-[0-9]{1,9})?)*)\}")

Value = TypeVar("Value", bound=Hashable)


# --- paths -----------------------------------------------------------------------------------------------------------


def unique_paths(paths: Sequence[str]) -> list[str]:
    """The same paths; of equal ones (a key may itself have a slash) the later ones are numbered."""
    given, seen = set(paths), dict[str, None]()
    for path in paths:
        name, number = path, 1
        while name in seen or (number > 1 and name in given):
            number += 1
            name = f"{path} ({number})"
        seen[name] = None
    return list(seen)


def fold_paths(leaves: Mapping[str, Value]) -> dict[str, Value]:
    """{"layers/{0-11}/w": leaf} of {"layers/0/w": leaf, ...}. Paths whose leaves are equal fold into as few products of sets of
    indices as that goes from the front; a literal brace is doubled."""
    groups: dict[tuple[tuple[str, ...], Value], list[tuple[int, ...]]] = {}
    for path, leaf in leaves.items():
        words, indices = words_and_indices(path)
        groups.setdefault((words, leaf), []).append(indices)
    found: dict[str, Value] = {}
    for (words, leaf), rows in groups.items():
        for columns in _products(rows):
            texts = [str(*column) if len(column) == 1 else f"{{{_ranges(column)}}}" for column in columns]
            literal = [word.replace("{", "{{").replace("}", "}}") for word in words]
            found["".join([word + text for word, text in zip(literal, [*texts, ""], strict=True)])] = leaf
    return found


def _products(rows: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Rows of numbers, each once, as products of sets: (0, 0) (0, 1) (1, 0) (1, 1) (2, 0) -> {0, 1} x {0, 1} and {2} x {0}."""
    if not rows[0]:
        return [()]
    after: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in rows:
        after.setdefault(first, []).append(tuple(rest))
    firsts: dict[tuple[tuple[tuple[int, ...], ...], ...], list[int]] = {}
    for first, rest in after.items():
        firsts.setdefault(tuple(_products(rest)), []).append(first)
    return [(tuple(sorted(mine)), *product) for products, mine in firsts.items() for product in products]


def unfold_paths(folded: Mapping[str, Value]) -> dict[str, Value]:
    """The undo of `fold_paths`. Raises PlanFileError for a path that is given twice, and for too many."""
    parts = {key: _parts(key) for key in folded}
    total = sum(math.prod(map(_count, texts[1::2])) for texts in parts.values())
    if total > MOST_PATHS:
        raise PlanFileError(f"the file lists {total:,} paths; at most {MOST_PATHS:,} are read")
    found: dict[str, Value] = {}
    for key, texts in parts.items():
        choices = [_expanded(text) if number % 2 else [text] for number, text in enumerate(texts)]
        for words in itertools.product(*choices):
            path = "".join(words)
            if path in found:
                raise PlanFileError(f"the path {path!r} is given twice")
            found[path] = folded[key]
    return found


def path_ranges(key: str) -> list[tuple[str, list[int] | None]]:
    """A folded path as (text, the indices that follow it; None at the end), for a writer of code."""
    texts = _parts(key)
    indices = [[int(i) for i in _expanded(text)] for text in texts[1::2]]
    return list(zip(texts[::2], [*indices, None], strict=True))


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _parts(key: str) -> list[str]:
    """Texts and ranges by turns."""
    texts: list[str] = [""]
    done = 0
    for brace in _BRACES.finditer(key):
        texts[-1] += key[done : brace.start()]
        done = brace.end()
        if brace[1]:
            texts += [brace[1], ""]
        else:
            texts[-1] += brace[0][0]
    texts[-1] += key[done:]
    return texts


def _bounds(text: str) -> list[tuple[int, int]]:
    return [(int(first), int(last or first)) for first, _, last in (run.partition("-") for run in text.split(","))]


def _count(text: str) -> int:
    return sum(max(0, last - first + 1) for first, last in _bounds(text))


def _expanded(text: str) -> list[str]:
    return [str(i) for first, last in _bounds(text) for i in range(first, last + 1)]


# --- sequences -------------------------------------------------------------------------------------------------------


def fold_sequence(numbers: Sequence[int]) -> list[Any]:
    """[3, [96, [0, 1, 2]], 4] of 3, then 0 1 2 ninety-six times, then 4. At each place the repeat that covers most is taken."""
    array = np.asarray(numbers, dtype=np.int64)
    count = len(array)
    covers, periods = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    for period in range(1, min(LONGEST_PERIOD, count // 2) + 1):
        same = array[:-period] == array[period:]
        breaks = np.flatnonzero(~same)
        ends = np.append(breaks, len(same))
        run = ends[np.searchsorted(ends, np.arange(len(same)))] - np.arange(len(same))
        covered = np.zeros(count, dtype=np.int64)
        covered[: len(run)] = np.where(run >= period, (run // period + 1) * period, 0)
        better = covered - period > covers - periods  # what is saved: all but one round
        covers, periods = np.where(better, covered, covers), np.where(better, period, periods)
    found: list[Any] = []
    place = 0
    while place < count:
        cover, period = int(covers[place]), int(periods[place])
        if cover - period > 4:
            found.append([cover // period, array[place : place + period].tolist()])
            place += cover
        else:
            found.append(int(array[place]))
            place += 1
    return found


def sequence_length(folded: Sequence[Any]) -> int:
    """How many numbers a folded sequence stands for."""
    return sum(1 if isinstance(item, int) else item[0] * len(item[1]) for item in folded)


def unfold_sequence(folded: Sequence[Any]) -> list[int]:
    """The undo of `fold_sequence`."""
    found: list[int] = []
    for item in folded:
        found += [item] if isinstance(item, int) else item[1] * item[0]
    return found
