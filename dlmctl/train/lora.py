"""LoRA through peft: a low-rank adapter on every linear layer of the decoder.

The experts of a mixture are no linear layers in transformers 5, which joins their matrices into one
tensor: an adapter changes attention, dense and shared MLPs, and neither the experts nor the router.

The reference policy of a LoRA run is the same model with the adapter switched off, which costs no
memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from transformers.pytorch_utils import Conv1D

from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError, missing_package
from dlmctl.settings.optimizer import Adapter


def add_adapter(policy: Policy, settings: Adapter) -> Policy:
    """The policy with a new adapter that alone is trained; it changes nothing until it learns.

    Raises:
        UnavailableError: peft is not installed.
        UsageError: none of the model's modules is known.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise missing_package("peft", "lora", "--lora-rank") from None
    modules = {name.rsplit(".", 1)[-1] for name, _ in policy.model.named_modules()}
    targets = [name for name in policy.model_family.lora_targets if name in modules]
    if not targets:
        raise UsageError(
            f"--lora-rank: no module of {policy.name} is known to take an adapter; train all its "
            "weights instead"
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        # GPT-2's layers have their weights the other way round.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in policy.model.modules()),
    )
    model = get_peft_model(policy.model, config)
    # The name that the checkpoint of the adapter finds its base model by.
    model.peft_config["default"].base_model_name_or_path = policy.name
    return dataclasses.replace(policy, model=model)


def has_adapter(policy: Policy) -> bool:
    """Whether the policy is a base model with an adapter."""
    return hasattr(policy.model, "peft_config")


def adapter_settings(policy: Policy) -> Adapter | None:
    """The settings of the policy's adapter; None: it has none."""
    if not has_adapter(policy):
        return None
    config = policy.model.peft_config["default"]
    return Adapter(config.r, float(config.lora_alpha), config.lora_dropout)


def set_adapter_trainable(policy: Policy) -> None:
    """Let an adapter that was loaded for inference learn again."""
    for name, parameter in policy.model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def adapter_off(policy: Policy) -> Iterator[None]:
    """Within the block the policy is its base model."""
    with policy.model.disable_adapter():
        yield
