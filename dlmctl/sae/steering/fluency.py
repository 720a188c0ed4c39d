"""Perplexity of texts under a language model: exp(mean negative log-likelihood per token).

Every token counts but the first, which nothing precedes. Under an autoregressive model it is exact.
Under a diffusion model the ELBO stands for the log-likelihood, which gives an upper bound; and as
the exponential of an estimate is too large on average, few masks make it looser still.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from dlmctl.diffusion.elbo import Example, elbo_samples
from dlmctl.diffusion.scoring import MaskPlan, completion_masks
from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError
from dlmctl.sae.steering.scores import Name, Text

Perplexities = dict[Name, float | None]
"""None is a text of fewer than two tokens."""

BATCHES = 8
"""Batches among which texts of like length are brought together."""


def perplexities(
    policy: Policy,
    texts: Iterable[Text],
    context: int,
    plan: MaskPlan,
    batch_size: int,
    reach: Callable[[int], None] = lambda _: None,
) -> Perplexities:
    """Perplexity of prompt and completion of each text, of their first `context` tokens.

    Masks, for a diffusion model, depend on the seed of the plan, the id and the sample, so that two
    texts that differ by steering have the same noise levels.

    Args:
        reach: is told how many are done.

    Raises:
        DataError: a text is not there, or the model has no tokens for it.
    """
    found: Perplexities = {}
    waiting: list[tuple[Name, Example]] = []
    for name, text in {text.name: text for text in texts}.items():
        ids = _ids(policy, text)[:context]
        if len(ids) < 2:
            found[name] = None
            continue
        keys = (plan.seed, text.key[0])
        masks = completion_masks(policy, 1, ids[1:], plan, keys, text.key[1])
        waiting.append((name, Example(ids[:1], ids[1:], masks)))
    chunk = BATCHES * batch_size
    for start in range(0, len(waiting), chunk):
        names, examples = zip(*waiting[start : start + chunk], strict=True)
        found |= zip(names, _of_examples(policy, examples, batch_size), strict=True)
        reach(len(found))
    return found


def _of_examples(policy: Policy, examples: Sequence[Example], batch_size: int) -> list[float]:
    values = elbo_samples(policy, examples, batch_size).mean(dim=1).tolist()
    return [
        math.exp(-value / len(example.completion))
        for value, example in zip(values, examples, strict=True)
    ]


def _ids(policy: Policy, text: Text) -> list[int]:
    if text.prompt is None:
        raise DataError("there is no 'prompt' and no 'messages' to read before it", text.where)
    try:
        # By themselves, as in training: a tokenizer of words would join the last and the first.
        return policy.encode_context(text.prompt) + policy.encode_text(text.completion)
    except DataError as error:
        error.where = error.where or text.where
        raise
