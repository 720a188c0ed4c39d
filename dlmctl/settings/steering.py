"""How sampling is steered by features of autoencoders, and how the result is scored."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob

Scope = Literal["all", "update", "topk"]
Unit = Literal["activation", "norm"]

STEERING, CONCEPT, FLUENCY = "Steering", "Concept", "Fluency"


class SteeredFeature(NamedTuple):
    """A feature and how far to go in its direction."""

    sae: str
    """Folder of the autoencoder."""
    layer: int | None
    """Block whose output is changed, counted from 0; None: the one that the folder names."""
    feature: int
    amplitude: float


@dataclass(frozen=True)
class Steering:
    """Which features are steered, at which positions and when; none by default.

    Raises:
        UsageError: an option is malformed, or says how to steer while nothing is steered.
    """

    PANEL: ClassVar[str] = STEERING

    steer: list[str] | None = knob(
        None,
        "Add the direction of a feature to the residual stream in every pass, multiplied by "
        "AMPLITUDE in the unit of --steer-unit. SAE is a folder from any of the libraries that "
        "sae-convert reads, LAYER the block (counted from 0) if the folder does not name it; "
        "repeatable.",
        metavar="SAE[@LAYER]:FEATURE=AMPLITUDE",
        shown_default="off",
    )
    steer_scope: Scope | None = knob(
        None,
        "Steer all positions of a pass (all), those still masked (update; for an autoregressive "
        "model the newest), or the three in each row at which the pre-activation of the feature "
        "is largest (topk).",
        shown_default="all",
    )
    steer_unit: Unit | None = knob(
        None,
        "What AMPLITUDE counts: the largest activation at the position (activation, as published), "
        "or the norm of the residual stream at the position (norm), which makes the amplitudes of "
        "two models comparable.",
        shown_default="activation",
    )
    steer_time: str | None = knob(
        None,
        "Steer only while the share of the completion that is masked is above LO and at most HI: "
        "0.5-1 is the first half of the tokens.",
        metavar="LO-HI",
        shown_default="always",
    )

    def __post_init__(self) -> None:
        self.features, self.time  # noqa: B018 (they raise)
        if not self.steer and (self.steer_scope or self.steer_time or self.steer_unit):
            raise UsageError(
                "--steer-scope, --steer-unit and --steer-time say how to steer: give --steer too"
            )

    @cached_property
    def features(self) -> list[SteeredFeature]:
        """What `steer` says, parsed."""
        return [_feature(text) for text in self.steer or ()]

    @property
    def scope(self) -> Scope:
        """`steer_scope` or its default."""
        return self.steer_scope or "all"

    @property
    def unit(self) -> Unit:
        """`steer_unit` or its default."""
        return self.steer_unit or "activation"

    @cached_property
    def time(self) -> tuple[float, float] | None:
        """`steer_time`, parsed: steer while LO < masked share <= HI, so that adjoining ranges have
        no step in common; None is always."""
        if not self.steer_time:
            return None
        low_text, _, high_text = self.steer_time.partition("-")
        try:
            low, high = float(low_text), float(high_text)
        except ValueError:
            raise UsageError(f"--steer-time {self.steer_time} is not LO-HI, as 0.5-1") from None
        if not 0 <= low < high <= 1:
            raise UsageError("--steer-time is LO-HI with 0 <= LO < HI <= 1")
        return low, high


def _feature(text: str) -> SteeredFeature:
    """Parse `SAE[@LAYER]:FEATURE=AMPLITUDE`; raises UsageError."""
    match = re.fullmatch(r"(.+?)(?:@(\d+))?:(\d+)=([^=]+)", text)
    try:
        if match is None:
            raise ValueError
        sae, layer, feature, amplitude = match.groups()
        return SteeredFeature(
            sae, None if layer is None else int(layer), int(feature), float(amplitude)
        )
    except ValueError:
        raise UsageError(f"--steer {text} is not SAE[@LAYER]:FEATURE=AMPLITUDE") from None


@dataclass(frozen=True)
class ConceptScores:
    """Where the scores come from that say how strongly a text expresses a concept, 0 to 100.

    Raises:
        UsageError: the options contradict each other, or the judge has no concept to look for.
    """

    PANEL: ClassVar[str] = CONCEPT

    concept_from: Literal["judge", "reward", "score"] = knob(
        "judge",
        "How strongly a text expresses the concept: as a judge says, as the records' field reward "
        "says (0 to 1, from 'dlmctl verify'), or as their field score says (0 to 100).",
    )
    concept: str | None = knob(
        None, "What the judge looks for.", metavar="TEXT", shown_default="none"
    )
    concepts: str | None = knob(
        None,
        "What the judge looks for, by feature: records with feature and explanation, and with sae "
        "and layer if the number alone is ambiguous.",
        metavar="FILE",
        shown_default="none",
    )
    judge: str | None = knob(
        None, "Model that judges, greedily.", metavar="MODEL", shown_default="none"
    )
    judge_length: int = knob(16, "Tokens of an answer of --judge.", minimum=1)
    judge_prompts: str | None = knob(
        None,
        "Write the questions as prompt records and nothing else, for 'dlmctl rollout -n 1 "
        "--temperature 0' or any other program; with --judge, write its answers too and score.",
        metavar="FILE",
        shown_default="none",
    )
    judge_answers: str | None = knob(
        None,
        "Read the answers to the questions (judged and completion), or scores of any origin: id, "
        "sample, score (0 to 100), and whichever of sae, layer, feature, amplitude, scope, time "
        "tell texts apart; a record without amplitude is about an unsteered text.",
        metavar="FILE",
        shown_default="none",
    )

    def __post_init__(self) -> None:
        asks = self.judge is not None or self.judge_prompts is not None
        answered = self.judge_answers is not None
        if asks and answered:
            raise UsageError(
                "answers come from --judge-answers or from a judge asked now, not both"
            )
        if self.judge is not None and self.judge_prompts == "-":
            raise UsageError("standard output has the scores: give --judge-prompts a file")
        if (asks or answered) and self.concept_from != "judge":
            raise UsageError(
                f"--concept-from {self.concept_from} needs no judge: leave one of them out"
            )
        if (self.concept is None) == (self.concepts is None) and (asks or self.concept is not None):
            raise UsageError(
                "what the judge is to look for comes from --concept or from --concepts"
            )


@dataclass(frozen=True)
class FluencyScores:
    """Where perplexities come from; nowhere by default.

    Raises:
        UsageError: they come from two places.
    """

    PANEL: ClassVar[str] = FLUENCY

    fluency: str | None = knob(
        None,
        "Perplexities under this model: exact for an autoregressive model, an upper bound from "
        "the ELBO for a diffusion model.",
        metavar="MODEL",
        shown_default="none",
    )
    fluency_tokens: int = knob(
        512,
        "With --fluency: number of tokens at the beginning of a text that are scored.",
        minimum=2,
    )
    masks: int = knob(
        16,
        "With --fluency: masks per text for a diffusion model.",
        "-k",
        "--masks-per-sample",
        minimum=2,
    )
    perplexity: str | None = knob(
        None,
        "Field of the records that contains their perplexity, instead of --fluency.",
        metavar="FIELD",
        shown_default="none",
    )

    def __post_init__(self) -> None:
        if self.fluency is not None and self.perplexity is not None:
            raise UsageError("perplexities come from --fluency or from --perplexity: give one")
