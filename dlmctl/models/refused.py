"""Published diffusion language models that are not loaded, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlmctl.records.errors import DataError

DIT = "its layer norms depend on the noise level (DiT), which no language model of transformers has"
IMAGES = "diffusion language models that take or make images are not supported"

REFUSED = {
    "mdlm": f"it is MDLM: {DIT}",
    "bd3lm": f"it is BD3-LM: {DIT}; family bd3lm is for stock decoders",
    "duo": f"it is Duo: {DIT}",
    "llava_llada": f"it is LLaDA-V or LaViDa: {IMAGES}",
    "llava_dream": f"it is LaViDa-Dream: {IMAGES}",
    "mmada": f"it is MMaDA: {IMAGES}",
    "diffusion_gemma": "it is DiffusionGemma, which replaces tokens by random ones and has no mask "
    "token, and reads the text before a block with an encoder: not supported yet",
}
"""By `model_type` in config.json, in lower case."""


def refuse_known(raw: Mapping[str, Any], where: str) -> None:
    """Raise DataError if a config.json is of a published model that is not loaded."""
    if reason := REFUSED.get(str(raw.get("model_type", "")).lower()):
        raise DataError(reason, where)
