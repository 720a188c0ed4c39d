"""How completions are sampled, under the names of the code of LLaDA, Fast-dLLM and Dream."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob, knob_of

Remasking = Literal["low_confidence", "random", "entropy", "margin", "sae"]
Schedule = Literal["even", "timesteps", "rounded"]
Distribution = Literal["model", "sampled"]
EosRule = Literal["normal", "late", "never"]
CacheRule = Literal["none", "prefix", "dual", "exact"]

SURE: tuple[Remasking, ...] = ("low_confidence", "margin")
"""Rules whose confidence says how sure the model is, between 0 and 1."""
BETWEEN_0_AND_1: tuple[Remasking, ...] = (*SURE, "random", "sae")
"""All rules whose confidence is between 0 and 1."""


def own(otherwise: str) -> str:
    """What help says of a default that a model may have for itself."""
    return f"the model's own, else {otherwise}"


@dataclass(frozen=True)
class Sampler:
    """Options of the sampler; those that are None are the model's own, else LLaDA's."""

    PANEL: ClassVar[str] = "Sampler"

    gen_length: int | None = knob(
        None, "Tokens of a completion.", minimum=1, shown_default=own("128")
    )
    block_length: int | None = knob(
        None,
        "Tokens of a block. Blocks are decided from left to right; the last may be shorter.",
        minimum=1,
        shown_default=own("32"),
    )
    steps: int | None = knob(
        None,
        "Denoising steps over all blocks; --schedule says how many tokens each decides, with "
        "--threshold at least. Without --steps, a block takes as many as --threshold or --factor "
        "needs.",
        minimum=1,
        shown_default=own("--gen-length"),
    )
    temperature: float = knob(
        0.0,
        "0 is greedy; above 0, exact Gumbel-max sampling. Training scores completions at "
        "temperature 1, so that other temperatures sample off-policy.",
        minimum=0.0,
    )
    top_p: float | None = knob(
        None,
        "Sample from the fewest most probable tokens that have more than this probability, after "
        "--temperature.",
        minimum=0.0,
        maximum=1.0,
        shown_default=own("1, which is off"),
    )
    top_k: int | None = knob(
        None,
        "Sample from this many most probable tokens, after --top-p.",
        minimum=0,
        shown_default=own("0, which is off"),
    )
    cfg_scale: float | None = knob(
        None,
        "Classifier-free guidance, two passes a step; 0 is off.",
        minimum=0.0,
        shown_default=own("0"),
    )
    schedule: Schedule | None = knob(
        None,
        "How many tokens a step decides: equally many (even); or, as in Dream, int(m (1 - s/t)) of "
        "m masked ones from time t to s, as time falls evenly from 1 to 0.001, and all in the last "
        "step (timesteps); or, as in dllm, m (1 - s/t) rounded, as time falls to 0 (rounded). "
        "timesteps with --remasking random decides each with probability 1 - s/t, which is Dream's "
        "origin.",
        shown_default=own("even"),
    )
    remasking: Remasking | None = knob(
        None,
        "Which tokens are masked again: how confidence is measured. In Dream low_confidence is "
        "called maskgit_plus, and margin topk_margin. sae is our own experiment: confidence times "
        "how little the features of --sae change.",
        shown_default=own("low_confidence"),
    )
    confidence_of: Distribution | None = knob(
        None,
        "The distribution whose confidence it is: the model's, at temperature 1, as in LLaDA; or "
        "the one that tokens are sampled from, after --temperature, --top-p and --top-k, as in "
        "Dream.",
        shown_default=own("model"),
    )
    alg_temp: float | None = knob(
        None,
        "Draw which tokens stay, without replacement, with probabilities softmax(confidence / "
        "this), as in Dream; 0 takes the most confident.",
        minimum=0.0,
        shown_default=own("0"),
    )
    threshold: float | None = knob(
        None,
        "Parallel decoding as in Fast-dLLM: each step keeps every token with at least this "
        "confidence, and always the most confident one, until the block is done.",
        minimum=0.0,
        maximum=1.0,
        shown_default=own("off"),
    )
    factor: float | None = knob(
        None,
        "Parallel decoding as in Fast-dLLM: each step keeps the n most confident tokens, at least "
        "one, for the largest n with (n + 1)(1 - confidence of the n-th) at most this; the last "
        "masked token of a block is decided with the others.",
        minimum=0.0,
        shown_default=own("off"),
    )
    sub_block_length: int | None = knob(
        None,
        "Decide a block in parts of this many tokens, from left to right (the small block of "
        "Fast-dLLM v2).",
        minimum=1,
        shown_default=own("the block"),
    )
    edit_threshold: float | None = knob(
        None,
        "Editing as in LLaDA2.1, for block-causal models: each step also predicts the decided "
        "tokens of its block, and replaces one by another whose confidence is above this.",
        minimum=0.0,
        maximum=1.0,
        shown_default=own("1, which is off"),
    )
    edit_steps: int | None = knob(
        None,
        "With --edit-threshold: the most steps that a block takes once nothing in it is masked; it "
        "ends before if a step changes nothing.",
        minimum=0,
        shown_default=own("16"),
    )
    cache: CacheRule | None = knob(
        None,
        "Take keys and values from an earlier step. Of a block-causal model those of finished "
        "blocks never change (exact). Of others they do, so that it is an approximation: of the "
        "tokens before the block (prefix), or of all tokens outside it (dual).",
        shown_default="exact for a block-causal model, else none",
    )
    refresh: int | None = knob(
        None,
        "With --cache: steps between two passes over the whole sequence, which renew it.",
        minimum=1,
        shown_default="at each block's start",
    )
    refresh_below: float = knob(
        0.0,
        "With --cache: if the most confident token of a step is below this, renew the cache and "
        "take the step again.",
        minimum=0.0,
        maximum=1.0,
        shown_default="0, which is off",
    )
    eos: EosRule | None = knob(
        None,
        "End-of-sequence: like any token (normal); decided last in its block, and with it LLaDA's "
        "end of a turn (late); or not sampled at all (never).",
        shown_default=own("normal"),
    )
    early_stop: bool | None = knob(
        None,
        "End a completion when a finished block contains end-of-sequence.",
        "--early-stop/--full-length",
        shown_default=own("full-length"),
    )
    compile: bool = knob(
        False,
        "Run the model's layers through torch.compile, with --cache their norms and MLPs: the same "
        "up to rounding, and faster once it is compiled, which takes half a minute.",
        "--compile",
    )

    def __post_init__(self) -> None:
        if self.threshold is not None and self.factor is not None:
            raise UsageError("--threshold and --factor are two rules for one thing: give one")
        if self.factor is not None and self.steps is not None:
            raise UsageError(
                "--steps is a fixed number of steps, and --factor takes as many as each block "
                "needs: leave one of them out"
            )
        if self.sub_block_length is not None and self.steps is not None:
            raise UsageError(
                "--steps is a fixed number of steps, and with --sub-block-length a block takes as "
                "many as its parts need: leave one of them out"
            )
        unscheduled = self.parallel or self.sub_block_length is not None
        if self.schedule not in (None, "even") and unscheduled:
            bounds = {"--factor": self.factor, "--threshold": self.threshold}
            rule = next((name for name, value in bounds.items() if value is not None), None)
            rule = rule or "--sub-block-length"
            raise UsageError(
                f"--schedule says how many tokens a step decides, and so does {rule}: leave one "
                f"of them out"
            )
        if self.alg_temp:
            self._check_alg_temp()
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p} is no probability, from 0 to 1")
        if self.top_k is not None and self.top_k < 0:
            raise UsageError(f"--top-k {self.top_k} is less than 0")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UsageError(f"--threshold {self.threshold} is no confidence, from 0 to 1")
        if self.edit_threshold is not None and not 0 <= self.edit_threshold <= 1:
            raise UsageError(
                f"--edit-threshold {self.edit_threshold} is no confidence, from 0 to 1"
            )
        if self.factor is not None and not self.factor >= 0:
            raise UsageError(f"--factor {self.factor} is not 0 or more")
        if self.refresh is not None and not self.approximate:
            raise UsageError("--refresh says how long a cache is used: give --cache too")
        if self.refresh_below > 0 and not self.approximate:
            raise UsageError("--refresh-below says when a cache is too old: give --cache too")
        for option, given, rules in (
            ("--threshold", self.threshold is not None, BETWEEN_0_AND_1),
            ("--factor", self.factor is not None, BETWEEN_0_AND_1),
            ("--edit-threshold", self.editing, SURE),
            ("--refresh-below", self.refresh_below > 0, SURE),
        ):
            if given and self.remasking is not None and self.remasking not in rules:
                raise UsageError(
                    f"{option} compares a confidence between 0 and 1, and that of --remasking "
                    f"{self.remasking} is none: take {' or '.join(rules)}"
                )
        if self.cfg_scale and self.cached:
            raise UsageError("--cfg-scale and --cache do not go together: leave one out")

    def _check_alg_temp(self) -> None:
        """Refuse an alg_temp other than 0 with what does not take the most confident tokens."""
        if not 0 < (self.alg_temp or 0) < math.inf:
            raise UsageError(f"--alg-temp {self.alg_temp} is no temperature, 0 or more")
        if self.parallel:
            rule = "--threshold" if self.factor is None else "--factor"
            raise UsageError(
                f"--alg-temp draws a number of tokens, and {rule} compares each with a bound: "
                f"leave one of them out"
            )
        if self.remasking == "random":
            raise UsageError(
                "--alg-temp draws tokens by their confidence, and --remasking random has none: "
                "leave one of them out"
            )

    @property
    def cached(self) -> bool:
        """Whether keys and values of an earlier step are used."""
        return self.cache not in (None, "none")

    @property
    def approximate(self) -> bool:
        """Whether they may be old."""
        return self.cache in ("prefix", "dual")

    @property
    def editing(self) -> bool:
        """Whether decided tokens may be replaced."""
        return self.edit_threshold is not None and self.edit_threshold < 1

    @property
    def parallel(self) -> bool:
        """Whether the confidence says how many tokens a step decides."""
        return self.threshold is not None or self.factor is not None


SAMPLED = Sampler(temperature=1.0)
"""What `rollout` does if nothing is said, and so what is planned and measured."""

OWN: tuple[str, ...] = tuple(
    field.name
    for field in fields(Sampler)
    if field.default is None and field.name not in ("cache", "refresh")
)
"""Options that a model may have for itself, in the object `sampling`."""


def check_own(sampling: Mapping[str, Any]) -> None:
    """Raise ValueError if the object `sampling` of a model has values that are not of their kind.

    Its names are those of `Sampler`; only block_length may be None, for the whole length.
    """
    kinds = get_type_hints(Sampler)
    for name, value in sampling.items():
        if name not in OWN:
            raise ValueError(f"sampling has no {name[:80]}; there are {', '.join(OWN)}")
        kind = _kind(kinds[name])
        if value is None and name == "block_length":
            continue
        if choices := get_args(kind):
            fits, wanted = value in choices, f"one of {', '.join(choices)}"
        elif kind is bool:
            fits, wanted = type(value) is bool, "true or false"
        elif kind is float:
            fits = type(value) in (int, float) and 0 <= value < 2**31
            wanted = "a number, 0 or more"
        else:
            fits, wanted = type(value) is int and 0 <= value < 2**31, "a whole number"
        if not fits:
            raise ValueError(f"sampling.{name} is not {wanted}")


def changed(sampler: Sampler, name: str, text: str) -> Sampler:
    """The options with another value of one, as --NAME takes it; empty text is the default.

    Raises:
        UsageError: there is no such option or value, or it contradicts another option.
    """
    known = {field.name: field for field in fields(Sampler)}
    name = name.lstrip("-").replace("-", "_")
    if name not in known:
        options = ", ".join(field.replace("_", "-") for field in known)
        raise UsageError(f"the sampler has no option {name}; there are {options}")
    value = _value(known[name], text) if text else getattr(SAMPLED, name)
    return replace(sampler, **{name: value})


def _value(field: Field[Any], text: str) -> Any:
    """The value of an option; raises UsageError for one that is out of its bounds."""
    about, kind = knob_of(field, Sampler), _kind(get_type_hints(Sampler)[field.name])
    if kind is bool:
        choices: Mapping[str, Any] = {"true": True, "false": False}
    else:
        choices = {choice: choice for choice in get_args(kind)}
    low = -math.inf if about.minimum is None else about.minimum
    high = math.inf if about.maximum is None else about.maximum
    wanted = f"one of {', '.join(choices)}"
    if text in choices:
        return choices[text]
    if not choices:
        wanted = "a whole number" if kind is int else "a number"
        wanted += f", at least {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low <= value <= high:
            return value
    raise UsageError(f"{about.flag(field.name)} {text}: it is {wanted}")


def _kind(hint: Any) -> Any:
    """The type of an option, which may also be None."""
    return next((part for part in get_args(hint) if part is not type(None)), hint)
