"""`scripts/check_predictions.py`: every example is compiled as predicted, and the script notices where one is not."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import jax
import pytest

import jaxplan

SCRIPT = Path(__file__).parent.parent / "scripts" / "check_predictions.py"
SMALL = ["--only", "mlp_sgd", "conjugate_gradient", "--meshes", "4x2", "--machines", "fast"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_predictions", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_predictions"] = module
    spec.loader.exec_module(module)
    return module


def test_true_predictions_meet_the_goals(script, capsys):
    assert script.main([*SMALL, "--strict", "--markdown", "--details"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header, rule, *rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert header[0] == "program" and len(header) == len(rule)
    assert [row[:4] for row in rows] == [
        [name, "4x2", "v4, fast links", axis] for name in ("mlp_sgd", "conjugate_gradient") for axis in "xy"
    ]
    assert all(row[4] == row[5] != "0.00" and row[6:] == ["0.00%", "0.00%"] for row in rows)
    assert any(line.startswith("median") and "of 4 axes in 2 rows" in line for line in lines)


def test_a_program_that_sends_something_else_misses_them(script, capsys, monkeypatch):
    right = jaxplan.Plan.exchanges_of

    def wrong(plan, rounded):
        first, *rest = right(plan, rounded)
        return (replace(first, wire_bytes={axis: 3 * sent for axis, sent in first.wire_bytes.items()}), *rest)

    monkeypatch.setattr(jaxplan.Plan, "exchanges_of", wrong)
    assert script.main(SMALL) == 0  # not strict
    assert script.main([*SMALL, "--strict"]) == 1
    missed = capsys.readouterr().err
    assert "goals missed:" in missed and "worst" in missed and "median" in missed


def test_an_exchange_that_nobody_planned_misses_them(script, capsys, monkeypatch):
    right = jaxplan.Plan.exchanges_of
    monkeypatch.setattr(jaxplan.Plan, "exchanges_of", lambda plan, rounded: right(plan, rounded)[1:])
    assert script.main([*SMALL, "--strict", "--details"]) == 1
    found = capsys.readouterr()
    assert "unplanned" in found.err and any(line.startswith("unplanned  reduce-scatter") for line in found.out.splitlines())


def test_where_nothing_is_sent_nothing_is_shown_to_be_right(script, capsys):
    assert script.main(["--only", "mlp_sgd", "--meshes", "8", "--machines", "v4", "--strict"]) == 1
    assert "nothing was compared" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [(["--only", "nothing"], "no program is called nothing; there are mlp_sgd"), (["--meshes", "8x8x8"], "too few for a mesh")],
)
def test_bad_input_is_explained(script, capsys, given, message):
    with pytest.raises(SystemExit):
        script.main(given)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_every_example_on_every_mesh(script):
    meshes = "8,4x2,4x4" if len(jax.devices()) >= 16 else "8,4x2"
    assert script.main(["--strict", "--meshes", meshes]) == 0
