"""Products: what is linear in each of two operands. These are the operators worth sharding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxplan._jax import primitives
from jaxplan.rules.build import Builder
from jaxplan.rules.nouns import Dim, Kind, Rule
from jaxplan.rules.table import register
from jaxplan.rules.windows import halo_of

Dims = list[Dim]


@register(*primitives("dot_general"), reads=("dimension_numbers", "precision"))
def dot_general(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """b m k, b k n -> b m n."""
    (contract, batch) = params["dimension_numbers"]
    build = Builder()
    left, right, result = _product(build, operands, contract, batch, whole=())
    free = [
        any(n > 1 and d not in (*summed, *shared) for d, n in enumerate(a.shape))
        for a, summed, shared in zip(operands, contract, batch, strict=True)
    ]
    return build.rule(
        (left, right), (result,), flops=2.0, product=all(free), rounds=all(free) and default_precision(params), adds=True
    )  # fmt: skip


@register(*primitives("ragged_dot_general"), reads=("ragged_dot_dimension_numbers",))
def ragged_dot_general(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """Rows of the left operand belong to groups of given lengths, each with its own right operand.

    Where the groups lie depends on data, so the ragged dimension and the groups stay whole; each row meets
    one group. Compilers for CPU multiply, for every group, by the left operand with all other rows masked; and where rows are
    summed over, the right one is masked too.
    """
    numbers = params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    ragged, groups = tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions)
    build = Builder()
    left, right, result = _product(build, operands, contract, batch, whole=ragged, groups=groups)
    count, masked = math.prod(operands[1].shape[d] for d in groups), 1
    if not groups and len(results[0].shape) > len(result):  # ragged along a contracted dimension: the result has the groups
        result.insert(0, build.factor(results[0].shape[0], Kind.WHOLE, name="g"))
        count, masked = results[0].shape[0], 2
    lengths = ((),) * len(operands[2].shape)
    rest = [((),) * len(a.shape) for a in operands[3:]]
    rule = build.rule((left, right, lengths, *rest), (result,), flops=2.0 / max(1, count))
    return replace(rule, masked=(float(count),) * masked + (0.0,) * (len(operands) - masked))


def default_precision(params: Mapping[str, Any]) -> bool:
    """Whether a product's operands may be rounded to what the machine's matrix unit reads."""
    asked = params.get("precision")
    return all(one is None or str(one) == "DEFAULT" for one in (asked if isinstance(asked, tuple) else (asked,)))


def _product(
    build: Builder,
    operands: Sequence[Any],
    contract: Any,
    batch: Any,
    *,
    whole: Sequence[int],
    groups: Sequence[int] = (),
) -> tuple[Dims, Dims, Dims]:
    """Dimensions of left, right and result of a dot product; `whole`: of the left, `groups`: of the right."""
    (left_contract, right_contract), (left_batch, right_batch) = contract, batch
    shape, other = operands[0].shape, operands[1].shape
    left: Dims = [()] * len(shape)
    right: Dims = [()] * len(other)
    for a, b in zip(left_batch, right_batch, strict=True):
        left[a] = right[b] = build.factor(shape[a], Kind.WHOLE if a in whole else Kind.PARALLEL, name="b")
    result = [left[a] for a in left_batch]
    for d in range(len(shape)):
        if d not in left_batch and d not in left_contract:
            left[d] = build.factor(shape[d], Kind.WHOLE if d in whole else Kind.PARALLEL, name="m")
            result.append(left[d])
    for a, b in zip(left_contract, right_contract, strict=True):
        left[a] = right[b] = build.factor(shape[a], Kind.WHOLE if a in whole else Kind.SUM, name="k")
    for d in range(len(other)):
        if d in groups:
            right[d] = build.factor(other[d], Kind.WHOLE, name="g")
        elif d not in right_batch and d not in right_contract:
            right[d] = build.factor(other[d], name="n")
            result.append(right[d])
    return left, right, result


@register(
    *primitives("conv_general_dilated"),
    reads=(
        "dimension_numbers",
        "window_strides",
        "padding",
        "lhs_dilation",
        "rhs_dilation",
        "feature_group_count",
        "batch_group_count",
        "precision",
    ),
)
def convolution(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """n c h w, o c kh kw -> n o h w. Groups g lead the features (or the batch) of whoever has them.

    Groups of more than one input feature are whole in every factor: XLA gathers such a convolution however it
    is sharded (github.com/openxla/xla/issues/47945; seen with jaxlib 0.10 and 0.12). Depthwise ones it
    splits. Result features and space are kept apart: where the features have an axis and space a smaller one, XLA's
    values are wrong (seen with jaxlib 0.10 and 0.12, also for programs sharded by hand; `scripts/check_rules.py`).
    With batch groups (the gradient of a depthwise kernel) the features are summed over whole: on a mesh with an axis
    besides the one that cuts them, XLA adds over that too (same versions, also by hand). With feature groups and
    the result's batch or features in another place than the source's, values are wrong when features are cut (also by hand);
    with feature groups and a window of one element, cutting them along some of the mesh's axes aborts the process (jaxlib
    0.10 and 0.12, also by hand).

    flops: two per multiply-add with a source element; the zeros a dilated source is filled with cost nothing.
    """
    numbers = params["dimension_numbers"]
    build = Builder()
    source, kernel, target = operands[0].shape, operands[1].shape, results[0].shape
    left: Dims = [()] * len(source)
    right: Dims = [()] * len(kernel)
    result: Dims = [()] * len(target)
    (batch, feature, *left_space) = numbers.lhs_spec
    (features_out, features_in, *right_space) = numbers.rhs_spec
    (result_batch, result_feature, *space) = numbers.out_spec
    moved = (batch, feature) != (result_batch, result_feature)
    single = all(kernel[axis] == 1 for axis in right_space)
    outer = Kind.WHOLE if params["feature_group_count"] > 1 and (moved or single) else Kind.PARALLEL
    feature_groups = build.factor(params["feature_group_count"], outer, name="g")
    batch_groups = build.factor(params["batch_group_count"], name="q")
    groups = params["feature_group_count"] * params["batch_group_count"]

    n = build.factor(target[result_batch], name="n")
    left[batch], result[result_batch] = (*batch_groups, *n), n
    summed = Kind.SUM if params["batch_group_count"] == 1 else Kind.WHOLE
    right[features_in] = build.factor(kernel[features_in], summed, name="c")
    left[feature] = (*feature_groups, *right[features_in])
    o = build.factor(target[result_feature] // groups, outer, name="o")
    right[features_out] = result[result_feature] = (*feature_groups, *batch_groups, *o)

    for axis, (a, k, t) in enumerate(zip(left_space, right_space, space, strict=True)):
        name = "hwd"[axis] if axis < 3 else f"s{axis}"
        left[a], right[k], result[t] = _space(
            build,
            (source[a], kernel[k], target[t]),
            name,
            stride=params["window_strides"][axis],
            before=params["padding"][axis][0],
            base=params["lhs_dilation"][axis],
            dilation=params["rhs_dilation"][axis],
        )
    if params["feature_group_count"] > 1 and kernel[features_in] > 1:
        build.give_up()
    apart = tuple((f, s) for f in (*feature_groups, *batch_groups, *o) for a in left_space for s in left[a] if f != s)
    return build.rule(
        (left, right), (result,), flops=2.0 / max(1, math.prod(params["lhs_dilation"])), apart=apart,
        product=True, rounds=default_precision(params), spatial=tuple(f for a in left_space for f in left[a]), adds=True,
    )  # fmt: skip


def _space(
    build: Builder,
    extents: tuple[int, int, int],
    name: str,
    *,
    stride: int,
    before: int,
    base: int,
    dilation: int,
) -> tuple[Dim, Dim, Dim]:
    """One spatial dimension of source, kernel and target: source and target are cut alike, and neighbours exchange a slab.

    In the gradient of a kernel the "kernel" is the image-sized one and could be cut like the source, its partial sums added; but
    where a mesh has an axis besides the one that cuts, XLA adds over that too (seen with jaxlib 0.10 and 0.12, also for programs
    sharded by hand): such dimensions are whole.
    """
    source, taps, target = extents
    halo = halo_of(source, target, stride=stride, taps=taps, dilation=dilation, before=before, base=base)
    if target == 1:
        halo = None
    kind = Kind.WHOLE if halo is None else Kind.HALO if halo else Kind.PARALLEL
    out = build.factor(target, kind, halo=halo or 0, name=name)
    kernel = build.factor(taps, Kind.WHOLE, name=f"k{name}")
    return out, kernel, out
