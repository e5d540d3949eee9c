"""`scripts/check_optimality.py` runs, and tells how much longer the integer program takes, and where."""

import re
import sys
from pathlib import Path

import pytest

with pytest.MonkeyPatch.context() as patched:  # for this import only: other names in that folder are those of packages
    patched.setattr(sys, "path", [str(Path(__file__).parent.parent / "scripts"), *sys.path])
    import check_optimality


def test_ratios_are_told_for_all_problems_and_for_those_that_take_long():
    told = check_optimality.ratios_told([(0.1, 0.2), (0.01, 2.0), (0.1, 5.0)]).splitlines()
    assert told[0] == "  all, 3 problems: median 50x, least 2.0x, most 200x; 33% at least 100x"
    assert told[1] == "  over 1 s, 2 problems: median 125x, least 50.0x, most 200x; 50% at least 100x"
    assert len(check_optimality.ratios_told([(0.1, 0.2)]).splitlines()) == 1


def test_both_problems_are_solved_and_what_is_too_large_is_named(monkeypatch, capsys):
    asked = ["--size=small", "--only=mlp_sgd", "--meshes=8,4x2", "--entries=8000"]
    monkeypatch.setattr("sys.argv", ["check_optimality.py", *asked])
    check_optimality.main()
    printed = capsys.readouterr().out
    assert re.search(r"^mlp_sgd small +8 +\d+ +[\d.]+ +[\d.]+ +-?0\.000% +[\d.]+", printed, re.MULTILINE)
    assert "mean 0.000%, worst" in printed
    for which in ("folded", "nothing folded"):
        assert re.search(rf"hsm2dl's, {which}:\n  all, 1 problems: median", printed)
    assert printed.count("not given to it: mlp_sgd small on 4x2 (") == 2
