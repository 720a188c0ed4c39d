"""`--model dlmctl` in lm-evaluation-harness itself, if installed, compared with our own stages.

pip install 'dlmctl[eval]' && pytest tests/benchmarks/test_lm_eval.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import torch
from conftest import invoke, read_jsonl

from dlmctl.diffusion.elbo import Example, elbo_samples
from dlmctl.diffusion.sampling import Request, configured
from dlmctl.diffusion.scoring import MaskPlan, completion_masks, score
from dlmctl.models.loading import load_policy
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record
from dlmctl.settings.sampler import Sampler

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

TASKS = {
    "grids": """
output_type: generate_until
doc_to_target: "{{solution}}"
generation_kwargs: {until: ["\\n"], do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "likelihood": """
output_type: loglikelihood
doc_to_target: "{{solution}}"
metric_list: [{metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_target: "{{prompt}}{{solution}}"
metric_list: [{metric: word_perplexity}]
""",
}
COMMON = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
doc_to_text: "{text}"
target_delimiter: ""
"""


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of puzzles, and of tasks that ask for them."""
    folder = tmp_path_factory.mktemp("harness")
    data = folder / "puzzles.jsonl"
    assert invoke("prompts", "sudoku", "-n", "12", "--holes", "2-9", "-o", data).exit_code == 0
    for name, task in TASKS.items():
        text = "" if name == "rolling" else "{{prompt}}"
        head = COMMON.format(name=name, data=data, cache=folder / "cache", text=text)
        (folder / f"{name}.yaml").write_text(head + task)
    return folder


@pytest.fixture(scope="module")
def evaluated(puzzles: Path) -> dict[str, Any]:
    """What the command writes, all tasks in one run: results, and the samples by task."""
    done = invoke(
        "lm-eval",
        "--model_args",
        "pretrained=builtin:puzzles,steps=8,masks_per_sample=6,seed=3",
        "--tasks",
        ",".join(TASKS),
        "--include_path",
        puzzles,
        "--batch_size",
        "5",
        "--output_path",
        puzzles / "out",
        "--log_samples",
        "--device",
        "cpu",
    )
    assert done.exit_code == 0, done.output
    [results] = (puzzles / "out").rglob("results_*.json")
    made = {"results": orjson.loads(results.read_bytes())}
    for name in TASKS:
        [samples] = (puzzles / "out").rglob(f"samples_{name}_*.jsonl")
        made[name] = sorted(read_jsonl(samples), key=lambda sample: sample["doc_id"])
    return made


def test_generation_is_that_of_rollout_and_accuracy_that_of_verify(
    puzzles: Path, evaluated: dict[str, Any]
) -> None:
    ours = puzzles / "ours.jsonl"
    sampled, data = puzzles / "sampled.jsonl", puzzles / "puzzles.jsonl"
    options = ("-n", "1", "--temperature", "0", "--steps", "8", "--seed", "3", "--device", "cpu")
    assert invoke("rollout", *options, data, "-o", sampled).exit_code == 0
    assert invoke("verify", sampled, "-o", ours).exit_code == 0
    records = read_jsonl(ours)
    texts = [sample["filtered_resps"][0] for sample in evaluated["grids"]]
    assert texts == [record["completion"] for record in records]
    right = [record["verdict"]["sudoku"]["correct"] for record in records]
    assert [bool(sample["exact_match"]) for sample in evaluated["grids"]] == right
    assert 0 < sum(right) < len(right)
    mean = evaluated["results"]["results"]["grids"]["exact_match,none"]
    assert mean == pytest.approx(sum(right) / len(right))


def test_a_log_likelihood_is_the_score_of_score_elbo(
    puzzles: Path, evaluated: dict[str, Any]
) -> None:
    records = read_jsonl(puzzles / "puzzles.jsonl")
    for record in records:
        record["completion"] = record["solution"]
    given, scored = puzzles / "solved.jsonl", puzzles / "scored.jsonl"
    given.write_bytes(b"".join(orjson.dumps(r, option=orjson.OPT_APPEND_NEWLINE) for r in records))
    options = ("-k", "6", "--seed", "3", "--device", "cpu")
    assert invoke("score-elbo", *options, given, "-o", scored).exit_code == 0
    values = [record["elbo"]["policy"]["value"] for record in read_jsonl(scored)]
    found = [float(sample["filtered_resps"][0][0]) for sample in evaluated["likelihood"]]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(values), rtol=1e-5, atol=1e-5)


def test_the_greedy_continuation_is_the_one_that_is_generated(evaluated: dict[str, Any]) -> None:
    solutions = [sample["doc"]["solution"] for sample in evaluated["likelihood"]]
    greedy = [bool(sample["acc"]) for sample in evaluated["likelihood"]]
    texts = [sample["filtered_resps"][0] for sample in evaluated["grids"]]
    assert greedy == [text == solution for text, solution in zip(texts, solutions, strict=True)]


def test_a_rolling_log_likelihood_is_the_score_of_the_whole_text(
    evaluated: dict[str, Any],
) -> None:
    policy = load_policy("builtin:puzzles", "cpu")
    for sample in evaluated["rolling"][:3]:
        doc = sample["doc"]
        ids = policy.encode_text(doc["prompt"] + doc["solution"])
        masks = completion_masks(policy, 0, ids, MaskPlan(samples=6), (3, doc["id"], 0, 0), 0)
        [expected] = elbo_samples(policy, [Example([], ids, masks)], 4).mean(dim=1).tolist()
        assert float(sample["filtered_resps"][0]) == pytest.approx(expected, abs=1e-4)


def _request(*arguments: Any, number: int = 0, **doc: Any) -> Any:
    return SimpleNamespace(args=arguments, doc=doc, doc_id=number, idx=0, task_name="t")


def _model(name: str, **arguments: Any) -> Any:
    from dlmctl.bench.lm_eval import HarnessModel

    return HarnessModel(name, device="cpu", **arguments)


def test_an_autoregressive_model_gives_its_exact_likelihood(
    saved_models: Callable[[str], str],
) -> None:
    model = _model(saved_models("ar"))
    [(value, _), (whole, _)] = model.loglikelihood([_request("12", "34="), _request("", "1234=")])
    [rolled] = model.loglikelihood_rolling([_request("1234=")])
    policy = model.policy
    first = policy.tokenizer.bos_token_id
    ids = [policy.eos_id if first is None else first, *policy.encode_text("1234=")]
    with torch.no_grad():

        def exact(tokens: list[int], start: int) -> float:
            logs = policy.model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
            return sum(float(logs[i - 1, tokens[i]]) for i in range(start, len(tokens)))

        assert value == pytest.approx(exact(ids[1:], 2), abs=1e-4)
        assert whole == rolled == pytest.approx(exact(ids, 1), abs=1e-4)


@pytest.mark.parametrize("family", ["ar", "dream", "mlm"])
def test_only_the_models_own_completion_is_greedy(
    saved_models: Callable[[str], str], family: str
) -> None:
    model = _model(saved_models(family), gen_length=5)
    policy = model.policy
    settings = configured(policy, Sampler(gen_length=5, temperature=0.0))
    [tokens] = model._sample([Request(policy.encode_text("12="), 1)], settings)
    text = policy.tokenizer.decode(tokens)
    if policy.encode_text(text) != tokens:
        pytest.skip("a completion with special tokens has no text")
    other = text[:-1] + ("1" if text[-1] != "1" else "2")
    answers = model.loglikelihood([_request("12=", text), _request("12=", other)])
    assert [greedy for _, greedy in answers] == [True, False]
    assert model.generate_until([_request("12=", {"until": [text[2]]})]) == [
        text[: text.index(text[2])]
    ]


def test_choices_share_the_masks_of_their_question(saved_models: Callable[[str], str]) -> None:
    model = _model(saved_models("llada"), greedy=False)
    choices = [_request("12=", "3412"), _request("12=", "3412"), _request("12=", "3412", number=1)]
    [(first, _), (second, _), (third, _)] = model.loglikelihood(choices)
    assert first == second != third


def test_samples_of_a_document_differ_and_its_length_holds(
    saved_models: Callable[[str], str],
) -> None:
    model = _model(saved_models("llada"))
    asked = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 9}
    requests = [_request("12=", asked)] * 3
    texts = model.generate_until(requests)
    assert len(set(texts)) == 3
    assert texts == model.generate_until(requests)
    assert model._settings(asked).gen_length == 9
    assert _model(saved_models("llada"), gen_length=4)._settings(asked).gen_length == 4


def test_a_long_context_loses_its_beginning(saved_models: Callable[[str], str]) -> None:
    model = _model(saved_models("llada"), max_length=8, greedy=False)
    long, short = model.loglikelihood(
        [_request("1234123412", "3412", id=1), _request("3412", "3412", id=1)]
    )
    assert long == short
    with pytest.raises(DataError, match="max_length"):
        model.loglikelihood([_request("1", "34123412")])
    pieces = model.loglikelihood_rolling([_request("1234123412", id=1)])
    assert pieces[0] < 0


def test_what_is_not_known_is_said(saved_models: Callable[[str], str], capsys: Any) -> None:
    with pytest.raises(UsageError, match="gen_len "):
        _model(saved_models("llada"), gen_len=4)
    for wrong in ({"remasking": "sure"}, {"masks": "all"}, {"cache": True}):
        with pytest.raises(UsageError, match="is none of"):
            _model(saved_models("llada"), **wrong)
    model = _model(saved_models("llada"), gen_length=4)
    with pytest.raises(UsageError, match="chat template"):
        model.apply_chat_template([{"role": "user", "content": "1"}])
    model.generate_until([_request("1", {"until": [], "top_p": 0.9})])
    assert "top_p" in capsys.readouterr().err


def test_a_score_is_that_of_the_stage(saved_models: Callable[[str], str]) -> None:
    model = _model(saved_models("mlm"), masks="uniform", masks_per_sample=3, greedy=False, seed=9)
    record = Record(id="a", sample=2, prompt="12=", completion="3412")
    [scored] = score([record], {"policy": model.policy}, MaskPlan("uniform", 3, 9), 4)
    [(value, greedy)] = model.loglikelihood([_request("12=", "3412", id="a", sample=2)])
    assert value == pytest.approx(scored["elbo"]["policy"]["value"])
    assert not greedy
