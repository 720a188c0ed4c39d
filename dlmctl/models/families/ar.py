"""Any decoder of transformers, left to right (a new one is a Llama).

Checkpoints that no other family recognises are of this one.
"""

from __future__ import annotations

from dlmctl.models.families import ModelFamily


class Autoregressive(ModelFamily):
    diffusion = False
    pattern = "causal"
    shift = 1
    reuses_keys = False
    title = "autoregressive language model"


FAMILY = Autoregressive()
