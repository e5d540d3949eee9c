"""`scripts/compare_tools.py` on this side of the other tool: what it gives it, and what it says of the outcome."""

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxplan.examples import mixture, programs

SCRIPT = Path(__file__).parent.parent / "scripts" / "compare_tools.py"
spec = importlib.util.spec_from_file_location("compare_tools", SCRIPT)
assert spec is not None and spec.loader is not None
compare_tools = sys.modules["compare_tools"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare_tools)
Outcome = compare_tools.Outcome


def loss_alone(fn):
    """The last result of a step; the compiler drops what it does not need."""
    return jax.jit(lambda *args: fn(*args)[-1])


@pytest.mark.parametrize("name", ["mlp_sgd", "decoder_unrolled"])
def test_tuples_for_lists_change_no_value(name):
    program = programs()[name]
    args = program.make_args(0)
    given = compare_tools.tuples(args)
    assert "[" in str(jax.tree.structure(args)) and "[" not in str(jax.tree.structure(given))
    step = compare_tools.without_lists(program.fn, program.args)
    assert "[" not in str(jax.tree.structure(jax.eval_shape(step, *given)))
    assert compare_tools.difference(loss_alone(step)(*given), loss_alone(program.fn)(*args)) == 0.0


def cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1).mean()


def balanced(predicted, params, x, y):
    _, balance = mixture.layer(params, x, mixture.SMALL)
    return jnp.square(x + predicted - y).mean() + mixture.SMALL.balance * balance


LOSSES = {
    "mlp_sgd": lambda predicted, params, x, y: jnp.square(predicted - y).mean(),
    "decoder_scan": lambda logits, params, state, batch: cross_entropy(logits, batch["targets"]),
    "decoder_unrolled": lambda logits, params, state, batch: cross_entropy(logits, batch["targets"]),
    "resnet_momentum": lambda logits, *rest: cross_entropy(logits, rest[-1]),
    "moe": balanced,
}


@pytest.mark.parametrize("name", programs())
def test_forward_pass_has_the_loss_of_the_step(name):
    program = programs()[name]
    assert compare_tools.applies("parallax model", name) == (name in LOSSES)
    if name in LOSSES:
        args = program.make_args(0)
        forward, inputs_of = compare_tools.forward_pass(name, "small")
        loss = jax.jit(lambda *args: LOSSES[name](forward(args[0], *inputs_of(args)), *args))(*args)
        np.testing.assert_allclose(loss, loss_alone(program.fn)(*args), rtol=1e-5)


def test_state_lies_like_the_parameters():
    params = {"w": jnp.zeros((2, 4)), "b": jnp.zeros(4)}
    specs = {"w": P(None, "model"), "b": P("model")}
    state = {"mu": params, "count": jnp.zeros((), jnp.int32), "other": {"w": jnp.zeros((3, 3)), "b": jnp.zeros(4)}}
    found = compare_tools.like_parameters(state, params, specs, P())
    assert found == {"mu": specs, "count": P(), "other": {"w": P(), "b": P()}}


def test_an_attempt_that_works_and_one_that_does_not(monkeypatch):
    found = compare_tools.attempt("stencil", "jaxplan", "4x2", "small")
    assert found.right and found.difference == 0.0 and found.plan_seconds > 0 and found.flops is not None
    assert Outcome(**json.loads(json.dumps(asdict(found)))) == found

    def broken(program, size, mesh):
        raise AssertionError("first\nsecond")

    monkeypatch.setitem(compare_tools.TOOLS, "jaxplan", broken)
    failed = compare_tools.attempt("stencil", "jaxplan", "4x2", "small")
    assert not failed.right and failed.failed == "planning" and failed.error == "AssertionError: first (in broken)"

    def wrong(program, size, mesh):
        return 0.0, jax.jit(lambda u, f: program.fn(u, f) + 1.0)

    monkeypatch.setitem(compare_tools.TOOLS, "jaxplan", wrong)
    different = compare_tools.attempt("stencil", "jaxplan", "4x2", "small")
    assert not different.failed and not different.right and different.difference > 0.1


def outcome(program="mlp_sgd", size="small", mesh="4x2", tool="jaxplan", **rest):
    return Outcome(program, size, mesh, tool, **rest)


def test_words_for_outcomes():
    right, wrong = outcome(difference=0.0), outcome(mesh="8x1", difference=1.0)
    failed = outcome(mesh="1x8", failed="planning", error="ValueError: no")
    assert compare_tools.cell([right]) == "yes"
    assert compare_tools.cell([right, wrong, failed]) == "on 4x2"
    assert compare_tools.cell([wrong]) == "**wrong values**"
    assert compare_tools.cell([failed]) == "no: fails in planning"
    assert compare_tools.cell([outcome(difference=float("nan"))]) == "**wrong values**"
    assert compare_tools.cell([]) == "not a model"


def test_page():
    full = outcome(size="full", plan_seconds=0.5, sent=12345.0, sent_as_compiled=20000.0, flops=2e6, peak=3e6)
    failed = outcome(tool="parallax jit", failed="planning", error="ValueError: no (in f)")
    loop = outcome(program="stencil", tool="parallax jit", failed="planning", error="ValueError: loop (in f)")
    rows = [outcome(difference=0.0), failed, outcome(program="stencil", difference=0.0), loop, full]
    text = compare_tools.page(rows, {"jax": "0.10.2", "flax": "0.12.8", "google-parallax": "0.0.2"})
    assert "| mlp_sgd | yes | no: fails in planning | not a model |" in text
    assert "| stencil | yes | no: fails in planning (not designed for it) | not a model |" in text
    assert "| mlp_sgd | 4x2 | jaxplan | 0.500 | 12,345 | 20,000 | 2.00 | 3.00 | not run |" in text
    assert "- mlp_sgd (small), parallax jit, planning: `ValueError: no (in f)`" in text


def test_a_process_that_takes_too_long_is_recorded(monkeypatch):
    (found, *others) = compare_tools.outcomes(Path(sys.executable), "mlp_sgd", "jaxplan", "small", 0.01)
    assert len(others) == len(compare_tools.MESHES) - 1
    assert found.failed and found.error.startswith("not done within 0.01 s")
