import math

import pytest
import torch

from helpers import adapted, by_hand_mixing, by_hand_updates, chain, inputs
from structlora import Config, attach, gram_matrix, kind_of, singular_values, truncate

KINDS = ("blocks.*.q_proj", "blocks.*.v_proj")
PER_LAYER = {"rate", "gate_mean", "kept", "effective_rank", "svd_coverage"}
PER_KIND = {"cosine_matrix", "mixing"}


def low_rank(d, k, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(d, rank, generator=generator), torch.randn(rank, k, generator=generator))


@pytest.mark.parametrize("gate", ("gaussian", "concrete", "none"))
@pytest.mark.parametrize("coordinator", ("attention", "none"))
def test_diagnostics_equal_dense_computations(gate, coordinator):
    model, adapters = adapted(4, gate=gate, coordinator=coordinator, rank=3)
    got = adapters.diagnostics()
    names = [name for graph in adapters.graphs for name in graph.names]
    drift, adjacent = 0.0, []
    for graph in adapters.graphs:
        updates = by_hand_updates(graph)
        vectors = torch.stack([u.flatten() for u in updates]).detach()
        drift += float((vectors[1:] - vectors[:-1]).square().sum())
        cosine = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=2)
        adjacent += cosine.diagonal(1).tolist()
        kind = kind_of(graph.names[0])
        assert torch.allclose(got["cosine_matrix"][kind].double(), cosine, atol=1e-5)
        assert torch.allclose(got["mixing"][kind].double(), by_hand_mixing(graph), atol=1e-5)
        for name, update in zip(graph.names, updates):
            values = torch.linalg.svdvals(update.detach())
            share, energy = values[values > 1e-9] / values.sum(), values.square()
            rank, coverage = (-(share * share.log()).sum()).exp(), energy[:3].sum() / energy.sum()
            if not update.any():                     # every gate of this layer is shut
                rank = coverage = 0.0
            assert got["effective_rank"][name] == pytest.approx(float(rank), rel=1e-3)
            assert got["svd_coverage"][name] == pytest.approx(float(coverage), rel=1e-4)
            assert got["kept"][name] == adapters.factors()[name][1].shape[0]
    assert got["drift_energy"] == pytest.approx(drift, rel=1e-4) and drift > 1
    assert got["update_cosine"] == pytest.approx(sum(adjacent) / len(adjacent), abs=1e-5)
    assert set(got) == PER_LAYER | PER_KIND | {"drift_energy", "update_cosine", "gradient_cosine"}
    for key in PER_LAYER:
        wanted = [] if gate == "none" and key in ("rate", "gate_mean") else names
        assert sorted(got[key]) == sorted(wanted), key
    assert all(tuple(got[key]) == KINDS for key in PER_KIND)


def test_rate_and_gate_mean_count_the_directions_that_exist():
    _, adapters = adapted(4, edges="depth", budget=3.0, beta=1.0)
    adapters.prune(0.7)
    got = adapters.diagnostics()
    for graph in adapters.graphs:
        for l, name in enumerate(graph.names):
            exists = graph.kept[l] & graph.valid[l, :, None]
            mu, sigma = graph.gate.mu[l][exists], graph.gate.log_sigma[l][exists].exp()
            rate = 0.5 * torch.log(1 + mu ** 2 / sigma ** 2)
            opened = torch.where(mu.abs() >= sigma, mu, 0.0)
            assert got["rate"][name] == pytest.approx(rate.sum().item(), rel=1e-4)
            mean = opened.sum().item() / max(1, len(mu))
            assert got["gate_mean"][name] == pytest.approx(mean, abs=1e-5)
    total = sum(got["rate"].values())
    adapters.penalty_calls = 10 ** 6
    assert adapters.penalty(100).item() == pytest.approx(total / 100, rel=1e-4)


def test_a_zero_update_gives_numbers_and_no_nan():
    adapters = attach(chain(), Config(rank=2))
    got = adapters.diagnostics()
    assert got["drift_energy"] == 0 and got["update_cosine"] == 0
    assert set(got["effective_rank"].values()) == {0.0}
    assert set(got["svd_coverage"].values()) == {0.0}
    assert not any(matrix.any() for matrix in got["cosine_matrix"].values())
    assert got["gradient_cosine"] is None            # no gradient was seen so far


def test_layers_with_nothing_left_give_numbers_and_no_nan():
    _, adapters = adapted(4, budget=0.3)
    adapters.prune(1.0)
    got = adapters.diagnostics()
    kept = got["kept"]
    assert sum(kept.values()) <= 2 and 0 in kept.values()
    for key in PER_LAYER:
        assert all(math.isfinite(value) for value in got[key].values()), key
    assert all(got[key][name] == 0 for name, count in kept.items() if count == 0
               for key in PER_LAYER)
    assert all(matrix.isfinite().all() for matrix in got["cosine_matrix"].values())


def test_one_layer_alone_has_no_adjacent_cosine():
    _, adapters = adapted(1, gate="none")
    got = adapters.diagnostics()
    assert got["update_cosine"] is None and got["gradient_cosine"] is None
    assert got["drift_energy"] == 0
    assert all(torch.allclose(m, torch.ones(1, 1)) for m in got["cosine_matrix"].values())


def test_identical_updates_have_no_drift_and_cosine_one():
    _, adapters = adapted(3, coordinator="none", gate="none")
    for graph in adapters.graphs:
        graph.A.data[:] = graph.A.data[0].clone()
        graph.B.data[:] = graph.B.data[0].clone()
    got = adapters.diagnostics()
    assert got["update_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert abs(got["drift_energy"]) < 1e-3
    for graph in adapters.graphs:
        graph.B.data[1] *= -1
    assert adapters.diagnostics()["update_cosine"] == pytest.approx(-1.0, abs=1e-5)


def test_gradient_cosine_is_that_of_the_dense_gradients_up_to_the_sketch():
    model, adapters = adapted(6, trained=False, targets="q_proj", gate="none", edges="similarity")
    layers = list(adapters.layers.values())
    for layer in layers:
        layer.base.weight.requires_grad_(True)
    model(inputs(50)).square().sum().backward()
    adapters.observe_gradients()
    graph = adapters.graphs[0]
    sketches = torch.stack([(graph.P.T @ m.base.weight.grad @ graph.Q).flatten() for m in layers])
    wanted = torch.nn.functional.cosine_similarity(sketches[1:], sketches[:-1])
    got = adapters.diagnostics()["gradient_cosine"]
    assert got == pytest.approx(float(wanted.mean()), abs=1e-3)
    gradients = torch.stack([m.base.weight.grad.flatten() for m in layers])
    exact = torch.nn.functional.cosine_similarity(gradients[1:], gradients[:-1]).mean()
    assert got == pytest.approx(float(exact), abs=0.4)           # 16 numbers stand for 60


def test_diagnostics_change_nothing():
    model, adapters = adapted(4, budget=2.0)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    adapters.diagnostics()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())
    assert not any(m.requires_grad for m in adapters.diagnostics()["mixing"].values())


def test_kind_of_replaces_numbers_alone():
    assert kind_of("model.layers.31.self_attn.q_proj") == "model.layers.*.self_attn.q_proj"
    assert kind_of("0.block2.10.v") == "*.block2.*.v"
    assert kind_of("head") == "head"


def test_gram_matrix_of_low_rank_updates_is_the_dense_one():
    factors = [low_rank(7, 9, rank, seed=rank) for rank in (1, 3, 0, 8)]
    dense = torch.stack([(B @ A).flatten() for B, A in factors])
    assert torch.allclose(gram_matrix(factors), dense @ dense.T, atol=1e-4)


@pytest.mark.parametrize("d,k,rank", ((7, 9, 3), (9, 7, 3), (4, 9, 8), (9, 4, 8), (3, 3, 12)))
def test_singular_values_and_truncation_equal_the_dense_svd(d, k, rank):
    B, A = low_rank(d, k, rank)
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    values = singular_values(B, A)
    assert torch.allclose(values, S[:len(values)], atol=1e-4)
    assert not (S[len(values):] > 1e-4).any()
    for cut in (1, 2):
        left, right = truncate(B, A, cut)
        assert left.shape == (d, cut) and right.shape == (cut, k)
        assert torch.allclose(left @ right, U[:, :cut] * S[:cut] @ Vh[:cut], atol=1e-4)
