"""Role credit for diffusion policies, text in place of the image. Ours, beyond the paper.

The evidence is a part of the prompt, named by the record, or all of it. A masked diffusion model
needs no corrupted copy of it: tokens that are masked by the mask token are what it was trained on.
A token's log-probability is its share of the ELBO: the mean over the masks M_k of the completion
that hide it, without their weights. With E the evidence:

    t in P   s_t = mean_k log p(y_t | E, y outside M_k) - log p(y_t | E masked, y outside M_k)
    t in R   mean_k log p(y_t | P seen, y outside M_k) - log p(y_t | P masked, y outside M_k)   drop
             mean_k log p(y_t | E masked, y outside M_k) - log p(y_t | E, y outside M_k)       blind
             the same as drop with E masked on both sides                                 blind-drop

Under `drop` the perception is seen whole or not at all, whatever M_k hides of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dlmctl.diffusion.elbo import Example, log_probs
from dlmctl.diffusion.masks import MaskSet, draw_masks
from dlmctl.diffusion.noise import stream_key
from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError, UsageError
from dlmctl.rl.srpo.contrast import ESTIMATORS, Response
from dlmctl.rl.srpo.roles import OTHER, PERCEPTION, REASONING
from dlmctl.settings.srpo import Contrast

MASKS = 8
"""For each completion: four complementary pairs, so that every token is masked four times."""


def diffusion_signals(
    policy: Policy, responses: Sequence[Response], contrast: Contrast, batch_size: int
) -> list[Tensor]:
    """s of every token, float64 [G] in nats for each response; 0 if the token has no role.

    Raises:
        UsageError: the contrast is one of images, or needs sequences of another length.
    """
    kind = contrast.of_reasoning(diffusion=True)
    if contrast.visual_signal == "full-kl" or kind == "swap":
        raise UsageError("--visual-signal full-kl and --reason-contrast swap are not for diffusion")
    if contrast.corruption not in ("patch", "blank"):
        raise UsageError(f"--corrupt {contrast.corruption} is of images; for text: patch, blank")
    rows = [_Row(response, contrast) for response in responses]

    def score(blind: bool, perception: bool | None, role: int) -> list[Tensor]:
        examples = [row.example(blind, perception, role) for row in rows]
        table = log_probs(policy, examples, batch_size)
        return [_mean(values, e.masks.targets) for values, e in zip(table, examples, strict=True)]

    def away(kept: list[Tensor], lost: list[Tensor]) -> list[Tensor]:
        return [a - b for a, b in zip(kept, lost, strict=True)]

    visual = away(score(False, None, PERCEPTION), score(True, None, PERCEPTION))
    if kind == "blind":
        reasoned = away(score(True, None, REASONING), score(False, None, REASONING))
    else:
        blind = kind == "blind-drop"
        reasoned = away(score(blind, True, REASONING), score(blind, False, REASONING))
    see, think = ESTIMATORS[contrast.visual_signal], ESTIMATORS[contrast.reason_signal]
    per_response = []
    for response, seen, thought in zip(responses, visual, reasoned, strict=True):
        both = torch.where(response.roles == PERCEPTION, see(seen), think(thought))
        per_response.append(both.masked_fill(response.roles == OTHER, 0.0))
    return per_response


def evidence_tokens(texts: Sequence[str], evidence: str | None) -> Tensor:
    """bool [P]: the prompt's tokens that spell the evidence, at least in part; None is all of it.

    Raises:
        DataError: it does not stand in the prompt.
    """
    if evidence is None:
        return torch.ones(len(texts), dtype=torch.bool)
    whole = "".join(texts)
    start = whole.find(evidence)
    if start < 0 or not evidence:
        raise DataError("the text of 'evidence' does not stand in the prompt")
    ends = torch.tensor([len(text) for text in texts]).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return (starts < start + len(evidence)) & (ends > start)


class _Row:
    """One response with its masks and its masked evidence."""

    def __init__(self, response: Response, contrast: Contrast) -> None:
        self.response = response
        keys = (contrast.seed, "credit", response.key)
        everything = torch.ones(len(response.completion), dtype=torch.bool)
        self.masked = draw_masks("stratified", MASKS, everything, keys, response.sample).masked
        self.evidence = _hidden_evidence(response, contrast)

    def example(self, blind: bool, perception: bool | None, role: int) -> Example:
        """To score the tokens of a role, the perception seen, masked, or as the masks are."""
        masked = self.masked
        if perception is not None:
            chosen = self.response.roles == PERCEPTION
            masked = masked & ~chosen if perception else masked | chosen
        prompt = self.evidence.expand(len(masked), -1) if blind else None
        weights = torch.ones(len(masked), dtype=torch.float64)
        masks = MaskSet(masked, weights, self.response.roles == role, prompt)
        return Example(self.response.prompt, self.response.completion, masks)


def _hidden_evidence(response: Response, contrast: Contrast) -> Tensor:
    if contrast.corruption == "blank":
        return response.evidence
    whose = response.sample if contrast.scope == "rollout" else -1
    seed = stream_key(contrast.seed, response.key, whose, 0) & (2**63 - 1)
    drawn = torch.rand(len(response.evidence), generator=torch.Generator().manual_seed(seed))
    return response.evidence & (drawn < contrast.probability)


def _mean(values: Tensor, targets: Tensor) -> Tensor:
    """Mean [G] of values [K, G'] over the masks that hide a token; 0 where none does."""
    length = targets.shape[1]
    return (values[:, :length] * targets).sum(0) / targets.sum(0).clamp(min=1)
