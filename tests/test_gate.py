import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from helpers import Chain, adapted, chain, inputs, shake
from structlora import PENALTY_WARMUP, ConcreteGate, Config, GaussianGate, attach


def gaussian(mu, sigma, dtype=torch.float64):
    mu, sigma = torch.broadcast_tensors(torch.as_tensor(mu, dtype=dtype),
                                        torch.as_tensor(sigma, dtype=dtype))
    gate = GaussianGate((1, 1, mu.numel())).to(dtype)
    with torch.no_grad():
        gate.mu.copy_(mu.flatten())
        gate.log_sigma.copy_(sigma.log().flatten())
    return gate


def concrete(pi, prior=0.1, temperature=2 / 3, dtype=torch.float64):
    pi = torch.as_tensor(pi, dtype=dtype)
    gate = ConcreteGate((1, 1, pi.numel()), temperature, prior).to(dtype)
    gate.phi.data.copy_(torch.logit(pi).flatten())
    return gate


def draws(gate, n):
    # [n, directions]
    layer = tuple(t.detach() for t in gate.per_layer()[0])
    return gate.sample(layer, (n, gate.score().numel()))


def assert_gradient_is_finite_difference(gate, step=1e-6):
    torch.manual_seed(0)
    weight = torch.randn(gate.score().shape, dtype=torch.float64)
    (weight * gate.rate()).sum().backward()
    for parameter in gate.parameters():
        for index in range(parameter.numel()):
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[index] += sign * step
                    sides.append((weight * gate.rate()).sum().item())
                    parameter.view(-1)[index] -= sign * step
            difference = (sides[0] - sides[1]) / (2 * step)
            assert float(parameter.grad.view(-1)[index]) == pytest.approx(difference, abs=1e-7)


# --- Gaussian gate, equation 3


def test_gaussian_rate_is_the_closed_form():
    gate = gaussian([1.0, -2.0, 0.0, 0.3, 1.0], [0.1, 0.5, 1.0, 0.3, 1e-6])
    wanted = [0.5 * math.log(101), 0.5 * math.log(17), 0.0, 0.5 * math.log(2),
              0.5 * math.log(1e12 + 1)]
    assert gate.rate().flatten().tolist() == pytest.approx(wanted, rel=1e-12)
    assert GaussianGate((1, 1, 1)).rate().item() == pytest.approx(2.3076, abs=1e-4)


def test_gaussian_rate_keeps_its_precision_where_it_is_small():
    gate = gaussian([1e-5], [1.0], torch.float32)
    assert gate.rate().item() == pytest.approx(0.5e-10, rel=1e-4)


def test_gaussian_rate_depends_on_the_signal_to_noise_ratio_alone():
    once, ten_times = gaussian([0.5, -1.5], [0.2, 2.0]), gaussian([5.0, 15.0], [2.0, 20.0])
    assert torch.allclose(once.rate(), ten_times.rate(), rtol=1e-12)


def test_gaussian_rate_gradient_is_the_finite_difference():
    assert_gradient_is_finite_difference(gaussian([1.0, -2.0, 0.1, 0.7], [0.1, 0.5, 1.0, 3.0]))


def test_rate_is_the_kl_under_the_best_prior_variance():
    # KL(N(mu u, sigma^2 u^2) || N(0, xi u^2)): minimised over xi it is the rate, whatever u is.
    for mu, sigma in ((1.0, 0.1), (-0.7, 0.9), (0.05, 2.0)):
        rate = gaussian([mu], [sigma]).rate().item()
        for u in (0.01, 1.0, -3.0):
            xi = torch.logspace(-3, 3, 60001, dtype=torch.float64) * (mu ** 2 + sigma ** 2)
            z = Normal(torch.tensor(mu * u).double(), torch.tensor(abs(sigma * u)).double())
            divergences = kl_divergence(z, Normal(torch.zeros_like(xi), xi.sqrt() * abs(u)))
            assert float(divergences.min()) == pytest.approx(rate, abs=1e-6)
            best = float(xi[divergences.argmin()])
            assert best == pytest.approx(mu ** 2 + sigma ** 2, rel=1e-3)


def test_monte_carlo_estimate_of_the_kl_is_the_rate_plus_the_jensen_term():
    # Samples of z = m u with the gate's own m; fixed prior variance xi E u^2.
    torch.manual_seed(0)
    n, mu, sigma = 400_000, 0.8, 0.6
    gate = gaussian([mu], [sigma])
    u = torch.randn(n, dtype=torch.float64).mul(0.5).exp()       # log-normal: log E u^2 = 0.5
    z = draws(gate, n)[:, 0] * u
    prior = Normal(0.0, math.sqrt((mu ** 2 + sigma ** 2) * math.exp(0.5)))
    estimate = float((Normal(mu * u, sigma * u).log_prob(z) - prior.log_prob(z)).mean())
    jensen = 0.5 * (0.5 - 0.0)                                   # 1/2 (log E u^2 - E log u^2)
    assert estimate == pytest.approx(gate.rate().item() + jensen, abs=0.01)
    fixed = Normal(mu, sigma).log_prob(z / u) - Normal(0.0, math.hypot(mu, sigma)).log_prob(z / u)
    assert float(fixed.mean()) == pytest.approx(gate.rate().item(), abs=0.01)


def test_the_information_itself_stays_below_the_bound():
    torch.manual_seed(0)
    n, mu, sigma = 3000, 0.8, 0.6
    gate = gaussian([mu], [sigma])
    u = torch.randn(n, dtype=torch.float64).mul(0.5).exp()
    z = draws(gate, n)[:, 0] * u
    density = Normal(mu * u, sigma * u).log_prob(z[:, None])     # [z, u]
    information = density.diagonal().mean() - (density.logsumexp(1) - math.log(n)).mean()
    assert 0.05 < float(information) < gate.rate().item() + 0.25


def test_gaussian_draws_have_the_mean_and_deviation_of_the_gate():
    torch.manual_seed(0)
    gate = gaussian([1.0, -2.0, 0.0], [0.1, 0.5, 2.0])
    m = draws(gate, 100_000)
    assert torch.allclose(m.mean(0), gate.mu[0, 0], atol=0.02)
    assert torch.allclose(m.std(0), gate.log_sigma[0, 0].exp(), rtol=0.02)
    standard = (m - m.mean(0)) / m.std(0)
    assert torch.allclose((standard ** 4).mean(0), torch.tensor(3.0).double(), atol=0.1)


def test_draws_carry_gradients_to_mu_and_sigma():
    gate = gaussian([1.0, -2.0], [0.1, 0.5])
    torch.manual_seed(0)
    m = gate.sample(gate.per_layer()[0], (4, 2))
    noise = ((m - gate.mu[0]) / gate.log_sigma[0].exp()).detach()
    m.sum().backward()
    assert torch.allclose(gate.mu.grad[0, 0], torch.tensor([4.0, 4.0]).double())
    assert torch.allclose(gate.log_sigma.grad[0, 0],
                          noise.sum(0) * torch.tensor([0.1, 0.5]).double())


def test_gaussian_gate_is_shut_where_the_signal_is_below_the_noise():
    gate = gaussian([1.0, -1.0, 0.99, -2.0, 0.0, 3.0], [1.0, 1.0, 1.0, 1.99, 0.1, 3.01])
    assert gate.mean().flatten().tolist() == [1.0, -1.0, 0.0, -2.0, 0.0, 0.0]
    shut = gate.mean().flatten() == 0
    assert torch.equal(gate.rate().flatten() < 0.5 * math.log(2), shut)      # half a bit


# --- concrete gate, equation 9


def test_concrete_rate_is_the_bernoulli_kl():
    pi = torch.tensor([0.001, 0.1, 0.3, 0.5, 0.95, 0.999], dtype=torch.float64)
    for prior in (0.1, 0.5, 0.9):
        wanted = kl_divergence(Bernoulli(pi), Bernoulli(torch.full_like(pi, prior)))
        assert torch.allclose(concrete(pi, prior).rate().flatten(), wanted, rtol=1e-9, atol=1e-12)
    assert concrete([0.1]).rate().item() == pytest.approx(0.0, abs=1e-12)


def test_concrete_rate_is_finite_at_the_ends():
    gate = ConcreteGate((1, 1, 2))
    gate.phi.data.copy_(torch.tensor([200.0, -200.0]))
    rate = gate.rate()
    rate.sum().backward()
    assert rate.flatten().tolist() == pytest.approx([math.log(10), -math.log(0.9)], rel=1e-6)
    assert gate.phi.grad.isfinite().all()


def test_concrete_rate_gradient_is_the_finite_difference():
    assert_gradient_is_finite_difference(concrete([0.02, 0.1, 0.6, 0.97]))


@pytest.mark.parametrize("temperature", (0.1, 2 / 3, 3.0))
def test_concrete_draws_exceed_one_half_with_probability_pi_at_any_temperature(temperature):
    torch.manual_seed(0)
    pi = torch.tensor([0.05, 0.5, 0.8, 0.97], dtype=torch.float64)
    m = draws(concrete(pi, temperature=temperature), 100_000)
    assert m.min() >= 0 and m.max() <= 1
    assert torch.allclose((m > 0.5).double().mean(0), pi, atol=0.01)


def test_concrete_draws_become_bernoulli_as_the_temperature_falls():
    pi, inside, means = torch.tensor([0.2, 0.7], dtype=torch.float64), [], []
    for temperature in (1.0, 0.1, 0.01, 0.001):
        torch.manual_seed(0)
        m = draws(concrete(pi, temperature=temperature), 100_000)
        inside.append(float(((m > 0.01) & (m < 0.99)).double().mean()))
        means.append(m.mean(0))
    assert inside == sorted(inside, reverse=True) and inside[0] > 0.9 and inside[-1] < 0.005
    assert torch.allclose(means[-1], pi, atol=0.01)
    assert (means[0] - pi).abs().max() > 0.02        # warm gates are not Bernoulli: limit is real


def test_concrete_gate_is_shut_below_one_half():
    gate = concrete([0.2, 0.499, 0.5, 0.501, 0.9])
    assert gate.mean().flatten().tolist() == pytest.approx([0.0, 0.0, 0.5, 0.501, 0.9])


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_gates_stay_finite_and_centred(dtype):
    torch.manual_seed(0)
    for gate, mean in ((GaussianGate((1, 1, 1)), 1.0), (ConcreteGate((1, 1, 1)), None)):
        exact = float(draws(gate, 100_000).mean()) if mean is None else mean
        m = draws(gate.to(dtype), 100_000)
        assert m.dtype == dtype and m.isfinite().all()
        assert float(m.float().mean()) == pytest.approx(exact, abs=0.005)


# --- penalty, equation 4


def test_penalty_is_beta_times_the_rate_per_example_after_the_warmup():
    model, adapters = adapted(3, beta=0.7)
    total = sum((g.gate.rate() * g.valid[:, :, None]).sum().item() for g in adapters.graphs)
    for call in range(1, 2 * PENALTY_WARMUP):
        wanted = 0.7 * min(1.0, call / PENALTY_WARMUP) * total / 1234
        assert adapters.penalty(1234).item() == pytest.approx(wanted, rel=1e-5)


def test_penalty_gradient_is_the_gradient_of_the_rate_over_n():
    model, adapters = adapted(3, gate="concrete", beta=1.0)
    adapters.penalty_calls = PENALTY_WARMUP
    graph = adapters.graphs[0]
    (10 * adapters.penalty(10)).backward()
    wanted, = torch.autograd.grad((graph.gate.rate() * graph.valid[:, :, None]).sum(),
                                  graph.gate.phi)
    assert torch.allclose(graph.gate.phi.grad, wanted, rtol=1e-5) and wanted.any()
    assert all(p.grad is None for n, p in graph.named_parameters() if n != "gate.phi")


def test_messages_from_nobody_are_not_charged():
    # The ends of the chain have one neighbour: 2 (L - 1) + L messages, not 3 L.
    adapters = attach(chain(4), Config(rank=2, edges="depth", targets="q_proj", beta=1.0))
    adapters.penalty_calls = PENALTY_WARMUP
    wanted = (2 * 3 + 4) * 2 * 0.5 * math.log(101)
    assert adapters.penalty(1).item() == pytest.approx(wanted, rel=1e-5)


def test_penalty_is_a_zero_tensor_without_a_gate():
    model, adapters = adapted(3, gate="none")
    penalty = adapters.penalty(10)
    assert isinstance(penalty, torch.Tensor) and penalty.shape == () and penalty == 0
    (model(inputs()).sum() + penalty).backward()


# --- budget, equation 8


def kept_scores(adapters):
    # (score, kept) of every direction there is, all layers of all kinds
    pairs = []
    for graph in adapters.graphs:
        for l, s in graph.valid.nonzero().tolist():
            pairs += zip(graph.gate.score()[l, s].tolist(), graph.kept[l, s].tolist())
    return pairs


@pytest.mark.parametrize("gate", ("gaussian", "concrete"))
@pytest.mark.parametrize("edges,hops", (("depth", 1), ("hybrid", 1), ("random", 2)))
@pytest.mark.parametrize("budget", (0.5, 2, 3.3))
def test_budget_is_reached_exactly_and_keeps_what_a_sort_by_hand_keeps(gate, edges, hops, budget):
    _, adapters = adapted(4, gate=gate, edges=edges, hops=hops, budget=budget)
    adapters.prune(1.0)
    pairs = sorted(kept_scores(adapters), reverse=True)
    count = round(budget * 8)                        # 4 layers of each of two kinds
    assert [kept for _, kept in pairs] == [True] * count + [False] * (len(pairs) - count)
    assert sum(int(g.kept.sum()) for g in adapters.graphs) == count


def test_scores_of_one_kind_can_take_the_whole_budget():
    _, adapters = adapted(3, budget=1.0)
    adapters.graphs[0].gate.mu.data.fill_(1e-3)
    adapters.graphs[1].gate.mu.data.fill_(10.0)
    adapters.graphs[1].gate.log_sigma.data.fill_(0.0)
    adapters.prune(1.0)
    assert not adapters.graphs[0].kept.any() and adapters.graphs[1].kept.sum() == 6


def test_ties_do_not_break_the_budget():
    adapters = attach(chain(5), Config(rank=2, budget=1.4))      # at the start all scores are equal
    for progress in torch.linspace(0, 1, 23).tolist():
        adapters.prune(progress)
    assert sum(int(g.kept.sum()) for g in adapters.graphs) == 14
    assert all(not (g.kept & ~g.valid[:, :, None]).any() for g in adapters.graphs)


def test_schedule_is_cubic_starts_at_40_percent_and_ends_at_80():
    _, adapters = adapted(4, budget=1.0, edges="depth")
    candidates, target = 2 * (4 + 2 * 3) * 2, 8
    left = lambda: sum(int(g.present().sum()) for g in adapters.graphs)
    counts = []
    for percent in range(0, 101, 5):
        adapters.prune(percent / 100)
        counts.append(left())
        if percent <= 40:
            assert counts[-1] == candidates
        remaining = (max(0, 80 - max(40, percent)) / 40) ** 3
        wanted = target + (candidates - target) * remaining
        assert wanted - 1e-3 <= counts[-1] <= wanted + 1         # rounded up
        if percent >= 80:
            assert counts[-1] == target
    assert counts == sorted(counts, reverse=True) and len(set(counts)) > 6


def test_a_removed_direction_never_returns():
    _, adapters = adapted(4, budget=2.0)
    adapters.prune(0.6)
    before = [g.kept.clone() for g in adapters.graphs]
    for graph in adapters.graphs:                    # turn the ranking upside down
        graph.gate.mu.data.copy_(1 / graph.gate.mu.data)
    adapters.prune(0.7)
    assert not any((g.kept & ~b).any() for g, b in zip(adapters.graphs, before))
    left = [g.kept.clone() for g in adapters.graphs]
    adapters.prune(0.5)                              # progress that goes back brings nothing back
    assert all(torch.equal(g.kept, b) for g, b in zip(adapters.graphs, left))


def test_nothing_is_removed_without_a_budget_and_a_large_budget_removes_nothing():
    for budget in (None, 1000.0):
        _, adapters = adapted(3, budget=budget)
        adapters.prune(1.0)
        assert all(g.present().sum() == g.valid.sum() * 2 for g in adapters.graphs)


def test_merged_rank_falls_to_the_budget_and_removed_directions_are_gone():
    model, adapters = adapted(4, budget=1.5)
    for graph in adapters.graphs:
        graph.gate.log_sigma.data.fill_(-9.0)        # all open: only the budget removes
    ranks = lambda: sum(A.shape[0] for _, A in adapters.factors().values())
    assert ranks() > 12
    adapters.prune(1.0)
    assert ranks() == 12                             # 1.5 times 8 layers
    kept = adapters.deltas()
    for graph in adapters.graphs:                    # what was removed has no say any more
        graph.gate.mu.data[~graph.kept] = 1e3
    assert all(torch.equal(update, kept[name]) for name, update in adapters.deltas().items())
    x = inputs()
    model.eval()
    before = model(x)
    assert torch.allclose(adapters.merge()(x), before, atol=1e-5)


def test_removed_directions_are_removed_from_the_training_forward_and_the_rate_too():
    model, adapters = adapted(3, budget=0.01)        # rounds to none
    adapters.prune(1.0)
    adapters.penalty_calls = PENALTY_WARMUP
    assert adapters.penalty(1) == 0 and not any(g.kept.any() for g in adapters.graphs)
    model.train()
    assert torch.equal(model(inputs()), chain(3)(inputs()))


def test_edges_stay_where_they_are_once_directions_were_removed():
    model, adapters = adapted(6, budget=2.0, edges="similarity")
    adapters.prune(0.7)
    before = [g.neighbours.clone() for g in adapters.graphs]
    torch.manual_seed(5)
    for graph in adapters.graphs:
        graph.gradient_sum.normal_(std=1e6)
    adapters.observe_gradients()
    assert all(torch.equal(g.neighbours, b) for g, b in zip(adapters.graphs, before))
    free_model, free = adapted(6, edges="similarity")            # without pruning they would move
    torch.manual_seed(5)
    for graph in free.graphs:
        graph.gradient_sum.normal_(std=1e6)
    free.observe_gradients()
    assert any(not torch.equal(g.neighbours, b) for g, b in zip(free.graphs, before))


def test_pruning_takes_effect_in_a_part_called_without_the_model():
    model, adapters = adapted(3, budget=0.01)
    model.eval()
    part, x = model.blocks[1], inputs()
    with torch.no_grad():
        part(x)
        adapters.prune(1.0)
        assert torch.equal(part(x), chain(3).blocks[1](x))


def test_a_budget_needs_a_gate():
    with pytest.raises(ValueError, match="budget.*gate"):
        attach(chain(), Config(rank=2, gate="none", budget=2.0))


def test_training_with_a_gate_shuts_directions_that_carry_nothing():
    # Pure penalty, no task: every direction must lose its signal and the gate must shut.
    torch.manual_seed(0)
    model = Chain(2)
    adapters = attach(model, Config(rank=2))
    shake(adapters)
    optimizer = torch.optim.Adam(adapters.param_groups(1e-2, gate_lr=0.1))
    start = sum(g.rates().sum().item() for g in adapters.graphs)
    for _ in range(100):
        optimizer.zero_grad()
        adapters.penalty(1).backward()
        optimizer.step()
    assert sum(g.rates().sum().item() for g in adapters.graphs) < 0.01 * start
    assert all(A.shape[0] == 0 for _, A in adapters.factors().values())
