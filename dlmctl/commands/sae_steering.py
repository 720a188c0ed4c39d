"""`dlmctl sae-steering`: options and wiring."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dlmctl.commands.options import (
    BatchSize,
    Device,
    Dtype,
    Files,
    Json,
    OnErrorOption,
    Quiet,
    Seed,
)
from dlmctl.commands.progress import counted, counting
from dlmctl.commands.tables import write_rows
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record, read_records, write_records
from dlmctl.settings.sampler import Sampler

if TYPE_CHECKING:
    from dlmctl.sae.steering.fluency import Perplexities
    from dlmctl.sae.steering.scores import Pair, Treatment

COLUMNS = (
    *("feature", "amplitude", "scope", "n", "c_before", "c_after"),
    *("C", "P", "P_clipped", "S"),
)


def command(
    baseline: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Completions of the same prompts with the same seed, sampled without --steer.",
        ),
    ],
    files: Files = None,
    concept_from: Annotated[
        Literal["judge", "reward", "score"],
        typer.Option(
            help="How strongly a text expresses the concept: as a judge says, as the field reward "
            "of the records says (0 to 1, of 'dlmctl verify'), or their field score (0 to 100)."
        ),
    ] = "judge",
    concept: Annotated[
        str | None,
        typer.Option(metavar="TEXT", show_default="none", help="What the judge is to look for."),
    ] = None,
    concepts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default="none",
            help="The same for each feature: records with feature and explanation, and with sae "
            "and layer where a number alone does not tell.",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(metavar="MODEL", show_default="none", help="A model that judges, greedily."),
    ] = None,
    judge_length: Annotated[int, typer.Option(min=1, help="Tokens of an answer of --judge.")] = 16,
    judge_prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default="none",
            help="Write the questions as prompt records and nothing else, for 'dlmctl rollout -n 1 "
            "--temperature 0' or any other program; with --judge its answers too, beside the "
            "scores.",
        ),
    ] = None,
    judge_answers: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default="none",
            help="Read the questions' answers (judged and completion), or scores of any origin: "
            "id, sample, score (0 to 100), and those of sae, layer, feature, amplitude, scope, "
            "time that tell texts apart; no amplitude is an unsteered text.",
        ),
    ] = None,
    fluency: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            show_default="none",
            help="Perplexities under this model: exact for an autoregressive one, an upper bound "
            "from the ELBO for a diffusion model.",
        ),
    ] = None,
    fluency_tokens: Annotated[
        int, typer.Option(min=2, help="With --fluency: first tokens of a text, which count.")
    ] = 512,
    masks: Annotated[
        int,
        typer.Option(
            "-k", "--masks-per-sample", min=2, help="With --fluency: masks of a diffusion model."
        ),
    ] = 16,
    perplexity: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            show_default="none",
            help="Field of the records that holds their perplexity, instead of --fluency.",
        ),
    ] = None,
    weight: Annotated[
        float, typer.Option("--lambda", min=0.0, help="Weight of P in S = C + lambda P.")
    ] = 0.3,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Score what steering does to a concept and to fluency.

    Reads records of 'dlmctl rollout --steer', one feature each, and pairs them with --baseline by
    id and sample. Writes a row for each feature and way of steering: C = (c_after - c_before) / 100
    for the concept, P = (ppl_before - ppl_after) / ppl_before for the perplexity of prompt and
    completion, S = C + lambda P; and a row over the features where there are several.

    Values are means over the n completions, those of the last row means over features. P has no
    lower bound: C_median, P_median and S_median are medians of the same numbers, P_clipped is the
    mean of P clipped to [-1, 1], and S_clipped = C + lambda P_clipped. ppl_before and ppl_after are
    medians. n_C and n_P count the completions that C and P are of; `failed` counts answers of the
    judge without a number, which are left out. `bound` is true where perplexities are upper bounds.
    A terminal shows some of this, --json all.

    Examples:

    dlmctl sae-steering --baseline plain.jsonl --concept-from reward
    --fluency openai-community/gpt2 steered.jsonl

    dlmctl sae-steering --baseline plain.jsonl --concept "the sea" --judge runs/judge steered.jsonl

    dlmctl sae-steering --baseline plain.jsonl --concept "the sea" --judge-prompts asked.jsonl
    steered.jsonl && dlmctl rollout -m runs/judge -n 1 --temperature 0 -o answers.jsonl asked.jsonl
    && dlmctl sae-steering --baseline plain.jsonl --judge-answers answers.jsonl steered.jsonl
    """
    from dlmctl.sae.steering.judge import Answers, questions
    from dlmctl.sae.steering.scores import baseline_of, outcomes_of, pairs_of, rows_of, text_of

    _check_judging(judge, judge_prompts, judge_answers, concept_from, concept, concepts)
    if fluency is not None and perplexity is not None:
        raise UsageError("perplexities come from --fluency or from --perplexity: give one")
    if concept_from == "judge" and not any(
        (judge, judge_prompts, judge_answers, fluency, perplexity)
    ):
        raise UsageError(
            "nothing says what to score by: give --judge, --judge-answers or --concept-from for "
            "the concept, --fluency or --perplexity for fluency"
        )
    judged = None if concept_from == "judge" else concept_from
    read = partial(text_of, judged=judged, perplexity=perplexity)
    plain = baseline_of(read_records([baseline], on_error), read, on_error)
    pairs = list(pairs_of(read_records(files or [], on_error), plain, read, on_error))
    if not pairs:
        raise UsageError("no steered records came in; there is nothing to score")

    if judge_prompts is not None and judge is None:
        write_records(questions(pairs, _concepts(concept, concepts)), judge_prompts)
        return
    answers = None
    if judge is not None:
        asked = questions(pairs, _concepts(concept, concepts))
        made = _answered(asked, judge, judge_length, batch_size, device, dtype)
        answered = list(counted(made, "answers", quiet, len(pairs)))
        if judge_prompts is not None:
            write_records(answered, judge_prompts)
        answers = Answers(answered)
    elif judge_answers is not None:
        answers = Answers(read_records([judge_answers], on_error))
    found, bound = None, None
    if fluency is not None:
        with counting("texts", quiet, 2 * len(pairs)) as gauge:
            found, bound = _perplexities(
                pairs, fluency, fluency_tokens, masks, seed, batch_size, device, dtype, gauge.reach
            )
    outcomes = list(outcomes_of(pairs, answers.of if answers else None, found))
    if answers is not None and not answers.used:
        raise DataError("none of the scores is about a text of these records", judge_answers or "")
    write_rows(rows_of(outcomes, weight, bound), COLUMNS, json)


def _check_judging(
    judge: str | None,
    prompts: str | None,
    answers: str | None,
    concept_from: str,
    concept: str | None,
    concepts: str | None,
) -> None:
    asks = judge is not None or prompts is not None
    if asks and answers is not None:
        raise UsageError("answers come from --judge-answers or from a judge asked now, not both")
    if judge is not None and prompts == "-":
        raise UsageError("standard output has the scores: give --judge-prompts a file")
    if (asks or answers is not None) and concept_from != "judge":
        raise UsageError(f"--concept-from {concept_from} needs no judge: leave one of them out")
    if (concept is None) == (concepts is None) and (asks or concept is not None):
        raise UsageError("what the judge is to look for comes from --concept or from --concepts")


def _concepts(concept: str | None, file: str | None) -> Callable[[Treatment], str]:
    from dlmctl.sae.steering.judge import explanations

    if file is not None:
        return explanations(read_records([file]), file)
    return lambda _: concept or ""


def _answered(
    asked: Iterable[Record], judge: str, length: int, batch_size: int, device: str, dtype: str
) -> Iterator[Record]:
    """The answers of a model, greedily; those that it cannot read have an error."""
    from dlmctl.diffusion.rollout import rollout
    from dlmctl.diffusion.sampling import configured
    from dlmctl.models.loading import load_policy

    policy = load_policy(judge, device, dtype)
    settings = configured(policy, Sampler(gen_length=length, temperature=0.0))
    return rollout(asked, policy, settings, 1, 0, batch_size, "keep")


def _perplexities(
    pairs: Sequence[Pair],
    model: str,
    tokens: int,
    masks: int,
    seed: int,
    batch_size: int,
    device: str,
    dtype: str,
    reach: Callable[[int], None],
) -> tuple[Perplexities, bool]:
    """Those of all texts, and whether they are upper bounds."""
    from dlmctl.diffusion.scoring import MaskPlan
    from dlmctl.models.loading import load_policy
    from dlmctl.sae.steering.fluency import perplexities

    policy = load_policy(model, device, dtype)
    plan = MaskPlan(samples=masks, seed=seed)
    texts = [text for pair in pairs for text in (pair.before, pair.after)]
    return perplexities(policy, texts, tokens, plan, batch_size, reach), policy.diffusion
