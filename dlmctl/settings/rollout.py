"""What `rollout` samples, and by what: prompts, training loops, servers, corrupted images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob

Corruption = Literal["patch", "blank", "blur", "noise", "shuffle", "no-image"]


@dataclass(frozen=True)
class PromptSource:
    """Prompts of a stage that samples, if no FILE is given."""

    task: str | None = knob(
        None,
        "Take prompts from this task and not from standard input: sudoku, countdown, or anything "
        "else that 'dlmctl prompts' takes.",
        shown_default="sudoku, when there is no FILE and standard input is a terminal or /dev/null",
    )
    prompts: int = knob(32, "Prompts taken from --task, or in each round of --follow.", minimum=1)


@dataclass(frozen=True)
class Loop:
    """A training loop whose other end is `update`."""

    PANEL: ClassVar[str] = "Training loop"

    follow: Path | None = knob(
        None,
        "Training loop: before each round load the newest checkpoint of this run, which 'dlmctl "
        "update -o RUN' at the end of the pipe writes.",
        metavar="RUN",
    )
    rounds: int = knob(
        1, "With --follow: rounds in all, those of a resumed run included.", minimum=1
    )
    max_lag: int = knob(
        0,
        "With --follow: rounds that the weights may lag behind; 0 is strictly on-policy, 1 samples "
        "a round while the one before is trained on.",
        minimum=0,
    )


@dataclass(frozen=True)
class Engines:
    """Inference servers that sample in the place of dlmctl's own sampler."""

    PANEL: ClassVar[str] = "Inference servers"

    engine: list[str] | None = knob(
        None,
        "Sample by the SGLang or vLLM server at this URL, from an autoregressive model that it "
        "serves; here only tokenizer and configuration are loaded. May be given more than once, or "
        "with commas between: requests are spread, --batch-size at a time to each. Device and "
        "dtype are the server's own. With --follow, servers load each checkpoint.",
        metavar="URL",
        shown_default="dlmctl's own sampler",
    )
    engine_timeout: float = knob(
        600.0,
        "With --engine: seconds after which a request without an answer is lost and sent again.",
        minimum=0.1,
    )

    @property
    def urls(self) -> list[str]:
        """Each URL once; raises UsageError for one that is empty."""
        urls = [url.strip() for text in self.engine or () for url in text.split(",")]
        if not all(urls):
            raise UsageError("--engine is a URL, as http://HOST:PORT, or some with commas between")
        return [*dict.fromkeys(urls)]


@dataclass(frozen=True)
class Corrupted:
    """Images that a vision-language model does not see as they are."""

    corrupt: Corruption | None = knob(
        None,
        "Show a vision-language model corrupted images, to see what it answers without them: as in "
        "'dlmctl advantage --corrupt'.",
        shown_default="off",
    )
    corrupt_prob: float = knob(
        0.6, "Share of the squares that --corrupt patch blackens.", minimum=0.0, maximum=1.0
    )
