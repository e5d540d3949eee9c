"""Notebooks as saved: executed in order, without errors, naming no machine, each with the version of JAX that its outputs are of.
CI executes them anew, and compares (`scripts/run_notebooks.py --check`)."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
ABSOLUTE_PATH = re.compile(r"""(?:^|[\s"'(=])(?:/(?:home|root|Users|tmp|usr|opt|var|work|mnt)/|[A-Z]:\\)""")


def faults(notebook: str) -> list[str]:
    """What is wrong with a notebook's text."""
    found = []
    cells = [cell for cell in json.loads(notebook)["cells"] if cell["cell_type"] == "code"]
    counts = [cell["execution_count"] for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        found.append(f"cells were executed in the order {counts}")
    if not any(cell["outputs"] for cell in cells):
        found.append("no outputs are saved")
    outputs = json.dumps([cell["outputs"] for cell in cells], indent=1).replace("\\n", "\n")
    if "jax" not in json.loads(notebook)["metadata"].get("jaxplan", {}):
        found.append("no version of JAX: save it with scripts/run_notebooks.py")
    if '"output_type": "error"' in outputs:
        found.append("an error is saved")
    if (path := ABSOLUTE_PATH.search(outputs)) is not None:
        found.append(f"an output names a path of one machine: {path[0]!r}")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_saved(path: Path) -> None:
    assert faults(path.read_text()) == []


def test_faults_are_found() -> None:
    assert NOTEBOOKS
    good = json.loads(NOTEBOOKS[0].read_text())
    code = [i for i, cell in enumerate(good["cells"]) if cell["cell_type"] == "code"]

    def spoiled(count: int | None, outputs: list[dict[str, object]]) -> list[str]:
        bad = json.loads(json.dumps(good))
        bad["cells"][code[0]].update(execution_count=count, outputs=outputs)
        return faults(json.dumps(bad))

    assert "executed in the order" in spoiled(None, [])[0]
    assert spoiled(1, [{"output_type": "error"}]) == ["an error is saved"]
    stream = {"output_type": "stream", "text": ["written to\n", "/home/someone/plan.json"]}
    assert "names a path" in spoiled(1, [stream])[0]


@pytest.mark.skipif(importlib.util.find_spec("nbconvert") is None, reason="nbconvert not installed: pip install 'jaxplan[docs]'")
def test_outputs_of_another_version_are_seen(monkeypatch):
    monkeypatch.syspath_prepend(str(NOTEBOOKS[0].parent.parent / "scripts"))
    import nbformat
    import run_notebooks

    saved = nbformat.read(NOTEBOOKS[0], as_version=4)

    def beside(old, new):
        text = nbformat.writes(saved)
        assert old in text
        return list(run_notebooks.differences(saved, nbformat.reads(text.replace(old, new), as_version=4)))

    assert beside("matched  all-reduce", "missing  all-reduce")[0] == "  cell 14:"
    assert not beside("planning        ", "planning        9")
    assert beside("P('model', 'data')", "P('data')")
    split = nbformat.v4.new_output("stream", text="a\n"), nbformat.v4.new_output("stream", text="b\n")
    assert [output.text for output in run_notebooks.joined(split)] == ["a\nb\n"]
