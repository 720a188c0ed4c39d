"""LLaDA's sampler as its authors publish it, for comparison: no shortcuts, no shared code.

Each step is one pass over the whole sequence, with logits at every position over the whole
vocabulary and probabilities in float64 (arXiv 2502.09992 and its code). Greedy, or with the same
noise as the sampler of this package, so that both draw the same tokens.
"""

from __future__ import annotations

import torch

from dlmctl.diffusion.noise import gumbel, key_tensor, subkeys
from dlmctl.diffusion.sampling import Request, SamplerConfig
from dlmctl.models.policy import Policy


@torch.no_grad()
def plain_sample(policy: Policy, request: Request, settings: SamplerConfig) -> list[int]:
    """Tokens of one completion; only lengths, steps and temperature of the settings are used."""
    policy.check_one_mask()
    prompt, mask, device = len(request.prompt), policy.mask_id, policy.device
    masked = [policy.mask_id or 0] * settings.gen_length
    x = torch.tensor([request.prompt + masked], device=device)  # [1, T]
    everywhere = torch.arange(x.shape[1], device=device)
    vocabulary = torch.arange(policy.vocab_size, device=device)
    key = key_tensor([request.key], device)
    for step, number in enumerate(settings.quota().flatten().tolist()):
        block = step // settings.steps_per_block
        end = prompt + min((block + 1) * settings.block_length, settings.gen_length)
        logits = policy.logits(policy.hidden(x, None))[0]  # [T, V]
        if policy.shift:
            logits = logits[policy.source(everywhere)]
        noisy = logits
        if settings.temperature > 0:
            where = subkeys(subkeys(key, torch.tensor(step, device=device)), everywhere - prompt)
            noise = gumbel(where[:, None], vocabulary[None])  # [T, V]
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
