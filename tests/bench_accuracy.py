"""Does it work? StructLoRA against LoRA of the same rank, and of four times the rank.

    python tests/bench_accuracy.py --quick       one cell, four methods: minutes on two CPU cores
    python tests/bench_accuracy.py               text, vision and LLaVA, small: hours on a CPU
    python tests/bench_accuracy.py --long        400 steps, few labels, wrong labels: hours as well
    python tests/bench_accuracy.py --gpu         backbones of width 512 and 384: minutes on a GPU
    ... --dry         two steps of each cell, and what the whole is expected to take
    ... --table       the tables and figures again, from the lines under --results
    ... --cells B     only the cells of these backbones; --methods M: only these methods
    ... --text F      adapt to this text instead of the manual that ships with Python
    ... --stories D   folder of a pretrained LLaMA, for the cells "stories"

A cell is one frozen backbone, a number of labelled examples and a rank. Text: a byte-level LLaMA
pretrained on the Python sources of this installation, adapted to English; bits a byte. "tall" is
deeper, "stories" a LLaMA that others trained; nats a token. Vision: a ViT pretrained on drawn
pictures, adapted to their inverted colours; nats and accuracy. "noisy": 30% of the labels are
wrong. LLaVA: the demo of train_llava.py; nats an answer token and VQA accuracy.

A seed draws the labelled examples, the initial factors and the order of the batches, the same for
every method, so that differences pair. All seeds and learning rates ("rates" here) of a method run
as one batch (torch.vmap). They double from one to the next; while the best (mean loss over the
seeds) lies at an edge, the next one is run too; for one half of the seeds it is chosen on the other
half. Intervals are 95% of the paired difference to LoRA (Student's t); p is Holm's over the table.
Every run is a line of SIZE.jsonl; what is there is not run again.
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

# name -> (factor on the rank, changes of Config); budget is in units of the rank. A gate's (beta,
# gate_lr) stand in the names of the rows that compare them; the others' are WEAK, the default.
WEAK = {"beta": 0.1, "gate_lr": 0.01}
ALL, ALONE, OPEN = {"edges": "all"}, {"coordinator": "none"}, {"gate": "none"}
LORA, DROPOUT = ALONE | OPEN, {"dropout": 0.2}
MAIN = {"LoRA": (1, LORA), "LoRA 4r": (4, LORA), "hybrid": (1, WEAK), "all": (1, ALL | WEAK),
        "gate only": (1, ALONE | WEAK)}
ABLATIONS = {
    "concrete gate only": (1, ALONE | WEAK | {"gate": "concrete"}),
    "depth": (1, WEAK | {"edges": "depth"}), "similarity": (1, WEAK | {"edges": "similarity"}),
    "hybrid, no gate": (1, OPEN), "all, no gate": (1, OPEN | ALL),
    "all, no gate, uniform": (1, OPEN | ALL | {"coordinator": "uniform"}),
    "all, |M| = 1/sqrt(L-1)": (1, ALL | WEAK),
    "hybrid, budget r": (1, {"beta": 0.1, "budget": 1}),
    "DoRA": (1, LORA), "AdaLoRA": (1, LORA)}
OTHERS = ("DoRA", "AdaLoRA", "AdaLoRA r/2")
GATES = {f"{name} ({beta:g}, {gate_lr})": (1, changes | {"beta": beta, "gate_lr": gate_lr})
         for name, changes in (("hybrid", {}), ("gate only", ALONE), ("all", ALL))
         for beta in (1.0, 0.3, 0.1) for gate_lr in (0.05, 0.01)}
PRUNED = {"LoRA r/2": (0.5, LORA), "AdaLoRA r/2": (0.5, LORA),
          "hybrid, budget r/2": (1, {"beta": 0.1, "budget": 0.5}),
          "gate only, budget r/2": (1, ALONE | {"beta": 0.1, "budget": 0.5})}
METHODS = MAIN | ABLATIONS | GATES | PRUNED | {
    "LoRA, dropout": (1, LORA | DROPOUT), "LoRA 4r, dropout": (4, LORA | DROPOUT),
    "hybrid, no gate, dropout": (1, OPEN | DROPOUT)}
STRONG = ("LoRA", "LoRA, dropout", "hybrid (1, 0.05)", "hybrid (0.1, 0.01)")
LONG = (*STRONG, "gate only (1, 0.05)", "hybrid, no gate, dropout", "gate only (0.1, 0.01)",
        "LoRA 4r", "all (1, 0.05)")
LEFT = ("LoRA 4r, dropout", "hybrid (0.3, 0.05)")

# A backbone: pretrain (steps, examples in a step), batch (examples in a step), and what else it has
# of its own. A size: the first grid of rates; the cells (backbone, examples, rank) with their
# methods, in the order in which they are run.
TEXT = dict(width=128, layers=6, length=64, pretrain=(1500, 32), batch=8)
VISION = dict(width=96, layers=6, pretrain=(800, 32), batch=32)
SMALL = VISION | {"batch": 16}
CELLS = [(kind, count, rank) for rank in (1, 4, 16)
         for kind, count in (("text", 512), ("text", 64), ("vision", 100), ("vision", 20))]
SIZES = {
    "quick": dict(seeds=4, steps=100, rates=(8e-3, 1.6e-2), text=TEXT | {"pretrain": (600, 32)},
                  cells=[(("text", 512, 1), ("LoRA", "LoRA 4r", "hybrid", "all"))]),
    "default": dict(
        seeds=8, steps=100, rates=(8e-3, 1.6e-2, 3.2e-2), text=TEXT, vision=VISION,
        llava=dict(seeds=4, pretrain=(600, 32), batch=16),
        stories=dict(length=64, batch=8, rates=(4e-3, 8e-3, 1.6e-2)),
        tall=dict(width=64, layers=24, length=64, pretrain=(3000, 32), batch=8,
                  rates=(1e-3, 2e-3, 4e-3)),
        cells=[*((cell, MAIN) for cell in (*CELLS[:8], ("llava", 200, 2))),
               (("text", 512, 1), ABLATIONS),
               (("vision", 100, 1), ("hybrid, no gate", "all, no gate", "all, |M| = 1/sqrt(L-1)")),
               *((cell, ("hybrid (1, 0.05)",)) for cell in CELLS[:8]),
               *((("stories", count, rank), MAIN) for count in (64, 512) for rank in (1, 4)),
               (("tall", 512, 1), ("LoRA", "LoRA 4r", "hybrid", "all", "all, |M| = 1/sqrt(L-1)"))]),
    "long": dict(
        seeds=8, steps=400, rates=(4e-3, 8e-3, 1.6e-2),
        vision=SMALL, noisy=SMALL, short=SMALL | {"steps": 100}, text=TEXT,
        cells=[(("vision", 20, 4), LONG), (("noisy", 20, 4), LONG), (("vision", 20, 4), PRUNED),
               (("short", 20, 4), LONG[:5]), (("text", 2048, 1), MAIN), (("text", 2048, 4), MAIN),
               (("vision", 20, 4), LEFT), (("noisy", 20, 4), LEFT), (("vision", 20, 16), STRONG),
               (("noisy", 20, 16), STRONG), (("text", 64, 4), STRONG)]),
    "gpu": dict(
        seeds=8, steps=100, rates=(1e-3, 2e-3, 4e-3, 8e-3),
        text=dict(width=512, layers=8, length=128, pretrain=(1500, 128), batch=16),
        deep=dict(width=256, layers=16, length=128, pretrain=(1000, 128), batch=16),
        vision=dict(width=384, layers=8, pretrain=(600, 128), batch=32),
        cells=[(cell, MAIN) for cell in (*CELLS[:4], ("deep", 512, 1), *CELLS[4:])])}
PICTURES = ("vision", "noisy", "short")      # one backbone: labels right, 30% wrong, fewer steps
KINDS = (*PICTURES, "text", "llava", "deep", "tall", "stories")


# --- Backbones and data: (x, y) with x bytes [N, T] and y the next ones, or images and labels [N]

def windows(data: torch.Tensor, count: int, length: int, seed: int) -> tuple:
    """Bytes or tokens at places that the seed draws, and those that follow each."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.randint(len(data) - length - 1, (count, 1), generator=generator)
    data = data[at + torch.arange(length + 1)].long()
    return data[:, :-1], data[:, 1:]


def text_task(sizes: dict, args) -> tuple:
    """(LLaMA, Python to pretrain on, English to adapt to as one row, English to test). --stories:
    that LLaMA as it comes, and its tokens."""
    from pydoc_data.topics import topics
    english = "\n".join(topics[name] for name in sorted(topics)).encode()
    english = Path(args.text).read_bytes() if args.text else english
    if "layers" in sizes:
        folder, width = Path(os.__file__).parent, sizes["width"]
        files = sorted(f for f in folder.glob("**/*.py") if "site-packages" not in f.parts)
        code = b"".join(file.read_bytes() for file in files[:1500])
        code = torch.frombuffer(bytearray(code), dtype=torch.uint8)
        data = torch.frombuffer(bytearray(english), dtype=torch.uint8)
        source = windows(code, 100_000, sizes["length"], 0)
        model = train_llama.Llama(train_llama.LlamaConfig(
            256, width, sizes["layers"], width // 32, width // 32, 32, 64 * round(width / 24)))
    else:
        model, source = train_llama.load_llama(args.stories, torch.float32), None
        data = torch.tensor(train_llama.load_tokenizer(args.stories).encode(english.decode()))
    cut = len(data) * 4 // 5
    return model, source, data[:cut], windows(data[cut:], 128, sizes["length"], 1)


def vision_task(sizes: dict, args) -> tuple:
    """(ViT, pictures to pretrain on, inverted ones to adapt to, inverted ones to test)."""
    source, pool, test = (train_vit.draw(count, seed, False)
                          for count, seed in ((8000, 0), (8000, 1), (500, 2)))
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
        make = {"llava": llava_task, **dict.fromkeys(PICTURES, vision_task)}.get(kind, text_task)
        self.model, source, self.pool, self.test = make(sizes, args)
        of = [str(sizes[key]) for key in ("width", "layers", "length", "pretrain") if key in sizes]
        name = "-".join(["vision" if kind in PICTURES else kind, *of])
        path = Path(args.out, name.replace(", ", "x") + ".pt")
        self.model.to(self.device)
        if path.exists():
            self.model.load_state_dict(torch.load(path, self.device, weights_only=True))
        elif source:
            self.pretrain(source, 2 if args.dry else sizes["pretrain"][0])
            if not args.dry:
                structlora.write(path, self.model.state_dict())
        if self.device != "cpu":
            self.model.bfloat16()
        weights = sum(p.detach().double().abs().sum() for p in self.model.parameters())
        self.backbone = round(float(weights), 3)         # another processor pretrains another one

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
        if self.kind not in (*PICTURES, "llava"):
            return windows(self.pool, count, self.sizes["length"], seed)
        classes = self.pool[1].view(len(self.pool[1]), -1)[:, -1]        # </s> is one class
        x, y = train_vit.take(self.pool, train_vit.choose(classes, count, None, seed))
        if self.kind == "noisy":             # 30% of the labels are wrong
            generator = torch.Generator().manual_seed(seed)
            wrong = torch.randperm(len(y), generator=generator)[:round(0.3 * len(y))]
            y = y.clone()
            y[wrong] = (y[wrong] + torch.randint(1, 10, wrong.shape, generator=generator)) % 10
        return x, y


# --- Other people's methods

class Others:
    """PEFT's DoRA (Liu et al. 2024) and AdaLoRA (Zhang et al. 2023), with the ways of StructLoRA's
    handle. AdaLoRA goes from 1.5 r to r directions a layer, in 10% to 70% of training."""

    def __init__(self, model: nn.Module, kind: str, rank: int, steps: int):
        import peft
        self.model, self.kind, self.steps = model.requires_grad_(False), kind, steps
        targets = list(Config.targets)
        if kind == "AdaLoRA":
            r = math.ceil(1.5 * rank)
            self.tuner = peft.AdaLoraModel(model, peft.AdaLoraConfig(
                init_r=r, target_r=rank, lora_alpha=2 * r, tinit=steps // 10, deltaT=1,
                tfinal=3 * steps // 10, total_step=steps, target_modules=targets), "default")
        else:
            self.tuner = peft.LoraModel(model, peft.LoraConfig(
                r=rank, lora_alpha=2 * rank, use_dora=True, target_modules=targets), "default")

    def param_groups(self, lr: float, gate_lr: float | None) -> list[dict]:
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
        changes, rank = dict(changes), round(factor * rank)
        gate_lr = changes.pop("gate_lr", None)           # the budget's own if it is not named
        if "budget" in changes:
            changes["budget"] *= rank
        torch.manual_seed(seed)
        if method in OTHERS:
            self.adapters = Others(self.model, method.split()[0], rank, steps)
        else:
            config = Config(rank=rank, alpha=2.0 * rank, **changes)
            self.adapters = attach(self.model, config)
            for number, layer in enumerate(self.adapters.layers.values()):
                generator = torch.Generator().manual_seed(1000 * seed + number)  # for all methods
                A = torch.empty(layer.A.shape).uniform_(-1, 1, generator=generator)
                layer.A.data.copy_(A / A.shape[1] ** 0.5)
            for graph in self.adapters.graphs if "sqrt" in method else ():
                graph.rho.data.fill_((len(graph.names) - 1) ** 0.5)
        self.optimizer = torch.optim.AdamW(self.adapters.param_groups(rate, gate_lr), fused=True)
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


def train(experiments: list[Experiment], steps: int) -> None:
    """The scripts' loop."""
    task = experiments[0].train().task
    for step in range(steps):
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
    train(experiments, steps)
    scores = test(experiments).view(len(seeds), len(rates), 2).round(decimals=5).tolist()
    merged = []                      # directions kept, a mean over layers and seeds, of each rate
    if method not in OTHERS:
        kept = [[len(A) for _, A in e.adapters.factors().values()] for e in experiments]
        kept = torch.tensor(kept).double().mean(1).view(len(seeds), -1)
        merged = kept.mean(0).round(decimals=3).tolist()
    groups = experiments[0].optimizer.param_groups
    trainable = sum(p.numel() for group in groups for p in group["params"])
    return {"rates": rates, "scores": scores, "trainable": trainable, "merged": merged}


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
    if line["cell"][0] in ("text", "deep", "tall"):
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
                         "lr": f"{line['rates'][picked]:.0e}", "gain": difference(line, lora)})
    compared = sorted((r for r in rows if r["method"] != "LoRA"), key=lambda r: r["gain"][2])
    worst = 0.0
    for number, row in enumerate(compared):                      # Holm 1979
        worst = max(worst, min(1.0, row["gain"][2] * (len(compared) - number)))
        row["to LoRA (95%)"] = "{:+.4f} +- {:.4f}".format(*row["gain"])
        row["p (Holm)"] = f"{worst:.3f}"
    return rows


COLOURS = ("#0072B2", "#009E73", "#888888", "#E69F00", "#CC79A7")
# Pairs of methods whose difference is printed below the table, where a cell has both.
PAIRS = [("all", "hybrid"), ("hybrid (1, 0.05)", "hybrid"),
         ("hybrid (1, 0.05)", "hybrid (0.1, 0.01)"), ("hybrid (1, 0.05)", "LoRA, dropout"),
         ("hybrid (1, 0.05)", "hybrid, no gate, dropout"), ("hybrid (1, 0.05)", "LoRA 4r"),
         ("gate only (1, 0.05)", "LoRA, dropout"), ("hybrid, no gate, dropout", "LoRA, dropout"),
         ("hybrid (1, 0.05)", "LoRA r/2"), ("hybrid, budget r/2", "LoRA r/2"),
         ("hybrid, budget r/2", "AdaLoRA r/2"), ("gate only, budget r/2", "LoRA r/2")]


def show(lines: dict, name: str, folder: Path) -> None:
    """Prints the table and PAIRS; draws the figures."""
    rows = table(lines)
    if rows:                                                     # there is a LoRA to compare with
        train_vit.print_table([{k: v for k, v in row.items() if k != "gain"} for row in rows])
    for cell in dict.fromkeys(key[:3] for key in lines):
        for one, other in PAIRS:
            if (*cell, one) in lines and (*cell, other) in lines:
                told = difference(lines[(*cell, one)], lines[(*cell, other)])
                print("{} {} r{}:".format(*cell), f"{one} to {other}",
                      "{:+.4f} +- {:.4f} (p {:.3f})".format(*told))
    draw = regime_figure if name == "long" else gain_figure
    structlora.write(folder / f"gain-{name}.svg", draw(rows))


def gain_figure(rows: list[dict]) -> str:
    """Gains over LoRA of the same rank, in % of what LoRA of four times the rank gains; cells where
    that gains."""
    gains, groups = {(r["cell"], r["method"]): r["gain"] for r in rows}, []
    for cell in [r["cell"] for r in rows if r["method"] == "LoRA 4r"]:
        four, half, _ = gains[cell, "LoRA 4r"]
        marks = [(m, *(100 * value / abs(four) for value in gains[cell, m][:2]))
                 for m in ("hybrid", "all", "LoRA 4r") if (cell, m) in gains]
        groups += [(cell, marks)] if four + half < 0 else []
    return chart([("", groups)], "gain in test loss, in % of what four times the rank gains")


def regime_figure(rows: list[dict]) -> str:
    """Gains over LoRA after few and many steps, and with right and wrong labels."""
    gains, panels = {(r["cell"], r["method"]): r["gain"] for r in rows}, []
    for heading, cells in (
            ("Training", (("short", "100 steps"), ("vision", "400 steps"))),
            ("400 steps, wrong labels", (("vision", "0%"), ("noisy", "30%")))):
        groups = [(label, [(m, *gains[f"{kind} 20 r4", m][:2]) for m in LONG[1:6]
                           if (f"{kind} 20 r4", m) in gains]) for kind, label in cells]
        panels.append((heading, groups))
    return chart(panels, "gain in test loss, nats")


def chart(panels: list, unit: str) -> str:
    """An SVG of panels (heading, [(group, [(method, difference in loss, half its interval)])])."""
    every = [mark for _, groups in panels for _, marks in groups for mark in marks]
    low = min([0, *(-mean - half for _, mean, half in every)])
    high = max([1e-9, *(half - mean for _, mean, half in every)])
    step, scale = 10.0 ** math.floor(math.log10(high - low)), 560 / (high - low)
    used, parts, top = list(dict.fromkeys(method for method, _, _ in every)), [], 50
    for heading, groups in panels:
        parts.append(f'<text x="10" y="{top}" font-weight="bold">{heading}</text>')
        for group, marks in groups:
            parts.append(f'<text x="10" y="{top + 24}">{group}</text>')
            for method, mean, half in marks:
                top, x, colour = top + 16, 140 - scale * (low + mean), COLOURS[used.index(method)]
                parts.append(f'<line x1="{x - scale * half:.0f}" x2="{x + scale * half:.0f}" '
                             f'y1="{top}" y2="{top}" stroke="{colour}" stroke-width="2"/>'
                             f'<circle cx="{x:.0f}" cy="{top}" r="4" fill="{colour}"/>')
            top += 14
        top += 20
    for tick in range(math.ceil(low / step), math.floor(high / step) + 1):
        x = 140 + scale * (tick * step - low)
        parts[:0] = [f'<line x1="{x:.0f}" x2="{x:.0f}" y1="40" y2="{top}" stroke="#ccc"/>'
                     f'<text x="{x - 12:.0f}" y="{top + 16}">{tick * step:+g}</text>']
    for place, method in enumerate(used):
        x = 140 + 130 * place
        parts.append(f'<circle cx="{x}" cy="16" r="4" fill="{COLOURS[place]}"/>'
                     f'<text x="{x + 8}" y="20">{method}</text>')
    parts.append(f'<text x="140" y="{top + 36}">{unit}; 0 is LoRA; better &#8594;</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="860" height="{top + 46}" font-family='
            '"sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>\n'
            + "\n".join(parts) + "\n</svg>\n")


# --- Main

def finished(task: Task, cell: tuple, method: str, size: dict, args) -> dict:
    """A method's line in a cell: the grid of rates, widened while its best lies at an edge."""
    size = size | task.sizes
    steps = 2 if args.dry else size["steps"]
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
    return {"cell": cell, "method": method, "backbone": task.backbone} | line


def main() -> None:
    """Runs what is missing, cell by cell, and prints the table."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("quick", "long", "gpu", "dry", "table"):
        p.add_argument(f"--{flag}", action="store_true")
    p.add_argument("--cells", nargs="*", default=KINDS, choices=KINDS)
    p.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS, metavar="M")
    p.add_argument("--minutes", type=float, default=1e9, help="no run is started after these")
    p.add_argument("--out", default="out/bench", help="where pretrained backbones are kept")
    p.add_argument("--results", type=Path, default=ROOT / "tests" / "results")
    p.add_argument("--text")
    p.add_argument("--stories")
    args, began, tasks, lines, total = p.parse_args(), time.perf_counter(), {}, {}, 0.0
    args.device = "cuda" if args.gpu and not args.dry else "cpu"
    name = next((flag for flag in ("quick", "long", "gpu") if getattr(args, flag)), "default")
    size, path = SIZES[name], args.results / f"{name}.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        line = json.loads(line)
        lines[(*line["cell"], line["method"])] = line
    work = [(*cell, method) for cell, methods in size["cells"] for method in methods
            if method in args.methods and cell[0] in args.cells]
    for *cell, method in [] if args.table else work:
        late = time.perf_counter() - began > 60 * args.minutes
        if (*cell, method) in lines or late:
            continue
        lacks_peft = method in OTHERS and not importlib.util.find_spec("peft")
        if lacks_peft or (cell[0] == "stories" and not args.stories):
            print(f"{cell} {method} is left out: needs", "PEFT" if lacks_peft else "--stories")
            continue
        if cell[0] not in tasks:
            tasks[cell[0]] = Task(cell[0], size[cell[0]], args)
            for (kind, *_), line in () if args.dry else lines.items():
                if kind == cell[0] and line.get("backbone") != tasks[kind].backbone:
                    raise ValueError(f"{path}: of another backbone {kind}: give a new --results")
        started = time.perf_counter()
        line = finished(tasks[cell[0]], cell, method, size, args)
        seconds = time.perf_counter() - started
        total += seconds * (size | size[cell[0]])["steps"] / 2
        print(f"{cell} {method}: {seconds:.0f} s", flush=True)
        if not args.dry:
            lines[(*cell, method)] = line
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
    if args.dry:
        print(f"expected: at most {total / 60:.0f} minutes beside pretraining, on this machine")
    cells, methods = [cell for cell, _ in size["cells"]], [*METHODS, "SHiRA"]    # no more: SHiRA
    order = sorted(lines, key=lambda k: (cells.index(k[:3]), methods.index(k[3])))
    if lines:
        show({key: lines[key] for key in order}, name, args.results)


if __name__ == "__main__":
    raise SystemExit(train_vit.exit_status(main))
