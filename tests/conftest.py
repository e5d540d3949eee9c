"""Sixteen simulated devices, strict types and ranks; set before JAX starts."""

import math
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=16"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def mesh_of(shape, kind=AxisType.Auto):
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return Mesh(devices, tuple("xyzw"[: len(shape)]), axis_types=(kind,) * len(shape))


def assert_close(want, got):
    """Equal up to re-ordered float32 sums."""
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        rtol, atol = (1e-9, 1e-12) if a.dtype == np.float64 else (2e-4, 2e-5)
        np.testing.assert_allclose(b, a, rtol=rtol, atol=atol)
