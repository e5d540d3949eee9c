"""Room `on_shards`: operators that XLA gathers however they are sharded, each device computing them of what it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jaxplan import _jax
from jaxplan.cost.price import terminal_layout
from jaxplan.layout import Spec
from jaxplan.plan import Plan
from jaxplan.rules import Rule


class ByHand:
    """Which operators of a plan each device computes of what it has; of a pipeline's, and where there is no plan, none."""

    def __init__(self, plan: Plan | None) -> None:
        self._found: dict[int, tuple[Rule, tuple[Spec, ...]]] = {}
        if plan is None or plan.modelled.stages is not None:
            return
        for index, cluster in enumerate(plan.modelled.graph.clusters):
            operator = plan.modelled.graph.operators[cluster.members[-1]]
            if operator.rule.by_hand:
                options = plan.modelled.chosen(plan.choices, index)
                lies = {read.tensor: plan.spec(terminal_layout(read.leads, options), len(read.leads)) for read in cluster.reads}
                self._found[cluster.members[-1]] = operator.rule, tuple([lies.get(tensor, ()) for tensor in operator.operands])

    def bind(self, equation: Any, values: list[Any], operator: int | None, mesh: Any, changed: Mapping[str, Any]) -> list[Any]:
        """The results of an equation, `operator` in the plan's graph. `changed`: parameters that take the place of its own."""
        if operator not in self._found:
            return _jax.bind(equation, values, mesh.size, changed)
        rule, specs = self._found[operator]
        return on_shards(lambda *parts: _jax.bind(equation, list(parts), mesh.size, changed), values, rule, specs, mesh)


def result_specs(rule: Rule, specs: Sequence[Spec]) -> tuple[Spec, ...]:
    """Where results lie whose operands lie as in `specs`, one per operand (() for whole)."""
    axes: dict[int, tuple[int, ...]] = {}
    for leads, spec in zip(rule.operand_leads, specs, strict=True):
        axes.update({lead: own for lead, own in zip(leads, spec or ((),) * len(leads), strict=True) if lead >= 0 and own})
    return tuple([tuple([axes.get(lead, ()) for lead in leads]) for leads in rule.result_leads])


def on_shards(function: Callable[..., Any], operands: Sequence[Any], rule: Rule, specs: Sequence[Spec], mesh: Any) -> list[Any]:
    """The results of a function that treats what `rule` lets axes split one after another. `specs`: per operand how it lies, ()
    for whole. `mesh`: its axes of type Auto; those that split nothing stay so."""
    names = mesh.axis_names
    used = {names[axis] for spec in specs for axes in spec for axis in axes}
    if not used:
        return list(function(*operands))

    def named(spec: Spec) -> P:
        return P(*[tuple([names[axis] for axis in axes]) for axes in spec])

    mapped = jax.shard_map(
        lambda *parts: tuple(function(*parts)), mesh=mesh.abstract_mesh, in_specs=tuple(map(named, specs)),
        out_specs=tuple(map(named, result_specs(rule, specs))), axis_names=used, check_vma=False,
    )  # fmt: skip
    return list(mapped(*operands))
