"""The one door to anything of JAX that is not public API. Every other file imports private JAX from here."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import jax
import jax.core
import jaxlib.version
import numpy as np
from jax._src import (
    core as _core_src,
    custom_batching as _custom_batching,
    distributed as _distributed,
    pjit as _pjit,
    shard_map as _shard_map,
    source_info_util as _source_info,
)
from jax._src.interpreters import partial_eval as _partial_eval
from jax._src.lax import parallel as _parallel
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend import core as _core
from jax.extend.core import Primitive as Primitive, primitives as _primitives
from jax.interpreters import mlir

Tracer = jax.core.Tracer
Literal = _core.Literal
DropVar = _core.DropVar
Var = _core.Var
Jaxpr = _core.Jaxpr
ClosedJaxpr = _core.ClosedJaxpr

scan_p = _primitives.scan_p
while_p = _primitives.while_p
cond_p = _primitives.cond_p
remat_p = _primitives.remat_p
jit_p = _primitives.jit_p
closed_call_p = _primitives.closed_call_p
custom_jvp_call_p = _primitives.custom_jvp_call_p
custom_vjp_call_p = _primitives.custom_vjp_call_p
linear_solve_p = _primitives.linear_solve_p
dynamic_slice_p = _primitives.dynamic_slice_p
dynamic_update_slice_p = _primitives.dynamic_update_slice_p
fft_p = _primitives.fft_p
custom_vmap_p = _custom_batching.custom_vmap_p
sharding_constraint_p = _pjit.sharding_constraint_p
reshard_p = _pjit.reshard_p
ASKING = (sharding_constraint_p, reshard_p)
"""Primitives by which a program asks for a layout itself; of a number, which has none, too."""
shard_map_p = _shard_map.shard_map_p
dot_general_p = _primitives.dot_general_p
gather_p = _primitives.gather_p
reshape_p = _primitives.reshape_p
broadcast_in_dim_p = _primitives.broadcast_in_dim_p
iota_p = _primitives.iota_p


JOINS_EARLY = jaxlib.version.__version_info__ >= (0, 11, 1)
"""Whether XLA on CPU stores what is put together along the innermost dimension from 64 bytes of that on (and 2 KiB of all), as
jaxlib 0.12 does; else from 128 elements of it on, as 0.10 does."""

PRODUCTS_STAY_NARROW = jaxlib.version.__version_info__ >= (0, 12)
"""Whether XLA's library on CPU multiplies bfloat16 as it is, where the left operand is summed over its last dimension."""

CALLS_LOST = jaxlib.version.__version_info__ >= (0, 12)
"""Whether a constraint on what a callback of several results returns becomes the callback's own layout: all devices make it, or,
where it has effects, XLA fails."""

REMAT_WAITS = jaxlib.version.__version_info__ >= (0, 11, 1)
"""Whether XLA on CPU runs a rematerialised call only once all that it reads is there (else at once, where outside of loops)."""


def coordination_client() -> Any:
    """The client of `jax.distributed`'s key-value store and barriers; None where it was not initialised."""
    return _distributed.global_state.client


def source_line(equation: Any) -> tuple[str, int]:
    """The user's (file name, line) that wrote an equation; ("", 0) if JAX does not know."""
    frame = _source_info.user_frame(equation.source_info.traceback)
    return (frame.file_name, frame.start_line) if frame is not None else ("", 0)


def jit_statics(jitted: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Positions and names of the static parameters of a `jax.jit`ted function; none where JAX does not tell."""
    info = getattr(jitted, "_jit_info", None)
    return tuple(getattr(info, "static_argnums", ())), tuple(getattr(info, "static_argnames", ()))


def user_context(equation: Any) -> AbstractContextManager[Any]:
    """Whatever is traced inside keeps the equation's source line and name stack; the line around it where JAX knows none."""
    stack = _source_info.current_name_stack() + equation.source_info.name_stack
    traceback = equation.source_info.traceback
    return _source_info.user_context(traceback if _source_info.user_frame(traceback) is not None else None, name_stack=stack)


def is_transposed(equation: Any) -> bool:
    """Whether an equation belongs to a backward pass: it has no line of its own in the user's program."""
    return "transpose(" in name_stack(equation)


def name_stack(equation: Any) -> str:
    """The names and transformations under which an equation was traced, outermost first."""
    return str(equation.source_info.name_stack)


def without_dead(closed: Any) -> Any:
    """A closed jaxpr less the equations that nothing comes of, also inside of loops and calls; inputs, outputs, effects stay."""
    jaxpr, _ = _partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), True)
    return closed.replace(jaxpr=jaxpr)


class _Roll(Primitive):
    """Stands in jaxprs only: whoever evaluates one, also under a transformation, gets it written out."""

    def bind(self, *values: Any, **params: Any) -> Any:
        return rolled(*values, **params)


roll_p = _Roll("roll")
"""A tensor turned round along a `dimension` by `shift` places: its two slices and their concatenation in one (`rolls.py`)."""


def rolled(value: Any, *, shift: int, dimension: int) -> Any:
    """What was at i is at i + shift, modulo the extent: as `jax.numpy.roll` writes it, which compilers know."""
    if not shift:
        return value
    at = -shift % value.shape[dimension]
    parts = jax.lax.slice_in_dim(value, at, None, axis=dimension), jax.lax.slice_in_dim(value, 0, at, axis=dimension)
    return jax.lax.concatenate(parts, dimension)


roll_p.def_abstract_eval(lambda aval, *, shift, dimension: aval)
mlir.register_lowering(roll_p, mlir.lower_fun(rolled, multiple_results=False))


def sub_jaxprs(equation: Any) -> Iterator[Any]:
    """Every jaxpr among an equation's parameters."""
    found = getattr(_core, "jaxprs_in_params", None) or jax.core.jaxprs_in_params  # where it was before JAX 0.10
    return found(equation.params)


# --- primitives, for the rules ---

_HOMES = (
    "jax.lax",
    "jax.extend.core.primitives",
    "jax._src.lax.lax",
    "jax._src.lax.linalg",
    "jax._src.lax.control_flow.conditionals",
    "jax._src.core",
    "jax._src.ad_util",
    "jax._src.pjit",
    "jax._src.debugging",
    "jax._src.callback",
    "jax._src.custom_partitioning",
    "jax._src.random",
    "jax._src.random.core",
    "jax._src.random.prng",
    "jax._src.prng",
)


def _collectives() -> dict[Primitive, str]:
    kinds = {
        "all_reduce": ("psum", "psum_invariant", "pmax", "pmin"),
        "all_gather": ("all_gather", "all_gather_invariant"),
        "reduce_scatter": ("reduce_scatter",),
        "all_to_all": ("all_to_all",),
        "permute": ("ppermute",),
    }
    home = vars(_parallel)
    return {home[f"{name}_p"]: kind for kind, names in kinds.items() for name in names if f"{name}_p" in home}


COLLECTIVES = _collectives()
"""{primitive with which a manual region sends: the kind of exchange}."""


def primitives(names: str) -> tuple[Primitive, ...]:
    """The primitive objects that JAX binds as `<name>_p`: `primitives("add mul log2?")`.

    A name that ends in `?` may be absent (not every JAX has it). AttributeError for any other absent name.
    """
    found = []
    for word in names.split():
        attribute = word.rstrip("?") + "_p"
        primitive = next((vars(home)[attribute] for home in _homes() if attribute in vars(home)), None)
        if primitive is not None:
            found.append(primitive)
        elif not word.endswith("?"):
            raise AttributeError(f"JAX {jax.__version__} has no {attribute!r} where jaxplan looks for it")
    return tuple(found)


@functools.cache
def _homes() -> tuple[ModuleType, ...]:
    """The modules, of those this JAX has, in which primitives live."""
    modules = []
    for name in _HOMES:
        try:
            modules.append(importlib.import_module(name))
        except ModuleNotFoundError:
            continue
    return tuple(modules)


Asked = tuple[tuple[str, ...] | None, ...]
"""Per dimension, the mesh axes that a program asks for by name; None where it leaves the dimension to the compiler."""


def asked_layout(equation: Any) -> Asked | None:
    """What a sharding constraint or a reshard in the user's own code asks for; None if it names no axes."""
    sharding = equation.params.get("sharding", equation.params.get("dst_sharding"))
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    return _asked(sharding.spec, len(equation.outvars[0].aval.shape), set(equation.params.get("unconstrained_dims") or ()))


def _asked(spec: Any, ndim: int, free: set[int]) -> Asked:
    """A spec as axes per dimension; dimensions in `free`, and those it calls unconstrained, are left open."""
    found: list[tuple[str, ...] | None] = []
    for dim, entry in enumerate((*spec, *[None] * (ndim - len(spec)))):
        if dim in free or entry is jax.sharding.PartitionSpec.UNCONSTRAINED:
            found.append(None)
        else:
            found.append(() if entry is None else entry if isinstance(entry, tuple) else (entry,))
    return tuple(found)


def shard_map_layouts(equation: Any) -> tuple[list[Asked], list[Asked]]:
    """What a `shard_map` asks of its operands, and how it leaves its results."""
    sides = (equation.params["in_specs"], equation.invars), (equation.params["out_specs"], equation.outvars)
    ins, outs = ([_asked(s, len(v.aval.shape), set()) for s, v in zip(specs, vars, strict=True)] for specs, vars in sides)
    return ins, outs


def bind_shard_map(equation: Any, values: list[Any], mesh: Any) -> list[Any]:
    """The same manual region on another mesh of the same axes (of other types, say)."""
    params = {**equation.params, "mesh": mesh.abstract_mesh}
    return list(_bind(equation.primitive, values, params))


_TYPED = ("sharding", "out_sharding")
"""Parameters that carry the layout of a result where mesh axes are of type Explicit."""


def bind(equation: Any, values: list[Any], devices: int, changed: Mapping[str, Any] | None = None) -> list[Any]:
    """The results of one equation on given operands, its layout left to the compiler (and to constraints around it).

    `devices`: how many may share its work. `changed`: parameters that take the place of its own.
    """
    primitive, params = equation.primitive, {**equation.params, **(changed or {})}
    if primitive in ASKING:
        return values
    if any(params.get(name) is not None for name in _TYPED):
        params = {**params, **{name: None for name in _TYPED if name in params}}
    if primitive in _STARTS:
        values = _clamped(values, *_STARTS[primitive](equation))
    elif primitive in _scatters() and math.prod(values[1].shape[:-1]) <= devices:
        values = [_held(values[0]), *values[1:]]
    elif primitive is fft_p and devices > 1:
        values = [_row_major(value) for value in values]
    outs = _bind(primitive, values, params)
    outs = list(outs) if primitive.multiple_results else [outs]
    if CALLS_LOST and primitive in _callbacks() and len(outs) > 1 and devices > 1:
        read = [k for k, var in enumerate(equation.outvars) if not isinstance(var, DropVar)]
        for k, held in zip(read, jax.lax.optimization_barrier([outs[k] for k in read]), strict=True):
            outs[k] = held
    return [_row_major(out) for out in outs] if primitive is fft_p and devices > 1 else outs


@functools.cache
def _callbacks() -> frozenset[Primitive]:
    return frozenset(primitives("io_callback pure_callback"))


def filling(equation: Any, values: Sequence[Any]) -> Callable[[Any], Any] | None:
    """Of a gather that fills rows out of range: what fills them, in the result of the same gather `UNFILLED`; None for others.

    JAX lowers such a gather to the two in one. A sum over devices that is scattered must stand between them: the compiler
    scatters only what is sliced at once (else it reduces the whole, and slices what was filled).
    """
    params = equation.params
    if equation.primitive is not gather_p or params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP:
        return None
    (operand, indices), numbers = values, params["dimension_numbers"]
    starts = list(numbers.start_index_map)
    most = np.array([operand.shape[dim] - params["slice_sizes"][dim] for dim in starts])

    def fill(rows: Any) -> Any:
        wide = indices.astype(np.int64 if indices.dtype.itemsize == 8 else np.int32)
        limits = np.broadcast_to(most.astype(wide.dtype), wide.shape)
        there = ((wide >= 0) & (wide <= limits)).all(axis=-1)
        batch = [dim for dim in range(rows.ndim) if dim not in numbers.offset_dims]
        shown = jax.lax.broadcast_in_dim(there, rows.shape, batch)
        return jax.lax.select(shown, rows, jax.lax.full_like(rows, params["fill_value"]))

    return None if jax.numpy.issubdtype(operand.dtype, jax.dtypes.extended) else fill


UNFILLED = {"mode": jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS}
"""Parameters of a gather that fills nothing: what is out of range is read at the nearest place in range."""


def _clamped(values: list[Any], first: int, room: list[int]) -> list[Any]:
    """Operands whose starts, from number `first` on, are where JAX says they are: at most `room`, per dimension.

    XLA clamps them on each shard by itself: it drops an update of one row that is out of range where the updated dimension is
    sharded, and reads other rows where a slice's result is (seen with jaxlib 0.10, also for programs sharded by hand).
    """
    starts = zip(values[first:], room, strict=True)
    return [*values[:first], *[jax.numpy.clip(i, 0, min(most, np.iinfo(i.dtype).max)) for i, most in starts]]


def _room(operand: Any, sizes: tuple[int, ...]) -> list[int]:
    return [n - m for n, m in zip(operand.aval.shape, sizes, strict=True)]


_STARTS: dict[Primitive, Callable[[Any], tuple[int, list[int]]]] = {
    dynamic_slice_p: lambda equation: (1, _room(equation.invars[0], equation.params["slice_sizes"])),
    dynamic_update_slice_p: lambda equation: (2, _room(equation.invars[0], equation.invars[1].aval.shape)),
}
"""Of the operations at a place that is data: the first operand that says where, and the largest start per dimension."""


@functools.cache
def _scatters() -> frozenset[Primitive]:
    return frozenset(primitives("scatter scatter_add scatter_mul scatter_min scatter_max scatter_sub?"))


def _held(value: Any) -> Any:
    """A scatter's operand, kept apart from the slice that made it.

    Where a shard has a single index, XLA writes what it read at that index clamped; merging that read with the slice before it,
    its simplifier forgets to clamp, and shards without the row overwrite one of theirs (seen with jaxlib 0.10, also by hand).
    """
    return jax.lax.optimization_barrier(value)


def _row_major(value: Any) -> Any:
    """What a Fourier transform reads or makes, in memory as XLA's CPU runtime wants it.

    Where a dimension but the first is gathered before it or after it, the compiler hands the gather's layout in memory on to the
    transform, which fails at run time (seen with jaxlib 0.10, also for programs sharded by hand). The TPU compiler has no such
    constraint for complex numbers, and needs none.
    """
    held = Layout(tuple(range(value.ndim)))
    return jax.lax.platform_dependent(value, cpu=lambda some: with_layout_constraint(some, held), default=lambda some: some)


def typed_results(equation: Any, operands: Sequence[Any], out_sharding: Any = None) -> list[Any] | None:
    """The shapes and shardings that JAX's typing of Explicit mesh axes gives the results of one equation.

    `operands`: `jax.ShapeDtypeStruct`s with shardings; values of literals as they are. `out_sharding`: for the result, where the
    primitive takes one. None where JAX refuses. Call it under the mesh.
    """
    params = dict(equation.params)
    for name in _TYPED:
        if name in params:
            params[name] = out_sharding

    def results(*given: Any) -> Any:
        found = _bind(equation.primitive, given, params)
        return list(found) if equation.primitive.multiple_results else [found]

    traced = [place for place, operand in enumerate(operands) if isinstance(operand, jax.ShapeDtypeStruct)]

    def filled(*given: Any) -> Any:
        values = list(operands)
        for place, value in zip(traced, given, strict=True):
            values[place] = value
        return results(*values)

    try:
        return jax.eval_shape(filled, *[operands[place] for place in traced])
    except (_core_src.ShardingTypeError, ValueError, TypeError, NotImplementedError):  # primitives refuse in their own ways
        return None


def takes_out_sharding(equation: Any) -> bool:
    """Whether the primitive itself can be told the layout of its result."""
    return any(name in equation.params for name in _TYPED)


def _bind(primitive: Any, values: Sequence[Any], params: dict[str, Any]) -> Any:
    """Bind a primitive with the parameters of an equation. Before JAX 0.10 functions among them are operands."""
    found = primitive.get_bind_params(params)
    functions, params = found if isinstance(found, tuple) else ((), found)
    return primitive.bind(*functions, *values, **params)


def rebind_custom(equation: Any, body: Any, values: list[Any]) -> list[Any]:
    """The same call with derivatives of its own (`custom_jvp`, `custom_vjp`), with another body for its value."""
    params = {**equation.params, "call_jaxpr": jax.make_jaxpr(body)(*values)}
    return list(_bind(equation.primitive, values, params))


def solve_operands(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """Of the operands of a `custom_linear_solve`, those of the function that solves."""
    lengths = equation.params["const_lengths"]
    first = lengths.matvec + lengths.vecmat
    return [*operands[first : first + lengths.solve], *operands[sum(lengths) :]]


def rebind_solve(equation: Any, body: Any, values: list[Any]) -> list[Any]:
    """The same linear solve (its transpose and derivatives too), with another body for its value."""
    jaxprs = equation.params["jaxprs"]
    solve = jax.make_jaxpr(body)(*solve_operands(equation, values))
    return list(equation.primitive.bind(*values, **{**equation.params, "jaxprs": jaxprs._replace(solve=solve)}))


def rebind_remat(equation: Any, body: Any, values: list[Any]) -> list[Any]:
    """The same rematerialised call with another body: traced again, then bound with the equation's own policy."""
    closed = jax.make_jaxpr(body)(*values)
    jaxpr, consts = closed.jaxpr, list(closed.consts)
    params = dict(equation.params)
    if consts:
        jaxpr = _partial_eval.convert_constvars_jaxpr(jaxpr)
        if not isinstance(params["prevent_cse"], bool):
            params["prevent_cse"] = (False,) * len(consts) + tuple(params["prevent_cse"])
    params["jaxpr"] = jaxpr
    return list(equation.primitive.bind(*consts, *values, **params))


# --- keys, which few operations take as they are ---


def is_key(dtype: Any) -> bool:
    """Whether an array of this dtype holds random keys."""
    return jax.numpy.issubdtype(dtype, jax.dtypes.prng_key)


def generator(dtype: Any) -> str:
    """The name of the generator that keys of this dtype are for, "threefry2x32" say; "" where it holds none."""
    return dtype._impl.name if is_key(dtype) else ""


def zeros(shape: tuple[int, ...], dtype: Any) -> Any:
    """Zeros; of keys, those whose words are zero."""
    if not is_key(dtype):
        return jax.numpy.zeros(shape, dtype)
    implementation = dtype._impl
    return jax.random.wrap_key_data(jax.numpy.zeros((*shape, *implementation.key_shape), np.uint32), impl=implementation)


def on_key_data(function: Callable[[Any], Any], value: Any) -> Any:
    """`function` of an array; of keys, of their words."""
    if not is_key(value.dtype):
        return function(value)
    return jax.random.wrap_key_data(function(jax.random.key_data(value)), impl=value.dtype._impl)
