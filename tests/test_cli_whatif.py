"""The commands that ask the planner again: what they print is what the API answers, and mistakes are told."""

import json
import os
import re
import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec as P

import jaxplan
from jaxplan import cli, measure
from jaxplan.cli import arguments
from jaxplan.machine import machine as find_machine

MODULE = '''
import jax, jax.numpy as jnp

def step(w, x):
    def loss(w):
        return jnp.mean(jnp.square(jax.nn.relu(x @ w["up"]) @ w["down"] - x))
    return jax.tree.map(lambda p, g: p - 0.1 * g, w, jax.grad(loss)(w))

def rows(x):
    return x[:128].reshape(2, 64, 8)

def shapes():
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    return {"up": f32(256, 1024), "down": f32(1024, 256)}, f32(4096, 256)
'''
FUNCTION = ["whatifmodel:step", "--shapes", "whatifmodel:shapes"]
PLANNED = [*FUNCTION, "--mesh", "data=4,model=2", "--machine", "v4"]


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """The plan of the module in the folder, saved in plan.json too."""
    assert len(jax.devices()) == 16
    (tmp_path / "whatifmodel.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "whatifmodel", raising=False)
    import whatifmodel  # type: ignore[import-not-found]

    found = jaxplan.make_plan(
        whatifmodel.step, *whatifmodel.shapes(), mesh=AbstractMesh((4, 2), ("data", "model")), machine="v4"
    )
    found.save("plan.json")
    yield found
    sys.modules.pop("whatifmodel", None)


def printed(capsys, *line, status=0):
    assert cli.main(list(line)) == status, capsys.readouterr().err
    return capsys.readouterr().out


def failed(capsys, *line, status=2):
    assert cli.main(list(line)) == status
    shown = capsys.readouterr()
    assert shown.out == "" and "Traceback" not in shown.err
    return shown.err


def specs(spec):
    return [list(entry) if isinstance(entry, tuple) else entry for entry in spec]


# --- explain, why-not ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["w/up", "whatifmodel.py:6"])
def test_explain_prints_what_the_plan_explains(plan, capsys, path):
    want = str(plan.explain(path)) + "\n"
    assert printed(capsys, "explain", path, *PLANNED) == want
    assert printed(capsys, "explain", path, *FUNCTION, "--plan", "plan.json") == want


def test_explain_as_json(plan, capsys):
    (reason,) = json.loads(printed(capsys, "explain", "w/up", *PLANNED, "--json"))["reasons"]
    (want,) = plan.explain("w/up").reasons
    assert reason["paths"] == ["w/up"] and reason["spec"] == specs(want.spec) and reason["seconds"] == want.seconds
    assert [other["extra_seconds"] for other in reason["alternatives"]] == [other.extra for other in want.alternatives]
    (line,) = json.loads(printed(capsys, "explain", "whatifmodel.py:6", *PLANNED, "--json"))["reasons"][:1]
    (first, *_) = plan.explain("whatifmodel.py:6").reasons
    assert line["operator"] == first.operator and line["splits"] == dict(first.splits)
    assert line["runner_up"]["extra_seconds"] == first.runner_up[1]


@pytest.mark.parametrize("layout", ["-,data", "None,data", "P(None, 'data')"])
def test_why_not_prints_what_the_plan_answers(plan, capsys, layout):
    want = plan.why_not({"w/up": P(None, "data")})
    assert want.extra != 0
    assert printed(capsys, "why-not", "w/up", layout, *PLANNED) == f"{want}\n"
    found = json.loads(printed(capsys, "why-not", "w/up", layout, *FUNCTION, "--plan", "plan.json", "--json"))
    assert found["extra_seconds"] == want.extra and found["pins"] == {"w/up": [None, "data"]}
    assert found["seconds"] == [plan.seconds, want.other.seconds]
    assert found["changed"] == {path: [specs(one), specs(two)] for path, (one, two) in want.changed.items()}


def test_why_not_of_several_at_once_and_with_names_of_dimensions(plan, capsys):
    want = plan.why_not({"w/up": P(None, "data"), "w/down": P("model"), "x": P()})
    more = ["--with", "w/down=model", "--with", "x=-,-"]
    assert printed(capsys, "why-not", "w/up", "-,data", *PLANNED, *more) == f"{want}\n".replace("x as P()", "x as P(None, None)")
    assert "Regimes along ROWS" in printed(
        capsys, "regimes", "ROWS", *PLANNED, "--dims", "x=ROWS WIDE", "--from", "2048", "--to", "8192"
    )
    assert "ROWS" in printed(capsys, "explain", "x", *PLANNED, "--dims", "x=ROWS WIDE")
    saved = [*FUNCTION, "--plan", "plan.json", "--dims", "x=ROWS WIDE"]
    assert "those of the saved plan stay" in failed(capsys, "explain", "x", *saved)
    assert "the order is PATH MODULE:FUNCTION" in failed(capsys, "explain", *FUNCTION[:1], "w/up", *PLANNED[1:])


def test_a_saved_plan_is_changed_before_it_is_asked(plan, capsys):
    pins = {"x": P("data")}
    want = plan.replan(machine="a100", pins=pins).why_not({"w/up": P("model")})
    line = ["why-not", "w/up", "model", *FUNCTION, "--plan", "plan.json", "--machine", "a100", "--pin", "x=data"]
    assert printed(capsys, *line) == f"{want}\n"


def test_mistakes_about_a_plan_are_told(plan, capsys):
    assert "whatifmodel:step --plan" not in failed(capsys, "explain", "w/u", *PLANNED)
    assert "the closest are ['w/up'" in failed(capsys, "explain", "w/u", *PLANNED)
    told = failed(capsys, "explain", "w/up", "plan.json", "--plan", "plan.json")
    assert "holds a plan and no program" in told and "train:step --plan plan.json" in told
    assert "one of the arguments --mesh --plan is required" in failed(capsys, "explain", "w/up", *FUNCTION)
    assert "names axis 'rows'" in failed(capsys, "why-not", "w/up", "rows", *PLANNED)
    assert "'a,,b' is no layout; write -,model" in failed(capsys, "why-not", "w/up", "a,,b", *PLANNED)
    assert "cannot be read" in failed(capsys, "explain", "w/up", *FUNCTION, "--plan", "none.json")
    assert "cannot be called with 0 arguments" in failed(capsys, "explain", "w/up", "whatifmodel:step", "--mesh", "x=2")
    assert "nothing fits" in failed(capsys, "explain", "w/up", *PLANNED, "--budget", "1KB", status=1)
    smaller = ["whatifmodel:step", "--spec", "f32[8,8],f32[8,8]"]
    assert "does not trace" in failed_with_cause(capsys, "explain", "w", *smaller, "--plan", "plan.json")


def failed_with_cause(capsys, *line):
    assert cli.main(list(line)) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("-,data+model", (None, ("data", "model"))),
        ("None,model", (None, "model")),
        ("P(None, ('data', 'model'))", (None, ("data", "model"))),
        ("PartitionSpec('x')", ("x",)),
        ("P()", ()),
        ("", ()),
    ],
)
def test_layouts_are_read(text, entries):
    assert arguments.spec_entries(text) == entries


@pytest.mark.parametrize("text", ["P(1)", "P(x)", "P(None", "P(('a', None))", "a b", "-+a", "P(__import__('os'))", "P('')"])
def test_what_is_no_layout_is_refused(text):
    with pytest.raises(arguments.ArgumentTypeError, match="is no"):
        arguments.spec_entries(text)


# --- best-mesh -------------------------------------------------------------------------------------------------------


def test_best_mesh_prints_the_ranking_and_saves_the_best(plan, capsys):
    import whatifmodel  # type: ignore[import-not-found]

    want = jaxplan.best_mesh(whatifmodel.step, *whatifmodel.shapes(), devices=16, machine="a100", axis_names=("data", "model"))
    line = ["best-mesh", *FUNCTION, "--devices", "16", "--machine", "a100", "--axes", "data,model"]
    assert printed(capsys, *line, "-o", "best.json") == f"{want}\n"
    assert json.loads(printed(capsys, *line, "--json")) == want.to_json()
    loaded = jaxplan.load_plan("best.json", whatifmodel.step, *whatifmodel.shapes())
    assert loaded.axis_sizes == want.best.axis_sizes and loaded.seconds == want.best.seconds


def test_mistakes_about_meshes_are_told(plan, capsys):
    assert "'0' is not a whole number of at least 1" in failed(capsys, "best-mesh", *FUNCTION, "--devices", "0")
    assert "no mesh of 8 devices fits" in failed(capsys, "best-mesh", *FUNCTION, "--devices", "8", "--budget", "1KB", status=1)
    assert "different names" in failed(capsys, "best-mesh", *FUNCTION, "--devices", "8", "--axes", "a,a")
    assert "no machine is called 'z80'" in failed(capsys, "best-mesh", *FUNCTION, "--devices", "8", "--machine", "z80")
    assert "cannot be written" in failed(capsys, "best-mesh", *FUNCTION, "--devices", "8", "-o", "no/such/folder.json")


# --- sweep -----------------------------------------------------------------------------------------------------------


def test_sweep_prints_and_gives_the_points(plan, capsys):
    import whatifmodel  # type: ignore[import-not-found]

    want = jaxplan.sweep(
        whatifmodel.step, *whatifmodel.shapes(), devices=[4, 16], sizes={"B": [64, 128]}, dims={"x": "B F"}, link_speeds=[1, 0.5],
        links="outer", machine="a100", axis_names=("data", "model"), pins={"w/up": P()},
    )  # fmt: skip
    line = ["sweep", *FUNCTION, "--devices", "4,16", "--size", "B=64,128", "--dims", "x=B F", "--link-speed", "1,0.5", "--links",
            "outer", "--machine", "a100", "--axes", "data,model", "--pin", "w/up="]  # fmt: skip
    assert json.loads(printed(capsys, *line, "--json")) == want.to_json()
    assert printed(capsys, *line).splitlines()[:-1] == str(want).splitlines()[:-1]  # but for the milliseconds
    found = json.loads(printed(capsys, "sweep", *FUNCTION, "--mesh", "a=2", "--mesh", "b=3,c=2", "--json"))["points"]
    assert [point["mesh"] for point in found] == [{"a": 2}, {"b": 3, "c": 2}]


def test_mistakes_about_sweeps_are_told(plan, capsys):
    line = ["sweep", *FUNCTION, "--devices"]
    assert "'x' is not a whole number" in failed(capsys, *line, "4,x")
    assert "one of the arguments --devices --mesh is required" in failed(capsys, "sweep", *FUNCTION)
    assert "'1,0' is no list of positive numbers" in failed(capsys, *line, "4", "--link-speed", "1,0")
    assert "'B' is not NAME=SIZES" in failed(capsys, *line, "4", "--size", "B")
    assert "'x' is not PATH=NAMES" in failed(capsys, *line, "4", "--dims", "x")
    assert "sizes names the dimension 'Q'; its inputs have " in failed(capsys, *line, "4", "--size", "Q=8")
    cut = ["sweep", "whatifmodel:rows", "--spec", "f32[256,8]", "--devices", "4", "--size", "B=64"]
    told = failed_with_cause(capsys, *cut)
    assert "at B=64, one of the sizes of the sweep" in told and "does not trace" in told
    rows = printed(capsys, *line, "4", "--budget", "1KB", status=1).splitlines()[3:5]
    assert [row.split()[-2:] for row in rows] == [["no", "A"], ["no", "B"]]


# --- calibrate -------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Tiny sizes: what is tested is where the numbers go, not which they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXPLAN_HOME", str(tmp_path / "home"))
    for name, value in (("DTYPES", ("float32",)), ("SIDES", (16,)), ("PASSES", (1 << 12,)), ("PAYLOADS", (64, 4096)),
                        ("TARGET", 1e-4), ("REPEATS", 2)):  # fmt: skip
        monkeypatch.setattr(measure, name, value)
    return tmp_path


def test_calibrate_saves_a_machine_under_its_name(quick, capsys):
    shown = printed(capsys, "calibrate", "--mesh", "data=2,model=2", "--name", "lab")
    assert shown.startswith("machine lab, measured in") and "link model" in shown
    found = find_machine("lab")
    assert found.name == "lab" and set(found.axis_links) == {"data", "model"} and found.node == 4


def test_calibrate_as_json_to_a_file(quick, capsys):
    found = json.loads(printed(capsys, "calibrate", "--mesh", "data=2", "-o", "here.json", "--json"))
    saved = find_machine("here.json")
    assert found["machine"]["seconds_per_byte"] == saved.seconds_per_byte
    assert set(found["off_by_factor"]) == {"r float32", "m", "link data"}
    assert all(factor >= 1 for factors in found["off_by_factor"].values() for factor in factors)


@pytest.mark.slow
def test_calibrate_as_a_command_of_its_own_at_full_size(tmp_path):
    """On the simulated mesh, as CI runs it: what it says is printed, and the machine that it writes plans."""
    line = [sys.executable, "-m", "jaxplan", "calibrate", "--simulated", "8", "--mesh", "data=4,model=2", "--name", "lab"]
    home = {**os.environ, "JAXPLAN_HOME": str(tmp_path), "XLA_FLAGS": ""}
    shown = subprocess.run(line, env=home, capture_output=True, text=True, check=True).stdout
    print(shown)
    assert re.match(r"machine lab, measured in [\d.]+ s\n", shown)
    for quantity in ("r float32", "r bfloat16", "m  ", "link data", "link model"):
        assert re.search(rf"^{quantity}.* samples, .* at worst$", shown, re.MULTILINE), quantity
    x = jax.ShapeDtypeStruct((512, 512), "float32")
    mesh = AbstractMesh((4, 2), ("data", "model"))
    plan = jaxplan.make_plan(lambda w, x: x @ w, x, x, mesh=mesh, machine=str(tmp_path / "machines" / "lab.json"))
    assert plan.seconds > 0 and set(plan.modelled.numbers.machine.axis_links) == {"data", "model"}


def test_mistakes_are_told_before_anything_is_measured(quick, capsys, monkeypatch):
    def never(*_):
        raise AssertionError("measured")

    with monkeypatch.context() as patch:
        patch.setattr(measure, "calibrate", never)
        assert "is no name for a machine" in failed(capsys, "calibrate", "--name", "a/b")
        assert "ends in .json" in failed(capsys, "calibrate", "-o", "machine")
        assert "32 devices is asked for, and there are 16; --simulated 32" in failed(capsys, "calibrate", "--mesh", "x=32")
        assert "is not AXIS=SIZE" in failed(capsys, "calibrate", "--mesh", "x")
    (quick / "taken").write_text("")
    assert "nothing was changed" in failed(capsys, "calibrate", "--mesh", "x=1", "-o", "taken/here.json")
