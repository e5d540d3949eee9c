"""Files of the contest on intra-operator parallelism, and `jaxplan solve` on them."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_solve import by_force, random_problem

import jaxplan
from jaxplan import cli
from jaxplan.iopddl import ProblemFileError, content_of, lifted, problem_of, read_problem, write_problem
from jaxplan.solve import cost_of, peak_usage


def small():
    """Two nodes, one edge, everything legal."""
    return {
        "problem": {
            "name": "small",
            "nodes": {"intervals": [[0, 4], [2, 6]], "costs": [[5, 1], [2, 3]], "usages": [[1, 4], [2, 2]]},
            "edges": {"nodes": [[0, 1]], "costs": [[0, 7, 10**18, 1]]},
            "usage_limit": 6,
        }
    }


def zipped(path, content):
    path.write_bytes(gzip.compress(content if isinstance(content, bytes) else json.dumps(content).encode()))
    return str(path)


def run(*words):
    """The command in a process of its own, as it is used."""
    environment = os.environ | {"PYTHONPATH": str(Path(jaxplan.__file__).parents[1])}
    return subprocess.run([sys.executable, "-m", "jaxplan", "solve", *words], capture_output=True, text=True, env=environment)


# --- the format ---------------------------------------------------------------------------------------------


def test_what_a_file_means(tmp_path):
    problem = read_problem(zipped(tmp_path / "p.gz", small()))
    assert cost_of(problem, [1, 1]) == 5 and cost_of(problem, [0, 1]) == 15
    assert cost_of(problem, [1, 0]) == np.inf
    assert peak_usage(problem, [1, 1]) == (2, 4, 6.0)
    assert (problem.limit, problem.name) == (6.0, "small")


@pytest.mark.parametrize("seed", range(5))
def test_what_is_written_is_read_back(tmp_path, seed):
    problem = random_problem(seed)
    write_problem(problem, tmp_path / "p.gz")
    again = read_problem(tmp_path / "p.gz")
    assert content_of(again) == content_of(problem)
    for mine, theirs in zip((*problem.costs, *problem.usages, *problem.tables), (*again.costs, *again.usages, *again.tables)):
        assert np.array_equal(mine, theirs)
    assert np.array_equal(problem.intervals, again.intervals) and np.array_equal(problem.edges, again.edges)
    assert problem.limit == again.limit


def nodes(**parts):
    return lambda content: content["problem"]["nodes"].update(parts)


def edges(**parts):
    return lambda content: content["problem"]["edges"].update(parts)


def top(**parts):
    return lambda content: content["problem"].update(parts)


BAD = {
    "no problem": (lambda content: content.pop("problem"), "problem: missing"),
    "no nodes": (lambda content: content["problem"].pop("nodes"), "problem.nodes: missing"),
    "nodes no object": (top(nodes=[]), "problem.nodes: list where an object is wanted"),
    "costs no array": (nodes(costs={}), "problem.nodes.costs: dict where an array is wanted"),
    "too few costs": (nodes(costs=[[5, 1]]), "problem.nodes.costs: 1 entries for 2 nodes"),
    "too few tables": (edges(costs=[]), "problem.edges.costs: 0 entries for 1 edges"),
    "no strategies": (nodes(costs=[[5, 1], []], usages=[[1, 4], []]), "problem.nodes.costs[1]: the node has no strategy"),
    "ragged usages": (nodes(usages=[[1], [2, 2]]), "problem.nodes.usages[0]: 1 usages for 2 strategies"),
    "ragged table": (edges(costs=[[0, 7, 1]]), "problem.edges.costs[0]: 3 costs for 2 x 2 strategies"),
    "ragged interval": (nodes(intervals=[[0, 4], [2]]), "problem.nodes.intervals[1]: [2] is not a pair of whole numbers"),
    "interval of fractions": (nodes(intervals=[[0, 4], [2, 5.5]]), "problem.nodes.intervals[1]: [2, 5.5] is not a pair"),
    "interval backwards": (nodes(intervals=[[0, 4], [6, 2]]), "problem.nodes.intervals[1]: [6, 2] is not 0 <= start <= end"),
    "interval before zero": (nodes(intervals=[[-1, 4], [2, 6]]), "problem.nodes.intervals[0]: [-1, 4] is not 0 <= start"),
    "interval too large": (nodes(intervals=[[0, 4], [2, 10**30]]), "problem.nodes.intervals[1]"),
    "negative usage": (nodes(usages=[[1, -4], [2, 2]]), "problem.nodes.usages[0][1]: -4 is negative"),
    "usage a word": (nodes(usages=[[1, "4"], [2, 2]]), "problem.nodes.usages[0][1]: '4' is not a finite number"),
    "usage a truth": (nodes(usages=[[1, True], [2, 2]]), "problem.nodes.usages[0][1]: True is not a finite number"),
    "cost a list": (nodes(costs=[[5, [1]], [2, 3]]), "problem.nodes.costs[0][1]: [1] is not a finite number"),
    "cost not finite": (nodes(costs=[[5, float("nan")], [2, 3]]), "problem.nodes.costs[0][1]: nan is not a finite number"),
    "cost beyond a double": (nodes(costs=[[5, 10**400], [2, 3]]), "problem.nodes.costs[0]: a number is beyond"),
    "edge to nowhere": (edges(nodes=[[0, 2]]), "problem.edges.nodes[0]: [0, 2] are not two of the 2 nodes"),
    "edge to itself": (edges(nodes=[[1, 1]]), "problem.edges.nodes[0]: [1, 1] are not two of the 2 nodes"),
    "negative edge": (edges(nodes=[[0, -1]]), "problem.edges.nodes[0]: [0, -1] are not two of the 2 nodes"),
    "limit missing": (lambda content: content["problem"].pop("usage_limit"), "problem.usage_limit: None is not a finite number"),
    "limit negative": (top(usage_limit=-1), "problem.usage_limit: -1 is negative"),
    "name a number": (top(name=3), "problem.name: 3 is not a string"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_with_the_path_inside(case):
    content = small()
    problem_of(content)
    damage, said = BAD[case]
    damage(content)
    with pytest.raises(ProblemFileError) as caught:
        problem_of(content)
    assert str(caught.value).startswith(said)


# --- lists of whole numbers, read without JSON's objects ------------------------------------------------------


def put_back(content, lists):
    """JSON from what `lifted` gives."""
    if isinstance(content, dict):
        return {key: put_back(value, lists) for key, value in content.items()}
    if not isinstance(content, list):
        return content
    if len(content) == 1 and type(content[0]) is int and content[0] < len(lists.begin) - 1:
        return lists.numbers[lists.begin[content[0]] : lists.begin[content[0] + 1]].tolist()
    return [put_back(value, lists) for value in content]


@pytest.mark.parametrize(
    "text",
    [
        "[1,2,3]",
        " [ -1 ,\n\t20\r, 0 ] ",
        "[[1],[2,3],[]]",
        '{"a[1]": [1], "b\\"[2]": ["[3]", [4, 5]], "c": [6, "\\\\"], "d": [7]}',
        "[1.5, 2]",
        "[[1e3], [2], [-0], [true], [null]]",
        "[[1000000000000000000], [9223372036854775807], [9223372036854775808], [10], [99999999999999999999]]",
        "[" + ",".join(f"[{k}]" for k in range(2222)) + "]",
    ],
)
def test_lists_that_are_lifted_are_those_of_the_text(text):
    assert put_back(*lifted(text.encode())) == json.loads(text)


NO_JSON = ["[1,]", "[01]", "[1 2]", "[--1]", "[-]", "[1", "[1,", '["a', '["\\', "[+1]", "[1\x0b]", "", "[1]]"]


@pytest.mark.parametrize("text", NO_JSON)
def test_what_is_no_json_is_none_after_lifting(text):
    for decode in (json.loads, lambda text: lifted(text.encode())):
        with pytest.raises(ValueError, match=r"."):
            decode(text)


@pytest.mark.parametrize("space", [None, 1])
def test_a_file_means_the_same_lifted(space):
    for seed in range(5):
        plain = content_of(random_problem(seed, 30))
        again = problem_of(*lifted(json.dumps(plain, indent=space).encode()))
        assert content_of(again) == plain
        assert all(cost.dtype == float for cost in (*again.costs, *again.usages, *again.tables))


@pytest.mark.parametrize("case", BAD)
def test_no_bad_file_is_let_through_by_lifting(case):
    content = small()
    damage, _ = BAD[case]
    damage(content)
    with pytest.raises(ValueError, match=r"."):
        problem_of(*lifted(json.dumps(content).encode()))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_encodings_that_json_knows(tmp_path, encoding):
    content = small()
    content["problem"]["name"] = "größer [1] als 0"
    path = zipped(tmp_path / "p.gz", json.dumps(content, ensure_ascii=False).encode(encoding))
    assert content_of(read_problem(path)) == content


def test_numbers_that_are_not_whole_are_read_too(tmp_path):
    content = small()
    content["problem"]["nodes"]["costs"][0] = [5.5, 1e3]
    content["problem"]["nodes"]["usages"][1] = [2, 2.25]
    content["problem"]["edges"]["costs"] = [[0, 7, 1e30, 10**25]]
    problem = read_problem(zipped(tmp_path / "p.gz", content))
    assert problem.costs[0].tolist() == [5.5, 1000.0] and problem.usages[1].tolist() == [2.0, 2.25]
    assert problem.tables[0].tolist() == [[0.0, 7.0], [np.inf, np.inf]]


# --- the command --------------------------------------------------------------------------------------------


def test_the_command_solves(tmp_path):
    done = run(zipped(tmp_path / "p.gz", small()), "--time-limit", "20", "--json")
    facts, answer = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 0
    assert answer == [1, 1]
    assert (facts["cost"], facts["bound"], facts["gap"], facts["peak"], facts["ended"]) == (5.0, 5.0, 0.0, 6.0, "proven")


def test_the_command_solves_in_its_own_process(tmp_path):
    problem = random_problem(3)
    write_problem(problem, tmp_path / "p.gz")
    done = run(str(tmp_path / "p.gz"), "--time-limit", "20", "--seed", "3")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert cost_of(problem, answer) == by_force(problem) and peak_usage(problem, answer).usage <= problem.limit
    assert "cost" in done.stderr and "bound" in done.stderr


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (b"no gzip at all", 2, "is not a gzip file"),
        (gzip.compress(b"{}" * 1000, mtime=0)[:-9], 2, "is not a gzip file, or not a whole one"),
        (gzip.compress(b"{ no json", mtime=0), 2, "holds no JSON"),
        (gzip.compress(b"\xff\xfe\xfa", mtime=0), 2, "holds no JSON"),
        (gzip.compress(b"[" * 100_000, mtime=0), 2, "holds no JSON"),
        (gzip.compress(b"[]", mtime=0), 2, "problem: missing"),
    ],
)
def test_the_command_names_a_bad_file(tmp_path, capsys, content, status, said):
    (tmp_path / "bad.gz").write_bytes(content)
    assert cli.main(["solve", str(tmp_path / "bad.gz")]) == status
    shown = capsys.readouterr()
    assert not shown.out and said in shown.err and "bad.gz" in shown.err and "Traceback" not in shown.err


def test_the_command_names_a_file_that_is_not_there(tmp_path, capsys):
    assert cli.main(["solve", str(tmp_path / "none.gz")]) == 2
    assert "none.gz cannot be read: No such file" in capsys.readouterr().err
    assert cli.main(["solve", str(tmp_path)]) == 2
    assert "cannot be read: Is a directory" in capsys.readouterr().err


def test_the_command_says_what_is_short(tmp_path, capsys):
    content = small()
    content["problem"]["usage_limit"] = 2
    assert cli.main(["solve", zipped(tmp_path / "p.gz", content)]) == 1
    shown = capsys.readouterr()
    assert not shown.out
    assert "in [2, 4) the smallest usages add up to 3, 1 more than the limit of 2" in shown.err


@pytest.mark.parametrize("words", ["--time-limit 0", "--time-limit nan", "--time-limit x", "--seed -1", "--workers 0"])
def test_options_that_mean_nothing(tmp_path, words, capsys):
    assert cli.main(["solve", zipped(tmp_path / "p.gz", small()), *words.split()]) == 2
    assert words.split()[0] in capsys.readouterr().err


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    """A file that takes longer than any test waits: too large to branch, and its dual stays below the optimum."""
    path = tmp_path_factory.mktemp("hard") / "hard.gz"
    problem = random_problem(11, 4000, 0.3, planted=True)
    write_problem(problem, path)
    return problem, str(path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_the_best_known(hard, number):
    problem, path = hard
    environment = os.environ | {"PYTHONPATH": str(Path(jaxplan.__file__).parents[1])}
    command = [sys.executable, "-m", "jaxplan", "solve", path, "--time-limit", "500", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        assert "cost" in process.stderr.readline()
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    facts, answer = map(json.loads, out.splitlines())
    assert process.returncode == 0 and facts["ended"] == number.name
    assert peak_usage(problem, answer).usage <= problem.limit and cost_of(problem, answer) == facts["cost"]


def test_the_time_limit_ends_it(hard):
    problem, path = hard
    done = run(path, "--time-limit", "20", "--json")
    facts, answer = map(json.loads, done.stdout.splitlines())
    assert facts["ended"] == "time limit" and facts["bound"] <= facts["cost"] == cost_of(problem, answer)
