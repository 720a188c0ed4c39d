"""What judges say of steered texts, and how fluent these are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_jsonl, tiny_policy
from steered_records import FIRST, completion, twins, written
from typer.testing import CliRunner

from dlmctl.cli import app
from dlmctl.diffusion.scoring import MaskPlan
from dlmctl.models.policy import Family, Policy
from dlmctl.models.saving import save_policy
from dlmctl.models.small import make_policy
from dlmctl.models.tokenizers import byte_tokenizer
from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record
from dlmctl.sae.judges import read_score
from dlmctl.sae.steering.fluency import perplexities
from dlmctl.sae.steering.questions import Answers, explanations, questions
from dlmctl.sae.steering.scores import outcomes_of, rows_of
from dlmctl.sae.steering.twins import (
    SampledText,
    read_sampled_text,
)
from dlmctl.settings.small import SmallModel


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("70", 70),
        (" 70.5 ", 70.5),
        ("**85**", 85),
        ("85%", 85),
        ("Score: 85/100", 85),
        ("100/100", 100),
        ("0", 0),
        ("I would say 40 out of 100.", 40),
        ("On a scale from 0 to 100, this is a 15.", 15),
        ("20\nIt mentions 3 ships and 2 sails.", 20),
        ("The rating is **30**, as 2 of the 5 lines do.", 30),
        ('{"score": 65, "lines": 2}', 65),
        ("<think>maybe 20, no 90</think>\n55", 55),
        ("<think>it might be 20", None),
        ("a score of 12", 12),
        ("", None),
        ("very strongly", None),
        ("150", None),
        ("-5", None),
        ("Score: -5", None),
        ("8/10", None),
        ("between 20 and 30", None),
        ("1,000", None),
        ("7777777777777777", None),
        ("score 20 or score 30", None),
        ("v2", None),
    ],
)
def test_the_number_of_an_answer(answer: str, number: float | None) -> None:
    assert read_score(answer) == number


def test_a_text_is_asked_about_once_for_each_concept() -> None:
    pairs = twins(FIRST, FIRST._replace(amplitude=4.0), FIRST._replace(feature=8))
    found = explanations(
        [
            Record(feature=7, explanation="no", layer=4),
            Record(feature=7, explanation="ships"),
            Record(feature=8, explanation="sails"),
        ],
        "found.jsonl",
    )
    asked = list(questions(pairs, found))
    assert len(asked) == 4 + 6  # two texts under two concepts, and six steered
    assert len({record["id"] for record in asked}) == 10
    for record in asked:
        concept = {7: "ships", 8: "sails"}[record["judged"]["feature"]]
        assert f"Concept: {concept}\n" in record["prompt"]
        text = "plain" if "amplitude" not in record["judged"] else str(record["judged"]["feature"])
        assert f"Text:\n{text}" in record["prompt"]
    with pytest.raises(DataError, match=r"found.jsonl: no explanation of feature 9 of saes/a"):
        list(questions(twins(FIRST._replace(feature=9)), found))


def test_answers_find_their_texts_and_failed_ones_are_counted() -> None:
    pairs = twins(FIRST, FIRST._replace(feature=8, time=(0.5, 1.0)))
    answers = []
    for record in questions(pairs, lambda _: "ships"):
        about = record["judged"]
        number = about["feature"] * 10 + (5 if "amplitude" in about else 0)
        # As they come back from a file; the second prompt's steered text has no readable answer.
        failed = "amplitude" in about and about["id"] == "p1"
        text = "no idea" if failed else f"{number}"
        answers.append(Record(json.loads(json.dumps({**record, "completion": text}))))
    found = list(outcomes_of(pairs, Answers(answers).of))
    assert [outcome.concept for _, outcome in found] == [(70, 75), None, (80, 85), None]
    assert [outcome.failed for _, outcome in found] == [0, 1, 0, 1]
    [first, second] = rows_of(found, 0.3)  # ways of steering of their own
    assert (first["n"], first["n_C"], first["failed"], first["C"]) == (2, 1, 1, 0.05)
    assert second["time"] == [0.5, 1.0]


def test_scores_of_any_origin_need_say_only_what_tells_texts_apart() -> None:
    pairs = twins(FIRST, FIRST._replace(amplitude=4.0), count=1)
    scores = [
        Record(id="p0", sample=0, score=10),
        Record(id="p0", sample=0, feature=7, amplitude=2, score=30),
        Record(id="p0", sample=0, steer={"amplitude": 4.0, "sae": "saes/a"}, score=50),
        Record(id="p0", sample=0, amplitude=4.0, score=70),
        Record(id="p0", sample=0, feature=8, amplitude=4.0, score=99),
        Record(id="p0", sample=1, score=99),
        Record(id="p0", sample=0, amplitude=4.0, score=None),
    ]
    answers = Answers(scores)
    found = [outcome for _, outcome in outcomes_of(pairs, answers.of)]
    assert [outcome.concept for outcome in found] == [(10, 30), (10, 60)]
    assert [outcome.failed for outcome in found] == [0, 1]
    assert answers.used == 6
    bad = Record(id="p0", sample=0, score=101)
    bad.where = "f:1"
    with pytest.raises(DataError, match="f:1: field 'score' is 101"):
        Answers([bad])


def _texts(*completions: str) -> list[SampledText]:
    return [read_sampled_text(completion(n, 0, text)) for n, text in enumerate(completions)]


@torch.no_grad()
def test_perplexity_is_the_exponential_of_the_mean_negative_log_likelihood() -> None:
    policy, texts = tiny_policy("ar"), _texts("2340=", "1", "00112233")
    found = perplexities(policy, texts, 8, MaskPlan(), 2)
    for text in texts:
        ids = torch.tensor(policy.encode_text(f"01{text.completion}"))[:8]
        logits = policy.model(input_ids=ids[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[1:])
        assert found[text.name] == pytest.approx(float(loss.exp()), rel=1e-9)
    empty = [read_sampled_text(Record(completion(0, 0, ""), prompt="0"))]
    assert list(perplexities(policy, empty, 8, MaskPlan(), 2).values()) == [None]


@pytest.mark.parametrize("family", ["llada", "dream"])
@torch.no_grad()
def test_a_diffusion_model_gives_the_bound_of_its_elbo(family: Family) -> None:
    """Of two tokens the second is either hidden or not: the ELBO is its log-probability."""
    policy = tiny_policy(family)
    [short] = [read_sampled_text(Record(completion(0, 0, "2"), prompt="0"))]
    first, second = policy.encode_text("02")
    seen = torch.tensor([[first, policy.mask_id]])
    where = policy.source(torch.tensor([1]))
    p = policy.predict(seen, None, torch.tensor([0]), torch.tensor([1])).softmax(-1)[0, second]
    assert where.tolist() == [1 - policy.shift]
    found = perplexities(policy, [short], 8, MaskPlan(samples=4), 2)
    assert found[short.name] == pytest.approx(1 / float(p), rel=1e-9)
    # Three tokens, two to predict: the bound is exp of half the mean over both orders of revealing.
    long = _texts("3")
    a, b, c = policy.encode_text("013")

    def log_p(ids: list[int], place: int, token: int) -> float:
        at = torch.tensor([place])
        logits = policy.predict(torch.tensor([ids]), None, torch.tensor([0]), at)
        return float(logits.log_softmax(-1)[0, token])

    m = policy.mask_id or 0
    left = log_p([a, m, m], 1, b) + log_p([a, b, m], 2, c)
    right = log_p([a, m, m], 2, c) + log_p([a, m, c], 1, b)
    found = perplexities(policy, long, 8, MaskPlan(samples=4000), 512)
    assert math.log(found[long[0].name] or 0) == pytest.approx(-(left + right) / 4, rel=0.03)


def test_prompt_and_completion_are_tokenized_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def encode(_: Policy, text: str) -> list[int]:
        seen.append(text)
        return [int(digit) for digit in text]

    for name in ("encode_context", "encode_text"):
        monkeypatch.setattr(Policy, name, encode)
    perplexities(tiny_policy("ar"), _texts("23403"), 8, MaskPlan(), 2)
    assert seen == ["01", "23403"]


def test_a_text_that_the_model_cannot_read_is_named() -> None:
    for text, message in (("x", "no tokens for"), (None, "no 'prompt'")):
        record = completion(0, 0, "1", prompt=text)
        record.where = "f:1"
        with pytest.raises(DataError, match=f"f:1: .*{message}"):
            perplexities(tiny_policy("ar"), [read_sampled_text(record)], 8, MaskPlan(), 2)


@pytest.fixture(scope="module")
def parrots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models that answer whatever they are asked with one character over and over."""
    made = {}
    for character in "7x":
        policy = make_policy(SmallModel("ar", 16, 1, 2), byte_tokenizer())
        [token] = policy.encode_text(character)
        with torch.no_grad():
            for name, weight in policy.model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                    weight.zero_()
                elif "embed" in name:
                    weight.fill_(1.0)
            policy.head.projection.weight[token] = 1.0
        directory = tmp_path_factory.mktemp("parrot")
        save_policy(policy, directory)
        made[character] = str(directory)
    return made


def test_a_judge_answers_here_or_elsewhere_alike(tmp_path: Path, parrots: dict[str, str]) -> None:
    plain = [completion(n, 0, f"plain {n}") for n in range(3)]
    steered = [completion(n, 0, f"steered {n}", FIRST) for n in range(3)]
    base = ["sae-steering", "--baseline", written(tmp_path / "b", plain)]
    files = [written(tmp_path / "s", steered)]
    asked, answers, log = (str(tmp_path / name) for name in ("asked", "answers", "log"))

    def run(*line: str) -> list[dict[str, Any]]:
        done = CliRunner().invoke(app, list(line))
        assert done.exit_code == 0, done.stderr
        return [json.loads(row) for row in done.stdout.splitlines()]

    assert run(*base, "--concept", "ships", "--judge-prompts", asked, *files) == []
    greedy = ["rollout", "-n", "1", "--temperature", "0", "--gen-length", "2"]
    run(*greedy, "-m", parrots["7"], "-o", answers, asked)
    elsewhere = run(*base, "--judge-answers", answers, *files)
    judge = ["--concept", "ships", "--judge", parrots["7"], "--judge-length", "2"]
    here = run(*base, *judge, "--judge-prompts", log, *files)
    assert here == elsewhere == run(*base, "--judge-answers", log, *files)
    [row] = here
    assert (row["c_before"], row["c_after"], row["C"], row["n_C"]) == (77, 77, 0, 3)
    assert (row["P"], row["S"], row["failed"]) == (None, None, 0)
    assert len(read_jsonl(tmp_path / "log")) == 6
    silent = ["--concept", "ships", "--judge", parrots["x"]]
    [row] = run(*base, *silent, "--fluency", parrots["7"], *files)
    assert (row["C"], row["n_C"], row["failed"], row["n_P"], row["bound"]) == (None, 0, 6, 3, False)
    # Byte after byte the other 258 tokens are alike, and "7" is likelier.
    assert row["ppl_before"] > 258


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "nothing says what to score by"),
        (["--judge", "m"], 2, "--concept or from --concepts"),
        (["--judge-prompts", "-", "--concept", "a", "--concepts", "f"], 2, "or from --concepts"),
        (["--judge", "m", "--judge-prompts", "-", "--concept", "a"], 2, "a file"),
        (["--judge-answers", "f", "--judge", "m", "--concept", "a"], 2, "not both"),
        (["--judge-answers", "f", "--concept-from", "reward"], 2, "needs no judge"),
        (["--fluency", "m", "--perplexity", "ppl"], 2, "give one"),
        (["--judge-answers", "OTHER"], 65, "none of the scores is about"),
        (["--concept-from", "reward"], 65, "b:1: field 'reward' is missing"),
    ],
)
def test_what_does_not_make_sense_is_refused(
    tmp_path: Path, options: list[str], code: int, message: str
) -> None:
    other = written(tmp_path / "other", [Record(id="q", sample=0, score=3)])
    base = ["sae-steering", "--baseline", written(tmp_path / "b", [completion(0, 0, "a")])]
    line = [*base, *options, written(tmp_path / "s", [completion(0, 0, "b", FIRST)])]
    done = CliRunner().invoke(app, [other if word == "OTHER" else word for word in line])
    assert done.exit_code == code
    assert message in done.stderr
