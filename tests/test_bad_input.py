"""Generated bad input for every reader of the three scripts.

Each case damages a good file, at random but seeded: cuts, flipped and zeroed bytes, swapped parts,
tensors of wrong type, shape or number, hostile pickles, headers that claim 2**60 elements, broken
records. A reader may raise InputError, in one line that names a file, or read what is still a good
file; anything else fails here, and so does a file that takes longer than SECONDS. No reader writes,
so nothing can be left half-written. The last test prints how many inputs there were.
"""

import collections
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import structlora
import train_llama
import train_llava
import train_vit
from helpers import chain
from structlora import Config, InputError, attach
from test_llama import SIZES as LLAMAS
from test_llama import write_huggingface as put_huggingface_llama
from test_llama import write_meta
from test_llava import SIZES as LLAVAS
from test_llava import conversation, put_picture
from test_llava import write as put_llava
from test_tokenizer import rank_file, sentencepiece_model
from test_vit import SIZES as VITS
from test_vit import write_cifar, write_google, write_huggingface, write_timm

ROOT = Path(__file__).parents[1]
TRIED = collections.Counter()     # what became of the inputs: read, refused, option, command line
SECONDS = 30                 # nobody waits longer for a file of this size
CASES = 24                   # seeded damages for each of the files below
MEMORY = 4 * 2 ** 30         # more than any of these files can need, torch's own included


class Hostile:
    def __reduce__(self):
        return open, ("executed", "w")


class Shell:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.fixture(autouse=True)
def bounded(tmp_path, monkeypatch):
    """A working folder to catch what is executed, and a limit that a claimed 2**60 would hit."""
    monkeypatch.chdir(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)
    assert not (tmp_path / "executed").exists()


def put_adapter(folder):
    model = chain()
    attach(model, Config(rank=2)).save(folder / "adapter.pt")
    return folder / "adapter.pt"


def resumable(layers=3, **config):
    """A model with adapters after one step -> (adapters, optimizer, what the loop keeps)."""
    model = chain(layers)
    adapters = attach(model, Config(**{"rank": 2} | config))
    optimizer = torch.optim.AdamW(adapters.param_groups(1e-2))
    model(torch.randn(2, 6)).square().sum().backward()
    optimizer.step()
    return adapters, optimizer, {"step": 1, "ms_per_step": 1.0, "before": {"loss": 1.0}}


def put_checkpoint(folder):
    structlora.save_checkpoint(folder / "run.pt", *resumable())
    return folder / "run.pt"


def put_png(folder):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    image.fromarray(pixels).save(folder / "a.png")
    return folder / "a.png"


def put_jpeg(folder):
    shutil.move(put_png(folder), folder / "b.png")
    pytest.importorskip("PIL.Image").open(folder / "b.png").save(folder / "a.jpg")
    return folder / "a.jpg"


def put_folders(folder):
    for name in ("cat", "dog"):
        (folder / "c" / name).mkdir(parents=True)
        for n in range(5):
            shutil.move(put_png(folder), folder / "c" / name / f"{n}.png")
    return folder / "c"


def put_npy(folder):
    np.save(folder / "a.npy", np.zeros((4, 5, 3), np.uint8))
    return folder / "a.npy"


def put_piqa(folder):
    put_bytes(folder / "a-labels.lst", b"0\n1\n0\n1\n")
    return put_bytes(folder / "a.jsonl",
                     lines([{"goal": "a", "sol1": str(n), "sol2": "c"} for n in range(4)]))


def put_json(path, value):
    path.write_text(json.dumps(value))
    return path


def put_images(folder):
    np.savez(folder / "a.npz", x=np.zeros((8, 4, 4, 3), np.uint8), y=np.arange(8) % 2)
    return folder / "a.npz"


def put_bytes(path, data):
    path.write_bytes(data)
    return path


def put_conversations(folder):
    put_picture(folder, "a.ppm")
    put_picture(folder, "b.ppm")
    return put_json(folder / "a.json", [conversation(name, "<image>a", "b")
                                        for name in ("a.ppm", "b.ppm")])


def put_vqa(folder):
    put_picture(folder, "a.ppm")
    put_json(folder / "train_annotations.json", {"annotations": [
        {"question_id": 3, "multiple_choice_answer": "cat", "answers": [{"answer": "cat"}]}]})
    return put_json(folder / "train_questions.json", {"questions": [
        {"question_id": 3, "image": "a.ppm", "question": "What?"}]})


INSTRUCTIONS = [{"instruction": "a", "input": "b", "output": str(n)} for n in range(4)]
BOOLQ = [{"question": "a", "passage": "b", "answer": True}] * 3
lines = lambda records: "".join(json.dumps(r) + "\n" for r in records).encode()
picture = lambda path: train_llava.fit(train_llava.read_picture(path), 4, pad=True)

# name -> (write it into a folder -> the path, what reads it, the file that is damaged)
READERS = {
    "google": (lambda f: write_google(f / "v.npz", VITS["small"]), train_vit.load_vit, "v.npz"),
    "timm": (lambda f: write_timm(f / "v.pth", VITS["small"]), train_vit.load_vit, "v.pth"),
    "vit folder": (lambda f: write_huggingface(f / "v", VITS["small"]), train_vit.load_vit,
                   "v/pytorch_model.bin"),
    "vit config": (lambda f: write_huggingface(f / "v", VITS["small"]), train_vit.load_vit,
                   "v/config.json"),
    "cifar": (lambda f: write_cifar(f / "c"), train_vit.read_images, "c/data_batch_1.bin"),
    "images": (put_images, train_vit.read_images, "a.npz"),
    "meta": (lambda f: write_meta(f / "l", LLAMAS["grouped"], "rows"), train_llama.load_llama,
             "l/consolidated.01.pth"),
    "params": (lambda f: write_meta(f / "l", LLAMAS["grouped"]), train_llama.load_llama,
               "l/params.json"),
    "llama folder": (lambda f: put_huggingface_llama(f / "l", LLAMAS["tied"]),
                     train_llama.load_llama, "l/pytorch_model.bin"),
    "llama config": (lambda f: put_huggingface_llama(f / "l", LLAMAS["llama3"]),
                     train_llama.load_llama, "l/config.json"),
    "llama index": (lambda f: put_huggingface_llama(f / "l", LLAMAS["plain"], 2, index=True),
                    train_llama.load_llama, "l/pytorch_model.bin.index.json"),
    "sentencepiece": (lambda f: put_bytes(f / "t.model", sentencepiece_model(
        [("a", -1.0, 1), ("b", -1.0, 1), ("ab", -2.0, 1)])), train_llama.load_tokenizer, "t.model"),
    "ranks": (lambda f: put_bytes(f / "t.model", rank_file(
        [*(bytes([b]) for b in range(256)), b"ab"])), train_llama.load_tokenizer, "t.model"),
    "jsonl": (lambda f: put_bytes(f / "a.jsonl", lines(INSTRUCTIONS)),
              lambda p: train_llama.read_data(p, 0), "a.jsonl"),
    "boolq": (lambda f: put_bytes(f / "a.jsonl", lines(BOOLQ)),
              lambda p: train_llama.read_data(p, 0), "a.jsonl"),
    "json": (lambda f: put_json(f / "a.json", INSTRUCTIONS),
             lambda p: train_llama.read_data(p, 0), "a.json"),
    "llava": (lambda f: put_llava(f / "x", LLAVAS["plain"]),
              lambda pair: train_llava.load_llava(*pair),
              "x/llava/pytorch_model-00001-of-00002.bin"),
    "llava config": (lambda f: put_llava(f / "x", LLAVAS["plain"]),
                     lambda pair: train_llava.load_llava(*pair), "x/llava/config.json"),
    "clip": (lambda f: put_llava(f / "x", LLAVAS["plain"]),
             lambda pair: train_llava.load_llava(*pair), "x/clip/pytorch_model.bin"),
    "clip config": (lambda f: put_llava(f / "x", LLAVAS["plain"]),
                    lambda pair: train_llava.load_llava(*pair), "x/clip/config.json"),
    "conversations": (put_conversations, lambda p: train_llava.read_data(p, p.parent, 0), "a.json"),
    "vqa questions": (put_vqa, lambda p: train_llava.read_examples([p], p.parent),
                      "train_questions.json"),
    "vqa annotations": (put_vqa, lambda p: train_llava.read_examples([p], p.parent),
                        "train_annotations.json"),
    "ppm": (lambda f: put_picture(f, "a.ppm") is None or f / "a.ppm", picture, "a.ppm"),
    "png": (put_png, picture, "a.png"), "jpeg": (put_jpeg, picture, "a.jpg"),
    "npy": (put_npy, picture, "a.npy"),
    "folders": (put_folders, lambda p: [part.decoded(4) for part in train_vit.read_images(p)[:2]],
                "c/cat/0.png"),
    "piqa": (put_piqa, lambda p: train_llama.read_data(p, 0), "a-labels.lst"),
    "adapter": (put_adapter, lambda p: structlora.StructLoRA.load(chain(), p), "adapter.pt"),
    "checkpoint": (put_checkpoint, lambda p: structlora.load_checkpoint(p, *resumable()), "run.pt")}


def too_long(number, frame):
    raise AssertionError(f"more than {SECONDS} s for one file")


def outcome(read, path, named: Path) -> bool:
    """True if the file was read, False if it was refused as promised."""
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        read(path)
        TRIED["read"] += 1
        return True
    except InputError as error:
        TRIED["refused"] += 1
        text = str(error)
        assert "\n" not in text and len(text) < 1000
        places = [named.name, named.parent.name, *(p.name for p in named.parent.glob("*"))]
        assert any(name in text for name in places), text
        return False
    finally:
        signal.alarm(0)


# --- damage to bytes, of any file


def damaged(data: bytes, seed: int) -> bytes:
    """One of six kinds of damage, at a place that the seed decides."""
    rng, n = random.Random(seed), len(data)
    at, kind = rng.randrange(n), seed % 6
    if kind == 0:
        return data[:at]
    if kind == 1:                                                # some bytes replaced
        changed = bytearray(data)
        for _ in range(rng.choice((1, 8, 64))):
            changed[rng.randrange(n)] = rng.randrange(256)
        return bytes(changed)
    if kind == 2:
        return data[:at] + bytes(min(n - at, 64)) + data[at + 64:]
    if kind == 3:                                                # two parts change places
        return data[at:] + data[:at]
    if kind == 4:                                                # a part is lost, or comes twice
        return data[:at] + data[at + rng.randrange(1, 200):]
    return data[:at] + data[max(0, at - 100):at] + data[at:]


@pytest.mark.parametrize("name", READERS)
def test_damaged_bytes_are_refused_or_read_but_never_break(name, tmp_path):
    write, read, file = READERS[name]
    path, refused = write(tmp_path), 0
    file = tmp_path / file
    whole = file.read_bytes()
    for seed in range(CASES):
        file.write_bytes(damaged(whole, seed))
        refused += not outcome(read, path, file)
    file.write_bytes(whole)
    assert outcome(read, path, file), "the good file still loads"
    assert refused >= CASES / 4, "the damage does something"


# --- damage to the tensors of a file of torch.save


def changed_tensors(state: dict, seed: int) -> dict:
    """One of eight changes to a tensor that the seed decides."""
    rng = random.Random(seed)
    key, other = rng.sample(sorted(k for k in state if torch.is_tensor(state[k])), 2)
    t = state[key]
    changes = ({key: t.new_full(t.shape, (float("nan"), float("inf"))[seed // 8 % 2])},
               {key: t[..., None]}, {key: t[1:]}, {key: (t * 10).to(torch.int8)}, {key: None},
               {key: torch.ones(t.shape, dtype=torch.complex64)}, {key: state[other], other: t},
               {f"{key}.more": t})
    return {k: v for k, v in (state | changes[seed % 8]).items() if v is not None}


TENSORS = ("timm", "vit folder", "meta", "llama folder", "llava", "clip")


def changed_checkpoint(state, rng):
    """`state` with one thing in it, at any depth, lost or replaced by another kind or size."""
    if isinstance(state, (dict, list, tuple)) and len(state) and rng.random() < 0.9:
        keys = list(state) if isinstance(state, dict) else range(len(state))
        key = rng.choice(list(keys))
        if isinstance(state, dict):
            changed = changed_checkpoint(state[key], rng)
            return {k: v for k, v in (state | {key: changed}).items() if v is not ...}
        return [changed_checkpoint(v, rng) if i == key else v for i, v in enumerate(state)]
    values = [None, -1, 2 ** 60, "text", [], {}, torch.ones(2, 3), ...]
    if torch.is_tensor(state) and state.numel():
        values += [state[None], state.flatten()[:1], state.to(torch.complex64),
                   torch.full_like(state, float("nan") if state.is_floating_point() else 99)]
    return rng.choice(values)


@pytest.mark.parametrize("name", ("adapter", "checkpoint"))
def test_a_changed_adapter_or_checkpoint_is_refused_or_trains(name, tmp_path):
    write, read, file = READERS[name]
    path, refused = write(tmp_path), 0
    state = torch.load(path)

    def read_and_use(path):
        loaded = read(path)
        adapters = loaded if name == "adapter" else None
        if adapters:
            adapters.model(torch.randn(2, 6)).square().sum().backward()
    for seed in range(4 * CASES):
        torch.save(changed_checkpoint(state, random.Random(seed)), path)
        refused += not outcome(read_and_use, path, path)
    assert refused >= CASES


def test_a_checkpoint_of_another_configuration_is_refused_by_its_first_difference(tmp_path):
    path = put_checkpoint(tmp_path)
    for config, words in (({"rank": 3}, "rank=2"), ({"gate": "none"}, "gate='gaussian'"),
                          ({"hops": 2}, "hops=1"), ({"layers": 4}, "layers"),
                          ({"coordinator": "none"}, "coordinator='attention'")):
        with pytest.raises(InputError, match=words):
            structlora.load_checkpoint(path, *resumable(**config))
        TRIED["refused"] += 1


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_tensors_are_refused_by_name(name, tmp_path):
    write, read, file = READERS[name]
    path, refused = write(tmp_path), 0
    state = torch.load(tmp_path / file)
    for seed in range(CASES):
        torch.save(changed_tensors(state, seed), tmp_path / file)
        refused += not outcome(read, path, tmp_path / file)
    assert refused >= CASES / 3                  # CLIP's text part, for one, may be anything


@pytest.mark.parametrize("name", (*TENSORS, "adapter", "checkpoint"))
@pytest.mark.parametrize("hostile", (Hostile(), {"model": Hostile()}, [Hostile()], 3, None, {},
                                     Shell(), {"state_dict": {"a": Shell()}}, {Shell(): 1},
                                     {"model": 3}, {"config": {}, "format": "structlora-1"},
                                     {1: torch.ones(1)}, torch.ones(2)))
def test_hostile_and_foreign_pickles_are_refused_and_never_run(name, hostile, tmp_path):
    write, read, file = READERS[name]
    path = write(tmp_path)
    torch.save(hostile, tmp_path / file)
    assert not outcome(read, path, tmp_path / file)


@pytest.mark.parametrize("name", (*TENSORS, "adapter", "checkpoint", "google", "images", "npy"))
def test_hostile_pickles_of_other_kinds_are_never_run(name, tmp_path):
    write, read, file = READERS[name]
    path = write(tmp_path)
    arrays = io.BytesIO()
    np.save(arrays, np.array([Shell()], dtype=object), allow_pickle=True)
    plain = [pickle.dumps(Shell(), protocol) for protocol in (0, 2, 4)]
    old = io.BytesIO()                           # how torch saved before version 1.6
    torch.save({"model": {"a": Shell()}}, old, _use_new_zipfile_serialization=False)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file_:
        for entry in ("x.npy", "y.npy", "cls.npy"):
            file_.writestr(entry, arrays.getvalue())
    for content in (*plain, old.getvalue(), arrays.getvalue(), archive.getvalue()):
        (tmp_path / file).write_bytes(content)
        assert not outcome(read, path, tmp_path / file)


def test_shards_of_different_models_are_refused(tmp_path):
    names = ("plain", "grouped", "one key", "odd")
    for kind, other in [(a, b) for a in names for b in names if a != b]:
        here, there = (tmp_path / f"{kind}, {other}" / name for name in (kind, other))
        here.parent.mkdir()
        file = write_meta(here, LLAMAS[kind], "rows") / "consolidated.01.pth"
        write_meta(there, LLAMAS[other], "rows")
        shutil.copy(there / file.name, file)
        assert not outcome(train_llama.load_llama, here, file), (kind, other)


def test_a_shard_of_another_model_of_the_same_sizes_is_refused(tmp_path):
    file = write_meta(tmp_path / "l", LLAMAS["grouped"], "rows") / "consolidated.01.pth"
    state = torch.load(file)
    for key in [key for key in state if key.endswith("norm.weight")]:
        torch.save(state | {key: state[key] + 0.1}, file)
        assert not outcome(train_llama.load_llama, file.parent, file)


# --- headers that claim more than there is


def npy_header(shape, dtype="|u1"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False,
                                                "shape": shape})
    return file.getvalue()


def claims():
    """(reader, file's content) with sizes out of proportion."""
    huge = 2 ** 60
    for shape in ((huge,), (2 ** 20, 2 ** 20, 2 ** 20, 3), (huge, 1, 1, 3)):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x.npy", npy_header(shape))
            archive.writestr("y.npy", npy_header((huge,), "<i8"))
        yield "images", file.getvalue()
        yield "google", file.getvalue()
    yield "ppm", b"P6 1000000000 1000000000 255\n"
    yield "ppm", b"P6 %d 3 255\n" % huge
    yield "ppm", b"P6 0 0 255\n"
    for field in (b"\x0a", b"\x12"):
        yield "sentencepiece", field + b"\xff" * 8 + b"\x0f"
    yield "ranks", b"IQ== %d\n" % huge
    yield "timm", struct.pack("<Q", huge) + b'{"a": 1}'          # a header of safetensors


@pytest.mark.parametrize("name, content", list(claims()))
def test_claimed_sizes_are_not_believed(name, content, tmp_path):
    write, read, file = READERS[name]
    path = write(tmp_path)
    (tmp_path / file).write_bytes(content)
    assert not outcome(read, path, tmp_path / file)


def test_a_claimed_npy_picture_is_not_believed(tmp_path):
    for shape in ((2 ** 60, 1, 3), (2 ** 20, 2 ** 20, 3), (0, 4, 3), (4, 4, 4)):
        (tmp_path / "a.npy").write_bytes(npy_header(shape))
        assert not outcome(picture, tmp_path / "a.npy", tmp_path / "a.npy")


# --- labels and sizes out of range


@pytest.mark.parametrize("label", (10, 99, 255))
def test_labels_of_cifar_out_of_range_are_refused(label, tmp_path):
    path = write_cifar(tmp_path / "c")
    for file in sorted(path.glob("*.bin")):
        whole = file.read_bytes()
        for row in (0, len(whole) // 3073 - 1):
            file.write_bytes(whole[:3073 * row] + bytes([label]) + whole[3073 * row + 1:])
            assert not outcome(train_vit.read_images, path, file)
        file.write_bytes(whole)


@pytest.mark.parametrize("x, y", [
    ((8, 4, 4, 3), np.full(8, -1)), ((8, 4, 4, 3), np.full(8, 2 ** 60)),
    ((8, 4, 4, 3), np.zeros(8)), ((8, 4, 4, 3), np.zeros(7, int)), ((8, 4, 4, 3), np.zeros((8, 1))),
    ((8, 4, 4, 3), np.full(8, np.nan)), ((8, 4, 4, 3), np.array(["a"] * 8)),
    ((8, 0, 4, 3), np.zeros(8, int)), ((0, 4, 4, 3), np.zeros(0, int)),
    ((8, 4, 4), np.zeros(8, int)), ((8, 4, 4, 4), np.zeros(8, int)), ((), np.zeros((), int))])
def test_arrays_of_wrong_labels_or_sizes_are_refused(x, y, tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(x, np.uint8), y=y)
    assert not outcome(train_vit.read_images, tmp_path / "a.npz", tmp_path / "a.npz")


def test_piqa_labels_out_of_range_are_refused(tmp_path):
    path = put_piqa(tmp_path)
    for labels in (b"0\n1\n2\n0\n", b"0 1 0", b"0 1 0 1 0", b"", b"a b c d", b"-1 0 0 0",
                   b"0.0 1 1 1", b"\xff\xfe0 1 0 1"):
        (tmp_path / "a-labels.lst").write_bytes(labels)
        assert not outcome(lambda p: train_llama.read_data(p, 0), path, tmp_path / "a-labels.lst")


def test_a_sentencepiece_model_of_wrong_types_is_refused_or_read(tmp_path):
    read, path = train_llama.load_tokenizer, tmp_path / "t.model"
    whole = sentencepiece_model([("a", -1.0, 1), ("b", -1.0, 1), ("ab", -2.0, 1)])
    for at in random.Random(0).sample(range(len(whole)), 100):
        for value in (whole[at] ^ 1, whole[at] ^ 2, whole[at] ^ 4, 0x7f):    # also the wire types
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1:])
            outcome(read, path, path)


# --- values of a .json


def changed_value(value, rng):
    """`value` with one thing in it, at any depth, replaced by something of another kind or size."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        copy = dict(value) if isinstance(value, dict) else list(value)
        key = rng.choice(list(copy)) if isinstance(value, dict) else rng.randrange(len(copy))
        if isinstance(value, dict) and rng.random() < 0.2:
            del copy[key]
        else:
            copy[key] = changed_value(copy[key], rng)
        return copy
    return rng.choice((None, -1, 0, 2 ** 60, 1e300, float("nan"), "text", "", [], {}, [1], True,
                       {"a": "b"}, "9" * 50))


@pytest.mark.parametrize("name", [name for name, (_, _, file) in READERS.items()
                                  if file.endswith((".json", ".jsonl"))])
def test_wrong_values_are_refused_or_read_but_never_break(name, tmp_path):
    write, read, file = READERS[name]
    path, refused = write(tmp_path), 0
    file = tmp_path / file
    text = file.read_text()
    for seed in range(3 * CASES):
        rng = random.Random(seed)
        if file.suffix == ".jsonl":
            records = changed_value([json.loads(line) for line in text.splitlines()], rng)
            records = records if isinstance(records, list) else [records]
            file.write_bytes(lines(records))
        else:
            put_json(file, changed_value(json.loads(text), rng))
        refused += not outcome(read, path, file)
    assert refused >= CASES / 4


# --- options


@pytest.mark.parametrize("script", (train_vit, train_llama, train_llava))
@pytest.mark.parametrize("arguments", (
    "--rank 0", "--rank -1", "--rank 1.5", "--rank x", "--alpha 0", "--alpha nan", "--alpha inf",
    "--dropout 1", "--dropout -0.1", "--dropout nan", "--beta -1", "--beta nan", "--budget 0",
    "--budget 2 --no-gate", "--hops 4", "--edges ring", "--gate relu", "--coordinator mlp",
    "--shots 0", "--fraction 0", "--fraction 1.1", "--fraction nan", "--shots 1 --fraction 0.5",
    "--steps 0", "--lr 0", "--lr inf", "--batch-size 0", "--accumulate 0", "--save-every 0",
    "--weight-decay 2", "--weight-decay nan", "--dtype float16", "--device abacus", "--targets ,",
    "--method qlora", "--seed x", "--unknown", "--resume", "--checkpoint absent",
    "--data absent", "--seed 99999999999999999999999", "--budget inf", "--shots x", "--rank",
    "--budget 1 --gate none", "--method lora --budget -1", "--eval-only --resume", "--seed -1",
    "--out", "--hops 1.5", "--targets nothing_of_this_name, --rank 0"))
def test_options_out_of_range_are_one_line_and_status_two(script, arguments, monkeypatch, capsys,
                                                          tmp_path):
    monkeypatch.setattr("sys.argv", ["train.py", *arguments.split(), "--out", "out"])
    try:
        status = structlora.run(script.main)
    except SystemExit as end:                                    # argparse
        status = end.code
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "out").exists()
    TRIED["options"] += 1


# --- the command line, and the count


def test_a_handful_goes_through_the_command_line(tmp_path):
    torch.save({"model": Shell()}, tmp_path / "shell.pth")
    broken = put_bytes(tmp_path / "broken.jsonl", b'{"instruction": 1\n')
    huge = put_bytes(tmp_path / "huge.npz", next(claims())[1])
    calls = (("vit", "shell.pth", "--checkpoint", tmp_path / "shell.pth", "--data",
              put_images(tmp_path)), ("vit", "huge.npz", "--data", huge),
             ("llama", "broken.jsonl:1", "--data", broken), ("llava", "--rank", "--rank", "0"))
    running = [(word, subprocess.Popen(
        list(map(str, (sys.executable, ROOT / f"train_{script}.py", *arguments, "--out", "out"))),
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        for script, word, *arguments in calls]
    for word, process in running:
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 2 and error.count("\n") == 1 and word in error, error
        TRIED["command line"] += 1
    assert not (tmp_path / "out").exists()


def test_how_many_inputs_there_were(request, capsys):
    if sum(item.path == request.path for item in request.session.items) < 300:
        pytest.skip("only a part of this file ran")
    with capsys.disabled():
        print(f"\nbad input: {TRIED.total()} inputs, all as promised "
              f"({', '.join(f'{n} {what}' for what, n in TRIED.items())})")
    assert TRIED.total() >= 300
