"""The public verbs, in the order data flows: trace, graph, model, search, plan; then apply, audit, report."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import jax
from jax.sharding import PartitionSpec

from jaxplan import __version__, _jax, files, plan as _plan
from jaxplan.apply import PlannedFunction
from jaxplan.asked import AUTO, check_certify, check_keywords, check_mesh, check_pipeline
from jaxplan.attempts import Attempts, more_devices
from jaxplan.budget import NothingFits, budget_bytes
from jaxplan.compare import PlanAudit, compare
from jaxplan.cost import Numbers, certainly_within, frugal, model
from jaxplan.export import export_plan, restore_state
from jaxplan.graph import Graph, build_graph
from jaxplan.graph.flatten import WHILE_TRIPS
from jaxplan.hlo import audit
from jaxplan.hybrid import Choosing, choose, least_seconds, may_take_less
from jaxplan.layout import Layout
from jaxplan.ledger import Ledger, ledger
from jaxplan.machine import Machine, machine as find_machine, platform_of
from jaxplan.pages import SweepView, auto_sweep, page, picture_of, plan_table
from jaxplan.pins import Dims, dimension_names, has_inputs, inputs_at, pinned_layouts, pinned_orders, renamed, stage_dims
from jaxplan.pipeline import PipelineError, left_out, rerolled
from jaxplan.plots import plot_memory
from jaxplan.problem import Assignment, Problem
from jaxplan.reasons import Explanation, WhyNot, explain_inputs, explain_line, why_not
from jaxplan.regimes import Regimes, regimes
from jaxplan.report import describe, show_seconds
from jaxplan.resize import CannotResize, Origin, resize, resize_loops
from jaxplan.search import certify as certified, search as run_search
from jaxplan.state import check, init
from jaxplan.topology import topology_mesh
from jaxplan.trace import Traced, collector_paused, static_values, trace
from jaxplan.unlike import OnStages, Stagewise, Wanted, insisted, on_stages, unasked

Search = str | Callable[[Problem], Assignment]


@dataclass(frozen=True)
class Request:
    """What the user asked for, kept so that a plan can be derived again for another mesh or machine without a retrace.

    `sizes`: the extents that differ from the trace's, by name; `origin`: the program as traced, where there are some.
    `unrolled`: the program as traced, and its graph, where the plan is of one with its layers put into loops. `major_first`: of a
    stage, the order in which axes that share a dimension stand in the whole plan.
    """

    mesh: Any
    machine: str | Machine | None = None
    search: Search = "hsm2dl"
    memory_budget: int | float | str | None = None
    pins: Mapping[str, PartitionSpec] = field(default_factory=dict)
    static: Mapping[int | str, Any] = field(default_factory=dict)
    while_trips: float = WHILE_TRIPS
    certify: bool | float = False
    pipeline: str | None = AUTO
    microbatches: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    origin: Origin | None = None
    unrolled: tuple[Traced, Graph] | None = None
    major_first: tuple[str, ...] = ()

    @property
    def orders(self) -> tuple[tuple[str, ...], ...]:
        """In which orders axes that share a dimension have to stand."""
        return (self.major_first, *pinned_orders(self.pins))


MOST_PADDINGS = 4


@dataclass(frozen=True)
class Padding:
    """An extent that the mesh does not divide; `path`, `dim`: an input that has it. `saved`: seconds per call."""

    extent: int
    padded: int
    path: str
    dim: int
    saved: float

    def __str__(self) -> str:
        where = f"{self.extent} (dimension {self.dim} of {self.path})"
        return f"indivisible     {where}: padding it to {self.padded} would save {show_seconds(self.saved)} a call"


class Plan(_plan.Plan):
    """Where everything lies, what it costs, and how to run it. `print(plan)` gives a table.

    `mesh`: what it was planned for. `bound`: with `certify=True` the seconds that no plan goes below, else None. `pipeline`: the
    mesh axis laid along layers, its stages and micro-batches; None without. `dims`: names that the user gave to dimensions.
    `stages`: {room: seconds} that planning took. `request`: what `make_plan` was asked for. `traced`, `modelled`, `choices`: the
    program, its model and the option chosen per cluster and mesh axis, from which all else is derived.
    """

    def __str__(self) -> str:
        apart = left_out(self.traced.jaxpr.jaxpr, self.pipeline) if self.pipeline is not None else []
        return describe(self, notes=[*[f"not in stages   {why}" for why in apart], *[str(padding) for padding in self.paddings]])

    def jit(self, donate_argnums: int | Sequence[int] | None = None) -> PlannedFunction:
        """The planned function: callable, places its arguments, has `.lower(*args)`.

        `donate_argnums`: positions of arguments whose buffers may be reused, as in `jax.jit`; by default those that the
        function was traced with. Raises ValueError for a plan at other sizes than the program was traced for.
        """
        self._of_the_trace("run")
        if donate_argnums is None:
            donated = [i for i, flag in enumerate(self.traced.donated) if flag]
        else:
            wanted = {donate_argnums} if isinstance(donate_argnums, int) else set(donate_argnums)
            count = len(self.traced.in_avals)
            args, _ = self.traced.unflatten_inputs(range(count))
            donated = [leaf for i, arg in enumerate(args) if i in wanted for leaf in jax.tree.leaves(arg)]
        return self._function(dict(self.request.static), donated)

    def _function(self, static: dict[int | str, Any], donate: Sequence[int]) -> PlannedFunction:
        return PlannedFunction(self, static, donate)

    def audit(self, topology: str | None = None) -> PlanAudit:
        """What was predicted beside what XLA compiles, per exchange and per axis; printing it gives a table.

        Compiles the planned function for the shapes that were planned, donating what it donates; runs nothing. Loops whose trip
        count the program does not say count as often as was planned. `topology`: compile for a TPU slice by name, "v5e:4x4",
        with libtpu and no TPU. Raises ValueError for a plan made for an AbstractMesh, unless a topology has devices for it.
        """
        self._of_the_trace("audited")
        if topology is not None:
            self = replace(self, mesh=topology_mesh(topology, self.axis_sizes))
        if not isinstance(self.mesh, jax.sharding.Mesh):
            raise ValueError(
                "this plan was made for an AbstractMesh, and there is nothing to compile for: audit plan.replan(mesh=...) with a "
                "mesh of devices (simulated ones will do: XLA_FLAGS=--xla_force_host_platform_device_count=16), or with topology="
            )
        trips = self.request.while_trips
        rounded = bool(find_machine(None, self.mesh).matmul_reads)  # simulated devices do not
        return compare(self, audit(self.jit().lower_planned(), mesh=self.mesh, while_trips=trips), rounded)

    @functools.cached_property
    def paddings(self) -> tuple[Padding, ...]:
        """Extents that the mesh does not divide, and what padding them would save; only those worth half a percent of a call.

        Searched anew for each of the `MOST_PADDINGS` extents with the most bytes, when first asked for (or printed).
        """
        graph, modelled = self.modelled.graph, self.modelled
        devices = math.prod(modelled.numbers.sizes)
        at: dict[int, list[tuple[int, int]]] = {}
        for tensor in dict.fromkeys(graph.inputs):
            for dim, extent in enumerate(graph.tensors[tensor].shape):
                if extent > devices and extent % devices:
                    at.setdefault(extent, []).append((tensor, dim))
        if not at or self.pipeline is not None:
            return ()
        whole = run_search(modelled.problem, self.request.search).seconds  # this plan may cost more, to fit a budget
        weight = {extent: sum(graph.tensors[tensor].nbytes for tensor, _ in places) for extent, places in at.items()}
        found = []
        for extent in sorted(at, key=lambda extent: (-weight[extent], extent))[:MOST_PADDINGS]:
            padded = -(-extent // devices) * devices
            clusters = [c._replace(units=tuple([padded if unit == extent else unit for unit in c.units])) for c in graph.clusters]
            relaxed = model(replace(graph, clusters=tuple(clusters)), modelled.numbers, _request_pins(self))
            saved = whole - run_search(relaxed.problem, self.request.search).seconds
            if saved > 0.005 * self.seconds:
                tensor, dim = at[extent][0]
                path = self.traced.in_paths[graph.inputs.index(tensor)]
                found.append(Padding(extent, padded, path, dim, saved))
        return tuple(found)

    @functools.cached_property
    def pin_prices(self) -> Mapping[str, float]:
        """{pin: seconds per call that it costs}: what the best plan without it would save, the other pins kept. Searched anew
        for each pin, when first asked for."""
        pins = self.request.pins
        free = ({p: s for p, s in pins.items() if p != path} for path in pins)
        return {path: self.seconds - self.replan(pins=rest).seconds for path, rest in zip(pins, free, strict=True)}

    @functools.cached_property
    def ledger(self) -> Ledger:
        """What lives at the peak, largest first, and `.by_kind` in bytes per device: parameters, other state, other arguments,
        outputs, gradients, activations, transients of exchanges."""
        return ledger(self)

    def explain(self, path_or_line: str) -> Explanation:
        """Why something is laid out as it is: an input by path, pytree prefix or glob ("blocks/*/wq"), or the operators that a
        source line wrote ("model.py:41", ":41").

        For an input: the layout, what moving it costs in closed form, who reads it, the runners-up (the problem solved again with
        each) and why an axis does not shard it. For operators: what each axis splits, the closed-form cost, the next best choice.

        Raises ValueError, naming the closest paths or lines, where there is no such thing.
        """
        if re.search(r":\d+$", path_or_line):
            return explain_line(self, path_or_line)
        return explain_inputs(self, self, path_or_line, inputs_at(self.traced, "explain", path_or_line))

    def why_not(self, pins: Mapping[str, PartitionSpec]) -> WhyNot:
        """The best plan with some inputs pinned (paths as in `pins=`), beside this one: what it costs more, why, what else moves.

        Raises ValueError where a pin cannot be honoured, saying why.
        """
        return why_not(self, self, pins)

    def regimes(self, symbol: str, low: float | None = None, high: float | None = None) -> Regimes:
        """Where along one symbol of `cost` another plan takes over: ranges, what the plan of each does, and the closed-form
        condition at each boundary. From one trace; memory and pipelines apart.

        `symbol`: a dimension ("B"), the devices of a mesh axis ("n_x"), or the seconds per byte of its link ("g_x"). `low`,
        `high`: the range, six doublings either way if not given. Raises ValueError for another symbol, and for a dimension that
        cannot be given other sizes from the trace, saying why.
        """
        return regimes(self, self, symbol, low, high)

    def init(self, init_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`init_fn(*args, **kwargs)` with its result created where the plan wants it, never whole on one device.

        The result, or sub-trees of it, must have the structure, shapes and dtypes of arguments of the planned function: `params`,
        say, or `(params, opt_state)`. Raises ValueError, naming the path, for a part that stands for no argument.
        """
        return init(self, init_fn, args, kwargs)

    def check(self, state: Any) -> None:
        """Raise `LayoutError`, naming paths, where live arrays lie otherwise than planned (silent replication, say).

        `state`: arrays in the structure of one or more arguments of the planned function.
        """
        check(self, state)

    def export(self, form: str, of: Any = None, **options: Any) -> Any:
        """The plan in another library's words. `form`: "flax", "nnx", "orbax", "optax", "maxtext", "haliax", "keras" or
        "explicit".

        `of`: which arrays: None for all arguments, a path ("params", "state/params"), a pytree of paths, or a pytree of arrays or
        shapes that are structured as arguments are. `options`: `optimizer=` for "optax", `variables=` for "keras".

        Raises `jaxplan.ExportError`, naming the paths, for a layout that the library has no words for; ModuleNotFoundError or
        ImportError, naming the extra, where the library is missing or too old.
        """
        return export_plan(self, form, of, options, make_plan)

    def restore(self, directory: str | os.PathLike[str], of: Any = None, *, partial: bool = False) -> Any:
        """Read an Orbax checkpoint to where the plan wants it, whatever mesh wrote it. `of`: as in `export`. `partial`: leave
        unread what it holds beside that (an optimizer's state, say).

        Every process of the mesh calls it. Raises `jaxplan.CheckpointError`, naming the paths, where leaves are missing, too
        many (unless partial), or of another shape or dtype: nothing is read then.
        """
        return restore_state(self, directory, of, partial)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a small text file, which `load_plan` takes up again. The path holds the old file or the new one,
        never a part. Raises OSError where the folder cannot be written, ValueError for a plan at other sizes than the program was
        traced for: a file vouches for a trace."""
        self._of_the_trace("saved")
        files.write_plan(self._saved(), path)

    def to_python(self) -> str:
        """The specs of inputs and outputs as the text of a Python module, to own and edit."""
        return files.to_python(self._saved())

    def _saved(self) -> files.SavedPlan:
        with collector_paused():
            return files.saved_plan(self)

    def to_html(self, sweep: SweepView | Literal["auto"] | None = "auto") -> str:
        """The plan as one HTML page that needs no network: the program with layouts and exchanges, the mesh, memory over the
        step, cost by source line, and a slider over plans at other sizes or link speeds.

        `sweep`: what the slider goes over (`Sweep.view()` gives one); "auto": the first dimension of the data, if the trace
        tells of other sizes, else the link of the first axis; None: no slider.
        """
        about = {"jaxplan": __version__, "JAX": jax.__version__}
        return page(replace(picture_of(self), sweep=auto_sweep(self, self) if sweep == "auto" else sweep, about=about))

    def save_html(self, path: str | os.PathLike[str], sweep: SweepView | Literal["auto"] | None = "auto") -> None:
        """Write `to_html` to a file; the old one survives if it cannot be written (OSError)."""
        files.write_text(self.to_html(sweep), path)

    def plot_memory(self, path: str | os.PathLike[str]) -> None:
        """Draw memory over one call to a .png, .svg or .pdf file. Needs matplotlib (ModuleNotFoundError says how to have it)."""
        plot_memory(self, path)

    def _repr_html_(self) -> str:
        """For notebooks: what `print(plan)` says of the inputs, as a table, and the totals."""
        return plan_table(self)

    def replan(self, **changes: Any) -> Plan:
        """The same traced program under another `mesh`, `machine`, `memory_budget`, `pins`, `search`, `certify`, `pipeline` or
        `microbatches`, or with other `sizes` of its dimensions; no retrace.

        `sizes`: {"B": 512}: extents by the names that the plan prints, or that `dims` gave; the others stay as they are. The plan
        is what `make_plan` gives for arguments of such shapes (stages of unlike layers apart), but cannot be run or saved.
        Raises ValueError where the trace does not say what the program would be, with the reason and the line. What Python
        decided by looking at a shape stays decided.
        """
        return replanning(self, **changes).plan()

    @property
    def program(self) -> tuple[Traced, Graph]:
        """The program as it was traced, and its graph: unrolled layers, which a pipeline may have rolled up, as they were."""
        return self.request.unrolled or (self.traced, self.modelled.whole)

    @functools.cached_property
    def origin(self) -> Origin:
        """The program as it was traced for the sizes it was traced for."""
        if self.request.origin is not None:
            return self.request.origin
        (traced, graph), names = self.program, self.names
        if graph is not self.modelled.whole:
            names = _plan.dimension_names_of(traced, graph, renamed(self.dims, self.modelled.whole, graph))
        return Origin(traced, graph, names, self.request.while_trips)

    def _of_the_trace(self, verb: str) -> None:
        """Raise ValueError if this plan is for other sizes than the program was traced for."""
        if self.request.sizes:
            sizes = ", ".join(f"{name}={extent}" for name, extent in self.request.sizes.items())
            raise ValueError(
                f"this plan was derived for {sizes} from a trace of other shapes, so it can be looked at but not {verb}: call "
                "make_plan with arguments of these shapes"
            )


class StagedPlan(OnStages, Plan):
    """A plan whose stages lie on sub-meshes of their own: what `make_plan` gives where an axis is laid along layers that differ.

    It runs as other plans do (`jit`, `auto_shard`, `init`, `check`), is lowered, compiled and audited part by part, and saved;
    `stage_plans` has the plan of each stage. It is no single program, so that it cannot be called inside of another jitted
    function, drawn, or taken apart in symbols of its memory (ValueError); of `export`'s forms it has "orbax".
    """

    def explain(self, path_or_line: str) -> Explanation:
        """As for any plan, of the stage where an input lies, or that has the operators of a line. Raises ValueError where several
        stages have: ask the plan of one of them."""
        return cast(Plan, self._explaining(path_or_line)).explain(path_or_line)

    def _saved(self) -> files.SavedPlan:
        staged = self.staged
        worst = staged.peaks.index(self.peak_bytes)
        with collector_paused():
            held = staged.held[worst].always, self.peak_bytes
            return files.saved_in_stages(self, staged.axis, staged.parts.cuts, staged.microbatches, self.places, held)


def make_plan(
    fn: Callable[..., Any],
    *args: Any,
    mesh: Any,
    machine: str | Machine | None = None,
    search: Search = "hsm2dl",
    memory_budget: int | float | str | None = None,
    pins: Mapping[str, PartitionSpec] | None = None,
    dims: Mapping[str, str] | Sequence[str | None] | None = None,
    pipeline: str | None = "auto",
    microbatches: int | None = None,
    certify: bool | float = False,
    while_trips: float = WHILE_TRIPS,
    static_argnums: int | Sequence[int] | None = None,
    static_argnames: str | Sequence[str] | None = None,
    donate_argnums: int | Sequence[int] | None = None,
    donate_argnames: str | Sequence[str] | None = None,
    **kwargs: Any,
) -> Plan:
    """Plan `fn(*args, **kwargs)` on a mesh. Nothing is run or compiled, and no devices are needed.

    `args`, `kwargs`: arrays or `jax.ShapeDtypeStruct`s. `mesh`: a `Mesh` or `AbstractMesh`. `machine`: a `Machine`, the name
    of a preset, or None (from the mesh's devices; "v5e" for an `AbstractMesh`). `search`: "hsm2dl", another name in
    `jaxplan.search.SEARCHES`, or a callable `Problem -> Assignment`. `memory_budget`: bytes per device, "16GiB", or `math.inf`;
    None: the machine's.
    `pins`: {input path, pytree prefix or glob ("blocks/*/wq"): PartitionSpec}. `dims`: names for dimensions, {path: "B S"} or
    one string per positional argument. `while_trips`: how often a `while` loop is taken to run where the program does not tell.
    `certify`: also prove how far from the optimum the plan can be (`plan.bound`, `plan.gap`); a cheaper plan met on the way is
    taken, if `search` is a name. A number: seconds that an integer program may spend on tightening the bound.
    `pipeline`: "auto" lays a mesh axis along the layers where that is faster, or where nothing else fits the memory (layers that
    differ run on sub-meshes: a `StagedPlan`); an axis name insists on it, None forbids it. `microbatches`: into how many the
    batch is then cut; None: as many as are best.
    `static_*`, `donate_*`: as in `jax.jit`.

    Raises: whatever JAX raises if `fn` does not trace; ValueError with what, where and what to do otherwise.
    """
    if not 0 <= while_trips < math.inf:
        raise ValueError(f"while_trips must be a number of rounds, got {while_trips}")
    check_certify(certify)
    check_mesh(mesh)
    check_keywords(fn, kwargs, meant)
    start = time.perf_counter()
    traced = trace(
        fn, args, kwargs, static_argnums=static_argnums, static_argnames=static_argnames,
        donate_argnums=donate_argnums, donate_argnames=donate_argnames,
    )  # fmt: skip
    traced_at = time.perf_counter()
    static = static_values(fn, args, kwargs, static_argnums, static_argnames)
    insisted = dict(pins) if isinstance(pins, Mapping) else pins or {}
    request = Request(mesh, machine, search, memory_budget, insisted, static, while_trips, certify, pipeline, microbatches)
    check_pipeline(request.pipeline, request.microbatches)
    with collector_paused():
        graph = build_graph(traced, while_trips, platform_of(mesh))
        spent = {"trace": traced_at - start, "graph": time.perf_counter() - traced_at}
        alone = not any(isinstance(leaf, _jax.Tracer) for leaf in jax.tree.leaves((args, kwargs)))
        named = dimension_names(traced, graph, dims)
        return _solve(_choosing(traced, graph, request, named), request, named, spent, apart=alone)


@dataclass(frozen=True)
class Replanning:
    """A plan of a program that was traced already, yet to be found."""

    using: Choosing[Plan]
    request: Request
    dims: Dims

    def plan(self) -> Plan:
        """Find it. Raises ValueError where there is none, NothingFits."""
        with collector_paused():
            return _solve(self.using, self.request, self.dims, {})

    def least(self) -> float:
        """About the seconds that it takes at least, 0.0 where that is told by planning alone. Raises ValueError where no plan is
        legal."""
        with collector_paused():
            return least_seconds(self.using, self.request.pipeline)

    def may_take_less(self, seconds: float) -> bool:
        """Whether it may take less than so many seconds, told without fitting anything into memory."""
        with collector_paused():
            return may_take_less(self.using, self.request.pipeline, self.request.microbatches, seconds)


def replanning(plan: Plan, **changes: Any) -> Replanning:
    """What `plan.replan` finds, before it does."""
    taken = ("mesh", "machine", "memory_budget", "pins", "search", "certify", "pipeline", "microbatches", "sizes")
    unknown = set(changes) - set(taken)
    if unknown:
        raise TypeError(f"replan does not take {sorted(unknown)}; it takes {', '.join(taken)}")
    sizes = changes.pop("sizes", None)
    request = replace(plan.request, unrolled=None, **changes)
    check_certify(request.certify)
    check_mesh(request.mesh)
    check_pipeline(request.pipeline, request.microbatches)
    with collector_paused():
        traced, graph = plan.program
        if sizes is not None:
            origin = plan.origin
            traced, graph = resize(origin, {**request.sizes, **sizes} if isinstance(sizes, Mapping) else sizes)
            differ = {} if graph is origin.graph else {**request.sizes, **sizes}
            request = replace(request, sizes=differ, origin=origin if differ else None)
        dims = renamed(plan.dims, plan.modelled.whole, graph)
        return Replanning(_choosing(traced, graph, request, dims), request, dims)


def _choosing(traced: Traced, graph: Graph, request: Request, dims: Dims) -> Choosing[Plan]:
    """What it takes to plan."""
    machine = find_machine(request.machine, request.mesh)
    budget = budget_bytes(request.memory_budget, machine)

    def rolled() -> Choosing[Plan] | None:
        try:
            found = _rolled(traced, graph, request, dims)
        except CannotResize:
            if request.pipeline == AUTO:
                return None
            raise
        if found is None:
            return None
        marked = replace(request, unrolled=(traced, graph))
        return choosing(*found, marked, renamed(dims, graph, found[1]), lambda: None)

    def choosing(traced: Traced, graph: Graph, request: Request, dims: Dims, rolled: Any) -> Choosing[Plan]:
        numbers = Numbers(graph, dict(request.mesh.shape), machine, said=request.orders)
        attempts = functools.partial(Attempts, Plan, traced, graph, numbers, request, dims)
        return Choosing(traced, graph, numbers, attempts, budget, more_devices, rolled, bool(request.sizes))

    return choosing(traced, graph, request, dims, rolled)


def _rolled(traced: Traced, graph: Graph, request: Request, dims: Dims) -> tuple[Traced, Graph] | None:
    """A program with its unrolled layers in loops, found once for all meshes; None where it has none. Raises CannotResize."""
    origin = request.origin if request.sizes else None
    written = origin.traced if origin is not None else traced

    def find() -> tuple[Traced, Graph] | None:
        again = rerolled(written)
        if again is written:
            return None
        loops = build_graph(again, request.while_trips, graph.platform)
        if origin is None:
            return again, loops
        names = _plan.dimension_names_of(again, loops, renamed(dims, graph, loops))
        return resize_loops(origin, Origin(again, loops, names, origin.while_trips), request.sizes)

    sizes = None if origin is None else (tuple(sorted(request.sizes.items())), tuple(sorted(dims.items())))
    return graph.remembered("rolled", (written.donated, request.while_trips, sizes), find)


def _solve(
    using: Choosing[Plan], request: Request, dims: Dims, stages: Mapping[str, float], apart: bool = False
) -> Plan:
    """Model, search, and fit into memory. `apart`: whether stages on sub-meshes may be taken where nobody asked for them."""
    start, asked = time.perf_counter(), request.pipeline
    wanted = _wanted(using, request, dims)
    own = apart and asked == AUTO
    try:
        plan = choose(using, asked, request.microbatches)
    except PipelineError as error:
        if request.sizes:
            raise ValueError(f"{error}. At other sizes than traced: call make_plan with arguments of these shapes") from error
        plan = _on_stages(using, request, insisted(using, wanted, asked or "", error))
    except NothingFits:
        found = unasked(using, wanted, None) if own else None
        if found is None:
            raise
        plan = _on_stages(using, request, found)
    else:
        found = unasked(using, wanted, plan) if own and plan.pipeline is None else None
        plan = plan if found is None else _on_stages(using, request, found)
    searched = time.perf_counter()
    stages = {**stages, "model and search": searched - start}
    if request.certify is not False:
        plan = _certified(plan, request, using.budget)
        stages["certify"] = time.perf_counter() - searched
    return replace(plan, stages=stages)


def stage_request(
    request: Request, traced: Traced, mesh: Any, machine: Any, major_first: tuple[str, ...], budget: float = math.inf
) -> Request:
    """What is asked of the program of one stage. `request`, `major_first`: of the whole; `mesh`: the stage's; `budget`: bytes per
    device."""
    own = {path: spec for path, spec in request.pins.items() if has_inputs(traced, path)}
    trips = request.while_trips
    return Request(mesh, machine, request.search, max(1.0, budget), own, {}, trips, pipeline=None, major_first=major_first)


def _wanted(using: Choosing[Plan], request: Request, dims: Dims) -> Wanted:
    """What is asked of stages on sub-meshes."""

    def planner(traced: Traced, mesh: Any, budget: float) -> Plan:
        asked = stage_request(request, traced, mesh, using.numbers.machine, using.numbers.major_first, budget)
        graph = build_graph(traced, request.while_trips, platform_of(mesh))
        named = stage_dims(using.traced, using.graph, dims, traced, graph)
        return _solve(_choosing(traced, graph, asked, named), asked, named, {})

    return Wanted(request.mesh, request.pins, request.certify is not False, request.microbatches, planner)


def _on_stages(using: Choosing[Plan], request: Request, found: Stagewise) -> StagedPlan:
    """A plan with its stages on sub-meshes; derived again, it asks for these by name."""
    plan = on_stages(using.planned(None)[1], StagedPlan, found)
    return replace(plan, request=replace(request, pipeline=found.axis))


def _certified(plan: Plan, request: Request, budget: float) -> Plan:
    """The plan with a bound; or the cheaper one that proving it has found, if the search was left to us and memory allows it.

    The bound is that of the problem within a limit on those bytes that every plan takes.
    """
    modelled = plan.modelled
    start = Assignment(plan.choices[list(modelled.kept)], plan.seconds)
    program_seconds = 0.0 if request.certify is True else float(request.certify)
    limited = budget < math.inf and plan.pipeline is None and not modelled.follows
    problem = certainly_within(modelled, budget, plan.traced.donated) if limited else modelled.problem
    proven = certified(problem, start, program_seconds=program_seconds)
    plan = replace(plan, bound=proven.bound)
    if isinstance(request.search, str) and proven.seconds < plan.seconds:
        better = replace(plan, choices=modelled.complete(frugal(modelled, proven.choices, proven.seconds)))
        if better.fits(budget):
            return better
    return plan


def keywords() -> list[str]:
    """The keywords of `make_plan` that say how to plan; all others are the planned function's."""
    return [p.name for p in inspect.signature(make_plan).parameters.values() if p.kind is p.KEYWORD_ONLY and p.name != "mesh"]


def meant(name: str) -> str:
    """What a keyword that nobody takes may have been meant to be."""
    near = difflib.get_close_matches(name, keywords(), 1)
    return f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(keywords())}"


def _request_pins(plan: Plan) -> dict[int, Layout]:
    return pinned_layouts(plan.traced, plan.request.pins, plan.axis_sizes, plan.modelled.numbers.major_first)
