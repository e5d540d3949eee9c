"""Random problems of the shape that training steps have: layers forward and back, lifetimes nested, hubs, a tight limit."""

import numpy as np

from jaxplan.solve import IntervalProblem, least_peak, peak_usage


def layered_problem(seed, layers=4, width=4, slack=0.1):
    """(the problem, positions that are feasible). Costs differ by orders of magnitude; barred pairs are infinite.

    A forward node lives until its mirror image in the backward pass, which lives for two steps; a hub per layer is read by the
    layer and alive throughout. Some edges tie two nodes strategy by strategy. `slack`: of the limit, between the smallest peak
    and that of the planted positions.
    """
    rng = np.random.default_rng(seed)
    last = 2 * layers
    intervals, edges, kinds = [], [], []
    for layer in range(layers):
        hub = len(intervals)
        intervals.append((0, last))
        kinds.append(int(rng.integers(2, 7)))
        shared = int(rng.integers(2, 7))
        for place in range(width):
            node = len(intervals)
            intervals += [(layer, last - layer), (last - layer - 1, min(last, last - layer + 1))]
            kinds += [shared, shared if rng.random() < 0.5 else int(rng.integers(1, 7))]
            edges += [(node, node + 1), (hub, node + int(rng.integers(2)))]
            if layer:
                before = hub - 2 * width + 2 * int(rng.integers(width))
                edges += [(before, node), (node + 1, before + 1)]
            if place:
                edges.append((node - 2, node))
    planted = np.array([int(rng.integers(kind)) for kind in kinds])
    costs = [np.round(rng.lognormal(3, 2, kind)) * (rng.random() < 0.5) for kind in kinds]
    usages = [np.round(rng.lognormal(5, 1) / 2.0 ** rng.integers(0, 4, kind)) for kind in kinds]
    tables = []
    for tail, head in edges:
        table = np.round(rng.lognormal(4, 2, (kinds[tail], kinds[head])))
        if kinds[tail] == kinds[head] and rng.random() < 0.3:
            turned = (np.arange(kinds[tail]) + planted[head] - planted[tail]) % kinds[tail]
            table = np.where(np.eye(kinds[tail], dtype=bool)[turned], 0.0, np.inf)
        elif rng.random() < 0.3:
            table[rng.random(table.shape) < 0.3] = np.inf
            table[planted[tail], planted[head]] = 1000.0
        tables.append(table)
    parts = tuple(costs), tuple(usages), np.array(intervals), np.array(edges), tuple(tables)
    free = IntervalProblem(*parts, limit=np.inf)
    low, high = least_peak(free).usage, peak_usage(free, planted).usage
    return IntervalProblem(*parts, limit=float(np.ceil(high + slack * (high - low))), name=f"layered {seed}"), planted
