"""train_llava.py: VQA accuracy and CIDEr against their official implementations.

The expected values are what the official programs print for these inputs: VQA's
PythonEvaluationTools/vqaEvaluation/vqaEval.py (GT-Vision-Lab/VQA, commit a013f00, its print
statements removed), called with one question at a time, and pycocoevalcap's cider/cider_scorer.py
(salaniz/pycocoevalcap, commit ad63453), `CiderScorer(n=4, sigma=6.0)`, `scorer += (candidate,
references)` for each, `scorer.compute_score()[0]`."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from train_llava import CONTRACTIONS, cider, normalise, vqa_accuracy

# expected accuracy, answer => references; "|" separates references, " x3" is three of them
VQA = r"""
1.0000  yes => yes x9 | no
0.9000  yes. => yes x3 | no x7
0.6000  yes! => yes x2 | no x8
1.0000  the dog => dog x4 | cat x6
0.6000  dogs => dog x8 | dogs x2
1.0000  two => 2 x8 | two | three
1.0000  none => 0 x5 | zero x3 | nothing x2
1.0000  1,000 => 1000 x5 | 1,000 x4 | many
1.0000  red, white => red white x5 | red x5
1.0000  red,white, blue => redwhiteblue x4 | redwhite blue x4 | red white blue x2
1.0000  red/white => red white x5 | red/white x3 | white x2
1.0000  t-shirt => t shirt x4 | tshirt x3 | t-shirt x3
1.0000  "hello" => hello x6 | "hello" x4
1.0000  what? => what x5 | what ? x5
1.0000  $5.00 => 5.00 x5 | $5.00 x5
1.0000  3. => 3 x6 | 3. x4
1.0000  u.s.a. => usa x4 | u.s.a. x6
1.0000  .5 => .5 x4 | 5 x6
1.0000  dont => don't x5 | dont x3 | do not x2
0.9000  cant => can't x3 | cannot x7
1.0000  couldnt've => couldn't've x5 | could x5
0.0000  couldntve => couldn't've x5 | could x5
1.0000  somebody'd => somebodyd x5 | somebody'd x3 | who x2
1.0000  3 oclock => 3 o'clock x6 | three oclock x4
1.0000  ow's'at => 'ow's'at x5 | what x5
1.0000  yall'd've => y'all'd've x5 | you x5
1.0000  new   york => new york x9 | york
1.0000  a@b => a b x5 | ab x5
1.0000  a => a x5 | the x5
1.0000  => a x4 | the x2 | yes x4
1.0000  an apple; a pear => apple pear x4 | apple; pear x3 | pear x3
0.3000  blue => red x2 | blue x1 | green x7
0.4444  red => red | red | blue
"""


def parse(line):
    answer, _, references = line[8:].partition("=> ")
    pairs = [re.fullmatch(r"(.*?)(?: x(\d+))?", part).groups() for part in references.split(" | ")]
    return float(line[:6]), answer[:-1], [text for text, n in pairs for _ in range(int(n or 1))]


@pytest.mark.parametrize("score, answer, references", list(map(parse, VQA.strip("\n").split("\n"))))
def test_vqa_accuracy_is_the_official_one(score, answer, references):
    assert vqa_accuracy(answer, references) == pytest.approx(score, abs=1e-4)


def test_leave_one_out_by_hand():
    """Three of ten agree: those who leave one of the three out see two, 2/3; the others see 3."""
    assert vqa_accuracy("x", ["x"] * 3 + ["y"] * 7) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa_accuracy("x", ["x"]) == 0                   # nobody is left to agree
    # Unanimous references: the one place where the official script compares texts as they are.
    assert vqa_accuracy("The Dog!", ["dog"] * 10) == 1 == vqa_accuracy("dog", ["A dog."] * 10)


@pytest.mark.parametrize("text, expected", [
    ("The two dogs.", "2 dogs"), ("no\tway\nout", "no way out"),
    ("1,000 men, women", "1000 men women"), ("somebody'd", "somebodyd"),
    ("Shouldntve", "shouldntve"), ("wouldn'tve", "wouldn't've"), ("3.14", "3.14"),
    ("3. 14", "3 14"), (". " * 40 + "x", ". . . . . . . . x")])
def test_normalise(text, expected):
    assert normalise(text) == expected


def test_every_contraction_is_repaired():
    for word in CONTRACTIONS:
        assert normalise(word.replace("'", "", 1)) == word
    assert normalise("cannot hes im") == "cannot he's im"


CIDER = {
    "plain": (3.4819990214111183, ["a man rides a horse", "two dogs play in the snow",
                                   "a red bus on a street"],
              [["a man riding a horse", "a man rides a brown horse on grass", "man on a horse"],
               ["two dogs playing in snow", "two dogs play in the snow together"],
               ["a red double decker bus drives down a street", "a bus"]]),
    "empty": (2.0003072512153364, ["", "a cat", "dog"],
              [["a cat sits"], ["a cat"], ["a dog runs fast today"]]),
    "one picture: no n-gram is rarer than another": (
        0.0, ["a cat sits on a mat"], [["a cat sits on a mat", "the cat"]]),
    "repeats": (1.1248662635942939, ["the the the the the", "cat cat dog", "b"],
                [["the cat the"], ["cat dog", "cat"], ["b b b b b b b b b b b b b b b"]]),
    "shared": (4.228899521458647, ["a b c d e", "a b c d e", "a b c d f", "g"],
               [["a b c d e"], ["a b c d e f g h"], ["e d c b a"], ["g", "g g"]]),
    "spaces and case": (2.633363477044882, ["  a\ttall  tree ", "A tall tree ."],
                        [["a tall tree"], ["a tall tree .", "A tall tree"]])}


@pytest.mark.parametrize("name", CIDER)
def test_cider_is_the_official_one(name):
    expected, candidates, references = CIDER[name]
    assert cider(candidates, references) == pytest.approx(expected, abs=1e-6)


def test_cider_by_hand():
    """Two pictures of one word each: n = 1 gives cosine 1, n = 2, 3, 4 give 0, so each scores
    10 / 4; a wrong word scores nothing. A candidate that says it twice: clipped to the reference,
    its norm twice as large; it has one 2-gram, the reference none: the penalty is exp(-1 / 72)."""
    assert cider(["cat", "dog"], [["cat"], ["dog"]]) == pytest.approx(2.5)
    assert cider(["dog", "dog"], [["cat"], ["dog"]]) == pytest.approx(1.25)
    assert cider(["cat cat", "dog"], [["cat"], ["dog"]]) == pytest.approx(
        (2.5 / 2 * math.exp(-1 / 72) + 2.5) / 2)


def test_cider_is_the_same_to_the_last_bit_in_every_process():
    """Python hashes strings anew in each, so the order of a set would show in the rounding."""
    program = """if True:
        from train_llava import cider
        texts = [" ".join(f"w{i * i * j % (7 + i)}" for j in range(1, 9 + i % 9))
                 for i in range(1, 60)]
        wanted = [[a[3:], b[:40]] for a, b in zip(texts, texts[1:] + texts[:1])]
        print([cider(texts[:n], wanted[:n]) for n in range(2, 60)])"""
    root = str(Path(__file__).parents[1])
    found = {subprocess.run([sys.executable, "-c", program], cwd=root, text=True, check=True,
                            env=dict(os.environ, PYTHONHASHSEED=str(seed)),
                            stdout=subprocess.PIPE).stdout for seed in (1, 2)}
    assert len(found) == 1


@pytest.mark.parametrize("score, given, references", [
    (vqa_accuracy, "x", []), (cider, ["a"], []), (cider, [], []), (cider, ["a"], [[]])])
def test_scores_need_references(score, given, references):
    with pytest.raises(ValueError, match="reference"):
        score(given, references)
