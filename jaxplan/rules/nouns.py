"""The noun of this room: a `Rule` says what an operator's dimensions mean.

A rule names the iteration dimensions of an operator (its *factors*) and, for every dimension of every
operand and result, which factors it is made of, major to minor. Everything else (legal choices, flops,
bytes, exchanges, the constraint to emit) is derived from that one value, elsewhere and generically.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property


class Kind(enum.Enum):
    """What happens when a mesh axis is assigned to a factor."""

    PARALLEL = "parallel"  # in operands and results: the work splits, nothing is exchanged
    SUM = "sum"  # contracted: results are partial sums until combined (all-reduce or reduce-scatter)
    COMBINE = "combine"  # contracted by another associative operation (max, min, product, and, or): all-reduce
    HALO = "halo"  # parallel, but neighbours exchange a slab of `halo` elements of the operand
    ROLL = "roll"  # the same, in the place of as many elements of its own: a device never takes more than it has
    WHOLE = "whole"  # needs its full extent on every device: never given an axis


@dataclass(frozen=True)
class Factor:
    """One iteration dimension. `size` in elements; `halo` in operand elements exchanged per device (both
    sides).
    """

    name: str
    size: int
    kind: Kind = Kind.PARALLEL
    halo: int = 0


MOST_POINTS = 1 << 1000
"""Still a finite float, so that `points * flops` never overflows."""

Dim = tuple[int, ...]
"""The factors a dimension is made of, major to minor, as indices into `Rule.factors`.
 () where the extent is 1, or where the dimension is never to be sharded and adds no work (the vector of an
index).
"""


@dataclass(frozen=True)
class Rule:
    """Factors of one operator, and the factors of each dimension of each operand and result.

    `flops`: floating-point operations per point of the iteration space (the product of all factor sizes).
    `fusible`: the compiler computes it inside a neighbour's loop (element-wise, broadcast, reduction, ...).
    `free`: costs nothing whatever its layout (iota, constants, pseudo-random bits that are cheap to make
    anywhere).
    `known`: False where nothing is known about the primitive and its operands are gathered whole.
    `touched`: the share of each operand, then of each result, that memory really sees (a gather reads a few
    rows of its table, an update in place writes only the update); () when all of everything is.
    `apart`: pairs of factors of which only one may be given axes, because the compiler errs where both are.
    `spatial`: factors that are places in space, along which windows slide.
    `adds`: computed from parts of what it sums over, and with zeros for what has no such parts on all devices but one, it gives
    partial sums; `linear`: of sums it gives the sum of what it gives for each term; `scale`: the operand, of rank 0, by which it
    multiplies or divides them, -1 where it does not.
    `product`: a product of two arrays of at least a matrix each, work for a matrix unit; `rounds`: one of default precision: a
    machine whose matrix unit works in fewer bits rounds what it reads.
    `library`: floating-point work that a library of vector kernels does together with a reduction (`cost/library.py`).
    `costly`: 1 for what is not worth computing twice unless its last operand is a constant (a division), 2 for what never is; 3
    for what is not computed inside of its readers' loops at all (padding); else 0.
    `masked`: per operand, how often a compiler without a kernel for it stores it with all but some of it masked; () for never.
    `joins`: the dimension of the result along which it puts parts of what it reads side by side, -1 for none.
    `by_hand`: XLA gathers what it reads however that lies, so each device is given what it has (`on_shards.py`); all factors that
    may be split are parallel.
    `alone`: one device computes it, and the others get the results from it: a sum in which all other terms are zeros.
    `rounds_words`: made in rounds, between which a compiler that materialises stores so many words of 32 bits per element.
    `made_whole`: every device makes all of the result, in words of 32 bits, and takes its part of that.
    """

    factors: tuple[Factor, ...]
    operands: tuple[tuple[Dim, ...], ...]
    results: tuple[tuple[Dim, ...], ...]
    flops: float = 1.0
    fusible: bool = False
    free: bool = False
    known: bool = True
    touched: tuple[float, ...] = ()
    apart: tuple[tuple[int, int], ...] = ()
    product: bool = False
    rounds: bool = False
    spatial: tuple[int, ...] = ()
    library: bool = False
    costly: int = 0
    adds: bool = False
    linear: bool = False
    scale: int = -1
    masked: tuple[float, ...] = ()
    rounds_words: int = 0
    made_whole: bool = False
    joins: int = -1
    by_hand: bool = False
    alone: bool = False

    def __post_init__(self) -> None:
        count = len(self.factors)
        for terminal in (*self.operands, *self.results):
            used = [f for dim in terminal for f in dim]
            if any(not 0 <= f < count for f in used):
                raise ValueError(f"a dimension names a factor outside 0..{count - 1}: {terminal}")
            if len(set(used)) != len(used):
                raise ValueError(f"one tensor cannot carry the same factor twice: {terminal} in {self}")
        if self.touched and len(self.touched) != len(self.operands) + len(self.results):
            raise ValueError(f"`touched` has {len(self.touched)} shares for {self}")
        if self.by_hand and (self.fusible or any(f.kind not in (Kind.PARALLEL, Kind.WHOLE) for f in self.factors)):
            raise ValueError(f"what is computed `by_hand` is not fusible, and its factors are parallel or whole: {self}")
        if any(not (0 <= a < count and 0 <= b < count and a != b) for a, b in self.apart):
            raise ValueError(f"`apart` names a factor outside 0..{count - 1}, or one twice: {self.apart}")

    @cached_property
    def points(self) -> int:
        """Points of the iteration space: the product of the factors' sizes.

        At most `MOST_POINTS`: a barrier over a hundred tensors has a factor for every dimension of each.
        """
        return min(MOST_POINTS, math.prod(factor.size for factor in self.factors))

    @cached_property
    def shardable(self) -> tuple[bool, ...]:
        """Per factor, whether a mesh axis may ever be assigned to it.

        It must not be whole, must have more than one element, and must lead (be the major factor of more
        than one element of) every dimension in which it occurs: only then is its block a contiguous shard.
        """
        legal = [f.kind is not Kind.WHOLE and f.size > 1 for f in self.factors]
        for terminal in (*self.operands, *self.results):
            for dim in terminal:
                wide = [f for f in dim if self.factors[f].size > 1]
                for f in wide[1:]:
                    legal[f] = False
        return tuple(legal)

    @cached_property
    def operand_leads(self) -> tuple[tuple[int, ...], ...]:
        """Per operand and dimension, the factor that shards it, or -1."""
        return tuple(self._leads(terminal) for terminal in self.operands)

    @cached_property
    def result_leads(self) -> tuple[tuple[int, ...], ...]:
        """Per result and dimension, the factor that shards it, or -1."""
        return tuple(self._leads(terminal) for terminal in self.results)

    def _leads(self, terminal: tuple[Dim, ...]) -> tuple[int, ...]:
        leads = []
        for dim in terminal:
            wide = [f for f in dim if self.factors[f].size > 1]
            leads.append(wide[0] if wide and self.shardable[wide[0]] else -1)
        return tuple(leads)

    def __str__(self) -> str:
        def show(terminal: tuple[Dim, ...]) -> str:
            words = []
            for dim in terminal:
                names = [self.factors[f].name for f in dim]
                words.append(names[0] if len(names) == 1 else "(" + " ".join(names) + ")" if names else "1")
            return " ".join(words)

        kinds = "; ".join(
            f"{f.name}: {f.kind.value}" + (f"({f.halo})" if f.halo else "") for f in self.factors if f.kind is not Kind.PARALLEL
        )
        kinds = "; ".join(filter(None, (kinds, "by hand" if self.by_hand else "")))
        line = ", ".join(map(show, self.operands)) + " -> " + ", ".join(map(show, self.results))
        return f"{line}    {kinds}" if kinds else line


def einsum_rule(
    notation: str,
    shapes: Sequence[Sequence[int]],
    kinds: Mapping[str, Kind | tuple[Kind, int]] | None = None,
    *,
    flops: float = 1.0,
    fusible: bool = False,
    free: bool = False,
) -> Rule:
    """A rule from the written form, e.g. `einsum_rule("b m k, b k n -> b m n", shapes, {"k": Kind.SUM},
    flops=2)`.

    `shapes`: the shapes of all operands, then of all results. A dimension is a name, `1` (extent one, or not
    to be sharded: no factor), or `(h d)` for merged factors, major to minor; sizes of merged factors must be
    found elsewhere in the notation, one of a group may be left to division. A factor's size is the extent of
    the *result* dimension where the two differ (strided windows). `kinds`: factors that are not parallel,
    `(Kind.HALO, 2)` for an exchanged slab of two elements.
    """
    left, arrow, right = notation.partition("->")
    if not arrow:
        raise ValueError(f"rule notation lacks '->': {notation!r}")
    terminals = [_tokens(text) for side in (left, right) if side.strip() or side is right for text in side.split(",")]
    if len(terminals) != len(shapes):
        raise ValueError(f"{notation!r} writes {len(terminals)} operands and results, but got {len(shapes)} shapes")
    sizes: dict[str, int] = {}
    groups: list[tuple[tuple[str, ...], int]] = []
    for words, shape in zip(terminals, shapes, strict=True):
        if len(words) != len(shape):
            raise ValueError(f"{notation!r}: {words} has {len(words)} dimensions, the tensor has shape {tuple(shape)}")
        for word, extent in zip(words, shape, strict=True):
            if len(word) == 1:
                sizes[word[0]] = int(extent)
            elif word:
                groups.append((word, int(extent)))
    for word, extent in groups:
        missing = [name for name in word if name not in sizes]
        if len(missing) > 1:
            raise ValueError(f"{notation!r}: the sizes of {missing} cannot be told apart")
        if missing:
            sizes[missing[0]] = extent // max(1, math.prod(sizes[n] for n in word if n in sizes))
    names = list(sizes)
    index = {name: i for i, name in enumerate(names)}
    factors = []
    for name in names:
        kind = (kinds or {}).get(name, Kind.PARALLEL)
        kind, halo = kind if isinstance(kind, tuple) else (kind, 0)
        factors.append(Factor(name, sizes[name], kind, halo))
    dims = [tuple(tuple(index[name] for name in word) for word in words) for words in terminals]
    operand_count = len(left.split(",")) if left.strip() else 0
    return Rule(
        tuple(factors),
        tuple(dims[:operand_count]),
        tuple(dims[operand_count:]),
        flops=flops,
        fusible=fusible,
        free=free,
    )


def _tokens(text: str) -> list[tuple[str, ...]]:
    """The words of one tensor: `a (b c) 1` -> [("a",), ("b", "c"), ()]."""
    words: list[tuple[str, ...]] = []
    for match in re.finditer(r"\(([^)]*)\)|(\S+)", text):
        group, word = match.groups()
        words.append(tuple(group.split()) if group is not None else () if word == "1" else (word,))
    return words
