"""A program for micro-batches cut into parts: per stage what it prepares, forward, backward, and the update of what lies on it.

A value that is the same for all micro-batches and needs some input is prepared once per call, on every stage that reads it; one
that needs none (a constant, an iota) is made anew wherever it is read.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxplan import _jax
from jaxplan.pipeline.nouns import Kind
from jaxplan.unlike.nouns import BACKWARD, FORWARD, ONCE, PREPARE, ROWS, SAME, UPDATE, Micro, Part, Parts


def variables(equation: Any) -> list[Any]:
    """What an equation reads, literals apart."""
    return [v for v in equation.invars if not isinstance(v, _jax.Literal)]


def parts_of(micro: Micro, cuts: Sequence[int], ties: Sequence[tuple[int, int]] = ()) -> Parts:
    """The parts of a program that is cut behind the given places. `ties`: (output, input) positions of state that goes round.

    Raises ValueError for cuts that leave a stage without a place.
    """
    if list(cuts) != sorted(set(cuts)) or not all(0 <= cut < len(micro.forward) - 1 for cut in cuts):
        told = f"cuts behind {tuple(cuts)} of {len(micro.forward)} places"
        raise ValueError(f"{told}: they must ascend, and leave every stage a place")
    return _Cutting(micro, tuple(cuts), tuple(ties)).parts()


class _Cutting:
    """One program being cut."""

    def __init__(self, micro: Micro, cuts: tuple[int, ...], ties: tuple[tuple[int, int], ...]) -> None:
        self.micro, self.cuts, self.ties = micro, cuts, ties
        jaxpr = micro.jaxpr
        self.maker = {v: n for n, e in enumerate(micro.equations) if micro.kinds[n] for v in e.outvars}
        self.inputs = dict.fromkeys((*jaxpr.invars, *jaxpr.constvars))
        self.free = self._free()
        self.stage: dict[int, int] = {n: bisect.bisect_left(cuts, place) for n, place in micro.places.items()}
        self.home: dict[Any, int] = {}
        self.shared = self._shared()
        self.level: dict[int, int] = {}
        self.outputs = [v for v in jaxpr.outvars if not isinstance(v, _jax.Literal)]

    def parts(self) -> Parts:
        self._homes()
        once = self._updates()
        groups: dict[tuple[str, int, int], list[int]] = {}
        turn = set(self.micro.forward)
        for n in sorted(self.stage):
            if self.micro.kinds[n] == ROWS:
                groups.setdefault((FORWARD if n in turn else BACKWARD, self.stage[n], 0), []).append(n)
        for n in once:
            groups.setdefault((UPDATE, self.stage[n], self.level[n]), []).append(n)
        prepared = self._prepared(groups)
        for stage, values in prepared.items():
            groups[PREPARE, stage, 0] = sorted(self._closure(values))
        return self._assembled(groups, prepared)

    def _free(self) -> set[int]:
        """Equations that no input reaches."""
        found: set[int] = set()
        for n, e in enumerate(self.micro.equations):
            if self.micro.kinds[n] == SAME and all(self.maker.get(v) in found for v in variables(e)):
                found.add(n)
        return found

    def _closure(self, values: Iterable[Any]) -> set[int]:
        """The equations, all the same for all micro-batches, that make some values from inputs."""
        found: set[int] = set()
        todo = [self.maker[v] for v in values if v in self.maker]
        while todo:
            n = todo.pop()
            if n not in found:
                found.add(n)
                todo += [self.maker[v] for v in variables(self.micro.equations[n]) if v in self.maker]
        return found

    def _shared(self) -> set[int]:
        """Equations that every stage that needs them has for itself: micro-batches read from them, or they are single numbers."""
        read = [v for n in self.stage for v in variables(self.micro.equations[n])]
        kinds = self.micro.kinds
        return self._closure([v for v in read if v in self.maker and kinds[self.maker[v]] == SAME]) | self._numbers()

    def _numbers(self) -> set[int]:
        """Equations that make single numbers from single numbers (of the step count, say): cheaper made anew than sent."""
        found: set[int] = set()
        for n, e in enumerate(self.micro.equations):
            read = variables(e)
            single = self.micro.kinds[n] == SAME and all(v.aval.size == 1 for v in (*e.outvars, *read))
            if single and all(v in self.inputs or self.maker[v] in found or self.maker[v] in self.free for v in read):
                found.add(n)
        return found

    def _homes(self) -> None:
        """Where inputs lie that micro-batches read: on the first stage that does."""
        for n in sorted(self.stage, key=lambda n: self.stage[n]):
            for v in variables(self.micro.equations[n]):
                reads = [v] if v in self.inputs else []
                if v in self.maker and self.micro.kinds[self.maker[v]] == SAME:
                    reads = [w for k in self._known_closure(v) for w in variables(self.micro.equations[k]) if w in self.inputs]
                for w in reads:
                    self.home.setdefault(w, self.stage[n])

    def _known_closure(self, value: Any) -> set[int]:
        if not hasattr(self, "_closures"):
            self._closures: dict[Any, set[int]] = {}
        if value not in self._closures:
            self._closures[value] = self._closure([value])
        return self._closures[value]

    def _updates(self) -> list[int]:
        """The equations that run once at the end, in order; each is given a stage, that of the largest of what it reads, and a
        level, one more than that of what it reads from another stage."""
        micro, equations = self.micro, self.micro.equations
        asked = self._closure([v for v in self.outputs if v in self.maker and micro.kinds[self.maker[v]] == SAME])
        alone = {n for n, kind in enumerate(micro.kinds) if kind == SAME} - self.shared - self.free
        once = [n for n, kind in enumerate(micro.kinds) if kind == ONCE or n in alone or (n in asked & self.free)]
        here = set(once)
        for n in once:
            known = [(v.aval.size, -k, self._stage_of(v)) for k, v in enumerate(variables(equations[n]))]
            best = max([(size, k, s) for size, k, s in known if s is not None], default=None)
            if best is not None:
                self.stage[n] = best[2]
                self._settle(n)
        readers: dict[Any, int] = {}
        for n in reversed(once):
            if n not in self.stage:
                self.stage[n] = next((readers[v] for v in equations[n].outvars if v in readers), 0)
                self._settle(n)
            readers.update((v, self.stage[n]) for v in variables(equations[n]))
        for n in once:
            before = [self.maker[v] for v in variables(equations[n]) if self.maker.get(v) in here]
            self.level[n] = max([self.level[k] + (self.stage[k] != self.stage[n]) for k in before], default=0)
        return once

    def _stage_of(self, value: Any) -> int | None:
        if value in self.inputs:
            return self.home.get(value)
        return self.stage.get(self.maker[value])

    def _settle(self, number: int) -> None:
        for v in variables(self.micro.equations[number]):
            if v in self.inputs:
                self.home.setdefault(v, self.stage[number])

    def _prepared(self, groups: Mapping[tuple[str, int, int], Sequence[int]]) -> dict[int, list[Any]]:
        """Per stage, the values that it has to prepare."""
        found: dict[int, dict[Any, None]] = {}
        for (_, stage, _), numbers in groups.items():
            for n in numbers:
                for v in variables(self.micro.equations[n]):
                    if self.maker.get(v) in self.shared and self.maker[v] not in self.free:
                        found.setdefault(stage, {})[v] = None
        for v in self.outputs:
            known = any(v in values for values in found.values())
            if self.maker.get(v) in self.shared and self.maker[v] not in self.free and not known:
                found.setdefault(0, {})[v] = None
        return {stage: list(values) for stage, values in found.items()}

    def _assembled(
        self, groups: Mapping[tuple[str, int, int], Sequence[int]], prepared: Mapping[int, Sequence[Any]]
    ) -> Parts:
        micro, roles = self.micro, self.micro.roles
        whole = {key: sorted({*numbers, *self._constants(numbers)}) for key, numbers in groups.items()}
        asked = dict.fromkeys(self.outputs)
        reads: dict[tuple[str, int, int], list[Any]] = {}
        for key, numbers in whole.items():
            own = {v for n in numbers for v in micro.equations[n].outvars}
            found = dict.fromkeys(v for n in numbers for v in variables(micro.equations[n]) if v not in own)
            reads[key] = list(found)
            asked.update(found)
        makers: dict[Any, int] = {}
        parts = []
        for key in sorted(whole, key=self._order):
            phase, stage, level = key
            if phase == PREPARE:
                made = list(prepared[stage])
            else:
                made = [v for n in groups[key] for v in micro.equations[n].outvars if v in asked]
            makers.update((v, stage) for v in made if v not in makers)
            in_rows = phase in (FORWARD, BACKWARD)
            adds = tuple([v for v in made if in_rows and v in roles and roles[v].kind is Kind.SUM])
            puts = tuple([v for v in made if in_rows and v in self.outputs and v not in adds])
            parts.append(Part(phase, stage, level, tuple(whole[key]), tuple(reads[key]), tuple(made), adds, puts))
        homes = tuple([self.home.get(v, 0) for v in micro.jaxpr.invars])
        return Parts(micro, self.cuts, homes, makers, tuple(parts), self.ties)

    def _constants(self, numbers: Iterable[int]) -> set[int]:
        """The free equations that some equations need."""
        read = [v for n in numbers for v in variables(self.micro.equations[n]) if self.maker.get(v) in self.free]
        return self._closure(read)

    def _order(self, key: tuple[str, int, int]) -> tuple[int, int, int]:
        phase, stage, level = key
        position = (PREPARE, FORWARD, BACKWARD, UPDATE).index(phase)
        return position, level, -stage if phase == BACKWARD else stage
