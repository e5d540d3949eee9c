"""Saved plans from the files that a command line names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxplan.cli.output import Trouble

if TYPE_CHECKING:
    from jaxplan.files import SavedPlan


def read(path: str) -> SavedPlan:
    """A saved plan. Raises Trouble that says why it cannot be read."""
    from jaxplan.files import PlanFileError, read_plan

    try:
        return read_plan(path)
    except PlanFileError as error:
        raise Trouble(str(error)) from None
    except OSError as error:
        raise Trouble(f"{path} cannot be read: {error.strerror or error}") from None
