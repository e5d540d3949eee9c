"""Room `rules`: an equation -> its `Rule` (factors, kinds, which dimension is which). Knows no meshes.

    nouns.py        the nouns: Rule, Factor, Kind; the written form, einsum_rule
    table.py        one table keyed by the primitive: register, rule_of, classify
    build.py        what makers of rules are built with
    teach.py        the user's decorator, jaxplan.rule
    elementwise.py  point by point, and operations that pass a tensor through
    linear.py       dot_general, ragged_dot_general, conv_general_dilated
    windows.py      halos, reduce_window and its gradient
    reductions.py   reduce_*, argmax, cumulative, sort, top_k
    shapes.py       broadcast, reshape, transpose, iota, ...
    pieces.py       slice, pad, concatenate, split, dynamic_slice, dynamic_update_slice, ...
    indexing.py     gather, scatter
    random.py       pseudo-random bits and keys
    linalg.py       factorizations, solves, fft
    partitioned.py  functions with a partitioner of their own
    whole.py        primitives without a rule, and why
    follow.py       parameters that are extents, at other shapes

Control flow is not here: the graph recurses into it.
"""

from jaxplan.rules import (
    elementwise as _elementwise,
    indexing as _indexing,
    linalg as _linalg,
    linear as _linear,
    partitioned as _partitioned,
    pieces as _pieces,
    random as _random,
    reductions as _reductions,
    shapes as _shapes,
    windows as _windows,
)
from jaxplan.rules.follow import params_at
from jaxplan.rules.nouns import Factor, Kind, Rule, einsum_rule
from jaxplan.rules.table import classify, register, rule_of
from jaxplan.rules.teach import RuleError, rule

FAMILIES = (_elementwise, _indexing, _linalg, _linear, _partitioned, _pieces, _random, _reductions, _shapes, _windows)
"""Imported for what they register."""

__all__ = ["Factor", "Kind", "Rule", "RuleError", "classify", "einsum_rule", "params_at", "register", "rule", "rule_of"]
