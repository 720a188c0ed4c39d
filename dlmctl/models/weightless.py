"""A policy from config.json alone: its tensors have shapes and dtypes, but no values and no memory.

On torch's meta device a model can be built and its parameters counted. To follow a pass, its
tensors become those of `FakeTensorMode`, under which autocast, autograd and what autograd saves
work as usual. So dlmctl's own passes can be measured for a model of any size on any machine.
"""

from __future__ import annotations

import copy
import dataclasses
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlmctl.models.architecture import FAULTS, Architecture, architecture
from dlmctl.models.blocks import decoder_blocks
from dlmctl.models.loading import config_file
from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError
from dlmctl.records.files import read_json
from dlmctl.settings.models import split_name

CONFIG_FILES = ["config.json", "adapter_config.json"]


def weightless_policy(name: str, dtype: torch.dtype) -> Policy:
    """The policy of a model on the meta device. It has no tokenizer.

    Args:
        name: as `load_policy` takes it, or the path of a config.json. Nothing else is read.

    Raises:
        MissingInputError: there is no config.json.
        DataError: no known family fits it.
        TryAgainError: the hub does not answer.
    """
    plain, reading = split_name(name)
    config = Path(plain).expanduser()
    if config.suffix != ".json" or not config.is_file():
        config, reading = config_file(name, CONFIG_FILES)
    arch = architecture(read_json(config), str(config), reading)
    model = weightless_model(arch, config, dtype)
    return Policy(
        model=model,
        tokenizer=None,
        family=arch.family.name,
        mask_id=(arch.mask_id or 0) if arch.family.diffusion else None,
        eos_id=0,
        pad_id=0,
        shift=arch.shift,
        vocab_size=arch.config.get_text_config().vocab_size,
        name=name,
        revision="none",
        sampling=arch.sampling,
    )


def weightless_model(arch: Architecture, config: Path, dtype: torch.dtype) -> Any:
    """The model of a config.json on the meta device; raises DataError if none can be built."""
    try:
        with torch.device("meta"):
            factory = arch.model_class(str(config))
            model = factory._from_config(
                arch.config, dtype=dtype, attn_implementation=arch.kernel(factory)
            )
    except FAULTS as error:
        reason = str(error).strip().split("\n")[-1][:200]
        raise DataError(f"no model can be built from it ({reason})", str(config)) from None
    return model.eval()


def followable(policy: Policy, layers: int) -> Policy:
    """A copy of a weightless policy for passes under FakeTensorMode; call it under that mode.

    Args:
        layers: number of blocks of the language model to keep, from the first; what passes need is
            linear in it.
    """
    model = policy.model
    fake: dict[int, Any] = {
        id(b): torch.empty(b.shape, dtype=b.dtype)
        for b in chain(model.parameters(), model.buffers())
    }
    for parameter in model.parameters():
        fake[id(parameter)] = nn.Parameter(fake[id(parameter)], parameter.requires_grad)
    followed = dataclasses.replace(policy, model=copy.deepcopy(model, fake))
    del decoder_blocks(followed)[layers:]
    followed.core.config.get_text_config().num_hidden_layers = layers
    return followed
