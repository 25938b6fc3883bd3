"""Fine-tune a Vision Transformer with StructLoRA, or with LoRA to compare.

    python train_vit.py                                   the embedded demo: no downloads, CPU
    python train_vit.py --data cifar-10-batches-bin --shift invert --shots 50
                                                          pretrain on these images, adapt to a shift
    python train_vit.py --checkpoint ViT-B_16.npz --data cifar-100-binary --rank 4
                                                          the real thing, on one GPU
    ... --method lora                                     the baseline, same data and seed
    ... --out out/vit --resume                            go on after a kill
    ... --eval-only                                       score the checkpoint and OUT/adapter.pt

--checkpoint reads Google's .npz, timm's and DeiT's .pth, a Hugging Face folder (config.json and
pytorch_model.bin), and what --merge writes. --data reads a CIFAR-10 or CIFAR-100 binary folder,
an .npz of x [N,H,W,3] uint8 and y [N] (x_test and y_test if there are any), or a folder of one
folder of images per class (train/ and test/ or val/ above them if there is a split).

Order of this file: model, checkpoints, data, demo, main.
"""

import functools
import json
import math
import tokenize
import zipfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import structlora
from structlora import InputError, Task

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))                        # Google's and timm's ViTs
# From sweeps on the demo (seeds 100 to 103, not those reported); a checkpoint's is untuned.
LEARNING_RATES = {"lora": 1e-2, "lora matched": 7e-3, "structlora": 1e-2, "checkpoint": 2e-3}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))        # DeiT


# ---------------------------------------------------------------------------------------------
# Model


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a ViT, and what its checkpoint leaves to the reader."""
    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    classes: int = 1000
    pre_logits: bool = False         # a tanh layer before the head: ImageNet-21k .npz files only
    eps: float = 1e-6                # of the layer norms
    mean: tuple = HALF[0]            # what the images are normalised with
    std: tuple = HALF[1]


class Attention(nn.Module):
    """Multi-head self-attention, [N, T, D] -> [N, T, D]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        N, T, D = x.shape
        q, k, v = (p(x).view(N, T, self.heads, -1).transpose(1, 2)               # [N, H, T, D/H]
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v)                              # [N, H, T, D/H]
        return self.o_proj(y.transpose(1, 2).reshape(N, T, D))


class Block(nn.Module):
    """Pre-norm transformer block, [N, T, D] -> [N, T, D]."""

    def __init__(self, c: ViTConfig):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c.width, c.eps), nn.LayerNorm(c.width, c.eps)
        self.attn = Attention(c.width, c.heads)
        self.fc1, self.fc2 = nn.Linear(c.width, c.mlp), nn.Linear(c.mlp, c.width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al. 2021): normalised images [N, 3, S, S] -> [N, C]."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        c = self.config = config
        tokens = 1 + (c.image_size // c.patch_size) ** 2
        self.patch_embed = nn.Conv2d(3, c.width, c.patch_size, c.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, c.width))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, c.eps)
        self.pre_logits = nn.Linear(c.width, c.width) if c.pre_logits else None
        self.head = nn.Linear(c.width, c.classes)

    def forward(self, images):
        if images.shape[-2:] != (self.config.image_size,) * 2:
            raise InputError(f"images of {tuple(images.shape[-2:])} for a ViT of image_size="
                             f"{self.config.image_size}; load_vit(..., image_size=) resizes it")
        x = self.patch_embed(images).flatten(2).mT                               # [N, T-1, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)                                                         # [N, T, D]
        x = self.norm(x[:, 0])                                                   # [N, D]
        return self.head(torch.tanh(self.pre_logits(x)) if self.pre_logits else x)

    def initialise(self) -> "ViT":
        """Fresh weights for pretraining, Glorot's scale: 0.02 is too little at small widths."""
        nn.init.normal_(self.pos_embed, std=0.1)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        return self


# ---------------------------------------------------------------------------------------------
# Checkpoints: every reader returns (tensors by our names, ViTConfig); every key is accounted for


def load_vit(path: str | Path, num_classes: int | None = None, image_size: int | None = None,
             num_heads: int | None = None) -> ViT:
    """Reads a ViT checkpoint in fp32.

    num_classes other than the file's: a new head of zeros. image_size other than the file's:
    position embeddings resized (bicubic). num_heads: for .pth files, which do not say (64 wide
    heads, or 80 wide if the sizes are ViT-H's). Raises InputError that names the file and the key.
    """
    path = Path(path)
    if path.name == "pytorch_model.bin" and path.with_name("config.json").exists():
        path = path.parent
    if path.is_dir():
        tensors, config = read_huggingface(path)
    elif path.suffix == ".npz":
        tensors, config = read_google(path)
    else:
        tensors, config = read_timm(path)
    if num_heads:
        config = replace(config, heads=num_heads)
    if config.heads < 1 or config.width % config.heads:
        raise InputError(f"{path}: width {config.width} does not divide into {config.heads} heads; "
                         "give num_heads")
    structlora.check_finite(path, tensors)
    if "head.weight" in tensors and num_classes in (None, len(tensors["head.weight"])):
        config = replace(config, classes=len(tensors["head.weight"]))
    elif num_classes is None:
        raise InputError(f"{path}: has no classification head; give num_classes")
    else:                            # a head of zeros as in Google's fine-tuning, no pre_logits
        tensors = {k: v for k, v in tensors.items() if not k.startswith(("pre_logits", "head"))}
        tensors |= {"head.weight": torch.zeros(num_classes, config.width),
                    "head.bias": torch.zeros(num_classes)}
        config = replace(config, classes=num_classes, pre_logits=False)
    if image_size and image_size != config.image_size:
        config = resize_positions(path, tensors, config, image_size)
    with torch.device("meta"):
        model = ViT(config)
    check_shapes(path, tensors, model.state_dict())
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(True)


def check_shapes(path: Path, tensors: dict, expected: dict) -> None:
    """Raises InputError that names the first missing key, unknown key or wrong shape."""
    for key in expected.keys() - tensors.keys():
        raise InputError(f"{path}: no weights for {key}: incomplete, or of another model")
    for key, tensor in tensors.items():
        if key not in expected:
            raise InputError(f"{path}: {key} is no part of a plain ViT; this kind is not supported")
        if tensor.shape != expected[key].shape:
            raise InputError(f"{path}: {key} is {list(tensor.shape)}, expected "
                             f"{list(expected[key].shape)}")


def resize_positions(path: Path, tensors: dict, config: ViTConfig, size: int) -> ViTConfig:
    """Resizes pos_embed [1, 1 + g g, D] in place to the grid of `size`; the class token's stays."""
    if size % config.patch_size:
        raise InputError(f"image size {size} is no multiple of the patch size {config.patch_size} "
                         f"of {path}")
    old, new = config.image_size // config.patch_size, size // config.patch_size
    token, grid = tensors["pos_embed"][:, :1], tensors["pos_embed"][:, 1:]
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)                     # [1, D, g, g]
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    tensors["pos_embed"] = torch.cat([token, grid.flatten(2).mT], 1)
    return replace(config, image_size=size)


def sizes_of(path: Path, tensors: dict, heads: int | None, **rest) -> ViTConfig:
    """ViTConfig from the shapes of our tensors."""
    try:
        width, _, patch, _ = tensors["patch_embed.weight"].shape
        grid = math.isqrt(tensors["pos_embed"].shape[1] - 1)
        mlp = len(tensors["blocks.0.fc1.weight"])
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise InputError(f"{path}: not a ViT checkpoint that this script knows "
                         f"({structlora.one_line(error)} missing or of another shape)") from None
    if tensors["pos_embed"].shape[1] != 1 + grid * grid:
        raise InputError(f"{path}: pos_embed has {tensors['pos_embed'].shape[1]} positions, not "
                         "one class token and a square grid (distilled DeiT is not supported)")
    depth = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
    if depth > len(tensors):                     # before a model of so many blocks is built
        raise InputError(f"{path}: {len(tensors)} tensors for {depth} blocks")
    heads = heads or (16 if (width, depth) == (1280, 32) else max(1, width // 64))
    return ViTConfig(grid * patch, patch, width, depth, heads, mlp,
                     pre_logits="pre_logits.weight" in tensors, **rest)


def read_state(path: Path, state: Any, prefix: str, table: dict) -> dict:
    """Our name -> fp32 tensor from a PyTorch state dict; absent q, k, v biases become zeros."""
    if not isinstance(state, dict) or not state or not all(map(torch.is_tensor, state.values())):
        raise InputError(f"{path}: not a state dict of tensors")
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            raise InputError(f"{path}: {key} is {tensor.dtype}: a quantised checkpoint; give the "
                             "original one")
    state = {str(key).removeprefix(prefix): value.float() for key, value in state.items()}
    tensors = structlora.rename(path, state, table)
    for key in [key for key in tensors if ".qkv." in key]:       # timm fuses the three
        fused = tensors.pop(key)
        if not fused.dim() or len(fused) % 3:
            raise InputError(f"{path}: {key} is {list(fused.shape)}, which is not q, k and v")
        for name, part in zip("qkv", fused.chunk(3)):
            tensors[key.replace("qkv", f"{name}_proj")] = part
    for key in list(tensors):
        if key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            tensors.setdefault(key.replace("weight", "bias"), torch.zeros(len(tensors[key])))
    return tensors


def with_suffixes(table: dict, theirs: tuple = ("weight", "bias"), sep: str = ".") -> dict:
    """Doubles a table of layer names into one of their weights and biases."""
    return {f"{a}{sep}{end}": f"{b}.{ours}" for a, b in table.items()
            for end, ours in zip(theirs, ("weight", "bias"))}


TIMM = {"cls_token": "cls_token", "pos_embed": "pos_embed", **with_suffixes({
    "patch_embed.proj": "patch_embed", "norm": "norm", "head": "head",
    "pre_logits.fc": "pre_logits",
    "blocks.*.norm1": "blocks.*.norm1", "blocks.*.norm2": "blocks.*.norm2",
    "blocks.*.attn.qkv": "blocks.*.attn.qkv", "blocks.*.attn.proj": "blocks.*.attn.o_proj",
    "blocks.*.mlp.fc1": "blocks.*.fc1", "blocks.*.mlp.fc2": "blocks.*.fc2"})}


def read_timm(path: Path) -> tuple[dict, ViTConfig]:
    """A timm or DeiT .pth (fused qkv), also under "model" or "state_dict", or one of save_vit.

    Such files name neither head count nor normalisation: ImageNet's where the tensors stand under
    "model" as in DeiT's own files, else 0.5; save_vit's files say it under "vit"."""
    file = structlora.read_torch(path)
    nested = next((key for key in ("model", "state_dict") if isinstance(file, dict)
                   and isinstance(file.get(key), dict)), None)
    tensors = read_state(path, file[nested] if nested else file, "module.", TIMM)
    mean, std = IMAGENET if nested == "model" else HALF
    config = sizes_of(path, tensors, None, mean=mean, std=std)
    try:
        return tensors, replace(config, **file["vit"]) if nested and "vit" in file else config
    except TypeError as error:
        raise InputError(f"{path}: its entry 'vit' is damaged: {error}") from None


def save_vit(model: ViT, path: str | Path, **more) -> None:
    """Writes `model` as a timm-style .pth, with what timm's files leave out under "vit"."""
    state = {}
    for key, tensor in model.state_dict().items():
        if ".k_proj." in key or ".v_proj." in key:
            continue
        if ".q_proj." in key:
            parts = [model.get_parameter(key.replace("q_proj", f"{n}_proj")) for n in "qkv"]
            key, tensor = key.replace("q_proj", "qkv"), torch.cat([p.detach() for p in parts])
        state[key] = tensor.cpu()
    state = structlora.rename(path, state, {ours: theirs for theirs, ours in TIMM.items()})
    said = {key: asdict(model.config)[key] for key in ("heads", "eps", "mean", "std")}
    structlora.write_atomically(
        path, lambda temporary: torch.save({"model": state, "vit": said, **more}, temporary))


HUGGINGFACE = {"embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed",
               **with_suffixes({
    "embeddings.patch_embeddings.projection": "patch_embed", "layernorm": "norm",
    "classifier": "head", "pooler.dense": "pooler",
    "encoder.layer.*.layernorm_before": "blocks.*.norm1",
    "encoder.layer.*.layernorm_after": "blocks.*.norm2",
    "encoder.layer.*.attention.attention.query": "blocks.*.attn.q_proj",
    "encoder.layer.*.attention.attention.key": "blocks.*.attn.k_proj",
    "encoder.layer.*.attention.attention.value": "blocks.*.attn.v_proj",
    "encoder.layer.*.attention.output.dense": "blocks.*.attn.o_proj",
    "encoder.layer.*.intermediate.dense": "blocks.*.fc1",
    "encoder.layer.*.output.dense": "blocks.*.fc2",
    # transformers 5 names its modules so; its files keep the names above
    "layers.*.layernorm_before": "blocks.*.norm1", "layers.*.layernorm_after": "blocks.*.norm2",
    "layers.*.attention.q_proj": "blocks.*.attn.q_proj",
    "layers.*.attention.k_proj": "blocks.*.attn.k_proj",
    "layers.*.attention.v_proj": "blocks.*.attn.v_proj",
    "layers.*.attention.o_proj": "blocks.*.attn.o_proj",
    "layers.*.mlp.fc1": "blocks.*.fc1", "layers.*.mlp.fc2": "blocks.*.fc2"})}


def read_huggingface(folder: Path) -> tuple[dict, ViTConfig]:
    """A folder with config.json and pytorch_model.bin of ViTForImageClassification or ViTModel."""
    path = folder / "pytorch_model.bin"
    if not path.exists():
        structlora.refuse_safetensors(folder)
    settings, state = structlora.read_json(folder / "config.json"), structlora.read_torch(path)
    if settings.get("model_type", "vit") != "vit" or settings.get("hidden_act", "gelu") != "gelu":
        raise InputError(f"{folder / 'config.json'}: model_type {settings.get('model_type')!r} "
                         f"with {settings.get('hidden_act')!r} is not a plain ViT")
    tensors = read_state(path, state, "vit.", HUGGINGFACE)
    tensors = {k: v for k, v in tensors.items() if not k.startswith("pooler")}   # no classifier
    processor = folder / "preprocessor_config.json"
    said = structlora.read_json(processor) if processor.exists() else {}
    try:
        mean, std = (tuple(map(float, said.get(key, default)))
                     for key, default in zip(("image_mean", "image_std"), HALF, strict=True))
        heads, eps = (int(settings.get("num_attention_heads", 12)),
                      float(settings.get("layer_norm_eps", 1e-12)))
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder}: a value in its .json files is damaged: {error}") from None
    return tensors, sizes_of(path, tensors, heads, mean=mean, std=std, eps=eps)


GOOGLE = {"cls": "cls_token", "Transformer/posembed_input/pos_embedding": "pos_embed",
          **with_suffixes({
    "embedding": "patch_embed", "head": "head", "pre_logits": "pre_logits",
    "Transformer/encoderblock_*/MultiHeadDotProductAttention_1/query": "blocks.*.attn.q_proj",
    "Transformer/encoderblock_*/MultiHeadDotProductAttention_1/key": "blocks.*.attn.k_proj",
    "Transformer/encoderblock_*/MultiHeadDotProductAttention_1/value": "blocks.*.attn.v_proj",
    "Transformer/encoderblock_*/MultiHeadDotProductAttention_1/out": "blocks.*.attn.o_proj",
    "Transformer/encoderblock_*/MlpBlock_3/Dense_0": "blocks.*.fc1",
    "Transformer/encoderblock_*/MlpBlock_3/Dense_1": "blocks.*.fc2"}, ("kernel", "bias"), "/"),
          **with_suffixes({
    "Transformer/encoder_norm": "norm",
    "Transformer/encoderblock_*/LayerNorm_0": "blocks.*.norm1",
    "Transformer/encoderblock_*/LayerNorm_2": "blocks.*.norm2"}, ("scale", "bias"), "/")}


def read_npz(path: Path) -> dict:
    """Name -> array of an .npz, never unpickled; InputError if it cannot be read whole."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError,
            zipfile.zlib.error, SyntaxError, tokenize.TokenError, TypeError, AttributeError,
            MemoryError) as error:
        raise InputError(f"{path}: truncated, or not an .npz of plain arrays "
                         f"({type(error).__name__}); fetch it again") from None


def read_google(path: Path) -> tuple[dict, ViTConfig]:
    """Google's Flax .npz: kernels are [in, out], attention kernels keep the heads apart."""
    arrays = {key.removeprefix("opt/target/"): a for key, a in read_npz(path).items()}
    heads, tensors = None, {}
    for key, tensor in structlora.rename(path, arrays, GOOGLE).items():
        if tensor.dtype.kind != "f":
            raise InputError(f"{path}: {key} is of type {tensor.dtype}, not a floating-point array")
        tensor = torch.from_numpy(tensor).float()
        if key.endswith("_proj.weight") and tensor.dim() == 3:
            if "o_proj" in key:                                  # [H, D/H, D] -> [D, D]
                tensor = tensor.flatten(0, 1).T
            else:                                                # [D, H, D/H] -> [D, D]
                heads, tensor = tensor.shape[1], tensor.flatten(1).T
        elif key.endswith("_proj.bias"):
            tensor = tensor.flatten()
        elif key == "patch_embed.weight" and tensor.dim() == 4:
            tensor = tensor.permute(3, 2, 0, 1)                  # [P, P, 3, D] -> [D, 3, P, P]
        elif key.endswith("weight") and tensor.dim() == 2:
            tensor = tensor.T
        tensors[key] = tensor.contiguous()
    return tensors, sizes_of(path, tensors, heads)


# ---------------------------------------------------------------------------------------------
# Data


@dataclass
class Images:
    """Labelled pictures: uint8 pixels [N, 3, H, W], or the files to decode them from."""
    pixels: torch.Tensor | list
    labels: torch.Tensor             # [N] int64

    def __len__(self):
        return len(self.labels)

    def select(self, indices: torch.Tensor) -> "Images":
        """The examples of these indices."""
        pixels = self.pixels
        pixels = [pixels[i] for i in indices] if isinstance(pixels, list) else pixels[indices]
        return Images(pixels, self.labels[indices])

    def decoded(self, size: int) -> "Images":
        """Reads image files through Pillow: shorter side to `size`, centre crop."""
        if not isinstance(self.pixels, list):
            return self
        from PIL import Image, ImageOps
        arrays = []
        for path in self.pixels:
            try:
                with Image.open(path) as image:
                    image = ImageOps.fit(image.convert("RGB"), (size, size),
                                         Image.Resampling.BICUBIC)
                    arrays.append(np.asarray(image).transpose(2, 0, 1))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise InputError(f"{path}: not a readable image "
                                 f"({structlora.one_line(error)})") from None
        return Images(torch.from_numpy(np.stack(arrays)), self.labels)


def read_images(path: str | Path) -> tuple[Images, Images, int]:
    """(train, test, number of classes) of a CIFAR folder, an .npz or a folder of class folders."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_file():
        train, test = read_arrays(path)
    elif list(path.glob("data_batch_*.bin")) or (path / "train.bin").exists():
        train, test = read_cifar(path)
    else:
        train, test = read_folders(path)
    if test is None:                 # every fifth example of each class is held out
        order = torch.argsort(train.labels, stable=True)
        held = torch.zeros(len(train), dtype=torch.bool)
        held[order[4::5]] = True
        train, test = train.select((~held).nonzero()[:, 0]), train.select(held.nonzero()[:, 0])
    if not len(train) or not len(test):
        raise InputError(f"{path}: {len(train)} training and {len(test)} test images are too few")
    classes = 1 + int(max(train.labels.max(), test.labels.max()))
    return train, test, classes


def read_cifar(folder: Path) -> tuple[Images, Images]:
    """CIFAR-10 (data_batch_*.bin, test_batch.bin) or CIFAR-100 (train.bin, test.bin) binaries: rows
    of 1 or 2 label bytes (the last one counts) and 3,072 bytes, channel first."""
    hundred = (folder / "train.bin").exists()
    label_bytes, classes = (2, 100) if hundred else (1, 10)

    def read(files: list[Path]) -> Images:
        rows = []
        for file in files:
            if not file.is_file():
                raise InputError(f"{file}: no such file")
            data = np.fromfile(file, dtype=np.uint8)
            if not len(data) or len(data) % (label_bytes + 3072):
                raise InputError(f"{file}: {len(data)} bytes are not rows of {label_bytes + 3072}: "
                                 "truncated, or not a CIFAR binary file")
            rows.append(data.reshape(-1, label_bytes + 3072))
            if (worst := rows[-1][:, label_bytes - 1].max()) >= classes:
                raise InputError(f"{file}: label {worst} is out of range for {classes} classes")
        rows = torch.from_numpy(np.concatenate(rows))
        return Images(rows[:, label_bytes:].reshape(-1, 3, 32, 32), rows[:, label_bytes - 1].long())

    if hundred:
        return read([folder / "train.bin"]), read([folder / "test.bin"])
    return read(sorted(folder.glob("data_batch_*.bin"))), read([folder / "test_batch.bin"])


def read_arrays(path: Path) -> tuple[Images, Images | None]:
    """An .npz of x [N, H, W, 3] uint8 and y [N] whole numbers, x_test and y_test if there."""
    arrays = read_npz(path)

    def pick(x_name: str, y_name: str) -> Images:
        for name in (x_name, y_name):
            if name not in arrays:
                there = ", ".join(arrays) or "none"
                raise InputError(f"{path}: has no array {name}; it has {there}")
        x, y = arrays[x_name], arrays[y_name]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or not x.size:
            raise InputError(f"{path}: {x_name} is {x.dtype} {list(x.shape)}, expected uint8 "
                             "[N, H, W, 3]")
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1] or y.min() < 0 or y.max() > 10**6:
            raise InputError(f"{path}: {y_name} is {y.dtype} {list(y.shape)}, expected {len(x)} "
                             "class numbers from 0")
        return Images(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(),
                      torch.from_numpy(y.astype(np.int64)))

    return pick("x", "y"), pick("x_test", "y_test") if "x_test" in arrays else None


def read_folders(path: Path) -> tuple[Images, Images | None]:
    """CLASS/*.jpg, or train/CLASS/*.jpg and test/ or val/ of the same classes; needs Pillow."""
    root = path / "train" if (path / "train").is_dir() else path
    names = sorted(d.name for d in root.iterdir() if d.is_dir())
    if not names:
        raise InputError(f"{path}: holds neither CIFAR binaries nor one folder of images per class")
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise InputError(f"{path}: reading image files needs Pillow: pip install pillow") from None

    def read(folder: Path) -> Images:
        files = [(file, label) for label, name in enumerate(names)
                 for file in sorted((folder / name).glob("*")) if file.is_file()]
        if not files:
            raise InputError(f"{folder}: no images in the folders of its classes")
        return Images([file for file, _ in files], torch.tensor([label for _, label in files]))

    test = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    return read(root), read(test) if root != path and test else None


SHIFTS = {"none": lambda x: x, "invert": lambda x: 255 - x,          # of uint8 [N, 3, H, W]
          "rotate": lambda x: torch.rot90(x, 1, (2, 3))}


def augment(x: torch.Tensor) -> torch.Tensor:
    """Random horizontal flip, and a random crop after padding by an eighth; x [N, 3, H, W]."""
    N, _, H, W = x.shape
    flip = torch.rand(N, device=x.device) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    pad = H // 8
    padded = F.pad(x, (pad,) * 4, mode="replicate")
    top, left = torch.randint(0, 2 * pad + 1, (2, N, 1), device=x.device)
    rows = (top + torch.arange(H, device=x.device))[:, None, :, None]            # [N, 1, H, 1]
    columns = (left + torch.arange(W, device=x.device))[:, None, None, :]        # [N, 1, 1, W]
    return padded[torch.arange(N, device=x.device)[:, None, None, None],
                  torch.arange(3, device=x.device)[:, None, None], rows, columns]


def prepare(x: torch.Tensor, config: ViTConfig, train: bool = False) -> torch.Tensor:
    """uint8 [N, 3, H, W] -> normalised images [N, 3, S, S], on the device where x is."""
    x = x.float() / 255
    x = augment(x) if train else x
    size = (config.image_size,) * 2
    if x.shape[-2:] != size:
        x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (config.mean, config.std))
    return (x - mean) / std


def make_task(train: Images, test: Images, config: ViTConfig, args, batch_size: int,
              share: slice = slice(None)) -> Task:
    """Cross entropy on augmented batches, or on this rank's share of each; accuracy and loss on the
    whole test set."""
    if not len(test):
        raise InputError(f"--data {args.data}: no test image is left to score")
    train_x, train_y, test_x = (
        t.to(args.device) for t in (train.pixels, train.labels, test.pixels))

    def batch(number):
        i = structlora.batch_indices(len(train_y), batch_size, number, args.seed)[share]
        i = i.to(args.device)
        return prepare(train_x[i], config, train=True), train_y[i]

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]).float(), batch[1])

    def evaluate(model):
        logits = torch.cat(structlora.divided(
            lambda x: model(prepare(x, config)).float().cpu(), test_x.split(256)))
        return {"accuracy": (logits.argmax(1) == test.labels).float().mean().item(),
                "loss": F.cross_entropy(logits, test.labels).item()}

    return Task(batch, loss, evaluate, num_examples=len(train_y))


# ---------------------------------------------------------------------------------------------
# Demo: pictures that the script draws itself


def draw(count: int, seed: int, shifted: bool) -> Images:
    """`count` pictures [3, 24, 24] of ten bright shapes (disk, ring, square, triangle, plus, star,
    crescent, bar, two dots, hourglass) on a dark ground with clutter; colour, position, size and
    rotation vary. shifted: colours inverted, a grating laid over, noise added."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 10, count)
    uniform = lambda low, high, *more: np.float32(rng.uniform(low, high, (count, *more, 1, 1)))
    axis = np.linspace(-1, 1, 24, dtype=np.float32)
    X, Y = axis[None, None, :], axis[None, :, None]
    x, y = X - uniform(-.25, .25), Y - uniform(-.25, .25)
    size, angle = uniform(.5, .75), uniform(-.5, .5)
    u = (np.cos(angle) * x + np.sin(angle) * y) / size           # [N, 24, 24], the shape's own axes
    v = (np.cos(angle) * y - np.sin(angle) * x) / size
    r, a, b = np.hypot(u, v), np.abs(u), np.abs(v)
    inside = np.choose(label[:, None, None], [                   # > 0 inside the shape
        .9 - r, .25 - np.abs(r - .75), .75 - np.maximum(a, b),
        np.minimum(v + .5, .5 - v / 2 - .9 * a),
        np.maximum(np.minimum(.9 - a, .3 - b), np.minimum(.3 - a, .9 - b)),
        .6 + .3 * np.cos(5 * np.arctan2(v, u)) - r, np.minimum(.9 - r, np.hypot(u - .45, v) - .65),
        np.minimum(1 - a, .25 - b), .42 - np.minimum(np.hypot(u - .6, v), np.hypot(u + .6, v)),
        np.minimum(.8 - np.maximum(a, b), b - a)])
    mask = (1 / (1 + np.exp(-np.clip(16 * size * inside, -30, 30))))[:, None]    # soft edges
    ground, colour = uniform(.0, .35, 3), uniform(.55, 1., 3)
    clutter = sum(uniform(.0, .4, 3) * (np.hypot(X - uniform(-1, 1), Y - uniform(-1, 1))
                                        < uniform(.05, .2))[:, None] for _ in range(4))
    image = mask * colour + (1 - mask) * (ground + clutter)                      # [N, 3, 24, 24]
    if shifted:
        wave = np.sin(uniform(4, 16) * (X * np.cos(angle) + Y * np.sin(angle)) + uniform(0, 6.3))
        image = 1 - image + .1 * wave[:, None] + .05 * rng.standard_normal(image.shape, np.float32)
    pixels = np.clip(255 * image, 0, 255).astype(np.uint8)
    return Images(torch.from_numpy(pixels), torch.from_numpy(label))


def small_vit(size: int, classes: int, width: int = 64) -> ViT:
    """A ViT that two CPU cores can pretrain: 6 layers, heads of 16, patches of 4 x 4."""
    config = ViTConfig(image_size=size, patch_size=4, width=width, depth=6, heads=width // 16,
                       mlp=4 * width, classes=classes)
    return ViT(config).initialise()


def pretrained(train: Images, test: Images, args, width: int = 64) -> Path:
    """Path of a small ViT pretrained on `train`; kept under --out, and made anew when the options
    that it depends on have changed."""
    path = Path(args.out) / "backbone.pth"
    recipe = json.dumps([args.data, args.source_classes, args.pretrain_steps, args.seed, width])
    if structlora.has_backbone(path, structlora.read_torch, recipe, args):
        return path
    torch.manual_seed(args.seed)
    size = args.image_size or (32 if args.data else 24)
    model = small_vit(size, 1 + int(train.labels.max()), width).to(args.device)
    task = make_task(train.decoded(size), test.decoded(size), model.config, args, batch_size=64)
    structlora.pretrain(model, task, args, args.pretrain_steps, lr=2e-3)
    structlora.on_rank_zero(save_vit, model, path, recipe=recipe)
    return path


# ---------------------------------------------------------------------------------------------
# Main


def split_classes(train: Images, test: Images, classes: int, text: str) -> tuple:
    """((train, test) of the classes listed in `text`, (train, test) of the others, how many others
    there are); labels are counted from 0 in each."""
    listed = sorted({int(part) for part in text.split(",") if part.strip().isdigit()})
    if not listed or listed[-1] >= classes or len(listed) >= classes:
        raise InputError(f"--source-classes {text}: list some, not all, of the classes 0 to "
                         f"{classes - 1}, with commas")
    mine = torch.zeros(classes, dtype=torch.bool)
    mine[listed] = True
    number = torch.where(mine, mine.cumsum(0), (~mine).cumsum(0)) - 1            # new label of each

    def part(data: Images, wanted: torch.Tensor) -> Images:
        data = data.select(wanted[data.labels].nonzero()[:, 0])
        return Images(data.pixels, number[data.labels])

    source, target = ([part(data, wanted) for data in (train, test)] for wanted in (mine, ~mine))
    return source, target, classes - len(listed)


def parse_options() -> Any:
    """The shared options and those of this script, checked."""
    p = structlora.make_parser(__doc__, rank=2, out="out/vit", batch_size=32, steps=300)
    p.add_argument("--shift", choices=list(SHIFTS), help="what is done to --data's images before "
                   "adapting (default: invert if a backbone is pretrained on them, else none)")
    p.add_argument("--source-classes", help="pretrain on these classes of --data (0,1,2), adapt to "
                   "the others")
    p.add_argument("--pretrain-steps", type=structlora.positive(int), default=500)
    p.add_argument("--image-size", type=structlora.positive(int), help="default: the checkpoint's")
    p.add_argument("--num-heads", type=structlora.positive(int), help="for .pth files")
    p.add_argument("--tune-head", action="store_true", help="train the classifier too; always done "
                   "when it is new")
    args = p.parse_args()
    structlora.check_options(args)
    if args.checkpoint and args.source_classes:
        raise InputError("--source-classes says what to pretrain on: not with --checkpoint")
    if (args.shift or args.source_classes) and not args.data:
        raise InputError("--shift and --source-classes need --data: the demo has its own shift")
    return args


def main() -> None:
    """Data, backbone, then the methods on the same examples; prints the table."""
    args = parse_options()
    if args.data:
        train, test, classes = read_images(args.data)
        adapted = args.checkpoint or args.source_classes         # the task is new without a shift
        shift = SHIFTS[args.shift or ("none" if adapted else "invert")]
        source = (train, test)
    else:
        seed, classes, shift = 10 * args.seed, 10, SHIFTS["none"]
        source = draw(8000, seed, shifted=False), draw(1000, seed + 1, shifted=False)
        train, test = draw(8000, seed + 2, shifted=True), draw(1000, seed + 3, shifted=True)
    if args.source_classes:
        source, (train, test), classes = split_classes(train, test, classes, args.source_classes)
    shots = args.shots or (None if args.data or args.fraction else 50)           # the demo's few
    train = train.select(structlora.choose(train.labels, shots, args.fraction, args.seed))
    load = functools.partial(load_vit, args.checkpoint, classes, args.image_size, args.num_heads)
    if args.checkpoint:
        load()                       # a bad file must be found before anything is written
    structlora.open_run(args.out, args)
    if not args.checkpoint:
        load = functools.partial(load_vit, pretrained(*source, args), classes)
    model = load()
    train, test = (data.decoded(model.config.image_size) for data in (train, test))
    train, test = (Images(shift(data.pixels), data.labels) for data in (train, test))
    task = make_task(train, test, model.config, args, *structlora.global_batch(args))
    head_too = ("head",) if args.tune_head or not model.head.weight.any() else ()
    structlora.compare(args, load, task, save_vit, LEARNING_RATES, head_too)


if __name__ == "__main__":
    raise SystemExit(structlora.run(main))
