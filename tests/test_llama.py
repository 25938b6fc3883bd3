"""train_llama.py: the model, both layouts of checkpoints, generation; against transformers, against
Meta's convention written out by hand, and with damaged files.

The expected values below were printed by `python tests/test_llama.py`, which needs transformers."""

import json
import math
import textwrap
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import helpers  # noqa: F401: one thread, as the models are tiny
import train_llama
from structlora import Config, InputError, attach
from train_llama import Llama, LlamaConfig, generate, load_llama, rotary_frequencies

SIZES = {"plain": LlamaConfig(40, 32, 2, 4, 4, 8, 48),
         "grouped": LlamaConfig(40, 32, 2, 4, 2, 8, 48, norm_eps=1e-2),
         "one key": LlamaConfig(40, 32, 1, 4, 1, 8, 64, rope_theta=500.0),
         "tied": LlamaConfig(40, 32, 2, 4, 2, 8, 48, tied=True),
         "llama3": LlamaConfig(40, 32, 2, 2, 1, 16, 48,
                               rope_scaling=("llama3", 8.0, 1.0, 4.0, 8192)),
         "tied llama3": LlamaConfig(40, 32, 2, 2, 1, 16, 48, tied=True,
                                    rope_scaling=("llama3", 32.0, 1.0, 4.0, 8192)),
         "odd": LlamaConfig(37, 30, 3, 3, 3, 10, 50),
         "head width": LlamaConfig(38, 30, 2, 6, 2, 6, 40),      # heads x width is not dim
         "linear": LlamaConfig(40, 32, 2, 4, 4, 8, 48, rope_scaling=("linear", 4.0))}
# Logits of three places and four tokens, and 24 tokens of greedy generation.
EXPECTED = {
    'plain': ([[[1.77348, 0.64914, 1.72374, -0.86964], [0.79585, 0.26663, 1.35726, 0.55045],
        [-0.80508, -1.65852, -1.41043, -0.71531]], [[-1.02515, 0.49559, -1.70539, 0.24485],
        [-1.3186, -0.59947, -1.81257, -2.091], [-0.94926, -1.10696, -1.60613, -2.02558]]], [[18, 5,
        18, 5, 18, 5, 18, 18, 5, 18, 5, 10, 5, 10, 5, 10, 5, 10, 5, 18, 5, 18, 5, 18], [4, 1, 39,
        18, 5, 18, 2, 39, 18, 5, 18, 5, 36, 18, 18, 5, 18, 5, 18, 5, 18, 5, 18, 5]]),
    'grouped': ([[[-0.15435, 0.77695, -0.6791, -0.93808], [-0.41007, -0.73517, -1.72519, -1.837],
        [-0.88939, 1.28916, 2.22815, -1.32004]], [[-0.36876, 0.58065, 0.87308, -0.21813], [0.57937,
        0.18895, 1.55144, 0.92828], [-0.98278, -0.21733, 0.92229, 0.29639]]], [[24, 29, 24, 29, 33,
        29, 24, 29, 24, 29, 24, 29, 22, 20, 20, 20, 25, 6, 20, 20, 20, 20, 20, 25], [9, 15, 22, 29,
        2, 10, 38, 24, 29, 24, 29, 35, 6, 18, 20, 36, 6, 31, 5, 18, 20, 25, 39, 24]]),
    'one key': ([[[-0.2915, -0.83327, -1.14124, -0.14702], [-0.00701, 0.95225, 0.73555, 1.53796],
        [1.68694, -0.35657, 0.09236, -0.27676]], [[0.04934, -0.13725, -0.62941, -0.65778],
        [-0.43526, 0.32134, -0.55897, -0.63127], [0.87928, 0.85448, 0.81779, 1.49765]]], [[13, 25,
        1, 4, 15, 23, 0, 3, 17, 0, 39, 17, 0, 3, 17, 36, 0, 13, 15, 3, 17, 36, 29, 39], [3, 17, 14,
        0, 7, 15, 23, 39, 37, 0, 13, 20, 13, 15, 23, 0, 39, 37, 37, 37, 0, 3, 17, 39]]),
    'tied': ([[[0.90858, -0.36432, -0.50026, -1.45134], [0.51387, -0.52674, -0.27032, -2.48107],
        [0.40051, 1.93511, 2.7519, 2.13769]], [[1.25036, 0.02067, 0.60866, 0.99433], [0.26355,
        0.5823, 0.89711, 2.20257], [-0.62182, 1.52485, 1.58958, 1.62963]]], [[31, 3, 2, 8, 35, 6,
        28, 18, 22, 22, 28, 6, 28, 18, 24, 35, 6, 4, 4, 4, 4, 4, 4, 30], [12, 9, 18, 35, 24, 34,
        31, 3, 21, 3, 27, 25, 32, 28, 24, 18, 28, 18, 24, 35, 6, 6, 0, 2]]),
    'llama3': ([[[0.17007, 0.75571, 2.03773, -1.85284], [-0.18598, -2.32166, -3.05334, -0.07394],
        [1.75528, -0.39549, 1.46674, 0.97145]], [[-1.14623, 2.163, 1.55535, 0.11023], [-0.24032,
        2.46567, 1.97969, 0.32173], [0.62235, -0.49227, 1.99008, 0.22587]]], [[5, 5, 5, 5, 5, 5, 5,
        5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5], [10, 37, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5,
        5, 5, 5, 5, 10, 39, 5, 5, 5, 5, 5, 5]]),
    'tied llama3': ([[[2.07935, 2.24632, 3.23419, 1.68325], [0.57584, -2.92139, -2.23541,
        -2.47967], [-0.25282, 0.59589, 0.91332, 2.44636]], [[0.54144, 0.55902, 0.36096, 0.8326],
        [-0.69071, 1.28512, 0.5498, 1.26862], [-0.42251, 2.24369, 2.60201, 2.60923]]], [[8, 6, 31,
        6, 31, 6, 31, 14, 6, 14, 6, 31, 6, 14, 6, 14, 6, 14, 6, 14, 6, 14, 6, 14], [8, 6, 31, 6,
        31, 6, 31, 6, 31, 6, 14, 6, 31, 6, 31, 6, 14, 6, 31, 6, 31, 6, 14, 6]]),
    'odd': ([[[0.09751, -0.70278, 0.83022, -1.00816], [1.83654, -0.939, 1.60119, -1.55748],
        [1.32863, 0.57466, -0.33921, -0.22245]], [[-0.78843, -0.75407, -0.04626, 1.93107],
        [1.52714, -0.59028, 0.79586, 1.091], [-1.3047, -1.17651, 1.14346, -1.59833]]], [[0, 34, 0,
        34, 13, 29, 2, 4, 2, 34, 13, 29, 2, 4, 2, 34, 1, 7, 36, 0, 5, 34, 0, 3], [7, 9, 34, 32, 7,
        26, 0, 3, 34, 13, 7, 11, 26, 34, 13, 7, 11, 26, 34, 13, 7, 36, 4, 13]]),
    'head width': ([[[-0.13667, -1.21114, 0.75772, 0.61665], [0.0026, 2.11636, -1.28524, -0.16228],
        [-0.26231, -1.91802, 0.40559, 0.81355]], [[0.97926, 1.96457, -0.93415, 0.92656], [-0.11502,
        1.34112, -1.31629, 1.57286], [0.64343, 0.99654, -0.39045, -0.74795]]], [[10, 9, 10, 9, 10,
        35, 9, 4, 4, 4, 14, 4, 14, 4, 14, 4, 14, 4, 14, 4, 14, 4, 4, 9], [35, 4, 14, 34, 4, 14, 1,
        35, 15, 17, 35, 15, 10, 9, 34, 11, 13, 9, 13, 9, 10, 9, 10, 35]]),
    'linear': ([[[1.77348, 0.64914, 1.72374, -0.86964], [1.39408, -0.41417, 1.37471, 0.57429],
        [-0.77478, 0.24389, 1.18025, -0.5389]], [[-1.02515, 0.49559, -1.70539, 0.24485], [-1.51186,
        -0.35875, -1.78798, -1.92954], [-0.77157, -1.90973, -1.61651, -1.73109]]], [[18, 5, 18, 5,
        18, 5, 18, 5, 18, 5, 18, 5, 18, 5, 18, 5, 18, 5, 18, 5, 18, 5, 18, 5], [18, 5, 18, 5, 18,
        5, 18, 5, 18, 5, 18, 5, 18, 5, 18, 5, 18, 5, 18, 5, 18, 5, 18, 5]])}
LAYOUTS = ("meta", "meta, cut by rows", "meta, cut by width", "huggingface", "index", "no index")


def prompt(config, length=40):
    """A fixed text [2, length]."""
    return (torch.arange(2 * length) ** 2 * 7 // 3 % config.vocab_size).view(2, length)


def weights(config):
    """Weights by our names that depend on no random generator."""
    state = Llama(config).state_dict()
    if config.tied:
        state.pop("lm_head.weight")
    for i, (name, tensor) in enumerate(state.items()):
        wave = torch.sin(0.7 * torch.arange(tensor.numel()).double() ** 1.1 + i).view(tensor.shape)
        state[name] = (1 + 0.2 * wave if "norm" in name else 0.3 * wave).float()
    return state


def model_of(config):
    model, state = Llama(config), weights(config)
    model.load_state_dict(state | {"lm_head.weight": state.get("lm_head.weight",
                                                               state["model.embed_tokens.weight"])})
    return model.eval()


# --- the layouts, written here a second time, by hand


def as_meta(config):
    """Meta's names; channels 2i and 2i + 1 of a head are our i and i + d / 2."""
    meta, half = {}, config.head_dim // 2
    for name, tensor in weights(config).items():
        if ".q_proj" in name or ".k_proj" in name:
            rows = [head + i + place * half for head in range(0, len(tensor), config.head_dim)
                    for i in range(half) for place in (0, 1)]
            tensor = tensor[rows]
        for ours, theirs in (("model.layers.", "layers."), ("self_attn.", "attention."),
                             ("q_proj", "wq"), ("k_proj", "wk"), ("v_proj", "wv"), ("o_proj", "wo"),
                             ("mlp.gate_proj", "feed_forward.w1"),
                             ("mlp.down_proj", "feed_forward.w2"),
                             ("mlp.up_proj", "feed_forward.w3"),
                             ("input_layernorm", "attention_norm"),
                             ("post_attention_layernorm", "ffn_norm"),
                             ("model.embed_tokens", "tok_embeddings"), ("model.norm", "norm"),
                             ("lm_head", "output")):
            name = name.replace(ours, theirs)
        meta[name] = tensor
    meta.setdefault("output.weight", meta["tok_embeddings.weight"])      # Llama 3.2 stores both
    return meta | {"rope.freqs": torch.ones(config.head_dim // 2)}


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
    scaled = {"use_scaled_rope": True} if config.rope_scaling else {}
    (folder / "params.json").write_text(json.dumps(
        {"dim": config.dim, "n_layers": config.num_layers, "n_heads": config.num_heads,
         "n_kv_heads": config.num_kv_heads, "vocab_size": -1, "multiple_of": config.hidden_dim,
         "ffn_dim_multiplier": 0.5, "norm_eps": config.norm_eps, "rope_theta": config.rope_theta}
        | scaled | params))
    return folder


def as_config_json(config):
    kind, *numbers = config.rope_scaling or ("default",)
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = {"rope_type": kind, **dict(zip(names, numbers))} if numbers else None
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "vocab_size": config.vocab_size, "hidden_size": config.dim,
            "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
            "intermediate_size": config.hidden_dim, "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta, "rope_scaling": scaling,
            "max_position_embeddings": 8192, "tie_word_embeddings": config.tied}


def write_huggingface(folder, config, files=1, index=False, **settings):
    folder.mkdir(exist_ok=True)
    state, where = weights(config), {}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)        # old files have it
    keys = list(state)
    for number in range(files):
        part = "" if files == 1 else f"-0000{number + 1}-of-0000{files}"
        name = f"pytorch_model{part}.bin"
        mine = keys[number::files]
        torch.save({key: state[key] for key in mine}, folder / name)
        where |= dict.fromkeys(mine, name)
    if index:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(as_config_json(config) | settings))
    return folder


def write(layout, folder, config):
    if layout.startswith("meta"):
        return write_meta(folder, config, {"meta": None}.get(layout, layout.split()[-1]))
    return write_huggingface(folder, config, 1 if layout == "huggingface" else 2, layout == "index")


# --- oracles


def oracle(config):
    """transformers' LlamaForCausalLM with the same weights."""
    import transformers
    transformers.logging.set_verbosity_error()
    settings = as_config_json(config)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    state = weights(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if config.tied else [])
    model.tie_weights()
    return model


def sample(logits):
    return logits[:, (0, 17, -1), :4]


def greedy(model, config):
    """24 tokens by transformers' generate; without a mask it would take token 0 for padding."""
    tokens = prompt(config)
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=24,
                          do_sample=False, pad_token_id=0, eos_token_id=None)[:, 40:].tolist()


def by_hand(config, tokens):
    """Logits by Meta's own names and its own rotary convention: pairs (2i, 2i + 1) of a head are a
    complex number, turned by exp(i position / theta^(2i / d)). tokens [T] -> [T, V], float64."""
    w = {key: tensor.double() for key, tensor in as_meta(config).items()}
    norm = lambda x, key: x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * w[key]
    T, d = len(tokens), config.head_dim
    frequency = config.rope_theta ** (-torch.arange(0, d, 2).double() / d)
    turn = torch.polar(torch.ones(()).double(), torch.arange(T).double()[:, None] * frequency)
    rotate = lambda x: torch.view_as_real(
        torch.view_as_complex(x.reshape(T, -1, d // 2, 2).contiguous()) * turn[:, None]).flatten(-2)
    x = w["tok_embeddings.weight"][tokens]
    for l in range(config.num_layers):
        h = norm(x, f"layers.{l}.attention_norm.weight")
        q, k, v = (h @ w[f"layers.{l}.attention.w{name}.weight"].T for name in "qkv")
        q, k, v, heads = rotate(q), rotate(k), v.view(T, -1, d), []
        for head in range(config.num_heads):
            mine = head // (config.num_heads // config.num_kv_heads)
            scores = q[:, head] @ k[:, mine].T / math.sqrt(d)
            past = scores + torch.full((T, T), -math.inf).triu(1)
            heads.append(past.softmax(-1) @ v[:, mine])
        x = x + torch.cat(heads, -1) @ w[f"layers.{l}.attention.wo.weight"].T
        h = norm(x, f"layers.{l}.ffn_norm.weight")
        w1, w2, w3 = (w[f"layers.{l}.feed_forward.w{i}.weight"].T for i in (1, 2, 3))
        x = x + (F.silu(h @ w1) * (h @ w3)) @ w2
    return norm(x, "norm.weight") @ w["output.weight"].T


# --- parity


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_logits_equal_those_of_transformers(size, layout, tmp_path):
    config = SIZES[size]
    if layout.startswith("meta") and size in ("head width", "linear"):
        pytest.skip("params.json of Meta cannot say this")
    if "cut" in layout and (config.num_kv_heads % 2 or config.tied):
        pytest.skip("Meta's files never cut a head, and tied models are one file")
    model = load_llama(write(layout, tmp_path / "llama", config), torch.float32)
    logits, expected = model(prompt(config)), torch.tensor(EXPECTED[size][0])
    assert torch.allclose(sample(logits), expected, atol=1e-4)
    assert model.config == config and not model.training


@pytest.mark.parametrize("size", SIZES)
def test_greedy_generation_equals_that_of_transformers(size):
    config = SIZES[size]
    tokens = generate(model_of(config), prompt(config), 24)
    assert tokens[:, 40:].tolist() == EXPECTED[size][1]
    assert torch.equal(tokens[:, :40], prompt(config))


@pytest.mark.parametrize("size", SIZES)
def test_committed_values_are_still_those_of_the_oracle(size):
    pytest.importorskip("transformers")
    model = oracle(SIZES[size])
    logits = model(prompt(SIZES[size])).logits
    assert torch.allclose(sample(logits), torch.tensor(EXPECTED[size][0]), atol=1e-5)
    assert torch.allclose(model_of(SIZES[size])(prompt(SIZES[size])), logits, atol=1e-4)
    assert greedy(model, SIZES[size]) == EXPECTED[size][1]


@pytest.mark.parametrize("size", ("plain", "grouped", "one key", "tied", "odd"))
def test_metas_pairs_are_turned_as_metas_convention_says(size, tmp_path):
    config = SIZES[size]
    model = load_llama(write_meta(tmp_path / "llama", config), torch.float32)
    expected = by_hand(config, prompt(config)[1])
    assert torch.allclose(model(prompt(config)[1:])[0].double(), expected, atol=1e-4)


def test_a_forgotten_permutation_would_be_noticed(tmp_path):
    """The usual bug: the first token is right, and so it reads well for a while."""
    config = SIZES["plain"]
    meta = as_meta(config)
    model = model_of(config)
    for l, block in enumerate(model.model.layers):
        block.self_attn.q_proj.weight.data = meta[f"layers.{l}.attention.wq.weight"]
        block.self_attn.k_proj.weight.data = meta[f"layers.{l}.attention.wk.weight"]
    wrong, right = model(prompt(config)), model_of(config)(prompt(config))
    assert torch.allclose(wrong[:, 0], right[:, 0], atol=1e-5)
    assert not torch.allclose(wrong[:, -1], right[:, -1], atol=1e-2)


def test_scaled_rotary_frequencies_by_their_formulas():
    device, plain = torch.device("cpu"), LlamaConfig(head_dim=128, rope_theta=5e5)
    base = rotary_frequencies(plain, device).double()
    assert torch.allclose(base, 5e5 ** (-torch.arange(64).double() / 64), rtol=1e-5)
    linear = rotary_frequencies(replace(plain, rope_scaling=("linear", 4.0)), device)
    assert torch.allclose(linear.double(), base / 4)
    llama3 = replace(plain, rope_scaling=("llama3", 8.0, 1.0, 4.0, 8192))
    scaled = rotary_frequencies(llama3, device)
    for f, g in zip(base.tolist(), scaled.tolist()):             # as the authors state it
        wavelength = 2 * math.pi / f
        smooth = (8192 / wavelength - 1) / (4 - 1)
        between = (1 - smooth) * f / 8 + smooth * f
        expected = f if wavelength < 8192 / 4 else f / 8 if wavelength > 8192 else between
        assert g == pytest.approx(expected, rel=1e-5)
    assert {*(scaled / base).round(decimals=3).tolist()} > {1.0, 0.125}          # and some between


PUBLISHED = (                # params.json of the 7B of Llama 2, of its 70B, of Llama 3 8B, 3.2 1B
    ({"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5},
     LlamaConfig(32000)),
    ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
      "n_layers": 80, "norm_eps": 1e-5},
     LlamaConfig(32000, 8192, 80, 64, 8, 128, 28672)),
    ({"dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "n_heads": 32, "n_kv_heads": 8,
      "n_layers": 32, "norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 128256},
     LlamaConfig(128256, 4096, 32, 32, 8, 128, 14336, rope_theta=500000.0)),
    ({"dim": 2048, "multiple_of": 256, "ffn_dim_multiplier": 1.5, "n_heads": 32, "n_kv_heads": 8,
      "n_layers": 16, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True},
     LlamaConfig(128256, 2048, 16, 32, 8, 64, 8192, rope_theta=500000.0, tied=True,
                 rope_scaling=("llama3", 32.0, 1.0, 4.0, 8192))))


@pytest.mark.parametrize("params, config", PUBLISHED)
def test_published_params_give_the_published_sizes(params, config, tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(params))
    embedding = torch.zeros(()).expand(config.vocab_size, config.dim)            # takes no memory
    output = embedding if config.tied else torch.ones(()).expand(config.vocab_size, config.dim)
    shard = {"tok_embeddings.weight": embedding, "output.weight": output}
    assert train_llama.meta_config(tmp_path / "params.json", [shard]) == config


# --- the model's promises


def test_select_and_embeddings_change_nothing_but_the_work():
    config = SIZES["grouped"]
    model, tokens = model_of(config), prompt(config)
    logits = model(tokens)
    chosen = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) < 0.3
    assert torch.allclose(model(tokens, select=chosen), logits[chosen], atol=1e-6)
    assert torch.equal(model(embeddings=model.model.embed_tokens(tokens)), logits)


def test_padding_on_either_side_changes_no_logit():
    config = SIZES["grouped"]
    model, tokens = model_of(config), prompt(config)
    alone = model(tokens[:1, :25])
    padded = tokens.clone()
    padded[0, 25:] = 3
    assert torch.allclose(model(padded)[0, :25], alone[0], atol=1e-5)    # right: no mask needed
    padded, real = tokens.clone(), torch.ones(2, 40, dtype=torch.bool)
    padded[0] = torch.cat([torch.full((15,), 3), tokens[0, :25]])
    real[0, :15] = False
    logits = model(padded, real=real)
    assert torch.allclose(logits[0, 15:], alone[0], atol=1e-5)           # left: real says so
    assert torch.allclose(logits[1], model(tokens)[1], atol=1e-5)
    assert logits.isfinite().all()                               # also at the padding itself


def test_no_token_sees_a_later_one():
    config = SIZES["plain"]
    embeddings = torch.randn(1, 6, 32, requires_grad=True)
    model_of(config)(embeddings=embeddings)[0, 3].sum().backward()
    assert embeddings.grad[0, :4].abs().sum(-1).min() > 0 and not embeddings.grad[0, 4:].any()


def test_gradient_checkpointing_gives_the_same_gradients():
    config, gradients = SIZES["grouped"], []
    real = torch.arange(40) >= torch.tensor([[9], [0]])          # one text is padded on the left
    for on in (False, True):
        model = model_of(config)
        model.gradient_checkpointing = on
        torch.manual_seed(0)
        adapters = attach(model, Config(rank=2))
        for graph in adapters.graphs:
            torch.nn.init.normal_(graph.B)
        model(prompt(config), real=real).logsumexp(-1).mean().backward()
        gradients.append([g.A.grad for g in adapters.graphs] + [g.B.grad for g in adapters.graphs])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))
    assert gradients[0][0].any()


def test_the_default_targets_are_the_query_and_value_of_every_layer():
    adapters = attach(model_of(SIZES["odd"]), Config(rank=2))
    assert sorted(adapters.layers) == sorted(f"model.layers.{l}.self_attn.{name}_proj"
                                             for l in range(3) for name in "qv")


def test_an_exported_adapter_works_in_transformers_through_peft(tmp_path):
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = SIZES["grouped"]
    model = model_of(config)
    adapters = attach(model, Config(rank=2))
    torch.manual_seed(0)
    for graph in adapters.graphs:
        torch.nn.init.normal_(graph.B)
    adapters.export_peft(tmp_path)
    theirs = peft.PeftModel.from_pretrained(oracle(config), tmp_path).eval()
    merged = adapters.merge()(prompt(config))
    assert torch.allclose(theirs(prompt(config)).logits, merged, atol=1e-4)
    assert not torch.allclose(merged, model_of(config)(prompt(config)), atol=1e-1)


def test_weights_may_be_read_in_bfloat16(tmp_path):
    model = load_llama(write_meta(tmp_path / "llama", SIZES["tied"]))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    difference = model(prompt(model.config)).float() - model_of(model.config)(prompt(model.config))
    assert 0 < difference.abs().mean() < 0.1


@pytest.mark.parametrize("size", ("grouped", "tied llama3"))
def test_merged_weights_and_metas_layout_are_read_as_they_were_written(size, tmp_path):
    config = SIZES[size]
    train_llama.save_merged(model_of(config), tmp_path / "merged.pt")
    train_llama.save_meta(model_of(SIZES["grouped"]), tmp_path / "meta")
    back = load_llama(tmp_path / "merged.pt", torch.float32)
    assert back.config == config
    assert torch.equal(back(prompt(config)), model_of(config)(prompt(config)))
    back = load_llama(tmp_path / "meta", torch.float32)
    assert back.config == SIZES["grouped"]
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(),
                                                 model_of(SIZES["grouped"]).state_dict().values()))
    if size == "grouped":                                        # and Meta's names are Meta's
        saved = torch.load(tmp_path / "meta" / "consolidated.00.pth")
        assert all(torch.equal(saved[key], tensor) for key, tensor in as_meta(config).items()
                   if key != "rope.freqs")


# --- generation


def test_the_cache_changes_nothing():
    config = SIZES["llama3"]
    model, tokens = model_of(config), prompt(config)[:, :7]
    slow = tokens
    for _ in range(12):
        slow = torch.cat([slow, model(slow)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(generate(model, tokens, 12), slow)


def test_prompts_of_different_lengths_are_padded_on_the_left():
    config = SIZES["grouped"]
    model, (a, b) = model_of(config), prompt(config)
    padded = torch.stack([torch.cat([torch.full((11,), 5), a[:9]]), b[:20]])
    real = torch.ones(2, 20, dtype=torch.bool)
    real[0, :11] = False
    out = generate(model, padded, 10, real=real)
    assert torch.equal(out[0, 11:], generate(model, a[None, :9], 10)[0])
    assert torch.equal(out[1], generate(model, b[None, :20], 10)[0])


def test_generation_stops_at_the_end_token_row_by_row():
    config = SIZES["plain"]
    model, free = model_of(config), generate(model_of(config), prompt(config), 24)[:, 40:]
    eos = int(free[0, 3])
    first = [row.tolist().index(eos) if eos in row else 24 for row in free]
    out = generate(model, prompt(config), 24, eos_id=eos)[:, 40:]
    assert out.shape[1] == min(24, 1 + max(first))
    for row, expected, end in zip(out, free, first):
        assert torch.equal(row[:end], expected[:end][:len(row)]) and (row[end:] == eos).all()


def test_sampling_follows_the_temperature_and_the_seed():
    config = replace(SIZES["plain"], num_layers=1)
    model, tokens = model_of(config), prompt(config)[:1, :5].expand(4000, 5)
    torch.manual_seed(0)
    drawn = generate(model, tokens, 1, temperature=0.7)[:, -1]
    share = drawn.bincount(minlength=40) / 4000
    expected = (model(tokens[:1])[0, -1] / 0.7).softmax(-1)
    assert (share - expected).abs().max() < 0.03 and expected.max() < 0.9
    torch.manual_seed(0)
    assert torch.equal(generate(model, tokens, 1, temperature=0.7)[:, -1], drawn)


# --- bad checkpoints


class Hostile:
    def __reduce__(self):
        return print, ("executed",)


def change(path, **entries):
    """Rewrites a file of tensors with entries replaced, or removed if None."""
    state = torch.load(path) | {key.replace("__", "."): value for key, value in entries.items()}
    torch.save({key: value for key, value in state.items() if value is not None}, path)


def refused(folder, *words):
    with pytest.raises(InputError) as error:
        load_llama(folder, torch.float32)
    text = str(error.value)
    assert all(word in text for word in words), text
    assert "\n" not in text


BAD = {
    "missing key": ({"layers__1__attention__wo__weight": None}, "layers.1.self_attn.o_proj"),
    "unknown key": ({"layers__0__attention__bias": torch.ones(3)}, "layers.0.attention.bias"),
    "wrong shape": ({"norm__weight": torch.ones(31)}, "norm"),
    "no dimension": ({"norm__weight": torch.tensor(1.0)}, "norm"),
    "nan": ({"layers__0__attention__wq__weight": torch.full((32, 32), math.nan)}, "q_proj"),
    "infinite": ({"norm__weight": torch.full((32,), math.inf)}, "norm"),
    "quantised": ({"norm__weight": torch.ones(32, dtype=torch.int8)}, "quantised"),
    "not a tensor": ({"norm__weight": "text"}, "tensors"),
    "code": ({"norm__weight": Hostile()}, "refused")}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_of_weights_is_refused_by_name(case, tmp_path, capfd):
    entries, word = BAD[case]
    folder = write_meta(tmp_path / "llama", SIZES["grouped"])
    change(folder / "consolidated.00.pth", **entries)
    refused(folder, word, str(tmp_path / "llama"))
    assert "executed" not in capfd.readouterr().out


@pytest.mark.parametrize("layout", ("meta, cut by rows", "no index"))
def test_truncated_and_missing_files_are_refused_by_name(layout, tmp_path):
    folder = write(layout, tmp_path / "llama", SIZES["grouped"])
    first, second = sorted(path for path in folder.iterdir() if path.suffix != ".json")
    whole = second.read_bytes()
    for share in (0.0, 0.3, 0.99, 0.9999):
        second.write_bytes(whole[:int(share * len(whole))])
        refused(folder, second.name)
    second.unlink()
    refused(folder, *([second.name] if layout == "no index" else ["shard is missing"]))
    second.write_bytes(whole)
    first.rename(first.with_suffix(".away"))
    refused(folder, first.name)


def test_an_index_is_followed_and_its_absent_file_named(tmp_path):
    folder = write("index", tmp_path / "llama", SIZES["grouped"])
    (folder / "pytorch_model-00002-of-00002.bin").rename(folder / "pytorch_model-x.bin")
    refused(folder, "pytorch_model-00002-of-00002.bin", "no such file")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(index.read_text().replace("pytorch_model-00002-of-00002", "pytorch_model-x"))
    load_llama(folder)
    index.write_text("{}")
    refused(folder, "index.json", "weight_map")


def test_shards_of_different_models_are_refused(tmp_path):
    folder = write_meta(tmp_path / "llama", SIZES["grouped"], "rows")
    change(folder / "consolidated.01.pth", norm__weight=torch.ones(32))
    refused(folder, "norm.weight differs")
    change(folder / "consolidated.01.pth", norm__weight=None)
    refused(folder, "consolidated.01.pth", "norm.weight")


@pytest.mark.parametrize("params, word", (
    ({"dim": "wide"}, "params.json"), ({"n_heads": 0}, "params.json"),
    ({"n_kv_heads": 3}, "key-value"),
    ({"norm_eps": None}, "norm_eps"), ({"n_layers": 1}, "layers.1"), ({"n_layers": 3}, "layers.2"),
    ({"dim": 64}, "params.json"), ({"multiple_of": 0}, "params.json"),
    ({"rope_theta": -1}, "rope"),
    ({"use_scaled_rope": True, "rope_scaling_factor": "x"}, "rope_scaling"),
    ({"use_scaled_rope": True, "rope_scaling_factor": -3}, "rope_scaling")))
def test_sizes_that_do_not_fit_are_refused(params, word, tmp_path):
    refused(write_meta(tmp_path / "llama", SIZES["grouped"], **params), word)


@pytest.mark.parametrize("settings, word", (
    ({"attention_bias": True}, "attention_bias"), ({"model_type": "mistral"}, "mistral"),
    ({"hidden_act": "gelu"}, "gelu"), ({"rope_scaling": {"type": "yarn", "factor": 2}}, "yarn"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling"),
    ({"rope_scaling": {"type": "linear", "factor": "nan"}}, "rope_scaling"),
    ({"rope_scaling": "linear"}, "config.json"), ({"rope_scaling": [3]}, "rope_type"),
    ({"vocab_size": 41}, "embed_tokens"), ({"hidden_size": None}, "config.json")))
def test_what_the_model_cannot_do_is_refused_not_ignored(settings, word, tmp_path):
    refused(write_huggingface(tmp_path / "llama", SIZES["grouped"], **settings), "llama", word)


def test_other_files_are_refused_with_what_to_do(tmp_path):
    refused(tmp_path / "absent", "absent", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "consolidated.00.pth")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"")
    refused(tmp_path / "empty", "safetensors", "torch.save")
    folder = write_meta(tmp_path / "llama", SIZES["grouped"])
    (folder / "params.json").write_text("[1")
    refused(folder, "params.json")
    (folder / "params.json").unlink()
    refused(folder, "params.json")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    refused(tmp_path / "other.pt", "other.pt", "--merge")


if __name__ == "__main__":
    for size, config in SIZES.items():
        model = oracle(config)
        values = [[[round(v, 5) for v in place] for place in row]
                  for row in sample(model(prompt(config)).logits).tolist()]
        print(textwrap.fill(f"{size!r}: ({values}, {greedy(model, config)}),", 99,
                            initial_indent="    ", subsequent_indent="        "))
