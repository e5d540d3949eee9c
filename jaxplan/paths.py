"""Room `paths`: pytree paths that differ by numbers only, as those of a model's layers do.

A number counts as an index where it is a whole level of a path ("layers/3/w"), or stands in the name of a level that others are
below ("Block_3/kernel", "layer3/w", "h.3.attn.weight"; a dot parts levels too). In the name of an array itself (w1, w2) it does
not: such names mean different things.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["alike", "several", "starred", "words_and_indices"]

_LEVEL = re.compile(r"[^/.]+")
_NUMBER = re.compile(r"(?<![0-9])(?:0|[1-9][0-9]{0,8})(?![0-9])")


def words_and_indices(path: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Block_3/Dense_0/kernel -> (("Block_", "/Dense_", "/kernel"), (3, 0)): one word more than indices."""
    words, indices, done = [], [], 0
    for level in _LEVEL.finditer(path):
        last = "/" not in path[level.end() :] and "." not in path[level.end() :]
        for number in _NUMBER.finditer(path, *level.span()):
            if last and number.span() != level.span():
                continue
            words.append(path[done : number.start()])
            indices.append(int(number[0]))
            done = number.end()
    return (*words, path[done:]), tuple(indices)


def alike(path: str) -> tuple[str, ...]:
    """Equal for paths that differ by their indices only."""
    return words_and_indices(path)[0]


def several(paths: Sequence[str]) -> str:
    """Paths that are `alike` in one text: "blocks/*/wq (x12)"; a single path as it is."""
    return f"{starred(paths)} (x{len(paths)})" if len(paths) > 1 else paths[0]


def starred(paths: Sequence[str]) -> str:
    """Paths that are `alike` as a glob that matches them: with a star where their indices differ."""
    words, _ = words_and_indices(paths[0])
    columns = [set(column) for column in zip(*[words_and_indices(path)[1] for path in paths], strict=True)]
    texts = [str(*column) if len(column) == 1 else "*" for column in columns]
    return "".join([word + text for word, text in zip(words, [*texts, ""], strict=True)])
