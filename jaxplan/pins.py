"""Room `pins`: what the user says about inputs by path: layouts that are insisted on, and names for dimensions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import PartitionSpec

from jaxplan.graph import Graph
from jaxplan.layout import Layout
from jaxplan.trace import Traced


def pinned_orders(pins: Mapping[str, PartitionSpec]) -> tuple[tuple[str, ...], ...]:
    """The axes that pins lay along one dimension, major to minor; what is no pin says nothing."""
    specs = [spec for spec in pins.values() if isinstance(spec, PartitionSpec | tuple)] if isinstance(pins, Mapping) else []
    entries = [entry for spec in specs for entry in spec if isinstance(entry, tuple) and len(entry) > 1]
    return tuple(entries)


def pinned_layouts(
    traced: Traced, pins: Mapping[str, PartitionSpec], mesh_shape: Mapping[str, int], major_first: Sequence[str]
) -> dict[int, Layout]:
    """{flat input: layout} of what the user insists on; later pins override earlier ones. `major_first`: in which order axes that
    share a dimension stand."""
    layouts: dict[int, Layout] = {}
    if not isinstance(pins, Mapping):
        raise TypeError(f"pins must be a dict {{input path: PartitionSpec}}, got {type(pins).__name__}")
    for path, spec in pins.items():
        if not isinstance(spec, PartitionSpec | tuple):
            instead = f"its .spec, {spec.spec}" if isinstance(spec, jax.sharding.NamedSharding) else "P('data', None), say"
            raise TypeError(f"pin {path!r}: a layout is a PartitionSpec, got {type(spec).__name__} {spec!r}: give {instead}")
        for position in inputs_at(traced, "pin", path):
            where, shape = traced.in_paths[position], traced.in_avals[position].shape
            layouts[position] = _pinned_layout(where, shape, spec, mesh_shape, major_first)
    return layouts


def inputs_at(traced: Traced, what: str, path: str) -> list[int]:
    """Flat inputs that a path names: a leaf, every leaf below a pytree prefix, or every path that a glob matches ("blocks/*/wq",
    where a star stays within one level and two stars cross levels)."""
    hits = _hits(traced, path)
    if not hits:
        near = difflib.get_close_matches(path, traced.in_paths, 3, 0.3) or [*traced.in_paths[:3]]
        raise ValueError(f"{what} {path!r}: no input of {traced.name} has that path; the closest are {near}")
    return hits


def has_inputs(traced: Traced, path: str) -> bool:
    """Whether a path names any input."""
    return bool(_hits(traced, path))


def _hits(traced: Traced, path: str) -> list[int]:
    hits = [i for i, p in enumerate(traced.in_paths) if p == path or p.startswith(path + "/")]
    if not hits and any(c in path for c in "*?["):
        pattern = re.compile(_glob(path))
        hits = [i for i, p in enumerate(traced.in_paths) if pattern.fullmatch(p)]
    return hits


def _glob(path: str) -> str:
    """A glob as a regular expression; it also matches what lies below."""
    words = {"**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*|\*|\?|\[[^\]]*\])", path)
    return "".join(words.get(part) or (part if part.startswith("[") else re.escape(part)) for part in parts) + "(/.*)?"


def _pinned_layout(
    path: str, shape: Sequence[int], spec: PartitionSpec, mesh_shape: Mapping[str, int], major_first: Sequence[str]
) -> Layout:
    axes = list(mesh_shape)
    layout = [-1] * len(axes)
    if len(spec) > len(shape):
        raise ValueError(f"pin {path!r}: {spec} has {len(spec)} entries, but the input has shape {tuple(shape)}")
    for dim, entry in enumerate(spec):
        names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        parts = 1
        for name in names:
            if name not in mesh_shape:
                raise ValueError(f"pin {path!r}: {spec} names axis {name!r}; the mesh has {axes}")
            if layout[axes.index(name)] >= 0:
                raise ValueError(f"pin {path!r}: {spec} uses axis {name!r} twice")
            layout[axes.index(name)] = dim
            parts *= mesh_shape[name]
        wanted = tuple(sorted(names, key=major_first.index))
        if tuple(names) != wanted:
            raise ValueError(
                f"pin {path!r}: {spec}: axes that share a dimension must stand in one order in all of a plan; other pins have "
                f"these as {wanted}"
            )
        if shape[dim] % parts:
            raise ValueError(f"pin {path!r}: dimension {dim} of {tuple(shape)} is not divisible by {parts} ({spec})")
    return tuple(layout)


Dims = Mapping[tuple[int, int], str]
"""{(tensor, dimension): name}."""


def renamed(dims: Dims, graph: Graph, other: Graph) -> Dims:
    """The same names in another graph of a program with the same inputs."""
    inputs = dict(zip(graph.inputs, other.inputs, strict=True))
    return dims if graph is other else {(inputs[tensor], dim): name for (tensor, dim), name in dims.items()}


def dimension_names(
    traced: Traced, graph: Graph, dims: Mapping[str, str] | Sequence[str | None] | None
) -> dict[tuple[int, int], str]:
    """{(tensor, dimension): name} from what the user wrote. A text is for the inputs with as many dimensions as it has words.

    Raises ValueError for a text that fits no input of those it was written for; TypeError for what is no text.
    """
    if not dims:
        return {}
    if isinstance(dims, str):
        raise TypeError(f"dims must be one string per argument or a dict {{input path: string}}, got the string {dims!r}")
    if isinstance(dims, Mapping):
        written = [(repr(path), text, inputs_at(traced, "dims", path)) for path, text in dims.items()]
    else:
        args, _ = traced.unflatten_inputs(range(len(traced.in_avals)))
        if len(dims) > len(args):
            raise ValueError(f"dims has {len(dims)} strings, but {traced.name} has {len(args)} positional arguments")
        said = [(i, text, args[i]) for i, text in enumerate(dims) if text]
        written = [(f"argument {i}", text, jax.tree.leaves(arg)) for i, text, arg in said]
    names: dict[tuple[int, int], str] = {}
    extents: dict[str, tuple[int, str]] = {}
    for where, text, positions in written:
        words = text.split()
        fitting = [position for position in positions if len(traced.in_avals[position].shape) == len(words)]
        if positions and not fitting:
            shape = tuple(traced.in_avals[positions[0]].shape)
            several = f"none of its {len(positions)} inputs has as many, the first is"
            inputs = "the input has shape" if len(positions) == 1 else several
            raise ValueError(f"dims {text!r} for {where} names {len(words)} dimensions; {inputs} {shape}")
        for position in fitting:
            for dim, (word, extent) in enumerate(zip(words, traced.in_avals[position].shape, strict=True)):
                names[graph.inputs[position], dim] = word
                if extent != 1 and extents.setdefault(word, (extent, traced.in_paths[position]))[0] != extent:
                    first, path = extents[word]
                    raise ValueError(
                        f"dims calls two extents {word!r}: {first} of {path} and {extent} of {traced.in_paths[position]}; a "
                        "name is one symbol of the cost, so give them two names, each by its own path"
                    )
    return names


def stage_dims(whole: Traced, graph: Graph, dims: Dims, traced: Traced, own: Graph) -> Dims:
    """The names that the user gave to dimensions, for the inputs that the program of a stage has of the whole one."""
    given: dict[str, dict[int, str]] = {}
    paths = dict(zip(graph.inputs, whole.in_paths, strict=True))
    for (tensor, dim), name in dims.items():
        given.setdefault(paths[tensor], {})[dim] = name
    pairs = zip(traced.in_paths, own.inputs, strict=True)
    return {(tensor, dim): name for path, tensor in pairs for dim, name in given.get(path, {}).items()}
