"""train_llama.py: the data, the scores and the command line, on texts of a few bytes."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import structlora
import train_llama
from helpers import chain  # noqa: F401: one thread, as the models are tiny
from structlora import InputError
from test_tokenizer import sentencepiece_model
from train_llama import (ALPACA, Bytes, Example, Llama, LlamaConfig, Row, answer_losses, collate,
                         encode_rows, evaluate_rows, make_task, read_data, read_examples)

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared/data"
QUICK = ("--pretrain-steps", "3", "--steps", "6", "--batch-size", "4", "--device", "cpu")
TINY = LlamaConfig(258, 16, 1, 2, 1, 8, 24)
BOOLQ = {"question": "is ice cold", "passage": "Ice is frozen.", "title": "Ice", "answer": True}
PIQA = {"goal": "Open a jar", "sol1": "Twist it.", "sol2": "Eat it."}


def tiny(seed=0):
    torch.manual_seed(seed)
    return Llama(TINY).initialise().eval()


def options(**changes):
    return argparse.Namespace(**dict(max_length=64, batch_size=3, device="cpu", seed=0) | changes)


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# --- reading


def test_boolq_is_put_as_the_harness_puts_it(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", BOOLQ, BOOLQ | {"answer": False})
    first, second = read_examples(path)
    assert first == ("Ice is frozen.\nQuestion: is ice cold?\nAnswer:", [" no", " yes"], 1)
    assert second.answer == 0


def test_piqa_takes_its_labels_from_the_file_beside_it_or_from_the_record(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", PIQA, PIQA)
    (tmp_path / "train-labels.lst").write_text("1\n0\n")
    first, second = read_examples(path)
    assert first == ("Question: Open a jar\nAnswer:", [" Twist it.", " Eat it."], 1)
    assert second.answer == 0
    (tmp_path / "train-labels.lst").write_text("1\n")
    with pytest.raises(InputError, match="labels.lst: 1 labels for 2"):
        read_examples(path)
    (tmp_path / "train-labels.lst").unlink()
    with pytest.raises(InputError, match="train.jsonl:1: .*label"):
        read_examples(path)
    path = write_lines(path, PIQA | {"label": 1})
    assert read_examples(path)[0].answer == 1


def test_instructions_are_put_as_alpaca_puts_them(tmp_path):
    records = [{"instruction": "Add {these}.", "input": "1 2", "output": "3"},
               {"instruction": "Say hi.", "input": "", "output": "hi"},
               {"instruction": "A or B?", "output": "B", "choices": ["A", "B"], "answer": "B"}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    first, second, third = read_examples(tmp_path / "a.json")
    end = "### Instruction:\nAdd {these}.\n\n### Input:\n1 2\n\n### Response:\n"
    assert first.prompt.endswith(end)
    assert first.prompt.startswith("Below is an instruction that describes a task, paired with")
    assert second == (ALPACA[0].format(instruction="Say hi."), ["hi"], 0)
    assert third.choices == ["A", "B"] and third.answer == 1
    write_lines(tmp_path / "a.jsonl", *records)
    assert read_examples(tmp_path / "a.jsonl") == [first, second, third]


def test_few_different_outputs_become_choices_for_all(tmp_path):
    records = [{"instruction": str(i), "output": "yes" if i % 3 else "no"} for i in range(40)]
    train, test = read_data(write_lines(tmp_path / "a.jsonl", *records), seed=0)
    assert (len(train), len(test)) == (36, 4)
    assert all(e.choices == ["no", "yes"] for e in train + test)
    by_prompt = {ALPACA[0].format(**r): r["output"] for r in records}
    assert all(e.choices[e.answer] == by_prompt[e.prompt] for e in train + test)
    assert len({e.prompt for e in train + test}) == 40           # nothing twice, nothing lost
    records = [{"instruction": str(i), "output": str(i)} for i in range(40)]
    train, _ = read_data(write_lines(tmp_path / "a.jsonl", *records), seed=0)
    assert all(len(e.choices) == 1 for e in train)


def test_a_folder_of_train_and_dev_is_read(tmp_path):
    write_lines(tmp_path / "train.jsonl", BOOLQ, BOOLQ)
    with pytest.raises(InputError, match="needs train and test"):
        read_data(tmp_path, 0)
    write_lines(tmp_path / "dev.jsonl", BOOLQ)
    train, test = read_data(tmp_path, 0)
    assert (len(train), len(test)) == (2, 1)


def test_text_is_cut_into_parts_that_lose_nothing(tmp_path):
    text = "".join(f"line {i} {'x' * (i % 90)}\n" for i in range(400)) + "y" * 9000
    (tmp_path / "a.txt").write_text(text)
    examples = read_examples(tmp_path / "a.txt")
    assert "".join(e.choices[0] for e in examples) == text and len(examples) > 5
    assert all(not e.prompt and 0 < len(e.choices[0]) <= 4001 for e in examples)


BAD_LINES = {"not JSON": ("{", "2: not JSON"), "a list": ("[1]", "2: expected"),
             "no output": ('{"instruction": "a"}', "2: expected"),
             "numbers": ('{"instruction": 1, "output": 2}', "2: expected"),
             "a word as answer":
             ('{"question": "a", "passage": "b", "answer": "yes"}', "2: expected"),
             "deep": ("[" * 100_000, "2: not JSON"), "infinite label":
             ('{"goal": "a", "sol1": "b", "sol2": "c", "label": 1e999}', "2: label inf"),
             "a number as choice":
             ('{"instruction": "a", "output": "b", "choices": ["b", 3]}', "2: choices"),
             "output not a choice":
             ('{"instruction": "a", "output": "b", "choices": ["c"]}', "2: the output")}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_broken_line_is_named_by_file_and_number(case, tmp_path):
    line, words = BAD_LINES[case]
    (tmp_path / "a.jsonl").write_text(json.dumps(BOOLQ) + "\n" + line + "\n" + json.dumps(BOOLQ))
    with pytest.raises(InputError) as error:
        read_examples(tmp_path / "a.jsonl")
    assert f"a.jsonl:{words}" in str(error.value) and "\n" not in str(error.value)


def test_other_bad_data_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="absent.json"):
        read_data(tmp_path / "absent.json", 0)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(InputError, match="a.txt.*UTF-8"):
        read_data(tmp_path / "a.txt", 0)
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(InputError, match="b.json.*too few"):
        read_data(tmp_path / "b.json", 0)


def test_shots_count_per_answer_only_where_the_choices_are_shared():
    shared = [Example(str(i), ["no", "yes"], int(i % 4 == 0)) for i in range(40)]
    chosen = train_llama.choose(shared, 5, None, seed=0)
    assert sorted(e.answer for e in chosen) == [0] * 5 + [1] * 5
    own = [Example(str(i), [str(i), "no"], i % 2) for i in range(40)]
    assert len(train_llama.choose(own, 5, None, seed=0)) == 5
    assert len(train_llama.choose(shared, None, 0.5, seed=0)) == 20
    assert train_llama.choose(shared, None, None, seed=0) == shared


# --- rows


def test_a_row_is_prompt_answer_and_end_and_truncation_keeps_the_answer():
    row, = encode_rows(Bytes(), "ab", "cd", 10, True)
    assert row == ([256, 97, 98, 99, 100, 257], 3)
    row, = encode_rows(Bytes(), "abcdefgh", "XY", 6, True)
    assert row.tokens == [256, *b"gh", *b"XY", 257] and row.start == 3           # bos, then the end
    row, = encode_rows(Bytes(), "abc", "0123456789", 5, False)
    assert row.start >= 1 and row.tokens[row.start:] == [*b"0123"] and len(row.tokens) <= 5


def test_a_text_without_a_prompt_becomes_as_many_rows_as_it_takes():
    rows = encode_rows(Bytes(), "", "abcdefghij", 4, True)
    assert [row.tokens for row in rows] == [[256, *b"abc"], [*b"cdef"], [*b"fghi"], [*b"ij", 257]]
    assert {row.start for row in rows} == {1}
    for length in range(2, 14):                                  # each token is predicted once
        rows = encode_rows(Bytes(), "", "abcdefghij", length, True)
        assert sum((row.tokens[1:] for row in rows), []) == [*b"abcdefghij", 257]
        assert max(len(row.tokens) for row in rows) <= length


def test_an_answer_that_joins_with_the_prompts_last_space_is_not_lost(tmp_path):
    pieces = [(text, -float(i), 1)
              for i, text in enumerate(("\u2581cat", "\u2581c", "at", "\u2581", "c", "a", "t"))]
    (tmp_path / "t.model").write_bytes(sentencepiece_model(pieces))
    tokenizer = train_llama.load_tokenizer(tmp_path / "t.model")
    for prompt, answer in (("a ", "cat"), ("a", " cat")):        # " cat" is one token in both
        row, = encode_rows(tokenizer, prompt, answer, 9, False)
        assert row.tokens == tokenizer.encode("a cat")
        assert row.tokens[row.start:] == [259], "the piece of the space and the cat"


def test_an_empty_answer_is_scored_by_the_end_of_text(cli, tmp_path, checkpoint):
    records = [{"instruction": str(i), "output": ""} for i in range(20)]
    data = write_lines(tmp_path / "empty.jsonl", *records)
    status, out, err = cli("--checkpoint", checkpoint, "--data", data, "--eval-only", *QUICK)
    assert status == 0 and not err and "nan" not in out
    test = [Example("a", ["", "b"], 0)]
    with torch.no_grad():
        loss = make_task(test, test, Bytes(), options(), 1).evaluate(tiny())["loss"]
    ids = [256, *b"a", 257]
    expected = -tiny()(torch.tensor([ids])).log_softmax(-1)[0, 1, 257].item()
    assert loss == pytest.approx(expected, rel=1e-4)


def test_the_loss_is_that_of_the_answer_tokens_alone():
    model, rows = tiny(), [Row([256, 5, 6, 7], 2), Row([256, 9, 8, 7, 6, 5], 4), Row([256, 1], 1)]
    losses = answer_losses(model, collate(rows, "cpu"))
    by_hand = [-model(torch.tensor([row.tokens])).log_softmax(-1)[0, t - 1, row.tokens[t]]
               for row in rows for t in range(row.start, len(row.tokens))]
    assert torch.allclose(losses, torch.stack(by_hand), atol=1e-5) and len(losses) == 5


def test_batches_hold_every_row_once_an_epoch_and_like_lengths_together():
    texts = [Example("p" * (i * 7 % 90), ["a"]) for i in range(128)]
    task = make_task(texts, texts[:1], Bytes(), options(max_length=200), batch_size=4)
    shapes, seen = [], []
    for number in range(32):
        tokens, answers = task.batch(number)
        shapes.append(tokens.shape[1])
        seen += [int(row.argmax()) for row in answers.long()]
        again, _ = task.batch(number)
        assert torch.equal(tokens, again)                        # a pure function of the number
    assert sorted(seen) == sorted(1 + i * 7 % 90 for i in range(128))
    lengths = [len(e.prompt) + 3 for e in texts]
    assert sum(shapes) < 0.75 * sum(sorted(lengths)[-32:])       # what no sorting would come near
    assert shapes != sorted(shapes) and shapes != sorted(shapes, reverse=True)


def test_accuracy_takes_the_likeliest_choice_per_character():
    model, test, loss, tokens = tiny(), [], 0.0, 0
    for n in range(12):                          # the answer is the likeliest one, or the second
        prompt, choices, found = f"q{n}", ["no", "certainly", "ä"], []
        cut = len(Bytes().encode(prompt))
        for choice in choices:
            ids = Bytes().encode(prompt + choice)
            logp = model(torch.tensor([ids])).log_softmax(-1)[0].detach()
            found.append((sum(float(logp[t - 1, ids[t]]) for t in range(cut, len(ids))),
                          len(ids) - cut, len(choice)))
        order = sorted(range(3), key=lambda i: -found[i][0] / found[i][2])
        test.append(Example(prompt, choices, order[n % 3 == 0]))
        loss -= found[test[-1].answer][0]
        tokens += found[test[-1].answer][1]
    rows = [[encode_rows(Bytes(), e.prompt, c, 64, False)[0] for c in e.choices] for e in test]
    with torch.no_grad():
        scores = evaluate_rows(model, test, rows, options())
    assert scores["accuracy"] == 8 / 12
    assert scores["loss"] == pytest.approx(loss / tokens, rel=1e-4)
    assert scores["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)


def test_the_perplexity_of_a_text_counts_all_of_its_rows():
    model, text = tiny(), "a text that is longer than the rows are"
    rows = encode_rows(Bytes(), "", text, 8, False)
    assert len(rows) > 3
    with torch.no_grad():
        expected = torch.cat([answer_losses(model, collate([row], "cpu")) for row in rows]).mean()
        scores = evaluate_rows(model, [Example("", [text])], [rows], options())
    assert scores.keys() == {"loss", "perplexity"}
    assert scores["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_the_demos_answers_stand_in_its_sentences_and_are_not_to_be_guessed():
    plain, shifted = (train_llama.write_examples(2000, 0, flag) for flag in (False, True))
    assert plain == train_llama.write_examples(2000, 0, False)
    for a, b in zip(plain, shifted):
        assert all(choice in a.prompt for choice in a.choices) and len(set(a.choices)) == 4
        assert a.choices == b.choices and a.answer == b.answer
        assert a.prompt.split(". ")[0] == b.prompt.split(". ")[0] and a.prompt != b.prompt
    share = torch.tensor([e.answer for e in plain]).bincount() / 2000
    assert (share - 0.25).abs().max() < 0.05


# --- the command line


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Runs train_llama.py in this process -> (status, stdout, stderr)."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_llama.py", *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        try:
            status = structlora.run(train_llama.main)
        except SystemExit as end:                                # argparse
            status = end.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err
    return call


@pytest.fixture
def data(tmp_path):
    records = [{"instruction": f"Is {i} even?", "output": ("yes", "no")[i % 2]} for i in range(40)]
    return write_lines(tmp_path / "data.jsonl", *records)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "tiny"
    train_llama.save_meta(tiny(), folder)
    return folder


def test_data_alone_pretrains_saves_reloads_and_compares(cli, data, tmp_path):
    status, out, err = cli("--data", data, "--out", "out", *QUICK)
    assert status == 0 and not err
    assert "LoRA r=2" in out and "(matched)" in out and "tokens per second" in out
    assert "accuracy before" in out and out.count("sample: ") >= 4
    assert sorted(p.name for p in (tmp_path / "out/backbone").iterdir()) == [
        "consolidated.00.pth", "params.json"]
    assert len(json.loads((tmp_path / "out/summary.json").read_text())) == 3
    status, out, _ = cli("--data", data, "--out", "out", *QUICK)
    assert status == 0 and "using the backbone" in out


def test_a_checkpoint_is_adapted_merged_and_scored_again(cli, data, checkpoint, tmp_path):
    common = ("--data", data, "--out", "out", *QUICK)
    status, out, err = cli("--checkpoint", checkpoint, "--merge", *common)
    assert status == 0 and not err and "structlora r=2" in out
    written = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in written]
    last = written[-1]
    assert last["final"] and last["step"] == 6
    assert max(line.get("lr", 0) for line in written) == pytest.approx(3e-4)     # not the demo's
    status, out, _ = cli("--checkpoint", checkpoint, "--eval-only", *common)
    assert status == 0 and f"{last['loss']:.4f}" in out          # adapters on the checkpoint
    status, out, _ = cli("--checkpoint", "out/merged.pt", "--eval-only", "--data", data, "--out",
                         "other", *QUICK)
    assert status == 0 and f"{last['loss']:.4f}" in out and not (tmp_path / "other").exists()


def test_plain_text_is_scored_by_perplexity(cli, checkpoint, tmp_path):
    (tmp_path / "a.txt").write_text("one two three four five six seven\n" * 600)
    status, out, err = cli("--checkpoint", checkpoint, "--data", "a.txt", "--out", "out",
                           "--max-length", "40", "--method", "lora", *QUICK)
    assert status == 0 and not err and "perplexity before" in out


def test_gradient_checkpointing_gives_the_same_run(cli, data, checkpoint, tmp_path, monkeypatch):
    finals, original, calls = [], train_llama.checkpoint, []
    monkeypatch.setattr(train_llama, "checkpoint",
                        lambda *a, **k: calls.append(1) or original(*a, **k))
    for more in ((), ("--gradient-checkpointing",)):
        assert not calls
        cli("--checkpoint", checkpoint, "--data", data, "--out", f"out{len(finals)}", "--method",
            "lora", *QUICK, *more)
        lines = (tmp_path / f"out{len(finals)}/metrics.jsonl").read_text().splitlines()
        finals.append([json.loads(line)["loss"] for line in lines])
    assert finals[0] == pytest.approx(finals[1], rel=1e-4) and len(finals[0]) == 8
    assert len(calls) == 6                                       # steps of a model of one layer


BAD_OPTIONS = {
    "no data": (("--checkpoint", "tiny"), "--data"),
    "no such checkpoint": (("--checkpoint", "absent", "--data", "data.jsonl"), "absent"),
    "no such tokenizer": (("--data", "data.jsonl", "--tokenizer", "absent"), "absent"),
    "no such data": (("--data", "absent.jsonl"), "absent.jsonl"),
    "rank": (("--checkpoint", "tiny", "--data", "data.jsonl", "--rank", "17"), "rank"),
    "targets": (("--checkpoint", "tiny", "--data", "data.jsonl", "--targets", "qkv"), "qkv"),
    "length": (("--data", "data.jsonl", "--max-length", "1"), "--max-length"),
    "device": (("--data", "data.jsonl", "--device", "abacus"), "abacus"),
    "resume": (("--data", "data.jsonl", "--resume"), "--resume"),
    "vocabulary": (("--checkpoint", "large", "--data", "data.jsonl"), "--tokenizer")}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_mistake_is_one_line_and_status_two(case, cli, data, checkpoint, tmp_path):
    arguments, word = BAD_OPTIONS[case]
    large = LlamaConfig(600, 16, 1, 2, 1, 8, 24)
    train_llama.save_meta(Llama(large).initialise(), tmp_path / "large")
    status, out, err = cli(*arguments, "--out", "out")
    assert status == 2 and word in err and err.count("\n") == 1 and "Traceback" not in err
    assert not list(tmp_path.glob("out/**/adapter*")) and not list(tmp_path.glob("**/*.tmp*"))


def test_a_broken_line_of_data_ends_the_program_in_one_line(cli, data):
    data.write_text(data.read_text() + "{broken\n")
    status, _, err = cli("--data", data, "--out", "out", *QUICK)
    assert status == 2 and "data.jsonl:41: not JSON" in err and err.count("\n") == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("tried to allocate 2 GiB"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_says_which_option_to_lower(error, cli, data, checkpoint, monkeypatch):
    def no_room(*_):
        raise error
    monkeypatch.setattr(train_llama, "answer_losses", no_room)   # LLaVA's too: one handler for all
    status, _, err = cli("--checkpoint", checkpoint, "--data", data, "--out", "out", *QUICK)
    assert status == 2 and err.count("\n") == 1
    assert all(word in err for word in ("--gradient-checkpointing", "--batch-size", "--max-length"))


def test_a_killed_run_resumes_to_the_same_numbers(data, checkpoint, tmp_path):
    def command(out, *more):
        return [sys.executable, str(ROOT / "train_llama.py"), "--checkpoint", str(checkpoint),
                "--data", str(data), "--out", str(tmp_path / out), "--steps", "40", "--batch-size",
                "4", "--save-every", "4", "--device", "cpu", *more]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    whole = subprocess.run(command("whole"), env=environment, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    run = subprocess.Popen(command("killed"), env=environment, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not (tmp_path / "killed/adapter.pt").exists() and time.time() < deadline:
        time.sleep(0.005)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    again = subprocess.run(command("killed", "--resume"), env=environment, capture_output=True,
                           text=True)
    assert again.returncode == 0, again.stderr
    metrics = [(tmp_path / out / "metrics.jsonl").read_text() for out in ("whole", "killed")]
    assert metrics[0] == metrics[1] and metrics[0].count("\n") == 42
    tensors = [torch.load(tmp_path / out / "adapter.pt", weights_only=True)["state"]
               for out in ("whole", "killed")]
    assert all(torch.equal(a[key], b[key]) for a, b in zip(*tensors) for key in a)


def test_real_boolq_is_multiple_choice_with_the_real_tokenizer():
    if not SHARED.is_dir():
        pytest.skip("the shared data is not here")
    train, test = read_data(SHARED / "boolq", seed=0)
    assert (len(train), len(test)) == (9427, 3270)
    assert train[0].choices == ["the correct answer is false", "the correct answer is true"]
    assert 0.5 < sum(e.answer for e in test) / 3270 < 0.7        # BoolQ's yes are 62%
    tokenizer = train_llama.load_tokenizer(SHARED / "llama2/tokenizer.model")
    row, = encode_rows(tokenizer, test[0].prompt, test[0].choices[1], 64, True)
    assert len(row.tokens) == 64 and row.tokens[0] == 1 and row.tokens[-1] == 2
    assert tokenizer.decode(row.tokens[row.start:]).endswith("the correct answer is true")
