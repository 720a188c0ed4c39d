"""The policy that a server samples from: tokenizer, conventions and revision, but no weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from dlmctl.models.architecture import architecture
from dlmctl.models.loading import model_directory, policy_of
from dlmctl.models.policy import Policy
from dlmctl.models.special_tokens import load_tokenizer
from dlmctl.models.weightless import weightless_model
from dlmctl.models.weights import weight_files, weights_hash
from dlmctl.records.errors import MissingInputError, UsageError
from dlmctl.records.files import read_json
from dlmctl.settings.models import Prompting, split_name


def served_policy(name: str, prompting: Prompting | None = None) -> Policy:
    """The policy of a model whose tensors are on the meta device.

    Its revision is that of `load_policy`: files of weights are hashed, but not loaded.

    Args:
        name, prompting: as `load_policy` takes them.

    Raises:
        MissingInputError: there is no such model, or it lacks a file.
        DataError: its files cannot be used.
        UsageError: servers do not sample from such a model.
        TryAgainError: the hub does not answer.
    """
    directory = model_directory(name)
    _check_whole(name, directory)
    config = directory / "config.json"
    if not config.exists():
        raise MissingInputError(f"{directory} has no config.json: it is not a model")
    arch = architecture(read_json(config), str(config), split_name(name)[1])
    if arch.family.diffusion:
        raise UsageError(
            f"{name} is a diffusion language model ({arch.family.name}), and --engine samples only "
            "autoregressive ones: leave it out"
        )
    if arch.family.takes_images:
        raise UsageError(
            f"{name} takes images, and --engine samples only language models: leave it out"
        )
    model = weightless_model(arch, config, torch.float32)
    tokenizer = load_tokenizer(directory, arch)
    revision = weights_hash(weight_files(directory))
    policy = policy_of(name, arch, model, tokenizer, revision, directory)
    return dataclasses.replace(policy, prompting=prompting or Prompting())


def with_weights_of(policy: Policy, name: str) -> Policy:
    """The policy of a newer checkpoint of the same run; raises as `served_policy`."""
    directory = model_directory(name)
    _check_whole(name, directory)
    return dataclasses.replace(policy, name=name, revision=weights_hash(weight_files(directory)))


def _check_whole(name: str, directory: Path) -> None:
    """Raise UsageError for an adapter."""
    if (directory / "adapter_config.json").exists():
        raise UsageError(
            f"{name} is a LoRA adapter, and --engine samples from whole weights: write them with "
            "'dlmctl merge', or train without --lora-rank"
        )
