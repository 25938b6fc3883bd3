"""The loop and the command line: resume, faults, several processes. Mostly train_vit.py, on images
of 16 x 16 pixels."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import structlora
import train_llama
import train_llava
import train_vit
from helpers import assert_same, readme_code
from train_vit import ViT, ViTConfig, load_vit, save_vit, warmup_cosine

ROOT = Path(__file__).parents[1]


@pytest.fixture
def vit(tmp_path):
    """Options for a checkpoint of three layers and 60 images in three classes that brightness tells
    apart; the head is of five classes, so a new one is trained along."""
    rng, y = np.random.default_rng(0), np.arange(60) % 3
    x = rng.integers(0, 60, (60, 16, 16, 3)) + 90 * y[:, None, None, None]
    np.savez(tmp_path / "data.npz", x=x.astype(np.uint8), y=y)
    torch.manual_seed(0)
    model = ViT(ViTConfig(16, 4, 32, 3, 2, 64, 5))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    save_vit(model, tmp_path / "vit.pth")
    return ("--checkpoint", "vit.pth", "--data", "data.npz", "--batch-size", "8", "--steps", "14",
            "--save-every", "4", "--lr", "0.03", "--device", "cpu")


def left_by(out):
    """What a run leaves, without the times: lines of metrics.jsonl, tensors of adapter.pt."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    file = torch.load(out / "adapter.pt", weights_only=True)
    flat = {**file["state"], **{f"{n} {k}": v for n, values in file["optimizer"]["state"].items()
                                for k, v in values.items()}}
    return [{k: v for k, v in line.items() if k != "ms"} for line in lines], flat


def assert_same_runs(a, b):
    (lines_a, a), (lines_b, b) = left_by(a), left_by(b)
    assert lines_a == lines_b
    assert_same(a, b)


def assert_refused(result, word):
    """Of what cli() returns: exit status 2, and one line with this pattern."""
    status, _, err = result
    assert status == 2 and err.count("\n") == 1 and re.search(word, err), err


def in_step(number, act, patch):
    """Lets act() of the pictures come between in the middle of this step."""
    real, calls = train_vit.prepare, []

    def prepare(images, config, augment=False):
        calls.append(augment)
        x = real(images, config, augment)
        return act(x) if augment and sum(calls) == number else x
    patch.setattr(train_vit, "prepare", prepare)


# --- pieces

def test_learning_rate_warms_up_over_six_percent_and_falls_as_a_cosine_to_zero():
    factors = [warmup_cosine(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 60) and factors[59] == 1.0 == max(factors)
    assert factors[60 + 470] == pytest.approx(0.5, abs=1e-3) and factors[-1] < 1e-5
    assert all(0 < warmup_cosine(0, steps) <= 1 for steps in (1, 2, 3))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.pt"
    structlora.write(path, {"a": torch.ones(2)})
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))      # a full disk
        with pytest.raises((OSError, RuntimeError)):
            structlora.write(path, {"a": torch.ones(10**6)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before


# --- resume

@pytest.mark.parametrize("more", ((), ("--gate", "concrete", "--dropout", "0.1"), ("--budget", "2"),
                                  ("--method", "lora"), ("--edges", "all", "--accumulate", "2")))
def test_a_killed_run_resumes_to_the_same_numbers(more, cli, vit, tmp_path, monkeypatch):
    assert cli(train_vit, *vit, *more, "--out", "whole")[0] == 0
    real = train_vit.save_run

    def die(out, adapters, optimizer, lines, *more):
        real(out, adapters, optimizer, lines, *more)
        if len(lines) == 11:                                     # three steps past the last save
            raise ZeroDivisionError
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train_vit, "save_run", die)
        cli(train_vit, *vit, *more, "--out", "killed")
    assert len(left_by(tmp_path / "killed")[0]) == 8
    assert cli(train_vit, *vit, *more, "--out", "killed", "--resume")[0] == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "killed")
    assert cli(train_vit, *vit, *more, "--out", "killed", "--resume")[0] == 0    # nothing is left
    assert_same_runs(tmp_path / "whole", tmp_path / "killed")


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(cli, vit, tmp_path, monkeypatch):
    assert cli(train_vit, *vit, "--out", "whole")[0] == 0

    def interrupt(x):
        os.kill(os.getpid(), signal.SIGINT)
        return x
    with monkeypatch.context() as patch:
        in_step(6, interrupt, patch)
        status, _, err = cli(train_vit, *vit, "--out", "stopped")
    assert status == 130 and "saved after step 6 of 14" in err and "--resume" in err
    assert len(left_by(tmp_path / "stopped")[0]) == 6
    assert cli(train_vit, *vit, "--out", "stopped", "--resume")[0] == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "stopped")


def test_kill_minus_nine_at_any_moment(vit, tmp_path, cli):
    options = (*vit, "--steps", "400", "--save-every", "1", "--out", "killed")
    process = subprocess.Popen([sys.executable, ROOT / "train_vit.py", *options], cwd=tmp_path,
                               env=os.environ | {"OMP_NUM_THREADS": "1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 5):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 0 < len(left_by(tmp_path / "killed")[0]) < 400
    assert not (tmp_path / "killed" / "adapter_peft").exists()
    assert_refused(cli(train_vit, *options, "--resume", "--seed", "1"), "seed=0, not 1")
    file = (tmp_path / "killed" / "adapter.pt").read_bytes()
    (tmp_path / "killed" / "adapter.pt").write_bytes(file[:1000])
    assert_refused(cli(train_vit, *options, "--resume"), "adapter.pt")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_save(cli, vit, tmp_path, monkeypatch):
    in_step(7, lambda x: x * float("nan"), monkeypatch)
    assert_refused(cli(train_vit, *vit, "--out", "run"), "step 7: lower --lr")
    lines, tensors = left_by(tmp_path / "run")
    assert len(lines) == 4 and all(t.isfinite().all() for t in tensors.values())


def test_resume_refuses_changed_data_and_a_folder_without_a_run(cli, vit, tmp_path):
    for options in (vit, ()):                                    # a demo, too, before it pretrains
        assert_refused(cli(train_vit, *options, "--out", "run", "--resume"),
                       "--resume: there is no run/.*adapter.pt")
        assert not (tmp_path / "run").exists()
    assert cli(train_vit, *vit, "--out", "run")[0] == 0
    data = dict(np.load(tmp_path / "data.npz"))
    for place in (0, 5):                                         # of the training and the test part
        data["x"][place] += 1
        np.savez(tmp_path / "data.npz", **data)
        assert_refused(cli(train_vit, *vit, "--out", "run", "--resume"),
                       "run/adapter.pt: the run was on other")
        data["x"][place] -= 1
    np.savez(tmp_path / "data.npz", **data)
    assert cli(train_vit, *vit, "--out", "run", "--resume")[0] == 0


# --- the command line

def test_train_score_merge_and_export(cli, vit, tmp_path):
    options = ("--steps", "60", "--merge", "--targets", "q_proj, v_proj ")       # blanks do no harm
    status, out, err = cli(train_vit, *vit, *options, "--out", "run")
    assert status == 0 and "3 classes: 0, 1, 2" in out and "a new head for 3 classes" in out, err
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json", "metrics.jsonl", "adapter.pt", "adapter_peft", "merged.pt"}
    row = out.splitlines()[-1].split("|")
    accuracy, loss = (float(row[i]) for i in (2, 3))
    assert accuracy > 0.6
    rates = [line["lr"] for line in left_by(tmp_path / "run")[0]]        # warmed up over 4 steps
    assert rates[:4] == pytest.approx([0.0075, 0.015, 0.0225, 0.03]) and rates[-1] < 1e-4
    assert_refused(cli(train_vit, *vit, "--out", "vit.pth"), "--out vit.pth: cannot be written")
    for option, value in zip(vit[::2], ("none.pth", "dta.npz")):
        assert_refused(cli(train_vit, *vit, option, value), f"{option} {value}: there is no such")
    for checkpoint, folder in (("run/merged.pt", "none"), ("vit.pth", "run")):
        status, out, err = cli(train_vit, "--checkpoint", checkpoint, *vit[2:], "--out", folder,
                               "--eval-only")
        assert status == 0 and f"{accuracy:.3f}" in out and f"{loss:.3f}" in out
    assert_refused(cli(train_vit, *vit, "--out", "none", "--eval-only"), "other classes")
    assert not (tmp_path / "none").exists()
    peft = pytest.importorskip("peft")
    merged, plain = load_vit("run/merged.pt"), load_vit("vit.pth", num_classes=3)
    other = peft.PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter_peft").eval()
    x = torch.randn(4, 3, 16, 16)
    assert torch.allclose(other(x), merged(x), atol=1e-4)


def folders(tmp_path, *names):
    """Pictures of 16 x 16 of these classes, told apart by brightness -> options of train_vit.py."""
    Image = pytest.importorskip("PIL.Image")
    for number, name in enumerate(names):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for i in range(10):
            Image.new("L", (16, 16), 90 * number + 9 * i).save(folder / f"{i}.png")
    return ("--checkpoint", "vit.pth", "--data", "data", "--batch-size", "8", "--steps", "20",
            "--lr", "0.03", "--device", "cpu", "--out", "run")


def test_the_names_of_the_classes_stay_with_the_files_of_a_run(cli, vit, tmp_path):
    options = folders(tmp_path, "cat", "dog", "fox")
    status, first, err = cli(train_vit, *options, "--merge")
    assert status == 0 and "a new head for 3 classes" in first, err
    scores = [cell.strip() for cell in first.splitlines()[-1].split("|")[2:4]]
    for old, new in (("cat", "zebra"), ("fox", "cat"), ("zebra", "fox")):
        (tmp_path / "data" / old).rename(tmp_path / "data" / new)    # cat and fox swap their names
    for checkpoint in ("run/merged.pt", "vit.pth"):
        status, out, err = cli(train_vit, "--checkpoint", checkpoint, *options[2:], "--eval-only")
        now = [cell.strip() for cell in out.splitlines()[-1].split("|")[2:4]]
        assert status == 0 and float(now[0]) < float(scores[0]), err     # not in silence the same
    (tmp_path / "data" / "fox").rename(tmp_path / "data" / "emu")
    assert_refused(cli(train_vit, *options, "--eval-only"),
                   "run/adapter.pt: its classes are cat, dog, fox, not cat, dog, emu")
    assert_refused(cli(train_vit, "--checkpoint", "run/merged.pt", *options[2:], "--eval-only"),
                   "other classes than run/merged.pt")


def test_a_console_that_cannot_print_a_name_ends_nothing(vit, tmp_path):
    options = folders(tmp_path, "\u732b", "caf\u00e9", "dog")
    run = subprocess.run([sys.executable, ROOT / "train_vit.py", *options], cwd=tmp_path, text=True,
                         capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert run.returncode == 0 and "caf\\xe9, dog, \\u732b" in run.stdout, run.stderr
    assert (tmp_path / "run" / "adapter_peft" / "adapter_config.json").exists()
    assert "caf\u00e9" in json.loads((tmp_path / "run" / "config.json").read_text())["classes"]


def test_a_run_exports_before_it_scores_and_prints(cli, vit, tmp_path, monkeypatch):
    scores = iter([{"accuracy": 0.0, "loss": 1.0}])              # of the frozen model, then no more
    monkeypatch.setattr(train_vit, "evaluate", lambda *_: next(scores))
    with pytest.raises(StopIteration):
        cli(train_vit, *vit, "--out", "run", "--merge")
    there = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"adapter.pt", "adapter_peft", "merged.pt"} <= there


@pytest.mark.parametrize("script", (train_vit, train_llama, train_llava))
def test_help_explains_every_option(script, cli):
    status, out, _ = cli(script, "--help")
    options = re.findall(r"^  (--[a-z-]+)(?: [A-Z_]+)? *(.*)\n( {10,}\S)?", out, re.M)
    assert status == 0 and {f"--{name}" for name in ("rank", "edges", "resume", "out")} <= {
        name for name, *_ in options}
    assert all(words or more for _, words, more in options), options


@pytest.mark.parametrize("script", (train_vit, train_llama, train_llava))
@pytest.mark.parametrize("arguments", (
    "--rank 0", "--rank x", "--rank 100000", "--alpha 0", "--alpha nan", "--budget 0",
    "--edges ring", "--targets nosuch_proj", "--method qlora", "--shots 0", "--fraction 1.1",
    "--shots 1 --fraction 0.5", "--steps 0", "--lr -1", "--lr nan", "--batch-size 0", "--seed -1",
    "--seed 99999999999999999999999", "--accumulate 0", "--save-every 0", "--dtype float16",
    "--device abacus", "--checkpoint absent", "--data absent", "--eval-only", "--unknown 1",
    "--checkpoint absent --data absent", "--rnk 3", "--resume"))
def test_bad_options_are_one_line_before_anything_is_pretrained_or_written(
        script, arguments, cli, tmp_path):
    assert_refused(cli(script, *arguments.split(), "--out", "out"), "error: ")
    assert not (tmp_path / "out").exists()


def test_the_demo_has_a_row_for_each_method(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(train_vit.pretrained, "__defaults__", (3,))
    status, out, err = cli(train_vit, "--steps", "3", "--out", "run", "--device", "cpu")
    rows = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")]
    assert status == 0 and rows[2:] == ["frozen", "LoRA r=2", "LoRA r=8", "StructLoRA r=2",
                                        'StructLoRA r=2 "all" (ours)'], err
    shutil.rmtree(tmp_path / "run" / "all")                      # as if killed before it began
    status, again, _ = cli(train_vit, "--steps", "3", "--out", "run", "--device", "cpu", "--resume",
                           "--merge")                            # each trial from the backbone
    times = r" *[\d.]+ \|\n"
    assert status == 0 and re.sub(times, "", again) == re.sub(times, "", out)
    assert len([*tmp_path.glob("run/*/merged.pt")]) == 4


def test_the_ten_lines_of_the_readme_run():
    scope = {}
    exec(readme_code("attach(model, Config(rank=2"), scope)
    assert isinstance(scope["model"], nn.Module)
    assert not any("LoRA" in type(m).__name__ for m in scope["model"].modules())


# --- several processes

def llama_options(tmp_path, name, size):
    """Options of train_llama.py for records whose answers differ in length."""
    if not (tmp_path / "llama.pt").exists():
        torch.manual_seed(0)
        config = train_llama.LlamaConfig(258, 32, 4, 2, 2, 16, 48)
        structlora.write(tmp_path / "llama.pt", {"llama": vars(config), "model":
                                                 train_llama.Llama(config).state_dict()})
        records = [{"instruction": "Say " + "on and " * (n % 5) + str(n),
                    "output": "o" * (1 + n % 7)} for n in range(60)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return ("--checkpoint", "llama.pt", "--data", "a.jsonl", "--gate", "none", "--steps", "14",
            "--edges", "hybrid",             # whose probes last 10 steps
            "--lr", "0.01", "--device", "cpu", "--batch-size", str(size), "--save-every", "5",
            "--out", name)


def start(tmp_path, name, size, processes, **more):
    """Starts train_llama.py, under torchrun if there are several processes."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    command = [sys.executable, *(launcher if processes > 1 else ()), str(ROOT / "train_llama.py"),
               *llama_options(tmp_path, name, size), *more.pop("options", ())]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | more)


def test_two_processes_equal_one_at_twice_the_batch(tmp_path):
    runs = [start(tmp_path, name, size, n) for name, size, n in (("one", 8, 1), ("two", 4, 2))]
    printed = [run.communicate(timeout=300) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], printed
    assert printed[0][0].count("| structlora") == printed[1][0].count("| structlora") == 1
    (lines_a, a), (lines_b, b) = (left_by(tmp_path / name) for name in ("one", "two"))
    assert len(lines_a) == 14                                    # past the probes' end
    for one, two in zip(lines_a, lines_b, strict=True):
        assert one == pytest.approx(two, abs=1e-5)
    for name, value in a.items():                                # Adam divides by w_src's tiny ones
        near = 1e-3 if "w_src" in name or "w_dst" in name or name[0].isdigit() else 1e-5
        gap = (value.float() - b[name].float()).abs().max().item()
        assert gap < near, (name, gap)
    rest = start(tmp_path, "two", 4, 2, options=("--resume",))
    assert rest.communicate(timeout=300)[1] is not None and rest.returncode == 0
    wrong = start(tmp_path, "two", 8, 1, options=("--resume",))
    assert "not 8" in wrong.communicate(timeout=300)[1] and wrong.returncode == 2


def test_fewer_rows_than_processes_are_refused_in_one_line(cli, vit, tmp_path, monkeypatch):
    monkeypatch.setattr(train_vit, "processes", lambda: (0, 50))
    for script, options in ((train_vit, (*vit, "--out", "run")),
                            (train_llama, (*llama_options(tmp_path, "run", 8), "--shots", "1"))):
        assert_refused(cli(script, *options), "training rows for 50 processes")
    assert not (tmp_path / "run").exists()
