"""Fine-tune a LLaMA with StructLoRA, or with LoRA to compare.

    python train_llama.py                             the embedded demo: no downloads, CPU
    python train_llama.py --checkpoint Llama-2-7b --data boolq --rank 8          one GPU
    ... --method lora      ... --resume      ... --eval-only      ... --merge

--checkpoint reads Meta's folders (consolidated.NN.pth, params.json), Hugging Face's (config.json,
pytorch_model*.bin) of LLaMA 1, 2, 3, 3.1 and 3.2, and what --merge writes. --data: {instruction,
input, output} (.json, .jsonl, .ndjson) or .txt, a file, or a folder of train.* and test.* (dev,
valid, val). The tokenizer.model is SentencePiece's or Llama 3's.
"""

import base64
import copy
import heapq
import json
import math
import random
import re
import struct
import time
import unicodedata
import zipfile
from collections import namedtuple
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as Parallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import train_vit as vit
from structlora import Config, attach, check_finite, load_torch, reading, write

# Tuned on the demo with seeds 100 to 102, not those reported; a checkpoint's is LLM-Adapters'.
LEARNING_RATES = {"lora": 4e-2, "lora4r": 2e-2, "structlora": 4e-2, "all": 2e-2, "checkpoint": 3e-4}


# --- Model: names and rotary layout are Hugging Face's, so that exported adapters fit its models

@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a LLaMA; the defaults are those of the 7B model."""
    vocab_size: int = 32000
    dim: int = 4096                  # width of the residual stream
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32           # fewer than num_heads: grouped-query attention
    head_dim: int = 128
    hidden_dim: int = 11008          # of the SwiGLU
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()         # of Llama 3.1: factor, low, high, length of pretraining
    tied: bool = False               # the output layer is the embedding


def rotary_frequencies(config: LlamaConfig, device: torch.device) -> torch.Tensor:
    """Radians per position of each pair of channels [head_dim / 2] (Su et al. 2021). Llama 3.1
    slows those of under `low` turns in its first context by `factor`, of over `high` not."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequency = config.rope_theta ** (-pairs / config.head_dim)
    if not config.rope_scaling:
        return frequency
    factor, low, high, length = config.rope_scaling
    turns = length * frequency / (2 * math.pi)                   # over the context of pretraining
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (keep + (1 - keep) / factor)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of queries or keys x [N, H, T, d] by cos and sin [T, d/2], in fp32.
    Channel i turns with i + d/2, as in Hugging Face's files. In Meta's 2i turns with 2i + 1."""
    a, b = x.chunk(2, -1)                                        # [N, H, T, d/2] each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention, [N, T, D] -> [N, T, D]."""

    def __init__(self, c: LlamaConfig, layer: int):
        super().__init__()
        self.head_dim, self.layer = c.head_dim, layer
        self.q_proj = nn.Linear(c.dim, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.dim, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.dim, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.dim, bias=False)

    def forward(self, x, rotary, mask, cache=None):
        N, T, _ = x.shape
        q, k, v = (proj(x).view(N, T, -1, self.head_dim).transpose(1, 2)     # [N, H or H_kv, T, d]
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:                                    # layer: k, v of the tokens so far
            if self.layer in cache:
                k, v = (torch.cat(pair, 2) for pair in zip(cache[self.layer], (k, v)))
            cache[self.layer] = k, v                                         # [N, H_kv, S, d]
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1,
                                           enable_gqa=True)                  # [N, H, T, d]
        return self.o_proj(y.transpose(1, 2).reshape(N, T, -1))


class Block(nn.Module):
    """Pre-norm transformer block, [N, T, D] -> [N, T, D]: attention, then SwiGLU (Shazeer 2020)."""

    def __init__(self, c: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.dim, c.norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = nn.RMSNorm(c.dim, c.norm_eps)
        self.mlp = nn.Module()
        self.mlp.gate_proj = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.mlp.up_proj = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.mlp.down_proj = nn.Linear(c.hidden_dim, c.dim, bias=False)

    def forward(self, x, rotary, mask, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        h, mlp = self.post_attention_layernorm(x), self.mlp
        return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))


class Llama(nn.Module):
    """LLaMA (Touvron et al. 2023): tokens [N, T] -> logits [N, T, V]."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        c = self.config = config
        self.sizes = {"llama": asdict(config)}       # what --merge writes beside the weights
        self.gradient_checkpointing = False          # recompute each block in the backward pass
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.dim)
        self.model.layers = nn.ModuleList(Block(c, layer) for layer in range(c.num_layers))
        self.model.norm = nn.RMSNorm(c.dim, c.norm_eps)
        self.lm_head = nn.Linear(c.dim, c.vocab_size, bias=False)
        if c.tied:                                   # the output layer is the embedding
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens=None, embeddings=None, cache=None, select=None):
        """Logits [N, T, V]. embeddings [N, T, D] may stand in for tokens. cache: {} at first; keeps
        keys and values for the tokens of the next call. select [N, T] bool: logits [M, V] of the M
        places marked, row by row. Causal: padding on the right of short rows needs no mask."""
        x = self.model.embed_tokens(tokens) if embeddings is None else embeddings
        T, past, mask = x.shape[1], cache[0][0].shape[2] if cache else 0, None
        key = torch.arange(past + T, device=x.device)                            # [S]
        angle = key[past:, None] * rotary_frequencies(self.config, x.device)     # [T, d/2]
        rotary = angle.cos(), angle.sin()
        if past and T > 1:
            mask = key <= key[past:, None]                                       # [T, S]
        for block in self.model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, mask, use_reentrant=False)
            else:
                x = block(x, rotary, mask, cache)                                # [N, T, D]
        return self.lm_head(self.model.norm(x if select is None else x[select]))


@torch.no_grad()
def generate(model: Llama, tokens: torch.Tensor, max_new_tokens: int, temperature: float = 0.0,
             eos_id: int | None = None, embeddings=None) -> torch.Tensor:
    """tokens [N, T] and at most max_new_tokens after them: greedy at temperature 0, else sampled;
    after eos_id a row is filled with it. embeddings [N, T, D] may stand in for the prompts, which
    are of one length. Call model.eval() first: in training mode gates are random."""
    cache, new = {}, tokens
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        last = torch.arange(new.shape[1], device=new.device) == new.shape[1] - 1
        logits = model(tokens=new, embeddings=embeddings, cache=cache,
                       select=last.expand_as(new)).float()                       # [N, V]
        new, embeddings = logits.argmax(-1, keepdim=True), None                  # [N, 1]
        if temperature > 0:
            new = torch.multinomial((logits / temperature).softmax(-1), 1)
        if eos_id is not None:
            new = new.masked_fill(ended[:, None], eos_id)
            ended |= new[:, 0] == eos_id
        tokens = torch.cat([tokens, new], 1)
        if ended.all():
            break
    return tokens


# --- Fine-tuning

def fine_tune(args, config: Config, lr: float, model: nn.Module, rows: list, num_examples: int,
              evaluate, name: str, out: Path, digest: str, make_batch, losses_of, also=()) -> dict:
    """One run: attach, train, export, score -> its row of the table. In the end `model` is frozen
    again, or with --merge merged. num_examples: tokens that the rows predict. make_batch(rows,
    device): a tuple, last which tokens are answers [N, T]; losses_of(model, it): their nats."""
    torch.manual_seed(args.seed)
    adapters = attach(model, config)                             # freezes all that was there
    nn.ModuleList(also).float().requires_grad_(True)
    model.gradient_checkpointing = args.gradient_checkpointing
    optimizer = torch.optim.AdamW(adapters.param_groups(lr), fused=True)
    lines = vit.resume_run(out, adapters, optimizer, args, digest)           # of metrics.jsonl
    schedule = LambdaLR(optimizer, lambda n: vit.warmup_cosine(n, args.steps), len(lines) - 1)
    (rank, world), parallel = vit.processes(), model
    if world > 1:                                                # torchrun; the probes end
        parallel = Parallel(model, find_unused_parameters=True, broadcast_buffers=False)
    model.train()
    for step in tqdm(range(len(lines), args.steps), name, disable=None, leave=False):
        began, total = time.perf_counter(), torch.zeros((), device=args.device)
        torch.manual_seed((args.seed * args.steps + step) * world + rank)        # --resume needs it
        parts = [rows_of_batch(rows, args.batch_size * world, n, args.seed)[rank::world]
                 for n in range(step * args.accumulate, (step + 1) * args.accumulate)]
        batches = [make_batch(part, args.device) for part in parts]
        labels = sum(batch[-1][:, 1:].sum() for batch in batches)
        if world > 1:
            torch.distributed.all_reduce(labels)
        for batch in batches:
            with vit.autocast(args):     # a mean over all labels; that of processes is taken later
                loss = losses_of(parallel, batch).sum() * world / labels
            (loss + adapters.penalty(num_examples) / args.accumulate).backward()         # Eq. 4
            total += loss.detach() / world
        if world > 1:
            torch.distributed.all_reduce(total)
        adapters.observe_gradients()                             # Eq. 6: they choose the edges
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        adapters.prune((step + 1) / args.steps)                  # Eq. 8
        lines.append({"step": step + 1, "loss": total.item(),            # waits for the device
                      "lr": lr * vit.warmup_cosine(step, args.steps),
                      "ms": 1e3 * (time.perf_counter() - began)})
        vit.save_run(out, adapters, optimizer, lines, args, digest)
    costs = vit.costs(adapters, lines)
    if rank == 0:                                                # before anything else can fail
        adapters.export_peft(out / "adapter_peft", base=args.checkpoint)
    if args.merge and adapters.merge() and rank == 0:
        write(out / "merged.pt", model.sizes | {"model": model.state_dict()})
    row = {"method": name} | evaluate(model.eval()) | costs
    adapters.detach()                                            # nothing to do after merge()
    return row


def answer_losses(model: nn.Module, batch: tuple) -> torch.Tensor:
    """Cross entropy of each answer token, [M] in nats, row by row."""
    tokens, answers = batch[0], batch[1][:, 1:]
    logits = model(tokens[:, :-1], select=answers)                               # [M, V]
    return F.cross_entropy(logits.float(), tokens[:, 1:][answers], reduction="none")


@torch.no_grad()
def evaluate(model: Llama, tokenizer: Any, test: list, args) -> dict[str, float]:
    """accuracy: the likeliest choice per character is right, acc_norm of lm-evaluation-harness; or
    perplexity if there are no choices. loss: nats per token of right answers. Prints a sample."""
    right, own = [], []
    for prompt, choices, answer in test:
        rows = [row for text in choices  # without the end of text, unless it is nothing else
                for row in encode_rows(tokenizer, prompt, text, args.max_length, not text)]
        losses = answer_losses(model.eval(), collate(rows, args.device))
        losses = losses.split([len(row.tokens) - row.start for row in rows])
        own += [losses[answer]] if prompt else losses
        if len(choices) > 1:
            score = [float(loss.sum()) / max(1, len(text)) for loss, text in zip(losses, choices)]
            right.append(score.index(min(score)) == answer)
    ids = tokenizer.encode(test[0].prompt or test[0].choices[0][:100])
    out = generate(model, torch.tensor([ids], device=args.device), 16, eos_id=tokenizer.eos_id)[0]
    print(f"...{tokenizer.decode(ids)[-60:]!r} -> {tokenizer.decode(out[len(ids):].tolist())!r}")
    loss = float(torch.cat(own).mean())
    if right:
        return {"accuracy": sum(right) / len(right), "loss": loss}
    return {"perplexity": math.exp(min(loss, 50)), "loss": loss}


def main() -> None:
    """Data, backbone, then the runs of this command line, on the same examples."""
    args = vit.options(
        __doc__, out=("out/llama", "folder for all results"),
        tokenizer=(str, "tokenizer.model, if it is not in the checkpoint's folder"),
        max_length=(512, "tokens of an example; a longer prompt loses its beginning"),
        gradient_checkpointing=(False, "compute blocks twice, to save memory"))
    path, tokenizer, shots = args.checkpoint, Bytes(), args.shots
    runs, dtype = vit.trials(args, LEARNING_RATES), getattr(torch, args.dtype)
    if path:
        train, test = read_data(args.data, args.seed)
        if args.tokenizer or Path(path, "tokenizer.model").exists():
            tokenizer = load_tokenizer(args.tokenizer or path)
        model = load_llama(path, dtype, args.device)
        check_vocabulary(model, tokenizer, path)
    else:
        model, shots = Llama(SMALL), shots or (None if args.fraction else 32)
        train, test = (write_examples(n, 10 * args.seed + n, True) for n in (8000, 500))
    answers = torch.tensor([e.answer for e in train])            # --shots are of each
    train = [train[i] for i in vit.choose(answers, shots, args.fraction, args.seed)]
    rows = [row for e in train for row in encode_rows(tokenizer, e.prompt, e.choices[e.answer],
                                                      args.max_length, eos=bool(e.prompt))]
    num_examples = sum(len(row.tokens) - row.start for row in rows)          # predicted tokens
    score = vit.autocast(args)(partial(evaluate, tokenizer=tokenizer, test=test, args=args))
    vit.check_runs(model, runs, len(rows))
    model = model if path else pretrained(args).to(dtype)
    name, digest = vit.adapters_beside(model, args), vit.fingerprint(rows, test)
    table = [{"method": name} | score(model)]
    for name, out, config, lr in runs:
        fresh = model if path else copy.deepcopy(model)          # --merge changes it
        table.append(fine_tune(args, config, lr, fresh, rows, num_examples, score, name, out,
                               digest, collate, answer_losses))
    vit.print_table(table)


# --- Checkpoints

# What the components of Meta's names become in ours.
META = {"tok_embeddings": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm",
        "output": "lm_head", "attention": "self_attn", "wq": "q_proj", "wk": "k_proj",
        "wv": "v_proj", "wo": "o_proj", "feed_forward": "mlp", "w1": "gate_proj", "w2": "down_proj",
        "w3": "up_proj", "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm"}
# Keys of params.json, config.json and its rotary part that are read; IDLE: that change nothing.
PARAMS = ("dim n_layers n_heads n_kv_heads head_dim vocab_size multiple_of ffn_dim_multiplier "
          "norm_eps rope_theta use_scaled_rope rope_scaling_factor").split()
SETTINGS = ("vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim intermediate_size rms_norm_eps rope_theta rope_scaling rope_parameters "
            "tie_word_embeddings").split()
SCALING = "factor low_freq_factor high_freq_factor original_max_position_embeddings".split()
IDLE = (*vit.IGNORED, *("max_batch_size max_seq_len max_position_embeddings max_sequence_length "
                        "attention_dropout bos_token_id eos_token_id pad_token_id pretraining_tp "
                        "use_cache").split())


def load_llama(directory: str | Path, dtype=torch.bfloat16, device: str = "cpu") -> Llama:
    """Reads a LLaMA from a folder in Meta's or in Hugging Face's layout, or from what --merge
    wrote, in eval mode. Raises ValueError that names the file and what is wrong."""
    with reading(directory):
        config, parts = read_checkpoint(directory)
        if config.num_layers > len(parts):                       # else they would all be built
            raise ValueError(f"{config.num_layers} layers: not in the files")
        with torch.device("meta"):                               # takes no memory yet
            model = Llama(config)
        return assemble(model, parts, dtype, device)


def assemble(model: Llama, parts: dict[str, list], dtype: torch.dtype, device: str) -> Llama:
    """Puts the weights, each in the parts of model-parallel files, into `model`, which is on the
    meta device. They are converted as they leave the mapped files: host memory holds them once."""
    state, shapes = {}, {name: weight.shape for name, weight in model.state_dict().items()}
    for name, part in parts.items():
        if not all(tensor.is_floating_point() for tensor in part):
            raise ValueError(f"{name} is {part[0].dtype}: quantised; give the original")
        slices = [tensor.to(device).to(dtype).contiguous() for tensor in part]
        cut = [a != b for a, b in zip(slices[0].shape, shapes.get(name, ()))]    # along which axis
        state[name] = torch.cat(slices, cut.index(True)) if any(cut) else slices[0]
    check_finite(state)
    if model.config.tied:                    # one parameter, though the file may hold it twice
        state["lm_head.weight"] = tied = nn.Parameter(state["model.embed_tokens.weight"])
        state["model.embed_tokens.weight"] = tied
    model.load_state_dict(state, assign=True)
    return model.eval()


def read_checkpoint(directory: str | Path, also=()) -> tuple[LlamaConfig, dict[str, list]]:
    """The sizes and the parts of each weight in a folder of Meta's or Hugging Face's, or in what
    --merge wrote. also: keys of config.json that the caller reads or passes over."""
    path, parts = Path(directory), {}
    with reading(path):
        if path.is_file():
            file = load_torch(path) if zipfile.is_zipfile(path) else ()  # GGUF is none
            if not {"llama", "model"} <= {*file}:
                raise ValueError("not what --merge writes: of any other model give the folder")
            return LlamaConfig(**file["llama"]), {name: [t] for name, t in file["model"].items()}
        meta, theirs = sorted(path.glob("consolidated.*.pth")), [*path.glob("pytorch_model*.bin")]
        if meta and theirs:
            raise ValueError(f"holds {meta[0].name} and {theirs[0].name}: leave one of the two")
        for file in meta or vit.weight_files(path):
            for name, tensor in read_state(file).items():
                parts.setdefault(name, []).append(tensor)        # Meta's come in several files
        if meta:
            return read_meta(path / "params.json", {file.name for file in meta}, parts)
        if twice := [name for name, part in parts.items() if len(part) > 1]:
            raise ValueError(f"{twice[0]} is in two of the files")
        return huggingface_config(path / "config.json", also), parts


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, without compile's and DataParallel's prefixes and rotary tables."""
    with reading(path):
        return {key.replace("_orig_mod.", "").removeprefix("module."): tensor
                for key, tensor in load_torch(path).items()
                if not key.endswith(("rope.freqs", "rotary_emb.inv_freq"))}


def read_meta(path: Path, files: set, parts: dict) -> tuple[LlamaConfig, dict[str, list]]:
    """Sizes from params.json, weights by our names. Before Llama 3 vocab_size is -1: the embedding
    says it, cut by rows or by columns. Llama 3.2 stores its tied output too. With use_scaled_rope
    Meta's code stretches by 8; its Hugging Face files of 3.2 say 32, which we follow if tied."""
    with reading(path):
        p, embeddings = vit.read_json(path), parts["tok_embeddings.weight"]
        vit.only(p, PARAMS, IDLE)                                # others mean another model
        embedding, output = embeddings[0], parts.get("output.weight", embeddings)[0]
        tied = output.shape == embedding.shape and torch.equal(output, embedding)
        rows = len(embedding) * (len(embeddings) if embedding.shape[1] == p["dim"] else 1)
        hidden = int((p.get("ffn_dim_multiplier") or 1) * int(8 * p["dim"] / 3))
        multiple, heads = p.get("multiple_of", 256), p["n_heads"]
        scaling = (p.get("rope_scaling_factor") or (32.0 if tied else 8.0), 1.0, 4.0, 8192)
        c = LlamaConfig(rows, p["dim"], p["n_layers"], heads, p.get("n_kv_heads") or heads,
                        p.get("head_dim") or p["dim"] // heads, -(-hidden // multiple) * multiple,
                        p["norm_eps"], p.get("rope_theta") or 10000.0,
                        scaling if p.get("use_scaled_rope") else (), tied)
    count = c.num_heads * c.head_dim // len(parts["layers.0.attention.wq.weight"][0])
    wanted = {f"consolidated.{number:02d}.pth" for number in range(min(count, 1000))}
    if wrong := wanted ^ files:
        raise ValueError(f"{min(wrong)} is missing, or too many: the weights are in {count} files")
    result = {}
    for key, part in parts.items():
        if key.endswith(("wq.weight", "wk.weight")):    # rows 2i, 2i + 1 of a head turn together;
            pairs = [tensor.unflatten(0, (-1, c.head_dim // 2, 2)) for tensor in part]
            part = [pair.transpose(1, 2).flatten(0, 2) for pair in pairs]        # ours i, i + d/2
        result[".".join(META.get(component, component) for component in key.split("."))] = part
    return c, result


def huggingface_config(path: Path, also=()) -> LlamaConfig:
    """Sizes from config.json; what this model has no part for is refused, not ignored."""
    with reading(path):
        c = vit.read_json(path)
        if "text_config" in c:
            raise ValueError("the layout of llava-hf: not supported")
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}   # transformers 5, before
        kind = rope.get("rope_type") or rope.get("type") or "default"
        types = ("llama", "llava", "llava_llama") if also else ("llama",)
        if c.get("model_type", "llama") not in types or kind not in ("default", "llama3"):
            raise ValueError(f"{c.get('model_type')} with rotary type {kind}: not supported")
        vit.only(c, dict.fromkeys((*SETTINGS, "model_type", *also)) | {"hidden_act": "silu"}, IDLE)
        keys = SCALING if kind == "llama3" else []               # a factor alone is not read
        vit.only(rope, ("rope_type", "type", "rope_theta", *keys))
        heads = c["num_attention_heads"]
        return LlamaConfig(
            c["vocab_size"], c["hidden_size"], c["num_hidden_layers"], heads,
            c.get("num_key_value_heads") or heads, c.get("head_dim") or c["hidden_size"] // heads,
            c["intermediate_size"], c.get("rms_norm_eps", 1e-6),
            rope.get("rope_theta") or c.get("rope_theta") or 10000.0,
            tuple(rope[key] for key in keys), bool(c.get("tie_word_embeddings", False)))


# --- Tokenizers

def load_tokenizer(path: str | Path) -> "Bytes":
    """A tokenizer.model (or the folder of one) of SentencePiece or tiktoken, told by its content:
    .encode(text, bos=True, eos=False) -> ids, .decode(ids), .bos_id, .eos_id, .vocab_size."""
    path = Path(path, "tokenizer.model") if Path(path).is_dir() else Path(path)
    with reading(path):
        if not path.is_file() or path.suffix == ".json":
            raise ValueError("is not there, or not read: name a tokenizer.model with --tokenizer")
        data = path.read_bytes()
        return SentencePiece(data) if data[:1] == b"\n" else RankFile(data)


def check_vocabulary(model: Llama, tokenizer: Any, path: str | Path) -> None:
    """Raises ValueError if the tokenizer is not the model's; embeddings may be padded a little."""
    spare = model.config.vocab_size - tokenizer.vocab_size
    if not 0 <= spare <= (256 if isinstance(tokenizer, (SentencePiece, RankFile)) else 0):
        raise ValueError(f"{path}: a model of {model.config.vocab_size} tokens and a tokenizer of "
                         f"{tokenizer.vocab_size}; name its tokenizer.model with --tokenizer")


def bpe(parts: list, ranks: dict) -> list:
    """Byte-pair encoding of parts of length 1: joins the neighbours whose union ranks lowest, the
    leftmost of equals first, until no union is in `ranks`: bpe(["a", "b", "a", "b"], {"ab": 0}) is
    ["ab", "ab"]. With a queue of unions: to search all pairs each time is quadratic."""
    n, queue = len(parts), []
    left = list(range(-1, n))        # left[i]: where the part starts that ends before place i

    def push(i: int, j: int) -> None:
        if i >= 0 and j < n and (union := parts[i] + parts[j]) in ranks:
            heapq.heappush(queue, (ranks[union], i, union))

    for i in range(n - 1):
        push(i, i + 1)
    while queue:
        _, i, union = heapq.heappop(queue)
        j, end = i + len(parts[i]), i + len(union)
        if j < n and parts[i] + parts[j] == union:               # none was joined with others since
            parts[i], parts[j], left[end] = union, parts[j][:0], i
            push(i, end)
            push(left[i], i)
    return [part for part in parts if part]


class Bytes:
    """No vocabulary: a token per byte of UTF-8, then the two special ones. The other tokenizers
    have chunks of text that no token crosses, and bpe() for the ids of a chunk."""
    tokens, bos_id, eos_id, vocab_size = [bytes([byte]) for byte in range(256)], 256, 257, 258
    chunks, encode_chunk = re.compile("(?s).+").findall, staticmethod(str.encode)

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """encode("hi") -> [256, 104, 105]; the text of a special token is text as any other."""
        # Surrogates are paired, and U+FFFD where one is alone: they have no UTF-8 form.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = [self.bos_id] if bos else []
        for chunk in self.chunks(text):
            ids += self.encode_chunk(chunk)
        return ids + [self.eos_id] if eos else ids

    def decode(self, ids: list[int]) -> str:
        """Text; special tokens leave none."""
        known = [self.tokens[i] for i in ids if i < len(self.tokens)]
        return b"".join(known).decode(errors="replace")


def protobuf(data: bytes) -> Iterator[tuple]:
    """(field number, value) of a message: an int, or bytes (strings, messages, fixed widths)."""
    def varint(at: int) -> tuple[int, int]:                      # seven bits a byte, lowest first
        digits = re.compile(rb"[\x80-\xff]*[\x00-\x7f]").match(data, at)[0]
        return sum((byte & 127) << 7 * i for i, byte in enumerate(digits)), at + len(digits)

    at = 0
    while at < len(data):
        key, at = varint(at)
        size, at = varint(at) if key & 7 in (0, 2) else ({1: 8, 5: 4}[key & 7], at)
        value, at = (data[at:at + size], at + size) if key & 7 else (size, at)
        yield key >> 3, value
    if at > len(data):
        raise ValueError("cut short")


# Settings of a SentencePiece model that change ids: message, field, name, default, LLaMA's value.
SENTENCEPIECE = ((2, 3, "model_type", 1, 2), (2, 24, "treat_whitespace_as_suffix", 0, 0),
                 (2, 35, "byte_fallback", 0, 1), (3, 2, "precompiled_charsmap", b"", b""),
                 (3, 4, "remove_extra_whitespaces", 1, 0), (3, 5, "escape_whitespaces", 1, 1))


class SentencePiece(Bytes):
    """A SentencePiece BPE model, as of LLaMA 1 and 2 (Kudo and Richardson 2018): spaces are U+2581,
    one goes in front, the union of the highest score is made first, what has no piece is bytes."""
    chunks = re.compile("\u2581*[^\u2581]+|\u2581+").findall     # no token crosses into a space

    def __init__(self, data: bytes):
        message = list(protobuf(data))                           # 1: a piece; 2, 3: settings
        pieces = [{2: bytes(4), 3: 1} | dict(protobuf(value))    # 1: text, 2: score, 3: kind
                  for field, value in message if field == 1]
        specs = {number: dict(protobuf(dict(message)[number])) for number in (2, 3)}
        for number, field, name, default, wanted in SENTENCEPIECE:
            if (value := specs[number].get(field, default)) != wanted:
                raise ValueError(f"{name} is {value!r:.40}, not {wanted!r} as of LLaMA's models")
        texts, kinds = [piece[1].decode() for piece in pieces], [piece[3] for piece in pieces]
        for text, kind in zip(texts, kinds):
            if kind not in (1, 2, 3, 6) or kind == 1 and re.search("[^\u2581]\u2581", text):
                raise ValueError(f"piece {text!r} is the user's, unused, or crosses into a space")
        self.bos_id, self.eos_id = texts.index("<s>"), texts.index("</s>")
        self.ids = {text: [i] for i, text in enumerate(texts) if kinds[i] == 1}  # normal pieces
        self.prefix, self.vocab_size = "\u2581" * specs[3].get(3, 1), len(pieces)
        self.ranks = {t: -struct.unpack("<f", pieces[i][2])[0] for t, (i,) in self.ids.items()}
        self.byte_ids = [texts.index(f"<0x{byte:02X}>") for byte in range(256)]
        self.tokens = [text.encode() if text in self.ids else b"" for text in texts]
        for byte, i in enumerate(self.byte_ids):
            self.tokens[i] = bytes([byte])
        self.encode_chunk = lru_cache(2 ** 16)(self.encode_chunk)  # most words come again

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        return super().encode(self.prefix * bool(text) + text.replace(" ", "\u2581"), bos, eos)

    def encode_chunk(self, chunk: str) -> list[int]:
        ids = []
        for part in bpe(list(chunk), self.ranks):
            ids += self.ids.get(part) or [self.byte_ids[byte] for byte in part.encode()]
        return ids

    def decode(self, ids: list[int]) -> str:
        return super().decode(ids).removeprefix(self.prefix).replace("\u2581", " ")


class RankFile(Bytes):
    """A tiktoken rank file, as of Llama 3: lines of a token in base64 and its rank; 256 special
    tokens follow. Exact for the letters and numbers that the running Python knows."""

    def __init__(self, data: bytes):
        lines = [line.split() for line in data.splitlines() if line.strip()]
        self.ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        self.tokens, count = list(self.ranks), len(lines)
        if [*self.ranks.values()] != [*range(count)] or not {*Bytes.tokens} <= {*self.ranks}:
            raise ValueError("damaged or cut short: no ranks 0, 1, 2, ... of all single bytes")
        self.bos_id, self.eos_id, self.vocab_size = count, count + 1, count + 256
        # re has neither \p{N} nor \p{L}: letters are what \w has besides numbers and _. Its \s has
        # U+001C to U+001F, which are no white space here. 's of any case includes the long s.
        N = "".join(c for c in map(chr, range(0x110000)) if unicodedata.category(c)[0] == "N")
        S, mark = r"[^\S\x1c-\x1f]", r"(?:[^\s\w]|[\x1c-\x1f_])"
        self.chunks = re.compile(
            "'(?:[sS\u017ftTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|"
            rf"(?:[^\r\n\w]|_)?[^\W_{N}]+|[{N}]{{1,3}}| ?{mark}+[\r\n]*|"
            rf"{S}*[\r\n]+|{S}+(?!{mark}|\w)|{S}+").findall
        self.encode_chunk = lru_cache(2 ** 16)(self.encode_chunk)  # most words come again

    def encode_chunk(self, chunk: str) -> list[int]:
        data = chunk.encode()            # a token is taken whole, though no joins may lead to it
        parts = [data] if data in self.ranks else bpe([bytes([byte]) for byte in data], self.ranks)
        return [self.ranks[part] for part in parts]


# --- Data

# A question as text, the answers to choose from (one if there is no choice), which one is right.
Example = namedtuple("Example", "prompt choices answer")
# Token ids; those from `start` on are the answer, which is learned or scored.
Row = namedtuple("Row", "tokens start")
# Stanford Alpaca's prompt, which LLM-Adapters uses too, and what an input adds to it.
ALPACA = ("Below is an instruction that describes a task{}. Write a response that appropriately "
          "completes the request.\n\n### Instruction:\n{}\n\n{}### Response:\n")
INPUT = (", paired with an input that provides further context", "### Input:\n{}\n\n")
KINDS = ".json .jsonl .ndjson .txt".split()
# Keys of a record that are no part of its text, and are passed over; any other is refused.
BOOKKEEPING = ("id idx index uid uuid hash source dataset category topic subject task type split "
               "language difficulty score answer url license author date model metadata").split()


def read_data(path: str | Path, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, test) examples of a folder with train.* and test.*, or of a file, a tenth of which
    is held out at random. Instructions of at most ten different outputs, white space around them
    aside, become multiple choice."""
    path = Path(path)
    with reading(path):
        if path.is_dir():
            files = {}
            for file in sorted(f for f in path.iterdir() if f.suffix.lower() in KINDS):
                if (first := files.setdefault(file.stem.lower(), file)) != file:
                    raise ValueError(f"{first.name} and {file.name}: leave one of them")
            tests = [n for n in ("test", "dev", "valid", "validation", "val") if n in files]
            if "train" not in files or not tests:
                raise ValueError(f"needs train and test (or dev, valid, val) of {KINDS}")
            print(f"{path}: {files['train'].name} to train on, {files[tests[0]].name} to test on")
            train, test = (read_examples(files[name]) for name in ("train", tests[0]))
        else:
            train = read_examples(path)
            random.Random(seed).shuffle(train)
            held = max(1, len(train) // 10)
            train, test = train[held:], train[:held]
        labels = sorted({e.choices[0].strip() for e in train + test})
        if not train or not test or not "".join(labels):
            raise ValueError("too few examples, or every output is empty: is the answer elsewhere?")
    if all(e.prompt for e in train + test) and 2 <= len(labels) <= min(10, len(train) // 2):
        for part in (train, test):
            part[:] = [Example(e.prompt, labels, labels.index(e.choices[0].strip())) for e in part]
    return train, test


def read_examples(path: Path) -> list[Example]:
    """Records of a .json, .jsonl or .ndjson file, or a .txt file in parts of some lines."""
    with reading(path):
        if path.suffix.lower() not in KINDS:
            raise ValueError(f"must be one of {KINDS}")
        text, examples = path.read_text(encoding="utf-8-sig"), []
        if path.suffix.lower() == ".txt":
            size = max(100, min(4000, len(text) // 20))
            parts = re.findall(rf"(?s).{{1,{size}}}(?:\n|\Z)|.{{{size}}}", text)
            return [Example("", [part], 0) for part in parts]
        records = [line for line in text.split("\n") if line.strip()]    # one a line, or a list
        records = json.loads(text) if text.lstrip().startswith("[") else records
        for number, record in enumerate(records, 1):
            with reading(f"{path}: record {number}"):
                record = json.loads(record) if isinstance(record, str) else record
                examples.append(parse(record))
        return examples


def parse(record: Any) -> Example:
    """A record {instruction, input, output} as a question; its input may be absent, null or NaN."""
    match record:
        case {"instruction": str(instruction), "output": str(output)}:
            vit.only(record, ("instruction", "input", "output"), BOOKKEEPING)
            given = record.get("input")
            given = "" if given is None or given != given else given     # NaN: none
            if isinstance(given, (str, int, float)):
                context, block = INPUT if given != "" else ("", "")
                prompt = ALPACA.format(context, instruction, block.format(given))
                return Example(prompt, [output], 0)
    raise ValueError(f"expected texts called instruction and output (and input): {record!r:.60}")


def encode_rows(tokenizer: Bytes, prompt: str, answer: str, length: int, eos: bool) -> list[Row]:
    """A row for prompt and answer, or as many as a text without a prompt takes; the model sees
    `length` tokens of each. The answer is what the joint text has after the tokens it shares with
    the prompt's. Too long a prompt loses its beginning, but not the first token."""
    tokens = tokenizer.encode(prompt + answer, eos=eos)
    if not prompt:                   # each row starts with the last token of the one before
        return [Row(tokens[i:i + length + 1], 1) for i in range(0, len(tokens) - 1, length)]
    alone = tokenizer.encode(prompt)
    cut = next((i for i, (a, b) in enumerate(zip(alone, tokens)) if a != b), len(alone))
    tail = tokens[cut:][:length]
    head = tokens[:1] + tokens[1:cut][max(0, cut + len(tail) - length - 1):]
    return [Row(head + tail, len(head))]


def collate(rows: list[Row], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [N, T], zero on the right of short rows, and which of them are answers [N, T]."""
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(row.tokens) for row in rows], batch_first=True)
    answers = [torch.arange(len(row.tokens)) >= row.start for row in rows]
    answers = nn.utils.rnn.pad_sequence(answers, batch_first=True)
    return tokens.to(device), answers.to(device)


def rows_of_batch(rows: list, size: int, number: int, seed: int) -> list:
    """The `size` rows of batch `number` in an endless run of reshuffled epochs."""
    return [rows[i] for i in vit.batch_indices(len(rows), size, number, seed)]


# --- Demo: sentences that the script writes itself

FACTS = ("Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Karin Louis Maria".split(),
         "apple basket candle drum easel flute guitar hammer jacket kettle ladder mirror".split(),
         "Athens Bergen Cairo Dublin Essen Florence Geneva Havana".split())
SENTENCES = ("The {2} went from {0} to {1} in {3}.", "In {3} the {2} went to {1} from {0}.",
             "From {0} the {2} went to {1} in {3}.")
QUESTIONS = (("Who gave it?", "Who got it?", "What was it?", "Where was it?"),
             ("Giver:", "Receiver:", "Object:", "Place:"))
SMALL = LlamaConfig(258, 64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, hidden_dim=176)


def write_examples(count: int, seed: int, shifted: bool) -> list[Example]:
    """`count` sentences, each with a question about one of its four facts, which are drawn anew in
    each. shifted: the questions become headings, which the pretrained model has never seen."""
    draw, examples, (names, things, places) = random.Random(seed), [], FACTS
    for _ in range(count):
        facts = [*draw.sample(names, 2), draw.choice(things), draw.choice(places)]
        which, choices = draw.randrange(4), draw.sample(facts, 4)
        prompt = f"{draw.choice(SENTENCES).format(*facts)} {QUESTIONS[shifted][which]} "
        examples.append(Example(prompt, choices, choices.index(facts[which])))
    return examples


def pretrained(args, steps: int = 600) -> Llama:
    """A small LLaMA pretrained on such texts, always the same for a seed."""
    torch.manual_seed(args.seed)
    model = Llama(SMALL).to(args.device)
    nn.init.normal_(model.model.embed_tokens.weight, std=0.5)    # with 1 it learns less
    rows = [row for e in write_examples(8000, 10 * args.seed, False)
            for row in encode_rows(Bytes(), e.prompt, e.choices[e.answer], args.max_length, True)]

    def loss(step: int) -> torch.Tensor:
        batch = collate(rows_of_batch(rows, 16, step, args.seed), args.device)
        return answer_losses(model, batch).mean()

    vit.pretrain(model, loss, steps, lr=4e-3)
    return model


if __name__ == "__main__":
    raise SystemExit(vit.exit_status(main))
