"""Execute the notebooks, and save their outputs or compare them with what is saved.

    python scripts/run_notebooks.py            executes each and saves its outputs
    python scripts/run_notebooks.py --check    executes each and says where the saved outputs are others; exit status 1 if any are

Compared is text; times that were measured, digits of rounding errors and pictures are not. Plans hang on the version of JAX
through the traced program, so outputs are compared only where the JAX is the one that they were saved with, as the notebook's
metadata say; elsewhere `--check` only executes. Needs the extras `docs` and `dev` (nbconvert, ipykernel).
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import nbformat
from nbconvert.preprocessors import ExecutePreprocessor

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
TIMEOUT_SECONDS = 600
MEASURED = (
    (re.compile(r"^planning .*$", re.M), "planning"),
    (re.compile(r"\d[\d.]* (?:ns|us|ms|s) each; traced once in \d[\d.]* (?:ns|us|ms|s)"), "traced once"),
    (re.compile(r"\b(?:\d(?:\.\d+)?e-\d\d|0\.0e\+00)\b"), "tiny"),
    (re.compile(r"\x1b\[[0-9;]*m"), ""),
)
"""What is not compared in a text, and what stands for it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the saved outputs instead of saving")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="parts of the names of notebooks")
    arguments = parser.parse_args()
    stale = 0
    for path in sorted(FOLDER.glob("*.ipynb")):
        if arguments.only and not any(name in path.stem for name in arguments.only):
            continue
        saved = nbformat.read(path, as_version=4)
        fresh = executed(path)
        if not arguments.check:
            path.write_text(nbformat.writes(fresh) + "\n", encoding="utf-8")
            print(f"{path.name}: saved")
            continue
        with_jax = saved.metadata.get("jaxplan", {}).get("jax")
        if with_jax != jax.__version__:
            print(f"{path.name}: runs; its outputs are of JAX {with_jax}, this is {jax.__version__}: not compared")
            continue
        told = list(differences(saved, fresh))
        stale += bool(told)
        print("\n".join([f"{path.name}: {'OUTPUTS ARE OTHERS' if told else 'as saved'}", *told]))
    if stale:
        print(f"{stale} notebooks have outputs of an earlier version: python scripts/run_notebooks.py saves those of this one")
    return int(stale > 0)


def executed(path: Path) -> Any:
    """A notebook with the outputs of now. Raises CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ExecutePreprocessor(timeout=TIMEOUT_SECONDS).preprocess(notebook, {"metadata": {"path": str(FOLDER)}})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    notebook.metadata["jaxplan"] = {"jax": jax.__version__}
    notebook.metadata["language_info"] = {"name": "python"}  # not which one ran it
    return notebook


def joined(outputs: Any) -> list[Any]:
    """A cell's outputs; what came in pieces on one stream, in one."""
    found: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and found and found[-1].get("name") == output.name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def differences(saved: Any, fresh: Any) -> Iterator[str]:
    """The lines of outputs that are others, cell by cell."""
    for number, (old, new) in enumerate(zip(saved.cells, fresh.cells, strict=True)):
        if old.cell_type == "code":
            before, after = (said(cell).splitlines() for cell in (old, new))
            lines = difflib.unified_diff(before, after, lineterm="", n=0)
            found = [line for line in lines if not re.match(r"---|\+\+\+|@@", line)]
            yield from ([f"  cell {number}:", *[f"    {line}" for line in found]] if found else ())


def said(cell: Any) -> str:
    """The text of a cell's outputs, less what is measured."""
    parts = [output.get("text") or output.get("data", {}).get("text/plain") or "" for output in joined(cell.outputs)]
    text = "\n".join(part.rstrip("\n") for part in parts)
    for pattern, stands in MEASURED:
        text = pattern.sub(stands, text)
    return text


if __name__ == "__main__":
    sys.exit(main())
