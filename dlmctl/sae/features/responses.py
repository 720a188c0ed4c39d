"""What the features of an autoencoder respond to, from one pass over a corpus.

The automated interpretability of DLM-Scope (arXiv 2602.05859, appendix D), with two differences:
the features of masked tokens are looked at on masked tokens, which the published scripts did on
text of which nothing is hidden, and a window counts as inactive only where it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from dlmctl.diffusion.noise import key_tensor, stream_key, uniform
from dlmctl.records.errors import UsageError
from dlmctl.sae.features.active import Active
from dlmctl.sae.features.activity import Activity
from dlmctl.sae.features.windows import Plan, Windows


class Choice(NamedTuple):
    """Which features get a record."""

    rule: Literal["random", "top", "all", "these"]
    limit: int = 0
    """For random and top."""
    features: tuple[int, ...] = ()
    """For these."""


def parse_choice(text: str, d_sae: int) -> Choice:
    """`random:N`, `top:N`, `all`, or numbers like `1,5,9`; raises UsageError for others."""
    rule, _, count = text.partition(":")
    if text == "all":
        return Choice("all")
    if rule in ("random", "top") and count.isdecimal() and int(count) > 0:
        return Choice("top" if rule == "top" else "random", int(count))
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise UsageError(
            f"--features {text} is none of random:N, top:N, all, or numbers like 1,5,9"
        )
    numbers = tuple(dict.fromkeys(map(int, parts)))
    if max(numbers) >= d_sae:
        raise UsageError(f"--features {text}: there are features 0 to {d_sae - 1}")
    return Choice("these", features=numbers)


@dataclass(frozen=True)
class Findings:
    """What a pass over a corpus found of the features `latents`."""

    latents: Tensor
    """int64 [S]."""
    activity: Activity
    windows: Windows


def look(
    stream: Iterable[Active], latents: Tensor, plan: Plan, t_min: float, t_max: float
) -> Findings:
    """Go through a corpus once; memory holds the windows kept and does not grow with it."""
    activity, windows = Activity(len(latents), t_min, t_max), Windows(latents, plan)
    for active in stream:
        activity.add(active)
        windows.add(active)
    return Findings(latents, activity, windows)


def chosen_slots(findings: Findings, choice: Choice, seed: int) -> list[int]:
    """Slots of the features that get a record, by number; with `top` by how often they fire."""
    activity = findings.activity
    if choice.rule == "these":
        return list(range(len(findings.latents)))
    alive = activity.alive.nonzero().squeeze(1)
    if choice.rule == "top":
        order = activity.count[alive].argsort(descending=True, stable=True)
        return list(map(int, alive[order[: choice.limit]]))
    if choice.rule == "random":
        keys = key_tensor([stream_key(seed, "features")])
        order = uniform(keys, findings.latents[alive]).argsort(stable=True)
        alive = alive[order[: choice.limit]].sort().values
    return list(map(int, alive))
