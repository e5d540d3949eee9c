"""Partial sums that are combined at once: all of them wait for the last one.

XLA makes one exchange of all-reduces of one loop body that go over the same devices, reduce alike and do not need one another, up
to 256 of them and of any size (seen in programs compiled for CPU, with 134 MB of gradients). So all gradients of data
parallelism are there in parts before the first of them is whole.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from jaxplan.cost.buffers import Facts
from jaxplan.cost.build import Modelled
from jaxplan.cost.schedule import Together
from jaxplan.graph.flatten import BOUNDARY
from jaxplan.rules import Kind

MOST = 256
"""Partial sums that are combined at once, at most."""
SUMS = ("all_reduce", "reduce_scatter")
"""Exchanges that are an all-reduce there, one of them with a slice after it."""


def combined(modelled: Modelled, choices: np.ndarray, facts: Facts) -> Together:
    """Operators whose partial results are combined together, where they are several. `facts`: in the order of the program."""
    kinds = _kinds(modelled, choices, facts)
    if len(kinds) < 2:
        return ()
    groups: list[list[int]] = []
    alike: dict[Hashable, list[int]] = {}
    needs: dict[int, int] = {}  # per tensor, the groups that it needs, as bits
    through: dict[Hashable, int] = {}  # the same of all that enters or leaves a loop
    for place, op in enumerate(facts.operators):
        mine = 0
        for tensor in op.operands:
            mine |= needs.get(tensor, 0)
        if op.name == BOUNDARY:
            loop = op.path[:-2]
            mine = through[loop] = through.get(loop, 0) | mine
        if place in kinds:
            open_to = alike.setdefault(kinds[place], [])
            group = next((g for g in open_to if not mine >> g & 1 and len(groups[g]) < MOST), -1)
            if group < 0:
                group = len(groups)
                groups.append([])
                open_to.append(group)
            groups[group].append(facts.order.sequence[place])
            mine |= 1 << group
        if mine:
            needs.update(dict.fromkeys(op.results, mine))
    return tuple([tuple(members) for members in groups if len(members) > 1])


def _kinds(modelled: Modelled, choices: np.ndarray, facts: Facts) -> dict[int, Hashable]:
    """{place of an operator whose partial result is combined: what another one has to agree in to be combined with it}."""
    graph, found = modelled.graph, dict[int, Hashable]()
    for _, exchange in modelled.combining(choices):
        step = next((step for step in exchange.steps if step.kind in SUMS), None)
        if step is not None and exchange.operator in facts.place:
            op = graph.operators[exchange.operator]
            sums = not any(factor.kind is Kind.COMBINE for factor in op.rule.factors)
            dtype = graph.tensors[exchange.tensor].dtype
            found[facts.place[exchange.operator]] = (op.scope, frozenset(step.axes), dtype, "sum" if sums else op.name)
    return found
