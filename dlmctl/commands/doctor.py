"""`dlmctl doctor`: options and wiring."""

from __future__ import annotations

import sys
from typing import Annotated

from dlmctl.records.errors import UnavailableError, UserFacingError
from dlmctl.records.jsonl import write_records
from dlmctl.settings import Knob
from dlmctl.settings.models import Reading


def command(
    as_json: Annotated[
        bool | None,
        Knob(
            "JSON lines or a table.",
            "--json/--table",
            shown_default="table on a terminal, else json",
        ),
    ] = None,
    model: Annotated[
        str | None,
        Knob(
            "Say how this model would be read, without its weights: only config.json, "
            "generation_config.json and the tokenizer are opened, or downloaded.",
            "-m",
            "--model",
            metavar="MODEL",
            shown_default="none",
        ),
    ] = None,
    reading: Reading = Reading(),
) -> None:
    """Say what this machine has and what is missing, and how a model would be read.

    Reports torch, whether the CPU computes in bfloat16, CUDA devices and their memory, optional
    packages and the command that installs each. Exits with 69 if something that every stage needs
    is missing.

    With --model also: family, class, parameters, attention, shift, special tokens, chat template,
    the sampler's defaults, the modules that LoRA changes, and what is doubtful. If loading would
    refuse the model, so does this command, with the same message and exit code.

    Examples:

    dlmctl doctor

    dlmctl doctor --json | jq -r 'select(.state == "missing") | .detail'

    dlmctl doctor --model GSAI-ML/LLaDA-8B-Instruct
    """
    from dlmctl.report.diagnosis import Finding, findings

    name, rows, refusal = reading.of(model), findings(), None
    if name is not None:
        from dlmctl.plan.description import describe

        try:
            states = {False: "ok", True: "doubtful"}
            rows += [Finding(t.name, states[t.doubtful], t.detail) for t in describe(name)]
        except UserFacingError as error:
            refusal = error
            rows.append(Finding("model", "broken", str(error)))
    if as_json or (as_json is None and not sys.stdout.isatty()):
        write_records([row._asdict() for row in rows])
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False)
        colours = {"ok": "green", "missing": "yellow", "doubtful": "yellow", "broken": "red"}
        for subject, state, detail in rows:
            # As text: [eval] of a command is no markup.
            table.add_row(subject, Text(state, colours[state]), Text(detail))
        Console().print(table)
    if refusal is not None:
        raise refusal
    if broken := [row.name for row in rows if row.state == "broken"]:
        raise UnavailableError(f"this cannot work yet: {', '.join(broken)}")
