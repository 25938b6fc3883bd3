import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import structlora
from helpers import Fan, adapted, by_hand_mixing, by_hand_updates, chain, inputs, slot_of
from structlora import EDGES_SETTLE, GRADIENT_DECAY, Config, attach

EDGES = ("depth", "similarity", "hybrid", "random")


def graph_of(layers=3, seed=0, **config):
    # One graph of `layers` side by side, at its initial values
    torch.manual_seed(seed)
    model = Fan(layers)
    return attach(model, Config(**{"rank": 2, "gate": "none", "targets": "q_proj", **config}))


def senders(graph):
    # receiver -> the layers it hears directly
    return [{j for j, ok in zip(row, oks) if ok}
            for row, oks in zip(graph.neighbours.tolist(), graph.is_edge.tolist())]


# --- the mixing matrix, equations 5 and 6


def test_uniform_mixing_of_a_three_layer_chain_worked_by_hand():
    graph = graph_of(coordinator="uniform", edges="depth").graphs[0]
    graph.rho.data.fill_(0.5)
    assert torch.equal(graph.mixing(), torch.tensor([[1.00, 0.5, 0.00],
                                                     [0.25, 1.0, 0.25],
                                                     [0.00, 0.5, 1.00]]))


def test_attention_mixing_of_a_three_layer_chain_worked_by_hand():
    graph = graph_of(rank=1, coordinator="attention", edges="depth").graphs[0]
    with torch.no_grad():
        # P and Q pick the first four coordinates; U_ll has a single 1 there, so that h_l is the
        # unit vector number 0, 5 and 2 of the 16
        graph.P.copy_(torch.eye(7, 4))
        graph.Q.copy_(torch.eye(6, 4))
        graph.A.zero_(), graph.B.zero_()
        for layer, (row, column) in enumerate(((0, 0), (1, 1), (0, 2))):
            graph.B[layer, 0, row] = graph.A[layer, 0, column] = 1.0
        graph.w_src[5] = 1.0                         # of the receiver, layer 1
        graph.w_dst[0], graph.w_dst[2] = 0.5, -3.0   # of the senders, layers 0 and 2
        graph.rho.fill_(2.0)
    left, right = math.exp(1.5), math.exp(0.2 * -2.0)        # LeakyReLU(1 + .5), LeakyReLU(1 - 3)
    share = left / (left + right)
    wanted = torch.tensor([[1, 2, 0], [2 * share, 1, 2 * (1 - share)], [0, 2, 1]])
    assert torch.allclose(graph.mixing(), wanted, atol=1e-6)


@pytest.mark.parametrize("edges,hops,coordinator",
                         [*product(EDGES, (1, 2, 3), ("attention", "uniform", "none"))])
def test_mixing_is_the_sum_by_hand_on_every_graph(edges, hops, coordinator):
    _, adapters = adapted(5, edges=edges, hops=hops, coordinator=coordinator)
    for graph in adapters.graphs:
        wanted = by_hand_mixing(graph)
        assert torch.allclose(graph.mixing().double(), wanted, rtol=1e-4, atol=1e-5)
        changed = not torch.equal(graph.mixing(), torch.eye(5))
        assert changed == (coordinator != "none")


@pytest.mark.parametrize("edges", EDGES)
def test_rows_of_the_attention_sum_to_one(edges):
    _, adapters = adapted(6, edges=edges)
    for graph in adapters.graphs:
        a = (graph.mixing() - torch.eye(6)) / graph.rho
        rows = torch.tensor([float(bool(s)) for s in senders(graph)])
        assert torch.allclose(a.sum(1), rows, atol=1e-5) and (a > -1e-6).all()
        assert rows.any() and not a.diagonal().abs().gt(1e-5).any()
        shares = a[rows > 0]
        assert edges == "similarity" or ((shares > 0.01) & (shares < 0.45)).any()    # not uniform


def test_attention_starts_as_the_plain_average():
    attention = graph_of(4, coordinator="attention").graphs[0]
    uniform = graph_of(4, coordinator="uniform").graphs[0]
    attention.B.data.normal_()
    assert torch.equal(attention.mixing(), uniform.mixing())
    assert attention.rho == 1 and not attention.w_src.any() and not attention.w_dst.any()


def test_the_feature_is_the_direction_of_the_sketched_own_update():
    _, adapters = adapted(3)
    graph = adapters.graphs[0]
    for l, update in enumerate(graph.features()):
        gate = torch.diag(graph.gate.mean()[l, 0])
        sketch = (graph.P.T @ graph.B[l].T @ gate @ graph.A[l] @ graph.Q).flatten()
        assert torch.allclose(update, F.normalize(sketch, dim=0), atol=1e-5)
    before = graph.features()
    graph.B.data *= 100                              # only the direction counts
    assert torch.allclose(graph.features(), before, atol=1e-5)
    graph.kept[1] = False
    assert not graph.features()[1].any() and graph.features().isfinite().all()


def test_the_sketch_keeps_inner_products_on_average():
    # Why h may stand for vec(U): P and Q are Gaussian, so E <P'UQ, P'VQ> = 4 * 4 <U, V>.
    torch.manual_seed(0)
    U, V = torch.randn(7, 6), torch.randn(7, 6)
    P, Q = torch.randn(20000, 7, 4), torch.randn(20000, 6, 4)
    sketched = ((P.mT @ U @ Q) * (P.mT @ (U + V) @ Q)).sum((1, 2)).mean() / 16
    assert float(sketched) == pytest.approx(float((U * (U + V)).sum()), rel=0.03)
    graph = graph_of().graphs[0]
    other = graph_of(seed=5).graphs[0]
    assert torch.equal(graph.P, other.P) and torch.equal(graph.Q, other.Q)   # the same in every run
    assert graph.P.shape == (7, 4) and abs(float(graph.P.std()) - 1) < 0.4


# --- edges and hops


def test_depth_edges_join_neighbours_in_depth():
    assert senders(graph_of(5, edges="depth").graphs[0]) == [{1}, {0, 2}, {1, 3}, {2, 4}, {3}]


def test_hybrid_edges_start_as_depth_edges_and_similarity_edges_start_empty():
    assert senders(graph_of(4, edges="hybrid").graphs[0]) == [{1}, {0, 2}, {1, 3}, {2}]
    assert senders(graph_of(4, edges="similarity").graphs[0]) == [set()] * 4


def test_random_edges_are_three_other_layers_and_differ_by_seed():
    graph = graph_of(8, edges="random").graphs[0]
    assert all(len(s) == 3 and l not in s for l, s in enumerate(senders(graph)))
    assert senders(graph) != senders(graph_of(8, seed=1, edges="random").graphs[0])
    assert senders(graph) == senders(graph_of(8, edges="random").graphs[0])
    assert senders(graph_of(3, edges="random").graphs[0]) == [{1, 2}, {0, 2}, {0, 1}]
    everyone = [senders(graph_of(5, seed=s, edges="random").graphs[0])[2] for s in range(40)]
    assert set().union(*everyone) == {0, 1, 3, 4}    # nobody is left out


@pytest.mark.parametrize("hops", (2, 3))
@pytest.mark.parametrize("edges", EDGES)
def test_hops_are_a_matrix_power_and_reach_as_far_as_the_edges_lead(edges, hops):
    model, adapters = adapted(7, edges=edges, hops=hops, coordinator="uniform")
    for graph in adapters.graphs:
        near, L = senders(graph), 7
        degree = torch.tensor([len(s) for s in near]).clamp_min(1)
        a = torch.zeros(L, L)
        for l, s in enumerate(near):
            a[l, list(s)] = 1.0
        step = torch.eye(L) + graph.rho * a / degree[:, None]
        assert torch.allclose(graph.mixing(), torch.linalg.matrix_power(step, hops), rtol=1e-4)
        for l in range(L):
            reach = {l}
            for _ in range(hops):
                reach |= {j for i in reach for j in near[i]}
            assert {j for j in range(L) if slot_of(graph, l, j) is not None} == reach
    if edges == "depth":
        first = adapters.graphs[0]
        assert {j for j in range(7) if slot_of(first, 0, j) is not None} == set(range(hops + 1))


@pytest.mark.parametrize("hops", (1, 2, 3))
def test_one_layer_alone_is_plain_lora_with_a_gate(hops):
    model, adapters = adapted(1, hops=hops)
    graph = adapters.graphs[0]
    assert torch.equal(graph.mixing(), torch.eye(1)) and senders(graph) == [set()]
    assert {n for n, _ in graph.named_parameters()} == {"A", "B", "gate.mu", "gate.log_sigma"}
    assert torch.allclose(adapters.deltas()["blocks.0.q_proj"].double(),
                          by_hand_updates(graph)[0], atol=1e-5)


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("hops", (1, 2))
def test_two_layers_hear_each_other(edges, hops):
    _, adapters = adapted(2, edges=edges, hops=hops, coordinator="uniform")
    for graph in adapters.graphs:
        assert senders(graph) == [{1}, {0}]
        rho = float(graph.rho.detach())
        wanted = {1: [[1, rho], [rho, 1]], 2: [[1 + rho ** 2, 2 * rho], [2 * rho, 1 + rho ** 2]]}
        assert torch.allclose(graph.mixing(), torch.tensor(wanted[hops]), rtol=1e-5)


def test_without_a_coordinator_layers_do_not_mix():
    _, adapters = adapted(4, coordinator="none")
    for graph in adapters.graphs:
        assert torch.equal(graph.mixing(), torch.eye(4)) and graph.senders.shape == (4, 1)
        assert not {"rho", "w_src", "w_dst"} & {n for n, _ in graph.named_parameters()}


def test_kinds_and_shapes_do_not_mix():
    model = chain(5)
    model.blocks[2].q_proj = torch.nn.Linear(6, 11)  # another shape in the middle of the chain
    model.blocks[2].v_proj = torch.nn.Linear(11, 6)
    adapters = attach(model, Config(rank=2, edges="depth"))
    names = sorted(graph.names for graph in adapters.graphs)
    assert names == sorted([[f"blocks.{l}.{kind}" for l in (0, 1, 3, 4)]
                            for kind in ("q_proj", "v_proj")]
                           + [["blocks.2.q_proj"], ["blocks.2.v_proj"]])
    long = [g for g in adapters.graphs if len(g.names) == 4]
    assert all(senders(g) == [{1}, {0, 2}, {1, 3}, {2}] for g in long)       # 1 and 3 are adjacent
    before = adapters.deltas()
    long[0].B.data.normal_()
    changed = {n for n, U in adapters.deltas().items() if not torch.equal(U, before[n])}
    assert changed == set(long[0].names)
    square = attach(chain(2, hidden=6), Config(rank=2))          # one shape, and still two kinds
    assert [g.names for g in square.graphs] == [[f"blocks.{l}.{kind}" for l in range(2)]
                                                for kind in ("q_proj", "v_proj")]


def test_layers_are_ordered_by_number_not_by_spelling():
    graph = graph_of(12, edges="depth").graphs[0]
    assert graph.names == [f"blocks.{l}.q_proj" for l in range(12)]


def test_an_update_reaches_the_neighbours_and_nobody_else():
    _, adapters = adapted(5, targets="q_proj", edges="depth", gate="none", coordinator="uniform")
    graph = adapters.graphs[0]
    graph.B.data[[0, 1, 3, 4]] = 0.0                 # only layer 2 has an update
    graph.rho.data.fill_(0.8)
    updates = list(adapters.deltas().values())
    assert not updates[0].any() and not updates[4].any()
    assert torch.allclose(updates[1], 0.4 * updates[2], atol=1e-6) and updates[2].any()
    assert torch.allclose(updates[3], 0.4 * updates[2], atol=1e-6)


# --- similarity edges


def with_gradients(adapters, wanted):
    # Backward through a Fan whose layer l gets exactly the gradient wanted[l] [7, 6]
    x = torch.eye(6)                                 # dL/dW = (dL/dy)^T x
    (adapters.model(x) * wanted.mT).sum().backward()


def test_similarity_edges_point_to_the_layer_with_the_most_similar_gradient():
    torch.manual_seed(0)
    # Pairs 0-3, 1-4 and 2-5 are alike up to scale and noise; 6 is the opposite of 0, and its best
    # match by |cosine| is the wrong one
    base = torch.randn(3, 7, 6)
    wanted = torch.cat([base, 5 * base, -base[:1]])
    wanted = wanted + 0.02 * torch.randn_like(wanted)
    adapters = graph_of(7, edges="similarity", gate="gaussian")
    with_gradients(adapters, wanted)
    adapters.observe_gradients()
    graph = adapters.graphs[0]
    near = senders(graph)
    assert near[:6] == [{3}, {4}, {5}, {0}, {1}, {2}]
    assert not near[6] & {0, 3, 6} and len(near[6]) == 1
    exact = F.normalize(wanted.flatten(1), dim=1)
    exact = exact @ exact.T
    assert torch.allclose(graph.gradient_cosine()[0, [0, 3, 6]], exact[0, [0, 3, 6]], atol=0.02)


def test_hybrid_edges_add_the_most_similar_layer_that_is_not_adjacent():
    torch.manual_seed(0)
    alike = torch.randn(7, 6)
    wanted = torch.stack([alike, 1.01 * alike, torch.randn(7, 6), -alike, alike, torch.randn(7, 6)])
    wanted = wanted + 0.05 * torch.randn_like(wanted)
    adapters = graph_of(6, edges="hybrid")
    with_gradients(adapters, wanted)
    adapters.observe_gradients()
    near = senders(adapters.graphs[0])
    assert near[0] == {1, 4} and near[1] == {0, 2, 4}        # 1 is the most similar, but adjacent
    assert near[4] > {3, 5} and near[4] & {0, 1}
    assert all({l - 1, l + 1} & set(range(6)) <= near[l] for l in range(6))


def test_hybrid_edges_of_three_layers_leave_the_middle_one_with_two():
    _, adapters = adapted(3, edges="hybrid")
    assert all(senders(g) == [{1, 2}, {0, 2}, {0, 1}] for g in adapters.graphs)


@pytest.mark.parametrize("coordinator", ("uniform", "none"))
def test_depth_and_random_edges_do_not_watch_gradients(coordinator):
    for edges in ("depth", "random"):
        model, adapters = adapted(4, trained=False, edges=edges, coordinator=coordinator)
        before = [senders(g) for g in adapters.graphs]
        model(inputs()).sum().backward()
        adapters.observe_gradients()
        assert [senders(g) for g in adapters.graphs] == before
        assert not any(g.gradient.any() or g.gradient_sum.any() for g in adapters.graphs)


@pytest.mark.parametrize("tokens", (3, None))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_recorded_sketch_is_that_of_the_dense_gradient(tokens, dtype):
    model, adapters = adapted(4)
    model.to(dtype).train()
    for layer in adapters.layers.values():
        layer.base.weight.requires_grad_(True)       # dL/dW0 is dL/dW
    x = inputs(tokens=tokens, dtype=dtype)
    for passes in (1, 2):                            # the second adds up, as gradients do
        model(passes * x).square().sum().backward()
        for graph in adapters.graphs:
            for l, name in enumerate(graph.names):
                gradient = adapters.layers[name].base.weight.grad
                wanted = graph.P.T @ gradient @ graph.Q
                assert torch.allclose(graph.gradient_sum[l], wanted, rtol=1e-3,
                                      atol=1e-4 * float(wanted.abs().max()))


def test_gradients_of_a_step_enter_a_running_mean():
    adapters = graph_of(4, edges="similarity")
    graph = adapters.graphs[0]
    torch.manual_seed(0)
    mean = torch.zeros(4, 4, 4)
    for _ in range(3):
        total = torch.zeros(4, 4, 4)
        for _ in range(2):                           # two micro-batches make one step
            wanted = torch.randn(4, 7, 6)
            with_gradients(adapters, wanted)
            total += graph.P.T @ wanted @ graph.Q
        adapters.observe_gradients()
        mean = GRADIENT_DECAY * mean + (1 - GRADIENT_DECAY) * total
        assert torch.allclose(graph.gradient, mean, atol=1e-3)
        assert not graph.gradient_sum.any()


def test_edges_follow_the_gradients_until_they_settle_and_a_loaded_graph_knows_that(tmp_path):
    torch.manual_seed(0)
    adapters = graph_of(3, edges="similarity")
    graph, (first, second) = adapters.graphs[0], torch.randn(2, 7, 6)
    half = EDGES_SETTLE // 2
    for wanted, partner, steps in (((first, first, second), 1, half),
                                   ((first, second, first), 2, EDGES_SETTLE - half),
                                   ((first, first, second), 2, EDGES_SETTLE)):
        for _ in range(steps):
            assert graph.watches == (adapters.observations < EDGES_SETTLE)
            with_gradients(adapters, torch.stack(wanted))
            adapters.observe_gradients()
        assert senders(graph)[0] == {partner}
    assert not graph.gradient_sum.any()              # nothing is recorded any more
    adapters.save(tmp_path / "a.pt")
    again = structlora.StructLoRA.load(adapters.detach(), tmp_path / "a.pt")
    assert senders(again.graphs[0]) == senders(graph) and not again.graphs[0].watches


@pytest.mark.parametrize("edges,hops", (("similarity", 1), ("hybrid", 1), ("similarity", 3)))
def test_moved_edges_take_effect_in_the_next_forward(edges, hops):
    model, adapters = adapted(6, edges=edges, hops=hops)
    model.eval()
    torch.manual_seed(4)
    for graph in adapters.graphs:
        graph.gradient_sum.normal_(std=1e6)
    before = [senders(g) for g in adapters.graphs]
    adapters.observe_gradients()
    assert [senders(g) for g in adapters.graphs] != before
    x, deltas = inputs(), adapters.deltas()
    output = model(x)
    for graph in adapters.graphs:
        for name, update in zip(graph.names, by_hand_updates(graph)):
            assert (deltas[name].double() - update).abs().max() < 1e-5 * (1 + update.abs().max())
    assert torch.allclose(adapters.merge()(x), output, rtol=1e-4, atol=1e-4)


# --- factors, equation 7


@pytest.mark.parametrize("gate", ("gaussian", "concrete", "none"))
@pytest.mark.parametrize("edges,hops,coordinator", [*product(EDGES, (1, 3), ("attention",)),
                                                    ("hybrid", 1, "uniform"),
                                                    ("hybrid", 2, "none")])
def test_factors_multiply_to_the_dense_sum_of_equation_6(gate, edges, hops, coordinator):
    _, adapters = adapted(5, gate=gate, edges=edges, hops=hops, coordinator=coordinator)
    factors, deltas = adapters.factors(), adapters.deltas()
    assert len(factors) == 10
    for graph in adapters.graphs:
        opened = (graph.gate.mean() != 0 if graph.gate is not None else graph.kept)
        for l, (name, update) in enumerate(zip(graph.names, by_hand_updates(graph))):
            B, A = factors[name]
            assert B.dtype == A.dtype == deltas[name].dtype == torch.float32
            tolerance = 1e-5 * (1 + update.abs().max())
            assert ((B @ A).double() - update).abs().max() < tolerance
            assert (deltas[name].double() - update).abs().max() < tolerance
            assert A.shape[0] == int((opened[l] & graph.valid[l, :, None]).sum())    # merged rank


def test_merged_rank_is_r_times_one_plus_degree_while_all_gates_are_open():
    model, adapters = adapted(4, trained=False, edges="depth", rank=3, targets="v_proj")
    ranks = [A.shape[0] for _, A in adapters.factors().values()]
    assert ranks == [6, 9, 9, 6]


def test_pruned_directions_drop_out_of_the_dense_sum():
    _, adapters = adapted(4, budget=2.0)
    adapters.prune(1.0)
    for graph in adapters.graphs:
        for name, update in zip(graph.names, by_hand_updates(graph)):
            assert torch.allclose(adapters.deltas()[name].double(), update, atol=1e-4)


def test_every_message_has_its_own_gate():
    _, adapters = adapted(3, targets="q_proj", edges="depth", coordinator="uniform")
    graph = adapters.graphs[0]
    graph.gate.log_sigma.data.fill_(-9.0)
    before = adapters.deltas()
    with torch.no_grad():                            # how layer 1 filters what layer 2 sends
        graph.gate.mu[1, slot_of(graph, 1, 2)] += 1.0
    changed = {n for n, U in adapters.deltas().items() if not torch.equal(U, before[n])}
    assert changed == {"blocks.1.q_proj"}
    share = graph.rho / 2 * graph.config.alpha / 2
    assert torch.allclose(adapters.deltas()["blocks.1.q_proj"] - before["blocks.1.q_proj"],
                          share * graph.B[2].T @ graph.A[2], atol=1e-4)
