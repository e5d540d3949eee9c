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
    "three axes": (FORWARD, FORWARD_ARGS, {"x": P("x", "z"), "a": P("y")}, (2, 2, 2)),
    "heads": (ATTENTION, ATTENTION_ARGS, {"wq": P(None, "y"), "x": P("x")}, (4, 2)),
    "sequence": (ATTENTION, ATTENTION_ARGS, {"x": P(None, "x"), "wq": P()}, (4,)),
    "a scan over layers": (LAYERS, LAYERS_ARGS, {"a": P(None, None, "y"), "x": P("x")}, (4, 2)),
}

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
    return replace(given, name="v4 with fast links", inner=inner, outer=outer)


def said_and_done(tmp_path, text, args, plan_of):
    """(what is said, the plan beside what the program with it compiles to); both programs compute the same."""
    plain = module_of(tmp_path / "plain.py", text)
    plan = plan_of(plain.step)
    said = plan.export("explicit")
    assert not said.refused, str(said)
    assert {call.file for call in said.calls} <= {str(tmp_path / "plain.py")}
    program = module_of(tmp_path / "explicit.py", written(text, said.calls))
    mesh = Mesh(plan.mesh.devices, plan.mesh.axis_names, axis_types=(AxisType.Explicit,) * len(plan.axis_sizes))
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), args, plan.in_specs)
        jitted = jax.jit(program.step)
        got = jitted(*placed)
        assert_close(jax.tree.map(np.asarray, jax.jit(plain.step)(*args)), got)
        for leaf, spec in zip(jax.tree.leaves(got), jax.tree.leaves(plan.out_shardings), strict=True):
            assert leaf.sharding.is_equivalent_to(spec, leaf.ndim)
        return said, compare(plan, jaxplan.audit(jitted, *placed, mesh=mesh))


@pytest.mark.parametrize("name", FORWARDS)
def test_the_calls_written_into_the_program_compile_to_the_planned_exchanges(name, tmp_path):
    text, args, pins, sizes = FORWARDS[name]
    said, found = said_and_done(
        tmp_path, text, args, lambda step: jaxplan.make_plan(step, *args, mesh=mesh_of(sizes), machine=fast_links(), pins=pins)
    )
    print(said, found)
    assert {row.status for row in found.exchanges} <= {"matched"}
    assert found.compiled == pytest.approx(found.predicted)


@pytest.mark.parametrize("name", STEPS)
def test_train_steps_that_shard_as_people_do_send_what_was_planned_too(name, tmp_path):
    pins, sizes = STEPS[name]

    def plan_of(step):
        return jaxplan.make_plan(step, *WIDE_ARGS, mesh=mesh_of(sizes), machine="v5e", pins=pins)

    said, found = said_and_done(tmp_path, NETWORK, WIDE_ARGS, plan_of)
    print(said, found)
    assert found.compiled == pytest.approx(found.predicted)  # a reduce-scatter and an all-gather of it may come as an all-reduce


def test_the_page(tmp_path):
    plain = module_of(tmp_path / "plain.py", FORWARD)
    pins = {"a": P(None, "y"), "b": P("y"), "c": P("y"), "x": P("x")}
    args = array(64, 96), array(96), array(96, 32), array(1536, 64)
    plan = jaxplan.make_plan(plain.step, *args, mesh=mesh_of((4, 2)), machine="v5e", pins=pins)
    assert str(plan.export("explicit")) == SHOWN


def test_a_plan_that_replicates_everything_needs_nothing():
    plan = jaxplan.make_plan(lambda x: x + 1, array(2), mesh=mesh_of((4,)), machine="v5e")
    assert str(plan.export("explicit")).endswith("Nothing else has to be written.")
    assert plan.export("explicit").calls == ()


@pytest.mark.parametrize("name", ["decoder_scan", "resnet_momentum", "moe", "decode_kv", "conjugate_gradient"])
def test_real_programs_are_gone_through(name):
    program = programs()[name]
    plan = jaxplan.make_plan(program.fn, *program.args, mesh=mesh_of((4, 2)), machine=fast_links())
    said = plan.export("explicit")
    assert said.calls and all(call.line for call in said.calls if call.primitive != "return")
    lines = {call.file: Path(call.file).read_text().splitlines() for call in said.calls if call.file}
    for call in said.calls:
        assert not call.file or lines[call.file][call.line - 1].strip() in str(said)
