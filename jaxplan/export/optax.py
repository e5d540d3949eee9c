"""Optax: PartitionSpecs for an optimizer's state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jax.tree_util import keystr, tree_flatten_with_path

from jaxplan.export.libraries import library
from jaxplan.export.nouns import Exporter, ExportError, Selection
from jaxplan.plan import Plan

Planner = Callable[..., Plan]
"""`make_plan`, which is not this room's to import."""


def build(selection: Selection, *, planner: Planner, optimizer: Any = None) -> Any:
    """A pytree of PartitionSpecs, structured like the state of an optimizer.

    Without `optimizer`: of the selected arguments, which are such a state. With an `optax.GradientTransformation`: of the state
    it keeps for the selected arguments, the parameters. Whole sub-trees of it that are structured and shaped like the parameters
    (moments) lie as they do; counts and other scalars are everywhere; what is left (factored moments, say) is planned: the update
    is traced, and laid out with all that is known pinned. No name is looked at.
    """
    plan, traced = selection.plan, selection.plan.traced
    if optimizer is None:
        return jax.tree.map(selection.spec, selection.tree)
    library("optax", "optax")
    if not hasattr(optimizer, "init") or not hasattr(optimizer, "update"):
        raise ExportError(f"optimizer must be an optax.GradientTransformation, got {type(optimizer).__name__}")
    numbers = jax.tree.leaves(selection.tree)
    params = jax.tree.map(lambda number: traced.in_avals[number], selection.tree)
    state = jax.eval_shape(optimizer.init, params)
    leaves, structure = jax.tree.flatten(state)
    known = {leaf: selection.spec(numbers[like]) for leaf, like in _like_parameters(state, params).items()}
    known.update({number: PartitionSpec() for number, leaf in enumerate(leaves) if leaf.size <= 1 and number not in known})
    if len(known) < len(leaves):
        specs = jax.tree.map(selection.spec, selection.tree)
        known = _planned(plan, planner, optimizer, (params, specs), (state, known))
    return structure.unflatten([known[number] for number in range(len(leaves))])


def _like_parameters(state: Any, params: Any) -> dict[int, int]:
    """{leaf of the state: leaf of the parameters} for sub-trees of the state that are structured and shaped as the parameters."""
    leaves, structure = jax.tree.flatten(state)
    shapes, tree = [leaf.shape for leaf in jax.tree.leaves(params)], jax.tree.structure(params)

    def alike(node: Any) -> bool:
        return jax.tree.structure(node) == tree and [leaves[number].shape for number in jax.tree.leaves(node)] == shapes

    found: dict[int, int] = {}
    for node in jax.tree.leaves(structure.unflatten(range(len(leaves))), is_leaf=alike):
        if alike(node):
            found.update({number: like for like, number in enumerate(jax.tree.leaves(node))})
    return found


def _planned(
    plan: Plan, planner: Planner, optimizer: Any, parameters: tuple[Any, Any], state: tuple[Any, dict[int, PartitionSpec]]
) -> dict[int, PartitionSpec]:
    """The layouts of all leaves of a state, some known: the update is planned with those, the parameters' and the gradients'
    pinned."""
    (params, specs), (shapes, known) = parameters, state

    def update(gradients: Any, state: Any, params: Any) -> Any:
        return optimizer.update(gradients, state, params)

    paths = [path for path, _ in tree_flatten_with_path(shapes)[0]]
    pins = {_path("state", paths[number]): spec for number, spec in known.items()}
    for path, spec in tree_flatten_with_path(specs, is_leaf=lambda node: isinstance(node, PartitionSpec))[0]:
        pins[_path("params", path)] = pins[_path("gradients", path)] = spec
    machine = plan.modelled.numbers.machine
    found = planner(update, params, shapes, params, mesh=plan.mesh, machine=machine, memory_budget=math.inf, pins=pins)
    return dict(enumerate(jax.tree.leaves(found.in_specs[1], is_leaf=lambda node: isinstance(node, PartitionSpec))))


def _path(argument: str, path: Any) -> str:
    return f"{argument}/{keystr(path, simple=True, separator='/')}" if path else argument


OPTAX = Exporter("PartitionSpecs for the state of an Optax optimizer", build)
