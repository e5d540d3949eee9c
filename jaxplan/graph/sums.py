"""Additions of terms that are sums themselves: which operators add them, and which make the terms.

Each term may be left a partial sum on every device; the partial sums are added, and the total is combined over devices once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from jaxplan.graph.nouns import Operator, Path, Tensor
from jaxplan.rules import Kind, Rule


class Sums(NamedTuple):
    """`roots`: {linear operator: the one that makes the total of which it adds up a part, itself included}; `terms`: operators
    that make the terms, each read by such an operator alone."""

    roots: Mapping[int, int]
    terms: frozenset[int]


def find_sums(
    tensors: Sequence[Tensor], operators: Sequence[Operator], readers: Sequence[Sequence[int]], leaves: Collection[int],
    sealed: Collection[Path] = (),
) -> Sums:  # fmt: skip
    """The additions of at least two terms. `readers`: per tensor, the operators that read it; `leaves`: tensors that leave the
    program; `sealed`: calls that hand nothing partial in or out.

    An addition is as small as its terms allow: what else is added to their total is no part of it.
    """
    counts: dict[int, int] = {}
    makers: dict[int, int] = {}
    joins = []

    def below(operator: Operator) -> list[int]:
        """Operands that are made of terms, and that nobody else reads."""
        return [t for t in operator.operands if t in counts and _together(operators[makers[t]], operator, sealed)]

    for index, operator in enumerate(operators):
        rule = operator.rule
        if not (rule.adds or rule.linear) or len(operator.results) != 1:
            continue
        (tensor,) = operator.results
        found = 1
        if rule.linear:
            several = [counts[t] for t in below(operator)]
            found = sum(several)
            if found > max(several, default=0):
                joins.append(index)
        elif not (_sums(rule) and any(extent > 1 for extent in tensors[tensor].shape)):
            continue
        if found and len(readers[tensor]) == 1 and tensor not in leaves:
            counts[tensor], makers[tensor] = found, index
    roots: dict[int, int] = {}
    terms = set()
    for root in reversed(joins):
        waiting = [] if root in roots else [root]
        while waiting:
            member = waiting.pop()
            if operators[member].rule.linear:
                roots[member] = root
                waiting += [makers[t] for t in below(operators[member])]
            else:
                terms.add(member)
    return Sums(roots, frozenset(terms))


def _together(maker: Operator, reader: Operator, sealed: Collection[Path]) -> bool:
    """Whether a part of a sum gets from one operator to another."""
    if maker.scope != reader.scope:
        return False
    one, other = maker.path[:-1], reader.path[:-1]
    return one == other or {*_within(one, sealed)} == {*_within(other, sealed)}


def _within(path: Path, sealed: Collection[Path]) -> list[Path]:
    """The sealed calls in which something stands."""
    return [path[:n] for n in range(1, len(path) + 1) if path[:n] in sealed]


def _sums(rule: Rule) -> bool:
    """Whether parts of the result can be made on several devices."""
    kinds = [factor.kind for factor, legal in zip(rule.factors, rule.shardable, strict=True) if legal]
    return Kind.SUM in kinds and Kind.COMBINE not in kinds
