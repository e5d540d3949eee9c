"""What a command prints, and how it ends: results to stdout, progress and trouble to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any

PATIENCE = 2.0
"""Seconds after which somebody who waits is told what for."""
AGAIN = 5.0
"""Seconds between further words."""


class Trouble(Exception):
    """A command cannot go on: the message for the user, the exit status, and the user's own error to show with it, if any."""

    def __init__(self, message: str, status: int = 2, cause: BaseException | None = None) -> None:
        super().__init__(message)
        self.status, self.cause = status, cause


def explain(command: str, trouble: Trouble) -> None:
    """Tell of trouble on stderr; of an error in the user's code, with the lines that lead to it and none of ours."""
    if trouble.cause is not None:
        frames = _theirs(trouble.cause.__traceback__)
        for line in traceback.format_exception(type(trouble.cause), trouble.cause, frames):
            print(line, end="", file=sys.stderr)
    print(f"jaxplan {command}: {trouble}", file=sys.stderr)


def _theirs(frames: TracebackType | None) -> TracebackType | None:
    """A traceback from the first frame that is neither ours nor the import system's."""
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    while frames is not None:
        file = frames.tb_frame.f_code.co_filename
        if not (file.startswith((ours + os.sep, "<frozen importlib")) or os.sep + "importlib" + os.sep in file):
            return frames
        frames = frames.tb_next
    return None


def emit(text: str) -> None:
    """Print a result. A reader who closed the pipe has enough; the exit status stays what was found."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        to_devnull()
    except OSError as error:
        to_devnull()
        raise Trouble(f"the output cannot be written: {error}") from None


def emit_json(value: Any) -> None:
    """Print a result for a machine to read."""
    emit(json.dumps(value, indent=2, allow_nan=False))


def to_devnull() -> None:
    """Whatever else goes to stdout, at exit too, goes nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def close_quietly() -> bool:
    """Flush stdout; whether what was printed could be written (a pipe that nobody reads is none of our business)."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        to_devnull()
    except OSError as error:
        to_devnull()
        print(f"jaxplan: the output cannot be written: {error}", file=sys.stderr)
        return False
    return True


def _watched() -> bool:
    """Whether somebody looks at stderr."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """Say on stderr what is going on, if it goes on for more than `PATIENCE` seconds, and when it is done; nothing where stderr
    is no terminal."""
    if not _watched():
        yield
        return
    done, start = threading.Event(), time.monotonic()

    def tell() -> None:
        wait = PATIENCE
        while not done.wait(wait):
            print(f"{what} ... {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
            wait = AGAIN

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        taken = time.monotonic() - start
        if taken >= PATIENCE:
            print(f"{what}: {taken:.1f} s", file=sys.stderr, flush=True)
