"""Which arrays of a plan are meant: all arguments, those at a path, or those structured as a given pytree."""

from __future__ import annotations

import difflib
from typing import Any

import jax
from jax.tree_util import keystr, tree_flatten_with_path

from jaxplan.export.nouns import ExportError, Item, Selection
from jaxplan.files import SavedPlan, input_leaves
from jaxplan.files.derive import entries_of
from jaxplan.files.fold import unique_paths
from jaxplan.plan import Plan
from jaxplan.state import planned_inputs


def select(plan: Plan, of: Any = None) -> Selection:
    """`of`: None for all arguments, as `plan.in_specs` has them; a path ("params", "state/params"), or a pytree of paths; or
    a pytree of arrays or shapes that are structured as some of the arguments."""
    items = _items(plan)
    args, kwargs = plan.traced.unflatten_inputs(range(len(items)))
    leaves = jax.tree.leaves(of)
    if of is None:
        tree = (args, kwargs) if kwargs else args
    elif leaves and all(isinstance(leaf, str) for leaf in leaves):
        tree = jax.tree.map(lambda path: _at(plan, (args, kwargs), path), of)
    else:
        shapes = jax.tree.map(_abstract, of)
        tree = jax.tree.structure(shapes).unflatten(planned_inputs(plan, shapes, "what is to be exported"))
    return Selection(plan, tree, items, of)


def _items(plan: Plan) -> dict[int, Item]:
    """Per flat input. Of a plan in stages on sub-meshes, specs are those on the sub-mesh where an array lies."""
    if getattr(plan, "stage_plans", ()):
        pairs = zip(unique_paths(plan.traced.in_paths), plan.traced.in_avals, strict=True)
        return {
            number: Item(path, tuple(aval.shape), str(aval.dtype), (), entries_of(plan.partition_spec_of(number)))
            for number, (path, aval) in enumerate(pairs)
        }
    leaves = input_leaves(plan).items()
    return {number: Item(path, leaf.shape, leaf.dtype, leaf.dims, leaf.spec) for number, (path, leaf) in enumerate(leaves)}


def items_of(selection: Selection) -> list[Item]:
    """Those selected, in order."""
    return [selection.items[number] for number in jax.tree.leaves(selection.tree)]


def items_at(saved: SavedPlan, path: str | None) -> list[Item]:
    """Those of a saved plan at a path (None: all). Raises ExportError where there are none."""
    found = [
        Item(name, leaf.shape, leaf.dtype, leaf.dims, leaf.spec)
        for name, leaf in saved.inputs.items()
        if path is None or name == path or name.startswith(path + "/")
    ]
    if not found:
        raise ExportError(_nothing_at(str(path), list(saved.inputs), saved.function))
    return found


def _abstract(leaf: Any) -> Any:
    """Anything with a shape and a dtype (a Keras variable, say) as a shape; the rest as it is."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
    return leaf


def _at(plan: Plan, arguments: tuple[Any, ...], path: str) -> Any:
    """The sub-tree at a path, one level of the arguments at a time: a key may itself have a slash."""
    names = plan.traced.in_paths
    args, kwargs = arguments
    level = [(_argument(names, arg), arg) for arg in args] + [(name, arg) for name, arg in kwargs.items()]
    while level:
        for name, node in level:
            if name == path:
                return node
        level = [
            (f"{name}/{keystr(key, simple=True)}", child)
            for name, node in level
            if path.startswith(f"{name}/")
            for key, child in tree_flatten_with_path(node, is_leaf=lambda x, node=node: x is not node)[0]
            if key
        ]
    raise ExportError(_nothing_at(path, list(names), plan.traced.name))


def _argument(names: tuple[str, ...], argument: Any) -> str:
    """The name of an argument, from the path of its first leaf; "" for one without leaves."""
    entries = tree_flatten_with_path(argument)[0]
    if not entries:
        return ""
    key, number = entries[0]
    return names[number].removesuffix(f"/{keystr(key, simple=True, separator='/')}") if key else names[number]


def _nothing_at(path: str, paths: list[str], name: str) -> str:
    near = difflib.get_close_matches(path, [*dict.fromkeys(p.partition("/")[0] for p in paths), *paths], 3, 0.3)
    return f"no input of {name} lies at {path!r}; the closest are {', '.join(near) or ', '.join(paths[:3])}"
