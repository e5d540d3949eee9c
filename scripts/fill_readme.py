"""Fills README.md with what its ten lines print, or with `--check` says whether it still is that.

    python scripts/fill_readme.py [--check]

How long planning took differs from run to run and is left out of the comparison.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
LINES = re.compile(r"<!-- ten lines -->.*?```python\n(.*?)```", re.DOTALL)
PLAN = re.compile(r"(<!-- plan: filled by scripts/fill_readme.py -->.*?```text\n)(.*?)(```)", re.DOTALL)


def ten_lines(text: str) -> str:
    """The first snippet of a README. Raises ValueError if there is none."""
    found = LINES.search(text)
    if found is None:
        raise ValueError(f"{README} has no Python block after its mark of the ten lines")
    return found[1]


def printed(code: str) -> str:
    """What a snippet prints when pasted into train.py and run on its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.py"
        file.write_text(code, encoding="utf-8")
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(README.parent), *sys.path])}
        environment.pop("XLA_FLAGS", None)
        done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, env=environment, check=True)
    return done.stdout


def filled(text: str) -> str:
    """A README with its plan printed anew."""
    shown = printed(ten_lines(text))
    return PLAN.sub(lambda found: found[1] + shown + found[3], text)


def untimed(text: str) -> str:
    """Without the one line that differs from run to run."""
    return re.sub(r"^planning .*$", "planning", text, flags=re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    before = README.read_text(encoding="utf-8")
    after = filled(before)
    if options.check:
        same = untimed(after) == untimed(before)
        print("README.md shows what its ten lines print" if same else "README.md does not show what its ten lines print")
        return 0 if same else 1
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
