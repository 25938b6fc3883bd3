"""train_vit.py: the model and the three checkpoint families against transformers, bad files, data.

The expected logits below were printed by `python tests/test_vit.py`, which needs transformers."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import train_vit
from helpers import DATA, waves
from train_vit import ViT, ViTConfig, choose, draw, load_vit, prepare, read_images, save_vit

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
NORMALISED = {       # family -> mean and deviation of its pictures
    "google": HALF, "timm": HALF, "compiled": HALF,
    "deit": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "huggingface": ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))}


def images(config):
    """Two images of a fixed pattern, [2, 3, S, S]."""
    S = config.image_size
    return torch.sin(0.37 * torch.arange(2 * 3 * S * S)).view(2, 3, S, S)


def weights(config):
    return waves({name: tensor.shape for name, tensor in ViT(config).state_dict().items()}, 0.25)


# --- the three layouts, written here a second time, by hand: our names and theirs, in this order

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


def renamed(name, table):
    for ours, theirs in zip(table[::2], table[1::2]):
        name = name.replace(ours, theirs)
    return name


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


def write_huggingface(folder, config, **more):
    """As transformers writes and reads it: oracle() does."""
    folder.mkdir(exist_ok=True)
    state = {renamed(name, HUGGINGFACE): tensor for name, tensor in weights(config).items()}
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(
        {"model_type": "vit", "num_attention_heads": config.heads, "hidden_act": "gelu",
         "layer_norm_eps": config.eps, "hidden_size": config.width, "patch_size": config.patch_size,
         "num_hidden_layers": config.depth, "intermediate_size": config.mlp,
         "image_size": config.image_size, "id2label": dict.fromkeys(range(config.classes), "a"),
         **more}))
    (folder / "preprocessor_config.json").write_text(json.dumps(
        dict(zip(("image_mean", "image_std"), NORMALISED["huggingface"]))))
    return folder


def write(family, folder, config):
    if family == "huggingface":
        return write_huggingface(folder / "vit", config)
    if family == "google":
        np.savez(folder / "vit.npz", **as_google(weights(config), config.heads))
        return folder / "vit.npz"
    timm = as_timm(weights(config))
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in timm.items()}
    files = {"timm": timm, "deit": {"model": timm}, "compiled": {"state_dict": wrapped}}
    torch.save(files[family], folder / "vit.pth")
    return folder / "vit.pth"


def oracle(config, tmp_path):
    """Logits of transformers' ViTForImageClassification, which reads our folder."""
    import transformers
    model, read = transformers.ViTForImageClassification.from_pretrained(
        write_huggingface(tmp_path / "vit", config), output_loading_info=True)
    assert not any(read.values()), read              # no key is missing or left over
    with torch.no_grad():
        return model.eval()(images(config)).logits


# --- parity

@pytest.mark.parametrize("family, size", [
    (family, size) for family in NORMALISED for size, config in SIZES.items()
    if config.eps == 1e-6 or family == "huggingface"])           # others do not name their epsilon
def test_logits_equal_those_of_transformers_and_save_vit_keeps_them(family, size, tmp_path):
    config, wanted = SIZES[size], torch.tensor(EXPECTED[size])
    path = write(family, tmp_path, config)
    model = load_vit(path, num_heads=config.heads if path.suffix == ".pth" else None)
    logits, (mean, std) = model(images(config)), torch.tensor(NORMALISED[family])
    assert torch.allclose(logits, wanted, atol=1e-4) and model.config.eps == config.eps
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


@pytest.mark.parametrize("width, depth, heads", ((192, 1, 3), (1280, 32, 16), (32, 1, 1)))
def test_heads_of_a_pth_are_64_wide_except_in_vit_h(width, depth, heads, tmp_path):
    with torch.device("meta"):
        names = as_timm(ViT(ViTConfig(16, 16, width, depth, 1, 8, 2)).state_dict())
    state = {name: torch.zeros(()).expand(t.shape) for name, t in names.items()}     # small files
    torch.save(state, tmp_path / "vit.pth")
    assert load_vit(tmp_path / "vit.pth").config.heads == heads


# --- heads and positions

def cubic(x, a=-0.75):
    """Keys' kernel, with the constant that PyTorch and TensorFlow's image libraries use."""
    x = abs(x)
    return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4)


def test_positions_are_resized_by_the_bicubic_kernel_and_the_class_token_is_not(tmp_path):
    state = weights(SMALL)
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
    with pytest.raises(ValueError, match="30.*patch, 4"):
        load_vit(tmp_path / "vit.pth", image_size=30)


# --- bad checkpoints (test_bad_input.py damages good ones at random)

@pytest.mark.parametrize("change, word", (
    ({"blocks.1.norm2.bias": None}, "blocks.1.norm2.bias"),
    ({"norm.bias": torch.full((32,), float("nan"))}, "norm.bias"),
    ({"blocks.0.attn.qkv.weight": torch.ones(95, 32)}, "q_proj|k_proj|v_proj"),
    ({"head.weight": torch.ones(5, 32, dtype=torch.int8)}, "quantised")))
def test_a_bad_pth_is_refused_by_name(change, word, tmp_path):
    state = as_timm(weights(SMALL)) | change
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=f"vit.pth: .*({word})"):
        load_vit(tmp_path / "vit.pth", num_heads=4)


def test_what_has_no_part_in_this_vit_is_refused_or_goes_with_the_head(tmp_path):
    more = {"pre_logits/kernel": np.ones((32, 32), "f4"), "pre_logits/bias": np.ones(32, "f4")}
    np.savez(tmp_path / "21k.npz", **as_google(weights(SMALL), 4), **more)
    for path, word in (
            (tmp_path / "21k.npz", "pre_logits"),
            (tmp_path / "vit.safetensors", "safetensors are not read"),
            (write_huggingface(tmp_path / "a", SMALL, hidden_act="relu"), "with relu"),
            (write_huggingface(tmp_path / "b", SMALL, num_attention_heads=5), "5 heads")):
        with pytest.raises(ValueError, match=f"{path}.*{word}"):
            load_vit(path)
    assert load_vit(tmp_path / "21k.npz", num_classes=7).head.out_features == 7


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
    if (DATA / "cifar10").is_dir():                  # real ones, if they are here
        train, test, _ = read_images(DATA / "cifar10")
        assert train[1].bincount().tolist() == [1000] * 10 and len(test[1]) == 2000
    data = (tmp_path / "test_batch.bin").read_bytes()
    for content, word in ((data[:-1], "cut short"), (b"\x0b" + data[1:], "label 11"),
                          (b"", "missing")):
        (tmp_path / "test_batch.bin").write_bytes(content)
        with pytest.raises(ValueError, match=f"test_batch.bin.*{word}"):
            read_images(tmp_path)


def test_npz_images_with_and_without_a_test_part(tmp_path):
    x, y = np.arange(10 * 4 * 4 * 3, dtype=np.uint8).reshape(10, 4, 4, 3), np.array([0, 1] * 5)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    train, test, names = read_images(tmp_path / "a.npz")
    assert len(train[1]) == 8 and len(test[1]) == 2 and names == ["0", "1"]
    np.savez(tmp_path / "a.npz", x=x, y=y, x_test=x[:3], y_test=y[:3])
    train, test, _ = read_images(tmp_path / "a.npz")
    assert len(train[1]) == 10 and torch.equal(test[0][1, 2], torch.from_numpy(x[1, :, :, 2]))
    for bad in ({"x": x}, {"x": x / 2, "y": y}, {"x": x[..., :1], "y": y}, {"x": x, "y": y[:3]},
                {"x": x, "y": y - 1}, {"x": x, "y": y / 2}):
        np.savez(tmp_path / "a.npz", **bad)
        with pytest.raises(ValueError, match="a.npz"):
            read_images(tmp_path / "a.npz")


@pytest.mark.parametrize("part", ("", "test", "val", "valid", "validation"))
def test_class_folders_pass_over_what_is_no_class(part, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    with pytest.raises(ValueError, match=f"^{tmp_path}: no folder of CIFAR binaries"):
        read_images(tmp_path)                        # empty so far
    for top in ("train", part) if part else ("",):
        for name in ("blue", "red", ".ipynb_checkpoints", "empty"):
            (tmp_path / top / name).mkdir(parents=True)
            for i in range(6 if name in ("blue", "red") else 0):
                Image.new("RGB", (30 + i, 20), name).save(tmp_path / top / name / f"{i}.PNG")
        (tmp_path / top / ".ipynb_checkpoints" / "a.png").write_bytes(b"no picture")
        (tmp_path / top / "red" / "notes.txt").write_text("no picture")
    train, test, names = read_images(tmp_path)
    assert names == ["blue", "red"]
    assert (len(train[1]), len(test[1])) == ((12, 12) if part else (10, 2))
    assert len(train_vit.take(train, torch.tensor([3]))[0]) == 1
    red = [train_vit.square(f, 8) for f, label in zip(*train) if label == 1]
    assert all((x[0] > 250).all() and (x[2] < 5).all() and x.shape == (3, 8, 8) for x in red)


def test_pictures_of_16_bits_turned_or_transparent_are_read_as_they_look(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 10000, 30000, 65535]], np.uint16)).save(path)
    assert train_vit.read_picture(path)[0, :, 0].tolist() == [0, 39, 117, 255]
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
            print(size, oracle(config, Path(folder)).double().numpy().round(6).tolist())
