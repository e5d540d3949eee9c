"""A YAML file of logical axis rules in the form that MaxText's configurations have."""

from __future__ import annotations

import json

from jaxplan.export.names import Entry, LogicalAxes, logical_axes
from jaxplan.export.nouns import Exporter, Selection, Written
from jaxplan.export.select import items_at, items_of
from jaxplan.files import SavedPlan


def build(selection: Selection) -> str:
    """The file's text."""
    return _yaml(selection.plan.axis_sizes, logical_axes(items_of(selection)))


def write(saved: SavedPlan, path: str | None) -> Written:
    """The same from a saved plan."""
    axes = logical_axes(items_at(saved, path))
    rules = [[name, _listed(entry)] for name, entry in axes.rules.items()]
    data = {"mesh_axes": list(saved.mesh_shape), "logical_axis_rules": rules, "logical_axes": dict(axes.names)}
    return Written(_yaml(saved.mesh_shape, axes), data)


def _yaml(mesh: dict[str, int], axes: LogicalAxes) -> str:
    """`mesh_axes` and `logical_axis_rules` ([name, [mesh axes]]) over MaxText's base configuration, which forbids other keys; so
    the names of dimensions, per path, are comments.

    Values are written as JSON, which is YAML.
    """
    lines = [
        f"# Planned for the mesh {', '.join(f'{axis}={size}' for axis, size in mesh.items())}.",
        "base_config: base.yml",
        f"mesh_axes: {json.dumps(list(mesh))}",
        "logical_axis_rules:",
        *[f"- {json.dumps([name, _listed(entry)])}" for name, entry in axes.rules.items()],
        "# The names of the dimensions, by path:",
        *[f"#   {json.dumps(path)}: {json.dumps(names)}" for path, names in axes.names.items()],
        "",
    ]
    return "\n".join(lines)


def _listed(entry: Entry) -> list[str]:
    return [] if entry is None else [entry] if isinstance(entry, str) else list(entry)


MAXTEXT = Exporter("logical axis rules as YAML, in MaxText's form", build, write)
