"""A plan's PartitionSpecs as a Python module that users can read, own and edit."""

from __future__ import annotations

import json
from collections.abc import Mapping

from jaxplan.files.fold import fold_paths, path_ranges
from jaxplan.files.nouns import Entries, Leaf, PlanFileError, SavedPlan

_HELPER = '''

def specs_of(name, tree, specs=INPUTS):
    """The specs of the argument called `name` (of a result with names of its own: None), a pytree in its own structure."""

    def spec(path, _):
        words = [*filter(None, [name]), *filter(None, [keystr(path, simple=True, separator="/")])]
        return specs["/".join(words) or "result"]

    return tree_map_with_path(spec, tree)
'''


def to_python(saved: SavedPlan) -> str:
    """The module: `MESH`, `INPUTS` and `OUTPUTS` by path, and a function that hangs them on a pytree.

    Raises PlanFileError for stages on sub-meshes: a spec alone does not say on which of them an array lies.
    """
    if saved.stages is not None:
        raise PlanFileError(
            "the stages of this plan lie on sub-meshes, and PartitionSpecs do not say on which an array lies: take "
            "plan.in_shardings and plan.out_shardings, or write out plan.stage_plans[number]"
        )
    mesh = ", ".join(f"{_quoted(axis)}: {size}" for axis, size in saved.mesh_shape.items())
    version = _plain(saved.versions["jaxplan"])
    lines = [
        f'"""PartitionSpecs for {_plain(saved.function)}, as planned by jaxplan {version}. They are yours to edit."""',
        "",
        "from jax.sharding import PartitionSpec as P",
        "from jax.tree_util import keystr, tree_map_with_path",
        "",
        f"MESH = {{{mesh}}}",
        "",
        *_table("INPUTS", saved.inputs),
        "",
        *_table("OUTPUTS", saved.outputs),
        "",
    ]
    return "\n".join(lines) + _HELPER


def _table(name: str, leaves: Mapping[str, Leaf]) -> list[str]:
    """{path: spec}; paths that differ by their indices, in a comprehension."""
    lines = [f"{name} = {{"]
    for path, leaf in fold_paths(leaves).items():
        lines.append(f"    {_entry(path, leaf.spec)},  # {_plain(leaf.kind)}")
    return [*lines, "}"]


def _entry(path: str, spec: Entries) -> str:
    parts = path_ranges(path)
    if len(parts) == 1:
        return f"{_quoted(parts[0][0])}: {_spec(spec)}"
    loops, text = [], ""
    for (words, indices), letter in zip(parts, "ijklmnopqrstuvw", strict=False):
        text += _quoted(words)[1:-1].replace("{", "{{").replace("}", "}}")
        if indices is not None:
            text += f"{{{letter}}}"
            whole = indices == list(range(indices[0], indices[-1] + 1))
            loops.append(f"for {letter} in {_range(indices) if whole else tuple(indices)}")
    return f'**{{f"{text}": {_spec(spec)} {" ".join(loops)}}}'


def _range(indices: list[int]) -> str:
    return f"range({indices[-1] + 1})" if not indices[0] else f"range({indices[0]}, {indices[-1] + 1})"


def _spec(spec: Entries) -> str:
    return f"P({', '.join(_names(entry) for entry in spec)})"


def _names(entry: str | tuple[str, ...] | None) -> str:
    if isinstance(entry, tuple):
        return f"({', '.join(map(_quoted, entry))})"
    return "None" if entry is None else _quoted(entry)


def _quoted(text: str) -> str:
    """Text as a Python literal in double quotes: JSON's escapes are a part of Python's."""
    return json.dumps(text, ensure_ascii=False)


def _plain(text: str) -> str:
    """Text that may stand in a comment or a docstring."""
    return "".join(c for c in text if c.isascii() and (c.isalnum() or c in " .,_-+[]<>"))
