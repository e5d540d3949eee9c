"""What one equation makes of rows of the batch and of sums over them: read off its rule, so that no primitive is named but
where a rule alone does not say.

A micro-batch of m has every m-th row. An equation works *row by row* where its rule says that the factor of the rows is
parallel; it *sums* where the factor is contracted; anything else takes the rows together, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np

from jaxplan import _jax
from jaxplan.pipeline.nouns import Kind, PipelineError, Role
from jaxplan.rules import Kind as FactorKind, Rule, rule_of

SAME, SUM = Role(Kind.SAME), Role(Kind.SUM)


class Edit(NamedTuple):
    """What to change of one equation so that it computes one micro-batch. `operands[slot]`: CUT, take the micro-batch's rows of
    it; SUM, it counts for the first micro-batch only and is zero for the others. `params`: parameters that hold extents.
    `shapes`: of the results of one that reads rows."""

    operands: dict[int, Role]
    params: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...] = ()


UNTOUCHED = frozenset(
    _jax.primitives("copy device_put name optimization_barrier reshard sharding_constraint stop_gradient relayout? dce_sink?")
)
"""Result i is operand i."""

_ALONE = frozenset((_jax.roll_p, *_jax.primitives(
    "convert_element_type neg reshape transpose broadcast_in_dim squeeze reduce_sum copy_p? slice rev real imag reduce_precision "
    "cumsum dynamic_slice gather split conj? reduce_window_sum"
)))  # fmt: skip
"""Linear in the first operand, the others being places."""
_TOGETHER = {
    primitive: (first, last)
    for names, first, last in (
        ("add add_any sub concatenate stack?", 0, None),
        ("pad dynamic_update_slice", 0, 2),
        ("select_n", 1, None),
    )
    for primitive in _jax.primitives(names)
}
"""Linear in these operands together: a sum here, a value that is the same there."""
_PRODUCTS = frozenset(_jax.primitives("mul dot_general conv_general_dilated"))
"""Linear in each of two operands."""
_DIV, _CONVERT, _RESHAPE, _BROADCAST, _GATHER, _SLICE, _CONV, _SCATTER_ADD, _TOP_K = _jax.primitives(
    "div convert_element_type reshape broadcast_in_dim gather slice conv_general_dilated scatter_add top_k"
)
_SCATTERS = frozenset(_jax.primitives("scatter scatter_add scatter_mul scatter_min scatter_max scatter_sub?"))


def told(equation: Any) -> str:
    """An operator and the user's line, for an error."""
    file, line = _jax.source_line(equation)
    return f"{equation.primitive.name} at {file}:{line}" if file else equation.primitive.name


class Nowhere(PipelineError):
    """A refusal of an operator whose line JAX does not know: it stands in a function of JAX's own, and the call of that has
    one."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name} {why}")
        self.name, self.why = name, why


def refuse(equation: Any, why: str) -> NoReturn:
    if not _jax.source_line(equation)[0]:
        raise Nowhere(equation.primitive.name, why)
    raise PipelineError(f"{told(equation)} {why}")


def micro_shape(shape: Sequence[int], role: Role, m: int) -> tuple[int, ...]:
    """The shape of a micro-batch's part of a value."""
    return tuple(n // m if role.kind is Kind.CUT and d == role.dim else n for d, n in enumerate(shape))


def rows_through(equation: Any, roles: Sequence[Role], m: int) -> tuple[list[Role], Edit]:
    """The roles of the results of an equation that reads rows, and what to change of it.

    Raises PipelineError, naming the operator and its line, where it does not work row by row.
    """
    if equation.primitive is _RESHAPE:
        out = _reshaped(equation, roles[0], m)
        return [out], Edit({}, {"new_sizes": micro_shape(equation.params["new_sizes"], out, m)})
    rule = _rule(equation)
    active = _active(equation, roles, rule, m)
    seen, operands = list(roles), {}
    for slot, role in enumerate(roles):
        if role.kind is Kind.SAME:
            found = _within(equation, rule, rule.operands[slot], active, _shape(equation.invars[slot]))
            if found is not None:
                seen[slot] = operands[slot] = found
    _check_places(equation, seen)
    sums = any(rule.factors[f].kind is FactorKind.SUM for f in active)
    results = []
    for var, dims in zip(equation.outvars, rule.results, strict=True):
        found = _within(equation, rule, dims, active, _shape(var))
        if found is None and not sums:
            refuse(equation, "loses track of the rows of the batch: a result of it does not tell which row is whose")
        results.append(found or SUM)
    if sums:
        for slot, dims in enumerate(rule.operands):
            if not any(f in active for dim in dims for f in dim):
                if equation.primitive is not _SCATTER_ADD or slot != 0:
                    refuse(equation, "adds up the rows of the batch together with what has none")
                if roles[0] == SAME:
                    operands[0] = SUM  # what the rows are added to counts once
    shapes = tuple(micro_shape(_shape(var), role, m) for var, role in zip(equation.outvars, results, strict=True))
    return results, Edit(operands, _resized(equation, seen, results, m), shapes)


def _rule(equation: Any) -> Rule:
    avals = [v.aval for v in equation.invars], [v.aval for v in equation.outvars]
    rule = rule_of(equation.primitive, equation.params, *avals)
    if not rule.known:
        refuse(equation, "has no rule, so that nobody knows whether it works row by row: teach it with @jaxplan.rule")
    if equation.primitive is _TOP_K:  # whole for XLA's sake; the rows are apart
        axis = equation.params["axis"] % len(rule.operands[0])
        free = {f for d, dim in enumerate(rule.operands[0]) for f in dim if d != axis}
        factors = [replace(f, kind=FactorKind.PARALLEL) if n in free else f for n, f in enumerate(rule.factors)]
        rule = replace(rule, factors=tuple(factors))
    return rule


def points_of(equation: Any) -> int:
    """Points of an equation's iteration space."""
    return rule_of(equation.primitive, equation.params, [v.aval for v in equation.invars], [v.aval for v in
    equation.outvars]).points


def _shape(var: Any) -> tuple[int, ...]:
    return tuple(getattr(var.aval, "shape", ()))


def _active(equation: Any, roles: Sequence[Role], rule: Rule, m: int) -> dict[int, int]:
    """{factor that holds the rows: elements of the factor between a row and the next}."""
    active: dict[int, int] = {}
    for slot, role in enumerate(roles):
        if role.kind is not Kind.CUT:
            continue
        extent = _shape(equation.invars[slot])[role.dim]
        factor, stride = _factor_at(equation, rule, rule.operands[slot][role.dim], extent, role, m)
        if active.setdefault(factor, stride) != stride:
            refuse(equation, "pairs rows of the batch with other rows of it")
        kind = rule.factors[factor].kind
        if kind not in (FactorKind.PARALLEL, FactorKind.SUM):
            refuse(equation, "takes all rows of the batch together, so that it cannot run on a part of them")
    if len(active) > 1 and any(rule.factors[f].kind is FactorKind.SUM for f in active):
        refuse(equation, "pairs rows of the batch with other rows of it")
    for slot, dims in enumerate(rule.operands):
        held = [f for dim in dims for f in dim if f in active]
        if len(held) > 1:
            refuse(equation, "pairs rows of the batch with other rows of it")
        added_to = equation.primitive is _SCATTER_ADD and slot == 0 and not held
        if roles[slot].kind is Kind.SUM and not added_to:
            refuse(equation, "reads a sum over the rows of the batch beside the rows, so that it needs the whole batch")
    return active


def _factor_at(equation: Any, rule: Rule, dim: Sequence[int], extent: int, role: Role, m: int) -> tuple[int, int]:
    """(the factor of a dimension that holds the rows, elements of it between a row and the next)."""
    within = 1
    for factor in reversed(dim):
        size = rule.factors[factor].size
        if within <= role.stride < within * size and role.stride % within == 0 and size % (role.stride // within * m) == 0:
            return factor, role.stride // within
        within *= size
    refuse(equation, f"takes rows of the batch together: its dimension of {extent} does not come apart into rows")


def _within(
    equation: Any, rule: Rule, dims: Sequence[Sequence[int]], active: dict[int, int], shape: Sequence[int]
) -> Role | None:
    """The role of a tensor whose dimensions are made of `dims`: cut where a factor of the rows is, None where there is none."""
    found = None
    for d, dim in enumerate(dims):
        within = 1
        for factor in reversed(dim):
            if factor in active:
                if found is not None:
                    refuse(equation, "pairs rows of the batch with other rows of it")
                found = Role(Kind.CUT, d, within * active[factor])
            within *= rule.factors[factor].size
        if found is not None and found.dim == d and within != shape[d]:
            refuse(equation, "changes how many rows the batch has")
    return found


def _reshaped(equation: Any, role: Role, m: int) -> Role:
    """Where the rows are after a reshape, by arithmetic on places: rows lie `stride` elements apart, m of them side by side."""
    before, after = _shape(equation.invars[0]), _shape(equation.outvars[0])
    if equation.params["dimensions"] is not None:
        refuse(equation, "moves the rows of the batch in a way that is not known here")
    stride = role.stride * int(np.prod(before[role.dim + 1 :], dtype=np.int64))
    within = 1
    for d in reversed(range(len(after))):
        if within <= stride < within * after[d]:
            inner = stride // within
            if stride % within == 0 and after[d] % (inner * m) == 0:
                return Role(Kind.CUT, d, inner)
            break
        within *= after[d]
    refuse(equation, f"merges rows of the batch with what is beside them: {before} -> {after} leaves no {m} micro-batches apart")


def _check_places(equation: Any, roles: Sequence[Role]) -> None:
    """Refuse what its rule lets devices share but which counts places from the start of the whole: rows that are looked up."""
    primitive, role = equation.primitive, roles[0]
    if role.kind is not Kind.CUT:
        return
    params, shape = equation.params, _shape(equation.invars[0])
    if primitive is _GATHER:
        numbers = params["dimension_numbers"]
        free = role.dim in numbers.operand_batching_dims or params["slice_sizes"][role.dim] == shape[role.dim]
    elif primitive in _SCATTERS:
        numbers = params["dimension_numbers"]
        addressed = {*numbers.inserted_window_dims, *numbers.scatter_dims_to_operand_dims}
        free = role.dim in numbers.operand_batching_dims or role.dim not in addressed
    elif primitive is _jax.dynamic_update_slice_p:
        free = _shape(equation.invars[1])[role.dim] == shape[role.dim]
    elif primitive is _CONV:
        images = role.dim == params["dimension_numbers"].lhs_spec[0]
        free = params["batch_group_count"] == 1 and (images or params["feature_group_count"] == 1)
    else:
        free = True
    if not free:
        refuse(equation, "looks rows of the batch up by number, so that it needs all of them")


def _resized(equation: Any, roles: Sequence[Role], results: Sequence[Role], m: int) -> dict[str, Any]:
    """The parameters that hold extents, for one micro-batch."""
    primitive, params = equation.primitive, equation.params
    if primitive is _BROADCAST:
        return {"shape": micro_shape(params["shape"], results[0], m)}
    if primitive is _GATHER or primitive is _jax.dynamic_slice_p:
        role, shape = roles[0], _shape(equation.invars[0])
        whole = role.kind is Kind.CUT and params["slice_sizes"][role.dim] == shape[role.dim]
        return {"slice_sizes": micro_shape(params["slice_sizes"], role, m)} if whole else {}
    if primitive is _SLICE:
        return {"limit_indices": micro_shape(params["limit_indices"], roles[0], m)}
    return {}


def sums_through(equation: Any, roles: Sequence[Role], origin: str) -> tuple[list[Role], Edit]:
    """The roles of the results of an equation that reads sums over rows (and no rows): sums again where it is linear in them.

    `origin`: what made the sum, for the error.
    """
    primitive, sums = equation.primitive, [slot for slot, role in enumerate(roles) if role.kind is Kind.SUM]
    outs = [SUM] * len(equation.outvars)
    if primitive in _ALONE and sums == [0]:
        if primitive is not _CONVERT or not _rounds(equation):
            return outs, Edit({}, {})
    elif primitive in _TOGETHER or primitive is _SCATTER_ADD:
        first, last = _TOGETHER.get(primitive, (0, None))
        added = (0, 2) if primitive is _SCATTER_ADD else range(len(roles))[first:last]
        if set(sums) <= set(added):
            once = [s for s in added if s not in sums and not _is_zero(equation.invars[s])]
            return outs, Edit(dict.fromkeys(once, SUM), {})
    elif (primitive in _PRODUCTS and len(sums) == 1) or (primitive is _DIV and sums == [0] and not _whole_numbers(equation)):
        return outs, Edit({}, {})
    refuse(
        equation,
        f"reads a sum over the rows of the batch (made by {origin}) and is not linear in it, so that it needs the whole batch",
    )


def _whole_numbers(equation: Any) -> bool:
    return not jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.inexact)


def _rounds(equation: Any) -> bool:
    """Whether a conversion takes numbers to whole numbers."""
    return _whole_numbers(equation) and jnp.issubdtype(equation.invars[0].aval.dtype, jnp.inexact)


def _is_zero(var: Any) -> bool:
    return isinstance(var, _jax.Literal) and not np.any(var.val)
