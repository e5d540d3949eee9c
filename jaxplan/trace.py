"""Room `trace`: a user's function and abstract arguments become a `Traced`. Knows nothing of meshes."""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.tree_util import keystr, tree_flatten_with_path, tree_leaves, tree_structure, tree_unflatten

from jaxplan import _jax
from jaxplan.rolls import with_rolls


class TraceError(ValueError):
    """The arguments cannot be traced, for a reason jaxplan can name before JAX is asked."""


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Planning makes many small objects and no cycles; collecting meanwhile would walk JAX's whole heap again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass(frozen=True)
class Traced:
    """A function as JAX sees it.

    `jaxpr`: the closed jaxpr, without equations that nothing comes of; its flat inputs and outputs are described by the other
    fields.
    `in_paths`, `out_paths`: a readable pytree path per flat input ("params/blk/wq") and output.
    `in_avals`, `out_avals`: objects with `shape` and `dtype`. `in_tree`: structure of `(args, kwargs)` without static
    arguments; `out_tree`: structure of the result. `donated`: per flat input. `apart`: paths of calls that are compiled as
    programs of their own, so that what is moved for one of them is moved again for another (`graph.flatten`).
    """

    jaxpr: Any
    name: str
    in_tree: Any
    out_tree: Any
    in_paths: tuple[str, ...]
    out_paths: tuple[str, ...]
    in_avals: tuple[Any, ...]
    out_avals: tuple[Any, ...]
    donated: tuple[bool, ...]
    apart: frozenset[tuple[Any, ...]] = frozenset()

    def unflatten_inputs(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Flat values, one per input -> (args, kwargs)."""
        return tree_unflatten(self.in_tree, leaves)

    def unflatten_outputs(self, leaves: Sequence[Any]) -> Any:
        """Flat values, one per output -> the function's result structure."""
        return tree_unflatten(self.out_tree, leaves)


def trace(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Sequence[str] | None = None,
    keep_dead: bool = False,
) -> Traced:
    """Trace `fn(*args, **kwargs)` once. Arrays, `jax.ShapeDtypeStruct`s, scalars and pytrees of them are accepted.

    `keep_dead`: equations that nothing comes of stay, and with them all that loops are given, and calls, for who counts on their
    places.

    A function already under `jax.jit` keeps its own static and donated arguments. Where arguments lie now does not matter, also
    where a mesh of Explicit axes has it in their types. Errors of the function itself are JAX's own, with one line of context
    added. Raises TypeError if `fn` is no function.
    """
    if not callable(fn):
        raise TypeError(f"what is planned must be a function, got {type(fn).__name__}: give the function, then its arguments")
    jitted: Any = fn
    if not hasattr(fn, "trace"):
        jitted = jax.jit(
            fn,
            static_argnums=static_argnums,
            static_argnames=static_argnames,
            donate_argnums=donate_argnums,
            donate_argnames=donate_argnames,
        )
    name = getattr(fn, "__name__", type(fn).__name__)
    static = static_values(fn, args, kwargs, static_argnums, static_argnames)
    try:
        staged = _staged(jitted, args, kwargs, static)
    except Exception as error:
        error.add_note(f"(jaxplan was tracing {name!r} to plan it; jax.jit({name})(...) stops here too)")
        if "as an abstract array" in str(error):
            error.add_note(
                "(what is no array is static: name the argument in static_argnums= or static_argnames=, or split it off a module "
                "as docs/frameworks.md shows)"
            )
        raise
    if not hasattr(staged, "args_info"):  # a framework's own jit, which takes its objects apart
        raise TypeError(
            f"{name!r} is a {type(fn).__module__}.{type(fn).__name__}, which is no jax.jit: plan the function under it, from "
            "arrays to arrays (docs/frameworks.md has the way of each framework)"
        )
    info = staged.args_info
    entries, in_tree = tree_flatten_with_path(info)
    names = _argument_names(fn, len(info[0]), len(args), [key for key in static if isinstance(key, int)])
    out_entries, out_tree = tree_flatten_with_path(staged.out_info)
    return Traced(
        jaxpr=with_rolls(staged.jaxpr, see_through=False) if keep_dead else with_rolls(_jax.without_dead(staged.jaxpr)),
        name=name,
        in_tree=in_tree,
        out_tree=out_tree,
        in_paths=tuple(_input_path(path, names) for path, _ in entries),
        out_paths=tuple(_show(path) or "result" for path, _ in out_entries),
        in_avals=tuple(_aval(leaf) for _, leaf in entries),
        out_avals=tuple(leaf for _, leaf in out_entries),
        donated=tuple(bool(leaf.donated) for _, leaf in entries),
    )


def _staged(jitted: Any, args: tuple[Any, ...], kwargs: dict[str, Any], static: Collection[int | str]) -> Any:
    """The function, traced. Layouts in the types of its arguments are left out; a function that does not trace without them,
    as one that looks its mesh up there, is traced with them."""
    free_args = [arg if place in static else jax.tree.map(_untyped, arg) for place, arg in enumerate(args)]
    free_kwargs = {name: arg if name in static else jax.tree.map(_untyped, arg) for name, arg in kwargs.items()}
    if any(map(_is_typed, tree_leaves((args, kwargs)))):
        with contextlib.suppress(Exception):
            return jitted.trace(*free_args, **free_kwargs)
    return jitted.trace(*args, **kwargs)


def _is_typed(leaf: Any) -> bool:
    """Whether an array's type says where it lies."""
    sharding = getattr(getattr(leaf, "aval", leaf), "sharding", None)
    return isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types


def _untyped(leaf: Any) -> Any:
    """An array's shape, if its type says where it lies; else the array."""
    if not _is_typed(leaf):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))


def _aval(info: Any) -> Any:
    return jax.ShapeDtypeStruct(info.shape, info.dtype)


def _show(path: Sequence[Any]) -> str:
    return str(keystr(tuple(path), simple=True, separator="/"))


def _input_path(path: Sequence[Any], names: Sequence[str]) -> str:
    """(args or kwargs index, position or name, ...) -> "name/rest"."""
    which, entry, *rest = path
    head = names[int(entry.idx)] if which.idx == 0 else str(entry.key)
    tail = _show(rest)
    return f"{head}/{tail}" if tail else head


def _argument_names(fn: Callable[..., Any], count: int, given: int, static: Collection[int]) -> list[str]:
    """The names of the `count` positional arguments that stay of those `given` after the static ones are taken out."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names: list[str] = []
    for position in range(given):
        if position < len(parameters) and parameters[position].kind is not inspect.Parameter.VAR_POSITIONAL:
            names.append(parameters[position].name)
        else:
            stem = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL), "arg")
            names.append(f"{stem}[{position}]")
    kept = [name for i, name in enumerate(names) if i not in static]
    return kept if len(kept) == count else [f"arg{i}" for i in range(count)]


def state_pairs(traced: Traced) -> list[tuple[int, int]]:
    """Candidate (output, input) pairs that look like state going round, from structure alone.

    Sub-trees of the result are matched with sub-trees of the arguments of the same structure, shapes and dtypes,
    largest first and in order; each argument leaf is used once. Whether the output is really an update of the
    input is for the graph to confirm.
    """
    arguments = traced.unflatten_inputs(range(len(traced.in_avals)))[0]
    results = traced.unflatten_outputs(range(len(traced.out_avals)))
    return [(out, in_) for out, (in_, *_) in like_subtrees(results, traced.out_avals, arguments, traced.in_avals)]


def like_subtrees(
    tree: Any, avals: Sequence[Any], among: Any, known: Sequence[Any]
) -> list[tuple[int, tuple[int, ...]]]:
    """(leaf of `tree`, the leaves of `among` that stand in its place), for every leaf that has some.

    Both trees hold leaf numbers, which index `avals` and `known` (anything with shape and dtype). Sub-trees of equal structure,
    shapes and dtypes are matched, largest first and in order, the first one not yet used first.
    """
    numbers: dict[Any, int] = {}  # of shapes and dtypes
    mine, others = ([numbers.setdefault(_signature(aval), len(numbers)) for aval in leaves] for leaves in (avals, known))
    by_shape: dict[Any, list[tuple[int, ...]]] = {}
    for leaves, structure in _subtrees(among):
        by_shape.setdefault((structure, tuple([others[i] for i in leaves])), []).append(leaves)
    pairs: list[tuple[int, tuple[int, ...]]] = []
    used_in: set[int] = set()
    used_out: set[int] = set()
    for leaves, structure in sorted(_subtrees(tree), key=lambda item: -len(item[0])):
        if not leaves or used_out.intersection(leaves):
            continue
        candidates = by_shape.get((structure, tuple([mine[i] for i in leaves])), ())
        free = [c for c in candidates if not used_in.intersection(c)]
        if free:
            pairs.extend(zip(leaves, zip(*free, strict=True), strict=True))
            used_in.update(free[0])
            used_out.update(leaves)
    return pairs


def _signature(aval: Any) -> tuple[Any, ...]:
    return (tuple(aval.shape), aval.dtype)


def _subtrees(tree: Any) -> list[tuple[tuple[int, ...], Any]]:
    """Every sub-tree as (its leaves, its structure), parents before children."""
    found: list[tuple[tuple[int, ...], Any]] = []

    def visit(node: Any) -> None:
        structure = tree_structure(node)
        found.append((tuple(tree_leaves(node)), structure))
        if not jax.tree_util.treedef_is_leaf(structure):
            for child in tree_leaves(node, is_leaf=lambda x: x is not node):
                visit(child)

    visit(tree)
    return found


def static_values(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    argnums: int | Sequence[int] | None,
    argnames: str | Sequence[str] | None,
) -> dict[int | str, Any]:
    """{position or keyword: value} of the static arguments of a call, as they were given.

    As in `jax.jit`, a parameter that is named static is so by position too, and the other way round; a function already under
    `jax.jit` keeps its own. Raises TypeError, naming the argument, for a value that cannot be hashed.
    """
    numbers, names = _jax.jit_statics(fn) if hasattr(fn, "trace") else _statics(fn, argnums, argnames)
    values: dict[int | str, Any] = {n % len(args): args[n] for n in numbers if -len(args) <= n < len(args)}
    values.update({name: kwargs[name] for name in names if name in kwargs})
    for key, value in values.items():
        try:
            hash(value)
        except TypeError as error:
            raise TypeError(
                f"static argument {key!r} is a {type(value).__name__}, which cannot be hashed: JAX keeps one program per value "
                "of it. Give a tuple or a frozen dataclass, or leave it out of static_argnums and static_argnames"
            ) from error
    return values


def _statics(
    fn: Callable[..., Any], argnums: int | Sequence[int] | None, argnames: str | Sequence[str] | None
) -> tuple[list[int], list[str]]:
    """Positions and names of static parameters; where only one of the two was said, the other follows from the signature."""
    numbers = [argnums] if isinstance(argnums, int) else list(argnums or ())
    names = [argnames] if isinstance(argnames, str) else list(argnames or ())
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return numbers, names
    named = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    first = [p.name for p in parameters if p.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)]
    if argnums is None:
        numbers = [position for position, name in enumerate(first) if name in names]
    elif argnames is None:
        names = [first[n] for n in numbers if -len(first) <= n < len(first) and first[n] in named]
    return numbers, names


def has_dtype(leaf: Any, planned: Any) -> bool:
    """Whether an argument has the planned dtype, as JAX takes it up (float64 as float32). A Python number has a kind only."""
    for number, kind in ((bool, np.bool_), (int, np.integer), (float, np.floating), (complex, np.complexfloating)):
        if type(leaf) is number:
            return jax.numpy.issubdtype(planned, kind)
    dtype = getattr(leaf, "dtype", planned)
    return dtype == planned or jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True) == planned


def abstract(leaf: Any) -> Any:
    """The shape and dtype of an argument; a Python number as it is."""
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype) if hasattr(leaf, "dtype") else leaf
