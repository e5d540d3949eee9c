"""Operators into clusters: what a compiler computes in one loop is laid out as one.

Walking backwards, a fusible operator joins the cluster of its readers when all of them are in one cluster, in the same
loop body, and no dimension is asked for two things at once. Every other operator is a cluster of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from jaxplan.graph.nouns import Cluster, Combine, Halo, Operator, Tensor, Terminal, Work
from jaxplan.rules import Kind, Rule

Leads = tuple[int, ...]


def fuse(tensors: list[Tensor], operators: list[Operator], outputs: list[int]) -> list[Cluster]:
    """Clusters in program order of their last member. Tensors in `outputs` leave the program."""
    readers: list[list[int]] = [[] for _ in tensors]
    for index, operator in enumerate(operators):
        for tensor in operator.operands:
            if tensor >= 0:
                readers[tensor].append(index)
    leaves = set(outputs)
    home: list[_Draft | None] = [None] * len(operators)
    drafts: list[_Draft] = []
    known: dict[int, _Digest] = {}
    for index in range(len(operators) - 1, -1, -1):
        operator = operators[index]
        digest, draft = _digest(operator.rule, known), None
        if operator.rule.fusible and len(operator.results) == 1:
            tensor = operator.results[0]
            if tensor not in leaves and readers[tensor]:
                homes = {id(home[reader]): home[reader] for reader in readers[tensor]}
                if len(homes) == 1:
                    (candidate,) = homes.values()
                    if candidate is not None and candidate.scope == operator.scope and candidate.fusible:
                        draft = candidate if candidate.join(index, operator, digest, tensors) else None
        if draft is None:
            draft = _Draft(index, operator, digest, tensors)
            drafts.append(draft)
        home[index] = draft
    needed = leaves | {t for draft in drafts for t, _ in draft.reads}
    return [draft.close(needed) for draft in reversed(drafts)]


class _Draft:
    """A cluster while operators join it."""

    __slots__ = (
        "combines", "fusible", "halos", "members", "moves", "reads", "scope", "times", "units", "work", "writes",
    )  # fmt: skip

    def __init__(self, index: int, operator: Operator, digest: _Digest, tensors: list[Tensor]) -> None:
        self.fusible = operator.rule.fusible
        self.scope, self.times = operator.scope, operator.times
        self.members: list[int] = []
        self.units: list[int] = []
        self.reads: dict[tuple[int, Leads], tuple[float, float]] = {}  # how often, which share of the bytes
        self.writes: dict[tuple[int, Leads], float] = {}  # which share of the bytes
        self.work: list[Work] = []
        self.combines: list[Combine] = []
        self.halos: list[Halo] = []
        self.moves = False
        self._take(index, operator, digest, {}, tensors)

    def join(self, index: int, operator: Operator, digest: _Digest, tensors: list[Tensor]) -> bool:
        """Take in an operator whose result only this cluster reads; False if the dimensions do not agree."""
        tensor = operator.results[0]
        wanted = [leads for read, leads in self.reads if read == tensor]
        if len(wanted) > 1:
            return False
        mapping: dict[int, int] = {}
        if wanted:  # a scalar is read without leads
            for own, mine in zip(operator.rule.result_leads[0], wanted[0], strict=True):
                if (own < 0) != (mine < 0) or (own >= 0 and mapping.setdefault(own, mine) != mine):
                    return False
            if len(set(mapping.values())) != len(mapping):
                return False
        same: list[tuple[int, int]] = []
        for slot, operand in enumerate(operator.operands):
            if operand < 0:
                continue
            for read, leads in self.reads:
                if read == operand:
                    for own, mine in zip(operator.rule.operand_leads[slot], leads, strict=True):
                        if own < 0 or mine < 0:
                            continue
                        if own not in mapping and mine not in mapping.values():
                            mapping[own] = mine
                        elif own in mapping and mapping[own] != mine:
                            same.append((mine, mapping[own]))
                    break
        if wanted:
            del self.reads[(tensor, wanted[0])]
        self._take(index, operator, digest, mapping, tensors)
        for keep, drop in same:
            self._unite(keep, drop)
        return True

    def _unite(self, keep: int, drop: int) -> None:
        """Two factors become one where one value is walked along both, unless some tensor carries both (as x x^T does)."""
        seen = [leads for _, leads in (*self.reads, *self.writes)]
        if keep == drop or any(keep in leads and drop in leads for leads in seen):
            return

        def new(leads: Leads) -> Leads:
            return tuple([keep if f == drop else f for f in leads])

        self.units[keep] = math.gcd(self.units[keep], self.units[drop])
        self.units[drop] = 0
        self.reads = {(tensor, new(leads)): seen for (tensor, leads), seen in self.reads.items()}
        self.writes = {(tensor, new(leads)): share for (tensor, leads), share in self.writes.items()}
        self.work = [replace(w, factors=frozenset(new(tuple(w.factors)))) for w in self.work]
        self.combines = [
            replace(c, result=Terminal(c.result.tensor, new(c.result.leads)), over=frozenset(new(tuple(c.over))))
            for c in self.combines
        ]
        self.halos = [
            replace(h, operand=Terminal(h.operand.tensor, new(h.operand.leads)), factor=new((h.factor,))[0]) for h in self.halos
        ]

    def _take(
        self, index: int, operator: Operator, digest: _Digest, mapping: dict[int, int], tensors: list[Tensor]
    ) -> None:
        rule, units = operator.rule, self.units
        for factor, size in digest.legal:
            if factor in mapping:
                units[mapping[factor]] = math.gcd(units[mapping[factor]], size)
            else:
                mapping[factor] = len(units)
                units.append(size)
        self.members.append(index)
        operands, count = operator.operands, len(operator.operands)
        times = operator.read_times
        mapped: list[Leads] = []
        for slot, leads in enumerate(digest.leads):
            tensor = operands[slot] if slot < count else operator.results[slot - count]
            own = tuple([mapping[f] if f >= 0 else -1 for f in leads])
            mapped.append(own)
            if tensor < 0 or not own:
                continue
            share = rule.touched[slot] if rule.touched else 1.0
            if slot < count:
                before = self.reads.get((tensor, own), (0.0, 0.0))
                self.reads[(tensor, own)] = (max(times[slot] if times else operator.times, before[0]), max(share, before[1]))
            else:
                self.writes[(tensor, own)] = share
            for extent, f, factor in zip(tensors[tensor].shape, leads, own, strict=True):
                if f >= 0 and extent != digest.sizes[f] and extent:  # strided windows: the extent must divide too
                    units[factor] = math.gcd(units[factor], extent)
        if digest.flops:
            first = next((t for t in (*operands, *operator.results) if t >= 0), -1)
            factors = frozenset([mapping[f] for f, _ in digest.legal])
            self.work.append(Work(digest.flops, factors, tensors[first].dtype if first >= 0 else "float32", (index,)))
        self.moves |= not rule.free
        if digest.partial:
            over = frozenset([mapping[f] for f in digest.partial])
            for tensor, own in zip(operator.results, mapped[count:], strict=True):
                self.combines.append(Combine(index, Terminal(tensor, own), over, digest.scatterable))
        for f, width in digest.halos:
            if operands and operands[0] >= 0 and mapping[f] in mapped[0]:
                extent = tensors[operands[0]].shape[mapped[0].index(mapping[f])]
                self.halos.append(Halo(index, Terminal(operands[0], mapped[0]), mapping[f], width, extent))

    def close(self, needed: set[int]) -> Cluster:
        """The finished cluster; only values somebody else needs are written."""
        self.members.reverse()
        return Cluster(
            members=tuple(self.members),
            units=tuple(self.units),
            reads=tuple(Terminal(t, leads) for t, leads in self.reads),
            writes=tuple(Terminal(t, leads) for t, leads in self.writes if t in needed),
            work=_merge_work(self.work),
            combines=tuple(self.combines),
            halos=tuple(self.halos),
            times=self.times,
            read_times=tuple(often for often, _ in self.reads.values()),
            read_shares=tuple(share for _, share in self.reads.values()),
            write_shares=tuple(share for (t, _), share in self.writes.items() if t in needed),
            moves_bytes=self.moves,
        )


_PARTIAL = (Kind.SUM, Kind.COMBINE)


@dataclass(frozen=True)
class _Digest:
    """What fusing needs of a rule: legal factors with sizes, all sizes, leads of operands and results, partial factors."""

    legal: tuple[tuple[int, int], ...]
    sizes: tuple[int, ...]
    leads: tuple[Leads, ...]
    partial: tuple[int, ...]
    scatterable: bool
    halos: tuple[tuple[int, int], ...]
    flops: float


def _digest(rule: Rule, known: dict[int, _Digest]) -> _Digest:
    """Rules are shared by equal equations: each is read once. `known`: by identity, which is cheaper than hashing."""
    found = known.get(id(rule))
    if found is None:
        legal = tuple((f, factor.size) for f, factor in enumerate(rule.factors) if rule.shardable[f])
        partial = tuple(f for f, _ in legal if rule.factors[f].kind in _PARTIAL)
        sums = all(rule.factors[f].kind is Kind.SUM for f in partial)
        halos = tuple((f, rule.factors[f].halo) for f, _ in legal if rule.factors[f].halo)
        sizes = tuple(factor.size for factor in rule.factors)
        leads = (*rule.operand_leads, *rule.result_leads)
        found = _Digest(legal, sizes, leads, partial, sums and not rule.fusible, halos, rule.points * rule.flops)
        known[id(rule)] = found
    return found


def _merge_work(items: list[Work]) -> tuple[Work, ...]:
    """Equal factors and dtype add up."""
    if len(items) < 2:
        return tuple(items)
    alike: dict[tuple[frozenset[int], str], list[Work]] = {}
    for item in items:
        alike.setdefault((item.factors, item.dtype), []).append(item)
    return tuple(
        Work(sum(w.flops for w in works), factors, dtype, tuple(m for w in works for m in w.members))
        for (factors, dtype), works in alike.items()
    )
