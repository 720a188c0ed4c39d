"""A policy to disk, as an ordinary Hugging Face directory that transformers loads by itself.

What config.json has no field for (family, mask token, shift, sampling) stands in it under `dlmctl`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dlmctl.models.policy import Policy


def save_policy(policy: Policy, directory: Path) -> None:
    """Write model and tokenizer; of a model with an adapter, the adapter and its base's name."""
    model: Any = policy.model
    if hasattr(model, "peft_config"):
        for config in model.peft_config.values():
            # peft makes it a set, whose order differs from process to process.
            config.target_modules = sorted(config.target_modules)
        model.save_pretrained(directory, save_embedding_layers=False)
        return
    generation = getattr(model, "generation_config", None)
    if generation is not None and policy.ends:
        ends = sorted(policy.ends)
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.config.dlmctl = {
        "family": policy.family,
        "mask_token_id": policy.mask_id,
        "shift": policy.shift,
        "sampling": dict(policy.sampling),
    }
    model.save_pretrained(directory)
    save_tokenizer(policy, directory)
    if policy.vision is not None:
        policy.vision.processor.save_pretrained(directory)


def save_tokenizer(policy: Policy, directory: Path) -> None:
    """Write the tokenizer, without what transformers notes of the process that loaded it."""
    for note in ("is_local", "local_files_only"):  # else the files depend on HF_HUB_OFFLINE
        policy.tokenizer.init_kwargs.pop(note, None)
    policy.tokenizer.save_pretrained(directory)
