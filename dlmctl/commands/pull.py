"""`dlmctl pull`: options and wiring."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from dlmctl.settings import Knob
from dlmctl.settings.hub import Include, Repository, Revision
from dlmctl.settings.streams import Quiet


def command(
    repository: Repository,
    directory: Annotated[
        Path, Knob("Directory to write; it must be new or empty.", metavar="DIR", argument=True)
    ],
    revision: Revision = None,
    include: Include = None,
    quiet: Quiet = False,
) -> None:
    """Fetch a model, an adapter or autoencoders from the Hugging Face hub.

    Only safetensors and text are fetched. A repository that has pickled weights alone is refused,
    as --model refuses it. DIR appears when all of it is there and each file of weights is whole;
    the same command resumes a download that was interrupted.

    DIR is for every --model, --sae and --teacher. A language model needs no pull: --model USER/NAME
    fetches it into the hub's own cache.

    Examples:

    dlmctl pull USER/sudoku models/sudoku

    dlmctl pull USER/saes@v1 saes && dlmctl sae-eval saes corpus.jsonl
    """
    from dlmctl.train.hub import at_revision, pull

    repository, revision = at_revision(repository, revision)
    print(f"dlmctl: {pull(repository, directory, revision, include or [], quiet)}", file=sys.stderr)
