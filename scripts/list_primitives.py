"""Write docs/primitives.md: what jaxplan knows of every primitive of the installed JAX.

    python scripts/list_primitives.py [--check] [--output docs/primitives.md]

Every primitive that the public modules of JAX can put into a program is listed by class, with its rule on a small example and
what it costs to split one of its factors over `n` devices. `--check` writes nothing and exits with 1 if the page is stale. A page
written for another version of JAX is not judged.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.layout import Layout, with_layout_constraint

from jaxplan import _jax
from jaxplan.cost.price import Option, Setting, Terms, cluster_terms
from jaxplan.graph import Graph, Operator, Tensor, Work
from jaxplan.graph.flatten import _CONTROL
from jaxplan.graph.fuse import fuse
from jaxplan.layout import AxisOrder
from jaxplan.rules import Kind, Rule, classify, rule_of
from jaxplan.rules.whole import DELIBERATELY_WHOLE

PAGE = Path(__file__).parent.parent / "docs" / "primitives.md"

PUBLIC = """
    jax jax.debug jax.export jax.extend.core.primitives jax.ffi jax.lax jax.lax.linalg jax.nn jax.nn.initializers jax.numpy
    jax.numpy.fft jax.numpy.linalg jax.random jax.scipy jax.scipy.cluster jax.scipy.fft jax.scipy.integrate jax.scipy.interpolate
    jax.scipy.linalg jax.scipy.ndimage jax.scipy.optimize jax.scipy.signal jax.scipy.sparse.linalg jax.scipy.spatial
    jax.scipy.special jax.scipy.stats
"""
ELSEWHERE = ("jax.experimental", "jax._src.pallas")
"""Not reached from the public modules; whoever else is in the process may have imported them."""

CLASSES = ("known", "free", "control flow", "deliberately whole", "missing")


def installed_primitives() -> list[Any]:
    """Every primitive that is a variable of a module of JAX, once the public modules are imported; sorted by name."""
    for name in PUBLIC.split():
        importlib.import_module(name)
    modules = [
        module
        for name, module in sorted(sys.modules.items())
        if (name == "jax" or name.startswith("jax.")) and not name.startswith(ELSEWHERE)
    ]
    found = {value for module in modules for value in vars(module).values() if isinstance(value, _jax.Primitive)}
    return sorted(found, key=lambda primitive: primitive.name)


def class_of(primitive: Any) -> str:
    """One of `CLASSES`."""
    if primitive in _CONTROL:
        return "control flow"
    kind = classify(primitive)
    if kind != "unknown":
        return kind
    return "deliberately whole" if primitive.name in DELIBERATELY_WHOLE else "missing"


# --- examples: one small equation of each primitive ------------------------------------------------------------------


class Example(NamedTuple):
    """A function of arrays in whose jaxpr the primitive occurs."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]


def data(*shape: int, dtype: Any = np.float32, below: int = 4, seed: int = 0) -> Any:
    """Reproducible values in [0.2, 0.8), or integers below `below`."""
    generator = np.random.default_rng([seed, *shape])
    if np.issubdtype(dtype, np.integer) or dtype is bool:
        return generator.integers(0, below, shape).astype(dtype)
    if np.issubdtype(dtype, np.complexfloating):
        return (data(*shape) + 1j * data(*shape, seed=1)).astype(dtype)
    return generator.uniform(0.2, 0.8, shape).astype(dtype)


def bind(name: str, **params: Any) -> Callable[..., Any]:
    """The primitive called `name` in JAX's source, on its own."""
    return lambda *values: _jax.primitives(name)[0].bind(*values, **params)


def scattered(name: str) -> Callable[..., Any]:
    return lambda x, i, u: getattr(x.at[i], name)(u)


def keys(*shape: int) -> Any:
    return jax.random.split(jax.random.key(0), shape)


def _identity(x: Any) -> Any:
    return x


def partitioned_softmax() -> Callable[..., Any]:
    """A softmax that says by itself how it is partitioned: by rows."""

    def softmax(x: Any) -> Any:
        return jax.nn.softmax(x, axis=-1)

    def partition(mesh: Any, operands: Any, result: Any) -> Any:
        return mesh, softmax, result.sharding, tuple(operand.sharding for operand in operands)

    partitioned = custom_partitioning(softmax)
    partitioned.def_partition(partition=partition, sharding_rule="i j -> i j", need_replication_factors=("j",))
    return partitioned


def examples() -> dict[str, Callable[[], Example]]:
    """Examples that cannot be guessed. Made when asked for: some arguments are arrays of keys."""
    f, line, cube = data(8, 4), data(16), data(2, 8, 4)
    image, matrix, tall, rows = data(2, 4, 8, 8), data(2, 4, 4), data(2, 8, 4), data(4, dtype=np.int32, below=8)
    positive = matrix @ matrix.swapaxes(1, 2) + np.eye(4, dtype=np.float32)
    zero = np.int32(0)
    ragged = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
    windows = {"window_dimensions": (1, 2), "window_strides": (1, 2), "padding": ((0, 0), (0, 0))}
    ordering, adding = (jax.make_jaxpr(fn)(np.float32(0), np.float32(0)) for fn in (lax.ge, lax.add))
    undilated = {"base_dilation": (1, 1), "window_dilation": (1, 1)}
    table: dict[str, tuple[Any, ...]] = {
        "after_all": (lambda: lax.after_all(lax.create_token(), lax.create_token()),),
        "approx_top_k": (lambda x: lax.approx_max_k(x, 2, reduction_dimension=1), f),
        "argmax": (lambda x: lax.argmax(x, 1, np.int32), f),
        "argmin": (lambda x: lax.argmin(x, 1, np.int32), f),
        "bitcast_convert_type": (lambda x: lax.bitcast_convert_type(x, np.uint8), f),
        "broadcast_in_dim": (lambda x: lax.broadcast_in_dim(x, (2, 8, 4), (1, 2)), f),
        "cholesky": (bind("cholesky"), positive),
        "cholesky_update": (bind("cholesky_update?"), np.eye(4, dtype=np.float32), data(4)),
        "clamp": (lambda x: lax.clamp(0.3, x, 0.6), f),
        "concatenate": (lambda x, y: lax.concatenate((x, y), 1), f, f),
        "conj": (lambda x: lax.conj(x), data(8, 4, dtype=np.complex64)),
        "conv_general_dilated": (lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME"), image, data(6, 4, 3, 3)),
        "convert_element_type": (lambda x: lax.convert_element_type(x, np.float16), f),
        "copy": (lambda x: bind("copy")(x), f),
        "custom_partitioning": (partitioned_softmax(), f),
        "cumlogsumexp": (lambda x: lax.cumlogsumexp(x, 1), f),
        "cummax": (lambda x: lax.cummax(x, 1), f),
        "cummin": (lambda x: lax.cummin(x, 1), f),
        "cumprod": (lambda x: lax.cumprod(x, 1), f),
        "cumsum": (lambda x: lax.cumsum(x, 1), f),
        "dce_sink": (bind("dce_sink?", **({"prevent_mlir_dce": True} if jax.__version_info__ >= (0, 10) else {})), f),
        "debug_callback": (lambda x: jax.debug.callback(_identity, x), f),
        "debug_print": (lambda x: jax.debug.print("{x}", x=x), f),
        "device_put": (lambda x: jax.device_put(x), f),
        "dot_general": (jnp.matmul, cube, data(2, 4, 6)),
        "dynamic_slice": (lambda x, i: lax.dynamic_slice(x, (i, 0), (2, 4)), f, zero),
        "dynamic_update_slice": (lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 0)), f, f[:1], zero),
        "empty2": (bind("empty2?", dtype=np.dtype(np.float32), memory_space=jax.memory.Space.Device),),
        "eig": (lambda x: lax.linalg.eig(x), matrix),
        "eigh": (lambda x: lax.linalg.eigh(x), positive),
        "create_token": (lambda: lax.create_token(),),
        "empty": (lambda: lax.empty((8, 4), np.float32),),
        "fft": (lambda x: lax.fft(x, "FFT", (4,)), data(8, 4, dtype=np.complex64)),
        "gather": (lambda x, i: x.at[i].get(mode="clip"), f, rows),
        "geqp3": (bind("geqp3?", use_magma=None), tall, np.zeros((2, 4), np.int32)),
        "geqrf": (bind("geqrf?"), tall),
        "hessenberg": (bind("hessenberg"), matrix),
        "householder_product": (lambda a, t: lax.linalg.householder_product(a, t), tall, data(2, 4)),
        "inspect_sharding": (lambda x: jax.debug.inspect_array_sharding(x, callback=_identity), f),
        "integer_pow": (lambda x: lax.integer_pow(x, 3), f),
        "io_callback": (lambda x: io_callback(_identity, x, x), f),
        "iota_2x32_shape": (bind("iota_2x32_shape?", shape=(8, 4)),),
        "iota": (lambda: lax.broadcasted_iota(np.int32, (8, 4), 1),),
        "layout_constraint": (lambda x: with_layout_constraint(x, Layout((0, 1))), f),
        "lu": (lambda x: lax.linalg.lu(x), matrix),
        "lu_pivots_to_permutation": (lambda x: lax.linalg.lu_pivots_to_permutation(x, 8), data(2, 4, dtype=np.int32, below=8)),
        "name": (lambda x: checkpoint_name(x, "kept"), f),
        "optimization_barrier": (lambda x, y: lax.optimization_barrier((x, y)), f, line),
        "ormqr": (bind("ormqr?", left=True, transpose=False), tall, data(2, 4), data(2, 8, 6)),
        "pad": (lambda x: lax.pad(x, np.float32(0), ((0, 0, 0), (1, 1, 0))), f),
        "platform_index": (lambda x: lax.platform_dependent(x, cpu=jnp.sin, default=jnp.cos), f),
        "polynomial": (bind("polynomial?"), f, f, f),
        "pure_callback": (lambda x: jax.pure_callback(_identity, x, x), f),
        "qr": (bind("qr", pivoting=False, full_matrices=False, use_magma=None), tall),
        "ragged_dot_general": (
            lambda x, w, s: lax.ragged_dot_general(x, w, s, ragged), f, data(2, 4, 6), np.asarray([3, 5], np.int32),
        ),
        "random_bits": (lambda k: jax.vmap(lambda key: jax.random.bits(key, (4,)))(k), keys(8)),
        "random_clone": (jax.random.clone, keys(8)),
        "random_fold_in": (lambda k, i: jax.vmap(jax.random.fold_in)(k, i), keys(8), data(8, dtype=np.uint32)),
        "random_gamma": (bind("random_gamma", log_space=True), keys(8, 4), f),
        "random_seed": (lambda i: jax.vmap(jax.random.key)(i), data(8, dtype=np.uint32)),
        "random_split": (lambda k: jax.vmap(lambda key: jax.random.split(key, 4))(k), keys(8)),
        "random_unwrap": (jax.random.key_data, keys(8)),
        "random_wrap": (lambda x: jax.random.wrap_key_data(x, impl="threefry2x32"), data(8, 2, dtype=np.uint32)),
        "reduce": (lambda x: lax.reduce(x, np.float32(0), lambda a, b: a + 2 * b, (1,)), f),
        "reduce_and": (lambda x: (x > 0).all(1), f),
        "reduce_max": (lambda x: x.max(1), f),
        "reduce_min": (lambda x: x.min(1), f),
        "reduce_or": (lambda x: (x > 0).any(1), f),
        "reduce_precision": (lambda x: lax.reduce_precision(x, 8, 7), f),
        "reduce_prod": (lambda x: x.prod(1), f),
        "reduce_sum": (lambda x: x.sum(1), f),
        "reduce_window": (
            lambda x: lax.reduce_window(x, np.float32(0), lambda a, b: a * b + a + b, (1, 3), (1, 1), "SAME"), data(4, 8),
        ),
        "reduce_window_max": (lambda x: lax.reduce_window(x, -np.inf, lax.max, (1, 3), (1, 1), "SAME"), data(4, 8)),
        "reduce_window_min": (lambda x: lax.reduce_window(x, np.inf, lax.min, (1, 3), (1, 1), "SAME"), data(4, 8)),
        "reduce_window_sum": (lambda x: lax.reduce_window(x, np.float32(0), lax.add, (1, 3), (1, 1), "SAME"), data(4, 8)),
        "reduce_xor": (lambda x: lax.reduce_xor(x, (1,)), data(8, 4, dtype=np.int32)),
        "reshape": (lambda x: x.reshape(8, 2, 2), f),
        "rev": (lambda x: lax.rev(x, (1,)), f),
        "rng_bit_generator": (lambda k: lax.rng_bit_generator(k, (8, 4)), data(4, dtype=np.uint32)),
        "rng_uniform": (lambda a, b: lax.rng_uniform(a, b, (8, 4)), np.float32(0), np.float32(1)),
        "round": (lambda x: lax.round(x), f),
        "scatter": (scattered("set"), f, rows, data(4, 4)),
        "scatter-add": (scattered("add"), f, rows, data(4, 4)),
        "scatter-max": (scattered("max"), f, rows, data(4, 4)),
        "scatter-min": (scattered("min"), f, rows, data(4, 4)),
        "scatter-mul": (scattered("multiply"), f, rows, data(4, 4)),
        "scatter-sub": (scattered("subtract"), f, rows, data(4, 4)),
        "schur": (lambda x: lax.linalg.schur(x), matrix),
        "select_and_gather_add": (
            bind("select_and_gather_add", select_prim=lax.ge_p, **windows, **undilated), data(4, 8), data(4, 8, seed=1),
        ),
        "select_and_scatter_add": (
            bind("select_and_scatter_add", select_prim=lax.ge_p, **windows), data(4, 4), data(4, 8),
        ),
        "select_and_scatter": (
            bind(
                "select_and_scatter", select_jaxpr=ordering.jaxpr, select_consts=(), scatter_jaxpr=adding.jaxpr,
                scatter_consts=(), **windows,
            ),
            data(4, 8), data(4, 4), np.float32(0),
        ),
        "select_n": (lambda c, x, y: lax.select_n(c, x, y), data(8, 4, dtype=bool), f, f),
        "slice": (lambda x: lax.slice(x, (0, 1), (8, 3)), f),
        "sort": (lambda x, y: lax.sort((x, y), dimension=1), f, f),
        "split": (lambda x: lax.split(x, (1, 3), axis=1), f),
        "squeeze": (lambda x: lax.squeeze(x, (1,)), data(8, 1, 4)),
        "stack": (bind("stack?", axis=1), f, f),
        "svd": (lambda x: lax.linalg.svd(x), tall),
        "symmetric_product": (bind("symmetric_product?", alpha=1.0, beta=1.0), tall, data(2, 8, 8)),
        "threefry2x32": (bind("threefry2x32"), *[data(8, 4, dtype=np.uint32, seed=i) for i in range(4)]),
        "tie": (bind("tie?"), line, f),
        "tile": (lambda x: jnp.tile(x, (2, 1)), f),
        "top_k": (lambda x: lax.top_k(x, 2), f),
        "transpose": (lambda x: x.T, f),
        "triangular_solve": (lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True), matrix, data(2, 4, 6)),
        "tridiagonal": (lambda a: lax.linalg.tridiagonal(a), positive),
        "tridiagonal_solve": (lax.linalg.tridiagonal_solve, *[data(2, 4)] * 3, data(2, 4, 6)),
        "unstack": (bind("unstack?", axis=1), f),
    }  # fmt: skip
    return {name: lambda row=row: Example(row[0], row[1:]) for name, row in table.items()}


_ABSTRACT = "from_edtype relayout reshard sharding_constraint stage stop_gradient to_edtype zeros_like"
"""Primitives with no equation to show on one device; a matrix goes in, a matrix comes out."""


class Worked(NamedTuple):
    """A rule and the abstract values of its equation; `example` None where there is no equation."""

    rule: Rule
    operands: Sequence[Any]
    results: Sequence[Any]
    example: Example | None


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _jax.sub_jaxprs(equation):
            yield from equations(inner)


def find_equation(example: Example, primitive: Any) -> Any:
    """The first equation of `primitive` in the example's jaxpr, or None."""
    jaxpr = jax.make_jaxpr(example.fn)(*example.args).jaxpr
    return next((equation for equation in equations(jaxpr) if equation.primitive is primitive), None)


def example_of(primitive: Any, table: Mapping[str, Callable[[], Example]]) -> Example | None:
    """The example in the table, else the first guess that JAX takes: so many operands of one shape and such a type."""
    if primitive.name in table:
        return table[primitive.name]()
    if primitive.name in _ABSTRACT.split():
        return None
    types = (np.float32, np.int32, np.uint32, bool, np.complex64)
    functions = (getattr(lax, primitive.name, primitive.bind), primitive.bind)
    for fn, dtype, arity in itertools.product(functions, types, (1, 2, 3)):
        guess = Example(fn, tuple(data(8, 4, dtype=dtype, seed=i) for i in range(arity)))
        try:
            if find_equation(guess, primitive) is not None:
                return guess
        except (AssertionError, NotImplementedError, TypeError, ValueError):  # not this type, not this many
            continue
    raise LookupError(f"add an example of {primitive.name!r} to scripts/list_primitives.py")


def work_out(primitive: Any, table: Mapping[str, Callable[[], Example]]) -> Worked:
    """The rule of a known or free primitive on its example."""
    example = example_of(primitive, table)
    if example is None:
        matrix = jax.ShapeDtypeStruct((8, 4), np.float32)
        return Worked(rule_of(primitive, {}, [matrix], [matrix]), [matrix], [matrix], None)
    equation = find_equation(example, primitive)
    operands, results = ([v.aval for v in side] for side in (equation.invars, equation.outvars))
    return Worked(rule_of(primitive, equation.params, operands, results), operands, results, example)


# --- what a split costs: the formulas of jaxplan.cost, over names ----------------------------------------------------


Powers = tuple[tuple[str, int], ...]
"""(name, power), sorted."""


class Sum:
    """A sum of products of powers of names, with just the arithmetic that the formulas use."""

    def __init__(self, terms: Mapping[Powers, float]) -> None:
        self.terms = {powers: value for powers, value in terms.items() if value}

    @staticmethod
    def of(value: Any) -> Sum:
        """A name or a number as a sum of one term."""
        if isinstance(value, Sum):
            return value
        return Sum({((value, 1),): 1.0} if isinstance(value, str) else {(): float(value)})

    def __add__(self, other: Any) -> Sum:
        total = dict(self.terms)
        for powers, value in Sum.of(other).terms.items():
            total[powers] = total.get(powers, 0.0) + value
        return Sum(total)

    def __sub__(self, other: Any) -> Sum:
        """Only ever `n - 1`, which stays together as one name."""
        return Sum.of(f"({self}-{other})")

    def __mul__(self, other: Any) -> Sum:
        total: dict[Powers, float] = {}
        for (left, a), (right, b) in itertools.product(self.terms.items(), Sum.of(other).terms.items()):
            powers = dict(left)
            for name, power in right:
                powers[name] = powers.get(name, 0) + power
            key = tuple(sorted((name, power) for name, power in powers.items() if power))
            total[key] = total.get(key, 0.0) + a * b
        return Sum(total)

    def __truediv__(self, other: Any) -> Sum:
        ((powers, value),) = Sum.of(other).terms.items()
        return self * Sum({tuple((name, -power) for name, power in powers): 1 / value})

    def __rtruediv__(self, other: Any) -> Sum:
        return Sum.of(other) / self

    __radd__, __rmul__ = __add__, __mul__

    def __str__(self) -> str:
        return " + ".join(_term(powers, value) for powers, value in sorted(self.terms.items())) or "0"


def _term(powers: Powers, value: float) -> str:
    """8 M N (n-1)/n: numbers, extents, then what is of the axis."""
    above = sorted([name for name, power in powers for _ in range(power)], key=lambda name: (name.startswith("("), name))
    below = [name for name, power in powers for _ in range(-power)]
    number = [f"{value:.4g}"] if value != 1 or not above else []
    return " ".join([*number, *above]) + "".join(f"/{name}" for name in below)


class Names:
    """The algebra of jaxplan.cost over the names of one rule's factors, in capitals, and an axis of `n` devices."""

    larger, smaller = max, min
    sizes: Sequence[Any] = (Sum.of("n"),)
    counts = (1,)
    seconds_per_byte = Sum.of("m")

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.rule = graph.operators[0].rule

    def size(self, factor: int) -> Sum:
        return Sum.of(self.rule.factors[factor].name.upper())

    def nbytes(self, tensor: int) -> Sum:
        """Bytes of a tensor. An extent that is no product of factors is a number."""
        total = Sum.of(self.graph.tensors[tensor].itemsize)
        for position in range(len(self.graph.tensors[tensor].shape)):
            total = total * self.extent(tensor, position)
        return total

    def extent(self, tensor: int, position: int) -> Sum:
        """Extent of one dimension; tensors are numbered as the rule's operands and results."""
        dim = (*self.rule.operands, *self.rule.results)[tensor][position]
        extent = self.graph.tensors[tensor].shape[position]
        if not dim or math.prod(self.rule.factors[f].size for f in dim) != extent:
            return Sum.of(extent)
        return math.prod([self.size(f) for f in dim], start=Sum.of(1))

    def flops(self, work: Work) -> Sum:
        total = Sum.of(self.rule.flops)
        for f in range(len(self.rule.factors)):
            total = total * self.size(f)
        return total

    def seconds_per_flop(self, dtype: str) -> Sum:
        return Sum.of("r")

    def link(self, axis: int) -> tuple[Sum, Sum]:
        return Sum.of("g"), Sum.of("l")


def graph_of(worked: Worked) -> Graph:
    """A graph of one operator, whose results are all wanted."""
    tensors, numbers = [], []
    for aval in (*worked.operands, *worked.results):
        dtype = getattr(aval, "dtype", np.dtype(np.int32))
        tensors.append(Tensor(tuple(getattr(aval, "shape", ())), str(dtype), int(getattr(dtype, "itemsize", 4))))
        numbers.append(len(numbers))
    count = len(worked.operands)
    operator = Operator("one", worked.rule, tuple(numbers[:count]), tuple(numbers[count:]), 1.0, 0, ())
    outputs = numbers[count:]
    return Graph(tuple(tensors), (operator,), tuple(fuse(tensors, [operator], outputs)), (), tuple(outputs), (), {})


def telling_factor(rule: Rule) -> int:
    """The factor whose split says most: one that exchanges something if there is one; -1 if none may be split."""
    order = (Kind.SUM, Kind.COMBINE, Kind.HALO, Kind.PARALLEL)
    legal = [f for f, may in enumerate(rule.shardable) if may]
    return min(legal, key=lambda f: (order.index(rule.factors[f].kind), f), default=-1)


def cost_of(worked: Worked) -> tuple[str, str]:
    """(name of the factor that is split, seconds of one device) in closed form."""
    factor = telling_factor(worked.rule)
    graph = graph_of(worked)
    (cluster,) = graph.clusters
    numbering = [f for f, may in enumerate(worked.rule.shardable) if may]
    option = Option(numbering.index(factor)) if factor >= 0 else Option()
    names = Names(graph)
    slabs = []
    for halo in cluster.halos:
        tensor, leads = halo.operand
        slabs.append(replace(halo, extent=names.extent(tensor, leads.index(halo.factor))))
    terms = cluster_terms(cluster._replace(halos=tuple(slabs)), [option], Setting(1, AxisOrder((0,), (0,))), names)
    return worked.rule.factors[factor].name if factor >= 0 else "", written(terms)


def written(terms: Terms) -> str:
    """max(flops r, bytes m) + h g + rounds l."""
    flops = sum((value for value, _ in terms.work), start=Sum({}))
    local = Sum.of(terms.local_bytes)
    work = [f"{_apart(value)} {unit}" for value, unit in ((flops, "r"), (local, "m")) if value.terms]
    parts = [f"max({', '.join(work)})" if len(work) == 2 else "".join(work)]
    for axis, sent in terms.sent.items():
        parts += [f"{_apart(sent)} g", "l" if terms.rounds[axis] == 1 else f"{terms.rounds[axis]} l"]
    return " + ".join(filter(None, parts)) or "0"


def _apart(value: Sum) -> str:
    return str(value) if len(value.terms) == 1 else f"({value})"


# --- the page --------------------------------------------------------------------------------------------------------

HEADER = """\
# primitives

Written by `scripts/list_primitives.py` for jax {version}; do not edit. Every primitive that the public modules of JAX can put
into a program, {count} in all: {counts}.
`tests/test_rules_coverage.py` fails when an installed JAX has one that is in none of these classes.

How to read a row: the shapes of an example, its rule in the notation of [rules](rules.md), one factor that may be split (one
that makes an exchange, if there is one), and the seconds that a device then takes where the axis has `n` of them. A factor's
name in capitals is its size; `r` is seconds per operation, `m` per byte of local memory, `g` per byte sent; `l` is the latency
of a superstep. The formulas are those of [cost](cost.md): an all-reduce of B bytes sends 2 (n-1)/n B in two supersteps, the
slab of a halo goes in one. Numbers other than an element's bytes come from the example, where work is no product of sizes. Where
no factor is named, nothing may be split: operands that are sharded are gathered first, (n-1)/n of the bytes of each, and every
device does all.
"""

SECTIONS = {
    "known": "A rule says what each dimension means.",
    "free": "Every device makes its own part, whatever the layout; nothing is charged.",
    "control flow": "No rule: the [graph](graph.md) looks inside, and what is inside has rules. A `shard_map` keeps "
    "the layouts that it asks for.",
    "deliberately whole": "No rule, for the reason given: operands are gathered, and the printed plan names the primitive. "
    "`@jaxplan.rule` teaches one.",
    "missing": "Nobody has thought about these.",
}


def shape_of(aval: Any) -> str:
    shape = getattr(aval, "shape", ())
    return "x".join(map(str, shape)) or "scalar"


def rows_of(members: Sequence[Any], kind: str, table: Mapping[str, Callable[[], Example]]) -> list[str]:
    """The lines of one section."""
    if kind in ("known", "free"):
        return [row_of(primitive, kind, table) for primitive in members]
    if kind != "deliberately whole":
        return [", ".join(f"`{primitive.name}`" for primitive in members)]
    names: dict[str, list[str]] = {}
    for primitive in members:
        names.setdefault(DELIBERATELY_WHOLE[primitive.name], []).append(primitive.name)
    return [f"| {reason} | {', '.join(names[reason])} |" for reason in sorted(names)]


def row_of(primitive: Any, kind: str, table: Mapping[str, Callable[[], Example]]) -> str:
    """The line of one primitive that has a rule."""
    worked = work_out(primitive, table)
    shapes = ", ".join(map(shape_of, worked.operands)) or "nothing"
    row = f"| {primitive.name} | {shapes} | `{str(worked.rule).strip()}` |"
    if kind == "free":
        return row
    factor, cost = cost_of(worked)
    return f"{row} {factor} | {cost} |"


def page() -> str:
    """The whole page."""
    primitives, table = installed_primitives(), examples()
    classes = {kind: [p for p in primitives if class_of(p) == kind] for kind in CLASSES}
    counts = ", ".join(f"{len(members)} {kind}" for kind, members in classes.items() if members)
    lines = [HEADER.format(version=jax.__version__, count=len(primitives), counts=counts)]
    heads = {
        "known": "| primitive | example | rule | split | seconds |\n|---|---|---|---|---|",
        "free": "| primitive | example | rule |\n|---|---|---|",
        "deliberately whole": "| because it ... | primitives |\n|---|---|",
    }
    for kind, members in classes.items():
        if members:
            head = [heads[kind]] if kind in heads else []
            lines += [f"## {kind.capitalize()}\n", SECTIONS[kind] + "\n", *head, *rows_of(members, kind, table), ""]
    return "\n".join(lines).rstrip() + "\n"


def version_of(text: str) -> str:
    """The version of JAX that a page was written for."""
    found = re.search(r"for jax (\S+);", text)
    return found.group(1) if found else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is stale")
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    before = options.output.read_text(encoding="utf-8") if options.output.exists() else ""
    if options.check and before and version_of(before) != jax.__version__:
        print(f"{options.output} is of jax {version_of(before)}, not of the installed {jax.__version__}: not judged")
        return 0
    text = page()
    if not options.check:
        options.output.write_text(text, encoding="utf-8")
        return 0
    if text != before:
        print(f"{options.output} is stale: run python scripts/list_primitives.py")
        return 1
    return 0


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
