"""Which scans of a program can run in stages, and what each of their values is to a micro-batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxplan import _jax
from jaxplan.graph.flatten import scan_arity
from jaxplan.pipeline.dimensions import CALLS, LikeDimensions
from jaxplan.pipeline.fuse import alternating
from jaxplan.pipeline.nouns import SCHEDULES, Chain, Kind, Path, Pipeline, PipelineError, Role, even_layers
from jaxplan.pipeline.roles import Readers, Walk, points_in
from jaxplan.pipeline.rowwise import SAME, SUM, Edit, told

NEARLY_ALL = 0.9
"""What share of a body's work micro-batches share for no other dimension to be tried for the rows."""


class Scan(NamedTuple):
    """A scan of a program and where it stands. `times`: how often it runs in one call, as far as scans around it tell."""

    path: Path
    equation: Any
    times: int

    @property
    def length(self) -> int:
        return int(self.equation.params["length"])


def scans(jaxpr: Any, path: Path = (), times: int = 1) -> Iterator[Scan]:
    """All scans of a jaxpr, outer ones before those inside of them, in program order. Branches and `while` loops are left out."""
    for number, equation in enumerate(jaxpr.eqns):
        here = (*path, number)
        if equation.primitive is _jax.scan_p:
            found = Scan(here, equation, times)
            yield found
            yield from scans(equation.params["jaxpr"].jaxpr, here, times * found.length)
        elif equation.primitive in CALLS:
            inner = equation.params[CALLS[equation.primitive]]
            yield from scans(getattr(inner, "jaxpr", inner), here, times)


def endless(jaxpr: Any) -> Iterator[Any]:
    """The loops of a jaxpr, outside of others, of which it does not say how often they run."""
    for equation in jaxpr.eqns:
        if equation.primitive is _jax.while_p:
            yield equation
        elif equation.primitive in CALLS:
            inner = equation.params[CALLS[equation.primitive]]
            yield from endless(getattr(inner, "jaxpr", inner))


def scan_at(jaxpr: Any, path: Path) -> Any:
    """The scan equation at a path. Raises PipelineError where there is none."""
    for scan in scans(jaxpr):
        if scan.path == path:
            return scan.equation
    raise PipelineError(f"the program has no scan at {path}: the pipeline was made for another program")


def chain_of(equation: Any, path: Path, layers: Sequence[int], microbatches: int) -> Chain:
    """The chain of a scan over layers: which dimension of its values holds the rows of the batch, and what becomes of each.

    Every dimension of every carry is tried for the rows, until the body works row by row with one and micro-batches share
    nearly all of its work; else the one is taken with which they share the most (a gradient that layers add up could be cut, too,
    but that would share little). Raises PipelineError that tells for each why it is not, naming the operator and the user's line.
    """
    consts, carries = scan_arity(equation)
    body = equation.params["jaxpr"].jaxpr
    if sum(layers) != equation.params["length"]:
        raise PipelineError(f"{told(equation)} has {equation.params['length']} layers; {tuple(layers)} are {sum(layers)}")
    refusals, found = dict[str, str](), dict[int, Chain]()
    dimensions, readers, enough = LikeDimensions(body), Readers(), NEARLY_ALL * points_in(body)
    for k in range(consts, consts + carries):
        for dim, extent in enumerate(body.invars[k].aval.shape):
            if extent < 2:
                continue
            if extent % microbatches:
                why = f"{microbatches} micro-batches do not divide its {extent} rows"
                refusals.setdefault(why, f"dimension {dim} of {body.invars[k].aval.str_short()}")
                continue
            walk = Walk(microbatches, readers)
            try:
                chain = _chain(equation, path, tuple(layers), walk, dimensions, k, dim)
                points = walk.points()
                if points > enough:
                    return chain
                found.setdefault(points, chain)
            except PipelineError as error:
                refusals.setdefault(str(error), f"dimension {dim} of {body.invars[k].aval.str_short()}")
    if found:
        return found[max(found)]
    if not refusals:
        raise PipelineError(f"{told(equation)} carries no array from layer to layer, so that it has no rows to cut")
    tried = "; ".join(f"were the rows in {place}: {why}" for why, place in refusals.items())
    raise PipelineError(f"{told(equation)} cannot run in stages on {microbatches} micro-batches: {tried}")


def _chain(
    equation: Any, path: Path, layers: tuple[int, ...], walk: Walk, dimensions: LikeDimensions, seed: int, dim: int
) -> Chain:
    """The chain if the rows are in dimension `dim` of the body's input `seed`."""
    consts, carries = scan_arity(equation)
    body = equation.params["jaxpr"].jaxpr
    rows = body.invars[seed].aval.shape[dim]
    like, like_outs = dimensions.like(seed, dim)
    first: PipelineError | None = None
    tried: list[list[Role]] = []
    for kept in (range(len(body.invars)), range(consts + carries, len(body.invars)), ()):
        roles = [SAME] * len(body.invars)
        for k in kept:
            if not consts <= k < consts + carries and k in like:
                roles[k] = _rows_in(body.invars[k].aval.shape, like[k], rows)
        roles[seed] = Role(Kind.CUT, dim, 1)
        if roles in tried:
            continue
        tried.append(list(roles))
        walk.shared.clear()
        walk.edits.clear()
        try:
            state, ys = _settled(equation, roles, [None] * (len(body.outvars) - carries), walk)
            wanted = [
                _rows_in(body.outvars[k].aval.shape, like_outs[k], rows) if role == SAME and k in like_outs else role
                for k, role in enumerate(ys, start=carries)
            ]
            if wanted != ys:  # what is drawn for the whole batch is kept by rows, as its readers take it
                state, ys = _settled(equation, roles, wanted, walk)
        except PipelineError as error:
            first = first or error
            continue
        return Chain(
            path, bool(equation.params["reverse"]), layers, tuple(roles[:consts]), tuple(state),
            tuple(roles[consts + carries :]), tuple(ys), rows,
        )  # fmt: skip
    raise first or PipelineError("no way to cut the rows was tried")


def _rows_in(shape: Sequence[int], dim: int, rows: int) -> Role:
    """The role of a value of which a dimension goes together with the rows, perhaps merged with others after them."""
    return Role(Kind.CUT, dim, shape[dim] // rows) if shape[dim] % rows == 0 else SAME


def _settled(
    equation: Any, roles: Sequence[Role], wanted: Sequence[Role | None], walk: Walk
) -> tuple[list[Role], list[Role]]:
    """The roles of the carries, and of what is stacked (`wanted`: some of these), when the body has been walked until they change
    no more."""
    consts, carries = scan_arity(equation)
    body, ys = equation.params["jaxpr"].jaxpr, list[Role]()

    def once(state: list[Role]) -> list[Role]:
        ins = [*roles[:consts], *state, *roles[consts + carries :]]
        outs = walk.body(equation, body, ins, [*state, *wanted], ())
        ys[:] = outs[carries:]
        return outs[:carries]

    state = walk.loop(equation, list(roles[consts : consts + carries]), once)
    added = _only_added_to(equation) if SUM in state else set[int]()
    return [Role(Kind.TOTAL) if role == SUM and k in added else role for k, role in enumerate(state)], ys


def _only_added_to(equation: Any) -> set[int]:
    """The carries that a scan's body does nothing with but add to."""
    consts, carries = scan_arity(equation)
    body = equation.params["jaxpr"].jaxpr
    reads, adds = Counter[Any](), dict[Any, Any]()
    for e in body.eqns:
        reads.update([v for v in e.invars if not isinstance(v, _jax.Literal)])
        if e.primitive in _ADDS:
            adds[e.outvars[0]] = e
    left = Counter([v for v in body.outvars if not isinstance(v, _jax.Literal)])
    found = set()
    for k in range(carries):
        var, out = body.invars[consts + k], body.outvars[k]
        adder = None if isinstance(out, _jax.Literal) else adds.get(out)
        if adder is None or sum(v is var for v in adder.invars) != 1:
            continue
        if reads[var] == 1 and not reads[out] and not left[var] and left[out] == 1:
            found.add(k)
    return found


_ADDS = frozenset(_jax.primitives("add add_any"))


def edits_of(equation: Any, chain: Chain, microbatches: int) -> Mapping[Path, Edit]:
    """The edits with which a scan's body computes one micro-batch. Paths start with the scan's own."""
    walk = Walk(microbatches)
    carried = [SUM if role.kind is Kind.TOTAL else role for role in chain.carries]
    body = equation.params["jaxpr"].jaxpr
    outs = walk.body(
        equation, body, [*chain.consts, *carried, *chain.xs], [*carried, *chain.ys], chain.path
    )
    if outs != [*carried, *chain.ys]:
        raise PipelineError(f"{told(equation)} is not the scan that its chain was made for")
    return walk.edits


def left_out(jaxpr: Any, pipeline: Pipeline) -> list[str]:
    """Of the outermost scans that a pipeline does not lay in stages, why they cannot be; those that could be are not named."""
    found, taken = list[str](), [chain.path for chain in pipeline.chains]
    for scan in scans(jaxpr):
        if scan.length < 2 or any(path[: len(scan.path)] == scan.path or scan.path[: len(path)] == path for path in taken):
            continue
        taken.append(scan.path)
        try:
            chain_of(scan.equation, scan.path, even_layers(scan.length, 2), 1)
        except PipelineError as error:
            found.append(str(error).split("; ")[0].replace(" on 1 micro-batches", ""))
    return found


def pipeline_of(
    jaxpr: Any,
    axis: str,
    stages: int,
    microbatches: int,
    *,
    paths: Sequence[Path] | None = None,
    layers: Mapping[int, Sequence[int]] | None = None,
    schedule: str = "gpipe",
) -> Pipeline:
    """A pipeline of a program: its scans over layers laid over the stages.

    `paths`: the scans (`None`: the outermost ones that can run in stages, at least one). `layers`: {length of a scan: layers per
    stage}; scans of a length that it leaves out have as equal stages as can be. Raises PipelineError where a scan cannot run
    in stages, naming the operator and line; ValueError for numbers that do not fit.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r}; it may be {' or '.join(map(repr, SCHEDULES))}")
    chains, problems = [], []
    for scan in scans(jaxpr):
        inside = any(scan.path[: len(chain.path)] == chain.path for chain in chains)
        if inside or (paths is not None and scan.path not in paths):
            continue
        try:
            counts = tuple((layers or {}).get(scan.length) or even_layers(scan.length, stages))
            chains.append(chain_of(scan.equation, scan.path, counts, microbatches))
        except ValueError as error:
            if paths is not None:
                raise
            problems.append(str(error))
    if not chains:
        problems += [
            f"{told(loop)} runs as often as it finds out while it runs: of layers, the program has to say how many there are "
            "(jax.lax.scan over stacked layers, or fori_loop between numbers)"
            for loop in endless(jaxpr)
        ]
        raise PipelineError("no scan of the program can run in stages: " + ("; ".join(problems) or "it has none"))
    return alternating(jaxpr, Pipeline(axis, stages, microbatches, schedule, tuple(chains)))
