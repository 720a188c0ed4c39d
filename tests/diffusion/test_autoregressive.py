"""Sampling left to right: rows that have ended are left out, which changes nothing else."""

from __future__ import annotations

import functools

import pytest
from conftest import noise_image, tiny_policy, tiny_vision_policy

from dlmctl.diffusion.rollout import rollout
from dlmctl.diffusion.sampling import configured
from dlmctl.models.policy import Policy
from dlmctl.records.jsonl import Record
from dlmctl.settings.sampler import Sampler

LONGEST = 12


def policy_of(family: str) -> Policy:
    return tiny_policy("ar", seed=1) if family == "ar" else tiny_vision_policy()


def sampled(policy: Policy, batch_size: int) -> list[Record]:
    prompts: list[Record] = []
    for n, text in enumerate(("12=", "4", "1=2", "3")):
        prompts.append(Record(id=f"p{n}", prompt=text))
        if policy.vision is not None:
            prompts[-1] |= {"prompt": "<image>" + text, "images": [noise_image(n)]}
    settings = configured(policy, Sampler(gen_length=LONGEST, temperature=1.5))
    return list(rollout(prompts, policy, settings, 6, 3, batch_size))


@pytest.mark.parametrize("family", ["ar", "qwen2.5-vl"])
def test_rows_that_have_ended_are_left_out_and_the_others_go_on_as_before(family, monkeypatch):
    policy = policy_of(family)
    alone = sampled(policy, 1)
    widths = []
    forward = policy.model.forward

    @functools.wraps(forward)  # the sampler looks at its signature
    def watched(*given, **named):
        widths.append(len(named["input_ids"]))
        return forward(*given, **named)

    monkeypatch.setattr(policy.model, "forward", watched)
    together = sampled(policy, 24)
    lengths = [len(record["tokens"]["completion"]) for record in together]
    # The case is there: some end early, some never.
    assert min(lengths) < LONGEST == max(lengths)
    assert widths[0] == 24
    assert widths[-1] <= 24 * 3 / 4
    assert sorted(widths, reverse=True) == widths
    for one, other in zip(alone, together, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["rollout"]["log_probs"] == pytest.approx(other["rollout"]["log_probs"])
