"""credit.py: the stages of a round are those of the pipe, and what is scored is counted."""

import credit
import orjson
import pytest
from typer.testing import CliRunner

from dlmctl.models.saving import save_policy
from dlmctl.models.small import make_policy
from dlmctl.models.tokenizers import word_tokenizer
from dlmctl.settings.prompts import Prompts
from dlmctl.settings.small import SmallModel
from dlmctl.tasks.sources import prompts

STAGES = ["rollout", "verify", "advantage", "advantage --algo srpo", "update"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("shapes")
    made = prompts("shapes", Prompts(completions=True), limit=300)
    texts = [row["prompt"] + " " + row["completion"] for row in made]
    policy = make_policy(SmallModel("qwen2.5-vl", 32, 2, 2, gen_length=8), word_tokenizer(texts))
    save_policy(policy, directory)
    return str(directory)


def rows(model: str) -> dict[str, dict]:
    line = "--rounds 3 --prompts 2 -n 3 --batch-size 6 --device cpu --json -m"
    done = CliRunner().invoke(credit.app, [*line.split(), model])
    assert done.exit_code == 0, done.stderr
    return {row["stage"]: row for row in map(orjson.loads, done.stdout.splitlines())}


def test_the_round_is_the_sum_of_its_stages(model):
    found = rows(model)
    assert list(found) == [*STAGES, "round of grpo", "round of srpo"]
    spent = {stage: row["seconds"] for stage, row in found.items()}
    plain = sum(spent[stage] for stage in STAGES) - spent[credit.CREDIT]
    assert spent["round of grpo"] == pytest.approx(plain)
    assert spent["round of srpo"] == pytest.approx(plain + spent[credit.CREDIT])
    assert found["round of srpo"]["ratio"] == pytest.approx(spent["round of srpo"] / plain)
    # Random weights do not keep the layout.
    assert found[credit.CREDIT]["scored"] == 0


def test_completions_that_keep_the_layout_are_scored(model, monkeypatch):
    """Sampling replaced by right responses, and wrong ones, of the same prompts."""

    def answered(batch, policy, settings, samples, seed, size):
        for record in original(batch, policy, settings, samples, seed, size):
            wrong = "1" if record["answer"] == "0" else "0"
            number = record["answer"] if record["sample"] else wrong
            text = (
                "<description> red circle top left </description> <think> red circle : 1 </think> "
                f"\\boxed{{{number}}}"
            )
            record["completion"] = text
            record["tokens"]["completion"] = policy.encode_text(text)
            record["rollout"]["log_probs"] = [-1.0] * len(record["tokens"]["completion"])
            yield record

    original = credit.rollout
    monkeypatch.setattr(credit, "rollout", answered)
    assert rows(model)[credit.CREDIT]["scored"] == 1
