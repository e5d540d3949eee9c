"""The compiler as the oracle of every rule: each operator alone, under every choice, predicted beside compiled.

    python scripts/check_rules.py [--meshes 8,4x2] [--only NAME ...] [--page FILE] [--no-values]

For every sample operator and every legal choice of its cluster on simulated devices, its inputs are laid out as the choice
asks and its result is left where the choice leaves it; the program is compiled, and bytes sent per device and kind of collective
are read from the optimized HLO (`jaxplan.hlo`, normalised: the CPU compiler's all-reduce + slice is a reduce-scatter) and
compared with what the plan predicts. Values are compared with the unsharded operator's. Exit status 1 if anything differs that
`DIFFERENT` does not explain. `--page` writes the table as Markdown (`docs/oracle.md`).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from jaxplan.api import Plan, Request
from jaxplan.cost import Numbers, model
from jaxplan.cost.build import Modelled
from jaxplan.graph import build_graph
from jaxplan.hlo import audit
from jaxplan.machine import machine
from jaxplan.problem import all_rows
from jaxplan.trace import Traced, trace

Sample = tuple[Callable[..., Any], tuple[Any, ...]]


def data(*shape: int, dtype: Any = np.float32, below: int = 8, seed: int = 0) -> np.ndarray:
    """Reproducible values; integers are indices below `below`."""
    generator = np.random.default_rng([seed, *shape])
    if np.issubdtype(dtype, np.integer):
        return generator.integers(0, below, shape).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)


A, B = data(16, 32), data(16, 32, seed=1)
CUBE, IMAGE, WHERE = data(8, 16, 32), data(8, 16, 16, 8), data(16, dtype=np.int32, below=16)
LINE = data(8, 8, 64)

SAMPLES: dict[str, Sample] = {
    "add": (lambda x, y: x + y, (A, B)),
    "exp of product": (lambda x, y: jnp.exp(x) * y, (A, B)),
    "select": (lambda x, y: jnp.where(x > y, x, y), (A, B)),
    "convert": (lambda x: x.astype(jnp.float16), (A,)),
    "clamp": (lambda x: lax.clamp(-1.0, x, 1.0), (A,)),
    "broadcast": (lambda x: lax.broadcast_in_dim(x, (8, 16, 32), (1, 2)), (A,)),
    "transpose": (lambda x: x.transpose(2, 0, 1), (CUBE,)),
    "merge": (lambda x: x.reshape(128, 32), (CUBE,)),
    "split": (lambda x: x.reshape(16, 8, 4), (A,)),
    "squeeze": (lambda x: lax.squeeze(x, (1,)), (data(16, 1, 32),)),
    "reverse": (lambda x: lax.rev(x, (1,)), (A,)),
    "slice": (lambda x: lax.slice(x, (0, 8), (16, 24)), (A,)),
    "pad": (lambda x: lax.pad(x, 0.0, ((0, 0, 0), (8, 8, 0))), (A,)),
    "concatenate": (lambda x, y: jnp.concatenate((x, y), 1), (A, B)),
    "stack": (lambda x, y: jnp.stack((x, y), 1), (A, B)),
    "dynamic slice": (lambda x, i: lax.dynamic_slice(x, (i, 0), (8, 32)), (A, np.int32(3))),
    "dynamic update": (lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 0)), (A, data(8, 32), np.int32(3))),
    "sum": (lambda x: x.sum(1), (A,)),
    "sum of all": (lambda x: x.sum(), (A,)),
    "max": (lambda x: x.max(0), (A,)),
    "min": (lambda x: x.min(1), (A,)),
    "all": (lambda x: (x > 0).all(0), (A,)),
    "argmax": (lambda x: x.argmax(1), (A,)),
    "cumsum": (lambda x: jnp.cumsum(x, 1), (A,)),
    "cummax": (lambda x: lax.cummax(x, 0), (A,)),
    "sort": (lambda x: jnp.sort(x, 1), (A,)),
    "sort pairs": (lambda x, y: lax.sort((x, y), dimension=1), (A, B)),
    "top_k": (lambda x: lax.top_k(x, 8), (A,)),
    "matmul": (lambda x, y: x @ y, (A, data(32, 64))),
    "matmul, batched": (lambda x, y: jnp.einsum("bmk,bkn->bmn", x, y), (CUBE, data(8, 32, 16))),
    "matmul, two contracted": (lambda x, y: jnp.einsum("abk,abn->kn", x, y), (CUBE, data(8, 16, 64))),
    "outer": (lambda x, y: jnp.einsum("i,j->ij", x, y), (data(16), data(32))),
    "attention scores": (lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k), (data(8, 16, 8, 8), data(8, 16, 8, 8, seed=1))),
    "ragged": (lax.ragged_dot, (data(16, 8), data(8, 8, 16), np.full(8, 2, np.int32))),
    "conv 1x1": (
        lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        (IMAGE, data(1, 1, 8, 16)),
    ),
    "conv 3x3": (
        lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        (data(8, 32, 32, 8), data(3, 3, 8, 16)),
    ),
    "conv strided": (
        lambda x, w: lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        (data(8, 32, 32, 8), data(3, 3, 8, 16)),
    ),
    "conv patches": (
        lambda x, w: lax.conv_general_dilated(x, w, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        (data(8, 32, 32, 8), data(2, 2, 8, 16)),
    ),
    "conv depthwise": (
        lambda x, w: lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=16
        ),
        (data(8, 16, 16, 16), data(3, 3, 1, 16)),
    ),
    "conv 1-D": (lambda x, w: lax.conv_general_dilated(x, w, (1,), "SAME"), (LINE, data(16, 8, 3))),
    "conv, gradient of kernel": (
        lambda x, g: jax.linear_transpose(
            lambda w: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
            jax.ShapeDtypeStruct((3, 3, 8, 16), x.dtype),
        )(g)[0],
        (data(8, 32, 32, 8), data(8, 32, 32, 16)),
    ),
    "conv, gradient of image": (
        lambda w, g: jax.linear_transpose(
            lambda x: lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
            jax.ShapeDtypeStruct((8, 32, 32, 8), w.dtype),
        )(g)[0],
        (data(3, 3, 8, 16), data(8, 16, 16, 16)),
    ),
    "max pool": (
        lambda x: lax.reduce_window(x, -np.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"), (data(8, 32, 32, 8),),
    ),
    "take rows": (lambda x, i: x[i], (A, WHERE)),
    "take along": (lambda x, i: jnp.take_along_axis(x, i, 1), (A, data(16, 8, dtype=np.int32, below=32))),
    "add at": (lambda x, i, u: x.at[i].add(u), (A, WHERE, data(16, 32, seed=2))),
    "cholesky": (lambda x: jnp.linalg.cholesky(x, symmetrize_input=False), (np.eye(8, dtype=np.float32)[None].repeat(16, 0),)),
    "triangular solve": (
        lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True, lower=True),
        (np.eye(8, dtype=np.float32)[None].repeat(8, 0), data(8, 8, 16)),
    ),
    "tridiagonal solve": (
        lambda d, b: lax.linalg.tridiagonal_solve(0.1 * d, 2.0 + 0 * d, 0.1 * d, b),
        (np.ones((8, 8), np.float32), data(8, 8, 16)),
    ),
    "fft": (lambda x: jnp.fft.fft(x, axis=1), (A.astype(np.complex64),)),
    "softmax": (lambda x: jax.nn.softmax(x, 1), (A,)),
    "layer norm": (lambda x: (x - x.mean(1, keepdims=True)) * lax.rsqrt(x.var(1, keepdims=True) + 1e-6), (A,)),
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """One operator under one choice. Bytes sent per device, by kind of collective; `error`: largest difference of values."""

    name: str
    rule: str
    mesh: str
    choice: str
    predicted: dict[str, float]
    compiled: dict[str, float]
    error: float | None

    @property
    def agrees(self) -> bool:
        """Kinds and bytes are the same, to a byte of rounding per collective."""
        kinds = set(self.predicted) | set(self.compiled)
        return all(abs(self.predicted.get(k, 0.0) - self.compiled.get(k, 0.0)) <= 4.0 for k in kinds)


def mesh_of(text: str) -> Mesh:
    """"4x2" -> a mesh of the first eight devices."""
    shape = tuple(map(int, text.split("x")))
    return Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), tuple("xyz"[: len(shape)]))


def choices_of(modelled: Modelled) -> Iterator[tuple[int, np.ndarray]]:
    """(cluster, choices per cluster): every legal choice of every cluster that is no input, the inputs as it asks."""
    graph = modelled.graph
    working = [i for i, c in enumerate(graph.clusters) if graph.operators[c.members[-1]].equation is not None]
    for target in working:
        price = modelled.problem.nodes[modelled.kept.index(target)].price
        for row in all_rows([len(axis) for axis in modelled.options[target]]):
            if not np.isfinite(price(row[None])[0]):
                continue
            choices = np.zeros((len(graph.clusters), len(row)), dtype=np.int64)
            choices[target] = row
            settle(modelled, target, choices)
            yield target, choices


def settle(modelled: Modelled, target: int, choices: np.ndarray) -> None:
    """Everything but `target` takes the layout in which `target` reads, or leaves, what they share."""
    for reading in modelled.readings:
        if target not in (reading.reader, reading.writer):
            continue
        other = reading.writer if reading.reader == target else reading.reader
        mine, theirs = (reading.read, reading.write) if reading.reader == target else (reading.write, reading.read)
        for axis, option in enumerate(modelled.chosen(choices, target)):
            factor = option.scatter if option.scatter >= 0 and other == reading.reader else option.factor
            if factor < 0 or factor not in mine.leads or choices[other, axis]:
                continue
            wanted = theirs.leads[mine.leads.index(factor)]
            for number, offered in enumerate(modelled.options[other][axis]):
                if offered.factor == wanted and offered.scatter < 0 and wanted >= 0:
                    choices[other, axis] = number


def words(modelled: Modelled, target: int, choices: np.ndarray) -> str:
    """The choice as text: axis: factor, or axis: factor > the factor it is scattered over."""
    parts = []
    for axis, option in zip(modelled.numbers.axis_names, modelled.chosen(choices, target), strict=True):
        if option.factor >= 0:
            parts.append(f"{axis}:f{option.factor}" + (f">f{option.scatter}" if option.scatter >= 0 else ""))
    return " ".join(parts) or "whole"


def check(name: str, sample: Sample, text: str, values: bool) -> Iterator[Found]:
    """Every choice of one operator on one mesh."""
    fn, args = sample
    mesh = mesh_of(text)
    traced: Traced = trace(fn, args, {})
    graph = build_graph(traced)
    modelled = model(graph, Numbers(graph, dict(mesh.shape), machine("cpu")))
    want = jax.jit(fn)(*args) if values else None
    for target, choices in choices_of(modelled):
        plan = Plan(traced, modelled, choices, mesh, {}, None, {}, Request(mesh))
        predicted: dict[str, float] = {}
        for exchange in plan.exchanges:
            kind = {"permute": "collective-permute"}.get(exchange.kind, exchange.kind.replace("_", "-"))
            predicted[kind] = predicted.get(kind, 0.0) + exchange.total_bytes
        planned = plan.jit(())
        found = audit(planned, *args, mesh=mesh)
        error = difference(planned(*args), want) if values else None
        rule = str(graph.operators[graph.clusters[target].members[-1]].rule)
        compiled = {kind: value for kind, value in found.by_kind(normalised=True).items() if value}
        yield Found(name, rule, text, words(modelled, target, choices), predicted, compiled, error)


def difference(got: Any, want: Any) -> float:
    """Largest difference, relative to the largest value."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype != b.dtype or a.shape != b.shape:
            return math.inf
        a, b = (v.astype(np.complex128 if np.iscomplexobj(v) else np.float64) for v in (a, b))
        worst = max(worst, float(np.abs(a - b).max(initial=0.0)) / max(1.0, float(np.abs(b).max(initial=0.0))))
    return worst


DIFFERENT: dict[tuple[str, int], str] = {
    ("take along", 2): "where what is scattered lies along two axes, the mask of rows out of bounds is sent to its place as "
    "well: a byte for each",
}
"""{(operator, how many mesh axes): why the compiler does otherwise}."""


def explained(name: str, mesh: str) -> bool:
    """Whether an operator is known to compile otherwise on a mesh such as "4x2"."""
    return (name, mesh.count("x") + 1) in DIFFERENT


def shown(by_kind: dict[str, float]) -> str:
    """Kinds and bytes as text."""
    return ", ".join(f"{kind} {value:,.0f}" for kind, value in sorted(by_kind.items())) or "nothing"


def page(rows: Sequence[Found]) -> str:
    """The table as Markdown: per operator and mesh the rule, and per choice what was predicted and compiled."""
    differ = [row for row in rows if not row.agrees]
    lines = [
        "# The compiler as the oracle of the rules",
        "",
        f"Written by `python scripts/check_rules.py --page docs/oracle.md` with JAX {jax.__version__}. Bytes are those that one "
        f"device sends, by kind of collective. Of {len(rows)} choices of {len({row.name for row in rows})} operators "
        f"{len(rows) - len(differ)} compile to exactly what is predicted; the rest:",
        "",
    ]
    lines += [f"- {name}, {axes} mesh axes: {why}" for (name, axes), why in DIFFERENT.items()]
    lines += ["", "A choice reads `axis:factor`, or `axis:factor>factor` where a partial sum is scattered over the second."]
    for name, text in dict.fromkeys((row.name, row.mesh) for row in rows):
        mine = [row for row in rows if (row.name, row.mesh) == (name, text)]
        lines += ["", f"## {name}, mesh {text}", "", f"`{mine[0].rule}`", ""]
        lines += ["| choice | predicted | compiled |", "|---|---|---|"]
        for row in mine:
            same = "the same" if row.agrees else shown(row.compiled)
            lines.append(f"| {row.choice} | {shown(row.predicted)} | {same} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Check and print; 1 if anything differs without a reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", default="8,4x2")
    parser.add_argument("--only", nargs="*", default=list(SAMPLES), metavar="NAME")
    parser.add_argument("--page", default="", metavar="FILE")
    parser.add_argument("--no-values", action="store_true")
    options = parser.parse_args(argv)
    bad, everything = 0, []
    for name in options.only:
        for text in options.meshes.split(","):
            rows = list(check(name, SAMPLES[name], text, not options.no_values))
            everything += rows
            differ = [row for row in rows if not row.agrees]
            wrong = [row for row in rows if row.error is not None and not row.error < 1e-3]
            bad += len(wrong) + (0 if explained(name, text) else len(differ))
            print(f"{name:24s} {text:5s} {len(rows):4d} choices, {len(differ):3d} differ, {len(wrong)} wrong", flush=True)
            for row in (*wrong, *differ):
                error = "" if row.error is None else f"  error {row.error:.1e}"
                print(f"    {row.choice:24s} predicted {shown(row.predicted)}; compiled {shown(row.compiled)}{error}")
    if options.page:
        Path(options.page).write_text(page(everything))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
