"""Whole train steps of real models, each in the idiom of its own framework, at published sizes and at a tiny one.

They are no part of the package, which needs no framework: scripts plan them, tests run them (`pip install -e '.[frameworks]'`).
Like most users they count on JAX's standard promotion of types and ranks.
"""

from collections.abc import Callable

from jaxplan.examples.program import Program

from . import decoders, science, transformers, vision
from .common import Size

__all__ = ["MODELS", "Size", "model"]

MODELS: dict[str, Callable[[Size], Program]] = {**transformers.MODELS, **decoders.MODELS, **vision.MODELS, **science.MODELS}


def model(name: str, size: Size = "published") -> Program:
    """A model by name. "published": the sizes of its source, to be planned from shapes; "tiny": the same code, quick on a CPU.

    Raises KeyError for a name not in `MODELS`, ValueError for another size, ModuleNotFoundError where its framework is missing.
    """
    if size not in ("tiny", "published"):
        raise ValueError(f"size is {size!r}; it may be 'tiny' or 'published'")
    return MODELS[name](size)
