"""Flax: logical axis names and rules for Linen, sharding metadata for NNX."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxplan.export.libraries import library
from jaxplan.export.names import Entry, logical_axes
from jaxplan.export.nouns import Exporter, ExportError, Selection, Written
from jaxplan.export.select import items_at, items_of
from jaxplan.files import SavedPlan


@dataclass(frozen=True)
class FlaxAxes:
    """`rules`: what `flax.linen.logical_axis_rules` takes. `names`: a pytree of `PartitionSpec`s of logical names, as
    `flax.linen.get_partition_spec` gives it: `flax.linen.logical_to_mesh_sharding(names, mesh, rules)` is the plan's layout."""

    rules: tuple[tuple[str, Entry], ...]
    names: Any

    def boxed(self, params: Any) -> Any:
        """The same parameters (arrays or shapes) in `flax.linen.LogicallyPartitioned` boxes, as a model that names its axes with
        `with_logical_partitioning` has them."""
        linen = library("flax.linen", "flax")
        return jax.tree.map(
            lambda names, leaf: linen.LogicallyPartitioned(leaf, tuple(names)), self.names, params, is_leaf=_is_spec
        )


def build_linen(selection: Selection) -> FlaxAxes:
    """Rules and names for Flax Linen."""
    library("flax.linen", "flax")
    axes = logical_axes(items_of(selection))
    names = jax.tree.map(lambda number: PartitionSpec(*axes.names[selection.items[number].path]), selection.tree)
    return FlaxAxes(tuple(axes.rules.items()), names)


def write_linen(saved: SavedPlan, path: str | None) -> Written:
    """The same as a Python module: `RULES`, and `NAMES` by path."""
    axes = logical_axes(items_at(saved, path))
    lines = [
        '"""Logical axis rules for Flax Linen, and the logical axis names of every array. They are yours to edit."""',
        "",
        "RULES = (",
        *[f"    ({_quoted(name)}, {_python(entry)})," for name, entry in axes.rules.items()],
        ")",
        "",
        "NAMES = {",
        *[f"    {_quoted(path)}: {_python(names)}," for path, names in axes.names.items()],
        "}",
        "",
    ]
    return Written("\n".join(lines), {"rules": dict(axes.rules), "names": dict(axes.names)})


def build_nnx(selection: Selection) -> Any:
    """The selected state with its variables' `out_sharding` metadata set: `nnx.get_partition_spec` reads the plan off it.

    Values are those given, or `jax.ShapeDtypeStruct`s where the state was selected by path. Raises ExportError where an array is
    in no `nnx.Variable`.
    """
    nnx = library("flax.nnx", "flax")
    traced, given = selection.plan.traced, jax.tree.leaves(selection.given)
    held = dict(enumerate(traced.in_avals))
    if given and not isinstance(given[0], str):
        held = dict(zip(jax.tree.leaves(selection.tree), given, strict=True))

    def marked(node: Any) -> Any:
        if not isinstance(node, nnx.Variable):
            raise ExportError(
                f"{selection.items[node].path} is in no nnx.Variable, and NNX keeps layouts on variables: export a part of the "
                "arguments that is an nnx.State (of='state', or the state itself), or the rest in the format 'orbax' or 'flax'"
            )
        numbers = jax.tree.leaves(node)
        shapes = jax.tree.map(lambda number: held[number], node)
        specs = {selection.spec(number) for number in numbers}
        if len(specs) > 1:
            paths = ", ".join(selection.items[number].path for number in numbers)
            raise ExportError(f"one nnx.Variable holds several arrays with layouts of their own: {paths}; NNX has one for all")
        variable = shapes.copy()
        ndim = max((len(traced.in_avals[number].shape) for number in numbers), default=0)
        spec = tuple(specs.pop()) if specs else ()
        variable.set_metadata(out_sharding=(*spec, *[None] * (ndim - len(spec))))
        return variable

    return jax.tree.map(marked, selection.tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)


def _python(value: Entry) -> str:
    """None, "x" or ("x", "y") as Python with double quotes."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_quoted, value))}{',' if len(value) == 1 else ''})"
    return "None" if value is None else _quoted(value)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


LINEN = Exporter("logical axis rules and names for Flax Linen", build_linen, write_linen)
NNX = Exporter("an nnx.State with sharding metadata for Flax NNX", build_nnx)
