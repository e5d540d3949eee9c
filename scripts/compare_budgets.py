"""What budgets cost, beside the integer program within the same limit: a Markdown table.

    python scripts/compare_budgets.py [--mesh 4x2] [--machine h100] [--only mlp ...] [--shares 0.95,0.8,0.65,0.5,0.4] [--exact 30]

The small training examples, and three programs that are no examples. A budget is a share of what the plan without one takes;
no pipelines are looked for. `plan`: the modelled step, as a multiple of that without a budget. `limited`: what one search finds
within the limit of the problem calibrated at the plan without a budget (`budget.py` makes several, and looks at true peaks, so
`plan` may be dearer or cheaper). `exact`: what HiGHS finds of that same problem in so many seconds, and its bound where it is not
proven; 0: not asked. Times are of the processor; `without` is tracing and planning without a budget.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

import jaxplan
from jaxplan.budget import Limit
from jaxplan.cost import model
from jaxplan.examples import programs
from jaxplan.search import alpa, nearest


def _shape(*extents: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(extents, jnp.float32)


def _descended(loss: Callable[[Any], jax.Array], parameters: Any) -> tuple[Any, jax.Array]:
    value, gradients = jax.value_and_grad(loss)(parameters)
    return jax.tree.map(lambda p, g: p - 0.1 * g, parameters, gradients), value


def recurrent(parameters: dict[str, jax.Array], inputs: jax.Array, wanted: jax.Array) -> tuple[Any, jax.Array]:
    """One step of a long short-term memory, 192 wide, over 24 steps of 96 rows."""

    def loss(p: dict[str, jax.Array]) -> jax.Array:
        def cell(carry: tuple[jax.Array, jax.Array], x: jax.Array) -> Any:
            hidden, state = carry
            i, f, o, u = jnp.split(x @ p["wx"] + hidden @ p["wh"] + p["b"][None], 4, -1)
            state = jax.nn.sigmoid(f) * state + jax.nn.sigmoid(i) * jnp.tanh(u)
            hidden = jax.nn.sigmoid(o) * jnp.tanh(state)
            return (hidden, state), hidden

        zeros = jnp.zeros((inputs.shape[1], p["wh"].shape[0]))
        _, hidden = jax.lax.scan(cell, (zeros, zeros), inputs)
        return jnp.mean((hidden @ p["out"] - wanted) ** 2)

    return _descended(loss, parameters)


def autoencoder(layers: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> tuple[Any, jax.Array]:
    """One step of a dense autoencoder with a narrow middle."""

    def loss(layers: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
        hidden = x
        for w, b in layers:
            hidden = jax.nn.gelu(hidden @ w + b[None])
        return jnp.mean((hidden - x) ** 2)

    return _descended(loss, layers)


def attention(parameters: dict[str, jax.Array], x: jax.Array) -> tuple[Any, jax.Array]:
    """One step of a single attention layer, six heads of 40."""

    def loss(p: dict[str, jax.Array]) -> jax.Array:
        q, k, v = [jnp.einsum("bsd,dhe->bhse", x, p[name]) for name in "qkv"]
        weights = jax.nn.softmax(jnp.einsum("bhse,bhte->bhst", q, k) / 6.0, -1)
        return jnp.mean((x + jnp.einsum("bhst,bhte,hed->bsd", weights, v, p["o"])) ** 2)

    return _descended(loss, parameters)


def chosen() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]]:
    """{name: (function, arguments, donated)}."""
    found = {name: (p.fn, p.args, p.donate) for name, p in programs("small").items()}
    cells = {"wx": _shape(96, 768), "wh": _shape(192, 768), "b": _shape(768), "out": _shape(192, 40)}
    widths = (768, 384, 96, 384, 768)
    layers = [(_shape(a, b), _shape(b)) for a, b in pairwise(widths)]
    heads = {**{name: _shape(240, 6, 40) for name in "qkv"}, "o": _shape(6, 40, 240)}
    found["recurrent"] = recurrent, (cells, _shape(24, 96, 96), _shape(24, 96, 40)), (0,)
    found["autoencoder"] = autoencoder, (layers, _shape(3072, 768)), (0,)
    found["attention"] = attention, (heads, _shape(24, 144, 240)), (0,)
    return found


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """(what it gives, or the ValueError it raises; seconds of the processor)."""
    start = time.process_time()
    try:
        found = function()
    except ValueError as error:
        found = error
    return found, time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", default="4x2")
    parser.add_argument("--machine", default="h100")
    parser.add_argument("--only", nargs="+", default=list(chosen()))
    parser.add_argument("--shares", default="0.95,0.8,0.65,0.5,0.4")
    parser.add_argument("--exact", type=float, default=0.0)
    options = parser.parse_args()
    sizes = tuple(int(size) for size in options.mesh.split("x"))
    mesh = jax.sharding.AbstractMesh(sizes, tuple("xyzw"[: len(sizes)]))
    print("| program | budget | plan | limited | exact | seconds: without | plan | limited | exact |")
    print("|---" * 9 + "|")
    ratios, dearer = [], []
    for name in options.only:
        fn, args, donate = chosen()[name]
        asked = {"mesh": mesh, "machine": options.machine, "memory_budget": math.inf, "pipeline": None}
        free, alone = timed(partial(jaxplan.make_plan, fn, *args, donate_argnums=donate or None, **asked))
        before, least = 0.0, 0.0
        for share in map(float, options.shares.split(",")):
            cells, found, took = row(free, share * free.peak_bytes, options.exact)
            print(f"| {name} | {share} | {' | '.join(cells[:3])} | {alone:.2f} | {' | '.join(cells[3:])} |", flush=True)
            ratios.append(took / alone)
            if found is not None and found < least * (1 - 1e-6):
                dearer.append(f"{name} at {before} by {least / found - 1:.2%}")
            if found is not None and found > least:
                before, least = share, found
    middle = sorted(ratios)[len(ratios) // 2]
    print(f"\nFitting a budget took {middle:.1f} times planning without one in the median, {max(ratios):.1f} at most.")
    print(f"Dearer than under a tighter budget: {', '.join(dearer) or 'none'}.")


def row(free: jaxplan.Plan, budget: float, exact_seconds: float) -> tuple[list[str], float | None, float]:
    """(costs by plan, limited search and integer program, then their seconds; the plan's cost or None; its seconds)."""
    modelled = model(free.modelled.whole, free.modelled.numbers, {}, follow=False)
    problem = Limit(budget, (free,)).problem(modelled, free.traced.donated, ())
    fitted, took = timed(partial(free.replan, memory_budget=budget))
    limited, searched = timed(partial(nearest, problem))
    exact, solved = None, 0.0
    if exact_seconds:
        exact, solved = timed(partial(alpa, problem, time_limit=exact_seconds, rounds=None))
    found = None if isinstance(fitted, ValueError) else fitted.seconds / free.seconds
    costs = ["nothing" if found is None else f"{found:.4f}", f"{limited.seconds / free.seconds:.4f}", ""]
    if exact is not None:
        costs[2] = "none" if isinstance(exact, ValueError) else f"{exact.seconds / free.seconds:.4f}"
        if not isinstance(exact, ValueError) and exact.bound < exact.seconds * (1 - 1e-4):
            costs[2] += f" ({exact.bound / free.seconds:.4f})"
    return [*costs, *[f"{seconds:.2f}" for seconds in (took, searched, solved)]], found, took


if __name__ == "__main__":
    main()
