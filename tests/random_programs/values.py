"""What a random program is: a value that runs, prints itself and can be made smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

FLOATS, INTS = ("float32", "bfloat16"), ("int32", "int8", "uint32")
ANY = (*FLOATS, *INTS, "bool")


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
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Var:
    """A value by number."""

    number: int
    type: Type

    def __repr__(self) -> str:
        return f"v{self.number}:{self.type}"


@dataclass(frozen=True)
class Step:
    """One operation: a function of what it reads (after `bodies`, if there are any), its keywords, sub-programs."""

    function: Callable[..., Any]
    reads: tuple[int, ...]
    results: tuple[Var, ...]
    how: tuple[tuple[str, Any], ...] = ()
    bodies: tuple[Program, ...] = ()

    def __call__(self, *operands: Any) -> tuple[Any, ...]:
        outs = self.function(*([self.bodies] if self.bodies else []), *operands, **dict(self.how))
        return tuple(outs) if isinstance(outs, (tuple, list)) else (outs,)

    def __repr__(self) -> str:
        words = [f"v{number}" for number in self.reads] + [f"{key}={value!r}" for key, value in self.how]
        line = f"{', '.join(map(repr, self.results))} = {self.function.__name__}({', '.join(words)})"
        return "\n".join([line, *("    " + line for body in self.bodies for line in repr(body).splitlines())])


@dataclass(frozen=True)
class Program:
    """Inputs, steps, and the numbers of the values returned; the first `states` of these are what becomes of as many inputs."""

    inputs: tuple[Var, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    states: int = 0

    def __repr__(self) -> str:
        lines = [f"program({', '.join(map(repr, self.inputs))}):"]
        lines += ["  " + line for step in self.steps for line in repr(step).splitlines()]
        return "\n".join([*lines, f"  return {', '.join(f'v{number}' for number in self.outputs)}"])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """As hypothesis prints it."""
        printer.text(repr(self))

    @property
    def output_types(self) -> tuple[Type, ...]:
        """Of the values returned."""
        types = {v.number: v.type for v in (*self.inputs, *(v for step in self.steps for v in step.results))}
        return tuple(types[number] for number in self.outputs)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        env = dict(zip([v.number for v in self.inputs], args, strict=True))
        for step in self.steps:
            results = step(*[env[number] for number in step.reads])
            env.update(zip([v.number for v in step.results], results, strict=True))
        return tuple(env[number] for number in self.outputs)


def build(program: Program) -> tuple[Callable[..., Any], tuple[tuple[np.ndarray, ...], dict[str, np.ndarray]]]:
    """A step `(state, inputs) -> (state, outputs)`, and arguments for it."""
    rng = np.random.default_rng(0)
    state, inputs = program.inputs[: program.states], program.inputs[program.states :]

    def random_step(state: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        outs = program(*state, *[inputs[f"v{v.number}"] for v in program.inputs[program.states :]])
        return outs[: program.states], outs[program.states :]

    return random_step, (tuple(_array(rng, v.type) for v in state), {f"v{v.number}": _array(rng, v.type) for v in inputs})


def _array(rng: np.random.Generator, type: Type) -> np.ndarray:
    if type.dtype == "bool":
        return rng.integers(0, 2, type.shape).astype(bool)
    if type.dtype in INTS:
        return rng.integers(0 if type.dtype == "uint32" else -8, 9, type.shape).astype(type.dtype)
    return (rng.integers(-16, 17, type.shape) / 8).astype(jnp.dtype(type.dtype))


# --- making a failing program small ------------------------------------------------------------------------------------------


def shrink(program: Program, fails: Callable[[Program], bool], tries: int = 100) -> Program:
    """A smaller program that fails too: the first step down that does is taken, until none does or `tries` are used up."""
    while tries > 0:
        for less in _smaller(program):
            tries -= 1
            if fails(less):
                program = less
                break
            if not tries:
                break
        else:
            break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    """One output; an output less; a step's results as inputs instead; in a loop's body, an earlier value instead."""
    if program.states:
        yield replace(program, states=0)
    free = range(program.states, len(program.outputs))
    if program.states + 1 < len(program.outputs):
        yield from (_used(replace(program, outputs=(*program.outputs[: program.states], program.outputs[i]))) for i in free)
        yield from (_used(replace(program, outputs=program.outputs[:i] + program.outputs[i + 1 :])) for i in free)
    for i, step in enumerate(program.steps):
        yield _used(replace(program, inputs=program.inputs + step.results, steps=program.steps[:i] + program.steps[i + 1 :]))
        for k, body in enumerate(step.bodies):
            for less in _smaller_body(body):
                shorter = replace(step, bodies=(*step.bodies[:k], less, *step.bodies[k + 1 :]))
                yield replace(program, steps=(*program.steps[:i], shorter, *program.steps[i + 1 :]))


def _smaller_body(body: Program) -> Iterator[Program]:
    """The same arguments and types of results."""
    earlier = list(body.inputs)
    for step in body.steps:
        for result in step.results:
            for v in [v for v in earlier if (v.type.shape, v.type.dtype) == (result.type.shape, result.type.dtype)][:2]:
                swap = {result.number: v.number}
                steps = tuple(replace(s, reads=tuple(swap.get(n, n) for n in s.reads)) for s in body.steps)
                outputs = tuple(swap.get(n, n) for n in body.outputs)
                yield replace(_used(replace(body, steps=steps, outputs=outputs)), inputs=body.inputs)
        earlier += step.results


def _used(program: Program) -> Program:
    """Without the steps and inputs that no output needs (its state stays)."""
    needed, steps = set(program.outputs), []
    for step in reversed(program.steps):
        if needed & {v.number for v in step.results}:
            steps.append(step)
            needed.update(step.reads)
    inputs = tuple(v for k, v in enumerate(program.inputs) if k < program.states or v.number in needed)
    return replace(program, inputs=inputs, steps=tuple(steps[::-1]))
