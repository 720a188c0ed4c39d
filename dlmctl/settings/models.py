"""How a model is read and how it is prompted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob
from dlmctl.settings.families import Family, summaries

READING = "Reading the model"
PROMPT = "Prompt"

NAMES = {"family": str, "shift": int, "mask_id": int, "block_length": int}
"""Settings that may follow a model's name, and their types."""


@dataclass(frozen=True)
class Reading:
    """What the config.json of a checkpoint does not say, or says differently.

    It is appended to the name of the model, as in `DIR,family=a2d,mask_id=151669`, so that whatever
    names the model (a record, a run, an adapter) says how to read it.
    """

    PANEL: ClassVar[str] = READING

    family: Family | None = knob(
        None,
        "Family of a checkpoint whose config.json does not say that it denoises. The same as "
        f"MODEL,family=FAMILY. {summaries()}",
        metavar="FAMILY",
        shown_default="as config.json says",
        env=True,
    )
    shift: int | None = knob(
        None,
        "Position i is predicted by the logits at position i - SHIFT. The same as "
        "MODEL,shift=SHIFT.",
        minimum=0,
        maximum=1,
        shown_default="the family's: 1 if its logits stand one position to the left, else 0",
        env=True,
    )
    mask_id: int | None = knob(
        None,
        "Id of the mask token. The same as MODEL,mask_id=ID.",
        metavar="ID",
        minimum=0,
        shown_default="as config.json or the tokenizer says",
        env=True,
    )
    block_length: int | None = None
    """Tokens of a block of a block-causal model; it has no option of its own, as in several
    commands --block-length is the sampler's."""

    def of(self, model: str | None) -> str | None:
        """`name` for a model that may be None.

        Raises:
            UsageError: there is no model to read.
        """
        if model is None and self != Reading():
            raise UsageError("--family, --shift and --mask-id say how to read --model: give it too")
        return None if model is None else self.name(model)

    def name(self, model: str) -> str:
        """The model's name followed by these settings."""
        values = {name: getattr(self, name) for name in NAMES}
        return model + "".join(f",{k}={v}" for k, v in values.items() if v is not None)


def split_name(name: str) -> tuple[str, Reading]:
    """A model's name and the settings that follow it; of two with the same name the last counts.

    Raises:
        UsageError: a setting has no such value.
    """
    values: dict[str, Any] = {}
    while True:
        before, comma, last = name.rpartition(",")
        key, equals, value = last.partition("=")
        if not comma or not equals or key not in NAMES:
            return name, Reading(**values)
        if NAMES[key] is int and not (value.isdecimal() and len(value) <= 9):
            raise UsageError(f"{key}={value} after a model's name is not a whole number")
        values.setdefault(key, NAMES[key](value))
        name = before


@dataclass(frozen=True)
class Prompting:
    """How the prompt of a record becomes the text that a model sees."""

    PANEL: ClassVar[str] = PROMPT

    chat: bool = knob(
        True,
        "Write prompts with the tokenizer's chat template, if it has one, or as they are, for the "
        "model to continue. Without a template only --raw is possible.",
        "--chat/--raw",
        env=True,
    )
    template_arg: list[str] | None = knob(
        None,
        "Argument of the chat template, such as enable_thinking=false; the value is JSON or text. "
        "May be given more than once. A record's field 'chat_template_kwargs' overrides it.",
        metavar="NAME=VALUE",
        shown_default="none",
        env=True,
    )
    prefill: str = knob(
        "",
        "Text that every answer begins with. It counts as part of the prompt: 'completion' is what "
        "the model writes after it.",
        metavar="TEXT",
        shown_default="nothing",
        env=True,
    )

    def __post_init__(self) -> None:
        if self.template_arg and not self.chat:
            raise UsageError("--template-arg is for the chat template, which --raw leaves out")
        self.template_args  # noqa: B018 (raises)

    @cached_property
    def template_args(self) -> dict[str, Any]:
        """Arguments of the template by name."""
        arguments = {}
        for text in self.template_arg or ():
            name, equals, value = text.partition("=")
            if not equals or not name.isidentifier():
                raise UsageError(f"--template-arg {text} is not NAME=VALUE")
            try:
                arguments[name] = json.loads(value)
            except ValueError:
                arguments[name] = value
        return arguments
