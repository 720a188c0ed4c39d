"""Decoding orders that look at features of sparse autoencoders."""

from __future__ import annotations

from typing import Annotated

from dlmctl.settings import Knob

GuidingSaes = Annotated[
    list[str] | None,
    Knob(
        "With --remasking sae: folder of an autoencoder, with LAYER the block (counted from 0) if "
        "the folder does not name it; repeatable.",
        "--sae",
        metavar="SAE[@LAYER]",
        shown_default="none",
    ),
]
