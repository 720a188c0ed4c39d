"""Numbers and expressions mean the same however they are typeset."""

import random
import unicodedata

import pytest

from dlmctl.records.jsonl import Record
from dlmctl.verifiers.countdown import NotAnExpressionError, evaluate, find_expression
from dlmctl.verifiers.registry import verify
from dlmctl.verifiers.typography import plain

MINUS = [chr(code) for code in (*range(0x2010, 0x2016), 0x2212, 0xFE63, 0xFF0D)]
OTHERS = {
    "*": "×·∙⋅∗✕✖＊",
    "/": "÷∕⁄／",
    "+": "﹢＋",
    "(": "（",
    ")": "）",
    " ": "\u00a0\u2009\u202f\u200b",
}
ALPHABETS = [0x30, 0x660, 0x966, 0xFF10, 0x1D7CE]
"""The zeros of ASCII, Arabic, Devanagari, full-width and mathematical digits."""


def reward(task, text, **fields):
    [done] = verify([Record(completion=f"<answer>{text}</answer>", **fields)], [task])
    return done["reward"]


def typeset(text, draw):
    """The text with other signs of the same meaning for some of its own."""
    signs = {**OTHERS, "-": MINUS}
    zero = draw.choice(ALPHABETS)
    return "".join(
        chr(zero + int(c)) if c.isdecimal() else draw.choice([c, *signs.get(c, "")]) for c in text
    )


def test_the_signs_are_those_that_unicode_names_so():
    for sign in MINUS:
        assert any(word in unicodedata.name(sign) for word in ("HYPHEN", "DASH", "BAR", "MINUS"))
        assert (plain(f"{sign}5"), plain(f"8 {sign} 5").replace(" ", "")) == ("-5", "8-5")


def test_an_expression_typeset_has_the_same_value():
    draw = random.Random(0)
    for _ in range(2000):
        a, b, c, d = (str(draw.randint(1, 99)) for _ in range(4))
        p, q, r = (f"{draw.choice(['', ' '])}{draw.choice('+-*/')}" for _ in range(3))
        expression = draw.choice([f"{a}{p}{b}{q} ({c}{r} {d})", f"({a}{p}{b}){q}{c}{r} {d}"])
        try:
            value = evaluate(expression)
        except NotAnExpressionError:  # divides by zero
            continue
        assert evaluate(find_expression(typeset(expression, draw))) == value


@pytest.mark.parametrize("minus", ["-", *MINUS])
def test_every_minus_is_one(minus):
    numbers = {"numbers": [3, 5, 8], "target": 0}
    for task, text, fields in [
        ("gsm8k", f"{minus}5", {"answer": "-5"}),
        ("gsm8k", f"It is {minus}5.", {"answer": "-5"}),
        ("gsm8k", f"3 {minus} 8 = {minus}$5", {"answer": "-5"}),
        ("gsm8k", rf"{minus}2\frac{{1}}{{2}}", {"answer": "-2.5"}),
        ("gsm8k", rf"{minus}\frac{{1}}{{2}}", {"answer": "-0.5"}),
        ("gsm8k", "-5", {"answer": f"{minus}5"}),
        ("countdown", f"8{minus}5{minus}3", numbers),
        ("countdown", f"8 {minus} (5+3) = 0", numbers),
        ("math", f"{minus}5", {"answer": "-5"}),
        ("math", "[-2,7]", {"answer": f"[{minus}2,7]"}),
        ("vqa", f"{minus}5", {"answer": "-5"}),
        ("vqa", f"{minus}$5", {"answer": "-5"}),
        ("vqa", f"5{minus}10", {"answer": "5-10"}),
    ]:
        assert reward(task, text, **fields) == 1, (task, text)


@pytest.mark.parametrize("dash", MINUS)
def test_a_dash_between_words_or_numbers_is_no_sign(dash):
    assert reward("gsm8k", f"the answer{dash}5", answer="5") == 1
    assert reward("gsm8k", f"pages 3{dash}5", answer="5") == 1
    if dash in "‒–—―":
        assert reward("gsm8k", f"{dash} 5 apples", answer="5") == 1
        assert reward("countdown", f"Thus {dash} 8-5-3", numbers=[3, 5, 8], target=0) == 1


def test_a_hyphen_is_no_sign_behind_a_number():
    assert reward("gsm8k", "10-5", answer="5") == 1
    assert reward("gsm8k", "10-5", answer="-5") == 0


@pytest.mark.parametrize("task", ["gsm8k", "math", "vqa"])
@pytest.mark.parametrize(
    "text",
    [
        *("1,234", r"1\,234", "1{,}234", "1\u00a0234", "1\u2007234", "1\u2009234", "1\u202f234"),
        *("１２３４", "１，２３４", "$1234", r"\$1234", "＄1234", "1234%", r"1234\%", "１２３４％"),
    ],
)
def test_a_number_may_have_thousands_a_currency_and_a_percent_sign(task, text):
    assert reward(task, text, answer="1234") == 1
    assert reward(task, text, answer="234") == 0


def test_spaces_set_thousands_apart_and_nothing_else():
    for text in ("12\u00a034", "1\u00a02345", "1234\u00a0567", "1.5\u00a0234"):
        assert plain(text) == text.replace("\u00a0", " ")
    assert plain("1\u00a0234\u00a0567\u00a0m") == "1234567 m"


def test_a_grid_of_other_digits_is_a_grid():
    puzzle, grid = "0031102001033400", "4231132421433412"
    for zero in ALPHABETS:
        for between in ("", " ", "\u00a0", "\u2009", "，"):
            text = between.join(chr(zero + int(c)) for c in grid)
            assert reward("sudoku", text, puzzle=puzzle) == 1
            assert reward("sudoku", f"\\boxed{{}} So:\n{text}\n", puzzle=puzzle) == 1


def test_a_letter_may_be_full_width():
    assert reward("choice", "（Ｂ）", answer="B") == 1
    assert reward("vqa", "（Ｂ）", answer="B") == 1
