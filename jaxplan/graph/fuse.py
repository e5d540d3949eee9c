"""Operators into clusters: what a compiler computes in one loop is laid out as one.

Walking backwards, a fusible operator joins the cluster of its readers when all of them are in one cluster, in the same
loop body, and no dimension is asked for two things at once. Every other operator is a cluster of its own. An addition of sums
(`sums.py`) is one, without its readers: what it reads may be partial sums.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from jaxplan.graph.nouns import Cluster, Combine, Halo, Operator, Path, Tensor, Terminal, Work
from jaxplan.graph.sums import find_sums
from jaxplan.layout import PARTIAL
from jaxplan.rules import Kind

Leads = tuple[int, ...]


def fuse(
    tensors: list[Tensor], operators: list[Operator], outputs: list[int], sealed: Collection[Path] = ()
) -> list[Cluster]:
    """Clusters in program order of their last member. Tensors in `outputs` leave the program; `sealed`: see `find_sums`."""
    readers: list[list[int]] = [[] for _ in tensors]
    for index, operator in enumerate(operators):
        for tensor in operator.operands:
            if tensor >= 0:
                readers[tensor].append(index)
    leaves = set(outputs)
    sources = _Sources(operators, readers, leaves)
    home: list[_Draft | None] = [None] * len(operators)
    sums = find_sums(tensors, operators, readers, leaves, sealed)
    drafts: list[_Draft] = []
    forms = _Forms(tensors)
    for index in range(len(operators) - 1, -1, -1):
        operator, root = operators[index], sums.roots.get(index, -1)
        draft = candidate = None
        if operator.rule.fusible and len(operator.results) == 1 and operator.results[0] not in leaves:
            candidate = _only_reader(operator, readers[operator.results[0]], home)
        if root == index or index in sums.loops:
            draft = forms.start(index, operator, "carries" if root != index else "apart" if candidate is None else "adds")
            drafts.append(draft)
        elif candidate is not None and (not candidate.form.adds or candidate.members[0] == root):
            draft = candidate if forms.join(candidate, index, operator, sources) else None
        if draft is None:
            draft = forms.start(index, operator)
            drafts.append(draft)
        home[index] = draft
    asked = [operator.results for operator in operators if operator.asked is not None]
    needed = leaves.union(*asked, *[draft.reads() for draft in drafts])
    left = {index for index in sums.terms if _added(home[readers[operators[index].results[0]][0]])}.union(sums.loops.values())
    clusters = [forms.close(draft, needed, draft.members[0] in left) for draft in reversed(drafts)]
    return _with_sent(clusters, operators)


def _with_sent(clusters: list[Cluster], operators: list[Operator]) -> list[Cluster]:
    """What regions sharded by hand send is of the clusters of their results, which are then like no others."""
    sending = {index for index, operator in enumerate(operators) if operator.sent}
    if not sending:
        return clusters
    return [
        cluster._replace(sent=sent, alike=-1)
        if (sent := tuple([one for m in cluster.members if m in sending for one in operators[m].sent]))
        else cluster
        for cluster in clusters
    ]


def _only_reader(operator: Operator, near: list[int], home: list[_Draft | None]) -> _Draft | None:
    """The one cluster that reads what an operator makes, if it could be a part of that. `near`: who reads it."""
    first = home[near[0]] if near else None
    if first is None or first.scope != operator.scope or not first.form.fusible:
        return None
    for reader in near:
        if home[reader] is not first:
            return None
    return first if first.form.times == operator.times or max(operator.operands, default=-1) < 0 else None


def _added(draft: _Draft | None) -> bool:
    return draft is not None and bool(draft.form.adds)


class _Sources:
    """Which tensors a value is computed from by what will be fused with its reader."""

    def __init__(self, operators: list[Operator], readers: list[list[int]], leaves: set[int]) -> None:
        self.readers, self.leaves = readers, leaves
        self.producer = {t: op for op in operators if op.rule.fusible and len(op.results) == 1 for t in op.results}
        self.known: dict[int, frozenset[int]] = {}

    def of(self, tensor: int) -> frozenset[int]:
        """The tensor itself, or where a single fusible operator reads others to make it for a single reader, theirs."""
        waiting = [tensor]
        while waiting:
            one = waiting[-1]
            producer = self.producer.get(one) if one not in self.known else None
            operands = [t for t in producer.operands if t >= 0] if producer is not None else []
            if one in self.known:
                waiting.pop()
            elif not operands or len(self.readers[one]) != 1 or one in self.leaves:
                self.known[one] = frozenset((one,))
            elif unknown := [t for t in operands if t not in self.known]:
                waiting += unknown
            else:
                self.known[one] = frozenset().union(*[self.known[t] for t in operands])
        return self.known[tensor]

    def shared(self, some: Iterable[int], others: Iterable[int]) -> bool:
        """Whether any of some tensors and any of others are computed from one."""
        mine = set().union(*[self.of(tensor) for tensor in some])
        return not all(mine.isdisjoint(self.of(tensor)) for tensor in others)


class _Draft:
    """A cluster while operators join it: a form, and which tensors and operators it is made of here, in order of appearance."""

    __slots__ = ("form", "members", "places", "scope", "tensors")

    def __init__(self, form: _Form, scope: int) -> None:
        self.form, self.scope = form, scope
        self.members: list[int] = []
        self.tensors: list[int] = []
        self.places: dict[int, int] = {}

    def reads(self) -> list[int]:
        """The tensors read so far."""
        return [self.tensors[place] for place in self.form.reads]

    def grow(self, form: _Form, member: int) -> None:
        """Become another form by one more operator."""
        self.form = form
        self.members.append(member)

    def forget(self, count: int) -> None:
        """Keep only the first tensors."""
        for tensor in self.tensors[count:]:
            del self.places[tensor]
        del self.tensors[count:]


class _Forms:
    """All that clusters have been made of so far. The layers of a model are made alike: what one step of the making comes
    to is worked out once, and looked up after that."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        kinds: dict[Tensor, int] = {}
        self.kinds = [kinds.setdefault(tensor, len(kinds)) for tensor in tensors]
        self.digests: dict[int, _Digest] = {}
        self.empty = {adds: _Form(adds) for adds in ("", "adds", "apart", "carries")}
        self.closed: dict[tuple[int, ...], tuple[int, Cluster]] = {}

    def start(self, index: int, operator: Operator, adds: str = "") -> _Draft:
        """A cluster of one operator. `adds`: what makes the total of an addition of sums; "apart" where nobody could compute it
        together with what reads it, "carries" where it goes round in a loop."""
        draft = _Draft(self.empty[adds], operator.scope)
        draft.grow(self._step(draft, operator, (*operator.operands, *operator.results)).form, index)
        return draft

    def join(self, draft: _Draft, index: int, operator: Operator, sources: _Sources) -> bool:
        """Take in an operator whose result only this cluster reads; False if the dimensions do not agree."""
        count = len(draft.tensors)
        step = self._step(draft, operator, (*operator.operands, operator.results[0]))
        fits = step.fits
        if fits and step.asks:  # of two unrelated sums an axis could split only one
            tensor, operands = operator.results[0], [t for t in operator.operands if t >= 0]
            fits = sources.shared([read for read in draft.reads() if read != tensor], operands)
        if fits:
            draft.grow(step.form, index)
        else:
            draft.forget(count)
        return fits

    def _step(self, draft: _Draft, operator: Operator, touched: tuple[int, ...]) -> _Step:
        """What becomes of a draft's form by an operator. Tensors that the draft has not seen are given places."""
        places, names, kinds = draft.places, draft.tensors, self.kinds
        key: list[object] = [id(operator.rule), operator.times, operator.read_times]
        for tensor in touched:
            if tensor < 0:
                key.append(-1)
            elif tensor in places:
                key.append(places[tensor])
            else:
                places[tensor] = len(names)
                names.append(tensor)
                key.append(-2 - kinds[tensor])  # its place is the next one
        steps, form = draft.form.steps, draft.form
        known = tuple(key)
        step = steps.get(known)
        if step is None:
            digest = _digest(operator, self.tensors, self.digests)
            operands, results = operator.operands, touched[len(operator.operands) :]
            alike = operator._replace(
                operands=tuple([places.get(tensor, -1) for tensor in operands]),
                results=tuple([places[tensor] for tensor in results]),
            )  # fmt: skip
            step = steps[known] = form.after(alike, digest, [self.tensors[t] for t in names])
        return step

    def close(self, draft: _Draft, needed: set[int], left: bool) -> Cluster:
        """The finished cluster; only values somebody else needs are written. `left`: its sum may be left partial."""
        form, names, members = draft.form, draft.tensors, draft.members
        key = (id(form), left, *[names[place] in needed for place, _ in form.writes])
        found = self.closed.get(key)
        if found is None:
            found = self.closed[key] = (len(self.closed), form.close(key[2:], left))
        number, model = found
        combines, halos, slots = model.combines, model.halos, model.slots
        if combines:
            combines = tuple([
                Combine(members[c.operator], Terminal(names[c.result.tensor], c.result.leads), c.over, c.scatterable, c.left)
                for c in combines
            ])  # fmt: skip
        if halos:
            halos = tuple([
                replace(h, operator=members[h.operator], operand=Terminal(names[h.operand.tensor], h.operand.leads))
                for h in halos
            ])  # fmt: skip
        if slots:
            slots = tuple([(members[index], slot, read) for index, slot, read in slots])
        reads = tuple([Terminal(names[place], leads) for place, leads in model.reads])
        writes = tuple([Terminal(names[place], leads) for place, leads in model.writes])
        inner = tuple([Terminal(names[place], leads) for place, leads in model.inner])
        work = tuple([Work(w.flops, w.factors, w.dtype, tuple([members[i] for i in w.members])) for w in model.work])
        return Cluster(
            tuple(members[::-1]), model.units, reads, writes, work, combines, halos, model.times, model.read_times,
            model.read_shares, model.write_shares, model.moves_bytes, model.apart, number, (), slots, inner,
        )  # fmt: skip


class _Form:
    """What a cluster is made of, its tensors and operators numbered as they came. Never changed once others may start from it."""

    __slots__ = (
        "adds", "apart", "combines", "count", "fusible", "halos", "inner", "moves", "reads", "slots", "steps", "times", "united",
        "units", "work", "writes",
    )  # fmt: skip

    def __init__(self, adds: str = "") -> None:
        self.adds, self.fusible = adds, True
        self.times = 1.0
        self.count = 0
        self.units: list[int] = []
        self.reads: dict[int, dict[Leads, tuple[float, float]]] = {}  # by tensor: how often, which share of the bytes
        self.writes: dict[tuple[int, Leads], float] = {}  # which share of the bytes
        self.work: dict[tuple[Leads, str], tuple[float, tuple[int, ...]]] = {}  # by factors and dtype: operations, operators
        self.combines: list[Combine] = []
        self.halos: list[Halo] = []
        self.apart: list[tuple[int, int]] = []
        self.inner: dict[int, Leads] = {}  # of values that never leave, by tensor
        self.slots: dict[tuple[int, int], tuple[int, Leads]] = {}  # by operator and operand: what is read there, and how
        self.united: dict[int, int] = {}  # factors that became others, which slots still name
        self.moves = False
        self.steps: dict[Hashable, _Step] = {}

    def _copy(self) -> _Form:
        new = _Form.__new__(_Form)
        new.adds, new.fusible, new.times, new.count, new.moves = self.adds, self.fusible, self.times, self.count, self.moves
        new.units, new.combines, new.halos, new.apart = self.units[:], self.combines[:], self.halos[:], self.apart[:]
        new.reads, new.writes, new.work, new.inner = self.reads.copy(), self.writes.copy(), self.work.copy(), self.inner.copy()
        new.slots, new.united, new.steps = self.slots.copy(), self.united.copy(), {}
        return new

    def after(self, operator: Operator, digest: _Digest, tensors: list[Tensor]) -> _Step:
        """The form with one more operator, which reads and makes `tensors`, if their dimensions agree."""
        new, same, mapping = self._copy(), [], {}
        if self.count:
            tensor = operator.results[0]
            wanted = tuple(self.reads.get(tensor, ()))
            found = self._matched(operator, digest, wanted) if len(wanted) < 2 else None
            if found is None:
                return _Step(self, False)
            mapping, same = found
            new.inner |= dict.fromkeys([tensor], next(iter(new.reads.pop(tensor, ())), ()))
        else:
            new.fusible, new.times = operator.rule.fusible, operator.times
        asks = bool(self.combines) and any(f not in mapping for f in digest.partial)
        new._take(operator, digest, mapping, tensors)
        for keep, drop in same:
            new._unite(keep, drop)
        return _Step(new, True, asks)

    def _matched(
        self, operator: Operator, digest: _Digest, wanted: tuple[Leads, ...]
    ) -> tuple[dict[int, int], list[tuple[int, int]]] | None:
        """(the operator's factors as this cluster's, factors of this cluster that it walks as one), if they agree."""
        mapping: dict[int, int] = {}
        if wanted:  # a scalar is read without leads
            for own, mine in zip(digest.leads[-1], wanted[0], strict=True):
                if (own < 0) != (mine < 0) or (own >= 0 and mapping.setdefault(own, mine) != mine):
                    return None
            if len(set(mapping.values())) != len(mapping):
                return None
        same: list[tuple[int, int]] = []
        for slot, operand in enumerate(operator.operands):
            if operand in self.reads:
                for own, mine in zip(digest.leads[slot], next(iter(self.reads[operand])), strict=True):
                    if own < 0 or mine < 0:
                        continue
                    if own not in mapping and mine not in mapping.values():
                        mapping[own] = mine
                    elif own in mapping and mapping[own] != mine:
                        same.append((mine, mapping[own]))
        return mapping, same

    def _unite(self, keep: int, drop: int) -> None:
        """Two factors become one where one value is walked along both, unless some tensor carries both (as x x^T does, or all
        differences of x with itself, a value that may not leave the cluster)."""
        read = [leads for reads in self.reads.values() for leads in reads]
        seen = [*self.inner.values(), *read, *[leads for _, leads in self.writes]]
        if keep == drop or any(keep in leads and drop in leads for leads in seen):
            return

        def new(leads: Leads) -> Leads:
            return tuple([keep if f == drop else f for f in leads])

        self.units[keep] = math.gcd(self.units[keep], self.units[drop])
        self.units[drop] = 0
        self.reads = {tensor: {new(leads): often for leads, often in reads.items()} for tensor, reads in self.reads.items()}
        self.writes = {(tensor, new(leads)): share for (tensor, leads), share in self.writes.items()}
        self.inner |= {tensor: new(leads) for tensor, leads in self.inner.items() if drop in leads}
        self.united[drop] = keep
        self.apart = [new(pair) for pair in self.apart]  # type: ignore[misc]
        if any(drop in factors for factors, _ in self.work):
            work, self.work = self.work, {}
            for (factors, dtype), (flops, members) in work.items():
                self._works(new(factors), dtype, flops, members)
        self.combines = [
            replace(c, result=Terminal(c.result.tensor, new(c.result.leads)), over=frozenset(new(tuple(c.over))))
            if drop in c.over or drop in c.result.leads
            else c
            for c in self.combines
        ]
        self.halos = [
            replace(h, operand=Terminal(h.operand.tensor, new(h.operand.leads)), factor=new((h.factor,))[0]) for h in self.halos
        ]

    def _now(self, leads: Leads) -> Leads:
        """Leads with the factors that others became."""
        while any(f in self.united for f in leads):
            leads = tuple([self.united.get(f, f) for f in leads])
        return leads

    def _take(self, operator: Operator, digest: _Digest, mapping: dict[int, int], tensors: list[Tensor]) -> None:
        units = self.units
        for factor, size in digest.legal:
            mine = mapping.get(factor)
            if mine is None:
                mapping[factor] = len(units)
                units.append(size)
            elif units[mine] != size:
                units[mine] = math.gcd(units[mine], size)
        index = self.count
        self.count += 1
        operands, count = operator.operands, len(operator.operands)
        times, touched = operator.read_times, operator.rule.touched
        mapping[-1] = -1
        renamed = {leads: tuple([mapping[f] for f in leads]) for leads in digest.distinct}
        mapped = [renamed[leads] for leads in digest.leads]
        for slot, own in enumerate(mapped if index == 0 else mapped[:count]):  # what a joining operator writes is read here only
            tensor = operands[slot] if slot < count else operator.results[slot - count]
            if tensor < 0 or not own:
                continue
            share = touched[slot] if touched else 1.0
            if slot < count:
                self.slots[index, slot] = (tensor, own)
                reads = self.reads[tensor] = dict(self.reads.get(tensor, ()))
                often = times[slot] if times else operator.times
                before = reads.get(own)
                reads[own] = (often, share) if before is None else (max(often, before[0]), max(share, before[1]))
            else:
                self.writes[(tensor, own)] = share
        for factor, extent in digest.extents:  # strided windows: the extent must divide too
            units[mapping[factor]] = math.gcd(units[mapping[factor]], extent)
        if digest.flops:
            first = next((t for t in (*operands, *operator.results) if t >= 0), -1)
            factors = tuple([mapping[f] for f, _ in digest.legal])
            self._works(factors, tensors[first].dtype if first >= 0 else "float32", digest.flops, (index,))
        self.moves |= not operator.rule.free
        if digest.partial:
            over = frozenset([mapping[f] for f in digest.partial])
            for tensor, own in zip(operator.results, mapped[count:], strict=True):
                self.combines.append(Combine(index, Terminal(tensor, own), over, digest.scatterable))
        if operator.rule.alone:
            units.append(0)  # divided by any number of devices
            self.combines += [
                Combine(index, Terminal(tensor, own), frozenset((len(units) - 1,)), False)
                for tensor, own in zip(operator.results, mapped[count:], strict=True)
            ]
        if digest.apart:
            self.apart += [(mapping[a], mapping[b]) for a, b in digest.apart]
        for f, width, instead in digest.halos:
            if operands and operands[0] >= 0 and mapping[f] in mapped[0]:
                extent = tensors[operands[0]].shape[mapped[0].index(mapping[f])]
                self.halos.append(Halo(index, Terminal(operands[0], mapped[0]), mapping[f], width, extent, instead))

    def _works(self, factors: Leads, dtype: str, flops: float, members: tuple[int, ...]) -> None:
        """Operations that members do, whichever factors split them."""
        before = self.work.get((factors, dtype))
        self.work[factors, dtype] = (flops, members) if before is None else (before[0] + flops, before[1] + members)

    def close(self, wanted: tuple[bool, ...], left: bool = False) -> Cluster:
        """The finished form; `wanted`: which of the values are needed by somebody else; `left`: its sum may be left partial.

        An addition of sums costs what it would as a part of its reader: that reads the total in place of one of the terms.
        """
        reads = [(tensor, leads, often) for tensor, seen in self.reads.items() for leads, often in seen.items()]
        writes = [(*where, share) for (where, share), keep in zip(self.writes.items(), wanted, strict=True) if keep]
        numbers = {(tensor, leads): number for number, (tensor, leads, _) in enumerate(reads)}
        several = {tensor for tensor, seen in self.reads.items() if len(seen) > 1}
        unread = {where for where, keep in zip(self.writes, wanted, strict=True) if not keep}
        combines = tuple([
            replace(c, left=left) for c in self.combines
            if (c.result.tensor, c.result.leads) not in unread or any(map(self.units.__getitem__, c.over))
        ])  # fmt: skip
        spared = 1.0
        if self.adds and writes:
            carries = self.adds == "carries"
            combines = (Combine(0, Terminal(*writes[0][:2]), frozenset((PARTIAL,)), not carries, left or carries),)
            spared = (len(reads) - 1) / len(reads) if self.adds == "adds" else 1.0
        return Cluster(
            members=tuple(range(self.count)),
            units=tuple(self.units),
            reads=tuple([Terminal(tensor, leads) for tensor, leads, _ in reads]),
            writes=tuple([Terminal(tensor, leads) for tensor, leads, _ in writes]),
            work=_merged(self.work),
            combines=combines,
            halos=tuple(self.halos),
            times=self.times,
            read_times=tuple([often for _, _, (often, _) in reads]),
            read_shares=tuple([spared * share for _, _, (_, share) in reads]),
            write_shares=tuple([0.0 if self.adds == "adds" else share for _, _, share in writes]),
            moves_bytes=self.moves,
            apart=tuple(self.apart),
            slots=tuple([(*where, numbers[t, self._now(own)]) for where, (t, own) in self.slots.items() if t in several]),
            inner=tuple([Terminal(tensor, leads) for tensor, leads in self.inner.items()]),
        )


class _Step(NamedTuple):
    """What an operator makes of a form: the same, unless it `fits`. `asks`: only if both are computed from one tensor."""

    form: _Form
    fits: bool
    asks: bool = False


_PARTIAL = (Kind.SUM, Kind.COMBINE)


@dataclass(frozen=True, slots=True)
class _Digest:
    """What fusing needs of a rule: legal factors with sizes; leads of operands and results; partial factors; extents other
    than the size of the factor that leads them."""

    legal: tuple[tuple[int, int], ...]
    leads: tuple[Leads, ...]
    distinct: tuple[Leads, ...]
    partial: tuple[int, ...]
    scatterable: bool
    halos: tuple[tuple[int, int, bool], ...]
    extents: tuple[tuple[int, int], ...]
    apart: tuple[tuple[int, int], ...]
    flops: float


def _digest(operator: Operator, tensors: list[Tensor], known: dict[int, _Digest]) -> _Digest:
    """Rules are shared by equations of equal shapes: each is read once. `known`: by identity, which is cheaper than hashing."""
    rule = operator.rule
    found = known.get(id(rule))
    if found is None:
        legal = tuple((f, factor.size) for f, factor in enumerate(rule.factors) if rule.shardable[f])
        partial = tuple(f for f, _ in legal if rule.factors[f].kind in _PARTIAL)
        sums = all(rule.factors[f].kind is Kind.SUM for f in partial)
        halos = tuple((f, rule.factors[f].halo, rule.factors[f].kind is Kind.ROLL) for f, _ in legal if rule.factors[f].halo)
        leads = (*rule.operand_leads, *rule.result_leads)
        extents = {
            (f, extent): None
            for tensor, own in zip((*operator.operands, *operator.results), leads, strict=True)
            if tensor >= 0
            for f, extent in zip(own, tensors[tensor].shape, strict=True)
            if f >= 0 and extent and extent != rule.factors[f].size
        }
        flops = rule.points * rule.flops
        apart = tuple((a, b) for a, b in rule.apart if rule.shardable[a] and rule.shardable[b])
        distinct, scatterable = tuple(dict.fromkeys(leads)), sums and not rule.fusible
        found = _Digest(legal, leads, distinct, partial, scatterable, halos, tuple(extents), apart, flops)
        known[id(rule)] = found
    return found


def _merged(work: dict[tuple[Leads, str], tuple[float, tuple[int, ...]]]) -> tuple[Work, ...]:
    """One piece of work per set of factors and dtype."""
    merged: dict[tuple[frozenset[int], str], tuple[float, tuple[int, ...]]] = {}
    for (factors, dtype), (flops, members) in work.items():
        before = merged.get(key := (frozenset(factors), dtype))
        merged[key] = (flops, members) if before is None else (before[0] + flops, before[1] + members)
    return tuple([Work(flops, factors, dtype, members) for (factors, dtype), (flops, members) in merged.items()])
