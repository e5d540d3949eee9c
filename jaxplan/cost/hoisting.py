"""What compilers compute before a loop instead of in every round: what depends on nothing that changes.

Which operators these are the graph knows (`graph/flatten.py` has them run as often as the loop). What only moves elements, or
makes them of numbers, is moved out only with what is computed from it. Source: xla/service/while_loop_invariant_code_motion.cc.
"""

from __future__ import annotations

from jaxplan import _jax
from jaxplan.graph import Graph
from jaxplan.graph.nouns import Path

STAYS = frozenset(_jax.primitives("broadcast_in_dim reshape squeeze expand_dims? transpose slice rev iota copy?"))
"""Primitives that are not worth a buffer before the loop for themselves."""


def hoisted(graph: Graph) -> dict[int, Path]:
    """{tensor that is computed before a loop and read in its rounds: the path of the operator that does}."""
    return graph.remembered("hoisted", None, lambda: _hoisted(graph))


def _hoisted(graph: Graph) -> dict[int, Path]:
    often: dict[int, float] = {}
    for op in graph.operators:
        often[op.scope] = max(often.get(op.scope, 0.0), op.times)
    out: set[int] = set()  # operators
    read: dict[int, list[int]] = {}
    for index, op in enumerate(graph.operators):
        for tensor in op.operands:
            if tensor >= 0:
                read.setdefault(tensor, []).append(index)
    for index in range(len(graph.operators) - 1, -1, -1):
        op = graph.operators[index]
        if op.equation is not None and op.times < often[op.scope]:
            worth = op.equation.primitive not in STAYS
            if worth or any(reader in out for tensor in op.results for reader in read.get(tensor, ())):
                out.add(index)
    return {
        tensor: graph.operators[index].path
        for index in sorted(out) for tensor in graph.operators[index].results
        if any(reader not in out for reader in read.get(tensor, ()))
    }  # fmt: skip
