"""What a rule says is true: cut operands in two along a factor, do each half, put the halves together.

`halves_agree` knows nothing of families: it reads the factor's place off the rule. Only what an equation was
traced with (its parameters that spell out shapes) must be written anew for half the extent, and where an
operation is told places by data (gather, scatter), those count from the start of the half.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxplan import _jax
from jaxplan.rules import Kind, Rule, classify, rule_of

Array = Any


def named(name: str) -> Any:
    return _jax.primitives(name)[0]


# --- an equation done in halves --------------------------------------------------------------------------------------

SHAPE_PARAMS: dict[Any, Callable[[Any, list[Array], list[Array], tuple[int, ...]], dict[str, Any]]] = {
    # (parameters, whole operands, half operands, half result's shape) -> parameters of the half
    named("broadcast_in_dim"): lambda p, whole, half, shape: {"shape": shape},
    named("reshape"): lambda p, whole, half, shape: {"new_sizes": shape},
    named("dynamic_slice"): lambda p, whole, half, shape: {"slice_sizes": shape},
    named("slice"): lambda p, whole, half, shape: {
        "limit_indices": tuple(
            n if n != m else limit for n, m, limit in zip(half[0].shape, whole[0].shape, p["limit_indices"], strict=True)
        )
    },
    named("gather"): lambda p, whole, half, shape: {
        "slice_sizes": tuple(
            n if size == m else size for n, m, size in zip(half[0].shape, whole[0].shape, p["slice_sizes"], strict=True)
        )
    },
    named("conv_general_dilated"): lambda p, whole, half, shape: _group_counts(p, whole, half),
}
if _jax.primitives("tile?"):
    SHAPE_PARAMS[named("tile")] = lambda p, whole, half, shape: {
        "reps": tuple(n // m for n, m in zip(shape, half[0].shape, strict=True))
    }

COMBINE = {"reduce_max": np.maximum, "reduce_min": np.minimum, "reduce_prod": np.multiply}
COMBINE |= {"reduce_and": np.logical_and, "reduce_or": np.logical_or}
COMBINE |= {"scatter-max": np.maximum, "scatter-min": np.minimum, "scatter-mul": np.multiply}
NEUTRAL = {"scatter-add": 0, "scatter-max": -np.inf, "scatter-min": np.inf, "scatter-mul": 1}
PLACED = ("gather", "scatter", "scatter_add", "scatter_mul", "scatter_min", "scatter_max")


def _group_counts(params: Any, whole: list[Array], half: list[Array]) -> dict[str, Any]:
    numbers = params["dimension_numbers"]
    sizes = {a: half[0].shape[a] * 2 == whole[0].shape[a] for a in numbers.lhs_spec[:2]}
    out_cut = half[1].shape[numbers.rhs_spec[0]] * 2 == whole[1].shape[numbers.rhs_spec[0]]
    counts = {}
    for name, a in (("batch_group_count", numbers.lhs_spec[0]), ("feature_group_count", numbers.lhs_spec[1])):
        if params[name] > 1 and sizes[a] and out_cut:
            counts[name] = params[name] // 2
    return counts


def cut(value: Array, leads: tuple[int, ...], factor: int, part: int) -> Array:
    if factor not in leads:
        return value
    axis = leads.index(factor)
    return np.split(np.asarray(value), 2, axis)[part]


def do_half(equation: Any, rule: Rule, values: list[Array], factor: int, part: int) -> list[Array]:
    """The results of one half, computed from the halves of the operands alone."""
    primitive, params = equation.primitive, dict(equation.params)
    half = [cut(v, leads, factor, part) for v, leads in zip(values, rule.operand_leads, strict=True)]
    if equation.outvars:
        leads, shape = rule.result_leads[0], equation.outvars[0].aval.shape
        shape = tuple(n // 2 if lead == factor else n for n, lead in zip(shape, leads, strict=True))
        if primitive in SHAPE_PARAMS:
            params |= SHAPE_PARAMS[primitive](params, values, half, shape)
    at = rule.operand_leads[0].index(factor) if rule.operands and factor in rule.operand_leads[0] else -1
    if primitive in map(named, PLACED):
        numbers = params["dimension_numbers"]
        columns = getattr(numbers, "start_index_map", None) or getattr(numbers, "scatter_dims_to_operand_dims", ())
        if at in columns:
            half[1] = np.array(half[1])
            half[1][..., columns.index(at)] -= part * half[0].shape[at]
            params["mode"] = lax.GatherScatterMode.FILL_OR_DROP
            params |= {"fill_value": 0} if "fill_value" in params else {}
        if rule.factors[factor].kind in (Kind.SUM, Kind.COMBINE) and "fill_value" not in params and part:
            half[0] = np.full_like(half[0], NEUTRAL[primitive.name])  # what is added to is there once
    if primitive is named("dynamic_update_slice") and at >= 0 and half[1].shape[at] == 1:
        start = int(half[2 + at]) - part * half[0].shape[at]
        if not 0 <= start < half[0].shape[at]:
            return [half[0]]
        half[2 + at] = np.asarray(start, half[2 + at].dtype)
    out = primitive.bind(*half, **params)
    return list(out) if primitive.multiple_results else [out]


def halves_agree(equation: Any, values: list[Array], results: list[Array]) -> int:
    """Check every factor that may be sharded without a halo; how many that were."""
    avals = ([v.aval for v in side] for side in (equation.invars, equation.outvars))
    rule = rule_of(equation.primitive, equation.params, *avals)
    checked = 0
    for f, factor in enumerate(rule.factors):
        if not rule.shardable[f] or factor.kind is Kind.HALO or factor.halo or factor.size % 2:
            continue
        first, second = (do_half(equation, rule, values, f, part) for part in (0, 1))
        for one, two, whole, leads in zip(first, second, results, rule.result_leads, strict=True):
            if f in leads:
                together = np.concatenate([one, two], axis=leads.index(f))
            elif factor.kind is Kind.SUM:
                together = np.asarray(one) + np.asarray(two)
            elif factor.kind is Kind.COMBINE:
                together = COMBINE[equation.primitive.name](one, two)
            else:
                np.testing.assert_array_equal(one, two)
                together = np.asarray(one)
            message = f"{equation.primitive}: {rule} cut along {factor.name}"
            assert together.dtype == whole.dtype, message
            np.testing.assert_allclose(together, whole, rtol=2e-4, atol=2e-5, err_msg=message)
        checked += 1
    return checked


def run(jaxpr: Any, consts: list[Array], args: list[Array]) -> Iterator[tuple[Any, list[Array], list[Array]]]:
    """Evaluate a jaxpr; every equation that is no call, with the values it took and gave."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for equation in jaxpr.eqns:
        values = [np.asarray(v.val, v.aval.dtype) if isinstance(v, _jax.Literal) else env[v] for v in equation.invars]
        out = equation.primitive.bind(*values, **equation.params)
        outs = list(out) if equation.primitive.multiple_results else [out]
        env.update(zip(equation.outvars, outs, strict=True))
        if equation.primitive is _jax.jit_p:
            yield from run(equation.params["jaxpr"].jaxpr, equation.params["jaxpr"].consts, values)
        else:
            yield equation, values, outs


def data(shape: tuple[int, ...], dtype: Any = np.float32, *, below: int = 4, seed: int = 0) -> Array:
    generator = np.random.default_rng([seed, *shape])
    if np.issubdtype(dtype, np.integer):
        return generator.integers(0, below, shape).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)


f, g = data((4, 6)), data((4, 6), seed=1)
cube, batch = data((2, 8, 12)), data((2, 4, 6))
image, kernel = data((2, 4, 8, 8)), data((6, 4, 2, 2))
rows = data((8,), np.int32)


def conv(strides: tuple[int, int], padding: str = "SAME", **counts: int) -> Callable[..., Array]:
    return lambda x, w: lax.conv_general_dilated(x, w, strides, padding, **counts)


def gather(slices: tuple[int, ...], **numbers: Any) -> Callable[..., Array]:
    return lambda x, i: lax.gather(x, i, lax.GatherDimensionNumbers(**numbers), slices)


def ragged(dims: Any, rows: tuple[int, ...], groups: tuple[int, ...]) -> Callable[..., Array]:
    return lambda x, w, s: lax.ragged_dot_general(x, w, s, lax.RaggedDotDimensionNumbers(dims, rows, groups))


SAMPLES: dict[str, tuple[Callable[..., Any], tuple[Array, ...]]] = {
    "elementwise": (lambda x, y: lax.clamp(-1.0, jnp.exp(x) * y, 2.0), (f, g)),
    "select": (lambda x, y: lax.select(x > y, x, -y), (f, g)),
    "threefry": (
        lambda a, b: named("threefry2x32").bind(a, a, a, b),
        (data((4, 6), np.uint32), data((4, 6), np.uint32)),
    ),
    "barrier": (lambda x, y: lax.optimization_barrier((x, y)), (f, batch)),
    "broadcast": (lambda x: lax.broadcast_in_dim(x, (8, 4, 2, 6), (1, 3)), (f,)),
    "broadcast of one": (lambda x: lax.broadcast_in_dim(x, (4, 6), (0, 1)), (f[:, :1],)),
    "split": (lambda x: x.reshape(2, 8, 4, 3), (cube,)),
    "merge": (lambda x: x.reshape(16, 12), (cube,)),
    "regroup": (lambda x: x.reshape(4, 4, 6, 2), (cube,)),
    "misfit": (lambda x: x.reshape(6, 4, 2), (data((4, 6, 2)),)),
    "transpose": (lambda x: x.transpose(2, 0, 1), (cube,)),
    "squeeze": (lambda x: lax.squeeze(x, (1,)), (data((4, 1, 6)),)),
    "rev": (lambda x: lax.rev(x, (1,)), (f,)),
    "bitcast": (lambda x: lax.bitcast_convert_type(x, np.uint8), (f,)),
    "slice": (lambda x: lax.slice(x, (0, 1), (4, 5)), (f,)),
    "every other": (lambda x: lax.slice(x, (0, 1, 0), (2, 8, 12), (1, 2, 3)), (cube,)),
    "pad": (lambda x: lax.pad(x, 0.0, ((0, 0, 0), (1, 0, 1))), (f,)),
    "pad, edges": (lambda x: lax.pad(x, 0.0, ((1, 1, 0), (0, 0, 0))), (f,)),
    "concatenate": (lambda x, y: lax.concatenate((x, y), 0), (f, g)),
    "tile": (lambda x: jnp.tile(x, (2, 4)), (f,)),
    "stack": (lambda x, y: jnp.stack((x, y), 1), (f, g)),
    "unstack": (lambda x: jnp.unstack(x, axis=0), (f,)),
    "pieces": (lambda x: lax.split(x, (1, 3), axis=0), (f,)),
    "dynamic slice": (lambda x: lax.dynamic_slice(x, (1, 0), (2, 6)), (f,)),
    "update": (lambda x, u: lax.dynamic_update_slice(x, u, (1, 0)), (f, g[:2])),
    "update of one": (lambda x, u: lax.dynamic_update_slice(x, u, (3, 0)), (f, g[:1])),
    "matmul": (jnp.matmul, (batch, data((2, 6, 8)))),
    "scores": (
        lambda q, k: lax.dot_general(q, k, (((3,), (3,)), ((0, 2), (0, 2)))),
        (data((2, 4, 2, 6)), data((2, 8, 2, 6), seed=1)),
    ),
    "ragged": (lax.ragged_dot, (data((8, 4)), data((2, 4, 6)), np.asarray([3, 5], np.int32))),
    "ragged along k": (ragged((((0,), (0,)), ((), ())), (0,), ()), (data((8, 4)), data((8, 6)), np.asarray([3, 5], np.int32))),
    "ragged batch": (
        ragged((((2,), (1,)), ((0,), (0,))), (0,), ()),
        (data((8, 4, 6)), data((8, 6, 2)), np.asarray([3, 5], np.int32)),
    ),
    "conv, patches": (conv((2, 2)), (image, kernel)),
    "conv, halo": (conv((1, 1)), (image, data((6, 4, 3, 3)))),
    "conv, groups": (conv((2, 2), feature_group_count=4), (data((2, 4, 4, 4)), data((8, 1, 2, 2)))),
    "conv, batch groups": (conv((2, 2), batch_group_count=4), (data((8, 4, 4, 4)), data((8, 4, 2, 2)))),
    "conv, transposed": (lambda x, w: lax.conv_transpose(x, w, (2, 2), "VALID"), (data((2, 4, 4, 6)), data((2, 2, 6, 8)))),
    "reductions": (lambda x: (x.sum(0), x.max(1), x.min(), x.prod(1), (x > 0).all(0), (x > 0).any(1)), (f,)),
    "reduce": (lambda x: lax.reduce(x, np.float32(0), lambda a, b: a + 2 * b, (1,)), (f,)),
    "argmax": (lambda x: (x.argmax(0), x.argmin(1)), (f,)),
    "running": (lambda x: (lax.cumsum(x, 1), lax.cummax(x, 0), lax.cumlogsumexp(x, 1)), (f,)),
    "sort": (lambda x, y: lax.sort((x, y), dimension=0), (f, g)),
    "pool": (lambda x: lax.reduce_window(x, -np.inf, lax.max, (1, 2, 1), (1, 2, 1), "VALID"), (cube,)),
    "pool, gradient": (
        jax.grad(lambda x: (lax.reduce_window(x, -np.inf, lax.max, (1, 2, 1), (1, 2, 1), "VALID") ** 2).sum()),
        (cube,),
    ),
    "pool, overlapping, gradient": (
        jax.grad(lambda x: (lax.reduce_window(x, -np.inf, lax.max, (1, 3, 1), (1, 1, 1), "SAME") ** 2).sum()),
        (cube,),
    ),
    "pool, derivative": (
        lambda x, t: jax.jvp(lambda x: lax.reduce_window(x, -np.inf, lax.max, (1, 2, 1), (1, 2, 1), "VALID"), (x,), (t,)),
        (cube, data((2, 8, 12), seed=1)),
    ),
    "take": (lambda x, i: x[i], (f, rows)),
    "take columns": (lambda x, i: x[:, i], (f, rows)),
    "take pairs": (lambda x, i: x[i, i], (f, rows)),
    "take, window kept": (
        gather((1, 6), offset_dims=(0, 2), collapsed_slice_dims=(), start_index_map=(0,)),
        (f, rows[:, None]),
    ),
    "take along": (lambda x, i: jnp.take_along_axis(x, i, 2), (cube, data((2, 8, 4), np.int32))),
    "windows": (
        gather((2, 6), offset_dims=(1, 2), collapsed_slice_dims=(), start_index_map=(0,)),
        (f, rows[:, None] % 2),
    ),
    "add at": (lambda x, i, u: x.at[i].add(u), (f, rows, data((8, 6)))),
    "add at pairs": (lambda x, i, u: x.at[i, i].add(u), (f, rows, data((8,)))),
    "add integers": (lambda x, i: x.at[i].add(i), (np.zeros(4, np.int32), rows)),
    "set at": (lambda x, i, u: x.at[:, i].set(u), (f, np.asarray([3, 0]), data((4, 2)))),
    "others at": (lambda x, i, u: x.at[i].max(u).at[i].min(u).at[i].mul(u), (f, rows, data((8, 6)))),
    "take along, gradient": (
        jax.grad(lambda x, i: (jnp.take_along_axis(x, i, 2) ** 2).sum()),
        (cube, data((2, 8, 4), np.int32)),
    ),
    "cholesky": (lambda x: named("cholesky").bind(x @ x.swapaxes(1, 2) + np.eye(4, dtype=np.float32)[None]), (data((2, 4, 4)),)),
    "triangular": (
        lambda a, b: lax.linalg.triangular_solve(a + 3 * np.eye(4, dtype=np.float32)[None], b, left_side=True, lower=True),
        (data((2, 4, 4)), batch),
    ),
    "triangular, right": (
        lambda a, b: lax.linalg.triangular_solve(a + 3 * np.eye(6, dtype=np.float32)[None], b, lower=True),
        (data((2, 6, 6)), batch),
    ),
    "applied reflections": (
        lambda a, t, c: named("ormqr").bind(a, t, c, left=True, transpose=False),
        (data((2, 6, 4)), data((2, 4)), data((2, 6, 3))),
    ),
    "symmetric product": (
        lambda a, c: named("symmetric_product").bind(a, c, alpha=2.0, beta=0.5),
        (batch, data((2, 4, 4))),
    ),
    "pivots": (lambda p: lax.linalg.lu_pivots_to_permutation(p, 6), (data((2, 4), np.int32, below=6),)),
    "tie": (lambda x, y: named("tie").bind(x, y), (rows, f)),
    "qr": (lambda x: named("qr").bind(x, pivoting=False, full_matrices=False, use_magma=None), (batch,)),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def quick_to_compile() -> Iterator[None]:
    """Each half is compiled to be run once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("name", SAMPLES)
def test_halves_make_the_whole(name: str) -> None:
    fn, args = SAMPLES[name]
    closed = jax.make_jaxpr(fn)(*args)
    seen = 0
    for equation, values, results in run(closed.jaxpr, closed.consts, list(args)):
        assert classify(equation.primitive) != "unknown", equation.primitive
        if classify(equation.primitive) == "known" or name == "threefry":
            seen += halves_agree(equation, values, results)
    assert seen


# --- halos: against the definition, tap by tap -----------------------------------------------------------------------


def reached(block: range, other: range, stride: int, dilation: int, before: int, base: int, source: int) -> list[int]:
    """Source elements that meet target elements `block` through kernel elements `other`, or the other way
    round.
    """
    places = {t * stride + k * dilation - before for t in block for k in other}
    return sorted(p // base for p in places if p % base == 0 and 0 <= p // base < source)


def beyond(mine: range, elements: list[int]) -> int:
    """How far, in elements on both sides together, what is reached lies beyond a device's own block."""
    return max(0, mine.start - elements[0]) + max(0, elements[-1] - (mine.stop - 1))


WINDOWS = [
    (taps, stride, dilation, base, shift)
    for taps, stride, dilation, base, shift in itertools.product((1, 2, 3, 5), (1, 2, 3), (1, 2), (1, 2), (-1, 0, 1))
    if 1 in (stride, base)
]


def test_halo_is_what_neighbours_must_send() -> None:
    devices, target, sharded = 4, 48, 0
    for taps, stride, dilation, base, shift in WINDOWS:
        cut_size = target * base
        source = cut_size * stride // base
        total = (cut_size - 1) * stride + (taps - 1) * dilation + 1 - ((source - 1) * base + 1)
        before = total // 2 + shift
        padding = [(before, total - before)]
        closed = jax.make_jaxpr(
            lambda x, w, s=stride, p=padding, b=base, d=dilation: lax.conv_general_dilated(
                x, w, (s,), p, lhs_dilation=(b,), rhs_dilation=(d,)
            )
        )(np.zeros((1, 1, source), np.float32), np.zeros((1, 1, taps), np.float32))
        equation = closed.jaxpr.eqns[-1]
        rule = rule_of(
            equation.primitive,
            equation.params,
            [v.aval for v in equation.invars],
            [v.aval for v in equation.outvars],
        )
        assert rule.results[0][2] == () or rule.factors[rule.results[0][2][0]].size == cut_size
        (lead,) = rule.operands[0][2]
        factor = rule.factors[lead]
        assert factor.kind in (Kind.HALO, Kind.PARALLEL), str(rule)
        needed = 0
        for device in range(1, devices - 1):
            part = range(device * cut_size // devices, (device + 1) * cut_size // devices)
            mine = range(device * source // devices, (device + 1) * source // devices)
            elements = reached(part, range(taps), stride, dilation, before, base, source)
            needed = max(needed, beyond(mine, elements))
        assert factor.halo == needed, (taps, stride, dilation, base, before, str(rule))
        sharded += 1
    assert sharded >= 80


def test_the_gradient_of_a_kernel_is_whole_in_space() -> None:
    """XLA adds over mesh axes that do not take part (`scripts/check_rules.py` shows which choices are checked)."""
    closed = jax.make_jaxpr(
        lambda x, g: jax.linear_transpose(
            lambda w: lax.conv_general_dilated(x, w, (1, 1), "SAME"), jax.ShapeDtypeStruct((6, 4, 3, 3), np.float32)
        )(g)
    )(np.zeros((2, 4, 8, 8), np.float32), np.zeros((2, 6, 8, 8), np.float32))
    equation = next(e for e in closed.jaxpr.eqns if e.primitive is named("conv_general_dilated"))
    avals = ([v.aval for v in side] for side in (equation.invars, equation.outvars))
    rule = rule_of(equation.primitive, equation.params, *avals)
    spatial = equation.params["dimension_numbers"].lhs_spec[2:]
    assert [rule.operand_leads[0][d] for d in spatial] == [-1, -1], str(rule)
