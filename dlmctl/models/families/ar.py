"""Any decoder of transformers, left to right (a new one is a Llama).

Checkpoints that no other family recognises are of this one.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from dlmctl.models.families import ModelFamily, Raw
from dlmctl.records.errors import DataError


class Disguised(NamedTuple):
    """A diffusion model that is published with the config.json of a stock decoder."""

    named: re.Pattern[str]
    """In the name of its directory or on the hub."""
    title: str
    reading: str


DISGUISED = (
    Disguised(re.compile("open-?dcoder", re.I), "Open-dCoder", "family=dream,mask_id=ID"),
    Disguised(re.compile("diffullama", re.I), "DiffuLLaMA", "family=a2d,shift=1,mask_id=811"),
    Disguised(re.compile("diffugpt", re.I), "DiffuGPT", "family=diffugpt,mask_id=ID"),
)

ON_HUB = re.compile(r"models--([^/]+)/snapshots/")
"""The name of a downloaded model in the path of its files."""


def repository(where: str) -> str:
    """A model's name on the hub, from the path of its config.json, or else its directory's."""
    path = where.replace("\\", "/")
    return downloaded[1] if (downloaded := ON_HUB.search(path)) else path.split("/")[-2:][0]


class Autoregressive(ModelFamily):
    diffusion = False
    pattern = "causal"
    shift = 1
    reuses_keys = False
    title = "autoregressive language model"

    def check(self, raw: Raw, where: str) -> None:
        super().check(raw, where)
        names = f"{repository(where)} {raw.get('_name_or_path', '')}"
        for model in DISGUISED:
            if model.named.search(names):
                raise DataError(
                    f"by its name it is {model.title}, a diffusion model, and its config.json does "
                    f"not say so: write MODEL,{model.reading}; or family=ar to read it from left "
                    "to right",
                    where,
                )


FAMILY = Autoregressive()
