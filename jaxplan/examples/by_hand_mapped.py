"""Hand plans that split the batch alone, with their collectives written out through `jax.shard_map`.

The compiler sums a partial gradient over the devices where it arises; the two gradients of a tied embedding
so travel twice. Here each device adds up its own gradients first, and every parameter's travels once.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec as P

from .adamw import adamw_update
from .decoder import DecoderConfig, decoder_loss

__all__ = ["mapped_train_step"]


def mapped_train_step(
    config: DecoderConfig, mesh: Mesh, param_specs: Any, batch_spec: P, layer_specs: Mapping[str, P]
) -> Callable[..., Any]:
    """The decoder's train step with the batch split over `batch_spec` and the state over `param_specs`.

    `layer_specs` says again, by name and for one layer, which parameters are split: those are gathered where
    the model uses them, and again where the backward pass does; the transpose of that gather is the
    reduce-scatter of their gradients. The gradients of the rest are averaged by an all-reduce.
    """
    over = batch_spec[0]

    def gather(where: str, x: jax.Array) -> jax.Array:
        spec = layer_specs.get(where.removeprefix("weights/"), P()) if where.startswith("weights/") else P()
        for dim, axes in enumerate(spec):
            if axes is not None:
                x = jax.lax.all_gather(x, axes, axis=dim, tiled=True)
        return x

    def local_gradients(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        loss, gradients = jax.value_and_grad(decoder_loss)(params, batch, config, gather)

        def combine(gradient: jax.Array, spec: P) -> jax.Array:
            scattered = any(axes is not None for axes in spec)
            return gradient / mesh.size if scattered else jax.lax.pmean(gradient, over)

        return jax.lax.pmean(loss, over), jax.tree.map(combine, gradients, param_specs)

    value_and_gradients = jax.shard_map(
        local_gradients,
        mesh=mesh,
        in_specs=(param_specs, {"tokens": batch_spec, "targets": batch_spec}),
        out_specs=(P(), param_specs),
        check_vma=False,
    )

    def train_step(params: Any, opt_state: dict[str, Any], batch: dict[str, jax.Array]) -> tuple[Any, ...]:
        loss, gradients = value_and_gradients(params, batch)
        params, opt_state = adamw_update(config.optimizer, gradients, opt_state, params)
        return params, opt_state, loss

    return train_step
