"""train_vit.py: the model and the checkpoint families against transformers and torchvision, classes
by name, normalisation, bad files, data.

The expected logits below were printed by `python tests/test_vit.py`, which needs transformers, or
torchvision, which gives the same numbers for "small"."""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import train_vit
from helpers import waves
from train_vit import (ViT, ViTConfig, batch_indices, choose, draw, load_vit, prepare, read_images,
                       save_vit)

SIZES = {"small": ViTConfig(16, 4, 32, 2, 4, 64, 5),
         "one block": ViTConfig(32, 8, 48, 1, 3, 96, 3),
         "wide epsilon": ViTConfig(16, 8, 32, 2, 2, 64, 4, eps=0.1)}
EXPECTED = {
    "small": [[3.285653, -0.5405, 0.139855, 1.165184, -1.224773],
              [3.203568, -0.622092, -0.083619, 1.24297, -1.155959]],
    "one block": [[-0.40021, 1.096331, -1.563931], [-0.405501, 0.880888, -1.755397]],
    "wide epsilon": [[2.846409, -1.172914, -1.373858, -1.040013],
                     [2.415757, -0.725273, -0.426356, 1.192064]]}
SMALL, HALF = SIZES["small"], ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORMALISED = {       # family -> mean and deviation of its pictures
    "google": HALF, "timm": HALF, "compiled": HALF,
    "deit": IMAGENET, "torchvision": IMAGENET, "torchvision 0.12": IMAGENET,
    "timm's hub": ((0.4, 0.3, 0.2), (0.3, 0.2, 0.1)),
    "huggingface": ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))}


def images(config):
    """Two images of a fixed pattern, [2, 3, S, S]."""
    S = config.image_size
    return torch.sin(0.37 * torch.arange(2 * 3 * S * S)).view(2, 3, S, S)


def weights(config):
    return waves({name: tensor.shape for name, tensor in ViT(config).state_dict().items()}, 0.25)


# --- the layouts, written here a second time, by hand: our names and theirs, in this order

GOOGLE = """blocks. Transformer/encoderblock_ norm1.weight LayerNorm_0/scale norm1.bias
    LayerNorm_0/bias norm2.weight LayerNorm_2/scale norm2.bias LayerNorm_2/bias
    norm.weight Transformer/encoder_norm/scale norm.bias Transformer/encoder_norm/bias
    attn. MultiHeadDotProductAttention_1/ q_proj query k_proj key v_proj value o_proj out
    fc1 MlpBlock_3/Dense_0 fc2 MlpBlock_3/Dense_1 cls_token cls patch_embed embedding
    pos_embed Transformer/posembed_input/pos_embedding weight kernel . /""".split()
HUGGINGFACE = """blocks. vit.encoder.layer. norm1 layernorm_before norm2 layernorm_after
    norm. vit.layernorm. attn.q_proj attention.attention.query attn.k_proj attention.attention.key
    attn.v_proj attention.attention.value attn.o_proj attention.output.dense fc1 intermediate.dense
    fc2 output.dense cls_token vit.embeddings.cls_token head classifier
    pos_embed vit.embeddings.position_embeddings
    patch_embed vit.embeddings.patch_embeddings.projection""".split()


TORCHVISION = """blocks. encoder.layers.encoder_layer_ norm1 ln_1 norm2 ln_2 norm. encoder.ln. qkv.
    in_proj_ attn. self_attention. o_proj out_proj fc1 mlp.0 fc2 mlp.3 cls_token class_token
    pos_embed encoder.pos_embedding patch_embed conv_proj head. heads.head.""".split()


def renamed(name, table):
    for ours, theirs in zip(table[::2], table[1::2]):
        name = name.replace(ours, theirs)
    return name


def as_timm(state):
    return {name.replace("o_proj", "proj").replace(".fc", ".mlp.fc").replace(
        "patch_embed.", "patch_embed.proj."): tensor for name, tensor in fused(state).items()}


def as_torchvision(state, old=False):
    names = (*TORCHVISION, "mlp.0", "mlp.linear_1", "mlp.3", "mlp.linear_2")
    return {renamed(name, names if old else TORCHVISION): tensor
            for name, tensor in fused(state).items()}


def fused(state):
    """With q, k and v in one."""
    result = {}
    for name, tensor in state.items():
        if "q_proj" in name:
            parts = [state[name.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")]
            result[name.replace("q_proj", "qkv")] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            result[name] = tensor
    return result


def as_google(state, heads):
    google, D = {}, state["cls_token"].shape[-1]
    for name, tensor in state.items():
        t = tensor.numpy()
        if name == "patch_embed.weight":
            t = t.transpose(2, 3, 1, 0)
        elif "o_proj.weight" in name:
            t = t.T.reshape(heads, D // heads, D)
        elif "_proj.weight" in name:
            t = t.T.reshape(D, heads, D // heads)
        elif "_proj.bias" in name and "o_proj" not in name:
            t = t.reshape(heads, D // heads)
        elif t.ndim == 2:
            t = t.T
        google[renamed(name, GOOGLE)] = t
    return google


def write_folder(folder, state, **config):
    """pytorch_model.bin and config.json."""
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_huggingface(folder, config, **more):
    """As transformers writes and reads it: oracle() does."""
    state = {renamed(name, HUGGINGFACE): tensor for name, tensor in weights(config).items()}
    write_folder(folder, state, **{
        "model_type": "vit", "num_attention_heads": config.heads, "hidden_act": "gelu",
        "layer_norm_eps": config.eps, "hidden_size": config.width, "patch_size": config.patch_size,
        "num_hidden_layers": config.depth, "intermediate_size": config.mlp,
        "image_size": config.image_size, "id2label": dict.fromkeys(range(config.classes), "a"),
        **more})
    write_processor(folder, size={"height": config.image_size, "width": config.image_size})
    return folder


def write_processor(folder, **settings):
    statistics = dict(zip(("image_mean", "image_std"), NORMALISED["huggingface"]))
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics | settings))


def write_timm(folder, config, **more):
    """As timm saves a model for its hub."""
    mean, std = NORMALISED["timm's hub"]
    return write_folder(folder, as_timm(weights(config)), **{
        "architecture": "vit_tiny_patch4_16", "num_classes": config.classes,
        "global_pool": "token", "num_features": config.width, "pretrained_cfg": {
            "input_size": [3, config.image_size, config.image_size], "mean": mean, "std": std,
            "interpolation": "bicubic", "crop_pct": 0.9}, **more})


def write(family, folder, config):
    if family == "huggingface":
        return write_huggingface(folder / "vit", config)
    if family == "google":
        np.savez(folder / "vit.npz", **as_google(weights(config), config.heads))
        return folder / "vit.npz"
    if family == "timm's hub":
        return write_timm(folder / "vit", config)
    timm = as_timm(weights(config))
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in timm.items()}
    files = {"timm": timm, "deit": {"model": timm}, "compiled": {"state_dict": wrapped},
             "torchvision": as_torchvision(weights(config)),
             "torchvision 0.12": as_torchvision(weights(config), old=True)}
    torch.save(files[family], folder / "vit.pth")
    return folder / "vit.pth"


def oracle(config, tmp_path):
    """Logits of transformers' ViTForImageClassification, which reads our folder."""
    import transformers
    model, read = transformers.ViTForImageClassification.from_pretrained(
        write_huggingface(tmp_path / "vit", config), output_loading_info=True)
    assert not any(read.values()), read              # no key is missing or left over
    again = write_huggingface(tmp_path / "again", config)
    torch.save(model.state_dict(), again / "pytorch_model.bin")          # version 5 has new names
    assert torch.equal(load_vit(again).blocks[0].fc1.weight, weights(config)["blocks.0.fc1.weight"])
    with torch.no_grad():
        return model.eval()(images(config)).logits


def torchvision_oracle(config):
    """Logits of torchvision's VisionTransformer, which reads our tensors."""
    from torchvision.models import VisionTransformer
    model = VisionTransformer(config.image_size, config.patch_size, config.depth, config.heads,
                              config.width, config.mlp, num_classes=config.classes)
    model.load_state_dict(as_torchvision(weights(config)))
    with torch.no_grad():
        return model.eval()(images(config))


# --- parity

@pytest.mark.parametrize("family, size", [
    (family, size) for family in NORMALISED for size, config in SIZES.items()
    if config.eps == 1e-6 or family == "huggingface"])           # others do not name their epsilon
def test_logits_equal_those_of_transformers_and_save_vit_keeps_them(family, size, tmp_path, capsys):
    config, wanted = SIZES[size], torch.tensor(EXPECTED[size])
    path = write(family, tmp_path, config)
    unsaid = path.suffix == ".pth" or "hub" in family
    model = load_vit(path, num_heads=config.heads if unsaid else None)
    logits, (mean, std) = model(images(config)), torch.tensor(NORMALISED[family])
    assert torch.allclose(logits, wanted, atol=1e-5) and model.config.eps == config.eps
    size, printed = config.image_size, capsys.readouterr().out
    assert f"{size} x {size}, normalised with mean {NORMALISED[family][0]} and dev" in printed
    assert ("a guess: --normalise" in printed) == (family in ("timm", "deit", "compiled"))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    white = prepare(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8), model.config)
    assert torch.allclose(white[0, :, 3, 3], (1 - mean) / std)
    save_vit(model, tmp_path / "again.pth")
    again = load_vit(tmp_path / "again.pth")
    assert again.config == model.config and torch.equal(again(images(config)), logits)
    assert load_vit(path, num_heads=1).config.heads == 1         # also where the file names them


@pytest.mark.parametrize("size", SIZES)
def test_committed_logits_are_still_those_of_the_oracle(size, tmp_path):
    pytest.importorskip("transformers")
    assert torch.allclose(oracle(SIZES[size], tmp_path), torch.tensor(EXPECTED[size]), atol=1e-5)


def test_torchvision_gives_the_committed_logits():
    pytest.importorskip("torchvision")
    assert torch.allclose(torchvision_oracle(SMALL), torch.tensor(EXPECTED["small"]), atol=1e-5)


@pytest.mark.parametrize("width, depth, heads", ((192, 1, 3), (1280, 32, 16), (1408, 2, 16),
                                                 (32, 1, 1)))
def test_heads_of_a_pth_are_64_wide_except_in_the_largest(width, depth, heads, tmp_path):
    with torch.device("meta"):
        names = as_timm(ViT(ViTConfig(16, 16, width, depth, 1, 8, 2)).state_dict())
    state = {name: torch.zeros(()).expand(t.shape) for name, t in names.items()}     # small files
    torch.save(state, tmp_path / "vit.pth")
    assert load_vit(tmp_path / "vit.pth").config.heads == heads


# --- heads and positions

def test_positions_are_resized_by_the_bicubic_kernel_and_the_class_token_is_not(tmp_path):
    state = weights(SMALL)
    rows = torch.tensor([3.0, 1.0, 4.0, 1.5])                    # one number for each row of 4 x 4
    grid = rows.view(4, 1, 1).expand(4, 4, 32).reshape(1, 16, 32)
    state["pos_embed"] = torch.cat([torch.full((1, 1, 32), 9.0), grid], 1)
    torch.save(as_timm(state), tmp_path / "vit.pth")
    model = load_vit(tmp_path / "vit.pth", image_size=32, num_heads=4)
    resized = model.pos_embed[0, 1:].view(8, 8, 32)
    # Keys' cubic kernel with a = -0.75, its taps kept inside the border, align_corners=False
    expected = torch.tensor([3.2109375, 2.44140625, 1.13671875, 1.556640625,
                             3.513671875, 3.75, 2.171875, 1.236328125])
    assert torch.allclose(resized, expected[:, None, None].expand(8, 8, 32), atol=1e-5)
    assert torch.equal(model.pos_embed[0, 0], torch.full((32,), 9.0))
    with pytest.raises(ValueError, match="30.*patch, 4"):
        load_vit(tmp_path / "vit.pth", image_size=30)


# --- bad checkpoints (test_bad_input.py damages good ones at random)

@pytest.mark.parametrize("content, word", (
    ({"blocks.1.norm2.bias": None}, "blocks.1.norm2.bias is missing; read are"),
    ({"norm.bias": torch.full((32,), float("nan"))}, "norm.bias has NaN"),
    ({"blocks.0.attn.qkv.weight": torch.ones(95, 32)}, "q_proj|k_proj|v_proj"),
    ({"head.weight": torch.ones(5, 32, dtype=torch.int8)}, "quantised"),
    ({"dist_token": torch.ones(1, 1, 32)}, "dist_token is no part of a plain ViT.*read are"),
    ({"blocks.1.ls1.gamma": torch.ones(32)}, "blocks.1.ls1.gamma is no part.*read are"),
    ({"fc_norm.weight": torch.ones(32), "norm.weight": None}, "fc_norm.weight is no part.*read"),
    (lambda t: {"state_dict": {f"model.{name}": x for name, x in t.items()}, "epoch": 3},
     "model.cls_token is no part.*read are"),                    # Lightning's
    (lambda t: {"student": t, "teacher": t, "epoch": 3}, "holds student, teacher, epoch; read are"),
    (lambda t: {"model": t, "args": argparse.Namespace(lr=1)},
     r"more than tensors.*torch.save\({'model': torch.load\('vit.pth', weights_only=False\)\['mod"),
    (lambda t: 3, "cls_token is missing; read are")))
def test_a_pth_of_another_kind_is_refused_by_what_it_holds(content, word, tmp_path):
    state = as_timm(weights(SMALL))
    state = content(state) if callable(content) else {
        name: t for name, t in (state | content).items() if t is not None}
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=f"^{tmp_path / 'vit.pth'}: .*({word})"):
        load_vit(tmp_path / "vit.pth", num_heads=4)


def test_pre_logits_go_with_the_head(tmp_path):
    more = {"pre_logits/kernel": np.ones((32, 32), "f4"), "pre_logits/bias": np.ones(32, "f4")}
    np.savez(tmp_path / "21k.npz", **as_google(weights(SMALL), 4), **more)
    with pytest.raises(ValueError, match="21k.npz.*pre_logits"):
        load_vit(tmp_path / "21k.npz")
    assert load_vit(tmp_path / "21k.npz", num_classes=7).head.out_features == 7


@pytest.mark.parametrize("settings, word", (
    ({"hidden_act": "relu"}, "hidden_act is 'relu'; only 'gelu'"), ({"model_type": "deit"}, "deit"),
    ({"num_attention_heads": 5}, "5 heads"),
    ({"use_mask_token": True}, "use_mask_token: not known"),
    ({"id2label": {0: "a"}}, "names 1 classes"),
    ({"architecture": "vit_base_patch16_clip_quickgelu_224"}, "is no plain ViT"),
    ({"architecture": "vit_tiny_patch4_16", "global_pool": "avg"}, "global_pool is 'avg'"),
    ({"architecture": "vit_tiny_patch4_16", "model_args": {"reg_tokens": 4}}, "model_args"),
    ({"do_rescale": False}, "do_rescale is False"), ({"do_pad": True}, "do_pad: not known"),
    ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078"),
    ({"crop_size": 24}, "preprocessor_config.json: 24 is not"),
    ({"image_std": [0, 1, 1]}, "deviation"), ({"image_mean": [1.0]}, "mean")))
def test_a_setting_that_is_not_read_is_refused_by_name(settings, word, tmp_path):
    of_config = not word.startswith(("do_", "re", "deviation", "mean", "prep"))
    write = write_timm if "architecture" in settings else write_huggingface
    folder = write(tmp_path / "vit", SMALL, **(settings if of_config else {}))
    if not of_config:
        write_processor(folder, **settings)
    with pytest.raises(ValueError, match=f"^{folder}: .*{word}"):
        load_vit(folder)


# --- pictures as the file says

@pytest.mark.parametrize("settings, expected", (
    ({"size": {"shortest_edge": 18}, "crop_size": 16, "rescale_factor": 0.00392156862745098,
      "do_resize": True, "do_pad": False}, NORMALISED["huggingface"]),
    ({"do_normalize": False}, ((0.0,) * 3, (1.0,) * 3)), ({"image_mean": None}, HALF)))
def test_preprocessor_config_is_honoured(settings, expected, tmp_path, capsys):
    folder = write_huggingface(tmp_path / "vit", SMALL)
    write_processor(folder, **settings)
    config = load_vit(folder).config
    assert (config.mean, config.std) == expected
    assert ("a guess" in capsys.readouterr().out) == ("image_mean" in settings)
    config = load_vit(folder, normalise="imagenet").config
    assert (config.mean, config.std) == IMAGENET and "guess" not in capsys.readouterr().out


def test_a_backbone_without_a_head_is_taken_for_dinos(tmp_path, capsys):
    state = {name: t for name, t in as_timm(weights(SMALL)).items() if "head" not in name}
    torch.save(state, tmp_path / "dino.pth")
    model = load_vit(tmp_path / "dino.pth", names=["cat", "dog"])
    assert model.config.mean == IMAGENET[0] and model.head.out_features == 2
    assert "a new head for 2 classes" in capsys.readouterr().out
    assert load_vit(tmp_path / "dino.pth", 3, normalise="half").config.mean == HALF[0]


# --- classes by name

@pytest.mark.parametrize("had, names, rows, said", (
    ("dog cat bird cow eel", "bird cat cow dog eel", [2, 1, 3, 0, 4], "follow the names"),
    ("dog cat bird cow eel", "cat dog", [1, 0], "follow the names"),
    ("dog cat bird cow eel", "cat dog fox gnu owl", None, "new head for 5 classes, not for dog, c"),
    ("dog dog bird cow eel", "bird cow dog eel emu", None, "a new head for 5 classes"),
    ("dog cat bird cow eel", "0 1 2 3 4", [0, 1, 2, 3, 4], "kept as it is, since the data only"),
    ("LABEL_0 LABEL_1 LABEL_2 LABEL_3 LABEL_4", "a b c d e", [0, 1, 2, 3, 4], "since the file"),
    ("0 1 2 3 4", "0 1 2", None, "a new head for 3 classes"),
    ("", "a b c d e", [0, 1, 2, 3, 4], "kept as it is, since the file does not name"),
    ("", "0 1 3 2 4", [0, 1, 3, 2, 4], "kept as it is"), ("", "a b", None, "a new head for 2")))
def test_rows_of_the_head_follow_the_names_of_the_classes(had, names, rows, said, tmp_path, capsys):
    had, names, head = had.split(), names.split(), weights(SMALL)["head.weight"]
    path = write_huggingface(tmp_path / "hf", SMALL, id2label=dict(enumerate(had)))
    model = load_vit(path, names=names)
    assert said in capsys.readouterr().out and model.config.names == tuple(names)
    assert torch.equal(model.head.weight, head[rows] if rows else torch.zeros(len(names), 32))
    save_vit(model, tmp_path / "merged.pt")                      # the other way round again
    back = load_vit(tmp_path / "merged.pt", names=names[::-1]).head.weight
    assert torch.equal(back, model.head.weight.flip(0)) or names[0] == "0"


# --- which files of a folder are read

PARTS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
OLD = ("pytorch_model-00001-of-00003.bin", "pytorch_model-00003-of-00003.bin")


@pytest.mark.parametrize("there, chosen", (
    (("pytorch_model.bin", *PARTS, "index", "pytorch_model-ema.bin"), "pytorch_model.bin"),
    ((*PARTS, *OLD, "index"), PARTS), ((PARTS[0], "index"), f"{PARTS[1]}: missing"),
    (PARTS, PARTS), (PARTS[:1], f"{PARTS[1]}: missing"),
    ((*PARTS, *OLD), "bin: missing; there are .*00003.bin"),
    ((*PARTS, "model.safetensors"), PARTS), (("model.safetensors",), "safetensors are not read"),
    (("adapter_config.json", "adapter_model.bin"), "an adapter of PEFT"),
    (("pytorch_model-ema.bin",), "pytorch_model.bin")))
def test_weights_are_one_file_or_those_of_the_index_or_one_complete_set(
        there, chosen, tmp_path, capsys):
    state = torch.load(write_huggingface(tmp_path, SMALL) / "pytorch_model.bin")
    placed = {key: PARTS[number % 2] for number, key in enumerate(state)}
    (tmp_path / "pytorch_model.bin").unlink()
    for name in there:                   # each generation has weights of its own
        content = {key: tensor + len(name) for key, tensor in state.items()}
        if name in PARTS:
            content = {key: tensor for key, tensor in state.items() if placed[key] == name}
        torch.save(content, tmp_path / name)
    if "index" in there:
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(
            {"metadata": {}, "weight_map": placed}))
    if isinstance(chosen, tuple) or chosen in there:
        chosen = [chosen] if isinstance(chosen, str) else [*chosen]
        assert train_vit.weight_files(tmp_path) == [tmp_path / name for name in chosen]
        assert ("safetensors" in capsys.readouterr().out) == ("model.safetensors" in there)
        bias = load_vit(tmp_path).head.bias
        if "index" in there or "pytorch_model.bin" in there:     # transformers asks for an index
            transformers = pytest.importorskip("transformers")
            theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path)
            assert torch.equal(theirs.classifier.bias, bias)
    else:
        with pytest.raises(ValueError, match=f"{tmp_path}.*{chosen}"):
            load_vit(tmp_path)


# --- data

def write_cifar(folder, labels=1):
    """Rows are the labels, 1 or 2 of them (coarse and fine), then the channels."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    names = ("data_batch_1.bin", "test_batch.bin") if labels == 1 else ("train.bin", "test.bin")
    for name in names:
        data = rng.integers(0, 256, (20, labels + 3072), dtype=np.uint8)
        data[:, 0], data[:, labels - 1] = 0, np.arange(20) * labels % 10
        data.tofile(folder / name)
    return folder


def test_cifar_rows_are_label_then_channels(tmp_path):
    train, _, names = read_images(write_cifar(tmp_path / "hundred", labels=2))
    assert len(names) == 100 and train[1][3] == 6                # the fine label
    train, test, names = read_images(write_cifar(tmp_path))
    raw = np.fromfile(tmp_path / "data_batch_1.bin", dtype=np.uint8).reshape(-1, 3073)
    assert len(names) == 10 and train[0].shape == (20, 3, 32, 32) and len(test[1]) == 20
    assert train[0][3, 1, 2, 5] == raw[3, 1 + 1024 + 2 * 32 + 5] and train[1][3] == 3
    (tmp_path / "batches.meta.txt").write_text("a b c d e f g h i j\n")
    assert read_images(tmp_path)[2] == [*"abcdefghij"]
    data = (tmp_path / "test_batch.bin").read_bytes()
    (tmp_path / "data_batch_3.bin").write_bytes(data)            # and no data_batch_2.bin
    for name, content, word in (("data_batch_2.bin", None, "No such file"),
                                ("test_batch.bin", data[:-1], "cut short"),
                                ("test_batch.bin", b"\x0b" + data[1:], "label 11"),
                                ("data_batch_3.bin", b"", "empty")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{tmp_path / name}.*{word}"):
            read_images(tmp_path)
        (tmp_path / "data_batch_2.bin").write_bytes(data)
        (tmp_path / "test_batch.bin").write_bytes(data)


def test_npz_images_with_and_without_a_test_part(tmp_path):
    x, y = np.arange(10 * 4 * 4 * 3, dtype=np.uint8).reshape(10, 4, 4, 3), np.array([0, 1] * 5)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    train, test, names = read_images(tmp_path / "a.npz")
    assert len(train[1]) == 8 and len(test[1]) == 2 and names == ["0", "1"]
    np.savez(tmp_path / "a.npz", x=x, y=y, x_test=x[:3], y_test=y[:3])
    train, test, _ = read_images(tmp_path / "a.npz")
    assert len(train[1]) == 10 and torch.equal(test[0][1, 2], torch.from_numpy(x[1, :, :, 2]))
    for bad in ({"y": None}, {"x": x / 2}, {"x": x[..., :1]}, {"y": y[:3]}, {"y": y - 1},
                {"y": y / 2}, {"x_test": x}, {"x_train": x}, {"y": y * 0},
                {"x_test": x, "y_test": y + 1}):
        bad = {"x": x, "y": y} | bad
        np.savez(tmp_path / "a.npz", **{name: a for name, a in bad.items() if a is not None})
        with pytest.raises(ValueError, match="a.npz"):
            read_images(tmp_path / "a.npz")
    (tmp_path / "a.zip").write_bytes((tmp_path / "a.npz").read_bytes())
    with pytest.raises(ValueError, match="a.zip: a file, but no .npz: give the folder"):
        read_images(tmp_path / "a.zip")
    y = np.repeat(np.arange(3), (5, 5, 1))                       # the single one is trained on
    np.savez(tmp_path / "a.npz", x=np.zeros((11, 2, 2, 3), np.uint8), y=y)
    assert read_images(tmp_path / "a.npz")[1][1].tolist() == [0, 1]


def test_pictures_in_class_folders_are_squares(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for name in ("blue", "red"):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("RGB", (30 + i, 20), name).save(tmp_path / name / f"{i}.PNG")
    train, test, names = read_images(tmp_path)
    assert names == ["blue", "red"] and (len(train[1]), len(test[1])) == (10, 2)
    assert len(train_vit.take(train, torch.tensor([3]))[0]) == 1
    red = [train_vit.read_picture(f, 8) for f, label in zip(*train) if label == 1]
    assert all(x.shape == (8, 8, 3) and (x == [255, 0, 0]).all() for x in red)


@pytest.mark.parametrize("tree, expected", (
    ("a/images/0.jpg a/images/x/1.JFIF b/2.pgm b/3.webp", "a a b b"),    # one folder deeper
    ("Train/a/0.png Train/b/1.png Test/a/2.png Train/.ipynb_checkpoints/3.png", "a b a"),
    ("train/a/0.png train/b/1.png train/c/notes.txt valid/a/2.png", "a b a"),
    ("train/a/0.png train/b/1.png eval/b/2.png", "a b b"),
    ("train/a/0.png train/b/1.png test/2.png val/a/3.png", "a b a"),     # test/ is unlabelled
    ("train/a/0.png train/b/1.png test/images/2.png val/a/3.png", "a b a"),
    ("train/a/0.png train/b/1.png validation/a/2.png dev/b/3.png labels/a.txt", "a b a"),
    ("train/a/0.png train/b/1.png holdout/a/2.png", "holdout"),
    ("train/a/0.png train/b/1.png val/a/2.png val/c/3.png", "class c is only in the test part"),
    ("train/a/0.png train/b/1.png test/2.png", "holds test, train; read are"),
    ("test/a/0.png test/b/1.png", "holds test; .* train and one of"),
    ("images/0.png images/1.png", "only 1 class"),
    ("0.png 1.png", "no pictures in folders; read are CIFAR binaries")))
def test_folders_are_read_as_imagefolder_does_or_refused(tree, expected, tmp_path, capsys):
    for name in tree.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    if "only 1" in expected or not set(expected) <= {*"abc "}:
        with pytest.raises(ValueError, match=f"^{tmp_path}: .*{expected}"):
            read_images(tmp_path)
    else:
        data, names = train_vit.read_folders(tmp_path)
        found = [(file, names[label]) for part in data for file, label in zip(*part)]
        assert [name for _, name in found] == expected.split()
        assert all(name in Path(file).relative_to(tmp_path).parts for file, name in found)
        assert ("tested on" in capsys.readouterr().out) == (len(data) == 2)


def test_pictures_of_16_or_32_bits_turned_or_transparent_are_read_as_they_look(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 10000, 30000, 65535]], np.uint16)).save(path)
    assert train_vit.read_picture(path)[0, :, 0].tolist() == [0, 39, 117, 255]
    Image.fromarray(np.array([[0, 0.25, 1]], np.float32)).save(tmp_path / "a.tif")
    assert train_vit.read_picture(tmp_path / "a.tif")[0, :, 0].tolist() == [0, 64, 255]
    Image.fromarray(np.array([[0, 3.5]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="a.tif: values 0.0 to 3.5, expected are 0 to 1"):
        train_vit.read_picture(tmp_path / "a.tif")
    Image.new("RGBA", (4, 4), (200, 200, 200, 0)).save(path)     # fully transparent
    assert (train_vit.read_picture(path) == 0).all()
    turned, exif = Image.new("RGB", (8, 4), "red"), Image.Exif()
    exif[0x0112] = 6                                             # turn by 90 degrees
    turned.save(tmp_path / "a.jpg", exif=exif)
    assert train_vit.read_picture(tmp_path / "a.jpg").shape == (8, 4, 3)


def test_shots_are_per_class_seeded_and_short_classes_are_named(capsys):
    labels = torch.tensor([0] * 10 + [1] * 10 + [2] * 3)
    chosen = choose(labels, 4, None, seed=0)
    assert labels[chosen].bincount().tolist() == [4, 4, 3] and len(chosen.unique()) == 11
    assert "class 2 has 3" in capsys.readouterr().out
    assert torch.equal(chosen, choose(labels, 4, None, seed=0))
    assert not torch.equal(chosen, choose(labels, 4, None, seed=1))
    assert labels[choose(labels, None, 0.5, seed=0)].bincount().tolist() == [5, 5, 2]
    assert torch.equal(choose(labels, None, None, seed=0), torch.arange(23))
    assert not torch.equal(batch_indices(12, 12, 0, 3), batch_indices(12, 12, 0, 4))


def test_augmentation_moves_and_flips_each_image_by_whole_pixels():
    torch.manual_seed(0)
    x = torch.arange(32, dtype=torch.uint8).expand(64, 3, 32, 32)        # rows count the columns
    y = prepare(x, ViTConfig(32, mean=(0,) * 3, std=(1,) * 3), augment=True) * 255
    assert torch.allclose(y, y.round(), atol=1e-2)
    step = (y[:, 0, 0, 17] - y[:, 0, 0, 16]).round()
    shift = torch.where(step > 0, y[:, 0, 0, 16] - 16, 15 - y[:, 0, 0, 16]).round()
    assert set(step.tolist()) == {-1.0, 1.0} and len(shift.unique()) > 4 and shift.abs().max() <= 4


def test_drawn_pictures_are_seeded_labelled_and_shifted():
    (a, labels), (b, _), (c, _) = (draw(300, seed, False) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.shape == (300, 3, 24, 24) and sorted(set(labels.tolist())) == list(range(10))
    shifted, same = draw(300, 0, True)
    assert torch.equal(labels, same) and a.float().mean() < 115 < 140 < shifted.float().mean()


if __name__ == "__main__":
    for size, config in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                logits = oracle(config, Path(folder))
            except ImportError:
                logits = torchvision_oracle(config)              # whose epsilon is 1e-6
            print(size, logits.double().numpy().round(6).tolist())
