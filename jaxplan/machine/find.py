"""Which machine is meant."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxplan.machine.files import folder, load_machine, named
from jaxplan.machine.nouns import Machine
from jaxplan.machine.presets import DEFAULT, KINDS, PRESETS


def machine(which: str | Machine | None, mesh: Any = None) -> Machine:
    """A `Machine` as it is, one by name, or None: from the mesh's devices. Where CPU devices stand for it,
    what is sent is what these send.

    A name is a preset's, or that of a file in the user's configuration folder (what `jaxplan calibrate --name` writes); a path
    ending in ".json" is a machine file anywhere. An `AbstractMesh`, or a device of unknown kind on a platform other than CPU, is
    taken for `DEFAULT`. Raises ValueError for an unknown name, listing the names, and for a file that is no machine.
    """
    kind, platform = _device(mesh)
    if which is None:
        return _by_device(kind, platform)
    if not isinstance(which, (Machine, str)):
        raise TypeError(f"machine must be a jaxplan.Machine, a preset's name or None, got {type(which).__name__}")
    found = _by_name(which) if isinstance(which, str) else which
    whole = platform == "cpu" and found.matmul_reads and found.sends_rounded is None
    return replace(found, sends_rounded=False) if whole else found  # what compiles for CPU devices rounds nothing


def platform_of(mesh: Any) -> str:
    """The platform of a mesh's devices, as JAX calls it ("cpu", "tpu", "gpu"); "" where it has none."""
    return _device(mesh)[1]


def _device(mesh: Any) -> tuple[str, str]:
    """Kind and platform of a mesh's devices; "" each where it has none."""
    try:
        device = mesh.devices.flat[0]
    except (AttributeError, ValueError, RuntimeError):
        return "", ""
    return str(getattr(device, "device_kind", "")), str(getattr(device, "platform", ""))


def _by_device(kind: str, platform: str) -> Machine:
    for text in sorted(KINDS, key=len, reverse=True):
        if text in kind:
            return PRESETS[KINDS[text]]
    return PRESETS["cpu" if platform == "cpu" else DEFAULT]


def _by_name(name: str) -> Machine:
    if name in PRESETS:
        return PRESETS[name]
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise ValueError(f"there is no machine file {name!r}")
        return load_machine(name)
    own = sorted(path.stem for path in folder().glob("*.json")) if folder().is_dir() else []
    if name in own:
        return load_machine(named(name))
    near = difflib.get_close_matches(name, [*PRESETS, *own], 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    known = ", ".join([*PRESETS, *own])
    raise ValueError(f"no machine is called {name!r}; there are {known}, or pass a jaxplan.Machine or a machine file{hint}")
