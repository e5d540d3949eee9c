"""The numbers a search asks for, whole arrays at a time: what a reshard costs per pair of choices.

Each agrees with the term-by-term prices of `price.py`, which symbols share; here they are laid out so that a search
that asks for thousands does not pay for each by itself. What a cluster costs per choice is in `clusters.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxplan.cost.exchange import Step, reshard_steps
from jaxplan.cost.numbers import Numbers
from jaxplan.cost.price import AxisOptions, Setting, sent_seconds, steps_terms, terminal_layout, write_layout
from jaxplan.layout import PARTIAL, Layout, shards
from jaxplan.problem import Asked

LARGE = 100
"""Entries of a matrix of prices, in the mean, from which on each is written out by itself."""
MOVED, SENT, GATHERED, BESIDE, PIECES = range(5)
"""What a reshard makes: a tensor in another layout at all, one that an exchange has made, one that was gathered, one that was
gathered along a dimension which is not the outermost, one that came in pieces from all others."""


def steps_rates(steps: Sequence[Step], numbers: Numbers) -> tuple[float, float]:
    """(seconds per byte, fixed seconds) of steps."""
    if not steps:
        return 0.0, 0.0
    sent, rounds = steps_terms(steps, 1.0, numbers.sizes)
    return sent_seconds(sent, {}, numbers), sent_seconds(dict.fromkeys(sent, 0.0), rounds, numbers)


class Reshards:
    """Seconds of reshards, for all edges of a problem together.

    A layout becomes a number; seconds per byte and fixed seconds between layouts are tabulated as they are asked for, and
    the bytes of a tensor only scale them.
    """

    def __init__(self, setting: Setting, numbers: Numbers, ndim: int) -> None:
        """`ndim`: the most dimensions of any tensor."""
        self.setting, self.numbers = setting, numbers
        self._base = ndim - PARTIAL  # a dimension, none, partial
        self._weights = self._base ** np.arange(setting.axes)
        self._place = np.full(self._base**setting.axes, -1, dtype=np.int64)  # from a layout's code to its row in the tables
        self._layouts: list[Layout] = []
        self._per_byte = self._fixed = np.full((0, 0), np.nan)
        self._shares = np.full((5, 0, 0), np.nan)
        self._rates: dict[tuple[int, ...], tuple[float, float]] = {}
        self._terminals: dict[tuple[int, tuple[int, ...], bool], int] = {}
        self._kept: list[AxisOptions] = []  # so that no identity is used twice
        self._codes: list[list[list[int]]] = []
        self._stacked = np.zeros((0, 0, 0), dtype=np.int64)

    def again(self, setting: Setting, numbers: Numbers) -> Reshards:
        """The same edges on a machine that differs by its links only."""
        reshards = Reshards(setting, numbers, self._base + PARTIAL)
        reshards._terminals, reshards._kept, reshards._codes = dict(self._terminals), [*self._kept], [*self._codes]
        return reshards

    def terminal(self, options: AxisOptions, leads: tuple[int, ...], written: bool) -> int:
        """Register one side of an edge: a number for `prices`. Equal options must be one object, which is kept."""
        layout = write_layout if written else terminal_layout
        key = (id(options), leads, written)
        number = self._terminals.get(key)
        if number is None:
            number = self._terminals[key] = len(self._codes)
            self._kept.append(options)
            self._codes.append([[layout(leads, (option,))[0] - PARTIAL for option in axis] for axis in options])
        return number

    def prices(self, asked: Sequence[Asked]) -> list[np.ndarray]:
        """A matrix of seconds for each (edge price, tails, heads)."""
        tails = self.numbered([price.tail for price, _, _ in asked], [rows for _, rows, _ in asked])
        heads = self.numbered([price.head for price, _, _ in asked], [rows for _, _, rows in asked])
        many, few = (np.array([len(part[i]) for part in asked]) for i in (1, 2))
        sizes = many * few
        if sizes.sum() > LARGE * len(asked):
            return self._apart(asked, tails, heads, many, few)
        first = np.cumsum(sizes) - sizes
        entry = np.arange(sizes.sum()) - np.repeat(first, sizes)
        width = np.repeat(few, sizes)
        source = tails[np.repeat(np.cumsum(many) - many, sizes) + entry // width]
        target = heads[np.repeat(np.cumsum(few) - few, sizes) + entry % width]
        per_byte = self._per_byte[source, target]
        missing = np.isnan(per_byte)
        if missing.any():
            self._tabulate(source[missing], target[missing])
            per_byte = self._per_byte[source, target]
        nbytes = np.array([price.nbytes for price, _, _ in asked])
        seconds = np.repeat(nbytes, sizes) * per_byte + self._fixed[source, target]
        ends = first.tolist()
        return [
            seconds[start : start + m * n].reshape(m, n) for start, m, n in zip(ends, many.tolist(), few.tolist(), strict=True)
        ]

    def alike(self, asked: Sequence[tuple[ReshardPrice, np.ndarray, int]]) -> list[np.ndarray]:
        """Per (edge price, rows, end), the layout, as a number, of each row of options of the tail (`end` 0) or the head (1): all
        that the price looks at."""
        found = self.numbered([price.head if end else price.tail for price, _, end in asked], [rows for _, rows, _ in asked])
        return np.split(found, np.cumsum([len(rows) for _, rows, _ in asked])[:-1])

    def _apart(
        self, asked: Sequence[Asked], tails: np.ndarray, heads: np.ndarray, many: np.ndarray, few: np.ndarray
    ) -> list[np.ndarray]:
        """The same, one matrix after the other: for large ones that is faster than all in one row."""
        sources, targets = np.split(tails, np.cumsum(many)[:-1]), np.split(heads, np.cumsum(few)[:-1])
        places = [(source[:, None], target) for source, target in zip(sources, targets, strict=True)]
        wanted = np.zeros(self._per_byte.shape, dtype=bool)
        for place in places:
            wanted[place] = True
        self._tabulate(*np.nonzero(wanted & np.isnan(self._per_byte)))
        return [price.nbytes * self._per_byte[at] + self._fixed[at] for (price, _, _), at in zip(asked, places, strict=True)]

    def numbered(self, terminals: list[int], rows: list[np.ndarray]) -> np.ndarray:
        """The table row of the layout of every row of options."""
        if len(self._stacked) < len(self._codes):
            widest = max(len(axis) for axes in self._codes for axis in axes)
            self._stacked = np.array([[axis + [0] * (widest - len(axis)) for axis in axes] for axes in self._codes])
        owner = np.repeat(terminals, [len(part) for part in rows]) if len(rows) > 1 else terminals[0]
        options = np.concatenate(rows) if len(rows) > 1 else rows[0]
        codes = np.zeros(len(options), dtype=np.int64)
        for axis, weight in enumerate(self._weights.tolist()):
            codes += weight * self._stacked[owner, axis, options[:, axis]]
        places = self._place[codes]
        if places.min(initial=0) < 0:
            for code in sorted(set(codes[places < 0].tolist())):
                self._place[code] = len(self._layouts)
                self._layouts.append(tuple(code // weight % self._base + PARTIAL for weight in self._weights.tolist()))
            grown = np.full((2 + len(self._shares), len(self._layouts), len(self._layouts)), np.nan)
            known = len(self._per_byte)
            grown[:, :known, :known] = self._per_byte, self._fixed, *self._shares
            self._per_byte, self._fixed, self._shares = grown[0], grown[1], grown[2:]
            places = self._place[codes]
        return places

    def _tabulate(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Seconds per byte and fixed ones between layouts. Which dimensions are equal is all that matters, not which they are:
        each is called by where it first stands."""
        layouts = np.array(self._layouts)
        dims = np.concatenate([layouts[sources], layouts[targets]], axis=1)
        names = np.where(dims < 0, dims, (dims[:, :, None] == dims[:, None, :]).argmax(2))
        codes = (names - PARTIAL) @ (names.shape[1] - PARTIAL) ** np.arange(names.shape[1])
        _, first, owner = np.unique(codes, return_index=True, return_inverse=True)
        rates = np.array([self._rated(tuple(row)) for row in names[first].tolist()]).reshape(-1, 2)
        self._per_byte[sources, targets], self._fixed[sources, targets] = rates[owner].T

    def _rated(self, names: tuple[int, ...]) -> tuple[float, float]:
        rates = self._rates.get(names)
        if rates is None:
            axes = self.setting.axes
            steps = reshard_steps(names[:axes], names[axes:], max(self._base + PARTIAL, 2 * axes), self.setting.order)
            rates = self._rates[names] = steps_rates(steps, self.numbers)
        return rates

    def _share(self, source: int, target: int) -> None:
        steps = reshard_steps(self._layouts[source], self._layouts[target], self._base + PARTIAL, self.setting.order)
        share = 1 / shards(self._layouts[target], self.numbers.sizes)
        kinds = {step.kind for step in steps}
        gathers = [step for step in steps if step.kind == "all_gather"]
        beside = any(step.before[0] == step.after[0] for step in gathers)
        made = (source != target, bool(kinds - {"slice"}), bool(gathers), beside, "all_to_all" in kinds)
        self._shares[:, source, target] = [share * kind for kind in made]

    def shares(self, asked: Sequence[Asked], makes: Sequence[int]) -> list[np.ndarray]:
        """For each (edge price, tails, heads), the share of a tensor that a device holds in the layout of the head; 0 where
        nothing of what `makes` says is made: `MOVED`, `SENT` and so on."""
        tails = self.numbered([price.tail for price, _, _ in asked], [rows for _, rows, _ in asked])
        heads = self.numbered([price.head for price, _, _ in asked], [rows for _, _, rows in asked])
        found, first, second = [], 0, 0
        for (_, many, few), make in zip(asked, makes, strict=True):
            source, target = tails[first : first + len(many)], heads[second : second + len(few)]
            first, second = first + len(many), second + len(few)
            place = np.ix_(source, target)
            missing = np.isnan(self._shares[make][place])
            if missing.any():
                rows, columns = np.nonzero(missing)
                for pair in set(zip(source[rows].tolist(), target[columns].tolist(), strict=True)):
                    self._share(*pair)
            found.append(self._shares[make][place])
        return found


class ReshardPrice:
    """Seconds of one reshard for rows of the writer's and the reader's option numbers."""

    def __init__(self, family: Reshards, tail: int, head: int, nbytes: float) -> None:
        """`tail`, `head`: the terminals as `family` numbers them."""
        self.family, self.tail, self.head, self.nbytes = family, tail, head, nbytes
        self.ends = (id(family), tail), (id(family), head)

    def again(self, family: Reshards) -> ReshardPrice:
        """The same reshard, of edges that were taken over by `Reshards.again`."""
        return ReshardPrice(family, self.tail, self.head, self.nbytes)

    def __call__(self, tails: np.ndarray, heads: np.ndarray) -> np.ndarray:
        return self.family.prices([(self, tails, heads)])[0]

    def alike(self, rows: np.ndarray, end: int) -> np.ndarray:
        """See `Reshards.alike`."""
        return self.family.alike([(self, rows, end)])[0]
