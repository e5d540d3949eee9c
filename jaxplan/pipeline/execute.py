"""A chain run in stages: all micro-batches through it, one after another, each stage on its own layers.

The region is manual over the stage axis only; along all other axes layouts stay the compiler's affair, and the plan's constraints
hold inside. There is one loop over ticks. At tick t the stage at position p of the chain works on micro-batch t - p; what it does
before the first and after the last (the bubble) reaches nothing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxplan import _jax
from jaxplan.pipeline.nouns import Chain, Kind, Pipeline, Role
from jaxplan.pipeline.rowwise import SUM, micro_shape
from jaxplan.pipeline.staged import (
    Staged,
    all_entering,
    entering_spec,
    join_rows,
    leave_stacked,
    once,
    split_rows,
    stacked_spec,
    whole,
)

Body = Callable[[tuple[Any, ...], tuple[Any, ...]], tuple[tuple[Any, ...], tuple[Any, ...]]]
BodyOf = Callable[[Any, Sequence[Any]], Body]
"""(number of the micro-batch, constants) -> the body of the scan for it: (carries, xs of a layer) -> (carries, ys)."""
Read = Callable[[Any], Any]
"""The number of a layer on its stage -> what it reads."""
Hold = Callable[[str, int, Any], Any]
"""("carry", "in" or "out", number, value) -> the value in the layout that the plan has for that carry, operand or stacked
result of a layer, whatever dimensions come before it. So are buffers held, where the compiler would be free to lay them
otherwise. "left", outside of the stages: a stacked result of theirs as the plan has it, with all layers on every device. "moved":
what one layer has of a stacked operand that is kept elsewhere, on the way that the plan has from there; "kept": what all have."""


class Stage:
    """What a chain does on one stage, inside of the manual region."""

    def __init__(self, equation: Any, chain: Chain, pipeline: Pipeline, hold: Hold) -> None:
        self.hold = hold
        self.chain, self.m, self.axis = chain, pipeline.microbatches, pipeline.axis
        self.stages, self.unroll = pipeline.stages, equation.params["unroll"]
        self.longest = max(chain.layers)
        self.outs = equation.params["jaxpr"].out_avals[len(chain.carries) :]
        stage = jax.lax.axis_index(self.axis)
        self.position = self.stages - 1 - stage if chain.reverse else stage
        self.count = jnp.asarray(chain.layers, jnp.int32)[stage]
        firsts = [end - count for end, count in zip(itertools.accumulate(chain.layers), chain.layers, strict=True)]
        self.first = jnp.asarray(firsts, jnp.int32)[stage]

    def microbatch(self, tick: Any, after: int = 0) -> tuple[Any, Any]:
        """(the micro-batch of a tick, whether there is one). `after`: ticks until the first one enters."""
        number = tick - self.position - after
        return jnp.clip(number, 0, self.m - 1), (number >= 0) & (number < self.m)

    def entering(self, carries: Sequence[Any], row: Any) -> list[Any]:
        """What a micro-batch brings to the first stage, of the carries that circulate."""
        return [self._entering(carries[k], self.chain.carries[k], row) for k in self.chain.circulating]

    def _entering(self, value: Any, role: Role, row: Any) -> Any:
        return at(value, row) if role.kind is Kind.CUT else once(value, row) if role == SUM else value

    def start(self, entering: Sequence[Any], arrived: Sequence[Any]) -> list[Any]:
        """The first stage takes what enters, all others what has arrived from the stage before."""
        return where(self.position == 0, entering, arrived)

    def layers(
        self, body_of: BodyOf, row: Any, consts: Sequence[Any], carried: Sequence[Any], reads: Sequence[Read],
        stores: Sequence[Any], slots: Sequence[Any], valid: Any,
    ) -> tuple[tuple[Any, ...], list[Any]]:  # fmt: skip
        """This stage's layers on one micro-batch: (carries, stores). `reads`: of each value stacked over layers, what a layer
        has of it; `slots`: where each store keeps the micro-batch. Every layer puts into the stores what is its own, so that
        nothing of a micro-batch is ever there twice."""
        chain = self.chain
        body = body_of(row, of_row(consts, chain.consts, row))
        numbers = range(len(stores))

        def layer(state: tuple[tuple[Any, ...], list[Any]], number: Any) -> Any:
            carry, held = state
            after, ys = body(carry, tuple([read(number) for read in reads]))
            if not chain.even:  # a layer that only fills the stage up hands on what it was given
                after = tuple(where(number < self.count, after, carry))
            held = [keep(s, y, r, k, valid, number) for s, y, r, k in zip(held, ys, chain.ys, slots, strict=True)]
            return (tuple(after), self.held("out", numbers, held)), None

        order = jnp.arange(self.longest, dtype=jnp.int32)
        start = (tuple(carried), list(stores))
        state, _ = jax.lax.scan(layer, start, order, reverse=chain.reverse, unroll=self.unroll)
        return state

    def reads(self, xs: Sequence[Any], row: Any) -> list[Read]:
        """What each layer of this stage reads of what is stacked over layers, for one micro-batch."""
        return [self.read(x, role, row) for x, role in zip(xs, self.chain.xs, strict=True)]

    def read(self, stacked: Any, role: Role, row: Any) -> Read:
        """What a layer of this stage reads of one stacked value: of the whole stack where that enters unequal stages."""
        if self.chain.even or role.kind is Kind.CUT:
            return functools.partial(layer_of, stacked, role, row)
        return lambda number: layer_of(stacked, role, row, self.first + jnp.minimum(number, self.count - 1))

    def carried(self, circulating: Sequence[Any], totals: Sequence[Any]) -> list[Any]:
        """All carries in order."""
        moving, staying = iter(circulating), iter(totals)
        return [next(staying if role.kind is Kind.TOTAL else moving) for role in self.chain.carries]

    def parted(self, carries: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """(those that circulate, those that stay)."""
        pairs = list(zip(carries, self.chain.carries, strict=True))
        return [v for v, r in pairs if r.kind is not Kind.TOTAL], [v for v, r in pairs if r.kind is Kind.TOTAL]

    def handed_on(self, values: Sequence[Any]) -> list[Any]:
        """What the stage before has sent, of what every stage sends to the next one."""
        step = -1 if self.chain.reverse else 1
        pairs = [(s, s + step) for s in range(self.stages) if 0 <= s + step < self.stages]
        return [_jax.on_key_data(lambda v: jax.lax.ppermute(v, self.axis, pairs), value) for value in values]

    def stores(self, slots: int) -> list[Any]:
        """Room for the stacked outputs of this stage's layers: of `slots` micro-batches where they have rows, else of one."""
        found = []
        for aval, role in zip(self.outs, self.chain.ys, strict=True):
            shape = (self.longest, *micro_shape(aval.shape, role, self.m))
            found.append(blank((slots, *shape) if role.kind is Kind.CUT else shape, aval.dtype, role))
        return self.held("out", range(len(found)), found)

    def held(self, what: str, numbers: Sequence[int], values: Sequence[Any]) -> list[Any]:
        """Values in the layouts that the plan has for them."""
        return [self.hold(what, k, v) for k, v in zip(numbers, values, strict=True)]

def at(value: Any, row: Any) -> Any:
    """One micro-batch of several."""
    return jax.lax.dynamic_index_in_dim(value, row, 0, keepdims=False)


def of_row(values: Sequence[Any], roles: Sequence[Role], row: Any) -> list[Any]:
    """What a micro-batch has of each value."""
    return [at(v, row) if role.kind is Kind.CUT else v for v, role in zip(values, roles, strict=True)]


def where(condition: Any, ones: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    return [jnp.where(condition, one, other) for one, other in zip(ones, others, strict=True)]


def blank(shape: Sequence[int], dtype: Any, role: Role) -> Any:
    """Zeros. Sums of 16-bit numbers are kept in 32 bits: they would be rounded once per micro-batch."""
    return _jax.zeros(tuple(shape), jnp.float32 if role.kind in (Kind.SUM, Kind.TOTAL) and is_short(dtype) else dtype)


def is_short(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4


def keep(store: Any, value: Any, role: Role, slot: Any, valid: Any, layer: Any = None) -> Any:
    """A store after one more micro-batch, of which nothing is kept if it is not `valid`. `layer`: of the stage, where the value
    is that of one layer and the store has those of all."""
    start = ([slot] if role.kind is Kind.CUT else []) + ([] if layer is None else [layer])
    old = _part(store, start)
    if role.kind in (Kind.SUM, Kind.TOTAL):
        new = old + jnp.where(valid, value, jnp.zeros_like(value)).astype(store.dtype)
    else:
        new = jnp.where(valid, value, old)
    if not start:
        return new
    new = jax.lax.expand_dims(new, range(len(start)))
    return jax.lax.dynamic_update_slice(store, new, _corner(store, start))


def layer_of(stacked: Any, role: Role, row: Any, layer: Any) -> Any:
    """What a layer has of a stacked value; of one that is kept by micro-batch, that micro-batch's."""
    return _part(stacked, [row, layer] if role.kind is Kind.CUT else [layer])


def _part(value: Any, start: Sequence[Any]) -> Any:
    """The part of a value at the given places of its first dimensions."""
    if not start:
        return value
    rest = value.shape[len(start) :]
    found = jax.lax.dynamic_slice(value, _corner(value, start), (*[1] * len(start), *rest))
    return jax.lax.squeeze(found, range(len(start)))


def _corner(value: Any, start: Sequence[Any]) -> list[Any]:
    return [*start, *[jnp.int32(0)] * (value.ndim - len(start))]


def from_stage(value: Any, holds: Any, axis: str) -> Any:
    """What the one stage that `holds` a value has, on all stages."""
    return everywhere(_jax.on_key_data(lambda v: jnp.where(holds, v, jnp.zeros_like(v)), value), axis)


def everywhere(value: Any, axis: str) -> Any:
    """The sum over all stages. 16-bit floats are summed as 32-bit ones: XLA's CPU compiler fails on all-reduces of the former in
    a region that is manual over some axes only (seen with jaxlib 0.10 and 0.12)."""

    def summed(v: Any) -> Any:
        wide = jnp.int32 if v.dtype == jnp.bool_ else jnp.float32 if is_short(v.dtype) else v.dtype
        return jax.lax.psum(v.astype(wide), axis).astype(v.dtype)

    return _jax.on_key_data(summed, value)


def run_chain(
    equation: Any, chain: Chain, pipeline: Pipeline, mesh: Any, values: Sequence[Any], body_of: BodyOf, hold: Hold
) -> list[Any]:
    """The results of a scan, run in stages. `values`: its operands; stacked ones may be `Staged`, as stacked results with rows
    are. `mesh`: its axes of type Auto."""
    m, axis = pipeline.microbatches, pipeline.axis
    consts, carries, xs = parts(chain, values)
    staged = [isinstance(x, Staged) and x.fits(chain, role, m) for x, role in zip(xs, chain.xs, strict=True)]
    initial = [v for v, role in zip(carries, chain.carries, strict=True) if role.kind is Kind.TOTAL]
    given = (
        [by_microbatch(whole(v), role, m) for v, role in zip(consts, chain.consts, strict=True)],
        [by_microbatch(whole(v), role, m) for v, role in zip(carries, chain.carries, strict=True)],
        all_entering(xs, chain, m, hold),
    )

    def stages(consts: list[Any], carries: list[Any], xs: list[Any]) -> Any:
        stage, moves = Stage(equation, chain, pipeline, hold), chain.circulating
        carries = stage.held("carry", range(len(carries)), carries)
        xs = [hold("kept" if kept else "in", k, x) for k, (x, kept) in enumerate(zip(xs, staged, strict=True))]
        moving, totals = stage.parted(carries)
        roles = [chain.carries[k] for k in moves]
        finals = [v if r.kind is not Kind.SUM else blank(v.shape, v.dtype, r) for v, r in zip(moving, roles, strict=True)]
        total = Role(Kind.TOTAL)

        def tick(state: Any, t: Any) -> Any:
            arrived, finals, totals, stores = state
            row, valid = stage.microbatch(t)
            start = stage.start(stage.entering(carries, row), arrived)
            # what a stage adds up starts at zero for every micro-batch, for the bubble's is dropped
            zeros = [_jax.zeros(v.shape, dtype) for v, dtype in zip(totals, kinds, strict=True)]
            carried, reads = stage.carried(start, zeros), stage.reads(xs, row)
            after, stores = stage.layers(body_of, row, consts, carried, reads, stores, [row] * len(stores), valid)
            out, added = stage.parted(stage.held("carry", range(len(after)), after))
            last = valid & (stage.position == stage.stages - 1)
            finals = [keep(f, v, role, row, last) for f, v, role in zip(finals, out, roles, strict=True)]
            totals = [keep(v, a, total, row, valid) for v, a in zip(totals, added, strict=True)]
            finals, arrived = stage.held("carry", moves, finals), stage.held("carry", moves, stage.handed_on(out))
            return (arrived, finals, totals, stores), None

        kinds = [v.dtype for v in totals]
        totals = [blank(v.shape, v.dtype, total) for v in totals]
        state = (stage.entering(carries, 0), finals, totals, stage.stores(m))
        (_, finals, totals, stores), _ = jax.lax.scan(tick, state, jnp.arange(pipeline.ticks, dtype=jnp.int32))
        holds = stage.position == stage.stages - 1
        finals = [from_stage(v, holds, axis) for v in finals]
        return finals, [everywhere(v, axis) for v in totals], stage.held("out", range(len(stores)), stores)

    stacked, left = [entering_spec(role, chain, axis) for role in chain.xs], [stacked_spec(role, axis) for role in chain.ys]
    finals, totals, stores = jax.shard_map(
        stages, mesh=mesh.abstract_mesh, in_specs=(P(), P(), stacked), out_specs=(P(), P(), left), axis_names={axis},
        check_vma=False,
    )(*given)  # fmt: skip
    moving, staying = iter(finals), iter([v + t.astype(v.dtype) for v, t in zip(initial, totals, strict=True)])
    outs = [next(staying if role.kind is Kind.TOTAL else moving) for role in chain.carries]
    outs = [join_rows(v, role) if role.kind is Kind.CUT else v for v, role in zip(outs, chain.carries, strict=True)]
    outs = [v.astype(var.aval.dtype) if role == SUM else v for v, var, role in zip(outs, equation.outvars, chain.carries)]
    return outs + left_stacked(equation, chain, stores, hold)


def left_stacked(equation: Any, chain: Chain, stores: Sequence[Any], hold: Hold) -> list[Any]:
    """The stacked results of a scan, from what its stages have stored."""
    found = []
    for number, (value, role) in enumerate(zip(stores, chain.ys, strict=True)):
        value = value.astype(equation.outvars[len(chain.carries) + number].aval.dtype) if role == SUM else value
        found.append(leave_stacked(value, role, chain, functools.partial(hold, "left", number)))
    return found


def parts(chain: Chain, values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """A scan's operands: constants, carries, what is stacked over layers."""
    first, second = len(chain.consts), len(chain.consts) + len(chain.carries)
    return values[:first], values[first:second], values[second:]


def by_microbatch(value: Any, role: Role, m: int) -> Any:
    return split_rows(value, role, m) if role.kind is Kind.CUT else value
