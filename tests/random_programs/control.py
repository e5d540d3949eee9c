"""Loops, branches, calls, batching and derivatives: operations with programs inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from random_programs.scope import LARGEST, Scope, drawn, input_type, modulo, same
from random_programs.values import ANY, FLOATS, Type, Var

DEEPEST = 2
"""Bodies within bodies."""


def nested(weight: int) -> Callable[[Callable[[Scope], Any]], Callable[[Scope], Any]]:
    """`drawn`, for what may not be nested too deep."""

    def register(drawer: Callable[[Scope], Any]) -> Callable[[Scope], Any]:
        return drawn(weight)(lambda s: s.depth < DEEPEST and drawer(s))

    return register


def outputs_of(body: Scope) -> list[Var]:
    """What a body made last, perhaps something else too."""
    return [body.made()[-1], *(body.random.choice(body.vars) for _ in range(body.random.randint(0, 1)))]


def carry_type(type: Type) -> Type:
    """What a carry of a type may become."""
    return replace(type, bound=2.0, grain=None if type.dtype in FLOATS else 0, coarse=type.coarse or type.dtype == "bfloat16")


def initial_carries(s: Scope, count: int) -> list[Var]:
    """Values that may start a loop."""
    found = [s.any(("float32", "float32", "bfloat16", "int32"), (0, 1, 2, 3)) for _ in range(count)]
    return [v if v.type.bound <= 2 else s.want(v.type.shape, v.type.dtype, carry_type(v.type)) for v in found]


def scan(bodies: Any, *operands: Any, consts: int, carries: int, length: int, reverse: bool, unroll: int, remat: bool) -> Any:
    """A body of (*carries, *slices, *constants)."""
    (body,) = bodies
    fixed, initial, xs = operands[:consts], operands[consts : consts + carries], operands[consts + carries :]

    def step(carry: Any, x: Any) -> Any:
        outs = body(*carry, *x, *fixed)
        return outs[:carries], outs[carries:]

    state, ys = lax.scan(jax.checkpoint(step) if remat else step, initial, xs, length=length, reverse=reverse, unroll=unroll)
    return (*state, *ys)


@nested(5)
def draw_scan(s: Scope) -> Any:
    carries = initial_carries(s, s.random.randint(0, 2))
    xs = [s.any(ANY, ranks=(1, 2, 3))] if s.chance(0.8) or not carries else []
    length = xs[0].type.shape[0] if xs else s.random.randint(1, 4)
    if xs and s.chance(0.3):
        xs.append(s.want((length, *s.shape(s.random.randint(0, 2))), "float32"))
    given = [*(carry_type(v.type) for v in carries), *(replace(v.type, shape=v.type.shape[1:]) for v in xs)]
    body = s.inner(given)
    state = [body.advance(v) for v in body.inputs[: len(carries)]]
    ys = outputs_of(body) if body.made() and (s.chance(0.8) or not carries) else []
    if any(length * math.prod(y.type.shape) > LARGEST for y in ys):
        return False
    fixed = s.extras(body, len(given))
    return s.emit(
        scan, [*fixed, *carries, *xs], [same(v) for v in (*state, *ys)], [body.program([*state, *ys])], body.coarse,
        consts=len(fixed), carries=len(carries), length=length, reverse=s.chance(0.3), unroll=1 + s.chance(0.25),
        remat=s.chance(0.15),
    )  # fmt: skip


def loop(bodies: Any, *operands: Any, carries: int, trips: int | None, how: str) -> Any:
    """A body of (*carries, round, *constants); `trips`: None where the first operand says how many."""
    (body,) = bodies
    rounds: Any = trips
    if trips is None:
        rounds, operands = modulo(operands[0], 4), operands[1:]
    state, fixed = operands[:carries], operands[carries:]
    if how == "fori":
        return lax.fori_loop(0, rounds, lambda i, carry: body(*carry, jnp.asarray(i, jnp.int32), *fixed), state)

    def again(carry: Any) -> Any:
        return (carry[0] + jnp.int32(1), *body(*carry[1:], carry[0], *fixed))

    return lax.while_loop(lambda carry: carry[0] < jnp.int32(rounds), again, (jnp.int32(0), *state))[1:]


@nested(4)
def draw_loop(s: Scope) -> Any:
    carries = initial_carries(s, s.random.randint(1, 2))
    given = [*(carry_type(v.type) for v in carries), input_type((), "int32")]
    body = s.inner(given)
    state = [body.advance(v) for v in body.inputs[: len(carries)]]
    fixed = s.extras(body, len(given))
    dynamic = not s.smooth and s.chance(0.4)  # how many rounds must be known for a derivative
    reads = [*([s.scalar()] if dynamic else []), *carries, *fixed]
    kind, trips = "fori" if s.smooth else s.random.choice(("fori", "while")), None if dynamic else s.random.randint(0, 3)
    how = {"carries": len(carries), "trips": trips, "how": kind}
    return s.emit(loop, reads, [same(v) for v in state], [body.program(state)], body.coarse, **how)


def branch(bodies: Any, index: Any, *operands: Any, shared: int, splits: tuple[int, ...]) -> Any:
    """`splits`: how many operands of its own each branch reads, after the shared ones."""
    starts = np.cumsum((shared, *splits))

    def one(number: int) -> Callable[..., Any]:
        return lambda *values: bodies[number](*values[:shared], *values[starts[number] : starts[number + 1]])

    branches = [one(number) for number in range(len(bodies))]
    if len(bodies) == 2:
        return lax.cond(modulo(index, 2) == jnp.int32(0), *branches, *operands)
    return lax.switch(index, branches, *operands)


@nested(4)
def draw_branch(s: Scope) -> Any:
    given = [s.any(ANY) for _ in range(s.random.randint(1, 2))]
    bodies, results, extras = [], [], []
    for _ in range(s.random.randint(1, 3)):
        body = s.inner([v.type for v in given])
        fits = [[v for v in body.vars if v.type.shape == x.type.shape and v.type.dtype == x.type.dtype] for x in given]
        results.append([found[-1] if s.chance(0.7) else s.random.choice(found) for found in fits])
        bodies.append(body)
        extras.append(s.extras(body, len(given)))
    return s.emit(
        branch, [s.scalar(), *given, *(v for more in extras for v in more)], [same(*column) for column in zip(*results)],
        [body.program(outputs) for body, outputs in zip(bodies, results)], any(body.coarse for body in bodies),
        shared=len(given), splits=tuple(map(len, extras)),
    )  # fmt: skip


def call(bodies: Any, *operands: Any, how: str) -> Any:
    """A body within another function."""
    (body,) = bodies
    wrapped: dict[str, Callable[..., Any]] = {
        "jit": jax.jit, "checkpoint": jax.checkpoint, "named": lambda f: jax.named_call(f, name="named"),
        "dots": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable),
    }  # fmt: skip
    return wrapped[how](body.__call__)(*operands)


@nested(2)
def draw_call(s: Scope) -> Any:
    given = [s.any(ANY) for _ in range(s.random.randint(1, 2))]
    body = s.inner([v.type for v in given])
    outputs = outputs_of(body)
    reads, how = [*given, *s.extras(body, len(given))], s.random.choice(("jit", "checkpoint", "dots", "named"))
    return s.emit(call, reads, [same(v) for v in outputs], [body.program(outputs)], body.coarse, how=how)


def vmap(bodies: Any, *operands: Any, ins: Sequence[int | None], outs: tuple[int, ...]) -> Any:
    """A body over a batch."""
    return jax.vmap(bodies[0].__call__, in_axes=ins, out_axes=outs)(*operands)


@nested(4)
def draw_vmap(s: Scope) -> Any:
    x = s.any(ANY, ranks=(1, 2, 3))
    given, axes = [x], [s.places(x)]
    n = x.type.shape[axes[0]]
    if s.chance(0.4):
        given.append(s.want((n, *s.shape(s.random.randint(0, 2))), "float32"))
        axes.append(0)
    body = s.inner([replace(v.type, shape=v.type.shape[:d] + v.type.shape[d + 1 :]) for v, d in zip(given, axes)])
    outputs = outputs_of(body)
    if any(n * math.prod(v.type.shape) > LARGEST for v in body.vars):
        return False
    more = s.extras(body, len(given))
    outs = tuple(s.random.randint(0, len(v.type.shape)) for v in outputs)
    return s.emit(
        vmap, [*given, *more], [same(v) for v in outputs], [body.program(outputs)], body.coarse, ins=(*axes, *[None] * len(more)),
        outs=outs,
    )  # fmt: skip


def gradient(bodies: Any, *operands: Any, wrt: int, how: str) -> Any:
    """Of the mean square of what a body returns, for its first `wrt` operands; squashed."""
    (body,) = bodies

    def loss(*args: Any) -> Any:
        outs = (jax.checkpoint(body.__call__) if how == "checkpoint" else body)(*args)
        return sum((jnp.sum(jnp.square(out.astype(jnp.float32))) * jnp.float32(0.25) for out in outs), jnp.float32(0))

    if how == "forward":
        return tuple(map(jnp.tanh, jax.jvp(lambda *xs: loss(*xs, *operands[wrt:]), operands[:wrt], operands[:wrt])))
    value, grads = jax.value_and_grad(loss, argnums=tuple(range(wrt)))(*operands)
    return tuple(map(jnp.tanh, (value, *grads)))


@nested(6)
def draw_gradient(s: Scope) -> Any:
    given = [s.any(("float32", "float32", "bfloat16"), ranks=(1, 2, 3)) for _ in range(s.random.randint(1, 3))]
    body = s.inner([v.type for v in given], 5, smooth=True)
    floats = [v for v in body.made() if v.type.dtype in FLOATS]
    if not floats:
        return False
    outputs = [floats[-1], *(s.random.choice(floats) for _ in range(s.random.randint(0, 1)))]
    reads, how = [*given, *s.extras(body, len(given))], s.random.choice(("backward", "backward", "checkpoint", "forward"))
    return s.emit(gradient, reads, (1.0, None), [body.program(outputs)], body.coarse, wrt=len(given), how=how)
