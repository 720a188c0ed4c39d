"""The card of an autoencoder of `sae-train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dlmctl.settings.sae import SaeRecipe
from dlmctl.train.card import DIRECTORY, Card, told_metrics

NAMES = {"topk": "Top-K", "batchtopk": "BatchTopK", "matryoshka": "Matryoshka BatchTopK"}
NAMED = ("layer", "k", "positions", "tokens")
"""Metrics that identify the autoencoder, or are among the settings."""


def sae_card(
    k: int, width: int, recipe: SaeRecipe, metadata: Mapping[str, Any], metrics: Mapping[str, Any]
) -> Card:
    """The card of an autoencoder.

    Args:
        width: d, of an activation.
        metadata: as in the folder's configuration.
        metrics: the last record of the autoencoder.
    """
    active = f"{k} of them active" + ("" if recipe.kind == "topk" else " on average")
    model, hook = metadata.get("model_name"), metadata.get("hook_name")
    source = {name.removeprefix("dlm_"): value for name, value in metadata.items()}
    theirs = f'from sae_lens import SAE\n\nsae = SAE.load_from_disk("{DIRECTORY}")'
    ours = (
        "from pathlib import Path\n\nfrom dlmctl.sae.formats.folders import read_sae\n\n"
        f'sae = read_sae(Path("{DIRECTORY}")).sae'
    )
    return Card(
        title=f"Sparse autoencoder of {str(model).rstrip('/').split('/')[-1]}, {hook}",
        summary=f"A {NAMES[recipe.kind]} sparse autoencoder of {recipe.latents} latents, {active}, "
        f"for the {width} numbers that `{hook}` of `{model}` gives, trained by dlmctl.",
        library="saelens",
        base=str(model) if model else None,
        tags=["sparse-autoencoder", "diffusion-language-model"],
        settings={
            "k": k,
            **{n: v for n, v in source.items() if n not in ("model_name", "hook_name")},
            **{n: v for n, v in asdict(recipe).items() if n not in ("tokens", "prefixes")},
            "dead_after": recipe.dead_limit,
        },
        metrics=told_metrics(metrics, NAMED),
        usage=[("python", theirs), ("python", ours)],
    )
