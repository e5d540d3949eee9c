"""Additions of terms that are sums themselves: which operators add them, and which make the terms.

Each term may be left a partial sum on every device; the partial sums are added, and the total is combined over devices once.
So it is with what the rounds of a loop add to a carry: it may go round as a partial sum, and is combined after the loop.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from jaxplan.graph.flatten import BOUNDARY, TOTAL, VIEW
from jaxplan.graph.nouns import Operator, Path, Tensor
from jaxplan.rules import Kind, Rule


class Sums(NamedTuple):
    """`roots`: {linear operator: the one that makes the total of which it adds up a part, itself included}; `terms`: operators
    that make the terms, each read by such an operator alone; `loops`: {boundary of a carry that rounds of a loop add to: the
    operator that makes their sum}."""

    roots: Mapping[int, int]
    terms: frozenset[int]
    loops: Mapping[int, int]


def find_sums(
    tensors: Sequence[Tensor], operators: Sequence[Operator], readers: Sequence[Sequence[int]], leaves: Collection[int],
    sealed: Collection[Path] = (),
) -> Sums:  # fmt: skip
    """The additions of at least two terms. `readers`: per tensor, the operators that read it; `leaves`: tensors that leave the
    program; `sealed`: calls that hand nothing partial in or out.

    An addition is as small as its terms allow: what else is added to their total is no part of it.
    """
    makers = _carried(operators, readers)
    carried = frozenset(makers)
    counts = dict.fromkeys(carried, 1)
    joins = []

    def below(operator: Operator) -> list[int]:
        """Operands that are made of terms, and that nobody else reads."""
        return [t for t in operator.operands if t in counts and _together(operators[makers[t]], operator, sealed, t in carried)]

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
    loops: dict[int, int] = {}
    terms = set()
    for root in reversed(joins):
        waiting = [] if root in roots else [root]
        while waiting:
            member = waiting.pop()
            if operators[member].rule.linear:
                roots[member] = root
                waiting += [makers[t] for t in below(operators[member])]
            elif carried.isdisjoint(operators[member].results):
                terms.add(member)
            elif operators[root].results[0] == operators[member].operands[1]:
                loops[member] = root
    for boundary in loops:
        (total,) = readers[operators[boundary].results[1]]
        roots[total] = total
    return Sums(roots, frozenset(terms), loops)


def _carried(operators: Sequence[Operator], readers: Sequence[Sequence[int]]) -> dict[int, int]:
    """{what a round of a loop sees of a carry that is only added to: the boundary of the carry}."""
    totals = {operator.operands[0] for operator in operators if operator.name == VIEW and TOTAL in operator.path[-3:-2]}
    if not totals:
        return {}
    return {
        operator.results[0]: index for index, operator in enumerate(operators)
        if operator.name == BOUNDARY and len(operator.results) == 2 and operator.results[1] in totals
        and len(readers[operator.results[1]]) == 1
    }  # fmt: skip


def _together(maker: Operator, reader: Operator, sealed: Collection[Path], carried: bool) -> bool:
    """Whether a part of a sum gets from one operator to another; `carried`: into a round of a loop."""
    if maker.scope != reader.scope and not carried:
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
