"""The noun every example is: a step function, the shapes it takes, and a way to make values of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Program", "define"]


@dataclass(frozen=True)
class Program:
    """One example program.

    Attributes:
      name: its key in `jaxplan.examples.programs`.
      fn: the step function, plain JAX; called as `fn(*args)`.
      args: the arguments' shapes, a tuple of pytrees of `jax.ShapeDtypeStruct`.
      make_args: from a seed to concrete arguments of exactly those shapes.
      donate: the positions of the arguments that go round, as state does in a training loop: such an
        argument and the corresponding result have one shape.
    """

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    make_args: Callable[[int], tuple[Any, ...]]
    donate: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not all(0 <= position < len(self.args) for position in self.donate):
            raise ValueError(f"{self.name}: donate={self.donate}, but there are {len(self.args)} arguments")


def define(
    name: str,
    fn: Callable[..., Any],
    make: Callable[[jax.Array], tuple[Any, ...]],
    donate: tuple[int, ...] = (),
) -> Program:
    """A `Program` from its step function and `make`, which turns a PRNG key into the arguments.

    The shapes are read off `make` without running it, so a program may be far larger than this machine.
    """

    def from_seed(seed: jax.Array) -> tuple[Any, ...]:
        # The generator that compiles fastest: with another, the values cost more than the step they feed.
        return make(jax.random.key(seed, impl="unsafe_rbg"))

    def make_args(seed: int) -> tuple[Any, ...]:
        return jax.jit(from_seed)(np.uint32(seed))

    args = jax.eval_shape(from_seed, jax.ShapeDtypeStruct((), jnp.uint32))
    return Program(name, fn, args, make_args, donate)
