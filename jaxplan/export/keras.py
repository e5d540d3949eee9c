"""Keras: a `LayoutMap` for `keras.distribution.ModelParallel`."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import jax
from jax.sharding import Mesh

from jaxplan.export.libraries import library
from jaxplan.export.nouns import Exporter, ExportError, Selection


def build(selection: Selection, *, variables: Any = None) -> Any:
    """A `keras.distribution.LayoutMap` on the plan's devices, with an entry for each variable, by its `path`.

    `variables`: those that stand where the selected arrays do (`model.trainable_variables`); needed where the selection was by
    path. Raises ExportError, naming them, for variables with a dimension over several mesh axes, which Keras has no words for,
    and for two variables of one path.
    """
    keras = library("keras", "keras")
    if keras.backend.backend() != "jax":
        raise ExportError(f"Keras runs on {keras.backend.backend()!r} here: set KERAS_BACKEND=jax before Keras is imported")
    plan = selection.plan
    if not isinstance(plan.mesh, Mesh):
        raise ExportError("a LayoutMap is about devices, and this plan was made for an AbstractMesh: replan(mesh=...) it first")
    numbers = jax.tree.leaves(selection.tree)
    found = jax.tree.leaves(selection.given if variables is None else variables)
    if len(found) != len(numbers) or not all(hasattr(variable, "path") for variable in found):
        raise ExportError(
            f"{len(numbers)} arrays are selected, and {len(found)} Keras variables are given for them: Keras finds layouts by a "
            "variable's path, so export('keras', model.trainable_variables), or give variables= in the arrays' order"
        )
    layouts = [(variable.path, selection.items[number].entries) for variable, number in zip(found, numbers, strict=True)]
    wide = [path for path, entries in layouts if any(isinstance(entry, tuple) for entry in entries)]
    if wide:
        raise ExportError(
            "Keras shards a dimension over one mesh axis, and this plan needs several for: "
            + ", ".join(wide)
            + ". Plan on a mesh where these axes are one, or pin these arrays with pins="
        )
    twice = {path for path, count in Counter(path for path, _ in layouts).items() if count > 1}
    if twice:
        raise ExportError(f"several Keras variables have one path: {', '.join(sorted(twice))}; name their layers apart")
    device_ids = [f"{device.platform}:{device.id}" for device in plan.mesh.devices.flat]
    mesh = keras.distribution.DeviceMesh(tuple(plan.axis_sizes.values()), list(plan.axis_names), device_ids)
    layout_map = keras.distribution.LayoutMap(mesh)
    for path, entries in layouts:
        layout_map[re.escape(path)] = entries
    return layout_map


KERAS = Exporter("a LayoutMap for Keras", build)
