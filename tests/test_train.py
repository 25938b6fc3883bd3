"""The training loop and the command line, on train_vit.py with images of 16 x 16 pixels."""

import argparse
import json
import math
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import structlora
import train_vit
from structlora import Config, InputError, Task, attach, batch_indices, learning_rate

ROOT = Path(__file__).parents[1]
QUICK = ("--image-size", "16", "--pretrain-steps", "6", "--steps", "8", "--batch-size", "8",
         "--device", "cpu")


@pytest.fixture
def data(tmp_path):
    """An .npz of 60 images in three classes that brightness tells apart."""
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.integers(0, 60, (60, 16, 16, 3)) + 90 * y[:, None, None, None]
    np.savez(tmp_path / "data.npz", x=x.astype(np.uint8), y=y)
    return str(tmp_path / "data.npz")


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Runs train_vit.py in this process -> (status, stdout, stderr)."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_vit.py", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        try:
            status = structlora.run(train_vit.main)
        except SystemExit as end:                                # argparse
            status = end.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err
    return call


# --- pieces


def test_learning_rate_warms_up_over_six_percent_and_falls_as_a_cosine_to_zero():
    factors = [learning_rate(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 60) and factors[59] == 1.0 == max(factors)
    assert factors[60 + 470] == pytest.approx(0.5, abs=1e-3) and factors[-1] < 1e-5
    assert all(math.isfinite(learning_rate(0, steps)) for steps in (1, 2, 3))


def test_batches_cover_every_epoch_once_and_need_no_history():
    seen = torch.cat([batch_indices(10, 4, number, seed=3) for number in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert torch.equal(batch_indices(10, 4, 2, seed=3), seen[8:12])              # over the border
    assert not torch.equal(batch_indices(10, 10, 0, 3), batch_indices(10, 10, 0, 4))
    assert len(batch_indices(3, 8, 0, 0)) == 8                   # a batch larger than the data


def test_files_are_whole_or_not_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")

    def half(temporary):
        temporary.write_text("ha")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        structlora.write_atomically(path, half)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


# --- the loop on a model of two layers


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.v_proj(torch.tanh(self.q_proj(x)))


def options(**changes):
    return argparse.Namespace(**dict(
        steps=12, lr=1e-2, gate_lr=None, weight_decay=0.01, accumulate=1, save_every=5, seed=0,
        resume=False, device="cpu", dtype="float32", checkpoint=None) | changes)


def task(batch_size=8, before_batch=lambda number: None):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 6, generator=generator), torch.randint(0, 3, (32,), generator=generator)

    def batch(number):
        before_batch(number)
        i = batch_indices(32, batch_size, number, seed=0)
        return x[i], y[i]

    def evaluate(model):
        return {"accuracy": (model(x).argmax(1) == y).float().mean().item(),
                "loss": F.cross_entropy(model(x), y).item()}
    return Task(batch, lambda model, b: F.cross_entropy(model(b[0]), b[1]), evaluate, 32)


def run(out, task_, args, **config):
    torch.manual_seed(0)
    adapters = attach(Two(), Config(rank=2, **config))
    row = structlora.train(adapters.model, adapters, task_, args, out, "test")
    return row, adapters


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def equal(a, b):
    """Equality of nested states, bit by bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def checkpoint(out):
    state = torch.load(out / "adapter.pt", weights_only=True)
    return {key: value for key, value in state.items() if key != "ms_per_step"}


@pytest.mark.parametrize("config", ({}, {"gate": "concrete", "dropout": 0.1}, {"budget": 1.0}))
@pytest.mark.parametrize("signal_", (signal.SIGINT, signal.SIGTERM))
def test_a_stopped_run_resumes_to_the_same_numbers(config, signal_, tmp_path):
    row, _ = run(tmp_path / "whole", task(), options(), **config)
    stop = lambda number: number == 7 and os.kill(os.getpid(), signal_)
    with pytest.raises(KeyboardInterrupt, match="step 8 of 12.*--resume"):
        run(tmp_path / "stopped", task(before_batch=stop), options(), **config)
    assert checkpoint(tmp_path / "stopped")["step"] == 8         # the step under way was finished
    again, _ = run(tmp_path / "stopped", task(), options(resume=True), **config)
    assert lines(tmp_path / "whole") == lines(tmp_path / "stopped")
    assert equal(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "stopped"))
    volatile = ("ms/step", "peak memory")
    assert {k: v for k, v in row.items() if k not in volatile} == {
        k: v for k, v in again.items() if k not in volatile}


def test_lines_after_the_checkpoint_are_dropped_and_a_torn_one_too(tmp_path):
    run(tmp_path / "whole", task(), options(steps=10))

    class Killed(Exception):
        pass

    def die(number):
        if number == 8:
            raise Killed
    with pytest.raises(Killed):                                  # three steps past the checkpoint
        run(tmp_path / "killed", task(before_batch=die), options(steps=10))
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    run(tmp_path / "killed", task(), options(steps=10, resume=True))
    assert lines(tmp_path / "whole") == lines(tmp_path / "killed")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    row, _ = run(tmp_path, task(), options())
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".bin"}
    again, _ = run(tmp_path, task(), options(resume=True))
    assert again["after"] == row["after"] and again["ms/step"] == row["ms/step"]
    assert all(p.read_bytes() == content for p, content in files.items())


def test_accumulated_micro_batches_equal_one_large_batch(tmp_path):
    plain = {"gate": "none", "edges": "depth"}
    _, large = run(tmp_path / "a", task(batch_size=8), options(), **plain)
    _, small = run(tmp_path / "b", task(batch_size=2), options(accumulate=4), **plain)
    for name, delta in large.deltas().items():
        assert torch.allclose(delta, small.deltas()[name], atol=1e-5) and delta.any()


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(bad, tmp_path):
    good = task()
    number = []

    def loss(model, batch):
        number.append(1)
        return good.loss(model, batch) * (bad if len(number) == 8 else 1)
    with pytest.raises(InputError, match=r"step 8.*--lr.*adapter.pt"):
        run(tmp_path, good._replace(loss=loss), options())
    state = checkpoint(tmp_path)
    assert state["step"] == 7
    assert all(value.isfinite().all() for graph in state["state"] for value in graph.values())
    assert [line["step"] for line in lines(tmp_path)] == list(range(8))


def test_the_loss_falls_and_every_step_is_logged(tmp_path):
    row, adapters = run(tmp_path, task(), options(steps=60, lr=3e-2))
    log = lines(tmp_path)
    assert [line["step"] for line in log] == [*range(61), 60]
    assert log[-1]["loss"] < log[0]["loss"] and 0 < log[30]["lr"] < 3e-2
    assert float(row["after"]) == pytest.approx(100 * log[-1]["accuracy"], abs=0.06)
    assert (tmp_path / "adapter_peft" / "adapter_model.bin").exists()


def test_bf16_trains_with_fp32_adapters(tmp_path):
    torch.manual_seed(0)
    adapters = attach(Two().bfloat16(), Config(rank=2))
    structlora.train(adapters.model, adapters, task(), options(dtype="bfloat16", steps=40, lr=3e-2),
                     tmp_path, "test")
    assert adapters.graphs[0].A.dtype == torch.float32 and adapters.graphs[0].B.any()
    assert lines(tmp_path)[-1]["loss"] < lines(tmp_path)[0]["loss"]


# --- the command line


def test_the_comparison_prints_a_row_for_each_method(cli, data, tmp_path):
    status, out, err = cli("--data", data, "--out", "run", *QUICK)
    assert status == 0 and err == ""
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 5 and len({len(line) for line in table}) == 1
    for word in ("method", "trainable", "merged rank", "before", "after", "test loss", "rate",
                 "kept", "drift energy", "adjacent cosine", "ms/step", "peak memory"):
        assert word in table[0]
    assert "LoRA r=2 " in table[2] and "(matched)" in table[3] and "StructLoRA r=2" in table[4]
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert rows[1]["merged rank"] == f"{round(float(rows[2]['merged rank']))}.0"
    # the same command again: the backbone is kept, the numbers are the same
    status, again, _ = cli("--data", data, "--out", "run", *QUICK)
    assert status == 0 and "using the backbone" in again
    same = lambda text: [re.split(r" *\| *", line)[:-3]
                         for line in text.splitlines() if "LoRA" in line]
    assert same(out) == same(again)


def test_one_method_from_a_checkpoint_then_eval_only_merge_and_peft(cli, data, tmp_path):
    torch.manual_seed(0)
    train_vit.save_vit(train_vit.small_vit(16, 5), tmp_path / "five.pth")        # five classes
    arguments = ("--checkpoint", "five.pth", "--data", data, "--out", "run", *QUICK[4:])
    status, out, err = cli(*arguments, "--merge", "--lr", "0.03", "--steps", "40")
    assert status == 0, err
    after = lines(tmp_path / "run")[-1]
    assert after["accuracy"] > 0.5                               # a new head was trained along
    status, out, _ = cli(*arguments, "--lr", "0.03", "--steps", "40", "--eval-only")
    assert status == 0 and f"{after['loss']:.4f}" in out
    status, out, _ = cli("--checkpoint", "run/merged.pt", "--data", data, "--out", "none",
                         *QUICK[4:], "--eval-only")
    assert status == 0 and f"{after['accuracy']:.4f}" in out and f"{after['loss']:.3f}" in out
    assert not (tmp_path / "none").exists()
    peft = pytest.importorskip("peft")
    merged = train_vit.load_vit(tmp_path / "run" / "merged.pt")
    plain = train_vit.load_vit(tmp_path / "five.pth", num_classes=3)
    other = peft.PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter_peft").eval()
    x = torch.randn(4, 3, 16, 16)
    assert torch.allclose(other(x), merged(x), atol=1e-4)


@pytest.mark.parametrize("arguments, word", (
    (("--rank", "0"), "0"), (("--rank", "x"), "x"),
    (("--lr", "-1"), "-1"), (("--lr", "nan"), "nan"),
    (("--dropout", "1"), "dropout"), (("--hops", "4"), "hops"), (("--gate", "x"), "x"),
    (("--budget", "1", "--no-gate"), "budget"), (("--fraction", "2"), "2"),
    (("--shots", "1", "--fraction", "0.5"), "fraction"), (("--device", "nowhere"), "nowhere"),
    (("--resume",), "there is no run"), (("--rnk", "3"), "rnk"), (("--targets", ""), "targets"),
    (("--shift", "invert"), "--data"), (("--checkpoint", "a.pth"), "--data"),
    (("--data", "absent"), "absent"), (("--weight-decay", "2"), "2"),
    (("--data", "DATA", "--checkpoint", "absent.pth"), "absent.pth"),
    (("--data", "DATA", "--checkpoint", "DATA"), "data.npz"),
    (("--data", "DATA", "--source-classes", "7"), "7"),
    (("--data", "DATA", "--eval-only"), "backbone")))
def test_bad_options_are_one_line_and_nothing_is_written(arguments, word, cli, data, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    status, out, err = cli(*(data if a == "DATA" else a for a in arguments))
    assert status == 2 and word in err and err.count("\n") == 1 and "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_targets_that_match_nothing_name_what_there_is(cli, data):
    status, _, err = cli("--data", data, "--out", "run", *QUICK, "--targets", "nothing")
    assert status == 2 and "blocks.*.attn.q_proj" in err and err.count("\n") == 1


def test_an_unfinished_run_is_not_overwritten_and_another_configuration_not_resumed(
        cli, data, tmp_path, monkeypatch):
    arguments = ("--data", data, "--out", "run", "--method", "lora", *QUICK, "--save-every", "2")
    real, steps = structlora.training_step, []

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)
    monkeypatch.setattr(structlora, "training_step", interrupted)
    status, _, err = cli(*arguments)
    assert status == 130 and "--resume" in err
    monkeypatch.setattr(structlora, "training_step", real)
    status, _, err = cli(*arguments)
    assert status == 2 and "unfinished" in err and "--resume" in err
    status, _, err = cli(*arguments, "--resume", "--seed", "5")
    assert status == 2 and "seed=0" in err and "5" in err
    (tmp_path / "run" / "adapter.pt").rename(tmp_path / "kept.pt")
    (tmp_path / "run" / "adapter.pt").write_bytes((tmp_path / "kept.pt").read_bytes()[:1000])
    status, _, err = cli(*arguments, "--resume")
    assert status == 2 and "adapter.pt" in err and err.count("\n") == 1
    (tmp_path / "kept.pt").rename(tmp_path / "run" / "adapter.pt")
    status, out, _ = cli(*arguments, "--resume")
    assert status == 0 and "lora r=2" in out


# --- the README


def test_the_ten_lines_of_the_readme_run():
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    torch.manual_seed(0)
    scope = {}
    exec(block, scope)
    assert isinstance(scope["model"], nn.Module)
    assert not any("LoRA" in type(m).__name__ for m in scope["model"].modules())


def test_real_images_if_they_are_here():
    folder = ROOT.parent / "shared" / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip("shared/data/cifar10 is not beside the project")
    train, test, classes = train_vit.read_images(folder)
    assert (len(train), len(test), classes) == (10000, 2000, 10)
    assert train.labels.bincount().tolist() == [1000] * 10
