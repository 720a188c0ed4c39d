"""`advantage --algo srpo` on records, and the update that reads its weights."""

from __future__ import annotations

import orjson
import pytest
from conftest import invoke, noise_image, read_jsonl

from dlmctl.diffusion.rollout import rollout
from dlmctl.diffusion.sampling import configured
from dlmctl.models.loading import load_policy
from dlmctl.models.saving import save_policy
from dlmctl.models.small import make_policy
from dlmctl.models.tokenizers import character_tokenizer
from dlmctl.records.jsonl import Record
from dlmctl.settings.sampler import Sampler
from dlmctl.settings.small import SmallModel

GOOD = "<description>12 3</description><think>3 = 3</think>\\boxed{3}"
OTHER = "<description>2 2 1</description><think>1</think>\\boxed{1}"
MALFORMED = "<description>12 3</description>\\boxed{3}"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("vlm")
    tokenizer = character_tokenizer("0123456789=<>/descriptonhkbx\\{} ?a")
    save_policy(make_policy(SmallModel("qwen2.5-vl", 32, 2, 2), tokenizer), directory)
    return str(directory)


@pytest.fixture(scope="module")
def verified(model) -> list[dict]:
    """Two groups of three, as rollout and verify would have written them."""
    policy = load_policy(model)
    rows = []
    for number, rewards in enumerate([(1.0, 0.0, 0.1), (1.0, 1.0, 1.0)]):
        prompt = Record(id=f"p{number}", prompt="<image>1?", images=[noise_image(number)])
        settings = configured(policy, Sampler(gen_length=2))
        made = rollout([prompt], policy, settings, 3, 0, 8)
        for record, text, reward in zip(made, (GOOD, OTHER, MALFORMED), rewards, strict=True):
            record["completion"], record["reward"] = text, reward
            record["tokens"]["completion"] = [*policy.encode_text(text), policy.eos_id]
            del record["rollout"]["log_probs"]
            rows.append(dict(record))
    return rows


def written(path, rows: list[dict]) -> str:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return str(path)


def credited(tmp_path, rows: list[dict], *options: str) -> list[dict]:
    source, target = written(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    result = invoke("advantage", "--algo", "srpo", *options, source, "-o", target)
    assert result.exit_code == 0, result.output
    return read_jsonl(target)


def test_every_token_has_a_role_a_signal_and_a_weight(tmp_path, verified, model):
    made = credited(tmp_path, verified)
    policy = load_policy(model)
    for record in made:
        ids = record["tokens"]["completion"]
        assert len(record["roles"]) == len(record["signal"]) == len(record["weights"]) == len(ids)
        assert min(record["weights"]) > 0
        text = [policy.tokenizer.decode([i]) for i in ids]
        seen = "".join(t for t, role in zip(text, record["roles"], strict=True) if role == 1)
        thought = "".join(t for t, role in zip(text, record["roles"], strict=True) if role == 2)
        expected = {GOOD: ("12 3", "3 = 3"), OTHER: ("2 2 1", "1"), MALFORMED: ("", "")}
        assert (seen, thought) == expected[record["completion"]]
    good = made[0]
    for weight, role in zip(good["weights"], good["roles"], strict=True):
        assert role or weight == 1
    assert len({*good["weights"]}) > 2
    assert good["credit"]["scored"]
    assert good["credit"]["format_ok"]


def test_malformed_and_idle_completions_have_weights_of_one(tmp_path, verified):
    made = credited(tmp_path, verified)
    assert set(made[2]["weights"]) == {1.0}
    assert not made[2]["credit"]["format_ok"]
    # A group with equal rewards has advantage 0: nothing to weight.
    for record in made[3:]:
        assert (record["advantage"], set(record["weights"])) == (0, {1.0})
        assert not record["credit"]["scored"]


def test_weights_are_the_same_again_and_in_any_batch(tmp_path, verified):
    first = credited(tmp_path, verified)
    assert credited(tmp_path, verified) == first
    for record, other in zip(first, credited(tmp_path, verified, "-b", "1"), strict=True):
        assert other["weights"] == pytest.approx(record["weights"], abs=1e-5)
    group_only = credited(tmp_path, verified[:3])
    assert [r["weights"] for r in group_only] == [r["weights"] for r in first[:3]]


def test_switched_off_it_is_grpo(tmp_path, verified):
    for off in (["--weight-lambda", "0"], ["--weight-tau", "0"]):
        for record in credited(tmp_path, verified, *off):
            assert set(record["weights"]) == {1.0}


def test_advantages_are_those_of_the_group(tmp_path, verified):
    made = credited(tmp_path, verified)
    assert sum(record["advantage"] for record in made[:3]) == pytest.approx(0, abs=1e-12)
    target = tmp_path / "plain.jsonl"
    source = written(tmp_path / "in.jsonl", verified)
    assert invoke("advantage", "--scale", "group", source, "-o", target).exit_code == 0
    assert [r["advantage"] for r in read_jsonl(target)] == [r["advantage"] for r in made]


def test_weights_of_another_policy_are_refused(tmp_path, verified):
    rows = [{**r, "rollout": {**r["rollout"], "revision": "other"}} for r in verified]
    source = written(tmp_path / "in.jsonl", rows)
    result = invoke("advantage", "--algo", "srpo", source)
    assert result.exit_code == 65
    assert "in.jsonl:1" in result.output
    assert "--any-policy" in result.output
    assert len(credited(tmp_path, rows, "--any-policy")) == 6


def renamed(rows, **place):
    """The rows as of another prompt, sampled elsewhere."""
    rows = [{**row, "rollout": {**row["rollout"], **place}} for row in rows]
    return [{**row, "id": f"other-{row['id']}"} for row in rows]


@pytest.mark.parametrize("size", ["4", "32"])
def test_every_record_of_a_batch_is_of_the_policy_that_weighs_it(tmp_path, verified, size):
    rows = [*verified[:3], *renamed(verified[:3], revision="other")]
    source = written(tmp_path / "in.jsonl", rows)
    model = verified[0]["rollout"]["model"]
    result = invoke("advantage", "--algo", "srpo", "-m", model, "-b", size, source)
    assert result.exit_code == 65
    assert "in.jsonl:4: sampled from weights other" in result.output
    for on_error, rest in (("skip", []), ("keep", rows[3:])):
        made = credited(tmp_path, rows, "-m", model, "-b", size, "--on-error", on_error)
        assert [("weights" in row) for row in made] == [True] * 3 + [False] * len(rest)
        assert [row["error"]["where"].rpartition(":")[2] for row in made[3:]] == [
            str(n) for n in range(4, 4 + len(rest))
        ]


def test_records_of_several_policies_are_each_weighed_by_their_own(tmp_path, verified):
    tokenizer = character_tokenizer("?0123456789=<>/descriptonhkbx\\{} a")  # other ids
    directory = tmp_path / "another"
    save_policy(make_policy(SmallModel("qwen2.5-vl", 32, 2, 2), tokenizer, seed=7), directory)
    policy, other = load_policy(str(directory)), []
    for row in renamed(verified[:3], model=str(directory), revision=policy.revision):
        prompt = policy.encode({k: v for k, v in row.items() if k != "tokens"})
        ids = [*policy.encode_text(row["completion"]), policy.eos_id]
        other.append({**row, "tokens": {"prompt": prompt, "completion": ids}})
    apart = [*credited(tmp_path, verified[:3]), *credited(tmp_path, other)]
    assert apart[0]["roles"] == apart[3]["roles"]
    assert apart[0]["weights"] != apart[3]["weights"]
    assert credited(tmp_path, [*verified[:3], *other]) == apart
    assert credited(tmp_path, [*verified[:3], *other], "--any-policy") == apart


def test_records_with_an_error_keep_their_places(tmp_path, verified):
    rows = [dict(row) for row in verified]
    rows[1]["error"] = rows[5]["error"] = {"message": "no"}
    rows.insert(2, {"line": "{", "error": {"message": "no JSON"}})
    made = credited(tmp_path, rows)
    assert [("weights" in row) for row in made] == [("error" not in row) for row in rows]
    assert [row.get("sample") for row in made] == [row.get("sample") for row in rows]


def test_text_is_not_tokenized_again(tmp_path, verified):
    rows = [{**verified[0], "tokens": {"prompt": verified[0]["tokens"]["prompt"]}}]
    result = invoke("advantage", "--algo", "srpo", written(tmp_path / "in.jsonl", rows))
    assert result.exit_code == 65
    assert "tokens.completion" in result.output


def test_update_srpo_goes_by_the_weights_and_grpo_does_not(tmp_path, verified, model):
    made = credited(tmp_path, verified, "--weight-clip", "0.2,5", "--weight-tau", "50")
    heavy, plain = tmp_path / "heavy.jsonl", tmp_path / "plain.jsonl"
    written(heavy, made)
    written(plain, [{**record, "weights": [1.0] * len(record["weights"])} for record in made])
    weights = {}
    for algo, source in (("grpo", heavy), ("grpo", plain), ("srpo", heavy), ("srpo", plain)):
        run = tmp_path / f"{algo}-{source.stem}"
        result = invoke("update", "-q", "--algo", algo, "--lr", "1e-3", source, "-o", run)
        assert result.exit_code == 0, result.output
        weights[run.name] = load_policy(str(run)).revision
    assert weights["grpo-heavy"] == weights["grpo-plain"] == weights["srpo-plain"]
    assert weights["srpo-heavy"] != weights["srpo-plain"]


def test_update_compares_gradients_on_request(tmp_path, verified):
    source = written(tmp_path / "in.jsonl", credited(tmp_path, verified))
    options = ("-q", "--prompts-per-step", "1", "--credit-cosine", "2", source)
    assert invoke("update", "--algo", "srpo", *options, "-o", tmp_path / "run").exit_code == 0
    first, second = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert 0 < first["gradient_cosine"] < 1
    assert "gradient_cosine" not in second
    refused = invoke("update", "--algo", "grpo", *options, "-o", tmp_path / "other")
    assert refused.exit_code == 2
    assert "--credit-cosine is about token weights" in refused.stderr


def test_a_diffusion_model_perceives_the_evidence_of_its_prompt(tmp_path):
    policy = make_policy(
        SmallModel("llada", 16), character_tokenizer("0123456789=<>/descriptonhkbx\\{} ?a")
    )
    save_policy(policy, tmp_path / "llada")
    rows = []
    for sample, (text, reward) in enumerate([(GOOD, 1.0), (OTHER, 0.0), (MALFORMED, 0.0)]):
        tokens = {"prompt": policy.encode_text("12 3?"), "completion": policy.encode_text(text)}
        place = {"model": str(tmp_path / "llada"), "samples": 3}
        rows.append(
            {"id": "p", "sample": sample, "completion": text, "tokens": tokens, "reward": reward}
            | {"evidence": "12 3", "rollout": place}
        )
    made = credited(tmp_path, rows)
    assert set(made[2]["weights"]) == {1.0}
    for record in made[:2]:
        scored = [s for s, role in zip(record["signal"], record["roles"], strict=True) if role]
        assert all(scored)
        assert len(set(record["weights"])) > 1
    weighted = written(tmp_path / "weighted.jsonl", made)
    result = invoke("update", "-q", "--algo", "srpo", weighted, "-o", tmp_path / "run")
    assert result.exit_code == 0, result.output
    wrong = [{**row, "evidence": "elsewhere"} for row in rows]
    result = invoke("advantage", "--algo", "srpo", written(tmp_path / "in.jsonl", wrong))
    assert result.exit_code == 65
    assert "in.jsonl:1" in result.output
