"""The programs of parts: what each does with its operands, for one micro-batch where it works on rows."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from jaxplan import _jax
from jaxplan.apply import Replay, Rows
from jaxplan.pipeline.nouns import Kind, Role
from jaxplan.pipeline.rowwise import SAME as SAME_ROLE, micro_shape
from jaxplan.pipeline.staged import put_rows, take_rows
from jaxplan.unlike.nouns import BACKWARD, FORWARD, Micro, Part, Parts

PLACE = "place_"
"""What the names of equations say of where they belong, before the number of the place."""


def role_of(micro: Micro, var: Any) -> Role:
    """What a variable is to a micro-batch."""
    return micro.roles.get(var, SAME_ROLE)


def store_of(micro: Micro, var: Any) -> jax.ShapeDtypeStruct:
    """What gathers a variable over all micro-batches: a sum, of 16-bit floats in 32 bits; or the rows of all."""
    dtype = var.aval.dtype
    if role_of(micro, var).kind is Kind.SUM and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        dtype = np.dtype(np.float32)
    return jax.ShapeDtypeStruct(var.aval.shape, dtype)


def shape_of(micro: Micro, var: Any) -> jax.ShapeDtypeStruct:
    """What a part that works on rows reads or makes of a variable: inputs whole, of all else a micro-batch's part."""
    whole = var in micro.jaxpr.invars
    shape = var.aval.shape if whole else micro_shape(var.aval.shape, role_of(micro, var), micro.microbatches)
    return jax.ShapeDtypeStruct(shape, var.aval.dtype)


def on_rows(micro: Micro, part: Part, row: Any, stores: Sequence[Any], operands: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """A part of phase "forward" or "backward" on micro-batch `row`: (its stores with what it adds and puts, what it makes apart
    from that). `operands`: as `part.reads`, inputs of the program whole."""
    m, env = micro.microbatches, dict(zip(part.reads, operands, strict=True))
    inputs = set(micro.jaxpr.invars)
    env = {v: take_rows(x, role_of(micro, v), row, m) if v in inputs and v in micro.roles else x for v, x in env.items()}
    replay = _replay().on_rows(Rows(micro.edits, row, m))
    for number in part.equations:
        with jax.named_scope(f"{PLACE}{micro.places[number]}") if number in micro.places else contextlib.nullcontext():
            replay.equations(micro.jaxpr, (number,), env, (), {})
    held = []
    for v, store in zip(part.gathers, stores, strict=True):
        if v in part.adds:
            held.append(store + env[v].astype(store.dtype))
        elif role_of(micro, v).kind is Kind.CUT:
            held.append(put_rows(store, env[v], role_of(micro, v), row, m))
        else:
            held.append(env[v])
    return held, [env[v] for v in handed(part)]


def handed(part: Part) -> tuple[Any, ...]:
    """What a part makes for others to read before all micro-batches are through."""
    return tuple([v for v in part.makes if v not in part.adds])


def at_once(micro: Micro, part: Part, operands: Sequence[Any]) -> list[Any]:
    """A part that runs once: what it makes. Sums are given as they were stored."""
    env = {v: x.astype(v.aval.dtype) if x.dtype != v.aval.dtype else x for v, x in zip(part.reads, operands, strict=True)}
    _replay().equations(micro.jaxpr, part.equations, env, (), {})
    return [env[v] for v in part.makes]


def _replay() -> Replay:
    return Replay(None, AbstractMesh((), ()))


def run_plain(parts: Parts, inputs: Sequence[Any]) -> list[Any]:
    """All parts one after another, micro-batch after micro-batch, where the inputs lie: the program's flat outputs."""
    micro = parts.micro
    env: dict[Any, Any] = dict(zip(micro.jaxpr.constvars, micro.traced.jaxpr.consts, strict=True))
    env.update(zip(micro.jaxpr.invars, inputs, strict=True))
    stores = {
        v: _jax.zeros(store_of(micro, v).shape, store_of(micro, v).dtype) for part in parts.parts for v in part.gathers
    }
    per_row = [part for part in parts.parts if part.phase in (FORWARD, BACKWARD)]
    rest = [part for part in parts.parts if part not in per_row]
    for part in rest:
        if part.phase == "prepare":
            env.update(zip(part.makes, at_once(micro, part, [env[v] for v in part.reads]), strict=True))
    for row in range(micro.microbatches):
        values = dict(env)
        for part in per_row:
            held, made = on_rows(micro, part, row, [stores[v] for v in part.gathers], [values[v] for v in part.reads])
            stores.update(zip(part.gathers, held, strict=True))
            values.update(zip(handed(part), made, strict=True))
    env.update(stores)
    for part in rest:
        if part.phase == "update":
            env.update(zip(part.makes, at_once(micro, part, [env[v] for v in part.reads]), strict=True))
    return results(micro, env)


def dtype_of(var: Any) -> Any:
    """Of a variable or a literal."""
    return var.aval.dtype


def results(micro: Micro, env: Mapping[Any, Any]) -> list[Any]:
    """The program's outputs, where all values are known; those that are sums in the program's own dtype."""
    found = []
    for var in micro.jaxpr.outvars:
        dtype = dtype_of(var)
        value = jnp.asarray(var.val, dtype) if isinstance(var, _jax.Literal) else env[var]
        found.append(value if value.dtype == dtype else value.astype(dtype))
    return found
