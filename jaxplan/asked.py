"""Room `asked`: whether what a user asks of a plan makes sense, before anything is traced or searched."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

AUTO = "auto"


def check_mesh(mesh: Any) -> None:
    """Raise TypeError unless it is a mesh, ValueError if an axis of it is of type Manual."""
    if not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
        raise TypeError(
            f"mesh must be a jax.sharding.Mesh or AbstractMesh, got {type(mesh).__name__}: write jax.make_mesh((4, 2), "
            "('data', 'model')), or without devices AbstractMesh((4, 2), ('data', 'model'))"
        )
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    manual = [name for name, kind in kinds if kind == jax.sharding.AxisType.Manual]
    if manual:
        raise ValueError(
            f"mesh axis {manual[0]!r} is of type Manual, which means inside of a shard_map over it: nothing is left to plan "
            "along it. Give a mesh whose axes are Auto or Explicit; a shard_map inside the planned function is kept as it is"
        )


def check_certify(certify: bool | float) -> None:
    """Raise ValueError unless it is a bool, or seconds."""
    if not isinstance(certify, (bool, int, float)) or not 0 <= certify < math.inf:
        raise ValueError(f"certify must be True, False, or seconds for an integer program, got {certify!r}")


def check_pipeline(asked: Any, count: Any) -> None:
    """Raise ValueError unless they say what to lay along layers (`pipeline`), and in how many micro-batches (`microbatches`)."""
    if asked is not None and not isinstance(asked, str):
        raise ValueError(f"pipeline must be 'auto', None, or the name of a mesh axis, got {asked!r}")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ValueError(f"microbatches must be a whole number of at least 1, or None, got {count!r}")
    if count is not None and asked is None:
        raise ValueError(f"microbatches={count} without a pipeline: give pipeline='auto', or the axis to lay along the layers")


def check_keywords(fn: Callable[..., Any], kwargs: Mapping[str, Any], meant: Callable[[str], str]) -> None:
    """Raise TypeError for a keyword that is neither `make_plan`'s nor the function's. `meant`: what to do about one."""
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in kwargs:
        if name not in parameters:
            raise TypeError(f"make_plan does not take {name!r}, and neither does {getattr(fn, '__name__', fn)!r}; {meant(name)}")
