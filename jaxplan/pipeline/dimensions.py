"""Which dimensions of a body's inputs go together with one of them: those that every operator lays out alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxplan import _jax
from jaxplan.graph.flatten import scan_arity
from jaxplan.rules import rule_of

Nodes = list[int]
"""One number per dimension of a value."""


class _Classes:
    """Dimensions, merged where an operator has one factor for both."""

    def __init__(self) -> None:
        self.parents: list[int] = []

    def new(self, aval: Any) -> Nodes:
        start = len(self.parents)
        count = len(getattr(aval, "shape", ()))
        self.parents.extend(range(start, start + count))
        return list(range(start, start + count))

    def find(self, node: int) -> int:
        while self.parents[node] != node:
            self.parents[node] = self.parents[self.parents[node]]
            node = self.parents[node]
        return node

    def merge(self, ones: Sequence[int], others: Sequence[int]) -> None:
        for one, other in zip(ones, others, strict=True):
            self.parents[self.find(one)] = self.find(other)

    def walk(self, jaxpr: Any, ins: Sequence[Nodes]) -> list[Nodes]:
        env: dict[Any, Nodes] = dict(zip(jaxpr.invars, ins, strict=True))

        def nodes(var: Any) -> Nodes:
            if isinstance(var, _jax.Literal):
                return self.new(var.aval)
            if var not in env:
                env[var] = self.new(var.aval)
            return env[var]

        for equation in jaxpr.eqns:
            operands, results = [nodes(v) for v in equation.invars], [nodes(v) for v in equation.outvars]
            self.equation(equation, operands, results)
        return [nodes(v) for v in jaxpr.outvars]

    def equation(self, equation: Any, operands: list[Nodes], results: list[Nodes]) -> None:
        primitive, params = equation.primitive, equation.params
        if primitive is _jax.scan_p:
            consts, carries = scan_arity(equation)
            inner = [n if k < consts + carries else n[1:] for k, n in enumerate(operands)]
            outs = self.walk(params["jaxpr"].jaxpr, inner)
            for k, (out, result) in enumerate(zip(outs, results, strict=True)):
                self.merge(out, result if k < carries else result[1:])
                if k < carries:
                    self.merge(out, inner[consts + k])
        elif primitive is _jax.while_p:
            split = params["cond_nconsts"]
            total = split + params["body_nconsts"]
            outs = self.walk(params["body_jaxpr"].jaxpr, operands[split:])
            for out, result, carried in zip(outs, results, operands[total:], strict=True):
                self.merge(out, result)
                self.merge(out, carried)
        elif primitive is _jax.cond_p:
            for branch in params["branches"]:
                for out, result in zip(self.walk(branch.jaxpr, operands[1:]), results, strict=True):
                    self.merge(out, result)
        elif primitive in CALLS:
            inner = params[CALLS[primitive]]
            for out, result in zip(self.walk(getattr(inner, "jaxpr", inner), operands), results, strict=True):
                self.merge(out, result)
        else:
            self._by_rule(equation, [*operands, *results])

    def _by_rule(self, equation: Any, nodes: list[Nodes]) -> None:
        avals = [v.aval for v in equation.invars], [v.aval for v in equation.outvars]
        rule = rule_of(equation.primitive, equation.params, *avals)
        if not rule.known:
            return
        known: dict[int, int] = {}
        for held, dims in zip(nodes, (*rule.operands, *rule.results), strict=True):
            for node, dim in zip(held, dims, strict=True):
                if dim:
                    other = known.setdefault(dim[0], node)
                    if other != node:
                        self.parents[self.find(node)] = self.find(other)


CALLS = {
    _jax.jit_p: "jaxpr", _jax.remat_p: "jaxpr", _jax.closed_call_p: "call_jaxpr", _jax.custom_vmap_p: "call",
    _jax.custom_jvp_call_p: "call_jaxpr", _jax.custom_vjp_call_p: "call_jaxpr",
}  # fmt: skip
"""Calls that are looked into, and the parameter that holds what they call."""


class LikeDimensions:
    """The dimensions of a body's inputs and outputs that go together; the body is walked once."""

    def __init__(self, jaxpr: Any) -> None:
        classes = _Classes()
        self._ins = [classes.new(v.aval) for v in jaxpr.invars]
        outs = classes.walk(jaxpr, self._ins)
        self._find = classes.find
        self._like_ins, self._like_outs = self._grouped(self._ins), self._grouped(outs)

    def _grouped(self, values: Sequence[Nodes]) -> dict[int, dict[int, int]]:
        """{class: {value: the first of its dimensions that is in it}}."""
        groups: dict[int, dict[int, int]] = {}
        for k, held in enumerate(values):
            for dim, node in enumerate(held):
                groups.setdefault(self._find(node), {}).setdefault(k, dim)
        return groups

    def like(self, number: int, dim: int) -> tuple[dict[int, int], dict[int, int]]:
        """{input: its dimension} and {output: its dimension} of those with a dimension that goes together with dimension `dim`
        of input `number`, the first one of each."""
        goal = self._find(self._ins[number][dim])
        return self._like_ins.get(goal, {}), self._like_outs.get(goal, {})
