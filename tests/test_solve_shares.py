"""Shares of the work: what gains more has more of it, nothing is left out, and nothing depends on the clock."""

import numpy as np

from jaxplan.solve.shares import LEAST, Shares


def served(gains, costs, rounds=400):
    """(the shares at the end, the work that each way had)."""
    shares, had = Shares(len(gains)), np.zeros(len(gains))
    for _ in range(rounds):
        way = shares.next()
        had[way] += costs[way]
        shares.note(way, costs[way], gains[way])
    return shares.shares, had / had.sum()


def test_ways_that_gain_alike_for_their_work_share_it_alike():
    shares, had = served([0.002, 0.02], [20.0, 200.0])
    assert np.abs(shares - 0.5).max() < 0.1 and np.abs(had - 0.5).max() < 0.1


def test_a_way_that_gains_nothing_keeps_the_least_share():
    shares, had = served([0.01, 0.0, 0.0], [20.0, 200.0, 60.0])
    assert np.abs(shares.sum() - 1.0) < 1e-12 and (shares >= LEAST).all()
    assert had[0] > 0.5 and (had[1:] > 0.02).all()


def test_what_nothing_gains_is_shared_by_all():
    shares, had = served([0.0, 0.0], [20.0, 200.0])
    assert (had > 0.3).all() and np.isfinite(shares).all()


def test_one_large_gain_does_not_decide_for_good():
    shares = Shares(2)
    shares.note(0, 20.0, 1e9)
    for _ in range(60):
        way = shares.next()
        shares.note(way, 100.0, 0.05 * way)
    assert shares.shares[1] > 0.5
