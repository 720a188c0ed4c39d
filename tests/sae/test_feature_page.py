"""The page of features: whole, safe whatever the tokens are, and with everything on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from html_page import EVIL, Page
from small_world import LATENTS, small_world

from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record
from dlmctl.sae.features.page import with_page
from dlmctl.sae.features.records import feature_records
from dlmctl.sae.features.responses import collect_responses
from dlmctl.settings.features import WindowCounts

WORLD = small_world()
FACTS = {
    "sae": "saes/<one>",
    "model": "tiny",
    "revision": "abc",
    "layer": 1,
    "latents": LATENTS,
    "k": 3,
    "positions": "mask",
    "t": [0.1, 0.9],
}


def _records(count: int = 5) -> list[Record]:
    counts = WindowCounts(top=3, weighted=2, inactive=2, radius=3)
    responses = collect_responses(
        WORLD.stream("mask", 16), torch.arange(LATENTS), counts, 0, 0.1, 0.9
    )
    slots = [s for s in range(LATENTS) if responses.stats.alive[s]][:count]
    return list(feature_records(responses, slots, WORLD.policy, WORLD.sae, FACTS))


def _page(records: list[Record], tmp_path: Path) -> Page:
    path = tmp_path / "page.html"
    assert list(with_page(records, path)) == records
    return Page(path.read_text())


def test_the_page_has_every_feature_window_and_fact(tmp_path: Path) -> None:
    records = _records()
    page = _page(records, tmp_path)
    sections = {a["id"] for a in page.attributes("section")}
    assert len(sections) == len(records)
    links = {str(a["href"]).removeprefix("#") for a in page.attributes("a")}
    assert links == sections
    lines = sum(len(found) for r in records for found in r["windows"].values())
    assert sum(a.get("class") == "text" for a in page.attributes("span")) == lines
    facts = page.text("dl/div/dd")
    for part in ("saes/<one>", "tiny (abc)", "40, K 3", "masked tokens", "0.1 to 0.9"):
        assert part in facts
    words = page.text("li/span") + page.text("li/span/b")
    assert len(words) >= sum(
        len("".join(w["tokens"])) for r in records for ws in r["windows"].values() for w in ws
    )
    assert len(page.attributes("svg")) == 3 * len(records)
    masked = [a for a in page.attributes("b") if "m" in str(a.get("class", "")).split()]
    assert len(masked) == sum(
        sum(w["masked"]) for r in records for ws in r["windows"].values() for w in ws
    )
    assert all("masked: the model did not see it" in str(a["title"]) for a in masked)


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    page = _page(_records(2), tmp_path)
    assert not [a for _, a in page.tags if {"src", "srcset", "data"} & a.keys()]
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "img", "iframe", "object"})
    assert "default-src 'none'" in str(page.attributes("meta"))


def test_tokens_names_and_answers_are_text_whatever_they_hold(tmp_path: Path) -> None:
    record = _records(1)[0]
    windows = record["windows"]["top"]
    for window in windows:
        window["tokens"] = [EVIL[i % len(EVIL)] for i in range(len(window["tokens"]))]
        window["id"] = EVIL[1]
    record["logits"]["top"][0]["token"] = EVIL[0]
    judged = {"judge": EVIL[0], "accuracy": 0.5, "balanced_accuracy": 0.5}
    record |= {"explanation": EVIL[0], "judged": judged, "error": {"message": EVIL[0]}}
    page = _page([record], tmp_path)
    assert len(page.attributes("script")) == 1
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    everything = "".join(data for _, data in page.texts)
    assert everything.count(EVIL[0]) >= 5
    assert "&lt;" in everything
    assert not {"\u202e", "\x00", "\u200b"} & set(everything)
    assert "\\u202eab" in everything


def test_scores_are_shown_where_there_are_any(tmp_path: Path) -> None:
    records = _records(2)
    judged = {"judge": "a judge", "accuracy": 0.75, "balanced_accuracy": 0.625}
    records[0] |= {"explanation": "the digit 3", "judged": judged}
    records[1]["error"] = {"where": "", "message": "no answer"}
    page = _page(records, tmp_path)
    assert "the digit 3" in page.text("p/q")
    assert "accuracy 0.75, balanced 0.62" in page.text("section/p")
    assert "not judged: no answer" in page.text("section/p")
    scores = [a["data-score"] for a in page.attributes("li") if "data-score" in a]
    assert scores == ["0.625", "-1"]


def test_a_page_without_features_is_whole_and_a_broken_record_is_named(tmp_path: Path) -> None:
    assert _page([], tmp_path).attributes("section") == []
    with pytest.raises(DataError, match="not a whole record"):
        list(with_page([Record(windows={})], tmp_path / "x.html"))
