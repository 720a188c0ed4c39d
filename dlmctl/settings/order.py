"""Decoding orders that look at features of sparse autoencoders, and the study of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from dlmctl.settings import Knob, knob

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


@dataclass(frozen=True)
class OrderProbe:
    """Logistic probes on what the sampler saw of its proposals."""

    PANEL: ClassVar[str] = "Probe"

    probe: bool = knob(
        False,
        "With --truth: train logistic probes on half of the puzzles that tell right proposals from "
        "wrong ones by confidence, codes, activations and a random dictionary, and test them on "
        "the other half.",
        "--probe/--no-probe",
    )
    probe_proposals: int = knob(
        16_384,
        "With --probe: at most this many proposals of each order are kept, whole steps at random. "
        "Each takes 4 bytes for a number of the activations, and each autoencoder has its own.",
        minimum=1,
    )
