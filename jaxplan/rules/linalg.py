"""Dense linear algebra, Fourier transforms: one matrix is done on one device, a batch of them in parallel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxplan._jax import Primitive, primitives
from jaxplan.rules.build import Builder
from jaxplan.rules.nouns import Kind, Rule
from jaxplan.rules.table import register


def batched(*prims: Primitive, flops: float) -> None:
    """The first operand's last two dimensions are the matrix, all before are a batch that every tensor leads
    with.

    `flops`: of one n x n matrix, in units of n cubed (Golub and Van Loan, Matrix Computations).
    """

    @register(*prims, reads=())
    def factorization(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
        build = Builder()
        *batch, rows, columns = operands[0].shape
        leading = build.factors_of(batch, name="b")
        matrices = build.points()
        shapes = [a.shape[len(batch) :] for a in (*operands, *results)]
        dims = [leading + rest for rest in build.whole(*shapes)]
        work = flops * matrices * rows * columns * min(rows, columns)
        return build.rule(dims[: len(operands)], dims[len(operands) :], flops=work / build.points())


batched(*primitives("cholesky cholesky_update?"), flops=1 / 3)
batched(*primitives("lu geqrf? geqp3? householder_product tridiagonal hessenberg"), flops=4 / 3)
batched(*primitives("qr"), flops=8 / 3)
batched(*primitives("ormqr?"), flops=4)
batched(*primitives("eigh"), flops=9)
batched(*primitives("svd"), flops=22)
batched(*primitives("eig schur"), flops=25)


@register(*primitives("triangular_solve"), reads=("left_side",))
def triangular_solve(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """b m k, b m n -> b m n, m and k whole. XLA splits the batch only, so each device is given its right-hand sides n."""
    build = Builder()
    *batch, rows, columns = operands[1].shape
    leading = build.factors_of(batch, name="b")
    left = params["left_side"]
    inner = build.factor(rows if left else columns, Kind.WHOLE, name="m")
    other = build.factor(rows if left else columns, Kind.WHOLE, name="k")
    sides = build.factor(columns if left else rows, name="n")
    both = (*leading, inner, sides) if left else (*leading, sides, inner)
    return replace(build.rule([(*leading, inner, other), both], [both]), by_hand=True)


@register(*primitives("symmetric_product?"), reads=())
def symmetric_product(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """b m k, b m n -> b m n: A A' + C, with m and n of one extent. On a GPU one kernel does a matrix."""
    build = Builder()
    *batch, rows, inner = operands[0].shape
    leading = build.factors_of(batch, name="b")
    m, n = (build.factor(rows, Kind.WHOLE, name=name) for name in "mn")
    k = build.factor(inner, Kind.WHOLE, name="k")
    square = (*leading, m, n)
    return build.rule([(*leading, m, k), square], [square], flops=2.0)


@register(*primitives("lu_pivots_to_permutation?"), reads=())
def permutation(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """b k -> b n. The swaps are done one after the other."""
    build = Builder()
    *batch, swaps = operands[0].shape
    leading = build.factors_of(batch, name="b")
    k = build.factor(swaps, Kind.WHOLE, name="k")
    n = build.factor(results[0].shape[-1], Kind.WHOLE, name="n")
    return build.rule([(*leading, k)], [(*leading, n)], flops=1 / max(1, results[0].shape[-1]))


@register(*primitives("tridiagonal_solve"), reads=())
def tridiagonal_solve(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """Three diagonals b m, and b m n -> b m n, m whole; each device is given its right-hand sides n, as XLA would gather them.

    Eight operations an unknown (Thomas's algorithm).
    """
    build = Builder()
    *batch, unknowns, sides = results[0].shape
    leading = build.factors_of(batch, name="b")
    inner = build.factor(unknowns, Kind.WHOLE, name="m")
    both = (*leading, inner, build.factor(sides, name="n"))
    return replace(build.rule([(*leading, inner)] * 3 + [both], [both], flops=8.0), by_hand=True)


@register(*primitives("fft"), reads=("fft_lengths",))
def fft(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """... m -> ... m, m whole. XLA gathers a Fourier transform even along its batch (github.com/openxla/xla/issues/24), so each
    device is given what it has.

    5 n log2 n operations for n complex points (the count of FFTW's benchmarks).
    """
    build = Builder()
    shape = max(operands[0].shape, results[0].shape)  # of a real transform, one side is cut to half
    batch = len(shape) - len(params["fft_lengths"])
    dims = [build.factor(n, Kind.PARALLEL if d < batch else Kind.WHOLE) for d, n in enumerate(shape)]
    length = max(2, math.prod(params["fft_lengths"]))
    return replace(build.rule([dims], [dims], flops=5 * math.log2(length)), by_hand=True)
