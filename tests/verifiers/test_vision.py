"""Answers about images, layout and descriptions: what is right is called right."""

import importlib.util
from collections import Counter

import pytest
from conftest import invoke, read_jsonl

from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record, dump
from dlmctl.report.statistics import tally
from dlmctl.settings.prompts import Prompts
from dlmctl.tasks.scenes import Thing, describe
from dlmctl.tasks.sources import prompts
from dlmctl.verifiers.perception import grounding, layout
from dlmctl.verifiers.registry import verify
from dlmctl.verifiers.vqa import matches, normalised, number, vqa


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("red", "red"),
        ("The Red.", "red"),
        ("two dogs", "2 dogs"),
        ("Two", "2"),
        ("none", "0"),
        ("a  dog!", "the dog"),
        ("t-shirt", "t-shirt"),
        ("well-known", "well known"),
        ("don't", "dont"),
        ("3.0", "3"),
        ("1,200", "1200"),
        ("1/2", "0.5"),
        ("$5", "5"),
        ("50%", "50"),
        ("50^\\circ", "50"),
        ("−3", "-3"),
        ("A", "A"),
        ("(B)", "B"),
        ("b", "B"),
        ("C. 12 cm", "C"),
        ("\\text{blue}", "blue"),
        ("(1, 2)", "(1,2)"),
    ],
)
def test_answers_that_say_the_same_match(given, wanted):
    assert matches(given, wanted)
    assert vqa({"answer": wanted, "completion": f"so \\boxed{{{given}}}"}).reward == 1


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("", "red"),
        ("", ""),
        ("blue", "red"),
        ("red and blue", "red"),
        ("the", "a"),
        ("A", "B"),
        ("A cat", "A"),
        ("B.", "A"),
        ("3", "-3"),
        ("3.5", "35"),
        ("1.5", "15"),
        ("1/2", "1 2"),
        ("1/0", "1"),
        ("x+1", "x-1"),
        ("(1,2)", "(2,1)"),
        ("3 or 4", "3"),
        ("...", "?"),
    ],
)
def test_answers_that_differ_do_not_match(given, wanted):
    assert not matches(given, wanted)


def test_normalisation_and_numbers_by_hand():
    assert normalised("The quick, brown fox's tail.") == "quick brown foxs tail"
    assert normalised("a") == "a"
    assert normalised("Seven of 1,000.5!") == "7 of 1000.5"
    assert number("12 / 4") == 3
    assert number("12 apples") is None
    assert number(".") is None
    assert number("9" * 300) is None


def test_the_answer_is_taken_from_tags_box_or_text():
    for completion in ("4", "<answer>4</answer>", r"I see 3 and 1, so \boxed{4}.", "four."):
        assert vqa({"answer": 4, "completion": completion}).reward == 1
    wrong = vqa({"answer": 4, "completion": r"4 maybe \boxed{5}"})
    assert wrong.reward == 0
    assert wrong.detail["why"] == "wanted 4"


@pytest.mark.parametrize(("right", "reward"), [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (10, 1)])
def test_ten_people_are_a_share_of_three(right, reward):
    answers = [{"answer": "red", "answer_id": n} for n in range(right)]
    answers += [{"answer": f"other {n}"} for n in range(10 - right)]
    verdict = vqa({"answers": answers, "completion": "Red"})
    assert verdict.reward == pytest.approx(reward)
    assert verdict.detail["correct"] == (reward == 1)


def test_of_several_references_any_will_do():
    record = {"answers": ["couch", "sofa"], "completion": "the sofa"}
    assert vqa(record).reward == 1
    assert vqa({**record, "completion": "chair"}).reward == 0
    assert vqa({"answer": ["couch", 3], "completion": "3"}).reward == 1
    assert vqa({"answer": r"\boxed{B}", "completion": "(B)"}).reward == 1


@pytest.mark.parametrize("fields", [{}, {"answers": []}, {"answers": [None]}, {"answer": {}}])
def test_a_record_without_references_is_refused(fields):
    with pytest.raises(DataError):
        vqa({**fields, "completion": "x"})


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")
def test_latex_is_compared_by_value():
    assert matches(r"\frac{10}{4}", "2.5")
    assert matches(r"2\sqrt{2}", r"\sqrt{8}")
    assert not matches(r"2\sqrt{3}", r"\sqrt{8}")


def test_latex_that_the_package_is_missing_for_is_a_text(monkeypatch):
    from dlmctl.verifiers import vqa as module

    monkeypatch.setattr(module, "_has_math", lambda: False)
    assert matches(r"2 \sqrt{2}", r"2 \sqrt{2}")
    assert not matches(r"2\sqrt{2}", r"\sqrt{8}")


def test_words_and_broken_responses_are_not_given_to_algebra(monkeypatch):
    from dlmctl.verifiers import vqa as module

    monkeypatch.setattr(module, "math", lambda record: pytest.fail("asked"))
    assert not matches(r"\frac{1}{2}", "red")
    assert not matches(r"<think> 3 </think> \boxed{", "3")
    assert not matches("x^2 " * 100, "x^3")


SCENE = [
    Thing("red", "circle", "top", "left"),
    Thing("red", "circle", "top", "right"),
    Thing("blue", "star", "bottom", "center"),
]


def ground(text, scene=SCENE, **options):
    record = {"scene": [t._asdict() for t in scene], "completion": text}
    return grounding(record, **options)


def tagged(things):
    return f"<description> {describe(things)} </description>"


def test_grounding_is_one_for_the_scene_in_any_order():
    for order in (SCENE, SCENE[::-1]):
        verdict = ground(tagged(order))
        assert verdict.reward == 1
        assert verdict.detail == {"precision": 1, "recall": 1, "exact": True}


def test_grounding_is_f1_of_multisets():
    for said in (SCENE[:2], [SCENE[0]] * 3, [*SCENE, SCENE[0]], [SCENE[2]._replace(row="top")]):
        right = (Counter(said) & Counter(SCENE)).total()
        precision, recall = right / len(said), right / len(SCENE)
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        verdict = ground(tagged(said))
        assert verdict.reward == pytest.approx(f1)
        assert verdict.detail["precision"] == pytest.approx(precision)
        assert verdict.detail["recall"] == pytest.approx(recall)
        assert not verdict.detail["exact"]


def test_what_is_not_in_the_grammar_is_a_thing_that_is_not_there():
    text = tagged(SCENE).replace("</", ", and much more </")
    assert ground(text).detail["precision"] == pytest.approx(3 / 4)
    assert ground("<description> nothing at all </description>").reward == 0


@pytest.mark.parametrize("text", ["", "red circle top left", "<description> red circle top left"])
def test_without_a_description_there_is_no_grounding(text):
    verdict = ground(text)
    assert verdict.reward == 0
    assert verdict.detail["why"] == "no <description>"


@pytest.mark.parametrize("scene", [None, [], "x", [{"colour": "red"}], [3]])
def test_a_record_without_a_scene_is_refused(scene):
    with pytest.raises(DataError, match="scene"):
        grounding({"scene": scene, "completion": "x"})


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (r"<description> a </description> <think> b </think> \boxed{c}", 1),
        (r"<description>a</description>" + "\n" + r"<think>b</think>\boxed{c}<|im_end|> x", 1),
        (r"well: <description> a </description> <think> b </think> \boxed{c}", 0),
        (r"<description> a </description> <think> b </think> so \boxed{c}", 0),
        (r"<description> a </description> <think> b </think> c", 0),
        (r"<think> b </think> \boxed{c}", 0),
    ],
)
def test_layout_is_of_the_whole_completion(text, reward):
    verdict = layout({"completion": text})
    assert verdict.reward == reward
    assert "correct" not in verdict.detail  # accuracy is of answers


def shapes(count=12, **options):
    return list(prompts("shapes", Prompts(completions=True, **options), limit=count, seed=2))


def test_shapes_are_rewarded_for_answer_and_layout_and_measured_for_grounding():
    for record in verify(shapes()):
        assert record["rewards"] == {"vqa": 1, "layout": 1, "grounding": 1}
        assert record["reward"] == pytest.approx(1.0)
    for record in shapes():
        text = record["completion"]
        bare = Record({**record, "completion": text[text.index("<think>") :]})
        [done] = verify([bare])
        assert done["reward"] == pytest.approx(0.9)
        assert done["rewards"]["grounding"] == 0
        other = Record({**record, "completion": text.replace("boxed{", "boxed{not ")})
        [done] = verify([other])
        assert done["reward"] == pytest.approx(0.1)
        assert done["rewards"]["grounding"] == 1


@pytest.mark.parametrize("task", ["vqa", "geometry3k"])
def test_vqa_is_rewarded_for_the_answer_alone(task):
    [done] = verify([Record(task=task, answer="3", completion="three")])
    assert done["rewards"] == {"vqa": 1.0}
    assert done["reward"] == 1.0


def test_statistics_have_a_column_for_each_of_several_verifiers():
    records = shapes(8)
    for record in records[:4]:
        record["completion"] = record["completion"].replace("<description>", "")
    [row] = tally(verify(records), "task", [1], 0.95)
    assert row["accuracy"] == 1.0
    assert row["rewards.grounding"] == row["rewards.layout"] == 0.5
    assert row["reward"] == pytest.approx(0.95)
    [row] = tally(verify([Record(task="vqa", answer="3", completion="3")]), "task", [1], 0.95)
    assert not any(name.startswith("rewards.") for name in row)


def test_tags_of_other_names_and_statistics_by_kind(tmp_path):
    records = shapes(8)
    for record in records:
        record["completion"] = record["completion"].replace("description>", "see>")
    (tmp_path / "s.jsonl").write_bytes(b"".join(map(dump, records)))
    out = tmp_path / "v.jsonl"
    assert invoke("verify", tmp_path / "s.jsonl", "-o", out).exit_code == 0
    assert all(r["rewards"]["grounding"] == 0 for r in read_jsonl(out))
    line = ["--perception-tag", "see", "-o", out]
    assert invoke("verify", tmp_path / "s.jsonl", *line).exit_code == 0
    assert all(r["rewards"] == {"vqa": 1, "layout": 1, "grounding": 1} for r in read_jsonl(out))
    done = invoke("stats", out, "--by", "kind", "--image-free", out, "-o", tmp_path / "t.jsonl")
    assert done.exit_code == 0
    rows = read_jsonl(tmp_path / "t.jsonl")
    assert {row["task"] for row in rows} == {*(r["kind"] for r in records), "all"}
    assert all(row["rewards.grounding"] == 1 for row in rows)
    assert all(0 < row["image_free"] <= 1 for row in rows)


@pytest.mark.parametrize(
    "line",
    [["--perception-tag", "<see>"], ["--reasoning-tag", "description"], ["--reasoning-tag="]],
)
def test_names_of_tags_are_checked(line):
    done = invoke("verify", *line)
    assert done.exit_code == 2
    assert "-tag" in done.stderr
