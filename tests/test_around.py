"""What users do to a model after attach(), and what they attach to: surgery, wrappers, hooks,
quantised and other linear layers, statistics, averages, thin checkpoints, copies, memory."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.prune
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import structlora
from helpers import Block, Chain, Checkpointed, adapted, assert_same, chain, inputs, senders, shake
from structlora import Config, LoRA, StructLoRA, attach

pytestmark = pytest.mark.filterwarnings("ignore:no layer has a neighbour")


def close(a, b, tolerance=1e-5):
    return (a - b).abs().max() <= tolerance * (1 + b.abs().max())


def exported(adapters, folder):
    """name -> B A of the exported files, after a comparison with deltas()."""
    adapters.export_peft(folder)
    tensors, deltas = torch.load(folder / "adapter_model.bin"), adapters.deltas()
    for name, delta in deltas.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        assert close(B @ A, delta), name
    return deltas


def adapters_in(model):
    return [name for name, module in model.named_modules() if isinstance(module, LoRA)]


def hooks_in(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- Surgery and wrapping

def test_the_children_of_a_sequential_root_stay_as_they_were():
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), Block(), nn.Linear(6, 4))
    children, head = [*model.children()], model[-1]
    adapters = shake(attach(model, Config(rank=2)))
    assert [*model.children()] == children and len(model) == 4 and model[-1] is head
    model[-1].requires_grad_(True)                   # the head, not something of ours
    assert structlora.sort_tensors(model)[1].keys() == {"3.weight", "3.bias"}
    trunk = nn.Sequential(*[*model.children()][:-1]).eval()
    assert close(head(trunk(inputs())), model.eval()(inputs()))
    model[-1] = nn.Linear(6, 10)                     # a new head survives
    output = model(inputs())
    assert adapters.merge() is model and len(model) == 4 and close(model(inputs()), output)
    assert not adapters_in(model) and not hooks_in(model)


def replaced(model, number, change):
    model.blocks[number] = change(model.blocks[number])
    return model


def without(model, place):
    del model.blocks[place]
    return model


def with_a_new_layer(model):
    model.blocks[2].v_proj = nn.Linear(10, 6)
    return model


SURGERY = {
    "checkpoint wrapper": lambda model: replaced(model, 1, checkpoint_wrapper),
    "compiled block": lambda model: replaced(model, 1, torch.compile(backend="eager")),
    "last cut": lambda model: without(model, -1), "first cut": lambda model: without(model, 0),
    "layer replaced": with_a_new_layer,
    "inside another": lambda model: nn.Sequential(nn.Identity(), model),
    "a part": lambda model: nn.Sequential(*model.blocks[1:], model.head)}


@pytest.mark.parametrize("change", SURGERY)
@pytest.mark.parametrize("edges", ("hybrid", "all"))
def test_an_adapter_belongs_to_its_layer_wherever_it_goes(change, edges, tmp_path):
    torch._dynamo.reset()
    model = SURGERY[change](adapted(4, edges=edges)[0]).eval()
    adapters, output = StructLoRA(model), model(inputs())
    base = StructLoRA(copy.deepcopy(model)).detach()             # what PEFT would load onto
    layers = {structlora.clean(name): module for name, module in base.named_modules()}
    for name, delta in exported(adapters, tmp_path).items():
        assert "_wrapped" not in name and "_orig_mod" not in name
        layers[name].weight.data += delta
    assert close(base(inputs()), output)
    model.train()(inputs()).square().sum().backward()            # it trains on
    assert all(layer.A.grad.any() for layer in adapters.layers.values())
    assert adapters.merge() is model and close(model.eval()(inputs()), output)
    assert not adapters_in(model) and not hooks_in(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_was_wrapped_after_attach_is_saved_and_loads_into_a_plain_model(tmp_path):
    model, adapters = adapted(4)
    output = replaced(model, 1, checkpoint_wrapper).eval()(inputs())
    adapters.save(tmp_path / "adapter.pt")
    again = StructLoRA.load(chain(4), tmp_path / "adapter.pt")
    assert close(again.model.eval()(inputs()), output)
    with pytest.raises(ValueError, match="cut off"):             # the others still use it
        without(model, -1)
        adapters.save(tmp_path / "cut.pt")
    assert not (tmp_path / "cut.pt").exists()


def test_peft_on_top_merges_and_leaves_nothing_of_ours():
    peft = pytest.importorskip("peft")
    model, adapters = adapted(3)
    output = model.eval()(inputs())
    top = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert close(top.eval()(inputs()), output)
    adapters.merge()
    assert close(top(inputs()), output) and not adapters_in(top)


def test_hooks_attributes_and_forwards_of_a_layer_stay():
    model, calls = chain(), []
    layer = model.blocks[1].q_proj
    layer.note = "mine"
    layer.register_forward_hook(lambda m, x, y: calls.append("before") or y * 2)
    layer.register_forward_pre_hook(lambda m, x: calls.append("pre"))
    adapters = attach(model, Config(rank=2))
    layer.register_forward_hook(lambda m, x, y: calls.append("after"))
    shake(adapters)
    calls.clear()
    output = model.eval()(inputs())
    assert calls == ["pre", "before", "after"]       # which see y with the update
    assert close(adapters.merge()(inputs()), output) and layer.note == "mine"
    assert calls == ["pre", "before", "after"] * 2


def test_a_transformer_encoder_layer_uses_its_adapters_in_eval_mode():
    torch.manual_seed(0)
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 3)
    adapters = shake(attach(stack, Config(rank=2, targets=("linear1", "linear2"))))
    with torch.no_grad():                            # where torch has a path that calls no layer
        output = stack.eval()(inputs())
        assert close(adapters.merge()(inputs()), output, 1e-4)


# --- Quantised and other linear layers

class Int8(nn.Linear):
    """int8 weights and a scale per output, as parameters or as buffers; its own forward."""

    def __init__(self, linear, buffers):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        tensors = {"weight": (linear.weight.detach() / scale).round().to(torch.int8),
                   "scale": scale, "bias": linear.bias.detach()}
        del self.weight, self.bias
        for name, tensor in tensors.items():
            if buffers:
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias)


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def bitsandbytes_layer(kind, linear):
    bnb = pytest.importorskip("bitsandbytes")
    options = {"Linear4bit": {"quant_type": "nf4"}, "Linear8bitLt": {"has_fp16_weights": False}}
    layer = getattr(bnb.nn, kind)(linear.in_features, linear.out_features, **options[kind])
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def other_layer(case, linear):
    """`linear` in another storage or with another way to compute."""
    if case.startswith("int8"):
        return Int8(linear, case == "int8 buffer")
    if case == "own forward":
        layer = Twice(linear.in_features, linear.out_features)
        layer.load_state_dict(linear.state_dict())
        return layer
    if case == "offloaded":
        linear.forward = lambda x, call=linear.forward: call(x)
    if case == "weight_norm":
        return nn.utils.parametrizations.weight_norm(linear)
    if case == "old weight_norm":
        return torch.nn.utils.weight_norm(linear)
    if case == "pruned":
        return nn.utils.prune.l1_unstructured(linear, "weight", 0.5)
    return bitsandbytes_layer(case, linear) if case.startswith("Linear") else linear


@pytest.mark.filterwarnings("ignore")                # bitsandbytes tells of casts
@pytest.mark.parametrize("case", (
    "int8 parameter", "int8 buffer", "own forward", "offloaded", "weight_norm", "old weight_norm",
    "pruned", "tied", "Linear4bit", "Linear8bitLt"))
def test_a_linear_layer_of_any_storage_trains_exports_and_is_not_merged(case, tmp_path):
    def build():
        torch.manual_seed(0)
        model = Chain(3, width=32, hidden=64)
        for block in model.blocks:
            block.q_proj = other_layer(case, block.q_proj)
        if case == "tied":
            model.blocks[1].q_proj.weight = model.blocks[0].q_proj.weight
        return model

    model, x = build(), inputs(width=32)
    frozen = model.eval()(x)
    adapters = attach(model, Config(rank=2, alpha=3.0))
    assert torch.equal(model(x), frozen)
    optimizer = torch.optim.AdamW(adapters.param_groups(1e-2))
    losses = []
    for _ in range(12):
        loss = model.train()(x).square().mean() + adapters.penalty(100)
        loss.backward()
        adapters.observe_gradients()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    output, deltas = model.eval()(x), adapters.deltas()
    with adapters.disabled():
        assert torch.equal(model(x), frozen)
    for name, layer in adapters.layers.items():      # the dense reference: what the layer adds to y
        linear, h = model.get_submodule(name), torch.randn(5, deltas[name].shape[1])
        with adapters.disabled():
            y = linear(h)
        assert close(linear(h) - y, h @ deltas[name].T, 1e-4), name
    exported(adapters, tmp_path / "peft")
    adapters.save(tmp_path / "adapter.pt")
    state = torch.load(tmp_path / "adapter.pt", weights_only=True)["state"]
    assert all(".lora." in name for name in state)   # no frozen storage
    again = StructLoRA.load(build(), tmp_path / "adapter.pt")
    assert close(again.model.eval()(x), output)
    with pytest.raises(ValueError, match=r"blocks\.\d\.q_proj cannot be merged"):
        adapters.merge()
    assert torch.equal(model(x), output) and len(adapters_in(model)) == 6    # not touched
    assert torch.equal(adapters.detach()(x), frozen)


# --- Statistics, averages, thin checkpoints, copies

def normalised_chain(seed=0):
    model = chain(4, seed)
    model.norm = nn.BatchNorm1d(6)
    model.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4))
    model.forward = lambda x: model.head(model.norm(run_blocks(model, x)))
    return model


def run_blocks(model, x):
    for block in model.blocks:
        x = block(x)
    return x


@pytest.mark.parametrize("outside", (True, False))
def test_statistics_that_training_moves_are_saved_and_not_silently_lost(outside, tmp_path):
    x, model = 3 + 2 * inputs(32, None), normalised_chain()
    adapters = attach(model, Config(rank=2))
    model.norm.train(outside)
    model.head.requires_grad_(True)
    for _ in range(5):
        if not outside:
            model.norm.eval()                        # kept as it was
        model(x).square().mean().backward()
    adapters.observe_gradients()
    output = model.eval()(x)
    adapters.save(tmp_path / "adapter.pt")
    again = StructLoRA.load(normalised_chain(), tmp_path / "adapter.pt")
    assert close(again.model.eval()(x), output)
    if outside:
        with pytest.raises(ValueError, match="norm.*, which training moves"):
            adapters.export_peft(tmp_path / "peft")
        assert not (tmp_path / "peft").exists()
        return
    adapters.export_peft(tmp_path / "peft")          # inside a trained head PEFT carries them
    peft = pytest.importorskip("peft")
    plain = normalised_chain().eval()
    other = peft.PeftModel.from_pretrained(plain, tmp_path / "peft")
    assert close(plain.head(plain.norm(run_blocks(plain, x))), output), other


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("average", (None, get_ema_multi_avg_fn(0.999),
                                     lambda a, b, n: 0.999 * a + 0.001 * b))
def test_an_average_of_models_has_the_edges_and_the_budget_of_the_last(average, dtype):
    model = chain(6).to(dtype)
    adapters = attach(model, Config(rank=2, budget=3.0))
    kind = {"multi_avg_fn": average} if average and "multi" in str(average) else {"avg_fn": average}
    mean = AveragedModel(model, use_buffers=True, **kind)
    optimizer = torch.optim.SGD(adapters.param_groups(1e-2))
    for step in range(30):
        (model(inputs(seed=step, dtype=dtype)).square().mean() + adapters.penalty(100)).backward()
        adapters.observe_gradients()
        optimizer.step()
        optimizer.zero_grad()
        adapters.prune((step + 1) / 30)
        mean.update_parameters(model)
    same = StructLoRA(mean)
    for graph, other in zip(adapters.graphs, same.graphs):
        assert senders(graph) == senders(other)
        assert torch.equal(graph.present(), other.present())
        assert torch.equal(other.senders().sum(2) <= 1, torch.ones(6, 4, dtype=bool))
    assert sum(int(graph.present().sum()) for graph in same.graphs) == 3 * 12
    output = mean.eval()(inputs(dtype=dtype))
    assert close(same.merge()(inputs(dtype=dtype)), output, 1e-5 if dtype.itemsize == 4 else 0.05)


@pytest.mark.parametrize("edges, lost", (("hybrid", "graph.edges"), ("depth", "graph.rho"),
                                         ("depth", "gate.mu"), ("hybrid", "graph.removed")))
def test_factors_that_are_loaded_without_what_belongs_to_them_are_said(edges, lost):
    model, _ = adapted(4, edges=edges, budget=3.0)
    thin = {n: p for n, p in model.state_dict().items() if not n.endswith(lost)}
    fresh = chain(4)
    attach(fresh, Config(rank=2, edges=edges, budget=3.0))
    with pytest.warns(UserWarning) as said:
        fresh.load_state_dict(thin, strict=False)
    assert any(f"without blocks.3.q_proj.lora.{lost}" in str(w.message) for w in said)


def test_signs_are_no_matter_of_the_random_state():
    model, _ = adapted(4, edges="all")
    thin = {n: p for n, p in model.state_dict().items() if "lora" in n and "graph.signs" not in n}
    torch.manual_seed(77)
    fresh = chain(4)
    attach(fresh, Config(rank=2, alpha=3.0, edges="all"))
    fresh.load_state_dict(thin, strict=False)
    assert close(fresh.eval()(inputs()), model.eval()(inputs()))


def test_pretrained_weights_and_whole_states_load_without_a_word(recwarn):
    model, _ = adapted(4, budget=2.0)
    fresh = chain(4, seed=5)
    attach(fresh, Config(rank=2, alpha=3.0, budget=2.0))
    fresh.load_state_dict(chain(4).state_dict(), strict=False)
    fresh.load_state_dict(model.state_dict())
    assert not recwarn.list and close(fresh.eval()(inputs()), model.eval()(inputs()))


@pytest.mark.parametrize("way", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))))
def test_a_copy_of_the_model_has_its_handle(way):
    model, adapters = adapted(4)
    twin = way(model)
    handle = StructLoRA(twin)
    assert_same(handle.deltas(), adapters.deltas())
    assert handle.config == adapters.config and not {*handle.graphs} & {*adapters.graphs}
    for layer in handle.layers.values():             # the copy's hooks use the copy's adapters
        layer.B.data.mul_(2)
    assert not close(twin.eval()(inputs()), model.eval()(inputs()), 1e-2)
    handle.merge()
    assert not adapters_in(twin) and len(adapters_in(model)) == 8


# --- Training loops

def test_what_is_trained_stays_the_same_and_an_optimizer_of_it_can_be_restored(tmp_path):
    model = chain(4)
    adapters = attach(model, Config(rank=2))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    grouped = {p for group in adapters.param_groups(1.0) for p in group["params"]}
    assert {n for n, p in model.named_parameters() if p.requires_grad and p not in grouped} == {
        n for n in trained if n.endswith("probe")}
    for step in range(12):                           # past the end of the edges
        model(inputs()).square().mean().backward()
        adapters.observe_gradients()
        optimizer.step()
        assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    assert not any(layer.probe.any() for layer in adapters.layers.values())
    adapters.save(tmp_path / "a.pt")
    other = StructLoRA.load(chain(4), tmp_path / "a.pt").model
    fresh = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad])
    fresh.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("leave", (
    lambda adapters, folder: adapters.merge(), lambda adapters, folder: adapters.save(folder / "a"),
    lambda adapters, folder: adapters.export_peft(folder)))
def test_what_the_loop_has_left_out_is_said_on_the_way_out(leave, tmp_path, recwarn):
    for observed, pruned in ((False, True), (True, False), (True, True)):
        model = chain(3)
        adapters = attach(model, Config(rank=2, budget=2.0))
        (model(inputs()).square().mean() + adapters.penalty(10)).backward()
        for layer in adapters.layers.values():
            layer.B.data.normal_()
        if observed:
            adapters.observe_gradients()
        if pruned:
            adapters.prune(1.0)
        recwarn.clear()
        leave(adapters, tmp_path)
        said = " ".join(str(warning.message) for warning in recwarn)
        assert ("observe_gradients() was never called" in said) == (not observed)
        assert ("prune(progress) has removed nothing" in said) == (not pruned)


def test_numbers_that_cannot_be_are_refused_by_name():
    _, adapters = adapted(budget=2.0)
    for number in (0, -5, float("nan"), float("inf"), None, "10"):
        with pytest.raises(ValueError, match="num_examples="):
            adapters.penalty(number)
    assert adapters.penalty(torch.tensor(10)) > 0
    for progress in (-0.1, 1.5, 50, float("nan")):
        with pytest.raises(ValueError, match="progress"):
            adapters.prune(progress)
    for rank in (0, -1, 1.5):
        with pytest.raises(ValueError, match="rank="):
            adapters.export_peft("nowhere", rank=rank)


@pytest.mark.parametrize("first", (True, False))
def test_layers_of_two_precisions_are_exact_each(first):
    model, _ = adapted(3)
    model.eval()
    x, half = inputs(), 0 if first else 2
    block = model.blocks[half]
    for linear in (block.q_proj, block.v_proj):      # the layers alone, not their adapters
        linear.weight.data, linear.bias.data = linear.weight.bfloat16(), linear.bias.bfloat16()
    deltas = StructLoRA(model).deltas()
    for number in {0, 1, 2} - {half}:
        linear = model.blocks[number].q_proj
        wanted = F.linear(x, linear.weight + deltas[f"blocks.{number}.q_proj"], linear.bias)
        assert close(linear(x), wanted)
    assert block(x.bfloat16()).dtype == torch.bfloat16


class Lm(nn.Module):
    """A head beside the model in it, which people call one by one."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(*(Block() for _ in range(6)))
        self.lm_head = nn.Linear(6, 9)

    def forward(self, x):
        return self.lm_head(self.model(x))


def test_a_part_of_the_model_computes_its_messages_once(monkeypatch):
    torch.manual_seed(0)
    lm, calls, real = Lm(), [], structlora.LayerGraph.updates
    adapters = shake(attach(lm, Config(rank=2)))
    monkeypatch.setattr(structlora.LayerGraph, "updates",
                        lambda graph, *args, **more: calls.append(1) or real(graph, *args, **more))
    output = lm.lm_head(lm.model(inputs()))
    assert len(calls) == 2                           # two kinds
    lm.eval()
    assert close(lm.lm_head(lm.model(inputs())), lm(inputs())) and output.requires_grad
    calls.clear()
    checked = torch.utils.checkpoint.checkpoint
    x = inputs()
    for block in lm.train().model:                   # no pass at all: each layer asks
        x = checked(block, x, use_reentrant=False)
    assert len(calls) == 12
    calls.clear()
    x.square().sum().backward()                      # recomputed once for all
    assert len(calls) == 2 and adapters.layers["model.0.q_proj"].B.grad.any()


def test_a_checkpoint_around_a_part_that_holds_several_layers():
    results = []
    for checked in (False, True):
        torch.manual_seed(0)
        lm = Lm()
        adapters = shake(attach(lm, Config(rank=2)))
        torch.manual_seed(3)
        x = inputs().requires_grad_()
        if checked:
            y = torch.utils.checkpoint.checkpoint(lm.model, x, use_reentrant=False)
            z = torch.utils.checkpoint.checkpoint(lambda x: lm(x), x, use_reentrant=False)
        else:
            y, z = lm.model(x), lm(x)
        (y.square().mean() + z.square().mean() + adapters.penalty(10)).backward()
        results.append({n: p.grad for n, p in lm.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys() and len(results[0]) > 20
    for name, gradient in results[0].items():
        assert close(results[1][name], gradient), name


class AutocastInside(Checkpointed):
    def forward(self, x):                            # as accelerate and the Trainer wrap it
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


def test_autocast_that_begins_after_the_pass_can_be_checkpointed_and_the_model_copied():
    model, adapters = adapted(3)
    model.__class__ = AutocastInside
    model(inputs()).float().square().mean().backward()
    twin = copy.deepcopy(model)                      # after a recomputation
    assert all(layer.A.grad.isfinite().all() for layer in adapters.layers.values())
    assert close(twin.eval()(inputs()).float(), model.eval()(inputs()).float())


def test_a_layer_in_eval_mode_uses_its_mean_gates_while_others_draw():
    model, adapters = adapted(3)
    model.train().blocks[0].eval()
    block, x = model.blocks[0], inputs()
    wanted = copy.deepcopy(adapters).merge().blocks[0](x)
    seen = []
    block.register_forward_hook(lambda m, x, y: seen.append(y))
    assert not torch.equal(model(x), model(x)) and close(seen[0], wanted) and close(seen[1], wanted)
    assert close(block.q_proj(input=x), block.q_proj(x))         # called by keyword


def test_half_precision_has_no_nan_where_updates_are_zero():
    model = chain(3).eval()
    attach(model, Config(rank=2))
    output = model(inputs())
    assert close(model.half()(inputs().half()).float(), output, 0.01)


def test_an_averaged_copy_that_is_frozen_keeps_what_was_trained(tmp_path):
    model = chain(3)
    adapters = attach(model, Config(rank=2))
    model.head.requires_grad_(True)
    model.register_buffer("count", torch.zeros((), dtype=torch.long))    # an integer that moves
    (model(inputs()).square().mean() + adapters.penalty(10)).backward()
    adapters.observe_gradients()
    model.head.weight.data += 1
    model.count += 3
    average = AveragedModel(model).requires_grad_(False).eval()
    StructLoRA(average).save(tmp_path / "a.pt")
    plain = chain(3)
    plain.register_buffer("count", torch.zeros((), dtype=torch.long))
    again = StructLoRA.load(plain, tmp_path / "a.pt").model.eval()
    assert close(again(inputs()), average(inputs())) and again.count == 3


def test_what_only_some_layers_of_a_kind_do_is_said():
    model = chain(3)
    adapters = attach(model, Config(rank=2))
    for block in model.blocks[1:]:
        block(inputs()).sum().backward()
    with pytest.warns(UserWarning, match="no gradient reached blocks.0.q_proj: .*at random"):
        adapters.observe_gradients()


def shared_storage(model):
    model.blocks[1].q_proj.weight.data = model.blocks[0].q_proj.weight.data


def expanded(model):
    weight = model.blocks[1].q_proj.weight.data[:1].expand(10, 6)
    model.blocks[1].q_proj.weight = nn.Parameter(weight)


def two_names(model):
    model.blocks[2].q_proj = model.blocks[0].q_proj


@pytest.mark.parametrize("change, leave", (
    (shared_storage, "merge"), (expanded, "merge"), (two_names, "export_peft")))
def test_ways_out_that_would_go_wrong_are_refused_by_name(change, leave, tmp_path):
    model = chain(3)
    change(model)
    adapters = shake(attach(model, Config(rank=2)))
    output = model.eval()(inputs())
    with pytest.raises(ValueError, match=r"blocks\.\d\.q_proj"):
        getattr(adapters, leave)(*[tmp_path] * (leave == "export_peft"))
    assert torch.equal(model(inputs()), output) and not list(tmp_path.iterdir())


def test_two_configs_have_two_handles_and_a_part_that_is_merged_leaves_no_work():
    model = nn.ModuleDict({"a": chain(3), "b": chain(3, 1)})
    first, second = (attach(model[name], Config(rank=rank)) for name, rank in (("a", 1), ("b", 2)))
    with pytest.raises(ValueError, match="several Configs"):
        StructLoRA(model)
    outer = nn.Sequential(chain(3), nn.Linear(4, 4))
    adapters = shake(attach(outer, Config(rank=2)))
    output = outer.eval()(inputs())
    StructLoRA(outer[0]).merge()
    assert close(outer(inputs()), output) and not adapters.layers and first.layers and second.layers


def test_an_interrupted_pass_leaves_nothing_behind():
    model, adapters = adapted(3)

    def interrupt(*_):
        raise KeyboardInterrupt
    handle = model.head.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(inputs())
    handle.remove()
    for layer in adapters.layers.values():
        layer.B.data.zero_()
    assert torch.equal(model.eval()(inputs()), chain(3)(inputs()))
    model(inputs()).sum().backward()
    adapters.observe_gradients()
    assert torch.equal(model.blocks[0](inputs()), chain(3).blocks[0](inputs()))


@pytest.mark.parametrize("leave", (StructLoRA.merge, StructLoRA.detach))
def test_what_was_attached_is_freed_without_the_garbage_collector(leave):
    gc.collect()
    gc.disable()
    try:
        model, adapters = adapted(4)
        model(inputs()).sum().backward()
        adapters.observe_gradients()
        gone = [weakref.ref(part) for part in (*adapters.layers.values(), *adapters.graphs)]
        leave(adapters)
        del adapters
        assert not any(part() for part in gone)
    finally:
        gc.enable()


def test_adapters_that_come_after_a_compiled_call_are_used():
    torch._dynamo.reset()
    model = chain(3).eval()
    compiled = torch.compile(model, backend="eager")
    before = compiled(inputs())
    adapters = attach(model, Config(rank=2))
    for layer in adapters.layers.values():
        layer.B.data.normal_()
    output = compiled(inputs())
    assert not close(output, before, 1e-2) and close(output, model(inputs()))
    adapters.merge()
    assert close(compiled(inputs()), output)
    handle = attach(compiled, Config(rank=2))        # and to a compiled model
    assert "_orig_mod" not in "".join(handle.layers) and close(compiled(inputs()), output)
