"""The method against equations 1 to 9, worked by hand, dense, or by finite differences."""

import copy
import math
import re
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import structlora
from helpers import (COORDINATORS, EDGES, GATES, Block, Chain, Checkpointed, Fan, adapted,
                     assert_same, by_hand_mixing, by_hand_updates, chain, inputs, open_gates,
                     senders, shake)
from structlora import (BETA_WARMUP, EDGES_SETTLE, GRADIENT_DECAY, Config, attach, gate_draw,
                        gate_mean, gate_rate, gate_strength)

DOUBLE = {"dtype": torch.float64}


def test_the_worked_example_of_the_readme_prints_what_stands_there(capsys):
    text = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    block = r"```python\n([^`]*dW1[^`]*)```\n.*?```\n(.*?)```"
    code, printed = re.search(block, text, re.S).groups()
    with pytest.warns(UserWarning, match="never called"):
        exec(code, {})
    assert capsys.readouterr().out == printed


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def all_updates(adapters, gates=open_gates):
    """name -> s dW of all layers, by hand."""
    updates = {}
    for graph in adapters.graphs:
        opened = [gates(layer) for layer in graph.layers]
        updates |= zip(graph.names, by_hand_updates(graph, opened))
    return updates


def dense(plain, updates, x):
    """`plain` with W0 + s dW in place of W0, as one differentiable function in float64."""
    plain = plain.double()
    weights = {f"{name}.weight": plain.get_submodule(name).weight.detach() + update
               for name, update in updates.items()}
    return functional_call(plain, weights, (x.double(),))


def mixing(graph):
    """M as the layers use it, [L, L]."""
    senders = graph.senders()
    M = graph.mixing(senders, *graph.collect_factors(), graph.collect_gates())
    return torch.einsum("ls,lsj->lj", M, senders).detach()


# --- Layer, equations 1 and 7

@pytest.mark.parametrize("gate,coordinator,edges", [*product(GATES, COORDINATORS, EDGES)])
def test_the_output_is_bit_equal_before_the_first_step(gate, coordinator, edges):
    config = Config(rank=2, gate=gate, coordinator=coordinator, edges=edges)
    for training, half, autocast in product((True, False), repeat=3):
        dtype = torch.bfloat16 if half else torch.float32
        model, x = chain(4).to(dtype).train(training), inputs(dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            before = model(x)
            attach(model, config)
            assert torch.equal(model(x), before)


def test_a_starts_uniform_within_one_over_root_k_and_b_at_zero():
    torch.manual_seed(0)
    model = Chain(3, width=100, hidden=90)
    attach(model, Config(rank=40, targets="q_proj"))
    A, B = model.blocks[0].q_proj.lora.A.detach(), model.blocks[0].q_proj.lora.B
    assert 0.0999 < A.abs().max() <= 0.1 and abs(A.mean().item()) < 0.003 and not B.any()
    assert A.std().item() == pytest.approx(0.1 / 3 ** 0.5, rel=0.03)


@pytest.mark.parametrize("gate,coordinator,edges", [*product(GATES, COORDINATORS, EDGES)])
def test_mixing_factors_and_outputs_are_the_sums_of_equations_1_5_and_6(gate, coordinator, edges):
    model, adapters = adapted(4, gate=gate, coordinator=coordinator, edges=edges)
    updates, factors, x = all_updates(adapters), adapters.factors(), inputs()
    for graph in adapters.graphs:
        assert torch.allclose(mixing(graph).double(), by_hand_mixing(graph), rtol=1e-4, atol=1e-5)
        assert torch.equal(mixing(graph), torch.eye(4)) == (coordinator == "none")
        for name, layer, row in zip(graph.names, graph.layers, graph.senders()):
            (B, A), scale = factors[name], 1 + updates[name].abs().max()
            assert ((B @ A).double() - updates[name]).abs().max() < 1e-5 * scale
            opened = (open_gates(layer) != 0) * row.sum(1, keepdim=True)
            assert A.shape[0] == opened.sum()                    # the merged rank
    wanted = dense(chain(4), updates, x)
    for output in (model.eval()(x), adapters.merge()(x)):
        assert (output - wanted).abs().max() < 1e-5 * (1 + wanted.abs().max())
    assert (wanted - chain(4)(x)).abs().max() > 0.1              # the update does something


@pytest.mark.parametrize("gate,coordinator,edges", [*product(GATES[:2], COORDINATORS[:2], EDGES)])
def test_training_gradients_are_those_of_the_dense_model(gate, coordinator, edges, monkeypatch):
    model, adapters = adapted(5, rank=3, gate=gate, coordinator=coordinator, edges=edges)
    plain, x = chain(5), inputs(**DOUBLE)
    weight = torch.linspace(-1, 1, 5 * 3 * 4, **DOUBLE).view(5, 3, 4)

    def half(shape, device=None, dtype=None):
        return torch.full(shape, 0.5, device=device, dtype=dtype)

    def gates(layer):                                # what they are with such random numbers
        if gate == "concrete":
            return torch.sigmoid(layer.gate["phi"] * 1.5)        # temperature 2/3, logit 0
        return layer.gate["mu"] + 0.5 * layer.gate["log_sigma"].exp()
    monkeypatch.setattr(torch, "randn", half)
    monkeypatch.setattr(torch, "rand", half)
    output = model.double()(x)
    (output * weight).sum().backward()
    got = gradients(model)
    model.zero_grad()
    wanted_output = dense(plain, all_updates(adapters, gates), x)
    assert torch.allclose(output, wanted_output, rtol=1e-8)
    (wanted_output * weight).sum().backward()
    for name, value in gradients(model).items():
        assert (got.pop(name) - value).abs().max() <= 1e-8 * value.abs().max() + 1e-12, name
        # w_src shifts a whole row of e alike: softmax sees it through the LeakyReLU only; and a
        # row of one edge has a share of 1, whatever e is.
        assert value.any() or name.endswith("w_src") or edges == "similarity", name
    assert all(name.endswith("probe") for name in got)


def test_dropout_acts_on_the_update_alone_and_in_training_alone():
    model, adapters = adapted(2, gate="none", coordinator="none", dropout=0.5)
    layer, x = model.blocks[0].q_proj, torch.randn(40, 6)
    delta, base = adapters.deltas()["blocks.0.q_proj"], F.linear(x, layer.weight, layer.bias)
    assert torch.allclose(layer.eval()(x), base + x @ delta.T, atol=1e-5)
    torch.manual_seed(3)
    noisy = layer.train()(x)
    torch.manual_seed(3)
    assert torch.allclose(noisy, base + F.dropout(x, 0.5) @ delta.T, atol=1e-5)


def test_inputs_of_one_to_four_dimensions_agree():
    model, _ = adapted(2)
    x, whole = inputs(4, 3), model.eval()(inputs(4, 3))
    assert torch.allclose(model(x.view(2, 2, 3, 6)), whole.view(2, 2, 3, 4), atol=1e-5)
    for shape in ((6,), (4, 6), (4, 3, 6), (2, 2, 3, 6), (0, 3, 6)):
        assert model.train()(torch.ones(shape)).shape == (*shape[:-1], 4)


def test_a_model_cast_before_attach_keeps_fp32_adapters():
    model = chain().bfloat16()
    adapters = shake(attach(model, Config(rank=2, alpha=3.0)))
    model.blocks[1].float()                          # layers of one kind may differ in dtype
    exact, reference = adapted(3)
    reference.load_state(adapters.state())
    for part, same, dtype in ((model.eval().blocks[0], exact.eval().blocks[0], torch.bfloat16),
                              (model.blocks[1], exact.blocks[1], torch.float32)):
        output, wanted = part(inputs(dtype=dtype)), same(inputs())
        assert output.dtype == dtype
        assert (output - wanted).abs().max() < 0.05 * wanted.abs().max()
        output.float().square().mean().backward()
    got = gradients(model).values()
    assert got and all(g.dtype == torch.float32 and g.isfinite().all() for g in got)


@pytest.mark.parametrize("dtype,edges", [*product((torch.bfloat16, torch.float16), EDGES)])
def test_autocast_trains_fp32_adapters_through_half_precision_products(dtype, edges):
    model, adapters = adapted(3, edges=edges)
    exact = model.eval()(inputs())
    with torch.autocast("cpu", dtype):
        output = model(inputs())
        loss = model.train()(inputs()).float().square().mean()
    (loss + adapters.penalty(10)).backward()
    assert output.dtype == dtype and (output - exact).abs().max() < 0.05 * exact.abs().max()
    for parameter in adapters.param_groups(1.0)[0]["params"]:
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
    assert torch.equal(model.eval()(inputs()), exact)            # nothing of it is left


@pytest.mark.parametrize("gate,training", [*product(GATES, (True, False))])
def test_nothing_as_large_as_a_weight_is_kept_for_the_backward_pass(gate, training):
    d, k, r, S, sizes = 211, 197, 2, 4, []
    model = Chain(3, width=k, hidden=d)
    frozen = {p.data_ptr() for p in model.parameters()}
    attach(model.train(training), Config(rank=r, gate=gate))

    def note(t):
        sizes.append(0 if t.data_ptr() in frozen else t.numel())
        return t
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(torch.randn(2, 2, k))
    assert S * r * k <= max(sizes) <= 3 * (S * r + 4) * d < d * k / 4


def test_one_draw_per_sample_and_direction_not_per_token():
    model, _ = adapted(2, coordinator="none", rank=3, alpha=3)
    layer, mu, sigma = model.blocks[0].q_proj, torch.tensor([1., -2, .5]), torch.tensor([.1, 1, 3])
    with torch.no_grad():                            # direction i alone reaches output i: u = 6
        layer.lora.A.fill_(1.0)
        layer.lora.B.copy_(torch.eye(10, 3))
        layer.lora.gate["mu"].copy_(mu[None])
        layer.lora.gate["log_sigma"].copy_(sigma.log()[None])
        x = torch.ones(20000, 2, 6)
        m = (layer(x) - F.linear(x, layer.weight, layer.bias))[..., :3] / 6   # [N, T, r]
    assert torch.allclose(m[:, 0], m[:, 1], atol=1e-4)
    m = m[:, 0]
    assert torch.allclose(m.mean(0), mu, atol=0.1) and torch.allclose(m.std(0), sigma, rtol=0.03)
    assert (torch.corrcoef(m.T) - torch.eye(3)).abs().max() < 0.05   # directions are independent
    assert abs(torch.corrcoef(torch.stack([m[1:, 2], m[:-1, 2]]))[0, 1]) < 0.05      # and samples
    assert len(layer(torch.ones(50, 6))[:, 0].unique()) == 50    # also those of two dimensions


# --- Forward passes: checkpointed, repeated, of parts, transformed, compiled

def loss_of_several_passes(model):
    """Of two and of a part, with a validation before the backward pass."""
    part = model.blocks[1]
    if isinstance(model, Checkpointed):
        y = checkpoint(part, inputs(seed=9), use_reentrant=False)
    else:
        y = part(inputs(seed=9))
    loss = sum(output.square().mean() for output in (model(inputs()), model(inputs(seed=8)), y))
    with torch.no_grad():
        model.eval()(inputs(seed=7))
    model.train()
    return loss


@pytest.mark.parametrize("gate,edges", [*product(GATES, ("hybrid", "all"))])
def test_checkpoints_change_neither_loss_nor_gradients(gate, edges):
    results = []
    for kind in (Chain, Checkpointed):
        model, _ = adapted(3, gate=gate, edges=edges, dropout=0.3)
        model.__class__ = kind
        torch.manual_seed(11)
        loss = loss_of_several_passes(model)
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(model)})
    assert_same(*results)                            # the probes' gradients are among them
    assert any(name.endswith("probe") for name in results[0]) == (edges == "hybrid")


def test_passes_of_the_model_and_of_parts_can_have_a_backward_each_or_one_together():
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block(), Block()), inputs()        # as a root may be
    adapters = attach(model, Config(rank=2, gate="none"))
    for layer in adapters.layers.values():
        layer.B.data.normal_()
    first, second = model(x).sum(), model[1](x).square().sum()
    first.backward(retain_graph=True)
    second.backward()
    first.backward()
    got = gradients(model)
    model.zero_grad()
    (2 * model(x).sum() + model[1](x).square().sum()).backward()
    for name, wanted in gradients(model).items():
        assert torch.allclose(got[name], wanted, rtol=1e-4, atol=1e-4), name
    output = nn.Sequential(model, nn.Identity())(x)              # and may be wrapped
    assert torch.allclose(adapters.merge()(x), output, rtol=1e-4, atol=1e-4) and len(model) == 3


def test_a_part_follows_the_parameters_whatever_ran_before():
    model, adapters = adapted(3, edges="hybrid")
    x, part = inputs(**DOUBLE), model.double().blocks[1]

    def check():
        plain, results = copy.deepcopy(adapters).merge().blocks[1], []
        model.eval()
        model.zero_grad()
        for block in (part, copy.deepcopy(model).blocks[1]):     # a copy has computed nothing yet
            y = block(x)
            y.square().sum().backward()
            results.append({"y": y.detach(), **gradients(block)})
        assert_same(*results)
        assert len(results[0]) == 9 and torch.allclose(y, plain(x), rtol=1e-7, atol=1e-9)
        model.train()

    with torch.inference_mode():
        model(x), part(x)
    check()
    vmap(model, randomness="different")(x), vmap(part, randomness="different")(x)
    check()
    assert grad(lambda x: part(x).sum() + model(x).sum())(x).any()
    check()
    with torch.autocast("cpu", torch.bfloat16):
        model(x), part(x)
    check()
    with pytest.raises(RuntimeError):
        model(x[..., :5])                            # a pass that fails
    check()
    model.float()(inputs()).square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01).step()
    model.double()
    check()
    model.load_state_dict(adapted(3, seed=4, edges="hybrid")[0].state_dict())
    check()


@pytest.mark.filterwarnings("ignore")                # jit.trace is deprecated, and says so
@pytest.mark.parametrize("edges", ("hybrid", "all"))
def test_export_trace_and_vmap_over_samples_and_over_experiments(edges):
    model, _ = adapted(3, edges=edges)
    x, z, wanted = inputs(**DOUBLE), inputs(seed=8), model.eval()(inputs(seed=8))
    exported = torch.export.export(model, (inputs(),), strict=False).module()
    for other in (exported, torch.jit.trace(model, inputs())):   # fused on some processors
        assert torch.allclose(other(z), wanted, rtol=1e-4, atol=1e-4)
    assert torch.allclose(vmap(model.double())(x), model(x), rtol=1e-9)
    trainable = {n: p.detach() for n, p in model.named_parameters()
                 if p.requires_grad and not n.endswith("probe")}
    many = {name: torch.stack([p, 1.5 * p, -p]) for name, p in trainable.items()}

    def loss(parameters):
        return functional_call(model, parameters, x).square().mean()
    together = vmap(grad(loss))(many)
    for index in range(3):
        model.load_state_dict({name: p[index] for name, p in many.items()}, strict=False)
        model.zero_grad()
        model(x).square().mean().backward()
        alone = gradients(model)
        for name, gradient in together.items():      # sigma has none in eval mode
            wanted = alone.get(name, torch.zeros_like(gradient[index]))
            assert torch.allclose(gradient[index], wanted, rtol=1e-7, atol=1e-12), name


@pytest.mark.parametrize("backend,edges", [*product(("eager", "aot_eager"), ("hybrid", "all"))])
def test_a_compiled_model_trains_as_the_eager_one_and_recompiles_once(backend, edges):
    counter, results, started = CompileCounterWithBackend(backend), [], 0
    for compiled in (False, True):
        torch._dynamo.reset()
        model = chain(2)
        adapters = attach(model, Config(rank=2, edges=edges))
        optimizer = torch.optim.AdamW(adapters.param_groups(1e-2))
        call = torch.compile(model, backend=counter) if compiled else model
        for step in range(14):
            torch.manual_seed(step)
            loss = call(inputs(seed=step)).square().mean() + adapters.penalty(100)
            loss.backward()
            adapters.observe_gradients()
            optimizer.step()
            optimizer.zero_grad()
            started = started or counter.frame_count
        results.append(dict(model.named_parameters()) | {"loss": loss.detach()})
    assert_same(*results)
    assert 0 < started < counter.frame_count <= 2 * started      # when the probes end


# --- Gates, equations 3 and 9

def gaussian(mu, sigma, dtype=torch.float64):
    mu, sigma = torch.tensor(mu, dtype=dtype), torch.tensor(sigma, dtype=dtype)
    return {"mu": mu, "log_sigma": sigma.log()}


def test_gaussian_rate_is_the_kl_under_the_best_prior_variance():
    # KL(N(mu u, sigma^2 u^2) || N(0, xi u^2)): minimised over xi it is the rate, whatever u is.
    for mu, sigma, u in product((1.0, -0.7, 0.05), (0.1, 2.0), (0.01, 3.0)):
        best = mu ** 2 + sigma ** 2
        xi = torch.logspace(-3, 3, 60001, **DOUBLE) * best
        z = Normal(torch.tensor(mu * u, **DOUBLE), torch.tensor(sigma * u, **DOUBLE))
        divergences = kl_divergence(z, Normal(torch.zeros_like(xi), xi.sqrt() * u))
        rate = gate_rate(gaussian([mu], [sigma])).item()
        assert divergences.min().item() == pytest.approx(rate, abs=1e-6)
        assert xi[divergences.argmin()].item() == pytest.approx(best, rel=1e-3)
    gates = gaussian([1.0, 10.0, 0.0, 1e-5, 1.0], [0.1, 1.0, 1.0, 1.0, 1e-6], dtype=torch.float32)
    wanted = [0.5 * math.log(101), 0.5 * math.log(101), 0.0, 0.5e-10, 6 * math.log(10)]
    assert gate_rate(gates).tolist() == pytest.approx(wanted, rel=1e-5)


def test_gates_are_shut_where_the_signal_is_below_the_noise_or_pi_below_one_half():
    gates = gaussian([1.0, -1.0, 0.99, -2.0, 0.0, 3.0], [1.0, 1.0, 1.0, 1.99, 0.1, 3.01])
    assert gate_mean(gates).tolist() == [1.0, -1.0, 0.0, -2.0, 0.0, 0.0]
    assert torch.equal(gate_rate(gates) < 0.5 * math.log(2), gate_mean(gates) == 0)  # half a bit
    gates = {"phi": torch.logit(torch.tensor([0.2, 0.499, 0.5, 0.501, 0.9], **DOUBLE))}
    assert gate_mean(gates).tolist() == pytest.approx([0.0, 0.0, 0.5, 0.501, 0.9])


def test_concrete_rate_is_the_bernoulli_kl_also_at_the_ends(monkeypatch):
    pi = torch.tensor([0.001, 0.1, 0.3, 0.5, 0.95, 0.999], **DOUBLE)
    for prior in (0.5, 0.9, 0.1):
        monkeypatch.setattr(structlora, "PRIOR", prior)
        wanted = kl_divergence(Bernoulli(pi), Bernoulli(torch.full_like(pi, prior)))
        assert torch.allclose(gate_rate({"phi": torch.logit(pi)}), wanted, rtol=1e-9, atol=1e-12)
    phi = torch.tensor([200.0, -200.0]).requires_grad_()
    rate = gate_rate({"phi": phi})
    rate.sum().backward()
    assert rate.tolist() == pytest.approx([math.log(10), -math.log(0.9)], rel=1e-6)
    assert phi.grad.isfinite().all()


def test_concrete_draws_exceed_one_half_with_probability_pi_and_become_bernoulli(monkeypatch):
    pi, between = torch.tensor([0.05, 0.5, 0.8, 0.97], **DOUBLE), []
    for temperature in (3.0, 2 / 3, 0.1, 0.001):
        monkeypatch.setattr(structlora, "TEMPERATURE", temperature)
        torch.manual_seed(0)
        m = gate_draw((torch.logit(pi),), 100_000)[:, 0]
        assert m.min() >= 0 and m.max() <= 1
        assert torch.allclose((m > 0.5).double().mean(0), pi, atol=0.01)
        between.append(((m > 0.01) & (m < 0.99)).double().mean().item())
    assert between == sorted(between, reverse=True) and between[0] > 0.8 and between[-1] < 0.005


# --- Coordinator, equations 5 and 6

def graph_of(layers, seed=0, **config):
    """The graph of a Fan of `layers` with adapters, at its initial values, and the adapters."""
    torch.manual_seed(seed)
    config = {"rank": 2, "gate": "none", "targets": "q_proj", **config}
    adapters = attach(Fan(layers), Config(**config))
    return adapters.graphs[0], adapters


def test_mixing_of_a_chain_of_three_worked_by_hand():
    graph, _ = graph_of(3, coordinator="uniform", edges="depth")
    graph.rho.data.fill_(0.5)
    assert torch.equal(mixing(graph), torch.tensor([[1, .5, 0], [.25, 1, .25], [0, .5, 1]]))
    graph, _ = graph_of(3, rank=1, edges="depth")
    with torch.no_grad():
        # P and Q pick the first four coordinates; U_ll has a single 5 there, so that h_l is the
        # unit vector number 0, 5 and 2 of the 16: only its direction counts.
        graph.P.copy_(torch.eye(7, 4))
        graph.Q.copy_(torch.eye(6, 4))
        for layer, (row, column) in zip(graph.layers, ((0, 0), (1, 1), (0, 2))):
            layer.A.copy_(torch.eye(6)[None, column])
            layer.B.copy_(5 * torch.eye(7)[:, row, None])
        graph.w_src[5] = 1.0                         # of the receiver, layer 1
        graph.w_dst[0], graph.w_dst[2] = 0.5, -3.0   # of the senders, layers 0 and 2
        graph.rho.fill_(2.0)
    left, right = math.exp(1.5), math.exp(0.2 * -2.0)        # LeakyReLU(1 + .5), LeakyReLU(1 - 3)
    share = left / (left + right)
    wanted = torch.tensor([[1, 2, 0], [2 * share, 1, 2 * (1 - share)], [0, 2, 1]])
    assert torch.allclose(mixing(graph), wanted, atol=1e-6)


def test_edges_and_mixing_before_the_first_gradient():
    chain_of_four = [{1}, {0, 2}, {1, 3}, {2}]
    for edges, near in (("depth", chain_of_four), ("hybrid", chain_of_four),
                        ("similarity", [set()] * 4),
                        ("all", [{1, 2, 3}, {0, 2, 3}, {0, 1, 3}, {0, 1, 2}])):
        graph, _ = graph_of(4, edges=edges)
        other, _ = graph_of(4, edges=edges, coordinator="uniform")
        graph.layers[0].B.data.normal_()
        assert senders(graph) == senders(other) == near
        assert torch.equal(mixing(graph), mixing(other))         # starts as the plain average
        assert graph.rho == other.rho == (3 if edges == "all" else 1)
        with pytest.warns(UserWarning, match="no layer has a neighbour"):
            alone, _ = graph_of(1, edges=edges)                  # is plain LoRA
        assert torch.equal(mixing(alone), torch.eye(1)) and not list(alone.parameters())


def test_edges_all_hear_everyone_at_random_signs():
    first, graph = (graph_of(12, seed, edges="all")[0] for seed in (0, 1))
    for name in ("signs", "P", "Q"):                 # are the same in every run
        assert torch.equal(first.get_buffer(name), graph.get_buffer(name))
    assert (graph.signs.diagonal() == 1).all() and (graph.signs.abs() == 1).all()
    assert abs(graph.signs.sum().item() - 2 * 12) < 4 * math.sqrt(2 * 12 * 11)       # 4 deviations


# --- Probes and similarity edges

def with_gradients(adapters, wanted):
    """A backward pass in which layer l of a Fan gets the gradient wanted[l] [7, 6]."""
    (adapters.model(torch.eye(6)) * wanted.mT).sum().backward()  # dL/dW = (dL/dy)^T x


@pytest.mark.parametrize("gate,edges", [*product(GATES, EDGES)])
def test_a_probe_has_the_sketch_of_the_dense_gradient(gate, edges):
    model = chain(4)
    adapters = attach(model, Config(rank=2, gate=gate, edges=edges))
    for name, layer in adapters.layers.items():
        layer.B.data.normal_()
        model.get_submodule(name).weight.requires_grad_(True)    # dL/dW0 is dL/dW
    for tokens in (3, 0):                            # micro-batches add up, as gradients do
        model(inputs(tokens=tokens)).square().sum().backward()
        for name, layer in adapters.layers.items():
            wanted = layer.graph.P.T @ model.get_submodule(name).weight.grad @ layer.graph.Q
            error = (layer.probe.grad - wanted).abs().max()
            assert error < 1e-3 * wanted.abs().max()
    output = model.eval()(inputs())
    for layer in adapters.layers.values():
        layer.probe.data.normal_()
    assert torch.allclose(model(inputs()), output, rtol=1e-5)    # its value does not count


def test_similarity_edges_point_to_the_most_similar_gradient_of_all_but_neighbours():
    torch.manual_seed(0)
    # Pairs 0-3, 1-4 and 2-5 are alike up to scale and noise. 6 is the opposite of 0 and 3, and its
    # match 7 is its neighbour in depth.
    base = torch.randn(3, 7, 6)
    wanted = torch.cat([base, 5 * base, -base[:1], -2 * base[:1]])
    wanted = wanted + 0.02 * torch.randn_like(wanted)
    for edges in ("similarity", "hybrid"):
        graph, adapters = graph_of(8, edges=edges)
        near = [{l - 1, l + 1} & set(range(8)) if edges == "hybrid" else set() for l in range(8)]
        with_gradients(adapters, wanted)
        adapters.observe_gradients()
        chosen = [senders(graph)[l] - near[l] for l in range(8)]
        assert chosen[:6] == [{3}, {4}, {5}, {0}, {1}, {2}]
        assert chosen[6:] == [{7}, {6}] or edges == "hybrid"
        assert all(near[l] <= senders(graph)[l] and len(chosen[l]) == 1 for l in range(8))
        assert not chosen[6] & {0, 3}
    _, adapters = adapted(3, edges="hybrid")                 # nobody is left for the middle one
    for graph in adapters.graphs:
        assert senders(graph) == [{1, 2}, {0, 2}, {0, 1}] and not graph.senders()[1, -1].any()


@pytest.mark.parametrize("edges,coordinator", [*product(EDGES, COORDINATORS[1:])])
def test_probes_feed_a_running_mean_until_the_edges_settle(edges, coordinator):
    graph, adapters = graph_of(4, edges=edges, coordinator=coordinator)
    learns = edges in ("similarity", "hybrid") and coordinator != "none"
    last, mean, start = EDGES_SETTLE if learns else 1, torch.zeros(4, 4, 4), senders(graph)
    for step in range(1, EDGES_SETTLE + 3):
        wanted, before = torch.randn(4, 7, 6), senders(graph)
        with_gradients(adapters, wanted)
        assert graph.steps == step - 1               # counted by observe_gradients() alone
        adapters.observe_gradients()
        if step <= last:
            mean = GRADIENT_DECAY * mean + (1 - GRADIENT_DECAY) * graph.P.T @ wanted @ graph.Q
        assert torch.allclose(graph.gradient, mean, atol=1e-4)
        assert all(layer.probe.grad is None and layer.probe.requires_grad for layer in graph.layers)
        assert graph.probing == (step < last)
        assert step <= last or senders(graph) == before
    assert learns == (senders(graph) != start)


def test_a_skipped_step_of_a_grad_scaler_moves_no_edge():
    graph, adapters = graph_of(6, edges="similarity")
    optimizer = torch.optim.SGD(adapters.param_groups(1e-2))
    scaler, wanted = torch.amp.GradScaler("cpu", init_scale=2.0 ** 127), torch.randn(6, 7, 6)
    for step in (1, 2):                              # the gradients of the first are infinite
        scaler.scale(100 * (adapters.model(torch.eye(6)) * wanted.mT).sum()).backward()
        scaler.unscale_(optimizer)
        adapters.observe_gradients()
        scaler.step(optimizer)
        scaler.update(1.0)
        optimizer.zero_grad()
        for changed in (graph.gradient.any(), any(senders(graph)), graph.layers[0].B.any()):
            assert bool(changed) == (step == 2)


# --- Penalty and budget, equations 4 and 8

def rate_by_hand(adapters):
    """The sum of 1/2 log(1 + mu^2 / sigma^2) over the directions that there are."""
    total = 0.0
    for graph in adapters.graphs:
        for layer, row, removed in zip(graph.layers, graph.senders(), graph.removed):
            mu, sigma = layer.gate["mu"], layer.gate["log_sigma"].exp()
            there = row.sum(1)[:, None] * (removed == 0)
            total = total + (0.5 * torch.log(1 + mu ** 2 / sigma ** 2) * there).sum()
    return total


@pytest.mark.parametrize("edges", EDGES)
def test_penalty_is_beta_times_the_rate_per_example_and_warms_up_by_the_step(edges):
    model, adapters = adapted(4, edges=edges, beta=0.7)
    R, gates = rate_by_hand(adapters), adapters.param_groups(1.0)[2]["params"]
    for steps in (0, 1, 30, BETA_WARMUP - 1, BETA_WARMUP, 1000):
        for graph in adapters.graphs:
            graph.steps.fill_(steps)
        warm = min(1.0, (steps + 1) / BETA_WARMUP)
        for _ in range(2):                           # a call has no side effect
            assert adapters.penalty(1234).item() == pytest.approx(0.7 * warm * R.item() / 1234)
    (1234 / 0.7 * adapters.penalty(1234)).backward()
    for p, wanted in zip(gates, torch.autograd.grad(R, gates)):
        assert torch.allclose(p.grad, wanted, rtol=1e-4, atol=1e-6)
    assert len(gradients(model)) == len(gates)       # nothing else is charged
    with pytest.raises(ValueError, match=r"eval mode.*model.train\(\)"):
        model.eval()
        adapters.penalty(10)


def left(adapters):
    return sum(int(graph.present().sum()) for graph in adapters.graphs)


@pytest.mark.parametrize("gate,edges", [*product(GATES[:2], EDGES)])
@pytest.mark.parametrize("budget", (0.02, 0.5, 2, 3.3, 1000))
def test_the_budget_keeps_what_a_sort_by_hand_keeps(gate, edges, budget):
    (_, adapters), pairs = adapted(4, gate=gate, edges=edges, budget=budget), []
    adapters.prune(1.0)
    for graph in adapters.graphs:
        for l, layer in enumerate(graph.layers):
            for place in graph.senders()[l].sum(1).nonzero()[:, 0]:
                strength = gate_strength({name: p[place] for name, p in layer.gate.items()})
                pairs += zip(strength.tolist(), (graph.removed[l, place] == 0).tolist())
    count = min(len(pairs), max(1, round(budget * 8)))           # 4 layers of each of two kinds
    wanted = [True] * count + [False] * (len(pairs) - count)
    assert [kept for _, kept in sorted(pairs, reverse=True)] == wanted and left(adapters) == count
    for name, update in all_updates(adapters).items():           # what was removed has left the sum
        assert torch.allclose(adapters.deltas()[name].double(), update, atol=1e-4)
    charged = sum(adapters.diagnostics()["rate"].values())       # and the penalty
    assert gate == "concrete" or charged == pytest.approx(rate_by_hand(adapters).item(), rel=1e-4)


def test_the_schedule_is_cubic_starts_at_40_percent_and_ends_at_80():
    adapters = attach(chain(4), Config(rank=2, budget=1.0, edges="depth"))       # all tied
    candidates, target = 2 * (4 + 2 * 3) * 2, 8
    for percent in range(0, 101, 5):
        adapters.prune(percent / 100)
        wanted = target + (candidates - target) * ((80 - min(80, max(40, percent))) / 40) ** 3
        assert wanted - 1e-3 <= left(adapters) <= wanted + (percent < 80)        # rounded up
    adapters.prune(0.5)                              # progress that goes back
    assert left(adapters) == target


def test_a_removed_direction_never_returns_and_edges_stay_then():
    _, adapters = adapted(6, budget=2.0)
    adapters.prune(0.6)
    before = [(graph.removed > 0, graph.senders().clone()) for graph in adapters.graphs]
    for layer in adapters.layers.values():           # turn the ranking upside down
        layer.gate["mu"].data.copy_(1 / layer.gate["mu"].data)
        layer.probe.grad = torch.randn(4, 4)
    adapters.observe_gradients()
    adapters.prune(0.7)
    for graph, (removed, edges) in zip(adapters.graphs, before):
        assert graph.removed[removed].all() and torch.equal(graph.senders(), edges)


# --- Diagnostics

@pytest.mark.parametrize("gate,coordinator", [*product(GATES, COORDINATORS)])
def test_diagnostics_equal_dense_computations(gate, coordinator):
    model, adapters = adapted(4, gate=gate, coordinator=coordinator, rank=3)
    state = copy.deepcopy(model.state_dict())
    got, updates, drift, pairs = adapters.diagnostics(), all_updates(adapters), 0.0, []
    for graph, kind in zip(adapters.graphs, ("blocks.*.q_proj", "blocks.*.v_proj")):
        vectors = torch.stack([updates[name].flatten() for name in graph.names]).detach()
        drift += (vectors[1:] - vectors[:-1]).square().sum().item()
        cosine = F.cosine_similarity(vectors[:, None], vectors[None], dim=2)
        gradient = graph.gradient.flatten(1)
        pairs.append((cosine.diagonal(1), F.cosine_similarity(gradient[1:], gradient[:-1])))
        assert torch.allclose(got["cosine_matrix"][kind].double(), cosine, atol=1e-5)
        assert torch.allclose(got["mixing"][kind].double(), by_hand_mixing(graph), atol=1e-5)
        for name, layer, row in zip(graph.names, graph.layers, graph.senders()):
            there = row.sum(1) > 0                   # the messages with a sender
            assert gate == "none" or got["gate_mean"][name] == pytest.approx(
                open_gates(layer)[there].mean().item(), abs=1e-6)
            values = torch.linalg.svdvals(updates[name].detach())
            share = values[values > 1e-9] / values.sum()
            rank = (-(share * share.log()).sum()).exp() * bool(values.any())
            assert got["effective_rank"][name] == pytest.approx(rank.item(), rel=1e-3)
            assert got["kept"][name] == adapters.factors()[name][1].shape[0]
    assert got["drift_energy"] == pytest.approx(drift, rel=1e-4) and drift > 1
    for key, cosines in zip(("update_cosine", "gradient_cosine"), zip(*pairs)):
        assert got[key] == pytest.approx(torch.stack(cosines).mean().item(), abs=1e-5)
    assert_same(dict(model.state_dict()), state)     # looking changes nothing
    assert all((name in got["rate"]) == (gate != "none") for name in updates)


def test_diagnostics_without_updates_are_numbers_and_no_nan():
    for adapters in (attach(chain(), Config(rank=2)), adapted(4, budget=0.3)[1]):
        adapters.prune(1.0)
        got = adapters.diagnostics()
        for key in ("rate", "gate_mean", "kept", "effective_rank"):
            assert all(math.isfinite(value) for value in got[key].values()), key
        assert 0.0 in got["effective_rank"].values() and math.isfinite(got["drift_energy"])
        assert all(matrix.isfinite().all() for matrix in got["cosine_matrix"].values())
        assert (got["gradient_cosine"] is None) == (got["drift_energy"] == 0)    # no step so far
