"""Kills the demos of the three scripts at random moments, and does worse to them; prints tables.

    python tests/bench_resume.py                    51 kills with SIGKILL, then the other faults
    python tests/bench_resume.py --scripts vit --kills 5

A demo is killed at a random moment, again and again with --resume, until it ends by itself. Then
all that it left is compared, bit by bit, with a run that nobody disturbed: every line of
metrics.jsonl, adapters, optimizer and random state, the PEFT export and the row of the table (but
for times and memory). Exits with status 1 if anything differs.
"""

import argparse
import collections
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import structlora                                                # noqa: E402

STEPS = 60
OPTIONS = ("--method", "structlora", "--pretrain-steps", "30", "--steps", str(STEPS),
           "--save-every", "3", "--batch-size", "8", "--device", "cpu")
PORT = "--standalone", "--nproc-per-node=2"
# Every call of the wall clock is an hour earlier than the one before.
BACKWARDS = """import runpy, sys, time
now = [time.time()]
def back(): now[0] -= 3600; return now[0]
time.time, time.time_ns = back, lambda: int(1e9 * back())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""


def start(script: str, out: Path, *more: str, launcher=(), before=None) -> subprocess.Popen:
    """The demo of train_SCRIPT.py, writing to `out`; --resume if that is there already."""
    resume = ("--resume",) * out.is_dir()
    command = [sys.executable, *launcher, ROOT / f"train_{script}.py", *OPTIONS, "--out", out,
               *resume, *more]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, preexec_fn=before, env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(*arguments, **options) -> tuple[int, str]:
    """Runs start() to its end -> (status, stderr)."""
    process = start(*arguments, **options)
    error = process.communicate()[1]
    return process.returncode, error


def left_by(out: Path) -> dict:
    """All that a finished run left and that must not depend on its fate."""
    checkpoint = torch.load(out / "adapter.pt", weights_only=True)
    rows = json.loads((out / "summary.json").read_text())
    return {"metrics": (out / "metrics.jsonl").read_text(),
            "checkpoint": {k: v for k, v in checkpoint.items() if k != "ms_per_step"},
            "export": torch.load(out / "adapter_peft" / "adapter_model.bin", weights_only=True),
            "rows": [{k: v for k, v in row.items() if k not in ("ms/step", "peak memory")}
                     for row in rows],
            "left over": [str(path) for path in out.glob("**/*.tmp*")]}


def same(a, b) -> bool:
    """Equality of nested values, of tensors bit by bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def logged(out: Path) -> int:
    """How many lines metrics.jsonl has."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def moment(out: Path) -> str:
    """What a run was at when it was killed, by the files it left."""
    if not (out / "config.json").exists():
        return "loading"
    if not (out / "metrics.jsonl").exists():
        return "pretraining"
    if list(out.glob("**/*.tmp*")):
        return "writing a file"
    return "training" if logged(out) <= STEPS else "ending"


def killed_until_it_ends(script: str, out: Path, rng: random.Random, seconds: float,
                         most: int, anywhere: float = 1 / 3) -> collections.Counter:
    """Runs a demo, killing it at random moments, at most `most` times; counts the moments: the
    share `anywhere` at any time of a run, the others once some more steps are logged."""
    moments = collections.Counter()
    while moments.total() < most:
        process = start(script, out)
        if rng.random() < anywhere:
            wait, steps = rng.uniform(0.1, 1.0) * seconds, 0
        else:
            wait, steps = rng.uniform(0.0, 0.1), logged(out) + rng.randint(1, 30)
        while process.poll() is None and logged(out) < steps:
            time.sleep(0.002)
        try:
            _, error = process.communicate(timeout=wait)
            assert process.returncode == 0, error
            return moments
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            moments[moment(out)] += 1
    status, error = finish(script, out)
    assert status == 0, error
    return moments


def kill_table(scripts: list, kills: int, seed: int, folder: Path) -> bool:
    """At least `kills` kills, divided among the scripts; prints a row for each script."""
    rows, good = [], True
    for script in scripts:
        rng, began = random.Random(f"{script}{seed}"), time.perf_counter()
        status, error = finish(script, folder / script)
        assert status == 0, error
        seconds, whole = time.perf_counter() - began, left_by(folder / script)
        moments, runs, equal, wanted = collections.Counter(), 0, 0, -(-kills // len(scripts))
        while moments.total() < wanted:
            out = folder / f"{script}{runs}"
            moments += killed_until_it_ends(script, out, rng, seconds, wanted - moments.total())
            runs, equal = runs + 1, equal + same(whole, left_by(out))
            shutil.rmtree(out)
        good &= equal == runs
        at = ("loading", "pretraining", "training", "writing a file", "ending")
        rows.append({"demo": script, "kills": str(moments.total())}
                    | {f"while {name}": str(moments[name]) for name in at}
                    | {"runs that ended": str(runs), "equal to the undisturbed one": str(equal)})
    structlora.print_table(rows)
    return good


# --- other faults: each function returns what happened, in words, and raises if it must not


def until(process: subprocess.Popen, out: Path, steps: int) -> None:
    """Waits until `steps` steps are logged."""
    while logged(out) <= steps:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def killed_at_20(script: str, out: Path) -> None:
    """Starts a run and kills it after 20 steps."""
    process = start(script, out)
    until(process, out, 20)
    process.kill()
    process.communicate()


def one_line(status: int, error: str, wanted: int, *words: str) -> str:
    """The one line on stderr, checked."""
    text = error.strip()
    assert status == wanted, (status, error)
    assert "\n" not in text and all(word in text for word in words), error
    return f"status {status}, one line"


def resumed(script: str, out: Path, whole: dict, **options) -> str:
    """Goes on from a fault; the result must be that of the undisturbed run."""
    status, error = finish(script, out, **options)
    assert status == 0, error
    assert same(whole, left_by(out)), f"{out}: not what an undisturbed run left"
    return "resumed to the same bits"


def stopped(script, out, whole, number) -> str:
    process = start(script, out)
    until(process, out, 20)
    process.send_signal(number)
    error = process.communicate()[1]
    said = one_line(process.returncode, error, 130, "--resume", "adapter.pt")
    return f"{said} with --resume; {resumed(script, out, whole)}"


def full_disk(script, out, whole) -> str:
    """A limit on the size of files that adapter.pt does not fit in, once it has been saved."""
    killed_at_20(script, out)
    before = (out / "adapter.pt").read_bytes()
    limit = len(before) // 2
    said = one_line(*finish(script, out, before=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (limit, limit))), 2)
    assert (out / "adapter.pt").read_bytes() == before and not list(out.glob("**/*.tmp*"))
    return f"{said}, the last save kept; {resumed(script, out, whole)}"


def full_tmpfs(script, out, whole) -> str:
    """A file system of 4 MiB; needs the right to mount one."""
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(out)]
    if subprocess.run(mount, capture_output=True).returncode:
        return "skipped: no right to mount a file system"
    try:
        killed_at_20(script, out)
        before = (out / "adapter.pt").read_bytes()
        filling = out / "filling"
        with open(filling, "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
        said = one_line(*finish(script, out), 2, str(out), "not written")
        assert (out / "adapter.pt").read_bytes() == before and not list(out.glob("**/*.tmp*"))
        filling.unlink()
        return f"{said}, the last save kept; {resumed(script, out, whole)}"
    finally:
        subprocess.run(["umount", str(out)], check=True)


def read_only(script, out, whole) -> str:
    """A folder without the right to write; root gives up the one to ignore that."""
    out.mkdir(mode=0o555)
    root = os.geteuid() == 0
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if root else []
    if root and not shutil.which("setpriv"):
        return "skipped: root writes everywhere"
    command = [*drop, sys.executable, ROOT / f"train_{script}.py", *OPTIONS, "--out", out]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    said = one_line(run.returncode, run.stderr, 2, "Permission denied", str(out))
    assert not list(out.iterdir())
    return said


def two_at_once(script, out, whole) -> str:
    first = start(script, out)
    until(first, out, 5)
    first.send_signal(signal.SIGSTOP)            # it would end before the second has loaded
    said = one_line(*finish(script, out), 2, "another run is writing", str(out))
    first.send_signal(signal.SIGCONT)
    error = first.communicate()[1]
    assert first.returncode == 0 and same(whole, left_by(out)), error
    return f"the second refused: {said}; the first ended as if alone"


def other_configuration(script, out, whole) -> str:
    killed_at_20(script, out)
    said = one_line(*finish(script, out, "--seed", "7"), 2, "config.json", "seed=0", "7")
    other = out.with_name("other")
    status, error = finish(script, other, "--rank", "3")
    assert status == 0, error
    kept = (out / "adapter.pt").read_bytes()
    shutil.copy(other / "adapter.pt", out / "adapter.pt")
    one_line(*finish(script, out), 2, "adapter.pt", "rank=3", "2")
    (out / "adapter.pt").write_bytes(kept)
    shutil.rmtree(other)
    return f"refused twice (seed, rank named): {said}; {resumed(script, out, whole)}"


def backwards(script, out, whole) -> str:
    killed_at_20(script, out)
    future = time.time() + 1e8
    for path in out.rglob("*"):
        os.utime(path, (future, future))
    return resumed(script, out, whole, launcher=("-c", BACKWARDS))


def a_rank_dies(script, out, whole) -> str:
    launcher = ("-m", "torch.distributed.run", *PORT)
    undisturbed = out.with_name("undisturbed")
    status, error = finish(script, undisturbed, launcher=launcher)
    assert status == 0, error
    process = start(script, out, launcher=launcher)
    until(process, out, 20)
    children = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="],
                              capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    began = time.perf_counter()
    error = process.communicate()[1]
    lines = [line for line in error.splitlines() if line.startswith(f"train_{script}.py: error")]
    assert len(lines) == 1 and "another one has ended" in lines[0], error
    seconds = time.perf_counter() - began
    said = f"the other ended {seconds:.1f} s later with one line"
    return f"{said}; {resumed(script, out, left_by(undisturbed), launcher=launcher)}"


SIGNALS = {"Ctrl-C": lambda *a: stopped(*a, signal.SIGINT),
           "SIGTERM": lambda *a: stopped(*a, signal.SIGTERM)}
FAULTS = {"file-size limit": full_disk, "disk full (tmpfs)": full_tmpfs,
          "read-only --out": read_only, "a second run on the same --out": two_at_once,
          "--resume of another configuration": other_configuration,
          "clock runs backwards": backwards, "kill -9 of one of two processes": a_rank_dies}


def fault_table(scripts: list, folder: Path) -> bool:
    """The signals for every script that has run in `folder`, the other faults, which are those of
    the loop that the scripts share, for the first one; prints a row for each."""
    rows = []
    for script in scripts:
        whole = left_by(folder / script)
        for name, fault in (SIGNALS | (FAULTS if script == scripts[0] else {})).items():
            with tempfile.TemporaryDirectory(dir=folder) as inner:
                try:
                    said = fault(script, Path(inner) / "run", whole)
                except AssertionError as error:
                    said = f"WRONG: {structlora.one_line(error)}"
            rows.append({"demo": script, "fault": name, "what happened": said})
    structlora.print_table(rows)
    return not any(row["what happened"].startswith("WRONG") for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", default=["vit", "llama", "llava"])
    parser.add_argument("--kills", type=int, default=51, help="in all (default: 51)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        good = kill_table(args.scripts, args.kills, args.seed, Path(folder))
        good &= fault_table(args.scripts, Path(folder))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
