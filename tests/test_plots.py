"""Plots: a file of the kind that its name says, or a clear word of what is missing."""

import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

import jaxplan
from jaxplan import cli


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def product(x, w):
    return jnp.tanh(x @ w)


ARGS = f32(64, 32), f32(32, 16)
STARTS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.fixture(scope="module")
def plan():
    return jaxplan.make_plan(product, *ARGS, mesh=AbstractMesh((4,), ("x",)), machine="v4")


@pytest.fixture(scope="module")
def swept():
    return jaxplan.sweep(product, *ARGS, devices=[2, 4], sizes={"B": [64, 128]}, link_speeds=[1, 0.5], machine="v4")


@pytest.mark.parametrize("kind", STARTS)
def test_memory_and_sweeps_are_drawn(plan, swept, kind, tmp_path):
    pytest.importorskip("matplotlib")
    for draw in (plan.plot_memory, swept.plot):
        path = tmp_path / f"drawn.{kind}"
        draw(path)
        assert path.read_bytes().startswith(STARTS[kind]) and path.stat().st_size > 4000


def test_without_matplotlib_the_extra_is_named(plan, swept, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (plan.plot_memory, swept.plot):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxplan\[plots\]'"):
            draw(tmp_path / "drawn.png")
    assert not list(tmp_path.iterdir())


def test_a_kind_that_cannot_be_drawn_is_told(plan, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"'drawn.gif' must end in .png, .svg or .pdf"):
        plan.plot_memory("drawn.gif")


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "plotmodel.py").write_text("import jax.numpy as jnp\ndef step(x, w):\n    return jnp.tanh(x @ w)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    line = ["sweep", "plotmodel:step", "--spec", "f32[64,32],f32[32,8]", "--devices", "2,4", "--machine", "v4"]
    assert cli.main([*line, "--plot", "out.png"]) == 0 and (tmp_path / "out.png").exists()
    assert "wrote out.png" in capsys.readouterr().err
    assert cli.main([*line, "--plot", "out.gif"]) == 2 and "must end in" in capsys.readouterr().err
    assert cli.main([*line, "--plot", "nowhere/out.png"]) == 2 and "cannot be written" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main([*line, "--plot", "out.png"]) == 2 and "jaxplan[plots]" in capsys.readouterr().err
