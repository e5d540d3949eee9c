"""Compiling with Numba where it is installed (`pip install jaxplan[fast]`), and nothing at all where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import numba  # pyright: ignore[reportMissingImports]
except ImportError:  # the extra is not installed: NumPy and Python do the same, slower
    numba = None

HAVE_NUMBA = numba is not None


def compiled(fallback: Callable[..., Any] | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function; without Numba take `fallback`, the same in NumPy, or else the function as it is."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        if numba is None:
            return fallback or function
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)

    return decorate
