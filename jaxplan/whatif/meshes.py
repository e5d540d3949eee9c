"""All meshes of so many devices, ranked.

All of it is planned from one trace.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxplan.api import Plan, Replanning, make_plan, replanning
from jaxplan.budget import NothingFits, budget_bytes
from jaxplan.machine import Machine, axis_links, machine as find_machine
from jaxplan.pages import fragment
from jaxplan.report import show_bytes, show_seconds, table

AXIS_NAMES = ("x", "y", "z")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """A plan on one mesh. `fits`: its peak is within the memory budget; where nothing fits, `plan` is the fastest regardless of
    memory and `smallest` the least peak found, in bytes per device. `alone`: modelled seconds of the same call on one device."""

    plan: Plan
    fits: bool
    alone: float
    smallest: float

    @property
    def shape(self) -> Shape:
        """Devices along each mesh axis."""
        return tuple(self.plan.axis_sizes.values())

    @property
    def seconds(self) -> float:
        """Modelled seconds per call."""
        return self.plan.seconds

    @property
    def efficiency(self) -> float:
        """Modelled seconds on one device over those of all devices together; 1 is a perfect speed-up."""
        spent = math.prod(self.shape) * self.seconds
        return self.alone / spent if spent else 1.0

    @property
    def sent_bytes(self) -> float:
        """Bytes sent per device and call, over all axes."""
        return sum(self.plan.wire_bytes.values())

    @property
    def links(self) -> tuple[str, ...]:
        """Per axis the kind of link of the machine that it uses: "inner", "outer", or "stated" for the axis by name."""
        machine, sizes = self.plan.modelled.numbers.machine, self.plan.axis_sizes
        bound = axis_links(machine, sizes)
        kinds = {axis: "outer" if link == machine.outer != machine.inner else "inner" for axis, link in bound.items()}
        return tuple("stated" if axis in machine.axis_links else kind for axis, kind in kinds.items())

    @property
    def mesh_text(self) -> str:
        """Such as "x=8 y=4"."""
        return " ".join(f"{axis}={size}" for axis, size in self.plan.axis_sizes.items())

    def to_json(self) -> dict[str, Any]:
        """The numbers, without the plan."""
        return {
            "mesh": self.plan.axis_sizes, "links": list(self.links), "seconds": self.seconds, "efficiency": self.efficiency,
            "sent_bytes": self.sent_bytes, "peak_bytes": self.plan.peak_bytes, "smallest_peak_bytes": self.smallest,
            "fits": self.fits,
        }  # fmt: skip


_HEADER = ("mesh", "links", "seconds", "efficiency", "sent", "peak", "fits")


def _cells(candidate: Candidate) -> tuple[str, ...]:
    fits = "yes" if candidate.fits else f"no: at least {show_bytes(candidate.smallest)}"
    return (
        candidate.mesh_text, " ".join(candidate.links), show_seconds(candidate.seconds), f"{candidate.efficiency:.1%}",
        show_bytes(candidate.sent_bytes), show_bytes(candidate.plan.peak_bytes), fits,
    )  # fmt: skip


@dataclass(frozen=True)
class MeshRanking:
    """What `best_mesh` found; prints as a table.

    `devices`: how many. `machine`: whose numbers they are ranked by. `budget`: bytes per device. `best`: the plan on the fastest
    mesh that fits. `elapsed`: seconds that it took to find that one. Meshes that cannot be faster than it are fitted into memory
    when `candidates` are asked for, or the table is: that is what `rest` does.
    """

    devices: int
    machine: Machine
    budget: float
    best: Plan
    elapsed: float
    rest: Callable[[], tuple[tuple[Candidate, ...], Mapping[Shape, str]]] = field(repr=False, compare=False)

    @cached_property
    def _all(self) -> tuple[tuple[Candidate, ...], Mapping[Shape, str]]:
        return self.rest()

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """All meshes, the fastest that fits first, those that do not fit last."""
        return self._all[0]

    @property
    def refused(self) -> Mapping[Shape, str]:
        """{mesh shape: why it could not be planned at all, a pin that cannot be honoured there, say}."""
        return self._all[1]

    def __str__(self) -> str:
        name, budget = self.best.traced.name, "unlimited" if self.budget == math.inf else show_bytes(self.budget)
        lines = [f"Meshes of {self.devices} devices for {name}, machine {self.machine.name}, memory budget {budget}", ""]
        lines += table(_HEADER, map(_cells, self.candidates), right=(2, 3, 4, 5))
        lines += [f"not planned     {'x'.join(map(str, shape))}: {why}" for shape, why in self.refused.items()]
        lines += ["", "seconds, and bytes sent, per call and device; efficiency: beside one device, memory aside; all modelled"]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head, *lines = str(self).split("\n")
        notes = [line for line in lines[len(self.candidates) + 2 :] if line]
        return fragment(head, _HEADER, map(_cells, self.candidates), notes)

    def to_json(self) -> dict[str, Any]:
        """The table for a machine to read."""
        return {
            "function": self.best.traced.name, "devices": self.devices, "machine": self.machine.name,
            "memory_budget": None if self.budget == math.inf else self.budget,
            "meshes": [candidate.to_json() for candidate in self.candidates],
            "refused": [{"shape": list(shape), "why": why} for shape, why in self.refused.items()],
        }  # fmt: skip


def best_mesh(
    fn: Callable[..., Any],
    *args: Any,
    devices: int | Sequence[Any],
    machine: str | Machine | None = None,
    axis_names: Sequence[str] = AXIS_NAMES,
    memory_budget: int | float | str | None = None,
    pins: Mapping[str, PartitionSpec] | None = None,
    **options: Any,
) -> MeshRanking:
    """Plan `fn(*args)` on the meshes of so many devices, from one trace, and rank the meshes by modelled time.

    `devices`: how many, or the JAX devices themselves (in their order; the plans can then run). `machine`: as in `make_plan`; its
    `node` says which axes stay on fast links: the last ones, as long as they fill no more than a node. `axis_names`: a mesh
    takes as many of the first as it has axes, so that three names mean up to three axes. Meshes that differ by nothing but names
    are planned once. `memory_budget`, `pins` and `options`: as in `make_plan`, keyword arguments of `fn` among them.

    Raises TypeError or ValueError where `devices` is no number of devices, NothingFits where no mesh stays within the memory
    budget, ValueError where no mesh can be planned at all, saying why; and whatever `make_plan` raises.
    """
    start = time.perf_counter()
    count, live = _devices(devices)
    names = checked_names(axis_names)
    found = find_machine(machine, _mesh((count,), names, live))
    budget = budget_bytes(memory_budget, found)
    base = base_plan(fn, args, found, names, options)
    shapes = factorisations(count, len(names))
    if not pins:
        shapes = distinct(shapes, names, found)
    ranked = _Meshes(base, {shape: _mesh(shape, names, live) for shape in shapes}, found, budget, pins or {})
    best = ranked.best()
    if best is None:
        shape, why = next(iter(ranked.refused.items()))
        raise ValueError(f"no mesh of {count} devices can be planned; {'x'.join(map(str, shape))}: {why}")
    if not best.fits:
        least = min(ranked.planned.values(), key=lambda one: (one.smallest, rank(one)))
        raise NothingFits(
            f"no mesh of {count} devices fits {show_bytes(budget)} per device: the smallest peak found is "
            f"{show_bytes(least.smallest)}, on {least.mesh_text}. make_plan on that mesh says what makes it",
            least.smallest,
        )
    return MeshRanking(count, found, budget, best.plan, time.perf_counter() - start, ranked.all)


class _Meshes:
    """Meshes of so many devices, planned as far as is asked. `planned`, `refused`: what is known of those by now."""

    def __init__(
        self, base: Plan, meshes: Mapping[Shape, Any], machine: Machine, budget: float, pins: Mapping[str, PartitionSpec]
    ) -> None:
        self.planned: dict[Shape, Candidate] = {}
        self.refused: dict[Shape, str] = {}
        self._base, self._meshes, self._asked = base, meshes, (machine, budget, pins)
        self._begun = dict[Shape, Replanning]()

    def best(self) -> Candidate | None:
        """The first by rank; None where nothing can be planned. Meshes that cannot be faster are left, whatever they hold."""
        machine, budget, pins = self._asked
        least = dict[Shape, float]()
        for shape, mesh in self._meshes.items():
            try:
                begun = replanning(self._base, mesh=mesh, machine=machine, memory_budget=budget, pins=pins)
                least[shape] = begun.least()
                self._begun[shape] = begun
            except ValueError as error:
                self.refused[shape] = str(error)
        best: Candidate | None = None
        for shape in sorted(least, key=least.__getitem__):
            if best is not None and best.fits and not self._begun[shape].may_take_less(best.seconds):
                continue
            self._plan(shape)
            if shape in self.planned and (best is None or rank(self.planned[shape]) < rank(best)):
                best = self.planned[shape]
        return best

    def all(self) -> tuple[tuple[Candidate, ...], Mapping[Shape, str]]:
        """(all that can be planned, by rank; of the others, why not)."""
        for shape in list(self._begun):
            self._plan(shape)
        refused = {shape: self.refused[shape] for shape in self._meshes if shape in self.refused}
        return tuple(sorted(self.planned.values(), key=rank)), refused

    def _plan(self, shape: Shape) -> None:
        try:
            self.planned[shape] = candidate(self._base, self._meshes[shape], *self._asked, self._begun.pop(shape))
        except ValueError as error:
            self.refused[shape] = str(error)


def rank(candidate: Candidate) -> tuple[Any, ...]:
    """Fast before slow among those that fit, small before large among the others; ties to fewer axes."""
    plan, first = candidate.plan, 0.0 if candidate.fits else candidate.smallest
    return (not candidate.fits, first, candidate.seconds, plan.peak_bytes, len(candidate.shape), candidate.shape)


def base_plan(fn: Callable[..., Any], args: tuple[Any, ...], machine: Machine, names: Sequence[str], options: Any) -> Plan:
    """The trace that all plans come from, planned for one device, without budget."""
    for name in ("mesh", "certify"):
        if name in options:
            what = "the meshes are what is looked for" if name == "mesh" else "certify the plan that was chosen, by replan"
            raise TypeError(f"{name} cannot be given here: {what}")
    asked = {name: options[name] for name in ("pipeline", "microbatches") if name in options}
    others = {name: value for name, value in options.items() if name not in asked}
    one = AbstractMesh((1,), (names[0],))
    base = make_plan(fn, *args, mesh=one, machine=machine, memory_budget=math.inf, pipeline=None, **others)
    return replace(base, request=replace(base.request, **{"pipeline": "auto", **asked}))


def candidate(
    base: Plan, mesh: Any, machine: Machine, budget: float, pins: Mapping[str, PartitionSpec], asked: Replanning | None = None
) -> Candidate:
    """The plan on one mesh; ValueError where it cannot be planned there at all. `asked`: the same, begun already."""
    try:
        plan = (asked or replanning(base, mesh=mesh, machine=machine, memory_budget=budget, pins=pins)).plan()
    except NothingFits as error:
        plan = base.replan(mesh=mesh, machine=machine, memory_budget=math.inf, pins=pins)
        return Candidate(plan, False, base.seconds, error.smallest)
    return Candidate(plan, True, base.seconds, plan.peak_bytes)


# --- meshes ----------------------------------------------------------------------------------------------------------


def factorisations(devices: int, axes: int) -> list[Shape]:
    """All mesh shapes of so many devices with up to so many axes, none of size 1 (but (1,) for one device), in a fixed order."""

    def ways(rest: int, left: int) -> Iterator[Shape]:
        if left == 1:
            yield (rest,)
            return
        for first in range(rest // 2, 1, -1):
            if rest % first == 0:
                yield from ((first, *others) for others in ways(rest // first, left - 1))

    return [shape for count in range(1, axes + 1) for shape in ways(devices, count)]


def distinct(shapes: Sequence[Shape], names: Sequence[str], machine: Machine) -> list[Shape]:
    """The shapes less those that have, axis by axis, the sizes and links of an earlier one in another order."""
    known: dict[Any, Shape] = {}
    for shape in shapes:
        sizes = dict(zip(names, shape, strict=False))
        links = axis_links(machine, sizes)
        key = sorted((sizes[a], links[a].seconds_per_byte, links[a].latency_seconds) for a in sizes)
        known.setdefault(tuple(key), shape)
    return list(known.values())


def _devices(devices: Any) -> tuple[int, list[Any] | None]:
    """How many, and which, if the user gave them."""
    if isinstance(devices, (list, tuple, np.ndarray)):
        live = list(np.asarray(devices, dtype=object).flat)
        strange = [one for one in live if not isinstance(one, jax.Device)]
        if strange:
            raise TypeError(f"devices must be a number, or a list of jax.devices(); one of them is {strange[0]!r}")
        if not live:
            raise ValueError("devices is an empty list: at least one device is needed")
        return len(live), live
    return device_count(devices), None


def device_count(devices: Any) -> int:
    """A whole number of at least 1; TypeError or ValueError for anything else."""
    try:
        count = None if isinstance(devices, bool) else operator.index(devices)
    except TypeError:
        count = None
    if count is None:
        raise TypeError(f"devices must be a whole number or a list of jax.devices(), got {devices!r}")
    if count < 1:
        raise ValueError(f"devices must be at least 1, got {count}")
    return count


def checked_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names of mesh axes; ValueError unless they are one or more, and differ."""
    given = tuple(names) if not isinstance(names, str) else (names,)
    if not given or len(set(given)) < len(given) or not all(isinstance(name, str) and name for name in given):
        raise ValueError(f"axis_names must be one or more different names, such as ('data', 'model'), got {names!r}")
    return given


def _mesh(shape: Shape, names: Sequence[str], live: Sequence[Any] | None) -> Any:
    axes = tuple(names[: len(shape)])
    if live is None:
        return AbstractMesh(shape, axes)
    return Mesh(np.array(live, dtype=object).reshape(shape), axes)
