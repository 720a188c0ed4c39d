"""How a model is read, and how it is prompted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob

Family = Literal["llada", "dream", "a2d", "mlm", "ar", "vlm"]

READING = "Reading the model"
PROMPT = "Prompt"

NAMES = {"family": str, "shift": int, "mask_id": int}
"""What may stand behind a model's name, and its type."""


@dataclass(frozen=True)
class Reading:
    """What config.json of a checkpoint does not say, or says otherwise.

    It stands behind the name of the model, as in `DIR,family=a2d,mask_id=151669`, so that whatever
    names the model (a record, a run, an adapter) says how to read it.
    """

    family: Family | None = knob(
        None,
        "Family of a checkpoint whose config.json does not say that it denoises: llada and a2d "
        "attend in both directions, dream too, with its logits one position to the left; mlm is a "
        "masked language model, ar goes from left to right. The same as MODEL,family=FAMILY.",
        panel=READING,
        shown_default="as config.json says",
        env=True,
    )
    shift: int | None = knob(
        None,
        "Position i is predicted by the logits at position i - SHIFT. The same as "
        "MODEL,shift=SHIFT.",
        panel=READING,
        minimum=0,
        maximum=1,
        shown_default="1 for ar and dream, else 0",
        env=True,
    )
    mask_id: int | None = knob(
        None,
        "Id of the mask token. The same as MODEL,mask_id=ID.",
        panel=READING,
        metavar="ID",
        minimum=0,
        shown_default="as config.json or the tokenizer says",
        env=True,
    )

    def of(self, model: str | None) -> str | None:
        """`name` of an option that may be left out.

        Raises:
            UsageError: there is no model to read.
        """
        if model is None and self != Reading():
            raise UsageError("--family, --shift and --mask-id say how to read --model: give it too")
        return None if model is None else self.name(model)

    def name(self, model: str) -> str:
        """The model's name with these settings behind it."""
        given = {name: getattr(self, name) for name in NAMES}
        return model + "".join(f",{k}={v}" for k, v in given.items() if v is not None)


def split_name(name: str) -> tuple[str, Reading]:
    """A model's name and the settings behind it, the last of each name.

    Raises:
        UsageError: a setting has no such value.
    """
    given: dict[str, Any] = {}
    while True:
        before, comma, last = name.rpartition(",")
        key, equals, value = last.partition("=")
        if not comma or not equals or key not in NAMES:
            return name, Reading(**given)
        if NAMES[key] is int and not (value.isdecimal() and len(value) <= 9):
            raise UsageError(f"{key}={value} behind a model's name is not a whole number")
        given.setdefault(key, NAMES[key](value))
        name = before


@dataclass(frozen=True)
class Prompting:
    """How the prompt of a record becomes the text that a model sees."""

    chat: bool = knob(
        True,
        "Write prompts by the tokenizer's chat template, if it has one, or as they are, for the "
        "model to continue. Without a template --raw is all there is.",
        "--chat/--raw",
        panel=PROMPT,
        env=True,
    )
    template_arg: list[str] | None = knob(
        None,
        "Argument of the chat template, as enable_thinking=false; the value is JSON or a text. May "
        "be given more than once. A record's field 'chat_template_kwargs' comes before it.",
        metavar="NAME=VALUE",
        panel=PROMPT,
        shown_default="none",
        env=True,
    )
    prefill: str = knob(
        "",
        "Text that every answer begins with. It counts as part of the prompt: 'completion' is what "
        "the model wrote after it.",
        metavar="TEXT",
        panel=PROMPT,
        shown_default="nothing",
        env=True,
    )

    def __post_init__(self) -> None:
        if self.template_arg and not self.chat:
            raise UsageError("--template-arg is for the chat template, which --raw leaves out")
        self.template_args  # noqa: B018 (raises)

    @cached_property
    def template_args(self) -> dict[str, Any]:
        """Arguments of the template by their names."""
        made = {}
        for text in self.template_arg or ():
            name, equals, value = text.partition("=")
            if not equals or not name.isidentifier():
                raise UsageError(f"--template-arg {text} is not NAME=VALUE")
            try:
                made[name] = json.loads(value)
            except ValueError:
                made[name] = value
        return made
