"""Haliax: an axis mapping, {name of an axis: mesh axes}."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from jaxplan.export.libraries import library
from jaxplan.export.names import Entry, show_entry
from jaxplan.export.nouns import Exporter, ExportError, Item, Selection, Written
from jaxplan.export.select import items_at
from jaxplan.files import SavedPlan

MOST_NAMED = 6
"""Paths that an error names; of more it gives the number."""


def build(selection: Selection) -> dict[str, str | tuple[str, ...]]:
    """The mapping for the `NamedArray`s selected; other arrays are known to Haliax by no names, and are left out.

    An axis name means the same wherever it stands: raises ExportError, naming the paths, where one would have to lie in two ways.
    """
    haliax = library("haliax", "haliax")
    return _mapping(list(_named(selection, haliax.NamedArray)))


def write(saved: SavedPlan, path: str | None) -> Written:
    """The mapping as a Python module, by the names that the plan's dimensions have (those given as `dims=`)."""
    items = items_at(saved, path)
    mapping = _mapping([(item, name, entry) for item in items for name, entry in zip(item.dims, item.entries, strict=False)])
    lines = [f"    {json.dumps(name)}: {_python(entry)}," for name, entry in mapping.items()]
    head = '"""An axis mapping for Haliax. It is yours to edit."""'
    return Written("\n".join([head, "", "AXIS_MAPPING = {", *lines, "}", ""]), {"axis_mapping": mapping})


def _named(selection: Selection, named_array: type[Any]) -> Iterator[tuple[Item, str, Entry]]:
    for node in jax.tree.leaves(selection.tree, is_leaf=lambda node: isinstance(node, named_array)):
        if isinstance(node, named_array):
            for number in jax.tree.leaves(node):
                item = selection.items[number]
                for axis, entry in zip(node.axes, item.entries, strict=True):
                    yield item, axis.name, entry


def _mapping(uses: Sequence[tuple[Item, str, Entry]]) -> dict[str, str | tuple[str, ...]]:
    """{name: mesh axes} of the names that are sharded at all."""
    ways: dict[str, dict[Entry, list[str]]] = {}
    for item, name, entry in uses:
        ways.setdefault(name, {}).setdefault(entry, []).append(item.path)
    if not ways:
        raise ExportError(
            "nothing here has axis names: pass haliax.NamedArrays to the planned function, or name its dimensions with dims="
        )
    torn = {name: found for name, found in ways.items() if len(found) > 1}
    if torn:
        raise ExportError(
            "an axis mapping has one layout per name, and this plan needs several:\n"
            + "\n".join(f"  {name}: {_told(found)}" for name, found in torn.items())
            + "\nExport a part of the arguments (of='params'), rename axes, or replan with pins= on these paths"
        )
    return {name: entry for name, found in ways.items() for entry in found if entry is not None}


def _told(found: Mapping[Entry, Sequence[str]]) -> str:
    parts = []
    for entry, paths in found.items():
        paths = list(dict.fromkeys(paths))
        more = f" and {len(paths) - MOST_NAMED} more" if len(paths) > MOST_NAMED else ""
        parts.append(f"{show_entry(entry)} in {', '.join(paths[:MOST_NAMED])}{more}")
    return "; ".join(parts)


def _python(entry: str | tuple[str, ...]) -> str:
    return json.dumps(entry) if isinstance(entry, str) else f"({', '.join(map(json.dumps, entry))})"


HALIAX = Exporter("an axis mapping for Haliax", build, write)
