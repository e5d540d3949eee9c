"""Room `partial_sums`: sums of which each device has a part, as arrays; how they are made, added, and combined.

XLA reduces every partial product where it is computed, and adds the results afterwards. So the parts are made visible: along a
new leading dimension for each mesh axis, which lies along that axis. Additions then are local, and the sum over the new
dimensions is the one exchange.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxplan import _jax
from jaxplan.graph import Operator
from jaxplan.layout import Spec


@partial(jax.tree_util.register_dataclass, data_fields=["stacked"], meta_fields=["axes"])
@dataclass(frozen=True)
class Parts:
    """A sum that is not added up: `stacked` has a leading dimension for each of the mesh `axes` (their numbers, in mesh order),
    and lies along them."""

    stacked: Any
    axes: tuple[int, ...]

    def spec(self, spec: Spec) -> Spec:
        """The spec of what is stacked, from that of a part."""
        return (*[(axis,) for axis in self.axes], *spec) if spec else ()

    def on(self, function: Callable[[Any], Any]) -> Parts:
        """The same with a function of the stacked array applied."""
        return Parts(function(self.stacked), self.axes)


def zeros(operators: Sequence[Operator], number: int) -> list[bool]:
    """Which operands of an operator are zeros, as the program says: what is scattered into by a gradient, mostly."""

    def zero(tensor: int) -> bool:
        made = next((op for op in operators if tensor in op.results), None)
        filled = made is not None and made.name == "broadcast_in_dim" and len(made.operands) == 1
        source = made.equation.invars[0] if made is not None and filled and made.equation is not None else None
        return isinstance(source, _jax.Literal) and bool(np.all(source.val == 0))

    return [zero(tensor) if tensor >= 0 else False for tensor in operators[number].operands]


def evaluated(
    equation: Any, operands: Sequence[Any], specs: Sequence[Spec], zero: Sequence[bool], over: tuple[int, ...],
    split: tuple[int, ...], left: tuple[int, ...], mesh: Any, scale: int = -1,
) -> Any:  # fmt: skip
    """The result of an equation of which operands are partial sums along axes `over` (`Parts`, or whole), or which sums itself
    what lies along axes `split`; it is left partial along axes `left`. `specs`: per operand its layout, () for whole; `zero`:
    those that are zeros. `mesh`: its axes of type Auto. `scale`: of the equation's rule."""

    def bind(*values: Any) -> Any:
        return _jax.bind(equation, list(values), mesh.size)[0]

    if not over:
        return total(in_parts(bind, operands, specs, zero, split, mesh), mesh, left)
    return total(added(bind, operands, over, equation.outvars[0].aval.shape, mesh, scale), mesh, left)


def in_parts(
    bind: Callable[..., Any], operands: Sequence[Any], specs: Sequence[Spec], zero: Sequence[bool], axes: tuple[int, ...],
    mesh: Any,
) -> Parts:  # fmt: skip
    """What an operator that sums makes of the parts of its operands along `axes`. An operand that does not lie along an axis is
    given to the first device there; all others have zeros, as all have where it is `zero`."""
    names = mesh.axis_names
    manual = [tuple(tuple(axis for axis in dims if axis in axes) for dims in spec) for spec in specs]
    missing = [[names[a] for a in axes if a not in {axis for dims in spec for axis in dims}] for spec in manual]

    def part(*values: Any) -> Any:
        given = []
        for value, absent, nothing in zip(values, missing, zero, strict=True):
            first: Any = np.bool_(True)
            for name in absent:
                first = first & (jax.lax.axis_index(name) == 0)
            given.append(jnp.where(first, value, jnp.zeros_like(value)) if absent and not nothing else value)
        return jax.lax.expand_dims(bind(*given), range(len(axes)))

    stacked = jax.shard_map(
        part, mesh=mesh.abstract_mesh, in_specs=tuple([P(*[tuple(names[a] for a in dims) for dims in spec]) for spec in manual]),
        out_specs=P(*[names[axis] for axis in axes]), axis_names={names[axis] for axis in axes}, check_vma=False,
    )(*operands)  # fmt: skip
    return Parts(stacked, axes)


def added(
    bind: Callable[..., Any], operands: Sequence[Any], axes: tuple[int, ...], shape: Sequence[int], mesh: Any, scale: int = -1
) -> Parts:
    """What an operator that is linear in its operands makes of them: partial sums along `axes`, `shape` each. What is whole
    counts once, but for the operand `scale`, by which all parts are multiplied or divided."""
    given = []
    for slot, operand in enumerate(operands):
        if slot != scale:
            operand = operand if isinstance(operand, Parts) or np.ndim(operand) else jnp.full(shape, operand)
            operand = along(operand, axes, mesh).stacked
        given.append(operand)
    for _ in axes:
        bind = jax.vmap(bind, in_axes=tuple([None if slot == scale else 0 for slot in range(len(given))]))
    return Parts(bind(*given), axes)


def total(parts: Parts, mesh: Any, but: tuple[int, ...] = ()) -> Any:
    """The sum, whole along the axes along which it was partial: `Parts` still where it is along some of those that are left."""
    rest = tuple([axis for axis in parts.axes if axis in but])
    gone = [place for place, axis in enumerate(parts.axes) if axis not in but]
    if not gone:
        return parts
    value = parts.stacked
    if not rest and len(gone) > 1:  # over several axes at once
        value = value.reshape(math.prod(value.shape[: len(gone)]), *value.shape[len(gone) :])
        value = _held(value, [tuple(mesh.axis_names[axis] for axis in parts.axes)], mesh)
        gone = [0]
    value = jax.lax.reduce(value, np.zeros((), value.dtype), jax.lax.add, gone)
    return Parts(value, rest) if rest else value


def along(value: Any, axes: tuple[int, ...], mesh: Any) -> Parts:
    """A sum, whole or partial along some of `axes`, partial along all of them: the first device along a new one has it all."""
    now = value.axes if isinstance(value, Parts) else ()
    new = [place for place, axis in enumerate(axes) if axis not in now]
    stacked = value.stacked if isinstance(value, Parts) else value
    if not new:
        return Parts(stacked, axes)
    stacked = jax.lax.expand_dims(stacked, new)
    sizes = [mesh.shape[mesh.axis_names[axis]] for axis in axes]
    shape = [sizes[place] if place in new else extent for place, extent in enumerate(stacked.shape)]
    first: Any = np.bool_(True)
    for place in new:
        first = first & (jax.lax.broadcasted_iota(np.int32, shape, place) == 0)
    stacked = jnp.broadcast_to(stacked, shape)
    stacked = jax.lax.select(first, stacked, jnp.zeros_like(stacked))
    return Parts(_held(stacked, [mesh.axis_names[axis] for axis in axes], mesh), axes)


def _held(value: Any, leading: Sequence[Any], mesh: Any) -> Any:
    """A value with its leading dimensions laid out; the others as they are."""
    spec = P(*leading, *[P.UNCONSTRAINED] * (value.ndim - len(leading)))
    return jax.lax.with_sharding_constraint(value, NamedSharding(mesh, spec))
