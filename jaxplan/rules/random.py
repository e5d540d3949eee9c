"""Keys and bits. JAX's threefry is partitionable: every device can make its own part of the bits, at no
exchange. Of XLA's own generator (`rbg` keys) every device makes all, and takes its part, at no exchange either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxplan._jax import Primitive, generator, primitives
from jaxplan.rules.build import Builder
from jaxplan.rules.nouns import Dim, Kind, Rule
from jaxplan.rules.table import register, whole_rule

_BITS = primitives("random_bits")
IN_ROUNDS = {"threefry2x32": 4}
"""Words of 32 bits per element that a generator's rounds store: two go in, and two come out (measured with XLA for CPU, for all
numbers of bits)."""


def from_keys(extra: Kind, *prims: Primitive) -> None:
    """Dimensions that all arrays have in common lead; dimensions only the longer ones have are of kind
    `extra`.

    keys k -> bits k i j (parallel); raw words k w <-> keys k (the words of one key belong together).
    """

    @register(*prims, reads=None if prims == _BITS else (), free=True)
    def keyed(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
        build = Builder()
        shapes = [a.shape for a in (*operands, *results)]
        longest = max(shapes, key=len)
        common = min(len(shape) for shape in shapes)
        dims = build.factors_of(longest[:common]) + build.factors_of(longest[common:], extra)

        def leading(a: Any) -> Sequence[Dim]:
            return [dim if extent != 1 else () for dim, extent in zip(dims, a.shape, strict=False)]

        rule = build.rule(map(leading, operands), map(leading, results), flops=0.0, fusible=True)
        if prims != _BITS:
            return rule
        words = IN_ROUNDS.get(generator(operands[0].dtype), 0)
        return replace(rule, rounds_words=words, made_whole=not words)


from_keys(
    Kind.PARALLEL,
    *primitives("random_split random_fold_in random_seed random_clone? threefry2x32"),
)
from_keys(Kind.PARALLEL, *_BITS)
from_keys(Kind.WHOLE, *primitives("random_wrap random_unwrap"))


@register(*primitives("rng_bit_generator rng_uniform"), reads=())
def device_generator(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """XLA's own generator gives other numbers when it is split, so every device makes all of them."""
    return whole_rule(operands, results)
