"""What `plan.export("explicit")` says to write is written into programs, which then type in Explicit mode, compute the same, and
compile to the exchanges that were planned."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import assert_close, mesh_of
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import jaxplan
from jaxplan.compare import compare
from jaxplan.examples import programs
from jaxplan.machine import machine

HEAD = "import jax, jax.numpy as jnp\nfrom jax.sharding import PartitionSpec as P\n"

NETWORK = (
    HEAD
    + """
def step(params, x, y):
    def loss(params):
        h = jnp.matmul(x, params["a"])
        h = jnp.add(h, params["b"][None])
        h = jnp.tanh(h)
        o = jnp.matmul(h, params["c"])
        e = jnp.subtract(o, y)
        e = jnp.square(e)
        return jnp.mean(e)
    value, gradients = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value
"""
)

FORWARD = (
    HEAD
    + """
def step(a, b, c, x):
    h = jnp.matmul(x, a)
    h = jnp.add(h, b[None])
    h = jnp.tanh(h)
    o = jnp.matmul(h, c)
    return jnp.sum(o, axis=0)
"""
)

ATTENTION = (
    HEAD
    + """
def step(x, wq, wk, wo):
    q = jnp.einsum("bsd,dhk->bshk", x, wq)
    k = jnp.einsum("bsd,dhk->bshk", x, wk)
    s = jnp.einsum("bqhk,bshk->bhqs", q, k)
    s = jnp.tanh(s)
    o = jnp.einsum("bhqs,bshk->bqhk", s, k)
    o = jnp.einsum("bqhk,hkd->bqd", o, wo)
    o = jnp.add(o, x)
    return jnp.mean(o, axis=0)
"""
)

BLOCK = (
    HEAD
    + """
def step(params, moments, x, y):
    def loss(params):
        v = jnp.square(x)
        v = jnp.mean(v, axis=-1, keepdims=True)
        h = jnp.divide(x, jnp.sqrt(v + 1e-6))
        q = jnp.einsum("bsd,dhk->bshk", h, params["wq"])
        k = jnp.einsum("bsd,dhk->bshk", h, params["wk"])
        v = jnp.einsum("bsd,dhk->bshk", h, params["wv"])
        s = jnp.einsum("bqhk,bshk->bhqs", q, k)
        s = jax.nn.softmax(s, axis=-1)
        o = jnp.einsum("bhqs,bshk->bqhk", s, v)
        o = jnp.einsum("bqhk,hkd->bqd", o, params["wo"])
        z = jnp.add(x, o)
        u = jnp.matmul(z, params["up"])
        u = jax.nn.gelu(u)
        d = jnp.matmul(u, params["down"])
        e = jnp.add(z, d)
        e = jnp.subtract(e, y)
        e = jnp.square(e)
        return jnp.mean(e)
    value, gradients = jax.value_and_grad(loss)(params)
    moments = jax.tree.map(lambda m, g: 0.9 * m + g, moments, gradients)
    return jax.tree.map(lambda p, m: p - 0.1 * m, params, moments), moments, value
"""
)

LAYERS = (
    HEAD
    + """
def step(a, b, x):
    def layer(x, ab):
        a, b = ab
        h = jnp.matmul(x, a)
        h = jax.nn.relu(h)
        h = jnp.matmul(h, b)
        h = jnp.add(h, x)
        return h, None
    x, _ = jax.lax.scan(layer, x, (a, b))
    return jnp.sum(x, axis=1)
"""
)


def array(*shape):
    return np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)


FORWARD_ARGS = array(16, 48), array(48), array(48, 8), array(24, 16)
ATTENTION_ARGS = array(8, 12, 16), array(16, 4, 6), array(16, 4, 6), array(4, 6, 16)
LAYERS_ARGS = array(3, 16, 32), array(3, 32, 16), array(24, 16)

FORWARDS = {
    "data parallel": (FORWARD, FORWARD_ARGS, {"x": P("x")}, (4,)),
    "tensor parallel": (FORWARD, FORWARD_ARGS, {"a": P(None, "y"), "c": P("y"), "x": P("x")}, (4, 2)),
    "contracted": (FORWARD, FORWARD_ARGS, {"a": P("x"), "c": P(None, "y"), "x": P(None, "x")}, (4, 2)),
    "a mesh of three": (FORWARD, FORWARD_ARGS, {"a": P(None, "x"), "x": P()}, (3,)),
    "both axes on one dimension": (FORWARD, FORWARD_ARGS, {"x": P(("x", "y")), "a": P()}, (4, 2)),
    "both, the other way round": (FORWARD, FORWARD_ARGS, {"x": P(("y", "x")), "c": P(None, ("y", "x"))}, (4, 2)),
    "three axes": (FORWARD, FORWARD_ARGS, {"x": P("x", "z"), "a": P("y")}, (2, 2, 2)),
    "heads": (ATTENTION, ATTENTION_ARGS, {"wq": P(None, "y"), "x": P("x")}, (4, 2)),
    "sequence": (ATTENTION, ATTENTION_ARGS, {"x": P(None, "x"), "wq": P()}, (4,)),
    "a scan over layers": (LAYERS, LAYERS_ARGS, {"a": P(None, None, "y"), "x": P("x")}, (4, 2)),
}
QUICK_FORWARDS = ("tensor parallel", "both axes on one dimension", "both, the other way round", "a scan over layers")

SHAPES = {"wq": (64, 4, 16), "wk": (64, 4, 16), "wv": (64, 4, 16), "wo": (4, 16, 64), "up": (64, 256), "down": (256, 64)}
DRAW = np.random.default_rng(0)
BLOCK_PARAMS = {name: 0.1 * DRAW.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
BLOCK_BATCH = tuple(DRAW.standard_normal((64, 32, 64), np.float32) for _ in range(2))
BLOCK_ARGS = BLOCK_PARAMS, {name: 0 * leaf for name, leaf in BLOCK_PARAMS.items()}, *BLOCK_BATCH

BLOCKS = {"as planned": {}, "some pinned": {"x": P("x"), "params/up": P(None, "y"), "params/wq": P(None, "y")}}
"""Of a block's train step: pins."""

WIDE_ARGS = {"a": array(64, 96), "b": array(96), "c": array(96, 32)}, array(1536, 64), array(1536, 32)
SHOWN = """\
Place the arguments (jax.device_put, or plan.in_shardings):
  a: P(None, 'y')
  b: P('y',)
  c: P('y',)
  x: P('x',)

Write:
  plain.py:8  o = jnp.matmul(h, c)
    out_sharding=P('x',) for dot_general, float32[1536,32] (jnp.matmul, jnp.einsum or jax.lax.dot_general)
    jax.sharding.reshard(_, P('x', 'y')) of the result of dot_general, float32[1536,32]: dot_general at plain.py:8
  plain.py:9  return jnp.sum(o, axis=0)
    jax.sharding.reshard(_, P(None, 'y')) of operand 0 of reduce_sum, float32[1536,32]: dot_general at plain.py:8"""

STEPS = {
    "data parallel": ({"x": P("x"), "y": P("x"), "params": P()}, (4,)),
    "tensor parallel": ({"params/a": P(None, "x"), "params/b": P("x"), "params/c": P("x"), "x": P(), "y": P()}, (4,)),
    "sharded weights": ({"params/a": P("x"), "params/c": P("x"), "x": P("x"), "y": P("x")}, (4,)),
    "data and tensor parallel": ({"params/a": P(None, "y"), "params/c": P("y"), "x": P("x"), "y": P("x")}, (3, 2)),
}


def module_of(path, text):
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(text, calls):
    """The program with the calls written where they are said to stand: each line has one call of a function, and an operand is
    known by the argument, or the line, that it comes from."""
    lines = text.splitlines()
    targets = {number: line.split("=")[0].split(",")[0].strip() for number, line in enumerate(lines, 1) if " = " in line}
    for number in {call.line for call in calls}:
        line = lines[number - 1]
        back = "return " if "return " in line else ""
        tree = ast.parse(line.strip().removeprefix(back))
        inner = tree.body[0].value
        for call in (call for call in calls if call.line == number):
            spec = ast.parse(repr(call.spec).replace("PartitionSpec", "P"), mode="eval").body
            if call.call == "out_sharding":
                inner.keywords.append(ast.keyword("out_sharding", spec))
            elif call.operand >= 0:
                _, at, made = call.what.rpartition(":")
                visitor = Operand(targets[int(made)] if at else call.what, spec)
                visitor.visit(inner)
                assert visitor.done, f"{line} has no {call.what}"
            else:
                tree.body[0].value = resharded(tree.body[0].value, spec)
        indent = line[: len(line) - len(line.lstrip())]
        lines[number - 1] = indent + back + ast.unparse(ast.fix_missing_locations(tree))
    return "\n".join(lines)


class Operand(ast.NodeTransformer):
    """Reshards one operand: a variable, or an input by its path (params/a is params["a"])."""

    def __init__(self, name, spec):
        self.wanted = "".join(part if not k else f"['{part}']" for k, part in enumerate(name.split("/")))
        self.spec, self.done = spec, False

    def generic_visit(self, node):
        value = node
        while isinstance(value, ast.Call) and ast.unparse(value.func) == "jax.sharding.reshard":  # a step after others
            value = value.args[0]
        if ast.unparse(value) == self.wanted and not self.done:
            self.done = True
            return resharded(node, self.spec)
        return super().generic_visit(node)


def resharded(value, spec):
    return ast.Call(ast.parse("jax.sharding.reshard", mode="eval").body, [value, spec], [])


def fast_links():
    """A machine on which moving is cheap, so that small programs are split in many ways."""
    given = machine("v4")
    inner, outer = (
        replace(link, seconds_per_byte=link.seconds_per_byte / 1000, latency_seconds=0.0) for link in (given.inner, given.outer)
    )
    return replace(given, name="v4 with fast links", inner=inner, outer=outer, matmul_reads={})


def said_and_done(tmp_path, text, args, plan_of, steps=1):
    """(what is said, the plan beside what the program with it compiles to); both programs compute the same, also after some
    steps."""
    plain = module_of(tmp_path / "plain.py", text)
    plan = plan_of(plain.step)
    said = plan.export("explicit")
    assert not said.refused, str(said)
    assert {call.file for call in said.calls} <= {str(tmp_path / "plain.py"), ""}
    program = module_of(tmp_path / "explicit.py", written(text, [call for call in said.calls if call.primitive != "return"]))
    at_the_end = {call.by: call.spec for call in said.calls if call.primitive == "return"}

    def step(*args):
        def resharded(path, leaf):
            spec = at_the_end.get(jax.tree_util.keystr(path, simple=True, separator="/"))
            return leaf if spec is None else jax.sharding.reshard(leaf, spec)

        return jax.tree_util.tree_map_with_path(resharded, program.step(*args))

    mesh = Mesh(plan.mesh.devices, plan.mesh.axis_names, axis_types=(AxisType.Explicit,) * len(plan.axis_sizes))
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), args, plan.in_specs)
        jitted, planned, alone = jax.jit(step), tuple(placed), tuple(args)
        for _ in range(steps):
            got, want = jitted(*planned), jax.jit(plain.step)(*alone)
            assert_close(jax.tree.map(np.asarray, want), got)
            for leaf, spec in zip(jax.tree.leaves(got), jax.tree.leaves(plan.out_shardings), strict=True):
                assert leaf.sharding.is_equivalent_to(spec, leaf.ndim)
            if steps > 1:  # all but the last result go round
                planned, alone = (*got[:-1], *planned[len(got) - 1 :]), (*want[:-1], *alone[len(want) - 1 :])
        return said, compare(plan, jaxplan.audit(jitted, *placed, mesh=mesh))


def in_turn(names, quick):
    """The names, all but the quick ones in the slow tests."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", in_turn(FORWARDS, QUICK_FORWARDS))
def test_the_calls_written_into_the_program_compile_to_the_planned_exchanges(name, tmp_path):
    text, args, pins, sizes = FORWARDS[name]
    said, found = said_and_done(
        tmp_path, text, args, lambda step: jaxplan.make_plan(step, *args, mesh=mesh_of(sizes), machine=fast_links(), pins=pins)
    )
    print(said, found)
    assert {row.status for row in found.exchanges} <= {"matched"}
    assert found.compiled == pytest.approx(found.predicted)


@pytest.mark.parametrize("name", in_turn(STEPS, ("data and tensor parallel",)))
def test_train_steps_that_shard_as_people_do_send_what_was_planned_too(name, tmp_path):
    pins, sizes = STEPS[name]

    def plan_of(step):
        unrounded = replace(machine("v5e"), matmul_reads={})  # the CPU's compiler sends float32
        return jaxplan.make_plan(step, *WIDE_ARGS, mesh=mesh_of(sizes), machine=unrounded, pins=pins)

    said, found = said_and_done(tmp_path, NETWORK, WIDE_ARGS, plan_of, steps=3)
    print(said, found)
    assert found.compiled == pytest.approx(found.predicted)  # a reduce-scatter and an all-gather of it may come as an all-reduce


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_trains_alike_and_loses_little_in_the_backward_pass(name, tmp_path):
    """Gradients are typed as what they are gradients of, so that an exchange planned for a gradient alone may come as another."""

    def plan_of(step):
        unrounded = replace(machine("v5e"), matmul_reads={})
        return jaxplan.make_plan(step, *BLOCK_ARGS, mesh=mesh_of((4, 2)), machine=unrounded, pins=BLOCKS[name])

    said, found = said_and_done(tmp_path, BLOCK, BLOCK_ARGS, plan_of, steps=4)
    print(said, found)
    assert said.calls
    assert sum(found.compiled.values()) <= 1.2 * sum(found.predicted.values())


def test_the_page(tmp_path):
    plain = module_of(tmp_path / "plain.py", FORWARD)
    pins = {"a": P(None, "y"), "b": P("y"), "c": P("y"), "x": P("x")}
    args = array(64, 96), array(96), array(96, 32), array(1536, 64)
    plan = jaxplan.make_plan(plain.step, *args, mesh=mesh_of((4, 2)), machine="v5e", pins=pins)
    assert str(plan.export("explicit")) == SHOWN


def test_a_pipeline_cannot_be_said():
    plan = jaxplan.make_plan(lambda x: x + 1, array(2), mesh=mesh_of((4,)), machine="v5e")
    with pytest.raises(jaxplan.ExportError, match="along the layers, as a pipeline, which layouts in types cannot say"):
        replace(plan, pipeline=object()).export("explicit")


def test_a_plan_that_replicates_everything_needs_nothing():
    plan = jaxplan.make_plan(lambda x: x + 1, array(2), mesh=mesh_of((4,)), machine="v5e")
    assert str(plan.export("explicit")).endswith("Nothing else has to be written.")
    assert plan.export("explicit").calls == ()


REAL = ("decoder_scan", "resnet_momentum", "moe", "decode_kv", "conjugate_gradient")


@pytest.mark.parametrize("name", in_turn(REAL, ("moe", "decode_kv")))
def test_real_programs_are_gone_through(name):
    program = programs()[name]
    plan = jaxplan.make_plan(program.fn, *program.args, mesh=mesh_of((4, 2)), machine=fast_links())
    said = plan.export("explicit")
    assert said.calls and all(call.line for call in said.calls if call.primitive != "return")
    lines = {call.file: Path(call.file).read_text().splitlines() for call in said.calls if call.file}
    for call in said.calls:
        assert not call.file or lines[call.file][call.line - 1].strip() in str(said)
