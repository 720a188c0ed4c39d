"""`dlmctl sae-steering`: options and wiring."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from dlmctl.commands.progress import counted, counting
from dlmctl.commands.tables import print_table, with_error
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record, read_records, write_records
from dlmctl.settings import Knob
from dlmctl.settings.compute import Compute, Seed
from dlmctl.settings.steering import ConceptScores, FluencyScores
from dlmctl.settings.streams import Files, Json, OnErrorOption, Quiet

if TYPE_CHECKING:
    from dlmctl.sae.steering.questions import Answers
    from dlmctl.sae.steering.twins import Name, Twins

AMPLITUDES = ("feature", "amplitude", "unit", "scope", "push", "n", "c_before")
MEASURES = ("C", "C_share", "P", "P_clipped", "S", "ppl_ratio")
FRONTS = ("feature", "unit", "scope", "at_cost", "amplitude", "push", "C", "C_share", "reached")
"""Columns of the two tables."""


def command(
    baseline: Annotated[
        str,
        Knob(
            "Completions of the same prompts with the same seed, sampled without --steer.",
            metavar="FILE",
        ),
    ],
    files: Files = None,
    concept: ConceptScores = ConceptScores(),
    fluency: FluencyScores = FluencyScores(),
    weight: Annotated[
        float, Knob("Weight of P in S = C + lambda P.", "--lambda", minimum=0.0)
    ] = 0.3,
    at_cost: Annotated[
        float,
        Knob(
            "Read the front of each feature off at this cost in perplexity: 0.2 is a fifth more.",
            minimum=0.001,
        ),
    ] = 0.2,
    seed: Seed = 0,
    compute: Compute = Compute(),
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Score what steering does to a concept and to fluency.

    Reads records of 'dlmctl rollout --steer', each steered by one feature, and pairs them with
    --baseline by id and sample. Writes a row for each feature and way of steering: C = (c_after -
    c_before) / 100 for the concept, P = (ppl_before - ppl_after) / ppl_before for the perplexity of
    prompt and completion, S = C + lambda P; and a row over the features if there are several.

    Values are means over the n completions, those of the last row means over features. P has no
    lower bound: C_median, P_median and S_median are medians of the same numbers, P_clipped is the
    mean of P clipped to [-1, 1], and S_clipped = C + lambda P_clipped. C_share is C / (1 - c_before
    / 100), the share of the possible gain. log_ppl_ratio is the mean of log(ppl_after /
    ppl_before), ppl_ratio its exponential. Behind each of these stands its standard error (_se),
    which counts prompts, not completions. push is the mean |push| / |H| (see rollout --steer).
    ppl_before and ppl_after are medians. n_C and n_P count the completions behind C and P; `failed`
    counts answers of the judge without a number, which are left out. `bound` is true if
    perplexities are upper bounds.

    One amplitude costs two models different amounts of fluency, so models are compared at equal
    cost. For each feature with at least two amplitudes of one sign a row with row: front says C,
    C_share, push and amplitude where the cost is first --at-cost; they are linear in log_ppl_ratio
    between neighbouring amplitudes, beginning with amplitude 0. Another row has the means over
    features. Where a front does not reach the cost they are null, and `reason` says why. Errors are
    from 1000 bootstrap samples of the prompts; `reached` is the share of the samples in which the
    front reaches the cost. A terminal shows part of this, --json all.

    Examples:

    dlmctl sae-steering --baseline plain.jsonl --concept-from reward
    --fluency openai-community/gpt2 steered.jsonl

    dlmctl sae-steering --baseline plain.jsonl --concept "the sea" --judge runs/judge steered.jsonl

    dlmctl sae-steering --baseline plain.jsonl --concept-from reward --fluency runs/judge --json
    steered.jsonl | dlmctl plot -x log_ppl_ratio -y C -y C_share --by feature -o fronts.png

    dlmctl sae-steering --baseline plain.jsonl --concept "the sea" --judge-prompts asked.jsonl
    steered.jsonl && dlmctl rollout -m runs/judge -n 1 --temperature 0 -o answers.jsonl asked.jsonl
    && dlmctl sae-steering --baseline plain.jsonl --judge-answers answers.jsonl steered.jsonl
    """
    from dlmctl.sae.steering.fronts import front_rows
    from dlmctl.sae.steering.questions import Answers
    from dlmctl.sae.steering.scores import outcomes_of, rows_of
    from dlmctl.sae.steering.twins import read_baseline, read_sampled_text, read_twins

    score_field = None if concept.concept_from == "judge" else concept.concept_from
    judged = concept.judge or concept.judge_prompts or concept.judge_answers
    if not (score_field or judged or fluency.fluency or fluency.perplexity):
        raise UsageError(
            "nothing says what to score by: give --judge, --judge-answers or --concept-from for "
            "the concept, --fluency or --perplexity for fluency"
        )
    read = partial(read_sampled_text, score_field=score_field, perplexity=fluency.perplexity)
    unsteered = read_baseline(read_records([baseline], on_error), read, on_error)
    twins = list(read_twins(read_records(files or [], on_error), unsteered, read, on_error))
    if not twins:
        raise UsageError("no steered records came in; there is nothing to score")
    if concept.judge_prompts is not None and concept.judge is None:
        write_records(_questions(twins, concept), concept.judge_prompts)
        return
    answers: Answers | None = None
    if concept.judge is not None:
        answers = _ask_judge(twins, concept, compute, quiet)
    elif concept.judge_answers is not None:
        answers = Answers(read_records([concept.judge_answers], on_error))
    perplexity, bound = None, None
    if fluency.fluency is not None:
        perplexity, bound = _perplexities(twins, fluency, seed, compute, quiet)
    outcomes = list(outcomes_of(twins, answers.of if answers else None, perplexity))
    if answers is not None and not answers.used:
        raise DataError(
            "none of the scores is about a text of these records", concept.judge_answers or ""
        )
    rows = rows_of(outcomes, weight, bound)
    fronts = front_rows(outcomes, at_cost, seed, bound)
    if json or not sys.stdout.isatty():
        write_records([*rows, *fronts])
        return
    _show(rows, (*AMPLITUDES, *MEASURES))
    if fronts:
        print()
        _show(fronts, (*FRONTS, *(["reason"] if any(row["reason"] for row in fronts) else [])))


def _show(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    print_table(rows, {name: name.replace("_", " ") for name in columns}, with_error)


def _questions(twins: Sequence[Twins], settings: ConceptScores) -> Iterator[Record]:
    from dlmctl.sae.steering.questions import explanations, questions

    if settings.concepts is None:
        return questions(twins, lambda _: settings.concept or "")
    return questions(twins, explanations(read_records([settings.concepts]), settings.concepts))


def _ask_judge(
    twins: Sequence[Twins], settings: ConceptScores, compute: Compute, quiet: bool
) -> Answers:
    """Answers of --judge, kept in --judge-prompts; those it cannot read have an error."""
    from dlmctl.sae.judges import judge_model
    from dlmctl.sae.steering.questions import Answers

    assert settings.judge is not None
    ask = judge_model(settings.judge, settings.judge_length, compute)
    answered = list(counted(ask(_questions(twins, settings)), "answers", quiet, len(twins)))
    if settings.judge_prompts is not None:
        write_records(answered, settings.judge_prompts)
    return Answers(answered)


def _perplexities(
    twins: Sequence[Twins], settings: FluencyScores, seed: int, compute: Compute, quiet: bool
) -> tuple[dict[Name, float | None], bool]:
    """Those of all texts, and whether they are upper bounds."""
    from dlmctl.diffusion.scoring import MaskPlan
    from dlmctl.models.loading import load_policy
    from dlmctl.sae.steering.fluency import perplexities

    texts = [text for pair in twins for text in (pair.before, pair.after)]
    with counting("texts", quiet, len(texts)) as gauge:
        policy = load_policy(settings.fluency or "", compute.device, compute.dtype)
        plan, size = MaskPlan(samples=settings.masks, seed=seed), compute.batch_size
        results = perplexities(policy, texts, settings.fluency_tokens, plan, size, gauge.reach)
    return results, policy.diffusion
