"""Tokenizers against the libraries of their formats: by committed values, and live where installed.

    PYTHONPATH=. python tests/test_tokenizer.py        prints EXPECTED and CLASSES anew

needs sentencepiece and tiktoken (0.2.3 and 0.14.0 made what stands below); the tests do not.
"""

import base64
import collections
import functools
import hashlib
import json
import random
import re
import struct
import unicodedata
from pathlib import Path

import pytest

import train_llama
from structlora import InputError
from train_llama import Bytes, load_tokenizer, merge

DATA = Path(__file__).parents[2] / "shared/data"
LLAMA2 = DATA / "llama2/tokenizer.model"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# As published in Llama 3's tokenizer.py.
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

HARD = (
    "", " ", "Hello  world", "   lead and trail  ", "\ttab\n\n \nline\r\n end \n",
    "<s></s> <unk><0x41><|eot_id|>", "\u2581 its own\u2581\u2581mark \u2581",
    "nul\0\0 \x07\x1b[0m\x7f\x80", "日本語の日本、中文。", "한국어 조각", "👩‍👩‍👧 🏳️‍🌈👍🏽",
    "e\u0301 \u00e9 a\u0308\u0323 Z\u0334\u0316", "مرحبا بالعالم", "שלום עולם", "สวัสดีชาวโลก",
    "a\ud83d \ud83d\ude00\udc00", "it's IT'S we'LL They'Re I'M 'd'VE'tx '\u017ft '\u017f's",
    "1234567 12 3.14159 ١٢٣٤ ⅷ½ x1234", "def f(x):\n    return  x**2  # ok!?\n\n\n  y",
    "a\x1cb\x1d \x1e\x1f c\x1f", "\u3000w \xa0n\u2028s\x85 \ufeffb", "aaaaaaa aaaa",
    "\U0001d518\U000105c0\u0870a \U00016ac0\U0001e4f01", "\ud7ff\ue000\ufffd\U0010ffff")


def clean(text):
    """Surrogates of HARD as the libraries take them: pairs as one character, others as U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text.replace("\ud83d\ude00", "\U0001f600"))


# --- files made here


def varint(n):
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def field(number, value):
    """A field of a protobuf message: an int, a float, or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece_model(pieces, trainer={}, normaliser={}):
    """A BPE model with byte fallback and an identity normaliser; `pieces` get the ids from 259.
    What equals the format's default is left out, and so are settings that are None."""
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL),
              *((f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)), *pieces]
    data = [field(1, field(1, text.encode()) + (field(2, score) if score else b"")
                  + (field(3, kind) if kind != NORMAL else b"")) for text, score, kind in pieces]
    for number, values in ((2, {3: 2, 35: 1} | trainer), (3, {1: b"identity", 4: 0} | normaliser)):
        data.append(field(number, b"".join(field(*item) for item in values.items()
                                           if item[1] is not None)))
    return b"".join(data)


def rank_file(tokens):
    return b"".join(base64.b64encode(t) + b" %d\n" % rank for rank, t in enumerate(tokens))


def learn(words, count):
    """`count` times the commonest neighbours of all words, joined: byte-pair encoding, by hand."""
    words, tokens = collections.Counter(map(tuple, words)), []
    for _ in range(count):
        pairs = collections.Counter()
        for parts, often in words.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += often
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(best[0] + best[1])
        joined = collections.Counter()
        for parts, often in words.items():
            new = []
            for part in parts:
                if new and (new[-1], part) == best:
                    new[-1] += part
                else:
                    new.append(part)
            joined[tuple(new)] += often
        words = joined
    return tokens


@functools.cache
def small_pieces():
    """A few characters and the joins of HARD; three pieces share each score, and ids are not in
    the order of scores."""
    words = " ".join(map(clean, HARD)).replace(" ", "\u2581")
    words = re.findall("\u2581*[^\u2581]+|\u2581+", words)
    joins = [(text, -float(i // 3), NORMAL)
             for i, text in enumerate(dict.fromkeys(learn(words, 90)))
             if "\0" not in text]                                # the format forbids it
    return joins[::-1] + [(c, -1e4, NORMAL) for c in "\u2581abcdefghinorstwxyz\n日é"]


@functools.cache
def small_ranks():
    """Tokens of HARD cut at spaces alone, so that some cross the cuts of Llama 3's pattern, and
    one that no joins lead to."""
    words = re.findall(" *[^ ]+", " ".join(map(clean, HARD)))
    byte_words = [[bytes([byte]) for byte in word.encode()] for word in words]
    singles = [bytes([byte]) for byte in range(255, -1, -1)]
    return dict.fromkeys([*singles, *learn(byte_words, 200), b" lead"])


MODELS = {"small": lambda: sentencepiece_model(small_pieces()), "llama2": LLAMA2.read_bytes,
          "ranks": lambda: rank_file(small_ranks())}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """tokenizer(name) loads MODELS[name] once."""
    loaded = {}

    def get(name):
        if name == "llama2" and not LLAMA2.is_file():
            pytest.skip("shared/data/llama2/tokenizer.model is not here")
        if name not in loaded:
            path = tmp_path_factory.mktemp(name) / "tokenizer.model"
            path.write_bytes(MODELS[name]())
            loaded[name] = load_tokenizer(path.parent)           # a folder will do
        return loaded[name]
    return get


def library(name):
    """(encode, decode) of the library of that format, for MODELS[name]."""
    if name != "ranks":
        spm = pytest.importorskip("sentencepiece")
        processor = spm.SentencePieceProcessor(model_proto=MODELS[name]())
        return processor.encode, processor.decode
    encoding = tiktoken_encoding(LLAMA3_SPLIT, {token: i for i, token in enumerate(small_ranks())})
    return encoding.encode_ordinary, encoding.decode


def tiktoken_encoding(pattern, ranks):
    tiktoken = pytest.importorskip("tiktoken")
    return tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


@functools.cache
def boolq():
    """All texts of BoolQ, each once."""
    files = [json.loads(path.read_text()) for path in sorted(DATA.glob("boolq/*.json"))]
    return sorted({text for rows in files for row in rows for text in row.values()})


def fuzz(count):
    """Texts of any code points that UTF-8 has, mixed with what has rules of its own."""
    rng = random.Random(0)
    ranges = ((32, 126), (0, 0x24F), (0x300, 0x36F), (0x590, 0x6FF), (0xE00, 0xE7F), (0, 0xD7FF),
              (0x2000, 0x206F), (0x3000, 0x9FFF), (0x1F000, 0x1FAFF), (0xE000, 0x10FFFF))
    common = [" ", "  ", "\n", "\r", "'s", "'\u017f", "\u2581", "12",
              *" ".join(map(clean, HARD)).split(" ")]
    part = lambda: (rng.choice(common) if rng.random() < 0.4
                    else chr(rng.randint(*rng.choice(ranges))))
    for _ in range(count):
        yield "".join(part() for _ in range(rng.randrange(1, 40)))


# --- values made by the libraries: ids of each of HARD, "|" between texts

EXPECTED = {
    "small": """
| 346 | 347 75 352 111 111 358 259 351 | 283 343 325 347 361 359 348 356 111 346 | 347 12 361 348
349 338 327 111 356 357 352 16 366 332 325 327 | 329 360 340 50 360 65 329 120 357 110 340 51 363
323 340 127 352 358 361 98 356 351 127 65 | 278 333 362 357 346 112 348 359 110 346 | 347 357 120
111 3 3 347 10 30 94 51 112 130 197 131 | 347 294 | 347 302 347 301 | 347 318 347 313 | 332 207 132
347 368 343 207 139 207 166 347 93 207 183 207 153 | 347 220 136 219 180 219 176 326 347 326 220 135
219 188 219 170 220 135 220 136 | 347 218 172 218 159 218 152 218 160 347 218 165 218 152 218 159
218 160 | 347 227 187 173 227 187 170 227 187 180 227 187 173 227 187 151 227 187 184 227 187 141
227 187 181 227 187 170 227 188 133 227 187 168 227 187 132 | 343 242 194 192 347 320 | 347 324 321
330 87 42 86 347 362 352 42 79 79 347 87 355 352 364 42 85 352 330 42 80 342 351 42 89 72 42 361 363
334 361 334 321 | 328 322 56 57 58 328 347 54 49 52 323 56 60 347 220 164 220 165 220 166 220 167
347 229 136 186 197 192 347 363 339 322 | 347 351 352 353 347 353 43 363 44 61 366 287 263 346 38
333 110 36 66 338 366 267 | 343 31 349 32 347 33 34 347 350 34 | 347 293 347 197 163 357 229 131 171
360 197 136 347 306 | 331 345 348 331 | 347 309 347 308 | 347 304""",
    "llama2": """
| 259 | 15043 29871 3186 | 1678 3275 322 26203 259 | 29871 12 3891 13 13 29871 13 1220 30004 13
1095 29871 13 | 529 29879 2565 29879 29958 529 2960 5299 29900 29916 29946 29896 5299 29989 29872
327 29918 333 29989 29958 | 259 967 1914 29871 2791 259 | 302 352 3 3 29871 10 30 29961 29900 29885
130 30751 | 29871 30325 30346 30968 30199 30325 30346 30330 30275 30333 30267 | 29871 30877 31293
31129 29871 31408 237 179 132 | 29871 243 162 148 172 30722 243 162 148 172 30722 243 162 148 170
29871 243 162 146 182 30598 30722 243 162 143 139 243 162 148 144 243 162 146 192 | 321 30103 904
263 31719 31214 796 207 183 207 153 | 29871 30159 30156 30240 30177 30112 29871 30177 19233 30218
19233 30159 | 29871 30294 30249 30205 30404 29871 30324 30205 30249 30404 | 29871 30547 30492 30510
30547 30718 30691 30913 30289 30492 31364 30496 30425 | 263 30140 29871 243 162 155 131 30140 | 372
29915 29879 13315 29915 29903 591 29915 2208 2688 29915 1123 306 29915 29924 525 29881 29915 12064
29915 7508 525 30473 29873 525 30473 29915 29879 | 29871 29896 29906 29941 29946 29945 29953 29955
29871 29896 29906 29871 29941 29889 29896 29946 29896 29945 29929 29871 220 164 220 165 220 166 220
167 29871 229 136 186 30226 921 29896 29906 29941 29946 | 822 285 29898 29916 1125 13 1678 736 29871
921 1068 29906 29871 396 3431 29991 29973 13 13 13 29871 343 | 263 31 29890 32 29871 33 34 274 34 |
29871 30358 29893 20246 29876 31353 29879 197 136 29871 30143 29890 | 263 27137 7340 263 7340 29874
| 29871 243 160 151 155 243 147 154 131 227 164 179 29874 29871 243 153 174 131 243 161 150 179
29896 | 29871 240 162 194 241 131 131 30140 247 146 194 194""",
    "ranks": """
| 223 | 183 154 147 147 144 223 223 136 144 141 147 155 | 256 456 264 295 223 139 141 158 150 147
256 | 246 139 158 157 274 314 147 150 145 154 242 245 310 295 314 | 195 140 271 208 140 193 313 138
145 148 271 207 135 297 271 131 154 144 139 160 150 155 131 193 | 262 309 140 308 136 145 379 146
158 141 148 306 | 145 138 147 255 255 223 248 228 164 207 146 128 445 | 282 365 267 126 27 71 82 25
105 120 267 125 | 18 106 455 223 354 | 320 223 332 | 154 440 223 441 264 439 223 165 436 | 417 223
429 | 40 449 307 450 | 392 257 78 284 107 257 74 257 117 257 77 257 88 31 70 125 257 90 257 126 |
158 266 223 334 | 296 300 312 171 216 172 223 136 154 216 179 179 223 171 151 154 134 216 173 154
312 216 178 273 155 216 169 186 216 139 135 273 292 139 273 292 300 | 272 204 203 202 201 200 223
272 223 204 209 206 297 202 198 223 423 421 419 418 223 391 223 135 272 204 203 | 155 154 153 223
153 215 135 214 197 245 303 223 141 154 139 138 141 145 223 223 135 213 213 205 223 223 220 308 148
222 192 274 245 223 223 134 | 158 227 157 226 223 225 224 223 156 224 | 378 223 443 385 61 122 223
346 157 | 270 258 158 311 | 15 454 223 15 105 448 | 18 451"""}


@pytest.mark.parametrize("name", MODELS)
def test_ids_of_hard_texts_are_the_library_s(name, tokenizer):
    for text, wanted in zip(HARD, EXPECTED[name].split("|"), strict=True):
        assert tokenizer(name).encode(text, bos=False) == list(map(int, wanted.split())), repr(text)


@pytest.mark.parametrize("name", MODELS)
def test_decode_gives_the_text_back(name, tokenizer):
    for text in HARD:
        ids = tokenizer(name).encode(text, bos=True, eos=True)
        shown = clean(text) if name == "ranks" else clean(text).replace("\u2581", " ")
        assert tokenizer(name).decode(ids) == shown


@pytest.mark.parametrize("data, each, runs", (
    (b"a\xffb", "a\ufffdb", "a\ufffdb"), (b"\xe3\x81", "\ufffd" * 2, "\ufffd"),
    (b"\xed\xa0\x80", "\ufffd" * 3, "\ufffd" * 3),
    (b"\xf0\x9f\x98.", "\ufffd" * 3 + ".", "\ufffd."),
    (b"\xf4\x90\x80\x80\xc3\xa9", "\ufffd" * 4 + "é", "\ufffd" * 4 + "é")))
def test_bytes_that_are_not_utf_8_become_u_fffd(data, each, runs, tokenizer):
    # SentencePiece shows each byte, tiktoken (as Python) each run that a character starts with.
    assert tokenizer("small").decode([3 + byte for byte in data]) == each
    assert tokenizer("ranks").decode([255 - byte for byte in data]) == runs
    assert Bytes().decode(list(data)) == runs


@pytest.mark.parametrize("name", MODELS)
def test_the_library_agrees_on_any_text_and_any_ids(name, tokenizer):
    encode, decode = library(name)
    ours, rng = tokenizer(name), random.Random(1)
    for text in (*map(clean, HARD), *fuzz(2000)):
        ids = ours.encode(text, bos=False)
        assert ids == encode(text), repr(text)
        assert ours.decode(ids) == decode(ids), repr(text)
    count = ours.vocab_size - (256 if name == "ranks" else 0)
    for _ in range(2000):
        ids = [rng.randrange(rng.choice((count, 259))) for _ in range(rng.randrange(12))]
        assert ours.decode(ids) == decode(ids), ids


@pytest.mark.skipif(not boolq(), reason="shared/data/boolq is not here")
@pytest.mark.parametrize("name", MODELS)
def test_the_library_agrees_on_all_of_boolq(name, tokenizer):
    encode, decode = library(name)
    for text in boolq():
        ids = tokenizer(name).encode(text, bos=False)
        assert ids == encode(text) and tokenizer(name).decode(ids) == text == decode(ids)


def test_start_end_and_sizes_are_the_models_own(tokenizer, tmp_path):
    ranks = tokenizer("ranks")
    count = len(small_ranks())
    assert (ranks.bos_id, ranks.eos_id, ranks.vocab_size) == (count, count + 1, count + 256)
    assert ranks.special == {"<|begin_of_text|>": count, "<|end_of_text|>": count + 1,
                             "<|start_header_id|>": count + 6, "<|end_header_id|>": count + 7,
                             "<|eot_id|>": count + 9}
    assert ranks.decode([count, ranks.ranks[b"a"], count + 9, count + 255]) == "a"
    assert all(i < count for text in ranks.special for i in ranks.encode(text, bos=False))
    swapped = write(tmp_path / "a.model", [("\u2581", 0.0, NORMAL)], {41: 2, 42: 1})
    assert (swapped.bos_id, swapped.eos_id, swapped.vocab_size) == (2, 1, 260)
    for each in (ranks, swapped, Bytes()):
        bare = each.encode("a b", bos=False)
        assert each.encode("a b") == [each.bos_id, *bare]
        assert each.encode("a b", eos=True) == [each.bos_id, *bare, each.eos_id]
        assert each.encode("", bos=False, eos=True) == [each.eos_id]


# --- by hand


def test_merge_takes_the_lowest_rank_and_the_leftmost_of_equals():
    assert merge(list("abab"), {"ab": 0, "abab": 1}) == ["abab"]
    assert merge(list("abc"), {"ab": 0, "bc": 0}) == ["ab", "c"]
    assert merge(list("abc"), {"ab": 1, "bc": 0, "abc": 2}) == ["abc"]
    assert merge(list("aaaaa"), {"aa": 0}) == ["aa", "aa", "a"]
    assert merge([], {}) == []


def slow_merge(parts, ranks):
    while True:
        unions = [a + b for a, b in zip(parts, parts[1:])]
        unions = [(ranks[union], i) for i, union in enumerate(unions) if union in ranks]
        if not unions:
            return parts
        i = min(unions)[1]
        parts = [*parts[:i], parts[i] + parts[i + 1], *parts[i + 2:]]


def test_merge_equals_a_search_of_all_pairs_at_each_step():
    rng = random.Random(0)
    for _ in range(500):
        ranks = {"".join(rng.choices("abc", k=rng.randrange(2, 6))): rng.randrange(9)
                 for _ in range(60)}
        parts = rng.choices("abc", k=rng.randrange(40))
        assert merge(list(parts), ranks) == slow_merge(parts, ranks)


def write(path, *model):
    path.write_bytes(sentencepiece_model(*model))
    return load_tokenizer(path)


def test_a_sentencepiece_model_worked_by_hand(tmp_path):
    # "abc": of b+c (-1) and a+b (-2) the first, then a+bc; "\u2581abc" is no piece, so that is all.
    pieces = [(text, score, NORMAL) for text, score in (
        ("ab", -2.0), ("bc", -1.0), ("abc", -3.0), ("\u2581ab", -4.0),     # ids 259 to 262
        ("\u2581", -9.0), ("a", -9.0))]
    model = write(tmp_path / "a.model", pieces)
    for text, wanted in (("abc", [263, 261]), ("ab", [262]), ("a", [263, 264]), ("", []),
                         ("a ab", [263, 264, 262]), (" ", [263, 263]), ("\u2581", [263, 263]),
                         ("ab\n", [262, 3 + 10]), ("é", [263, 3 + 0xC3, 3 + 0xA9]),
                         ("\ud800", [263, 3 + 0xEF, 3 + 0xBF, 3 + 0xBD])):
        assert model.encode(text, bos=False) == wanted, text
    assert model.decode([1, 263, 263, 264, 2]) == " a" and model.decode([263, 0]) == " \u2047 "
    assert model.decode([3 + 0x41, 263]) == "A " and model.decode([0, 263]) == " \u2047  "
    bare = write(tmp_path / "b.model", pieces, {}, {3: 0})       # no space put in front
    assert bare.encode("ab a", bos=False) == [259, 263, 264] and bare.decode([263, 264]) == " a"


def test_text_never_becomes_a_control_piece(tmp_path):
    model = write(tmp_path / "a.model", [("<s", -1.0, NORMAL), ("\u2581", -9.0, NORMAL)])
    assert model.encode("<s>", bos=False) == [260, 259, 3 + ord(">")]


def test_pieces_with_a_space_inside_are_found(tmp_path):
    pieces = [("b\u2581", -1.0, NORMAL), ("b\u2581a", -2.0, NORMAL), ("\u2581", -9.0, NORMAL),
              ("a", -9.0, NORMAL), ("b", -9.0, NORMAL)]
    model = write(tmp_path / "a.model", pieces)
    assert model.encode("ab a\nb b", bos=False) == [261, 262, 260, 13, 259, 263]
    assert write(tmp_path / "b.model", pieces[1:]).encode("b a", bos=False) == [260, 262, 260, 261]


def test_text_is_cut_as_llama_3_cuts_it():
    for wanted in (
            "it|'s|x| IT|'T|x|'Re|x|'vE|x|'M|x|'LL|x|'D|x", "don|\u2019t|'\u017f|s| '|\u017ft",
            "123|456|7| |12", " | a|  \n\n| b|\t|\tx|  ", "\n|y|\r|z", "!!\n\n|x| #?\r\n| \n",
            "a|\x1cb| \x1f\x1e| |\tc", "\xa0|\u3000w|\ufeffb", "a|\r\n \n|  | é|ⅷ½|_|²|日本",
            "e|\u0301a|\u0308\u0323"):
        assert train_llama.split_pattern().findall(wanted.replace("|", "")) == wanted.split("|")


# \p{L} and \p{N} of Unicode 16, which tiktoken has: how many, a digest of the sorted code points.
CLASSES = {"L": (141028, "e3d0f44a710ca4d1"), "N": (1911, "8016f3105be4a572")}
WHITE_SPACE = [*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029,
               0x202F, 0x205F, 0x3000]


def digest(codes):
    return len(codes), hashlib.sha256(repr(sorted(codes)).encode()).hexdigest()[:16]


@pytest.mark.skipif(int(unicodedata.unidata_version.split(".")[0]) > 16,
                    reason="this Python knows letters that tiktoken does not")
def test_letters_numbers_and_spaces_are_tiktoken_s_at_every_code_point():
    cut, kinds = train_llama.split_pattern().findall, collections.defaultdict(list)
    for code in (*range(0x40000), *range(0xE0000, 0xE1000)):     # the rest is not assigned
        kinds[tuple(map(len, cut(chr(code) * 4 + "x")))].append(code)
    assert kinds.keys() == {(5,), (3, 1, 1), (3, 2), (4, 1)}
    assert digest(kinds[5,]) == CLASSES["L"] and digest(kinds[3, 1, 1]) == CLASSES["N"]
    assert kinds[3, 2] == [code for code in WHITE_SPACE if code not in (10, 13)]


def test_the_lists_of_new_characters_are_whole_for_the_oldest_python():
    # Python 3.10 has Unicode 13: 131,241 letters, 1,781 numbers (counted with Perl's \p{Age}).
    for name, new, old in (("L", train_llama.NEW_LETTERS, 131241),
                           ("N", train_llama.NEW_NUMBERS, 1781)):
        ends = [[int(end, 16) for end in part.split("-")] for part in new.split()]
        assert old + sum(end[-1] - end[0] + 1 for end in ends) == CLASSES[name][0]


def test_letters_and_numbers_are_those_of_the_tiktoken_that_is_here():
    assert {name: digest(tiktoken_class(name)) for name in CLASSES} == CLASSES


def tiktoken_class(name):
    """Code points of \\p{L} or \\p{N}: tiktoken drops what its pattern does not match."""
    encoding = tiktoken_encoding(rf"\p{{{name}}}", {bytes([byte]): byte for byte in range(256)})
    every = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    return list(map(ord, encoding.decode(encoding.encode_ordinary(every))))


def test_bytes_need_no_file():
    assert Bytes().encode("hé\ud800") == [256, 104, 0xC3, 0xA9, 0xEF, 0xBF, 0xBD]
    assert Bytes().decode([256, 104, 0xC3, 0xA9, 257]) == "hé" and Bytes().vocab_size == 258


# --- bad files

BYTES = [bytes([byte]) for byte in range(256)]
LINES = rank_file([*BYTES, b"ab", b"abc"]).splitlines(keepends=True)
PLAIN = sentencepiece_model([("ab", 0.0, NORMAL)])
BAD = {
    "empty": (b"", "cut short"), "words": (b"no tokenizer\n", "neither"),
    "zip": (b"PK\3\4\0", "neither"), "json": (b'{"model": {}}', "neither"),
    "newlines": (b"\n\n\n", "neither"), "rank gap": (b"".join(LINES[:-2] + LINES[-1:]), "ranks"),
    "order": (b"".join(LINES[::-1]), "ranks"), "no byte": (rank_file(BYTES[:-1]), "byte"),
    "line twice": (b"".join(LINES + LINES[:1]), "ranks"),
    "token twice": (rank_file([*BYTES, b"ab", b"ab"]), "ranks"),
    "no rank": (b"".join(LINES) + b"YWI=\n", "neither"),
    "not base64": (b"*" + b"".join(LINES), "neither"),
    "unigram": (sentencepiece_model([], {3: 1}), "BPE"),
    "no fallback": (sentencepiece_model([], {35: 0}), "fallback"),
    "normaliser": (sentencepiece_model([], {}, {2: b"\0\1"}), "identity"),
    "white space": (sentencepiece_model([], {}, {4: 1}), "white space"),
    "white space by default": (sentencepiece_model([], {}, {4: None}), "white space"),
    "no escape": (sentencepiece_model([], {}, {5: 0}), "spaces"),
    "suffix": (sentencepiece_model([], {24: 1}), "spaces"),
    "user's": (sentencepiece_model([("ab", 0.0, USER_DEFINED)]), "user-defined"),
    "unused": (sentencepiece_model([("ab", 0.0, UNUSED)]), "unused"),
    "no end": (sentencepiece_model([], {42: 2 ** 64 - 1}), "end of text"),   # -1: there is none
    "start is a byte": (sentencepiece_model([], {41: 65}), "start"),
    "piece is a number": (PLAIN + field(1, 7), "neither"),
    "score is short": (PLAIN + field(1, field(1, b"x") + field(2, b"ab")), "neither"),
    "text is a number": (PLAIN + field(1, field(1, 7)), "neither"),
    "bytes absent": (PLAIN.replace(b"<0x41>", b"<0x4x>"), "neither"),
    "not utf-8": (PLAIN.replace(b"<unk>", b"<\xff\xff\xff>"), "neither")}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_by_name_in_one_line(case, tmp_path):
    data, word = BAD[case]
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(InputError) as error:
        load_tokenizer(tmp_path)
    text = str(error.value)
    assert str(tmp_path / "tokenizer.model") in text and word in text and "\n" not in text


def test_files_cut_short_are_refused_wherever_they_were_cut(tmp_path):
    whole, path = PLAIN, tmp_path / "tokenizer.model"
    # A rank file cut at the end of a line is one with fewer tokens: nothing tells.
    lines = b"".join(LINES)
    ends = {len(lines)} | {i + shift for i, c in enumerate(lines) for shift in (0, 1) if c == 10}
    for data, cuts in ((whole, [*range(0, len(whole), 41), *range(len(whole) - 40, len(whole))]),
                       (lines, set(range(len(lines) - 40, len(lines))) - ends)):
        path.write_bytes(data)
        load_tokenizer(path)
        for cut in cuts:
            path.write_bytes(data[:cut])
            with pytest.raises(InputError, match="tokenizer.model.*(cut short|damaged)"):
                load_tokenizer(path)


def test_damaged_files_raise_nothing_but_input_error(tmp_path):
    rng, path = random.Random(0), tmp_path / "tokenizer.model"
    for whole in (PLAIN, b"".join(LINES)):
        for _ in range(150):
            data = bytearray(whole)
            data[rng.choice((rng.randrange(len(data)), -rng.randrange(1, 40)))] = rng.randrange(256)
            path.write_bytes(data)
            try:
                load_tokenizer(path).encode("ab")
            except InputError as error:
                assert str(path) in str(error) and "\n" not in str(error)


def test_an_absent_file_is_named_with_what_to_do(tmp_path):
    for path in (tmp_path / "absent.model", tmp_path):
        with pytest.raises(InputError, match=f"{path}.*--tokenizer"):
            load_tokenizer(path)


if __name__ == "__main__":
    import textwrap
    for name in MODELS:
        rows = [" ".join(map(str, library(name)[0](clean(text)))) for text in HARD]
        print(textwrap.fill(" | ".join(rows), 100))
    print({name: digest(tiktoken_class(name)) for name in "LN"})
