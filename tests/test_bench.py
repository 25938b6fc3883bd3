"""The benchmark's own promises: experiments at once equal experiments alone and the scripts' loop, the
statistics, every method runs."""

import argparse
import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch
import torch.nn.functional as F

import bench_accuracy as bench
import bench_speed
from structlora import Config, attach
from train_vit import batch_indices, warmup_cosine

STEPS, SIZES = 13, dict(width=32, layers=3, length=8, pretrain=(2, 8), batch=4)


@pytest.fixture
def task(tmp_path):
    args = argparse.Namespace(device="cpu", cifar10=None, text=None, dry=True, out=str(tmp_path))
    return bench.Task("text", SIZES, args)


def scores(task, method, seeds, rates):
    experiments = bench.Experiments(task, method, 16, 2, seeds, rates)
    for step in range(STEPS):
        experiments.step(step, STEPS, 4)
    result = experiments.scores().view(len(seeds), len(rates), 2)
    experiments.detach()
    return result


@pytest.mark.parametrize("method", ("LoRA", "hybrid, uniform", "all, no gate, uniform"))
def test_experiments_at_once_equal_experiments_alone_and_the_scripts_loop(method, task, monkeypatch):
    # Without attention: Adam makes full steps of w_src's gradients, which are rounding at first.
    plain = {"gate": "none", "coordinator": "uniform"}
    monkeypatch.setitem(bench.METHODS, "hybrid, uniform", (1, plain))
    at_once = scores(task, method, [3, 4], [1e-2, 3e-2])
    alone = scores(task, method, [4], [3e-2])
    assert torch.allclose(at_once[1, 1], alone[0, 0], atol=1e-4)
    assert not torch.allclose(at_once[0, 1], alone[0, 0], atol=1e-3)
    start = bench.Experiments(task, method, 16, 2, [4], [3e-2])          # for the same factors
    state, (x, y) = {n[6:]: t[0] for n, t in (start.trained | start.buffers).items()}, (start.x[0], start.y[0])
    start.detach()
    adapters = attach(task.model, Config(rank=2, alpha=4.0, **bench.METHODS[method][1]))
    task.model.load_state_dict(state, strict=False)
    optimizer = torch.optim.AdamW(adapters.param_groups(3e-2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: warmup_cosine(n, STEPS))
    task.model.train()
    for step in range(STEPS):
        i = batch_indices(16, 4, step, 4)
        F.cross_entropy(task.model(x[i]).flatten(0, 1), y[i].flatten()).backward()
        adapters.observe_gradients()
        torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        loss = F.cross_entropy(task.model.eval()(task.test[0]).flatten(0, 1), task.test[1].flatten())
    adapters.detach()
    assert float(loss) == pytest.approx(float(alone[0, 0, 0]), abs=1e-4)


def test_every_method_runs_on_text_and_a_line_is_complete(task):
    lines = {}
    for method in bench.METHODS:
        line = bench.run(task, method, 16, 2, [0, 1, 2, 3], [1e-2, 2e-2], {"steps": 3}, False)
        lines["text", 16, 2, method] = json.loads(json.dumps(line))
        assert torch.tensor(line["scores"]).isfinite().all() and line["trainable"] > 0
        assert not any("structlora" in name or name.endswith("_o") for name in task.model.state_dict())
    rows = bench.table(lines)
    assert [row["method"] for row in rows] == list(bench.METHODS)
    four = next(row for row in rows if row["method"] == "LoRA 4r")
    assert four["parameters"] == "4.00" and four["merged rank"] == "8.0"
    ElementTree.fromstring(bench.cosine_figure(lines, ("text", 16, 2)))
    ElementTree.fromstring(bench.gain_figure(rows))


def test_intervals_and_p_are_students():
    assert bench.two_sided(2.364624, 7) == pytest.approx(0.05, abs=1e-4)         # tables of t
    assert bench.two_sided(3.499483, 7) == pytest.approx(0.01, abs=1e-4)
    mean, half, p = bench.interval(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (mean, half) == (2.5, pytest.approx(3.182446 * (5 / 3) ** 0.5 / 2, abs=1e-3))
    assert p == pytest.approx(bench.two_sided(2.5 / ((5 / 3) ** 0.5 / 2), 3))


def test_the_rate_that_counts_is_chosen_on_the_other_half_of_the_seeds():
    line = {"scores": [[[1.0, 0], [5.0, 0]], [[1.0, 0], [5.0, 0]], [[9.0, 0], [2.0, 0]], [[9.0, 0], [2.0, 0]]]}
    kept, first = bench.counted(line)
    assert kept[:, 0].tolist() == [5.0, 5.0, 9.0, 9.0] and first == 1


def test_operations_that_a_layer_adds_are_counted(capsys):
    bench_speed.bench_ops(["floor", "LoRA", "hybrid"])
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    added = {row[0].strip(): tuple(map(float, row[1:])) for row in rows[2:]}
    assert added["LoRA"] <= (4, 6) and added["hybrid"] <= (6, 12)
