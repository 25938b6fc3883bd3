"""Fine-tune a Vision Transformer with StructLoRA, or with LoRA to compare.

    python train_vit.py                               the embedded demo: no downloads, CPU
    python train_vit.py --checkpoint ViT-B_16.npz --data cifar-100-binary --rank 4      one GPU
    ... --method lora      ... --resume      ... --eval-only      ... --merge

--checkpoint: Google's .npz; a .pth of timm, DeiT, DINO or torchvision; a folder of Hugging Face or
timm; what --merge writes. --data: a folder of CIFAR binaries; an .npz of x [N, H, W, 3] uint8 and
y [N], perhaps x_test and y_test; a folder of pictures per class, perhaps under train/ and test/.

Order of this file: model, loop and main, checkpoints, data, demo, what the three scripts share.
"""

import argparse
import copy
import glob
import hashlib
import json
import math
import os
import pickle
import re
import signal
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import structlora
from structlora import Config, StructLoRA, attach, load_torch, reading, write

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}         # Google's ViTs, and most of timm's
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}     # DeiT, torchvision
NORMALISE = {"half": HALF, "imagenet": IMAGENET}
WIDE = (1152, 1280, 1408, 1664)      # widths of the ViTs that have 16 heads, wider than 64
PICTURES = set(".jpg .jpeg .jfif .png .ppm .pgm .bmp .gif .webp .tif .tiff".split())
# Folders beside train or training, in any case; the first of them that has classes is taken.
TEST = ("test", "testing", "val", "valid", "validation", "eval", "evaluation", "dev")
# Tuned on the demo with seeds 100 to 103, not those reported; a checkpoint's is untuned.
LEARNING_RATES = {"lora": 1e-2, "lora4r": 7e-3, "structlora": 1e-2, "all": 1e-2, "checkpoint": 2e-3}


# --- Model

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
    eps: float = 1e-6                # of the layer norms
    mean: tuple = HALF["mean"]       # what the images are normalised with
    std: tuple = HALF["std"]
    names: tuple = ()                # of the classes, where they are known


class Attention(nn.Module):
    """Multi-head self-attention, [N, T, D] -> [N, T, D]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads")
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        N, T, D = x.shape
        q, k, v = (proj(x).view(N, T, self.heads, -1).transpose(1, 2)            # [N, H, T, D/H]
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
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
        self.head = nn.Linear(c.width, c.classes)

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).mT                               # [N, T-1, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)                                                         # [N, T, D]
        return self.head(self.norm(x[:, 0]))                                     # [N, C]


# --- Fine-tuning

def fine_tune(args, config: Config, lr: float, model: ViT, train: tuple, test: tuple, name: str,
              out: Path) -> dict[str, str | float]:
    """One run: attach, train, export, score -> its row of the table. Writes under `out`. `model` is
    the frozen one again in the end, or with --merge the merged one."""
    torch.manual_seed(args.seed)
    adapters = attach(model, config)
    if not model.head.weight.any():                              # a new head is trained too
        model.head.float().requires_grad_(True)
    optimizer = torch.optim.AdamW(adapters.param_groups(lr), fused=True)
    digest = fingerprint(*train, *test)
    lines = resume_run(out, adapters, optimizer, args, digest)   # of metrics.jsonl
    schedule = LambdaLR(optimizer, lambda n: warmup_cosine(n, args.steps), len(lines) - 1)
    (rank, world), parallel = processes(), model
    if world > 1:                                                # torchrun; the probes end
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True,
                                                       broadcast_buffers=False)
    images, labels = (tensor.to(args.device) for tensor in train)
    model.train()
    for step in tqdm(range(len(lines), args.steps), name, disable=None, leave=False):
        began, total = time.perf_counter(), 0.0
        torch.manual_seed((args.seed * args.steps + step) * world + rank)    # --resume needs it
        for number in range(step * args.accumulate, (step + 1) * args.accumulate):
            batch = batch_indices(len(labels), args.batch_size * world, number, args.seed)
            batch = batch[rank::world].to(args.device)
            x = prepare(images[batch], model.config, augment=True)
            with autocast(args):
                loss = F.cross_entropy(parallel(x).float(), labels[batch])
            ((loss + adapters.penalty(len(labels))) / args.accumulate).backward()        # Eq. 4
            total += loss.item() / args.accumulate
        adapters.observe_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        adapters.prune((step + 1) / args.steps)
        lines.append({"step": step + 1, "loss": total, "lr": lr * warmup_cosine(step, args.steps),
                      "ms": 1e3 * (time.perf_counter() - began)})
        save_run(out, adapters, optimizer, lines, args, digest)
    told = costs(adapters, lines)
    if rank == 0:                                                # before anything else can fail
        adapters.export_peft(out / "adapter_peft", base=args.checkpoint)
    merged = adapters.merge() if args.merge else None
    if merged and rank == 0:
        save_vit(merged, out / "merged.pt")
    row = {"method": name} | evaluate(model, test, args) | told
    adapters.detach()
    return row


@torch.no_grad()
def evaluate(model: ViT, test: tuple, args) -> dict[str, float]:
    """Accuracy and cross entropy on the whole test set."""
    logits = []
    for images in test[0].split(256):
        with autocast(args):
            logits.append(model.eval()(prepare(images.to(args.device), model.config)).float().cpu())
    logits, labels = torch.cat(logits), test[1]
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    return {"accuracy": accuracy, "loss": F.cross_entropy(logits, labels).item()}


def main() -> None:
    """Data, backbone, then one method, or all of the demo's, on the same examples."""
    args = options(__doc__, steps=(300, "optimizer steps"), batch_size=(32, "images in a step"),
                   out=("out/vit", "folder for all results"),
                   image_size=(int, "of the model, its positions resized (the checkpoint's)"),
                   num_heads=(int, "attention heads of a .pth (64 wide)"),
                   normalise=(tuple(NORMALISE), "pictures so (as the checkpoint says)"))
    path, shots, runs = args.checkpoint, args.shots, trials(args, LEARNING_RATES)
    if path:
        train, test, args.classes = read_images(args.data)       # whose names adapter.pt holds
        print(f"{len(args.classes)} classes: {', '.join(args.classes)[:99]}")
        model = load_vit(path, None, args.image_size, args.num_heads, args.classes, args.normalise)
    else:
        train, test = draw(8000, 10 * args.seed + 2, True), draw(1000, 10 * args.seed + 3, True)
        model, shots = small_vit(), shots or (None if args.fraction else 50)
    train = take(train, choose(train[1], shots, args.fraction, args.seed))
    check_runs(model, runs, len(train[1]))
    train, test = (decoded(data, model.config.image_size) for data in (train, test))
    model = model if path else pretrained(args)
    model.to(args.device, getattr(torch, args.dtype))
    name = adapters_beside(model, args)
    if args.eval_only and not model.head.weight.any():
        raise ValueError(f"--eval-only: {args.data} has other classes than {path}")
    table = [{"method": name} | evaluate(model, test, args)]
    for name, out, config, lr in runs:
        own = copy.deepcopy(model) if args.merge and not path else model         # will be merged
        table.append(fine_tune(args, config, lr, own, train, test, name, out))
    print_table(table)


# --- Checkpoint readers: for each layout, what its names become in ours, in this order

TIMM = {"patch_embed.proj.": "patch_embed.", ".attn.proj.": ".attn.o_proj.", ".mlp.fc": ".fc"}
TORCHVISION = {
    "conv_proj": "patch_embed", "class_token": "cls_token", "encoder.pos_embedding": "pos_embed",
    "encoder.layers.encoder_layer_": "blocks.", "encoder.ln": "norm", "ln_": "norm",
    "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj": "attn.o_proj",
    "mlp.linear_": "fc", "mlp.0": "fc1", "mlp.3": "fc2", "heads.": ""}
HUGGINGFACE = {
    "vit.": "", "encoder.layer.": "blocks.", "layernorm_before": "norm1",
    "layernorm_after": "norm2", "layernorm.": "norm.", "attention.attention": "attn",
    "query": "q_proj", "key": "k_proj", "value": "v_proj", "attention.output.dense": "attn.o_proj",
    "intermediate.dense": "fc1", "output.dense": "fc2", "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed", "classifier.": "head.",
    "embeddings.patch_embeddings.projection": "patch_embed",
    "layers.": "blocks.", ".attention.": ".attn.", "mlp.": ""}   # transformers 5, in memory
GOOGLE = {
    "opt/target/": "", "Transformer/": "", "encoder_norm": "norm", "encoderblock_": "blocks.",
    "cls": "cls_token", "posembed_input/pos_embedding": "pos_embed", "embedding/": "patch_embed/",
    "LayerNorm_0": "norm1", "LayerNorm_2": "norm2", "MultiHeadDotProductAttention_1": "attn",
    "query": "q_proj", "key": "k_proj", "value": "v_proj", "out/": "o_proj/",
    "MlpBlock_3/Dense_0": "fc1", "MlpBlock_3/Dense_1": "fc2",
    "kernel": "weight", "scale": "weight", "/": "."}
SETTINGS = {"model_type": "vit", "hidden_act": "gelu", "num_channels": 3, "qkv_bias": True,
            "problem_type": "single_label_classification", "global_pool": "token"} | dict.fromkeys(
    """num_attention_heads layer_norm_eps id2label hidden_size num_hidden_layers intermediate_size
    image_size patch_size architecture pretrained_cfg num_classes label_names""".split())
PROCESSOR = {"do_rescale": True, "rescale_factor": 1 / 255} | dict.fromkeys("""do_normalize
    image_mean image_std do_resize size do_center_crop crop_size""".split())
IGNORED = tuple("""architectures transformers_version dtype torch_dtype label2id _name_or_path
    attention_probs_dropout_prob hidden_dropout_prob initializer_range encoder_stride pooler_act
    pooler_output_size return_dict resample image_processor_type feature_extractor_type
    processor_class do_convert_rgb _valid_processor_keys num_features label_descriptions""".split())
READ = ("; read are Google's .npz, a .pth of timm, DeiT, DINO's backbone, torchvision or save_vit "
        "(at its top or under model or state_dict), a folder of Hugging Face or timm")


def load_vit(path: str | Path, num_classes: int | None = None, image_size: int | None = None,
             num_heads: int | None = None, names: list[str] | None = None,
             normalise: str | None = None) -> ViT:
    """Reads a ViT checkpoint in fp32; READ says of which layouts. Prints what cannot be guessed.

    num_classes other than the file's: a new head of zeros. names: those of the classes, see
    fit_head. image_size other than the file's: position embeddings resized (bicubic). num_heads:
    for .pth files, which do not say (64 wide heads, or 16 if the width is one of WIDE). normalise:
    a key of NORMALISE, whatever the file says. Raises ValueError that names file and key."""
    path, asked = Path(path), NORMALISE[normalise] if normalise else {}
    with reading(path):
        read = read_folder if path.is_dir() else read_google if path.suffix == ".npz" else read_pth
        t, known = read(path)                        # tensors, and what the file says of ViTConfig
        check_tensors(t)
        (width, _, patch, _), positions = t["patch_embed.weight"].shape, t["pos_embed"]
        side = math.isqrt(positions.shape[1] - 1)
        size, depth = image_size or side * patch, sum("norm1.weight" in name for name in t)
        if size % patch:
            raise ValueError(f"image size {size} is no multiple of the patch, {patch}")
        if size != side * patch:                     # the class token's, the first, stays
            grid = positions[:, 1:].mT.unflatten(2, (side, -1))                  # [1, D, S/P, S/P]
            grid = F.interpolate(grid, (size // patch,) * 2, mode="bicubic", align_corners=False)
            t["pos_embed"] = torch.cat([positions[:, :1], grid.flatten(2).mT], 1)
        guess = known.pop("guess", False) and not asked
        usual = 16 if width in WIDE else max(1, width // 64)
        known |= {"heads": num_heads or known.get("heads", usual), **asked}
        known["names"] = fit_head(t, known.get("names", ()), names, num_classes, path)
        with torch.device("meta"):
            model = ViT(ViTConfig(size, patch, width, depth, mlp=len(t["blocks.0.fc1.weight"]),
                                  classes=len(t["head.weight"]), **known))
        model.load_state_dict(t, assign=True)
        c = model.config
        if not len(c.mean) == len(c.std) == 3 or not min(c.std) > 0:
            raise ValueError(f"mean {c.mean} and deviation {c.std} are not of three colours")
    print(f"{path}: {depth} blocks, {c.heads} heads, squares of {size} x {size}, normalised with "
          f"mean {c.mean} and deviation {c.std}{' (a guess: --normalise)' * guess}")
    return model


def check_tensors(t: dict[str, torch.Tensor]) -> None:
    """Raises ValueError for a tensor that has no place in a ViT (a distilled token, registers,
    layer scale, another prefix), for one that is lacking, and for NaN. A head may be lacking or
    have pre_logits."""
    with torch.device("meta"):
        depth = sum("norm1.weight" in name for name in t)
        mine = ViT(ViTConfig(1, 1, 1, depth, 1, 1, 1)).state_dict()
    for name in t | mine:
        if (name not in mine or name not in t) and not name.startswith(("head.", "pre_logits")):
            what = "missing" if name in mine else "no part of a plain ViT with a class token"
            raise ValueError(f"{name} is {what}{READ}")
    structlora.check_finite(t)


def fit_head(t: dict[str, torch.Tensor], had: tuple, names: list[str] | None, count: int | None,
             path: Path) -> tuple:
    """Gives `t` a head for the classes `names`, or for `count` of them, says how, and returns their
    names. The rows follow the file's own names `had`. If either side only numbers its classes, a
    head of as many is kept. Classes that the file does not have get a new one of zeros."""
    rows = len(t.get("head.weight", ()))
    numbers = [str(n) for n in range(rows)]
    if list(had) in (numbers, [f"LABEL_{n}" for n in numbers]):
        had = ()
    if names is None and count in (None, rows):
        return had
    names, of_row = tuple(names or ()), had
    how = "the rows of its head follow the names of the classes"
    if set(names) == set(numbers) or len(names) == rows and not had:
        of_row = numbers if set(names) == set(numbers) else names        # folders 0, 1, 10, 2 ...
        who = "the data only number their" if had else "the file does not name its"
        how = f"its head is kept as it is, since {who} classes"
    if names and set(names) <= set(of_row) and len(set(of_row)) == rows:
        order = [of_row.index(name) for name in names]
        t |= {key: t[key][order] for key in ("head.weight", "head.bias")}
    else:
        count = len(names) or count
        how = f"a new head for {count} classes" + f", not for {', '.join(had[:5])}" * bool(had)
        for key in [key for key in t if key.startswith("pre_logits")]:
            del t[key]
        t |= {"head.weight": torch.zeros(count, len(t["norm.bias"])),
              "head.bias": torch.zeros(count)}
    print(f"{path}: {how}")
    return names


def renamed(tensors: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    """fp32 tensors by our names, a fused qkv in three."""
    result = {}
    for key, tensor in tensors.items():
        key = key.replace("_orig_mod.", "").removeprefix("module.")      # compile, DataParallel
        for theirs, own in names.items():
            key = key.replace(theirs, own)
        if not tensor.is_floating_point():
            raise ValueError(f"{key} is {tensor.dtype}: a quantised checkpoint; give the original")
        parts = tensor.float().chunk(3) if ".qkv." in key else [tensor.float()]
        for name, part in zip("qkv", parts):
            result[key.replace(".qkv.", f".{name}_proj.")] = part
    return result


def read_pth(path: Path) -> tuple[dict, dict]:
    """Tensors by the names of timm (DeiT's and DINO's too) or torchvision, or what save_vit wrote.
    Only that says how pictures are normalised. Guessed: as ImageNet under "model", like DeiT's own
    files, and without a head, like DINO's; by half otherwise, like most of timm's."""
    try:
        file = load_torch(path)
    except pickle.UnpicklingError:
        raise ValueError("more than tensors, or damaged; nothing in it was run. If you trust it, "
                         f"save them anew: torch.save({{'model': torch.load('{path.name}', "
                         "weights_only=False)['model']}, 'tensors.pth')") from None
    file = file if isinstance(file, dict) else {}
    tensors = file.get("model", file.get("state_dict", file))
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ValueError(f"holds {', '.join(map(str, file))[:99]}{READ}")
    if "vit" in file:
        return renamed(tensors, {}), file["vit"]
    if any("conv_proj." in name for name in tensors):
        return renamed(tensors, TORCHVISION), {**IMAGENET}
    tensors = renamed(tensors, TIMM)
    return tensors, {**(IMAGENET if "model" in file or "head.weight" not in tensors else HALF),
                     "guess": True}


def read_folder(folder: Path) -> tuple[dict, dict]:
    """config.json and pytorch_model.bin: timm's hub, or ViTForImageClassification or ViTModel of
    Hugging Face, whose preprocessor_config.json says how pictures are normalised."""
    tensors, processor = {}, folder / "preprocessor_config.json"
    for file in weight_files(folder):
        with reading(file):
            tensors |= load_torch(file)
    config = read_json(folder / "config.json")
    only(config, SETTINGS, IGNORED, "config.json")
    if "architecture" in config:                                 # timm's
        if not re.fullmatch(r"(vit|deit)_\w+_patch\d+_\d+(\..*)?", config["architecture"]):
            raise ValueError(f"config.json: {config['architecture']} is no plain ViT")
        tensors, known = renamed(tensors, TIMM), {}
        timm, names = config.get("pretrained_cfg") or {}, config.get("label_names") or ()
        mean, std = timm.get("mean"), timm.get("std")
    else:
        tensors = renamed({name: tensor for name, tensor in tensors.items()
                           if "pooler." not in name}, HUGGINGFACE)
        known = {"heads": config.get("num_attention_heads", 12),
                 "eps": config.get("layer_norm_eps", 1e-12)}
        labels = config.get("id2label") or {}
        names = [labels.get(str(n)) for n in range(len(labels))]
        image = read_json(processor) if processor.exists() else {}
        only(image, PROCESSOR, IGNORED, processor.name)
        last = image.get("crop_size") or image.get("size") or {}     # what the model is given
        sides = set(last.values() if isinstance(last, dict) else [last])
        if sides - {config.get("image_size"), None}:
            raise ValueError(f"{processor.name}: {last} is not config.json's image_size")
        mean, std = image.get("image_mean"), image.get("image_std")
        if image.get("do_normalize") is False:
            mean, std = (0.0,) * 3, (1.0,) * 3
    if None in names or names and len(names) != len(tensors.get("head.weight", names)):
        raise ValueError(f"config.json names {len(names)} classes, not those of the head")
    known |= {"mean": tuple(mean), "std": tuple(std)} if mean and std else {"guess": True}
    return tensors, known | {"names": tuple(names)}


def read_google(path: Path) -> tuple[dict, dict]:
    """Google's Flax .npz: kernels are [in, out], those of attention keep the heads apart."""
    with np.load(path, allow_pickle=False) as file:
        tensors = renamed({key: torch.from_numpy(file[key]) for key in file.files}, GOOGLE)
    check_tensors(tensors)
    heads = tensors["blocks.0.attn.q_proj.weight"].shape[1]      # [D, H, D/H]
    for key, tensor in tensors.items():
        if key == "patch_embed.weight":
            tensors[key] = tensor.permute(3, 2, 0, 1).contiguous()       # [P, P, 3, D]
        elif key.endswith("weight") and tensor.dim() > 1:        # its bias has as many as come out
            out = tensors[key.replace("weight", "bias")].numel()
            tensors[key] = tensor.reshape(-1, out).T.contiguous()
        elif key.endswith("bias"):
            tensors[key] = tensor.flatten()
    return tensors, {"heads": heads}                             # pictures by half


def save_vit(model: ViT, path: str | Path) -> None:
    """Writes `model` by our names, with what timm's files leave out under "vit"."""
    known = {key: asdict(model.config)[key] for key in ("heads", "eps", "mean", "std", "names")}
    write(path, {"model": model.state_dict(), "vit": known})


# --- Data: (images, labels), with images uint8 [N, 3, H, W] or the files to read them from

def read_images(path: str | Path) -> tuple[tuple, tuple, list[str]]:
    """(training data, test data, names of the classes) of a CIFAR folder, an .npz or a folder of
    class folders. Without a test part every fifth example of each class is held out, from its
    second on."""
    path = Path(path)
    with reading(path):
        cifar = list(path.glob("data_batch_*.bin")) + list(path.glob("train.bin"))
        read = read_arrays if path.is_file() else read_cifar if cifar else read_folders
        (train, *test), names = read(path)
        if not test:
            order = torch.argsort(train[1], stable=True)
            place = torch.cat([torch.arange(n) for n in train[1].bincount()])
            train, *test = take(train, order[place % 5 != 1]), take(train, order[place % 5 == 1])
        there, asked = set(train[1].tolist()), set(test[0][1].tolist())
        if len(there) < 2 or not asked:
            raise ValueError(f"only {len(there)} class, or none to test: expected is a folder for "
                             "each class, of two images at least")
        if asked - there:
            raise ValueError(f"class {names[min(asked - there)]} is only in the test part")
    return train, test[0], names


def take(data: tuple, indices: torch.Tensor) -> tuple:
    """The examples of these indices."""
    return data[0][indices.tolist()], data[1][indices]


def read_cifar(folder: Path) -> tuple[list[tuple], list[str]]:
    """CIFAR-10 (data_batch_1.bin ..., test_batch.bin) or CIFAR-100 (train.bin, test.bin), with the
    classes' names if they are there. A row is the label (two, of which the last counts), pixels."""
    labels, classes, meta = 1, 10, folder / "batches.meta.txt"
    count = len([*folder.glob("data_batch_*.bin")])
    data, parts = [], [[f"data_batch_{n + 1}.bin" for n in range(count)], ["test_batch.bin"]]
    if (folder / "train.bin").exists():
        labels, classes, meta = 2, 100, folder / "fine_label_names.txt"
        parts = [["train.bin"], ["test.bin"]]
    for part in parts:
        batches = []
        for path in [folder / name for name in part]:
            with reading(path):
                rows = np.fromfile(path, np.uint8)
                if not rows.size or rows.size % (labels + 3072):
                    raise ValueError(f"empty, cut short, or not rows of {labels + 3072} bytes")
                batches.append(torch.from_numpy(rows).view(-1, labels + 3072))
                if (most := batches[-1][:, labels - 1].max()) >= classes:
                    raise ValueError(f"label {most} of {classes} classes")
        rows = torch.cat(batches)
        data.append((rows[:, labels:].reshape(-1, 3, 32, 32), rows[:, labels - 1].long()))
    names = [str(n) for n in range(classes)]
    if meta.exists():
        names = meta.read_text(encoding="utf-8").split()
    if len(names) != classes:
        raise ValueError(f"{meta.name} names {len(names)} classes, not {classes}")
    return data, names


def read_arrays(path: Path) -> tuple[list[tuple], list[str]]:
    """An .npz of x [N, H, W, 3] uint8 and y [N] whole numbers, x_test and y_test if there."""
    if path.suffix != ".npz":
        raise ValueError("a file, but no .npz: give the folder of CIFAR binaries, or of one folder "
                         "of pictures per class")
    data, names = [], ("x", "y", "x_test", "y_test")
    with np.load(path, allow_pickle=False) as file:
        only(dict.fromkeys(file.files, True), names, what="the .npz")
        for end in ("", "_test") if {*names[2:]} & {*file.files} else ("",):
            x, y = torch.from_numpy(file[f"x{end}"]), torch.from_numpy(file[f"y{end}"])
            if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[3] != 3 or not x.numel():
                raise ValueError(f"x{end} is {x.dtype} {list(x.shape)}, not uint8 [N, H, W, 3]")
            if y.is_floating_point() or y.shape != x.shape[:1] or y.min() < 0 or y.max() > 10**6:
                raise ValueError(f"y{end} is {y.dtype} {list(y.shape)}, not {len(x)} class numbers")
            data.append((x.permute(0, 3, 1, 2), y.long()))
    classes = 1 + int(torch.cat([labels for _, labels in data]).max())
    return data, [str(n) for n in range(classes)]


def read_folders(path: Path) -> tuple[list[tuple], list[str]]:
    """CLASS/*.jpg, at any depth as torchvision's ImageFolder reads them, or train/CLASS/*.jpg and
    the first folder of TEST that has the same classes, which is said. Hidden files and folders, and
    files that are no pictures by their ending, are passed over."""
    files = [Path(file) for file in sorted(glob.glob("**", root_dir=path, recursive=True))
             if Path(file).suffix.lower() in PICTURES]
    tops = {file.parts[0] for file in files if len(file.parts) > 1}
    trains = [top for top in tops if top.lower() in ("train", "training")]
    tests = [top for name in TEST for top in tops if top.lower() == name]
    split, rows, data = bool(trains or tests), defaultdict(list), []
    for file in files:
        if len(file.parts) > 1 + split:                          # part -> (class, file)
            rows[file.parts[0] if split else ""].append((file.parts[split], path / file))
    train = trains[0] if trains else ""
    tested = [part for part in tests if dict(rows[part]).keys() & dict(rows[train]).keys()][:1]
    strange = split and (len(trains) != 1 or tops - {*trains, *tests} or tests and not tested)
    if strange or not rows[train]:
        raise ValueError(f"holds {', '.join(sorted(tops))[:99] or 'no pictures in folders'}; read "
                         "are CIFAR binaries, a folder of pictures for each class, or train and "
                         f"one of {', '.join(TEST)} with such folders in them")
    names = sorted({name for part in (train, *tested) for name, _ in rows[part]})
    for part in (train, *tested):
        labels = torch.tensor([names.index(name) for name, _ in rows[part]])
        data.append((np.array([file for _, file in rows[part]]), labels))
    if tested:
        print(f"{path}: tested on {tested[0]}")
    return data, names


def read_picture(path: Path, size: int | None = None) -> np.ndarray:
    """uint8 [H, W, 3] of an image file, upright, transparency on black; with a size the square in
    its centre, resized. Needs Pillow."""
    with reading(path):
        from PIL import Image, ImageOps
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":                            # 16 bits, or 32-bit float
                x, top = np.array(image, np.float64), 1 if image.mode == "F" else 65535
                if not 0 <= x.min() <= x.max() <= top:           # also NaN
                    raise ValueError(f"values {x.min()} to {x.max()}, expected are 0 to {top}")
                image = Image.fromarray(np.uint8(x * (255 / top) + 0.5))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
            image = image.convert("RGB")
            square = (size, size) if size else image.size
            return np.array(ImageOps.fit(image, square, Image.Resampling.BICUBIC))


def decoded(data: tuple, size: int) -> tuple:
    """`data` with its files, if it is of files, read to uint8 [N, 3, size, size]."""
    if torch.is_tensor(data[0]):
        return data
    images = np.stack([read_picture(file, size) for file in data[0]])            # [N, S, S, 3]
    return torch.from_numpy(images).permute(0, 3, 1, 2), data[1]


def prepare(x: torch.Tensor, config: ViTConfig, augment: bool = False) -> torch.Tensor:
    """uint8 [N, 3, H, W] -> normalised images [N, 3, S, S]. augment: each flipped at random, and
    moved by up to an eighth of its size, its border repeated."""
    (N, _, H, W), size, device = x.shape, (config.image_size,) * 2, x.device
    if augment:
        flip = torch.randint(0, 2, (N, 1), device=device) == 0
        right, down = (torch.randint(-(side // 8), side // 8 + 1, (N, 1), device=device)
                       for side in (W, H))
        image, row, column = (torch.arange(n, device=device) for n in (N, H, W))
        column = (torch.where(flip, column.flip(0), column) + right).clamp(0, W - 1)     # [N, W]
        row = (row + down).clamp(0, H - 1)                                       # [N, H]
        x = x[image[:, None, None], :, row[:, :, None], column[:, None]].movedim(3, 1)
    x = x.float() / 255
    if (H, W) != size:
        x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (config.mean, config.std))
    return (x - mean) / std


# --- Demo: pictures that the script draws itself

def draw(count: int, seed: int, shifted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` pictures [3, 24, 24] of ten bright shapes (disk, ring, square, triangle, plus, star,
    crescent, bar, two dots, hourglass) on a dark ground; colour, position, size and rotation vary.
    shifted: colours inverted, a grating laid over, noise added."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 10, count)

    def uniform(low, high, *more):
        return np.float32(rng.uniform(low, high, (count, *more, 1, 1)))

    axis = np.linspace(-1, 1, 24, dtype=np.float32)
    size, angle = uniform(.5, .75), uniform(-.5, .5)
    x, y = axis - uniform(-.25, .25), axis[:, None] - uniform(-.25, .25)         # [N, 24, 24]
    u = (np.cos(angle) * x + np.sin(angle) * y) / size           # the shape's own axes
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
    image = mask * uniform(.55, 1., 3) + (1 - mask) * uniform(0., .45, 3)        # [N, 3, 24, 24]
    if shifted:
        wave = np.sin(uniform(4, 16) * (x * np.cos(angle) + y * np.sin(angle)) + uniform(0, 6.3))
        image = 1 - image + .1 * wave[:, None] + .1 * rng.standard_normal(image.shape, np.float32)
    return torch.from_numpy(np.uint8(np.clip(255 * image, 0, 255))), torch.from_numpy(label)


def small_vit() -> ViT:
    """A ViT that two CPU cores can pretrain: 6 layers, heads of 16, patches of 4 x 4."""
    model = ViT(ViTConfig(24, 4, width=64, depth=6, heads=4, mlp=256, classes=10))
    for parameter in model.parameters():
        if parameter.dim() > 1:              # the usual 0.02 is too little at small widths
            nn.init.xavier_uniform_(parameter)
    return model


def pretrained(args, steps: int = 500) -> ViT:
    """A small ViT pretrained on drawn pictures, always the same for a seed."""
    torch.manual_seed(args.seed)
    model, (images, labels) = small_vit(), draw(8000, 10 * args.seed, False)

    def loss(step: int) -> torch.Tensor:
        batch = batch_indices(len(labels), 64, step, args.seed)
        x = prepare(images[batch], model.config, augment=True)
        return F.cross_entropy(model(x), labels[batch])

    pretrain(model, loss, steps, lr=2e-3)
    return model


# --- What the three scripts share: options, trials, files, run state, batches, processes, the table

STOP = []                            # not empty once Ctrl-C was pressed
TRANSIENT = ("resume", "save_every", "out", "device", "merge")   # what --resume may change
PLAIN = {"gate": "none", "coordinator": "none", "budget": None}  # these make a Config plain LoRA
OPTIONS = {                          # name -> default, or a type if there is none; help
    "checkpoint": (str, "the pretrained model; without it the demo runs"),
    "data": (str, "what to train and to test on"),
    "method": (("structlora", "lora"), "the first without it; the demo runs both"),
    "rank": (2, "directions of a layer"),
    "alpha": (float, "updates are scaled by alpha / rank (2 rank)"),
    "dropout": (Config.dropout, "on the input of the update"),
    "targets": (",".join(Config.targets), "last parts of the names of the layers to adapt"),
    "gate": (Config.gate, "gaussian, concrete or none"),
    "beta": (Config.beta, "weight of the gates' rate in the loss"),
    "coordinator": (Config.coordinator, "attention, uniform or none"),
    "edges": (Config.edges, "who hears whom: hybrid, depth, similarity or all"),
    "budget": (float, "directions to keep, on average over the layers (all)"),
    "shots": (int, "labelled training examples of each class (all)"),
    "fraction": (float, "or the share of them to train on"),
    "seed": (0, "of everything random"),
    "steps": (200, "optimizer steps"),
    "lr": (float, "learning rate of the factors (LEARNING_RATES in the script)"),
    "batch_size": (16, "examples in a backward pass of a process"),
    "accumulate": (1, "backward passes in a step"),
    "save_every": (100, "steps after which adapter.pt is written"),
    "out": ("out", "folder for all results"),
    "resume": (False, "go on where OUT/adapter.pt stopped"),
    "eval_only": (False, "only score the checkpoint, with OUT/adapter.pt if there is one"),
    "merge": (False, "also write the merged model, OUT/merged.pt"),
    "device": ("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1 ..."),
    "dtype": (("float32", "bfloat16"), "of the model and its passes (bfloat16 on cuda)")}


def options(description: str, **own) -> argparse.Namespace:
    """The options of a script, checked: OPTIONS and its `own`, name=(default, type if there is none
    or choices; help). Joins the processes that torchrun started."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     usage=argparse.SUPPRESS,    # also of an error: one line
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, words) in (OPTIONS | own).items():
        how = {"type": default}
        if default is False:
            how = {"action": "store_true"}
        elif isinstance(default, tuple):
            how = {"choices": default}
        elif not isinstance(default, type):
            how, words = {"type": type(default), "default": default}, f"{words} ({default})"
        parser.add_argument(f"--{name.replace('_', '-')}", help=words, **how)
    args = parser.parse_args()
    cuda, out = args.device.startswith("cuda"), Path(args.out).absolute()
    args.method = args.method or "structlora"
    args.alpha = 2.0 * args.rank if args.alpha is None else args.alpha
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    for name, value in vars(args).items():
        zero = value == 0 and name in ("seed", "dropout", "beta")
        if type(value) in (int, float) and not 0 < value < 2**31 and not zero:
            raise ValueError(f"--{name.replace('_', '-')} {value}: out of range")
    if args.fraction and (args.fraction > 1 or args.shots):
        raise ValueError("--fraction: at most 1, and not together with --shots")
    if bool(args.checkpoint) != bool(args.data) or args.eval_only and not args.checkpoint:
        raise ValueError("--checkpoint and --data go together; --eval-only needs them")
    for name in ("checkpoint", "vision_checkpoint", "tokenizer", "data", "images"):
        path = getattr(args, name, None)
        if path and not Path(path).exists():
            raise ValueError(f"--{name.replace('_', '-')} {path}: there is no such file or folder")
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out {args.out}: cannot be written")
    saved = "adapter.pt" if args.checkpoint else "*/adapter.pt"  # a demo may have begun some trials
    if args.resume and not any(out.glob(saved)):
        raise ValueError(f"--resume: there is no {args.out}/{saved} to go on from")
    if "WORLD_SIZE" in os.environ:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else args.device
        dist.init_process_group("nccl" if cuda else "gloo")
        sys.stdout = open(os.devnull, "w", encoding="utf-8") if dist.get_rank() else sys.stdout
    args.processes = processes()[1]
    with reading(f"--device {args.device}"):
        torch.zeros(1, device=args.device)
    return args


def trials(args: argparse.Namespace, learning_rates: dict[str, float]) -> list[tuple]:
    """The runs of this command line: one on a checkpoint (none with --eval-only), and four in a
    demo. learning_rates: of "checkpoint", and of the demo's, which are also its folders."""
    r, wide = args.rank, {"rank": 4 * args.rank, "alpha": 4 * args.alpha}
    table = [("lora", f"LoRA r={r}", PLAIN), ("lora4r", f"LoRA r={4 * r}", PLAIN | wide),
             ("structlora", f"StructLoRA r={r}", {}),
             ("all", f'StructLoRA r={r} "all" (ours)', {"edges": "all"})]
    if args.checkpoint:
        changes = PLAIN if args.method == "lora" else {}
        table = [("checkpoint", f"{args.method} r={r}", changes)] * (not args.eval_only)
    given = {field.name: getattr(args, field.name) for field in fields(Config)}
    return [(name, Path(args.out, "" if args.checkpoint else key), Config(**given | changes),
             args.lr or learning_rates[key])
            for key, name, changes in table]


def check_runs(model: nn.Module, runs: list[tuple], count: int) -> None:
    """Before anything long: raises ValueError if `model` cannot be adapted as a run wants it, or if
    a process of torchrun would have none of the `count` training rows. Leaves no trace."""
    if count < processes()[1]:
        raise ValueError(f"{count} training rows for {processes()[1]} processes")
    for _, _, config, _ in runs:
        attach(model, config).detach()


def adapters_beside(model: nn.Module, args: argparse.Namespace) -> str:
    """With --eval-only gives `model` the adapters of OUT/adapter.pt, if there are any and it is not
    OUT/merged.pt, which has them in it. Returns the name of the table's first row."""
    path = Path(args.out, "adapter.pt")
    if not args.eval_only or not path.exists() or path.resolve().parent == Path(
            args.checkpoint).resolve().parent:
        return "frozen"
    with reading(path):
        classes = load_torch(path).get("options", {}).get("classes")     # of train_vit.py
        if classes and classes != args.classes:
            raise ValueError(f"its classes are {', '.join(classes)[:99]}, not "
                             f"{', '.join(args.classes)[:99]}")
    StructLoRA.load(model, path)
    return str(path)


def only(record: dict, known: tuple | dict, ignored: tuple = (), what: str = "") -> None:
    """Raises ValueError that names what in `record` is neither `known` nor `ignored`, unless it is
    empty (None, False, "", [], {}, NaN), or is not the value that a dict of the known gives."""
    for key, value in record.items():
        empty = value is None or value is False or value in ("", [], {}) or value != value
        wanted = known.get(key) if isinstance(known, dict) else None
        if key not in known and key not in ignored and not empty:
            raise ValueError(f"{what} {key}: not known here; known are {', '.join(known)}".lstrip())
        if wanted is not None and value not in (None, wanted):
            raise ValueError(f"{what} {key} is {value!r}; only {wanted!r} is read".lstrip())


def read_json(path: Path):
    """The value of a .json file, which is named if it is none."""
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def weight_files(folder: str | Path) -> list[Path]:
    """The files that hold the weights of a Hugging Face folder, chosen as transformers does:
    pytorch_model.bin, else those of pytorch_model.bin.index.json, else the one complete set of
    pytorch_model-0000i-of-0000n.bin. Nothing else is read: of safetensors beside them, which
    transformers would prefer, that is said. Raises ValueError that names what is missing."""
    folder, index, chosen = Path(folder), "pytorch_model.bin.index.json", ["pytorch_model.bin"]
    names = sorted(path.name for path in folder.iterdir())
    parts = [n for n in names if re.fullmatch(r"pytorch_model-\d{5}-of-\d{5}\.bin", n)]
    if chosen[0] not in names and index in names:
        chosen = sorted(set(read_json(folder / index)["weight_map"].values()))
    elif chosen[0] not in names and len({name[-9:] for name in parts}) == 1:
        count = int(parts[0][-9:-4])
        chosen = [f"pytorch_model-{i:05d}-of-{count:05d}.bin" for i in range(1, count + 1)]
    missing = [name for name in chosen if name not in names]
    if missing and "adapter_config.json" in names:
        raise ValueError(f"{folder}: an adapter of PEFT, no model: merge it into its model first")
    if missing and not parts:
        load_torch(folder / missing[0])                          # says what to do about safetensors
    if missing:
        raise ValueError(f"{folder / missing[0]}: missing; there are {', '.join(names)[:200]}")
    if any(name.endswith(".safetensors") for name in names):
        print(f"{folder}: {chosen[0]} ... are read; the safetensors beside them are not")
    return [folder / name for name in chosen]


def fingerprint(*values) -> str:
    """Of tensors their bytes', of anything else that of what repr() shows."""
    result = hashlib.sha256()
    for value in values:
        result.update(value.cpu().contiguous().numpy() if torch.is_tensor(value)
                      else repr(value).encode())
    return result.hexdigest()


def processes() -> tuple[int, int]:
    """(number of this process, how many there are): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def resume_run(out: Path, adapters: StructLoRA, optimizer, args: argparse.Namespace,
               digest: str) -> list[dict]:
    """The log of the steps that are done: empty, or with --resume that of OUT/adapter.pt, if it is
    of the same options and of the same data, by their digest. A demo's trial without one begins."""
    path, lines = out / "adapter.pt", []
    if args.resume and path.exists():
        with reading(path):
            file = load_torch(path)
            for name, value in file["options"].items():
                if vars(args)[name] != value and name not in TRANSIENT:
                    raise ValueError(f"the run has {name}={value!r}, not {vars(args)[name]!r}")
            if file.get("digest") != digest:
                raise ValueError("the run was on other training or test data: they have changed")
            adapters.load_state(file)
            optimizer.load_state_dict(file["optimizer"])
            lines = [*file["lines"]]
    if args.processes == 1:
        signal.signal(signal.SIGINT, stop_after_step)
    return lines


def stop_after_step(*_) -> None:
    """Ctrl-C: save_run ends the run after the step under way; a second one ends it at once."""
    STOP.append(True)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def save_run(out: Path, adapters: StructLoRA, optimizer, lines: list[dict],
             args: argparse.Namespace, digest: str) -> None:
    """After each step: every --save-every steps, at the last, and on Ctrl-C writes config.json,
    metrics.jsonl and adapter.pt (what StructLoRA.save writes, and what --resume needs)."""
    step, options = len(lines), vars(args)
    if not math.isfinite(lines[-1]["loss"]):
        raise ValueError(f"the loss is {lines[-1]['loss']} in step {step}: lower --lr")
    if (step % args.save_every == 0 or step == args.steps or STOP) and processes()[0] == 0:
        run = {"optimizer": optimizer.state_dict(), "lines": lines, "options": options,
               "digest": digest}
        write(out / "adapter.pt", adapters.state() | run)
        write(out / "config.json", json.dumps(options, indent=2))
        write(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    if STOP:
        raise KeyboardInterrupt(f"saved after step {step} of {args.steps}: --resume goes on")


def costs(adapters: StructLoRA, lines: list[dict]) -> dict[str, str]:
    """What a run took, for its row of the table; the merged rank is a mean over the layers. To be
    called before merge() or detach()."""
    told, times = adapters.diagnostics(), sorted(line["ms"] for line in lines)
    kept, rate = told["kept"].values(), sum(told["rate"].values())
    edges = sum(int((mixing != 0).sum()) for mixing in told["mixing"].values())
    trainable = sum(p.numel() for group in adapters.param_groups(0.0) for p in group["params"])
    return {"trainable": f"{trainable:,}", "merged rank": f"{sum(kept) / len(kept):.1f}",
            "rate (nats)": f"{rate:.1f}", "kept": f"{sum(kept)}/{edges * adapters.config.rank}",
            "ms/step": f"{times[len(times) // 2]:.1f}"}


def print_table(rows: list[dict[str, str | float]]) -> None:
    """The rows as a table with right-aligned columns; it is also valid Markdown."""
    columns = []
    for name in rows[-1]:
        values = [row.get(name, "-") for row in rows]
        cells = [name, "-:"] + [v if isinstance(v, str) else f"{v:.3f}" for v in values]
        columns.append([cell.rjust(max(map(len, cells))) for cell in cells])
    for line in zip(*columns):
        print("|", " | ".join(line), "|", flush=True)


def exit_status(main) -> int:
    """Calls main(); a user's error becomes one line on stderr and status 2, Ctrl-C 130. What the
    console cannot print is escaped: a name must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
        return 0
    except (ValueError, OSError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        text = " ".join(str(error).split())[:1000] or "interrupted"
        print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def warmup_cosine(step: int, steps: int) -> float:
    """Factor on the learning rate: linear warmup over 6% of the steps, then cosine to 0."""
    warmup = max(1, round(0.06 * steps))
    rest = (step - warmup) / max(1, steps - warmup)
    return (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * rest))


def batch_indices(count: int, size: int, number: int, seed: int) -> torch.Tensor:
    """Indices of batch `number` in an endless run of reshuffled epochs of `count` examples, whose
    last, incomplete batch is left out. A pure function, so that a resumed run sees the same."""
    epoch, place = divmod(number, max(1, count // size))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)[place * size:(place + 1) * size]


def choose(labels: torch.Tensor, shots: int | None, fraction: float | None,
           seed: int) -> torch.Tensor:
    """Indices of `shots` examples of each class, or of a `fraction` of each; all without either."""
    generator, chosen = torch.Generator().manual_seed(seed), []
    for label in labels.unique():
        mine = (labels == label).nonzero()[:, 0]
        count = shots or max(1, round((fraction or 1.0) * len(mine)))
        if count > len(mine):
            print(f"class {int(label)} has {len(mine)} examples, fewer than --shots {count}")
        chosen.append(mine[torch.randperm(len(mine), generator=generator)[:count]])
    return torch.cat(chosen).sort().values


def autocast(args) -> torch.autocast:
    """Computes in bfloat16 with --dtype bfloat16; trained tensors are fp32 anyhow."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, args.dtype == "bfloat16")


def pretrain(model: nn.Module, loss, steps: int, lr: float) -> None:
    """Trains all of a small model, for the demos; loss(step) is that of a batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    schedule = LambdaLR(optimizer, lambda n: warmup_cosine(n, steps))
    for step in tqdm(range(steps), "pretraining", disable=None, leave=False):
        loss(step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    raise SystemExit(exit_status(main))
