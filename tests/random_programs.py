"""Random well-typed JAX programs, small enough to compile by the thousand.

`draw_program` composes a `Program` from a `Pick`, the one source of choices: a NumPy generator (`random_program`) or
hypothesis (`programs`). A program is a description, and prints as one; `build` makes a function and its arguments of it.

Every value carries what is known about its numbers (`Type`). Inputs are small multiples of 1/8, so that sums and products of
them are exact in any order until their digits no longer fit; argmax, comparisons and the like read only such values, and the
results of everything else stay bounded. A planned program may therefore differ from the unplanned one by rounding, and by
nothing more. `shrink` makes a failing program small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

DIMS = (1, 2, 3, 4, 6, 8, 16)
LARGEST = 4096
"""Elements of the largest array."""
MANTISSA = {"float32": 24, "bfloat16": 8}
SHORT = {"float32": "f32", "bfloat16": "bf16", "int32": "i32", "int8": "i8", "bool": "bool", "uint32": "u32"}
FLOATS, INTS = ("float32", "bfloat16"), ("int32", "int8", "uint32")
ANY = (*FLOATS, *INTS, "bool")


# --- nouns ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Type:
    """What is known of a value. Floats: `bound` of the magnitude; a multiple of 2**-`grain`, or None where it is rounded;
    `coarse`: rounded to bfloat16 on the way."""

    shape: tuple[int, ...]
    dtype: str
    bound: float = 2.0
    grain: int | None = 3
    coarse: bool = False

    @property
    def exact(self) -> bool:
        """The same to the last bit in any order of evaluation."""
        return self.grain is not None

    def __repr__(self) -> str:
        return f"{SHORT[self.dtype]}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Var:
    """A value by number."""

    number: int
    type: Type

    def __repr__(self) -> str:
        return f"v{self.number}:{self.type}"


@dataclass(frozen=True)
class Step:
    """One operation: a name in `RUN`, the numbers of what it reads, its keywords, sub-programs."""

    op: str
    reads: tuple[int, ...]
    results: tuple[Var, ...]
    how: tuple[tuple[str, Any], ...] = ()
    bodies: tuple[Program, ...] = ()

    def __repr__(self) -> str:
        words = [f"v{number}" for number in self.reads] + [f"{key}={value!r}" for key, value in self.how]
        line = f"{', '.join(map(repr, self.results))} = {self.op}({', '.join(words)})"
        return "\n".join([line, *("    " + line for body in self.bodies for line in repr(body).splitlines())])


@dataclass(frozen=True)
class Program:
    """Inputs, steps, and the numbers of the values returned."""

    inputs: tuple[Var, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    def __repr__(self) -> str:
        lines = [f"program({', '.join(map(repr, self.inputs))}):"]
        lines += ["  " + line for step in self.steps for line in repr(step).splitlines()]
        return "\n".join([*lines, f"  return {', '.join(f'v{number}' for number in self.outputs)}"])

    @property
    def types(self) -> dict[int, Type]:
        """By number."""
        return {v.number: v.type for v in (*self.inputs, *(v for step in self.steps for v in step.results))}

    @property
    def output_types(self) -> tuple[Type, ...]:
        """Of the values returned."""
        types = self.types
        return tuple(types[number] for number in self.outputs)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        env = dict(zip([v.number for v in self.inputs], args, strict=True))
        for step in self.steps:
            values = run(step, [env[number] for number in step.reads])
            env.update(zip([v.number for v in step.results], values, strict=True))
        return tuple(env[number] for number in self.outputs)


def run(step: Step, operands: Sequence[Any]) -> tuple[Any, ...]:
    """The results of one step."""
    outs = RUN[step.op](*([step.bodies] if step.bodies else []), *operands, **dict(step.how))
    return tuple(outs) if isinstance(outs, (tuple, list)) else (outs,)


def build(program: Program) -> tuple[Callable[..., tuple[Any, ...]], tuple[np.ndarray, ...]]:
    """A function of arrays, and arguments for it."""
    rng = np.random.default_rng(0)

    def random_program(*args: Any) -> tuple[Any, ...]:
        return program(*args)

    return random_program, tuple(_array(rng, v.type) for v in program.inputs)


def _array(rng: np.random.Generator, type: Type) -> np.ndarray:
    if type.dtype == "bool":
        return rng.integers(0, 2, type.shape).astype(bool)
    if type.dtype in INTS:
        return rng.integers(0 if type.dtype == "uint32" else -8, 9, type.shape).astype(type.dtype)
    return (rng.integers(-16, 17, type.shape) / 8).astype(jnp.dtype(type.dtype))


# --- choices -------------------------------------------------------------------------------------------------------------


class Pick:
    """A source of choices, made of one: an integer within bounds, both included."""

    def __init__(self, integer: Callable[[int, int], int]) -> None:
        self.integer = integer

    def one(self, items: Sequence[Any]) -> Any:
        """Any of them."""
        return items[self.integer(0, len(items) - 1)]

    def chance(self, share: float) -> bool:
        """True in this share of the cases; the simplest answer is False."""
        return self.integer(0, 99) >= round(100 * (1 - share))

    def shuffled(self, items: Sequence[Any]) -> list[Any]:
        """All of them, in any order."""
        left = list(items)
        return [left.pop(self.integer(0, len(left) - 1)) for _ in items]

    def some(self, items: Sequence[Any], least: int = 1) -> list[Any]:
        """At least so many of them, in order."""
        count = self.integer(least, max(least, len(items)))
        return sorted(self.shuffled(items)[:count])


class Scope:
    """A program in the making. `smooth`: it will be differentiated, so that kinks count as jumps do elsewhere."""

    def __init__(
        self, pick: Pick, dims: Sequence[int], given: Sequence[Type] = (), smooth: bool = False, depth: int = 0
    ) -> None:
        self.pick, self.dims, self.smooth, self.depth = pick, dims, smooth, depth
        self.vars: list[Var] = []
        self.inputs: list[Var] = []
        self.steps: list[Step] = []
        for type in given:
            self.new_input(type)

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

    def shape(self, rank: int | None = None) -> tuple[int, ...]:
        """Made of the program's few dimensions, so that shapes meet again."""
        rank = self.pick.one((2, 2, 2, 1, 1, 3, 3, 4, 0)) if rank is None else rank
        shape = tuple(self.pick.one(self.dims) for _ in range(rank))
        return shape if math.prod(shape) <= LARGEST else shape[:2] + (1,) * (rank - 2)

    def any(self, dtypes: Sequence[str] = FLOATS, ranks: Sequence[int] = (0, 1, 2, 3, 4), exact: bool = False) -> Var:
        """A value of one of these dtypes and ranks: mostly a recent one, sometimes a new input."""
        fits = [v for v in self.vars if v.type.dtype in dtypes and len(v.type.shape) in ranks and (v.type.exact or not exact)]
        if fits and not self.pick.chance(0.1):
            return self.pick.one(fits[::-1][: self.pick.one((2, 4, 100))])
        dtype = self.pick.one(dtypes if set(dtypes) != set(FLOATS) else ("float32",) * 5 + ("bfloat16",))
        ranks = [rank for rank in ranks if rank] or ranks
        return self.new_input(new_type(self.shape(self.pick.one(ranks[:3])), dtype))

    def want(self, shape: Sequence[int], dtype: str, like: Type | None = None) -> Var:
        """A value of this very shape and dtype (as tame as `like`): one that is there, or a new input."""
        shape = tuple(shape)
        fits = [v for v in self.vars if v.type.shape == shape and v.type.dtype == dtype and (like is None or tame(v.type, like))]
        if fits and not self.pick.chance(0.25):
            return self.pick.one(fits)
        return self.new_input(new_type(shape, dtype))

    def scalar(self) -> Var:
        """An int32 scalar."""
        whole = self.any(("int32",), exact=True)
        return whole if not whole.type.shape else self.emit("sum", [whole], axes=tuple(range(len(whole.type.shape))))[0]

    # ---- steps

    def emit(
        self, op: str, reads: Sequence[Var], numbers: Sequence[tuple[float, int | None]] | tuple[float, int | None] = (2.0, None),
        bodies: Sequence[Program] = (), coarse: bool = False, **how: Any,
    ) -> list[Var]:  # fmt: skip
        """Append a step; `numbers`: (bound, grain) of its results. What has grown is scaled down at once, by a power of two."""
        step = Step(op, tuple(v.number for v in reads), (), tuple(how.items()), tuple(bodies))
        shapes = jax.eval_shape(partial(run, step), [jax.ShapeDtypeStruct(v.type.shape, jnp.dtype(v.type.dtype)) for v in reads])
        pairs = [numbers] * len(shapes) if isinstance(numbers, tuple) else numbers
        coarse = coarse or any(v.type.coarse for v in reads)
        types = [known(s.shape, str(s.dtype), bound, grain, coarse) for s, (bound, grain) in zip(shapes, pairs, strict=True)]
        results = [self._var(type) for type in types]
        self.steps.append(replace(step, results=tuple(results)))
        return [self._tamed(v) for v in results]

    def _tamed(self, var: Var) -> Var:
        type = var.type
        if type.dtype not in FLOATS or type.bound <= 4:
            return var
        digits = math.ceil(math.log2(type.bound / 2))
        grain = None if type.grain is None else type.grain + digits
        return self.emit("scale", [var], (type.bound / 2**digits, grain), factor=0.5**digits)[0]

    def program(self, outputs: Sequence[Var]) -> Program:
        """What has been drawn."""
        return Program(tuple(self.inputs), tuple(self.steps), tuple(v.number for v in outputs))

    def inner(self, given: Sequence[Type], most: int = 4, smooth: bool = False) -> Scope:
        """A body of a few steps that starts with these values."""
        body = Scope(self.pick, self.dims, given, smooth or self.smooth, self.depth + 1)
        add_steps(body, self.pick.integer(1, most))
        return body

    def extras(self, body: Scope, given: int) -> list[Var]:
        """Values for the inputs that a body asked for beyond those given."""
        return [self.want(v.type.shape, v.type.dtype, v.type) for v in body.inputs[given:]]


def new_type(shape: Sequence[int], dtype: str) -> Type:
    """Of an input."""
    return Type(tuple(shape), dtype, 2.0, 3 if dtype in FLOATS else 0)


def known(shape: Sequence[int], dtype: str, bound: float, grain: int | None, coarse: bool) -> Type:
    """A result's type; digits that do not fit its dtype make it a rounded one."""
    if dtype not in FLOATS:
        return Type(tuple(shape), dtype, 2.0, 0)
    fits = grain is not None and bound * 2.0**grain <= 2 ** MANTISSA[dtype]
    return Type(tuple(shape), dtype, bound, grain if fits else None, not fits and (coarse or dtype == "bfloat16"))


def tame(type: Type, like: Type) -> bool:
    """Whether a value of one type may stand where another was counted on."""
    exact = like.grain is None or (type.grain is not None and type.grain <= like.grain)
    return type.bound <= like.bound and exact and (like.coarse or not type.coarse)


def random_program(rng: np.random.Generator, most: int = 9) -> Program:
    """A program of 3 to about `most` steps (and those that keep numbers small)."""
    return draw_program(Pick(lambda low, high: int(rng.integers(low, high + 1))), most)


@st.composite
def programs(draw: Any, most: int = 9) -> Program:
    """The same for hypothesis."""
    return draw_program(Pick(lambda low, high: draw(st.integers(low, high))), most)


def draw_program(pick: Pick, most: int) -> Program:
    """Steps, and some of their results as outputs."""
    dims = [pick.one((8, 16, 8, 4)), pick.one(DIMS), pick.one((8, 16, 4, 2))]
    scope = Scope(pick, dims, [new_type([pick.one(dims), pick.one(dims)], "float32")])
    add_steps(scope, pick.integer(3, most))
    made = [v for step in scope.steps for v in step.results]
    outputs = [made[-1], *(pick.one(made) for _ in range(pick.integer(0, 2)))]
    if pick.chance(0.15):
        outputs.append(pick.one(scope.vars))  # perhaps an input as it is, or the same value twice
    states: list[Var] = []
    if pick.chance(0.3):  # a step: the first arguments come back changed
        for var in scope.inputs[: pick.integer(1, 3)]:
            grown = scope.want(var.type.shape, var.type.dtype)
            states.append(advance(scope, var, grown))
    return scope.program([*states, *outputs])


def advance(scope: Scope, var: Var, change: Var) -> Var:
    """The next value of state."""
    return scope.emit("advance", [var, change], (2.0, None))[0]


def add_steps(scope: Scope, count: int) -> None:
    """Draw so many steps."""
    total = sum(weight for weight, _ in DRAWN)
    while count:
        ticket = scope.pick.integer(0, total - 1)
        for weight, drawer in DRAWN:
            ticket -= weight
            if ticket < 0:
                break
        if drawer(scope) is not False:
            count -= 1


# --- the operations: how they run, and how they are drawn ------------------------------------------------------------------

RUN: dict[str, Callable[..., Any]] = {}
DRAWN: list[tuple[int, Callable[[Scope], Any]]] = []


def drawn(weight: int) -> Callable[[Callable[[Scope], Any]], Callable[[Scope], Any]]:
    """Register what draws a step; it returns False where it finds that it cannot."""

    def register(drawer: Callable[[Scope], Any]) -> Callable[[Scope], Any]:
        DRAWN.append((weight, drawer))
        return drawer

    return register


def runs(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register how an operation runs."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        RUN[name] = function
        return function

    return register


def const(x: Any, value: float) -> Any:
    """A scalar of an array's dtype."""
    return jnp.asarray(value, x.dtype)


@runs("advance")
def _advance(state: Any, change: Any) -> Any:
    if state.dtype == jnp.bool_:
        return state ^ change
    if jnp.issubdtype(state.dtype, jnp.floating):
        return state * const(state, 0.5) + jnp.tanh(change) * const(state, 0.5)
    return lax.rem(state + change, const(state, 13))


RUN["scale"] = lambda x, factor: x * const(x, factor)

# element-wise


@jax.custom_jvp
def soft_step(x: Any) -> Any:
    """A function with a derivative of its own."""
    return x / (const(x, 1) + jnp.abs(x))


@soft_step.defjvp
def _soft_step_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    return soft_step(x), dx * jax.nn.sigmoid(x)


@jax.custom_vjp
def bounded_gradient(x: Any) -> Any:
    """Sine whose gradient is squashed."""
    return jnp.sin(x)


bounded_gradient.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.tanh(g) * jnp.cos(x),))

SMOOTH: dict[str, Callable[[Any], Any]] = {
    "tanh": jnp.tanh, "sin": jnp.sin, "cos": jnp.cos, "logistic": jax.nn.sigmoid, "erf": jax.scipy.special.erf,
    "silu": jax.nn.silu, "gelu": jax.nn.gelu, "softplus": jax.nn.softplus, "soft_step": soft_step,
    "bounded_gradient": bounded_gradient, "bell": lambda x: jnp.exp(-jnp.square(x)), "square": jnp.square,
    "root": lambda x: jnp.sqrt(jnp.square(x) + const(x, 1)), "inverse": lambda x: lax.rsqrt(jnp.square(x) + const(x, 1)),
    "log": lambda x: jnp.log1p(jnp.square(x)), "cube": lambda x: lax.integer_pow(x * const(x, 0.5), 3),
    "power": lambda x: (jnp.square(x) + const(x, 1)) ** const(x, 0.75), "atan": lambda x: jnp.arctan2(x, const(x, 2) + jnp.cos(x)),
    "stop": lax.stop_gradient, "expm1": lambda x: jnp.expm1(jnp.tanh(x)), "cbrt": lambda x: jnp.cbrt(jnp.square(x) + const(x, 1)),
}  # fmt: skip
KINKED: dict[str, Callable[[Any], Any]] = {
    "abs": jnp.abs, "relu": jax.nn.relu, "clip": lambda x: jnp.clip(x, -1, 1), "leaky": lambda x: jax.nn.leaky_relu(x, 0.25),
    "relu6": jax.nn.relu6,
}  # fmt: skip
JUMPING: dict[str, Callable[[Any], Any]] = {"floor": jnp.floor, "round": jnp.round, "sign": jnp.sign, "ceil": jnp.ceil}
WHOLE: dict[str, Callable[[Any], Any]] = {
    "abs": jnp.abs, "square": jnp.square, "not": jnp.invert, "bits": lax.population_count, "rem": lambda x: lax.rem(x, const(x, 5)),
    "half": lambda x: lax.shift_right_arithmetic(x, const(x, 1)), "less": lambda x: x < const(x, 2), "sign": jnp.sign,
    "mod": lambda x: jnp.mod(x, const(x, 3)), "zeros": lax.clz,
}  # fmt: skip
EVERY = {"smooth": SMOOTH, "kinked": KINKED, "jumping": JUMPING, "whole": WHOLE}
RUN["unary"] = lambda x, family, name: EVERY[family][name](x)


@drawn(8)
def draw_unary(s: Scope) -> Any:
    family = s.pick.one(("smooth", "smooth", "kinked", "jumping", "whole"))
    name = s.pick.one(list(EVERY[family]))
    if family == "whole":
        x = s.any((*INTS, "bool") if name == "not" else INTS)
        return s.emit("unary", [x], (2.0, 0), family=family, name=name)
    x = s.any(exact=family == "jumping" or (family == "kinked" and s.smooth))
    grain, bound = None, max(x.type.bound, 2.0)
    if family == "jumping":
        grain = 0
    elif name in ("abs", "relu", "clip", "relu6", "stop"):
        grain = x.type.grain
    elif name in ("square", "leaky"):
        grain = x.type.grain and (x.type.grain + 2 if name == "leaky" else 2 * x.type.grain)
    if name in ("square", "root", "log", "power"):
        bound = x.type.bound**2 + 1
    return s.emit("unary", [x], (bound + (family == "jumping"), grain), family=family, name=name)


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": jnp.add, "sub": jnp.subtract, "mul": jnp.multiply, "max": jnp.maximum, "min": jnp.minimum,
    "div": lambda x, y: x / (const(y, 1) + jnp.square(y)), "logaddexp": jnp.logaddexp, "hypot": lambda x, y: jnp.sqrt(x * x + y * y + const(x, 1)),
}  # fmt: skip
LOGICAL = {"and": jnp.bitwise_and, "or": jnp.bitwise_or, "xor": jnp.bitwise_xor}
COMPARED = {"lt": jnp.less, "ge": jnp.greater_equal, "eq": jnp.equal, "ne": jnp.not_equal}
EVERY_BINARY = {"binary": BINARY, "logical": LOGICAL, "compared": COMPARED}


@runs("binary")
def _binary(x: Any, y: Any, family: str, name: str, keep: tuple[int, ...] | None = None) -> Any:
    """`keep`: the dimensions of x that those of y stand for."""
    if keep is not None:
        y = lax.broadcast_in_dim(y, x.shape, keep)
    return EVERY_BINARY[family][name](x, y)


@drawn(10)
def draw_binary(s: Scope) -> Any:
    family = s.pick.one(("binary", "binary", "binary", "logical", "compared"))
    name = s.pick.one(list(EVERY_BINARY[family]))
    kink = name in ("max", "min") and s.smooth
    dtypes = (*INTS, "bool") if family == "logical" else ANY if family == "compared" else FLOATS
    if name in ("add", "sub", "mul", "max", "min") and s.pick.chance(0.15):
        dtypes = INTS
    x = s.any(dtypes, exact=kink or family == "compared")
    shape, keep = x.type.shape, None
    if shape and s.pick.chance(0.4):
        keep = tuple(s.pick.some(range(len(shape)), 0))
        shape = tuple(shape[d] if s.pick.chance(0.8) else 1 for d in keep)
    y = s.want(shape, x.type.dtype)
    if (kink or family == "compared") and not y.type.exact:
        y = s.new_input(new_type(shape, x.type.dtype))
    a, b = x.type, y.type
    grains = None if a.grain is None or b.grain is None else (a.grain, b.grain)
    bound, grain = a.bound + b.bound + 1, None
    if name in ("add", "sub"):
        bound, grain = a.bound + b.bound, grains and max(grains)
    elif name == "mul":
        bound, grain = a.bound * b.bound, grains and sum(grains)
    elif name in ("max", "min"):
        bound, grain = max(a.bound, b.bound), grains and max(grains)
    elif name == "div":
        bound = a.bound
    return s.emit("binary", [x, y], (bound, grain), family=family, name=name, **({} if keep is None else {"keep": keep}))


RUN["where"] = lambda p, x, y: jnp.where(p, x, y)
RUN["clamp"] = lambda low, x, high: lax.clamp(low, x, high)
RUN["select_n"] = lambda which, *cases: lax.select_n(jnp.abs(lax.rem(which, const(which, len(cases)))), *cases)


@drawn(4)
def draw_where(s: Scope) -> Any:
    x = s.any(ANY)
    y = s.want(x.type.shape, x.type.dtype)
    grain = None if x.type.grain is None or y.type.grain is None else max(x.type.grain, y.type.grain)
    numbers = (max(x.type.bound, y.type.bound), grain)
    if s.pick.chance(0.2):
        z = s.want(x.type.shape, x.type.dtype, new_type(x.type.shape, x.type.dtype))
        which = s.want(x.type.shape, "int32")
        return s.emit("select_n", [which, x, y, z], numbers)
    return s.emit("where", [s.want(x.type.shape, "bool"), x, y], numbers)


@runs("cast")
def _cast(x: Any, dtype: str) -> Any:
    if jnp.issubdtype(x.dtype, jnp.integer) and dtype in FLOATS:
        x = lax.rem(x, const(x, 8))
    return x.astype(jnp.dtype(dtype))


@drawn(4)
def draw_cast(s: Scope) -> Any:
    dtype = s.pick.one((*FLOATS, *FLOATS, *INTS, "bool"))
    x = s.any(ANY, exact=dtype not in FLOATS)
    floating = x.type.dtype in FLOATS
    if floating and dtype == "uint32":
        return False  # a negative float has no defined value there
    return s.emit("cast", [x], (x.type.bound, x.type.grain) if floating else (8.0, 0), dtype=dtype)


RUN["iota"] = lambda shape, dim, dtype: lax.broadcasted_iota(jnp.dtype(dtype), shape, dim)
RUN["one_hot"] = lambda x, size, axis, dtype: jax.nn.one_hot(jnp.mod(x, const(x, size)), size, axis=axis, dtype=jnp.dtype(dtype))


@drawn(2)
def draw_iota(s: Scope) -> Any:
    shape = s.shape() or (s.dims[0],)
    dtype = s.pick.one(("int32", "int32", "float32", "bfloat16"))
    return s.emit("iota", [], (16.0, 0), shape=shape, dim=s.pick.integer(0, len(shape) - 1), dtype=dtype)


@drawn(2)
def draw_one_hot(s: Scope) -> Any:
    x = s.any(("int32",), ranks=(1, 2, 0))
    axis = s.pick.integer(0, len(x.type.shape))
    return s.emit("one_hot", [x], (1.0, 0), size=s.pick.one(s.dims), axis=axis, dtype=s.pick.one(("float32", "float32", "int32")))


# shapes

RUN["transpose"] = lambda x, order: jnp.transpose(x, order)
RUN["reshape"] = lambda x, shape: jnp.reshape(x, shape)
RUN["squeeze"] = lambda x, axes: lax.squeeze(x, axes)
RUN["expand"] = lambda x, axes: jnp.expand_dims(x, axes)
RUN["broadcast"] = lambda x, shape, keep: lax.broadcast_in_dim(x, shape, keep)
RUN["flip"] = lambda x, axes: jnp.flip(x, axes)
RUN["roll"] = lambda x, shift, axis: jnp.roll(x, shift, axis)
RUN["slice"] = lambda x, start, limit, strides: lax.slice(x, start, limit, strides)
RUN["pad"] = lambda x, config: lax.pad(x, const(x, 1), config)
RUN["edge_pad"] = lambda x, widths, mode: jnp.pad(x, widths, mode=mode)
RUN["concatenate"] = lambda *xs, axis: jnp.concatenate(xs, axis)
RUN["stack"] = lambda *xs, axis: jnp.stack(xs, axis)
RUN["split"] = lambda x, count, axis: tuple(jnp.split(x, count, axis))
RUN["repeat"] = lambda x, count, axis: jnp.repeat(x, count, axis)
RUN["tile"] = lambda x, counts: jnp.tile(x, counts)
RUN["diagonal"] = lambda x: jnp.diagonal(x)
RUN["tril"] = lambda x, k: jnp.tril(x, k)


def same(x: Var) -> tuple[float, int | None]:
    """Numbers of a result that holds only what x held (and ones and zeros)."""
    return x.type.bound, x.type.grain


@drawn(8)
def draw_shape(s: Scope) -> Any:
    x = s.any(ANY, ranks=(1, 2, 3, 4))
    shape = x.type.shape
    rank, size = len(shape), math.prod(shape)
    ones = [d for d in range(rank) if shape[d] == 1]
    op = s.pick.one(("transpose", "reshape", "reshape", "reshape", "expand", "broadcast", "flip", "roll", "squeeze", "repeat", "tile"))
    if op == "transpose":
        return s.emit(op, [x], same(x), order=tuple(s.pick.shuffled(range(rank))))
    if op == "reshape":
        new = list(shape)
        for _ in range(s.pick.integer(1, 3)):
            d = s.pick.integer(0, len(new) - 1)
            parts = [p for p in range(1, new[d] + 1) if new[d] % p == 0]
            if s.pick.chance(0.5) and d + 1 < len(new):
                new[d : d + 2] = [new[d] * new[d + 1]]
            elif len(new) < 5:
                part = s.pick.one(parts)
                new[d : d + 1] = [part, new[d] // part]
        return s.emit(op, [x], same(x), shape=tuple(new) if s.pick.chance(0.9) else (size,))
    if op == "expand" and rank < 4:
        return s.emit(op, [x], same(x), axes=s.pick.integer(0, rank))
    if op == "squeeze" and ones:
        return s.emit(op, [x], same(x), axes=tuple(s.pick.some(ones)))
    if op == "broadcast" and rank < 4:
        keep = tuple(s.pick.some(range(rank + 1), rank)[:rank])
        wide = [s.pick.one(s.dims)] * (rank + 1)
        for d, n in zip(keep, shape, strict=True):
            wide[d] = n if n > 1 or s.pick.chance(0.5) else s.pick.one(s.dims)
        if math.prod(wide) <= LARGEST:
            return s.emit(op, [x], same(x), shape=tuple(wide), keep=keep)
    if op == "flip":
        return s.emit(op, [x], same(x), axes=tuple(s.pick.some(range(rank))))
    axis = s.pick.integer(0, rank - 1)
    if op == "roll":
        return s.emit(op, [x], same(x), shift=s.pick.integer(-3, 3), axis=axis)
    if op == "repeat" and size <= LARGEST // 3:
        return s.emit(op, [x], same(x), count=s.pick.integer(1, 3), axis=axis)
    if op == "tile" and size <= LARGEST // 2:
        return s.emit(op, [x], same(x), counts=tuple(2 if d == axis else 1 for d in range(rank)))
    return False


@drawn(6)
def draw_slice(s: Scope) -> Any:
    x = s.any(ANY, ranks=(1, 2, 3))
    shape = x.type.shape
    rank = len(shape)
    op = s.pick.one(("slice", "slice", "pad", "pad", "edge_pad", "split", "tril", "diagonal"))
    bound, grain = max(x.type.bound, 1.0), x.type.grain
    if op == "slice":
        start = tuple(s.pick.integer(0, n // 2) if s.pick.chance(0.5) else 0 for n in shape)
        limit = tuple(s.pick.integer(a + 1, n) if s.pick.chance(0.5) else n for a, n in zip(start, shape))
        return s.emit(op, [x], same(x), start=start, limit=limit, strides=tuple(s.pick.one((1, 1, 1, 2, 3)) for _ in shape))
    if op == "pad" and math.prod(shape) <= LARGEST // 4:
        config = []
        for n in shape:
            low = s.pick.one((0, 0, 1, 2, 8, -1 if n > 3 else 0))
            high = s.pick.one((0, 0, 1, 4, n, -1 if n > 3 else 0))
            config.append((low, high, s.pick.one((0, 0, 0, 1))))
        result = [low + high + n + (n - 1) * inside for n, (low, high, inside) in zip(shape, config)]
        if math.prod(result) <= LARGEST and (x.type.dtype != "bool"):
            return s.emit(op, [x], (bound, grain), config=tuple(config))
    if op == "edge_pad" and min(shape) > 2 and math.prod(n + 4 for n in shape) <= LARGEST:
        widths = tuple((s.pick.integer(0, 2), s.pick.integer(0, 2)) for _ in shape)
        return s.emit(op, [x], same(x), widths=widths, mode=s.pick.one(("edge", "reflect", "wrap")))
    if op == "split":
        axis = s.pick.integer(0, rank - 1)
        if shape[axis] % 2 == 0:
            return s.emit(op, [x], same(x), count=2, axis=axis)
    if op == "tril" and rank > 1:
        return s.emit(op, [x], same(x), k=s.pick.integer(-1, 1))
    if op == "diagonal" and rank > 1:
        return s.emit(op, [x], same(x))
    return False


@drawn(4)
def draw_concatenate(s: Scope) -> Any:
    x = s.any(ANY, ranks=(1, 2, 3))
    shape = x.type.shape
    if math.prod(shape) > LARGEST // 3:
        return False
    if s.pick.chance(0.3):
        others = [s.want(shape, x.type.dtype) for _ in range(s.pick.integer(0, 2))]
        op, axis = "stack", s.pick.integer(0, len(shape))
    else:
        op, axis = "concatenate", s.pick.integer(0, len(shape) - 1)
        sizes = [s.pick.one((shape[axis], *s.dims)) for _ in range(s.pick.integer(1, 2))]
        others = [s.want((*shape[:axis], n, *shape[axis + 1 :]), x.type.dtype) for n in sizes]
    parts = s.pick.shuffled([x, *others])
    grains = [v.type.grain for v in parts]
    grain = None if None in grains else max(g or 0 for g in grains)
    if sum(math.prod(v.type.shape) for v in parts) > LARGEST:
        return False
    return s.emit(op, parts, (max(v.type.bound for v in parts), grain), axis=axis)


@runs("dynamic_slice")
def _dynamic_slice(x: Any, *starts: Any, sizes: tuple[int, ...]) -> Any:
    return lax.dynamic_slice(x, [*starts, *[0] * (x.ndim - len(starts))], sizes)


@runs("dynamic_update_slice")
def _dynamic_update_slice(x: Any, update: Any, *starts: Any) -> Any:
    return lax.dynamic_update_slice(x, update, [*starts, *[0] * (x.ndim - len(starts))])


RUN["dynamic_index"] = lambda x, i, axis, keep: lax.dynamic_index_in_dim(x, i, axis, keep)


@drawn(5)
def draw_dynamic(s: Scope) -> Any:
    x = s.any(ANY, ranks=(1, 2, 3))
    shape = x.type.shape
    if s.pick.chance(0.3):
        axis = s.pick.integer(0, len(shape) - 1)
        return s.emit("dynamic_index", [x, s.scalar()], same(x), axis=axis, keep=s.pick.chance(0.5))
    starts = [s.scalar() for _ in range(s.pick.integer(1, len(shape)))]
    sizes = tuple(s.pick.integer(1, n) if s.pick.chance(0.5) else n for n in shape)
    if s.pick.chance(0.5):
        return s.emit("dynamic_slice", [x, *starts], same(x), sizes=sizes)
    update = s.want(sizes, x.type.dtype)
    grain = None if x.type.grain is None or update.type.grain is None else max(x.type.grain, update.type.grain)
    return s.emit("dynamic_update_slice", [x, update, *starts], (max(x.type.bound, update.type.bound), grain))


# look-ups

@runs("take")
def _take(x: Any, i: Any, axis: int, mode: str) -> Any:
    if mode == "in_bounds":
        return x.at[(slice(None),) * axis + (jnp.mod(i, const(i, x.shape[axis])),)].get(mode="promise_in_bounds")
    return jnp.take(x, i, axis, mode=mode, **({"fill_value": 0} if mode == "fill" else {}))


RUN["take_along"] = lambda x, i, axis: jnp.take_along_axis(x, jnp.mod(i, const(i, x.shape[axis])), axis)
RUN["pairs"] = lambda x, i, j: x[..., jnp.mod(i, const(i, x.shape[-2])), jnp.mod(j, const(j, x.shape[-1]))]


@runs("at")
def _at(x: Any, i: Any, u: Any, how: str, lead: int) -> Any:
    """Rows at i combined with u, after `lead` dimensions that are kept."""
    rows = x.at[(slice(None),) * lead + (jnp.mod(i, const(i, x.shape[lead])),)]
    return {"add": rows.add, "max": rows.max, "min": rows.min}[how](u)


@runs("set")
def _set(x: Any, start: Any, u: Any, lead: int, step: int, drop: bool) -> Any:
    """Rows set to u; no row twice, as the order would be anybody's."""
    rows = jnp.mod(start, const(start, x.shape[lead])) + jnp.arange(u.shape[lead], dtype=start.dtype) * const(start, step)
    rows = rows if drop else jnp.mod(rows, const(start, x.shape[lead]))
    return x.at[(slice(None),) * lead + (rows,)].set(u, mode="drop" if drop else None, unique_indices=not drop)


@drawn(8)
def draw_look_up(s: Scope) -> Any:
    x = s.any(ANY, ranks=(1, 2, 3))
    shape = x.type.shape
    axis = s.pick.integer(0, len(shape) - 1)
    op = s.pick.one(("take", "take", "take_along", "pairs", "at", "at", "set"))
    if op == "take":
        i = s.any(("int32",), ranks=(1, 0, 2))
        if math.prod(shape) * math.prod(i.type.shape) > LARGEST:
            return False
        mode = s.pick.one(("in_bounds", "wrap", "clip", "fill"))
        return s.emit(op, [x, i], same(x), axis=axis, mode=mode)
    if op == "take_along":
        n = s.pick.one((shape[axis], s.pick.one(s.dims)))
        i = s.want((*shape[:axis], n, *shape[axis + 1 :]), "int32")
        return s.emit(op, [x, i], same(x), axis=axis)
    if op == "pairs" and len(shape) > 1:
        i = s.any(("int32",), ranks=(1, 2))
        if math.prod(shape[:-2]) * math.prod(i.type.shape) > LARGEST:
            return False
        return s.emit(op, [x, i, s.want(i.type.shape, "int32")], same(x))
    if op == "at" and x.type.dtype != "bool":
        how = s.pick.one(("add", "add", "max", "min"))
        i = s.any(("int32",), ranks=(1, 2))
        wide = (*shape[:axis], *i.type.shape, *shape[axis + 1 :])
        if math.prod(wide) > LARGEST or (how != "add" and s.smooth):
            return False
        u = s.want(wide, x.type.dtype)
        grain = None if x.type.grain is None or u.type.grain is None else max(x.type.grain, u.type.grain)
        times = math.prod(i.type.shape) if how == "add" else 1
        return s.emit(op, [x, i, u], (x.type.bound + times * u.type.bound, grain), how=how, lead=axis)
    if op == "set":
        n = s.pick.integer(1, shape[axis])
        u = s.want((*shape[:axis], n, *shape[axis + 1 :]), x.type.dtype)
        grain = None if x.type.grain is None or u.type.grain is None else max(x.type.grain, u.type.grain)
        drop = s.pick.chance(0.3)
        step = s.pick.one((1, 2, 3)) if drop else 1
        numbers = (max(x.type.bound, u.type.bound), grain)
        return s.emit(op, [x, s.scalar(), u], numbers, lead=axis, step=step, drop=drop)
    return False


# contractions

RUN["einsum"] = lambda x, y, spec: jnp.einsum(spec, x, y)


@runs("dot_general")
def _dot_general(x: Any, y: Any, contract: Any, batch: Any, wide: str | None) -> Any:
    return lax.dot_general(x, y, (contract, batch), preferred_element_type=wide and jnp.dtype(wide))


@drawn(10)
def draw_einsum(s: Scope) -> Any:
    x = s.any(FLOATS if s.pick.chance(0.9) else ("int32", "int8"), ranks=(2, 3, 1, 4))
    names = "abcdefgh"[: len(x.type.shape)]
    size = dict(zip(names, x.type.shape, strict=True))
    einsum = s.pick.chance(0.5)
    roles = {n: s.pick.one(("free", "free", "free", "sum", "sum", "batch", "lone" if einsum else "free")) for n in names}
    of = {role: [n for n in names if roles[n] == role] for role in ("free", "sum", "batch", "lone")}
    mine = list("uvw"[: s.pick.integer(0, 2)])
    size.update({n: s.pick.one(s.dims) for n in mine})
    order = s.pick.shuffled(of["sum"] + of["batch"] + mine)
    out = s.pick.shuffled(of["batch"] + of["free"] + mine)
    if math.prod(size[n] for n in out) > LARGEST or math.prod(size[n] for n in order) > LARGEST or math.prod(size.values()) > 2**16:
        return False
    y = s.want([size[n] for n in order], x.type.dtype)
    terms = math.prod(size[n] for n in of["sum"] + of["lone"])
    a, b = x.type, y.type
    numbers = (a.bound * b.bound * terms, None if a.grain is None or b.grain is None else a.grain + b.grain)
    if einsum:
        return s.emit("einsum", [x, y], numbers, spec=f"{names},{''.join(order)}->{''.join(out)}")
    sums, batch = s.pick.shuffled(of["sum"]), s.pick.shuffled(of["batch"])
    dims = [tuple((tuple(map(names.index, group)), tuple(map(order.index, group)))) for group in (sums, batch)]
    wide = {"bfloat16": "float32", "int8": "int32"}.get(a.dtype) if s.pick.chance(0.5) else None
    return s.emit("dot_general", [x, y], numbers, contract=dims[0], batch=dims[1], wide=wide)


@runs("conv")
def _conv(x: Any, kernel: Any, **how: Any) -> Any:
    how = {**how, "padding": how["padding"] if isinstance(how["padding"], str) else list(how["padding"])}
    return lax.conv_general_dilated(x, kernel, **how)


CONVOLUTIONS = {
    3: (("NCH", "OIH", "NCH"), ("NHC", "HIO", "NHC"), ("NHC", "OIH", "CNH")),
    4: (("NCHW", "OIHW", "NCHW"), ("NHWC", "HWIO", "NHWC"), ("NHWC", "HWIO", "NCHW")),
}


@drawn(4)
def draw_conv(s: Scope) -> Any:
    x = s.any(FLOATS, ranks=(3, 4))
    rank = len(x.type.shape)
    numbers = s.pick.one(CONVOLUTIONS[rank])
    sizes = dict(zip(numbers[0], x.type.shape, strict=True))
    space = [sizes[c] for c in "HW"[: rank - 2]]
    window = [s.pick.integer(1, 3) for _ in space]
    groups = s.pick.one([g for g in (1, 1, 2, sizes["C"]) if sizes["C"] % g == 0])
    features = groups * s.pick.one((1, 2, 4, 8))
    strides = tuple(s.pick.one((1, 1, 2)) for _ in space)
    spread = tuple(s.pick.one((1, 1, 1, 2)) for _ in space)
    widen = tuple(s.pick.one((1, 1, 1, 2)) for _ in space)
    padding: Any = "SAME"
    if s.pick.chance(0.5):
        padding = tuple((s.pick.integer(0, 2), s.pick.integer(0, 2)) for _ in space)
    if any(widen[i] > 1 for i in range(len(space))) and padding == "SAME":
        padding = tuple((1, 1) for _ in space)
    if padding != "SAME":
        for i, n in enumerate(space):
            if (n - 1) * widen[i] + 1 + sum(padding[i]) < (window[i] - 1) * spread[i] + 1:
                return False
    shape = {"O": features, "I": sizes["C"] // groups, **dict(zip("HW", window))}
    kernel = s.want([shape[c] for c in numbers[1]], x.type.dtype)
    terms = math.prod(window) * shape["I"]
    if math.prod(x.type.shape) * features > 2**15:
        return False
    return s.emit(
        "conv", [x, kernel], (x.type.bound * kernel.type.bound * terms, None), window_strides=strides, padding=padding,
        lhs_dilation=widen, rhs_dilation=spread, dimension_numbers=numbers, feature_group_count=groups,
    )  # fmt: skip


@runs("pool")
def _pool(x: Any, how: str, window: Any, strides: Any, padding: Any) -> Any:
    start, combine = {"max": (-jnp.inf, lax.max), "min": (jnp.inf, lax.min), "sum": (0, lax.add)}[how]
    if jnp.issubdtype(x.dtype, jnp.integer) and how != "sum":
        start = getattr(jnp.iinfo(x.dtype), {"max": "min", "min": "max"}[how])
    return lax.reduce_window(x, np.asarray(start, x.dtype), combine, window, strides, padding if isinstance(padding, str) else list(padding))


@drawn(3)
def draw_pool(s: Scope) -> Any:
    how = s.pick.one(("max", "sum", "min"))
    x = s.any(FLOATS if s.pick.chance(0.85) else ("int32",), ranks=(2, 3, 4), exact=how != "sum" and s.smooth)
    shape = x.type.shape
    window = tuple(s.pick.integer(1, min(3, n)) if s.pick.chance(0.6) else 1 for n in shape)
    strides = tuple(s.pick.integer(1, 2) for _ in shape)
    padding: Any = s.pick.one(("SAME", "VALID"))
    if s.smooth and how == "min" or (s.smooth and how == "max" and x.type.dtype != "float32"):
        return False
    bound = x.type.bound * (math.prod(window) if how == "sum" else 1)
    return s.emit("pool", [x], (bound, x.type.grain), how=how, window=window, strides=strides, padding=padding)


# reductions

REDUCTIONS: dict[str, Callable[..., Any]] = {
    "sum": jnp.sum, "mean": jnp.mean, "max": jnp.max, "min": jnp.min, "prod": jnp.prod, "var": jnp.var,
    "logsumexp": jax.nn.logsumexp, "any": jnp.any, "all": jnp.all, "ptp": lambda x, **k: jnp.max(x, **k) - jnp.min(x, **k),
}  # fmt: skip


@runs("reduce")
def _reduce(x: Any, how: str, axes: tuple[int, ...], keep: bool) -> Any:
    return REDUCTIONS[how](x, axis=axes, keepdims=keep)


RUN["sum"] = lambda x, axes: jnp.sum(x, axes, dtype=x.dtype)
RUN["argmax"] = lambda x, how, axis, keep: {"max": jnp.argmax, "min": jnp.argmin}[how](x, axis, keepdims=keep)


@drawn(8)
def draw_reduce(s: Scope) -> Any:
    how = s.pick.one(("sum", "sum", "mean", "max", "min", "prod", "var", "logsumexp", "any", "all", "argmax", "argmax", "ptp"))
    kink = s.smooth and how in ("max", "min", "ptp")
    if how in ("any", "all"):
        x = s.any(("bool",), ranks=(1, 2, 3))
    else:
        x = s.any((*FLOATS, *(("int32",) if how in ("sum", "max", "argmax") else ())), (1, 2, 3, 4), how == "argmax" or kink)
    axes = tuple(s.pick.some(range(len(x.type.shape))))
    if how == "argmax":
        which = s.pick.one(("max", "min"))
        axis = axes[0] if s.pick.chance(0.8) else None
        return s.emit(how, [x], (2.0, 0), how=which, axis=axis, keep=s.pick.chance(0.3))
    terms = math.prod(x.type.shape[d] for d in axes)
    bound, grain = same(x)
    if how == "sum":
        bound *= terms
    elif how == "mean":
        grain = None if grain is None or terms & (terms - 1) else grain + terms.bit_length() - 1
    elif how == "prod":
        if bound**terms > 64:
            return False
        bound, grain = max(1.0, bound**terms), None
    elif how in ("var", "logsumexp"):
        bound, grain = (bound**2 * 4 if how == "var" else bound + math.log(terms)), None
    elif how == "ptp":
        bound *= 2
    return s.emit("reduce", [x], (bound, grain), how=how, axes=axes, keep=s.pick.chance(0.3))


CUMULATIVE = {"sum": lax.cumsum, "max": lax.cummax, "min": lax.cummin, "prod": lax.cumprod, "logsumexp": lax.cumlogsumexp}
RUN["cumulative"] = lambda x, how, axis, reverse: CUMULATIVE[how](x, axis, reverse)
COMBINED = {"add": jnp.add, "max": jnp.maximum, "min": jnp.minimum}
RUN["associative_scan"] = lambda x, how, axis, reverse: lax.associative_scan(COMBINED[how], x, axis=axis, reverse=reverse)


@drawn(4)
def draw_cumulative(s: Scope) -> Any:
    how = s.pick.one(list(CUMULATIVE))
    kink = s.smooth and how in ("max", "min")
    x = s.any((*FLOATS, *(("int32",) if how == "sum" else ())), ranks=(1, 2, 3), exact=kink)
    axis, reverse = s.pick.integer(0, len(x.type.shape) - 1), s.pick.chance(0.3)
    n = x.type.shape[axis]
    bound, grain = same(x)
    if how == "prod":
        x = s.emit("scale", [x], (bound / 2, grain and grain + 1), factor=0.5)[0] if x.type.dtype in FLOATS else x
        bound, grain = max(1.0, x.type.bound), None
        if x.type.bound > 1:
            return None
    elif how == "sum":
        bound *= n
    elif how == "logsumexp":
        bound, grain = bound + math.log(n), None
    if how in ("sum", "max", "min") and s.pick.chance(0.3):
        combine = {"sum": "add"}.get(how, how)
        return s.emit("associative_scan", [x], (bound, grain), how=combine, axis=axis, reverse=reverse)
    return s.emit("cumulative", [x], (bound, grain), how=how, axis=axis, reverse=reverse)


RUN["softmax"] = lambda x, axis: jax.nn.softmax(x, axis)
RUN["log_softmax"] = lambda x, axis: jax.nn.log_softmax(x, axis)


@runs("norm")
def _norm(x: Any, axis: int) -> Any:
    centred = x - jnp.mean(x, axis, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(jnp.square(centred), axis, keepdims=True) + const(x, 1))


@drawn(4)
def draw_softmax(s: Scope) -> Any:
    x = s.any(FLOATS, ranks=(1, 2, 3, 4))
    op = s.pick.one(("softmax", "softmax", "log_softmax", "norm"))
    axis = s.pick.integer(0, len(x.type.shape) - 1)
    n = x.type.shape[axis]
    bound = {"softmax": 1.0, "log_softmax": 2 * x.type.bound + math.log(n), "norm": 2 * x.type.bound}[op]
    return s.emit(op, [x], (bound, None), axis=axis)


@runs("attention")
def _attention(q: Any, k: Any, v: Any, causal: bool) -> Any:
    scores = jnp.einsum("bqd,bkd->bqk", q, k) * const(q, 0.25)
    if causal:
        mask = lax.broadcasted_iota(jnp.int32, scores.shape, 1) >= lax.broadcasted_iota(jnp.int32, scores.shape, 2)
        scores = jnp.where(mask, scores, const(q, -1e9))
    return jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores, -1), v)


@drawn(2)
def draw_attention(s: Scope) -> Any:
    q = s.any(("float32",), ranks=(3,))
    b, _, d = q.type.shape
    k = s.pick.one(s.dims)
    keys, values = s.want((b, k, d), "float32"), s.want((b, k, d), "float32")
    return s.emit("attention", [q, keys, values], (values.type.bound, None), causal=s.pick.chance(0.5))


# order

RUN["sort"] = lambda x, axis, down: jnp.sort(x, axis, descending=down)
RUN["sort_by"] = lambda key, *others, axis: lax.sort((key, *others), dimension=axis, num_keys=1, is_stable=True)
RUN["argsort"] = lambda x, axis, down: jnp.argsort(x, axis, descending=down)
RUN["top_k"] = lambda x, k: tuple(lax.top_k(x, k))
RUN["searchsorted"] = lambda x, v: jnp.searchsorted(jnp.sort(x), v)
RUN["bincount"] = lambda x, size: jnp.bincount(jnp.mod(x.reshape(-1), const(x, size)), length=size)


@drawn(4)
def draw_order(s: Scope) -> Any:
    op = s.pick.one(("sort", "sort_by", "argsort", "top_k", "searchsorted", "bincount"))
    exact = op not in ("sort", "bincount") or s.smooth
    if op == "bincount":
        return s.emit(op, [s.any(("int32",), ranks=(1, 2))], (2.0, 0), size=s.pick.one(s.dims))
    x = s.any((*FLOATS, "int32"), ranks=(1,) if op == "searchsorted" else (1, 2, 3), exact=exact)
    axis = s.pick.integer(0, len(x.type.shape) - 1)
    if op == "sort":
        return s.emit(op, [x], same(x), axis=axis, down=s.pick.chance(0.3))
    if op == "argsort":
        return s.emit(op, [x], (2.0, 0), axis=axis, down=s.pick.chance(0.3))
    if op == "sort_by":
        other = s.want(x.type.shape, s.pick.one(("float32", "int32")))
        return s.emit(op, [x, other], [same(x), same(other)], axis=axis)
    if op == "top_k":
        return s.emit(op, [x], [same(x), (2.0, 0)], k=s.pick.integer(1, x.type.shape[-1]))
    v = s.want(s.shape(s.pick.integer(0, 2)), x.type.dtype, new_type((), x.type.dtype))
    return s.emit(op, [x, v], (2.0, 0))


@runs("random")
def _random(seed: Any, how: str, shape: tuple[int, ...]) -> Any:
    key = jax.random.key(seed)
    if how == "bits":
        return jax.random.bits(key, shape)
    if how == "randint":
        return jax.random.randint(key, shape, 0, 8)
    if how == "bernoulli":
        return jax.random.bernoulli(key, 0.5, shape)
    if how == "split":
        return jax.random.uniform(jax.random.split(key)[1], shape)
    return jax.random.uniform(key, shape) if how == "uniform" else jnp.tanh(jax.random.normal(key, shape))


@drawn(2)
def draw_random(s: Scope) -> Any:
    how = s.pick.one(("uniform", "normal", "bits", "randint", "bernoulli", "split"))
    grain = 23 if how in ("uniform", "split") else None
    return s.emit("random", [s.scalar()], (1.0, grain), how=how, shape=s.shape() or (s.dims[0],))


# sub-programs


def body_outputs(body: Scope, most: int = 2) -> list[Var]:
    """Some of what a body has made, its last value among them."""
    made = [v for step in body.steps for v in step.results]
    return [made[-1], *(body.pick.one(body.vars) for _ in range(body.pick.integer(0, most - 1)))]


def loop_type(type: Type) -> Type:
    """What a carry of a type may become."""
    return replace(type, bound=2.0, grain=None if type.dtype in FLOATS else 0, coarse=type.coarse or type.dtype == "bfloat16")


def roughness(body: Scope) -> bool:
    """Whether anything in a body is rounded to bfloat16."""
    return any(v.type.coarse for v in body.vars)


def next_carries(body: Scope, carries: Sequence[Var]) -> list[Var]:
    """What a body hands on: each carry moved by something of its shape, or (rarely) as it is."""
    return [
        v if body.pick.chance(0.15) else advance(body, v, body.want(v.type.shape, v.type.dtype)) for v in carries
    ]


def tame_values(s: Scope, count: int, ranks: Sequence[int] = (0, 1, 2, 3)) -> list[Var]:
    """Values that may start a loop."""
    found = []
    for _ in range(count):
        v = s.any((*FLOATS, "float32", "int32") if s.pick.chance(0.8) else ("int32",), ranks)
        found.append(v if v.type.bound <= 2 else s.want(v.type.shape, v.type.dtype, loop_type(v.type)))
    return found


@runs("scan")
def _scan(bodies: Any, *operands: Any, consts: int, carries: int, length: int, reverse: bool, unroll: int, remat: bool) -> Any:
    (body,) = bodies
    fixed, initial, xs = operands[:consts], operands[consts : consts + carries], operands[consts + carries :]

    def step(carry: Any, x: Any) -> Any:
        outs = body(*carry, *x, *fixed)
        return outs[:carries], outs[carries:]

    state, ys = lax.scan(
        jax.checkpoint(step) if remat else step, tuple(initial), tuple(xs), length=length, reverse=reverse, unroll=unroll
    )
    return (*state, *ys)


@drawn(5)
def draw_scan(s: Scope) -> Any:
    if s.depth > 1:
        return False
    carries = tame_values(s, s.pick.integer(0, 2))
    xs = []
    if s.pick.chance(0.8):
        xs.append(s.any(ANY, ranks=(1, 2, 3)))
    length = xs[0].type.shape[0] if xs else s.pick.integer(1, 4)
    if xs and s.pick.chance(0.3):
        xs.append(s.want((length, *s.shape(s.pick.integer(0, 2))), "float32"))
    given = [*(loop_type(v.type) for v in carries), *(replace(v.type, shape=v.type.shape[1:]) for v in xs)]
    body = s.inner(given)
    state = next_carries(body, body.inputs[: len(carries)])
    ys = body_outputs(body, 2) if s.pick.chance(0.8) or not carries else []
    if any(length * math.prod(y.type.shape) > LARGEST for y in ys):
        return False
    fixed = s.extras(body, len(given))
    numbers = [same(v) for v in state] + [same(v) for v in ys]
    return s.emit(
        "scan", [*fixed, *carries, *xs], numbers, [body.program([*state, *ys])], roughness(body), consts=len(fixed),
        carries=len(carries), length=length, reverse=s.pick.chance(0.3), unroll=s.pick.one((1, 1, 1, 2)), remat=s.pick.chance(0.15),
    )  # fmt: skip


@runs("loop")
def _loop(bodies: Any, *operands: Any, carries: int, trips: int | None, how: str) -> Any:
    (body,) = bodies
    if trips is None:
        rounds, operands = jnp.mod(operands[0], const(operands[0], 4)), operands[1:]
    else:
        rounds = jnp.int32(trips)
    state, fixed = operands[:carries], operands[carries:]
    if how == "fori":
        upper = rounds if trips is None else trips
        return lax.fori_loop(0, upper, lambda i, carry: body(*carry, jnp.asarray(i, jnp.int32), *fixed), tuple(state))
    done = lax.while_loop(
        lambda carry: carry[0] < rounds, lambda carry: (carry[0] + jnp.int32(1), *body(*carry[1:], carry[0], *fixed)), (jnp.int32(0), *state)
    )
    return done[1:]


@drawn(4)
def draw_loop(s: Scope) -> Any:
    if s.depth > 1:
        return False
    carries = tame_values(s, s.pick.integer(1, 2))
    given = [*(loop_type(v.type) for v in carries), new_type((), "int32")]
    body = s.inner(given)
    state = next_carries(body, body.inputs[: len(carries)])
    fixed = s.extras(body, len(given))
    dynamic = not s.smooth and s.pick.chance(0.4)
    reads = [*([s.scalar()] if dynamic else []), *carries, *fixed]
    how = "fori" if s.smooth else s.pick.one(("fori", "while"))
    return s.emit(
        "loop", reads, [same(v) for v in state], [body.program(state)], roughness(body), carries=len(carries),
        trips=None if dynamic else s.pick.integer(0, 3), how=how,
    )  # fmt: skip


@runs("branch")
def _branch(bodies: Any, index: Any, *operands: Any, shared: int, splits: tuple[int, ...], how: str) -> Any:
    """`splits`: how many operands of its own each branch reads, after the shared ones."""
    starts = np.cumsum((shared, *splits))

    def branch(number: int) -> Callable[..., Any]:
        return lambda *values: bodies[number](*values[:shared], *values[starts[number] : starts[number + 1]])

    branches = [branch(number) for number in range(len(bodies))]
    if how == "cond":
        return lax.cond(jnp.mod(index, const(index, 2)) == const(index, 0), *branches, *operands)
    return lax.switch(index, branches, *operands)


@drawn(4)
def draw_branch(s: Scope) -> Any:
    if s.depth > 1:
        return False
    given = [s.any(ANY) for _ in range(s.pick.integer(1, 2))]
    types = [v.type for v in given]
    how = s.pick.one(("cond", "switch"))
    made, extras, splits = [], [], []
    for _ in range(2 if how == "cond" else s.pick.integer(1, 3)):
        body = s.inner(types, 3)
        outputs = []
        for type in types[: s.pick.one((1, 1)) if len(types) == 1 else len(types)]:
            fits = [v for v in body.vars if v.type.shape == type.shape and v.type.dtype == type.dtype]
            outputs.append(fits[-1] if s.pick.chance(0.7) else s.pick.one(fits))
        more = s.extras(body, len(given))
        made.append((body, outputs))
        extras += more
        splits.append(len(more))
    columns = list(zip(*(outputs for _, outputs in made), strict=True))
    numbers = [
        (max(v.type.bound for v in column), None if any(v.type.grain is None for v in column) else max(v.type.grain or 0 for v in column))
        for column in columns
    ]
    rough = any(roughness(body) for body, _ in made)
    bodies = [body.program(outputs) for body, outputs in made]
    return s.emit(
        "branch", [s.scalar(), *given, *extras], numbers, bodies, rough, shared=len(given), splits=tuple(splits), how=how
    )


@runs("call")
def _call(bodies: Any, *operands: Any, how: str) -> Any:
    (body,) = bodies
    policy = jax.checkpoint_policies
    wrapped = {
        "jit": lambda: jax.jit(body.__call__), "checkpoint": lambda: jax.checkpoint(body.__call__),
        "dots": lambda: jax.checkpoint(body.__call__, policy=policy.dots_saveable),
        "nothing": lambda: jax.checkpoint(body.__call__, policy=policy.nothing_saveable),
        "named": lambda: jax.named_call(body.__call__, name="named"),
    }  # fmt: skip
    return wrapped[how]()(*operands)


@drawn(2)
def draw_call(s: Scope) -> Any:
    if s.depth > 1:
        return False
    given = [s.any(ANY) for _ in range(s.pick.integer(1, 2))]
    body = s.inner([v.type for v in given])
    outputs = body_outputs(body)
    how = s.pick.one(("jit", "checkpoint", "dots", "nothing", "named"))
    return s.emit("call", [*given, *s.extras(body, len(given))], [same(v) for v in outputs], [body.program(outputs)], roughness(body), how=how)


@runs("vmap")
def _vmap(bodies: Any, *operands: Any, ins: tuple[int | None, ...], outs: tuple[int, ...], how: str) -> Any:
    (body,) = bodies
    if how == "map":
        mapped, fixed = [x for x, axis in zip(operands, ins) if axis is not None], [x for x, axis in zip(operands, ins) if axis is None]
        return lax.map(lambda xs: body(*xs, *fixed), tuple(mapped))
    return jax.vmap(body.__call__, in_axes=ins, out_axes=outs)(*operands)


@drawn(4)
def draw_vmap(s: Scope) -> Any:
    if s.depth > 1:
        return False
    how = s.pick.one(("vmap", "vmap", "vmap", "map"))
    x = s.any(ANY, ranks=(1, 2, 3))
    axis = 0 if how == "map" else s.pick.integer(0, len(x.type.shape) - 1)
    n = x.type.shape[axis]
    given, axes = [x], [axis]
    if s.pick.chance(0.4):
        given.append(s.want((n, *s.shape(s.pick.integer(0, 2))), "float32"))
        axes.append(0)
    types = [replace(v.type, shape=v.type.shape[:d] + v.type.shape[d + 1 :]) for v, d in zip(given, axes)]
    body = s.inner(types)
    outputs = body_outputs(body)
    if any(n * math.prod(v.type.shape) > LARGEST for v in outputs):
        return False
    more = s.extras(body, len(given))
    outs = tuple(0 if how == "map" else s.pick.integer(0, len(v.type.shape)) for v in outputs)
    return s.emit(
        "vmap", [*given, *more], [same(v) for v in outputs], [body.program(outputs)], roughness(body),
        ins=(*axes, *[None] * len(more)), outs=outs, how=how,
    )  # fmt: skip


@runs("grad")
def _grad(bodies: Any, *operands: Any, wrt: tuple[int, ...], how: str) -> Any:
    """Gradients of the mean square of what a body returns, squashed."""
    (body,) = bodies

    def loss(*args: Any) -> Any:
        outs = (jax.checkpoint(body.__call__) if how == "remat" else body)(*args)
        return sum((jnp.sum(jnp.square(out.astype(jnp.float32))) * jnp.float32(0.25) for out in outs), jnp.float32(0))

    if how == "jvp":
        out, tangent = jax.jvp(lambda *xs: loss(*xs, *operands[len(wrt) :]), operands[: len(wrt)], operands[: len(wrt)])
        return jnp.tanh(out), jnp.tanh(tangent)
    value, grads = jax.value_and_grad(loss, argnums=wrt)(*operands)
    return (jnp.tanh(value), *(jnp.tanh(g) for g in grads))


@drawn(6)
def draw_grad(s: Scope) -> Any:
    if s.depth > 1:
        return False
    given = [s.any(("float32", "float32", "bfloat16"), ranks=(1, 2, 3)) for _ in range(s.pick.integer(1, 3))]
    body = s.inner([v.type for v in given], 6, smooth=True)
    floats = [v for step in body.steps for v in step.results if v.type.dtype in FLOATS]
    if not floats:
        return False
    outputs = [floats[-1], *(s.pick.one(floats) for _ in range(s.pick.integer(0, 1)))]
    more = s.extras(body, len(given))
    how = s.pick.one(("plain", "plain", "remat", "jvp"))
    return s.emit(
        "grad", [*given, *more], (1.0, None), [body.program(outputs)], roughness(body), wrt=tuple(range(len(given))), how=how
    )


# --- making a failing program small ----------------------------------------------------------------------------------------


def smaller(program: Program) -> Iterator[Program]:
    """Programs with less in them: one output, a step's results as inputs instead, a body's step likewise (its operand kept)."""
    if len(program.outputs) > 1:
        yield from (used(replace(program, outputs=(number,))) for number in dict.fromkeys(program.outputs))
        yield from (used(replace(program, outputs=program.outputs[:i] + program.outputs[i + 1 :])) for i in range(len(program.outputs)))
    for i, step in enumerate(program.steps):
        rest = program.steps[:i] + program.steps[i + 1 :]
        yield used(replace(program, inputs=program.inputs + step.results, steps=rest))
        for number in step.reads:  # or an operand of the same type in its place
            types = program.types
            if len(step.results) == 1 and types[number].shape == types[step.results[0].number].shape:
                if types[number].dtype == types[step.results[0].number].dtype:
                    yield used(renamed(replace(program, steps=rest), step.results[0].number, number))
        for k, body in enumerate(step.bodies):
            for less in smaller_body(body):
                bodies = (*step.bodies[:k], less, *step.bodies[k + 1 :])
                yield replace(program, steps=(*program.steps[:i], replace(step, bodies=bodies), *program.steps[i + 1 :]))


def smaller_body(body: Program) -> Iterator[Program]:
    """The same arguments and result types, fewer steps: a step's result is an earlier value of its type."""
    types = body.types
    for i, step in enumerate(body.steps):
        earlier = [v for v in (*body.inputs, *(v for s in body.steps[:i] for v in s.results))]
        for result in step.results:
            match = [v for v in earlier if v.type.shape == types[result.number].shape and v.type.dtype == types[result.number].dtype]
            for v in match[:2]:
                yield used(renamed(body, result.number, v.number), inputs=False)


def renamed(program: Program, old: int, new: int) -> Program:
    """Reads of one value made reads of another."""
    swap = {old: new}
    steps = tuple(replace(s, reads=tuple(swap.get(n, n) for n in s.reads)) for s in program.steps)
    return replace(program, steps=steps, outputs=tuple(swap.get(n, n) for n in program.outputs))


def used(program: Program, inputs: bool = True) -> Program:
    """Without the steps (and inputs) that nothing reads."""
    wanted, steps = set(program.outputs), []
    for step in reversed(program.steps):
        if wanted & {v.number for v in step.results}:
            wanted.update(step.reads)
            steps.append(step)
    kept = tuple(v for v in program.inputs if v.number in wanted or not inputs)
    return replace(program, inputs=kept, steps=tuple(reversed(steps)))


def shrink(program: Program, fails: Callable[[Program], bool], tries: int = 200) -> Program:
    """The smallest failing program that greedy steps find."""
    while tries > 0:
        for less in smaller(program):
            tries -= 1
            if fails(less):
                program = less
                break
            if tries <= 0:
                break
        else:
            return program
    return program
