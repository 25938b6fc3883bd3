"""bench_accuracy.py: its statistics, and what it decides to run next."""

import dataclasses
import json
import statistics

import pytest
import torch

import bench_accuracy
import train_vit
from bench_accuracy import (Cell, Results, critical, holm, matched_rank, missing, paired, student,
                            sweep)

CELL, TUNING, SEEDS = Cell("vit", "pictures", 2, 50), range(100, 102), range(3)


def test_students_p_is_that_of_the_tables():
    for t, degrees, p in ((2.262, 9, 0.05), (3.250, 9, 0.01), (12.706, 1, 0.05),
                          (1.960, 9999, 0.05), (0.0, 5, 1.0)):
        assert student(t, degrees) == student(-t, degrees) == pytest.approx(p, abs=2e-4)
    assert critical(9) == pytest.approx(2.262, abs=1e-3)


def test_paired_differences_by_hand():
    mean, half, p = paired([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])     # differences 2, 3, 1
    assert mean == 2 and half == pytest.approx(4.303 / 3 ** 0.5, abs=1e-3)
    assert p == pytest.approx(student(2 * 3 ** 0.5, 2))
    assert paired([1.0, 1.0], [1.0, 1.0]) == (0, 0, 1)


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == pytest.approx([1.0, 1.0]) and holm([]) == []


def fill(results, method, accuracy, **more):
    """Runs all that is missing, with made-up accuracies, until nothing is."""
    rounds = []
    while jobs := missing(results, CELL, method, TUNING, SEEDS):
        rounds.append(jobs)
        for cell, name, lr, seed, rank in jobs:
            results.add({"cell": str(cell), "method": name, "lr": lr, "seed": seed, "rank": rank,
                         "accuracy": accuracy(lr), "merged_rank": 4.4} | more)
    return rounds


def test_a_sweep_is_widened_until_its_best_lies_inside(tmp_path):
    results = Results(tmp_path)
    best = bench_accuracy.RATES[0] / 4                           # two steps below the first
    rounds = fill(results, "lora", lambda lr: -abs(lr - best))
    assert [len(jobs) for jobs in rounds] == [8, 2, 2, 2, 3]     # 4 rates, 3 more, the fresh seeds
    assert {job[2] for job in rounds[-1]} == {best} and {j[3] for j in rounds[-1]} == {0, 1, 2}
    assert {job[3] for jobs in rounds[:-1] for job in jobs} == {100, 101}
    again = Results(tmp_path)                                    # finished runs are skipped
    assert again.lines == results.lines and not missing(again, CELL, "lora", TUNING, SEEDS)


def test_a_sweep_counts_the_further_tuning_seeds_that_all_rates_have(tmp_path):
    results = Results(tmp_path)
    fill(results, "lora", lambda lr: -abs(lr - 1e-2))
    assert sweep(results, CELL, "lora", TUNING) == ([], 1e-2)
    further = [{"cell": str(CELL), "method": "lora", "lr": lr, "seed": 102, "rank": 2,
                "accuracy": float(lr == 2e-2)} for lr in bench_accuracy.RATES]
    for line in further[:-1]:
        results.add(line)
    assert sweep(results, CELL, "lora", TUNING) == ([], 1e-2)    # a rate has not been run on 102
    results.add(further[-1])
    assert sweep(results, CELL, "lora", TUNING) == ([], 2e-2)


def test_the_matched_rank_is_structloras_and_waits_for_it(tmp_path):
    results = Results(tmp_path)
    assert missing(results, CELL, "lora matched", TUNING, SEEDS) == []
    fill(results, "structlora", lambda lr: -abs(lr - 1e-2))
    assert sweep(results, CELL, "structlora", TUNING) == ([], 1e-2)
    assert matched_rank(results, CELL, TUNING) == 4
    assert {job[4] for job in missing(results, CELL, "lora matched", TUNING, SEEDS)} == {4}


def test_differences_are_to_lora_of_the_same_seeds(tmp_path):
    results = Results(tmp_path)
    for method, extra in (("lora", 0.0), ("structlora", 0.1)):
        fill(results, method, lambda lr: 0.5 + extra - abs(lr - 1e-2))
    for (_, method, lr, seed), line in results.lines.items():    # seeds differ, pairs do not
        line["accuracy"] += 0.01 * seed + (0.001 * seed if method == "lora" else 0)
    rows = bench_accuracy.compared(results, TUNING, least=3)
    assert [row["method"] for row in rows] == ["lora", "structlora"]
    mean, half, _ = rows[1]["difference"]
    assert mean == pytest.approx(9.9) and half < 0.3 and rows[1]["p"] < 0.01
    cells = bench_accuracy.as_cells(rows[1])
    assert cells["to LoRA"].startswith("+9.9") and cells["merged rank"] == "4.4"
    lora, ours = bench_accuracy.compared(results, TUNING, least=3, against="structlora")
    assert lora["difference"][0] == pytest.approx(-9.9) and "difference" not in ours
    assert bench_accuracy.as_cells(lora)["to structlora"].startswith("-9.9")


def test_p_values_of_the_loss_are_corrected_among_the_rows_that_have_one(tmp_path):
    results = Results(tmp_path)
    losses = {"lora": (1.0, 1.0, 1.0), "structlora": (0.9, 0.8, 0.7), "frozen": (1.2, 1.3, 1.4)}
    for method, values in losses.items():
        fill(results, method, lambda lr: 0.5 - abs(lr - 1e-2))
        for seed in SEEDS:
            results.lines[str(CELL), method, 0.0 if method == "frozen" else 1e-2, seed][
                "loss"] = values[seed]
    fill(results, "head", lambda lr: 0.5 - abs(lr - 1e-2))       # has none
    rows = {row["method"]: row for row in bench_accuracy.compared(results, TUNING, least=3)}
    # To LoRA 0.2, 0.3, 0.4: mean 0.3 with an error of 0.1 / 3^0.5; and Holm doubles the smaller p.
    assert rows["frozen"]["loss p"] == pytest.approx(2 * student(3 * 3 ** 0.5, 2))
    assert rows["structlora"]["loss p"] == pytest.approx(student(2 * 3 ** 0.5, 2))
    assert "p" in rows["head"] and "loss p" not in rows["head"]
    assert bench_accuracy.as_cells(rows["head"])["loss p"] == ""


def test_a_row_takes_the_seeds_that_it_shares_with_lora(tmp_path):
    results = Results(tmp_path)
    for method, extra in (("lora", 0.0), ("structlora", 0.1)):
        fill(results, method, lambda lr: 0.5 + extra - abs(lr - 1e-2))
    for method, seed in (("lora", 50), ("structlora", 51)):      # one that the other lacks
        results.add({"cell": str(CELL), "method": method, "lr": 1e-2, "seed": seed, "rank": 2,
                     "accuracy": 0.0})
    lora, ours = bench_accuracy.compared(results, TUNING, least=3)
    assert [line["seed"] for line in lora["lines"]] == [0, 1, 2, 50]
    assert [line["seed"] for line in ours["lines"]] == [0, 1, 2]
    assert ours["difference"][0] == pytest.approx(10)
    assert [row["method"] for row in bench_accuracy.compared(results, TUNING, least=4)] == ["lora"]


def test_a_method_run_before_the_other_was_tuned_anew_keeps_its_comparison(tmp_path):
    results = Results(tmp_path)
    for method, extra in (("lora", 0.0), ("structlora", 0.1), ("head", 0.2)):
        fill(results, method, lambda lr: 0.5 + extra - abs(lr - 1e-2))
    line = {"cell": str(CELL), "rank": 2, "merged_rank": 4.4}
    for method in ("lora", "structlora"):            # two more tuning seeds choose 2e-2, and fresh
        for seed in (102, 103):                      # seeds are run there
            for lr in bench_accuracy.RATES:
                results.add(line | {"method": method, "lr": lr, "seed": seed,
                                    "accuracy": 0.9 if lr == 2e-2 else 0.1})
        for seed in range(10, 13):
            results.add(line | {"method": method, "lr": 2e-2, "seed": seed, "accuracy":
                                {"lora": 0.6, "structlora": 0.63}[method] + seed / 1000})
    head, lora, ours = sorted(bench_accuracy.compared(results, TUNING, least=3),
                              key=lambda row: row["method"])
    assert ours["difference"][0] == pytest.approx(3) and ours["lr"] == lora["lr"] == 2e-2
    assert head["difference"][0] == pytest.approx(19.8) and head["base"][0]["lr"] == 1e-2
    assert (head["early"], ours["early"]) == (True, False)
    assert bench_accuracy.as_cells(head)["n"] == "3 *"


def test_the_overall_difference_pairs_each_seeds_mean_over_the_cells():
    line = lambda seed, value: {"seed": seed, "accuracy": value}
    rows = [{"method": "structlora", "lines": [line(0, 0.6), line(1, 0.6), line(2, 0.9)],
             "base": [line(0, 0.5), line(1, 0.6), line(2, 0.0)]},
            {"method": "lora", "lines": [line(0, 0.5)]}]
    gain = bench_accuracy.gain_of_each_seed(rows)
    assert gain == pytest.approx({0: 10, 1: 0, 2: 90})
    # Seed 2 has one cell only. Differences of the two others: (10 + 0) / 2 and 0, so their mean is
    # 2.5 with an error of 2.5, t = 1 with one degree of freedom: p = 0.5, and the interval is
    # 12.706 errors wide.
    gains = {CELL._replace(rank=1): gain, CELL: {0: 0.0, 1: 0.0}}
    assert bench_accuracy.overall(gains, range(10)) == {
        "seeds": "0 to 1", "rank": "1, 2", "width": "64", "cells": "2",
        "StructLoRA to LoRA": "+2.5 ± 31.8",
        "p (uncorrected)": "0.500"}
    assert bench_accuracy.overall(gains, range(10, 100)) == {}
    assert bench_accuracy.overall({}, range(10)) == {}


def test_what_a_wider_backbone_adds_is_paired_by_seed():
    wide = CELL._replace(task=f"wide-{CELL.task}")
    gains = {CELL: {0: 1.0, 1: 2.0, 2: 50.0}, wide: {0: 6.0, 1: 2.0, 3: 50.0}}
    line = bench_accuracy.widened(wide, gains)                   # 5 and 0: as above
    assert (line["n"], line["at width 64"], line["at this width"]) == ("2", "+1.5", "+4.0")
    assert (line["wider"], line["p (uncorrected)"]) == ("+2.5 ± 31.8", "0.500")
    assert bench_accuracy.widened(CELL, gains) == {}
    assert bench_accuracy.widened(wide, {wide: gains[wide]}) == {}


def test_a_wide_task_is_the_same_task_on_a_wider_backbone():
    plain, wide = (Cell("vit", task, 1, 50) for task in ("invert", "wide-invert"))
    assert (plain.kind, plain.width, wide.kind, wide.width) == ("invert", 64, "invert", 128)
    wider = Cell("llama", "wider-headings", 1, 128)
    assert (wider.kind, wider.width) == ("headings", 256)
    for tasks in bench_accuracy.TASKS.values():
        assert {Cell("", task, 1, 1).kind for task in tasks} <= set(tasks)
    narrow, wide = (train_vit.small_vit(16, 10, cell.width).config for cell in (plain, wide))
    assert wide == dataclasses.replace(narrow, width=128, heads=8, mlp=512)


def test_calibration_error_by_hand():
    sure = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
    labels = torch.tensor([0, 1, 1, 1])          # bins: 0.9 twice, half right; 0.6 and 0.8, right
    expected = (2 * abs(0.5 - 0.9) + 0.4 + 0.2) / 4
    assert bench_accuracy.expected_calibration_error(sure, labels) == pytest.approx(expected)


def test_committed_results_are_small_and_whole():
    paths = sorted((bench_accuracy.ROOT / "tests/results").glob("*.jsonl"))
    if not paths:
        pytest.skip("no results are committed")
    assert sum(path.stat().st_size for path in paths) < 1e6
    lines_of = {path.stem: [json.loads(line) for line in path.read_text().splitlines()]
                for path in paths}
    assert all(line["cell"].replace(":", "-") + "-tuning" * (line["seed"] >= 100) == name
               for name, lines in lines_of.items() for line in lines)
    lines = sum(lines_of.values(), [])
    keys = [(line["cell"], line["method"], line["lr"], line["seed"]) for line in lines]
    assert len(set(keys)) == len(keys) and {line["method"] for line in lines} <= set(
        bench_accuracy.METHODS)
    assert 0 <= statistics.fmean(line["accuracy"] for line in lines) <= 1
