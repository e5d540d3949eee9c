"""The compiler as the oracle of every rule: what each choice of each operator is predicted to send is what compiles.

The samples and the check are `scripts/check_rules.py`'s, which also prints them as a page.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "check_rules.py"
spec = importlib.util.spec_from_file_location("check_rules", SCRIPT)
assert spec is not None and spec.loader is not None
check_rules = sys.modules["check_rules"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_rules)


def agrees(name, mesh):
    rows = list(check_rules.check(name, check_rules.SAMPLES[name], mesh, True))
    assert rows
    wrong = [row for row in rows if not row.error < 1e-3]
    assert not wrong, f"values differ: {wrong}"
    differ = [row for row in rows if not row.agrees]
    if check_rules.explained(name, mesh):
        assert differ, f"{name} compiles as predicted now: strike it off the list of differences"
    else:
        assert not differ


@pytest.mark.parametrize("name", check_rules.SAMPLES)
def test_every_choice_compiles_to_what_is_predicted_on_one_axis(name):
    agrees(name, "8")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["4x2", "2x4"])
@pytest.mark.parametrize("name", check_rules.SAMPLES)
def test_every_choice_compiles_to_what_is_predicted_on_two_axes(name, mesh):
    agrees(name, mesh)


def test_a_false_prediction_is_seen():
    """Half the bytes of a matmul's reduction are struck from the prediction."""
    (row, *_) = [row for row in check_rules.check("matmul", check_rules.SAMPLES["matmul"], "8", False) if row.predicted]
    assert row.agrees
    false = {kind: value / 2 for kind, value in row.predicted.items()}
    assert not check_rules.Found(row.name, row.rule, row.mesh, row.choice, false, row.compiled, None).agrees
