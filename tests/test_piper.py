"""Stages by dynamic programming, against trying everything."""

import itertools
import math

import numpy as np
import pytest

from jaxplan.search.piper import Layer, Stage, alpa_stages, balanced, call_seconds, piper

PAIRS = [(1, 1), (2, 1), (1, 2), (2, 2)]


def chain(rng, count):
    layers = []
    for _ in range(count):
        work, size, kept = rng.uniform(1, 5), rng.uniform(1, 4), rng.uniform(0.2, 1)
        layers.append(Layer(
            {(d, t): work / (d * t) + 0.3 * (t - 1) for d, t in PAIRS},
            {1: size, 2: size / 2},
            {(d, t): kept / d for d, t in PAIRS},
            {(d, t): 0.5 * size * (d - 1) / t for d, t in PAIRS},
        ))  # fmt: skip
    return layers


def everything(layers, devices, microbatches, memory, all_devices=False, sync=True):
    """The least seconds over all ways to cut the chain and to choose degrees."""
    best, count = math.inf, len(layers)
    for stages in range(1, count + 1):
        for cuts in itertools.combinations(range(1, count), stages - 1):
            edges = [0, *cuts, count]
            for pairs in itertools.product(PAIRS, repeat=stages):
                used = sum(d * t for d, t in pairs)
                if used > devices or (all_devices and used != devices):
                    continue
                found = [Stage(a, b, d, t) for a, b, (d, t) in zip(edges, edges[1:], pairs, strict=False)]
                held = []
                for number, stage in enumerate(found):
                    run, inflight = layers[stage.first : stage.last], min(microbatches, stages - number)
                    held.append(sum(one.state[stage.tensor] + inflight * one.kept[stage.data, stage.tensor] for one in run))
                if max(held) <= memory:
                    best = min(best, call_seconds(layers, found, microbatches, sync))
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("memory", [math.inf, 7.0])
def test_stages_are_the_best_there_are(seed, memory):
    rng = np.random.default_rng(seed)
    layers, microbatches = chain(rng, 4), int(rng.integers(1, 6))
    found = alpa_stages(layers, 4, microbatches, memory)
    assert found.seconds == pytest.approx(everything(layers, 4, microbatches, memory, all_devices=True, sync=False))
    assert sum(stage.devices for stage in found.stages) == 4
    no_sync = [Layer(one.seconds, one.state, one.kept, {}) for one in layers]
    assert piper(no_sync, 4, microbatches, memory).seconds == pytest.approx(everything(no_sync, 4, microbatches, memory))


@pytest.mark.parametrize("seed", range(4))
def test_sums_of_gradients_are_paid_for_once(seed):
    layers = chain(np.random.default_rng(seed), 4)
    found = piper(layers, 4, 4)
    assert found.seconds == pytest.approx(call_seconds(layers, found.stages, 4))
    assert found.seconds >= everything(layers, 4, 4, math.inf) * (1 - 1e-12)


def test_earlier_stages_keep_more_micro_batches():
    layers = [Layer({(1, 1): 1.0}, {1: 0.0}, {(1, 1): 1.0}, {})] * 6
    assert [stage.last - stage.first for stage in piper(layers, 2, 8, memory=4.0).stages] == [2, 4]
    with pytest.raises(ValueError, match="no stages of 6 layers on 2 devices fit 3 bytes"):
        piper(layers, 2, 8, memory=3.0)


def test_unlike_layers_are_balanced():
    rng = np.random.default_rng(0)
    for count, stages in [(5, 2), (7, 3), (8, 8), (6, 1)]:
        seconds = rng.uniform(1, 9, count)
        found = balanced(seconds.tolist(), stages)
        assert sum(found) == count and min(found) >= 1 and len(found) == stages
        slowest = max(part.sum() for part in np.split(seconds, np.cumsum(found)[:-1]))
        cuts = itertools.combinations(range(1, count), stages - 1)
        assert slowest == pytest.approx(min(max(p.sum() for p in np.split(seconds, c)) for c in cuts))
    with pytest.raises(ValueError, match="2 layers cannot be laid over 3 stages"):
        balanced([1.0, 2.0], 3)
