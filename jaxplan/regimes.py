"""Room `regimes`: where along one symbol of a plan's cost another plan takes over.

Candidates are the plans found at points of a range, by planning again and with nothing traced. Each has a closed-form cost; with
all symbols but one put in, that is a function of one variable, and where two of them cross is solved for. Just below and just
above, the planner is asked again: what it finds there that is cheaper joins the candidates, until nothing does.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from html import escape
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jax.sharding import AbstractMesh

from jaxplan.layout import PARTIAL
from jaxplan.machine import axis_links
from jaxplan.plan import Plan
from jaxplan.report import WIDTH, axis_roles

if TYPE_CHECKING:
    import sympy

STEPS = 6
"""How many doublings below and above the present value are looked at, unless a range is given."""
MOST_POINTS = 48
"""Plans made for one question; a boundary that is not closed in by then is given as the range that it lies in."""
NEGLIGIBLE = (0.02, 0.05, 0.1, 0.2, 0.3)
"""The share of a condition that is left out of the short form of it: the first that makes it short enough."""
SHORT = 90
"""Characters of a short form, if that can be had."""
MOST_TERMS = 12
"""Terms of a condition of which a short form is tried."""
WORTH = 0.005
"""A plan that is nowhere better by more than this share is no regime of its own."""
SAME = 1e-9
"""Relative difference of costs below which two plans are as good as one."""


class Replannable(Protocol):
    """A plan that can be derived again (`jaxplan.Plan`)."""

    def replan(self, **changes: Any) -> Any: ...


@dataclass(frozen=True)
class Crossing:
    """Where one plan takes over from another. `value`: of the symbol, where their closed-form costs are equal (the middle of
    `between`, if they are equal nowhere there); `between`: the nearest two values that can be had; `condition`: the plan below is
    the cheaper one while this holds, in all symbols, with what each maximum comes to here; `short`: the same less what is
    negligible here, common factors cancelled; `verified`: planning anew at both values found nothing cheaper than these two."""

    value: float
    between: tuple[float, float]
    condition: sympy.Expr
    short: str
    solved: bool
    verified: bool


@dataclass(frozen=True)
class Regime:
    """A range of the symbol, both ends included, in which one plan is the best that was found. `summary`: what its axes do;
    `seconds_at_low`: what it costs at the low end."""

    low: float
    high: float
    plan: Plan
    summary: str
    seconds_at_low: float


@dataclass(frozen=True)
class Regimes:
    """What `plan.regimes` found along `symbol`; prints as text. `regimes`: ranges of it, in order; one of `crossings` lies
    between each and the next. `now`: the value of the symbol in the plan that was asked; `points`: how many plans were made;
    `refused`: values that could not be planned, and why."""

    symbol: str
    now: float
    regimes: tuple[Regime, ...]
    crossings: tuple[Crossing, ...]
    points: int
    refused: Mapping[float, str]

    @property
    def here(self) -> Regime:
        """The one that the plan that was asked is in."""
        return next((r for r in self.regimes if r.low <= self.now <= r.high), self.regimes[-1])

    def _repr_html_(self) -> str:
        """For notebooks."""
        return f"<pre>{escape(str(self))}</pre>"

    def __str__(self) -> str:
        lines = [f"Regimes along {self.symbol}, now {_show(self.now)}", ""]
        for number, regime in enumerate(self.regimes):
            span = _show(regime.low) if regime.low == regime.high else f"{_show(regime.low)} to {_show(regime.high)}"
            here = "  (here)" if regime is self.here else ""
            lines += [f"{self.symbol} = {span}{here}"]
            lines += textwrap.wrap(regime.summary, WIDTH, initial_indent="  ", subsequent_indent="    ")
            if number < len(self.crossings):
                lines += self._crossing(self.crossings[number])
        lines += [f"not planned     {self.symbol} = {_show(value)}: {why}" for value, why in self.refused.items()]
        left_out = f"plans that gain less than {WORTH:.1%} left out"
        lines += ["", f"{self.points} plans, from one trace; {left_out}; memory and pipelines apart; all modelled"]
        return "\n".join(lines)

    def _crossing(self, crossing: Crossing) -> list[str]:
        low, high = map(_show, crossing.between)
        if not crossing.solved:
            told = "what the mesh divides, the links it has, or the search decides; costs do not cross there"
            return [f"    then, from {self.symbol} = {high} on: {told}", ""]
        sure = "" if crossing.verified else " (not closed in)"
        lines = [f"    until {self.symbol} = {crossing.value:.6g}, between {low} and {high}{sure}: while about"]
        return [*lines, *textwrap.wrap(crossing.short, WIDTH, initial_indent="      ", subsequent_indent="        "), ""]

    def to_json(self) -> dict[str, Any]:
        """All of it for a machine to read, less the plans."""
        return {
            "symbol": self.symbol, "now": self.now, "points": self.points,
            "regimes": [
                {"low": r.low, "high": r.high, "plan": r.summary, "seconds_at_low": r.seconds_at_low}
                for r in self.regimes
            ],
            "crossings": [
                {
                    "value": c.value, "between": list(c.between), "condition": f"{c.condition} < 0", "about": c.short,
                    "solved": c.solved, "verified": c.verified,
                }
                for c in self.crossings
            ],
            "refused": {str(value): why for value, why in self.refused.items()},
        }  # fmt: skip


def _show(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"


@dataclass(frozen=True)
class _Line:
    """A symbol that plans can be made along. `values`: those to begin with, of a range; `near`: the nearest below and above a
    value that can be had; `plan_at`: the plan at a value."""

    name: str
    now: float
    values: Callable[[float, float], list[float]]
    near: Callable[[float], tuple[float, float]]
    plan_at: Callable[[float], Plan]


def regimes(
    plan: Plan, replannable: Replannable, symbol: str, low: float | None = None, high: float | None = None
) -> Regimes:
    """Where along `symbol` another plan takes over, from `low` to `high` (six doublings either way, if not given).

    `symbol`: as it stands in `plan.cost`: a dimension ("B"), the devices of a mesh axis ("n_x"), or the seconds per byte of its
    link ("g_x"). ValueError for another, or for a dimension that cannot be given other sizes from the trace.
    """
    if not isinstance(symbol, str):
        raise TypeError(f"symbol must be a name such as 'B', 'n_x' or 'g_x', got {symbol!r}")
    line = _line(plan, replannable, symbol)
    low = line.now / 2**STEPS if low is None else low
    high = line.now * 2**STEPS if high is None else high
    if not 0 < low < high < math.inf:
        raise ValueError(f"the range of {symbol} must go from a positive number to a larger one, got {low} to {high}")
    return _Search(line, plan).run(line.values(low, high))


def _line(plan: Plan, replannable: Replannable, symbol: str) -> _Line:
    request = {"memory_budget": math.inf, "certify": False, "pipeline": None, "microbatches": None}
    machine, sizes = plan.modelled.numbers.machine, plan.axis_sizes
    kind, _, axis = symbol.partition("_")
    if kind == "n" and axis in sizes:

        def on_mesh(value: float) -> Plan:
            shape = {**sizes, axis: int(value)}
            mesh = AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=plan.mesh.axis_types)
            return replannable.replan(mesh=mesh, machine=machine, **request)

        def doubled(value: float) -> tuple[float, float]:
            below = 2 ** math.floor(math.log2(value))
            return float(below), float(2 * below)

        return _Line(symbol, sizes[axis], lambda a, b: _powers(max(2, a), b, sizes[axis]), doubled, on_mesh)
    if kind == "g" and axis in sizes:
        link = axis_links(machine, sizes)[axis]

        def on_link(value: float) -> Plan:
            slower = machine.with_axis(axis, link.slower(value / link.seconds_per_byte))
            return replannable.replan(machine=slower, **request)

        return _Line(symbol, link.seconds_per_byte, _doublings(link.seconds_per_byte), lambda v: (v * 0.999, v * 1.001), on_link)
    origin = getattr(replannable, "origin", None)
    if origin is None or symbol not in origin.extents:
        names = sorted(origin.extents) if origin is not None else []
        there = [*names, *(f"n_{a}" for a in sizes), *(f"g_{a}" for a in sizes)]
        raise ValueError(f"regimes cannot be looked for along {symbol!r}; along {', '.join(there)} they can")
    now = next(iter(origin.extents[symbol].values()))
    now = dict(getattr(plan.request, "sizes", {})).get(symbol, now)
    grain = math.gcd(now, math.prod(sizes.values())) or 1

    def at_size(value: float) -> Plan:
        return replannable.replan(sizes={symbol: int(value)}, **request)

    def grains(value: float) -> tuple[float, float]:
        below = max(grain, math.floor(value / grain) * grain)
        return float(below), float(below + grain)

    def multiples(a: float, b: float) -> list[float]:
        return sorted({float(max(grain, round(v / grain) * grain)) for v in _doublings(now)(a, b)} - {1.0})

    return _Line(symbol, now, multiples, grains, at_size)


def _doublings(now: float) -> Callable[[float, float], list[float]]:
    """The values now * 2**k within a range, and its ends."""

    def values(low: float, high: float) -> list[float]:
        first, last = math.ceil(math.log2(low / now) - SAME), math.floor(math.log2(high / now) + SAME)
        return sorted({low, high, *(now * 2.0**k for k in range(first, last + 1))})

    return values


def _powers(low: float, high: float, now: float) -> list[float]:
    first, last = math.ceil(math.log2(low) - SAME), math.floor(math.log2(high) + SAME)
    return sorted({float(now), *(2.0**k for k in range(first, last + 1))})


class _Candidate:
    """A plan and its cost as a function of the symbol."""

    def __init__(self, plan: Plan, symbol: str) -> None:
        import sympy

        self.plan, self.cost = plan, plan.cost
        self.values = {s: v for s, v in plan.symbol_values.items() if s in plan.cost.free_symbols}
        self.variable = next((s for s in self.values if s.name == symbol), sympy.Symbol(symbol, positive=True))
        rest = [s for s in self.values if s != self.variable]
        whole = sympy.lambdify([self.variable, *rest], self.cost, "math")

        def seconds(value: float, links: Mapping[str, float]) -> float:
            return float(whole(value, *[links.get(s.name, self.values[s]) for s in rest]))

        self.seconds = seconds
        """At a value of the symbol, with links as fast as there: (value, {symbol: value})."""


def _links(plan: Plan) -> dict[str, float]:
    """The symbols of the links of a plan's mesh: which links its axes use may depend on how many devices it has."""
    found = {}
    for number, axis in enumerate(plan.axis_names):
        found[f"g_{axis}"], found[f"l_{axis}"] = plan.modelled.numbers.link(number)
    return found


class _Search:
    """The points, the plans found there, and who wins where."""

    def __init__(self, line: _Line, plan: Plan) -> None:
        self.line, self.plan = line, plan
        self.at: dict[float, Plan] = {}
        self._costs: dict[tuple[int, float], float] = {}
        self.candidates: list[_Candidate] = []
        self.refused: dict[float, str] = {}

    def sample(self, value: float) -> None:
        if value in self.at or value in self.refused:
            return
        try:
            found = self.line.plan_at(value)
        except ValueError as error:
            self.refused[value] = str(error)
            return
        self.at[value] = found
        if all(self.cost(c, value) > found.seconds * (1 + SAME) for c in self.candidates):
            self.candidates.append(_Candidate(found, self.line.name))

    def cost(self, candidate: _Candidate, value: float) -> float:
        """What a candidate costs at a point that was planned; infinite where its cuts do not divide what they cut."""
        key = id(candidate), value
        if key not in self._costs:
            there = self.at[value]
            self._costs[key] = candidate.seconds(value, _links(there)) if _divides(candidate.plan, there) else math.inf
        return self._costs[key]

    def kept(self) -> list[_Candidate]:
        """The candidates without which some point would be dearer by more than `WORTH`; the one missed least goes first."""
        kept = list(self.candidates)
        costs = {id(c): np.array([self.cost(c, value) for value in self.at]) for c in kept}
        least = np.min(list(costs.values()), axis=0)
        while len(kept) > 1:
            without = {id(c): np.max(np.min([costs[id(o)] for o in kept if o is not c], axis=0) / least) - 1 for c in kept}
            missed_least = min(kept, key=lambda c: without[id(c)])
            if without[id(missed_least)] > WORTH:
                break
            kept.remove(missed_least)
        return kept

    def run(self, values: Sequence[float]) -> Regimes:
        for value in sorted(values, key=lambda v: abs(math.log(v / self.line.now))):
            self.sample(value)
        if not self.at or (len(self.at) == 1 and self.refused):
            raise ValueError(f"no plan along {self.line.name}: {next(iter(self.refused.values()))}")
        while len(self.at) + len(self.refused) < MOST_POINTS and self._refine():
            pass
        regimes: list[Regime] = []
        crossings = []
        spans = list(self._spans())
        for number, (low, high, one) in enumerate(spans):
            regimes.append(Regime(low, high, one.plan, _summary(one.plan, self.line.name), self.cost(one, low)))
            if number + 1 < len(spans):
                crossings.append(self._crossing(high, spans[number + 1][0], one, spans[number + 1][2]))
        return Regimes(
            self.line.name, self.line.now, tuple(regimes), tuple(crossings), len(self.at), dict(sorted(self.refused.items()))
        )

    def _spans(self) -> Iterator[tuple[float, float, _Candidate]]:
        """Runs of neighbouring points with one winner."""
        points, kept = sorted(self.at), self.kept()
        best = [min(kept, key=lambda c, value=value: self.cost(c, value)) for value in points]
        start = points[0]
        for number, value in enumerate(points):
            if number + 1 == len(points) or best[number + 1] is not best[number]:
                yield start, value, best[number]
                start = points[min(number + 1, len(points) - 1)]

    def _refine(self) -> bool:
        """Look just below and above every crossing; whether that made new points."""
        known = len(self.at) + len(self.refused)
        spans = list(self._spans())
        for (_, low, one), (high, _, other) in itertools.pairwise(spans):
            root = self._root(one, other, low, high)
            middle = root if root is not None else math.sqrt(low * high)
            for value in self.line.near(middle):
                if low < value < high:
                    self.sample(value)
        return len(self.at) + len(self.refused) > known

    def _crossing(self, low: float, high: float, one: _Candidate, other: _Candidate) -> Crossing:
        root = self._root(one, other, low, high)
        value = root if root is not None else math.sqrt(low * high)
        tight = self.line.near(value)
        condition, short = _condition(one, other, value, _links(self.at[low]))
        verified = low >= tight[0] * (1 - SAME) and high <= tight[1] * (1 + SAME)
        return Crossing(value, (low, high), condition, short, root is not None, verified)

    def _root(self, one: _Candidate, other: _Candidate, low: float, high: float) -> float | None:
        """Where two costs are equal between two values; None if they are not, or if other links are used at the one than at the
        other."""
        from scipy.optimize import brentq

        links, beyond = (_links(self.at[value]) for value in (low, high))
        if {k: v for k, v in links.items() if k != self.line.name} != {k: v for k, v in beyond.items() if k != self.line.name}:
            return None

        def difference(value: float) -> float:
            return one.seconds(value, links) - other.seconds(value, links)

        if difference(low) == 0:
            return low
        if difference(low) * difference(high) > 0:
            return None
        found: Any = brentq(difference, low, high, xtol=1e-12 * high)
        return float(found)


def _divides(plan: Plan, there: Plan) -> bool:
    """Whether what a plan decides can be had where another one of the program was found, at other extents or on another mesh."""
    sizes, clusters = there.modelled.numbers.sizes, there.modelled.graph.clusters
    if len(clusters) != len(plan.modelled.graph.clusters):
        return False
    for index, cluster in enumerate(clusters):
        parts = [1] * len(cluster.units)
        for size, option in zip(sizes, plan.modelled.chosen(plan.choices, index), strict=True):
            for factor in {option.factor, option.scatter} - {-1, PARTIAL}:
                parts[factor] *= size
        if any(unit % count for unit, count in zip(cluster.units, parts, strict=True)):
            return False
    return True


def _condition(
    one: _Candidate, other: _Candidate, value: float, links: Mapping[str, float]
) -> tuple[sympy.Expr, str]:
    """The difference of two costs, which is negative while the first is cheaper, and a short form of that as text."""
    import sympy

    numbers = {s: links.get(s.name, v) for s, v in {**other.values, **one.values}.items()} | {one.variable: value}
    difference = sympy.expand(_settled(one.cost, numbers) - _settled(other.cost, numbers))
    terms = sympy.Add.make_args(difference)
    sizes = _evaluated(terms, numbers)
    order = sorted(range(len(terms)), key=lambda k: abs(sizes[k]))
    short = ""
    for share in NEGLIGIBLE:
        left, kept = 0.0, []
        for k in order:
            left += abs(sizes[k])
            if left > share * math.fsum(map(abs, sizes)):
                kept.append(k)
        if len(kept) > MOST_TERMS and share != NEGLIGIBLE[-1]:  # never short, and slow to factor
            continue
        less = sympy.Add(*[terms[k] for k in kept if sizes[k] > 0])
        more = sympy.Add(*[-terms[k] for k in kept if sizes[k] < 0])
        if less == 0 or more == 0:
            break
        short = _inequality(less, more, one.variable, numbers)
        if len(short) <= SHORT:
            break
    return difference, short or f"{sympy.factor_terms(difference)} < 0"


def _inequality(less: sympy.Expr, more: sympy.Expr, variable: sympy.Symbol, numbers: Mapping[Any, float]) -> str:
    """less < more, solved for the variable where it is linear in it, all of it being positive."""
    import sympy

    left, right = sympy.fraction(sympy.cancel(_rational(less) / _rational(more)))
    polynomial = sympy.Poly(left - right, variable)
    if polynomial.degree() == 1:
        slope, rest = polynomial.all_coeffs()
        rising = _evaluated([slope], numbers)[0] > 0
        limit = sympy.factor(sympy.cancel(-rest / slope))
        over, under = sympy.fraction(limit)
        told = str(limit)
        if limit.could_extract_minus_sign() and over.has(sympy.Add):  # (b - a)/c, not -(a - b)/c
            told = f"({sympy.expand(over)})" + (f"/({under})" if under != 1 else "")
        return f"{variable} {'<' if rising else '>'} {told}"
    return f"{sympy.factor_terms(left)} < {sympy.factor_terms(right)}"


def _rational(expr: sympy.Expr) -> sympy.Expr:
    """With short fractions for numbers that are not whole: it is about a size, and fractions cancel."""
    import sympy

    def short(number: float) -> Any:
        near = Fraction(number).limit_denominator(12)
        return sympy.Rational(near if math.isclose(near, number, rel_tol=0.01) else Fraction(f"{number:.3g}"))

    found: Any = expr.xreplace({number: short(float(number)) for number in expr.atoms(sympy.Float)})
    return found


def _evaluated(terms: Sequence[Any], numbers: Mapping[Any, float]) -> list[float]:
    import sympy

    return [float(v) for v in sympy.lambdify(list(numbers), list(terms), "math")(*numbers.values())]


def _settled(cost: sympy.Expr, numbers: Mapping[Any, float]) -> sympy.Expr:
    """A cost with every maximum and minimum replaced by the part that it comes to."""
    import sympy

    either = sympy.Max, sympy.Min
    parts = sorted({part for found in cost.atoms(*either) for part in found.args}, key=str)
    sizes = dict(zip(parts, _evaluated(parts, numbers), strict=True))

    def settle(expr: Any) -> Any:
        if isinstance(expr, either):
            best = max if isinstance(expr, sympy.Max) else min
            return settle(best(expr.args, key=lambda part: (sizes[part], str(part))))
        return expr.func(*map(settle, expr.args)) if expr.has(*either) else expr

    return settle(cost)


def _summary(plan: Plan, symbol: str) -> str:
    """What each axis does, in a line. `symbol`: what varies."""
    parts = []
    for number, (axis, size) in enumerate(plan.axis_sizes.items()):
        roles = axis_roles(plan, number)
        many = symbol if symbol == f"n_{axis}" else size
        parts.append(f"{axis} ({many}): {', '.join(roles) if roles else 'left alone'}")
    return "; ".join(parts)

