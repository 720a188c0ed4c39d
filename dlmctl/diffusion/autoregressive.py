"""Sampling from an autoregressive model, left to right with a key-value cache.

Prompts are left-padded so that all rows write the same column. The noise of a token depends on the
key of its row and its place alone, as in the diffusion sampler. Log-probabilities are those of the
model itself, whatever the temperature: what `update` scores a completion with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from dlmctl.diffusion.noise import gumbel, key_tensor, subkeys
from dlmctl.diffusion.sampling import Request, Sample, Sampling
from dlmctl.models.policy import Policy, cache_argument
from dlmctl.records.errors import UsageError


def sample_autoregressive(
    policy: Policy, requests: Iterable[Request], settings: Sampling, batch_size: int
) -> Iterator[Sample]:
    """Sample a completion for each request, up to and including end-of-sequence, in their order.

    Raises:
        UsageError: the settings ask for something that only denoising has.
    """
    for option, given in {
        "--threshold": settings.threshold is not None,
        "--factor": settings.factor is not None,
        "--cache": settings.cache != "none",
        "--cfg-scale": settings.cfg_scale > 0,
        "--compile": settings.compile,
        "--remasking sae": settings.remasking == "sae",
    }.items():
        if given:
            raise UsageError(f"{option} means nothing to {policy.name}, an autoregressive model")
    source = iter(requests)
    while batch := list(islice(source, batch_size)):
        yield from _batch(policy, batch, settings.gen_length, settings.temperature)


@torch.no_grad()
def _batch(
    policy: Policy, requests: Sequence[Request], gen_length: int, temperature: float
) -> list[Sample]:
    device = policy.device
    ids, attention = _left_padded([request.prompt for request in requests], policy.pad_id, device)
    noise_keys = key_tensor([request.key for request in requests], device)
    finished = torch.zeros(len(requests), dtype=torch.bool, device=device)
    pictures = [policy.pictures(request.record or {}) for request in requests]
    places, extra = None, {}
    if policy.vision is not None:
        places = policy.vision.places(policy.core, ids, attention, pictures)
        extra = policy.vision.inputs(policy.core, pictures, device)
    if places is None:
        places = (attention.cumsum(1) - 1).clamp(min=0)
    tokens: list[Tensor] = []
    log_probs: list[Tensor] = []
    cache_name, cache = cache_argument(policy.core), DynamicCache()
    for step in range(gen_length):
        output = policy.model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=places,
            use_cache=True,
            logits_to_keep=1,
            **{cache_name: cache},
            **extra,
        )
        scores = logits = output.logits[:, -1].double()
        if policy.vision is not None:
            scores = scores.index_fill(
                1, torch.tensor(policy.vision.banned, device=device), -torch.inf
            )
        if temperature > 0:
            vocabulary = torch.arange(scores.shape[1], device=device)
            where = subkeys(noise_keys, torch.tensor(step, device=device))
            scores = scores + temperature * gumbel(where[:, None], vocabulary[None])
        token = scores.argmax(dim=1).masked_fill(finished, policy.pad_id)
        tokens.append(token)
        log_probs.append(logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(dim=1))
        finished |= token == (policy.eos_id if policy.eos_id is not None else -1)
        if bool(finished.all()):
            break
        ids, extra = token[:, None], {}
        # The next place is one after the largest in any of the dimensions.
        places = (places.movedim(-2, 0).flatten(1).amax(1) + 1)[:, None]
        attention = torch.cat([attention, attention.new_ones(len(requests), 1)], dim=1)
    rows = zip(
        torch.stack(tokens, dim=1).tolist(), torch.stack(log_probs, dim=1).tolist(), strict=True
    )
    return [_finish(*row, policy.eos_id) for row in rows]


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


def _finish(tokens: list[int], log_probs: list[float], eos_id: int | None) -> Sample:
    if eos_id is not None and eos_id in tokens:
        tokens = tokens[: tokens.index(eos_id) + 1]
    length = len(tokens)
    return Sample(tokens, list(range(length)), length, log_probs[:length])
