"""The walls between the rooms: imports run one way, JAX's private parts have one door, and importing starts nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import jaxplan

PACKAGE = Path(jaxplan.__file__).parent
MOST_LINES = 600

FLOW = (
    "layout", "paths", "_jax", "problem", "machine", "rolls", "trace", "rules", "graph", "cost", "buckets", "reduce", "search",
    "pipeline", "planned", "plan",
)  # fmt: skip
"""The rooms in the order data flows: each may import those before it."""

AUDIT: Mapping[str, tuple[str, ...]] = {
    "hlo_text": (),
    "hlo_work": ("hlo_text",),
    "hlo_records": (),
    "hlo_vary": ("hlo_text",),
    "hlo_findings": ("hlo_records", "hlo_text", "hlo_vary"),
    "hlo_lives": ("hlo_text",),
    "topology": (),
    "hlo": ("hlo_records", "hlo_text", "hlo_work", "hlo_vary", "hlo_findings", "hlo_lives", "topology"),
}
"""The audit's rooms import each other and nothing else: it is the cost model's judge."""

LEAVES: Mapping[str, tuple[str, ...]] = {
    "agree": ("files",),
    "asked": (),
    "pins": (),
    "resize": (),
    "regimes": ("report",),
    "apply": ("agree", "on_shards", "partial_sums"),
    "compare": ("hlo", "hlo_records"),
    "ledger": (),
    "partial_sums": (),
    "on_shards": (),
    "report": ("ledger",),
    "budget": ("ledger", "report"),
    "attempts": ("budget", "pins", "report"),
    "hybrid": ("asked", "budget"),
    "unlike": ("apply", "budget", "compare", "hlo", "hybrid", "pins", "report"),
    "reasons": ("report",),
    "state": ("report",),
    "measure": (),
    "files": ("ledger", "report"),
    "plots": ("files",),
    "pages": ("ledger", "report", "reasons", "files"),
    "export": ("files", "state"),
    "solve": (),
    "iopddl": ("solve",),
}
"""What a plan is used for: each may import the whole flow, and of the other leaves only those named."""

FRONT = ("api", "loading", "auto", "whatif", "examples", "demo", "cli", "__main__")
"""What a user calls: each may import the flow, the leaves, and what stands before it here."""

NO_JAX: Mapping[str, tuple[str, ...]] = {
    "problem": (),
    "reduce": ("problem",),
    "buckets": (),
    "search": ("buckets", "problem", "reduce"),
    "layout": (),
    "solve": ("buckets",),
    "iopddl": ("solve",),
    "examples": (),
}
"""Rooms that may import less than their place allows. All but `examples` are also kept free of JAX."""

DOOR = "_jax"
PRIVATE = ("jax._src", "jax.extend", "jax.interpreters", "jax.core")


def allowed() -> dict[str, frozenset[str]]:
    """Per room, the rooms it may import (its own package apart)."""
    table: dict[str, frozenset[str]] = {}
    for position, room in enumerate(FLOW):
        table[room] = frozenset(FLOW[:position])
    for room, others in LEAVES.items():
        table[room] = frozenset((*FLOW, *others))
    table.update((room, frozenset(others)) for room, others in AUDIT.items())
    for position, room in enumerate(FRONT):
        table[room] = frozenset((*FLOW, *AUDIT, *LEAVES, *FRONT[:position]))
    table.update((room, frozenset(rooms)) for room, rooms in NO_JAX.items())
    return table


# --- reading imports ----------------------------------------------------------------------------------------


def imported(source: str, module: str, *, package: bool = False) -> set[str]:
    """Every dotted name that a module's source imports, inside functions too, `if TYPE_CHECKING` left out.

    `module`: its own dotted name, which relative imports start from; `package`: it is an `__init__.py`. `from a import b`
    gives both `a` and `a.b`: b may be a module.
    """
    found: set[str] = set()
    for node in _running(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                home = module.split(".")
                home = home[: len(home) - node.level + package]
                base = ".".join([*home, *filter(None, [node.module])])
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and _called(node) in ("import_module", "__import__"):
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                found.add(name.value)
    return found


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _running(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree, less the bodies of `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield other
                yield from _running(other)
            continue
        yield node
        yield from _running(node)


def room_of(module: str) -> str:
    """jaxplan.cost.price -> cost; jaxplan itself -> ""."""
    return module.partition(".")[2].partition(".")[0]


def climbs(source: str, module: str, *, package: bool = False) -> set[str]:
    """The rooms a module imports and may not. A public name stands for the room that is its home; `jaxplan.__version__`
    for none. The package as a whole, which offers every name, may be imported by `demo` and `cli` only."""
    own, table = room_of(module), allowed()
    if own not in table:
        return {f"{own} has no place in the table of rooms"}
    names = imported(source, module, package=package)
    rooms = set()
    for name in names:
        if name == "jaxplan" and any(other.startswith("jaxplan.") for other in names):
            continue  # `from jaxplan import room` gives both names: the longer one is judged
        if (name == "jaxplan" or name.startswith("jaxplan.")) and name != "jaxplan.__version__":
            room = room_of(name) or "jaxplan"
            rooms.add(room_of(jaxplan._HOMES[room]) if room in jaxplan._HOMES else room)
    return rooms - table[own] - {own} - ({"jaxplan"} if own in ("demo", "cli") else set())


def private(source: str, module: str, *, package: bool = False) -> set[str]:
    """What a module imports or reaches for of JAX that is not public API."""
    names = imported(source, module, package=package)
    names |= {ast.unparse(node) for node in _running(ast.parse(source)) if isinstance(node, ast.Attribute)}
    return {name for name in names for door in PRIVATE if name == door or name.startswith(door + ".")}


def too_long(source: str) -> bool:
    return len(source.splitlines()) > MOST_LINES


def modules() -> dict[str, tuple[str, bool]]:
    """{dotted name: (source, whether it is a package's __init__)} of everything in jaxplan."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = ("jaxplan", *file.relative_to(PACKAGE).with_suffix("").parts)
        package = parts[-1] == "__init__"
        found[".".join(parts[:-1] if package else parts)] = (file.read_text(encoding="utf-8"), package)
    return found


MODULES = modules()


# --- (i) one way --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"jaxplan"}))
def test_imports_run_one_way(module):
    source, package = MODULES[module]
    assert not climbs(source, module, package=package), f"{module} imports rooms that it may not"


def test_the_package_itself_imports_no_room_when_imported():
    source, package = MODULES["jaxplan"]
    assert {name for name in imported(source, "jaxplan", package=package) if name.startswith("jaxplan")} == set()


@pytest.mark.parametrize(
    ("module", "source", "caught"),
    [
        ("jaxplan.trace", "from jaxplan.plan import Plan", {"plan"}),
        ("jaxplan.trace", "def f():\n    import jaxplan.cost.price", {"cost"}),
        ("jaxplan.trace", "from jaxplan import rules", {"rules"}),
        ("jaxplan.trace", "from . import graph", {"graph"}),
        ("jaxplan.rules.linear", "from ..cost import model", {"cost"}),
        ("jaxplan.rules.linear", "from .nouns import Rule\nfrom jaxplan.rules import table", set()),
        ("jaxplan.reduce", "from jaxplan.trace import trace", {"trace"}),
        ("jaxplan.reduce", "from jaxplan.layout import Layout", {"layout"}),
        ("jaxplan.search.hsm2dl", "from jaxplan.cost import model", {"cost"}),
        ("jaxplan.search.hsm2dl", "from jaxplan.reduce import fold", set()),
        ("jaxplan.report", "from jaxplan.apply import PlannedFunction", {"apply"}),
        ("jaxplan.hlo", "from .hlo_text import Module", set()),
        ("jaxplan.hlo_text", "from .hlo import audit", {"hlo"}),
        ("jaxplan.hlo", "from jaxplan.cost.formulas import all_reduce_bytes", {"cost"}),
        ("jaxplan.hlo_findings", "from jaxplan.plan import Plan", {"plan"}),
        ("jaxplan.plan", "import importlib\nimportlib.import_module('jaxplan.api')", {"api"}),
        ("jaxplan.plan", "import jaxplan", {"jaxplan"}),
        ("jaxplan.plan", "from jaxplan import make_plan", {"api"}),
        ("jaxplan.plan", "if TYPE_CHECKING:\n    from jaxplan.api import Plan", set()),
        ("jaxplan.plan", "if TYPE_CHECKING:\n    pass\nelse:\n    from jaxplan.api import Plan", {"api"}),
        ("jaxplan.examples.mlp", "from jaxplan.layout import Layout", {"layout"}),
        ("jaxplan.cli", "from jaxplan.examples import programs\nfrom jaxplan.demo import demo", set()),
        ("jaxplan.cli", "import jaxplan\nfrom jaxplan import __version__, make_plan", set()),
        ("jaxplan.api", "from jaxplan.cli import main", {"cli"}),
        ("jaxplan.util", "", {"util has no place in the table of rooms"}),
    ],
)
def test_an_import_against_the_flow_is_caught(module, source, caught):
    assert climbs(source, module) == caught


def test_a_relative_import_of_a_package_starts_at_the_package():
    assert climbs("from . import nouns", "jaxplan.graph", package=True) == set()
    assert climbs("from .. import api", "jaxplan.graph", package=True) == {"api"}


# --- (ii) without JAX ---------------------------------------------------------------------------------------

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} may not be imported here")

sys.meta_path.insert(0, Blocker())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds the same jaxplan."""
    path = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
    return subprocess.run([sys.executable, "-c", path + textwrap.dedent(code)], capture_output=True, text=True, check=False)


def imports_without(code: str, *blocked: str) -> subprocess.CompletedProcess[str]:
    """Run code where importing any of `blocked` fails."""
    return run(BLOCK.format(blocked=set(blocked)) + textwrap.dedent(code))


@pytest.mark.parametrize("room", ["layout", "problem", "buckets", "reduce", "search", "solve", "iopddl"])
def test_the_search_side_imports_without_jax(room):
    done = imports_without(f"import jaxplan.{room}", "jax", "jaxlib")
    assert done.returncode == 0, done.stderr


def test_a_search_runs_without_jax():
    done = imports_without(
        """
        import numpy as np
        from jaxplan.problem import from_tables
        from jaxplan.search import search
        problem = from_tables([[0.0, 1.0], [3.0, 1.0]], [(0, 1, np.array([[0.0, 5.0], [5.0, 0.0]]))])
        assert search(problem).seconds == search(problem, "brute").seconds == 2.0
        """,
        "jax",
        "jaxlib",
    )
    assert done.returncode == 0, done.stderr


def test_an_import_of_jax_is_caught():
    done = imports_without("import jaxplan.trace", "jax", "jaxlib")
    assert done.returncode != 0
    assert "jax may not be imported here" in done.stderr


# --- (iii) one door to private JAX --------------------------------------------------------------------------


@pytest.mark.parametrize("module", sorted(MODULES))
def test_private_jax_has_one_door(module):
    source, package = MODULES[module]
    if module != f"jaxplan.{DOOR}":
        assert not private(source, module, package=package), f"{module}: take it from jaxplan.{DOOR}"


def test_the_door_is_used():
    assert private(MODULES[f"jaxplan.{DOOR}"][0], f"jaxplan.{DOOR}")


@pytest.mark.parametrize(
    ("source", "caught"),
    [
        ("from jax._src import core", {"jax._src", "jax._src.core"}),
        ("from jax.extend.core import primitives", {"jax.extend.core", "jax.extend.core.primitives"}),
        ("def f():\n    import jax.interpreters.partial_eval", {"jax.interpreters.partial_eval"}),
        ("from jax import core", {"jax.core"}),
        ("import jax\nx = jax.core.Tracer", {"jax.core", "jax.core.Tracer"}),
        ("import importlib\nimportlib.import_module('jax._src.core')", {"jax._src.core"}),
        ("import jax\nfrom jax.tree_util import tree_leaves\nfrom jax.sharding import Mesh", set()),
    ],
)
def test_private_jax_is_caught(source, caught):
    assert private(source, "jaxplan.plan") == caught


# --- (iv) importing starts nothing --------------------------------------------------------------------------

STARTED = """
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a JAX backend was started"
assert "sympy" not in sys.modules, "sympy was imported"
"""


def starts(code: str) -> str:
    """What running some code starts or imports too early: the message, or nothing."""
    done = run(textwrap.dedent(code) + STARTED)
    return done.stderr if done.returncode else ""


def test_importing_starts_no_backend_and_loads_no_sympy():
    assert not starts("import jaxplan\njaxplan.make_plan")


def test_touching_every_public_name_starts_nothing_either():
    assert not starts("import jaxplan\nfor name in jaxplan.__all__: getattr(jaxplan, name)")


def test_a_started_backend_is_caught():
    assert "a JAX backend was started" in starts("import jax\njax.devices('cpu')")


def test_an_import_of_sympy_is_caught():
    assert "sympy was imported" in starts("import jaxplan, sympy")


def test_importing_the_package_alone_does_not_import_jax():
    done = imports_without("import jaxplan\nassert jaxplan.__version__", "jax", "jaxlib", "numpy", "sympy")
    assert done.returncode == 0, done.stderr


# --- (v) the public names -----------------------------------------------------------------------------------


def offered(source: str) -> set[str]:
    """The public names that a package's `__init__` offers a type checker (`from m import x as x`) or defines."""
    tree = ast.parse(source)
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names.update(alias.asname for alias in node.names if alias.asname == alias.name)
    for statement in tree.body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names.add(statement.name)
        elif isinstance(statement, ast.Assign):
            names.update(target.id for target in statement.targets if isinstance(target, ast.Name))
    return {name for name in names if not name.startswith("_")}


def test_all_is_what_is_offered():
    assert set(jaxplan.__all__) == offered(MODULES["jaxplan"][0])
    assert list(jaxplan.__all__) == sorted(jaxplan.__all__)
    assert len(set(jaxplan.__all__)) == len(jaxplan.__all__)


def test_all_is_what_can_be_had():
    assert set(jaxplan.__all__) == set(jaxplan._HOMES)
    for name in jaxplan.__all__:
        value = getattr(jaxplan, name)
        assert value.__doc__, f"jaxplan.{name} has no docstring"
        assert name in dir(jaxplan)


def test_no_public_name_is_a_rooms_name():
    rooms = {room_of(module) for module in MODULES} - {""}
    assert not rooms & set(jaxplan.__all__), "one would hide the other"


def test_a_name_that_is_offered_and_not_listed_is_caught():
    source = "from m import a as a, b\nif TYPE_CHECKING:\n    from n import c as c\nd = 1\n_e = 2\ndef f(): ..."
    assert offered(source) == {"a", "c", "d", "f"}
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        jaxplan.nothing  # noqa: B018


# --- (vi) a file fits in a head -----------------------------------------------------------------------------


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_file_is_too_long(module):
    assert not too_long(MODULES[module][0]), f"{module} has more than {MOST_LINES} lines"


def test_a_file_that_is_too_long_is_caught():
    assert too_long("x = 1\n" * (MOST_LINES + 1))
    assert not too_long("x = 1\n" * MOST_LINES)
