"""Activation checkpointing: the backward pass recomputes the activations of the layers."""

from __future__ import annotations

from typing import Any


def checkpoint_activations(model: Any) -> None:
    """Let a Hugging Face model recompute its activations in the backward pass."""
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.23
        model.activation_checkpointing_enable(settings)
    else:
        model.gradient_checkpointing_enable(settings)


def checkpoints_activations(model: Any) -> bool:
    """Whether a Hugging Face model does so."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
