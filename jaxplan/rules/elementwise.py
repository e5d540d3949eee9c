"""Point by point: every result element comes from the operands' elements at the same place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxplan._jax import Primitive, primitives
from jaxplan.rules.build import Builder
from jaxplan.rules.nouns import Dim, Rule
from jaxplan.rules.table import register, whole_rule

Avals = Sequence[Any]
"""What an equation reads, or what it makes: things with `.shape` and `.dtype`."""


def _together(operands: Avals, results: Avals) -> tuple[bool, int]:
    """Linear in all operands together."""
    return True, -1


def _never(operands: Avals, results: Avals) -> tuple[bool, int]:
    return False, -1


def _scaled(*by: int, exact: bool = False) -> Callable[[Avals, Avals], tuple[bool, int]]:
    """Linear where one of these operands is a number, and the other is not. `exact`: not of integers, which it would cut off."""

    def linear(operands: Avals, results: Avals) -> tuple[bool, int]:
        scale = next((slot for slot in by if not operands[slot].shape and operands[1 - slot].shape), -1)
        return scale >= 0 and not (exact and jax.numpy.issubdtype(results[0].dtype, np.integer)), scale

    return linear


def _widened(operands: Avals, results: Avals) -> tuple[bool, int]:
    """Linear where nothing is rounded: a sum of parts that are rounded is not the sum that was to be."""
    before, after = operands[0].dtype, results[0].dtype
    if not all(jax.numpy.issubdtype(dtype, np.floating) for dtype in (before, after)):
        return False, -1
    few, many = jax.numpy.finfo(before), jax.numpy.finfo(after)
    return bool(few.nmant <= many.nmant and few.maxexp <= many.maxexp), -1


def elementwise(
    *prims: Primitive, flops: float = 1.0, library: bool = False, costly: int = 0,
    linear: Callable[[Avals, Avals], tuple[bool, int]] = _never, by_dtype: bool = False,
) -> None:  # fmt: skip
    """Results all have one shape; operands have it too, or extent 1 in some dimensions, or rank 0. `library`, `costly`: of
    the `Rule`; `linear`: its `linear` and `scale`, by operands and results; `by_dtype`: these depend on the dtypes."""

    @register(*prims, reads=None if by_dtype else ())
    def pointwise(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
        shape = results[0].shape if results else max((a.shape for a in operands), key=len, default=())
        build = Builder()
        dims = build.factors_of(shape)

        def along(a: Any) -> list[Dim]:
            return [dim if extent != 1 else () for dim, extent in zip(dims, a.shape, strict=False)]

        sums, scale = linear(operands, results)
        return build.rule(
            map(along, operands), map(along, results), flops=flops, fusible=True, library=library, costly=costly, linear=sums,
            scale=scale,
        )  # fmt: skip


def pass_through(*prims: Primitive) -> None:
    """Result i is operand i, untouched: each tensor has factors of its own, nothing is computed."""

    @register(*prims, reads=())
    def identity(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
        build = Builder()
        dims = [build.factors_of(a.shape) for a in operands]
        return build.rule(dims, dims[: len(results)], flops=0.0, fusible=True)


@register(*primitives("tie?"), reads=())
def tie(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """i, j -> j: the last operand, once the first is there."""
    build = Builder()
    dims = [build.factors_of(a.shape) for a in operands]
    return build.rule(dims, [dims[-1]], flops=0.0, fusible=True)


def gathered(*prims: Primitive) -> None:
    """Known to need whole operands: the host sees them, one device does it all, or XLA gathers them anyhow."""

    @register(*prims, reads=())
    def whole(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
        return whole_rule(operands, results)


# What YNNPACK has (xla/backends/cpu/ynn_support.cc), and what XLA takes for dear (xla/service/cpu/cpu_instruction_fusion.cc)
elementwise(
    *primitives("abs ceil cos floor max min round sign sin square"), library=True
)
elementwise(*primitives("add add_jaxvals neg sub"), library=True, linear=_together)
elementwise(*primitives("mul"), library=True, linear=_scaled(0, 1))


@register(*primitives("io_callback pure_callback"), reads=())
def callback(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """One device asks the host, and sends what it is told to all others."""
    return replace(whole_rule(operands, results), alone=True)


@register(*primitives("integer_pow"), reads=("y",))
def integer_pow(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """Products; of a negative power, a division."""
    build = Builder()
    dims = build.factors_of(results[0].shape)
    return build.rule([dims], [dims], fusible=True, library=True, costly=2 if params["y"] < 0 else 0)


elementwise(*primitives("div"), library=True, costly=1, linear=_scaled(1, exact=True), by_dtype=True)
elementwise(*primitives("erf exp exp2 expm1 log log1p logistic pow rsqrt sqrt tan tanh"), library=True, costly=2)
elementwise(
    *primitives(
        """
        acos acosh asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt cosh digamma erf_inv erfc igamma igamma_grad_a
        igammac lgamma log2? polygamma random_gamma regularized_incomplete_beta sinh zeta
        """
    ),
    costly=2,
)
elementwise(*primitives("rem"), costly=1)
elementwise(*primitives("convert_element_type"), linear=_widened, by_dtype=True)
elementwise(
    *primitives(
        """
        and clamp clz complex conj eq eq_to ge gt imag is_finite le le_to lt lt_to mulhi? ne
        nextafter not one_minus_square? or polynomial? population_count real reduce_precision select_n shift_left
        shift_right_arithmetic shift_right_logical xor
        """
    )
)
pass_through(
    *primitives(
        """
        copy dce_sink? device_put from_edtype? inspect_sharding? name optimization_barrier relayout? reshard?
        sharding_constraint stage? stop_gradient to_edtype?
        """
    )
)
gathered(*primitives("debug_callback debug_print?"))
gathered(*primitives("layout_constraint?"))  # seen with jaxlib 0.10 and 0.12
