"""Signals against a second implementation, and what must hold whatever the model is."""

from __future__ import annotations

import pytest
import torch
from conftest import noise_image, tiny_vision_policy

import dlmctl.rl.srpo.contrast as contrast_module
from dlmctl.diffusion.elbo import log_probs
from dlmctl.models.policy import Policy
from dlmctl.models.vision import Picture
from dlmctl.rl.srpo.contrast import Response, corrupted, signals
from dlmctl.rl.srpo.roles import PERCEPTION, REASONING
from dlmctl.settings.srpo import Contrast

ROLES = [0, 1, 1, 1, 0, 2, 2, 0, 0]


@pytest.fixture(scope="module", params=["qwen2.5-vl", "qwen3-vl", "llava"])
def policy(request) -> Policy:
    return tiny_vision_policy(request.param)


def response(
    policy: Policy, sample: int = 0, roles: list[int] = ROLES, image: int = 1, key: str = "a"
) -> Response:
    generator = torch.Generator().manual_seed(sample)
    low, high = 3, policy.vocab_size - 4
    completion = torch.randint(low, high, (len(roles),), generator=generator).tolist()
    record = {"prompt": "<image>12?", "images": [noise_image(image)]}
    prompt, pictures = policy.encode(record), policy.pictures(record)
    nothing = torch.zeros(len(prompt), dtype=torch.bool)
    bare = policy.encode({"prompt": "12?"})
    return Response(prompt, completion, pictures, torch.tensor(roles), key, sample, nothing, bare)


@torch.no_grad()
def distributions(
    policy: Policy, prompt: list[int], tokens: list[int], pictures: list[Picture]
) -> torch.Tensor:
    """Log-probabilities at every place of a completion, by the whole model: [G, V]."""
    ids = torch.tensor([[*prompt, *tokens]])
    extra = policy.vision.inputs(policy.core, [pictures], torch.device("cpu"))
    if "image_grid_thw" in extra:
        extra["mm_token_type_ids"] = (ids == policy.vision.image_id).int()
    logits = policy.model(input_ids=ids, use_cache=False, **extra).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def next_log_probs(
    policy: Policy, prompt: list[int], tokens: list[int], pictures: list[Picture]
) -> torch.Tensor:
    """Of every token of a completion: [G]."""
    table = distributions(policy, prompt, tokens, pictures)
    return table.gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("contrast", ["drop", "swap", "blind", "blind-drop"])
def test_signals_are_those_of_whole_and_of_really_shortened_sequences(policy, contrast):
    group = [response(policy), response(policy, 1, [1, 1, 0, 2, 2, 2, 0])]
    settings = Contrast(reason_contrast=contrast)
    made = signals(policy, group, settings, 2)
    for n, (own, other) in enumerate([(group[0], group[1]), (group[1], group[0])]):
        unseen = corrupted(policy, own, settings)
        tokens = list(own.completion)
        see, think = own.roles == PERCEPTION, own.roles == REASONING
        full = next_log_probs(policy, own.prompt, tokens, own.pictures)
        blind = next_log_probs(policy, own.prompt, tokens, unseen)
        start = int(see.nonzero()[0])
        before, behind = tokens[:start], tokens[start + int(see.sum()) :]
        theirs = [t for t, r in zip(other.completion, other.roles, strict=True) if r == PERCEPTION]
        put = theirs if contrast == "swap" else []
        seen = unseen if contrast == "blind-drop" else own.pictures
        short = next_log_probs(policy, own.prompt, before + put + behind, seen)
        short = torch.cat([short[:start], torch.zeros(int(see.sum())), short[start + len(put) :]])
        expected = torch.where(see, full - blind, torch.zeros_like(full))
        left = {"blind": blind - full, "blind-drop": blind - short}.get(contrast, full - short)
        expected = torch.where(think, left, expected)
        assert made[n].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
        assert made[n].abs().max() > 0.01


@pytest.mark.parametrize("contrast", ["drop", "blind-drop"])
def test_no_image_is_the_prompt_without_one(policy, contrast):
    own = response(policy)
    settings = Contrast(corruption="no-image", reason_contrast=contrast)
    [made] = signals(policy, [own], settings, 1)
    tokens, bare = list(own.completion), policy.encode_text("12?")
    see, think = own.roles == PERCEPTION, own.roles == REASONING
    full = next_log_probs(policy, own.prompt, tokens, own.pictures)
    blind = next_log_probs(policy, bare, tokens, [])
    assert made[see].tolist() == pytest.approx((full - blind)[see].tolist(), abs=1e-5)
    kept = [token for token, there in zip(tokens, ~see, strict=True) if there]
    if contrast == "drop":
        short = next_log_probs(policy, own.prompt, kept, own.pictures)
    else:
        full, short = blind, next_log_probs(policy, bare, kept, [])
    away = full[think] - short[think[~see]]
    assert made[think].tolist() == pytest.approx(away.tolist(), abs=1e-5)


def test_recorded_log_probabilities_save_a_pass_and_change_nothing(policy, monkeypatch):
    group = [response(policy), response(policy, 1, [1, 1, 0, 2, 2, 2, 0])]
    expected = signals(policy, group, Contrast(), 2)
    recorded = [
        own._replace(
            log_probs=next_log_probs(policy, own.prompt, list(own.completion), own.pictures)
        )
        for own in group
    ]
    passes = []
    monkeypatch.setattr(
        contrast_module, "log_probs", lambda *given: passes.append(given) or log_probs(*given)
    )
    made = signals(policy, recorded, Contrast(), 2)
    assert len(passes) == 2
    for row, wanted in zip(made, expected, strict=True):
        assert row.tolist() == pytest.approx(wanted.tolist(), abs=1e-5)
    # Where one has none, all are scored.
    signals(policy, [recorded[0], group[1]], Contrast(), 2)
    assert len(passes) == 5


def test_a_hole_in_attention_is_a_shorter_sequence(policy):
    """Tokens that attention leaves out, places counted without them, against deleting them."""
    own = response(policy)
    ids = torch.tensor([[*own.prompt, *own.completion]])
    there = torch.cat([torch.ones(len(own.prompt)).bool(), own.roles != PERCEPTION])[None]
    pictures = [list(own.pictures)]
    with torch.no_grad():
        places = policy.vision.positions(policy.core, ids, there, pictures)
        if places is None:
            places = (there.long().cumsum(1) - 1).clamp(min=0)
        holed = policy.hidden(ids, there, places, pictures=pictures)[there]
        short = policy.hidden(ids[there][None], None, pictures=pictures)[0]
    assert (holed - short).abs().max() < 1e-4
    # The hole matters: what follows it is another state than with the tokens there.
    with torch.no_grad():
        whole = policy.hidden(ids, None, pictures=pictures)[there]
    assert (whole - short).abs().max() > 0.01


def test_an_image_that_is_not_corrupted_gives_exactly_nothing(policy):
    group = [response(policy), response(policy, 1, [1, 0, 2, 2])]
    settings = Contrast(corruption="patch", probability=0.0)
    for made, own in zip(signals(policy, group, settings, 3), group, strict=True):
        assert (made[own.roles == PERCEPTION] == 0).all()
        assert (made[own.roles == REASONING] != 0).any()


def test_neither_padding_nor_order_nor_batch_size_changes_a_signal(policy):
    group = [response(policy), response(policy, 1, [1, 0, 2, 2]), response(policy, 2, image=2)]
    settings = Contrast(reason_contrast="drop")
    together = signals(policy, group, settings, 8)
    backwards = signals(policy, group[::-1], settings, 2)[::-1]
    for n, own in enumerate(group):
        alone = signals(policy, [own], settings, 1)[0]
        assert together[n].tolist() == pytest.approx(alone.tolist(), abs=2e-5)
        assert together[n].tolist() == pytest.approx(backwards[n].tolist(), abs=2e-5)


def test_reasoning_is_compared_with_a_perception_that_differs(policy):
    own, same, third = response(policy), response(policy), response(policy, 2)
    [made, *_] = signals(policy, [own, same, third], Contrast(), 4)
    [wanted, _] = signals(policy, [own, third], Contrast(), 4)
    assert made.tolist() == pytest.approx(wanted.tolist(), abs=1e-5)
    thought = own.roles == REASONING
    assert made[thought].abs().min() > 1e-3
    [alike, _] = signals(policy, [own, same], Contrast(), 4)
    assert alike[thought].abs().max() < 1e-5


def test_estimators(policy):
    group = [response(policy)]
    see = group[0].roles == PERCEPTION
    plain = signals(policy, group, Contrast(), 1)[0]
    absolute = signals(
        policy, group, Contrast(visual_signal="abs-logratio", reason_signal="abs-logratio"), 1
    )[0]
    assert torch.equal(absolute, plain.abs())
    k3 = signals(policy, group, Contrast(visual_signal="k3", reason_signal="k3"), 1)[0]
    chosen = group[0].roles != 0
    expected = (torch.exp(-plain) + plain - 1).clamp(0, 10)
    assert k3[chosen].tolist() == pytest.approx(expected[chosen].tolist(), abs=1e-12)
    divergence = signals(policy, group, Contrast(visual_signal="full-kl"), 1)[0]
    assert (divergence[see] > 0).all()
    assert torch.equal(divergence[~see], plain[~see])
    tokens, unseen = list(group[0].completion), corrupted(policy, group[0], Contrast())
    p = distributions(policy, group[0].prompt, tokens, group[0].pictures)
    q = distributions(policy, group[0].prompt, tokens, unseen)
    by_hand = (p.exp() * (p - q)).sum(-1)
    assert divergence[see].tolist() == pytest.approx(by_hand[see].tolist(), abs=1e-5)


def test_corruptions_are_of_the_prompt_or_of_the_sample(policy):
    first, second = response(policy, 0), response(policy, 1)

    def seen(own: Response, scope: str, seed: int = 0) -> torch.Tensor:
        settings = Contrast(corruption="patch", scope=scope, seed=seed)
        return corrupted(policy, own, settings)[0].pixels

    assert torch.equal(seen(first, "prompt"), seen(second, "prompt"))
    assert not torch.equal(seen(first, "rollout"), seen(second, "rollout"))
    assert not torch.equal(seen(first, "prompt"), seen(first, "prompt", seed=1))
    other = response(policy, 0, key="b")
    assert not torch.equal(seen(first, "prompt"), seen(other, "prompt"))
