"""`dlmctl prompts`: options and wiring of the stage."""

from __future__ import annotations

from typing import Annotated

from dlmctl.commands.progress import counted
from dlmctl.records.jsonl import write_records
from dlmctl.records.shards import parse_shard
from dlmctl.settings import Knob
from dlmctl.settings.compute import Seed
from dlmctl.settings.prompts import Prompts
from dlmctl.settings.streams import OnErrorOption, Output, Quiet, Shard
from dlmctl.tasks.sources import DATASETS, GENERATORS, is_generated, prompts

DEFAULT_PROBLEMS = 32


def command(
    source: Annotated[
        str,
        Knob(
            f"{', '.join(GENERATORS)} (generated); {', '.join(DATASETS)} (data sets); a JSONL, CSV "
            "or parquet file; a directory or hub name that 'datasets' loads; - is JSONL on "
            "standard input.",
            argument=True,
        ),
    ] = "sudoku",
    limit: Annotated[
        int | None,
        Knob(
            "How many; 0 is no limit, and generated prompts never end.",
            "-n",
            "--limit",
            minimum=0,
            shown_default=f"{DEFAULT_PROBLEMS} generated prompts, else all",
        ),
    ] = None,
    settings: Prompts = Prompts(),
    shard: Shard = None,
    seed: Seed = 0,
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
    output: Output = "-",
) -> None:
    """Make prompts, or read them from files and datasets.

    Writes a record with `id`, `task`, `prompt` (or `messages`) and the fields that the task's
    verifier needs. Recognises the columns of TRL, verl, GSM8K, MATH and the benchmark files of d1,
    and with images those of EasyR1, Geometry3K and ViRL39K.

    `arithmetic` is sums and differences of numbers with two digits, as in 47+38-19=.

    `concepts` are short texts for the study of features. `sentences` has, for each sentence, its
    `start` and `end` in the completion, and its subject, tense, number, sentiment and topic. These
    vary independently, and many words express each of their values.

    `shapes` are images of two to five drawn things, with questions whose wording reveals nothing
    about the answer; `scene` says what the image shows. `images` are paths or data: URIs, and the
    prompt has a mark <image> for each.

    `canaries` are secrets to plant in training data: a key of eight random digits, then sixteen
    digits that only a model that was trained on them can know. 'dlmctl memo-eval text' asks for
    them.

    Examples:

    dlmctl prompts sudoku -n 512 --holes 6-10 --seed 1

    dlmctl prompts gsm8k --style instruct --split test

    dlmctl prompts concepts -n 20000

    dlmctl prompts shapes --kind count --kind sum --completions

    dlmctl prompts hiyouga/geometry3k --style instruct

    dlmctl prompts 4x4_test_sudoku.csv

    dlmctl prompts mine.parquet --map prompt=question --task exact
    """
    part, total = parse_shard(shard), None
    if is_generated(source, settings):
        limit = DEFAULT_PROBLEMS if limit is None else limit
        if limit:
            first, end = part.bounds(limit) if part else (0, limit)
            total = end - first
    records = prompts(
        source, settings, limit=limit or None, seed=seed, on_error=on_error, shard=part
    )
    write_records(counted(records, "prompts", quiet, total), output)
