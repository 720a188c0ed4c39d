"""The algorithms of `update --algo`, each with the recipe that it was published with.

The one table of these constants: `update`, `advantage` and `plan` take their defaults from it, and
their help shows them. Where authors released configurations that differ by task, it is that of
GSM8K, which all of them have; the docstrings of the objectives name the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dlmctl.records.errors import UsageError
from dlmctl.settings.masks import Law

Reinforcement = Literal[
    "rspo", "reinforce", "diffu-grpo", "wd1", "espo", "spg", "gdsd", "vrpo", "grpo", "srpo"
]
"""Algorithms that learn from rewards."""
Algorithm = Literal[Reinforcement, "sft"]
Baseline = Literal["mean", "loo", "none"]
Scale = Literal["none", "group", "batch"]

PROMPTS_PER_STEP = 32
CISPO_BOUND = 5.0
"""`clip_high` of the loss type cispo."""

OPTIONS = {
    "strength": "--lambda",
    "score_norm": "--score-norm",
    "center": "--center",
    "residual_masks": "--residual-masks",
    "loss_type": "--loss-type",
    "clip": "--clip",
    "clip_high": "--clip-high",
    "dual_clip": "--dual-clip",
    "beta": "--beta",
    "psi": "--psi",
    "omega": "--omega",
    "max_length": "--max-length",
}
"""Constants of the losses, by the names of their fields."""


@dataclass(frozen=True)
class Recipe:
    """What an algorithm was published with."""

    constants: Mapping[str, Any] = field(default_factory=dict)
    """Of its loss, by the fields of the objective; None: off, or derived from others."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the objective that it does not leave open."""
    law: Law = "stratified"
    samples: int = 4
    """Masks for each completion."""
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
    needs_masks: bool = False
    """Its loss means nothing for an autoregressive model."""


_PPO = Recipe(
    {
        "loss_type": "dapo",
        "clip": 0.2,
        "clip_high": None,
        "dual_clip": None,
        "beta": 0.0,
        "max_length": None,
    },
    scale="group",
    until_eos=True,
    sampled_old=True,
)
_RSPO = {
    "strength": 0.01,
    "score_norm": "sequence",
    "center": "batch",
    "residual_masks": "shared",
}

RECIPES: Mapping[Algorithm, Recipe] = {
    "rspo": Recipe(_RSPO),
    "reinforce": Recipe(
        {"score_norm": _RSPO["score_norm"]},
        {"strength": 0.0, "center": "batch", "residual_masks": "shared"},
    ),
    "diffu-grpo": Recipe(
        {"clip": 0.5, "beta": 0.04},
        law="full",
        samples=1,
        inner=12,
        until_eos=True,
        prompt_mask=0.15,
    ),
    "wd1": Recipe(law="full", samples=1, inner=12, until_eos=True, prompt_mask=0.15),
    "espo": Recipe(
        {"clip": 0.2, "beta": 1e-3}, law="complementary", samples=4, inner=8, baseline="loo"
    ),
    "spg": Recipe(
        {"beta": 1.5, "omega": 0.5},
        law="block",
        samples=2,
        inner=4,
        until_eos=True,
        prompt_mask=0.15,
    ),
    "gdsd": Recipe(
        {"clip": 4e-4, "beta": 1e-3, "psi": 10.0},
        law="complementary",
        samples=4,
        inner=8,
        baseline="loo",
        needs_masks=True,
    ),
    "vrpo": Recipe({"beta": 0.1}, law="uniform", samples=8),
    "grpo": _PPO,
    "srpo": Recipe(**{**vars(_PPO), "token_weights": True}),
    "sft": Recipe(samples=2),
}


def constants(algo: Algorithm, **given: Any) -> dict[str, Any]:
    """The constants of an algorithm's loss; those given as None have their published values.

    Raises:
        UsageError: the algorithm has no such constant.
    """
    recipe = RECIPES[algo]
    chosen = {name: value for name, value in given.items() if value is not None}
    for name in chosen:
        if name not in recipe.constants:
            own = ", ".join(OPTIONS[name] for name in recipe.constants) or "none"
            raise UsageError(f"{OPTIONS[name]} means nothing to --algo {algo}; it has: {own}")
    return {**recipe.fixed, **recipe.constants, **chosen}


def check_kind(algo: Algorithm, diffusion: bool, model: str) -> None:
    """Raise UsageError if the loss of an algorithm means nothing for this kind of model."""
    if RECIPES[algo].needs_masks and not diffusion:
        others = _listed([name for name, recipe in RECIPES.items() if not recipe.needs_masks])
        raise UsageError(
            f"--algo {algo} trains diffusion models alone: it scores every token under a mask and "
            f"its complement, and {model} is autoregressive; {others} train both"
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
    if words:
        return words[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
