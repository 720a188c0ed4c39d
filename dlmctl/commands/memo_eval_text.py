"""`dlmctl memo-eval text`: options and wiring."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

from dlmctl.commands.progress import counted
from dlmctl.commands.tables import write_rows
from dlmctl.records.jsonl import read_records, write_records
from dlmctl.settings import Knob
from dlmctl.settings.compute import Compute, Model
from dlmctl.settings.memorization import Extraction
from dlmctl.settings.models import Prompting, Reading
from dlmctl.settings.streams import Files, Json, OnErrorOption, Quiet, kept_in

FIGURES = ("extractable", "exact", "near", "near_bleu", "log_prob_per_token")


def command(
    files: Files = None,
    model: Model = "builtin:puzzles",
    reading: Reading = Reading(),
    prompting: Prompting = Prompting(),
    heldout: Annotated[
        Path | None,
        Knob(
            "Texts that the model has not seen, for which the rows have the same figures.",
            "--heldout",
            metavar="FILE",
            shown_default="off",
        ),
    ] = None,
    plan: Extraction = Extraction(),
    rows: Annotated[
        Path | None,
        Knob("Also write a record for each text.", "--rows", metavar="FILE", shown_default="off"),
    ] = None,
    json: Json = False,
    compute: Compute = Compute(),
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
) -> None:
    """Measure how many texts a language model reconstructs when it is given a part of them.

    Reads records with a completion or a text, such as those that a model was trained on. Writes a
    row for each mode and number of steps: the share that is extractable, that is, sampled at least
    once in -n samples with probability -p; the shares that the most likely tokens reconstruct
    exactly and nearly, by edits (near: at most a tenth of the tokens) and by sentence BLEU-4
    (near_bleu: 0.75 or more); common_run, the length of the longest run of tokens that they
    reconstruct; and the log-probability per token. A model of few steps extracts less for that
    reason alone: compare models at equal steps. With --mode random the tokens asked for are taken
    as one sequence, whatever is given between them.

    Examples:

    dlmctl memo-eval text -m runs/base --mode prefix,edge --heldout unseen.jsonl canaries.jsonl
    """
    from dlmctl.memorization.text.text_memory import text_memory
    from dlmctl.models.loading import load_policy

    faulty = kept_in(rows, on_error)
    texts = read_records(files or [], faulty)
    unseen = read_records([str(heldout)], faulty) if heldout else iter(())
    policy = load_policy(reading.name(model), compute.device, compute.dtype, prompting)
    of_texts: list[dict[str, Any]] = []
    note = of_texts.append if rows else None
    summary = text_memory(policy, texts, unseen, plan, compute.batch_size, note, faulty)
    # The time that a row takes is proportional to its steps.
    counts = plan.step_counts * len(plan.modes) if policy.diffusion else [1]
    reached = list(accumulate(counts))
    places = iter(reached)
    shown = counted(summary, "steps", quiet, reached[-1], at=lambda _: next(places))
    write_rows(shown, ("mode", "steps", "texts", *FIGURES), json)
    if rows is not None:
        write_records(of_texts, str(rows))
