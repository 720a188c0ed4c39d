"""How autoencoders are measured against known concepts: which measure, which rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dlmctl.models.policy import Policy
from dlmctl.sae.evaluation.halves import Halves, halves
from dlmctl.sae.evaluation.output_choice import OutputStudy, output_rows
from dlmctl.sae.evaluation.perturbation import tpp_rows
from dlmctl.sae.evaluation.placed import PlacedSae
from dlmctl.sae.evaluation.sentences import Labelled, Place
from dlmctl.sae.evaluation.single import baseline_methods, result_rows, sae_method
from dlmctl.sae.evaluation.sparse import sparse_rows
from dlmctl.sae.evaluation.spurious import scr_rows
from dlmctl.settings.probing import Probing

BY_SENTENCES = {"sparse": sparse_rows, "tpp": tpp_rows, "scr": scr_rows}
"""Measures that need no more than the activations of sentences."""


def probe(
    policy: Policy,
    saes: Sequence[PlacedSae],
    labelled: Labelled,
    probing: Probing,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Rows for each autoencoder, each with what it is of.

    Args:
        seed: of random directions.

    Raises:
        DataError: the labels do not vary, or not in the way that the measure needs.
        UsageError: the corpus lacks a concept that is asked for.
    """
    at: dict[Place, Halves] = {}
    baselines: dict[tuple[Place, int], list[dict[str, Any]]] = {}
    for placed in saes:
        place, latents = (placed.layer, placed.positions), placed.sae.d_sae
        if place not in at:
            sentences = labelled.tokens[place], labelled.document, labelled.values
            at[place] = halves(*sentences, policy.device, probing.wanted)
        rows: Iterator[dict[str, Any]]
        if probing.measure == "output":
            study = OutputStudy(policy, placed, labelled, at[place], probing)
            rows = output_rows(study, seed)
        elif probing.measure == "single":
            if (place, latents) not in baselines:
                methods = baseline_methods(at[place].first, latents, seed)
                baselines[place, latents] = [r for m in methods for r in result_rows(m, at[place])]
            own = result_rows(sae_method(placed.sae), at[place])
            rows = iter([*own, *baselines[place, latents]])
        else:
            rows = BY_SENTENCES[probing.measure](placed.sae, at[place], probing.sizes, seed)
        for row in rows:
            yield {**placed.about, **row}
