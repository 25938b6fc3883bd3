"""Does it work? StructLoRA against LoRA of the same rank, and of four times the rank.

    python tests/bench_accuracy.py --quick       one cell, four methods: minutes on two CPU cores
    python tests/bench_accuracy.py               text, vision and LLaVA, small: hours on a CPU
    python tests/bench_accuracy.py --gpu         backbones of width 512 and 384: minutes on a GPU
    ... --dry       two steps of each cell, and what the whole is expected to take
    ... --table     the tables and figures again, from the lines under --results
    ... --cells B   only the cells of these backbones: text vision llava deep
    ... --text F    adapt to this text instead of the manual that ships with Python
    ... --cifar10 D pretrain on and adapt to the pictures of this folder (CIFAR-10, binary)

A cell is one frozen backbone, a number of labelled examples and a rank. Text: a byte-level LLaMA
pretrained on the Python sources of this installation, adapted to English; bits a byte. Vision: a
ViT pretrained on drawn pictures, adapted to their inverted colours; nats and accuracy. LLaVA: the
demo of train_llava.py, questions on drawn scenes; nats an answer token and VQA accuracy.

A seed draws the labelled examples, the initial factors and the order of the batches, the same for
every method, so that differences pair. All seeds and learning rates ("rates"
here) of a method run as one batch (torch.vmap). They double from one to the next; while the best
(mean loss over the seeds) lies at an edge, the next one is run too; for one half of the seeds it is
chosen on the other half.
Intervals are 95% of the paired difference to LoRA (Student's t); p is Holm's over the table. Every
run is a line of SIZE.jsonl; what is there is not run again.
"""

import argparse
import copy
import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, grad_and_value
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import LambdaLR

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
import structlora
import train_llama
import train_llava
import train_vit
from structlora import Config, attach
from train_vit import warmup_cosine

FIRST_SEED = 1000                    # nobody picked them: 1000, 1001, ...

# name -> (factor on the rank, changes of Config); budget is in units of the rank
LORA = {"gate": "none", "coordinator": "none"}
METHODS = {
    "LoRA": (1, LORA), "LoRA 4r": (4, LORA), "hybrid": (1, {}), "all": (1, {"edges": "all"}),
    "gate only": (1, {"coordinator": "none"}),
    "concrete gate only": (1, {"coordinator": "none", "gate": "concrete"}),
    "depth": (1, {"edges": "depth"}), "similarity": (1, {"edges": "similarity"}),
    "hybrid, no gate": (1, {"gate": "none"}), "all, no gate": (1, {"gate": "none", "edges": "all"}),
    "all, no gate, uniform": (1, {"gate": "none", "edges": "all", "coordinator": "uniform"}),
    "all, |M| = 1/sqrt(L-1)": (1, {"edges": "all"}), "hybrid, budget r": (1, {}),
    "DoRA": (1, LORA), "AdaLoRA": (1, LORA), "SHiRA": (1, LORA)}
MAIN, OTHERS = tuple(METHODS)[:5], tuple(METHODS)[-3:]

# rates: the first grid; pretrain: (steps, examples in a step); batch: examples in a step; cells:
# (backbone, examples, rank). Methods that are not in MAIN are run in the first cell, after the
# first nine cells.
STEPS = 100
TEXT = dict(width=128, layers=6, length=64, pretrain=(1500, 32), batch=8)
SIZES = {
    "quick": dict(seeds=4, rates=(8e-3, 1.6e-2), text=TEXT | {"pretrain": (600, 32)},
                  cells=[("text", 512, 1)]),
    "default": dict(seeds=8, rates=(8e-3, 1.6e-2, 3.2e-2), text=TEXT,
                    vision=dict(width=96, layers=6, pretrain=(800, 32), batch=32),
                    llava=dict(seeds=4, pretrain=(600, 32), batch=16),
                    cells=[("text", 512, 1), ("text", 64, 1), ("vision", 100, 1),
                           ("vision", 20, 1), ("text", 512, 4), ("text", 64, 4),
                           ("vision", 100, 4), ("vision", 20, 4), ("llava", 200, 2)]),
    "gpu": dict(seeds=8, rates=(1e-3, 2e-3, 4e-3, 8e-3),
                text=dict(width=512, layers=8, length=128, pretrain=(1500, 128), batch=16),
                deep=dict(width=256, layers=16, length=128, pretrain=(1000, 128), batch=16),
                vision=dict(width=384, layers=8, pretrain=(600, 128), batch=32),
                cells=[("text", 512, 1), ("text", 64, 1), ("vision", 100, 1), ("text", 512, 4),
                       ("text", 64, 4), ("vision", 20, 1), ("deep", 512, 1), ("vision", 100, 4),
                       ("vision", 20, 4), ("text", 512, 16), ("text", 64, 16),
                       ("vision", 100, 16), ("vision", 20, 16)])}


# --- Backbones and data: (x, y) with x bytes [N, T] and y the next ones, or images and labels [N]

def windows(text: bytes, count: int, length: int, seed: int) -> tuple:
    """Bytes at places that the seed draws, and the bytes that follow each."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    at = torch.randint(len(data) - length - 1, (count, 1), generator=generator)
    data = data[at + torch.arange(length + 1)].long()
    return data[:, :-1], data[:, 1:]


def text_task(sizes: dict, args) -> tuple:
    """(LLaMA, Python to pretrain on, English to adapt to as bytes, English to test)."""
    folder, width, length = Path(os.__file__).parent, sizes["width"], sizes["length"]
    files = sorted(f for f in folder.glob("**/*.py") if "site-packages" not in f.parts)
    code = b"".join(file.read_bytes() for file in files[:1500])
    from pydoc_data.topics import topics
    english = "\n".join(topics[name] for name in sorted(topics)).encode()
    english = Path(args.text).read_bytes() if args.text else english
    cut = len(english) * 4 // 5
    model = train_llama.Llama(train_llama.LlamaConfig(
        256, width, sizes["layers"], width // 32, width // 32, 32, 64 * round(width / 24)))
    return (model, windows(code, 100_000, length, 0), english[:cut],
            windows(english[cut:], 128, length, 1))


def vision_task(sizes: dict, args) -> tuple:
    """(ViT, pictures to pretrain on, inverted ones to adapt to, inverted ones to test)."""
    source, pool, test = (train_vit.draw(count, seed, False)
                          for count, seed in ((8000, 0), (8000, 1), (500, 2)))
    if args.cifar10:
        (images, labels), test, _ = train_vit.read_images(args.cifar10)
        half = len(labels) // 2
        source, pool = (images[:half], labels[:half]), (images[half:], labels[half:])
    config = train_vit.ViTConfig(source[0].shape[2], 4, sizes["width"], sizes["layers"],
                                 sizes["width"] // 32, 4 * sizes["width"], 10)
    pool, test = ((255 - images, labels) for images, labels in (pool, test))
    return (train_vit.ViT(config), *((train_vit.prepare(images, config), labels)
                                     for images, labels in (source, pool, test)))


def llava_task(sizes: dict, args) -> tuple:
    """(LLaVA, nothing, scenes to adapt to, scenes to test): embeddings [N, T, D] of the words and
    pictures, whose places vmap could not follow, and answers [N, 3]: colour, shape, </s>."""
    options = argparse.Namespace(seed=0, device=args.device)
    model, data = train_llava.pretrained(options, 2 if args.dry else sizes["pretrain"][0]), []
    for count, seed in ((1000, 1), (300, 2)):
        scenes = train_llava.draw_examples(count, seed, True)
        rows = [train_llava.encode(train_llava.Words(), scene) for scene in scenes]
        images, tokens, _ = train_llava.collate(rows, args.device, model.vision)
        with torch.no_grad():
            data.append((model.splice(images, tokens)[0], tokens[:, -3:]))
    del model.model.vision_tower, model.model.mm_projector
    return model, None, *data


class Task:
    """A pretrained, frozen backbone, and what it is adapted to."""

    def __init__(self, kind: str, sizes: dict, args):
        self.kind, self.sizes, self.device = kind, sizes, args.device
        make = {"vision": vision_task, "llava": llava_task}.get(kind, text_task)
        self.model, source, self.pool, self.test = make(sizes, args)
        name = "-".join(str(value) for value in (kind, *sizes.values(), bool(args.cifar10)))
        path = Path(args.out, name.replace(", ", "x").strip("()") + ".pt")
        self.model.to(self.device)
        if path.exists():
            self.model.load_state_dict(torch.load(path, self.device, weights_only=True))
        elif source:
            self.pretrain(source, 2 if args.dry else sizes["pretrain"][0])
            if not args.dry:
                structlora.write(path, self.model.state_dict())
        if self.device != "cpu":
            self.model.bfloat16()

    def pretrain(self, source: tuple, steps: int) -> None:
        """Trains all weights on source."""
        generator, (x, y) = torch.Generator().manual_seed(0), source
        torch.manual_seed(0)
        for parameter in self.model.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

        def loss(step: int) -> torch.Tensor:
            i = torch.randint(len(y), self.sizes["pretrain"][1:], generator=generator)
            with torch.autocast(self.device, torch.bfloat16, self.device != "cpu"):
                logits = self.model(x[i].to(self.device)).float().flatten(0, -2)
            return F.cross_entropy(logits, y[i].to(self.device).flatten())

        train_vit.pretrain(self.model, loss, steps, 2e-3 * (128 / self.sizes["width"]) ** 0.5)
        learned, chance = loss(steps).item(), math.log(self.model(x[:1].to(self.device)).shape[-1])
        print(f"pretrained {self.kind}: loss {learned:.3f}, of guessing {chance:.3f}", flush=True)
        if steps > 2 and not learned < 0.8 * chance:
            raise ValueError(f"pretraining {self.kind}: the loss of {learned:.3f} is useless")

    def labelled(self, seed: int, count: int) -> tuple:
        """The examples that a seed draws: windows, pictures of each class, or scenes."""
        if self.kind in ("text", "deep"):
            return windows(self.pool, count, self.sizes["length"], seed)
        classes = self.pool[1].view(len(self.pool[1]), -1)[:, -1]        # </s> is one class
        return train_vit.take(self.pool, train_vit.choose(classes, count, None, seed))


# --- Other people's methods

class Others:
    """PEFT's DoRA (Liu et al. 2024) and AdaLoRA (Zhang et al. 2023), and SHiRA (Bhardwaj et al.
    2024), of which vmap cannot take PEFT's sparse tensors; with the ways of StructLoRA's handle."""

    def __init__(self, model: nn.Module, kind: str, rank: int, steps: int):
        self.model, self.kind, self.steps = model.requires_grad_(False), kind, steps
        if kind == "SHiRA":
            for name, layer in model.named_modules():
                if name.endswith(Config.targets):
                    self.sparse(layer, rank * sum(layer.weight.shape))
            return
        import peft
        make, more = peft.LoraModel, {"target_modules": list(Config.targets), "use_dora": True}
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, **more)
        if kind == "AdaLoRA":        # from 1.5 r to r directions a layer, in 10% to 70% of training
            make, r = peft.AdaLoraModel, math.ceil(1.5 * rank)
            config = peft.AdaLoraConfig(
                init_r=r, target_r=rank, lora_alpha=2 * r, tinit=steps // 10, deltaT=1,
                tfinal=3 * steps // 10, total_step=steps, target_modules=list(Config.targets))
        self.tuner = make(model, config, "default")

    def sparse(self, layer: nn.Linear, count: int) -> None:
        """`count` weights at random places, as many as LoRA trains, for a layer's dW."""
        W = layer.weight
        layer.register_buffer("places", torch.randperm(W.numel())[:count].to(W.device))
        layer.delta = nn.Parameter(torch.zeros(count, device=W.device))

        def update(layer, inputs, y):
            delta = layer.delta.new_zeros(W.numel()).index_put((layer.places,), layer.delta)
            return y + 2 * F.linear(inputs[0], delta.view_as(W).to(y.dtype))
        layer.register_forward_hook(update)

    def param_groups(self, lr: float) -> list[dict]:
        return [{"params": [p for p in self.model.parameters() if p.requires_grad], "lr": lr}]

    def observe_gradients(self) -> None:
        pass

    def penalty(self, count: int) -> torch.Tensor:
        """AdaLoRA's 0.1 |P^T P - I| + 0.1 |Q Q^T - I| over its layers, which PEFT adds itself only
        to models that give a loss."""
        total = torch.zeros(())
        for name, p in self.model.named_parameters() if self.kind == "AdaLoRA" else ():
            if "lora_A" in name or "lora_B" in name:             # [r, k] or [d, r]
                product = p @ p.T if "lora_A" in name else p.T @ p
                total = total + 0.1 * (product - torch.eye(len(product)).to(p)).norm()
        return total

    def prune(self, progress: float) -> None:
        if self.kind == "AdaLoRA":
            self.tuner.update_and_allocate(round(progress * self.steps))


# --- Experiments, E of them at once

class Experiment(nn.Module):
    """A copy of a task's model that shares its weights, a method's adapters, their optimizer."""

    def __init__(self, task: Task, method: str, examples: int, rank: int, seed: int, rate: float,
                 steps: int):
        super().__init__()
        shared = {id(p): p for p in task.model.parameters()}
        self.task, self.model, self.seed = task, copy.deepcopy(task.model, shared), seed
        self.x, self.y = task.labelled(seed, examples)
        factor, changes = METHODS[method]
        rank, budget = factor * rank, factor * rank if "budget" in method else None
        torch.manual_seed(seed)
        if method in OTHERS:
            self.adapters = Others(self.model, method, rank, steps)
        else:
            config = Config(rank=rank, alpha=2.0 * rank, budget=budget, **changes)
            self.adapters = attach(self.model, config)
            for number, layer in enumerate(self.adapters.layers.values()):
                generator = torch.Generator().manual_seed(1000 * seed + number)  # for all methods
                A = torch.empty(layer.A.shape).uniform_(-1, 1, generator=generator)
                layer.A.data.copy_(A / A.shape[1] ** 0.5)
            for graph in self.adapters.graphs if "sqrt" in method else ():
                graph.rho.data.fill_((len(graph.names) - 1) ** 0.5)
        self.optimizer = torch.optim.AdamW(self.adapters.param_groups(rate), fused=True)
        self.schedule = LambdaLR(self.optimizer, lambda n: warmup_cosine(n, steps))
        self.trained = {n: p for n, p in self.named_parameters() if p.requires_grad}

    def forward(self, x, y) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean loss, with what the method adds to it in training; accuracy)."""
        if x.is_floating_point():
            x = x.to(next(self.model.parameters()).dtype)
        scenes = self.task.kind == "llava"   # each place tells of the next token
        logits = self.model(embeddings=x)[:, -4:-1] if scenes else self.model(x)
        loss = F.cross_entropy(logits.float().flatten(0, -2), y.flatten())
        if self.training:
            loss = loss + self.adapters.penalty(self.y.numel())              # Eq. 4
        right = logits.argmax(-1) == y
        return loss, (right.all(1) if scenes else right).float().mean()  # VQA accuracy: all three


def together(experiments: list[Experiment], x, y) -> tuple:
    """forward() of all by torch.vmap, x and y [E, N, ...]; in training (gradients, forward())."""
    first, trained, fixed = experiments[0], {}, {}
    asks = not isinstance(first.adapters, Others) and first.adapters.graphs[0].probing
    for name in [n for n in first.trained if asks or not n.endswith("probe")]:
        trained[name] = torch.stack([e.trained[name].detach() for e in experiments])
    for name, _ in first.named_buffers():
        fixed[name] = torch.stack([e.get_buffer(name) for e in experiments])

    def one(trained: dict, fixed: dict, x, y) -> tuple:
        return functional_call(first, trained | fixed, (x, y))

    function = grad_and_value(one, has_aux=True) if first.training else one
    with sdpa_kernel(SDPBackend.MATH):
        return torch.vmap(function, randomness="different")(trained, fixed, x, y)


def train(experiments: list[Experiment], steps: int) -> float:
    """The scripts' loop -> milliseconds of a step and experiment, once the edges have settled."""
    task, settled = experiments[0].task, min(20, steps - 1)
    experiments[0].train()
    for step in range(steps):
        if step == settled:
            began = time.perf_counter()
        x, y = [], []
        for e in experiments:
            i = train_vit.batch_indices(len(e.y), task.sizes["batch"], step, e.seed)
            x, y = [*x, e.x[i]], [*y, e.y[i]]
        x, y = torch.stack(x).to(task.device), torch.stack(y).to(task.device)
        gradients, _ = together(experiments, x, y)
        for number, e in enumerate(experiments):
            for name, gradient in gradients.items():             # the fused AdamW wants them so
                e.trained[name].grad = gradient[number].contiguous()
            e.adapters.observe_gradients()
            nn.utils.clip_grad_norm_(e.trained.values(), 1.0)
            e.optimizer.step()
            e.schedule.step()
            e.adapters.prune((step + 1) / steps)
    if task.device != "cpu":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began) / (steps - settled) / len(experiments)


@torch.no_grad()
def test(experiments: list[Experiment]) -> torch.Tensor:
    """[E, 2] mean loss and accuracy on the test examples."""
    experiments[0].eval()
    task, total = experiments[0].task, 0.0
    for x, y in zip(*(part.to(task.device).split(32) for part in task.test)):
        x, y = (part.expand(len(experiments), *part.shape) for part in (x, y))
        total = total + torch.stack(together(experiments, x, y), 1).double() * y.shape[1]
    return total / len(task.test[1])


def run(task: Task, method: str, examples: int, rank: int, seeds: list, rates: list,
        steps: int) -> dict:
    """One method in one cell -> what a line of the results says of these rates."""
    experiments = [Experiment(task, method, examples, rank, seed, rate, steps)
                   for seed in seeds for rate in rates]
    ms, merged, cosine = train(experiments, steps), [], None
    scores = test(experiments).view(len(seeds), len(rates), 2).round(decimals=5).tolist()
    for e in experiments[:len(rates)] if method not in OTHERS else ():   # of the first seed
        told = e.adapters.diagnostics()
        merged.append(sum(told["kept"].values()) / len(told["kept"]))
        cosine = next(iter(told["cosine_matrix"].values())).double().round(decimals=2).tolist()
    groups = experiments[0].optimizer.param_groups
    trainable = sum(p.numel() for group in groups for p in group["params"])
    return {"rates": rates, "scores": scores, "trainable": trainable, "merged": merged,
            "ms": round(ms, 3), "cosine": cosine}


# --- Statistics, table, figures

def two_sided(t: float, df: int) -> float:
    """P(|T| > t) of Student's t, by the trapezoidal rule on u = arctan(T / sqrt(df))."""
    angle = torch.linspace(0, math.pi / 2, 4001, dtype=torch.float64)
    density = angle.cos() ** (df - 1)
    tail = density * (angle >= math.atan(abs(t) / df**0.5))
    return float(tail.sum() / density.sum())


def interval(values: torch.Tensor) -> tuple[float, float, float]:
    """(mean, half width of its 95% interval, p of no difference)."""
    mean, error = float(values.mean()), float(values.std()) / len(values) ** 0.5
    half = {4: 3.182446, 8: 2.364624}[len(values)] * error       # 97.5% quantiles of Student's t
    return mean, half, two_sided(mean / max(error, 1e-12), len(values) - 1)


def counted(line: dict) -> tuple[torch.Tensor, int]:
    """Scores [seeds, 2], each at the rate that the other half of the seeds has chosen, losses in
    bits for text; and the place of the first half's rate."""
    scores = torch.tensor(line["scores"])                        # [seeds, rates, 2]
    if line["cell"][0] in ("text", "deep"):
        scores[..., 0] /= math.log(2)
    half = len(scores) // 2
    first, second = (int(part[..., 0].mean(0).argmin()) for part in (scores[half:], scores[:half]))
    return torch.cat([scores[:half, first], scores[half:, second]]), first


def difference(line: dict, other: dict) -> tuple[float, float, float]:
    """interval() of the paired difference in loss of two methods."""
    return interval(counted(line)[0][:, 0] - counted(other)[0][:, 0])


def table(lines: dict) -> list[dict]:
    """A row for each cell and method; "gain" holds the difference to the cell's LoRA."""
    rows = []
    for (*cell, method), line in lines.items():
        if lora := lines.get((*cell, "LoRA")):
            scores, picked = counted(line)
            loss, accuracy = scores.mean(0).tolist()
            rows.append({"cell": "{} {} r{}".format(*cell), "method": method,
                         "seeds": str(len(scores)), "loss": f"{loss:.4f}", "to LoRA (95%)": "",
                         "p (Holm)": "", "accuracy": f"{100 * accuracy:.1f}",
                         "parameters": f"{line['trainable'] / lora['trainable']:.2f}",
                         "merged rank": f"{line['merged'][picked]:.1f}" if line["merged"] else "-",
                         "lr": f"{line['rates'][picked]:.0e}", "ms/step": f"{line['ms']:.2f}",
                         "gain": difference(line, lora)})
    compared = sorted((r for r in rows if r["method"] != "LoRA"), key=lambda r: r["gain"][2])
    worst = 0.0
    for number, row in enumerate(compared):                      # Holm 1979
        worst = max(worst, min(1.0, row["gain"][2] * (len(compared) - number)))
        row["to LoRA (95%)"] = "{:+.4f} +- {:.4f}".format(*row["gain"])
        row["p (Holm)"] = f"{worst:.3f}"
    return rows


def show(lines: dict, name: str, folder: Path) -> None:
    """Prints the table, and what "all" differs from "hybrid"; draws the figures."""
    rows = table(lines)
    train_vit.print_table([{k: v for k, v in row.items() if k != "gain"} for row in rows])
    for *cell, method in lines:
        if method == "all" and (*cell, "hybrid") in lines:
            line = lines[(*cell, "all")]
            mean, half, p = difference(line, lines[(*cell, "hybrid")])
            print("{} {} r{}: all to hybrid".format(*cell), f"{mean:+.4f} +- {half:.4f}",
                  f"({len(line['scores'])} seeds, p {p:.3f})")
    structlora.write(folder / f"gain-{name}.svg", gain_figure(rows))
    structlora.write(folder / f"cosine-{name}.svg", cosine_figure(lines))


def svg(parts: list[str], height: int) -> str:
    """A figure on white ground; text stays text."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="860" height="{height}" font-family='
            '"sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>\n'
            + "\n".join(parts) + "\n</svg>\n")


def gain_figure(rows: list[dict]) -> str:
    """What a method gains over LoRA of the same rank (right is better), with 95% intervals, in % of
    what LoRA of four times the rank gains; cells where that gains."""
    parts, y = ['<text x="280" y="14">LoRA of the same rank: 0</text>'], 34
    gains = {(r["cell"], r["method"]): r["gain"] for r in rows}
    colours = {"hybrid": "#0072B2", "all": "#009E73", "LoRA 4r": "#888888"}
    for cell in [r["cell"] for r in rows if r["method"] == "LoRA 4r"]:
        four, half, _ = gains[cell, "LoRA 4r"]
        if four + half >= 0:
            continue
        parts.append(f'<text x="10" y="{y + 24}" font-weight="bold">{cell}</text>')
        for method in [m for m in colours if (cell, m) in gains]:
            x, half = (120 * value / four for value in gains[cell, method][:2])
            left, right = 340 + x + half, 340 + x - half         # four is negative
            parts += [f'<line x1="{left:.0f}" x2="{right:.0f}" y1="{y}" y2="{y}" '
                      f'stroke="{colours[method]}" stroke-width="2"/>'
                      f'<circle cx="{340 + x:.0f}" cy="{y}" r="4" fill="{colours[method]}"/>'
                      f'<text x="{right + 8:.0f}" y="{y + 4}">{method} {x / 1.2:.0f}%</text>']
            y += 20
        y += 14
    return svg([f'<line x1="340" x2="340" y1="20" y2="{y}" stroke="#bbb"/>', *parts], y + 10)


def cosine_figure(lines: dict) -> str:
    """Cosine of the updates of each pair of layers, in the first cell: blue 1, white 0, red -1."""
    parts, left, (*cell, _) = [], 20, next(iter(lines))
    for method in [m for m in ("LoRA", "hybrid", "all") if (*cell, m) in lines]:
        matrix = np.array(lines[(*cell, method)]["cosine"])
        size = 180 / len(matrix)
        parts.append(f'<text x="{left}" y="16">{method}</text>')
        for (i, j), value in np.ndenumerate(matrix):
            shade = round(255 * (1 - abs(value)))
            fill = f"rgb({shade},{shade},255)" if value >= 0 else f"rgb(255,{shade},{shade})"
            parts.append(f'<rect x="{left + j * size:.1f}" y="{26 + i * size:.1f}" fill="{fill}" '
                         f'width="{size:.1f}" height="{size:.1f}" stroke="#ddd"/>')
        left += 205
    return svg(parts, 220)


# --- Main

def finished(task: Task, cell: tuple, method: str, size: dict, args) -> dict:
    """A method's line in a cell: the grid of rates, widened while its best lies at an edge."""
    size, steps = size | task.sizes, 2 if args.dry else STEPS
    seeds = [FIRST_SEED + i for i in range(size["seeds"])]
    line = run(task, method, *cell[1:], seeds, list(size["rates"]), steps)
    for _ in range(0 if args.dry or args.quick else 4):
        best = int(torch.tensor(line["scores"])[..., 0].mean(0).argmin())
        if 0 < best < len(line["rates"]) - 1:
            break
        rate = line["rates"][0] / 2 if best == 0 else line["rates"][-1] * 2
        more = run(task, method, *cell[1:], seeds, [rate], steps)
        first, second = (more, line) if best == 0 else (line, more)
        line |= {"rates": first["rates"] + second["rates"],
                 "scores": [a + b for a, b in zip(first["scores"], second["scores"])],
                 "merged": first["merged"] + second["merged"]}
    return {"cell": cell, "method": method} | line


def main() -> None:
    """Runs what is missing, cell by cell, and prints the table."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("quick", "gpu", "dry", "table"):
        p.add_argument(f"--{flag}", action="store_true")
    kinds = ["text", "vision", "llava", "deep"]
    p.add_argument("--cells", nargs="*", default=kinds, choices=kinds)
    p.add_argument("--minutes", type=float, default=1e9, help="no run is started after these")
    p.add_argument("--out", default="out/bench", help="where pretrained backbones are kept")
    p.add_argument("--results", type=Path, default=ROOT / "tests" / "results")
    p.add_argument("--text")
    p.add_argument("--cifar10")
    args, began, tasks, lines, total = p.parse_args(), time.perf_counter(), {}, {}, 0.0
    args.device = "cuda" if args.gpu and not args.dry else "cpu"
    name = "quick" if args.quick else "gpu" if args.gpu else "default"
    size, path = SIZES[name], args.results / f"{name}.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        line = json.loads(line)
        lines[(*line["cell"], line["method"])] = line
    first, methods = size["cells"][0], MAIN[:4] if args.quick else MAIN
    work = [(cell, method) for cell in size["cells"] for method in methods]
    work[45:45] = [(first, method) for method in METHODS if method not in MAIN and not args.quick]
    for cell, method in [] if args.table else work:
        late = time.perf_counter() - began > 60 * args.minutes
        if (*cell, method) in lines or late or cell[0] not in args.cells:
            continue
        if method in ("DoRA", "AdaLoRA") and not importlib.util.find_spec("peft"):
            print(f"{method} is left out: PEFT is not installed")
            continue
        if cell[0] not in tasks:
            tasks[cell[0]] = Task(cell[0], size[cell[0]], args)
        line = finished(tasks[cell[0]], cell, method, size, args)
        total += line["ms"] * len(line["rates"]) * len(line["scores"]) * STEPS / 1e3
        print(f"{cell} {method}: {line['ms']:.2f} ms a step and experiment, so far "
              f"{time.perf_counter() - began:.0f} s", flush=True)
        if not args.dry:
            lines[(*cell, method)] = line
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
    if args.dry:
        print(f"expected: {total / 60:.0f} minutes beside pretraining, on this machine")
    order = sorted(lines, key=lambda k: (size["cells"].index(k[:3]), [*METHODS].index(k[3])))
    if lines:
        show({key: lines[key] for key in order}, name, args.results)


if __name__ == "__main__":
    raise SystemExit(train_vit.exit_status(main))
