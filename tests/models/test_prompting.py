"""Prompts and texts become the ids that transformers makes of them."""

from __future__ import annotations

import os
from pathlib import Path

import orjson
import pytest
import torch
from conftest import greedy_records, invoke, read_jsonl, tiny_policy
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlmctl.diffusion.elbo import elbo_samples
from dlmctl.diffusion.scoring import MaskPlan, example_of
from dlmctl.models.loading import load_policy
from dlmctl.models.policy import Family, Policy
from dlmctl.models.saving import save_policy
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record
from dlmctl.rl.supervised import with_completion_ids
from dlmctl.sae.corpus import documents
from dlmctl.sae.evaluation.sentences import token_sentences
from dlmctl.settings.models import Prompting

ADDED = {"none": "$A", "bos": "<pad> $A", "eos": "$A <eos>", "both": "<pad> $A <eos>"}
"""What a tokenizer puts around a text; <pad> plays beginning-of-sequence."""


def with_special_tokens(directory: Path, added: str, family: Family = "ar", seed: int = 3) -> Path:
    """A saved model whose tokenizer puts special tokens around a text."""
    policy = tiny_policy(family, seed=seed)
    policy.model.float()
    tokenizer = policy.tokenizer
    special = [("<pad>", 0), ("<eos>", 1)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=ADDED[added], pair=f"{ADDED[added]} $B", special_tokens=special
    )
    tokenizer.bos_token = "<pad>"
    save_policy(policy, directory)
    return directory


def test_the_tokenizers_of_these_tests_add_what_they_say(tmp_path):
    for added, ids in {"none": [4], "bos": [0, 4], "eos": [4, 1], "both": [0, 4, 1]}.items():
        place = with_special_tokens(tmp_path / added, added)
        assert AutoTokenizer.from_pretrained(place)("1")["input_ids"] == ids


@pytest.mark.parametrize("added", ADDED)
def test_greedy_completions_are_those_of_transformers(tmp_path, added):
    place = with_special_tokens(tmp_path / "m", added)
    prompts = ["12", "3", "0042=", "1"]
    out = greedy_records(tmp_path, place, prompts, 9)
    model = AutoModelForCausalLM.from_pretrained(place)
    tokenizer = AutoTokenizer.from_pretrained(place)
    for prompt, record in zip(prompts, read_jsonl(out), strict=True):
        given = tokenizer(prompt, return_tensors="pt")
        made = model.generate(**given, max_new_tokens=9, do_sample=False, pad_token_id=0)[0]
        assert record["tokens"]["prompt"] == given["input_ids"][0].tolist()
        assert record["tokens"]["completion"] == made[given["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("added", ADDED)
def test_scores_and_fine_tuning_see_the_prompt_that_sampling_sees(tmp_path, added):
    policy = load_policy(str(with_special_tokens(tmp_path, added)), "cpu")
    record = Record(id="a", prompt="12", completion="34")
    expected = policy.tokenizer("12")["input_ids"]
    assert policy.encode(record) == expected
    assert with_completion_ids(record, policy, None)["tokens"] == {
        "prompt": expected,
        "completion": [6, 7],
    }
    example = example_of(record, policy, MaskPlan())
    ids = torch.tensor([[*expected, 6, 7]])
    with torch.no_grad():
        logits = policy.model(input_ids=ids).logits[0].double().log_softmax(-1)
    # Token i is predicted at i - 1.
    by_hand = sum(logits[i - 1, ids[0, i]] for i in (-2, -1))
    assert float(elbo_samples(policy, [example], 1)[0, 0]) == pytest.approx(
        float(by_hand), abs=1e-5
    )


@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("family", ["ar", "llada"])
def test_a_corpus_has_the_special_tokens_of_its_tokenizer(tmp_path, added, family):
    policy = load_policy(str(with_special_tokens(tmp_path, added, family)), "cpu")
    record = Record(text="12340", sentences=[{"start": 0, "end": 2}, {"start": 2, "end": 5}])
    [document] = documents([record], policy, 16)
    assert document.ids == policy.tokenizer("12340")["input_ids"]
    labels = {"none": [], "bos": [-1], "eos": [], "both": [-1]}[added] + [0, 0, 1, 1, 1]
    behind = [-1] if added in ("eos", "both") else []
    assert token_sentences(document, policy) == labels + behind


@pytest.mark.parametrize(
    ("added", "expected"), [("none", [4]), ("bos", [0, 4]), ("eos", [4]), ("both", [0, 4])]
)
def test_a_text_that_is_continued_has_the_special_tokens_before_it(tmp_path, added, expected):
    policy = load_policy(str(with_special_tokens(tmp_path, added)), "cpu")
    assert policy.encode_context("1") == expected
    assert policy.encode_context("") == expected[:-1]
    assert policy.encode_text("1") == [4]


TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% if not loop.last %}+{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}="
    "{% if thinking is defined and thinking is false %}<>{% endif %}{% endif %}"
)
"""Ends as that of Qwen3 does, which leaves thinking out if it is told to."""


def chat_policy(**prompting) -> Policy:
    policy = tiny_policy("a2d", alphabet="0123456789=<>+-")
    policy.tokenizer.chat_template = TEMPLATE
    return Policy(**{**vars(policy), "prompting": Prompting(**prompting)})


@pytest.mark.parametrize(
    ("prompting", "record", "text"),
    [
        ({}, {"prompt": "12"}, "12="),
        ({"template_arg": ["thinking=false"]}, {"prompt": "12"}, "12=<>"),
        ({"template_arg": ["thinking=true"]}, {"prompt": "12"}, "12="),
        ({}, {"prompt": "12", "chat_template_kwargs": {"thinking": False}}, "12=<>"),
        (
            {"template_arg": ["thinking=true"]},
            {"prompt": "12", "chat_template_kwargs": {"thinking": False}},
            "12=<>",
        ),
        ({"chat": False}, {"prompt": "12"}, "12"),
        ({"prefill": "<7"}, {"prompt": "12"}, "12=<7"),
        ({"prefill": "<7", "chat": False}, {"prompt": "12"}, "12<7"),
        # An answer that has begun is continued and not answered.
        (
            {},
            {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]},
            "1+2",
        ),
    ],
)
def test_prompts_are_written_as_they_are_asked_for(prompting, record, text):
    policy = chat_policy(**prompting)
    assert policy.tokenizer.decode(policy.encode(Record(record))) == text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"template_arg": ["thinking"]}, "thinking is not NAME=VALUE"),
        ({"template_arg": ["a b=1"]}, "a b=1 is not NAME=VALUE"),
        ({"template_arg": ["a=1"], "chat": False}, "--raw leaves out"),
    ],
)
def test_arguments_of_a_template_are_checked(given, message):
    with pytest.raises(UsageError, match=message):
        Prompting(**given)


def test_a_conversation_cannot_be_written_without_its_template():
    record = Record(messages=[{"role": "user", "content": "1"}, {"role": "user", "content": "2"}])
    with pytest.raises(DataError, match="--raw leaves out the chat template"):
        chat_policy(chat=False).encode(record)
    with pytest.raises(DataError, match="chat_template_kwargs"):
        chat_policy().encode(Record(prompt="1", chat_template_kwargs=[1]))


def test_options_of_the_prompt_reach_the_model(tmp_path):
    policy = chat_policy()
    policy.model.float()
    save_policy(policy, tmp_path / "m")
    (tmp_path / "p.jsonl").write_bytes(orjson.dumps({"id": "a", "prompt": "12"}))

    def prompt(*options: str) -> str:
        out = tmp_path / "out.jsonl"
        place = [tmp_path / "p.jsonl", "-m", tmp_path / "m", "-n", "1", "-o", out]
        assert invoke("rollout", *place, "--gen-length", "2", *options).exit_code == 0
        [record] = read_jsonl(out)
        out.unlink()
        return policy.tokenizer.decode(record["tokens"]["prompt"])

    assert prompt() == "12="
    assert prompt("--template-arg", "thinking=false", "--prefill", "7") == "12=<>7"
    assert prompt("--raw") == "12"


GEMMA = os.environ.get("DLMCTL_TEST_GEMMA", "")
PROMPTS = [
    "The capital of France is", "2 + 2 =", "Once upon a time", "def fibonacci(n):", "Water is",
    "The largest planet is", "In 1969, the first man", "Roses are red,", "My favourite food is",
    "The opposite of hot is", "A list of colours:", "Shakespeare wrote", "To bake bread you need",
    "The quick brown fox", "Berlin is a city in", "La capitale de l'Italie est",
]  # fmt: skip


@pytest.mark.skipif(not GEMMA, reason="DLMCTL_TEST_GEMMA names no directory of a Gemma 3 model")
def test_a_real_language_model_says_what_transformers_has_it_say(tmp_path):
    out, scored = greedy_records(tmp_path, GEMMA, PROMPTS, 64), tmp_path / "scored.jsonl"
    place = ["-m", GEMMA, "--device", "cpu", "--dtype", "float32"]
    assert invoke("score-elbo", out, *place, "-o", scored).exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(GEMMA, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(GEMMA)
    for prompt, record in zip(PROMPTS, read_jsonl(scored), strict=True):
        given = tokenizer(prompt, return_tensors="pt")
        start = given["input_ids"].shape[1]
        made = model.generate(**given, max_new_tokens=64, do_sample=False)
        assert record["tokens"]["completion"] == made[0, start:].tolist()
        with torch.no_grad():
            logits = model(made).logits[0, start - 1 : -1].double().log_softmax(-1)
        exact = float(logits.gather(1, made[0, start:, None]).sum())
        assert record["elbo"]["policy"]["value"] == pytest.approx(exact, abs=1e-4)
