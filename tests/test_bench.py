"""The benchmark's own promises: experiments at once equal experiments alone and the scripts' loop,
the statistics, every method runs."""

import argparse
import importlib.util
import json
import math
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch

import bench_accuracy as bench
import bench_speed
import train_llava
from helpers import DATA
from structlora import Config, attach
from train_vit import batch_indices, warmup_cosine

STEPS = 13
SIZES = {"text": dict(width=32, layers=3, length=8, pretrain=(2, 8), batch=4),
         "vision": dict(width=32, layers=2, pretrain=(2, 8), batch=4),
         "llava": dict(pretrain=(2, 32), batch=4)}
SIZES["noisy"] = SIZES["vision"]


@pytest.fixture
def task(tmp_path):
    """task(kind): a small backbone that learned next to nothing."""
    args = argparse.Namespace(device="cpu", text=None, dry=True, out=str(tmp_path))
    return lambda kind: bench.Task(kind, SIZES[kind], args)


def experiments(task, method, seeds, rates):
    return [bench.Experiment(task, method, 16, 2, seed, rate, STEPS)
            for seed in seeds for rate in rates]


def trained(task, method, seeds, rates):
    runs = experiments(task, method, seeds, rates)
    bench.train(runs, STEPS)
    return bench.test(runs)


@pytest.mark.parametrize("kind, method", (
    ("text", "LoRA"), ("text", "hybrid, uniform"), ("text", "all, no gate, uniform"),
    ("llava", "hybrid, uniform")))
def test_experiments_at_once_equal_experiments_alone_and_the_scripts_loop(
        method, kind, task, monkeypatch):
    # Without attention: Adam makes full steps of w_src's gradients, which are rounding at first.
    plain = {"gate": "none", "coordinator": "uniform"}
    monkeypatch.setitem(bench.METHODS, "hybrid, uniform", (1, plain))
    task = task(kind)
    at_once = trained(task, method, [3, 4], [1e-2, 3e-2])
    alone = trained(task, method, [4], [3e-2])
    assert torch.allclose(at_once[3], alone[0], atol=1e-4)
    assert not torch.allclose(at_once[1, 0], alone[0, 0], atol=1e-3)
    one = experiments(task, method, [4], [3e-2])[0].train()
    optimizer = torch.optim.AdamW(one.adapters.param_groups(3e-2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: warmup_cosine(n, STEPS))
    for step in range(STEPS):
        i = batch_indices(16, 4, step, 4)
        one(one.x[i], one.y[i])[0].backward()
        one.adapters.observe_gradients()
        torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    loss, _ = one.eval()(*task.test)
    assert loss.item() == pytest.approx(float(alone[0, 0]), abs=1e-4)


def test_scenes_are_scored_as_train_llava_does(tmp_path):
    args = argparse.Namespace(device="cpu", out=str(tmp_path), dry=False, seed=0)
    task = bench.Task("llava", {"pretrain": (30, 32), "batch": 4}, args)
    runs = experiments(task, "LoRA", [4], [3e-2])
    bench.train(runs, STEPS)
    model = train_llava.pretrained(argparse.Namespace(device="cpu", seed=0), 30)
    config = Config(rank=2, alpha=4.0, targets=("self_attn.q_proj", "self_attn.v_proj"),
                    **bench.LORA)
    attach(model, config)
    model.load_state_dict(runs[0].model.state_dict(), strict=False)
    scenes = train_llava.draw_examples(300, 2, True)
    args.batch_size = 150
    theirs = train_llava.evaluate(model, train_llava.Words(), scenes, args)
    assert [theirs["loss"], theirs["accuracy"]] == pytest.approx(bench.test(runs)[0].tolist(),
                                                                 abs=1e-4)
    assert theirs["accuracy"] > 0


def test_every_method_runs_on_text_and_a_line_is_complete(task):
    lines, task = {}, task("text")
    methods = [m for m in bench.METHODS if m not in bench.GATES] + ["gate only (1, 0.05)"]
    if not importlib.util.find_spec("peft"):
        methods = [method for method in methods if method not in bench.OTHERS]
    for method in methods:
        line = bench.run(task, method, 16, 2, [0, 1, 2, 3], [1e-2, 2e-2], 3)
        line = json.loads(json.dumps({"cell": ["text", 16, 2]} | line))
        lines["text", 16, 2, method] = line
        assert torch.tensor(line["scores"]).isfinite().all() and line["trainable"] > 0
    rows = bench.table(lines)
    assert [row["method"] for row in rows] == methods
    four = next(row for row in rows if row["method"] == "LoRA 4r")
    assert four["parameters"] == "4.00" and four["merged rank"] == "8.0"
    half = next(row for row in rows if row["method"] == "LoRA r/2")
    assert half["parameters"] == "0.50" and half["merged rank"] == "1.0"
    four["gain"] = -1.0, 0.1, 0.0            # as if it gained, so that the cell is drawn
    figure = bench.gain_figure([row for row in rows if row["method"] != "hybrid"])
    dots = [e for e in ElementTree.fromstring(figure) if e.tag.endswith("circle")]
    assert len(dots) == 2 + 2                # all and LoRA 4r, and the legend


def test_a_method_has_the_gate_that_its_name_tells(task):
    one = experiments(task("text"), "hybrid (1, 0.05)", [3], [1e-2])[0]
    gates = [p for layer in one.adapters.layers.values() for p in layer.gate.values()]
    group = next(g for g in one.optimizer.param_groups if g["params"][0] is gates[0])
    assert group["initial_lr"] == 0.05 and one.adapters.config.beta == 1.0


def test_three_of_ten_labels_are_wrong_in_noisy_cells(task):
    right, noisy = task("vision"), task("noisy")
    (x, y), (same, wrong) = right.labelled(5, 20), noisy.labelled(5, 20)
    assert torch.equal(x, same) and int((y != wrong).sum()) == 60 and wrong.max() < 10
    assert torch.equal(right.test[1], noisy.test[1])


def test_the_figure_of_regimes_draws_each_method_once_a_cell():
    rows = [{"cell": f"{kind} 20 r4", "method": method, "gain": (-0.2, 0.1, 0.01)}
            for kind in bench.PICTURES for method in ("LoRA, dropout", "hybrid (1, 0.05)", "LoRA")]
    figure = ElementTree.fromstring(bench.regime_figure(rows))
    dots = [element for element in figure if element.tag.endswith("circle")]
    assert len(dots) == 4 * 2 + 2                # two panels of two cells, and the legend


STORIES = DATA / "stories260K"


@pytest.mark.skipif(not STORIES.exists(), reason="needs shared/data/stories260K")
def test_a_pretrained_llama_is_a_backbone_and_knows_its_stories(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time, there was a little girl named Lily. " * 300)
    args = argparse.Namespace(device="cpu", text=text, stories=STORIES, out=str(tmp_path), dry=True)
    task = bench.Task("stories", dict(length=64, batch=4), args)
    line = bench.run(task, "LoRA", 16, 2, [0, 1, 2, 3], [1e-3], 3)
    assert torch.tensor(line["scores"])[..., 0].max() < 2.0 < math.log(512)


def test_a_run_is_a_line_and_lines_of_another_backbone_are_not_mixed(tmp_path, monkeypatch):
    size = dict(seeds=4, steps=2, rates=(1e-2,), vision=SIZES["vision"],
                cells=[(("vision", 20, 1), ("LoRA", "hybrid"))])
    monkeypatch.setitem(bench.SIZES, "quick", size)      # which does not widen its grid
    argv = ["bench", "--quick", "--results", str(tmp_path), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*argv, "--methods", "LoRA"])
    for _ in range(2):                                   # the second time there is nothing to do
        bench.main()
        lines = (tmp_path / "quick.jsonl").read_text().splitlines()
        assert [json.loads(line)["method"] for line in lines] == ["LoRA"]
    line = json.loads(lines[0])
    (tmp_path / "quick.jsonl").write_text(json.dumps(line | {"backbone": 1.0}) + "\n")
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(ValueError, match="quick.jsonl: of another backbone vision"):
        bench.main()


def test_intervals_and_p_are_students():
    assert bench.two_sided(2.364624, 7) == pytest.approx(0.05, abs=1e-4)         # tables of t
    assert bench.two_sided(3.499483, 7) == pytest.approx(0.01, abs=1e-4)
    mean, half, p = bench.interval(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (mean, half) == (2.5, pytest.approx(3.182446 * (5 / 3) ** 0.5 / 2, abs=1e-3))
    assert p == pytest.approx(bench.two_sided(2.5 / ((5 / 3) ** 0.5 / 2), 3))


def test_the_rate_that_counts_is_chosen_on_the_other_half_of_the_seeds():
    first, second = [[1.0, 0], [5.0, 0]], [[9.0, 0], [2.0, 0]]
    line = {"cell": ["vision", 20, 1], "scores": [first, first, second, second]}
    kept, place = bench.counted(line)
    assert kept[:, 0].tolist() == [5.0, 5.0, 9.0, 9.0] and place == 1


def test_operations_that_a_layer_adds_are_counted(capsys):
    bench_speed.bench_ops(["floor", "LoRA", "hybrid"])
    printed = capsys.readouterr().out.splitlines()
    rows = [line.split("|")[1:4] for line in printed if line.startswith("|")]
    added = {row[0].strip(): tuple(map(float, row[1:])) for row in rows[2:]}
    assert added["LoRA"] <= (4, 6) and added["hybrid"] <= (6, 12)
