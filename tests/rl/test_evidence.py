"""Credit of diffusion policies: signals against sums by hand, and what must hold."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_policy

from dlmctl.diffusion.masks import draw_masks
from dlmctl.records.errors import DataError, UsageError
from dlmctl.rl.srpo.contrast import Response
from dlmctl.rl.srpo.evidence import MASKS, diffusion_signals, evidence_tokens
from dlmctl.settings.srpo import Contrast

PROMPT, COMPLETION = [3, 4, 5, 6, 8], [4, 5, 6, 3, 7, 4]
ROLES = torch.tensor([0, 1, 1, 2, 2, 0])
EVIDENCE = torch.tensor([True, True, False, True, False])


@pytest.fixture(scope="module")
def policy():
    return tiny_policy("llada")


def response(sample: int = 0) -> Response:
    return Response(PROMPT, COMPLETION, (), ROLES, "a", sample, EVIDENCE)


@torch.no_grad()
def by_hand(policy, blind: bool, perception: bool | None, place: int) -> float:
    """Mean log-probability of one token over the masks that hide it, one pass for each."""
    keys = (0, "credit", "a")
    hidden = draw_masks("stratified", MASKS, torch.ones(6).bool(), keys, 0).masked
    found = []
    for mask in hidden:
        if not mask[place]:
            continue
        mask = mask.clone()
        if perception is not None:
            mask[1:3] = not perception
        prompt = torch.tensor(PROMPT)
        if blind:
            prompt[EVIDENCE] = policy.mask_id
        completion = torch.tensor(COMPLETION).masked_fill(mask, policy.mask_id)
        logits = policy.model(input_ids=torch.cat([prompt, completion])[None]).logits[0]
        table = logits.log_softmax(-1)
        found.append(float(table[len(PROMPT) + place, COMPLETION[place]]))
    return sum(found) / len(found)


@pytest.mark.parametrize("contrast", ["drop", "blind", "blind-drop"])
def test_signals_are_the_sums_by_hand(policy, contrast):
    settings = Contrast(corruption="blank", reason_contrast=contrast)
    made = diffusion_signals(policy, [response()], settings, 4)[0].tolist()
    expected = [0.0] * 6
    for place in (1, 2):
        expected[place] = by_hand(policy, False, None, place) - by_hand(policy, True, None, place)
    for place in (3, 4):
        if contrast == "blind":
            both = by_hand(policy, True, None, place), by_hand(policy, False, None, place)
        else:
            dark = contrast == "blind-drop"
            both = by_hand(policy, dark, True, place), by_hand(policy, dark, False, place)
        expected[place] = both[0] - both[1]
    assert made == pytest.approx(expected, abs=1e-5)
    assert min(abs(expected[place]) for place in (1, 2, 3, 4)) > 1e-4


def test_evidence_that_stays_gives_exactly_nothing(policy):
    made = diffusion_signals(
        policy, [response()], Contrast(corruption="patch", probability=0.0), 8
    )[0]
    assert (made[1:3] == 0).all()
    assert (made[3:5] != 0).all()


def test_signals_depend_on_no_neighbour(policy):
    together = diffusion_signals(policy, [response(0), response(1)], Contrast(), 16)
    for sample in (0, 1):
        alone = diffusion_signals(policy, [response(sample)], Contrast(), 3)[0]
        assert together[sample].tolist() == pytest.approx(alone.tolist(), abs=1e-9)
    assert together[0].tolist() != together[1].tolist()


def test_evidence_is_found_by_characters():
    texts = ["What", " is", " red", "?", " 12"]
    assert evidence_tokens(texts, "is re").tolist() == [False, True, True, False, False]
    assert evidence_tokens(texts, None).all()
    for wrong in ("blue", ""):
        with pytest.raises(DataError, match="evidence"):
            evidence_tokens(texts, wrong)


@pytest.mark.parametrize(
    "settings",
    [{"corruption": "blur"}, {"reason_contrast": "swap"}, {"visual_signal": "full-kl"}],
)
def test_what_needs_an_image_is_refused(policy, settings):
    with pytest.raises(UsageError):
        diffusion_signals(policy, [response()], Contrast(**settings), 4)
