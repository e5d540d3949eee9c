"""Room `graph`: what is fused, what is tied, how loops and branches are counted."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jaxplan.examples import programs
from jaxplan.examples.decoder import SMALL, decoder
from jaxplan.graph import Cluster, Graph, Terminal, build_graph
from jaxplan.graph.flatten import SPARED
from jaxplan.trace import trace

F32 = jnp.float32


def shape(*extents, dtype=F32):
    return jax.ShapeDtypeStruct(extents, dtype)


def graph_of(fn, *args):
    return build_graph(trace(fn, args, {}))


def heavy(graph):
    """Clusters that do work of their own, as the names of their members."""
    return [[graph.operators[m].name for m in c.members] for c in graph.clusters if c.work]


def test_a_layer_norm_is_one_cluster():
    def norm(x, scale):
        centred = x - jnp.mean(x, -1, keepdims=True)
        return centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6) * scale[None, None, :]

    graph = graph_of(norm, shape(4, 8, 16), shape(16))
    (members,) = heavy(graph)
    assert members.count("reduce_sum") == 2
    (cluster,) = [c for c in graph.clusters if c.work]
    used = {f for terminal in (*cluster.reads, *cluster.writes) for f in terminal.leads}
    assert sorted(cluster.units[f] for f in used) == [4, 8, 16], "the reduced dimension is the one that comes back by broadcast"
    assert len(cluster.combines) == 2


def test_a_dimension_asked_for_two_things_at_once_is_not_fused():
    graph = graph_of(lambda x: jnp.exp(x) + jnp.exp(x).T, shape(8, 8))
    for cluster in graph.clusters:
        for terminal in (*cluster.reads, *cluster.writes):
            leads = [f for f in terminal.leads if f >= 0]
            assert len(set(leads)) == len(leads)


def test_a_scan_multiplies_by_its_length_and_nests():
    def inner(x):
        return jax.lax.scan(lambda c, _: (jnp.dot(c, c), None), x, None, length=3)[0]

    graph = graph_of(lambda x: jax.lax.scan(lambda c, _: (inner(c), None), x, None, length=5)[0], shape(8, 8))
    assert [op.times for op in graph.operators if op.name == "dot_general"] == [15.0]


def test_a_cond_is_charged_for_its_worst_branch_and_next_to_nothing_else():
    def fn(p, x):
        return jax.lax.cond(p, lambda a: a @ a, lambda a: a + 1.0, x)

    graph = graph_of(fn, shape(dtype=jnp.bool_), shape(8, 8))
    assert [op.times for op in graph.operators if op.name == "dot_general"] == [1.0]
    assert [op.times for op in graph.operators if op.name == "add"] == [SPARED] and SPARED < 0.01


def test_calls_are_seen_through():
    @jax.jit
    def inner(x):
        return jax.checkpoint(jnp.tanh)(x) + jax.nn.relu(x)

    names = {op.name for op in graph_of(inner, shape(8)).operators}
    assert {"tanh", "max", "add"} <= names


@pytest.mark.parametrize("name", ["mlp_sgd", "decoder_scan", "decoder_unrolled", "resnet_momentum", "moe"])
def test_state_that_goes_round_is_found_without_being_told(name):
    program = programs()[name]
    traced = trace(program.fn, program.args, {})
    graph = build_graph(traced)
    state = {p for p, path in enumerate(traced.in_paths) if path.split("/")[0] not in ("x", "y", "batch", "images", "labels")}
    assert {position for _, position in graph.ties} == state


def test_the_cache_of_a_decoder_goes_round():
    program = programs()["decode_kv"]
    traced = trace(program.fn, program.args, {})
    tied = {traced.in_paths[position] for _, position in build_graph(traced).ties}
    assert tied == {"cache/k", "cache/v"}


def test_a_transpose_of_a_square_is_no_state():
    assert graph_of(lambda x: x.T, shape(8, 8)).ties == ()
    assert graph_of(lambda x: x * 2.0, shape(8, 8)).ties == ((0, 0),)


@pytest.mark.parametrize(
    ("loop", "trips"),
    [
        (lambda x: jax.lax.while_loop(lambda s: s[0] < 7, lambda s: (s[0] + 1, s[1] @ x), (0, x)), 7),
        (lambda x: jax.lax.while_loop(lambda s: s[0] <= 7, lambda s: (s[0] + 2, s[1] @ x), (0, x)), 4),
        (lambda x: jax.lax.while_loop(lambda s: s[0] > 0, lambda s: (s[0] - 1, s[1] @ x), (5, x)), 5),
        (lambda x: jax.lax.while_loop(lambda s: s[0] < 9, lambda s: (1 + s[0], s[1] @ x), (9, x)), 0),
        (lambda x: jax.lax.fori_loop(0, 6, lambda i, s: s @ x, x), 6),
        (lambda x: jax.lax.while_loop(lambda s: s[0] < 7, lambda s: (s[0] * 2, s[1] @ x), (1, x)), 10),
        (lambda x: jax.lax.while_loop(lambda s: s[0] < 7, lambda s: (s[0] - 1, s[1] @ x), (1, x)), 10),
        (lambda x: jax.lax.while_loop(lambda s: s.sum() < 7, lambda s: s @ x, x), 10),
        (lambda x: jax.lax.while_loop(lambda s: s[0].any(), lambda s: (s[0] & (s[1][0] > 0), s[1] @ x), (x[0] > 0, x)), 10),
    ],
)
def test_the_rounds_of_a_loop_are_read_where_the_program_says_them(loop, trips):
    graph = graph_of(loop, shape(8, 8))
    assert [op.times for op in graph.operators if op.name == "dot_general"] == [trips]


def test_unrelated_sums_are_not_laid_out_as_one():
    """A sum of squares over several arrays, as clipping by the global norm takes, and a bias that is used twice."""

    def norm(a, b):
        return jnp.sqrt(jnp.sum(a**2) + jnp.sum(b**2))

    def twice(a, b):
        return a.sum(0) + b.sum(0)

    for fn in (norm, twice):
        graph = graph_of(fn, shape(64, 32), shape(16, 32))
        sums = [sum(graph.operators[m].name == "reduce_sum" for m in c.members) for c in graph.clusters]
        assert max(sums) == 1 and sum(sums) == 2

    def layer_norm(x):  # two sums along one dimension of one array stay together
        return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True))

    assert len(heavy(graph_of(layer_norm, shape(64, 32)))) == 1


def test_clusters_made_alike_differ_in_names_only():
    """Layers of an unrolled model share their makings, whatever the depth; `alike` may be trusted where prices are shared."""
    counts = []
    for layers in (3, 6):
        program = decoder(replace(SMALL, layers=layers), "unrolled")
        graph = build_graph(trace(program.fn, program.args, {}))
        made: dict[int, list[Cluster]] = {}
        for cluster in graph.clusters:
            made.setdefault(cluster.alike, []).append(cluster)
        counts.append(len(made))
        assert -1 not in made and len(graph.clusters) > 2 * len(made)
        for clusters in made.values():
            assert len({_unnamed(graph, cluster) for cluster in clusters}) == 1
    assert counts[0] == counts[1]


def _unnamed(graph: Graph, cluster: Cluster) -> object:
    """A cluster with tensors and operators replaced by what they are."""

    def what(terminal: Terminal) -> object:
        return graph.tensors[terminal.tensor], terminal.leads

    place = {member: number for number, member in enumerate(cluster.members)}
    return (
        tuple(graph.operators[m].rule for m in cluster.members), cluster.units, cluster.times, cluster.moves_bytes, cluster.apart,
        tuple(map(what, cluster.reads)), tuple(map(what, cluster.writes)),
        cluster.read_times, cluster.read_shares, cluster.write_shares,
        tuple((w.flops, w.factors, w.dtype, tuple(place[m] for m in w.members)) for w in cluster.work),
        tuple((place[c.operator], what(c.result), c.over, c.scatterable) for c in cluster.combines),
        tuple((place[h.operator], what(h.operand), h.factor, h.width, h.extent) for h in cluster.halos),
    )  # fmt: skip


def test_what_jax_traced_before_has_the_line_of_its_call():
    def twice(x):
        first = jax.nn.relu(x)
        return jax.nn.relu(first + 1) + jnp.where(x > 0, first, 0)

    operators = [op for op in graph_of(twice, shape(8, 4)).operators if op.equation is not None]
    start = twice.__code__.co_firstlineno
    assert [op.source() for op in operators if op.name == "max"] == [(__file__, start + 1), (__file__, start + 2)]
    assert not [op.name for op in operators if not op.source()[0]]
