"""train_llama.py: the data, the scores and the command line, on texts of a few bytes."""

import argparse
import json
import math
import re

import pytest
import torch

import structlora
import train_llama
from helpers import DATA
from train_llama import (Bytes, Example, Llama, LlamaConfig, Row, answer_losses, collate,
                         encode_rows, evaluate, read_data, read_examples, rows_of_batch)

ARGS = argparse.Namespace(max_length=64, device="cpu")
QUICK = ("--steps", "6", "--batch-size", "4", "--device", "cpu", "--out", "out")
PARITY = [{"instruction": f"Is {i} even?", "output": ("yes", "no")[i % 2]} for i in range(40)]


def tiny():
    torch.manual_seed(0)
    return Llama(LlamaConfig(258, 16, 2, 2, 1, 8, 24)).eval()


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def nll(model, prompt, answer):
    """Nats of the answer, and how many tokens it has; the slow way."""
    ids, start = Bytes().encode(prompt + answer), len(Bytes().encode(prompt))
    log_p = model(torch.tensor([ids])).log_softmax(-1)[0].detach()
    return -sum(float(log_p[t - 1, ids[t]]) for t in range(start, len(ids))), len(ids) - start


def test_records_are_put_as_alpaca_puts_them(tmp_path):
    records = [{"instruction": "Add {these}.", "input": "1 2", "output": "3"},
               {"instruction": "Say hi.", "input": math.nan, "output": "hi"}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    both, alone = read_examples(tmp_path / "a.json")
    assert both.prompt.startswith("Below is an instruction that describes a task, paired with an")
    assert both.prompt.endswith("ion:\nAdd {these}.\n\n### Input:\n1 2\n\n### Response:\n")
    assert alone.prompt.endswith("request.\n\n### Instruction:\nSay hi.\n\n### Response:\n")
    assert read_examples(lines(tmp_path / "c.json", *records)) == [both, alone]  # JSON Lines too
    assert read_examples(lines(tmp_path / "d.NDJSON", *records)) == [both, alone]


def test_few_different_outputs_become_choices_and_a_tenth_is_held_out(tmp_path):
    answers = ("yes", "yes\n", " no", "no")                      # white space makes no other choice
    records = [{"instruction": str(i), "output": answers[i % 4]} for i in range(40)]
    train, test = read_data(lines(tmp_path / "a.jsonl", *records), seed=0)
    assert (len(train), len(test)) == (36, 4) and len({e.prompt for e in train + test}) == 40
    for e in train + test:
        number = int(re.search(r"tion:\n(\d+)", e.prompt)[1])
        assert e.choices == ["no", "yes"] and e.choices[e.answer] == answers[number % 4].strip()
    many = [record | {"output": record["instruction"]} for record in PARITY]
    assert {len(e.choices) for e in read_data(lines(tmp_path / "a.jsonl", *many), 0)[0]} == {1}


def test_a_folder_of_two_parts_is_read_and_two_files_of_one_are_refused_by_name(tmp_path):
    lines(tmp_path / "train.jsonl", *PARITY[:2])
    with pytest.raises(ValueError, match="needs train and test"):
        read_data(tmp_path, 0)
    for name in ("val", "validation", "valid", "dev", "test"):   # of several the last of these
        lines(tmp_path / f"{name}.JSON", *PARITY[:len(name)])
        assert list(map(len, read_data(tmp_path, 0))) == [2, len(name)]
    for name, other in (("train.txt", "train.jsonl"), ("test.jsonl", "test.JSON")):
        (tmp_path / name).write_text("a\n")
        with pytest.raises(ValueError, match=f"{tmp_path}: ") as error:
            read_data(tmp_path, 0)
        assert name in str(error.value) and other in str(error.value)
        (tmp_path / name).unlink()


FOREIGN = {"history": [["a", "b"]], "system": "s", "options": ["a"], "context": "c",
           "choices": {"A": "a"}, "images": ["a.png"], "passage": "p", "table": [[1]], "image": "a"}


def test_a_record_with_more_than_is_read_is_refused_by_the_names_of_its_keys(tmp_path):
    plain = {"instruction": "a", "input": "b", "output": "c"}
    idle = {"id": 7, "source": "s", "category": "c", "answer": "c", "history": [], "system": None,
            "options": {}, "context": "", "choices": math.nan}
    expected = read_examples(lines(tmp_path / "a.json", plain))
    assert read_examples(lines(tmp_path / "a.json", plain | idle)) == expected
    for key, value in FOREIGN.items():
        with pytest.raises(ValueError, match=rf"a.json: record 2: .*\b{key}\b"):
            read_examples(lines(tmp_path / "a.json", plain, plain | {key: value}))
    for given in (["b"], {"b": 1}):
        with pytest.raises(ValueError, match="record 1: expected"):
            read_examples(lines(tmp_path / "a.json", plain | {"input": given}))


def test_text_is_cut_into_parts_that_lose_nothing(tmp_path):
    text = "".join(f"line {i} {'x' * (i % 90)}\n" for i in range(400)) + "y" * 9000
    (tmp_path / "a.txt").write_text(text)
    examples = read_examples(tmp_path / "a.txt")
    assert "".join(e.choices[0] for e in examples) == text and len(examples) > 5
    for length in range(2, 14):                                  # each token is predicted once
        rows = encode_rows(Bytes(), "", "abcdefghij", length - 1, True)
        assert sum((row.tokens[1:] for row in rows), []) == [*b"abcdefghij", 257]
        assert max(len(row.tokens) for row in rows) <= length and {row.start for row in rows} == {1}


@pytest.mark.parametrize("name, text, words", (
    ("a.jsonl", f"{json.dumps(PARITY[0])}\n{{\n", "record 2: "), ("b.jsonl", "[" * 100_000, ": "),
    ("c.jsonl", '{"instruction": 1, "output": 2}', "record 1: expected"), ("d.json", "[]", "few"),
    ("e.json", '[{"question": "a", "passage": "b", "answer": "yes"}]', "record 1: expected"),
    ("f.json", '{"instruction": "a", "output": "", "answer": "b"}\n' * 20, "every output is empty"),
    ("g.csv", "a,b", "must be one of"), ("h.txt", b"\xff\xfe", "utf-8"), ("i.txt", "one", "few")))
def test_bad_data_is_one_line_that_names_the_file(name, text, words, tmp_path):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"{name}: [^\n]*$") as error:
        read_data(tmp_path / name, 0)
    assert words in str(error.value)


def test_a_row_is_prompt_answer_and_end_and_truncation_keeps_the_answer():
    assert encode_rows(Bytes(), "ab", "cd", 10, True) == [([256, *b"abcd", 257], 3)]
    assert encode_rows(Bytes(), "abcdefgh", "XY", 5, True) == [([256, *b"ghXY", 257], 3)]
    for length in range(1, 9):                                   # of which the last is not read
        row, = encode_rows(Bytes(), "abc", "0123456789", length, False)
        assert row.tokens[row.start:] == [*b"0123456789"[:length]] and row.tokens[0] == 256
        assert len(row.tokens) == length + 1


def test_batches_hold_every_row_once_an_epoch():
    rows = [Row([0, 1], i) for i in range(128)]
    batches = [rows_of_batch(rows, 4, number, 0) for number in range(64)]
    for epoch in (batches[:32], batches[32:]):
        assert sorted(row.start for row in sum(epoch, [])) == list(range(128))
    assert batches[7] == rows_of_batch(rows, 4, 7, 0) and batches[:32] != batches[32:]
    assert len(rows_of_batch(rows[:3], 4, 5, 0)) == 3


def test_scores_by_hand():
    model, test, found, choices = tiny(), [], [], ["no", "certainly", "ä"]
    for n in range(12):                          # the answer is the likeliest one, or the second
        each = [nll(model, f"q{n}", choice) for choice in choices]
        order = sorted(range(3), key=lambda i: each[i][0] / len(choices[i]))
        test.append(Example(f"q{n}", choices, order[n % 3 == 0]))
        found.append(each[test[-1].answer])
    loss = sum(nats for nats, _ in found) / sum(count for _, count in found)
    expected = {"accuracy": 8 / 12, "loss": loss}
    assert evaluate(model, Bytes(), test, ARGS) == pytest.approx(expected, rel=1e-4)
    text = "a text that is longer than the rows are, " * 3
    parts = [answer_losses(model, collate([row], "cpu")).detach()
             for row in encode_rows(Bytes(), "", text, 64, False)]
    loss = float(torch.cat(parts).mean())
    scores = evaluate(model, Bytes(), [Example("", [text], 0)], ARGS)
    assert scores == pytest.approx({"perplexity": math.exp(loss), "loss": loss}, rel=1e-4)
    scores = evaluate(model, Bytes(), [Example("a", [""], 0)], ARGS)     # its end is the answer
    end = -model(torch.tensor([[256, 97]])).log_softmax(-1)[0, 1, 257].item()
    assert scores["loss"] == pytest.approx(end, rel=1e-4)


def losses(out):
    """The column "loss" of the table that was printed."""
    table = [line.replace(" ", "").split("|") for line in out.splitlines() if line.startswith("|")]
    return [float(row[table[0].index("loss")]) for row in table[2:]]


def write_tiny(path):
    model = tiny()
    structlora.write(path, model.sizes | {"model": model.state_dict()})
    return path


@pytest.mark.parametrize("name", ("tiny", "stories260K"))
def test_a_checkpoint_is_adapted_merged_and_scored_again(name, cli, tmp_path):
    (tmp_path / "a.txt").write_text("one two three four five six seven\n" * 100)
    model, own = DATA / name, ("--tokenizer", DATA / name / "tokenizer.model")
    if name == "tiny":
        model, own = write_tiny(tmp_path / "tiny.pt"), ()
    elif not DATA.is_dir():
        pytest.skip("the shared data is not here")

    def score(checkpoint, *more):
        status, out, err = cli(train_llama, "--checkpoint", checkpoint, "--data", "a.txt",
                               "--max-length", "40", "--lr", "0.01", *QUICK, *more)
        assert status == 0 and "perplexity" in out and " -> " in out, err
        return losses(out)

    frozen, adapted = score(model, "--merge")
    assert adapted < frozen
    assert score("out/merged.pt", "--eval-only", *own) == score(model, "--eval-only") == [adapted]
    assert score(model, "--gradient-checkpointing") == [frozen, adapted]
    if own:                                      # bytes are not what this model reads
        with pytest.raises(AssertionError, match="name its tokenizer.model with --tokenizer"):
            score("out/merged.pt", "--eval-only")


def test_the_loss_of_a_step_is_a_mean_over_all_its_labels(cli, tmp_path):
    command = (train_llama, "--checkpoint", write_tiny(tmp_path / "tiny.pt"), "--data", "a.jsonl",
               "--accumulate", "3", *QUICK)
    train, _ = read_data(lines(tmp_path / "a.jsonl", *PARITY), 0)
    rows = [encode_rows(Bytes(), e.prompt, e.choices[e.answer], 512, True)[0] for e in train]
    parts = [collate(rows_of_batch(rows, 4, number, 0), "cpu") for number in range(3)]
    expected = torch.cat([answer_losses(tiny(), part) for part in parts]).mean().item()
    status, out, err = cli(*command)
    logged = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().split("\n")[0])["loss"]
    assert status == 0 and "accuracy" in out and logged == pytest.approx(expected, rel=1e-5), err
