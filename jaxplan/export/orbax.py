"""Orbax: what to restore into, and restoring with what does not fit named by path."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxplan.export.libraries import library
from jaxplan.export.nouns import Exporter, ExportError, Selection

MOST_NAMED = 8
"""Paths that an error names of each kind; of more it gives the number."""


class CheckpointError(ValueError):
    """A checkpoint that does not hold what the plan's arguments are. The message names the paths."""


def build(selection: Selection) -> Any:
    """The selected arrays as `jax.ShapeDtypeStruct`s with the plan's shardings: the target that Orbax restores into.

    Raises ExportError for a plan made for an AbstractMesh.
    """
    plan = selection.plan
    if not isinstance(plan.mesh, Mesh):
        raise ExportError(
            "arrays are restored onto devices, and this plan was made for an AbstractMesh: replan(mesh=...) it first"
        )

    def target(number: int) -> jax.ShapeDtypeStruct:
        aval = plan.traced.in_avals[number]
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=plan.input_sharding(number))

    return jax.tree.map(target, selection.tree)


def restore(selection: Selection, directory: str | os.PathLike[str], partial: bool) -> Any:
    """The selected arrays, read from the checkpoint in a directory to where the plan wants them.

    Every process of the mesh calls it. `partial`: what the checkpoint holds beside them stays unread. Raises CheckpointError,
    naming the paths, where leaves are missing, too many (unless partial), or of another shape or dtype, before anything is read;
    and where the directory holds no checkpoint.
    """
    orbax, target = library("orbax.checkpoint", "orbax-checkpoint"), build(selection)
    path = Path(directory).absolute()
    with orbax.StandardCheckpointer() as checkpointer:
        check(orbax, path, _saved_tree(checkpointer, path), target, partial)
        if not partial:
            return checkpointer.restore(path, target)
    wanted = orbax.checkpoint_utils.construct_restore_args(target)
    with orbax.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(
            path, args=orbax.args.PyTreeRestore(item=target, restore_args=wanted, partial_restore=True)
        )


def _saved_tree(checkpointer: Any, path: Path) -> Any:
    """The metadata of a checkpoint: a tree of what has a shape and a dtype."""
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}: no such directory")
    saved = checkpointer.metadata(path)
    tree = getattr(getattr(saved, "item_metadata", saved), "tree", None)
    if tree is None:
        inside = sorted(entry.name for entry in path.iterdir() if entry.is_dir())[:MOST_NAMED]
        hint = f"; it has the directories {', '.join(inside)}: a checkpoint manager's steps and items lie there" if inside else ""
        raise CheckpointError(f"{path} is no checkpoint of a pytree{hint}")
    return tree


def check(orbax: Any, path: Path, saved: Any, target: Any, partial: bool = False) -> None:
    """Raise CheckpointError unless a checkpoint's leaves are the target's, or have them among others (`partial`)."""
    have = {_name(key): leaf for key, leaf in orbax.tree.to_flat_dict(saved).items() if hasattr(leaf, "dtype")}
    want = {_name(key): leaf for key, leaf in orbax.tree.to_flat_dict(target).items()}
    told = []
    missing = [f"{name} ({_kind(leaf)})" for name, leaf in want.items() if name not in have]
    extra = [f"{name} ({_kind(leaf)})" for name, leaf in have.items() if name not in want and not partial]
    other = [
        f"{name} is {_kind(have[name])}, planned {_kind(leaf)}"
        for name, leaf in want.items()
        if name in have and _differ(have[name], leaf)
    ]
    for what, names in (("missing", missing), ("of another shape or dtype", other), ("not asked for", extra)):
        if names:
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            told.append(f"  {what}: {', '.join(names[:MOST_NAMED])}{more}")
    if told:
        raise CheckpointError(
            f"the checkpoint {path} does not hold what was planned for, and nothing was read:\n"
            + "\n".join(told)
            + f"\n{_remedy(set(have), set(want), bool(other))}"
        )


def _remedy(have: set[str], want: set[str], other: bool) -> str:
    """What to do about a checkpoint that holds something else."""
    if not other and want <= have:
        return "Restore with partial=True, which leaves unread what is not asked for, or select all that it holds with of="
    heads = [head for head in sorted({name.partition("/")[0] for name in have}) if all(f"{head}/{name}" in have for name in want)]
    if heads:
        return f"It holds this under {heads[0]!r}: select with of={{{heads[0]!r}: ...}}, and partial=True where it holds more"
    return "Select what it holds with of=, plan for its shapes, or restore by hand into plan.export('orbax')"


def _differ(saved: Any, wanted: Any) -> bool:
    if jnp.issubdtype(wanted.dtype, jax.dtypes.prng_key):  # saved as the numbers that it is made of
        return tuple(saved.shape[: wanted.ndim]) != tuple(wanted.shape) or math.prod(saved.shape) == 0
    return tuple(saved.shape) != tuple(wanted.shape) or saved.dtype != wanted.dtype


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape or ()))}]"


def _name(key: tuple[str, ...]) -> str:
    return "/".join(map(str, key)) or "it"


ORBAX = Exporter("abstract arrays with shardings, to restore into with Orbax", build, apart=True)
