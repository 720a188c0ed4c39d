"""The signal of each token: how much the policy's own belief in it hangs on what it rests on.

For the tokens P that perceive and R that reason, log-probabilities of the policy that sampled the
completion y, without gradient; I is the image, I~ the corrupted one:

    t in P   s_t = log p(y_t | I, y_<t) - log p(y_t | I~, y_<t)                    visual contrast
    t in R   s_t = log p(y_t | I, y_<t) - log p(y_t | I, y_<t without P)            drop
                   the same with another completion's perception in place of P      swap
                   log p(y_t | I~, y_<t) - log p(y_t | I, y_<t)                     blind
                   log p(y_t | I~, y_<t) - log p(y_t | I~, y_<t without P)          blind-drop

`blind` favours what needs the image no more, since the text has it; `blind-drop` is the pointwise
mutual information of the token and the perception. Instead of the difference d: k3 = e^-d + d - 1
(VPPO's), its absolute value, or, for the visual contrast, the divergence of the whole
distributions. What SRPO itself takes could not be read; `swap` and the difference are ours.

With the whole image and all of the perception a completion is scored once, or not at all where its
sampling recorded it; the two contrasts take a pass each. An image that its corruption left as it
was gives exactly 0. Tokens are deleted from the sequence rather than hidden from attention, which
is the same and shorter, and a sequence ends with the last token that is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dlmctl.diffusion.elbo import Example, log_probs, masked_rows, micro_batches, scored_states
from dlmctl.diffusion.fused_linear_logprob import divergence
from dlmctl.diffusion.masks import MaskSet
from dlmctl.diffusion.noise import stream_key
from dlmctl.models.corruption import NO_IMAGE, corrupt
from dlmctl.models.policy import Policy
from dlmctl.models.vision import Picture
from dlmctl.rl.srpo.roles import OTHER, PERCEPTION, REASONING
from dlmctl.settings.srpo import Contrast


class Response(NamedTuple):
    """A completion whose tokens have roles."""

    prompt: Sequence[int]
    completion: Sequence[int]
    pictures: Sequence[Picture]
    roles: Tensor
    """int64 [G]."""
    key: str | int
    """Of its prompt."""
    sample: int
    evidence: Tensor
    """bool [P], the tokens of the prompt that a diffusion policy perceives from."""
    bare: Sequence[int] = ()
    """The prompt without the marks of its images; asked for by `no-image` only."""
    log_probs: Tensor | None = None
    """float64 [G] in nats, where sampling recorded them exactly enough to be one side of a
    difference: they save a pass."""

    def example(
        self,
        chosen: Tensor,
        dropped: Tensor | None = None,
        pictures: Sequence[Picture] | None = None,
    ) -> Example:
        """To score the tokens `chosen` (bool [G]), those `dropped` being left out.

        Args:
            pictures: instead of its own; without any, the prompt has no marks for them either.
        """
        keep = torch.arange(len(chosen)) <= int(chosen.nonzero()[-1])
        if dropped is not None:
            keep &= ~dropped
        pairs = zip(self.completion, keep.tolist(), strict=True)
        tokens = [token for token, there in pairs if there]
        seen = self.pictures if pictures is None else pictures
        prompt = self.prompt if seen or not self.pictures else self.bare
        return _example(prompt, tokens, chosen[keep], seen)


def signals(
    policy: Policy, responses: Sequence[Response], contrast: Contrast, batch_size: int
) -> list[Tensor]:
    """s of every token, float64 [G] in nats for each response; 0 if the token has no role.

    Args:
        policy: autoregressive.
        responses: all those of a prompt, for `swap`; of any number of prompts.
    """
    unseen = _all_corrupted(policy, responses, contrast)
    perceive = [response.roles == PERCEPTION for response in responses]
    reason = [response.roles == REASONING for response in responses]
    both = [response.roles != OTHER for response in responses]
    width = max(len(response.completion) for response in responses)

    def score(examples: Sequence[Example], places: Sequence[Tensor]) -> Tensor:
        return _aligned(log_probs(policy, examples, batch_size)[:, 0], examples, places, width)

    kind = contrast.of_reasoning(diffusion=False)
    blinded = kind in ("blind", "blind-drop")
    chosen = both if blinded else perceive
    blind = [
        response.example(places, pictures=pictures)
        for response, places, pictures in zip(responses, chosen, unseen, strict=True)
    ]
    with_image, without_image = _seen(responses, both, width, score), score(blind, chosen)
    same = torch.tensor([_same(r.pictures, u) for r, u in zip(responses, unseen, strict=True)])
    without_image = torch.where(same[:, None], with_image, without_image)
    visual = ESTIMATORS.get(contrast.visual_signal, torch.abs)(with_image - without_image)
    if contrast.visual_signal == "full-kl":
        sight = [
            response.example(places) for response, places in zip(responses, chosen, strict=True)
        ]
        divergences = _divergences(policy, sight, blind, batch_size)
        visual = _aligned(divergences, sight, chosen, width)
    if kind == "blind":
        away = without_image - with_image
    else:
        kept = without_image if blinded else with_image
        ablated = [
            _ablated(response, responses, contrast, pictures)
            for response, pictures in zip(responses, unseen, strict=True)
        ]
        away = kept - score(ablated, reason)
    reasoned = ESTIMATORS[contrast.reason_signal](away)
    per_response = []
    for n, response in enumerate(responses):
        length = len(response.completion)
        row = torch.where(perceive[n], visual[n, :length], reasoned[n, :length])
        per_response.append(row.masked_fill(~both[n], 0.0))
    return per_response


def _seen(
    responses: Sequence[Response],
    places: Sequence[Tensor],
    width: int,
    score: Callable[[Sequence[Example], Sequence[Tensor]], Tensor],
) -> Tensor:
    """Log-probabilities with image and perception, float64 [N, width]: of sampling, if known."""
    table = torch.zeros(len(responses), width, dtype=torch.float64)
    for n, response in enumerate(responses):
        if response.log_probs is None:
            return score([r.example(p) for r, p in zip(responses, places, strict=True)], places)
        table[n, : len(response.log_probs)] = response.log_probs
    return table


def _same(pictures: Sequence[Picture], others: Sequence[Picture]) -> bool:
    """Whether the corruption left everything as it was."""
    if len(pictures) != len(others):
        return False
    return all(torch.equal(a.pixels, b.pixels) for a, b in zip(pictures, others, strict=True))


def corrupted(policy: Policy, response: Response, contrast: Contrast) -> list[Picture]:
    """The pictures of a response as the visual contrast shows them."""
    if policy.vision is None or contrast.corruption == NO_IMAGE:
        return []
    whose = response.sample if contrast.scope == "rollout" else -1
    return [
        corrupt(
            picture,
            policy.vision,
            contrast.corruption,
            contrast.probability,
            stream_key(contrast.seed, response.key, whose, number),
        )
        for number, picture in enumerate(response.pictures)
    ]


def _all_corrupted(
    policy: Policy, responses: Sequence[Response], contrast: Contrast
) -> list[list[Picture]]:
    """Those of each response; equal ones are one object, which is then encoded once."""
    if contrast.scope == "rollout":
        return [corrupted(policy, response, contrast) for response in responses]
    keys = [(r.key, tuple(id(picture.pixels) for picture in r.pictures)) for r in responses]
    first = dict(zip(reversed(keys), reversed(responses), strict=True))
    by_key = {key: corrupted(policy, response, contrast) for key, response in first.items()}
    return [by_key[key] for key in keys]


def _ablated(
    response: Response,
    group: Sequence[Response],
    contrast: Contrast,
    unseen: Sequence[Picture],
) -> Example:
    """The response to be scored in its reasoning, without the perception that it wrote."""
    reason, perceive = response.roles == REASONING, response.roles == PERCEPTION
    kind = contrast.of_reasoning(diffusion=False)
    other = _other_perception(response, group) if kind == "swap" else None
    if other is None:
        pictures = unseen if kind == "blind-drop" else response.pictures
        return response.example(reason, perceive, pictures)
    start = int(perceive.nonzero()[0])
    behind, end = start + int(perceive.sum()), int(reason.nonzero()[-1]) + 1
    tokens = [*response.completion[:start], *other, *response.completion[behind:end]]
    chosen = torch.cat([reason[:start], torch.zeros(len(other)).bool(), reason[behind:end]])
    return _example(response.prompt, tokens, chosen, response.pictures)


def _other_perception(response: Response, group: Sequence[Response]) -> list[int] | None:
    """What the next sample of the prompt perceived that perceived something else.

    If none did, the same as its own, which says nothing; None if there is no other sample.
    """
    place = next(n for n, other in enumerate(group) if other is response)
    own = _perception(response)
    others = [o for o in (*group[place + 1 :], *group[:place]) if o.key == response.key]
    return next(filter(own.__ne__, map(_perception, others)), own if others else None)


def _perception(response: Response) -> list[int]:
    chosen = (response.roles == PERCEPTION).tolist()
    return [token for token, there in zip(response.completion, chosen, strict=True) if there]


def _example(
    prompt: Sequence[int], tokens: Sequence[int], chosen: Tensor, pictures: Sequence[Picture]
) -> Example:
    masks = MaskSet(chosen[None], torch.ones(1, dtype=torch.float64), chosen)
    return Example(prompt, tokens, masks, pictures)


def _aligned(
    values: Tensor, examples: Sequence[Example], wanted: Sequence[Tensor], width: int
) -> Tensor:
    """Scores of sequences at the places [N, width] of the whole completions."""
    table = values.new_zeros(len(examples), width)
    for n, (example, places) in enumerate(zip(examples, wanted, strict=True)):
        scored = example.masks.scored
        table[n, places.nonzero()[:, 0]] = values[n, : len(scored)][scored]
    return table


@torch.no_grad()
def _divergences(
    policy: Policy, first: Sequence[Example], second: Sequence[Example], batch_size: int
) -> Tensor:
    """KL of the next token's distribution, first from second: float64 [N, G]; 0 elsewhere."""
    table = torch.zeros(len(first), max(len(e.completion) for e in first), dtype=torch.float64)
    for pairs in micro_batches(first, torch.ones(len(first), 1).bool(), batch_size):
        one = scored_states(policy, *masked_rows(policy, first, pairs))
        two = scored_states(policy, *masked_rows(policy, second, pairs))
        n = torch.tensor([n for n, _ in pairs])
        values = divergence(policy, one.states, two.states)
        table[n[one.rows.cpu()], one.columns.cpu()] = values.double().cpu()
    return table


def _k3(away: Tensor) -> Tensor:
    """VPPO's: of the distance to the other side, within its own bounds."""
    distance = (-away).clamp(-20, 20)
    return (distance.exp() - distance - 1).clamp(0, 10)


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "logratio": lambda away: away,
    "k3": _k3,
    "abs-logratio": torch.abs,
}
"""Signal from the difference of log-probabilities, the full sight first."""
