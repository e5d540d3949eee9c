"""Functions with a partitioner of their own (`jax.custom_partitioning`): the rule is the one their author gave to Shardy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxplan._jax import primitives
from jaxplan.rules.build import Builder
from jaxplan.rules.nouns import Kind, Rule
from jaxplan.rules.table import register, whole_rule

BATCHING = "…"
"""How Shardy's notation holds a leading `...`."""


@register(*primitives("custom_partitioning"))
def partitioned(params: Mapping[str, Any], operands: Sequence[Any], results: Sequence[Any]) -> Rule:
    """The `sharding_rule` of `def_partition`, read: factors pass through; reduction factors are combined, by the partitioner
    itself, so what they leave is never scattered; those that need replication or are permuted are whole.

    Without a rule, or with one that a function makes from mesh and MLIR types, it is unknown. One operation per point of the
    iteration space: what it really does, no rule says.
    """
    given: Any = params.get("sharding_rule")
    if not hasattr(given, "operand_mappings"):
        return replace(whole_rule(operands, results), known=False)
    kinds = dict.fromkeys(given.reduction_factors, Kind.COMBINE)
    kinds |= dict.fromkeys((*given.need_replication_factors, *given.permutation_factors), Kind.WHOLE)
    mappings = (*given.operand_mappings, *given.result_mappings)
    placed = [
        (factors, extent)
        for mapping, aval in zip(mappings, (*operands, *results), strict=True)
        for factors, extent in zip(_expanded(mapping, len(aval.shape)), aval.shape, strict=True)
    ]
    sizes = dict(given.factor_sizes)
    for factors, extent in placed:
        if len(factors) == 1 and sizes.setdefault(factors[0], extent) != extent:
            raise ValueError(f"the sharding rule {given} gives factor {factors[0]!r} the sizes {sizes[factors[0]]} and {extent}")
    build = Builder()
    made = {name: build.factor(size, kinds.get(name, Kind.PARALLEL), name=_letters(name)) for name, size in sizes.items()}
    dims = iter([tuple(factor for name in factors for factor in made[name]) for factors, _ in placed])
    left, right = ([[next(dims) for _ in aval.shape] for aval in avals] for avals in (operands, results))
    return build.rule(left, right)


def _letters(name: str) -> str:
    return "".join(c for c in name if c.isidentifier()) or "b"


def _expanded(mapping: Sequence[Any], rank: int) -> Iterator[tuple[str, ...]]:
    """The factors of each dimension; a leading `...` stands for as many as the rank leaves."""
    entries = list(mapping)
    if entries and isinstance(entries[0], str) and entries[0].startswith(BATCHING):
        group = entries.pop(0)
        yield from ((f"{group}({number})",) for number in range(rank - len(entries)))
    yield from ((entry,) if isinstance(entry, str) else tuple(entry) for entry in entries)
