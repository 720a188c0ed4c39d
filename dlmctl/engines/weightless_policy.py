"""The policy that a server samples from: tokenizer, conventions and revision, but no weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from dlmctl.engines.protocol import Weights
from dlmctl.models.adapters import adapter_base
from dlmctl.models.architecture import architecture
from dlmctl.models.loading import checkpoint_revision, model_directory, policy_of
from dlmctl.models.policy import Policy
from dlmctl.models.special_tokens import load_tokenizer
from dlmctl.models.weightless import weightless_model
from dlmctl.models.weights import weight_files, weights_hash
from dlmctl.records.errors import DataError, MissingInputError, UsageError
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
    if _is_adapter(directory):
        base = served_policy(_whole_base(directory), prompting)
        return dataclasses.replace(base, name=name, revision=_adapted(directory, base.revision))
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
    if _is_adapter(directory):
        revision = _adapted(directory, policy.revision.partition(".")[0])
    else:
        revision = checkpoint_revision(directory, "")
    return dataclasses.replace(policy, name=name, revision=revision)


def weights_of(policy: Policy, pushed: bool) -> Weights:
    """What a server is to sample from; of an adapter, the weights below it stay as they are."""
    directory = model_directory(policy.name).resolve()
    if not _is_adapter(directory):
        return Weights(policy.name, directory, policy.revision, pushed)
    name = _whole_base(directory)
    whole = policy.revision.partition(".")[0]
    base = Weights(name, model_directory(name).resolve(), whole, False)
    return Weights(policy.name, directory, policy.revision, pushed, base)


def _is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").exists()


def _whole_base(directory: Path) -> str:
    """The model below an adapter; raises UsageError if it is an adapter itself."""
    base = adapter_base(directory)
    if _is_adapter(model_directory(base)):
        raise UsageError(
            f"{directory} is an adapter over another one, {base}: --engine takes one at a time; "
            "write the weights below it with 'dlmctl merge'"
        )
    return base


def _adapted(directory: Path, base: str) -> str:
    """The revision of an adapter over a base model of this revision.

    Raises:
        DataError: it was trained over other weights.
    """
    run = directory / "dlmctl.json"
    trained_on = read_json(run).get("reference_revision", base) if run.exists() else base
    if trained_on != base:
        raise DataError(
            f"it was trained over the weights {trained_on}, and its base model has {base}",
            str(directory),
        )
    return checkpoint_revision(directory, base)
