"""`view`: scales in closed form, texts that read as the completion, pages whole and safe."""

from __future__ import annotations

import base64
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import invoke
from html_page import EVIL, Page
from rich.ansi import AnsiDecoder
from rich.console import Console

from dlmctl.models.saving import save_policy
from dlmctl.models.small import make_policy
from dlmctl.models.token_text import texts_of_model
from dlmctl.models.tokenizers import byte_tokenizer
from dlmctl.records.jsonl import Record, dump
from dlmctl.report.completions import Completion, completions, facts
from dlmctl.report.page import shown, shown_lines
from dlmctl.report.token_lines import ABOVE, BELOW, LEVELS, completion_lines
from dlmctl.report.token_page import write_page
from dlmctl.report.token_scale import fitted
from dlmctl.settings.small import SmallModel

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="session")
def speller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a token for each byte, its weights taken away."""
    directory = tmp_path_factory.mktemp("speller")
    save_policy(make_policy(SmallModel("llada", 16, 1, 2), TOKENIZER), directory)
    [weights] = directory.glob("*.safetensors")
    weights.unlink()
    return directory


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, and a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR", "DLMCTL_ON_ERROR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def record(text: str, model: Path | str, **fields: Any) -> Record:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    rollout = {"model": str(model), "order": list(range(len(ids))), **fields.pop("rollout", {})}
    made = {"id": "p", "sample": 0, "prompt": "Why?", "tokens": {"prompt": [], "completion": ids}}
    return Record({**made, "rollout": rollout, **fields})


def view(records: list[Record], *options: str) -> Result:
    Path("records.jsonl").write_bytes(b"".join(map(dump, records)))
    return invoke("view", "records.jsonl", *options)


def drawn(records: list[Record], **options: Any) -> Page:
    """The page of the records."""
    write_page(completions(records, lambda name: texts_of_model(name).row, **options), Path("p"))
    return Page(Path("p").read_text())


@pytest.mark.parametrize(
    ("name", "values", "places"),
    [
        ("weights", [1.0, 0.5, 1.25], [0, -1, 0.5]),  # around 1, by the farthest
        ("deep.weights", [2.0, 3.0], [0.5, 1]),
        ("signed", [-4, 0, 2], [-1, 0, 0.5]),
        ("rollout.order", [3, 5, 7], [0, 0.5, 1]),
        ("rollout.log_probs", [-3, -1, -2], [-1, 0, -0.5]),  # from the one nearest to 0
        ("roles", [0, 1, 2], [0, -1, 1]),
        ("roles", [0, 2, 4], [0, 0.5, 1]),  # other numbers are no roles
        ("weights", [1, 1], [0, 0]),
        ("order", [4, 4], [0, 0]),
    ],
)
def test_places_on_the_scale(name: str, values: list[float], places: list[float]) -> None:
    scale = fitted(name, [*values, None])
    assert [scale.place(value) for value in values] == pytest.approx(places)
    for label, at in scale.steps():
        if not scale.names:  # the legend says what the places mean
            assert scale.place(float(label)) == pytest.approx(at)
    ends = {at for _, at in scale.steps()}
    assert all(min(ends) <= at <= max(ends) for at in places)


def test_plain_text_has_brackets_around_what_is_far_out(speller: Path) -> None:
    weights = [1.0, 1.5, 2.0, 1.0, 0.5, 1.4, 0.0]
    verdict = {"exact": {"correct": False, "why": "no number"}}
    extra = {"reward": 0.5, "advantage": -0.25, "verdict": verdict, "weights": weights}
    done = view([record("abc de\n", speller, **extra)])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "p sample 0 · reward 0.5 · advantage -0.25 · exact wrong: no number",
        "prompt: Why?",
        "a{+bc+} [-d-]e[-↵-]",
        "",
        "weights: min 0, mean 1.057, max 2  [-up to 0.5-]  {+from 1.5+}",
        " largest: 2 'c' @2  1.5 'b' @1  1.4 'e' @5",
        "smallest: 0 '↵' @6  0.5 'd' @4  1 'a' @0",
        "",
    ]


def test_brackets_stand_where_the_numbers_say_and_leave_the_text_as_it_was(speller: Path) -> None:
    rng = random.Random(0)
    text = "".join(rng.choice("ab é漢") for _ in range(70))
    item = record(text, speller)
    count = len(item["tokens"]["completion"])
    item["signed"] = [rng.uniform(-1, 1) for _ in range(count)]
    row = texts_of_model(str(speller)).row(item["tokens"]["completion"])
    span = max(map(abs, item["signed"]))
    far = {"{+": "", "[-": ""}
    for part, value in zip(row, item["signed"], strict=True):
        if abs(value) >= span / 2:
            far["{+" if value > 0 else "[-"] += part.replace(" ", "")
    done = view([item], "--by", "signed")
    body = done.stdout.split("prompt: Why?\n")[1].split("signed:")[0].replace("\n", "")
    found = {"{+": "", "[-": ""}
    for opening, inside in re.findall(r"(\{\+|\[-)(.*?)(?:\+\}|-\])", body):
        found[opening] += inside.replace(" ", "")
    assert found == far
    bare = re.sub(r"\{\+|\+\}|\[-|-\]", "", body)
    assert bare.replace(" ", "") == text.replace(" ", "")


def test_verdicts_are_said_in_few_words() -> None:
    verdict = {
        "sure": {"correct": True},
        "why": {"correct": False, "why": "b"},
        "found": {"x": "c", "n": [1], "m": 2},
        "bare": {},
        "odd": 3,
    }
    assert facts(Record(reward=0.25, advantage=0.5, verdict=verdict)) == [
        "reward 0.25",
        "advantage +0.5",
        *("sure right", "why wrong: b", "found x=c m=2", "bare", "odd"),
    ]
    assert facts(Record(verdict="none", reward="high")) == ["reward high"]


def test_roles_are_named(speller: Path) -> None:
    done = view([record("abcd", speller, roles=[1, 1, 0, 2])], "--by", "roles")
    assert "[-ab-]c{+d+}" in done.stdout
    assert "roles:   [-perception-]  other  {+reasoning+}" in done.stdout
    assert "largest" not in done.stdout


def _completion(speller: Path, values: list[float]) -> Completion:
    texts = [*"abcdefghijklmnop"][: len(values)]
    return Completion(record("x", speller), "signed", "Why?", list(texts), list(values), 0)


def test_a_terminal_has_a_background_for_each_level(speller: Path) -> None:
    values = [-1.0, -0.8, -0.79, -0.5, -0.49, -0.2, -0.19, 0.0, 0.19, 0.2, 0.5, 0.8, 1.0]
    console = Console(force_terminal=True, color_system="truecolor", width=80)
    [written] = completion_lines([_completion(speller, values)], console)
    line = next(t for t in AnsiDecoder().decode(written) if t.plain.startswith("abc"))
    for number, value in enumerate(values):
        colour = line.get_style_at_offset(console, number).bgcolor
        level = sum(abs(value) >= least for least in LEVELS)
        expected = (ABOVE if value > 0 else BELOW)[level - 1] if level else None
        assert (colour.get_truecolor().hex if colour else None) == expected, value
    assert "{+" not in written


def test_without_colour_the_codes_are_gone_and_the_brackets_there(
    speller: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(force_terminal=True, color_system="truecolor", width=80)
    [written] = completion_lines([_completion(speller, [-1.0, 0.0, 1.0])], console)
    assert "[-a-]b{+c+}" in written
    assert not re.search(r"\x1b\[[0-9;]*[34]8;", written)


def test_lines_fit_and_nothing_of_a_record_drives_the_terminal(speller: Path) -> None:
    text = "\x1b[2J\x07" + "a" * 300 + " \u202e word" * 40
    item = record(text, speller, id="\x1b]0;x\x07", prompt="\x1b[31m" + "long " * 200)
    done = view([item], "--by", "rollout.order")
    assert not {"\x1b", "\x07", "\u202e"} & set(done.stdout)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\\u001b[2J\\u0007aaa" in done.stdout.replace("\n", "")


def test_neighbours_have_their_prompt_once(speller: Path) -> None:
    items = [record("ab", speller, sample=s, prompt=p) for s, p in enumerate(["x", "x", "y", "x"])]
    assert re.findall(r"prompt: (\w)", view(items).stdout) == ["x", "y", "x"]
    page = drawn(items)
    assert len(page.attributes("section")) == 3
    assert page.text("section/div") == "xyx"


def test_prompts_are_read_from_conversations_and_ids_too(speller: Path) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "How many?"}]
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    ids = TOKENIZER.encode("ids", add_special_tokens=False)
    first = record("a", speller, messages=talk)
    second = record("a", speller)
    second["tokens"]["prompt"] = ids
    del first["prompt"], second["prompt"]
    done = view([first, second])
    assert "prompt: Be brief.↵ How many?" in done.stdout
    assert "prompt: ids" in done.stdout


def test_weights_are_the_default_where_there_are_any(speller: Path) -> None:
    done = view([record("ab", speller, weights=[1, 2]), record("ab", speller, weights=None)])
    assert re.findall(r"^([\w.]+): min", done.stdout, re.MULTILINE) == ["weights", "rollout.order"]


def test_tokens_behind_the_end_are_counted_and_shown_when_asked_for(speller: Path) -> None:
    item = record("ab", speller, rollout={"length": 3, "order": [0, 1, 2, 9, 9]})
    item["tokens"]["completion"] += [1, 1, 1]
    done = view([item])
    assert "<eos>+} … and 2 after the end" in done.stdout
    assert "max 2" in done.stdout
    whole = view([item], "--after-end")
    assert whole.stdout.count("<eos>") >= 3
    assert "max 9" in whole.stdout
    assert "… and 2 after the end" in drawn([item]).text("div/i")


def test_null_is_no_value(speller: Path) -> None:
    item = record("abc", speller, weights=[None, 2.0, 1.0])
    assert "a{+b+}c" in view([item]).stdout
    titles = [a["title"] for a in drawn([item]).attributes("b") if a.get("title")]
    assert titles == ["0: no value", "1: 2", "2: 1"]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"tokens": {}}, [], "no list of ids 'tokens.completion'"),
        ({"tokens": {"completion": ["a"]}}, [], "no list of ids"),
        ({"tokens": {"completion": [True, 1]}}, [], "no list of ids"),
        ({"tokens": {"completion": [-1, 1]}}, [], "no list of ids"),
        ({"weights": [1.0]}, [], r"'weights' is a list of 1 for 2 tokens; .*: rollout\.order;"),
        ({}, ["--by", "rollout.x"], r"'rollout\.x' is no list of numbers .*: rollout\.order;"),
        ({}, ["--by", "id"], "'id' is no list of numbers"),
        ({"rollout": {"order": [0, 1]}}, [], "give --model"),
    ],
)
def test_what_cannot_be_shown_is_said_in_a_line(
    speller: Path, change: dict[str, Any], options: list[str], message: str
) -> None:
    faulty = Record({**record("ab", speller), **change})
    sound = record("ab", speller, id="sound")
    done = view([sound, faulty, sound], *options)
    assert done.exit_code == 65
    if not options:
        assert re.search(f"^dlmctl: records.jsonl:2: .*{message}", done.stderr, re.MULTILINE)
        kept = view([sound, faulty, sound], "--on-error", "keep").stdout
        assert kept.count("sound sample 0") == 2
        assert "not shown:" in kept
        assert view([sound, faulty], "--on-error", "skip").stdout.count("sample 0") == 1
        assert "not shown" in drawn([faulty], on_error="keep").text("article/p")
    assert re.search(message, done.stderr.strip())
    assert "Traceback" not in done.output


def test_ids_of_another_vocabulary_are_shown_as_numbers(speller: Path) -> None:
    item = record("ab", speller)
    item["tokens"]["completion"] = [1 + 2**40, 50_000]
    assert f"'#{1 + 2**40}'" in view([item]).stdout


def test_a_model_that_is_gone_can_be_named(speller: Path, tmp_path: Path) -> None:
    item = record("ab", tmp_path / "gone")
    done = view([item])
    assert done.exit_code == 66
    assert done.stderr.count("\n") == 1
    assert "give --model" in done.stderr
    assert view([item], "--model", str(speller)).exit_code == 0
    assert view([item], "--model", "./nowhere").exit_code == 66
    (tmp_path / "gone").mkdir()
    assert "no config.json" in view([item]).stderr
    (tmp_path / "gone" / "config.json").write_bytes((speller / "config.json").read_bytes())
    assert "tokenizer cannot be loaded" in view([item]).stderr


def test_an_adapter_is_spelt_by_its_base_model(speller: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    settings = {"base_model_name_or_path": str(speller)}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    assert "a{+b+}" in view([record("ab", tmp_path / "adapter")]).stdout


def test_a_limit_ends_the_reading(speller: Path) -> None:
    Path("r.jsonl").write_bytes(dump(record("ab", speller)) + b"no JSON\n")
    assert invoke("view", "r.jsonl", "-n", "1").exit_code == 0
    assert invoke("view", "r.jsonl", "-n", "2").exit_code == 65


def test_the_page_has_every_token_with_its_number_on_one_scale(speller: Path) -> None:
    items = [
        record("ab\nc", speller, sample=0, weights=[1.0, 0.5, 1.25, 1], reward=0, advantage=-1.0),
        record("d<e", speller, sample=1, weights=[1.0, 2.0, 1.5], reward=1.0),
        record("f", speller, sample=2, weights=[1.0], reward=None),
    ]
    page = drawn(items)
    cards = [a for a in page.attributes("b") if ":" in str(a.get("title"))]
    assert [a["title"] for a in cards] == [
        *("0: 1", "1: 0.5", "2: 1.25", "3: 1"),
        *("0: 1", "1: 2", "2: 1.5", "0: 1"),
    ]
    shades = [(a.get("class"), a.get("style")) for a in cards]
    plain = (None, None)
    assert shades[:4] == [plain, ("low", "--a:0.50"), (None, "--a:0.25"), plain]
    assert shades[4:] == [plain, (None, "--a:1.00"), (None, "--a:0.50"), plain]
    assert page.text("article/div/b") == "ab↵\ncd<ef"
    assert [a["data-reward"] for a in page.attributes("li")] == ["0.0", "1.0", ""]
    links = [str(a["href"])[1:] for a in page.attributes("a")]
    assert {a["id"] for a in page.attributes("article")} == set(links)
    assert "min 0.5, mean 1.156, max 2" in page.text("header/p")
    assert page.text("span/b") == "00.511.52"  # the legend
    assert "advantage -1" in page.text("article/p")
    assert {"least", "most", "search"} <= {a.get("id") for a in page.attributes("input")}


def test_hostile_records_are_text_on_the_page(speller: Path) -> None:
    items = [
        record(text, speller, id=text, prompt=text, verdict={text: {"correct": True, "why": text}})
        | {"images": [text], "reward": text, "sample": text}
        for text in EVIL
    ]
    page = drawn([Record(item) for item in items])
    assert len(page.attributes("script")) == 1
    assert page.attributes("img") == []
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    for text in EVIL:
        for place in ("section/div", "h2/a", "article/p", "li/a/span"):
            assert shown(text).lstrip("◌") in page.text(place)
    assert "".join(map(shown_lines, EVIL[:3])) in page.text("article/div/b")


def test_images_are_put_into_the_page_or_named(speller: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "drawn").mkdir(parents=True)
    (tmp_path / "data" / "drawn" / "a.png").write_bytes(PNG)
    (tmp_path / "data" / "text.png").write_text("secret")
    (tmp_path / "data" / "link.png").symlink_to(speller / "config.json")
    (tmp_path / "data" / "out.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "outside.png").write_bytes(PNG)
    uri = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    refused = {
        "text.png": "not PNG",
        "link.png": "outside",
        "out.png": "outside",
        "../outside.png": "outside",
        str(tmp_path / "outside.png"): "only relative",
        "https://example.org/a.png": "not fetched",
        "data:image/svg+xml;base64,AAAA": "not a known kind",
        'data:image/png;base64,AA" onerror="x': "not a known kind",
        "none.png": "no such file",
        "a\0b": "cannot be read",
    }
    item = record("ab", speller, images=["drawn/a.png", uri, {"path": "drawn/a.png"}, *refused, 7])
    item.where = str(tmp_path / "data" / "r.jsonl:1")
    (tmp_path / "elsewhere").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path / "elsewhere")
        page = drawn([item])
    assert [a["src"] for a in page.attributes("img")] == [uri] * 3
    assert all(a["title"] for a in page.attributes("img"))
    said = [data for path, data in page.texts if path.endswith("section/div/span")]
    assert len(said) == len(refused) + 1
    for line, reason in zip(said, refused.values(), strict=False):
        assert reason in line
    loading = [a for _, a in page.tags if {"srcset", "data"} & a.keys()]
    assert loading == []
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "iframe", "object"})
    assert "default-src 'none'" in str(page.attributes("meta"))
    assert "secret" not in (tmp_path / "elsewhere" / "p").read_text()


def test_a_page_is_written_by_the_command_and_nothing_else(speller: Path) -> None:
    done = view([record("ab", speller), record("cd", speller, sample=1)], "--html", "new/p.html")
    assert done.exit_code == 0, done.output
    assert done.output == ""
    assert len(Page(Path("new/p.html").read_text()).attributes("article")) == 2
    assert view([], "--html", "empty.html").exit_code == 0
    assert Page(Path("empty.html").read_text()).attributes("article") == []
    assert view([record("ab", speller)], "--html", "/proc/x/p.html").exit_code == 73
