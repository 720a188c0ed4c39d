"""Perplexity of texts under a language model: exp(mean negative log-likelihood per token).

Every token counts except the first, which nothing precedes. Under an autoregressive model it is
exact. Under a diffusion model the ELBO stands in for the log-likelihood, which gives an upper
bound; since the exponential of an estimate is too large on average, few masks make it looser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from dlmctl.diffusion.elbo import Example, elbo_samples
from dlmctl.diffusion.scoring import MaskPlan, completion_masks
from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError
from dlmctl.sae.steering.twins import Name, SampledText

BATCHES = 8
"""Batches among which texts of similar length are brought together."""


def perplexities(
    policy: Policy,
    texts: Iterable[SampledText],
    context: int,
    plan: MaskPlan,
    batch_size: int,
    reach: Callable[[int], None] = lambda _: None,
) -> dict[Name, float | None]:
    """Perplexity of prompt and completion, of their first `context` tokens; None if fewer than two.

    The masks, for a diffusion model, depend on the seed of the plan, the id and the sample, so two
    texts that differ by steering have the same noise levels.

    Args:
        reach: is called with how many are done.

    Raises:
        DataError: a prompt is missing, or the model has no tokens for a text.
    """
    results: dict[Name, float | None] = {}
    waiting: list[tuple[Name, Example]] = []
    for name, text in {text.name: text for text in texts}.items():
        ids = _ids(policy, text)[:context]
        if len(ids) < 2:
            results[name] = None
            continue
        keys = (plan.seed, text.key[0])
        masks = completion_masks(policy, 1, ids[1:], plan, keys, text.key[1])
        waiting.append((name, Example(ids[:1], ids[1:], masks)))
    chunk = BATCHES * batch_size
    for start in range(0, len(waiting), chunk):
        names, examples = zip(*waiting[start : start + chunk], strict=True)
        values = elbo_samples(policy, examples, batch_size).mean(dim=1).tolist()  # [n, k] -> [n]
        for name, example, value in zip(names, examples, values, strict=True):
            results[name] = math.exp(-value / len(example.completion))
        reach(len(results))
    return results


def _ids(policy: Policy, text: SampledText) -> list[int]:
    if text.prompt is None:
        raise DataError("there is no 'prompt' and no 'messages' to read before it", text.where)
    try:
        # Each by itself, as in training: a word tokenizer would join the last word and the first.
        return policy.encode_context(text.prompt) + policy.encode_text(text.completion)
    except DataError as error:
        error.where = error.where or text.where
        raise
