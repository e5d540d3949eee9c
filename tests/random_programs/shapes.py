"""Operations that move values: shapes, slices, updates, look-ups."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from random_programs.scope import LARGEST, Scope, const, drawn, modulo, same
from random_programs.values import ANY


def new_shape(s: Scope, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Neighbouring dimensions merged, others split."""
    new = list(shape)
    for _ in range(s.random.randint(1, 3)):
        d = s.random.randrange(len(new))
        if s.chance(0.5) and d + 1 < len(new):
            new[d : d + 2] = [new[d] * new[d + 1]]
        elif len(new) < 5:
            part = s.random.choice([p for p in range(1, new[d] + 1) if new[d] % p == 0])
            new[d : d + 1] = [part, new[d] // part]
    return tuple(new)


@drawn(8)
def draw_shape(s: Scope) -> Any:
    x = s.any(ANY, ranks=(1, 2, 3, 4))
    shape = x.type.shape
    rank, axis = len(shape), s.places(x)
    op = s.random.choice((*["reshape"] * 3, "transpose", "expand", "broadcast", "flip", "roll", "squeeze", "repeat", "tile"))
    if op == "transpose":
        return s.emit(jnp.transpose, [x], same(x), axes=tuple(s.shuffled(range(rank))))
    if op == "reshape":
        return s.emit(jnp.reshape, [x], same(x), shape=new_shape(s, shape))
    if op == "expand" and rank < 4:
        return s.emit(jnp.expand_dims, [x], same(x), axis=s.random.randint(0, rank))
    if op == "squeeze" and 1 in shape:
        return s.emit(lax.squeeze, [x], same(x), dimensions=(shape.index(1),))
    if op == "broadcast" and rank < 4:
        keep = tuple(sorted(s.random.sample(range(rank + 1), rank)))
        wide = [s.random.choice(s.dims)] * (rank + 1)
        for d, n in zip(keep, shape, strict=True):
            wide[d] = n if n > 1 or s.chance(0.5) else s.random.choice(s.dims)
        if math.prod(wide) <= LARGEST:
            return s.emit(lax.broadcast_in_dim, [x], same(x), shape=tuple(wide), broadcast_dimensions=keep)
    if op == "flip":
        return s.emit(jnp.flip, [x], same(x), axis=tuple(s.some(range(rank))))
    if op == "roll":
        return s.emit(jnp.roll, [x], same(x), shift=s.random.randint(-3, 3), axis=axis)
    if op == "repeat" and math.prod(shape) <= LARGEST // 3:
        return s.emit(jnp.repeat, [x], same(x), repeats=s.random.randint(1, 3), axis=axis)
    if op == "tile" and math.prod(shape) <= LARGEST // 2:
        return s.emit(jnp.tile, [x], same(x), reps=tuple(2 if d == axis else 1 for d in range(rank)))
    return False


def pad(x: Any, config: Any) -> Any:
    """With ones; (low, high, between) per dimension, which may cut as well."""
    return lax.pad(x, const(x, 1), config)


@drawn(6)
def draw_slice(s: Scope) -> Any:
    x = s.any(ANY, ranks=(1, 2, 3))
    shape = x.type.shape
    op, axis = s.random.choice(("slice", "slice", "pad", "pad", "edge", "split", "tril", "diagonal")), s.places(x)
    if op == "slice":
        starts = tuple(s.random.randint(0, n // 2) if s.chance(0.5) else 0 for n in shape)
        limits = tuple(s.random.randint(a + 1, n) if s.chance(0.5) else n for a, n in zip(starts, shape))
        strides = tuple(s.random.choice((1, 1, 1, 2, 3)) for _ in shape)
        return s.emit(lax.slice, [x], same(x), start_indices=starts, limit_indices=limits, strides=strides)
    if op == "pad" and x.type.dtype != "bool":
        choices = [((0, 0, 1, 2, 8, -(n > 3)), (0, 0, 1, 4, n, -(n > 3)), (0, 0, 0, 1)) for n in shape]
        config = tuple(tuple(s.random.choice(options) for options in dim) for dim in choices)
        if math.prod(low + high + n + (n - 1) * between for n, (low, high, between) in zip(shape, config)) <= LARGEST:
            return s.emit(pad, [x], same(x), config=config)
    if op == "edge" and min(shape) > 2 and math.prod(n + 4 for n in shape) <= LARGEST:
        widths = tuple((s.random.randint(0, 2), s.random.randint(0, 2)) for _ in shape)
        return s.emit(jnp.pad, [x], same(x), pad_width=widths, mode=s.random.choice(("edge", "reflect", "wrap")))
    if op == "split" and shape[axis] % 2 == 0:
        return s.emit(jnp.split, [x], same(x), indices_or_sections=2, axis=axis)
    if op in ("tril", "diagonal") and len(shape) > 1:
        return s.emit(jnp.tril if op == "tril" else jnp.diagonal, [x], same(x))
    return False


def concatenate(*xs: Any, axis: int) -> Any:
    """One after the other."""
    return jnp.concatenate(xs, axis)


def stack(*xs: Any, axis: int) -> Any:
    """Along a new dimension."""
    return jnp.stack(xs, axis)


@drawn(4)
def draw_concatenate(s: Scope) -> Any:
    x = s.any(ANY, ranks=(1, 2, 3))
    shape, axis = x.type.shape, s.places(x)
    if math.prod(shape) > LARGEST // 3:
        return False
    stacked = s.chance(0.3)
    sizes = [shape[axis] if stacked else s.random.choice((shape[axis], *s.dims)) for _ in range(s.random.randint(1, 2))]
    if math.prod(shape) // shape[axis] * sum(sizes) > LARGEST // 2:
        return False
    parts = s.shuffled([x, *(s.want((*shape[:axis], n, *shape[axis + 1 :]), x.type.dtype) for n in sizes)])
    return s.emit(stack if stacked else concatenate, parts, same(*parts), axis=axis)


def dynamic_slice(x: Any, *starts: Any, sizes: tuple[int, ...]) -> Any:
    """From starts that may be out of range; zeros for those not given."""
    return lax.dynamic_slice(x, [*starts, *[0] * (x.ndim - len(starts))], sizes)


def dynamic_update_slice(x: Any, update: Any, *starts: Any) -> Any:
    """The same."""
    return lax.dynamic_update_slice(x, update, [*starts, *[0] * (x.ndim - len(starts))])


@drawn(6)
def draw_dynamic(s: Scope) -> Any:
    x = s.any(ANY, ranks=(1, 2, 3))
    shape = x.type.shape
    if s.chance(0.3):
        return s.emit(lax.dynamic_index_in_dim, [x, s.scalar()], same(x), axis=s.places(x), keepdims=s.chance(0.5))
    starts = [s.scalar() for _ in range(s.random.randint(1, len(shape)))]
    sizes = tuple(s.random.randint(1, n) if s.chance(0.5) else n for n in shape)
    if s.chance(0.5):
        return s.emit(dynamic_slice, [x, *starts], same(x), sizes=sizes)
    update = s.want(sizes, x.type.dtype)
    return s.emit(dynamic_update_slice, [x, update, *starts], same(x, update))


def take_within(x: Any, i: Any, axis: int) -> Any:
    """Rows at i, which is promised to be in range."""
    return x.at[(slice(None),) * axis + (modulo(i, x.shape[axis]),)].get(mode="promise_in_bounds")


def take_along(x: Any, i: Any, axis: int) -> Any:
    """One element per element of i."""
    return jnp.take_along_axis(x, modulo(i, x.shape[axis]), axis)


def take_pairs(x: Any, i: Any, j: Any) -> Any:
    """Of the last two dimensions, the elements at (i, j)."""
    return x[..., modulo(i, x.shape[-2]), modulo(j, x.shape[-1])]


@drawn(5)
def draw_take(s: Scope) -> Any:
    x = s.any(ANY, ranks=(1, 2, 3))
    shape, axis = x.type.shape, s.places(x)
    if s.chance(0.25):
        n = s.random.choice((shape[axis], *s.dims))
        return s.emit(take_along, [x, s.want((*shape[:axis], n, *shape[axis + 1 :]), "int32")], same(x), axis=axis)
    i = s.any(("int32",), ranks=(1, 0, 2))
    if math.prod(shape) * math.prod(i.type.shape) > LARGEST:
        return False
    if len(shape) > 1 and s.chance(0.3):
        return s.emit(take_pairs, [x, i, s.want(i.type.shape, "int32")], same(x))
    mode = s.random.choice(("promised", "wrap", "clip", "fill"))
    if mode == "promised":
        return s.emit(take_within, [x, i], same(x), axis=axis)
    return s.emit(jnp.take, [x, i], same(x), axis=axis, mode=mode, **({"fill_value": 0} if mode == "fill" else {}))


def put(x: Any, i: Any, u: Any, how: str, axis: int) -> Any:
    """Rows at i combined with u."""
    rows = x.at[(slice(None),) * axis + (modulo(i, x.shape[axis]),)]
    return {"add": rows.add, "max": rows.max, "min": rows.min}[how](u)


def put_range(x: Any, start: Any, u: Any, axis: int, step: int, drop: bool) -> Any:
    """Rows set to u, none twice, as the order would be anybody's; `drop`: those out of range are left out."""
    rows = modulo(start, x.shape[axis]) + jnp.arange(u.shape[axis], dtype=start.dtype) * const(start, step)
    rows = rows if drop else modulo(rows, x.shape[axis])
    return x.at[(slice(None),) * axis + (rows,)].set(u, mode="drop" if drop else None, unique_indices=not drop)


@drawn(5)
def draw_put(s: Scope) -> Any:
    x = s.any(ANY, ranks=(1, 2, 3))
    shape, axis = x.type.shape, s.places(x)
    if s.chance(0.4) or x.type.dtype == "bool":
        u = s.want((*shape[:axis], s.random.randint(1, shape[axis]), *shape[axis + 1 :]), x.type.dtype)
        drop = s.chance(0.3)
        step = s.random.choice((1, 2, 3)) if drop else 1
        return s.emit(put_range, [x, s.scalar(), u], same(x, u), axis=axis, step=step, drop=drop)
    how, i = s.random.choice(("add", "add", "max", "min")), s.any(("int32",), ranks=(1, 2, 0))
    wide = (*shape[:axis], *i.type.shape, *shape[axis + 1 :])
    if math.prod(wide) > LARGEST or (how != "add" and s.smooth):
        return False
    u = s.want(wide, x.type.dtype)
    bound, grain = same(x, u)
    times = math.prod(i.type.shape) if how == "add" else 0
    return s.emit(put, [x, i, u], (bound + times * u.type.bound, grain), how=how, axis=axis)
