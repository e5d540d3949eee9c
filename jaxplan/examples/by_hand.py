"""An expert's plans for the decoder, written by hand: the baselines a planner has to beat.

Each is the plain model of `decoder.py`, rematerialisation included, with its `constrain` hook filled in.
`by_hand` takes the plan's name:

- `data_parallel`: the batch over every mesh axis that divides it; the state on every device.
- `zero3`: the batch likewise; every matrix of the state over all axes, gathered a layer at a time for use.
- `megatron`: the last mesh axis over heads, MLP columns and vocabulary, the others over the batch
  (Shoeybi et al., 2019).
- `megatron_sequence`: the same, with the residual stream and the norms over the sequence on that last axis
  (Korthikanti et al., 2022).
- `data_parallel_mapped`, `zero3_mapped`: the first two with their collectives written out (`by_hand_mapped`).
  They are the stronger: the two gradients of the tied embedding are summed before they travel, not after,
  and gradients are reduce-scattered even where the compiler would merge their sums into one all-reduce.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from .by_hand_mapped import mapped_train_step
from .decoder import Constrain, DecoderConfig, Form, decoder, decoder_train_step

__all__ = ["PLANS", "HandPlan", "batch_axes", "by_hand", "hand_plan"]

MATRICES = ("embedding", "positions", "wq", "wk", "wv", "wo", "w_up", "w_down")


@dataclass(frozen=True)
class HandPlan:
    """A layout of the decoder on a mesh.

    Attributes:
      batch: spec of the tokens and the targets, (batch, sequence).
      state: spec by parameter name, as one layer has it; a name that is missing is on every device. The
        optimizer's moments lie as their parameter does.
      places: for a place of the model's hook, the specs to go through there one after the other. In the
        backward pass they are gone through in reverse.
      mapped: the collectives are written out instead of left to the compiler.
      fuse_projections: as in `DecoderConfig`.
    """

    batch: P
    state: Mapping[str, P]
    places: Mapping[str, tuple[P, ...]]
    mapped: bool = False
    fuse_projections: bool = False


def batch_axes(mesh: Mesh, batch: int) -> tuple[str, ...]:
    """The mesh axes, in order, over which `batch` divides with the most devices at work."""
    choices = [
        axes
        for count in range(len(mesh.axis_names) + 1)
        for axes in combinations(mesh.axis_names, count)
        if batch % math.prod(mesh.shape[axis] for axis in axes) == 0
    ]
    return max(choices, key=lambda axes: math.prod(mesh.shape[axis] for axis in axes))


def batch_places(batch: Any) -> dict[str, tuple[P, ...]]:
    """Every activation over its batch dimension alone."""
    wide = ("embedded", "residual", "norm", "projected", "final_norm", "mlp_hidden", "logits")
    heads = ("q", "k", "v", "scores", "attended")
    places: dict[str, tuple[P, ...]] = dict.fromkeys(wide, (P(batch, None, None),))
    return places | dict.fromkeys(heads, (P(batch, None, None, None),))


def data_parallel(config: DecoderConfig, mesh: Mesh) -> HandPlan:
    """Everything over the batch; one all-reduce of each gradient."""
    batch = batch_axes(mesh, config.batch)
    return HandPlan(P(batch, None), {}, batch_places(batch))


def zero3(config: DecoderConfig, mesh: Mesh) -> HandPlan:
    """Data parallel with each matrix split by its largest dimension that all devices divide."""
    batch, everything = batch_axes(mesh, config.batch), tuple(mesh.axis_names)
    state, places = {}, batch_places(batch)
    for name, shape in layer_shapes(config).items():
        dividing = [dim for dim, size in enumerate(shape) if size % mesh.size == 0]
        if name in MATRICES and dividing:
            widest = max(dividing, key=lambda dim: shape[dim])
            state[name] = P(*(everything if dim == widest else None for dim in range(len(shape))))
            places[f"weights/{name}"] = (state[name], P(*(None for _ in shape)))
    return HandPlan(P(batch, None), state, places)


def megatron(config: DecoderConfig, mesh: Mesh) -> HandPlan:
    """Heads, MLP columns and vocabulary over the last mesh axis, the batch over the others."""
    *data, model = mesh.axis_names
    for what, size in (("heads", config.heads), ("MLP", config.mlp_width), ("vocabulary", config.vocabulary)):
        if size % mesh.shape[model]:
            raise ValueError(f"{what} of {size} do not divide over {model!r}, which has {mesh.shape[model]}")
    batch = batch_axes(Mesh(mesh.devices[..., 0], tuple(data)), config.batch) if data else None
    state = dict.fromkeys(("wq", "wk", "wv"), P(None, model, None))
    state |= {"wo": P(model, None, None), "w_up": P(None, model), "w_down": P(model, None)}
    state["embedding"] = P(model, None)
    places = batch_places(batch)
    places |= dict.fromkeys(("q", "k", "v", "attended"), (P(batch, None, model, None),))
    places |= {
        "scores": (P(batch, model, None, None),),
        "mlp_hidden": (P(batch, None, model),),
        "logits": (P(batch, None, model),),
    }
    places |= {f"weights/{name}": (spec,) for name, spec in state.items()}
    return HandPlan(P(batch, None), state, places, fuse_projections=True)


def megatron_sequence(config: DecoderConfig, mesh: Mesh) -> HandPlan:
    """Megatron with everything between its matrix multiplications over the sequence on the last mesh axis.

    A sum comes down in two steps, to reduced and then to sliced: asked for at once, the compiler may compute
    the matrix multiplication again. A TPU or GPU makes one reduce-scatter of the two.
    """
    plan = megatron(config, mesh)
    model = mesh.axis_names[-1]
    if config.sequence % mesh.shape[model]:
        raise ValueError(f"sequence of {config.sequence} does not divide over {model!r}")
    whole = P(plan.batch[0], None, None)
    sliced = P(plan.batch[0], model, None)
    places = dict(plan.places) | {"residual": (sliced,)}
    places |= dict.fromkeys(("embedded", "projected"), (whole, sliced))
    places |= dict.fromkeys(("norm", "final_norm"), (sliced, whole))
    positions = P(model, None)
    places["weights/positions"] = (positions,)
    return replace(plan, state=dict(plan.state) | {"positions": positions}, places=places)


PLANS: dict[str, Callable[[DecoderConfig, Mesh], HandPlan]] = {
    "data_parallel": data_parallel,
    "data_parallel_mapped": lambda config, mesh: replace(data_parallel(config, mesh), mapped=True),
    "zero3": zero3,
    "zero3_mapped": lambda config, mesh: replace(zero3(config, mesh), mapped=True),
    "megatron": megatron,
    "megatron_sequence": megatron_sequence,
}


def hand_plan(name: str, config: DecoderConfig, mesh: Mesh) -> HandPlan:
    """The plan of that name. Raises ValueError for a name not in `PLANS`, or sizes that do not divide."""
    if name not in PLANS:
        raise ValueError(f"there is no hand plan {name!r}; there are {', '.join(PLANS)}")
    return PLANS[name](config, mesh)


def layer_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by name, a block's as one layer has it."""
    params = decoder(replace(config, layers=1), "unrolled").args[0]
    blocks = params.pop("blocks")
    return {name: leaf.shape for name, leaf in (params | blocks[0]).items()}


def state_specs(plan: HandPlan, config: DecoderConfig, form: Form) -> tuple[Any, dict[str, Any]]:
    """Specs of the parameters and of the optimizer's state, in the form's own structure."""

    def spec(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> P:
        one_layer = plan.state.get(path[-1].key, P())
        return P(None, *one_layer) if form == "scan" and len(path) > 1 else one_layer

    params = jax.tree_util.tree_map_with_path(spec, decoder(config, form).args[0])
    return params, {"mu": params, "nu": params, "count": P()}


def constrain_by(plan: HandPlan, mesh: Mesh) -> Constrain:
    """The model's hook, filled from the plan."""

    def constrain(where: str, x: jax.Array) -> jax.Array:
        for spec in plan.places.get(where, ()):
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
        return x

    return constrain


def by_hand(
    name: str, config: DecoderConfig, mesh: Mesh, form: Form = "scan", donate: bool = False
) -> tuple[Any, Any, Any]:
    """The decoder's train step under the hand plan of that name.

    Args:
      name: a key of `PLANS`.
      config: the decoder's sizes.
      mesh: with devices; whatever the types of its axes, the plan uses them as `Auto`.
      form: of the parameters, as in `decoder`.
      donate: let the step reuse the memory of the state it is given.

    Returns:
      `(step, in_shardings, out_shardings)`: the jitted `train_step(params, opt_state, batch) -> (params,
      opt_state, loss)`, and the shardings of its arguments and of its result.
    """
    mesh = Mesh(np.asarray(mesh.devices), mesh.axis_names)
    plan = hand_plan(name, config, mesh)
    config = replace(config, fuse_projections=plan.fuse_projections)
    state = state_specs(plan, config, form)
    batch = {"tokens": plan.batch, "targets": plan.batch}
    if plan.mapped:
        step = mapped_train_step(config, mesh, state[0], plan.batch, plan.state)
    else:
        step = decoder_train_step(config, constrain_by(plan, mesh))

    in_shardings, out_shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), ((*state, batch), (*state, P()))
    )
    step = jax.jit(
        step,
        in_shardings=in_shardings,
        out_shardings=out_shardings,
        donate_argnums=(0, 1) if donate else (),
    )
    return step, in_shardings, out_shardings
