"""Time and memory of a training step, beside the frozen backbone and beside PEFT.

    OMP_NUM_THREADS=2 python tests/bench_speed.py --quick     about 5 minutes on 2 CPU cores
    OMP_NUM_THREADS=2 python tests/bench_speed.py             more rounds, LLaMA 1B, 7B-shaped file
    python tests/bench_speed.py --gpu                         every geometry, bf16, MFU
    ... --only vit-b llama-7b steps load                      some geometries or parts

One table per geometry. Weights are random, and the same tensors for all methods. The methods take
their steps in turn (one round), so that a busy machine slows them alike; figures are medians over
the rounds, ratios medians of the ratios within a round. A step is zero_grad, forward, loss,
backward and AdamW on q_proj and v_proj at rank 8; the columns:

    floor        the frozen backbone with the gradients that any adapter needs: from the loss to
                 the outputs of the adapted layers and no further; no adapters, no optimizer
    memory       the most that tensors took: weights, adapters, optimizer and the step's own
    TFLOP        matrix products and attention of one step, as torch's FlopCounterMode counts
    MFU          the floor's TFLOP (what the backbone needs) / time / peak of the device

Then: attach, merge, export, save and load; reading a checkpoint beside plain reading; the
coordinator by depth; tokenizers (bench_tokenizer.py); start-up. PEFT is optional.
"""

import argparse
import copy
import gc
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Callable, NamedTuple

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from structlora import Config, StructLoRA, attach, print_table
from train_llama import META, Llama, LlamaConfig, load_llama
from train_llava import IMAGE_TOKEN, Llava
from train_vit import ViT, ViTConfig

RANK = 8
LLAMA_7B = LlamaConfig()
CLIP_L = ViTConfig(image_size=336, patch_size=14, width=1024, depth=23, heads=16, mlp=4096)
# Peak of dense bf16 matrix products in TFLOP/s, for the MFU; the maker's figures.
PEAKS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "4090": 165}


class Geometry(NamedTuple):
    build: Callable                  # () -> model
    batch: int                       # on the CPU
    gpu_batch: int
    tokens: int = 0                  # of a sample: text; 0 for images alone
    where: str = "gpu"               # "quick" and "cpu" run on a CPU, "gpu" with --gpu only


GEOMETRIES = {
    "vit-ti": Geometry(lambda: ViT(ViTConfig(width=192, heads=3, mlp=768)), 8, 256, 0, "quick"),
    "vit-b": Geometry(lambda: ViT(ViTConfig()), 4, 128, 0, "quick"),
    "llama-15m": Geometry(lambda: Llama(LlamaConfig(32000, 288, 6, 6, 6, 48, 768)),
                          2, 64, 256, "quick"),
    "llama-1b": Geometry(lambda: Llama(LlamaConfig(128256, 2048, 16, 32, 8, 64, 8192, tied=True)),
                         1, 4, 256, "cpu"),
    "llama-7b": Geometry(lambda: Llama(LLAMA_7B), 1, 4, 512),
    "llava-7b": Geometry(lambda: Llava(LLAMA_7B, CLIP_L), 1, 2, 64),
    "tiny-vit": Geometry(lambda: ViT(ViTConfig(32, 8, 24, 3, 2, 48)), 2, 2, 0, "test"),
    "tiny-llama": Geometry(lambda: Llama(LlamaConfig(64, 32, 3, 2, 1, 16, 48)), 2, 2, 16, "test"),
    "tiny-llava": Geometry(lambda: Llava(LlamaConfig(64, 32, 3, 2, 2, 16, 48), replace(
        CLIP_L, image_size=28, width=32, depth=2, heads=2, mlp=48)), 2, 2, 16, "test")}
PARTS = ("steps", "life", "load", "coordinator", "tokenizer", "import")


# ---------------------------------------------------------------------------------------------
# Methods: each takes (model, names of the layers to adapt) and returns its optimizer and two
# functions, for the penalty and for what stands between backward() and the optimizer's step


def floor(model, targets):
    """The frozen backbone; adapted layers' outputs ask for a gradient, as adapters would."""
    for name in targets:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, y: y if y.requires_grad else y.requires_grad_())
    return None, lambda: 0.0, lambda: None


def ours(**config):
    def make(model, targets):
        adapters = attach(model, Config(rank=RANK, targets=tuple(targets), **config))
        optimizer = torch.optim.AdamW(adapters.param_groups(lr=1e-4))
        return optimizer, lambda: adapters.penalty(10_000), adapters.observe_gradients
    return make


def theirs(kind, **settings):
    def make(model, targets):
        import peft
        config = getattr(peft, kind)(target_modules=targets, lora_alpha=2 * RANK, **settings)
        tuner, tuned = lambda: None, model
        if kind == "AdaLoraConfig":              # its trainer calls this once a step
            tuned = peft.AdaLoraModel(model, config, "default")
            count = iter(range(1, 10 ** 9))
            tuner = lambda: tuned.update_and_allocate(next(count))
        else:
            peft.inject_adapter_in_model(config, model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        return optimizer, lambda: 0.0, tuner
    return make


PLAIN = dict(gate="none", coordinator="none", edges="depth")
METHODS = {
    "floor": floor, "LoRA": ours(**PLAIN), "gate only": ours(**PLAIN | {"gate": "gaussian"}),
    "coordinator only": ours(gate="none"), "StructLoRA hybrid": ours(),
    **{f"StructLoRA {edges}": ours(edges=edges) for edges in ("depth", "similarity", "random")},
    "PEFT LoRA": theirs("LoraConfig", r=RANK),
    "PEFT DoRA": theirs("LoraConfig", r=RANK, use_dora=True),
    "PEFT AdaLoRA": theirs("AdaLoraConfig", init_r=RANK * 3 // 2, target_r=RANK, tinit=100,
                           tfinal=100, deltaT=10, total_step=1000)}


# ---------------------------------------------------------------------------------------------
# One step of one method


def backbone(geometry: Geometry, device: str) -> torch.nn.Module:
    """Random weights made on the device, frozen: fp32 on a CPU, bf16 on a GPU."""
    torch.manual_seed(0)
    with torch.device(device):
        model = geometry.build()
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    return model.to(device, dtype).requires_grad_(False).train()


def twin(model: torch.nn.Module) -> torch.nn.Module:
    """The same tensors in modules of its own, to be adapted by itself."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def adapted_layers(model) -> list[str]:
    """q_proj and v_proj; of LLaVA the language model's alone, as train_llava.py has it."""
    return [name for name, _ in model.named_modules()
            if name.endswith(("q_proj", "v_proj")) and "vision_tower" not in name]


def make_loss(model, geometry: Geometry, batch: int, device: str) -> Callable:
    """loss(model) on one random batch; bf16 on a GPU under autocast, as in the scripts."""
    generator = torch.Generator().manual_seed(1)
    config, T = model.config, geometry.tokens
    vision = config if isinstance(model, ViT) else model.view[0] if hasattr(model, "view") else None
    dtype = next(model.parameters()).dtype
    images, tokens = None, None
    if vision:
        images = torch.randn(batch, 3, *[vision.image_size] * 2, generator=generator)
        images = images.to(device, dtype)
    if T:
        tokens = torch.randint(config.vocab_size, (batch, T), generator=generator).to(device)
        if vision:
            tokens[:, 1] = IMAGE_TOKEN
    inputs = [x for x in (images, tokens) if x is not None]
    labels = torch.randint(config.vocab_size if T else config.classes,
                           (batch, T) if T else (batch,), generator=generator).to(device)

    def loss(model):
        with torch.autocast(torch.device(device).type, torch.bfloat16, dtype == torch.bfloat16):
            logits = model(*inputs)
            if T:
                logits = logits[:, -T:].flatten(0, 1)            # of LLaVA the words'
            return F.cross_entropy(logits.float(), labels.flatten())
    return loss


class Runner:
    """A method on its own twin of the backbone."""

    def __init__(self, make: Callable, model, loss: Callable):
        self.model, self.loss, self.device = model, loss, next(model.parameters()).device
        self.optimizer, self.penalty, self.after = make(model, adapted_layers(model))
        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def step(self) -> None:
        (self.loss(self.model) + self.penalty()).backward()
        self.after()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def timed(self) -> float:
        """Milliseconds of a step."""
        self.wait()
        began = time.perf_counter()
        self.step()
        self.wait()
        return 1e3 * (time.perf_counter() - began)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self.step()
        return counter.get_total_flops()

    def memory(self) -> int:
        """Bytes: what stays between steps (weights, adapters, optimizer), and the step's peak
        above it."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if self.optimizer:
            tensors += [t for s in self.optimizer.state.values() for t in s.values()
                        if torch.is_tensor(t)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values()) + self.peak()

    def peak(self) -> int:
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                    profile_memory=True) as profiler:
            self.step()
        changes = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events()
                   if e.name() == "[memory]"]
        most = now = 0
        for _, change in sorted(changes):
            now += change
            most = max(most, now)
        return most


# ---------------------------------------------------------------------------------------------
# Tables


def runners(model, loss: Callable) -> dict[str, Runner]:
    """Every method that is installed."""
    result = {}
    for name, make in METHODS.items():
        try:
            result[name] = Runner(make, twin(model), loss)
        except ImportError as error:
            if name == "PEFT LoRA":
                print(f"{error.name} is not installed: nothing to compare with")
    return result


def steps_table(name: str, geometry: Geometry, rounds: int, warmup: int, device: str) -> None:
    """The table of one geometry."""
    model = backbone(geometry, device)
    batch = geometry.gpu_batch if device.startswith("cuda") else geometry.batch
    methods = runners(model, make_loss(model, geometry, batch, device))
    order, times = list(methods), {method: [] for method in methods}
    for number in range(warmup + rounds):
        for method in order:
            ms = methods[method].timed()
            if number >= warmup:
                times[method].append(ms)
        order = order[1:] + order[:1]            # nobody always comes after the same one
    shown = f"{batch} x {geometry.tokens} tokens" if geometry.tokens else f"{batch} images"
    shown += " and images" if hasattr(model, "view") else ""
    print(f"\n{name}: {sum(p.numel() for p in model.parameters()) / 1e6:,.0f} M parameters, "
          f"{shown} a step, median of {rounds} rounds after {warmup}", flush=True)
    needed = methods["floor"].flops()
    device_name = torch.cuda.get_device_name() if device.startswith("cuda") else ""
    peak = next((value for key, value in PEAKS.items() if key in device_name), None)
    lora_memory, rows = methods["LoRA"].memory(), []
    for method, runner in methods.items():
        ms, used = statistics.median(times[method]), runner.memory()
        ratio = lambda other: statistics.median(a / b for a, b in zip(times[method], times[other]))
        rows.append({
            "method": method, "ms/step": f"{ms:.1f}", "to floor": f"{ratio('floor'):.3f}",
            "to LoRA": f"{ratio('LoRA'):.3f}", "to PEFT LoRA": f"{ratio('PEFT LoRA'):.3f}"
            if "PEFT LoRA" in methods else "-",
            "tokens/s" if geometry.tokens else "images/s":
                f"{batch * (geometry.tokens or 1) / ms * 1e3:,.0f}" if geometry.tokens else
                f"{batch / ms * 1e3:,.1f}",
            "memory MiB": f"{used / 2**20:,.1f}", "memory to LoRA": f"{used / lora_memory:.4f}",
            "trainable": f"{runner.trainable:,}", "TFLOP": f"{runner.flops() / 1e12:.4f}",
            "MFU": f"{100 * needed / (ms / 1e3) / peak / 1e12:.1f}%" if peak else "-"})
    print_table(rows)


def seconds(call: Callable, device: str) -> tuple[float, object]:
    """(time of a call, what it returned)"""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    began = time.perf_counter()
    result = call()
    wait()
    return time.perf_counter() - began, result


def life_row(name: str, geometry: Geometry, device: str) -> dict:
    """attach, save, load, export and merge of full StructLoRA, once each in a fresh folder."""
    model, row = backbone(geometry, device), {"geometry": name}
    config = Config(rank=RANK, targets=tuple(adapted_layers(model)))
    show = lambda spent: f"{1e3 * spent:,.0f} ms"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.pt"
        spent, adapters = seconds(lambda: attach(model, config), device)
        row["attach"] = show(spent)
        row["save"] = show(seconds(lambda: adapters.save(path), device)[0])
        row["export"] = show(seconds(lambda: adapters.export_peft(folder), device)[0])
        adapters.detach()
        spent, adapters = seconds(lambda: StructLoRA.load(model, path), device)
        row["load"] = show(spent)
        row["merge"] = show(seconds(adapters.merge, device)[0])
    return row


# ---------------------------------------------------------------------------------------------
# Reading checkpoints


def write_checkpoint(folder: Path, layers: int) -> Path:
    """consolidated.00.pth of a LLaMA 7B with so many layers, fp16 in Meta's layout -> its path."""
    config, state = replace(LLAMA_7B, num_layers=layers), {}
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama(config).named_parameters()}
    names = {ours: theirs for theirs, (ours, _) in META.items()}
    for name, shape in shapes.items():
        layer = name.split(".")[2] if ".layers." in name else ""
        key = names[name.replace(f".{layer}.", ".*.", 1) if layer else name]
        value = 0.01 * (1 + len(state))          # no two alike: output and embedding are not tied
        state[key.replace("*", layer)] = torch.full(shape, value, dtype=torch.float16)
    (folder / "params.json").write_text(json.dumps({
        "dim": 4096, "n_layers": layers, "n_heads": 32, "norm_eps": 1e-5, "multiple_of": 256}))
    torch.save(state, folder / "consolidated.00.pth")
    return folder / "consolidated.00.pth"


def forget(path: Path) -> None:
    """Drops the file from the page cache, as after a restart."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(path: Path) -> float:
    """Seconds to read the file through one buffer of 16 MiB."""
    buffer, began = bytearray(2 ** 24), time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - began


def resident(key: str) -> int:
    """Bytes of this process: VmRSS (all), RssAnon (without mapped files), VmHWM (peak of all)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    return 0


def load_once(folder: Path, dtype: torch.dtype, device: str) -> tuple[float, int, int]:
    """In a process of its own: seconds of load_llama, its peak of resident memory above what was
    there before, and the same without the mapped file, whose pages the system can take back."""
    torch.zeros(1, device=device)
    start, own_start, own, done = resident("VmRSS"), resident("RssAnon"), [0], threading.Event()

    def watch():
        while not done.wait(0.01):
            own.append(resident("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    spent, _ = seconds(lambda: load_llama(folder, dtype, device), device)
    done.set()
    thread.join()
    return spent, resident("VmHWM") - start, max(own) - own_start


def load_table(layers: int, rounds: int, device: str) -> None:
    """load_llama beside plain reading: from the disk (page cache dropped) and from the cache."""
    with tempfile.TemporaryDirectory() as name:
        path = write_checkpoint(Path(name), layers)
        gc.collect()
        size, rows = path.stat().st_size, []
        print(f"\nreading {size / 1e9:.2f} GB, LLaMA 7B's shapes with {layers} of 32 layers, fp16; "
              f"median of {rounds} rounds", flush=True)
        for cold in (True, False):
            plain, loads = [], {torch.float16: [], torch.bfloat16: []}
            for _ in range(rounds):
                prepare = forget if cold else plain_read
                prepare(path)
                plain.append(plain_read(path))
                for dtype, results in loads.items():
                    prepare(path)
                    with multiprocessing.get_context("spawn").Pool(1) as pool:
                        results.append(pool.apply(load_once, (Path(name), dtype, device)))
            base = statistics.median(plain)
            rows.append({"from": "disk" if cold else "cache", "what": "plain reading",
                         "GB/s": f"{size / base / 1e9:.2f}", "share": "1.00",
                         "resident peak / file": "-", "own peak / file": "-"})
            for dtype, results in loads.items():
                spent, peak, own = (statistics.median(column) for column in zip(*results))
                rows.append({"from": "disk" if cold else "cache", "what": f"load_llama to {dtype}",
                             "GB/s": f"{size / spent / 1e9:.2f}", "share": f"{base / spent:.2f}",
                             "resident peak / file": f"{peak / size:.2f}",
                             "own peak / file": f"{own / size:.2f}"})
        print_table(rows)


def room_for(layers: int) -> int:
    """As many layers of `layers` as disk and memory hold, the file and a copy of it."""
    size = lambda n: 2 * (2 * 32000 * 4096 + n * 202_400_000)
    disk = os.statvfs(tempfile.gettempdir())
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    room = min(0.8 * disk.f_bavail * disk.f_frsize, memory / 1.5)
    return max([1, *(n for n in range(1, layers + 1) if size(n) < room)])


# ---------------------------------------------------------------------------------------------
# The rest


def coordinator_table(rounds: int, device: str) -> None:
    """What the graph adds to a step whatever the batch: refresh, its backward, observe, for q and
    v of 1024 x 1024. Everything is linear in the layers but the [L, L] matrices of mixing."""
    rows = []
    for layers in (12, 32, 80, 128):
        linears = {f"layers_{i}": torch.nn.ModuleDict({n: torch.nn.Linear(1024, 1024, device=device)
                                                       for n in ("q_proj", "v_proj")})
                   for i in range(layers)}
        model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(linears.values())})
        graphs = attach(model, Config(rank=RANK)).graphs

        def step():
            for graph in graphs:
                graph.gradient_sum.normal_()
                graph.refresh()
                sum(part.sum() for A, B, scale, _ in graph.messages
                    for part in (A, B, scale)).backward()
                graph.observe()
                graph.zero_grad()

        def mixing():
            for graph in graphs:
                graph.mixing()

        times = [[1e3 * seconds(part, device)[0] for part in (step, mixing)]
                 for _ in range(3 + rounds)][3:]
        whole, dense = (statistics.median(column) for column in zip(*times))
        rows.append({"layers": f"{layers}", "ms": f"{whole:.2f}", "us/layer":
                     f"{1e3 * whole / layers:.1f}", "ms of mixing": f"{dense:.2f}"})
    print("\ncoordinator")
    print_table(rows)


def tokenizer_table(quick: bool) -> None:
    """bench_tokenizer.py; --quick on the text of the README alone."""
    import bench_tokenizer
    print("\ntokenizers")
    sys.argv[1:] = ["--text", str(Path(__file__).parents[1] / "README.md")] if quick else []
    bench_tokenizer.main()


def import_row(rounds: int) -> None:
    """Start-up of `import structlora` above `import torch`."""
    times = {"torch": [], "torch, structlora": []}
    for _ in range(rounds):
        for modules, spent in times.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {modules}"], check=True,
                           cwd=Path(__file__).parents[1])
            spent.append(1e3 * (time.perf_counter() - began))
    torch_, both = map(statistics.median, times.values())
    extra = statistics.median(b - a for a, b in zip(*times.values()))
    print(f"\nimport torch {torch_:,.0f} ms, with structlora {both:,.0f} ms: {extra:+.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="5 minutes on 2 CPU cores")
    parser.add_argument("--gpu", action="store_true", help="all geometries on cuda")
    parser.add_argument("--only", nargs="+", choices=[*GEOMETRIES, *PARTS], metavar="NAME",
                        help=f"geometries and parts: {', '.join([*GEOMETRIES, *PARTS])}")
    parser.add_argument("--rounds", type=int, help="default 20; 5 if --quick")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="peft")
    device = "cuda" if args.gpu else "cpu"
    level = ("quick",) if args.quick else ("quick", "cpu", "gpu") if args.gpu else ("quick", "cpu")
    only = args.only or [*PARTS, *(n for n, g in GEOMETRIES.items() if g.where in level)]
    names = [n for n in only if n in GEOMETRIES] or [
        n for n, g in GEOMETRIES.items() if g.where in level]
    parts = [part for part in only if part in PARTS] or ["steps"]
    rounds = args.rounds or (5 if args.quick else 20)
    print(f"torch {torch.__version__}, " + (torch.cuda.get_device_name() if args.gpu else
          f"CPU, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.2f}"))
    if "steps" in parts:
        for name in names:
            steps_table(name, GEOMETRIES[name], rounds, 2, device)
            gc.collect()
    if "life" in parts:
        print("\nonce each, full StructLoRA")
        print_table([life_row(name, GEOMETRIES[name], device) for name in names])
    if "load" in parts:
        load_table(1 if args.quick else room_for(32), 3, device)
    if "coordinator" in parts:
        coordinator_table(rounds, device)
    if "tokenizer" in parts:
        tokenizer_table(args.quick)
    if "import" in parts:
        import_row(5)


if __name__ == "__main__":
    main()
