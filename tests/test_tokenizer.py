"""Tokenizers against the libraries of their formats: by committed values, and live where installed.

    PYTHONPATH=. python tests/test_tokenizer.py        prints EXPECTED anew

needs sentencepiece and tiktoken (0.2.3 and 0.14.0 made what stands below); the tests do not."""

import base64
import functools
import io
import json
import random
import re
import struct
import textwrap
import unicodedata
from collections import Counter

import pytest

from helpers import DATA
from train_llama import Bytes, SentencePiece, RankFile, bpe, load_tokenizer

# As published in Llama 3's tokenizer.py.
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
HARD = ("", "   lead and  trail ", "\ttab\n\n \nline\r\n", "<s></s> \u2581 own\u2581\u2581 mark",
        "日本語、中文。👍🏽 e\u0301 مرحبا", "it's IT'S we'LL 'd'VE'tx '\u017ft",
        "1234567 3.14 ١٢٣ ⅷ½ x1", "a\x1cb \x1f \u3000w \xa0n\u2028\x85\ufeffb \0")


def field(number, value):
    """A field of a protobuf message: an int, a float, or bytes."""
    def varint(n):
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece_model(pieces, trainer={}, normaliser={}):
    """A BPE model with byte fallback and an identity normaliser; `pieces` (text, score, kind) get
    the ids from 259. Settings that are "" are left out."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3),
              *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)), *pieces]
    data = [field(1, field(1, text.encode()) + (field(2, score) if score else b"")
                  + (field(3, kind) if kind != 1 else b"")) for text, score, kind in pieces]
    for number, values in ((2, {3: 2, 35: 1} | trainer), (3, {1: b"identity", 4: 0} | normaliser)):
        items = [field(*item) for item in values.items() if item[1] != ""]
        data.append(field(number, b"".join(items)))
    return b"".join(data)


def rank_file(tokens):
    return b"".join(base64.b64encode(t) + b" %d\n" % rank for rank, t in enumerate(tokens))


def common(words, count):
    """The commonest parts of 2 to 5 characters (or bytes) of the words."""
    found = Counter(w[i:i + n] for w in words for n in range(2, 6) for i in range(len(w) - n + 1))
    return sorted(found, key=lambda part: (-found[part], part))[:count]


WORDS = re.findall(" *[^ ]+", " ".join(HARD))
PARTS = [part.replace(" ", "\u2581") for part in common(WORDS, 120)
         if not re.search("[<\0]|[^ \u2581][ \u2581]", part)]           # no spaces inside
# Three pieces share each score, and ids are not in the order of scores. Of the ranks, some cross
# the cuts of Llama 3's pattern, and some are not reached by joins.
PIECES = [(text, -float(i // 3), 1) for i, text in enumerate(dict.fromkeys(PARTS))][::-1]
PIECES += [(c, -1e4, 1) for c in "\u2581abcdefghinorstwxyz\n日é"]
RANKS = [*(bytes([byte]) for byte in range(255, -1, -1)),
         *common([word.encode() for word in WORDS], 200)]
MODELS = {"small": lambda: sentencepiece_model(PIECES), "ranks": lambda: rank_file(RANKS),
          "llama2": (DATA / "llama2/tokenizer.model").read_bytes}
EXPECTED = {"llama2": "| 1678 3275 322 29871 26203 29871 ", "small": """
 | 342 377 373 376 313 334 381 111 372 | 372 363 391 372 358 357 | 372 63 367 63 50 367 370 383 387
382 370 112 373 384 110 | 267 231 187 176 233 153 138 230 131 133 243 162 148 144 243 162 146 192
311 278 219 170 | 307 317 288 79 331 72 42 386 388 329 | 325 56 57 58 321 275 273 286 | 315 347 271
282 242 190 194 374 372 3""", "ranks": """
 | 256 339 328 223 351 147 223 | 271 273 285 147 150 145 154 278 | 427 432 140 193 372 346 259 259
343 | 25 104 90 25 99 83 23 85 97 260 126 27 71 82 25 105 120 260 125 268 110 114 268 112 66 329 51
126 364 39 82 39 87 39 88 | 150 139 392 322 383 353 382 262 155 385 393 135 262 58 64 139 | 403 419
200 223 204 209 406 223 38 94 38 93 38 92 223 29 122 72 61 66 356 206 | 158 279 289 223 260 127 136
223 61 95 145 29 127 87 61 122 16 68 64 157 280"""}


@functools.cache
def tokenizer(name):
    if name == "llama2" and not DATA.is_dir():
        pytest.skip("the shared data is not here")
    return (RankFile if name == "ranks" else SentencePiece)(MODELS[name]())


def library(name):
    """(encode, decode) of the library of that format, for MODELS[name]."""
    if name == "ranks":
        tiktoken = pytest.importorskip("tiktoken")
        model = tiktoken.Encoding("test", pat_str=LLAMA3_SPLIT, special_tokens={},
                                  mergeable_ranks={token: i for i, token in enumerate(RANKS)})
        return model.encode_ordinary, model.decode
    spm = pytest.importorskip("sentencepiece")
    model = spm.SentencePieceProcessor(model_proto=MODELS[name]())
    return model.encode, model.decode


def fuzz(count):
    """Texts of any characters that this Python knows, mixed with what has rules of its own."""
    rng, usual = random.Random(0), [" ", "  ", "\n", "\r", "'s", "12", *" ".join(HARD).split(" ")]
    known = [c for c in map(chr, range(0x20000)) if unicodedata.category(c) not in ("Cn", "Cs")]
    for _ in range(count):
        yield "".join(rng.choice(usual) if rng.random() < 0.4
                      else known[int(len(known) * rng.random() ** rng.choice((1, 3, 9)))]
                      for _ in range(rng.randrange(1, 40)))


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_the_librarys_and_decode_gives_the_text_back(name):
    model = tokenizer(name)
    for text, wanted in zip(HARD, EXPECTED[name].split("|")):
        ids = model.encode(text, bos=False)
        assert ids == list(map(int, wanted.split())), repr(text)
        shown = text if name == "ranks" else text.replace("\u2581", " ")
        assert model.decode([model.bos_id, *ids, model.eos_id]) == shown


@pytest.mark.parametrize("name", MODELS)
def test_the_library_agrees_on_any_text(name):
    model, (encode, decode) = tokenizer(name), library(name)
    rows = json.loads((DATA / "boolq/test.json").read_text())[:1000] if DATA.is_dir() else []
    for text in (*HARD, *fuzz(1500), *(row["instruction"] for row in rows)):
        ids = model.encode(text, bos=False)
        assert ids == encode(text) and model.decode(ids) == decode(ids), repr(text)


def test_start_end_and_sizes_are_the_models_own():
    ranks, count = tokenizer("ranks"), len(RANKS)
    assert (ranks.bos_id, ranks.eos_id, ranks.vocab_size) == (count, count + 1, count + 256)
    whole = RankFile(rank_file([*Bytes.tokens, b"abc"]))         # a token that no joins lead to
    assert whole.encode("abc abc", bos=False) == [256, *b" abc"]
    pieces = SentencePiece(sentencepiece_model([("\u2581", 0.0, 1)], {41: 2, 42: 1}))
    assert (pieces.bos_id, pieces.eos_id, pieces.vocab_size) == (1, 2, 260)         # by name
    for each in (ranks, pieces, Bytes()):
        bare = each.encode("a b", bos=False)
        assert each.encode("a b", eos=True) == [each.bos_id, *bare, each.eos_id]
        assert each.encode("a b") == [each.bos_id, *bare] and each.encode("", bos=False) == []
        assert each.decode(each.encode("\ud83d\ude00 \ud800", eos=True)) == "\U0001f600 \ufffd"


def slow_bpe(parts, ranks):
    unions = [a + b for a, b in zip(parts, parts[1:])]
    found = [(ranks[union], i) for i, union in enumerate(unions) if union in ranks]
    if not found:
        return parts
    _, i = min(found)
    return slow_bpe([*parts[:i], unions[i], *parts[i + 2:]], ranks)


def test_bpe_equals_a_search_of_all_pairs_at_each_step():
    assert bpe(list("abab"), {"ab": 0, "abab": 1}) == ["abab"] and bpe([], {}) == []
    assert bpe(list("abc"), {"ab": 0, "bc": 0}) == ["ab", "c"]   # the leftmost of equals
    rng = random.Random(0)
    for _ in range(500):
        words = ["".join(rng.choices("abc", k=rng.randrange(2, 6))) for _ in range(60)]
        ranks = {word: rng.randrange(9) for word in words}
        parts = rng.choices("abc", k=rng.randrange(40))
        assert bpe(list(parts), ranks) == slow_bpe(parts, ranks)
    many = bpe(["a"] * 200_000, {"a" * 2 ** k: k for k in range(1, 5)})          # not quadratic
    assert many == ["a" * 16] * 12_500


def test_a_sentencepiece_model_worked_by_hand():
    # "abc": of b+c (-1) and a+b (-2) the first, then a+bc; "\u2581abc" is no piece, so that is all.
    pieces = [("ab", -2.0, 1), ("bc", -1.0, 1), ("abc", -3.0, 1), ("\u2581ab", -4.0, 1),
              ("\u2581", -9.0, 1), ("a", -9.0, 1)]               # 259 to 264
    model = SentencePiece(sentencepiece_model(pieces))
    for text, wanted in (("abc", [263, 261]), ("ab", [262]), ("a ab", [263, 264, 262]),
                         (" ", [263, 263]), ("ab\n", [262, 13]), ("é", [263, 198, 172]),
                         ("<s>", [263, *(3 + byte for byte in b"<s>")])):
        assert model.encode(text, bos=False) == wanted, text     # text is never a control piece
    assert model.decode([1, 263, 263, 264, 2]) == " a"
    bare = SentencePiece(sentencepiece_model(pieces, {}, {3: 0}))        # no space put in front
    assert bare.encode("ab a", bos=False) == [259, 263, 264] and bare.decode([263, 264]) == " a"


def test_text_is_cut_as_llama_3_cuts_it():
    cut = tokenizer("ranks").chunks
    for wanted in ("it|'s|x| IT|'T|x|'Re", "'\u017f|t", "123|456|7| |12",
                   "a|\r\n \n|  | é|ⅷ½|_|²", " | a|  \n\n| b|\t|\tx|  ",
                   "!!\n\n|x| #?\r\n| \n", "\xa0|\u3000w|\ufeffb"):
        assert cut(wanted.replace("|", "")) == wanted.split("|")
    for code in range(0x110000):                     # of letters four and an x are one chunk
        kind = {(5,): "L", (3, 1, 1): "N"}.get(tuple(map(len, cut(chr(code) * 4 + "x"))), "other")
        category = unicodedata.category(chr(code))[0]
        assert kind == (category if category in "LN" else "other"), hex(code)


LINES = rank_file([*Bytes.tokens, b"ab", b"abc"]).splitlines(keepends=True)
PLAIN, WHOLE = sentencepiece_model([("ab", 0.0, 1)]), b"".join(LINES)
BAD = [b"", b"PK\3\4\0", b'{"model": {}}', b"\n\n\n", b"".join(LINES[:-2] + LINES[-1:]), WHOLE[:-4],
       b"".join(LINES[::-1]), rank_file([*Bytes.tokens[:-1], b"ab"]), b"*" + WHOLE,
       rank_file([*Bytes.tokens, b"ab", b"ab"]), PLAIN[:len(PLAIN) // 2], PLAIN[:-1],
       PLAIN.replace(b"<0x41>", b"<0x4x>"), PLAIN.replace(b"<s>", b"<t>")]
OTHER = (           # models that give other ids than LLaMA's kind, and the setting or piece to name
    (([], {3: 1}), "model_type"), (([], {24: 1}), "treat_whitespace_as_suffix"),
    (([], {35: 0}), "byte_fallback"), (([], {}, {2: b"\0\1"}), "precompiled_charsmap"),
    (([], {}, {4: 1}), "remove_extra_whitespaces"), (([], {}, {4: ""}), "remove_extra_whitespaces"),
    (([], {}, {5: 0}), "escape_whitespaces"),
    (([("a", 0.0, 4)],), "'a'"), (([("a", 0.0, 5)],), "'a'"),
    (([("of\u2581the", 0.0, 1)],), "of\u2581the"), (([("a\u2581", 0.0, 1)],), "a\u2581"))


def test_bad_files_and_models_that_give_other_ids_are_refused_by_name_in_one_line(tmp_path):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(ValueError, match=f"^{path}: is not there.*--tokenizer"):
        load_tokenizer(tmp_path)
    cases = [(data, "") for data in BAD]
    for data, word in cases + [(sentencepiece_model(*settings), word) for settings, word in OTHER]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"^{path}: [^\n]*{word}[^\n]*$"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: .*name a tokenizer.model"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("settings, word", (
    ({}, None), ({"add_dummy_prefix": False}, None), ({"split_by_whitespace": False}, "crosses"),
    ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
    ({"user_defined_symbols": ["the"]}, "the"), ({"normalization_rule_name": "nfkc"}, "charsmap"),
    ({"remove_extra_whitespaces": True}, "remove_extra"), ({"byte_fallback": False}, "fallback"),
    ({"model_type": "unigram"}, "model_type")))
def test_models_that_sentencepiece_trains_are_read_exactly_or_refused(settings, word):
    spm = pytest.importorskip("sentencepiece")
    words, file, rng = "the of and in a to was cat dog hat".split(), io.BytesIO(), random.Random(0)
    texts = [" ".join(rng.choices(words, k=9)) for _ in range(300)]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=file, minloglevel=2, **{
            "model_type": "bpe", "vocab_size": 330 if settings.get("byte_fallback", True) else 60,
            "byte_fallback": True, "hard_vocab_limit": False, "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False} | settings)
    if word:
        with pytest.raises(ValueError, match=word):
            SentencePiece(file.getvalue())
        return
    model = SentencePiece(file.getvalue())
    theirs = spm.SentencePieceProcessor(model_proto=file.getvalue())
    for text in (*texts[:50], *HARD):
        assert model.encode(text, bos=False) == theirs.encode(text)


if __name__ == "__main__":
    for name in MODELS:
        print(textwrap.fill(" | ".join(" ".join(map(str, library(name)[0](t))) for t in HARD), 100))
