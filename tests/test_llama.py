"""train_llama.py: the model, both layouts of checkpoints, generation; against transformers and
Meta's convention, and with damaged files.

    PYTHONPATH=. python tests/test_llama.py        prints EXPECTED anew; it needs transformers"""

import json
import math
import re
import textwrap

import pytest
import torch
import torch.nn.functional as F

from helpers import DATA, assert_same, waves
from structlora import Config, attach
from train_llama import (Llama, LlamaConfig, generate, load_llama, load_tokenizer, read_checkpoint,
                         rotary_frequencies, rotate)

SCALED = (8.0, 1.0, 4.0, 8192)
SIZES = {"grouped": LlamaConfig(40, 32, 2, 4, 2, 8, 48, norm_eps=1e-2),
         "llama3": LlamaConfig(40, 32, 2, 2, 1, 16, 48, rope_scaling=SCALED),
         "tied": LlamaConfig(40, 32, 2, 2, 1, 16, 48, tied=True, rope_scaling=(32.0, *SCALED[1:])),
         "odd": LlamaConfig(37, 30, 3, 3, 3, 10, 50, rope_theta=500.0),
         "head width": LlamaConfig(38, 30, 2, 6, 2, 6, 40)}      # heads x width is not dim
# Of the second text the logits of three places and three tokens, and greedy generation.
EXPECTED = {
    'grouped': ([[-0.36876, 0.58065, 0.87308], [0.57937, 0.18895, 1.55144], [-0.98278, -0.21733,
        0.92229]], [9, 15, 22, 29, 2, 10, 38, 24, 29, 24, 29, 35]),
    'llama3': ([[-1.14623, 2.163, 1.55535], [-0.24032, 2.46567, 1.97969], [0.62235, -0.49227,
        1.99008]], [10, 37, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5]),
    'tied': ([[0.54144, 0.55902, 0.36096], [-0.69071, 1.28512, 0.5498], [-0.42251, 2.24369,
        2.60201]], [8, 6, 31, 6, 31, 6, 31, 6, 31, 6, 14, 6]),
    'odd': ([[-0.78843, -0.75407, -0.04626], [-0.32005, -1.47913, 0.65308], [-1.33528, -1.20337,
        1.19252]], [7, 9, 26, 34, 0, 34, 0, 34, 0, 34, 0, 34]),
    'head width': ([[0.97926, 1.96457, -0.93415], [-0.11502, 1.34112, -1.31628], [0.64344, 0.99654,
        -0.39045]], [35, 4, 14, 34, 4, 14, 1, 35, 15, 17, 35, 15])}
LAYOUTS = ("meta", "rows", "width", "huggingface", "parts", "compiled")


def prompt(config, length=40):
    """A fixed text [2, length]."""
    return (torch.arange(2 * length) ** 2 * 7 // 3 % config.vocab_size).view(2, length)


def model_of(config):
    model = Llama(config).eval()
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}   # tied ones once
    model.load_state_dict(waves(shapes, 0.3), strict=False)
    return model


# --- the layouts, written here a second time, by hand

META = ("model.layers layers self_attn attention q_proj wq k_proj wk v_proj wv o_proj wo "
        "mlp.gate_proj feed_forward.w1 mlp.down_proj feed_forward.w2 mlp.up_proj feed_forward.w3 "
        "input_layernorm attention_norm post_attention_layernorm ffn_norm model.norm norm "
        "lm_head output model.embed_tokens tok_embeddings").split()


def as_meta(config):
    """By Meta's names; channels 2i and 2i + 1 of a head are our i and i + d / 2."""
    meta, d = {}, config.head_dim
    for name, tensor in model_of(config).state_dict().items():
        if ".q_proj" in name or ".k_proj" in name:
            pairs = [half + i for i in range(d // 2) for half in (0, d // 2)]
            tensor = tensor.view(-1, d, config.dim)[:, pairs].flatten(0, 1)
        for ours, theirs in zip(META[::2], META[1::2]):
            name = name.replace(ours, theirs)
        meta[name] = tensor                      # Llama 3.2 stores the tied embedding twice
    return meta | {"rope.freqs": torch.ones(d // 2)}


def write_meta(folder, config, cut=None, **params):
    """One file, or two with the embedding cut by "rows" (Llama 3) or by "width" (LLaMA 1 and 2)."""
    folder.mkdir(exist_ok=True)
    axes = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0,
            "tok_embeddings": {"rows": 0, "width": 1}.get(cut)}
    for number in range(2 if cut else 1):
        shard = {}
        for key, tensor in as_meta(config).items():
            axis = axes.get(key.split(".")[-2]) if cut else None
            shard[key] = tensor if axis is None else tensor.chunk(2, axis)[number].clone()
        torch.save(shard, folder / f"consolidated.{number:02d}.pth")
    (folder / "params.json").write_text(json.dumps(
        {"dim": config.dim, "n_layers": config.num_layers, "n_heads": config.num_heads,
         "n_kv_heads": config.num_kv_heads, "vocab_size": -1, "multiple_of": config.hidden_dim,
         "ffn_dim_multiplier": 0.5, "norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
         "use_scaled_rope": bool(config.rope_scaling)} | params))
    return folder


def as_config_json(config):
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = {"rope_type": "llama3", **dict(zip(names, config.rope_scaling))}
    return {"model_type": "llama", "hidden_act": "silu", "vocab_size": config.vocab_size,
            "hidden_size": config.dim, "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim, "intermediate_size": config.hidden_dim,
            "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
            "rope_scaling": scaling if config.rope_scaling else None,
            "max_position_embeddings": 8192, "tie_word_embeddings": config.tied}


def write_huggingface(folder, config, files=1, prefix="", **settings):
    folder.mkdir(exist_ok=True)
    state = {prefix + key: tensor.clone() for key, tensor in model_of(config).state_dict().items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)        # old files have it
    for number in range(files):
        part = "" if files == 1 else f"-0000{number + 1}-of-0000{files}"
        keys = list(state)[number::files]
        torch.save({key: state[key] for key in keys}, folder / f"pytorch_model{part}.bin")
    (folder / "config.json").write_text(json.dumps(as_config_json(config) | settings))
    return folder


def write(layout, folder, config):
    if layout in ("meta", "rows", "width"):
        return write_meta(folder, config, None if layout == "meta" else layout)
    prefix = "module._orig_mod." if layout == "compiled" else ""         # and data parallel
    return write_huggingface(folder, config, 2 if layout == "parts" else 1, prefix)


def oracle(config):
    """transformers' LlamaForCausalLM with the same weights."""
    import transformers
    transformers.logging.set_verbosity_error()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**as_config_json(config))).eval()
    model.load_state_dict(model_of(config).state_dict())
    return model


def expected(config):
    """What EXPECTED holds; without a mask generate() would take token 0 for padding."""
    model, tokens = oracle(config), prompt(config)[1:]
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12,
                         do_sample=False, pad_token_id=0, eos_token_id=None)
    values = sample(model(tokens).logits)
    return (values * 1e5).round().div(1e5).tolist(), out[0, 40:].tolist()


def sample(logits):
    return logits[-1, (0, 17, -1), :3]


@pytest.mark.parametrize("size", SIZES)
def test_logits_and_generation_equal_those_of_transformers_in_every_layout(size, tmp_path):
    config = SIZES[size]
    for layout in LAYOUTS:
        if (layout in ("meta", "rows", "width") and size == "head width"         # no word for it
                or layout in ("rows", "width") and config.num_kv_heads % 2):     # a head is not cut
            continue
        model = load_llama(write(layout, tmp_path / layout, config), torch.float32)
        logits = sample(model(prompt(config)))
        assert torch.allclose(logits, torch.tensor(EXPECTED[size][0]), atol=1e-4), layout
        assert model.config == config and not model.training
        half = load_llama(tmp_path / layout)                     # in bfloat16
        assert 0 < (sample(half(prompt(config))).float() - logits).abs().mean() < 0.1
        assert config.tied == (half.lm_head.weight is half.model.embed_tokens.weight)
    assert generate(model, prompt(config), 12)[1, 40:].tolist() == EXPECTED[size][1]


@pytest.mark.parametrize("size", SIZES)
def test_committed_values_are_still_those_of_the_oracle(size):
    pytest.importorskip("transformers")
    values, tokens = expected(SIZES[size])
    assert torch.allclose(torch.tensor(values), torch.tensor(EXPECTED[size][0]), atol=1e-5)
    assert tokens == EXPECTED[size][1]


def test_metas_complex_pairs_are_our_halves():
    """A forgotten permutation is right at the first token, and so it reads well for a while."""
    angle = torch.arange(5.0)[:, None] * rotary_frequencies(LlamaConfig(head_dim=8), "cpu")
    x, halves = torch.randn(5, 8), [0, 2, 4, 6, 1, 3, 5, 7]
    turn = torch.polar(torch.ones(5, 4), angle)                  # as Meta's apply_rotary_emb
    theirs = torch.view_as_real(torch.view_as_complex(x.view(5, 4, 2)) * turn).flatten(1)
    ours = rotate(x[:, halves], angle.cos(), angle.sin())
    assert torch.allclose(ours, theirs[:, halves], atol=1e-6)


PUBLISHED = (                # params.json of Llama 2 7B, of Llama 3 8B and of 3.2 1B
    ({"dim": 4096, "n_heads": 32, "n_layers": 32}, LlamaConfig()),
    ({"dim": 4096, "n_heads": 32, "n_layers": 32, "n_kv_heads": 8, "ffn_dim_multiplier": 1.3,
      "multiple_of": 1024, "rope_theta": 5e5}, LlamaConfig(128256, num_kv_heads=8, hidden_dim=14336,
                                                           rope_theta=5e5)),
    ({"dim": 2048, "n_heads": 32, "n_layers": 16, "n_kv_heads": 8, "ffn_dim_multiplier": 1.5,
      "rope_theta": 5e5, "use_scaled_rope": True},
     LlamaConfig(128256, 2048, 16, 32, 8, 64, 8192, 1e-5, 5e5, (32.0, *SCALED[1:]), True)))


@pytest.mark.parametrize("params, config", PUBLISHED)
def test_published_params_give_the_published_sizes(params, config, tmp_path):
    (tmp_path / "params.json").write_text(json.dumps({"norm_eps": 1e-5, **params}))
    embedding = torch.zeros(()).expand(config.vocab_size, config.dim)            # takes no memory
    output = embedding if config.tied else torch.ones(()).expand(config.vocab_size, config.dim)
    square = torch.zeros(()).expand(config.dim, config.dim)
    torch.save({"tok_embeddings.weight": embedding, "output.weight": output,
                "layers.0.attention.wq.weight": square}, tmp_path / "consolidated.00.pth")
    assert read_checkpoint(tmp_path)[0] == config


def test_select_and_embeddings_change_nothing_but_the_work():
    model, tokens = model_of(SIZES["grouped"]), prompt(SIZES["grouped"])
    logits, chosen = model(tokens), torch.rand(2, 40) < 0.3
    assert torch.allclose(model(tokens, select=chosen), logits[chosen], atol=1e-6)
    assert torch.equal(model(embeddings=model.model.embed_tokens(tokens)), logits)
    embeddings = torch.randn(1, 6, 32, requires_grad=True)       # no token sees a later one
    model(embeddings=embeddings)[0, 3].sum().backward()
    assert embeddings.grad[0, :4].abs().sum(-1).min() > 0 and not embeddings.grad[0, 4:].any()


def test_an_exported_adapter_works_in_transformers_through_peft(tmp_path):
    pytest.importorskip("transformers")
    peft, config, tokens = pytest.importorskip("peft"), SIZES["grouped"], prompt(SIZES["grouped"])
    adapters = attach(model_of(config), Config(rank=2))
    for layer in adapters.layers.values():
        torch.nn.init.normal_(layer.B)
    adapters.export_peft(tmp_path)
    theirs = peft.PeftModel.from_pretrained(oracle(config), tmp_path).eval()
    assert torch.allclose(theirs(tokens).logits, adapters.merge()(tokens), atol=1e-4)


def test_the_cache_changes_nothing():
    model, tokens, cache = model_of(SIZES["llama3"]), prompt(SIZES["llama3"]), {}
    slow = tokens[:, :7]
    for _ in range(12):
        slow = torch.cat([slow, model(slow)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(generate(model, tokens[:, :7], 12), slow)
    logits = torch.cat([model(part, cache=cache) for part in tokens.split((7, 1, 12, 20), 1)], 1)
    assert torch.allclose(logits, model(tokens), atol=1e-5)      # in pieces of any length


def test_padding_on_the_right_and_rows_that_end():
    model, rows = model_of(SIZES["grouped"]), prompt(SIZES["grouped"])[:, :9]
    padded = F.pad(rows, (0, 5), value=5)                        # needs no mask
    assert torch.allclose(model(padded)[:, :9], model(rows), atol=1e-5)
    out = generate(model, rows, 10)[:, 9:]
    alone = generate(model, rows[:1], 10)[0, 9:]
    assert torch.equal(out[0], alone)
    eos = int(alone[3])
    end = alone.tolist().index(eos)
    ended = generate(model, rows, 10, eos_id=eos)[:, 9:]
    assert torch.equal(ended[0, :end + 1], alone[:end + 1]) and (ended[0, end:] == eos).all()
    assert generate(model, rows[:1], 10, eos_id=eos).shape[1] == 9 + end + 1


def test_sampling_follows_the_temperature():
    model, tokens = model_of(SIZES["odd"]), prompt(SIZES["odd"])[:1, :5].expand(4000, 5)
    torch.manual_seed(0)
    drawn = generate(model, tokens, 1, temperature=0.7)[:, -1]
    p = (model(tokens[:1])[0, -1] / 0.7).softmax(-1)
    assert (drawn.bincount(minlength=37) / 4000 - p).abs().max() < 0.03 and p.max() < 0.9


def test_a_real_llama_tells_its_story():
    if not DATA.is_dir():
        pytest.skip("the shared data is not here")
    model, tokenizer = (load(DATA / "stories260K") for load in (load_llama, load_tokenizer))
    out = generate(model.float(), torch.tensor([[tokenizer.bos_id]]), 40)
    assert tokenizer.decode(out[0].tolist()).startswith("Once upon a time, there was a little girl "
                                                        "named Lily. She loved to play outside in")


def refused(folder, *words):
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder))}[^\n]+$") as error:
        load_llama(folder, torch.float32)
    assert all(word in str(error.value) for word in words), str(error.value)


BAD = {"layers.1.attention.wo.weight": (None, "layers.1.self_attn.o_proj"),      # entry, word
       "layers.0.attention.bias": (torch.ones(3), "layers.0.self_attn.bias"),
       "norm.weight": (torch.ones(31), "model.norm"), "layers.0.ffn_norm.weight": ("text", "str"),
       "layers.0.attention.wq.weight": (torch.full((32, 32), math.nan), "q_proj.weight has NaN"),
       "layers.0.attention_norm.weight": (torch.ones(32, dtype=torch.int8), "quantised"),
       "layers.1.ffn_norm.weight": (torch.full((32,), math.inf), "infinite")}


@pytest.mark.parametrize("key", BAD)
def test_a_bad_weight_is_refused_by_name(key, tmp_path):
    folder, (value, word) = write_meta(tmp_path / "llama", SIZES["grouped"]), BAD[key]
    state = torch.load(folder / "consolidated.00.pth") | {key: value}
    torch.save({k: v for k, v in state.items() if v is not None}, folder / "consolidated.00.pth")
    refused(folder, word)


@pytest.mark.parametrize("layout", ("rows", "width", "parts"))
def test_truncated_and_missing_files_are_refused_by_name(layout, tmp_path):
    folder = write(layout, tmp_path / "llama", SIZES["grouped"])
    first, second = sorted(path for path in folder.iterdir() if path.suffix != ".json")
    whole = second.read_bytes()
    for share in (0.0, 0.3, 0.99, 0.9999):
        second.write_bytes(whole[:int(share * len(whole))])
        refused(folder, second.name)
    second.unlink()
    refused(folder, second.name, "missing")
    first.rename(second)
    refused(folder, first.name, "missing")
    first.write_bytes(second.read_bytes())
    next(folder.glob("*.json")).write_text("[1")
    refused(folder, ".json" if layout != "parts" else "two of the files")


def test_one_generation_of_weights_is_read_as_transformers_does(tmp_path):
    """More of which files of Hugging Face's folders are read: test_vit.py."""
    config, folder, placed = SIZES["grouped"], tmp_path / "a", {}
    write_huggingface(folder, config, 3)                         # an old generation
    new = {key: 2 * tensor for key, tensor in model_of(config).state_dict().items()}
    for number in (1, 2):
        name = f"pytorch_model-0000{number}-of-00002.bin"
        part = {key: new[key] for key in list(new)[number % 2::2]}
        torch.save(part, folder / name)
        placed |= dict.fromkeys(part, name)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    assert_same(load_llama(folder, torch.float32).state_dict(), new)
    write_meta(tmp_path / "b", config, "rows")
    torch.save(part, tmp_path / "b" / "consolidated.02.pth")     # of 13B beside those of 7B
    refused(tmp_path / "b", "consolidated.02.pth", "too many")
    (tmp_path / "b" / "consolidated.02.pth").rename(tmp_path / "b" / "pytorch_model.bin")
    refused(tmp_path / "b", "pytorch_model.bin", "consolidated.00.pth")
    transformers = pytest.importorskip("transformers")
    assert_same(transformers.LlamaForCausalLM.from_pretrained(folder).state_dict(), new)


ROPE = {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize("settings, word", (
    ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
    ({"model_type": "mistral"}, "mistral"), ({"model_type": "llava"}, "llava"),
    ({"hidden_act": "gelu"}, "gelu"), ({"rope_scaling": {"type": "yarn", "factor": 2}}, "yarn"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"rope_scaling": {"factor": 8.0}}, "factor"),
    ({"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"sliding_window": 4096}, "sliding_window"), ({"logit_scale": 0.5}, "logit_scale"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": "linear"}, "config.json"), ({"vocab_size": 41}, "embed_tokens"),
    ({"hidden_size": None}, "NoneType"), ({"num_hidden_layers": 3}, "layers.2"),
    ({"sliding_window": None, "quantization_config": {}, "attention_dropout": 0.1}, None),
    ({"rope_parameters": ROPE | {"rope_theta": 10000.0}, "dtype": "float16"}, None)))
def test_what_the_model_cannot_do_is_refused_not_ignored(settings, word, tmp_path):
    folder = write_huggingface(tmp_path / "llama", SIZES["grouped"], **settings)
    refused(folder, word) if word else load_llama(folder)


def test_other_files_and_keys_are_refused_with_what_to_do(tmp_path):
    refused(tmp_path / "absent", "No such file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "pytorch_model.bin", "No such file")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"")
    refused(tmp_path / "empty", "safetensors", "torch.save")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    (tmp_path / "a.gguf").write_bytes(b"GGUF\3\0\0\0")
    (tmp_path / "model.safetensors").write_bytes(b"")
    for name in ("other.pt", "a.gguf", "model.safetensors"):
        refused(tmp_path / name, "not what --merge writes", "folder")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "adapter", "adapter")
    for key in ("sliding_window", "quantization_args", "use_qk_norm"):
        refused(write_meta(tmp_path / "llama", SIZES["grouped"], **{key: 64}), "params.json", key)


if __name__ == "__main__":
    for size, config in SIZES.items():
        print(textwrap.fill(f"{size!r}: {expected(config)},", 99, initial_indent="    ",
                            subsequent_indent="        "))
