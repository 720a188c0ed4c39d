"""Which masks a completion is scored under."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob
from dlmctl.settings.algorithms import defaults
from dlmctl.settings.mask_laws import ALL, Law
from dlmctl.settings.parsing import level_range

MASKS = "Masks"


@dataclass(frozen=True)
class Masks:
    """Options of the masks; what is None is as the algorithm was published."""

    PANEL: ClassVar[str] = MASKS

    law: Law | None = knob(
        None,
        "Distribution of the masks. Unbiased for the ELBO: independent levels t ~ U(0,1); a "
        "uniform number of masks with weight L/l; complementary pairs, which score every token "
        "once, with levels spread evenly over the samples of a prompt; stratified, such pairs with "
        "levels spread over the masks of a completion too. Others: quadrature, at Gauss nodes in "
        "t; block, one block in part and the blocks after it whole; full, everything masked; "
        "coupled, everything, a random part and its complement. Exact: trajectory, at every step "
        "of the sampler what was still masked, as 'dlmctl rollout' recorded it; left-to-right, the "
        "same for one token after the other.",
        "--masks",
        metavar="LAW",
        shown_default=defaults("law"),
    )
    samples: int | None = knob(
        None,
        "Masks for each completion; for trajectory and left-to-right a random choice of theirs, "
        "instead of all.",
        "-k",
        "--masks-per-sample",
        minimum=1,
        shown_default=defaults("samples", {ALL: "all"}),
    )
    shrink: int | None = knob(
        None,
        "Neighbouring steps of the sampler that are one mask, with --masks trajectory. Above 1 it "
        "is faster, and no longer exact.",
        minimum=1,
        shown_default=defaults("shrink"),
    )
    prompt_mask: float | None = knob(
        None,
        "Probability that a token of the prompt is masked as well; with block also a token of the "
        "blocks before.",
        minimum=0.0,
        maximum=1.0,
        shown_default=defaults("prompt_mask"),
    )
    block_length: int | None = knob(
        None,
        "Length of a block, with --masks block.",
        "--mask-block",
        minimum=1,
        shown_default="the model's own, else 32",
    )
    until_eos: bool | None = knob(
        None,
        "Score tokens up to the first end-of-sequence, or the whole completion.",
        "--until-eos/--all-tokens",
        shown_default=defaults("until_eos", {True: "until-eos", False: "all-tokens"}),
    )


@dataclass(frozen=True)
class Fill:
    """How far completions are filled with end-of-sequence: to a length, or to a multiple of it."""

    length: int
    multiple: bool = False

    HELP: ClassVar[str] = (
        "Fill completions with end-of-sequence up to N tokens; with xN up to a multiple of N, with "
        "at least one."
    )
    FORM: ClassVar[str] = "N or xN"

    @classmethod
    def read(cls, text: str | None) -> Fill | None:
        """The filling that an option asks for.

        Raises:
            UsageError: it is none.
        """
        if text is None:
            return None
        multiple, _, length = text.rpartition("x")
        if multiple or not length.isdecimal() or not 1 <= int(length) <= 10**6:
            raise UsageError(f"--fill-to {text} is neither a number of tokens nor one such as x16")
        return cls(int(length), text.startswith("x"))

    def room(self, tokens: int) -> int:
        """Tokens that a completion of `tokens` lacks; negative if it does not fit."""
        return self.length - (tokens % self.length if self.multiple else tokens)


@dataclass(frozen=True)
class Supervised:
    """What supervised fine-tuning alone has."""

    PANEL: ClassVar[str] = MASKS

    level: str | None = knob(
        None,
        "For sft: range of the share of masked tokens; the masks are independent, or those of "
        "--masks quadrature.",
        "--t",
        metavar="T or T-T",
        shown_default="0-1",
    )
    fill_to: str | None = knob(
        None,
        f"{Fill.HELP} For an autoregressive model it is one, if the completion fits. For sft and "
        "the preferences of vrpo.",
        metavar=Fill.FORM,
        shown_default="off",
    )
    anneal_attention: int | None = knob(
        None,
        "For sft of a model that read from left to right: let it see later tokens bit by bit, all "
        "of them from this step of the run on, as DiffuLLaMA does.",
        minimum=1,
        metavar="STEPS",
        shown_default="off: all from the first",
    )

    def __post_init__(self) -> None:
        Fill.read(self.fill_to)  # raises

    @property
    def filling(self) -> Fill | None:
        """What `fill_to` says."""
        return Fill.read(self.fill_to)

    @property
    def levels(self) -> tuple[float, float]:
        """Range of t.

        Raises:
            UsageError: it is none.
        """
        if self.level is None:
            return 0.0, 1.0
        low, high = level_range(self.level)
        if not 0 <= low <= high <= 1 or not high:
            raise UsageError(f"--t {self.level} is not a range of shares between 0 and 1")
        return low, high
