"""Fine-tune a LLaMA with StructLoRA, or with LoRA to compare.

    python train_llama.py                                 the embedded demo: no downloads, CPU
    python train_llama.py --checkpoint Llama-2-7b --data boolq --dtype bfloat16
                                                          the real thing, on one GPU
    ... --method lora                                     the baseline, same data and seed
    ... --gradient-checkpointing                          less memory, a third more time
    ... --out out/llama --resume                          go on after a kill
    ... --eval-only                                       score the checkpoint and OUT/adapter.pt

--checkpoint reads a folder in Meta's layout (consolidated.NN.pth, params.json) or Hugging Face's
(pytorch_model*.bin, config.json): LLaMA 1, 2, 3, 3.1 and 3.2. --tokenizer reads a tokenizer.model,
SentencePiece's or Llama 3's; by default the one in the checkpoint's folder. --data reads a .json or
.jsonl of {instruction, input, output}, BoolQ's and PIQA's own .jsonl, or .txt; a file, or a folder
of train.* and test.* (dev.*, valid.*).

Order of this file: model, checkpoints, tokenizers, data, generation, demo, main.
"""

import base64
import functools
import heapq
import json
import math
import random
import re
import struct
import sys
import time
import unicodedata
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import structlora
from structlora import InputError, Task

# Tuned on the demo with seeds 100 to 103, apart from those reported; a checkpoint's is that of
# LLM-Adapters (Hu et al. 2023), untuned.
LEARNING_RATES = {"lora": 4e-2, "lora matched": 2e-2, "structlora": 4e-2, "checkpoint": 3e-4}


# ---------------------------------------------------------------------------------------------
# Model: names and rotary layout are Hugging Face's, so that exported adapters fit its models too


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a LLaMA. The defaults are those of the 7B model."""
    vocab_size: int = 32000
    dim: int = 4096                  # width of the residual stream
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32           # fewer than num_heads: grouped-query attention
    head_dim: int = 128
    hidden_dim: int = 11008          # of the SwiGLU
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()         # ("linear", factor) or ("llama3", factor, low, high, length)
    tied: bool = False               # the output layer is the embedding

    def check(self, path: Path) -> "LlamaConfig":
        """Raises InputError, naming `path`, if the sizes make no model; returns the config."""
        for field in fields(self)[:9]:
            value = getattr(self, field.name)
            if not isinstance(value, (int, field.type)) or not 0 < value < 2 ** 31:
                raise InputError(f"{path}: {field.name} = {value!r}: must be a positive "
                                 f"{field.type.__name__} of a size that exists")
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise InputError(f"{path}: {self.num_heads} heads on {self.num_kv_heads} key-value "
                             f"heads of width {self.head_dim}: must divide, and the width be even")
        _, *numbers = self.rope_scaling or ("",)
        if (not all(isinstance(n, (int, float)) and 0 < n < math.inf for n in numbers)
                or len(numbers) == 4 and numbers[1] >= numbers[2]):
            raise InputError(f"{path}: rope_scaling = {self.rope_scaling}: must be positive "
                             "numbers, for llama3 the low factor below the high")
        return self


@functools.lru_cache(maxsize=8)
def rotary_frequencies(config: LlamaConfig, device: torch.device) -> torch.Tensor:
    """Radians per position of each pair of channels, [head_dim / 2] in fp32 (Su et al. 2021).

    "linear" stretches all wavelengths (Chen et al. 2023); "llama3" those longer than the context of
    pretraining over `low`, none shorter than it over `high`, and blends between (Llama 3.1).
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    frequency = config.rope_theta ** (-pairs / config.head_dim)
    kind, factor, *rest = config.rope_scaling or ("linear", 1.0)
    if kind == "linear":
        return (frequency / factor).to(device)
    low, high, length = rest
    turns = length * frequency / (2 * math.pi)                   # over the context of pretraining
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (frequency * (keep + (1 - keep) / factor)).to(device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of queries or keys x [N, H, T, d] by cos, sin [N, 1, T, d/2].

    The layout is Hugging Face's: channel i turns with i + d/2. In Meta's files 2i turns with
    2i + 1; Part.read() reorders their rows. Computed in fp32, as the tables are."""
    a, b = x.chunk(2, -1)                                        # [N, H, T, d/2] each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Cache:
    """Keys and values of the tokens seen so far, [layers, N, H_kv, length, d] each."""

    def __init__(self, model: "Llama", batch: int, length: int):
        c, weight = model.config, model.model.norm.weight
        shape = (c.num_layers, batch, c.num_kv_heads, length, c.head_dim)
        self.keys, self.values = weight.new_empty(shape), weight.new_empty(shape)
        self.length = 0

    def extend(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple:
        """Stores k, v [N, H_kv, T, d] of the new tokens; returns those of all tokens so far."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length:end], self.values[layer, :, :, self.length:end] = k, v
        return self.keys[layer, :, :, :end].to(k), self.values[layer, :, :, :end].to(v)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the quotient in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Causal grouped-query attention, [N, T, D] -> [N, T, D]."""

    def __init__(self, c: LlamaConfig, layer: int):
        super().__init__()
        self.config, self.layer = c, layer
        linear = functools.partial(nn.Linear, bias=False)
        self.q_proj = linear(c.dim, c.num_heads * c.head_dim)
        self.k_proj = linear(c.dim, c.num_kv_heads * c.head_dim)
        self.v_proj = linear(c.dim, c.num_kv_heads * c.head_dim)
        self.o_proj = linear(c.num_heads * c.head_dim, c.dim)

    def forward(self, x, rotary, mask, cache=None):
        N, T, _ = x.shape
        q, k, v = (p(x).view(N, T, -1, self.config.head_dim).transpose(1, 2)  # [N, H or H_kv, T, d]
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)                # [N, H_kv, S, d]
        groups = self.config.num_heads // self.config.num_kv_heads
        k, v = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (k, v))  # [N, H, S, d]
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1)
        return self.o_proj(y.transpose(1, 2).reshape(N, T, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020), [N, T, D] -> [N, T, D]."""

    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.up_proj = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.down_proj = nn.Linear(c.hidden_dim, c.dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm transformer block, [N, T, D] -> [N, T, D]."""

    def __init__(self, c: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, rotary, mask, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """LLaMA (Touvron et al. 2023): tokens [N, T] -> logits [N, T, V]."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        c = self.config = config
        self.gradient_checkpointing = False          # recompute each block in the backward pass
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.dim)
        self.model.layers = nn.ModuleList(Block(c, layer) for layer in range(c.num_layers))
        self.model.norm = RMSNorm(c.dim, c.norm_eps)
        self.lm_head = nn.Linear(c.dim, c.vocab_size, bias=False)
        self.tie()

    def tie(self) -> "Llama":
        """Makes the output layer the embedding, if the config says so."""
        if self.config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        return self

    def forward(self, tokens=None, embeddings=None, real=None, cache=None, select=None):
        """Logits [N, T, V].

        embeddings [N, T, D] may stand in for tokens. real [N, S] bool is False at padding (S = T
        and what the cache holds): it is not attended to, and positions count without it; padding
        on the right needs none, being in nobody's past. select [N, T] bool: logits [M, V] of the
        M places marked, row by row, without computing the others.
        """
        x = self.model.embed_tokens(tokens) if embeddings is None else embeddings
        (N, T, _), past = x.shape, cache.length if cache else 0
        if real is None:
            positions = torch.arange(past, past + T, device=x.device).expand(N, T)
        else:
            positions = (real.cumsum(1) - 1).clamp_min(0)[:, past:]              # [N, T]
        angle = positions[:, None, :, None] * rotary_frequencies(self.config, x.device)
        rotary = angle.cos(), angle.sin()                                        # [N, 1, T, d/2]
        mask = attention_mask(real, T, past, x.device)
        for block in self.model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, mask, use_reentrant=False)
            else:
                x = block(x, rotary, mask, cache)                                # [N, T, D]
        if cache is not None:
            cache.length += T
        return self.lm_head(self.model.norm(x if select is None else x[select]))

    def initialise(self) -> "Llama":
        """Fresh weights for pretraining, normal: deviation 0.5 in the embedding, 1 / sqrt(inputs)
        elsewhere, less into the residual stream. Narrow models learn from the usual 0.02 at half
        the speed."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = parameter.shape[1] ** -0.5 / math.sqrt(2 * self.config.num_layers) ** into
                nn.init.normal_(parameter, std=0.5 if "embed" in name else std)
        return self


def attention_mask(real, T: int, past: int, device) -> torch.Tensor | None:
    """[N or 1, 1, T, S] bool, True where a query may look; None where plain causal attention, or
    one new token that sees everything, needs no mask."""
    if real is None and (past == 0 or T == 1):
        return None
    place = torch.arange(past + T, device=device)
    mask = place <= place[past:, None]                           # [T, S]
    if real is None:
        return mask[None, None]
    itself = place == place[past:, None]     # a padded query sees itself: an empty row would be NaN
    return mask & real[:, None, None] | itself


# ---------------------------------------------------------------------------------------------
# Checkpoints: a reader returns (LlamaConfig, Part by our names); every key is accounted for


class Part(NamedTuple):
    """Where a weight lies: one tensor, or the slices of it that model-parallel files hold."""
    paths: list                      # of the files
    tensors: list                    # memory-mapped, one per file
    axis: int = 0                    # along which the slices are joined
    heads: int = 0                   # q and k of Meta's files: heads whose rows are reordered

    def shape(self) -> tuple:
        """Shape of the whole weight; slices that do not fit together have none: ()."""
        shapes = [list(tensor.shape) for tensor in self.tensors]
        joined = sum(shape.pop(self.axis) for shape in shapes if self.axis < len(shape))
        if any(shape != shapes[0] for shape in shapes):
            return ()
        return tuple(shapes[0][:self.axis] + [joined] + shapes[0][self.axis:])

    def read(self, name: str, dtype: torch.dtype, device: str) -> torch.Tensor:
        """The whole weight. Raises InputError that names the file if it has NaN or infinities."""
        slices = [tensor.to(device).to(dtype) for tensor in self.tensors]    # converted over there
        for path, tensor in zip(self.paths, slices):
            structlora.check_finite(path, {name: tensor})
        whole = torch.cat(slices, self.axis) if len(slices) > 1 else slices[0]
        if self.heads:               # rows 2i, 2i + 1 of a head turn together; ours are i, i + d/2
            rows, columns = whole.shape
            whole = whole.view(self.heads, -1, 2, columns).transpose(1, 2).reshape(rows, columns)
        return whole.contiguous()


def load_llama(directory: str | Path, dtype: torch.dtype = torch.bfloat16,
               device: str = "cpu") -> Llama:
    """Reads a LLaMA from a folder in Meta's or in Hugging Face's layout, or from what --merge
    wrote, in eval mode.

    Weights are converted one by one as they leave the mapped files, so that host memory holds them
    once at the most. Raises InputError that names the file and what to do.
    """
    config, parts = read_checkpoint(Path(directory))
    with torch.device("meta"):
        model = Llama(config)
    return assemble(model, Path(directory), parts, dtype, device)


def read_checkpoint(directory: Path) -> tuple[LlamaConfig, dict[str, Part]]:
    """The reader that the content of `directory` asks for, or of a file that --merge wrote."""
    if directory.is_file():
        return read_merged(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such folder; --checkpoint is the folder of the weights")
    for pattern, read in (("consolidated.*.pth", read_meta),
                          ("pytorch_model*.bin*", read_huggingface)):
        if any(directory.glob(pattern)):
            config, parts = read(directory)
            if config.num_layers > len(parts):           # before a model of so many is built
                raise InputError(f"{directory}: {len(parts)} weights for {config.num_layers} "
                                 "layers")
            return config, parts
    structlora.refuse_safetensors(directory)
    raise InputError(f"{directory}: has neither consolidated.00.pth nor pytorch_model.bin")


def assemble(model: Llama, directory: Path, parts: dict[str, Part], dtype: torch.dtype,
             device: str) -> Llama:
    """Puts the weights into `model`, which takes no memory yet (it is on the meta device)."""
    config = model.config
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tied:                                              # the file may hold it twice
        expected.pop("lm_head.weight")
        parts.pop("lm_head.weight", None)
    for name in expected.keys() - parts.keys():
        raise InputError(f"{directory}: no weights for {name}: a file is missing or incomplete")
    for name, part in parts.items():
        if name not in expected:
            raise InputError(f"{part.paths[0]}: {name} is no part of a LLaMA of these sizes")
        if part.shape() != expected[name]:
            shape = list(part.shape() or part.tensors[0].shape)
            raise InputError(f"{part.paths[0]}: {name} is {shape}, expected "
                             f"{list(expected[name])}: a shard is missing, or the sizes in "
                             "params.json or config.json are of another model")
        for path, tensor in zip(part.paths, part.tensors):
            if not tensor.is_floating_point():
                raise InputError(f"{path}: {name} is {tensor.dtype}: a quantised checkpoint; give "
                                 "the original one")
    state = {name: part.read(name, dtype, device) for name, part in parts.items()}
    if config.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    return model.tie().eval()


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, without the rotary tables that old ones carry: they are recomputed."""
    state = structlora.read_torch(path)
    if not isinstance(state, dict) or not state or not all(map(torch.is_tensor, state.values())):
        raise InputError(f"{path}: not a state dict of tensors")
    return {str(key): tensor for key, tensor in state.items()
            if not str(key).endswith(("rope.freqs", "rotary_emb.inv_freq"))}


def save_merged(model: Llama, path: Path, **more) -> None:
    """Writes what --merge promises: the weights by Hugging Face's names and the config."""
    state = {"llama": asdict(model.config), "model": model.state_dict(), **more}
    structlora.write_atomically(path, lambda temporary: torch.save(state, temporary))


def read_merged(path: Path) -> tuple[LlamaConfig, dict[str, Part]]:
    """A file of save_merged."""
    state = structlora.read_torch(path)
    try:
        config = LlamaConfig(**state["llama"])
        return config.check(path), {key: Part([path], [t]) for key, t in state["model"].items()}
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: not written by --merge; otherwise --checkpoint is the folder of "
                         "the weights") from None


META = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
        **{f"layers.*.{theirs}.weight": f"model.layers.*.{ours}.weight" for theirs, ours in (
            ("attention.wq", "self_attn.q_proj"), ("attention.wk", "self_attn.k_proj"),
            ("attention.wv", "self_attn.v_proj"), ("attention.wo", "self_attn.o_proj"),
            ("feed_forward.w1", "mlp.gate_proj"), ("feed_forward.w2", "mlp.down_proj"),
            ("feed_forward.w3", "mlp.up_proj"), ("attention_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"))}}
# The axis that model-parallel files cut: rows of what reads the full width, columns of what writes
# it; the embedding's columns in LLaMA 1 and 2. All of them hold the norms whole.
AXES = dict.fromkeys(("tok_embeddings", "output", "wq", "wk", "wv", "w1", "w3"), 0) | {
    "wo": 1, "w2": 1}


def read_meta(directory: Path) -> tuple[LlamaConfig, dict[str, Part]]:
    """consolidated.00.pth, .01.pth, ... and params.json, as Meta publishes them."""
    paths = sorted(directory.glob("consolidated.*.pth"))
    for number, path in enumerate(paths):
        if path.name != f"consolidated.{number:02d}.pth":
            raise InputError(f"{directory}: consolidated.{number:02d}.pth is missing")
    shards = [read_state(path) for path in paths]
    for path, shard in zip(paths, shards):
        for key in shard.keys() ^ shards[0].keys():
            raise InputError(f"{path}: {key} is not in all of the {len(paths)} files")
    config = meta_config(directory / "params.json", shards)
    by_width = len(shards) > 1 and shards[0]["tok_embeddings.weight"].shape[1] < config.dim
    parts = {}
    for ours, key in structlora.rename(paths[0], {key: key for key in shards[0]}, META).items():
        layer = key.split(".")[-2]
        tensors, axis = [shard[key] for shard in shards], AXES.get(layer)
        if axis is None:
            if not all(torch.equal(tensor, tensors[0]) for tensor in tensors):
                raise InputError(f"{paths[0]}: {key} differs between the files: not of one model")
            tensors, axis = tensors[:1], 0
        heads = {"wq": config.num_heads, "wk": config.num_kv_heads}.get(layer, 0)
        axis = 1 if by_width and layer == "tok_embeddings" else axis
        parts[ours] = Part(paths, tensors, axis, heads)
    return config, parts


def meta_config(path: Path, shards: list[dict]) -> LlamaConfig:
    """LlamaConfig from params.json; vocab_size is -1 there before Llama 3, so the shapes say it.

    Llama 3.2 ties its output to the embedding and stores it nevertheless. With use_scaled_rope
    Meta's code stretches by 8; its own Hugging Face files of 3.2 say 32, which we follow for tied
    models.
    """
    p = structlora.read_json(path)
    try:
        embedding = shards[0]["tok_embeddings.weight"]
        output = shards[0].get("output.weight", embedding)
        tied = output.shape == embedding.shape and torch.equal(output, embedding)
        hidden = int(2 * (4 * p["dim"]) / 3)
        hidden = int((p.get("ffn_dim_multiplier") or 1) * hidden)
        multiple = p.get("multiple_of", 256)
        by_rows = embedding.shape[1] == p["dim"]                 # Llama 3 cuts the vocabulary
        factor = p.get("rope_scaling_factor") or (32.0 if tied else 8.0)
        config = LlamaConfig(
            vocab_size=len(embedding) * (len(shards) if by_rows else 1), dim=p["dim"],
            num_layers=p["n_layers"], num_heads=p["n_heads"],
            num_kv_heads=p.get("n_kv_heads") or p["n_heads"],
            head_dim=p.get("head_dim") or p["dim"] // p["n_heads"],
            hidden_dim=-(-hidden // multiple) * multiple, norm_eps=p["norm_eps"],
            rope_theta=p.get("rope_theta") or 10000.0,
            rope_scaling=("llama3", factor, 1.0, 4.0, 8192) if p.get("use_scaled_rope") else (),
            tied=tied)
    except (KeyError, TypeError, ValueError, ArithmeticError, IndexError) as error:
        raise InputError(f"{path}: not the sizes of a LLaMA "
                         f"({type(error).__name__}: {structlora.one_line(error)})") from None
    return config.check(path)


def read_huggingface(directory: Path) -> tuple[LlamaConfig, dict[str, Part]]:
    """pytorch_model.bin, or pytorch_model-0000i-of-0000n.bin with or without their index.json."""
    index = directory / "pytorch_model.bin.index.json"
    if index.exists():
        files = structlora.read_json(index).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise InputError(f"{index}: has no weight_map")
        names = sorted(set(map(str, files.values())))
    else:
        names = sorted(path.name for path in directory.glob("pytorch_model*.bin"))
        count = re.search(r"-of-(\d+)\.bin$", names[0]) if names else None
        if count:
            digits, total = len(count[1]), int(count[1])
            names = [f"pytorch_model-{i:0{digits}}-of-{count[1]}.bin" for i in range(1, total + 1)]
    config, parts = huggingface_config(directory / "config.json"), {}
    for name in names:
        path = directory / name
        parts |= {key: Part([path], [tensor]) for key, tensor in read_state(path).items()}
    return config, parts


SCALINGS = {"default": (), "linear": ("factor",), "llama3": (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


def huggingface_config(path: Path) -> LlamaConfig:
    """LlamaConfig from config.json; what this model has no part for is refused, not ignored."""
    c = structlora.read_json(path)
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}       # transformers 5, before
    kind = rope.get("rope_type") or rope.get("type") or "default" if type(rope) is dict else rope
    for key, value, allowed in (
            ("model_type", c.get("model_type", "llama"), ("llama", "llava", "llava_llama")),
            ("hidden_act", c.get("hidden_act", "silu"), ("silu", "swish")),
            ("attention_bias", c.get("attention_bias", False), (False,)),
            ("mlp_bias", c.get("mlp_bias", False), (False,)), ("rope_type", kind, tuple(SCALINGS))):
        if value not in allowed:
            raise InputError(f"{path}: {key} = {value!r} is not supported; only "
                             f"{' or '.join(map(repr, allowed))} is")
    try:
        scaling = (kind, *(float(rope[key]) for key in SCALINGS[kind]))
        config = LlamaConfig(
            vocab_size=c["vocab_size"], dim=c["hidden_size"], num_layers=c["num_hidden_layers"],
            num_heads=c["num_attention_heads"],
            num_kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
            head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
            hidden_dim=c["intermediate_size"], norm_eps=c.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or c.get("rope_theta") or 10000.0,
            rope_scaling=() if kind == "default" else scaling,
            tied=bool(c.get("tie_word_embeddings", False)))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{path}: not the configuration of a LLaMA "
                         f"({type(error).__name__}: {structlora.one_line(error)})") from None
    return config.check(path)


# ---------------------------------------------------------------------------------------------
# Tokenizers


def load_tokenizer(path: str | Path) -> Any:
    """A SentencePiece or tiktoken tokenizer.model, told by its content; a folder holds one.

    The result has encode(text, bos=True, eos=False) -> list of ids, decode(ids) -> text, bos_id,
    eos_id and vocab_size. Raises InputError that names the file.
    """
    path = Path(path)
    path = path / "tokenizer.model" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a tokenizer.model with --tokenizer")
    data = path.read_bytes()
    try:
        return (SentencePiece if data[:1] == b"\n" else Tiktoken)(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, LookupError, TypeError, AttributeError, struct.error):
        raise InputError(f"{path}: neither a SentencePiece model nor a tiktoken rank file, or cut "
                         "short") from None


def valid(text: str) -> str:
    """`text` with surrogates paired, and U+FFFD where one is alone: what has a UTF-8 form."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def merge(parts: list, ranks: dict) -> list:
    """Byte-pair encoding: joins the neighbours whose union ranks lowest, the leftmost of equals
    first, until no union is in `ranks`.

    merge(["a", "b", "a", "b"], {"ab": 0, "abab": 1}) -> ["abab"]
    """
    n = len(parts)
    after, before = list(range(1, n + 1)), list(range(-1, n - 1))
    pairs = ((i, parts[i] + parts[i + 1]) for i in range(n - 1))
    queue = [(ranks[union], i, union) for i, union in pairs if union in ranks]
    heapq.heapify(queue)
    while queue:
        _, i, union = heapq.heappop(queue)
        j = after[i]
        if parts[i] is None or j == n or parts[i] + parts[j] != union:
            continue                                             # one of the two was joined since
        parts[i], parts[j] = union, None
        k = after[i] = after[j]
        if k < n:
            before[k] = i
            if (union := parts[i] + parts[k]) in ranks:
                heapq.heappush(queue, (ranks[union], i, union))
        h = before[i]
        if h >= 0 and (union := parts[h] + parts[i]) in ranks:
            heapq.heappush(queue, (ranks[union], h, union))
    return [part for part in parts if part is not None]


class Tokenizer:
    """What both vocabularies share: text is cut into chunks that no token crosses, and the ids of
    a chunk are remembered, since most words come again."""

    def __init__(self, bos_id: int, eos_id: int, vocab_size: int):
        self.bos_id, self.eos_id, self.vocab_size = bos_id, eos_id, vocab_size
        self.ids_of = functools.lru_cache(maxsize=2 ** 16)(self.encode_chunk)

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Token ids; the text of a special token, as "<s>", is encoded as any other text."""
        ids = [self.bos_id] if bos else []
        for chunk in self.chunks(valid(text)):
            ids += self.ids_of(chunk)
        return ids + [self.eos_id] if eos else ids


class Bytes:
    """No vocabulary: a token per byte of UTF-8, then the two special ones."""
    bos_id, eos_id, vocab_size = 256, 257, 258

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """encode("hi") -> [256, 104, 105]"""
        return [self.bos_id] * bos + list(valid(text).encode()) + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        """Text; special tokens leave none."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def protobuf(data: bytes) -> list[tuple]:
    """(field number, value) of a message: an int, or bytes (strings, messages, fixed widths)."""
    def varint(at):
        value = shift = 0
        while True:
            byte, at, value = data[at], at + 1, value | (data[at] & 127) << shift
            shift += 7
            if byte < 128:
                return value, at

    result, at = [], 0
    while at < len(data):
        key, at = varint(at)
        kind = key & 7
        if kind == 0:
            value, at = varint(at)
        else:
            size, at = varint(at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at:at + size], at + size
        if at > len(data):
            raise ValueError("cut short")
        result.append((key >> 3, value))
    return result


class SentencePiece(Tokenizer):
    """A SentencePiece BPE model with byte fallback, as of LLaMA 1 and 2 (Kudo and Richardson 2018).

    A piece is (text, score, type); merging takes the highest score first. Spaces become U+2581, one
    is put in front, and characters without a piece become bytes.
    """
    NORMAL, UNKNOWN, CONTROL, _, _, BYTE = range(1, 7)           # types of pieces in the format

    def __init__(self, data: bytes):
        model = protobuf(data)
        pieces = [{"score": b"\0" * 4, "type": self.NORMAL}
                  | {{1: "text", 2: "score", 3: "type"}.get(k, k): v for k, v in protobuf(value)}
                  for field, value in model if field == 1]
        trainer, normaliser = (dict(pair for field, value in model if field == number
                                    for pair in protobuf(value)) for number in (2, 3))
        if not trainer or not normaliser:                        # they follow the pieces
            raise ValueError("cut short")
        self.texts = [piece["text"].decode() for piece in pieces]
        self.types = [piece["type"] for piece in pieces]
        bos_id, eos_id = trainer.get(41, 1), trainer.get(42, 2)
        self.check(trainer, normaliser, (bos_id, eos_id))
        self.prefix = "\u2581" if normaliser.get(3, 1) else ""
        self.ranks = {text: -struct.unpack("<f", piece["score"])[0]
                      for text, piece in zip(self.texts, pieces) if piece["type"] == self.NORMAL}
        self.ids = {text: i for i, text in enumerate(self.texts) if text in self.ranks}
        self.byte_ids = [self.texts.index(f"<0x{byte:02X}>") for byte in range(256)]
        # No token crosses into a space unless some piece has a space inside: then no cuts.
        inside = any(re.search("[^\u2581]\u2581", text) for text in self.ranks)
        self.chunks = re.compile("(?s).+" if inside else "\u2581*[^\u2581]+|\u2581+").findall
        super().__init__(bos_id, eos_id, len(pieces))

    def check(self, trainer: dict, normaliser: dict, special: tuple) -> None:
        """Raises InputError about what the encoder below does not do."""
        for wrong, what in (
                (trainer.get(3, 1) != 2, "is no BPE model"),
                (not trainer.get(35), "has no byte fallback"),
                (normaliser.get(2), "changes characters (its normaliser is not identity)"),
                (normaliser.get(4, 1), "removes extra white space"),
                (not normaliser.get(5, 1) or trainer.get(24), "treats spaces otherwise"),
                ({4, 5} & set(self.types), "has user-defined or unused pieces"),
                ([self.types[i:i + 1] for i in special] != 2 * [[self.CONTROL]],
                 "has no start or no end of text")):
            if wrong:
                raise InputError(f"this SentencePiece model {what}, which is not supported")

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """As sentencepiece's encode, exactly."""
        text = self.prefix + text.replace(" ", "\u2581") if text else ""
        return super().encode(text, bos, eos)

    def encode_chunk(self, chunk: str) -> tuple:
        """Ids of a chunk of escaped text."""
        ids = []
        for part in merge(list(chunk), self.ranks):
            known = self.ids.get(part)
            ids += [self.byte_ids[byte] for byte in part.encode()] if known is None else [known]
        return tuple(ids)

    def decode(self, ids: list[int]) -> str:
        """As sentencepiece's decode, exactly: the space in front goes, control tokens leave no
        text, and of the bytes that are not UTF-8 each becomes U+FFFD."""
        text, run, first = [], bytearray(), bool(self.prefix)
        for i in [*ids, None]:
            if i is not None and self.types[i] == self.BYTE:
                run.append(int(self.texts[i][3:5], 16))          # "<0x41>"
                continue
            if run:
                shown = run.decode(errors="surrogateescape")
                text.append(re.sub("[\udc80-\udcff]", "\ufffd", shown))
                run, first = bytearray(), False
            if i is None or self.types[i] == self.CONTROL:
                continue
            piece = " \u2047 " if self.types[i] == self.UNKNOWN else self.texts[i]
            text.append((piece.removeprefix("\u2581") if first else piece).replace("\u2581", " "))
            first = False
        return "".join(text)


# Letters and numbers that Unicode 14, 15 and 16 added: tiktoken knows them, Python 3.10 none of
# them, and Python before 3.14 not all.
NEW_LETTERS = """
870-887 889-88E 8B5 8C8-8C9 C5D CDD 170D 171F 1B4C 1C89-1C8A 2C2F 2C5F 9FFD-9FFF A7C0-A7C1 A7CB-A7CD
A7D0-A7D1 A7D3 A7D5-A7DC A7F2-A7F4 10570-1057A 1057C-1058A 1058C-10592 10594-10595 10597-105A1
105A3-105B1 105B3-105B9 105BB-105BC 105C0-105F3 10780-10785 10787-107B0 107B2-107BA 10D4A-10D65
10D6F-10D85 10EC2-10EC4 10F70-10F81 11071-11072 11075 1123F-11240 11380-11389 1138B 1138E
11390-113B5 113B7 113D1 113D3 11740-11746 11AB0-11ABF 11BC0-11BE0 11F02 11F04-11F10 11F12-11F33
12F90-12FF0 1342F 13441-13446 13460-143FA 16100-1611D 16A70-16ABE 16D40-16D6C 18CFF 1AFF0-1AFF3
1AFF5-1AFFB 1AFFD-1AFFE 1B11F-1B122 1B132 1B155 1DF00-1DF1E 1DF25-1DF2A 1E030-1E06D 1E290-1E2AD
1E4D0-1E4EB 1E5D0-1E5ED 1E5F0 1E7E0-1E7E6 1E7E8-1E7EB 1E7ED-1E7EE 1E7F0-1E7FE 2A6DE-2A6DF
2B735-2B739 2EBF0-2EE5D 31350-323AF"""
NEW_NUMBERS = """
10D40-10D49 116D0-116E3 11BF0-11BF9 11F50-11F59 16130-16139 16AC0-16AC9 16D70-16D79 1CCF0-1CCF9
1D2C0-1D2D3 1E4F0-1E4F9 1E5F1-1E5FA"""


def character_class(letter: str, new: str) -> str:
    """Inside of a regular expression's [...]: all characters of a category, as \\p{L} or \\p{N}."""
    codes = {c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c))[0] == letter}
    for part in new.split():
        low, _, high = part.partition("-")
        codes |= set(range(int(low, 16), int(high or low, 16) + 1))
    starts = sorted(c for c in codes if c - 1 not in codes)
    ends = sorted(c for c in codes if c + 1 not in codes)
    return "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in zip(starts, ends))


@functools.cache
def split_pattern() -> re.Pattern:
    """Llama 3's split pattern, with the classes that re lacks spelt out.

    Its white space is Unicode's: without U+001C to U+001F, which re's \\s has. 's of any case
    includes the long s."""
    L, N = character_class("L", NEW_LETTERS), character_class("N", NEW_NUMBERS)
    S = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    return re.compile("|".join((
        "'(?:[sS\u017ftTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])",
        f"[^\r\n{L}{N}]?[{L}]+", f"[{N}]{{1,3}}",
        f" ?[^{S}{L}{N}]+[\r\n]*", f"[{S}]*[\r\n]+", f"[{S}]+(?![^{S}])", f"[{S}]+")))


class Tiktoken(Tokenizer):
    """A tiktoken rank file, as of Llama 3: lines of a token in base64 and its rank.

    256 special tokens follow the ranks; their ids are counted from the length of the file.
    """

    def __init__(self, data: bytes):
        lines = [line.split() for line in data.splitlines() if line.strip()]
        self.ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        self.tokens = list(self.ranks)
        count = len(self.tokens)
        if list(self.ranks.values()) != list(range(len(lines))):
            raise InputError("ranks are not 0, 1, 2, ...: the file is damaged")
        if not all(bytes([byte]) in self.ranks for byte in range(256)):
            raise InputError("has no token for some bytes: cut short, or not Llama 3's")
        # The names that Llama 3 and 3.1 share; the others are reserved.
        self.special = {"<|begin_of_text|>": count, "<|end_of_text|>": count + 1,
                        "<|start_header_id|>": count + 6, "<|end_header_id|>": count + 7,
                        "<|eot_id|>": count + 9}
        self.chunks = split_pattern().findall
        super().__init__(count, count + 1, count + 256)

    def encode_chunk(self, chunk: str) -> tuple:
        """Ids of one piece of text; a piece that is a token itself is not taken apart."""
        data = chunk.encode()
        if data in self.ranks:
            return (self.ranks[data],)
        parts = merge([data[i:i + 1] for i in range(len(data))], self.ranks)
        return tuple(self.ranks[part] for part in parts)

    def decode(self, ids: list[int]) -> str:
        """Text; special tokens leave none."""
        data = b"".join(self.tokens[i] for i in ids if i < len(self.tokens))
        return data.decode(errors="replace")


# ---------------------------------------------------------------------------------------------
# Data


class Example(NamedTuple):
    """A question as text, the answers to choose from (one if there is no choice), the right one."""
    prompt: str
    choices: list
    answer: int = 0


class Row(NamedTuple):
    """Token ids; those from `start` on are the answer, which is learned or scored."""
    tokens: list
    start: int


# Prompts of Stanford Alpaca, without and with an input; LLM-Adapters uses the same.
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately "
          "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n",
          "Below is an instruction that describes a task, paired with an input that provides "
          "further context. Write a response that appropriately completes the request.\n\n"
          "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n")
MAX_CHOICES = 10            # outputs of instruction data that recur, this many at most, are choices
GROUP = 16                   # batches whose examples are sorted by length together


def read_data(path: Path, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, test) examples of a folder with train.* and test.*, or of a file, a tenth of which
    is held out at random."""
    if path.is_dir():
        find = lambda *names: next((file for name in names for end in ("jsonl", "json", "txt")
                                    if (file := path / f"{name}.{end}").is_file()), None)
        files = find("train"), find("test", "dev", "valid", "validation", "val")
        if None in files:
            raise InputError(f"{path}: needs train and test (or dev, valid), each .jsonl, .json or "
                             ".txt")
        train, test = map(read_examples, files)
    else:
        examples = read_examples(path)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(examples), generator=generator).tolist()
        held = max(1, len(order) // 10)
        test, train = [examples[i] for i in order[:held]], [examples[i] for i in order[held:]]
    if not train or not test:
        raise InputError(f"{path}: {len(train)} training and {len(test)} test examples are too few")
    return share_choices(train, test)


def read_examples(path: Path) -> list[Example]:
    """Examples of a .json list or of .jsonl; of any other file, its text in parts of some lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as UTF-8 ({structlora.one_line(error)})") from None
    if path.suffix not in (".json", ".jsonl"):
        return [Example("", [part]) for part in re.findall(r"(?s).{1,4000}(?:\n|\Z)|.{4000}", text)]
    if path.suffix == ".jsonl":
        lines = {f"{path}:{n}": line for n, line in enumerate(text.split("\n"), 1) if line.strip()}
    else:
        lines = {str(path): text}
    records = {}
    for where, line in lines.items():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON: {structlora.one_line(error)}") from None
        records |= {where: value} if path.suffix == ".jsonl" or not isinstance(value, list) else {
            f"{where}: record {n}": each for n, each in enumerate(value, 1)}
    apart = path.with_name(f"{path.stem}-labels.lst")            # where PIQA keeps its answers
    labels = apart.read_text(errors="replace").split() if apart.is_file() else [None] * len(records)
    if len(labels) != len(records):
        raise InputError(f"{apart}: {len(labels)} labels for {len(records)} records")
    return [parse(record, where, label) for (where, record), label in zip(records.items(), labels)]


def parse(record: Any, where: str, label: str | None) -> Example:
    """One record as its authors publish it; BoolQ and PIQA put as in lm-evaluation-harness."""
    match record:
        case {"question": str(question), "passage": str(passage), "answer": bool(answer)}:
            prompt = f"{passage}\nQuestion: {question}?\nAnswer:"
            return Example(prompt, [" no", " yes"], int(answer))
        case {"goal": str(goal), "sol1": str(first), "sol2": str(second)}:
            if (label := str(record.get("label", label))) not in ("0", "1"):
                raise InputError(f"{where}: label {label} is not 0 or 1 (from a file *-labels.lst "
                                 "beside it, or a field label)")
            return Example(f"Question: {goal}\nAnswer:", [f" {first}", f" {second}"], int(label))
        case {"instruction": str(), "output": str(output)}:
            choices = record.get("choices", [output])
            if not isinstance(choices, list) or output not in choices:
                raise InputError(f"{where}: the output is not among the choices")
            if not all(isinstance(choice, str) for choice in choices):
                raise InputError(f"{where}: choices {choices} are not all texts")
            prompt = ALPACA[bool(record.get("input"))]
            return Example(prompt.format_map(record), choices, choices.index(output))
    raise InputError(f"{where}: expected instruction and output, or BoolQ's question, passage and "
                     "answer, or PIQA's goal, sol1 and sol2")


def share_choices(train: list, test: list) -> tuple[list, list]:
    """Instruction data of few different outputs is multiple choice among them: each example gets
    them all as choices. Text, and what has choices already, stays as it is."""
    outputs = sorted({e.choices[e.answer] for e in train + test})
    other = any(e.choices[1:] or not e.prompt for e in train + test)
    if other or not 2 <= len(outputs) <= min(MAX_CHOICES, len(train) // 2):
        return train, test
    return tuple([Example(e.prompt, outputs, outputs.index(e.choices[0])) for e in data]
                 for data in (train, test))


def choose(examples: list, shots: int | None, fraction: float | None, seed: int) -> list:
    """`shots` examples of each answer if all have the same choices, else in all; or a fraction."""
    shared = len({tuple(e.choices) for e in examples}) == 1
    answers = torch.tensor([e.answer if shared else 0 for e in examples])
    return [examples[i] for i in structlora.choose(answers, shots, fraction, seed).tolist()]


def encode_rows(tokenizer: Any, prompt: str, answer: str, length: int, eos: bool) -> list[Row]:
    """A row of at most `length` tokens, or as many as a text without a prompt takes: each starts
    with the last token of the one before.

    The answer is what the joint text has after the tokens that it shares with the prompt's: a space
    that ends the prompt may have become part of a word. Too long a prompt loses its beginning, but
    not the first token, and the answer stays whole."""
    tokens = tokenizer.encode(prompt + answer, eos=eos)
    if not prompt:
        return [Row(tokens[i:i + length], 1) for i in range(0, len(tokens) - 1, length - 1)]
    alone = tokenizer.encode(prompt)
    cut = next((i for i, (a, b) in enumerate(zip(alone, tokens)) if a != b), len(alone))
    tail = tokens[cut:][:length - 1]
    head = tokens[:1] + tokens[1:cut][max(0, cut + len(tail) - length):]
    return [Row(head + tail, len(head))]


def collate(rows: list[Row], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [N, T], zero on the right of short rows, and which of them are answers [N, T]."""
    N, T = len(rows), max(len(row.tokens) for row in rows)
    tokens, answers = torch.zeros(N, T, dtype=torch.long), torch.zeros(N, T, dtype=torch.bool)
    for n, row in enumerate(rows):
        tokens[n, :len(row.tokens)] = torch.tensor(row.tokens)
        answers[n, row.start:len(row.tokens)] = True
    return tokens.to(device), answers.to(device)


def rows_of_batch(rows: list, size: int, number: int, seed: int) -> list:
    """The `size` rows of batch `number`, of lengths alike; a pure function of its arguments."""
    group, place = divmod(number, GROUP)
    indices = structlora.batch_indices(len(rows), GROUP * size, group, seed).tolist()
    indices.sort(key=lambda i: len(rows[i].tokens))
    shuffled = torch.Generator().manual_seed(seed * 1_000_003 + group)
    at = int(torch.randperm(GROUP, generator=shuffled)[place]) * size
    return [rows[i] for i in indices[at:at + size]]


def answer_losses(model: nn.Module, batch: tuple) -> torch.Tensor:
    """Cross entropy of each answer token, [M] in nats, row by row."""
    tokens, answers = batch[0], batch[1][:, 1:]
    logits = model(tokens[:, :-1], select=answers)                               # [M, V]
    return F.cross_entropy(logits.float(), tokens[:, 1:][answers], reduction="none")


def score(model: nn.Module, rows: list[Row], args) -> torch.Tensor:
    """Negative log-likelihood [rows] of the answer of each row, in nats; long rows go first, so
    that what does not fit in memory shows at once."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))
    parts = [order[at:at + 2 * args.batch_size] for at in range(0, len(order), 2 * args.batch_size)]

    def nll(indices):
        batch = collate([rows[i] for i in indices], args.device)
        counts = [len(rows[i].tokens) - rows[i].start for i in indices]
        return torch.stack([part.sum() for part in answer_losses(model, batch).split(counts)]).cpu()

    return torch.cat(structlora.divided(nll, parts))[torch.tensor(order).argsort()]


def evaluate_rows(model: nn.Module, test: list[Example], rows: list[list[Row]], args) -> dict:
    """Scores of the test examples; `rows` are those of each: one per choice, or of its one text.

    accuracy: the choice of the highest log-likelihood per character is right, which is acc_norm of
    lm-evaluation-harness. loss: nats per token of the right answers; perplexity: its exp."""
    nll, at, right, loss, tokens = score(model, sum(rows, []), args), 0, [], 0.0, 0
    for example, mine in zip(test, rows):
        losses, at = nll[at:at + len(mine)], at + len(mine)
        if len(example.choices) > 1:
            characters = torch.tensor([max(1, len(text)) for text in example.choices])
            right.append(int((losses / characters).argmin()) == example.answer)
            losses, mine = losses[example.answer], mine[example.answer:][:1]
        loss += float(losses.sum())
        tokens += sum(len(row.tokens) - row.start for row in mine)
    result = {"loss": loss / tokens, "perplexity": math.exp(min(loss / tokens, 50))}
    return {"accuracy": sum(right) / len(right)} | result if right else result


# ---------------------------------------------------------------------------------------------
# Generation


@torch.no_grad()
def generate(model: Llama, tokens: torch.Tensor, max_new_tokens: int, temperature: float = 0.0,
             eos_id: int | None = None, real: torch.Tensor | None = None,
             embeddings: torch.Tensor | None = None) -> torch.Tensor:
    """Continues tokens [N, T] by at most max_new_tokens; returns the prompt and what follows it.

    Greedy at temperature 0, else sampled. After eos_id a row is filled with eos_id, and when all
    rows have ended it stops. Prompts of different lengths: pad on the left and give real [N, T]
    bool, False at padding. embeddings [N, T, D] stand in for a prompt with pictures in it. Call
    model.eval() first: gates are random in training mode.
    """
    N, T = tokens.shape
    cache, ended = Cache(model, N, T + max_new_tokens), torch.zeros(N, dtype=torch.bool)
    ended, new = ended.to(tokens.device), tokens
    for _ in range(max_new_tokens):
        last = torch.zeros_like(new, dtype=torch.bool)
        last[:, -1] = True
        logits = model(tokens=new, embeddings=embeddings, real=real, cache=cache,
                       select=last).float()                                      # [N, V]
        embeddings = None
        if temperature > 0:
            new = torch.multinomial((logits / temperature).softmax(-1), 1)       # [N, 1]
        else:
            new = logits.argmax(-1, keepdim=True)
        if eos_id is not None:
            new = new.masked_fill(ended[:, None], eos_id)
            ended |= new[:, 0] == eos_id
        tokens = torch.cat([tokens, new], 1)
        real = None if real is None else F.pad(real, (0, 1), value=True)
        if ended.all():
            break
    return tokens


def print_samples(model: Llama, tokenizer: Any, test: list[Example], args) -> None:
    """What the model answers to the first two questions of the test set, or how it goes on."""
    for example in test[:2]:
        text = example.prompt or example.choices[0][:100]
        ids = encode_rows(tokenizer, text, "", args.max_length, False)[0].tokens
        out = generate(model, torch.tensor([ids], device=args.device), 16, eos_id=tokenizer.eos_id)
        answer = tokenizer.decode(out[0, len(ids):].tolist())
        wanted = f" (right: {example.choices[example.answer]!r})" if example.prompt else ""
        print(f"sample: ...{text[-60:]!r} -> {answer!r}{wanted}", flush=True)


def make_task(train: list[Example], test: list[Example], tokenizer: Any, args,
              batch_size: int, share: slice = slice(None)) -> Task:
    """Cross entropy of the answer tokens of a batch, or of this rank's share of it; accuracy among
    the choices if there are any, and loss."""
    encode = lambda e, choice, eos: encode_rows(tokenizer, e.prompt, choice, args.max_length, eos)
    rows = [row for e in train for row in encode(e, e.choices[e.answer], True)]
    # An answer is scored without the end of text, unless it is nothing else.
    scored = [[row for choice in e.choices for row in encode(e, choice, not choice)] for e in test]
    seen = {"tokens": 0, "since": 0.0, "samples": False}

    def batch(number):
        chosen = rows_of_batch(rows, batch_size, number, args.seed)[share]
        seen["since"] = seen["since"] or time.perf_counter()
        seen["tokens"] += sum(len(row.tokens) for row in chosen)
        return collate(chosen, args.device)

    def evaluate(model):
        if seen["tokens"]:
            seconds = time.perf_counter() - seen["since"]
            print(f"{seen['tokens'] / seconds:,.0f} tokens per second")
        if seen["tokens"] or not seen["samples"]:        # the frozen model's are printed once only
            print_samples(model, tokenizer, test, args)
        seen.update(tokens=0, since=0.0, samples=True)
        return evaluate_rows(model, test, scored, args)

    return Task(batch, lambda model, batch: answer_losses(model, batch).mean(), evaluate,
                num_examples=sum(len(row.tokens) - row.start for row in rows),
                score="accuracy" if any(e.choices[1:] for e in test) else "perplexity",
                size=lambda batch: int(batch[1][:, 1:].sum()))


# ---------------------------------------------------------------------------------------------
# Demo: sentences that the script writes itself


NAMES = ("Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Karin Louis Maria Nadia Oscar "
         "Petra").split()
THINGS = "apple basket candle drum easel flute guitar hammer jacket kettle ladder mirror".split()
PLACES = "Athens Bergen Cairo Dublin Essen Florence Geneva Havana".split()


QUESTIONS = (("Who gave it?", "Who got it?", "What was it?", "Where was it?"),
             ("Giver:", "Receiver:", "Object:", "Place:"))


def write_examples(count: int, seed: int, shifted: bool) -> list[Example]:
    """`count` sentences, each with a question whose answer is one of its four facts; the facts are
    drawn anew each time, so that they can only be read. shifted: the questions become headings,
    which the pretrained model has never seen."""
    draw, examples = random.Random(seed), []
    for _ in range(count):
        giver, receiver = draw.sample(NAMES, 2)
        thing, place = draw.choice(THINGS), draw.choice(PLACES)
        sentence = draw.choice((f"The {thing} went from {giver} to {receiver} in {place}.",
                                f"In {place} the {thing} went to {receiver} from {giver}.",
                                f"From {giver} the {thing} went to {receiver} in {place}."))
        role, choices = draw.randrange(4), [giver, receiver, thing, place]
        answer = choices[role]
        draw.shuffle(choices)
        prompt = f"{sentence} {QUESTIONS[shifted][role]} "
        examples.append(Example(prompt, choices, choices.index(answer)))
    return examples


def save_meta(model: Llama, folder: Path, **more) -> None:
    """Writes `model` in Meta's layout, consolidated.00.pth and params.json; `more` goes into the
    latter. The reverse of read_meta, for the demo and the tests."""
    c, state = model.config, {}
    for name, tensor in model.state_dict().items():
        if ".q_proj." in name or ".k_proj." in name:             # halves of a head -> pairs of rows
            halves = tensor.view(-1, 2, c.head_dim // 2, c.dim)
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        state[name] = tensor.cpu()
    state = structlora.rename(folder, state, {ours: theirs for theirs, ours in META.items()})
    params = {"dim": c.dim, "n_layers": c.num_layers, "n_heads": c.num_heads,
              "n_kv_heads": c.num_kv_heads, "head_dim": c.head_dim, "vocab_size": c.vocab_size,
              "ffn_dim_multiplier": c.hidden_dim / int(8 * c.dim / 3),           # see meta_config
              "multiple_of": c.hidden_dim, "norm_eps": c.norm_eps, "rope_theta": c.rope_theta}
    folder.mkdir(parents=True, exist_ok=True)
    structlora.write_atomically(folder / "consolidated.00.pth", lambda t: torch.save(state, t))
    structlora.write_json(folder / "params.json", params | more)


def pretrained(source: list[Example], held: list[Example], tokenizer: Any, args,
               width: int = 64) -> Path:
    """Folder of a small LLaMA pretrained on `source`; kept under --out, and made anew when the
    options that it depends on have changed."""
    folder = Path(args.out) / "backbone"
    recipe = [args.data, args.tokenizer, args.pretrain_steps, args.max_length, args.seed, width]
    sizes = folder / "params.json"               # written last
    if structlora.has_backbone(sizes, structlora.read_json, recipe, args):
        return folder
    torch.manual_seed(args.seed)
    config = LlamaConfig(tokenizer.vocab_size, dim=width, num_layers=4, num_heads=width // 16,
                         num_kv_heads=width // 32, head_dim=16, hidden_dim=11 * width // 4)
    model = Llama(config).initialise().to(args.device)
    task = make_task(source, held, tokenizer, args, batch_size=16)
    structlora.pretrain(model, task, args, args.pretrain_steps, lr=4e-3)
    structlora.on_rank_zero(save_meta, model, folder, recipe=recipe)
    return folder


# ---------------------------------------------------------------------------------------------
# Main


def parse_options() -> Any:
    """The shared options and those of this script, checked."""
    p = structlora.make_parser(__doc__, rank=2, out="out/llama", batch_size=16, steps=200)
    p.add_argument("--tokenizer", help="a tokenizer.model; default: --checkpoint's, else bytes")
    p.add_argument("--max-length", type=structlora.positive(int), default=512, help="tokens of an "
                   "example; longer prompts lose their beginning")
    p.add_argument("--gradient-checkpointing", action="store_true", help="recompute the layers in "
                   "the backward pass: memory of one layer instead of all")
    p.add_argument("--pretrain-steps", type=structlora.positive(int), default=600)
    args = p.parse_args()
    structlora.check_options(args)
    if args.max_length < 2:
        raise InputError(f"--max-length {args.max_length}: must be at least 2")
    return args


def check_vocabulary(model: Llama, tokenizer: Any, folder: str | Path) -> None:
    """Raises InputError if the tokenizer is not the model's; embeddings may be padded a little."""
    tokens = model.config.vocab_size
    if not 0 <= tokens - tokenizer.vocab_size <= 256:
        raise InputError(f"{folder}: a model of {tokens} tokens and a tokenizer of "
                         f"{tokenizer.vocab_size}; name its tokenizer.model with --tokenizer")


def main() -> None:
    """Data, backbone, then the methods on the same examples; prints the table."""
    args = parse_options()
    folder = Path(args.checkpoint) if args.checkpoint else None
    own = folder and (folder / "tokenizer.model").is_file()
    tokenizer = load_tokenizer(args.tokenizer or folder) if args.tokenizer or own else Bytes()
    if args.data:
        train, test = read_data(Path(args.data), args.seed)
        source, held = ([Example("", [e.prompt or e.choices[0]]) for e in data]
                        for data in (train, test[:200]))
    else:
        seed = 10 * args.seed
        source, held = write_examples(8000, seed, False), write_examples(200, seed + 1, False)
        train, test = write_examples(8000, seed + 2, True), write_examples(500, seed + 3, True)
    shots = args.shots or (None if args.data or args.fraction else 128)          # the demo's few
    train = choose(train, shots, args.fraction, args.seed)
    task = make_task(train, test, tokenizer, args, *structlora.global_batch(args))
    if not folder:
        structlora.open_run(args.out, args)
        folder = pretrained(source, held, tokenizer, args)

    def load():
        model = load_llama(folder, getattr(torch, args.dtype), args.device)
        check_vocabulary(model, tokenizer, folder)
        model.gradient_checkpointing = args.gradient_checkpointing
        return model

    if args.checkpoint:          # read before anything is written, so that a bad file costs nothing
        load()
        structlora.open_run(args.out, args)
    structlora.compare(args, load, task, save_merged, LEARNING_RATES)


if __name__ == "__main__":
    raise SystemExit(structlora.run(main))
