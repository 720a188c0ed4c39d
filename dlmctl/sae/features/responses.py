"""What the features of an autoencoder respond to, from one pass over a corpus.

The first half of the automated interpretability of DLM-Scope (arXiv 2602.05859, appendix D), with
two differences: features of masked tokens are observed on masked tokens, while the published
scripts observed them on text without masks; and a window counts as inactive only if the feature is
active on none of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from torch import Tensor

from dlmctl.diffusion.noise import key_tensor, stream_key, uniform
from dlmctl.records.errors import UsageError
from dlmctl.sae.features.code_batch import CodeBatch
from dlmctl.sae.features.firing_stats import FiringStats
from dlmctl.sae.features.windows import Windows
from dlmctl.settings.features import WindowCounts


class FeatureChoice(NamedTuple):
    """Which features get a record."""

    rule: Literal["random", "top", "all", "these"]
    limit: int = 0
    """For random and top."""
    features: tuple[int, ...] = ()
    """For these."""


def parse_choice(text: str, d_sae: int) -> FeatureChoice:
    """`random:N`, `top:N`, `all`, or numbers like `1,5,9`; raises UsageError for others."""
    rule, _, count = text.partition(":")
    if text == "all":
        return FeatureChoice("all")
    if rule in ("random", "top") and count.isdecimal() and int(count) > 0:
        return FeatureChoice("top" if rule == "top" else "random", int(count))
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise UsageError(
            f"--features {text} is none of random:N, top:N, all, or numbers like 1,5,9"
        )
    numbers = tuple(dict.fromkeys(map(int, parts)))
    if max(numbers) >= d_sae:
        raise UsageError(f"--features {text}: there are features 0 to {d_sae - 1}")
    return FeatureChoice("these", features=numbers)


class Responses(NamedTuple):
    """What the S features `latents` respond to in a corpus."""

    latents: Tensor
    """int64 [S]."""
    stats: FiringStats
    windows: Windows


def collect_responses(
    stream: Iterable[CodeBatch],
    latents: Tensor,
    counts: WindowCounts,
    seed: int,
    t_min: float,
    t_max: float,
) -> Responses:
    """Go through a corpus once; memory does not grow with its length."""
    responses = Responses(
        latents, FiringStats(len(latents), t_min, t_max), Windows(latents, counts, seed)
    )
    for codes in stream:
        responses.stats.add(codes)
        responses.windows.add(codes)
    return responses


def select_slots(responses: Responses, choice: FeatureChoice, seed: int) -> list[int]:
    """Slots of the features that get a record, by number; for `top`, by how often they fire."""
    stats = responses.stats
    if choice.rule == "these":
        return list(range(len(responses.latents)))
    alive = stats.alive.nonzero().squeeze(1)
    if choice.rule == "top":
        order = stats.count[alive].argsort(descending=True, stable=True)
        alive = alive[order[: choice.limit]]
    elif choice.rule == "random":
        keys = key_tensor([stream_key(seed, "features")])
        order = uniform(keys, responses.latents[alive]).argsort(stable=True)
        alive = alive[order[: choice.limit]].sort().values
    return list(map(int, alive))
