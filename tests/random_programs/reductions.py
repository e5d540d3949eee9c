"""Reductions, running sums, softmax and orders."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from random_programs.scope import Scope, const, drawn, input_type, modulo, same
from random_programs.values import FLOATS

REDUCTIONS: dict[str, Callable[..., Any]] = {
    "sum": jnp.sum, "mean": jnp.mean, "max": jnp.max, "min": jnp.min, "prod": jnp.prod, "var": jnp.var,
    "logsumexp": jax.nn.logsumexp, "any": jnp.any, "all": jnp.all, "argmax": jnp.argmax, "argmin": jnp.argmin,
}  # fmt: skip


@drawn(8)
def draw_reduce(s: Scope) -> Any:
    how = s.random.choice(("sum", "sum", "sum", "max", *REDUCTIONS))
    if how in ("any", "all"):
        x = s.any(("bool",), ranks=(1, 2, 3))
    else:
        exact = how in ("argmax", "argmin") or (s.smooth and how in ("max", "min"))
        x = s.any((*FLOATS, "int32") if how in ("max", "argmax") else FLOATS, (1, 2, 3, 4), exact)
    axes = tuple(s.some(range(len(x.type.shape))))
    keep = s.chance(0.3)
    if how in ("argmax", "argmin"):
        return s.emit(REDUCTIONS[how], [x], axis=axes[0] if s.chance(0.8) else None, keepdims=keep)
    terms = math.prod(x.type.shape[d] for d in axes)
    bound, grain = same(x)
    if how == "sum":
        bound *= terms
    elif how == "mean":
        grain = None if grain is None or terms & (terms - 1) else grain + terms.bit_length() - 1
    elif how == "prod":
        if terms > 16 or bound**terms > 64:
            return False
        bound, grain = max(1.0, bound**terms), None
    elif how in ("var", "logsumexp"):
        bound, grain = (bound**2 * 4 if how == "var" else bound + math.log(terms)), None
    return s.emit(REDUCTIONS[how], [x], (bound, grain), axis=axes, keepdims=keep)


def reduce_xor(x: Any, axis: int) -> Any:
    """A reduction of whole numbers by their bits."""
    return lax.reduce(x, const(x, 0), lax.bitwise_xor, (axis,))


def reduce_pair(x: Any, axis: int) -> Any:
    """The greatest and where it stands, in one reduction with a combination of one's own."""

    def combine(a: Any, b: Any) -> Any:
        first = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
        return jnp.where(first, a[0], b[0]), jnp.where(first, a[1], b[1])

    places = lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return lax.reduce((x, places), (const(x, -99), jnp.int32(99)), combine, (axis,))


@drawn(2)
def draw_own_reduction(s: Scope) -> Any:
    if s.chance(0.5):
        x = s.any(("int32", "uint32"), ranks=(1, 2, 3))
        return s.emit(reduce_xor, [x], axis=s.places(x))
    if s.depth:
        return False  # excluded: a while loop around one whose result is not needed crashes XLA's CPU compiler, unplanned too
    x = s.any(("float32",), ranks=(1, 2, 3), exact=True)
    return s.emit(reduce_pair, [x], same(x), axis=s.places(x))


CUMULATIVE = {"sum": lax.cumsum, "max": lax.cummax, "min": lax.cummin, "prod": lax.cumprod, "logsumexp": lax.cumlogsumexp}
COMBINED = {"sum": jnp.add, "max": jnp.maximum, "min": jnp.minimum}


def associative_scan(x: Any, how: str, axis: int, reverse: bool) -> Any:
    """A running reduction as a tree of slices."""
    return lax.associative_scan(COMBINED[how], x, axis=axis, reverse=reverse)


@drawn(4)
def draw_cumulative(s: Scope) -> Any:
    how = s.random.choice(list(CUMULATIVE))
    x = s.any((*FLOATS, "int32") if how == "sum" else FLOATS, (1, 2, 3), exact=s.smooth and how in ("max", "min"))
    axis, reverse = s.places(x), s.chance(0.3)
    n, (bound, grain) = x.type.shape[axis], same(x)
    if how == "prod":
        if bound > 2 or n > 8:
            return False
        bound, grain = bound**n, None
    elif how == "sum":
        bound *= n
    elif how == "logsumexp":
        bound, grain = bound + math.log(n), None
    if how in COMBINED and s.chance(0.3):
        return s.emit(associative_scan, [x], (bound, grain), how=how, axis=axis, reverse=reverse)
    return s.emit(CUMULATIVE[how], [x], (bound, grain), axis=axis, reverse=reverse)


def pool(x: Any, how: str, window: Any, strides: Any, padding: str) -> Any:
    """A reduction over windows."""
    start, combine = {"max": (-np.inf, lax.max), "min": (np.inf, lax.min), "sum": (0, lax.add)}[how]
    return lax.reduce_window(x, np.asarray(start, x.dtype), combine, window, strides, padding)


@drawn(3)
def draw_pool(s: Scope) -> Any:
    how = s.random.choice(("max", "sum", "min"))
    x = s.any(FLOATS, ranks=(2, 3, 4), exact=how != "sum" and s.smooth)
    if s.smooth and (how == "min" or (how == "max" and x.type.dtype != "float32")):
        return False  # JAX has no derivatives of these
    window = tuple(s.random.randint(1, min(3, n)) if s.chance(0.6) else 1 for n in x.type.shape)
    strides = tuple(s.random.randint(1, 2) for _ in window)
    bound, grain = same(x)
    numbers = (bound * (math.prod(window) if how == "sum" else 1), grain)
    return s.emit(pool, [x], numbers, how=how, window=window, strides=strides, padding=s.random.choice(("SAME", "VALID")))


@drawn(4)
def draw_softmax(s: Scope) -> Any:
    x = s.any(FLOATS, ranks=(1, 2, 3, 4))
    function = s.random.choice((jax.nn.softmax, jax.nn.softmax, jax.nn.log_softmax))
    return s.emit(function, [x], (2 * x.type.bound + 3, None), axis=s.places(x))


def sort_by(key: Any, *others: Any, axis: int) -> Any:
    """Several arrays in the order of the first."""
    return lax.sort((key, *others), dimension=axis, num_keys=1, is_stable=True)


def searchsorted(x: Any, v: Any) -> Any:
    """Where v would stand."""
    return jnp.searchsorted(jnp.sort(x), v)


def bincount(x: Any, size: int) -> Any:
    """How often each number occurs."""
    return jnp.bincount(modulo(x.reshape(-1), size), length=size)


@drawn(4)
def draw_order(s: Scope) -> Any:
    op = s.random.choice(("sort", "sort_by", "argsort", "top_k", "searchsorted", "bincount"))
    if op == "bincount":
        return s.emit(bincount, [s.any(("int32",), ranks=(1, 2))], size=s.random.choice(s.dims))
    x = s.any((*FLOATS, "int32"), ranks=(1,) if op == "searchsorted" else (1, 2, 3), exact=op != "sort" or s.smooth)
    axis = s.places(x)
    if op == "sort":
        return s.emit(jnp.sort, [x], same(x), axis=axis, descending=s.chance(0.3))
    if op == "argsort":
        return s.emit(jnp.argsort, [x], axis=axis, descending=s.chance(0.3))
    if op == "sort_by":
        other = s.want(x.type.shape, s.random.choice(("float32", "int32")))
        return s.emit(sort_by, [x, other], [same(x), same(other)], axis=axis)
    if op == "top_k":
        return s.emit(lax.top_k, [x], same(x), k=s.random.randint(1, x.type.shape[-1]))
    return s.emit(searchsorted, [x, s.want(s.shape(1), x.type.dtype, input_type((), x.type.dtype))])
