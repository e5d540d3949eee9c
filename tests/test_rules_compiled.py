"""The compiler agrees with the rules: where a rule says that nothing is exchanged, XLA exchanges nothing.

Every example of docs/primitives.md and every sample of test_rules_semantics.py is compiled with operands and results laid out as
each factor asks, over one axis of a mesh that has another: where XLA's sharded operators go wrong, it is there. Values must be
those of one device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_rules_coverage import listing
from test_rules_semantics import SAMPLES, quick_to_compile  # noqa: F401

from jaxplan import _jax
from jaxplan.on_shards import on_shards
from jaxplan.rules import Kind, Rule, classify, rule_of

Array = Any

EXCHANGES = {
    Kind.PARALLEL: set(),
    Kind.SUM: {"all-reduce"},
    Kind.COMBINE: {"all-reduce"},
    Kind.HALO: {"collective-permute"},
}
COLLECTIVE = re.compile(
    r"= (?!pred\[\] )[^\n]*? (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
"""All but the one flag by which devices agree that a loop over elements (igamma, ...) has converged."""

NOT_COMPILED = {
    "dce_sink": "XLA rejects it in any program for several devices",
    "mulhi": "jax 0.10 does not compile it for a CPU",
}


def run(jaxpr: Any, consts: list[Array], args: list[Array]) -> Iterator[tuple[Any, list[Array], list[Array]]]:
    """Evaluate a jaxpr; every equation that is no call, with the values it took and gave."""
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for equation in jaxpr.eqns:
        values = [v.val if isinstance(v, _jax.Literal) else env[v] for v in equation.invars]
        outs = _jax.bind(equation, values, 8)
        env.update(zip(equation.outvars, outs, strict=True))
        if equation.primitive is _jax.jit_p:
            yield from run(equation.params["jaxpr"].jaxpr, equation.params["jaxpr"].consts, values)
        else:
            yield equation, values, outs


def equations(example: tuple[Any, tuple[Array, ...]]) -> Iterator[tuple[Any, list[Array], list[Array]]]:
    fn, args = example
    closed = jax.make_jaxpr(fn)(*args)
    return run(closed.jaxpr, closed.consts, [jnp.asarray(a) for a in args])


def laid_out(terminals: tuple[tuple[int, ...], ...], factor: int) -> list[NamedSharding]:
    """Shardings where `factor` is cut by the first of two axes."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    return [NamedSharding(mesh, PartitionSpec(*["x" if lead == factor else None for lead in leads])) for leads in terminals]


def splits(rule: Rule) -> Iterator[int]:
    """The factors to cut in two: all that may be; of something point by point, one."""
    legal = [f for f, factor in enumerate(rule.factors) if rule.shardable[f] and factor.size % 2 == 0]
    pointwise = rule.fusible and rule.results and all(leads == rule.result_leads[0] for leads in rule.operand_leads)
    yield from legal[:1] if pointwise else legal


def computed(equation: Any, rule: Rule, factor: int, ins: list[NamedSharding]) -> Any:
    """What jaxplan has the compiler compute of an equation whose operands are cut along a factor by the mesh's first axis."""
    if not rule.by_hand:
        return lambda *values: _jax.bind(equation, list(values), 8)
    specs = [tuple([(0,) if lead == factor else () for lead in leads]) for leads in rule.operand_leads]
    return lambda *values: on_shards(lambda *parts: _jax.bind(equation, list(parts), 1), values, rule, specs, ins[0].mesh)


def check(equation: Any, values: list[Array], results: list[Array]) -> None:
    """Compile one equation under every split of one factor in two, and compare."""
    rule = rule_of(equation.primitive, equation.params, *([v.aval for v in side] for side in (equation.invars, equation.outvars)))
    for f in splits(rule):
        ins, outs = laid_out(rule.operand_leads, f), laid_out(rule.result_leads, f)
        split: Any = jax.jit(computed(equation, rule, f, ins), in_shardings=ins, out_shardings=outs)
        compiled = split.lower(*values).compile()
        said = f"{equation.primitive}: {rule} cut along {rule.factors[f].name}"
        assert set(COLLECTIVE.findall(compiled.as_text())) == EXCHANGES[rule.factors[f].kind], said
        got = compiled(*[jax.device_put(value, sharding) for value, sharding in zip(values, ins, strict=True)])
        for one, whole in zip(got, results, strict=True):
            if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
                one, whole = jax.random.key_data(one), jax.random.key_data(whole)
            np.testing.assert_allclose(np.asarray(one), np.asarray(whole), rtol=2e-4, atol=2e-5, err_msg=said)


RULED = [p for p in listing.installed_primitives() if listing.class_of(p) in ("known", "free")]


@pytest.mark.parametrize("primitive", RULED, ids=str)
def test_the_compiler_agrees(primitive: Any) -> None:
    example = listing.example_of(primitive, listing.examples())
    if example is None or primitive.name in NOT_COMPILED:
        return
    found = [row for row in equations(example) if row[0].primitive is primitive]
    assert found, f"no {primitive} in its example"
    for row in found:
        check(*row)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_compiler_agrees_on_samples(name: str) -> None:
    for equation, values, results in equations(SAMPLES[name]):
        if classify(equation.primitive) == "known":
            check(equation, values, results)
