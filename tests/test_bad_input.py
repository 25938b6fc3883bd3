"""Generated bad input for every reader of the project.

Each case damages a good file, at random but seeded: cuts, replaced and zeroed bytes, swapped and lost
parts, tensors of wrong type, shape or number, hostile pickles, headers that claim 2**60 elements,
values of another kind in a .json. A reader may raise ValueError, in one line that names a file, or
read what is still a good file; anything else fails here, and so does a file that takes longer than
SECONDS. No reader writes, so nothing can be left half-written."""

import io
import json
import pickle
import random
import resource
import shutil
import signal
import struct
import zipfile

import numpy as np
import pytest
import torch

import structlora
import test_llama
import test_llava
import test_tokenizer
import test_vit
import train_llama
import train_llava
import train_vit
from helpers import Hostile, chain
from structlora import Config, attach

SECONDS = 30                 # nobody waits longer for a file of this size
CASES = 24                   # seeded damages for each of the files below
MEMORY = 4 * 2**30           # more than any of these files can need, torch's own included


@pytest.fixture(autouse=True)
def bounded(tmp_path, monkeypatch):
    """A working folder to catch what is executed, and a limit that a claimed 2**60 would hit."""
    monkeypatch.chdir(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)
    assert not (tmp_path / "executed").exists()


def put(path, data):
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return path


def put_adapter(folder):
    model = chain()
    attach(model, Config(rank=2)).save(folder / "adapter.pt")
    return folder / "adapter.pt"


def put_images(folder):
    np.savez(folder / "a.npz", x=np.zeros((8, 4, 4, 3), np.uint8), y=np.arange(8) % 2)
    return folder / "a.npz"


def put_picture(folder):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)).save(folder / "a.png")
    return folder / "a.png"


def put_conversations(folder):
    test_llava.put(folder, "a.png", "b.png")
    return put(folder / "a.json", [test_llava.chat(name, "<image>a", "b") for name in ("a.png", "b.png")])


def put_vqa(folder):
    put(folder / "train_annotations.json", {"annotations": [
        {"question_id": 3, "multiple_choice_answer": "cat", "answers": [{"answer": "cat"}]}]})
    return put(folder / "train_questions.json", {"questions": [
        {"question_id": 3, "image_id": 5, "question": "What?"}], "data_subtype": "train2014"})


def put_piqa(folder):
    put(folder / "a-labels.lst", b"0\n1\n0\n1\n")
    return put(folder / "a.jsonl", lines([{"goal": "a", "sol1": str(n), "sol2": "c"} for n in range(4)]))


def lines(records):
    return "".join(json.dumps(r) + "\n" for r in records).encode()


def read_texts(path):
    train_llama.read_data(path, 0)


def read_pictures(path):
    train_llava.read_data(path)


def load_llava(pair):
    train_llava.load_llava(*pair, torch.float32)


def read_vqa(path):
    train_llava.read_examples(sorted(path.parent.glob("*.json")))


INSTRUCTIONS = [{"instruction": "a", "input": "b", "output": str(n)} for n in range(4)]
BOOLQ = [{"question": "a", "passage": "b", "answer": True}] * 3
SENTENCEPIECE = test_tokenizer.sentencepiece_model([("a", -1.0, 1), ("b", -1.0, 1), ("ab", -2.0, 1)])
RANKS = test_tokenizer.rank_file([*(bytes([b]) for b in range(256)), b"ab"])
VITS, LLAMAS = test_vit.SIZES, test_llama.SIZES
# name -> (write it into a folder -> the path, what reads it, the file that is damaged)
READERS = {
    "google": (lambda f: test_vit.write("google", f, VITS["small"]), train_vit.load_vit, "vit.npz"),
    "timm": (lambda f: test_vit.write("timm", f, VITS["small"]), train_vit.load_vit, "vit.pth"),
    "vit folder": (lambda f: test_vit.write("huggingface", f, VITS["small"]), train_vit.load_vit,
                   "vit/pytorch_model.bin"),
    "vit config": (lambda f: test_vit.write("huggingface", f, VITS["small"]), train_vit.load_vit,
                   "vit/config.json"),
    "cifar": (lambda f: test_vit.write_cifar(f / "c"), train_vit.read_images, "c/data_batch_1.bin"),
    "images": (put_images, train_vit.read_images, "a.npz"),
    "picture": (put_picture, train_vit.read_picture, "a.png"),
    "meta": (lambda f: test_llama.write_meta(f / "l", LLAMAS["grouped"], "rows"),
             train_llama.load_llama, "l/consolidated.01.pth"),
    "params": (lambda f: test_llama.write_meta(f / "l", LLAMAS["grouped"]), train_llama.load_llama,
               "l/params.json"),
    "llama folder": (lambda f: test_llama.write_huggingface(f / "l", LLAMAS["tied"]),
                     train_llama.load_llama, "l/pytorch_model.bin"),
    "llama config": (lambda f: test_llama.write_huggingface(f / "l", LLAMAS["llama3"]),
                     train_llama.load_llama, "l/config.json"),
    "sentencepiece": (lambda f: put(f / "t.model", SENTENCEPIECE), train_llama.load_tokenizer, "t.model"),
    "ranks": (lambda f: put(f / "t.model", RANKS), train_llama.load_tokenizer, "t.model"),
    "jsonl": (lambda f: put(f / "a.jsonl", lines(INSTRUCTIONS)), read_texts, "a.jsonl"),
    "boolq": (lambda f: put(f / "a.ndjson", lines(BOOLQ)), read_texts, "a.ndjson"),
    "json": (lambda f: put(f / "a.json", INSTRUCTIONS), read_texts, "a.json"),
    "piqa": (put_piqa, read_texts, "a-labels.lst"),
    "llava": (lambda f: test_llava.write(f / "x"), load_llava,
              "x/llava/pytorch_model-00001-of-00002.bin"),
    "llava config": (lambda f: test_llava.write(f / "x"), load_llava,
                     "x/llava/config.json"),
    "clip": (lambda f: test_llava.write(f / "x"), load_llava, "x/clip/pytorch_model.bin"),
    "clip config": (lambda f: test_llava.write(f / "x"), load_llava,
                    "x/clip/config.json"),
    "conversations": (put_conversations, read_pictures, "a.json"),
    "vqa questions": (put_vqa, read_vqa, "train_questions.json"),
    "vqa annotations": (put_vqa, read_vqa, "train_annotations.json"),
    "adapter": (put_adapter, lambda p: structlora.StructLoRA.load(chain(), p), "adapter.pt")}
TENSORS = ("timm", "vit folder", "meta", "llama folder", "llava", "clip")


def too_long(number, frame):
    raise AssertionError(f"more than {SECONDS} s for one file")


def is_read(read, path, named):
    """True if the file was read, False if it was refused as promised."""
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        read(path)
        return True
    except ValueError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 1000
        places = [named.name, named.parent.name, *(p.name for p in named.parent.glob("*"))]
        assert any(name in text for name in places), text
        return False
    finally:
        signal.alarm(0)


def damaged(data, seed):
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
        refused += not is_read(read, path, file)
    file.write_bytes(whole)
    assert is_read(read, path, file), "the good file still loads"
    assert refused >= CASES / 4, "the damage does something"


def changed_tensors(state, seed):
    """One of eight changes to a tensor that the seed decides."""
    rng = random.Random(seed)
    key, other = rng.sample(sorted(k for k in state if torch.is_tensor(state[k])), 2)
    t = state[key]
    changes = ({key: t.new_full(t.shape, (float("nan"), float("inf"))[seed // 8 % 2])},
               {key: t[..., None]}, {key: t[1:]}, {key: (t * 10).to(torch.int8)}, {key: None},
               {key: torch.ones(t.shape, dtype=torch.complex64)}, {key: state[other], other: t},
               {f"{key}.more": t})
    return {k: v for k, v in (state | changes[seed % 8]).items() if v is not None}


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_tensors_are_refused_by_name(name, tmp_path):
    write, read, file = READERS[name]
    path, refused = write(tmp_path), 0
    state = torch.load(tmp_path / file)
    for seed in range(CASES):
        torch.save(changed_tensors(state, seed), tmp_path / file)
        refused += not is_read(read, path, tmp_path / file)
    assert refused >= CASES / 3                  # CLIP's text part, for one, may be anything


def changed_value(value, rng):
    """`value` with one thing in it, at any depth, lost or replaced by another kind or size."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        copy = dict(value) if isinstance(value, dict) else list(value)
        key = rng.choice(list(copy)) if isinstance(value, dict) else rng.randrange(len(copy))
        if isinstance(value, dict) and rng.random() < 0.2:
            del copy[key]
        else:
            copy[key] = changed_value(copy[key], rng)
        return copy
    if torch.is_tensor(value):
        return rng.choice((value[None], value.flatten()[:1], torch.full_like(value, float("nan"))
                           if value.is_floating_point() else None, value.to(torch.complex64)))
    return rng.choice((None, -1, 0, 2**60, 1e300, float("nan"), "text", "", [], {}, [1], True,
                       {"a": "b"}, "9" * 50))


@pytest.mark.parametrize("name", [name for name, (_, _, file) in READERS.items()
                                  if file.endswith(("json", "jsonl"))])
def test_wrong_values_are_refused_or_read_but_never_break(name, tmp_path):
    write, read, file = READERS[name]
    path, refused = write(tmp_path), 0
    file = tmp_path / file
    text = file.read_text()
    for seed in range(3 * CASES):
        rng = random.Random(seed)
        if file.suffix == ".json":
            put(file, changed_value(json.loads(text), rng))
        else:
            records = changed_value([json.loads(line) for line in text.splitlines()], rng)
            file.write_bytes(lines(records if isinstance(records, list) else [records]))
        refused += not is_read(read, path, file)
    assert refused >= CASES / 4


def test_a_changed_adapter_is_refused_or_trains(tmp_path):
    path, refused = put_adapter(tmp_path), 0
    state = torch.load(path)

    def read_and_use(path):
        structlora.StructLoRA.load(chain(), path).model(torch.randn(2, 6)).square().sum().backward()
    for seed in range(4 * CASES):
        torch.save(changed_value(state, random.Random(seed)), path)
        refused += not is_read(read_and_use, path, path)
    assert refused >= CASES


@pytest.mark.parametrize("name", (*TENSORS, "adapter"))
@pytest.mark.parametrize("content", (Hostile(), {"model": Hostile()}, [Hostile()], 3, None, {},
                                     {"state_dict": {"a": Hostile()}}, {Hostile(): 1}, {"model": 3},
                                     {"config": {}, "format": structlora.FORMAT},
                                     {1: torch.ones(1)}, torch.ones(2)))
def test_hostile_and_foreign_pickles_are_refused_and_never_run(name, content, tmp_path):
    write, read, file = READERS[name]
    path = write(tmp_path)
    torch.save(content, tmp_path / file)
    assert not is_read(read, path, tmp_path / file)


@pytest.mark.parametrize("name", (*TENSORS, "adapter", "google", "images"))
def test_hostile_pickles_of_other_kinds_are_never_run(name, tmp_path):
    write, read, file = READERS[name]
    path = write(tmp_path)
    arrays, old, archive = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(arrays, np.array([Hostile()], dtype=object), allow_pickle=True)
    torch.save({"model": {"a": Hostile()}}, old, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(archive, "w") as parts:
        for entry in ("x.npy", "y.npy", "cls.npy"):
            parts.writestr(entry, arrays.getvalue())
    plain = [pickle.dumps(Hostile(), protocol) for protocol in (0, 2, 4)]
    for content in (*plain, old.getvalue(), arrays.getvalue(), archive.getvalue()):
        (tmp_path / file).write_bytes(content)
        assert not is_read(read, path, tmp_path / file)


def test_shards_of_different_models_are_refused(tmp_path):
    names = [name for name in ("plain", "grouped", "one key", "odd") if name in LLAMAS]
    for kind, other in [(a, b) for a in names for b in names if a != b]:
        here, there = (tmp_path / f"{kind}, {other}" / name for name in (kind, other))
        here.parent.mkdir()
        file = test_llama.write_meta(here, LLAMAS[kind], "rows") / "consolidated.01.pth"
        test_llama.write_meta(there, LLAMAS[other], "rows")
        shutil.copy(there / file.name, file)
        assert not is_read(train_llama.load_llama, here, file), (kind, other)


def claims():
    """(reader, file's content) with sizes out of proportion."""
    huge = 2**60
    for shape in ((huge,), (2**20, 2**20, 2**20, 3), (huge, 1, 1, 3)):
        file, header = io.BytesIO(), io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False,
                                                      "shape": shape})
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x.npy", header.getvalue())
            archive.writestr("y.npy", header.getvalue())
        yield "images", file.getvalue()
        yield "google", file.getvalue()
    for field in (b"\x0a", b"\x12"):
        yield "sentencepiece", field + b"\xff" * 8 + b"\x0f"
    yield "ranks", b"IQ== %d\n" % huge
    yield "timm", struct.pack("<Q", huge) + b'{"a": 1}'          # a header of safetensors


@pytest.mark.parametrize("name, content", list(claims()))
def test_claimed_sizes_are_not_believed(name, content, tmp_path):
    write, read, file = READERS[name]
    path = write(tmp_path)
    (tmp_path / file).write_bytes(content)
    assert not is_read(read, path, tmp_path / file)
