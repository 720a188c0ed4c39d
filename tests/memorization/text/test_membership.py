"""Membership inference: scores by hand and by a second way, and rates on small sets."""

from __future__ import annotations

import zlib
from itertools import product

import orjson
import pytest
import torch
from conftest import invoke, tiny_policy

from dlmctl.diffusion.scoring import MaskPlan
from dlmctl.memorization.text.membership import (
    compressed_size,
    likelihoods,
    roc_curve,
    sama_scores,
    separation,
    shares,
)
from dlmctl.models.saving import save_policy
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record
from dlmctl.settings.memorization import Bootstrap, Sama

TEXTS = ["0123401", "44", "3210432104321", "0011223344", "1"]


def records(texts=TEXTS) -> list[Record]:
    return [Record(id=f"t{n}", prompt="=", completion=text) for n, text in enumerate(texts)]


def test_a_model_is_not_better_than_itself():
    """Strictly better is what counts."""
    scores = sama_scores(tiny_policy(seed=1), tiny_policy(seed=1), records(), Sama(), 3)
    assert scores.tolist() == [0] * len(TEXTS)


def test_all_tokens_in_a_subset_is_a_comparison_of_whole_losses():
    """With l as large as the text every subset is all hidden tokens: 0 or 1 in each step."""
    own, other = tiny_policy(seed=1), tiny_policy(seed=2)
    plan = Sama(sama_tokens=100)
    scores = sama_scores(own, other, records(), plan, 8, subsets=3)
    weights = [1, 1 / 2, 1 / 3, 1 / 4]
    possible = {
        round(sum(w * bit for w, bit in zip(weights, bits, strict=True)) / sum(weights), 9)
        for bits in product((0, 1), repeat=4)
    }
    assert {round(score, 9) for score in scores.tolist()} <= possible
    # The other way round the wins are the others'.
    turned = sama_scores(other, own, records(), plan, 8, subsets=3)
    assert (scores + turned).tolist() == pytest.approx([1] * len(TEXTS))


def test_of_one_token_the_score_is_who_predicts_it_better():
    own, other = tiny_policy(seed=1), tiny_policy(seed=2)
    [score] = sama_scores(own, other, records(["3"]), Sama(), 1).tolist()
    log_p = []
    for policy in (own, other):
        prompt = policy.encode_text("=")
        ids = torch.tensor([[*prompt, policy.mask_id]])
        with torch.no_grad():
            logits = policy.model(input_ids=ids).logits[0, -1]
        log_p.append(float(logits.log_softmax(-1)[policy.encode_text("3")[0]]))
    # All of the text is hidden from the first step on.
    assert score == (log_p[0] > log_p[1])


def test_batches_and_company_change_nothing():
    own, other = tiny_policy(seed=1), tiny_policy(seed=2)
    plan = Sama(sama_tokens=2)
    together = sama_scores(own, other, records(), plan, 8, subsets=40)
    alone = [
        float(sama_scores(own, other, [record], plan, 1, subsets=40)[0]) for record in records()
    ]
    assert together.tolist() == pytest.approx(alone)
    assert 0 < float(together.mean()) < 1


def test_shares_are_those_of_the_published_configuration():
    assert shares(4) == pytest.approx([0.14, 0.23, 0.32, 0.41])


def test_an_autoregressive_model_has_its_exact_likelihood_and_no_masks():
    policy = tiny_policy("ar")
    [value] = likelihoods(policy, records(["012"]), MaskPlan(), 4).tolist()
    ids = torch.tensor([policy.encode_text("=012")])
    with torch.no_grad():
        log_p = policy.model(input_ids=ids).logits[0].log_softmax(-1)
    expected = sum(float(log_p[t, ids[0, t + 1]]) for t in range(3))
    assert value == pytest.approx(expected)
    with pytest.raises(UsageError, match="sama masks tokens"):
        sama_scores(policy, tiny_policy(), records(), Sama(), 4)


def test_rates_by_hand():
    members = torch.tensor([0.9, 0.8, 0.4, 0.3], dtype=torch.float64)
    others = torch.arange(10, dtype=torch.float64) / 10 - 0.05  # -0.05, …, 0.85
    found = separation(members, others, Bootstrap(50))
    wins = sum(float((m > others).sum()) for m in members) / 40
    assert found["auc"] == pytest.approx(wins)
    # One of ten may be above: the threshold is 0.75.
    assert found["tpr_at_0.1"] == 0.5
    assert found["tpr_at_0.01"] == found["tpr_at_0.001"] == 0.25
    low, high = found["auc_interval"]
    assert 0 <= low < wins < high <= 1
    same = torch.zeros(5, dtype=torch.float64)
    assert separation(same, same, Bootstrap(5))["auc"] == 0.5
    assert separation(same, same, Bootstrap(5))["tpr_at_0.1"] == 0


def every_threshold(members: list[float], others: list[float]) -> dict[float, float]:
    """By counting: the largest true positive rate at each false one."""
    best: dict[float, float] = {}
    for threshold in (-float("inf"), *members, *others):
        false = sum(score > threshold for score in others) / len(others)
        true = sum(score > threshold for score in members) / len(members)
        best[false] = max(true, best.get(false, 0))
    return dict(sorted(best.items()))


@pytest.mark.parametrize(
    ("members", "others"),
    [
        ([3, 3, 2, 1, 5], [3, 1, 1, 0, 2, 3]),  # ties within and between
        ([0.5, 0.25], [0.5, 0.75, 0.5]),
        ([4, 5], [1, 2, 2]),  # apart
        ([1, 2], [4, 5]),
        ([1, 1], [1, 1, 1]),  # as good as no score
    ],
)
def test_the_curve_is_that_of_counting_at_every_threshold(members, others):
    scores = [torch.tensor(values, dtype=torch.float64) for values in (members, others)]
    points = roc_curve(*scores)
    found = {point["fpr"]: point["tpr"] for point in points}
    assert len(found) == len(points)
    assert list(found) == sorted(found)
    wanted = every_threshold(members, others)
    assert list(found) == pytest.approx(list(wanted))
    assert list(found.values()) == pytest.approx(list(wanted.values()))
    for point in points[:-1]:
        assert point["fpr"] == pytest.approx((scores[1] > point["threshold"]).double().mean())
        assert point["tpr"] == pytest.approx((scores[0] > point["threshold"]).double().mean())
    assert points[-1] == {"fpr": 1, "tpr": 1, "threshold": None}


def test_the_curve_has_the_rates_of_the_summary():
    generator = torch.Generator().manual_seed(0)
    members = torch.randint(9, (60,), generator=generator).double() + 2
    others = torch.randint(9, (80,), generator=generator).double()
    found = separation(members, others, Bootstrap(2))
    for rate in (0.1, 0.01):
        under = [point["tpr"] for point in roc_curve(members, others) if point["fpr"] <= rate]
        assert under[-1] == found[f"tpr_at_{rate}"]


def test_repeated_text_is_small():
    assert compressed_size("0" * 1000) < compressed_size("0341240213342104")
    assert compressed_size("ab") == len(zlib.compress(b"ab"))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str, str, str]:
    """A model of some texts, one of others, files of its members and of what neither has seen."""
    place = tmp_path_factory.mktemp("member")
    policy = tiny_policy()
    policy.model.float()
    save_policy(policy, place / "new")
    generator = torch.Generator().manual_seed(0)
    texts = [
        "".join(map(str, torch.randint(5, (12,), generator=generator).tolist())) for _ in range(24)
    ]
    files = []
    for name, rows in (("run", texts[:6]), ("beside", texts[6:12]), ("others", texts[12:])):
        lines = b"".join(orjson.dumps(dict(row)) + b"\n" for row in records(rows))
        files.append(place / f"{name}.jsonl")
        files[-1].write_bytes(lines)
        if name != "others":
            (place / "many.jsonl").write_bytes(lines * 280)
            line = "-q --algo sft --lr 3e-3 -k 8 --weight-decay 0 --prompts-per-step 6"
            source = ["--device", "cpu", "-m", place / "new", place / "many.jsonl"]
            done = invoke("update", *line.split(), "-o", place / name, *source)
            assert done.exit_code == 0, done.output
    return str(place / "run"), str(place / "beside"), str(files[0]), str(files[2])


def attacked(models, *options):
    run, beside, members, others = models
    line = ["--json", "--device", "cpu", "--members", members, "--others", others]
    return invoke("memo-eval", "membership", *line, "-m", run, *options), beside


def test_what_was_learnt_is_found_and_by_another_model_it_is_not(models):
    done, beside = attacked(models, "--reference", models[1], "--bootstrap", "20")
    assert done.exit_code == 0, done.output
    rows = {row["method"]: row for row in map(orjson.loads, done.stdout.splitlines())}
    assert list(rows) == ["loss", "ratio", "zlib", "sama"]
    assert min(row["auc"] for row in rows.values()) > 0.65, {n: r["auc"] for n, r in rows.items()}
    assert rows["loss"]["reference"] is None
    assert rows["sama"]["reference"] == beside
    done, _ = attacked(models, "-m", models[1], "--method", "loss", "--bootstrap", "20")
    assert orjson.loads(done.stdout)["auc"] < rows["loss"]["auc"] - 0.1


def test_curves_go_to_a_file_that_plot_draws(models, tmp_path):
    curve, picture = tmp_path / "new" / "c.jsonl", tmp_path / "roc.svg"
    done, _ = attacked(models, "--bootstrap", "2", "--curve", str(curve))
    assert done.exit_code == 0, done.output
    points = [orjson.loads(line) for line in curve.read_bytes().splitlines()]
    for row in map(orjson.loads, done.stdout.splitlines()):
        own = [p for p in points if p["method"] == row["method"]]
        assert [p["tpr"] for p in own if p["fpr"] <= 0.1][-1] == row["tpr_at_0.1"]
        assert {p["revision"] for p in own} == {row["revision"]}
    line = ["-x", "fpr", "--log-x", "-y", "tpr", "--log-y", "--by", "method", "-o", picture]
    assert invoke("plot", curve, *line).exit_code == 0
    assert "<!-- zlib -->" in picture.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "loss,guess"], "--method guess"),
        (["--method", "sama"], "sama needs a --reference"),
        (["-k", "3"], "come in pairs"),
    ],
)
def test_wrong_options_are_one_line(models, options, message):
    done, _ = attacked(models, *options)
    assert (done.exit_code, message in done.stderr) == (2, True), done.stderr


BROKEN = {
    b"{": "not JSON",
    b'{"id": "a", "prompt": "="}': "'completion' is missing",
    b'{"id": "a", "completion": "01"}': "no 'prompt'",
    b'{"prompt": "=", "completion": "01"}': "'id' is missing",
    b'{"id": "a", "prompt": "=", "completion": "?"}': "has no tokens for '?'",
}


def test_faulty_records_are_refused_or_left_out(models, tmp_path):
    run, beside, members, others = models
    options = ["--json", "--device", "cpu", "--bootstrap", "2", "-m", run, "--reference", beside]
    plain = invoke("memo-eval", "membership", *options, "--members", members, "--others", others)
    mixed = tmp_path / "mixed.jsonl"
    with open(members, "rb") as file:
        mixed.write_bytes(b"\n".join([*BROKEN, file.read()]))
    for on_error in ("skip", "keep"):  # nothing could keep them
        done = invoke(
            *("memo-eval", "membership", *options, "--on-error", on_error),
            *("--members", mixed, "--others", others),
        )
        assert done.exit_code == 0, done.output
        assert done.stdout == plain.stdout
        for number, said in enumerate(BROKEN.values(), start=1):
            assert f"skipped: {mixed}:{number}: " in done.stderr
            assert said in done.stderr
    for number, line in enumerate(BROKEN):
        one = tmp_path / f"{number}.jsonl"
        one.write_bytes(line)
        done = invoke("memo-eval", "membership", *options, "--members", members, "--others", one)
        assert done.exit_code == 65
        assert f"{one}:1: " in done.stderr
        line = ["--members", members, "--others", one, "--on-error", "skip"]
        done = invoke("memo-eval", "membership", *options, *line)
        assert done.exit_code == 2
        assert f"{one} has no texts that can be scored" in done.stderr
