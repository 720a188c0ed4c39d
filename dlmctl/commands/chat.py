"""`dlmctl chat`: options and wiring."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Annotated, get_args

from dlmctl.records import stderr
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import write_records
from dlmctl.settings import Knob, Without
from dlmctl.settings.compute import Model, QuantizedCompute, Seed
from dlmctl.settings.models import Prompting, Reading
from dlmctl.settings.sampler import SAMPLED, Sampler

NAMED = replace(get_args(Model)[1], flags=(), argument=True)
"""The model in the place of an argument."""


def command(
    model: Annotated[str, NAMED] = "builtin:puzzles",
    prompt: Annotated[
        str | None,
        Knob("What to ask first.", metavar="PROMPT", argument=True, shown_default=False),
    ] = None,
    once: Annotated[
        bool,
        Knob(
            "Answer PROMPT, or all of standard input as one prompt, and write the answer to "
            "standard output.",
            "--once",
        ),
    ] = False,
    json: Annotated[
        bool, Knob("With --once: write the answer as a record of rollout.", "--json")
    ] = False,
    system: Annotated[
        str | None,
        Knob(
            "System message with which the conversation begins.",
            "--system",
            metavar="TEXT",
            shown_default="none",
        ),
    ] = None,
    step_time: Annotated[
        float,
        Knob(
            "On a terminal: seconds that each step is shown at least, to follow a small model.",
            "--step-time",
            metavar="SECONDS",
            minimum=0.0,
        ),
    ] = 0.0,
    reading: Reading = Reading(),
    prompting: Prompting = Prompting(),
    sampler: Sampler = SAMPLED,
    seed: Seed = 0,
    compute: Annotated[QuantizedCompute, Without("batch_size")] = QuantizedCompute(batch_size=1),
) -> None:
    """Talk with a model, and see in which order it decides its tokens.

    On a terminal, each token of a diffusion model appears in the place of its mask when it is
    decided, in the colour of its step, from blue (early) to orange (late). Answers are those of
    'dlmctl rollout' with the same options. With a chat template, each prompt has all turns before
    it; without one (or with --raw) it stands alone.

    Commands within the conversation: /set NAME VALUE changes an option of the sampler, /reset
    forgets the turns, /save FILE writes the answers as records of rollout, /help, /quit. Ctrl-C
    interrupts an answer, whose turn is then left out; a second Ctrl-C, or Ctrl-D, ends.

    If standard input is no terminal, each line is a prompt or a command. If standard output is
    none, answers are plain text. On a terminal, control characters of an answer are written as
    their numbers.

    Examples:

    dlmctl chat builtin:puzzles '0031102001033400=' --step-time 0.2

    dlmctl chat GSAI-ML/LLaDA-8B-Instruct 'Why is the sky blue?' --gen-length 64 --threshold 0.9

    dlmctl chat runs/a --once '0031102001033400='

    echo '0031102001033400=' | dlmctl chat runs/a --once --json | dlmctl view
    """
    if json and not once:
        raise UsageError("--json is for --once; within a conversation /save FILE writes records")
    if once and prompt is None:
        prompt = _piped()
    name = reading.name(model)
    if not once and sys.stdout.isatty() and stderr.has_codes():
        stderr.draw(f"loading {name}", lambda: True)
    from dlmctl.diffusion.conversation import Conversation, Session, write_answer
    from dlmctl.models.loading import load_policy

    policy = load_policy(name, compute.device, compute.dtype, prompting, compute.quantize)
    with stderr.aside():  # erases the line
        pass
    talk = Conversation(policy, sampler, seed, system)
    if not once:
        draws = sys.stdout.isatty() and stderr.has_codes()
        Session(talk, draws, step_time).run(prompt)
        return
    record = talk.ask(prompt or "")
    if json:
        write_records([record])
    else:
        write_answer(talk.answer(record))


def _piped() -> str:
    """Standard input as a prompt, without the end of its last line.

    Raises:
        UsageError: there is none.
        DataError: it is not UTF-8.
    """
    if sys.stdin.isatty():
        raise UsageError("--once answers one prompt: give it after the model, or pipe it")
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise DataError("it is not UTF-8", "<stdin>") from None
    if not text.strip():
        raise UsageError("--once answers one prompt, and standard input is empty")
    return text.removesuffix("\n")
