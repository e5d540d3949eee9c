"""Room `topology`: the devices of a TPU slice that need not be there, for the TPU's compiler to compile for."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import jax
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
"""What libtpu else asks a cloud machine's metadata server for; and that no TPU is taken, so that others may use it too."""
GAPS_TWICE_BEFORE = (0, 0, 51)
"""Before this version of libtpu `memory_analysis` adds the gaps of the heap of temporaries to a size that has them already."""
EXAMPLES = "v5e:4x4, v4:2x2x2, v5p:2x2x1 or v6e:2x4"


def topology_mesh(name: str, axes: Mapping[str, int]) -> Mesh:
    """A mesh of `axes` ({axis: size}) on the devices of a TPU slice by name (`v5e:4x4`), to compile for, not to run on.

    Needs libtpu, and Linux; no TPU. Raises ModuleNotFoundError without libtpu, ValueError for a name that libtpu does not know
    or a slice of another number of devices.
    """
    devices = _devices(name)
    if len(devices) != math.prod(axes.values()):
        shown = ", ".join(f"{axis}={size}" for axis, size in axes.items())
        raise ValueError(
            f"topology {name!r} has {len(devices)} devices, and the mesh {shown} has {math.prod(axes.values())}: "
            "give a slice or a mesh of another size"
        )
    placed = mesh_utils.create_device_mesh(tuple(axes.values()), devices, allow_split_physical_axes=True)
    return Mesh(placed, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def counts_gaps_twice(devices: Iterable[Any]) -> bool:
    """Whether temporaries of programs compiled for `devices` are reported with their heap's gaps counted twice."""
    if not any(device.platform == "tpu" for device in devices):
        return False
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < GAPS_TWICE_BEFORE


def _devices(name: str) -> list[Any]:
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            "to compile for a TPU slice, its compiler is needed (no TPU is): pip install 'jaxplan[tpu]', on Linux", name="libtpu"
        ) from None
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"topology must be a name such as {EXAMPLES}, got {name!r}")
    with _nowhere():
        try:
            return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
        except jax.errors.JaxRuntimeError as error:
            if "INVALID_ARGUMENT" not in str(error):
                raise
            why = str(error).removeprefix("INVALID_ARGUMENT: ")
            raise ValueError(f"there is no TPU topology {name!r}; names are like {EXAMPLES}. libtpu says: {why}") from None


@contextlib.contextmanager
def _nowhere() -> Iterator[None]:
    """Let libtpu not look for the machine that it is on; what the user has set stays."""
    with mock.patch.dict(os.environ, {key: os.environ.get(key, value) for key, value in NO_TPU.items()}):
        yield
