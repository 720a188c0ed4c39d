"""`dlmctl sae-features`: options and wiring of the stage."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from dlmctl.commands.corpora import (
    Corpus,
    Level,
    OwnContext,
    OwnHidePrompt,
    OwnModel,
    OwnPack,
    Sequences,
    corpus_batches,
    own_model,
    own_plan,
)
from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.options import Device, Dtype, Output, Quiet, Seed
from dlmctl.commands.progress import counted
from dlmctl.records.errors import UsageError
from dlmctl.records.files import check_free
from dlmctl.records.jsonl import write_records

if TYPE_CHECKING:
    from torch import Tensor

    from dlmctl.models.policy import Policy
    from dlmctl.sae.corpus import MaskedBatch
    from dlmctl.sae.features.active import Active

PositionsOption = Literal["mask", "unmask", "all", "clean"]


def command(
    source: Annotated[
        Path, typer.Argument(metavar="SAE", help="Folder that 'dlmctl sae-convert' can read.")
    ],
    files: Corpus = None,
    model: OwnModel = None,
    layer: Annotated[
        int | None,
        typer.Option(
            min=0, show_default="the autoencoder's own", help="Block whose output is looked at."
        ),
    ] = None,
    positions: Annotated[
        PositionsOption | None,
        typer.Option(
            show_default="the autoencoder's own, else mask",
            help="Tokens looked at: masked ones, visible ones between them, both, or those of "
            "text of which nothing is masked.",
        ),
    ] = None,
    level: Level = None,
    pack: OwnPack = None,
    hide_prompt: OwnHidePrompt = None,
    context: OwnContext = None,
    features: Annotated[
        str,
        typer.Option(
            metavar="CHOICE",
            help="Features that get a record: random:N or, by firing rate, top:N of those alive "
            "(more than 15 activations), all of those, or numbers like 1,5,9.",
        ),
    ] = "random:100",
    top: Annotated[int, typer.Option(min=1, help="Windows around the strongest activations.")] = 12,
    weighted: Annotated[
        int, typer.Option(min=0, help="Windows drawn in proportion to the activation.")
    ] = 7,
    inactive: Annotated[
        int, typer.Option(min=0, help="Random windows in which the feature is not active.")
    ] = 10,
    radius: Annotated[
        int, typer.Option(min=0, help="Tokens of a window on either side of the middle one.")
    ] = 10,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page to browse as well, one file of HTML."),
    ] = None,
    delphi: Annotated[
        Path | None,
        typer.Option(
            metavar="DIRECTORY",
            help="Write the activations of all features (of the numbers given with --features) "
            "as a cache of EleutherAI's delphi as well.",
        ),
    ] = None,
    seed: Seed = 0,
    batch_size: Sequences = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    on_error: Annotated[
        Literal["fail", "skip"],
        typer.Option(
            "--on-error",
            help="A record that cannot be used: fail ends the stage (exit 65), skip leaves it out.",
        ),
    ] = "fail",
    quiet: Quiet = False,
    output: Output = "-",
) -> None:
    """Show what the features of a sparse autoencoder respond to.

    Goes once through a corpus (records with `text`, `prompt` and `completion`, or `tokens`) under
    the masks of the forward process and writes a record for each feature: firing rate, mean,
    largest activation, histogram; firing rate and mean over ten bins of the level t; the tokens
    whose logits a step along its decoder row raises and lowers the most, by the output head alone,
    without the blocks between and the last norm; and windows of text where it is most active, where
    it is active (drawn in proportion to the activation) and where it is not. No two windows of a
    kind are from one document.

    'dlmctl sae-judge' goes on from these records: 10 of the top and 5 of the weighted windows are
    shown to a judge for an explanation, and 2 of each are kept for the question afterwards.

    Examples:

    dlmctl sae-features saes/layer26-k50-mask corpus.jsonl --html features.html -o features.jsonl

    dlmctl sae-features saes/layer26-k50-mask corpus.jsonl --features top:50 --positions clean

    dlmctl sae-features saes/layer26-k50-mask corpus.jsonl --features 7,1203 | dlmctl sae-judge
    """
    import torch

    from dlmctl.models.blocks import check_layers
    from dlmctl.models.loading import load_policy
    from dlmctl.sae.features.active import active_features
    from dlmctl.sae.features.page import with_page
    from dlmctl.sae.features.records import feature_records
    from dlmctl.sae.features.responses import chosen_slots, look, parse_choice
    from dlmctl.sae.features.windows import Plan
    from dlmctl.sae.formats.folders import read_sae

    saved = read_sae(source)
    sae, known = saved.sae, saved.metadata
    choice = parse_choice(features, sae.d_sae)
    if delphi is not None:
        check_free(delphi)
    plan = Plan(top, weighted, inactive, radius, seed)
    own = {str(source): saved}
    corpus = own_plan(own, level, context, pack, hide_prompt, seed=seed)
    law = corpus.law
    layer = _first(layer, known.get("dlm_layer"))
    if layer is None:
        raise UsageError(f"{source} does not say which layer it is for: give --layer")
    policy = load_policy(own_model(own, model), device, dtype)
    check_layers(policy, [layer])
    kind = _positions(positions, known, policy)

    latents = torch.tensor(choice.features or range(sae.d_sae))
    lines = input_lines(files)
    batches: Iterator[MaskedBatch] = corpus_batches(
        files or [], policy, corpus, batch_size, on_error
    )
    total = None if corpus.pack else lines.times(1 / batch_size)
    batches = counted(batches, "batches", quiet, total)
    stream: Iterable[Active] = active_features(batches, policy, layer, sae, kind, latents)
    with ExitStack() as stack:
        if delphi is not None:
            name = " ".join(files or ["-"])
            stream = stack.enter_context(
                _cached(stream, delphi, policy, layer, sae.d_sae, latents, name, batch_size)
            )
        findings = look(stream, latents, plan, law.t_min, law.t_max)
    activity = findings.activity
    print(
        f"dlmctl: {activity.documents} documents, {activity.tokens} tokens looked at; "
        f"{int(activity.alive.sum())} of {len(latents)} features alive",
        file=sys.stderr,
    )
    timed = kind != "clean" and policy.diffusion and law.t_max > law.t_min
    facts = {
        "sae": str(source),
        "model": policy.name,
        "revision": policy.revision,
        "layer": layer,
        "latents": sae.d_sae,
        "k": sae.k,
        "positions": kind,
        "t": [law.t_min, law.t_max] if timed else None,
    }
    records = feature_records(findings, chosen_slots(findings, choice, seed), policy, sae, facts)
    write_records(records if html is None else with_page(records, html), output)


@contextmanager
def _cached(
    stream: Iterable[Active],
    directory: Path,
    policy: Policy,
    layer: int,
    d_sae: int,
    latents: Tensor,
    corpus: str,
    batch_size: int,
) -> Iterator[Iterable[Active]]:
    """The stream; when it has gone by, the cache is put in its place."""
    from dlmctl.models.blocks import block_name
    from dlmctl.sae.features.delphi import DelphiCache

    names = {"dataset_repo": corpus, "dataset_column": "text", "model_name": policy.name}
    with DelphiCache(directory, d_sae, latents, policy.pad_id) as cache:
        yield cache.passing(stream)
        cache.write(block_name(policy, layer), {**names, "batch_size": batch_size})


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


def _positions(
    given: PositionsOption | None, known: Mapping[str, Any], policy: Policy
) -> PositionsOption:
    """Which tokens are looked at."""
    kind = _first(given, known.get("dlm_positions"), "mask" if policy.diffusion else "clean")
    if kind not in get_args(PositionsOption):
        raise UsageError(f"the autoencoder is for tokens of the kind '{kind}': give --positions")
    if kind == "mask" and not policy.diffusion:
        raise UsageError(f"{policy.name} is autoregressive, nothing is masked: --positions clean")
    return kind
