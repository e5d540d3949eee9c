"""Room `agree`: processes that run one planned function together make sure, before anything runs, that they planned the same."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import platform
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

from jaxplan import __version__, _jax
from jaxplan.files import input_leaves
from jaxplan.files.fingerprint import program_of
from jaxplan.plan import Plan


class DifferentPlans(RuntimeError):
    """The processes of one program hold plans that differ. The message says in what, and which processes."""


WAIT_SECONDS = 300.0
"""How long a process waits for the others of its mesh before it says that they do not come. JAX waits as long for a start."""


VERSIONS = "versions of Python, JAX, jaxlib or jaxplan"

MOST_DETAILS = 4096
"""Items that a process tells of each aspect: what a large plan tells is some hundred kilobytes."""

MOST_NAMED = 3
"""Items of an aspect that an error names; of more it gives the number."""


def check_agreement(plan: Plan, wait_seconds: float | None = None) -> None:
    """Raise `DifferentPlans` on every process of the plan's mesh unless all hold the same plan.

    Compared through the key-value store of `jax.distributed`, before anything is compiled or sent between devices: processes of
    other versions, or with other programs, cannot hang. Waits for the other processes of the mesh, for `wait_seconds` (None:
    `WAIT_SECONDS`), then raises TimeoutError that names those that did not come. Does nothing where the mesh lies in one process.
    """
    owners = sorted({device.process_index for device in plan.mesh.devices.flat})
    client = _jax.coordination_client()
    if len(owners) == 1 or client is None:
        return
    held = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in fingerprints(plan).items()}
    mine = {"held": held, "details": details(plan)}
    found = _exchanged(client, owners, plan.traced.name, mine, WAIT_SECONDS if wait_seconds is None else wait_seconds)
    told = differences(
        {process: one["held"] for process, one in found.items()}, {process: one["details"] for process, one in found.items()}
    )
    if told:
        raise DifferentPlans(
            f"{plan.traced.name} was not planned alike in all processes, and nothing was run:\n"
            + "\n".join(f"  {one}" for one in told)
            + "\nRun one program, with one set of versions, on arguments of the same shapes in every process; what stands first "
            "here may be the cause of what follows"
        )


def _exchanged(client: Any, owners: list[int], function: str, held: dict[str, Any], seconds: float) -> dict[int, dict[str, Any]]:
    """{process: what it holds} of all processes of a mesh. The n-th planned function that runs on the mesh in one process meets
    the n-th in the others."""
    me = jax.process_index()
    mesh = f"jaxplan/agree/{'-'.join(map(str, owners))}"
    turn = f"{mesh}/{client.key_value_increment(f'{mesh}/turns/{me}', 1)}"
    client.key_value_set(f"{turn}/{me}", json.dumps(held))
    deadline = time.monotonic() + seconds
    found, missing = {}, []
    for process in owners:
        left = max(1, int(1000 * (deadline - time.monotonic())))
        try:
            found[process] = json.loads(client.blocking_key_value_get(f"{turn}/{process}", left))
        except jax.errors.JaxRuntimeError:
            missing.append(process)
    if missing:
        who = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(map(str, missing))}"
        raise TimeoutError(
            f"{function} was to run on devices of {len(owners)} processes, and {who} did not come to run it within {seconds:g} s "
            "(ended, which its own output explains, or at work on something else, or waiting elsewhere). Nothing was run"
        )
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody leaves while others still have to read
        client.wait_at_barrier(f"{turn}/read", max(1, int(1000 * seconds)), owners)
    return found


def fingerprints(plan: Plan) -> dict[str, str]:
    """What has to be the same, by what it is called; in the order in which one causes the next."""
    traced, mesh, machine = plan.traced, plan.mesh, plan.modelled.numbers.machine
    shapes = [f"{path}:{aval.dtype}{aval.shape}" for path, aval in zip(traced.in_paths, traced.in_avals, strict=True)]
    devices = [device.id for device in mesh.devices.flat]
    return {
        VERSIONS: str(_versions()),
        "argument shapes": str(shapes),
        "the traced function": program_of(traced.jaxpr).fingerprint,
        "its numbers": _numbers(traced.jaxpr),
        "the mesh": str((dict(mesh.shape), devices)),
        "the machine": str(machine),
        "the layouts": str((plan.choices.shape, plan.choices.tolist())),
        "the pipeline": str(plan.pipeline),
    }


def details(plan: Plan) -> dict[str, dict[str, str]]:
    """{aspect: {item: value}}: what a difference in an aspect of `fingerprints` can be told by; at most `MOST_DETAILS` items."""
    traced, machine = plan.traced, plan.modelled.numbers.machine
    inputs = input_leaves(plan)
    found = {
        VERSIONS: _versions(),
        "argument shapes": {path: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for path, leaf in inputs.items()},
        "the traced function": {name: str(found.count) for name, found in program_of(traced.jaxpr).primitives.items()},
        "the mesh": {axis: str(size) for axis, size in plan.axis_sizes.items()},
        "the machine": {field.name: str(getattr(machine, field.name)) for field in dataclasses.fields(machine)},
        "the layouts": {path: str(plan.partition_spec_of(number)) for number, path in enumerate(inputs)},
    }
    return {aspect: dict(itertools.islice(items.items(), MOST_DETAILS)) for aspect, items in found.items()}


def _versions() -> dict[str, str]:
    python = ".".join(platform.python_version_tuple()[:2])
    return {"Python": python, "JAX": jax.__version__, "jaxlib": jaxlib.version.__version__, "jaxplan": __version__}


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


def differences(
    held: Mapping[int, Mapping[str, str]], details: Mapping[int, Mapping[str, Mapping[str, str]]] | None = None
) -> list[str]:
    """In what processes differ from the first. `held`: {process: {aspect: digest}}; `details`: {process: what `details` gives},
    to name the items of an aspect that are others."""
    first, *rest = sorted(held)
    found = []
    for name in dict.fromkeys(name for process in sorted(held) for name in held[process]):
        others = [process for process in rest if held[process].get(name) != held[first].get(name)]
        if others:
            who = f"process {others[0]} differs" if len(others) == 1 else f"processes {', '.join(map(str, others))} differ"
            one, other = ((details or {}).get(process, {}).get(name, {}) for process in (first, others[0]))
            found.append(f"{name} ({who} from process {first}){_items(one, other, first, others[0])}")
    return found


def _items(one: Mapping[str, str], other: Mapping[str, str], first: int, second: int) -> str:
    """The items that two processes have otherwise, a few of them; those that only one has come first."""
    apart = [item for item in dict.fromkeys([*one, *other]) if one.get(item) != other.get(item)]
    apart.sort(key=lambda item: item in one and item in other)
    told = [
        f"{item}: {one.get(item, 'none')} on process {first}, {other.get(item, 'none')} on process {second}"
        for item in apart[:MOST_NAMED]
    ]
    more = [f"and {len(apart) - MOST_NAMED} more"] if len(apart) > MOST_NAMED else []
    return f": {'; '.join([*told, *more])}" if told else ""
