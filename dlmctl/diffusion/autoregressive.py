"""Sampling from an autoregressive model, left to right with a key-value cache.

Prompts are left-padded so that all rows write the same column. As in the diffusion sampler, the
noise of a token depends only on the key of its row and on its position. Log-probabilities are those
of the model at temperature 1, whatever the temperature: `update` scores completions with the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from dlmctl.diffusion.callback import SamplerCallback
from dlmctl.diffusion.draws import gumbel_max
from dlmctl.diffusion.noise import key_tensor, subkeys
from dlmctl.diffusion.proposals import least_kept
from dlmctl.diffusion.sampling import Request, Sample, SamplerConfig
from dlmctl.models.policy import Policy, cache_argument
from dlmctl.models.sending import sent
from dlmctl.records.errors import UsageError


def sample_autoregressive(
    policy: Policy,
    requests: Iterable[Request],
    settings: SamplerConfig,
    batch_size: int,
    callback: SamplerCallback | None = None,
) -> Iterator[Sample]:
    """Sample a completion for each request, up to and including end-of-sequence, in their order.

    Args:
        callback: only its `on_rows` and `on_tokens` are called.

    Raises:
        UsageError: an option is given that only denoising has.
    """
    for option, given in {
        "--threshold": settings.threshold is not None,
        "--factor": settings.factor is not None,
        "--cache": settings.cached,
        "--cfg-scale": settings.cfg_scale > 0,
        "--compile": settings.compile,
        "--remasking sae": settings.remasking == "sae",
        "--schedule timesteps": settings.schedule == "timesteps",
        "--alg-temp": settings.alg_temp > 0,
    }.items():
        if given:
            raise UsageError(f"{option} means nothing to {policy.name}, an autoregressive model")
    source, first = iter(requests), 0
    while batch := list(islice(source, batch_size)):
        yield from _batch(policy, batch, settings, callback, first)
        first += len(batch)


@torch.no_grad()
def _batch(
    policy: Policy,
    requests: Sequence[Request],
    settings: SamplerConfig,
    callback: SamplerCallback | None,
    first: int,
) -> list[Sample]:
    """Samples of a batch; `first` is the number of its first request."""
    rows = _Rows(policy, requests)
    shape = len(requests), settings.gen_length
    made = torch.full(shape, policy.pad_id, device=policy.device)
    log_probs = torch.zeros(shape, dtype=torch.float64, device=policy.device)
    for step in range(settings.gen_length):
        if callback is not None:
            callback.on_rows((rows.numbers + first).masked_fill(rows.ended, -1).tolist())
        logits = rows.next_logits()
        token = next_tokens(policy, logits, rows.noise_keys, step, settings)
        if callback is not None:
            callback.on_tokens(token)
        made[rows.numbers, step] = token
        log_probs[rows.numbers, step] = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(
            dim=1
        )
        if not rows.go_on(token):
            break
    return [_finish(policy, *row) for row in zip(made.tolist(), log_probs.tolist(), strict=True)]


def next_tokens(
    policy: Policy, logits: Tensor, noise_keys: Tensor, step: int, settings: SamplerConfig
) -> Tensor:
    """The next token of each row, int64 [B]."""
    if policy.vision is not None:
        banned = sent(torch.tensor(policy.vision.banned), logits.device)
        logits = logits.index_fill(1, banned, -torch.inf)
    if settings.temperature > 0:
        keys = subkeys(noise_keys, torch.full((), step, device=logits.device))
        return gumbel_max(logits, keys, settings.temperature, least_kept(logits, settings))
    return logits.argmax(dim=1)


class _Rows:
    """The completions that are not finished, and the cache of what they have so far.

    Rows that have ended stay in the batch until they are a quarter of it. Then they leave, and the
    cache is cut to the others; to cut it each time would copy it too often.
    """

    def __init__(self, policy: Policy, requests: Sequence[Request]) -> None:
        device = policy.device
        self.policy = policy
        self.ids, self.attention = _left_padded(
            [request.prompt for request in requests], policy.pad_id, device
        )
        self.noise_keys = key_tensor([request.key for request in requests], device)
        self.numbers = torch.arange(len(requests), device=device)
        """Which requests the rows are of."""
        self.ends = torch.tensor(sorted(policy.ends), dtype=torch.int64, device=device)
        self.ended = torch.zeros(len(requests), dtype=torch.bool, device=device)
        self.extra: dict[str, Any] = {}
        places = None
        if policy.vision is not None:
            pictures = [policy.pictures(request.record or {}) for request in requests]
            places = policy.vision.positions(policy.core, self.ids, self.attention, pictures)
            self.extra = policy.vision.inputs(policy.core, pictures, device)
        if places is None:
            places = (self.attention.cumsum(1) - 1).clamp(min=0)
        self.places = places
        self.cache = DynamicCache()

    def next_logits(self) -> Tensor:
        """float64 [B, V]."""
        output = self.policy.model(
            input_ids=self.ids,
            attention_mask=self.attention,
            position_ids=self.places,
            use_cache=True,
            logits_to_keep=1,
            **{cache_argument(self.policy.core): self.cache},
            **self.extra,
        )
        self.extra = {}
        logits: Tensor = output.logits[:, -1].double()
        return logits

    def go_on(self, token: Tensor) -> bool:
        """Append a token to each row, int64 [B]; returns whether any row is unfinished."""
        self.ended |= torch.isin(token, self.ends)
        # The one wait of a step.
        unfinished = (~self.ended).cpu().nonzero()[:, 0]
        going = len(unfinished)
        # The next place is one after the largest in any of the dimensions.
        places = self.places.movedim(-2, 0).flatten(1).amax(1) + 1
        self.ids, self.places = token[:, None], places[:, None]
        self.attention = torch.cat([self.attention, torch.ones_like(self.ids)], dim=1)
        if 0 < going <= len(token) * 3 // 4:
            self._keep(sent(unfinished, token.device))
        return going > 0

    def _keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        for name in ("ids", "places", "attention", "noise_keys", "numbers", "ended"):
            setattr(self, name, getattr(self, name)[rows])


def _left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids and attention, int64 [B, T] each."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    for b, prompt in enumerate(prompts):
        ids[b, width - len(prompt) :] = torch.tensor(prompt)
        attention[b, width - len(prompt) :] = 1
    return ids.to(device), attention.to(device)


def _finish(policy: Policy, tokens: list[int], log_probs: list[float]) -> Sample:
    length = policy.length(tokens)
    return Sample(tokens[:length], list(range(length)), length, log_probs[:length])
