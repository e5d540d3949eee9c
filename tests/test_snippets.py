"""Every Python and shell block of README.md and docs/*.md runs as it stands, page by page, in one namespace and folder a page.

Before a block an HTML comment, which readers do not see, may say: `<!-- before: CODE -->`, Python that is run first (the step and
the shapes that a page talks about); `<!-- file: NAME -->`, the block is that file; `<!-- needs: MODULE -->`, it runs where the
module is installed; `<!-- raises: ERROR -->`, it ends with that error; `<!-- not run: REASON -->`. What another test runs is in
`ELSEWHERE`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import jaxplan

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")))
ELSEWHERE = {  # a page, or a folder of pages
    "docs/frameworks.md": "tests/test_frameworks.py",
    "docs/command_line.md": "tests/test_cli.py",
    "docs/migrate": "tests/test_migrate.py",
}
HERE = [page for page in PAGES if not {page, str(Path(page).parent)} & set(ELSEWHERE)]
NOT_RUN_AT_MOST = 4
MARKS = ("before", "file", "needs", "raises", "not run", "ci")
BLOCK = re.compile(r"<!--\s*(?P<mark>[a-z ]+):\s(?P<said>.*?)-->|^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.S | re.M)


@dataclass
class Block:
    """A fenced block, with the marks that stand between it and the block before it."""

    line: int
    language: str
    text: str
    marks: dict[str, str]


def blocks(page: str) -> list[Block]:
    """The Python and shell blocks of a page's text."""
    found, marks = [], {}
    for match in BLOCK.finditer(page):
        if match["mark"] is not None:
            if match["mark"] in MARKS:
                marks[match["mark"]] = match["said"].rstrip() if match["mark"] == "before" else match["said"].strip()
            continue
        if match["language"] in ("python", "bash", "console") or "file" in marks:
            found.append(Block(page.count("\n", 0, match.start()) + 2, match["language"], match["text"], marks))
        marks = {}
    return found


RUN = '''
import contextlib, importlib.util, io, json, os, pathlib, subprocess, sys, tempfile, traceback
import jax
jax.config.update("jax_num_cpu_devices", 8)

def shell(text, console):
    lines = [line[2:] for line in text.splitlines() if line.startswith("$ ")] if console else [text]
    for line in lines:
        here = {"jaxplan": "-m jaxplan", "python": ""}
        words = "".join(f"{name}() {{ '{sys.executable}' {what} \\"$@\\"; }}\\n" for name, what in here.items()) + line
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", words], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{line}: status {done.returncode}\\n{done.stdout}{done.stderr}")

def run(page, blocks):
    names = {"__name__": "__main__"}
    for block in blocks:
        where, marks = f"{page}:{block['line']}", block["marks"]
        try:
            if "before" in marks:
                exec(compile(marks["before"], f"{where} (before)", "exec"), names)
            if "file" in marks:
                pathlib.Path(marks["file"]).write_text(block["text"])
            elif block["language"] == "python":
                code = compile("\\n" * (block["line"] - 1) + block["text"], page, "exec")
                exec(code, names)
            else:
                shell(block["text"], block["language"] == "console")
        except BaseException as error:
            if marks.get("raises") == type(error).__name__:
                continue
            return where + "\\n" + "".join(traceback.format_exception(error))
        if "raises" in marks:
            return f"{where}: did not raise {marks['raises']}"
    return ""

found = {}
sys.path.insert(0, "")
for page, blocks in json.load(sys.stdin).items():
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder)
        found[page] = run(page, blocks)
        os.chdir("/")
    for name in [name for name, module in sys.modules.items() if not (getattr(module, "__file__", None) or "/").startswith("/")]:
        del sys.modules[name]  # the page's own files
print(json.dumps(found))
'''


def installed(module: str) -> bool:
    """Whether a module can be imported; "a.b" is looked for in "a"."""
    names = module.split(".")
    return all(importlib.util.find_spec(".".join(names[: n + 1])) is not None for n in range(len(names)))


def runnable(text: str) -> list[Block]:
    """Blocks to run: those marked as not run, run by CI, or in need of what is not installed are left out."""
    found = []
    for block in blocks(text):
        missing = [name for name in block.marks.get("needs", "").split() if not installed(name)]
        if not (missing or "not run" in block.marks or "ci" in block.marks):
            found.append(block)
    return found


def outcomes(pages: dict[str, str]) -> dict[str, str]:
    """What went wrong in each page's text, "" for nothing; all in one process with eight simulated devices."""
    asked = json.dumps({name: [vars(block) for block in runnable(text)] for name, text in pages.items()})
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=asked, capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def ran() -> dict[str, str]:
    return outcomes({page: (ROOT / page).read_text() for page in HERE})


@pytest.mark.parametrize("page", [page for page in HERE if runnable((ROOT / page).read_text())])
def test_the_blocks_of_a_page_run(page, ran):
    assert not ran[page], ran[page]


def test_few_blocks_are_not_run_and_each_says_why():
    found = [(page, block.marks) for page in PAGES for block in blocks((ROOT / page).read_text())]
    said = [(page, marks["not run"]) for page, marks in found if "not run" in marks]
    assert len(said) <= NOT_RUN_AT_MOST, said
    assert all(len(reason) > 10 for _, reason in said)


@pytest.mark.parametrize("page", PAGES)
def test_no_block_hides_from_the_tests(page):
    """Code stands in fences that name their language; an indented block is for formulas, tables and trees."""
    text = re.sub(r"^```.*?^```$|<!--.*?-->", "", (ROOT / page).read_text(), flags=re.S | re.M)
    code = r"import |from \w+ import|@?jaxplan\.|\w+ = (?:jaxplan|plan)\.|plan\.\w+\(|\$ |pip install"
    assert not re.findall(rf"^    (?:{code}).*$", text, re.M)
    fences = re.findall(r"^```(\w*)$", (ROOT / page).read_text(), re.M)
    gone = {"py"} if page.startswith("docs/migrate/") else set()  # code for libraries that no longer exist
    assert not {*fences[::2]} - {"python", "bash", "console", "text", "json", "yaml", ""} - gone


def test_a_page_that_does_not_run_is_seen():
    pages = {
        "wrong": "```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 2\n```\n",
        "shell": "```console\n$ false\n```\n",
        "quiet": "<!-- raises: ValueError -->\n```python\npass\n```\n",
        "right": "<!-- before: y = 2 -->\n```python\nx = y\n```\n<!-- raises: ZeroDivisionError -->\n```python\nx / 0\n```\n"
        "<!-- file: m.py -->\n```python\nz = 3\n```\n```python\nimport m\nassert m.z == 3\n```\n",
    }
    found = outcomes(pages)
    assert "wrong:8" in found["wrong"] and "AssertionError" in found["wrong"]
    assert "status 1" in found["shell"] and "did not raise ValueError" in found["quiet"] and not found["right"]


def test_every_public_name_has_its_docstring_and_an_example_on_the_page():
    page = (ROOT / "docs" / "api.md").read_text()
    named = {name: module for module, name in re.findall(r"^::: (jaxplan\.[\w.]+)\.(\w+)$", page, re.M)}
    assert sorted(named) == sorted(jaxplan.__all__)
    code = "\n".join(block.text for block in blocks(page))
    for name, module in named.items():
        assert getattr(importlib.import_module(module), name) is getattr(jaxplan, name)
        assert (getattr(jaxplan, name).__doc__ or "").strip(), name
        assert f"jaxplan.{name}" in code or name == "Plan", name


@pytest.mark.parametrize("name", [name for name in jaxplan.__all__ if inspect.isclass(getattr(jaxplan, name))])
def test_every_public_member_is_documented_and_in_an_example(name):
    """Methods and properties of the public classes; fields are in the docstring of their class."""
    code = "\n".join(block.text for block in blocks((ROOT / "docs" / "api.md").read_text()))
    kind = getattr(jaxplan, name)
    own = [member for member in dir(kind) if not member.startswith("_") and not hasattr(Exception, member)]
    for member in own:
        found = inspect.getattr_static(kind, member, None)
        if isinstance(found, (property, functools.cached_property)) or callable(found):
            assert (inspect.getdoc(found) or "").strip(), member
            assert re.search(rf"\.{member}\b", code), f"{name}.{member} is in no example of docs/api.md"
    for field in getattr(kind, "__dataclass_fields__", ()):
        assert re.search(rf"`{field}`", kind.__doc__ or ""), f"the docstring of {name} says nothing of {field}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """To files, and to headings of pages; the site's build checks the rest."""
    for target, anchor in re.findall(r"\]\(([^):#\s]*)(#[^)\s]*)?\)", (ROOT / page).read_text()):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            assert anchor[1:] in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, anchor
