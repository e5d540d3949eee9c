"""README's ten lines run as pasted, and print the plan that it shows."""

from __future__ import annotations

import runpy
from pathlib import Path

SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "fill_readme.py"))
TEXT = SCRIPT["README"].read_text(encoding="utf-8")


def test_the_plan_shown_is_what_the_ten_lines_print():
    assert len(SCRIPT["ten_lines"](TEXT).splitlines()) == 10
    assert SCRIPT["untimed"](SCRIPT["filled"](TEXT)) == SCRIPT["untimed"](TEXT)


def test_a_stale_plan_is_seen():
    stale = TEXT.replace("tensor parallel (F 100%", "data parallel (F 100%")
    assert stale != TEXT and SCRIPT["untimed"](SCRIPT["filled"](stale)) != SCRIPT["untimed"](stale)
