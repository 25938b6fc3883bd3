"""Generated bad input for every reader of the project.

Each case damages a good file, at random but seeded: cuts, replaced and zeroed bytes, swapped and
lost parts, tensors and values of another type, shape or number, hostile pickles, headers that claim
2**60 elements. A reader may raise ValueError, in one line that names a file, or read what is still
a good file; anything else fails here, and so does a file that takes longer than SECONDS. No reader
writes, so nothing can be left half-written."""

import io
import json
import math
import pickle
import random
import re
import resource
import signal
import struct
import zipfile
from functools import partial

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

SECONDS = 10                 # nobody waits longer for a file of this size
CASES = 24                   # seeded damages for each of the files below
MEMORY = 4 * 2**30           # more than any of these files can need, torch's own included
HUGE = 2**60


@pytest.fixture(autouse=True)
def bounded(tmp_path, monkeypatch):
    """A working folder to catch what is executed, and a limit that a claimed 2**60 would hit."""
    monkeypatch.chdir(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)
    assert not (tmp_path / "executed").exists()


# --- the readers, and a good file for each

def put(path, data):
    """Writes bytes, or another value as JSON."""
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return path


def put_adapter(folder):
    attach(chain(), Config(rank=2)).save(folder / "adapter.pt")
    return folder / "adapter.pt"


def put_vit(folder):
    model = train_vit.load_vit(test_vit.write("huggingface", folder, VIT), names=[*"abcde"])
    train_vit.save_vit(model, folder / "merged.pt")
    return folder / "merged.pt"


def put_shard(folder):
    """A Hugging Face folder of one shard and its index."""
    path, shard = test_vit.write("huggingface", folder, VIT), "pytorch_model-00001-of-00001.bin"
    names = torch.load(path / "pytorch_model.bin").keys()
    (path / "pytorch_model.bin").rename(path / shard)
    put(path / "pytorch_model.bin.index.json", {"weight_map": dict.fromkeys(names, shard)})
    return path


def put_images(folder):
    np.savez(folder / "a.npz", x=np.zeros((8, 4, 4, 3), np.uint8), y=np.arange(8) % 2)
    return folder / "a.npz"


def put_picture(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    pytest.importorskip("PIL.Image").fromarray(pixels).save(folder / "a.png")
    return folder / "a.png"


def put_conversations(folder):
    chats = [test_llava.chat(name, "<image>a", "b") for name in ("a.png", "b.png")]
    return test_llava.put(folder, "a.png", "b.png", a=chats) / "a.json"


def put_vqa(folder):
    put(folder / "train_annotations.json", {"annotations": [
        {"question_id": 3, "multiple_choice_answer": "cat", "answers": [{"answer": "cat"}]}]})
    return put(folder / "train_questions.json", {"questions": [
        {"question_id": 3, "image_id": 5, "question": "What?"}], "data_subtype": "train2014"})


def load_llava(folders):
    train_llava.load_llava(*folders, torch.float32)


def read_texts(path):
    train_llama.read_data(path, 0)


def read_vqa(path):
    train_llava.read_examples(sorted(path.parent.glob("*.json")))


def load_and_train(path):
    structlora.StructLoRA.load(chain(), path).model(torch.randn(2, 6)).square().sum().backward()


VIT, LLAMAS = test_vit.SIZES["small"], test_llama.SIZES
INSTRUCTIONS = [{"instruction": "a", "input": "b", "output": str(n)} for n in range(4)]
LINES = "\n".join(map(json.dumps, INSTRUCTIONS)).encode()
PIECES = test_tokenizer.sentencepiece_model([("a", -1.0, 1), ("b", -1.0, 1), ("ab", -2.0, 1)])
RANKS = test_tokenizer.rank_file([*(bytes([b]) for b in range(256)), b"ab"])
LLAMA = partial(test_llama.write_huggingface, config=LLAMAS["tied"])
META = partial(test_llama.write_meta, config=LLAMAS["grouped"], cut="rows")
HUB, LLAVA = partial(test_vit.write, "huggingface", config=VIT), test_llava.write
LOAD_VIT, LOAD_LLAMA = train_vit.load_vit, train_llama.load_llama
# name -> (write it into a folder -> the path, what reads it, the file that is damaged)
READERS = {
    "google": (partial(test_vit.write, "google", config=VIT), LOAD_VIT, "vit.npz"),
    "timm": (partial(test_vit.write, "timm", config=VIT), LOAD_VIT, "vit.pth"),
    "vit folder": (HUB, LOAD_VIT, "vit/pytorch_model.bin"),
    "vit config": (HUB, LOAD_VIT, "vit/config.json"),
    "processor": (HUB, LOAD_VIT, "vit/preprocessor_config.json"),
    "torchvision": (partial(test_vit.write, "torchvision", config=VIT), LOAD_VIT, "vit.pth"),
    "timm's hub": (partial(test_vit.write, "timm's hub", config=VIT), LOAD_VIT, "vit/config.json"),
    "saved vit": (put_vit, LOAD_VIT, "merged.pt"),
    "index": (put_shard, LOAD_VIT, "vit/pytorch_model.bin.index.json"),
    "cifar": (lambda f: test_vit.write_cifar(f / "c"), train_vit.read_images, "c/data_batch_1.bin"),
    "images": (put_images, train_vit.read_images, "a.npz"),
    "picture": (put_picture, train_vit.read_picture, "a.png"),
    "meta": (META, LOAD_LLAMA, "consolidated.01.pth"),
    "params": (META, LOAD_LLAMA, "params.json"),
    "llama folder": (LLAMA, LOAD_LLAMA, "pytorch_model.bin"),
    "llama config": (LLAMA, LOAD_LLAMA, "config.json"),
    "sentencepiece": (lambda f: put(f / "t.model", PIECES), train_llama.load_tokenizer, "t.model"),
    "ranks": (lambda f: put(f / "t.model", RANKS), train_llama.load_tokenizer, "t.model"),
    "jsonl": (lambda f: put(f / "a.jsonl", LINES), read_texts, "a.jsonl"),
    "json": (lambda f: put(f / "a.json", INSTRUCTIONS), read_texts, "a.json"),
    "llava": (LLAVA, load_llava, "llava/pytorch_model-00001-of-00002.bin"),
    "llava config": (LLAVA, load_llava, "llava/config.json"),
    "clip": (LLAVA, load_llava, "clip/pytorch_model.bin"),
    "clip config": (LLAVA, load_llava, "clip/config.json"),
    "clip processor": (LLAVA, load_llava, "clip/preprocessor_config.json"),
    "conversations": (put_conversations, train_llava.read_data, "a.json"),
    "vqa questions": (put_vqa, read_vqa, "train_questions.json"),
    "vqa annotations": (put_vqa, read_vqa, "train_annotations.json"),
    "adapter": (put_adapter, load_and_train, "adapter.pt")}
TENSORS = ("timm", "vit folder", "torchvision", "saved vit", "meta", "llama folder", "llava",
           "clip", "adapter")
VALUES = [name for name, (_, _, file) in READERS.items() if file.endswith(".json")]


def too_long(number, frame):
    pytest.fail(f"more than {SECONDS} s for one file")           # no Exception: nothing catches it


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
        places = [named.parent, *named.parent.glob("*")]
        assert any(place.name in text for place in places), text
        return False
    finally:
        signal.alarm(0)


# --- damages

def damaged(data, seed):
    """One of five kinds of damage to the bytes, at a place that the seed decides."""
    rng, n = random.Random(seed), len(data)
    at, some = rng.randrange(n), bytearray(data)
    for _ in range(rng.choice((1, 8, 64))):
        some[rng.randrange(n)] = rng.randrange(256)
    zeroed = data[:at] + bytes(min(n - at, 64)) + data[at + 64:]
    lost_or_twice = data[:at] + data[max(0, at + rng.randrange(-100, 200)):]
    return (data[:at], bytes(some), zeroed, data[at:] + data[:at], lost_or_twice)[seed % 5]


@pytest.mark.parametrize("name", READERS)
def test_damaged_bytes_are_refused_or_read_but_never_break(name, tmp_path):
    write, read, file = READERS[name]
    path, refused, file = write(tmp_path), 0, tmp_path / file
    whole = file.read_bytes()
    for seed in range(CASES):
        file.write_bytes(damaged(whole, seed))
        refused += not is_read(read, path, file)
    file.write_bytes(whole)
    assert is_read(read, path, file), "the good file still loads"
    assert refused >= CASES / 4, "the damage does something"


def changed(value, rng):
    """`value` with one thing in it, at any depth, lost, too much or of another kind or size."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key, fate = rng.choice(list(value)), rng.random()
        if fate < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if fate < 0.3:
            return value | {f"{key}.more": value[key]}
        return value | {key: changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        return value[:place] + [changed(value[place], rng)] + value[place + 1:]
    if torch.is_tensor(value) and rng.random() < 0.9:
        kind = rng.choice((torch.int8, torch.complex64, torch.float64))
        return rng.choice((value[None], value.flatten()[1:], value.to(kind), value * math.nan,
                           value + math.inf))
    return rng.choice((None, -1, 0, HUGE, 1e300, math.nan, "text", "", [], {}, [1], True,
                       {"a": "b"}, "9" * 50))


@pytest.mark.parametrize("name", (*VALUES, *TENSORS))
def test_wrong_values_are_refused_or_read_but_never_break(name, tmp_path):
    write, read, file = READERS[name]
    path, refused, file = write(tmp_path), 0, tmp_path / file
    good = torch.load(file) if name in TENSORS else json.loads(file.read_text())
    for seed in range(3 * CASES):
        wrong = changed(good, random.Random(seed))
        file.write_bytes(saved(wrong) if name in TENSORS else json.dumps(wrong).encode())
        refused += not is_read(read, path, file)
    assert refused >= CASES / 4                  # CLIP's text part, for one, may be anything


# --- hostile files

def saved(content, **how):
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def archive(array):
    """An .npz, the bytes of all its arrays being these."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as parts:
        for entry in ("x.npy", "y.npy", "cls.npy"):
            parts.writestr(entry, array)
    return file.getvalue()


def hostile_files():
    """Pickles of all kinds that run a command in a careless reader, files of something else, and
    sizes out of proportion."""
    for content in (Hostile(), {"model": Hostile()}, [Hostile()], {"state_dict": {"a": Hostile()}},
                    {Hostile(): 1}, 3, None, {}, {"model": 3}, {1: torch.ones(1)}, torch.ones(2),
                    {"config": {}, "format": structlora.FORMAT}):
        yield saved(content)
    yield saved({"model": {"a": Hostile()}}, _use_new_zipfile_serialization=False)
    for protocol in (0, 2, 4):
        yield pickle.dumps(Hostile(), protocol)
    array = io.BytesIO()
    np.save(array, np.array([Hostile()], dtype=object), allow_pickle=True)
    yield array.getvalue()
    yield archive(array.getvalue())
    for shape in ((HUGE,), (2**20, 2**20, 2**20, 3), (HUGE, 1, 1, 3)):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False,
                                                      "shape": shape})
        yield archive(header.getvalue())
    for field in (b"\x0a", b"\x12"):
        yield field + b"\xff" * 8 + b"\x0f"                      # SentencePiece's lengths
    yield b"IQ== %d\n" % HUGE                                    # the rank of a token
    yield struct.pack("<Q", HUGE) + b'{"a": 1}'                  # a header of safetensors


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", (*TENSORS, "google", "images", "sentencepiece", "ranks"))
def test_hostile_foreign_and_boundless_files_are_refused_and_never_run(name, tmp_path):
    write, read, file = READERS[name]
    path = write(tmp_path)
    for content in hostile_files():
        (tmp_path / file).write_bytes(content)
        assert not is_read(read, path, tmp_path / file), content


@pytest.mark.parametrize("name", ("params", "llama config", "llava config", "clip config"))
def test_claimed_layers_are_not_built(name, tmp_path):
    write, read, file = READERS[name]
    path, file = write(tmp_path), tmp_path / file
    file.write_text(re.sub(r'layers": \d+', f'layers": {HUGE}', file.read_text()))
    assert not is_read(read, path, file)
