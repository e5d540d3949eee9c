"""Room `state`: arrays that go round (parameters, optimizer state) made where the plan wants them, and checked to be there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import keystr, tree_flatten_with_path

from jaxplan.plan import Plan
from jaxplan.report import show_bytes
from jaxplan.trace import like_subtrees

SHOWN = 8


class LayoutError(ValueError):
    """Live arrays do not lie where the plan says."""


def init(plan: Plan, init_fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """`init_fn(*args, **kwargs)`, compiled so that every device makes only its own part of the result.

    The result, or sub-trees of it, must be structured and shaped as arguments of the planned function are.
    """
    shapes = jax.eval_shape(init_fn, *args, **kwargs)
    shardings = _shardings(plan, shapes, f"the result of {getattr(init_fn, '__name__', 'init_fn')}")
    groups: dict[Any, list[int]] = {}
    for number, sharding in enumerate(jax.tree.leaves(shardings)):
        groups.setdefault(sharding.mesh, []).append(number)
    if len(groups) < 2:
        return jax.jit(init_fn, out_shardings=shardings)(*args, **kwargs)
    made: dict[int, Any] = {}
    for numbers in groups.values():  # stages on devices of their own: each makes what lies there

        def some(*args: Any, numbers: Sequence[int] = tuple(numbers), **kwargs: Any) -> list[Any]:
            leaves = jax.tree.leaves(init_fn(*args, **kwargs))
            return [leaves[number] for number in numbers]

        places = [jax.tree.leaves(shardings)[number] for number in numbers]
        made.update(zip(numbers, jax.jit(some, out_shardings=places)(*args, **kwargs), strict=True))
    return jax.tree.structure(shardings).unflatten([made[number] for number in sorted(made)])


@dataclass(frozen=True)
class Misplaced:
    """One array that lies elsewhere: its path, what the plan says, where it is, how many bytes per device it holds too many."""

    path: str
    planned: str
    found: str
    extra_bytes: float

    def __str__(self) -> str:
        extra = f", {show_bytes(self.extra_bytes)} per device too many" if self.extra_bytes > 0 else ""
        return f"{self.path}: planned {self.planned}, found {self.found}{extra}"


def check(plan: Plan, state: Any) -> None:
    """Raise `LayoutError`, naming paths, where arrays of `state` lie otherwise than the plan says."""
    wanted = jax.tree.leaves(_shardings(plan, state, "the state"))
    found = []
    for (path, leaf), sharding in zip(tree_flatten_with_path(state)[0], wanted, strict=True):
        if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            continue
        found.append(_misplaced(_name(path), leaf, sharding))
    if found:
        worst = sorted(found, key=lambda one: -one.extra_bytes)
        more = [f"and {len(worst) - SHOWN} more"] if len(worst) > SHOWN else []
        lines = "\n  ".join([*map(str, worst[:SHOWN]), *more])
        raise LayoutError(
            f"{len(found)} of {len(wanted)} arrays do not lie where the plan says:\n  {lines}\n"
            "Make them with plan.init(init_fn, ...), or move them with jax.device_put to plan.in_shardings."
        )


def _misplaced(path: str, leaf: Any, sharding: NamedSharding) -> Misplaced:
    planned = str(sharding.spec).replace("PartitionSpec", "P")
    if not isinstance(leaf, jax.Array):
        return Misplaced(path, planned, f"a {type(leaf).__name__} on the host", 0.0)
    now = leaf.sharding
    size, shape = leaf.dtype.itemsize, leaf.shape
    extra = size * (np.prod(now.shard_shape(shape), dtype=float) - np.prod(sharding.shard_shape(shape), dtype=float))
    if isinstance(now, NamedSharding):
        found = str(now.spec).replace("PartitionSpec", "P")
        if now.mesh.shape != sharding.mesh.shape or now.device_set != sharding.device_set:
            found += f" on another mesh, {dict(now.mesh.shape)}"
    else:
        found = f"{type(now).__name__} on {len(now.device_set)} device{'s' if len(now.device_set) > 1 else ''}"
    return Misplaced(path, planned, found, float(extra))


def _shardings(plan: Plan, tree: Any, what: str) -> Any:
    """The planned shardings of arrays that are structured as some of the plan's arguments, in a tree like theirs."""
    if not isinstance(plan.mesh, Mesh):
        raise ValueError("this plan was made for an AbstractMesh; use plan.replan(mesh=...) with a mesh of devices first")
    return jax.tree.structure(tree).unflatten([plan.input_sharding(position) for position in planned_inputs(plan, tree, what)])


def planned_inputs(plan: Plan, tree: Any, what: str) -> list[int]:
    """Per leaf of arrays (or shapes) that are structured as some of the plan's arguments, the flat input that it stands for.

    Sub-trees are matched by structure, shapes and dtypes, never by name. Raises ValueError, naming the path, for a leaf that
    stands for no argument, or for several that are laid out differently. `what`: what the tree is called in errors.
    """
    traced = plan.traced
    entries, structure = tree_flatten_with_path(tree)
    numbers = structure.unflatten(range(len(entries)))
    leaves = [leaf if hasattr(leaf, "dtype") else np.asarray(leaf) for _, leaf in entries]
    arguments = traced.unflatten_inputs(range(len(traced.in_avals)))
    places = dict(like_subtrees(numbers, leaves, arguments, traced.in_avals))
    specs = [plan.partition_spec_of(position) for position in range(len(traced.in_avals))]
    found = []
    for number, (path, leaf) in enumerate(zip([p for p, _ in entries], leaves, strict=True)):
        candidates = places.get(number, ())
        shown = f"{_name(path)} ({leaf.dtype}[{','.join(map(str, leaf.shape))}])"
        if not candidates:
            raise ValueError(
                f"{what}: {shown} stands for no argument of {traced.name}; return what its arguments are made of, for instance "
                f"({', '.join(dict.fromkeys(path.split('/')[0] for path in traced.in_paths))})"
            )
        if len(entries) > 1 or len({specs[i] for i in candidates}) == 1:
            found.append(candidates[0])
            continue
        some = ", ".join(f"{traced.in_paths[i]} {specs[i]}" for i in candidates[:4])
        raise ValueError(f"{what}: {shown} may stand for several arguments of {traced.name}, laid out differently: {some}")
    return found


def _name(path: Any) -> str:
    return str(keystr(path, simple=True, separator="/")) or "it"
