"""train_vit.py: the model and the three checkpoint families against transformers, bad files, data.

The expected logits below were printed by `python tests/test_vit.py`, which needs transformers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import train_vit
from structlora import InputError, choose
from train_vit import ViT, ViTConfig, load_vit, prepare, read_images, save_vit

SIZES = {"small": ViTConfig(16, 4, 32, 2, 4, 64, 5),
         "one block": ViTConfig(32, 8, 48, 1, 3, 96, 3),
         "deep": ViTConfig(24, 8, 64, 4, 1, 40, 2),
         "wide epsilon": ViTConfig(16, 8, 32, 2, 2, 64, 4, eps=0.1)}
EXPECTED = {
    'small': [[3.285653, -0.5405, 0.139855, 1.165184, -1.224773],
                      [3.203568, -0.622092, -0.083619, 1.24297, -1.155959]],
    'one block': [[-0.40021, 1.096331, -1.563931],
                      [-0.405501, 0.880888, -1.755397]],
    'deep': [[0.75054, -2.604613],
                      [0.918247, -0.762385]],
    'wide epsilon': [[2.846409, -1.172914, -1.373858, -1.040013],
                      [2.415757, -0.725273, -0.426356, 1.192064]]}


def images(config):
    """Two images of a fixed pattern, [2, 3, S, S]."""
    S = config.image_size
    return torch.sin(0.37 * torch.arange(2 * 3 * S * S)).view(2, 3, S, S)


def weights(config):
    """Weights by our names that depend on no random generator."""
    state = ViT(config).state_dict()
    for i, (name, tensor) in enumerate(state.items()):
        wave = torch.sin(0.7 * torch.arange(tensor.numel()).double() ** 1.1 + i).view(tensor.shape)
        is_scale = "norm" in name and name.endswith("weight")
        state[name] = (1 + 0.2 * wave if is_scale else 0.25 * wave).float()
    return state


def model_of(config):
    model = ViT(config)
    model.load_state_dict(weights(config))
    return model


# --- the three layouts, written here a second time, by hand


def as_timm(state):
    timm = {}
    for name, tensor in state.items():
        if "q_proj" in name:
            parts = [state[name.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")]
            timm[name.replace("q_proj", "qkv")] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            name = name.replace("o_proj", "proj").replace(".fc", ".mlp.fc")
            timm[name.replace("patch_embed.", "patch_embed.proj.")] = tensor
    return timm


def as_google(state, heads):
    google = {}
    for name, t in state.items():
        t, D = t.numpy(), state["cls_token"].shape[-1]
        part, end = name.rsplit(".", 1) if "." in name else (name, "")
        leaf = {"weight": "kernel", "bias": "bias"}.get(end)
        norm = {"weight": "scale", "bias": "bias"}.get(end)
        block = ""
        if part.startswith("blocks."):
            _, number, part = part.split(".", 2)
            block = f"Transformer/encoderblock_{number}/"
        if name == "cls_token":
            google["cls"] = t
        elif name == "pos_embed":
            google["Transformer/posembed_input/pos_embedding"] = t
        elif part == "patch_embed":
            google[f"embedding/{leaf}"] = t.transpose(2, 3, 1, 0) if t.ndim == 4 else t
        elif part == "norm":
            google[f"Transformer/encoder_norm/{norm}"] = t
        elif part in ("norm1", "norm2"):
            google[f"{block}LayerNorm_{0 if part == 'norm1' else 2}/{norm}"] = t
        elif part in ("fc1", "fc2"):
            google[f"{block}MlpBlock_3/Dense_{int(part[2]) - 1}/{leaf}"] = t.T
        elif part == "head":
            google[f"head/{leaf}"] = t.T
        else:
            which = {"q": "query", "k": "key", "v": "value", "o": "out"}[part.split(".")[1][0]]
            shape = (heads, D // heads, D) if which == "out" else (D, heads, D // heads)
            t = t.T.reshape(shape) if t.ndim == 2 else t if which == "out" else t.reshape(heads, -1)
            google[f"{block}MultiHeadDotProductAttention_1/{which}/{leaf}"] = t
    return google


def as_huggingface(state):
    table = (("blocks.", "encoder.layer."), ("norm1", "layernorm_before"),
             ("norm2", "layernorm_after"), ("attn.q_proj", "attention.attention.query"),
             ("attn.k_proj", "attention.attention.key"),
             ("attn.v_proj", "attention.attention.value"),
             ("attn.o_proj", "attention.output.dense"),
             ("fc1", "intermediate.dense"), ("fc2", "output.dense"),
             ("cls_token", "embeddings.cls_token"), ("pos_embed", "embeddings.position_embeddings"),
             ("patch_embed", "embeddings.patch_embeddings.projection"))
    result = {}
    for name, tensor in state.items():
        for ours, theirs in table:
            name = name.replace(ours, theirs)
        name = name.replace("norm.", "layernorm.") if name.startswith("norm.") else name
        name = name.replace("head.", "classifier.")
        result[name if name.startswith("classifier") else "vit." + name] = tensor
    return result


def write_google(path, config, **more):
    np.savez(path, **{**as_google(weights(config), config.heads), **more})
    return path


def write_timm(path, config, key=None):
    state = as_timm(weights(config))
    torch.save({key: state} if key else state, path)
    return path


def write_huggingface(folder, config, **more):
    folder.mkdir(exist_ok=True)
    torch.save(as_huggingface(weights(config)), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(
        {"model_type": "vit", "num_attention_heads": config.heads, "hidden_act": "gelu",
         "layer_norm_eps": config.eps, **more}))
    return folder


def write(family, tmp_path, config):
    if family == "google":
        return write_google(tmp_path / "vit.npz", config)
    if family == "timm":
        return write_timm(tmp_path / "vit.pth", config)
    return write_huggingface(tmp_path / "vit", config)


def oracle(config):
    """Logits of transformers' ViTForImageClassification with the same weights."""
    import transformers
    model = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=config.width, num_hidden_layers=config.depth, num_labels=config.classes,
        num_attention_heads=config.heads, intermediate_size=config.mlp, layer_norm_eps=config.eps,
        image_size=config.image_size, patch_size=config.patch_size)).eval()
    state, renamed = {}, "vit.layers.0.layernorm_before.bias" in model.state_dict()
    for key, value in as_huggingface(weights(config)).items():
        if renamed:                                              # by transformers 5
            for old, new in (("encoder.layer", "layers"), ("attention.attention.query",
                             "attention.q_proj"), ("attention.attention.key", "attention.k_proj"),
                             ("attention.attention.value", "attention.v_proj"),
                             ("attention.output.dense", "attention.o_proj"),
                             ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2")):
                key = key.replace(old, new)
        state[key] = value
    model.load_state_dict(state)
    with torch.no_grad():
        return model(images(config)).logits


# --- parity


@pytest.mark.parametrize("family", ("google", "timm", "huggingface"))
@pytest.mark.parametrize("size", SIZES)
def test_logits_equal_those_of_transformers(size, family, tmp_path):
    config = SIZES[size]
    if config.eps != 1e-6 and family != "huggingface":
        pytest.skip("only Hugging Face's files name their epsilon")
    path = write(family, tmp_path, config)
    model = load_vit(path, num_heads=config.heads if family == "timm" else None)
    assert torch.allclose(model(images(config)), torch.tensor(EXPECTED[size]), atol=1e-4)
    assert model.config.heads == config.heads and model.config.eps == config.eps
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_committed_logits_are_still_those_of_the_oracle(size):
    pytest.importorskip("transformers")
    assert torch.allclose(oracle(SIZES[size]), torch.tensor(EXPECTED[size]), atol=1e-5)


def test_logits_depend_on_the_number_of_heads(tmp_path):
    path = write_timm(tmp_path / "vit.pth", SIZES["small"])
    wrong = load_vit(path, num_heads=2)(images(SIZES["small"]))
    assert not torch.allclose(wrong, torch.tensor(EXPECTED["small"]), atol=1e-2)


def test_a_pre_logits_layer_is_kept_with_the_head_and_dropped_with_it(tmp_path):
    config, rng = SIZES["small"], np.random.default_rng(0)
    kernel, bias = rng.normal(size=(32, 32)).astype("f4"), rng.normal(size=32).astype("f4")
    path = write_google(tmp_path / "vit.npz", config,
                        **{"pre_logits/kernel": kernel, "pre_logits/bias": bias})
    model = load_vit(path)
    features = []
    hook = model.norm.register_forward_hook(lambda m, i, o: features.append(o))
    logits = model(images(config))
    hook.remove()
    by_hand = np.tanh(features[0].detach().numpy() @ kernel + bias)
    state = weights(config)
    by_hand = torch.from_numpy(by_hand) @ state["head.weight"].T + state["head.bias"]
    assert torch.allclose(logits, by_hand, atol=1e-4)
    assert load_vit(path, num_classes=7).pre_logits is None


def test_normalisation_is_the_one_of_the_family(tmp_path):
    config = SIZES["small"]
    assert load_vit(write_google(tmp_path / "a.npz", config)).config.mean == (0.5, 0.5, 0.5)
    assert load_vit(write_timm(tmp_path / "a.pth", config)).config.mean == (0.5, 0.5, 0.5)
    deit = load_vit(write_timm(tmp_path / "b.pth", config, key="model")).config
    assert deit.mean == (0.485, 0.456, 0.406) and deit.std == (0.229, 0.224, 0.225)
    folder = write_huggingface(tmp_path / "hf", config)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}))
    assert load_vit(folder).config.mean == (0.1, 0.2, 0.3)
    x = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    expected = (1 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.4, 0.5, 0.6])
    assert torch.allclose(prepare(x, load_vit(folder).config)[0, :, 3, 3], expected)


def test_a_pytorch_model_bin_may_be_named_itself(tmp_path):
    folder = write_huggingface(tmp_path / "hf", SIZES["small"])
    model = load_vit(folder / "pytorch_model.bin")
    assert torch.allclose(model(images(SIZES["small"])), torch.tensor(EXPECTED["small"]), atol=1e-4)


def test_absent_qkv_biases_are_zero(tmp_path):
    state = {k: v for k, v in as_timm(weights(SIZES["small"])).items() if "qkv.bias" not in k}
    torch.save(state, tmp_path / "vit.pth")
    model = load_vit(tmp_path / "vit.pth")
    assert not any(b.attn.q_proj.bias.any() or b.attn.v_proj.bias.any() for b in model.blocks)


@pytest.mark.parametrize("width, depth, heads", ((192, 1, 3), (1280, 32, 16), (32, 1, 1)))
def test_heads_of_a_pth_are_64_wide_except_in_vit_h(width, depth, heads):
    with torch.device("meta"):
        state = ViT(ViTConfig(16, 8, width, depth, heads, 8, 2)).state_dict()
    assert train_vit.sizes_of("file", state, None).heads == heads


# --- heads and positions


def test_a_new_head_is_zero_and_everything_else_the_same(tmp_path):
    path = write_timm(tmp_path / "vit.pth", SIZES["small"])
    old, new = load_vit(path, num_classes=5), load_vit(path, num_classes=9)
    assert new(images(SIZES["small"])).shape == (2, 9) and not new.head.weight.any()
    assert torch.equal(old.head.weight, weights(SIZES["small"])["head.weight"])
    for name, value in old.state_dict().items():
        assert name.startswith("head") or torch.equal(new.state_dict()[name], value)


def cubic(x, a=-0.75):
    """Keys' kernel, with the constant that PyTorch and TensorFlow's image libraries use."""
    x = abs(x)
    return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4)


def test_positions_are_resized_by_the_bicubic_kernel_and_the_class_token_is_not(tmp_path):
    config, state = SIZES["small"], weights(SIZES["small"])
    rows = torch.tensor([3.0, 1.0, 4.0, 1.5])                    # one number for each row of 4 x 4
    grid = rows.view(4, 1, 1).expand(4, 4, 32).reshape(1, 16, 32)
    state["pos_embed"] = torch.cat([torch.full((1, 1, 32), 9.0), grid], 1)
    torch.save(as_timm(state), tmp_path / "vit.pth")
    model = load_vit(tmp_path / "vit.pth", image_size=32, num_heads=4)
    resized = model.pos_embed[0, 1:].view(8, 8, 32)
    for new in range(8):
        centre = (new + 0.5) / 2 - 0.5                           # align_corners=False
        taps = range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3)
        value = sum(cubic(centre - t) * rows[min(max(t, 0), 3)] for t in taps)
        assert torch.allclose(resized[new], value.expand(8, 32), atol=1e-5)
    assert torch.equal(model.pos_embed[0, 0], torch.full((32,), 9.0))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    assert replace(model.config, image_size=16) == config


def test_what_save_vit_writes_reads_back_bit_equal(tmp_path):
    config = replace(SIZES["small"], eps=0.03, mean=(0.1, 0.2, 0.3))
    save_vit(model_of(config), tmp_path / "vit.pth")
    model = load_vit(tmp_path / "vit.pth")
    assert model.config == config
    assert torch.equal(model(images(config)), model_of(config)(images(config)))
    assert torch.load(tmp_path / "vit.pth")["model"].keys() == as_timm(weights(config)).keys()


# --- bad checkpoints


def change(**entries):
    """A timm state dict with entries replaced, or removed if None."""
    state = as_timm(weights(SIZES["small"])) | entries
    return {k: v for k, v in state.items() if v is not None}


class Hostile:
    def __reduce__(self):
        return print, ("executed",)


BAD_STATES = {
    "missing key": (change(**{"blocks.1.norm2.bias": None}), "blocks.1.norm2.bias"),
    "unknown key": (change(**{"blocks.0.ls1.gamma": torch.ones(32)}), "blocks.0.ls1.gamma"),
    "wrong shape": (change(**{"norm.bias": torch.ones(31)}), "norm.bias"),
    "nan": (change(**{"norm.bias": torch.full((32,), float("nan"))}), "norm.bias"),
    "infinite": (change(**{"norm.bias": torch.full((32,), float("inf"))}), "norm.bias"),
    "odd fused qkv": (change(**{"blocks.0.attn.qkv.weight": torch.ones(95, 32)}), "qkv"),
    "no grid": (change(pos_embed=torch.ones(1, 18, 32)), "pos_embed"),
    "no model": ({"a": torch.ones(1)}, "a"), "empty": ({}, "tensors"),
    "not a dict": (torch.ones(3), "tensors"), "not tensors": ({"a": 1}, "tensors"),
    "code": ({"model": Hostile()}, "refused")}


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_bad_pth_is_refused_by_name_in_one_line(case, tmp_path, capfd):
    state, word = BAD_STATES[case]
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(InputError) as error:
        load_vit(tmp_path / "vit.pth")
    text = str(error.value)
    assert "vit.pth" in text and word in text and "\n" not in text
    assert "executed" not in capfd.readouterr().out


@pytest.mark.parametrize("family", ("google", "timm", "huggingface"))
def test_truncated_files_are_refused_wherever_they_were_cut(family, tmp_path):
    path = write(family, tmp_path, SIZES["one block"])
    file = path / "pytorch_model.bin" if family == "huggingface" else path
    whole = file.read_bytes()
    for share in (0.0, 0.001, 0.3, 0.7, 0.99, 0.9999):
        file.write_bytes(whole[:int(share * len(whole))])
        with pytest.raises(InputError, match=file.name):
            load_vit(path)
    file.write_bytes(whole)
    load_vit(path, num_heads=3)


def test_other_files_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_vit(tmp_path / "absent.pth")
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{\"a\": 1}      ")
    with pytest.raises(InputError, match="safetensors.*torch.save"):
        load_vit(tmp_path / "model.safetensors")
    folder = write_huggingface(tmp_path / "hf", SIZES["small"], hidden_act="relu")
    with pytest.raises(InputError, match="config.json.*relu"):
        load_vit(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json"):
        load_vit(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")
    with pytest.raises(InputError, match="safetensors"):
        load_vit(folder)
    arrays = as_google(weights(SIZES["small"]), 4)
    np.savez(tmp_path / "a.npz", **{**arrays, "cls": np.array([Hostile()], dtype=object)})
    with pytest.raises(InputError, match="a.npz"):
        load_vit(tmp_path / "a.npz")
    with pytest.raises(InputError, match="heads"):
        load_vit(write_timm(tmp_path / "b.pth", SIZES["small"]), num_heads=5)
    with pytest.raises(InputError, match="30.*patch size 4"):
        load_vit(tmp_path / "b.pth", image_size=30)


# --- data


def write_cifar(folder, hundred=False, rows=20):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for name in ("train.bin", "test.bin") if hundred else ("data_batch_1.bin", "test_batch.bin"):
        data = rng.integers(0, 256, (rows, 3073 + hundred), dtype=np.uint8)
        data[:, 0] = np.arange(rows) % 10
        if hundred:
            data[:, 1] = np.arange(rows) * 5 % 100
        data.tofile(folder / name)
    return folder


def test_cifar_rows_are_label_then_channels(tmp_path):
    train, test, classes = read_images(write_cifar(tmp_path / "ten"))
    raw = np.fromfile(tmp_path / "ten" / "data_batch_1.bin", dtype=np.uint8).reshape(-1, 3073)
    assert classes == 10 and train.pixels.shape == (20, 3, 32, 32) and len(test) == 20
    assert train.pixels[3, 1, 2, 5] == raw[3, 1 + 1024 + 2 * 32 + 5] and train.labels[3] == 3
    train, _, classes = read_images(write_cifar(tmp_path / "hundred", hundred=True))
    assert classes == 96 and train.labels[3] == 15                               # the fine label


def test_npz_images_with_and_without_a_test_part(tmp_path):
    x = np.arange(10 * 4 * 4 * 3, dtype=np.uint8).reshape(10, 4, 4, 3)
    y = np.array([0, 1] * 5)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    train, test, classes = read_images(tmp_path / "a.npz")
    assert len(train) == 8 and len(test) == 2 and classes == 2
    np.savez(tmp_path / "b.npz", x=x, y=y, x_test=x[:3], y_test=y[:3])
    train, test, _ = read_images(tmp_path / "b.npz")
    assert len(train) == 10 and torch.equal(test.pixels[1, 2], torch.from_numpy(x[1, :, :, 2]))


def test_folders_of_images_are_read_through_pillow(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("RGB", (30 + i, 20), colour).save(tmp_path / name / f"{i}.png")
    train, test, classes = read_images(tmp_path)
    assert classes == 2 and len(train) + len(test) == 12 and len(test) == 2
    pixels = train.decoded(8).pixels
    assert pixels.shape == (10, 3, 8, 8)
    red = pixels[train.labels == 1]
    assert (red[:, 0] > 250).all() and (red[:, 2] < 5).all()
    (tmp_path / "red" / "5.png").write_bytes(b"")
    with pytest.raises(InputError, match="5.png"):
        [part.decoded(8) for part in read_images(tmp_path)[:2]]


def test_bad_data_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="absent"):
        read_images(tmp_path / "absent")
    folder = write_cifar(tmp_path / "ten")
    data = (folder / "test_batch.bin").read_bytes()
    (folder / "test_batch.bin").write_bytes(data[:-1])
    with pytest.raises(InputError, match="test_batch.bin.*truncated"):
        read_images(folder)
    (folder / "test_batch.bin").write_bytes(b"\x0b" + data[1:])
    with pytest.raises(InputError, match="test_batch.bin: label 11"):
        read_images(folder)
    (folder / "test_batch.bin").unlink()
    with pytest.raises(InputError, match="test_batch.bin"):
        read_images(folder)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="nothing"):
        read_images(tmp_path / "nothing")
    x, y = np.zeros((4, 2, 2, 3), np.uint8), np.arange(4)
    for bad in ({"x": x}, {"x": x / 2, "y": y}, {"x": x[..., :1], "y": y}, {"x": x, "y": y[:3]},
                {"x": x, "y": y - 1}, {"x": x, "y": y / 2}):
        np.savez(tmp_path / "a.npz", **bad)
        with pytest.raises(InputError, match="a.npz"):
            read_images(tmp_path / "a.npz")


def test_shots_are_per_class_seeded_and_short_classes_are_named(capsys):
    labels = torch.tensor([0] * 10 + [1] * 10 + [2] * 3)
    chosen = choose(labels, 4, None, seed=0)
    assert labels[chosen].bincount().tolist() == [4, 4, 3] and len(chosen.unique()) == 11
    assert "class 2 has 3" in capsys.readouterr().out
    assert torch.equal(chosen, choose(labels, 4, None, seed=0))
    assert not torch.equal(chosen, choose(labels, 4, None, seed=1))
    assert labels[choose(labels, None, 0.5, seed=0)].bincount().tolist() == [5, 5, 2]
    assert torch.equal(choose(labels, None, None, seed=0), torch.arange(23))


def test_augmentation_crops_and_flips_each_image_by_itself():
    torch.manual_seed(0)
    x = torch.arange(32.0).expand(64, 3, 32, 32)                 # every row counts the columns
    y = train_vit.augment(x)
    assert y.shape == x.shape
    step = y[:, 0, 0, 17] - y[:, 0, 0, 16]
    shift = torch.where(step > 0, y[:, 0, 0, 16] - 16, 15 - y[:, 0, 0, 16])
    assert set(step.tolist()) == {-1.0, 1.0} and len(shift.unique()) > 4 and shift.abs().max() <= 4


def test_pictures_are_seeded_labelled_and_shifted():
    a, b, c = (train_vit.draw(300, seed, False) for seed in (0, 0, 1))
    assert torch.equal(a.pixels, b.pixels) and not torch.equal(a.pixels, c.pixels)
    assert a.pixels.shape == (300, 3, 24, 24) and sorted(set(a.labels.tolist())) == list(range(10))
    shifted = train_vit.draw(300, 0, True)
    assert torch.equal(a.labels, shifted.labels)
    assert a.pixels.float().mean() < 110 < 145 < shifted.pixels.float().mean()   # bright on dark


def test_source_classes_split_and_relabel():
    data = train_vit.Images(torch.arange(6).view(6, 1, 1, 1), torch.tensor([0, 1, 2, 3, 2, 1]))
    source, target, count = train_vit.split_classes(data, data, 4, "1,3")
    assert source[0].labels.tolist() == [0, 1, 0]
    assert source[0].pixels.flatten().tolist() == [1, 3, 5]
    assert target[1].labels.tolist() == [0, 1, 1] and count == 2
    for bad in ("", "4", "0,1,2,3", "a"):
        with pytest.raises(InputError, match="source-classes"):
            train_vit.split_classes(data, data, 4, bad)


if __name__ == "__main__":
    torch.set_printoptions(precision=6, sci_mode=False)
    for size, config in SIZES.items():
        rows = [[round(v, 6) for v in row] for row in oracle(config).tolist()]
        print(f"    {size!r}: {rows},")
