import copy
import dataclasses
import json
import re
import warnings
from itertools import product

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from helpers import Chain, adapted, chain, inputs, shake
from structlora import Config, LoRALinear, StructLoRA, attach

ALL = [*product(("gaussian", "concrete", "none"), ("attention", "uniform", "none"),
                ("depth", "similarity", "hybrid", "random"), (1, 2))]
QV = [f"blocks.{l}.{kind}_proj" for l in range(3) for kind in "qv"]


def train_a_little(model, adapters, steps=3, lr=1e-2):
    # A few steps on a fixed task; returns the losses
    x = inputs(16)
    labels = torch.arange(16 * 3) % 4
    optimizer = torch.optim.AdamW(adapters.param_groups(lr))
    losses = []
    for step in range(steps):
        task = F.cross_entropy(model(x).flatten(0, 1), labels)
        (task + adapters.penalty(1000)).backward()
        adapters.observe_gradients()
        optimizer.step()
        optimizer.zero_grad()
        adapters.prune((step + 1) / steps)
        losses.append(task.item())
    return losses


def with_head(adapters):
    # Unfreezes and changes the head, as a user does who trains a new one
    adapters.model.head.requires_grad_(True)
    with torch.no_grad():
        for parameter in adapters.model.head.parameters():
            parameter.add_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))


def traces(model):
    # All that merge() must put back: modules, parameters, flags, names, hooks
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return ([(name, id(m), type(m), m.training, sorted(vars(m)),
              [len(getattr(m, h)) for h in hooks]) for name, m in model.named_modules()],
            [(name, id(p), p.requires_grad, len(p._backward_hooks or ()))
             for name, p in model.named_parameters()],
            list(model.state_dict()))


def peft_delta(directory, name):
    # scaling * B A as PEFT computes it from the two files
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = torch.load(directory / "adapter_model.bin", weights_only=True)
    A = tensors[f"base_model.model.{name}.lora_A.weight"]
    B = tensors[f"base_model.model.{name}.lora_B.weight"]
    of = lambda pattern, other: next(
        (v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), other)
    rank = of(config["rank_pattern"], config["r"])
    assert A.shape[0] == B.shape[1] == rank
    return of(config["alpha_pattern"], config["lora_alpha"]) / rank * B @ A


# --- attach


def test_attach_freezes_the_model_and_registers_what_it_trains():
    model = chain()
    frozen = [id(p) for p in model.parameters()]
    adapters = attach(model, Config(rank=2))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) not in frozen), name
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for g in adapters.graphs for p in g.parameters()} and trainable
    assert len(adapters.layers) == 6 and len(adapters.graphs) == 2


@pytest.mark.parametrize("gate", ("gaussian", "concrete", "none"))
@pytest.mark.parametrize("coordinator", ("attention", "none"))
def test_every_trainable_tensor_is_in_exactly_one_param_group(gate, coordinator):
    model, adapters = adapted(3, gate=gate, coordinator=coordinator)
    model.head.requires_grad_(True)
    groups = adapters.param_groups(lr=3e-3, gate_lr=7e-2, weight_decay=0.05)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    names = {id(p): n for n, p in model.named_parameters()}
    for group in groups:
        kinds = {"gate" if ".gate." in names[id(p)] else names[id(p)].split(".")[-1]
                 for p in group["params"]}
        if kinds == {"gate"}:
            assert (group["lr"], group["weight_decay"]) == (7e-2, 0.0)
        elif kinds <= {"rho", "w_src", "w_dst"}:
            assert (group["lr"], group["weight_decay"]) == (3e-3, 0.0)
        else:
            assert kinds == {"A", "B", "weight", "bias"}
            assert (group["lr"], group["weight_decay"]) == (3e-3, 0.05)
    torch.optim.AdamW(groups)


def test_gates_learn_faster_with_a_budget():
    rate = lambda **config: adapted(**config)[1].param_groups(lr=1.0)[-1]["lr"]
    assert rate() == 0.01 and rate(budget=2.0) == 0.05


def test_only_whole_name_components_match():
    model = nn.ModuleDict({"xq_proj": nn.Linear(6, 6), "q_proj": nn.Linear(6, 6),
                           "q_projector": nn.Linear(6, 6),
                           "deep": nn.ModuleDict({"q_proj": nn.Linear(6, 6)}),
                           "q_proj_": nn.ModuleDict({"v": nn.Linear(6, 6)})})
    assert set(attach(model, Config(rank=2, targets="q_proj")).layers) == {"q_proj", "deep.q_proj"}


def test_a_target_may_be_a_path():
    adapters = attach(chain(), Config(rank=2, targets=("1.q_proj", "head")))
    assert set(adapters.layers) == {"blocks.1.q_proj", "head"}
    assert set(attach(chain(), Config(rank=2, targets="q_proj,v_proj")).layers) == set(QV)


def test_nothing_matches_and_the_message_lists_the_names_there_are():
    model = chain()
    before = traces(model)
    with pytest.raises(ValueError) as error:
        attach(model, Config(rank=2, targets=("query", "value")))
    for name in ("query", "value", "blocks.*.q_proj", "blocks.*.v_proj", "head"):
        assert name in str(error.value)
    assert str(error.value).count("q_proj") == 1 and "\n" not in str(error.value)
    assert traces(model) == before


def test_a_target_that_matches_nothing_is_warned_of():
    with pytest.warns(UserWarning, match="'o_proj'"):
        attach(chain(), Config(rank=2, targets=("q_proj", "o_proj")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(chain(), Config(rank=2))


@pytest.mark.parametrize("change,message", (
    ({"rank": 0}, "rank"), ({"rank": -3}, "rank"), ({"rank": 1.5}, "rank"),
    ({"rank": 7}, "rank=7.*10 x 6"),
    ({"alpha": 0.0}, "alpha"), ({"alpha": float("nan")}, "alpha"), ({"dropout": 1.0}, "dropout"),
    ({"dropout": -0.1}, "dropout"), ({"beta": -1.0}, "beta"), ({"beta": float("inf")}, "beta"),
    ({"gate": "gausian"}, "gausian.*gaussian"), ({"coordinator": "gat"}, "gat.*attention"),
    ({"edges": "deep"}, "deep.*depth"), ({"hops": 4}, "hops"), ({"hops": 0}, "hops"),
    ({"budget": 0.0}, "budget"), ({"targets": ()}, "targets"), ({"targets": "q_proj,"}, "targets")))
def test_bad_values_are_refused_by_name_and_the_model_stays_as_it_was(change, message):
    model = chain()
    before = traces(model)
    with pytest.raises(ValueError, match=message):
        attach(model, Config(**{"rank": 2, **change}))
    assert traces(model) == before


def test_attaching_twice_is_refused():
    model, adapters = adapted()
    before = traces(model)
    with pytest.raises(ValueError, match="adapters already"):
        attach(model, Config(rank=2, targets="head"))
    assert traces(model) == before
    adapters.detach()
    attach(model, Config(rank=2, targets="head"))    # after detach() it is free again


def test_tied_weights_are_refused():
    shared = chain()
    shared.blocks[1].q_proj = shared.blocks[0].q_proj            # one module in two places
    parameter = chain()
    parameter.blocks[2].q_proj.weight = parameter.blocks[0].q_proj.weight
    embedding = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 10, bias=False))
    embedding[1].weight = embedding[0].weight
    for model, targets, names in ((shared, "q_proj", "blocks.0.q_proj.* = blocks.1.q_proj"),
                                  (parameter, "q_proj", "blocks.0.q_proj.* = blocks.2.q_proj"),
                                  (embedding, "1", "0.weight = 1.weight")):
        before = traces(model)
        with pytest.raises(ValueError, match=f"tied.*{names}"):
            attach(model, Config(rank=2, targets=targets))
        assert traces(model) == before
    attach(shared, Config(rank=2, targets="v_proj"))             # left alone, it does no harm


def test_layers_that_torch_reads_past_are_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ValueError, match="attention.out_proj.*MultiheadAttention"):
        attach(model, Config(rank=2, targets="out_proj"))
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    with pytest.raises(ValueError, match="set_fastpath_enabled"):
        attach(encoder, Config(rank=2, targets=("linear1", "linear2")))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        adapters = attach(encoder.eval(), Config(rank=2, targets=("linear1", "linear2")))
        x = torch.randn(2, 3, 8)
        before = encoder(x)
        with torch.no_grad():
            adapters.graphs[0].B.fill_(1.0)
        assert not torch.allclose(encoder(x), before, atol=0.01)     # the adapter is not skipped
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_computed_weight_is_refused_or_adapted_exactly():
    model = chain()
    nn.utils.parametrizations.weight_norm(model.blocks[0].q_proj)
    x = inputs()
    try:
        adapters = attach(model, Config(rank=2, targets="q_proj"))
    except ValueError as error:
        assert "blocks.0.q_proj" in str(error)
        return
    shake(adapters)
    model.eval()
    output = model(x)
    assert torch.allclose(adapters.merge()(x), output, atol=1e-5)


def test_the_model_may_be_in_any_mode_and_on_frozen_parts():
    model = chain().eval()
    model.blocks[0].q_proj.weight.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    before = traces(model)
    adapters = attach(model, Config(rank=2))
    assert not any(m.training for m in model.modules())
    adapters.detach()
    assert traces(model) == before


def test_config_is_frozen_and_documented_in_full():
    fields = {f.name: f.default for f in dataclasses.fields(Config)}
    assert fields == dict(rank=8, alpha=16.0, dropout=0.0, targets=("q_proj", "v_proj"),
                          gate="gaussian", beta=0.1, coordinator="attention", edges="hybrid",
                          hops=1, budget=None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().rank = 4
    assert Config(targets=["q", "v"]).targets == ("q", "v") == Config(targets="q,v").targets


# --- merge and detach


@pytest.mark.parametrize("gate,coordinator,edges,hops", ALL)
def test_eval_merged_and_exported_outputs_agree(gate, coordinator, edges, hops, tmp_path):
    model, adapters = adapted(4, gate=gate, coordinator=coordinator, edges=edges, hops=hops)
    x, plain = inputs(), chain(4)
    model.eval()
    output = model(x)
    adapters.export_peft(tmp_path)
    with torch.no_grad():
        for name in adapters.layers:
            plain.get_submodule(name).weight += peft_delta(tmp_path, name)
    scale = max(1.0, float(output.detach().abs().max()))
    assert (plain(x) - output).abs().max() < 1e-5 * scale
    assert (adapters.merge()(x) - output).abs().max() < 1e-5 * scale
    assert not torch.allclose(output, chain(4)(x), atol=0.1)


def test_merge_leaves_no_trace():
    model = chain().eval()
    model.head.bias.requires_grad_(False)
    before, weights = traces(model), {n: p.clone() for n, p in model.named_parameters()}
    adapters = attach(model, Config(rank=2, budget=2.0))
    train_a_little(model.train(), adapters)
    deltas = adapters.deltas()
    model.eval()
    assert adapters.merge() is model
    assert traces(model) == before
    for name, parameter in model.named_parameters():
        delta = deltas.get(name.removesuffix(".weight"), torch.zeros(())) \
            if name.endswith("weight") else torch.zeros(())
        assert torch.equal(parameter, weights[name] + delta), name
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


def test_merging_twice_changes_nothing():
    model, adapters = adapted()
    merged = {n: p.clone() for n, p in adapters.merge().named_parameters()}
    assert adapters.merge() is model and adapters.detach() is model
    assert all(torch.equal(p, merged[n]) for n, p in model.named_parameters())


def test_detach_restores_the_outputs_bit_for_bit():
    model, x = chain().eval(), inputs()
    before, output = traces(model), model(x)
    adapters = attach(model, Config(rank=2, alpha=3.0))
    shake(adapters)
    assert not torch.equal(model(x), output)
    assert adapters.detach() is model
    assert torch.equal(model(x), output) and traces(model) == before


def test_the_training_mode_of_every_layer_survives():
    model, adapters = adapted()
    model.eval()
    model.blocks[1].q_proj.train()
    adapters.merge()
    assert [m.q_proj.training for m in model.blocks] == [False, True, False]


def test_what_was_unfrozen_before_attach_is_unfrozen_after_merge():
    model, adapters = adapted()
    with_head(adapters)
    adapters.merge()
    assert all(p.requires_grad for p in model.parameters())


def test_a_bf16_model_is_merged_in_fp32():
    model = chain().to(torch.bfloat16)
    before = {n: p.clone() for n, p in model.named_parameters()}
    adapters = shake(attach(model, Config(rank=2, alpha=3.0)))
    deltas, x = adapters.deltas(), inputs(dtype=torch.bfloat16)
    model.eval()
    output = model(x).float()
    adapters.merge()
    for name, delta in deltas.items():
        weight = model.get_submodule(name).weight
        assert delta.dtype == torch.float32 and weight.dtype == torch.bfloat16
        assert torch.equal(weight, (before[name + ".weight"].float() + delta).bfloat16())
    assert (model(x).float() - output).abs().max() < 0.03 * output.abs().max()


def test_a_float64_model_keeps_its_precision_through_merge():
    model = chain().double()
    for parameter in model.parameters():
        parameter.data /= 3                          # numbers that fp32 cannot hold
    before = {n: p.clone() for n, p in model.named_parameters()}
    attach(model, Config(rank=2)).merge()            # B = 0: nothing to add
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("where", ("A", "B", "rho", "mu"))
def test_an_update_that_is_not_finite_is_refused(value, where):
    model, adapters = adapted()
    weights = {n: p.clone() for n, p in model.named_parameters()}
    graph = adapters.graphs[1]
    graph.gate.log_sigma.data.fill_(-3.0)
    parameter = graph.gate.mu if where == "mu" else getattr(graph, where)
    parameter.data.view(-1)[-1] = value
    before = traces(model)
    with pytest.raises(ValueError, match=r"blocks\.\d\.v_proj .*finite"):
        adapters.merge()
    assert traces(model) == before
    for name, p in model.named_parameters():
        assert ".graph." in name or torch.equal(p, weights[name]), name


def test_an_update_that_overflows_when_multiplied_or_cast_is_refused():
    for dtype, size in ((torch.float32, 1e30), (torch.float16, 300.0)):
        model = chain().to(dtype)
        adapters = attach(model, Config(rank=2, gate="none", coordinator="uniform", edges="depth"))
        weights = {n: layer.base.weight.clone() for n, layer in adapters.layers.items()}
        graph = adapters.graphs[1]
        graph.A.data[0].fill_(size), graph.B.data[0].fill_(size)     # finite, their product is not
        assert all(f.isfinite().all() for pair in adapters.factors().values() for f in pair)
        with pytest.raises(ValueError, match="v_proj"):
            adapters.merge()
        assert all(torch.equal(layer.base.weight, weights[n]) and isinstance(layer, LoRALinear)
                   for n, layer in adapters.layers.items()) and len(adapters.layers) == 6


def test_using_the_handle_after_merge_is_harmless_or_one_clear_line(tmp_path):
    _, adapters = adapted()
    adapters.merge()
    assert adapters.factors() == {} and adapters.deltas() == {}
    adapters.prune(1.0), adapters.observe_gradients()
    assert isinstance(adapters.penalty(10), torch.Tensor) and adapters.penalty(10) == 0
    for use in (lambda: adapters.export_peft(tmp_path / "peft"),
                lambda: adapters.save(tmp_path / "adapter.pt")):
        with pytest.raises(ValueError, match="merge|detach"):
            use()
    assert not list(tmp_path.iterdir())


# --- moving, casting, copying


def test_deepcopy_keeps_model_and_adapters_together_and_apart_from_the_original():
    model, adapters = adapted(4)
    x = inputs()
    loss = model(x).square().mean() + adapters.penalty(10)       # in the middle of a step
    other, copied = copy.deepcopy((model, adapters))
    assert copied.model is other and copied.penalty_calls == adapters.penalty_calls
    assert all(layer is other.get_submodule(n) for n, layer in copied.layers.items())
    loss.backward()                                              # the copy took nothing away
    assert all(g.A.grad is not None for g in adapters.graphs)
    mine = {id(p) for p in model.parameters()} | {id(b) for b in model.buffers()}
    assert not mine & {id(t) for t in [*other.parameters(), *other.buffers()]}
    model.eval(), other.eval()
    before = model(x)
    assert torch.equal(other(x), before)
    shake(copied, seed=3)
    assert not torch.allclose(other(x), before, atol=0.1)
    assert torch.equal(model(x), before)
    output = other(x)
    assert torch.allclose(copied.merge()(x), output, atol=1e-4)
    assert not any(isinstance(m, LoRALinear) for m in other.modules())
    assert torch.equal(model(x), before) and len(adapters.layers) == 8
    assert not other._forward_pre_hooks and len(model._forward_pre_hooks) == 1
    assert all(p.requires_grad for p in other.parameters())


def test_a_copy_trains_like_the_original():
    torch.manual_seed(0)
    model, adapters = adapted(3, dropout=0.1, budget=2.0)
    train_a_little(model, adapters)
    other, copied = copy.deepcopy((model, adapters))
    torch.manual_seed(1)
    losses = train_a_little(model, adapters)
    torch.manual_seed(1)
    assert train_a_little(other, copied) == losses
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(),
                                                  other.state_dict().values()))


@pytest.mark.parametrize("dtype,tolerance", ((torch.float64, 1e-5), (torch.bfloat16, 0.1)))
def test_the_adapted_model_can_be_cast(dtype, tolerance):
    model, adapters = adapted(budget=2.0)
    model.eval()
    exact = model(inputs())
    model.to(dtype)
    assert all(p.dtype == dtype for p in model.parameters())
    output = model(inputs(dtype=dtype))
    scale = float(exact.abs().max().detach())
    assert output.dtype == dtype and (output - exact).abs().max() < tolerance * scale
    model.train()
    loss = model(inputs(dtype=dtype)).float().square().mean() + adapters.penalty(10)
    loss.backward()
    adapters.observe_gradients()
    adapters.prune(1.0)
    assert all(p.grad.isfinite().all() for g in adapters.graphs for p in g.parameters())
    model.eval()
    output = model(inputs(dtype=dtype))
    merged = adapters.merge()(inputs(dtype=dtype))
    assert merged.dtype == dtype and (merged - output).abs().max() < tolerance * scale


def test_moving_to_another_device_moves_everything():
    model, adapters = adapted(budget=2.0)
    model.to("meta")                                 # any device without data shows what is left
    tensors = [*model.parameters(), *model.buffers()]
    assert all(t.device.type == "meta" for t in tensors)
    registered = {id(t) for t in tensors}
    for graph in adapters.graphs:                    # no tensor hides outside of the model
        for value in vars(graph).values():
            assert not isinstance(value, torch.Tensor) or id(value) in registered


def test_state_dict_round_trip():
    model, adapters = adapted(5, budget=2.0)
    adapters.prune(0.7)
    other, copied = adapted(5, seed=4, trained=False, budget=2.0)
    result = other.load_state_dict(model.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    model.eval(), other.eval()
    assert torch.equal(model(inputs()), other(inputs()))
    assert all(torch.equal(copied.deltas()[n], U) for n, U in adapters.deltas().items())


# --- save and load


@pytest.mark.parametrize("gate,coordinator,edges,hops", ALL[::3])
def test_a_loaded_adapter_gives_the_same_outputs(gate, coordinator, edges, hops, tmp_path):
    model, adapters = adapted(5, gate=gate, coordinator=coordinator, edges=edges, hops=hops)
    adapters.save(tmp_path / "adapter.pt")
    other = chain(5)
    loaded = StructLoRA.load(other, tmp_path / "adapter.pt")
    assert loaded.model is other and loaded.config == adapters.config
    model.eval(), other.eval()
    assert torch.equal(model(inputs()), other(inputs()))
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.pt"]


def test_everything_that_training_needs_survives_the_file(tmp_path):
    torch.manual_seed(0)
    model, adapters = adapted(6, edges="similarity", budget=2.0, dropout=0.1)
    train_a_little(model, adapters, steps=7)
    adapters.save(str(tmp_path / "adapter.pt"))      # a str is a path too
    other = chain(6)
    loaded = StructLoRA.load(other, str(tmp_path / "adapter.pt"))
    assert loaded.penalty_calls == adapters.penalty_calls == 7
    for mine, theirs in zip(adapters.graphs, loaded.graphs, strict=True):
        assert mine.gradient.any() and torch.equal(mine.gradient, theirs.gradient)
        assert torch.equal(mine.neighbours, theirs.neighbours)
        assert torch.equal(mine.kept, theirs.kept) and not mine.kept.all()
    results = []
    for m, a in ((model, adapters), (other, loaded)):
        torch.manual_seed(1)
        results.append(train_a_little(m, a))
    assert results[0] == results[1]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(),
                                                  other.state_dict().values()))


def test_the_file_holds_the_adapters_and_not_the_model(tmp_path):
    torch.manual_seed(0)
    model = Chain(3, width=100, hidden=300)
    adapters = attach(model, Config(rank=1))
    adapters.save(tmp_path / "adapter.pt")
    small = sum(p.numel() for g in adapters.graphs for p in [*g.parameters(), *g.buffers()])
    assert (tmp_path / "adapter.pt").stat().st_size < 4 * small + 30_000
    assert 4 * small + 30_000 < 4 * sum(p.numel() for p in model.parameters()) / 4
    torch.load(tmp_path / "adapter.pt", weights_only=True)       # no code in it


def test_a_trained_head_is_saved_loaded_and_left_trainable(tmp_path):
    model, adapters = adapted()
    with_head(adapters)
    adapters.save(tmp_path / "adapter.pt")
    other = chain()
    loaded = StructLoRA.load(other, tmp_path / "adapter.pt")
    model.eval(), other.eval()
    assert torch.equal(model(inputs()), other(inputs()))
    trainable = lambda m: {n for n, p in m.named_parameters() if p.requires_grad}
    assert trainable(other) == trainable(model) >= {"head.weight", "head.bias"}
    assert {id(p) for p in other.head.parameters()} <= {
        id(p) for group in loaded.param_groups(1.0) for p in group["params"]}


def test_saving_writes_the_whole_file_or_leaves_the_old_one(tmp_path, monkeypatch):
    _, adapters = adapted()
    path = tmp_path / "adapter.pt"
    adapters.save(path)
    before = path.read_bytes()

    def full_disk(value, target):
        target.write_bytes(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        adapters.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def bad_files(tmp_path):
    # name -> a file that is not one of ours, with what the message has to say besides its name
    _, adapters = adapted()
    good = tmp_path / "good.pt"
    adapters.save(good)
    content = good.read_bytes()
    (tmp_path / "truncated.pt").write_bytes(content[:len(content) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("hello, I am not a checkpoint\n" * 9)
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "pickle.pt")
    state = torch.load(good, weights_only=True)
    torch.save(state | {"config": state["config"] | {"later": 1}}, tmp_path / "newer.pt")
    torch.save(state | {"state": state["state"][:1]}, tmp_path / "short.pt")
    torch.save(state | {"config": state["config"] | {"rank": 0}}, tmp_path / "rank.pt")
    torch.save({k: v for k, v in state.items() if k != "config"}, tmp_path / "bare.pt")
    return ["missing.pt", "truncated.pt", "empty.pt", "text.pt", "other.pt", "list.pt", "pickle.pt",
            "newer.pt", "short.pt", "rank.pt", "bare.pt"]


def test_load_refuses_files_that_are_not_its_own_in_one_line_that_names_them(tmp_path):
    for name in bad_files(tmp_path):
        model = chain()
        before, weights = traces(model), copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError) as error:
            StructLoRA.load(model, tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value), name
        assert traces(model) == before, name
        assert all(torch.equal(v, weights[n]) for n, v in model.state_dict().items()), name


@pytest.mark.parametrize("other", ("fewer layers", "wider", "other names", "too narrow", "head"))
def test_load_refuses_another_model_and_leaves_it_untouched(other, tmp_path):
    _, adapters = adapted()
    with_head(adapters)
    adapters.save(tmp_path / "adapter.pt")
    torch.manual_seed(1)
    if other == "other names":
        model = nn.Sequential(nn.Linear(6, 4))
    else:
        sizes = {"fewer layers": {"layers": 2}, "wider": {"hidden": 12}, "head": {"classes": 5},
                 "too narrow": {"hidden": 1}}
        model = Chain(**{"layers": 3, **sizes[other]})
    if other == "head":                              # the weight fits, the bias does not
        model.head.weight = nn.Parameter(torch.randn(4, 6))
    before, weights = traces(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error:
        StructLoRA.load(model, tmp_path / "adapter.pt")
    assert "adapter.pt" in str(error.value) and "\n" not in str(error.value)
    assert traces(model) == before
    assert all(torch.equal(v, weights[n]) for n, v in model.state_dict().items())


def test_load_refuses_a_model_that_has_adapters(tmp_path):
    model, adapters = adapted()
    adapters.save(tmp_path / "adapter.pt")
    with pytest.raises(ValueError, match="adapters already"):
        StructLoRA.load(model, tmp_path / "adapter.pt")
    assert len(adapters.layers) == 6 and isinstance(model.blocks[0].q_proj, LoRALinear)


# --- export


def test_exported_files_are_those_that_peft_reads(tmp_path):
    model, adapters = adapted()
    with_head(adapters)
    adapters.export_peft(tmp_path / "new" / "folder", base="some/model")
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {"adapter_config.json",
                                                                       "adapter_model.bin"}
    config = json.loads((tmp_path / "new" / "folder" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "some/model"
    assert sorted(config["target_modules"]) == sorted(QV)
    assert config["modules_to_save"] == ["head"] and config["bias"] == "none"
    tensors = torch.load(tmp_path / "new" / "folder" / "adapter_model.bin", weights_only=True)
    assert set(tensors) == ({f"base_model.model.{n}.lora_{f}.weight" for n in QV for f in "AB"}
                            | {"base_model.model.head.weight", "base_model.model.head.bias"})
    for name, delta in adapters.deltas().items():
        assert torch.allclose(peft_delta(tmp_path / "new" / "folder", name), delta, atol=1e-6)


def test_exported_ranks_are_the_merged_ranks_also_where_nothing_is_left(tmp_path):
    model, adapters = adapted(4, budget=1.0)
    adapters.graphs[0].gate.mu.data[0].fill_(1e-6)               # layer 0 loses every direction
    adapters.prune(1.0)
    ranks = {n: A.shape[0] for n, (_, A) in adapters.factors().items()}
    assert ranks["blocks.0.q_proj"] == 0 and len(set(ranks.values())) > 2
    adapters.export_peft(tmp_path)
    for name, delta in adapters.deltas().items():
        exported = peft_delta(tmp_path, name)
        assert torch.allclose(exported, delta, atol=1e-6) and exported.shape == delta.shape
    model.eval()
    x = inputs()
    output = model(x)
    adapters.diagnostics()
    assert torch.allclose(adapters.merge()(x), output, atol=1e-5)


@pytest.mark.parametrize("rank", (1, 2, 5, 100))
def test_export_cut_to_a_rank_is_the_best_approximation_of_that_rank(rank, tmp_path):
    _, adapters = adapted(4, rank=3)
    adapters.export_peft(tmp_path, rank=rank)
    for name, delta in adapters.deltas().items():
        U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
        best = U[:, :rank] * S[:rank] @ Vh[:rank]
        assert (peft_delta(tmp_path, name).double() - best).abs().max() < 1e-5 * (1 + S[0])
    tensors = torch.load(tmp_path / "adapter_model.bin", weights_only=True)
    assert all(min(t.shape) <= rank for t in tensors.values())


def test_export_of_one_trained_tensor_of_a_module(tmp_path):
    _, adapters = adapted()
    adapters.model.head.bias.requires_grad_(True)
    adapters.export_peft(tmp_path)
    tensors = torch.load(tmp_path / "adapter_model.bin", weights_only=True)
    assert "base_model.model.head.bias" in tensors
    assert "base_model.model.head.weight" not in tensors


@pytest.mark.parametrize("name", ("blocks.0.q_proj.bias", "token", "blocks.0.scale"))
def test_export_refuses_what_peft_cannot_read(name, tmp_path):
    # PEFT drops the bias of an adapted layer without a word, and cannot replace the modules that
    # the others belong to; the plain file and merging can do all of it
    model = chain()
    model.token, model.blocks[0].scale = (nn.Parameter(torch.zeros(6)) for _ in "ab")
    adapters = attach(model, Config(rank=2))
    model.get_parameter(name.replace("q_proj", "q_proj.base")).requires_grad_(True)
    adapters.save(tmp_path / "adapter.pt")
    with pytest.raises(ValueError, match=name.replace("q_proj.", "q_proj.*")):
        adapters.export_peft(tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("gate,coordinator,budget", (("gaussian", "attention", 1.0),
                                                     ("concrete", "uniform", None),
                                                     ("none", "none", None)))
def test_peft_gives_the_merged_outputs(gate, coordinator, budget, tmp_path):
    peft = pytest.importorskip("peft")
    model, adapters = adapted(12, gate=gate, coordinator=coordinator, budget=budget)
    adapters.prune(1.0)
    with_head(adapters)
    adapters.export_peft(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")               # PEFT warns of keys that it does not find
        other = peft.PeftModel.from_pretrained(chain(12), tmp_path).eval()
    x = inputs()
    merged = adapters.merge().eval()(x)
    assert (other(x) - merged).abs().max() < 1e-5 * float(merged.abs().max().detach())
    assert not torch.allclose(merged, chain(12)(x), atol=0.1)
    assert torch.allclose(other.merge_and_unload()(x), merged, atol=1e-4)


class Nested(nn.Module):
    # One target's name is the end of two others'
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.encoder = nn.ModuleDict({"q_proj": nn.Linear(6, 6)})
        self.decoder = nn.ModuleDict({"q_proj": nn.Linear(6, 6)})

    def forward(self, x):
        x = self.encoder["q_proj"](torch.tanh(self.q_proj(x)))
        return self.decoder["q_proj"](torch.tanh(x))


@pytest.mark.parametrize("shut", ("q_proj", "encoder.q_proj"))
def test_peft_tells_apart_names_that_end_alike(shut, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = Nested()
    model = copy.deepcopy(plain)
    adapters = attach(model, Config(rank=3, targets="q_proj"))
    for graph in adapters.graphs:
        graph.B.data.normal_()
        if graph.names == [shut]:
            graph.gate.log_sigma.data[0, 0, 1:] = 9.0            # merged rank 1, the others 3
    adapters.export_peft(tmp_path)
    x = inputs()
    merged = adapters.merge()(x)
    other = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    assert torch.allclose(other(x), merged, atol=1e-5)


# --- from end to end


@pytest.mark.parametrize("config", ({}, {"gate": "concrete", "edges": "random"}, {"budget": 2.0},
                                    {"gate": "none", "coordinator": "none"}, {"hops": 2}))
def test_training_lowers_the_loss_and_merging_keeps_it(config):
    torch.manual_seed(0)
    model = chain()
    before = traces(model)
    adapters = attach(model, Config(rank=2, **config))
    losses = train_a_little(model, adapters, steps=60, lr=3e-2)
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    output = model(inputs(16))
    model.train()
    merged = adapters.merge()
    assert torch.allclose(merged(inputs(16)), output, atol=1e-5 * (1 + output.abs().max().item()))
    assert traces(merged) == before


def hugging_face(name):
    # A tiny random model of the family, an input, what its linear layers are called, the loss
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (4, 7))
    if name == "llama":
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16)
        model = transformers.LlamaForCausalLM(config)
        return model, {"input_ids": tokens, "labels": tokens}, ("q_proj", "v_proj")
    if name == "vit":
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
            image_size=8, patch_size=4, num_labels=3)
        model = transformers.ViTForImageClassification(config)
        names = {n.rpartition(".")[2] for n, _ in model.named_modules()}
        targets = ("query", "value") if "query" in names else ("q_proj", "v_proj")
        return model, {"pixel_values": torch.randn(4, 3, 8, 8),
                       "labels": torch.tensor([0, 1, 2, 1])}, targets
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, num_labels=3)
    model = transformers.BertForSequenceClassification(config)
    return model, {"input_ids": tokens, "labels": torch.tensor([0, 1, 2, 1])}, ("query", "value")


@pytest.mark.parametrize("name", ("llama", "vit", "bert"))
def test_ten_lines_adapt_a_transformers_model(name):
    model, batch, targets = hugging_face(name)
    before = traces(model)
    frozen = model.eval()(**batch).logits
    adapters = attach(model.train(), Config(rank=2, targets=targets))
    model.eval()
    assert torch.equal(model(**batch).logits, frozen)
    model.train()
    assert len(adapters.graphs) == 2 and all(len(g.names) == 3 for g in adapters.graphs)
    if name != "llama":
        model.classifier.requires_grad_(True)        # a new head is trained along
    optimizer = torch.optim.AdamW(adapters.param_groups(lr=2e-2))
    losses = []
    for _ in range(30):
        loss = model(**batch).loss
        (loss + adapters.penalty(num_examples=1000)).backward()
        adapters.observe_gradients()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
    model.eval()
    output = model(**batch).logits
    assert torch.allclose(adapters.merge()(**batch).logits, output, atol=1e-4)
    assert traces(model.train())[2] == before[2]
    assert [t[:3] for t in traces(model)[0]] == [t[:3] for t in before[0]]


@pytest.mark.parametrize("name", ("llama", "vit", "bert"))
def test_a_transformers_model_gives_the_same_gradients_with_its_own_checkpointing(name):
    model, batch, targets = hugging_face(name)
    adapters = attach(model.train(), Config(rank=2, targets=targets))
    for graph in adapters.graphs:
        graph.B.data.normal_(std=0.1)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")      # newer versions call it something else
                model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        model.zero_grad()
        model(**batch).loss.backward()
        results.append([p.grad.clone() for g in adapters.graphs for p in g.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results))


def test_llama_generates_with_adapters():
    model, batch, targets = hugging_face("llama")
    adapters = attach(model, Config(rank=2, targets=targets))
    for graph in adapters.graphs:
        graph.B.data.normal_()
    model.eval()
    generate = lambda: model.generate(batch["input_ids"], max_new_tokens=5, do_sample=False,
                                      pad_token_id=0, eos_token_id=None)
    adapted_tokens = generate()
    adapters.merge()
    assert torch.equal(generate(), adapted_tokens)
