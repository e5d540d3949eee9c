"""The examples run, learn and agree; the hand plans compute the same and move what they say."""

import inspect
import math
import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxplan.examples import Program, programs
from jaxplan.examples.adamw import AdamW, adamw_init, adamw_update
from jaxplan.examples.by_hand import PLANS, batch_axes, by_hand, hand_plan
from jaxplan.examples.conjugate_gradient import conjugate_gradient
from jaxplan.examples.decode import decode_kv, empty_cache
from jaxplan.examples.decoder import SMALL, DecoderConfig, decoder, decoder_loss, unstacked
from jaxplan.examples.mixture import MixtureConfig, route
from jaxplan.examples.stencil import GridConfig, stencil

NAMES = (
    "mlp_sgd", "decoder_scan", "decoder_unrolled", "resnet_momentum", "moe", "decode_kv",
    "conjugate_gradient", "stencil",
)  # fmt: skip
TRAINED = NAMES[:5]
TINY = DecoderConfig(layers=2, width=32, heads=8, mlp_width=64, vocabulary=96, sequence=8, batch=16)


@cache
def small() -> dict[str, Program]:
    return programs()


def shapes_of(tree: object) -> object:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize("size", ["small", "full"])
def test_every_program_is_listed_under_its_name(size: str) -> None:
    found = programs(size)
    assert tuple(found) == NAMES
    assert all(program.name == name for name, program in found.items())


def test_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="'huge'; it may be 'small' or 'full'"):
        programs("huge")


@pytest.mark.parametrize("name", NAMES)
def test_no_program_knows_of_sharding(name: str) -> None:
    source = inspect.getsource(inspect.getmodule(small()[name].fn))
    assert not re.search(r"sharding|Mesh|PartitionSpec|shard_map", source)


@pytest.mark.parametrize("name", NAMES)
def test_state_comes_back_in_its_own_shape(name: str) -> None:
    for program in (small()[name], programs("full")[name]):
        results = jax.eval_shape(program.fn, *program.args)
        for result, argument in enumerate(program.donate):
            assert shapes_of(results[result] if isinstance(results, tuple) else results) == shapes_of(
                program.args[argument]
            )


@pytest.mark.parametrize("name", NAMES)
def test_runs_and_learns(name: str) -> None:
    program = small()[name]
    state = program.make_args(0)
    assert shapes_of(state) == shapes_of(program.args)
    step = jax.jit(program.fn)
    results = step(*state)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(results))
    if name not in TRAINED:
        return
    losses = [float(results[-1])]
    for _ in range(4):
        state = (*results[:-1], *state[len(results) - 1 :])
        results = step(*state)
        losses.append(float(results[-1]))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.97 * losses[0]


def test_two_seeds_give_two_sets_of_values() -> None:
    program = small()["mlp_sgd"]
    assert not np.array_equal(program.make_args(0)[1], program.make_args(1)[1])


def flat(args: tuple) -> tuple:
    """The scan form's arguments as the unrolled form takes them."""
    params, opt_state, batch = args
    moments = {name: unstacked(opt_state[name]) for name in ("mu", "nu")}
    return unstacked(params), opt_state | moments, batch


@cache
def tiny_args() -> tuple:
    return jax.device_get(decoder(TINY).make_args(0))


@cache
def tiny_results() -> tuple:
    return jax.device_get(jax.jit(decoder(TINY).fn)(*tiny_args()))


def tiny_loss(**changes: object) -> float:
    params, _, batch = tiny_args()
    return float(jax.jit(decoder_loss, static_argnums=2)(params, batch, replace(TINY, **changes)))


def test_the_decoders_forms_agree() -> None:
    assert shapes_of(flat(tiny_args())) == shapes_of(decoder(TINY, "unrolled").args)
    got = jax.jit(decoder(TINY, "unrolled").fn)(*flat(tiny_args()))
    wanted = flat(tiny_results())
    np.testing.assert_allclose(got[2], wanted[2], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-3), got[1], wanted[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-4), got[0], wanted[0])


def test_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="'rolled'; it may be 'scan' or 'unrolled'"):
        decoder(TINY, "rolled")


def test_a_variant_of_the_decoder_has_the_same_loss() -> None:
    loss = float(tiny_results()[2])
    assert tiny_loss(fuse_projections=True, remat=False) == pytest.approx(loss, rel=1e-6)
    assert tiny_loss(compute_dtype=jnp.dtype("bfloat16")) == pytest.approx(loss, rel=2e-2)


def test_clipping_bounds_the_global_norm_and_scales_do_not_decay() -> None:
    params = {"w": np.full((4, 2), 2, np.float32), "a_scale": np.ones(3, np.float32)}
    gradients = {"w": np.full((4, 2), 3, np.float32), "a_scale": np.zeros(3, np.float32)}
    settings = AdamW(clip_norm=0.5)
    new, state = adamw_update(settings, gradients, adamw_init(params), params)
    norm = math.sqrt(sum(float(jnp.sum(jnp.square(m))) for m in jax.tree.leaves(state["mu"])))
    assert norm == pytest.approx((1 - settings.b1) * 0.5, rel=1e-5)
    np.testing.assert_allclose(new["w"], 2 - settings.learning_rate * (1 + 0.1 * 2), rtol=1e-5)
    np.testing.assert_allclose(new["a_scale"], 1)


def test_decoding_token_by_token_agrees_with_the_training_loss() -> None:
    params, _, batch = tiny_args()
    step, cache_ = jax.jit(decode_kv(TINY).fn), empty_cache(TINY)
    total = 0.0
    for position in range(TINY.sequence):
        cache_, logits = step(params, cache_, batch["tokens"][:, position], np.int32(position))
        log_p = jax.nn.log_softmax(logits)
        total -= float(jnp.mean(log_p[np.arange(TINY.batch), batch["targets"][:, position]]))
    assert total / TINY.sequence == pytest.approx(float(tiny_results()[2]), rel=1e-5)


def test_conjugate_gradient_solves() -> None:
    program = conjugate_gradient()
    matrix, b, x0 = program.make_args(0)
    x = jax.jit(program.fn)(matrix, b, x0)
    np.testing.assert_allclose(matrix @ x, b, atol=1e-3)


def test_stencil_is_jacobi() -> None:
    program = stencil(GridConfig(rows=6, columns=5, sweeps=3))
    u, f = (np.asarray(array) for array in program.make_args(0))
    relaxed = jax.jit(program.fn)(u, f)
    for _ in range(3):
        wide = np.pad(u, 1)
        u = np.stack([
            [(wide[i, j + 1] + wide[i + 2, j + 1] + wide[i + 1, j] + wide[i + 1, j + 2] + f[i, j]) / 4
             for j in range(5)] for i in range(6)
        ])  # fmt: skip
    np.testing.assert_allclose(relaxed, u, rtol=1e-5, atol=1e-6)


def test_routing_fills_every_slot_at_most_once() -> None:
    config = MixtureConfig(capacity_factor=0.5)
    logits = jax.random.normal(
        jax.random.key(0), (config.batch, config.sequence, config.experts), jnp.float32
    )
    dispatch, combine, balance = jax.jit(lambda x: route(x, config))(logits)
    assert float(jnp.max(jnp.sum(dispatch, axis=1))) <= 1
    assert float(jnp.max(jnp.sum(dispatch, axis=(2, 3)))) <= config.chosen
    assert np.all((np.asarray(combine) > 0) == (np.asarray(dispatch) > 0))
    assert 0.5 < float(balance) < 2


def mesh_of(*shape: int) -> Mesh:
    names = ("data", "model") if len(shape) == 2 else ("a", "b", "c")[: len(shape)]
    return Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), names)


def collectives(hlo: str) -> list[tuple[str, tuple[int, ...]]]:
    """Kind and shape of every result of every collective, as the text has them: a loop's once."""
    found = []
    for types, kind in re.findall(
        r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", hlo
    ):
        for dims in re.findall(r"\w\d+\[([\d,]*)\]", types):
            found.append((kind, tuple(int(d) for d in dims.split(",") if d)))
    return found


@pytest.mark.parametrize("name", PLANS)
def test_a_hand_plan_computes_the_same_and_moves_what_it_says(name: str) -> None:
    mesh = mesh_of(4, 2)
    args, wanted = flat(tiny_args()), flat(tiny_results())
    step, in_shardings, out_shardings = by_hand(name, TINY, mesh, "unrolled")
    compiled = step.lower(*decoder(TINY, "unrolled").args).compile()
    got = compiled(*jax.device_put(args, in_shardings))
    # The moments are the gradients; a parameter's first AdamW step is all but their sign, and says little.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-3), got[1], wanted[1])
    np.testing.assert_allclose(got[2], wanted[2], rtol=1e-6)
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(), got, out_shardings)

    found = collectives(compiled.as_text())
    kinds = {kind for kind, _ in found}
    state = sum(leaf.size for leaf in jax.tree.leaves(args[0]))
    embedding = args[0]["embedding"].size
    reduced = sum(math.prod(shape) for kind, shape in found if kind == "all-reduce")
    activation = (TINY.batch // 4, TINY.sequence, TINY.width)
    sums = found.count(("all-reduce", activation))
    gathers = found.count(("all-gather", activation))
    match name:
        case "data_parallel":
            assert kinds == {"all-reduce"} and reduced == state + embedding + 1
        case "data_parallel_mapped":
            assert kinds == {"all-reduce"} and reduced == state + 1
        case "zero3":
            assert kinds == {"all-gather", "all-reduce"} and reduced == state + embedding + 1
            assert all(len(shape) < 3 or TINY.heads in shape for _, shape in found)
        case "zero3_mapped":
            assert kinds == {"all-gather", "all-reduce", "reduce-scatter"} and reduced < state / 50
        case "megatron":  # a layer's five: two forward, one again for the backward pass, two backward
            assert kinds == {"all-reduce"} and sums == 5 * TINY.layers + 2
        case "megatron_sequence":
            assert kinds == {"all-gather", "all-reduce"} and sums == 5 * TINY.layers + 2
            assert gathers == 6 * TINY.layers + 2


@pytest.mark.parametrize(("name", "shape"), [("megatron_sequence", (8,)), ("zero3_mapped", (2, 2, 2))])
def test_a_hand_plan_takes_any_mesh_and_form(name: str, shape: tuple[int, ...]) -> None:
    step, in_shardings, _ = by_hand(name, TINY, mesh_of(*shape), "scan")
    loss = step(*jax.device_put(tiny_args(), in_shardings))[2]
    np.testing.assert_allclose(loss, tiny_results()[2], rtol=1e-6)


def test_the_batch_takes_the_axes_that_use_most_devices() -> None:
    assert batch_axes(mesh_of(4, 2), 16) == ("data", "model")
    assert batch_axes(mesh_of(4, 2), 4) == ("data",)
    assert batch_axes(mesh_of(2, 4), 4) == ("model",)
    assert batch_axes(mesh_of(4, 2), 3) == ()


def test_a_hand_plan_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="no hand plan 'magic'; there are data_parallel"):
        hand_plan("magic", SMALL, mesh_of(4, 2))
    with pytest.raises(ValueError, match="heads of 1 do not divide over 'model', which has 2"):
        hand_plan("megatron", replace(SMALL, heads=1), mesh_of(4, 2))
    with pytest.raises(ValueError, match="sequence of 7 does not divide over 'model'"):
        hand_plan("megatron_sequence", replace(SMALL, sequence=7), mesh_of(4, 2))
