"""A program in the making: values to read, steps that are appended, and what is known of their numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from random_programs.values import FLOATS, Program, Step, Type, Var

LARGEST = 1024
"""Elements of the largest array."""
DIMS = (1, 2, 3, 4, 6, 8, 16)
_MANTISSA = {"float32": 24, "bfloat16": 8}

Numbers = tuple[float, int | None]
"""(bound, grain) of a result."""
DRAWERS: dict[Callable[[Scope], Any], int] = {}
"""What draws a step, and how often it is asked to."""


def drawn(weight: int) -> Callable[[Callable[[Scope], Any]], Callable[[Scope], Any]]:
    """Register what draws a step; it returns False where it finds that it cannot."""

    def register(drawer: Callable[[Scope], Any]) -> Callable[[Scope], Any]:
        DRAWERS[drawer] = weight
        return drawer

    return register


class Scope:
    """A program in the making. `smooth`: it will be differentiated, so that kinks count as jumps do elsewhere; `depth`: of
    bodies around it."""

    def __init__(
        self, random: Random, dims: Sequence[int], given: Sequence[Type] = (), smooth: bool = False, depth: int = 0
    ) -> None:
        self.random, self.dims, self.smooth, self.depth = random, dims, smooth, depth
        self.vars: list[Var] = []
        self.inputs: list[Var] = []
        self.steps: list[Step] = []
        for type in given:
            self.new_input(type)

    # ---- choices

    def chance(self, share: float) -> bool:
        """True in this share of the cases; the simplest answer is False."""
        return self.random.random() >= 1 - share

    def some(self, items: Sequence[Any], least: int = 1) -> list[Any]:
        """At least so many of them, in order."""
        return sorted(self.random.sample(items, self.random.randint(least, max(least, len(items)))))

    def shuffled(self, items: Sequence[Any]) -> list[Any]:
        """All of them, in any order."""
        return self.random.sample(items, len(items))

    def shape(self, rank: int | None = None) -> tuple[int, ...]:
        """Made of the program's few extents, so that shapes meet again."""
        rank = self.random.choice((2, 2, 2, 1, 1, 3, 3, 4, 0)) if rank is None else rank
        shape = tuple(self.random.choice(self.dims) for _ in range(rank))
        return shape if math.prod(shape) <= LARGEST else shape[:2] + (1,) * (rank - 2)

    def places(self, x: Var) -> int:
        """A dimension of x."""
        return self.random.randrange(len(x.type.shape))

    # ---- values to read

    def new_input(self, type: Type) -> Var:
        """One more argument (of a body: one more constant)."""
        var = self._var(type)
        self.inputs.append(var)
        return var

    def _var(self, type: Type) -> Var:
        var = Var(len(self.vars), type)
        self.vars.append(var)
        return var

    def any(self, dtypes: Sequence[str] = FLOATS, ranks: Sequence[int] = (0, 1, 2, 3, 4), exact: bool = False) -> Var:
        """A value of one of these dtypes and ranks: mostly a recent one, sometimes a new input."""
        fits = [v for v in self.vars if v.type.dtype in dtypes and len(v.type.shape) in ranks and (v.type.exact or not exact)]
        if fits and not self.chance(0.1):
            return self.random.choice(fits[::-1][: self.random.choice((2, 4, 100))])
        dtype = self.random.choice(dtypes if set(dtypes) != set(FLOATS) else ("float32",) * 5 + ("bfloat16",))
        return self.new_input(input_type(self.shape(self.random.choice(([r for r in ranks if r] or ranks)[:3])), dtype))

    def want(self, shape: Sequence[int], dtype: str, like: Type | None = None) -> Var:
        """A value of this very shape and dtype (as tame as `like`): one that is there, perhaps reshaped, or a new input."""
        shape = tuple(shape)
        fits = [v for v in self.vars if v.type.dtype == dtype and (like is None or tame(v.type, like))]
        same_shape = [v for v in fits if v.type.shape == shape]
        if same_shape and not self.chance(0.2):
            return self.random.choice(same_shape)
        same_size = [v for v in fits if v.type.shape != shape and math.prod(v.type.shape) == math.prod(shape) and shape]
        if not same_size or self.chance(0.3):
            return self.new_input(input_type(shape, dtype))
        other = self.random.choice(same_size)
        if other.type.shape == shape[::-1]:
            return self.emit(jnp.transpose, [other], same(other), axes=tuple(range(len(shape)))[::-1])[0]
        return self.emit(jnp.reshape, [other], same(other), shape=shape)[0]

    def scalar(self) -> Var:
        """An int32 scalar, of any value between about -100 and 100."""
        whole = self.any(("int32",))
        return whole if not whole.type.shape else self.emit(jnp.sum, [whole], dtype="int32")[0]

    # ---- steps

    def emit(
        self, function: Callable[..., Any], reads: Sequence[Var], numbers: Numbers | Sequence[Numbers] = (2.0, None),
        bodies: Sequence[Program] = (), coarse: bool = False, **how: Any,
    ) -> list[Var]:  # fmt: skip
        """Append a step; `numbers` of its results. What has grown is scaled down at once, by a power of two."""
        step = Step(function, tuple(v.number for v in reads), (), tuple(how.items()), tuple(bodies))
        shapes = jax.eval_shape(step, *[jax.ShapeDtypeStruct(v.type.shape, jnp.dtype(v.type.dtype)) for v in reads])
        pairs = [numbers] * len(shapes) if isinstance(numbers, tuple) else numbers
        coarse = coarse or any(v.type.coarse for v in reads)
        results = [self._var(known(s, *pair, coarse)) for s, pair in zip(shapes, pairs, strict=True)]
        self.steps.append(replace(step, results=tuple(results)))
        return [self._tamed(v) for v in results]

    def _tamed(self, var: Var) -> Var:
        type = var.type
        if type.dtype not in FLOATS or type.bound <= 4:
            return var
        digits = math.ceil(math.log2(type.bound / 2))
        grain = None if type.grain is None else type.grain + digits
        return self.emit(scale, [var], (type.bound / 2**digits, grain), factor=0.5**digits)[0]

    def add_steps(self, count: int) -> None:
        """Draw so many steps."""
        while count:
            (drawer,) = self.random.choices(list(DRAWERS), list(DRAWERS.values()))
            count -= drawer(self) is not False

    def program(self, outputs: Sequence[Var]) -> Program:
        """What has been drawn."""
        return Program(tuple(self.inputs), tuple(self.steps), tuple(v.number for v in outputs))

    # ---- bodies

    def inner(self, given: Sequence[Type], most: int = 3, smooth: bool = False) -> Scope:
        """A body of a few steps that starts with these values."""
        body = Scope(self.random, self.dims, given, smooth or self.smooth, self.depth + 1)
        body.add_steps(self.random.randint(1, most))
        return body

    def extras(self, body: Scope, given: int) -> list[Var]:
        """Values for the inputs that a body asked for beyond those given."""
        return [self.want(v.type.shape, v.type.dtype, v.type) for v in body.inputs[given:]]

    def made(self) -> list[Var]:
        """All results."""
        return [v for step in self.steps for v in step.results]

    def advance(self, state: Var) -> Var:
        """What becomes of a state: moved by something of its shape, or (rarely) as it is."""
        return state if self.chance(0.1) else self.emit(advance, [state, self.want(state.type.shape, state.type.dtype)])[0]

    @property
    def coarse(self) -> bool:
        """Whether anything is rounded to bfloat16."""
        return any(v.type.coarse for v in self.vars)


def draw_program(random: Random, most: int = 6) -> Program:
    """A program of 2 to `most` steps (and those that keep numbers small); some of their results are its outputs."""
    dims = [random.choice((8, 16, 8, 4)), random.choice(DIMS), random.choice((8, 16, 4, 2))]
    scope = Scope(random, dims, [input_type([random.choice(dims), random.choice(dims)], "float32")])
    scope.add_steps(random.randint(2, most))
    made = scope.made()
    read = {number for step in scope.steps for number in step.reads}
    outputs = [made[-1], *(random.choice(made) for _ in range(random.randint(0, 2)))]
    if not scope.chance(0.3):  # whatever nothing reads, so that most steps matter
        outputs += [v for v in made[:-1] if v.number not in read][:6]
    if scope.chance(0.15):
        outputs.append(random.choice(scope.vars))  # perhaps an input as it is, or the same value twice
    states = []
    if scope.chance(0.3):  # a train step: the first arguments come back changed
        states = [scope.advance(v) for v in scope.inputs[: random.randint(1, 3)]]
    return replace(scope.program([*states, *outputs]), states=len(states))


# --- numbers -----------------------------------------------------------------------------------------------------------------


def input_type(shape: Sequence[int], dtype: str) -> Type:
    """Of an input."""
    return Type(tuple(shape), dtype, 2.0, 3 if dtype in FLOATS else 0)


def known(aval: Any, bound: float, grain: int | None, coarse: bool) -> Type:
    """A result's type; digits that do not fit its dtype make it a rounded one."""
    dtype = str(aval.dtype)
    if dtype not in FLOATS:
        return Type(aval.shape, dtype, 2.0, 0)
    fits = grain is not None and bound * 2.0**grain <= 2 ** _MANTISSA[dtype]
    return Type(aval.shape, dtype, bound, grain if fits else None, not fits and (coarse or dtype == "bfloat16"))


def tame(type: Type, like: Type) -> bool:
    """Whether a value of one type may stand where another was counted on."""
    exact = like.grain is None or (type.grain is not None and type.grain <= like.grain)
    return type.bound <= like.bound and exact and (like.coarse or not type.coarse)


def same(*values: Var) -> Numbers:
    """Numbers of a result that holds only what these hold."""
    grains = [v.type.grain for v in values]
    return max(v.type.bound for v in values), None if None in grains else max(g or 0 for g in grains)


# --- operations that keep numbers small --------------------------------------------------------------------------------------


def const(x: Any, value: float) -> Any:
    """A scalar of an array's dtype."""
    return jnp.asarray(value, x.dtype)


def modulo(x: Any, n: int) -> Any:
    """Whole numbers made less than n."""
    return jnp.mod(x, const(x, n))


def scale(x: Any, factor: float) -> Any:
    """By a power of two."""
    return x * const(x, factor)


def advance(state: Any, change: Any) -> Any:
    """A state moved by a change, no larger than before."""
    if state.dtype == jnp.bool_:
        return state ^ change
    if jnp.issubdtype(state.dtype, jnp.floating):
        return state * const(state, 0.5) + jnp.tanh(change) * const(state, 0.5)
    return lax.rem(state + change, const(state, 13))
