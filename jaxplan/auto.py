"""`auto_shard`: a function that is planned on its first call per argument shapes, then a cached jitted call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxplan import _jax
from jaxplan.api import Plan, keywords, make_plan, meant
from jaxplan.apply import PlannedFunction
from jaxplan.asked import check_mesh
from jaxplan.trace import static_values


def auto_shard(mesh: Any, **options: Any) -> Callable[[Callable[..., Any]], AutoSharded]:
    """Decorate a function: it is planned on its first call per argument shapes, then runs as a cached jitted call.

    Takes the keywords of `make_plan`. The result exposes `.plan(*args)` and `.lower(*args)`. A method is decorated as with
    `jax.jit`: its instance is an argument like any other, a pytree or static.

    Raises TypeError, when decorating, if `mesh` is no mesh or a keyword is none of `make_plan`'s.
    """
    if callable(mesh) and not isinstance(mesh, jax.sharding.Mesh):
        name = getattr(mesh, "__name__", "function")
        raise TypeError(f"auto_shard takes the mesh, then the function: write @jaxplan.auto_shard(mesh) above {name!r}")
    check_mesh(mesh)
    _check_options(options)

    def decorate(fn: Callable[..., Any]) -> AutoSharded:
        return AutoSharded(fn, mesh, options)

    return decorate


def _check_options(options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in keywords():
            raise TypeError(f"auto_shard does not take {name!r}; {meant(name)}")


class AutoSharded:
    """A function that plans itself."""

    def __init__(self, fn: Callable[..., Any], mesh: Any, options: dict[str, Any]) -> None:
        functools.update_wrapper(self, fn)
        self._fn, self._mesh, self._options = fn, mesh, options
        self._known: dict[Any, _Entry] = {}

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else _Method(self, instance)

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
        static = static_values(
            self._fn, args, kwargs, self._options.get("static_argnums"), self._options.get("static_argnames")
        )
        dynamic = [a for i, a in enumerate(args) if i not in static], {k: v for k, v in kwargs.items() if k not in static}
        leaves, tree = jax.tree.flatten(dynamic)
        inside = any(isinstance(leaf, _jax.Tracer) for leaf in leaves)  # of another program: what is planned has to be one, too
        key = (tree, tuple(map(_signature, leaves)), tuple(static.items()), inside)
        known = self._known.get(key)
        if known is None:
            plan = make_plan(self._fn, *args, mesh=self._mesh, **self._options, **kwargs)
            known = self._known[key] = _Entry(plan)
        return known


class _Method:
    """An `AutoSharded` looked up on an instance, which becomes its first argument, as with a method under `jax.jit`."""

    def __init__(self, function: AutoSharded, instance: Any) -> None:
        functools.update_wrapper(self, function)
        self.plan = functools.partial(function.plan, instance)
        self.lower = functools.partial(function.lower, instance)
        self._call = functools.partial(function, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


@dataclass
class _Entry:
    """What an `AutoSharded` keeps per argument shapes; `run` is made on the first call."""

    plan: Plan
    run: PlannedFunction | None = None


def _signature(leaf: Any) -> Any:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return (tuple(leaf.shape), str(leaf.dtype), getattr(leaf, "weak_type", False))
    return type(leaf)
