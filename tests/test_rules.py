"""Goldens: one line a rule, as printed. Then the look-up, its classes, and the odd cases."""

# ruff: noqa: E501  (one line a rule)

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxplan import _jax
from jaxplan.rules import Kind, Rule, classify, einsum_rule, rule_of
from jaxplan.rules.table import whole_rule


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def i32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner jaxprs in place of the equation that holds them."""
    for equation in jaxpr.eqns:
        inner = list(_jax.sub_jaxprs(equation))
        if inner and classify(equation.primitive) == "unknown":
            for sub in inner:
                yield from equations(sub)
        else:
            yield equation


def rule_for(equation: Any) -> Rule:
    avals = ([v.aval for v in side] for side in (equation.invars, equation.outvars))
    return rule_of(equation.primitive, equation.params, *avals)


def last_rule(fn: Callable[..., Any], *args: Any) -> Rule:
    """The rule of the last equation that `fn` traces to."""
    return rule_for(list(equations(jax.make_jaxpr(fn)(*args).jaxpr))[-1])


KEY = jax.eval_shape(lambda: jax.random.key(0))
KEYS = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 6))


def conv(
    strides: tuple[int, ...],
    padding: Any = "SAME",
    spec: tuple[str, str, str] = ("NCHW", "OIHW", "NCHW"),
    **kw: Any,
) -> Callable[..., Any]:
    return lambda x, w: lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=spec, **kw)


def kernel_gradient(strides: tuple[int, ...]) -> Callable[..., Any]:
    kernel = f32(8, 4, 3, 3)
    return lambda x, g: jax.linear_transpose(lambda w: conv(strides)(x, w), kernel)(g)[0]


def window(size: tuple[int, ...], stride: tuple[int, ...], padding: str) -> Callable[..., Any]:
    return lambda x: lax.reduce_window(x, 0.0, lax.add, size, stride, padding)


GOLDEN: list[tuple[str, str, Callable[..., Any], tuple[Any, ...]]] = [
    # name, rule, function, arguments
    ("exp", "i j -> i j", jnp.exp, (f32(4, 6),)),
    ("add", "i j, i j -> i j", jnp.add, (f32(4, 6), f32(4, 6))),
    ("mul by a scalar", "i j,  -> i j", lambda x: x * 2, (f32(4, 6),)),
    ("extent one", "i 1 -> i 1", jnp.exp, (f32(4, 1),)),
    ("rank nought", " -> ", jnp.exp, (f32(),)),
    ("clamp", ", i j,  -> i j", lambda x: lax.clamp(0.0, x, 1.0), (f32(4, 6),)),
    ("select_n", "i j, i j, i j -> i j", lax.select_n, (jax.ShapeDtypeStruct((4, 6), bool), f32(4, 6), f32(4, 6))),
    ("select_n, scalar", ", i j, i j -> i j", lax.select_n, (jax.ShapeDtypeStruct((), bool), f32(4, 6), f32(4, 6))),
    ("convert", "i j -> i j", lambda x: x.astype(jnp.bfloat16), (f32(4, 6),)),
    ("barrier", "i j, k -> i j, k", lambda x, y: lax.optimization_barrier((x, y)), (f32(4, 6), f32(8))),
    ("broadcast", "j -> i j", lambda x: jnp.broadcast_to(x, (4, 6)), (f32(6),)),
    ("broadcast, grown", "i 1 -> i j", lambda x: lax.broadcast_in_dim(x, (4, 6), (0, 1)), (f32(4, 1),)),
    ("broadcast, scalar", " -> i j", lambda x: jnp.broadcast_to(x, (4, 6)), (f32(),)),
    ("expand_dims", "i j -> i 1 j", lambda x: x[:, None], (f32(4, 6),)),
    ("squeeze", "i 1 j -> i j", lambda x: x.squeeze(1), (f32(4, 1, 6),)),
    ("transpose", "i j k -> k i j", lambda x: x.transpose(2, 0, 1), (f32(2, 3, 4),)),
    ("reshape, split", "i j (k l) -> i j k l", lambda x: x.reshape(2, 8, 4, 16), (f32(2, 8, 64),)),
    ("reshape, merge", "i j k l -> (i j) (k l)", lambda x: x.reshape(16, 64), (f32(2, 8, 4, 16),)),
    ("reshape, ones", "1 i j -> i 1 j 1", lambda x: x.reshape(4, 1, 6, 1), (f32(1, 4, 6),)),
    ("reshape, ravel", "i j -> (i j)", jnp.ravel, (f32(4, 6),)),
    ("reshape, regroup", "(i j) k -> i (j k)", lambda x: x.reshape(2, 12), (f32(4, 6),)),
    (
        "reshape, misfit",
        "(i j) k n -> (i l) m n    j: whole; k: whole; l: whole; m: whole",
        lambda x: x.reshape(6, 4, 5),
        (f32(4, 6, 5),),
    ),
    ("reshape, empty", "i j -> k    i: whole; j: whole; k: whole", lambda x: x.reshape(0), (f32(0, 3),)),
    ("rev", "i j -> i j    i: whole", lambda x: lax.rev(x, (0,)), (f32(4, 6),)),
    ("bitcast, wider", "i j -> i j k    k: whole", lambda x: lax.bitcast_convert_type(x, jnp.uint8), (f32(4, 6),)),
    ("bitcast, alike", "i j -> i j", lambda x: lax.bitcast_convert_type(x, jnp.uint32), (f32(4, 6),)),
    ("iota", " -> i j", lambda: lax.broadcasted_iota(jnp.int32, (4, 6), 1), ()),
    ("slice", "i j -> i j    j: whole", lambda x: x[:, 2:5], (f32(4, 6),)),
    ("slice, stride", "i j -> i j", lambda x: lax.slice(x, (0, 1), (4, 6), (1, 2)), (f32(4, 6),)),
    ("pad", "i j,  -> i j    j: whole", lambda x: lax.pad(x, 0.0, ((0, 0, 0), (1, 2, 0))), (f32(4, 6),)),
    ("pad, gaps", "i j,  -> i j", lambda x: lax.pad(x, 0.0, ((0, 0, 0), (1, 0, 1))), (f32(4, 6),)),
    ("concatenate", "i j, i j -> i j    j: whole", lambda x, y: lax.concatenate((x, y), 1), (f32(4, 6), f32(4, 2))),
    ("split", "i j -> i j, i j    j: whole", lambda x: lax.split(x, (2, 4), axis=1), (f32(4, 6),)),
    ("dynamic_slice", "i j, ,  -> i j    i: whole", lambda x, i: lax.dynamic_slice(x, (i, 0), (2, 6)), (f32(4, 6), i32())),
    (
        "dynamic_update_slice",
        "i j, i j, ,  -> i j    i: whole",
        lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 0)),
        (f32(4, 6), f32(2, 6), i32()),
    ),
    (
        "dynamic_update_slice of one",
        "i j, 1 j, ,  -> i j",
        lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 0)),
        (f32(4, 6), f32(1, 6), i32()),
    ),
    ("matmul", "m k, k n -> m n    k: sum", jnp.matmul, (f32(4, 6), f32(6, 8))),
    ("dot_general", "b m k, b k n -> b m n    k: sum", jnp.matmul, (f32(2, 4, 6), f32(2, 6, 8))),
    (
        "attention scores",
        "b m b2 k, b n b2 k -> b b2 m n    k: sum",
        lambda q, k: lax.dot_general(q, k, (((3,), (3,)), ((0, 2), (0, 2)))),
        (f32(2, 8, 3, 4), f32(2, 10, 3, 4)),
    ),
    (
        "ragged_dot",
        "m k, g k n, 1 -> m n    m: whole; k: sum; g: whole",
        lax.ragged_dot,
        (f32(8, 4), f32(2, 4, 6), i32(2)),
    ),
    ("dot", "k, k ->     k: sum", jnp.dot, (f32(4), f32(4))),
    (
        "conv",
        "n c h w, o c kh kw -> n o h w    c: sum; h: halo(2); kh: whole; w: halo(2); kw: whole",
        conv((1, 1)),
        (f32(2, 4, 8, 8), f32(6, 4, 3, 3)),
    ),
    (
        "conv, patches",
        "n h w c, kh kw c o -> n h w o    c: sum; kh: whole; kw: whole",
        conv((4, 4), "VALID", ("NHWC", "HWIO", "NHWC")),
        (f32(2, 8, 8, 3), f32(4, 4, 3, 6)),
    ),
    (
        "conv, valid",
        "n c h w, o c kh kw -> n o h w    c: sum; h: whole; kh: whole; w: whole; kw: whole",
        conv((1, 1), "VALID"),
        (f32(2, 4, 8, 8), f32(6, 4, 3, 3)),
    ),
    (
        "conv, pointwise",
        "n c h w, o c 1 1 -> n o h w    c: sum",
        conv((1, 1)),
        (f32(2, 4, 8, 8), f32(6, 4, 1, 1)),
    ),
    (
        "conv, stride 2",
        "n c h w, o c kh kw -> n o h w    c: sum; h: halo(1); kh: whole; w: halo(1); kw: whole",
        conv((2, 2)),
        (f32(2, 4, 8, 8), f32(6, 4, 3, 3)),
    ),
    (
        "conv, groups",
        "n (g c) h 1, (g o) c kh 1 -> n (g o) h 1    g: whole; n: whole; c: whole; o: whole; h: whole; kh: whole",
        conv((1, 1), feature_group_count=2),
        (f32(2, 4, 8, 1), f32(6, 2, 3, 1)),
    ),
    (
        "conv, depthwise",
        "n g h w, (g o) 1 kh kw -> n (g o) h w    h: halo(2); kh: whole; w: halo(2); kw: whole",
        conv((1, 1), feature_group_count=4),
        (f32(2, 4, 8, 8), f32(8, 1, 3, 3)),
    ),
    (
        "conv, batch groups",
        "(q n) c h w, (q o) c kh kw -> n (q o) h w    c: whole; h: halo(2); kh: whole; w: halo(2); kw: whole",
        conv((1, 1), batch_group_count=2),
        (f32(4, 4, 8, 8), f32(6, 4, 3, 3)),
    ),
    (
        "conv, kernel gradient",
        "c n h w, c o kh kw -> o n h w    c: sum; h: whole; kh: whole; w: whole; kw: whole",
        kernel_gradient((1, 1)),
        (f32(2, 4, 16, 16), f32(2, 8, 16, 16)),
    ),
    ("reduce_sum", "i j -> i    j: sum", lambda x: x.sum(1), (f32(4, 6),)),
    ("reduce_max", "i j -> j    i: combine", lambda x: x.max(0), (f32(4, 6),)),
    ("argmax", "i j -> i    j: whole", lambda x: lax.argmax(x, 1, jnp.int32), (f32(4, 6),)),
    ("cumsum", "i j -> i j    j: whole", lambda x: lax.cumsum(x, 1), (f32(4, 6),)),
    ("sort", "i j, i j -> i j, i j    i: whole", lambda x, y: lax.sort((x, y), 0), (f32(4, 6), f32(4, 6))),
    ("top_k", "i j -> i j, i j    j: whole; by hand", lambda x: lax.top_k(x, 2), (f32(4, 6),)),
    ("pool", "i j 1 -> i j 1    k: whole; k2: whole", window((2, 2, 1), (2, 2, 1), "VALID"), (f32(4, 6, 1),)),
    ("pool, overlapping", "i j -> i j    j: halo(2); k: whole", window((1, 3), (1, 1), "SAME"), (f32(4, 6),)),
    ("take", "v d, i 1 -> i d    v: sum", lambda x, i: x.at[i].get(mode="clip"), (f32(10, 6), i32(4))),
    ("take of 2-d", "v d, i i2 1 -> i i2 d    v: sum", lambda x, i: x[i], (f32(10, 6), i32(4, 3))),
    ("two indices", "v v2, i 1 -> i    v: sum; v2: sum", lambda x, i: x[i, i], (f32(10, 6), i32(4))),
    ("along axis", "i v, i 1 1 -> i 1    v: sum", lambda x, i: jnp.take_along_axis(x, i, 1), (f32(4, 6), i32(4, 1))),
    ("scatter_add", "v d, i 1, i d -> v d    i: sum", lambda x, i, u: x.at[i].add(u), (f32(10, 6), i32(4), f32(4, 6))),
    ("scatter", "v d, i 1, i d -> v d    i: whole", lambda x, i, u: x.at[i].set(u), (f32(10, 6), i32(4), f32(4, 6))),
    ("scatter_max", "v d, i 1, i d -> v d    i: combine", lambda x, i, u: x.at[i].max(u), (f32(10, 6), i32(4), f32(4, 6))),
    ("bits", " -> i j", lambda k: jax.random.bits(k, (4, 6)), (KEY,)),
    ("bits, many keys", "i -> i j", jax.vmap(lambda k: jax.random.bits(k, (4,))), (KEYS,)),
    ("split keys", " -> i", lambda k: jax.random.split(k, 4), (KEY,)),
    ("raw keys", "i -> i j    j: whole", jax.random.key_data, (KEYS,)),
    ("generator", "i -> i, j k    i: whole; j: whole; k: whole", lambda s: lax.rng_bit_generator(s, (5, 6)), (jax.ShapeDtypeStruct((4,), jnp.uint32),)),
    ("cholesky", "b i j -> b i j    i: whole; j: whole", lambda x: _jax.primitives("cholesky")[0].bind(x), (f32(2, 4, 4),)),
    (
        "triangular_solve",
        "b m k, b m n -> b m n    m: whole; k: whole; by hand",
        lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True),
        (f32(2, 4, 4), f32(2, 4, 6)),
    ),
    ("fft", "i j -> i j    j: whole; by hand", lambda x: lax.fft(x, "RFFT", (6,)), (f32(4, 6),)),
]  # fmt: skip


@pytest.mark.parametrize("name, line, fn, args", GOLDEN, ids=[row[0] for row in GOLDEN])
def test_golden(name: str, line: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    assert str(last_rule(fn, *args)) == line


def test_what_draws_depends_on_the_generator_of_its_key() -> None:
    def drawn(name: str) -> Rule:
        return last_rule(lambda k: jax.random.bits(k, (4, 6)), jax.eval_shape(lambda: jax.random.key(0, impl=name)))

    rules = [drawn(name) for name in ("threefry2x32", "rbg", "threefry2x32")]
    assert [(rule.rounds_words, rule.made_whole) for rule in rules] == [(4, False), (0, True), (4, False)]


def test_points_are_multiply_adds() -> None:
    rule = last_rule(conv((2, 2)), f32(2, 4, 8, 8), f32(6, 4, 3, 3))
    assert rule.points * rule.flops == 2 * (2 * 6 * 4 * 4) * (4 * 3 * 3)
    depthwise = last_rule(conv((1, 1), feature_group_count=4), f32(2, 4, 8, 8), f32(4, 1, 3, 3))
    assert depthwise.points * depthwise.flops == 2 * (2 * 4 * 8 * 8) * (3 * 3)
    product = last_rule(jnp.matmul, f32(2, 4, 6), f32(2, 6, 8))
    assert product.points * product.flops == 2 * 2 * 4 * 6 * 8
    ragged = last_rule(lax.ragged_dot, f32(8, 4), f32(2, 4, 6), i32(2))
    assert ragged.points * ragged.flops == 2 * 8 * 4 * 6


def test_a_look_up_costs_what_it_returns() -> None:
    take = last_rule(lambda x, i: x[i], f32(1000, 6), i32(4))
    assert take.points * take.flops == pytest.approx(4 * 6)
    assert take.touched == (4 / 1000, 1.0, 1.0)
    add = last_rule(lambda x, i, u: x.at[i].add(u), f32(1000, 6), i32(4), f32(4, 6))
    assert add.points * add.flops == pytest.approx(4 * 6)


def test_only_leading_factors_are_shardable() -> None:
    rule = last_rule(lambda x: x.reshape(2, 8, 4, 16), f32(2, 8, 64))
    assert rule.shardable == (True, True, True, False)
    assert rule.operand_leads == ((0, 1, 2),)
    assert rule.result_leads == ((0, 1, 2, -1),)


def test_unknown_primitive_is_whole_and_says_so() -> None:
    stranger = _jax.Primitive("stranger")
    rule = rule_of(stranger, {}, [f32(4, 6), f32(6)], [f32(4)])
    assert classify(stranger) == "unknown" and not rule.known
    assert all(factor.kind is Kind.WHOLE for factor in rule.factors) and not any(rule.shardable)
    assert rule.points * rule.flops == pytest.approx(4 * 6 + 6 + 4)


def test_classes() -> None:
    (add, iota, bits, debug) = _jax.primitives("add iota random_bits debug_callback")
    assert [classify(p) for p in (add, iota, bits, debug)] == ["known", "free", "free", "known"]
    assert classify(_jax.scan_p) == "unknown"  # control flow is the graph's
    assert last_rule(lambda: lax.iota(jnp.int32, 4)).free


def test_equal_equations_share_one_rule() -> None:
    first, second = (last_rule(jnp.add, f32(4, 6), f32(4, 6)) for _ in range(2))
    assert first is second


def test_unhashable_parameters_are_no_error() -> None:
    primitive = _jax.Primitive("holds_a_list")
    from jaxplan.rules import register

    @register(primitive)
    def make(params: Any, operands: Any, results: Any) -> Rule:
        return whole_rule(operands, results)

    assert rule_of(primitive, {"sizes": [1, 2]}, [f32(4)], [f32(4)]).known


def test_a_value_without_shape_is_a_scalar() -> None:
    assert rule_of(_jax.Primitive("token"), {}, [object()], [f32(3)]).operands == ((),)


def test_barrier_over_many_tensors_has_finite_work() -> None:
    (barrier,) = _jax.primitives("optimization_barrier")
    many = [f32(10**6, 10**6)] * 60
    rule = rule_of(barrier, {}, many, many)
    assert rule.points * rule.flops == 0.0


def test_look_up_is_fast() -> None:
    """The planner asks ten thousand times; ten microseconds each is the budget."""
    equation = jax.make_jaxpr(jnp.add)(f32(4, 6), f32(4, 6)).eqns[0]
    rule_for(equation)
    assert min(timeit.repeat(lambda: rule_for(equation), number=1000, repeat=5)) / 1000 < 10e-6


def test_rule_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="outside"):
        Rule((), (((0,),),), ())
    with pytest.raises(ValueError, match="twice"):
        einsum_rule("a a -> a", [(2, 2), (2,)])
    with pytest.raises(ValueError, match="touched"):
        Rule((), ((),), ((),), touched=(1.0,))


def test_primitives_absent_from_this_jax_are_named() -> None:
    assert _jax.primitives("add not_there?") == _jax.primitives("add")
    with pytest.raises(AttributeError, match="not_there_p"):
        _jax.primitives("not_there")
