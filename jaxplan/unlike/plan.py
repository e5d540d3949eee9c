"""A plan whose stages lie on sub-meshes: what it says of itself, how it runs, and what cannot be asked of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxplan import _jax
from jaxplan.apply import PlannedFunction
from jaxplan.compare import PlanAudit, StageSides, compare_stages
from jaxplan.cost import symbolic_cost
from jaxplan.hlo import audit
from jaxplan.machine import machine as find_machine
from jaxplan.pins import has_inputs
from jaxplan.plan import Plan, PlannedExchange
from jaxplan.report import show_bytes, show_seconds, table
from jaxplan.unlike.choose import Stagewise
from jaxplan.unlike.compiled import CompiledStage, LoweredStages, compiled_stages
from jaxplan.unlike.run import StagedRun, stage_mesh

if TYPE_CHECKING:
    import sympy


def _refused(verb: str) -> Callable[..., NoReturn]:
    """A method that says why a plan of this kind cannot do it."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"the stages of this plan lie on sub-meshes, as programs of their own, and it cannot be {verb} as one: ask "
            "plan.stage_plans[number], of one stage, or plan with pipeline=None"
        )

    refuse.__doc__ = f"Raises ValueError: a plan of stages on sub-meshes cannot be {verb} as one."
    return refuse


@dataclass(frozen=True)
class OnStages(Plan):
    """What is different of a plan whose stages lie on sub-meshes. `stagewise`: the stages. `modelled` and `choices` are of the
    program without a pipeline, which is what it is compared with."""

    stagewise: Stagewise | None = None

    @property
    def staged(self) -> Stagewise:
        """The stages."""
        assert self.stagewise is not None
        return self.stagewise

    @property
    def stage_plans(self) -> tuple[Plan, ...]:
        """A plan per stage, of what it does in a call: it can be printed, explained and compared like any other."""
        return self.staged.plans

    # ---- layouts ---------------------------------------------------------------------------------------------------

    @cached_property
    def places(self) -> tuple[list[tuple[int, PartitionSpec]], list[tuple[int, PartitionSpec]]]:
        """Per flat input and output, (stage, spec)."""
        parts, programs, plans = self.staged.parts, self.staged.programs, self.staged.plans
        jaxpr, ties = parts.micro.jaxpr, dict(parts.ties)
        ins = [
            (home, plans[home].partition_spec_of(programs[home].arguments.index(v)))
            for v, home in zip(jaxpr.invars, parts.homes, strict=True)
        ]
        outs = []
        for position, v in enumerate(jaxpr.outvars):
            if position in ties:
                outs.append(ins[ties[position]])
            elif isinstance(v, _jax.Literal):
                outs.append((0, PartitionSpec()))
            elif v in parts.makers:
                stage = parts.makers[v]
                number = programs[stage].outcomes.index(v)
                aval = plans[stage].traced.out_avals[number]
                outs.append((stage, plans[stage]._specs([plans[stage].output_layouts[number]], [aval])[0]))
            else:
                outs.append(ins[jaxpr.invars.index(v)])
        return ins, outs

    @cached_property
    def in_specs(self) -> Any:
        """PartitionSpecs, each on the sub-mesh of a stage: a tuple like the positional arguments (a pair with the keyword
        arguments' dict, if any)."""
        args, kwargs = self.traced.unflatten_inputs([spec for _, spec in self.places[0]])
        return (args, kwargs) if kwargs else args

    @cached_property
    def out_specs(self) -> Any:
        """PartitionSpecs, each on the sub-mesh of a stage, structured like the result."""
        return self.traced.unflatten_outputs([spec for _, spec in self.places[1]])

    def partition_spec_of(self, position: int) -> PartitionSpec:
        """The spec of one flat input, on the sub-mesh of the stage where it lies."""
        return self.places[0][position][1]

    def _on(self, place: tuple[int, PartitionSpec]) -> NamedSharding:
        return NamedSharding(stage_mesh(self.mesh, self.staged.axis, place[0]), place[1])

    def input_sharding(self, position: int) -> NamedSharding:
        """Where one flat input lies."""
        return self._on(self.places[0][position])

    @property
    def in_shardings(self) -> Any:
        """`in_specs` as `NamedSharding`s, each on the devices of the stage where it lies."""
        args, kwargs = self.traced.unflatten_inputs([self._on(place) for place in self.places[0]])
        return (args, kwargs) if kwargs else args

    @property
    def out_shardings(self) -> Any:
        """`out_specs` as `NamedSharding`s, each on the devices of the stage where it lies."""
        return self.traced.unflatten_outputs([self._on(place) for place in self.places[1]])

    # ---- cost ------------------------------------------------------------------------------------------------------

    @cached_property
    def seconds(self) -> float:
        """Modelled time of one call, in seconds."""
        return self.staged.seconds

    @property
    def cost(self) -> sympy.Expr:
        """Seconds of one call in symbols, M_micro for the micro-batches: the slowest stage M_micro - 1 times, every stage once,
        and the longest of what runs once. Which stage is the slowest is that of these sizes."""
        return self._symbolic[0]

    @cached_property
    def _symbolic(self) -> tuple[sympy.Expr, dict[Any, float]]:
        import sympy

        staged, values = self.staged, dict[Any, float]()
        count = sympy.Symbol("M_micro", positive=True)
        values[count] = staged.microbatches
        g, latency = (sympy.Symbol(f"{kind}_{staged.axis}", positive=True) for kind in "gl")
        values.update(zip((g, latency), staged.link, strict=True))
        times, once = [], []
        for stage, plan in enumerate(staged.plans):
            inside, (rows, arrays, finals, last_arrays) = staged.inside(stage), staged.sent(stage)
            part = 1 / staged.microbatches
            of_rows = symbolic_cost(plan.modelled, plan.choices, plan.names, lambda c, i=inside, p=part: p if c in i else 0.0)
            of_rest = symbolic_cost(plan.modelled, plan.choices, plan.names, lambda c, i=inside: 0.0 if c in i else 1.0)
            times.append(_merged(of_rows, values, stage) + sympy.Float(rows) * g + arrays * latency)
            once.append(_merged(of_rest, values, stage) + sympy.Float(finals) * g + last_arrays * latency)
        each, last = staged.times()
        most, slowest = once[last.index(max(last))], times[each.index(max(each))]
        return most + sympy.Add(*times) + (count - 1) * slowest, values

    @property
    def symbol_values(self) -> dict[Any, float]:
        """The value of each symbol of `cost`. A dimension that has different extents on stages has a symbol for each."""
        return dict(self._symbolic[1])

    @cached_property
    def wire_bytes(self) -> dict[str, float]:
        """Bytes sent per device and call, per mesh axis, on the stage that sends most along it."""
        staged = self.staged
        found = {axis: max([plan.wire_bytes[axis] for plan in staged.plans]) for axis in self.axis_names}
        sent = [staged.sent(stage) for stage in range(len(staged.plans))]
        return {**found, staged.axis: max([rows * staged.microbatches + last for rows, _, last, _ in sent])}

    @property
    def exchanges(self) -> tuple[PlannedExchange, ...]:
        """Every collective of one call, of all stages; what stages hand each other is no collective."""
        return tuple([exchange for plan in self.staged.plans for exchange in plan.exchanges])

    def fits(self, nbytes: float) -> bool:
        """Whether `peak_bytes`, of the stage that takes most, is no more than that."""
        return self.peak_bytes <= nbytes

    @property
    def peak_bytes(self) -> float:
        """Modelled peak of live bytes per device, of the stage that takes most."""
        return max(self.staged.peaks)

    # ---- running ---------------------------------------------------------------------------------------------------

    def _function(self, static: dict[int | str, Any], donate: Sequence[int]) -> PlannedFunction:
        return StagedFunction(self, static, donate)

    def audit(self, topology: str | None = None) -> PlanAudit:
        """What was predicted beside what XLA compiles, part by part of every stage; runs nothing. Bytes sent are those of a
        device of each stage, added up; the peak is that of the stage that has most. Raises ValueError for a topology: stages
        are compiled for the devices of the plan's mesh."""
        if topology is not None or not isinstance(self.mesh, Mesh):
            raise ValueError(
                "stages on sub-meshes are compiled for the devices of the plan's mesh: audit plan.replan(mesh=...) with a mesh "
                "of devices, without topology="
            )
        donated = [position for position, flag in enumerate(self.traced.donated) if flag]
        function, trips, staged = StagedFunction(self, {}, donated), self.request.while_trips, self.staged
        sides = []
        for number, (plan, stage) in enumerate(zip(staged.plans, function.compiled(), strict=True)):
            audits = [(audit(part.program, mesh=plan.mesh, while_trips=trips), part.times) for part in stage.parts]
            m, (rows, _, last, _) = staged.microbatches, staged.sent(number)
            sent = rows * m + last, stage.sent[0] * m + stage.sent[1]
            peaks = staged.peaks[number], stage.held.peak(number, len(staged.plans), m)
            sides.append(StageSides(plan, audits, sent, peaks))
        rounded = bool(find_machine(None, self.mesh).matmul_reads)
        return compare_stages(self.traced.name, staged.axis, self.axis_sizes, sides, staged.microbatches, rounded)

    def _explaining(self, path_or_line: str) -> Plan:
        """The plan of the one stage that has an input, or operators of a line, to be explained."""
        found = []
        for number, plan in enumerate(self.staged.plans):
            if re.search(r":\d+$", path_or_line):
                has = any(plan.source(op).endswith(path_or_line) for op in plan.modelled.graph.operators)
            else:
                has = has_inputs(plan.traced, path_or_line)
            found += [number] if has else []
        if len(found) > 1:
            raise ValueError(
                f"explain: stages {', '.join(map(str, found))} have {path_or_line!r}: ask "
                "plan.stage_plans[number].explain(...) of one of them"
            )
        if not found:
            raise ValueError(
                f"explain: no stage has {path_or_line!r}: give an input by path, prefix or glob, as print(plan) shows them, or a "
                'source line such as "model.py:41"'
            )
        return self.staged.plans[found[0]]

    def __str__(self) -> str:
        return describe_stages(self)

    regimes = _refused("divided into regimes")
    to_html = _refused("drawn")
    save_html = _refused("drawn")
    plot_memory = _refused("drawn")

    @cached_property
    def memory(self) -> NoReturn:
        """Raises ValueError: what lives when is asked of the plan of one stage."""
        _refused("taken apart byte by byte")(self)

    @cached_property
    def ledger(self) -> NoReturn:
        """Raises ValueError: what lives when is asked of the plan of one stage."""
        _refused("taken apart byte by byte")(self)

    @property
    def peak(self) -> NoReturn:
        """Raises ValueError: bytes in symbols are asked of the plan of one stage."""
        _refused("written in symbols of its memory")(self)

    def _repr_html_(self) -> str:
        """For notebooks: what `print(plan)` says."""
        return f"<pre>{self}</pre>"


def _merged(found: tuple[sympy.Expr, dict[Any, float]], values: dict[Any, float], stage: int) -> Any:
    """A stage's expression, whose symbols that mean something else on another stage get its number; `values` grows."""
    import sympy

    expression, own = found
    changed: dict[Any, Any] = {}
    for symbol, value in own.items():
        if values.setdefault(symbol, value) != value:
            changed[symbol] = sympy.Symbol(f"{symbol.name}_stage{stage}", positive=True)
            values[changed[symbol]] = value
    return expression.xreplace(changed)


class StagedFunction(PlannedFunction):
    """A function whose stages run on sub-meshes, each part compiled on first use. Python hands micro-batches from stage to stage;
    so it is no single program: it is lowered part by part, and cannot be traced inside of another one."""

    def __init__(self, plan: OnStages, static: dict[int | str, Any], donate: Sequence[int]) -> None:
        if not isinstance(plan.mesh, Mesh):
            raise ValueError("this plan was made for an AbstractMesh, and has no devices to run on: use plan.replan(mesh=...)")
        if len({device.process_index for device in plan.mesh.devices.flat}) > 1:
            raise ValueError(
                "stages of unlike layers are run by one process, and the devices of this mesh belong to several: plan with "
                "pipeline=None, or put the layers into a jax.lax.scan, whose stages run across processes"
            )
        self.plan, self._static, self._donate = plan, static, frozenset(donate)
        staged = plan.staged
        self._run = StagedRun(staged.parts, staged.programs, staged.plans, self._donate)
        self._ins = self._run.in_shardings
        self._outs = jax.tree.leaves(plan.out_shardings)
        self.__name__ = plan.traced.name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = self._flatten(args, kwargs)
        if any(isinstance(leaf, _jax.Tracer) for leaf in leaves):
            self._refuse("traced inside of another function")
        placed = [
            self._place(leaf, sharding, position in self._donate)
            for position, (leaf, sharding) in enumerate(zip(leaves, self._ins, strict=True))
        ]
        outs = [jax.device_put(value, place) for value, place in zip(self._run(placed), self._outs, strict=True)]
        return self.plan.traced.unflatten_outputs(outs)

    def compiled(self) -> list[CompiledStage]:
        """Every stage, compiled part by part for the shapes that were planned; nothing is run."""
        return compiled_stages(self._run)

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"{self.plan.traced.name} runs in stages on sub-meshes of their own, which is no single program, and cannot be {what}"
            ": call it by itself, or plan with pipeline=None"
        )

    def lower(self, *args: Any, **kwargs: Any) -> LoweredStages:
        """Every part of every stage, lowered (and compiled, as that tells where the next part's arguments lie); nothing is run.
        Arguments are arrays or shapes, as they were planned for."""
        self._flatten(args, kwargs, shapes=True)
        return self.lower_planned()

    def lower_planned(self) -> LoweredStages:
        """The same for the shapes that were planned for."""
        return LoweredStages(self.plan.traced.name, self.plan.staged.microbatches, tuple(self.compiled()))

    def on(self, mesh: Mesh) -> NoReturn:
        """Raises ValueError: stages are planned for their devices."""
        self._refuse("moved to another mesh")


def describe_stages(plan: OnStages) -> str:
    """The plan as text: what lies on each stage, and what it takes."""
    staged, pipeline = plan.staged, plan.staged.pipeline
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.axis_sizes.items())
    machine = plan.modelled.numbers.machine.name
    lines = [f"Plan for {plan.traced.name} on mesh ({mesh}), machine {machine}", ""]
    count = f"{staged.microbatches} micro-batch" + ("es" if staged.microbatches > 1 else "")
    told = f"stages of unlike layers on sub-meshes of their own, {count}, 1f1b, waiting {staged.idle:.1%}"
    lines += [f"{staged.axis} ({pipeline.stages}): {told}", ""]
    rows = []
    for stage, ((work, once), peak) in enumerate(zip(staged.work, staged.peaks, strict=True)):
        nbytes, _, _, _ = staged.sent(stage)
        ends = (*staged.parts.cuts, len(staged.parts.micro.forward) - 1)
        number = staged.parts.micro.forward[ends[stage]]
        file, line = _jax.source_line(staged.parts.micro.equations[number])
        where = f"{file.rsplit('/', 1)[-1]}:{line}" if file else ""
        shown = show_seconds(work), show_seconds(once), show_bytes(nbytes), show_bytes(peak)
        rows.append((str(stage), str(pipeline.places[stage]), where, *shown))
    header = ("stage", "operators", "up to", "per micro-batch", "once", "is sent", "peak per device")
    lines += table(header, rows, right=(1, 3, 4, 5, 6))
    inputs = []
    for position, (path, aval) in enumerate(zip(plan.traced.in_paths, plan.traced.in_avals, strict=True)):
        stage, spec = plan.places[0][position]
        shape = f"{aval.dtype}[{','.join(map(str, aval.shape))}]"
        inputs.append((path, shape, str(stage), str(spec).replace("PartitionSpec", "P")))
    lines += ["", *table(("input", "shape", "stage", "spec"), inputs, right=(2,)), ""]
    planning = sum(value for name, value in plan.stages.items() if name != "trace")
    wire = ", ".join(f"{show_bytes(value)} along {axis}" for axis, value in plan.wire_bytes.items())
    lines += [
        f"modelled step   {show_seconds(plan.seconds)}",
        f"sent            {wire}, per device and call, at most",
        f"peak memory     {show_bytes(plan.peak_bytes)} per device (modelled), on stage {staged.peaks.index(plan.peak_bytes)}",
        f"planning        {show_seconds(planning)} after {show_seconds(plan.stages.get('trace', 0.0))} of tracing",
    ]
    return "\n".join(lines)


def on_stages(plan: Plan, kind: type[Any], staged: Stagewise) -> Any:
    """A plan with its program in stages. `plan`: without a pipeline; `kind`: a class of `OnStages` and of plans."""
    fields = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
    return replace(kind(**fields, stagewise=staged), pipeline=staged.pipeline)
