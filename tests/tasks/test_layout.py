"""The layout of responses: spans that are right to the character, and nothing that hangs."""

import time

import pytest

from dlmctl.settings.layout import Tags
from dlmctl.tasks.boxes import last_box, last_boxed
from dlmctl.tasks.layout import layout

WHOLE = r"<description> a red dog </description> <think> one dog </think> \boxed{1}"


def spans(text, **tags):
    found = layout(text, Tags(**tags))
    return None if found is None else [text[a:b] for a, b in found[:3]]


def test_spans_are_the_inner_texts_and_the_whole_answer():
    assert spans(WHOLE) == [" a red dog ", " one dog ", r"\boxed{1}"]
    assert layout(WHOLE).alone
    tight = WHOLE.replace(" ", "")
    assert spans(tight) == ["areddog", "onedog", r"\boxed{1}"]
    assert layout("\n" + tight + "\n").alone


def test_other_names_of_tags_can_be_given():
    text = WHOLE.replace("description", "see").replace("think", "reason-it")
    assert layout(text) is None
    assert spans(text, perception="see", reasoning="reason-it") == spans(WHOLE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<description>", ""),
        ("</description>", ""),
        ("<think>", ""),
        ("</think>", ""),
        (r"\boxed{1}", ""),
        (r"\boxed{1}", r"\boxed{ }"),
        (r"\boxed{1}", r"\boxed{1"),
        (" a red dog ", " "),
        (" one dog ", "\n"),
        ("<think>", "<think><think>"),
        ("</think>", "</think></think>"),
        ("a red dog", "a <description> dog"),
        ("a red dog", "a <think> dog"),
        (r"\boxed{1}", r"<description> more </description> \boxed{1}"),
        ("<description> a red dog </description>", "</description> a red dog <description>"),
        ("one dog </think> ", r"one dog \boxed{1} </think> end "),
    ],
)
def test_what_is_malformed_has_no_layout(old, new):
    text = WHOLE.replace(old, new)
    if "end" in new:
        text = text.removesuffix(r"\boxed{1}")
    assert text != WHOLE
    assert layout(text) is None


def test_parts_in_the_other_order_and_one_within_the_other_are_malformed():
    think, see = "<think> b </think>", "<description> a </description>"
    assert layout(f"{see} {think} \\boxed{{1}}") is not None
    assert layout(f"{think} {see} \\boxed{{1}}") is None
    assert layout(f"<description> a {think} </description> \\boxed{{1}}") is None
    assert layout("<description> a <think> b </description> c </think> \\boxed{1}") is None


@pytest.mark.parametrize("place", [0, WHOLE.index(" <think>"), WHOLE.index("\\"), len(WHOLE)])
def test_text_outside_keeps_the_spans_and_is_noticed(place):
    text = WHOLE[:place] + " hm, " + WHOLE[place:]
    assert spans(text) == spans(WHOLE)
    assert not layout(text).alone


def test_the_last_box_behind_the_reasoning_is_the_answer():
    text = WHOLE.replace("one dog", r"\boxed{7}") + r" no, \boxed{\frac{1}{2}}"
    assert spans(text)[2] == r"\boxed{\frac{1}{2}}"


def by_hand(text):
    """The last box that is closed, by counting braces anew from each: quadratic, and plain."""
    starts = [n for n in range(len(text)) if text.startswith(r"\boxed{", n)]
    for start in reversed(starts):
        depth = 0
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0 and text[end] == "}":
                return text[start : end + 1]
    return None


def test_the_last_box_is_found_as_by_counting_braces():
    import random

    draw = random.Random(0)
    parts = [r"\boxed{", "{", "}", "}", "x"]
    found = 0
    for _ in range(3000):
        text = "".join(draw.choices(parts, k=draw.randint(1, 9)))
        box, wanted = last_box(text), by_hand(text)
        assert (None if box is None else text[box.start : box.end]) == wanted
        found += wanted is not None
    assert found > 500
    assert last_boxed(r"\boxed{a \fbox {b}}") == "b"
    assert last_box(r"\boxed{1} x", 2) is None


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 100_000,
        WHOLE.removesuffix("}") + r"\boxed{" * 100_000,
        "<description>" * 100_000,
        "<description> a </description> <think> b </think>" + " " * 1_000_000,
        "{" * 1_000_000 + "}" * 1_000_000,
    ],
)
def test_long_hostile_texts_take_no_time(text):
    begun = time.process_time()
    assert layout(text) is None
    assert last_boxed(text) is None
    assert time.process_time() - begun < 2.0
