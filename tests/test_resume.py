"""What can happen to a run: kills, full disks, two at once, clocks, numbers that go wrong. A short
form of bench_resume.py, and what can be done without a process of its own."""

import random
import resource
import subprocess
import sys
import time

import pytest
import torch

import bench_resume
import structlora
import train_llama
import train_llava
import train_vit
from structlora import Config, InputError, attach
from test_train import Two, checkpoint, cli, data, equal, lines, options, run, task   # noqa: F401

HOLD = """import fcntl, os, sys, time
held = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
time.sleep(100)"""


def test_a_run_killed_at_random_moments_ends_like_one_never_killed(data, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_resume, "OPTIONS", (
        "--data", data, "--image-size", "16", "--method", "structlora", "--pretrain-steps", "6",
        "--steps", "100", "--save-every", "3", "--batch-size", "8", "--device", "cpu"))
    status, error = bench_resume.finish("vit", tmp_path / "whole")
    assert status == 0, error
    moments = bench_resume.killed_until_it_ends("vit", tmp_path / "killed", random.Random(1), 0, 2,
                                                anywhere=0)
    assert moments.total() == 2, "it ended before it could be killed"
    assert bench_resume.same(*map(bench_resume.left_by, (tmp_path / "whole", tmp_path / "killed")))


def test_a_second_run_on_the_same_out_is_refused_and_a_dead_one_frees_it(cli, data, tmp_path):
    (tmp_path / "run").mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run" / "lock"],
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    arguments = ("--data", data, "--image-size", "16", "--pretrain-steps", "2", "--steps", "2",
                 "--method", "lora", "--device", "cpu", "--out", "run")
    status, _, err = cli(*arguments)
    assert status == 2 and err.count("\n") == 1 and "another run is writing" in err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["lock"]
    holder.kill()                                                # as kill -9 does
    holder.wait()
    assert cli(*arguments)[0] == 0


def test_what_a_killed_process_left_half_written_is_removed(cli, data, tmp_path):
    (tmp_path / "run" / "lora").mkdir(parents=True)
    for name in ("config.json.tmp12", "lora/adapter.pt.tmp345"):
        (tmp_path / "run" / name).write_bytes(b"half")
    cli("--data", data, "--image-size", "16", "--pretrain-steps", "2", "--steps", "2", "--method",
        "lora", "--device", "cpu", "--out", "run")
    assert not list((tmp_path / "run").glob("**/*.tmp*"))


def test_a_full_disk_keeps_the_last_save_and_resumes(tmp_path):
    run(tmp_path / "whole", task(), options())
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(number):
        if number == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    try:
        with pytest.raises(OSError, match="adapter.pt: not written; is the disk full"):
            run(tmp_path / "full", task(before_batch=fill), options())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert checkpoint(tmp_path / "full")["step"] == 5 and not list(tmp_path.glob("**/*.tmp*"))
    run(tmp_path / "full", task(), options(resume=True))
    assert lines(tmp_path / "whole") == lines(tmp_path / "full")
    assert equal(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "full"))


def test_an_out_that_cannot_be_written_is_one_line(cli, data):
    status, _, err = cli("--data", data, "--out", f"{data}/run")         # also for root
    assert status == 2 and err.count("\n") == 1 and "data.npz" in err


def test_a_clock_that_runs_backwards_changes_nothing(tmp_path, monkeypatch):
    run(tmp_path / "whole", task(), options())
    now = [time.time()]

    def earlier():
        now[0] -= 3600
        return now[0]

    def die(number):
        if number == 7:
            raise ZeroDivisionError
    monkeypatch.setattr(time, "time", earlier)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "part", task(before_batch=die), options())
    run(tmp_path / "part", task(), options(resume=True))
    assert lines(tmp_path / "whole") == lines(tmp_path / "part")


# --- numbers that go wrong


def test_a_gradient_that_overflows_in_bf16_stops_with_the_step_and_the_lever(tmp_path):
    good, calls = task(), []

    def loss(model, batch):
        calls.append(1)
        value = good.loss(model, batch)
        return value + (1e38 * model(batch[0]).sum() * 1e3 if len(calls) == 4 else 0)
    torch.manual_seed(0)
    adapters = attach(Two().bfloat16(), Config(rank=2))
    with pytest.raises(InputError, match="at step 4; lower --lr.*adapter.pt, 3 steps in"):
        structlora.train(adapters.model, adapters, good._replace(loss=loss),
                         options(dtype="bfloat16"), tmp_path, "test")
    state = checkpoint(tmp_path)
    assert state["step"] == 3
    assert all(value.isfinite().all() for graph in state["state"] for value in graph.values())


def test_a_batch_without_labels_is_said_and_one_micro_batch_without_is_left_out(tmp_path):
    with pytest.raises(InputError, match="step 1: nothing in the batch has a label"):
        run(tmp_path / "a", task()._replace(size=lambda batch: 0), options())

    def batch(number):                                           # every other one is masked whole
        x, y = task().batch(number // 2)
        return (x, y, 8) if number % 2 else (x[:0], y[:0], 0)
    masked = task()._replace(batch=batch, size=lambda batch: batch[2])
    plain = {"gate": "none", "edges": "depth"}
    _, one = run(tmp_path / "b", masked, options(accumulate=2), **plain)
    _, other = run(tmp_path / "c", task(), options(), **plain)
    for name, delta in one.deltas().items():
        assert torch.equal(delta, other.deltas()[name]) and delta.any()


def test_micro_batches_of_different_sizes_weigh_by_their_labels(tmp_path):
    cuts = ((0, 1), (1, 8))

    def batch(number):
        x, y = task().batch(number // 2)
        return tuple(t[slice(*cuts[number % 2])] for t in (x, y))
    plain = {"gate": "none", "edges": "depth"}
    parts = task()._replace(batch=batch, size=lambda batch: len(batch[1]))
    _, small = run(tmp_path / "a", parts, options(accumulate=2), **plain)
    _, large = run(tmp_path / "b", task(), options(), **plain)
    for name, delta in large.deltas().items():
        assert torch.allclose(delta, small.deltas()[name], atol=1e-5) and delta.any()


def test_a_class_with_fewer_images_than_shots_is_said(capsys):
    chosen = structlora.choose(torch.tensor([0, 0, 0, 1]), 2, None, seed=0)
    assert capsys.readouterr().out == "class 1 has 1 examples, fewer than --shots 2: all are used\n"
    assert len(chosen) == 3 and 3 in chosen.tolist()


def test_nothing_to_score_or_to_learn_is_said(data, tmp_path):
    train, test, classes = train_vit.read_images(data)
    args = options(data=data, batch_size=4, max_length=64)
    with pytest.raises(InputError, match="no test image is left to score"):
        train_vit.make_task(train, test.select(torch.tensor([], dtype=torch.long)),
                            train_vit.ViTConfig(16, 4, 8, 1, 1, 8, classes), args, 4)
    empty = [train_llama.Example("a", [""])]             # its end is what there is to say
    made = train_llama.make_task(empty, empty, train_llama.Bytes(), args, 4)
    config = train_llama.LlamaConfig(259, 16, 1, 2, 2, 8, 16)
    with torch.no_grad():
        scores = made.evaluate(train_llama.Llama(config).initialise().eval())
    assert made.num_examples == 1 and 0 < scores["loss"] < 100
    for name, content in (("a.json", "[]"), ("b.jsonl", ""), ("c.txt", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match="too few"):
            train_llama.read_data(tmp_path / name, 0)
    with pytest.raises(InputError, match="too few"):
        train_llava.read_data(tmp_path / "a.json", None, 0)
