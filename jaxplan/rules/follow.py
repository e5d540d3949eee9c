"""Parameters of equations that are extents: what they are once the operands have other shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxplan._jax import Primitive, primitives


def params_at(primitive: Primitive, params: Mapping[str, Any], before: Sequence[Any], now: Sequence[Any]) -> Mapping[str, Any]:
    """The parameters of an equation whose operands had the shapes of `before` and have those of `now`.

    A window that takes a dimension whole goes on doing so, and so do groups of one channel each; all else stays.
    """
    if primitive in _GATHERS:
        windows = zip(params["slice_sizes"], before[0].shape, now[0].shape, strict=True)
        return {**params, "slice_sizes": tuple([new if size == old else size for size, old, new in windows])}
    if primitive in _CONVOLUTIONS:
        feature = params["dimension_numbers"].lhs_spec[1]
        batch = params["dimension_numbers"].lhs_spec[0]
        changed = {}
        for name, dim in (("feature_group_count", feature), ("batch_group_count", batch)):
            if params[name] > 1 and params[name] == before[0].shape[dim]:
                changed[name] = now[0].shape[dim]
        return {**params, **changed}
    return params


_GATHERS = primitives("gather")
_CONVOLUTIONS = primitives("conv_general_dilated")
