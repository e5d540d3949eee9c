"""The nouns of room `export`: what is exported, by which exporter, and what can go wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jax.sharding import PartitionSpec

from jaxplan.files import SavedPlan
from jaxplan.files.nouns import Entries
from jaxplan.plan import Plan


class ExportError(ValueError):
    """What cannot be exported: a layout that the target has no words for (the message names the paths), or a format that takes
    something else."""


@dataclass(frozen=True)
class Item:
    """One array of a plan: its path among the arguments, shape, dtype, names of its dimensions ("B"; () if unknown), and
    layout."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]
    spec: Entries

    @property
    def entries(self) -> Entries:
        """The layout with an entry for every dimension."""
        return (*self.spec, *[None] * (len(self.shape) - len(self.spec)))


@dataclass(frozen=True)
class Selection:
    """What of a plan is exported. `tree`: a pytree of flat input numbers; `items`: by flat input number; `given`: what the user
    selected it by."""

    plan: Plan
    tree: Any
    items: Mapping[int, Item]
    given: Any = None

    def spec(self, number: int) -> PartitionSpec:
        """The layout of one flat input."""
        return self.plan.partition_spec_of(number)


@dataclass(frozen=True)
class Written:
    """What a file says: its text, and the same as what JSON holds."""

    text: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Exporter:
    """One target.

    `gives`: what it makes, for help and errors. `build`: the target's own objects from a selection; its keywords are the
    exporter's options. `write`: the same as a file, from a saved plan and the paths wanted; None where there is no such file.
    `apart`: whether it can say on which devices an array lies, as arrays of stages on sub-meshes lie on some of them only.
    """

    gives: str
    build: Callable[..., Any]
    write: Callable[[SavedPlan, str | None], Written] | None = None
    apart: bool = False
