"""Texts with planted concepts: grammatical, independent, many words for each value, split."""

import re
from collections import Counter, defaultdict
from itertools import combinations, islice, product

import pytest

from dlmctl.tasks.concepts import CONCEPTS, documents, split_of
from dlmctl.tasks.lexicon import FUTURES, TOPICS, participle, plural, verb_form
from dlmctl.tasks.sources import prompts


@pytest.fixture(scope="module")
def texts():
    return list(islice(documents("train", seed=2), 3000))


def sentences(texts):
    return [(d.text[s.start : s.end], s.values) for d in texts for s in d.sentences]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (plural("fox"), "foxes"),
        (plural("duchess"), "duchesses"),
        (plural("baby"), "babies"),
        (plural("boy"), "boys"),
        (plural("midwife"), "midwives"),
        (verb_form("catch", "present", "singular"), "catches"),
        (verb_form("catch", "present", "plural"), "catch"),
        (verb_form("catch", "past", "plural"), "caught"),
        (verb_form("fry", "present", "singular"), "fries"),
        (verb_form("fry", "past", "singular"), "fried"),
        (verb_form("play", "present", "singular"), "plays"),
        (verb_form("play", "past", "singular"), "played"),
        (verb_form("stir", "past", "plural"), "stirred"),
        (verb_form("bake", "past", "plural"), "baked"),
        (verb_form("tax", "present", "singular"), "taxes"),
        (verb_form("be", "past", "plural"), "were"),
        (participle("bake"), "baking"),
        (participle("map"), "mapping"),
        (participle("study"), "studying"),
    ],
)
def test_words_take_the_forms_of_english(made, expected):
    assert made == expected


def test_nouns_determiners_and_verbs_agree_and_verbs_have_their_tense(texts):
    some_form = {"singular": "is was", "plural": "are were"}
    determiners = {
        "singular": "the a one this that every another each",
        "plural": "the some two these those many several both",
    }
    actor = re.compile(r"(?:^|, )(?P<determiner>\w+) (?P<adjective>\w+) (?P<noun>\w+) (?P<verb>.+)")
    seen = Counter()
    for text, values in sentences(texts):
        # What stands before a comma is a time or an adverb; a subject never has one.
        found = actor.search(text)
        number, tense = values["number"], values["tense"]
        assert found["determiner"] in determiners[number].split()
        noun = found["noun"]
        assert (noun.endswith("s") and noun not in ("princess", "duchess")) == (number == "plural")
        first, second, *_ = found["verb"].split()
        future = first in ("will", "shall") or f"{second} to" in FUTURES
        assert future == (tense == "future")
        if first in ("has", "have", "had"):
            assert second == "to"
            assert (first == "had") == (tense == "past")
            assert first == "had" or (first == "has") == (number == "singular")
        elif first in ("is", "are", "was", "were"):
            assert first in some_form[number].split()
            assert (first in ("was", "were")) == (tense == "past")
        elif tense == "present":
            assert re.search(r"[^s]s$|sses$", first) or number == "plural"
            assert not re.search(r"[^s]s$|sses$", first) or number == "singular"
        elif tense == "past":
            assert re.search(r"ed$|threw|caught|struck|sang|left|bought|sold|felt", first)
        seen[tense, number, first] += 1
    assert len({key[:2] for key in seen}) == 6


def test_offsets_enclose_whole_sentences_and_leave_out_nothing_but_spaces(texts):
    for document in texts[:300]:
        assert 3 <= len(document.sentences) <= 5
        parts = [document.text[s.start : s.end] for s in document.sentences]
        assert " ".join(parts) == document.text
        assert all(re.fullmatch(r"[a-z][a-z ,]+\.", part) for part in parts)


def test_topic_and_sentiment_hold_for_a_document_and_the_others_change(texts):
    values = {
        name: [{s.values[name] for s in d.sentences} for d in texts]
        for name in ("topic", "sentiment", "subject", "tense", "number")
    }
    for name, found in values.items():
        several = sum(len(v) > 1 for v in found)
        assert several == 0 if name in ("topic", "sentiment") else several > len(texts) / 2


@pytest.mark.parametrize("split", ["train", "test"])
def test_any_two_concepts_are_independent_on_either_side_of_the_split(split):
    """Exactly so over all combinations, and as drawn by the chi-square of each pair."""
    everything = [dict(zip(CONCEPTS, v, strict=True)) for v in product(*CONCEPTS.values())]
    side = [values for values in everything if split_of(values) == split]
    assert len(side) == len(everything) * (1 if split == "test" else 5) / 6
    # One sentence of each document, as those of one document have their topic in common.
    drawn = [d.sentences[0].values for d in islice(documents(split, seed=1), 4000)]
    for one, other in combinations(CONCEPTS, 2):
        cells = len(CONCEPTS[one]) * len(CONCEPTS[other])
        counts = Counter((values[one], values[other]) for values in side)
        assert set(counts.values()) == {len(side) / cells}
        expected = len(drawn) / cells
        counts = Counter((values[one], values[other]) for values in drawn)
        chi_square = sum((n - expected) ** 2 / expected for n in counts.values())
        assert len(counts) == cells
        assert chi_square < cells + 5 * (2 * cells) ** 0.5


def test_the_splits_share_no_combination_of_values():
    sides = [
        {tuple(v.values()) for _, v in sentences(islice(documents(split), 2000))}
        for split in ("train", "test")
    ]
    assert [len(side) for side in sides] == [360, 72]
    assert not sides[0] & sides[1]


def test_every_value_has_many_words_and_none_of_them_tells_it_alone(texts):
    found = sentences(texts)
    values_of_word = {name: defaultdict(Counter) for name in CONCEPTS}
    totals = {name: Counter(values[name] for _, values in found) for name in CONCEPTS}
    for text, values in found:
        for word in set(re.findall(r"\w+", text)):
            for name, value in values.items():
                values_of_word[name][word][value] += 1
    for name, values in CONCEPTS.items():
        for value in values:
            told = [w for w, c in values_of_word[name].items() if set(c) == {value}]
            assert len(told) >= 8, (name, value)
            # The most frequent word that only this value has is in fewer than half its sentences.
            most = max(values_of_word[name][w][value] for w in told)
            assert most < 0.5 * totals[name][value], (name, value)


def test_the_same_seed_makes_the_same_records_with_text_and_labels():
    first = list(prompts("concepts", limit=50, seed=5))
    assert first == list(prompts("concepts", limit=50, seed=5))
    assert first != list(prompts("concepts", limit=50, seed=6))
    assert len({r["id"] for r in first}) == 50
    assert {(r["task"], r["prompt"]) for r in first} == {("concepts", "story:")}
    label = first[0]["sentences"][0]
    assert list(label) == ["start", "end", *CONCEPTS]
    assert first[0]["completion"][label["start"] : label["end"]].endswith(".")


def test_fewer_words_are_the_first_ones_of_each_value():
    texts = list(islice(documents("train", seed=2, words=2), 400))
    objects = {word for topic in TOPICS.values() for word in topic.objects}
    kept = {word for topic in TOPICS.values() for word in topic.objects[:2]}
    assert {w for d in texts for w in re.findall(r"\w+", d.text)} & objects == kept
    assert next(documents("train", seed=2, words=8)) == next(documents("train", seed=2))
