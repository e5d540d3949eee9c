"""Coverage: the table knows every primitive of the installed JAX, or says why not; and docs/primitives.md says so."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxplan import _jax
from jaxplan.rules import classify, rule_of
from jaxplan.rules.whole import DELIBERATELY_WHOLE

ROOT = Path(__file__).parent.parent


def load(name: str) -> ModuleType:
    """A script as a module, once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


listing = load("list_primitives")


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def i32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of inner jaxprs in place of the equation that holds them."""
    for equation in jaxpr.eqns:
        inner = list(_jax.sub_jaxprs(equation))
        if inner and classify(equation.primitive) == "unknown":
            for sub in inner:
                yield from equations(sub)
        else:
            yield equation


KEY = jax.eval_shape(lambda: jax.random.key(0))


def transformer_step(params: Any, tokens: Any, key: Any) -> Any:
    def block(x: Any, layer: Any) -> Any:
        h = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-6) * layer["scale"]
        q, k, v = (jnp.einsum("bsd,dhk->bshk", h, layer[name]) for name in ("wq", "wk", "wv"))
        s = jnp.einsum("bshk,bthk->bhst", q, k) / 8
        mask = jnp.tril(jnp.ones((s.shape[-1], s.shape[-1]), bool))
        p = jax.nn.softmax(jnp.where(mask, s, -jnp.inf))
        x = x + jnp.einsum("bhst,bthk,hkd->bsd", p, v, layer["wo"])
        gate = lax.top_k(x @ layer["router"], 2)[1]
        expert = jax.nn.one_hot(gate, 4).sum(-2)
        y = jnp.einsum("bsd,bse,edf->bsf", x, expert, layer["up"])
        return x + jax.nn.gelu(y) @ layer["down"], jnp.cumsum(expert, 0)

    def loss(params: Any) -> Any:
        x = params["embed"][tokens[:, :-1]]
        x = jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x / 0.9, 0)
        x, _ = lax.scan(jax.checkpoint(block), x, params["layers"])
        logits = (x @ params["embed"].T).astype(jnp.float32)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)
        return -picked.mean()

    value, grads = jax.value_and_grad(loss)(params)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: g * jnp.minimum(1, 1 / norm), grads)
    return value, jax.tree.map(lambda p, g: p - 1e-3 * jnp.sign(g), params, grads)


def vision_step(params: Any, images: Any, labels: Any) -> Any:
    def loss(params: Any) -> Any:
        x = lax.conv_general_dilated(images, params["stem"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu((x - x.mean((0, 1, 2))) / jnp.std(x, (0, 1, 2)))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = jnp.roll(jnp.concatenate([x, x[:, ::-1]], 1), 1, axis=2)
        logits = x.mean((1, 2)) @ params["head"]
        correct = logits.argmax(-1) == labels
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[jnp.arange(8), labels]), correct.mean()

    return jax.value_and_grad(loss, has_aux=True)(params)


def odds_and_ends(x: Any, key: Any) -> Any:
    a, b = jnp.split(x, 2)
    y = jnp.stack([jnp.tile(a, (2, 1)), jnp.repeat(b, 2, axis=0)], 1)
    z = jnp.linalg.solve(x.T @ x + jnp.eye(6), jnp.linalg.svd(x)[2])
    noise = jax.random.normal(key, x.shape) + jax.random.gamma(key, 2.0, x.shape)
    chosen = jax.random.categorical(key, x) + jax.random.permutation(key, 8)
    cache = lax.dynamic_update_slice(x, x[:1], (chosen[0], 0))
    cache = cache.at[chosen].max(1.0).at[chosen, chosen].multiply(2.0)
    return (
        y,
        z,
        noise,
        cache,
        jnp.sort(x),
        jnp.fft.rfft(x),
        jnp.quantile(x, 0.5),
        jnp.median(x),
        jnp.unwrap(x),
    )


def layers(d: int) -> dict[str, Any]:
    shapes = {"scale": (d,), "wq": (d, 4, 8), "wk": (d, 4, 8), "wv": (d, 4, 8), "wo": (4, 8, d)}
    shapes |= {"router": (d, 4), "up": (4, d, 64), "down": (64, d)}
    return {name: f32(3, *shape) for name, shape in shapes.items()}


STEPS = [
    (transformer_step, ({"embed": f32(50, 16), "layers": layers(16)}, i32(4, 9), KEY)),
    (vision_step, ({"stem": f32(7, 7, 3, 16), "head": f32(16, 10)}, f32(8, 32, 32, 3), i32(8))),
    (odds_and_ends, (f32(8, 6), KEY)),
]


@pytest.mark.parametrize("step, args", STEPS, ids=lambda value: getattr(value, "__name__", ""))
def test_nothing_is_unknown(step: Callable[..., Any], args: tuple[Any, ...]) -> None:
    unknown = set()
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # users may be lax
        closed = jax.make_jaxpr(step)(*args)
    for equation in equations(closed.jaxpr):
        avals = ([v.aval for v in side] for side in (equation.invars, equation.outvars))
        rule = rule_of(equation.primitive, equation.params, *avals)
        if not rule.known:
            unknown.add(equation.primitive)
        for terminals, variables in ((rule.operands, equation.invars), (rule.results, equation.outvars)):
            assert [len(dims) for dims in terminals] == [v.aval.ndim for v in variables]
    assert not unknown


# --- every primitive that the installed JAX has ----------------------------------------------------------------------


def missing() -> list[str]:
    return [primitive.name for primitive in listing.installed_primitives() if listing.class_of(primitive) == "missing"]


def test_every_primitive_is_in_a_class() -> None:
    names = missing()
    assert not names, (
        f"jax {jax.__version__} has primitives that nobody has thought about: {names}. Give each a rule (docs/rules.md) or a "
        "reason (jaxplan/rules/whole.py), then run scripts/list_primitives.py."
    )


def test_the_listing_finds_what_programs_are_made_of() -> None:
    found = {primitive.name for primitive in listing.installed_primitives()}
    assert len(found) > 250
    assert found >= {"add", "dot_general", "fft", "random_bits", "scan", "shard_map", "top_k", "custom_linear_solve", "ffi_call"}


def test_a_primitive_that_nobody_has_thought_about_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("jax._src.brand_new")
    module.brand_new_p = _jax.Primitive("brand_new")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert missing() == ["brand_new"]


def test_what_has_a_rule_is_not_called_whole() -> None:
    ruled = {primitive.name for primitive in listing.installed_primitives() if classify(primitive) != "unknown"}
    assert not ruled & DELIBERATELY_WHOLE.keys()
    assert {"pallas_call", "ffi_call", "bcoo_dot_general"} <= DELIBERATELY_WHOLE.keys()


def test_examples_have_the_ranks_of_their_rules() -> None:
    table = listing.examples()
    for primitive in listing.installed_primitives():
        if listing.class_of(primitive) in ("known", "free"):
            worked = listing.work_out(primitive, table)
            assert worked.rule.known and worked.rule.free == (classify(primitive) == "free")
            for terminals, avals in ((worked.rule.operands, worked.operands), (worked.rule.results, worked.results)):
                assert [len(dims) for dims in terminals] == [len(getattr(aval, "shape", ())) for aval in avals], primitive


def test_a_wrong_guess_at_an_example_says_so() -> None:
    with pytest.raises(LookupError, match="add an example of 'brand_new'"):
        listing.example_of(_jax.Primitive("brand_new"), {})


# --- the page --------------------------------------------------------------------------------------------------------


def script(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a process of its own: what else is imported here is in no public module."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "list_primitives.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_page_is_what_the_script_writes() -> None:
    done = script("--check")
    assert done.returncode == 0, done.stdout + done.stderr
    if listing.version_of(listing.PAGE.read_text(encoding="utf-8")) != jax.__version__:
        assert "not judged" in done.stdout


def test_a_stale_page_is_caught(tmp_path: Path) -> None:
    page = tmp_path / "primitives.md"
    assert script("--check", "--output", str(page)).returncode == 1
    assert script("--output", str(page)).returncode == 0
    page.write_text(page.read_text(encoding="utf-8").replace("dot_general", "dot_particular"), encoding="utf-8")
    done = script("--check", "--output", str(page))
    assert done.returncode == 1 and "is stale" in done.stdout


@pytest.mark.parametrize(
    ("example", "split", "seconds"),
    [
        ("dot_general", "k", "max(2 B K M N/n r, (4 B K M/n + 4 B K N/n + 4 B M N) m) + 8 B M N (n-1)/n g + 2 l"),
        ("reduce_window_sum", "j", "max(I J K/n r, 8 I J/n m) + 8 I g + l"),
        ("exp", "i", "max(I J/n r, 8 I J/n m)"),
        ("transpose", "i", "8 I J/n m"),
        ("top_k", "i", "max(2 I J/n r, (4 I J/n + 16 I/n) m)"),
    ],
)
def test_costs_are_written_in_closed_form(example: str, split: str, seconds: str) -> None:
    primitive = next(p for p in listing.installed_primitives() if p.name == example)
    assert listing.cost_of(listing.work_out(primitive, listing.examples())) == (split, seconds)
