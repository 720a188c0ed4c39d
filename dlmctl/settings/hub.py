"""Repositories of the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated

from dlmctl.settings import Knob

Repository = Annotated[
    str,
    Knob(
        "Repository on the hub, USER/NAME or ORGANIZATION/NAME; @REVISION may follow.",
        metavar="HUB",
        argument=True,
    ),
]


Revision = Annotated[
    str | None,
    Knob(
        "Branch of the repository; for 'pull' also a tag or a commit. The same as HUB@REVISION.",
        "--revision",
        metavar="NAME",
        shown_default="main",
    ),
]


Include = Annotated[
    list[str] | None,
    Knob(
        "Take files of this pattern too, as 'plots/*.svg'; may be repeated. Without it only "
        "safetensors and text go over the line, and no pickles.",
        "--include",
        metavar="PATTERN",
        shown_default=False,
    ),
]
