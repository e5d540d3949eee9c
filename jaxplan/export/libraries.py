"""The libraries that plans are exported to: found, or missed by name, with what to install."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from typing import Any

OLDEST = {
    "flax": "0.12",
    "optax": "0.2.4",
    "orbax-checkpoint": "0.11",
    "keras": "3.10",
    "haliax": "1.4",
}
"""The oldest version of each distribution that its exporter is written for; the newest of today is what the tests load into."""


def library(module: str, distribution: str) -> Any:
    """Import a module of a target library. Raises ModuleNotFoundError where it is not installed, ImportError where it is too
    old or does not import; each says what to install."""
    hint = "pip install -U 'jaxplan[export]'"
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"this export makes objects of {distribution}, which is not installed: {hint.replace('-U ', '')}", name=module
        ) from None
    if _numbers(version) < _numbers(OLDEST[distribution]):
        raise ImportError(
            f"this export is written for {distribution} {OLDEST[distribution]} and later, and {version} is installed: {hint}",
            name=module,
        )
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{distribution} {version} is installed, but does not import: {error}; {hint}", name=module) from error


def _numbers(version: str) -> tuple[int, ...]:
    """(0, 12, 8) of "0.12.8": the release; what comes before a release counts as it."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in release[0].split(".")) if release else ()
