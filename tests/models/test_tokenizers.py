"""Tokens that are words or frequent bytes: texts come back as they were, unknown words do not."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dlmctl.cli import app
from dlmctl.models.loading import load_policy
from dlmctl.models.saving import save_policy
from dlmctl.models.tokenizers import bpe_tokenizer, word_tokenizer
from dlmctl.records.errors import DataError

TEXTS = [
    "story:",
    "the dog, the (red) fox - and don't they run?",
    "well-known: 3.5 à la 数学; the  end\n\tthe.",
]


def test_texts_come_back_as_they_were():
    tokenizer = word_tokenizer(TEXTS)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    parts = [i for text in TEXTS[:2] for i in tokenizer.encode(text, add_special_tokens=False)]
    assert tokenizer.decode(parts) == f"{TEXTS[0]} {TEXTS[1]}"


def test_words_and_marks_are_tokens_and_a_word_is_the_same_at_the_beginning():
    tokenizer = word_tokenizer(["the dog, the dog."])
    ids = tokenizer.encode("the dog, the dog.", add_special_tokens=False)
    assert ids == [3, 4, 5, 3, 4, 6]  # the, dog, then what comes once, in its order
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (0, 1, 2)
    assert len(tokenizer) == 7 + 2  # both marks are there with a space before them, too


@pytest.mark.parametrize("text", [", the dog", "the dog ,the", ".", "(the", "the.dog", "\n the"])
def test_marks_are_read_with_a_space_before_them_and_without(text):
    tokenizer = word_tokenizer(["the dog, dog. (the) .dog", "the\ndog"])
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_tokens_know_where_they_stand():
    text = "the dog, the dog."
    found = word_tokenizer([text])(text, add_special_tokens=False, return_offsets_mapping=True)
    assert [text[a:b] for a, b in found["offset_mapping"]] == [
        "the", " dog", ",", " the", " dog", ".",
    ]  # fmt: skip


def test_pairs_are_merged_by_frequency_and_every_text_has_tokens():
    tokenizer = bpe_tokenizer(["low low low lower"], 259 + 4)
    learned = [tokenizer.decode([i]) for i in range(259, len(tokenizer))]
    assert learned[:3] == ["lo", "low", " low"]
    for text in [*TEXTS, "\N{SNOWMAN}\x00 low"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)
    assert len(tokenizer.encode(" low", add_special_tokens=False)) == 1


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    rows = [
        {"prompt": "story:", "completion": "the dog runs."},
        {"messages": [{"role": "user", "content": "a cat?"}]},
        {"text": "plain", "answer": "left out"},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line):
    return CliRunner().invoke(app, line.split())


@pytest.mark.parametrize("family", ["llada", "ar"])
def test_init_makes_a_model_of_the_words_of_a_corpus(corpus, family):
    done = run(
        f"init new --family {family} --tokenizer word --vocabulary c.jsonl "
        "--hidden-size 8 --heads 2"
    )
    assert done.exit_code == 0, done.stderr
    policy = load_policy("new", "cpu")
    text = "a plain dog: the cat runs?"
    assert policy.decode(policy.encode_text(text)) == text
    assert policy.vocab_size == 3 + 10 + 3  # the marks : . ? with a space before them
    with pytest.raises(DataError, match="has no tokens for 'left'"):
        policy.encode_text("left")


def test_init_makes_a_model_with_byte_pair_encoding(corpus):
    line = "init new --tokenizer bpe --vocabulary c.jsonl --vocabulary-size 270 --hidden-size 8"
    assert run(f"{line} --heads 2").exit_code == 0
    policy = load_policy("new", "cpu")
    assert 262 < policy.vocab_size <= 270
    assert policy.decode(policy.encode_text("left out")) == "left out"


def test_a_completion_with_an_unknown_word_is_named_by_its_line(corpus):
    run("init new --tokenizer word --vocabulary c.jsonl --hidden-size 8 --heads 2")
    (corpus / "d.jsonl").write_text('{"id":1,"prompt":"a","completion":"out"}')
    done = run("update --algo sft -m new -o run d.jsonl")
    assert done.exit_code == 65
    assert "d.jsonl:1: " in done.stderr
    assert "has no tokens for 'out'" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tokenizer word", "goes with --tokenizer word or bpe"),
        ("--tokenizer bpe", "goes with --tokenizer word or bpe"),
        ("--vocabulary c.jsonl", "goes with --tokenizer word or bpe"),
        ("--vocabulary-size 300", "--vocabulary-size is for --tokenizer bpe"),
        ("--tokenizer word --vocabulary e.jsonl", "e.jsonl has no words"),
    ],
)
def test_a_vocabulary_belongs_to_a_tokenizer_that_learns_it(corpus, options, message):
    (corpus / "e.jsonl").write_text('{"answer": "4"}\n')
    done = run(f"init new {options}")
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (corpus / "new").exists()


def test_a_saved_tokenizer_does_not_tell_how_it_was_loaded(saved_models, tmp_path):
    directory = Path(saved_models("llada"))
    save_policy(load_policy(str(directory)), tmp_path)
    written = (tmp_path / "tokenizer_config.json").read_bytes()
    assert written == (directory / "tokenizer_config.json").read_bytes()
    assert b"local" not in written
