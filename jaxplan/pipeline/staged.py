"""The forms that values have around a pipeline: rows apart by micro-batch, layers apart by stage.

Micro-batch j of m has the rows j, j + m, j + 2 m, ...: where the batch is laid over another axis, each of its shards has rows of
every micro-batch, and to take a micro-batch moves nothing. Stages of unequal length keep what they make filled up to the longest;
nobody reads the filling. What is stacked over layers and has no rows enters such stages whole, and leaves them gathered: no
array can lie in unequal parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxplan.pipeline.nouns import Chain, Kind, Role
from jaxplan.pipeline.rowwise import SUM


def take_rows(value: Any, role: Role, row: Any, m: int) -> Any:
    """The rows of micro-batch `row` (it may be traced)."""
    apart = _apart(value.shape, role, m)
    found = jax.lax.dynamic_index_in_dim(value.reshape(apart), row, role.dim + 1, keepdims=False)
    return found.reshape(_part(value.shape, role, m))


def split_rows(value: Any, role: Role, m: int) -> Any:
    """All micro-batches, along a new first dimension."""
    moved = jnp.moveaxis(value.reshape(_apart(value.shape, role, m)), role.dim + 1, 0)
    return moved.reshape((m, *_part(value.shape, role, m)))


def join_rows(value: Any, role: Role) -> Any:
    """The whole batch from its micro-batches: the reverse of `split_rows`."""
    m, *part = value.shape
    whole = [n * m if d == role.dim else n for d, n in enumerate(part)]
    apart = _apart(whole, role, m)
    split = (m, *apart[: role.dim + 1], *apart[role.dim + 2 :])
    return jnp.moveaxis(value.reshape(split), 0, role.dim + 1).reshape(whole)


def put_rows(value: Any, part: Any, role: Role, row: Any, m: int) -> Any:
    """A whole batch, with the rows of micro-batch `row` in their place: the reverse of `take_rows`."""
    apart = _apart(value.shape, role, m)
    split = part.reshape((*apart[: role.dim + 1], *apart[role.dim + 2 :]))
    return jax.lax.dynamic_update_index_in_dim(value.reshape(apart), split, row, role.dim + 1).reshape(value.shape)


def _apart(shape: Sequence[int], role: Role, m: int) -> tuple[int, ...]:
    rest = shape[role.dim] // (m * role.stride)
    return (*shape[: role.dim], rest, m, role.stride, *shape[role.dim + 1 :])


def _part(shape: Sequence[int], role: Role, m: int) -> tuple[int, ...]:
    return tuple(n // m if d == role.dim else n for d, n in enumerate(shape))


def once(value: Any, row: Any) -> Any:
    """A value that counts for the first micro-batch only: a part of what all of them add up to."""
    return jnp.where(row == 0, value, jnp.zeros_like(value))


def edited(value: Any, to: Role, row: Any, m: int) -> Any:
    """What is the same for all micro-batches, as micro-batch `row` needs it."""
    return take_rows(value, to, row, m) if to.kind is Kind.CUT else once(value, row) if to == SUM else value


def fill_stages(value: Any, layers: Sequence[int], dim: int) -> Any:
    """Layers along `dim`, every stage filled up to the longest."""
    longest = max(layers)
    if min(layers) == longest:
        return value
    ends = list(itertools.accumulate(layers))
    rows = [min(end - count + k, end - 1) for end, count in zip(ends, layers, strict=True) for k in range(longest)]
    return _rows(value, rows, dim)


def drop_filling(value: Any, layers: Sequence[int], dim: int) -> Any:
    """The reverse of `fill_stages`."""
    longest = max(layers)
    if min(layers) == longest:
        return value
    return _rows(value, [stage * longest + k for stage, count in enumerate(layers) for k in range(count)], dim)


def _rows(value: Any, rows: Sequence[int], dim: int) -> Any:
    return jnp.concatenate([jax.lax.slice_in_dim(value, row, row + 1, axis=dim) for row in rows], axis=dim)


@dataclass(frozen=True)
class Staged:
    """What the layers of a chain leave behind for every micro-batch, where the stages keep it. `value`: (micro-batches, stages *
    longest stage, ...). A later chain of the same stages takes it as it is; whoever else reads it takes `whole`. `gather`: gives
    the value with the layers of all stages on every device."""

    value: Any
    layers: tuple[int, ...]
    role: Role
    gather: Callable[[Any], Any]

    def whole(self) -> Any:
        """(layers, ...), the whole batch. Layers of stages of unequal length are gathered first: no array lies as they do."""
        value = self.value if min(self.layers) == max(self.layers) else self.gather(self.value)
        return join_rows(drop_filling(value, self.layers, 1), self.role._replace(dim=self.role.dim + 1))

    def fits(self, chain: Chain, role: Role, m: int) -> bool:
        """Whether a chain can take it up without moving anything."""
        return self.layers == chain.layers and self.role == role and self.value.shape[0] == m


def whole(value: Any) -> Any:
    """A value as everybody knows it."""
    return value.whole() if isinstance(value, Staged) else value


def stacked_spec(role: Role, axis: str) -> P:
    """How a value that is stacked over the layers of stages lies along them."""
    return P(None, axis) if role.kind is Kind.CUT else P(axis)


def entering_spec(role: Role, chain: Chain, axis: str) -> P:
    """The same of one that enters them."""
    return stacked_spec(role, axis) if chain.even or role.kind is Kind.CUT else P()


def enter_stacked(value: Any, role: Role, chain: Chain, m: int, hold: Callable[[Any], Any]) -> Any:
    """A value stacked over layers, as the stages take it: filled up and by micro-batch where it has rows, else as it is. `hold`:
    what is filled up with the layers of all stages on every device, so that it is not filled up from one device to another."""
    if isinstance(value, Staged):
        if value.fits(chain, role, m):
            return value.value
        value = value.whole()
    if role.kind is Kind.CUT:
        filled = fill_stages(split_rows(value, role._replace(dim=role.dim + 1), m), chain.layers, 1)
        return filled if chain.even else hold(filled)
    return value


def all_entering(values: Sequence[Any], chain: Chain, m: int, hold: Callable[[str, int, Any], Any]) -> list[Any]:
    """Every value stacked over the layers of a chain, as its stages take it; None stays None."""
    pairs = enumerate(zip(values, chain.xs, strict=True))
    return [None if v is None else enter_stacked(v, role, chain, m, partial(hold, "in", k)) for k, (v, role) in pairs]


def leave_stacked(value: Any, role: Role, chain: Chain, gather: Callable[[Any], Any]) -> Any:
    """What stages have stored, as all have it; rows are left where they are until somebody asks for the whole. `gather`: a value
    with the layers of all stages on every device."""
    if role.kind is Kind.CUT:
        return Staged(value, chain.layers, role, gather)
    return drop_filling(value if chain.even else gather(value), chain.layers, 0)

