"""Does it work? Every method tuned alike, compared on fresh seeds, negative results printed.

    python tests/bench_accuracy.py --quick              under 10 minutes on 2 cores (--backbone:
                                                        vit, llama or llava)
    python tests/bench_accuracy.py --full               every cell and method (days on 2 cores)
    python tests/bench_accuracy.py --cells vit:pictures:2:50 --methods lora structlora
    python tests/bench_accuracy.py --trace              what happens inside, LoRA beside StructLoRA
    python tests/bench_accuracy.py --table              the tables of what has been run
    python tests/bench_accuracy.py --table --against structlora     and another method than LoRA
    python tests/bench_accuracy.py --figures            the README's pictures; needs matplotlib

A cell is backbone:task:rank:labels. Labels are per class for images, in all for text (passages of
256 characters for "code"), and questions and as many captions for LLaVA. The backbones have width
64, those of the tasks "wide-..." 128, of "wider-..." 256. In each cell, every method has its
learning rate swept on the tuning seeds 100, 101, ... (four values a factor 2 apart, more while the
best lies at an edge), and is then run on the seeds 0, 1, ... with the best. A seed decides the
pretrained backbone, the labelled examples and the test set, alike for all methods: differences are
paired. Every run is one line in the folder --results and is never run twice.
Another processor rounds differently and pretrains other backbones from the same seed: run all
methods of a seed on one machine (--first-seed begins at seeds that nobody has run). PEFT's methods
need peft; the cells of CIFAR-10 its binary files, in the folder that CIFAR10 names.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Callable, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import torch
import torch.nn as nn
import torch.nn.functional as F

import structlora
import train_llama
import train_llava
import train_vit
from structlora import Config, attach

STEPS = {"vit": 300, "llama": 200, "llava": 200}
RATES = (5e-3, 1e-2, 2e-2, 4e-2)         # where each sweep starts
FULL_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)  # of full fine-tuning
CIFAR = Path(os.environ.get("CIFAR10", ROOT.parent / "shared/data/cifar10"))
TASKS = {"vit": ("pictures", "invert", "rotate", "classes", "wide-pictures", "wide-invert"),
         "llama": ("headings", "code", "wide-headings", "wider-headings"),
         "llava": ("scenes", "cifar")}
WIDTHS = {"": 64, "wide": 128, "wider": 256}          # of the backbone
ON_CIFAR = ("invert", "rotate", "classes", "wide-invert", "cifar")
TUNING = range(100, 200)                 # seeds for learning rates
FRESH = range(100)                       # seeds below the tuning seeds; a setting was settled with
SEEN, UNSEEN = FRESH[:10], FRESH[10:]    # a look at the first ten, none with one at the others
PASSAGE = 256                            # characters of a passage of text


class Cell(NamedTuple):
    """What is learned: backbone, task, rank r, labelled examples."""
    backbone: str
    task: str
    rank: int
    labels: int

    def __str__(self):
        return ":".join(map(str, self))

    @property
    def kind(self) -> str:
        """The task, whatever the backbone's width."""
        return self.task.rpartition("-")[2]

    @property
    def width(self) -> int:
        """Of the backbone."""
        return WIDTHS[self.task.rpartition("-")[0]]


QUICK = {"vit": Cell("vit", "pictures", 2, 50), "llama": Cell("llama", "headings", 2, 128),
         "llava": Cell("llava", "scenes", 2, 200)}


class Problem(NamedTuple):
    """A cell's data and backbone for one seed."""
    load: Callable                   # () -> the pretrained model
    task: structlora.Task
    measure: Callable                # model -> {"accuracy", "loss", "ece"} on the test set
    args: argparse.Namespace
    train_head: bool


# ---------------------------------------------------------------------------------------------
# Problems


def options(cell: Cell, seed: int, cache: Path, device: str, **more) -> argparse.Namespace:
    """What the scripts' functions read of their command line."""
    args = structlora.make_parser("", rank=cell.rank).parse_args([])
    common = dict(seed=seed, device=device, steps=STEPS[cell.backbone], data=None, tokenizer=None,
                  source_classes=None, image_size=None, max_length=512,
                  out=cache / f"{cell.backbone}-{cell.task}-{seed}")
    args.__dict__.update(common | more)
    structlora.check_options(args)
    return args


def expected_calibration_error(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean distance of confidence and accuracy over 15 bins of confidence (Guo et al. 2017)."""
    confidence, predicted = probabilities.max(1)
    bins = (confidence * 15).long().clamp_max(14)
    gaps = [float(((predicted == labels).float() - confidence)[bins == b].sum().abs())
            for b in range(15)]
    return sum(gaps) / len(labels)


def vit_problem(cell: Cell, seed: int, cache: Path, device: str) -> Problem:
    """"pictures": those the script draws; "invert", "rotate", "classes": CIFAR-10, whose one
    backbone serves all seeds."""
    if cell.kind == "pictures":
        draw, classes, shift = train_vit.draw, 10, train_vit.SHIFTS["none"]
        args = options(cell, seed, cache, device, batch_size=32, pretrain_steps=500)
        source = draw(8000, 10 * seed, False), draw(1000, 10 * seed + 1, False)
        train, test = draw(8000, 10 * seed + 2, True), draw(1000, 10 * seed + 3, True)
        backbone = args
    else:
        listed = "0,1,2,3,4" if cell.kind == "classes" else None
        args = options(cell, seed, cache, device, batch_size=32, pretrain_steps=3000,
                       data=str(CIFAR), source_classes=listed)
        train, test, classes = train_vit.read_images(CIFAR)
        source, shift = (train, test), train_vit.SHIFTS.get(cell.kind, lambda x: x)
        if listed:
            source, (train, test), classes = train_vit.split_classes(train, test, classes, listed)
        out = cache / f"vit-{listed}-{cell.width}"
        backbone = argparse.Namespace(**vars(args) | {"seed": 0, "out": out})
    Path(backbone.out).mkdir(parents=True, exist_ok=True)
    path = train_vit.pretrained(*source, backbone, cell.width)
    train = train.select(structlora.choose(train.labels, cell.labels, None, seed))
    load = functools.partial(train_vit.load_vit, path, classes)
    model = load()
    train, test = (part.decoded(model.config.image_size) for part in (train, test))
    train, test = (train_vit.Images(shift(part.pixels), part.labels) for part in (train, test))
    task = train_vit.make_task(train, test, model.config, args, args.batch_size)

    def measure(model):
        logits = torch.cat([model(train_vit.prepare(x.to(device), model.config)).float().cpu()
                            for x in test.pixels.split(256)])
        return classified(logits, test.labels)
    return Problem(load, task, measure, args, train_head=not model.head.weight.any())


def llama_problem(cell: Cell, seed: int, cache: Path, device: str) -> Problem:
    """"headings": the demo of train_llama.py, questions that become headings. "code": one backbone
    for all seeds, pretrained on the prose of Python's own manual, adapted to its library's source:
    real text that everybody has."""
    tokenizer = train_llama.Bytes()
    if cell.kind == "code":
        backbone = options(cell, 0, cache, device, pretrain_steps=2000, max_length=PASSAGE,
                           batch_size=16)
        source, train, test = passages()
        held = source[::10]
    else:
        write = train_llama.write_examples
        backbone = options(cell, seed, cache, device, pretrain_steps=600, batch_size=16)
        source, held = write(8000, 10 * seed, False), write(200, 10 * seed + 1, False)
        train, test = write(8000, 10 * seed + 2, True), write(500, 10 * seed + 3, True)
    args = argparse.Namespace(**vars(backbone) | {"seed": seed})
    folder = train_llama.pretrained(source, held, tokenizer, backbone, cell.width)
    train = train_llama.choose(train, cell.labels, None, seed)
    task = train_llama.make_task(train, test, tokenizer, args, args.batch_size)
    encode = lambda e, choice: train_llama.encode_rows(tokenizer, e.prompt, choice,
                                                       args.max_length, False)[0]
    rows = [encode(e, choice) for e in test for choice in e.choices]
    load = lambda: train_llama.load_llama(folder, torch.float32, device)
    measure = measure_choices if cell.kind == "headings" else measure_text
    return Problem(load, task, functools.partial(measure, test=test, rows=rows, args=args), args,
                   train_head=False)


def passages() -> tuple[list, list, list]:
    """Texts to pretrain on, to adapt to and to test on: Python's manual, its library's modules
    a to m, and n to z."""
    import pydoc_data.topics
    cut = lambda text: [train_llama.Example("", [text[i:i + PASSAGE - 1]])
                        for i in range(0, len(text) - PASSAGE, PASSAGE - 1)]
    prose = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    modules = sorted(p for p in Path(os.__file__).parent.glob("[a-z]*.py"))
    code = [[e for p in modules if (p.name < "n") == first
             for e in cut(p.read_text(encoding="utf-8"))] for first in (True, False)]
    return cut(prose), code[0], code[1][::len(code[1]) // 200]


def measure_choices(model, test, rows, args) -> dict:
    """Accuracy among four choices by likelihood per character; loss per token of the right one."""
    labels = torch.tensor([e.answer for e in test])
    characters = torch.tensor([[len(choice) for choice in e.choices] for e in test])
    nll = train_llama.score(model, rows, args).view(-1, 4)
    tokens = sum(len(rows[4 * n + e.answer].tokens) - rows[4 * n + e.answer].start
                 for n, e in enumerate(test))
    return {"accuracy": ((nll / characters).argmin(1) == labels).float().mean().item(),
            "loss": float(nll.gather(1, labels[:, None]).sum()) / tokens,
            "ece": expected_calibration_error((-nll).softmax(1), labels)}


def measure_text(model, test, rows, args) -> dict:
    """Accuracy of the most likely next byte; loss in nats per byte."""
    logits, labels = [], []
    for at in range(0, len(rows), 32):
        tokens, answers = train_llama.collate(rows[at:at + 32], args.device)
        logits.append(model(tokens[:, :-1], select=answers[:, 1:]).float().cpu())
        labels.append(tokens[:, 1:][answers[:, 1:]].cpu())
    return classified(torch.cat(logits), torch.cat(labels))


def classified(logits: torch.Tensor, labels: torch.Tensor) -> dict:
    """Scores of class logits [N, C]."""
    return {"accuracy": (logits.argmax(1) == labels).float().mean().item(),
            "loss": F.cross_entropy(logits, labels).item(),
            "ece": expected_calibration_error(logits.softmax(1), labels)}


def llava_problem(cell: Cell, seed: int, cache: Path, device: str) -> Problem:
    """"scenes": the demo of train_llava.py, captions that become questions. "cifar": CIFAR-10 in
    words, one backbone for all seeds."""
    llava = train_llava
    own = cell.task == "scenes"
    backbone = options(cell, seed if own else 0, cache, device, batch_size=16, max_length=2048,
                       pretrain_steps=700, max_new_tokens=32, data=None if own else str(CIFAR))
    args = argparse.Namespace(**vars(backbone) | {"seed": seed, "shots": cell.labels})
    if own:
        folder = Path(args.out) / "demo"
        if not folder.exists():
            llava.write_scenes(folder, seed)
        source, (train, test) = (llava.read_data(folder / part, folder / "scenes", seed)
                                 for part in ("pretrain", "adapt"))
    else:
        source, (train, test) = llava.cifar_examples(CIFAR, 0)
    tokenizer = llava.Words([llava.SYSTEM + "USER ASSISTANT:", *(
        text for e in source[0] + train for turn in e.turns for text in turn)])
    path = llava.pretrained(source, tokenizer, backbone)
    load = lambda: llava.load_llava(path / "llava", path / "clip", torch.float32, device)
    task = llava.make_task(llava.choose(train, args), test, tokenizer, load().view, args,
                           args.batch_size)

    def measure(model):
        with contextlib.redirect_stdout(io.StringIO()):          # samples
            return task.evaluate(model)
    return Problem(load, task, measure, args, train_head=False)


PROBLEMS = {"vit": vit_problem, "llama": llama_problem, "llava": llava_problem}


@functools.lru_cache(maxsize=2)
def problem(cell: Cell, seed: int, cache: Path, device: str) -> Problem:
    """The problem, without what its functions print."""
    with contextlib.redirect_stdout(io.StringIO()):
        return PROBLEMS[cell.backbone](cell, seed, cache, device)


# ---------------------------------------------------------------------------------------------
# Methods: what structlora.training_step asks of adapters


class Plain:
    """Trains the parameters that `wanted` chooses by name: all, or the head."""

    def __init__(self, model, cell, wanted=lambda name: True):
        self.model = model
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool(wanted(name)))

    def param_groups(self, lr):
        return [{"params": [p for p in self.model.parameters() if p.requires_grad], "lr": lr,
                 "weight_decay": 0.01}]

    def penalty(self, num_examples):
        return 0.0

    def observe_gradients(self):
        pass

    def prune(self, progress):
        pass

    def finish(self) -> dict:
        """What the line says of the trained model."""
        return {}


def targets(cell: Cell, *names: str) -> tuple:
    """The layers to adapt: with LLaVA, the language model's alone."""
    return tuple("self_attn." * (cell.backbone == "llava") + n for n in names or ("q_proj", "v_proj"))


class Ours(Plain):
    """What attach() makes of a Config, with changes that only this comparison needs."""

    def __init__(self, model, cell, static=None, selector=None, cut=False, **changes):
        rank = changes.pop("rank", cell.rank)
        config = {"rank": rank, "alpha": 2.0 * rank, "targets": targets(cell)} | changes
        self.adapters, self.rank, self.cut = attach(model, Config(**config)), cell.rank, cut
        self.model, self.static = model, static
        self.prune, self.param_groups = self.adapters.prune, self.adapters.param_groups
        for graph in self.adapters.graphs if selector else ():
            graph.importance = functools.partial(selector, graph)

    def penalty(self, num_examples):
        penalty = self.adapters.penalty(num_examples)
        for graph in self.adapters.graphs if self.static else ():
            gram = structlora.gram_matrix([(B.T, A) for A, B in zip(graph.A, graph.B)])
            norm, next_ = gram.diagonal(), gram.diagonal(1)
            if self.static == "laplacian":
                penalty = penalty + 0.1 * (norm[1:] + norm[:-1] - 2 * next_).mean()
            else:
                cosine = next_ / (norm[1:] * norm[:-1]).clamp_min(1e-12).sqrt()
                penalty = penalty + 0.1 * (1 - cosine).mean()
        return penalty

    def observe_gradients(self):
        self.adapters.observe_gradients()

    def finish(self):
        d = self.adapters.diagnostics()
        mean = lambda values: statistics.fmean(values) if values else None
        line = {"merged_rank": mean(d["kept"].values()), "drift": d["drift_energy"],
                "cosine": d["update_cosine"], "rate": sum(d["rate"].values()) or None,
                "coverage": mean(d["svd_coverage"].values())}
        if not self.cut:
            return line
        for name, (B, A) in self.adapters.factors().items():     # the best of rank r, merged
            B, A = structlora.truncate(B, A, self.rank)
            self.adapters.layers[name].base.weight.data += B @ A
        self.adapters.detach()
        return line | {"merged_rank": self.rank}


class Quiet(Ours):
    """The gate as a learned factor of each direction of each message: no noise and no rate."""

    def __init__(self, model, cell):
        super().__init__(model, cell, beta=0.0)
        for graph in self.adapters.graphs:
            graph.gate.log_sigma.data.fill_(-20.0)
            graph.gate.log_sigma.requires_grad_(False)


class Signed(Ours):
    """Neighbours' gates start at random signs, and rho at the degree over the hops: with one hop a
    neighbour's message starts with the weight 1 or -1, as one's own with 1."""

    def __init__(self, model, cell, **changes):
        super().__init__(model, cell, **changes)
        for graph in self.adapters.graphs:
            mu = graph.gate.mu.data[:, 1:]
            mu *= 2 * torch.randint(2, mu.shape, device=mu.device) - 1
            graph.rho.data.fill_(graph.neighbours.shape[1] / graph.config.hops)


class Restless(Ours):
    """Similarity edges that never settle."""

    def observe_gradients(self):
        self.adapters.observations = 0
        self.adapters.observe_gradients()


def add_theta(method, size: float = 1.0, shared: bool = False):
    """A method with the paper's Theta, which equation 6 leaves out, where it is small: in the
    coordinates of the S r directions that reach a layer. B^T (diag M_l + size Theta_l) A, Theta_l
    learned from zero, lets each input direction lead to each output direction. No gate on it.
    shared: one Theta for all layers of a kind, as the paper's; else one for each."""
    def with_theta(model, cell):
        ours = method(model, cell)
        for number, graph in enumerate(ours.adapters.graphs):
            L, width = len(graph.names), graph.senders.shape[1] * cell.rank
            theta = nn.Parameter(torch.zeros(1 if shared else L, width, width,
                                             device=graph.A.device))
            model.register_parameter(f"theta{number}", theta)    # trained as a new head would be
            for name in graph.names:
                hook = functools.partial(through_theta, theta, size)
                ours.adapters.layers[name].register_forward_hook(hook)
        ours.finish = lambda: {"merged_rank": statistics.fmean(
            g.senders.shape[1] * g.config.rank for g in ours.adapters.graphs)}
        return ours
    return with_theta


def through_theta(theta, size, layer, inputs, y):
    """Forward hook: y plus what Theta adds."""
    graph, index = layer.place
    A, B, _, _ = graph.messages_to(index)
    scale = size * graph.config.alpha / graph.config.rank
    theta = theta.expand(len(graph.names), -1, -1)[index]
    return y + scale * (inputs[0] @ A.T @ theta @ B)


def random_importance(graph):
    """A fixed random order of the directions."""
    generator = torch.Generator().manual_seed(len(graph.names) + graph.A.shape[2])
    return torch.rand(graph.kept.shape, generator=generator).to(graph.A.device)


def norm_importance(graph):
    """The norm of each direction's part of the update."""
    scale = graph.scales(with_gate=True).flatten(1).abs()
    sizes = scale * graph.gather(graph.A).norm(dim=-1) * graph.gather(graph.B).norm(dim=-1)
    return sizes.view(graph.kept.shape)


class Sora(Plain):
    """SoRA (Ding et al. 2023): LoRA of rank 3r with a gate per direction that a proximal step
    pulls to zero; its threshold ends training near r directions a layer, or what data wants."""
    THRESHOLD = 5e-4

    def __init__(self, model, cell):
        rank = 3 * cell.rank
        self.adapters = attach(model, Config(rank=rank, alpha=2.0 * rank, targets=targets(cell),
                                             gate="gaussian", beta=0.0, **NO_GRAPH))
        self.model, self.gates = model, [graph.gate for graph in self.adapters.graphs]
        for gate in self.gates:              # no noise: the mean of the gate alone
            gate.log_sigma.data.fill_(-20.0).requires_grad_(False)
            gate.per_layer = functools.partial(self.exact, gate)
            gate.mean = lambda gate=gate: gate.mu

    @staticmethod
    def exact(gate):
        return [(mu, torch.zeros_like(mu)) for mu in gate.mu.flatten(1).unbind()]

    def param_groups(self, lr):
        return self.adapters.param_groups(lr, gate_lr=lr)

    @torch.no_grad()
    def prune(self, progress):
        for gate, graph in zip(self.gates, self.adapters.graphs):
            gate.mu.copy_(F.softshrink(gate.mu, self.THRESHOLD))
            graph.stamp = None

    def finish(self):
        kept = [int((gate.mu != 0).sum()) / len(gate.mu) for gate in self.gates]
        return {"merged_rank": statistics.fmean(kept)}


class Peft(Plain):
    """A method of PEFT, by its configuration class, as it comes."""

    def __init__(self, model, cell, kind, **settings):
        import peft
        self.model, self.step, self.tuner = model, 0, None
        config = getattr(peft, kind)(target_modules=list(targets(cell)), **settings)
        if kind == "AdaLoraConfig":
            self.tuner = peft.AdaLoraModel(model, config, "default")
        elif kind == "VeraConfig":
            peft.VeraModel(model, config, "default")
        else:
            peft.inject_adapter_in_model(config, model)

    def penalty(self, num_examples):             # AdaLoRA keeps its factors near orthogonal
        if self.tuner is None:
            return 0.0
        factors = [p for name, p in self.model.named_parameters() if p.requires_grad
                   and ("lora_A" in name or "lora_B" in name)]
        gram = [p @ p.T if p.shape[0] < p.shape[1] else p.T @ p for p in factors]
        return 0.5 * sum((g - torch.eye(len(g)).to(g)).norm() for g in gram) / len(gram)

    def prune(self, progress):
        if self.tuner is not None:
            self.step += 1
            self.tuner.update_and_allocate(self.step)


PLAIN = {"gate": "none", "coordinator": "none", "edges": "depth"}
NO_GATE, NO_GRAPH = {"gate": "none"}, {"coordinator": "none", "edges": "depth"}


def selected(**changes):
    return lambda model, cell: Ours(model, cell, budget=float(cell.rank), **changes)


METHODS = {
    "frozen": None,
    "head": lambda m, c: Plain(m, c, lambda name: name.startswith(("head", "lm_head"))),
    "full fine-tuning": Plain,
    "lora": lambda m, c: Ours(m, c, **PLAIN),
    "lora matched": lambda m, c: Ours(m, c, rank=c.rank, **PLAIN),       # c.rank is the matched one
    "lora, theta": add_theta(lambda m, c: Ours(m, c, **PLAIN), 0.3),
    "lora dropout 0.1": lambda m, c: Ours(m, c, dropout=0.1, **PLAIN),
    "structlora": Ours,
    "structlora, signed": Signed,
    "structlora, theta": add_theta(Ours, 0.3),
    "structlora, signed, theta": add_theta(Signed, 0.3),
    "structlora, signed, shared theta": add_theta(Signed, 0.3, shared=True),
    "structlora, beta 1": lambda m, c: Ours(m, c, beta=1.0),
    "structlora, beta 1, edges never settle": lambda m, c: Restless(m, c, beta=1.0),
    "structlora, gate without noise": Quiet,
    "structlora, 3 hops": lambda m, c: Ours(m, c, hops=3),
    "gate only, gaussian": lambda m, c: Ours(m, c, **NO_GRAPH),
    "gate only, gaussian, beta 1": lambda m, c: Ours(m, c, beta=1.0, **NO_GRAPH),
    "gate only, concrete": lambda m, c: Ours(m, c, gate="concrete", **NO_GRAPH),
    **{f"coordinator only, {kind}, {edges}, {hops} hop{'s' * (hops > 1)}":
       functools.partial(Ours, coordinator=kind, edges=edges, hops=hops, **NO_GATE)
       for kind, edges, hops in (("attention", "hybrid", 1), ("attention", "depth", 1),
                                 ("attention", "similarity", 1), ("attention", "random", 1),
                                 ("uniform", "hybrid", 1), ("uniform", "depth", 1),
                                 ("attention", "hybrid", 2), ("attention", "hybrid", 3))},
    "coordinator only, theta, hybrid": add_theta(lambda m, c: Ours(m, c, **NO_GATE)),
    "coordinator only, theta, all": add_theta(lambda m, c: Ours(m, c, hops=3, **NO_GATE)),
    "static cosine penalty": lambda m, c: Ours(m, c, static="cosine", **PLAIN),
    "static laplacian penalty": lambda m, c: Ours(m, c, static="laplacian", **PLAIN),
    "select r by gate": selected(),
    "select r at random": selected(selector=random_importance),
    "select r by norm": selected(selector=norm_importance),
    "select r of own 3r": lambda m, c: Ours(m, c, rank=3 * c.rank, budget=float(c.rank),
                                            **NO_GRAPH),
    "cut to r by svd": lambda m, c: Ours(m, c, cut=True),
    "lora 2r on v alone": lambda m, c: Ours(m, c, rank=2 * c.rank, targets=targets(c, "v_proj"),
                                            **PLAIN),
    "sora": Sora,
    "adalora": lambda m, c: Peft(m, c, "AdaLoraConfig", init_r=2 * c.rank, target_r=c.rank,
                                 lora_alpha=2 * c.rank, total_step=STEPS[c.backbone], tinit=50,
                                 tfinal=50),
    "dora": lambda m, c: Peft(m, c, "LoraConfig", r=c.rank, lora_alpha=2 * c.rank, use_dora=True),
    "rslora": lambda m, c: Peft(m, c, "LoraConfig", r=c.rank, lora_alpha=2 * c.rank,
                                use_rslora=True),
    "shira": lambda m, c: Peft(m, c, "ShiraConfig", r=c.rank),
    "vera": lambda m, c: Peft(m, c, "VeraConfig", r=64 * c.rank),
    "lily": lambda m, c: Peft(m, c, "LilyConfig", r=c.rank)}
CORE = ("frozen", "lora", "lora matched", "structlora")


# ---------------------------------------------------------------------------------------------
# Runs


def run(cell: Cell, method: str, lr: float, seed: int, rank: int, cache: Path, device: str) -> dict:
    """One run -> its line. `rank` is the cell's, or that of "lora matched"."""
    torch.set_num_threads(1)
    p = problem(cell, seed, cache, device)
    torch.manual_seed(seed)
    model = p.load().to(device)
    line = {"cell": str(cell), "method": method, "lr": lr, "seed": seed, "rank": rank}
    if METHODS[method] is None:
        return line | measured(p, model) | {"trainable": 0}
    adapters = METHODS[method](model, cell._replace(rank=rank))
    if p.train_head:
        model.head.requires_grad_(True)
    args = argparse.Namespace(**vars(p.args) | {"lr": lr})
    optimizer, times = torch.optim.AdamW(adapters.param_groups(lr)), []
    trainable = sum(q.numel() for group in optimizer.param_groups for q in group["params"])
    torch.manual_seed(seed + 1)
    model.train()
    for step in range(args.steps):
        began = time.perf_counter()
        try:
            structlora.training_step(model, adapters, p.task, args, optimizer, step)
        except FloatingPointError:
            return line | {"accuracy": 0.0, "loss": None, "ece": None, "diverged": step}
        times.append(1e3 * (time.perf_counter() - began))
    line |= adapters.finish()
    return line | measured(p, model) | {"trainable": trainable, "ms": statistics.median(times)}


def measured(p: Problem, model: nn.Module) -> dict:
    model.eval()
    with torch.no_grad():
        return p.measure(model)


class Results:
    """The lines of a folder, by (cell, method, lr, seed): two files for each cell, as those of the
    tuning seeds are the most."""

    def __init__(self, folder: Path):
        self.folder, self.lines = folder, {}
        for path in sorted(folder.glob("*.jsonl")):
            for text in path.read_text().splitlines():
                self.remember(json.loads(text))

    def remember(self, line: dict) -> None:
        self.lines[line["cell"], line["method"], line["lr"], line["seed"]] = line

    def add(self, line: dict) -> None:
        """Appends to the file of its cell, numbers to five digits."""
        line = {key: float(f"{value:.5g}") if isinstance(value, float) else value
                for key, value in line.items() if value is not None}
        self.remember(line)
        self.folder.mkdir(parents=True, exist_ok=True)
        name = line["cell"].replace(":", "-") + "-tuning" * (line["seed"] not in FRESH)
        with open(self.folder / f"{name}.jsonl", "a") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def get(self, cell: Cell, method: str, lr: float, seeds) -> list[dict]:
        """Lines of the seeds that have been run."""
        keys = ((str(cell), method, lr, seed) for seed in seeds)
        return [self.lines[key] for key in keys if key in self.lines]


def sweep(results: Results, cell: Cell, method: str, tuning: range,
          counted: range = TUNING) -> tuple[list, float | None]:
    """(learning rates still to be tried, or []; the best one once all have been). Judged
    on those of the seeds `counted` that all rates have, at the least `tuning`."""
    rates = list(FULL_RATES if method in ("full fine-tuning", "head") else RATES)
    for _ in range(4):
        tried = [{line["seed"]: line["accuracy"] for line in results.get(cell, method, lr, counted)}
                 for lr in rates]
        if not all(set(tuning) <= set(accuracy) for accuracy in tried):
            return rates, None
        seeds = set.intersection(*map(set, tried))
        means = {lr: statistics.fmean(accuracy[seed] for seed in sorted(seeds))
                 for lr, accuracy in zip(rates, tried)}
        best = max(means, key=means.get)
        if min(rates) < best < max(rates):
            break
        rates.append(best / 2 if best == min(rates) else best * 2)
        rates.sort()
    return [], best


def missing(results: Results, cell: Cell, method: str, tuning: range, seeds: range) -> list[tuple]:
    """The runs that come next for this method: of its sweep, then of the fresh seeds."""
    rank = cell.rank
    if METHODS[method] is None:
        rates, seeds_of = [0.0], seeds
    else:
        if method == "lora matched":
            rank = matched_rank(results, cell, tuning)
            if rank is None:
                return []
        rates, best = sweep(results, cell, method, tuning)
        rates, seeds_of = (rates, tuning) if rates else ([best], seeds)
    return [(cell, method, lr, seed, rank) for seed in seeds_of for lr in rates
            if (str(cell), method, lr, seed) not in results.lines]


def matched_rank(results: Results, cell: Cell, tuning: range) -> int | None:
    """StructLoRA's mean merged rank in its sweep at the best rate, rounded; None before that."""
    _, best = sweep(results, cell, "structlora", tuning)
    lines = results.get(cell, "structlora", best, tuning) if best else []
    return round(statistics.fmean(line["merged_rank"] for line in lines)) if lines else None


def run_all(cells: list[Cell], methods: list[str], args) -> None:
    """Runs what is missing, in rounds, since a sweep decides what follows it."""
    results, tuning = Results(args.results), range(100, 100 + args.tuning)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    device = "cuda" if args.gpu else "cpu"
    context = multiprocessing.get_context("spawn")
    failed = set()
    with ProcessPoolExecutor(args.processes, context) as pool:
        while True:
            jobs = [job for cell, method in itertools.product(cells, methods)
                    if (str(cell), method) not in failed
                    for job in missing(results, cell, method, tuning, seeds)]
            if not jobs:
                return
            prepare(pool, jobs, args.cache, device)
            jobs.sort(key=lambda job: (job[0], job[3]))          # a worker's data serve it again
            futures = {pool.submit(run, *job, args.cache, device): job for job in jobs}
            for number, future in enumerate(as_completed(futures), 1):
                job = futures[future]
                try:
                    results.add(future.result())
                except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
                    if (str(job[0]), job[1]) not in failed:
                        print(f"{job[0]} {job[1]}: not run: {structlora.one_line(error)}")
                    failed.add((str(job[0]), job[1]))
                print(f"\r{number} of {len(jobs)} runs", end="", file=sys.stderr, flush=True)


def prepare(pool, jobs: list[tuple], cache: Path, device: str) -> None:
    """Pretrains each backbone once, before two workers would at the same time."""
    own = lambda cell: cell.kind in ("pictures", "headings", "scenes")   # a backbone for each seed
    first = {(cell.backbone, cell.width, cell.kind in ("classes", "code"), own(cell) and seed):
             (cell, seed) for cell, _, _, seed, _ in jobs}
    list(pool.map(warm, [(cell, seed, cache, device) for cell, seed in first.values()]))


def warm(arguments: tuple) -> None:
    torch.set_num_threads(1)
    problem(*arguments)


def trace(results: Results, args) -> None:
    """Diagnostics every tenth step of LoRA, LoRA of the matched rank and StructLoRA at their best
    rates, seed 0, on the pictures at rank 2, into trace.json beside the results."""
    cell, lines, device = Cell("vit", "pictures", 2, 50), {}, "cuda" if args.gpu else "cpu"
    tuning = range(100, 100 + args.tuning)
    for method in ("lora", "lora matched", "structlora"):
        _, lr = sweep(results, cell, method, tuning)
        matched = method == "lora matched" and matched_rank(results, cell, tuning)
        p = problem(cell, 0, args.cache, device)
        torch.manual_seed(0)
        model = p.load().to(device)
        ours = METHODS[method](model, cell._replace(rank=matched or cell.rank))
        optimizer = torch.optim.AdamW(ours.param_groups(lr or 1e-2))
        torch.manual_seed(1)
        lines[method] = {"step": [], "drift": [], "cosine": []}
        model.train()
        for step in range(p.args.steps):
            structlora.training_step(model, ours, p.task, p.args, optimizer, step)
            if step % 10 == 9:
                d = ours.adapters.diagnostics()
                for key, value in (("step", step + 1), ("drift", d["drift_energy"]),
                                   ("cosine", d["update_cosine"])):
                    lines[method][key].append(round(value, 4))
        lines[method]["matrix"] = {kind: [[round(v, 3) for v in row] for row in matrix.tolist()]
                                   for kind, matrix in d["cosine_matrix"].items()}
        spectra = [structlora.singular_values(B, A).square()
                   for B, A in ours.adapters.factors().values()]
        lines[method]["coverage"] = [round(statistics.fmean(float(s[:k].sum() / s.sum())
                                                            for s in spectra), 4)
                                     for k in range(1, max(map(len, spectra)) + 1)]
        if ours.adapters.config.gate != "none":
            lines[method]["snr"] = {name: [round(v, 3) for v in score.flatten().tolist()]
                                    for g in ours.adapters.graphs
                                    for name, score in zip(g.names, g.gate.score())}
    structlora.write_json(args.results / "trace.json", lines)


# ---------------------------------------------------------------------------------------------
# Tables


def student(t: float, degrees: int) -> float:
    """Two-sided p of Student's t, by Simpson's rule on its density."""
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
    scale /= math.sqrt(degrees * math.pi)
    density = lambda x: scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)
    n, h = 2000, min(abs(t), 200.0) / 2000
    area = density(0) + density(n * h)
    area += sum((4 if i % 2 else 2) * density(i * h) for i in range(1, n))
    return max(0.0, 1 - 2 * area * h / 3)


def critical(degrees: int) -> float:
    """|t| at p = 0.05."""
    low, high = 0.0, 100.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if student(middle, degrees) > 0.05 else (low, middle)
    return low


def paired(mine: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """(mean difference, half width of its 95% interval, p of the paired t-test)."""
    differences = [a - b for a, b in zip(mine, theirs)]
    mean, n = statistics.fmean(differences), len(differences)
    error = statistics.stdev(differences) / math.sqrt(n)
    if error == 0:
        return mean, 0.0, 1.0 if mean == 0 else 0.0
    return mean, critical(n - 1) * error, student(mean / error, n - 1)


def holm(values: list[float]) -> list[float]:
    """Holm's correction of p-values."""
    order, result, worst = sorted(range(len(values)), key=values.__getitem__), list(values), 0.0
    for place, i in enumerate(order):
        worst = max(worst, min(1.0, (len(values) - place) * values[i]))
        result[i] = worst
    return result


def compared(results: Results, tuning: range, least: int, among: range = FRESH,
             against: str = "lora") -> list[dict]:
    """A row for each cell and method that has `least` of these seeds in common with `against`, in
    the order of METHODS; differences are to that method on the same cell and seeds, at its best
    rate ("early": on the seeds `tuning` alone, where those at the rate that all chose are too few);
    p-values corrected over all rows, those of the loss by themselves."""
    cells = sorted({Cell(*(int(part) if part.isdigit() else part for part in key[0].split(":")))
                    for key in results.lines})
    rows = []
    for cell in cells:
        best, first = (tuned(results, cell, against, tuning, among, counted)[1]
                       for counted in (TUNING, tuning))
        for method in METHODS:
            lr, lines = tuned(results, cell, method, tuning, among)
            early = len(lines.keys() & best) < least     # run beside the other before it had more
            other = first if early else best             # tuning seeds, which changed its rate
            shared = [seed for seed in lines if seed in other or not other]
            if len(shared) < least:
                continue
            row = {"cell": cell, "method": method, "lr": lr, "against": against,
                   "early": early and bool(other), "lines": [lines[seed] for seed in shared]}
            if other and method != against:
                row["base"] = [other[seed] for seed in shared]
            rows.append(row)
    tested = [row for row in rows if "base" in row]
    for row in tested:
        sides = row["lines"], row["base"]
        row["difference"] = paired(*([100 * line["accuracy"] for line in side] for side in sides))
        losses = [[line.get("loss", math.inf) for line in side] for side in sides]
        row["loss"] = paired(*losses) if math.inf not in sum(losses, []) else None
    for key, name in (("difference", "p"), ("loss", "loss p")):
        measured = [row for row in tested if row[key]]
        for row, p in zip(measured, holm([row[key][2] for row in measured])):
            row[name] = p
    return rows


def tuned(results: Results, cell: Cell, method: str, tuning: range, fresh: range,
          counted: range = TUNING) -> tuple[float | None, dict]:
    """(the method's best rate on the tuning seeds `counted`, its lines of fresh seeds there)."""
    lr = 0.0 if METHODS[method] is None else sweep(results, cell, method, tuning, counted)[1]
    lines = results.get(cell, method, lr, fresh) if lr is not None else []
    return lr, {line["seed"]: line for line in lines}


def print_tables(results: Results, tuning: range, least: int, among: range,
                 against: str = "lora") -> None:
    """A Markdown table with a line per cell, one per cell with a line per method, and the methods
    that no cell has. Against another method than LoRA: those of the cells that have it, alone."""
    rows = compared(results, tuning, least, among, against)
    if against != "lora":
        having = {row["cell"] for row in rows if "base" in row}
        rows = [row for row in rows if row["cell"] in having]
    if not rows:
        print(f"{results.folder}: nothing has been run on {least} seeds")
        return
    tested = sum("p" in row for row in rows)
    print(f"learning rates tuned on {len(tuning)} seeds or more; on n others: difference to "
          f"{shown(against)} in points with its 95% interval; p of the paired t-test, "
          f"Holm-corrected over {tested} rows")
    groups = itertools.groupby(rows, lambda row: row["cell"])
    cells = [(cell, list(group)) for cell, group in groups]
    if against == "lora":
        print_overview(cells)
    for cell, group in cells:
        print(f"\n{cell.backbone} {cell.task}, rank {cell.rank}, {cell.labels} labels\n")
        structlora.print_table([as_cells(row) for row in group])
        if any(row["early"] for row in group):
            print(f"\n* to {shown(against)} at the rate that {len(tuning)} tuning seeds chose, "
                  "before it had more")
    present = {row["method"] for row in rows}
    absent = [method for method in METHODS if method not in present]
    print("\nnot run in any of these cells: " + ("; ".join(absent) or "none"))


def shown(method: str) -> str:
    """The method's name in the head of a column."""
    return "LoRA" if method == "lora" else method


def print_overview(cells: list[tuple]) -> None:
    """The table with a line per cell; the means over all cells, over those of one rank and over
    those of one width; what a wider backbone changes. cells: (cell, its rows)."""
    print()
    structlora.print_table([summary(*pair) for pair in cells])
    gains = {cell: gain for cell, rows in cells if (gain := gain_of_each_seed(rows))}
    subsets = [gains]
    for field in ("rank", "width"):
        values = sorted({getattr(cell, field) for cell in gains})
        subsets += [{cell: gain for cell, gain in gains.items() if getattr(cell, field) == value}
                    for value in values if len(values) > 1]
    means = [overall(subset, seeds) for seeds in (SEEN, UNSEEN) for subset in subsets]
    if any(means):
        print("\nStructLoRA to LoRA, each seed's mean over the cells\n")
        structlora.print_table([line for line in means if line])
    wider = [widened(cell, gains) for cell in gains]
    if any(wider):
        print("\nStructLoRA to LoRA, on a wider backbone and on width 64, paired by seed\n")
        structlora.print_table([line for line in wider if line])


def gain_of_each_seed(rows: list[dict]) -> dict[int, float]:
    """StructLoRA's difference to LoRA in points by seed, of one cell's rows."""
    return {mine["seed"]: 100 * (mine["accuracy"] - base["accuracy"])
            for row in rows if row["method"] == "structlora"
            for mine, base in zip(row["lines"], row.get("base", ()))}


def overall(gains: dict, among: range) -> dict:
    """A line on StructLoRA's mean difference to LoRA over the cells that have at least two of these
    seeds; {} if there are none. gains: cell -> seed -> difference. The mean over the cells is one
    observation for each seed that all have."""
    gains = {cell: kept for cell, gain in gains.items()
             if len(kept := {seed: gain[seed] for seed in gain if seed in among}) > 1}
    seeds = sorted(set.intersection(*map(set, gains.values()))) if gains else []
    if len(seeds) < 2:
        return {}
    means = [statistics.fmean(gain[seed] for gain in gains.values()) for seed in seeds]
    difference, half, p = paired(means, [0.0] * len(means))
    return {"seeds": f"{seeds[0]} to {seeds[-1]}",
            "rank": ", ".join(map(str, sorted({cell.rank for cell in gains}))),
            "width": ", ".join(map(str, sorted({cell.width for cell in gains}))),
            "cells": str(len(gains)), "StructLoRA to LoRA": f"{difference:+.1f} ± {half:.1f}",
            "p (uncorrected)": f"{p:.3f}"}


def widened(cell: Cell, gains: dict) -> dict:
    """A line on what a wider backbone does to StructLoRA's difference to LoRA, paired by seed with
    the same cell at width 64; {} where there is no such pair. gains: cell -> seed -> difference."""
    narrow = cell._replace(task=cell.kind)
    seeds = sorted(gains[cell].keys() & gains.get(narrow, {}).keys())
    if narrow == cell or len(seeds) < 2:
        return {}
    sides = [[gains[which][seed] for seed in seeds] for which in (cell, narrow)]
    more, half, p = paired(*sides)
    wide, plain = map(statistics.fmean, sides)
    return {"backbone, task": f"{cell.backbone} {cell.kind}", "rank": str(cell.rank),
            "labels": str(cell.labels), "width": str(cell.width), "n": str(len(seeds)),
            "at width 64": f"{plain:+.1f}", "at this width": f"{wide:+.1f}",
            "wider": f"{more:+.1f} ± {half:.1f}", "p (uncorrected)": f"{p:.3f}"}


def summary(cell: Cell, rows: list[dict]) -> dict:
    """A line of the first table: LoRA, and what StructLoRA and more parameters add to it."""
    texts = {row["method"]: as_cells(row) for row in rows}
    get = lambda method, key: texts.get(method, {}).get(key, "") or "-"
    lines = {row["method"]: row["lines"] for row in rows}

    def both(key, form):                     # of LoRA -> of StructLoRA
        pair = [[line[key] for line in lines.get(method, []) if key in line]
                for method in ("lora", "structlora")]
        return " -> ".join(format(statistics.fmean(v), form) for v in pair) if all(pair) else "-"
    return {"backbone, task": f"{cell.backbone} {cell.task}", "rank": str(cell.rank),
            "labels": str(cell.labels), "frozen": get("frozen", "accuracy"),
            "LoRA": get("lora", "accuracy"), "n": get("structlora", "n"),
            "StructLoRA": get("structlora", "to LoRA"), "p": get("structlora", "p"),
            "its loss": get("structlora", "loss to LoRA"), "p of that": get("structlora", "loss p"),
            "LoRA of its merged rank": get("lora matched", "to LoRA"),
            "drift energy": both("drift", ".0f"), "adjacent cosine": both("cosine", ".2f")}


def as_cells(row: dict) -> dict:
    """The strings of a row of the table."""
    def mean(key, form, factor=1.0):
        values = [factor * line[key] for line in row["lines"] if key in line]
        return format(statistics.fmean(values), form) if values else "-"
    accuracy = [100 * line["accuracy"] for line in row["lines"]]
    difference, half, _ = row.get("difference", (0.0, 0.0, 1.0))
    show, to = "p" in row, shown(row["against"])
    rank = {"lora matched": f" r={row['lines'][0]['rank']}"}.get(row["method"], "")
    return {"method": row["method"] + rank, "n": str(len(row["lines"])) + " *" * row["early"],
            "lr": f"{row['lr']:.3g}" if row["lr"] else "-",
            "accuracy": f"{statistics.fmean(accuracy):.1f} ± {statistics.stdev(accuracy):.1f}",
            f"to {to}": f"{difference:+.1f} ± {half:.1f}" if show else "",
            "p": f"{row['p']:.3f}" if show else "", "test loss": mean("loss", ".3f"),
            f"loss to {to}": "{:+.3f} ± {:.3f}".format(*row["loss"]) if row.get("loss") else "",
            "loss p": f"{row['loss p']:.3f}" if "loss p" in row else "",
            **({"CIDEr": mean("cider", ".1f", 100)} if row["cell"].backbone == "llava" else
               {"calibration error": mean("ece", ".1f", 100)}), "trainable": mean("trainable", ",.0f"),
            "merged rank": mean("merged_rank", ".1f"), "ms/step": mean("ms", ".1f")}


# ---------------------------------------------------------------------------------------------
# Figures


def draw_figures(results: Results, tuning: range, least: int, folder: Path) -> None:
    """Accuracy against rank and against labels, for LoRA, matched LoRA and StructLoRA, on the seeds
    that all three have."""
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "structlora"           # the same file from the same data
    import matplotlib.pyplot as plt
    rows = compared(results, tuning, least)
    tasks = sorted({(row["cell"].backbone, row["cell"].task) for row in rows})
    for field, other in (("rank", "labels"), ("labels", "rank")):
        lines = [(task, fixed) for task in tasks for fixed in
                 sorted({getattr(row["cell"], other) for row in rows if row["cell"][:2] == task})
                 if len({getattr(row["cell"], field) for row in rows if row["cell"][:2] == task
                         and getattr(row["cell"], other) == fixed}) > 1]
        if not lines:
            continue
        figure, axes = plt.subplots(1, len(lines), figsize=(4.5 * len(lines), 3.2), squeeze=False)
        for axis, (task, fixed) in zip(axes[0], lines):
            here = [row for row in rows if row["cell"][:2] == task
                    and getattr(row["cell"], other) == fixed and row["method"] in CORE[1:]]
            for method in CORE[1:]:
                mine = [row for row in here if row["method"] == method]
                values = [[100 * line["accuracy"] for line in of_all(row, here)] for row in mine]
                error = [critical(len(v) - 1) * statistics.stdev(v) / len(v) ** 0.5 for v in values]
                axis.errorbar([getattr(row["cell"], field) for row in mine],
                              list(map(statistics.fmean, values)), error, fmt="o-", markersize=3,
                              label=method, capsize=3)
            axis.set(xscale="log", xlabel=field, ylabel="accuracy (%)",
                     title=f"{' '.join(task)}, {other} {fixed}")
            ticks = sorted({getattr(row["cell"], field) for row in here})
            axis.set_xticks(ticks, map(str, ticks))
            axis.minorticks_off()
        axes[0][0].legend()
        save_figure(figure, folder / f"accuracy_{field}.svg")


def of_all(row: dict, rows: list[dict]) -> list[dict]:
    """The row's lines of the seeds that all rows of its cell have."""
    seeds = set.intersection(*({line["seed"] for line in other["lines"]} for other in rows
                               if other["cell"] == row["cell"]))
    return [line for line in row["lines"] if line["seed"] in seeds]


def draw_trace(path: Path, folder: Path) -> None:
    """Drift energy and adjacent cosine against the step; the gates; the spectra of the updates;
    the layers' cosines."""
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "structlora"
    import matplotlib.pyplot as plt
    lines = structlora.read_json(path)
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.2))
    for method, values in lines.items():
        axes[3].plot(range(1, len(values["coverage"]) + 1), values["coverage"], "o-")
        axes[0].plot(values["step"], values["drift"], label=method)
        axes[1].plot(values["step"], values["cosine"], label=method)
    snr = lines["structlora"]["snr"]
    axes[2].boxplot(list(snr.values()), tick_labels=[n.removeprefix("blocks.") for n in snr])
    axes[2].axhline(1, linewidth=0.5)
    axes[2].tick_params(axis="x", labelrotation=90)
    for axis, title in zip(axes, ("drift energy", "cosine of adjacent updates",
                                  "signal-to-noise of the gates (open above 1)",
                                  "share of the energy in the first singular values")):
        axis.set_title(title, fontsize=10)
    axes[0].set(yscale="log", xlabel="step")
    axes[1].set(xlabel="step")
    axes[3].set(xlabel="rank", ylim=(0, 1.05))
    axes[2].set(yscale="log")
    axes[0].legend()
    save_figure(figure, folder / "training.svg")
    kinds = list(lines["lora"]["matrix"])
    figure, axes = plt.subplots(1, 2 * len(kinds), figsize=(3 * 2 * len(kinds), 3))
    for axis, (method, kind) in zip(axes, itertools.product(("lora", "structlora"), kinds)):
        axis.imshow(lines[method]["matrix"][kind], vmin=-1, vmax=1, cmap="RdBu")
        axis.set_title(f"{method}, {kind.rpartition('.')[2]}", fontsize=10)
    save_figure(figure, folder / "cosines.svg")


def save_figure(figure, path: Path) -> None:
    """Writes an .svg that depends on the data alone."""
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    print(path)


# ---------------------------------------------------------------------------------------------
# Main


def grid() -> list[Cell]:
    """All cells of --full."""
    ranks, labels = (1, 2, 4, 8, 16), (10, 20, 50, 200, 1000)
    grids = {"vit": (ranks, labels), "llama": (ranks, (32, 128, 512)), "llava": (ranks, (50, 200))}
    return [Cell(backbone, task, *parts) for backbone, tasks in TASKS.items() for task in tasks
            if task not in ON_CIFAR or CIFAR.is_dir()
            for parts in itertools.product(*grids[backbone])]


def parse_cell(text: str) -> Cell:
    """backbone:task:rank:labels; what it needs must be there."""
    backbone, task, rank, labels = text.split(":")
    if task not in TASKS.get(backbone, ()):
        known = ", ".join(f"{b}:{t}" for b, tasks in TASKS.items() for t in tasks)
        raise argparse.ArgumentTypeError(f"{backbone}:{task}: one of {known}")
    if task in ON_CIFAR and not CIFAR.is_dir():
        raise argparse.ArgumentTypeError(f"{text} needs CIFAR-10's binary files: set CIFAR10, "
                                         f"{CIFAR} is no folder")
    return Cell(backbone, task, int(rank), int(labels))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true")
    p.add_argument("--full", action="store_true")
    p.add_argument("--table", action="store_true")
    p.add_argument("--figures", action="store_true")
    p.add_argument("--trace", action="store_true")
    p.add_argument("--cells", nargs="+", type=parse_cell, default=[])
    p.add_argument("--against", choices=list(METHODS), default="lora", metavar="METHOD",
                   help="with --table: what the others are compared with (default lora)")
    p.add_argument("--backbone", choices=list(PROBLEMS), help="only the cells of this one")
    p.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD",
                   help="default: all with --full, else " + ", ".join(CORE))
    p.add_argument("--seeds", type=int, help="fresh seeds (default 10; 3 with --quick)")
    p.add_argument("--first-seed", type=int, default=0,
                   help="the first of the fresh seeds; with --table, of those shown (default 0)")
    p.add_argument("--tuning", type=int, help="tuning seeds (default 3; 1 with --quick)")
    p.add_argument("--processes", type=int, default=os.cpu_count())
    p.add_argument("--gpu", action="store_true", help="run on CUDA")
    p.add_argument("--cache", type=Path, default=ROOT / "out/bench", help="for the backbones")
    p.add_argument("--results", type=Path, help="folder (default tests/results)")
    args = p.parse_args()
    args.seeds = args.seeds or (3 if args.quick else 10)
    args.tuning = args.tuning or (1 if args.quick else 3)
    args.results = args.results or ROOT / ("out/bench/quick" if args.quick else "tests/results")
    quick = [QUICK[args.backbone or "vit"]] if args.quick else []
    cells = args.cells or quick or (grid() if args.full else [])
    cells = [cell for cell in cells if args.backbone in (None, cell.backbone)]
    if not (cells or args.table or args.figures or args.trace):
        p.error("say what to do: --quick, --full, --cells, --trace, --table or --figures")
    tuning, least = range(100, 100 + args.tuning), min(args.seeds, 10)
    if cells and not (args.table or args.figures):
        run_all(cells, args.methods or list(METHODS if args.full else CORE), args)
        print()
    if args.trace:
        trace(Results(args.results), args)
    elif args.figures:
        draw_figures(Results(args.results), tuning, least, ROOT / ".github/figures")
        if (path := args.results / "trace.json").exists():
            draw_trace(path, ROOT / ".github/figures")
    else:
        print_tables(Results(args.results), tuning, least, FRESH[args.first_seed:], args.against)


if __name__ == "__main__":
    main()
