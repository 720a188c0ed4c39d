"""How `verify` turns what verifiers say into rewards, and what verifiers may use."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob, same_field
from dlmctl.settings.compute import Compute
from dlmctl.settings.parsing import byte_count, named_number, number_pair

LIMITS = "Limits"


@dataclass(frozen=True)
class Judging:
    """Weights of the verifiers, a program that judges, and limits on time, memory and access."""

    weight: list[str] | None = knob(
        None, "Weight of a verifier in 'reward' (default 1); repeatable.", metavar="NAME=WEIGHT"
    )
    preset: Literal["d1"] | None = knob(
        None,
        "d1: the shaped rewards of d1 for each task, with the bugs of its code fixed.",
        shown_default="none",
    )
    program: str | None = knob(
        None,
        "Your own program: it reads one record per line, and for each writes and flushes a line "
        'with a number, or with {"reward": number, ...}.',
        "--exec",
        metavar="COMMAND",
        shown_default="none",
    )
    time_limit: float = knob(
        10.0,
        "Seconds that a verifier may take for a record. One that takes longer gives 0; --exec "
        "fails.",
        minimum=0.1,
        panel=LIMITS,
    )
    memory_limit: str | None = knob(
        None,
        "Address space of each process of --exec and of code, as 512M or 4G.",
        metavar="SIZE",
        shown_default="none for --exec, 1G for code",
        panel=LIMITS,
    )
    allow_unconfined: bool = knob(
        False,
        "Run the code that the verifier code tests even if the kernel cannot deny it files, "
        "network and processes.",
        "--allow-unconfined",
        panel=LIMITS,
    )

    def __post_init__(self) -> None:
        self.weights, self.memory  # noqa: B018 (they raise)

    @cached_property
    def weights(self) -> dict[str, float]:
        """Weights by the names of their verifiers."""
        return dict(named_number("--weight", text, "NAME=NUMBER") for text in self.weight or ())

    @cached_property
    def memory(self) -> int | None:
        """Bytes of `memory_limit`."""
        return byte_count("--memory-limit", self.memory_limit) if self.memory_limit else None


@dataclass(frozen=True)
class Matching:
    """What the verifier `regex` looks for in records that do not say it themselves."""

    PANEL: ClassVar[str] = "Verifier regex"

    pattern: str | None = knob(
        None,
        "Regular expression for records without `pattern`.",
        metavar="REGEX",
        shown_default="none",
    )
    match: Literal["search", "full"] = knob(
        "search",
        "For records without `match`: search finds it anywhere in the completion, full needs all "
        "of it, except for white space at its ends.",
    )


@dataclass(frozen=True)
class Asking:
    """The server and the question of the verifier `judge`."""

    PANEL: ClassVar[str] = "Verifier judge"

    judge_url: str | None = knob(
        None,
        "Server with the chat completions of OpenAI's protocol. The environment variable "
        "DLMCTL_JUDGE_KEY has the key of one that wants a key.",
        metavar="URL",
        shown_default="none",
    )
    judge_model: str | None = knob(
        None, "Name of the model as the server has it.", metavar="NAME", shown_default="none"
    )
    judge_template: Path | None = knob(
        None,
        "Question to the judge, a Jinja template: `request`, `completion`, `low`, `high` and the "
        "fields of the record.",
        metavar="FILE",
        shown_default="a request, an answer, the reference if there is one, and 'Score: N'",
    )
    judge_score: str = knob(
        r'(?i)score[\s:=*"]{0,5}(-?\d+(?:\.\d+)?)',
        "Regular expression whose first group, in its last match, is the score in the reply.",
        metavar="REGEX",
        shown_default="a number behind the word score",
    )
    judge_scale: str = knob("0,10", "Scores that are rewards of 0 and 1.", metavar="LOW,HIGH")
    judge_tokens: int = knob(1024, "Most tokens of a reply.", minimum=1)
    judge_cache: Path | None = knob(
        None,
        "Keep replies in this SQLite file, so that no question is asked twice, even by other "
        "processes or after a failure.",
        metavar="FILE",
        shown_default="none",
    )
    judge_at_a_time: int = knob(8, "Questions under way at once.", minimum=1, maximum=1024)
    judge_timeout: float = knob(
        120.0, "Seconds after which a question without a reply is asked again.", minimum=0.1
    )
    judge_patience: float = knob(
        300.0,
        "Seconds without any reply after which the stage ends (exit 75). Until then it asks again "
        "after 1, 2, 4 and up to 60 s.",
        minimum=0.0,
    )
    seed: int = knob(0, "Seed that the judge is told to sample with, at temperature 0.", env=True)

    def __post_init__(self) -> None:
        low, high = self.scale
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UsageError(f"--judge-scale {self.judge_scale} is not LOW,HIGH with LOW < HIGH")
        self.score  # noqa: B018 (it raises)

    @cached_property
    def scale(self) -> tuple[float, float]:
        """Scores that are 0 and 1."""
        return number_pair("--judge-scale", self.judge_scale, "LOW,HIGH, as 0,10")

    @cached_property
    def score(self) -> re.Pattern[str]:
        """What finds the score."""
        try:
            pattern = re.compile(self.judge_score)
        except (re.error, RecursionError, OverflowError) as error:
            raise UsageError(f"--judge-score is no regular expression ({error})") from None
        if not pattern.groups:
            raise UsageError("--judge-score has no group: put brackets around the number")
        return pattern


@dataclass(frozen=True)
class Rewarding:
    """The model of the verifier `reward-model`, and where it runs."""

    PANEL: ClassVar[str] = "Verifier reward-model"

    reward_model: str | None = knob(
        None,
        "Sequence classifier that scores: a directory or hub name, with safetensors.",
        metavar="MODEL",
        shown_default="none",
    )
    reward_label: str | None = knob(
        None,
        "Label whose probability is the reward, of a model with more than one.",
        metavar="LABEL",
        shown_default="the logit of the only one",
    )
    batch_size: int = same_field(16, Compute, "batch_size")
    device: str = same_field("auto", Compute, "device")
    dtype: str = same_field("auto", Compute, "dtype")
