"""`dlmctl memo-eval prompts`: options and wiring."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.labels import Labels, label_fields, labelled
from dlmctl.commands.progress import counted
from dlmctl.commands.tables import write_rows
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record, dump, each, located, write_records
from dlmctl.settings import Knob, Without
from dlmctl.settings.compute import DeviceName
from dlmctl.settings.memorization import Bootstrap
from dlmctl.settings.replication import Replication
from dlmctl.settings.streams import Files, Json, OnErrorOption, Quiet, kept_in

COLUMNS = ("prompts", "noise_norm", "replicated", "clique", "clip", "noise_norm_auc")
SCORES = {"noise_norm": 1, "noise_norm_1": 1, "clique": 1, "tile_l2": -1}
"""Scores of a prompt, and the sign with which they are larger for what is memorized."""
OPTIONS = {"norm": ("norm_steps",), "clique": ("tiles", "tile_distance", "clique_size")}
"""What the summary says of how a measure was taken."""


def command(
    model: Annotated[
        str,
        Knob(
            "A text-to-image pipeline of diffusers, or a run of 'distill lcm'.",
            "-m",
            "--model",
            metavar="MODEL",
            env=True,
        ),
    ],
    files: Files = None,
    plan: Replication = Replication(),
    bootstrap: Annotated[Bootstrap, Without("seed")] = Bootstrap(),
    rows: Annotated[
        Path | None,
        Knob(
            "Write the record of each prompt with its scores, as soon as they are known.",
            "--rows",
            metavar="FILE",
            shown_default="off",
        ),
    ] = None,
    labels: Labels = None,
    json: Json = False,
    device: DeviceName = "auto",
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
) -> None:
    """Measure whether a text-to-image model replicates training images for prompts.

    Reads records with a prompt, text or caption, or lines of a .txt file, and takes samples of
    each. No training image is needed. noise_norm is how much a text changes the noise that the
    network predicts (L2), averaged over steps and samples, and noise_norm_1 the same of the first
    step; clique is the number of samples in the largest set of near duplicates, and a prompt is
    replicated if it has --clique-size; tile_l2 is the mean over pairs of the largest distance of
    their tiles; clip is the cosine of image and text. Writes one record: means over prompts with
    bootstrap intervals, and replicated, a share.

    If records have label (1 or 0) or split (train, or test, heldout, validation), it has the area
    under the ROC curve of every score but clip, with an interval, and the share of members that is
    found at given false positive rates: noise_norm_auc, noise_norm_tpr_at_0.01. Compare models at
    equal clip: one that ignores its prompts replicates nothing.

    Students by 'distill lcm' are sampled by their own scheduler. They have never seen the empty
    text: their noise_norm tells prompts apart, and is not on the scale of the teacher's.

    Examples:

    dlmctl memo-eval prompts -m sd-v1-4 --measure norm --norm-steps 1 --rows norms.jsonl
    prompts.jsonl

    dlmctl memo-eval prompts -m runs/lcm --clip clip-vit-large-patch14 -n 100 prompts.jsonl
    """
    fields = label_fields(labels)
    from dlmctl.distill.image_checkpoints import find_checkpoint
    from dlmctl.distill.text_pipelines import is_text_pipeline, load_text_pipeline
    from dlmctl.distill.text_runs import read_prompts, text_of
    from dlmctl.memorization.images.image_encoder import ClipScorer
    from dlmctl.memorization.images.replication import is_member, prompt_scores
    from dlmctl.models.loading import resolve_device

    where, directory = resolve_device(device), find_checkpoint(Path(model))
    if not is_text_pipeline(directory):
        raise UsageError(f"memo-eval prompts is for models of texts, and {model} has no encoder")
    pipeline = load_text_pipeline(directory, where)
    plan.steps_of(pipeline.is_student)
    clip = ClipScorer(plan.clip, where) if plan.clip else None
    known: list[tuple[dict[str, Any], bool | None]] = []
    faulty, total = kept_in(rows, on_error), input_lines(files)

    def scored(record: Record) -> Record:
        if rows:
            dump(record)  # raises before anything takes long
        member, text = is_member(record), text_of(record)
        scores = prompt_scores(pipeline, text, plan, clip)
        known.append((scores, member))
        return located({**record, **scores}, record.where)

    records = each(read_prompts(files or [], faulty), scored, faulty)
    shown: Iterator[Record] = counted(records, "prompts", quiet, total)
    if rows:
        write_records(shown, str(rows))
    else:
        for _ in shown:
            pass
    if not known:
        raise UsageError("the input has no prompts")
    about = {
        "model": pipeline.name,
        "revision": pipeline.revision,
        "step": (pipeline.training or {}).get("step"),
        "steps": plan.steps_of(pipeline.is_student),
        "guidance": plan.guidance,
        "samples": plan.samples,
        "seed": plan.seed,
        **(clip.about if clip else {}),
    }
    if unsaid := sum(member is None for _, member in known) % len(known):
        print(
            f"dlmctl: {unsaid} prompts have no label or split that says whether they are of "
            "training images: _auc is without them",
            file=sys.stderr,
        )
    row = {"prompts": len(known), **about, **_figures(known, plan, bootstrap)}
    write_rows([labelled(fields, row)], [c for c in COLUMNS if c in row], json)


def _figures(
    known: list[tuple[dict[str, Any], bool | None]], plan: Replication, bootstrap: Bootstrap
) -> dict[str, Any]:
    """Means of the scores, and how well they separate members from others."""
    import torch

    from dlmctl.memorization.text.membership import separation
    from dlmctl.report.bootstrap import mean_interval

    drawn = dataclasses.replace(bootstrap, seed=plan.seed)
    row = {n: getattr(plan, n) for each in plan.measures for n in OPTIONS.get(each, ())}
    members, others = (
        torch.tensor([member is kind for _, member in known]) for kind in (True, False)
    )
    told = bool(members.any() and others.any())
    if told:
        row |= {"members": int(members.sum()), "others": int(others.sum())}
    for name in (*SCORES, "replicated", "clip"):
        if name not in known[0][0]:
            continue
        values = torch.tensor([scores[name] for scores, _ in known], dtype=torch.float64)
        row[name] = float(values.mean())
        row[f"{name}_interval"] = list(mean_interval(values, drawn))
        if told and name in SCORES:
            signed = SCORES[name] * values
            found = separation(signed[members], signed[others], drawn)
            row |= {f"{name}_{figure}": value for figure, value in found.items()}
    return row
