"""The command line, and the demonstration behind `jaxplan demo`."""

import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from jaxplan import __version__, cli, demo
from jaxplan.api import make_plan
from jaxplan.examples.decoder import DecoderConfig, decoder

TINY = DecoderConfig(layers=2, width=32, heads=4, mlp_width=64, vocabulary=128, sequence=16, batch=16)


def test_bare_it_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert "usage: jaxplan" in shown and "Try `jaxplan demo`" in shown
    assert all(command in shown for command in cli.COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxplan {__version__}\n"


def test_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--help"]) == 0
    assert "--mesh" in capsys.readouterr().out


def test_an_unknown_command_is_named_beside_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dmeo"]) == 2
    shown = capsys.readouterr().err
    assert "dmeo" in shown and "demo" in shown.split("choose from")[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "4x2"], "'4x2' is not AXIS=SIZE; write data=4,model=2"),
        (["--mesh", "data=0"], "'data=0' is not AXIS=SIZE"),
        (["--mesh", "data=2,data=2"], "axis 'data' is given twice"),
        (["--steps", "0"], "'0' is not a whole number of at least 1"),
        (["--mesh", "data=4", "--devices", "8"], "the mesh data=4 has 4 devices, but --devices is 8"),
    ],
)
def test_a_mistake_is_explained(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_mesh_of_the_demonstration() -> None:
    assert demo.demo_mesh(None, None) == {"data": 4, "model": 2}
    assert demo.demo_mesh(3, None) == {"data": 3}
    assert demo.demo_mesh(None, {"x": 2}) == demo.demo_mesh(2, {"x": 2}) == {"x": 2}


def test_it_starts_anew_with_as_many_devices_as_the_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    started = {}

    def fake(command: list[str], env: dict[str, str], check: bool) -> SimpleNamespace:
        started.update(command=command, env=env)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_the_user=1 --xla_force_host_platform_device_count=16")
    assert cli.main(["demo", "--mesh", "x=3,y=2", "--steps", "2"]) == 1
    assert started["command"][0] == sys.executable
    assert started["command"][-4:] == ["--mesh", "x=3,y=2", "--steps", "2"]
    assert started["env"]["XLA_FLAGS"].startswith("--xla_of_the_user=1 ")
    assert started["env"]["XLA_FLAGS"].endswith("device_count=6")
    assert started["env"]["JAX_PLATFORMS"] == "cpu"
    assert cli.main(["demo", "--mesh", "x=3,y=2", "--json"]) == 1
    assert started["command"][-1] == "--json"


def test_losses_that_differ_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = decoder(TINY)
    plan = make_plan(program.fn, *program.args, mesh=jax.make_mesh((2,), ("data",)), machine="v5e")
    found = iter([[5.0, 4.0], [5.0, 4.5], [5.0, float("nan")], [5.0, 4.0]])
    monkeypatch.setattr(demo, "losses", lambda *_: next(found))
    assert not demo.compare_losses(plan, program, 2)
    assert "1.1e-01: NOT the same results" in capsys.readouterr().out
    assert not demo.compare_losses(plan, program, 2)


def test_the_demonstration_on_a_tiny_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "BY_HAND", {"data parallel": ("data_parallel",), "Megatron": ("megatron",)})
    program = decoder(TINY)
    mesh = jax.make_mesh((8,), ("model",), devices=jax.devices()[:8])
    plan = make_plan(program.fn, *program.args, mesh=mesh, machine="v5e", donate_argnums=program.donate)
    assert demo.compare_losses(plan, program, 2)
    compiled = demo.compare_traffic(plan, program, TINY)
    assert list(compiled) == ["jaxplan", "data parallel, by hand"]
    shown = capsys.readouterr().out
    assert "the same results" in shown
    assert "data parallel, by hand" in shown
    assert "Megatron does not fit this mesh: heads of 4 do not divide over 'model'" in shown
    assert max(map(len, shown.splitlines())) <= 110


def test_its_results_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"agree": False, "predicted_bytes": 3.0}
    monkeypatch.setattr(demo, "results", lambda mesh, steps: print("the page") or {**found, "given": [mesh, steps]})
    monkeypatch.setattr(sys, "argv", ["demo", "--mesh", "x=4,y=2", "--steps", "2", "--json"])
    assert demo.main() == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {**found, "given": [{"x": 4, "y": 2}, 2]} and shown.err == "the page\n"


@pytest.mark.slow
def test_the_demonstration_as_a_user_runs_it() -> None:
    command = [sys.executable, "-m", "jaxplan", "demo", "--mesh", "data=4,model=2", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Plan for train_step on mesh (data=4 x model=2), machine v5e" in done.stdout
    assert "the same results" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110
