"""Room `agree`: processes that run one planned function together make sure, before anything runs, that they planned the same."""

from __future__ import annotations

import hashlib
import platform
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax.experimental import multihost_utils

from jaxplan import __version__, _jax
from jaxplan.files.fingerprint import program_of
from jaxplan.plan import Plan


class DifferentPlans(RuntimeError):
    """The processes of one program hold plans that differ. The message says in what, and which processes."""


def check_agreement(plan: Plan) -> None:
    """Raise `DifferentPlans` on every process of the plan's mesh unless all hold the same plan.

    Waits for the other processes. Does nothing where the mesh lies in one process.
    """
    owners = {device.process_index for device in plan.mesh.devices.flat}
    if len(owners) == 1:
        return
    aspects = fingerprints(plan)
    mine = np.stack([np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8) for text in aspects.values()])
    told = differences(list(aspects), multihost_utils.process_allgather(mine))
    if told:
        where = f"{plan.traced.name} was not planned alike in all processes, and nothing was run"
        raise DifferentPlans(f"{where}: {'; '.join(told)}")


def fingerprints(plan: Plan) -> dict[str, str]:
    """What has to be the same, by what it is called; in the order in which one causes the next."""
    traced, mesh, machine = plan.traced, plan.mesh, plan.modelled.numbers.machine
    shapes = [f"{path}:{aval.dtype}{aval.shape}" for path, aval in zip(traced.in_paths, traced.in_avals, strict=True)]
    devices = [device.id for device in mesh.devices.flat]
    return {
        "versions of Python, JAX, jaxlib or jaxplan": str(
            (platform.python_version_tuple()[:2], jax.__version__, jaxlib.version.__version__, __version__)
        ),
        "argument shapes": str(shapes),
        "the traced function": program_of(traced.jaxpr).fingerprint,
        "its numbers": _numbers(traced.jaxpr),
        "the mesh": str((dict(mesh.shape), devices)),
        "the machine": str(machine),
        "the layouts": str((plan.choices.shape, plan.choices.tolist())),
        "the pipeline": str(plan.pipeline),
    }


def _numbers(closed: Any) -> str:
    """A digest of the literals and constants in a program, which do not bear on layouts and so are in no fingerprint of it."""
    digest, ahead = hashlib.sha256(), [closed]
    for found in ahead:
        for constant in getattr(found, "consts", ()):
            if getattr(constant, "is_fully_addressable", True) and not _is_key(constant):
                digest.update(np.asarray(constant).tobytes())
        jaxpr = getattr(found, "jaxpr", found)
        for equation in jaxpr.eqns:
            for atom in equation.invars:
                if isinstance(atom, _jax.Literal):
                    digest.update(np.asarray(atom.val).tobytes())
            ahead += _jax.sub_jaxprs(equation)
    return digest.hexdigest()


def _is_key(value: Any) -> bool:
    return jnp.issubdtype(getattr(value, "dtype", np.dtype(float)), jax.dtypes.prng_key)


def differences(aspects: list[str], digests: Any) -> list[str]:
    """In what processes differ from process 0. `digests`: (processes, aspects, bytes)."""
    found = []
    for name, column in zip(aspects, np.moveaxis(np.asarray(digests), 1, 0), strict=True):
        others = np.flatnonzero((column != column[0]).any(axis=1)).tolist()
        if others:
            who = f"process {others[0]} differs" if len(others) == 1 else f"processes {', '.join(map(str, others))} differ"
            found.append(f"{name} ({who} from process 0)")
    return found
