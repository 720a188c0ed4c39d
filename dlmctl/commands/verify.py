"""`dlmctl verify`: options and wiring of the stage."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated

from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.progress import counted
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import each, write_records
from dlmctl.records.resume import Resume, Rule
from dlmctl.records.shards import parse_shard, read_shard
from dlmctl.settings import Knob
from dlmctl.settings.layout import Tags
from dlmctl.settings.streams import Files, Stage
from dlmctl.settings.verify import Asking, Judging, Matching, Rewarding
from dlmctl.verifiers.evaluations import from_evaluation
from dlmctl.verifiers.registry import VERIFIERS, find_verifier, verify


def command(
    files: Files = None,
    verifier: Annotated[
        list[str] | None,
        Knob(
            f"{', '.join(VERIFIERS)}, or your own as module:function; repeatable.",
            metavar="NAME",
            shown_default="by the record's task",
        ),
    ] = None,
    judging: Judging = Judging(),
    matching: Matching = Matching(),
    asking: Asking = Asking(),
    rewarding: Rewarding = Rewarding(),
    tags: Tags = Tags(),
    stage: Stage = Stage(),
) -> None:
    """Give each completion its rewards.

    Reads records with `completion` and the fields of their task, and adds `rewards` (one number
    per verifier), `reward` (their weighted sum) and `verdict` (what was extracted, and why). Reads
    the evaluation files of d1 (`generation`, `ground_truth`) as they are.

    sudoku: 1 if the grid is right by the rules. sudoku-units: share of rows, columns and boxes that
    are right. sudoku-cells: share of the empty cells that equal the stored solution.

    countdown: 1 if the expression makes the target from the given numbers. countdown-steps: share
    of what is right in an answer that is worked out, as 'dlmctl prompts --worked' writes it.

    vqa: 1 if a short answer about an image matches one of `answers`, or `answer`. layout: 1 if the
    completion is <description>...</description> <think>...</think> and a box. grounding: F1 of the
    things in the description against `scene`. Records of shapes get 0.9 vqa + 0.1 layout; their
    grounding is recorded, but not rewarded.

    choice: 1 if the answer names the right one of several choices, by its letter or by its text.
    `answer` is a letter, an index from 0 or a text of `choices`.

    regex: 1 if the completion matches `pattern`, or --pattern. json-schema: 1 if the completion, or
    the fence in it, is JSON and valid by `schema`; references to other documents are not fetched.

    judge: the score that a model behind --judge-url gives, from 0 to 1 by --judge-scale. A reply
    without a score is an error of the record. reward-model: the logit, or the probability of a
    label, that the sequence classifier --reward-model gives to prompt and completion.

    code: 1 if Python passes its tests: `tests` (a list of assertions, or Python), or the fields of
    HumanEval and MBPP; or if, as a program, it prints what is expected for every input, in records
    of APPS and LiveCodeBench (`input_output`, `public_test_cases` and `private_test_cases`, or
    `tests` with objects of `input` and `output`). White space at the ends of lines does not count,
    nor how a number is written; --time-limit is for all inputs together. It runs in its own process
    with limits on time and memory. On Linux, the kernel lets it read only the standard library,
    lets it write no file, and denies it the network and other processes; if the kernel cannot, code
    runs only with --allow-unconfined. This does not protect from bugs of the kernel, nor from code
    that sets out to deceive its assertions, which run in the same interpreter.

    Examples:

    dlmctl rollout | dlmctl verify | dlmctl stats

    dlmctl verify --verifier math --verifier format --weight format=0.2 samples.jsonl

    dlmctl verify --verifier mychecks:polite samples.jsonl

    dlmctl verify --exec ./check samples.jsonl
    """
    if judging.preset and (verifier or judging.program):
        raise UsageError("--preset chooses the verifiers: leave out --verifier and --exec")
    part = parse_shard(stage.shard)
    total = input_lines(files).times(1 / part.count if part else 1)
    source = read_shard(files or [], part, stage.on_error)
    resume = Resume(stage.output, stage.resume)
    if resume.done:
        return
    # Where `python -m` would look too: module:function next to the data.
    sys.path.insert(0, os.getcwd())
    used: set[str] = set()
    if part is not None:  # another part may have records for a weight
        for name in judging.weights.keys() - ({"exec"} if judging.program else set()):
            find_verifier(name)
        used.update(judging.weights)
    batch = rewarding.batch_size if "reward-model" in (verifier or ()) else 1
    records = resume.rest(
        each(source, from_evaluation, stage.on_error),
        Rule(
            frozenset({"rewards", "reward", "verdict"}),
            skips=stage.on_error == "skip",
            begins=lambda _, made: made.lines % batch == 0,
        ),
        note=lambda line: used.update(line.get("rewards") or {}),
    )
    settings = {"matching": matching, "asking": asking, "rewarding": rewarding}
    verified = verify(
        records, verifier, judging, tags, settings=settings, on_error=stage.on_error, used=used
    )
    with contextlib.closing(verified):
        shown = counted(verified, "records", stage.quiet, total, resume.lines)
        write_records(shown, stage.output, resume)
