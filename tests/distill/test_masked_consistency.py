"""Masked consistency: the loss from whole logits, its limits, and the rounds of a run."""

from __future__ import annotations

from itertools import combinations
from math import comb, log
from pathlib import Path

import orjson
import pytest
import torch
from conftest import invoke, read_jsonl, tiny_policy
from nested_pairs import gradient, pair
from safetensors.torch import load_file
from torch.nn import functional

from dlmctl.distill.fused_linear_losses import weighted_divergence
from dlmctl.distill.masked_lm import consistency_gradient
from dlmctl.distill.nested_masks import NestedExample
from dlmctl.models.families import Head
from dlmctl.models.policy import Policy
from dlmctl.models.saving import save_policy

PAIRS = [
    pair([0, 1, 3], [1], [3, 4, 5, 6]),
    pair([2], [], [6, 6, 4, 3]),
    pair([0, 1, 2, 3, 4], [0, 2, 4], [3, 7, 5, 4, 8]),
]


def whole_logits(policy: Policy, one: NestedExample, hidden: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of every token of the completion: [G, V]."""
    ids = torch.tensor([[*one.prompt, *one.completion]])
    ids[0, len(one.prompt) :][hidden] = policy.mask_id
    logits = policy.model(input_ids=ids).logits[0]
    first = len(one.prompt) - policy.shift
    return logits[first : first + len(one.completion)].log_softmax(-1)


def plain_loss(
    student: Policy, target: Policy, pairs: list[NestedExample], kind: str
) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for one in pairs:
        log_q = whole_logits(student, one, one.masks.at_t)
        with torch.no_grad():
            log_p = whole_logits(target, one, one.masks.at_s)
        count = int(one.masks.at_t.sum())
        for place in one.masks.at_t.nonzero()[:, 0].tolist():
            if not one.masks.at_s[place]:
                total = total - log_q[place, one.completion[place]] / count
                continue
            a, b = (log_p, log_q) if kind == "kl-fwd" else (log_q, log_p)
            apart = functional.kl_div(b[place], a[place], log_target=True, reduction="sum")
            total = total + apart / count
    return total / len(pairs)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("kind", ["kl-fwd", "kl-bwd"])
def test_loss_and_gradient_are_those_of_the_formula(family, kind):
    student, target = tiny_policy(family, seed=1), tiny_policy(family, seed=2)
    found = consistency_gradient(student, target, PAIRS, kind, batch_size=2)
    ours = gradient(student)
    expected = plain_loss(student, target, PAIRS, kind)
    expected.backward()
    assert found["loss"] == pytest.approx(float(expected.detach()), rel=1e-9)
    assert found["loss"] == pytest.approx(found["consistency"] + found["cross_entropy"])
    assert min(found.values()) > 0
    torch.testing.assert_close(ours, gradient(student), rtol=1e-8, atol=1e-11)
    assert not gradient(target).any()


def plain_entropy(student: Policy, pairs: list[NestedExample]) -> torch.Tensor:
    """Of the tokens whose most probable token is the completion's, at the temperature 1/2."""
    total = torch.zeros((), dtype=torch.float64)
    for one in pairs:
        log_q = whole_logits(student, one, one.masks.at_t)
        for place in one.masks.at_t.nonzero()[:, 0].tolist():
            if log_q[place].argmax() == one.completion[place]:
                entropy = torch.distributions.Categorical(logits=log_q[place] / 0.5).entropy()
                total = total + entropy / int(one.masks.at_t.sum())
    return total / len(pairs)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_certainty_adds_the_entropy_of_what_is_predicted_rightly(family):
    student, target = tiny_policy(family, seed=1), tiny_policy(family, seed=2)
    # One completion of what the student predicts, but for a token: both kinds are there.
    likely = whole_logits(student, PAIRS[0], PAIRS[0].masks.at_t).argmax(-1).tolist()
    examples = [pair([0, 1, 3], [1], [*likely[:3], (likely[3] + 1) % 9]), *PAIRS[1:]]
    found = consistency_gradient(student, target, examples, "kl-fwd", 2, certainty=0.7)
    ours = gradient(student)
    entropy = plain_entropy(student, examples)
    (plain_loss(student, target, examples, "kl-fwd") + 0.7 * entropy).backward()
    assert found["entropy"] == pytest.approx(0.7 * float(entropy.detach()), rel=1e-9)
    assert found["entropy"] > 0
    torch.testing.assert_close(ours, gradient(student), rtol=1e-8, atol=1e-11)


def test_the_batch_size_changes_nothing():
    student, target = tiny_policy(seed=1), tiny_policy(seed=2)
    consistency_gradient(student, target, PAIRS, "kl-fwd", 1)
    alone = gradient(student)
    consistency_gradient(student, target, PAIRS[::-1], "kl-fwd", 3)
    torch.testing.assert_close(alone, gradient(student), rtol=1e-9, atol=1e-12)


def test_a_student_that_agrees_with_its_target_has_nothing_to_learn():
    """Both levels the same: nothing was decided, and the two see the same."""
    student = tiny_policy(seed=1)
    same = [pair([0, 2], [0, 2], [3, 4, 5, 6]), pair([1], [1], [3, 4])]
    for kind in ("kl-fwd", "kl-bwd"):
        found = consistency_gradient(student, tiny_policy(seed=1), same, kind, 8)
        assert found["loss"] == pytest.approx(0, abs=1e-12)
        assert gradient(student).abs().max() < 1e-12


def test_with_all_tokens_decided_it_is_the_bound_per_token():
    """The mean over the levels k and all masks of k tokens is -ELBO / L."""
    student, target, completion = tiny_policy(seed=1), tiny_policy(seed=2), [3, 5, 7]
    elbo, mean = 0.0, 0.0
    for count in (1, 2, 3):
        for places in combinations(range(3), count):
            one = pair(list(places), [], completion)
            found = consistency_gradient(student, target, [one], "kl-fwd", 1)
            mean += found["loss"] / 3 / comb(3, count)
            log_q = whole_logits(student, one, one.masks.at_t)
            of_places = sum(float(log_q[i, completion[i]].detach()) for i in places)
            elbo += of_places / count / comb(3, count)
    assert mean == pytest.approx(-elbo / 3)


def test_the_direction_of_the_divergence():
    """Two tokens: p = (0.9, 0.1) of the target, q = (1/2, 1/2) of the student."""

    class Fixed:
        def __init__(self, logits: list[float]) -> None:
            projection = torch.nn.Linear(1, 2, bias=False).double()
            projection.weight.data = torch.tensor(logits, dtype=torch.float64)[:, None]
            self.head = Head(torch.nn.Identity(), projection)

    one = torch.ones(1, 1, dtype=torch.float64)
    student, target = Fixed([0.0, 0.0]), Fixed([log(0.9), log(0.1)])
    given = (student, one, target, one, torch.ones(1))
    forward = 0.9 * log(1.8) + 0.1 * log(0.2)
    backward = 0.5 * log(0.5 / 0.9) + 0.5 * log(0.5 / 0.1)
    assert float(weighted_divergence(*given, "kl-fwd").detach()) == pytest.approx(forward)
    assert float(weighted_divergence(*given, "kl-bwd").detach()) == pytest.approx(backward)
    assert forward == pytest.approx(0.3681, abs=1e-4)
    assert backward == pytest.approx(0.5108, abs=1e-4)


# Runs.


def rows(tmp_path: Path, first: int, steps: int) -> str:
    """Completions for so many steps of two, from a number on."""
    path = tmp_path / f"rows-{first}-{steps}.jsonl"
    made = [
        {"id": f"p{n}", "prompt": f"{n % 4}=", "completion": f"{(n * 7) % 5}{n % 5}{(n + 2) % 5}"}
        for n in range(2 * first, 2 * (first + steps))
    ]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in made))
    return str(path)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("teacher")
    policy = tiny_policy()
    policy.model.float()
    save_policy(policy, directory)
    return str(directory)


def distilled(run: Path, teacher: str, source: str, *options: str):
    line = "masked -q --lr 1e-2 --rounds 3 --steps-per-round 2 --records-per-step 2 --device cpu"
    return invoke("distill", *line.split(), "--teacher", teacher, "-o", run, *options, source)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return all(torch.equal(a[name], b[name]) for name in a)


def test_each_round_decides_twice_as_many_and_has_the_student_before_it_as_target(
    tmp_path, teacher
):
    run = tmp_path / "run"
    done = distilled(run, teacher, rows(tmp_path, 0, 9), "--keep", "9")
    assert done.exit_code == 0, done.output
    metrics = read_jsonl(run / "metrics.jsonl")
    assert [m["decided"] for m in metrics] == [1, 1, 2, 2, 4, 4]
    assert [m["round"] for m in metrics] == [0, 0, 1, 1, 2, 2]
    # Three tokens: in the last round nothing is hidden at the lower level.
    assert [m["consistency"] > 0 for m in metrics[4:]] == [False, False]
    assert any(m["consistency"] > 0 for m in metrics[:4])
    assert same(run / "target-02", run / "step-000004")
    assert not (run / "target-01").exists()
    assert not same(run / "target-02", Path(teacher))
    done = distilled(run, teacher, rows(tmp_path, 0, 1))
    assert (done.exit_code, "more --rounds" in done.stderr) == (2, True)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_that_was_cut_goes_on_to_the_same_weights(tmp_path, teacher, steps):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert distilled(whole, teacher, rows(tmp_path, 0, 6)).exit_code == 0
    assert distilled(cut, teacher, rows(tmp_path, 0, steps)).exit_code == 0
    assert distilled(cut, teacher, rows(tmp_path, steps, 6 - steps)).exit_code == 0
    assert same(whole / "latest", cut / "latest")
    assert len(read_jsonl(cut / "metrics.jsonl")) == 6


def test_a_round_without_its_target_is_said(tmp_path, teacher):
    run = tmp_path / "run"
    assert distilled(run, teacher, rows(tmp_path, 0, 3)).exit_code == 0
    (run / "target-01").rename(run / "elsewhere")
    done = distilled(run, teacher, rows(tmp_path, 3, 3))
    assert (done.exit_code, "target-01 is missing" in done.stderr) == (65, True)


def test_an_autoregressive_teacher_is_refused(tmp_path, saved_models):
    done = distilled(tmp_path / "run", saved_models("ar"), rows(tmp_path, 0, 1))
    assert (done.exit_code, "autoregressive" in done.stderr) == (2, True)
