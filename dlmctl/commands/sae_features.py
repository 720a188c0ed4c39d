"""`dlmctl sae-features`: options and wiring of the stage."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from dlmctl.commands.corpora import corpus_batches, corpus_plan, own_model
from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.progress import counted
from dlmctl.records.errors import UsageError
from dlmctl.records.files import check_free
from dlmctl.records.jsonl import write_records
from dlmctl.settings import Knob, Without
from dlmctl.settings.compute import Device, Seed
from dlmctl.settings.corpus import (
    AS_TRAINED,
    SHOWN_AS_TRAINED,
    Corpus,
    CorpusFiles,
    Positions,
    SaeModel,
    Sequences,
)
from dlmctl.settings.features import Neuronpedia, WindowCounts
from dlmctl.settings.streams import Output, Quiet

if TYPE_CHECKING:
    from dlmctl.models.policy import Policy
    from dlmctl.sae.formats.folders import SavedSae


def command(
    folder: Annotated[
        Path, Knob("Folder that 'dlmctl sae-convert' can read.", metavar="SAE", argument=True)
    ],
    files: CorpusFiles = None,
    model: SaeModel = None,
    layer: Annotated[
        int | None,
        Knob(
            "Block whose output is encoded, counted from 0.",
            minimum=0,
            shown_default="the autoencoder's own",
        ),
    ] = None,
    positions: Annotated[
        Positions | None,
        Knob(
            "Tokens that are encoded: the masked ones, the visible ones between them, all of both, "
            "or those of text in which nothing is masked.",
            shown_default="the autoencoder's own, else mask",
        ),
    ] = None,
    corpus: Annotated[Corpus, SHOWN_AS_TRAINED, Without("per_batch")] = AS_TRAINED,
    features: Annotated[
        str,
        Knob(
            "Features that get a record: random:N or, by firing rate, top:N of those alive (more "
            "than 15 activations), all of those, or numbers like 1,5,9.",
            metavar="CHOICE",
        ),
    ] = "random:100",
    windows: WindowCounts = WindowCounts(),
    html: Annotated[
        Path | None, Knob("Also write a page to browse, one file of HTML.", metavar="FILE")
    ] = None,
    delphi: Annotated[
        Path | None,
        Knob(
            "Also write the activations of all features (or of the numbers given with --features) "
            "as a cache for EleutherAI's delphi.",
            metavar="DIRECTORY",
        ),
    ] = None,
    neuronpedia: Neuronpedia = None,
    seed: Seed = 0,
    batch_size: Sequences = 16,
    device: Device = Device(),
    on_error: Annotated[
        Literal["fail", "skip"],
        Knob(
            "A record that cannot be used: fail ends the stage (exit 65), skip leaves it out.",
            "--on-error",
        ),
    ] = "fail",
    quiet: Quiet = False,
    output: Output = "-",
) -> None:
    """Show what the features of a sparse autoencoder respond to.

    Goes once through a corpus (records with `text`, `prompt` and `completion`, or `tokens`) under
    the masks of the forward process and writes a record for each feature: firing rate, mean and
    largest activation, histogram; firing rate and mean over ten bins of the level t; the tokens
    whose logits a step along its decoder row raises and lowers the most, through the gain of the
    last norm and the output head, without the blocks between; and windows of text where it is most
    active, where it is active (drawn in proportion to the activation) and where it is not. No two
    windows of a kind come from one document.

    'dlmctl sae-judge' continues from these records: 10 of the top and 5 of the weighted windows are
    shown to a judge for an explanation, and 2 of each are kept for the question afterwards.

    Examples:

    dlmctl sae-features saes/layer26-k50-mask corpus.jsonl --html features.html -o features.jsonl

    dlmctl sae-features saes/layer26-k50-mask corpus.jsonl --features top:50 --positions clean

    dlmctl sae-features saes/layer26-k50-mask corpus.jsonl --features 7,1203 | dlmctl sae-judge
    """
    import torch

    from dlmctl.models.blocks import block_name, check_layers
    from dlmctl.models.loading import load_policy
    from dlmctl.sae.features.code_batch import code_batches
    from dlmctl.sae.features.delphi import DelphiCache
    from dlmctl.sae.features.neuronpedia import source_of, with_neuronpedia
    from dlmctl.sae.features.page import with_page
    from dlmctl.sae.features.records import feature_records
    from dlmctl.sae.features.responses import collect_responses, parse_choice, select_slots
    from dlmctl.sae.formats.folders import read_sae

    # 1. The autoencoder, its model, and how the corpus is masked.
    saved = read_sae(folder)
    sae, by_name = saved.sae, {str(folder): saved}
    choice = parse_choice(features, sae.d_sae)
    if delphi is not None:
        check_free(delphi)
    if neuronpedia is not None:
        source_of(neuronpedia)
    plan = corpus_plan(corpus, seed, by_name)
    layer = saved.metadata.get("dlm_layer") if layer is None else layer
    if layer is None:
        raise UsageError(f"{folder} does not say which layer it is for: give --layer")
    policy = load_policy(own_model(by_name, model), device.device, device.dtype)
    check_layers(policy, [layer])
    kind = _positions(positions, saved, policy)

    # 2. One pass over the corpus.
    latents = torch.tensor(choice.features or range(sae.d_sae))
    total = None if plan.pack else input_lines(files).times(1 / batch_size)
    batches = counted(
        corpus_batches(files or [], policy, plan, batch_size, on_error), "batches", quiet, total
    )
    codes = code_batches(batches, policy, layer, sae, kind, latents)
    t_min, t_max = plan.law.t_min, plan.law.t_max
    with ExitStack() as stack:
        cache = None
        if delphi is not None:
            cache = stack.enter_context(DelphiCache(delphi, sae.d_sae, latents, policy.pad_id))
            codes = cache.recorded(codes)
        responses = collect_responses(codes, latents, windows, seed, t_min, t_max)
        if cache is not None:
            about = {
                "dataset_repo": " ".join(files or ["-"]),
                "dataset_column": "text",
                "model_name": policy.name,
                "batch_size": batch_size,
            }
            cache.write(block_name(policy, layer), about)
    stats = responses.stats
    print(
        f"dlmctl: {stats.documents} documents, {stats.tokens} tokens looked at; "
        f"{int(stats.alive.sum())} of {len(latents)} features alive",
        file=sys.stderr,
    )

    # 3. The records.
    timed = kind != "clean" and policy.diffusion and t_max > t_min
    facts = {
        "sae": str(folder),
        "model": policy.name,
        "revision": policy.revision,
        "layer": layer,
        "latents": sae.d_sae,
        "k": sae.k,
        "positions": kind,
        "t": [t_min, t_max] if timed else None,
    }
    slots = select_slots(responses, choice, seed)
    records = feature_records(responses, slots, policy, sae, facts)
    if html is not None:
        records = with_page(records, html)
    if neuronpedia is not None:
        records = with_neuronpedia(records, neuronpedia)
    write_records(records, output)


def _positions(given: Positions | None, saved: SavedSae, policy: Policy) -> Positions:
    """The tokens that are encoded: as given, else those the autoencoder was trained on."""
    kind = given or saved.metadata.get("dlm_positions")
    if kind is None:
        kind = "mask" if policy.diffusion else "clean"
    if kind not in get_args(Positions):
        raise UsageError(f"the autoencoder is for tokens of the kind '{kind}': give --positions")
    if kind == "mask" and not policy.diffusion:
        raise UsageError(f"{policy.name} is autoregressive, nothing is masked: --positions clean")
    return kind
