"""`dlmctl sae-probe`: options and wiring."""

from __future__ import annotations

from typing import Annotated

from dlmctl.commands.corpora import corpus_plan, own_model, split_paths
from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.progress import counted
from dlmctl.commands.tables import write_rows
from dlmctl.records.jsonl import each, read_records
from dlmctl.settings import Without
from dlmctl.settings.compute import Compute, Seed
from dlmctl.settings.corpus import SHOWN_AS_TRAINED, Corpus, SaeModel
from dlmctl.settings.probing import Probing
from dlmctl.settings.sae import SaePaths
from dlmctl.settings.streams import Json, OnErrorOption, Quiet

COLUMNS = {
    "single": ("sae", "method", "concept", "value", "feature", "auroc", "clear"),
    "sparse": (
        "sae", "method", "concept", "value", "top", "accuracy", "auroc",
        "above_random",
    ),
    "tpp": (
        "sae", "method", "concept", "value", "top", "tpp", "intended", "unintended",
        "accuracy",
    ),
    "scr": (
        "sae", "method", "concept", "spurious", "main", "top", "scr", "accuracy",
        "biased", "unbiased",
    ),
    "output": (
        "sae", "method", "chosen_by", "concept", "value", "feature", "effect",
        "before", "output_rank", "measured", "estimate_rank", "auroc", "auroc_rank",
    ),
}  # fmt: skip
"""Of each measure's table."""


def command(
    paths: SaePaths,
    model: SaeModel = None,
    probing: Probing = Probing(),
    # Sentences are offsets into one text, so texts are not packed.
    corpus: Annotated[
        Corpus, SHOWN_AS_TRAINED, Without("per_batch", "pack", "hide_prompt")
    ] = Corpus(level=None, context=None),
    seed: Seed = 0,
    compute: Compute = Compute(),
    on_error: OnErrorOption = "fail",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what features have to do with known concepts.

    Reads records with a text and its `sentences`: a list of objects with `start` and `end`, offsets
    in characters of `text` or `completion`, and a value for each concept, as 'dlmctl prompts
    concepts' writes them.

    Features are chosen, and probes fitted, on every other text, and measured on the remaining ones;
    standard errors (_se) are over these texts. Tokens count that the autoencoder is for (masked
    ones, visible ones, all). Writes a table on a terminal, JSON lines in a pipe.

    single: a feature's score for a sentence is its largest activation there. For each value, the
    feature with the highest AUROC against the other values is chosen. The same is done with
    principal directions (pca) and coordinates (neurons), each with their opposites, and with as
    many random directions as there are latents. `clear` is the share of the values above 0.95.

    sparse, tpp, scr: k-sparse probing, targeted probe perturbation and spurious correlation
    removal, as SAEBench defines them, on sentences, compared with an untrained dictionary. Their
    accuracies are means over the labels, so that chance is 0.5.

    output: `effect` is the change of the probability of a value's words after a step along the
    feature, at masked words of the concept (next words, for an autoregressive model). Features with
    a large effect are those to steer with; one with a high AUROC may have none. `steer` is what
    'dlmctl rollout --steer' takes.

    Examples:

    dlmctl prompts concepts --split test -n 1000 | dlmctl sae-probe saes -m runs/concepts

    dlmctl prompts concepts --split test -n 1000 |
    dlmctl sae-probe saes -m runs/concepts --measure sparse --top 1,5

    dlmctl prompts concepts -n 1000 |
    dlmctl sae-probe saes -m runs/concepts --measure output --choose output --concept topic=sport |
    jq -r '.steer // empty'
    """
    from dlmctl.models.loading import load_policy
    from dlmctl.sae.corpus import documents
    from dlmctl.sae.evaluation.placed import place_sae
    from dlmctl.sae.evaluation.probe import probe
    from dlmctl.sae.evaluation.sentences import collect, labelled
    from dlmctl.sae.formats.folders import read_saes

    folders, files = split_paths(paths)
    saved = read_saes(folders)
    plan = corpus_plan(corpus, seed, saved)
    policy = load_policy(own_model(saved, model), compute.device, compute.dtype)
    saes = [place_sae(name, one, policy) for name, one in saved.items()]
    places = list(dict.fromkeys((placed.layer, placed.positions) for placed in saes))
    total = input_lines(files)
    records = each(read_records(files, on_error), labelled, on_error)
    records = counted(records, "texts", quiet, total)
    stream = documents(records, policy, plan.context, on_error=on_error)
    sentences = collect(stream, policy, places, plan.law, compute.batch_size)
    rows = probe(policy, saes, sentences, probing, seed)
    write_rows(rows, COLUMNS[probing.measure], json)
