"""Drawn scenes: the image shows the scene, the answer follows from it, the question alone tells
nothing."""

import re
from collections import Counter, defaultdict
from itertools import islice, product

import pytest
from conftest import invoke, read_jsonl

from dlmctl.records.jsonl import Record
from dlmctl.report.image_free import IMAGE_FREE, frequent_answers, with_image_free
from dlmctl.settings.prompts import KINDS, Prompts
from dlmctl.tasks.drawing import PAINTS, Look, draw_scene
from dlmctl.tasks.images import load_image
from dlmctl.tasks.layout import layout
from dlmctl.tasks.scenes import (
    COLOURS,
    COLUMNS,
    ROWS,
    SHAPES,
    Thing,
    describe,
    described,
    split_of,
)
from dlmctl.tasks.shapes import MOST, problems
from dlmctl.tasks.sources import prompts
from dlmctl.verifiers.perception import grounding

SPLITS = ("train", "test")


@pytest.fixture(scope="module")
def made():
    return {split: list(islice(problems(split, seed=1), 4000)) for split in SPLITS}


def number(question, scene):
    """The answer to "how many ...", by reading the words of the question."""
    total = 0
    for part in question.removesuffix("?").split(" plus "):
        words = {word.removesuffix("s") for word in part.removeprefix("how many ").split()}
        total += sum(words <= {thing.colour, thing.shape} for thing in scene)
    return str(total)


def place(question, scene):
    asked, other = re.fullmatch(r"where is the (.+) from the (.+)\?", question).groups()
    [one] = [t for t in scene if f"{t.colour} {t.shape}" == asked]
    [two] = [t for t in scene if f"{t.colour} {t.shape}" == other]
    if one.row == two.row:
        return "left" if COLUMNS.index(one.column) < COLUMNS.index(two.column) else "right"
    assert one.column == two.column
    return "above" if ROWS.index(one.row) < ROWS.index(two.row) else "below"


def colour(question, scene):
    [shape] = re.fullmatch(r"what colour is the (.+)\?", question).groups()
    [thing] = [t for t in scene if t.shape == shape]
    return thing.colour


ANSWERS = {"count": number, "sum": number, "position": place, "colour": colour}


@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_from_scenes(made, split):
    for problem in made[split]:
        assert problem.answer == ANSWERS[problem.kind](problem.question, problem.scene)
        assert 2 <= len(problem.scene) <= 5
        cells = [(ROWS.index(t.row), COLUMNS.index(t.column)) for t in problem.scene]
        assert cells == sorted(set(cells))  # reading order, none twice


def test_no_composition_is_on_both_sides(made):
    sides = [
        {tuple(sorted((t.colour, t.shape) for t in p.scene)) for p in made[split]}
        for split in SPLITS
    ]
    assert not sides[0] & sides[1]
    assert all(len(side) > 1000 for side in sides)
    assert all(split_of((t.colour, t.shape) for t in p.scene) == "test" for p in made["test"])


def test_given_one_attribute_of_a_thing_both_sides_are_as_open():
    rest = [("red", "star"), ("blue", "circle")]
    for given in (*COLOURS, *SHAPES):
        kinds = [kind for kind in product(COLOURS, SHAPES) if given in kind]
        assert Counter(split_of([*rest, kind]) for kind in kinds) == {"test": 1, "train": 3}
    # What matters is which colour goes with which shape, not each alone.
    assert split_of([("red", "circle"), ("green", "square")]) == "test"
    assert split_of([("red", "square"), ("green", "circle")]) == "train"


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_uniform_for_each_kind_and_form_of_question(made, split):
    counts = defaultdict(Counter)
    for problem in made[split]:
        counts[problem.kind][problem.answer] += 1
    assert set(counts) == set(KINDS)
    for kind, answers in counts.items():
        total = sum(answers.values())
        expected = total / (MOST[kind] + 1 if kind in MOST else 4)
        assert total == pytest.approx(1000, abs=120)
        # Pearson's statistic has mean (answers - 1); 30 is far out for up to seven of them.
        assert sum((n - expected) ** 2 / expected for n in answers.values()) < 30, (kind, answers)
        assert len(answers) == (MOST[kind] + 1 if kind in MOST else 4)


def test_the_question_alone_answers_at_chance():
    train = list(_records("train", 6000))
    accuracy = image_free_accuracy(train, _records("test", 4000))
    chance = {"count": 1 / 5, "sum": 1 / 7, "colour": 1 / 4, "position": 1 / 4}
    assert accuracy == pytest.approx(chance, abs=0.05)
    # The measure itself can see more: on what it was taken from, rare questions give it away.
    seen = image_free_accuracy(train[:300], train[:300])
    assert seen["position"] > 0.7


def image_free_accuracy(train, test, by="kind"):
    """The accuracy of the most frequent answers for each value of the field `by`."""
    right = defaultdict(list)
    for record in with_image_free(test, frequent_answers(train)):
        right[str(record.get(by))].append(record[IMAGE_FREE])
    return {name: sum(each) / len(each) for name, each in right.items()}


def _records(split, count):
    for problem in islice(problems(split, seed=3), count):
        yield Record(prompt=problem.question, kind=problem.kind, answer=problem.answer)


def test_image_free_answers_by_hand():
    rows = [("q", "a"), ("q", "a"), ("q", "b"), ("r", "b"), ("r", "b")]
    train = [{"prompt": q, "answer": a} for q, a in rows]
    assert frequent_answers(train) == {"q": "a", "r": "b", "": "b"}
    test = [Record(prompt=q, answer=a) for q, a in [("q", "a"), ("q", "b"), ("new", "b")]]
    assert image_free_accuracy(train, test)["None"] == pytest.approx(2 / 3)


def test_completions_have_the_layout_and_say_what_is_there(made):
    for problem in made["train"][:1000]:
        text = problem.completion
        found = layout(text)
        assert found.alone
        inner = text[slice(*found.perception)]
        assert described(inner) == problem.scene
        assert text[slice(*found.answer)] == rf"\boxed{{{problem.answer}}}"
        thought = text[slice(*found.reasoning)].split()
        assert thought[-1] == problem.answer


def test_completions_are_short_and_of_few_words(made):
    from dlmctl.models.tokenizers import word_tokenizer

    texts = [p.completion for split in SPLITS for p in made[split]]
    asked = [f"<image> {p.question}" for p in made["train"]]
    tokenizer = word_tokenizer([*asked, *texts])
    lengths = [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts[::4]]
    assert max(lengths) <= 70
    assert len(tokenizer) < 90
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]


def test_descriptions_are_read_back_and_what_is_none_is_noticed():
    scene = [Thing("red", "circle", "top", "left"), Thing("blue", "star", "middle", "center")]
    text = describe(scene)
    assert text == "red circle top left , blue star middle center"
    assert described(text) == scene
    assert described(" Red  circle top left,blue star middle center. ") == scene
    assert described("red circle left top , a blue star middle center , ") == [None] * 3


def test_drawings_show_colour_place_and_shape():
    for shape, (row, column) in zip(SHAPES, [(0, 0), (1, 2), (2, 1), (1, 1)], strict=True):
        for name in COLOURS:
            thing = Thing(name, shape, ROWS[row], COLUMNS[column])
            image = draw_scene([thing], [Look(1.0, 0.5, 0.5)], 28)
            assert image.size == (84, 84)
            x, y = 28 * column + 14, 28 * row + 14
            assert image.getpixel((x, y)) == PAINTS[name]
            inside = [
                image.getpixel((px, py)) != (255, 255, 255)
                for py in range(84)
                for px in range(84)
                if px // 28 == column and py // 28 == row
            ]
            drawn = Counter(image.getpixel((px, py)) for py in range(84) for px in range(84))
            assert 84 * 84 - drawn[255, 255, 255] == sum(inside)  # nothing leaves the cell


def test_shapes_differ_in_area_and_outline():
    areas = {}
    for shape in SHAPES:
        thing = Thing("red", shape, "top", "left")
        image = draw_scene([thing], [Look(1.0, 0.5, 0.5)], 100)
        red = sum(image.getpixel((x, y))[2] < 128 for x in range(100) for y in range(100))
        areas[shape] = red / 42**2  # in squares of the radius
    # pi r^2, 2 r^2, 3/4 sqrt(3) r^2, and of the star 10 triangles of sides 1 and 0.4 at 36 degrees.
    expected = {"circle": 3.1416, "square": 2.0, "triangle": 1.299, "star": 5 * 0.4 * 0.5878}
    assert areas == pytest.approx(expected, rel=0.03)


def test_looks_move_and_scale_within_the_cell():
    thing = Thing("red", "square", "middle", "center")
    drawn = {
        look: draw_scene([thing], [Look(*look)], 40).convert("L").point(lambda v: 255 * (v < 250))
        for look in product((0.0, 1.0), repeat=3)
    }
    boxes = {look: image.getbbox() for look, image in drawn.items()}
    assert len(set(boxes.values())) == 8
    for left, top, right, bottom in boxes.values():
        assert left >= 40
        assert top >= 40
        assert right <= 80
        assert bottom <= 80
    assert boxes[1.0, 0.0, 0.0][0] < boxes[1.0, 1.0, 0.0][0]
    assert boxes[1.0, 0.0, 0.0][1] < boxes[1.0, 0.0, 1.0][1]


def test_the_same_seed_makes_the_same_records_and_none_twice():
    first = list(prompts("shapes", Prompts(completions=True), limit=40, seed=5))
    assert first == list(prompts("shapes", Prompts(completions=True), limit=40, seed=5))
    assert first != list(prompts("shapes", Prompts(completions=True), limit=40, seed=6))
    assert len({r["id"] for r in first}) == 40
    record = first[0]
    assert list(record) == [
        *("id", "task", "kind", "images", "prompt", "scene", "answer", "completion"),
    ]
    assert list(record["scene"][0]) == ["colour", "shape", "row", "column"]
    assert load_image(record["images"][0]).size == (84, 84)
    assert record["prompt"].startswith("<image> ")


def test_the_command_takes_kinds_and_cells(tmp_path):
    out = tmp_path / "s.jsonl"
    line = ["shapes", "-n", "30", "--kind", "sum", "--kind", "count", "--cell", "14", "-o", out]
    assert invoke("prompts", *line).exit_code == 0
    records = read_jsonl(out)
    assert {r["kind"] for r in records} == {"sum", "count"}
    assert {load_image(r["images"][0]).size for r in records} == {(42, 42)}
    assert all("completion" not in r for r in records)
    wrong = invoke("prompts", "shapes", "--kind", "smell")
    assert wrong.exit_code == 2
    assert "there are count, colour, position, sum" in wrong.stderr


def test_readings_describe_one_scene_and_show_another():
    settings = Prompts(completions=True, reading=0.5)
    whole = list(prompts("shapes", Prompts(completions=True), limit=60, seed=5))
    read = 0
    for record, same in zip(prompts("shapes", settings, limit=60, seed=5), whole, strict=True):
        text = f"{record['prompt']} {record['completion']}"
        assert text == f"{same['prompt']} {same['completion']}"
        assert record["answer"] == same["answer"]
        reading = record["id"].endswith("/reading")
        assert reading == record["prompt"].endswith("</description>")
        assert reading == record["completion"].startswith("<think>")
        assert reading == (record["images"] != same["images"])
        read += reading
    assert 20 < read < 40
    [alone] = prompts("shapes", Prompts(reading=1.0), limit=1)
    assert "completion" not in alone


@pytest.mark.parametrize(("things", "counts"), [("3", {3}), ("2-3", {2, 3}), ("4-6", {4, 5, 6})])
def test_scenes_have_as_many_things_as_asked(things, counts):
    for split in SPLITS:
        made = list(islice(problems(split, 1, KINDS, Prompts(things=things).thing_range), 300))
        assert {len(problem.scene) for problem in made} == counts
        for problem in made:
            if problem.kind in ("count", "sum"):
                assert number(problem.question, problem.scene) == problem.answer


def test_descriptions_without_places_are_read_and_judged():
    settings = Prompts(completions=True, places=False, kind=["count", "sum"])
    for record in prompts("shapes", settings, limit=40, seed=5):
        words = set(re.findall(r"\w+", record["completion"]))
        assert not words & {*ROWS, *COLUMNS}
        assert {name for thing in record["scene"] for name in thing} == {"colour", "shape"}
        assert grounding(record).reward == 1
        fewer = dict(record, scene=[*record["scene"], {"colour": "red", "shape": "star"}])
        assert grounding(fewer).reward < 1
    thing = Thing("red", "star")
    assert described("red star , red star top left") == [thing, Thing("red", "star", "top", "left")]
    refused = invoke("prompts", "shapes", "-n", "1", "--no-places")
    assert refused.exit_code == 2
    assert "--kind position" in refused.stderr


def test_too_few_things_for_both_splits_are_refused():
    for wrong in ("2", "1-3", "3-7"):
        refused = invoke("prompts", "shapes", "-n", "1", "--things", wrong)
        assert refused.exit_code == 2
        assert "--things" in refused.stderr


def test_instructions_teach_the_words_of_descriptions():
    [record] = prompts("shapes", Prompts(style="instruct"), limit=1)
    example = re.search(r"'(.+)'", record["prompt"]).group(1)
    assert None not in described(example)
    assert r"\boxed{...}" in record["prompt"]
