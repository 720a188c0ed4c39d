"""LLaDA's sampler as its authors publish it, for comparison: nothing left out, nothing shared.

One pass over the whole sequence in each step, logits of every position over the whole vocabulary,
probabilities in float64 (arXiv 2502.09992 and its code). Greedy, or with the same noise as the
sampler of this package, so that both draw the same tokens.
"""

from __future__ import annotations

import torch

from dlmctl.diffusion.noise import gumbel, key_tensor, subkeys
from dlmctl.diffusion.sampling import Request, SamplerConfig
from dlmctl.models.policy import Policy


@torch.no_grad()
def plain_sample(policy: Policy, request: Request, settings: SamplerConfig) -> list[int]:
    """Tokens of one completion; block length, steps and temperature are taken from the settings."""
    prompt, mask, device = len(request.prompt), policy.mask_id, policy.device
    hidden = [policy.mask_id or 0] * settings.gen_length
    x = torch.tensor([request.prompt + hidden], device=device)
    everywhere = torch.arange(x.shape[1], device=device)
    vocabulary = torch.arange(policy.vocab_size, device=device)
    key = key_tensor([request.key], device)
    for step, number in enumerate(settings.quota().flatten().tolist()):
        block = step // settings.steps_per_block
        end = prompt + min((block + 1) * settings.block_length, settings.gen_length)
        logits = policy.logits(policy.hidden(x, None))[0]
        if policy.shift:
            logits = logits[policy.source(everywhere)]
        noisy = logits
        if settings.temperature > 0:
            where = subkeys(subkeys(key, torch.tensor(step, device=device)), everywhere - prompt)
            noise = gumbel(where[:, None], vocabulary[None])
            noisy = logits.double() + settings.temperature * noise
        noisy = noisy.index_fill(1, torch.tensor([mask], device=device), -torch.inf)
        token = noisy.argmax(dim=1)
        p = logits.double().softmax(dim=1)
        confidence = p.gather(1, token[:, None])[:, 0]
        confidence[end:] = -torch.inf
        confidence[x[0] != mask] = -torch.inf
        best = confidence.topk(number).indices
        x[0, best] = token[best]
    return x[0, prompt:].tolist()
