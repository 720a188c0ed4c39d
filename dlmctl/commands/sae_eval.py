"""`dlmctl sae-eval`: options and wiring."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from dlmctl.commands.corpora import corpus_batches, corpus_plan, own_model, split_paths
from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.progress import counted
from dlmctl.commands.tables import write_rows
from dlmctl.records.errors import UsageError
from dlmctl.settings import Knob
from dlmctl.settings.compute import Compute, Seed
from dlmctl.settings.corpus import AS_TRAINED, SHOWN_AS_TRAINED, Corpus, SaeModel
from dlmctl.settings.sae import Insertion, SaePaths
from dlmctl.settings.streams import Json, OnErrorOption, Quiet

TUNED = "After more training"
COLUMNS = ("layer", "k", "positions", "fve", "nmse", "cos", "l0", "dead")
INSERTED = ("delta_mask", "delta_unmask", "kl_div_with_sae", "ce_loss_score", "ce_loss_score_mean")
TUNED_COLUMNS = ("layer", "k", "positions", "base_fve", "tuned_fve", "jaccard", "code_cosine")


def command(
    paths: SaePaths,
    model: SaeModel = None,
    tuned: Annotated[
        str | None,
        Knob(
            "The same model after more training: measure on both models whether the autoencoders "
            "still fit.",
            "--tuned",
            metavar="MODEL",
            shown_default="none",
            panel=TUNED,
        ),
    ] = None,
    tuned_saes: Annotated[
        list[Path] | None,
        Knob(
            "Autoencoders trained on the tuned model, whose decoders are matched with those of the "
            "same layer, K and positions.",
            "--tuned-saes",
            metavar="DIRECTORY",
            panel=TUNED,
        ),
    ] = None,
    layer: Annotated[
        int | None,
        Knob(
            "Block that the autoencoders are for.",
            "--layer",
            minimum=0,
            shown_default="as their folders say",
        ),
    ] = None,
    insertion: Insertion = Insertion(),
    logit_shift: Annotated[
        Literal["auto", "0", "1"],
        Knob(
            "Position of a token's logits: at the token (0), at the token before it (1), or as in "
            "the model's family. The published script took 0 for Dream, too.",
            "--logit-shift",
        ),
    ] = "auto",
    corpus: Annotated[Corpus, SHOWN_AS_TRAINED] = AS_TRAINED,
    compute: Compute = Compute(batch_size=8),
    seed: Seed = 1,
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Measure how well sparse autoencoders reconstruct activations, and the loss on insertion.

    Writes a record for each autoencoder. Of the reconstruction it has the variance explained, by
    three definitions and without tokens of massive norm; NMSE, cosine, norms, bias, L0 and L1; and
    how often latents are active. Of the insertion it has the change in the loss of masked and of
    visible tokens while the autoencoder stands in for the activations, the KL divergence from the
    model's predictions, and how much of the loss and of the predictions is recovered, compared with
    zeros (ce_loss_score, kl_div_score) and with the mean activation (ce_loss_score_mean,
    kl_div_score_mean). Means over tokens have a standard error over texts (delta_mask_se and so
    on). Unless an option says otherwise, the corpus is cut and masked as the one that the
    autoencoders were trained on.

    With --tuned, base and tuned model see the same tokens under the same masks. Each record has the
    measures on both, with base_ and tuned_ before their names, and how similar the codes are:
    jaccard, the share of the active latents of a token that both models have in common, and
    code_cosine.

    Examples:

    dlmctl sae-eval saes/ -m GSAI-ML/LLaDA-8B-Base heldout.jsonl

    dlmctl sae-eval saes/ corpus.jsonl | dlmctl stats --by layer

    dlmctl sae-eval saes/ corpus.jsonl --scope matching --keep-first --control pca

    dlmctl sae-eval saes/ corpus.jsonl -m builtin:puzzles --tuned runs/a
    """
    import dataclasses

    from dlmctl.models.loading import load_policy
    from dlmctl.sae.evaluation.evaluate import evaluate
    from dlmctl.sae.evaluation.placed import place_sae
    from dlmctl.sae.evaluation.stability import stability
    from dlmctl.sae.formats.folders import read_saes

    if tuned_saes and tuned is None:
        raise UsageError("--tuned-saes are autoencoders of the model after --tuned: give it too")
    folders, files = split_paths(paths)
    saved = read_saes(folders)
    plan = corpus_plan(corpus, seed, saved)
    names = [own_model(saved, model), *([tuned] if tuned else [])]
    base, *after = (load_policy(name, compute.device, compute.dtype) for name in names)
    saes = [place_sae(name, one, base, layer) for name, one in saved.items()]
    others = [place_sae(name, one, after[0]) for name, one in read_saes(tuned_saes or []).items()]
    total = None if plan.pack else input_lines(files).times(1 / compute.batch_size)
    batches = corpus_batches(files, base, plan, compute.batch_size, on_error)
    batches = counted(batches, "batches", quiet, total)
    if logit_shift != "auto":
        base, *after = (dataclasses.replace(p, shift=int(logit_shift)) for p in (base, *after))
    if after:
        rows = stability(base, after[0], batches, saes, insertion, plan.about, others, seed)
        deltas = ["base_delta_mask", "tuned_delta_mask"] if insertion.insert else []
        columns = [*TUNED_COLUMNS, *deltas, *(["matched"] if others else [])]
    else:
        rows = evaluate(base, batches, saes, insertion, plan.about, seed)
        columns = [*COLUMNS, *(INSERTED if insertion.insert else ())]
    write_rows(rows, columns, json)
