"""Multiple choice: the letter that is meant, however it is said; the published patterns agree."""

import re
import time

import pytest

from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record
from dlmctl.verifiers.choices import choice
from dlmctl.verifiers.registry import verify

CITIES = ["London", "Paris", "A city", "Rome"]


def chosen(completion, **fields):
    return choice({"answer": "A", "completion": completion, **fields}).detail["choice"]


# Published patterns: OpenAI simple-evals (common.py), lm-eval's mmlu_pro (take_first), and the last
# resort of MMLU-Pro's own evaluation.
SIMPLE_EVALS = re.compile(r"(?i)Answer[ \t]*:[ \t]*\$?([A-D])\$?")
MMLU_PRO = re.compile(r"answer is \(?([ABCDEFGHIJ])\)?")
LAST_ALONE = re.compile(r"\b[A-J]\b(?!.*\b[A-J]\b)", re.DOTALL)

SAID = {
    "Answer: B": "B",
    "Answer: $B$": "B",
    "Let me think. 2+2=4.\n\nAnswer: C": "C",
    "ANSWER:D": "D",
    "answer: b": "B",
    "Some A and B are possible.\nAnswer : D.": "D",
    "Answer:\tA\n": "A",
    "The answer is (B).": "B",
    "the answer is J": "J",
    "Step by step, we get 5. The answer is (H).\n": "H",
    "The correct answer is C, since B is too small": "C",
    "Therefore, the answer is (A) because it is right.": "A",
    "It cannot be B.\n\nC": "C",
    "I would go with D": "D",
    "(E)": "E",
}


def published(text):
    for pattern in (SIMPLE_EVALS, MMLU_PRO):
        if found := pattern.search(text):
            return found[1].upper()
    found = LAST_ALONE.search(text)
    return found[0] if found else None


@pytest.mark.parametrize("text", SAID)
def test_the_published_patterns_find_the_same_letter(text):
    assert chosen(text) == published(text) == SAID[text]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("<answer>B</answer>", "B"),
        ("<answer>\n(b)\n</answer>", "B"),
        ("<answer>A</answer> no, <answer>B</answer>", "B"),
        ("<answer>B. Paris</answer>", "B"),
        ("<answer>A because it is warm</answer>", "A"),
        (r"so it is \boxed{B}", "B"),
        (r"\boxed{\text{(C)}}", "C"),
        (r"$\boxed{\textbf{D}}$", "D"),
        ("**Answer: B**", "B"),
        ("The answer is **(B) Paris**.", "B"),
        ("Answer: Option C", "C"),
        ("The best answer would be B", "B"),
        ("B) 42", "B"),
        ("B", "B"),
        ("b.", "B"),
        ("The answer is B. Wait, no: the answer is C.", "C"),
        ("Option A is wrong, option B is wrong. The answer is C. I had considered option D.", "C"),
        ("A train leaves at noon. The answer is B", "B"),
        ("A train leaves at noon.", None),
        ("I am not sure", None),
        ("the answer is a number", None),
        ("It's D's turn", None),
        ("The answer is 42", None),
        ("", None),
        ("Ⓑ", None),
        ("The answer is Ｂ", "B"),
    ],
)
def test_letters_are_found_where_they_are_meant(text, letter):
    assert chosen(text) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Paris", "B"),
        ("<answer>paris.</answer>", "B"),
        ("<answer>A city</answer>", "C"),
        ("The answer is Paris.", "B"),
        ("The answer is: **Rome**, of course", "D"),
        ("The answer is E", None),
    ],
)
def test_a_choice_may_be_named_by_its_text(text, letter):
    assert chosen(text, choices=CITIES) == letter


@pytest.mark.parametrize("answer", ["B", "b", "(B)", " B. ", 1, "Paris", "paris"])
def test_the_right_choice_is_a_letter_an_index_or_a_text(answer):
    for text, right in (("Answer: B", 1.0), ("Answer: C", 0.0), ("nothing", 0.0)):
        assert choice({"answer": answer, "choices": CITIES, "completion": text}).reward == right


def test_the_labels_of_arc_are_read():
    choices = {"text": ["ice", "steam", "rock"], "label": ["1", "2", "3"]}
    for text in ("The answer is 2", "steam", "(2)"):
        assert choice({"answer": "2", "choices": choices, "completion": text}).reward == 1
    assert choice({"answer": "2", "choices": choices, "completion": "2.5"}).reward == 0
    letters = {"text": ["ice", "steam"], "label": ["A", "B"]}
    assert choice({"answer": "B", "choices": letters, "completion": "Answer: B"}).reward == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": 4, "choices": CITIES}, "is no index"),
        ({"answer": -1, "choices": CITIES}, "is no index"),
        ({"answer": "E", "choices": CITIES}, "none of the choices"),
        ({"answer": "Berlin", "choices": CITIES}, "none of the choices"),
        ({"answer": "1234"}, "none of the choices"),
        ({"answer": "B", "choices": ["B", "A"]}, "more than one"),
        ({"answer": "x", "choices": ["x", "X"]}, "more than one"),
        ({"answer": ["B"]}, "expected a letter"),
        ({"answer": True}, "expected a letter"),
        ({"answer": 1.0}, "expected a letter"),
        ({"answer": "B", "choices": "AB"}, "not a list"),
        ({"answer": "B", "choices": ["one"]}, "not a list"),
        ({"answer": "B", "choices": [["one"], {"two": 2}]}, "not a list"),
        ({"answer": "B", "choices": list(map(str, range(27)))}, "not a list"),
        ({"answer": "B", "choices": {"text": ["x", "y"], "label": ["A", "A"]}}, "labels"),
        ({"answer": "B", "choices": {"text": ["x", "y"], "label": ["A", "]"]}}, "labels"),
        ({"answer": None}, "'answer' is missing"),
    ],
)
def test_what_is_no_choice_is_said(fields, message):
    with pytest.raises(DataError, match=message):
        choice({"completion": "Answer: B", **fields})


@pytest.mark.parametrize(
    "text",
    [
        "answer" + " " * 1_000_000 + "B",
        "answer is " * 100_000,
        "(" * 1_000_000,
        "A " * 500_000,
        "\\boxed{" * 100_000,
        "\\text" * 200_000,
        "option " * 100_000,
        "\0" * 1_000_000,
        "answer:" + "\n" * 1_000_000,
        "".join(map(chr, range(0x20, 0xD800))),
    ],
)
def test_long_and_strange_texts_take_linear_time(text):
    begin = time.process_time()
    verdict = choice({"answer": "B", "choices": CITIES, "completion": text})
    assert time.process_time() - begin < 5
    assert verdict.reward in (0.0, 1.0)


def test_the_stage_judges_it_by_name():
    record = Record({"completion": "The answer is (B)", "answer": 1, "choices": CITIES})
    [done] = verify([record], ["choice"])
    assert (done["reward"], done["verdict"]["choice"]["choice"]) == (1.0, "B")
