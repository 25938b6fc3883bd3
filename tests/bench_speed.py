"""What a step costs, beside the frozen backbone and beside PEFT.

    OMP_NUM_THREADS=2 python tests/bench_speed.py --quick     ViT-B and a small LLaMA on 2 CPU cores
    python tests/bench_speed.py                               the CPU's geometries, more rounds
    python tests/bench_speed.py --gpu                         ViT-B, LLaMA 1B and 7B shapes, bf16
    ... --only vit-b llama-7b ops life generate tokens compile      some geometries or parts

Weights are random, and the same tensors for all methods. The methods take their steps in turn (a
round), so that a busy machine slows them alike; figures are medians over the rounds, ratios medians
of the ratios within a round. A step is forward, loss, penalty, backward, observe_gradients and
AdamW (fused) on q_proj and v_proj at rank 8. The rounds begin when the similarity edges have
settled; "first ten" is the median of the steps before.

    floor     the frozen backbone with the gradients that any adapter needs: from the loss to the
              outputs of the adapted layers and no further
    memory    what a step takes beside weights, adapters and optimizer, at its peak (GPU only)

Then: operations that one adapted layer adds (forward, backward), with torch.compile, attach, merge,
export, save and load, reading a checkpoint, generate(), tokenizers. PEFT is optional.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from structlora import Config, StructLoRA, attach
import train_vit
from train_llama import Llama, LlamaConfig, generate, load_tokenizer
from train_vit import ViT, ViTConfig, load_vit, print_table, save_vit

RANK = 8
# name: (how to build it, examples on a CPU, on a GPU, tokens of an example: 0 for images, where)
GEOMETRIES = {
    "vit-b": (lambda: ViT(ViTConfig()), 4, 128, 0, "quick cpu gpu"),
    "llama-15m": (lambda: Llama(LlamaConfig(32000, 288, 6, 6, 6, 48, 768)), 2, 64, 256,
                  "quick cpu gpu"),
    "llama-1b": (lambda: Llama(LlamaConfig(128256, 2048, 16, 32, 8, 64, 8192, tied=True)),
                 1, 4, 256, "cpu gpu"),
    "llama-7b": (lambda: Llama(LlamaConfig()), 1, 4, 512, "gpu")}
LORA = {"gate": "none", "coordinator": "none"}
METHODS = {"floor": None, "LoRA": LORA, "gate only": {"coordinator": "none"},
           "coordinator only": {"gate": "none"},
           "hybrid": {}, "all": {"edges": "all"},
           "PEFT LoRA": {"r": RANK, "lora_alpha": 16},
           "PEFT DoRA": {"r": RANK, "lora_alpha": 16, "use_dora": True}}


class Runner:
    """A method on modules of its own around the backbone's tensors."""

    def __init__(self, method: str, model: torch.nn.Module, inputs, labels):
        self.model = copy.deepcopy(model, {id(p): p for p in model.parameters()}).train()
        self.inputs, self.labels, self.method, self.adapters = inputs, labels, method, None
        names = [n for n, _ in model.named_modules() if n.endswith(("q_proj", "v_proj"))]
        if method == "floor":
            for name in names:
                self.model.get_submodule(name).register_forward_hook(ask_for_gradient)
        elif method.startswith("PEFT"):
            import peft
            config = peft.LoraConfig(target_modules=names, **METHODS[method])
            peft.inject_adapter_in_model(config, self.model)
        else:
            self.adapters = attach(self.model, Config(rank=RANK, **METHODS[method]))
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if self.adapters:
            parameters = self.adapters.param_groups(lr=1e-4)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None
        self.call = self.model

    def step(self) -> None:
        """One optimizer step, in the order of the scripts."""
        device = self.inputs.device.type
        with torch.autocast(device, torch.bfloat16, device == "cuda"):
            logits = self.call(self.inputs)
            loss = F.cross_entropy(logits.float().flatten(0, -2), self.labels.flatten())
        if self.adapters:
            loss = loss + self.adapters.penalty(10_000)
        loss.backward()
        if self.adapters:
            self.adapters.observe_gradients()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def timed(self) -> tuple[float, float]:
        """(milliseconds, peak MiB beside what was there) of a step."""
        cuda, before = self.inputs.is_cuda, 0
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began = time.perf_counter()
        self.step()
        if cuda:
            torch.cuda.synchronize()
        milliseconds = 1e3 * (time.perf_counter() - began)
        return milliseconds, (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else 0.0


def ask_for_gradient(module, inputs, output):
    """Forward hook of the floor: the output asks for a gradient, as an adapter would."""
    return output if output.requires_grad else output.requires_grad_()


def batch_of(name: str, model, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs and labels of a geometry."""
    _, cpu, gpu, tokens, _ = GEOMETRIES[name]
    count, c = cpu if device == "cpu" else gpu, model.config
    generator = torch.Generator().manual_seed(0)
    if tokens:
        data = torch.randint(c.vocab_size, (count, tokens + 1), generator=generator).to(device)
        return data[:, :-1], data[:, 1:]
    images = torch.randn(count, 3, c.image_size, c.image_size, generator=generator)
    labels = torch.randint(c.classes, (count,), generator=generator)
    return images.to(device, next(model.parameters()).dtype), labels.to(device)


def backbone(name: str, device: str) -> torch.nn.Module:
    """A geometry with random weights, frozen: fp32 on a CPU, bf16 on a GPU."""
    torch.manual_seed(0)
    with torch.device(device):
        model = GEOMETRIES[name][0]()
    return model.to(torch.float32 if device == "cpu" else torch.bfloat16).requires_grad_(False)


def bench_steps(name: str, methods: list[str], rounds: int, device: str, compiled: bool) -> None:
    """The table of one geometry. compiled: torch.compile once the edges have settled."""
    model = backbone(name, device)
    inputs, labels = batch_of(name, model, device)
    runners, rows, first = {}, [], {}
    for method in methods:
        runner = runners[method] = Runner(method, model, inputs, labels)
        steps = 11 if device != "cpu" or runner.adapters else 2
        first[method] = statistics.median(runner.timed()[0] for _ in range(steps))
        if compiled:
            runner.call = torch.compile(runner.model)
            began = time.perf_counter()
            runner.step()
            print(f"{method}: compiled in {time.perf_counter() - began:.0f} s", flush=True)
            runner.step()
    figures = [{m: r.timed() for m, r in runners.items()} for _ in range(rounds)]
    base = "LoRA" if "LoRA" in methods else methods[0]
    for method, runner in runners.items():
        ratio = statistics.median(f[method][0] / f[base][0] for f in figures)
        trainable = sum(p.numel() for g in runner.optimizer.param_groups for p in g["params"]) \
            if runner.optimizer else 0
        rows.append({"method": method, "trainable": f"{trainable:,}",
                     "ms": f"{statistics.median(f[method][0] for f in figures):.1f}",
                     "to LoRA": f"{ratio:.3f}", "first ten, ms": f"{first[method]:.1f}",
                     "memory, MiB": f"{statistics.median(f[method][1] for f in figures):.0f}"})
    print(f"\n{name}{', compiled' * compiled}: {list(inputs.shape)}, {rounds} rounds")
    print_table(rows)


class Count(TorchDispatchMode):
    """Counts the operations that reach the device's kernels, views not among them."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += not func.is_view
        return func(*args, **(kwargs or {}))


def bench_ops(methods: list[str]) -> None:
    """How many operations one more adapted layer adds to a frozen one, forward and backward."""
    counts = {}
    for method in methods:
        for depth in (4, 8):
            torch.manual_seed(0)
            model = ViT(ViTConfig(32, 8, 64, depth, 2, 128, 4)).requires_grad_(False)
            runner = Runner(method, model, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
            for _ in range(11):
                runner.step()
            with Count() as forward:
                loss = runner.call(runner.inputs).sum()
            with Count() as backward:
                loss.backward()
            counts[method, depth] = forward.calls, backward.calls
    rows = []
    for method in methods[1:]:
        row = {"method": method}
        for way, label in enumerate(("forward", "backward")):
            added = [counts[method, d][way] - counts["floor", d][way] for d in (4, 8)]
            row[label] = f"{(added[1] - added[0]) / 8:.1f}"      # four blocks more, two layers each
        rows.append(row)
    print("\noperations that an adapted layer adds")
    print_table(rows)


def seconds(function, *arguments) -> tuple[float, object]:
    """(time, result) of a call."""
    began = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - began, result


def bench_life(device: str) -> None:
    """attach, merge, export, save, load of ViT-B, and reading a file of its size."""
    model, rows = backbone("vit-b", device), []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for edges in ("hybrid", "all"):
            took, adapters = seconds(attach, model, Config(rank=RANK, edges=edges))
            with torch.no_grad():
                for layer in adapters.layers.values():
                    layer.B.normal_()
            row = {"attach": took, "save": seconds(adapters.save, folder / "a.pt")[0],
                   "export": seconds(adapters.export_peft, folder)[0],
                   "diagnostics": seconds(adapters.diagnostics)[0],
                   "merge": seconds(adapters.merge)[0]}
            row["load"], adapters = seconds(StructLoRA.load, model, folder / "a.pt")
            adapters.detach()
            rows.append({"edges": edges} | {k: f"{1e3 * v:.0f} ms" for k, v in row.items()})
        print("\nViT-B, rank 8: once each")
        print_table(rows)
        save_vit(ViT(ViTConfig()), folder / "vit.pth")
        plain = min(seconds(torch.load, folder / "vit.pth")[0] for _ in range(3))
        ours = min(seconds(load_vit, folder / "vit.pth")[0] for _ in range(3))
        print(f"\nreading ViT-B (343 MB): torch.load {plain:.2f} s, load_vit {ours:.2f} s")


@torch.no_grad()
def bench_generate(rounds: int) -> None:
    """generate() with the adapters on, to the time of the merged model: 32 tokens, one by one."""
    model, times = backbone("llama-15m", "cpu"), {}
    runners = {m: Runner(m, model, *batch_of("llama-15m", model, "cpu")) for m in ("LoRA", "hybrid",
                                                                                  "all")}
    models = {"merged": model} | {m: r.model for m, r in runners.items()}
    prompt = torch.ones(1, 8, dtype=torch.long)
    for _ in range(rounds + 1):              # the first warms up
        for name, each in models.items():
            took = seconds(generate, each.eval(), prompt, 32)[0]
            times.setdefault(name, []).append(took)
    rows = []
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own[1:], times["merged"][1:])]
        token = 1e3 * statistics.median(own[1:]) / 32
        rows.append({"generate()": name, "ms a token": f"{token:.1f}",
                     "to merged": f"{statistics.median(ratios):.2f}"})
    print("\nllama-15m, 32 tokens with a cache")
    print_table(rows)


def bench_tokens() -> None:
    """kB of UTF-8 that the tokenizers read in a second, where their files are."""
    text = (Path(__file__).parents[1] / "structlora.py").read_text() * 5
    for path in sorted(Path(__file__).parents[2].glob("shared/data/*/tokenizer.model")):
        took = min(seconds(load_tokenizer(path).encode, text)[0] for _ in range(3))
        print(f"\n{path.parent.name}'s tokenizer: {len(text.encode()) / took / 1e3:.0f} kB/s")


def main() -> None:
    """The parts that were asked for."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true")
    p.add_argument("--gpu", action="store_true")
    p.add_argument("--only", nargs="*", choices=[*GEOMETRIES, "ops", "life", "generate", "tokens",
                                                     "compile"])
    p.add_argument("--rounds", type=int)
    args = p.parse_args()
    where, device = "gpu" if args.gpu else "cpu", "cuda" if args.gpu else "cpu"
    where = "quick" if args.quick else where
    rounds = args.rounds or {"quick": 5, "cpu": 20, "gpu": 15}[where]
    methods = list(METHODS)
    try:
        import peft  # noqa: F401
    except ImportError:
        print("PEFT is not installed: its rows are left out")
        methods = [m for m in methods if not m.startswith("PEFT")]
    parts = ["ops", "life", "generate", "tokens"] + ["compile"] * (not args.quick)
    chosen = args.only or [n for n, g in GEOMETRIES.items() if where in g[4].split()] + parts
    for name in chosen:
        if name in GEOMETRIES:
            bench_steps(name, methods, rounds, device, compiled=False)
    if "ops" in chosen:
        bench_ops([m for m in methods if m != "PEFT DoRA"])
    if "life" in chosen:
        bench_life(device)
    if "generate" in chosen:
        bench_generate(rounds)
    if "tokens" in chosen:
        bench_tokens()
    if "compile" in chosen:
        some = [m for m in ("LoRA", "hybrid", "PEFT LoRA") if m in methods]
        bench_steps("vit-b", some, rounds, device, compiled=True)


if __name__ == "__main__":
    raise SystemExit(train_vit.exit_status(main))
