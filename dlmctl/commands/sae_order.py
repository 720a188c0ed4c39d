"""`dlmctl sae-order`: options and wiring of the stage."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from dlmctl.commands.options import (
    BatchSize,
    Device,
    Dtype,
    Files,
    Json,
    Model,
    OnErrorOption,
    Output,
    Quiet,
    Seed,
)
from dlmctl.commands.progress import counted, times
from dlmctl.commands.prompt_source import Task, prompt_records, prompt_total
from dlmctl.commands.sampling import (
    BlockLength,
    CfgScale,
    EarlyStop,
    Eos,
    Factor,
    GenLength,
    Steps,
    Temperature,
    Threshold,
)
from dlmctl.commands.tables import print_table
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import write_records

if TYPE_CHECKING:
    from dlmctl.settings.sampler import Remasking

MEANS = ("s_pre", "s_pre_last5", "lock_ratio", "jump", "d_post", "flips_post")
SIGNALS = ("signal", "auroc", "auroc_step", "auroc_choice", "used", "right")
SHOWN = 8
"""Features that the table names."""


def command(
    sae: Annotated[
        list[str],
        typer.Option(
            metavar="SAE[@LAYER]",
            help="Folder of an autoencoder, LAYER the block (counted from 0) where the folder does "
            "not name it; repeatable.",
        ),
    ],
    files: Files = None,
    model: Model = "builtin:puzzles",
    orders: Annotated[
        str,
        typer.Option(
            metavar="ORDER,…",
            help="Orders to compare, as --remasking of 'dlmctl rollout' has them; features are "
            "compared with the first. random is the paper's 'origin'; sae is no part of the paper.",
        ),
    ] = "low_confidence,random,margin,entropy",
    truth: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            show_default="none",
            help="Field with the one right completion, for instance solution: asks which signals "
            "tell right proposals from wrong ones. Text, or token ids with null where any will do.",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("-n", "--samples", min=1, help="Completions for each prompt and order.")
    ] = 1,
    gen_length: GenLength = None,
    block_length: BlockLength = None,
    steps: Steps = None,
    temperature: Temperature = 0.0,
    cfg_scale: CfgScale = 0.0,
    threshold: Threshold = None,
    factor: Factor = None,
    eos: Eos = "normal",
    early_stop: EarlyStop = False,
    task: Task = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts taken from --task.")] = 32,
    summary: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default="none",
            help="Where the rows over all completions go; - is standard output, where the records "
            "go to a file.",
        ),
    ] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
    json: Json = False,
    output: Output = "-",
) -> None:
    """Follow features while completions are sampled in several orders.

    Reads prompts as rollout does and writes a record for each order, prompt and sample, that verify
    reads and 'stats --by remasking' counts. All orders have the same prompts and the same noise.
    Its field features has for each autoencoder, of the passes in which the completion was made:
    s_pre, mean Jaccard similarity of the active features of a position with those of the step
    before while it is masked (s_pre_last5: the last five steps of that); lock_ratio, share of these
    steps in which the strongest feature stays; jump, 1 - similarity in the step that sees the token
    first; d_post, mean 1 - similarity after that; flips_post, changes of the strongest feature
    after that. Curves have 10 bins of the place in the completion, or of the share decided.

    --summary has these as means (row: mean); the 20 features whose number of positions differs
    most from the first order's, summed over 20 bins of the share decided (row: feature); and with
    --truth the AUROC of signals for "the model's likeliest token here is the right one" (row:
    signal): over all proposals, within a step of all completions, and within a step of one
    completion, which is what an order chooses from. Up to 131072 proposals of an order count. A
    terminal shows some of this in place of the records.

    Passes go over whole sequences: there is no --cache here, and no --compile.

    Examples:

    dlmctl sae-order --task sudoku --truth solution --sae saes/layer2-k8-mask

    dlmctl sae-order --sae saes/layer1-k8-mask --sae saes/layer2-k8-mask --orders entropy,random
    --summary orders.jsonl prompts.jsonl | dlmctl verify | dlmctl stats --by remasking
    """
    from dlmctl.diffusion.sampling import configured
    from dlmctl.models.loading import load_policy
    from dlmctl.sae.order.feature_watch import read_dictionaries
    from dlmctl.sae.order.study import OrderStudy
    from dlmctl.settings.sampler import Sampler

    if files and task is not None:
        raise UsageError("prompts come from FILE or from --task, not from both")
    if summary == "-" and output == "-":
        raise UsageError("standard output has the records: give --summary a file, or -o one")
    chosen = _orders(orders)
    policy = load_policy(model, device, dtype)
    settings = configured(
        policy,
        Sampler(
            gen_length=gen_length,
            block_length=block_length,
            steps=steps,
            temperature=temperature,
            cfg_scale=cfg_scale,
            threshold=threshold,
            factor=factor,
            eos=eos,
            early_stop=early_stop,
        ),
    )
    study = OrderStudy(policy, read_dictionaries(sae, policy), settings, chosen, truth)
    total = times(prompt_total(files or [], task, prompts, None), samples * len(chosen))
    source = prompt_records(files or [], task, prompts, seed, on_error, repeat=False)
    made = study.run(source, samples, seed, batch_size, on_error)
    records = counted(made, "completions", quiet, total)
    shown = output == "-" and not json and sys.stdout.isatty()
    if shown:
        for _ in records:
            pass
    else:
        write_records(records, output)
    rows = list(study.summary())
    if shown:
        _show(rows)
    if summary is not None:
        write_records(rows, summary)


def _orders(text: str) -> list[Remasking]:
    from dlmctl.settings.sampler import Remasking

    known = get_args(Remasking)
    names: list[Remasking] = list(dict.fromkeys(text.split(",")))  # type: ignore[arg-type]
    for name in names:
        if name not in known:
            raise UsageError(f"--orders {text}: no order '{name}'; there are {', '.join(known)}")
    return names


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Tables of the means, of the features and of the signals, where there are any."""
    rows = [{**row, "sae": Path(row["sae"]).name} for row in rows]
    where = ("order", "sae", "layer")
    means = [row for row in rows if row["row"] == "mean"]
    features = _joined(row for row in rows if row["row"] == "feature")
    signals = [row for row in rows if row["row"] == "signal"]
    for part, names in (
        (means, (*where, "completions", *MEANS)),
        (features, (*where, "reference", "features")),
        (signals, (*where, *SIGNALS)),
    ):
        if part:
            print_table(part, {name: name.replace("_", " ") for name in names})
            print()


def _joined(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each order and autoencoder, with the features of highest score."""
    joined: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = row["order"], row["sae"], row["layer"]
        entry = joined.setdefault(key, {**row, "features": []})
        entry["features"].append(f"{row['feature']} ({row['score']:.3g})")
    return [{**row, "features": ", ".join(row["features"][:SHOWN])} for row in joined.values()]
