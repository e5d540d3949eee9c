"""Contractions, convolutions, linear algebra and Fourier transforms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from random_programs.scope import LARGEST, Scope, drawn
from random_programs.values import FLOATS


def einsum(x: Any, y: Any, spec: str) -> Any:
    """Two operands."""
    return jnp.einsum(spec, x, y)


def dot_general(x: Any, y: Any, contract: Any, batch: Any, wide: str | None) -> Any:
    """`wide`: the dtype that is summed in."""
    return lax.dot_general(x, y, (contract, batch), preferred_element_type=wide and jnp.dtype(wide))


@drawn(10)
def draw_contraction(s: Scope) -> Any:
    x = s.any(("int32", "int8") if s.chance(0.1) else FLOATS, ranks=(2, 3, 1, 4))
    names = "abcdefgh"[: len(x.type.shape)]
    size = dict(zip(names, x.type.shape, strict=True))
    as_einsum = s.chance(0.5)
    roles = {n: s.random.choice(("free", "free", "free", "sum", "sum", "batch", "lone" if as_einsum else "free")) for n in names}
    of = {role: [n for n in names if roles[n] == role] for role in ("free", "sum", "batch", "lone")}
    mine = list("uvw"[: s.random.randint(0, 2)])
    size.update({n: s.random.choice(s.dims) for n in mine})
    order, out = s.shuffled(of["sum"] + of["batch"] + mine), s.shuffled(of["batch"] + of["free"] + mine)
    if max(math.prod(size[n] for n in group) for group in (out, order)) > LARGEST:
        return False
    y = s.want([size[n] for n in order], x.type.dtype)
    (a, b), terms = (x.type, y.type), math.prod(size[n] for n in of["sum"] + of["lone"])
    numbers = (a.bound * b.bound * terms, None if a.grain is None or b.grain is None else a.grain + b.grain)
    if as_einsum:
        return s.emit(einsum, [x, y], numbers, spec=f"{names},{''.join(order)}->{''.join(out)}")
    dims = [(tuple(map(names.index, g)), tuple(map(order.index, g))) for g in (s.shuffled(of["sum"]), s.shuffled(of["batch"]))]
    wide = {"bfloat16": "float32", "int8": "int32"}.get(a.dtype) if s.chance(0.5) else None
    return s.emit(dot_general, [x, y], numbers, contract=dims[0], batch=dims[1], wide=wide)


def convolution(x: Any, kernel: Any, **how: Any) -> Any:
    """`padding` as a tuple, to be hashable."""
    return lax.conv_general_dilated(x, kernel, **{**how, "padding": list(how["padding"])})


CONVOLUTIONS = {
    3: (("NCH", "OIH", "NCH"), ("NHC", "HIO", "NHC"), ("NHC", "OIH", "CNH")),
    4: (("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NHWC"), ("NHWC", "HWIO", "NCHW")),
}


@drawn(4)
def draw_convolution(s: Scope) -> Any:
    x = s.any(FLOATS, ranks=(3, 4))
    numbers = s.random.choice(CONVOLUTIONS[len(x.type.shape)])
    extents = dict(zip(numbers[0], x.type.shape, strict=True))
    space = [extents[c] for c in "HW"[: len(x.type.shape) - 2]]
    window = [s.random.randint(1, 3) for _ in space]
    padding = tuple((s.random.randint(0, 2), s.random.randint(0, 2)) for _ in space)
    strides, spread, widen = (tuple(s.random.choice((1, 1, 1, 2)) for _ in space) for _ in range(3))
    groups = s.random.choice([g for g in (1, 1, 2, extents["C"]) if extents["C"] % g == 0])
    features = groups * s.random.choice((1, 2, 4, 8))
    for n, k, pads, dilation, base in zip(space, window, padding, spread, widen):
        if (n - 1) * base + 1 + sum(pads) < (k - 1) * dilation + 1:
            return False
    shape = {"O": features, "I": extents["C"] // groups, **dict(zip("HW", window))}
    if math.prod(x.type.shape) * features > 16 * LARGEST or math.prod(shape.values()) > LARGEST:
        return False
    kernel = s.want([shape[c] for c in numbers[1]], x.type.dtype)
    return s.emit(
        convolution, [x, kernel], (x.type.bound * kernel.type.bound * math.prod(window) * shape["I"], None),
        window_strides=strides, padding=padding, lhs_dilation=widen, rhs_dilation=spread, dimension_numbers=numbers,
        feature_group_count=groups,
    )  # fmt: skip


LINEAR: dict[str, Callable[..., Any]] = {
    "cholesky": lambda m, b: jnp.linalg.cholesky(m), "solve": jnp.linalg.solve, "inverse": lambda m, b: jnp.linalg.inv(m),
    "triangular": lambda m, b: jax.scipy.linalg.solve_triangular(jnp.tril(m), b, lower=True),
    "determinant": lambda m, b: jnp.linalg.slogdet(m)[1],
}  # fmt: skip


def linear(x: Any, b: Any, how: str) -> Any:
    """Of a symmetric matrix far from singular."""
    square = jnp.einsum("...ij,...kj->...ik", x, x)
    unit = jnp.eye(x.shape[-2], dtype=x.dtype).reshape((1,) * (x.ndim - 2) + square.shape[-2:])
    return jnp.tanh(LINEAR[how](square + unit, b))


@drawn(1)
def draw_linear(s: Scope) -> Any:
    x = s.any(("float32",), ranks=(2, 3))
    b = s.want((*x.type.shape[:-1], s.random.choice(s.dims)), "float32")
    return s.emit(linear, [x, b], (1.0, None), how=s.random.choice(list(LINEAR)))


def fourier(x: Any, real: bool) -> Any:
    """A transform along the last dimension, or of the last two and half-way back."""
    if real:
        return jnp.real(jnp.fft.rfft(x))
    return jnp.real(jnp.fft.ifft(jnp.fft.fft2(x) * lax.complex(jnp.cos(x), jnp.sin(x))))


@drawn(1)
def draw_fourier(s: Scope) -> Any:
    x = s.any(("float32",), ranks=(2, 3))
    return s.emit(fourier, [x], (x.type.bound * math.prod(x.type.shape[-2:]), None), real=s.chance(0.5))
