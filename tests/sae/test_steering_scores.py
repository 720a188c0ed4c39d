"""Scores of steering by hand, texts beside their twins, judges, and perplexities."""

from __future__ import annotations

import json
import math
import random
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from conftest import read_jsonl, tiny_policy
from typer.testing import CliRunner

from dlmctl.cli import app
from dlmctl.diffusion.scoring import MaskPlan
from dlmctl.models.policy import Family, Policy
from dlmctl.models.saving import save_policy
from dlmctl.models.small import make_policy
from dlmctl.models.tokenizers import byte_tokenizer
from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record, read_records
from dlmctl.sae.judges import read_score
from dlmctl.sae.steering.fluency import perplexities
from dlmctl.sae.steering.questions import Answers, explanations, questions
from dlmctl.sae.steering.scores import Outcome, outcomes_of, rows_of
from dlmctl.sae.steering.twins import (
    SampledText,
    Treatment,
    Twins,
    read_baseline,
    read_sampled_text,
    read_twins,
)
from dlmctl.settings.small import SmallModel

FIRST = Treatment("saes/a", 3, 7, 2.0, "all", None)


def _completion(number: int, sample: int, text: str, *steers: Treatment, **more: Any) -> Record:
    made: dict[str, Any] = {"seed": 1, "revision": "r", "temperature": 0.9}
    if steers:
        made["steer"] = [steer.fields() for steer in steers]
    fields = {"id": f"p{number}", "sample": sample, "prompt": "01", "completion": text}
    return Record({**fields, "tokens": {"prompt": [3, 4]}, "rollout": made, **more})


def _pairs(*treatments: Treatment, count: int = 2) -> list[Twins]:
    plain = [_completion(n, 0, f"plain{n}") for n in range(count)]
    steered = [
        _completion(n, 0, f"{t.feature}-{t.amplitude}-{n}", t)
        for t in treatments
        for n in range(count)
    ]
    for number, record in enumerate([*plain, *steered]):
        record.where = f"f:{number}"
    return list(read_twins(steered, read_baseline(plain, read_sampled_text), read_sampled_text))


def test_scores_by_hand() -> None:
    outcomes = [
        (FIRST, Outcome((20, 60), (10.0, 12.0))),  # C 0.4, P -0.2
        (FIRST, Outcome((50, 40), (8.0, 4.0))),  # C -0.1, P 0.5
    ]
    [row] = rows_of(outcomes, 0.3, bound=False)
    assert row["C"] == pytest.approx(0.15)
    assert row["P"] == pytest.approx(0.15)
    assert row["S"] == pytest.approx(0.15 + 0.3 * 0.15)
    assert (row["c_before"], row["c_after"]) == (35, 50)
    assert (row["ppl_before"], row["ppl_after"]) == (9, 8)
    assert (row["n"], row["n_C"], row["n_P"], row["failed"], row["bound"]) == (2, 2, 2, 0, False)
    assert {name: row[name] for name in FIRST._fields} == {**FIRST._asdict()}
    assert row["C_share"] == pytest.approx(0.15 / 0.65)
    assert row["log_ppl_ratio"] == pytest.approx((math.log(1.2) + math.log(0.5)) / 2)
    assert row["ppl_ratio"] == pytest.approx(math.sqrt(0.6))


def test_errors_count_prompts_and_not_completions() -> None:
    gains = {"a": [0.4, 0.6], "b": [0.1], "c": [-0.2, 0.3, 0.2]}
    outcomes = [
        (FIRST, Outcome((20, 20 + 100 * gain), (10.0, 10.0 * (1 - gain)), 0, prompt))
        for prompt, values in gains.items()
        for gain in values
    ]
    [row] = rows_of(outcomes, 0.5)
    mean = sum(sum(values) for values in gains.values()) / 6
    sums = [sum(values) - len(values) * mean for values in gains.values()]
    error = math.sqrt(3 / 2 * sum(s * s for s in sums)) / 6
    assert row["C_se"] == row["P_se"] == pytest.approx(error)
    assert row["C_share_se"] == pytest.approx(error / 0.8)  # c_before is 20 everywhere
    assert row["S_se"] == pytest.approx(1.5 * error)  # C and P are the same numbers
    once = [(FIRST, outcome._replace(prompt=n)) for n, (_, outcome) in enumerate(outcomes)]
    [row] = rows_of(once, 0.5)
    flat = [gain for values in gains.values() for gain in values]
    assert row["C_se"] == pytest.approx(statistics.stdev(flat) / math.sqrt(6))
    [row] = rows_of([(FIRST, outcome._replace(prompt="a")) for _, outcome in outcomes], 0.5)
    assert (row["C"], row["C_se"]) == (pytest.approx(mean), None)


def test_the_share_of_the_possible_gain_has_the_error_of_a_ratio() -> None:
    """The jackknife over prompts is another way to the same number."""
    draw = random.Random(3)
    outcomes = []
    for prompt in range(200):
        before = draw.uniform(0, 60)
        after = before + draw.uniform(-10, 40)
        outcomes.append((FIRST, Outcome((before, after), None, 0, prompt)))
    [row] = rows_of(outcomes, 0.3)
    left = [rows_of(outcomes[:n] + outcomes[n + 1 :], 0.3)[0]["C_share"] for n in range(200)]
    jackknife = math.sqrt(199 * statistics.pvariance(left))
    assert row["C_share_se"] == pytest.approx(jackknife, rel=0.02)


def test_the_error_of_several_features_knows_that_they_share_prompts() -> None:
    other, outcomes = FIRST._replace(feature=8), []
    for prompt, (first, second) in enumerate([(0.1, -0.1), (0.4, -0.4), (0.2, -0.2)]):
        outcomes += [(FIRST, Outcome((0, 100 * first), None, 0, prompt))]
        outcomes += [(other, Outcome((50, 50 + 100 * second), None, 0, prompt))]
    *_, summary = rows_of(outcomes, 0.3)
    assert (summary["C"], summary["C_se"]) == (pytest.approx(0), pytest.approx(0))


def test_one_text_without_sense_moves_the_mean_and_not_the_rest() -> None:
    outcomes = [
        (FIRST, Outcome((0, 50), (10.0, 160.0))),  # P -15
        (FIRST, Outcome((0, 40), (10.0, 8.0))),  # P 0.2
        (FIRST, Outcome((0, 0), (10.0, 5.0))),  # P 0.5
    ]
    [row] = rows_of(outcomes, 0.3)
    assert row["P"] == pytest.approx((-15 + 0.2 + 0.5) / 3)
    assert row["P_median"] == pytest.approx(0.2)
    assert row["P_clipped"] == pytest.approx((-1 + 0.2 + 0.5) / 3)
    assert row["S"] == pytest.approx(0.3 + 0.3 * row["P"])
    assert row["S_clipped"] == pytest.approx(0.3 - 0.03)
    # 0.5 - 4.5, 0.4 + 0.06, 0 + 0.15
    assert row["S_median"] == pytest.approx(0.15)
    assert row["C_median"] == pytest.approx(0.4)


def test_completions_are_averaged_before_features_and_ways_stay_apart() -> None:
    other = FIRST._replace(feature=8)
    outcomes = [(FIRST, Outcome((0, 100), None))] * 3
    outcomes += [(other, Outcome((0, 0), (4.0, 2.0))), (other, Outcome(None, (4.0, 4.0), failed=1))]
    outcomes += [(FIRST._replace(amplitude=4.0), Outcome((0, 10), None))]
    *features, whole = rows_of(outcomes, 0.5)
    assert [(r["feature"], r["amplitude"], r["n"]) for r in features] == [
        (7, 2.0, 3),
        (8, 2.0, 2),
        (7, 4.0, 1),
    ]
    assert [r["S"] for r in features] == [None, 0 + 0.5 * 0.25, None]
    assert [(r["n_C"], r["n_P"], r["failed"]) for r in features] == [
        (3, 0, 0),
        (1, 2, 1),
        (1, 0, 0),
    ]
    assert (whole["feature"], whole["features"], whole["amplitude"]) == ("all", 2, 2.0)
    assert (whole["n"], whole["n_C"], whole["n_P"], whole["failed"]) == (5, 4, 2, 1)
    assert whole["C"] == 0.5  # and not 0.75, the mean over completions
    assert (whole["P"], whole["S"]) == (0.25, 0.125)


def _written(path: Path, records: list[Record]) -> str:
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    return str(path)


@pytest.mark.parametrize(
    ("plain", "steered", "message"),
    [
        ({}, {"sample": 1}, r"s:1: no baseline has id 'p0' and sample 1"),
        ({}, {"rollout": {"seed": 1}}, r"s:1: it is not steered"),
        (
            {},
            {"rollout": {"seed": 2, "steer": [FIRST.fields()]}},
            r"s:1: its seed is not that of its baseline .*b:1",
        ),
        ({"tokens": {"prompt": [3]}}, {}, r"s:1: its prompt is not that of its baseline .*b:1"),
        (
            {},
            {"rollout": {"steer": [FIRST.fields(), FIRST.fields()]}},
            r"s:1: 2 features are steered at once",
        ),
        ({}, {"rollout": {"steer": [{"sae": "a"}]}}, r"s:1: field 'rollout.steer' is not as"),
        ({"rollout": {"steer": [FIRST.fields()]}}, {}, r"b:1: it is steered"),
        ({}, {"completion": None}, r"s:1: field 'completion' is missing"),
        ({"reward": 1.5}, {}, r"b:1: field 'reward' is 1.5"),
        ({"reward": None}, {}, r"b:1: field 'reward' is missing.*dlmctl verify"),
        ({"ppl": 0.0}, {}, r"b:1: field 'ppl' is 0"),
    ],
)
def test_what_cannot_be_paired_is_said_with_its_place(
    tmp_path: Path, plain: dict[str, Any], steered: dict[str, Any], message: str
) -> None:
    measured = {"reward": 0.5, "ppl": 3.0}
    first = Record(_completion(0, 0, "a", **measured), **plain)
    second = Record(_completion(0, 0, "b", FIRST, **measured), **steered)
    files = [_written(tmp_path / "b", [first]), _written(tmp_path / "s", [second])]
    read = partial(read_sampled_text, score_field="reward", perplexity="ppl")
    with pytest.raises(DataError) as caught:
        list(
            read_twins(read_records(files[1:]), read_baseline(read_records(files[:1]), read), read)
        )
    assert str(caught.value).startswith(str(tmp_path))
    caught.match(message)


def test_samples_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    plain, steered = _completion(0, 0, "a"), _completion(0, 0, "b", FIRST)
    twice = _written(tmp_path / "b", [plain, plain])
    with pytest.raises(DataError, match=r"b:2: it is the same sample as .*b:1"):
        read_baseline(read_records([twice]), read_sampled_text)
    other = _completion(0, 0, "b", FIRST._replace(scope="update"))
    file = _written(tmp_path / "s", [steered, other])
    with pytest.raises(DataError, match=r"s:1: it is the same sample as .*s:1, steered alike"):
        list(
            read_twins(
                read_records([file, file]),
                read_baseline([plain], read_sampled_text),
                read_sampled_text,
            )
        )


def test_records_that_are_skipped_leave_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steered = [_completion(0, 0, "b", FIRST), _completion(1, 0, "b", FIRST), Record(error={})]
    baseline = read_baseline([_completion(0, 0, "a")], read_sampled_text)
    file = _written(tmp_path / "s", steered)
    assert len(list(read_twins(read_records([file]), baseline, read_sampled_text, "skip"))) == 1
    assert "s:2: no baseline" in (said := capsys.readouterr().err)
    assert "left out: 1 records with an error" in said
    assert len(list(read_twins(read_records([file]), baseline, read_sampled_text, "keep"))) == 1
    assert "left out: 2 records" in capsys.readouterr().err


def test_what_the_records_say_is_measured() -> None:
    plain = _completion(0, 0, "a", reward=0.2, ppl=10.0)
    steered = _completion(0, 0, "b", FIRST, reward=0.9, ppl=5.0)
    read = partial(read_sampled_text, score_field="reward", perplexity="ppl")
    [(treatment, outcome)] = outcomes_of(read_twins([steered], read_baseline([plain], read), read))
    assert treatment == FIRST
    assert outcome.concept == pytest.approx((20, 90))
    assert outcome.perplexity == (10.0, 5.0)
    read = partial(read_sampled_text, score_field="score")
    texts = [read(Record(record, score=35)) for record in (plain, steered)]
    assert [text.concept for text in texts] == [35, 35]


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
    pairs = _pairs(FIRST, FIRST._replace(amplitude=4.0), FIRST._replace(feature=8))
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
        list(questions(_pairs(FIRST._replace(feature=9)), found))


def test_answers_find_their_texts_and_failed_ones_are_counted() -> None:
    pairs = _pairs(FIRST, FIRST._replace(feature=8, time=(0.5, 1.0)))
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
    pairs = _pairs(FIRST, FIRST._replace(amplitude=4.0), count=1)
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
    return [read_sampled_text(_completion(n, 0, text)) for n, text in enumerate(completions)]


@torch.no_grad()
def test_perplexity_is_the_exponential_of_the_mean_negative_log_likelihood() -> None:
    policy, texts = tiny_policy("ar"), _texts("2340=", "1", "00112233")
    found = perplexities(policy, texts, 8, MaskPlan(), 2)
    for text in texts:
        ids = torch.tensor(policy.encode_text(f"01{text.completion}"))[:8]
        logits = policy.model(input_ids=ids[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[1:])
        assert found[text.name] == pytest.approx(float(loss.exp()), rel=1e-9)
    empty = [read_sampled_text(Record(_completion(0, 0, ""), prompt="0"))]
    assert list(perplexities(policy, empty, 8, MaskPlan(), 2).values()) == [None]


@pytest.mark.parametrize("family", ["llada", "dream"])
@torch.no_grad()
def test_a_diffusion_model_gives_the_bound_of_its_elbo(family: Family) -> None:
    """Of two tokens the second is either hidden or not: the ELBO is its log-probability."""
    policy = tiny_policy(family)
    [short] = [read_sampled_text(Record(_completion(0, 0, "2"), prompt="0"))]
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
        record = _completion(0, 0, "1", prompt=text)
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
    plain = [_completion(n, 0, f"plain {n}") for n in range(3)]
    steered = [_completion(n, 0, f"steered {n}", FIRST) for n in range(3)]
    base = ["sae-steering", "--baseline", _written(tmp_path / "b", plain)]
    files = [_written(tmp_path / "s", steered)]
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
    other = _written(tmp_path / "other", [Record(id="q", sample=0, score=3)])
    base = ["sae-steering", "--baseline", _written(tmp_path / "b", [_completion(0, 0, "a")])]
    line = [*base, *options, _written(tmp_path / "s", [_completion(0, 0, "b", FIRST)])]
    done = CliRunner().invoke(app, [other if word == "OTHER" else word for word in line])
    assert done.exit_code == code
    assert message in done.stderr
