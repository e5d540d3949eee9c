"""Devices, mesh shapes, link speeds and sizes in one table.

All of it is planned from one trace, sizes too, wherever the trace tells what the program would be at other sizes; where it does
not, the function is traced anew for them, and the table says why.
"""

from __future__ import annotations

import itertools
import math
import os
import string
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from jaxplan.api import Plan, make_plan
from jaxplan.budget import budget_bytes
from jaxplan.machine import Link, Machine, machine as find_machine
from jaxplan.pages import SweepView, fragment, sweep_view
from jaxplan.plots import plot_points
from jaxplan.report import WIDTH, show_bytes, show_seconds, table
from jaxplan.resize import CannotResize, input_shapes
from jaxplan.whatif.meshes import Candidate, base_plan, candidate, checked_names, device_count, distinct, factorisations, rank

Links = Literal["all", "inner", "outer"]


@dataclass(frozen=True)
class Point:
    """One point of a sweep. `sizes`: {dimension: extent}; `link_speed`: of the links that were swept, 1 for the machine's own;
    `label`: plans that lay everything out alike share it; `best`: no mesh of so many devices that fits is faster here."""

    candidate: Candidate
    sizes: Mapping[str, int]
    link_speed: float
    label: str
    best: bool

    @property
    def devices(self) -> int:
        """In the mesh."""
        return math.prod(self.candidate.shape)

    def to_json(self) -> dict[str, Any]:
        """The numbers, without the plan."""
        where = {"devices": self.devices, "sizes": dict(self.sizes), "link_speed": self.link_speed}
        return {**where, **self.candidate.to_json(), "plan": self.label, "best": self.best}


@dataclass(frozen=True)
class Refused:
    """A point that cannot be planned, and why."""

    sizes: Mapping[str, int]
    link_speed: float
    mesh: Mapping[str, int]
    why: str


@dataclass(frozen=True)
class Sweep:
    """What `sweep` found; prints as a table. `points`: the plans, in the order asked for; `refused`: those that could not be
    made, and why; `machine`, `links`, `budget` (bytes per device): what they were asked with.

    `traces`: how often the function was traced; `trace_seconds`: for that, for building the graphs and for planning on one
    device; `plan_seconds`: of all points together; `why_traced`: why one trace was not enough for the sizes, "" where it was.
    """

    points: tuple[Point, ...]
    refused: tuple[Refused, ...]
    machine: Machine
    links: Links
    budget: float
    traces: int
    trace_seconds: float
    plan_seconds: float
    why_traced: str = ""

    def __str__(self) -> str:
        name = self.points[0].candidate.plan.traced.name
        budget = "unlimited" if self.budget == math.inf else show_bytes(self.budget)
        names = list(self.points[0].sizes)
        header = (*names, "link speed", "devices", "mesh", "seconds", "efficiency", "sent", "peak", "fits", "plan", "")
        rows = [self._row(point) for point in self.points]
        lines = [f"Sweep of {name}, machine {self.machine.name}, memory budget {budget}", ""]
        right = {*range(len(names) + 2), *range(len(names) + 3, len(names) + 7)}
        lines += table(header, rows, right)
        for one in self.refused:
            at = " ".join(f"{key}={value}" for key, value in {**one.sizes, **one.mesh}.items())
            lines.append(f"not planned     {at}, link speed {one.link_speed:g}: {one.why}")
        each = 1e3 * self.plan_seconds / max(1, len(self.points))
        lines += ["", "*: the fastest mesh that fits, of so many devices; link speed: of " + _WHICH[self.links]]
        often = "once" if self.traces == 1 else f"{self.traces} times"
        lines += [f"{len(self.points)} points, {each:.0f} ms each; traced {often} in {self.trace_seconds:.1f} s"]
        if self.why_traced:
            lines += textwrap.wrap(f"traced for each of the sizes, because {self.why_traced}", WIDTH, subsequent_indent="  ")
        return "\n".join(lines)

    def _row(self, point: Point) -> tuple[str, ...]:
        one = point.candidate
        return (
            *map(str, point.sizes.values()), f"{point.link_speed:g}", str(point.devices), one.mesh_text,
            show_seconds(one.seconds), f"{one.efficiency:.1%}",
            show_bytes(one.sent_bytes), show_bytes(one.plan.peak_bytes), "yes" if one.fits else "no",
            point.label, "*" if point.best else "",
        )  # fmt: skip

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw time, efficiency and memory to a .png, .svg or .pdf file, of the best mesh of each number of devices. Needs
        matplotlib (ModuleNotFoundError says how to have it)."""
        name = self.points[0].candidate.plan.traced.name
        plot_points([point.to_json() for point in self.points], f"Sweep of {name}, machine {self.machine.name}", path)

    def view(self) -> SweepView:
        """For the slider of a page: `plan.to_html(found.view())`."""
        told = []
        for point in self.points:
            where = [f"{name} = {size}" for name, size in point.sizes.items()]
            where += [point.candidate.mesh_text, f"link speed {point.link_speed:g}"]
            told.append((", ".join(where), point.candidate.plan))
        return sweep_view("all points of the sweep", told, 0)

    def _repr_html_(self) -> str:
        head, *lines = str(self).split("\n")
        sizes = list(self.points[0].sizes)
        header = (*sizes, "link speed", "devices", "mesh", "seconds", "efficiency", "sent", "peak", "fits", "plan", "")
        notes = [line for line in lines[len(self.points) + 2 :] if line]
        return fragment(head, header, [self._row(point) for point in self.points], notes)

    def to_json(self) -> dict[str, Any]:
        """The table for a machine to read."""
        return {
            "function": self.points[0].candidate.plan.traced.name, "machine": self.machine.name, "links": self.links,
            "memory_budget": None if self.budget == math.inf else self.budget,
            "points": [point.to_json() for point in self.points],
            "refused": [
                {"sizes": dict(one.sizes), "link_speed": one.link_speed, "mesh": dict(one.mesh), "why": one.why}
                for one in self.refused
            ],
            "traces": self.traces, "why_traced": self.why_traced,
        }  # fmt: skip


_WHICH = {"all": "all links", "inner": "the links inside a node", "outer": "the links between nodes"}


def sweep(
    fn: Callable[..., Any],
    *args: Any,
    devices: int | Sequence[int] | None = None,
    meshes: Sequence[Mapping[str, int]] | None = None,
    sizes: Mapping[str, Sequence[int]] | None = None,
    link_speeds: Sequence[float] = (1.0,),
    links: Links = "all",
    machine: str | Machine | None = None,
    axis_names: Sequence[str] = ("x", "y"),
    memory_budget: int | float | str | None = None,
    pins: Mapping[str, PartitionSpec] | None = None,
    dims: Mapping[str, str] | Sequence[str | None] | None = None,
    **options: Any,
) -> Sweep:
    """Plan `fn(*args)` at every point of devices x mesh shape x link speed x sizes.

    `devices`: one number or several, each in all its meshes as in `best_mesh`; or `meshes`: {axis: size} each. `link_speeds`:
    what the bandwidth of the machine's links is multiplied by, of all or only of those inside a node or between nodes, as
    `links` says ("all" takes in those stated by axis). `sizes`: {"B": [256, 512]}: extents of dimensions, by the names that plans
    print or that `dims` gave. The function is traced once; where its trace does not tell what it would be at other sizes, once
    for each combination of them, and the result says why. The rest as in `best_mesh`.

    Points on which nothing fits the memory budget are marked; points that cannot be planned are listed in `refused`. Raises
    ValueError or TypeError where the request makes no sense or nothing at all can be planned; and what `fn` raises at sizes at
    which it does not trace, with a note on the sizes.
    """
    names = checked_names(axis_names)
    found = find_machine(machine)
    budget = budget_bytes(memory_budget, found)
    machines = {float(speed): _with_links(found, speed, links) for speed in _speeds(link_speeds)}
    shapes = _shapes(devices, meshes, names, bool(pins))
    start = time.perf_counter()
    base = base_plan(fn, args, found, names, {**options, "dims": dims})
    bases, traces, why = _bases(fn, len(args), base, sizes or {}, dims, options)
    traced = time.perf_counter()
    points: list[Point] = []
    refused: list[Refused] = []
    labels: dict[Any, str] = {}
    for (at, base), (speed, linked), group in itertools.product(bases, machines.items(), shapes):
        there = []
        for shape in group(linked):
            try:
                mesh = AbstractMesh(tuple(shape.values()), tuple(shape))
                there.append(candidate(base, mesh, linked, budget, pins or {}))
            except ValueError as error:
                refused.append(Refused(at, speed, shape, str(error)))
        best = min((one for one in there if one.fits), key=rank, default=None)
        for one in there:
            label = labels.setdefault(_layouts(one.plan), _label(len(labels)))
            points.append(Point(one, at, speed, label, one is best))
    if not points:
        raise ValueError(f"nothing can be planned; on {dict(refused[0].mesh)}: {refused[0].why}")
    ended = time.perf_counter()
    return Sweep(tuple(points), tuple(refused), found, links, budget, traces, traced - start, ended - traced, why)


# --- what is swept ---------------------------------------------------------------------------------------------------

Group = Callable[[Machine], Sequence[Mapping[str, int]]]
"""The meshes of one number of devices, on a machine."""


def _shapes(
    devices: int | Sequence[int] | None, meshes: Sequence[Mapping[str, int]] | None, names: Sequence[str], pinned: bool
) -> list[Group]:
    if (devices is None) == (meshes is None):
        raise TypeError("give either devices, one number or several, or meshes, such as [{'x': 4, 'y': 2}]")
    if meshes is not None:
        groups: dict[int, list[Mapping[str, int]]] = {}
        for mesh in meshes:
            whole = isinstance(mesh, Mapping) and mesh and all(isinstance(n, int) and n > 0 for n in mesh.values())
            if not whole:
                raise ValueError(f"meshes must be {{axis: size}} each, such as {{'x': 4, 'y': 2}}, got {mesh!r}")
            groups.setdefault(math.prod(mesh.values()), []).append(dict(mesh))
        if not groups:
            raise ValueError("meshes is an empty list: at least one mesh is needed")
        return [lambda _, found=found: found for found in groups.values()]
    several = devices if isinstance(devices, Sequence) and not isinstance(devices, str) else [devices]
    counts = list(dict.fromkeys(map(device_count, several)))
    if not counts:
        raise ValueError("devices is an empty list: at least one number is needed")

    def group(count: int) -> Group:
        shapes = factorisations(count, len(names))
        return lambda machine: [
            dict(zip(names, shape, strict=False)) for shape in (shapes if pinned else distinct(shapes, names, machine))
        ]

    return [group(count) for count in counts]


def _speeds(speeds: Iterable[float]) -> list[float]:
    """Each once."""
    found = list(dict.fromkeys(speeds))
    wrong = [s for s in found if isinstance(s, bool) or not isinstance(s, (int, float)) or not 0 < s < math.inf]
    if wrong or not found:
        got = wrong[0] if wrong else found
        raise ValueError(f"link_speeds must be positive numbers, 1 for the machine's own speed, got {got!r}")
    return [float(speed) for speed in found]


def _with_links(machine: Machine, speed: float, links: Links) -> Machine:
    """The machine with the bandwidth of some of its links multiplied; latencies stay."""
    if links not in _WHICH:
        raise ValueError(f"links may be {', '.join(map(repr, _WHICH))}, got {links!r}")

    def scaled(link: Link, kind: str) -> Link:
        return link.slower(1 / speed) if links in ("all", kind) and speed != 1 else link

    stated = {axis: scaled(link, "stated") for axis, link in machine.axis_links.items()}
    return replace(machine, inner=scaled(machine.inner, "inner"), outer=scaled(machine.outer, "outer"), axis_links=stated)


# --- sizes -----------------------------------------------------------------------------------------------------------


def _bases(
    fn: Callable[..., Any], count: int, base: Plan, sizes: Mapping[str, Sequence[int]], dims: Any, options: Mapping[str, Any]
) -> tuple[list[tuple[dict[str, int], Plan]], int, str]:
    """Per combination of sizes a plan for one device; how many traces there were; and why more than one, if so."""
    for name, wanted in sizes.items():
        if isinstance(wanted, (str, int)) or not wanted:
            raise ValueError(f"sizes[{name!r}] must be a list of whole numbers, got {wanted!r}")
        for extent in wanted:
            input_shapes(base.origin, {name: extent})
    found, traces, why = [], 1, ""
    for values in itertools.product(*(dict.fromkeys(wanted) for wanted in sizes.values())):
        at = dict(zip(sizes, values, strict=True))
        try:
            found.append((at, base.replan(sizes=at)))
            continue
        except CannotResize as error:
            why = why or str(error)
        try:
            found.append((at, _resized(fn, count, base, at, dims, options)))
        except Exception as error:
            error.add_note(f"at {', '.join(f'{name}={extent}' for name, extent in at.items())}, one of the sizes of the sweep")
            raise
        traces += 1
    return found, traces, why


def _resized(
    fn: Callable[..., Any], count: int, base: Plan, at: Mapping[str, int], dims: Any, options: Mapping[str, Any]
) -> Plan:
    """Traced anew, with inputs of other extents."""
    leaves = [
        jax.ShapeDtypeStruct(shape, aval.dtype, weak_type=aval.weak_type)
        for shape, aval in zip(input_shapes(base.origin, at), base.traced.in_avals, strict=True)
    ]
    args, kwargs = base.traced.unflatten_inputs(leaves)
    whole = list(args)
    static = base.request.static
    for position in sorted(key for key in static if isinstance(key, int)):
        whole.insert(position, static[position])
    if len(whole) != count:
        raise ValueError("of a function with static arguments, sizes can be swept only where static_argnums says which they are")
    kwargs = kwargs | {key: value for key, value in static.items() if isinstance(key, str)}
    rest = {key: value for key, value in options.items() if key not in kwargs}
    machine, mesh = base.request.machine, base.request.mesh
    return make_plan(fn, *whole, mesh=mesh, machine=machine, memory_budget=math.inf, dims=dims, **rest, **kwargs)


# --- plans that are alike --------------------------------------------------------------------------------------------


def _layouts(plan: Plan) -> Any:
    """Equal for plans of one program that lay out every input, output and intermediate value alike, on axes of the same names,
    and exchange the same: what an operator reads may be brought to it in more than one way."""
    exchanges = sorted((e.kind, e.axes, e.operator, e.source, len(e.shape)) for e in plan.exchanges)
    shared = any(len({dim for dim in layout if dim >= 0}) < sum(dim >= 0 for dim in layout) for layout in plan.layouts.values())
    order = plan.modelled.numbers.order.major_first if shared else ()
    return plan.axis_names, order, plan.input_layouts, plan.output_layouts, tuple(sorted(plan.layouts.items())), tuple(exchanges)


def _label(number: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    letters = string.ascii_uppercase
    return (_label(number // 26 - 1) if number >= 26 else "") + letters[number % 26]
