"""What a traced program is, as a hash: equal for equal programs in any process, on any machine, from any source path.

A program is its equations: primitives, parameters, shapes, dtypes and who reads whom. Names of jitted functions, source lines,
weak types and floating-point constants are no part of it, as no plan depends on them; integer constants are (loop bounds).
Where two versions of JAX write the same jaxpr, it has the same fingerprint in both.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxplan import _jax
from jaxplan.files.nouns import Primitives, Program
from jaxplan.graph.flatten import scan_arity

_CALLS: Mapping[Any, tuple[str, ...]] = {
    _jax.jit_p: (),
    _jax.closed_call_p: (),
    _jax.custom_jvp_call_p: (),
    _jax.custom_vjp_call_p: (),
    _jax.custom_vmap_p: (),
    _jax.remat_p: ("policy", "prevent_cse"),
    _jax.scan_p: ("length", "reverse"),
    _jax.while_p: ("cond_nconsts", "body_nconsts"),
    _jax.cond_p: (),
}
"""Primitives that run other jaxprs, and which of their parameters matter: the others differ between versions of JAX."""

_WORD = 2**64


def program_of(closed: Any) -> Program:
    """The fingerprint of a closed jaxpr, and a tally of its primitives to tell differences by (bodies of loops counted once)."""
    walk = _Walk()
    fingerprint = walk.jaxpr(closed.jaxpr)
    tally = walk.tallies[id(closed.jaxpr)]
    return Program(fingerprint, {name: Primitives(count, f"{total:016x}") for name, (count, total) in sorted(tally.items())})


class _Walk:
    """Hashes jaxprs; one that is called more than once is hashed once."""

    def __init__(self) -> None:
        self.tallies: dict[int, dict[str, tuple[int, int]]] = {}
        self._known: dict[int, str] = {}
        self._alive: list[Any] = []
        self._dtypes: dict[Any, str] = {}
        self._signatures: dict[str, tuple[bytes, int]] = {}

    def jaxpr(self, jaxpr: Any) -> str:
        """The hexadecimal digest of an open jaxpr."""
        if id(jaxpr) in self._known:
            return self._known[id(jaxpr)]
        known: dict[Any, tuple[str, str]] = {}
        tally: dict[str, tuple[int, int]] = {}
        digest = hashlib.sha256()

        def described(variables: Any) -> tuple[str, str]:
            """The variables by number, in order of appearance, and what they hold."""
            pairs = []
            for v in variables:
                if isinstance(v, _jax.Literal):
                    pairs.append((_literal(v), self.aval(v.aval)))
                elif v in known:
                    pairs.append(known[v])
                else:
                    pairs.append(known.setdefault(v, (str(len(known)), self.aval(v.aval))))
            return " ".join([pair[0] for pair in pairs]), " ".join([pair[1] for pair in pairs])

        digest.update(f"{len(jaxpr.constvars)} {described([*jaxpr.constvars, *jaxpr.invars])}\n".encode())
        for equation in jaxpr.eqns:
            primitive = equation.primitive.name
            inner = [getattr(sub, "jaxpr", sub) for sub in _jax.sub_jaxprs(equation)]
            bodies = " ".join([self.jaxpr(sub) for sub in inner])
            (reads, operands), (writes, results) = described(equation.invars), described(equation.outvars)
            text = f"{primitive} {_parameters(equation)} {operands} -> {results}"
            if text not in self._signatures:
                hashed = hashlib.sha256(text.encode()).digest()
                self._signatures[text] = hashed, int.from_bytes(hashed[:8], "big")
            hashed, word = self._signatures[text]
            digest.update(hashed)
            digest.update(f"{bodies} {reads} {writes}\n".encode())
            for other in ({primitive: (1, word)}, *[self.tallies[id(sub)] for sub in inner]):
                for key, (count, total) in other.items():
                    before = tally.get(key, (0, 0))
                    tally[key] = before[0] + count, (before[1] + total) % _WORD
        digest.update(described(jaxpr.outvars)[0].encode())
        self._alive.append(jaxpr)  # its id stands for it as long as this walk does
        self._known[id(jaxpr)], self.tallies[id(jaxpr)] = digest.hexdigest(), tally
        return self._known[id(jaxpr)]

    def aval(self, aval: Any) -> str:
        """float32[2,3]; of what is no array (a token), its type."""
        if not hasattr(aval, "dtype"):
            return type(aval).__name__
        name = self._dtypes.get(aval.dtype)
        if name is None:
            name = self._dtypes[aval.dtype] = str(aval.dtype)
        return f"{name}[{','.join(map(str, aval.shape))}]"


def _literal(literal: Any) -> str:
    value = np.asarray(literal.val)
    return f"literal {value.tolist()!r}" if value.dtype.kind in "biu" else "literal"


def _parameters(equation: Any) -> str:
    """The parameters that say what an equation does; those left at "nothing" are left out, as versions of JAX add such."""
    params = equation.params
    if equation.primitive in _CALLS:
        params = {key: params[key] for key in _CALLS[equation.primitive] if key in params}
        if equation.primitive is _jax.scan_p:
            params["arity"] = scan_arity(equation)
    parts = [(key, _text(value)) for key, value in sorted(params.items())]
    return ",".join([f"{key}={text}" for key, text in parts if text])


def _text(value: Any) -> str:
    """A parameter as text; "" for none. What has no text that is the same everywhere gives the name of its type."""
    if value is None or type(value).__name__ == "UnspecifiedValue":
        return ""
    if isinstance(value, (bool, int, float, complex, str, bytes)) and not isinstance(value, enum.Enum):
        return repr(value)
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, np.dtype) or hasattr(value, "_rules"):  # extended dtypes (keys) carry their rules
        return str(value)
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, PartitionSpec):
        return f"P({','.join(map(_text, value))})"
    if isinstance(value, (Mesh, AbstractMesh)):
        return f"mesh({','.join(f'{axis}={size}' for axis, size in value.shape.items())})"
    if isinstance(value, NamedSharding):
        return f"{_text(value.mesh)}{_text(value.spec)}"
    if isinstance(value, (_jax.Jaxpr, _jax.ClosedJaxpr)):
        return "jaxpr"  # hashed on its own
    if isinstance(value, (set, frozenset)):
        return "{" + ",".join(sorted(map(_text, value))) + "}"
    if isinstance(value, Mapping):
        return "{" + ",".join(sorted(f"{_text(key)}:{_text(entry)}" for key, entry in value.items())) + "}"
    if isinstance(value, (tuple, list)):
        name = type(value).__name__ if hasattr(value, "_fields") else ""
        return f"{name}({','.join(map(_text, value))})"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        array = np.asarray(value) if np.dtype(value.dtype).kind in "biu" else None
        return f"{value.dtype}{value.shape}{hashlib.sha256(array.tobytes()).hexdigest() if array is not None else ''}"
    if dataclasses.is_dataclass(value):
        fields = [_text(getattr(value, field.name, None)) for field in dataclasses.fields(value)]
        return f"{type(value).__name__}({','.join(fields)})"
    return getattr(value, "__name__", type(value).__name__)
