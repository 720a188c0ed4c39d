"""How features of autoencoders are measured against known concepts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob
from dlmctl.settings.parsing import whole_numbers

Measure = Literal["single", "sparse", "tpp", "scr", "output"]
Choose = Literal["auroc", "output", "both"]
ValueWords = Literal["corpus", "task"]


@dataclass(frozen=True)
class Probing:
    """What is measured, on which concepts, and how features are chosen.

    Raises:
        UsageError: a list is malformed, or a concept is named twice.
    """

    PANEL: ClassVar[str] = "Measure"

    measure: Measure = knob(
        "single",
        "single: AUROC of the best feature. sparse: logistic regression on the --top latents with "
        "the largest difference of means. tpp: how much ablating the latents of a value hurts the "
        "probe of this value and no other. scr: how much ablating the latents of a concept rids a "
        "probe of it that was trained where two concepts coincide. output: how much a step along "
        "a feature raises the probability of a value's words.",
    )
    concept: list[str] | None = knob(
        None,
        "Measure this concept, and of its values these; repeatable. scr takes the first two values "
        "of each.",
        metavar="NAME[=VALUE,…]",
        shown_default="all",
    )
    top: str = knob(
        "1,2,5,20", "sparse, tpp and scr: numbers of latents that are chosen.", metavar="N,…"
    )
    choose: Choose = knob(
        "both",
        "output: choose the feature of a value by its AUROC, or by its effect on the probability "
        "of the words. both writes a row for each.",
    )
    candidates: int = knob(
        8,
        "output: measure this many features of each value, those with the largest effect by its "
        "gradient. As many as there are latents leaves nothing to the gradient.",
        minimum=1,
    )
    amplitude: float = knob(
        1.0, "output: length of the step, as of 'dlmctl rollout --steer SAE:FEATURE=AMPLITUDE'."
    )
    words: ValueWords = knob(
        "corpus",
        "output: which words express a value. corpus: tokens that occur in sentences with the "
        "value and hardly ever in others; task: those of them that are within an expression which "
        "the task of the records (concepts) has for the value.",
    )

    def __post_init__(self) -> None:
        self.sizes, self.wanted  # noqa: B018 (they raise)
        if self.amplitude == 0:
            raise UsageError("--amplitude 0 is no step")

    @cached_property
    def sizes(self) -> list[int]:
        """`top`, parsed, ascending."""
        return sorted(set(whole_numbers("--top", self.top)))

    @cached_property
    def wanted(self) -> dict[str, list[str]]:
        """`concept`, parsed: values by concept, none for all of them; empty for all concepts."""
        wanted: dict[str, list[str]] = {}
        for text in self.concept or ():
            name, equals, values = text.partition("=")
            parts = values.split(",") if equals else []
            if not name or not all(parts) or name in wanted:
                raise UsageError(f"--concept {text} is not NAME[=VALUE,…], or names it twice")
            wanted[name] = parts
        return wanted
