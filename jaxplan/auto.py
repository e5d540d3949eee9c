"""`auto_shard`: a function that is planned on its first call per argument shapes, then a cached jitted call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jaxplan.api import Plan, make_plan
from jaxplan.apply import PlannedFunction
from jaxplan.trace import static_values


def auto_shard(mesh: Any, **options: Any) -> Callable[[Callable[..., Any]], AutoSharded]:
    """Decorate a function: it is planned on its first call per argument shapes, then runs as a cached jitted call.

    Takes the keywords of `make_plan`. The result exposes `.plan(*args)` and `.lower(*args)`.
    """

    def decorate(fn: Callable[..., Any]) -> AutoSharded:
        return AutoSharded(fn, mesh, options)

    return decorate


class AutoSharded:
    """A function that plans itself."""

    def __init__(self, fn: Callable[..., Any], mesh: Any, options: dict[str, Any]) -> None:
        functools.update_wrapper(self, fn)
        self._fn, self._mesh, self._options = fn, mesh, options
        self._known: dict[Any, _Entry] = {}

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """The plan for these arguments (arrays or shapes); made once per structure, shapes and static values."""
        return self._entry(args, kwargs).plan

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Like `jax.jit(f).lower`."""
        return self._planned(args, kwargs).lower(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._planned(args, kwargs)(*args, **kwargs)

    def _planned(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PlannedFunction:
        entry = self._entry(args, kwargs)
        if entry.run is None:
            entry.run = entry.plan.jit()
        return entry.run

    def _entry(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Entry:
        static = static_values(args, kwargs, self._options.get("static_argnums"), self._options.get("static_argnames"))
        dynamic = [a for i, a in enumerate(args) if i not in static], {k: v for k, v in kwargs.items() if k not in static}
        leaves, tree = jax.tree.flatten(dynamic)
        key = (tree, tuple(map(_signature, leaves)), tuple(static.items()))
        known = self._known.get(key)
        if known is None:
            plan = make_plan(self._fn, *args, mesh=self._mesh, **self._options, **kwargs)
            known = self._known[key] = _Entry(plan)
        return known


@dataclass
class _Entry:
    """What an `AutoSharded` keeps per argument shapes; `run` is made on the first call."""

    plan: Plan
    run: PlannedFunction | None = None


def _signature(leaf: Any) -> Any:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return (tuple(leaf.shape), str(leaf.dtype), getattr(leaf, "weak_type", False))
    return type(leaf)
