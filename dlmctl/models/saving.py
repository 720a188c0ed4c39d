"""A policy to disk, as an ordinary Hugging Face directory that transformers loads by itself.

config.json has what it has no field for (family, mask token, shift, length of a block, sampling)
under `dlmctl`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.records.files import publish_directory


def save_policy(policy: Policy, directory: Path) -> None:
    """Write model and tokenizer; for a model with an adapter, the adapter and its base's name."""
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
        **({"block_length": policy.blocks.length} if policy.blocks else {}),
        **({"latent_masks": list(policy.latent_masks)} if policy.latent_masks else {}),
        "sampling": dict(policy.sampling),
    }
    model.save_pretrained(directory)
    save_tokenizer(policy.tokenizer, directory)
    if policy.vision is not None:
        policy.vision.processor.save_pretrained(directory)


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write the tokenizer, without what transformers records about the process that loaded it."""
    for note in ("is_local", "local_files_only"):  # or the files depend on HF_HUB_OFFLINE
        tokenizer.init_kwargs.pop(note, None)
    tokenizer.save_pretrained(directory)


def save_original(policy: Policy, directory: Path) -> None:
    """Write a model as its authors publish theirs: their weight names and fields of config.json.

    Raises:
        UsageError: the authors publish stock models of transformers.
    """
    family, model = policy.model_family, policy.model
    ids = {"mask": policy.mask_id, "eos": policy.eos_id, "pad": policy.pad_id}
    special_ids = {f"{name}_token_id": number for name, number in ids.items()}
    fields = family.original_config(model.config, special_ids)
    if fields is None:
        raise UsageError(
            "--original-naming is for families whose config.json has fields of its own, as llada "
            f"and dream; those of {family.name} are written under transformers' names"
        )
    if policy.blocks is not None:
        fields["block_length"] = policy.blocks.length
    from transformers.core_model_loading import revert_weight_conversion

    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tensors = {name: t for name, t in model.state_dict().items() if name not in tied}
    # transformers joins the experts of a mixture into one tensor; checkpoints have them apart.
    on_disk = revert_weight_conversion(model, tensors)
    weights = {family.original_name(n): t.contiguous() for n, t in on_disk.items()}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(policy.tokenizer, directory)


def save_new(policy: Policy, directory: Path, original: bool) -> None:
    """Write a new model, as transformers has it or as its authors publish theirs.

    It appears whole or not at all; in an existing directory, file by file.
    """
    save = save_original if original else save_policy
    if directory.exists():
        save(policy, directory)
    else:
        publish_directory(directory, lambda temporary: save(policy, temporary))
