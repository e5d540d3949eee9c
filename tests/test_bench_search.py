"""`scripts/bench_search.py` runs, its slopes are those of its points, and its random problems are what they say."""

import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxplan.problem import evaluate
from jaxplan.search import search

with pytest.MonkeyPatch.context() as patched:  # for these imports only: other names in that folder are those of packages
    patched.setattr(sys, "path", [str(Path(__file__).parent.parent / "scripts"), *sys.path])
    import bench_search
    from random_layers import layered

TINY = ["--size=tiny", "--operators=20,40", "--layers=1,2", "--widths=1,2", "--width=2", "--fixed=20", "--depth=1"]


def test_it_runs_tiny_and_draws_what_it_measured(capsys, tmp_path):
    curves = bench_search.main([*TINY, "--sections", "operators,width"])
    printed = capsys.readouterr().out
    assert [c.over for c in curves] == ["operators", "operators", "width"]
    assert printed.count("slope on log-log axes") == 3 and "*" in printed
    assert all(point.seconds > 0 and point.nbytes > 0 for c in curves for point in c.points)
    told = bench_search.drawn(curves, str(tmp_path / "plot.svg"))
    assert (tmp_path / "plot.svg").exists() == told.startswith("plot:")


def test_models_are_planned_from_shapes(capsys):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # as most users have it
        bench_search.main([*TINY, "--sections", "models"])
    printed = capsys.readouterr().out
    assert "llama_8b, 2 layers" in printed and "gpt3_175b, 3 layers" in printed and "another machine" in printed


def test_slopes_are_those_of_powers():
    points = tuple(bench_search.Point(n, n, 1e-3 * n**1.5, 100 * n) for n in (10, 100, 1000))
    made = bench_search.Curve("made up", "operators", points)
    assert made.slope() == pytest.approx(1.5) and made.slope("nbytes") == pytest.approx(1.0)
    assert math.isnan(bench_search.Curve("one", "operators", points[:1]).slope())
    assert bench_search.text_plot(made).count("*") == 3


@pytest.mark.parametrize("sizes", [(8,), (4, 2), (2, 2, 2)])
def test_random_layered_problems_are_legal_and_priced_alike_one_by_one_and_together(sizes):
    problem = layered(12, 3, sizes)
    nothing = np.zeros((len(problem.nodes), len(sizes)), dtype=np.int64)
    assert len(problem.nodes) == 12 and math.isfinite(evaluate(problem, nothing))
    assert search(problem).seconds <= evaluate(problem, nothing)
    edge = problem.edges[0]
    rows = np.indices([4] * len(sizes)).reshape(len(sizes), -1).T
    matrix = edge.price(rows, rows)
    for end in (0, 1):
        labels = edge.price.alike(rows, end)
        for label in set(labels.tolist()):
            same = np.flatnonzero(labels == label)
            assert np.allclose(np.take(matrix, same, end), np.take(matrix, same[:1], end))


def test_an_unknown_section_is_said(capsys):
    with pytest.raises(SystemExit):
        bench_search.main(["--sections", "depth"])
    assert "no section is called 'depth'" in capsys.readouterr().err
