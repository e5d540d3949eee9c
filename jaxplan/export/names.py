"""Logical axis names: per dimension a name, per name the mesh axes that shard it, as several libraries want layouts said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxplan.export.nouns import Item
from jaxplan.files.nouns import Entries

Entry = str | tuple[str, ...] | None
"""What shards one dimension: a mesh axis, several, major to minor, or none."""


@dataclass(frozen=True)
class LogicalAxes:
    """`rules`: {logical name: mesh axes}, in order of first use; `names`: {path: a logical name per dimension}.

    Under the rules, the names of a path give its layout exactly; no name stands twice in one path.
    """

    rules: Mapping[str, Entry]
    names: Mapping[str, tuple[str, ...]]

    def spec(self, path: str) -> Entries:
        """The layout that the rules give a path, an entry for every dimension."""
        return tuple(self.rules[name] for name in self.names[path])


def logical_axes(items: Sequence[Item]) -> LogicalAxes:
    """Names for the dimensions of some arrays: the plan's own (those given as `dims=`, else its letters), split with a number
    where one name would need two layouts, or would stand twice in one array."""
    wanted: dict[str, list[tuple[Entry, int]]] = {}
    keys: dict[str, list[tuple[str, Entry, int]]] = {}
    for item in items:
        seen: Counter[tuple[str, Entry]] = Counter()
        keys[item.path] = []
        for name, entry in zip(_dims(item), item.entries, strict=True):
            key = (entry, seen[name, entry])
            seen[name, entry] += 1
            if key not in wanted.setdefault(name, []):
                wanted[name].append(key)
            keys[item.path].append((name, *key))
    taken, final = set(wanted), dict[tuple[str, Entry, int], str]()
    for name, ways in wanted.items():
        number = 0
        for way in ways:
            split = name
            while len(ways) > 1 and (split == name or split in taken):
                split, number = f"{name}_{number}", number + 1
            taken.add(split)
            final[name, *way] = split
    rules = {final[key]: key[1] for found in keys.values() for key in found}
    return LogicalAxes(rules, {path: tuple(final[key] for key in found) for path, found in keys.items()})


def _dims(item: Item) -> Sequence[str]:
    """The names of an array's dimensions; where none are known, one each by size."""
    return item.dims if len(item.dims) == len(item.shape) else [f"size_{extent}" for extent in item.shape]


def show_entry(entry: Entry) -> str:
    """data+model of ("data", "model")."""
    return "whole" if entry is None else "+".join((entry,) if isinstance(entry, str) else entry)
