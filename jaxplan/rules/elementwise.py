"""Point by point: every result element comes from the operands' elements at the same place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxplan._jax import Primitive, primitives
from jaxplan.rules.build import Builder
from jaxplan.rules.nouns import Dim, Rule
from jaxplan.rules.table import register, whole_rule


def elementwise(*prims: Primitive, flops: float = 1.0, library: bool = False, costly: int = 0, linear: bool = False) -> None:
    """Results all have one shape; operands have it too, or extent 1 in some dimensions, or rank 0. `library`, `costly`: of
    the `Rule`; `linear`: in all operands together."""

    @register(*prims, reads=())
    def pointwise(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
        shape = results[0].shape if results else max((a.shape for a in operands), key=len, default=())
        build = Builder()
        dims = build.factors_of(shape)

        def along(a: Any) -> list[Dim]:
            return [dim if extent != 1 else () for dim, extent in zip(dims, a.shape, strict=False)]

        return build.rule(
            map(along, operands), map(along, results), flops=flops, fusible=True, library=library, costly=costly, linear=linear
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
    *primitives("abs ceil cos floor max min mul round sign sin square"), library=True
)
elementwise(*primitives("add add_jaxvals neg sub"), library=True, linear=True)


@register(*primitives("integer_pow"), reads=("y",))
def integer_pow(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """Products; of a negative power, a division."""
    build = Builder()
    dims = build.factors_of(results[0].shape)
    return build.rule([dims], [dims], fusible=True, library=True, costly=2 if params["y"] < 0 else 0)


elementwise(*primitives("div"), library=True, costly=1)
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
elementwise(
    *primitives(
        """
        and clamp clz complex conj convert_element_type eq eq_to ge gt imag is_finite le le_to lt lt_to mulhi? ne
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
gathered(*primitives("debug_callback debug_print? io_callback pure_callback"))
gathered(*primitives("layout_constraint?"))  # seen with jaxlib 0.10 and 0.12
