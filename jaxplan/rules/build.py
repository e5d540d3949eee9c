"""How the makers of this room put a rule together: factors are added one by one, and make up dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from jaxplan.rules.nouns import Dim, Factor, Kind, Rule

_LETTERS = "ijklmnopqrstuvwxyzabcdefgh"


class Builder:
    """Collects the factors of one rule. Each method gives the dimension(s) made of the factor(s) it added."""

    def __init__(self) -> None:
        self.factors: list[Factor] = []
        self._names: set[str] = set()

    def factor(self, size: int, kind: Kind = Kind.PARALLEL, *, halo: int = 0, name: str = "") -> Dim:
        """A dimension that is one new factor; () where `size` is 1, which no axis can split."""
        if size == 1:
            return ()
        self.factors.append(Factor(self._unused(name), int(size), kind, halo))
        return (len(self.factors) - 1,)

    def factors_of(self, shape: Iterable[int], kind: Kind = Kind.PARALLEL, *, name: str = "") -> tuple[Dim, ...]:
        """One new factor per dimension of `shape`."""
        return tuple(self.factor(size, kind, name=name) for size in shape)

    def whole(self, *shapes: Sequence[int]) -> tuple[tuple[Dim, ...], ...]:
        """Dimensions of several tensors, all whole.

        The n-th dimension of one extent in one tensor and the n-th of that extent in another are taken for
        the same factor: the likeliest guess at the iteration space.
        """
        known: dict[tuple[int, int], Dim] = {}
        terminals = []
        for shape in shapes:
            dims = []
            for position, extent in enumerate(shape):
                key = (extent, list(shape[:position]).count(extent))
                if key not in known:
                    known[key] = self.factor(extent, Kind.WHOLE)
                dims.append(known[key])
            terminals.append(tuple(dims))
        return tuple(terminals)

    def give_up(self) -> None:
        """Every factor added so far becomes whole; the work stays what it is."""
        self.factors = [Factor(f.name, f.size, Kind.WHOLE) for f in self.factors]

    def rule(
        self,
        operands: Iterable[Sequence[Dim]],
        results: Iterable[Sequence[Dim]],
        *,
        flops: float = 1.0,
        fusible: bool = False,
        touched: tuple[float, ...] = (),
        apart: tuple[tuple[int, int], ...] = (),
        product: bool = False,
        rounds: bool = False,
        spatial: tuple[int, ...] = (),
        library: bool = False,
        costly: int = 0,
        adds: bool = False,
        linear: bool = False,
        scale: int = -1,
        joins: int = -1,
    ) -> Rule:
        """The finished rule."""
        return Rule(
            tuple(self.factors),
            tuple(map(tuple, operands)),
            tuple(map(tuple, results)),
            flops=flops,
            fusible=fusible,
            touched=touched,
            apart=apart,
            product=product,
            rounds=rounds,
            spatial=spatial,
            library=library,
            costly=costly,
            adds=adds,
            linear=linear,
            scale=scale,
            joins=joins,
        )

    def points(self) -> int:
        """Points of the iteration space so far, at least 1: the divisor where flops are known otherwise."""
        return max(1, math.prod(factor.size for factor in self.factors))

    def _unused(self, name: str) -> str:
        candidates = (name, *(f"{name}{i}" for i in range(2, 2 + len(self._names)))) if name else _LETTERS
        for candidate in candidates:
            if candidate not in self._names:
                break
        else:
            candidate = f"x{len(self._names)}"
        self._names.add(candidate)
        return candidate


def share(part: Sequence[int], whole: Sequence[int]) -> float:
    """The part of a tensor of shape `whole` that one of shape `part` touches, at most 1."""
    return min(1.0, math.prod(part) / max(1, math.prod(whole)))
