"""A `Pipeline` on a graph: which dimension of every value in the bodies holds the batch, and the graph cut for it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from jaxplan.cost import Stages, Staging, stage_graph
from jaxplan.graph import Graph, Operator
from jaxplan.graph.flatten import BOUNDARY, VIEW
from jaxplan.pipeline.nouns import Chain, Kind, Pipeline, Role
from jaxplan.rules import Rule

Rows = tuple[int, int]
"""A dimension, and how many of its elements lie between one row of the batch and the next."""


def stages_of(graph: Graph, pipeline: Pipeline, axis_names: Sequence[str]) -> Stages:
    """The graph of one micro-batch, for prices."""
    chains = pipeline.chains
    rows = {tensor: dim for tensor, (dim, _) in batch_rows(graph, chains).items()}
    summed = frozenset().union(*[_summed(graph, chain) for chain in chains])
    longest = {chain.path: (chain.length, max(chain.layers)) for chain in chains}
    axis = tuple(axis_names).index(pipeline.axis)
    resident, drawn = _resident(graph, pipeline), _drawn(graph, chains, rows)
    staging = Staging(axis, pipeline.stages, pipeline.microbatches, longest, rows, summed, resident=resident, drawn=drawn)
    if pipeline.schedule != "1f1b":
        return stage_graph(graph, staging)
    middle, ahead = _middle(graph, pipeline), chains[0]
    for op in _edges(graph, ahead):
        if op.path[-2] == "carry" and (role := ahead.carries[op.path[-1]]).kind is Kind.CUT:
            rows[op.results[1]] = role.dim
    spread({t: (dim, 1) for t, dim in rows.items()}, [graph.operators[index] for index in middle], rows)
    spared = {chains[0].path: int(pipeline.microbatches == 1), chains[1].path: int(pipeline.stages == 2)}
    ringed = _ringed(graph, pipeline)
    return stage_graph(graph, replace(staging, middle=frozenset(middle), ringed=ringed, spared=spared))


def _middle(graph: Graph, pipeline: Pipeline) -> list[int]:
    """The operators that run per micro-batch between the two scans: not those that are the same for all of them, which compilers
    take out of the loop."""
    beside = pipeline.chains[0].path[:-1]
    paths = {(*beside, number) for number in pipeline.middle}
    depth = len(beside) + 1
    found = [i for i, op in enumerate(graph.operators) if op.path[:depth] in paths and op.operands and op.name != VIEW]
    found = _moved_by(graph, found, {t for op in _edges(graph, pipeline.chains[0]) for t in op.results})
    readers: dict[int, list[int]] = {}
    for index, op in enumerate(graph.operators):
        for tensor in op.operands:
            readers.setdefault(tensor, []).append(index)
    own = set(found)
    views = [i for i, op in enumerate(graph.operators) if op.name == VIEW and own.issuperset(readers.get(op.results[0], ()))]
    return sorted([*found, *views])


def _moved_by(graph: Graph, operators: Sequence[int], seeds: set[int]) -> list[int]:
    """Those of some operators that depend on some tensors."""
    moved, before = set(seeds), -1
    views = [op for op in graph.operators if op.name == VIEW]
    while before < len(moved):
        before = len(moved)
        for op in (*views, *[graph.operators[i] for i in operators]):
            if not moved.isdisjoint(op.operands):
                moved.update(op.results)
    return [i for i in operators if not moved.isdisjoint(graph.operators[i].operands)]


def _drawn(graph: Graph, chains: Sequence[Chain], rows: Mapping[int, int]) -> frozenset[int]:
    """Of what has the rows, that which a body makes of nothing that has any, in kernels of their own: random bits. Every
    micro-batch makes all of it and takes its own; what loops make of it, they make of these alone."""
    bodies, seeds = _bodies(graph, chains), set[int]()
    for chain in chains:
        seeds.update(tensor for tensor, role in _roles(graph, chain, leaving=False).items() if role.kind is Kind.CUT)
    rules = {i: graph.operators[i].rule for i in bodies}
    own = [i for i, rule in rules.items() if rule.rounds_words or rule.made_whole or not rule.fusible]
    own = [i for i in own if graph.operators[i].name != BOUNDARY and not rows.keys().isdisjoint(graph.operators[i].results)]
    moved = set(_moved_by(graph, bodies, seeds)) if own else set[int]()
    return frozenset(t for i in own if i not in moved for t in graph.operators[i].results if t in rows)


def spread(known: dict[int, Rows], operators: Sequence[Operator], rows: dict[int, int]) -> None:
    """Add to `rows` where the operators' tensors have the rows."""
    before = -1
    while before < len(known):
        before = len(known)
        for op in operators:
            follow(op, known)
    rows.update({t: dim for t, (dim, _) in known.items()})


def _ringed(graph: Graph, pipeline: Pipeline) -> dict[int, int]:
    """What the forward scan stacks of the rows, and only the backward scan reads."""
    ahead, back = pipeline.chains
    took = {op.operands[0] for op in _edges(graph, back) if op.path[-2] == "in"}
    others = {t for op in graph.operators if not _is_edge(op, back) for t in op.operands}.union(graph.outputs)
    found = {}
    for op in _edges(graph, ahead):
        if op.path[-2] == "out" and op.results[0] in took - others:
            role = ahead.ys[op.path[-1] - len(ahead.carries)]
            if role.kind is Kind.CUT:
                found[op.results[0]] = role.dim + 1
    return found


def _resident(graph: Graph, pipeline: Pipeline) -> frozenset[int]:
    """What stages of unequal length stack, and only later layers of theirs read: where it has rows, and where the two loops are
    one. All else is gathered."""
    chains, found = pipeline.chains, set[int]()
    entering = {id(op): op for chain in chains for op in _edges(graph, chain) if op.path[-2] == "in"}
    took = {op.operands[0]: op.path[:-2] for op in entering.values()}
    others = {t for op in graph.operators if id(op) not in entering for t in op.operands}
    layers = {chain.path: chain.layers for chain in chains}
    for chain in chains:
        for op in _edges(graph, chain) if not chain.even else ():
            left = op.results[0]
            if op.path[-2] == "out" and left not in others and left not in graph.outputs:
                role = chain.ys[op.path[-1] - len(chain.carries)]
                alike = left not in took or layers[took[left]] == chain.layers
                if alike and (role.kind is Kind.CUT or (pipeline.schedule == "1f1b" and left in took)):
                    found.add(left)
    return frozenset(found)


def _roles(graph: Graph, chain: Chain, leaving: bool = True) -> dict[int, Role]:
    """The role of each value of the body that the loop's boundary gives or (unless not `leaving`) takes."""
    found: dict[int, Role] = {}
    entering = (*chain.consts, *chain.carries, *chain.xs)
    for op in _edges(graph, chain):
        mark, number = op.path[-2:]
        if mark == "in":
            found[op.results[0]] = entering[number]
        elif mark == "carry":
            found[op.results[0]] = chain.carries[number]
            if leaving and op.operands[1] >= 0:
                found[op.operands[1]] = chain.carries[number]
        elif leaving and op.operands[0] >= 0:
            found[op.operands[0]] = chain.ys[number - len(chain.carries)]
    return found


def _edges(graph: Graph, chain: Chain) -> list[Operator]:
    return [op for op in graph.operators if op.name == BOUNDARY and op.path[:-2] == chain.path]


def _summed(graph: Graph, chain: Chain) -> frozenset[int]:
    """What adds up over micro-batches: final values of carries that each stage keeps."""
    edges = [op for op in _edges(graph, chain) if op.path[-2] == "carry"]
    return frozenset(op.results[1] for op in edges if chain.carries[op.path[-1]].kind is Kind.TOTAL)


def batch_rows(graph: Graph, chains: Sequence[Chain]) -> dict[int, Rows]:
    """Where the rows of the batch are in every value of the chains' bodies that has any: followed from what enters and leaves
    them through the factors of each operator, both ways, until nothing is new."""
    rows: dict[int, Rows] = {}
    bodies = [graph.operators[index] for index in _bodies(graph, chains)]
    for chain in chains:
        rows |= {t: (role.dim, role.stride) for t, role in _roles(graph, chain).items() if role.kind is Kind.CUT}
    known = -1
    while known < len(rows):
        known = len(rows)
        for operators in (bodies, bodies[::-1]):
            for op in operators:
                follow(op, rows)
    return rows


def _bodies(graph: Graph, chains: Sequence[Chain]) -> list[int]:
    """The operators of the chains' bodies, without those that stand at the loops' edges."""
    bodies: list[int] = []
    for chain in chains:
        depth = len(chain.path)
        own = {op.scope for op in graph.operators if op.path[:depth] == chain.path and not _is_edge(op, chain)}
        bodies += [index for index, op in enumerate(graph.operators) if op.scope in own]
    return bodies


def at_extents(graph: Graph, chain: Chain) -> Chain | None:
    """A chain as it is in a graph at other extents than it was traced for: its length, and the rows of its batch; its layers are
    those of a single stage. None where rows are merged with another dimension, since roles have its extent."""
    roles = (*chain.consts, *chain.carries, *chain.xs, *chain.ys)
    cut = [role for role in roles if role.kind is Kind.CUT]
    edges = _edges(graph, chain)
    rows = {
        graph.tensors[op.results[0]].shape[chain.carries[op.path[-1]].dim]
        for op in edges if op.path[-2] == "carry" and chain.carries[op.path[-1]].kind is Kind.CUT
    }  # fmt: skip
    lengths = {graph.tensors[stack].shape[0] for op in edges if (stack := _stack(op)) >= 0 and graph.tensors[stack].shape}
    if any(role.stride != 1 for role in cut) or len(rows) != 1 or len(lengths or {chain.length}) != 1:
        return None
    return replace(chain, layers=(*(lengths or {chain.length}),), rows=rows.pop())


def _stack(op: Operator) -> int:
    """What is stacked over the rounds, where an operator takes or leaves it; -1 elsewhere."""
    if op.path[-2] == "carry" or len(op.rule.operands[0]) == len(op.rule.results[0]):
        return -1
    return op.operands[0] if op.path[-2] == "in" else op.results[0]


def _is_edge(op: Operator, chain: Chain) -> bool:
    return op.name == BOUNDARY and op.path[:-2] == chain.path


def follow(op: Operator, rows: dict[int, Rows]) -> None:
    """What one operator says of its tensors, from those that are known."""
    found = next(walked(op, rows), None)
    if found is not None:
        walk_on(op, rows, *found)


def walk_on(op: Operator, rows: dict[int, Rows], factor: int, inner: int) -> None:
    """What an operator says of its tensors where a factor walks the rows, with so many elements of it between two rows."""
    for tensor, dims in _terminals(op):
        for dim, factors in enumerate(dims):
            if tensor >= 0 and tensor not in rows and factor in factors:
                rows[tensor] = (dim, inner * _after(op.rule, factors, factors.index(factor)))


def walked(op: Operator, rows: dict[int, Rows]) -> Iterator[tuple[int, int]]:
    """Per tensor of an operator whose rows are known, the factor that walks them, and elements of it between two rows."""
    if rows.keys().isdisjoint(op.operands) and rows.keys().isdisjoint(op.results):
        return
    for tensor, dims in _terminals(op):
        if tensor in rows and (found := _factor(op.rule, dims, rows[tensor])) is not None:
            yield found


def _terminals(op: Operator) -> list[tuple[int, Sequence[Sequence[int]]]]:
    return [*zip(op.operands, op.rule.operands, strict=True), *zip(op.results, op.rule.results, strict=True)]


def _factor(rule: Rule, dims: Sequence[Sequence[int]], rows: Rows) -> tuple[int, int] | None:
    """(the factor that walks the rows, elements of it between two rows), if one does."""
    dim, stride = rows
    for place, factor in enumerate(dims[dim] if dim < len(dims) else ()):
        after = _after(rule, dims[dim], place)
        if stride % after == 0 and after <= stride < after * rule.factors[factor].size:
            return factor, stride // after
    return None


def _after(rule: Rule, factors: Sequence[int], place: int) -> int:
    """Elements of a dimension that one step of the factor at a place of it passes."""
    return math.prod([rule.factors[f].size for f in factors[place + 1 :]])
