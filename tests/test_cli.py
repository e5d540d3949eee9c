"""The command line: what each command prints, how it ends, and what it says of mistakes. (`demo` has a file of its own.)"""

import argparse
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec as P

import jaxplan
from jaxplan import cli, measure
from jaxplan.cli import arguments, output
from jaxplan.files import read_plan, store

MODULE = '''
"""A module as a user writes it."""
import jax, jax.numpy as jnp
import jaxplan

WIDTH = 1024

def step(w, x, y):
    def loss(w):
        return jnp.mean(jnp.square(jax.nn.relu(x @ w["in"]) @ w["out"] - y))
    return jax.tree.map(lambda p, g: p - 0.1 * g, w, jax.grad(loss)(w))

def heavier(w, x, y):
    return step(step(w, x, y), x, y)

def shapes():
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    return {"in": f32(256, WIDTH), "out": f32(WIDTH, 8)}, f32(4096, 256), f32(4096, 8)

def wider():
    w, x, y = shapes()
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct([2 * n if n == WIDTH else n for n in a.shape], a.dtype), w), x, y

one = jax.ShapeDtypeStruct((64, 64), jnp.float32)

def product(a, b):
    return jnp.tanh(a @ b)

def trace(a):
    return a @ a.T

def wrong(a):
    return a @ jnp.ones((3, 3))

@jaxplan.auto_shard(jax.sharding.AbstractMesh((4, 2), ("data", "model")))
def decorated(a):
    return a * 2.0

def broken_shapes():
    raise RuntimeError("no shapes today")

class holder:
    inner = staticmethod(product)

number = 5
'''
MESH = ["--mesh", "data=4,model=2"]
COMMON = [*MESH, "--machine", "cpu"]
SHAPES = ["--shapes", "usermodel:shapes"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("user")
    (path / "usermodel.py").write_text(MODULE)
    (path / "fails.py").write_text("def half():\n    return 1 / 0\n\nhalf()\n")
    (path / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    (path / "needs.py").write_text("import a_package_that_nobody_has\n")
    (path / "syntax.py").write_text("def f(:\n")
    return path


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """A folder to work in, from which the user's modules import."""
    assert len(jax.devices()) == 16  # JAX has started, so that no command can have it start with fewer
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("usermodel", "fails", "leaves", "needs", "syntax"):
        sys.modules.pop(name, None)


@pytest.fixture
def saved(here, capsys):
    """plan.json in the folder."""
    assert cli.main(["plan", "usermodel:step", *COMMON, *SHAPES, "-o", "plan.json"]) == 0
    capsys.readouterr()
    return here / "plan.json"


# --- plan ------------------------------------------------------------------------------------------------------------


def test_plan_prints_and_saves_what_the_api_plans(here, capsys):
    assert cli.main(["plan", "usermodel:step", *COMMON, *SHAPES, "-o", "plan.json"]) == 0
    shown = capsys.readouterr()
    assert "Plan for step on mesh (data=4 x model=2), machine cpu" in shown.out and "w/in" in shown.out
    assert "wrote plan.json" in shown.err
    import usermodel  # type: ignore[import-not-found]

    plan = jaxplan.make_plan(usermodel.step, *usermodel.shapes(), mesh=AbstractMesh((4, 2), ("data", "model")), machine="cpu")
    loaded = jaxplan.load_plan("plan.json", usermodel.step, *usermodel.shapes(), mesh=plan.mesh)
    assert loaded.in_specs == plan.in_specs and loaded.seconds == plan.seconds


def test_arguments_by_spec_and_pins(here, capsys):
    options = ["--spec", "f32[512,256], bf16[256,128]", "--pin", "a=-,data+model", "--pin", "b=data", "--json"]
    with jax.numpy_dtype_promotion("standard"):
        assert cli.main(["plan", "usermodel:product", *COMMON, *options]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["inputs"]["a"]["spec"] == [None, ["data", "model"]] and value["inputs"]["b"]["spec"] == ["data"]
    assert value["inputs"]["b"]["dtype"] == "bfloat16"
    assert value["asked"]["pins"] == {"a": [None, ["data", "model"]], "b": ["data"]}


def test_an_argument_alone_a_decorated_function_and_one_inside_a_class(here, capsys):
    assert cli.main(["plan", "usermodel:trace", *COMMON, "--shapes", "usermodel:one"]) == 0
    assert "float32[64,64]" in capsys.readouterr().out
    assert cli.main(["plan", "usermodel:decorated", *COMMON, "--spec", "f32[64]"]) == 0
    assert "Plan for decorated" in capsys.readouterr().out
    assert cli.main(["plan", "usermodel:holder.inner", *COMMON, "--spec", "f32[64,8],f32[8,64]"]) == 0
    assert "Plan for product" in capsys.readouterr().out


def test_donated_arguments_and_a_certificate(here, capsys):
    line = ["plan", "usermodel:step", *COMMON, *SHAPES]
    assert (
        cli.main([*line, "--donate", "w", "--certify", "-o", "donated.json"]) == 0 and cli.main([*line, "-o", "kept.json"]) == 0
    )
    donated, kept = read_plan("donated.json"), read_plan("kept.json")
    assert {path for path, leaf in donated.inputs.items() if leaf.donated} == {"w/in", "w/out"}
    assert donated.memory.peak_bytes < kept.memory.peak_bytes
    assert donated.cost.bound is not None and donated.cost.bound <= donated.cost.seconds and kept.cost.bound is None
    capsys.readouterr()
    assert cli.main(["diff", "kept.json", "donated.json"]) == 1
    assert "donated: nothing -> w/in, w/out" in capsys.readouterr().out
    assert (
        cli.main(["check", "donated.json", "usermodel:step", *SHAPES, "--max-memory-regression", "0%", "-o", "again.json"]) == 0
    )
    assert read_plan("again.json") == donated


def test_a_budget(here, saved, capsys):
    peak = read_plan(saved).memory.peak_bytes
    base = ["plan", "usermodel:step", *COMMON, *SHAPES]
    assert cli.main([*base, "--budget", f"{peak:.0f}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["asked"]["memory_budget"] == f"{peak:.0f}"
    assert cli.main([*base, "--budget", "unlimited", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["asked"]["memory_budget"] == "unlimited"
    assert cli.main([*base, "--budget", "1KiB"]) == 1
    assert "jaxplan plan: nothing fits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["usermodel:step", "--mesh", "4x2"], "'4x2' is not AXIS=SIZE; write data=4,model=2"),
        (["usermodel:step", "--mesh", "data=0"], "'data=0' is not AXIS=SIZE"),
        (["usermodel:step", "--mesh", "data=4,data=2"], "axis 'data' is given twice"),
        (["usermodel:step", "--mesh", ""], "'' is not AXIS=SIZE"),
        (["usermodel:step", "--mesh", "data=" + "9" * 5000], "is not AXIS=SIZE"),
        (["usermodel:step"], "the following arguments are required: --mesh"),
        (["usermodel", *MESH], "'usermodel' is not MODULE:NAME, such as train:step"),
        (["usermodel.py:step", *MESH], "write usermodel:step"),
        (["./src/train.py:step", *MESH], "write src.train:step"),
        (["nowhere:step", *MESH], "there is no module 'nowhere' here"),
        (["usermodel.sub:step", *MESH], "there is no module 'usermodel.sub' here"),
        (["needs:step", *MESH], "No module named 'a_package_that_nobody_has'"),
        (["fails:step", *MESH], "'fails' does not import: ZeroDivisionError: division by zero"),
        (["leaves:step", *MESH], "'leaves' does not import: SystemExit: 3"),
        (["syntax:step", *MESH], "'syntax' does not import: SyntaxError"),
        (["usermodel:stpe", *MESH], "'usermodel' has no 'stpe'; did you mean step"),
        (["usermodel:number", *MESH], "'usermodel:number' is no function, but int"),
        (["usermodel:step", *MESH], "give its arguments by --shapes MODULE:NAME or --spec"),
        (["usermodel:step", *MESH, "--spec", "f32[8]"], "step cannot be called with 1 arguments"),
        (["usermodel:step", *MESH, "--shapes", "usermodel:none"], "has no 'none'"),
        (["usermodel:step", *MESH, "--shapes", "usermodel:broken_shapes"], "fails: RuntimeError: no shapes today"),
        (["usermodel:trace", *MESH, "--spec", "f32[8"], "'f32[8' is not DTYPE[SIZES]; write f32[8,128],i32[8]"),
        (["usermodel:trace", *MESH, "--spec", "f33[8]"], "no dtype is called 'f33'"),
        (["usermodel:trace", *MESH, "--spec", "f32[8],"], "ends in a comma"),
        (["usermodel:trace", *MESH, "--spec", "f32[8]", "--shapes", "usermodel:one"], "not allowed with"),
        (["usermodel:trace", *MESH, "--spec", "f32[8,8]", "--machine", "v9"], "no machine is called 'v9'"),
        (["usermodel:trace", *MESH, "--spec", "f32[8,8]", "--budget", "lots"], "memory_budget 'lots' is not a size"),
        (["usermodel:trace", *MESH, "--spec", "f32[8,8]", "--search", "luck"], "no search is called 'luck'"),
        (["usermodel:trace", *MESH, "--spec", "f32[8,8]", "--pin", "b=data"], "no input of trace has that path"),
        (["usermodel:trace", *MESH, "--spec", "f32[8,8]", "--pin", "a=P(data)"], "is not PATH=SPEC"),
        (["usermodel:trace", *MESH, "--spec", "f32[8,8]", "--donate", "a,,"], "is no list of argument names"),
        (["usermodel:trace", *MESH, "--spec", "f32[8,8]", "-o", "none/plan.json"], "none/plan.json cannot be written: No such"),
        (["usermodel:wrong", *MESH, "--spec", "f32[8,8]"], "the function does not trace: TypeError"),
    ],
)
def test_a_mistake_is_told_with_status_2_and_nothing_on_stdout(line, said, here, capsys):
    assert cli.main(["plan", *line]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and not shown.out


def test_an_error_of_the_users_code_comes_with_the_users_lines_only(here, capsys):
    assert cli.main(["plan", "fails:step", *MESH]) == 2
    told = capsys.readouterr().err
    assert "fails.py" in told and "return 1 / 0" in told
    assert "jaxplan/cli" not in told and "importlib" not in told
    assert cli.main(["plan", "usermodel:wrong", *MESH, "--spec", "f32[8,8]"]) == 2
    told = capsys.readouterr().err
    assert "return a @ jnp.ones((3, 3))" in told and "jaxplan/cli" not in told


def test_a_full_disk_keeps_the_old_plan(saved, capsys, monkeypatch):
    before = saved.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    assert cli.main(["plan", "usermodel:heavier", *COMMON, *SHAPES, "-o", "plan.json"]) == 2
    shown = capsys.readouterr()
    assert "plan.json cannot be written: No space left on device; nothing was changed" in shown.err and not shown.out
    assert saved.read_bytes() == before and {p.name for p in saved.parent.iterdir()} <= {"plan.json", "__pycache__"}


# --- show and diff ---------------------------------------------------------------------------------------------------


def test_show_needs_no_function(saved, capsys, monkeypatch):
    monkeypatch.setattr(arguments, "imported", lambda *_: pytest.fail("imported"))
    assert cli.main(["show", "plan.json"]) == 0
    shown = capsys.readouterr().out
    for part in ("Plan for step on mesh (data=4 x model=2), machine cpu", "w/in", "exchange", "modelled step", "fingerprint"):
        assert part in shown
    assert "\noutput" not in shown and max(map(len, shown.splitlines())) <= 115
    assert cli.main(["show", "plan.json", "--outputs"]) == 0
    assert "\noutput" in capsys.readouterr().out
    assert cli.main(["show", "plan.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(saved.read_text())
    assert cli.main(["show", "plan.json", "--python"]) == 0
    space = {}
    exec(capsys.readouterr().out, space)
    assert space["INPUTS"] == {path: P(*leaf.spec) for path, leaf in read_plan(saved).inputs.items()}


@pytest.mark.parametrize("command", [["show"], ["diff", "plan.json"], ["check"]])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file"),
        ("{", "truncated"),
        ("[" * 1000, "cannot be read as a plan"),
        ('{"format": 1}', "but no plan"),
    ],
)
def test_what_is_no_plan_is_refused(command, content, said, saved, capsys):
    if content is not None:
        Path("bad.json").write_text(content)
    line = [command[0], "bad.json", "usermodel:step"] if command == ["check"] else [*command, "bad.json"]
    assert cli.main(line) == 2
    shown = capsys.readouterr()
    assert f"jaxplan {command[0]}: bad.json" in shown.err and said in shown.err and not shown.out


def test_a_folder_and_a_huge_file_are_refused(saved, capsys):
    assert cli.main(["show", "."]) == 2
    assert "cannot be read" in capsys.readouterr().err
    Path("huge.json").touch()
    os.truncate("huge.json", 100 * 10**6)
    assert cli.main(["show", "huge.json"]) == 2
    assert "more than 32 MiB" in capsys.readouterr().err


def test_diff_of_a_plan_with_itself(saved, capsys):
    assert cli.main(["diff", "plan.json", "plan.json"]) == 0
    assert capsys.readouterr().out == "the plans are the same\n"


def test_diff_tells_specs_cost_memory_and_exchanges(saved, capsys):
    line = [
        "plan",
        "usermodel:step",
        "--mesh",
        "data=4,model=2",
        "--machine",
        "a100",
        *SHAPES,
        "--pin",
        "w/in=data",
        "-o",
        "new.json",
    ]
    assert cli.main(line) == 0
    capsys.readouterr()
    assert cli.main(["diff", "plan.json", "new.json"]) == 1
    shown = capsys.readouterr().out
    old, new = read_plan("plan.json"), read_plan("new.json")
    assert "machine: cpu (" in shown and "pins: none -> w/in: P('data',)" in shown
    assert "input w/in" in shown and "P('data',)" in shown
    assert f"{(new.cost.seconds - old.cost.seconds) / old.cost.seconds:+.2%}" in shown
    assert "peak memory per device" in shown and "sent per device by" in shown
    assert cli.main(["diff", "plan.json", "new.json", "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert value["same"] is False and value["leaves"]["input w/in"]["new"]["spec"] == ["data"]
    assert value["totals"]["seconds"] == {
        "old": old.cost.seconds, "new": new.cost.seconds, "relative": (new.cost.seconds - old.cost.seconds) / old.cost.seconds
    }  # fmt: skip
    sent = sum(entry["new"] - entry["old"] for entry in value["exchanges"])
    assert sent == pytest.approx(new.wire_bytes - old.wire_bytes)


def test_diff_tells_of_another_program(saved, capsys):
    assert cli.main(["plan", "usermodel:heavier", *COMMON, "--shapes", "usermodel:wider", "-o", "new.json"]) == 0
    capsys.readouterr()
    assert cli.main(["diff", "plan.json", "new.json"]) == 1
    shown = capsys.readouterr().out
    assert "program: equations:" in shown and "function: step -> heavier" in shown
    assert "float32[256,1024]" in shown and "float32[256,2048]" in shown


# --- check -----------------------------------------------------------------------------------------------------------


def test_check_passes_what_is_as_before(saved, capsys):
    assert cli.main(["check", "plan.json", "usermodel:step", *SHAPES, "--max-regression", "2%"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("ok: modelled step") and "at most +2.00% is allowed" in shown and "the plans are the same" in shown


def test_check_refuses_another_function_unless_it_is_called_alike(saved, capsys):
    assert cli.main(["check", "plan.json", "usermodel:trace", "--spec", "f32[8,8]", "-o", "new.json"]) == 2
    shown = capsys.readouterr()
    assert "plan.json is a plan of 'step', whose inputs are others than those of 'trace'" in shown.err and shown.out == ""
    assert not Path("new.json").exists()


def test_check_fails_what_got_costlier(saved, capsys):
    line = ["check", "plan.json", "usermodel:heavier", *SHAPES]
    assert cli.main([*line, "--max-regression", "2%", "-o", "new.json"]) == 1
    shown = capsys.readouterr().out
    old, new = read_plan("plan.json"), read_plan("new.json")
    change = (new.cost.seconds - old.cost.seconds) / old.cost.seconds
    assert change > 0.02 and f"({change:+.2%}); at most +2.00% is allowed" in shown and shown.startswith("FAILED")
    assert cli.main([*line, "--max-regression", f"{change + 0.01:.4f}"]) == 0
    assert cli.main([*line, "--max-regression", f"{100 * change - 1:.4f}%"]) == 1
    capsys.readouterr()
    assert cli.main([*line, "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert value["ok"] is False and value["broken"] == ["seconds"] and value["limits"] == {"seconds": 0.0}


def test_check_of_memory(saved, capsys):
    line = ["check", "plan.json", "usermodel:step", "--shapes", "usermodel:wider", "--max-regression", "10000%"]
    assert cli.main(line) == 0
    assert cli.main([*line, "--max-memory-regression", "5%"]) == 1
    assert "FAILED: peak memory" in capsys.readouterr().out


def test_check_plans_as_the_file_was_planned(here, capsys):
    line = ["plan", "usermodel:step", *COMMON, *SHAPES, "--pin", "x=-,model", "--search", "hsm2dl", "--budget", "unlimited"]
    assert cli.main([*line, "-o", "plan.json"]) == 0
    assert cli.main(["check", "plan.json", "usermodel:step", *SHAPES, "-o", "again.json"]) == 0
    assert Path("plan.json").read_bytes() == Path("again.json").read_bytes()


def test_check_of_a_share_that_is_none(saved, capsys):
    for text in ("much", "-1%", "nan", "inf%"):
        assert cli.main(["check", "plan.json", "usermodel:step", f"--max-regression={text}"]) == 2
        assert "is not a share; write 2%" in capsys.readouterr().err


# --- audit -----------------------------------------------------------------------------------------------------------


def test_audit_beside_the_prediction(saved, capsys):
    assert cli.main(["audit", "usermodel:step", *SHAPES, "--plan", "plan.json", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["predicted_wire_bytes"] == read_plan(saved).wire_bytes
    assert value["wire_bytes"] == pytest.approx(sum(c["wire_bytes"] for c in value["collectives"]))
    assert value["flops"] > 0
    assert cli.main(["audit", "usermodel:step", *SHAPES, "--plan", "plan.json"]) == 0
    shown = capsys.readouterr().out
    assert "collective" in shown and "predicted by the plan:" in shown


def test_audit_of_another_function_or_too_large_a_mesh(saved, capsys):
    assert cli.main(["audit", "usermodel:heavier", *SHAPES, "--plan", "plan.json"]) == 2
    assert "another program" in capsys.readouterr().err
    assert cli.main(["audit", "usermodel:step", *SHAPES, "--mesh", "data=512"]) == 2
    assert "512 devices are needed, and JAX has started with 16" in capsys.readouterr().err
    assert cli.main(["audit", "usermodel:step", *SHAPES]) == 2
    assert "is not jitted" in capsys.readouterr().err


def run(folder, *line, **options):
    """The command line in a process of its own, as a user runs it."""
    environment = os.environ | {"PYTHONPATH": str(Path(jaxplan.__file__).parents[1]), "PYTHONWARNINGS": "ignore"}
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "-m", "jaxplan", *line]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, **options)


def test_audit_simulates_the_devices_it_needs(folder):
    done = run(folder, "audit", "usermodel:step", *SHAPES, "--mesh", "data=3,model=2", "--machine", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["predicted_wire_bytes"] is not None


# --- how it ends -----------------------------------------------------------------------------------------------------


class Closed:
    """A stdout whose reader has gone."""

    def write(self, *_):
        raise BrokenPipeError

    flush = write


def test_a_reader_who_has_gone_does_not_change_the_answer(saved, monkeypatch, capsys):
    assert cli.main(["plan", "usermodel:heavier", *COMMON, *SHAPES, "-o", "new.json"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        assert cli.main(["diff", "plan.json", "new.json"]) == 1
        assert cli.main(["show", "plan.json"]) == 0
        assert cli.main([]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_stdout_closed_early_in_a_real_pipe(saved):
    environment = os.environ | {"PYTHONPATH": str(Path(jaxplan.__file__).parents[1]), "PYTHONWARNINGS": "ignore"}
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "jaxplan", "show", "plan.json"]
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_output_that_cannot_be_written_is_told(saved):
    environment = os.environ | {"PYTHONPATH": str(Path(jaxplan.__file__).parents[1]), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "jaxplan", "show", "plan.json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert done.returncode == 2 and "the output cannot be written" in done.stderr and "Traceback" not in done.stderr


def test_an_interrupt(saved, monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    command = cli.COMMANDS["show"]
    monkeypatch.setitem(cli.COMMANDS, "show", cli.Command(command.help, command.options, interrupted))
    assert cli.main(["show", "plan.json"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_progress_is_told_only_of_what_takes_long(monkeypatch, capsys):
    monkeypatch.setattr(output, "PATIENCE", 0.05)
    monkeypatch.setattr(output, "AGAIN", 0.05)
    with output.progress("work that nobody watches"):
        time.sleep(0.15)
    assert capsys.readouterr() == ("", ""), "stderr is no terminal here"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with output.progress("quick work"):
        pass
    assert capsys.readouterr() == ("", "")
    with output.progress("long work"):
        time.sleep(0.3)
    shown = capsys.readouterr()
    assert not shown.out and shown.err.count("long work ... 0 s") >= 2 and shown.err.splitlines()[-1].startswith("long work: 0.")


def test_every_command_has_help_and_json(capsys):
    for name in cli.COMMANDS:
        assert cli.main([name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert f"usage: jaxplan {name}" in shown
        assert ("--json" in shown) == (name != "completion")


# --- completion ------------------------------------------------------------------------------------------------------


def complete(script, *words):
    """What bash offers for the last word."""
    line = " ".join(f"'{word}'" for word in ("jaxplan", *words))
    code = f'{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}; _jaxplan; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_commands_options_and_files(saved, capsys):
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert complete(script, "sh") == ["show"]
    assert set(cli.COMMANDS) <= set(complete(script, ""))
    assert complete(script, "check", "--max-r") == ["--max-regression"]
    assert complete(script, "show", "plan.j") == ["plan.json"]


def test_the_other_shells_know_every_command_and_option(capsys):
    for shell in ("zsh", "fish"):
        assert cli.main(["completion", shell]) == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in cli.COMMANDS) and "max-regression" in shown
    assert cli.main(["completion", "tcsh"]) == 2


# --- what people write -----------------------------------------------------------------------------------------------


def test_array_specs():
    assert arguments.array_specs("f32[8,128],bf16[]") == (("float32", (8, 128)), ("bfloat16", ()))
    assert arguments.array_specs(" int8[ 3 , 4 ] ,pred[2]") == (("int8", (3, 4)), ("bool", (2,)))
    for name in set(arguments.DTYPES.values()):
        assert jnp.dtype(name).name == name
    for text in ("", "f32", "f32[a]", "f32[-1]", "f32[1.5]", "f32[8]x", "f32[8]f32[8]", "f32[" + "9" * 5000 + "]"):
        with pytest.raises(argparse.ArgumentTypeError):
            arguments.array_specs(text)


def test_shares_and_pins():
    assert arguments.percent("2%") == 0.02 and arguments.percent("0.5") == 0.5 and arguments.percent(" 0 % ") == 0.0
    assert arguments.pin("a/b=-,x,y+z") == ("a/b", (None, "x", ("y", "z")))
    assert arguments.pin("a=") == ("a", ())
    assert arguments.pin("a=b=x") == ("a=b", ("x",))
    for text in ("a", "=x", "a=x,,y", "a=x+"):
        with pytest.raises(argparse.ArgumentTypeError):
            arguments.pin(text)


def test_help_and_reading_a_file_start_no_backend(folder, saved):
    code = """
    import sys
    from jaxplan import cli
    cli.main(["--help"])
    assert "jax" not in sys.modules
    cli.main(["show", "plan.json"])
    from jax._src import xla_bridge
    assert not xla_bridge.backends_are_initialized()
    """
    environment = os.environ | {"PYTHONPATH": str(Path(jaxplan.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


# --- the page --------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "command_line.md").read_text()


def commands(text):
    return [shlex.split(line) for line in re.findall(r"^\s*\$? ?jaxplan ([^|\n]*)", text, re.M)]


def test_every_command_of_the_page_works(tmp_path, monkeypatch, capsys):
    assert len(jax.devices()) == 16
    (tmp_path / "train.py").write_text(re.findall(r"```python\n(.*?)```", PAGE, re.S)[0])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "train", raising=False)
    monkeypatch.chdir(tmp_path)
    nodes = {"intervals": [[0, 2]], "costs": [[3, 1]], "usages": [[1, 2]]}
    problem = {"nodes": nodes, "edges": {"nodes": [], "costs": []}, "usage_limit": 2}
    (tmp_path / "problem.json.gz").write_bytes(gzip.compress(json.dumps({"problem": problem}).encode()))
    monkeypatch.setenv("JAXPLAN_HOME", str(tmp_path / "home"))
    for name, value in (("SIDES", (16,)), ("PASSES", (1 << 12,)), ("PAYLOADS", (64, 4096)), ("TARGET", 1e-4), ("REPEATS", 2)):
        monkeypatch.setattr(measure, name, value)  # that it runs is tested, not what it measures
    lines = [line for block in re.findall(r"```console\n(.*?)```", PAGE, re.S) for line in commands(block)]
    for line in lines:
        assert cli.main(line) == 0, (line, capsys.readouterr().err)
        assert capsys.readouterr().out
    assert {line[0] for line in lines} == set(cli.COMMANDS) - {"demo"}
    sys.modules.pop("train", None)
    (snippet,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    (line,) = commands(snippet)
    assert line[0] == "check" and cli.main(line) == 0
    (tmp_path / "train.py").write_text((tmp_path / "train.py").read_text().replace("4096", "65536"))
    del sys.modules["train"]
    assert cli.main(line) == 1
    sys.modules.pop("train", None)
