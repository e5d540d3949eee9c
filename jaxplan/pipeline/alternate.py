"""The schedule `1f1b`: one loop in which every stage takes one micro-batch forward and one backward at each tick.

At tick t stage s has micro-batch t - s forward and micro-batch t - 2 (k - 1) + s backward, if there are such: at the last stage
the same one, which turns round there. Between the two a stage keeps its residuals, in a ring of 2 k - 1 slots. In the first k - 1
ticks no stage has any backward, and in the last k - 1 none forward: they are loops of their own. So all devices always do the
same: a collective in a branch that some of them do not take would wait for them for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxplan import _jax
from jaxplan.pipeline.execute import (
    BodyOf,
    Hold,
    Read,
    Stage,
    at,
    blank,
    by_microbatch,
    everywhere,
    from_stage,
    keep,
    layer_of,
    left_stacked,
    parts,
    where,
)
from jaxplan.pipeline.fuse import Fused
from jaxplan.pipeline.nouns import Chain, Kind, Pipeline, Role
from jaxplan.pipeline.rowwise import SUM
from jaxplan.pipeline.staged import all_entering, edited, entering_spec, join_rows, stacked_spec, take_rows, whole

TOTAL = Role(Kind.TOTAL)


@dataclass(frozen=True)
class Side:
    """One of the two scans: its equation, its chain, and how it is replayed. `given`: its operands, laid as it reads them; None
    for what the loop makes."""

    equation: Any
    chain: Chain
    body_of: BodyOf
    hold: Hold
    given: Sequence[Any] = ()


Middle = Callable[[Any, Mapping[Any, Any]], Mapping[Any, Any]]
"""(number of a micro-batch, values by variable) -> the same with what stands between the two scans, computed for it."""


def run_fused(
    fused: Fused, pipeline: Pipeline, mesh: Any, outside: Mapping[Any, Any], sides: tuple[Side, Side], middle: Middle
) -> dict[Any, Any]:
    """The values, by variable, of the backward scan's results and of all that leaves the loop. `outside`: what the middle reads
    that was made before it."""
    return _Loop(fused, pipeline, sides, middle).run(mesh, outside)


class _Loop:
    def __init__(self, fused: Fused, pipeline: Pipeline, sides: tuple[Side, Side], middle: Middle) -> None:
        self.fused, self.pipeline, self.middle = fused, pipeline, middle
        self.ahead, self.back = sides
        self.m, self.k, self.axis = pipeline.microbatches, pipeline.stages, pipeline.axis
        self.slots = min(self.m, 2 * self.k - 1)
        chain = self.ahead.chain
        outs = self.ahead.equation.outvars
        self.finals = {var: k for k, var in enumerate(outs[: len(chain.carries)])}
        self.residuals = {var: k for k, var in enumerate(outs[len(chain.carries) :])}
        backs = self.back.equation.invars
        first = len(self.back.chain.consts) + len(self.back.chain.carries)
        self.starts = backs[len(self.back.chain.consts) : first]
        self.sources = [None if isinstance(v, _jax.Literal) else self.residuals.get(v) for v in backs[first:]]
        """Per stacked operand of the backward scan, the residual that it is, or None for what comes from outside."""
        operands = zip(parts(chain, self.ahead.given)[2], chain.xs, strict=True)
        known = {(id(value), role): k for k, (value, role) in enumerate(operands)}
        same = chain.layers == self.back.chain.layers
        pairs = zip(parts(self.back.chain, self.back.given)[2], self.back.chain.xs, strict=True)
        self.alike = [known.get((id(value), role)) if same and value is not None else None for value, role in pairs]
        """Per the same, the stacked operand of the forward scan that it is too, read in the same layout: it enters once."""
        left = [v for v in fused.leaving if v not in self.residuals]
        self.totals = [v for v in left if fused.roles[v].kind is Kind.TOTAL]
        self.leaving = [v for v in left if fused.roles[v].kind is not Kind.TOTAL]
        """What leaves from the last stage."""

    def _known(self, number: int) -> bool:
        """Whether a stacked operand of the backward scan is in the loop already."""
        return self.sources[number] is not None or self.alike[number] is not None

    def run(self, mesh: Any, outside: Mapping[Any, Any]) -> dict[Any, Any]:
        """Values enter the manual region, go round, and leave it."""
        ahead, back, m = self.ahead.chain, self.back.chain, self.m
        consts, carries, xs = parts(ahead, self.ahead.given)
        back_consts, starts, back_xs = parts(back, self.back.given)
        entering = [None if self._known(k) else v for k, v in enumerate(back_xs)]
        given = {
            "consts": [by_microbatch(whole(v), r, m) for v, r in zip(consts, ahead.consts, strict=True)],
            "carries": [by_microbatch(whole(v), r, m) for v, r in zip(carries, ahead.carries, strict=True)],
            "back consts": [by_microbatch(whole(v), r, m) for v, r in zip(back_consts, back.consts, strict=True)],
            "starts": [None if v is None else by_microbatch(whole(v), r, m) for v, r in zip(starts, back.carries, strict=True)],
            "outside": [whole(v) for v in outside.values()],
            "xs": all_entering(xs, ahead, m, self.ahead.hold),
            "back xs": all_entering(entering, back, m, self.back.hold),
        }
        specs = {name: P() for name in given} | {
            "xs": [entering_spec(r, ahead, self.axis) for r in ahead.xs],
            "back xs": [None if self._known(k) else entering_spec(r, back, self.axis) for k, r in enumerate(back.xs)],
        }
        kept = [[stacked_spec(r, self.axis) for r in chain.ys] for chain in (ahead, back)]
        out = jax.shard_map(
            lambda given: self.region(given, list(outside)), mesh=mesh.abstract_mesh, in_specs=(specs,),
            out_specs=(P(), P(), P(), P(), *kept), axis_names={self.axis}, check_vma=False,
        )(given)  # fmt: skip
        return self.collected(out, carries, starts)

    def collected(self, out: Any, carries: Sequence[Any], starts: Sequence[Any]) -> dict[Any, Any]:
        """Everything by variable."""
        leaving, totals, finals, added, residuals, ys = out
        found: dict[Any, Any] = {}
        for var, value in zip(self.leaving, leaving, strict=True):
            found[var] = _left(value, self.fused.roles[var], var)
        numbers = [k for k, r in enumerate(self.ahead.chain.carries) if r.kind is Kind.TOTAL]
        for k, value in zip(numbers, totals, strict=True):
            found[self.ahead.equation.outvars[k]] = whole(carries[k]) + value.astype(carries[k].dtype)
        stacked = left_stacked(self.ahead.equation, self.ahead.chain, residuals, self.ahead.hold)
        found.update({var: stacked[k] for var, k in self.residuals.items() if var in self.fused.leaving})
        chain, moving, staying = self.back.chain, iter(finals), iter(added)
        outs = self.back.equation.outvars
        for k, role in enumerate(chain.carries):
            if role.kind is Kind.TOTAL:
                found[outs[k]] = whole(starts[k]) + next(staying).astype(outs[k].aval.dtype)
            else:
                found[outs[k]] = _left(next(moving), role, outs[k])
        stacked = left_stacked(self.back.equation, chain, ys, self.back.hold)
        return {**found, **dict(zip(outs[len(chain.carries) :], stacked, strict=True))}

    # ---- inside of the manual region ---------------------------------------------------------------------------

    def _stacks(self, given: dict[str, list[Any]], ahead: Stage, back: Stage) -> tuple[list[Any], list[Any]]:
        """What layers read of stacks that enter, each way, laid as planned; None for what the loop itself keeps."""
        xs = [v if twin is None else given["xs"][twin] for v, twin in zip(given["back xs"], self.alike, strict=True)]
        back_xs = [None if v is None else back.hold("in", k, v) for k, v in enumerate(xs)]
        return ahead.held("in", range(len(given["xs"])), given["xs"]), back_xs

    def region(self, given: dict[str, list[Any]], outside: Sequence[Any]) -> Any:
        ahead, back = (Stage(side.equation, side.chain, self.pipeline, side.hold) for side in (self.ahead, self.back))
        carries = ahead.held("carry", range(len(given["carries"])), given["carries"])
        xs, back_xs = self._stacks(given, ahead, back)
        known = dict(zip(outside, given["outside"], strict=True))
        last, first = ahead.position == self.k - 1, back.position == self.k - 1

        def forward(row: Any, valid: Any, arrived: Sequence[Any], stores: Sequence[Any]) -> Any:
            start = ahead.carried(ahead.start(ahead.entering(carries, row), arrived), zeros_ahead)
            reads, slots = ahead.reads(xs, row), [row % self._ring(k) for k in range(len(stores))]
            after, stores = ahead.layers(self.ahead.body_of, row, given["consts"], start, reads, stores, slots, valid)
            return (*ahead.parted(ahead.held("carry", range(len(after)), after)), stores)

        def between(row: Any, out: Sequence[Any]) -> Any:
            have = {self.ahead.equation.outvars[k]: v for k, v in zip(ahead.chain.circulating, out, strict=True)}
            values = {**have, **self.middle(row, {**known, **have})}
            starts = [
                self._start(values, k, var, given["starts"][k], row)
                for k, var in enumerate(self.starts)
                if back.chain.carries[k].kind is not Kind.TOTAL
            ]
            return starts, [values[v] for v in self.leaving]

        def backward(
            row: Any, valid: Any, starts: Sequence[Any], arrived: Sequence[Any], stores: Sequence[Any], ys: Sequence[Any]
        ) -> Any:
            starts, arrived = (back.held("carry", moves, values) for values in (starts, arrived))
            start = back.carried(where(back.position == 0, starts, arrived), zeros_back)
            reads = [
                self._residual(stores[source], row, role, source, k) if source is not None else back.read(v, role, row)
                for k, (v, role, source) in enumerate(zip(back_xs, back.chain.xs, self.sources, strict=True))
            ]
            after, ys = back.layers(self.back.body_of, row, given["back consts"], start, reads, ys, [row] * len(ys), valid)
            return (*back.parted(back.held("carry", range(len(after)), after)), ys)

        def tick(state: Any, t: Any, go: bool, come: bool) -> Any:
            """All stages at one step. `go`: some have a micro-batch forward; `come`: some have one backward."""
            arrived, returned, left, totals, finals, added, stores, ys = state
            starts = blanks(first_starts)
            if go:
                row, valid = ahead.microbatch(t)
                out, more, stores = forward(row, valid, arrived, stores)
                totals = [keep(v, a, TOTAL, row, valid) for v, a in zip(totals, more, strict=True)]
                arrived = ahead.held("carry", ahead.chain.circulating, ahead.handed_on(out))
                if come:
                    turning = valid & last
                    starts, values = between(row, out)
                    pairs = zip(left, values, self.leaving, strict=True)
                    left = [keep(s, v, self.fused.roles[var], row, turning) for s, v, var in pairs]
            if come:
                row, valid = back.microbatch(t, self.k - 1)
                home, more, ys = backward(row, valid, starts, returned, stores, ys)
                added = [keep(v, a, TOTAL, row, valid) for v, a in zip(added, more, strict=True)]
                finals = [keep(f, v, role, row, valid & first) for f, v, role in zip(finals, home, roles, strict=True)]
                finals, returned = (back.held("carry", moves, values) for values in (finals, back.handed_on(home)))
            return (arrived, returned, left, totals, finals, added, stores, ys), None

        row = jnp.int32(0)
        zeros_ahead, zeros_back = self._zeros(self.ahead), self._zeros(self.back)
        entering = ahead.entering(carries, row)
        first_starts, values = jax.eval_shape(between, row, entering)
        moves = back.chain.circulating
        roles = [back.chain.carries[k] for k in moves]
        state = (
            ahead.held("carry", ahead.chain.circulating, entering), back.held("carry", moves, blanks(first_starts)),
            [self._room(v, self.fused.roles[var]) for v, var in zip(values, self.leaving, strict=True)],
            [blank(v.shape, v.dtype, TOTAL) for v in zeros_ahead],
            [self._room(v, r) for v, r in zip(first_starts, roles, strict=True)],
            [blank(v.shape, v.dtype, TOTAL) for v in zeros_back],
            self._stores(ahead), back.stores(self.m),
        )  # fmt: skip
        turn, ticks = self.k - 1, jnp.arange(self.m + 2 * (self.k - 1), dtype=jnp.int32)
        for go, come, some in ((True, False, ticks[:turn]), (True, True, ticks[turn:-turn]), (False, True, ticks[-turn:])):
            state, _ = jax.lax.scan(lambda state, t, go=go, come=come: tick(state, t, go, come), state, some)
        _, _, left, totals, finals, added, stores, ys = state
        return (
            [from_stage(v, last, self.axis) for v in left], [everywhere(v, self.axis) for v in totals],
            [from_stage(v, first, self.axis) for v in finals], [everywhere(v, self.axis) for v in added],
            stores, ys,
        )  # fmt: skip

    def _zeros(self, side: Side) -> list[Any]:
        """What the carries that stages add up start from, for every micro-batch."""
        outs = zip(side.equation.outvars, side.chain.carries, strict=False)
        return [_jax.zeros(v.aval.shape, v.aval.dtype) for v, r in outs if r.kind is Kind.TOTAL]

    def _start(self, values: Mapping[Any, Any], k: int, var: Any, given: Any, row: Any) -> Any:
        """The first value of a carry of the backward scan, for a micro-batch."""
        role = self.back.chain.carries[k]
        if given is not None:
            return at(given, row) if role.kind is Kind.CUT else edited(given, role, row, self.m) if role == SUM else given
        change = self.fused.entering[k]
        return values[var] if change is None else edited(values[var], change, row, self.m)

    def _room(self, one: Any, role: Role) -> Any:
        """Room for a value of every micro-batch, or for their sum."""
        return blank((self.m, *one.shape) if role.kind is Kind.CUT else one.shape, one.dtype, role)

    def _ring(self, number: int) -> int:
        """Slots for a residual: all micro-batches' where somebody reads them afterwards."""
        return self.m if self.ahead.equation.outvars[len(self.ahead.chain.carries) + number] in self.fused.leaving else self.slots

    def _stores(self, stage: Stage) -> list[Any]:
        full = stage.stores(self.slots), stage.stores(self.m)
        return [full[self._ring(k) == self.m][k] for k in range(len(full[0]))]

    def _residual(self, store: Any, row: Any, role: Role, number: int, reader: int) -> Read:
        """What a layer reads of a micro-batch's residual; of one that is the same for all, its rows. `number`: of the residual;
        `reader`: of the stacked operand that it is."""
        if self.ahead.chain.ys[number].kind is Kind.CUT:

            def read(layer: Any) -> Any:
                kept = self.ahead.hold("out", number, layer_of(store, role, row % self._ring(number), layer))
                return self.back.hold("moved", reader, kept)

            return read
        if role.kind is Kind.CUT:
            return lambda layer: take_rows(at(store, layer), role, row, self.m)
        return partial(at, store)


def blanks(shapes: Any) -> Any:
    return jax.tree.map(lambda v: _jax.zeros(v.shape, v.dtype), shapes)


def _left(value: Any, role: Role, var: Any) -> Any:
    """A value of the whole batch from what micro-batches had of it."""
    found = join_rows(value, role) if role.kind is Kind.CUT else value
    return found.astype(var.aval.dtype) if role == SUM else found
