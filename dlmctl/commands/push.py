"""`dlmctl push`: options and wiring."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from dlmctl.commands.tables import print_table
from dlmctl.records.jsonl import write_records
from dlmctl.settings import Knob
from dlmctl.settings.hub import Include, Repository, Revision
from dlmctl.settings.streams import Json, Quiet


def command(
    run: Annotated[
        Path,
        Knob(
            "A run, one of its checkpoints, a model, an adapter, or a folder of autoencoders.",
            metavar="RUN",
            argument=True,
        ),
    ],
    repository: Repository,
    private: Annotated[
        bool,
        Knob(
            "Make the repository private if it is new; one that is public is refused.", "--private"
        ),
    ] = False,
    revision: Revision = None,
    message: Annotated[
        str | None,
        Knob("Message of the commit.", "--message", metavar="TEXT", shown_default="what is pushed"),
    ] = None,
    base_model: Annotated[
        str | None,
        Knob(
            "Name on the hub of the model that RUN began with, in place of its directory here. An "
            "adapter of a model in a directory needs it.",
            "--base-model",
            metavar="HUB",
            shown_default=False,
        ),
    ] = None,
    include: Include = None,
    resume_state: Annotated[
        bool,
        Knob(
            "Push also the optimizer's state, with which 'update' or 'distill masked' resumes.",
            "--resume-state",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        Knob("List the files and show the card; send nothing, and ask no server.", "--dry-run"),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Send a run, a model or autoencoders to the Hugging Face hub.

    Of a run the newest checkpoint is sent, with its metrics and its model card; what has no card
    gets one. All files become visible at once, in one commit. Locks, temporary files, pickles and
    the optimizer's state are not sent. A path of this machine in the card or in the settings is
    replaced by local:NAME, and each is listed on stderr. A file that contains an access token is
    refused.

    The token is the one of 'hf auth login', or HF_TOKEN. The licence is yours to add to the card.

    Examples:

    dlmctl push runs/a USER/sudoku --dry-run

    dlmctl push runs/lora USER/sudoku-lora --base-model USER/sudoku --private
    """
    from dlmctl.train.hub import at_revision, push, size_text
    from dlmctl.train.hub_contents import contents_of

    repository, revision = at_revision(repository, revision)
    contents = contents_of(run, repository, revision, base_model, include or [], resume_state)
    for path, stand_in in contents.replaced.items():
        print(f"dlmctl: {path} is written as {stand_in}", file=sys.stderr)
    if contents.left_out:
        print(f"dlmctl: not pushed: {', '.join(contents.left_out)}", file=sys.stderr)
    if not contents.licensed:
        print(
            "dlmctl: the card names no licence: add  license: NAME  to the header of README.md, "
            "here or on the hub",
            file=sys.stderr,
        )
    if dry_run:
        rows = contents.rows()
        if json or not sys.stdout.isatty():
            write_records(rows)
        else:
            shown = [{**row, "size": size_text(row["bytes"])} for row in rows]
            print_table(shown, {"file": "file", "size": "size"})
            print(f"\n{contents.card}", end="")
        return
    print(
        f"dlmctl: {push(contents, repository, revision, private, message, quiet)}", file=sys.stderr
    )
