"""Attention that is opened from left-to-right to the whole text, compared with masks by hand."""

from __future__ import annotations

import dataclasses

import orjson
import pytest
import torch
from conftest import invoke, tiny_policy
from safetensors.torch import load_file

from dlmctl.diffusion.annealing import open_share, opened
from dlmctl.diffusion.elbo import token_log_probs
from dlmctl.diffusion.scoring import MaskPlan, example_of
from dlmctl.models.attention import Blocks
from dlmctl.models.policy import Policy
from dlmctl.records.jsonl import Record
from dlmctl.rl.supervised import supervised_gradient, with_completion_ids

PROMPTS, COMPLETIONS = [[3, 4], [5, 6, 7, 3]], [[4, 5, 6, 7, 3], [3, 3, 4]]
MASKED = [torch.tensor([1, 0, 1, 1, 0]).bool(), torch.tensor([0, 1, 1]).bool()]
TEXTS = [("12=", "30"), ("0", "1234"), ("=2", "04=31")]


def log_probs(policy: Policy, share: float | None) -> torch.Tensor:
    narrowing = None if share is None else opened(share, 0, 0)
    narrowed = dataclasses.replace(policy, narrowing=narrowing)
    return token_log_probs(narrowed, PROMPTS, COMPLETIONS, MASKED)


def test_the_share_grows_to_all_of_it():
    assert [open_share(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert open_share(0, 1) == 1
    assert opened(1.0, 0, 3) is None


def test_earlier_positions_are_always_seen_and_later_ones_with_their_probability():
    narrowing = opened(0.3, 7, 5)
    assert narrowing is not None
    columns = torch.arange(200)
    [seen] = narrowing(columns[None])
    earlier = columns[None] <= columns[:, None]
    assert seen[earlier].all()
    count = int((~earlier).sum())
    spread = (0.3 * 0.7 / count) ** 0.5
    assert abs(float(seen[~earlier].double().mean()) - 0.3) < 4 * spread
    # The same pair is open in every text of a step, wherever its tokens stand in the row.
    places = torch.tensor([[9, 4, 150], [4, 9, 11]])
    again = narrowing(places)
    for row, positions in enumerate(places.tolist()):
        assert torch.equal(again[row], seen[positions][:, positions])
    other = opened(0.3, 7, 6)
    assert other is not None
    assert not torch.equal(other(columns[None])[0], seen)


@pytest.mark.parametrize("family", ["a2d", "dream", "llada"])
def test_with_nothing_open_it_reads_from_left_to_right(family):
    policy = tiny_policy(family)
    found = log_probs(policy, 0.0)
    policy.core.config.is_causal = True  # transformers' own mask
    torch.testing.assert_close(found, log_probs(policy, None), rtol=1e-9, atol=1e-12)
    policy.core.config.is_causal = False
    whole = log_probs(policy, None)
    assert not torch.allclose(found, whole)
    torch.testing.assert_close(log_probs(policy, 1 - 1e-12), whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("origin", ["text", "completion"])
def test_a_block_causal_model_is_narrowed_within_its_blocks(length, origin):
    policy = dataclasses.replace(tiny_policy("bd3lm"), blocks=Blocks(length, origin))
    whole, narrow = log_probs(policy, None), log_probs(policy, 0.0)
    torch.testing.assert_close(log_probs(policy, 1 - 1e-12), whole, rtol=1e-9, atol=1e-12)
    assert torch.equal(narrow, whole) == (length == 1)

    # With nothing open no token depends on one that follows it.
    def first(last: int, share: float) -> torch.Tensor:
        narrowed = dataclasses.replace(policy, narrowing=opened(share, 0, 0))
        masked = [torch.tensor([True, False, False])]
        return token_log_probs(narrowed, [[3, 4]], [[5, 6, last]], masked)[0, 0]

    assert torch.equal(first(3, 0.0), first(7, 0.0))
    if length == 3 and origin == "completion":
        assert not torch.equal(first(3, 1 - 1e-12), first(7, 1 - 1e-12))


def test_loss_and_gradient_are_those_under_masks_by_hand():
    policy, step, plan = tiny_policy("a2d"), 1, MaskPlan(samples=2, seed=3)
    rows = [
        with_completion_ids(Record(id=n, prompt=p, completion=c), policy, None)
        for n, (p, c) in enumerate(TEXTS)
    ]
    found = supervised_gradient(policy, rows, plan, step, 2, anneal_attention=4)
    assert found["attention_open"] == 0.5
    ours = [p.grad.clone() for p in policy.model.parameters()]
    policy.model.zero_grad()
    narrowing = opened(0.5, 3, step)
    assert narrowing is not None
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        example = example_of(row, policy, dataclasses.replace(plan, seed=3 + step))
        start = len(example.prompt)
        ids = torch.tensor([*example.prompt, *example.completion])
        allowed = narrowing(torch.arange(len(ids))[None])[:, None]
        for masked, weight in zip(example.masks.masked, example.masks.weights, strict=True):
            seen = ids.clone()
            seen[start:][masked] = policy.mask_id
            logits = policy.model(input_ids=seen[None], attention_mask=allowed).logits[0, start:]
            values = logits.log_softmax(-1).gather(1, ids[start:, None])[:, 0]
            scale = weight / plan.samples / len(example.completion) / len(rows)
            total = total - scale * values[masked].sum()
    total.backward()
    assert found["loss"] == pytest.approx(float(total.detach()), rel=1e-9)
    for parameter, gradient in zip(policy.model.parameters(), ours, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12)
    # Micro-batches, which pad to other lengths, change nothing.
    policy.model.zero_grad()
    supervised_gradient(policy, rows, plan, step, 1, anneal_attention=4)
    for parameter, gradient in zip(policy.model.parameters(), ours, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12)


def test_a_resumed_run_opens_attention_as_one_that_was_not_stopped(tmp_path, saved_models):
    rows = [{"id": n, "prompt": f"{n}=", "completion": f"{n}{n}"} for n in range(10, 22)]
    lines = [*map(orjson.dumps, rows)]
    for name, part in (("all", lines), ("first", lines[:4]), ("rest", lines[4:])):
        (tmp_path / name).write_bytes(b"\n".join(part))
    options = ["--algo", "sft", "--prompts-per-step", 2, "--lr", 0.01, "--anneal-attention", 5]
    options += ["-m", saved_models("a2d")]
    shares = []
    for names, run in ((["all"], "whole"), (["first", "rest"], "parts")):
        for name in names:
            done = invoke("update", tmp_path / name, *options, "-o", tmp_path / run)
            assert done.exit_code == 0, done.output
            shares += [orjson.loads(line)["attention_open"] for line in done.stdout.splitlines()]
    assert shares == pytest.approx(2 * [0.2, 0.4, 0.6, 0.8, 1, 1])
    whole, parts = (
        load_file(tmp_path / run / "latest" / "model.safetensors") for run in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    del options[6:8]
    assert "--anneal-attention" not in options
    assert invoke("update", tmp_path / "all", *options, "-o", tmp_path / "open").exit_code == 0
    other = load_file(tmp_path / "open" / "latest" / "model.safetensors")
    assert not all(torch.equal(whole[name], other[name]) for name in whole)


@pytest.mark.parametrize("family", ["ar", "mlm"])
def test_a_model_without_attention_to_open_is_refused(tmp_path, saved_models, family):
    (tmp_path / "data").write_text('{"prompt": "1=", "completion": "2"}\n')
    options = ["-m", saved_models(family), "-o", tmp_path / "run", "--anneal-attention", 2]
    done = invoke("update", tmp_path / "data", "--algo", "sft", *options)
    assert (done.exit_code, f"of family {family}" in done.stderr) == (2, True)
    done = invoke("update", tmp_path / "data", *options)
    assert (done.exit_code, "for --algo sft" in done.stderr) == (2, True)
