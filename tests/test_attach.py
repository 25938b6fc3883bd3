"""attach and what it refuses; merge and detach; copies, casts and files; PEFT; the Trainer."""

import copy
import json
import math
import pickle
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from helpers import (Block, Chain, Checkpointed, adapted, assert_same, chain, inputs, readme_code,
                     senders, shake)
from structlora import Config, LoRA, StructLoRA, attach

pytestmark = pytest.mark.filterwarnings("ignore:no layer has a neighbour")


def train(model, adapters, steps=3):
    """A few steps on a fixed task, with the same draws in every call -> its losses."""
    torch.manual_seed(1)
    optimizer, losses = torch.optim.AdamW(adapters.param_groups(1e-2)), []
    for step in range(steps):
        task = F.cross_entropy(model(inputs(16)).flatten(0, 1), torch.arange(48) % 4)
        (task + adapters.penalty(1000)).backward()
        adapters.observe_gradients()
        optimizer.step()
        optimizer.zero_grad()
        adapters.prune((step + 1) / steps)
        losses.append(task.item())
    return losses


def traces(model):
    """All that must be as before when adapters were refused or have gone."""
    modules = [(name, id(m), m.training, sorted(vars(m)), len(m._forward_hooks),
                len(m._forward_pre_hooks)) for name, m in model.named_modules()]
    return modules, [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]


def peft_delta(directory, name):
    """scaling * B A as PEFT computes it from the two files."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors, patterns = torch.load(directory / "adapter_model.bin"), config["rank_pattern"].items()
    A, B = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
    ranks = [rank for key, rank in patterns if re.match(rf"(.*\.)?({key})$", name)] + [config["r"]]
    assert 0 < A.shape[0] == B.shape[1] == ranks[0] <= config["r"] == config["lora_alpha"]
    assert config["alpha_pattern"] == config["rank_pattern"]     # so the scaling is 1
    return B @ A


# --- attach

@pytest.mark.parametrize("budget,gate_lr", ((None, 0.01), (2.0, 0.05)))
def test_attach_freezes_the_model_and_groups_what_it_trains(budget, gate_lr):
    model = chain()
    frozen = set(model.parameters())
    adapters = attach(model, Config(rank=2, budget=budget, targets="q_proj, v_proj"))
    assert len(adapters.layers) == 6 and not any(p.requires_grad for p in frozen)
    model.head.requires_grad_(True)                  # a new head, say
    model.blocks[0].requires_grad_(False)            # freezes the updates of this block alone
    names = {p: name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    factors, mixing, gates = adapters.param_groups(lr=3e-3, weight_decay=0.05)
    for group, kinds, rates in ((factors, {"A", "B", "weight", "bias"}, (3e-3, 0.05)),
                                (mixing, {"rho", "w_src", "w_dst"}, (3e-3, 0.0)),
                                (gates, {"mu", "log_sigma"}, (gate_lr, 0.0))):
        assert {names.pop(p) for p in group["params"]} == kinds
        assert (group["lr"], group["weight_decay"]) == rates
    assert set(names.values()) == {"probe"}          # which no optimizer trains


def test_an_adapter_is_a_child_of_its_layer_which_stays_what_it_was():
    model, plain = chain(), chain(seed=5)
    before = [(name, id(m)) for name, m in model.named_modules()]
    adapters = attach(model, Config(rank=2, targets=["0.q_proj", "head"]))       # or paths
    assert [(n, id(m)) for n, m in model.named_modules() if ".lora" not in f".{n}"] == before
    assert adapters.layers == {"blocks.0.q_proj": model.blocks[0].q_proj.lora,
                               "head": model.head.lora}
    assert all(parameter.dim() for parameter in model.parameters())      # FSDP refuses scalars
    model.load_state_dict(plain.state_dict(), strict=False)      # pretrained weights after attach
    assert torch.equal(model(inputs()), plain(inputs()))


def test_layers_of_the_same_name_but_for_its_numbers_and_of_the_same_shape_are_a_kind():
    model, targets = nn.Module(), ("w1", "w3", "2")              # which are whole components
    for l in range(12):
        parts = {name: nn.Linear(6, 6) for name in (*targets, "w11", "xw1")}
        model.add_module(f"encoder_layer_{l}", nn.ModuleDict({"0": nn.ModuleDict(parts)}))
    model.encoder_layer_2["0"]["w1"] = nn.Linear(6, 11)
    adapters = attach(model, Config(rank=2, edges="depth", targets=targets))
    names = [graph.names for graph in adapters.graphs]
    long = [f"encoder_layer_{l}.0.w1" for l in range(12) if l != 2]      # by number: 9 before 10
    assert sorted(map(len, names)) == [1, 11, 12, 12] and long in names
    graph, before = adapters.graphs[names.index(long)], adapters.deltas()
    assert senders(graph)[1:3] == [{0, 2}, {1, 3}]   # 1 and 3 of the model are neighbours
    graph.layers[4].B.data.normal_()
    changed = {n for n, U in adapters.deltas().items() if not torch.equal(U, before[n])}
    assert changed == set(long[3:6])


def model_with(case):
    """A Chain whose blocks.1.q_proj cannot be adapted."""
    model = chain()
    layer, weight = model.blocks[1].q_proj, model.blocks[1].q_proj.weight.data
    weights = {"int8": weight.to(torch.int8), "fp8": weight.to(torch.float8_e4m3fn),
               "meta": weight.to("meta")}
    if case in weights:
        layer.weight = nn.Parameter(weights[case], requires_grad=False)
    else:
        layer.lora = None
    return model


REFUSED = {"int8": "int8, which", "fp8": "float8", "meta": "on the meta device",
           "own": "an attribute"}
OTHERS = (
    (chain, {"targets": ("query", "head")}, r"'query' names nothing.*: blocks.\*.q_proj.*, head$"),
    (lambda: nn.Sequential(nn.Conv1d(6, 6, 1)), {"targets": "0"}, "'0' names Conv1d.*has: none"),
    (chain, {"rank": 7}, r"blocks.0.q_proj.*rank=7 is more than 6"),
    (lambda: adapted()[0], {"targets": "head"}, "adapters already"))


@pytest.mark.parametrize("make,change,message", [
    *OTHERS, *[(case, {}, rf"blocks\.1.q_proj .*{REFUSED[case]}") for case in REFUSED]])
def test_what_cannot_work_is_refused_and_the_model_stays_as_it_was(make, change, message):
    model = model_with(make) if isinstance(make, str) else make()
    before = traces(model)
    with pytest.raises(ValueError, match=message) as error:
        attach(model, Config(**{"rank": 2, "targets": "q_proj", **change}))
    assert "\n" not in str(error.value) and traces(model) == before
    with pytest.raises(ValueError, match="no adapters"):
        StructLoRA(chain())


@pytest.mark.parametrize("fields", (
    {"rank": 0}, {"rank": 1.5}, {"rank": True}, {"alpha": 0.0}, {"alpha": math.nan},
    {"alpha": None}, {"alpha": "16"}, {"dropout": 1.0}, {"dropout": None}, {"targets": None},
    {"targets": ("q_proj", 3)}, {"gate": None}, {"beta": "x"}, {"edges": ["all"]}, {"budget": "2"},
    {"beta": -1.0}, {"beta": math.inf}, {"gate": "foo", "budget": 2.0}, {"coordinator": "gat"},
    {"edges": "deep"}, {"budget": 0.0}, {"budget": 2.0, "gate": "none"}, {"targets": "q_proj,"}))
def test_bad_values_are_refused_by_name(fields):
    with pytest.raises(ValueError, match=f"^{list(fields)[0]}="):
        Config(**fields)


class Bypassed(Chain):
    def forward(self, x):
        for block in self.blocks:                    # as BEiT, Swin and WavLM do
            x = x + F.linear(torch.tanh(block.q_proj(x)), block.v_proj.weight)
        return x


class Reentrant(Checkpointed):
    reentrant = True


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_layers_that_no_gradient_reaches_are_named_at_the_first_step():
    for kind, message in ((Bypassed, "blocks.0.v_proj, .*blocks.2.v_proj"),
                          (Reentrant, "blocks.0.q_proj.*use_reentrant=False")):
        adapters = attach(kind(), Config(rank=2))
        (adapters.model(inputs()).sum() + adapters.penalty(10)).backward()
        with pytest.raises(ValueError, match=message):
            adapters.observe_gradients()
    adapters = attach(chain(), Config(rank=2))       # LayerDrop, experts: some may be left out
    adapters.model.blocks[2](inputs()).sum().backward()
    adapters.observe_gradients()


# --- merge, detach, disabled

def test_autocast_does_not_round_what_is_read_out():
    (_, adapters), (twin, others) = adapted(4), adapted(4)
    with torch.autocast("cpu", torch.bfloat16):
        merged, deltas, numbers = others.deltas(), adapters.deltas(), others.diagnostics()
        others.merge()
    for name, delta in deltas.items():
        assert torch.equal(delta, merged[name]) and delta.dtype == torch.float32
        weight = chain(4).get_submodule(name).weight
        assert torch.equal(twin.get_submodule(name).weight, weight + delta)
    assert numbers["drift_energy"] == adapters.diagnostics()["drift_energy"]


@pytest.mark.parametrize("leave", (StructLoRA.merge, StructLoRA.detach))
def test_merge_and_detach_leave_no_trace(leave, tmp_path):
    model = chain().eval()
    model.head.bias.requires_grad_(False)
    before, plain, frozen = traces(model), copy.deepcopy(model), model(inputs())
    adapters = attach(model, Config(rank=2, budget=2.0))
    train(model.train(), adapters)
    for name, delta in adapters.deltas().items():
        plain.get_submodule(name).weight.data += delta * (leave is StructLoRA.merge)
    assert leave(adapters) is leave(adapters) is model           # a second call changes nothing
    assert all(module.training for module in model.modules()) and traces(model.eval()) == before
    assert_same(model.state_dict(), plain.state_dict())
    assert torch.equal(model(inputs()), frozen) == (leave is StructLoRA.detach)
    assert adapters.factors() == {} and adapters.penalty(10) == 0
    with pytest.raises(ValueError, match="merge.*detach"):
        adapters.save(tmp_path / "adapter.pt")
    with pytest.raises(ValueError, match="merge.*detach"):
        adapters.export_peft(tmp_path)
    attach(model, Config(rank=2))                                # it is free again


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_updates_are_added_in_fp32_or_better_and_cast_once(dtype):
    model = chain().to(dtype)
    for parameter in model.parameters():
        parameter.data /= 3                          # numbers that fp32 cannot hold
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapters = shake(attach(model, Config(rank=2, alpha=3.0)))
    deltas, wide = adapters.deltas(), torch.promote_types(dtype, torch.float32)
    output = model.eval()(inputs(dtype=dtype))
    adapters.merge()
    for name, delta in deltas.items():
        wanted = before[f"{name}.weight"].to(wide) + delta
        assert torch.equal(model.get_submodule(name).weight, wanted.to(dtype))
    assert (model(inputs(dtype=dtype)) - output).abs().max() < 0.03 * output.abs().max()


@pytest.mark.parametrize("size", (math.nan, math.inf, 1e30))     # 1e30: finite, but not its square
def test_an_update_that_is_not_finite_is_refused(size, tmp_path):
    model, adapters = adapted(gate="none")
    before = traces(model)
    model.blocks[2].v_proj.lora.A.data.fill_(size)
    model.blocks[2].v_proj.lora.B.data.fill_(size)
    with pytest.raises(ValueError, match=r"blocks\.\d\.v_proj .*finite"):
        adapters.merge()
    if size != 1e30:
        for rank in (None, 1):                       # before the SVD stumbles over it
            with pytest.raises(ValueError, match="v_proj.*NaN or infinite"):
                adapters.export_peft(tmp_path / "peft", rank=rank)
    assert traces(model) == before and not list(tmp_path.iterdir())
    assert_same(adapters.detach().state_dict(), chain().state_dict())


def test_disabled_adapters_leave_the_frozen_model_for_a_moment():
    model, adapters = adapted()
    frozen, x, output = chain(), inputs(), model.eval()(inputs())
    with pytest.raises(KeyError), adapters.disabled():
        assert torch.equal(model(x), frozen(x))
        assert torch.equal(model.blocks[1](x), frozen.blocks[1](x))
        raise KeyError                               # what fails inside does not leave them off
    assert torch.equal(model(x), output) and not torch.equal(output, frozen(x))


# --- Copies, casts and files

def copied(way, model, adapters, path):
    """(model, adapters) again, by one of the ways that there are."""
    if way == "deepcopy":
        return copy.deepcopy((model, adapters))
    if way == "pickle":
        return pickle.loads(pickle.dumps((model, adapters)))
    if way == "file":
        adapters.save(str(path))
        assert "blocks.0.q_proj.weight" not in torch.load(path, weights_only=True)["state"]
        again = StructLoRA.load(chain(6), path)
    else:
        again = attach(chain(6, seed=5), adapters.config)
        again.model.head.requires_grad_(True)
        again.model.load_state_dict(model.state_dict())
    return again.model, again


@pytest.mark.parametrize("way", ("deepcopy", "pickle", "file", "state_dict"))
@pytest.mark.parametrize("edges,steps,budget", (("similarity", 4, None), ("similarity", 12, 2.0),
                                                ("all", 4, 2.0)))
def test_a_copy_trains_on_as_the_original(way, edges, steps, budget, tmp_path):
    model = chain(6)
    adapters = attach(model, Config(rank=2, edges=edges, budget=budget, dropout=0.1))
    model.head.requires_grad_(True)
    train(model, adapters, steps)                    # the edges settle after 10
    loss = model(inputs()).square().mean()           # in the middle of a step
    other, again = copied(way, model, adapters, tmp_path / "adapter.pt")
    loss.backward()                                  # the copy took nothing away
    model.zero_grad()
    assert again.model is other and again.config == adapters.config
    assert_same(model.state_dict(), other.state_dict())
    assert not set(model.parameters()) & set(other.parameters())
    assert train(model, adapters) == train(other, again)
    assert_same(model.state_dict(), other.state_dict())
    average, before = copy.deepcopy(other), other.eval()(inputs())       # of the model: an EMA, say
    assert_same(adapters.merge().state_dict(), again.merge().state_dict())
    assert not any(isinstance(module, LoRA) for module in other.modules())
    assert torch.equal(average.eval()(inputs()), before)         # it keeps its adapters


@pytest.mark.parametrize("dtype,tolerance", ((torch.float64, 1e-5), (torch.bfloat16, 0.1)))
def test_an_adapted_model_can_be_cast_and_moved_as_a_whole(dtype, tolerance, recwarn):
    model, adapters = adapted()
    exact, x = model.eval()(inputs()), inputs(dtype=dtype)
    (model.to(dtype).train()(x).float().square().mean() + adapters.penalty(10)).backward()
    adapters.observe_gradients()
    said = [w for w in recwarn if "half precision" in str(w.message)]    # too coarse for its steps
    assert bool(said) == (dtype == torch.bfloat16)
    output = model.eval()(x)
    assert output.dtype == dtype and (output - exact).abs().max() < tolerance * exact.abs().max()
    assert (copy.deepcopy(adapters).merge()(x) - output).abs().max() < tolerance * exact.abs().max()
    model.to("meta")                                 # any device without data shows what is left
    for module in model.modules():
        tensors = [*module.parameters(), *module.buffers(), *vars(module).values()]
        assert all(t.is_meta for t in tensors if isinstance(t, torch.Tensor))


def test_load_refuses_other_files_and_other_models_and_leaves_the_model_as_it_was(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, adapters = adapted()
    adapters.model.head.requires_grad_(True).weight.data.fill_(1.0)      # is in the file too
    adapters.save("good.pt")
    good = torch.load("good.pt")
    wrong = [good["state"], good | {"format": "structlora-2"}, good | {"config": {"later": 1}},
             good | {"config": {"rank": 0}}, good | {"state": {}}]
    for name, tensor in (("block.q_proj.A", torch.ones(2, 6)), ("blocks.0.q_proj.A", torch.ones(5)),
                         ("blocks.0.q_proj.A", torch.full((2, 6), math.nan))):
        wrong.append(good | {"state": good["state"] | {name: tensor}})
    others = adapted()[0], Chain(2), Chain(3, hidden=12), Chain(3, hidden=1), Block()
    for model, file in [(other, good) for other in others] + [(chain(), file) for file in wrong]:
        torch.save(file, "bad.pt")
        before, weights = traces(model), copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="^bad.pt: "):
            StructLoRA.load(model, "bad.pt")
        assert traces(model) == before
        assert_same(model.state_dict(), weights)


# --- PEFT and the Hugging Face Trainer

@pytest.mark.parametrize("coordinator", ("attention", "none"))   # with "none" some ranks are 0
@pytest.mark.parametrize("rank", (1, 2, 5, 100, None))
def test_export_cut_to_a_rank_is_the_best_approximation_of_that_rank(rank, coordinator, tmp_path):
    _, adapters = adapted(4, rank=3, coordinator=coordinator)
    adapters.export_peft(tmp_path, rank=rank)
    for name, delta in adapters.deltas().items():
        U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
        best, got = U[:, :rank] * S[:rank] @ Vh[:rank], peft_delta(tmp_path, name)
        assert (got.double() - best).abs().max() < 1e-5 * (1 + S[0])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] <= min(rank or 6, 6)


@pytest.mark.parametrize("trained", ("embed.weight", "proj.weight", "block.q_proj.bias", "token"))
def test_export_refuses_what_peft_would_read_as_something_else(trained, tmp_path):
    model = nn.ModuleDict({"embed": nn.Embedding(10, 6), "lm_head": nn.Linear(6, 10, bias=False),
                           "block": Block(), "proj": nn.Linear(6, 4)})
    model["lm_head"].weight = model["embed"].weight
    model.token = nn.Parameter(torch.zeros(6))
    adapters = attach(model, Config(rank=2))
    model.get_parameter(trained).requires_grad_(True)
    adapters.save(tmp_path / "adapter.pt")           # which can carry it, as merging can
    with pytest.raises(ValueError, match=f"PEFT cannot carry {trained}"):
        adapters.export_peft(tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.filterwarnings("error")                 # PEFT warns of keys that it does not find
@pytest.mark.parametrize("edges,budget", (("hybrid", 1.0), ("all", None)))
def test_peft_gives_the_merged_outputs(edges, budget, tmp_path):
    peft = pytest.importorskip("peft")
    rest, x, plain = chain(11), inputs(), nn.Sequential()
    plain.add_module("q_proj", nn.Linear(6, 6))      # a name that is the end of others
    plain.add_module("rest", rest)
    adapters = shake(attach(copy.deepcopy(plain), Config(rank=2, edges=edges, budget=budget)))
    adapters.prune(1.0)
    assert len({len(A) for _, A in adapters.factors().values()}) > 3     # ranks, 0 among them
    for parameter in adapters.model.rest.head.requires_grad_(True).parameters():
        parameter.data += 1                          # a trained head
    adapters.export_peft(tmp_path, base="some/model")
    other = peft.PeftModel.from_pretrained(plain.eval(), tmp_path)
    merged = adapters.merge().eval()(x)
    assert (other(x) - merged).abs().max() < 1e-4 * merged.abs().max()   # eleven layers deep
    assert (other.merge_and_unload()(x) - merged).abs().max() < 1e-4 * merged.abs().max()


@pytest.mark.filterwarnings("ignore")                # old names of options
def test_the_hugging_face_trainer_as_the_readme_subclasses_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=None))
    tokens = torch.randint(0, 50, (24, 1)).repeat(1, 8)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    adapters = attach(model, Config(rank=2))
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=6, per_device_train_batch_size=2, use_cpu=True,
        gradient_accumulation_steps=3, gradient_checkpointing=True, save_strategy="no",
        gradient_checkpointing_kwargs={"use_reentrant": False}, report_to=[], disable_tqdm=True)
    scope = {"Trainer": transformers.Trainer, "torch": torch, "model": model, "data": data,
             "adapters": adapters, "arguments": arguments, "predicted_tokens": 24 * 7}
    exec(readme_code("(Trainer)"), scope)
    trainer = scope["trainer"]
    trainer.eval_dataset, arguments.eval_strategy = data, "epoch"        # between the steps, too
    trainer.optimizer.param_groups[0]["lr"] = 3e-2               # enough for 24 of them
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert adapters.graphs[0].steps == trainer.state.global_step == 24
    assert trainer.evaluate()["eval_loss"] < before - 0.1
    generated = model.eval().generate(tokens[:2, :2], max_new_tokens=5, do_sample=False)
    merged = adapters.merge().generate(tokens[:2, :2], max_new_tokens=5, do_sample=False)
    assert torch.equal(generated, merged)
