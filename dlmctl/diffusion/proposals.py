"""From hidden states to a token and a confidence for each masked position, and which ones stay.

    token       argmax_v  logit_v + temperature * Gumbel noise        (exact Gumbel-max, float64)
                over the v that top-p and top-k keep
    confidence  low_confidence  p(token)             random   U(0, 1)
                entropy         -H(p)                margin   p(best) - p(second)
                sae             p(token), adjusted by a SamplerCallback
                where p is softmax(logits), or what the token is drawn from

Positions go through the vocabulary in chunks, so that memory does not grow with the batch. With
e_v = exp(logit_v - max), everything is written in Z - 1 = sum of all e_v but the largest: a p that
rounds to 1 in float32 still has its place among the others, as in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dlmctl.diffusion.draws import gumbel_max
from dlmctl.diffusion.noise import gumbel, uniform
from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.models.policy import Policy
from dlmctl.models.sending import sent
from dlmctl.settings.sampler import Remasking


def predict_tokens(
    policy: Policy, states: Sequence[Tensor], keys: Tensor, settings: SamplerConfig
) -> tuple[Tensor, Tensor]:
    """A token and a confidence for each of N positions.

    Args:
        states: hidden states [N, H] in which the logits stand; with guidance a second tensor, those
            of the model that does not see the prompt.
        keys: int64 [N], the noise of each position.

    Returns:
        int64 [N] and float64 [N].
    """
    chunk = positions_per_chunk(policy.vocab_size, keys.is_cuda)
    parts = [
        predict_tokens_chunk(policy, pieces, where, settings)
        for *pieces, where in zip(*(x.split(chunk) for x in (*states, keys)), strict=True)
    ]
    if not parts:
        return keys, keys.double()
    tokens, confidence = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(confidence)


def positions_per_chunk(vocab_size: int, cuda: bool) -> int:
    """Positions whose logits are made at once.

    As many as pay: a chunk reads the whole output projection once.
    """
    return max(1, (1 << 27 if cuda else 1 << 23) // vocab_size)


def predict_tokens_chunk(
    policy: Policy, states: Sequence[Tensor], keys: Tensor, settings: SamplerConfig
) -> tuple[Tensor, Tensor]:
    """`predict_tokens` with the logits of all positions in memory at once."""
    return _decide(policy, _logits(policy, states, settings.cfg_scale), keys, settings)


def _logits(policy: Policy, states: Sequence[Tensor], cfg_scale: float) -> Tensor:
    """LLaDA's guidance: uncond + (cfg_scale + 1) * (cond - uncond)."""
    logits = policy.logits(states[0])
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    if cfg_scale <= 0:
        return logits
    unconditional = policy.logits(states[1]).to(logits.dtype)
    return unconditional + (cfg_scale + 1) * (logits - unconditional)


def _decide(
    policy: Policy, logits: Tensor, keys: Tensor, settings: SamplerConfig
) -> tuple[Tensor, Tensor]:
    """`predict_tokens` for one chunk of logits [N, V], which are overwritten."""
    if policy.latent_masks:
        further = sent(torch.tensor(policy.latent_masks[1:]), logits.device)
        logits.index_fill_(1, further, -torch.inf)
    if settings.eos == "never":
        logits.index_fill_(1, sent(torch.tensor(sorted(policy.ends)), logits.device), -torch.inf)
    of_sampled = settings.confidence_of == "sampled" and settings.remasking != "random"
    bound = None
    if settings.temperature > 0 or of_sampled:
        bound = least_kept(logits, settings)
    # The mask token is a state of the process, not an outcome: it counts in p, but is not sampled.
    aside = logits[:, policy.mask_id].clone()
    logits[:, policy.mask_id] = -torch.inf
    if bound is not None:
        bound = torch.minimum(bound, logits.amax(dim=1, keepdim=True))
    if settings.temperature > 0:
        token = gumbel_max(logits, keys, settings.temperature, bound)
    else:
        token = logits.argmax(dim=1)
    logits[:, policy.mask_id] = aside
    if of_sampled and bound is not None:
        logits.masked_fill_(logits < bound, -torch.inf)
    if of_sampled and settings.temperature > 0:
        logits.div_(settings.temperature)
    sure = _confidence(logits, token, keys, settings.remasking)
    if settings.eos == "late":
        # Finite, so that these tokens still come before positions that are not masked.
        late = sent(torch.tensor(sorted(policy.ends | policy.turn_ends)), token.device)
        sure = torch.where(torch.isin(token, late), sure - 1e9, sure)
    return token, sure


def least_kept(logits: Tensor, settings: SamplerConfig) -> Tensor | None:
    """The least logit that top-p and top-k keep in each row of [N, V]: [N, 1], or None for all.

    As in Dream's sample_tokens: of softmax(logits / temperature), top-p keeps a token if those
    before it have at most that probability, so always the first; then top-k keeps the k best. A
    token as probable as the least one kept is kept too.
    """
    vocabulary = logits.shape[1]
    width = min(settings.top_k or vocabulary, vocabulary)
    if settings.top_p >= 1 and width == vocabulary:
        return None
    bounds = []
    # In parts, as sorting takes several times the memory of the logits.
    for part in logits.split(-(-len(logits) // 8)):
        ordered = part.topk(width, dim=1).values
        last = torch.full_like(ordered[:, :1], width - 1, dtype=torch.int64)
        if settings.top_p < 1:
            scale = settings.temperature or 1.0
            log_p = ordered / scale - (part / scale).logsumexp(dim=1, keepdim=True)
            before = log_p.exp().cumsum(dim=1)[:, :-1]
            last = (before <= settings.top_p).sum(dim=1, keepdim=True)
        bounds.append(ordered.gather(1, last))
    return torch.cat(bounds)


def _confidence(logits: Tensor, token: Tensor, keys: Tensor, remasking: Remasking) -> Tensor:
    """float64 [N]: how sure softmax(logits) is, for logits [N, V] (overwritten)."""
    if remasking == "random":
        broken = logits.amax(dim=1).isnan()
        return chance(keys).masked_fill(broken, torch.nan)
    best, top = logits.max(dim=1, keepdim=True)
    below = logits.sub_(best)
    chosen = below.gather(1, token[:, None])[:, 0].double().exp()
    below.scatter_(1, top, -torch.inf)
    if remasking == "margin":
        second = below.amax(dim=1).double().exp()
        return (1 - second) / (1 + below.exp_().sum(dim=1).double())
    if remasking == "entropy":
        weights = below.exp()
        rest = weights.sum(dim=1).double()
        # 0 * -inf is 0 here: what has no probability carries no entropy.
        mean = weights.mul_(below.clamp_(min=-1e4)).sum(dim=1).double()
        return mean / (1 + rest) - rest.log1p()
    return chosen / (1 + below.exp_().sum(dim=1).double())


def chance(keys: Tensor) -> Tensor:
    """The confidence of N positions that are decided in random order; float64 [N]."""
    return uniform(keys, torch.full_like(keys, -1))


def latent(keys: Tensor, count: int) -> Tensor:
    """The latent variable of N rows in a step, uniform in 0 to count - 1; int64 [N].

    Args:
        keys: int64 [N], the noise of each row in this step.
    """
    return (uniform(keys, torch.full_like(keys, -3)) * count).long()


def perturb(confidence: Tensor, keys: Tensor, settings: SamplerConfig) -> Tensor:
    """Confidence [N] whose largest values are drawn as `alg_temp` says; float64 [N].

    The k largest of log w + Gumbel noise are k draws without replacement with probabilities
    proportional to w (Kool and others, arXiv 1903.06059), here w = exp(confidence / alg_temp).
    """
    return confidence / settings.alg_temp + gumbel(keys, torch.full_like(keys, -2))


def select_to_unmask(confidence: Tensor, quota: Tensor, settings: SamplerConfig) -> Tensor:
    """bool [R, B]: the positions whose token stays.

    By `threshold` and `factor`, as in Fast-dLLM's get_transfer_index and
    get_transfer_index_dynamic, that is at least one in each row with a masked token; by `threshold`
    with `steps` at least the quota, as in SDAR's low_confidence_dynamic.

    Args:
        confidence: float64 [R, B], -inf where nothing is masked.
        quota: [R], as `SamplerConfig.per_step` has them: tokens to decide if their number is fixed,
            and else at least.
    """
    masked = confidence > -torch.inf
    ordered, order = confidence.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(confidence.shape[1], device=confidence.device)
    if settings.threshold is not None:
        stays = (ordered >= settings.threshold) | (rank < quota[:, None])
    elif settings.factor is not None:
        # As confidence falls and its bound rises, these are the first of their row.
        stays = (ordered >= 1 - settings.factor / (rank.double() + 2)) | (rank == 0)
        number, left = stays.sum(dim=1), masked.sum(dim=1)
        # Fast-dLLM's loop ends at the last masked token, sure enough or not, and keeps it.
        stays = rank < torch.where(number == left - 1, left, number)[:, None]
    elif settings.ancestral:
        # In the last step all, also those that eos=late has put below 0.
        share = quota[:, None]
        stays = (ordered > 1 - share) | (share == 1)
    else:
        stays = rank < quota[:, None]
    return torch.zeros_like(masked).scatter_(1, order, stays) & masked
