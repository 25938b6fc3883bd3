"""Several processes: N of them at batch B do what one does at batch N x B. Run by torchrun as a
program, this file trains a model of two layers; the tests compare what its ranks leave."""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import structlora
from helpers import chain
from structlora import Config, Task, attach, batch_indices

ROOT = Path(__file__).parents[1]
BATCH, TOKENS = 8, 5
PLAIN = dict(rank=2, gate="none", alpha=4.0)


def masked_task(share=slice(None), batch_size=BATCH, die=lambda number: None):
    """Positions [N, T] of which some are masked, more in some examples than in others, as in
    language: the loss is the mean over the positions of the whole batch that count."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, TOKENS, 6, generator=generator)
    y = torch.randint(0, 3, (32, TOKENS), generator=generator)
    counts = torch.arange(TOKENS) < torch.randint(1, TOKENS + 1, (32, 1), generator=generator)

    def batch(number):
        die(number)
        i = batch_indices(32, batch_size, number, seed=0)[share]
        return x[i], y[i], counts[i]

    def losses(model, batch):
        x, y, counts = batch
        return F.cross_entropy(model(x)[counts], y[counts], reduction="none")

    def evaluate(model):
        parts = [(x[i:i + 5], y[i:i + 5], counts[i:i + 5]) for i in range(0, 32, 5)]
        loss = torch.cat(structlora.divided(lambda part: losses(model, part), parts)).mean().item()
        return {"accuracy": 0.0, "loss": loss}

    return Task(batch, lambda model, batch: losses(model, batch).mean(), evaluate, 32,
                size=lambda batch: int(batch[2].sum()))


def options(**changes):
    return argparse.Namespace(**dict(
        steps=12, lr=1e-2, gate_lr=None, weight_decay=0.01, accumulate=1, save_every=3, seed=0,
        resume=False, device="cpu", dtype="float32", checkpoint=None, batch_size=BATCH) | changes)


def train(adapters, out, task, **changes):
    structlora.train(adapters.model, adapters, task, options(**changes), out, "test")
    return adapters


def fresh(**config):
    return attach(chain(4), Config(**PLAIN | config))


def program(out, what):
    """What each rank of torchrun runs."""
    args = options(batch_size=BATCH // int(os.environ["WORLD_SIZE"]))
    structlora.join_processes(args)
    rank, (size, share) = structlora.rank(), structlora.global_batch(args)
    adapters = fresh(**{"gate": "gaussian"} if what == "stop" else {})
    torch.manual_seed(1 + rank)                                  # as fine_tune does

    def die(number):
        if what == "die" and rank == 1 and number == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "stop" and rank == 1 and number == 5:
            os.kill(os.getpid(), signal.SIGTERM)                 # one is asked, all stop
    try:
        train(adapters, out, masked_task(share, size, die), resume=what == "rest")
        print("printed once")
    finally:
        torch.save(adapters.state(), out / f"rank{rank}.pt")


def torchrun(out, what):
    """Two processes -> (status, stdout, the lines on stderr that are ours)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               __file__, str(out), what]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run = subprocess.run(command, capture_output=True, text=True, timeout=300,
                         env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path})
    ours = [line for line in run.stderr.splitlines() if line.startswith("test_distributed.py:")]
    return run.returncode, run.stdout, ours


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    status, printed, _ = torchrun(tmp_path / "two", "plain")
    assert status == 0 and printed == "printed once\n"
    one = train(fresh(), tmp_path / "one", masked_task())
    first, second = (torch.load(tmp_path / "two" / f"rank{r}.pt") for r in (0, 1))
    for graph, a, b in zip(one.graphs, first["state"], second["state"], strict=True):
        for name, value in graph.state_dict().items():
            assert torch.equal(a[name], b[name]), f"the ranks differ in {name}"
            # Adam divides by the gradients of the attention, which are near zero: 1e-8 shows there.
            near = 1e-3 if name in ("w_src", "w_dst") else 1e-5
            assert torch.allclose(a[name].float(), value.float(), atol=near), name
    two = structlora.StructLoRA.load(chain(4), tmp_path / "two" / "adapter.pt").deltas()
    for name, delta in one.deltas().items():
        assert torch.allclose(delta, two[name], atol=1e-5) and delta.any(), name
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys() and a == pytest.approx(b, abs=1e-5)
    # The mean of the ranks' own means would be another loss.
    sizes = [task.size(task.batch(0)) for task in (masked_task(slice(r, None, 2)) for r in (0, 1))]
    assert sizes[0] != sizes[1]


def test_a_rank_that_dies_ends_the_others_with_one_line_and_the_rest_resumes(tmp_path):
    status, _, lines = torchrun(tmp_path, "die")
    assert status != 0 and len(lines) == 1
    assert "rank 0 of 2 stops" in lines[0] and "--resume" in lines[0]
    assert torch.load(tmp_path / "adapter.pt")["step"] == 6
    assert torchrun(tmp_path, "rest")[0] == 0
    one = train(fresh(), tmp_path / "one", masked_task())
    two = structlora.StructLoRA.load(chain(4), tmp_path / "adapter.pt").deltas()
    for name, delta in one.deltas().items():
        assert torch.allclose(delta, two[name], atol=1e-5), name


def test_one_rank_asked_to_stop_stops_all_with_one_coordinator_and_noise_of_their_own(tmp_path):
    status, printed, lines = torchrun(tmp_path, "stop")
    assert status != 0 and printed == "" and len(lines) == 1
    state = torch.load(tmp_path / "adapter.pt")
    assert "stopped after step 6 of 12" in lines[0] and state["step"] == 6
    (one, _), (other, _) = state["random"]
    assert not torch.equal(one, other), "both ranks draw the same noise"
    first, second = (torch.load(tmp_path / f"rank{r}.pt")["state"] for r in (0, 1))
    for a, b, saved in zip(first, second, state["state"], strict=True):
        assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], saved[name])
                   for name in a)
        assert a["gradient"].any() and a["is_edge"][:, -1].any()


def test_a_script_in_two_processes_equals_one_at_twice_the_batch(tmp_path):
    records = [{"instruction": "Say " + "on and " * (n % 5) + str(n), "output": "o" * (1 + n % 7)}
               for n in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    common = [str(ROOT / "train_llama.py"), "--data", str(tmp_path / "a.jsonl"), "--no-gate",
              "--method", "structlora", "--steps", "6", "--pretrain-steps", "2", "--device", "cpu",
              "--lr", "0.01"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    runs = [subprocess.Popen([sys.executable, *how, *common, "--batch-size", size, "--out",
                              str(tmp_path / name)], stdout=subprocess.PIPE, text=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
            for how, size, name in (([], "8", "one"), (launcher, "4", "two"))]
    printed = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert printed[0].count("| structlora") == printed[1].count("| structlora") == 1
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    a, b = (torch.load(tmp_path / name / "adapter_peft" / "adapter_model.bin")
            for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a | b)


if __name__ == "__main__":
    raise SystemExit(structlora.run(lambda: program(Path(sys.argv[1]), sys.argv[2])))
