"""What random programs found, each as small as it could be made. Most are programs that XLA gets wrong when sharded by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, mesh_of
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

import jaxplan
from jaxplan.rules.nouns import Kind


def as_planned(function, *args, shape=(4, 2), pins=None, **cut):
    """The plan of a function whose planned results were checked against its own. `function(hold, *args)`: `hold(value, name)`
    keeps a value in the layout `cut[name]` where it is planned, and is the identity where it is not."""
    mesh = mesh_of(shape)

    def planned(*inputs):
        return function(lambda value, name: lax.with_sharding_constraint(value, NamedSharding(mesh, cut[name])), *inputs)

    plan = jaxplan.make_plan(planned, *args, mesh=mesh, pins={f"inputs[{i}]": spec for i, spec in (pins or {}).items()})
    assert_close(jax.jit(lambda *inputs: function(lambda value, name: value, *inputs))(*args), plan.jit()(*args))
    return plan


def layout_of(plan, name):
    """The dimension that each mesh axis cuts (-1: none) of the result of the one operator called `name`."""
    (operator,) = [operator for operator in plan.modelled.graph.operators if operator.name == name]
    return plan.layouts[operator.results[0]]


@pytest.mark.parametrize("start", [-100, 0, 5, 8, 100])
def test_an_update_out_of_range_lands_where_jax_says(start):
    def write(_, x, u, i):
        return lax.dynamic_update_slice(x, u, (i, 0))

    plan = as_planned(write, jnp.zeros((8, 2)), jnp.ones((1, 2)), jnp.int32(start), pins={0: P("x")})
    assert plan.out_specs == P("x"), "the updated dimension stays sharded"


@pytest.mark.parametrize("start", [-1, 1, 3, 100])
def test_a_slice_out_of_range_is_read_where_jax_says(start):
    def read(hold, a, i):
        return hold(lax.dynamic_slice(a, (i, 0), (2, 4)), "result")

    a = jnp.arange(16, dtype=jnp.float32).reshape(4, 4)
    as_planned(read, a, jnp.int32(start), shape=(2,), pins={0: P()}, result=P("x"))


@pytest.mark.parametrize("start", [200, 100])
def test_a_start_of_a_narrow_type(start):
    as_planned(lambda _, x, i: lax.dynamic_slice(x, (i,), (8,)), jnp.arange(512.0), jnp.uint8(start))


@pytest.mark.parametrize("kind", ["set", "add", "max"])
@pytest.mark.parametrize("row", range(4))
def test_one_row_written_into_what_was_just_sliced(kind, row):
    def write(hold, a, i, u):
        return hold(getattr(hold(a, "rows").at[i], kind)(u), "rows")

    args = jnp.arange(16, dtype=jnp.float32).reshape(4, 4), jnp.int32(row), jnp.full(4, 50.0)
    plan = as_planned(write, *args, shape=(2,), pins={0: P()}, rows=P("x"))
    name = {"set": "scatter", "add": "scatter-add", "max": "scatter-max"}[kind]
    assert plan.in_specs[0] == P() and layout_of(plan, name) == (0,)


@pytest.mark.parametrize("row", range(3))
def test_one_row_each_of_a_sharded_batch(row):
    def write(hold, a, i, u):
        return hold(jax.vmap(lambda a, i, u: a.at[i].set(u))(hold(a, "rows"), i, u), "rows")

    args = np.arange(64, dtype=np.float32).reshape(2, 8, 4), np.array([row, row + 4], np.int32), np.full((2, 4), -1, np.float32)
    plan = as_planned(write, *args, pins={0: P()}, rows=P("y", "x"))
    assert plan.in_specs[0] == P() and layout_of(plan, "scatter") == (1, 0)


@pytest.mark.parametrize(("source", "result"), [("NHC", "CNH"), ("CNH", "NHC"), ("NHC", "NHC")])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_convolutions_whose_result_is_laid_out_anew(source, result, multiplier):
    def convolve(_, x, w):
        return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=(source, "OIH", result), feature_group_count=8)

    extents = {"N": 8, "H": 8, "C": 8}
    x = np.random.default_rng(0).normal(size=[extents[c] for c in source]).astype(np.float32)
    w = np.random.default_rng(1).normal(size=(8 * multiplier, 1, 3)).astype(np.float32)
    plan = as_planned(convolve, x, w, shape=(8,))
    (rule,) = [operator.rule for operator in plan.modelled.graph.operators if operator.name == "conv_general_dilated"]
    offered = {factor.name for factor in rule.factors if factor.kind is Kind.PARALLEL}
    assert ("g" in offered) == (source == result)


@pytest.mark.parametrize("window", [1, 3])
def test_depthwise_convolutions_of_one_element(window):
    """XLA aborts the process where these are cut by group along some of the mesh's axes only."""

    def convolve(_, x, w):
        return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NCH", "OIH", "NCH"), feature_group_count=8)

    x, w = np.ones((2, 8, 4), np.float32), np.arange(8 * window, dtype=np.float32).reshape(8, 1, window)
    plan = as_planned(convolve, x, w, pins={0: P(None, "x")})
    assert (layout_of(plan, "conv_general_dilated") == (1, -1)) == (window == 3)


def test_a_batch_of_transforms_gathered_later():
    """The compiler laid the transforms out in memory as the gather wanted it, and its CPU runtime refused them."""

    def transform(hold, x):
        return hold(hold(jnp.fft.fft(x), "cut") * 2.0, "whole")

    x = np.random.default_rng(0).normal(size=(4, 8, 4)).astype(np.float32)
    as_planned(transform, x, shape=(2,), pins={0: P(None, "x")}, cut=P(None, "x"), whole=P())


def test_transforms_of_what_was_gathered():
    """The same of what a transform reads."""

    def transform(hold, x):
        mixed = hold(jnp.fft.fft2(x) * lax.complex(jnp.cos(x), jnp.sin(x)), "cut")
        return hold(jnp.fft.ifft(mixed).real, "whole").sum()

    x = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    as_planned(transform, x, shape=(8,), cut=P(None, "x"), whole=P())


def test_exchanges_pass_through_even_layouts_only():
    """Swapping two axes between two dimensions of extent 2 would put both on one of them on the way."""

    def swap(hold, a):
        return hold(a * 2.0, "swapped")

    plan = as_planned(swap, jnp.arange(4.0).reshape(2, 2), shape=(2, 2, 2), pins={0: P("x", "y")}, swapped=P("y", "x"))
    named = [
        spec
        for table in (plan.constraints.reads, plan.constraints.writes, plan.constraints.outputs)
        for specs in table.values()
        for spec in specs
    ]
    assert named and all(len(axes) <= 1 for spec in named for axes in spec)


def test_what_is_read_twice_in_the_branch_that_counts_less():
    """Its price is multiplied by zero, and layouts that do not divide it stay illegal all the same."""

    def either(_, a, b, first):
        return jax.lax.cond(first, lambda a, b: a @ a @ a @ a @ b, lambda a, b: (a @ b) - (b @ a), a, b)

    a, b = jnp.arange(4.0).reshape(2, 2), jnp.ones((2, 2))
    for first in (True, False):
        as_planned(either, a, b, jnp.asarray(first), shape=(2, 2, 2))
