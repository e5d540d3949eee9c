"""Element-wise operations, and values made of nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from random_programs.scope import Scope, const, drawn, input_type, modulo, same
from random_programs.values import ANY, FLOATS, INTS


@jax.custom_jvp
def soft_step(x: Any) -> Any:
    """A function with a derivative of its own."""
    return x / (const(x, 1) + jnp.abs(x))


@soft_step.defjvp
def _soft_step_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    return soft_step(x), dx * jax.nn.sigmoid(x)


@jax.custom_vjp
def bounded_gradient(x: Any) -> Any:
    """Sine whose gradient is squashed."""
    return jnp.sin(x)


bounded_gradient.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.tanh(g) * jnp.cos(x),))

UNARY: dict[str, dict[str, Callable[[Any], Any]]] = {
    "smooth": {
        "tanh": jnp.tanh, "sin": jnp.sin, "cos": jnp.cos, "logistic": jax.nn.sigmoid, "erf": jax.scipy.special.erf,
        "silu": jax.nn.silu, "gelu": jax.nn.gelu, "softplus": jax.nn.softplus, "soft_step": soft_step,
        "bounded_gradient": bounded_gradient, "bell": lambda x: jnp.exp(-jnp.square(x)), "square": jnp.square,
        "root": lambda x: jnp.sqrt(jnp.square(x) + const(x, 1)), "inverse": lambda x: lax.rsqrt(jnp.square(x) + const(x, 1)),
        "log": lambda x: jnp.log1p(jnp.square(x)), "power": lambda x: (jnp.square(x) + const(x, 1)) ** const(x, 0.75),
        "angle": lambda x: jnp.arctan2(x, const(x, 2) + jnp.cos(x)), "stop": lax.stop_gradient,
    },
    "kinked": {"abs": jnp.abs, "relu": jax.nn.relu, "clip": lambda x: jnp.clip(x, -1, 1), "relu6": jax.nn.relu6},
    "jumping": {"floor": jnp.floor, "round": jnp.round, "sign": jnp.sign, "ceil": jnp.ceil},
    "whole": {
        "abs": jnp.abs, "not": jnp.invert, "bits": lax.population_count, "rem": lambda x: lax.rem(x, const(x, 5)),
        "half": lambda x: lax.shift_right_arithmetic(x, const(x, 1)), "less": lambda x: x < const(x, 2), "sign": jnp.sign,
    },
}  # fmt: skip


def unary(x: Any, family: str, name: str) -> Any:
    """One of `UNARY`."""
    return UNARY[family][name](x)


@drawn(8)
def draw_unary(s: Scope) -> Any:
    family = s.random.choice(("smooth", "smooth", "kinked", "jumping", "whole"))
    name = s.random.choice(list(UNARY[family]))
    if family == "whole":
        return s.emit(unary, [s.any((*INTS, "bool") if name == "not" else INTS)], family=family, name=name)
    x = s.any(exact=family == "jumping" or (family == "kinked" and s.smooth))
    grain, bound = None, max(x.type.bound, 2.0)
    if family == "jumping":
        grain, bound = 0, bound + 1
    elif family == "kinked" or name == "stop":
        grain = x.type.grain
    elif name == "square":
        grain = None if x.type.grain is None else 2 * x.type.grain
    if name in ("square", "root", "log", "power"):
        bound = x.type.bound**2 + 1
    return s.emit(unary, [x], (bound, grain), family=family, name=name)


BINARY: dict[str, dict[str, Callable[[Any, Any], Any]]] = {
    "arithmetic": {
        "add": jnp.add, "sub": jnp.subtract, "mul": jnp.multiply, "max": jnp.maximum, "min": jnp.minimum,
        "div": lambda x, y: x / (const(y, 1) + jnp.square(y)), "logaddexp": jnp.logaddexp,
    },
    "logical": {"and": jnp.bitwise_and, "or": jnp.bitwise_or, "xor": jnp.bitwise_xor},
    "compared": {"lt": jnp.less, "ge": jnp.greater_equal, "eq": jnp.equal, "ne": jnp.not_equal},
}  # fmt: skip


def binary(x: Any, y: Any, family: str, name: str, keep: tuple[int, ...] | None = None) -> Any:
    """One of `BINARY`; `keep`: the dimensions of x that those of y stand for."""
    return BINARY[family][name](x, y if keep is None else lax.broadcast_in_dim(y, x.shape, keep))


@drawn(10)
def draw_binary(s: Scope) -> Any:
    family = s.random.choice(("arithmetic", "arithmetic", "arithmetic", "logical", "compared"))
    name = s.random.choice(list(BINARY[family]))
    exact = family == "compared" or (name in ("max", "min") and s.smooth)
    dtypes = (*INTS, "bool") if family == "logical" else ANY if family == "compared" else FLOATS
    if family == "arithmetic" and name not in ("div", "logaddexp") and s.chance(0.15):
        dtypes = INTS
    x = s.any(dtypes, exact=exact)
    shape, keep = x.type.shape, None
    if shape and s.chance(0.4):
        keep = tuple(s.some(range(len(shape)), 0))
        shape = tuple(1 if s.chance(0.2) else shape[d] for d in keep)
    y = s.want(shape, x.type.dtype)
    if exact and not y.type.exact:
        y = s.new_input(input_type(shape, x.type.dtype))
    (a, b), (bound, grain) = (x.type, y.type), same(x, y)
    if name in ("add", "sub"):
        bound = a.bound + b.bound
    elif name == "mul":
        bound, grain = a.bound * b.bound, None if a.grain is None or b.grain is None else a.grain + b.grain
    elif name not in ("max", "min"):
        bound, grain = a.bound + b.bound + 1, None
    return s.emit(binary, [x, y], (bound, grain), family=family, name=name, **({} if keep is None else {"keep": keep}))


def select_n(which: Any, *cases: Any) -> Any:
    """Element by element, one of the cases."""
    return lax.select_n(modulo(which, len(cases)), *cases)


@drawn(4)
def draw_choice(s: Scope) -> Any:
    x = s.any(ANY)
    shape, dtype = x.type.shape, x.type.dtype
    y = s.want(shape, dtype)
    if s.chance(0.3):
        z = s.want(shape, dtype)
        return s.emit(select_n, [s.want(shape, "int32"), x, y, z], same(x, y, z))
    return s.emit(jnp.where, [s.want(shape, "bool"), x, y], same(x, y))


def cast(x: Any, dtype: str) -> Any:
    """Whole numbers are made small first."""
    if jnp.issubdtype(x.dtype, jnp.integer) and dtype in FLOATS:
        x = lax.rem(x, const(x, 8))
    return x.astype(jnp.dtype(dtype))


@drawn(4)
def draw_cast(s: Scope) -> Any:
    dtype = s.random.choice((*FLOATS, *FLOATS, *INTS, "bool"))
    x = s.any(ANY, exact=dtype not in FLOATS)
    floating = x.type.dtype in FLOATS
    if floating and dtype == "uint32":
        return False  # a negative float has no defined value there
    return s.emit(cast, [x], same(x) if floating else (8.0, 0), dtype=dtype)


def iota(shape: tuple[int, ...], dim: int, dtype: str) -> Any:
    """Counted along one dimension."""
    return lax.broadcasted_iota(jnp.dtype(dtype), shape, dim)


def one_hot(x: Any, size: int, axis: int, dtype: str) -> Any:
    """Ones where x says."""
    return jax.nn.one_hot(modulo(x, size), size, axis=axis, dtype=jnp.dtype(dtype))


@drawn(2)
def draw_iota(s: Scope) -> Any:
    shape = s.shape() or (s.dims[0],)
    dtype = s.random.choice(("int32", "int32", "float32", "bfloat16"))
    return s.emit(iota, [], (16.0, 0), shape=shape, dim=s.random.randrange(len(shape)), dtype=dtype)


@drawn(2)
def draw_one_hot(s: Scope) -> Any:
    x = s.any(("int32",), ranks=(1, 2, 0))
    how = {"size": s.random.choice(s.dims), "axis": s.random.randint(0, len(x.type.shape))}
    return s.emit(one_hot, [x], (1.0, 0), dtype=s.random.choice(("float32", "int32")), **how)


def random_values(seed: Any, how: str, shape: tuple[int, ...]) -> Any:
    """Of a key made of a number."""
    key = jax.random.key(seed)
    if how == "split":
        return jax.random.uniform(jax.random.split(key)[1], shape)
    if how == "normal":
        return jnp.tanh(jax.random.normal(key, shape))
    if how == "randint":
        return jax.random.randint(key, shape, 0, 8)
    return {"uniform": jax.random.uniform, "bits": jax.random.bits, "bernoulli": jax.random.bernoulli}[how](key, shape=shape)


@drawn(2)
def draw_random_values(s: Scope) -> Any:
    how = s.random.choice(("uniform", "normal", "bits", "randint", "bernoulli", "split"))
    grain = 23 if how in ("uniform", "split") else None
    return s.emit(random_values, [s.scalar()], (1.0, grain), how=how, shape=s.shape() or (s.dims[0],))
