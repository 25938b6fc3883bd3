"""How fast the tokenizers of train_llama.py are, beside the libraries of their formats.

    python tests/bench_tokenizer.py [--tokenizer PATH ...] [--text PATH]

Prints kB of UTF-8 a second on one core, for each tokenizer.model given. By default: Llama 2's in
shared/data, and a rank file in Llama 3's format made of its pieces (without shared/data: two small
ones learned from the text). The text is a file's lines; by default BoolQ's distinct texts, or
this repository's own files. Columns:

    first pass   by a tokenizer just loaded: its memory of words is empty
    again        the same texts a second time
    no memory    each word worked out anew, as if all text were new to it
    hard         short texts of random characters of all scripts, first pass
    decode       back to text, of the same text and of the hard one

"same" tells whether the ids of all texts are the library's. The libraries are optional.
"""

import argparse
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from test_tokenizer import (LLAMA2, LLAMA3_SPLIT, NORMAL, boolq, fuzz, learn, rank_file,
                            sentencepiece_model)
from train_llama import SentencePiece, load_tokenizer

COLUMNS = ("first pass", "again", "no memory", "hard", "decode", "decode hard")


def read_texts(path: str | None) -> list[str]:
    """Distinct lines or texts, none empty."""
    root = Path(__file__).parents[1]
    files = [Path(path)] if path else [*root.glob("*.py"), *root.glob("*.md")]
    texts = [] if path else boolq()
    texts = texts or [line for file in files for line in file.read_text("utf-8").splitlines()]
    return [text for text in dict.fromkeys(texts) if text]


def make_files(folder: Path, texts: list[str]) -> list[Path]:
    """A SentencePiece model and a rank file, when the user names none."""
    if LLAMA2.is_file():
        model = load_tokenizer(LLAMA2)
        tokens = [text.replace("\u2581", " ") for text in model.ids]
    else:
        words = Counter(re.findall(" ?[^ \n]+", "\n".join(texts[:2000])))
        tokens = learn([word for word, _ in words.most_common(2000)], 300)
        pieces = dict.fromkeys(token.replace(" ", "\u2581") for token in tokens)
        (folder / "sentencepiece.model").write_bytes(sentencepiece_model(
            [(text, -float(i), NORMAL) for i, text in enumerate([*pieces, "\u2581"])]))
    ranks = dict.fromkeys([*(bytes([byte]) for byte in range(256)), *map(str.encode, tokens)])
    (folder / "ranks.model").write_bytes(rank_file(ranks))
    return [LLAMA2 if LLAMA2.is_file() else folder / "sentencepiece.model", folder / "ranks.model"]


def ours(path: Path, memory: bool = True):
    """(encode, decode) of a tokenizer just loaded."""
    tokenizer = load_tokenizer(path)
    if not memory:
        tokenizer.ids_of = tokenizer.encode_chunk
    return (lambda text: tokenizer.encode(text, bos=False)), tokenizer.decode


def theirs(path: Path):
    """(name, encode, decode) of the library of the file's format."""
    tokenizer = load_tokenizer(path)
    if isinstance(tokenizer, SentencePiece):
        import sentencepiece
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return f"sentencepiece {sentencepiece.__version__}", model.encode, model.decode
    import tiktoken
    model = tiktoken.Encoding("bench", pat_str=LLAMA3_SPLIT, mergeable_ranks=tokenizer.ranks,
                              special_tokens={})
    return f"tiktoken {tiktoken.__version__}", model.encode_ordinary, model.decode


def timed(function, items: list, kilobytes: float) -> tuple[float, list]:
    """(kB a second, results)"""
    start = time.perf_counter()
    results = [function(item) for item in items]
    return kilobytes / (time.perf_counter() - start), results


def measure(encode, decode, anew, texts: list[str], hard: list[str]) -> tuple[list, list]:
    """Figures in the order of COLUMNS, and the ids of all texts. The order counts: the first pass
    must be the first thing that `encode` does. `anew` is an encode without memory, or None."""
    kilobytes, hard_kilobytes = size(texts), size(hard)
    first, ids = timed(encode, texts, kilobytes)
    again, _ = timed(encode, texts, kilobytes)
    rare, hard_ids = timed(encode, hard, hard_kilobytes)
    figures = [first, again, timed(anew, texts, kilobytes)[0] if anew else None, rare,
               timed(decode, ids, kilobytes)[0], timed(decode, hard_ids, hard_kilobytes)[0]]
    return figures, ids + hard_ids


def size(texts: list[str]) -> float:
    """kB of UTF-8"""
    return sum(len(text.encode()) for text in texts) / 1e3


def show(name: str, cells) -> None:
    print(f"{name:22}" + "".join(f"{cell:>13}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", nargs="+", type=Path, help="tokenizer.model files")
    parser.add_argument("--text", help="a text file in UTF-8")
    args = parser.parse_args()
    texts, hard = read_texts(args.text), list(fuzz(5000))
    print(f"text: {len(texts):,} texts, {size(texts):,.0f} kB; "
          f"hard: {len(hard):,} texts, {size(hard):,.0f} kB; kB/s, one core")
    show("", [*COLUMNS, "same"])
    with tempfile.TemporaryDirectory() as folder:
        for path in args.tokenizer or make_files(Path(folder), texts):
            path = path / "tokenizer.model" if path.is_dir() else path
            figures, ids = measure(*ours(path), ours(path, memory=False)[0], texts, hard)
            print(path.name)
            show("train_llama.py", [*(f"{figure:,.0f}" for figure in figures), ""])
            try:
                name, *library = theirs(path)
            except ImportError as error:
                print(f"{error.name} is not installed: nothing to compare with")
                continue
            figures, wanted = measure(*library, None, texts, hard)
            show(name, [*(f"{figure:,.0f}" if figure else "" for figure in figures),
                        "yes" if ids == wanted else "NO"])


if __name__ == "__main__":
    main()
