"""Generated bad input for every reader of the three scripts.

Each case damages a good file, at random but seeded: cuts, flipped and zeroed bytes, swapped parts,
tensors of wrong type, shape or number, hostile pickles, headers that claim 2**60 elements, broken
records. A reader may raise InputError, in one line that names a file, or read what is still a good
file; anything else fails here. No reader writes, so nothing can be left half-written.
"""

import io
import json
import random
import resource
import struct
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

CASES = 24                   # seeded damages for each of the files below
MEMORY = 4 * 2 ** 30         # more than any of these files can need, torch's own included


class Hostile:
    def __reduce__(self):
        return open, ("executed", "w")


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
    "adapter": (put_adapter, lambda p: structlora.StructLoRA.load(chain(), p), "adapter.pt")}


def outcome(read, path, named: Path) -> bool:
    """True if the file was read, False if it was refused as promised."""
    try:
        read(path)
        return True
    except InputError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 1000
        places = [named.name, named.parent.name, *(p.name for p in named.parent.glob("*"))]
        assert any(name in text for name in places), text
        return False


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


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_tensors_are_refused_by_name(name, tmp_path):
    write, read, file = READERS[name]
    path, refused = write(tmp_path), 0
    state = torch.load(tmp_path / file)
    for seed in range(CASES):
        torch.save(changed_tensors(state, seed), tmp_path / file)
        refused += not outcome(read, path, tmp_path / file)
    assert refused >= CASES / 3                  # CLIP's text part, for one, may be anything


@pytest.mark.parametrize("name", (*TENSORS, "adapter"))
@pytest.mark.parametrize("hostile", (Hostile(), {"model": Hostile()}, [Hostile()], 3, None, {},
                                     {"model": 3}, {"config": {}, "format": "structlora-1"},
                                     {1: torch.ones(1)}, torch.ones(2)))
def test_hostile_and_foreign_pickles_are_refused_and_never_run(name, hostile, tmp_path):
    write, read, file = READERS[name]
    path = write(tmp_path)
    torch.save(hostile, tmp_path / file)
    assert not outcome(read, path, tmp_path / file)


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
    "--data absent", "--seed 99999999999999999999999"))
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
