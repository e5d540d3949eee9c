"""From `Traced` to `Graph`: flatten, find the state that goes round, fuse."""

from __future__ import annotations

from jaxplan.graph.flatten import BOUNDARY, WHILE_TRIPS, Flat, flatten
from jaxplan.graph.fuse import fuse
from jaxplan.graph.nouns import Graph, Operator
from jaxplan.trace import Traced, state_pairs


def build_graph(traced: Traced, while_trips: float = WHILE_TRIPS, platform: str = "") -> Graph:
    """The graph of a traced program. `while_trips`: how often a `while` loop of unknown length is assumed to run; `platform`:
    what it will run on, as JAX calls it, where the program has branches for several ("": not known)."""
    return graph_of(traced, Flat(while_trips, platform))


def graph_of(traced: Traced, flat: Flat) -> Graph:
    """The graph of a traced program, `flat` (empty) being how it is flattened."""
    inputs, outputs = flatten(traced, flat)
    ties = _confirmed_ties(state_pairs(traced), flat.operators, inputs, outputs)
    clusters = fuse(flat.tensors, flat.operators, outputs, flat.sealed)
    return Graph(
        tuple(flat.tensors), tuple(flat.operators), tuple(clusters), tuple(inputs), tuple(outputs), tuple(ties), flat.calls,
        flat.platform, flat.branches,
    )  # fmt: skip


def _confirmed_ties(
    pairs: list[tuple[int, int]], operators: list[Operator], inputs: list[int], outputs: list[int]
) -> list[tuple[int, int]]:
    """Keep the pairs whose output is an update of the input: every dimension of it comes straight through.

    A path of operators that keep all dimensions in place (element-wise work, a loop carry, an update in place) must lead
    from the input to the output; `x.T` of a square `x`, say, is no state.
    """
    producer = {tensor: operator for operator in operators for tensor in operator.results}
    confirmed = []
    for output, position in pairs:
        goal, start = inputs[position], outputs[output]
        seen, stack = {start}, [start]
        while stack:
            tensor = stack.pop()
            if tensor == goal:
                confirmed.append((output, position))
                break
            operator = producer.get(tensor)
            if operator is None:
                continue
            leads = operator.rule.results[operator.results.index(tensor)]
            for operand, dims in zip(operator.operands, operator.rule.operands, strict=True):
                same = dims == leads or (operator.name == BOUNDARY and (dims[1:] == leads or dims == leads[1:]))
                if operand >= 0 and operand not in seen and same:
                    seen.add(operand)
                    stack.append(operand)
    return confirmed
