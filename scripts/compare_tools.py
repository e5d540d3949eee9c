"""The same programs through jaxplan and through google-parallax: which each could plan, and what came of it.

    python scripts/compare_tools.py [--venv DIR] [--version 0.0.2] [--only NAME ...] [--small-only] [--limit 600] [--page FILE]

google-parallax (PyPI) is installed and run in an environment of its own: DIR, made if it is not there, or a temporary folder
that is removed afterwards. Every tool runs in that same environment, with the same JAX, in a process of its own per program,
under a time limit, on eight simulated CPU devices. google-parallax is used in the two ways that its README and tests show:

- `jit`: `parallax.jit(step)`, with its automatic strategy, on the whole function;
- `model`: `parallax.create_sharded_model` plans the forward pass of the model alone. The train step is then an ordinary
  `jax.jit` on parameters that lie as planned, optimizer state that lies like them, and a batch split over the data axis.

What it asks for, it gets: a mesh of two axes called data and model, parameters first, tuples where a program has lists (it
takes lists for its own), and a forward pass without `jax.checkpoint`. None of this changes what is computed.

Every program is planned, compiled and run at its small size, and values are compared with the unsharded function's. Programs
that google-parallax could plan are then planned and compiled, not run, at their full size, where there is enough work to make
splitting pay. `--page` writes the tables as Markdown (`docs/tools.md`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MESHES = ("4x2", "8x1", "1x8")
AXES = ("data", "model")
SAME = 1e-3  # largest difference of values, relative to the largest value, that rounding explains


@dataclass(frozen=True)
class Outcome:
    """What one tool made of one program on one mesh. `failed`: at which stage, "" for none; bytes and FLOPs are per device.

    `plan_seconds` is time of the processor, which other work on the machine disturbs less than the time that passes. `gap`: how
    far the plan may be, as modelled, from the best there is; only jaxplan can tell.
    """

    program: str
    size: str
    mesh: str
    tool: str
    failed: str = ""
    error: str = ""
    plan_seconds: float | None = None
    sent: float | None = None
    sent_as_compiled: float | None = None
    flops: float | None = None
    peak: float | None = None
    difference: float | None = None
    gap: float | None = None

    @property
    def right(self) -> bool:
        """Planned, compiled, and, where it was run, with the values of the unsharded function."""
        return not self.failed and (self.difference is None or self.difference <= SAME)


# --- inside the environment: one program through one tool ---


def tuples(tree: Any) -> Any:
    """The tree with tuples for its lists."""
    if isinstance(tree, dict):
        return {key: tuples(value) for key, value in tree.items()}
    return tuple([tuples(part) for part in tree]) if isinstance(tree, list | tuple) else tree


def without_lists(fn: Callable[..., Any], args: Sequence[Any]) -> Callable[..., Any]:
    """`fn`, to be given tuples where its arguments `args` have lists; gives tuples too."""
    import jax

    structure = jax.tree.structure(tuple(args))

    def same(*given: Any) -> Any:
        return tuples(fn(*jax.tree.unflatten(structure, jax.tree.leaves(given))))

    return same


def forward_pass(name: str, size: str) -> tuple[Callable[..., Any], Callable[[Sequence[Any]], tuple[Any, ...]]] | None:
    """`(forward(params, *inputs), inputs of the step's arguments)` of the programs that train a model."""
    import jax
    import jax.numpy as jnp

    from jaxplan.examples import decoder, mixture, resnet

    def perceptron(params: Any, x: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"][None, :])
        return x @ params[-1]["w"] + params[-1]["b"][None, :]

    config = getattr(decoder, size.upper())

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        def body(x: jax.Array, block: Any) -> tuple[jax.Array, None]:
            return decoder.apply_block(x, block, config, decoder.identity), None

        x = jnp.take(params["embedding"], tokens, axis=0) + params["positions"][None]
        if isinstance(params["blocks"], dict):
            x, _ = jax.lax.scan(body, x, params["blocks"])
        else:
            for block in params["blocks"]:
                x, _ = body(x, block)
        return jnp.einsum("bsw,vw->bsv", decoder.rms_norm(x, params["final_scale"]), params["embedding"])

    def residual(params: Any, statistics: Any, images: jax.Array) -> jax.Array:
        return resnet.forward(params, statistics, images, getattr(resnet, size.upper()))[0]

    def experts(params: Any, x: jax.Array) -> jax.Array:
        return mixture.layer(params, x, getattr(mixture, size.upper()))[0]

    models: dict[str, Any] = {
        "mlp_sgd": (perceptron, lambda args: (args[1],)),
        "decoder_scan": (logits, lambda args: (args[2]["tokens"],)),
        "decoder_unrolled": (logits, lambda args: (args[2]["tokens"],)),
        "resnet_momentum": (residual, lambda args: (args[1], args[3])),
        "moe": (experts, lambda args: (args[1],)),
    }
    return models.get(name)


def like_parameters(tree: Any, params: Any, specs: Any, otherwise: Any) -> Any:
    """Specs for `tree`: the parameters' wherever it holds something of their structure and shapes, `otherwise` elsewhere."""
    import jax

    def shapes(of: Any) -> Any:
        return jax.tree.structure(of), [leaf.shape for leaf in jax.tree.leaves(of)]

    if shapes(tree) == shapes(params):
        return specs
    if isinstance(tree, dict):
        return {key: like_parameters(value, params, specs, otherwise) for key, value in tree.items()}
    return jax.tree.map(lambda _: otherwise, tree)


def planned_by_jaxplan(program: Any, size: str, mesh: Any) -> tuple[float, Any]:
    """CPU seconds to plan, tracing included, and the planned function; likewise below."""
    from jaxplan import make_plan

    start = time.process_time()
    plan = make_plan(program.fn, *program.args, mesh=mesh)
    return time.process_time() - start, plan.jit(())


def proven_gap(program: Any, mesh: Any) -> float:
    """How far, as a fraction of a proven lower bound, jaxplan's plan of a program may be from the best there is."""
    from jaxplan import make_plan

    plan, certified = (make_plan(program.fn, *program.args, mesh=mesh, certify=certify) for certify in (False, True))
    return max(0.0, plan.seconds / certified.bound - 1) if certified.bound else 0.0


def planned_by_jit(program: Any, size: str, mesh: Any) -> tuple[float, Any]:
    """`parallax.jit`; from shapes alone (full size), the same assignments given to `jax.jit`, since it places its arguments."""
    import jax
    import parallax
    from parallax.sharding import auto_shard

    fn, args = without_lists(program.fn, program.args), tuples(program.args)
    start = time.process_time()
    in_specs, out_specs = auto_shard.get_shardings(fn, *args)
    seconds = time.process_time() - start
    if size == "small":
        return seconds, parallax.jit(fn, strategy=parallax.ShardingStrategy.AUTO)
    return seconds, jax.jit(fn, in_shardings=in_specs, out_shardings=out_specs)


def planned_by_model(program: Any, size: str, mesh: Any) -> tuple[float, Any]:
    """`parallax.create_sharded_model` on the forward pass, as a Flax Linen module that holds the program's parameters."""
    import jax
    import parallax
    from flax import linen
    from jax.sharding import PartitionSpec
    from parallax.sharding import auto_shard

    found = forward_pass(program.name, size)
    assert found is not None
    forward, inputs_of = found
    args = tuples(program.args)
    inputs = inputs_of(args)
    start = time.process_time()
    (specs, *_), _ = auto_shard.get_shardings(forward, args[0], *inputs)
    seconds = time.process_time() - start
    if size == "small":
        params = tuples(program.make_args(0)[0])

        class Model(linen.Module):
            @linen.compact
            def __call__(self, *inputs: Any) -> Any:
                return forward(self.param("of_program", lambda key: params), *inputs)

        samples = jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), inputs)
        variables = parallax.create_sharded_model(Model(), samples, parallax.ShardingStrategy.AUTO)
        specs = jax.tree.map(lambda leaf: leaf.sharding.spec, variables["params"]["of_program"])
    batch = PartitionSpec("data")
    placed = [
        like_parameters(arg, args[0], specs, PartitionSpec() if position in program.donate else batch)
        for position, arg in enumerate(args)
    ]
    return seconds, jax.jit(without_lists(program.fn, program.args), in_shardings=tuple(placed))


TOOLS: dict[str, Callable[[Any, str, Any], tuple[float, Any]]] = {
    "jaxplan": planned_by_jaxplan,
    "parallax jit": planned_by_jit,
    "parallax model": planned_by_model,
}


def applies(tool: str, program: str) -> bool:
    """A model's forward pass can only be planned where there is a model to train."""
    return tool != "parallax model" or forward_pass(program, "small") is not None


def first_line(error: BaseException) -> str:
    """The error's type and first line, and the function that raised it."""
    line = next(iter(str(error).strip().splitlines()), "")
    where = traceback.extract_tb(error.__traceback__)[-1].name
    text = f"{type(error).__name__}: {line}".rstrip(": ")
    return f"{text if len(text) <= 160 else text[:157] + '...'} (in {where})"


def difference(got: Any, want: Any) -> float:
    """Largest difference, relative to the largest value of the same array; infinite where shapes or dtypes differ."""
    import jax
    import numpy as np

    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype != b.dtype or a.shape != b.shape:
            return math.inf
        a, b = a.astype(np.float64), b.astype(np.float64)
        gap = float(np.abs(a - b).max(initial=0.0)) / max(1.0, float(np.abs(b).max(initial=0.0)))
        worst = gap if math.isnan(gap) else max(worst, gap)
    return worst


def attempt(name: str, tool: str, text: str, size: str) -> Outcome:
    """Plan, compile and (small) run one program on one mesh."""
    import jax

    import jaxplan
    from jaxplan.examples import programs

    program = programs("small" if size == "small" else "full")[name]
    known: dict[str, Any] = {}
    values = program.make_args(0) if size == "small" else program.args
    want = jax.device_get(jax.jit(program.fn)(*values)) if size == "small" else None
    jax.clear_caches()
    mesh = jax.make_mesh(tuple(map(int, text.split("x"))), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    stage = "planning"
    try:
        with jax.set_mesh(mesh):
            known["plan_seconds"], run = TOOLS[tool](program, size, mesh)
            args = values if tool == "jaxplan" else tuples(values)
            stage = "compiling"
            audit = jaxplan.audit(run.lower(*args), mesh=mesh)
            sent, sent_as_compiled = (sum(audit.wire_bytes(normalised).values()) for normalised in (True, False))
            known.update(sent=sent, sent_as_compiled=sent_as_compiled, flops=audit.flops, peak=audit.peak_bytes)
            stage = "running"
            if size == "small":
                known["difference"] = difference(jax.device_get(run(*args)), want)
            if tool == "jaxplan":
                stage = "certifying"
                known["gap"] = proven_gap(program, mesh)
        return Outcome(name, size, text, tool, **known)
    except Exception as error:
        return Outcome(name, size, text, tool, stage, first_line(error), **known)


# --- outside it ---


def environment(folder: Path, version: str) -> Path:
    """The interpreter of an environment in `folder` that has google-parallax and this jaxplan; made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing google-parallax {version} into a new environment", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", f"google-parallax=={version}", "-e", str(ROOT)], check=True)
    return python


def versions(python: Path) -> dict[str, str]:
    """The versions of what is compared, as installed."""
    code = "import importlib.metadata as m; print(*[m.version(name) for name in ('jax', 'flax', 'google-parallax')])"
    printed = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(("jax", "flax", "google-parallax"), printed, strict=True))


def outcomes(python: Path, program: str, tool: str, size: str, limit: float) -> list[Outcome]:
    """One program through one tool on every mesh, in a process of its own."""
    command = [str(python), __file__, "--inside", program, tool, size]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    variables = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    error, text = "the process ended", ""
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=limit)
        text, error = done.stdout, f"the process ended with status {done.returncode}: {done.stderr.strip()[-200:]}"
    except subprocess.TimeoutExpired as expired:
        text = expired.stdout.decode() if isinstance(expired.stdout, bytes) else expired.stdout or ""
        error = f"not done within {limit:g} s for {len(MESHES)} meshes"
    found = {row.mesh: row for row in (Outcome(**json.loads(line)) for line in text.splitlines() if line.startswith("{"))}
    return [found.get(mesh, Outcome(program, size, mesh, tool, "planning, compiling or running", error)) for mesh in MESHES]


def cell(rows: Sequence[Outcome]) -> str:
    """One tool and one program in a word, over all meshes."""
    if not rows:
        return "not a model"
    if all(row.right for row in rows):
        return "yes"
    if any(row.right for row in rows):
        return "on " + ", ".join(row.mesh for row in rows if row.right)
    if any(not row.failed for row in rows):
        return "**wrong values**"
    return "no: fails in " + ", ".join(dict.fromkeys(row.failed for row in rows))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], right: int) -> Iterator[str]:
    """A table; columns from `right` on hold numbers."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "|".join("---:" if column >= right else "---" for column in range(len(header))) + "|"
    yield from ("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows)


def summary(rows: Sequence[Outcome]) -> list[str]:
    """Which could be planned: a row per program, a column per tool."""
    table = []
    for program in dict.fromkeys(row.program for row in rows):
        mine = [row for row in rows if row.program == program]
        cells = {tool: cell([row for row in mine if row.tool == tool]) for tool in TOOLS}
        if not applies("parallax model", program) and cells["parallax jit"].startswith("no:"):
            cells["parallax jit"] += " (not designed for it)"
        table.append([program, *cells.values()])
    return list(markdown(["program", *TOOLS], table, len(TOOLS) + 1))


def figures(rows: Sequence[Outcome]) -> list[str]:
    """Per program and mesh what each tool's plan costs; only those that compile."""
    shown = [
        [
            row.program, row.mesh, row.tool, f"{row.plan_seconds:.3f}", f"{row.sent:,.0f}", f"{row.sent_as_compiled:,.0f}",
            f"{row.flops / 1e6:,.2f}", f"{row.peak / 1e6:,.2f}", "not run" if row.difference is None else f"{row.difference:.1g}",
            "" if row.gap is None else f"{row.gap:.3%}",
        ]
        for row in rows
        if None not in (row.plan_seconds, row.sent, row.sent_as_compiled, row.flops, row.peak)
    ]  # fmt: skip
    header = ("program", "mesh", "tool", "s to plan", "bytes sent", "as compiled", "MFLOP", "peak MB", "difference", "proven gap")
    return list(markdown(header, shown, 3))


def page(rows: Sequence[Outcome], installed: dict[str, str]) -> str:
    """The page as Markdown."""
    small, full = ([row for row in rows if row.size == size] for size in ("small", "full"))
    failures = dict.fromkeys((row.program, row.size, row.tool, row.failed, row.error) for row in rows if row.failed)
    names = ", ".join(dict.fromkeys(row.program for row in full))
    return f"""# jaxplan beside google-parallax, on the same programs

Written by `python scripts/compare_tools.py --page docs/tools.md` with JAX {installed["jax"]}, Flax {installed["flax"]} and
google-parallax {installed["google-parallax"]}, all in one environment, on eight simulated CPU devices as meshes of data x model:
{", ".join(MESHES)}. The programs are jaxplan's own examples, none of them chosen with google-parallax in mind; the same program
is compiled and counted for every tool.

google-parallax is made for Flax models. It asks for the parameters first, then the inputs, and a mesh of exactly two axes; the
primitives that it does not know are taken to be element-wise. It was not designed for loops, solvers or stencils, nor, its tests
suggest, for a train step as a whole. It is used in two ways, with its automatic strategy:

- *parallax jit* gives the whole function to `parallax.jit`;
- *parallax model* gives the forward pass of the model to `parallax.create_sharded_model`, then compiles the train step with
  `jax.jit`, optimizer state lying like the parameters and the batch split over `data`.

It gets tuples where a program has lists, and a forward pass without `jax.checkpoint`. `decoder_unrolled` is `decoder_scan` with
its loop over layers written out.

## Which could be planned

{chr(10).join(summary(small))}

"Yes": planned, compiled and run on every mesh, with values within {SAME:g} of the unsharded function's. "Not a model": there
is no forward pass of a model to be planned apart.

## What the plans cost

Per device and call. *Bytes sent* are read from the compiled program by `jaxplan.audit`, which takes the CPU compiler's all-reduce
and slice for the reduce-scatter that they are elsewhere; *as compiled* does not. Bytes alone say little: a program that every
device computes whole sends nothing, so FLOPs stand beside them. *Difference* is the largest, relative to the largest value.
*Seconds to plan* are the processor's and include tracing; with nothing cached, measured once. *Proven gap* is how far above the
best there is the plan may be in modelled seconds (`certify=True`); the other tool has no bound.

At the small size jaxplan's model of CPU devices often finds it best that every device computes everything:

{chr(10).join(figures(small))}

At the full size, where what google-parallax could plan is planned and compiled, not run ({names or "none was asked for"}). Its
`jit` leaves outputs whole but for the batch, so that updated parameters are gathered; its `model` leaves them to the compiler.

{chr(10).join(figures(full))}

## Errors

First lines, and the function that raised them.

{chr(10).join(f"- {program} ({size}), {tool}, {stage}: `{error}`" for program, size, tool, stage, error in failures) or "None."}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print; 1 if jaxplan fails, or computes other values than the unsharded function."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, metavar="DIR")
    parser.add_argument("--version", default="0.0.2", metavar="VERSION")
    parser.add_argument("--small-only", action="store_true")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument("--page", type=Path, metavar="FILE")
    parser.add_argument("--inside", nargs=3, metavar=("PROGRAM", "TOOL", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.inside:
        for mesh in MESHES:
            program, tool, size = options.inside
            print(json.dumps(dataclasses.asdict(attempt(program, tool, mesh, size))), flush=True)
        return 0

    from jaxplan.examples import programs

    with tempfile.TemporaryDirectory() as scratch:
        python = environment(options.venv or Path(scratch) / "venv", options.version)
        rows: list[Outcome] = []

        def compare(program: str, size: str) -> None:
            for tool in TOOLS:
                if applies(tool, program):
                    found = outcomes(python, program, tool, size, options.limit)
                    rows.extend(found)
                    errors = dict.fromkeys(row.error for row in found if row.error)
                    print(f"{program:20s} {size:5s} {tool:15s} {cell(found)}", *errors, flush=True)

        for program in options.only or programs():
            compare(program, "small")
        planned = dict.fromkeys(row.program for row in rows if row.right and row.tool != "jaxplan")
        for program in () if options.small_only else planned:
            compare(program, "full")
        print("\n".join(["", *summary([row for row in rows if row.size == "small"]), "", *figures(rows)]))
        if options.page:
            options.page.write_text(page(rows, versions(python)))
    return 0 if all(row.right for row in rows if row.tool == "jaxplan") else 1


if __name__ == "__main__":
    sys.exit(main())
