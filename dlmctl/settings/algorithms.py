"""The algorithms of `update --algo`: their objectives, constants and published recipes.

The one table of them: `update`, `advantage` and `plan` take their defaults from it, and their help
shows them. If authors released configurations that differ by task, the recipe is that of GSM8K,
which all of them have; the docstrings of the objectives name the others. A new algorithm is a row
here, its name in `Reinforcement`, and a module of `dlmctl.rl.objectives`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dlmctl.records.errors import UsageError
from dlmctl.settings.mask_laws import ALL, Law

Reinforcement = Literal[
    "rspo",
    "reinforce",
    "diffu-grpo",
    "wd1",
    "espo",
    "spg",
    "gdsd",
    "vrpo",
    "grpo",
    "srpo",
    "tracerl",
    "justgrpo",
    "coupled-grpo",
    "d2",
    "gdpo",
    "bgpo",
]
"""Algorithms that learn from rewards."""
Algorithm = Literal[Reinforcement, "sft"]
Baseline = Literal["mean", "loo", "none"]
Scale = Literal["none", "group", "zscore", "batch"]

PROMPTS_PER_STEP = 32
CISPO_BOUND = 5.0
"""`clip_high` of the loss type cispo."""


@dataclass(frozen=True)
class Recipe:
    """What an algorithm was published with."""

    summary: str
    """What help says of it."""
    objective: str | None = None
    """Its class, as `module:Class` within `dlmctl.rl.objectives`; None is likelihood."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Of its loss, by the fields of the objective; None: off, or derived from others."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the objective that it does not leave open."""
    law: Law = "stratified"
    samples: int = 4
    """Masks for each completion; `ALL`: every one that an ordered law has."""
    shrink: int = 1
    """Steps of the sampler that are one mask, under the law `trajectory`."""
    inner: int = 1
    """Steps on a batch, each with masks of its own."""
    baseline: Baseline = "mean"
    scale: Scale = "none"
    until_eos: bool = False
    prompt_mask: float = 0.0
    """Share of the prompt that is masked and, under the law `block`, of the blocks before."""
    token_weights: bool = False
    """The records have a weight for each token."""
    sampled_old: bool = False
    """The old policy of an autoregressive model is what `rollout` recorded of it, where it did."""
    drop_zero_adv: bool = False
    """Completions with advantage 0 are left out."""
    left_to_right: bool = False
    """The completions were sampled one token after the other."""
    needs_masks: str = ""
    """Why its loss means nothing for an autoregressive model; empty if it means something."""


_PPO = {
    "loss_type": "dapo",
    "clip": 0.2,
    "clip_high": None,
    "dual_clip": None,
    "beta": 0.0,
    "max_length": None,
}
_RSPO = {"strength": 0.01, "score_norm": "sequence", "center": "batch", "residual_masks": "shared"}

RECIPES: Mapping[Algorithm, Recipe] = {
    "rspo": Recipe("residual feedback towards a target log-ratio", "rspo:Rspo", _RSPO),
    "reinforce": Recipe(
        "rspo with lambda 0",
        "rspo:Rspo",
        {"score_norm": _RSPO["score_norm"]},
        {"strength": 0.0, "center": "batch", "residual_masks": "shared"},
    ),
    "diffu-grpo": Recipe(
        "that of d1",
        "diffu_grpo:DiffuGrpo",
        {"clip": 0.5, "beta": 0.04},
        law="full",
        samples=1,
        inner=12,
        until_eos=True,
        prompt_mask=0.15,
    ),
    "wd1": Recipe(
        "weighted likelihood without ratios",
        "wd1:Wd1",
        law="full",
        samples=1,
        inner=12,
        until_eos=True,
        prompt_mask=0.15,
    ),
    "espo": Recipe(
        "ratios of whole sequences by the ELBO",
        "espo:Espo",
        {"clip": 0.2, "beta": 1e-3},
        law="complementary",
        samples=4,
        inner=8,
        baseline="loo",
    ),
    "spg": Recipe(
        "lower and upper bounds of the likelihood",
        "spg:Spg",
        {"beta": 1.5, "omega": 0.5},
        law="block",
        samples=2,
        inner=4,
        until_eos=True,
        prompt_mask=0.15,
    ),
    "gdsd": Recipe(
        "the advantage as a target of the log-ratio, for diffusion models alone",
        "gdsd:Gdsd",
        {"clip": 4e-4, "beta": 1e-3, "psi": 10.0},
        law="complementary",
        samples=4,
        inner=8,
        baseline="loo",
        needs_masks="it scores every token under a mask and its complement",
    ),
    "vrpo": Recipe("preferences by the ELBO", "vrpo:Vrpo", {"beta": 0.1}, law="uniform", samples=8),
    "grpo": Recipe(
        "PPO's clip on every token: as in TRL for autoregressive models, with the masks of the "
        "ELBO for diffusion models",
        "grpo:Grpo",
        _PPO,
        scale="group",
        until_eos=True,
        sampled_old=True,
    ),
    "srpo": Recipe(
        "grpo with the advantage weighted token by token, by the weights of the records "
        "(implements the mechanism described in the abstract of arXiv 2605.07274; constants are "
        "ours)",
        "grpo:Srpo",
        _PPO,
        scale="group",
        until_eos=True,
        sampled_old=True,
        token_weights=True,
    ),
    "tracerl": Recipe(
        "PPO's clip on the steps that the sampler took",
        "tracerl:TraceRl",
        {"clip": 0.2, "beta": 0.01},
        law="trajectory",
        samples=ALL,
        shrink=8,
        scale="zscore",
        until_eos=True,
        drop_zero_adv=True,
        needs_masks="it scores the steps that denoised a completion",
    ),
    "justgrpo": Recipe(
        "grpo on the exact likelihood from left to right, for completions that were sampled in "
        "this order (rollout --block-length 1)",
        "justgrpo:JustGrpo",
        {**_PPO, "loss_type": "dr_grpo"},
        law="left-to-right",
        samples=ALL,
        scale="group",
        sampled_old=True,
        drop_zero_adv=True,
        left_to_right=True,
    ),
    "coupled-grpo": Recipe(
        "that of DiffuCoder, the score of a token from a full mask and a complementary pair",
        "coupled_grpo:CoupledGrpo",
        {"clip": 0.5, "beta": 0.01},
        law="coupled",
        samples=3,
        inner=2,
        baseline="loo",
        until_eos=True,
    ),
    "d2": Recipe(
        "diffu-grpo on segments of the steps that the sampler took (StepMerge)",
        "d2:D2",
        {"clip": 0.5, "beta": 0.04},
        law="trajectory",
        samples=ALL,
        shrink=16,
        inner=12,
        until_eos=True,
        prompt_mask=0.15,
        needs_masks="it scores the steps that denoised a completion",
    ),
    "gdpo": Recipe(
        "ratios of whole sequences by the ELBO at quadrature nodes",
        "gdpo:Gdpo",
        {"clip": 0.5, "beta": 0.0},
        law="quadrature",
        samples=3,
        inner=12,
    ),
    "bgpo": Recipe(
        "a ratio for each mask, a lower bound of PPO's objective",
        "bgpo:Bgpo",
        {"clip": 0.2, "dual_clip": 3.0},
        law="uniform",
        samples=16,
        scale="group",
        until_eos=True,
    ),
    "sft": Recipe("masked cross-entropy on the given completions", samples=2),
}


def check_kind(algo: Algorithm, diffusion: bool, model: str) -> None:
    """Raise UsageError if the loss of an algorithm means nothing for this kind of model."""
    reason = RECIPES[algo].needs_masks
    if reason and not diffusion:
        others = _listed([name for name, recipe in RECIPES.items() if not recipe.needs_masks])
        raise UsageError(
            f"--algo {algo} trains diffusion models alone: {reason}, and {model} is "
            f"autoregressive; {others} train both"
        )


def defaults(name: str, words: Mapping[Any, str] | None = None) -> str:
    """What an option is by default for each algorithm, as help shows it.

    `others` are those that share the commonest value of an option that all algorithms have.

    Args:
        name: a field of `Recipe`, or one of its constants.
        words: how the values are written, if not as they are.
    """
    values: dict[str, Any] = {}
    for algo, recipe in RECIPES.items():
        value = getattr(recipe, name, recipe.constants.get(name))
        if value is not None:
            values[algo] = value
    [(common, _)] = Counter(values.values()).most_common(1)
    rest = "others" if len(values) == len(RECIPES) else None
    parts = [
        f"{_listed([a for a in values if values[a] == value])} {_written(value, words)}"
        for value in dict.fromkeys(values.values())
        if not (rest and value == common)
    ]
    return ", ".join([*parts, f"{rest} {_written(common, words)}"] if rest else parts)


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _written(value: Any, words: Mapping[Any, str] | None) -> str:
    if words and value in words:
        return words[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
