"""Does it work? StructLoRA against LoRA of the same rank, and of four times the rank.

    python tests/bench_accuracy.py --quick       one cell, four methods: minutes on two CPU cores
    python tests/bench_accuracy.py               text and vision, small backbones: hours on a CPU
    python tests/bench_accuracy.py --gpu         backbones of width 512 and 384: minutes on a GPU
    ... --dry       two steps of each cell, and what the whole is expected to take
    ... --table     the tables and figures again, from the lines under tests/results
    ... --text F    adapt to this text instead of the manual that ships with Python
    ... --cifar10 D pretrain on and adapt to the pictures of this folder (CIFAR-10, binary)

A cell is one frozen backbone, a number of labelled examples and a rank. Text: a byte-level LLaMA
pretrained on the Python sources of this installation, adapted to English; bits a byte. Vision: a
ViT pretrained on drawn pictures, adapted to their inverted colours; cross entropy and accuracy.

Protocol. A seed draws the labelled examples, the initial factors, the random signs and the order of
the batches, the same for every method, so that differences pair. All seeds and learning rates of a
method run as one batch: torch.vmap over functional_call of the adapted model. Rates are factors of
two; while the best of them (mean loss over the seeds) lies at an edge, the next one is run too. The
rate that counts for one half of the seeds is chosen on the other half. Intervals are 95% of the
paired difference to LoRA (Student's t); p is Holm's over the table. Every run is a line of
tests/results/SIZE.jsonl; what is there is not run again.
"""

import argparse
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

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]
import structlora
import train_llama
import train_vit
from structlora import Config, attach

RESULTS = ROOT / "tests" / "results"
FIRST_SEED = 1000                    # nobody picked them: 1000, 1001, ...

# name -> (factor on the rank, changes of Config, kind of layer)
LORA = {"gate": "none", "coordinator": "none"}
METHODS = {
    "LoRA": (1, LORA), "LoRA 4r": (4, LORA), "hybrid": (1, {}), "all": (1, {"edges": "all"}),
    "gate only": (1, {"coordinator": "none"}),
    "concrete gate only": (1, {"coordinator": "none", "gate": "concrete"}),
    "depth": (1, {"edges": "depth"}), "similarity": (1, {"edges": "similarity"}),
    "hybrid, no gate": (1, {"gate": "none"}), "all, no gate": (1, {"gate": "none", "edges": "all"}),
    "all, no gate, uniform": (1, {"gate": "none", "edges": "all", "coordinator": "uniform"}),
    "all, |M| = 1/sqrt(L-1)": (1, {"edges": "all"}), "hybrid, budget r": (1, {"budget": 1}),
    "DoRA": (1, LORA), "AdaLoRA": (1, LORA), "SHiRA": (1, LORA)}
MAIN = ("LoRA", "LoRA 4r", "hybrid", "all", "gate only")

# pretrain: (steps, examples in a step); batch: examples in a step; cells: (backbone, examples, rank).
# Methods that are not in `methods` are run in the first cell; `more` are the last cells to be run.
TEXT = dict(width=128, layers=6, length=64, pretrain=(1500, 32), batch=8)
SIZES = {
    "quick": dict(seeds=4, rates=2, steps=100, methods=MAIN[:4], text=TEXT | {"pretrain": (600, 32)},
                  cells=[("text", 512, 1)], more=[]),
    "default": dict(seeds=8, rates=3, steps=100, methods=MAIN, text=TEXT, more=[],
                    vision=dict(width=96, layers=6, pretrain=(800, 32), batch=32),
                    cells=[("text", 512, 1), ("text", 64, 1), ("vision", 100, 1), ("vision", 20, 1),
                           ("text", 512, 4), ("text", 64, 4), ("vision", 100, 4), ("vision", 20, 4)]),
    "gpu": dict(seeds=8, rates=4, steps=100, methods=MAIN,
                text=dict(width=512, layers=8, length=128, pretrain=(1500, 128), batch=16),
                deep=dict(width=256, layers=16, length=128, pretrain=(1000, 128), batch=16),
                vision=dict(width=384, layers=8, pretrain=(600, 128), batch=32),
                cells=[("text", 512, 1), ("text", 64, 1), ("vision", 100, 1), ("text", 512, 4),
                       ("text", 64, 4), ("vision", 20, 1), ("deep", 512, 1)],
                more=[("vision", 100, 4), ("vision", 20, 4), ("text", 512, 16), ("text", 64, 16),
                      ("vision", 100, 16), ("vision", 20, 16)])}
START_RATE = 8e-3                    # the lowest of the first grid


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
    source, pool, test = (train_vit.draw(n, seed, False) for n, seed in ((8000, 0), (8000, 1), (500, 2)))
    if args.cifar10:
        (images, labels), test, _ = train_vit.read_images(args.cifar10)
        half = len(labels) // 2
        source, pool = (images[:half], labels[:half]), (images[half:], labels[half:])
    config = train_vit.ViTConfig(source[0].shape[2], 4, sizes["width"], sizes["layers"],
                                 sizes["width"] // 32, 4 * sizes["width"], 10)
    pool, test = ((255 - images, labels) for images, labels in (pool, test))
    return (train_vit.ViT(config), *((train_vit.prepare(images, config), labels)
                                     for images, labels in (source, pool, test)))


class Task:
    """A pretrained, frozen backbone, and what it is adapted to."""

    def __init__(self, kind: str, sizes: dict, args):
        self.kind, self.sizes, self.device = kind, sizes, args.device
        make = vision_task if kind == "vision" else text_task
        self.model, source, self.pool, self.test = make(sizes, args)
        torch.manual_seed(0)
        for parameter in self.model.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.model.to(self.device)
        name = "-".join(str(value) for value in (kind, *sizes.values(), bool(args.cifar10)))
        name = name.replace(", ", "x").strip("()")
        path = Path(args.out) / f"{name}.pt"
        if path.exists():
            self.model.load_state_dict(torch.load(path, self.device, weights_only=True))
        else:
            steps, batch = sizes["pretrain"]
            loss, chance = self.pretrain(source, 2 if args.dry else steps, batch)
            if not args.dry and not loss < 0.8 * chance:
                raise ValueError(f"pretraining {name}: the loss is {loss:.3f}, chance {chance:.3f}")
            print(f"pretrained {name}: loss {loss:.3f}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not args.dry:
                structlora.write(path, self.model.state_dict())
        if self.device != "cpu":
            self.model.bfloat16()

    def pretrain(self, source: tuple, steps: int, batch: int) -> tuple[float, float]:
        """Trains all weights -> (last loss, loss of guessing)."""
        lr = 2e-3 * (128 / self.sizes["width"]) ** 0.5
        optimizer = torch.optim.AdamW(self.model.parameters(), lr, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: train_vit.warmup_cosine(step, steps))
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            i = torch.randint(len(source[1]), (batch,), generator=generator)
            x, y = (part[i].to(self.device) for part in source)
            with torch.autocast(self.device, torch.bfloat16, self.device != "cpu"):
                logits = self.model(x).float().flatten(0, -2)
            loss = F.cross_entropy(logits, y.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()
        return loss.item(), math.log(logits.shape[1])

    def labelled(self, seed: int, count: int) -> tuple:
        """The examples that a seed draws: `count` windows, or `count` pictures of each class."""
        if self.kind != "vision":
            return windows(self.pool, count, self.sizes["length"], seed)
        return train_vit.take(self.pool, train_vit.choose(self.pool[1], count, None, seed))


# --- Other people's methods, a few lines each


class Other(nn.Linear):
    """A frozen layer with another update; what it trains is called *_o."""

    def __init__(self, linear: nn.Linear, kind: str, rank: int, generator: torch.Generator):
        d, k = linear.weight.shape
        super().__init__(k, d, linear.bias is not None, device="meta")
        self.weight, self.bias, self.kind = linear.weight, linear.bias, kind
        r = math.ceil(1.5 * rank) if kind == "AdaLoRA" else rank         # it prunes from 1.5 r to r
        if kind == "SHiRA":                  # as many weights as LoRA trains, at random places
            self.register_buffer("places", torch.randperm(d * k, generator=generator)[:r * (d + k)])
            self.values_o = nn.Parameter(torch.zeros(r * (d + k)))
        else:
            self.A_o = nn.Parameter(torch.empty(r, k).uniform_(-1, 1, generator=generator) / k**0.5)
            self.B_o = nn.Parameter(torch.zeros(d, r))
            self.norm_o = nn.Parameter(linear.weight.detach().float().norm(dim=1))       # DoRA's
        if kind == "AdaLoRA":                # P diag(lambda) Q, with lambda = 0 at the start
            nn.init.normal_(self.B_o, std=0.02, generator=generator)
            self.norm_o = nn.Parameter(torch.zeros(r))
        self.to(linear.weight.device)

    def forward(self, x):
        y, (d, k) = F.linear(x, self.weight), self.weight.shape
        bias = 0 if self.bias is None else self.bias
        if self.kind == "SHiRA":             # Bhardwaj et al. 2024
            delta = torch.zeros(d * k, device=x.device).index_put((self.places,), self.values_o)
            return y + F.linear(x, delta.view(d, k).to(x.dtype)) + bias
        A, B, norm = self.A_o, 2 * self.B_o, self.norm_o
        if self.kind == "AdaLoRA":           # Zhang et al. 2023
            return y + F.linear(x, A.to(x.dtype)) @ (norm[:, None] * B.T).to(x.dtype) + bias
        with torch.no_grad():                # DoRA (Liu et al. 2024): |W + B A| by rows, detached
            W = self.weight.float()
            now = (W + B @ A).norm(dim=1)
        return (y + F.linear(x, A.to(x.dtype)) @ B.T.to(x.dtype)) * (norm / now).to(x.dtype) + bias


def attach_other(model: nn.Module, kind: str, rank: int, seed: int) -> dict[str, nn.Linear]:
    """Replaces q_proj and v_proj -> what was there, by name."""
    plain = {n: m for n, m in model.named_modules() if n.endswith(("q_proj", "v_proj"))}
    generator = torch.Generator().manual_seed(seed)
    place(model.requires_grad_(False), {n: Other(m, kind, rank, generator) for n, m in plain.items()})
    return plain


def place(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Puts layers into the model by name."""
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


# --- A batch of experiments


class Loss(nn.Module):
    """(x, y) -> (mean loss, with what the method adds to it in training, accuracy)."""

    def __init__(self, task: Task, penalty):
        super().__init__()
        self.model, self.task, self.penalty = task.model, task, penalty

    def forward(self, x, y):
        if x.is_floating_point():
            x = x.to(next(self.model.parameters()).dtype)
        logits = self.model(x).float().flatten(0, -2)
        loss = F.cross_entropy(logits, y.flatten())
        if self.training:
            loss = loss + self.penalty()
        return loss, (logits.argmax(1) == y.flatten()).float().mean()


class Experiments:
    """len(seeds) x len(rates) fine-tunings of one frozen model at once, E of them, the rates of a
    seed side by side: whatever differs between them has a leading dimension E."""

    def __init__(self, task: Task, method: str, examples: int, rank: int, seeds: list, rates: list):
        self.task, self.method, self.seeds, self.rates = task, method, seeds, rates
        factor, changes = METHODS[method]
        rank, changes = factor * rank, {key: rank if key == "budget" else value
                                        for key, value in changes.items()}
        config = Config(rank=rank, alpha=2.0 * rank, **changes)
        starts, data, self.adapters, self.plain, self.memory = [], [], None, {}, {}
        for seed in seeds:
            self.detach()
            starts.append({n: t.detach().clone() for n, t in self.attach(config, seed).items()})
            data.append(task.labelled(seed, examples))
        count = data[0][1].numel()                               # N of Eq. 4
        self.loss = Loss(task, lambda: self.adapters.penalty(count) if self.adapters
                         else self.orthogonality())
        stacked = {f"model.{n}": torch.stack([s[n] for s in starts for _ in rates]) for n in starts[0]}
        self.x, self.y = (torch.stack(part).to(task.device) for part in zip(*data))
        self.lr = torch.tensor([rate for _ in seeds for rate in rates], device=task.device)
        own = dict(self.loss.named_parameters())
        self.buffers = {n: t for n, t in stacked.items() if n not in own}
        self.trained = {n: t for n, t in stacked.items() if n in own}
        # All but the probes are parts of one matrix [E, P], so that a step of AdamW is a few lines.
        self.names = [n for n in self.trained if not n.endswith(".probe")]
        parts = [self.trained[n].reshape(len(self.lr), -1) for n in self.names]
        self.flat, gate, kept = torch.cat(parts, 1), [], []
        self.m, self.v = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        for n, part in zip(self.names, self.flat.split([part.shape[1] for part in parts], 1)):
            self.trained[n] = part.view_as(self.trained[n])
            gate += [".gate." in n] * part.shape[1]
            kept += [".gate." in n or ".structlora." in n] * part.shape[1]
        self.gate, self.kept = (torch.tensor(flags, device=task.device) for flags in (gate, kept))

    def attach(self, config: Config, seed: int) -> dict[str, torch.Tensor]:
        """The tensors that this seed's experiments start from; the same A for every method."""
        torch.manual_seed(seed)
        model = self.task.model
        if self.method in ("DoRA", "AdaLoRA", "SHiRA"):
            self.plain = attach_other(model, self.method, config.rank, seed)
            return {n: t for n, t in model.state_dict().items() if n.endswith(("_o", "places"))}
        self.adapters = attach(model, config)
        for number, layer in enumerate(self.adapters.layers.values()):
            generator = torch.Generator().manual_seed(1000 * seed + number)
            start = torch.empty(layer.A.shape).uniform_(-1, 1, generator=generator)
            layer.A.data.copy_(start / layer.A.shape[1] ** 0.5)
        for graph in self.adapters.graphs:
            if "sqrt" in self.method:
                graph.rho.data.fill_((len(graph.names) - 1) ** 0.5)
        own = self.adapters.state()["state"]
        return {n: t for n, t in own.items() if not n.endswith((".P", ".Q"))}

    def detach(self) -> None:
        """Puts the plain layers back."""
        if self.adapters:
            self.adapters.detach()
        place(self.task.model, self.plain)

    def each(self, function, x, y, shared: bool) -> tuple:
        """function(trained tensors, other tensors, x, y) of all experiments, whose batches are x, y
        [E, B, ...] or shared [B, ...]."""
        dims = (0, 0, None, None) if shared else 0
        with sdpa_kernel(SDPBackend.MATH):
            return torch.vmap(function, dims, randomness="different")(self.trained, self.buffers, x, y)

    def scored(self, trained: dict, buffers: dict, x, y) -> tuple:
        """(loss, accuracy) of one experiment."""
        return functional_call(self.loss, trained | buffers, (x, y))

    def step(self, step: int, steps: int, batch: int) -> None:
        """One optimizer step of every experiment, in the order of the scripts' loops."""
        chosen = [train_vit.batch_indices(len(self.x[0]), batch, step, seed) for seed in self.seeds]
        x, y = (torch.stack([part[i] for part, i in zip(parts, chosen)])
                .repeat_interleave(len(self.rates), 0) for parts in (self.x, self.y))
        self.loss.train()
        grads, _ = self.each(grad_and_value(self.scored, has_aux=True), x, y, shared=False)
        self.observe(grads)
        t, gate_lr = step + 1, 0.05 if "budget" in self.method else 0.01
        g = torch.cat([grads[n].reshape(len(self.lr), -1) for n in self.names], 1)       # [E, P]
        g *= (1 / (g.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)
        rate = torch.where(self.gate, gate_lr, self.lr[:, None])                         # [E, P]
        rate *= train_vit.warmup_cosine(step, steps)
        self.flat *= 1 - 0.01 * rate * ~self.kept                # AdamW, one rate per experiment
        self.m.lerp_(g, 0.1)
        self.v.mul_(0.999).addcmul_(g, g, value=0.001)
        self.flat -= rate * (self.m / (1 - 0.9**t)) / ((self.v / (1 - 0.999**t)).sqrt() + 1e-8)
        if self.method == "hybrid, budget r":
            self.prune(t / steps)
        if self.method == "AdaLoRA":
            self.allocate(grads, t / steps)

    @torch.no_grad()
    def observe(self, grads: dict) -> None:
        """adapters.observe_gradients() for each experiment: its similarity edges are its own."""
        for number, graph in enumerate(self.adapters.graphs if self.adapters else ()):
            name = f"model.structlora.{number}."
            self.buffers[name + "steps"] += 1
            probes = [grads.pop(n) for n in list(grads) if n.endswith(".probe") and n[6:-6] in graph.names]
            if not probes:
                continue
            mean, hears = self.buffers[name + "gradient"], self.buffers[name + "hears"]
            mean.lerp_(torch.stack(probes, 1), 0.1)
            for e in range(len(mean)) if graph.learns_edges else ():
                graph.gradient.copy_(mean[e])
                graph.hears.copy_(hears[e])
                hears[e][:, -1] = graph.most_similar()
            if int(self.buffers[name + "steps"][0]) >= (10 if graph.learns_edges else 1):
                for layer_name, layer in zip(graph.names, graph.layers):
                    layer.probe.requires_grad_(False)
                    del self.trained[f"model.{layer_name}.probe"]

    def load(self, e: int) -> None:
        """Puts experiment e's tensors into the model."""
        state = {n.removeprefix("model."): t[e].detach() for n, t in (self.trained | self.buffers).items()}
        self.task.model.load_state_dict(state, strict=False)

    def prune(self, progress: float) -> None:
        """adapters.prune() for each experiment."""
        for e in range(len(self.lr)):
            self.load(e)
            self.adapters.prune(progress)
            for number, graph in enumerate(self.adapters.graphs):
                self.buffers[f"model.structlora.{number}.sign"][e] = graph.sign

    def orthogonality(self) -> torch.Tensor:
        """AdaLoRA's penalty, 0.1 |P^T P - I|^2 + 0.1 |Q Q^T - I|^2 over its layers; 0 for others."""
        total = torch.zeros((), device=self.task.device)
        for module in self.task.model.modules():
            if isinstance(module, Other) and module.kind == "AdaLoRA":
                one = torch.eye(len(module.A_o), device=total.device)
                total = total + 0.1 * (module.B_o.T @ module.B_o - one).square().sum()
                total = total + 0.1 * (module.A_o @ module.A_o.T - one).square().sum()
        return total

    @torch.no_grad()
    def allocate(self, grads: dict, progress: float) -> None:
        """AdaLoRA keeps the directions of largest smoothed sensitivity |w dL/dw| times uncertainty,
        from 1.5 r to r a layer on a cubic schedule between 10% and 70% of training."""
        score = {}
        for name, grad in grads.items():
            now, (mean, spread) = (self.trained[name] * grad).abs(), self.memory.get(name, (0.0, 0.0))
            mean = 0.85 * mean + 0.15 * now
            self.memory[name] = mean, 0.85 * spread + 0.15 * (now - mean).abs()
            score[name] = self.memory[name][0] * self.memory[name][1]
        names = [name[:-6] for name in grads if name.endswith("norm_o")]
        scores = torch.stack([score[n + "norm_o"] + score[n + "A_o"].mean(2) + score[n + "B_o"].mean(1)
                              for n in names], 1)                                # [E, L, r']
        left = (1 - min(1.0, max(0.0, (progress - 0.1) / 0.6))) ** 3
        keep = round(scores[0].numel() * (1 + 0.5 * left) / 1.5)
        best, flat = scores.flatten(1).topk(keep, 1).indices, torch.zeros_like(scores.flatten(1))
        mask = flat.scatter(1, best, 1.0).view_as(scores)
        for number, name in enumerate(names):
            self.trained[name + "norm_o"] *= mask[:, number]

    @torch.no_grad()
    def scores(self) -> torch.Tensor:
        """[E, 2] mean loss and accuracy on the test examples."""
        self.loss.eval()
        x, y = self.task.test
        total = torch.zeros(len(self.lr), 2, device=self.task.device)
        for a, b in zip(x.split(32), y.split(32)):
            parts = self.each(self.scored, a.to(self.task.device), b.to(self.task.device), shared=True)
            total += torch.stack(parts, 1) * len(b)
        return total / len(y)


def run(task: Task, method: str, examples: int, rank: int, seeds: list, rates: list, size: dict,
        dry: bool) -> dict:
    """One method in one cell -> what a line of the results says of these rates."""
    experiments = Experiments(task, method, examples, rank, seeds, rates)
    steps = 2 if dry else size["steps"]
    for step in range(steps):
        if step == min(20, steps - 1):                           # timed once the edges have settled
            began = time.perf_counter()
        experiments.step(step, steps, task.sizes["batch"])
    if task.device != "cpu":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / (steps - min(20, steps - 1))
    scores = experiments.scores().view(len(seeds), len(rates), 2)
    trainable = experiments.flat.shape[1]
    merged, cosine = [], None
    if experiments.adapters:
        for e in range(len(rates)):                              # of the first seed
            experiments.load(e)
            kept = experiments.adapters.diagnostics()["kept"].values()
            merged.append(sum(kept) / len(kept))
        matrices = experiments.adapters.diagnostics()["cosine_matrix"]
        cosine = [[round(v, 2) for v in row] for row in next(iter(matrices.values())).tolist()]
    experiments.detach()
    rounded = [[[round(v, 5) for v in pair] for pair in row] for row in scores.tolist()]
    return {"rates": rates, "scores": rounded, "trainable": trainable, "merged": merged,
            "ms": round(1e3 * seconds / len(experiments.lr), 3), "cosine": cosine}


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
    low, high = 0.0, 100.0
    while high - low > 1e-6:                 # the t whose two-sided p is 5%
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, len(values) - 1) > 0.05 else (low, middle)
    return mean, low * error, two_sided(mean / max(error, 1e-12), len(values) - 1)


def counted(line: dict) -> tuple[torch.Tensor, int]:
    """Scores [seeds, 2], each at the rate that the other half of the seeds has chosen, and the
    place of the first half's rate."""
    scores = torch.tensor(line["scores"])                        # [seeds, rates, 2]
    half = len(scores) // 2
    first, second = (int(part[..., 0].mean(0).argmin()) for part in (scores[half:], scores[:half]))
    return torch.cat([scores[:half, first], scores[half:, second]]), first


def table(lines: dict) -> list[dict]:
    """A row for each cell and method; "gain" holds the paired difference to the cell's LoRA."""
    rows = []
    for (*cell, method), line in lines.items():
        baseline = lines.get((*cell, "LoRA"))
        if baseline:
            scores, picked = counted(line)
            unit = 1.0 if cell[0] == "vision" else 1 / math.log(2)       # nats, or bits a byte
            gain = interval((scores - counted(baseline)[0])[:, 0] * unit)
            loss, accuracy = (scores.mean(0) * torch.tensor([unit, 100.0])).tolist()
            rows.append({"cell": "{} {} r{}".format(*cell), "method": method,
                         "seeds": str(len(scores)),
                         "parameters": f"{line['trainable'] / baseline['trainable']:.2f}",
                         "merged rank": f"{line['merged'][picked]:.1f}" if line["merged"] else "-",
                         "loss": f"{loss:.4f}", "accuracy": f"{accuracy:.1f}", "gain": gain,
                         "rate": f"{line['rates'][picked]:.0e}", "ms/step": f"{line['ms']:.2f}"})
    compared, worst = sorted((r for r in rows if r["method"] != "LoRA"), key=lambda r: r["gain"][2]), 0
    for place_, row in enumerate(compared):                      # Holm 1979
        worst = max(worst, min(1.0, row["gain"][2] * (len(compared) - place_)))
        row |= {"to LoRA (95%)": "{:+.4f} +- {:.4f}".format(*row["gain"]), "p (Holm)": f"{worst:.3f}"}
    return rows


def svg(parts: list[str], height: int) -> str:
    """A figure on white ground; text stays text."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{height}" font-family='
            '"sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>\n'
            + "\n".join(parts) + "\n</svg>\n")


def gain_figure(rows: list[dict]) -> str:
    """What a method gains over LoRA of the same rank (right is better), with 95% intervals, in % of
    what LoRA of four times the rank gains; cells where that gains."""
    parts, y, zero = ['<text x="180" y="14">LoRA of the same rank: 0</text>'], 34, 240
    gains = {(r["cell"], r["method"]): r["gain"] for r in rows}
    for cell in dict.fromkeys(r["cell"] for r in rows):
        four = gains.get((cell, "LoRA 4r"), (0, 0, 0))
        if four[0] + four[1] >= 0:
            continue
        parts.append(f'<text x="10" y="{y + 24}" font-weight="bold">{cell}</text>')
        for method, colour in (("hybrid", "#0072B2"), ("all", "#009E73"), ("LoRA 4r", "#888888")):
            share, half = (200 * value / four[0] for value in gains[cell, method][:2])
            x, w = zero + share, abs(half)
            parts.append(f'<line x1="{x - w:.0f}" x2="{x + w:.0f}" y1="{y}" y2="{y}" stroke="{colour}"'
                         f' stroke-width="2"/><circle cx="{x:.0f}" cy="{y}" r="4" fill="{colour}"/>'
                         f'<text x="{x + w + 8:.0f}" y="{y + 4}">{method} {share / 2:.0f}%</text>')
            y += 20
        y += 14
    return svg([f'<line x1="{zero}" x2="{zero}" y1="20" y2="{y}" stroke="#bbb"/>', *parts], y + 10)


def cosine_figure(lines: dict, cell: tuple) -> str:
    """Cosine of the updates of each pair of layers: blue 1, white 0, red -1."""
    parts = []
    for number, method in enumerate(("LoRA", "hybrid", "all")):
        matrix, left = lines[(*cell, method)]["cosine"], 20 + 205 * number
        size = 180 / len(matrix)
        parts.append(f'<text x="{left}" y="16">{method}</text>')
        for place_ in range(len(matrix) ** 2):
            i, j = divmod(place_, len(matrix))
            shade = round(255 * (1 - abs(matrix[i][j])))
            fill = f"rgb({shade},{shade},255)" if matrix[i][j] >= 0 else f"rgb(255,{shade},{shade})"
            parts.append(f'<rect x="{left + j * size:.1f}" y="{26 + i * size:.1f}" width="{size:.1f}" '
                         f'height="{size:.1f}" fill="{fill}" stroke="#ddd"/>')
    return svg(parts, 220)


# --- Main


def read_lines(path: Path) -> dict:
    """(task, examples, rank, method) -> line."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(*line["cell"], line["method"]): line for line in lines}


def finished(task: Task, cell: tuple, method: str, size: dict, args) -> dict:
    """A method's line in a cell: the grid of rates, widened while its best lies at an edge."""
    seeds = list(range(FIRST_SEED, FIRST_SEED + size["seeds"]))
    rates = [START_RATE * 2**i for i in range(size["rates"])]
    line = run(task, method, *cell[1:], seeds, rates, size, args.dry)
    for _ in range(0 if args.dry or args.quick else 4):
        best = int(torch.tensor(line["scores"])[..., 0].mean(0).argmin())
        if 0 < best < len(line["rates"]) - 1:
            break
        rate = line["rates"][0] / 2 if best == 0 else line["rates"][-1] * 2
        more = run(task, method, *cell[1:], seeds, [rate], size, False)
        first, second = (more, line) if best == 0 else (line, more)
        line |= {"rates": first["rates"] + second["rates"],
                 "scores": [a + b for a, b in zip(first["scores"], second["scores"])],
                 "merged": first["merged"] + second["merged"]}
    return {"cell": cell, "method": method} | line


def main() -> None:
    """Runs what is missing, cell by cell, and prints the table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("quick", "gpu", "dry", "table"):
        p.add_argument(f"--{flag}", action="store_true")
    p.add_argument("--text")
    p.add_argument("--cifar10")
    p.add_argument("--out", default="out/bench", help="where pretrained backbones are kept")
    p.add_argument("--results", default=str(RESULTS), help="where the lines go")
    p.add_argument("--minutes", type=float, default=1e9, help="no run is started after these")
    args = p.parse_args()
    name = "quick" if args.quick else "gpu" if args.gpu else "default"
    size, began = SIZES[name], time.perf_counter()
    args.device = "cuda" if args.gpu and not args.dry else "cpu"
    path = Path(args.results) / f"{name}.jsonl"
    lines, tasks, total = read_lines(path), {}, 0.0
    first, others = size["cells"][0], [m for m in METHODS if m not in MAIN and not args.quick]
    work = [(cell, method) for cell in size["cells"] for method in size["methods"]]
    work += [(first, method) for method in others]
    work += [(cell, method) for cell in size["more"] for method in size["methods"]]
    for cell, method in [] if args.table else work:
        late = time.perf_counter() - began > 60 * args.minutes
        if (*cell, method) in lines or late or cell[0] == "deep" and method == "gate only":
            continue
        if cell[0] not in tasks:
            tasks[cell[0]] = Task(cell[0], size[cell[0]], args)
        line = finished(tasks[cell[0]], cell, method, size, args)
        total += line["ms"] * len(line["rates"]) * size["seeds"] * size["steps"] / 1e3
        print(f"{cell} {method}: {line['ms']:.2f} ms a step and experiment, so far "
              f"{time.perf_counter() - began:.0f} s", flush=True)
        if not args.dry:
            lines[(*cell, method)] = line
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
    if args.dry:
        print(f"expected: {total / 60:.0f} minutes beside pretraining, on this machine")
    if lines:
        rows = table(lines)
        columns = ["cell", "method", "seeds", "parameters", "merged rank", "loss", "to LoRA (95%)",
                   "p (Holm)", "accuracy", "rate", "ms/step"]
        structlora.print_table([{c: row.get(c, "") for c in columns} for row in rows])
        if not args.quick:
            structlora.write(RESULTS / f"gain-{name}.svg", gain_figure(rows))
            structlora.write(RESULTS / f"cosine-{name}.svg", cosine_figure(lines, first))


if __name__ == "__main__":
    raise SystemExit(structlora.run(main))
