import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from helpers import Chain, adapted, by_hand_updates, chain, inputs, shake
from structlora import Config, LayerGraph, attach

GATES = ("gaussian", "concrete", "none")
COORDINATORS = ("attention", "uniform", "none")


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def dense_output(model, updates, x):
    # The frozen model with W0 + s dW in place of W0, as one differentiable function
    weights = {name + ".weight": model.get_submodule(name).weight.double() + update
               for name, update in updates.items()}
    plain = chain(len(model.blocks)).double()
    plain.load_state_dict({name.replace(".base", ""): value
                           for name, value in model.state_dict().items() if ".graph." not in name})
    return torch.func.functional_call(plain, weights, (x.double(),))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("coordinator", COORDINATORS)
@pytest.mark.parametrize("training", (True, False))
def test_output_is_bit_equal_before_the_first_step(gate, coordinator, training):
    model, x = chain().train(training), inputs()
    before = model(x)
    attach(model, Config(rank=2, gate=gate, coordinator=coordinator))
    assert torch.equal(model(x), before)
    assert torch.equal(model.to(torch.bfloat16)(x.bfloat16()),
                       chain().to(torch.bfloat16)(x.bfloat16()))


def test_output_is_bit_equal_before_the_first_step_under_autocast():
    model, x = chain(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        attach(model, Config(rank=2))
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("edges", ("depth", "similarity", "hybrid", "random"))
@pytest.mark.parametrize("hops", (1, 2, 3))
def test_output_is_bit_equal_before_the_first_step_on_every_graph(edges, hops):
    model, x = chain(5), inputs()
    before = model(x)
    attach(model, Config(rank=2, edges=edges, hops=hops))
    assert torch.equal(model(x), before)


def test_a_starts_uniform_within_one_over_root_k_and_b_at_zero():
    torch.manual_seed(0)
    adapters = attach(Chain(3, width=100, hidden=90), Config(rank=40, targets="q_proj"))
    A, B = adapters.graphs[0].A.detach(), adapters.graphs[0].B
    assert 0.0999 < A.abs().max() <= 0.1 and abs(A.mean().item()) < 0.002
    assert A.std().item() == pytest.approx(0.1 / 3 ** 0.5, rel=0.02)
    assert not B.any()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("coordinator", COORDINATORS)
def test_eval_forward_is_equation_1_with_the_update_of_equation_6(gate, coordinator):
    model, adapters = adapted(4, gate=gate, coordinator=coordinator)
    model.eval()
    updates = {n: U for g in adapters.graphs for n, U in zip(g.names, by_hand_updates(g))}
    x = inputs()
    wanted = dense_output(model, updates, x)
    assert (wanted - model(x)).abs().max() < 1e-5
    frozen = dense_output(model, {n: 0 * U for n, U in updates.items()}, x)
    assert (wanted - frozen).abs().max() > 0.1                   # the update does something


@pytest.mark.parametrize("coordinator", COORDINATORS)
@pytest.mark.parametrize("edges,hops", (("depth", 1), ("hybrid", 2), ("random", 3)))
def test_training_gradients_equal_dense_autograd(coordinator, edges, hops, monkeypatch):
    model, adapters = adapted(5, rank=3, coordinator=coordinator, edges=edges, hops=hops)
    model.double().train()
    x = inputs(dtype=torch.float64)
    # Noise that is always 1/2: m = mu + sigma / 2, so log_sigma has a gradient to compare as well.
    monkeypatch.setattr(torch, "randn", lambda shape, **kw: torch.full(shape, 0.5, **kw))
    weight = torch.linspace(-1, 1, 5 * 3 * 4, dtype=torch.float64).view(5, 3, 4)
    output = model(x)
    (output * weight).sum().backward()
    got = gradients(model)
    model.zero_grad()

    updates = {}
    for graph in adapters.graphs:
        gates = graph.gate.mu + 0.5 * graph.gate.log_sigma.exp()
        updates |= dict(zip(graph.names, by_hand_updates(graph, gates)))
    wanted_output = dense_output(model, updates, x)
    assert (output - wanted_output).abs().max() <= 1e-5 * wanted_output.abs().max()
    (wanted_output * weight).sum().backward()
    wanted = gradients(model)
    for name, value in wanted.items():
        error = (got.pop(name) - value).abs().max()     # not smaller, as mixing() computes in fp32
        assert error <= 1e-3 * value.abs().max() + 1e-7, (name, error)
        # w_src shifts a whole row of e alike, so softmax sees it through the LeakyReLU only
        assert value.any() or name.endswith("w_src"), name
    assert not got


def test_the_features_carry_no_gradient():
    # One layer alone would get no gradient for A through h, so compare w_src = 0 with w_src != 0:
    # with rho = 0 the attention has no effect on the output, and must have none on A and B.
    grads = []
    for value in (0.0, 2.0):
        model, adapters = adapted(3, gate="none")
        for graph in adapters.graphs:
            graph.rho.data.zero_()
            graph.w_src.data.fill_(value)
        model(inputs()).square().sum().backward()
        grads.append([p.grad for g in adapters.graphs for p in (g.A, g.B)])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert not any(g.features().requires_grad for g in adapters.graphs)


def test_dropout_acts_on_the_update_alone_and_in_training_alone():
    model, adapters = adapted(1, gate="none", targets="q_proj", dropout=0.5)
    layer, x = model.blocks[0].q_proj, torch.randn(4000, 6)
    B, A = adapters.factors()["blocks.0.q_proj"]
    base, update = layer.base(x), x @ (B @ A).T
    assert torch.allclose(layer.eval()(x), base + update, atol=1e-5)
    layer.train()
    noisy = layer(x) - base
    assert not torch.allclose(noisy, update, atol=0.1)
    assert torch.allclose(noisy.mean(0), update.mean(0), atol=0.1)       # unbiased
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    assert torch.allclose(first, base + dropped @ (B @ A).T, atol=1e-5)


def steps(model, loss_of, seed=11):
    model.zero_grad()
    torch.manual_seed(seed)
    loss = loss_of(model)
    loss.backward()
    return loss.detach(), gradients(model)


class Checkpointed(Chain):
    reentrant = False

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dropout", (0.0, 0.3))
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(gate, dropout):
    x = inputs().requires_grad_()
    model, adapters = adapted(3, gate=gate, dropout=dropout)
    plain = steps(model, lambda m: m(x).square().mean())
    sketches = [g.gradient_sum.clone() for g in adapters.graphs]
    for graph in adapters.graphs:
        graph.gradient_sum.zero_()
    model.__class__ = Checkpointed
    saved = steps(model, lambda m: m(x).square().mean())
    assert torch.equal(saved[0], plain[0]) and saved[1].keys() == plain[1].keys()
    assert all(torch.equal(saved[1][name], plain[1][name]) for name in plain[1])
    # ... nor what observe_gradients() sees: recomputing must not count a layer twice
    assert all(torch.equal(g.gradient_sum, s) for g, s in zip(adapters.graphs, sketches))


def test_two_checkpointed_forwards_before_one_backward():
    x, z = inputs().requires_grad_(), inputs(seed=8).requires_grad_()
    model, _ = adapted(3)
    loss = lambda m: m(x).square().mean() + m(z).square().mean()
    plain = steps(model, loss)
    model.__class__ = Checkpointed
    saved = steps(model, loss)
    assert torch.equal(saved[0], plain[0])
    assert all(torch.equal(saved[1][name], plain[1][name]) for name in plain[1])


def test_reentrant_checkpointing_gives_the_same_gradients():
    x = inputs().requires_grad_()
    model, _ = adapted(3, gate="none")
    plain = steps(model, lambda m: m(x).square().mean())
    model.__class__ = type("Reentrant", (Checkpointed,), {"reentrant": True})
    saved = steps(model, lambda m: m(x).square().mean())
    assert all(torch.allclose(saved[1][n], plain[1][n], atol=1e-6) for n in plain[1])


def test_a_part_called_without_the_model_can_be_checkpointed():
    model, _ = adapted(3)
    x = inputs().requires_grad_()
    other = copy.deepcopy(model)                     # which has computed nothing yet
    plain = steps(model, lambda m: m.blocks[1](x).square().mean())
    saved = steps(other, lambda m: checkpoint(m.blocks[1], x, use_reentrant=False).square().mean())
    assert torch.equal(saved[0], plain[0]) and saved[1].keys() == plain[1].keys()
    assert all(torch.equal(saved[1][name], plain[1][name]) for name in plain[1])


def test_a_part_called_without_the_model_follows_the_parameters():
    model, adapters = adapted(3)
    model.eval()
    part, x = model.blocks[1], inputs()
    optimizer = torch.optim.SGD(adapters.param_groups(0.1))
    for _ in range(2):                       # the second round must see the first round's step
        loss = part(x).square().mean()
        loss.backward()
        grads = gradients(model)
        optimizer.zero_grad()
        fresh = copy.deepcopy(model)         # a copy has computed nothing yet
        fresh.blocks[1](x).square().mean().backward()
        assert grads and grads.keys() == gradients(fresh).keys()
        assert all(torch.equal(grads[n], g) for n, g in gradients(fresh).items())
        for name, g in grads.items():
            model.get_parameter(name).grad = g
        optimizer.step()
        optimizer.zero_grad()


def test_a_part_called_without_the_model_can_accumulate_gradients():
    model, _ = adapted(3, gate="none")
    part, x = model.blocks[1], inputs()
    part(x).square().mean().backward()
    once = gradients(model)
    part(x).square().mean().backward()       # no optimizer step in between
    assert all(torch.allclose(g, 2 * once[n], rtol=1e-5) for n, g in gradients(model).items())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
def test_a_part_called_without_the_model_follows_a_cast(dtype):
    model, adapters = adapted(3)
    model.eval()
    x = inputs()
    with torch.no_grad():
        model.blocks[1](x)
        model.to(dtype)
        got = model.blocks[1](x.to(dtype))
        adapters._before_forward(model, ())
        assert torch.equal(got, model.blocks[1](x.to(dtype)))


def test_a_part_called_outside_autocast_is_not_computed_in_bf16():
    model, _ = adapted(3)
    model.eval()
    x = inputs()
    with torch.no_grad():
        exact = model.blocks[1](x)
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        assert torch.equal(model.blocks[1](x), exact)


def test_inputs_of_one_two_three_and_four_dimensions_agree():
    model, _ = adapted(2)
    model.eval()
    x = inputs(4, 3)
    whole = model(x)
    assert torch.allclose(model(x[1, 2]), whole[1, 2], atol=1e-5)
    assert torch.allclose(model(x[1]), whole[1], atol=1e-5)
    assert torch.allclose(model(x.view(2, 2, 3, 6)), whole.view(2, 2, 3, 4), atol=1e-5)
    model.train()
    for shape in ((6,), (4, 6), (4, 3, 6), (2, 2, 3, 6), (0, 3, 6)):
        assert model(torch.ones(shape)).shape == (*shape[:-1], 4)


def test_the_cast_model_keeps_fp32_adapters_if_it_was_cast_before():
    model = chain().to(torch.bfloat16)
    adapters = shake(attach(model, Config(rank=2, alpha=3.0)))
    x = inputs(dtype=torch.bfloat16)
    loss = model(x).float().square().mean() + adapters.penalty(10)
    loss.backward()
    for graph in adapters.graphs:
        assert model(x).dtype == torch.bfloat16
        assert graph.A.dtype == graph.gate.mu.dtype == graph.A.grad.dtype == torch.float32
        assert all(p.grad.isfinite().all() for p in graph.parameters())
    reference, exact = adapted(3)
    for mine, theirs in zip(exact.graphs, adapters.graphs):
        mine.load_state_dict(theirs.state_dict())
    model.eval(), reference.eval()
    assert torch.allclose(model(x).float(), reference(x.float()), atol=0.1, rtol=0.05)


def test_layers_of_one_kind_may_differ_in_dtype():
    model, adapters = adapted(3)
    model.eval()
    exact = model.blocks[1](inputs())
    for layer in (model.blocks[1].q_proj, model.blocks[1].v_proj):
        layer.base.to(torch.bfloat16)
    output = model.blocks[1](inputs(dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert (output - exact).abs().max() < 0.03 * exact.abs().max()
    merged = adapters.merge().blocks[1](inputs(dtype=torch.bfloat16))
    assert (merged - output).abs().max() < 0.03 * exact.abs().max()


def test_autocast_trains_fp32_adapters_through_bf16_matmuls():
    model, adapters = adapted(3)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(inputs())
        loss = output.float().square().mean()
    loss.backward()
    assert output.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32
               for g in adapters.graphs for p in g.parameters())


# --- cost


class Sizes(TorchDispatchMode):
    # Notes the name of every operation and how many numbers it made, views left out
    def __init__(self, frozen):
        super().__init__()
        self.frozen, self.made, self.calls = {p.untyped_storage().data_ptr() for p in frozen}, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        self.made += [(t.numel(), str(func)) for t in tree_leaves(result)
                      if isinstance(t, torch.Tensor)
                      and t.untyped_storage().data_ptr() not in self.frozen]
        return result


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("training", (True, False))
def test_forward_and_backward_make_nothing_as_large_as_a_weight(gate, training):
    d, k = 211, 197
    torch.manual_seed(0)
    model = Chain(3, width=k, hidden=d)
    attach(model.train(training), Config(rank=2, gate=gate))
    frozen = [p for n, p in model.named_parameters() if ".graph." not in n]
    with Sizes(frozen) as seen:
        model(torch.randn(2, 2, k)).square().mean().backward()
    largest = max(seen.made)
    slots = 4 * 2 * 3                                # S r L: hybrid edges, rank 2, three layers
    assert slots * k <= largest[0] <= slots * d < d * k // 4, largest


def test_the_number_of_operations_does_not_depend_on_the_number_of_samples():
    counts = []
    for n in (1, 16):
        model, _ = adapted(3)
        with Sizes(()) as seen:
            model(inputs(n)).sum().backward()
        counts.append(seen.calls)
    assert counts[0] == counts[1]


def test_the_mixing_matrix_is_computed_once_per_kind_and_forward(monkeypatch):
    calls, mixing = [], LayerGraph.mixing
    monkeypatch.setattr(LayerGraph, "mixing", lambda self: calls.append(self) or mixing(self))
    model, adapters = adapted(4)
    calls.clear()
    for forwards in (1, 2, 3):
        model(inputs()).sum().backward()
        assert len(calls) == 2 * forwards
    assert set(map(id, calls)) == set(map(id, adapters.graphs)) and len(adapters.graphs) == 2


def test_one_draw_per_sample_and_direction_not_per_token():
    model, adapters = adapted(1, targets="q_proj", rank=3)
    graph, layer = adapters.graphs[0], model.blocks[0].q_proj
    with torch.no_grad():                    # direction i of the update alone reaches output i
        graph.A.fill_(1.0)
        graph.B.copy_(torch.eye(10)[None, :3])
        graph.gate.mu.copy_(torch.tensor([[[1.0, -2.0, 0.5]]]))
        graph.gate.log_sigma.copy_(torch.tensor([[[0.1, 1.0, 3.0]]]).log())
    x = torch.ones(20000, 2, 6)
    m = (layer(x) - layer.base(x))[..., :3] / (6 * 3.0 / 3)      # [N, T, r]: u = 6, s = 1
    assert torch.allclose(m[:, 0], m[:, 1], atol=1e-4)
    m = m[:, 0].detach()
    assert torch.allclose(m.mean(0), torch.tensor([1.0, -2.0, 0.5]), atol=0.1)
    assert torch.allclose(m.std(0), torch.tensor([0.1, 1.0, 3.0]), rtol=0.03)
    assert (torch.corrcoef(m.T) - torch.eye(3)).abs().max() < 0.05   # directions are independent
    neighbours = torch.corrcoef(torch.stack([m[:-1, 2], m[1:, 2]]))
    assert abs(float(neighbours[0, 1])) < 0.05                   # and so are samples


def test_samples_of_two_dimensional_inputs_have_their_own_draws():
    model, _ = adapted(1, targets="q_proj")
    layer = model.blocks[0].q_proj
    y = layer(torch.ones(50, 6))
    assert len(y[:, 0].unique()) == 50


def test_evaluation_is_deterministic_and_training_is_not():
    model, _ = adapted(3)
    x = inputs()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    with torch.inference_mode():
        assert torch.allclose(model(x), model(x.clone()))


def test_code_that_asks_a_layer_for_its_sizes_still_can():
    model, _ = adapted(3)
    layer = model.blocks[0].q_proj
    assert (layer.in_features, layer.out_features) == (6, 10)
    assert layer.weight is layer.base.weight and layer.bias is layer.base.bias


def test_a_wrapper_around_the_model_changes_nothing():
    model, _ = adapted(3)
    wrapper, x = nn.Sequential(model, nn.Identity()).eval(), inputs()
    assert torch.equal(wrapper(x), model(x))
